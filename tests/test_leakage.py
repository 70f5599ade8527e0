"""What sampled answers and other prompts give away: pytest tests/test_leakage.py."""
import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
import transformers
from conftest import PROC, flags, run_script

import configs
import data
import evaluate
import model as models
import relearn
import unlearn
from configs import UsageError, rundir


@pytest.fixture(scope="module")
def run(mini, tmp_path_factory):
    """A run on the miniature that knows its forget set by half: sampled answers differ."""
    out = tmp_path_factory.mktemp("leaking") / "run"
    unlearn.main(flags(mini, out=out, forget_loss="nll", retain_loss="none", lr=1e-2, steps=20))
    return out


def rows_of(out):
    return json.loads((out / "relearn.json").read_text())


def load(run, **settings):
    """(lm, tokenizer, Attacked) of the run, as relearn.py makes them."""
    given = rundir.inherit(relearn.INHERITED, [str(run)], settings) | relearn.FIXED
    c = configs.make(relearn.Config, given)
    bench = relearn.load_bench(c)
    lm, tokenizer = evaluate.load(str(run), c, PROC)
    return lm, tokenizer, relearn.Attacked(str(run), "run", c, PROC, bench, None, None, None)


# ------------------------------------------------------------------------------------------------
# the best of k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_the_expected_maximum_is_the_mean_over_all_subsets(n):
    rng = random.Random(n)
    scores = [rng.choice([0, 0.25, 0.5, rng.random()]) for _ in range(n)]
    for k in range(1, n + 1):
        best = [max(subset) for subset in itertools.combinations(scores, k)]
        assert evaluate.expected_maximum(scores, k) == pytest.approx(np.mean(best)), k


def test_the_best_of_one_is_the_mean_of_all_the_maximum_and_it_grows_between():
    scores = np.random.default_rng(0).random(64)
    values = [evaluate.expected_maximum(scores, k) for k in (1, 4, 16, 64)]
    assert values[0] == pytest.approx(scores.mean())
    assert values[-1] == scores.max()
    assert values == sorted(values)
    assert evaluate.expected_maximum([0.3] * 2000, 1000) == pytest.approx(0.3)


@pytest.mark.parametrize("scores, k", [([], 1), ([0.5], 0), ([0.5, 1.0], 3)])
def test_the_best_of_none_or_of_more_than_there_are_is_an_error(scores, k):
    with pytest.raises(ValueError):
        evaluate.expected_maximum(scores, k)


# ------------------------------------------------------------------------------------------------
# the draws


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax():
    logits = torch.tensor([math.log(p) for p in (0.1, 0.6, 0.3)])
    for temperature in (1.0, 0.5):
        n = 4000
        choose = relearn.sampler([f"0 forget {i} 0" for i in range(n)], temperature)
        ids = choose(logits.expand(n, 3), list(range(n)))
        shares = torch.bincount(ids, minlength=3) / n
        expected = (logits / temperature).softmax(-1)
        assert torch.allclose(shares, expected, atol=0.03), temperature


def test_an_impossible_token_is_never_drawn_and_a_sequence_has_its_own_numbers():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    choose = relearn.sampler(["a"], 1.0)
    assert {int(choose(logits, [0])) for _ in range(200)} == {1, 3}
    flat = torch.zeros(2, 1000)
    both, alone = relearn.sampler(["a", "b"], 1.0), relearn.sampler(["b"], 1.0)
    for _ in range(3):
        assert both(flat, [0, 1])[1] == alone(flat[:1], [0])[0]


def test_greedy_answers_are_the_limit_of_a_low_temperature(run):
    lm, tokenizer, a = load(run)
    prompts = [evaluate.make_template(tokenizer, a.c).prompt_ids(row["question"])
               for row in a.bench.evals["forget"]]
    choose = relearn.sampler(list(map(str, range(len(prompts)))), 1e-4)
    drawn = models.generate(lm, tokenizer, prompts, 8, PROC, 10**6, choose=choose)
    assert drawn == models.generate(lm, tokenizer, prompts, 8, PROC, 10**6)
    assert len(set(drawn)) > 3


def sampled(run, monkeypatch, **settings):
    """(rows, [(question, answer)]) of a sampling attack."""
    lm, tokenizer, a = load(run, samples=4, **settings)
    texts, answer = [], evaluate.answer

    def record(lm, tokenizer, records, *args, **options):
        answer(lm, tokenizer, records, *args, **options)
        texts.extend((row["question"], row["generated"]) for row in records)

    monkeypatch.setattr(evaluate, "answer", record)
    rows = relearn.sample(a, lm, tokenizer)
    monkeypatch.undo()
    return rows, texts


def test_samples_are_the_same_for_any_micro_batch_and_others_for_another_seed(run, monkeypatch):
    rows, texts = sampled(run, monkeypatch, micro_batch_tokens=4096)
    assert len(texts) == 12 * 4
    assert len(set(texts)) > 24  # a question's answers differ
    for budget in (1, 100):
        assert sampled(run, monkeypatch, micro_batch_tokens=budget) == (rows, texts), budget
    lm, tokenizer, a = load(run, samples=4)
    other = relearn.sample(dataclasses.replace(a, seed=1), lm, tokenizer)
    assert other != rows
    assert [row["k"] for row in rows] == [1, 4]


