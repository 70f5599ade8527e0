"""Attack unlearned models: does what was forgotten come back?

    python relearn.py out/demo                                   # fine-tune on 20 % of the forget set, score the other 80 %
    python relearn.py out/demo --attacks=relearn_random,relearn_shortest,int8,int4,nf4,fp4,paraphrase --seeds=0,1,2
    python relearn.py out/simnpo_s0 out/npo_s0 out/npo_s1 --attacks=int4,audits   # one table over runs, and over seeds
    # Unlearn-Smooth's protocol on MUSE Books: runs of 50, 75 and 100 steps (News: 100, 125, 150)
    python relearn.py out/books --steps=50 --eval_at=50 --schedule=cosine --fraction=1 --lr=1e-5
    python relearn.py org/model --benchmark=tofu --subset=forget05 --template=llama2 --model=org/target --retain_model=org/retain

The retain model, which never saw any of it, is attacked the same way, once: what it learns is no memory coming back.
Several runs are attacked alike, with the first one's settings (lr, template, ...), each against its own target and retain
model. A run's rows go to its relearn.json, its table to relearn.md and .csv, its curves to relearn.png (or below --out); the
table over several runs to out/relearn.md and .csv (or in --out).
"""
import dataclasses
import functools
import json
import os
import random

import numpy as np
import torch
from tqdm import tqdm

import configs
import data
import evaluate
import model as models
import unlearn
from configs import Mistake


@dataclasses.dataclass(frozen=True)
class Config(unlearn.Config):
    # the attack
    attacks: tuple[str, ...] = ("relearn_random",)  # or _shortest, _longest; int8, int4, nf4, fp4, paraphrase, audits
    fraction: float = 0.2  # relearn: how many of the forget examples are learned again
    examples: int | None = None  # relearn: how many, as a number
    relearn_data: str | None = None  # relearn: fine-tune on these rows instead (benign data)
    seeds: tuple[int, ...] = (0,)  # relearn: one curve a seed
    control: bool = True  # attack the retain model too
    utility: bool = False  # score the other sets after each attack too
    # optimisation, where an attack differs from unlearning; lr, weight_decay, adam_beta2 and grad_clip are the run's own
    epochs: float = 10.0
    batch_size: int = 4

    def problems(self):
        yield from super().problems()
        wrong = [name for name in self.attacks if name not in ATTACKS]
        yield wrong or not self.attacks, f"--attacks={','.join(self.attacks)}: any of {', '.join(ATTACKS)}."
        yield from self.each("fraction", lambda v: 0 < v <= 1, "must be above 0 and at most 1.")
        yield from self.each("examples", lambda n: n >= 1, "must be at least 1.")
        yield min(self.seeds, default=-1) < 0, f"--seeds={','.join(map(str, self.seeds))}: at least one, none below 0."
        yield self.eval_every == 0 and not self.eval_at, "--eval_every=0: an attack is scored; above 0, or --eval_at=STEP."
        yield self.parallel == "fsdp" and set(self.attacks) & set(GRIDS), "--attacks: rounding needs whole weights: --parallel=ddp."
        yield self.benchmark == "markov", "--benchmark=markov: relearn.py has no attack on Markov chains."
        yield from self.each("relearn_data", os.path.isfile, "no such file.")


# an attack fine-tunes on the plain answers, from the model as it is: what it would ignore is refused
FIXED = {"forget_loss": "nll", "retain_loss": "none", "forget_weight": 1.0, "audits": False, "resume": False, "save_every": 0.0}
IGNORED = dict.fromkeys([*FIXED, "retain_weight", "beta", "gamma", "alpha", "beta1", "beta2", "steering_layer", "alternates",
                         "steering_scale", "task_vector_scale", "refusals", "keep_epochs"], "leave it out") | {
    "audits": "write --attacks=audits", "seed": "write --seeds=0,1,2"}


# ----------------------------------------------------------------------------------------------------------------------
# attacks: (a, choose or grid) -> rows of {step, epoch, scores}; every one scores through the same evaluate


@dataclasses.dataclass
class Attacked:
    """What an attack works on: one model, its data and what it is compared with."""
    c: Config
    proc: models.Process
    name: str  # the model
    label: str
    bench: data.Benchmark
    retain: list  # the retain model's records, or None
    before: list  # this model's own, before the attack; None for the control
    target: list  # those of the model it was unlearned from, or None
    seed: int = 0

    def score(self, scorer, tokenizer, seen=()):
        """The scores, those of the questions not in `seen`, and what share of what was forgotten is back."""
        scores, records = evaluate.evaluate(scorer, tokenizer, self.bench, self.c, self.proc, self.retain)
        others = unseen(records, seen) if seen else []
        if others and others[0]["set"] == "forget":
            scores |= {f"unseen_{k}": v for k, v in evaluate.summarize(others, unseen(self.retain, seen) or None, self.c).items()}
        sides = [known(r, seen) for r in (records, self.before, self.target)]
        if None not in sides:  # of the same questions, all three
            scores["recovered"] = recovered(*sides)
        return scores


