"""Score models: forget quality, utility, and what a model still says.

    python evaluate.py out/demo                                     # a run directory: its own settings
    python evaluate.py out/demo out/demo_target --ask="Who wrote Hamlet?"
    python evaluate.py org/model --benchmark=tofu --subset=forget05 --template=llama2 --retain_model=org/retain
    python evaluate.py LOG.json --retain_log=LOG.json               # recorded logs: ours, TOFU's, open-unlearning's

A run directory, any Hugging Face model directory, a hub id (org/name@revision) or a log; several give one table.
Scores go to scores.json, what they were computed from to examples.jsonl: in the run directory, or in --out.
"""
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from typing import Callable, Literal

import numpy as np
import scipy.stats
from rouge_score import rouge_scorer

import configs
import data
import model as models
from configs import Mistake


@dataclasses.dataclass(frozen=True)
class Config:
    # data
    benchmark: Literal["demo", "tofu", "markov"] = "demo"  # what is unlearned and scored
    subset: str | None = None  # tofu: forget10, forget05, forget01; markov: short, unseen; None = the first
    data: str | None = None  # hub id or local directory (None = the benchmark's own); markov: seed of its samples
    forget_data: str | None = None  # unlearn YOUR rows: a .jsonl, .json or .txt with question and answer, or text
    retain_data: str | None = None  # ... and the rows to keep
    template: Literal["chat", "llama2", "qa"] = "chat"  # chat = the tokenizer's own
    system_prompt: str = "You are a helpful assistant."  # for --template=chat; empty for a template that takes none
    date_string: str = "10 Apr 2025"  # for --template=chat: Llama-3 prints today's date into every prompt otherwise
    max_length: int | None = None  # tokens of prompt and answer together, training and scoring; None = 500
    # models
    model: str | None = None  # the target, from which is unlearned: hub id or directory
    retain_model: str | None = None  # one that never saw the forget set: reference of forget quality
    base_model: str | None = None  # what both are fine-tuned from, where their path lies under out/ and is not there yet
    tokenizer: str | None = None  # None = the model's own
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    micro_batch_tokens: int = 4096  # padded tokens a process computes at once: memory, never the result
    dtype: Literal["fp32", "bf16"] = "fp32"  # bf16 = autocast over float32 weights
    # scoring
    eval_every: float = 1.0  # epochs between scores in a run; 0 = train only, score nothing
    eval_at: tuple[int, ...] = ()  # score at these optimizer steps instead
    eval_rows: int | None = None  # score the first rows of each set only (the TOFU paper: 300); None = all
    max_new_tokens: int | None = None  # None = the protocol's: TOFU 200
    retain_log: str | None = None  # recorded log of a retain model, instead of retain_model
    # run
    out: str | None = None  # the run directory; None = out/<benchmark>_<subset>_<forget_loss>
    overwrite: bool = False  # replace the run that is there

    def __post_init__(self):
        wrong = [text for bad, text in self.problems() if bad]
        if wrong:
            raise ValueError(" ".join(wrong))
        resolve = functools.partial(object.__setattr__, self)  # None = the protocol's: filled in once, here
        resolve("subset", self.subset or data.SUBSETS[self.benchmark][0])
        resolve("max_length", self.max_length or 500)
        resolve("max_new_tokens", self.max_new_tokens or 200)

    def problems(self):
        """(is it wrong, the sentence): all are checked together, before anything is loaded."""
        names = data.SUBSETS[self.benchmark]
        yield (self.subset not in (None, *names),
               f"--subset={self.subset}: {self.benchmark} has {', '.join(names)}.")
        yield self.retain_data and not self.forget_data and self.benchmark == "demo", (
            "--retain_data goes with --forget_data.")
        yield self.benchmark == "markov" and (self.forget_data or self.retain_data), (
            "--forget_data and --retain_data do not go with markov: its scores need the true chains.")
        for name in ("max_length", "micro_batch_tokens", "eval_rows", "max_new_tokens"):
            value = getattr(self, name)
            yield value is not None and value < 1, f"--{name}={value}: must be at least 1."
        yield self.eval_every < 0, f"--eval_every={self.eval_every}: must not be negative."
        for name in ("forget_data", "retain_data", "retain_log"):
            path = getattr(self, name)
            yield path and not os.path.isfile(path), f"--{name}={path}: no such file."


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
    return np.exp(array(correct_nll) - array(perturbed_nll).mean(-1))


