"""Published set-ups: pytest tests/test_published.py. No network.

Released models score with the documented commands, and published values stand in the configs.
"""

import json
import math
import random
import re
import shutil
import statistics

import huggingface_hub
import pytest
import scipy.stats
import torch
import transformers
from conftest import ROOT, SHARED, flags, log_of, needs_shared, rows_of, run_script, save_rows
from safetensors.torch import load_file

import configs
import evaluate
import unlearn
from configs import UsageError

# what transformers 5 raises where a repository has no tokenizer files, and what it raised before
BACKEND = (
    "Couldn't instantiate the backend tokenizer from one of: \n"
    "(1) a `tokenizers` library serialization file, \n"
    "(2) a slow tokenizer instance to convert or \n"
    "(3) an equivalent slow tokenizer class to instantiate and convert."
)
BEFORE = (
    "Can't load tokenizer for 'org/name'. If you were trying to load it from "
    "'https://huggingface.co/models', make sure "
    "you don't have a local directory with the same name."
)


def given(mini, *names, **more):
    """The command line of evaluate.py on the miniature."""
    keep = ("benchmark", "subset", "data", "template", "retain_model", "device", "max_new_tokens")
    return [
        *map(str, names),
        *(f for f in flags(mini, **more) if f[2:].split("=")[0] in {*keep, *more}),
    ]


# -- a model without a tokenizer


@pytest.fixture
def bare(mini, tmp_path):
    """What the released SimNPO repositories hold: config, generation config, weights."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(mini / "target" / name, tmp_path)
    return tmp_path


def test_a_directory_without_a_tokenizer_is_one_sentence_that_names_the_setting(mini, bare):
    done = run_script("evaluate.py", given(mini, bare, out=bare / "out"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{bare}: has no tokenizer; give --tokenizer=" in done.stderr
    assert "NousResearch/Llama-2-7b-chat-hf" in done.stderr and "network" not in done.stderr
    with pytest.raises(UsageError, match="has no tokenizer; give --tokenizer="):
        unlearn.main(flags(mini, model=bare, out=bare / "run"))


def test_with_the_tokenizer_named_it_scores_as_the_model_that_has_its_own(mini, bare):
    evaluate.main(given(mini, bare, tokenizer=mini / "target", out=bare / "a"))
    evaluate.main(given(mini, mini / "target", out=bare / "b"))
    assert (bare / "a" / "scores.json").read_text() == (bare / "b" / "scores.json").read_text()


@pytest.mark.parametrize("kind", ["phi", "qwen2", "gpt2", "gemma"])
def test_a_tokenizer_of_special_tokens_only_is_none(mini, tmp_path, kind):
    """transformers makes one without a word for these."""
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no tokenizer; give --tokenizer="):
        evaluate.main(given(mini, tmp_path, out=tmp_path / "out"))


@pytest.fixture
def hub(monkeypatch):
    """The hub has org/name, and answers a request for its tokenizer with this error."""

    def answers(error, real=transformers.AutoTokenizer.from_pretrained):
        def from_pretrained(name, **options):
            if str(name) == "org/name":
                raise error
            return real(name, **options)

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)

    return answers


@pytest.mark.parametrize("error", [ValueError(BACKEND), OSError(BEFORE)])
def test_a_hub_id_without_a_tokenizer_does_not_send_anyone_to_the_network(
    mini, tmp_path, hub, error
):
    hub(error)
    with pytest.raises(UsageError) as e:
        evaluate.main(given(mini, "org/name", out=tmp_path))
    assert str(e.value).startswith(
        "org/name: has no tokenizer; give --tokenizer="
    ) and "network" not in str(e.value)


def test_a_hub_that_does_not_answer_is_still_said_to_be_so(mini, tmp_path, hub):
    hub(OSError("We couldn't connect to 'https://huggingface.co' to load the files."))
    with pytest.raises(UsageError, match="check the id, the network"):
        evaluate.main(given(mini, "org/name", out=tmp_path))


# -- means over answers


def first_step(mini, out, **more):
    unlearn.main(flags(mini, steps=1, shuffle=False, out=out, **more))
    return log_of(out)[0]


def test_nll_mean_and_ga_mean_are_means_over_answers_of_each_answers_token_mean(mini, tmp_path):
    evaluate.main(given(mini, mini / "target", out=tmp_path / "scored"))
    records = [
        json.loads(line)
        for line in (tmp_path / "scored" / "examples.jsonl").read_text().splitlines()
    ]
    forget = [r for r in records if r["set"] == "forget"][:4]  # the first batch
    retain = [r for r in records if r["set"] == "retain"][:4]
    assert len({r["n_tokens"] for r in retain}) > 2

    def by_answer(rows):
        return sum(r["nll"] for r in rows) / 4

    def by_token(rows):
        return sum(r["nll"] * r["n_tokens"] for r in rows) / sum(r["n_tokens"] for r in rows)

    mean = first_step(mini, tmp_path / "a", forget_loss="ga_mean", retain_loss="nll_mean")
    assert mean["forget_loss"] == pytest.approx(-by_answer(forget), rel=1e-5)
    assert mean["retain_loss"] == pytest.approx(by_answer(retain), rel=1e-5)
    plain = first_step(mini, tmp_path / "b", forget_loss="ga", retain_loss="nll")
    assert plain["retain_loss"] == pytest.approx(by_token(retain), rel=1e-5)
    assert abs(by_answer(retain) - by_token(retain)) > 0.01  # so the two can be told apart


def test_a_mean_over_answers_does_not_depend_on_the_micro_batch(mini, tmp_path):
    rows = [
        first_step(
            mini,
            tmp_path / str(n),
            forget_loss="ga_mean",
            retain_loss="nll_mean",
            micro_batch_tokens=n,
        )
        for n in (16, 4096)
    ]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-5)


# -- bfloat16 weights


def weights_of(path):
    return load_file(path / "model.safetensors")


def moved(mini, out):
    """The share of the target's weights, rounded to bfloat16, that a run changed."""
    before, after = weights_of(mini / "target"), weights_of(out)
    changed = sum(int((before[k].bfloat16() != after[k].bfloat16()).sum()) for k in before)
    return changed / sum(v.numel() for v in before.values())


