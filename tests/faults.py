"""Kill runs, feed nonsense: too long for the test suite, which runs a few of each.

    python tests/faults.py kill --kills=50 --processes=1  # makes its models, unlearns, scores
    python tests/faults.py kill --kills=50 --processes=2  # the same under torchrun (gloo)
    python tests/faults.py nonsense --cases=2000          # malformed rows, logs, files, settings

`kill` (Linux, CPU): all processes of a run are killed (SIGKILL) at a random moment between its
first training step and its end, and it is started again with --resume=True. Models, scores,
examples and logs must be those of an uninterrupted run, bit for bit.
`nonsense`: each case is scored to finite numbers or refused with a sentence of ours (UsageError,
Failure). A user would see any other exception as a traceback.
A seed gives the same moments (as fractions of a run) and the same cases.
"""
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import PROC, ROOT, demo_tokenizer, rows_of, save_rows, tiny_llama  # noqa: E402

import configs  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import model as models  # noqa: E402
import relearn  # noqa: E402
import unlearn  # noqa: E402
from configs import recorded, rundir  # noqa: E402

MODELS = ("target", "retain", "run")  # in the order they are made; below out/
TIMING = ("tokens_per_s", "memory_gb", "seconds")


# ------------------------------------------------------------------------------------------------
# kills


def flags(root, **settings):
    """A 40-step run that makes its target and its retain model first.

    It saves after each step, so that many kills hit a save.
    """
    base = dict(
        benchmark="tofu", subset="forget05", data=root / "data", template="qa",
        base_model="tiny_llama",
        model="out/target", retain_model="out/retain", out="out/run", device="cpu", batch_size=4,
        steps=40, lr=1e-3, forget_loss="npo", finetune_lr=1e-3, finetune_epochs=3,
        finetune_batch_size=8, save_every=0.01, eval_every=4, max_new_tokens=8)
    return [f"--{name}={value}" for name, value in (base | settings).items()]


