"""Scores: pytest tests/test_evaluate.py.

Metrics worked by hand, recorded logs of real models, and the same score however it is computed.
"""
import csv
import functools
import hashlib
import json
import math
import re
import shutil
import zlib

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from conftest import PROC, SHARED, flags, needs_shared, run_script
from matplotlib.figure import Figure
from rouge_score import rouge_scorer
from safetensors.torch import load_file, save_file

import configs
import data
import evaluate
import model as models
import unlearn
from configs import UsageError, recorded, tables

SETS = ("forget", "retain", "real_authors", "world_facts")
KEYS = {"forget_quality", "model_utility", "forget_paraphrased_prob", "degenerate"} | {
    f"{name}_{score}" for name in SETS for score in ("prob", "rouge", "truth_ratio")}


def eval_flags(mini, **settings):
    """The command line that scores a model on the miniature."""
    kept = ("benchmark", "subset", "data", "template", "retain_model", "device", "max_new_tokens")
    words = []
    for flag in flags(mini):
        name = flag[2:].split("=")[0]
        if name in kept and name not in settings:
            words.append(flag)
    return words + [f"--{name}={value}" for name, value in settings.items()]


def scores_of(out):
    return json.loads((out / "scores.json").read_text())


def records_of(out):
    return [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]


def load_plain(path):
    """transformers' own model, without our loading code."""
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch.float32)


def load_ours(mini):
    name = str(mini / "target")
    return models.load_model(name, PROC), models.load_tokenizer(name)


# ------------------------------------------------------------------------------------------------
# metrics by hand


def test_truth_ratio_is_wrong_over_correct_with_a_geometric_mean():
    # p = 1/4 against 1/2 and 1/8, whose geometric mean is 1/4
    right, wrong = math.log(4), [math.log(2), math.log(8)]
    assert evaluate.truth_ratio([right], [wrong])[0] == pytest.approx(1.0)
    # wrong answers are certain: 1 / (1/4)
    assert evaluate.truth_ratio([right], [[0.0, 0.0]])[0] == pytest.approx(4.0)


def test_forget_quality_is_one_for_equal_samples_and_the_known_floor_for_separated_ones():
    a = np.linspace(0, 1, 40)
    assert evaluate.forget_quality(a, a) == pytest.approx(1.0)
    # two separated samples of 40: two of the C(80, 40) orderings
    floor = 2 / math.comb(80, 40)
    assert evaluate.forget_quality(a, a + 2) == pytest.approx(floor, rel=1e-9)
    assert evaluate.forget_quality(torch.tensor(a), list(a)) == pytest.approx(1.0)


def test_model_utility_is_the_harmonic_mean_and_zero_if_any_part_is():
    assert evaluate.model_utility({"a": 1.0, "b": 0.5}) == pytest.approx(2 / (1 + 2))
    assert evaluate.model_utility({"a": 1.0, "b": 0.0}) == 0.0


def test_rouge_counts_subsequences_and_stems_where_asked():
    scores = evaluate.rouge("the cat sat", "the dog sat down", stem=False)
    assert scores["rougeL_recall"] == pytest.approx(2 / 4)
    assert scores["rouge1_recall"] == pytest.approx(2 / 4)
    assert scores["rougeL_f1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert evaluate.rouge("cats", "cat", True)["rougeL_recall"] == 1
    assert evaluate.rouge("cats", "cat", False)["rougeL_recall"] == 0


def test_min_k_takes_the_lowest_tokens_at_least_one_and_standardises_for_plus_plus():
    # the int(0.4 * 5) = 2 lowest
    assert evaluate.min_k([-1.0, -5.0, -2.0, -4.0, -3.0]) == pytest.approx(-4.5)
    # int(0.8) = 0, but at least one
    assert evaluate.min_k([-1.0, -7.0]) == -7.0
    stats = [-1.0, -1.0], [4.0, 0.0]
    assert evaluate.min_k([-1.0, -7.0], 1.0, stats) == pytest.approx((0 - 6 / 1e-3) / 2)


def test_auc_counts_pairs_with_half_for_ties():
    assert evaluate.auc([3, 2], [1, 2]) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 30), rng.integers(0, 9, 20)
    wins = scipy.stats.mannwhitneyu(a, b).statistic
    assert evaluate.auc(a, b) == pytest.approx(wins / 600)


def test_privleak_is_zero_at_the_retain_models_auc_and_minus_100_when_memorised():
    news, books = 1 - 0.4772, 1 - 0.5393
    assert evaluate.privleak(news, news) == pytest.approx(0)
    assert evaluate.privleak(1.0, news) == pytest.approx(-100)
    # the highest that each subset can have
    assert evaluate.privleak(0.0, news) == pytest.approx(109.55574, abs=1e-4)
    assert evaluate.privleak(0.0, books) == pytest.approx(85.42555, abs=1e-4)


def test_memorization_and_extraction_of_hand_made_answers():
    assert evaluate.exact_memorization([True, False, True, True]) == 0.75
    assert evaluate.extraction_strength([True, False, True, True]) == pytest.approx(1 - 2 / 4)
    assert evaluate.extraction_strength([True, True]) == 1.0
    assert evaluate.extraction_strength([True, True, False]) == 0.0


