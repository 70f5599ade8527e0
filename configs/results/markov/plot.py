"""The paper's picture of the Markov chains, and the table at equal retain distance.

    python configs/results/markov/plot.py out/markov_*_npo_? out/markov_*_simnpo_?
        # from run directories of configs/markov.py; keeps runs.jsonl
    python configs/results/markov/plot.py
        # from runs.jsonl, the published runs
"""
import itertools
import json
import os
import sys

import numpy as np
from matplotlib.figure import Figure

HERE = os.path.dirname(os.path.abspath(__file__))
KEPT = os.path.join(HERE, "runs.jsonl")
SETTINGS = ("subset", "forget_loss", "beta", "seed", "git")
LINES = (("forget1_kl", "-", "o"), ("forget2_kl", "--", "s"))  # (score, line, marker)
COLORS = {"simnpo": "C0", "npo": "C1"}  # as in all pictures
DISTANCE = {"short": 0.025, "unseen": 0.053}  # retain_kl at which methods are compared
PAPER = {  # what the paper's curves show there
    ("short", "npo", "forget1_kl"): 0.34,
    ("short", "npo", "forget2_kl"): 0.12,
    ("short", "simnpo", "forget1_kl"): 0.12,
    ("short", "simnpo", "forget2_kl"): 0.37,
    ("unseen", "npo", "forget1_kl"): 0.16,
    ("unseen", "npo", "forget2_kl"): 0.85,
    ("unseen", "simnpo", "forget1_kl"): 0.25,
    ("unseen", "simnpo", "forget2_kl"): 0.72,
}


def read(name):
    """One run: its subset, method, beta, seed and scored rows."""
    with open(os.path.join(name, "run.json"), encoding="utf8") as f:
        settings = json.load(f)
    with open(os.path.join(name, "log.jsonl"), encoding="utf8") as f:
        rows = [json.loads(line) for line in f]
    run = {key: settings[key] for key in SETTINGS}
    run["rows"] = [row for row in rows if "retain_kl" in row]
    return run


def at_distance(rows, x, key):
    """A score where retain_kl first rises to x, interpolated; nan where it never does."""
    for before, after in zip(rows, rows[1:]):
        if before["retain_kl"] < x <= after["retain_kl"]:
            share = (x - before["retain_kl"]) / (after["retain_kl"] - before["retain_kl"])
            return before[key] + share * (after[key] - before[key])
    return np.nan


def draw(path, runs):
    """Forget against retain distance, a panel per subset; of several seeds mean and range."""
    subsets = sorted({run["subset"] for run in runs})
    methods = sorted({run["forget_loss"] for run in runs})
    figure = Figure(figsize=(5.5 * len(subsets), 4.5), layout="constrained")
    panels = dict(zip(subsets, figure.subplots(1, len(subsets), squeeze=False)[0]))
    print(f"{'subset':<7} {'method':<7} {'score':<11} {'retain_kl':>9} {'mean':>7} {'lowest':>7} "
          f"{'highest':>7} {'runs':>5} {'paper':>6}")
    for subset, method, line in itertools.product(subsets, methods, LINES):
        curves = []
        for run in runs:
            if (run["subset"], run["forget_loss"]) == (subset, method):
                curves.append(run["rows"])
        if curves:
            color = COLORS[method]
            draw_curves(panels[subset], curves, subset, method, line, color)
            print_row(curves, subset, method, line[0])
    for subset, axes in panels.items():
        axes.set(title=f"{subset} (markers: the paper)", xlabel="retain distance (KL)",
                 ylabel="forget distance (KL)")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.savefig(path, dpi=150)
    print(path)


def draw_curves(axes, curves, subset, method, line, color):
    key, style, marker = line
    x = np.linspace(0, 0.3, 301)
    y = np.array([[at_distance(rows, at, key) for at in x] for rows in curves])  # (runs, 301)
    axes.plot(x, y.mean(0), style, color=color, label=f"{method} {key[:-3]}")
    axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
    paper = PAPER.get((subset, method, key), np.nan)
    axes.plot(DISTANCE[subset], paper, marker, color=color, markeredgecolor="black")


def print_row(curves, subset, method, key):
    """The scores of the runs that reach the distance at which methods are compared."""
    distance = DISTANCE[subset]
    scores = np.array([at_distance(rows, distance, key) for rows in curves])
    reached = scores[~np.isnan(scores)]
    if not len(reached):
        reached = np.array([np.nan])
    paper = PAPER.get((subset, method, key), np.nan)
    print(f"{subset:<7} {method:<7} {key:<11} {distance:>9} {reached.mean():>7.3f} "
          f"{reached.min():>7.3f} {reached.max():>7.3f} {len(reached):>2}/{len(curves)} "
          f"{paper:>6}")


if __name__ == "__main__":
    if sys.argv[1:]:
        with open(KEPT, "w", encoding="utf8") as f:
            f.writelines(json.dumps(read(name)) + "\n" for name in sys.argv[1:])
    with open(KEPT, encoding="utf8") as f:
        draw(os.path.join(HERE, "markov.png"), [json.loads(line) for line in f])
