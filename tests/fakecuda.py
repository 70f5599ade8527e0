"""The project's functions over fake CUDA tensors: what a GPU would refuse or wait for, without one.

    python tests/fakecuda.py GUARD.so ROOT [ROOT=case,case ...]

GUARD.so is tests/fake_cuda.cpp, compiled; a ROOT holds the project. A fake tensor has device, shape
and dtype, but no values. Prints {"root", "case", "error", "found"} per case: where two devices met
in one operation, and where the host would wait for the device in the case's last step or call, for
a value that is read, a copy to the CPU, an upload that is not both pinned and non_blocking. Not
seen: kernels, numbers, speed, DDP's reducer.
"""
import collections
import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import sys
import tempfile
import traceback


def a_process_for_each(jobs):
    """Each job goes on in a process of its own; this one waits for them, and ends."""
    for job in jobs:
        if os.fork() == 0:
            return job
    for _ in jobs:
        os.wait()
    os._exit(0)  # taking torch down in order takes seconds


ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch looks for CUDA

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # a dispatch mode imports it
import torch.cuda.amp.common  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

ROOT, _, NAMES = a_process_for_each(sys.argv[2:]).partition("=")
ROOT = os.path.realpath(ROOT)
sys.path.insert(0, ROOT)

import configs  # noqa: E402
import data  # noqa: E402
import model as models  # noqa: E402
import unlearn  # noqa: E402
from configs import rundir  # noqa: E402

GPU = torch.device("cuda:0")
WORLD = 8  # of the sharded cases, whose collectives do nothing
LLAMA = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)


# ------------------------------------------------------------------------------------------------
# what would wait

FOUND = collections.Counter()  # {sentence: how often}


def place_of(frames):
    """'file.py:line function' of the innermost frame that is the project's."""
    for frame in reversed(frames):
        folder = os.path.dirname(os.path.realpath(frame.filename))
        if folder in (ROOT, os.path.join(ROOT, "configs")):
            return f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}"
    return "outside the project"


def find(what):
    FOUND[f"{place_of(traceback.extract_stack())}: {what}"] += 1


def is_on_gpu(tensor):
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda"


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        some_on_gpu = any(map(is_on_gpu, tensors))
        if name in ("_local_scalar_dense", "is_nonzero"):
            if some_on_gpu:
                find("the host waits for the device (item or bool)")
            return tensors[0].dtype.is_floating_point or 1
        if name in ("nonzero", "masked_select", "_unique2", "equal") and some_on_gpu:
            find(f"the host waits for the device ({name})")
        if name in ("index", "index_put", "index_put_") and is_on_gpu(args[0]):
            for index in args[1]:
                if index is not None and index.dtype == torch.bool:
                    find("the host waits for the device (a mask as an index)")
                if index is not None and not is_on_gpu(index):
                    find("indexes a tensor on the GPU from the CPU")
        if name == "_to_copy" and tensors:
            to = torch.device(kwargs.get("device") or tensors[0].device)
            check_copy(tensors[0], to, kwargs.get("non_blocking"))
        if name == "copy_" and len(tensors) == 2:
            check_copy(tensors[1], tensors[0].device, len(args) > 2 and args[2])
        return func(*args, **kwargs)


def check_copy(source, to, non_blocking):
    if source.device.type == to.type:
        return
    if to.type == "cpu":
        find("the host waits for the device (a copy to the CPU)")
    elif not (non_blocking and getattr(source, "is_pinned_here", False)):
        find("the host waits for the device (an upload that is not pinned or not non_blocking)")


def tolist(self):
    if is_on_gpu(self):
        find("the host waits for the device (tolist)")
    return ones(self).tolist()


def numpy(self):
    if is_on_gpu(self):
        raise TypeError("a tensor on the GPU has no numpy()")
    return ones(self)


def ones(tensor):
    return np.ones(tuple(tensor.shape), float if tensor.dtype.is_floating_point else int)


def pin_memory(self):
    self.is_pinned_here = True
    return self


class Nothing:
    """A stream or an event: whatever is asked of it, there is nothing to wait for."""

    def __init__(self, *args, **options):
        pass

    def __getattr__(self, name):
        return Nothing

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def replace_cuda():
    """What only a CUDA build has, and what a fake tensor cannot answer."""
    FakeTensor.tolist, FakeTensor.numpy, FakeTensor.pin_memory = tolist, numpy, pin_memory
    FakeTensorMode.__deepcopy__ = lambda self, memo: self
    # transformers takes a fake tensor for tracing, and then leaves out checks of a real run
    transformers.masking_utils.is_tracing = lambda *args: False
    cuda = torch.cuda
    cuda.amp.common.amp_definitely_not_available = lambda: False
    cuda.is_bf16_supported = lambda *args, **options: True
    cuda.get_device_name = lambda *args: "fake"
    cuda.max_memory_allocated = lambda *args: 0
    cuda.mem_get_info = lambda *args: (80 * 10**9, 80 * 10**9)
    cuda.get_rng_state = lambda *args: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = cuda.set_device = cuda.synchronize = lambda *args: None
    cuda.current_device, cuda.device_count = lambda: 0, lambda: WORLD
    cuda.is_initialized = lambda: True
    cuda.Stream = cuda.Event = cuda.stream = cuda.current_stream = Nothing


@contextlib.contextmanager
def fake_gpu():
    FOUND.clear()
    with FakeTensorMode(allow_non_fake_inputs=False), Recorder():
        yield


