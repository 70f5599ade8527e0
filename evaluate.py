"""Score models: forget quality, utility, and what a model still reveals.

    python evaluate.py out/demo                    # a run directory: its own settings
    python evaluate.py out/demo out/demo_target --ask="Who wrote Hamlet?"
    python evaluate.py org/model --benchmark=tofu --template=llama2 --retain_model=org/retain
    python evaluate.py org/model --benchmark=muse --subset=books
    python evaluate.py out/a_s* out/b_s* --select=model_utility    # which run does a rule choose?
    python evaluate.py LOG.json --retain_log=LOG.json  # of ours, TOFU's or open-unlearning's

A run directory, any Hugging Face model directory, a hub id (org/name@revision) or a log. Several
give one table, on screen and in comparison.md, .csv and .png (in out/ or --out), each run against
the retain model it was made with. --select=KEY orders the table by a score, best first, and says
which run is chosen. Scores go to scores.json, and what they were computed from to examples.jsonl:
in the run directory, or in --out.
"""
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import types
import zlib
from collections.abc import Callable

import configs

if __name__ == "__main__":
    configs.help_if_asked(__file__, "Command", __doc__)  # before the imports that take seconds

import numpy as np
import scipy.stats
import torch
from rouge_score import rouge_scorer

import data
import losses
import model as models
from configs import Failure, UsageError, recorded, rundir, tables

# ------------------------------------------------------------------------------------------------
# metrics: pure functions of lists, NumPy arrays or CPU tensors; empty input is a ValueError


def array(values):
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("a metric of no values")
    return values


def truth_ratio(correct_nll, perturbed_nll) -> np.ndarray:
    """TOFU's R = p(wrong) / p(correct), p = exp(-nll). arXiv 2401.06121.

    correct_nll (N,): mean NLL per token of the paraphrased answer, or of the plain one where there
    is no paraphrase; perturbed_nll (N, K). p(wrong) is the GEOMETRIC mean over K wrong answers: the
    paper's text has the arithmetic mean, the authors' code and the public leaderboard have this.
    Returns (N,) in (0, inf): 0 = knows the correct answer, 1 = cannot tell.
    """
    log_ratio = array(correct_nll) - array(perturbed_nll).mean(-1)
    return np.exp(np.clip(log_ratio, -700, 700))  # beyond that a float is 0 or infinite


def forget_quality(truth_ratio, retain_truth_ratio) -> float:
    """TOFU's forget quality, in [0, 1]; higher is better. arXiv 2401.06121.

    The p-value of the two-sided two-sample Kolmogorov-Smirnov test between two models' truth
    ratios. Small: the model can be told from one that never saw the forget set.
    """
    return float(scipy.stats.ks_2samp(array(truth_ratio), array(retain_truth_ratio)).pvalue)


def harmonic_mean(values) -> float:
    """n / sum(1 / v), 0 if any is 0."""
    return float(scipy.stats.hmean(array(values)))


def model_utility(scores: dict) -> float:
    """Harmonic mean of TOFU's nine scores NINE; in [0, 1], higher is better."""
    return harmonic_mean(list(scores.values()))


LATIN, LETTER = r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]", r"[^\W\d_]"
# Thai and Lao, Burmese, Khmer, Japanese, Chinese: written without spaces
SPACELESS = ("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
             "\U00020000-\U0003ffff]")
# of other scripts words, with the vowel signs of Hebrew, Arabic and the scripts of India
UNICODE_WORD = rf"{SPACELESS}|(?:(?!{SPACELESS})[\w\u0591-\u05c7\u064b-\u065f\u0900-\u0dff])+"


@functools.cache
def make_rouge_scorer(stem, latin):
    words = types.SimpleNamespace(
        tokenize=lambda text: re.findall(UNICODE_WORD, text.lower()))
    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], stem, tokenizer=None if latin else words)


def rouge(prediction: str, reference: str, stem: bool) -> dict:
    """ROUGE-1 recall, ROUGE-L recall and ROUGE-L F1, each in [0, 1]; 1 = repeats the reference.

    TOFU reports L recall, stemmed; MUSE L F1, not stemmed. rouge_score knows the letters a to z
    only; where most of the reference's are of another script, words of that script are compared, or
    characters where it has no spaces between words, not stemmed.
    """
    latin = 2 * len(re.findall(LATIN, reference)) >= len(re.findall(LETTER, reference))
    scores = make_rouge_scorer(stem, latin).score(reference, prediction)
    return {
        "rouge1_recall": scores["rouge1"].recall,
        "rougeL_recall": scores["rougeL"].recall,
        "rougeL_f1": scores["rougeL"].fmeasure,
    }


def is_degenerate(answer: str) -> bool:
    """Is it empty, or does it repeat itself: are fewer than a third of its 4-grams distinct?

    4-grams of words, of characters where there are no spaces. Fewer than four do not repeat.
    """
    parts = answer.split()
    if len(parts) == 1:
        parts = answer.strip()
    grams = [tuple(parts[i:i + 4]) for i in range(len(parts) - 3)]
    return not parts or 3 * len(set(grams)) < len(grams)


