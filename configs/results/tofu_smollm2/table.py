"""Choice, tables and pictures of the study.

python configs/results/tofu_smollm2/table.py choose out/tofu20    # the rule: a line of method and
rate for each method python configs/results/tofu_smollm2/table.py collect out/tofu20   # keeps
runs.jsonl, from the run directories python configs/results/tofu_smollm2/table.py
# tables and pictures, from runs.jsonl
"""

import glob
import json
import os
import statistics
import sys

from matplotlib.figure import Figure

HERE = os.path.dirname(os.path.abspath(__file__))
SETTINGS = (
    "forget_loss",
    "retain_loss",
    "lr",
    "seed",
    "beta",
    "forget_weight",
    "epochs",
    "batch_size",
    "git",
)
METHODS = {
    ("simnpo", "nll"): "SimNPO",
    ("npo", "nll"): "NPO",
    ("ga", "nll"): "GradDiff",
    ("idk", "nll"): "IDK",
    ("ga", "none"): "GA",
    ("dpo", "nll"): "DPO",
}
COLUMNS = (
    "forget_quality",
    "model_utility",
    "forget_prob",
    "forget_rouge",
    "retain_prob",
    "retain_rouge",
)
AUDITS = (
    "exact_memorization",
    "extraction_strength",
    "mia_loss",
    "mia_min_k_pp",
    "mia_reference",
    "privleak",
)


def load(path, lines=False):
    if not os.path.isfile(path):
        return [] if lines else {}
    with open(path, encoding="utf8") as f:
        return [json.loads(line) for line in f] if lines else json.load(f)


def collect(study):
    """A row a run, and one each for target and retain model: settings, scores, attacks."""
    rows = []
    for name in (f"{study}_target", f"{study}_retain"):
        label = os.path.basename(name)
        rows.append(
            {
                "name": label,
                "end": label.rpartition("_")[2],
                "scores": load(f"{study}_ends/{label}/scores.json"),
                "relearn": [],
            }
        )
    for path in sorted(glob.glob(f"{study}_*_s[0-9]/run.json")):
        run, name = load(path), os.path.dirname(path)
        if run.get("finished"):
            attacked = load(f"{study}_attacks/{os.path.basename(name)}/relearn.json") or []
            rows.append(
                {"name": os.path.basename(name)}
                | {k: run[k] for k in SETTINGS}
                | {
                    "method": METHODS[run["forget_loss"], run["retain_loss"]],
                    "scores": load(f"{name}/scores.json"),
                    "relearn": [r for r in attacked if r["model"] != "retain model"],
                }
            )
            rows[1]["relearn"] = [r for r in attacked if r["model"] == "retain model"] or rows[1][
                "relearn"
            ]
    for path in sorted(glob.glob(f"{study}_trajectory_*/log.jsonl")):
        run = load(path.replace("log.jsonl", "run.json"))
        rows.append(
            {
                "name": os.path.basename(os.path.dirname(path)),
                "of": METHODS[run["forget_loss"], run["retain_loss"]],
                "lr": run["lr"],
                "relearn": [],
                "curve": [r for r in load(path, lines=True) if "loss" not in r],
            }
        )
    return rows


def chosen(rows):
    """{method: (rate, feasible)}: highest forget_quality where utility is at least 95 % of the
    target's, else best utility. Seed 0."""
    floor = 0.95 * next(r for r in rows if r.get("end") == "target")["scores"]["model_utility"]
    best = {}
    for method in METHODS.values():
        points = [r for r in rows if r.get("method") == method and r["seed"] == 0]
        feasible = [r for r in points if r["scores"]["model_utility"] >= floor]
        if points:
            best[method] = (
                (max(feasible, key=lambda r: r["scores"]["forget_quality"])["lr"], True)
                if feasible
                else (max(points, key=lambda r: r["scores"]["model_utility"])["lr"], False)
            )
    return best


def show(values):
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    text = [
        f"{v:.1e}" if 0 < abs(v) < 1e-3 else f"{v:.3f}"
        for v in (statistics.mean(values), statistics.stdev(values) if values[1:] else 0)
    ]
    return " ± ".join(text[: 1 + bool(values[1:])])


def markdown(head, lines):
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for line in lines:
        print("| " + " | ".join(line) + " |")


