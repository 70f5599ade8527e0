"""Data: what is forgotten, what is kept, what is scored, and how text becomes token ids.

    bench = load("tofu", "forget05", "locuslab/TOFU")       # a hub id or a local directory; see `load`
    encode(tokenizer, "Question: ...\nAnswer:", " ...")     # -> Example(ids, start): ids[start:] is what a loss reads

Rows are plain dicts with question and answer, or text, or raw (to be cut into chunks). Nothing here depends on a model.
"""
import bisect
import dataclasses
import itertools
import json
import os
import random
import re
from typing import NamedTuple

from configs import Mistake

HUB = {"tofu": "locuslab/TOFU", "muse": "muse-bench/MUSE-{}"}  # {}: the subset
SUBSETS = {"demo": ("authors",), "tofu": ("forget10", "forget05", "forget01"), "muse": ("news", "books"),
           "markov": ("short", "unseen")}  # the first is the default
CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")
REFUSALS = os.path.join(CONFIGS, "refusals.txt")


@dataclasses.dataclass
class Benchmark:
    forget: list  # training rows
    retain: list
    evals: dict   # {set name: rows to score}; TOFU's: forget, retain, real_authors, world_facts; MUSE's: MUSE_SETS
    full: list = dataclasses.field(default_factory=list)         # what a target model is fine-tuned on
    retain_full: list = dataclasses.field(default_factory=list)  # ... and a retain-only model
    holdout: list = dataclasses.field(default_factory=list)      # rows like forget that no model was trained on: membership


# ----------------------------------------------------------------------------------------------------------------------
# reading rows


