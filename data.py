"""Data: what is forgotten, what is kept, what is scored, and how text becomes token ids.

    bench = load("tofu", "forget05", "locuslab/TOFU")    # a hub id or a local directory
    encode(tokenizer, "Question: ...\nAnswer:", " ...")  # Example(ids, start)
    batches = make_batches(groups, 32, n_steps, seed=0, shuffle=True)
    micro_batches(batches[0], max_tokens=1024)           # [(kind, groups, share)], one per forward

A row is a dict with question and answer, or with text. An Example is a row as token ids. A group
is a list of examples with the same prompt. Nothing here depends on a model.
"""
import bisect
import csv
import dataclasses
import functools
import io
import itertools
import json
import os
import random
import re
from collections.abc import Callable
from typing import Literal

import configs
from configs import UsageError

HUB = {"tofu": "locuslab/TOFU", "muse": "muse-bench/MUSE-{}"}  # {}: the subset
SUBSETS = {  # the first is the default
    "demo": ("authors",),
    "tofu": ("forget10", "forget05", "forget01"),
    "muse": ("news", "books"),
    "markov": ("short", "unseen"),
    "own": ("rows",),
}
CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")
REFUSALS = os.path.join(CONFIGS, "refusals.txt")


@dataclasses.dataclass(frozen=True)
class Data(configs.Settings):
    """data"""
    benchmark: Literal["demo", "tofu", "muse", "markov", "own"] = "demo"  # what is unlearned and
                                                                         # scored
    subset: str | None = None  # tofu: forget10, forget05, forget01; muse: news, books;
                               # markov: short, unseen; None = the first
    data: str | None = None  # hub id or local directory (None = the benchmark's own);
                             # markov: seed of its samples
    split: str | None = None  # muse: the text to unlearn, None = raw/forget;
                              # News has scal/forget_1 to 4 and sust/ too
    forget_data: str | None = None  # unlearn YOUR rows: a .jsonl, .json, .csv, .parquet or .txt
                                    # file, a saved data set, or one on the hub (org/name@revision);
                                    # question and answer, text, or as trainers write them
    retain_data: str | None = None  # ... and the rows to keep
    template: Literal["chat", "llama2", "qa"] | None = None  # chat = the tokenizer's own;
                                                             # None = chat, or the benchmark's
    system_prompt: str = "You are a helpful assistant."  # of chat; empty if its template has none
    date_string: str = "10 Apr 2025"  # of chat: Llama-3's prompts have today's date otherwise
    chat_template_kwargs: str | None = None  # of chat, as JSON: {"enable_thinking": true}
    max_length: int | None = None  # tokens of prompt and answer, None = 500;
                                   # muse: of a chunk, None = 2048

    def problems(self):
        subsets = SUBSETS[self.benchmark]
        yield from self.check("subset", lambda name: name in subsets,
                              f"{self.benchmark} has {', '.join(subsets)}.")
        yield from self.check(
            "split", lambda name: self.benchmark == "muse" and name.count("/") == 1,
            "is config/split of MUSE's data, as in --benchmark=muse --split=scal/forget_2.")
        if self.retain_data and not self.forget_data and self.benchmark == "demo":
            yield "--retain_data goes with --forget_data."
        if self.benchmark == "markov" and (self.forget_data or self.retain_data):
            yield ("--forget_data and --retain_data do not go with markov: its scores need the "
                   "true chains.")
        if self.benchmark == "own" and not self.forget_data:
            yield "--benchmark=own: give --forget_data=FILE, the rows to forget."
        yield from self.check("max_length", lambda n: n >= 2, "must be at least 2.")
        yield from self.check("forget_data retain_data", is_source, NO_SOURCE)
        yield from self.check("chat_template_kwargs", lambda text: text[0] + text[-1] == "{}",
                              'must be a JSON object, as {"enable_thinking": true}.')


@dataclasses.dataclass
class Benchmark:
    """The rows of a benchmark, by what they are used for."""
    forget: list  # unlearned
    retain: list  # kept
    evals: dict  # {set name: rows to score}, e.g. forget, retain, real_authors, world_facts
    full: list = dataclasses.field(default_factory=list)  # a target model is fine-tuned on these
    retain_full: list = dataclasses.field(default_factory=list)  # ... and a retain model on these
    holdout: list = dataclasses.field(default_factory=list)  # like forget, but in no training set


# ------------------------------------------------------------------------------------------------
# reading rows


KINDS = (".json", ".jsonl", ".csv", ".parquet", ".txt")
NO_SOURCE = "no such directory or file, and not a data set on the hub (org/name)."


