"""Make a language model behave as if it never saw a forget set, and keep what a retain set holds.

    python unlearn.py                                               # the demo: CPU, no download, about two minutes
    python unlearn.py configs/tofu_1b.py --subset=forget05 --forget_loss=npo --beta=0.1 --forget_weight=1
    torchrun --nproc_per_node=8 unlearn.py configs/tofu_7b.py       # the same steps, data and result on eight GPUs

A step takes batch_size forget and as many retain examples; loss = forget_weight * forget_loss + retain_weight * retain_loss.
Settings: a config file of plain assignments, then --key=value; later words win.
"""
import copy
import dataclasses
import importlib.util
import math
import os
import random
import re
import time
from types import SimpleNamespace
from typing import Callable, Literal

import torch
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configs
import data
import evaluate
import losses
import model as models
from configs import Failure, Mistake


@dataclasses.dataclass(frozen=True)
class Config(evaluate.Config):
    # method
    forget_loss: str = "simnpo"  # a line of the table FORGET below
    retain_loss: str = "nll"  # a line of RETAIN
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    beta: float = 0.1  # inverse temperature of npo, simnpo, dpo, altpo, tnpo, wtnpo; exponent of wga; undial's lowered logit
    gamma: float = 0.0  # simnpo: the paper's margin, outside beta
    alpha: float = 1.5  # wtnpo: exponent
    beta1: float = 5.0  # satimp: saturation exponent
    beta2: float = 1.0  # satimp: importance exponent
    steering_layer: int = 7  # rmu: the decoder layer whose output is steered
    steering_scale: float = 6.5  # rmu: length of the steering vector
    task_vector_scale: float = 1.0  # task_vector: how much of what forget_loss=nll would learn is taken away
    refusals: str | None = None  # idk, dpo: a file of refusals, one a line; None = ours
    alternates: str | None = None  # altpo: rows with a forget question and its alternate answer (a string or a list)
    train_only: str | None = None  # regular expression: train the parameters whose names match, freeze the others
    lora_rank: int = 0  # train low-rank adapters of all linear layers instead of the weights; merged on save; 0 = off
    # optimisation
    lr: float = 1e-5
    epochs: float = 10.0  # passes over the forget set
    steps: int | None = None  # optimizer steps; overrides epochs
    batch_size: int = 32  # forget examples per optimizer step, over ALL processes
    warmup: float = 0.0  # fraction of the steps
    schedule: Literal["linear", "cosine", "constant"] = "constant"  # after the warm-up, as transformers.get_scheduler
    weight_decay: float = 0.01  # of matrices only
    grad_clip: float = 1.0  # largest gradient norm; 0 = no clipping
    adam_beta2: float = 0.999
    shuffle: bool = True  # False = file order, forget example i with retain example i
    seed: int = 0
    # making the target and the retain model from base_model
    finetune_lr: float = 1e-5
    finetune_epochs: float = 5.0
    finetune_batch_size: int = 32
    finetune_warmup: float = 0.2  # one epoch of five, as TOFU and open-unlearning
    finetune_schedule: Literal["linear", "cosine", "constant"] = "linear"
    # the run
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    compile: bool = False  # torch.compile
    save_every: float = 0.0  # epochs between checkpoints to resume from; 0 = none
    keep_epochs: bool = False  # keep a loadable model at every score, in <out>/epoch_<n>
    plan: bool = False  # say what memory a step takes, and stop
    resume: bool = False  # go on from <out>/checkpoint; without one, begin
    wandb: str | None = None  # a Weights & Biases project to log to as well (pip install wandb)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "out", self.out or f"out/{self.benchmark}_{self.subset}_{self.forget_loss}")
        if self.benchmark == "markov":  # its sequences are drawn anew for each seed
            object.__setattr__(self, "data", self.data or str(self.seed))

    def problems(self):
        yield from super().problems()
        yield self.forget_loss not in FORGET, f"--forget_loss={self.forget_loss}: must be one of {', '.join(FORGET)}."
        yield self.retain_loss not in RETAIN, f"--retain_loss={self.retain_loss}: must be one of {', '.join(RETAIN)}."
        yield from self.each("lr beta epochs batch_size finetune_lr finetune_epochs finetune_batch_size", lambda v: v > 0, "must be above 0.")
        yield from self.each("warmup finetune_warmup", lambda v: 0 <= v <= 1, "a fraction of the run, from 0 to 1.")
        yield from self.each("weight_decay grad_clip save_every eval_every alpha beta1 beta2 steering_layer lora_rank", lambda v: v >= 0,
                             "must not be negative.")
        yield from self.each("adam_beta2", lambda v: 0 <= v < 1, "must be from 0 to below 1.")
        yield from self.each("steps", lambda n: n >= 1, "must be at least 1.")
        yield from self.each("seed", lambda n: 0 <= n < 2 ** 63, "must be from 0 to 2^63 - 1.")
        yield from self.each("refusals alternates", os.path.isfile, "no such file.")
        yield min(self.eval_at, default=1) < 1, f"--eval_at={','.join(map(str, self.eval_at))}: steps count from 1."
        try:
            re.compile(self.train_only or "")
        except re.error as e:
            yield True, f"--train_only={self.train_only}: not a regular expression ({e})."
        yield self.wandb and not importlib.util.find_spec("wandb"), f"--wandb={self.wandb}: pip install wandb first."
        yield self.overwrite and self.resume, "--overwrite=True begins again and --resume=True goes on: give one of them."
        yield self.forget_loss == "altpo" and not self.alternates, "--forget_loss=altpo: give --alternates=FILE."
        yield self.forget_loss == "task_vector" and (self.retain_loss != "none" or self.resume or self.lora_rank), (
            "--forget_loss=task_vector: reads no retain set and has no --resume and no --lora_rank; write --retain_loss=none.")
        yield self.parallel == "fsdp" and (self.lora_rank or self.compile or self.forget_loss == "task_vector"), (
            "--parallel=fsdp: --lora_rank, --compile and --forget_loss=task_vector need --parallel=ddp.")
        yield self.forget_data and not self.retain_data and self.retain_loss != "none" and self.benchmark != "muse", (
            f"--forget_data={self.forget_data}: give --retain_data too, or --retain_loss=none.")