def read_rows(path, whole=False):
    """The rows of one .jsonl, .json (an array or JSON lines) or .txt file as a list of dicts.

    A .txt file holds one row of text a line; whole: it is one text.
    """
    text = read_text(path)
    if path.endswith(".txt"):
        rows = [part for part in ([text] if whole else text.split("\n")) if part.strip()]
    elif path.endswith(".json") and text.lstrip().startswith("["):
        rows = parse(text, path)
    else:
        rows = [parse(line, f"{path}, line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise Mistake(f"{path}: holds no rows.")
    return [{"text": r} if isinstance(r, str) else r for r in rows]


def read_text(path):
    """A file's text, without the mark that Windows puts before it."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise Mistake(f"{path}: not UTF-8 at byte {e.start}; save the file as UTF-8.") from None
    except OSError as e:
        raise Mistake(f"{path}: cannot be read ({e.strerror}).") from None


def parse(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Mistake(f"{where}: not valid JSON ({e}).") from None


OPTIONAL = ("paraphrased_question", "paraphrased_answer", "perturbed_answer", "alternate")


def check_rows(rows, where, columns):
    """The rows, with the wanted columns and the optional ones they have, all of them text (perturbed_answer: a list of texts).

    Other columns are dropped: whatever a file calls `ids` or `raw` must not pass for what is made here.
    """
    kept = []
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise Mistake(f"{where}, row {i}: must be an object or a string, got {type(row).__name__}.")
        for name in columns:
            if name not in row:
                raise Mistake(f"{where}, row {i}: no column '{name}'; it has {', '.join(row)[:200] or 'none'}.")
        kept.append({k: row[k] for k in (*columns, *OPTIONAL) if k in columns or row.get(k) is not None})
        for name, value in kept[-1].items():
            several = name == "perturbed_answer" or name == "alternate" and isinstance(value, list)
            texts = value if several and isinstance(value, list) and value else [None if several else value]
            if not all(isinstance(t, str) and not re.search("[\ud800-\udfff]", t) for t in texts):
                raise Mistake(f"{where}, row {i}: {name} must be {'a list of texts' if several else 'text'}, got {value!r:.80}.")
    return kept


def read_config(source, config, columns, split="train", whole=False, missing=None):
    """One config of a data set: `<config>.json(l)` or `<config>/<split>.json(l)/.txt` of a directory, or of a hub data set.

    missing: what to return, if anything, where there is no such config.
    """
    if os.path.isdir(source):
        names = [f"{config}{ext}" for ext in (".json", ".jsonl")]
        names += [os.path.join(config, f"{split}{ext}") for ext in (".json", ".jsonl", ".txt")]
        paths = [p for p in (os.path.join(source, n) for n in names) if os.path.isfile(p)]
        if not paths and missing is not None:
            return missing
        if not paths:
            raise Mistake(f"{source} has none of {', '.join(names)}; --data= takes a hub id or a directory with these.")
        return check_rows(read_rows(paths[0], whole), paths[0], columns)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise Mistake(f"--data={source}: no such directory (and a hub id is written org/name).")
    import datasets  # not needed for local data, and slow to import
    repo, _, revision = source.partition("@")
    try:
        rows = datasets.load_dataset(repo, config, split=split, revision=revision or None).to_list()
    except Exception as e:
        if missing is not None:
            return missing
        raise Mistake(f"{source}, config {config}, split {split}: the hub did not give it ({type(e).__name__}: "
                      f"{(str(e).strip() or '-').splitlines()[0]}); "
                      "check the id and the network, or give a local directory with --data=DIR.") from None
    return check_rows(rows, f"{source}, config {config}", columns)


def read_own(path, whole=False):
    """A user's own rows: question and answer, or text."""
    rows = read_rows(path, whole)
    first = rows[0] if isinstance(rows[0], dict) else {}
    return check_rows(rows, path, ("text",) if "text" in first else ("question", "answer"))


# ----------------------------------------------------------------------------------------------------------------------
# benchmarks

QA = ("question", "answer")


def load(benchmark, subset, source=None, forget_data=None, retain_data=None, train=True, score=True, split=None, holdout=False):
    """The Benchmark. With forget_data / retain_data (files of rows) these are unlearned, kept and scored instead.

    MUSE's scores stay its own: forget_data, retain_data and split (config/split of the data set) are what is trained on.
    train, score: whether the training rows and the scoring rows are wanted; TOFU's scoring reads *_perturbed configs only.
    """
    source = source or hub(benchmark, subset)
    if benchmark == "muse":
        wanted = (forget_data or split or "raw/forget", retain_data or "raw/retain1") if train else ()
        return Benchmark(*([read_raw(source, name) for name in wanted] or ([], [])), load_muse(source) if score else {})
    if forget_data:
        forget = read_own(forget_data)
        retain = read_own(retain_data) if retain_data else []
        return Benchmark(forget, retain, {"forget": forget} | ({"retain": retain[:400]} if retain else {}))
    bench = LOADERS[benchmark](source, subset, train, score)
    if retain_data:
        bench.retain = read_own(retain_data)
    if holdout and benchmark == "tofu":
        bench.holdout = read_config(source, f"holdout{subset[6:]}", QA, missing=[])
    return bench


def load_tofu(source, subset, train=True, score=True):
    """TOFU (arXiv 2401.06121): 200 fictitious authors x 20 questions; forgetNN are the last NN % of the authors."""
    bench = Benchmark([], [], {})
    if train:
        bench.forget = read_config(source, subset, QA)
        bench.retain = bench.retain_full = read_config(source, f"retain{100 - int(subset[6:])}", QA)
    if score:
        for name, config in (("forget", subset), *((name, name) for name in ("retain", "real_authors", "world_facts"))):
            more = ("paraphrased_answer",) if name in ("forget", "retain") else ()
            bench.evals[name] = read_config(source, f"{config}_perturbed", (*QA, "perturbed_answer", *more))
    return bench


LOADERS = {"demo": lambda source, subset, train, score: demo(), "tofu": load_tofu,
           "markov": lambda source, subset, train, score: markov(source or "0", subset)}
MUSE_SETS = ("verbmem_f", "knowmem_f", "knowmem_r", "privleak_f", "privleak_h")  # _f forget, _r retain, _h holdout


def load_muse(source):
    """What MUSE scores (arXiv 2407.06460): prompts to continue, each with its answer, and texts to tell members by.

    The prompts are the protocol's own. A question follows ten answered ones and ends in "Answer: ", with the space.
    """
    def rows_of(config, split, *columns):
        rows = read_config(source, config, columns, split)
        for i, row in enumerate(rows, 1):
            empty = [name for name in columns if not row[name].strip()]
            if empty:
                raise Mistake(f"{source}, {config}/{split}, row {i}: {empty[0]} is empty.")
        return rows

    def asked(split):
        answered = rows_of("knowmem", f"{split}_icl", *QA)
        shots = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in answered)
        return [r | {"prompt": f"{shots}Question: {r['question']}\nAnswer: "} for r in rows_of("knowmem", split, *QA)]

    verbatim = [{"prompt": r["prompt"], "answer": r["gt"]} for r in rows_of("verbmem", "forget", "prompt", "gt")]
    return dict(zip(MUSE_SETS, (verbatim, asked("forget_qa"), asked("retain_qa"), rows_of("privleak", "forget", "text"),
                                rows_of("privleak", "holdout", "text"))))


def read_raw(source, name):
    """[{"raw": one long text}] of a file, or of config/split of a data set; rows of text are joined by an empty line.

    A user's rows of questions and answers stay what they are.
    """
    config, _, split = name.partition("/")
    rows = read_own(name, True) if os.path.isfile(name) else read_config(source, config, ("text",), split, whole=True)
    if "text" not in rows[0]:
        return rows
    text = "\n\n".join(row["text"] for row in rows)
    if not text.strip():
        raise Mistake(f"{source}, {name}: its text is empty.")
    return [{"raw": text}]


def hub(benchmark, subset):
    return HUB.get(benchmark, "").format(subset.title())


def load_full(bench, benchmark, source):
    """What target and retain model are fine-tuned on, read only where one has to be made: TOFU's `full`, all MUSE's text."""
    if benchmark == "muse":
        bench.retain_full = read_raw(source, "raw/retain1") + read_raw(source, "raw/retain2")
        bench.full = read_raw(source, "raw/forget") + bench.retain_full
    elif benchmark != "tofu":  # beside rows of your own
        made = LOADERS[benchmark](source, None, True, True)
        bench.full, bench.retain_full = made.full, made.retain_full
    else:
        bench.full = read_config(source, "full", QA)


def read_refusals(path=None):
    """Answers that decline, one a line: ours, or a file of the user's."""
    return [row["text"] for row in check_rows(read_rows(path or REFUSALS), path or REFUSALS, ("text",))]


def read_alternates(path=None, refusals=None):
    """row -> the answers that may stand instead of its own: those of a file of rows (question, alternate), else refusals.

    AltPO (arXiv 2409.13474) has the target model invent the alternates; `alternate` is a string or a list of them.
    """
    if not path:
        refusals = read_refusals(refusals)
        return lambda row: refusals
    table = {}
    for i, row in enumerate(check_rows(read_rows(path), path, ("question", "alternate")), 1):
        found = row["alternate"] if isinstance(row["alternate"], list) else [row["alternate"]]
        if not all(a.strip() for a in found):
            raise Mistake(f"{path}, row {i}: alternate is empty.")
        table.setdefault(row["question"], []).extend(found)

    def of(row):
        if row.get("question") not in table:
            raise Mistake(f"{path}: has no alternate answer for the forget question {row.get('question')!r}.")
        return table[row["question"]]
    return of


# ----------------------------------------------------------------------------------------------------------------------
# recorded evaluations

TOFU_LOG = {"eval_log_forget.json": "forget", "eval_log.json": "retain", "eval_real_author_wo_options.json": "real_authors",
            "eval_real_world_wo_options.json": "world_facts"}
TEXTS = ("set", "question", "answer", "generated")  # of a record; of the numbers, the least that each can be
LEAST = {"nll": -1e-3, "paraphrased_nll": -1e-3, "perturbed_nll": -1e-3, "rougeL_recall": 0, "rougeL_f1": 0, "n_tokens": 1}
LEAST |= dict.fromkeys("index min_k kl loss zlib min_k_pp gradnorm exact_memorization extraction_strength".split(), -1e12)
OPEN_UNLEARNING_LOG = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}