def is_source(name: str) -> bool:
    """Can rows be read from it: a file, a directory or a hub id?"""
    is_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+(@.+)?", name) and not name.endswith(KINDS)
    return is_id or os.path.exists(name)


def read_rows(path: str, whole: bool = False) -> list[dict]:
    """The rows of one file of KINDS, or of a data set: a directory or a hub id.

    A .txt file holds one row of text per line, or with `whole` a single text. A file of any other
    name is read as JSON.
    """
    kind = os.path.splitext(path)[1]
    try:
        if kind == ".parquet" or not os.path.isfile(path):
            rows = read_set(path)
        elif kind == ".txt":
            text = read_text(path)
            rows = [line for line in ([text] if whole else text.split("\n")) if line.strip()]
        else:
            rows = (read_csv if kind == ".csv" else read_json)(read_text(path))
    except (ValueError, RecursionError, csv.Error) as e:
        raise UsageError(f"{path}: cannot be read ({e}).") from None
    if not rows:
        raise UsageError(f"{path}: holds no rows.")
    return [{"text": row} if isinstance(row, str) else row for row in rows]


def read_csv(text):
    """Every field is text: 1984 is no number, and NA is an answer."""
    csv.field_size_limit(2**31 - 1)
    rows = [*csv.DictReader(io.StringIO(text))]
    wrong = [i for i, row in enumerate(rows, 1) if None in row]
    if wrong:
        raise ValueError(f"row {wrong[0]} has more fields than the first line; a text with a comma "
                         "stands in quotes")
    return rows


def read_json(text):
    """Rows are lines, an array, an object around an array, or columns: {"text": [...]}."""
    rows = documents(text)
    only = rows[0] if len(rows) == 1 else None
    if isinstance(only, dict) and not convention(only):
        lists = {name: items for name, items in only.items() if isinstance(items, list)}
        if len(lists) == 1:
            [only] = lists.values()
        elif lists:
            only = [dict(zip(lists, row)) for row in zip(*lists.values(), strict=True)]
    return only if isinstance(only, list) else rows


def documents(text: str) -> list:
    """The JSON values that a text consists of: one, or one a line."""
    decoder, space, values, at = json.JSONDecoder(), re.compile(r"\s*"), [], 0
    text = text.rstrip()
    while at < len(text):
        value, at = decoder.raw_decode(text, space.match(text, at).end())
        values.append(value)
    return values


def read_text(path):
    try:
        with open(path, encoding="utf-8-sig") as f:  # -sig: drop the byte order mark of Windows
            return f.read()
    except UnicodeDecodeError as e:
        message = f"{path}: not UTF-8 at byte {e.start}; save the file as UTF-8."
        raise UsageError(message) from None
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror}).") from None


@functools.cache
def note(sentence: str):
    """Say a sentence once, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, flush=True)


OPTIONAL = ("paraphrased_question", "paraphrased_answer", "perturbed_answer", "alternate")
QA = ("question", "answer")
ROLES = {"prompt": "user", "instruction": "user", "human": "user",
         "completion": "assistant", "output": "assistant", "gpt": "assistant"}
# rows as TRL, Alpaca, chats and ShareGPT have them: read as question and answer
OTHERS = (("prompt", "completion"), ("instruction", "output"), ("messages",), ("conversations",))


def convention(row: dict) -> tuple:
    """The columns that a row is read by: the first that it has, as texts or as turns."""
    for columns in (QA, *OTHERS, ("text",)):
        if all(is_said(row.get(name)) for name in columns):
            return columns
    return ()


def is_said(value):
    return isinstance(value, str) or isinstance(value, list) and type((value or "-")[0]) is dict


class Turns(str):
    """A question as one text; a chat template renders its `turns`."""
    turns = ()


def exchange(row: dict, columns: tuple) -> tuple:
    """(question, answer) of a row of OTHERS: all turns before the assistant's last, and that."""
    turns = []
    for name in columns:
        told = row[name]
        for turn in [{"role": name, "content": told}] if isinstance(told, str) else told:
            role = turn.get("role") or turn["from"]
            turns.append({"role": ROLES.get(role, role),
                          "content": turn.get("content") or turn["value"]})
    while turns[-1]["role"] != "assistant":
        turns.pop()
    answer = turns.pop()["content"].strip()
    more = columns[0] == "instruction" and row.get("input")
    turns[0]["content"] += f"\n{more}" if more else ""
    question = Turns("\n".join(turn["content"] for turn in turns))
    question.turns = turns
    return question, answer


