"""Choice, tables and pictures of the study.

    python configs/results/tofu_smollm2/table.py choose out/tofu20
        # the rule: a line of method and rate for each method
    python configs/results/tofu_smollm2/table.py collect out/tofu20
        # keeps runs.jsonl, from the run directories
    python configs/results/tofu_smollm2/table.py
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
    "forget_loss", "retain_loss", "lr", "seed", "beta", "forget_weight", "epochs", "batch_size",
    "git")
METHODS = {
    ("simnpo", "nll"): "SimNPO",
    ("npo", "nll"): "NPO",
    ("ga", "nll"): "GradDiff",
    ("idk", "nll"): "IDK",
    ("ga", "none"): "GA",
    ("dpo", "nll"): "DPO",
}
COLUMNS = (
    "forget_quality", "model_utility", "forget_prob", "forget_rouge", "retain_prob",
    "retain_rouge")
AUDITS = (
    "exact_memorization", "extraction_strength", "mia_loss", "mia_min_k_pp", "mia_reference",
    "privleak")


# ------------------------------------------------------------------------------------------------
# from run directories to rows: {name, scores, relearn, ...}, the two end points first


def read_json(path):
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf8") as f:
        return json.load(f)


def read_lines(path):
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf8") as f:
        return [json.loads(line) for line in f]


def method_of(run):
    return METHODS[run["forget_loss"], run["retain_loss"]]


def collect(study):
    """A row per run, and one each for target and retain model: settings, scores, attacks."""
    ends = []
    for end in ("target", "retain"):
        label = f"{os.path.basename(study)}_{end}"
        scores = read_json(f"{study}_ends/{label}/scores.json")
        ends.append({"name": label, "end": end, "scores": scores, "relearn": []})
    rows = list(ends)
    for path in sorted(glob.glob(f"{study}_*_s[0-9]/run.json")):
        run, folder = read_json(path), os.path.dirname(path)
        if not run.get("finished"):
            continue
        name = os.path.basename(folder)
        of_run, of_retain_model = [], []
        for attack in read_json(f"{study}_attacks/{name}/relearn.json") or []:
            is_control = attack["model"] == "retain model"
            (of_retain_model if is_control else of_run).append(attack)
        row = {"name": name}
        row |= {key: run[key] for key in SETTINGS}
        row |= {"method": method_of(run), "scores": read_json(f"{folder}/scores.json"),
                "relearn": of_run}
        rows.append(row)
        ends[1]["relearn"] = of_retain_model or ends[1]["relearn"]
    for path in sorted(glob.glob(f"{study}_trajectory_*/log.jsonl")):
        folder = os.path.dirname(path)
        run = read_json(f"{folder}/run.json")
        curve = [row for row in read_lines(path) if "loss" not in row]
        rows.append({"name": os.path.basename(folder), "of": method_of(run), "lr": run["lr"],
                     "relearn": [], "curve": curve})
    return rows


def runs_of(rows, method):
    return [row for row in rows if row.get("method") == method]


def end_of(rows, end):
    """The row of the target or of the retain model."""
    return next(row for row in rows if row.get("end") == end)


def chosen(rows):
    """{method: (rate, feasible)}, on seed 0.

    The highest forget_quality where utility is at least 95 % of the target's, else best utility.
    """
    floor = 0.95 * end_of(rows, "target")["scores"]["model_utility"]
    best = {}
    for method in METHODS.values():
        points = [row for row in runs_of(rows, method) if row["seed"] == 0]
        feasible = [row for row in points if row["scores"]["model_utility"] >= floor]
        if feasible:
            row = max(feasible, key=lambda row: row["scores"]["forget_quality"])
            best[method] = row["lr"], True
        elif points:
            row = max(points, key=lambda row: row["scores"]["model_utility"])
            best[method] = row["lr"], False
    return best


# ------------------------------------------------------------------------------------------------
# tables


def show(values):
    """Mean, and with several values ± their standard deviation."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    shown = [statistics.mean(values)]
    if len(values) > 1:
        shown.append(statistics.stdev(values))
    texts = [f"{x:.1e}" if 0 < abs(x) < 1e-3 else f"{x:.3f}" for x in shown]
    return " ± ".join(texts)


