"""Models and machines: load, score at the answer tokens, generate, save. No method and no benchmark is known here.

    proc = setup("auto")                                    # this process among its peers
    lm, tokenizer = load_model("org/name@revision", proc), load_tokenizer("out/demo")
    per_token = score(Scorer(lm), examples, proc, budget)   # one array an example: log p of each of its answer tokens
    texts = generate(lm, tokenizer, prompts, 200, proc, budget)
"""
import contextlib
import dataclasses
import datetime
import functools
import inspect
import itertools
import json
import os
import re
import shutil
import sys

import safetensors
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import state_dict as sharded_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import configs
import data
import losses
from configs import Failure, Mistake

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ----------------------------------------------------------------------------------------------------------------------
# processes


@dataclasses.dataclass(frozen=True)
class Process:
    """One of `world` processes that run the same program (torchrun sets the environment); rank 0 prints and writes."""
    rank: int
    world: int
    device: torch.device
    # bf16: matrix products in bfloat16 under autocast, weights stay float32; bf16_weights: all
    dtype: str = "fp32"
    parallel: str = "ddp"  # what `world` processes share: fsdp = weights, gradients and optimizer state too

    @property
    def sharded(self):
        """Every forward then needs all processes: nobody may run one more than the others."""
        return self.parallel == "fsdp" and self.world > 1

    @property
    def weights(self):
        """The type of weights, and so of gradients and AdamW's state.

        A bfloat16 weight w moves by w / 256 or not at all: smaller steps are lost.
        """
        return torch.bfloat16 if self.dtype == "bf16_weights" else torch.float32

    def autocast(self):
        on = self.dtype == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if on else contextlib.nullcontext()

    @property
    def gpu(self):
        """Its name, or None."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    def gather(self, item):
        """[the item of rank 0, of rank 1, ...], on every rank."""
        if self.world == 1:
            return [item]
        items = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def share(self, batches):
        """The batches of this rank; equally many for every rank of a sharded model, some then computed twice, alike."""
        n = -(-len(batches) // self.world) * self.world if self.sharded else len(batches)
        return [batches[i % len(batches)] for i in range(self.rank, n, self.world)]

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def say(self, *words):
        if self.rank == 0:
            tqdm.write(" ".join(str(w) for w in words))


def setup(device="auto", dtype="fp32", parallel="ddp", threads=None, deterministic=False):
    """Find this process's place and device. `threads`: a tiny model runs faster, and the same everywhere, on one.

    deterministic: PyTorch's deterministic kernels only, so that a run on CUDA can be repeated, and resumed, bit by bit (on the
    same kind of GPU and versions); an operation that has none raises. A CPU needs no such setting. Not tried on a GPU yet.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in here if here[name]) if device == "auto" else device
    if not here[device]:
        raise Mistake(f"--device={device}: no such device is visible here; use --device=cpu or --device=auto.")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts, which is later
        torch.use_deterministic_algorithms(True)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
    elif threads:
        torch.set_num_threads(threads)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # ranks wait while rank 0 writes 7B models
    return Process(rank, world, torch.device(device), dtype, parallel)


def cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# loading and saving


NOT_GIVEN = ("{}: is not on this machine and the hub did not give it ({}); check the id, the network and HF_HUB_OFFLINE, accept "
             "a gated model's terms and run `hf auth login`, or name a local directory.")


def from_pretrained(auto, name, **options):
    repo, revision = configs.split_revision(name)
    try:
        return auto.from_pretrained(repo, revision=revision, trust_remote_code=False, **options)
    except Exception as e:  # transformers raises many kinds; each is one sentence here
        why = f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0]}"
        raise Mistake(f"{name}: cannot be loaded ({why})." if os.path.isdir(repo) else NOT_GIVEN.format(name, why)) from None


@configs.phase("loading")
def load_model(name, proc):
    """A causal language model, dropout off. Safetensors only; no code of the repository is run."""
    configs.check_digests(name)
    turns = int(os.environ["LOCAL_WORLD_SIZE"]) if proc.sharded else 1
    for turn in range(turns):  # one after another: a rank has the whole model in CPU memory while it cuts out its part
        if turns == 1 or turn == int(os.environ["LOCAL_RANK"]):
            lm = from_pretrained(transformers.AutoModelForCausalLM, name, dtype=proc.weights,
                                 use_safetensors=True)
            lm = place(without_dropout(lm), proc)
        proc.barrier()
    return lm