@pytest.mark.parametrize("metric, arguments", [
    (evaluate.truth_ratio, ([], [])),
    (evaluate.forget_quality, ([], [1.0])),
    (evaluate.model_utility, ({},)),
    (evaluate.expected_maximum, ([], 1)),
    (evaluate.memorization, ([],)),
    (evaluate.privacy, ([], [], [])),
    (evaluate.min_k, ([],)),
    (evaluate.auc, ([1.0], [])),
    (evaluate.exact_memorization, ([],)),
    (evaluate.extraction_strength, ([],)),
])
def test_a_metric_of_nothing_is_an_error(metric, arguments):
    with pytest.raises(ValueError):
        metric(*arguments)


def test_a_reference_in_another_script_is_compared_by_its_own_words_or_characters():
    lamp = "她住在海边的一座白塔里。"
    assert evaluate.rouge(lamp, lamp, True)["rougeL_recall"] == 1
    assert evaluate.rouge("她住在山上", lamp, True)["rougeL_recall"] == pytest.approx(3 / 11)
    assert evaluate.rouge("В Минске", "в Москве", True)["rougeL_recall"] == 0.5
    two_of_three = evaluate.rouge("हिन्दी में", "हिन्दी में उत्तर", True)
    assert two_of_three["rougeL_recall"] == pytest.approx(2 / 3)
    assert evaluate.rouge("กรุงเทพ", "กรุงเทพ", False)["rougeL_f1"] == 1
    assert evaluate.rouge("Paris", lamp, True)["rougeL_recall"] == 0


@pytest.mark.parametrize("reference", [
    "The cats sat in 1990.", "Le café de l'été", "",
    'The title "Лісова пісня" means Forest Song in English'])
def test_for_mostly_latin_text_rouge_is_rouge_scores_own_to_the_last_digit(reference):
    prediction = "The cat, le café, and the title in 1990"
    for stem in (True, False):
        scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=stem)
        theirs = scorer.score(reference, prediction)
        assert evaluate.rouge(prediction, reference, stem) == {
            "rouge1_recall": theirs["rouge1"].recall,
            "rougeL_recall": theirs["rougeL"].recall,
            "rougeL_f1": theirs["rougeL"].fmeasure,
        }


@pytest.mark.parametrize("answer, expected", [
    ("", True), ("  \n", True),
    ("Basil", False), ("Basil Basil Basil", False),  # no 4-gram twice
    ("Basil " * 7, True),  # four 4-grams, one of them distinct
    ("a b c d " * 2, False),  # five, four distinct
    ("the tin moon " * 4, False),  # nine, three distinct: exactly a third
    ("the tin moon " * 4 + "the", True),  # ten, three distinct
    ("她住在海边的一座白塔里", False), ("哈" * 9, True),  # no spaces: characters
])
def test_an_answer_is_degenerate_if_it_is_empty_or_few_of_its_4_grams_are_distinct(
        answer, expected):
    assert evaluate.is_degenerate(answer) == expected


def test_memorization_is_the_harmonic_mean_of_what_is_not_revealed():
    assert evaluate.memorization([0.5, 0.0, 0.75, 0.5]) == pytest.approx(4 / (2 + 1 + 4 + 2))
    assert evaluate.memorization([0.5, 1.0]) == 0


def test_privacy_is_one_at_the_retain_models_aucs_and_zero_as_far_off_as_the_target():
    retain, target = [0.5, 0.4], [1.0, 0.8]
    assert evaluate.privacy(retain, retain, target) == 1
    assert evaluate.privacy(target, retain, target) == 0
    assert evaluate.privacy([0.0, 0.4], retain, target) == 0  # too low is as bad
    # halfway by one attack, a quarter by the other: 1/2 and 3/4
    assert evaluate.privacy([0.75, 0.3], retain, target) == pytest.approx(2 / (2 + 4 / 3))
    assert evaluate.privacy([0.5], [0.5], [0.5]) == 1  # nothing to tell, and nothing told


def test_the_composite_is_the_harmonic_mean_of_its_three_parts():
    aucs = dict.fromkeys(evaluate.PRIVACY, 0.75)
    retain, target = (dict.fromkeys(evaluate.PRIVACY, auc) for auc in (0.5, 1.0))
    scores = aucs | {"memorization": 0.25, "model_utility": 0.6}
    found = evaluate.composite(scores, retain, target | {"model_utility": 0.8})
    assert found["privacy"] == pytest.approx(0.5)
    assert found["utility_ratio"] == pytest.approx(0.75)
    assert found["composite"] == pytest.approx(3 / (4 + 2 + 4 / 3))
    # a target of no utility
    assert evaluate.composite(scores, retain, target | {"model_utility": 0.0})["composite"] > 0


def test_another_score_of_a_set_does_not_remove_the_utility(monkeypatch):
    """model_utility is of nine named scores: a forker's tenth leaves it as it is."""
    rows = []
    for name in SETS:
        rows.append({"set": name, "index": 0, "nll": 0.5, "rougeL_recall": 0.5,
                     "perturbed_nll": [0.7]})
    before = evaluate.tofu_scores(rows)
    set_scores = evaluate.set_scores
    monkeypatch.setattr(evaluate, "set_scores", lambda name, rows:
                        set_scores(name, rows) | {f"{name}_mine": 0.1})
    after = evaluate.tofu_scores(rows)
    assert "retain_mine" in after
    assert after["model_utility"] == before["model_utility"] > 0
    assert "retain_mine" not in tables.ARROWS
    assert tables.cells({"run": {"retain_mine": 0.1}}, tables.ARROWS)[0] == ["", "retain_mine"]


