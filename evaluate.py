"""Score models: forget quality, utility, and what a model still says.

    python evaluate.py out/demo                                     # a run directory: its own settings
    python evaluate.py out/demo out/demo_target --ask="Who wrote Hamlet?"
    python evaluate.py org/model --benchmark=tofu --subset=forget05 --template=llama2 --retain_model=org/retain
    python evaluate.py org/model --benchmark=muse --subset=books    # MUSE has its retain model's AUC built in
    python evaluate.py LOG.json --retain_log=LOG.json               # recorded logs: ours, TOFU's, open-unlearning's

A run directory, any Hugging Face model directory, a hub id (org/name@revision) or a log; several give one table, on screen
and in comparison.md, .csv and .png (in out/ or --out), each run against the retain model it was made with.
Scores go to scores.json, what they were computed from to examples.jsonl: in the run directory, or in --out.
"""
import dataclasses
import functools
import hashlib
import json
import os
import re
import zlib
from typing import Callable, Literal

import numpy as np
import scipy.stats
import torch
from rouge_score import rouge_scorer
from tqdm import tqdm

import configs
import data
import losses
import model as models
from configs import Failure, Mistake


Dtype = Literal["fp32", "bf16", "bf16_weights"]


@dataclasses.dataclass(frozen=True)
class Config:
    # data
    benchmark: Literal["demo", "tofu", "muse", "markov"] = "demo"  # what is unlearned and scored
    subset: str | None = None  # tofu: forget10, forget05, forget01; muse: news, books; markov: short, unseen; None = the first
    data: str | None = None  # hub id or local directory (None = the benchmark's own); markov: seed of its samples
    split: str | None = None  # muse: the text to unlearn, None = raw/forget; News has scal/forget_1 to 4 and sust/ too
    forget_data: str | None = None  # unlearn YOUR rows: a .jsonl, .json or .txt with question and answer, or text
    retain_data: str | None = None  # ... and the rows to keep
    template: Literal["chat", "llama2", "qa"] | None = None  # chat (the tokenizer's own), llama2, qa; None = chat
    system_prompt: str = "You are a helpful assistant."  # for --template=chat; empty for a template that takes none
    date_string: str = "10 Apr 2025"  # for --template=chat: Llama-3 prints today's date into every prompt otherwise
    max_length: int | None = None  # tokens of prompt and answer together; None = 500; muse: of a chunk, None = 2048
    # models
    model: str | None = None  # the target, from which is unlearned: hub id or directory
    retain_model: str | None = None  # one that never saw the forget set: reference of forget quality
    base_model: str | None = None  # what both are fine-tuned from, where their path lies under out/ and is not there yet
    tokenizer: str | None = None  # None = the model's own
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    micro_batch_tokens: int = 4096  # padded tokens a process computes at once: memory, never the result
    dtype: Dtype = "fp32"  # bf16: autocast, fp32 weights; bf16_weights: weights and AdamW in bf16
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: fsdp = every GPU holds its part of the model, not all of it
    deterministic: bool = False  # CUDA: slower kernels that give the same bits each time (a CPU always does)
    # scoring
    eval_every: float = 1.0  # epochs between scores in a run; 0 = train only, score nothing
    eval_at: tuple[int, ...] = ()  # score at these optimizer steps instead
    eval_rows: int | None = None  # score the first rows of each set only (the TOFU paper: 300); None = all
    audits: bool = False  # memorization and membership inference too, against the holdout set; never inside training
    max_new_tokens: int | None = None  # None = the protocol's: TOFU 200, VerbMem 128 (KnowMem is always 32)
    stem: bool = False  # muse: stemmed ROUGE, as open-unlearning has it (TOFU's is always stemmed)
    skip_last: bool = False  # muse: Min-40 % without each text's last token, as open-unlearning has it
    retain_log: str | None = None  # log of a retain model: a file, or dataset:org/name/path.json
    # run
    out: str | None = None  # the run directory; None = out/<benchmark>_<subset>_<forget_loss>
    overwrite: bool = False  # replace the run that is there

    def __post_init__(self):
        wrong = [text for bad, text in self.problems() if bad]
        if wrong:
            raise ValueError(" ".join(wrong))
        resolve = functools.partial(object.__setattr__, self)  # None = the protocol's: filled in once, here
        resolve("subset", self.subset or data.SUBSETS[self.benchmark][0])
        for name in ("max_length", "max_new_tokens", "template"):
            resolve(name, getattr(self, name) or getattr(BENCHMARKS[self.benchmark], name))

    def each(self, names, right, must):
        """(is it wrong, the sentence) of several settings; one that was not given is the protocol's."""
        for name in names.split():
            value = getattr(self, name)
            yield value not in (None, "") and not right(value), f"--{name}={value}: {must}"

    def problems(self):
        """(is it wrong, the sentence): all are checked together, before anything is loaded."""
        names = data.SUBSETS[self.benchmark]
        yield (self.subset not in (None, *names), f"--subset={self.subset}: {self.benchmark} has {', '.join(names)}.")
        yield self.retain_data and not self.forget_data and self.benchmark == "demo", "--retain_data goes with --forget_data."
        yield self.split and (self.benchmark != "muse" or self.split.count("/") != 1), (
            f"--split={self.split}: is config/split of MUSE's data, as in --benchmark=muse --split=scal/forget_2.")
        yield self.benchmark == "markov" and (self.forget_data or self.retain_data), (
            "--forget_data and --retain_data do not go with markov: its scores need the true chains.")
        yield from self.each("micro_batch_tokens eval_rows max_new_tokens", lambda n: n >= 1, "must be at least 1.")
        yield from self.each("max_length", lambda n: n >= 2, "must be at least 2.")
        yield self.audits and self.parallel == "fsdp", "--audits=True: needs whole gradients, so --parallel=ddp."
        yield from self.each("forget_data retain_data", os.path.isfile, "no such file.")
        yield from self.each("retain_log", lambda p: os.path.isfile(p) or p.startswith(data.ON_HUB),
                             "no such file, and not dataset:org/name/path.json, one on the hub.")


