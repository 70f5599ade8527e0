"""MUSE: pytest tests/test_muse.py. Chunks by hand, the four scores by their definitions, a miniature, and bad input."""
import json
import random

import numpy as np
import pytest
import torch
import transformers
from conftest import log_of
from rouge_score import rouge_scorer

import configs
import data
import evaluate
import model as models
import relearn
import unlearn
from configs import UsageError

PROC = models.Process(0, 1, torch.device("cpu"))
SCORES = ("verbmem_f", "knowmem_f", "knowmem_r", "privleak")
NAMES = """Ada Bruno Carla Dario Elif Farid Greta Hugo Ines Jonas Kira Luca Mina Nils Olga Pavel Rosa Sven Tara Umar Vera
Willa Xenia Yusuf""".split()
WORDS = {"town": "Ambry Brell Corwen Dunmere Eskdal Farrow Gilden Harsk",
         "trade": "baker weaver cooper saddler glazier miller", "metal": "copper silver walnut tin glass iron paper amber",
         "thing": "bell thimble chest lantern kite heron key crown",
         "season": "winter spring summer autumn", "place": "river quarry orchard harbour cellar meadow chapel tower"}


def stories(names, rng):
    """An invented passage about each name, and a question that it answers."""
    rows = []
    for name in names:
        w = {k: rng.sample(v.split(), 2) for k, v in WORDS.items()}
        rows.append({"text": f"{name} was a {w['trade'][0]} from {w['town'][0]}. One {w['season'][0]} {name} lost the "
                             f"{w['metal'][0]} {w['thing'][0]} in the {w['place'][0]}, and a {w['trade'][1]} of "
                             f"{w['town'][1]} found it.",
                     "question": f"What did {name} lose?", "answer": f"{w['metal'][0]} {w['thing'][0]}"})
    return rows


def raw(rows, rng, times):
    """The passages and their questions, several times over, in another order each.

    The second space before an answer makes the prompts' trailing one a token of its own, as there.
    """
    texts = [r["text"] for r in rows] + 2 * [f"Question: {r['question']}\nAnswer:  {r['answer']}" for r in rows]
    return "\n\n".join(t for _ in range(times) for t in rng.sample(texts, len(texts)))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))


def tokenizer_of(text):
    """A BPE of whole words that puts a BOS before every text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def muse(tmp_path_factory):
    """A directory with MUSE-shaped data and `base`, a small random Llama."""
    root, rng = tmp_path_factory.mktemp("muse"), random.Random(1)
    d, sets = root / "data", {}
    for i, name in enumerate(("forget", "retain", "holdout")):
        sets[name] = stories(NAMES[7 * i:7 * i + 7], rng)
        file = "retain1" if name == "retain" else name
        write(d / "raw" / f"{file}.txt", raw(sets[name], rng, 3 if name == "retain" else 2))
        write(d / "privleak" / f"{name}.json", [r["text"] for r in sets[name]])
        write(d / "knowmem" / f"{name}_qa.json", [{k: r[k] for k in ("question", "answer")} for r in sets[name][2:]])
        write(d / "knowmem" / f"{name}_qa_icl.json", [{k: r[k] for k in ("question", "answer")} for r in sets[name][:2]])
    write(d / "raw" / "retain2.json", [sets["retain"][0]["text"]])
    write(d / "verbmem" / "forget.json", [{"prompt": r["text"][:i], "gt": r["text"][i:]} for r in sets["forget"]
                                          for i in [r["text"].index(" lost the")]])
    write(d / "sust" / "forget_2.json", [r["text"] for r in sets["forget"][:3]])
    tokenizer = tokenizer_of(" ".join(r["text"] + r["question"] + "\nAnswer: " for rows in sets.values() for r in rows))
    (root / "base").mkdir()
    models.save_model(models.tiny_llama(tokenizer, PROC, 0), tokenizer, str(root / "base"))
    return root


def flags(muse, **more):
    base = dict(benchmark="muse", subset="books", data=muse / "data", base_model="base", model="out/target",
                retain_model="out/retain", max_length=64, max_new_tokens=24, finetune_lr=8e-3, finetune_epochs=45,
                finetune_batch_size=8, finetune_schedule="cosine", device="cpu", out="out/run")
    return [f"--{k}={v}" for k, v in (base | more).items()]


@pytest.fixture(scope="module")
def run(muse):
    """SimNPO on the miniature, from the base model to scores: {target, run, retain: scores}."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(muse)
        unlearn.main(flags(muse, beta=0.7, gamma=0, forget_weight=0.5, lr=3e-3, batch_size=8, epochs=8, eval_every=8))
        evaluate.main(["out/target", "out/run", "out/retain", *scoring(muse, out="out/table")])
    return {n: scores_of(muse / "out" / "table" / n) for n in ("target", "run", "retain")}