def test_every_score_has_an_arrow():
    assert KEYS <= tables.ARROWS.keys()
    for protocol in evaluate.BENCHMARKS.values():
        assert {*protocol.headline, *protocol.axes} <= tables.ARROWS.keys()


# ------------------------------------------------------------------------------------------------
# recorded logs


@needs_shared
def test_the_recorded_log_of_a_real_llama_2_7b_gives_its_published_scores(tmp_path):
    logs = SHARED / "golden" / "tofu_logs"
    retain_log = f"--retain_log={logs / 'llama2-7b_retain90.json'}"
    evaluate.main([str(logs / "llama2-7b_full.json"), retain_log, f"--out={tmp_path}"])
    scores = scores_of(tmp_path)
    assert scores["model_utility"] == pytest.approx(0.6226773637, abs=1e-9)
    assert scores["forget_quality"] == pytest.approx(1.834066e-21, rel=1e-6)
    assert scores["world_facts_prob"] == pytest.approx(0.418562, abs=1e-6)  # p / (p + wrong)


def by_index(values):
    """As in a JSON object; the order of its keys means nothing."""
    return {str(i): value for i, value in reversed(list(enumerate(values)))}


def as_tofu_log(records, by_index):
    """The TOFU authors' format."""
    log = {}
    for file, name in recorded.TOFU_LOG.items():
        rows = [r for r in records if r["set"] == name]
        columns = {
            "avg_gt_loss": [r["nll"] for r in rows],
            "rougeL_recall": [r["rougeL_recall"] for r in rows],
            "avg_paraphrased_loss": [r.get("paraphrased_nll", r["nll"]) for r in rows],
            "average_perturb_loss": [r["perturbed_nll"] for r in rows],
            "num_token_gt": [r["n_tokens"] for r in rows],
            "generated_text": [["", r["generated"], r["answer"]] for r in rows],
        }
        log[file] = {name: by_index(values) for name, values in columns.items()}
    return log


def as_open_unlearning_log(records):
    log = {}
    for prefix, name in recorded.OPEN_UNLEARNING_LOG.items():
        rows = [r for r in records if r["set"] == name]
        columns = {
            "Prob": [{"avg_loss": r["nll"], "prob": 0} for r in rows],
            "PERT_Prob": [{"avg_loss": r["perturbed_nll"]} for r in rows],
            "ROUGE": [{"rougeL_recall": r["rougeL_recall"], "generation": r["generated"]}
                      for r in rows],
        }
        if name in ("forget", "retain"):
            columns["PARA_Prob"] = [{"avg_loss": r["paraphrased_nll"]} for r in rows]
        for kind, values in columns.items():
            log[prefix + kind] = {"agg_value": 0, "value_by_index": by_index(values)}
    return log


def test_logs_of_all_three_formats_give_the_same_scores(mini, tmp_path):
    """Our examples.jsonl, TOFU's log (of dicts by index, or lists), and open-unlearning's."""
    evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path / "ours")])
    records = records_of(tmp_path / "ours")
    evaluate.main([str(mini / "retain"), *eval_flags(
        mini, out=tmp_path / "r", retain_model=mini / "target")])
    retain_log = f"--retain_log={tmp_path / 'r' / 'examples.jsonl'}"
    logs = {
        "dicts": as_tofu_log(records, by_index),
        "lists": as_tofu_log(records, list),
        "open_unlearning": as_open_unlearning_log(records),
    }
    for name, log in logs.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(log))
        evaluate.main([str(path), retain_log, f"--out={tmp_path / name}"])
        same = pytest.approx(scores_of(tmp_path / "ours"), abs=1e-12)
        assert scores_of(tmp_path / name) == same, name
    ours = str(tmp_path / "ours" / "examples.jsonl")
    evaluate.main([ours, retain_log, f"--out={tmp_path / 'again'}"])
    assert scores_of(tmp_path / "again") == scores_of(tmp_path / "ours")


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"a": 1}', "not json", "[1, 2]",
    '{"eval_log_forget.json": {"avg_gt_loss": [1.0]}}',
    '{"set": "forget", "index": 0}',
    '{"set": "forget", "nll": "1.0"}',
    '{"set": "forget", "nll": [1.0]}',
    '{"set": "forget", "nll": NaN}',
    '{"set": "forget", "nll": 1.0, "perturbed_nll": []}',
    '{"set": "forget", "nll": 1.0, "n_tokens": 0}',
    '{"set": null, "nll": 1.0}',
])
def test_a_file_that_is_no_log_is_refused_with_one_sentence(tmp_path, text):
    (tmp_path / "log.json").write_text(text)
    with pytest.raises(UsageError, match="not a log this can read"):
        recorded.read_log(str(tmp_path / "log.json"))


# ------------------------------------------------------------------------------------------------
# models


