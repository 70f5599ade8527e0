"""Make a language model behave as if it never saw a forget set, and keep what a retain set holds.

    python unlearn.py                                           # the demo: CPU, no download
    python unlearn.py configs/tofu_1b.py --forget_loss=npo --beta=0.1 --forget_weight=1
    torchrun --nproc_per_node=8 unlearn.py configs/tofu_7b.py   # the same steps on eight GPUs

A step takes batch_size forget and as many retain examples. Its loss is
forget_weight * forget_loss + retain_weight * retain_loss, each a mean over the whole batch.
Settings: a config file of plain assignments, then --key=value; later words win.
"""
import copy
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from typing import Literal

import configs

if __name__ == "__main__":
    configs.help_if_asked(__file__, "Config", __doc__)  # before the imports that take seconds

import torch
import transformers
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import losses
import model as models
from configs import Failure, UsageError, recorded, rundir, tables

# ------------------------------------------------------------------------------------------------
# methods: the only place where a name meets tensors and settings


@dataclasses.dataclass(frozen=True)
class Loss:
    """fn(s, c) -> one value per token (n,) or per answer (B,); s = models.Scores, c = Config.

    needs: what fn reads of the model before unlearning. ref_logps (s.ref_logps) are computed once;
        a ref_model (s.ref) is a frozen copy in memory.
    answers: which answers a forget group holds. both: the question's own, then an alternate one.
    hidden: fn reads s.hidden, the output of --steering_layer, and no logits.
    after(lm, c): done to the trained model before it is scored and saved.
    """
    fn: Callable
    per: str  # token or answer
    needs: str = ""  # ref_logps or ref_model
    answers: str = "own"  # own, alternate or both
    hidden: bool = False
    after: Callable | None = None

    def count(self, groups):
        """What a batch's sum is divided by: its answers, or its answer tokens, on all GPUs."""
        if self.per == "answer":
            return len(groups)
        return sum(example.n_answer for group in groups for example in group)


def dpo(s, c):
    """Own and alternate answers take turns in s: the alternates win, the own answers lose."""
    win, ref_win = s.logps[1::2], s.ref_logps[1::2]
    lose, ref_lose = s.logps[0::2], s.ref_logps[0::2]
    return losses.dpo(win, ref_win, lose, ref_lose, c.beta)


def npo_mean(s, c):
    """NPO of log-probs divided by length: a sum over MUSE's 2048 tokens saturates the sigmoid."""
    return losses.npo(s.logps / s.n_tokens, s.ref_logps / s.n_tokens, c.beta)


def rmu(s, c):
    """RMU's target is one random direction with positive entries, the same on every rank."""
    direction = torch.rand(s.hidden.shape[-1], generator=torch.Generator().manual_seed(c.seed))
    steering = c.steering_scale * direction / direction.norm()
    return losses.rmu(s.hidden, models.upload(steering, s.hidden.device))


FORGET = {
    "ga": Loss(lambda s, c: losses.ga(s.token_logps), "token"),
    "nll": Loss(lambda s, c: losses.nll(s.token_logps), "token"),  # fine-tuning, relearning
    "npo": Loss(lambda s, c: losses.npo(s.logps, s.ref_logps, c.beta), "answer", "ref_logps"),
    "simnpo": Loss(lambda s, c: losses.simnpo(s.logps, s.n_tokens, c.beta, c.gamma), "answer"),
    "idk": Loss(lambda s, c: losses.nll(s.token_logps), "token", answers="alternate"),
    "dpo": Loss(dpo, "answer", "ref_logps", answers="both"),
    "altpo": Loss(dpo, "answer", "ref_logps", answers="both"),
    "wga": Loss(lambda s, c: losses.wga(s.token_logps, c.beta), "token"),
    "satimp": Loss(lambda s, c: losses.satimp(s.token_logps, c.beta1, c.beta2), "token"),
    "tnpo": Loss(lambda s, c: losses.tnpo(s.token_logps, s.ref_token_logps, c.beta),
                 "token", "ref_logps"),
    "wtnpo": Loss(lambda s, c: losses.wtnpo(s.token_logps, s.ref_token_logps, c.beta, c.alpha),
                  "token", "ref_logps"),
    "ceu": Loss(lambda s, c: losses.ceu(s.logits, s.labels), "token"),
    "undial": Loss(lambda s, c: losses.undial(s.logits, s.ref.logits, s.labels, c.beta),
                   "token", "ref_model"),
    "max_entropy": Loss(lambda s, c: losses.max_entropy(s.logits), "token"),
    "logit_margin": Loss(lambda s, c: losses.logit_margin(s.logits), "token"),
    "rmu": Loss(rmu, "token", hidden=True),
    "task_vector": Loss(lambda s, c: losses.nll(s.token_logps), "token",
                        after=lambda lm, c: models.negate(lm, c.model, c.task_vector_scale)),
    "ga_mean": Loss(lambda s, c: losses.ga(s.logps / s.n_tokens), "answer"),
    "npo_mean": Loss(npo_mean, "answer", "ref_logps"),
    # on raw logits: what the published MUSE numbers were made with
    "muse_npo": Loss(lambda s, c: losses.muse_npo(s.logits, s.ref.logits, c.beta),
                     "token", "ref_model"),
    "muse_simnpo": Loss(lambda s, c: losses.muse_simnpo(s.logits, c.beta, c.gamma), "token"),
}
RETAIN = {
    "nll": Loss(lambda s, c: losses.nll(s.token_logps), "token"),
    # each answer counts the same, as in a micro-batch of one example
    "nll_mean": Loss(lambda s, c: losses.nll(s.logps / s.n_tokens), "answer"),
    "kl": Loss(lambda s, c: losses.kl(s.logits, s.ref.logits), "token", "ref_model"),
    "rmu": Loss(lambda s, c: losses.rmu(s.hidden, s.ref.hidden), "token", "ref_model",
                hidden=True),
    "muse_kl": Loss(lambda s, c: losses.muse_kl(s.logits, s.ref.logits), "token", "ref_model"),
    "none": None,
}