def place(lm, proc):
    """On its device; with parallel=fsdp each process keeps its part of every decoder layer, and of the rest."""
    for p in lm.parameters():  # lm.to(dtype) would round the position embedding's frequencies too
        p.data = p.data.to(proc.weights)
    if proc.sharded:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if proc.dtype == "bf16" else MixedPrecisionPolicy()
        for module in [*(getattr(lm.get_decoder(), "layers", None) or lm.get_decoder().h), lm]:  # moved one by one
            fully_shard(module, mesh=init_device_mesh(proc.device.type, (proc.world,)), mp_policy=policy)
        lm.register_forward_hook(lambda root, *_: None if torch.is_grad_enabled() else root.reshard())  # no backward will
    return lm.to(proc.device).eval()


NO_TOKENIZER = ("{}: has no tokenizer; give --tokenizer=, the one it was trained with "
                "(Llama-2 chat: --tokenizer=NousResearch/Llama-2-7b-chat-hf).")


def load_tokenizer(name):
    """The tokenizer of a model, or a Mistake where it has none.

    transformers then raises, or makes one of special tokens only (Phi, Qwen, GPT-2, Gemma).
    """
    try:
        tokenizer = from_pretrained(transformers.AutoTokenizer, name)
    except Mistake as e:
        if "instantiate the backend tokenizer" in str(e) or "Can't load tokenizer" in str(e):
            raise Mistake(NO_TOKENIZER.format(name)) from None
        raise
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise Mistake(NO_TOKENIZER.format(name))
    return tokenizer


def without_dropout(lm):
    """Unlearning is trained without dropout; this holds in train() mode too, which activation checkpointing asks for."""
    for m in lm.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if isinstance(getattr(m, "attention_dropout", None), float):
            m.attention_dropout = 0.0
    return lm


