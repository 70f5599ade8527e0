"""Our loop against a plain Hugging Face loop, as ratios. Not run by pytest.

    python tests/bench.py                          # a 4-layer random Llama on the CPU
    python tests/bench.py --shape=135m --losses=simnpo --plain_micro_batch=4
    python tests/bench.py --shape=1b --device=cuda --pairs=32 --dtype=bf16     # with MFU
    python tests/bench.py --losses=tofu --model=MODEL --questions=8   # evaluation of a real model
    python tests/bench.py --memory                 # peak memory per loss, one process each
    python tests/bench.py --plan                   # what 1B, 7B and 13B take, as --plan=True says

The plain loop is what users write: one padded batch of forget and one of retain answers per
micro-batch, logits of every position, a reference model in memory, a full pass for each answer of a
question, `lm.generate` on padded prompts. Both run on the same random token ids, with lengths like
TOFU's, turn by turn. Times are CPU seconds of the process (wall clock on a GPU).
"""
import argparse
import copy
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn.functional import cross_entropy, kl_div, logsigmoid  # noqa: E402

import configs  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import model as models  # noqa: E402
import unlearn  # noqa: E402

SHAPES = {  # hidden, MLP, layers, heads, key-value heads, vocabulary, tied
    "tiny": (64, 128, 2, 4, 4, 1000, True),
    "small": (576, 1536, 4, 9, 3, 49152, True),
    "135m": (576, 1536, 30, 9, 3, 49152, True),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "7b": (4096, 11008, 32, 32, 32, 32000, False),
    "13b": (5120, 13824, 40, 40, 40, 32000, False),
}
LOSSES = {
    "simnpo": ("simnpo", "nll"),
    "npo": ("npo", "nll"),
    "npo+kl": ("npo", "kl"),
    "dpo": ("dpo", "nll"),
    "graddiff": ("ga", "nll"),
}
EOS = 2
# dense bfloat16 FLOP/s, from the data sheets
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def llama(shape):
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=EOS, pad_token_id=None)


def random_questions(n, n_answers, vocabulary, rng):
    """n groups: questions of 15 to 40 tokens with answers of 10 to 60, as TOFU's are.

    From the third answer on (TOFU's wrong ones) three tenths are those of the second, a paraphrase.
    """
    def random_ids(low, high):
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(low, high))]

    prompts = [random_ids(15, 40) for _ in range(n)]
    groups = []
    for prompt in prompts:
        answers = [random_ids(10, 60) for _ in range(n_answers)]
        group = []
        for k, answer in enumerate(answers):
            if k >= 2:
                n_same = 3 * len(answers[1]) // 10
                answer = answers[1][:n_same] + answer[n_same:]
            group.append(data.Example(prompt + answer + [EOS], len(prompt)))
        groups.append(group)
    return groups


class Tokenizer:
    """Stands for a tokenizer where only ids are generated."""
    eos_token_id = EOS

    def batch_decode(self, ids, **options):
        return ids


# ------------------------------------------------------------------------------------------------
# the plain loop


def padded(examples, device, left=False):
    """(ids, attention mask, labels), each (B, T)."""
    width = max(len(e.ids) for e in examples)
    ids, mask, labels = [], [], []
    for e in examples:
        n = width - len(e.ids)
        real = [1] * len(e.ids)
        ids.append([EOS] * n + e.ids if left else e.ids + [EOS] * n)
        mask.append([0] * n + real if left else real + [0] * n)
        labels.append([-100] * e.start + e.ids[e.start:] + [-100] * n)
    return [torch.tensor(values, device=device) for values in (ids, mask, labels)]


