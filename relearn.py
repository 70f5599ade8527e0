"""Attack unlearned models: does what was forgotten come back?

    python relearn.py out/demo                      # relearn 20 % of the forget set, score the rest
    python relearn.py out/demo --attacks=relearn_random,relearn_shortest,int4,paraphrase
    python relearn.py out/simnpo_s0 out/npo_s0 out/npo_s1 --attacks=int4,audits   # one table
    # Unlearn-Smooth's protocol on MUSE Books: runs of 50, 75 and 100 steps (News: 100, 125, 150)
    python relearn.py out/books --steps=50 --eval_at=50 --schedule=cosine --fraction=1 --lr=1e-5
    python relearn.py org/model --benchmark=tofu --model=org/target --retain_model=org/retain

The retain model, which never saw the forget set, is attacked in the same way, once: what it learns
is not memory that comes back. Several runs are attacked with the settings of the first one (lr,
template, ...), each against its own target and retain model. A run's rows go to its relearn.json,
its table to relearn.md and .csv, its curves to relearn.png (or below --out); the table over several
runs to out/relearn.md and .csv (or in --out).
"""
import dataclasses
import functools
import json
import os
import random

import configs

if __name__ == "__main__":
    configs.help_if_asked(__file__, "Config", __doc__)  # before the imports that take seconds

import numpy as np
import torch

import data
import evaluate
import model as models
import unlearn
from configs import UsageError, rundir

# ------------------------------------------------------------------------------------------------
# attacks: (a, lm, tokenizer) -> rows of {step, epoch, scores}


@dataclasses.dataclass(frozen=True)
class Attacked:
    """A model under attack, and what its scores are compared with."""
    name: str  # of the model
    label: str
    c: "Config"
    proc: models.Process
    bench: data.Benchmark
    retain: list | None  # records of the retain model
    before: list | None  # of this model before the attack; None for the control
    target: list | None  # of the model that it was unlearned from
    seed: int = 0

    def score(self, lm, tokenizer, seen=()):
        """The scores of all questions, of those not in `seen`, and how much is recovered."""
        scores, records = evaluate.evaluate(
            lm, tokenizer, self.bench, self.c, self.proc, self.retain)
        rest = forget_records(records, seen)
        if seen and rest and rest[0]["set"] == "forget":
            retain = forget_records(self.retain, seen) or None
            for key, value in evaluate.summarize(rest, retain, self.c).items():
                scores[f"unseen_{key}"] = value
        compared = [forget_records(some, seen) for some in (records, self.before, self.target)]
        if all(compared):
            scores["recovered"] = recovered(*map(known, compared))
        return scores

    def score_once(self, lm, tokenizer):
        return [{"step": 0, "epoch": 0.0, **self.score(lm, tokenizer)}]


def forget_records(records, seen):
    """The records that show what is known of the forget set, without the questions in `seen`."""
    found = []
    for record in records or []:
        question = record.get("question") or record.get("answer")
        if record["set"] in ("forget", "knowmem_f") and question not in seen:
            found.append(record)
    return found


def known(records):
    """Mean probability of the forget answers; MUSE: mean ROUGE of the answers given."""
    if records[0]["set"] == "knowmem_f":
        return np.mean(evaluate.column(records, "rougeL_f1"))
    return np.exp(-np.array(evaluate.column(records, "nll"))).mean()


def recovered(attacked, unlearned, target):
    """(attacked - unlearned) / (target - unlearned): 0 = stays forgotten, 1 = all is back.

    None where so little was forgotten (a difference below 0.05) that the share means nothing.
    """
    forgotten = target - unlearned
    return (attacked - unlearned) / forgotten if abs(forgotten) >= 0.05 else None


def choose(how, examples, k, rng):
    """k indices: random ones, or those of the shortest or longest answers."""
    indices = list(range(len(examples)))
    if how == "random":
        return rng.sample(indices, k)
    indices.sort(key=lambda i: examples[i].n_answer, reverse=how == "longest")
    return indices[:k]


def relearn(a, lm, tokenizer, how):
    """Fine-tune on some forget examples (or on benign rows), scored at each epoch."""
    rows = data.read_own(a.c.relearn_data) if a.c.relearn_data else a.bench.forget
    c = models.fit(a.c, lm.config)
    groups = unlearn.encode_groups(c, tokenizer, a.proc, forget=rows)["forget"]
    k = min(len(groups), a.c.examples or max(1, round(a.c.fraction * len(groups))))
    examples = [group[0] for group in groups]
    chosen = choose(how, examples, k, random.Random(f"{a.seed} relearn"))
    rows = [examples[i].row for i in chosen]
    seen = {row.get("question") or row.get("text") for row in rows}

    out = os.path.join(a.c.out, "relearn", f"{a.label}_{how}_{a.seed}")
    c = dataclasses.replace(a.c, seed=a.seed, out=out)
    run = rundir.RunDirectory(c, a.proc)
    run.resumable = False
    with run.watch_signals(), a.proc.clock.phase("training"):
        log = unlearn.train(c, a.proc, lm, {"forget": [groups[i] for i in chosen]},
                            lambda step, epoch: a.score(lm, tokenizer, seen), run,
                            title=f"relearn {a.label}")
    return [row for row in log if "loss" not in row]


