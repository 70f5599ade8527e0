"""Data: pytest tests/test_data.py.

Where an answer begins and ends under the tokenizers of the field, and what files may hold.
"""
import json
import runpy

import pytest
import tokenizers
import torch
import transformers
from conftest import PROC, ROOT, SHARED, demo_tokenizer, needs_shared, tiny_llama
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordLevel

import configs
import data
import evaluate
import model as models
from configs import UsageError

TEXT = 3 * [
    "Question: What did Ada write? Answer: She wrote poems, 12 novels and a play.",
    "[INST] [/INST] system user assistant",
    "You are a helpful assistant. Who was born in Zurich? It's Émile.",
    "Yes No Paris 1984",
]
SYSTEM_PROMPT, DATE = "You are a helpful assistant.", "10 Apr 2025"

# ------------------------------------------------------------------------------------------------
# tokenizers as the field's, trained on TEXT

LLAMA3 = (
    "{{ bos_token }}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if loop.first and date_string %}Today Date: {{ date_string }}\n\n{% endif %}"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")


def byte_level(special, bos, eos, pad, template, prepend_bos=False):
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    if prepend_bos:
        token = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[token])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad,
        chat_template=template)


def llama2():
    """BPE over metaspace, words joined to the space before them, BOS prepended, no pad token."""
    tokenizer = tokenizers.Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # while training: no token spans two words
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = [chr(i) for i in range(32, 0x250)] + list("▁日本‘’“”–—…\n")
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
        chat_template="{{ bos_token }}" + ZEPHYR)


def llama3():
    """The pad token is the EOS."""
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    return byte_level(special, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", LLAMA3, True)


def qwen():
    """No BOS, and a newline after the EOS."""
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    return byte_level(special, None, "<|im_end|>", "<|endoftext|>", CHATML)


def zephyr():
    return byte_level(["<s>", "</s>"], "<s>", "</s>", "</s>", ZEPHYR, True)


TOKENIZERS = {"llama-2": llama2, "llama-3": llama3, "qwen": qwen, "zephyr": zephyr}
CASES = [
    ("llama-2", "llama2"),
    ("llama-2", "qa"),
    ("llama-2", "chat"),
    ("llama-3", "chat"),
    ("llama-3", "qa"),
    ("qwen", "chat"),
    ("qwen", "qa"),
    ("zephyr", "chat"),
    ("zephyr", "qa"),
]

# ------------------------------------------------------------------------------------------------
# from text to token ids


@pytest.mark.parametrize("name, template", CASES)
@pytest.mark.parametrize("answer", [
    "Yes", "She wrote poems, 12 novels and a play.", "It's Émile 日本.", "No\n\nwell"])
def test_the_answer_and_exactly_one_eos_are_scored_under_every_tokenizer(name, template, answer):
    tokenizer = TOKENIZERS[name]()
    formatted = data.Template(template, tokenizer, SYSTEM_PROMPT, DATE)
    question = "What did Ada write?"
    example = formatted.encode({"question": question, "answer": answer}, 500)
    prompt, scored = example.ids[:example.start], example.ids[example.start:]
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id

    assert scored.count(eos) == 1 and scored[-1] == eos
    assert tokenizer.decode(scored[:-1]).strip() == answer
    assert question in tokenizer.decode(prompt)
    assert answer not in tokenizer.decode(prompt)
    if bos is not None and name != "qwen" and (name, template) != ("zephyr", "chat"):
        assert example.ids.count(bos) == 1 and example.ids[0] == bos
    assert formatted.prompt_ids(question) == prompt  # generation starts where scoring does


def test_llama_3s_template_prints_the_given_date_and_not_todays():
    template = data.Template("chat", llama3(), "", DATE)
    prompt, _ = template.text("Who?")
    assert "Today Date: 10 Apr 2025" in prompt
    assert prompt.count("system") == 0  # an empty system prompt: no system turn


def test_a_token_that_straddles_the_border_belongs_to_the_answer():
    vocabulary = {"a": 0, "bc": 1, "</s>": 2, "<unk>": 3}
    words = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    assert data.encode(tokenizer, "a b", "c") == data.Example([0, 1, 2], 1)


def test_a_sequence_is_cut_at_max_length_and_then_has_no_eos():
    tokenizer = zephyr()
    whole = data.encode(tokenizer, "Question:", " Yes No Paris")
    assert data.encode(tokenizer, "Question:", " Yes No Paris", len(whole.ids)) == whole
    cut = data.encode(tokenizer, "Question:", " Yes No Paris", len(whole.ids) - 1)
    assert cut.ids == whole.ids[:-1] and tokenizer.eos_token_id not in cut.ids
    # nothing of the answer is left
    assert data.encode(tokenizer, "Question:", " Yes", whole.start) is None
    assert data.encode(tokenizer, "Question:", "") is None


def test_a_row_of_text_is_scored_from_its_second_token():
    tokenizer = zephyr()
    example = data.Template("qa", tokenizer).encode({"text": "Paris 1984"}, 500)
    assert example.start == 1 and example.ids == tokenizer("Paris 1984").input_ids


def test_a_row_of_several_examples_scores_each_as_alone_even_where_its_prompt_holds_an_eos():
    """No token of ours marks a border: Llama-3's chat format has EOS inside the prompt."""
    tokenizer = llama3()
    lm = tiny_llama(tokenizer, 0)
    template = data.Template("chat", tokenizer, SYSTEM_PROMPT, DATE)
    short = template.encode({"question": "Who?", "answer": "Yes"}, 500)
    long = template.encode({"question": "What did Ada write?", "answer": "poems " * 20}, 500)
    assert short.ids[:short.start].count(tokenizer.eos_token_id) > 0
    scores = models.score(lm, [[short], [long]], "cpu")
    for example, together in zip((short, long), scores.logits.split(scores.lengths)):
        alone = lm(torch.tensor([example.ids])).logits[0, example.start - 1:-1]
        assert torch.allclose(alone, together, atol=1e-5)


@needs_shared
def test_every_answer_of_the_real_tofu_is_scored_whole_under_every_tokenizer():
    rows = data.load("tofu", "forget10", str(SHARED / "tofu"), score=False).forget[::10]
    for name, template in CASES:
        tokenizer = TOKENIZERS[name]()
        formatted = data.Template(template, tokenizer, SYSTEM_PROMPT, DATE)
        for row in rows:
            example = formatted.encode(row, 5000)
            scored = tokenizer.decode(example.ids[example.start:], skip_special_tokens=True)
            assert scored.strip() == row["answer"], (name, template)


# ------------------------------------------------------------------------------------------------
# benchmarks


@needs_shared
def test_the_real_tofu_has_its_published_sizes():
    for subset, n in (("forget01", 40), ("forget05", 200), ("forget10", 400)):
        bench = data.load("tofu", subset, str(SHARED / "tofu"))
        assert (len(bench.forget), len(bench.retain)) == (n, 4000 - n)
        sizes = {name: len(rows) for name, rows in bench.evals.items()}
        assert sizes == {"forget": n, "retain": 400, "real_authors": 100, "world_facts": 117}


def test_the_demo_is_always_the_same_and_retain_and_forget_share_no_author():
    bench = data.demo()
    written = runpy.run_path(str(ROOT / "configs" / "demo_rows" / "make.py"))
    sets = written["make_rows"]()
    assert sets["forget"] == bench.forget and sets["retain"] == bench.retain
    assert sets["holdout"] == bench.holdout
    vocabulary = written["train_tokenizer"](sets).get_vocab()
    assert vocabulary == demo_tokenizer().get_vocab()
    assert (len(bench.forget), len(bench.retain), len(bench.full)) == (40, 360, 480)
    assert len(bench.retain_full) == 440
    assert len({row["question"] for row in bench.forget + bench.retain}) == 400
    for row in bench.evals["forget"] + bench.evals["retain"]:
        wrong = row["perturbed_answer"]
        assert len(set(wrong)) == 5 and row["paraphrased_answer"] not in wrong
    for row in bench.evals["real_authors"] + bench.evals["world_facts"]:
        wrong = row["perturbed_answer"]
        assert len(wrong) == 3 and row["answer"] not in wrong


def test_there_are_a_hundred_refusals_and_a_file_replaces_them(tmp_path):
    ours = data.read_refusals()
    assert len(ours) == len(set(ours)) >= 100
    (tmp_path / "mine.txt").write_text("Not telling.\n\nNo.\n")
    assert data.read_refusals(str(tmp_path / "mine.txt")) == ["Not telling.", "No."]


# ------------------------------------------------------------------------------------------------
# files


def test_files_may_be_json_lines_an_array_or_plain_text(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "x.jsonl").write_text(lines + "\n\n")
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text(lines)
    for name in ("x.jsonl", "array.json", "lines.json"):
        assert data.read_own(str(tmp_path / name)) == rows, name
    (tmp_path / "strings.json").write_text('["one", "two"]')
    assert data.read_own(str(tmp_path / "strings.json")) == [{"text": "one"}, {"text": "two"}]

    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "forget05.jsonl").write_text(lines)
    (tmp_path / "nested" / "forget05").mkdir(parents=True)
    (tmp_path / "nested" / "forget05" / "train.json").write_text(json.dumps(rows))
    for folder in ("flat", "nested"):
        assert data.read_config(str(tmp_path / folder), "forget05", data.QA) == rows, folder


