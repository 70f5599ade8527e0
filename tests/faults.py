"""Kill runs, feed nonsense: python tests/faults.py kill | nonsense. Too long for the test suite, which runs a few of each.

    python tests/faults.py kill --kills=50 --processes=1    # a run that makes its models, unlearns and scores; Linux, CPU
    python tests/faults.py kill --kills=50 --processes=2    # the same under torchrun (gloo)
    python tests/faults.py nonsense --cases=2000            # malformed rows, logs, files and settings

`kill`: the run is killed (SIGKILL, every process of it) at a random moment between its first training step and its end, and
started again with --resume=True; models, scores, examples and logs must be those of the run that nothing happened to, bit by bit.
`nonsense`: each case is scored to finite numbers or refused with a sentence of ours (UsageError, Failure); any other exception is
one that a user would have seen as a traceback. A seed gives the same moments (as fractions of a run) and the same cases.
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
from conftest import ROOT, rows_of, save_rows  # noqa: E402

import configs  # noqa: E402
import evaluate  # noqa: E402
import model as models  # noqa: E402
import relearn  # noqa: E402
import torch  # noqa: E402
import unlearn  # noqa: E402

MODELS = ("target", "retain", "run")  # in the order they are made; below out/
TIMING = ("tokens_per_s", "memory_gb", "seconds")


# ----------------------------------------------------------------------------------------------------------------------
# kills


def flags(place, **more):
    """A 40-step run that makes its target and its retain model first; it saves after each step, so that many kills hit a save."""
    settings = dict(benchmark="tofu", subset="forget05", data=place / "data", template="qa", base_model="tiny", model="out/target",
                    retain_model="out/retain", out="out/run", device="cpu", batch_size=4, steps=40, lr=1e-3, forget_loss="npo",
                    finetune_lr=1e-3, finetune_epochs=3, finetune_batch_size=8, save_every=0.01, eval_every=4, max_new_tokens=8)
    return [f"--{k}={v}" for k, v in (settings | more).items()]


class Launched:
    """unlearn.py on some processes: under torchrun, or forked from this one, which saves each the seconds of its imports."""

    def __init__(self, place, processes, torchrun, **more):
        self.said, argv = place / "said.txt", flags(place, **more)
        with open(self.said, "w") as said:
            if torchrun:
                start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
                self.forked, self.agent = [], subprocess.Popen([*start, str(ROOT / "unlearn.py"), *argv], cwd=place, stdout=said, stderr=said)
                return
            with socket.socket() as s:
                s.bind(("localhost", 0))
                port = s.getsockname()[1]
            self.forked = [multiprocessing.get_context("fork").Process(target=forked, args=(place, said.fileno(), argv, rank, processes, port))
                           for rank in range(processes)]
            for p in self.forked:
                p.start()

    def running(self):
        return any(p.is_alive() for p in self.forked) if self.forked else self.agent.poll() is None

    def kill(self, rng):
        """Every process, in any order (torchrun gives its workers sessions of their own: they are found by their parent)."""
        pids = [p.pid for p in self.forked] or offspring(self.agent.pid)
        for pid in rng.sample(pids, len(pids)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        while self.running():
            time.sleep(0.01)

    def check(self):
        codes = [p.exitcode for p in self.forked] or [self.agent.returncode]
        if any(codes):
            raise RuntimeError(f"a run ended with {codes}: {self.said.read_text().strip().splitlines()[-1]}")


def forked(place, said, argv, rank, processes, port):
    """One process as torchrun sets it up."""
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(place)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost",
                       "MASTER_PORT": str(port)}
    sys.argv = ["unlearn.py", *argv]
    configs.run(unlearn.main)


def offspring(pid):
    """The process and all that it started."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(status.read_text().rpartition(")")[2].split()[1]), []).append(int(status.parent.name))
        except OSError:  # it has ended meanwhile
            pass
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def finished(place, name="run"):
    path = place / "out" / name / "run.json"
    return path.exists() and json.loads(path.read_text()).get("finished", False)


def launch(place, processes, torchrun, rng=None, seconds=None, **more):
    """Run it, or kill it `seconds` after its first logged step. Returns the seconds from that step until it was finished."""
    run = Launched(place, processes, torchrun, **more)
    first, began = place / "out" / "target" / "log.jsonl", None
    started = time.monotonic()
    while run.running() and not finished(place):
        if time.monotonic() - started > 900:
            run.kill(random)
            raise RuntimeError("a run hangs")
        if began is None and first.exists() and first.stat().st_size:
            began = time.monotonic()
        if began and seconds is not None and time.monotonic() - began > seconds:
            run.kill(rng)
            return seconds
        time.sleep(0.005)
    took = time.monotonic() - (began or time.monotonic())
    while run.running():
        time.sleep(0.01)
    run.check()
    return took


