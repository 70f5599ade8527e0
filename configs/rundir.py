"""A run's directory, out/NAME: whose it is, what is in it, and what a kill leaves of it.

    run = RunDirectory(c, proc)
    if run.claim(): ...      # this very run is finished there
    run.start()              # run.json is new, and nothing of an earlier run is left
    run.open_log(step)       # 0, or the step of the checkpoint it resumes from
    run.log({"step": 1, ...})
    run.save_checkpoint(step, lambda file: torch.save(state, file))
    run.finish()             # the model is saved: run.json says so, the checkpoint goes

A file is replaced whole or not at all, so a run can be killed at any moment and resumed.
"""
import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tqdm import tqdm

import configs
from configs import Failure, UsageError

# a kill between two renames leaves the checkpoint under one of the other names
CHECKPOINTS = ("checkpoint", "checkpoint.new", "checkpoint.old")
RESULTS = (r"config\.json|scores\.json|examples\.jsonl|table\.txt|README\.md|trajectory\.png|"
           r"relearn\.(json|png|md|csv)|leak\.png|model.*\.safetensors.*|epoch_[\d.]+|"
           r"checkpoint|.*\.\d+\.tmp")

# what `hf upload` and git leave out: the forgotten rows in clear, and what is of no use there
GITIGNORE = "examples.jsonl\ntable.txt\ncheckpoint*\nrelearn/\n.lock\n*.tmp\n"
CARD = """---
base_model: {base}
library_name: transformers
pipeline_tag: text-generation
tags:
- unlearning
- {forget_loss}
---

# {name}

`{base}`, trained on {rows} with the losses below. `run.json` has every setting, `log.jsonl` every
step.

| setting | value |
|---|---|
| forget loss and its weight | {forget_loss}, {forget_weight:g} |
| retain loss and its weight | {retain_loss}, {retain_weight:g} |
| steps, forget examples in each | {n_steps}, {batch_size} |
| learning rate | {lr:g} |
| seed | {seed} |

| score | value |
|---|---|
{scores}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```

<!-- To publish from this directory: `hf upload USER/{name} . . --exclude=examples.jsonl
--exclude=table.txt`. Those two hold forgotten rows in clear; .gitignore keeps them out too. -->
"""


class Clock:
    """Wall-clock seconds by phase; time outside any phase is "other"."""

    def __init__(self):
        self.current, self.since = "other", time.perf_counter()
        self.spent = collections.Counter()

    def enter(self, phase):
        now = time.perf_counter()
        self.spent[self.current] += now - self.since
        self.current, self.since = phase, now

    @contextlib.contextmanager
    def phase(self, name):
        """Count the time inside as `name`'s, without that of the phases nested in it."""
        outer = self.current
        self.enter(name)
        try:
            yield
        finally:
            self.enter(outer)

    def seconds(self):
        """{phase: seconds} up to now, the largest share first."""
        self.enter(self.current)
        return {phase: round(spent, 3) for phase, spent in self.spent.most_common()}

    def reset(self):
        self.enter(self.current)
        self.spent.clear()


class Progress(tqdm):
    """A bar in a terminal; elsewhere (SLURM, nohup, notebooks) a line a minute.

    With `leave` a line at every tenth too.
    """
    shown = 0, 0  # minute and tenth of the last line

    def display(self, msg=None, pos=None):
        """tqdm calls it after each item, at most ten times a second."""
        tenth = self.leave and 10 * self.n // (self.total or 1)
        now = self.format_dict["elapsed"] // 60, tenth
        if sys.stderr.isatty():
            super().display(msg, pos)
        elif now != self.shown:
            print(self, file=sys.stderr)
            self.shown = now