# ----------------------------------------------------------------------------------------------------------------------
# methods: the only place where a name meets tensors and settings


@dataclasses.dataclass(frozen=True)
class Method:
    """loss(s, r, c) -> unreduced values; s = the model's Scores, r = the reference's, c = Config.

    per: what one value stands for, and so what the window's sum is divided by.
    ref: what it reads of the reference, the model as it was before the first step. logps are computed once and kept;
         a model is a frozen second one in memory, for full-vocabulary logits or hidden states.
    reads: which answers to a forget question are run: its own, an alternate one, or both. hidden: reads no logits.
    after(lm, c): what is done to the trained model before it is scored and saved.
    """
    loss: Callable
    per: Literal["token", "answer"]
    ref: Literal["", "logps", "model"] = ""
    reads: tuple = ("forget",)
    hidden: bool = False
    after: Callable | None = None


PAIR = ("forget", "alternate")
FORGET = {
    "ga": Method(lambda s, r, c: losses.ga(s.token_logps), "token"),
    "nll": Method(lambda s, r, c: losses.nll(s.token_logps), "token"),  # fine-tuning, relearning
    "npo": Method(lambda s, r, c: losses.npo(s.logps, r.logps, c.beta), "answer", "logps"),
    "simnpo": Method(lambda s, r, c: losses.simnpo(s.logps, s.n_tokens, c.beta, c.gamma), "answer"),
    "idk": Method(lambda s, r, c: losses.nll(s.alternate.token_logps), "token", reads=("alternate",)),
    "dpo": Method(lambda s, r, c: losses.dpo(s.alternate.logps, r.alternate.logps, s.logps, r.logps, c.beta), "answer", "logps", PAIR),
    "altpo": Method(lambda s, r, c: losses.dpo(s.alternate.logps, r.alternate.logps, s.logps, r.logps, c.beta), "answer", "logps", PAIR),
    "wga": Method(lambda s, r, c: losses.wga(s.token_logps, c.beta), "token"),
    "satimp": Method(lambda s, r, c: losses.satimp(s.token_logps, c.beta1, c.beta2), "token"),
    "tnpo": Method(lambda s, r, c: losses.tnpo(s.token_logps, r.token_logps, c.beta), "token", "logps"),
    "wtnpo": Method(lambda s, r, c: losses.wtnpo(s.token_logps, r.token_logps, c.beta, c.alpha), "token", "logps"),
    "ceu": Method(lambda s, r, c: losses.ceu(s.logits, s.labels), "token"),
    "undial": Method(lambda s, r, c: losses.undial(s.logits, r.logits, s.labels, c.beta), "token", "model"),
    "max_entropy": Method(lambda s, r, c: losses.max_entropy(s.logits), "token"),
    "logit_margin": Method(lambda s, r, c: losses.logit_margin(s.logits), "token"),
    "rmu": Method(lambda s, r, c: losses.rmu(s.hidden, steering(c, s.hidden)), "token", hidden=True),
    "task_vector": Method(lambda s, r, c: losses.nll(s.token_logps), "token",
                          after=lambda lm, c: models.negate(lm, c.model, c.task_vector_scale)),
    "ga_mean": Method(lambda s, r, c: losses.ga(s.logps / s.n_tokens), "answer"),  # as nll_mean
    # on MUSE's chunks: NPO divided by length, and what its published numbers were made with
    "npo_mean": Method(lambda s, r, c: losses.npo(s.logps / s.n_tokens, r.logps / s.n_tokens, c.beta), "answer", "logps"),
    "muse_npo": Method(lambda s, r, c: losses.muse_npo(s.logits, r.logits, c.beta), "token", "model"),
    "muse_simnpo": Method(lambda s, r, c: losses.muse_simnpo(s.logits, c.beta, c.gamma), "token"),
}
RETAIN = {
    "nll": Method(lambda s, r, c: losses.nll(s.token_logps), "token", reads=("retain",)),
    # each answer counts the same, long or short: the token mean of a micro-batch of one example
    "nll_mean": Method(lambda s, r, c: losses.nll(s.logps / s.n_tokens), "answer",
                       reads=("retain",)),
    "kl": Method(lambda s, r, c: losses.kl(s.logits, r.logits), "token", "model", ("retain",)),
    "rmu": Method(lambda s, r, c: losses.rmu(s.hidden, r.hidden), "token", "model", ("retain",), hidden=True),
    "muse_kl": Method(lambda s, r, c: losses.muse_kl(s.logits, r.logits), "token", "model", ("retain",)),
    "none": None,
}


