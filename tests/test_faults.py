"""Nothing lost, nothing silent: pytest tests/test_faults.py. Runs are killed, files damaged, disks full; then they go on, or say why not."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, flags, log_of

import configs
import model as models
import unlearn
from configs import Failure, Mistake

KEYS = ("step", "epoch", "lr", "loss", "forget_loss", "retain_loss", "grad_norm")


def weights(out):
    return models.load_model(str(out), models.Process(0, 1, torch.device("cpu"))).state_dict()


def assert_same_run(a, b):
    assert [[r[k] for k in KEYS] for r in log_of(a)] == [[r[k] for k in KEYS] for r in log_of(b)]
    assert log_of(a, scored=True) == log_of(b, scored=True)
    assert (a / "scores.json").read_text() == (b / "scores.json").read_text()
    left, right = weights(a), weights(b)
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert not any((b / name).exists() for name in configs.CHECKPOINTS)


LONG = dict(forget_loss="npo", steps=40, save_every=1, eval_every=5)


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("faults") / "whole"
    unlearn.main(flags(mini, out=out, **LONG))
    return out


@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_killed_run_goes_on_to_the_very_same_end(mini, tmp_path, whole, number, status):
    out = tmp_path / "killed"
    run = subprocess.Popen([sys.executable, str(ROOT / "unlearn.py"), *flags(mini, out=out, **LONG)], stderr=subprocess.PIPE, text=True)
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < 9:
        time.sleep(0.01)
        assert run.poll() is None, run.stderr.read()
    os.kill(run.pid, number)
    said = run.communicate()[1]
    assert run.returncode == status
    if number == signal.SIGTERM:
        assert "--resume=True goes on" in said and "Traceback" not in said
    assert (out / "checkpoint" / "state.pt").exists() and not (out / "model.safetensors").exists()
    with pytest.raises(Mistake, match="unfinished; --resume=True"):
        unlearn.main(flags(mini, out=out, **LONG))
    unlearn.main(flags(mini, out=out, resume=True, **LONG))
    assert_same_run(whole, out)


def stopped_half_way(mini, out, monkeypatch, **more):
    """A run with a checkpoint of step 3 that was then cut off."""
    real = models.checkpoint

    def save_once(*args):
        real(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(models, "checkpoint", save_once)
    with pytest.raises(KeyboardInterrupt):
        unlearn.main(flags(mini, out=out, steps=6, save_every=1, **more))
    monkeypatch.undo()


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


def test_a_full_disk_leaves_the_checkpoint_before(mini, tmp_path, monkeypatch):
    """The second checkpoint does not fit (torch.save fails as on a full disk); the first one still resumes."""
    saved, real = [], torch.save

    def save(state, f):
        saved.append(1)
        if len(saved) > 1:
            f.write(b"half a file")
            raise OSError(28, "No space left on device")
        real(state, f)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(Failure, match="checkpoint of step 6 could not be written .*No space left"):
        unlearn.main(flags(mini, out=tmp_path / "a", steps=9, save_every=1))
    monkeypatch.undo()
    assert not (tmp_path / "a" / "checkpoint.new").exists()
    unlearn.main(flags(mini, out=tmp_path / "a", steps=9, save_every=1, resume=True))
    assert [r["step"] for r in log_of(tmp_path / "a")] == list(range(1, 10))


def test_an_out_that_cannot_be_written_is_a_sentence(mini, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Mistake, match="cannot be written"):
        unlearn.main(flags(mini, out=tmp_path / "file" / "run"))
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(Mistake, match="holds config.json, and no run.json of a run of this project"):
        unlearn.main(flags(mini, out=folder))


def test_resume_without_a_checkpoint_begins(mini, tmp_path):
    unlearn.main(flags(mini, out=tmp_path / "a", resume=True))
    assert [r["step"] for r in log_of(tmp_path / "a")] == [1, 2, 3, 4]