def answer_nll(lm, batch):
    """(B,) summed NLL, (B,) tokens, logits of every position."""
    ids, mask, labels = batch
    logits = lm(input_ids=ids, attention_mask=mask).logits
    flat = logits[:, :-1].float().flatten(0, 1)
    nll = cross_entropy(flat, labels[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return nll.sum(1), (labels[:, 1:] != -100).sum(1), logits


def plain_forget_loss(lm, ref, method, groups, device, beta):
    """Mean over the answers of one micro-batch."""
    forget = padded([group[0] for group in groups], device)
    nll, n, _ = answer_nll(lm, forget)
    if method == "ga":
        return (-nll / n).mean()
    if method == "simnpo":
        return (-2 / beta * logsigmoid(beta * nll / n)).mean()
    with torch.no_grad():
        ref_nll, _, _ = answer_nll(ref, forget)
    if method == "npo":
        return (-2 / beta * logsigmoid(beta * (nll - ref_nll))).mean()
    alternate = padded([group[1] for group in groups], device)
    win, _, _ = answer_nll(lm, alternate)
    with torch.no_grad():
        ref_win, _, _ = answer_nll(ref, alternate)
    return (-2 / beta * logsigmoid(beta * ((ref_win - win) - (ref_nll - nll)))).mean()


def plain_retain_loss(lm, ref, method, groups, device):
    retain = padded([group[0] for group in groups], device)
    nll, n, logits = answer_nll(lm, retain)
    if method == "nll":
        return nll.sum() / n.sum()
    with torch.no_grad():
        _, _, ref_logits = answer_nll(ref, retain)
    logps = logits.float().log_softmax(-1).flatten(0, 1)
    ref_logps = ref_logits.float().log_softmax(-1).flatten(0, 1)
    return kl_div(logps, ref_logps, reduction="batchmean", log_target=True)


def plain_step(lm, ref, optimizer, loss, batch, proc, micro_batch, beta=0.1):
    method, retain_method = LOSSES[loss]
    n = len(batch["forget"])
    for i in range(0, n, micro_batch):
        forget, retain = (batch[kind][i:i + micro_batch] for kind in ("forget", "retain"))
        with proc.autocast():
            total = plain_forget_loss(lm, ref, method, forget, proc.device, beta)
            total = total + plain_retain_loss(lm, ref, retain_method, retain, proc.device)
        (total * len(forget) / n).backward()
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def plain_evaluation(lm, groups, new_tokens, proc, batch=16, **stop):
    with proc.autocast():
        for k in range(max(map(len, groups))):  # one pass per kind of answer
            texts = [group[k] for group in groups if k < len(group)]
            for i in range(0, len(texts), batch):
                answer_nll(lm, padded(texts[i:i + batch], proc.device))
        for i in range(0, len(groups), batch):
            prompts = [data.Example(g[0].ids[:g[0].start], 1) for g in groups[i:i + batch]]
            ids, mask, _ = padded(prompts, proc.device, left=True)
            lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens,
                        do_sample=False, pad_token_id=EOS, **stop)


# ------------------------------------------------------------------------------------------------
# side by side


def clock(proc):
    if proc.device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def mfu(lm, gpu, tokens_per_s, answer_share):
    """Model FLOP utilisation in bf16 on a GPU of PEAK; None on any other.

    FLOP per weight and token: 2 forward, 2 backward, 2 more where the weight is trained; the output
    head's for answer tokens only. Attention scores, reference forwards and recomputed activations
    do not count.
    """
    peaks = [flops for name, flops in PEAK.items() if name in (gpu or "")]
    if not peaks:
        return None
    head = lm.get_output_embeddings().weight
    embeddings = lm.get_input_embeddings().weight
    flops = 0
    for weight in lm.parameters():
        if weight.ndim < 2 or (weight is embeddings and weight is not head):
            continue
        share = answer_share if weight is head else 1
        flops += (4 + 2 * weight.requires_grad) * weight.numel() * share
    return flops * tokens_per_s / peaks[0]


def answer_share(batch):
    """The share of a batch's tokens that are answer tokens."""
    examples = [e for groups in batch.values() for group in groups for e in group]
    return sum(e.n_answer for e in examples) / sum(len(e.ids) for e in examples)


def make_batch(a, loss, vocabulary, rng):
    n_answers = 2 if loss == "dpo" else 1
    return {"forget": random_questions(a.pairs, n_answers, vocabulary, rng),
            "retain": random_questions(a.pairs, 1, vocabulary, rng)}


def our_run(loss, a, proc, lm, batch, out, evaluate_step=None):
    method, retain = LOSSES[loss]
    every_step = tuple(range(1, a.rounds + 2))
    c = configs.make(unlearn.Config, dict(
        benchmark="tofu", template="qa", out=out, model=out, forget_loss=method, retain_loss=retain,
        batch_size=a.pairs, steps=a.rounds + 1, eval_at=every_step, dtype=a.dtype,
        micro_batch_tokens=a.micro_batch_tokens, compile=a.compile))
    return unlearn.train(c, proc, lm, batch, evaluate_step, title=loss)


def training(loss, a, proc, lm, out):
    """[(our seconds, theirs)] of each step but the first, in turn; then our tokens/s and MFU."""
    batch = make_batch(a, loss, SHAPES[a.shape][5], random.Random(0))
    ours, theirs = copy.deepcopy(lm), copy.deepcopy(lm).train()
    ref = copy.deepcopy(lm) if loss in ("npo", "npo+kl", "dpo") else None
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-5)
    times, started = [], []

    def their_turn(step, epoch):
        now = clock(proc)
        plain_step(theirs, ref, optimizer, loss, batch, proc, a.plain_micro_batch)
        if started:
            times.append((now - started.pop(), clock(proc) - now))
        started.append(clock(proc))
        return {}

    rows = our_run(loss, a, proc, ours, batch, out, their_turn)
    tokens_per_s = statistics.median(row["tokens_per_s"] for row in rows[2:] if "loss" in row)
    used = mfu(ours, proc.gpu, tokens_per_s, answer_share(batch)) if a.dtype == "bf16" else None
    return times[1:], [f"{tokens_per_s:.3g}", f"{used:.3g}" if used else "-"]