def test_bf16_weights_are_trained_and_saved_in_bfloat16_and_a_small_rate_leaves_most_as_they_are(
    mini, tmp_path
):
    """A bfloat16 weight has 8 bits: a step below 1/512 of it is lost. A float32 master keeps it."""
    for dtype in ("fp32", "bf16_weights"):
        unlearn.main(
            flags(
                mini,
                dtype=dtype,
                lr=1e-4,
                steps=20,
                forget_loss="simnpo",
                beta=2.5,
                out=tmp_path / dtype,
            )
        )
    assert {v.dtype for v in weights_of(tmp_path / "bf16_weights").values()} == {torch.bfloat16}
    assert {v.dtype for v in weights_of(tmp_path / "fp32").values()} == {torch.float32}
    assert 0 < moved(mini, tmp_path / "bf16_weights") < 0.5 * moved(mini, tmp_path / "fp32")
    rows = [log_of(tmp_path / dtype)[0] for dtype in ("fp32", "bf16_weights")]
    assert (
        rows[0]["forget_loss"] == pytest.approx(rows[1]["forget_loss"], rel=0.05)
        and rows[0] != rows[1]
    )


def test_adamw_keeps_its_state_in_bfloat16_too(mini, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        torch.optim,
        "AdamW",
        lambda *a, f=torch.optim.AdamW, **more: made.append(f(*a, **more)) or made[-1],
    )
    unlearn.main(
        flags(mini, dtype="bf16_weights", forget_loss="npo", retain_loss="kl", out=tmp_path / "run")
    )
    state = [s for optimizer in made for s in optimizer.state.values()]
    assert state and {s[k].dtype for s in state for k in ("exp_avg", "exp_avg_sq")} == {
        torch.bfloat16
    }


