"""Settings, errors, names, tables and pictures: what all scripts share. Standard library only.

    c, given, words = load(Config, sys.argv[1:])

Settings are frozen dataclasses, a config file of plain assignments, and --key=value on top. A
config file is Python and is executed in a namespace of its own: read it before you run it. Every
public name it assigns must be a setting; a name that starts with `_` is its own.
"""
import csv
import difflib
import inspect
import io
import json
import math
import os
import re
import runpy
import signal
import statistics
import sys
import threading
import time
import types
import typing

# ------------------------------------------------------------------------------------------------
# errors


class UsageError(Exception):
    """The user can fix this: one sentence with what is wrong, the value got and what to write."""
    status = 2


class Failure(Exception):
    """Something went wrong in a run; what was saved before stays usable."""

    def __init__(self, text: str, status: int = 1):  # or 128 + a signal's number
        super().__init__(text)
        self.status = status


def run(main):
    """Call main(argv); what goes wrong becomes one sentence and an exit status.

    2: a UsageError. 1: a failure, a full disk or memory among them. 130, 143: Ctrl-C, SIGTERM. A
    bug keeps its traceback. Of several ranks rank 0 speaks first, then torchrun ends the others; a
    rank with a local error (memory, disk) prints it before the connection errors it causes.
    """
    alone, script = os.environ.get("WORLD_SIZE", "1") == "1", os.path.basename(sys.argv[0])
    rank = os.environ.get("RANK", "0")
    if alone and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        main(sys.argv[1:])
    except Exception as e:
        text, status = describe_error(e)
        if not alone:
            if text is None:
                time.sleep(10)
            elif rank != "0":
                time.sleep(5)
        if text is None:
            raise
        speaker = script if rank == "0" else f"{script} (rank {rank})"
        print(f"{speaker}: {text}", file=sys.stderr)
        sys.exit(status)
    except KeyboardInterrupt as e:
        print(f"{script}: interrupted; what was saved is kept, and the same command says how to go "
              "on.", file=sys.stderr)
        sys.exit(128 + (e.args[0] if e.args else signal.SIGINT))


def describe_error(error: Exception) -> tuple[str | None, int]:
    """(one sentence, exit status); the sentence is None for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, (UsageError, Failure)):
        return text, error.status
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the file system'}: {error.strerror}.", 1
    is_cuda = type(error).__name__ == "OutOfMemoryError"
    if isinstance(error, MemoryError) or is_cuda or "DefaultCPUAllocator" in text:
        return f"out of memory ({text[:200]}) Lower --micro_batch_tokens: the result stays the " \
               "same.", 1
    return None, 1


def raise_interrupt(number, frame):
    raise KeyboardInterrupt(number)


# ------------------------------------------------------------------------------------------------
# settings


class Settings:
    """Base of every group of settings. A group's docstring is its title in --help."""
    changes_result = True  # does another value make another run?

    def __post_init__(self):
        wrong = []
        for group in type(self).__mro__:
            if "problems" in vars(group):
                wrong += group.problems(self)
        if wrong:
            raise ValueError(" ".join(wrong))

    def problems(self):
        """Yield a sentence for each of the group's settings that is wrong."""
        yield from ()

    def check(self, names: str, is_valid, must: str):
        """Sentences for those of several settings that are given and not valid."""
        for name in names.split():
            value = getattr(self, name)
            if value not in (None, "") and not is_valid(value):
                yield f"--{name}={value}: {must}"

    @classmethod
    def defaults(cls, given: dict) -> dict:
        """Values of settings that depend on others and were not given."""
        return {}


def fields(cls) -> dict:
    """{name: type} of a dataclass, its groups in the order they are written."""
    hints = typing.get_type_hints(cls)
    names = {}
    for group in groups(cls):
        names |= dict.fromkeys(vars(group).get("__annotations__", ()))
    return {name: hints[name] for name in names if name in hints}


def groups(cls) -> list:
    """The classes a Config is made of: its bases in the order they are written, then itself."""
    found = []
    for base in cls.__bases__:
        found += groups(base)
    return [*found, cls]