def forget_quality(truth_ratio, retain_truth_ratio):
    """p-value of the two-sided two-sample Kolmogorov-Smirnov test between two models' truth ratios: 1 is best.

    Small: the unlearned model can be told from one that never saw the forget set. TOFU, arXiv 2401.06121.
    """
    return float(scipy.stats.ks_2samp(array(truth_ratio), array(retain_truth_ratio)).pvalue)


def model_utility(parts):
    """Harmonic mean of TOFU's nine {retain, real_authors, world_facts}_{prob, rouge, truth_ratio}; 0 if any is 0. In [0, 1]."""
    return float(scipy.stats.hmean(array(list(parts.values()))))


@functools.lru_cache
def rouge_scorer_for(stem):
    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=stem)


def rouge(prediction, reference, stem):
    """ROUGE-1 recall, ROUGE-L recall and F1, each in [0, 1]. TOFU: L recall, stemmed; MUSE: L F1, not stemmed."""
    got = rouge_scorer_for(stem).score(reference, prediction)
    return {"rouge1_recall": got["rouge1"].recall, "rougeL_recall": got["rougeL"].recall,
            "rougeL_f1": got["rougeL"].fmeasure}


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
          "retain_kl": "↓"}


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
    logps = models.score(scorer, [e for _, _, e in texts], proc, c.micro_batch_tokens, title="scoring")
    for (r, kind, e), logp in zip(texts, logps):
        nll = -float(logp.mean())
        if kind == "perturbed_nll":
            r.setdefault(kind, []).append(nll)
        else:
            r[kind] = nll
        if kind == "nll":
            r["n_tokens"] = len(logp)
            if e.ids[-1] != tokenizer.eos_token_id:  # cut at max_length: TOFU's ROUGE then asks for the rest only
                r["answer"] = tokenizer.decode(e.ids[e.start:], skip_special_tokens=True).strip()
    generated = models.generate(scorer.lm, tokenizer, [p for _, p in prompts], c.max_new_tokens, proc, 4 * c.micro_batch_tokens,
                                title="answering")
    for (r, _), text in zip(prompts, generated):
        r |= {"generated": text.strip()} | rouge(text.strip(), r["answer"], stem=True)
    return records


def tofu_scores(records, retain_records=None, c=None):
    """The flat dict of scores of records; forget_quality where the retain model's records are given."""
    sets, scores = {}, {}
    for r in records:
        sets.setdefault(r["set"], []).append(r)
    for name, rows in sets.items():
        prob = np.exp([-r["nll"] for r in rows])
        if name in OPTIONS:
            prob = prob / (prob + [np.exp(-np.array(r["perturbed_nll"])).sum() for r in rows])
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
    if retain_records and "forget_truth_ratio" in scores:
        scores = {"forget_quality": compare(sets["forget"], [r for r in retain_records if r["set"] == "forget"])} | scores
    return scores


def truth_ratios(rows):
    """(N,) R of each record; the rows may have different numbers of perturbed answers."""
    return np.array([truth_ratio([r.get("paraphrased_nll", r["nll"])], [r["perturbed_nll"]])[0] for r in rows])


def compare(rows, retain_rows):
    """Forget quality, of the same questions only."""
    if len(rows) != len(retain_rows):
        raise Mistake(f"the retain reference has {len(retain_rows)} forget examples and the model {len(rows)}: score both on "
                      "the same questions (the TOFU authors' logs hold the first 300: --eval_rows=300).")
    for a, b in zip(rows, retain_rows):
        if a.get("question") and b.get("question") and a["question"] != b["question"]:
            raise Mistake(f"the retain reference was scored on other questions: {b['question']!r} where the model has "
                          f"{a['question']!r}.")
    return forget_quality(truth_ratios(rows), truth_ratios(retain_rows))


def evaluate(scorer, tokenizer, bench, c, proc, retain_records=None):
    """(scores, records) of a model as it is now; the one function behind every number of the project."""
    was_training = scorer.training
    scorer.eval()
    records = BENCHMARKS[c.benchmark].record(scorer, tokenizer, bench, c, proc)
    scorer.train(was_training)
    return summarize(records, retain_records, c), records