@torch.no_grad()
def plain_nll(lm, tokenizer, question, answer):
    prompt = tokenizer(f"Question: {question}\nAnswer:").input_ids
    answer_ids = tokenizer(f" {answer}").input_ids + [tokenizer.eos_token_id]
    ids = torch.tensor([prompt + answer_ids])
    logps = lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return -logps[len(prompt) - 1:].mean().item()


def plain_truth_ratio(lm, tokenizer, row):
    question = row["question"]
    wrong = [plain_nll(lm, tokenizer, question, answer) for answer in row["perturbed_answer"]]
    paraphrased = plain_nll(lm, tokenizer, question, row["paraphrased_answer"])
    return math.exp(paraphrased - sum(wrong) / 5)


def test_scores_equal_the_definition_on_plain_unpadded_forwards(mini, tmp_path):
    """One example at a time, full logits, transformers' own generate: the definition alone."""
    evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path)])
    scores = scores_of(tmp_path)
    assert scores.keys() == KEYS
    for key, value in scores.items():
        assert math.isfinite(value), key
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini / "target")
    target, retain = load_plain(mini / "target"), load_plain(mini / "retain")

    rows = data.read_rows(str(mini / "data" / "forget05_perturbed.jsonl"))
    ratios = [plain_truth_ratio(target, tokenizer, row) for row in rows]
    retain_ratios = [plain_truth_ratio(retain, tokenizer, row) for row in rows]
    quality = scipy.stats.ks_2samp(ratios, retain_ratios).pvalue
    assert scores["forget_quality"] == pytest.approx(quality)
    closeness = np.mean([min(ratio, 1 / ratio) for ratio in ratios])
    assert scores["forget_truth_ratio"] == pytest.approx(closeness, abs=2e-6)
    probs = [math.exp(-plain_nll(target, tokenizer, row["question"], row["answer"]))
             for row in rows]
    assert scores["forget_prob"] == pytest.approx(np.mean(probs), abs=2e-6)

    relative = []
    for row in data.read_rows(str(mini / "data" / "world_facts_perturbed.jsonl")):
        answers = [row["answer"], *row["perturbed_answer"]]
        probs = [math.exp(-plain_nll(target, tokenizer, row["question"], answer))
                 for answer in answers]
        relative.append(probs[0] / sum(probs))
    assert scores["world_facts_prob"] == pytest.approx(np.mean(relative), abs=2e-6)

    for record in records_of(tmp_path):
        prompt = tokenizer(f"Question: {record['question']}\nAnswer:", return_tensors="pt")
        ids = target.generate(prompt.input_ids, attention_mask=prompt.attention_mask,
                              max_new_tokens=8, do_sample=False, pad_token_id=0)
        new = ids[0, prompt.input_ids.shape[1]:]
        assert record["generated"] == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_scores_do_not_depend_on_the_number_of_processes_and_hardly_on_the_batches(mini, tmp_path):
    target = str(mini / "target")
    evaluate.main([target, *eval_flags(mini, out=tmp_path / "one")])
    evaluate.main([target, *eval_flags(mini, out=tmp_path / "small", micro_batch_tokens=1)])
    argv = [target, *eval_flags(mini, out=tmp_path / "two" / "x")]
    done = run_script("evaluate.py", argv, processes=2)
    assert done.returncode == 0, done.stderr
    assert scores_of(tmp_path / "two" / "x") == scores_of(tmp_path / "one")
    same = pytest.approx(scores_of(tmp_path / "one"), rel=1e-5)
    assert scores_of(tmp_path / "small") == same


def test_batched_greedy_answers_are_those_of_one_prompt_at_a_time(mini):
    lm, tokenizer = load_ours(mini)
    prompts = [list(range(40, 40 + n)) for n in (1, 3, 9, 27, 2, 14)]
    together = models.generate(lm, tokenizer, prompts, 20, PROC, 10**6)
    alone = []
    for prompt in prompts:
        alone += models.generate(lm, tokenizer, [prompt], 20, PROC, 10**6)
    assert together == alone
    assert len(set(together)) > 2


def test_greedy_answers_are_hugging_faces_however_much_is_known(mini, monkeypatch):
    lm, tokenizer = load_ours(mini)
    prompts, whole = [], []
    for k in (1, 9, 27, 2):
        prompt = [*range(200, 218), *range(40, 40 + k)]
        ids = torch.tensor([prompt])
        out = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                          do_sample=False, pad_token_id=0)
        prompts.append(prompt)
        whole.append(out[0, len(prompt):].tolist())
    assert len({tuple(answer) for answer in whole}) > 2
    texts = tokenizer.batch_decode(whole, skip_special_tokens=True)
    sizes, forward = [], lm.forward

    @functools.wraps(forward)
    def counted(**inputs):
        sizes.append(inputs["input_ids"].numel())
        return forward(**inputs)

    monkeypatch.setattr(lm, "forward", counted)
    for n_known in (0, 5, 12, 99):
        sizes.clear()
        known = [answer[:n_known] for answer in whole]
        assert models.generate(lm, tokenizer, prompts, 12, PROC, 10**6, known=known) == texts
        assert bool(sizes) == (n_known < 12)  # what is known in full is not computed