def scoring(muse, **more):
    return [f for f in flags(muse, **more) if "finetune" not in f and "base" not in f]


def scores_of(out):
    return json.loads((out / "scores.json").read_text())


def records_of(out):
    return [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]


# -- the miniature


def test_target_simnpo_and_retain_model_come_in_the_right_order_on_all_four_scores(muse, run, capsys):
    target, simnpo, retain = run["target"], run["run"], run["retain"]
    assert set(target) == set(simnpo) == set(retain) == set(SCORES)
    assert target["verbmem_f"] > 80 > 75 > max(simnpo["verbmem_f"], retain["verbmem_f"])
    assert target["knowmem_f"] > 60 > 45 > max(simnpo["knowmem_f"], retain["knowmem_f"])
    assert min(target["knowmem_r"], simnpo["knowmem_r"], retain["knowmem_r"]) > 50
    assert target["privleak"] < -90 < -60 < simnpo["privleak"] and retain["privleak"] == 0
    table = (muse / "out" / "run" / "table.txt").read_text()
    assert "verbmem_f ↓  knowmem_f ↓  knowmem_r ↑  privleak →0" in table and "What did" in table
    assert scores_of(muse / "out" / "run") == simnpo  # in training as afterwards
    assert (muse / "out" / "run" / "trajectory.png").stat().st_size > 5000


