"""Our loop against a plain Hugging Face loop, as ratios. Not run by pytest; random Llamas, no download.

    python tests/bench.py                          # a 4-layer Llama, CPU: training per loss, evaluation; a Markdown table
    python tests/bench.py --shape=135m --rounds=3
    python tests/bench.py --shape=1b --device=cuda --pairs=32 --dtype=bf16        # with model FLOP utilisation
    python tests/bench.py --losses=tofu --model=out/tofu_smollm2_target --questions=8         # evaluation of a real model
    python tests/bench.py --memory                 # peak memory of our loop per loss, one process each
    python tests/bench.py --plan                   # what 1B, 7B, 13B take on 1 and 8 GPUs, by the plan of --plan=True

The plain loop is what users write: one padded batch of forget and one of retain answers per micro-batch of 8, logits of every
position, a reference model in memory, a full pass for each answer of a question, `lm.generate` on padded prompts. Both run on
the same random token ids, with lengths like TOFU's, turn by turn; times are CPU seconds of the process (wall clock on a GPU).
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
    "tiny": (64, 128, 2, 4, 4, 1000, True), "small": (576, 1536, 4, 9, 3, 49152, True), "135m": (576, 1536, 30, 9, 3, 49152, True),
    "1b": (2048, 8192, 16, 32, 8, 128256, True), "7b": (4096, 11008, 32, 32, 32, 32000, False),
    "13b": (5120, 13824, 40, 40, 40, 32000, False)}
LOSSES = {"simnpo": ("simnpo", "nll"), "npo": ("npo", "nll"), "npo+kl": ("npo", "kl"), "dpo": ("dpo", "nll"), "graddiff": ("ga", "nll")}
EOS = 2


def llama(shape):
    hidden, mlp, layers, heads, kv, vocabulary, tied = SHAPES[shape]
    return transformers.LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                                    num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied, bos_token_id=1,
                                    eos_token_id=EOS, pad_token_id=None)


def questions(n, answers, vocabulary, rng):
    """[[Example]]: n questions of 15 to 40 tokens with answers of 10 to 60, as TOFU's are.

    From the third answer on, TOFU's wrong ones, three tenths are those of the second, the paraphrase.
    """
    def ids(low, high):
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(low, high))]
    asked = []
    for prompt in [ids(15, 40) for _ in range(n)]:
        said = [ids(10, 60) for _ in range(answers)]
        said = said[:2] + [said[1][:3 * len(said[1]) // 10] + s[3 * len(said[1]) // 10:] for s in said[2:]]
        asked.append([data.Example(prompt + s + [EOS], len(prompt)) for s in said])
    return asked


def tofu(a, proc):
    """(scorer, tokenizer, rows to score, settings, [[Example]]) of a real model and TOFU's forget05."""
    c = configs.make(evaluate.Config, dict(benchmark="tofu", subset="forget05", data=a.data, template=a.template, model=a.model, device=a.device,
                                           dtype=a.dtype, eval_rows=a.questions, micro_batch_tokens=a.micro_batch_tokens))
    bench = data.load(c.benchmark, c.subset, c.data, train=False)
    scorer, tokenizer = evaluate.load(c.model, c, proc)
    template = data.Template(c.template, tokenizer, c.system_prompt, c.date_string)
    rows = [row for rows in bench.evals.values() for row in rows[:a.questions]]
    said = [[row["answer"], row.get("paraphrased_answer"), *row["perturbed_answer"]] for row in rows]
    return scorer, tokenizer, bench, c, [[template.encode(row, 500, s) for s in answers if s] for row, answers in zip(rows, said)]


class Tokenizer:
    eos_token_id = EOS

    def batch_decode(self, ids, **_):
        return ids


# ----------------------------------------------------------------------------------------------------------------------
# the plain loop


def padded(examples, device, left=False):
    width = max(len(e.ids) for e in examples)
    pad = [width - len(e.ids) for e in examples]
    ids = [[EOS] * n + e.ids if left else e.ids + [EOS] * n for e, n in zip(examples, pad)]
    mask = [[0] * n + [1] * len(e.ids) if left else [1] * len(e.ids) + [0] * n for e, n in zip(examples, pad)]
    labels = [[-100] * e.start + e.ids[e.start:] + [-100] * n for e, n in zip(examples, pad)]
    return [torch.tensor(x, device=device) for x in (ids, mask, labels)]


def answer_nll(lm, batch):
    """(B,) summed NLL, (B,) tokens, logits of every position."""
    ids, mask, labels = batch
    logits = lm(input_ids=ids, attention_mask=mask).logits
    nll = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return nll.sum(1), (labels[:, 1:] != -100).sum(1), logits