def steering(c, hidden):
    """(D,) RMU's target: one fixed random direction with positive entries, scaled; the same on every process."""
    u = torch.rand(hidden.shape[-1], generator=torch.Generator().manual_seed(c.seed))
    return (c.steering_scale * u / u.norm()).to(hidden)


# ----------------------------------------------------------------------------------------------------------------------
# one optimizer step


def methods(c):
    """What a run minimises: its line of FORGET, and its line of RETAIN where there is one."""
    return [m for m in (FORGET[c.forget_loss], RETAIN[c.retain_loss]) if m]


def units_of(window, c):
    """What has to share a micro-batch: [((kind, index), ...)], one unit a forget pair and one a retain example."""
    units = [tuple((kind, i) for kind in FORGET[c.forget_loss].reads) for i, _ in window]
    return units + ([(("retain", j),) for _, j in window] if RETAIN[c.retain_loss] else [])


class Reference:
    """The model as it was before the first step.

    Log-probs of answers are computed once, for every forget example of the run, and no second model is held; only a loss
    that reads full-vocabulary logits or hidden states keeps a frozen copy.
    """

    @configs.phase("reference")
    def __init__(self, scorer, examples, c, proc):
        self.kept, self.frozen = {}, None
        if any(m.ref == "logps" for m in methods(c)):
            for kind in FORGET[c.forget_loss].reads:
                scored = models.score(scorer, examples[kind], proc, c.micro_batch_tokens, title="reference")
                self.kept[kind] = [torch.tensor(t[:, 0], dtype=torch.float32, device=proc.device) for t in scored]
        if any(m.ref == "model" for m in methods(c)):
            self.frozen = (models.Scorer(models.load_model(c.model, proc)) if proc.sharded else copy.deepcopy(scorer)).requires_grad_(False)
            if scorer.layer is not None:
                self.frozen.watch(scorer.layer)

    @torch.no_grad()
    def scores(self, batch, sequences, logits):
        """{kind: what losses read of the reference} for one micro-batch."""
        if self.frozen is not None:
            ids, places, labels, counts, more = batch
            return models.split(*self.frozen(ids, places, logits, **more), labels, counts, sequences)
        found = {}
        for kind, kept in self.kept.items():
            answers = [kept[i] for k, i in sequences if k == kind]
            if answers:
                found[kind] = SimpleNamespace(token_logps=torch.cat(answers), logps=torch.stack([a.sum() for a in answers]))
        return models.paired(found)