# ----------------------------------------------------------------------------------------------------------------------
# metrics: pure functions of lists, NumPy arrays or CPU tensors; empty input is a ValueError


def array(values):
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("a metric of no values")
    return values


def truth_ratio(correct_nll, perturbed_nll):
    """R = p(wrong) / p(correct), p = exp(-nll), wrong = the GEOMETRIC mean over K perturbed answers. TOFU, arXiv 2401.06121.

    correct_nll (N,): mean NLL a token of the paraphrased answer (of the plain one for real_authors and world_facts);
    perturbed_nll (N, K). Returns (N,) in (0, inf): 0 = knows the right answer, 1 = cannot tell. The paper's text has the
    arithmetic mean of probabilities; the authors' code and the public leaderboard have this.
    """
    return np.exp(np.clip(array(correct_nll) - array(perturbed_nll).mean(-1), -700, 700))  # past that, a float is 0 or infinite


def forget_quality(truth_ratio, retain_truth_ratio):
    """p-value of the two-sided two-sample Kolmogorov-Smirnov test between two models' truth ratios: 1 is best.

    Small: the unlearned model can be told from one that never saw the forget set. TOFU, arXiv 2401.06121.
    """
    return float(scipy.stats.ks_2samp(array(truth_ratio), array(retain_truth_ratio)).pvalue)


def model_utility(parts):
    """Harmonic mean of TOFU's nine {retain, real_authors, world_facts}_{prob, rouge, truth_ratio}; 0 if any is 0. In [0, 1]."""
    return float(scipy.stats.hmean(array(list(parts.values()))))


rouge_scorer_for = functools.cache(lambda stem: rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=stem))


def rouge(prediction, reference, stem):
    """ROUGE-1 recall, ROUGE-L recall and F1, each in [0, 1]. TOFU: L recall, stemmed; MUSE: L F1, not stemmed."""
    got = rouge_scorer_for(stem).score(reference, prediction)
    return {"rouge1_recall": got["rouge1"].recall, "rougeL_recall": got["rougeL"].recall, "rougeL_f1": got["rougeL"].fmeasure}


def min_k(token_logps, k=0.4, plus_plus_stats=None):
    """Min-K% (arXiv 2310.16789): mean of the lowest max(1, int(k T)) token log-probs; higher = more like a member.

    plus_plus_stats = (mean (T,), variance (T,)) of log p under the model's own distribution gives Min-K%++ (arXiv
    2404.02936): log-probs are standardised first, with a variance of at least 1e-6.
    """
    logps = array(token_logps)
    if plus_plus_stats is not None:
        mean, variance = map(array, plus_plus_stats)
        logps = (logps - mean) / np.sqrt(np.maximum(variance, 1e-6))
    return float(np.sort(logps)[:max(1, int(k * len(logps)))].mean())


def auc(forget_scores, holdout_scores):
    """P(forget > holdout) + half the ties, in [0, 1]; scores: higher = more like a member. 0.5: no membership signal."""
    forget, holdout = array(forget_scores), array(holdout_scores)
    ranks = scipy.stats.rankdata(np.concatenate([forget, holdout]))[:len(forget)]
    return float((ranks.sum() - len(forget) * (len(forget) + 1) / 2) / (len(forget) * len(holdout)))