def plain_step(lm, ref, optimizer, loss, window, device, autocast, beta=0.1, micro=8):
    method, retain_method = LOSSES[loss]
    for i in range(0, len(window["forget"]), micro):
        forget, retain = (padded(window[k][i:i + micro], device) for k in ("forget", "retain"))
        with autocast():
            nll, n, _ = answer_nll(lm, forget)
            if method in ("npo", "dpo"):
                with torch.no_grad():
                    ref_nll, _, _ = answer_nll(ref, forget)
            if method == "simnpo":
                part = -2 / beta * logsigmoid(beta * nll / n)
            elif method == "npo":
                part = -2 / beta * logsigmoid(beta * (nll - ref_nll))
            elif method == "dpo":
                other = padded(window["alternate"][i:i + micro], device)
                win, _, _ = answer_nll(lm, other)
                with torch.no_grad():
                    ref_win, _, _ = answer_nll(ref, other)
                part = -2 / beta * logsigmoid(beta * ((ref_win - win) - (ref_nll - nll)))
            else:
                part = -nll / n
            retain_nll, m, logits = answer_nll(lm, retain)
            keep = retain_nll.sum() / m.sum()
            if retain_method == "kl":
                with torch.no_grad():
                    _, _, ref_logits = answer_nll(ref, retain)
                keep = kl_div(logits.float().log_softmax(-1).flatten(0, 1), ref_logits.float().log_softmax(-1).flatten(0, 1),
                              reduction="batchmean", log_target=True)
            total = (part.mean() + keep) * micro / len(window["forget"])
        total.backward()
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def plain_evaluation(lm, asked, new_tokens, device, autocast, batch=16, **stop):
    with autocast():
        for k in range(max(map(len, asked))):  # one pass a kind of answer
            texts = [q[k] for q in asked if k < len(q)]
            for i in range(0, len(texts), batch):
                answer_nll(lm, padded(texts[i:i + batch], device))
        for i in range(0, len(asked), batch):
            ids, mask, _ = padded([data.Example(q[0].ids[:q[0].start], 1) for q in asked[i:i + batch]], device, left=True)
            lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=EOS, **stop)


# ----------------------------------------------------------------------------------------------------------------------


def clock(proc):
    if proc.device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def set_up(a):
    torch.set_num_threads(1)
    proc = models.setup(a.device, a.dtype)
    torch.manual_seed(0)
    lm = transformers.LlamaForCausalLM(llama(a.shape)).to(proc.device).eval()
    rng, vocabulary = random.Random(0), SHAPES[a.shape][5]
    pairs = questions(a.pairs, 2, vocabulary, rng)
    window = {"forget": [q[0] for q in pairs], "alternate": [q[1] for q in pairs],
              "retain": [q[0] for q in questions(a.pairs, 1, vocabulary, rng)]}
    return proc, lm, window, questions(a.questions, 7, vocabulary, rng)


def ours(loss, a, proc, lm, window, out, on_score=None):
    method, retain = LOSSES[loss]
    c = configs.make(unlearn.Config, dict(
        benchmark="tofu", template="qa", out=out, forget_loss=method, retain_loss=retain, batch_size=a.pairs, steps=a.rounds + 1,
        eval_at=tuple(range(1, a.rounds + 2)), micro_batch_tokens=a.micro_batch_tokens, dtype=a.dtype, model=out, compile=a.compile))
    return unlearn.train(c, proc, models.Scorer(lm), window, on_score, title=loss)


def training(loss, a, proc, lm, window, out):
    """[(our seconds, theirs)] of each step but the first, turn by turn; and our tokens a second."""
    mine, theirs = copy.deepcopy(lm), copy.deepcopy(lm).train()
    ref = copy.deepcopy(lm) if loss in ("npo", "npo+kl", "dpo") else None
    optimizer, times, began = torch.optim.AdamW(theirs.parameters(), lr=1e-5), [], []

    def turn(step, epoch):
        now = clock(proc)
        plain_step(theirs, ref, optimizer, loss, window, proc.device, proc.autocast)
        if began:
            times.append((now - began.pop(), clock(proc) - now))
        began.append(clock(proc))
        return {}

    rows = ours(loss, a, proc, mine, window, out, turn)
    steps = [r for r in rows[2:] if "loss" in r]
    return times[1:], [f"{statistics.median(r[k] for r in steps):.3g}" if k in steps[0] else "-" for k in ("tokens_per_s", "mfu")]


def tofu_evaluation(a, proc):
    """Both score the same rows of TOFU on a real model, which ends its answers. Ours makes the prompts, too, and ROUGE."""
    scorer, tokenizer, bench, c, asked = tofu(a, proc)
    times, stop = [], models.stop_ids(scorer.lm, tokenizer)
    for _ in range(a.rounds):
        t0 = clock(proc)
        _, records = evaluate.evaluate(scorer, tokenizer, bench, c, proc)
        t1 = clock(proc)
        plain_evaluation(scorer.lm, asked, c.max_new_tokens, proc.device, proc.autocast, eos_token_id=stop)
        times.append((t1 - t0, clock(proc) - t1))
    assert len(records) == len(asked)
    return times