def loss_terms(c):
    """{"forget": Loss, "retain": Loss} of a run; no "retain" with --retain_loss=none."""
    terms = {"forget": FORGET[c.forget_loss], "retain": RETAIN[c.retain_loss]}
    return {kind: term for kind, term in terms.items() if term}


# ------------------------------------------------------------------------------------------------
# the loop


def train(c, proc, lm, groups, evaluate=None, run=None, title=None):
    """Train `lm` in place and return the rows of the log (<out>/log.jsonl).

    groups: {"forget": [group], "retain": [group]}, a group = examples with one prompt. When scores
    are due, evaluate(step, epoch) -> {score: value}; it must not touch the training.
    """
    run = run or rundir.RunDirectory(c, proc)
    terms = loss_terms(c)
    weights = {"forget": c.forget_weight, "retain": c.retain_weight}
    groups = {kind: groups[kind] for kind in terms}
    steps = n_steps(c, len(groups["forget"]))
    steps_per_epoch = len(groups["forget"]) / c.batch_size

    # model, optimizer, reference
    models.adapt(lm, c)
    trained = [p for p in lm.parameters() if p.requires_grad]
    optimizer, scheduler = make_optimizer(trained, c, steps)
    references = prepare_references(lm, groups, terms, c, proc)
    model = wrap_model(lm, terms, c, proc)
    is_ddp = isinstance(model, DistributedDataParallel)
    max_tokens = row_budget(c, proc, lm, groups)
    one_kind = proc.sharded and must_take_turns(lm, terms)

    # resume: batches depend on (seed, epoch) alone, so those that are done are skipped
    done = models.restore(run, lm, optimizer, scheduler) if c.resume else 0
    run.open_log(done)
    if evaluate and done == 0:
        run.log({"step": 0, "epoch": 0.0, **evaluate(0, 0.0)})
    batches = data.make_batches(groups, c.batch_size, steps, c.seed, c.shuffle)
    score_steps = steps_due(c.eval_every, c.eval_at, steps, steps_per_epoch) if evaluate else ()
    save_steps = steps_due(c.save_every, (), steps, steps_per_epoch) - {steps}
    todo = range(done + 1, steps + 1)
    bar = proc.progress(todo, title or c.forget_loss, total=steps, initial=done, leave=True)

    for step in bar:
        started = time.perf_counter()
        batch = batches[step - 1]
        counts = {kind: terms[kind].count(batch[kind]) for kind in batch}
        micro_batches = data.micro_batches(batch, max_tokens, proc.rank, proc.world, one_kind)

        # forward and backward: a micro-batch is of one kind and adds its share of the batch's mean
        totals = {kind: torch.zeros(1, device=proc.device) for kind in weights}
        with proc.autocast():  # once per step: the casts of the weights are shared
            for i, (kind, some, share) in enumerate(micro_batches):
                if is_ddp:  # all-reduce gradients in the last backward only
                    model.require_backward_grad_sync = i == len(micro_batches) - 1
                layer = c.steering_layer if terms[kind].hidden else None
                scores = models.score(model, some, proc.device, layer, references.get(kind))
                loss = share * terms[kind].fn(scores, c).sum() / counts[kind]
                # times world: DDP and FSDP average gradients over ranks, and we need their sum
                (proc.world * weights[kind] * loss).backward()
                totals[kind] += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, c.grad_clip or math.inf)
        grad_norm = grad_norm.full_tensor() if proc.sharded else grad_norm

        # the step's one host sync; a step that is not finite is not applied
        sums = proc.sum(torch.cat([totals["forget"], totals["retain"]]))
        forget_loss, retain_loss, grad_norm = torch.cat([sums, grad_norm[None]]).tolist()
        check_finite(step, forget_loss, retain_loss, grad_norm, batch, groups, c)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=not is_ddp)  # DDP's gradients live in its buckets

        # log, score, save
        at = {"step": step, "epoch": step / steps_per_epoch}
        loss = c.forget_weight * forget_loss + c.retain_weight * retain_loss
        speed = models.speed(proc, batch, time.perf_counter() - started)
        run.log({**at, "loss": loss, "forget_loss": forget_loss, "retain_loss": retain_loss,
                 "lr": lr, "grad_norm": grad_norm, **speed})
        bar.set_postfix(forget=f"{forget_loss:.3f}", retain=f"{retain_loss:.3f}", refresh=False)
        if step in score_steps:
            run.log({**at, **evaluate(step, at["epoch"])})
        signal = run.interrupted if step < steps else None
        if step in save_steps or (signal and run.resumable):
            models.save_checkpoint(run, lm, optimizer, scheduler, step)
        if signal:
            raise run.stop(step, steps)
    lm.eval()
    return run.rows