def check_harness():
    """RuntimeError unless this torch lets the harness see what it is to see."""
    with fake_gpu():
        weight = torch.ones(2, 2, device=GPU, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            product = weight @ weight
        product.float().sum().backward()
        weight.grad.sum().item()
        torch.ones(2).to(GPU)
        with contextlib.suppress(RuntimeError):
            weight + torch.ones(2)
            raise LookupError("two devices in one sum were not refused")
    if FOUND.total() != 2 or product.dtype != torch.bfloat16 or not is_on_gpu(weight.grad):
        raise LookupError(f"two waits were to be found, found {FOUND}, {product.dtype}")


# ------------------------------------------------------------------------------------------------
# cases


def make_model(proc, row_limit=math.inf):
    with GPU:
        lm = LlamaForCausalLM(LLAMA)
    lm.to = lambda device: lm  # the fake collectives leave shards where they are
    lm = models.place(lm, proc)
    lm.row_limit = row_limit
    FOUND.clear()
    return lm


def make_groups(n_answers=1):
    groups = []
    for i in range(4):
        answers = [[5 + i + k, 6, 7 + k, 2] for k in range(n_answers)]
        groups.append([data.Example([3 + i, 4, *answer], 2) for answer in answers])
    return groups


class Run(rundir.RunDirectory):
    """Remembers what each step found."""

    def open_log(self, step):
        super().open_log(step)
        FOUND.clear()
        self.steps = []

    def log(self, row):
        super().log(row)
        self.steps.append(FOUND.copy())
        FOUND.clear()


def train(forget="simnpo", retain="nll", *, row_limit=math.inf, proc=None, **settings):
    """A step, or several; returns what the last one found."""
    proc = proc or models.Process(0, 1, GPU, settings.get("dtype", "fp32"))
    if forget == "task_vector":
        retain = "none"
    if forget == "altpo":
        settings["alternates"] = data.REFUSALS  # any file: the pairs are made here
    with tempfile.TemporaryDirectory() as out:
        c = configs.make(unlearn.Config, {
            "benchmark": "tofu", "template": "qa", "model": out, "out": out, "steps": 1,
            "forget_loss": forget, "retain_loss": retain, "batch_size": 2, "steering_layer": 0,
            "micro_batch_tokens": 12, "parallel": proc.parallel, "device": "cpu", **settings})
        n_answers = 2 if unlearn.FORGET[forget].answers == "both" else 1
        groups = {"forget": make_groups(n_answers), "retain": make_groups()}
        run = Run(c, proc)
        lm = make_model(proc, row_limit)
        unlearn.train(c, proc, lm, groups, run=run)
        after = unlearn.FORGET[forget].after
        if after:
            after(lm, c)
    return run.steps[-1]


def score(proc=None):
    """Four pairs of answers, one pair a row."""
    proc = proc or models.Process(0, 1, GPU, "bf16")
    models.token_scores(make_model(proc), make_groups(2), proc, 12)
    return FOUND.copy()


class Tokenizer:
    eos_token_id = 2

    def batch_decode(self, ids, **options):
        return ids


def generate(proc=None):
    """Three prompts, the first 20 ids the same, at most three new tokens."""
    proc = proc or models.Process(0, 1, GPU, "bf16")
    prompts = [[4] * 20 + [5] * n for n in (1, 2, 3)]
    models.generate(make_model(proc), Tokenizer(), prompts, 3, proc, 100)
    return FOUND.copy()


def shard():
    """Rank 0 of eight whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    mesh = models.init_device_mesh("cuda", (WORLD,))
    models.init_device_mesh = lambda *args: mesh
    models.Process.share = lambda self, batches: batches  # no one computes the others
    models.Process.gather = lambda self, item: [item] * self.world
    models.Process.barrier = lambda self: None
    return models.Process(0, WORLD, GPU, "bf16", "fsdp")


def cases():
    """{name: a function that returns what it found}."""
    several = {
        "one example a row": functools.partial(train, row_limit=0, steps=2),
        "several examples a row": functools.partial(train, steps=2),
        "bf16": functools.partial(train, dtype="bf16"),
        "pairs in two rows": functools.partial(train, "dpo", row_limit=0),
        "lora": functools.partial(train, lora_rank=2),
        "train_only": functools.partial(train, train_only="mlp"),
        "checkpointing": functools.partial(train, activation_checkpointing=True, dtype="bf16"),
        "scoring": score,
        "generation": generate,
    }
    retain_losses = itertools.cycle(unlearn.RETAIN)  # a step's two terms never meet
    for forget, retain in zip(unlearn.FORGET, retain_losses):
        several[f"{forget} with {retain}"] = functools.partial(train, forget, retain)
    proc = shard()
    several["sharded"] = functools.partial(train, proc=proc, dtype="bf16", steps=2)
    several["sharded npo with kl"] = functools.partial(
        train, "npo", "kl", proc=proc, dtype="bf16", activation_checkpointing=True)
    several["sharded scoring"] = functools.partial(score, proc)
    several["sharded generation"] = functools.partial(generate, proc)
    return several


def show(name, case):
    error, found = None, {}
    try:
        with fake_gpu():
            found = case()
    except Exception as e:
        message = str(e).splitlines()[0] if str(e) else type(e).__name__
        error = f"{place_of(traceback.extract_tb(e.__traceback__))}: {message}"
    print(json.dumps({"root": ROOT, "case": name, "error": error, "found": found}), flush=True)


def main():
    half = int(a_process_for_each("01"))  # of the cases
    replace_cuda()
    try:
        check_harness()
    except Exception as e:
        print(json.dumps({"unfit": f"{type(e).__name__}: {e}"}), flush=True)
        return
    models.load_model = lambda name, proc: make_model(proc)
    every = cases()
    names = NAMES.split(",") if NAMES else list(every)
    for name in names[half::2]:
        show(name, every[name])


if __name__ == "__main__":
    main()
    os._exit(0)
