"""Score models: forget quality, utility, and what a model still tells.

    python evaluate.py out/demo                                     # a run directory: its settings
    python evaluate.py out/demo out/demo_target --ask="Who wrote Hamlet?"
    python evaluate.py org/model --benchmark=tofu --subset=forget05 --retain_model=org/retain
    python evaluate.py org/model --benchmark=muse --subset=books    # its retain AUC is built in
    python evaluate.py LOG.json --retain_log=LOG.json   # recorded: ours, TOFU's, open-unlearning's

A run directory, any Hugging Face model directory, a hub id (org/name@revision) or a log. Several
give one table, on screen and in comparison.md, .csv and .png (in out/ or --out), each run against
the retain model it was made with. Scores go to scores.json, the records they were computed from to
examples.jsonl: in the run directory, or in --out.
"""
import dataclasses
import functools
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable
from typing import Literal

import numpy as np
import scipy.stats
import torch
from rouge_score import rouge_scorer

import configs
import data
import losses
import model as models
from configs import Failure, UsageError, rundir

# ------------------------------------------------------------------------------------------------
# settings


@dataclasses.dataclass(frozen=True)
class Data(configs.Settings):
    """data"""
    benchmark: Literal["demo", "tofu", "muse", "markov"] = "demo"  # what is unlearned and scored
    subset: str | None = None  # tofu: forget10, 05, 01; muse: news, books; None = the first
    data: str | None = None  # hub id or local directory; None = the benchmark's own
    split: str | None = None  # muse: the text to unlearn, config/split; None = raw/forget
    forget_data: str | None = None  # unlearn YOUR rows: a file with question and answer, or text
    retain_data: str | None = None  # ... and the rows to keep
    template: Literal["chat", "llama2", "qa"] | None = None  # None = chat, the tokenizer's own
    system_prompt: str = "You are a helpful assistant."  # for chat; empty where it takes none
    date_string: str = "10 Apr 2025"  # for chat: Llama-3 prints today's date otherwise
    max_length: int | None = None  # tokens of prompt and answer, None = 500; muse: of a chunk, 2048

    def problems(self):
        subsets = data.SUBSETS[self.benchmark]
        if self.subset not in (None, *subsets):
            yield f"--subset={self.subset}: {self.benchmark} has {', '.join(subsets)}."
        if self.retain_data and not self.forget_data and self.benchmark == "demo":
            yield "--retain_data goes with --forget_data."
        if self.split and (self.benchmark != "muse" or self.split.count("/") != 1):
            yield (f"--split={self.split}: is config/split of MUSE's data, as in --benchmark=muse "
                   "--split=scal/forget_2.")
        if self.benchmark == "markov" and (self.forget_data or self.retain_data):
            yield ("--forget_data and --retain_data do not go with markov: its scores need the "
                   "true chains.")
        yield from self.check("max_length", lambda n: n >= 2, "must be at least 2.")
        yield from self.check("forget_data retain_data", os.path.isfile, "no such file.")


@dataclasses.dataclass(frozen=True)
class Models(configs.Settings):
    """models"""
    model: str | None = None  # the target, from which is unlearned: hub id or directory
    retain_model: str | None = None  # never saw the forget set: the reference of forget quality
    retain_log: str | None = None  # ... or a recorded log of one
    base_model: str | None = None  # both are fine-tuned from it where they are missing below out/
    tokenizer: str | None = None  # None = the model's own

    def problems(self):
        yield from self.check("retain_log", os.path.isfile, "no such file.")