def tiny_llama(tokenizer, proc, seed, hidden=64, layers=2, heads=4):
    """A small random Llama (the demo's; 0.2 M parameters), the same for every process and number of threads."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        tie_word_embeddings=True, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return place(without_dropout(transformers.LlamaForCausalLM(config)), proc)


def tiny_gpt2(tokenizer, proc, seed, hidden=128, layers=4):
    """A small random GPT-2 (0.4 M parameters) near the one of SimNPO's Markov chains: one head, a narrow ReLU MLP.

    Theirs normalises after each block instead of before and has no projection after attention. Initial sizes are theirs,
    PyTorch's own: with GPT-2's (0.02) a step of lr 5e-4 is several times as long, and damage comes in leaps.
    """
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=hidden, n_layer=layers, n_head=1, n_inner=hidden, n_positions=20,
        activation_function="relu", tie_word_embeddings=False, initializer_range=(3 * hidden) ** -0.5,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = without_dropout(transformers.GPT2LMHeadModel(config))
        lm.transformer.wte.reset_parameters()  # standard normal
        lm.transformer.wpe.reset_parameters()
    return place(lm, proc)


class LoRA(nn.Module):
    """A frozen linear layer plus a trained low-rank one: y = W x + 2 B A x.

    arXiv 2106.09685 with alpha = 2 r. At first B = 0 and A is uniform in +-1/sqrt(width of x),
    peft's default.
    """

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.A = nn.Parameter(torch.empty(rank, base.in_features, **like))
        nn.init.kaiming_uniform_(self.A, a=5 ** 0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **like))

    def forward(self, x):
        return self.base(x) + 2 * nn.functional.linear(nn.functional.linear(x, self.A), self.B)


def add_lora(lm, rank, seed):
    """Freeze the model and put an adapter on every linear layer but the output head."""
    lm.requires_grad_(False)
    head = lm.get_output_embeddings()
    with torch.random.fork_rng(devices=[d for d in [lm.device] if d.type == "cuda"]):
        torch.manual_seed(seed)
        for parent in list(lm.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and child is not head and not isinstance(parent, LoRA):
                    setattr(parent, name, LoRA(child, rank))
    if not any(isinstance(m, LoRA) for m in lm.modules()):
        raise Mistake(f"--lora_rank={rank}: the model has no linear layers (torch.nn.Linear) to adapt.")


def merged(lm):
    """The state dict of the plain model: adapters are added to the weights they belong to."""
    adapters = {name: m for name, m in lm.named_modules() if isinstance(m, LoRA)}
    if not adapters:
        return None
    state = {k.replace(".base.", "."): v for k, v in lm.state_dict().items() if not k.endswith((".A", ".B"))}
    return state | {f"{k}.weight": (m.base.weight + 2 * m.B @ m.A).detach() for k, m in adapters.items()}


def freeze(lm, pattern):
    """Train only the parameters whose names match the regular expression."""
    hits = [name for name, p in lm.named_parameters() if p.requires_grad and re.search(pattern, name)]
    if not hits:
        raise Mistake(f"--train_only={pattern}: no parameter's name matches; they look like "
                      f"{', '.join(name for name, _ in list(lm.named_parameters())[1:3])}.")
    for name, p in lm.named_parameters():
        p.requires_grad_(name in hits)


def adapt(lm, c):
    """What is trained of a model: all of it, adapters, or the parameters that are named."""
    if c.lora_rank:
        add_lora(lm, c.lora_rank, c.seed)
    if c.train_only:
        freeze(lm, c.train_only)


@torch.no_grad()
def negate(lm, start, scale):
    """Task vector (arXiv 2212.04089): weights = start - scale * (weights - start); start: the model they were trained from."""
    proc = Process(0, 1, lm.device)
    for p, q in zip(lm.parameters(), load_model(start, proc).parameters(), strict=True):
        p.copy_(q - scale * (p - q))


WHOLE = sharded_state.StateDictOptions(full_state_dict=True, cpu_offload=True)  # all ranks ask, rank 0 gets it


@configs.phase("saving")
def save_model(lm, tokenizer, out, proc=None):
    """Write weights, config and tokenizer into `out`; files appear under their names only when they are complete.

    All processes call it, and rank 0 writes.
    """
    state = merged(lm)
    if proc and proc.sharded:
        once = {name for name, _ in lm.named_parameters()}  # what is tied is written once
        state = {k: v for k, v in sharded_state.get_model_state_dict(lm, options=WHOLE).items() if k in once}
    if proc and proc.rank > 0:
        return
    part = os.path.join(out, ".saving")
    shutil.rmtree(part, ignore_errors=True)
    try:
        lm.save_pretrained(part, state_dict=state)
        tokenizer.save_pretrained(part)
        for name in sorted(os.listdir(part), key=lambda n: n == "config.json"):  # config.json last: it marks a whole model
            with open(os.path.join(part, name), "rb") as f:
                os.fsync(f.fileno())
            os.replace(os.path.join(part, name), os.path.join(out, name))
    except (OSError, safetensors.SafetensorError) as e:  # the latter has a full disk in its text only
        raise Failure(f"{out}: the model could not be written ({getattr(e, 'strerror', None) or e}).") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fingerprint(name):
    """What tells one model from another: a hash of a directory's weights, or the hub's commit."""
    if not os.path.isdir(name):
        repo, revision = configs.split_revision(name)
        try:
            path = transformers.utils.hub.cached_file(repo, "config.json", revision=revision)
        except OSError as e:
            raise Mistake(NOT_GIVEN.format(name, str(e).splitlines()[0])) from None
        return os.path.basename(os.path.dirname(path))
    files = sorted(f for f in os.listdir(name) if f.endswith(".safetensors") or f.startswith(("tokenizer", "chat_template")) or
                   f in ("config.json", "generation_config.json"))
    return " ".join(configs.file_digest(os.path.join(name, f)) for f in files)


# ----------------------------------------------------------------------------------------------------------------------
# what a run writes of a model: checkpoints to go on from, the model at the end


def memory_gb(device):
    """Peak memory so far, in GB (10^9 bytes): of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bfloat16 FLOP/s, data sheets


