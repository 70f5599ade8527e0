"""Scores: pytest tests/test_evaluate.py. Metrics by hand, recorded logs of real models, and the same score any way it is run."""
import csv
import functools
import hashlib
import json
import math
import shutil
import zlib

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from conftest import SHARED, flags, needs_shared, run_script
from safetensors.torch import load_file, save_file

import configs
import data
import evaluate
import model as models
import unlearn
from configs import UsageError

PROC = models.Process(0, 1, torch.device("cpu"))
KEYS = {"forget_quality", "model_utility"} | {f"{s}_{k}" for s in ("forget", "retain", "real_authors", "world_facts")
                                             for k in ("prob", "rouge", "truth_ratio")}


def eval_flags(mini, **more):
    keep = ("benchmark", "subset", "data", "template", "retain_model", "device", "max_new_tokens")
    return [f for f in flags(mini) if f[2:].split("=")[0] in keep and f[2:].split("=")[0] not in more] + [
        f"--{k}={v}" for k, v in more.items()]


def scores_of(out):
    return json.loads((out / "scores.json").read_text())


# -- metrics by hand


def test_truth_ratio_is_wrong_over_correct_with_a_geometric_mean():
    right, wrong = math.log(4), [math.log(2), math.log(8)]  # p = 1/4 against 1/2 and 1/8, whose geometric mean is 1/4
    assert evaluate.truth_ratio([right], [wrong])[0] == pytest.approx(1.0)
    assert evaluate.truth_ratio([right], [[0.0, 0.0]])[0] == pytest.approx(4.0)  # wrong answers certain: 1 / (1/4)


def test_forget_quality_is_one_for_equal_samples_and_the_known_floor_for_separated_ones():
    a = np.linspace(0, 1, 40)
    assert evaluate.forget_quality(a, a) == pytest.approx(1.0)
    # two separated samples of 40: two of the C(80, 40) orderings
    assert evaluate.forget_quality(a, a + 2) == pytest.approx(2 / math.comb(80, 40), rel=1e-9)
    assert evaluate.forget_quality(torch.tensor(a), list(a)) == pytest.approx(1.0)


def test_model_utility_is_the_harmonic_mean_and_zero_if_any_part_is():
    assert evaluate.model_utility({"a": 1.0, "b": 0.5}) == pytest.approx(2 / (1 + 2))
    assert evaluate.model_utility({"a": 1.0, "b": 0.0}) == 0.0


def test_rouge_counts_subsequences_and_stems_where_asked():
    got = evaluate.rouge("the cat sat", "the dog sat down", stem=False)
    assert got["rougeL_recall"] == pytest.approx(2 / 4) and got["rouge1_recall"] == pytest.approx(2 / 4)
    assert got["rougeL_f1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert evaluate.rouge("cats", "cat", True)["rougeL_recall"] == 1 and evaluate.rouge("cats", "cat", False)["rougeL_recall"] == 0


def test_min_k_takes_the_lowest_tokens_at_least_one_and_standardises_for_plus_plus():
    assert evaluate.min_k([-1.0, -5.0, -2.0, -4.0, -3.0]) == pytest.approx(-4.5)  # int(0.4 * 5) = 2 lowest
    assert evaluate.min_k([-1.0, -7.0]) == -7.0  # int(0.8) = 0: one at least
    assert evaluate.min_k([-1.0, -7.0], 1.0, ([-1.0, -1.0], [4.0, 0.0])) == pytest.approx((0 - 6 / 1e-3) / 2)


def test_auc_counts_pairs_with_half_for_ties():
    assert evaluate.auc([3, 2], [1, 2]) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 30), rng.integers(0, 9, 20)
    assert evaluate.auc(a, b) == pytest.approx(scipy.stats.mannwhitneyu(a, b).statistic / 600)