def check_rows(rows: list, where: str, columns: tuple) -> list[dict]:
    """The rows with the required columns and the optional ones they have, all of them text.

    Other columns are dropped: a file's own `ids` or `raw` must not pass for what is made here.
    """
    checked = []
    for i, row in enumerate(rows, 1):
        place = f"{where}, row {i}"
        if not isinstance(row, dict):
            raise UsageError(f"{place}: must be an object or a string, got {type(row).__name__}.")
        for name in columns:
            if name not in row:
                present = ", ".join(row)[:200] or "none"
                raise UsageError(f"{place}: no column '{name}'; it has {present}.")
        kept = {name: row[name] for name in columns}
        if columns in OTHERS:
            try:
                kept = dict(zip(QA, exchange(row, columns)))
            except (AttributeError, LookupError, TypeError):
                raise UsageError(f"{place}: {' and '.join(columns)} must be texts, or turns (role "
                                 "and content, from and value) up to an answer.") from None
        kept |= {name: row[name] for name in OPTIONAL if row.get(name) is not None}
        for name, value in kept.items():
            check_value(value, name, place)
        checked.append(kept)
    return checked


def check_value(value, name, where):
    """A column is a text; perturbed_answer is a list of texts, and alternate may be one."""
    may_be_list = name in ("perturbed_answer", "alternate") and isinstance(value, list)
    for text in value if may_be_list and value else [value]:
        is_text = isinstance(text, str) and not re.search("[\ud800-\udfff]", text)
        if not is_text or name == "perturbed_answer" and not (may_be_list and text.strip()):
            expected = "a list of texts, none empty" if name == "perturbed_answer" else "text"
            raise UsageError(f"{where}: {name} must be {expected}, got {value!r:.80}.")


def read_set(source, config=None, split="train"):
    """The rows of a data set: of the hub, a clone, what `datasets` saved, or a .parquet file."""
    import datasets  # slow to import, and not needed for other files
    repo, revision = configs.split_revision(source)
    try:
        if source.endswith(".parquet"):
            found = datasets.Dataset.from_parquet(source)
        elif os.path.isfile(os.path.join(source, "state.json")):
            found = datasets.load_from_disk(source)
        else:
            found = datasets.load_dataset(repo, config, split=split, revision=revision)
        return found.to_list()
    except Exception as e:  # `datasets` and the hub client raise many kinds
        raise not_given(source, e) from None


def not_given(source, e):
    reason = f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0]}"
    if os.path.exists(source):
        return UsageError(f"{source}: cannot be read ({reason}); rows are read from "
                          f"{', '.join(KINDS)}, from what `datasets` saved, and from the hub.")
    return UsageError(f"{source}: the hub did not give it ({reason}); check the name, the network "
                      "and HF_HUB_OFFLINE, or name a local copy.")


def read_config(source, config, columns, split="train", whole=False, missing=None) -> list[dict]:
    """The rows of one config of a data set, from a local directory or from the hub.

    A directory holds `<config>` or `<config>/<split>` as one of KINDS, or is a data set itself.
    missing: returned where there is no such config; None = an error.
    """
    if not is_source(source):
        raise UsageError(f"--data={source}: {NO_SOURCE}")
    names = [name + kind for name in (config, f"{config}/{split}") for kind in KINDS]
    for name in names:
        path = os.path.join(source, name)
        if os.path.isfile(path):
            return check_rows(read_rows(path, whole), path, columns)
    try:
        rows = read_set(source, config, split)
    except UsageError as e:
        if missing is not None:
            return missing
        raise UsageError(f"{source} has none of {', '.join(names)}, and as a data set of "
                         f"`datasets`: {e}") from None
    return check_rows(rows, f"{source}, config {config}", columns)


def read_own(path: str, whole: bool = False) -> list[dict]:
    """A user's own rows: texts, or of any convention that has questions and answers."""
    rows = read_rows(path, whole)
    first = rows[0] if isinstance(rows[0], dict) else {}
    columns = convention(first) or QA
    found = check_rows(rows, path, columns)
    unread = {*first} - {*columns, *OPTIONAL, "input"}
    others = f"; not read: {', '.join(sorted(unread))}" if unread else ""
    note(f"{path}: {len(rows)} rows, read as {' and '.join(columns)}{others}")
    return found


# ------------------------------------------------------------------------------------------------
# benchmarks