def speed(lm, proc, examples, seconds):
    """What a logged step says of itself: tokens a second, over all processes; peak memory; model FLOP utilisation (MFU).

    mfu = FLOP of the step / (seconds * processes * PEAK), in bf16 on a GPU whose peak is known. A weight and token are 2 FLOP
    forward, 2 backward, and 2 more where the weight is trained; the output head's count for the answers' tokens only. Attention
    scores, a reference's forward and recomputed activations do not count, nor does padding; what several examples begin with
    counts for each of them, though a row that holds them computes it once.
    """
    tokens, scored = sum(len(e.ids) for e in examples), sum(len(e.ids) - e.start for e in examples)
    said = {"tokens_per_s": tokens / seconds, "memory_gb": memory_gb(proc.device)}
    peak = next((flops for name, flops in PEAK.items() if name in (proc.gpu or "")), None)
    if not peak or proc.dtype == "fp32":
        return said
    head, lookup = lm.get_output_embeddings().weight, lm.get_input_embeddings().weight
    used = {p: tokens for p in lm.parameters() if p.ndim > 1 and p is not lookup} | {head: scored}  # by how many tokens
    return said | {"mfu": sum((4 + 2 * p.requires_grad) * p.numel() * n for p, n in used.items()) / (seconds * proc.world * peak)}


def memory_plan(name, c, proc, rows, second):
    """{what: GB of a process} of a step with AdamW, told by shapes: no weight is loaded.

    rows: its largest micro-batch; second: is a frozen model held too. Activations are what autograd keeps of a forward.
    """
    half, world, kept = c.dtype == "bf16", proc.world if proc.sharded else 1, []
    weight = proc.weights.itemsize  # bytes; its gradient has as many, its AdamW state twice as many
    ids, places, _, _, more = collate(rows, "cpu")
    config = from_pretrained(transformers.AutoConfig, name)
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without storage
        dtype = torch.bfloat16 if half and proc.sharded else proc.weights
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        adapt(lm, c)
        shapes = {tuple(sorted(p.shape)) for p in lm.parameters()}  # weights and copies of them are counted below
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
        with Process(0, 1, torch.device("cpu"), c.dtype).autocast(), hooks:
            Scorer(lm)(ids, places, **more)
        stored = [t.untyped_storage() for t in kept if tuple(sorted(t.shape)) not in shapes]
    layers, (vocabulary, width) = config.get_text_config().num_hidden_layers, lm.get_output_embeddings().weight.shape
    activations = sum({s._cdata: s.nbytes() for s in stored}.values())
    if c.activation_checkpointing:  # one layer's, and every layer's input
        activations = activations / layers + layers * ids.numel() * width * weight
    every, trained = (sum(p.numel() for p in lm.parameters() if p.requires_grad >= least) for least in (False, True))
    # autocast copies all weights during a forward; a sharded model gathers embeddings, head and three layers at a time
    at_a_time = 2 * vocabulary * width + 3 * every // layers
    gathered = (2 if half else weight) * at_a_time if proc.sharded else 2 * half * every
    logits = (3 + 1.5 * second) * 4 * len(places) * vocabulary  # them, their log-probs and gradients, as measured
    weights, gradients = weight * every * (1 + second) / world + gathered, weight * trained / world
    sizes = (weights, gradients, 2 * gradients, activations, logits)
    return dict(zip(("weights", "gradients", "optimizer", "activations", "logits"), (size / 1e9 for size in sizes)))