def test_privleak_is_zero_at_the_retain_models_auc_and_minus_100_when_memorised():
    assert evaluate.privleak(1 - 0.4772, 1 - 0.4772) == pytest.approx(0)
    assert evaluate.privleak(1.0, 1 - 0.4772) == pytest.approx(-100)
    assert evaluate.privleak(0.0, 1 - 0.4772) == pytest.approx(109.55574, abs=1e-4)  # News cannot be higher
    assert evaluate.privleak(0.0, 1 - 0.5393) == pytest.approx(85.42555, abs=1e-4)   # nor Books


def test_memorization_and_extraction_of_hand_made_answers():
    assert evaluate.exact_memorization([True, False, True, True]) == 0.75
    assert evaluate.extraction_strength([True, False, True, True]) == pytest.approx(1 - 2 / 4)
    assert evaluate.extraction_strength([True, True]) == 1.0
    assert evaluate.extraction_strength([True, True, False]) == 0.0


@pytest.mark.parametrize("call", [
    lambda: evaluate.truth_ratio([], []), lambda: evaluate.forget_quality([], [1.0]), lambda: evaluate.model_utility({}),
    lambda: evaluate.min_k([]), lambda: evaluate.auc([1.0], []), lambda: evaluate.exact_memorization([]),
    lambda: evaluate.extraction_strength([])])
def test_a_metric_of_nothing_is_an_error(call):
    with pytest.raises(ValueError):
        call()


# -- recorded logs


@needs_shared
def test_the_recorded_log_of_a_real_llama_2_7b_gives_its_published_scores(tmp_path):
    logs = SHARED / "golden" / "tofu_logs"
    evaluate.main([str(logs / "llama2-7b_full.json"), f"--retain_log={logs / 'llama2-7b_retain90.json'}", f"--out={tmp_path}"])
    scores = scores_of(tmp_path)
    assert scores["model_utility"] == pytest.approx(0.6226773637, abs=1e-9)
    assert scores["forget_quality"] == pytest.approx(1.834066e-21, rel=1e-6)
    assert scores["world_facts_prob"] == pytest.approx(0.418562, abs=1e-6)  # p / (p + wrong)


def test_logs_of_all_three_formats_give_the_same_scores(mini, tmp_path):
    """Our examples.jsonl, the same as TOFU's log (dicts by index, lists), and as open-unlearning's."""
    evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path / "ours")])
    records = [json.loads(line) for line in (tmp_path / "ours" / "examples.jsonl").read_text().splitlines()]
    tofu, listed, other = {}, {}, {}
    short = {v: k for k, v in evaluate.OPEN_UNLEARNING_LOG.items()}
    for file, name in evaluate.TOFU_LOG.items():
        rows = [r for r in records if r["set"] == name]
        columns = {"avg_gt_loss": [r["nll"] for r in rows], "rougeL_recall": [r["rougeL_recall"] for r in rows],
                   "avg_paraphrased_loss": [r.get("paraphrased_nll", r["nll"]) for r in rows],
                   "average_perturb_loss": [r["perturbed_nll"] for r in rows], "num_token_gt": [r["n_tokens"] for r in rows],
                   "generated_text": [["", r["generated"], r["answer"]] for r in rows]}
        listed[file] = columns
        tofu[file] = {k: {str(i): v for i, v in reversed(list(enumerate(c)))} for k, c in columns.items()}  # any order
        part = lambda values: {"agg_value": 0, "value_by_index": {str(i): v for i, v in enumerate(values)}}  # noqa: E731
        other[f"{short[name]}_Q_A_Prob"] = part([{"avg_loss": r["nll"], "prob": 0} for r in rows])
        other[f"{short[name]}_Q_A_PERT_Prob"] = part([{"avg_loss": r["perturbed_nll"]} for r in rows])
        other[f"{short[name]}_Q_A_ROUGE"] = part([{"rougeL_recall": r["rougeL_recall"], "generation": r["generated"]} for r in rows])
        if name in ("forget", "retain"):
            other[f"{short[name]}_Q_A_PARA_Prob"] = part([{"avg_loss": r["paraphrased_nll"]} for r in rows])
    evaluate.main([str(mini / "retain"), *eval_flags(mini, out=tmp_path / "r", retain_model=mini / "target")])
    retain_log = f"--retain_log={tmp_path / 'r' / 'examples.jsonl'}"
    for i, log in enumerate((tofu, listed, other)):
        (tmp_path / f"log{i}.json").write_text(json.dumps(log))
        evaluate.main([str(tmp_path / f"log{i}.json"), retain_log, f"--out={tmp_path / str(i)}"])
        assert scores_of(tmp_path / str(i)) == pytest.approx(scores_of(tmp_path / "ours"), abs=1e-12)
    evaluate.main([str(tmp_path / "ours" / "examples.jsonl"), retain_log, f"--out={tmp_path / 'again'}"])
    assert scores_of(tmp_path / "again") == scores_of(tmp_path / "ours")