def tables(rows):
    best, ends = chosen(rows), [r for r in rows if "end" in r]
    runs = [r for r in rows if "method" in r]
    print("Every point of the sweep (bold: chosen; *: no point kept 95 % of the target's utility)")
    lines = [[e["end"], "", ""] + [show([e["scores"].get(k)]) for k in COLUMNS] for e in ends]
    for method in best:
        rate, feasible = best[method]
        for lr in sorted({r["lr"] for r in runs if r["method"] == method}):
            group = [r for r in runs if (r["method"], r["lr"]) == (method, lr)]
            name = f"**{method}**{'' if feasible else ' *'}" if lr == rate else method
            lines.append(
                [name, f"{lr:g}", str(len(group))]
                + [show([r["scores"].get(k) for r in group]) for k in COLUMNS]
            )
    markdown(("", "lr", "seeds") + COLUMNS, lines)
    groups = {}
    for r in (r for r in runs if r["relearn"]):
        mark = "" if r["lr"] == best[r["method"]][0] else " (not chosen)"
        groups.setdefault(f"{r['method']}, lr {r['lr']:g}{mark}", []).append(r)
    groups["retain model"] = [ends[1]]
    if any(r["relearn"] for g in groups.values() for r in g):
        print(
            "\nAttacks: forget probability before → after, of relearning on the questions that "
            "were not relearned"
        )
        lines = []
        for method, group in groups.items():
            line = [method]
            for attack in ("relearn_random", "relearn_shortest", "int4"):
                kept = [[a for a in r["relearn"] if a["attack"] == attack] for r in group]
                kept = [k for k in kept if k]
                key = "unseen_forget_prob" if attack != "int4" else "forget_prob"
                first = (
                    [k[0][key] for k in kept]
                    if attack != "int4"
                    else [r["scores"]["forget_prob"] for r in group if kept]
                )
                line += [
                    f"{show(first)} → {show([k[-1][key] for k in kept])}" if kept else "-",
                    show([k[-1].get("recovered") for k in kept]),
                ]
            lines.append(line)
        markdown(
            ("", "random 20 %", "recovered", "shortest 20 %", "recovered", "int4", "recovered"),
            lines,
        )
    told = {
        m: [a for r in g for a in r["relearn"] if a["attack"] == "audits"]
        for m, g in groups.items()
    }
    if any(told.values()):
        print("\nAudits (holdout: two authors that no model here has seen)")
        markdown(
            ("",) + AUDITS,
            [
                [m] + [show([a.get(k) for a in found]) for k in AUDITS]
                for m, found in told.items()
                if found
            ],
        )


def pictures(rows):
    best = chosen(rows)
    figure = Figure(figsize=(15, 4.5), layout="tight")
    left, middle, right = figure.subplots(1, 3)
    for i, method in enumerate(best):
        points = [r for r in rows if r.get("method") == method]
        for r in points:
            picked = r["lr"] == best[method][0]
            left.plot(
                r["scores"]["model_utility"],
                r["scores"]["forget_quality"],
                "o",
                color=f"C{i}",
                markersize=8 if picked else 4,
                label=method if picked and r["seed"] == 0 else None,
            )
    for end, mark in (("target", "s"), ("retain", "*")):
        scores = next(r for r in rows if r.get("end") == end)["scores"]
        left.plot(
            scores["model_utility"],
            scores.get("forget_quality", 1.0),
            mark,
            color="black",
            markersize=11,
            label=end,
        )
    left.axhline(0.05, color="gray", linewidth=0.8, linestyle=":")
    left.set(
        yscale="log",
        xlabel="model utility",
        ylabel="forget quality",
        title="unlearned (large: chosen)",
    )
    for r in (r for r in rows if "curve" in r):
        x, y = ([row[k] for row in r["curve"]] for k in ("retain_prob", "forget_prob"))
        middle.plot(
            x, y, ".-", color=f"C{list(best).index(r['of'])}", label=f"{r['of']}, lr {r['lr']:g}"
        )
        for row in r["curve"][1:]:
            middle.annotate(
                f"{row['epoch']:g}",
                (row["retain_prob"], row["forget_prob"]),
                fontsize=8,
                xytext=(4, 2),
                textcoords="offset points",
            )
    for end, mark in (("target", "s"), ("retain", "*")):
        scores = next(r for r in rows if r.get("end") == end)["scores"]
        middle.plot(scores["retain_prob"], scores["forget_prob"], mark, color="black", markersize=9)
    middle.set(
        xlabel="probability of retain answers",
        ylabel="probability of forget answers",
        title="epoch by epoch, from the target (square)",
    )
    for r in (r for r in rows if r["relearn"]):
        method = r.get("method", "retain model")
        label = f"{method}, lr {r['lr']:g}" if "lr" in r else method
        color = f"C{list(best).index(method)}" if method in best else "black"
        for attack, style in (("relearn_random", "-"), ("relearn_shortest", "--")):
            curve = [a for a in r["relearn"] if a["attack"] == attack]
            right.plot(
                [a["step"] for a in curve],
                [a["unseen_forget_prob"] for a in curve],
                style,
                color=color,
                markersize=4,
                marker="o" if "lr" not in r or r["lr"] == best[method][0] else "x",
                label=label if style == "-" and r.get("seed", 0) == 0 else None,
            )
    right.set(
        xlabel="relearning steps",
        ylabel="probability of forget answers not relearned",
        ylim=(0, 1),
        title="20 % relearned, random (solid) or shortest (dashed)",
    )
    for axes in (left, middle, right):
        axes.legend(fontsize=8)
    path = os.path.join(HERE, "study.png")
    figure.savefig(path, dpi=130)
    print(f"\n{os.path.relpath(path)}")


if __name__ == "__main__":
    kept = os.path.join(HERE, "runs.jsonl")
    if sys.argv[1:2] == ["choose"]:
        rows = collect(sys.argv[2])
        for method, (lr, _) in chosen(
            rows
        ).items():  # a run is called STUDY_<method>_<rate>_s<seed>
            print(
                *next(r["name"] for r in rows if r.get("method") == method and r["lr"] == lr).split(
                    "_"
                )[-3:-1]
            )
    else:
        if sys.argv[1:2] == ["collect"]:
            with open(kept, "w", encoding="utf8") as f:
                f.writelines(json.dumps(r) + "\n" for r in collect(sys.argv[2]))
        rows = load(kept, lines=True)
        tables(rows)
        pictures(rows)