def unseen(records, seen=()):
    """The records that tell what is known of the forget set, but for the questions in `seen`. MUSE: its questions on it."""
    records = [r for r in records or [] if r["set"] in ("forget", "knowmem_f")]
    return [r for r in records if (r.get("question") or r.get("answer")) not in seen]


def known(records, seen=()):
    """How much of it is known: the mean probability of the forget answers (MUSE: ROUGE), or None."""
    values = [float(np.exp(-r["nll"])) if r["set"] == "forget" else r["rougeL_f1"] for r in unseen(records, seen)]
    return float(np.mean(values)) if values else None


def recovered(attacked, unlearned, target):
    """(attacked - unlearned) / (target - unlearned) of what is known: 0 = stays forgotten, 1 = all is back.

    None where so little had been forgotten (a difference below 0.05) that the share means nothing.
    """
    return (attacked - unlearned) / (target - unlearned) if abs(target - unlearned) >= 0.05 else None


CHOOSE = {  # (examples, k, rng) -> k indices
    "random": lambda examples, k, rng: rng.sample(range(len(examples)), k),
    "shortest": lambda examples, k, rng: sorted(range(len(examples)), key=lambda i: len(examples[i].ids) - examples[i].start)[:k],
    "longest": lambda examples, k, rng: sorted(range(len(examples)), key=lambda i: examples[i].start - len(examples[i].ids))[:k],
}


def relearn(a, choose):
    """Fine-tune on some forget examples (or on benign rows) with the project's own loop; scored at each epoch."""
    scorer, tokenizer = evaluate.load(a.name, a.c, a.proc)
    rows = data.read_own(a.c.relearn_data) if a.c.relearn_data else a.bench.forget
    examples, kept = unlearn.encode_sets(a.c, tokenizer, a.proc, forget=rows, retain=[])
    n = len(examples["forget"])
    k = min(n, a.c.examples or max(1, round(a.c.fraction * n)))
    chosen = CHOOSE[choose](examples["forget"], k, random.Random(f"{a.seed} relearn"))
    seen = {kept["forget"][i].get("question") or kept["forget"][i].get("text") for i in chosen if i < len(kept["forget"])}
    examples["forget"] = [examples["forget"][i] for i in chosen]
    curve = []

    def on_score(step, epoch):
        curve.append({"step": step, "epoch": epoch} | a.score(scorer, tokenizer, seen))
        return curve[-1]

    c = dataclasses.replace(a.c, seed=a.seed, out=os.path.join(a.c.out, "relearn", f"{a.label}_{choose}_{a.seed}"))
    os.makedirs(c.out, exist_ok=True)
    unlearn.train(c, a.proc, scorer, examples, on_score, title=f"relearn {a.label}")
    return curve


def normal_float_4():
    """NF4 (arXiv 2305.14314): 16 quantiles of a normal distribution with an exact 0, scaled to [-1, 1]."""
    def quantiles(n):
        return torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1])
    values = torch.cat([quantiles(9), torch.zeros(1, dtype=torch.float64), -quantiles(8)]).sort().values
    return (values / values.abs().max()).float()


# int8 here rounds weights in blocks of 64 and nothing else.
# It is not LLM.int8, which rounds activations too and keeps outliers.
FP4 = torch.tensor([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])  # bitsandbytes' 4-bit float: 2 exponent bits, 1 of mantissa
GRIDS = {"int8": torch.arange(-127, 128) / 127, "int4": torch.arange(-7, 8) / 7, "nf4": normal_float_4(),
         "fp4": torch.cat([-FP4.flip(0), FP4[1:]])}


@torch.no_grad()
def round_weights(lm, name, block=64):
    """Round every matrix but embeddings and output head to the grid, each `block` of weights scaled by its largest."""
    grid = GRIDS[name].to(lm.device)
    kept = [m for m in lm.modules() if isinstance(m, torch.nn.Embedding)] + [lm.get_output_embeddings()]
    kept = {p for m in kept for p in m.parameters()}
    for weight in (p for p in lm.parameters() if p.ndim > 1 and p not in kept):  # GPT-2's and fused experts' are no nn.Linear
        flat = weight.flatten()
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
        nearest = torch.bucketize(blocks / scale, (grid[1:] + grid[:-1]) / 2)
        weight.copy_((grid[nearest] * scale).flatten()[:len(flat)].view_as(weight))


