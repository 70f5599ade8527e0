"""Nothing lost, nothing silent: pytest tests/test_faults.py.

Runs are killed, files damaged, disks full; then the runs resume, or say why not.
"""
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import faults
import numpy as np
import pytest
import torch
from conftest import PROC, ROOT, flags, log_of, stopped
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

import configs
import evaluate
import model as models
import unlearn
from configs import Failure, UsageError, rundir

KEYS = ("step", "epoch", "lr", "loss", "forget_loss", "retain_loss", "grad_norm")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux's list of processes")


def weights(out):
    return models.load_model(str(out), PROC).state_dict()


def assert_same_weights(a, b):
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_same_run(a, b):
    assert [r["step"] for r in log_of(a)] == [r["step"] for r in log_of(b)]
    for left, right in zip(log_of(a), log_of(b)):
        for key in KEYS:
            assert left[key] == right[key], f"step {left['step']}: {key}"
    assert log_of(a, scored=True) == log_of(b, scored=True)
    assert (a / "scores.json").read_text() == (b / "scores.json").read_text()
    assert_same_weights(a, b)
    for name in rundir.CHECKPOINTS:
        assert not (b / name).exists(), name


LONG = dict(forget_loss="npo", steps=40, save_every=1, eval_every=5)


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("faults") / "whole"
    unlearn.main(flags(mini, out=out, **LONG))
    return out


def wait_for(is_true, run):
    while not is_true():
        time.sleep(0.01)
        assert run.poll() is None, run.stderr and run.stderr.read()


# ------------------------------------------------------------------------------------------------
# interrupts and kills


def test_a_run_that_is_stopped_saves_and_goes_on_to_the_very_same_end(mini, tmp_path, whole):
    out = tmp_path / "stopped"
    command = [sys.executable, str(ROOT / "unlearn.py"), *flags(mini, out=out, **LONG)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 9, run)
    os.kill(run.pid, signal.SIGTERM)
    _, printed = run.communicate()
    assert run.returncode == 143
    assert "--resume=True goes on" in printed and "Traceback" not in printed
    assert (out / "checkpoint" / "state.pt").exists()
    assert not (out / "model.safetensors").exists()
    with pytest.raises(UsageError, match="unfinished; --resume=True"):
        unlearn.main(flags(mini, out=out, **LONG))
    unlearn.main(flags(mini, out=out, resume=True, **LONG))
    assert_same_run(whole, out)


def test_ctrl_c_finishes_the_step_saves_and_exits_with_130(mini, tmp_path, whole, monkeypatch):
    score, calls = models.score, []

    def interrupted_score(*args, **options):
        if torch.is_grad_enabled():  # a forward of the training, not of an evaluation
            calls.append(args)
            if len(calls) == 9:
                signal.raise_signal(signal.SIGINT)
        return score(*args, **options)

    monkeypatch.setattr(models, "score", interrupted_score)
    sentence = "stopped after step . of 40 and saved; .*--resume=True goes on"
    with pytest.raises(Failure, match=sentence) as e:
        unlearn.main(flags(mini, out=tmp_path / "a", **LONG | {"save_every": 0}))
    assert e.value.status == 130
    monkeypatch.undo()
    unlearn.main(flags(mini, out=tmp_path / "a", resume=True, **LONG))
    assert_same_run(whole, tmp_path / "a")