@pytest.mark.parametrize("text", ["", "[]", "{}", "{\"a\": 1}", "not json", "[1, 2]", "{\"eval_log_forget.json\": {\"avg_gt_loss\": [1.0]}}"])
def test_a_file_that_is_no_log_is_refused_with_one_sentence(tmp_path, text):
    (tmp_path / "log.json").write_text(text)
    with pytest.raises(UsageError, match="not a log this can read"):
        evaluate.read_log(str(tmp_path / "log.json"))


# -- models


def test_scores_equal_the_definition_on_plain_unpadded_forwards(mini, tmp_path):
    """One example at a time, full logits, transformers' own generate: no code of ours but the definition."""
    evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path)])
    scores = scores_of(tmp_path)
    assert scores.keys() == KEYS and all(math.isfinite(v) for v in scores.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini / "target")
    lms = {n: transformers.AutoModelForCausalLM.from_pretrained(mini / n, dtype=torch.float32) for n in ("target", "retain")}

    @torch.no_grad()
    def nll(lm, question, answer):
        prompt = tokenizer(f"Question: {question}\nAnswer:").input_ids
        ids = torch.tensor([prompt + tokenizer(f" {answer}").input_ids + [tokenizer.eos_token_id]])
        logp = lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1:]
        return -logp.mean().item()

    rows = data.read_rows(str(mini / "data" / "forget05_perturbed.jsonl"))
    ratios = {}
    for name, lm in lms.items():
        ratios[name] = [math.exp(nll(lm, r["question"], r["paraphrased_answer"])
                                 - sum(nll(lm, r["question"], a) for a in r["perturbed_answer"]) / 5) for r in rows]
    assert scores["forget_quality"] == pytest.approx(scipy.stats.ks_2samp(ratios["target"], ratios["retain"]).pvalue)
    assert scores["forget_truth_ratio"] == pytest.approx(np.mean([min(r, 1 / r) for r in ratios["target"]]), abs=2e-6)
    assert scores["forget_prob"] == pytest.approx(np.mean([math.exp(-nll(lms["target"], r["question"], r["answer"])) for r in rows]), abs=2e-6)
    facts = data.read_rows(str(mini / "data" / "world_facts_perturbed.jsonl"))
    p = [math.exp(-nll(lms["target"], r["question"], r["answer"])) for r in facts]
    wrong = [sum(math.exp(-nll(lms["target"], r["question"], a)) for a in r["perturbed_answer"]) for r in facts]
    assert scores["world_facts_prob"] == pytest.approx(np.mean([a / (a + b) for a, b in zip(p, wrong)]), abs=2e-6)
    for record in (json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()):
        ids = tokenizer(f"Question: {record['question']}\nAnswer:", return_tensors="pt")
        new = lms["target"].generate(ids.input_ids, attention_mask=ids.attention_mask, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.input_ids.shape[1]:]
        assert record["generated"] == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_scores_do_not_depend_on_the_number_of_processes_and_hardly_on_the_batches(mini, tmp_path):
    evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path / "one")])
    evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path / "small", micro_batch_tokens=1)])
    done = run_script("evaluate.py", [mini / "target", *eval_flags(mini, out=tmp_path / "two" / "x")], processes=2)
    assert done.returncode == 0, done.stderr
    assert scores_of(tmp_path / "two" / "x") == scores_of(tmp_path / "one")
    assert scores_of(tmp_path / "small") == pytest.approx(scores_of(tmp_path / "one"), rel=1e-5)


