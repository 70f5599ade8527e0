"""Data, tables and picture of the study.

    PYTHONPATH=. python configs/results/tofu_study/study.py data locuslab/TOFU out/study_data
        # its data set, from TOFU's files
    PYTHONPATH=. python configs/results/tofu_study/study.py rate out/study_npo.choice 1.5e-4 5e-5
        # the rate that a choice takes; the lowest where every point is barred
    PYTHONPATH=. python configs/results/tofu_study/study.py collect out/study
        # keeps runs.jsonl, from what run.sh left in out/
    PYTHONPATH=. python configs/results/tofu_study/study.py again out/study
        # adds to runs.jsonl: attacks that were run later, on models made again by run.sh
    PYTHONPATH=. python configs/results/tofu_study/study.py
        # tables and picture, from runs.jsonl
"""
import dataclasses
import glob
import os
import re
import statistics
import sys

import numpy as np
import scipy.stats
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import data
from configs import rundir, tables

HERE = os.path.dirname(os.path.abspath(__file__))
KEPT = os.path.join(HERE, "runs.jsonl")
METHODS = {  # as run.sh calls it: (name, color, the same in all pictures)
    "simnpo": ("SimNPO", "C0"),
    "simnpo_readme": ("SimNPO, README's ratio", "skyblue"),
    "npo": ("NPO", "C1"),
    "graddiff": ("GradDiff", "C2"),
    "idk": ("IDK", "C3"),
    "dpo": ("DPO", "C4"),
    "target": ("target", "gray"),
    "retain": ("retain model", "black"),
}
COLORS = {method: color for method, (_, color) in METHODS.items()}
MARKERS = {"target": "s", "retain": "*"}  # others: a circle
ENDS = ("target", "retain")
SAME = 0.02  # nats per token between a model and itself made again (README: what was measured)
SAMPLED = 40  # questions, the first ones: run.sh's --eval_rows of attacks
SETTINGS = (
    "forget_loss", "beta", "forget_weight", "retain_weight", "lr", "seed", "epochs", "batch_size",
    "git", "seconds")

# ------------------------------------------------------------------------------------------------
# the data set: the last ten authors of TOFU, 20 questions each


def write_data(tofu, path):
    """The forget set is the last five authors, the retain set the five before them."""
    qa = ("question", "answer")
    rows = data.read_config(tofu, "forget10", qa)[-200:]
    perturbed = data.read_config(tofu, "forget10_perturbed", qa)[-200:]
    files = {
        "full": rows,
        "retain95": rows[:100],
        "forget05": rows[100:],
        "forget05_perturbed": perturbed[100:],
        "retain_perturbed": perturbed[:100:3],  # of all five authors
        "real_authors_perturbed": data.read_config(tofu, "real_authors_perturbed", qa)[::3],
        "world_facts_perturbed": data.read_config(tofu, "world_facts_perturbed", qa)[::3],
        "holdout05": data.read_config(tofu, "retain90", qa)[-100:],  # no model here has seen them
    }
    for name, some in files.items():
        rundir.write_records(os.path.join(path, f"{name}.jsonl"), some)


# ------------------------------------------------------------------------------------------------
# from run directories to runs.jsonl: a row a model, {name, method, seed, scores, ...}


def read_lines(path):
    return data.documents(data.read_text(path))


def forget_questions(path):
    """Of each forget question the true answer's mean NLL and tokens, the greedy answer's ROUGE."""
    forget = [record for record in read_lines(path) if record["set"] == "forget"]
    return {"nll": [round(record["nll"], 5) for record in forget],
            "n_tokens": [record["n_tokens"] for record in forget],
            "rouge": [round(record["rougeL_recall"], 5) for record in forget]}


def attacks_on(study, name):
    """{attack, as run.sh calls it: its rows} of those that have ended on a model."""
    found = {}
    for attack in ("samples", "shortest", "random", "weights"):
        folder = f"{study}_attacks/{name}_{attack}"
        if os.path.isfile(f"{folder}/relearn.csv"):  # the attack has ended
            [found[attack]] = read_lines(f"{folder}/relearn.json")
    return found


