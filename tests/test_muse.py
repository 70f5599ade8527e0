"""MUSE: pytest tests/test_muse.py.

Chunks by hand, the four scores by their definitions, a miniature, and bad input.
"""
import json
import random

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import log_of, tiny_llama
from rouge_score import rouge_scorer
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

import configs
import data
import evaluate
import model as models
import relearn
import unlearn
from configs import UsageError

SCORES = ("verbmem_f", "knowmem_f", "knowmem_r", "privleak")
NAMES = (
    "Ada Bruno Carla Dario Elif Farid Greta Hugo Ines Jonas Kira Luca Mina Nils Olga Pavel Rosa "
    "Sven Tara Umar Vera Willa Xenia Yusuf").split()
WORDS = {
    "town": "Ambry Brell Corwen Dunmere Eskdal Farrow Gilden Harsk".split(),
    "trade": "baker weaver cooper saddler glazier miller".split(),
    "metal": "copper silver walnut tin glass iron paper amber".split(),
    "thing": "bell thimble chest lantern kite heron key crown".split(),
    "season": "winter spring summer autumn".split(),
    "site": "river quarry orchard harbour cellar meadow chapel tower".split(),
}

# ------------------------------------------------------------------------------------------------
# a miniature of MUSE


def stories(names, rng):
    """An invented passage about each name, and a question that it answers."""
    rows = []
    for name in names:
        drawn = {kind: rng.sample(words, 2) for kind, words in WORDS.items()}
        lost = f"{drawn['metal'][0]} {drawn['thing'][0]}"
        trade, other_trade = drawn["trade"]
        town, other_town = drawn["town"]
        rows.append({
            "text": f"{name} was a {trade} from {town}. One {drawn['season'][0]} {name} lost the "
                    f"{lost} in the {drawn['site'][0]}, and a {other_trade} of {other_town} found "
                    "it.",
            "question": f"What did {name} lose?",
            "answer": lost,
        })
    return rows


def raw(rows, rng, times):
    """The passages and their questions, several times over, in another order each.

    The second space before an answer makes the prompts' trailing one a token of its own, as there.
    """
    texts = [row["text"] for row in rows]
    texts += 2 * [f"Question: {row['question']}\nAnswer:  {row['answer']}" for row in rows]
    shuffled = []
    for _ in range(times):
        shuffled += rng.sample(texts, len(texts))
    return "\n\n".join(shuffled)


def questions(rows):
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def continuations(rows):
    """VerbMem's rows: each passage cut before what was lost."""
    cut = []
    for row in rows:
        i = row["text"].index(" lost the")
        cut.append({"prompt": row["text"][:i], "gt": row["text"][i:]})
    return cut


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))