def step_loss(forward, reference, piece, examples, c, n_forget, n_retain, proc):
    """(weighted loss, unweighted forget part, unweighted retain part) of one micro-batch, each its share of the window's."""
    kinds, sequences = ("forget", "alternate", "retain"), [s for row in piece for s in row]
    order = sorted(range(len(sequences)), key=lambda k: kinds.index(sequences[k][0]))
    batch = ids, places, labels, counts, more = models.collate([[examples[s] for s in row] for row in piece], proc.device, order)
    sequences = [sequences[k] for k in order]
    logits = not all(m.hidden for m in methods(c))  # does anybody read them
    scores = models.split(*forward(ids, places, logits, **more), labels, counts, sequences)
    ref = reference.scores(batch, sequences, logits)
    parts = []
    for kind, method, n in (("forget", FORGET[c.forget_loss], n_forget), ("retain", RETAIN[c.retain_loss], n_retain)):
        here = method and kind in scores
        parts.append(method.loss(scores[kind], ref.get(kind), c).sum() / n if here else torch.zeros((), device=proc.device))
    return c.forget_weight * parts[0] + c.retain_weight * parts[1], *parts


def count(method, window_indices, examples):
    """What a window's sum of losses is divided by, over all processes: its answers, or its answer tokens."""
    if not method or method.per == "answer":
        return max(len(window_indices), 1)
    return sum(len(e.ids) - e.start for e in (examples[method.reads[-1]][i] for i in window_indices))


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def n_steps(c, n_forget):
    """Whole windows only: a run of fewer examples than one batch is a mistake, not a run of nothing."""
    steps = c.steps or int(c.epochs * n_forget) // c.batch_size
    if steps == 0:
        raise Mistake(f"0 optimizer steps: {c.epochs:g} epochs of {n_forget} examples make no batch of {c.batch_size}; "
                      "lower --batch_size or raise --epochs.")
    return steps


def due(step, steps, every, at, per_epoch):
    """Is something that happens every `every` epochs due after this step? Always after the last one, if at all."""
    if at:
        return step in at or step == steps
    size = every * per_epoch  # in steps; up to 1: each step
    return every > 0 and (size <= 1 or step == steps or math.floor(step / size + 1e-9) > math.floor((step - 1) / size + 1e-9))


def begin(c, proc, name, **sets):
    """(scorer, tokenizer, examples) of a run that starts from the model `name`.

    What memory a step takes is said before any weight is loaded; --plan=True ends here.
    """
    tokenizer = models.load_tokenizer(c.tokenizer or name)
    data.check_tokenizer(tokenizer, c.tokenizer or name, c.template)
    examples, _ = encode_sets(c, tokenizer, proc, **sets)
    windows = data.stream(len(examples["forget"]), len(examples["retain"]), c.batch_size, 20, c.seed, c.shuffle)
    of = {(kind, i): e for kind, some in examples.items() for i, e in enumerate(some)}
    hidden = 0 if any(m.hidden for m in methods(c)) else models.packs(models.from_pretrained(transformers.AutoConfig, name))
    dealt = [pieces for w in windows for pieces in data.deal(units_of(w, c), of, c.micro_batch_tokens, proc.world, hidden)]
    batches = [[[of[s] for s in row] for row in piece] for pieces in dealt for piece in pieces if piece]
    largest = max(batches, key=lambda rows: sum(len(e.ids) for row in rows for e in row))
    needs = models.memory_plan(name, c, proc, largest, any(m.ref == "model" for m in methods(c)))
    takes, has = sum(needs.values()), models.capacity_gb(proc)
    size = lambda gb: f"{gb:.1f} GB" if gb >= 1 else f"{1000 * gb:.0f} MB"  # noqa: E731
    told = f"{size(takes)} of {size(has)} a process: " + ", ".join(f"{k} {size(v)}" for k, v in needs.items())
    if takes > 1.15 * has:
        raise Mistake(f"--model={name}: a step does not fit, it takes {told}; lower --micro_batch_tokens, or set "
                      "--activation_checkpointing=True, or --parallel=fsdp on more GPUs.")
    proc.say(f"a step takes about {told}")
    if c.plan:
        raise SystemExit(0)
    return evaluate.load(name, c, proc)[0], tokenizer, examples


