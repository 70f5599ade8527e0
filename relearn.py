"""Attack unlearned models: how fast does what was forgotten come back?

    python relearn.py out/demo                                   # fine-tune on 20 % of the forget set, score the other 80 %
    python relearn.py out/demo --choose=random,shortest --seeds=0,1,2
    python relearn.py org/model --benchmark=tofu --subset=forget05 --template=llama2 --retain_model=org/retain

The retain model, which never saw any of it, is attacked the same way: what it learns is no memory coming back.
A run directory brings its own settings; curves go to its relearn.json and relearn.png (or below --out).
"""
import dataclasses
import json
import os
import random

import configs
import data
import evaluate
import model as models
import unlearn
from configs import Mistake


@dataclasses.dataclass(frozen=True)
class Config(unlearn.Config):
    # the attack
    choose: tuple[str, ...] = ("random",)  # which forget examples are learned again: random, shortest (answers)
    fraction: float = 0.2  # how many of them
    seeds: tuple[int, ...] = (0,)  # one curve a seed
    control: bool = True  # attack the retain model too
    utility: bool = False  # score the other sets at each epoch too
    # optimisation, where an attack differs from unlearning; lr, weight_decay, adam_beta2 and grad_clip are the run's own
    epochs: float = 10.0
    batch_size: int = 4

    def problems(self):
        yield from super().problems()
        wrong = [name for name in self.choose if name not in CHOOSE]
        yield wrong or not self.choose, f"--choose={','.join(self.choose)}: any of {', '.join(CHOOSE)}."
        yield not 0 < self.fraction <= 1, f"--fraction={self.fraction}: must be above 0 and at most 1."
        yield not self.seeds, "--seeds=: name at least one."
        yield self.benchmark == "markov", "--benchmark=markov: relearn.py has no attack on Markov chains."


CHOOSE = {  # (examples, k, rng) -> k indices
    "random": lambda examples, k, rng: rng.sample(range(len(examples)), k),
    "shortest": lambda examples, k, rng: sorted(range(len(examples)), key=lambda i: len(examples[i].ids) - examples[i].start)[:k],
}


def attack(c, proc, name, label, bench, retain, choose, seed):
    """Fine-tune one model on some forget examples with the project's own loop; the curve, one row a scored epoch."""
    scorer, tokenizer = evaluate.load(name, c, proc)
    examples, rows = unlearn.encode_sets(c, tokenizer, proc, forget=bench.forget, retain=[])
    k = max(1, round(c.fraction * len(examples["forget"])))
    chosen = CHOOSE[choose](examples["forget"], k, random.Random(f"{seed} relearn"))
    seen = {rows["forget"][i].get("question") or rows["forget"][i]["text"] for i in chosen}
    examples["forget"] = [examples["forget"][i] for i in chosen]
    curve = []

    def unseen(records):
        return [r for r in records if r["set"] == "forget" and (r.get("question") or r.get("answer")) not in seen]

    def on_score(step, epoch):
        scores, records = evaluate.evaluate(scorer, tokenizer, bench, c, proc, retain)
        others = evaluate.summarize(unseen(records), unseen(retain) if retain else None, c) if unseen(records) else {}
        scores |= {f"unseen_{k}": v for k, v in others.items()}
        curve.append({"attack": f"relearn_{choose}", "model": label, "seed": seed, "step": step, "epoch": epoch} | scores)
        return scores

    c = dataclasses.replace(c, seed=seed, out=os.path.join(c.out, "relearn", f"{label}_{choose}_{seed}"))
    if proc.rank == 0:
        os.makedirs(c.out, exist_ok=True)
    proc.barrier()
    unlearn.train(c, proc, scorer, examples, on_score, title=f"relearn {label}")
    return curve


def main(argv):
    _, given, names = configs.load(Config, argv, __doc__)
    if not names:
        raise Mistake("name at least one run directory or model: python relearn.py out/demo (--help says more).")
    for name in names:
        models.check_name(name, "model")
    run = models.read_json(os.path.join(names[0], "run.json"))
    own = {k: run[k] for k in ("lr", "weight_decay", "adam_beta2", "grad_clip") if k in run}
    fixed = {"forget_loss": "nll", "retain_loss": "none", "forget_weight": 1.0}
    c = configs.make(Config, own | evaluate.inherit(evaluate.Config, names, given) | given | fixed)
    proc = models.setup(c.device, c.dtype, threads=1 if c.benchmark == "demo" else None)
    labels = evaluate.name_runs(names)
    bench = data.load(c.benchmark, c.subset, c.data, c.forget_data, c.retain_data)
    if not c.utility:
        bench.evals = {"forget": bench.evals["forget"]}
    if not c.retain_model and c.control:
        proc.say("No retain_model: there is no control, so what is relearned cannot be told from what is newly learned.")
    for name in names:
        place = evaluate.place(name, labels, given, len(names))
        c = dataclasses.replace(c, out=place)
        retain = evaluate.retain_reference(c, proc, bench)
        curves = []
        for choose in c.choose:
            for seed in c.seeds:
                curves += attack(c, proc, name, labels[name], bench, retain, choose, seed)
                if c.control and c.retain_model:
                    curves += attack(c, proc, c.retain_model, "retain model", bench, retain, choose, seed)
        if proc.rank == 0:
            os.makedirs(place, exist_ok=True)
            models.write(os.path.join(place, "relearn.json"), json.dumps(curves, indent=1) + "\n")
            show(place, curves, proc)
    models.cleanup()


def show(place, curves, proc):
    """The table of the last scored epoch beside the first, and the picture of all of them."""
    groups = {}
    for row in curves:
        groups.setdefault((row["model"], row["attack"], row["seed"]), []).append(row)
    keys = [k for k in ("unseen_forget_prob", "unseen_forget_rouge", "forget_prob", "forget_rouge", "forget_quality")
            if k in curves[0]]
    proc.say("\n" + evaluate.table({f"{model}, {name}, seed {seed}, epoch {r['epoch']:g}": {k: r[k] for k in keys}
                                    for (model, name, seed), group in groups.items() for r in (group[0], group[-1])}))
    evaluate.picture(os.path.join(place, "relearn.png"), {", ".join(map(str, g)): rows for g, rows in groups.items()}, {},
                     "epoch", keys[0])
    proc.say(f"\n{place}: relearn.json, relearn.png")


if __name__ == "__main__":
    configs.run(main)