def normal_float_4():
    """NF4 (arXiv 2305.14314): 16 quantiles of a normal distribution with an exact 0, in [-1, 1]."""
    def quantiles(n):
        return torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1])

    zero = torch.zeros(1, dtype=torch.float64)
    values = torch.cat([quantiles(9), zero, -quantiles(8)]).sort().values
    return (values / values.abs().max()).float()


# bitsandbytes' 4-bit float: 2 bits of exponent, 1 of mantissa
FP4 = torch.tensor([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
# int8 rounds weights in blocks of 64 and nothing else. It is not LLM.int8, which rounds activations
# too and keeps outliers.
GRIDS = {
    "int8": torch.arange(-127, 128) / 127,
    "int4": torch.arange(-7, 8) / 7,
    "nf4": normal_float_4(),
    "fp4": torch.cat([-FP4.flip(0), FP4[1:]]),
}


@torch.no_grad()
def round_weights(lm, name, block=64):
    """Round every matrix to the grid, in blocks of weights that are scaled by their largest.

    Embeddings and output head stay. GPT-2's matrices and fused experts' are no nn.Linear.
    """
    grid = GRIDS[name].to(lm.device)
    borders = (grid[1:] + grid[:-1]) / 2
    kept = {*lm.get_output_embeddings().parameters()}
    for module in lm.modules():
        if isinstance(module, torch.nn.Embedding):
            kept |= {*module.parameters()}
    for weight in lm.parameters():
        if weight.ndim > 1 and weight not in kept:
            flat = weight.flatten()
            blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
            scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
            rounded = grid[torch.bucketize(blocks / scale, borders)] * scale
            weight.copy_(rounded.flatten()[:len(flat)].view_as(weight))


def quantize(a, lm, tokenizer, grid):
    """Round the weights: forgetting may vanish with their last digits (arXiv 2410.16454)."""
    round_weights(lm, grid)
    return a.score_once(lm, tokenizer)


def paraphrase(a, lm, tokenizer):
    """Ask in other words than in training; no forget quality, for the reference was not."""
    rows = [row | {"question": row["paraphrased_question"]} for row in a.bench.evals["forget"]]
    bench = dataclasses.replace(a.bench, evals={"forget": rows})
    return dataclasses.replace(a, bench=bench, retain=None).score_once(lm, tokenizer)


def audit(a, lm, tokenizer):
    """No attack on the weights: memorization, and membership against the holdout set."""
    c, retain = dataclasses.replace(a.c, audits=True), a.retain if a.before else None
    return dataclasses.replace(a, c=c, retain=retain, before=None).score_once(lm, tokenizer)


ATTACKS = {}
for how in ("random", "shortest", "longest"):
    ATTACKS[f"relearn_{how}"] = functools.partial(relearn, how=how)
for grid in GRIDS:
    ATTACKS[grid] = functools.partial(quantize, grid=grid)
ATTACKS |= {"paraphrase": paraphrase, "audits": audit}


def attack(a, name, seed):
    """Rows of one attack on one model."""
    lm, tokenizer = evaluate.load(a.name, a.c, a.proc)
    rows = ATTACKS[name](dataclasses.replace(a, seed=seed), lm, tokenizer)
    return [{"attack": name, "model": a.label, "seed": seed, **row} for row in rows]


def attack_all(a, controls):
    """Rows of all attacks on a run and on its retain model, the control.

    controls: {(model, attack, seed): rows}; one that several runs share is attacked once.
    """
    jobs = []
    for name in a.c.attacks:
        seeds = a.c.seeds if name.startswith("relearn") else a.c.seeds[:1]
        jobs += [(name, seed) for seed in seeds]
    rows = []
    for job in a.proc.progress(jobs, f"attacks on {a.label}"):
        rows += attack(a, *job)
        if a.c.control and a.c.retain_model:
            key = a.c.retain_model, *job
            if key not in controls:
                control = dataclasses.replace(
                    a, name=a.c.retain_model, label=CONTROL, before=None)
                controls[key] = attack(control, *job)
            rows += controls[key]
        if a.proc.rank == 0:  # what is done is kept, whatever becomes of the next attack
            rundir.write(os.path.join(a.c.out, "relearn.json"), json.dumps(rows, indent=1) + "\n")
    return rows


# ------------------------------------------------------------------------------------------------
# the report

CONTROL = "retain model"
SHOWN = ("unseen_forget_prob", "unseen_forget_rouge", "forget_prob", "forget_rouge",
         "forget_quality", "model_utility", "verbmem_f", "knowmem_f", "knowmem_r", "recovered",
         "mia_min_k", "extraction_strength", "privleak")
AUDITS = (*data.MEMORIZATION, *(f"mia_{key}" for key in data.MEMBERSHIP),
          "mia_reference", "privleak")
ARROWS = evaluate.ARROWS | {
    **dict.fromkeys(("unseen_forget_prob", "unseen_forget_rouge", "recovered"), "↓"),
    **dict.fromkeys(("before unlearning", "unlearned", *ATTACKS), ""),
}


def group(pairs):
    """{key: [values]} of (key, value)."""
    groups = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def curves_of(rows):
    return group(((row["model"], row["attack"], row["seed"]), row) for row in rows)


def lines_of(a, rows):
    """{(model, stage, title): [scores of each seed]}: what the tables are made of.

    stage: before unlearning, unlearned, or an attack; "" at the start of one.
    """
    lines = []
    for model, stage, title, records in (
            (a.label, "before unlearning", "before unlearning", a.target),
            (a.label, "unlearned", f"{a.label}, unlearned", a.before),
            (CONTROL, "unlearned", CONTROL, a.retain)):
        if records:
            scores = evaluate.summarize(records, a.retain, a.c)
            lines.append(((model, stage, title), scores))
    for (model, name, _), curve in curves_of(rows).items():
        if name.startswith("relearn"):
            lines.append(((model, "", f"{model}, at the start of {name}"), curve[0]))
        lines.append(((model, name, f"{model}, after {name}"), curve[-1]))
    return group(lines)


def values_of(key, several):
    """A score of each seed; [] where one of them lacks it."""
    values = [scores.get(key) for scores in several]
    return [] if None in values else values


def spread(values):
    """The mean and standard deviation over seeds; of one seed its value."""
    if len(values) > 1:
        return np.mean(values), np.std(values, ddof=1)
    return values[0] if values else None


def report(a, rows, lines):
    """One run's table and the picture of its curves."""
    present = set().union(*rows)
    keys = [key for key in SHOWN if key in present]
    table = {}
    for (_, _, title), several in lines.items():
        # as many as stay readable; relearn.json has all
        table[title] = {key: spread(values_of(key, several)) for key in keys[:8]}
    path = os.path.join(a.c.out, "relearn")
    a.proc.say("\n" + configs.show_tables({"scores": table}, ARROWS, path))
    drawn = {}
    for (model, name, seed), curve in curves_of(rows).items():
        if len(curve) > 1:
            drawn[f"{model}, {name}, seed {seed}"] = curve
    if drawn:
        configs.picture(f"{path}.png", drawn, {}, "epoch", keys[0])
    picture = ", relearn.png" if drawn else ""
    a.proc.say(f"\n{a.c.out}: relearn.json, relearn.md, relearn.csv{picture}")


def compare(path, stages_of_all, proc):
    """Tables over runs and controls {label: {stage: [scores of each seed]}}; means over seeds."""
    title = "known of the forget set (after relearning: of the rest of it)"
    tables = {title: {}, "recovered": {}, "audits": {}}

    def put(table, label, column, values):
        if values:
            tables[table].setdefault(label, {})[column] = np.mean(values)

    for label, stages in stages_of_all.items():
        for stage, several in stages.items():
            if stage == "audits":
                for key in AUDITS:
                    put("audits", label, key, values_of(key, several))
            elif stage:
                put(title, label, stage, [shown_as_known(scores) for scores in several])
                put("recovered", label, stage, values_of("recovered", several))
    tables = {title: table for title, table in tables.items() if table}
    text = configs.show_tables(tables, ARROWS, path)
    proc.say(f"\n{text}\n\n{path}.md, {path}.csv")


def stages_of(lines, owner):
    return {stage: several for (model, stage, _), several in lines.items() if model == owner}


def shown_as_known(scores):
    muse = scores.get("knowmem_f", 0) / 100
    return scores.get("unseen_forget_prob", scores.get("forget_prob", muse))


# ------------------------------------------------------------------------------------------------
# settings


@dataclasses.dataclass(frozen=True)
class Attack(configs.Settings):
    """the attack"""
    attacks: tuple[str, ...] = ("relearn_random",)  # or _shortest, _longest; int8, int4, nf4, fp4,
                                                    # paraphrase, audits
    fraction: float = 0.2  # relearn: the share of the forget examples that is learned again
    examples: int | None = None  # relearn: their number instead
    relearn_data: str | None = None  # relearn: fine-tune on these rows instead (benign data)
    seeds: tuple[int, ...] = (0,)  # relearn: one curve per seed
    control: bool = True  # attack the retain model too
    utility: bool = False  # score the other sets after each attack too

    def problems(self):
        wrong = [name for name in self.attacks if name not in ATTACKS]
        if wrong or not self.attacks:
            yield f"--attacks={','.join(self.attacks)}: any of {', '.join(ATTACKS)}."
        yield from self.check("fraction", lambda v: 0 < v <= 1, "must be above 0 and at most 1.")
        yield from self.check("examples", lambda n: n >= 1, "must be at least 1.")
        yield from self.check("relearn_data", data.is_source, data.NO_SOURCE)
        if min(self.seeds, default=-1) < 0:
            yield f"--seeds={','.join(map(str, self.seeds))}: at least one, none below 0."


@dataclasses.dataclass(frozen=True)
class Config(unlearn.Config, Attack):
    epochs: float = 10.0  # passes over what is learned again
    batch_size: int = 4  # examples per optimizer step, over ALL processes

    def problems(self):
        if self.eval_every == 0 and not self.eval_at:
            yield "--eval_every=0: an attack is scored; above 0, or --eval_at=STEP."
        if self.parallel == "fsdp" and {*self.attacks} & {*GRIDS}:
            yield "--attacks: rounding needs whole weights: --parallel=ddp."
        if self.benchmark == "markov":
            yield "--benchmark=markov: relearn.py has no attack on Markov chains."


# an attack fine-tunes on the plain answers, from the model as it is: what it ignores is refused
FIXED = {"forget_loss": "nll", "retain_loss": "none", "forget_weight": 1.0, "audits": False,
         "resume": False, "save_every": 0.0}
IGNORED = dict.fromkeys([*FIXED, *configs.fields(unlearn.Method), *configs.fields(unlearn.Keeping)],
                        "leave it out")
INHERITED = evaluate.INHERITED | {"model", *configs.fields(unlearn.Optimizer)}
IGNORED |= {"audits": "write --attacks=audits", "seed": "write --seeds=0,1,2"}


def load_bench(c):
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


def prepare(name, label, c, proc, bench):
    """Score what the attacks on a run are compared with."""
    scoring = dataclasses.replace(c, audits="audits" in c.attacks)
    retain = evaluate.retain_reference(scoring, proc, bench)
    before = evaluate.reference(scoring, proc, name, bench)
    target = evaluate.reference(scoring, proc, c.model, bench) if c.model else None
    return Attacked(name, label, c, proc, bench, retain, before, target)


def main(argv):
    given, names = configs.parse(Config, argv, __doc__)
    if not names:
        raise UsageError("name at least one run directory or model: python relearn.py out/demo "
                         "(--help has the details).")
    for word in argv:
        key = word.removeprefix("--").partition("=")[0]
        if key in IGNORED:
            raise UsageError(f"{word}: attacks do not read {key}; {IGNORED[key]}.")
    first = configs.make(Config, evaluate.inherit(INHERITED, names, given) | FIXED)
    runs = evaluate.own_settings(names, first, given)
    for name, c in runs.values():
        for setting, model in (("model", name), ("model", c.model),
                               ("retain_model", c.retain_model)):
            configs.check_name(model or name, setting)
        rundir.writable(c.out)
    proc = evaluate.setup(first)
    bench = load_bench(first)
    if first.control and not all(c.retain_model for _, c in runs.values()):
        proc.say("No retain_model: there is no control, so what is relearned cannot be told from "
                 "what is newly learned.")

    controls, stages = {}, {}
    for label, (name, c) in runs.items():
        a = prepare(name, label, c, proc, bench)
        rows = attack_all(a, controls)
        lines = lines_of(a, rows)
        if proc.rank == 0:
            report(a, rows, lines)
        stages[label] = stages_of(lines, label)
        if c.control and c.retain_model:
            control = os.path.basename(os.path.normpath(c.retain_model))
            stages.setdefault(control, stages_of(lines, CONTROL))
    if len(names) > 1 and proc.rank == 0:
        compare(os.path.join(given.get("out", "out"), "relearn"), stages, proc)
    models.cleanup()


if __name__ == "__main__":
    configs.run(main)