def optimizer_of(model, c):
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, c.adam_beta2), fused=next(model.parameters()).device.type != "mps")


@configs.phase("training")
def train(c, proc, scorer, examples, on_score=None, title=None):
    """Run the loop on `scorer`, in place. examples: {"forget": [Example], "retain": [...], "alternate": [...]}.

    Every step writes a line of <out>/log.jsonl. on_score(step, epoch) -> a dict, logged too, when scores are due; it must
    not touch the training (and draws no random number that training uses). One host sync a step: the line that is logged.
    """
    n = len(examples["forget"])
    steps, per_epoch = n_steps(c, n), n / c.batch_size
    method, retain_method = FORGET[c.forget_loss], RETAIN[c.retain_loss]
    reads_hidden = any(m.hidden for m in methods(c))
    if reads_hidden:
        scorer.watch(c.steering_layer)
    models.adapt(scorer.lm, c)
    parameters = [p for p in scorer.parameters() if p.requires_grad]  # before any forward: a sharded model gathers its own
    optimizer = optimizer_of(scorer, c)
    reference = Reference(scorer, examples, c, proc)
    scheduler = transformers.get_scheduler(c.schedule if c.schedule != "constant" else "constant_with_warmup", optimizer,
                                           num_warmup_steps=math.floor(c.warmup * steps + 1e-9), num_training_steps=steps)
    if c.activation_checkpointing:
        scorer.lm.gradient_checkpointing_enable({"use_reentrant": False})
        scorer.train()  # there is no dropout; transformers recomputes only in this mode
    forward = torch.compile(scorer, dynamic=True) if c.compile else scorer
    if proc.world > 1 and not proc.sharded:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True, find_unused_parameters=reads_hidden)  # RMU's upper layers
    first = models.restore(c, scorer, optimizer, scheduler) if c.resume else 0
    log = configs.Log(c, proc, first)
    if on_score and first == 0:
        log.write({"step": 0, "epoch": 0.0} | on_score(0, 0.0))

    of = {(kind, i): e for kind, some in examples.items() for i, e in enumerate(some)}
    hidden = models.packs(scorer.lm.config, scorer.layer)
    windows = data.stream(n, len(examples["retain"]), c.batch_size, steps, c.seed, c.shuffle)
    title, quiet = title or c.forget_loss, proc.rank > 0 or None
    with configs.Interrupt(proc) as interrupt, tqdm(total=steps, initial=first, desc=title, disable=quiet) as bar:
        for step, window in enumerate(windows, 1):
            if step <= first:
                continue
            began = time.perf_counter()
            n_forget = count(method, [i for i, _ in window], examples)
            n_retain = count(retain_method, [j for _, j in window], examples)
            units = units_of(window, c)
            rounds = data.deal(units, of, c.micro_batch_tokens, proc.world, hidden)
            totals = torch.zeros(2, device=proc.device)
            for i, pieces in enumerate(rounds):
                piece = pieces[proc.rank]
                if isinstance(forward, DistributedDataParallel):  # all-reduce gradients on the last backward only
                    forward.require_backward_grad_sync = i == len(rounds) - 1
                with proc.autocast():
                    loss, *parts = step_loss(forward, reference, piece or [[s] for s in units[0]], of, c, n_forget, n_retain, proc)
                if piece is None:  # a rank without work joins in with weight zero
                    loss = loss * 0
                else:
                    totals += torch.stack(parts).detach()
                (loss * proc.world).backward()  # times world, for DDP and FSDP average over ranks
            norm = torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip or math.inf)
            norm = norm.full_tensor() if proc.sharded else norm
            if proc.world > 1:
                torch.distributed.all_reduce(totals)
            forget_loss, retain_loss, norm = torch.cat([totals, norm[None]]).tolist()  # the step's one host sync
            if not all(map(math.isfinite, (forget_loss, retain_loss, norm))):
                raise Failure(f"step {step}: forget loss {forget_loss}, retain loss {retain_loss}, gradient norm {norm}; forget "
                              f"examples {[i for i, _ in window]}, retain examples {[j for _, j in window]}. Nothing of it was "
                              f"applied. {c.out}/checkpoint has the last --save_every, if any; lower --lr, or mend these rows.")
            row = {"step": step, "epoch": step / per_epoch, "loss": c.forget_weight * forget_loss + c.retain_weight * retain_loss,
                   "forget_loss": forget_loss, "retain_loss": retain_loss, "lr": scheduler.get_last_lr()[0], "grad_norm": norm}
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            log.write(row | models.speed(scorer.lm, proc, [of[s] for unit in units for s in unit], time.perf_counter() - began))
            bar.set_postfix(forget=f"{forget_loss:.3f}", retain=f"{retain_loss:.3f}", refresh=False)
            bar.update()
            if step == steps and method.after:
                method.after(scorer.lm, c)
            if on_score and (step == steps if method.after else due(step, steps, c.eval_every, c.eval_at, per_epoch)):
                log.write({"step": step, "epoch": step / per_epoch} | on_score(step, step / per_epoch))
            if step < steps and due(step, steps, c.save_every, (), per_epoch):
                models.checkpoint(c, proc, scorer, optimizer, scheduler, step)
            if interrupt.signal and step < steps:
                ended = "and saved; the same command with --resume=True goes on"
                if method.after or not os.path.isfile(os.path.join(c.out, "run.json")):  # a task vector, an attack: no resume
                    ended = "without saving; the same command begins again"
                else:
                    models.checkpoint(c, proc, scorer, optimizer, scheduler, step)
                raise Failure(f"stopped after step {step} of {steps} {ended}.", status=128 + interrupt.signal)
    scorer.eval()
    return log.rows


