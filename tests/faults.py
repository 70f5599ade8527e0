"""Kill runs, feed nonsense: python tests/faults.py kill | nonsense. Too long for the test suite, which runs a few of each.

    python tests/faults.py kill --kills=50 --processes=1    # a run that makes its models, unlearns and scores; Linux, CPU
    python tests/faults.py kill --kills=50 --processes=2    # the same under torchrun (gloo)
    python tests/faults.py nonsense --cases=2000            # malformed rows, logs, files and settings

`kill`: the run is killed (SIGKILL, every process of it) at a random moment between its first training step and its end, and
started again with --resume=True; models, scores, examples and logs must be those of the run that nothing happened to, bit by bit.
`nonsense`: each case is scored to finite numbers or refused with a sentence of ours (Mistake, Failure); any other exception is
one that a user would have seen as a traceback. A seed gives the same moments (as fractions of a run) and the same cases.
"""
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import ROOT, rows_of, save_rows  # noqa: E402

import configs  # noqa: E402
import model as models  # noqa: E402
import torch  # noqa: E402
import unlearn  # noqa: E402

MODELS = ("target", "retain", "run")  # in the order they are made; below out/
TIMING = ("tokens_per_s", "memory_gb", "seconds")


# ----------------------------------------------------------------------------------------------------------------------
# kills


def flags(place, **more):
    """A 40-step run that makes its target and its retain model first; it saves after each step, so that many kills hit a save."""
    settings = dict(benchmark="tofu", subset="forget05", data=place / "data", template="qa", base_model="tiny", model="out/target",
                    retain_model="out/retain", out="out/run", device="cpu", batch_size=4, steps=40, lr=1e-3, forget_loss="npo",
                    finetune_lr=1e-3, finetune_epochs=3, finetune_batch_size=8, save_every=0.01, eval_every=4, max_new_tokens=8)
    return [f"--{k}={v}" for k, v in (settings | more).items()]


class Launched:
    """unlearn.py on some processes: under torchrun, or forked from this one, which saves each the seconds of its imports."""

    def __init__(self, place, processes, torchrun, **more):
        self.said, argv = place / "said.txt", flags(place, **more)
        with open(self.said, "w") as said:
            if torchrun:
                start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
                self.forked, self.agent = [], subprocess.Popen([*start, str(ROOT / "unlearn.py"), *argv], cwd=place, stdout=said, stderr=said)
                return
            with socket.socket() as s:
                s.bind(("localhost", 0))
                port = s.getsockname()[1]
            self.forked = [multiprocessing.get_context("fork").Process(target=forked, args=(place, said.fileno(), argv, rank, processes, port))
                           for rank in range(processes)]
            for p in self.forked:
                p.start()

    def running(self):
        return any(p.is_alive() for p in self.forked) if self.forked else self.agent.poll() is None

    def kill(self, rng):
        """Every process, in any order (torchrun gives its workers sessions of their own: they are found by their parent)."""
        pids = [p.pid for p in self.forked] or offspring(self.agent.pid)
        for pid in rng.sample(pids, len(pids)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        while self.running():
            time.sleep(0.01)

    def check(self):
        codes = [p.exitcode for p in self.forked] or [self.agent.returncode]
        if any(codes):
            raise SystemExit(f"a run ended with {codes}:\n{self.said.read_text()}")


def forked(place, said, argv, rank, processes, port):
    """One process as torchrun sets it up."""
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(place)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost",
                       "MASTER_PORT": str(port)}
    sys.argv = ["unlearn.py", *argv]
    configs.run(unlearn.main)