def n_steps(c, n_forget):
    """Full batches only; a forget set smaller than one batch is an error, not an empty run."""
    steps = c.steps or int(c.epochs * n_forget) // c.batch_size
    if steps == 0:
        raise UsageError(
            f"0 optimizer steps: {c.epochs:g} epochs of {n_forget} examples make no batch of "
            f"{c.batch_size}; lower --batch_size or raise --epochs.")
    return steps


def steps_due(every, at, steps, steps_per_epoch):
    """The steps after which something is due: `at`, else every so many epochs; and the last."""
    if at:
        return {*at, steps}
    if every == 0:
        return set()
    interval = max(1, every * steps_per_epoch)  # in steps
    n_due = int(steps / interval + 1e-9)
    return {math.ceil(i * interval - 1e-9) for i in range(1, n_due + 1)} | {steps}


def make_optimizer(trained, c, steps):
    """(AdamW with weight decay on matrices only, its learning-rate schedule)."""
    parameter_groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = trained[0].device.type != "mps"
    optimizer = torch.optim.AdamW(
        parameter_groups, lr=c.lr, betas=(0.9, c.adam_beta2), fused=fused)
    name = "constant_with_warmup" if c.schedule == "constant" else c.schedule
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps(c, steps), num_training_steps=steps)
    return optimizer, scheduler


def warmup_steps(c, steps):
    return math.floor(c.warmup * steps + 1e-9)


def prepare_references(lm, groups, terms, c, proc):
    """Keep what the losses read of the model before unlearning.

    Log-probs are computed once and kept with the examples. Only a loss of full logits or hidden
    states needs a second model: returns {kind: a frozen copy} for those.
    """
    with proc.clock.phase("reference"):
        for kind, term in terms.items():
            if term.needs == "ref_logps":
                values = models.token_scores(
                    lm, groups[kind], proc, c.micro_batch_tokens, title="reference")
                for group, arrays in zip(groups[kind], values):
                    for example, array in zip(group, arrays):
                        logps = torch.tensor(array[:, 0], dtype=torch.float32)
                        example.ref_logps = logps.to(proc.device)
        reading = [kind for kind, term in terms.items() if term.needs == "ref_model"]
        if not reading:
            return {}
        # a sharded model cannot be copied
        frozen = models.load_model(c.model, proc) if proc.sharded else copy.deepcopy(lm)
        return dict.fromkeys(reading, frozen.requires_grad_(False))


def wrap_model(lm, terms, c, proc):
    """The model as the loop calls it: checkpointed, compiled, and DDP's, where that is set."""
    reads_hidden = check_layers(lm, terms, c)
    if c.activation_checkpointing:
        enable = getattr(lm, "activation_checkpointing_enable", None)  # transformers 5
        (enable or lm.gradient_checkpointing_enable)({"use_reentrant": False})
        lm.train()  # transformers recomputes in this mode only; there is no dropout
    model = torch.compile(lm, dynamic=True) if c.compile else lm
    if proc.world > 1 and not proc.sharded:
        # RMU's loss does not reach the layers above the steered one
        model = DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=reads_hidden)
    return model


