"""Nothing lost, nothing silent: pytest tests/test_faults.py. Runs are killed, files damaged, disks full; then they go on, or say why not."""
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import faults
import numpy as np
import pytest
import torch
from conftest import ROOT, flags, log_of, stopped

import configs
import evaluate
import model as models
import unlearn
from configs import Failure, UsageError, rundir

KEYS = ("step", "epoch", "lr", "loss", "forget_loss", "retain_loss", "grad_norm")


def weights(out):
    return models.load_model(str(out), models.Process(0, 1, torch.device("cpu"))).state_dict()


def assert_same_run(a, b):
    assert [[r[k] for k in KEYS] for r in log_of(a)] == [[r[k] for k in KEYS] for r in log_of(b)]
    assert log_of(a, scored=True) == log_of(b, scored=True)
    assert (a / "scores.json").read_text() == (b / "scores.json").read_text()
    left, right = weights(a), weights(b)
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert not any((b / name).exists() for name in rundir.CHECKPOINTS)


LONG = dict(forget_loss="npo", steps=40, save_every=1, eval_every=5)


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("faults") / "whole"
    unlearn.main(flags(mini, out=out, **LONG))
    return out


def test_a_run_that_is_stopped_saves_and_goes_on_to_the_very_same_end(mini, tmp_path, whole):
    out = tmp_path / "stopped"
    run = subprocess.Popen([sys.executable, str(ROOT / "unlearn.py"), *flags(mini, out=out, **LONG)], stderr=subprocess.PIPE, text=True)
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < 9:
        time.sleep(0.01)
        assert run.poll() is None, run.stderr.read()
    os.kill(run.pid, signal.SIGTERM)
    said = run.communicate()[1]
    assert run.returncode == 143 and "--resume=True goes on" in said and "Traceback" not in said
    assert (out / "checkpoint" / "state.pt").exists() and not (out / "model.safetensors").exists()
    with pytest.raises(UsageError, match="unfinished; --resume=True"):
        unlearn.main(flags(mini, out=out, **LONG))
    unlearn.main(flags(mini, out=out, resume=True, **LONG))
    assert_same_run(whole, out)


def test_ctrl_c_finishes_the_step_saves_and_exits_with_130(mini, tmp_path, whole, monkeypatch):
    real = unlearn.check_finite

    def press_ctrl_c(step, *args):
        if step == 8:
            signal.raise_signal(signal.SIGINT)
        real(step, *args)
    monkeypatch.setattr(unlearn, "check_finite", press_ctrl_c)
    with pytest.raises(Failure, match="stopped after step . of 40 and saved; .*--resume=True goes on") as e:
        unlearn.main(flags(mini, out=tmp_path / "a", **LONG | {"save_every": 0}))
    assert e.value.status == 130
    monkeypatch.undo()
    unlearn.main(flags(mini, out=tmp_path / "a", resume=True, **LONG))
    assert_same_run(whole, tmp_path / "a")


