"""The run directory, out/NAME: a run's model, settings, log, scores and checkpoint.

Standard library only; wandb where it was asked for.
"""
import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from configs import Failure, UsageError, groups, read_json, write

# ------------------------------------------------------------------------------------------------
# files


def file_digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 24), b""):
            digest.update(block)
    return digest.hexdigest()


def digests(folder: str) -> dict:
    """{file: checksum} of the weights in a directory."""
    names = [name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")]
    return {name: file_digest(os.path.join(folder, name)) for name in names}


def check_digests(folder: str):
    """Refuse a finished run whose weights are not those that were saved."""
    saved = read_json(os.path.join(folder, "run.json")).get("sha256")
    if not saved:
        return
    found = digests(folder)
    for name in saved | found:
        if saved.get(name) != found.get(name):
            raise Failure(
                f"{os.path.join(folder, name)}: damaged or changed, its checksum is not the one in "
                "run.json; make the run again with --overwrite=True, or take sha256 out of "
                "run.json if you changed it yourself.")


def writable(folder: str):
    """Create a directory that can be written, or fail now rather than after hours of work."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UsageError(f"--out={folder}: cannot be written ({e.strerror}).") from None


RESULTS = ("config.json", "scores.json", "examples.jsonl", "table.txt", "trajectory.png",
           "relearn.json", "relearn.png", "relearn.md", "relearn.csv")


def results(folder: str) -> list[str]:
    """What an earlier run left in a directory: names of models, scores, pictures."""
    pattern = r"model.*\.safetensors.*|epoch_[\d.]+|checkpoint|.*\.\d+\.tmp"
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [name for name in names if name in RESULTS or re.fullmatch(pattern, name)]


# ------------------------------------------------------------------------------------------------
# time


class Clock:
    """Wall-clock seconds by phase. A phase inside another counts as itself only."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.spent, self.current, self.since = collections.Counter(), "other", time.perf_counter()

    def enter(self, name: str) -> str:
        """Book the time since the last call on the phase that ends here; return its name."""
        now = time.perf_counter()
        self.spent[self.current] += now - self.since
        previous, self.current, self.since = self.current, name, now
        return previous

    @contextlib.contextmanager
    def phase(self, name: str):
        previous = self.enter(name)
        try:
            yield
        finally:
            self.enter(previous)

    def seconds(self) -> dict:
        """{phase: seconds} until now, the longest first."""
        self.enter(self.current)
        return {name: round(spent, 3) for name, spent in self.spent.most_common()}


# ------------------------------------------------------------------------------------------------
# the run directory


# a kill between two renames leaves one of the others
CHECKPOINT, NEW, OLD = CHECKPOINTS = ("checkpoint", "checkpoint.new", "checkpoint.old")


class RunDirectory:
    """One run on disk. All ranks hold one; rank 0 writes.

    resumable: False for attacks and task vectors, which begin again.
    rows: the log so far.
    """

    def __init__(self, c, proc):
        self.c, self.proc, self.path = c, proc, c.out
        self.resumable = True
        self.interrupted = None  # the signal that asked this run to stop
        self.rows, self.log_file, self.wandb = [], None, None

    def file(self, *names: str) -> str:
        return os.path.join(self.path, *names)

    # is it ours to write

    def claim(self) -> bool:
        """True if this very run is finished here; a UsageError if the directory is another's."""
        existing = read_json(self.file("run.json"))
        self.proc.barrier()  # everyone has looked before anyone writes
        foreign = results(self.path)
        if not existing and foreign:
            raise UsageError(f"--out={self.path}: holds {foreign[0]}, and no run.json of a run of "
                             "this project; give a directory of its own.")
        writable(self.path)
        if not existing or self.c.overwrite:
            return False
        differ = self.differences(existing)
        if differ:
            raise UsageError(f"{self.path} holds a run of other settings ({'; '.join(differ)}); "
                             "give another --out, or --overwrite=True to replace it.")
        if existing.get("finished"):
            self.drop_checkpoints()  # a kill right after the mark leaves one
            return True
        if not self.c.resume:
            raise UsageError(f"{self.path} holds this run, unfinished; --resume=True goes on, "
                             "--overwrite=True begins again.")
        return False

    def differences(self, existing: dict) -> list[str]:
        """Settings that make a different run of it; one younger than the run had its default."""
        ignored = set()
        for group in groups(type(self.c)):
            if not vars(group).get("changes_result", True):
                ignored |= set(group.__annotations__)
        found = []
        settings = json.loads(json.dumps(dataclasses.asdict(self.c)))
        for name, value in settings.items():
            before = existing.get(name, getattr(type(self.c), name))
            if name not in ignored and before != value:
                found.append(f"{name} {before} there, {value} here")
        return found

    def start(self):
        """Write run.json; unless the run resumes, remove what an earlier one left."""
        if self.proc.rank == 0:
            resumes = self.c.resume and any(os.path.isdir(self.file(n)) for n in CHECKPOINTS)
            if not resumes:
                self.drop_checkpoints()  # first: new settings must not meet an old checkpoint
            self.write_settings()
            for name in [] if resumes else results(self.path):
                remove(self.file(name))
        self.proc.barrier()

    def write_settings(self, **more):
        """run.json: every setting, resolved, and what else the numbers depend on."""
        git = ["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        settings = dataclasses.asdict(self.c) | {
            "git": commit or None,
            "versions": versions | {"python": sys.version.split()[0]},
            "device": self.proc.device.type,
            "gpu": self.proc.gpu,
            "processes": self.proc.world,
        }
        write(self.file("run.json"), json.dumps(settings | more, indent=1) + "\n")

    def finish(self):
        """Mark the run finished; only now is its checkpoint not needed."""
        seconds = self.proc.clock.seconds()
        if self.proc.rank == 0:
            steps = [row for row in self.rows if "loss" in row]
            summary = {"finished": True}
            for name in ("tokens_per_s", "mfu"):
                values = [row[name] for row in steps if name in row]
                if values:
                    summary[name] = statistics.median(values)
            summary["memory_gb"] = max(row["memory_gb"] for row in steps)
            self.write_settings(**summary, seconds=seconds, sha256=digests(self.path))
            self.drop_checkpoints()
        total = sum(seconds.values())
        shares = [f"{name} {spent / total:.0%}" for name, spent in list(seconds.items())[:6]]
        self.proc.say(f"{total:.0f} s: {', '.join(shares)}")
        self.proc.clock.reset()  # the next run of this process has its own
        self.proc.barrier()

    # the log

    def open_log(self, step: int):
        """Open log.jsonl, with the rows up to the checkpoint's step when a run resumes."""
        self.rows = self.rows_up_to(step) if step else []
        if self.proc.rank > 0:
            return
        os.makedirs(self.path, exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in self.rows]
        write(self.file("log.jsonl"), "".join(lines))
        self.log_file = open(self.file("log.jsonl"), "a", encoding="utf8")
        if self.c.wandb:
            import wandb
            name = os.path.basename(self.path)
            self.wandb = wandb.init(
                project=self.c.wandb, name=name, config=dataclasses.asdict(self.c))

    def log(self, row: dict):
        """Append a row. A step's row gets the seconds by phase so far."""
        if "loss" in row:
            row = row | {"seconds": self.proc.clock.seconds()}
        self.rows.append(row)
        if self.log_file:
            self.log_file.write(json.dumps(row) + "\n")
            self.log_file.flush()
        if self.wandb:
            self.wandb.log(row, step=row["step"])

    def rows_up_to(self, step: int) -> list[dict]:
        """The logged rows that belong to a checkpoint of `step`."""
        path = self.file("log.jsonl")
        rows = []
        try:
            with open(path, encoding="utf8") as f:
                for line in f:
                    if line.endswith("\n"):  # a kill may cut the last line
                        rows.append(json.loads(line))
        except (OSError, ValueError):
            rows = []
        rows = [row for row in rows if row["step"] <= step]
        logged = [row["step"] for row in rows if "loss" in row]
        if logged != list(range(1, step + 1)):
            raise Failure(f"{path}: damaged, it lacks steps up to the checkpoint's, {step}; "
                          "--overwrite=True begins the run again.")
        return rows

    # the checkpoint

    def save_checkpoint(self, step: int, save):
        """save(file) writes the state. The previous checkpoint stays until this one is on disk."""
        if self.proc.rank == 0:
            try:
                self.write_checkpoint(save)
            except (OSError, RuntimeError) as e:  # torch hides a full disk behind a RuntimeError
                cause = e.__context__ if isinstance(e.__context__, OSError) else e
                remove(self.file(NEW))
                raise Failure(
                    f"{self.path}: the checkpoint of step {step} could not be written "
                    f"({str(cause).splitlines()[0]}); the one before is untouched.") from None
        self.proc.barrier()

    def write_checkpoint(self, save):
        """Write checkpoint.new, sign it, and swap it for checkpoint."""
        remove(self.file(NEW))
        os.makedirs(self.file(NEW))
        state = self.file(NEW, "state.pt")
        with open(state, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        write(self.file(NEW, "sha256"), file_digest(state))
        os.fsync(self.log_file.fileno())  # a checkpoint is never on disk without its log
        remove(self.file(OLD))
        if os.path.isdir(self.file(CHECKPOINT)):
            os.rename(self.file(CHECKPOINT), self.file(OLD))
        os.rename(self.file(NEW), self.file(CHECKPOINT))
        remove(self.file(OLD))

    def find_checkpoint(self) -> str | None:
        """The state to resume from. A damaged one is refused, unless a kill cut its save off."""
        damaged = None
        for name in CHECKPOINTS:
            state, signature = self.file(name, "state.pt"), self.file(name, "sha256")
            signed = os.path.isfile(signature)
            if not os.path.isfile(state) or (name == NEW and not signed):
                continue
            if signed:
                with open(signature) as f:
                    if f.read() == file_digest(state):
                        return state
            damaged = damaged or state
        if damaged:
            raise Failure(f"{damaged}: damaged, its checksum differs; --overwrite=True begins the "
                          "run again.")
        return None

    def drop_checkpoints(self):
        for name in CHECKPOINTS:
            remove(self.file(name))

    # Ctrl-C and SIGTERM

    @contextlib.contextmanager
    def watch_signals(self):
        """Alone, a first Ctrl-C or SIGTERM waits for the end of the step, a second one does not."""
        in_main = threading.current_thread() is threading.main_thread()
        watched = (signal.SIGINT, signal.SIGTERM) if self.proc.world == 1 and in_main else ()
        before = {number: signal.getsignal(number) for number in watched}

        def restore_handlers():
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number, frame):
            self.interrupted = number
            restore_handlers()

        for number in watched:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore_handlers()

    @property
    def must_save(self) -> bool:
        return self.resumable and self.interrupted is not None

    def stop(self, step: int, steps: int) -> Failure:
        """What ends an interrupted run."""
        how = "without saving; the same command begins again"
        if self.resumable:
            how = "and saved; the same command with --resume=True goes on"
        return Failure(f"stopped after step {step} of {steps} {how}.", 128 + self.interrupted)


def remove(path: str):
    """Remove a file or a directory, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.exists(path):
        os.remove(path)