def test_batched_greedy_answers_are_those_of_one_prompt_at_a_time(mini):
    lm, tokenizer = models.load_model(str(mini / "target"), PROC), models.load_tokenizer(str(mini / "target"))
    prompts = [list(range(40, 40 + n)) for n in (1, 3, 9, 27, 2, 14)]
    together = models.generate(lm, tokenizer, prompts, 20, PROC, 10**6)
    assert together == [models.generate(lm, tokenizer, [p], 20, PROC, 10**6)[0] for p in prompts]
    assert len(set(together)) > 2


def test_greedy_answers_are_hugging_faces_however_much_of_them_is_known_and_all_prompts_begin_with(mini, monkeypatch):
    lm, tokenizer = models.load_model(str(mini / "target"), PROC), models.load_tokenizer(str(mini / "target"))
    whole, forward = [], lm.forward
    for n in (0, 18):  # what all prompts begin with: nothing, and enough to be computed once
        prompts = [[*range(200, 200 + n), *range(40, 40 + k)] for k in (1, 9, 27, 2)]
        for p in prompts:
            ids = torch.tensor([p])
            out = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
            whole.append(out[0, len(p):].tolist())
        texts = tokenizer.batch_decode(whole[-4:], skip_special_tokens=True)
        tokens = []

        @functools.wraps(forward)
        def counted(**kw):
            tokens.append(kw["input_ids"].numel())
            return forward(**kw)
        monkeypatch.setattr(lm, "forward", counted)
        for known in (0, 5, 12, 99):
            tokens.clear()
            assert models.generate(lm, tokenizer, prompts, 12, PROC, 10**6, known=[w[:known] for w in whole[-4:]]) == texts
            assert bool(tokens) == (known < 12) and (not n or not tokens or tokens[0] == 18)
        monkeypatch.undo()
    assert len({*map(tuple, whole)}) > 4


def test_an_answer_that_the_model_would_give_itself_is_not_generated_again(mini, tmp_path, monkeypatch):
    """Rows hold the model's own greedy answers, or the first half of them: known from scoring; texts and scores stay the same."""
    c = configs.make(evaluate.Config, dict(benchmark="tofu", template="qa", max_new_tokens=12))
    lm, tokenizer = evaluate.load(str(mini / "target"), c, PROC)
    rows = data.read_rows(str(mini / "data" / "forget05_perturbed.jsonl"))
    template, real, begun = data.Template("qa", tokenizer), models.generate, []
    for i, row in enumerate(rows):
        text = real(lm, tokenizer, [template.prompt_ids(row["question"])], 12, PROC, 10**6)[0]
        row["answer"] = text.strip() if i % 2 else text.strip()[:len(text) // 2] + " harbor"
    bench = data.Benchmark([], [], {"forget": rows})
    monkeypatch.setattr(models, "generate", lambda *args: begun.extend(args[-1]) or real(*args))
    kept = evaluate.record_qa(lm, tokenizer, bench, c, PROC)
    monkeypatch.setattr(models, "generate", lambda *args: real(*args[:-1]))
    assert kept == evaluate.record_qa(lm, tokenizer, bench, c, PROC)
    assert sum(map(bool, begun)) > 3 and max(map(len, begun)) > 5


def test_a_finished_row_leaves_the_batch_and_stops_at_any_of_the_models_eos_ids(mini):
    lm = models.load_model(str(mini / "target"), PROC)
    free = models.continue_prompts(lm, [[5, 6, 7], [9]], [6, 4], [], PROC)
    assert [len(n) for n in free] == [6, 4]
    stopped = models.continue_prompts(lm, [[5, 6, 7], [9]], [6, 6], [free[0][2]], PROC)
    assert stopped[0] == free[0][:free[0].index(free[0][2]) + 1]
    tokenizer = models.load_tokenizer(str(mini / "target"))
    lm.generation_config.eos_token_id = [4, 7]
    assert models.stop_ids(lm, tokenizer) == sorted({tokenizer.eos_token_id, 4, 7})


def test_several_models_give_one_table_and_the_retain_model_has_no_forget_quality(mini, tmp_path, capsys):
    evaluate.main([str(mini / "target"), str(mini / "retain"), *eval_flags(mini, out=tmp_path)])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("forget_quality"))
    assert line.split()[-1] == "-" and line.split()[-2] != "-"
    assert scores_of(tmp_path / "target").keys() == KEYS and "forget_quality" not in scores_of(tmp_path / "retain")