def test_sigterm_outside_the_loop_is_a_sentence_too(capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as e:
            configs.run(lambda argv: signal.raise_signal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert e.value.code == 143 and "the same command says how to go on" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc")
def test_runs_killed_at_random_moments_of_making_unlearning_scoring_and_saving_end_as_if_nothing_had_happened():
    """python tests/faults.py kill does fifty, with one process and with two."""
    found = faults.kill(kills=2, seed=7)
    assert found["identical"] == found["kills"] == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc")
def test_a_run_of_two_processes_that_was_killed_goes_on_with_one(mini, tmp_path, whole):
    out = tmp_path / "killed"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "unlearn.py")]
    run = subprocess.Popen([*start, *flags(mini, out=out, **LONG)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint").exists():
        time.sleep(0.01)
        assert run.poll() is None
    for pid in faults.offspring(run.pid):
        os.kill(pid, signal.SIGKILL)
    run.wait()
    unlearn.main(flags(mini, out=out, resume=True, **LONG))
    assert json.loads((out / "run.json").read_text())["processes"] == 1
    assert [r["step"] for r in log_of(out)] == list(range(1, 41))
    for a, b in zip(log_of(out), log_of(whole)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    left, right = weights(out), weights(whole)
    for k in left:
        assert torch.allclose(left[k], right[k], rtol=1e-4, atol=1e-6)


ONE_RANK_FAILS = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import configs, unlearn
real = unlearn.check_finite
def check_finite(step, *args):
    if os.environ["RANK"] == "1" and step == 6:
        raise MemoryError("no memory left on this rank.")
    real(step, *args)
unlearn.check_finite = check_finite
configs.run(unlearn.main)
"""


def test_one_rank_that_fails_stops_all_within_a_minute_with_its_own_sentence(mini, tmp_path):
    (tmp_path / "unlearn.py").write_text(ONE_RANK_FAILS)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "unlearn.py"),
                           str(ROOT), *flags(mini, out=tmp_path / "a", save_every=1, steps=30)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and time.monotonic() - began < 60
    ours, report = done.stderr.split("ChildFailedError")[0].split("unlearn.py (rank 1): out of memory (no memory left on this rank.)")
    assert "Traceback" not in ours and "closed by peer" not in ours + report  # the ranks it took down stay silent


def stopped_half_way(mini, out, monkeypatch, **more):
    """A run with a checkpoint of step 3 that was then cut off."""
    stopped(flags(mini, out=out, **{"steps": 6, "save_every": 1} | more), monkeypatch)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_checkpoint_is_refused_by_name(mini, tmp_path, monkeypatch, damage):
    stopped_half_way(mini, tmp_path / "a", monkeypatch)
    path = tmp_path / "a" / "checkpoint" / "state.pt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw if damage == "flip" else raw[:len(raw) // 2])
    with pytest.raises(Failure, match="checkpoint/state.pt: damaged, its checksum differs"):
        unlearn.main(flags(mini, out=tmp_path / "a", steps=6, save_every=1, resume=True))


def test_a_kill_between_two_renames_loses_nothing(mini, tmp_path, monkeypatch):
    unlearn.main(flags(mini, out=tmp_path / "whole", steps=6, save_every=1))
    stopped_half_way(mini, tmp_path / "a", monkeypatch)
    os.rename(tmp_path / "a" / "checkpoint", tmp_path / "a" / "checkpoint.old")
    unlearn.main(flags(mini, out=tmp_path / "a", steps=6, save_every=1, resume=True))
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "a")
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_a_save_that_a_kill_cut_off_is_no_damage(mini, tmp_path, whole):
    """The very first checkpoint was being written: there is nothing to go on from, and the run begins."""
    out = tmp_path / "a"
    unlearn.main(flags(mini, out=out, **LONG))
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({k: v for k, v in run.items() if k not in ("finished", "sha256")}))
    (out / "checkpoint.new").mkdir()
    (out / "checkpoint.new" / "state.pt").write_bytes(b"half a file")
    unlearn.main(flags(mini, out=out, resume=True, **LONG))
    assert_same_run(whole, out)


@contextlib.contextmanager
def no_file_above(n):
    """A limit that the system keeps: writing past it fails, in Python, PyTorch and safetensors alike."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_and_no_part_of_a_model(mini, tmp_path, whole, monkeypatch):
    out = tmp_path / "a"
    stopped_half_way(mini, out, monkeypatch, **LONG)
    size = (out / "checkpoint" / "state.pt").stat().st_size
    with no_file_above(size // 2), pytest.raises(Failure, match="checkpoint of step 6 could not be written .*File too large.*before is untouched"):
        unlearn.main(flags(mini, out=out, resume=True, **LONG))
    assert not (out / "checkpoint.new").exists() and (out / "checkpoint" / "state.pt").stat().st_size == size
    unlearn.main(flags(mini, out=out, resume=True, **LONG))
    assert_same_run(whole, out)
    with no_file_above(100_000), pytest.raises(Failure, match="the model could not be written .*File too large"):
        unlearn.main(flags(mini, out=tmp_path / "b"))
    assert not (tmp_path / "b" / "model.safetensors").exists() and not (tmp_path / "b" / ".saving").exists()
    unlearn.main(flags(mini, out=tmp_path / "b", resume=True))


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_model_of_a_finished_run_is_refused_by_name(mini, tmp_path, damage):
    unlearn.main(flags(mini, out=tmp_path / "a"))
    path = tmp_path / "a" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw if damage == "flip" else raw[:-9])
    with pytest.raises(Failure, match="a/model.safetensors: damaged or changed, its checksum is not the one in run.json"):
        evaluate.main([str(tmp_path / "a"), f"--out={tmp_path / 'b'}"])


def test_a_line_that_a_kill_cut_off_is_dropped_and_a_log_that_lacks_steps_is_refused(mini, tmp_path, monkeypatch):
    out = tmp_path / "a"
    stopped_half_way(mini, out, monkeypatch)
    log = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text("".join(log.splitlines(True)[1:]))
    with pytest.raises(Failure, match="log.jsonl: damaged, it lacks steps up to the checkpoint's, 3"):
        unlearn.main(flags(mini, out=out, steps=6, save_every=1, resume=True))
    (out / "log.jsonl").write_text(log + '{"step": 4, "epo')
    unlearn.main(flags(mini, out=out, steps=6, save_every=1, resume=True))
    assert [r["step"] for r in log_of(out)] == [1, 2, 3, 4, 5, 6]


def test_what_another_run_left_is_gone_even_if_the_kill_came_before_it_was_removed(mini, tmp_path, monkeypatch):
    """run.json says what the directory holds: files of the run before must not pass for this one's, nor its checkpoint."""
    out = tmp_path / "a"
    stopped_half_way(mini, out, monkeypatch, lr=2e-3)
    (out / "scores.json").write_text("{}")
    (out / "epoch_9").mkdir()

    def cut_off(out):
        raise KeyboardInterrupt
    monkeypatch.setattr(rundir, "results", cut_off)
    with pytest.raises(KeyboardInterrupt):
        unlearn.main(flags(mini, out=out, overwrite=True))
    monkeypatch.undo()
    unlearn.main(flags(mini, out=out, resume=True))
    assert log_of(out)[0]["lr"] == 1e-3 and not (out / "scores.json").exists() and not (out / "epoch_9").exists()


def test_a_kill_after_the_last_mark_leaves_no_checkpoint_for_good(mini, tmp_path):
    unlearn.main(flags(mini, out=tmp_path / "a"))
    (tmp_path / "a" / "checkpoint").mkdir()
    unlearn.main(flags(mini, out=tmp_path / "a"))
    assert not (tmp_path / "a" / "checkpoint").exists()


def test_the_target_of_a_run_that_was_killed_is_taken_only_when_it_is_finished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c = configs.make(unlearn.Config, {"base_model": "tiny"})
    (tmp_path / "out" / "target").mkdir(parents=True)
    assert unlearn.to_be_made(c, "out/target")
    (tmp_path / "out" / "target" / "config.json").write_text("{}")
    assert not unlearn.to_be_made(c, "out/target")  # somebody's model
    for finished in (False, True):
        (tmp_path / "out" / "target" / "run.json").write_text(json.dumps({"finished": finished}))
        assert unlearn.to_be_made(c, "out/target") is not finished


def test_scores_never_go_into_the_directory_of_another_run(mini, tmp_path):
    unlearn.main(flags(mini, out=tmp_path / "a"))
    with pytest.raises(UsageError, match="its scores would go to .*a, which holds a run"):
        evaluate.main([str(mini / "target"), f"--out={tmp_path / 'a'}", "--benchmark=tofu", f"--retain_model={mini / 'retain'}", "--template=qa"])
    assert not (tmp_path / "a" / "scores.json").exists()


def test_a_model_that_broke_down_scores_nothing_or_is_a_failure_never_nan():
    records = [{"set": name, "index": 0, "nll": 2e3, "paraphrased_nll": 2e3, "perturbed_nll": [2e3, 1.0], "rougeL_recall": 0.0}
               for name in ("forget", "retain", "real_authors", "world_facts")]
    c = configs.make(evaluate.Config, {"benchmark": "tofu"})
    scores = evaluate.summarize(records, None, c)
    assert scores["model_utility"] == 0 and scores["real_authors_prob"] == scores["retain_prob"] == 0
    with np.errstate(all="ignore"), pytest.raises(Failure, match="not finite .*forget_prob nan, .*broken down; lower --lr"):
        evaluate.summarize([r | {"nll": float("nan")} for r in records], None, c)


def test_nonsense_in_files_and_settings_is_scored_to_finite_numbers_or_refused_in_a_sentence():
    """python tests/faults.py nonsense does two thousand."""
    said = []
    found = faults.nonsense(cases=150, say=lambda *words: said.append(words))
    assert not said and found["tracebacks"] == 0
    assert min(sum(found["accepted"].values()), sum(found["refused"].values())) > 20  # it asks both ways


def test_deterministic_kernels_run_every_operation_and_change_nothing_on_a_cpu(mini, tmp_path, whole):
    try:
        unlearn.main(flags(mini, out=tmp_path / "a", deterministic=True, **LONG))
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(whole, tmp_path / "a")


def test_an_out_that_cannot_be_written_is_a_sentence_before_any_model_is_loaded(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", "/proc/run"):  # what is below /proc nobody can write, root neither
        with pytest.raises(UsageError, match="cannot be written"):
            unlearn.main(flags(mini, out=out))
        with pytest.raises(UsageError, match="cannot be written"):
            evaluate.main([str(mini / "target"), f"--retain_model={mini / 'retain'}", "--benchmark=tofu", f"--out={out}"])
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds config.json, and no run.json of a run of this project"):
        unlearn.main(flags(mini, out=folder))


def test_resume_without_a_checkpoint_begins(mini, tmp_path):
    unlearn.main(flags(mini, out=tmp_path / "a", resume=True))
    assert [r["step"] for r in log_of(tmp_path / "a")] == [1, 2, 3, 4]