def test_an_answer_that_the_model_would_give_itself_is_not_generated_again(
        mini, tmp_path, monkeypatch):
    """Rows hold the model's own greedy answers, or the first half of them: known from scoring."""
    c = configs.make(evaluate.Config, dict(benchmark="tofu", template="qa", max_new_tokens=12))
    lm, tokenizer = evaluate.load(str(mini / "target"), c, PROC)
    template, generate = data.Template("qa", tokenizer), models.generate
    rows = data.read_rows(str(mini / "data" / "forget05_perturbed.jsonl"))
    for i, row in enumerate(rows):
        prompt = template.prompt_ids(row["question"])
        text = generate(lm, tokenizer, [prompt], 12, PROC, 10**6)[0]
        row["answer"] = text.strip() if i % 2 else text.strip()[:len(text) // 2] + " harbor"
    bench = data.Benchmark([], [], {"forget": rows})
    seen = []

    def record_known(*args, **options):
        seen.extend(args[7])
        return generate(*args, **options)

    def ignore_known(*args, **options):
        return generate(*args[:-1], **options)

    monkeypatch.setattr(models, "generate", record_known)
    records = evaluate.record_qa(lm, tokenizer, bench, c, PROC)
    monkeypatch.setattr(models, "generate", ignore_known)
    assert records == evaluate.record_qa(lm, tokenizer, bench, c, PROC)
    assert sum(map(bool, seen)) > 3
    assert max(map(len, seen)) > 5


def test_a_batch_that_two_ranks_computed_is_answered_once(mini, monkeypatch):
    """FSDP's ranks need equally many batches, so the last ones may be computed twice."""
    lm = models.load_model(str(mini / "target"), PROC)
    tokenizer = models.load_tokenizer(str(mini / "target"))
    alone = models.generate(lm, tokenizer, [[5, 6, 7]], 8, PROC, 100)
    monkeypatch.setattr(models.Process, "gather", lambda proc, item: [item, item])
    assert models.generate(lm, tokenizer, [[5, 6, 7]], 8, PROC, 100) == alone


def test_a_finished_prompt_leaves_the_batch_and_stops_at_any_of_the_models_eos_ids(mini):
    lm, tokenizer = load_ours(mini)
    free = models.continue_prompts(lm, [[5, 6, 7], [9]], [6, 4], [], PROC)
    assert [len(ids) for ids in free] == [6, 4]
    stop = free[0][2]
    stopped = models.continue_prompts(lm, [[5, 6, 7], [9]], [6, 6], [stop], PROC)
    assert stopped[0] == free[0][:free[0].index(stop) + 1]
    lm.generation_config.eos_token_id = [4, 7]
    assert models.stop_ids(lm, tokenizer) == {tokenizer.eos_token_id, 4, 7}


def test_several_models_give_one_table_and_the_retain_model_has_no_forget_quality(
        mini, tmp_path, capsys):
    evaluate.main([str(mini / "target"), str(mini / "retain"), *eval_flags(mini, out=tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("forget_quality"))
    assert line.split()[-1] == "-"
    assert line.split()[-2] != "-"
    assert scores_of(tmp_path / "target").keys() == KEYS
    assert "forget_quality" not in scores_of(tmp_path / "retain")


def test_the_retain_model_is_scored_once_and_again_when_a_setting_changes(
        mini, tmp_path, monkeypatch):
    loaded, load_model = [], models.load_model

    def record(name, proc):
        loaded.append(name)
        return load_model(name, proc)

    monkeypatch.setattr(models, "load_model", record)
    for settings, times in (({}, 1), ({}, 1), ({"eval_rows": 4}, 2), ({"max_new_tokens": 4}, 3)):
        evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path / "x", **settings)])
        assert loaded.count(str(mini / "retain")) == times
    assert not list((tmp_path / "x").glob("*/scores.json"))
    assert not (mini / "retain" / "scores.json").exists()


def test_a_cached_reference_is_of_every_scoring_setting(mini, tmp_path):
    bench = data.Benchmark([], [], {})
    name = str(mini / "retain")
    c = configs.make(evaluate.Config, {"out": str(tmp_path / "x")})
    path = evaluate.reference_path(c, name, bench)
    changed = dict(template="qa", system_prompt="Be brief.", date_string="", max_length=100,
                   dtype="bf16", tokenizer="org/other", eval_rows=3, audits=True,
                   max_new_tokens=9, stem=True, skip_last=True)
    assert {*configs.fields(evaluate.Scoring)} <= changed.keys()
    for setting, value in changed.items():
        other = configs.make(evaluate.Config, {"out": c.out, setting: value})
        assert evaluate.reference_path(other, name, bench) != path, setting
    elsewhere = configs.make(evaluate.Config, {"out": c.out, "device": "cpu", "eval_every": 3})
    assert evaluate.reference_path(elsewhere, name, bench) == path


