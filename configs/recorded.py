"""Recorded evaluations: a record per scored example, as a run writes it and as others do.

    records = read_log("out/demo/examples.jsonl")    # or dataset:org/name/path.json, on the hub
    # [{"set": "forget", "index": 0, "question": ..., "answer": ..., "nll": ..., ...}, ...]

TOFU's authors' eval_log_aggregated.json and open-unlearning's TOFU_EVAL.json and MUSE_EVAL.json
are read as the same records; the content tells which it is.
"""
import re

import data
from configs import UsageError

TOFU_LOG = {
    "eval_log_forget.json": "forget",
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
}
TOFU_COLUMNS = {  # key of our record: column
    "nll": "avg_gt_loss",
    "paraphrased_nll": "avg_paraphrased_loss",
    "perturbed_nll": "average_perturb_loss",
    "n_tokens": "num_token_gt",
    "rougeL_recall": "rougeL_recall",
}
OPEN_UNLEARNING_LOG = {  # what the names of a set's metrics begin with: set
    "forget_Q_A_": "forget",
    "retain_Q_A_": "retain",
    "ra_Q_A_": "real_authors",
    "wf_Q_A_": "world_facts",
    "forget_verbmem_": "verbmem_f",
    "forget_knowmem_": "knowmem_f",
    "retain_knowmem_": "knowmem_r",
    "forget_mia_": "privleak_f",
    "holdout_mia_": "privleak_h",
}
OPEN_UNLEARNING_COLUMNS = (  # rest of a metric's name, column, key of our record
    ("Prob", "avg_loss", "nll"),
    ("PARA_Prob", "avg_loss", "paraphrased_nll"),
    ("PERT_Prob", "avg_loss", "perturbed_nll"),
    ("ROUGE", "rougeL_recall", "rougeL_recall"),
    ("ROUGE", "rougeL_f1", "rougeL_f1"),
    ("ROUGE", "ground_truth", "answer"),
    ("ROUGE", "generation", "generated"),
    ("min_k", "score", "min_k"),
)
# of a record: its texts, and the scores of an audit (membership: higher = more like a member)
TEXTS = ("question", "answer", "generated")
MEMORIZATION = ("exact_memorization", "extraction_strength")
MEMBERSHIP = ("loss", "zlib", "min_k", "min_k_pp", "gradnorm")
LEAST = {  # the least value of each number of a record
    "n_tokens": 1,
    **dict.fromkeys(("index", "rougeL_recall", "rougeL_f1", *MEMORIZATION), 0),
    **dict.fromkeys(("nll", "paraphrased_nll", "perturbed_nll", "kl"), -1e-3),
    **dict.fromkeys(MEMBERSHIP, -1e12),
}
ON_HUB = "dataset:"


def download(location):
    """The local copy of dataset:org/name[@revision]/path.json, a file of a data set on the hub."""
    parts = re.fullmatch("dataset:([^/]+/[^/@]+)(?:@([^/]+))?/(.+)", location)
    if not parts:
        raise UsageError(f"{location}: is written dataset:org/name/path.json, or "
                         "dataset:org/name@revision/path.json.")
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download(parts[1], parts[3], repo_type="dataset", revision=parts[2])
    except Exception as e:  # the hub client raises many kinds
        raise data.not_given(location, e) from None


def read_log(path: str) -> list:
    """Records of a log in any of the three formats; its content tells which."""
    text = data.read_text(download(path) if path.startswith(ON_HUB) else path)
    try:
        records = parse_log(text)
        if not records:
            raise ValueError("it holds no scored examples")
        for i, record in enumerate(records, 1):
            check_record(record, i)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
        raise UsageError(
            f"{path}: not a log this can read ({type(e).__name__}: {e}); it takes examples.jsonl, "
            "TOFU's eval_log_aggregated.json, open-unlearning's TOFU_EVAL.json and "
            "MUSE_EVAL.json.") from None
    return records


def parse_log(text):
    log = data.documents(text)
    if len(log) == 1 and "set" not in log[0]:  # else JSON lines
        [log] = log
    return log if isinstance(log, list) else read_tofu_log(log) or read_open_unlearning_log(log)


def check_record(record, i):
    if not (isinstance(record["set"], str) and {"nll", "rougeL_f1", "min_k"} & record.keys()):
        raise ValueError(f"row {i} is no scored example")
    for key, value in record.items():
        valid = True
        if key in TEXTS:
            valid = isinstance(value, str | None)
        elif key in LEAST:
            numbers = value if key == "perturbed_nll" else [value]
            valid = numbers and all(is_number(number, LEAST[key]) for number in numbers)
        if not valid:
            raise ValueError(f"row {i}: {key} cannot be {value!r:.60}")


def is_number(value, least):
    return type(value) in (int, float) and least <= value < 1e12


def read_tofu_log(log):
    records = []
    for file, name in TOFU_LOG.items():
        columns = {column: listed(values) for column, values in log.get(file, {}).items()}
        for i, texts in enumerate(columns.get("generated_text", [])):
            record = {key: columns[column][i] for key, column in TOFU_COLUMNS.items()}
            record |= {"set": name, "index": i, "generated": texts[1], "answer": texts[2]}
            records.append(record)
    return records


def read_open_unlearning_log(log):
    for side, metric in log.get("mia_min_k", {}).items():
        log[f"{side}_mia_min_k"] = metric
    records = []
    for prefix, name in OPEN_UNLEARNING_LOG.items():
        some = {}
        for rest, column, key in OPEN_UNLEARNING_COLUMNS:
            entries = log.get(prefix + rest, {}).get("value_by_index", {})
            for i, entry in enumerate(listed(entries)):
                record = some.setdefault(i, {"set": name, "index": i})
                if column in entry:
                    record[key] = entry[column]
        records += some.values()
    for record in records:
        for key, other in (("nll", "paraphrased_nll"), ("paraphrased_nll", "nll")):
            if other in record:
                record.setdefault(key, record[other])
        if "min_k" in record:  # theirs is lower for a member
            record["min_k"] *= -1
    return records


def listed(values):
    """The values in order, from a list or from a dict by index."""
    return values if isinstance(values, list) else [values[key] for key in sorted(values, key=int)]