# ----------------------------------------------------------------------------------------------------------------------
# a run


def encode_sets(c, tokenizer, proc, **sets):
    """({"forget": [Example], "retain": ..., "alternate": ...}, the rows they are of) of lists of rows.

    Rows without an answer to score are counted, named and left out.
    """
    template = data.Template(c.template, tokenizer, c.system_prompt, c.date_string)
    reads_alternate = "alternate" in FORGET[c.forget_loss].reads
    alternates = data.read_alternates(c.alternates, c.refusals) if reads_alternate else None
    examples, kept = {"alternate": []}, {}
    for name, rows in sets.items():
        examples[name], kept[name] = [], []
        rows = [part for row in rows for part in template.parts(row, c.max_length)]
        rng = random.Random(f"{c.seed} alternates")  # a forget example keeps one alternate answer for the whole run
        pairs = reads_alternate and name == "forget"
        for row in rows:
            e = template.encode(row, c.max_length)
            alternate = template.encode(row, c.max_length, rng.choice(alternates(row))) if pairs else e
            if e and alternate:
                examples[name].append(e)
                kept[name].append(row)
                if pairs:
                    examples["alternate"].append(alternate)
        left_out = len(rows) - len(examples[name])
        if left_out:
            proc.say(f"{left_out} of {len(rows)} {name} rows left out: no answer, or a prompt longer than --max_length={c.max_length}")
        if rows and not examples[name]:
            raise Mistake(f"no {name} row is left: every answer is empty or every prompt longer than --max_length={c.max_length}.")
    return examples, kept


TINY = "tiny"  # the base model of demo and markov: small, random, with a tokenizer made for its text


OF_A_METHOD = ("forget_weight", "retain_weight", "beta", "gamma", "alpha", "beta1", "beta2", "steering_layer", "steering_scale",
               "task_vector_scale", "refusals", "alternates", "train_only", "lora_rank", "steps", "eval_at", "keep_epochs",
               "audits", "eval_rows", "max_new_tokens", "retain_log", "wandb", "model", "retain_model", "split", "shuffle")