def quantize(a, grid):
    """Round the weights to a coarse grid (arXiv 2410.16454: forgetting may vanish)."""
    scorer, tokenizer = evaluate.load(a.name, a.c, a.proc)
    round_weights(scorer.lm, grid)
    return [{"step": 0, "epoch": 0.0} | a.score(scorer, tokenizer)]


def paraphrase(a, _):
    """Ask otherwise than in training. No forget quality: the retain reference was asked the plain questions."""
    rows = a.bench.evals["forget"]
    bench = dataclasses.replace(a.bench, evals={"forget": [row | {"question": row["paraphrased_question"]} for row in rows]})
    a = dataclasses.replace(a, bench=bench, retain=None)
    return [{"step": 0, "epoch": 0.0} | a.score(*evaluate.load(a.name, a.c, a.proc))]


def audit(a, _):
    """No attack on the weights: what they still tell (memorization, and membership against the holdout set)."""
    a = dataclasses.replace(a, c=dataclasses.replace(a.c, audits=True), retain=a.retain if a.before else None, before=None)
    return [{"step": 0, "epoch": 0.0} | a.score(*evaluate.load(a.name, a.c, a.proc))]


ATTACKS = {f"relearn_{name}": (relearn, name) for name in CHOOSE}
ATTACKS |= {name: (quantize, name) for name in GRIDS} | {"paraphrase": (paraphrase, None), "audits": (audit, None)}


def attack(a, name, seed, control=None):
    """Rows of one attack on a model, or on its control."""
    act, how = ATTACKS[name]
    a = dataclasses.replace(a, seed=seed, **{"name": control, "label": "retain model", "before": None} if control else {})
    return [{"attack": name, "model": a.label, "seed": seed} | row for row in act(a, how)]


# ----------------------------------------------------------------------------------------------------------------------
# the report


SHOWN = ("unseen_forget_prob", "unseen_forget_rouge", "forget_prob", "forget_rouge", "forget_quality", "model_utility",
         "verbmem_f", "knowmem_f", "knowmem_r", "recovered", "mia_min_k", "extraction_strength", "privleak")
ARROWS = evaluate.ARROWS | {"unseen_forget_prob": "↓", "unseen_forget_rouge": "↓", "recovered": "↓"}


def report(a, curves):
    """One model's table (before unlearning, after, after each attack, retain model; mean and spread over seeds) and picture."""
    keys = [k for k in SHOWN if any(k in row for row in curves)][:8]  # as many as stay readable; relearn.json has all
    stages = {"before unlearning": a.target, f"{a.label}, unlearned": a.before, "retain model": a.retain}
    lines = {stage: evaluate.summarize(records, a.retain, a.c) for stage, records in stages.items() if records}
    groups = {}
    for row in curves:
        groups.setdefault((row["model"], row["attack"]), {}).setdefault(row["seed"], []).append(row)
    for (model, name), seeds in groups.items():
        for when, i in (("at the start of", 0), ("after", -1))[0 if name.startswith("relearn") else 1:]:
            values = {k: [rows[i].get(k) for rows in seeds.values()] for k in keys}
            lines[f"{model}, {when} {name}"] = {k: (float(np.mean(v)), float(np.std(v, ddof=1))) if len(v) > 1 else v[0]
                                                for k, v in values.items() if None not in v}
    tables = {"scores": {stage: {k: v.get(k) for k in keys} for stage, v in lines.items()}}
    a.proc.say("\n" + configs.show_tables(tables, ARROWS, os.path.join(a.c.out, "relearn")))
    drawn = {f"{m}, {n}, seed {s}": rows for (m, n), seeds in groups.items() for s, rows in seeds.items() if len(rows) > 1}
    if drawn:
        configs.picture(os.path.join(a.c.out, "relearn.png"), drawn, {}, "epoch", keys[0])
    a.proc.say(f"\n{a.c.out}: relearn.json, relearn.md, relearn.csv{', relearn.png' if drawn else ''}")


