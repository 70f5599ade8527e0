"""Settings, --help and the errors that end a script. Needs the standard library only.

    c, given, words = load(Config, sys.argv[1:])

Settings are a frozen dataclass, made of groups. They come from a config file of plain assignments,
then from --key=value on the command line; later words win. A config file is Python and is executed,
in a namespace of its own: read one before you run it, as you would any script. Every name it
assigns must be a setting; names that start with _ are the file's own.
"""
import ast
import difflib
import inspect
import math
import os
import re
import runpy
import shutil
import signal
import sys
import textwrap
import threading
import time
import types
import typing

# ------------------------------------------------------------------------------------------------
# errors: one sentence on standard error and an exit status


class UsageError(Exception):
    """The user can fix this: a sentence with what is wrong, and what to write. Exit status 2."""


class Failure(Exception):
    """Something went wrong while running; what was saved before stays usable."""

    def __init__(self, text, status=1):
        super().__init__(text)
        self.status = status  # of the process; 128 + a signal's number where one stopped it


def run(main):
    """Call main(argv) and turn an error into one sentence and an exit status.

    2: a UsageError. 1: a failure while running, such as a full disk. 130, 143: Ctrl-C, SIGTERM.
    A bug keeps its traceback.
    """
    script = os.path.basename(sys.argv[0])
    rank, alone = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1") == "1"
    if alone and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        main(sys.argv[1:])
    except Exception as e:
        sentence = explain(e)
        # Of an error that all ranks have only rank 0 speaks: torchrun then ends the others. A rank
        # with an error of its own speaks too, before the connection errors it causes elsewhere.
        if not alone and not (sentence and rank == "0"):
            time.sleep(5 if sentence else 10)
        if not sentence:
            raise
        speaker = script if rank == "0" else f"{script} (rank {rank})"
        print(f"{speaker}: {sentence}", file=sys.stderr)
        sys.exit(2 if isinstance(e, UsageError) else getattr(e, "status", 1))
    except KeyboardInterrupt as e:
        print(f"{script}: interrupted; what was saved is kept, and the same command says how to "
              "go on.", file=sys.stderr)
        sys.exit(128 + (e.args[0] if e.args else signal.SIGINT))


def explain(error):
    """The sentence for an error that a user can act on; empty for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the file system'}: {error.strerror}."
    if re.search("MemoryError|DefaultCPUAllocator", type(error).__name__ + text):
        return (f"out of memory ({text[:200]}) Lower --micro_batch_tokens: the result stays the "
                "same.")
    return text if isinstance(error, (UsageError, Failure)) else ""


def raise_interrupt(number, frame):
    raise KeyboardInterrupt(number)


# ------------------------------------------------------------------------------------------------
# settings


class Settings:
    """Base of the groups, each a frozen dataclass.

    The first line of a group's docstring is its title in --help, a field's comment is its help.
    """
    changes_result = True  # does another value of one of its settings make another run?

    def __post_init__(self):
        sentences = []
        for group in type(self).__mro__:
            if "problems" in vars(group):
                sentences += group.problems(self)
        if sentences:
            raise ValueError(" ".join(sentences))

    def problems(self):
        """Yield a sentence for each wrong setting of this group (its bases are asked too)."""
        yield from ()

    def check(self, names, is_valid, must):
        """Yield a sentence for each setting in `names` that is given and not valid."""
        for name in names.split():
            value = getattr(self, name)
            if value not in (None, "") and not is_valid(value):
                if isinstance(value, tuple):
                    value = ",".join(map(str, value))
                yield f"--{name}={value}: {must}"

    @classmethod
    def defaults(cls, given):
        """{setting: value} of those left at None whose default depends on other settings."""
        return {}


def load(cls, argv, usage="", default=None):
    """Return (the settings, {setting: value} of those that were given, the other words)."""
    given, words = parse(cls, argv, usage, default)
    return make(cls, given), given, words


def parse(cls, argv, usage="", default=None):
    """Return ({setting: value} of those that were given, the other words).

    A word that ends in .py is a config file. `default` is the one to use where none is named,
    unless --benchmark or --forget_data asks for other rows.
    """
    help_if_asked(inspect.getfile(cls), cls.__name__, usage, argv)
    files, words, flags = [], [], {}
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("-"):
            names = files if word.endswith(".py") else words
            names.append(word)
        elif not word.startswith("--") or not equals:
            raise UsageError(f"{word}: settings are written --key=value.")
        else:
            flags[name] = typed(cls, name, value, word)
    other_rows = flags.get("benchmark", "demo") != "demo" or flags.get("forget_data")
    if default and not files and not other_rows:
        files = [default]
    given = {}
    for path in files:
        given |= read_config(cls, path)
    return given | flags, words


def make(cls, given):
    """The settings: those given, typed, and the defaults of the rest."""
    values = {}
    for name, value in given.items():  # some come from a run.json, which anyone may edit
        values[name] = typed(cls, name, value, f"--{name}={value}")
    try:
        return cls(**(values | cls.defaults(values)))
    except ValueError as e:
        raise UsageError(str(e)) from None


def read_config(cls, path):
    """{setting: value} of one config file."""
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such config file; configs/ holds the ones that come with the "
                         "project.")
    try:
        assigned = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        raise UsageError(f"{path}: cannot be read as a config: {type(e).__name__}: {e}.") from None
    given = {}
    for name, value in assigned.items():
        if not name.startswith("_") and not isinstance(value, types.ModuleType):
            given[name] = typed(cls, name, value, path)
    return given


def typed(cls, name, value, source):
    """The value of a setting, as its type; `source` is where the user wrote it."""
    kinds = fields(cls)
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
        hint = f"; did you mean '{close[0]}'?" if close else "."
        raise UsageError(f"{source}: no setting called '{name}'{hint} --help lists all settings.")
    try:
        return convert(value, kinds[name])
    except ValueError:
        raise UsageError(f"{source}: {name} must be {type_name(kinds[name])}, got "
                         f"{value!r}.") from None


def convert(value, kind):
    """The value as `kind`, or ValueError. Strings are parsed and int widens to float; no more."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ValueError  # neither a file name nor a text can have these
    if origin in (types.UnionType, typing.Union):
        return None if value in (None, "None") else convert(value, args[0])  # T | None
    if origin is tuple:
        if isinstance(value, str):
            value = [v for v in value.strip("()[] ").split(",") if v.strip()]
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return tuple(convert(v, args[0]) for v in value)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError
        return value
    return convert_scalar(value, kind)