def expected_maximum(scores, k: int) -> float:
    """Unbiased mean of the maximum over k of n scores: sum_i s_(i) C(i-1, k-1) / C(n, k).

    s_(i) ascending. k = 1: their mean; k = n: their maximum. leak@k of arXiv 2511.04934, where a
    judge gives the scores.
    """
    ascending = np.sort(array(scores))
    n = len(ascending)
    if not 1 <= k <= n:
        raise ValueError(f"the maximum over {k} of {n} scores")
    weights = [math.comb(i, k - 1) / math.comb(n, k) for i in range(n)]
    return float(ascending @ weights)


def min_k(token_logps, k: float = 0.4, plus_plus_stats: tuple | None = None) -> float:
    """Min-K %: mean of the lowest max(1, int(k T)) token log-probs. arXiv 2310.16789.

    Higher = more like a member of the training set. plus_plus_stats = (mean (T,), variance (T,)) of
    log p under the model's own distribution: Min-K%++ (arXiv 2404.02936), of log-probs that are
    standardised first, with a variance of at least 1e-6.
    """
    logps = array(token_logps)
    if plus_plus_stats is not None:
        mean, variance = map(array, plus_plus_stats)
        logps = (logps - mean) / np.sqrt(np.maximum(variance, 1e-6))
    n_lowest = max(1, int(k * len(logps)))
    return float(np.sort(logps)[:n_lowest].mean())


def auc(forget_scores, holdout_scores) -> float:
    """P(forget > holdout) + half the ties, in [0, 1]; 0.5 = no membership signal.

    Scores: higher = more like a member of the training set.
    """
    forget, holdout = array(forget_scores), array(holdout_scores)
    n_wins = scipy.stats.mannwhitneyu(forget, holdout, method="asymptotic").statistic
    return float(n_wins / (len(forget) * len(holdout)))


def privleak(auc: float, auc_retrain: float) -> float:
    """MUSE's privacy leakage in percent: 0 is ideal, -100 fully memorised. arXiv 2407.06460.

    Above 0: over-unlearned. Both AUCs as auc() gives them; MUSE's published constants are the
    complement: 1 - 0.4772 (News), 1 - 0.5393 (Books).
    """
    return 100 * ((1 - auc) - (1 - auc_retrain)) / (1 - auc_retrain)


def exact_memorization(correct) -> float:
    """Share of answer tokens that are the model's first choice, in [0, 1]; lower is better.

    correct: (T,) bool.
    """
    return float(array(correct).mean())


def extraction_strength(correct) -> float:
    """1 - s/T, s = start of the suffix of correct first choices; in [0, 1], lower is better.

    correct: (T,) bool. 0 if the last token is wrong.
    """
    wrong = np.flatnonzero(array(correct) == 0)
    start = wrong[-1] + 1 if len(wrong) else 0
    return float(1 - start / len(correct))


def memorization(revealed) -> float:
    """Harmonic mean of 1 - v; in [0, 1], 1 = nothing is revealed. arXiv 2506.12618, appendix F.1.

    revealed: extraction strength, exact memorization, the paraphrased answer's probability, and the
    mean of p / (p + p(wrong)) = 1 / (1 + R), R the truth ratio.
    """
    return harmonic_mean(1 - array(revealed))


def privacy(aucs, retain_aucs, target_aucs) -> float:
    """Harmonic mean over attacks of 1 - |auc - retain| / |target - retain|, cut to [0, 1].

    1 = the retain model's AUCs; 0 = one is as far from them as the target's. arXiv 2506.12618,
    appendix F.1, where the attacks are PRIVACY.
    """
    aucs, retain, target = map(array, (aucs, retain_aucs, target_aucs))
    distances = abs(aucs - retain) / np.maximum(abs(target - retain), 1e-9)
    return harmonic_mean(np.clip(1 - distances, 0, 1))


PRIVACY = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_pp")


def composite(scores: dict, retain: dict, target: dict) -> dict:
    """privacy, utility_ratio, and composite: the harmonic mean of both and memorization.

    Of the scores of a model, its retain model and its target, audited; higher is better. All are in
    [0, 1] but utility_ratio, utility / the target's, which may exceed 1: in the paper utility has
    a part for fluency too, from a classifier.
    """
    aucs = [[some[key] for key in PRIVACY] for some in (scores, retain, target)]
    utility_ratio = scores["model_utility"] / (target["model_utility"] or 1)
    found = {"privacy": privacy(*aucs), "utility_ratio": utility_ratio}
    return found | {"composite": harmonic_mean([scores["memorization"], *found.values()])}


# ------------------------------------------------------------------------------------------------
# records: a dict per scored row, from which every score can be computed again