def privleak(auc, auc_retrain):
    """MUSE's privacy leakage (arXiv 2407.06460), in percent: 0 is ideal, -100 fully memorised, above 0 over-unlearned.

    Both AUCs as auc() gives them. MUSE's published constants are the complement: 1 - 0.4772 (News), 1 - 0.5393 (Books).
    """
    return 100 * ((1 - auc) - (1 - auc_retrain)) / (1 - auc_retrain)


def exact_memorization(correct):
    """Share of answer tokens that are the model's first choice, in [0, 1]. correct: (T,) bool."""
    return float(array(correct).mean())


def extraction_strength(correct):
    """1 - s/T, s = where the suffix of right first choices starts; 0 if the last token is wrong. correct: (T,) bool."""
    wrong = np.flatnonzero(array(correct) == 0)
    start = wrong[-1] + 1 if len(wrong) else 0
    return float(1 - start / len(correct))


# ----------------------------------------------------------------------------------------------------------------------
# TOFU: what is recorded of each example, and the scores that follow from the records

OPTIONS = ("real_authors", "world_facts")  # sets whose probability is taken among the given wrong answers
TOFU_HEADLINE = ("forget_quality", "model_utility", "forget_prob", "forget_rouge")
ARROWS = {"forget_quality": "↑", "model_utility": "↑", "forget_prob": "↓", "forget_rouge": "↓", "forget_truth_ratio": "↑",
          "retain_kl": "↓", "verbmem_f": "↓", "knowmem_f": "↓", "knowmem_r": "↑", "privleak": "→0", "exact_memorization": "↓",
          "extraction_strength": "↓", **{f"mia_{k}": "→0.5" for k in "loss zlib min_k min_k_pp reference gradnorm".split()}}


def record_qa(scorer, tokenizer, bench, c, proc):
    """One record an example of every set: per-token NLL of its answers, the greedy answer and its ROUGE."""
    template = data.Template(c.template, tokenizer, c.system_prompt, c.date_string)
    records, texts, prompts = [], [], []  # texts, prompts: (record, what it is, tokens)
    skipped = 0
    for name, rows in bench.evals.items():
        for i, row in enumerate(rows[:c.eval_rows]):
            r = {"set": name, "index": i, "question": row.get("question", ""), "answer": row.get("answer", row.get("text"))}
            answers = [("nll", None), ("paraphrased_nll", row.get("paraphrased_answer"))]
            answers += [("perturbed_nll", a) for a in row.get("perturbed_answer", [])]
            encoded = [(r, kind, template.encode(row, c.max_length, a)) for kind, a in answers if kind == "nll" or a is not None]
            if any(e is None for _, _, e in encoded):
                skipped += 1
                continue
            records.append(r)
            texts += encoded
            if "text" not in row:
                prompts.append((r, template.prompt_ids(row["question"])))
    if skipped:
        proc.say(f"{skipped} rows are not scored: an answer without tokens, or a prompt longer than --max_length={c.max_length}")
    if not records:
        raise Mistake("no row can be scored: every answer is empty or every prompt longer than --max_length.")
    tokens, right = models.score(scorer, [e for _, _, e in texts], proc, c.micro_batch_tokens, choices, title="scoring"), {}
    for (r, kind, e), (logp, first) in zip(texts, (t.T for t in tokens)):
        nll = -float(logp.mean())
        if kind == "perturbed_nll":
            r.setdefault(kind, []).append(nll)
        else:
            r[kind] = nll
        if kind == "nll":
            r["n_tokens"] = len(logp)
            right[id(r)] = e.ids[:e.start + int(first.cumprod().sum())]  # as far as the greedy answer is the true one
            if e.ids[-1] != tokenizer.eos_token_id:  # cut at max_length: TOFU's ROUGE then asks for the rest only
                r["answer"] = tokenizer.decode(e.ids[e.start:], skip_special_tokens=True).strip()
    begun = [right[id(r)][len(p):] if right[id(r)][:len(p)] == p else [] for r, p in prompts]
    generated = models.generate(scorer.lm, tokenizer, [p for _, p in prompts], c.max_new_tokens, proc, 4 * c.micro_batch_tokens,
                                "answering", begun)
    for (r, _), text in zip(prompts, generated):
        r |= {"generated": text.strip()} | rouge(text.strip(), r["answer"], stem=True)
    return records


def choices(logits, labels):
    """(n, 2) of each answer token: log p, is it the first choice."""
    return torch.stack([losses.token_logps(logits, labels), logits.argmax(-1) == labels], -1)