def scored(study, name, folder):
    """What is kept of a model whose scores are in `folder`."""
    return {"scores": rundir.read_json(f"{folder}/scores.json"),
            "questions": forget_questions(f"{folder}/examples.jsonl"),
            "attacks": attacks_on(study, name)}


def collect(study):
    rows = []
    for end in ENDS:
        name = f"{os.path.basename(study)}_{end}"
        row = {"name": name, "method": end, "seed": 0}
        rows.append(row | scored(study, name, f"{study}_ends/{name}"))
    for method in METHODS:
        choice = f"{study}_{method}.choice"
        if os.path.isfile(choice):
            sentence = data.read_text(choice).strip()
            rows.append({"name": f"choice_{method}", "sentence": sentence})
        for path in sorted(glob.glob(f"{study}_{method}_[0-9]*_s[0-9]/scores.json")):
            folder = os.path.dirname(path)
            name = os.path.basename(folder)
            run = rundir.read_json(f"{folder}/run.json")
            if "seconds" in run:  # it has ended
                row = {"name": name, "method": method} | {key: run[key] for key in SETTINGS}
                rows.append(row | scored(study, name, folder))
    rundir.write_records(KEPT, rows)


def distances(first, again, score):
    """Between two models, of each question that both were scored on."""
    return [abs(a - b) for a, b in zip(first["questions"][score], again["questions"][score])]


def add_again(study):
    """Adds to runs.jsonl what was run on models that the same commands made again.

    An attack that the first model lacks is added. `again`, a list with one entry a model, names
    these attacks and keeps the questions that the model was scored on (the first `--eval_rows`),
    to be compared with the first model's. A model that is not the same one is refused. To be
    called once, when the attacks have ended.
    """
    rows = read_lines(KEPT)
    for row in rows:
        folder = os.path.join(os.path.dirname(study), row["name"])
        if not os.path.isfile(f"{folder}/scores.json"):
            continue
        run = rundir.read_json(f"{folder}/run.json")
        attacks = attacks_on(study, row["name"])
        again = {"git": run["git"], "seconds": run["seconds"],
                 "attacks": sorted(attacks.keys() - row["attacks"].keys()),
                 "questions": forget_questions(f"{folder}/examples.jsonl")}
        apart = statistics.mean(distances(row, again, "nll"))
        if apart > SAME:
            sys.exit(f"{folder}: its NLL is {apart:.3f} from that of {row['name']} in {KEPT}, "
                     f"above {SAME}: another model; make it again with run.sh.")
        row.setdefault("again", []).append(again)
        row["attacks"] = attacks | row["attacks"]
    rundir.write_records(KEPT, rows)


# ------------------------------------------------------------------------------------------------
# the chosen points


def chosen_rate(sentence, rates):
    """The rate whose point a choice names; the lowest where every point is barred."""
    match = re.search(r"_([^_]+)_s0_examples\.jsonl is chosen", sentence)
    return match[1] if match else min(rates, key=float)


@dataclasses.dataclass
class Point:
    """A method at one rate, in all its seeds; target and retain model have one run and no rate."""
    method: str
    rate: float | None
    runs: list
    chosen: bool

    @property
    def name(self):
        """The method; with its rate where the rule does not choose it."""
        name = METHODS[self.method][0]
        return name if self.chosen else f"{name}, lr {self.rate:g}"

    @property
    def label(self):
        return self.name if self.method in ENDS else f"{self.name} (n={len(self.runs)})"

    @property
    def style(self):
        """Filled and solid where it is chosen, else hollow and dashed."""
        if self.chosen:
            return {"color": COLORS[self.method]}
        return {"color": COLORS[self.method], "linestyle": "--", "fillstyle": "none"}

    @property
    def marker(self):
        return MARKERS.get(self.method, "o")


def points_of(rows):
    """All points: target, retain model, then each method's rates, the chosen one first."""
    points = []
    for row in rows:
        if row.get("method") in ENDS:
            points.append(Point(row["method"], None, [row], chosen=True))
    for row in rows:
        if "sentence" in row:
            method = row["name"].removeprefix("choice_")
            runs = [run for run in rows if run.get("method") == method]
            rates = {run["lr"] for run in runs}
            best = float(chosen_rate(row["sentence"], rates))
            for rate in sorted(rates, key=lambda rate: rate != best):
                seeds = [run for run in runs if run["lr"] == rate]
                points.append(Point(method, rate, seeds, chosen=rate == best))
    return points