def score_rows(lm, sets, encode, c, proc, measure=models.log_probs):
    """[(record, row, group, values)]: `measure` at each answer token of all rows of `sets`.

    encode(row) is the row's group. A row is skipped if one of its answers has no tokens.
    """
    rows = []
    for name, some in sets.items():
        for i, row in enumerate(some[:c.eval_rows]):
            rows.append(({"set": name, "index": i}, row, encode(row)))
    scored = [row for row in rows if None not in row[2]]
    if len(scored) < len(rows):
        proc.say(f"{len(rows) - len(scored)} rows are not scored: an answer without tokens, or a "
                 f"prompt longer than --max_length={c.max_length}")
    groups = [group for _, _, group in scored]
    data.note_cut(groups, c.max_length)
    values = models.token_scores(lm, groups, proc, c.micro_batch_tokens, measure, "scoring")
    return [(*row, arrays) for row, arrays in zip(scored, values)]


def whole_text(tokenizer, row):
    return data.Example(data.tokenize(tokenizer, row["text"]), 1)


def make_template(tokenizer, c):
    name = c.template or ("chat" if tokenizer.chat_template else "qa")
    return data.Template(name, tokenizer, c.system_prompt, c.date_string, c.chat_template_kwargs)


def key_of(record):
    return record["set"], record["index"]


def by_set(records):
    sets = {}
    for record in records or []:
        sets.setdefault(record["set"], []).append(record)
    return sets


def column(records, key):
    return [record[key] for record in records]


# ------------------------------------------------------------------------------------------------
# TOFU: questions whose right and wrong answers are scored, and which the model answers

OPTIONS = ("real_authors", "world_facts")  # sets whose p(answer) is relative to the wrong answers
NINE = [f"{name}_{score}" for name in ("retain", *OPTIONS)
        for score in ("prob", "rouge", "truth_ratio")]


def record_qa(lm, tokenizer, bench, c, proc):
    """A record per row of every set: NLL of its answers, the greedy answer and its ROUGE."""
    c = models.fit(c, lm.config)
    records, known = score_answers(lm, make_template(tokenizer, c), bench, c, proc)
    asked = [record for record in records if key_of(record) in known]
    answer(lm, tokenizer, asked, c, proc, [known[key_of(record)] for record in asked])
    return records


def score_answers(lm, template, bench, c, proc):
    """Return records with the NLL of each answer, and {(set, index): ids}.

    ids: what scoring has shown of a question's greedy answer, the true answer up to where the model
    would go on otherwise.
    """
    def encode(row):
        answers = [None]  # the row's own
        if "paraphrased_answer" in row:
            answers.append(row["paraphrased_answer"])
        answers += row.get("perturbed_answer", [])
        return [template.encode(row, c.max_length, answer) for answer in answers]

    records, known = [], {}
    sets = {name: template.split(rows, c.max_length) for name, rows in bench.evals.items()}
    for record, row, group, arrays in score_rows(lm, sets, encode, c, proc, choices):
        example, nlls = group[0], [-array[:, 0].mean() for array in arrays]
        record["question"] = row.get("question", "")
        record["answer"] = row.get("answer", row.get("text"))
        if example.cut:  # TOFU's ROUGE then asks for what is left
            kept = template.tokenizer.decode(example.ids[example.start:], skip_special_tokens=True)
            record["answer"] = kept.strip()
        record |= {"nll": nlls.pop(0), "n_tokens": example.n_answer}
        if "paraphrased_answer" in row:
            record["paraphrased_nll"] = nlls.pop(0)
        if nlls:
            record["perturbed_nll"] = nlls
        if "question" in row:
            prompt = template.prompt_ids(row["question"])
            n_greedy = int(arrays[0][:, 1].cumprod().sum())
            ids = example.ids[:example.start + n_greedy]
            # where a token crosses the border of question and answer nothing is known
            known[key_of(record)] = ids[len(prompt):] if ids[:len(prompt)] == prompt else []
        records.append(record)
    if not records:
        raise UsageError("no row can be scored: every answer is empty or every prompt longer than "
                         "--max_length.")
    return records, known


def choices(logits, labels):
    """(n, 2) for each answer token: log p, is it the model's first choice."""
    return torch.stack([losses.token_logps(logits, labels), logits.argmax(-1) == labels], -1)


def answer(lm, tokenizer, records, c, proc, begun=None, choose=None):
    """Add the model's answers, and their ROUGE, to records with a question; MUSE's have a prompt.

    MUSE's records are all of one set. begun, choose: see models.generate.
    """
    is_muse, template = c.benchmark == "muse", make_template(tokenizer, c)
    if is_muse:
        prompts = [data.tokenize(tokenizer, record["prompt"]) for record in records]
    else:
        prompts = [template.prompt_ids(record["question"]) for record in records]
    asks_facts = is_muse and "question" in records[0]
    length = KNOWMEM_TOKENS if asks_facts else c.max_new_tokens
    texts = models.generate(lm, tokenizer, prompts, length, proc, 4 * c.micro_batch_tokens,
                            "answering", begun, template.ends[1], choose)
    for record, text in zip(records, texts):
        if asks_facts:
            text = KNOWMEM_STOP.split(text)[0]
            del record["prompt"]  # mostly the ten answered questions, the same in every record
        record["generated"] = text if is_muse else text.strip()
        record |= rouge(text, record["answer"], c.stem or not is_muse)