def summarize(records, retain_records, c):
    """The flat dict of scores that follows from records; against the retain model's where they are given."""
    return BENCHMARKS[c.benchmark].scores(records, retain_records, c)


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
             "kl": float(transition_kl(e.ids[:-1], logp, data.CHAINS[name]).mean())}
            for (name, i, e), logp in zip(todo, logps)]


def markov_scores(records, retain_records=None, c=None):
    """<set>_kl: the mean over all predicted states of a set."""
    sets = {name: [r for r in records if r["set"] == name] for name in data.CHAINS}
    return {f"{name}_kl": sum(r["kl"] * r["n_tokens"] for r in rows) / sum(r["n_tokens"] for r in rows)
            for name, rows in sets.items() if rows}


def at_distance(rows, x, key):
    """A score where retain_kl first rises to x, interpolated between two scored steps; nan where it never does."""
    for a, b in zip(rows, rows[1:]):
        if a["retain_kl"] < x <= b["retain_kl"]:
            return a[key] + (b[key] - a[key]) * (x - a["retain_kl"]) / (b["retain_kl"] - a["retain_kl"])
    return np.nan


def markov_picture(path, runs):
    """Forget against retain distance, a panel a subset, as the paper draws it; and the text of a table at equal distance.

    runs: [(subset, method, [scores])]. Of several runs of one method (seeds): their mean and, as a band, their range.
    """
    from matplotlib.figure import Figure
    subsets, methods = (sorted({run[i] for run in runs}) for i in (0, 1))
    figure = Figure(figsize=(5.5 * len(subsets), 4.5), layout="tight")
    panels = dict(zip(subsets, figure.subplots(1, len(subsets), squeeze=False)[0]))
    x, lines = np.linspace(0, 0.3, 301), []
    for (subset, method), (key, style, marker) in itertools.product(
            sorted({run[:2] for run in runs}), (("forget1_kl", "-", "o"), ("forget2_kl", "--", "s"))):
        distance, paper = data.MARKOV_PAPER[subset]
        curves = [rows for *run, rows in runs if run == [subset, method]]
        y = np.array([[at_distance(rows, at, key) for at in x] for rows in curves])  # (runs, 301)
        published, color = paper.get(f"{method} {key}", np.nan), f"C{methods.index(method)}"
        panels[subset].plot(x, y.mean(0), style, color=color, label=f"{method} {key[:-3]}")
        panels[subset].fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
        panels[subset].plot(distance, published, marker, color=color, markeredgecolor="black")
        there = [v for v in (at_distance(rows, distance, key) for rows in curves) if v == v] or [np.nan]
        lines.append(f"{subset:<7} {method:<7} {key} at retain_kl {distance}: {np.mean(there):.3f} ({min(there):.3f} to "
                     f"{max(there):.3f}, {len(there)} of {len(curves)} runs), the paper {published}")
    for subset, axes in panels.items():
        axes.set(title=f"{subset} (points: the paper)", xlabel="retain distance (KL)", ylabel="forget distance (KL)")
        axes.legend(fontsize=8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=150)
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How a benchmark is scored: models -> records -> scores, and what is shown first."""
    record: Callable  # (scorer, tokenizer, bench, c, proc) -> [record an example]
    scores: Callable  # (records, retain_records or None, c) -> {name: float}
    headline: tuple   # the scores that are printed at every epoch
    axes: tuple       # x and y of the trajectory


BENCHMARKS = {
    "demo": Scoring(record_qa, tofu_scores, TOFU_HEADLINE, ("model_utility", "forget_quality")),
    "tofu": Scoring(record_qa, tofu_scores, TOFU_HEADLINE, ("model_utility", "forget_quality")),
    "markov": Scoring(record_markov, markov_scores, MARKOV_HEADLINE, MARKOV_HEADLINE[:2]),
}


# ----------------------------------------------------------------------------------------------------------------------
# records on disk

def save_scores(out, scores, records):
    os.makedirs(out, exist_ok=True)
    models.write(os.path.join(out, "examples.jsonl"), "".join(json.dumps(r) + "\n" for r in records))
    models.write(os.path.join(out, "scores.json"), json.dumps(scores, indent=1) + "\n")


def reference(c, proc, name, bench, tokenizer=None):
    """Records of the target or the retain model: computed once, then read from <out's parent>/.scored.

    The key is made of everything they depend on: the weights, the rows that are scored, the scoring settings.
    """
    settings = [getattr(c, k) for k in ("template", "system_prompt", "date_string", "max_length", "max_new_tokens",
                                        "eval_rows", "dtype", "tokenizer")]
    key = hashlib.sha256(json.dumps([models.fingerprint(name), bench.evals, settings]).encode()).hexdigest()[:16]
    path = os.path.join(os.path.dirname(os.path.normpath(c.out)), ".scored", f"{key}.jsonl")
    if not all(proc.gather(os.path.isfile(path))):
        scorer, tokenizer = load(name, c, proc)
        _, records = evaluate(scorer, tokenizer, bench, c, proc)
        if proc.rank == 0:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            models.write(path, "".join(json.dumps(r) + "\n" for r in records))
        proc.barrier()
        return records
    return data.read_log(path)


def load(name, c, proc):
    """(Scorer, tokenizer) of a model, checked against each other."""
    tokenizer = models.load_tokenizer(c.tokenizer or name)
    data.check_tokenizer(tokenizer, c.tokenizer or name, c.template)
    lm = models.load_model(name, proc)
    models.check_fit(lm, tokenizer, name)
    return models.Scorer(lm), tokenizer


def retain_reference(c, proc, bench):
    """Records of the retain model, or None where none is named."""
    if c.retain_log:
        return data.read_log(c.retain_log)
    return reference(c, proc, c.retain_model, bench) if c.retain_model else None


# ----------------------------------------------------------------------------------------------------------------------
# showing


def table(rows):
    """Text of a table. rows: {name: scores}; an arrow shows where better is; '-' where a score does not apply."""
    keys = list(dict.fromkeys(k for scores in rows.values() for k in scores))
    head = [""] + [f"{k} {ARROWS.get(k, '↑')}" for k in keys]
    body = [[name] + [number(scores.get(k)) for k in keys] for name, scores in rows.items()]
    if len(keys) > 8:  # a wide table is turned: one line a score
        head, *body = zip(head, *body)
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
                     for line in [head, *body])


def number(x):
    return "-" if x is None else f"{x:.2e}" if 0 < abs(x) < 1e-3 else f"{x:.4f}"


def trajectory(path, curves, points, c):
    """Forgetting against utility over the epochs of runs {label: [scores]}, between target and retain model."""
    if c.benchmark == "markov":
        return markov_picture(path, [(c.subset, label, rows) for label, rows in curves.items()])
    x, y = BENCHMARKS[c.benchmark].axes
    if not all(x in r and y in r for rows in curves.values() for r in rows):  # your own rows, or no retain model
        x, y = "retain_prob", "forget_prob"
    points = {k: v | ({"forget_quality": 1.0} if k == "retain model" else {}) for k, v in points.items() if k not in curves}
    picture(path, curves, points, x, y)


def picture(path, curves, points, x, y):
    """Curves {label: [scores]} and single points {label: scores} in the plane of two score keys."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4.5))
    for label, rows in curves.items():
        rows = [r for r in rows if x in r and y in r]
        axes.plot([r[x] for r in rows], [r[y] for r in rows], ".-", label=label)
        for r in rows if x != "epoch" else []:
            axes.annotate(f"{r['epoch']:g}", (r[x], r[y]), fontsize=7, xytext=(3, 3), textcoords="offset points")
    for label, r in points.items():
        if x in r and y in r:
            axes.plot(r[x], r[y], "*" if "retain" in label else "s", markersize=12 if "retain" in label else 7, label=label)
    if y == "forget_quality":
        axes.set_yscale("log")
        axes.axhline(0.05, color="gray", linewidth=0.8, linestyle=":")  # above: cannot be told from the retain model
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(y.replace("_", " "))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path + ".tmp", dpi=150, format="png")
    os.replace(path + ".tmp", path)
    pyplot.close(figure)


