"""Relearning from the same start, SimNPO, NPO and the retain-only model: picture and table.

    python configs/results/demo_attacks/plot.py out/attacks
        # from what run.sh left there; keeps runs.jsonl and attacks.jsonl
    python configs/results/demo_attacks/plot.py
        # from those two, the published numbers
"""
import glob
import json
import os
import sys

import numpy as np
from matplotlib.figure import Figure

HERE = os.path.dirname(os.path.abspath(__file__))
SETTINGS = (
    "forget_loss", "retain_loss", "beta", "forget_weight", "retain_weight", "lr", "epochs",
    "batch_size", "seed", "git")
SCORES = (
    "forget_prob", "forget_rouge", "forget_quality", "model_utility", "unseen_forget_prob",
    "unseen_forget_rouge", "unseen_forget_quality", "recovered", "exact_memorization",
    "extraction_strength", "mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_pp", "mia_gradnorm",
    "mia_reference", "privleak", "leak_at_1", "leak_at_4", "leak_at_16", "leak_at_64")
LEAKS = SCORES[-4:]
ATTACKS = ("relearn_random", "relearn_shortest")
NAMES = {
    "simnpo": "SimNPO",
    "npo_matched": "NPO, from the same start",
    "retain": "retain-only, the control",
}
COLORS = {"simnpo": "C0", "npo_matched": "C1", "retain": "black"}  # as in all pictures


# ------------------------------------------------------------------------------------------------
# from run directories to runs.jsonl and attacks.jsonl


def read(path):
    with open(path, encoding="utf8") as f:
        return json.load(f)


def write_lines(name, rows):
    with open(os.path.join(HERE, name), "w", encoding="utf8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def rounded(scores):
    """SCORES to six digits, where there are any."""
    kept = {}
    for name in SCORES:
        if scores.get(name) is not None:
            kept[name] = float(f"{scores[name]:.6g}")
    return kept


def collect_run(folder):
    """One run: its settings and scores, and its step and epoch if it was taken before its end."""
    settings = read(os.path.join(folder, "run.json"))
    scores = read(os.path.join(folder, "scores.json"))
    run = {"name": os.path.basename(folder)}
    run |= {key: settings[key] for key in SETTINGS}
    run |= {key: scores[key] for key in ("step", "epoch") if key in scores}
    return run | rounded(scores)


def collect(out):
    """Keep every run, and every row of every attack; a control's rows once."""
    paths = sorted(glob.glob(f"{out}/*_s[0-9]/scores.json"))
    write_lines("runs.jsonl", [collect_run(os.path.dirname(path)) for path in paths])
    attacks = {}
    for study in ("suite", "matched", "targets", "samples"):
        for path in sorted(glob.glob(f"{out}/{study}/*/relearn.json")):
            name = os.path.basename(os.path.dirname(path))
            for row in read(path):
                model = f"retain_s{name[-1]}" if row["model"] == "retain model" else name
                key = {"study": study, "model": model}
                key |= {name: row[name] for name in ("attack", "seed", "step", "epoch")}
                attacks[tuple(key.values())] = key | rounded(row)
    write_lines("attacks.jsonl", attacks.values())


# ------------------------------------------------------------------------------------------------
# picture and table


def curves(rows, method, attack, score):
    """(epochs, (unlearning seeds x attack seeds, epochs)) of one method."""
    values = {}  # {(model, attack seed): {epoch: score}}
    for row in rows:
        is_asked = (row["study"], row["model"][:-3], row["attack"]) == ("matched", method, attack)
        if is_asked and score in row:
            curve = values.setdefault((row["model"], row["seed"]), {})
            curve[row["epoch"]] = row[score]
    epochs = sorted({epoch for curve in values.values() for epoch in curve})
    return epochs, np.array([[values[key][epoch] for epoch in epochs] for key in sorted(values)])


def draw_method(panel, rows, method, attack, score):
    """One method's mean and range over seeds; its values at a few epochs are printed."""
    epochs, values = curves(rows, method, attack, score)
    if not len(values):
        return
    color = COLORS[method]
    panel.plot(epochs, values.mean(0), ".-", color=color, label=NAMES[method])
    panel.fill_between(epochs, values.min(0), values.max(0), alpha=0.15, color=color)
    shown = []
    for epoch, some in zip(epochs, values.T):
        if epoch in (0, 1, 2, 5, 10):
            shown.append(f"epoch {epoch:g}: {some.mean():.3f} "
                         f"({some.min():.3f} to {some.max():.3f})")
    print(f"{attack:<17} {score:<22} {method:<12}", *shown)


def print_difference(rows, attack, score):
    means = []
    for method in ("simnpo", "npo_matched"):
        _, values = curves(rows, method, attack, score)
        # over epochs, without the start, then over each unlearning seed's three attack seeds
        means.append(values[:, 1:].mean(1).reshape(3, 3).mean(1))
    difference = np.round(means[0] - means[1], 3)
    print(" " * 17, "SimNPO - NPO, mean over epochs 1 to 10, by unlearning seed:", difference)


def draw_panel(panel, rows, attack, score):
    for method in NAMES:
        draw_method(panel, rows, method, attack, score)
    print_difference(rows, attack, score)
    panel.set_title(attack.replace("_", ": 20 %, "), fontsize=10)
    panel.set_xlabel("relearning epoch")
    panel.set_ylabel(score.replace("_", " "))
    if score == "unseen_forget_quality":
        panel.set_yscale("log")
        panel.axhline(0.05, color="gray", linestyle=":", label="p = 0.05")
    else:
        panel.set_ylim(0, 1)


def print_leaks(rows):
    """leak@k and the worst case of each method, mean and standard deviation over seeds."""
    for method in ("simnpo", "npo", "graddiff", "ga", "idk", "retain"):
        shown = []
        for attack, scores in (("sample", LEAKS), ("worst_case", ("forget_prob", "forget_rouge"))):
            found = [row for row in rows if (row["study"], row["model"][:-3], row["attack"])
                     == ("samples", method, attack)]
            for score in scores:
                values = [row[score] for row in found]
                shown.append(f"{score} {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}")
        print(f"{method:<9}", *shown)


def main():
    if sys.argv[1:]:
        collect(sys.argv[1])
    with open(os.path.join(HERE, "attacks.jsonl"), encoding="utf8") as f:
        rows = [json.loads(line) for line in f]
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    for i, score in enumerate(("unseen_forget_prob", "unseen_forget_quality")):
        for k, attack in enumerate(ATTACKS):
            draw_panel(panels[i, k], rows, attack, score)
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    print_leaks(rows)
    figure.savefig(os.path.join(HERE, "relearn.png"), dpi=90)


if __name__ == "__main__":
    main()