def result(place):
    """{what a run leaves: its digest, or for logs their rows}; nothing of it may depend on a kill."""
    found = {}
    for name in MODELS:
        out = place / "out" / name
        for file in ("model.safetensors", "config.json", "scores.json", "examples.jsonl"):
            if name == "run" or file in ("model.safetensors", "config.json"):
                found[f"{name}/{file}"] = hashlib.sha256((out / file).read_bytes()).hexdigest()
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        found[f"{name}/log.jsonl"] = [{k: v for k, v in r.items() if k not in TIMING} for r in rows]
        left = sorted(p.name for p in out.iterdir() if p.is_dir())
        found[f"{name}/left over"] = left  # no checkpoint, no part of a model
    return found


def stage(place):
    """What the killed run was doing, as far as its files tell."""
    for name in MODELS[:2]:
        if not finished(place, name):
            return f"making the {name} model"
    if not (place / "out" / "run" / "log.jsonl").exists():
        return "scoring before the first step"
    steps = (place / "out" / "run" / "log.jsonl").read_text().count('"loss"')
    return "scoring and saving at the end" if steps == 40 else "unlearning, scoring and saving on the way"


def data(place):
    rng = random.Random(0)
    forget, retain = rows_of(12, rng, 5, True), rows_of(30, rng, 5, True)
    (place / "data").mkdir(parents=True)
    for name, rows in {"full": retain + forget, "forget05": forget, "retain95": retain, "forget05_perturbed": forget,
                       "retain_perturbed": retain[:5], "real_authors_perturbed": rows_of(4, rng, 3),
                       "world_facts_perturbed": rows_of(4, rng, 3)}.items():
        save_rows(place / "data" / f"{name}.jsonl", rows)