def spell(kind) -> str:
    """A type's name in a message: 'int or None', 'one of short, unseen'."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("None" if arg is type(None) else spell(arg) for arg in args)
    if origin is tuple:
        return f"a comma-separated list of {spell(args[0])}"
    return "a finite number" if kind is float else kind.__name__


def fit(value, kind):
    """The value as `kind`, or ValueError. Strings are parsed and an int widens to float."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ValueError  # no file name and no text has these
    if origin in (types.UnionType, typing.Union):
        if value is None or value == "None":
            return None
        return fit(value, next(arg for arg in args if arg is not type(None)))
    if origin is typing.Literal:
        kind, valid = object, value in args
    elif origin is tuple:
        if isinstance(value, str):
            value = [part for part in value.strip("()[] ").split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return tuple(fit(part, args[0]) for part in value)
    elif kind is bool:
        valid = value in ("True", "False") or isinstance(value, bool)
        value = value in ("True", True)
    elif kind in (int, float):
        value, valid = fit_number(value, kind)
    else:
        valid = isinstance(value, kind)
    if not valid:
        raise ValueError
    return value


def fit_number(value, kind):
    """(the value as int or float, is it valid)."""
    if isinstance(value, bool):
        return value, False
    if isinstance(value, str):
        value = kind(value.strip())
    if kind is float and isinstance(value, int):
        value = float(str(value))  # an int too large for a float becomes inf
    return value, isinstance(value, kind) and math.isfinite(value)


def check_setting(cls, name: str, value, where: str):
    """One setting, typed; `where` is how the user wrote it."""
    kinds = fields(cls)
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise UsageError(f"{where}: no setting called '{name}'{hint} --help lists all settings.")
    try:
        return fit(value, kinds[name])
    except ValueError:
        expected = spell(kinds[name])
        raise UsageError(f"{where}: {name} must be {expected}, got {value!r}.") from None


def read_config(cls, path: str) -> dict:
    """The settings of one config file, typed."""
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such config file; configs/ holds the ones that come with the "
                         "project.")
    # a config may say `from configs.other import *`
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        kind = type(e).__name__
        raise UsageError(f"{path}: cannot be read as a config: {kind}: {e}.") from None
    finally:
        sys.path.pop(0)
    found = {}
    for name, value in names.items():
        if not name.startswith("_") and not isinstance(value, types.ModuleType):
            found[name] = check_setting(cls, name, value, path)
    return found


def show_help(cls, usage: str):
    """Print all settings by group with default and comment, read from the groups' source."""
    print(usage.strip())
    print("\nSettings, --key=value (a config file is the same names, as plain assignments):")
    kinds = fields(cls)
    comments = {}
    for group in groups(cls):
        if group is not object:
            comments |= comments_of(group)
    for group in groups(cls):
        names = [name for name in vars(group).get("__annotations__", ()) if name in kinds]
        if not names or group is cls:
            continue
        print(f"\n  {group.__doc__.splitlines()[0]}")
        for name in names:
            is_choice = typing.get_origin(kinds[name]) is typing.Literal
            choices = f" ({spell(kinds[name])})" if is_choice else ""
            default = f"{name}={getattr(cls, name)}"
            print(f"    --{default:<34} {comments[name]}{choices}".rstrip())


def comments_of(group) -> dict:
    """{setting: the comment behind it} of one class."""
    found = {}
    for line in inspect.getsource(group).splitlines():
        setting = re.match(r"    (\w+): [^#]*(?:  # (.*))?$", line)
        if setting:
            found[setting[1]] = setting[2] or ""
    return found


def parse(cls, argv: list, usage: str = "", default: str | None = None):
    """(settings that were given, other words). Later words win; a word in .py is a config file.

    default: the config file that is read when none is named and --benchmark is its own.
    """
    if "--help" in argv or "-h" in argv:
        show_help(cls, usage)
        raise SystemExit(0)
    flags, files, words = {}, [], []
    for word in argv:
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("-"):
            if not word.startswith("--") or not equals:
                raise UsageError(f"{word}: settings are written --key=value.")
            flags[key] = check_setting(cls, key, value, word)
        elif word.endswith(".py"):
            files.append(word)
        else:
            words.append(word)
    if default and not files and flags.get("benchmark", "demo") == "demo":
        files = [default]
    given = {}
    for path in files:
        given |= read_config(cls, path)
    return given | flags, words


