"""Tables, pictures and a run's last words. Needs matplotlib for a picture only.

A table is {row name: {score: value}}; a value is a number, a (mean, standard deviation), or None
where the score does not apply.
"""
import csv
import io
import itertools
import os
import re
import statistics

from configs import UsageError
from configs.rundir import write

ARROWS = {}  # {score: where better is}
for arrow, scores in {
    "↑": """forget_quality model_utility forget_truth_ratio retain_prob retain_rouge
         retain_truth_ratio real_authors_prob real_authors_rouge real_authors_truth_ratio
         world_facts_prob world_facts_rouge world_facts_truth_ratio knowmem_r forget1_kl forget2_kl
         memorization privacy utility_ratio composite""",
    "↓": """forget_prob forget_rouge forget_paraphrased_prob degenerate verbmem_f knowmem_f
         retain_kl exact_memorization extraction_strength leak recovered""",
    "→0.5": "mia_loss mia_zlib mia_min_k mia_min_k_pp mia_gradnorm mia_reference",
    "→0": "privleak",
}.items():
    ARROWS |= dict.fromkeys(scores.split(), arrow)


def arrows(*retain_scores):
    """ARROWS, where the best forget_prob and forget_rouge are the retain model's, if it is one."""
    aims = {}
    for score in ("forget_prob", "forget_rouge"):
        if len(retain_scores) == 1 and score in retain_scores[0]:
            aims[score] = f"→{retain_scores[0][score]:.2f}"
    return ARROWS | aims


def number(x):
    """A score as tables and messages show it: a number, a (mean, standard deviation) or None."""
    if x is None:
        return "-"
    if isinstance(x, tuple):
        return f"{number(x[0])} ± {number(x[1])}"
    return f"{x:.2e}" if 0 < abs(x) < 1e-3 else f"{x:.4f}"


def show_tables(tables, arrows, path=None):
    """Return the text of {title: table}, and of their means over seeds.

    arrows: {score: where better is}. With a path, the tables also go to <path>.md, and in full
    precision to <path>.csv.
    """
    shown = dict(tables)
    for title, rows in tables.items():
        means = over_seeds(rows)
        if means:
            shown[f"{title}: mean and standard deviation over seeds"] = means
    if path:
        write(f"{path}.csv", csv_text(shown))
        texts = [markdown(title, rows, arrows) for title, rows in shown.items()]
        write(f"{path}.md", "\n\n".join(texts) + "\n")
    return "\n\n".join(f"{title}\n\n{table(rows, arrows)}" for title, rows in shown.items())


def over_seeds(rows):
    """The table of (mean, standard deviation) of rows whose names differ in a last _s0 only."""
    seeds = {}
    for label, scores in rows.items():
        match = re.fullmatch(r"(.+?)_s(?:eed)?\d+", label)
        if match:
            seeds.setdefault(match[1], []).append(scores)
    means = {}
    for name, runs in seeds.items():
        if len(runs) == 1:
            continue
        means[f"{name} (n={len(runs)})"] = mean = {}
        for score in runs[0]:
            values = [scores[score] for scores in runs if scores.get(score) is not None]
            if len(values) > 1:
                mean[score] = statistics.mean(values), statistics.stdev(values)
    return means


def select(rows, score, arrow, harm, most):
    """(the table ordered by a score, best first; which row it chooses, in words).

    Best is where the arrow points: up, down, or to the number in it. A row whose score `harm` is
    above its limit, {name: the most it may be}, is never chosen.
    """
    scored = [name for name in rows if score in rows[name]]
    if not scored:
        raise UsageError(f"--select={score}: no run has it; there are "
                         f"{', '.join(next(iter(rows.values())))}.")

    def badness(name):
        value = rows[name][score]
        if arrow == "↑":
            return -value
        return value if arrow == "↓" else abs(value - float(arrow[1:]))

    scored.sort(key=badness)
    passed = list(itertools.takewhile(lambda name: rows[name].get(harm, 0) > most[name], scored))
    chosen = scored[len(passed)] if len(passed) < len(scored) else "no run"
    sentence = f"--select={score}: {chosen} is chosen, the best by {score} {arrow}"
    for name in passed:
        sentence += (f"; never {name}, whose {harm} is {number(rows[name][harm])}, above "
                     f"{number(most[name])}")
    return {name: rows[name] for name in [*scored, *rows]}, sentence


def cells(rows, arrows):
    """A table as lines of texts, its head first. A wide one is transposed: a line per score."""
    scores = list(dict.fromkeys(score for row in rows.values() for score in row))
    lines = [["", *(f"{score} {arrows.get(score, '')}".rstrip() for score in scores)]]
    for name, row in rows.items():
        lines.append([name, *(number(row.get(score)) for score in scores)])
    return list(zip(*lines)) if len(scores) > 8 else lines


WIDTH = 100  # of a table in a terminal


def table(rows, arrows):
    """The text of one table, in aligned columns; one wider than WIDTH goes on below itself."""
    columns = []
    for column in zip(*cells(rows, arrows)):
        width = max(map(len, column))
        align = str.rjust if columns else str.ljust
        columns.append([align(cell, width) for cell in column])
    name, *columns = columns
    parts, room = [], 0
    for column in columns:
        room -= 2 + len(column[0])
        if room < 0:
            parts.append([name])
            room = WIDTH - len(name[0]) - 2 - len(column[0])
        parts[-1].append(column)
    lines = [["  ".join(line).rstrip() for line in zip(*part)] for part in parts]
    return "\n\n".join(map("\n".join, lines))