def load(benchmark, subset, source=None, forget_data=None, retain_data=None, train=True, score=True,
         split=None, holdout=False) -> Benchmark:
    """The rows of a benchmark.

    forget_data, retain_data: files of rows that are unlearned, kept and scored instead. MUSE keeps
    its own scoring rows: its forget_data, retain_data and split (config/split) are trained on only.
    train, score: which rows are needed; scoring TOFU reads the *_perturbed configs only.
    """
    source = source or hub(benchmark, subset)
    if benchmark == "muse":
        evals = load_muse(source) if score else {}
        if not train:
            return Benchmark([], [], evals)
        forget = read_raw(source, split or "raw/forget", forget_data)
        return Benchmark(forget, read_raw(source, "raw/retain1", retain_data), evals)
    if forget_data:
        forget = read_own(forget_data)
        retain = read_own(retain_data) if retain_data else []
        bench = Benchmark(forget, retain, {"forget": forget})
        if retain:
            bench.evals["retain"] = retain[:400]
        if benchmark == "own":
            bench.full, bench.retain_full = forget + retain, retain
        return bench

    if benchmark == "markov":
        return markov(source or "0", subset)
    bench = demo() if benchmark == "demo" else load_tofu(source, subset, train, score)
    if retain_data:
        bench.retain = read_own(retain_data)
    if holdout and benchmark == "tofu":
        bench.holdout = read_config(source, f"holdout{subset[6:]}", QA, missing=[])
    return bench


def load_tofu(source, subset, train=True, score=True) -> Benchmark:
    """TOFU (arXiv 2401.06121): 200 fictitious authors x 20 questions; forgetNN = the last NN %."""
    bench = Benchmark([], [], {})
    if train:
        bench.forget = read_config(source, subset, QA)
        bench.retain = bench.retain_full = read_config(source, f"retain{100 - int(subset[6:])}", QA)
    if score:
        wrong = (*QA, "perturbed_answer")
        paraphrased = (*wrong, "paraphrased_answer")
        bench.evals = {
            "forget": read_config(source, f"{subset}_perturbed", paraphrased),
            "retain": read_config(source, "retain_perturbed", paraphrased),
            "real_authors": read_config(source, "real_authors_perturbed", wrong),
            "world_facts": read_config(source, "world_facts_perturbed", wrong),
        }
    return bench


# MUSE's scored sets: _f forget, _r retain, _h holdout
MUSE_SETS = ("verbmem_f", "knowmem_f", "knowmem_r", "privleak_f", "privleak_h")


def load_muse(source: str) -> dict:
    """MUSE's scoring rows (arXiv 2407.06460): prompts with their answers, and texts for PrivLeak.

    The prompts are fixed by the protocol: a question follows ten answered ones and ends in
    "Answer: ", with the space.
    """
    verbatim = read_filled(source, "verbmem", "forget", ("prompt", "gt"))
    return {
        "verbmem_f": [{"prompt": row["prompt"], "answer": row["gt"]} for row in verbatim],
        "knowmem_f": read_questions(source, "forget_qa"),
        "knowmem_r": read_questions(source, "retain_qa"),
        "privleak_f": read_filled(source, "privleak", "forget", ("text",)),
        "privleak_h": read_filled(source, "privleak", "holdout", ("text",)),
    }


def read_filled(source, config, split, columns):
    """Rows of which no column may be empty."""
    rows = read_config(source, config, columns, split)
    for i, row in enumerate(rows, 1):
        for name in columns:
            if not row[name].strip():
                raise UsageError(f"{source}, {config}/{split}, row {i}: {name} is empty.")
    return rows


def read_questions(source, split):
    """KnowMem's rows, each with its prompt: ten answered questions, then its own."""
    examples = ""
    for row in read_filled(source, "knowmem", f"{split}_icl", QA):
        examples += f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"
    rows = read_filled(source, "knowmem", split, QA)
    return [row | {"prompt": f"{examples}Question: {row['question']}\nAnswer: "} for row in rows]


def read_raw(source: str, name: str, own: str | None = None) -> list[dict]:
    """[{"raw": text}] of config/split of a data set, or of a user's own; several texts are joined.

    A user's rows of questions and answers stay rows.
    """
    config, _, split = name.partition("/")
    rows = read_own(own, True) if own else read_config(source, config, ("text",), split, True)
    if "text" not in rows[0]:
        return rows
    text = "\n\n".join(row["text"] for row in rows)
    if not text.strip():
        raise UsageError(f"{own or source}, {name}: its text is empty.")
    return [{"raw": text}]


def hub(benchmark, subset):
    return HUB.get(benchmark, "").format(subset.title())