@pytest.fixture
def python_handles_ctrl_c():
    """A shell's background job ignores SIGINT, and so would its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_acts_at_once_and_the_handlers_are_restored(
        tmp_path, python_handles_ctrl_c):
    c = configs.make(unlearn.Config, {"out": str(tmp_path)})
    run = rundir.RunDirectory(c, PROC)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with run.watch_signals():
        assert run.interrupted is None
        signal.raise_signal(signal.SIGINT)
        assert run.interrupted == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    run.resumable = False
    assert str(run.stop(3, 9)) == ("stopped after step 3 of 9 without saving; the same command "
                                   "begins again.")


def test_sigterm_outside_the_loop_is_a_sentence_too(capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as e:
            configs.run(lambda argv: signal.raise_signal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert e.value.code == 143
    assert "the same command says how to go on" in capsys.readouterr().err


@linux_only
def test_runs_killed_at_random_moments_end_as_if_nothing_had_happened():
    """While making models, unlearning, scoring, saving. `python tests/faults.py kill` does fifty,
    with one process and with two."""
    found = faults.kill(kills=2, seed=7)
    assert found["identical"] == found["kills"] == 2


@linux_only
def test_a_run_of_two_processes_that_was_killed_goes_on_with_one(mini, tmp_path, whole):
    out = tmp_path / "killed"
    command = [*TORCHRUN, str(ROOT / "unlearn.py"), *flags(mini, out=out, **LONG)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((out / "checkpoint").exists, run)
    for pid in faults.offspring(run.pid):
        os.kill(pid, signal.SIGKILL)
    run.wait()
    unlearn.main(flags(mini, out=out, resume=True, **LONG))
    assert json.loads((out / "run.json").read_text())["processes"] == 1
    assert [row["step"] for row in log_of(out)] == list(range(1, 41))
    for a, b in zip(log_of(out), log_of(whole)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    left, right = weights(out), weights(whole)
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-6), name


ONE_RANK_FAILS = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import configs, model, torch, unlearn

score, calls = model.score, []


def score_or_fail(*args, **options):
    if torch.is_grad_enabled():
        calls.append(args)
        if os.environ["RANK"] == "1" and len(calls) == 6:
            raise MemoryError("no memory left on this rank.")
    return score(*args, **options)


model.score = score_or_fail
configs.run(unlearn.main)
"""


