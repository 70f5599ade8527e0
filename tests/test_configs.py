"""Settings: pytest tests/test_configs.py.

A usage error is one sentence with exit status 2, before a model is loaded.
"""
import ast
import dataclasses
import inspect
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROC, ROOT, run_script
from matplotlib.figure import Figure

import configs
import evaluate
import relearn
import unlearn
from configs import Failure, UsageError, rundir, tables

MODULES = ("__init__.py", "recorded.py", "rundir.py", "tables.py")
FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name not in MODULES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_config_that_ships_is_valid_and_its_header_gives_its_launch_line(path):
    c, _, _ = configs.load(unlearn.Config, [str(path)])
    assert c.model and f"configs/{path.name}" in path.read_text() or path.name == "demo.py"


@pytest.mark.parametrize("words, sentence", [
    (["--lrr=3"], "no setting called 'lrr'; did you mean 'lr'?"),
    (["--retain_los=nll"], "did you mean 'retain_loss'?"),
    (["--steps=1.5"], "steps must be int or None, got '1.5'"),
    (["--shuffle=yes"], "shuffle must be bool, got 'yes'"),
    (["--benchmark=tofi"], "benchmark must be one of demo, tofu"),
    (["--forget_loss=simpno"], "must be one of ga, nll, npo, simnpo"),
    (["--subset=forget02", "--benchmark=tofu"], "tofu has forget10, forget05, forget01"),
    (["--eval_at=1,x"], "eval_at must be a comma-separated list of int, got '1,x'"),
    (["--lr", "3"], "settings are written --key=value"),
    (["-lr=3"], "settings are written --key=value"),
    (["configs/none.py"], "no such config file"),
    (["--lr=0", "--warmup=2"], "--lr=0.0: must be above 0. --warmup=2.0: a fraction"),
    (["--lr=nan"], "lr must be a finite number, got 'nan'"),
    (["--forget_weight=1e999"], "forget_weight must be a finite number"),
    (["--seed=-1"], "--seed=-1: must be from 0 to 2^63 - 1"),
    (["--eval_at=0,4"], "--eval_at=0,4: steps count from 1"),
    (["--out=a\0b"], "out must be str or None, got 'a\\x00b'"),
    (["--retain_log=none.json"], "none.json: no such file"),
    (["--max_length=0"], "--max_length=0: must be at least 2"),
])
def test_a_usage_error_is_one_sentence_that_names_the_value(words, sentence):
    with pytest.raises(UsageError) as e:
        configs.load(unlearn.Config, words)
    assert sentence in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text, sentence", [
    ("learning_rate = 1.0", "no setting called 'learning_rate'"),
    ("steps = 'ten'", "steps must be int"),
    ("lr = = 1", "cannot be read as a config: SyntaxError"),
    ("batch_size = True", "batch_size must be int"),
])
def test_usage_errors_in_a_config_file_are_found_too(tmp_path, text, sentence):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        configs.load(unlearn.Config, [str(path)])


def test_a_config_file_is_plain_assignments_with_names_of_its_own_and_later_words_win(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from configs.demo import *\n"
                    "_n = 3\n"
                    "import math\n"
                    "lr = 2 ** -10\n"
                    "epochs = _n\n"
                    "eval_at = (1, 5)\n")
    c, given, words = configs.load(unlearn.Config, [
        str(path), "--epochs=4", "out/run", "--epochs=5", "--out=a=b", "--steps=None"])
    assert (c.lr, c.epochs, c.eval_at) == (2 ** -10, 5.0, (1, 5))
    assert (c.out, c.steps, c.benchmark) == ("a=b", None, "demo")
    assert words == ["out/run"] and given["epochs"] == 5.0


def test_a_path_that_begins_with_a_tilde_is_below_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("USERPROFILE", "/home/somebody")
    path = tmp_path / "mine.py"
    path.write_text("model = '~/model'")
    c, given, _ = configs.load(unlearn.Config, [str(path), "--out=~/x", "--system_prompt=a ~/b"])
    assert (c.model, c.out) == ("/home/somebody/model", "/home/somebody/x")
    assert given["out"] == "/home/somebody/x"
    assert c.system_prompt == "a ~/b"


def test_the_demo_config_is_read_only_when_nothing_else_is_asked_for():
    demo = str(ROOT / "configs" / "demo.py")
    plain, _, _ = configs.load(unlearn.Config, [], default=demo)
    assert plain.model == "out/demo_target"
    named, _, _ = configs.load(unlearn.Config, ["--benchmark=demo"], default=demo)
    assert named.batch_size == 8
    other, _, _ = configs.load(unlearn.Config, ["--benchmark=tofu"], default=demo)
    assert other.batch_size == 32


SCRIPTS = [(unlearn, "Config"), (evaluate, "Command"), (relearn, "Config")]


def settings_in(text):
    """{setting: its lines, joined} of what --help printed."""
    found = {}
    for entry in re.split(r"\n(?=\S|    --|\n)", text):
        if entry.startswith("    --"):
            found[entry.split("=")[0].strip(" -")] = " ".join(entry.split())
    return found