def check_layers(lm, terms, c):
    """Does a loss read a layer's output? The last one's is known after the final norm only."""
    reads_hidden = any(term.hidden for term in terms.values())
    n_layers = lm.config.get_text_config().num_hidden_layers
    if reads_hidden and c.steering_layer >= n_layers - 1:
        raise UsageError(f"--steering_layer={c.steering_layer}: the model has {n_layers} layers, "
                         "counted from 0; it must be below the last.")
    return reads_hidden


def row_budget(c, proc, lm, groups):
    """The most tokens of a micro-batch's row.

    FSDP's ranks must run equally many forwards: where one pair of answers exceeds the model's limit
    and takes two, all pairs do.
    """
    pairs = [group for some in groups.values() for group in some if len(group) > 1]
    longest = max(map(data.row_tokens, pairs), default=0)
    if proc.sharded and longest > lm.row_limit:
        lm.row_limit = 0
    return min(c.micro_batch_tokens, lm.row_limit)


def must_take_turns(lm, terms):
    """Does a forget micro-batch run other forwards than a retain one?

    FSDP's forwards are collective: all ranks then compute the same kind at the same time.
    """
    work = {(term.hidden, term.needs == "ref_model", term.answers) for term in terms.values()}
    return len(work) > 1 or lm.row_limit < math.inf


def check_finite(step, forget_loss, retain_loss, grad_norm, batch, groups, c):
    if all(map(math.isfinite, (forget_loss, retain_loss, grad_norm))):
        return
    named = []
    for kind in batch:
        named.append(f"{kind} examples {[groups[kind].index(group) for group in batch[kind]]}")
    raise Failure(
        f"step {step}: forget loss {forget_loss}, retain loss {retain_loss}, gradient norm "
        f"{grad_norm}; {', '.join(named)}. This step was not applied. {c.out}/checkpoint has the "
        "last --save_every, if any; lower --lr, or fix these rows.")


# ------------------------------------------------------------------------------------------------
# settings


@dataclasses.dataclass(frozen=True)
class Method(configs.Settings):
    """method"""
    forget_loss: str = "simnpo"  # a line of the table FORGET
    retain_loss: str = "nll"  # a line of the table RETAIN
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    beta: float = 0.1  # inverse temperature; wga: exponent; undial: by how much a logit is lowered
    gamma: float = 0.0  # simnpo: the paper's margin, outside beta
    alpha: float = 1.5  # wtnpo: exponent
    beta1: float = 5.0  # satimp: saturation exponent
    beta2: float = 1.0  # satimp: importance exponent
    steering_layer: int = 7  # rmu: the decoder layer whose output is steered, from 0
    steering_scale: float = 6.5  # rmu: length of the steering vector
    task_vector_scale: float = 1.0  # task_vector: how much of forget_loss=nll is subtracted
    refusals: str | None = None  # idk, dpo: a file of refusals, one per line; None = ours
    alternates: str | None = None  # altpo: rows with question and alternate (a text or a list)

    def problems(self):
        for name, table in (("forget_loss", FORGET), ("retain_loss", RETAIN)):
            value = getattr(self, name)
            if value not in table:
                yield f"--{name}={value}: must be one of {', '.join(table)}."
        yield from self.check("beta", lambda v: v > 0, "must be above 0.")
        yield from self.check("alpha beta1 beta2 steering_layer", lambda v: v >= 0,
                              "must not be negative.")
        yield from self.check("refusals alternates", os.path.isfile, "no such file.")
        if self.forget_loss == "altpo" and not self.alternates:
            yield "--forget_loss=altpo: give --alternates=FILE."


@dataclasses.dataclass(frozen=True)
class Optimizer(configs.Settings):
    """optimizer"""
    lr: float = 1e-5
    weight_decay: float = 0.01  # of matrices only
    adam_beta2: float = 0.999
    grad_clip: float = 1.0  # largest gradient norm; 0 = no clipping

    def problems(self):
        yield from self.check("lr", lambda v: v > 0, "must be above 0.")
        yield from self.check("weight_decay grad_clip", lambda v: v >= 0, "must not be negative.")
        yield from self.check("adam_beta2", lambda v: 0 <= v < 1, "must be from 0 to below 1.")


