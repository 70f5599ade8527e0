"""Nothing lost, nothing silent: pytest tests/test_faults.py.

Runs are killed, files damaged, disks full; then the runs resume, or say why not.
"""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import faults
import numpy as np
import pytest
import torch
from conftest import PROC, ROOT, flags, log_of, stopped

import configs
import evaluate
import model as models
import unlearn
from configs import Failure, UsageError, rundir

KEYS = ("step", "epoch", "lr", "loss", "forget_loss", "retain_loss", "grad_norm")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="processes are found in /proc")


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


def test_a_second_ctrl_c_acts_at_once_and_the_handlers_are_restored(tmp_path):
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
    assert unlearn.to_be_made(c, "out/target")
    (target / "config.json").write_text("{}")
    assert not unlearn.to_be_made(c, "out/target")  # somebody's model
    for finished in (False, True):
        (target / "run.json").write_text(json.dumps({"finished": finished}))
        assert unlearn.to_be_made(c, "out/target") is not finished


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
    for out in (tmp_path / "file" / "run", "/proc/run"):  # nobody can write below /proc, not root
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