def test_the_retain_model_is_scored_once_and_again_when_a_setting_changes(mini, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(models, "load_model", lambda name, proc, f=models.load_model: loaded.append(str(name)) or f(name, proc))
    retain = str(mini / "retain")
    for more, times in (({}, 1), ({}, 1), ({"eval_rows": 4}, 2), ({"max_new_tokens": 4}, 3)):
        evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path / "x", **more)])
        assert loaded.count(retain) == times
    assert not list((tmp_path / "x").glob("*/scores.json")) and not (mini / "retain" / "scores.json").exists()


@pytest.mark.parametrize("argv, sentence", [
    ([], "name at least one run directory"),
    (["{target}"], "give --retain_model=MODEL or --retain_log=LOG"),
    (["{target}", "--retain_model={target}"], "this is .*target itself"),
    (["out/none", "--retain_model={retain}"], "no such directory"),
    (["{target}", "--retain_model={data}"], "holds no config.json"),
    (["none.json", "--retain_model={retain}"], "none.json: cannot be read .No such file"),
    (["{target}", "--retain_model={retain}", "--data=/none"], "no such directory"),
    (["{target}", "--retain_model={retain}", "--data={target}"], "has none of forget05_perturbed.json"),
    (["{target}", "--retain_model={retain}", "--template=chat"], "has no chat template"),
])
def test_what_cannot_be_scored_is_said_in_one_sentence(mini, tmp_path, monkeypatch, argv, sentence):
    monkeypatch.chdir(tmp_path)
    paths = {n: str(mini / n) for n in ("target", "retain", "data")}
    base = ["--benchmark=tofu", "--subset=forget05", f"--data={mini / 'data'}", "--template=qa", "--device=cpu"]
    with pytest.raises(UsageError, match=sentence):
        evaluate.main(base + [a.format(**paths) for a in argv])


def test_a_retain_log_of_other_questions_is_refused(mini, tmp_path):
    evaluate.main([str(mini / "retain"), *eval_flags(mini, out=tmp_path / "r", retain_model=mini / "target")])
    path = tmp_path / "r" / "examples.jsonl"
    with pytest.raises(UsageError, match="12 forget examples and the model 4"):
        evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path / "x", eval_rows=4, retain_log=path)])
    path.write_text(path.read_text().replace("What does", "Why does"))
    with pytest.raises(UsageError, match="scored on other questions"):
        evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path / "x", retain_log=path)])


