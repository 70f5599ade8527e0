"""Models and machines: load, score answer tokens, generate, save; no method, no benchmark.

    proc = setup("auto")                           # this process among its peers
    lm = load_model("org/name@revision", proc)
    tokenizer = load_tokenizer("org/name@revision")
    scores = score(lm, groups, proc.device)        # one forward, with gradient: what a loss reads
    values = token_scores(lm, groups, proc, 1024)  # log p of each answer token, without gradient
    texts = generate(lm, tokenizer, prompts, 200, proc, 4096)
"""
import contextlib
import dataclasses
import datetime
import functools
import inspect
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from typing import Literal

import safetensors
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.checkpoint import state_dict as sharded_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers.utils import find_adapter_config_file, is_peft_available

import configs
import data
import losses
from configs import Failure, UsageError, rundir

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
# Without a mask transformers looks for packed rows, which reads the device in every forward.
# We pass a mask where a row holds several examples.
transformers.masking_utils.find_packed_sequence_indices = lambda position_ids: None


# ------------------------------------------------------------------------------------------------
# processes


@dataclasses.dataclass(frozen=True)
class Machine(configs.Settings):
    """machine"""
    changes_result = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    micro_batch_tokens: int = 512  # tokens a process computes at once: memory, never the result
    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp: every GPU holds its shard of the model only

    def problems(self):
        yield from self.check("micro_batch_tokens", lambda n: n >= 1, "must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Precision(configs.Settings):
    """precision"""
    dtype: Literal["fp32", "bf16", "bf16_weights"] = "fp32"  # bf16 = autocast over fp32 weights
    deterministic: bool = False  # CUDA: slower kernels that give the same bits each time


@dataclasses.dataclass(frozen=True)
class Process:
    """One of `world` processes that run the same program; rank 0 prints and writes."""
    rank: int
    world: int
    device: torch.device
    dtype: str = "fp32"  # bf16: matrix products in bfloat16 by autocast; bf16_weights: everything
    parallel: str = "ddp"  # fsdp: weights, gradients and optimizer state are sharded
    clock: rundir.Clock = dataclasses.field(default_factory=rundir.Clock, compare=False)

    @property
    def sharded(self) -> bool:
        """FSDP forwards are collective: every rank must run the same number of them."""
        return self.parallel == "fsdp" and self.world > 1

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of weights, gradients and AdamW's state."""
        return torch.bfloat16 if self.dtype == "bf16_weights" else torch.float32

    @property
    def gpu(self) -> str | None:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    def autocast(self):
        if self.dtype != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def gather(self, item) -> list:
        """[the item of rank 0, of rank 1, ...], on every rank."""
        if self.world == 1:
            return [item]
        items = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def merge(self, found: dict) -> dict:
        """The ranks' dicts in one. With FSDP two ranks may have computed the same batch."""
        merged = {}
        for some in self.gather(found):
            merged |= some
        return merged

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, batches: list) -> list:
        """This rank's batches. With FSDP all ranks get equally many: some are computed twice."""
        n = len(batches)
        if self.sharded:
            n = math.ceil(n / self.world) * self.world
        return [batches[i % len(batches)] for i in range(self.rank, n, self.world)]

    def progress(self, items, title: str | None, **options):
        """A progress bar on rank 0; where stderr is no terminal, lines."""
        file = sys.stderr if sys.stderr.isatty() else io.StringIO()
        hidden = self.rank > 0 or not title
        return rundir.Progress(
            items, title, file=file, disable=hidden, **{"leave": False} | options)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()  # in the order of what goes to stderr, in a file too


