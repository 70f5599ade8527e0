"""Settings, run directories, and what the scripts say: a frozen dataclass, a config file of plain assignments, `--key=value`
on top; one sentence a mistake; tables and pictures. Standard library only, and matplotlib where a picture is drawn.

    cfg, explicit, names = load(Config, sys.argv[1:])

A config file is Python and is executed, in a namespace of its own: read one before you run it, as you would any script.
Every public name it assigns must be a field of the dataclass; a name that starts with `_` is the file's own.
A mistake is one sentence on standard error and exit status 2.
"""
import collections
import contextlib
import csv
import dataclasses
import difflib
import hashlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
import typing


class Mistake(Exception):
    """The user can mend this: one sentence that says what is wrong, the value got and what to write. Exit status 2."""


class Failure(Exception):
    """Something went wrong while running; what was saved before stays usable. Exit status 1, or 128 + a signal's number."""

    def __init__(self, text, status=1):
        super().__init__(text)
        self.status = status


def fields(cls):
    """{name: type} of a dataclass, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def spell(kind):
    """How a type is called in a message: 'int or None', 'one of short, unseen'."""
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(str(a) for a in typing.get_args(kind))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join("None" if a is type(None) else spell(a) for a in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a comma-separated list of {spell(typing.get_args(kind)[0])}"
    return "a finite number" if kind is float else kind.__name__


def fit(value, kind):
    """The value as `kind`, or raise ValueError. Strings are parsed, int widens to float, nothing else is converted."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ValueError  # no file name and no text has these
    if origin in (types.UnionType, typing.Union):
        if value is None or value == "None":
            return None
        return fit(value, next(a for a in args if a is not type(None)))
    if origin is typing.Literal:
        if value in args:
            return value
        raise ValueError
    if origin is tuple:
        if isinstance(value, str):
            value = [v for v in value.strip("()[] ").split(",") if v.strip()]
        if isinstance(value, (list, tuple)):
            return tuple(fit(v, args[0]) for v in value)
        raise ValueError
    if kind is bool:
        if value in ("True", "False") or isinstance(value, bool):
            return value in ("True", True)
        raise ValueError
    if isinstance(value, str) and kind in (int, float):
        value = kind(value.strip())
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(str(value))  # an int too large for a float becomes inf
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)) and (kind is not float or math.isfinite(value)):
        return value
    raise ValueError


def check(cls, name, value, where):
    """One setting, typed; `where` is how the user wrote it."""
    kinds = fields(cls)
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise Mistake(f"{where}: no setting called '{name}'{hint} --help lists all settings.")
    try:
        return fit(value, kinds[name])
    except ValueError:
        raise Mistake(f"{where}: {name} must be {spell(kinds[name])}, got {value!r}.") from None


def read(cls, path):
    """The settings of one config file, typed."""
    if not os.path.isfile(path):
        raise Mistake(f"{path}: no such config file; configs/ holds the ones that come with the project.")
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # `from configs.x import *`
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        raise Mistake(f"{path}: cannot be read as a config: {type(e).__name__}: {e}.") from None
    finally:
        sys.path.pop(0)
    return {k: check(cls, k, v, path) for k, v in names.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}


def show_help(cls, usage):
    """The settings with their defaults, group titles and comments, read from the dataclass's own source."""
    print(usage.strip(), "\n\nSettings, --key=value (a config file is the same names, as plain assignments):")
    owner = {name: base for base in reversed(cls.__mro__) for name in vars(base).get("__annotations__", ())}
    for base, line in ((base, line) for base in reversed(cls.__mro__[:-1]) for line in inspect.getsource(base).splitlines()):
        if title := re.match(r"    # (.+)", line):
            print(f"\n  {title[1]}")
        elif (setting := re.match(r"    (\w+): [^#]*(?:  # (.*))?$", line)) and owner[setting[1]] is base:
            name, kind = setting[1], fields(cls)[setting[1]]
            choices = f" ({spell(kind)})" if typing.get_origin(kind) is typing.Literal else ""
            print(f"    --{name + '=' + str(getattr(cls, name)):<34} {setting[2] or ''}{choices}".rstrip())