@dataclasses.dataclass(frozen=True)
class Training(configs.Settings):
    """training"""
    epochs: float = 10.0  # passes over the forget set
    steps: int | None = None  # optimizer steps; overrides epochs
    batch_size: int = 32  # forget examples per optimizer step, over ALL processes
    warmup: float = 0.0  # fraction of the steps
    schedule: Literal["linear", "cosine", "constant"] = "constant"  # after the warm-up
    shuffle: bool = True  # False = file order, forget example i with retain example i
    seed: int = 0
    train_only: str | None = None  # regular expression: train only parameters of matching names
    lora_rank: int = 0  # train low-rank adapters instead of the weights; merged on save; 0 = off

    def problems(self):
        yield from self.check("epochs batch_size", lambda v: v > 0, "must be above 0.")
        yield from self.check("steps", lambda n: n >= 1, "must be at least 1.")
        yield from self.check("warmup", lambda v: 0 <= v <= 1,
                              "a fraction of the run, from 0 to 1.")
        yield from self.check("lora_rank", lambda v: v >= 0, "must not be negative.")
        yield from self.check("seed", lambda n: 0 <= n < 2**63, "must be from 0 to 2^63 - 1.")
        try:
            re.compile(self.train_only or "")
        except re.error as e:
            yield f"--train_only={self.train_only}: not a regular expression ({e})."


@dataclasses.dataclass(frozen=True)
class Finetuning(configs.Settings):
    """making the target and the retain model from base_model"""
    finetune_lr: float = 1e-5
    finetune_epochs: float = 5.0
    finetune_batch_size: int = 32
    finetune_warmup: float = 0.2  # one epoch of five, as TOFU and open-unlearning
    finetune_schedule: Literal["linear", "cosine", "constant"] = "linear"

    def problems(self):
        yield from self.check("finetune_lr finetune_epochs finetune_batch_size", lambda v: v > 0,
                              "must be above 0.")
        yield from self.check("finetune_warmup", lambda v: 0 <= v <= 1,
                              "a fraction of the run, from 0 to 1.")


@dataclasses.dataclass(frozen=True)
class Keeping(configs.Settings):
    """saved models"""
    keep_epochs: bool = False  # keep a loadable model at every score, in <out>/epoch_<n>
    save_dtype: Literal["fp32", "bf16", "fp16"] | None = None  # of saved weights; None = that of
                                                               # the model before


@dataclasses.dataclass(frozen=True)
class Execution(configs.Settings):
    """execution"""
    changes_result = False
    activation_checkpointing: bool = False  # recompute activations: less memory, a third more time
    compile: bool = False  # torch.compile
    save_every: float = 0.0  # epochs between checkpoints to resume from; 0 = none
    plan: bool = False  # say what memory a step takes, and stop
    resume: bool = False  # go on from <out>/checkpoint; without one, begin
    wandb: str | None = None  # a Weights & Biases project to log to as well (pip install wandb)

    def problems(self):
        yield from self.check("save_every", lambda v: v >= 0, "must not be negative.")
        if self.wandb and not importlib.util.find_spec("wandb"):
            yield f"--wandb={self.wandb}: pip install wandb first."


@dataclasses.dataclass(frozen=True)
class Config(evaluate.Config, Method, Optimizer, Training, Finetuning, Keeping, Execution):
    @classmethod
    def defaults(cls, given):
        found = super().defaults(given)
        c = {name: getattr(cls, name) for name in ("benchmark", "forget_loss", "seed")}
        c |= given | found
        if given.get("out") is None:
            found["out"] = f"out/{c['benchmark']}_{c['subset']}_{c['forget_loss']}"
        if c["benchmark"] == "markov" and given.get("data") is None:
            found["data"] = str(c["seed"])  # its sequences are drawn anew for each seed
        return found

    def problems(self):
        """What no group can see alone."""
        if self.overwrite and self.resume:
            yield "--overwrite=True begins again and --resume=True goes on: give one of them."
        is_task_vector = self.forget_loss == "task_vector"
        if is_task_vector and (self.retain_loss != "none" or self.resume or self.lora_rank):
            yield ("--forget_loss=task_vector: reads no retain set and has no --resume and no "
                   "--lora_rank; write --retain_loss=none.")
        if self.parallel == "fsdp" and (self.lora_rank or self.compile or is_task_vector):
            yield ("--parallel=fsdp: --lora_rank, --compile and --forget_loss=task_vector need "
                   "--parallel=ddp.")
        needs_retain = self.retain_loss != "none" and self.benchmark != "muse"
        if self.forget_data and not self.retain_data and needs_retain:
            yield (f"--forget_data={self.forget_data}: give --retain_data too, or "
                   "--retain_loss=none.")


# ------------------------------------------------------------------------------------------------
# from rows to groups, and to a model that fits