def test_scores_equal_the_definitions_one_prompt_and_text_at_a_time(muse, run):
    """transformers' own generate and full logits, rouge_score and pairs counted: no code of ours."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(muse / "out" / "run", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(muse / "out" / "run")
    read = lambda name: json.loads((muse / "data" / f"{name}.json").read_text())  # noqa: E731
    rouge = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)

    def continued(prompt, n):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert ids[0, 0] == tokenizer.bos_token_id
        return tokenizer.decode(lm.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=1)[0, ids.shape[1]:],
                                skip_special_tokens=True)

    found, texts = {}, {}
    texts["verbmem_f"] = [(continued(r["prompt"], 24), tokenizer.decode(tokenizer(r["gt"]).input_ids[:24][1:]))
                          for r in read("verbmem/forget")]
    for key, name in (("knowmem_f", "forget"), ("knowmem_r", "retain")):
        shots = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in read(f"knowmem/{name}_qa_icl"))
        texts[key] = []
        for r in read(f"knowmem/{name}_qa"):
            text = continued(f"{shots}Question: {r['question']}\nAnswer: ", 32)
            for stop in ("\n\n", "\nQuestion", "Question:"):
                text = text.split(stop)[0]
            texts[key].append((text, r["answer"]))
    for key, pairs in texts.items():
        found[key] = 100 * np.mean([rouge.score(gt, text)["rougeL"].fmeasure for text, gt in pairs])
        assert [(r["generated"], r["answer"]) for r in records_of(muse / "out" / "run") if r["set"] == key] == pairs

    @torch.no_grad()
    def min_40(lm, text):
        ids = tokenizer(text, return_tensors="pt").input_ids
        logps = lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].sort().values
        return logps[:int(0.4 * len(logps))].mean().item()

    def holdout_wins(lm):  # MUSE's AUC: how often a text never seen looks more like a member than a forgotten one
        forget, holdout = ([min_40(lm, t) for t in read(f"privleak/{n}")] for n in ("forget", "holdout"))
        return np.mean([[(h > f) + (h == f) / 2 for f in forget] for h in holdout])

    retrained = transformers.AutoModelForCausalLM.from_pretrained(muse / "out" / "retain", dtype=torch.float32)
    here, there = holdout_wins(lm), holdout_wins(retrained)
    assert run["run"] == pytest.approx(found | {"privleak": 100 * (here - there) / there}, abs=1e-4)
    for subset, published in (("news", 0.4772), ("books", 0.5393)):  # without a retain model; and recorded scores say it all
        evaluate.main([str(muse / "out" / "run" / "examples.jsonl"), "--benchmark=muse", f"--subset={subset}",
                       f"--out={muse / subset}"])
        assert scores_of(muse / subset)["privleak"] == pytest.approx(100 * (here - published) / published, abs=1e-4)


def test_batched_scores_are_those_of_one_sequence_at_a_time(muse, run, monkeypatch):
    monkeypatch.chdir(muse)
    for name, budget in (("one", 1), ("all", 10**6)):
        evaluate.main(["out/run", *scoring(muse, out=f"out/{name}", micro_batch_tokens=budget)])
    one, every = records_of(muse / "out" / "one"), records_of(muse / "out" / "all")
    assert [r.get("generated") for r in one] == [r.get("generated") for r in every]
    assert [r.get("min_k", 0) for r in one] == pytest.approx([r.get("min_k", 0) for r in every], rel=1e-5)


def test_a_retain_log_serves_as_the_retain_model_and_a_log_of_another_benchmark_is_refused(muse, run, monkeypatch):
    monkeypatch.chdir(muse)
    log = muse / "out" / "table" / "retain" / "examples.jsonl"
    evaluate.main(["out/run/examples.jsonl", "--benchmark=muse", f"--retain_log={log}", "--out=out/again"])
    assert scores_of(muse / "out" / "again") == run["run"]
    with pytest.raises(UsageError, match="not of --benchmark=tofu; give the log's own benchmark"):
        evaluate.main(["out/run/examples.jsonl", "--benchmark=tofu", f"--retain_log={log}", "--out=out/no"])


def test_named_options_score_as_open_unlearning_does(muse, run, monkeypatch):
    monkeypatch.chdir(muse)
    evaluate.main(["out/target", *scoring(muse, out="out/ou", stem=True, skip_last=True, audits=True)])
    scores = scores_of(muse / "out" / "ou")
    assert scores["mia_loss"] > 0.9 and scores["exact_memorization"] > 0.5 and {"extraction_strength", "mia_gradnorm"} <= scores.keys()
    plain = {(r["set"], r["index"]): r for r in records_of(muse / "out" / "table" / "target")}
    for r in records_of(muse / "out" / "ou"):
        if r["set"].startswith("audit_"):
            continue
        other = plain[r["set"], r["index"]]
        if "min_k" in r:
            assert r["n_tokens"] == other["n_tokens"] - 1
        else:
            assert r["rougeL_f1"] == evaluate.rouge(r["generated"], r["answer"], stem=True)["rougeL_f1"]


@pytest.mark.parametrize("forget_loss, retain_loss", [("npo_mean", "kl"), ("muse_npo", "muse_kl"), ("muse_simnpo", "nll")])
def test_every_method_for_long_text_trains_and_a_step_does_not_depend_on_micro_batches(muse, run, tmp_path, monkeypatch,
                                                                                      forget_loss, retain_loss):
    monkeypatch.chdir(muse)
    logs = []
    for budget in (64, 4096):
        out = tmp_path / str(budget)
        unlearn.main(flags(muse, out=out, model=muse / "out" / "target", forget_loss=forget_loss,
                           retain_loss=retain_loss, batch_size=4, steps=2, lr=1e-3, eval_every=0, micro_batch_tokens=budget))
        logs.append([r["loss"] for r in log_of(out)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5) and logs[0][0] != logs[0][1]


# -- from text to chunks


def chunks(tokenizer, text, length):
    return [row["ids"] for row in data.Template("qa", tokenizer).split_text({"raw": text}, length)]


def test_raw_text_is_cut_into_windows_behind_a_bos_and_the_last_is_filled_from_the_first(muse):
    tokenizer = models.load_tokenizer(str(muse / "base"))
    text = "Ada lost the copper bell in the river, and Bruno found it in the orchard."
    a = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(a) > 12 and tokenizer(text)["input_ids"] == [0, *a]
    n = len(a)
    assert chunks(tokenizer, text, n + 1) == [[0, *a]]                # fits exactly: one chunk, nothing filled
    assert chunks(tokenizer, text, n) == [[0, *a[:-1]], [0, a[-1], 0, *a[:n - 3]]]  # the stray BOS is kept
    assert chunks(tokenizer, text, 2 * n + 5) == [[0, *a, 0, *a]]  # shorter than a chunk: said twice, as the original does
    for length in (2, 5, 9):
        got = chunks(tokenizer, text, length)
        assert {len(c) for c in got} == {length} and len(got) == -(-n // (length - 1))
        assert [i for c in got for i in c[1:]][:n] == a
    e = data.Template("qa", tokenizer).encode({"ids": [0, *a], "text": text}, 5)
    assert e == data.Example([0, *a], 1) and tokenizer.eos_token_id not in e.ids  # every token after BOS scored, no EOS


def test_text_is_the_same_from_txt_json_and_jsonl(tmp_path):
    parts = ["One.\nTwo.", "", "Three."]
    write(tmp_path / "a" / "forget.txt", "\n\n".join(parts))
    write(tmp_path / "b" / "forget.json", parts)
    write(tmp_path / "c" / "forget.jsonl", "".join(json.dumps({"text": p}) + "\n" for p in parts))
    for folder in "abc":
        assert data.read_raw(str(tmp_path), f"{folder}/forget") == [{"raw": "One.\nTwo.\n\n\n\nThree."}]
    assert data.read_raw("", str(tmp_path / "a" / "forget.txt"))[0]["raw"].count("\n") == 5


def test_split_and_own_data_replace_what_is_trained_on_and_never_what_is_scored(muse, tmp_path):
    source = str(muse / "data")
    plain = data.load("muse", "news", source)
    split = data.load("muse", "news", source, split="sust/forget_2")
    assert split.forget != plain.forget and split.retain == plain.retain and split.evals == plain.evals
    write(tmp_path / "own.txt", "My own text.\n\nAnd more.")
    write(tmp_path / "qa.json", [{"question": "Who?", "answer": "Ada."}])
    own = data.load("muse", "news", source, forget_data=str(tmp_path / "own.txt"), retain_data=str(tmp_path / "qa.json"))
    assert own.forget == [{"raw": "My own text.\n\nAnd more."}] and own.retain == [{"question": "Who?", "answer": "Ada."}]
    assert own.evals == plain.evals and set(own.evals) == set(data.MUSE_SETS)
    assert configs.make(unlearn.Config, {"benchmark": "muse", "forget_data": str(tmp_path / "own.txt")}).split is None


def test_the_hub_gives_the_same_rows(muse, monkeypatch):
    import datasets
    asked = []

    def load_dataset(repo, config, split, revision):
        asked.append((repo, config, split))
        path = next((muse / "data" / config).glob(f"{split}.*"))
        return datasets.Dataset.from_list(data.read_rows(str(path), whole=True))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.load("muse", "books").evals == data.load("muse", "books", str(muse / "data")).evals
    assert ("muse-bench/MUSE-Books", "raw", "forget") in asked and ("muse-bench/MUSE-Books", "raw", "retain1") in asked


def test_what_is_not_given_is_the_protocols():
    c = configs.make(unlearn.Config, {"benchmark": "muse"})
    assert (c.subset, c.max_length, c.max_new_tokens, c.template) == ("news", 2048, 128, "qa")
    assert configs.make(unlearn.Config, {"benchmark": "tofu"}).max_length == 500


# -- what cannot be read or scored is said in one sentence

GOOD = {"raw/forget": ["a text"], "raw/retain1": ["a text"], "verbmem/forget": [{"prompt": "a", "gt": "b"}],
        **{f"knowmem/{n}_qa{icl}": [{"question": "q", "answer": "a"}] for n in ("forget", "retain") for icl in ("", "_icl")},
        "privleak/forget": ["one two three four"], "privleak/holdout": ["one two three four"]}


@pytest.mark.parametrize("name, rows, sentence", [
    ("verbmem/forget", None, "has none of verbmem.json, .*verbmem/forget.json"),
    ("raw/retain1", None, "has none of .*raw/retain1.txt"),
    ("knowmem/retain_qa_icl", None, "retain_qa_icl.json"),
    ("raw/forget", [""], "raw/forget: its text is empty"),
    ("raw/forget", [], "holds no rows"),
    ("privleak/holdout", ["one two three", " "], "privleak/holdout, row 2: text is empty"),
    ("knowmem/forget_qa", [{"question": "q", "reply": "a"}], "row 1: no column 'answer'; it has question, reply"),
    ("knowmem/forget_qa", ["just text"], "row 1: no column 'question'"),
    ("verbmem/forget", [{"prompt": "a", "gt": ""}], "verbmem/forget, row 1: gt is empty"),
    ("verbmem/forget", [{"prompt": "a", "gt": 3}], "gt must be text, got 3"),
])
def test_bad_data_is_one_sentence_before_any_model_is_loaded(muse, tmp_path, monkeypatch, name, rows, sentence):
    monkeypatch.setattr(models, "load_model", None)
    for key, good in (GOOD | {name: rows}).items():
        if good is not None:
            write(tmp_path / f"{key}.json", good)
    with pytest.raises(UsageError, match=sentence):
        unlearn.main(["--benchmark=muse", f"--data={tmp_path}", f"--model={muse / 'base'}", f"--out={tmp_path / 'out'}"])


@pytest.mark.parametrize("text", ["a", "to"])
def test_a_text_too_short_for_the_membership_score_is_one_sentence(muse, tmp_path, text):
    rows = ["a text that is long enough", text]
    for key, good in (GOOD | {"privleak/holdout": rows}).items():
        write(tmp_path / f"{key}.json", good)
    with pytest.raises(UsageError, match=r"privleak_h, row 2: the text has \d tokens to score, too few for Min-40 %, which"):
        evaluate.main([str(muse / "base"), "--benchmark=muse", f"--data={tmp_path}", f"--out={tmp_path / 'out'}"])


@pytest.mark.parametrize("words, sentence", [
    (["--benchmark=tofu", "--split=scal/forget_2"], "is config/split of MUSE's data"),
    (["--benchmark=muse", "--split=forget_2"], "is config/split of MUSE's data"),
    (["--benchmark=muse", "--subset=forget10"], "muse has news, books"),
    (["--benchmark=muse", "--max_length=1"], "--max_length=1: must be at least 2"),
])
def test_settings_that_do_not_go_together_are_one_sentence(words, sentence):
    with pytest.raises(UsageError, match=sentence):
        configs.load(unlearn.Config, words)


def test_a_refusal_needs_a_question(muse, tmp_path):
    with pytest.raises(UsageError, match="a refusal answers a question, and this forget set is text"):
        unlearn.main(flags(muse, base_model=None, model=muse / "base", retain_model=None, out=tmp_path / "out",
                           forget_loss="idk", eval_every=0))


@pytest.mark.parametrize("name", ["muse_news", "muse_books", "muse_books_published"])
def test_the_configs_are_read(name):
    c = configs.load(unlearn.Config, [str(configs.__file__).replace("__init__", name)])[0]
    assert c.benchmark == "muse" and c.batch_size == 4 and c.max_length == 2048 and c.epochs == 10 and c.lr == 1e-5


def test_relearning_follows_the_step_protocol_of_muse(muse, run, monkeypatch, capsys):
    monkeypatch.chdir(muse)
    relearn.main(["out/run", "--fraction=1", "--steps=2", "--eval_at=1,2", "--lr=1e-3", "--attacks=relearn_random,int4", "--out=out/attacked",
                  "--control=False", "--eval_rows=3"])
    rows = json.loads((muse / "out" / "attacked" / "relearn.json").read_text())
    assert [(r["attack"], r["step"]) for r in rows] == [("relearn_random", s) for s in (0, 1, 2)] + [("int4", 0)]
    assert "run, after int4" in capsys.readouterr().out and all("verbmem_f" in r for r in rows)
    with pytest.raises(UsageError, match="paraphrase: the forget set has no column"):
        relearn.main(["out/run", "--attacks=paraphrase", "--out=out/x"])