def test_a_model_saved_in_bfloat16_scores_in_float32_where_that_is_asked(mini, tmp_path):
    unlearn.main(flags(mini, dtype="bf16_weights", out=tmp_path / "run"))
    lm = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    lm.save_pretrained(tmp_path / "single")
    evaluate.main(given(mini, tmp_path / "single", tokenizer=mini / "target", out=tmp_path / "a"))
    evaluate.main(given(mini, tmp_path / "run", dtype="fp32", out=tmp_path / "b"))
    assert (tmp_path / "a" / "scores.json").read_text() == (
        tmp_path / "b" / "scores.json"
    ).read_text()


def test_adapters_of_bfloat16_weights_train(mini, tmp_path):
    unlearn.main(flags(mini, dtype="bf16_weights", lora_rank=2, lr=1e-2, out=tmp_path / "run"))
    assert moved(mini, tmp_path / "run") > 0


def planned(mini, out, capsys, **more):
    unlearn.main(flags(mini, plan=True, out=out, **more))
    line = capsys.readouterr().out
    return {
        k: float(re.search(rf"{k} ([0-9.]+) MB", line)[1])
        for k in ("weights", "gradients", "optimizer")
    }


def test_the_plan_of_bf16_weights_is_half_of_float32s(mini, tmp_path, capsys):
    whole, half = (
        planned(mini, tmp_path / dtype, capsys, dtype=dtype) for dtype in ("fp32", "bf16_weights")
    )
    assert all(half[k] == pytest.approx(whole[k] / 2, abs=0.6) for k in whole)


# -- a retain model's log


PARTS = (
    "eval_log_forget.json",
    "eval_log.json",
    "eval_real_author_wo_options.json",
    "eval_real_world_wo_options.json",
)


def authors_log(path, n):
    """Shaped as the authors' log of a retain model: n rows a set, lists in a dict by index."""
    log, rng = {}, torch.Generator().manual_seed(0)
    for name in PARTS:
        nll = torch.rand(3, n, generator=rng).add(0.5).tolist()
        values = {
            "avg_gt_loss": nll[0],
            "avg_paraphrased_loss": nll[1],
            "num_token_gt": [9] * n,
            "rougeL_recall": [0.4] * n,
            "average_perturb_loss": [[x + 1, x + 2] for x in nll[2]],
            "generated_text": [["q", "said", "true"]] * n,
        }
        log[name] = {k: {str(i): v for i, v in enumerate(some)} for k, some in values.items()}
    path.write_text(json.dumps(log))
    return path


def by_hand(log, records):
    """p of the KS test between the log's forget truth ratios and those of a model's records."""
    part = json.loads(log.read_text())["eval_log_forget.json"]
    retain = [
        math.exp(part["avg_paraphrased_loss"][i] - sum(v) / len(v))
        for i, v in part["average_perturb_loss"].items()
    ]
    own = [
        math.exp(r["paraphrased_nll"] - sum(r["perturbed_nll"]) / len(r["perturbed_nll"]))
        for r in map(json.loads, records.read_text().splitlines())
        if r["set"] == "forget"
    ]
    return len(retain), len(own), scipy.stats.ks_2samp(own, retain).pvalue


def against_log(mini, out, log, **more):
    """A model scored against a retain log."""
    words = [
        w
        for w in given(mini, mini / "target", out=out, **more)
        if not w.startswith("--retain_model=")
    ]
    evaluate.main([*words, f"--retain_log={log}"])
    return json.loads((out / "scores.json").read_text())