def show_columns(scores, names):
    """One cell per name, over all runs of a line."""
    return [show([some.get(name) for some in scores]) for name in names]


def markdown(head, lines):
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for line in lines:
        print("| " + " | ".join(line) + " |")


def sweep_table(rows, best):
    print("Every point of the sweep "
          "(bold: chosen; *: no point kept 95 % of the target's utility)")
    lines = []
    for end in ("target", "retain"):
        lines.append([end, "", ""] + show_columns([end_of(rows, end)["scores"]], COLUMNS))
    for method, (rate, feasible) in best.items():
        runs = runs_of(rows, method)
        for lr in sorted({row["lr"] for row in runs}):
            scores = [row["scores"] for row in runs if row["lr"] == lr]
            name = method
            if lr == rate:
                name = f"**{method}**" if feasible else f"**{method}** *"
            lines.append([name, f"{lr:g}", str(len(scores))] + show_columns(scores, COLUMNS))
    markdown(("", "lr", "seeds") + COLUMNS, lines)


def attacked_groups(rows, best):
    """{label: runs that were attacked}, the seeds of a rate together, the retain model last."""
    groups = {}
    for row in rows:
        if "method" in row and row["relearn"]:
            is_chosen = row["lr"] == best[row["method"]][0]
            mark = "" if is_chosen else " (not chosen)"
            groups.setdefault(f"{row['method']}, lr {row['lr']:g}{mark}", []).append(row)
    groups["retain model"] = [end_of(rows, "retain")]
    return groups


def rows_of_attack(run, attack):
    return [row for row in run["relearn"] if row["attack"] == attack]


def attack_cells(runs, attack):
    """[forget probability before → after, how much is recovered] of one attack."""
    before, after, recovered = [], [], []
    for run in runs:
        steps = rows_of_attack(run, attack)
        if not steps:
            continue
        if attack == "int4":
            before.append(run["scores"]["forget_prob"])
            after.append(steps[-1]["forget_prob"])
        else:
            before.append(steps[0]["unseen_forget_prob"])
            after.append(steps[-1]["unseen_forget_prob"])
        recovered.append(steps[-1].get("recovered"))
    return [f"{show(before)} → {show(after)}" if after else "-", show(recovered)]


def attack_table(groups):
    print("\nAttacks: forget probability before → after, of relearning on the questions that were "
          "not relearned")
    lines = []
    for label, runs in groups.items():
        line = [label]
        for attack in ("relearn_random", "relearn_shortest", "int4"):
            line += attack_cells(runs, attack)
        lines.append(line)
    markdown(("", "random 20 %", "recovered", "shortest 20 %", "recovered", "int4", "recovered"),
             lines)


def audit_table(groups):
    lines = []
    for label, runs in groups.items():
        audits = []
        for run in runs:
            audits += rows_of_attack(run, "audits")
        if audits:
            lines.append([label] + show_columns(audits, AUDITS))
    if lines:
        print("\nAudits (holdout: two authors that no model here has seen)")
        markdown(("",) + AUDITS, lines)


def tables(rows):
    best = chosen(rows)
    sweep_table(rows, best)
    groups = attacked_groups(rows, best)
    if len(groups) > 1 or groups["retain model"][0]["relearn"]:
        attack_table(groups)
    audit_table(groups)


# ------------------------------------------------------------------------------------------------
# pictures

ENDS = (("target", "target", "s"), ("retain", "retain model", "*"))  # with their markers


def color_of(method, best):
    """One color a method, in all panels."""
    return f"C{list(best).index(method)}"