def tofu_scores(records, retain_records=None, c=None):
    """The scores of records; forget_quality against a retain model's, if these are others."""
    sets, scores = by_set(records), {}
    for name, rows in sets.items():
        if not name.startswith("audit_"):
            scores |= set_scores(name, rows)
    if all(key in scores for key in NINE):
        nine = {key: scores[key] for key in NINE}
        scores = {"model_utility": model_utility(nine)} | scores
    rows, retained = sets.get("forget", []), by_set(retain_records).get("forget", [])
    itself = column(rows, "nll") == column(retained, "nll")
    if retained and "forget_truth_ratio" in scores and not itself:
        check_same_questions(rows, retained)
        quality = forget_quality(truth_ratios(rows), truth_ratios(retained))
        scores = {"forget_quality": quality} | scores
    scores |= audit_scores(records, retain_records)
    if {"forget_paraphrased_prob", "forget_truth_ratio", *recorded.MEMORIZATION} <= scores.keys():
        revealed = [scores[key] for key in ("forget_paraphrased_prob", *recorded.MEMORIZATION)]
        scores["memorization"] = memorization([*revealed, np.mean(1 / (1 + truth_ratios(rows)))])
    return scores


def set_scores(name, rows):
    """<set>_prob, <set>_rouge and <set>_truth_ratio, those that the records allow.

    And forget_paraphrased_prob: a paraphrase of the answer, asked for with the same question.
    """
    nlls = [option_nll(row) for row in rows] if name in OPTIONS else column(rows, "nll")
    scores = {f"{name}_prob": mean_prob(nlls)}
    if name == "forget" and all("paraphrased_nll" in row for row in rows):
        scores["forget_paraphrased_prob"] = mean_prob(column(rows, "paraphrased_nll"))
    if all("rougeL_recall" in row for row in rows):
        scores[f"{name}_rouge"] = np.mean(column(rows, "rougeL_recall"))
    if all("perturbed_nll" in row for row in rows):
        ratios = truth_ratios(rows)
        closeness = np.maximum(0, 1 - ratios)
        if name == "forget":
            closeness = np.minimum(ratios, 1 / ratios)
        scores[f"{name}_truth_ratio"] = closeness.mean()
    return scores


def mean_prob(nlls):
    return np.exp(-np.array(nlls)).mean()


def option_nll(row):
    """-log of p / (p + sum of the wrong answers'); a collapsed model gives all of them p = 0."""
    nlls = np.array([row["nll"], *row["perturbed_nll"]])
    return nlls[0] + np.logaddexp.reduce(-nlls)


def truth_ratios(rows):
    """(N,) R of each record; records may have different numbers of wrong answers."""
    return np.array([truth_ratio(row.get("paraphrased_nll", row["nll"]), row["perturbed_nll"])
                     for row in rows])


def check_same_questions(rows, retain_rows):
    if len(rows) != len(retain_rows):
        raise UsageError(
            f"the retain reference has {len(retain_rows)} forget examples and the model "
            f"{len(rows)}: score both on the same questions (the TOFU authors' logs hold the first "
            "300: --eval_rows=300).")
    for row, other in zip(rows, retain_rows):
        # TOFU's logs have the answers only
        key = "question" if row.get("question") or other.get("question") else "answer"
        if row.get(key) and other.get(key) and row[key] != other[key]:
            raise UsageError(f"the retain reference was scored on other questions: its {key} "
                             f"{other[key]!r}, the model's {row[key]!r}.")


# ------------------------------------------------------------------------------------------------
# MUSE: continuations of forgotten passages, questions about them, and membership of their text

KNOWMEM_TOKENS = 32
KNOWMEM_STOP = re.compile("\n\n|\nQuestion|Question:")
# of the authors' retrained models: Min-40 %, forget against holdout
MUSE_AUC = {"news": 1 - 0.4772, "books": 1 - 0.5393}


def record_muse(lm, tokenizer, bench, c, proc):
    """A record per prompt with its greedy continuation, and one per text with its Min-40 %."""
    texts, records = record_texts(lm, tokenizer, bench, c, proc), []
    for name in ("verbmem_f", "knowmem_f", "knowmem_r"):
        asked = questions(tokenizer, name, bench.evals[name], c)
        answer(lm, tokenizer, asked, c, proc)
        records += asked
    return records + texts


def questions(tokenizer, name, rows, c):
    """Records of the rows of a set that is asked, without the model's answers."""
    records = [{"set": name, "index": i, **row} for i, row in enumerate(rows[:c.eval_rows])]
    for record in records if name == "verbmem_f" else ():
        # the BOS counts, as in the original: one token less of the passage is asked for
        ids = data.tokenize(tokenizer, record["answer"])[:c.max_new_tokens]
        record["answer"] = tokenizer.decode(ids, skip_special_tokens=True)
    return records