def parse(cls, argv, usage="", default=None):
    """(the settings that were given, the other words). Later words win; a word ending in .py is a config file.

    `default` is the config file read when none is named, unless --benchmark asks for something else than its own.
    """
    if "--help" in argv or "-h" in argv:
        show_help(cls, usage)
        raise SystemExit(0)
    files = [a for a in argv if a.endswith(".py") and not a.startswith("-")]
    names = [a for a in argv if not a.startswith("-") and a not in files]
    flags = {}
    for word in (a for a in argv if a.startswith("-")):
        key, eq, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not eq:
            raise Mistake(f"{word}: settings are written --key=value.")
        flags[key] = check(cls, key, value, word)
    if default and not files and flags.get("benchmark", "demo") == "demo":
        files = [default]
    given = {}
    for path in files:
        given |= read(cls, path)
    given |= flags
    return given, names


def load(cls, argv, usage="", default=None):
    """(config, the settings that were given, the other words)."""
    given, names = parse(cls, argv, usage, default)
    return make(cls, given), given, names


def make(cls, given):
    given = {k: check(cls, k, v, f"--{k}={v}") for k, v in given.items()}  # some are a run.json's, and anyone may edit one
    try:
        return cls(**given)
    except ValueError as e:
        raise Mistake(str(e)) from None


def cells(rows, arrows):
    """[[text]] of a table, its head first; '-' where a score does not apply. A wide one is turned: one line a score."""
    keys = list(dict.fromkeys(k for scores in rows.values() for k in scores))
    lines = [["", *(f"{k} {arrows.get(k, '↑')}".rstrip() for k in keys)]]
    lines += [[name, *(number(scores.get(k)) for k in keys)] for name, scores in rows.items()]
    return list(zip(*lines)) if len(keys) > 8 else lines


def table(rows, arrows):
    """Text of a table. rows: {name: scores}; arrows: {score: where better is}, up unless said."""
    lines = cells(rows, arrows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
                     for line in lines)


def show_tables(tables, arrows, path=None):
    """Text of tables {title: rows} and of their means over seeds; to <path>.md too, and in full precision to <path>.csv."""
    tables |= {f"{title}: mean and standard deviation over seeds": means for title, rows in tables.items()
               if (means := over_seeds(rows))}
    if path:
        lines = [{"table": title, "name": name} | {  # a spread takes two columns
            f"{k}{end}": x for k, v in scores.items() for x, end in zip(v if isinstance(v, tuple) else (v,), ("", "_std"))}
            for title, rows in tables.items() for name, scores in rows.items()]
        text = io.StringIO()
        file = csv.DictWriter(text, dict.fromkeys(k for line in lines for k in line), lineterminator="\n")
        file.writeheader()
        file.writerows(lines)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write(f"{path}.csv", text.getvalue())
        grids = {title: ["| " + " | ".join(line) + " |" for line in cells(rows, arrows)] for title, rows in tables.items()}
        write(f"{path}.md", "\n\n".join("\n".join([f"{title}\n", head, re.sub(r"[^|]+", "---", head), *body])
                                        for title, (head, *body) in grids.items()) + "\n")
    return "\n\n".join(f"{title}\n\n{table(rows, arrows)}" for title, rows in tables.items())


def number(x):
    if isinstance(x, tuple):
        return f"{number(x[0])} ± {number(x[1])}"
    return "-" if x is None else f"{x:.2e}" if 0 < abs(x) < 1e-3 else f"{x:.4f}"


def samples(models_records, n=3):
    """The first forget questions, the true answer and each model's: {label: records}."""
    rows = [[r for r in records if r["set"] in ("forget", "knowmem_f") and r.get("question") and "generated" in r][:n]
            for records in models_records.values()]
    lines = []
    for answers in zip(*rows):
        lines += ["", f"Q: {answers[0]['question']}", f"   {'truth':<12} {answers[0]['answer']}"]
        lines += [f"   {name:<12} {a['generated']}" for name, a in zip(models_records, answers)]
    return "\n".join(lines)


def over_seeds(rows):
    """{name: {score: (mean, standard deviation)}} of runs that are called alike but for a last _s0, _s1, _seed2, ..."""
    groups = {}
    for label, scores in rows.items():
        if m := re.fullmatch(r"(.+?)_s(?:eed)?\d+", label):
            groups.setdefault(m[1], []).append(scores)
    return {f"{name} (n={len(g)})": {k: (statistics.mean(v), statistics.stdev(v)) for k in g[0]
                                    if len(v := [scores[k] for scores in g if k in scores]) > 1}
            for name, g in groups.items() if len(g) > 1}