def convert_scalar(value, kind):
    """The same for bool, int, float and str."""
    if kind is bool and value in ("True", "False"):
        value = value == "True"
    if kind in (int, float) and isinstance(value, str):
        value = kind(value.strip())
    if isinstance(value, bool) and kind is not bool:
        raise ValueError  # Python counts True among the int
    if kind is float and isinstance(value, int):
        value = float(str(value))  # an int too large for a float becomes inf
    if not isinstance(value, kind) or kind is float and not math.isfinite(value):
        raise ValueError
    return os.path.expanduser(value) if kind is str else value


def type_name(kind):
    """A type as messages call it: 'int or None', 'one of short, unseen'."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return f"{type_name(args[0])} or None"
    if origin is tuple:
        return f"a comma-separated list of {type_name(args[0])}"
    return "a finite number" if kind is float else kind.__name__


def fields(cls):
    """{setting: type}."""
    return typing.get_type_hints(cls)


# ------------------------------------------------------------------------------------------------
# --help, from the text of the scripts: to import torch for it would take seconds


def help_if_asked(path, name, usage, argv=sys.argv):
    """If argv asks for help, print the settings of class `name` of the file `path`, and exit."""
    if "--help" in argv or "-h" in argv:
        lines = {"": "Settings, --key=value (a config file has the same names, plain assignments):"}
        read_settings(path, name, lines)
        try:
            print(usage, *lines.values(), sep="\n", flush=True)
        except BrokenPipeError:
            os._exit(0)  # `| head` has read enough
        raise SystemExit(0)


FIELD = r"^    (\w+): (.*?) = (.*?)(?:  # (.*(?:\n {5,}# .*)*))?$"


def read_settings(path, name, lines):
    """Add a class to `lines`, {setting or title of a group: its lines}, behind its bases.

    A new default of a subclass stays in the group of its base. Defaults are literals. A comment may
    go on below its setting, indented deeper; "of the table FORGET" in it names all of that table.
    """
    with open(path, encoding="utf8") as f:
        text = f.read()
    [(bases, title, body)] = re.findall(
        rf'^class {name}\((.*?)\):\n(?:    """(.*?)["\n])?(.*?)(?=^\S|\Z)', text, re.M | re.S)
    for module, base in re.findall(r"(?:(\w+)\.)?(\w+)", bases):
        renamed = re.search(rf"^import (\w+) as {module}$", text, re.M)
        file = os.path.join(os.path.dirname(path), f"{renamed[1] if renamed else module}.py")
        if base != "Settings":
            read_settings(file if module else path, base, lines)
    if title:
        lines[f"group {title}"] = f"\n  {title}"
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    for setting, kind, default, comment in re.findall(FIELD, body, re.M):
        comment = re.sub(r"\n +# ", " ", comment)
        choices = re.findall('"(.*?)"', kind)  # of a Literal
        for table in re.findall(r"of the table (\w+)", comment):
            rows = text.split(f"\n{table} = {{\n")[1].split("\n}\n")[0]
            choices += re.findall(r'^    "(\w+)"', rows, re.M)
        if choices:
            comment += f" (one of {', '.join(choices)})"
        flag = f"--{setting}={ast.literal_eval(default)}"
        lines[setting] = textwrap.fill(f"    {flag:<36} {comment}", width,
                                       subsequent_indent=" " * 41, break_on_hyphens=False)


# ------------------------------------------------------------------------------------------------
# names of models


def split_revision(name):
    """'org/name@revision' -> ('org/name', 'revision'); a directory, or one in configs/, stays."""
    for directory in (name, os.path.join(os.path.dirname(__file__), name)):
        if os.path.isdir(directory):
            return directory, None
    repo, _, revision = name.partition("@")
    return repo, revision or None


def check_name(name, setting):
    """Refuse what cannot be a model, before anything is loaded."""
    problem, directory = "", split_revision(name)[0]
    if os.path.isdir(directory):
        files = ("config.json", "adapter_config.json")
        if not any(os.path.isfile(os.path.join(directory, file)) for file in files):
            problem = "holds no config.json"
    elif name.count("/") != 1 or name.startswith((".", "/", "~", "out/")):
        problem = "no such directory, and not a hub id (org/name)"
    if problem:
        raise UsageError(f"--{setting}={name}: {problem}.")