def spread(values):
    """None of no values, one value, or (mean, standard deviation)."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return values[0] if values else None
    return statistics.mean(values), statistics.stdev(values)


# ------------------------------------------------------------------------------------------------
# tables


def sweep_table(rows):
    columns = ("forget_quality", "model_utility", "forget_prob", "forget_rouge", "degenerate",
               "retain_prob", "retain_rouge")
    table = {}
    for row in rows:
        if "scores" in row and row["seed"] == 0:
            name = METHODS[row["method"]][0]
            if "lr" in row:
                name += f", lr {row['lr']:g}"
            table[name] = {key: row["scores"].get(key) for key in columns}
    return table


def score_table(points):
    columns = (
        "forget_quality", "model_utility", "forget_prob", "forget_rouge",
        "forget_paraphrased_prob", "degenerate", "retain_prob", "retain_rouge",
        "real_authors_prob", "real_authors_rouge", "world_facts_prob", "world_facts_rouge")
    table = {}
    for point in points:
        scores = [run["scores"] for run in point.runs]
        values = {key: spread([some.get(key) for some in scores]) for key in columns}
        table[point.label] = values
    return table


def attacked(point, attack, kind):
    """[the rows of one kind of attack] of each run and each of the attack's seeds."""
    curves = {}
    for run in point.runs:
        for row in run["attacks"].get(attack, []):
            if row["attack"] == kind:
                curves.setdefault((run["name"], row["seed"]), []).append(row)
    return list(curves.values())


def leak_table(points):
    """Of the questions that were sampled: the greedy answers' ROUGE, and leak@k."""
    table = {}
    for point in points:
        rows = [curve[-1] for curve in attacked(point, "samples", "sample")]
        if not rows:
            continue
        sampled = [run for run in point.runs if "samples" in run["attacks"]]
        greedy = [statistics.mean(run["questions"]["rouge"][:SAMPLED]) for run in sampled]
        line = {"greedy ROUGE": spread(greedy)}
        for k in (1, 4, 16):
            line[f"leak@{k}"] = spread([row[f"leak_at_{k}"] for row in rows])
        table[f"{point.name} (n={len(rows)})"] = line
    return table


def relearn_table(points):
    """Forget probability of the questions that were not relearned, before and after."""
    table = {}
    for point in points:
        line = {}
        for attack in ("random", "shortest"):
            curves = attacked(point, attack, f"relearn_{attack}")
            for stage, at in (("before", 0), ("after", -1)) if curves else ():
                probs = [curve[at]["unseen_forget_prob"] for curve in curves]
                line[f"{attack}, {stage}"] = spread(probs)
            if curves:
                line[f"{attack}, recovered"] = spread([c[-1].get("recovered") for c in curves])
        if line:
            table[point.name] = line
    return table


def weights_table(points):
    """Forget probability before and after rounding, and the audits of the unrounded weights."""
    columns = ("exact_memorization", "extraction_strength", "mia_loss", "mia_min_k_pp",
               "mia_gradnorm", "mia_reference", "privleak")
    table = {}
    for point in points:
        rows = {}  # {attack: its rows}
        for attack in ("audits", "int4", "nf4"):
            rows[attack] = [curve[-1] for curve in attacked(point, "weights", attack)]
        if not rows["audits"]:
            continue
        line = {}
        for attack, name in {"audits": "unrounded", "int4": "int4", "nf4": "nf4"}.items():
            line[f"forget_prob, {name}"] = spread([row["forget_prob"] for row in rows[attack]])
        for key in columns:
            line[key] = spread([row.get(key) for row in rows["audits"]])
        table[point.name] = line
    return table


def forgetting(rows, run):
    """Of each forget question: how far its log-prob per token fell, and what that may hang on."""
    [target] = [row for row in rows if row.get("method") == "target"]
    confidence = -np.array(target["questions"]["nll"])
    after = -np.array(run["questions"]["nll"])
    n_tokens = np.array(target["questions"]["n_tokens"])
    return {"fell": confidence - after, "confidence": confidence, "n_tokens": n_tokens}