def audit_tokens(logits, labels):
    """(n, 4) of each answer token: log p, is it the first choice, mean and variance of log p under the model's distribution."""
    logps = logits.float().log_softmax(-1)
    p = logps.exp()
    mean = (p * logps).sum(-1)
    return torch.stack([logps.gather(-1, labels[:, None])[:, 0], (logits.argmax(-1) == labels).float(), mean,
                        (p * logps.square()).sum(-1) - mean.square()], -1)


def gradient_norm(scorer, example, proc):
    """Mean over the parameter tensors it depends on of the L2 norm of the gradient of the answer's mean NLL."""
    ids, places, labels, *_ = models.collate([[example]], proc.device)
    with proc.autocast():
        loss = -losses.token_logps(scorer(ids, places)[0], labels).mean()
    gradients = torch.autograd.grad(loss, [p for p in scorer.parameters() if p.requires_grad], allow_unused=True)
    return float(torch.stack([g.norm() for g in gradients if g is not None]).mean())


def record_audits(scorer, tokenizer, bench, c, proc):
    """One record an answer of the forget and the holdout set: memorization, and scores that are higher for a member.

    MUSE: members and others are PrivLeak's texts, and what may be memorized are VerbMem's continuations.
    """
    template = data.Template(c.template, tokenizer, c.system_prompt, c.date_string)
    sets = {"forget": bench.evals.get("forget") or bench.evals.get("privleak_f", []),
            "holdout": bench.holdout or bench.evals.get("privleak_h", []), "verbatim": bench.evals.get("verbmem_f", [])}
    if not sets["holdout"]:
        proc.say("No holdout set: the mia_ scores are left out.")
    items = [(name, i, row, data.encode(tokenizer, row["prompt"], row["answer"]) if name == "verbatim" else
              template.encode(row, c.max_length)) for name, rows in sets.items() for i, row in enumerate(rows[:c.eval_rows])]
    items = [item for item in items if item[3]]
    tokens = models.score(scorer, [e for *_, e in items], proc, c.micro_batch_tokens, audit_tokens, title="audits")
    bar = tqdm(range(proc.rank, len(items), proc.world), desc="gradients", disable=proc.rank > 0 or None, leave=False)
    mine = {i: gradient_norm(scorer, items[i][3], proc) for i in bar}
    norms = {i: v for part in proc.gather(mine) for i, v in part.items()}
    records = []
    for k, ((name, i, row, _), (logp, correct, mean, variance)) in enumerate(zip(items, (t.T for t in tokens))):
        nll = -float(logp.mean())
        records.append({"set": f"audit_{name}", "index": i, "nll": nll, "exact_memorization": exact_memorization(correct), "loss": -nll,
                        "extraction_strength": extraction_strength(correct), "min_k": min_k(logp), "gradnorm": -norms[k],
                        "zlib": -nll / len(zlib.compress(row.get("answer", row.get("text")).encode())),
                        "min_k_pp": min_k(logp, plus_plus_stats=(mean, variance))})
    return records


def audit_scores(records, retain_records):
    """Memorization of the forget set; AUC of telling it from the holdout set; PrivLeak against the retain model's AUC."""
    forget, holdout, verbatim = (by_set(records).get(f"audit_{name}", []) for name in ("forget", "holdout", "verbatim"))
    scores = {k: float(np.mean([r[k] for r in verbatim or forget])) for k in ("exact_memorization", "extraction_strength") if forget}
    if not (forget and holdout):
        return scores
    for k in ("loss", "zlib", "min_k", "min_k_pp", "gradnorm"):
        scores[f"mia_{k}"] = auc([r[k] for r in forget], [r[k] for r in holdout])
    kept = {(r["set"], r["index"]): r["nll"] for r in retain_records or [] if r["set"].startswith("audit_")}
    if all((r["set"], r["index"]) in kept for r in forget + holdout):
        by_reference = [[kept[r["set"], r["index"]] - r["nll"] for r in rows] for rows in (forget, holdout)]
        scores["mia_reference"] = auc(*by_reference)
        retrained = audit_scores([r for r in retain_records if r["set"].startswith("audit_")], None)["mia_min_k"]
        if retrained < 1:  # a retain model that tells both apart without error leaves nothing to compare with
            scores["privleak"] = privleak(scores["mia_min_k"], retrained)
    return scores