def encode_groups(c, tokenizer, proc, **sets):
    """{name: [group]} of sets of rows, name = forget or retain.

    Rows without an answer to score are counted, reported and left out.
    """
    template = evaluate.make_template(tokenizer, c)
    groups = {}
    for name, rows in sets.items():
        answers = FORGET[c.forget_loss].answers if name == "forget" else "own"
        alternates = None
        if answers != "own":
            alternates = data.read_alternates(c.alternates, c.refusals)
        groups[name], n_dropped = data.encode_groups(
            rows, template, c.max_length, answers, alternates, c.seed)
        if n_dropped:
            proc.say(f"{n_dropped} of {len(groups[name]) + n_dropped} {name} rows left out: no "
                     f"answer, or a prompt longer than --max_length={c.max_length}")
        if rows and not groups[name]:
            raise UsageError(f"no {name} row is left: every answer is empty or every prompt longer "
                             f"than --max_length={c.max_length}.")
    return groups


# errors of an architecture that transformers does not build from shapes alone
UNKNOWN = (AttributeError, RuntimeError, TypeError, ValueError)


def check_memory(c, proc, name, groups):
    """Say what memory a step takes, before a weight is loaded. An estimate only: see --plan."""
    terms = loss_terms(c)
    groups = {kind: groups[kind] for kind in terms}
    micro_batches = []
    for batch in data.make_batches(groups, c.batch_size, 20, c.seed, c.shuffle):
        micro_batches += data.micro_batches(batch, c.micro_batch_tokens, proc.rank, proc.world)
    largest = max((some for _, some, _ in micro_batches), key=data.total_tokens)
    has_reference = any(term.needs == "ref_model" for term in terms.values())
    try:
        needs = models.memory_plan(name, c, proc, largest, has_reference)
    except UNKNOWN:
        needs = None
    if needs is None:
        return proc.say(f"{name}: no estimate of memory for this architecture")
    total, capacity = sum(needs.values()), models.capacity_gb(proc)
    parts = ", ".join(f"{category} {memory(gb)}" for category, gb in needs.items())
    estimate = f"{memory(total)} of {memory(capacity)} per process: {parts}"
    if c.plan or total <= 1.15 * capacity:
        return proc.say(f"a step takes about {estimate}")
    advice = ["lower --micro_batch_tokens"]
    if not c.activation_checkpointing:
        advice.append("set --activation_checkpointing=True")
    if not proc.sharded:
        advice.append("use more GPUs with --parallel=fsdp")
    raise UsageError(f"--model={name}: a step does not fit, it takes {estimate}; "
                     f"{', or '.join(advice)}.")


def memory(gb):
    return f"{gb:.1f} GB" if gb >= 1 else f"{1000 * gb:.0f} MB"


# ------------------------------------------------------------------------------------------------
# fine-tuning base_model into target and retain model


def finetune_config(c, path):
    """Settings for fine-tuning base_model into `path`; everything about unlearning is default."""
    names = ["base_model", "tokenizer", "seed", "overwrite"]
    for group in (data.Data, models.Machine, models.Precision, Optimizer, Finetuning, Execution):
        names += configs.fields(group)
    given = {name: getattr(c, name) for name in names}
    for name in configs.fields(Finetuning):
        given[name.removeprefix("finetune_")] = getattr(c, name)
    given |= {"out": path, "forget_loss": "nll", "retain_loss": "none", "eval_every": 0.0,
              "resume": not c.overwrite,  # an unfinished model, unless everything is made anew
              "wandb": None}
    if c.benchmark != "own":
        given |= {"split": None, "forget_data": None, "retain_data": None}
    return configs.make(Config, given)


def prepare(c, proc, start, rows):
    """(tokenizer, groups) for training the model `start` on rows, {"forget": [row], ...}."""
    tokenizer = evaluate.load_tokenizer(start, c)
    groups = encode_groups(models.fit(c, models.load_config(start)), tokenizer, proc, **rows)
    n_steps(c, len(groups["forget"]))  # refused, if it is, before anything is written
    check_memory(c, proc, start, groups)
    return tokenizer, groups


def finetune(c, proc, rows, title):
    """Fine-tune base_model on rows, as a run of its own."""
    run = rundir.RunDirectory(c, proc)
    if run.claim():
        return
    tokenizer, groups = prepare(c, proc, c.base_model, {"forget": rows})
    if models.has_weights(c.base_model):
        lm, _ = evaluate.load(c.base_model, c, proc, tokenizer)
    else:
        proc.say(f"{c.base_model} holds no weights: they are drawn at random")
        lm = models.random_model(c.base_model, proc, c.seed)
    if not run.start():
        return
    with run.watch_signals(), proc.clock.phase("training"):
        train(c, proc, lm, groups, run=run, title=title)
    finish(run, lm, tokenizer)


