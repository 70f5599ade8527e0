"""One page on a GPU: is it right, what memory and how much time does it take. Not run by pytest.

    python tests/gpu.py --out=page.md              # made for 25 minutes of one H100; no download
    python tests/gpu.py --only=memory,speed        # some of the sections
    python tests/gpu.py --small --device=cpu       # every section, tiny models: to try this file

Each section is tried on its own: one that fails leaves its error on the page. Models are random, of
the shapes of tests/bench.py, which has the plain Hugging Face loop that ours is compared with.
"""
import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from conftest import demo_tokenizer, tiny_llama  # noqa: E402

import configs  # noqa: E402
import data  # noqa: E402
import model as models  # noqa: E402
import unlearn  # noqa: E402
from configs import rundir, tables  # noqa: E402

# dense bfloat16 FLOP/s, from the data sheets
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------
# what the sections share


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is scaled down by --small."""
    shapes: tuple = ("135m", "1b", "7b")
    pairs: int = 32  # forget, and retain, answers of a step
    steps: int = 8
    prompts: int = 64
    new_tokens: int = 64
    several: int = 4096  # tokens of a micro-batch of several examples
    hidden: int = 512  # of the model that is killed and resumed
    demo: tuple = ()

    def largest(self, shape):
        """A 7B model beside its AdamW state leaves room for half as many on 80 GB."""
        return self.several // 2 if shape == "7b" else self.several


SMALL = Sizes(("tiny", "tiny", "tiny"), pairs=3, steps=3, prompts=3, new_tokens=4, several=256,
              hidden=64, demo=("--epochs=1", "--finetune_epochs=3"))


def make_model(shape, proc, built_on=None):
    """A random Llama, the same for one seed and one device that it is built on."""
    torch.manual_seed(0)
    with built_on or proc.device:  # a GPU draws seven billion numbers in no time
        lm = transformers.LlamaForCausalLM(bench.llama(shape))
    lm.row_limit = models.row_limit(lm.to(proc.device))
    lm = models.place(lm, proc)
    empty_cache()
    return lm


def make_batch(shape, pairs, n_answers=1):
    """New examples each time: a run keeps its reference log-probs with them."""
    rng = random.Random(0)
    vocabulary = bench.SHAPES[shape][5]
    return {"forget": bench.random_questions(pairs, n_answers, vocabulary, rng),
            "retain": bench.random_questions(pairs, 1, vocabulary, rng)}


def empty_cache():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Timed(rundir.RunDirectory):
    """Reads the clock after each step, when the device has finished it."""

    def open_log(self, step):
        super().open_log(step)
        self.ticks = [bench.clock(self.proc)]

    def log(self, row):
        self.ticks.append(bench.clock(self.proc))
        super().log(row)

    def seconds(self):
        """Of a step, the median without the first two, which allocate and compile."""
        steps = [after - before for before, after in itertools.pairwise(self.ticks)]
        return statistics.median(steps[2:] or steps)


def train(lm, proc, batch, steps, **settings):
    """(the rows of the log, seconds of a step); the whole batch is in each step."""
    with tempfile.TemporaryDirectory() as out:
        c = settings_of(proc, out, batch, steps=steps, **settings)
        run = Timed(c, proc)
        rows = unlearn.train(c, proc, lm, batch, run=run)
        run.file.close()
    return rows, run.seconds()


def settings_of(proc, path, batch, **settings):
    return configs.make(unlearn.Config, {
        "benchmark": "tofu", "template": "qa", "model": path, "out": path, "steering_layer": 0,
        "batch_size": len(batch["forget"]), "dtype": proc.dtype, "parallel": proc.parallel,
        **settings})


def difference(value, expected):
    return abs(value - expected) / max(abs(expected), 1e-12)


def largest_difference(rows, expected, keys=("forget_loss", "retain_loss", "grad_norm")):
    """Relative, over all steps; losses that are zero by definition (KL at step 1) do not count."""
    found = [0.0]
    for row, other in zip(rows, expected, strict=True):
        for key in keys:
            if abs(other[key]) > 1e-6:
                found.append(difference(row[key], other[key]))
    return max(found)


def table(head, rows):
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head),
            *[f"| {' | '.join(map(str, row))} |" for row in rows]]


def gb(value):
    return f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def unlearn_command(folder, *words):
    """The command and the options of a subprocess in `folder`, which out/ is made in."""
    command = [sys.executable, str(ROOT / "unlearn.py"), *words]
    return command, {"cwd": folder, "text": True, "stdout": subprocess.PIPE,
                     "stderr": subprocess.PIPE}


def finish(process):
    try:
        _, errors = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    if process.returncode:
        raise RuntimeError(f"unlearn.py ended with {process.returncode}: {errors[-500:]}")


# ------------------------------------------------------------------------------------------------
# is it right


def versions(a, sizes, proc):
    """Versions and card."""
    lines = [f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
             f"{transformers.__version__}, CUDA {torch.version.cuda}, {os.cpu_count()} CPU cores."]
    if proc.gpu:
        properties = torch.cuda.get_device_properties(proc.device)
        lines += [f"{proc.gpu}, {properties.total_memory / 1e9:.1f} GB, compute capability "
                  f"{properties.major}.{properties.minor}; {torch.cuda.device_count()} visible."]
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=driver_version,power.limit,clocks.max.sm"
        done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"],
                              capture_output=True, text=True)
        lines.append(f"Driver, power limit, largest clock: {done.stdout.strip()}.")
    return lines


def methods(a, sizes, proc):
    """Every loss, scores and answers on this device against the CPU, in float32."""
    here, there = dataclasses.replace(proc, dtype="fp32"), models.Process(0, 1, CPU)
    wrong, largest = [], 0.0
    for forget, retain in zip(unlearn.FORGET, itertools.cycle(unlearn.RETAIN)):
        settings = {"forget_loss": forget, "micro_batch_tokens": 300,
                    "retain_loss": "none" if forget == "task_vector" else retain}
        if forget == "altpo":
            settings["alternates"] = data.REFUSALS  # any file: the pairs are made here
        rows = []
        for one in (here, there):
            lm = make_model("tiny", one, built_on=CPU)
            n_answers = 2 if unlearn.FORGET[forget].answers == "both" else 1
            some, _ = train(lm, one, make_batch("tiny", 4, n_answers), 3, **settings)
            rows.append(some)
        found = largest_difference(*rows)
        largest = max(largest, found)
        if not found < 1e-3:
            wrong.append(f"{forget} with {retain} {found:.1e}")
    lines = [f"{len(unlearn.FORGET)} forget losses, each with a retain loss, 3 steps: losses and "
             f"gradient norms differ by at most {largest:.1e}. Above 1e-3: "
             f"{', '.join(wrong) or 'none'}."]

    groups = make_batch("tiny", 8, n_answers=3)["forget"]
    prompts = [group[0].ids[:group[0].start] for group in groups]
    values, answers = [], []
    for one in (here, there):
        lm = make_model("tiny", one, built_on=CPU)
        scored = models.token_scores(lm, groups, one, 400)
        values.append([])
        for arrays in scored:
            values[-1] += [value for array in arrays for value in array[:, 0].tolist()]
        answers.append(models.generate(lm, bench.Tokenizer(), prompts, 16, one, 400))
    largest = max(difference(x, y) for x, y in zip(*values, strict=True))
    same = sum(x == y for x, y in zip(*answers, strict=True))
    return lines + [f"{len(values[0])} log-probs differ by at most {largest:.1e}; {same} of "
                    f"{len(prompts)} greedy answers are the same."]


def demo(a, sizes, proc):
    """The demo on this device and on the CPU: each makes its own target and retain model."""
    with tempfile.TemporaryDirectory() as folder:
        processes, began = {}, time.perf_counter()
        for device in dict.fromkeys((proc.device.type, "cpu")):
            command, options = unlearn_command(
                folder, f"--device={device}", f"--model=out/target_{device}",
                f"--retain_model=out/retain_{device}", f"--out=out/{device}", *sizes.demo)
            processes[device] = subprocess.Popen(command, **options)
        scores = {}
        for device, process in processes.items():
            finish(process)
            scores[device] = json.loads(Path(folder, "out", device, "scores.json").read_text())
        seconds = time.perf_counter() - began
    rows = []
    for key in scores["cpu"]:
        rows.append([key, *[tables.number(column[key]) for column in scores.values()]])
    return [f"Side by side in {seconds:.0f} s.", "", *table(["score", *scores], rows)]


def precision(a, sizes, proc):
    """bf16 and bf16_weights against fp32."""
    shape, logs = sizes.shapes[0], {}
    for dtype in ("fp32", "bf16", "bf16_weights"):
        one = dataclasses.replace(proc, dtype=dtype)
        logs[dtype], _ = train(make_model(shape, one), one, make_batch(shape, sizes.pairs), 5,
                               beta=2.5, micro_batch_tokens=sizes.several)
        empty_cache()
    rows = []
    for step, expected in enumerate(logs["fp32"]):
        cells = [step + 1, f"{expected['loss']:.6f}", f"{expected['grad_norm']:.4f}"]
        for dtype in ("bf16", "bf16_weights"):
            for key in ("loss", "grad_norm"):
                cells.append(f"{difference(logs[dtype][step][key], expected[key]):.1e}")
        rows.append(cells)
    head = ["step", "loss, fp32", "gradient norm", "bf16: loss", "norm", "bf16_weights: loss",
            "norm"]
    return [f"{shape}, SimNPO and NLL; relative differences from fp32.", "", *table(head, rows)]


def is_fsdp(proc):
    return proc.parallel == "fsdp"


def sharded(a, sizes, proc):
    """FSDP of one process: the sharded code, its collectives and its state dict, against none."""
    shape, rows = sizes.shapes[0], []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        dist.init_process_group("nccl" if proc.gpu else "gloo", rank=0, world_size=1,
                                init_method=f"file://{folder}/store")
        stack.callback(dist.destroy_process_group)
        for dtype in ("fp32", "bf16"):
            logs = {}
            for parallel in ("ddp", "fsdp"):
                one = dataclasses.replace(proc, dtype=dtype, parallel=parallel)
                with mock.patch.object(models.Process, "sharded", property(is_fsdp)):
                    lm = make_model(shape, one)
                    logs[parallel], seconds = train(
                        lm, one, make_batch(shape, sizes.pairs), 5, beta=2.5,
                        micro_batch_tokens=sizes.several, activation_checkpointing=True)
                    state = models.sharded_state.get_model_state_dict(lm, options=models.WHOLE)
                cells = [dtype, parallel, f"{seconds:.3f}", gb(models.memory_gb(proc.device))]
                for key in ("loss", "grad_norm"):
                    found = largest_difference(logs[parallel], logs["ddp"], [key])
                    cells.append(f"{found:.1e}")
                on = {tensor.device.type for tensor in state.values()}
                rows.append([*cells, f"{len(state)} on {', '.join(on)}"])
                del lm, state
                empty_cache()
    head = ["dtype", "parallel", "s a step", "peak GB", "loss differs", "gradient norm",
            "tensors saved"]
    return [f"{shape}, 5 steps, checkpointed.", "", *table(head, rows)]


def resume(a, sizes, proc):
    """--deterministic=True: a run that is killed and resumed, and one that is repeated."""
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder, "start")
        start.mkdir()
        tokenizer = demo_tokenizer()
        lm = tiny_llama(tokenizer, 0, sizes.hidden, heads=4)
        models.save_model(lm, tokenizer, str(start))
        bench_rows = data.demo()
        for name, rows in (("forget", bench_rows.forget), ("retain", bench_rows.retain)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            Path(folder, f"{name}.jsonl").write_text(text)
        words = ["--benchmark=tofu", "--template=qa", "--model=start", "--forget_data=forget.jsonl",
                 "--retain_data=retain.jsonl", "--forget_loss=npo", f"--device={proc.device.type}",
                 "--deterministic=True", "--dtype=bf16", "--save_every=1", "--eval_every=0",
                 "--batch_size=8", "--lr=1e-3", "--epochs=8"]

        def start_run(name, *more):
            command, options = unlearn_command(folder, *words, f"--out=out/{name}", *more)
            return subprocess.Popen(command, **options)

        for name in ("whole", "again"):
            finish(start_run(name))
        killed = start_run("killed")
        checkpoint = Path(folder, "out", "killed", "checkpoint", "sha256")
        while killed.poll() is None and not checkpoint.exists():
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        was_killed = killed.returncode == -signal.SIGKILL
        finish(start_run("killed", "--resume=True"))
        digests = {}
        for name in ("whole", "again", "killed"):
            digests[name] = rundir.file_digest(Path(folder, "out", name, "model.safetensors"))
    lines = []
    for name, label in (("again", "repeated"), ("killed", "killed and resumed")):
        same = "the same bits" if digests[name] == digests["whole"] else "**other bits**"
        lines.append(f"- {label}: {same}")
    return [*lines, "" if was_killed else "The run ended before it could be killed."]


# ------------------------------------------------------------------------------------------------
# memory and speed


def memory(a, sizes, proc):
    """--plan=True against the measured peak of two steps."""
    small, medium, large = sizes.shapes
    cases = [
        (small, "fp32", {}),
        (small, "bf16", {}),
        (medium, "bf16", {}),
        (medium, "bf16", {"activation_checkpointing": True}),
        (medium, "bf16", {"forget_loss": "npo", "retain_loss": "kl"}),
        (large, "bf16_weights", {}),
        (large, "bf16_weights", {"activation_checkpointing": True}),
        (large, "bf16", {"lora_rank": 16, "activation_checkpointing": True}),
    ]
    rows = []
    for shape, dtype, settings in cases:
        one = dataclasses.replace(proc, dtype=dtype)
        words = [dtype, *[f"{name}={value}" for name, value in settings.items()]]
        print(f"  {shape}: {' '.join(words)}", file=sys.stderr, flush=True)
        settings = settings | {"micro_batch_tokens": sizes.largest(shape)}
        plan = planned(shape, one, sizes, settings)
        try:
            peak = measured(shape, one, sizes, settings)
            cells = [gb(peak), f"{plan / peak:.2f}"]
        except torch.OutOfMemoryError:
            cells = ["out of memory", "-"]
        rows.append([shape, " ".join(words), gb(plan), *cells])
        empty_cache()
    return table(["model", "settings", "plan GB", "peak GB", "plan / peak"], rows)


def planned(shape, proc, sizes, settings):
    """GB of a step by --plan=True, from the config alone."""
    batch = make_batch(shape, sizes.pairs)
    with tempfile.TemporaryDirectory() as path:
        bench.llama(shape).save_pretrained(path)
        c = settings_of(proc, path, batch, **settings)
        cuts = data.micro_batches(batch, c.micro_batch_tokens)
        largest = max((groups for _, groups, _ in cuts), key=data.total_tokens)
        with_ref_model = settings.get("retain_loss") == "kl"
        return sum(models.memory_plan(path, c, proc, largest, with_ref_model).values())


def measured(shape, proc, sizes, settings):
    """Peak GB of two steps, and of all that was before on a CPU."""
    lm = make_model(shape, proc)  # the peak is counted from here
    train(lm, proc, make_batch(shape, sizes.pairs), 2, **settings)
    return models.memory_gb(proc.device)


def mfu(lm, batch, seconds, proc):
    """Model FLOP utilisation of a step, of the card's bfloat16 peak.

    FLOP per weight and token: 2 forward, 2 backward, 2 more where the weight is trained; the output
    head's for answer tokens only. Padding, attention scores and recomputation do not count, so a
    loop that wastes them has a lower one.
    """
    peaks = [flops for name, flops in PEAK.items() if name in (proc.gpu or "")]
    if not peaks:
        return "-"
    examples = [e for groups in batch.values() for group in groups for e in group]
    n_tokens = sum(len(example.ids) for example in examples)
    n_answer = sum(example.n_answer for example in examples)
    head, embeddings = lm.get_output_embeddings().weight, lm.get_input_embeddings().weight
    flops = 0
    for weight in lm.parameters():
        if weight.ndim < 2 or (weight is embeddings and weight is not head):
            continue
        n = n_answer if weight is head else n_tokens
        flops += (4 + 2 * weight.requires_grad) * weight.numel() * n
    return f"{flops / seconds / peaks[0]:.3f}"


def plain_train(lm, proc, batch, steps, micro_batch):
    """Seconds of a step of the plain padded loop."""
    lm.train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-5, fused=True)
    ticks = [bench.clock(proc)]
    for _ in range(steps):
        bench.plain_step(lm, None, optimizer, "simnpo", batch, proc, micro_batch)
        ticks.append(bench.clock(proc))
    seconds = [after - before for before, after in itertools.pairwise(ticks)]
    return statistics.median(seconds[2:] or seconds)


def speed(a, sizes, proc):
    """A training step, ours and the plain loop's, which pads 4 + 4, 8 + 8 or 32 + 32 answers."""
    rows = []
    for shape, dtype in zip(sizes.shapes[1:], ("bf16", "bf16_weights")):
        one = dataclasses.replace(proc, dtype=dtype)
        several = {"micro_batch_tokens": sizes.largest(shape)}
        variants = {
            "one example a forward": {"micro_batch_tokens": 1},
            "512 tokens a forward": {"micro_batch_tokens": 512},
            f"{sizes.largest(shape)} tokens": several,
            "... checkpointed": several | {"activation_checkpointing": True},
            "... compiled": several | {"compile": True},
            "plain, 4 + 4": 4,
            "plain, 8 + 8": 8,
            "plain, 32 + 32": 32,
        }
        if shape == "7b":  # compiling 32 layers takes minutes
            del variants["... compiled"]
        for name, settings in variants.items():
            print(f"  {shape}: {name}", file=sys.stderr, flush=True)
            try:
                cells = speed_of(shape, one, sizes, settings)
            except torch.OutOfMemoryError:
                cells = ["out of memory", "-", "-", "-"]
            rows.append([f"{shape} {dtype}", name, *cells])
            torch.compiler.reset()
            empty_cache()
    head = ["model", "micro-batch", "s a step", "tokens/s", "MFU", "peak GB"]
    return [f"SimNPO and NLL, {sizes.pairs} + {sizes.pairs} answers a step.", "",
            *table(head, rows)]


