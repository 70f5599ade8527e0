"""Settings: pytest tests/test_configs.py. Every mistake is one sentence with exit status 2, before a model is loaded."""
import dataclasses
import inspect
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script

import configs
import evaluate
import relearn
import unlearn
from configs import UsageError

FILES = sorted(p for p in (ROOT / "configs").glob("*.py") if p.name not in ("__init__.py", "rundir.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
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
])
def test_a_mistake_is_one_sentence_that_names_the_value(words, sentence):
    with pytest.raises(UsageError) as e:
        configs.load(unlearn.Config, words)
    assert sentence in str(e.value) and "\n" not in str(e.value)


def test_mistakes_in_a_config_file_are_found_too(tmp_path):
    path = tmp_path / "mine.py"
    for text, sentence in (("learning_rate = 1.0", "no setting called 'learning_rate'"), ("steps = 'ten'", "steps must be int"),
                           ("lr = = 1", "cannot be read as a config: SyntaxError"), ("batch_size = True", "batch_size must be int")):
        path.write_text(text)
        with pytest.raises(UsageError, match=sentence):
            configs.load(unlearn.Config, [str(path)])


def test_a_config_file_is_plain_assignments_with_names_of_its_own_and_later_words_win(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from configs.demo import *\n_n = 3\nimport math\nlr = 2 ** -10\nepochs = _n\neval_at = (1, 5)\n")
    c, given, names = configs.load(unlearn.Config, [str(path), "--epochs=4", "out/run", "--epochs=5", "--out=a=b", "--steps=None"])
    assert (c.lr, c.epochs, c.eval_at, c.out, c.steps, c.benchmark) == (2 ** -10, 5.0, (1, 5), "a=b", None, "demo")
    assert names == ["out/run"] and given["epochs"] == 5.0


def test_the_demo_config_is_read_only_when_nothing_else_is_asked_for():
    demo = str(ROOT / "configs" / "demo.py")
    assert configs.load(unlearn.Config, [], default=demo)[0].model == "out/demo_target"
    assert configs.load(unlearn.Config, ["--benchmark=demo"], default=demo)[0].batch_size == 8
    assert configs.load(unlearn.Config, ["--benchmark=tofu"], default=demo)[0].batch_size == 32


@pytest.mark.parametrize("script", [evaluate, unlearn, relearn])
def test_help_prints_every_setting_with_default_and_comment(script, capsys):
    with pytest.raises(SystemExit) as e:
        configs.load(script.Config, ["--help"], script.__doc__)
    text = capsys.readouterr().out
    assert e.value.code == 0
    lines = {line.split("=")[0].strip(): line for line in text.splitlines() if line.startswith("    --")}
    for f in dataclasses.fields(script.Config):
        assert f"--{f.name}={f.default}" in lines[f"--{f.name}"]
        owner = next(base for base in script.Config.__mro__ if f.name in vars(base).get("__annotations__", ()))
        comment = re.search(rf"\n    {f.name}: [^\n]*?  # ([^\n]*)", inspect.getsource(owner))
        assert not comment or comment[1] in lines[f"--{f.name}"]
    assert "--micro_batch_tokens=4096" in text and "memory, never the result" in text


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        configs.make(unlearn.Config, {}).lr = 1.0


def test_the_command_line_exits_with_2_on_a_mistake_and_prints_it_once():
    done = run_script("unlearn.py", ["--lrr=3"])
    assert done.returncode == 2 and done.stderr.count("did you mean 'lr'") == 1 and "Traceback" not in done.stderr


def test_under_torchrun_a_mistake_is_printed_by_one_rank_only():
    done = run_script("unlearn.py", ["--lrr=3"], processes=2)
    assert done.returncode != 0 and done.stderr.count("did you mean 'lr'") == 1


def test_the_loader_needs_the_standard_library_only():
    import ast
    tree = ast.parse(Path(configs.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert {n.split(".")[0] for n in names} - {"matplotlib", "wandb"} <= sys.stdlib_module_names  # both only where asked for


@pytest.mark.parametrize("error, status, text", [
    (UsageError("write this"), 2, "write this"), (configs.Failure("it broke"), 1, "it broke"), (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(28, "No space left on device", "out/x"), 1, "out/x: No space left on device."),
    (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), 1, "Lower --micro_batch_tokens")])
def test_what_goes_wrong_is_a_sentence_and_an_exit_status_and_a_bug_keeps_its_traceback(error, status, text, capsys):
    def broken(argv):
        raise error
    with pytest.raises(SystemExit) as e:
        configs.run(broken)
    assert e.value.code == status and text in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        configs.run(lambda argv: 1 / 0)