def tofu_scores(records, retain_records=None, c=None):
    """The flat dict of scores of records; forget_quality where the retain model's records are given, and are not these."""
    sets, scores = by_set(records), {}
    for name, rows in ((n, rows) for n, rows in sets.items() if not n.startswith("audit_")):
        prob = np.exp([-r["nll"] for r in rows])
        if name in OPTIONS:  # among the options, in logs: a collapsed model gives all of them 0
            prob = np.exp([-r["nll"] - np.logaddexp.reduce([-r["nll"], *(-n for n in r["perturbed_nll"])]) for r in rows])
        scores[f"{name}_prob"] = float(prob.mean())
        if all("rougeL_recall" in r for r in rows):
            scores[f"{name}_rouge"] = float(np.mean([r["rougeL_recall"] for r in rows]))
        if all("perturbed_nll" in r for r in rows):
            ratio = truth_ratios(rows)
            closeness = np.minimum(ratio, 1 / ratio) if name == "forget" else np.maximum(0, 1 - ratio)
            scores[f"{name}_truth_ratio"] = float(closeness.mean())
    nine = {k: v for k, v in scores.items() if not k.startswith("forget")}
    if len(nine) == 9:
        scores = {"model_utility": model_utility(nine)} | scores
    retained = [r for r in retain_records or [] if r["set"] == "forget"]
    if retained and "forget_truth_ratio" in scores and [r["nll"] for r in retained] != [r["nll"] for r in sets["forget"]]:
        scores = {"forget_quality": compare(sets["forget"], retained)} | scores  # but not of the retain model with itself
    return scores | audit_scores(records, retain_records)


def by_set(records):
    return {name: [r for r in records if r["set"] == name] for name in dict.fromkeys(r["set"] for r in records)}


def truth_ratios(rows):
    """(N,) R of each record; the rows may have different numbers of perturbed answers."""
    return np.array([truth_ratio([r.get("paraphrased_nll", r["nll"])], [r["perturbed_nll"]])[0] for r in rows])


def compare(rows, retain_rows):
    """Forget quality, of the same questions only."""
    if len(rows) != len(retain_rows):
        raise Mistake(f"the retain reference has {len(retain_rows)} forget examples and the model {len(rows)}: score both on "
                      "the same questions (the TOFU authors' logs hold the first 300: --eval_rows=300).")
    for a, b in zip(rows, retain_rows):
        key = "question" if a.get("question") or b.get("question") else "answer"  # TOFU's logs have the true answers only
        if a.get(key) and b.get(key) and a[key] != b[key]:
            raise Mistake(f"the retain reference was scored on other questions: its {key} {b[key]!r}, the model's {a[key]!r}.")
    return forget_quality(truth_ratios(rows), truth_ratios(retain_rows))


# ----------------------------------------------------------------------------------------------------------------------
# MUSE: continuations of forgotten passages, answers about them, and whether their text is told from text never seen

MUSE_HEADLINE = ("verbmem_f", "knowmem_f", "knowmem_r", "privleak")
KNOWMEM_TOKENS, KNOWMEM_STOP = 32, re.compile("\n\n|\nQuestion|Question:")
MUSE_AUC = {"news": 1 - 0.4772, "books": 1 - 0.5393}  # the authors' retrained models; Min-40 %, forget against holdout


def record_muse(scorer, tokenizer, bench, c, proc):
    """One record a prompt, its greedy continuation and ROUGE-L F1, and one a text, its Min-40 % score. No text is cut."""
    sets = {name: [row | {"set": name, "index": i} for i, row in enumerate(rows[:c.eval_rows])]
            for name, rows in bench.evals.items()}
    texts = sets["privleak_f"] + sets["privleak_h"]
    examples = [data.Example(tokenizer(r.pop("text"))["input_ids"], 1) for r in texts]
    for r, e in zip(texts, examples):
        r["n_tokens"] = len(e.ids) - 1 - c.skip_last
        if int(0.4 * r["n_tokens"]) < 1:  # the original's mean of nothing
            raise Mistake(f"{r['set']}, row {r['index'] + 1}: the text has {r['n_tokens']} tokens to score, too few for "
                          "Min-40 %, which needs 3.")
    for r, logp in zip(texts, models.score(scorer, examples, proc, c.micro_batch_tokens, title="scoring")):
        r |= {"nll": -float(logp.mean()), "min_k": min_k(logp[:r["n_tokens"], 0])}
    for rows, n in ((sets["verbmem_f"], c.max_new_tokens), *((sets[name], KNOWMEM_TOKENS) for name in ("knowmem_f", "knowmem_r"))):
        prompts = [tokenizer(r["prompt"])["input_ids"] for r in rows]
        generated = models.generate(scorer.lm, tokenizer, prompts, n, proc, 4 * c.micro_batch_tokens, title="answering")
        for r, text in zip(rows, generated):
            if r["set"] == "verbmem_f":  # with its BOS, so that one token less of it is asked for
                r["answer"] = tokenizer.decode(tokenizer(r["answer"])["input_ids"][:n], skip_special_tokens=True)
            else:
                text = KNOWMEM_STOP.split(text)[0]
                del r["prompt"]  # the ten answered questions, the same in every record
            r |= {"generated": text} | rouge(text, r["answer"], c.stem)
    return [r for rows in sets.values() for r in rows]