def load_full(bench, benchmark, source):
    """Add the rows that target and retain model are fine-tuned on, where one has to be made."""
    if benchmark == "muse":
        bench.retain_full = read_raw(source, "raw/retain1") + read_raw(source, "raw/retain2")
        bench.full = read_raw(source, "raw/forget") + bench.retain_full
    elif benchmark == "tofu":
        bench.full = read_config(source, "full", QA)
    else:  # the user's own rows replaced those of the demo
        bench.full, bench.retain_full = demo().full, demo().retain_full


def read_refusals(path: str | None = None) -> list[str]:
    """Answers that decline, one per line: ours, or a file of the user's."""
    path = path or REFUSALS
    return [row["text"] for row in check_rows(read_rows(path), path, ("text",))]


def read_alternates(path: str | None = None, refusals: str | None = None) -> Callable:
    """row -> its alternate answers: those of a file of rows (question, alternate), else refusals.

    `alternate` is a text or a list of texts. AltPO (arXiv 2409.13474) lets the target invent them.
    """
    if not path:
        declining = read_refusals(refusals)
        return lambda row: declining
    by_question = {}
    for row in check_rows(read_rows(path), path, ("question", "alternate")):
        found = row["alternate"] if isinstance(row["alternate"], list) else [row["alternate"]]
        by_question.setdefault(row["question"], []).extend(found)

    def alternates(row):
        question = row.get("question")
        if question not in by_question:
            raise UsageError(f"{path}: has no alternate answer for the forget question "
                             f"{question!r}.")
        return by_question[question]
    return alternates


# ------------------------------------------------------------------------------------------------
# from text to token ids


@dataclasses.dataclass
class Example:
    """A prompt and one answer as token ids: a loss reads ids[start:], the answer. start >= 1."""
    ids: list
    start: int
    row: dict | None = dataclasses.field(default=None, repr=False, compare=False)  # its source
    # log p of each answer token before unlearning, (n_answer,); filled once, for NPO and DPO
    ref_logps: object = dataclasses.field(default=None, repr=False, compare=False)
    cut: bool = False  # the answer's end is missing

    @property
    def n_answer(self) -> int:
        return len(self.ids) - self.start


def tokenize(tokenizer, text: str, special=True) -> list[int]:
    """The ids of a text, without the EOS that some tokenizers append to all they encode."""
    ids, of_nothing = tokenizer([text, ""], add_special_tokens=special)["input_ids"]
    return ids[:-1] if ids[-1:] == of_nothing[-1:] == [tokenizer.eos_token_id] else ids


def encode(tokenizer, prompt: str, answer: str, max_length=None, special=True,
           end_id=None) -> Example | None:
    """Tokenize prompt + answer together; None where no answer token is left to score.

    The answer starts at the first token whose end offset passes the prompt, so a token across the
    border belongs to it. It ends with exactly one end_id (None = EOS), whatever the template or the
    tokenizer appends. The sequence is then cut at max_length (a cut answer has no end).
    special: let the tokenizer add its BOS; a chat template has written it already.
    """
    out = tokenizer(prompt + answer, add_special_tokens=special, return_offsets_mapping=True)
    ids, end = out["input_ids"], tokenizer.eos_token_id if end_id is None else end_id
    start = 0
    while start < len(ids) and out["offset_mapping"][start][1] <= len(prompt):
        start += 1
    stop = start
    while stop < len(ids) and ids[stop] != end:
        stop += 1
    kept = (ids[:stop] + [end])[:max_length]
    is_scored = 1 <= start < min(stop, len(kept))
    return Example(kept, start, cut=len(kept) <= stop) if is_scored else None