def test_forget10_is_scored_against_the_authors_log_of_300_rows(mini, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("retain", "real_authors", "world_facts"):
        shutil.copy(mini / "data" / f"{name}_perturbed.jsonl", tmp_path / "data")
    save_rows(
        tmp_path / "data" / "forget10_perturbed.jsonl", rows_of(310, random.Random(1), 2, True)
    )
    log = authors_log(tmp_path / "retain90.json", 300)
    more = {"subset": "forget10", "data": tmp_path / "data", "max_new_tokens": 1}
    scores = against_log(mini, tmp_path / "a", log, eval_rows=300, **more)
    n, own, p = by_hand(log, tmp_path / "a" / "examples.jsonl")
    assert (n, own) == (300, 300) and scores["forget_quality"] == pytest.approx(p, rel=1e-9)
    with pytest.raises(UsageError, match="--eval_rows=300"):
        against_log(mini, tmp_path / "b", log, **more)


def first_rows(part, n):
    """The first rows of a log's part, whose columns are lists or dicts by index."""
    cut = {}
    for name, column in part.items():
        is_dict = isinstance(column, dict)
        cut[name] = dict(list(column.items())[:n]) if is_dict else column[:n]
    return cut


@needs_shared
def test_a_real_log_of_the_authors_cut_to_300_rows_gives_its_forget_quality(tmp_path):
    logs = {}
    for name in ("full", "retain90"):
        log = json.loads((SHARED / "golden" / "tofu_logs" / f"llama2-7b_{name}.json").read_text())
        if name == "retain90":
            log = {file: first_rows(log[file], 300) for file in PARTS}
        logs[name] = tmp_path / f"{name}.json"
        logs[name].write_text(json.dumps(log))
    evaluate.main(
        [
            str(logs["full"]),
            "--benchmark=tofu",
            "--subset=forget10",
            "--eval_rows=300",
            f"--retain_log={logs['retain90']}",
            f"--out={tmp_path / 'out'}",
        ]
    )
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (
        scores["model_utility"] == pytest.approx(0.622677, abs=1e-6)
        and 0 < scores["forget_quality"] < 1e-10
    )


@pytest.mark.parametrize(
    "location, repo, revision",
    [
        ("dataset:org/logs/retain90/TOFU_EVAL.json", "org/logs", None),
        ("dataset:org/logs@v2/retain90/TOFU_EVAL.json", "org/logs", "v2"),
    ],
)
def test_a_retain_log_is_read_from_a_dataset_on_the_hub(
    mini, tmp_path, monkeypatch, location, repo, revision
):
    asked, log = [], authors_log(tmp_path / "log.json", 12)

    def download(repo_id, filename, *, repo_type=None, revision=None):
        asked.append((repo_id, filename, repo_type, revision))
        return str(log)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    there = against_log(mini, tmp_path / "a", location)
    assert set(asked) == {(repo, "retain90/TOFU_EVAL.json", "dataset", revision)}
    assert there == against_log(mini, tmp_path / "b", log)


def test_a_retain_log_that_the_hub_does_not_give_is_one_sentence(mini, tmp_path):
    with pytest.raises(UsageError) as e:  # no network here
        against_log(mini, tmp_path / "a", "dataset:org/logs/retain90.json")
    assert "dataset:org/logs/retain90.json: the hub did not give it" in str(
        e.value
    ) and "\n" not in str(e.value)
    with pytest.raises(UsageError, match="is written dataset:org/name/path.json"):
        against_log(mini, tmp_path / "a", "dataset:logs.json")
    with pytest.raises(UsageError, match="no such file, and not dataset:org/name/path.json"):
        configs.load(unlearn.Config, ["--retain_log=retain90.json"])


# -- LoRA


def test_an_adapter_begins_as_pefts_does(mini, tmp_path):
    """A uniform in +-1/sqrt(width), B zero.

    AdamW's first step makes B lr or -lr, so rank 1 shows |A| in the saved weights.
    """
    unlearn.main(flags(mini, lora_rank=1, lr=1e-3, steps=1, weight_decay=0, out=tmp_path / "run"))
    before, after = (
        load_file(path / "model.safetensors") for path in (mini / "target", tmp_path / "run")
    )
    names = [k for k in before if k.endswith("_proj.weight")]
    assert names
    for name in names:
        delta = (after[name] - before[name]).abs().amax(0) / (2 * 1e-3)  # (in,): |A|
        bound = before[name].shape[1] ** -0.5
        assert (
            delta.max() < 1.02 * bound
            and delta.max() > 0.8 * bound
            and 0.35 < delta.mean() / bound < 0.65
        ), name


# -- what the configs and the pages say


PAGES = [
    ROOT / "README.md",
    ROOT / "configs" / "README.md",
    ROOT / "configs" / "results" / "published.md",
    *sorted((ROOT / "configs").glob("*.py")),
]
ID = re.compile(
    r"(?:OPTML-Group|open-unlearning|muse-bench|NousResearch|meta-llama|HuggingFaceH4"
    r"|HuggingFaceTB)"
    r"/[^\s`,;|)'\"]*"
)
NO_MODEL = ("OPTML-Group/Unlearn-Simple", "open-unlearning/eval")  # a GitHub repository, a dataset
OWN_TOKENIZER = (
    "open-unlearning/tofu_Llama-3.2",
    "open-unlearning/unlearn_tofu_Llama-3.2",
    "HuggingFaceTB/",
)


def text_of(page):
    return re.sub(r"\\\n\s*", "", page.read_text())


def setting(name, *words):
    return configs.load(unlearn.Config, [str(ROOT / "configs" / f"{name}.py"), *words])[0]


@pytest.mark.parametrize(
    "words, forget, retain",
    [([], 1.0, 0.1375), (["--subset=forget10", "--beta=4.5", "--retain_weight=0.125"], 1.0, 0.125)],
)
def test_tofu_7b_has_the_weights_of_the_released_models(words, forget, retain):
    c = setting("tofu_7b", *words)
    assert (c.forget_weight, c.retain_weight, c.retain_loss, c.gamma) == (
        forget,
        retain,
        "nll_mean",
        0.0,
    )
    assert c.tokenizer == "NousResearch/Llama-2-7b-chat-hf" and c.template == "llama2"
    assert all(
        word in text_of(ROOT / "configs" / "tofu_7b.py") for word in words
    )  # the header says how


def test_the_table_of_methods_has_the_papers_ratio_and_the_readmes_as_rows_of_their_own():
    rows = [
        line
        for line in text_of(ROOT / "configs" / "README.md").splitlines()
        if line.startswith("| SimNPO, TOFU")
    ]
    weights = {tuple(re.findall(r"(?:forget|retain)_weight=([\d.]+)", row)) for row in rows}
    assert {("1", "0.1375"), ("1", "0.125"), ("0.1375", "1"), ("0.125", "1")} == weights
    readme = next(row for row in rows if "--forget_weight=0.1375" in row)
    assert "README" in readme and "4e-6 to 4e-8" in readme


def test_the_published_muse_set_up_trains_bfloat16_weights_and_the_papers_does_not():
    assert (
        setting("muse_books_published").dtype == "bf16_weights"
        and setting("muse_books").dtype == "bf16"
    )
    assert setting("muse_books").tokenizer == "meta-llama/Llama-2-7b-hf"


def test_wmdp_bio_is_the_cards():
    c = setting(
        "wmdp_bio", f"--forget_data={ROOT / 'LICENSE'}", f"--retain_data={ROOT / 'LICENSE'}"
    )
    assert (c.beta, c.gamma, c.retain_weight, c.lr, c.steps, c.batch_size) == (
        5.5,
        0.0,
        5.0,
        4e-6,
        125,
        4,
    )
    assert "--tasks wmdp_bio,mmlu" in text_of(ROOT / "configs" / "wmdp_bio.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_hub_id_is_org_slash_name(page):
    for name in ID.findall(text_of(page)):
        name = name.rstrip(".:")
        known = [n for n in NO_MODEL if name.startswith(n)]
        assert known or re.fullmatch(r"[\w-]+/[\w.-]+", name), name
        if not known:
            configs.check_name(name, "model")


def commands():
    """Every evaluate or relearn command on a hub id, with what is given to it."""
    for page in PAGES:
        for words in re.findall(
            r"(?:evaluate|relearn)\.py ([^`#\n]*)", text_of(page).replace("\n--", " --")
        ):
            name = words.split()[0] if words.split() else ""
            if ID.fullmatch(name):
                yield pytest.param(name, words, id=f"{page.name}: {name}")


@pytest.mark.parametrize("name, words", list(commands()))
def test_a_command_on_a_hub_id_gives_tokenizer_and_template(name, words):
    assert name.startswith(OWN_TOKENIZER) or "--tokenizer=" in words
    assert "--template=" in words and "--benchmark=" in words


def test_the_table_of_hub_ids_says_tokenizer_and_template_of_each():
    text = text_of(ROOT / "configs" / "README.md").split("## Models to score")[1].split("\n## ")[0]
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert len(rows) >= 9
    said = ""
    for ids, _, give in rows:
        said = said if give == "the same" else give
        assert "--template=" in said
        assert (
            all(
                name.strip("`").startswith(OWN_TOKENIZER) for name in ids.split(", ") if "/" in name
            )
            or "--tokenizer=" in said
        )
        assert ("its own tokenizer" in said) != ("--tokenizer=" in said)


def published_rows():
    """(base command, what a row of published.md adds to it), of every row that has one."""
    base = None
    for line in (
        (ROOT / "configs" / "results" / "published.md")
        .read_text()
        .replace("\n--", " --")
        .splitlines()
    ):
        for words in re.findall(
            r"`[^`]*python unlearn\.py ([^`]*)`|`torchrun --nproc_per_node=8 unlearn\.py ([^`]*)`",
            line,
        ):
            base = "".join(words)
            yield base, ""
        for more in re.findall(r"`(--[^`]*)`", line) if line.startswith("|") else ():
            yield base, more


def test_every_command_of_published_md_is_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("retain95.json", "retain90.json", "FILE"):
        (tmp_path / name).write_text("{}")
    rows = list(published_rows())
    assert len(rows) > 30
    for base, more in rows:
        words = (
            f"{base} {more}".replace("SUBSET", "forget05")
            .replace("retainNN", "retain95")
            .replace("configs/", f"{ROOT}/configs/")
        )
        c = configs.load(unlearn.Config, words.split())[0]
        assert c.model and (c.benchmark == "tofu" or c.benchmark == "muse")


def test_no_score_of_published_md_is_ours_until_it_is_run():
    """A cell that is no longer 'not run' needs a log: change this test with it."""
    lines = (ROOT / "configs" / "results" / "published.md").read_text().splitlines()
    ours = [
        line.strip("| ").split("|")[-1].strip()
        for line in lines
        if line.startswith("| ") and "ours" not in line
    ]
    assert len(ours) > 40 and set(ours) <= {"not run", "-", ""}


def test_the_table_of_three_ratios_is_that_of_its_runs():
    folder = ROOT / "configs" / "results" / "demo_methods"
    runs = [json.loads(line) for line in (folder / "ratios.jsonl").read_text().splitlines()]
    table = (folder / "README.md").read_text().split("## Three ratios")[1]
    ratios = {}
    for r in runs:
        ratios.setdefault((r["forget_weight"], r["retain_weight"]), []).append(r)
    assert [len(g) for g in ratios.values()] == [3, 3, 3]
    for (forget, retain), group in ratios.items():
        row = next(
            line for line in table.splitlines() if line.startswith(f"| {forget:g}, {retain:g}")
        )
        assert ", ".join(f"{r['forget_quality']:.3f}" for r in group) in row
        for key in ("model_utility", "forget_prob", "forget_rouge", "retain_prob"):
            values = [r[key] for r in group]
            assert f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" in row