def offspring(pid):
    """The process and all that it started."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(status.read_text().rpartition(")")[2].split()[1]), []).append(int(status.parent.name))
        except OSError:  # it has ended meanwhile
            pass
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def finished(place, name="run"):
    path = place / "out" / name / "run.json"
    return path.exists() and json.loads(path.read_text()).get("finished", False)


def launch(place, processes, torchrun, rng=None, seconds=None, **more):
    """Run it, or kill it `seconds` after its first logged step. Returns the seconds from that step until it was finished."""
    run = Launched(place, processes, torchrun, **more)
    first, began = place / "out" / "target" / "log.jsonl", None
    while run.running() and not finished(place):
        if began is None and first.exists() and first.stat().st_size:
            began = time.monotonic()
        if began and seconds is not None and time.monotonic() - began > seconds:
            run.kill(rng)
            return seconds
        time.sleep(0.005)
    took = time.monotonic() - (began or time.monotonic())
    while run.running():
        time.sleep(0.01)
    run.check()
    return took


def result(place):
    """{what a run leaves: its digest, or for logs their rows}; nothing of it may depend on a kill."""
    found = {}
    for name in MODELS:
        out = place / "out" / name
        for file in ("model.safetensors", "config.json", "scores.json", "examples.jsonl"):
            if name == "run" or file in ("model.safetensors", "config.json"):
                found[f"{name}/{file}"] = hashlib.sha256((out / file).read_bytes()).hexdigest()
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        found[f"{name}/log.jsonl"] = [{k: v for k, v in r.items() if k not in TIMING} for r in rows]
        left = sorted(p.name for p in out.iterdir() if p.is_dir())
        found[f"{name}/left over"] = left  # no checkpoint, no part of a model
    return found


def stage(place):
    """What the killed run was doing, as far as its files tell."""
    for name in MODELS[:2]:
        if not finished(place, name):
            return f"making the {name} model"
    if not (place / "out" / "run" / "log.jsonl").exists():
        return "scoring before the first step"
    steps = (place / "out" / "run" / "log.jsonl").read_text().count('"loss"')
    return "scoring and saving at the end" if steps == 40 else "unlearning, scoring and saving on the way"


def data(place):
    rng = random.Random(0)
    forget, retain = rows_of(12, rng, 5, True), rows_of(30, rng, 5, True)
    (place / "data").mkdir(parents=True)
    for name, rows in {"full": retain + forget, "forget05": forget, "retain95": retain, "forget05_perturbed": forget,
                       "retain_perturbed": retain[:5], "real_authors_perturbed": rows_of(4, rng, 3),
                       "world_facts_perturbed": rows_of(4, rng, 3)}.items():
        save_rows(place / "data" / f"{name}.jsonl", rows)


def preload():
    """What unlearn.py imports late, once and here: forked processes have it at once."""
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo  # noqa: F401
    tokenizer, proc = unlearn.data.demo_tokenizer(), models.Process(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as root:
        models.save_model(models.tiny_llama(tokenizer, proc, 0), tokenizer, root)
        models.load_model(root, proc)


def kill(kills=50, processes=1, torchrun=False, seed=0, say=print):
    """{kills, identical, ...}: how many killed and resumed runs are the uninterrupted one, bit by bit."""
    rng, stages, identical, missed, n, saved = random.Random(seed), {}, 0, 0, 0, 0
    if not torchrun:
        preload()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        place = Path(root)
        data(place)
        whole = launch(place, processes, torchrun)
        expected = result(place)
        while n < kills:
            shutil.rmtree(place / "out")
            moment = rng.random() * whole
            took = launch(place, processes, torchrun, rng, moment)
            if finished(place):  # it was faster than the first time: another moment
                missed, whole = missed + 1, took
                continue
            n, at = n + 1, stage(place)
            stages[at] = stages.get(at, 0) + 1
            saved += any((place / "out" / name / "checkpoint").exists() for name in MODELS)
            launch(place, processes, torchrun, resume=True)
            got = result(place)
            differ = [k for k in expected if got.get(k) != expected[k]]
            identical += not differ
            say(f"{n:3}: killed {moment:.2f} s of {whole:.2f} after the first step, {at}: "
                f"{'differs in ' + ', '.join(differ) if differ else 'identical'}", flush=True)
    return {"processes": processes, "torchrun": torchrun, "seed": seed, "kills": kills, "identical": identical,
            "killed while": stages, "with a checkpoint to go on from": saved, "ended before the kill, drawn again": missed}


# ----------------------------------------------------------------------------------------------------------------------


def main(argv):
    what, words = (argv or ["--help"])[0], dict(a.removeprefix("--").split("=") for a in argv[1:])
    if what not in ("kill", "nonsense"):
        raise SystemExit(__doc__)
    found = (kill if what == "kill" else nonsense)(**{k: v == "True" if k == "torchrun" else int(v) for k, v in words.items()})
    print(json.dumps(found))
    sys.exit(found["identical"] < found["kills"] if what == "kill" else bool(found["tracebacks"]))


if __name__ == "__main__":
    main(sys.argv[1:])