def capacity_gb(proc):
    """Memory of this process's GPU, or its part of this machine's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return (torch.cuda.mem_get_info(proc.device)[1] if proc.device.type == "cuda" else machine) / 1e9


@configs.phase("saving")
def checkpoint(c, proc, scorer, optimizer, scheduler, step):
    """Everything needed to go on, in <out>/checkpoint. The old one leaves only when the new one is whole and on disk."""
    model, optimizer = sharded_state.get_state_dict(scorer, optimizer, options=WHOLE)
    if proc.rank == 0:
        new = os.path.join(c.out, configs.CHECKPOINTS[1])
        try:
            shutil.rmtree(new, ignore_errors=True)
            os.makedirs(new)
            path = os.path.join(new, "state.pt")
            with open(path, "wb") as f:
                torch.save({"step": step, "model": model, "optimizer": optimizer, "scheduler": scheduler.state_dict()}, f)
                f.flush()
                os.fsync(f.fileno())
            configs.accept_checkpoint(c)
        except (OSError, RuntimeError) as e:  # torch answers a full disk with a RuntimeError on top of its own
            e = e.__context__ if isinstance(e.__context__, OSError) else e
            shutil.rmtree(new, ignore_errors=True)
            raise Failure(f"{c.out}: the checkpoint of step {step} could not be written ({str(e).splitlines()[0]}); the one "
                          "before is untouched.") from None
    proc.barrier()


def restore(c, scorer, optimizer, scheduler):
    """The step a run was saved at, its state loaded; 0 where there is no checkpoint."""
    path = configs.find_checkpoint(c)
    if path is None:
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # a rank reads its part only
    sharded_state.set_state_dict(scorer, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=WHOLE)
    scheduler.load_state_dict(state["scheduler"])
    return state["step"]


def finish(c, proc, scorer, tokenizer, report=None):
    """The model first, then what report() writes, then the mark that says so; only now is the checkpoint not needed."""
    save_model(scorer.lm, tokenizer, c.out, proc)
    if report:
        report()
    if proc.rank == 0:
        configs.write(os.path.join(c.out, "run.json"), json.dumps(configs.describe(c, proc) | configs.summary(c), indent=1) + "\n")
        configs.drop_checkpoints(c)
    whole = configs.SECONDS.total()
    proc.say(f"{whole:.0f} s: " + ", ".join(f"{k} {v / whole:.0%}" for k, v in configs.SECONDS.most_common(6)))
    configs.SECONDS.clear()  # the next run of this process has its own
    proc.barrier()


# ----------------------------------------------------------------------------------------------------------------------
# scores at the answer tokens


class Scorer(nn.Module):
    """A language model that computes logits where they are read, and nowhere else.

    forward(ids (S, T), rows (n,)) -> logits (n, V), hidden: `rows` are flat positions s * T + t whose NEXT token is scored. The
    output head sees only those hidden states, so prompts and padding cost no vocabulary-sized memory. A hook on the head
    does it, because then every architecture's own forward (soft-capping, scaling, sharding) stays as it is.

    Sequences are padded on the right and no mask is passed: under causal attention no real token sees the padding.
    """

    def __init__(self, lm):
        super().__init__()
        self.lm, self.rows, self.hidden, self.layer, self.logits = lm, None, None, None, True
        lm.get_output_embeddings().register_forward_pre_hook(self.pick)

    def pick(self, head, args):
        if self.rows is not None:
            return (args[0].flatten(0, 1)[self.rows if self.logits else self.rows[:0]],)  # (S, T, D) -> (n, D)

    def watch(self, layer):
        """Return that decoder layer's output at the answer tokens too (RMU)."""
        layers = getattr(self.lm.get_decoder(), "layers", [])
        if layer >= len(layers):
            raise Mistake(f"--steering_layer={layer}: the model has {len(layers)} layers to steer, counted from 0.")
        if self.layer is None:
            self.layer = layer
            layers[layer].register_forward_hook(self.keep)

    def keep(self, layer, args, out):
        if self.rows is not None:
            out = out[0] if isinstance(out, tuple) else out
            self.hidden = out.flatten(0, 1)[self.rows + 1]  # at the answer tokens themselves, not where they are predicted

    def forward(self, ids, rows, logits=True, **more):
        """logits=False: nobody reads them, the head is given no rows. more: masks and positions, of packed rows."""
        self.rows, self.hidden, self.logits = rows, None, logits
        try:
            return self.lm(input_ids=ids, use_cache=False, **more).logits, self.hidden  # (n, V), (n, D) or None
        finally:
            self.rows = None