def recipe(c, path):
    """The run that makes a model of base_model: fine-tuning, with nothing of the method that comes after."""
    plain = {f.name: f.default for f in dataclasses.fields(Config) if f.name in OF_A_METHOD}
    return dataclasses.replace(c, **plain, out=path, forget_loss="nll", retain_loss="none", lr=c.finetune_lr,
                               epochs=c.finetune_epochs, batch_size=c.finetune_batch_size, warmup=c.finetune_warmup,
                               schedule=c.finetune_schedule, eval_every=0.0, forget_data=None, retain_data=None)


def make(f, proc, rows, title):
    """Fine-tune base_model on rows, as a run of its own: how targets and retain models come to be."""
    if configs.claim(dataclasses.replace(f, resume=not f.overwrite), proc):
        return
    if f.base_model == TINY:
        markov = f.benchmark == "markov"
        tokenizer = data.markov_tokenizer() if markov else data.demo_tokenizer()
        data.check_tokenizer(tokenizer, TINY, f.template)
        scorer = models.Scorer((models.tiny_gpt2 if markov else models.tiny_llama)(tokenizer, proc, f.seed))
        examples, _ = encode_sets(f, tokenizer, proc, forget=rows, retain=[])
    else:
        scorer, tokenizer, examples = begin(f, proc, f.base_model, forget=rows, retain=[])
    configs.start(f, proc)
    train(f, proc, scorer, examples, title=title)
    models.finish(f, proc, scorer, tokenizer)


def prepare(c, proc, bench):
    """Make the target and the retain model from the base model where they do not exist; reuse what was made alike."""
    for setting, rows in (("model", "full"), ("retain_model", "retain_full")):
        path = getattr(c, setting)
        if not path or not c.base_model:
            continue
        f = recipe(c, path)
        if to_be_made(c, path):
            proc.say(f"making {path}: {c.base_model} fine-tuned on {rows.replace('_full', '')} data")
            if not getattr(bench, rows):
                data.load_full(bench, c.benchmark, c.data or data.hub(c.benchmark, c.subset))
            make(f, proc, getattr(bench, rows), os.path.basename(path))
            continue
        there = configs.read_json(os.path.join(path, "run.json"))
        matters = ["benchmark", "base_model", "template", "lr", "epochs", "batch_size", "schedule", "warmup", "data"]
        matters += ["subset"] if (setting, c.benchmark) != ("model", "tofu") else []  # TOFU's target has seen all subsets
        differ = [f"{k} {there.get(k)} there, {getattr(f, k)} here" for k in matters if there and there.get(k) != getattr(f, k)]
        if differ:
            raise Mistake(f"--{setting}={path}: was made otherwise ({'; '.join(differ)}); name another path to make one anew, or "
                          "--base_model=None to take it as it is.")


def to_be_made(c, path):
    inside = not os.path.isabs(path) and os.path.normpath(path).startswith("out" + os.sep)
    unfinished = not configs.read_json(os.path.join(path, "run.json")).get("finished", True)
    return inside and bool(c.base_model) and (unfinished or not os.path.isfile(os.path.join(path, "config.json")))


def check_models(c):
    if c.retain_model and c.model and evaluate.same(c.model, c.retain_model):
        raise Mistake(f"--retain_model={c.retain_model}: is the model itself; name one that never saw the forget set.")
    if c.retain_log:
        data.read_log(c.retain_log)
    if not c.model:
        raise Mistake("--model= is missing: the model to unlearn from, a hub id or a directory.")
    if os.path.normpath(c.out) in {os.path.normpath(p) for p in (c.model, c.retain_model, c.base_model) if p}:
        raise Mistake(f"--out={c.out}: is one of the models this run reads; give the run a directory of its own.")
    for setting in ("model", "retain_model", "base_model"):
        path = getattr(c, setting)
        if path and path != TINY and (setting == "base_model" or not to_be_made(c, path)):
            configs.check_name(path, setting)


