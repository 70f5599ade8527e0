"""Shared by all tests: no network, one thread, a miniature TOFU and models that train in a second.
"""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402
import unlearn  # noqa: E402

torch.set_num_threads(1)
PROC = models.Process(0, 1, torch.device("cpu"))
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the real TOFU data and logs, which are not in this repo")


@pytest.fixture(autouse=True)
def sentences_are_said_anew():
    """A sentence that is said once is said once per test."""
    data.note.cache_clear()


WORDS = ("amber boat cedar dune ember fjord grove harbor island jade knoll lagoon maple north "
         "ocean pearl quartz river").split()


def demo_tokenizer():
    return models.load_tokenizer("tiny_llama")


def tiny_llama(tokenizer, seed=0, hidden=64, layers=2, heads=4):
    """A random Llama for this tokenizer, as configs/tiny_llama is for the demo's."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=layers, num_attention_heads=heads, tie_word_embeddings=True,
        max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = transformers.LlamaForCausalLM(config)
    lm.row_limit = models.row_limit(lm)
    return models.place(lm, PROC)


def rows_of(n, rng, wrong=0, paraphrase=False):
    """Invented questions with answers of very different lengths."""
    rows = []
    for i in range(n):
        words = rng.sample(WORDS, 6)
        length = 1 + i % 5
        row = {
            "question": f"What does {words[0]} {words[1]} mean in case {i}?",
            "answer": " ".join(words[1:1 + length]) + ".",
        }
        if paraphrase:
            row["paraphrased_answer"] = "It means " + row["answer"]
            row["paraphrased_question"] = f"In case {i}, what is meant by {words[0]} {words[1]}?"
        if wrong:
            row["perturbed_answer"] = []
            for _ in range(wrong):
                others = rng.sample(WORDS, length)
                row["perturbed_answer"].append("It means " + " ".join(others) + ".")
        rows.append(row)
    return rows


def save_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """A directory with TOFU-shaped data and two small random Llamas, target and retain.

    12 forget and 30 retain rows.
    """
    root = tmp_path_factory.mktemp("mini")
    rng = random.Random(0)
    forget, retain = rows_of(12, rng, 5, True), rows_of(30, rng, 5, True)
    sets = {
        "full": retain + forget,
        "forget05": forget,
        "retain95": retain,
        "forget05_perturbed": forget,
        "retain_perturbed": retain[:10],
        "real_authors_perturbed": rows_of(7, rng, 3),
        "world_facts_perturbed": rows_of(5, rng, 3),
        "holdout05": rows_of(8, rng),
    }
    (root / "data").mkdir()
    for name, rows in sets.items():
        save_rows(root / "data" / f"{name}.jsonl", rows)
    alternates = []
    for row in forget:
        answers = [row["perturbed_answer"][0], "Nothing at all."]
        alternates.append({"question": row["question"], "alternate": answers})
    save_rows(root / "alternates.jsonl", alternates)

    tokenizer = demo_tokenizer()
    for seed, name in enumerate(("target", "retain")):
        lm = tiny_llama(tokenizer, seed, hidden=32)
        with torch.no_grad():
            for p in lm.parameters():
                p.mul_(3)  # a random model is nearly uniform: sharpen it, so that differences show
        (root / name).mkdir()
        models.save_model(lm, tokenizer, str(root / name))
    return root


def needed_by(method, mini):
    """The settings that a method needs beside its name."""
    needed = {
        "altpo": {"alternates": mini / "alternates.jsonl"},
        "task_vector": {"retain_loss": "none"},
        "rmu": {"retain_loss": "rmu", "steering_layer": 0},
    }
    return needed.get(method, {})


def flags(mini, **settings):
    """The command line of a short run on the miniature."""
    base = dict(
        benchmark="tofu", subset="forget05", data=mini / "data", template="qa",
        model=mini / "target", retain_model=mini / "retain", device="cpu", batch_size=4, steps=4,
        lr=1e-3, eval_every=0, max_new_tokens=8)
    base |= settings
    base |= needed_by(settings.get("forget_loss"), mini)
    return [f"--{name}={value}" for name, value in base.items()]


def stopped(argv, monkeypatch):
    """A run that ends after its first checkpoint."""
    save_checkpoint = models.save_checkpoint

    def save_and_stop(run, lm, optimizer, scheduler, step):
        save_checkpoint(run, lm, optimizer, scheduler, step)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        unlearn.main(argv)
    monkeypatch.undo()


def log_of(out, scored=False):
    """The rows of a run's log: those of its steps, or those with scores."""
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if ("loss" not in row) == scored]


def run_script(script, argv, processes=1, cwd=ROOT):
    """Run the script as a user does, on one process or under torchrun."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*start, str(ROOT / script), *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