@pytest.mark.parametrize("script, name", SCRIPTS)
def test_help_has_every_setting_with_default_and_comment_in_lines_of_100(script, name, capsys):
    cls = getattr(script, name)
    with pytest.raises(SystemExit) as e:
        configs.load(cls, ["--help"], script.__doc__)
    text = capsys.readouterr().out
    assert e.value.code == 0
    assert max(map(len, text.splitlines())) <= 100
    found = settings_in(text)
    assert found.keys() == configs.fields(cls).keys()
    for field in dataclasses.fields(cls):
        assert found[field.name].startswith(f"--{field.name}={field.default}")
        owner = next(group for group in cls.__mro__
                     if field.name in inspect.get_annotations(group))
        source = inspect.getsource(owner)
        comment = re.search(rf"\n    {field.name}: [^\n]*?  # ([^\n]*)", source)
        if comment:
            assert " ".join(comment[1].split()) in found[field.name]
    assert "memory, never the result" in found["micro_batch_tokens"]


def test_help_names_the_losses_and_every_other_choice(capsys):
    with pytest.raises(SystemExit):
        configs.load(unlearn.Config, ["--help"])
    found = settings_in(capsys.readouterr().out)
    assert found["forget_loss"].endswith(f"(one of {', '.join(unlearn.FORGET)})")
    assert found["retain_loss"].endswith(f"(one of {', '.join(unlearn.RETAIN)})")
    assert found["schedule"].endswith("(one of linear, cosine, constant)")


@pytest.mark.parametrize("script, name", SCRIPTS)
def test_help_imports_nothing_slow_and_is_there_at_once(script, name):
    """A script that finds no torch at all still helps."""
    file = Path(script.__file__).name
    without_torch = (f"import runpy, sys; sys.modules['torch'] = None; sys.path[0] = {str(ROOT)!r};"
                     f"sys.argv = [{file!r}, '--help']; runpy.run_path({str(ROOT / file)!r}, None, "
                     "'__main__')")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", without_torch], capture_output=True, text=True)
    assert time.monotonic() - began < 2
    assert (done.returncode, done.stderr) == (0, "")
    assert settings_in(done.stdout).keys() == configs.fields(getattr(script, name)).keys()


def test_help_fits_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        configs.load(unlearn.Config, ["--help"], "usage")
    assert 70 < max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_help_into_a_pipe_that_is_closed_is_a_normal_end():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, str(ROOT / "unlearn.py"), "--help"], stdout=writer,
                          stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@dataclasses.dataclass(frozen=True)
class Data(configs.Settings):
    """what is unlearned

    subset: not the comment of this field.
    """
    subset: str | None = None  # its name

    @classmethod
    def defaults(cls, given):
        return {"subset": "first"} if given.get("subset") is None else {}

    def problems(self):
        yield from self.check("subset", str.islower, "must be in lower case.")


@dataclasses.dataclass(frozen=True)
class Training(configs.Settings):
    """how it is trained"""
    lr: float = 1e-5  # of AdamW
    batch_size: int = 32  # examples per step,
                          # over all processes

    def problems(self):
        yield from self.check("lr batch_size", lambda value: value > 0, "must be above 0.")


@dataclasses.dataclass(frozen=True)
class Grouped(Data, Training):
    lr: float = 0.5  # an attack's own


HELP = """usage
Settings, --key=value (a config file has the same names, plain assignments):

  what is unlearned
    --subset=None                        its name

  how it is trained
    --lr=0.5                             an attack's own
    --batch_size=32                      examples per step, over all processes
"""


def test_help_has_the_groups_in_the_order_of_the_bases_and_a_new_default_in_its_group(capsys):
    with pytest.raises(SystemExit):
        configs.parse(Grouped, ["--help"], "usage")
    assert capsys.readouterr().out == HELP
    assert configs.fields(Grouped) == {"subset": str | None, "lr": float, "batch_size": int}


def test_every_group_fills_in_its_defaults_and_checks_its_own_settings():
    assert configs.make(Grouped, {}) == Grouped(subset="first", lr=0.5)
    assert configs.make(Grouped, {"subset": None, "lr": 2}) == Grouped(subset="first", lr=2.0)
    with pytest.raises(UsageError) as e:
        configs.make(Grouped, {"subset": "First", "lr": 0, "batch_size": -1})
    assert str(e.value) == ("--subset=First: must be in lower case. --lr=0.0: must be above 0. "
                            "--batch_size=-1: must be above 0.")


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        configs.make(unlearn.Config, {}).lr = 1.0


def test_the_command_line_exits_with_2_on_a_usage_error_and_prints_it_once():
    done = run_script("unlearn.py", ["--lrr=3"])
    assert done.returncode == 2
    assert done.stderr.count("did you mean 'lr'") == 1
    assert "Traceback" not in done.stderr