@dataclasses.dataclass(frozen=True)
class Template:
    """How a question is put to a model.

    name: chat (the tokenizer's own), llama2, qa, or none (the question alone, for an attack).
    """
    name: str
    tokenizer: object
    system_prompt: str = ""
    date_string: str = ""
    chat_template_kwargs: str | None = None

    def text(self, question: str, answer: str = "") -> tuple[str, str]:
        """(prompt, answer) as they are tokenized."""
        if self.name == "llama2":  # no space before the answer: Llama-2's tokenizer adds its own
            return f"[INST] {question} [/INST]", answer
        if self.name == "qa":
            return f"Question: {question}\nAnswer:", f" {answer}"
        if self.name == "none":
            return question, f" {answer}"
        turns = self.turns(question)
        prompt = self.render(turns, add_generation_prompt=True) + self.ends[0]
        whole = self.render([*turns, {"role": "assistant", "content": answer}])
        if not whole.startswith(prompt):
            return prompt, answer
        return prompt, whole[len(prompt):].removeprefix(self.ends[2])

    def turns(self, question):
        turns = getattr(question, "turns", None) or [{"role": "user", "content": question}]
        if self.system_prompt and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system_prompt}, *turns]
        return turns

    @functools.cached_property
    def ends(self) -> tuple[str, int, str]:
        """(how a prompt ends that the template leaves open, the id that ends an answer, a thought).

        All are read off a finished turn. Before its answer stands what the template's generation
        prompt lacks, a header or an empty thought; a thought that this prompt opens is closed, so
        that training, scores and greedy answers all begin at the answer. Behind it stands the first
        special token, be it the tokenizer's EOS or not, or the next turn's where it alone parts
        them. With enable_thinking the prompt stays open, and the empty thought is not scored.
        """
        end, mark = self.tokenizer.eos_token_id, "Zurich"
        if self.name != "chat":
            return "", end, ""
        turns = self.turns("Where?")
        opened = self.render(turns, add_generation_prompt=True)
        answered = [*turns, {"role": "assistant", "content": mark}]
        before, _, after = self.render(answered).partition(mark)
        missing = before[len(opened):] if before.startswith(opened) else ""
        thought = re.search(r"<(\w+)>\s*$", opened)
        if thought and thought[0] not in before:
            missing = f"\n</{thought[1]}>\n\n"
        after += self.render([*answered, turns[-1]]).partition(mark)[2]
        added = self.tokenizer.added_tokens_decoder
        special = [token for token in added if added[token].special]
        ids = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        end = next((token for token in ids if token in special), end)
        if "</" in missing and self.options().get("enable_thinking"):
            return "", end, missing
        return missing.rstrip(" "), end, ""  # Llama-2's space is the answer's

    def options(self):
        """Without date_string Llama-3's template would print today's date."""
        options = {"date_string": self.date_string, "enable_thinking": False}
        return options | json.loads(self.chat_template_kwargs or "{}")

    def render(self, turns, **options):
        try:
            options |= self.options()
            return self.tokenizer.apply_chat_template(turns, **options, tokenize=False)
        except Exception as e:  # jinja2 raises many kinds
            raise UsageError(f"the tokenizer's chat template failed ({e}); "
                             "some take no system prompt: --system_prompt=") from None

    def split(self, rows: list, max_length: int) -> list[dict]:
        """All rows, texts in pieces."""
        pieces = [piece for row in rows for piece in self.split_text(row, max_length)]
        if len(pieces) > len(rows):
            note(f"{len(rows)} rows with texts longer than {max_length} tokens are cut into "
                 f"{len(pieces)}: nothing is left out")
        return pieces

    def split_text(self, row: dict, max_length: int) -> list[dict]:
        """The pieces of a text that is longer than max_length; any other row stays one row.

        Each begins with the BOS, or, where the tokenizer sets none, with the token before it: every
        token but a text's first is scored once. A raw text is cut as MUSE's authors cut it: the
        last piece is filled up from the first, whose BOS then stands in mid-sequence.
        """
        lead = self.tokenizer.bos_token_id
        if lead is None:  # Qwen has no BOS
            lead = self.tokenizer.eos_token_id
        ids = tokenize(self.tokenizer, row.get("text", ""))
        if "raw" in row:
            ids = [lead, *tokenize(self.tokenizer, row["raw"], special=False)]
        elif len(ids) <= max_length:
            return [row]
        pieces, size = [], max_length - 1
        for i in range(1, len(ids), size):
            pieces.append([lead if ids[0] == lead else ids[i - 1]] + ids[i:i + size])
        if "raw" in row:
            pieces[-1] = (pieces[-1] + pieces[0])[:max_length]
        texts = self.tokenizer.batch_decode(pieces, skip_special_tokens=True)
        return [{"text": text, "ids": piece} for text, piece in zip(texts, pieces)]

    def encode(self, row: dict, max_length: int, answer: str | None = None) -> Example | None:
        """A row's Example; `answer` replaces the row's own (a refusal, a paraphrase)."""
        if "question" not in row and answer is not None:
            raise UsageError("a refusal answers a question, and this forget set is text: "
                             "use another --forget_loss.")
        if "text" in row:
            ids = row.get("ids") or tokenize(self.tokenizer, row["text"])[:max_length]
            return Example(ids, 1, row) if len(ids) > 1 else None
        answer = row["answer"] if answer is None else answer
        if not answer.strip():
            return None
        prompt, answer = self.text(row["question"], answer)
        example = encode(self.tokenizer, prompt, answer, max_length, self.name != "chat",
                         self.ends[1])
        if example:
            example.row = row
        return example

    def prompt_ids(self, question: str) -> list[int]:
        """The ids that generation starts from."""
        return tokenize(self.tokenizer, self.text(question)[0], special=self.name != "chat")