@pytest.mark.parametrize("name, content, sentence", [
    ("a.jsonl", b'{"question": "q"}\n', "a.jsonl, row 1: no column 'answer'; it has question"),
    ("a.jsonl", b'{"question": "q", "answer": 3}\n', "row 1: answer must be text, got 3"),
    ("a.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "q"\n',
     "a.jsonl: cannot be read (Expecting ',' delimiter: line 2"),
    ("a.json", b'[{"question": "q", "answer": "a"}', "a.json: cannot be read (Expecting"),
    ("a.jsonl", b'\xff\xfe', "a.jsonl: not UTF-8 at byte 0"),
    ("a.jsonl", b'\n\n', "a.jsonl: holds no rows"),
    ("a.jsonl", b'[1]\n', "row 1: must be an object or a string, got int"),
    ("a.jsonl", b'{"text": "t"}\n{"text": null}\n', "row 2: text must be text, got None"),
])
def test_a_bad_file_is_one_sentence_with_file_row_and_column(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as e:
        data.read_own(str(tmp_path / name))
    assert sentence in str(e.value) and "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------------
# tokenizers that cannot be used


def test_a_tokenizer_without_eos_or_chat_template_is_refused():
    tokenizer = zephyr()
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="has no chat template; write --template=qa"):
        data.check_tokenizer(tokenizer, "some/model", "chat")
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="has no EOS token"):
        data.check_tokenizer(tokenizer, "some/model")


def test_a_tokenizer_with_more_entries_than_the_model_embeds_is_refused(mini, tmp_path):
    c = configs.make(evaluate.Config, {"template": "qa", "tokenizer": str(tmp_path)})
    tokenizer = models.load_tokenizer(str(mini / "target"))
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(tmp_path)
    sentence = "tokenizer has 1201 entries but the model embeds only 1200"
    with pytest.raises(UsageError, match=sentence):
        evaluate.load(str(mini / "target"), c, PROC)