def speed_of(shape, proc, sizes, settings):
    """[seconds, tokens/s, MFU, peak GB]; settings: ours, or the plain loop's micro-batch."""
    batch = make_batch(shape, sizes.pairs)
    lm = make_model(shape, proc)
    if isinstance(settings, int):
        seconds = plain_train(lm, proc, batch, sizes.steps, settings)
    else:
        _, seconds = train(lm, proc, batch, sizes.steps, beta=2.5, **settings)
    n_tokens = sum(len(group[0].ids) for groups in batch.values() for group in groups)
    return [f"{seconds:.3f}", f"{n_tokens / seconds:,.0f}", mfu(lm, batch, seconds, proc),
            gb(models.memory_gb(proc.device))]


def generation(a, sizes, proc):
    """Greedy answers to padded prompts, ours and lm.generate's, in one batch each."""
    rows = []
    for shape in sizes.shapes[1:]:
        one = dataclasses.replace(proc, dtype="bf16_weights")
        lm = make_model(shape, one)
        questions = make_batch(shape, sizes.prompts)["forget"]
        prompts = [group[0].ids[:group[0].start] for group in questions]
        ids, mask, _ = bench.padded([data.Example(p, 1) for p in prompts], proc.device, left=True)

        def ours(n, lm=lm, prompts=prompts, one=one):
            return models.generate(lm, bench.Tokenizer(), prompts, n, one, 10**6)

        def plain(n, lm=lm, ids=ids, mask=mask):
            with torch.no_grad():
                return lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n,
                                   do_sample=False, pad_token_id=bench.EOS)

        seconds = []
        for generate in (ours, plain):
            generate(2)  # the first call allocates
            start = bench.clock(one)
            generate(sizes.new_tokens)
            seconds.append(bench.clock(one) - start)
        answers = ours(sizes.new_tokens)
        n = sum(map(len, answers))
        rows.append([shape, len(prompts), n, *[f"{n / s:,.0f}" for s in seconds],
                     f"{seconds[1] / seconds[0]:.2f}"])
        del lm, ours, plain, generate
        empty_cache()
    return table(["model", "prompts", "tokens", "ours, tokens/s", "plain", "ratio"], rows)