@pytest.mark.parametrize("argv, sentence", [
    ([], "name at least one run directory"),
    (["{target}", "--select=utility"], "--select=utility: any of forget_quality, model_utility"),
    (["{target}", "--retain_model={target}"], "this is .*target itself"),
    (["out/none", "--retain_model={retain}"], "no such directory"),
    (["{target}", "--retain_model={data}"], "holds no config.json"),
    (["none.json", "--retain_model={retain}"], "none.json: cannot be read .No such file"),
    (["{target}", "--retain_model={retain}", "--data=/none"], "no such directory"),
    (["{target}", "--retain_model={retain}", "--data={target}"],
     "has none of forget05_perturbed.json"),
    (["{target}", "--retain_model={retain}", "--template=chat"], "has no chat template"),
])
def test_what_cannot_be_scored_is_one_sentence(mini, tmp_path, monkeypatch, argv, sentence):
    monkeypatch.chdir(tmp_path)
    paths = {name: str(mini / name) for name in ("target", "retain", "data")}
    base = ["--benchmark=tofu", "--subset=forget05", f"--data={mini / 'data'}", "--template=qa",
            "--device=cpu"]
    with pytest.raises(UsageError, match=sentence):
        evaluate.main(base + [word.format(**paths) for word in argv])


def test_a_retain_log_of_other_questions_is_refused(mini, tmp_path):
    evaluate.main([str(mini / "retain"), *eval_flags(
        mini, out=tmp_path / "r", retain_model=mini / "target")])
    path = tmp_path / "r" / "examples.jsonl"
    target = str(mini / "target")
    with pytest.raises(UsageError, match="12 forget examples and the model 4"):
        evaluate.main([target, *eval_flags(
            mini, out=tmp_path / "x", eval_rows=4, retain_log=path)])
    path.write_text(path.read_text().replace("What does", "Why does"))
    with pytest.raises(UsageError, match="scored on other questions"):
        evaluate.main([target, *eval_flags(mini, out=tmp_path / "x", retain_log=path)])


# ------------------------------------------------------------------------------------------------
# audits


def plain_audit(row, tokenizer, target, retain):
    """The measures of one answer, by their definitions on plain forwards."""
    example = data.Template("qa", tokenizer).encode(row, 500)
    ids = torch.tensor([example.ids])
    labels = ids[0, example.start:]
    logits = target(ids).logits[0, example.start - 1:-1]
    logps = logits.log_softmax(-1)
    own = logps.gather(1, labels[:, None])[:, 0]
    retain_logps = retain(ids).logits[0, example.start - 1:-1].log_softmax(-1)
    retain_own = retain_logps.gather(1, labels[:, None])[:, 0]

    # Min-K%++: the mean of log p under p is minus the entropy
    spread = torch.distributions.Categorical(logits=logits)
    mean = -spread.entropy()
    variance = (spread.probs * (logps - mean[:, None]) ** 2).sum(-1)
    standardised = ((own - mean) / variance.clamp(min=1e-6).sqrt()).sort().values
    k = max(1, int(0.4 * len(labels)))

    correct = (logits.argmax(-1) == labels).tolist()
    suffix = len(correct)
    while suffix > 0 and correct[suffix - 1]:
        suffix -= 1
    gradients = torch.autograd.grad(-own.mean(), list(target.parameters()))
    return {
        "em": np.mean(correct),
        "es": 1 - suffix / len(correct),
        "loss": own.mean().item(),
        "zlib": own.mean().item() / len(zlib.compress(row["answer"].encode())),
        "min_k": own.sort().values[:k].mean().item(),
        "min_k_pp": standardised[:k].mean().item(),
        "reference": (own.mean() - retain_own.mean()).item(),
        "gradnorm": -np.mean([gradient.norm().item() for gradient in gradients]),
    }


def test_audits_equal_their_definitions_on_plain_forwards(mini, tmp_path):
    """Every answer token, EOS included; higher = more like a member; AUC by counting pairs."""
    evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path, audits=True)])
    scores = scores_of(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini / "target")
    target, retain = load_plain(mini / "target"), load_plain(mini / "retain")
    values = {}
    for file in ("forget05_perturbed", "holdout05"):
        rows = data.read_rows(str(mini / "data" / f"{file}.jsonl"))
        values[file] = [plain_audit(row, tokenizer, target, retain) for row in rows]
    forget, holdout = values["forget05_perturbed"], values["holdout05"]
    memorized = np.mean([measures["em"] for measures in forget])
    assert scores["exact_memorization"] == pytest.approx(memorized)
    extracted = np.mean([measures["es"] for measures in forget])
    assert scores["extraction_strength"] == pytest.approx(extracted)
    for key in ("loss", "zlib", "min_k", "min_k_pp", "reference", "gradnorm"):
        wins = []
        for member in forget:
            for other in holdout:
                wins.append((member[key] > other[key]) + 0.5 * (member[key] == other[key]))
        assert scores[f"mia_{key}"] == pytest.approx(np.mean(wins), abs=1e-9), key
    assert "privleak" in scores

    records = records_of(tmp_path)
    paraphrased = [record["paraphrased_nll"] for record in records if record["set"] == "forget"]
    probability = np.mean([math.exp(-nll) for nll in paraphrased])
    assert scores["forget_paraphrased_prob"] == pytest.approx(probability)
    rows = data.read_rows(str(mini / "data" / "forget05_perturbed.jsonl"))
    certain = []  # p / (p + p of the wrong answers, their geometric mean)
    for row in rows:
        answers = [row["paraphrased_answer"], *row["perturbed_answer"]]
        nlls = [plain_nll(target, tokenizer, row["question"], answer) for answer in answers]
        right, wrong = math.exp(-nlls[0]), math.exp(-np.mean(nlls[1:]))
        certain.append(right / (right + wrong))
    hidden = [1 - extracted, 1 - memorized, 1 - probability, 1 - np.mean(certain)]
    assert scores["memorization"] == pytest.approx(4 / sum(1 / v for v in hidden), rel=1e-5)