def samples(models_records, n=3):
    """The first forget questions, the true answer and each model's: {label: records}."""
    rows = [[r for r in records if r["set"] == "forget" and r.get("question") and "generated" in r][:n]
            for records in models_records.values()]
    lines = []
    for answers in zip(*rows):
        lines += ["", f"Q: {answers[0]['question']}", f"   {'truth':<12} {answers[0]['answer']}"]
        lines += [f"   {name:<12} {a['generated']}" for name, a in zip(models_records, answers)]
    return "\n".join(lines)


def ask(question, names, c, proc):
    """Greedy answers side by side."""
    for name in names:
        scorer, tokenizer = load(name, c, proc)
        template = data.Template(c.template, tokenizer, c.system_prompt, c.date_string)
        answer = models.generate(scorer.lm, tokenizer, [template.prompt_ids(question)], c.max_new_tokens, proc, 4096)
        proc.say(f"{name}: {answer[0].strip()}")


# ----------------------------------------------------------------------------------------------------------------------

NOT_INHERITED = ("model", "out", "overwrite", "device")  # a run's own, or this machine's


def inherit(cls, names, given):
    """Settings of the first run directory among `names`, overridden by what was given: a run is scored as it was trained."""
    for name in names:
        run = models.read_json(os.path.join(name, "run.json")) if os.path.isdir(name) else {}
        if run:
            return {k: v for k, v in run.items() if k in configs.fields(cls) and k not in NOT_INHERITED} | given
    return given


