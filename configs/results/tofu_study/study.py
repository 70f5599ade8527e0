"""Data, tables and pictures of the study.

    PYTHONPATH=. python configs/results/tofu_study/study.py data locuslab/TOFU out/study_data
        # its data set, from TOFU's files
"""
import json
import os
import sys

import data

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
    os.makedirs(path, exist_ok=True)
    for name, some in files.items():
        with open(os.path.join(path, f"{name}.jsonl"), "w", encoding="utf8") as f:
            for row in some:
                f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["data"]:
        write_data(*sys.argv[2:4])