def finetune_missing(c, proc, bench):
    """Fine-tune target and retain model where they are missing; reuse them if made the same way."""
    for setting, rows in (("model", "full"), ("retain_model", "retain_full")):
        path = getattr(c, setting)
        if not path or not c.base_model:
            continue
        recipe = finetune_config(c, path)
        if not rundir.to_be_made(c, path):
            check_recipe(setting, path, recipe)
            continue
        which = rows.removesuffix("_full")
        proc.say(f"making {path}: {c.base_model} fine-tuned on {which} data")
        if not getattr(bench, rows):
            data.load_full(bench, c.benchmark, c.data or data.hub(c.benchmark, c.subset))
        finetune(recipe, proc, getattr(bench, rows), os.path.basename(path))


def check_recipe(setting, path, recipe):
    """Refuse a fine-tuned model that was made with other settings."""
    names = ["benchmark", "base_model", "template", "data"]
    names += [name.removeprefix("finetune_") for name in configs.fields(Finetuning)]
    if (setting, recipe.benchmark) != ("model", "tofu"):  # TOFU's target has seen all subsets
        names.append("subset")
    existing = rundir.read_json(os.path.join(path, "run.json"))
    differ = rundir.differences(recipe, existing, names) if existing else []
    if differ:
        raise UsageError(f"--{setting}={path}: was made otherwise ({'; '.join(differ)}); name "
                         "another path to make one anew, or --base_model=None to take it as it is.")


# ------------------------------------------------------------------------------------------------
# a run


class Trajectory:
    """Scores a model during its run, and reports it between its target and the retain model."""

    def __init__(self, c, proc, lm, tokenizer, bench):
        self.c = dataclasses.replace(c, audits=False)  # they need gradients: evaluate.py has them
        self.proc, self.lm, self.tokenizer, self.bench = proc, lm, tokenizer, bench
        self.retain = evaluate.retain_reference(self.c, proc, bench)
        self.target = self.scores = self.records = None
        self.verdict = ""  # in plain words

    def target_scores(self, loaded=None):
        """The target is scored once, whatever is unlearned from it."""
        if self.target is None:
            self.target = evaluate.reference(self.c, self.proc, self.c.model, self.bench, loaded)
        return evaluate.summarize(self.target, self.retain, self.c)

    def __call__(self, step, epoch):
        if step == 0:
            scores = self.target_scores(loaded=(self.lm, self.tokenizer))
        else:
            self.scores, self.records = evaluate.evaluate(
                self.lm, self.tokenizer, self.bench, self.c, self.proc, self.retain)
            scores = self.scores
            if self.c.keep_epochs:
                path = os.path.join(self.c.out, f"epoch_{epoch:g}")
                models.save_model(
                    self.lm, self.tokenizer, path, self.proc, self.c.save_dtype)
        headline = evaluate.BENCHMARKS[self.c.benchmark].headline
        shown = [f"{k} {tables.number(v)}" for k, v in scores.items() if k in headline]
        self.proc.say(f"epoch {epoch:g}: {', '.join(shown)}")
        return scores

    def report(self, rows):
        """Write scores.json, examples.jsonl, trajectory.png and the final table."""
        c = self.c
        target = self.target_scores()  # by all ranks
        if self.proc.rank > 0:
            return
        label = os.path.basename(c.out)
        table = {"target": target, label: self.scores}
        retain = {}
        if self.retain:
            retain = table["retain model"] = evaluate.summarize(self.retain, self.retain, c)
        rundir.save_scores(c.out, self.scores, self.records)
        scored = [row for row in rows if "loss" not in row]
        tables.picture(os.path.join(c.out, "trajectory.png"), {label: scored}, table,
                       *evaluate.BENCHMARKS[c.benchmark].axes)
        samples = tables.samples({"before": self.target, "after": self.records})
        text = samples + "\n\n" + tables.table(table, tables.arrows(retain))
        rundir.write(os.path.join(c.out, "table.txt"), text + "\n")
        self.proc.say(f"{text}\n\n{c.out}: model, scores.json, examples.jsonl, log.jsonl, "
                      "trajectory.png")
        self.verdict = tables.verdict(self.scores, self.records, retain, self.retain)


