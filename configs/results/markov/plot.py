"""The paper's picture of the Markov chains, and the table at equal retain distance, from runs of
configs/markov.py.

python configs/results/markov/plot.py out/markov_*_npo_? out/markov_*_simnpo_?   # from run
directories; keeps runs.jsonl python configs/results/markov/plot.py
# from runs.jsonl, the published runs
"""

import itertools
import json
import os
import sys

import numpy as np
from matplotlib.figure import Figure

HERE = os.path.dirname(os.path.abspath(__file__))
PAPER = {  # {subset: (retain_kl, what the paper's curves show there)}
    "short": (
        0.025,
        {
            "npo forget1_kl": 0.34,
            "npo forget2_kl": 0.12,
            "simnpo forget1_kl": 0.12,
            "simnpo forget2_kl": 0.37,
        },
    ),
    "unseen": (
        0.053,
        {
            "npo forget1_kl": 0.16,
            "npo forget2_kl": 0.85,
            "simnpo forget1_kl": 0.25,
            "simnpo forget2_kl": 0.72,
        },
    ),
}


def read(name):
    """One run: its subset, method, beta, seed and scored rows."""
    with open(os.path.join(name, "run.json"), encoding="utf8") as f:
        run = json.load(f)
    with open(os.path.join(name, "log.jsonl"), encoding="utf8") as f:
        rows = [r for r in map(json.loads, f) if "retain_kl" in r]
    return {k: run[k] for k in ("subset", "forget_loss", "beta", "seed", "git")} | {"rows": rows}


def at_distance(rows, x, key):
    """A score where retain_kl first rises to x, interpolated between two scored steps; nan where it
    never does."""
    for a, b in zip(rows, rows[1:]):
        if a["retain_kl"] < x <= b["retain_kl"]:
            return a[key] + (b[key] - a[key]) * (x - a["retain_kl"]) / (
                b["retain_kl"] - a["retain_kl"]
            )
    return np.nan


def draw(path, runs):
    """Forget against retain distance, a panel a subset; of several seeds the mean and, as a band,
    the range."""
    subsets, methods = (sorted({r[k] for r in runs}) for k in ("subset", "forget_loss"))
    figure = Figure(figsize=(5.5 * len(subsets), 4.5), layout="tight")
    panels = dict(zip(subsets, figure.subplots(1, len(subsets), squeeze=False)[0]))
    x = np.linspace(0, 0.3, 301)
    print(
        f"{'subset':<7} {'method':<7} {'score':<11} {'retain_kl':>9} {'mean':>7} "
        f"{'lowest':>7} {'highest':>7} {'runs':>5} {'paper':>6}"
    )
    for subset, method, (key, style, marker) in itertools.product(
        subsets, methods, (("forget1_kl", "-", "o"), ("forget2_kl", "--", "s"))
    ):
        curves = [r["rows"] for r in runs if (r["subset"], r["forget_loss"]) == (subset, method)]
        if not curves:
            continue
        y = np.array([[at_distance(rows, at, key) for at in x] for rows in curves])  # (runs, 301)
        distance, paper = PAPER[subset][0], PAPER[subset][1].get(f"{method} {key}", np.nan)
        axes, color = panels[subset], f"C{methods.index(method)}"
        axes.plot(x, y.mean(0), style, color=color, label=f"{method} {key[:-3]}")
        axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
        axes.plot(distance, paper, marker, color=color, markeredgecolor="black")
        there = [v for v in (at_distance(rows, distance, key) for rows in curves) if v == v] or [
            np.nan
        ]
        print(
            f"{subset:<7} {method:<7} {key:<11} {distance:>9} {np.mean(there):>7.3f} "
            f"{min(there):>7.3f} {max(there):>7.3f} "
            f"{len(there):>2}/{len(curves)} {paper:>6}"
        )
    for subset, axes in panels.items():
        axes.set(
            title=f"{subset} (markers: the paper)",
            xlabel="retain distance (KL)",
            ylabel="forget distance (KL)",
        )
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    kept = os.path.join(HERE, "runs.jsonl")
    if sys.argv[1:]:
        runs = [read(name) for name in sys.argv[1:]]
        with open(kept, "w", encoding="utf8") as f:
            f.writelines(json.dumps(r) + "\n" for r in runs)
    with open(kept, encoding="utf8") as f:
        draw(os.path.join(HERE, "markov.png"), [json.loads(line) for line in f])