def record_texts(lm, tokenizer, bench, c, proc):
    """Min-40 % over all tokens after BOS. No text is cut."""
    sets = {name: bench.evals[name] for name in ("privleak_f", "privleak_h")}
    scored = score_rows(lm, sets, lambda row: [whole_text(tokenizer, row)], c, proc)
    for record, _, _, [logps] in scored:
        record["n_tokens"] = len(logps) - c.skip_last
        if int(0.4 * record["n_tokens"]) < 1:  # the original takes the mean of nothing
            raise UsageError(
                f"{record['set']}, row {record['index'] + 1}: the text has {record['n_tokens']} "
                "tokens to score, too few for Min-40 %, which needs 3.")
        record |= {"nll": -logps.mean(), "min_k": min_k(logps[:record["n_tokens"], 0])}
    return [record for record, *_ in scored]


def muse_scores(records, retain_records=None, c=None):
    """In percent; PrivLeak against the retain model's AUC, or the published one of the subset."""
    sets = by_set(records)
    scores = audit_scores(records, retain_records)
    for name in ("verbmem_f", "knowmem_f", "knowmem_r"):
        scores[name] = 100 * np.mean(column(sets[name], "rougeL_f1"))
    auc_retrain = min_k_auc(by_set(retain_records)) if retain_records else MUSE_AUC[c.subset]
    if auc_retrain < 1:  # a retain model that knows every forget text leaves nothing to compare
        scores["privleak"] = privleak(min_k_auc(sets), auc_retrain)
    return scores


def min_k_auc(sets):
    return auc(column(sets["privleak_f"], "min_k"), column(sets["privleak_h"], "min_k"))


# ------------------------------------------------------------------------------------------------
# Markov chains: how far the predictions are from the true transition probabilities

def transition_kl(states, logps, transitions) -> np.ndarray:
    """KL(P(. | x_t) || model) >= 0; 0 = predicts the chain.

    states (T,) x_t, logps (T, S), transitions (S, S) -> (T,)
    """
    true = np.asarray(transitions)[states]  # (T, S)
    return (true * (np.log(true) - logps)).sum(-1)


def record_markov(lm, tokenizer, bench, c, proc):
    """A record per test sequence: means over its predicted states, all but the first."""
    scored = score_rows(lm, bench.evals, lambda row: [whole_text(tokenizer, row)], c, proc,
                        lambda logits, labels: logits.float().log_softmax(-1))
    for record, _, [example], [logps] in scored:
        own = logps[range(len(logps)), example.ids[1:]]
        kl = transition_kl(example.ids[:-1], logps, data.CHAINS[record["set"]])
        record |= {"n_tokens": len(logps), "nll": -own.mean(), "kl": kl.mean()}
    return [record for record, *_ in scored]


def markov_scores(records, retain_records=None, c=None):
    """<set>_kl: the mean over all predicted states of a set."""
    scores = {}
    for name, rows in by_set(records).items():
        if name in data.CHAINS:
            kl, n_tokens = column(rows, "kl"), column(rows, "n_tokens")
            scores[f"{name}_kl"] = np.average(kl, weights=n_tokens)
    return scores


# ------------------------------------------------------------------------------------------------
# audits: memorization of the forget set, and membership inference against the holdout set


def record_audits(lm, tokenizer, bench, c, proc):
    """A record per answer of the forget and the holdout set: MEMORIZATION and MEMBERSHIP.

    MUSE: members and others are PrivLeak's texts; memorization is that of VerbMem's answers.
    """
    template = make_template(tokenizer, c)
    sets = {
        "audit_forget": bench.evals.get("forget") or bench.evals.get("privleak_f", []),
        "audit_holdout": bench.holdout or bench.evals.get("privleak_h", []),
        "audit_verbatim": bench.evals.get("verbmem_f", []),
    }
    if not sets["audit_holdout"]:
        proc.say("No holdout set: the mia_ scores are left out.")

    def encode(row):
        if "prompt" in row:
            return [data.encode(tokenizer, row["prompt"], row["answer"])]
        return [template.encode(row, c.max_length)]

    scored = score_rows(lm, sets, encode, c, proc, audit_measures)
    mine = proc.progress(range(proc.rank, len(scored), proc.world), "gradients")
    norms = proc.merge({i: gradient_norm(lm, scored[i][2], proc) for i in mine})
    for i, (record, row, _, [values]) in enumerate(scored):
        logps, correct, mean, variance = values.T
        text = row.get("answer", row.get("text"))
        record |= {
            "nll": -logps.mean(),
            "exact_memorization": exact_memorization(correct),
            "extraction_strength": extraction_strength(correct),
            "loss": logps.mean(),
            "zlib": logps.mean() / len(zlib.compress(text.encode())),
            "min_k": min_k(logps),
            "min_k_pp": min_k(logps, plus_plus_stats=(mean, variance)),
            "gradnorm": -norms[i],
        }
    return [record for record, *_ in scored]


def audit_measures(logits, labels):
    """(n, 4) for each answer token: its `choices`; mean and variance of log p over the vocabulary.

    Both under the model's own distribution.
    """
    logps = logits.float().log_softmax(-1)
    probs = logps.exp()
    mean = (probs * logps).sum(-1, keepdim=True)
    variance = (probs * logps.square()).sum(-1, keepdim=True) - mean.square()
    return torch.cat([choices(logits, labels), mean, variance], -1)