def markdown(title, rows, arrows):
    head, *body = cells(rows, arrows)
    lines = ["| " + " | ".join(line) + " |" for line in (head, *body)]
    return "\n".join([title, "", lines[0], "|" + "---|" * len(head), *lines[1:]])


def csv_text(tables):
    """One line per row of a table; a score with a standard deviation takes two columns."""
    lines = []
    for title, rows in tables.items():
        for name, scores in rows.items():
            line = {"table": title, "name": name}
            for score, value in scores.items():
                if isinstance(value, tuple):
                    line[score], line[f"{score}_std"] = value
                else:
                    line[score] = value
            lines.append(line)
    columns = dict.fromkeys(column for line in lines for column in line)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def samples(models_records, n=3):
    """The text of the first forget questions, with the true answer and that of each model."""
    answered = []
    for records in models_records.values():
        forget = [r for r in records if r["set"] in ("forget", "knowmem_f")]
        answered.append([r for r in forget if r.get("question") and "generated" in r][:n])
    lines = []
    for records in zip(*answered):
        lines += ["", f"Q: {records[0]['question']}", f"   {'truth':<12} {records[0]['answer']}"]
        for name, record in zip(models_records, records):
            lines.append(f"   {name:<12} {record['generated']}")
    return "\n".join(lines)


def verdict(scores, records, retain_scores, retain_records):
    """What a run's scores say in plain words, and what to change."""
    asked, kept = word_for_word(records)
    asked_of_retain, kept_by_retain = word_for_word(retain_records)
    count = f"{kept} of {asked} forget answers are still" if kept else f"None of {asked} answers is"
    text = f"{count} given word for word"
    if asked_of_retain:
        text += f", {kept_by_retain} by the retain model"
    if kept > kept_by_retain:
        text += "; raise --lr or --epochs"
    prob, ideal = scores.get("forget_prob", 1), retain_scores.get("forget_prob", 0)
    if prob < ideal / 4:
        text += (f". Over-forgetting: forget_prob {prob:.2g} is far below the retain model's "
                 f"{ideal:.2g}; lower --lr or --epochs")
    return f"{text}." if asked else ""


def word_for_word(records):
    """(how many forget questions were asked, how many answers hold the true one)."""
    asked = kept = 0
    for record in records or []:
        true, given = record.get("answer"), record.get("generated")  # a log may lack them
        if record["set"] in ("forget", "knowmem_f") and None not in (true, given):
            asked += 1
            kept += true.strip().lower() in given.lower()
    return asked, kept


def picture(path, curves, points, x, y):
    """Draw curves {label: [scores]} and points {label: scores} in the plane of two scores.

    A point that has a curve is on it. Without x and y (own rows, no retain model) it is the
    probability of the forget answers against that of the retain answers.
    """
    from matplotlib.figure import Figure
    if not any({x, y} <= scores.keys() for scores in points.values()):
        x, y = "retain_prob", "forget_prob"
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        curve = [scores for scores in curve if x in scores and y in scores]
        xs, ys = [scores[x] for scores in curve], [scores[y] for scores in curve]
        axes.plot(xs, ys, ".-", label=label)
        if curve and x != "epoch":  # curves fold: a line leads from the words to their point
            axes.annotate(f"epoch {curve[-1]['epoch']:g}", (xs[-1], ys[-1]), (-40, -30),
                          textcoords="offset points", fontsize=8, arrowprops={"arrowstyle": "-"})
    for label, scores in points.items():
        if "retain model" in label:
            scores = {**scores, "forget_quality": 1.0}  # the p-value of equal samples
        if label not in curves and x in scores and y in scores:
            look = "k*" if "retain" in label else "s"
            axes.plot(scores[x], scores[y], look, markersize=9, label=label)
    if y == "forget_quality":
        axes.set_yscale("log")
        axes.axhline(0.05, color="gray", linestyle=":",
                     label="p = 0.05; above it, no\ndifference from retain shows")
    if x == "model_utility":
        axes.set_xlim(0, 1)  # the whole range: a loss of two per cent should look like one
    axes.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    save(figure, path)


def draw_curves(path, x, y, curves):
    """Draw {(model, attack): (xs, values (seeds, points))}: a color a model, a style an attack.

    Each is the mean over seeds, in the range of all.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    models, attacks = [list(dict.fromkeys(names)) for names in zip(*curves)]
    for (model, attack), (xs, values) in curves.items():
        color = f"C{models.index(model)}"
        style = ("-", "--", ":", "-.")[attacks.index(attack) % 4]
        axes.plot(xs, values.mean(0), color=color, linestyle=style, label=f"{model}, {attack}")
        axes.fill_between(xs, values.min(0), values.max(0), color=color, alpha=0.15)
    axes.set(xlabel=x, ylabel=y.replace("_", " "), xscale="log" if x == "k" else "linear")
    save(figure, path)


def save(figure, path):
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path + ".tmp", dpi=150, format="png")
    os.replace(path + ".tmp", path)  # a file that exists is whole