def evaluation(a, proc, lm, asked):
    scorer, times = models.Scorer(copy.deepcopy(lm)), []
    texts, prompts = [e for q in asked for e in q], [q[0].ids[:q[0].start] for q in asked]
    for _ in range(a.rounds):
        t0 = clock(proc)
        models.score(scorer, texts, proc, a.micro_batch_tokens)
        models.generate(scorer.lm, Tokenizer(), prompts, a.new_tokens, proc, 4 * a.micro_batch_tokens)
        t1 = clock(proc)
        plain_evaluation(lm, asked, a.new_tokens, proc.device, proc.autocast)
        times.append((t1 - t0, clock(proc) - t1))
    return times


def row(name, times, more=()):
    mine, theirs = zip(*times)
    ratios = [t / m for m, t in times]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {name} | {statistics.median(mine):.2f} | {statistics.median(theirs):.2f} | {spread} |" + "".join(f" {m} |" for m in more)


def peak_gb():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def plan_table():
    print("| model | GPUs | --parallel | batch | weights | gradients | optimizer | activations | logits | GB a GPU |\n" + "|---" * 10 + "|")
    chunk, answers = [data.Example([1] * 2048, 1)], [data.Example([1] * 128, 64)] * 32
    for shape in ("1b", "7b", "13b"):
        with tempfile.TemporaryDirectory() as path:
            llama(shape).save_pretrained(path)
            for label, batch, checkpointing in (("32 answers of 128 tokens", answers, False), ("a chunk of 2048 tokens", chunk, True)):
                c = configs.make(unlearn.Config, dict(dtype="bf16", activation_checkpointing=checkpointing))
                for world, parallel in ((1, "ddp"), (8, "ddp"), (8, "fsdp")):
                    needs = models.memory_plan(path, c, models.Process(0, world, torch.device("cpu"), "bf16", parallel), [[e] for e in batch], False)
                    print(f"| {shape.upper()} | {world} | {parallel if world > 1 else '-'} | {label}"
                          f"{', checkpointed' if checkpointing else ''} | " + " | ".join(f"{v:.1f}" for v in needs.values()) +
                          f" | {sum(needs.values()):.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--pairs", type=int, default=16, help="forget (and retain) answers a step")
    parser.add_argument("--questions", type=int, default=16, help="questions of the evaluation, seven answers each")
    parser.add_argument("--new_tokens", type=int, default=40, help="generated an answer; a random model never stops by itself")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--losses", default=",".join(LOSSES) + ",evaluation")
    parser.add_argument("--micro_batch_tokens", type=int, default=4096)
    parser.add_argument("--model", help="a real model, for --losses=tofu: a hub id or a directory")
    parser.add_argument("--data", default="locuslab/TOFU", help="... and TOFU, a hub id or a directory")
    parser.add_argument("--template", default="chat", help="... and how it is asked")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak memory of our loop, one process a loss")
    parser.add_argument("--plan", action="store_true", help="the table of what 1B, 7B and 13B take")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.plan:
        return plan_table()
    if a.memory:
        print("| loss | peak GB above the start |\n|---|---|", flush=True)
        for loss in ("simnpo", "npo", "dpo", "npo+kl"):
            words = [f"--{k}={v}" for k, v in vars(a).items() if v and k not in ("memory", "plan", "compile")]
            subprocess.run([sys.executable, __file__, *words, f"--measure={loss}"], check=True)
        return None
    proc, lm, window, asked = set_up(a)
    with tempfile.TemporaryDirectory() as out:
        if a.measure:
            before = peak_gb()
            ours(a.measure, a, proc, lm, window, out, lambda *_: {})
            return print(f"| {a.measure} | {peak_gb() - before:.2f} |", flush=True)
        print(f"| {a.model or a.shape}, {a.dtype} on {proc.gpu or 'CPU'} | ours, s | plain, s | ratio, median (min to max) | tokens/s | MFU |\n" +
              "|---" * 6 + "|", flush=True)
        for loss in a.losses.split(","):
            if loss == "tofu":
                print(row("TOFU evaluation", tofu_evaluation(a, proc), ("-", "-")), flush=True)
            elif loss == "evaluation":
                print(row(loss, evaluation(a, proc, lm, asked), ("-", "-")), flush=True)
            else:
                print(row(loss, *training(loss, a, proc, lm, window, out)), flush=True)


if __name__ == "__main__":
    main()