ON_HUB = "dataset:"


def from_hub(location):
    """The local copy of a file of a dataset on the hub, 'dataset:org/name[@revision]/path.json'."""
    parts = location.removeprefix(ON_HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise Mistake(f"{location}: is written dataset:org/name/path.json, "
                      "or dataset:org/name@revision/path.json.")
    repo, _, revision = "/".join(parts[:2]).partition("@")
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download(repo, parts[2], repo_type="dataset", revision=revision or None)
    except Exception as e:  # the hub's own, of many kinds
        why = (str(e).strip() or "-").splitlines()[0]
        raise Mistake(f"{location}: the hub did not give it ({type(e).__name__}: {why}); check the "
                      "name, the network and HF_HUB_OFFLINE, or download the file and name that."
                      ) from None


def read_log(path):
    """Records of a recorded evaluation, its format told by content: our examples.jsonl, TOFU's or open-unlearning's log."""
    text = read_text(from_hub(path) if path.startswith(ON_HUB) else path)
    try:
        try:
            log = json.loads(text)
        except ValueError:  # more than one document: JSON lines
            log = [json.loads(line) for line in text.splitlines() if line.strip()]
        if isinstance(log, dict) and "set" in log:
            log = [log]
        records = log if isinstance(log, list) else read_tofu_log(log) or read_open_unlearning_log(log)
        if not records or not all("set" in r and ("nll" in r or "rougeL_f1" in r) for r in records):
            raise ValueError("its rows are no scored examples")
        for i, k, v in ((i, k, v) for i, r in enumerate(records, 1) for k, v in r.items()):
            numbers = v if k == "perturbed_nll" else [v]
            if k in TEXTS and not (isinstance(v, str) or v is None and k != "set") or k in LEAST and not (
                    numbers and all(type(n) in (int, float) and LEAST[k] <= n < 1e12 for n in numbers)):
                raise ValueError(f"row {i}: {k} cannot be {v!r:.60}")
        return records
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
        raise Mistake(f"{path}: not a log this can read ({type(e).__name__}: {e}); it takes examples.jsonl, TOFU's "
                      "eval_log_aggregated.json and open-unlearning's TOFU_EVAL.json.") from None


def listed(values):
    """A list, from a list or from a dict by index."""
    return values if isinstance(values, list) else [values[k] for k in sorted(values, key=int)]


def read_tofu_log(log):
    records = []
    for file, name in TOFU_LOG.items():
        part = {k: listed(v) for k, v in log.get(file, {}).items()}
        for i, nll in enumerate(part.get("avg_gt_loss", [])):
            records.append({
                "set": name, "index": i, "nll": nll, "perturbed_nll": part["average_perturb_loss"][i], "n_tokens": part["num_token_gt"][i],
                "paraphrased_nll": part["avg_paraphrased_loss"][i], "rougeL_recall": part["rougeL_recall"][i],
                "generated": part["generated_text"][i][1], "answer": part["generated_text"][i][2]})
    return records


def read_open_unlearning_log(log):
    records = []
    for short, name in OPEN_UNLEARNING_LOG.items():
        prob, rouge_, para, pert = (listed(log.get(f"{short}_Q_A_{kind}", {}).get("value_by_index", {}))
                                    for kind in ("Prob", "ROUGE", "PARA_Prob", "PERT_Prob"))
        for i, wrong in enumerate(pert):
            right = (para or prob)[i]["avg_loss"]
            r = {"set": name, "index": i, "nll": prob[i]["avg_loss"] if prob else right, "paraphrased_nll": right,
                 "perturbed_nll": wrong["avg_loss"]}
            if rouge_:
                r |= {"rougeL_recall": rouge_[i]["rougeL_recall"], "generated": rouge_[i]["generation"]}
            records.append(r)
    return records


# ----------------------------------------------------------------------------------------------------------------------
# from text to token ids


class Example(NamedTuple):
    """One sequence. ids[:start] is read only, ids[start:] is scored; start >= 1, for something must predict the first."""
    ids: list
    start: int


def encode(tokenizer, prompt, answer, max_length=None, special=True):
    """Tokenize prompt + answer once, together; None where nothing of the answer is left to score.

    The answer starts at the first token whose end passes the prompt, so a token that straddles the border belongs to it.
    The answer ends with exactly one EOS, whatever the template or the tokenizer appends; then the whole is cut at
    max_length (a cut answer has no EOS). special: let the tokenizer add its BOS (a chat template has written it already).
    """
    out = tokenizer(prompt + answer, add_special_tokens=special, return_offsets_mapping=True)
    ids, eos = out["input_ids"], tokenizer.eos_token_id
    start = next((i for i, (_, end) in enumerate(out["offset_mapping"]) if end > len(prompt)), len(ids))
    stop = next((i for i in range(start, len(ids)) if ids[i] == eos), len(ids))
    ids = (ids[:stop] + [eos])[:max_length]
    return Example(ids, start) if 1 <= start < min(stop, len(ids)) else None


@dataclasses.dataclass(frozen=True)
class Template:
    """How a question is put to a model: text(question, answer) -> (prompt, answer) as they are tokenized."""
    name: str  # chat, llama2, qa
    tokenizer: object
    system_prompt: str = ""
    date_string: str = ""

    def text(self, question, answer=""):
        if self.name == "llama2":  # no space before the answer: Llama-2's tokenizer brings its own
            return f"[INST] {question} [/INST]", answer
        if self.name == "qa":
            return f"Question: {question}\nAnswer:", f" {answer}"
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        turns = system + [{"role": "user", "content": question}]
        prompt = self.render(turns, add_generation_prompt=True)
        whole = self.render(turns + [{"role": "assistant", "content": answer}])
        return prompt, whole[len(prompt):] if whole.startswith(prompt) else answer

    def render(self, turns, **more):
        """Llama-3's template prints today's date unless it is given one: scores would change overnight."""
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, date_string=self.date_string, **more)
        except Exception as e:  # jinja2's own, of many kinds
            raise Mistake(f"the tokenizer's chat template failed ({e}); some take no system prompt: --system_prompt=") from None

    def parts(self, row, max_length):
        """The rows that a row is trained as: itself, or a raw text's chunks, cut as MUSE's authors cut them.

        Windows of max_length - 1 tokens, a BOS before each, no EOS; what the last one lacks is taken from the first chunk,
        with its BOS, which then stands in mid-sequence: kept, for all published numbers were made with it.
        """
        if "raw" not in row:
            return [row]
        ids = self.tokenizer(row["raw"], add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        bos = self.tokenizer.eos_token_id if bos is None else bos  # Qwen has no BOS
        chunks = [[bos] + ids[i:i + max_length - 1] for i in range(0, len(ids), max_length - 1)]
        chunks[-1] = (chunks[-1] + chunks[0])[:max_length]
        return [{"text": self.tokenizer.decode(chunk, skip_special_tokens=True), "ids": chunk} for chunk in chunks]

    def encode(self, row, max_length, answer=None):
        """A row's Example; `answer` replaces the row's own (a refusal, a paraphrase)."""
        if "question" not in row and answer is not None:
            raise Mistake("a refusal answers a question, and this forget set is text: use another --forget_loss.")
        if "ids" in row:
            return Example(row["ids"], 1)
        if "text" in row:
            ids = self.tokenizer(row["text"])["input_ids"][:max_length]
            return Example(ids, 1) if len(ids) > 1 else None
        if not (answer or row["answer"]).strip():
            return None
        prompt, answer = self.text(row["question"], row["answer"] if answer is None else answer)
        return encode(self.tokenizer, prompt, answer, max_length, special=self.name != "chat")

    def prompt_ids(self, question):
        """What generation starts from."""
        ids = self.tokenizer(self.text(question)[0], add_special_tokens=self.name != "chat")["input_ids"]
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id and self.name != "chat" else ids


def check_tokenizer(tokenizer, name, template="qa"):
    if not tokenizer.is_fast:
        raise Mistake(f"{name}: needs a fast tokenizer (tokenizer.json), for character offsets.")
    if tokenizer.eos_token_id is None:
        raise Mistake(f"{name}: its tokenizer has no EOS token; set eos_token in tokenizer_config.json.")
    if template == "chat" and not tokenizer.chat_template:
        raise Mistake(f"{name}: its tokenizer has no chat template; write --template=qa or --template=llama2.")


def stream(n_forget, n_retain, batch_size, n_steps, seed, shuffle):
    """The windows of a run: n_steps lists of batch_size pairs (forget index, retain index).

    Cut from one endless stream of epochs, no short window. Epoch e is a permutation of the forget set, each with a retain
    partner, both drawn from a generator seeded by (seed, e): never by rank or by what was scored in between. Retain
    examples are drawn without replacement within an epoch while they last. shuffle=False: file order, i with i mod n_retain.
    """
    pairs, epoch = [], 0
    for _ in range(n_steps):
        while len(pairs) < batch_size:
            order, partners = list(range(n_forget)), [i % max(n_retain, 1) for i in range(n_forget)]
            if shuffle:
                rng = random.Random(f"{seed} {epoch}")  # a string seeds the same on every machine and Python
                rng.shuffle(order)
                pool = []
                while n_retain and len(pool) < n_forget:
                    pool += rng.sample(range(n_retain), n_retain)
                partners = pool or partners
            pairs += zip(order, partners)
            epoch += 1
        yield pairs[:batch_size]
        pairs = pairs[batch_size:]


# ----------------------------------------------------------------------------------------------------------------------
# from examples to the rows of micro-batches. A unit is what must share a micro-batch: names (`examples` is indexed with them).


def tree(examples):
    """A row of several examples, in which what they begin with alike stands once, and a last token, only predicted, not at all.

    Returns the row's ids; for each place the end of the stretch that it leads to: place i sees j if j <= i < end[j]; and of each
    example the places that predict its answer.
    """
    several, nodes, ends, places = len(examples) > 1, {}, {}, {}  # nodes: {(place of the token before or -1, id): place}
    for k in sorted(range(len(examples)), key=lambda k: examples[k].ids):  # so that all that a token leads to follows it at once
        ids, start = examples[k]
        path = list(itertools.accumulate(ids[:len(ids) - several], lambda at, t: nodes.setdefault((at, t), len(nodes)), initial=-1))
        ends |= dict.fromkeys(path[1:], len(nodes))
        places[k] = path[start:len(ids)]
    return [t for _, t in nodes], list(ends.values()), [places[k] for k in range(len(examples))]


def fill(lengths, shared, width):
    """[[tokens, [indices]]], rows of at most `width` tokens (or one item): the longest first, each into the fullest row with room.

    shared: with how many tokens all begin alike.
    """
    rows, rooms = [], []  # rooms: (what is left of it, number) of each row, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        more = lengths[i] - shared
        if (k := bisect.bisect_left(rooms, (more, 0))) == len(rooms):
            rooms.append((width - shared, len(rows)))
            rows.append([shared, []])
        room, row = rooms.pop(k)
        rows[row][0] += more
        rows[row][1].append(i)
        bisect.insort(rooms, (room - more, row))
    return rows


def layouts(units, examples, budget, hidden):
    """(items, sizes, part) of the ways to lay units out: a row for each example, or several in rows of about 256 or 512 tokens.

    items: lists of rows, a row a list of names; sizes: (rows, tokens of a row) of each, more rows than there are where the examples
    have more tokens, for their logits take memory too; part: of a row, for which a token's attention is computed: half, but all of
    it under a mask. hidden: the model's size; 0: only the first way.
    """
    lengths = [max(len(examples[name].ids) for name in unit) for unit in units]
    yield [[[name] for name in unit] for unit in units], [(len(unit), n) for unit, n in zip(units, lengths)], 0.5
    if hidden:
        lengths = [len(tree([examples[name] for name in unit])[0]) for unit in units]
        shared = len(os.path.commonprefix([examples[name].ids for unit in units for name in unit]))
        for filled in (fill(lengths, shared, min(width, budget)) for width in (256, 512)):
            rows = [[name for i in row for name in units[i]] for _, row in filled]
            yield [[row] for row in rows], [(sum(len(examples[s].ids) for s in row) / n, n) for row, (n, _) in zip(rows, filled)], 1


def cut(sizes, budget):
    """Indices of `sizes` [(rows, length)], longest first, in batches of at most `budget` padded tokens (or one item)."""
    batches, rows, width = [], 0, 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][1]):
        n, length = sizes[i]
        if not batches or (rows + n) * width > budget:
            batches.append([])
            rows, width = 0, length
        batches[-1].append(i)
        rows += n
    return batches


