"""Attack unlearned models: does what was forgotten come back?

    python relearn.py out/demo                                   # fine-tune on 20 % of the forget set, score the other 80 %
    python relearn.py out/demo --attacks=relearn_random,relearn_shortest,int8,int4,nf4,fp4,paraphrase --seeds=0,1,2
    python relearn.py out/books --steps=100 --eval_at=50,75,100 --fraction=1 --lr=1e-5 --batch_size=4   # MUSE's protocol
    python relearn.py org/model --benchmark=tofu --subset=forget05 --template=llama2 --model=org/target --retain_model=org/retain

The retain model, which never saw any of it, is attacked the same way: what it learns is no memory coming back.
A run directory brings its own settings; curves go to its relearn.json and relearn.png (or below --out).
"""
import dataclasses
import json
import os
import random

import numpy as np
import torch

import configs
import data
import evaluate
import model as models
import unlearn
from configs import Mistake


@dataclasses.dataclass(frozen=True)
class Config(unlearn.Config):
    # the attack
    attacks: tuple[str, ...] = ("relearn_random",)  # any of the table ATTACKS below
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
        yield not 0 < self.fraction <= 1, f"--fraction={self.fraction}: must be above 0 and at most 1."
        yield self.examples is not None and self.examples < 1, f"--examples={self.examples}: must be at least 1."
        yield self.parallel == "fsdp" and set(self.attacks) & set(GRIDS), "--attacks: rounding needs whole weights: --parallel=ddp."
        yield not self.seeds, "--seeds=: name at least one."
        yield self.benchmark == "markov", "--benchmark=markov: relearn.py has no attack on Markov chains."
        yield self.relearn_data and not os.path.isfile(self.relearn_data), f"--relearn_data={self.relearn_data}: no such file."


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
    seed: int

    def score(self, scorer, tokenizer, seen=()):
        """The scores, those of the questions not in `seen`, and what share of what was forgotten is back."""
        def unseen(records):
            return [r for r in records or [] if r["set"] == "forget" and (r.get("question") or r.get("answer")) not in seen]

        scores, records = evaluate.evaluate(scorer, tokenizer, self.bench, self.c, self.proc, self.retain)
        if seen and unseen(records):
            others = evaluate.summarize(unseen(records), unseen(self.retain) or None, self.c)
            scores |= {f"unseen_{k}": v for k, v in others.items()}
        sides = [unseen(r) for r in (records, self.before, self.target)]
        if all(sides):  # of the same questions, all three
            scores["recovered"] = recovered(*(float(np.mean([np.exp(-r["nll"]) for r in side])) for side in sides))
        return scores


def recovered(attacked, unlearned, target):
    """(attacked - unlearned) / (target - unlearned) of the forget answers' mean probability: 0 = stays forgotten, 1 = all is back.

    None where so little had been forgotten (a difference below 0.05) that the share means nothing.
    """
    return (attacked - unlearned) / (target - unlearned) if abs(target - unlearned) >= 0.05 else None


def answer_length(example):
    return len(example.ids) - example.start


CHOOSE = {  # (examples, k, rng) -> k indices
    "random": lambda examples, k, rng: rng.sample(range(len(examples)), k),
    "shortest": lambda examples, k, rng: sorted(range(len(examples)), key=lambda i: answer_length(examples[i]))[:k],
    "longest": lambda examples, k, rng: sorted(range(len(examples)), key=lambda i: -answer_length(examples[i]))[:k],
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
    if a.proc.rank == 0:
        os.makedirs(c.out, exist_ok=True)
    a.proc.barrier()
    unlearn.train(c, a.proc, scorer, examples, on_score, title=f"relearn {a.label}")
    return curve


def normal_float_4():
    """NF4 (arXiv 2305.14314): 16 quantiles of a normal distribution with an exact 0, scaled to [-1, 1]."""
    def quantiles(n):
        return torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1])
    values = torch.cat([quantiles(9), torch.zeros(1, dtype=torch.float64), -quantiles(8)]).sort().values
    return (values / values.abs().max()).float()


FP4 = torch.tensor([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])  # bitsandbytes' 4-bit float: 2 exponent bits, 1 of mantissa
GRIDS = {"int8": torch.arange(-127, 128) / 127, "int4": torch.arange(-7, 8) / 7, "nf4": normal_float_4(),
         "fp4": torch.cat([-FP4.flip(0), FP4[1:]])}


@torch.no_grad()
def round_weights(lm, name, block=64):
    """Round the weights of every linear layer but the output head to the grid, each `block` of them scaled by its largest."""
    grid = GRIDS[name].to(lm.device)
    for layer in lm.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not lm.get_output_embeddings():
            flat = layer.weight.flatten()
            blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
            scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
            nearest = torch.bucketize(blocks / scale, (grid[1:] + grid[:-1]) / 2)
            layer.weight.copy_((grid[nearest] * scale).flatten()[:len(flat)].view_as(layer.weight))


def quantize(a, grid):
    """Round the weights of all linear layers but the output head to a coarse grid (arXiv 2410.16454: forgetting may vanish)."""
    scorer, tokenizer = evaluate.load(a.name, a.c, a.proc)
    round_weights(scorer.lm, grid)
    return [{"step": 0, "epoch": 0.0} | a.score(scorer, tokenizer)]