@dataclasses.dataclass(frozen=True)
class Machine(configs.Settings):
    """machine"""
    changes_result = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    micro_batch_tokens: int = 1024  # tokens a process computes at once: memory, never the result
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: fsdp shards the model over the GPUs

    def problems(self):
        yield from self.check("micro_batch_tokens", lambda n: n >= 1, "must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Precision(configs.Settings):
    """precision"""
    dtype: Literal["fp32", "bf16", "bf16_weights"] = "fp32"  # bf16 = autocast over float32 weights
    deterministic: bool = False  # CUDA: slower kernels, the same bits each time, as on a CPU


@dataclasses.dataclass(frozen=True)
class Scoring(configs.Settings):
    """scoring"""
    eval_rows: int | None = None  # score the first rows of each set only (TOFU's paper: 300)
    max_new_tokens: int | None = None  # None = TOFU 200, VerbMem 128 (KnowMem is always 32)
    audits: bool = False  # memorization and membership inference too; never inside training
    stem: bool = False  # muse: stemmed ROUGE, as open-unlearning has it (TOFU's always is)
    skip_last: bool = False  # muse: Min-40 % without the last token, as open-unlearning has it

    def problems(self):
        yield from self.check("eval_rows max_new_tokens", lambda n: n >= 1, "must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Progress(configs.Settings):
    """scores during a run"""
    eval_every: float = 1.0  # epochs between scores; 0 = train only
    eval_at: tuple[int, ...] = ()  # score at these optimizer steps instead

    def problems(self):
        yield from self.check("eval_every", lambda v: v >= 0, "must not be negative.")
        if min(self.eval_at, default=1) < 1:
            yield f"--eval_at={','.join(map(str, self.eval_at))}: steps count from 1."


@dataclasses.dataclass(frozen=True)
class Run(configs.Settings):
    """run"""
    changes_result = False
    out: str | None = None  # the run directory; None = out/<benchmark>_<subset>_<forget_loss>
    overwrite: bool = False  # replace the run that is there


@dataclasses.dataclass(frozen=True)
class Config(Data, Models, Machine, Precision, Scoring, Progress, Run):
    @classmethod
    def defaults(cls, given):
        """What was not given is the benchmark's protocol."""
        benchmark = given.get("benchmark", cls.benchmark)
        found = {}
        if given.get("subset") is None:
            found["subset"] = data.SUBSETS[benchmark][0]
        for name in ("template", "max_length", "max_new_tokens"):
            if given.get(name) is None:
                found[name] = getattr(BENCHMARKS[benchmark], name)
        return found

    def problems(self):
        if self.audits and self.parallel == "fsdp":
            yield "--audits=True: needs whole gradients, so --parallel=ddp."


# ------------------------------------------------------------------------------------------------
# metrics: pure functions of lists, NumPy arrays or CPU tensors; empty input is a ValueError


def array(values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("a metric of no values")
    return values


def truth_ratio(correct_nll, perturbed_nll) -> np.ndarray:
    """R = p(wrong) / p(correct), p = exp(-nll): (N,), (N, K) -> (N,). TOFU, arXiv 2401.06121.

    nll: mean per token. correct: of the paraphrased answer (the plain one for real_authors and
    world_facts). wrong: the GEOMETRIC mean over K perturbed answers. R in (0, inf): 0 = knows the
    right answer, 1 = cannot tell. The paper's text has the arithmetic mean; the authors' code and
    the public leaderboard have this.
    """
    difference = array(correct_nll) - array(perturbed_nll).mean(-1)
    return np.exp(np.clip(difference, -700, 700))  # beyond, a float is 0 or infinite


def forget_quality(truth_ratio, retain_truth_ratio) -> float:
    """p-value of the two-sided two-sample KS test between two models' truth ratios; 1 is best.

    Small: the unlearned model can be told from one that never saw the forget set. arXiv 2401.06121.
    """
    return float(scipy.stats.ks_2samp(array(truth_ratio), array(retain_truth_ratio)).pvalue)


def model_utility(parts: dict) -> float:
    """Harmonic mean of TOFU's nine scores on retain, real_authors and world_facts, in [0, 1].

    0 if any is 0; higher is better. arXiv 2401.06121.
    """
    return float(scipy.stats.hmean(array(list(parts.values()))))


@functools.cache
def rouge_scorer_of(stem: bool):
    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=stem)


def rouge(prediction: str, reference: str, stem: bool) -> dict:
    """ROUGE-1 recall, ROUGE-L recall and F1, in [0, 1]. TOFU: L recall, stemmed; MUSE: L F1."""
    found = rouge_scorer_of(stem).score(reference, prediction)
    return {
        "rouge1_recall": found["rouge1"].recall,
        "rougeL_recall": found["rougeL"].recall,
        "rougeL_f1": found["rougeL"].fmeasure,
    }


def min_k(token_logps, k: float = 0.4, plus_plus_stats=None) -> float:
    """Min-K% (arXiv 2310.16789): mean of the lowest max(1, int(k T)) log-probs, (T,) -> float.

    Higher = more like a member. plus_plus_stats = (mean (T,), variance (T,)) of log p under the
    model's own distribution gives Min-K%++ (arXiv 2404.02936): log-probs are standardised first,
    with a variance of at least 1e-6.
    """
    logps = array(token_logps)
    if plus_plus_stats is not None:
        mean, variance = map(array, plus_plus_stats)
        logps = (logps - mean) / np.sqrt(np.maximum(variance, 1e-6))
    n_lowest = max(1, int(k * len(logps)))
    return float(np.sort(logps)[:n_lowest].mean())


def auc(forget_scores, holdout_scores) -> float:
    """P(forget > holdout) + half the ties, in [0, 1]; 0.5 = no membership signal.

    Scores: higher = more like a member.
    """
    forget, holdout = array(forget_scores), array(holdout_scores)
    ranks = scipy.stats.rankdata(np.concatenate([forget, holdout]))[:len(forget)]
    wins = ranks.sum() - len(forget) * (len(forget) + 1) / 2
    return float(wins / (len(forget) * len(holdout)))


def privleak(auc: float, auc_retrain: float) -> float:
    """MUSE's privacy leakage in percent (arXiv 2407.06460), both AUCs as auc() gives them.

    0 is ideal, -100 fully memorised, above 0 over-unlearned. MUSE's published constants are the
    complement: 1 - 0.4772 (News), 1 - 0.5393 (Books).
    """
    return 100 * ((1 - auc) - (1 - auc_retrain)) / (1 - auc_retrain)


def exact_memorization(correct) -> float:
    """Share of answer tokens that are the model's first choice, in [0, 1]. correct: (T,) bool."""
    return float(array(correct).mean())


def extraction_strength(correct) -> float:
    """1 - s/T, s = start of the all-correct suffix; 0 if the last token is wrong. (T,) bool."""
    wrong = np.flatnonzero(array(correct) == 0)
    start = wrong[-1] + 1 if len(wrong) else 0
    return float(1 - start / len(correct))


# ------------------------------------------------------------------------------------------------
# TOFU: a record per row, and the scores that follow from the records

OPTIONS = ("real_authors", "world_facts")  # their probability is taken among the given answers
TOFU_HEADLINE = ("forget_quality", "model_utility", "forget_prob", "forget_rouge")
NINE = [f"{name}_{score}" for name in ("retain", *OPTIONS)
        for score in ("prob", "rouge", "truth_ratio")]
MIA = ("loss", "zlib", "min_k", "min_k_pp", "reference", "gradnorm")
ARROWS = {  # where better is
    "forget_quality": "↑", "model_utility": "↑", "forget_prob": "↓", "forget_rouge": "↓",
    "forget_truth_ratio": "↑", **dict.fromkeys(NINE, "↑"),
    "verbmem_f": "↓", "knowmem_f": "↓", "knowmem_r": "↑", "privleak": "→0",
    "retain_kl": "↓", "forget1_kl": "↑", "forget2_kl": "↑",
    "exact_memorization": "↓", "extraction_strength": "↓",
    **{f"mia_{name}": "→0.5" for name in MIA},
}


def record_qa(lm, tokenizer, bench, c, proc) -> list[dict]:
    """A record per row of every set: NLL of its answers, the greedy answer and its ROUGE."""
    template = data.Template(c.template, tokenizer, c.system_prompt, c.date_string)
    records, groups, n_skipped = [], [], 0
    for name, rows in bench.evals.items():
        for i, row in enumerate(rows[:c.eval_rows]):
            answers = [None]  # the row's own
            if "paraphrased_answer" in row:
                answers.append(row["paraphrased_answer"])
            answers += row.get("perturbed_answer", [])
            group = [template.encode(row, c.max_length, answer) for answer in answers]
            if None in group:
                n_skipped += 1
                continue
            answer = row.get("answer", row.get("text"))
            records.append({"set": name, "index": i, "question": row.get("question", ""),
                            "answer": answer})
            groups.append(group)
    if n_skipped:
        proc.say(f"{n_skipped} rows are not scored: an answer without tokens, or a prompt longer "
                 f"than --max_length={c.max_length}")
    if not records:
        raise UsageError("no row can be scored: every answer is empty or every prompt longer than "
                         "--max_length.")
    greedy = score_answers(lm, tokenizer, records, groups, c, proc)
    generate_answers(lm, tokenizer, template, records, groups, greedy, c, proc)
    return records


def score_answers(lm, tokenizer, records, groups, c, proc) -> list[list[int]]:
    """Add the NLLs of all answers to the records.

    Returns the ids of each row's own answer as far as the greedy answer agrees with it.
    """
    per_group = models.token_scores(
        lm, groups, proc, c.micro_batch_tokens, measure_choices, title="scoring")
    greedy = []
    for record, group, values in zip(records, groups, per_group):
        nlls = [-float(logps.mean()) for logps, _ in (array.T for array in values)]
        has_paraphrase = "paraphrased_answer" in group[0].row
        record["nll"] = nlls[0]
        if has_paraphrase:
            record["paraphrased_nll"] = nlls[1]
        if nlls[1 + has_paraphrase:]:
            record["perturbed_nll"] = nlls[1 + has_paraphrase:]
        own = group[0]
        record["n_tokens"] = own.n_answer
        n_right = int(values[0][:, 1].cumprod().sum())
        greedy.append(own.ids[:own.start + n_right])
        if own.ids[-1] != tokenizer.eos_token_id:  # cut: TOFU's ROUGE then asks for the rest only
            answer = tokenizer.decode(own.ids[own.start:], skip_special_tokens=True)
            record["answer"] = answer.strip()
    return greedy


def generate_answers(lm, tokenizer, template, records, groups, greedy, c, proc):
    """Add the greedy answers and their ROUGE to the records of questions."""
    asked, prompts, known = [], [], []
    for record, group, ids in zip(records, groups, greedy):
        if "question" not in group[0].row:
            continue
        prompt = template.prompt_ids(group[0].row["question"])
        asked.append(record)
        prompts.append(prompt)
        known.append(ids[len(prompt):] if ids[:len(prompt)] == prompt else [])
    texts = models.generate(lm, tokenizer, prompts, c.max_new_tokens, proc,
                            4 * c.micro_batch_tokens, "answering", known)
    for record, text in zip(asked, texts):
        record["generated"] = text.strip()
        record |= rouge(text.strip(), record["answer"], stem=True)


def measure_choices(logits, labels):
    """(n, 2) per answer token: log p, and whether it is the first choice."""
    return torch.stack([losses.token_logps(logits, labels), logits.argmax(-1) == labels], -1)


def tofu_scores(records, retain_records=None, c=None) -> dict:
    """Scores of records; forget_quality against the records of a retain model, if not itself."""
    sets, scores = by_set(records), {}
    for name, rows in sets.items():
        if name.startswith("audit_"):
            continue
        scores[f"{name}_prob"] = float(np.mean([answer_prob(row, name) for row in rows]))
        if all("rougeL_recall" in row for row in rows):
            scores[f"{name}_rouge"] = float(np.mean([row["rougeL_recall"] for row in rows]))
        if all("perturbed_nll" in row for row in rows):
            ratio = truth_ratios(rows)
            closeness = np.maximum(0, 1 - ratio)
            if name == "forget":
                closeness = np.minimum(ratio, 1 / ratio)
            scores[f"{name}_truth_ratio"] = float(closeness.mean())
    if set(NINE) <= scores.keys():
        utility = model_utility({name: scores[name] for name in NINE})
        scores = {"model_utility": utility} | scores
    retained = by_set(retain_records or []).get("forget")
    if retained and "forget_truth_ratio" in scores:
        itself = [row["nll"] for row in retained] == [row["nll"] for row in sets["forget"]]
        if not itself:
            scores = {"forget_quality": compare(sets["forget"], retained)} | scores
    return scores | audit_scores(records, retain_records)


def answer_prob(record: dict, name: str) -> float:
    """p(answer)^(1/|answer|); among the given options where the set has them."""
    logp = -record["nll"]
    if name in OPTIONS:  # in logs: a collapsed model gives every option 0
        options = [logp, *(-nll for nll in record["perturbed_nll"])]
        logp = logp - np.logaddexp.reduce(options)
    return float(np.exp(logp))


def by_set(records: list) -> dict:
    sets = {}
    for record in records:
        sets.setdefault(record["set"], []).append(record)
    return sets


def truth_ratios(rows: list) -> np.ndarray:
    """(N,) R of each record; rows may have different numbers of perturbed answers."""
    ratios = []
    for row in rows:
        correct = row.get("paraphrased_nll", row["nll"])
        ratios.append(truth_ratio([correct], [row["perturbed_nll"]])[0])
    return np.array(ratios)


def compare(rows: list, retain_rows: list) -> float:
    """Forget quality; both models must have been asked the same questions."""
    if len(rows) != len(retain_rows):
        raise UsageError(
            f"the retain reference has {len(retain_rows)} forget examples and the model "
            f"{len(rows)}: score both on the same questions (the TOFU authors' logs hold the first "
            "300: --eval_rows=300).")
    for row, other in zip(rows, retain_rows):
        asked = row.get("question") or other.get("question")
        key = "question" if asked else "answer"  # TOFU's logs have the true answers only
        if row.get(key) and other.get(key) and row[key] != other[key]:
            raise UsageError(f"the retain reference was scored on other questions: its {key} "
                             f"{other[key]!r}, the model's {row[key]!r}.")
    return forget_quality(truth_ratios(rows), truth_ratios(retain_rows))


# ------------------------------------------------------------------------------------------------
# audits: memorization and membership inference


def record_audits(lm, tokenizer, bench, c, proc) -> list[dict]:
    """A record per answer of the forget and the holdout set; scores are higher for a member.

    MUSE: the two sets are PrivLeak's texts, and memorization is measured on VerbMem's.
    """
    template = data.Template(c.template, tokenizer, c.system_prompt, c.date_string)
    sets = {
        "forget": bench.evals.get("forget") or bench.evals.get("privleak_f", []),
        "holdout": bench.holdout or bench.evals.get("privleak_h", []),
        "verbatim": bench.evals.get("verbmem_f", []),
    }
    if not sets["holdout"]:
        proc.say("No holdout set: the mia_ scores are left out.")
    records, examples = [], []
    for name, rows in sets.items():
        for i, row in enumerate(rows[:c.eval_rows]):
            if name == "verbatim":
                example = data.encode(tokenizer, row["prompt"], row["answer"])
            else:
                example = template.encode(row, c.max_length)
            if example:
                text = row.get("answer", row.get("text"))
                records.append({"set": f"audit_{name}", "index": i, "text": text})
                examples.append(example)
    groups = [[example] for example in examples]
    values = models.token_scores(
        lm, groups, proc, c.micro_batch_tokens, measure_audit, title="audits")
    norms = gradient_norms(lm, examples, proc)
    for record, (found,), norm in zip(records, values, norms):
        logps, correct, mean, variance = found.T
        nll = -float(logps.mean())
        compressed = zlib.compress(record.pop("text").encode())
        record |= {
            "nll": nll,
            "exact_memorization": exact_memorization(correct),
            "extraction_strength": extraction_strength(correct),
            "loss": -nll,
            "zlib": -nll / len(compressed),
            "min_k": min_k(logps),
            "min_k_pp": min_k(logps, plus_plus_stats=(mean, variance)),
            "gradnorm": -norm,
        }
    return records


def measure_audit(logits, labels):
    """(n, 4) per answer token: log p, is it the first choice, mean and variance of log p."""
    logps = logits.float().log_softmax(-1)
    p = logps.exp()
    mean = (p * logps).sum(-1)
    variance = (p * logps.square()).sum(-1) - mean.square()
    own = logps.gather(-1, labels[:, None])[:, 0]
    return torch.stack([own, (logits.argmax(-1) == labels).float(), mean, variance], -1)


def gradient_norms(lm, examples, proc) -> list[float]:
    """Of each example: mean over parameter tensors of the L2 norm of its mean NLL's gradient."""
    trained = [p for p in lm.parameters() if p.requires_grad]
    mine = {}
    for i in proc.progress(range(proc.rank, len(examples), proc.world), "gradients"):
        with proc.autocast():
            loss = -models.score(lm, [[examples[i]]], proc.device).token_logps.mean()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        norms = [gradient.norm() for gradient in gradients if gradient is not None]
        mine[i] = float(torch.stack(norms).mean())
    found = {}
    for some in proc.gather(mine):
        found.update(some)
    return [found[i] for i in range(len(examples))]


def audit_scores(records, retain_records) -> dict:
    """Memorization, AUCs of membership inference, PrivLeak against the retain model's AUC."""
    sets = by_set(records)
    forget, holdout = sets.get("audit_forget", []), sets.get("audit_holdout", [])
    memorized = sets.get("audit_verbatim", forget)
    scores = {}
    if not forget:
        return scores
    for key in ("exact_memorization", "extraction_strength"):
        scores[key] = float(np.mean([record[key] for record in memorized]))
    if not holdout:
        return scores
    for key in MIA:
        if key != "reference":
            scores[f"mia_{key}"] = auc([r[key] for r in forget], [r[key] for r in holdout])
    audited = [r for r in retain_records or [] if r["set"].startswith("audit_")]
    reference = {(r["set"], r["index"]): r["nll"] for r in audited}
    if not all((r["set"], r["index"]) in reference for r in forget + holdout):
        return scores
    calibrated = []
    for rows in (forget, holdout):
        calibrated.append([reference[r["set"], r["index"]] - r["nll"] for r in rows])
    scores["mia_reference"] = auc(*calibrated)
    retrained = audit_scores(audited, None)["mia_min_k"]
    if retrained < 1:  # a retain model that tells both apart without error: nothing to compare
        scores["privleak"] = privleak(scores["mia_min_k"], retrained)
    return scores


# ------------------------------------------------------------------------------------------------
# MUSE: passages continued, questions answered, and membership inference on texts

MUSE_HEADLINE = ("verbmem_f", "knowmem_f", "knowmem_r", "privleak")
KNOWMEM_TOKENS, KNOWMEM_STOP = 32, re.compile("\n\n|\nQuestion|Question:")
MUSE_AUC = {"news": 1 - 0.4772, "books": 1 - 0.5393}  # published: the authors' retrained models


def record_muse(lm, tokenizer, bench, c, proc) -> list[dict]:
    """A record per prompt (greedy continuation, ROUGE) and per text (Min-40 %). No text is cut."""
    sets = {}
    for name, rows in bench.evals.items():
        sets[name] = [row | {"set": name, "index": i} for i, row in enumerate(rows[:c.eval_rows])]
    record_texts(lm, tokenizer, sets["privleak_f"] + sets["privleak_h"], c, proc)
    limits = {"verbmem_f": c.max_new_tokens, "knowmem_f": KNOWMEM_TOKENS,
              "knowmem_r": KNOWMEM_TOKENS}
    for name, limit in limits.items():
        prompts = [tokenizer(record["prompt"])["input_ids"] for record in sets[name]]
        texts = models.generate(lm, tokenizer, prompts, limit, proc, 4 * c.micro_batch_tokens,
                                title="answering")
        for record, text in zip(sets[name], texts):
            if name == "verbmem_f":  # with its BOS, so that one token less of it is asked for
                ids = tokenizer(record["answer"])["input_ids"][:limit]
                record["answer"] = tokenizer.decode(ids, skip_special_tokens=True)
            else:
                text = KNOWMEM_STOP.split(text)[0]
                del record["prompt"]  # the ten answered questions, the same in every record
            record["generated"] = text
            record |= rouge(text, record["answer"], c.stem)
    return [record for rows in sets.values() for record in rows]


def record_texts(lm, tokenizer, records, c, proc):
    """Add NLL and Min-40 % of PrivLeak's texts to their records."""
    groups = []
    for record in records:
        ids = tokenizer(record.pop("text"))["input_ids"]
        record["n_tokens"] = len(ids) - 1 - c.skip_last
        if int(0.4 * record["n_tokens"]) < 1:  # the original's mean of nothing
            raise UsageError(
                f"{record['set']}, row {record['index'] + 1}: the text has {record['n_tokens']} "
                "tokens to score, too few for Min-40 %, which needs 3.")
        groups.append([data.Example(ids, 1)])
    values = models.token_scores(lm, groups, proc, c.micro_batch_tokens, title="scoring")
    for record, (logps,) in zip(records, values):
        record["nll"] = -float(logps.mean())
        record["min_k"] = min_k(logps[:record["n_tokens"], 0])


def muse_scores(records, retain_records=None, c=None) -> dict:
    """Four scores in percent; PrivLeak against the retain model's AUC, or the published one."""
    sets = by_set(records)
    for name in data.MUSE_SETS:
        if name not in sets:
            raise UsageError(f"the records have no {name}: MUSE is scored on "
                             f"{', '.join(data.MUSE_SETS)}.")
    scores = {}
    for name in ("verbmem_f", "knowmem_f", "knowmem_r"):
        scores[name] = 100 * float(np.mean([record["rougeL_f1"] for record in sets[name]]))
    retrained = MUSE_AUC[c.subset]
    if retain_records:
        retrained = membership_auc(by_set(retain_records))
    if retrained < 1:  # a retain model that knows every forget text: nothing to compare with
        scores["privleak"] = privleak(membership_auc(sets), retrained)
    return audit_scores(records, retain_records) | scores


def membership_auc(sets: dict) -> float:
    forget, holdout = sets["privleak_f"], sets["privleak_h"]
    return auc([r["min_k"] for r in forget], [r["min_k"] for r in holdout])


# ------------------------------------------------------------------------------------------------
# Markov chains: how far predictions are from the true transition probabilities

MARKOV_HEADLINE = ("retain_kl", "forget1_kl", "forget2_kl")


def transition_kl(states, logps, transitions) -> np.ndarray:
    """KL(P(. | x_t) || model), 0 = predicts the chain: (T,), (T, S), (S, S) -> (T,)."""
    true = np.asarray(transitions)[states]  # (T, S)
    return (true * (np.log(true) - logps)).sum(-1)


def record_markov(lm, tokenizer, bench, c, proc) -> list[dict]:
    """A record per test sequence: means over all states but the first."""
    records, groups = [], []
    for name, rows in bench.evals.items():
        texts = [row["text"] for row in rows[:c.eval_rows]]
        for i, ids in enumerate(tokenizer(texts)["input_ids"]):
            records.append({"set": name, "index": i, "n_tokens": len(ids) - 1})
            groups.append([data.Example(ids, 1)])
    values = models.token_scores(
        lm, groups, proc, c.micro_batch_tokens, measure_all_logps, title="scoring")
    for record, (example,), (logps,) in zip(records, groups, values):
        own = logps[range(len(logps)), example.ids[1:]]
        kl = transition_kl(example.ids[:-1], logps, data.CHAINS[record["set"]])
        record |= {"nll": -float(own.mean()), "kl": float(kl.mean())}
    return records


def measure_all_logps(logits, labels):
    return logits.float().log_softmax(-1)  # (n, V)


def markov_scores(records, retain_records=None, c=None) -> dict:
    """<set>_kl: the mean over all predicted states of a set."""
    scores = {}
    for name, rows in by_set(records).items():
        if name in data.CHAINS:
            total = sum(row["kl"] * row["n_tokens"] for row in rows)
            scores[f"{name}_kl"] = total / sum(row["n_tokens"] for row in rows)
    return scores


# ------------------------------------------------------------------------------------------------
# any benchmark


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a benchmark is scored: model -> records -> scores."""
    record: Callable  # (lm, tokenizer, bench, c, proc) -> [record]
    scores: Callable  # (records, retain_records or None, c) -> {name: float}
    headline: tuple  # the scores that are printed at every epoch
    axes: tuple  # x and y of the trajectory
    max_length: int = 500  # settings that were not given
    max_new_tokens: int = 200
    template: str = "chat"
    needs_retain: bool = True  # does its headline need a retain model?


BENCHMARKS = {
    "demo": Protocol(record_qa, tofu_scores, TOFU_HEADLINE, ("model_utility", "forget_quality")),
    "tofu": Protocol(record_qa, tofu_scores, TOFU_HEADLINE, ("model_utility", "forget_quality")),
    "muse": Protocol(record_muse, muse_scores, MUSE_HEADLINE, ("knowmem_r", "knowmem_f"),
                     2048, 128, "qa", needs_retain=False),
    "markov": Protocol(record_markov, markov_scores, MARKOV_HEADLINE, MARKOV_HEADLINE[:2],
                       template="qa", needs_retain=False),
}


def evaluate(lm, tokenizer, bench, c, proc, retain_records=None) -> tuple[dict, list]:
    """(scores, records) of a model as it is now; the function behind every number here."""
    was_training = lm.training
    lm.eval()
    with proc.clock.phase("scoring"):
        records = BENCHMARKS[c.benchmark].record(lm, tokenizer, bench, c, proc)
        if c.audits:
            records += record_audits(lm, tokenizer, bench, c, proc)
    lm.train(was_training)
    return summarize(records, retain_records, c), records


def summarize(records, retain_records, c) -> dict:
    """The scores that follow from records, against the retain model's where they are given."""
    for record in records + (retain_records or []):
        is_muse, is_audit = record["set"] in data.MUSE_SETS, record["set"].startswith("audit_")
        if is_muse != (c.benchmark == "muse") and not is_audit:
            raise UsageError(f"a record of the set {record['set']} is not of "
                             f"--benchmark={c.benchmark}; give the log's own benchmark and subset.")
    try:
        scores = BENCHMARKS[c.benchmark].scores(records, retain_records, c)
    except KeyError as e:  # in a recorded log
        raise UsageError(f"not scored as --benchmark={c.benchmark}: a scored example has no {e}; "
                         "was it recorded so?") from None
    wrong = [f"{name} {value}" for name, value in scores.items() if not np.isfinite(value)]
    if wrong:
        raise Failure(f"scores are not finite ({', '.join(wrong)}): the model has broken down; "
                      "lower --lr.")
    return scores


# ------------------------------------------------------------------------------------------------
# records on disk: ours, TOFU's and open-unlearning's logs

TOFU_LOG = {
    "eval_log_forget.json": "forget",
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
}
OPEN_UNLEARNING_LOG = {"forget": "forget", "retain": "retain", "ra": "real_authors",
                       "wf": "world_facts"}
TEXTS = ("set", "question", "answer", "generated")
LEAST = {  # the numbers of a record, and the least that each can be
    "nll": -1e-3, "paraphrased_nll": -1e-3, "perturbed_nll": -1e-3, "n_tokens": 1,
    "rougeL_recall": 0, "rougeL_f1": 0, "index": -1e12, "min_k": -1e12, "kl": -1e12,
    "loss": -1e12, "zlib": -1e12, "min_k_pp": -1e12, "gradnorm": -1e12,
    "exact_memorization": -1e12, "extraction_strength": -1e12,
}


def read_log(path: str) -> list[dict]:
    """Records of a recorded evaluation; its format is detected by content."""
    text = data.read_text(path)
    try:
        records = parse_log(text)
        if not records:
            raise ValueError("it holds no scored examples")
        for i, record in enumerate(records, 1):
            check_record(record, i)
        return records
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
        raise UsageError(
            f"{path}: not a log this can read ({type(e).__name__}: {e}); it takes examples.jsonl, "
            "TOFU's eval_log_aggregated.json and open-unlearning's TOFU_EVAL.json.") from None


def parse_log(text: str) -> list[dict]:
    try:
        log = json.loads(text)
    except ValueError:  # more than one document: JSON lines
        log = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(log, list):
        return log
    if "set" in log:
        return [log]
    return read_tofu_log(log) or read_open_unlearning_log(log)


def check_record(record: dict, i: int):
    """Raise ValueError for a record that is not one of a scored example."""
    if "set" not in record or not ("nll" in record or "rougeL_f1" in record):
        raise ValueError("its rows are no scored examples")
    for key, value in record.items():
        valid = True
        if key in TEXTS:
            valid = isinstance(value, str) or (value is None and key != "set")
        elif key in LEAST:
            numbers = value if key == "perturbed_nll" else [value]
            valid = bool(numbers)
            for x in numbers:
                valid = valid and type(x) in (int, float) and LEAST[key] <= x < 1e12
        if not valid:
            raise ValueError(f"row {i}: {key} cannot be {value!r:.60}")


def as_list(values) -> list:
    """A list, from a list or from a dict by index."""
    return values if isinstance(values, list) else [values[k] for k in sorted(values, key=int)]


def read_tofu_log(log: dict) -> list[dict]:
    records = []
    for file, name in TOFU_LOG.items():
        columns = {key: as_list(values) for key, values in log.get(file, {}).items()}
        for i, nll in enumerate(columns.get("avg_gt_loss", [])):
            _, generated, answer = columns["generated_text"][i][:3]
            records.append({
                "set": name,
                "index": i,
                "nll": nll,
                "paraphrased_nll": columns["avg_paraphrased_loss"][i],
                "perturbed_nll": columns["average_perturb_loss"][i],
                "n_tokens": columns["num_token_gt"][i],
                "rougeL_recall": columns["rougeL_recall"][i],
                "generated": generated,
                "answer": answer,
            })
    return records


def read_open_unlearning_log(log: dict) -> list[dict]:
    records = []
    for short, name in OPEN_UNLEARNING_LOG.items():
        columns = {}
        for kind in ("Prob", "ROUGE", "PARA_Prob", "PERT_Prob"):
            metric = log.get(f"{short}_Q_A_{kind}", {})
            columns[kind] = as_list(metric.get("value_by_index", {}))
        own, paraphrased = columns["Prob"], columns["PARA_Prob"]
        for i, wrong in enumerate(columns["PERT_Prob"]):
            right = (paraphrased or own)[i]["avg_loss"]
            record = {"set": name, "index": i, "nll": own[i]["avg_loss"] if own else right,
                      "paraphrased_nll": right, "perturbed_nll": wrong["avg_loss"]}
            if columns["ROUGE"]:
                answered = columns["ROUGE"][i]
                record["rougeL_recall"] = answered["rougeL_recall"]
                record["generated"] = answered["generation"]
            records.append(record)
    return records


def as_lines(records: list) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def save_scores(out: str, scores: dict, records: list):
    rundir.write(os.path.join(out, "examples.jsonl"), as_lines(records))
    rundir.write(os.path.join(out, "scores.json"), json.dumps(scores, indent=1) + "\n")


def reference(c, proc, name: str, bench, loaded=None) -> list[dict]:
    """Records of the target or the retain model, computed once and kept in .scored beside c.out.

    The key is made of all they depend on: weights, scored rows, scoring settings.
    loaded: (lm, tokenizer) where the model is in memory already.
    """
    protocol = ("template", "system_prompt", "date_string", "max_length", "dtype", "tokenizer",
                *configs.fields(Scoring))
    settings = {key: getattr(c, key) for key in protocol}
    tokenizer = c.tokenizer
    if tokenizer and os.path.isdir(tokenizer):
        tokenizer = models.fingerprint(tokenizer)
    parts = [models.fingerprint(name), tokenizer, bench.evals, bench.holdout, settings]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    path = os.path.join(os.path.dirname(os.path.normpath(c.out)), ".scored", f"{key}.jsonl")
    if all(proc.gather(os.path.isfile(path))):
        return read_log(path)
    lm, tokenizer = loaded or load(name, c, proc)
    _, records = evaluate(lm, tokenizer, bench, c, proc)
    if proc.rank == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        rundir.write(path, as_lines(records))
    proc.barrier()
    return records


def retain_reference(c, proc, bench) -> list[dict] | None:
    """Records of the retain model, or None where none is named."""
    if c.retain_log:
        return read_log(c.retain_log)
    return reference(c, proc, c.retain_model, bench) if c.retain_model else None


def setup(c) -> models.Process:
    """This process among its peers, as the settings ask for it."""
    threads = 1 if c.benchmark in ("demo", "markov") else None
    return models.setup(c.device, c.dtype, c.parallel, threads, c.deterministic)


def load(name: str, c, proc):
    """(lm, tokenizer) of a model, checked against each other."""
    tokenizer = models.load_tokenizer(c.tokenizer or name)
    data.check_tokenizer(tokenizer, c.tokenizer or name, c.template)
    lm = models.load_model(name, proc)
    n_embedded = lm.get_input_embeddings().num_embeddings
    if len(tokenizer) > n_embedded:
        raise UsageError(f"{name}: the tokenizer has {len(tokenizer)} entries but the model embeds "
                         f"only {n_embedded}; give the model's own with --tokenizer=.")
    return lm, tokenizer


# ------------------------------------------------------------------------------------------------
# the command


def trajectory(path: str, curves: dict, points: dict, c):
    """Forgetting against utility over the epochs of runs {label: [scores]}."""
    x, y = BENCHMARKS[c.benchmark].axes
    drawn = [scores for rows in curves.values() for scores in rows]
    if not drawn:
        drawn = [scores for scores in points.values() if y in scores][:1]
    drawable = drawn and all(x in scores and y in scores for scores in drawn)
    if not drawable:  # the user's own rows, or no retain model
        x, y = "retain_prob", "forget_prob"
    points = {label: scores for label, scores in points.items() if label not in curves}
    for label, scores in points.items():
        if "retain model" in label:  # compared with itself
            points[label] = scores | {"forget_quality": 1.0}
    configs.picture(path, curves, points, x, y)


def ask(question: str, names: list, c, proc):
    """Greedy answers side by side."""
    for name in names:
        lm, tokenizer = load(name, c, proc)
        template = data.Template(c.template, tokenizer, c.system_prompt, c.date_string)
        prompt = template.prompt_ids(question)
        (answer,) = models.generate(lm, tokenizer, [prompt], c.max_new_tokens, proc, 4096)
        proc.say(f"{name}: {answer.strip()}")


def run_settings(name: str) -> dict:
    return rundir.read_json(os.path.join(name, "run.json"))


def inherit(cls, names: list, given: dict) -> dict:
    """Settings of the first run directory among `names`, overridden by what was given."""
    runs = {name: run_settings(name) for name in names if os.path.isdir(name)}
    runs = {name: run for name, run in runs.items() if run}
    for key in ("benchmark", "template", "system_prompt", "max_length"):
        values = {name: run.get(key) for name, run in runs.items()}
        if len(set(map(str, values.values()))) > 1 and key not in given:
            found = ", ".join(f"{name}: {key} {value}" for name, value in values.items())
            raise UsageError(f"{found}; give --{key}= to score all alike.")
    # a run's own, or this machine's
    excluded = {"model", "device", *configs.fields(Run), *configs.fields(Progress)}
    inherited = {}
    for key, value in next(iter(runs.values()), {}).items():
        if key in configs.fields(cls) and key not in excluded:
            inherited[key] = value
    return inherited | given


def against(name: str, c, given: dict):
    """c with this run's own target and retain model: runs of other seeds may have other ones."""
    run = run_settings(name)
    own = {}
    for key in ("model", "retain_model"):
        if key not in given:
            own[key] = run.get(key) or getattr(c, key)
    return dataclasses.replace(c, **own)


def main(argv):
    questions = [word.partition("=")[2] for word in argv if word.startswith("--ask=")]
    argv = [word for word in argv if not word.startswith("--ask=")]
    given, names = configs.parse(Config, argv, __doc__)  # a run directory may bring the rest
    if not names:
        raise UsageError("name at least one run directory, model or log: python evaluate.py "
                         "out/demo (--help says more).")
    logs = {name: read_log(name) for name in names if name.endswith((".json", ".jsonl"))}
    c = configs.make(Config, inherit(Config, names, given))
    check_names(names, logs, c, given, questions)
    labels = configs.name_runs(names)
    
    outs = {name: configs.output_directory(name, labels, given, len(names)) for name in names}
    c = dataclasses.replace(c, out=outs[names[0]])
    own = {name: against(name, c, given) for name in names}
    for other in {own[name].retain_model for name in names} - {None}:
        if not c.retain_log:
            configs.check_name(other, "retain_model")
    proc = setup(c)
    if questions:
        ask(questions[0], names, c, proc)
        return models.cleanup()
    score_all(names, logs, own, outs, labels, given, c, proc)
    models.cleanup()


def check_names(names, logs, c, given, questions):
    """Refuse what cannot be scored, before anything is loaded."""
    for name in names:
        if name not in logs:
            configs.check_name(name, "model")
    if len(names) == 1:
        refuse_itself(names[0], given)
    needs_retain = BENCHMARKS[c.benchmark].needs_retain
    if needs_retain and not (c.retain_model or c.retain_log or questions or c.forget_data):
        raise UsageError(
            "forget quality needs a model that never saw the forget set: give --retain_model=MODEL "
            "or --retain_log=LOG (evaluate.py of a retain model writes one, examples.jsonl).")


def score_all(names, logs, own, outs, labels, given, c, proc):
    """Score every model or log, and show them in one table."""
    for out in outs.values():
        rundir.writable(out)
    bench = None
    if len(logs) < len(names) or (c.retain_model and not c.retain_log):
        bench = data.load(c.benchmark, c.subset, c.data, c.forget_data, c.retain_data, train=False,
                          holdout=c.audits)
    table, records_of, retain_models = {}, {}, {}
    for name in names:
        retain = retain_reference(own[name], proc, bench)
        other = c.retain_log or own[name].retain_model
        if name in logs:
            records = logs[name]
        elif other and not c.retain_log and same(name, other):
            records = retain
        else:
            lm, tokenizer = load(name, c, proc)
            _, records = evaluate(lm, tokenizer, bench, c, proc)
            del lm  # before the next one is loaded
        scores = summarize(records, retain, c)
        if proc.rank == 0:
            save_scores(outs[name], scores, records)
        table[labels[name]], records_of[labels[name]] = scores, records
        if retain:
            label = f"retain model {os.path.basename(other)}"
            retain_models[label] = summarize(retain, None, c)
    path = None
    if len(names) > 1 and proc.rank == 0:
        path = os.path.join(given.get("out", "out"), "comparison")
    shown = configs.show_tables({"scores": table}, ARROWS, path)
    proc.say(configs.samples(records_of) + "\n\n" + shown)
    if path:
        trajectory(f"{path}.png", {}, table | retain_models, c)
        proc.say(f"\n{path}.png, {path}.md, {path}.csv")


def same(name: str, other: str) -> bool:
    """Are these the same model?"""
    if name == other:
        return True
    both_here = os.path.isdir(name) and os.path.isdir(other)
    return both_here and models.fingerprint(name) == models.fingerprint(other)


def refuse_itself(name: str, given: dict):
    """A truth ratio compared with itself gives a forget quality of 1, which says nothing."""
    for key in ("retain_model", "retain_log"):
        other = given.get(key)
        if not other:
            continue
        same_path = os.path.realpath(name) == os.path.realpath(other)
        if same_path or (key == "retain_model" and same(name, other)):
            raise UsageError(f"--{key}={other}: this is {name} itself; name a model that never saw "
                             "the forget set.")


if __name__ == "__main__":
    configs.run(main)