def deal(units, examples, budget, world, hidden=0):
    """[[micro-batch of rank 0, of rank 1, ...], ...]: equally many for every rank, None where one has nothing to do.

    A way to lay them out is sorted by length and cut by tokens over the whole window, so a step does not depend on the number of
    processes. Then the budget is lowered as far as the number of rounds allows: even batches, and one item a rank rather than idle
    ranks. The way that takes least is chosen: a token costs 24 hidden^2 in the linear maps of a layer and 4 hidden T in attention,
    and a round what its largest micro-batch costs.
    """
    ways = []
    for items, sizes, part in layouts(units, examples, budget, hidden):
        rounds, least = -(-len(cut(sizes, budget)) // world), min(budget, max((round(n * length) for n, length in sizes), default=0))
        least += bisect.bisect_left(range(least, budget), True, key=lambda lower: len(cut(sizes, lower)) <= rounds * world)
        pieces = cut(sizes, least)
        costs = [sum(len(items[i]) for i in piece) * (width := sizes[piece[0]][1]) * (6 * hidden + part * width) for piece in pieces]
        pieces = [[row for i in piece for row in items[i]] for piece in pieces] + [None] * (rounds * world - len(pieces))
        ways.append((sum(max(costs[i:i + world]) for i in range(0, len(costs), world)), pieces))
    _, pieces = min(ways, key=lambda way: way[0])
    return [pieces[i:i + world] for i in range(0, len(pieces), world)]


# ----------------------------------------------------------------------------------------------------------------------
# the demo: fictitious authors, so that unlearning can be watched on a laptop

def demo():
    """40 fictitious authors x 10 attributes; the last 4 authors are to be forgotten. Always the same rows.

    Columns as TOFU's: the answer that is trained, the same said otherwise, and that with five other values. `classics` and
    `capitals` play real_authors and world_facts; they are learned along with the authors, by the retain-only model too.
    The holdout set, for membership inference: 4 authors more, of whom no model is told. Words: configs/demo.json.
    """
    words = json.loads(read_text(os.path.join(CONFIGS, "demo.json")))

    def invent(names, rng):
        rows = []
        for name, about in itertools.product(names, words["attributes"]):
            value, *others = rng.sample(about["values"], 6)
            said = "T" + about["answer"].format(n="the author", v="{v}")[1:]
            rows.append({k: about[k].format(n=name, v=value) for k in ("question", "answer", "paraphrased_question")} | {
                "paraphrased_answer": said.format(v=value), "perturbed_answer": [said.format(v=v) for v in others]})
        return rows

    rng, everyone = random.Random("demo"), [f"{first} {last}" for first in words["first"] for last in words["last"]]
    names = rng.sample(everyone, 40)
    rows, strangers = invent(names, rng), random.Random("demo holdout")

    def facts(table, question):
        answers = sorted(set(table.values()))
        return [{"question": question.format(q), "answer": a,
                 "perturbed_answer": rng.sample([x for x in answers if x != a], 3)} for q, a in table.items()]

    classics, capitals = facts(words["classics"], "Who wrote {}?"), facts(words["capitals"], "What is the capital of {}?")
    forget, retain = rows[360:], rows[:360]
    return Benchmark(forget, retain, {"forget": forget, "retain": retain[::3], "real_authors": classics, "world_facts": capitals},
                     full=rows + classics + capitals, retain_full=retain + classics + capitals,
                     holdout=invent(strangers.sample([n for n in everyone if n not in names], 4), strangers))


def demo_tokenizer():
    """A byte-level BPE of 1,200 entries trained on the demo's own text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bench = demo()
    template = Template("qa", None)
    texts = ["".join(template.text(r["question"], a)) for r in bench.full
             for a in (r["answer"], r.get("paraphrased_answer", r["answer"]))]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


# ----------------------------------------------------------------------------------------------------------------------
# a mixture of Markov chains: what is to be forgotten is known exactly (SimNPO, arXiv 2410.07163, section 4 and appendix)

def transitions(own):
    """P(next | state) of the chain that prefers the states `own`: (10, 10), rows sum to one.

    From its own states it stays among them with probability 0.8; from any other every state is equally likely.
    """
    row = [0.8 / 3 if s in own else 0.2 / 7 for s in range(10)]
    return [row if s in own else [0.1] * 10 for s in range(10)]


OWN = {"retain": (0, 1, 2), "forget1": (3, 4, 5), "forget2": (6, 7, 8)}  # state 9 is nobody's
CHAINS = {name: transitions(own) for name, own in OWN.items()}


def markov(seed, subset):
    """10,000 sequences of the retain chain, 5,000 of each forget chain, 20 states long; a fifth of each is scored.

    Both forget chains are to be forgotten. short: forget2 is 5 states long. unseen: the target never saw forget2. The
    chains are fixed; `seed` draws the sequences, the same retain and forget1 ones for both subsets.
    """
    train, test = {}, {}
    for name, rows in CHAINS.items():
        rng, texts = random.Random(f"markov {seed} {name}"), []
        sums = [list(itertools.accumulate(row)) for row in rows]
        for _ in range(10_000 if name == "retain" else 5_000):
            states = rng.choices(range(10), cum_weights=sums[OWN[name][0]])  # begins as after a state of its own
            while len(states) < (5 if (subset, name) == ("short", "forget2") else 20):
                states += rng.choices(range(10), cum_weights=sums[states[-1]])
            texts.append({"text": " ".join(map(str, states))})
        train[name], test[name] = texts[:len(texts) * 4 // 5], texts[len(texts) * 4 // 5:]
    forget = train["forget1"] + train["forget2"]
    seen = forget if subset == "short" else train["forget1"]
    return Benchmark(forget, train["retain"], test, full=train["retain"] + seen, retain_full=train["retain"])


def markov_tokenizer():
    """One word a state and nothing else: a further entry would be an eleventh state for probability to escape to."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordLevel({str(s): s for s in range(10)}, unk_token="9"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="9")  # a tokenizer must name one; nothing ends here