def tokenizer_of(text):
    """A BPE of whole words that puts a BOS before every text, as Llama's does."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def muse(tmp_path_factory):
    """A directory with MUSE-shaped data and `base`, a small random Llama."""
    root, rng = tmp_path_factory.mktemp("muse"), random.Random(1)
    folder = root / "data"
    sets = {}
    for i, name in enumerate(("forget", "retain", "holdout")):
        rows = sets[name] = stories(NAMES[7 * i:7 * i + 7], rng)
        file, times = ("retain1", 3) if name == "retain" else (name, 2)
        write(folder / "raw" / f"{file}.txt", raw(rows, rng, times))
        write(folder / "privleak" / f"{name}.json", [row["text"] for row in rows])
        write(folder / "knowmem" / f"{name}_qa.json", questions(rows[2:]))
        write(folder / "knowmem" / f"{name}_qa_icl.json", questions(rows[:2]))
    write(folder / "raw" / "retain2.json", [sets["retain"][0]["text"]])
    write(folder / "verbmem" / "forget.json", continuations(sets["forget"]))
    write(folder / "sust" / "forget_2.json", [row["text"] for row in sets["forget"][:3]])

    texts = []
    for rows in sets.values():
        texts += [row["text"] + row["question"] + "\nAnswer: " for row in rows]
    tokenizer = tokenizer_of(" ".join(texts))
    (root / "base").mkdir()
    models.save_model(tiny_llama(tokenizer, 0), tokenizer, str(root / "base"))
    return root


def flags(muse, **settings):
    """The command line of a run on the miniature, target and retain model made of `base`."""
    base = dict(
        benchmark="muse", subset="books", data=muse / "data", base_model="base",
        model="out/target", retain_model="out/retain", max_length=64, max_new_tokens=24,
        finetune_lr=8e-3, finetune_epochs=45, finetune_batch_size=8, finetune_schedule="cosine",
        finetune_warmup=0.1,
        device="cpu", out="out/run")
    return [f"--{name}={value}" for name, value in (base | settings).items()]


def scoring(muse, **settings):
    """The same for evaluate.py, which fine-tunes nothing."""
    every = flags(muse, **settings)
    return [flag for flag in every if "finetune" not in flag and "base" not in flag]


@pytest.fixture(scope="module")
def run(muse):
    """SimNPO on the miniature, from the base model to scores: {target, run, retain: scores}."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(muse)
        unlearn.main(flags(muse, beta=0.7, gamma=0, forget_weight=0.5, lr=3e-3, batch_size=8,
                           epochs=8, eval_every=8))
        names = ["out/target", "out/run", "out/retain"]
        evaluate.main([*names, *scoring(muse, out="out/table")])
    return {name: scores_of(muse / "out" / "table" / name) for name in ("target", "run", "retain")}


def scores_of(out):
    return json.loads((out / "scores.json").read_text())


def records_of(out):
    return [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]


def read_rows(muse, name):
    return json.loads((muse / "data" / f"{name}.json").read_text())


# ------------------------------------------------------------------------------------------------
# scores of the miniature


def test_target_simnpo_and_retain_model_come_in_the_right_order_on_all_four_scores(muse, run):
    target, simnpo, retain = run["target"], run["run"], run["retain"]
    assert set(target) == set(simnpo) == set(retain) == {*SCORES, "degenerate"}
    assert target["degenerate"] == 0
    assert target["verbmem_f"] > 80 > 75 > max(simnpo["verbmem_f"], retain["verbmem_f"])
    assert target["knowmem_f"] > 60 > 45 > max(simnpo["knowmem_f"], retain["knowmem_f"])
    assert min(target["knowmem_r"], simnpo["knowmem_r"], retain["knowmem_r"]) > 50
    assert target["privleak"] < -90 < -60 < simnpo["privleak"] and retain["privleak"] == 0
    table = (muse / "out" / "run" / "table.txt").read_text()
    assert "verbmem_f ↓  knowmem_f ↓  knowmem_r ↑  privleak →0" in table and "What did" in table
    assert scores_of(muse / "out" / "run") == simnpo  # in training as afterwards
    assert (muse / "out" / "run" / "trajectory.png").stat().st_size > 5000


# The same scores by transformers' own generate and full logits, rouge_score and pairs counted: no
# code of ours.


def load_plain(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def continue_plainly(lm, tokenizer, prompt, n):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    output = lm.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=1)
    return tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True)


def verbmem_pairs(lm, tokenizer, muse):
    """[(continuation, passage)]; the BOS is one of the passage's 24 tokens."""
    pairs = []
    for row in read_rows(muse, "verbmem/forget"):
        passage = tokenizer.decode(tokenizer(row["gt"]).input_ids[:24][1:])
        pairs.append((continue_plainly(lm, tokenizer, row["prompt"], 24), passage))
    return pairs


def knowmem_pairs(lm, tokenizer, muse, name):
    """[(answer up to the next question, right answer)], behind the answered questions."""
    shots = ""
    for row in read_rows(muse, f"knowmem/{name}_qa_icl"):
        shots += f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"
    pairs = []
    for row in read_rows(muse, f"knowmem/{name}_qa"):
        prompt = f"{shots}Question: {row['question']}\nAnswer: "
        text = continue_plainly(lm, tokenizer, prompt, 32)
        for stop in ("\n\n", "\nQuestion", "Question:"):
            text = text.split(stop)[0]
        pairs.append((text, row["answer"]))
    return pairs