def test_audits_equal_their_definitions_on_plain_forwards(mini, tmp_path):
    """Every answer token, EOS included; scores are higher for a member; AUC by counting pairs."""
    evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path, audits=True)])
    scores = scores_of(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini / "target")
    lms = {n: transformers.AutoModelForCausalLM.from_pretrained(mini / n, dtype=torch.float32) for n in ("target", "retain")}
    values = {"forget": [], "holdout": []}
    for name, file in (("forget", "forget05_perturbed"), ("holdout", "holdout05")):
        for row in data.read_rows(str(mini / "data" / f"{file}.jsonl")):
            e = data.Template("qa", tokenizer).encode(row, 500)
            ids = torch.tensor([e.ids])
            logits = {n: lm(ids).logits[0, e.start - 1:-1] for n, lm in lms.items()}
            labels = ids[0, e.start:]
            logps = {n: x.log_softmax(-1) for n, x in logits.items()}
            own = {n: x.gather(1, labels[:, None])[:, 0] for n, x in logps.items()}
            spread = torch.distributions.Categorical(logits=logits["target"])
            surprise = -spread.entropy()  # the mean of log p under p
            variance = (spread.probs * (logps["target"] - surprise[:, None]) ** 2).sum(-1)
            standard = ((own["target"] - surprise) / variance.clamp(min=1e-6).sqrt()).sort().values
            k = max(1, int(0.4 * len(labels)))
            grads = torch.autograd.grad(-own["target"].mean(), list(lms["target"].parameters()))
            right = (logits["target"].argmax(-1) == labels).tolist()
            suffix = next((i for i in range(len(right)) if all(right[i:])), len(right))
            values[name].append({
                "em": np.mean(right), "es": 1 - suffix / len(right), "loss": own["target"].mean().item(),
                "zlib": own["target"].mean().item() / len(zlib.compress(row["answer"].encode())),
                "min_k": own["target"].sort().values[:k].mean().item(), "min_k_pp": standard[:k].mean().item(),
                "reference": (own["target"].mean() - own["retain"].mean()).item(),
                "gradnorm": -np.mean([g.norm().item() for g in grads])})
    assert scores["exact_memorization"] == pytest.approx(np.mean([v["em"] for v in values["forget"]]))
    assert scores["extraction_strength"] == pytest.approx(np.mean([v["es"] for v in values["forget"]]))
    for key in ("loss", "zlib", "min_k", "min_k_pp", "reference", "gradnorm"):
        pairs = [(a[key] > b[key]) + 0.5 * (a[key] == b[key]) for a in values["forget"] for b in values["holdout"]]
        assert scores[f"mia_{key}"] == pytest.approx(np.mean(pairs), abs=1e-9), key
    assert "privleak" in scores


def test_without_a_holdout_the_membership_scores_are_left_out_and_training_never_audits(mini, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(mini / "data", folder)
    (folder / "holdout05.jsonl").unlink()
    evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path / "x", data=folder, audits=True)])
    assert scores_of(tmp_path / "x").keys() == KEYS | {"exact_memorization", "extraction_strength"}
    unlearn.main(flags(mini, out=tmp_path / "run", eval_every=1, audits=True))
    assert scores_of(tmp_path / "run").keys() == KEYS