def test_one_rank_that_fails_stops_all_within_a_minute_with_its_own_sentence(mini, tmp_path):
    script = tmp_path / "unlearn.py"
    script.write_text(ONE_RANK_FAILS)
    argv = flags(mini, out=tmp_path / "a", save_every=1, steps=30)
    began = time.monotonic()
    done = subprocess.run([*TORCHRUN, str(script), str(ROOT), *argv], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode != 0
    assert time.monotonic() - began < 60
    sentence = "unlearn.py (rank 1): out of memory (no memory left on this rank.)"
    before, after = done.stderr.split("ChildFailedError")[0].split(sentence)
    assert "Traceback" not in before
    assert "closed by peer" not in before + after  # the ranks it took down stay silent


# ------------------------------------------------------------------------------------------------
# checkpoints


def stop_half_way(mini, out, monkeypatch, **settings):
    """A run with a checkpoint of step 3 that was then cut off."""
    stopped(flags(mini, out=out, **{"steps": 6, "save_every": 1} | settings), monkeypatch)


def flip_a_bit(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_checkpoint_is_refused_by_name(mini, tmp_path, monkeypatch, damage):
    stop_half_way(mini, tmp_path / "a", monkeypatch)
    path = tmp_path / "a" / "checkpoint" / "state.pt"
    middle = path.stat().st_size // 2
    if damage == "flip":
        flip_a_bit(path, middle)
    else:
        os.truncate(path, middle)
    with pytest.raises(Failure, match="checkpoint/state.pt: damaged, its checksum differs"):
        unlearn.main(flags(mini, out=tmp_path / "a", steps=6, save_every=1, resume=True))


def test_a_kill_between_two_renames_loses_nothing(mini, tmp_path, monkeypatch):
    unlearn.main(flags(mini, out=tmp_path / "whole", steps=6, save_every=1))
    stop_half_way(mini, tmp_path / "a", monkeypatch)
    os.rename(tmp_path / "a" / "checkpoint", tmp_path / "a" / "checkpoint.old")
    unlearn.main(flags(mini, out=tmp_path / "a", steps=6, save_every=1, resume=True))
    assert_same_weights(tmp_path / "whole", tmp_path / "a")


class Killed(BaseException):
    """What a kill is to the code that it hits: nothing runs after it."""


def test_a_kill_before_any_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    run = rundir.RunDirectory(configs.make(unlearn.Config, {"out": str(tmp_path)}), PROC)
    run.open_log(0)
    operations_left = []

    def killable(function):
        def operation(*args, **options):
            if not operations_left:
                raise Killed
            operations_left.pop()
            return function(*args, **options)
        return operation

    killed, n = True, 0
    while killed:
        run.save_checkpoint(1, lambda file: file.write(b"one"))
        operations_left[:] = range(n)
        with monkeypatch.context() as patch:
            for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink"):
                patch.setattr(os, name, killable(getattr(os, name)))
            try:
                run.save_checkpoint(2, lambda file: file.write(b"two"))
                killed = False
            except Killed:
                n += 1
        assert run.find_checkpoint().read_bytes() in (b"one", b"two"), f"killed after {n}"
    assert n > 8
    assert run.find_checkpoint().read_bytes() == b"two"


def test_a_save_that_a_kill_cut_off_is_no_damage(mini, tmp_path, whole):
    """The very first checkpoint was being written: there is none to resume from."""
    out = tmp_path / "a"
    unlearn.main(flags(mini, out=out, **LONG))
    run = json.loads((out / "run.json").read_text())
    del run["finished"], run["sha256"]
    (out / "run.json").write_text(json.dumps(run))
    (out / "checkpoint.new").mkdir()
    (out / "checkpoint.new" / "state.pt").write_bytes(b"half a file")
    unlearn.main(flags(mini, out=out, resume=True, **LONG))
    assert_same_run(whole, out)


@contextlib.contextmanager
def no_file_above(n):
    """A limit that the system keeps: writing past it fails, in Python, PyTorch and safetensors."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(mini, tmp_path, whole, monkeypatch):
    out = tmp_path / "a"
    stop_half_way(mini, out, monkeypatch, **LONG)
    state = out / "checkpoint" / "state.pt"
    size = state.stat().st_size
    sentence = "checkpoint of step 6 could not be written .*File too large.*before is untouched"
    with no_file_above(size // 2), pytest.raises(Failure, match=sentence):
        unlearn.main(flags(mini, out=out, resume=True, **LONG))
    assert not (out / "checkpoint.new").exists()
    assert state.stat().st_size == size
    unlearn.main(flags(mini, out=out, resume=True, **LONG))
    assert_same_run(whole, out)


def test_a_disk_that_fills_up_leaves_no_part_of_a_model(mini, tmp_path):
    out = tmp_path / "b"
    sentence = "the model could not be written .*File too large"
    with no_file_above(100_000), pytest.raises(Failure, match=sentence):
        unlearn.main(flags(mini, out=out))
    assert not (out / "model.safetensors").exists()
    assert not (out / ".saving").exists()
    unlearn.main(flags(mini, out=out, resume=True))


def test_resume_without_a_checkpoint_begins(mini, tmp_path):
    unlearn.main(flags(mini, out=tmp_path / "a", resume=True))
    assert [row["step"] for row in log_of(tmp_path / "a")] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------
# files of a run directory


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_model_of_a_finished_run_is_refused_by_name(mini, tmp_path, damage):
    unlearn.main(flags(mini, out=tmp_path / "a"))
    path = tmp_path / "a" / "model.safetensors"
    if damage == "flip":
        flip_a_bit(path, -3)
    else:
        os.truncate(path, path.stat().st_size - 9)
    sentence = ("a/model.safetensors: damaged or changed, its checksum is not the one in "
                "run.json")
    with pytest.raises(Failure, match=sentence):
        evaluate.main([str(tmp_path / "a"), f"--out={tmp_path / 'b'}"])


def test_a_line_that_a_kill_cut_off_is_dropped_and_a_log_that_lacks_steps_is_refused(
        mini, tmp_path, monkeypatch):
    out = tmp_path / "a"
    stop_half_way(mini, out, monkeypatch)
    path = out / "log.jsonl"
    log = path.read_text()
    path.write_text("".join(log.splitlines(True)[1:]))
    sentence = "log.jsonl: damaged, it lacks steps up to the checkpoint's, 3"
    with pytest.raises(Failure, match=sentence):
        unlearn.main(flags(mini, out=out, steps=6, save_every=1, resume=True))
    path.write_text(log + '{"step": 4, "epo')
    unlearn.main(flags(mini, out=out, steps=6, save_every=1, resume=True))
    assert [row["step"] for row in log_of(out)] == [1, 2, 3, 4, 5, 6]


def test_what_another_run_left_is_gone_even_if_the_kill_came_before_it_was_removed(
        mini, tmp_path, monkeypatch):
    """run.json names the run: files and checkpoint of an earlier one must not pass for its own."""
    out = tmp_path / "a"
    stop_half_way(mini, out, monkeypatch, lr=2e-3)
    (out / "scores.json").write_text("{}")
    (out / "epoch_9").mkdir()

    def cut_off(out):
        raise KeyboardInterrupt

    monkeypatch.setattr(rundir, "results", cut_off)
    with pytest.raises(KeyboardInterrupt):
        unlearn.main(flags(mini, out=out, overwrite=True))
    monkeypatch.undo()
    unlearn.main(flags(mini, out=out, resume=True))
    assert log_of(out)[0]["lr"] == 1e-3
    assert not (out / "scores.json").exists()
    assert not (out / "epoch_9").exists()


def test_a_kill_after_the_last_mark_leaves_no_checkpoint_for_good(mini, tmp_path):
    unlearn.main(flags(mini, out=tmp_path / "a"))
    (tmp_path / "a" / "checkpoint").mkdir()
    unlearn.main(flags(mini, out=tmp_path / "a"))
    assert not (tmp_path / "a" / "checkpoint").exists()


def test_a_run_of_other_settings_is_refused_but_not_one_that_gives_the_same_result(
        mini, tmp_path, capsys):
    out = tmp_path / "a"
    unlearn.main(flags(mini, out=out))
    sentence = r"holds a run of other settings \(lr 0.001 there, 0.002 here\); give another --out"
    with pytest.raises(UsageError, match=sentence):
        unlearn.main(flags(mini, out=out, lr=2e-3, micro_batch_tokens=77, save_every=2))
    capsys.readouterr()
    unlearn.main(flags(mini, out=out, micro_batch_tokens=77, save_every=2, compile=True))
    assert "is finished; --overwrite=True runs it again" in capsys.readouterr().out


def test_the_target_of_a_run_that_was_killed_is_taken_only_when_it_is_finished(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c = configs.make(unlearn.Config, {"base_model": "tiny_llama"})
    target = tmp_path / "out" / "target"
    target.mkdir(parents=True)
    assert rundir.to_be_made(c, "out/target")
    (target / "config.json").write_text("{}")
    assert not rundir.to_be_made(c, "out/target")  # somebody's model
    for finished in (False, True):
        (target / "run.json").write_text(json.dumps({"finished": finished}))
        assert rundir.to_be_made(c, "out/target") is not finished


def test_scores_never_go_into_the_directory_of_another_run(mini, tmp_path):
    unlearn.main(flags(mini, out=tmp_path / "a"))
    with pytest.raises(UsageError, match="its scores would go to .*a, which holds a run"):
        evaluate.main([str(mini / "target"), f"--out={tmp_path / 'a'}", "--benchmark=tofu",
                       f"--retain_model={mini / 'retain'}", "--template=qa"])
    assert not (tmp_path / "a" / "scores.json").exists()


def test_an_out_that_cannot_be_written_is_a_sentence_before_any_model_is_loaded(
        mini, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "read_only").mkdir()
    temporary_file = tempfile.TemporaryFile

    def refuse_read_only(dir):  # a superuser may write everywhere: a file system says no
        if dir == tmp_path / "read_only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return temporary_file(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse_read_only)
    for out in (tmp_path / "file" / "run", tmp_path / "read_only" / "run"):
        with pytest.raises(UsageError, match="cannot be written"):
            unlearn.main(flags(mini, out=out))
        with pytest.raises(UsageError, match="cannot be written"):
            evaluate.main([str(mini / "target"), f"--retain_model={mini / 'retain'}",
                           "--benchmark=tofu", f"--out={out}"])
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    sentence = "holds config.json, and no run.json of a run of this project"
    with pytest.raises(UsageError, match=sentence):
        unlearn.main(flags(mini, out=folder))


# ------------------------------------------------------------------------------------------------
# a run that is refused, and two at once


@pytest.mark.parametrize("settings, sentence", [
    (dict(max_length=2), "no forget row is left"),
    (dict(batch_size=99, steps=None, epochs=1), "0 optimizer steps"),
    (dict(forget_loss="rmu", retain_loss="rmu", steering_layer=7), "it must be below the last"),
    (dict(model="out/t", base_model="tiny_llama", finetune_epochs=0.1), "0 optimizer steps"),
])
def test_a_run_that_is_refused_leaves_nothing(mini, tmp_path, monkeypatch, settings, sentence):
    """Neither its directory nor one of those above it."""
    monkeypatch.chdir(tmp_path)
    given = flags(mini, out="here/and/below")
    given += [f"--{name}={value}" for name, value in settings.items()]
    with pytest.raises(UsageError, match=sentence):
        unlearn.main(given)
    assert list(tmp_path.iterdir()) == []


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def held_by_another_process(out):
    pytest.importorskip("fcntl")
    out.mkdir(parents=True, exist_ok=True)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out / ".lock")], text=True,
                              stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()


def test_a_run_waits_for_another_process_that_writes_its_directory_and_a_kill_unlocks(
        mini, tmp_path, capsys):
    out = tmp_path / "a"
    began_before_the_kill = []

    def kill():
        began_before_the_kill.append((out / "log.jsonl").exists())
        holder.kill()

    with held_by_another_process(out) as holder:
        threading.Timer(5, kill).start()
        unlearn.main(flags(mini, out=out))
    assert f"{out}: waiting for another process that writes it" in capsys.readouterr().out
    assert began_before_the_kill == [False]
    assert [row["step"] for row in log_of(out)] == [1, 2, 3, 4]


def test_what_another_process_has_finished_meanwhile_is_not_made_again(
        mini, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "a", tmp_path / "whole"
    unlearn.main(flags(mini, out=whole))

    def finish_meanwhile(run):
        """As if lock() had waited: the other process has put the very same run there."""
        for path in whole.iterdir():
            text = path.read_bytes()
            if path.name == "run.json":
                text = text.replace(b"whole", b"a")
            (out / path.name).write_bytes(text)

    monkeypatch.setattr(rundir.RunDirectory, "lock", finish_meanwhile)
    monkeypatch.setattr(unlearn, "train", None)
    unlearn.main(flags(mini, out=out))
    assert "is finished; --overwrite=True runs it again" in capsys.readouterr().out


@linux_only
def test_of_two_runs_that_need_the_same_target_one_makes_it_and_the_other_waits(tmp_path):
    faults.write_data(tmp_path)

    def start(name):
        command = [sys.executable, str(ROOT / "unlearn.py")]
        command += faults.flags(tmp_path, out=f"out/{name}", eval_every=0, steps=3, save_every=0,
                                finetune_epochs=40)
        return subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)

    first = start("a")
    wait_for((tmp_path / "out" / "target" / "log.jsonl").exists, first)
    first.send_signal(signal.SIGSTOP)  # it makes the target until the second run is seen to wait
    second, waiting = start("b"), ""
    try:
        while "out/target: waiting for another process that writes it" not in waiting:
            line = second.stdout.readline()
            assert line, waiting
            waiting += line
    finally:
        first.send_signal(signal.SIGCONT)
    printed = [first.communicate(timeout=200)[0], waiting + second.communicate(timeout=200)[0]]
    assert [first.returncode, second.returncode] == [0, 0], printed
    for name in ("target", "retain"):
        made = [text.count(f"{name}: 100%") for text in printed]
        assert sorted(made) == [0, 1], printed
    for name in ("a", "b"):
        assert [row["step"] for row in log_of(tmp_path / "out" / name)] == [1, 2, 3]


def test_train_called_by_itself_as_in_a_notebook_makes_its_directory(mini, tmp_path):
    out = tmp_path / "not" / "there"
    given, _ = configs.parse(unlearn.Config, flags(mini, out=out))
    c = configs.make(unlearn.Config, given)
    lm, tokenizer = evaluate.load(c.model, c, PROC)
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(8)]
    groups = unlearn.encode_groups(c, tokenizer, PROC, forget=rows[:4], retain=rows[4:])
    log = unlearn.train(c, PROC, lm, groups)
    assert log == log_of(out) and len(log) == 4


def test_without_locks_a_run_goes_on(mini, tmp_path, monkeypatch):
    """On Windows; there is no resource and no os.sysconf either."""
    for module in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(os, "sysconf")
    unlearn.main(flags(mini, out=tmp_path / "a"))
    assert log_of(tmp_path / "a")[0]["memory_gb"] == 0
    assert models.capacity_gb(PROC) == float("inf")


# ------------------------------------------------------------------------------------------------
# what may be published


@pytest.fixture(scope="module")
def scored(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored") / "mine"
    unlearn.main(flags(mini, out=out, eval_every=1, forget_loss="npo", lr=2e-3))
    return out


def test_a_finished_run_has_a_model_card_with_settings_and_scores_and_no_forgotten_row(
        mini, scored):
    card = ModelCard.load(scored / "README.md")
    assert card.data.base_model == "target"  # the name of a local directory, not its path
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["unlearning", "npo"]
    assert "trained on tofu forget05" in card.text
    for line in ("forget loss and its weight | npo, 1", "learning rate | 0.002",
                 "steps, forget examples in each | 4, 4", 'from_pretrained("PATH_OR_ID")'):
        assert line in card.text
    scores = json.loads((scored / "scores.json").read_text())
    for name, value in scores.items():
        assert f"| {name} | {value:.4g} |" in card.text
    assert str(mini) not in card.content
    for line in (mini / "data" / "forget05.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["question"] not in card.content
        assert row["answer"] not in card.content


@pytest.mark.parametrize("settings, base", [
    (dict(model="org/model@main"), "org/model"),
    (dict(model="org/model", base_model="org/base"), "org/model"),
    (dict(model=".", base_model="org/base"), "org/base"),  # made from it, here
    (dict(base_model="org/base"), "org/base"),  # a target
])
def test_a_card_names_the_model_on_the_hub_if_there_is_one(tmp_path, settings, base):
    c = configs.make(unlearn.Config, settings | {"out": str(tmp_path / "a")})
    run = rundir.RunDirectory(c, PROC)
    run.rows = [{"step": 3}]
    assert ModelCard(run.card()).data.base_model == base


def test_the_rows_in_clear_stay_out_of_git_and_of_what_the_card_uploads(scored, tmp_path):
    """The hub client sends .gitignore along, and the server leaves out what it names."""
    secret = {"examples.jsonl", "table.txt"}
    names = {path.name for path in scored.iterdir()}
    assert secret < names
    excluded = re.findall(r"--exclude=(\S+?)[`\s]", (scored / "README.md").read_text())
    kept = {*filter_repo_objects(sorted(names), ignore_patterns=excluded)}
    assert kept == names - secret
    copy = shutil.copytree(scored, tmp_path / "copy")
    subprocess.run(["git", "init", "-q", str(copy)], check=True)
    done = subprocess.run(["git", "-C", str(copy), "ls-files", "--others", "--exclude-standard"],
                          capture_output=True, text=True, check=True)
    assert {*done.stdout.split()} == names - secret - {".lock"}


def test_an_overwritten_run_has_no_card_until_it_is_finished(mini, tmp_path, monkeypatch):
    out = tmp_path / "a"
    unlearn.main(flags(mini, out=out))
    stop_half_way(mini, out, monkeypatch, overwrite=True)
    assert not (out / "README.md").exists()
    assert (out / ".gitignore").exists()


# ------------------------------------------------------------------------------------------------
# numbers


def test_a_model_that_broke_down_scores_nothing_or_is_a_failure_never_nan():
    records = []
    for name in ("forget", "retain", "real_authors", "world_facts"):
        records.append({"set": name, "index": 0, "nll": 2e3, "paraphrased_nll": 2e3,
                        "perturbed_nll": [2e3, 1.0], "rougeL_recall": 0.0})
    c = configs.make(evaluate.Config, {"benchmark": "tofu"})
    scores = evaluate.summarize(records, None, c)
    assert scores["model_utility"] == 0
    assert scores["real_authors_prob"] == scores["retain_prob"] == 0
    broken = [record | {"nll": float("nan")} for record in records]
    sentence = "not finite .*forget_prob nan, .*broken down; lower --lr"
    with np.errstate(all="ignore"), pytest.raises(Failure, match=sentence):
        evaluate.summarize(broken, None, c)


def test_nonsense_in_files_and_settings_is_scored_to_finite_numbers_or_refused_in_a_sentence():
    """`python tests/faults.py nonsense` does two thousand."""
    printed = []
    found = faults.nonsense(cases=150, say=lambda *words: printed.append(words))
    assert not printed
    assert found["tracebacks"] == 0
    assert sum(found["accepted"].values()) > 20
    assert sum(found["refused"].values()) > 20


def test_deterministic_kernels_run_every_operation_and_change_nothing_on_a_cpu(
        mini, tmp_path, whole):
    try:
        unlearn.main(flags(mini, out=tmp_path / "a", deterministic=True, **LONG))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(whole, tmp_path / "a")