def muse_scores(records, retain_records=None, c=None):
    """The four scores in percent; PrivLeak against the retain model's AUC, or the published one of the subset."""
    def membership(records):
        sets = by_set(records)
        return auc(*([r["min_k"] for r in sets[name]] for name in ("privleak_f", "privleak_h")))

    sets = by_set(records)
    if missing := [name for name in data.MUSE_SETS if name not in sets]:
        raise Mistake(f"the records have no {missing[0]}: MUSE is scored on {', '.join(data.MUSE_SETS)}.")
    scores = {name: 100 * float(np.mean([r["rougeL_f1"] for r in sets[name]])) for name in MUSE_HEADLINE[:3]}
    retrained = membership(retain_records) if retain_records else MUSE_AUC[c.subset]
    if retrained < 1:  # a retain model that knows every forget text by heart leaves nothing to compare with
        scores["privleak"] = privleak(membership(records), retrained)
    return audit_scores(records, retain_records) | scores


# ----------------------------------------------------------------------------------------------------------------------
# Markov chains: how far the predictions are from the true transition probabilities

MARKOV_HEADLINE = ("retain_kl", "forget1_kl", "forget2_kl")


def transition_kl(states, logps, transitions):
    """KL(P(. | x_t) || model), 0 = predicts the chain. states (T,) x_t, logps (T, S), transitions (S, S) -> (T,)"""
    true = np.asarray(transitions)[states]  # (T, S)
    return (true * (np.log(true) - logps)).sum(-1)


def record_markov(scorer, tokenizer, bench, c, proc):
    """One record a test sequence: means over its predicted states, all but the first."""
    todo = [(name, i, data.Example(ids, 1)) for name, rows in bench.evals.items()
            for i, ids in enumerate(tokenizer([r["text"] for r in rows[:c.eval_rows]])["input_ids"])]
    logps = models.score(scorer, [e for _, _, e in todo], proc, c.micro_batch_tokens,
                         lambda logits, labels: logits.float().log_softmax(-1), title="scoring")
    return [{"set": name, "index": i, "n_tokens": len(logp), "nll": -float(logp[range(len(logp)), e.ids[1:]].mean()),
             "kl": float(transition_kl(e.ids[:-1], logp, data.CHAINS[name]).mean())} for (name, i, e), logp in zip(todo, logps)]


def markov_scores(records, retain_records=None, c=None):
    """<set>_kl: the mean over all predicted states of a set."""
    return {f"{name}_kl": sum(r["kl"] * r["n_tokens"] for r in rows) / sum(r["n_tokens"] for r in rows)
            for name, rows in by_set(records).items() if name in data.CHAINS}


# ----------------------------------------------------------------------------------------------------------------------
# any benchmark


@configs.phase("scoring")
def evaluate(scorer, tokenizer, bench, c, proc, retain_records=None):
    """(scores, records) of a model as it is now; the one function behind every number of the project."""
    was_training = scorer.training
    scorer.eval()
    records = BENCHMARKS[c.benchmark].record(scorer, tokenizer, bench, c, proc)
    if c.audits:
        records += record_audits(scorer, tokenizer, bench, c, proc)
    scorer.train(was_training)
    return summarize(records, retain_records, c), records