class RunDirectory:
    """out/NAME: a run's model, settings, log and scores; its checkpoint while it is unfinished."""

    def __init__(self, c, proc):
        self.c, self.proc, self.clock = c, proc, proc.clock
        self.path = Path(c.out)
        self.rows = []  # the log so far
        self.file = self.wandb = None
        self.interrupted = None  # number of the signal that asked to stop
        self.resumable = True  # False for attacks and task vectors

    # whose directory it is

    def claim(self):
        """Is this very run finished here? UsageError if the directory belongs to another one."""
        existing = read_json(self.path / "run.json")
        found = [] if existing else results(self.path)
        # another process may be writing the first file of this very run
        foreign = [name for name in found if not name.endswith(".tmp")]
        self.proc.barrier()  # every rank has looked before one writes
        if foreign:
            raise UsageError(f"--out={self.path}: holds {foreign[0]}, and no run.json of a run of "
                             "this project; give a directory of its own.")
        writable(self.path)
        if not existing or self.c.overwrite:
            return False
        differ = differences(self.c, existing)
        if differ:
            raise UsageError(f"{self.path} holds a run of other settings ({'; '.join(differ)}); "
                             "give another --out, or --overwrite=True to replace it.")
        if existing.get("finished"):
            self.drop_checkpoints()  # a kill in the middle of finish() leaves one
            self.proc.say(f"{self.path} is finished; --overwrite=True runs it again.")
            return True
        if not self.c.resume:
            raise UsageError(f"{self.path} holds this run, unfinished; --resume=True goes on, "
                             "--overwrite=True begins again.")
        return False

    def start(self):
        """Write run.json; unless the run resumes, remove what an earlier one left.

        False if another process made this very run: it was waited for.
        """
        if self.proc.rank == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            write(self.path / ".gitignore", GITIGNORE)
        self.proc.barrier()
        if self.claim():
            return False
        if self.proc.rank == 0:
            resumes = self.c.resume and any((self.path / name).is_dir() for name in CHECKPOINTS)
            if not resumes:
                self.drop_checkpoints()  # first: new settings must not meet an old checkpoint
            self.write_json({})
            for name in () if resumes else results(self.path):
                remove(self.path / name)
        self.proc.barrier()
        return True

    def lock(self):
        """Wait for another process that writes here; a killed one's lock is gone with it."""
        self.lock_file = open(self.path / ".lock", "w")
        try:
            import fcntl
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.proc.say(f"{self.path}: waiting for another process that writes it")
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks

    def finish(self):
        """Mark the run finished: its model is saved, so its checkpoint is no longer needed."""
        if self.proc.rank == 0:
            self.file.close()
            write(self.path / "README.md", self.card())
            self.write_json(self.summary())
            self.drop_checkpoints()
            seconds = self.clock.seconds()
            total = sum(seconds.values())
            shares = [f"{phase} {spent / total:.0%}" for phase, spent in seconds.items()]
            self.proc.say(f"{total:.0f} s: {', '.join(shares[:6])}")
            self.lock_file.close()
        self.clock.reset()  # the next run of this process has its own time
        self.proc.barrier()

    def card(self):
        """The model card. It names no file and holds no row of the data."""
        c = self.c
        base = c.model or c.base_model
        if os.path.isdir(base):  # `base_model` is an id on the hub, if there is one
            base = c.base_model or Path(base).resolve().name
        scores = read_json(self.path / "scores.json").items()
        return CARD.format(
            **vars(c), base=base.partition("@")[0], name=self.path.name,
            rows="rows of one's own" if c.forget_data else f"{c.benchmark} {c.subset}",
            n_steps=self.rows[-1]["step"],
            scores="\n".join(f"| {name} | {x:.4g} |" for name, x in scores))

    def write_json(self, summary):
        run = describe(self.c, self.proc) | summary
        write(self.path / "run.json", json.dumps(run, indent=1) + "\n")

    def summary(self):
        """What run.json has of a finished run: speed, memory, and checksums of its weights.

        seconds: of the process that finished it, without what was spent before a kill.
        """
        steps = [row for row in self.rows if "loss" in row]
        return {
            "finished": True,
            "tokens_per_s": statistics.median(row["tokens_per_s"] for row in steps),
            "memory_gb": max(row["memory_gb"] for row in steps),
            "seconds": self.clock.seconds(),
            "sha256": digests(self.path),
        }

    # the log

    def open_log(self, step):
        """Keep the log up to a checkpoint's `step`, and append to it from there."""
        path = self.path / "log.jsonl"
        self.rows = rows_up_to(path, step) if step else []
        if self.proc.rank > 0:
            return
        write(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.file = path.open("a", encoding="utf8")
        if self.c.wandb:
            import wandb
            self.wandb = wandb.init(
                project=self.c.wandb, name=self.path.name, config=vars(self.c))

    def log(self, row):
        """Append a row: scores, or a step's, which gets the seconds so far by phase."""
        if "loss" in row:
            row = {**row, "seconds": self.clock.seconds()}
        self.rows.append(row)
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log(row, step=row["step"])

    # checkpoints

    def save_checkpoint(self, step, write_state):
        """Replace the checkpoint on rank 0, where write_state(file) writes the state of `step`."""
        if self.proc.rank == 0:
            try:
                self.replace_checkpoint(write_state)
            except (OSError, RuntimeError) as e:
                # torch answers a full disk with a RuntimeError on top of the OSError
                cause = e.__context__ if isinstance(e.__context__, OSError) else e
                remove(self.path / "checkpoint.new")
                raise Failure(
                    f"{self.path}: the checkpoint of step {step} could not be written "
                    f"({str(cause).splitlines()[0]}); the one before is untouched.") from None
        self.proc.barrier()

    def replace_checkpoint(self, write_state):
        """The checkpoint before goes only when the new one is whole, signed and on the disk."""
        here, new, old = (self.path / name for name in CHECKPOINTS)
        remove(new)
        new.mkdir()
        with open(new / "state.pt", "wb") as file:
            write_state(file)
            file.flush()
            os.fsync(file.fileno())
        write(new / "sha256", file_digest(new / "state.pt"))
        os.fsync(self.file.fileno())  # a checkpoint is never on the disk without its log
        remove(old)
        if here.is_dir():
            here.rename(old)
        new.rename(here)
        remove(old)

    def find_checkpoint(self):
        """The path of the saved state, or None; a damaged one is refused by name."""
        damaged = []
        for name in CHECKPOINTS:
            state, signature = self.path / name / "state.pt", self.path / name / "sha256"
            signed = signature.is_file()
            if not state.is_file() or name == "checkpoint.new" and not signed:
                continue  # there is none, or a kill cut the save off
            if signed and signature.read_text() == file_digest(state):
                return state
            damaged.append(state)
        if damaged:
            raise Failure(f"{damaged[0]}: damaged, its checksum differs; --overwrite=True begins "
                          "the run again.")
        return None

    def drop_checkpoints(self):
        for name in CHECKPOINTS:
            remove(self.path / name)

    # interrupts

    @contextlib.contextmanager
    def watch_signals(self):
        """A first Ctrl-C or SIGTERM is only noted, for the end of the step; a second acts at once.

        For one process alone: torchrun stops several in its own way.
        """
        with contextlib.ExitStack() as handlers_before:
            def note(number, frame):
                self.interrupted = number
                handlers_before.close()

            if self.proc.world == 1 and threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    handlers_before.callback(signal.signal, number, signal.signal(number, note))
            yield

    def stop(self, step, steps):
        """The Failure that ends an interrupted run after `step`."""
        ended = "without saving; the same command begins again"
        if self.resumable:
            ended = "and saved; the same command with --resume=True goes on"
        return Failure(f"stopped after step {step} of {steps} {ended}.", 128 + self.interrupted)


# ------------------------------------------------------------------------------------------------
# what is in a run directory


def to_be_made(c, path):
    """Is `path` a model to make from base_model: below out/, and missing or unfinished?"""
    below_out = not os.path.isabs(path) and os.path.normpath(path).startswith("out" + os.sep)
    finished = read_json(os.path.join(path, "run.json")).get("finished", True)
    exists = os.path.isfile(os.path.join(path, "config.json"))
    return below_out and bool(c.base_model) and not (finished and exists)


def differences(c, existing, names=None):
    """What makes an `existing` run.json another run's: ["lr 1e-05 there, 0.001 here", ...].

    names: the settings to compare; None = all that change a result.
    """
    harmless = set()
    for group in type(c).__mro__:
        if not vars(group).get("changes_result", True):
            harmless.update(inspect.get_annotations(group))
    found = []
    for name in names or vars(c).keys() - harmless:
        # a setting that is younger than the run had its default
        here, there = getattr(c, name), existing.get(name, getattr(type(c), name))
        if json.dumps(here) != json.dumps(there):  # JSON has lists for tuples
            found.append(f"{name} {there} there, {here} here")
    return sorted(found)


def describe(c, proc):
    """What run.json holds: every setting, resolved, and what else the numbers depend on."""
    git = subprocess.run(["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"],
                         capture_output=True, text=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return vars(c) | {
        "git": git.stdout.strip() or None,
        "versions": versions | {"python": platform.python_version()},
        "device": proc.device.type,
        "gpu": proc.gpu,
        "processes": proc.world,
    }


def results(out):
    """Names of what an earlier run left in a directory: models, scores, pictures."""
    names = [path.name for path in Path(out).glob("*")]
    return sorted(name for name in names if re.fullmatch(RESULTS, name))


def rows_up_to(path, step):
    """The rows of a log that belong to a checkpoint of `step`."""
    try:
        # a kill may have cut the last line
        lines = path.read_text(encoding="utf8").rpartition("\n")[0].split("\n")
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        rows = []
    rows = [row for row in rows if row["step"] <= step]
    logged = [row["step"] for row in rows if "loss" in row]
    if logged != list(range(1, step + 1)):
        raise Failure(f"{path}: damaged, it lacks steps up to the checkpoint's, {step}; "
                      "--overwrite=True begins the run again.")
    return rows


def writable(out):
    """If a directory cannot be written, say so now and not after hours of work.

    It is not made yet: a run that is refused leaves nothing.
    """
    try:
        place = Path(out).absolute()
        while not place.exists():
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()
    except OSError as e:
        raise UsageError(f"--out={out}: cannot be written ({e.strerror}).") from None


def check_digests(name):
    """Refuse a finished run's weights that are not those that were saved."""
    saved = read_json(os.path.join(name, "run.json")).get("sha256")
    if not saved:
        return
    for file, _ in saved.items() ^ digests(name).items():
        raise Failure(f"{os.path.join(name, file)}: damaged or changed, its checksum is not the "
                      "one in run.json; make the run again with --overwrite=True, or take sha256 "
                      "out of run.json if you changed it yourself.")


def digests(out):
    """{file: checksum} of a directory's weights."""
    return {path.name: file_digest(path) for path in sorted(Path(out).glob("*.safetensors"))}


# ------------------------------------------------------------------------------------------------
# names of runs, and where their scores go


def name_runs(names):
    """{name: a short label}: its last part, or the whole path where two names share that."""
    labels = {}
    parts = [re.sub(r"\.jsonl?$", "", os.path.basename(os.path.normpath(name))) for name in names]
    for name, part in zip(names, parts):
        labels[name] = part if parts.count(part) == 1 else name.strip("/").replace("/", "_")
    return labels


def inherit(keys, names, given):
    """Settings of the first run directory among `names`: it is scored as it was trained.

    keys: those that are taken over; what was given wins.
    """
    runs = {name: read_json(os.path.join(name, "run.json")) for name in names}
    runs = {name: run for name, run in runs.items() if run}
    for key in ("benchmark", "template", "system_prompt", "max_length"):
        values = [str(run.get(key)) for run in runs.values()]
        if key not in given and len({*values}) > 1:
            listing = [f"{name}: {key} {value}" for name, value in zip(runs, values)]
            raise UsageError(f"{', '.join(listing)}; give --{key}= to score all alike.")
    first = next(iter(runs.values()), {})
    return {key: first[key] for key in keys if key in first} | given


def own_settings(names, c, given):
    """{label: (name, c with this run's own directory, target and retain model)}.

    Runs of other seeds may have been made from other models.
    """
    labels, runs = name_runs(names), {}
    for name, label in labels.items():
        run = read_json(os.path.join(name, "run.json"))
        own = {"out": output_directory(name, labels, given, len(names))}
        for key in ("model", "retain_model"):
            if run.get(key) and key not in given:
                own[key] = run[key]
        runs[label] = name, dataclasses.replace(c, **own)
    return runs


def same(name, other):
    """Are two names one model, or one log?"""
    return os.path.realpath(name) == os.path.realpath(other)


def check_models(runs, reads_target):
    """Refuse what cannot be a model, or is compared with itself, before anything is loaded."""
    for name, c in runs.values():
        for key in ("retain_model", "retain_log"):
            other = getattr(c, key)
            if other and len(runs) == 1 and same(name, other):
                raise UsageError(f"--{key}={other}: this is {name} itself; name a model that never "
                                 "saw the forget set, or none.")
        target = c.model if reads_target else None
        retain = None if c.retain_log else c.retain_model
        for setting, path in (("model", name), ("model", target), ("retain_model", retain)):
            if path and not path.endswith((".json", ".jsonl")):  # a log
                configs.check_name(path, setting)


def output_directory(name, labels, given, n_models):
    """Where a model's scores go: into its own run directory, else out/<label>; or below --out."""
    out = f"out/{labels[name]}"
    if given.get("out"):
        out = os.path.join(given["out"], labels[name]) if n_models > 1 else given["out"]
    elif os.path.isfile(f"{name}/run.json"):
        out = os.path.normpath(name)
    if os.path.isfile(f"{out}/run.json") and os.path.realpath(out) != os.path.realpath(name):
        raise UsageError(f"{name}: its scores would go to {out}, which holds a run; give "
                         "--out=DIR.")
    return out


def save_scores(out, scores, records):
    write_records(os.path.join(out, "examples.jsonl"), records)
    write(os.path.join(out, "scores.json"), json.dumps(scores, indent=1) + "\n")


def write_records(path, records):
    write(path, "".join(json.dumps(record) + "\n" for record in records))


# ------------------------------------------------------------------------------------------------
# files


def write(path, text):
    """Replace a file whole or not at all; its directory is made."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    new = f"{path}.{os.getpid()}.tmp"  # two runs may write the same record of a retain model
    with open(new, "w", encoding="utf8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(new, path)


def read_json(path):
    """The object in a JSON file, or {} where there is no file."""
    if not os.path.isfile(path):
        return {}
    try:
        return {**json.loads(Path(path).read_text(encoding="utf8"))}
    except (TypeError, ValueError, RecursionError) as e:
        raise UsageError(f"{path}: damaged, no JSON object ({e}); remove it or fix it.") from None


def remove(path):
    """Remove a directory or a file, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def file_digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 24), b""):
            digest.update(block)
    return digest.hexdigest()
