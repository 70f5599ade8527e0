"""Attack unlearned models: does what was forgotten come back?

    python relearn.py out/demo      # fine-tune on 20 % of the forget set, score the other 80 %
    python relearn.py out/demo --attacks=relearn_random,int8,int4,nf4,fp4,paraphrase --seeds=0,1,2
    python relearn.py out/simnpo_s0 out/npo_s0 out/npo_s1 --attacks=int4,audits   # one table
    python relearn.py out/books --fraction=1 --steps=100 --lr=1e-5 --schedule=cosine   # as MUSE's
    python relearn.py org/model --benchmark=tofu --model=org/target --retain_model=org/retain

The retain model, which never saw any of it, is attacked the same way, once: what it learns is no
memory coming back. Several runs are attacked with the first one's settings, each against its own
target and retain model. A run's rows go to its relearn.json, its table to relearn.md and .csv, its
curves to relearn.png (or below --out); the table over several runs to out/relearn.md and .csv (or
in --out).
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
from configs import UsageError, rundir


@dataclasses.dataclass(frozen=True)
class Attack(configs.Settings):
    """attack"""
    attacks: tuple[str, ...] = ("relearn_random",)  # ..., int4: any of the table ATTACKS
    fraction: float = 0.2  # relearn: share of the forget examples that is learned again
    examples: int | None = None  # relearn: how many, as a number
    relearn_data: str | None = None  # relearn: fine-tune on these rows instead (benign data)
    seeds: tuple[int, ...] = (0,)  # relearn: one curve per seed
    control: bool = True  # attack the retain model too
    utility: bool = False  # score the other sets after each attack too

    def problems(self):
        unknown = [name for name in self.attacks if name not in ATTACKS]
        if unknown or not self.attacks:
            yield f"--attacks={','.join(self.attacks)}: any of {', '.join(ATTACKS)}."
        yield from self.check("fraction", lambda v: 0 < v <= 1, "must be above 0 and at most 1.")
        yield from self.check("examples", lambda n: n >= 1, "must be at least 1.")
        yield from self.check("relearn_data", os.path.isfile, "no such file.")
        if min(self.seeds, default=-1) < 0:
            yield f"--seeds={','.join(map(str, self.seeds))}: at least one, none below 0."


@dataclasses.dataclass(frozen=True)
class Config(unlearn.Config, Attack):
    """training, where an attack differs from unlearning (the optimizer is the run's own)"""
    epochs: float = 10.0
    batch_size: int = 4

    def problems(self):
        if self.eval_every == 0 and not self.eval_at:
            yield "--eval_every=0: an attack is scored; above 0, or --eval_at=STEP."
        if self.parallel == "fsdp" and set(self.attacks) & set(GRIDS):
            yield "--attacks: rounding needs whole weights: --parallel=ddp."
        if self.benchmark == "markov":
            yield "--benchmark=markov: relearn.py has no attack on Markov chains."


# an attack fine-tunes on the plain answers, from the model as it is
FIXED = {"forget_loss": "nll", "retain_loss": "none", "forget_weight": 1.0, "audits": False,
         "resume": False, "save_every": 0.0}


def refuse_ignored(argv: list):
    """Refuse settings that an attack does not read."""
    ignored = {*FIXED, *configs.fields(unlearn.Method), *configs.fields(unlearn.Keeping), "seed"}
    instead = {"audits": "write --attacks=audits", "seed": "write --seeds=0,1,2"}
    for word in argv:
        name = word.removeprefix("--").partition("=")[0]
        if name in ignored:
            advice = instead.get(name, "leave it out")
            raise UsageError(f"{word}: attacks do not read {name}; {advice}.")


# ------------------------------------------------------------------------------------------------
# attacks: attack(victim, how, seed) -> rows of {step, epoch, scores}


@dataclasses.dataclass
class Victim:
    """A model under attack, its data and what it is compared with."""
    c: Config
    proc: models.Process
    name: str
    label: str
    bench: data.Benchmark
    retain: list | None  # the retain model's records
    before: list | None  # its own before the attack; None for the retain model itself
    target: list | None  # of the model it was unlearned from

    def load(self):
        return evaluate.load(self.name, self.c, self.proc)

    def score(self, lm, tokenizer, seen=()) -> dict:
        """The scores, those of the questions not in `seen`, and how much of the forgotten is back.
        """
        scores, records = evaluate.evaluate(
            lm, tokenizer, self.bench, self.c, self.proc, self.retain)
        others = unseen(records, seen) if seen else []
        if others and others[0]["set"] == "forget":
            retained = unseen(self.retain, seen) or None
            for key, value in evaluate.summarize(others, retained, self.c).items():
                scores[f"unseen_{key}"] = value
        attacked, before, target = (
            known(some, seen) for some in (records, self.before, self.target))
        if None not in (attacked, before, target):  # of the same questions, all three
            scores["recovered"] = recovered(attacked, before, target)
        return scores


def unseen(records, seen=()) -> list:
    """Records that measure what is known of the forget set, without the questions in `seen`."""
    found = []
    for record in records or []:
        question = record.get("question") or record.get("answer")
        if record["set"] in ("forget", "knowmem_f") and question not in seen:
            found.append(record)
    return found


def known(records, seen=()) -> float | None:
    """How much of it is known: the mean probability of the forget answers (MUSE: ROUGE)."""
    values = []
    for record in unseen(records, seen):
        is_qa = record["set"] == "forget"
        values.append(float(np.exp(-record["nll"])) if is_qa else record["rougeL_f1"])
    return float(np.mean(values)) if values else None


def recovered(attacked: float, unlearned: float, target: float) -> float | None:
    """(attacked - unlearned) / (target - unlearned): 0 = stays forgotten, 1 = all is back.

    None where so little had been forgotten (a difference below 0.05) that it means nothing.
    """
    if abs(target - unlearned) < 0.05:
        return None
    return (attacked - unlearned) / (target - unlearned)


def by_answer_length(group: list) -> int:
    return group[0].n_answer


CHOOSE = {  # (groups, k, rng) -> k groups
    "random": lambda groups, k, rng: rng.sample(groups, k),
    "shortest": lambda groups, k, rng: sorted(groups, key=by_answer_length)[:k],
    "longest": lambda groups, k, rng: sorted(groups, key=by_answer_length, reverse=True)[:k],
}


def relearn(victim: Victim, how: str, seed: int) -> list:
    """Fine-tune on some forget examples, or on benign rows, with the project's own loop."""
    lm, tokenizer = victim.load()
    c, proc = victim.c, victim.proc
    rows = data.read_own(c.relearn_data) if c.relearn_data else victim.bench.forget
    groups = unlearn.encode_groups(c, tokenizer, proc, forget=rows)["forget"]
    k = min(len(groups), c.examples or max(1, round(c.fraction * len(groups))))
    chosen = CHOOSE[how](groups, k, random.Random(f"{seed} relearn"))
    seen = {group[0].row.get("question") or group[0].row.get("text") for group in chosen}
    curve = []

    def score(step, epoch):
        scores = victim.score(lm, tokenizer, seen)
        curve.append({"step": step, "epoch": epoch, **scores})
        return scores

    out = os.path.join(c.out, "relearn", f"{victim.label}_{how}_{seed}")
    c = dataclasses.replace(c, seed=seed, out=out)
    run = rundir.RunDirectory(c, proc)
    run.resumable = False
    with run.watch_signals(), proc.clock.phase("training"):
        unlearn.train(c, proc, lm, {"forget": chosen}, score, run, f"relearn {victim.label}")
    return curve


def normal_float_4() -> torch.Tensor:
    """NF4 (arXiv 2305.14314): 16 quantiles of a normal distribution with an exact 0, in [-1, 1]."""
    def quantiles(n):
        p = torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1]
        return torch.special.ndtri(p)

    zero = torch.zeros(1, dtype=torch.float64)
    values = torch.cat([quantiles(9), zero, -quantiles(8)]).sort().values
    return (values / values.abs().max()).float()