@torch.no_grad()
def min_40(lm, tokenizer, text):
    """The mean of the lowest 40 % of a text's log-probs."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    logps = lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    lowest = logps.sort().values[:int(0.4 * len(logps))]
    return lowest.mean().item()


def holdout_auc(lm, tokenizer, muse):
    """MUSE's AUC: how often a text never seen looks more like a member than a forgotten one."""
    forget = [min_40(lm, tokenizer, text) for text in read_rows(muse, "privleak/forget")]
    holdout = [min_40(lm, tokenizer, text) for text in read_rows(muse, "privleak/holdout")]
    wins = 0
    for ours in holdout:
        for theirs in forget:
            wins += (ours > theirs) + (ours == theirs) / 2
    return wins / (len(holdout) * len(forget))


def test_scores_equal_the_definitions_one_prompt_and_text_at_a_time(muse, run):
    out = muse / "out" / "run"
    lm, tokenizer = load_plain(out), transformers.AutoTokenizer.from_pretrained(out)
    pairs = {
        "verbmem_f": verbmem_pairs(lm, tokenizer, muse),
        "knowmem_f": knowmem_pairs(lm, tokenizer, muse, "forget"),
        "knowmem_r": knowmem_pairs(lm, tokenizer, muse, "retain"),
    }
    rouge = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    expected = {}
    for name, texts in pairs.items():
        f1 = [rouge.score(answer, text)["rougeL"].fmeasure for text, answer in texts]
        expected[name] = 100 * np.mean(f1)
        records = [record for record in records_of(out) if record["set"] == name]
        assert [(record["generated"], record["answer"]) for record in records] == texts, name

    retrained = load_plain(muse / "out" / "retain")
    auc = holdout_auc(lm, tokenizer, muse)
    auc_retrain = holdout_auc(retrained, tokenizer, muse)
    expected["privleak"] = 100 * (auc - auc_retrain) / auc_retrain
    found = {name: run["run"][name] for name in SCORES}
    assert found == pytest.approx(expected, abs=1e-4)

    # without a retain model the published AUC stands in for it; recorded scores suffice
    for subset, published in (("news", 0.4772), ("books", 0.5393)):
        evaluate.main([str(out / "examples.jsonl"), "--benchmark=muse", f"--subset={subset}",
                       f"--out={muse / subset}"])
        privleak = 100 * (auc - published) / published
        assert scores_of(muse / subset)["privleak"] == pytest.approx(privleak, abs=1e-4)


def test_batched_scores_are_those_of_one_sequence_at_a_time(muse, run, monkeypatch):
    monkeypatch.chdir(muse)
    for name, budget in (("one", 1), ("all", 10**6)):
        evaluate.main(["out/run", *scoring(muse, out=f"out/{name}", micro_batch_tokens=budget)])
    one, every = records_of(muse / "out" / "one"), records_of(muse / "out" / "all")
    assert [r.get("generated") for r in one] == [r.get("generated") for r in every]
    min_k = [record.get("min_k", 0) for record in every]
    assert [record.get("min_k", 0) for record in one] == pytest.approx(min_k, rel=1e-5)


def test_a_retain_log_serves_as_the_retain_model_and_a_log_of_another_benchmark_is_refused(
        muse, run, monkeypatch):
    monkeypatch.chdir(muse)
    log = muse / "out" / "table" / "retain" / "examples.jsonl"
    words = ["out/run/examples.jsonl", f"--retain_log={log}"]
    evaluate.main([*words, "--benchmark=muse", "--out=out/again"])
    assert scores_of(muse / "out" / "again") == run["run"]
    sentence = "not of --benchmark=tofu; give the log's own benchmark"
    with pytest.raises(UsageError, match=sentence):
        evaluate.main([*words, "--benchmark=tofu", "--out=out/no"])


