"""The GPU path on a machine without a GPU: pytest tests/test_gpu.py.

Fake CUDA tensors (tests/fakecuda.py) know their device and refuse to meet another one; they have no
values. Whoever has a GPU runs tests/gpu.py too.
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch
from conftest import ROOT, demo_tokenizer, flags, log_of, run_script, tiny_llama

import model as models
import unlearn

TORCH = Path(torch.__file__).parent
ONE_WAIT = r"unlearn\.py:\d+ train: the host waits for the device \(tolist\)"
FAULTS = {  # name: file, line, what replaces a part of it, the case that is to find it, its words
    "a mask on the CPU": (
        "model.py", "at = torch.arange(len(ids), device=device)", "at = torch.arange(len(ids))",
        "several examples a row", r"model\.py:\d+ collate: .*devices"),
    "a second wait in the loop": (
        "unlearn.py", "totals[kind] += loss.detach()", "totals[kind] += loss.item()",
        "bf16", r"unlearn\.py:\d+ train: the host waits for the device \(item or bool\)"),
    "a reference on the CPU": (
        "unlearn.py", "example.ref_logps = logps.to(proc.device)", "example.ref_logps = logps",
        "npo with kl", r"losses\.py:\d+ npo: .*devices"),
}


def build_guard(folder):
    """The compiled tests/fake_cuda.cpp; skips where there can be none."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("torch is built for a GPU, and fake CUDA needs the CPU build")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("fake CUDA needs Linux and a C++ compiler (c++, g++ or clang++)")
    guard = folder / "fake_cuda.so"
    command = [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{TORCH / 'include'}",
               str(ROOT / "tests" / "fake_cuda.cpp"), f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu",
               f"-Wl,-rpath,{TORCH / 'lib'}", "-o", str(guard)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[0]
        pytest.skip(f"fake CUDA does not compile against torch {torch.__version__}: {reason}")
    return guard


def plant(folder, file, line, replacement):
    """A copy of the project in which one line is another."""
    for path in (*ROOT.glob("*.py"), *(ROOT / "configs").iterdir()):
        if path.is_file():
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    text = (folder / file).read_text()
    assert text.count(line) == 1, f"{file} has no line to plant this fault in: {line}"
    (folder / file).write_text(text.replace(line, replacement))


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """{directory: {case: what was found}} of the project and of its copies with a fault."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    guard, jobs = build_guard(folder), [str(ROOT)]
    for name, (file, line, replacement, case, _) in FAULTS.items():
        plant(folder / name, file, line, replacement)
        jobs.append(f"{folder / name}={case}")
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "fakecuda.py"), str(guard)]
    done = subprocess.run([*command, *jobs], capture_output=True, text=True, timeout=300)
    found = {}
    for line in done.stdout.splitlines():
        row = json.loads(line)
        if "unfit" in row:
            pytest.skip(f"fake CUDA does not fit torch {torch.__version__}: {row['unfit']}")
        found.setdefault(Path(row["root"]).name, {})[row["case"]] = row
    if not found:
        pytest.skip(f"fake CUDA does not run on torch {torch.__version__}: {done.stderr[-300:]}")
    return found


@pytest.fixture(scope="module")
def cases(findings):
    return findings[ROOT.resolve().name]


def test_no_case_mixes_devices_and_all_were_run(cases):
    assert [row["error"] for row in cases.values() if row["error"]] == []
    for name in ("lora", "train_only", "checkpointing", "scoring", "generation", "sharded",
                 "sharded npo with kl", "sharded scoring", "sharded generation"):
        assert name in cases


def test_every_forget_and_every_retain_loss_is_among_them(cases):
    pairs = [name.split(" with ") for name in cases if re.fullmatch(r"\w+ with \w+", name)]
    forget, retain = zip(*pairs)
    assert {*forget} == {*unlearn.FORGET} and {*retain} == {*unlearn.RETAIN}


def test_a_step_waits_for_the_device_once(cases):
    """Whatever the loss, the rows and what is trained: to read the losses and the gradient norm."""
    for name, row in cases.items():
        if "scoring" in name or "generation" in name:
            continue
        assert sum(row["found"].values()) == 1, (name, row)
        assert re.fullmatch(ONE_WAIT, *row["found"]), (name, row)


@pytest.mark.parametrize("name", ["scoring", "sharded scoring"])
def test_scoring_waits_once_a_micro_batch(cases, name):
    """Four of them; each copies its values to the CPU."""
    (sentence, n), = cases[name]["found"].items()
    assert n == 4 and re.search(r"token_scores: .*a copy to the CPU", sentence)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(findings, name):
    *_, case, words = FAULTS[name]
    row = findings[name][case]
    sentences = [row["error"] or "", *row["found"]]
    assert any(re.search(words, sentence) for sentence in sentences), row


def test_a_section_of_the_gpu_page_that_fails_leaves_its_error_and_the_others_go_on(
        tmp_path, monkeypatch, capsys):
    def broken(a, sizes, proc):
        """Broken."""
        raise RuntimeError("out of\nluck")

    monkeypatch.setitem(gpu.SECTIONS, "memory", broken)
    gpu.main(["--small", "--device=cpu", "--only=memory,versions", f"--out={tmp_path / 'page'}"])
    page = (tmp_path / "page").read_text()
    assert "## Broken.\n\n**failed**: RuntimeError: out of luck\n" in page
    assert f"torch {torch.__version__}" in page and page.strip() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["--device=cpu", "--only=no_such_section"])


# ------------------------------------------------------------------------------------------------
# what the 7B configs set: fsdp, in bfloat16


@pytest.mark.parametrize("dtype, of_losses, of_norms", [("fp32", 1e-6, 2e-5), ("bf16", 5e-4, 1e-2)])
def test_two_sharded_processes_take_one_processs_steps_to_the_rounding_of_their_dtype(
        mini, tmp_path, dtype, of_losses, of_norms):
    """In bf16 alone keeps weights and residual stream in fp32; sharded has both in bfloat16."""
    tokenizer = demo_tokenizer()
    (tmp_path / "tiny").mkdir()
    models.save_model(tiny_llama(tokenizer), tokenizer, str(tmp_path / "tiny"))
    run = dict(model=tmp_path / "tiny", dtype=dtype, steps=8, lr=1e-3)
    unlearn.main(flags(mini, out=tmp_path / "one", **run))
    done = run_script("unlearn.py", flags(mini, out=tmp_path / "two", parallel="fsdp", **run), 2)
    if done.returncode and "not supported" in done.stderr and torch.__version__ < "2.8":
        pytest.skip(f"torch {torch.__version__}: its gloo does not reduce-scatter on a CPU")
    assert done.returncode == 0, done.stderr
    for row, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for key in ("loss", "forget_loss", "retain_loss"):
            assert other[key] == pytest.approx(row[key], rel=of_losses), (key, row["step"])
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=of_norms), row["step"]
