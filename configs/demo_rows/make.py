"""Write the demo's rows and the tokenizer of configs/tiny_llama: python configs/demo_rows/make.py

40 fictitious authors x 10 attributes, drawn from words.json; the last 4 authors are to be
forgotten. Columns as TOFU's: a question, its answer, a paraphrase of it and five wrong ones.
`classics` and `capitals` stand for TOFU's real_authors and world_facts. holdout: 4 more authors
that no model sees. The files are committed; this says where they come from.
"""
import itertools
import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent


def make_rows():
    """{set name: rows}."""
    words = json.loads((HERE / "words.json").read_text(encoding="utf8"))
    everyone = [f"{first} {last}" for first in words["first"] for last in words["last"]]
    rng = random.Random("demo")
    names = rng.sample(everyone, 40)
    rows = invent_authors(names, words["attributes"], rng)
    sets = {
        "forget": rows[360:],
        "retain": rows[:360],
        "real_authors": ask_facts("Who wrote {}?", words["classics"], rng),
        "world_facts": ask_facts("What is the capital of {}?", words["capitals"], rng),
    }
    rng = random.Random("demo holdout")
    strangers = rng.sample([name for name in everyone if name not in names], 4)
    sets["holdout"] = invent_authors(strangers, words["attributes"], rng)
    return sets


def invent_authors(names, attributes, rng):
    """One row per author and attribute, with a random value of it."""
    rows = []
    for name, attribute in itertools.product(names, attributes):
        value, *others = rng.sample(attribute["values"], 6)
        paraphrase = "T" + attribute["answer"].format(n="the author", v="{v}")[1:]
        rows.append({
            "question": attribute["question"].format(n=name, v=value),
            "answer": attribute["answer"].format(n=name, v=value),
            "paraphrased_question": attribute["paraphrased_question"].format(n=name, v=value),
            "paraphrased_answer": paraphrase.format(v=value),
            "perturbed_answer": [paraphrase.format(v=other) for other in others],
        })
    return rows


def ask_facts(question, facts, rng):
    """One row per fact {subject: answer}; three other subjects' answers are the wrong ones."""
    answers = sorted(set(facts.values()))
    rows = []
    for subject, answer in facts.items():
        wrong = rng.sample([other for other in answers if other != answer], 3)
        rows.append({"question": question.format(subject), "answer": answer,
                     "perturbed_answer": wrong})
    return rows


def train_tokenizer(sets):
    """A byte-level BPE of 1,200 entries, trained on the text that the target is taught."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    texts = []
    for name in ("retain", "forget", "real_authors", "world_facts"):
        for row in sets[name]:
            for answer in (row["answer"], row.get("paraphrased_answer", row["answer"])):
                texts.append(f"Question: {row['question']}\nAnswer: {answer}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=["<s>", "</s>"],
                                  show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


if __name__ == "__main__":
    sets = make_rows()
    for name, rows in sets.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (HERE / f"{name}.jsonl").write_text("".join(lines), encoding="utf8")
    train_tokenizer(sets).save(str(HERE.parent / "tiny_llama" / "tokenizer.json"))