def compare(path, runs, proc):
    """Tables over runs {label: ({stage: records before any attack}, rows, which model's)}, the control among them."""
    after, back, told = {}, {}, {}
    for label, (stages, rows, model) in runs.items():
        after[label] = {stage: value for stage, records in stages.items() if (value := known(records)) is not None}
        for name in dict.fromkeys(r["attack"] for r in rows):
            ends = list({r["seed"]: r for r in rows if (r["attack"], r["model"]) == (name, model)}.values())  # a seed's last row
            mean = {k: float(np.mean(v)) for k in ends[0] if k not in ("attack", "model") and None not in (v := [
                r.get(k) for r in ends])}
            if name == "audits":
                told[label] = {k: v for k, v in mean.items() if k.startswith(("mia_", "ex", "privleak"))}
                continue
            after[label][name] = mean.get("unseen_forget_prob", mean.get("forget_prob", mean.get("knowmem_f", 0) / 100))
            if "recovered" in mean:
                back.setdefault(label, {})[name] = mean["recovered"]
    tables = {"known of the forget set (after relearning: of the rest of it)": after, "recovered": back, "audits": told}
    arrows = dict.fromkeys(("before unlearning", "unlearned", *ATTACKS), "") | evaluate.ARROWS
    proc.say("\n" + configs.show_tables({t: r for t, r in tables.items() if r}, arrows, path) + f"\n\n{path}.md, {path}.csv")


def main(argv):
    given, names = configs.parse(Config, argv, __doc__)  # a run directory may bring the rest
    if not names:
        raise Mistake("name at least one run directory or model: python relearn.py out/demo (--help says more).")
    for word in argv:
        if (key := word.removeprefix("--").partition("=")[0]) in IGNORED:
            raise Mistake(f"{word}: attacks do not read {key}; {IGNORED[key]}.")
    first = next(filter(None, (configs.read_json(os.path.join(name, "run.json")) for name in names)), {})
    own = {k: first[k] for k in ("lr", "weight_decay", "adam_beta2", "grad_clip", "model") if k in first}
    c = configs.make(Config, own | evaluate.inherit(evaluate.Config, names, given) | given | FIXED)
    labels, todo = configs.name_runs(names), {}
    for name in names:
        a = dataclasses.replace(c, out=configs.place(name, labels, given, len(names)))
        todo[name] = a = evaluate.against(name, a, given)
        for setting, model in (("model", name), ("model", a.model), ("retain_model", a.retain_model)):
            configs.check_name(model or name, setting)
        configs.writable(a.out)
    proc = evaluate.setup(c)
    bench = data.load(c.benchmark, c.subset, c.data, c.forget_data, c.retain_data, split=c.split, holdout="audits" in c.attacks)
    if not c.utility and "forget" in bench.evals:
        bench.evals = {"forget": bench.evals["forget"]}
    if c.control and not all(a.retain_model for a in todo.values()):
        proc.say("No retain_model: there is no control, so what is relearned cannot be told from what is newly learned.")
    if "paraphrase" in c.attacks and not all("paraphrased_question" in r for r in bench.evals.get("forget", [{}])):
        raise Mistake("--attacks=paraphrase: the forget set has no column paraphrased_question.")
    references = dataclasses.replace(todo[names[0]], audits="audits" in c.attacks)
    scored = functools.cache(lambda model: evaluate.reference(references, proc, model, bench) if model else None)
    attacked = functools.cache(lambda control, name, seed: attack(a, name, seed, control))  # once, for all runs
    jobs = [(name, seed) for name in c.attacks for seed in (c.seeds if ATTACKS[name][0] is relearn else c.seeds[:1])]
    compared = {}
    for run, c in todo.items():
        retain = data.read_log(c.retain_log) if c.retain_log else scored(c.retain_model)
        a = Attacked(c, proc, run, labels[run], bench, retain, scored(run), scored(c.model))
        rows, control = [], c.control and c.retain_model
        for name, seed in tqdm(jobs, desc=f"attacks on {a.label}", disable=proc.rank > 0 or None):
            rows += attack(a, name, seed) + (attacked(control, name, seed) if control else [])
            if proc.rank == 0:  # what is done is kept, whatever becomes of the next attack
                os.makedirs(c.out, exist_ok=True)
                configs.write(os.path.join(c.out, "relearn.json"), json.dumps(rows, indent=1) + "\n")
        if proc.rank == 0:
            report(a, rows)
        compared[a.label] = {"before unlearning": a.target, "unlearned": a.before}, rows, a.label
        if control:
            label = os.path.basename(os.path.normpath(control))
            compared.setdefault(label, ({"unlearned": scored(control)}, rows, "retain model"))
    if len(names) > 1 and proc.rank == 0:
        compare(os.path.join(given.get("out", "out"), "relearn"), compared, proc)
    models.cleanup()


if __name__ == "__main__":
    configs.run(main)
