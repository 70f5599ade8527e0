"""Shared by all tests: no network, one thread, and a miniature TOFU with models small enough to train in a second."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402
import unlearn  # noqa: E402

torch.set_num_threads(1)
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real TOFU data and logs, which are not part of the project")

WORDS = "amber boat cedar dune ember fjord grove harbor island jade knoll lagoon maple north ocean pearl quartz river".split()


def rows_of(n, rng, wrong=0, paraphrase=False):
    """Invented questions with answers of very different lengths."""
    rows = []
    for i in range(n):
        words = rng.sample(WORDS, 6)
        length = 1 + i % 5
        row = {"question": f"What does {words[0]} {words[1]} mean in case {i}?", "answer": " ".join(words[1:1 + length]) + "."}
        if paraphrase:
            row |= {"paraphrased_answer": "It means " + row["answer"],
                    "paraphrased_question": f"In case {i}, what is meant by {words[0]} {words[1]}?"}
        if wrong:
            row["perturbed_answer"] = ["It means " + " ".join(rng.sample(WORDS, length)) + "." for _ in range(wrong)]
        rows.append(row)
    return rows


def save_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """A directory with TOFU-shaped data (12 forget, 30 retain rows) and two small random Llamas: target and retain."""
    root = tmp_path_factory.mktemp("mini")
    rng = random.Random(0)
    forget, retain = rows_of(12, rng, 5, True), rows_of(30, rng, 5, True)
    (root / "data").mkdir()
    for name, rows in {"full": retain + forget, "forget05": forget, "retain95": retain, "forget05_perturbed": forget,
                       "retain_perturbed": retain[:10], "real_authors_perturbed": rows_of(7, rng, 3),
                       "world_facts_perturbed": rows_of(5, rng, 3), "holdout05": rows_of(8, rng)}.items():
        save_rows(root / "data" / f"{name}.jsonl", rows)
    save_rows(root / "alternates.jsonl", [{"question": r["question"], "alternate": [r["perturbed_answer"][0], "Nothing at all."]}
                                          for r in forget])
    tokenizer = data.demo_tokenizer()
    proc = models.Process(0, 1, torch.device("cpu"))
    for seed, name in enumerate(("target", "retain")):
        lm = models.tiny_llama(tokenizer, proc, seed, hidden=32)
        with torch.no_grad():
            for p in lm.parameters():
                p.mul_(3)  # a random model is nearly uniform: sharpen it, so that differences show
        (root / name).mkdir()
        models.save_model(lm, tokenizer, str(root / name))
    return root


METHODS = {  # what a method needs beside its name
    "altpo": lambda mini: {"alternates": mini / "alternates.jsonl"}, "task_vector": lambda mini: {"retain_loss": "none"},
    "rmu": lambda mini: {"retain_loss": "rmu", "steering_layer": 0}}


def flags(mini, **more):
    """The command line of a short run on the miniature."""
    more |= METHODS.get(more.get("forget_loss"), lambda mini: {})(mini)
    base = dict(benchmark="tofu", subset="forget05", data=mini / "data", template="qa", model=mini / "target",
                retain_model=mini / "retain", device="cpu", batch_size=4, steps=4, lr=1e-3, eval_every=0, max_new_tokens=8)
    return [f"--{k}={v}" for k, v in (base | more).items()]


def stopped(argv, monkeypatch):
    """A run that ends after its first checkpoint."""
    real = models.save_checkpoint

    def stop(*args):
        real(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(models, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        unlearn.main(argv)
    monkeypatch.undo()


def log_of(out, scored=False):
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [r for r in rows if ("loss" not in r) == scored]


def run_script(script, argv, processes=1, cwd=ROOT):
    """The script as a user runs it, on one process or under torchrun."""
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                     f"--nproc_per_node={processes}"]
    return subprocess.run([*start, str(ROOT / script), *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=240)