def draw_ends(axes, rows, x, y):
    for end, label, marker in ENDS:
        scores = {"forget_quality": 1.0} | end_of(rows, end)["scores"]
        axes.plot(scores[x], scores[y], marker, color="black", markersize=11, label=label)


def draw_points(axes, rows, best):
    """Utility against forget quality, a point per run."""
    for method in best:
        for row in runs_of(rows, method):
            is_chosen = row["lr"] == best[method][0]
            axes.plot(row["scores"]["model_utility"], row["scores"]["forget_quality"], "o",
                      color=color_of(method, best), markersize=9 if is_chosen else 5,
                      label=method if is_chosen and row["seed"] == 0 else None)
    draw_ends(axes, rows, "model_utility", "forget_quality")
    axes.axhline(0.05, color="gray", linestyle=":", label="p = 0.05")
    axes.set(yscale="log", xlabel="model utility (better to the right)",
             ylabel="forget quality, a p-value (better upwards)",
             title="After unlearning (large: the chosen rate)")


def draw_trajectories(axes, rows, best):
    """Retain against forget probability, epoch by epoch."""
    for run in rows:
        if "curve" not in run:
            continue
        x = [row["retain_prob"] for row in run["curve"]]
        y = [row["forget_prob"] for row in run["curve"]]
        axes.plot(x, y, ".-", color=color_of(run["of"], best))
        for row in run["curve"][1:]:  # on both sides in turn: the last ones are close
            side = 5 if row["epoch"] % 2 else -10
            axes.annotate(f"{row['epoch']:g}", (row["retain_prob"], row["forget_prob"]),
                          fontsize=9, xytext=(side, -9), textcoords="offset points",
                          color=color_of(run["of"], best))
    draw_ends(axes, rows, "retain_prob", "forget_prob")
    axes.set(xlabel="probability of retain answers (better to the right)",
             ylabel="probability of forget answers", ylim=(0, 1.05),
             title="Epoch by epoch, lr 1.5e-4")


def draw_relearning(axes, rows, best):
    """Forget probability of what was not relearned, step by step."""
    for run in rows:
        if not run["relearn"]:
            continue
        color, marker = "black", "*"
        if "method" in run:
            color = color_of(run["method"], best)
            marker = "o" if run["lr"] == best[run["method"]][0] else "x"
        for attack, style in (("relearn_random", "-"), ("relearn_shortest", "--")):
            steps = rows_of_attack(run, attack)
            x = [row["step"] for row in steps]
            y = [row["unseen_forget_prob"] for row in steps]
            axes.plot(x, y, style, color=color, markersize=6, marker=marker)
    axes.set(xlabel="relearning steps", ylabel="probability of forget answers not relearned",
             xticks=(0, 10, 20), ylim=(0, 1),
             title="20 % relearned: random (solid), shortest (dashed)\n"
                   "x: the rate that was not chosen")


def pictures(rows):
    best = chosen(rows)
    figure = Figure(figsize=(15, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_points(left, rows, best)
    draw_trajectories(middle, rows, best)
    draw_relearning(right, rows, best)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    path = os.path.join(HERE, "study.png")
    figure.savefig(path, dpi=130)
    print(f"\n{os.path.relpath(path)}")


def main(words):
    command, study = (words + ["", ""])[:2]
    if command == "choose":
        rows = collect(study)
        for method, (lr, _) in chosen(rows).items():
            run = next(row for row in runs_of(rows, method) if row["lr"] == lr)
            print(*run["name"].split("_")[-3:-1])  # it is called STUDY_<method>_<rate>_s<seed>
        return
    kept = os.path.join(HERE, "runs.jsonl")
    if command == "collect":
        with open(kept, "w", encoding="utf8") as f:
            f.writelines(json.dumps(row) + "\n" for row in collect(study))
    rows = read_lines(kept)
    tables(rows)
    pictures(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
