"""The eight-GPU command on eight CPU processes (gloo), against one process: about ten CPU minutes.

    python configs/results/gpu/gloo8.py FOLDER > configs/results/gpu/gloo8.md

Makes a random model of Llama-2's shape and a data set of MUSE's shape in FOLDER, and runs
`torchrun --nproc_per_node=8 unlearn.py configs/muse_books.py` on them, three steps and the scores.
Only --model, --tokenizer, --data, --device, --lr, --steps and the number of scored rows differ from
the command for GPUs.
"""
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402

RUNS = {  # label: processes, settings that differ from configs/muse_books.py
    "fp32, 1 process": (1, ["--dtype=fp32"]),
    "bf16, 1 process": (1, []),
    "fp32, fsdp, 8": (8, ["--dtype=fp32"]),
    "fp32, ddp, 8": (8, ["--dtype=fp32", "--parallel=ddp"]),
    "bf16, fsdp, 8 (as configured)": (8, []),
}
COMPARED = [  # a run, and what it is compared with
    ("fp32, fsdp, 8", "fp32, 1 process"),
    ("fp32, ddp, 8", "fp32, 1 process"),
    ("bf16, fsdp, 8 (as configured)", "bf16, 1 process"),
    ("bf16, 1 process", "fp32, 1 process"),
]


def make_model(folder):
    """Three layers of Llama-2's shape, untied, with weights that make a peaked distribution."""
    tokenizer = models.load_tokenizer("tiny_llama")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=172, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    lm = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    folder.mkdir(parents=True, exist_ok=True)
    models.save_model(lm, tokenizer, str(folder))


def make_data(folder):
    """The demo's sentences as MUSE's files: 6 forget and 12 retain chunks of 2048 tokens."""
    bench, rng = data.demo(), random.Random(0)

    def write(name, rows):
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))

    def text_of(rows, n):
        sentences = [f"{row['question']} {row['answer']}" for row in rng.choices(rows, k=n)]
        return "\n".join(sentences)

    write("raw/forget", [{"text": text_of(bench.forget, 450)}])
    write("raw/retain1", [{"text": text_of(bench.retain, 900)}])
    for name, rows in (("forget", bench.forget), ("retain", bench.retain)):
        questions = [{"question": row["question"], "answer": row["answer"]} for row in rows]
        write(f"knowmem/{name}_qa", questions[10:20])
        write(f"knowmem/{name}_qa_icl", questions[:10])
    for name, rows in (("forget", bench.forget), ("holdout", bench.holdout)):
        write(f"privleak/{name}", [{"text": text_of(rows, 20)} for _ in range(8)])
    passages = [(text_of(bench.forget, 10), text_of(bench.forget, 4)) for _ in range(8)]
    write("verbmem/forget", [{"prompt": prompt, "gt": gt} for prompt, gt in passages])


def run(folder, label, processes, words):
    """One command; prints it with its seconds."""
    out = folder / label.replace(" ", "_")
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [
        *start, "unlearn.py", "configs/muse_books.py", f"--model={folder / 'model'}",
        f"--tokenizer={folder / 'model'}", f"--data={folder / 'data'}", "--device=cpu",
        "--steps=3", "--lr=1e-3", "--eval_rows=6", "--max_new_tokens=24", f"--out={out}",
        "--overwrite=True", *words]
    began = time.perf_counter()
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{label}: status {done.returncode}\n{done.stderr[-2000:]}")
    return out, time.perf_counter() - began


def read(out):
    """(log rows of steps, weights, scored examples, scores) of a run."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lm = transformers.AutoModelForCausalLM.from_pretrained(out)
    records = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    scores = json.loads((out / "scores.json").read_text())
    return [row for row in rows if "loss" in row], lm.state_dict(), records, scores


def compare(found, expected):
    """Cells of a row: losses, gradient norms, weights, NLLs, texts, scores."""
    cells = []
    for key in ("loss", "grad_norm"):
        pairs = [(row[key], other[key]) for row, other in zip(found[0], expected[0], strict=True)]
        cells.append(f"{max(abs(x - y) / abs(y) for x, y in pairs):.1e}")
    weights = [(found[1][name] - value).abs().max() for name, value in expected[1].items()]
    cells.append(f"{max(weights):.1e}")
    nlls, n_texts, n_other = [0.0], 0, 0
    for record, other in zip(found[2], expected[2], strict=True):
        if "nll" in record:
            nlls.append(abs(record["nll"] - other["nll"]) / abs(other["nll"]))
        if "generated" in record:
            n_texts += 1
            n_other += record["generated"] != other["generated"]
    scores = [abs(found[3][key] - value) for key, value in expected[3].items()]
    return [*cells, f"{max(nlls):.1e}", f"{n_other} of {n_texts}", f"{max(scores):.1e}"]


def main(folder):
    folder = Path(folder).resolve()
    make_model(folder / "model")
    make_data(folder / "data")
    results, seconds = {}, {}
    for label, (processes, words) in RUNS.items():
        print(label, file=sys.stderr, flush=True)
        out, seconds[label] = run(folder, label, processes, words)
        results[label] = read(out)
    print("# The eight-GPU command on eight CPU processes\n\n`python configs/results/gpu/gloo8.py "
          f"FOLDER`, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{os.cpu_count()} cores.\n\n| run | losses of the three steps | gradient norms | s |\n"
          "|---|---|---|---|")
    for label, (rows, *_) in results.items():
        losses = ", ".join(f"{row['loss']:.6f}" for row in rows)
        norms = ", ".join(f"{row['grad_norm']:.5f}" for row in rows)
        print(f"| {label} | {losses} | {norms} | {seconds[label]:.0f} |")
    print("\nLargest differences; losses, gradient norms and NLLs relative. A weight moved by up "
          "to 3e-3.\n\n| run | against | loss | gradient norm | weights | NLL | texts | scores |\n"
          "|---|---|---|---|---|---|---|---|")
    for label, other in COMPARED:
        print(f"| {' | '.join([label, other, *compare(results[label], results[other])])} |")


if __name__ == "__main__":
    main(sys.argv[1])