def evaluation(a, proc, lm):
    """Both score seven answers per question and generate one greedy answer, on a random model."""
    groups = random_questions(a.questions, 7, SHAPES[a.shape][5], random.Random(0))
    prompts = [group[0].ids[:group[0].start] for group in groups]
    times = []
    for _ in range(a.rounds):
        start = clock(proc)
        models.token_scores(lm, groups, proc, a.micro_batch_tokens)
        models.generate(lm, Tokenizer(), prompts, a.new_tokens, proc, 4 * a.micro_batch_tokens)
        middle = clock(proc)
        plain_evaluation(lm, groups, a.new_tokens, proc)
        times.append((middle - start, clock(proc) - middle))
    return times


def tofu_evaluation(a, proc):
    """Both score the same rows of TOFU with a real model. Ours tokenizes and computes ROUGE too."""
    c = configs.make(evaluate.Config, dict(
        benchmark="tofu", subset="forget05", data=a.data, template=a.template, model=a.model,
        device=a.device, dtype=a.dtype, eval_rows=a.questions,
        micro_batch_tokens=a.micro_batch_tokens))
    bench = data.load(c.benchmark, c.subset, c.data, train=False)
    lm, tokenizer = evaluate.load(c.model, c, proc)
    template = data.Template(c.template, tokenizer, c.system_prompt, c.date_string)
    groups = []
    for rows in bench.evals.values():
        for row in rows[:a.questions]:
            answers = [row["answer"], row.get("paraphrased_answer"), *row["perturbed_answer"]]
            groups.append([template.encode(row, 500, answer) for answer in answers if answer])
    times = []
    for _ in range(a.rounds):
        start = clock(proc)
        _, records = evaluate.evaluate(lm, tokenizer, bench, c, proc)
        middle = clock(proc)
        plain_evaluation(lm, groups, c.max_new_tokens, proc,
                         eos_token_id=[*models.stop_ids(lm, tokenizer)])
        times.append((middle - start, clock(proc) - middle))
    assert len(records) == len(groups)
    return times


def table_row(name, times, speed=("-", "-")):
    ours, theirs = zip(*times)
    ratios = [theirs / ours for ours, theirs in times]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    seconds = [f"{statistics.median(column):.2f}" for column in (ours, theirs)]
    return f"| {' | '.join([name, *seconds, ratio, *speed])} |"


# ------------------------------------------------------------------------------------------------
# memory


def peak_gb():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def memory_table(a):
    """One process per loss, for a peak is never given back."""
    print("| loss | peak GB above the start |\n|---|---|", flush=True)
    for loss in ("simnpo", "npo", "dpo", "npo+kl", "plain simnpo"):
        words = [f"--measure={loss}"]
        for name in ("shape", "dtype", "pairs", "rounds", "micro_batch_tokens",
                     "plain_micro_batch"):
            words.append(f"--{name}={getattr(a, name)}")
        subprocess.run([sys.executable, __file__, *words], check=True)