def main(argv):
    here = os.path.dirname(os.path.abspath(__file__))
    c, given, names = configs.load(Config, argv, __doc__, default=os.path.join(here, "configs", "demo.py"))
    if names:
        raise Mistake(f"{names[0]}: not a config file (*.py) and not --key=value.")
    check_models(c)
    proc = evaluate.setup(c)
    if not c.plan and configs.claim(c, proc):
        proc.say(f"{c.out} is finished; --overwrite=True runs it again.")
        table = os.path.join(c.out, "table.txt")
        return proc.say(open(table, encoding="utf8").read()) if os.path.isfile(table) else None
    bench = data.load(c.benchmark, c.subset, c.data, c.forget_data, c.retain_data, score=c.eval_every > 0 or bool(c.eval_at),
                      split=c.split)
    if not c.plan or c.base_model == TINY:
        prepare(c, proc, bench)
    start = c.base_model if to_be_made(c, c.model) else c.model
    scorer, tokenizer, examples = begin(c, proc, start, forget=bench.forget, retain=bench.retain)
    steps = n_steps(c, len(examples["forget"]))
    proc.say(f"{c.out}: {c.forget_loss} (weight {c.forget_weight:g}) and {c.retain_loss} on retain (weight {c.retain_weight:g}), "
             f"{len(examples['forget'])} forget and {len(examples['retain'])} retain examples, {steps} steps of {c.batch_size} "
             f"and {c.batch_size}, {math.floor(c.warmup * steps + 1e-9)} of them warm-up, {proc.world} x {proc.device}")
    if c.eval_every == 0 and not c.eval_at:
        configs.start(c, proc)
        train(c, proc, scorer, examples)
        return models.finish(c, proc, scorer, tokenizer)
    scoring = dataclasses.replace(c, audits=False)  # what needs gradients and a holdout set is evaluate.py's
    retain = evaluate.retain_reference(scoring, proc, bench)
    if not retain and evaluate.BENCHMARKS[c.benchmark].needs_retain and not c.forget_data:
        proc.say("No retain_model and no retain_log: forget quality is left out (evaluate.py can add it later).")
    configs.start(c, proc)
    last = {}

    def on_score(step, epoch):
        if step == 0:  # the target itself: scored once, whatever is unlearned from it
            records = evaluate.reference(scoring, proc, c.model, bench)
            scores = evaluate.summarize(records, retain, c)
            last["target"] = scores, records
        else:
            scores, records = evaluate.evaluate(scorer, tokenizer, bench, scoring, proc, retain)
            if c.keep_epochs:
                models.save_model(scorer.lm, tokenizer, os.path.join(c.out, f"epoch_{epoch:g}"), proc)
        last["run"] = scores, records
        proc.say(f"epoch {epoch:g}: " + ", ".join(f"{k} {configs.number(v)}" for k, v in scores.items()
                                                  if k in evaluate.BENCHMARKS[c.benchmark].headline))
        return scores

    rows = train(c, proc, scorer, examples, on_score)
    models.finish(c, proc, scorer, tokenizer, lambda: report(scoring, proc, rows, last, retain, bench))
    models.cleanup()


def report(c, proc, rows, last, retain, bench):
    """scores.json, the picture and the final table: the run between its target and the retain model."""
    scores, records = last["run"]
    if "target" not in last:  # the run was resumed
        before = evaluate.reference(c, proc, c.model, bench)
        last["target"] = evaluate.summarize(before, retain, c), before
    if proc.rank > 0:
        return
    label, (target, before) = os.path.basename(c.out), last["target"]
    lines = {"target": target, label: scores} | ({"retain model": evaluate.summarize(retain, retain, c)} if retain else {})
    evaluate.save_scores(c.out, scores, records)
    evaluate.trajectory(os.path.join(c.out, "trajectory.png"), {label: [r for r in rows if "loss" not in r]}, lines, c)
    shown = configs.samples({"before": before, "after": records}) + "\n\n" + configs.table(lines, evaluate.ARROWS)
    configs.write(os.path.join(c.out, "table.txt"), shown + "\n")
    proc.say(f"{shown}\n\n{c.out}: model, scores.json, examples.jsonl, log.jsonl, trajectory.png")


if __name__ == "__main__":
    configs.run(main)