def picture(path, curves, points, x, y):
    """Curves {label: [scores]} and single points {label: scores} in the plane of two score keys."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4.5))
    for label, rows in curves.items():
        rows = [r for r in rows if x in r and y in r]
        axes.plot([r[x] for r in rows], [r[y] for r in rows], ".-", label=label)
        if rows and x != "epoch":
            axes.annotate(f"epoch {rows[-1]['epoch']:g}", (rows[-1][x], rows[-1][y]), fontsize=8, xytext=(4, -10),
                          textcoords="offset points")
    for label, r in points.items():
        if x in r and y in r:
            axes.plot(r[x], r[y], "*" if "retain" in label else "s", markersize=12 if "retain" in label else 7, label=label)
    if y == "forget_quality":
        axes.set_yscale("log")
        axes.axhline(0.05, color="gray", linewidth=0.8, linestyle=":")  # above: cannot be told from the retain model
    if x == "model_utility":
        axes.set_xlim(0, 1)  # the whole range: a loss of two per cent should look like one
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(y.replace("_", " "))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path + ".tmp", dpi=150, format="png")
    os.replace(path + ".tmp", path)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# run directories: out/NAME holds a model, its settings, log and scores


SECONDS, CLOCK = collections.Counter(), ["other", time.perf_counter()]  # by phase, of this process; the phase, since when


def enter(phase):
    """Count the wall-clock seconds since the last call as those of the phase that ends here, and return its name."""
    before, now = CLOCK[0], time.perf_counter()
    SECONDS[before] += now - CLOCK[1]
    CLOCK[:] = phase, now
    return before


def seconds():
    enter(CLOCK[0])  # up to now
    return {name: round(s, 3) for name, s in SECONDS.most_common()}


@contextlib.contextmanager
def phase(name):
    """`with phase(...)`, `@phase(...)`: where the time goes; a phase inside another one counts as itself only."""
    before = enter(name)
    try:
        yield
    finally:
        enter(before)


class Log:
    """<out>/log.jsonl, flushed every line; kept up to the checkpoint when a run goes on. A step's row has the seconds so far, by phase."""

    def __init__(self, c, proc, step):
        path = os.path.join(c.out, "log.jsonl")
        self.rows = rows_up_to(path, step) if step else []
        self.file = self.wandb = None
        if proc.rank == 0:
            write(path, "".join(json.dumps(r) + "\n" for r in self.rows))
            self.file = open(path, "a", encoding="utf8")
            if c.wandb:
                import wandb
                self.wandb = wandb.init(project=c.wandb, name=os.path.basename(c.out), config=dataclasses.asdict(c))

    def write(self, row):
        row = row | {"seconds": seconds()} if "loss" in row else row
        self.rows.append(row)
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log(row, step=row["step"])


def rows_up_to(path, step):
    """The rows of a log that belong to a checkpoint of `step`."""
    try:
        with open(path, encoding="utf8") as f:
            rows = [r for line in f if line.endswith("\n") and (r := json.loads(line))["step"] <= step]  # a kill may cut the last
    except (OSError, ValueError):
        rows = []
    if [r["step"] for r in rows if "loss" in r] != list(range(1, step + 1)):
        raise Failure(f"{path}: damaged, it lacks steps up to the checkpoint's, {step}; --overwrite=True begins the run again.")
    return rows