def gradient_norm(lm, group, proc):
    """Mean over parameter tensors of the L2 norm of the gradient of the answer's mean NLL."""
    with proc.autocast():
        nll = -models.score(lm, [group], proc.device).token_logps.mean()
    gradients = torch.autograd.grad(nll, [*lm.parameters()], allow_unused=True)
    norms = [gradient.norm() for gradient in gradients if gradient is not None]
    return float(torch.stack(norms).mean())


def audit_scores(records, retain_records):
    """Memorization; AUCs of forget against holdout; PrivLeak against the retain model's AUC."""
    sets = by_set(records)
    forget, holdout = sets.get("audit_forget", []), sets.get("audit_holdout", [])
    scores = {}
    for key in recorded.MEMORIZATION if forget else ():
        scores[key] = np.mean(column(sets.get("audit_verbatim", forget), key))
    if not (forget and holdout):
        return scores
    for key in recorded.MEMBERSHIP:
        scores[f"mia_{key}"] = auc(column(forget, key), column(holdout, key))

    retain_nll = {key_of(record): record.get("nll") for record in retain_records or []}
    if not all(key_of(record) in retain_nll for record in forget + holdout):
        return scores
    # of log p over the retain model
    gains = [[retain_nll[key_of(r)] - r["nll"] for r in some] for some in (forget, holdout)]
    scores["mia_reference"] = auc(*gains)
    auc_retrain = audit_scores(retain_records, None)["mia_min_k"]
    if auc_retrain < 1:  # else the retain model leaves nothing to compare with
        scores["privleak"] = privleak(scores["mia_min_k"], auc_retrain)
    return scores


# ------------------------------------------------------------------------------------------------
# any benchmark


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a benchmark is scored, from models to records to scores, and what is shown first."""
    record: Callable  # (lm, tokenizer, bench, c, proc) -> [record per example]
    scores: Callable  # (records, retain_records or None, c) -> {name: float}
    headline: tuple  # the scores that are printed at every epoch
    axes: tuple  # x and y of the trajectory
    settings: dict  # those that were not given


TOFU = Protocol(
    record_qa, tofu_scores,
    headline=("forget_quality", "model_utility", "forget_prob", "forget_rouge"),
    axes=("model_utility", "forget_quality"),
    settings={"template": "chat", "max_length": 500, "max_new_tokens": 200})
MUSE = Protocol(
    record_muse, muse_scores,
    headline=("verbmem_f", "knowmem_f", "knowmem_r", "privleak"),
    axes=("knowmem_r", "knowmem_f"),
    settings={"template": "qa", "max_length": 2048, "max_new_tokens": 128})
MARKOV = Protocol(
    record_markov, markov_scores,
    headline=("retain_kl", "forget1_kl", "forget2_kl"),
    axes=("retain_kl", "forget1_kl"),
    settings={"template": "qa", "max_length": 20, "max_new_tokens": 200})
OWN = dataclasses.replace(
    TOFU,
    headline=("forget_prob", "forget_rouge", "retain_prob", "retain_rouge"),
    axes=("retain_prob", "forget_prob"),
    # its template: chat, where the tokenizer has one, else qa
    settings={"max_length": 500, "max_new_tokens": 200})
BENCHMARKS = {"demo": TOFU, "tofu": TOFU, "muse": MUSE, "markov": MARKOV, "own": OWN}


FORGET_SETS = ("forget", "verbmem_f", "knowmem_f")


def degenerate(records):
    """The share of the answers about the forget set that are empty or repeat; None of none."""
    answers = [record["generated"] for record in records
               if record["set"] in FORGET_SETS and record.get("generated") is not None]
    return np.mean([*map(is_degenerate, answers)]) if answers else None


def evaluate(lm, tokenizer, bench, c, proc, retain_records=None, target_records=None):
    """(scores, records) of a model as it is: the one function behind every number here."""
    with proc.clock.phase("scoring"):
        was_training = lm.training
        lm.eval()
        records = BENCHMARKS[c.benchmark].record(lm, tokenizer, bench, c, proc)
        if c.audits:
            records += record_audits(lm, tokenizer, bench, c, proc)
        lm.train(was_training)
        return summarize(records, retain_records, c, target_records), records


def summarize(records, retain_records, c, target_records=None):
    """{score: value} of records, against the retain model's and the target's where given."""
    for record in records + (retain_records or []):
        name = record["set"]
        if (name in data.MUSE_SETS) != (c.benchmark == "muse") and not name.startswith("audit_"):
            raise UsageError(f"a record of the set {name} is not of --benchmark={c.benchmark}; "
                             "give the log's own benchmark and subset.")
    try:
        scores = BENCHMARKS[c.benchmark].scores(records, retain_records, c)
    except KeyError as e:  # of a recorded log
        raise UsageError(f"not scored as --benchmark={c.benchmark}: the scored examples have no "
                         f"{e}; were they recorded so?") from None
    share = degenerate(records)
    if share is not None:
        scores["degenerate"] = share
    if target_records and {"memorization", "mia_reference", "model_utility"} <= scores.keys():
        others = [summarize(some, None, c) for some in (retain_records, target_records)]
        scores |= composite(scores, *others)
    wrong = [f"{key} {value}" for key, value in scores.items() if not np.isfinite(value)]
    if wrong:
        raise Failure(f"scores are not finite ({', '.join(wrong)}): the model has broken down; "
                      "lower --lr.")
    return scores


# ------------------------------------------------------------------------------------------------
# settings


@dataclasses.dataclass(frozen=True)
class Models(configs.Settings):
    """models"""
    model: str | None = None  # the target, from which is unlearned: hub id or directory
    retain_model: str | None = None  # never saw the forget set: the reference of forget quality
    base_model: str | None = None  # both are fine-tuned from it where their paths lie below out/
                                   # and do not exist
    tokenizer: str | None = None  # None = the model's own
    retain_log: str | None = None  # ... or its recorded log: a file, or
                                   # dataset:org/name[@revision]/path.json on the hub

    def problems(self):
        yield from self.check(
            "retain_log", lambda path: os.path.isfile(path) or path.startswith(recorded.ON_HUB),
            "no such file, and not dataset:org/name/path.json, a file of a data set on the hub.")


@dataclasses.dataclass(frozen=True)
class Scoring(configs.Settings):
    """scoring"""
    eval_rows: int | None = None  # only the first rows of each set (the TOFU paper: 300)
    audits: bool = False  # memorization and membership inference too; never inside training
    max_new_tokens: int | None = None  # None = TOFU 200, VerbMem 128 (KnowMem is always 32)
    stem: bool = False  # muse: stemmed ROUGE, as in open-unlearning (TOFU's is always stemmed)
    skip_last: bool = False  # muse: Min-40 % without a text's last token, as in open-unlearning

    def problems(self):
        yield from self.check("eval_rows max_new_tokens", lambda n: n >= 1, "must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Progress(configs.Settings):
    """scores during a run"""
    eval_every: float = 1.0  # epochs between scores; 0 = train only
    eval_at: tuple[int, ...] = ()  # score after these optimizer steps instead

    @property
    def scored(self) -> bool:
        return self.eval_every > 0 or bool(self.eval_at)

    def problems(self):
        yield from self.check("eval_every", lambda v: v >= 0, "must not be negative.")
        yield from self.check("eval_at", lambda at: min(at, default=1) >= 1, "steps count from 1.")


@dataclasses.dataclass(frozen=True)
class Run(configs.Settings):
    """run"""
    changes_result = False
    out: str | None = None  # run directory; None = out/<benchmark>_<subset>_<forget_loss>
    overwrite: bool = False  # replace the run in that directory


@dataclasses.dataclass(frozen=True)
class Config(
        data.Data, Models, models.Machine, models.Precision, Scoring, Progress, Run):
    @classmethod
    def defaults(cls, given):
        """The benchmark's protocol, for what was not given."""
        rows = "own" if given.get("forget_data") else cls.benchmark
        benchmark = given.get("benchmark") or rows
        values = {"benchmark": benchmark, "subset": data.SUBSETS[benchmark][0]}
        values |= BENCHMARKS[benchmark].settings
        return {name: values[name] for name in values if given.get(name) in (None, "")}

    def problems(self):
        if self.audits and self.parallel == "fsdp":
            yield "--audits=True: needs whole gradients, so --parallel=ddp."