def test_without_a_holdout_the_membership_scores_are_left_out_and_training_never_audits(
        mini, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(mini / "data", folder)
    (folder / "holdout05.jsonl").unlink()
    argv = eval_flags(mini, out=tmp_path / "x", data=folder, audits=True)
    evaluate.main([str(mini / "target"), *argv])
    memorization = {"exact_memorization", "extraction_strength", "memorization"}
    assert scores_of(tmp_path / "x").keys() == KEYS | memorization
    unlearn.main(flags(mini, out=tmp_path / "run", eval_every=1, audits=True))
    assert scores_of(tmp_path / "run").keys() == KEYS


# ------------------------------------------------------------------------------------------------
# several runs


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved."""
    figures, savefig = [], Figure.savefig

    def record(figure, *args, **options):
        figures.append(figure)
        savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


def test_several_runs_give_text_markdown_csv_and_a_picture_with_every_retain_model_starred(
        mini, tmp_path, drawn, capsys):
    """Two seeds with a retain model each: a run's forget quality is against its own."""
    other = tmp_path / "other"
    shutil.copytree(mini / "retain", other)
    path = other / "model.safetensors"
    scaled = {name: weight * 1.3 for name, weight in load_file(path).items()}
    save_file(scaled, path, metadata={"format": "pt"})
    own = {}
    for name, retain in (("a_s0", mini / "retain"), ("a_s1", other)):
        unlearn.main(flags(mini, out=tmp_path / name, retain_model=retain, seed=name[-1], steps=6,
                           eval_every=2))
        own[name] = scores_of(tmp_path / name)
    capsys.readouterr()
    out = tmp_path / "out"
    evaluate.main([str(tmp_path / "a_s0"), str(tmp_path / "a_s1"), f"--out={out}"])

    printed = capsys.readouterr().out
    assert "mean and standard deviation over seeds" in printed
    assert "a (n=2)" in printed
    both = {name: scores_of(out / name) for name in own}
    for name in own:
        assert both[name] == pytest.approx(own[name], rel=1e-6), name

    with (out / "comparison.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == ["a_s0", "a_s1", "a (n=2)"]
    for name, row in zip(own, table):
        for key in KEYS:
            assert float(row[key]) == both[name][key], key  # in full precision
    pair = [both[name]["forget_quality"] for name in own]
    assert float(table[2]["forget_quality"]) == pytest.approx(np.mean(pair))
    assert float(table[2]["forget_quality_std"]) == pytest.approx(np.std(pair, ddof=1))
    assert pair[0] != pair[1]
    text = (out / "comparison.md").read_text()
    probs = [f"{both[name]['forget_prob']:.2e}" for name in own]
    assert f"| forget_prob ↓ | {probs[0]} | {probs[1]} |" in text
    assert "±" in text

    [axes] = drawn[-1].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("model utility", "forget quality")
    assert (out / "comparison.png").stat().st_size > 5000
    points = {"*": {}, "s": {}}
    for line in axes.lines[:-1]:  # the last is p = 0.05
        points[line.get_marker()][line.get_label()] = line.get_ydata()[0]
    assert points["*"] == {"retain model retain": 1.0, "retain model other": 1.0}
    assert points["s"] == {name: both[name]["forget_quality"] for name in own}


def test_the_demos_holdout_set_is_shown_to_no_model():
    bench = data.load("demo", "authors")
    shown = json.dumps([bench.full, bench.retain_full, bench.forget, bench.retain, bench.evals])
    assert len(bench.holdout) == 40 == len(bench.forget)
    assert len({row["answer"] for row in bench.holdout}) == 40
    for row in bench.holdout:
        assert row["question"] not in shown
        assert row["answer"] not in shown
    # the published scores of the demo are of these rows
    assert hashlib.sha256(shown.encode()).hexdigest()[:16] == "62a1a526095fd19a"


def test_ask_prints_the_answers_side_by_side(mini, capsys):
    evaluate.main([str(mini / "target"), str(mini / "retain"), "--ask=What does amber mean?",
                   *eval_flags(mini)])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(str(mini / "target"))


def test_a_retain_model_alone_is_scored_without_forget_quality_and_a_line_says_so(
        mini, tmp_path, capsys):
    evaluate.main([str(mini / "retain"), *eval_flags(mini, out=tmp_path, retain_model=None)])
    assert scores_of(tmp_path).keys() == KEYS - {"forget_quality"}
    assert "No retain model, so no forget quality" in capsys.readouterr().out


def select(table, key, **degenerate):
    """(order, sentence) of a selection in which a target's share is 0.1."""
    for name, share in degenerate.items():
        table[name]["degenerate"] = share
    return tables.select(
        table, key, tables.ARROWS[key], "degenerate", dict.fromkeys(table, 0.1 + 0.05))


def test_a_run_is_chosen_where_the_arrow_points_and_never_one_that_babbles():
    def table():
        values = {"a": (0.2, 30.0), "b": (0.9, -10.0), "c": (0.5, -40.0)}
        return {name: {"forget_quality": up, "forget_prob": up, "privleak": zero, "degenerate": 0.0}
                for name, (up, zero) in values.items()}

    ordered, sentence = select(table(), "forget_quality")
    assert list(ordered) == ["b", "c", "a"]
    assert sentence == ("--select=forget_quality: b is chosen, the best by forget_quality ↑")
    assert list(select(table(), "forget_prob")[0]) == ["a", "c", "b"]
    assert list(select(table(), "privleak")[0]) == ["b", "a", "c"]  # nearest to 0
    # 5 points above the target's is allowed, more is not
    assert "b is chosen" in select(table(), "forget_quality", b=0.15)[1]
    ordered, sentence = select(table(), "forget_quality", b=0.16)
    assert list(ordered) == ["b", "c", "a"]
    assert "c is chosen" in sentence
    assert "never b, whose degenerate is 0.1600, above 0.1500" in sentence
    assert "no run is chosen" in select(table(), "forget_quality", a=1.0, b=1.0, c=1.0)[1]

    retain = table() | {"retain": {"forget_prob": 0.1}}  # has no forget quality
    ordered, sentence = select(retain, "forget_quality")
    assert list(ordered) == ["b", "c", "a", "retain"]
    with pytest.raises(UsageError, match="no run has it; there are forget_quality, forget_prob"):
        select(table(), "composite")


def test_select_orders_the_table_by_a_score_and_knows_each_runs_target(mini, tmp_path, capsys):
    for name, lr in (("still", 1e-9), ("moved", 3e-2)):
        unlearn.main(flags(mini, out=tmp_path / name, lr=lr, forget_loss="nll", steps=8))
    capsys.readouterr()
    evaluate.main([str(tmp_path / "still"), str(tmp_path / "moved"), "--select=forget_prob",
                   f"--out={tmp_path / 'out'}"])
    printed = capsys.readouterr().out
    # best is the retain model's value
    aim = float(re.search(r"the best by forget_prob →([\d.]+)", printed)[1])
    far = {name: abs(scores_of(tmp_path / "out" / name)["forget_prob"] - aim)
           for name in ("still", "moved")}
    assert f"{min(far, key=far.get)} is chosen" in printed
    evaluate.main([str(tmp_path / "still"), str(tmp_path / "moved"), "--audits=True",
                   "--select=memorization", f"--out={tmp_path / 'out'}"])
    printed = capsys.readouterr().out
    assert "--select=memorization" in printed
    for name in ("still", "moved"):
        scores = scores_of(tmp_path / "out" / name)
        assert {"memorization", "privacy", "utility_ratio", "composite"} <= scores.keys()
    still = scores_of(tmp_path / "out" / "still")
    assert still["privacy"] == pytest.approx(0, abs=1e-3)  # it is its target
    target = evaluate.summarize(
        evaluate_target(mini, tmp_path), None, configs.make(evaluate.Config, {"benchmark": "tofu"}))
    ratio = still["model_utility"] / (target["model_utility"] or 1)
    assert still["utility_ratio"] == pytest.approx(ratio, abs=1e-3)


def evaluate_target(mini, tmp_path):
    evaluate.main([str(mini / "target"), *eval_flags(mini, out=tmp_path / "target")])
    return records_of(tmp_path / "target")


def test_the_retain_models_own_log_gets_no_forget_quality(mini, tmp_path):
    evaluate.main([str(mini / "retain"), *eval_flags(
        mini, out=tmp_path / "r", retain_model=mini / "target")])
    log = tmp_path / "r" / "examples.jsonl"
    copy = tmp_path / "copy.jsonl"
    shutil.copy(log, copy)
    evaluate.main([str(copy), f"--retain_log={log}", f"--out={tmp_path / 'x'}"])
    assert "forget_quality" not in scores_of(tmp_path / "x")


def test_runs_of_different_templates_need_a_template_given_and_no_run_loses_its_scores(
        mini, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, template in (("a", "qa"), ("b", "llama2")):
        unlearn.main(flags(mini, out=f"out/{name}", template=template, steps=1))
    sentence = "out/a: template qa, out/b: template llama2; give --template="
    with pytest.raises(UsageError, match=sentence):
        evaluate.main(["out/a", "out/b"])
    evaluate.main(["out/a", "out/b", "--template=qa", "--out=out/both"])
    assert (tmp_path / "out" / "both" / "comparison.png").exists()
    shutil.copytree(mini / "target", tmp_path / "elsewhere" / "a")
    sentence = "its scores would go to out/a, which holds a run; give --out"
    with pytest.raises(UsageError, match=sentence):
        evaluate.main(["elsewhere/a", *eval_flags(mini)])


def test_another_tokenizer_is_another_reference(mini, tmp_path):
    retain = tmp_path / "retain"
    shutil.copytree(mini / "retain", retain)
    before = models.fingerprint(str(retain))
    path = retain / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert models.fingerprint(str(retain)) != before
