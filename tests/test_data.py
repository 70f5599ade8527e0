"""Data: pytest tests/test_data.py. Where an answer begins and ends under the tokenizers of the field, and what files may hold."""
import json

import pytest
import tokenizers
import torch
import transformers
from conftest import SHARED, needs_shared
from tokenizers import decoders, models as tokenizer_models, normalizers, pre_tokenizers, processors, trainers

import configs
import data
import evaluate
import model as models
from configs import UsageError

TEXT = ["Question: What did Ada write? Answer: She wrote poems, 12 novels and a play.", "[INST] [/INST] system user assistant",
        "You are a helpful assistant. Who was born in Zurich? It's Émile.", "Yes No Paris 1984"] * 3
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
          "{% if loop.first and date_string %}Today Date: {{ date_string }}\n\n{% endif %}{{ m.content | trim }}<|eot_id|>"
          "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ZEPHYR = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")


def byte_level(special, bos, eos, pad, template, prepend_bos=False):
    t = tokenizers.Tokenizer(tokenizer_models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False,
                                                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if prepend_bos:
        t.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token=bos, eos_token=eos, pad_token=pad,
                                                chat_template=template)


def sentencepiece():
    """As Llama-2's: BPE over metaspace, words joined to the space before them, BOS prepended, no pad token."""
    t = tokenizers.Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # while training: no piece spans two words
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = [chr(i) for i in range(32, 0x250)] + list("▁日本‘’“”–—…\n")
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
                                                    initial_alphabet=alphabet))
    t.pre_tokenizer = None
    t.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>",
                                                chat_template="{{ bos_token }}" + ZEPHYR)