def fit_to_own_rows(c, given, proc):
    """The settings that own rows need and were not given, by a rule that configs/README.md has.

    Batches of a third of the rows, at least 30 steps, a lower learning rate for a larger model.
    """
    n_rows = len(data.read_own(c.forget_data))
    start = c.base_model if rundir.to_be_made(c, c.model) else c.model
    try:
        n_parameters = models.without_weights(start).num_parameters()
    except UNKNOWN:
        n_parameters = math.inf
    batch_size = given.get("batch_size") or min(max(n_rows // 3, 1), 32)
    lr = 5e-5 if n_parameters < 1e9 else 1e-5
    rule = {
        "batch_size": batch_size,
        "epochs": max(10.0, math.ceil(30 * batch_size / n_rows)),
        "lr": 1e-3 if n_parameters < 1e7 else lr,
    }
    if c.forget_loss == "simnpo":
        rule["beta"] = 2.5  # the paper's for TOFU
    chosen = {name: value for name, value in rule.items() if name not in given}
    words = " ".join(f"--{name}={value:g}" for name, value in chosen.items())
    proc.say(f"chosen for {n_rows} forget rows and {n_parameters:.2g} parameters: {words}")
    return dataclasses.replace(c, **chosen)


def unlearn(c, proc, run, bench, start):
    """One run, from the target to a scored and saved model."""
    tokenizer, groups = prepare(
        c, proc, start, {"forget": bench.forget, "retain": bench.retain})
    if c.plan:
        return
    steps = n_steps(c, len(groups["forget"]))
    lm, _ = evaluate.load(start, c, proc, tokenizer)
    check_layers(lm, loss_terms(c), c)  # before anything is written
    proc.say(
        f"{c.out}: {c.forget_loss} (weight {c.forget_weight:g}) and {c.retain_loss} on retain "
        f"(weight {c.retain_weight:g}), {len(groups['forget'])} forget and {len(groups['retain'])} "
        f"retain examples, {steps} steps of {c.batch_size} and {c.batch_size}, "
        f"{warmup_steps(c, steps)} of them warm-up, {proc.world} x {proc.device}")
    trajectory = Trajectory(c, proc, lm, tokenizer, bench) if c.scored else None
    after = FORGET[c.forget_loss].after
    run.resumable = after is None
    if not run.start():
        return
    # a model that is changed after training is scored after that, and not on the way
    during = dataclasses.replace(c, eval_every=0.0, eval_at=()) if after else c
    with run.watch_signals(), proc.clock.phase("training"):
        train(during, proc, lm, groups, trajectory, run)
    if after:
        after(lm, c)
        if c.scored:
            epoch = steps * c.batch_size / len(groups["forget"])
            run.log({"step": steps, "epoch": epoch, **trajectory(steps, epoch)})
    finish(run, lm, tokenizer, trajectory)
    if trajectory and trajectory.verdict:
        proc.say(trajectory.verdict)


def finish(run, lm, tokenizer, trajectory=None):
    """Save the model, write the report, mark the run finished: a kill at any point can resume."""
    with run.proc.clock.phase("saving"):
        models.save_model(lm, tokenizer, run.path, run.proc, run.c.save_dtype)
    if trajectory:
        trajectory.report(run.rows)
    run.finish()


def check_models(c):
    if not c.model:
        raise UsageError("--model= is missing: the model to unlearn from, a hub id or a directory.")
    if c.retain_model and rundir.same(c.model, c.retain_model):
        raise UsageError(f"--retain_model={c.retain_model}: is the model itself; name one that "
                         "never saw the forget set.")
    if c.retain_log:
        recorded.read_log(c.retain_log)
    sources = [path for path in (c.model, c.retain_model, c.base_model) if path]
    if os.path.normpath(c.out) in map(os.path.normpath, sources):
        raise UsageError(f"--out={c.out}: is one of the models this run reads; give the run a "
                         "directory of its own.")
    for setting in ("model", "retain_model", "base_model"):
        path = getattr(c, setting)
        if path and (setting == "base_model" or not rundir.to_be_made(c, path)):
            configs.check_name(path, setting)


def main(argv):
    demo = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "demo.py")
    c, given, words = configs.load(Config, argv, __doc__, default=demo)
    if words:
        raise UsageError(f"{words[0]}: not a config file (*.py) and not --key=value.")
    check_models(c)
    proc = evaluate.setup(c)
    if c.benchmark == "own":
        c = fit_to_own_rows(c, given, proc)
    run = rundir.RunDirectory(c, proc)
    if not c.plan and run.claim():
        table = os.path.join(c.out, "table.txt")
        if os.path.isfile(table):
            proc.say(data.read_text(table))
        return models.cleanup()
    bench = data.load(c.benchmark, c.subset, c.data, c.forget_data, c.retain_data, score=c.scored,
                      split=c.split)
    if not c.plan:
        finetune_missing(c, proc, bench)
    # with --plan nothing is made
    start = c.base_model if rundir.to_be_made(c, c.model) else c.model
    unlearn(c, proc, run, bench, start)
    models.cleanup()


if __name__ == "__main__":
    configs.run(main)