@dataclasses.dataclass(frozen=True)
class Command(Config):
    """what is done with the models"""
    ask: str | None = None  # print every model's greedy answer to it, and score nothing
    select: str | None = None  # order the table by this score, best first, and choose a run

    def problems(self):
        yield from self.check("select", tables.ARROWS.__contains__,
                              f"any of {', '.join(tables.ARROWS)}.")


# all but what belongs to one run or one machine
INHERITED = configs.fields(Config).keys() - {
    "model", "device", *configs.fields(Run), *configs.fields(Progress)}


# ------------------------------------------------------------------------------------------------
# models, and the records of those that runs are compared with


def setup(c):
    """This process among its peers, as the settings ask for it."""
    threads = 1 if c.benchmark in ("demo", "markov") else None
    return models.setup(c.device, c.dtype, c.parallel, threads, c.deterministic)


def load_tokenizer(name: str, c):
    """The tokenizer of a model, or --tokenizer; one that the template can use."""
    tokenizer = models.load_tokenizer(c.tokenizer or name)
    data.check_tokenizer(tokenizer, c.tokenizer or name, c.template)
    return tokenizer


def load(name: str, c, proc, tokenizer=None) -> tuple:
    """(lm, tokenizer), checked against each other."""
    tokenizer = tokenizer or load_tokenizer(name, c)
    lm = models.load_model(name, proc)
    n_embeddings = lm.get_input_embeddings().num_embeddings
    if len(tokenizer) > n_embeddings:
        raise UsageError(f"{name}: the tokenizer has {len(tokenizer)} entries but the model embeds "
                         f"only {n_embeddings}; give the model's own with --tokenizer=.")
    return lm, tokenizer