def check_tokenizer(tokenizer, name: str, template: str = "qa"):
    if not tokenizer.is_fast:
        raise UsageError(f"{name}: needs a fast tokenizer (tokenizer.json), for character offsets.")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"{name}: its tokenizer has no EOS token; "
                         "set eos_token in tokenizer_config.json.")
    if template == "chat" and not tokenizer.chat_template:
        raise UsageError(f"{name}: its tokenizer has no chat template; "
                         "write --template=qa or --template=llama2.")


def encode_groups(rows: list, template: Template, max_length: int, answers: str = "own",
                  alternates: Callable | None = None, seed: int = 0) -> tuple[list, int]:
    """([group], how many rows were dropped because no answer is left to score).

    answers: which ones a group holds, a row's own, an alternate one, or both, in that order.
    alternates: row -> its alternate answers. One is drawn per row, for the whole run.
    """
    rng = random.Random(f"{seed} alternates")
    pieces, groups = template.split(rows, max_length), []
    for row in pieces:
        wanted = [None]  # the row's own
        if answers != "own":
            wanted.append(rng.choice(alternates(row)))
        group = [template.encode(row, max_length, answer) for answer in wanted]
        if None not in group:
            groups.append(group[1:] if answers == "alternate" else group)
    note_cut(groups, max_length)
    return groups, len(pieces) - len(groups)


def note_cut(groups, max_length):
    n_cut = sum(example.cut for group in groups for example in group)
    if n_cut:
        note(f"{n_cut} answers are cut: with their prompts they are longer than "
             f"--max_length={max_length}")


# ------------------------------------------------------------------------------------------------
# from examples to batches (one optimizer step) and micro-batches (one forward)


def make_batches(groups: dict, batch_size: int, n_steps: int, seed: int, shuffle: bool) -> list:
    """One batch per step: batch_size forget groups, and as many retain groups if there are any.

    groups, and each batch: {"forget": [group], "retain": [group]}.
    """
    forget, retain = groups["forget"], groups.get("retain")
    n_pairs = n_steps * batch_size
    pairs = pair_indices(len(forget), len(retain or "-"), n_pairs, seed, shuffle)
    batches = []
    for first in range(0, n_pairs, batch_size):
        some = pairs[first:first + batch_size]
        batch = {"forget": [forget[i] for i, _ in some]}
        if retain:
            batch["retain"] = [retain[j] for _, j in some]
        batches.append(batch)
    return batches


def pair_indices(n_forget, n_retain, n_pairs, seed, shuffle):
    """The first n_pairs pairs (forget index, retain index) of an endless stream of epochs.

    An epoch is a permutation of the forget set. Its retain partners are drawn without replacement
    while they last. Both come from a generator seeded by (seed, epoch), so they depend neither on
    the rank nor on evaluation. shuffle=False: file order, i with i mod n_retain.
    """
    pairs, epoch = [], 0
    while len(pairs) < n_pairs:
        order = list(range(n_forget))
        partners = [i % n_retain for i in order]
        if shuffle:
            # a string seeds the same generator on every machine and Python version
            rng = random.Random(f"{seed} {epoch}")
            rng.shuffle(order)
            partners = []
            while len(partners) < n_forget:
                partners += rng.sample(range(n_retain), n_retain)
        pairs += zip(order, partners)
        epoch += 1
    return pairs[:n_pairs]


def micro_batches(batch: dict, max_tokens: int, rank=0, world=1, one_kind=False) -> list[tuple]:
    """This rank's micro-batches of a batch: [(kind, groups, share)], equally many on every rank.

    A micro-batch holds groups of one kind, in one row of at most max_tokens tokens (or one group).
    The cut looks at the whole batch, never at the rank: a step is the same on any number of GPUs.
    one_kind: in each turn all ranks have the same kind, for models whose forwards are collective.
    """
    turns = [[kind] for kind in batch] if one_kind else [list(batch)]
    mine = []
    for kinds in turns:
        sizes = {kind: [row_tokens(group) for group in batch[kind]] for kind in kinds}
        max_even = even_budget(list(sizes.values()), max_tokens, world)
        cuts = []
        for kind in kinds:
            for indices in cut(sizes[kind], max_even):
                cuts.append((kind, [batch[kind][i] for i in indices], 1.0))
        # DDP and FSDP need every rank in every forward: an idle one repeats a micro-batch, share 0
        while len(cuts) % world:
            kind, groups, _ = cuts[0]
            cuts.append((kind, groups, 0.0))
        mine += cuts[rank::world]
    return mine