def bias_table(rows, points):
    """Spearman's rank correlation of a question's forgetting with its confidence and length."""
    table = {}
    for point in points:
        if point.method in ENDS:
            continue
        confidence, length, share = [], [], []
        for run in point.runs:
            columns = forgetting(rows, run)
            fell, n_tokens = columns["fell"], columns["n_tokens"]
            confidence.append(scipy.stats.spearmanr(columns["confidence"], fell).statistic)
            length.append(scipy.stats.spearmanr(n_tokens, fell).statistic)
            short = n_tokens <= np.median(n_tokens)
            share.append(fell[short].mean() / fell[~short].mean())
        table[point.label] = {
            "with the target's confidence": spread(confidence),
            "with the answer's length": spread(length),
            "short half / long half": spread(share),
        }
    return table


def again_table(points):
    """Models made again beside the first ones: the mean distance over the same questions."""
    table = {}
    for point in points:
        nll, rouge = [], []
        models = 0
        for run in point.runs:
            for again in run.get("again", []):
                models += 1
                nll += distances(run, again, "nll")
                rouge += distances(run, again, "rouge")
        if models:
            table[f"{point.name} (n={models}), {len(nll)} questions"] = {
                "distance of the NLL": statistics.mean(nll),
                "largest": max(nll),
                "distance of the ROUGE": statistics.mean(rouge),
            }
    return table


def show(rows):
    points = [point for point in points_of(rows) if point.chosen or len(point.runs) > 1]
    for row in rows:
        if "sentence" in row:
            print(row["sentence"])
    for title, table in {
        "The sweep, seed 0": sweep_table(rows),
        "Mean and standard deviation over seeds": score_table(points),
        "Sampled answers": leak_table(points),
        "Relearning: forget probability of the other questions": relearn_table(points),
        "Rounded weights, and audits": weights_table(points),
        "Reference bias: rank correlation of a question's forgetting": bias_table(rows, points),
        "Made again: the distance from the first models": again_table(points),
    }.items():
        if table:
            print("\n" + tables.markdown(f"### {title}", table, {}))


# ------------------------------------------------------------------------------------------------
# pictures: study.png, and overview.png for README


def middle(value):
    """(mean, standard deviation) of a table's value."""
    return value if isinstance(value, tuple) else (value, 0)


def draw_scores(axes, rows, points):
    """Forget quality against utility of the chosen points, mean and standard deviation."""
    for point in points:
        if point.chosen:
            scores = [run["scores"] for run in point.runs]
            x, x_error = middle(spread([some["model_utility"] for some in scores]))
            # the retain model is the reference: the p-value of equal samples
            y, y_error = middle(spread([some.get("forget_quality", 1) for some in scores]))
            below = min(y_error, 0.9 * y)  # the axis is logarithmic
            axes.errorbar(x, y, xerr=x_error or None, yerr=[[below], [y_error]], capsize=3,
                          marker=point.marker, markersize=9, **point.style)
    axes.axhline(0.05, color="gray", linestyle=":")
    axes.set(yscale="log", xlabel="model utility (better to the right)",
             ylabel="forget quality, p-value (better upwards)",
             title="Forget quality and utility (dotted: p = 0.05)")


def draw_trade(axes, rows, points):
    """What is kept against what is forgotten, of all points; a line joins a method's rates."""
    places = {}  # {method: [(x, y) of each rate]}
    for point in points:
        scores = [run["scores"] for run in point.runs]
        x, x_error = middle(spread([some["forget_prob"] for some in scores]))
        y, y_error = middle(spread([some["retain_rouge"] for some in scores]))
        axes.errorbar(x, y, xerr=x_error or None, yerr=y_error or None, capsize=3,
                      marker=point.marker, markersize=9, **point.style)
        places.setdefault(point.method, []).append((x, y))
    for method, both in places.items():
        axes.plot(*zip(*both), color=COLORS[method], linewidth=0.8, zorder=0)
    axes.set(xlabel="forget probability of the true answer",
             ylabel="retain ROUGE-L recall (better upwards)", xlim=(-0.03, 1.03), ylim=(0, 1.05),
             title="Kept against forgotten (star: the aim; hollow: not chosen)")