@dataclasses.dataclass
class Scores:
    """What losses read of one group of answers. counts: tokens of each answer, a list of B ints."""
    logits: torch.Tensor  # (n, V)
    labels: torch.Tensor  # (n,)
    counts: list
    hidden: torch.Tensor | None = None  # (n, D) of the watched layer
    alternate: "Scores | None" = None  # the same questions with another answer (DPO, IDK)

    @functools.cached_property
    def token_logps(self):
        return losses.token_logps(self.logits, self.labels)  # (n,)

    @functools.cached_property
    def logps(self):
        """(B,) sums by answer; split, not scatter-add: its order of summation is fixed on a GPU too."""
        return torch.stack([t.sum() for t in self.token_logps.split(self.counts)])

    @functools.cached_property
    def n_tokens(self):
        return torch.tensor(self.counts, device=self.logits.device, dtype=torch.float32)


def split(logits, hidden, labels, counts, sequences):
    """{kind: Scores} of a micro-batch whose sequences are ordered by kind."""
    scores, start = {}, 0
    for kind in dict.fromkeys(kind for kind, _ in sequences):
        own = [n for n, (k, _) in zip(counts, sequences) if k == kind]
        rows = slice(start, start := start + sum(own))
        scores[kind] = Scores(logits[rows], labels[rows], own, None if hidden is None else hidden[rows])
    return paired(scores)


def paired(scores):
    """A loss on forget answers finds the other answers to the same questions under .alternate."""
    if "alternate" in scores:
        scores.setdefault("forget", scores["alternate"]).alternate = scores["alternate"]
    return scores


PACKING = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "olmo2", "gpt_neox", "gpt2")  # tested, each of them


def packs(config, layer=None):
    """The hidden size of a model whose rows can hold several examples, for its attention takes any mask; else, or watched, 0."""
    able = config.model_type in PACKING and config._attn_implementation in ("sdpa", None) and not getattr(config, "sliding_window", None)
    return config.hidden_size if able and layer is None else 0


def collate(rows, device, order=None):
    """What Scorer.forward takes, and what is read of it, of rows of one example or of several (see data.tree).

    Returns ids (S, T) padded right with 0; places (n,), labels (n,) and counts, of the examples in `order`, None = as they come;
    and the masks and positions of rows with several: a token sees those that lead to it, and itself.
    """
    trees = [data.tree(row) for row in rows]
    width = max(len(ids) for ids, _, _ in trees)
    read = [([s * width + at for at in path], e.ids[e.start:]) for s, (row, (_, _, paths)) in enumerate(zip(rows, trees))
            for path, e in zip(paths, row)]
    read, more = [read[i] for i in order or range(len(read))], {}
    if len(read) > len(rows):
        at = torch.arange(width, device=device)
        ends = torch.tensor([ends + list(range(len(ends) + 1, width + 1)) for _, ends, _ in trees], device=device)  # padding: itself
        sees = (at <= at[:, None]) & (at[:, None] < ends[:, None])  # (S, T, T): may a token look at another
        more = {"attention_mask": sees[:, None], "position_ids": sees.sum(-1) - 1}
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _, _ in trees], device=device)
    places, labels = (torch.tensor([x for pair in read for x in pair[k]], device=device) for k in (0, 1))
    return ids, places, labels, [len(answer) for _, answer in read], more


@torch.no_grad()
def score(scorer, examples, proc, budget, read=lambda *both: losses.token_logps(*both)[:, None], title=None):
    """[array (T_i, k)] an example: what `read(logits (n, V), labels (n,)) -> (n, k)` says of each of its answer tokens.

    Neighbours with the same prompt, as a question's answers are, up to eight, share a row where that pays. Whole batches are dealt
    to ranks, so nothing depends on the number of processes.
    """
    hidden, mine = packs(scorer.lm.config, scorer.layer), {}
    prompts = [tuple(e.ids[:e.start]) if hidden and e.start >= 8 else i for i, e in enumerate(examples)]
    alike = [list(group) for _, group in itertools.groupby(range(len(examples)), prompts.__getitem__)]
    groups = [group[k:k + 8] for group in alike for k in range(0, len(group), 8)]
    batches = [rows for rows, in data.deal(groups, examples, budget, 1, hidden)]
    for batch in tqdm(proc.share(batches), desc=title, disable=proc.rank > 0 or not title or None, leave=False):
        ids, places, labels, counts, more = collate([[examples[i] for i in row] for row in batch], proc.device)
        with proc.autocast():
            logits, _ = scorer(ids, places, **more)
        values = read(logits, labels).double().cpu().split(counts)
        mine |= {i: v.numpy() for i, v in zip((i for row in batch for i in row), values)}
    merged = {i: v for part in proc.gather(mine) for i, v in part.items()}
    return [merged[i] for i in range(len(examples))]