TOKENIZERS = {
    "llama-2": (sentencepiece, ("llama2", "qa", "chat")),
    "llama-3": (lambda: byte_level(["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
                                   "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", LLAMA3, True), ("chat", "qa")),  # pad = eos
    "qwen": (lambda: byte_level(["<|im_start|>", "<|im_end|>", "<|endoftext|>"], None, "<|im_end|>", "<|endoftext|>", CHATML),
             ("chat", "qa")),  # no BOS, newline after EOS
    "zephyr": (lambda: byte_level(["<s>", "</s>"], "<s>", "</s>", "</s>", ZEPHYR, True), ("chat", "qa")),
}
CASES = [(name, template) for name, (_, templates) in TOKENIZERS.items() for template in templates]


@pytest.mark.parametrize("name, template", CASES)
@pytest.mark.parametrize("answer", ["Yes", "She wrote poems, 12 novels and a play.", "It's Émile 日本.", "No\n\nwell"])
def test_the_answer_and_exactly_one_eos_are_scored_under_every_tokenizer(name, template, answer):
    tokenizer = TOKENIZERS[name][0]()
    t = data.Template(template, tokenizer, "You are a helpful assistant.", "10 Apr 2025")
    question = "What did Ada write?"
    e = t.encode({"question": question, "answer": answer}, 500)
    scored = e.ids[e.start:]
    assert scored.count(tokenizer.eos_token_id) == 1 and scored[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(scored[:-1]).strip() == answer
    assert question in tokenizer.decode(e.ids[:e.start]) and answer not in tokenizer.decode(e.ids[:e.start])
    if tokenizer.bos_token_id is not None and name != "qwen" and (template != "chat" or name != "zephyr"):
        assert e.ids.count(tokenizer.bos_token_id) == 1 and e.ids[0] == tokenizer.bos_token_id
    assert t.prompt_ids(question) == e.ids[:e.start]  # generation starts where scoring does


def test_llama_3s_template_prints_the_given_date_and_not_todays():
    t = data.Template("chat", TOKENIZERS["llama-3"][0](), "", "10 Apr 2025")
    assert "Today Date: 10 Apr 2025" in t.text("Who?")[0]
    assert t.text("Who?")[0].count("system") == 0  # an empty system prompt: no system turn


def test_a_token_that_straddles_the_border_belongs_to_the_answer():
    t = tokenizers.Tokenizer(tokenizer_models.WordLevel({"a": 0, "bc": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>")
    assert data.encode(tokenizer, "a b", "c") == data.Example([0, 1, 2], 1)


def test_a_sequence_is_cut_at_max_length_and_then_has_no_eos():
    tokenizer = TOKENIZERS["zephyr"][0]()
    whole = data.encode(tokenizer, "Question:", " Yes No Paris")
    assert data.encode(tokenizer, "Question:", " Yes No Paris", len(whole.ids)) == whole
    cut = data.encode(tokenizer, "Question:", " Yes No Paris", len(whole.ids) - 1)
    assert cut.ids == whole.ids[:-1] and tokenizer.eos_token_id not in cut.ids
    assert data.encode(tokenizer, "Question:", " Yes", whole.start) is None  # nothing of the answer is left
    assert data.encode(tokenizer, "Question:", "") is None


def test_a_row_of_text_is_scored_from_its_second_token():
    tokenizer = TOKENIZERS["zephyr"][0]()
    e = data.Template("qa", tokenizer).encode({"text": "Paris 1984"}, 500)
    assert e.start == 1 and e.ids == tokenizer("Paris 1984").input_ids


def test_padding_is_never_seen_and_masks_come_from_lengths_even_where_pad_is_eos_and_inside_the_prompt():
    """The same logits alone and in a padded batch, with EOS inside the sequence as in Llama-3's chat format."""
    tokenizer = TOKENIZERS["llama-3"][0]()
    lm = models.tiny_llama(tokenizer, models.Process(0, 1, torch.device("cpu")), 0)
    template = data.Template("chat", tokenizer, "You are a helpful assistant.", "10 Apr 2025")
    examples = [template.encode({"question": q, "answer": a}, 500) for q, a in (("Who?", "Yes"), ("What did Ada write?", "poems " * 20))]
    assert examples[0].ids[:examples[0].start].count(tokenizer.eos_token_id) > 0
    scores = models.score(lm, [[e] for e in examples], "cpu")
    for e, together in zip(examples, scores.logits.split(scores.lengths)):
        alone = lm(torch.tensor([e.ids])).logits[0, e.start - 1:-1]
        assert torch.allclose(alone, together, atol=1e-5)


@needs_shared
def test_every_answer_of_the_real_tofu_is_scored_whole_under_every_tokenizer():
    rows = data.load("tofu", "forget10", str(SHARED / "tofu"), score=False).forget[::10]
    for name, template in CASES:
        tokenizer = TOKENIZERS[name][0]()
        t = data.Template(template, tokenizer, "You are a helpful assistant.", "10 Apr 2025")
        for row in rows:
            e = t.encode(row, 5000)
            assert tokenizer.decode(e.ids[e.start:], skip_special_tokens=True).strip() == row["answer"], (name, template)


@needs_shared
def test_the_real_tofu_has_its_published_sizes():
    for subset, n in (("forget01", 40), ("forget05", 200), ("forget10", 400)):
        bench = data.load("tofu", subset, str(SHARED / "tofu"))
        assert (len(bench.forget), len(bench.retain)) == (n, 4000 - n)
        assert {k: len(v) for k, v in bench.evals.items()} == {"forget": n, "retain": 400, "real_authors": 100, "world_facts": 117}


def test_the_demo_is_always_the_same_and_retain_and_forget_share_no_author():
    bench, again = data.demo(), data.demo()
    assert bench == again and (len(bench.forget), len(bench.retain), len(bench.full)) == (40, 360, 480)
    rows = bench.forget + bench.retain
    assert len({r["question"] for r in rows}) == 400
    for r in rows:
        assert len(set(r["perturbed_answer"])) == 5 and r["paraphrased_answer"] not in r["perturbed_answer"]
    for r in bench.evals["real_authors"] + bench.evals["world_facts"]:
        assert len(r["perturbed_answer"]) == 3 and r["answer"] not in r["perturbed_answer"]


def test_there_are_a_hundred_refusals_and_a_file_replaces_them(tmp_path):
    ours = data.read_refusals()
    assert len(ours) == len(set(ours)) >= 100
    (tmp_path / "mine.txt").write_text("Not telling.\n\nNo.\n")
    assert data.read_refusals(str(tmp_path / "mine.txt")) == ["Not telling.", "No."]


def test_files_may_be_json_lines_an_array_or_plain_text(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    assert all(data.read_own(str(tmp_path / n)) == rows for n in ("x.jsonl", "array.json", "lines.json"))
    (tmp_path / "strings.json").write_text('["one", "two"]')
    assert data.read_own(str(tmp_path / "strings.json")) == [{"text": "one"}, {"text": "two"}]
    for layout in ("forget05.jsonl", "forget05/train.json"):
        folder = tmp_path / layout.replace("/", "_")
        (folder / layout).parent.mkdir(parents=True)
        (folder / layout).write_text(json.dumps(rows))if layout.endswith(".json") else (folder / layout).write_text("\n".join(map(json.dumps, rows)))
        assert data.read_config(str(folder), "forget05", data.QA) == rows


@pytest.mark.parametrize("name, content, sentence", [
    ("a.jsonl", b'{"question": "q"}\n', "a.jsonl, row 1: no column 'answer'; it has question"),
    ("a.jsonl", b'{"question": "q", "answer": 3}\n', "row 1: answer must be text, got 3"),
    ("a.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "q"\n', "a.jsonl, line 2: not valid JSON"),
    ("a.json", b'[{"question": "q", "answer": "a"}', "a.json: not valid JSON"),
    ("a.jsonl", b'\xff\xfe', "a.jsonl: not UTF-8 at byte 0"),
    ("a.jsonl", b'\n\n', "a.jsonl: holds no rows"),
    ("a.jsonl", b'[1]\n', "row 1: must be an object or a string, got list"),
    ("a.jsonl", b'{"text": null}\n', "row 1: text must be text, got None"),
])
def test_a_bad_file_is_one_sentence_with_file_row_and_column(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as e:
        data.read_own(str(tmp_path / name))
    assert sentence in str(e.value) and "\n" not in str(e.value)


def test_a_tokenizer_without_eos_or_chat_template_is_refused():
    tokenizer = TOKENIZERS["zephyr"][0]()
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="has no chat template; write --template=qa"):
        data.check_tokenizer(tokenizer, "some/model", "chat")
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="has no EOS token"):
        data.check_tokenizer(tokenizer, "some/model")


def test_a_tokenizer_with_more_entries_than_the_model_embeds_is_refused(mini, tmp_path):
    c = configs.make(evaluate.Config, {"template": "qa", "tokenizer": str(tmp_path)})
    tokenizer = models.load_tokenizer(str(mini / "target"))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="tokenizer has 1201 entries but the model embeds only 1200"):
        evaluate.load(str(mini / "target"), c, models.Process(0, 1, torch.device("cpu")))