def setup(device="auto", dtype="fp32", parallel="ddp", threads: int | None = None,
          deterministic=False) -> Process:
    """Join the processes that torchrun started; alone without it.

    threads: of the CPU; a tiny model runs faster, and the same everywhere, on one.
    deterministic: PyTorch's deterministic kernels only, so that a run on CUDA can be repeated and
    resumed bit for bit (same GPU model and versions). An operation without one raises.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name in available if available[name])
    if not available[device]:
        raise UsageError(f"--device={device}: no such device is visible here; "
                         "use --device=cpu or --device=auto.")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"--nproc_per_node is larger than the {torch.cuda.device_count()} "
                             "GPUs of this machine; start one process per GPU.")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
    elif threads:
        torch.set_num_threads(threads)
    device = torch.device(device)
    if world > 1 and not dist.is_initialized():
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=datetime.timedelta(hours=2),  # ranks wait while rank 0 writes a 7B model
            device_id=device if on_gpu else None)
    return Process(rank, world, device, dtype, parallel)


def cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# loading and saving


NOT_GIVEN = ("{}: is not on this machine and the hub did not give it ({}); check the id, the "
             "network and HF_HUB_OFFLINE, accept a gated model's terms and run `hf auth login`, or "
             "name a local directory.")


def from_pretrained(auto, name, **options):
    repo, revision = configs.split_revision(name)
    try:
        return auto.from_pretrained(repo, revision=revision, trust_remote_code=False, **options)
    except Exception as e:  # transformers raises many kinds; each is one sentence here
        reason = f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0]}"
        if "model.safetensors" in reason:
            raise UsageError(
                f"{name}: has no model.safetensors. Pickled weights (.bin) can run code and are "
                "not read; if you trust them, convert them once: AutoModelForCausalLM."
                "from_pretrained(...).save_pretrained(DIR), its AutoTokenizer too.") from None
        if os.path.isdir(repo):
            raise UsageError(f"{name}: cannot be loaded ({reason}).") from None
        raise UsageError(NOT_GIVEN.format(name, reason)) from None


def without_weights(name: str):
    """A model of shapes only."""
    with torch.device("meta"):  # tensors without storage
        return transformers.AutoModelForCausalLM.from_config(load_config(name))


def load_config(name: str):
    return from_pretrained(transformers.AutoConfig, base_name(name))


def base_name(name: str) -> str:
    """The whole model that `name` stands for: of a PEFT adapter its base; else the model itself.

    An adapter beside a whole model, in one directory, belongs to that model.
    """
    repo, revision = configs.split_revision(name)
    path = find_adapter_config_file(repo, revision=revision)
    if path is None:
        return name
    if not is_peft_available():
        raise UsageError(f"{name}: is a PEFT adapter; pip install peft, and it is merged into its "
                         "base here, or merge it yourself and name the whole model.")
    is_whole = os.path.isfile(os.path.join(repo, "config.json"))
    return name if is_whole else rundir.read_json(path)["base_model_name_or_path"]


def merge_adapter(lm):
    """Add a PEFT adapter, which transformers has put into the model, to the weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    for name, layer in list(lm.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            lm.set_submodule(name, layer.get_base_layer())
    lm._hf_peft_config_loaded = False


def load_tokenizer(name: str):
    """Without files transformers raises, or makes one of special tokens only (Phi, Qwen, GPT-2)."""
    tokenizer = None
    try:
        tokenizer = from_pretrained(transformers.AutoTokenizer, name)
    except UsageError as e:
        if "tiktoken" in str(e) or os.path.isfile(os.path.join(name, "tokenizer.model")):
            raise UsageError(f"{name}: has a sentencepiece tokenizer and no tokenizer.json: pip "
                             "install sentencepiece protobuf, and it is converted.") from None
        if "instantiate the backend tokenizer" not in str(e) and "Can't load tok" not in str(e):
            raise
    if not tokenizer or not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise UsageError(f"{name}: has no tokenizer; give --tokenizer=, the one it was trained "
                         "with (Llama-2 chat: --tokenizer=NousResearch/Llama-2-7b-chat-hf).")
    return tokenizer


def load_model(name: str, proc: Process):
    """A causal language model, without dropout.

    Safetensors only, and no code of the repository is run. `lm.row_limit`: see row_limit().
    """
    auto = transformers.AutoModelForCausalLM
    with proc.clock.phase("loading"):
        config = load_config(name)
        if proc.rank == 0:
            rundir.check_digests(name)
        # ranks take turns: each has the whole model in CPU memory before it is on its GPU
        limit = None
        for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", 1))):
            if turn == int(os.environ.get("LOCAL_RANK", 0)):
                lm = from_pretrained(auto, name, dtype=proc.weight_dtype, use_safetensors=True)
                if getattr(lm, "_hf_peft_config_loaded", False):
                    merge_adapter(lm)
                if proc.rank == 0:  # before it is sharded: a failed forward would break FSDP
                    limit = row_limit(lm)
                lm = place(lm, proc)
            proc.barrier()
        lm.row_limit = proc.gather(limit)[0]
        if proc.weight_dtype == torch.float32:
            lm.source_dtype = config.get_text_config().dtype or torch.float32
    if lm.row_limit == 0:
        proc.say(f"{name}: its attention takes no mask, so micro-batches are one example per "
                 "forward")
    return lm


def place(lm, proc):
    """Move a model to its device; with FSDP each rank keeps its shard of every decoder layer."""
    remove_dropout(lm)
    for parameter in lm.parameters():  # lm.to(dtype) would round the rotary frequencies too
        parameter.data = parameter.data.to(proc.weight_dtype)
    if proc.sharded:
        policy = MixedPrecisionPolicy()
        if proc.dtype == "bf16":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        mesh = init_device_mesh(proc.device.type, (proc.world,))
        decoder = lm.get_decoder()
        layers = decoder.layers if hasattr(decoder, "layers") else decoder.h
        for module in [*layers, lm]:  # moved to the device one by one
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return lm.to(proc.device).eval()


@contextlib.contextmanager
def forward_only(lm, proc, gather=False):
    """FSDP keeps its root's weights gathered for a backward: release them where none follows.

    gather: keep all weights gathered from one forward (of a token) to the next, where they fit.
    """
    shards = [module for module in lm.modules() if isinstance(module, FSDPModule)]
    gather = gather and hasattr(lm, "set_reshard_after_forward")  # FSDP's, not in torch 2.6
    if gather:
        whole_gb = lm.num_parameters() * (4 if proc.dtype == "fp32" else 2) / 1e9
        gather = 2.5 * whole_gb <= min(proc.gather(capacity_gb(proc)))
    if gather:
        lm.set_reshard_after_forward(False)
    yield
    if gather:
        lm.set_reshard_after_forward(True)
        lm.set_reshard_after_forward(False, recurse=False)  # the root, as it was
    for module in shards:
        module.reshard()


def remove_dropout(lm):
    """Unlearning trains without dropout, in train() mode too (activation checkpointing)."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def has_weights(name: str) -> bool:
    """False for a directory of a config and a tokenizer, such as configs/tiny_llama."""
    repo, _ = configs.split_revision(name)
    return not os.path.isdir(repo) or any(
        file.endswith((".safetensors", ".bin")) for file in os.listdir(repo))


def random_model(name: str, proc: Process, seed: int):
    """A model of random weights, the same on every process, from a directory's config."""
    config = from_pretrained(transformers.AutoConfig, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = transformers.AutoModelForCausalLM.from_config(config)
        if config.model_type == "gpt2":
            # as SimNPO's Markov chains have it, PyTorch's own: standard normal. With GPT-2's, 0.02,
            # a step of lr 5e-4 is several times as long, and damage comes in leaps.
            lm.transformer.wte.reset_parameters()
            lm.transformer.wpe.reset_parameters()
    lm.row_limit = row_limit(lm)
    return place(lm, proc)


WHOLE = sharded_state.StateDictOptions(full_state_dict=True, cpu_offload=True)  # rank 0 gets it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def save_model(lm, tokenizer, out: str, proc: Process | None = None,
               dtype: str | None = None):
    """Write weights, config and tokenizer into `out`; a file gets its name only when complete.

    dtype: fp32, bf16 or fp16; None = that of the model's source. All ranks call it, rank 0 writes.
    """
    if proc and proc.sharded:
        state = sharded_state.get_model_state_dict(lm, options=WHOLE)
    else:
        state = merged_state(lm)
    if proc and proc.rank > 0:
        return
    saved = DTYPES[dtype] if dtype else getattr(lm, "source_dtype", lm.dtype)
    untied = {name for name, _ in [*lm.named_parameters(), *lm.named_buffers()]}
    for name in list(state):
        value = state.pop(name)
        if name in untied:  # tied weights are written once
            state[name] = value.to("cpu", saved) if value.is_floating_point() else value
    unfinished = os.path.join(out, ".saving")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        lm.save_pretrained(unfinished, state_dict=state)
        tokenizer.save_pretrained(unfinished)
        path = os.path.join(unfinished, "config.json")
        config = rundir.read_json(path) | {"dtype": str(saved).removeprefix("torch.")}
        rundir.write(path, json.dumps(config, indent=2) + "\n")
        # config.json last: it marks a whole model
        for name in sorted(os.listdir(unfinished), key=lambda name: name == "config.json"):
            with open(os.path.join(unfinished, name), "rb+") as f:
                os.fsync(f.fileno())
            os.replace(os.path.join(unfinished, name), os.path.join(out, name))
    except (OSError, safetensors.SafetensorError) as e:  # the latter names a full disk in its text
        reason = getattr(e, "strerror", None) or e
        raise Failure(f"{out}: the model could not be written ({reason}).") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def fingerprint(name: str) -> str:
    """What identifies a model: hashes of a directory's files, or the hub's commit."""
    if not os.path.isdir(name):
        repo, revision = configs.split_revision(name)
        try:
            path = transformers.utils.hub.cached_file(repo, "config.json", revision=revision)
        except OSError as e:
            raise UsageError(NOT_GIVEN.format(name, str(e).splitlines()[0])) from None
        return os.path.basename(os.path.dirname(path))
    files = r".*\.safetensors|(generation_|adapter_)?config\.json|(tokenizer|chat_template).*"
    names = [file for file in sorted(os.listdir(name)) if re.fullmatch(files, file)]
    return " ".join(rundir.file_digest(os.path.join(name, file)) for file in names)


def save_checkpoint(run: rundir.RunDirectory, lm, optimizer, scheduler, step: int):
    """Everything needed to resume. The previous checkpoint stays until this one is on disk."""
    with run.proc.clock.phase("saving"):
        lm_state, optimizer_state = sharded_state.get_state_dict(lm, optimizer, options=WHOLE)
        state = {"step": step, "model": lm_state, "optimizer": optimizer_state,
                 "scheduler": scheduler.state_dict()}
        run.save_checkpoint(step, lambda file: torch.save(state, file))


def restore(run: rundir.RunDirectory, lm, optimizer, scheduler) -> int:
    """Load the checkpoint and return its step; 0 without one."""
    path = run.find_checkpoint()
    if path is None:
        return 0
    # mmap: a rank reads its own shard only
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    sharded_state.set_state_dict(
        lm, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        options=WHOLE)
    scheduler.load_state_dict(state["scheduler"])
    return state["step"]


# ------------------------------------------------------------------------------------------------
# what is trained of a model


def add_lora(lm, rank, seed):
    """Freeze the model and train y = W x + 2 B A x on every linear layer but the output head.

    arXiv 2106.09685, alpha = 2 r; A is initialised as in peft, B = 0.
    """
    lm.requires_grad_(False)
    head = lm.get_output_embeddings()
    layers = [m for m in lm.modules() if isinstance(m, nn.Linear) and m is not head]
    if not layers:
        raise UsageError(f"--lora_rank={rank}: the model has no linear layers (torch.nn.Linear) "
                         "to adapt.")
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for layer in layers:
            A = layer.weight.new_empty(rank, layer.in_features)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            layer.lora_A = nn.Parameter(A)
            layer.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
            layer.register_forward_hook(add_low_rank)


def add_low_rank(layer, args, output):
    low_rank = nn.functional.linear(args[0], layer.lora_A)
    return output + 2 * nn.functional.linear(low_rank, layer.lora_B)


def merged_state(lm):
    """The state dict of a plain model: adapters are added to their weights."""
    state = lm.state_dict()
    for name, layer in lm.named_modules():
        if hasattr(layer, "lora_A"):
            A, B = state.pop(f"{name}.lora_A"), state.pop(f"{name}.lora_B")
            state[f"{name}.weight"] = layer.weight.detach() + 2 * B @ A
    return state


def train_only(lm, pattern):
    """Freeze all parameters but those whose names match the regular expression."""
    for name, parameter in lm.named_parameters():
        matches = parameter.requires_grad and re.search(pattern, name)
        parameter.requires_grad_(bool(matches))
    if not any(parameter.requires_grad for parameter in lm.parameters()):
        names = [name for name, _ in lm.named_parameters()][1:3]
        raise UsageError(f"--train_only={pattern}: no parameter's name matches; "
                         f"they look like {', '.join(names)}.")


def adapt(lm, c):
    """Choose what is trained: all of the model, adapters, or the parameters that are named."""
    if c.lora_rank:
        add_lora(lm, c.lora_rank, c.seed)
    if c.train_only:
        train_only(lm, c.train_only)


@torch.no_grad()
def negate(lm, start, scale):
    """Task vector (arXiv 2212.04089): weights = start - scale * (weights - start)."""
    original = load_model(start, Process(0, 1, lm.device))
    for p, q in zip(lm.parameters(), original.parameters(), strict=True):
        p.copy_(q - scale * (p - q))


# ------------------------------------------------------------------------------------------------
# scores at the answer tokens


@dataclasses.dataclass
class Scores:
    """What a loss may read of B answers with n tokens in all. ref: before unlearning."""
    logits: torch.Tensor  # (n, V), at the tokens that predict the answers; (0, V) with hidden
    labels: torch.Tensor  # (n,), the answers' tokens
    lengths: list[int]  # B numbers, they sum to n
    n_tokens: torch.Tensor  # (B,), the same numbers on the device
    hidden: torch.Tensor | None = None  # (n, D), a layer's output at the answer tokens
    ref_token_logps: torch.Tensor | None = None  # (n,)
    ref: "Scores | None" = None  # logits and hidden states of a frozen reference model

    @functools.cached_property
    def token_logps(self) -> torch.Tensor:
        return losses.token_logps(self.logits, self.labels)  # (n,)

    @functools.cached_property
    def logps(self) -> torch.Tensor:
        return self.sum_per_answer(self.token_logps)  # (B,)

    @functools.cached_property
    def ref_logps(self) -> torch.Tensor:
        return self.sum_per_answer(self.ref_token_logps)  # (B,)

    def sum_per_answer(self, values):
        # split, not scatter-add: the order of summation is fixed on a GPU too
        return torch.stack([answer.sum() for answer in values.split(self.lengths)])


def score(model, groups: list, device, layer: int | None = None, ref_model=None) -> Scores:
    """The Scores of the examples of `groups`: one forward of one flat row (see flat_row).

    The output head sees the answer tokens only. layer: return that decoder layer's output, and
    compute no logits. model may be wrapped by DDP.
    """
    lm = getattr(model, "module", model)
    examples = [example for group in groups for example in group]
    row, (before, answer), n_tokens, mask = collate(groups, examples, device, lm)
    if len(examples) > 1 and row.shape[-1] > lm.row_limit:
        return score_one_by_one(model, examples, device, layer, ref_model)

    output = model(
        input_ids=row[:1], position_ids=row[1:], attention_mask=mask, use_cache=False,
        output_hidden_states=layer is not None,
        logits_to_keep=before if layer is None else before[:0])
    lengths = [example.n_answer for example in examples]
    scores = Scores(output.logits[0], row[0, answer], lengths, n_tokens)
    if layer is not None:
        scores.hidden = output.hidden_states[layer + 1][0, answer]  # [0] are the embeddings
    if examples[0].ref_logps is not None:
        scores.ref_token_logps = torch.cat([example.ref_logps for example in examples])
    if ref_model is not None:
        with torch.no_grad():
            scores.ref = score(ref_model, groups, device, layer)
    return scores


def flat_row(groups: list[list[data.Example]]) -> tuple[list, list, list, list, list]:
    """Groups back to back in one row, without padding: a prompt, its answers, the next prompt, ...

    Returns lists (ids, positions, ends, before, answer). Token i attends to token j iff
    j <= i < ends[j]: a prompt's tokens are seen by all its answers, an answer's only by itself.
    answer: indices of the answer tokens of all examples in order; before: of the tokens before
    them, which predict them.
    """
    ids, positions, ends, before, answer = [], [], [], [], []
    for group in groups:
        shared = data.shared_prefix(group)
        first = len(ids)
        ids += group[0].ids[:shared]
        positions += range(shared)
        ends += [first + data.row_tokens(group)] * shared
        for example in group:
            own = len(ids)
            ids += example.ids[shared:]
            positions += range(shared, len(example.ids))
            ends += [len(ids)] * (len(ids) - own)
            indices = [*range(first, first + shared), *range(own, len(ids))]
            before += indices[example.start - 1:-1]
            answer += indices[example.start:]
    return ids, positions, ends, before, answer


def collate(groups, examples, device, lm):
    """(ids and positions (2, N), before and answer (2, n), n_tokens (B,), mask (1, 1, N, N))."""
    ids, positions, ends, before, answer = flat_row(groups)
    row = upload([ids, positions, ends], device)
    indices = upload([before, answer], device)
    n_tokens = upload([float(example.n_answer) for example in examples], device)
    mask = None  # one example: causal, which a GPU's flash kernel serves without a mask
    if len(examples) > 1:
        at = torch.arange(len(ids), device=device)
        mask = (at <= at[:, None]) & (at[:, None] < row[2])  # (N, N): i attends to j
        if lm.config._attn_implementation == "eager":  # adds its mask to the attention scores
            lowest = torch.finfo(lm.dtype).min
            mask = torch.zeros_like(mask, dtype=lm.dtype).masked_fill(~mask, lowest)
        mask = mask[None, None]
    return row[:2], indices, n_tokens, mask


def upload(values, device):
    """A list or tensor on the device, without waiting for the work that is queued there."""
    tensor = torch.as_tensor(values)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def score_one_by_one(model, examples, *options):
    """The Scores of several examples, each in a forward of its own."""
    several = [score(model, [[example]], *options) for example in examples]
    return join(several)


def join(several):
    joined = {"lengths": [length for scores in several for length in scores.lengths]}
    for name in ("logits", "labels", "n_tokens", "hidden", "ref_token_logps"):
        values = [getattr(scores, name) for scores in several]
        joined[name] = None if values[0] is None else torch.cat(values)
    if several[0].ref is not None:
        joined["ref"] = join([scores.ref for scores in several])
    return Scores(**joined)


@torch.no_grad()
def row_limit(lm) -> float:
    """The longest row in which this model can score several examples; 0 = one example per forward.

    Two short examples are scored alone and in one row. A model whose attention ignores our mask, or
    whose state crosses it, gives other logits. The mask knows no sliding window either, so a row
    may not be longer than that.
    """
    lm.eval()
    vocabulary = lm.get_input_embeddings().num_embeddings
    ids = [i % vocabulary for i in range(3, 15)]
    examples = [data.Example(ids[:5], 1), data.Example(ids[5:], 1)]
    device = lm.device
    lm.row_limit = 0
    alone = score_one_by_one(lm, examples, device).logits
    lm.row_limit = math.inf
    try:
        together = score(lm, [[example] for example in examples], device).logits
    except (ValueError, RuntimeError, TypeError):  # a model that takes no mask or no positions
        return 0
    # rounding only: of logits around 35 a fine-tuned SmolLM2 had an error of 0.008 in float32
    relative = 5e-3 if alone.dtype == torch.float32 else 0.05
    if (alone - together).abs().max() > max(1e-3, relative * alone.abs().max()):
        return 0
    config = lm.config.get_text_config()
    names = ("sliding_window", "window_size", "attention_chunk_size")
    windows = [getattr(config, name, None) for name in names]
    return min([window for window in windows if window], default=math.inf)


def positions(config) -> float:
    """How many tokens a model was made for."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def fit(c, config):
    """The settings with a max_length that the model has positions for."""
    n = positions(config)
    if c.max_length > n:
        data.note(f"max_length is lowered from {c.max_length} to {n}, the positions of the model")
    return dataclasses.replace(c, max_length=min(c.max_length, n))


def log_probs(logits, labels):
    return losses.token_logps(logits, labels)[:, None]  # (n, 1)


@torch.no_grad()
def token_scores(lm, groups: list, proc: Process, max_tokens: int, measure: Callable = log_probs,
                 title: str | None = None) -> list[list]:
    """[[array (T_i, k) per example] per group]: `measure` at each answer token, on every rank.

    measure(logits (n, V), labels (n,)) -> (n, k). Whole micro-batches are shared out to the ranks,
    so the values do not depend on the number of processes.
    """
    n = positions(lm.config)
    longest = max((len(e.ids) for group in groups for e in group), default=0)
    tables = {module.num_embeddings for module in lm.modules() if isinstance(module, nn.Embedding)}
    if longest > n and {n, n + 2} & tables:  # rotary positions have no table that ends
        raise UsageError(f"a text of {longest} tokens does not fit into the model's {n} positions; "
                         "shorten it.")
    rows = []  # (index of its group, examples): a group that exceeds the limit is scored in parts
    for i, group in enumerate(groups):
        fits = data.row_tokens(group) <= lm.row_limit
        rows += [(i, group)] if fits else [(i, [example]) for example in group]
    sizes = [data.row_tokens(examples) for _, examples in rows]
    mine = {}
    cuts = data.cut(sizes, min(max_tokens, lm.row_limit))
    with forward_only(lm, proc), proc.autocast():
        for indices in proc.progress(proc.share(cuts), title):
            scores = score(lm, [rows[k][1] for k in indices], proc.device)
            values = measure(scores.logits, scores.labels)
            arrays = iter(values.double().cpu().split(scores.lengths))
            for k in indices:
                mine[k] = [next(arrays).numpy() for _ in rows[k][1]]
    found = proc.merge(mine)
    per_group = [[] for _ in groups]
    for k, (i, _) in enumerate(rows):
        per_group[i] += found[k]
    return per_group


# ------------------------------------------------------------------------------------------------
# greedy answers


def stop_ids(lm, tokenizer) -> set[int]:
    """Every id that ends an answer: the tokenizer's EOS and those of the generation settings."""
    more = lm.generation_config.eos_token_id
    more = more if isinstance(more, list) else [more]
    return {tokenizer.eos_token_id, *more}


@torch.no_grad()
def generate(lm, tokenizer, prompts: list, max_new_tokens: int, proc: Process, max_tokens: int,
             title: str | None = None, known: list | None = None,
             end_id: int | None = None, choose: Callable | None = None) -> list[str]:
    """Greedy answers, as text, to prompts (lists of ids): batched, equal to one at a time.

    known: the ids that each answer is known to begin with; only the rest is computed. Whole batches
    are shared out to the ranks. end_id: ends an answer too, a chat template's end of turn.
    choose(logits (S, V), indices of their prompts) -> (S,): the next tokens, where they are not to
    be the likeliest.
    """
    stop = stop_ids(lm, tokenizer) | {end_id}
    n = positions(lm.config)
    limits = [max(0, min(max_new_tokens, n - len(prompt))) for prompt in prompts]
    n_less = sum(limit < max_new_tokens for limit in limits)
    if n_less:
        data.note(f"{n_less} greedy answers end before --max_new_tokens={max_new_tokens}, at the "
                  f"{n} positions of the model")
    answers, unfinished = [], []
    for i, (ids, limit) in enumerate(zip(known or [[]] * len(prompts), limits)):
        ids = end_at(ids[:limit], stop)
        answers.append(ids)
        if len(ids) < limit and not (ids and ids[-1] in stop):
            unfinished.append(i)
    sizes = [len(prompts[i]) + max_new_tokens for i in unfinished]
    mine = {}
    with proc.clock.phase("answering"), forward_only(lm, proc, gather=True):
        for batch in proc.progress(proc.share(data.cut(sizes, max_tokens)), title):
            indices = [unfinished[k] for k in batch]
            begun = [prompts[i] + answers[i] for i in indices]
            rest = [limits[i] - len(answers[i]) for i in indices]
            with proc.autocast():
                new = continue_prompts(lm, begun, rest, stop, proc, choose, indices)
            mine.update(zip(indices, new))
        for i, ids in proc.merge(mine).items():
            answers[i] = answers[i] + ids
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def end_at(ids, stop):
    """The ids up to and including the first stop id."""
    for n, token in enumerate(ids, 1):
        if token in stop:
            return ids[:n]
    return ids


def continue_prompts(lm, prompts, limits, stop, proc, choose=None, indices=()):
    """Greedy ids for each prompt: at most its limit, up to and including the first id in `stop`.

    Padding stands before them and is masked. Finished prompts leave the batch. choose, indices: as
    generate has them.
    """
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = upload(pad(rows), proc.device)  # (S, T)
    mask = upload(pad([torch.ones_like(row) for row in rows]), proc.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = transformers.DynamicCache(config=lm.config)
    takes_cache = "cache" in inspect.signature(lm.forward).parameters  # its name since 5.24
    options = {"use_cache": True, "logits_to_keep": 1,
               "cache" if takes_cache else "past_key_values": cache}

    answers = [[] for _ in prompts]
    active = list(range(len(prompts)))  # the prompt of each sequence in the batch
    while True:
        out = lm(input_ids=ids, attention_mask=mask, position_ids=positions, **options)
        logits = out.logits[:, -1]  # (S, V)
        ids = logits.argmax(-1)  # (S,)
        if choose and active:
            ids = choose(logits, [indices[i] for i in active])
        for i, token in zip(active, ids.tolist()):
            answers[i].append(token)
        stay = []
        for k, i in enumerate(active):
            if answers[i][-1] not in stop and len(answers[i]) < limits[i]:
                stay.append(k)
        active = [active[k] for k in stay]
        # the ranks of a sharded model end together: a finished one goes along with one sequence
        if not (any(proc.gather(bool(active))) if proc.sharded else active):
            return answers
        if len(stay) < len(ids):
            keep = upload(stay or [0], proc.device)
            cache.batch_select_indices(keep)
            ids, mask, positions = ids[keep], mask[keep], positions[keep]
        ids = ids[:, None]
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
        positions = positions[:, -1:] + bool(active)


# ------------------------------------------------------------------------------------------------
# speed and memory


def memory_gb(device):
    """Peak memory so far in GB (10^9 bytes), of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:
        return 0.0  # not known on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def speed(proc: Process, batch: dict, seconds: float) -> dict:
    """Throughput of a step, in tokens/s over all processes, and peak memory.

    What several answers share is one computation, and counted once.
    """
    n_tokens = sum(map(data.total_tokens, batch.values()))
    return {"tokens_per_s": n_tokens / seconds, "memory_gb": memory_gb(proc.device)}


def memory_plan(name: str, c, proc: Process, groups: list, with_ref_model: bool) -> dict | None:
    """Estimated GB per process of an AdamW step, by category, from shapes only; None = unknown.

    groups: the largest micro-batch. Activations are what autograd keeps of a Llama layer per token:
    of two norms the input, the normalised value in float32 and the output; q, k, v and twice the
    attention's output; of the MLP gate, its activation, up and their product.
    """
    lm = without_weights(name)
    config = lm.config
    other = ("num_experts", "num_local_experts", "n_routed_experts", "vision_config")
    if any(getattr(config, name, None) for name in other):
        return None
    adapt(lm, c)
    every = sum(p.numel() for p in lm.parameters())
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    vocabulary, hidden = lm.get_output_embeddings().weight.shape
    config = config.get_text_config()
    layers = config.num_hidden_layers
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    n_tokens = data.total_tokens(groups)
    n_answer = sum(example.n_answer for group in groups for example in group)

    # bytes per number: of weights and gradients, of matrix products, of the residual stream
    weight = proc.weight_dtype.itemsize
    product = 4 if c.dtype == "fp32" else 2
    residual = 2 if product == 2 and (proc.sharded or weight == 2) else 4
    layer = 2 * (residual + 4 + product) * hidden + product * (5 * hidden + 4 * mlp)
    activations = n_tokens * layers * layer
    if c.activation_checkpointing:  # one layer's, and every layer's input
        activations = n_tokens * (layer + layers * residual * hidden)
    shards = proc.world if proc.sharded else 1
    if proc.sharded:  # embeddings, head and three layers are gathered at a time
        working = product * (2 * vocabulary * hidden + 3 * every // layers)
    else:  # autocast copies all weights in a forward
        working = 2 * every if c.dtype == "bf16" else 0
    # logits, log-probs and gradients, as measured; a reference's are kept beside them
    logits = (3 + 1.5 * with_ref_model) * 4 * n_answer * vocabulary
    sizes = {
        "weights": weight * every * (1 + with_ref_model) / shards + working,
        "gradients": weight * trained / shards,
        "optimizer": 2 * weight * trained / shards,
        "activations": activations,
        "logits": logits,
    }
    return {category: size / 1e9 for category, size in sizes.items()}


def capacity_gb(proc):
    """Memory of this process's GPU, or its part of this machine's."""
    if proc.device.type == "cuda":
        return torch.cuda.mem_get_info(proc.device)[1] / 1e9
    if not hasattr(os, "sysconf"):
        return math.inf  # not known on Windows
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / 1e9