# bitsandbytes' 4-bit float: 2 bits of exponent, 1 of mantissa
FP4 = torch.tensor([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
GRIDS = {
    "int8": torch.arange(-127, 128) / 127,
    "int4": torch.arange(-7, 8) / 7,
    "nf4": normal_float_4(),
    "fp4": torch.cat([-FP4.flip(0), FP4[1:]]),
}


@torch.no_grad()
def round_weights(lm, name: str, block: int = 64):
    """Round every matrix but embeddings and output head to a grid.

    Each block of weights is scaled by its largest. int8 is such a grid too, not LLM.int8.
    """
    grid = GRIDS[name].to(lm.device)
    middles = (grid[1:] + grid[:-1]) / 2
    kept = set(lm.get_output_embeddings().parameters())
    for module in lm.modules():
        if isinstance(module, torch.nn.Embedding):
            kept |= set(module.parameters())
    for weight in lm.parameters():  # GPT-2's matrices are no nn.Linear
        if weight.ndim < 2 or weight in kept:
            continue
        flat = weight.flatten()
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
        nearest = torch.bucketize(blocks / scale, middles)
        weight.copy_((grid[nearest] * scale).flatten()[:len(flat)].view_as(weight))


def score_once(victim: Victim, lm, tokenizer) -> list:
    return [{"step": 0, "epoch": 0.0, **victim.score(lm, tokenizer)}]


def quantize(victim: Victim, how: str, seed: int) -> list:
    """Round the weights to a coarse grid (arXiv 2410.16454: forgetting may vanish)."""
    lm, tokenizer = victim.load()
    round_weights(lm, how)
    return score_once(victim, lm, tokenizer)


def paraphrase(victim: Victim, how: str, seed: int) -> list:
    """Ask in other words than in training.

    No forget quality: the retain reference was asked the plain questions.
    """
    rows = []
    for row in victim.bench.evals["forget"]:
        rows.append(row | {"question": row["paraphrased_question"]})
    bench = dataclasses.replace(victim.bench, evals={"forget": rows})
    victim = dataclasses.replace(victim, bench=bench, retain=None)
    return score_once(victim, *victim.load())


def audit(victim: Victim, how: str, seed: int) -> list:
    """No attack on the weights: memorization, and membership against the holdout set."""
    retain = victim.retain if victim.before else None
    c = dataclasses.replace(victim.c, audits=True)
    victim = dataclasses.replace(victim, c=c, retain=retain, before=None)
    return score_once(victim, *victim.load())


ATTACKS = {
    **{f"relearn_{how}": (relearn, how) for how in CHOOSE},
    **{name: (quantize, name) for name in GRIDS},
    "paraphrase": (paraphrase, ""),
    "audits": (audit, ""),
}


# ------------------------------------------------------------------------------------------------
# the report

# the first eight that there are stand in a run's table; relearn.json has all
SHOWN = ("unseen_forget_prob", "unseen_forget_rouge", "forget_prob", "forget_rouge",
         "forget_quality", "model_utility", "verbmem_f", "knowmem_f", "knowmem_r", "recovered",
         "mia_min_k", "extraction_strength", "privleak")
ARROWS = {**evaluate.ARROWS, "unseen_forget_prob": "↓", "unseen_forget_rouge": "↓",
          "recovered": "↓", **dict.fromkeys(("before unlearning", "unlearned", *ATTACKS), "")}


def by_seed(rows: list, model: str, attack: str) -> list[list]:
    """The rows of one attack on one model, a list per seed."""
    seeds = {}
    for row in rows:
        if (row["model"], row["attack"]) == (model, attack):
            seeds.setdefault(row["seed"], []).append(row)
    return list(seeds.values())


def mean_and_spread(rows: list, keys: list) -> dict:
    """{score: its value, or (mean, standard deviation) over several rows}."""
    found = {}
    for key in keys:
        values = [row.get(key) for row in rows]
        if None not in values:
            several = len(values) > 1
            spread = (float(np.mean(values)), float(np.std(values, ddof=1))) if several else None
            found[key] = spread or values[0]
    return found


def report(victim: Victim, rows: list):
    """One model's table, before unlearning to after each attack, and its curves."""
    c = victim.c
    present = set().union(*rows)
    keys = [key for key in SHOWN if key in present][:8]
    stages = {"before unlearning": victim.target, f"{victim.label}, unlearned": victim.before,
              "retain model": victim.retain}
    table = {}
    for stage, records in stages.items():
        if records:
            scores = evaluate.summarize(records, victim.retain, c)
            table[stage] = {key: scores.get(key) for key in keys}
    curves = {}
    for model, attack in dict.fromkeys((row["model"], row["attack"]) for row in rows):
        seeds = by_seed(rows, model, attack)
        if attack.startswith("relearn"):
            first = [curve[0] for curve in seeds]
            table[f"{model}, at the start of {attack}"] = mean_and_spread(first, keys)
        last = [curve[-1] for curve in seeds]
        table[f"{model}, after {attack}"] = mean_and_spread(last, keys)
        for curve in seeds:
            if len(curve) > 1:
                curves[f"{model}, {attack}, seed {curve[0]['seed']}"] = curve
    path = os.path.join(c.out, "relearn")
    victim.proc.say("\n" + configs.show_tables({"scores": table}, ARROWS, path))
    if curves:
        configs.picture(f"{path}.png", curves, {}, "epoch", keys[0])
    picture = ", relearn.png" if curves else ""
    victim.proc.say(f"\n{c.out}: relearn.json, relearn.md, relearn.csv{picture}")


def compare(path: str, attacked: dict, proc):
    """Tables over runs. attacked: {label: ({stage: records before any attack}, rows, model)}."""
    tables = {"known of the forget set (after relearning: of the rest of it)": {},
              "recovered": {}, "audits": {}}
    after, back, audits = tables.values()
    for label, (stages, rows, model) in attacked.items():
        after[label] = {}
        for stage, records in stages.items():
            value = known(records)
            if value is not None:
                after[label][stage] = value
        for attack in dict.fromkeys(row["attack"] for row in rows):
            last = [curve[-1] for curve in by_seed(rows, model, attack)]
            mean = {}
            for key in last[0]:
                values = [row.get(key) for row in last]
                if key not in ("attack", "model") and None not in values:
                    mean[key] = float(np.mean(values))
            if attack == "audits":
                names = [key for key in mean if key.startswith(("mia_", "ex", "privleak"))]
                audits[label] = {key: mean[key] for key in names}
                continue
            percent = mean.get("knowmem_f", 0) / 100
            whole = mean.get("forget_prob", percent)
            after[label][attack] = mean.get("unseen_forget_prob", whole)
            if "recovered" in mean:
                back.setdefault(label, {})[attack] = mean["recovered"]
    tables = {title: rows for title, rows in tables.items() if rows}
    proc.say("\n" + configs.show_tables(tables, ARROWS, path) + f"\n\n{path}.md, {path}.csv")


# ------------------------------------------------------------------------------------------------
# the command


class Campaign:
    """All attacks on all models. References and attacks on a control are computed once."""

    def __init__(self, c, proc, bench):
        self.c, self.proc, self.bench = c, proc, bench
        self.scored, self.controls = {}, {}
        self.jobs = []
        for name in c.attacks:
            is_relearning = ATTACKS[name][0] is relearn
            for seed in c.seeds if is_relearning else c.seeds[:1]:
                self.jobs.append((name, seed))

    def reference(self, name: str | None) -> list | None:
        """The records of a model before any attack."""
        if name and name not in self.scored:
            c = dataclasses.replace(self.c, audits="audits" in self.c.attacks)
            self.scored[name] = evaluate.reference(c, self.proc, name, self.bench)
        return self.scored.get(name)

    def attack(self, victim: Victim, name: str, seed: int) -> list:
        run_attack, how = ATTACKS[name]
        stamp = {"attack": name, "model": victim.label, "seed": seed}
        return [stamp | row for row in run_attack(victim, how, seed)]

    def attack_control(self, victim: Victim, name: str, seed: int) -> list:
        control = victim.c.retain_model
        key = control, name, seed
        if key not in self.controls:
            victim = dataclasses.replace(
                victim, name=control, label="retain model", before=None)
            self.controls[key] = self.attack(victim, name, seed)
        return self.controls[key]

    def run(self, victim: Victim) -> list:
        """The rows of all attacks on a model and on its control."""
        rows = []
        for name, seed in self.proc.progress(self.jobs, f"attacks on {victim.label}"):
            rows += self.attack(victim, name, seed)
            if self.c.control and victim.c.retain_model:
                rows += self.attack_control(victim, name, seed)
            if self.proc.rank == 0:  # what is done is kept, whatever becomes of the next attack
                os.makedirs(victim.c.out, exist_ok=True)
                path = os.path.join(victim.c.out, "relearn.json")
                rundir.write(path, json.dumps(rows, indent=1) + "\n")
        if self.proc.rank == 0:
            report(victim, rows)
        return rows


def load_settings(argv: list):
    """(config, {model: its own config}, {model: label}, what was given)."""
    given, names = configs.parse(Config, argv, __doc__)  # a run directory may bring the rest
    if not names:
        raise UsageError("name at least one run directory or model: python relearn.py out/demo "
                         "(--help says more).")
    refuse_ignored(argv)
    runs = [evaluate.run_settings(name) for name in names]
    first = next((run for run in runs if run), {})
    own = {}
    for key in (*configs.fields(unlearn.Optimizer), "model"):
        if key in first:
            own[key] = first[key]
    inherited = evaluate.inherit(evaluate.Config, names, given)
    c = configs.make(Config, own | inherited | given | FIXED)
    labels, each = configs.name_runs(names), {}
    for name in names:
        out = configs.output_directory(name, labels, given, len(names))
        each[name] = evaluate.against(name, dataclasses.replace(c, out=out), given)
        configs.check_name(name, "model")
        for setting in ("model", "retain_model"):
            configs.check_name(getattr(each[name], setting) or name, setting)
        rundir.writable(out)
    return c, each, labels, given


def load_rows(c) -> data.Benchmark:
    bench = data.load(c.benchmark, c.subset, c.data, c.forget_data, c.retain_data, split=c.split,
                      holdout="audits" in c.attacks)
    if not c.utility and "forget" in bench.evals:
        bench.evals = {"forget": bench.evals["forget"]}
    if "paraphrase" in c.attacks:
        for row in bench.evals.get("forget", [{}]):
            if "paraphrased_question" not in row:
                raise UsageError("--attacks=paraphrase: the forget set has no column "
                                 "paraphrased_question.")
    return bench


def main(argv):
    c, each, labels, given = load_settings(argv)
    proc = evaluate.setup(c)
    bench = load_rows(c)
    if c.control and not all(own.retain_model for own in each.values()):
        proc.say("No retain_model: there is no control, so what is relearned cannot be told from "
                 "what is newly learned.")
    first = next(iter(each.values()))
    campaign = Campaign(first, proc, bench)
    attacked = {}
    for name, own in each.items():
        control = own.retain_model
        retain = evaluate.read_log(c.retain_log) if c.retain_log else campaign.reference(control)
        before, target = campaign.reference(name), campaign.reference(own.model)
        victim = Victim(own, proc, name, labels[name], bench, retain, before, target)
        rows = campaign.run(victim)
        stages = {"before unlearning": target, "unlearned": before}
        attacked[victim.label] = stages, rows, victim.label
        if c.control and control:
            label = os.path.basename(os.path.normpath(control))
            stages = {"unlearned": campaign.reference(control)}
            attacked.setdefault(label, (stages, rows, "retain model"))
    if len(each) > 1 and proc.rank == 0:
        compare(os.path.join(given.get("out", "out"), "relearn"), attacked, proc)
    models.cleanup()


if __name__ == "__main__":
    configs.run(main)