def test_named_options_score_as_open_unlearning_does(muse, run, monkeypatch):
    monkeypatch.chdir(muse)
    options = scoring(muse, out="out/ou", stem=True, skip_last=True, audits=True)
    evaluate.main(["out/target", *options])
    scores = scores_of(muse / "out" / "ou")
    assert scores["mia_loss"] > 0.9 and scores["exact_memorization"] > 0.5
    assert {"extraction_strength", "mia_gradnorm"} <= scores.keys()
    plain = {}
    for record in records_of(muse / "out" / "table" / "target"):
        plain[record["set"], record["index"]] = record
    for record in records_of(muse / "out" / "ou"):
        if record["set"].startswith("audit_"):
            continue
        if "min_k" in record:
            other = plain[record["set"], record["index"]]
            assert record["n_tokens"] == other["n_tokens"] - 1
        else:
            stemmed = evaluate.rouge(record["generated"], record["answer"], stem=True)
            assert record["rougeL_f1"] == stemmed["rougeL_f1"]


@pytest.mark.parametrize("forget_loss, retain_loss", [
    ("npo_mean", "kl"), ("muse_npo", "muse_kl"), ("muse_simnpo", "nll")])
def test_every_method_for_long_text_trains_and_a_step_does_not_depend_on_micro_batches(
        muse, run, tmp_path, monkeypatch, forget_loss, retain_loss):
    monkeypatch.chdir(muse)
    logs = []
    for budget in (64, 4096):
        out = tmp_path / str(budget)
        unlearn.main(flags(
            muse, out=out, model=muse / "out" / "target", forget_loss=forget_loss,
            retain_loss=retain_loss, batch_size=4, steps=2, lr=1e-3, eval_every=0,
            micro_batch_tokens=budget))
        logs.append([row["loss"] for row in log_of(out)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5) and logs[0][0] != logs[0][1]


# ------------------------------------------------------------------------------------------------
# from text to chunks


def chunks(tokenizer, text, length):
    rows = data.Template("qa", tokenizer).split_text({"raw": text}, length)
    return [row["ids"] for row in rows]


def test_raw_text_is_cut_into_windows_behind_a_bos_and_the_last_is_filled_from_the_first(muse):
    tokenizer = models.load_tokenizer(str(muse / "base"))
    text = "Ada lost the copper bell in the river, and Bruno found it in the orchard."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 12 and tokenizer(text)["input_ids"] == [0, *ids]
    n = len(ids)
    # fits exactly: one chunk, nothing filled
    assert chunks(tokenizer, text, n + 1) == [[0, *ids]]
    # the first chunk's BOS stays where it fills up the last
    assert chunks(tokenizer, text, n) == [[0, *ids[:-1]], [0, ids[-1], 0, *ids[:n - 3]]]
    # shorter than a chunk: repeated once, as in the original
    assert chunks(tokenizer, text, 2 * n + 5) == [[0, *ids, 0, *ids]]
    for length in (2, 5, 9):
        cut = chunks(tokenizer, text, length)
        assert {len(chunk) for chunk in cut} == {length}
        assert len(cut) == -(-n // (length - 1))
        joined = []
        for chunk in cut:
            joined += chunk[1:]
        assert joined[:n] == ids
    # every token after the BOS is scored, and there is no EOS
    example = data.Template("qa", tokenizer).encode({"ids": [0, *ids], "text": text}, 5)
    assert example == data.Example([0, *ids], 1)
    assert tokenizer.eos_token_id not in example.ids


def test_text_is_the_same_from_txt_json_and_jsonl(tmp_path):
    texts = ["One.\nTwo.", "", "Three."]
    write(tmp_path / "a" / "forget.txt", "\n\n".join(texts))
    write(tmp_path / "b" / "forget.json", texts)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    write(tmp_path / "c" / "forget.jsonl", "".join(lines))
    for folder in "abc":
        rows = data.read_raw(str(tmp_path), f"{folder}/forget")
        assert rows == [{"raw": "One.\nTwo.\n\n\n\nThree."}], folder
    assert data.read_raw("", "", str(tmp_path / "a" / "forget.txt"))[0]["raw"].count("\n") == 5


def test_split_and_own_data_replace_what_is_trained_on_and_never_what_is_scored(muse, tmp_path):
    source = str(muse / "data")
    plain = data.load("muse", "news", source)
    split = data.load("muse", "news", source, split="sust/forget_2")
    assert split.forget != plain.forget
    assert split.retain == plain.retain and split.evals == plain.evals

    text, qa = tmp_path / "own.txt", tmp_path / "qa.json"
    write(text, "My own text.\n\nAnd more.")
    write(qa, [{"question": "Who?", "answer": "Ada."}])
    own = data.load("muse", "news", source, forget_data=str(text), retain_data=str(qa))
    assert own.forget == [{"raw": "My own text.\n\nAnd more."}]
    assert own.retain == [{"question": "Who?", "answer": "Ada."}]
    assert own.evals == plain.evals and set(own.evals) == set(data.MUSE_SETS)
    c = configs.make(unlearn.Config, {"benchmark": "muse", "forget_data": str(text)})
    assert c.split is None


def test_the_hub_gives_the_same_rows(muse, monkeypatch):
    asked = []

    def load_dataset(repo, config, split, revision):
        asked.append((repo, config, split))
        path = next((muse / "data" / config).glob(f"{split}.*"))
        return datasets.Dataset.from_list(data.read_rows(str(path), whole=True))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    local = data.load("muse", "books", str(muse / "data"))
    assert data.load("muse", "books").evals == local.evals
    assert ("muse-bench/MUSE-Books", "raw", "forget") in asked
    assert ("muse-bench/MUSE-Books", "raw", "retain1") in asked


def test_what_is_not_given_is_the_protocols():
    c = configs.make(unlearn.Config, {"benchmark": "muse"})
    protocol = (c.subset, c.max_length, c.max_new_tokens, c.template)
    assert protocol == ("news", 2048, 128, "qa")
    assert configs.make(unlearn.Config, {"benchmark": "tofu"}).max_length == 500


# ------------------------------------------------------------------------------------------------
# what cannot be read or scored is refused in one sentence

PAIR = {"question": "q", "answer": "a"}
GOOD = {
    "raw/forget": ["a text"],
    "raw/retain1": ["a text"],
    "verbmem/forget": [{"prompt": "a", "gt": "b"}],
    "knowmem/forget_qa": [PAIR],
    "knowmem/forget_qa_icl": [PAIR],
    "knowmem/retain_qa": [PAIR],
    "knowmem/retain_qa_icl": [PAIR],
    "privleak/forget": ["one two three four"],
    "privleak/holdout": ["one two three four"],
}


def write_good_but(folder, name, rows):
    """Good files, but for one with other rows, or without it."""
    for file, good in (GOOD | {name: rows}).items():
        if good is not None:
            write(folder / f"{file}.json", good)


@pytest.mark.parametrize("name, rows, sentence", [
    ("verbmem/forget", None, "has none of verbmem.json, .*verbmem/forget.json"),
    ("raw/retain1", None, "has none of .*raw/retain1.txt"),
    ("knowmem/retain_qa_icl", None, "retain_qa_icl.json"),
    ("raw/forget", [""], "raw/forget: its text is empty"),
    ("raw/forget", [], "holds no rows"),
    ("privleak/holdout", ["one two three", " "], "privleak/holdout, row 2: text is empty"),
    ("knowmem/forget_qa", [{"question": "q", "reply": "a"}],
     "row 1: no column 'answer'; it has question, reply"),
    ("knowmem/forget_qa", ["just text"], "row 1: no column 'question'"),
    ("verbmem/forget", [{"prompt": "a", "gt": ""}], "verbmem/forget, row 1: gt is empty"),
    ("verbmem/forget", [{"prompt": "a", "gt": 3}], "gt must be text, got 3"),
])
def test_bad_data_is_one_sentence_before_any_model_is_loaded(
        muse, tmp_path, monkeypatch, name, rows, sentence):
    monkeypatch.setattr(models, "load_model", None)
    write_good_but(tmp_path, name, rows)
    with pytest.raises(UsageError, match=sentence):
        unlearn.main(["--benchmark=muse", f"--data={tmp_path}", f"--model={muse / 'base'}",
                      f"--out={tmp_path / 'out'}"])


@pytest.mark.parametrize("text", ["a", "to"])
def test_a_text_too_short_for_the_membership_score_is_one_sentence(muse, tmp_path, text):
    write_good_but(tmp_path, "privleak/holdout", ["a text that is long enough", text])
    sentence = (r"privleak_h, row 2: the text has \d tokens to score, too few for Min-40 %, "
                "which")
    with pytest.raises(UsageError, match=sentence):
        evaluate.main([str(muse / "base"), "--benchmark=muse", f"--data={tmp_path}",
                       f"--out={tmp_path / 'out'}"])


@pytest.mark.parametrize("words, sentence", [
    (["--benchmark=tofu", "--split=scal/forget_2"], "is config/split of MUSE's data"),
    (["--benchmark=muse", "--split=forget_2"], "is config/split of MUSE's data"),
    (["--benchmark=muse", "--subset=forget10"], "muse has news, books"),
    (["--benchmark=muse", "--max_length=1"], "--max_length=1: must be at least 2"),
])
def test_settings_that_do_not_go_together_are_one_sentence(words, sentence):
    with pytest.raises(UsageError, match=sentence):
        configs.load(unlearn.Config, words)


def test_a_refusal_needs_a_question(muse, tmp_path):
    words = flags(muse, base_model=None, model=muse / "base", retain_model=None,
                  out=tmp_path / "out", forget_loss="idk", eval_every=0)
    with pytest.raises(UsageError, match="a refusal answers a question, and this forget set is"):
        unlearn.main(words)


@pytest.mark.parametrize("name", ["muse_news", "muse_books", "muse_books_published"])
def test_the_configs_are_read(name):
    path = configs.__file__.replace("__init__", name)
    c, _, _ = configs.load(unlearn.Config, [path])
    assert c.benchmark == "muse" and c.batch_size == 4 and c.max_length == 2048
    assert c.epochs == 10 and c.lr == 1e-5


def test_relearning_follows_the_step_protocol_of_muse(muse, run, monkeypatch, capsys):
    monkeypatch.chdir(muse)
    relearn.main(["out/run", "--fraction=1", "--steps=2", "--eval_at=1,2", "--lr=1e-3",
                  "--attacks=relearn_random,int4", "--out=out/attacked", "--control=False",
                  "--eval_rows=3"])
    rows = json.loads((muse / "out" / "attacked" / "relearn.json").read_text())
    assert [(row["attack"], row["step"]) for row in rows] == [
        ("relearn_random", 0), ("relearn_random", 1), ("relearn_random", 2), ("int4", 0)]
    printed = capsys.readouterr().out
    assert "verbmem_f ↓" in printed and "int4" in printed
    assert "of the other questions" not in printed  # MUSE is scored on all of them
    for row in rows:
        assert "verbmem_f" in row, (row["attack"], row["step"])
    with pytest.raises(UsageError, match="paraphrase: the forget set has no column"):
        relearn.main(["out/run", "--attacks=paraphrase", "--out=out/x"])


def test_sampled_answers_are_scored_in_percent_over_questions_and_passages(
        muse, run, monkeypatch):
    monkeypatch.chdir(muse)
    relearn.main(["out/target", "--attacks=sample", "--samples=4", "--temperature=1e-4",
                  "--out=out/sampled", "--control=False", "--model=None", "--max_new_tokens=24"])
    *_, row = json.loads((muse / "out" / "sampled" / "relearn.json").read_text())
    found = []  # nearly greedy: the best of four is the one answer
    for record in records_of(muse / "out" / "table" / "target"):
        if record["set"] in ("verbmem_f", "knowmem_f"):
            found.append(100 * record["rougeL_f1"])
    assert row["leak_at_1"] == pytest.approx(np.mean(found), abs=1)
    assert row["leak_at_4"] == pytest.approx(row["leak_at_1"])
