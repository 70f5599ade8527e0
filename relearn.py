"""Attack unlearned models: does what was forgotten come back?

    python relearn.py out/demo                      # relearn 20 % of the forget set, score the rest
    python relearn.py out/demo --attacks=relearn_random,relearn_shortest,int4,worst_case
    python relearn.py out/demo --attacks=sample     # leak@k: what the best of k answers gives away
    python relearn.py out/simnpo_s0 out/npo_s0 out/npo_s1 --attacks=int4,audits   # one table
    # Unlearn-Smooth's protocol on MUSE Books: runs of 50, 75 and 100 steps (News: 100, 125, 150)
    python relearn.py out/books --steps=50 --eval_at=50 --schedule=cosine --fraction=1 --lr=1e-5
    python relearn.py org/model --benchmark=tofu --model=org/target --retain_model=org/retain

The retain model, which never saw the forget set, is attacked in the same way, once: what it learns
is not memory that comes back. Several runs are attacked with the settings of the first one (lr,
template, ...), each against its own target and retain model. A run's rows go to its relearn.json,
its tables to relearn.md and .csv, its curves to relearn.png (or below --out); the tables over
several runs to out/relearn.md and .csv (or in --out).
"""
import dataclasses
import functools
import json
import os
import random
import statistics
from collections.abc import Callable

import configs

if __name__ == "__main__":
    configs.help_if_asked(__file__, "Config", __doc__)  # before the imports that take seconds

import numpy as np
import torch

import data
import evaluate
import model as models
import unlearn
from configs import UsageError, recorded, rundir, tables

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

    def score(self, lm, tokenizer, seen=(), records=None):
        """The scores of all questions, of those not in `seen`, and how much is recovered.

        records: of this model, where it has been scored already.
        """
        if records:
            scores = evaluate.summarize(records, self.retain, self.c, self.target)
        else:
            scores, records = evaluate.evaluate(
                lm, tokenizer, self.bench, self.c, self.proc, self.retain, self.target)
        rest = forget_records(records, seen)
        if seen and rest and rest[0]["set"] == "forget":
            retain = forget_records(self.retain, seen) or None
            for key, value in evaluate.summarize(rest, retain, self.c).items():
                scores[f"unseen_{key}"] = value
        return scores | self.recovered(records, seen)

    def recovered(self, records, seen=()):
        compared = [forget_records(some, seen) for some in (records, self.before, self.target)]
        return {"recovered": recovered(*map(known, compared))} if all(compared) else {}

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

    out = f"{a.c.out}/relearn/{a.label}_{how}_{a.seed}"
    c = dataclasses.replace(a.c, seed=a.seed, out=out)
    run = rundir.RunDirectory(c, a.proc)
    run.resumable = False

    def score(step, epoch):
        records = None
        if step == 0:  # the model as it is: scored once, for all seeds
            records = evaluate.reference(a.c, a.proc, a.name, a.bench, (lm, tokenizer))
        return a.score(lm, tokenizer, seen, records)

    with run.watch_signals(), a.proc.clock.phase("training"):
        log = unlearn.train(c, a.proc, lm, {"forget": [groups[i] for i in chosen]}, score, run,
                            title=f"relearn {a.label}")
    return [row for row in log if "loss" not in row]