class Launched:
    """unlearn.py on some processes: under torchrun, or forked, which saves them their imports."""

    def __init__(self, root, processes, torchrun, **settings):
        self.printed = root / "printed.txt"
        self.forked, self.agent = [], None
        argv = flags(root, **settings)
        with open(self.printed, "w") as printed:
            if torchrun:
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                           f"--nproc_per_node={processes}", str(ROOT / "unlearn.py"), *argv]
                self.agent = subprocess.Popen(command, cwd=root, stdout=printed, stderr=printed)
                return
            port = free_port()
            for rank in range(processes):
                options = (root, printed.fileno(), argv, rank, processes, port)
                fork = multiprocessing.get_context("fork")
                self.forked.append(fork.Process(target=run_forked, args=options))
            for process in self.forked:
                process.start()

    def running(self):
        if self.forked:
            return any(process.is_alive() for process in self.forked)
        return self.agent.poll() is None

    def kill(self, rng):
        """Kill every process, in any order.

        torchrun gives its workers sessions of their own: they are found by their parent.
        """
        pids = [process.pid for process in self.forked] or offspring(self.agent.pid)
        for pid in rng.sample(pids, len(pids)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.running():
            time.sleep(0.01)

    def check(self):
        codes = [process.exitcode for process in self.forked] or [self.agent.returncode]
        if any(codes):
            last = self.printed.read_text().strip().splitlines()[-1]
            raise RuntimeError(f"a run ended with {codes}: {last}")


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_forked(root, printed, argv, rank, processes, port):
    """One process as torchrun sets it up."""
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.chdir(root)
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
    sys.argv = ["unlearn.py", *argv]
    configs.run(unlearn.main)


def offspring(pid):
    """The process and all that it started."""
    children = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def finished(root, name="run"):
    path = root / "out" / name / "run.json"
    return path.exists() and json.loads(path.read_text()).get("finished", False)


def launch(root, processes, torchrun, rng=None, seconds=None, **settings):
    """Run it, or kill it `seconds` after its first logged step.

    Returns the seconds from that step until it was finished.
    """
    run = Launched(root, processes, torchrun, **settings)
    log = root / "out" / "target" / "log.jsonl"
    started, first_step = time.monotonic(), None
    while run.running() and not finished(root):
        now = time.monotonic()
        if now - started > 900:
            run.kill(random)
            raise RuntimeError("a run hangs")
        if first_step is None and log.exists() and log.stat().st_size:
            first_step = now
        if first_step and seconds is not None and now - first_step > seconds:
            run.kill(rng)
            return seconds
        time.sleep(0.005)
    took = time.monotonic() - first_step if first_step else 0.0
    while run.running():
        time.sleep(0.01)
    run.check()
    return took


def result(root):
    """What a run leaves, none of which may depend on a kill: {file: its digest, or a log's rows}"""
    found = {}
    for name in MODELS:
        out = root / "out" / name
        files = ["model.safetensors", "config.json"]
        if name == "run":
            files += ["scores.json", "examples.jsonl"]
        for file in files:
            found[f"{name}/{file}"] = hashlib.sha256((out / file).read_bytes()).hexdigest()
        rows = []
        for line in (out / "log.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.append({key: row[key] for key in row if key not in TIMING})
        found[f"{name}/log.jsonl"] = rows
        # no checkpoint, no half of a model
        found[f"{name}/left over"] = sorted(path.name for path in out.iterdir() if path.is_dir())
    return found


def stage(root):
    """What the killed run was doing, as far as its files tell."""
    for name in MODELS[:2]:
        if not finished(root, name):
            return f"making the {name} model"
    log = root / "out" / "run" / "log.jsonl"
    if not log.exists():
        return "scoring before the first step"
    if log.read_text().count('"loss"') == 40:
        return "scoring and saving at the end"
    return "unlearning, scoring and saving on the way"


def write_data(root):
    rng = random.Random(0)
    forget, retain = rows_of(12, rng, 5, True), rows_of(30, rng, 5, True)
    sets = {
        "full": retain + forget,
        "forget05": forget,
        "retain95": retain,
        "forget05_perturbed": forget,
        "retain_perturbed": retain[:5],
        "real_authors_perturbed": rows_of(4, rng, 3),
        "world_facts_perturbed": rows_of(4, rng, 3),
    }
    (root / "data").mkdir(parents=True)
    for name, rows in sets.items():
        save_rows(root / "data" / f"{name}.jsonl", rows)


def preload():
    """Import here, once, what unlearn.py imports late: forked processes have it at once."""
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo  # noqa: F401
    tokenizer = demo_tokenizer()
    with tempfile.TemporaryDirectory() as root:
        models.save_model(tiny_llama(tokenizer, 0), tokenizer, root)
        models.load_model(root, PROC)


def kill(kills=50, processes=1, torchrun=False, seed=0, say=print):
    """{kills, identical, ...}: how many killed and resumed runs equal the uninterrupted one."""
    rng, stages = random.Random(seed), {}
    n, identical, missed, saved = 0, 0, 0, 0
    if not torchrun:
        preload()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as root:
        root = Path(root)
        write_data(root)
        whole = launch(root, processes, torchrun)
        expected = result(root)
        while n < kills:
            shutil.rmtree(root / "out")
            moment = rng.random() * whole
            took = launch(root, processes, torchrun, rng, moment)
            if finished(root):  # it was faster than the first time: another moment
                missed, whole = missed + 1, took
                continue
            n, doing = n + 1, stage(root)
            stages[doing] = stages.get(doing, 0) + 1
            saved += any((root / "out" / name / "checkpoint").exists() for name in MODELS)
            try:
                launch(root, processes, torchrun, resume=True)
                got = result(root)
                differ = [key for key in expected if got[key] != expected[key]]
            except RuntimeError as e:
                differ = [str(e)]
            identical += not differ
            verdict = f"differs in {', '.join(differ)}" if differ else "identical"
            say(f"{n:3}: killed {moment:.2f} s of {whole:.2f} after the first step, {doing}: "
                f"{verdict}", flush=True)
    return {
        "processes": processes,
        "torchrun": torchrun,
        "seed": seed,
        "kills": kills,
        "identical": identical,
        "killed while": stages,
        "with a checkpoint to go on from": saved,
        "ended before the kill, drawn again": missed,
    }


# ------------------------------------------------------------------------------------------------
# nonsense


NASTY = (
    None, True, 0, -1, 7, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 10 ** 400,
    "", " ", "None", "\ud800", "\0", "\u202e", "\u2028", "naïve 日本 🙂", "</s>", "<s></s>",
    "word " * 600, "1" * 5000, "a\nb\rc", "{", "[INST]", "\ufeff",
    [], [[]], {}, {"a": 1}, ["a", 3], [None], ["", "b"], ["x"] * 50, [float("nan")], [1.0],
)
COLUMNS = (
    "question", "answer", "text", "ids", "raw", "prompt", "gt", "paraphrased_answer",
    "perturbed_answer", "alternate", "set", "index", "nll", "paraphrased_nll", "perturbed_nll",
    "rougeL_recall", "rougeL_f1", "min_k", "n_tokens", "kl", "generated", "",
)


def mutate(value, rng, depth=0):
    """A JSON value with something wrong in it, somewhere; the deeper, the likelier."""
    if isinstance(value, dict) and value and rng.random() < 1 - 0.05 * depth:
        key, value = rng.choice(list(value)), dict(value)
        change = rng.randrange(6)
        if change == 0:
            del value[key]
        elif change == 1:
            value[rng.choice(COLUMNS)] = value.pop(key)
        elif change == 2:
            value[rng.choice(COLUMNS)] = rng.choice(NASTY)
        else:
            value[key] = mutate(value[key], rng, depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.97 - 0.1 * depth:
        i, value = rng.randrange(len(value)), list(value)
        mutated = [mutate(value[i], rng, depth + 1)]
        value[i:i + 1] = rng.choice(([], [value[i]] * 2, mutated, mutated, mutated))
        return value
    return rng.choice(NASTY)


def spoil(raw, rng):
    """The bytes of a file, damaged."""
    i = rng.randrange(len(raw) + 1)
    damage = rng.randrange(12)
    if damage == 0:
        return raw[:i]
    if damage == 1:
        return raw[:i] + bytes([rng.randrange(256)]) + raw[i + 1:]
    return (
        b"",
        b"\n \n",
        b"\xef\xbb\xbf" + raw,
        raw.decode("utf8").encode("utf-16"),
        raw[:i] + b"\0" + raw[i:],
        b"[" * 100_000,
        raw[:i] + b'{"a":' * 30_000,
        raw.replace(b"\n", b"\r\n"),
        raw.replace(b'"', b"'"),
        raw + raw[:i],
    )[damage - 2]


def put(path, value, rng=None):
    """Write rows as some file that holds them; with an rng mostly with something wrong."""
    indent = None
    if rng:
        for _ in range(rng.choice((0, 1, 1, 1, 2, 5))):
            value = mutate(value, rng)
        indent = rng.choice((None, 1))
    if path.suffix == ".jsonl" and isinstance(value, list):
        text = "\n".join(json.dumps(row) for row in value)
    else:
        text = json.dumps(value, indent=indent)
    raw = text.encode()
    if rng and rng.random() < 0.15:
        raw = spoil(raw, rng)
    path.write_bytes(raw)
    return path


def tofu_log():
    """A recorded evaluation as TOFU's code writes it."""
    scores = {
        "avg_gt_loss": 1.5,
        "average_perturb_loss": [1.0, 2.0],
        "avg_paraphrased_loss": 1.2,
        "rougeL_recall": 0.5,
        "num_token_gt": 4,
        "generated_text": ["q", "a", "b"],
    }
    log = {}
    for key, value in scores.items():
        log[key] = {str(i): value for i in range(3)}
    return {"eval_log_forget.json": log}


def open_unlearning_log():
    """A recorded evaluation as open-unlearning writes it."""
    scores = {
        "Prob": {"avg_loss": 1.0},
        "PARA_Prob": {"avg_loss": 1.0},
        "PERT_Prob": {"avg_loss": [2.0]},
        "ROUGE": {"rougeL_recall": 1.0, "generation": "a"},
    }
    log = {}
    for key, value in scores.items():
        log[f"forget_Q_A_{key}"] = {"value_by_index": {"0": value}}
    return log


class Bench:
    """A tiny model, good data of every kind, and one function per kind of nonsense.

    Each takes an rng and returns scores (or None), or raises an exception.
    """

    def __init__(self, root):
        self.root = root
        write_data(root)
        self.tokenizer = demo_tokenizer()
        self.lm = self.save_tiny("model", seed=0)
        self.save_tiny("retain", seed=1)
        self.config = configs.make(evaluate.Config, {
            "benchmark": "tofu", "subset": "forget05", "template": "qa", "max_new_tokens": 2})
        self.rows = rows_of(4, random.Random(0), 2, True)
        bench = data.load("tofu", "forget05", str(root / "data"))
        _, self.records = evaluate.evaluate(self.lm, self.tokenizer, bench, self.config, PROC)
        self.muse = self.muse_sets()

    def save_tiny(self, name, seed):
        lm = tiny_llama(self.tokenizer, seed, hidden=16, layers=1, heads=1)
        models.save_model(lm, self.tokenizer, str(self.root / name))
        return models.load_model(str(self.root / name), PROC)

    def muse_sets(self):
        story = " ".join(f"{row['question']} {row['answer']}" for row in self.rows)
        texts = [story, story[9:]]
        questions = []
        for row in self.rows[:2]:
            questions.append({"question": row["question"], "answer": row["answer"]})
        return {
            "raw/forget": [story],
            "raw/retain1": [story],
            "privleak/forget": texts,
            "privleak/holdout": texts,
            "verbmem/forget": [{"prompt": story, "gt": "amber boat"}],
            "knowmem/forget_qa": questions,
            "knowmem/retain_qa": questions,
            "knowmem/forget_qa_icl": questions,
            "knowmem/retain_qa_icl": questions,
        }

    def score(self, bench, **settings):
        c = dataclasses.replace(self.config, **settings)
        scores, _ = evaluate.evaluate(self.lm, self.tokenizer, bench, c, PROC)
        return scores

    def own_rows(self, rng):
        """Rows to unlearn, and alternates for them."""
        questions = [row["question"] for row in self.rows]
        path = self.root / f"own{rng.choice(('.jsonl', '.json', '.txt', ''))}"
        put(path, rng.choice((self.rows, questions)), rng)
        retain = str(path) if rng.random() < 0.5 else None
        bench = data.load("tofu", "forget05", None, str(path), retain)
        method = rng.choice(("nll", "idk", "altpo"))
        given = dict(benchmark="tofu", template="qa", forget_loss=method,
                     max_length=rng.choice((2, 20, 500)))
        if method == "altpo":
            alternates = [{"question": question, "alternate": "No."} for question in questions]
            given["alternates"] = str(put(self.root / "alternates.jsonl", alternates, rng))
        c = configs.make(unlearn.Config, given)
        unlearn.encode_groups(c, self.tokenizer, PROC, forget=bench.forget, retain=bench.retain)
        return self.score(bench, max_length=c.max_length)

    def tofu_data(self, rng):
        folder = self.root / "tofu"
        shutil.copytree(self.root / "data", folder)
        path = rng.choice(sorted(folder.iterdir()))
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        put(path, rows[:3], rng)
        return self.score(data.load("tofu", "forget05", str(folder)), eval_rows=3)

    def muse_data(self, rng):
        folder, spoiled = self.root / "muse", rng.choice(sorted(self.muse))
        for name, rows in self.muse.items():
            path = folder / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path, rows, rng if name == spoiled else None)
        bench = data.load("muse", "books", str(folder))
        return self.score(bench, benchmark="muse", subset="books", eval_rows=1)

    def logs(self, rng):
        """Recorded evaluations: ours as lines or an array, TOFU's and open-unlearning's."""
        kinds = (self.records, tofu_log(), open_unlearning_log())
        log = rng.choice(kinds)
        retain = rng.choice((log, log, *kinds))
        records = []
        for name, value, spoiler in (("log", log, rng), ("kept", retain, rng.choice((rng, None)))):
            path = self.root / f"{name}{rng.choice(('.json', '.jsonl'))}"
            records.append(recorded.read_log(str(put(path, value, spoiler))))
        benchmark = rng.choice(("tofu", "tofu", "tofu", "muse", "markov"))
        c = configs.make(evaluate.Config, {"benchmark": benchmark})
        return evaluate.summarize(records[0], records[1], c)

    def draw_flags(self, config, rng):
        """A few settings, half of them with a value of their type."""
        fixed = ("steps", "epochs", "compile", "benchmark", "base_model", "device", "examples",
                 "plan")  # which exits
        names = [name for name in configs.fields(config) if name not in fixed]
        any_value = (
            *map(str, NASTY), "1,2", "(3,)", "qa", "nll", "none", "npo", "-0.0", "0.5", "2",
            "True", "False", "1e30", "-3", "/proc/none/x", ".", "(",
            str(self.root / "data" / "full.jsonl"), str(2 ** 64), "9" * 30)
        fitting = {
            "int": ("1", "2", "7", "0"),
            "a finite number": ("0.5", "1e-3", "2", "1e30", "-1", "1e-320"),
            "bool": ("True", "False"),
            "a comma-separated list of int": ("1", "1,2", "(2,)"),
        }
        flags = []
        for name in rng.sample(names, rng.choice((1, 1, 2, 3))):
            kind = configs.type_name(configs.fields(config)[name]).removesuffix(" or None")
            values = fitting.get(kind, any_value) if rng.random() < 0.6 else any_value
            flags.append(f"--{name}={rng.choice(values)}")
        if rng.random() < 0.03:
            flags.append("--nonsense=1")
        return flags

    def settings(self, rng):
        """Settings on the command line; what is accepted is run, two steps of it."""
        script = rng.choice((unlearn, unlearn, evaluate, relearn))
        settings = dict(
            benchmark="tofu", subset="forget05", data=self.root / "data", template="qa",
            eval_rows=2, device="cpu", retain_model=self.root / "retain", max_new_tokens=2)
        if script is unlearn:
            settings |= dict(model=self.root / "model", out="out/run", batch_size=4, steps=2)
        argv = [f"--{name}={value}" for name, value in settings.items()]
        argv += self.draw_flags(script.Config, rng)
        if script is not unlearn:
            configs.load(script.Config, argv)
            return None
        unlearn.main(argv)
        for run in Path("out").glob("*/run.json"):
            scores = run.parent / "scores.json"
            if scores.exists():
                return json.loads(scores.read_text())
        return None

    def config_file(self, rng):
        path = self.root / "mine.py"
        lines = [
            "lr = 1e-5", "steps = 3", "eval_at = (1, 2)", "_x = 4", "forget_loss = 'npo'",
            "import math", "lr = 1 / 0", "def f(): pass", "forget_weight = 10 ** 400",
            "raise SystemExit", "out = None", "beta = [1]", "from configs.demo import *", "x = (",
        ]
        raw = "\n".join(rng.sample(lines, rng.randrange(1, 6))).encode()
        path.write_bytes(spoil(raw, rng) if rng.random() < 0.5 else raw)
        configs.load(unlearn.Config, [str(path)])

    def run_json(self, rng):
        """A run directory whose settings were damaged, scored."""
        c = configs.make(unlearn.Config, {"template": "qa"})
        put(self.root / "model" / "run.json", dataclasses.asdict(c) | {"finished": True}, rng)
        name = str(self.root / "model")
        models.load_model(name, PROC)
        configs.make(evaluate.Config, rundir.inherit(evaluate.INHERITED, [name], {}))


def try_case(kind, rng):
    """(accepted, refused or traceback, what happened)."""
    try:
        scores = kind(rng) or {}
        for value in scores.values():
            if not isinstance(value, float) or not math.isfinite(value):
                return "traceback", f"scores that are not finite: {scores}"
        return "accepted", ""
    except (configs.UsageError, configs.Failure) as e:
        if not str(e).strip() or "Error" in str(e)[:30]:
            return "traceback", f"no sentence: {str(e)[:300]}"
        return "refused", ""
    except (Exception, SystemExit) as e:
        frames = traceback.extract_tb(e.__traceback__)
        ours = [frame for frame in frames
                if Path(frame.filename).parent == ROOT or "configs" in frame.filename]
        last = (ours or frames)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return "traceback", f"{type(e).__name__}: {str(e)[:200]} ({where})"


def nonsense(cases=2000, seed=0, say=print):
    """{cases, accepted, refused, tracebacks}; each traceback is printed, and there must be none."""
    counts = {"accepted": {}, "refused": {}}
    n_tracebacks, here = 0, os.getcwd()
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("error", RuntimeWarning)  # NumPy's, which a user would see
        bench = Bench(Path(root))
        kinds = [bench.own_rows, bench.own_rows, bench.tofu_data, bench.muse_data, bench.logs,
                 bench.logs, bench.settings, bench.settings, bench.config_file, bench.run_json]
        os.chdir(root)
        try:
            for i in range(cases):
                rng = random.Random(f"{seed} {i}")
                kind = rng.choice(kinds)
                with contextlib.redirect_stdout(io.StringIO()):
                    outcome, what = try_case(kind, rng)
                if outcome == "traceback":
                    n_tracebacks += 1
                    say(i, kind.__name__, what)
                else:
                    by_kind = counts[outcome]
                    by_kind[kind.__name__] = by_kind.get(kind.__name__, 0) + 1
                for name in ("tofu", "muse", "out"):
                    shutil.rmtree(name, ignore_errors=True)
                Path("model/run.json").unlink(missing_ok=True)
        finally:
            os.chdir(here)
    return {"cases": cases, "seed": seed, **counts, "tracebacks": n_tracebacks}


# ------------------------------------------------------------------------------------------------


def main(argv):
    command = argv[0] if argv else "--help"
    options = {}
    for word in argv[1:]:
        name, _, value = word.removeprefix("--").partition("=")
        options[name] = value == "True" if name == "torchrun" else int(value)
    if command == "kill":
        found = kill(**options)
        failed = found["identical"] < found["kills"]
    elif command == "nonsense":
        found = nonsense(**options)
        failed = found["tracebacks"] > 0
    else:
        raise SystemExit(__doc__)
    print(json.dumps(found))
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