def write(path, text):
    """Replace a file whole or not at all."""
    part = f"{path}.{os.getpid()}.tmp"  # two runs may write the same record of a retain model
    with open(part, "w", encoding="utf8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def read_json(path):
    """A JSON file, or {} where there is none."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf8") as f:
            if isinstance(found := json.load(f), dict):
                return found
            raise ValueError(f"{type(found).__name__}, not an object")
    except (ValueError, RecursionError) as e:
        raise Mistake(f"{path}: damaged, not valid JSON ({e}); remove it, or mend it.") from None


def file_digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 24), b""):
            digest.update(block)
    return digest.hexdigest()


def digests(out):
    """{file: checksum} of a directory's weights."""
    return {name: file_digest(os.path.join(out, name)) for name in sorted(os.listdir(out)) if name.endswith(".safetensors")}


def check_digests(name):
    """A finished run's weights are those that were saved."""
    saved = read_json(os.path.join(name, "run.json")).get("sha256")
    if saved and saved != (found := digests(name)):
        file = next(f for f in saved | found if saved.get(f) != found.get(f))
        raise Failure(f"{os.path.join(name, file)}: damaged or changed, its checksum is not the one in run.json; make the run again "
                      "with --overwrite=True, or take sha256 out of run.json if you changed it yourself.")


def describe(c, proc):
    """What run.json holds: every setting, resolved, and what else the numbers depend on."""
    git = subprocess.run(["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")} | {"python": sys.version.split()[0]}
    return dataclasses.asdict(c) | {"git": git or None, "versions": versions, "device": proc.device.type, "gpu": proc.gpu,
                                    "processes": proc.world}


def summary(c):
    """What run.json says of a finished run too: its speed and memory, from its own log, and the checksums of its weights.

    seconds: wall-clock time by phase, of the process that finished it; what was spent before a kill is not in it.
    """
    with open(os.path.join(c.out, "log.jsonl"), encoding="utf8") as f:
        steps = [r for r in map(json.loads, f) if "loss" in r]
    median = {k: statistics.median(r[k] for r in steps if k in r) for k in ("tokens_per_s", "mfu") if k in steps[-1]}
    return {"finished": True} | median | {"memory_gb": max(r["memory_gb"] for r in steps), "seconds": seconds(), "sha256": digests(c.out)}


RESULTS = ("config.json", "scores.json", "examples.jsonl", "table.txt", "trajectory.png", "relearn.json", "relearn.png",
           "relearn.md", "relearn.csv")
ANY_TIME = {"out", "overwrite", "resume", "wandb", "device", "micro_batch_tokens", "save_every", "parallel", "plan",
            "activation_checkpointing", "compile"}  # these do not change a result
CHECKPOINTS = ("checkpoint", "checkpoint.new", "checkpoint.old")  # a kill between two renames leaves one of the others


def claim(c, proc):
    """Is `out` free for this run? True if the very same run is finished there; a Mistake if another one is."""
    there = read_json(os.path.join(c.out, "run.json"))
    proc.barrier()  # everyone has looked before anyone writes
    if not there and (foreign := results(c.out)):
        raise Mistake(f"--out={c.out}: holds {foreign[0]}, and no run.json of a run of this project; give a directory of its own.")
    writable(c.out)
    if not there or c.overwrite:
        return False
    mine = json.loads(json.dumps(dataclasses.asdict(c)))
    there = {k: getattr(type(c), k) for k in mine} | there  # a setting that is younger than the run had its default
    differ = [f"{k} {there[k]} there, {v} here" for k, v in mine.items() if k not in ANY_TIME and there[k] != v]
    if differ:
        raise Mistake(f"{c.out} holds a run of other settings ({'; '.join(differ)}); give another --out, or "
                      "--overwrite=True to replace it.")
    if there.get("finished"):
        drop_checkpoints(c)  # a kill between the mark and this leaves one
        return True
    if not c.resume:
        raise Mistake(f"{c.out} holds this run, unfinished; --resume=True goes on, --overwrite=True begins again.")
    return False


def results(out):
    """What a run before left in a directory: names of models, scores, pictures."""
    names = sorted(os.listdir(out)) if os.path.isdir(out) else []
    return [n for n in names if n in RESULTS or re.fullmatch(r"model.*\.safetensors.*|epoch_[\d.]+|checkpoint|.*\.\d+\.tmp", n)]


def writable(out):
    """A directory that can be written, or a Mistake now rather than a failure after hours of work."""
    try:
        os.makedirs(out, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as e:
        raise Mistake(f"--out={out}: cannot be written ({e.strerror}).") from None


def start(c, proc):
    """Write run.json; unless it goes on, what a run before left is removed, so that no file is stale."""
    if proc.rank == 0:
        goes_on = c.resume and any(os.path.isdir(os.path.join(c.out, name)) for name in CHECKPOINTS)
        if not goes_on:
            drop_checkpoints(c)  # first: new settings must not meet an old checkpoint
        write(os.path.join(c.out, "run.json"), json.dumps(describe(c, proc), indent=1) + "\n")
        for path in () if goes_on else (os.path.join(c.out, name) for name in results(c.out)):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    proc.barrier()


def drop_checkpoints(c):
    for name in CHECKPOINTS:
        shutil.rmtree(os.path.join(c.out, name), ignore_errors=True)


def accept_checkpoint(c):
    """<out>/checkpoint.new is whole: sign it and put it in the place of <out>/checkpoint, which leaves only now."""
    here, new, old = (os.path.join(c.out, name) for name in CHECKPOINTS)
    write(os.path.join(new, "sha256"), file_digest(os.path.join(new, "state.pt")))
    with open(os.path.join(c.out, "log.jsonl"), "rb") as f:
        os.fsync(f.fileno())  # a checkpoint is never on the disk without its log
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(here):
        os.rename(here, old)
    os.rename(new, here)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(c):
    """The state a run was saved in, or None. A damaged one is refused by name, but for one that a kill between renames left."""
    damaged = None
    for name in CHECKPOINTS:
        path, digest = (os.path.join(c.out, name, file) for file in ("state.pt", "sha256"))
        if not os.path.isfile(path) or name == CHECKPOINTS[1] and not os.path.isfile(digest):  # a kill cut this save off
            continue
        if os.path.isfile(digest) and open(digest).read() == file_digest(path):
            return path
        damaged = damaged or path
    if damaged:
        raise Failure(f"{damaged}: damaged, its checksum differs; --overwrite=True begins the run again.")
    return None


class Interrupt:
    """While training alone: a first Ctrl-C or SIGTERM waits for the end of the step, a second one does not."""

    def __init__(self, proc):
        self.signal = None
        self.watched = (signal.SIGINT, signal.SIGTERM) if (
            proc.world == 1 and threading.current_thread() is threading.main_thread()) else ()

    def __enter__(self):
        self.before = [signal.signal(s, self.note) for s in self.watched]
        return self

    def note(self, number, frame):
        self.signal = number
        self.__exit__()

    def __exit__(self, *_):
        for s, handler in zip(self.watched, self.before):
            signal.signal(s, handler)


def name_runs(names):
    """{name: a short label}; the whole path where two end alike."""
    short = {n: os.path.basename(os.path.normpath(n)).removesuffix(".json").removesuffix(".jsonl") for n in names}
    return {n: s if list(short.values()).count(s) == 1 else n.strip("/").replace("/", "_") for n, s in short.items()}


def split_revision(name):
    """'org/name@revision' -> ('org/name', 'revision'); a directory is taken as it is."""
    repo, _, revision = (name, "", "") if os.path.isdir(name) else name.partition("@")
    return repo, revision or None


def exists(name):
    """A directory that holds a model; or a name that can only be a hub id."""
    return os.path.isfile(os.path.join(name, "config.json")) or not os.path.isdir(name) and looks_like_hub_id(name)


def looks_like_hub_id(name):
    return name.count("/") == 1 and not name.startswith((".", "/", "~", "out/"))


def check_name(name, setting):
    """Before anything is loaded: is this a model at all?"""
    if not exists(name):
        what = "holds no config.json" if os.path.isdir(name) else "no such directory, and not a hub id (org/name)"
        raise Mistake(f"--{setting}={name}: {what}.")


def place(name, labels, given, several):
    """The directory that a model's scores go to: its own run directory, else out/<label>; below --out where that is given."""
    out = os.path.normpath(name) if os.path.isfile(os.path.join(name, "run.json")) else os.path.join("out", labels[name])
    if given.get("out"):
        out = os.path.join(given["out"], labels[name]) if several > 1 else given["out"]
    if os.path.isfile(os.path.join(out, "run.json")) and os.path.realpath(out) != os.path.realpath(name):
        raise Mistake(f"{name}: its scores would go to {out}, which holds a run; give --out=DIR.")
    return out


# ----------------------------------------------------------------------------------------------------------------------

def run(main):
    """Call main(argv); what goes wrong becomes one sentence and an exit status.

    2: a mistake in what was asked for. 1: a failure while running, a full disk or memory among them. 130, 143: Ctrl-C, SIGTERM.
    A bug keeps its traceback. Of several processes rank 0 speaks first, and torchrun then ends the others; but a rank that is
    alone with its trouble (its own memory, its own disk) speaks too, and before the ranks whose connection it broke.
    """
    alone, script = os.environ.get("WORLD_SIZE", "1") == "1", os.path.basename(sys.argv[0])
    if alone and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupted)
    try:
        main(sys.argv[1:])
    except Exception as e:
        text, rank, ours = " ".join(str(e).split()), os.environ.get("RANK", "0"), isinstance(e, (Mistake, Failure))
        if isinstance(e, OSError) and e.strerror:
            text, ours = f"{e.filename or 'the file system'}: {e.strerror}.", True
        elif isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
            text, ours = f"out of memory ({text[:200]}) Lower --micro_batch_tokens: the result stays the same.", True
        time.sleep(0 if alone or ours and rank == "0" else 5 if ours else 10)
        if not ours:
            raise
        print(f"{script}{'' if rank == '0' else f' (rank {rank})'}: {text}", file=sys.stderr)
        sys.exit(2 if isinstance(e, Mistake) else getattr(e, "status", 1))
    except KeyboardInterrupt as e:
        print(f"{script}: interrupted; what was saved is kept, and the same command says how to go on.", file=sys.stderr)
        sys.exit(128 + (e.args[0] if e.args else signal.SIGINT))


def interrupted(number, frame):
    raise KeyboardInterrupt(number)