def test_leak_at_k_is_the_expected_best_rouge_of_transformers_own_texts_scored_by_hand(
        run, monkeypatch):
    rows, texts = sampled(run, monkeypatch, eval_rows=3)
    answers = {row["question"]: row["answer"] for row in load(run)[2].bench.evals["forget"]}
    scores = {}
    for question, text in texts:
        recall = evaluate.rouge(text, answers[question], stem=True)["rougeL_recall"]
        scores.setdefault(question, []).append(recall)
    assert len(scores) == 3
    assert rows[0]["leak_at_1"] == pytest.approx(np.mean([*map(np.mean, scores.values())]))
    assert rows[1]["leak_at_4"] == pytest.approx(np.mean([*map(max, scores.values())]))


# ------------------------------------------------------------------------------------------------
# the attacks, as they are run


def test_sampling_is_the_same_on_two_processes_and_the_retain_model_is_sampled_alike(
        run, tmp_path, capsys):
    argv = [str(run), "--attacks=sample,worst_case", "--samples=5", "--seeds=0,1"]
    relearn.main([*argv, f"--out={tmp_path / 'one'}"])
    printed = capsys.readouterr().out
    assert "run, forget: 12 questions x 5 = 60 answers of at most 8 tokens" in printed
    assert "leak_at_4 ↓" in printed and "leak_at_16" not in printed
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 100
    done = run_script("relearn.py", [*argv, f"--out={tmp_path / 'two'}"], processes=2)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "one")
    others = rows_of(tmp_path / "two")
    assert len(rows) == len(others)
    for row, other in zip(rows, others):
        for key, value in row.items():
            same = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
            assert other[key] == same, (row["attack"], key)
    drawn = [row for row in rows if row["attack"] == "sample"]
    assert len(drawn) == 2 * 2 * 2  # models, seeds, k = 1 and 4
    assert {row["model"] for row in drawn} == {"run", "retain model"}
    assert len([row for row in rows if row["attack"] == "worst_case"]) == 2  # once a model
    assert (tmp_path / "one" / "leak.png").stat().st_size > 5000
    assert not (tmp_path / "one" / "relearn.png").exists()  # no curve over epochs


@torch.no_grad()
def plain_prob(lm, tokenizer, prompt, answer):
    """The answer's probability, per token: transformers' own model on one text."""
    prompt = tokenizer(prompt).input_ids
    ids = prompt + tokenizer(f" {answer}").input_ids + [tokenizer.eos_token_id]
    logps = lm(torch.tensor([ids])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
    labels = torch.tensor(ids[len(prompt):])
    return logps.gather(1, labels[:, None]).mean().exp().item()


def test_the_worst_case_is_the_best_of_three_prompts_question_by_question(run):
    lm, tokenizer, a = load(run)
    [row] = relearn.worst_case(a, lm, tokenizer)
    plain = transformers.AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    best, first = [], []
    for question in a.bench.evals["forget"]:
        prompts = [f"Question: {question['question']}\nAnswer:",
                   f"Question: {question['paraphrased_question']}\nAnswer:", question["question"]]
        probs = [plain_prob(plain, tokenizer, prompt, question["answer"]) for prompt in prompts]
        best.append(max(probs))
        first.append(probs[0])
    assert row["forget_prob"] == pytest.approx(np.mean(best), rel=1e-4)
    assert row["forget_prob"] > np.mean(first)
    records = evaluate.record_qa(lm, tokenizer, a.bench, a.c, PROC)
    assert row["forget_rouge"] >= evaluate.set_scores("forget", records)["forget_rouge"]


@pytest.mark.parametrize("words, sentence", [
    (["--samples=0"], "--samples=0: must be at least 1"),
    (["--temperature=0"], "--temperature=0.0: must be above 0"),
    (["--attacks=smaple"], "any of relearn_random, .*sample"),
])
def test_a_mistaken_sampling_is_one_sentence(run, words, sentence):
    with pytest.raises(UsageError, match=sentence):
        relearn.main([str(run), *words])


def test_an_attack_that_needs_a_column_says_which_is_missing(run, mini, tmp_path):
    rows = data.read_rows(str(mini / "data" / "forget05.jsonl"))
    plain = [{key: row[key] for key in ("question", "answer")} for row in rows]
    text = "".join(json.dumps({"text": row["answer"]}) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    (tmp_path / "text.jsonl").write_text(text)
    for attack, file, column in (("worst_case", "rows", "paraphrased_question"),
                                 ("sample", "text", "question")):
        with pytest.raises(UsageError, match=f"{attack}: the forget set has no column {column}"):
            relearn.main([str(run), f"--attacks={attack}", "--benchmark=own",
                          "--subset=rows",
                          f"--forget_data={tmp_path / file}.jsonl", f"--out={tmp_path / 'x'}"])


# ------------------------------------------------------------------------------------------------
# attacks of one's own


def test_a_random_attack_of_ones_own_is_repeated_over_seeds(run, tmp_path, monkeypatch):
    """One line of the table, whatever its name."""
    seeds = []

    def shake(a, lm, tokenizer):
        seeds.append(a.seed)
        return a.score_once(lm, tokenizer)

    monkeypatch.setitem(relearn.ATTACKS, "shake", relearn.Kind(shake, random=True))
    monkeypatch.setitem(relearn.ATTACKS, "look", relearn.Kind(shake))
    relearn.main([str(run), "--attacks=shake,look", "--seeds=3,5", "--control=False",
                  f"--out={tmp_path}"])
    assert seeds == [3, 5, 3]
    assert "| shake" in (tmp_path / "relearn.md").read_text()


def test_a_hyper_parameter_is_refused_and_reset_without_a_list():
    """Whatever unlearn.Method and unlearn.Keeping declare is at its default in an attack."""
    for group in (unlearn.Method, unlearn.Keeping):
        for name in configs.fields(group):
            assert name in relearn.IGNORED
            if name not in ("forget_loss", "retain_loss"):
                assert relearn.FIXED[name] == getattr(group, name), name