def reference_path(c, name, bench):
    """Where a reference's records are kept; the name is a hash of all that they depend on.

    That is the weights, the scored rows, the scoring settings.
    """
    settings = ["template", "system_prompt", "date_string", "max_length", "chat_template_kwargs",
                *configs.fields(Scoring), *configs.fields(models.Precision)]
    is_local = os.path.isdir(c.tokenizer or "")
    tokenizer = models.fingerprint(c.tokenizer) if is_local else c.tokenizer
    key = [models.fingerprint(name), tokenizer, bench.evals, bench.holdout]
    key += [getattr(c, setting) for setting in settings]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return os.path.join(os.path.dirname(os.path.normpath(c.out)), ".scored", f"{digest}.jsonl")


def reference(c, proc, name, bench, loaded=None):
    """Records of a target or retain model: computed once, then read from <out's parent>/.scored.

    loaded: (lm, tokenizer) of the model, where they are in memory.
    """
    # hashing 27 GB takes a minute: rank 0 does it
    path = proc.gather(reference_path(c, name, bench) if proc.rank == 0 else None)[0]
    if all(proc.gather(os.path.isfile(path))):
        return recorded.read_log(path)
    _, records = evaluate(*(loaded or load(name, c, proc)), bench, c, proc)
    if proc.rank == 0:
        rundir.write_records(path, records)
    proc.barrier()
    return records


def retain_reference(c, proc, bench):
    """Records of the retain model, or None where none is named."""
    if c.retain_log:
        return recorded.read_log(c.retain_log)
    if c.retain_model:
        return reference(c, proc, c.retain_model, bench)
    if BENCHMARKS[c.benchmark] is TOFU and not c.forget_data:
        data.note("No retain model, so no forget quality: it needs --retain_model=MODEL, one that "
                  "never saw the forget set, or --retain_log=LOG, the examples.jsonl of one.")
    return None


# ------------------------------------------------------------------------------------------------
# the script


def ask(names, c, proc):
    """Print the models' greedy answers side by side."""
    for name in names:
        lm, tokenizer = load(name, c, proc)
        template = make_template(tokenizer, c)
        [text] = models.generate(lm, tokenizer, [template.prompt_ids(c.ask)], c.max_new_tokens,
                                 proc, 4096, end_id=template.ends[1])
        proc.say(f"{name}: {text.strip()}")


def compare(runs, logs, proc, path):
    """Score runs {label: (name, settings)}, each against its own retain model.

    Print their table, ordered by --select; it goes to <path>.md and .csv too, with its
    picture <path>.png.
    """
    _, c = next(iter(runs.values()))
    reads_target, bench = c.model and (c.audits or c.select), None
    if len(logs) < len(runs) or (c.retain_model and not c.retain_log) or reads_target:
        bench = data.load(c.benchmark, c.subset, c.data, c.forget_data, c.retain_data, train=False,
                          holdout=c.audits)
    table, samples, retain_models, most = {}, {}, {}, {}
    for label, (name, c) in runs.items():
        retain = retain_reference(c, proc, bench)
        target = reference(c, proc, c.model, bench) if reads_target and c.model else None
        if name in logs:
            records = logs[name]
        elif retain and not c.retain_log and rundir.same(name, c.retain_model):
            records = retain
        else:
            _, records = evaluate(*load(name, c, proc), bench, c, proc)
        table[label], samples[label] = summarize(records, retain, c, target), records
        most[label] = (degenerate(target or []) or 0) + 0.05
        if proc.rank == 0:
            rundir.save_scores(c.out, table[label], records)
        if retain:
            other = os.path.basename(c.retain_log or c.retain_model)
            retain_models[f"retain model {other}"] = summarize(retain, None, c)
    if proc.rank == 0:
        aims, sentence = tables.arrows(*retain_models.values()), ""
        if c.select:
            table, sentence = tables.select(table, c.select, aims[c.select], "degenerate", most)
        shown = tables.show_tables({"scores": table}, aims, path)
        proc.say(f"{tables.samples(samples)}\n\n{shown}\n\n{sentence}".rstrip())
        if path:
            tables.picture(f"{path}.png", {}, table | retain_models,
                           *BENCHMARKS[c.benchmark].axes)
            proc.say(f"\n{path}.png, {path}.md, {path}.csv")


def main(argv):
    given, names = configs.parse(Command, argv, __doc__)
    if not names:
        raise UsageError("name at least one run directory, model or log: python evaluate.py "
                         "out/demo (--help has the details).")
    logs = {name: recorded.read_log(name) for name in names if name.endswith((".json", ".jsonl"))}
    c = configs.make(Command, rundir.inherit(INHERITED, names, given))
    runs = rundir.own_settings(names, c, given)
    rundir.check_models(runs, c.audits or c.select)
    proc = setup(c)
    if c.ask:
        ask(names, c, proc)
    else:
        for _, own in runs.values():
            rundir.writable(own.out)
        path = os.path.join(given.get("out", "out"), "comparison") if len(names) > 1 else None
        compare(runs, logs, proc, path)
    models.cleanup()


if __name__ == "__main__":
    configs.run(main)