def measure(a, proc, lm, out):
    """The peak of one of our runs, or of the plain loop."""
    loss = a.measure.removeprefix("plain ")
    batch = make_batch(a, loss, SHAPES[a.shape][5], random.Random(0))
    before = peak_gb()
    if a.measure == loss:
        our_run(loss, a, proc, lm, batch, out)
    else:
        optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-5)
        for _ in range(a.rounds + 1):  # as ours: AdamW's state is there from the second on
            plain_step(lm, None, optimizer, loss, batch, proc, a.plain_micro_batch)
    print(f"| {a.measure} | {peak_gb() - before:.2f} |", flush=True)


def plan_table():
    """What --plan=True says of 1B, 7B and 13B models in bfloat16."""
    head = ["model", "GPUs", "--parallel", "largest micro-batch", "weights", "gradients",
            "optimizer", "activations", "logits", "GB per GPU"]
    print(f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|")
    chunk = [[data.Example([1] * 2048, 1)]]
    answers = [[data.Example([1] * 128, 64)] for _ in range(32)]
    batches = [("32 answers of 128 tokens", answers, False),
               ("a chunk of 2048 tokens, checkpointed", chunk, True)]
    for shape in ("1b", "7b", "13b"):
        with tempfile.TemporaryDirectory() as path:
            llama(shape).save_pretrained(path)
            for label, groups, checkpointing in batches:
                settings = dict(dtype="bf16", activation_checkpointing=checkpointing)
                c = configs.make(unlearn.Config, settings)
                for world, parallel in ((1, "ddp"), (8, "ddp"), (8, "fsdp")):
                    proc = models.Process(0, world, torch.device("cpu"), "bf16", parallel)
                    needs = models.memory_plan(path, c, proc, groups, False)
                    cells = [shape.upper(), str(world), parallel if world > 1 else "-", label]
                    cells += [f"{gb:.1f}" for gb in needs.values()]
                    print(f"| {' | '.join(cells)} | {sum(needs.values()):.0f} |")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="small")
    add("--device", default="cpu")
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    add("--pairs", type=int, default=16, help="forget (and retain) answers per step")
    add("--questions", type=int, default=16, help="of the evaluation, seven answers each")
    add("--new_tokens", type=int, default=40, help="generated per answer")
    add("--rounds", type=int, default=5)
    add("--losses", default=",".join(LOSSES) + ",evaluation")
    add("--micro_batch_tokens", type=int, default=evaluate.Config.micro_batch_tokens)
    add("--plain_micro_batch", type=int, default=8, help="forget and retain answers, plain loop")
    add("--model", help="a real model, for --losses=tofu: a hub id or a directory")
    add("--data", default="locuslab/TOFU", help="... and TOFU, a hub id or a directory")
    add("--template", default="chat", help="... and its template")
    add("--compile", action="store_true")
    add("--memory", action="store_true", help="peak memory, one process per loss")
    add("--plan", action="store_true", help="the table of what 1B, 7B and 13B take")
    add("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    a = arguments()
    if a.plan:
        return plan_table()
    if a.memory:
        return memory_table(a)
    torch.set_num_threads(1)
    proc = models.setup(a.device, a.dtype)
    torch.manual_seed(0)
    lm = models.place(transformers.LlamaForCausalLM(llama(a.shape)), proc)
    lm.row_limit = models.row_limit(lm)
    with tempfile.TemporaryDirectory() as out:
        if a.measure:
            return measure(a, proc, lm, out)
        where = f"{a.model or a.shape}, {a.dtype} on {proc.gpu or 'CPU'}"
        head = [where, "ours, s", "plain, s", "ratio, median (min to max)", "tokens/s", "MFU"]
        print(f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|", flush=True)
        for loss in a.losses.split(","):
            if loss == "tofu":
                line = table_row("TOFU evaluation", tofu_evaluation(a, proc))
            elif loss == "evaluation":
                line = table_row("evaluation", evaluation(a, proc, lm))
            else:
                line = table_row(loss, *training(loss, a, proc, lm, out))
            print(line, flush=True)


if __name__ == "__main__":
    main()