def evaluation(a, sizes, proc):
    """Seven answers scored and one generated per question, in turn with the plain loop."""
    rows = []
    for shape in sizes.shapes[1:]:
        one = dataclasses.replace(proc, dtype="bf16_weights")
        lm = make_model(shape, one)
        settings = argparse.Namespace(
            questions=sizes.prompts, shape=shape, rounds=3, new_tokens=sizes.new_tokens,
            micro_batch_tokens=sizes.several)
        rows.append(bench.table_row(shape, bench.evaluation(settings, one, lm)))
        del lm
        empty_cache()
    head = ["model", "ours, s", "plain, s", "ratio, median (min to max)", "", ""]
    return table(head, [])[:2] + rows


# ------------------------------------------------------------------------------------------------
# the page


SECTIONS = {section.__name__: section for section in (
    versions, methods, demo, precision, sharded, resume, memory, speed, generation, evaluation)}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    add("--small", action="store_true", help="tiny models, to try this file on a CPU")
    add("--device", default="cuda")
    add("--out", help="a file to write the page to as well")
    a = parser.parse_args(argv)
    unknown = {*a.only.split(",")} - {*SECTIONS}
    if unknown:
        parser.error(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    try:
        proc = models.setup(a.device)
    except configs.UsageError as e:
        parser.error(str(e))
    page, began = ["# On a GPU: `python tests/gpu.py`"], time.perf_counter()
    for name in a.only.split(","):
        print(f"{time.perf_counter() - began:.0f} s: {name}", file=sys.stderr, flush=True)
        page += run_section(SECTIONS[name], a, SMALL if a.small else Sizes(), proc)
        if a.out:  # after each section: what a kill leaves is a page
            Path(a.out).write_text("\n".join(page) + "\n")
    print("\n".join(page))


def run_section(section, a, sizes, proc):
    """The section's part of the page; a failure is a line of it."""
    start = time.perf_counter()
    try:
        lines = section(a, sizes, proc)
    except (Exception, SystemExit) as e:
        traceback.print_exc()
        message = " ".join(str(e).split())[:500]
        lines = [f"**failed**: {type(e).__name__}: {message}"]
    empty_cache()  # after the exception, whose frames hold the models
    seconds = time.perf_counter() - start
    return ["", f"## {section.__doc__}", "", *lines, "", f"({section.__name__}, {seconds:.0f} s)"]


if __name__ == "__main__":
    main()