def stop_ids(lm, tokenizer):
    """Every id that ends an answer: the tokenizer's EOS and what the model's generation settings add."""
    more = getattr(lm.generation_config, "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *(more if isinstance(more, (list, tuple)) else [more])} - {None})


@configs.phase("answering")
@torch.no_grad()
def generate(lm, tokenizer, prompts, max_new_tokens, proc, budget, title=None, begun=None):
    """Greedy continuations, as text, of prompts (lists of ids): batched, equal to one at a time.

    begun: what each is known to begin with, lists of ids; only the rest is computed. Whole batches are dealt to ranks; the last
    quarter of each waits for that of the others, for few rows take nearly as long as many.
    """
    stop = stop_ids(lm, tokenizer)
    new = [ids[:next((k for k, t in enumerate(ids[:max_new_tokens], 1) if t in stop), max_new_tokens)] for ids in begun or [[]] * len(prompts)]
    shared = len(same) if packs(lm.config) and len(same := os.path.commonprefix([p[:-1] for p in prompts])) >= 16 else 0
    while todo := [i for i, ids in enumerate(new) if len(ids) < max_new_tokens and not {*ids[-1:]} & {*stop}]:
        sizes, mine = [(1, len(prompts[i] + new[i]) + max_new_tokens) for i in todo], {}
        batches = [[todo[k] for k in batch] for batch in data.cut(sizes, budget)]
        for batch in tqdm(proc.share(batches), desc=title, disable=proc.rank > 0 or not title or None, leave=False):
            few, rest = len(batch) // 4 if len(batches) > 1 else 0, [max_new_tokens - len(new[i]) for i in batch]
            with proc.autocast():
                mine |= dict(zip(batch, continue_batch(lm, [prompts[i] + new[i] for i in batch], rest, stop, proc, shared, few)))
        for i, ids in {i: ids for part in proc.gather(mine) for i, ids in part.items()}.items():
            new[i] += ids
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def continue_batch(lm, prompts, limits, stop, proc, shared=0, few=0):
    """[new ids] a prompt, at most its limit, up to and including the first id in `stop`; or until `few` rows are left unfinished.

    The first `shared` ids, the same in all prompts, are computed once; padding, masked out, comes after them. Finished rows leave
    the batch.
    """
    width, device = max(map(len, prompts)), proc.device
    ids = torch.tensor([[0] * (width - len(p)) + p[shared:] for p in prompts], device=device)  # (S, T)
    mask = torch.tensor([[1] * shared + [0] * (width - len(p)) + [1] * (len(p) - shared) for p in prompts], device=device)
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    cache = transformers.DynamicCache(config=lm.config)
    kept = {"cache" if "cache" in inspect.signature(lm.forward).parameters else "past_key_values": cache}  # its old name
    if shared:
        lm(input_ids=torch.tensor([prompts[0][:shared]], device=device), use_cache=True, logits_to_keep=1, **kept)
        cache.batch_repeat_interleave(len(prompts))
    rows, new = list(range(len(prompts))), [[] for _ in prompts]  # rows: which prompt each row of the batch is
    while True:
        out = lm(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1, **kept)
        ids = out.logits[:, -1].argmax(-1)  # (S,)
        for row, token in zip(rows, ids.tolist()):
            new[row].append(token)
        stay = [k for k, row in enumerate(rows) if new[row][-1] not in stop and len(new[row]) < limits[row]]
        rows = [rows[k] for k in stay]
        if not any(proc.gather(len(rows) > few) if proc.sharded else [len(rows) > few]):  # the ranks of a sharded model end together
            break
        if len(stay) < len(ids):
            keep = torch.tensor(stay or [0], device=device)  # whoever is done only goes along
            cache.batch_select_indices(keep)
            ids, mask, position = ids[keep], mask[keep], position[keep]
        ids = ids[:, None]
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
        position = position[:, -1:] + bool(rows)
    return new