# bitsandbytes' 4-bit float: 2 bits of exponent, 1 of mantissa
FP4 = torch.tensor([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
# int8 rounds weights in blocks of 64 and nothing else. It is not LLM.int8, which rounds activations
# too and keeps outliers.
GRIDS = {
    "int8": torch.arange(-127, 128) / 127,
    "int4": torch.arange(-7, 8) / 7,
    # arXiv 2305.14314, appendix E: quantiles of a normal distribution, with an exact 0
    "nf4": torch.tensor([
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]),
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


def worst_case(a, lm, tokenizer):
    """The most that one of three prompts gets out of the model, question by question.

    The question, its paraphrase, and the question without a template: forget_prob and forget_rouge
    are means over questions of the highest probability and the highest ROUGE.
    """
    rows = a.bench.evals["forget"]
    paraphrased = [row | {"question": row["paraphrased_question"]} for row in rows]
    asked = {}  # {index: [record of each prompt]}
    for template, some in ((a.c.template, rows), (a.c.template, paraphrased), ("none", rows)):
        c = dataclasses.replace(a.c, template=template)
        bench = data.Benchmark([], [], {"forget": some})
        for record in evaluate.record_qa(lm, tokenizer, bench, c, a.proc):
            asked.setdefault(record["index"], []).append(record)
    worst = []
    for records in asked.values():
        worst.append({"set": "forget", "answer": records[0]["answer"],
                      "nll": min(evaluate.column(records, "nll")),
                      "rougeL_recall": max(evaluate.column(records, "rougeL_recall"))})
    return [{"step": 0, "epoch": 0.0, **evaluate.set_scores("forget", worst), **a.recovered(worst)}]


def sampler(names, temperature):
    """choose(logits (S, V), indices of the sequences) -> ids (S,): softmax(logits / temperature).

    A sequence has a generator of its own, seeded by its name, and takes one uniform number a token:
    the first id whose cumulative probability is above it. So a text depends neither on the others
    in its batch nor on the number of processes.
    """
    generators = [random.Random(name) for name in names]

    def choose(logits, indices):
        cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (S, V)
        drawn = [[generators[i].random()] for i in indices]
        drawn = torch.tensor(drawn, dtype=torch.float64, device=logits.device)  # (S, 1)
        return torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)[:, 0]

    return choose


def sample(a, lm, tokenizer):
    """Answer each forget question --samples times: leak_at_k, of what the best of k answers says.

    The mean over questions of `evaluate.expected_maximum` of the answers' ROUGE; higher = leaks
    more. arXiv 2511.04934. The whole distribution is sampled, at --temperature. Departures: the
    paper has a judge and we compare with the true answer, by the benchmark's own ROUGE (TOFU's
    recall, in [0, 1]; MUSE's F1, in percent, over KnowMem's questions and VerbMem's passages
    alike); and the retain model is sampled too: what it says is chance.
    """
    n, values = a.c.samples, []
    for name in evaluate.FORGET_SETS:
        asked = evaluate.questions(tokenizer, name, a.bench.evals.get(name, []), a.c)
        texts = [dict(record) for record in asked for _ in range(n)]
        names = [f"{a.seed} {name} {i // n} {i % n}" for i in range(len(texts))]
        if texts:
            a.proc.say(f"{a.label}, {name}: {len(asked)} questions x {n} = {len(texts)} answers of "
                       f"at most {a.c.max_new_tokens} tokens")
            evaluate.answer(lm, tokenizer, texts, a.c, a.proc,
                            choose=sampler(names, a.c.temperature))
            if name == "forget":
                values += evaluate.column(texts, "rougeL_recall")
            else:
                values += [100 * value for value in evaluate.column(texts, "rougeL_f1")]
    values = np.reshape(values, (-1, n))
    rows, leaks = [], {}
    for k in SAMPLES:
        if k <= n:
            best = [evaluate.expected_maximum(some, k) for some in values]
            leaks[f"leak_at_{k}"] = leak = np.mean(best)
            rows.append({"step": 0, "epoch": 0.0, "k": k, "leak": leak, **leaks})
    return rows


@dataclasses.dataclass(frozen=True)
class Kind:
    """run(a, lm, tokenizer) -> rows of {step, epoch, scores}.

    random: repeated over --seeds. needs: a column of the forget rows. shows: scores that have a
    table of their own. x: what its rows are drawn over, where there are several.
    """
    run: Callable
    random: bool = False
    needs: str | None = None
    shows: tuple = ()
    x: str = "epoch"


SAMPLES = [4 ** i for i in range(8)]
LEAKS = tuple(f"leak_at_{k}" for k in SAMPLES)
AUDITS = (*recorded.MEMORIZATION, "memorization", *(f"mia_{key}" for key in recorded.MEMBERSHIP),
          "mia_reference", "privleak", "privacy", "utility_ratio", "composite")
ATTACKS = {}
for how in ("random", "shortest", "longest"):
    ATTACKS[f"relearn_{how}"] = Kind(functools.partial(relearn, how=how), random=True)
for grid in GRIDS:
    ATTACKS[grid] = Kind(functools.partial(quantize, grid=grid))
ATTACKS |= {
    "paraphrase": Kind(paraphrase, needs="paraphrased_question"),
    "worst_case": Kind(worst_case, needs="paraphrased_question"),
    "sample": Kind(sample, random=True, needs="question", shows=LEAKS, x="k"),
    "audits": Kind(audit, shows=AUDITS),
}


def attack(a, name, seed):
    """Rows of one attack on one model."""
    lm, tokenizer = evaluate.load(a.name, a.c, a.proc)
    rows = ATTACKS[name].run(dataclasses.replace(a, seed=seed), lm, tokenizer)
    return [{"attack": name, "model": a.label, "seed": seed, **row} for row in rows]


def attack_all(a, controls):
    """Rows of all attacks on a run and on its retain model, the control.

    controls: {(model, attack, seed): rows}; one that several runs share is attacked once.
    """
    jobs = []
    for name in a.c.attacks:
        seeds = a.c.seeds if ATTACKS[name].random else a.c.seeds[:1]
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
            rundir.write(f"{a.c.out}/relearn.json", json.dumps(rows, indent=1) + "\n")
    return rows


# ------------------------------------------------------------------------------------------------
# the report

CONTROL = "retain model"
SHOWN = ("forget_prob", "forget_rouge", "forget_quality", "model_utility", "verbmem_f", "knowmem_f",
         "knowmem_r", "degenerate", "recovered", "leak")
ARROWS = tables.ARROWS | dict.fromkeys(LEAKS, "↓")


def grouped(rows):
    """{(model, attack): [the rows of each seed]}."""
    groups = {}
    for row in rows:
        seeds = groups.setdefault((row["model"], row["attack"]), {})
        seeds.setdefault(row["seed"], []).append(row)
    return {key: list(seeds.values()) for key, seeds in groups.items()}


def lines_of(a, rows):
    """{(model, stage): [scores of each seed]}: what the tables are made of.

    stage: before unlearning, unlearned, an attack, or the start of one.
    """
    lines = {}
    for model, stage, records in ((a.label, "before unlearning", a.target),
                                  (a.label, "unlearned", a.before),
                                  (CONTROL, "unlearned", a.retain)):
        if records:
            lines[model, stage] = [evaluate.summarize(records, a.retain, a.c)]
    for (model, name), curves in grouped(rows).items():
        if len(curves[0]) > 1 and ATTACKS[name].x == "epoch":
            lines[model, f"{name}, start"] = [curve[0] for curve in curves]
        lines[model, name] = [curve[-1] for curve in curves]
    return lines


def rest(row, key):
    """A score; after relearning, of the questions that were not learned again."""
    return row.get(f"unseen_{key}", row.get(key))


def report(path, lines, proc, with_spread):
    """The tables of a run, or of several: a score by stage; of some attacks their own scores."""
    by_title = {}
    present = {key for several in lines.values() for scores in several for key in scores}
    for (model, stage), several in lines.items():
        own = ATTACKS[stage].shows if stage in ATTACKS else ()
        for key in own or SHOWN:
            values = [rest(scores, key) for scores in several]
            if None in values:
                continue
            value = statistics.mean(values)
            if with_spread and len(values) > 1:
                value = value, statistics.stdev(values)
            title, column = (stage, key) if own else (f"{key} {ARROWS[key]}", stage)
            if f"unseen_{key}" in present and not own:
                title += ", after relearning that of the other questions"
            by_title.setdefault(title, {}).setdefault(model, {})[column] = value
    text = tables.show_tables(by_title, ARROWS, path)
    proc.say(f"\n{text}\n\n{path}.md, {path}.csv")


def draw(path, x, groups):
    """The curves over x, of the questions that were not learned again."""
    shown = {}
    for (model, attack), curves in groups.items():
        if ATTACKS[attack].x == x and len(curves[0]) > 1:
            y = next(key for key in SHOWN if rest(curves[0][0], key) is not None)
            values = [[rest(row, y) for row in curve] for curve in curves]
            shown[model, attack] = evaluate.column(curves[0], x), np.array(values)
    if shown:
        tables.draw_curves(path, x, y, shown)


# ------------------------------------------------------------------------------------------------
# settings


@dataclasses.dataclass(frozen=True)
class Attack(configs.Settings):
    """the attack"""
    attacks: tuple[str, ...] = ("relearn_random",)  # or _shortest, _longest; int8, int4, nf4, fp4,
                                                    # paraphrase, worst_case, sample, audits
    fraction: float = 0.2  # relearn: the share of the forget examples that is learned again
    examples: int | None = None  # relearn: their number instead
    relearn_data: str | None = None  # relearn: fine-tune on these rows instead (benign data)
    samples: int = 64  # sample: answers to each question
    temperature: float = 1.0  # sample: of the distribution they are drawn from
    seeds: tuple[int, ...] = (0,)  # relearn, sample: one curve per seed
    control: bool = True  # attack the retain model too
    utility: bool = False  # score the other sets after each attack too

    def problems(self):
        yield from self.check("attacks", lambda names: names and {*names} <= ATTACKS.keys(),
                              f"any of {', '.join(ATTACKS)}.")
        yield from self.check("fraction", lambda v: 0 < v <= 1, "must be above 0 and at most 1.")
        yield from self.check("examples samples", lambda n: n >= 1, "must be at least 1.")
        yield from self.check("temperature", lambda v: v > 0, "must be above 0.")
        yield from self.check("relearn_data", data.is_source, data.NO_SOURCE)
        yield from self.check("seeds", lambda seeds: min(seeds, default=-1) >= 0,
                              "at least one, none below 0.")


@dataclasses.dataclass(frozen=True)
class Config(unlearn.Config, Attack):
    epochs: float = 10.0  # passes over what is learned again
    batch_size: int = 4  # examples per optimizer step, over ALL processes

    def problems(self):
        if not self.scored:
            yield "--eval_every=0: an attack is scored; above 0, or --eval_at=STEP."
        if self.parallel == "fsdp" and {*self.attacks} & {*GRIDS}:
            yield "--attacks: rounding needs whole weights: --parallel=ddp."
        if self.benchmark == "markov":
            yield "--benchmark=markov: relearn.py has no attack on Markov chains."


# an attack fine-tunes on the plain answers, from the model as it is: what it ignores is refused
HYPER = (*configs.fields(unlearn.Method), *configs.fields(unlearn.Keeping))
FIXED = {name: getattr(unlearn.Config, name) for name in HYPER}
FIXED |= {"forget_loss": "nll", "retain_loss": "none", "audits": False, "resume": False,
          "save_every": 0.0}
IGNORED = dict.fromkeys(FIXED, "leave it out")
INHERITED = evaluate.INHERITED | {"model", *configs.fields(unlearn.Optimizer)}
IGNORED |= {"audits": "write --attacks=audits", "seed": "write --seeds=0,1,2"}


def load_bench(c):
    bench = data.load(c.benchmark, c.subset, c.data, c.forget_data, c.retain_data, split=c.split,
                      holdout="audits" in c.attacks)
    if not c.utility and "forget" in bench.evals:
        bench.evals = {"forget": bench.evals["forget"]}
    for name in c.attacks:
        column = ATTACKS[name].needs
        for row in bench.evals.get("forget") or bench.evals["knowmem_f"]:
            if column and column not in row:
                raise UsageError(f"--attacks={name}: the forget set has no column {column}.")
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
    first = configs.make(Config, rundir.inherit(INHERITED, names, given) | FIXED)
    runs = rundir.own_settings(names, first, given)
    rundir.check_models(runs, True)
    for _, c in runs.values():
        rundir.writable(c.out)
    proc = evaluate.setup(first)
    bench = load_bench(first)
    if first.control and not all(c.retain_model for _, c in runs.values()):
        proc.say("No retain_model: there is no control, so what is relearned cannot be told from "
                 "what is newly learned.")

    controls, every = {}, {}
    for label, (name, c) in runs.items():
        a = prepare(name, label, c, proc, bench)
        rows = attack_all(a, controls)
        lines = lines_of(a, rows)
        if proc.rank == 0:
            path = f"{c.out}/relearn"
            report(path, lines, proc, with_spread=True)
            draw(f"{path}.png", "epoch", grouped(rows))
            draw(f"{c.out}/leak.png", "k", grouped(rows))
            proc.say(f"{c.out}: relearn.json; curves, if there are any, in relearn.png, leak.png")
        control = os.path.basename(os.path.normpath(c.retain_model or CONTROL))
        for (model, stage), several in lines.items():
            every[control if model == CONTROL else model, stage] = several
    if len(names) > 1 and proc.rank == 0:
        report(os.path.join(given.get("out", "out"), "relearn"), every, proc, with_spread=False)
    models.cleanup()


if __name__ == "__main__":
    configs.run(main)