def even_budget(sizes, max_tokens, world):
    """The smallest budget that needs no more forwards per rank than max_tokens: no rank is idle."""
    def forwards(budget):
        n_cuts = sum(len(cut(kind_sizes, budget)) for kind_sizes in sizes)
        return -(-n_cuts // world)  # rounded up

    budgets = range(1, max_tokens + 1)  # the larger, the fewer forwards
    return 1 + bisect.bisect_left(budgets, -forwards(max_tokens), key=lambda n: -forwards(n))


def cut(sizes, max_tokens):
    """Indices of `sizes`, longest first, in lists of at most max_tokens tokens (or one index)."""
    cuts, room = [], 0
    for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        if sizes[i] > room:
            cuts.append([])
            room = max_tokens
        cuts[-1].append(i)
        room -= sizes[i]
    return cuts


def shared_prefix(group):
    """How many tokens all examples of a group begin with: at least their prompt."""
    return len(os.path.commonprefix([example.ids for example in group]))


def row_tokens(group: list[Example]) -> int:
    """The tokens of a group in a flat row: its shared prefix once, then each example's rest."""
    shared = shared_prefix(group)
    return shared + sum(len(example.ids) - shared for example in group)


def total_tokens(groups):
    return sum(row_tokens(group) for group in groups)


# ------------------------------------------------------------------------------------------------
# the demo: fictitious authors, so that unlearning can be watched on a laptop


def demo() -> Benchmark:
    """40 fictitious authors x 10 attributes, the last 4 authors to be forgotten.

    A small TOFU; classics and capitals stand for real_authors and world_facts, and both models
    learn them. holdout: 4 more authors that no model sees. configs/demo_rows/make.py made the rows.
    """
    names = ("forget", "retain", "real_authors", "world_facts", "holdout")
    files = [os.path.join(CONFIGS, "demo_rows", f"{name}.jsonl") for name in names]
    forget, retain, authors, facts, holdout = map(read_rows, files)
    evals = dict(zip(names, (forget, retain[::3], authors, facts)))
    full, retain_full = retain + forget + authors + facts, retain + authors + facts
    return Benchmark(forget, retain, evals, full, retain_full, holdout)


# ------------------------------------------------------------------------------------------------
# a mixture of Markov chains: what is to be forgotten is known exactly (SimNPO, arXiv 2410.07163,
# section 4 and appendix)


def transitions(own):
    """P(next | state) of the chain that prefers the states `own`: (10, 10), rows sum to one.

    From its own states it stays among them with probability 0.8; from any other every state is
    equally likely.
    """
    preferring = [0.8 / 3 if state in own else 0.2 / 7 for state in range(10)]
    return [preferring if state in own else [0.1] * 10 for state in range(10)]


OWN = {"retain": (0, 1, 2), "forget1": (3, 4, 5), "forget2": (6, 7, 8)}  # no chain prefers state 9
CHAINS = {name: transitions(own) for name, own in OWN.items()}


def markov(seed: str, subset: str) -> Benchmark:
    """10,000 sequences of the retain chain, 5,000 of each forget chain, 20 states long.

    A fifth of each is scored. Both forget chains are to be forgotten. short: forget2 is 5 states
    long. unseen: the target never saw forget2. `seed` draws the sequences of the fixed chains, the
    same retain and forget1 ones for both subsets.
    """
    train, test = {}, {}
    for name in CHAINS:
        rng = random.Random(f"markov {seed} {name}")
        n = 10_000 if name == "retain" else 5_000
        length = 5 if (subset, name) == ("short", "forget2") else 20
        rows = [{"text": sample_chain(name, length, rng)} for _ in range(n)]
        train[name], test[name] = rows[:n * 4 // 5], rows[n * 4 // 5:]
    forget = train["forget1"] + train["forget2"]
    seen = forget if subset == "short" else train["forget1"]
    retain = train["retain"]
    return Benchmark(forget, retain, test, full=retain + seen, retain_full=retain)


def sample_chain(name, length, rng):
    """A sequence of states, "3 4 4 5 ..."; it begins as if after a state of the chain's own."""
    cumulative = [list(itertools.accumulate(row)) for row in CHAINS[name]]
    states = [OWN[name][0]]
    for _ in range(length):
        states += rng.choices(range(10), cum_weights=cumulative[states[-1]])
    return " ".join(map(str, states[1:]))