def draw_leaks(axes, rows, points):
    """What the best of k sampled answers says: leak@k over k."""
    for i, point in enumerate(points):
        curves = attacked(point, "samples", "sample")
        if curves:
            k = np.array([row["k"] for row in curves[0]])
            values = [[row["leak"] for row in curve] for curve in curves]
            error = np.std(values, 0, ddof=1) if len(values) > 1 else None
            beside = k * 1.012**i  # else equal curves hide each other
            axes.errorbar(beside, np.mean(values, 0), yerr=error, capsize=3, marker=".",
                          **point.style)
            axes.set(xscale="log", xticks=k, xticklabels=k)
    axes.minorticks_off()
    axes.set(xlabel="k, sampled answers to a question", title="What sampling brings out",
             ylabel="leak@k: ROUGE-L recall of the best answer")


def draw_relearning(axes, rows, points):
    """Forget probability of the questions that were not relearned, before and after."""
    table = relearn_table(points)
    styles = {point.name: point.style for point in points}
    for i, attack in enumerate(("random", "shortest")):
        shown = {name: line for name, line in table.items() if f"{attack}, after" in line}
        for j, (name, line) in enumerate(shown.items()):
            x = i + 0.8 * (j - (len(shown) - 1) / 2) / len(shown)
            before, _ = middle(line[f"{attack}, before"])
            after, error = middle(line[f"{attack}, after"])
            axes.plot([x, x], [before, after], linewidth=1.5, **styles[name])
            axes.plot(x, before, marker="_", markersize=10, **styles[name])
            axes.errorbar(x, after, yerr=error or None, marker="^", capsize=3, **styles[name])
    axes.set(xticks=(0, 1), xticklabels=("20 random questions", "the 20 shortest answers"),
             xlim=(-0.6, 1.6), ylabel="forget probability of the others", ylim=(0, 1),
             title="Relearning: before (bar) and after (triangle)")


def draw_bias(axes, rows, points, column, xlabel, title):
    """How far each question fell, against a column of `forgetting`: SimNPO and NPO, a line each."""
    for point in points:
        if point.chosen and point.method in ("simnpo", "npo"):
            color = COLORS[point.method]
            columns = forgetting(rows, point.runs[0])
            x, fell = columns[column], columns["fell"]
            axes.plot(x, fell, ".", color=color, alpha=0.6)
            slope, start = np.polyfit(x, fell, 1)
            ends = np.array([x.min(), x.max()])
            axes.plot(ends, start + slope * ends, color=color)
    axes.set(xlabel=xlabel, title=title, ylabel="fall of the log-prob (nats per token)")


def draw_confidence(axes, rows, points):
    draw_bias(axes, rows, points, "confidence", "target's log-prob of the answer, per token",
              "Forgetting by the target's confidence, seed 0")


def draw_lengths(axes, rows, points):
    draw_bias(axes, rows, points, "n_tokens", "tokens of the answer",
              "Forgetting by length, seed 0")


def draw(name, rows, *panels, height):
    """One figure, two panels a row, its legend below them."""
    points = points_of(rows)
    figure = Figure(figsize=(11, height), layout="constrained")
    all_axes = figure.subplots(len(panels) // 2, 2).flat
    for axes, panel in zip(all_axes, panels):
        panel(axes, rows, points)
    handles = []
    for point in points:
        if point.chosen:
            handles.append(Line2D([], [], label=point.name, color=COLORS[point.method],
                                  marker=point.marker, linestyle=""))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(os.path.join(HERE, name), dpi=110)


def main(words):
    command, *words = words or ["show"]
    if command == "data":
        return write_data(*words)
    if command == "rate":
        choice, *rates = words
        return print(chosen_rate(data.read_text(choice), rates))
    if command == "collect":
        collect(*words)
    if command == "again":
        add_again(*words)
    rows = read_lines(KEPT)
    show(rows)
    draw("study.png", rows, draw_scores, draw_trade, draw_leaks, draw_relearning,
         draw_confidence, draw_lengths, height=12)
    draw("overview.png", rows, draw_trade, draw_leaks, height=4.6)


if __name__ == "__main__":
    main(sys.argv[1:])