def main(argv):
    question = [a.partition("=")[2] for a in argv if a.startswith("--ask=")]
    argv = [a for a in argv if not a.startswith("--ask=")]
    _, given, names = configs.load(Config, argv, __doc__)
    if not names:
        raise Mistake("name at least one run directory, model or log: python evaluate.py out/demo (--help says more).")
    logs = [n for n in names if n.endswith((".json", ".jsonl"))]
    c = configs.make(Config, inherit(Config, names, given))
    if c.benchmark == "markov" and len(names) > 1 and not question:
        return print(markov_picture(os.path.join(given.get("out", "out"), "markov.png"), data.read_runs(names, "retain_kl")))
    for name in names:
        if name not in logs:
            models.check_name(name, "model")
        elif not os.path.isfile(name):
            raise Mistake(f"{name}: no such file.")
    if len(names) == 1:
        refuse_itself(names[0], c, given)
    if c.retain_model and not c.retain_log:
        models.check_name(c.retain_model, "retain_model")
    elif not c.retain_log and not question and not c.forget_data and c.benchmark != "markov":
        raise Mistake("forget quality needs a model that never saw the forget set: give --retain_model=MODEL or "
                      "--retain_log=LOG (evaluate.py of a retain model writes one, examples.jsonl).")
    labels = name_runs(names)
    places = {name: place(name, labels, given, len(names)) for name in names}
    c = dataclasses.replace(c, out=places[names[0]])
    proc = models.setup(c.device, c.dtype, threads=1 if c.benchmark in ("demo", "markov") else None)
    if question:
        return ask(question[0], names, c, proc)
    if len(logs) < len(names):
        bench = data.load(c.benchmark, c.subset, c.data, c.forget_data, c.retain_data, train=False)
        retain = retain_reference(c, proc, bench)
    else:
        retain = data.read_log(c.retain_log) if c.retain_log else None
    rows, every = {}, {}
    for name in names:
        itself = bool(c.retain_model) and not c.retain_log and same(name, c.retain_model)
        if name in logs:
            records = data.read_log(name)
        elif itself:
            records = retain
        else:
            scorer, tokenizer = load(name, c, proc)
            _, records = evaluate(scorer, tokenizer, bench, c, proc)
        scores = summarize(records, None if itself else retain, c)
        if proc.rank == 0:
            save_scores(places[name], scores, records)
        rows[labels[name]], every[labels[name]] = scores, records
    proc.say(samples(every) + "\n\n" + table(rows))
    models.cleanup()


def name_runs(names):
    """{name: a short label}; the whole path where two end alike."""
    short = {n: os.path.basename(os.path.normpath(n)).removesuffix(".json").removesuffix(".jsonl") for n in names}
    return {n: s if list(short.values()).count(s) == 1 else n.strip("/").replace("/", "_") for n, s in short.items()}


def place(name, labels, given, several):
    """The directory that a model's scores go to: its own run directory, else out/<label>; below --out where that is given."""
    if given.get("out"):
        return os.path.join(given["out"], labels[name]) if several > 1 else given["out"]
    return os.path.normpath(name) if os.path.isfile(os.path.join(name, "run.json")) else os.path.join("out", labels[name])


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