def test_several_runs_give_text_markdown_csv_and_a_picture_with_every_retain_model_starred(mini, tmp_path, monkeypatch, capsys):
    """Runs of two seeds with a retain model each: every forget quality is against the run's own; seeds become mean and spread."""
    drawn = {}
    monkeypatch.setattr(configs, "picture", lambda path, curves, points, x, y, f=configs.picture: (
        drawn.update({path: (points, x, y)}), f(path, curves, points, x, y)))
    other = tmp_path / "other"
    shutil.copytree(mini / "retain", other)
    weights = other / "model.safetensors"
    save_file({k: v * 1.3 for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    own = {}
    for name, retain in (("a_s0", mini / "retain"), ("a_s1", other)):
        unlearn.main(flags(mini, out=tmp_path / name, retain_model=retain, seed=name[-1], steps=6, eval_every=2))
        own[name] = scores_of(tmp_path / name)
    capsys.readouterr()
    evaluate.main([str(tmp_path / "a_s0"), str(tmp_path / "a_s1"), f"--out={tmp_path / 'out'}"])
    said = capsys.readouterr().out
    both = {name: scores_of(tmp_path / "out" / name) for name in own}
    assert both["a_s1"] == pytest.approx(own["a_s1"], rel=1e-6) and both["a_s0"] == pytest.approx(own["a_s0"], rel=1e-6)
    assert "mean and standard deviation over seeds" in said and "a (n=2)" in said
    table = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert [r["name"] for r in table] == ["a_s0", "a_s1", "a (n=2)"]
    for name, line in zip(own, table):
        assert {k: float(v) for k, v in line.items() if k in KEYS} == both[name]  # in full precision
    pair = [both[name]["forget_quality"] for name in own]
    assert float(table[2]["forget_quality"]) == pytest.approx(np.mean(pair))
    assert float(table[2]["forget_quality_std"]) == pytest.approx(np.std(pair, ddof=1)) and pair[0] != pair[1]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert f"| forget_prob ↓ | {both['a_s0']['forget_prob']:.2e} | {both['a_s1']['forget_prob']:.2e} |" in text and "±" in text
    points, x, y = drawn[str(tmp_path / "out" / "comparison.png")]
    assert (x, y) == ("model_utility", "forget_quality") and (tmp_path / "out" / "comparison.png").stat().st_size > 5000
    stars = {k: v["forget_quality"] for k, v in points.items() if "retain" in k}
    assert stars == {"retain model retain": 1.0, "retain model other": 1.0} and points.keys() - stars.keys() == own.keys()


def test_the_demos_holdout_set_is_told_to_no_model():
    bench = data.load("demo", "authors")
    told = json.dumps([bench.full, bench.retain_full, bench.forget, bench.retain, bench.evals])
    assert len(bench.holdout) == 40 == len(bench.forget) and len({r["answer"] for r in bench.holdout}) == 40
    assert not any(r["question"] in told or r["answer"] in told for r in bench.holdout)
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "62a1a526095fd19a"  # the published scores of the demo are of these rows


def test_ask_prints_the_answers_side_by_side(mini, capsys):
    evaluate.main([str(mini / "target"), str(mini / "retain"), "--ask=What does amber mean?", *eval_flags(mini)])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 and lines[0].startswith(str(mini / "target"))


def test_the_retain_models_own_log_gets_no_forget_quality(mini, tmp_path):
    evaluate.main([str(mini / "retain"), *eval_flags(mini, out=tmp_path / "r", retain_model=mini / "target")])
    log = tmp_path / "r" / "examples.jsonl"
    copy = tmp_path / "copy.jsonl"
    shutil.copy(log, copy)
    evaluate.main([str(copy), f"--retain_log={log}", f"--out={tmp_path / 'x'}"])
    assert "forget_quality" not in scores_of(tmp_path / "x")


def test_runs_of_different_templates_are_not_scored_alike_unasked_and_no_run_loses_its_scores(mini, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, template in (("a", "qa"), ("b", "llama2")):
        unlearn.main(flags(mini, out=f"out/{name}", template=template, steps=1))
    with pytest.raises(UsageError, match="out/a: template qa, out/b: template llama2; give --template="):
        evaluate.main(["out/a", "out/b"])
    evaluate.main(["out/a", "out/b", "--template=qa", "--out=out/both"])
    assert (tmp_path / "out" / "both" / "comparison.png").exists()
    shutil.copytree(mini / "target", tmp_path / "elsewhere" / "a")
    with pytest.raises(UsageError, match="its scores would go to out/a, which holds a run; give --out"):
        evaluate.main(["elsewhere/a", *eval_flags(mini)])


def test_another_tokenizer_is_another_reference(mini, tmp_path):
    shutil.copytree(mini / "retain", tmp_path / "retain")
    before = models.fingerprint(str(tmp_path / "retain"))
    path = tmp_path / "retain" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert models.fingerprint(str(tmp_path / "retain")) != before