def load(cls, argv: list, usage: str = "", default: str | None = None):
    """(config, settings that were given, other words)."""
    given, words = parse(cls, argv, usage, default)
    return make(cls, given), given, words


def make(cls, given: dict):
    """The config; some of what is given may come from a run.json, which anyone may edit."""
    checked = {}
    for name, value in given.items():
        checked[name] = check_setting(cls, name, value, f"--{name}={value}")
    try:
        return cls(**checked | cls.defaults(checked))
    except ValueError as e:
        raise UsageError(str(e)) from None


# ------------------------------------------------------------------------------------------------
# names of models and runs, and small files


def write(path: str, text: str):
    """Replace a file as a whole, or not at all."""
    unfinished = f"{path}.{os.getpid()}.tmp"  # two runs may write the same reference
    with open(unfinished, "w", encoding="utf8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(unfinished, path)


def read_json(path: str) -> dict:
    """A JSON object, {} where there is no file."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf8") as f:
            found = json.load(f)
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__}, not an object")
        return found
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path}: damaged, not valid JSON ({e}); remove it, or fix it.") from None


def name_runs(names: list) -> dict:
    """{name: a short label}; the whole path where two end the same."""
    short = {}
    for name in names:
        base = os.path.basename(os.path.normpath(name))
        short[name] = base.removesuffix(".json").removesuffix(".jsonl")
    labels = list(short.values())
    for name, label in short.items():
        if labels.count(label) > 1:
            short[name] = name.strip("/").replace("/", "_")
    return short


def split_revision(name: str) -> tuple[str, str | None]:
    """'org/name@revision' -> ('org/name', 'revision'); a directory is taken as it is."""
    if os.path.isdir(name):
        return name, None
    repo, _, revision = name.partition("@")
    return repo, revision or None


def looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~", "out/"))


def check_name(name: str, setting: str):
    """Is this a model at all? Asked before anything is loaded."""
    if os.path.isfile(os.path.join(name, "config.json")):
        return
    if os.path.isdir(name):
        raise UsageError(f"--{setting}={name}: holds no config.json.")
    if not looks_like_hub_id(name):
        raise UsageError(f"--{setting}={name}: no such directory, and not a hub id (org/name).")


def output_directory(name: str, labels: dict, given: dict, several: bool) -> str:
    """Where a model's scores go: its own run directory, else out/<label>; --out wins."""
    own = os.path.isfile(os.path.join(name, "run.json"))
    out = os.path.normpath(name) if own else os.path.join("out", labels[name])
    if given.get("out"):
        out = os.path.join(given["out"], labels[name]) if several else given["out"]
    is_run = os.path.isfile(os.path.join(out, "run.json"))
    if is_run and os.path.realpath(out) != os.path.realpath(name):
        raise UsageError(f"{name}: its scores would go to {out}, which holds a run; give "
                         "--out=DIR.")
    return out


# ------------------------------------------------------------------------------------------------
# tables and pictures


def number(x) -> str:
    if isinstance(x, tuple):  # mean and standard deviation
        return f"{number(x[0])} ± {number(x[1])}"
    if x is None:
        return "-"
    return f"{x:.2e}" if 0 < abs(x) < 1e-3 else f"{x:.4f}"


def cells(rows: dict, arrows: dict) -> list:
    """The texts of a table, its head first. A wide one is turned: one line per score."""
    keys = list(dict.fromkeys(key for scores in rows.values() for key in scores))
    head = ["", *(f"{key} {arrows[key]}".rstrip() for key in keys)]
    lines = [[name, *(number(scores.get(key)) for key in keys)] for name, scores in rows.items()]
    lines = [head, *lines]
    return list(zip(*lines)) if len(keys) > 8 else lines


def table(rows: dict, arrows: dict) -> str:
    """Text of a table. rows: {name: {score: value}}; arrows: {score: where better is}."""
    lines = cells(rows, arrows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for first, *others in lines:
        aligned = [first.ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        text.append("  ".join(aligned).rstrip())
    return "\n".join(text)


def show_tables(tables: dict, arrows: dict, path: str | None = None) -> str:
    """Text of tables {title: rows} and of their means over seeds.

    Also written to <path>.md, and in full precision to <path>.csv.
    """
    tables = dict(tables)
    for title, rows in list(tables.items()):
        means = over_seeds(rows)
        if means:
            tables[f"{title}: mean and standard deviation over seeds"] = means
    if path:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write(f"{path}.csv", as_csv(tables))
        write(f"{path}.md", as_markdown(tables, arrows))
    return "\n\n".join(f"{title}\n\n{table(rows, arrows)}" for title, rows in tables.items())


def as_csv(tables: dict) -> str:
    """One line per table and row; a spread is a column of its own."""
    lines = []
    for title, rows in tables.items():
        for name, scores in rows.items():
            line = {"table": title, "name": name}
            for key, value in scores.items():
                if isinstance(value, tuple):
                    line[key], line[f"{key}_std"] = value
                else:
                    line[key] = value
            lines.append(line)
    text = io.StringIO()
    columns = dict.fromkeys(column for line in lines for column in line)
    file = csv.DictWriter(text, columns, lineterminator="\n")
    file.writeheader()
    file.writerows(lines)
    return text.getvalue()


def as_markdown(tables: dict, arrows: dict) -> str:
    text = []
    for title, rows in tables.items():
        head, *body = [f"| {' | '.join(line)} |" for line in cells(rows, arrows)]
        rule = "|---" * (head.count(" | ") + 1) + "|"
        text.append("\n".join([f"{title}\n", head, rule, *body]) + "\n")
    return "\n".join(text)


def samples(records_of: dict, n: int = 3) -> str:
    """The first forget questions with the true and each model's answers; {label: records}."""
    answered = []
    for records in records_of.values():
        found = [r for r in records if r["set"] in ("forget", "knowmem_f") and r.get("question")]
        answered.append([r for r in found if "generated" in r][:n])
    lines = []
    for answers in zip(*answered):
        lines += ["", f"Q: {answers[0]['question']}"]
        lines += [f"   {'truth':<12} {answers[0]['answer']}"]
        for label, record in zip(records_of, answers):
            lines.append(f"   {label:<12} {record['generated']}")
    return "\n".join(lines)


def over_seeds(rows: dict) -> dict:
    """{name: {score: (mean, standard deviation)}} of runs named NAME_s0, NAME_s1, ..."""
    seeds = {}
    for label, scores in rows.items():
        named = re.fullmatch(r"(.+?)_s(?:eed)?\d+", label)
        if named:
            seeds.setdefault(named[1], []).append(scores)
    means = {}
    for name, several in seeds.items():
        if len(several) < 2:
            continue
        row = means[f"{name} (n={len(several)})"] = {}
        for key in several[0]:
            values = [scores[key] for scores in several if key in scores]
            if len(values) > 1:
                row[key] = statistics.mean(values), statistics.stdev(values)
    return means


def picture(path: str, curves: dict, points: dict, x: str, y: str):
    """Curves {label: [scores]} and points {label: scores} in the plane of two scores."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4.5))
    for label, rows in curves.items():
        rows = [row for row in rows if x in row and y in row]
        axes.plot([row[x] for row in rows], [row[y] for row in rows], ".-", label=label)
        if rows and x != "epoch":
            last = rows[-1]
            axes.annotate(f"epoch {last['epoch']:g}", (last[x], last[y]), fontsize=8,
                          xytext=(4, -10), textcoords="offset points")
    for label, scores in points.items():
        if x in scores and y in scores:
            marker, size = ("*", 12) if "retain" in label else ("s", 7)
            axes.plot(scores[x], scores[y], marker, markersize=size, label=label)
    if y == "forget_quality":
        axes.set_yscale("log")
        # above: cannot be told from the retain model
        axes.axhline(0.05, color="gray", linewidth=0.8, linestyle=":")
    if x == "model_utility":
        axes.set_xlim(0, 1)  # the whole range: a loss of two per cent should look like one
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(y.replace("_", " "))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path + ".tmp", dpi=150, format="png")
    os.replace(path + ".tmp", path)
    pyplot.close(figure)