def paraphrase(a, _):
    """Ask otherwise than in training. No forget quality: the retain reference was asked the plain questions."""
    rows = a.bench.evals["forget"]
    bench = dataclasses.replace(a.bench, evals={"forget": [row | {"question": row["paraphrased_question"]} for row in rows]})
    a = dataclasses.replace(a, bench=bench, retain=None)
    return [{"step": 0, "epoch": 0.0} | a.score(*evaluate.load(a.name, a.c, a.proc))]


ATTACKS = {f"relearn_{name}": (relearn, name) for name in CHOOSE}
ATTACKS |= {name: (quantize, name) for name in GRIDS} | {"paraphrase": (paraphrase, None)}


# ----------------------------------------------------------------------------------------------------------------------
# the report


def report(place, label, curves, target, proc):
    """The table (before unlearning, after, after each attack, retain model; mean and spread over seeds) and the picture."""
    keys = [k for k in SHOWN if any(k in row for row in curves)]
    groups = {}
    for row in curves:
        groups.setdefault((row["model"], row["attack"]), {}).setdefault(row["seed"], []).append(row)
    lines = {"before unlearning": {k: target[k] for k in keys if k in target}}
    for (model, name), seeds in groups.items():
        for when, i in (("at the start of", 0), ("after", -1))[0 if name.startswith("relearn") else 1:]:
            ends = [rows[i] for rows in seeds.values()]
            lines[f"{model}, {when} {name}"] = {k: spread([r[k] for r in ends]) for k in keys
                                                if all(r.get(k) is not None for r in ends)}
    proc.say("\n" + configs.table(lines, evaluate.ARROWS | {"recovered": "↓", "unseen_forget_prob": "↓", "unseen_forget_rouge": "↓"}))
    drawn = {f"{m}, {n}, seed {s}": rows for (m, n), seeds in groups.items() for s, rows in seeds.items() if len(rows) > 1}
    if drawn:
        configs.picture(os.path.join(place, "relearn.png"), drawn, {}, "epoch", keys[0])
    proc.say(f"\n{place}: relearn.json{', relearn.png' if drawn else ''}")


SHOWN = ("unseen_forget_prob", "unseen_forget_rouge", "forget_prob", "forget_rouge", "forget_quality", "model_utility",
         "verbmem_f", "knowmem_f", "knowmem_r", "privleak", "recovered")


def spread(values):
    return (float(np.mean(values)), float(np.std(values, ddof=1))) if len(values) > 1 else values[0]


def main(argv):
    _, given, names = configs.load(Config, argv, __doc__)
    if not names:
        raise Mistake("name at least one run directory or model: python relearn.py out/demo (--help says more).")
    for name in names:
        models.check_name(name, "model")
    run = configs.read_json(os.path.join(names[0], "run.json"))
    own = {k: run[k] for k in ("lr", "weight_decay", "adam_beta2", "grad_clip", "model") if k in run}
    fixed = {"forget_loss": "nll", "retain_loss": "none", "forget_weight": 1.0, "audits": False, "resume": False}
    for setting in ("model", "retain_model"):
        if given.get(setting):
            models.check_name(given[setting], setting)
    c = configs.make(Config, own | evaluate.inherit(evaluate.Config, names, given) | given | fixed)
    proc = models.setup(c.device, c.dtype, c.parallel, threads=1 if c.benchmark == "demo" else None)
    labels = configs.name_runs(names)
    bench = data.load(c.benchmark, c.subset, c.data, c.forget_data, c.retain_data, split=c.split)
    if not c.utility and "forget" in bench.evals:
        bench.evals = {"forget": bench.evals["forget"]}
    if not c.retain_model and c.control:
        proc.say("No retain_model: there is no control, so what is relearned cannot be told from what is newly learned.")
    if "paraphrase" in c.attacks and not all("paraphrased_question" in r for r in bench.evals.get("forget", [{}])):
        raise Mistake("--attacks=paraphrase: the forget set has no column paraphrased_question.")
    for name in names:
        c = dataclasses.replace(c, out=evaluate.place(name, labels, given, len(names)))
        retain = evaluate.retain_reference(c, proc, bench)
        target = evaluate.reference(c, proc, c.model, bench) if c.model else None
        attacked = [(name, labels[name], evaluate.reference(c, proc, name, bench))]
        attacked += [(c.retain_model, "retain model", None)] if c.control and c.retain_model else []
        curves = []
        for attack in c.attacks:
            act, how = ATTACKS[attack]
            for seed in c.seeds if act is relearn else c.seeds[:1]:
                for model, label, before in attacked:
                    rows = act(Attacked(c, proc, model, label, bench, retain, before, target, seed), how)
                    curves += [{"attack": attack, "model": label, "seed": seed} | row for row in rows]
            if proc.rank == 0:  # what is done is kept, whatever becomes of the next attack
                os.makedirs(c.out, exist_ok=True)
                configs.write(os.path.join(c.out, "relearn.json"), json.dumps(curves, indent=1) + "\n")
        if proc.rank == 0:
            report(c.out, labels[name], curves, evaluate.summarize(target, retain, c) if target else {}, proc)
    models.cleanup()


if __name__ == "__main__":
    configs.run(main)