def test_under_torchrun_a_usage_error_is_printed_by_one_rank_only():
    done = run_script("unlearn.py", ["--lrr=3"], processes=2)
    assert done.returncode != 0
    assert done.stderr.count("did you mean 'lr'") == 1


@pytest.mark.parametrize("module, more", [(configs, set()), (rundir, {"tqdm"})])
def test_settings_need_the_standard_library_only_and_run_directories_tqdm(module, more):
    names = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    optional = {"matplotlib", "wandb"}  # both only where asked for
    assert names - optional - more - {"configs"} <= sys.stdlib_module_names


OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})  # as torch calls it


@pytest.mark.parametrize("error, status, text", [
    (UsageError("write this"), 2, "write this"),
    (Failure("it broke"), 1, "it broke"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(28, "No space left on device", "out/x"), 1, "out/x: No space left on device."),
    (OutOfMemoryError("CUDA out of memory."), 1, "Lower --micro_batch_tokens"),
])
def test_what_goes_wrong_is_a_sentence_and_an_exit_status(error, status, text, capsys):
    def broken(argv):
        raise error

    with pytest.raises(SystemExit) as e:
        configs.run(broken)
    assert e.value.code == status
    assert text in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    def broken(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        configs.run(broken)


# ------------------------------------------------------------------------------------------------
# pictures


CURVE = [{"epoch": 0.0, "model_utility": 0.7, "forget_quality": 1e-7},
         {"epoch": 1.0, "model_utility": 0.72, "forget_quality": 0.9},
         {"epoch": 2.0, "model_utility": 0.71, "forget_quality": 0.8}]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The figure of a picture of one run, its target and its retain model."""
    figures = []
    monkeypatch.setattr(Figure, "savefig",
                        lambda figure, path, **_: [figures.append(figure), Path(path).touch()])
    points = {"target": CURVE[0], "retain model": {"model_utility": 0.75, "forget_quality": 1.0}}
    tables.picture(str(tmp_path / "a.png"), {"mine": CURVE}, points, "model_utility",
                    "forget_quality")
    return figures[0]


def test_the_legend_of_a_picture_is_beside_its_points_and_names_the_line_at_0_05(drawn):
    drawn.draw_without_rendering()
    [legend] = drawn.legends
    labels = [text.get_text().split(";")[0] for text in legend.get_texts()]
    assert labels == ["mine", "target", "retain model", "p = 0.05"]
    [axes] = drawn.axes
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_the_last_epoch_is_written_beside_its_own_point_with_a_line_to_it(drawn):
    [label] = drawn.axes[0].texts
    assert label.get_text() == "epoch 2"
    assert label.xy == (0.71, 0.8)
    assert label.arrow_patch is not None


def test_a_picture_is_a_file_that_is_whole(tmp_path):
    path = tmp_path / "a.png"
    tables.picture(str(path), {"mine": CURVE, "none": []}, {}, "epoch", "model_utility")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


# ------------------------------------------------------------------------------------------------
# progress


def lines_of(printed):
    return [line for line in printed.splitlines() if line.strip()]


def test_progress_without_a_terminal_is_a_line_at_every_tenth(capsys):
    bar = PROC.progress(range(3, 41), "simnpo", total=40, initial=2, leave=True, miniters=1,
                        mininterval=0)
    for step in bar:
        bar.set_postfix(forget=f"{step / 2:.3f}", retain="0.100", refresh=False)
    lines = lines_of(capsys.readouterr().err)
    shown = [re.search(r"(\d+)/40 ", line)[1] for line in lines]
    assert shown == ["4", "8", "12", "16", "20", "24", "28", "32", "36", "40"]
    assert re.fullmatch(r"simnpo: +50%\|.*\| 20/40 \[.*<\d\d:\d\d, .*forget=10.000, "
                        r"retain=0.100\]", lines[4])


def test_a_bar_of_scoring_is_silent_for_a_minute_and_prints_a_line_in_each_after_that(
        capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    for _ in PROC.progress(range(8), "scoring"):
        clock[0] += 25
    shown = [re.search(r"(\d)/8 ", line)[1] for line in lines_of(capsys.readouterr().err)]
    assert shown == ["3", "5", "8"]  # 75, 125 and 200 seconds; item 7 is at 175


@pytest.mark.parametrize("rank, title", [(1, "simnpo"), (0, None)])
def test_other_ranks_and_nameless_work_show_no_progress(rank, title, capsys):
    proc = dataclasses.replace(PROC, rank=rank)
    bar = proc.progress(range(30), title, leave=True)
    for _ in bar:
        bar.set_postfix(forget="1", refresh=True)
    assert list(proc.progress([], "nothing")) == []
    assert capsys.readouterr().err == ""


def test_progress_in_a_terminal_is_one_line_that_is_written_again(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in PROC.progress(range(3), "simnpo", leave=True, mininterval=0):
        pass
    assert terminal.getvalue().count("\rsimnpo: ") >= 3
    assert terminal.getvalue().count("\n") == 1
