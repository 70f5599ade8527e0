"""Relearning from the same start, SimNPO against NPO, with the retain-only model: the picture and
its table.

python configs/results/demo_attacks/plot.py out/attacks   # from what run.sh left there; keeps
runs.jsonl and attacks.jsonl python configs/results/demo_attacks/plot.py               # from those
two, the published numbers
"""

import glob
import json
import os
import sys

import numpy as np
from matplotlib.figure import Figure

HERE = os.path.dirname(os.path.abspath(__file__))
SETTINGS = (
    "forget_loss",
    "retain_loss",
    "beta",
    "forget_weight",
    "retain_weight",
    "lr",
    "epochs",
    "batch_size",
    "seed",
    "git",
)
SCORES = (
    "forget_prob",
    "forget_rouge",
    "forget_quality",
    "model_utility",
    "unseen_forget_prob",
    "unseen_forget_rouge",
    "unseen_forget_quality",
    "recovered",
    "exact_memorization",
    "extraction_strength",
    "mia_loss",
    "mia_zlib",
    "mia_min_k",
    "mia_min_k_pp",
    "mia_gradnorm",
    "mia_reference",
    "privleak",
)
NAMES = {
    "simnpo": "SimNPO",
    "npo_matched": "NPO, from the same start",
    "retain": "retain-only, the control",
}


def read(path):
    with open(path, encoding="utf8") as f:
        return json.load(f)


def short(scores):
    return {k: float(f"{scores[k]:.6g}") for k in SCORES if scores.get(k) is not None}


def collect(out):
    """Every run's settings and scores, and every row of every attack; a control's rows once."""
    runs, rows = [], {}
    for path in sorted(glob.glob(f"{out}/*_s[0-9]/scores.json")):
        name = os.path.basename(os.path.dirname(path))
        run, scores = read(path.replace("scores.json", "run.json")), read(path)
        where = {
            k: scores[k] for k in ("step", "epoch") if k in scores
        }  # of a run that is taken before its end
        runs.append({"name": name} | {k: run[k] for k in SETTINGS} | where | short(scores))
    for study in ("suite", "matched", "targets"):
        for path in sorted(glob.glob(f"{out}/{study}/*/relearn.json")):
            name = os.path.basename(os.path.dirname(path))
            for r in read(path):
                model = f"retain_s{name[-1]}" if r["model"] == "retain model" else name
                key = {"study": study, "model": model} | {
                    k: r[k] for k in ("attack", "seed", "step", "epoch")
                }
                rows[tuple(key.values())] = key | short(r)
    for file, lines in (("runs", runs), ("attacks", rows.values())):
        with open(os.path.join(HERE, f"{file}.jsonl"), "w", encoding="utf8") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)


def curves(rows, method, attack, score):
    """(epochs, (unlearning seeds x attack seeds, epochs)) of one method."""
    mine = [
        r
        for r in rows
        if r["study"] == "matched"
        and r["model"][:-3] == method
        and r["attack"] == attack
        and score in r
    ]
    epochs = sorted({r["epoch"] for r in mine})
    keys = sorted({(r["model"], r["seed"]) for r in mine})
    value = {(r["model"], r["seed"], r["epoch"]): r[score] for r in mine}
    return epochs, np.array([[value[(*k, e)] for e in epochs] for k in keys])


def main():
    if sys.argv[1:]:
        collect(sys.argv[1])
    with open(os.path.join(HERE, "attacks.jsonl"), encoding="utf8") as f:
        rows = [json.loads(line) for line in f]
    figure = Figure(figsize=(10, 7), layout="tight")
    axes = figure.subplots(2, 2)
    for row, score in zip(axes, ("unseen_forget_prob", "unseen_forget_quality")):
        for panel, attack in zip(row, ("relearn_random", "relearn_shortest")):
            for method, name in NAMES.items():
                epochs, values = curves(rows, method, attack, score)
                if not len(values):
                    continue
                (line,) = panel.plot(epochs, values.mean(0), ".-", label=name)
                panel.fill_between(
                    epochs, values.min(0), values.max(0), alpha=0.15, color=line.get_color()
                )
                print(
                    f"{attack:<17} {score:<22} {method:<12}",
                    *(
                        f"epoch {e:g}: {v.mean():.3f} ({v.min():.3f} to {v.max():.3f})"
                        for e, v in zip(epochs, values.T)
                        if e in (0, 1, 2, 5, 10)
                    ),
                )
            simnpo, npo = (
                curves(rows, m, attack, score)[1][:, 1:].mean(1).reshape(3, 3).mean(1)
                for m in ("simnpo", "npo_matched")
            )
            print(
                " " * 17,
                "SimNPO - NPO, mean over epochs 1 to 10, by unlearning seed: "
                f"{np.round(simnpo - npo, 3)}",
            )
            panel.set_title(attack.replace("_", ": 20 %, "), fontsize=10)
            panel.set_xlabel("relearning epoch")
            panel.set_ylabel(score.replace("_", " "))
            if score == "unseen_forget_quality":
                panel.set_yscale("log")
                panel.axhline(0.05, color="gray", linewidth=0.8, linestyle=":")
            else:
                panel.set_ylim(0, 1)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(os.path.join(HERE, "relearn.png"), dpi=90)


if __name__ == "__main__":
    main()