def summarize(records, retain_records, c):
    """The flat dict of scores that follows from records; against the retain model's where they are given."""
    for r in records + (retain_records or []):
        if (r["set"] in data.MUSE_SETS) != (c.benchmark == "muse") and not r["set"].startswith("audit_"):
            raise Mistake(f"a record of the set {r['set']} is not of --benchmark={c.benchmark}; give the log's own "
                          "benchmark and subset.")
    try:
        scores = BENCHMARKS[c.benchmark].scores(records, retain_records, c)
    except KeyError as e:  # of a recorded log
        raise Mistake(f"not scored as --benchmark={c.benchmark}: a scored example has no {e}; was it recorded so?") from None
    if wrong := [f"{k} {v}" for k, v in scores.items() if not np.isfinite(v)]:
        raise Failure(f"scores are not finite ({', '.join(wrong)}): the model has broken down; lower --lr.")
    return scores


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How a benchmark is scored: models -> records -> scores, and what is shown first."""
    record: Callable  # (scorer, tokenizer, bench, c, proc) -> [record an example]
    scores: Callable  # (records, retain_records or None, c) -> {name: float}
    headline: tuple   # the scores that are printed at every epoch
    axes: tuple       # x and y of the trajectory
    max_length: int = 500  # what settings are that were not given
    max_new_tokens: int = 200
    template: str = "chat"
    needs_retain: bool = True  # is there no headline score without a retain model


BENCHMARKS = {
    "demo": Scoring(record_qa, tofu_scores, TOFU_HEADLINE, ("model_utility", "forget_quality")),
    "tofu": Scoring(record_qa, tofu_scores, TOFU_HEADLINE, ("model_utility", "forget_quality")),
    "muse": Scoring(record_muse, muse_scores, MUSE_HEADLINE, ("knowmem_r", "knowmem_f"), 2048, 128, "qa", False),
    "markov": Scoring(record_markov, markov_scores, MARKOV_HEADLINE, MARKOV_HEADLINE[:2], template="qa", needs_retain=False),
}


# ----------------------------------------------------------------------------------------------------------------------
# records on disk

def save_scores(out, scores, records):
    configs.write(os.path.join(out, "examples.jsonl"), "".join(json.dumps(r) + "\n" for r in records))
    configs.write(os.path.join(out, "scores.json"), json.dumps(scores, indent=1) + "\n")


def reference(c, proc, name, bench):
    """Records of the target or the retain model: computed once, then read from <out's parent>/.scored.

    The key is made of everything they depend on: the weights, the rows that are scored, the scoring settings.
    """
    settings = [getattr(c, k) for k in ("template", "system_prompt", "date_string", "max_length", "max_new_tokens",
                                        "eval_rows", "dtype", "tokenizer", "audits", "stem", "skip_last")]
    own = models.fingerprint(c.tokenizer) if c.tokenizer and os.path.isdir(c.tokenizer) else c.tokenizer
    key = hashlib.sha256(json.dumps([models.fingerprint(name), own, bench.evals, bench.holdout, settings]).encode()).hexdigest()[:16]
    path = os.path.join(os.path.dirname(os.path.normpath(c.out)), ".scored", f"{key}.jsonl")
    if not all(proc.gather(os.path.isfile(path))):
        scorer, tokenizer = load(name, c, proc)
        _, records = evaluate(scorer, tokenizer, bench, c, proc)
        if proc.rank == 0:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            configs.write(path, "".join(json.dumps(r) + "\n" for r in records))
        proc.barrier()
        return records
    return data.read_log(path)


def setup(c):
    """This process among its peers, as the settings ask for it."""
    return models.setup(c.device, c.dtype, c.parallel, threads=1 if c.benchmark in ("demo", "markov") else None, deterministic=c.deterministic)


def load(name, c, proc):
    """(Scorer, tokenizer) of a model, checked against each other."""
    tokenizer = models.load_tokenizer(c.tokenizer or name)
    data.check_tokenizer(tokenizer, c.tokenizer or name, c.template)
    lm = models.load_model(name, proc)
    if len(tokenizer) > (rows := lm.get_input_embeddings().num_embeddings):
        raise Mistake(f"{name}: the tokenizer has {len(tokenizer)} entries but the model embeds only {rows}; "
                      "give the model's own with --tokenizer=.")
    return models.Scorer(lm), tokenizer


def retain_reference(c, proc, bench):
    """Records of the retain model, or None where none is named."""
    if c.retain_log:
        return data.read_log(c.retain_log)
    return reference(c, proc, c.retain_model, bench) if c.retain_model else None


# ----------------------------------------------------------------------------------------------------------------------
# showing


def trajectory(path, curves, points, c):
    """Forgetting against utility over the epochs of runs {label: [scores]}, between target and retain model."""
    x, y = BENCHMARKS[c.benchmark].axes
    drawn = [r for rows in curves.values() for r in rows] or [r for r in points.values() if y in r][:1] or [{}]
    if not all(x in r and y in r for r in drawn):  # your own rows, or no retain model
        x, y = "retain_prob", "forget_prob"
    points = {k: v | ({"forget_quality": 1.0} if "retain model" in k else {}) for k, v in points.items() if k not in curves}
    configs.picture(path, curves, points, x, y)


def ask(question, names, c, proc):
    """Greedy answers side by side."""
    for name in names:
        scorer, tokenizer = load(name, c, proc)
        template = data.Template(c.template, tokenizer, c.system_prompt, c.date_string)
        answer = models.generate(scorer.lm, tokenizer, [template.prompt_ids(question)], c.max_new_tokens, proc, 4096)
        proc.say(f"{name}: {answer[0].strip()}")


# ----------------------------------------------------------------------------------------------------------------------

NOT_INHERITED = ("model", "out", "overwrite", "device", "eval_every", "eval_at")  # a run's own, or this machine's


def inherit(cls, names, given):
    """Settings of the first run directory among `names`, overridden by what was given: a run is scored as it was trained."""
    runs = {n: run for n in names if os.path.isdir(n) and (run := configs.read_json(os.path.join(n, "run.json")))}
    for key in ("benchmark", "template", "system_prompt", "max_length"):
        values = {n: run.get(key) for n, run in runs.items()}
        if len(set(map(str, values.values()))) > 1 and key not in given:
            raise Mistake(f"{', '.join(f'{n}: {key} {v}' for n, v in values.items())}; give --{key}= to score all alike.")
    first = next(iter(runs.values()), {})
    return {k: v for k, v in first.items() if k in configs.fields(cls) and k not in NOT_INHERITED} | given


def against(name, c, given):
    """c with the target and the retain model that this run was made from and with: those of another seed may be others."""
    run = configs.read_json(os.path.join(name, "run.json"))
    return dataclasses.replace(c, **{k: run.get(k) or getattr(c, k) for k in ("model", "retain_model") if k not in given})


def main(argv):
    question = [a.partition("=")[2] for a in argv if a.startswith("--ask=")]
    argv = [a for a in argv if not a.startswith("--ask=")]
    given, names = configs.parse(Config, argv, __doc__)  # a run directory may bring the rest
    if not names:
        raise Mistake("name at least one run directory, model or log: python evaluate.py out/demo (--help says more).")
    logs = {n: data.read_log(n) for n in names if n.endswith((".json", ".jsonl"))}
    c = configs.make(Config, inherit(Config, names, given))
    for name in (n for n in names if n not in logs):
        configs.check_name(name, "model")
    if len(names) == 1:
        refuse_itself(names[0], c, given)
    if BENCHMARKS[c.benchmark].needs_retain and not (c.retain_model or c.retain_log or question or c.forget_data):
        raise Mistake("forget quality needs a model that never saw the forget set: give --retain_model=MODEL or "
                      "--retain_log=LOG (evaluate.py of a retain model writes one, examples.jsonl).")
    labels = configs.name_runs(names)
    places = {name: configs.place(name, labels, given, len(names)) for name in names}
    c = dataclasses.replace(c, out=places[names[0]])
    own = {name: against(name, c, given) for name in names}
    for retain_model in {a.retain_model for a in own.values() if a.retain_model and not c.retain_log}:
        configs.check_name(retain_model, "retain_model")
    proc = setup(c)
    if question:
        return ask(question[0], names, c, proc)
    for out in places.values():
        configs.writable(out)
    bench = data.load(c.benchmark, c.subset, c.data, c.forget_data, c.retain_data, train=False, holdout=c.audits) if (
        len(logs) < len(names) or c.retain_model and not c.retain_log) else None
    rows, every, stars = {}, {}, {}
    for name in names:
        retain, other = retain_reference(own[name], proc, bench), c.retain_log or own[name].retain_model
        itself = bool(other) and not c.retain_log and same(name, other)
        if name in logs:
            records = logs[name]
        elif itself:
            records = retain
        else:
            scorer, tokenizer = load(name, c, proc)
            _, records = evaluate(scorer, tokenizer, bench, c, proc)
        scores = summarize(records, retain, c)
        if proc.rank == 0:
            save_scores(places[name], scores, records)
        rows[labels[name]], every[labels[name]] = scores, records
        stars |= {f"retain model {os.path.basename(other)}": summarize(retain, None, c)} if retain else {}
    path = os.path.join(given.get("out", "out"), "comparison") if len(names) > 1 and proc.rank == 0 else None
    proc.say(configs.samples(every) + "\n\n" + configs.show_tables({"scores": rows}, ARROWS, path))
    if path:
        trajectory(f"{path}.png", {}, rows | stars, c)
        proc.say(f"\n{path}.png, {path}.md, {path}.csv")
    models.cleanup()


def same(name, other):
    return name == other or (os.path.isdir(name) and os.path.isdir(other) and models.fingerprint(name) == models.fingerprint(other))


def refuse_itself(name, c, given):
    """A truth ratio compared with itself gives a forget quality of 1 and says nothing."""
    for key in ("retain_model", "retain_log"):
        other = given.get(key)
        if other and (os.path.realpath(name) == os.path.realpath(other) or key == "retain_model" and same(name, other)):
            raise Mistake(f"--{key}={other}: this is {name} itself; name a model that never saw the forget set.")


if __name__ == "__main__":
    configs.run(main)