def preload():
    """What unlearn.py imports late, once and here: forked processes have it at once."""
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo  # noqa: F401
    tokenizer, proc = unlearn.data.demo_tokenizer(), models.Process(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as root:
        models.save_model(models.tiny_llama(tokenizer, proc, 0), tokenizer, root)
        models.load_model(root, proc)


def kill(kills=50, processes=1, torchrun=False, seed=0, say=print):
    """{kills, identical, ...}: how many killed and resumed runs are the uninterrupted one, bit by bit."""
    rng, stages, identical, missed, n, saved = random.Random(seed), {}, 0, 0, 0, 0
    if not torchrun:
        preload()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        place = Path(root)
        data(place)
        whole = launch(place, processes, torchrun)
        expected = result(place)
        while n < kills:
            shutil.rmtree(place / "out")
            moment = rng.random() * whole
            took = launch(place, processes, torchrun, rng, moment)
            if finished(place):  # it was faster than the first time: another moment
                missed, whole = missed + 1, took
                continue
            n, at = n + 1, stage(place)
            stages[at] = stages.get(at, 0) + 1
            saved += any((place / "out" / name / "checkpoint").exists() for name in MODELS)
            try:
                launch(place, processes, torchrun, resume=True)
                got = result(place)
                differ = [k for k in expected if got[k] != expected[k]]
            except RuntimeError as e:
                differ = [str(e)]
            identical += not differ
            say(f"{n:3}: killed {moment:.2f} s of {whole:.2f} after the first step, {at}: "
                f"{'differs in ' + ', '.join(differ) if differ else 'identical'}", flush=True)
    return {"processes": processes, "torchrun": torchrun, "seed": seed, "kills": kills, "identical": identical,
            "killed while": stages, "with a checkpoint to go on from": saved, "ended before the kill, drawn again": missed}


# ----------------------------------------------------------------------------------------------------------------------
# nonsense

NASTY = (None, True, 0, -1, 7, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 10 ** 400, "", " ", "None", "\ud800", "\0", "\u202e",
         "\u2028", "naïve 日本 🙂", "</s>", "<s></s>", "word " * 600, "1" * 5000, [], [[]], {}, {"a": 1}, ["a", 3], [None], ["", "b"], ["x"] * 50,
         [float("nan")], [1.0], "a\nb\rc", "{", "[INST]", "\ufeff")
COLUMNS = ("question", "answer", "text", "ids", "raw", "prompt", "gt", "paraphrased_answer", "perturbed_answer", "alternate", "set", "index",
           "nll", "paraphrased_nll", "perturbed_nll", "rougeL_recall", "rougeL_f1", "min_k", "n_tokens", "kl", "generated", "")


def mutate(thing, rng, depth=0):
    """A JSON value with something wrong in it, somewhere; the deeper, the likelier."""
    if isinstance(thing, dict) and thing and rng.random() < 1 - 0.05 * depth:
        key, thing = rng.choice(list(thing)), dict(thing)
        what = rng.randrange(6)
        if what == 0:
            del thing[key]
        elif what == 1:
            thing[rng.choice(COLUMNS)] = thing.pop(key)
        elif what == 2:
            thing[rng.choice(COLUMNS)] = rng.choice(NASTY)
        else:
            thing[key] = mutate(thing[key], rng, depth + 1)
        return thing
    if isinstance(thing, list) and thing and rng.random() < 0.97 - 0.1 * depth:
        i, thing = rng.randrange(len(thing)), list(thing)
        thing[i:i + 1] = rng.choice(([], [thing[i]] * 2, *[[mutate(thing[i], rng, depth + 1)]] * 3))
        return thing
    return rng.choice(NASTY)


def spoil(raw, rng):
    """The bytes of a file, damaged."""
    i = rng.randrange(len(raw) + 1)
    return rng.choice((lambda: raw[:i], lambda: raw[:i] + bytes([rng.randrange(256)]) + raw[i + 1:], lambda: b"", lambda: b"\n \n",
                       lambda: b"\xef\xbb\xbf" + raw, lambda: raw.decode("utf8").encode("utf-16"), lambda: raw[:i] + b"\0" + raw[i:],
                       lambda: b"[" * 100_000, lambda: raw[:i] + b'{"a":' * 30_000, lambda: raw.replace(b"\n", b"\r\n"),
                       lambda: raw.replace(b'"', b"'"), lambda: raw + raw[:i]))()


def put(path, thing, rng):
    """Write rows as some file that holds them, most of the time with something wrong."""
    for _ in range(rng.choice((0, 1, 1, 1, 2, 5)) if rng else 0):
        thing = mutate(thing, rng)
    lines = path.suffix == ".jsonl" and isinstance(thing, list)
    raw = ("\n".join(json.dumps(r) for r in thing) if lines else json.dumps(thing, indent=rng and rng.choice((None, 1)))).encode()
    path.write_bytes(spoil(raw, rng) if rng and rng.random() < 0.15 else raw)
    return path


class Bench:
    """A tiny model, good data of every kind, and one function a kind of nonsense: rng -> scores (or None), or an exception."""

    def __init__(self, place):
        self.place, self.proc, rng = place, models.Process(0, 1, torch.device("cpu")), random.Random(0)
        data(place)
        self.tokenizer = unlearn.data.demo_tokenizer()
        lm = models.tiny_llama(self.tokenizer, self.proc, 0, hidden=16, layers=1, heads=1)
        models.save_model(lm, self.tokenizer, str(place / "model"))
        models.save_model(models.tiny_llama(self.tokenizer, self.proc, 1, hidden=16, layers=1, heads=1), self.tokenizer, str(place / "retain"))
        lm.row_limit = models.row_limit(lm)
        self.lm = lm
        self.config = configs.make(evaluate.Config, {"benchmark": "tofu", "subset": "forget05", "template": "qa", "max_new_tokens": 2})
        self.rows = rows_of(4, rng, 2, True)
        bench = unlearn.data.load("tofu", "forget05", str(place / "data"))
        self.records = evaluate.evaluate(self.lm, self.tokenizer, bench, self.config, self.proc)[1]
        story = " ".join(r["question"] + " " + r["answer"] for r in self.rows)
        qa, texts = [{k: r[k] for k in ("question", "answer")} for r in self.rows[:2]], [story, story[9:]]
        self.muse = {"raw/forget": [story], "raw/retain1": [story], "privleak/forget": texts, "privleak/holdout": texts,
                     "verbmem/forget": [{"prompt": story, "gt": "amber boat"}], "knowmem/forget_qa": qa, "knowmem/retain_qa": qa,
                     "knowmem/forget_qa_icl": qa, "knowmem/retain_qa_icl": qa}

    def score(self, bench, **more):
        return evaluate.evaluate(self.lm, self.tokenizer, bench, dataclasses.replace(self.config, **more), self.proc)[0]

    def own_rows(self, rng):
        """Rows to unlearn, and alternates for them."""
        path = put(self.place / f"own{rng.choice(('.jsonl', '.json', '.txt', ''))}", rng.choice((self.rows, [r["question"] for r in self.rows])), rng)
        bench = unlearn.data.load("tofu", "forget05", None, str(path), str(path) if rng.random() < 0.5 else None)
        method = rng.choice(("nll", "idk", "altpo"))
        given = dict(benchmark="tofu", template="qa", forget_loss=method, max_length=rng.choice((2, 20, 500)))
        if method == "altpo":
            given["alternates"] = str(put(self.place / "alternates.jsonl", [{"question": r["question"], "alternate": "No."} for r in self.rows], rng))
        c = configs.make(unlearn.Config, given)
        unlearn.encode_groups(c, self.tokenizer, self.proc, forget=bench.forget, retain=bench.retain)
        return self.score(bench, max_length=c.max_length)

    def tofu_data(self, rng):
        folder = self.place / "tofu"
        shutil.copytree(self.place / "data", folder)
        path = rng.choice(sorted(folder.iterdir()))
        put(path, [json.loads(line) for line in path.read_text().splitlines()][:3], rng)
        return self.score(unlearn.data.load("tofu", "forget05", str(folder)), eval_rows=3)

    def muse_data(self, rng):
        folder, spoiled = self.place / "muse", rng.choice(sorted(self.muse))
        for name, rows in self.muse.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            put(folder / f"{name}.json", rows, rng if name == spoiled else None)
        return self.score(unlearn.data.load("muse", "books", str(folder)), benchmark="muse", subset="books", eval_rows=1)

    def logs(self, rng):
        """Recorded evaluations: ours as lines or an array, TOFU's and open-unlearning's."""
        kinds = (self.records, {"eval_log_forget.json": {k: {str(i): v for i in range(3)} for k, v in dict(
            avg_gt_loss=1.5, average_perturb_loss=[1.0, 2.0], avg_paraphrased_loss=1.2, rougeL_recall=0.5, num_token_gt=4,
            generated_text=["q", "a", "b"]).items()}},
            {f"forget_Q_A_{k}": {"value_by_index": {"0": v}} for k, v in dict(
                Prob={"avg_loss": 1.0}, PARA_Prob={"avg_loss": 1.0}, PERT_Prob={"avg_loss": [2.0]}, ROUGE={"rougeL_recall": 1.0, "generation": "a"}).items()})
        log = rng.choice(kinds)
        retain = rng.choice((log, log, *kinds))
        read = [evaluate.read_log(str(put(self.place / f"{n}{rng.choice(('.json', '.jsonl'))}", x, r)))
                for n, x, r in (("log", log, rng), ("kept", retain, rng.choice((rng, None))))]
        benchmark = rng.choice(("tofu", "tofu", "tofu", "muse", "markov"))
        return evaluate.summarize(read[0], read[1], configs.make(evaluate.Config, {"benchmark": benchmark}))

    def settings(self, rng):
        """Settings on the command line; what is accepted is run, two steps of it."""
        script = rng.choice((unlearn, unlearn, evaluate, relearn))
        names = [n for n in configs.fields(script.Config) if n not in ("steps", "epochs", "compile", "benchmark", "base_model", "device", "examples")]
        values = (*map(str, NASTY), "1,2", "(3,)", "qa", "nll", "none", "npo", "-0.0", "0.5", "2", "True", "False", "1e30", "-3", "/proc/none/x", ".", "("
                  "", str(self.place / "data" / "full.jsonl"), str(2 ** 64), "9" * 30)
        fitting = {"int": ("1", "2", "7", "0"), "float": ("0.5", "1e-3", "2", "1e30", "-1", "1e-320"), "bool": ("True", "False"),
                   "a fi": ("0.5", "1e-3", "2", "1e30", "-1", "1e-320"), "a co": ("1", "1,2", "(2,)")}
        flags = []
        for name in rng.sample(names, rng.choice((1, 1, 2, 3))):
            kind = configs.spell(configs.fields(script.Config)[name])[:4].split(" or")[0]
            flags.append(f"--{name}={rng.choice(fitting.get(kind, values) if rng.random() < 0.6 else values)}")
        if rng.random() < 0.03:
            flags.append("--nonsense=1")
        base = [f"--{k}={v}" for k, v in dict(benchmark="tofu", subset="forget05", data=self.place / "data", template="qa", eval_rows=2,
                                              device="cpu", retain_model=self.place / "retain", max_new_tokens=2).items()]
        if script is not unlearn:
            return configs.load(script.Config, base + flags) and None
        base += [f"--{k}={v}" for k, v in dict(model=self.place / "model", out="out/run", batch_size=4, steps=2).items()]
        unlearn.main([*base, *flags])
        run = next(Path("out").glob("*/run.json"), None)
        scores = run and run.parent / "scores.json"
        return json.loads(scores.read_text()) if scores and scores.exists() else None

    def config_file(self, rng):
        path = self.place / "mine.py"
        lines = ["lr = 1e-5", "steps = 3", "eval_at = (1, 2)", "_x = 4", "forget_loss = 'npo'", "import math", "lr = 1 / 0", "def f(): pass",
                 "forget_weight = 10 ** 400", "raise SystemExit", "out = None", "beta = [1]", "from configs.demo import *", "x = ("]
        raw = "\n".join(rng.sample(lines, rng.randrange(1, 6))).encode()
        path.write_bytes(spoil(raw, rng) if rng.random() < 0.5 else raw)
        return configs.load(unlearn.Config, [str(path)]) and None

    def run_json(self, rng):
        """A run directory whose settings were damaged, scored."""
        run = dataclasses.asdict(configs.make(unlearn.Config, {"template": "qa"})) | {"finished": True}
        put(self.place / "model" / "run.json", run, rng)
        models.load_model(str(self.place / "model"), self.proc)
        return configs.make(evaluate.Config, evaluate.inherit(evaluate.Config, [str(self.place / "model")], {})) and None


def nonsense(cases=2000, seed=0, say=print):
    """{cases, accepted, refused, tracebacks}: the last is a list of (case, what happened), and has to be empty."""
    counts, refused, tracebacks, here = {}, {}, [], os.getcwd()
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("error", RuntimeWarning)  # NumPy's, which a user would see
        bench = Bench(Path(root))
        kinds = [bench.own_rows, bench.own_rows, bench.tofu_data, bench.muse_data, bench.logs, bench.logs, bench.settings,
                 bench.settings, bench.config_file, bench.run_json]
        os.chdir(root)
        try:
            for i in range(cases):
                rng = random.Random(f"{seed} {i}")
                kind = rng.choice(kinds)
                try:
                    scores = kind(rng)
                    if scores and not all(isinstance(v, float) and math.isfinite(v) for v in scores.values()):
                        raise ValueError(f"scores that are not finite: {scores}")
                    counts[kind.__name__] = counts.get(kind.__name__, 0) + 1
                except (configs.UsageError, configs.Failure) as e:
                    refused[kind.__name__] = refused.get(kind.__name__, 0) + 1
                    if not str(e).strip() or "Error" in str(e)[:30]:
                        tracebacks.append((i, kind.__name__, f"no sentence: {str(e)[:300]}"))
                except (Exception, SystemExit) as e:
                    where = traceback.extract_tb(e.__traceback__)
                    where = [f for f in where if Path(f.filename).parent == ROOT or "configs" in f.filename] or where
                    tracebacks.append((i, kind.__name__, f"{type(e).__name__}: {str(e)[:200]} ({Path(where[-1].filename).name}:{where[-1].lineno})"))
                for name in ("tofu", "muse", "out", "model/run.json"):
                    path = Path(name)
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        finally:
            os.chdir(here)
    for case in tracebacks:
        say(*case)
    return {"cases": cases, "seed": seed, "accepted": counts, "refused": refused, "tracebacks": len(tracebacks)}


# ----------------------------------------------------------------------------------------------------------------------


def main(argv):
    what, words = (argv or ["--help"])[0], dict(a.removeprefix("--").split("=") for a in argv[1:])
    if what not in ("kill", "nonsense"):
        raise SystemExit(__doc__)
    found = (kill if what == "kill" else nonsense)(**{k: v == "True" if k == "torchrun" else int(v) for k, v in words.items()})
    print(json.dumps(found))
    sys.exit(found["identical"] < found["kills"] if what == "kill" else bool(found["tracebacks"]))


if __name__ == "__main__":
    main(sys.argv[1:])
