"""Chat templates and tokenizers: pytest tests/test_templates.py.

What is scored of an answer is its tokens and one end of turn, and a greedy answer begins where the
scored one does, whatever the template puts around a finished turn.
"""
import pytest
import torch
import transformers
from conftest import PROC
from test_data import CHATML, DATE, SYSTEM_PROMPT, ZEPHYR, byte_level, llama2, llama3, qwen
from tokenizers import processors

import configs
import data
import evaluate
import model as models
from configs import UsageError

SPECIAL = ["<s>", "</s>", "<turn>", "<end>", "<think>", "</think>"]
TURN = "<turn>{{ m.role }}\n{{ m.content }}<end>\n"
OPEN = "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
TEMPLATES = {
    "a line break after the end": "{% for m in messages %}" + TURN + "{% endfor %}" + OPEN,
    "no generation prompt": "{% for m in messages %}" + TURN + "{% endfor %}",
    "always a generation prompt": (
        "{% for m in messages %}" + TURN + "{% endfor %}{{ '<turn>assistant\n' }}"),
    "an empty thought in finished turns": (
        "{% for m in messages %}<turn>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<end>\n{% endfor %}" + OPEN),
    "a hybrid reasoner": (
        "{% for m in messages %}<turn>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<end>\n{% endfor %}" + OPEN +
        "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% endif %}"),
    "a thought that the prompt opens": (
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<end>\n"
        "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n<think>\n{% endif %}"),
}
THOUGHTFUL = [name for name in TEMPLATES if "thought" in name or "reasoner" in name]


def chat_tokenizer(template, eos="</s>"):
    return byte_level(SPECIAL, "<s>", eos, "</s>", "<s>" + template)


def chat(tokenizer, **settings):
    return data.Template("chat", tokenizer, SYSTEM_PROMPT, DATE, **settings)


@pytest.mark.parametrize("eos", ["</s>", "<end>"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_its_tokens_and_one_end_of_turn(name, eos):
    tokenizer = chat_tokenizer(TEMPLATES[name], eos)
    template = chat(tokenizer)
    example = template.encode({"question": "Who?", "answer": "It's Ada."}, 500)
    thought = EMPTY_THOUGHT if name in THOUGHTFUL else ""
    assert tokenizer.decode(example.ids[:example.start]) == (
        f"<s><turn>system\n{SYSTEM_PROMPT}<end>\n<turn>user\nWho?<end>\n<turn>assistant\n{thought}")
    assert tokenizer.decode(example.ids[example.start:]) == "It's Ada.<end>"
    assert template.prompt_ids("Who?") == example.ids[:example.start]
    assert template.ends[1] == tokenizer.convert_tokens_to_ids("<end>")
    assert not example.cut


@pytest.mark.parametrize("name", ["a hybrid reasoner", "a thought that the prompt opens"])
def test_a_model_that_is_to_think_starts_from_the_templates_prompt(name):
    """A finished turn's empty thought is neither in the prompt nor in what is scored."""
    tokenizer = chat_tokenizer(TEMPLATES[name])
    template = chat(tokenizer, chat_template_kwargs='{"enable_thinking": true}')
    example = template.encode({"question": "Who?", "answer": "It's Ada."}, 500)
    prompt = template.render(template.turns("Who?"), add_generation_prompt=True)
    assert "</think>" not in prompt
    assert tokenizer.decode(example.ids[:example.start]) == prompt
    assert "think" not in tokenizer.decode(example.ids[example.start:])
    assert template.prompt_ids("Who?") == example.ids[:example.start]


def test_the_next_turns_token_ends_an_answer_where_it_alone_parts_them():
    """As in GLM-4: nothing stands behind an answer but the next <turn>."""
    template = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}{% endfor %}" + OPEN
    tokenizer = chat_tokenizer(template)
    example = chat(tokenizer).encode({"question": "Who?", "answer": "Ada"}, 500)
    assert tokenizer.decode(example.ids[example.start:]) == "Ada<turn>"


def test_without_any_special_token_the_eos_ends_an_answer():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = chat_tokenizer(template)
    example = chat(tokenizer).encode({"question": "Who?", "answer": "Ada"}, 500)
    assert tokenizer.decode(example.ids[example.start:]) == " Ada\n</s>"
    assert tokenizer.decode(example.ids[:example.start]).endswith("user: Who?\nassistant:")


def test_llama_2s_space_before_the_answer_is_the_answers():
    template = ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
                "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}")
    tokenizer = llama2()
    tokenizer.chat_template = "<s>" + template
    formatted = data.Template("chat", tokenizer, "", "")
    assert formatted.text("Who?", "Ada") == ("<s>[INST] Who? [/INST]", " Ada </s>")


@pytest.mark.parametrize("make, end", [
    (llama3, "<|eot_id|>"), (qwen, "<|im_end|>"), (llama2, "</s>")])
def test_known_templates_end_as_their_tokenizers_say(make, end):
    tokenizer = make()
    assert chat(tokenizer).ends[:2] == ("", tokenizer.convert_tokens_to_ids(end))
    assert tokenizer.eos_token == end


def test_settings_reach_the_template_and_thinking_is_off_by_default():
    tokenizer = chat_tokenizer(
        "{% for m in messages %}" + TURN + "{% endfor %}{{ enable_thinking }} {{ mood }}" + OPEN)
    assert chat(tokenizer).text("Who?")[0].endswith("False <turn>assistant\n")
    settings = '{"enable_thinking": true, "mood": "calm"}'
    template = chat(tokenizer, chat_template_kwargs=settings)
    assert template.text("Who?")[0].endswith("True calm<turn>assistant\n")
    c = configs.make(evaluate.Config, {"benchmark": "tofu", "chat_template_kwargs": settings})
    assert evaluate.make_template(tokenizer, c) == data.Template(
        "chat", tokenizer, SYSTEM_PROMPT, DATE, settings)


@pytest.mark.parametrize("text", ["enable_thinking=False", "[1]"])
def test_settings_of_a_template_that_are_no_object_are_refused(text):
    with pytest.raises(UsageError, match="chat_template_kwargs=.*must be a JSON object"):
        configs.make(evaluate.Config, {"benchmark": "tofu", "chat_template_kwargs": text})
    with pytest.raises(UsageError, match="chat template failed .Expecting"):
        chat(qwen(), chat_template_kwargs="{no}").text("Who?")


def test_a_question_of_several_turns_is_rendered_as_turns_or_joined():
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."},
                {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Rome."}]
    [row] = data.check_rows([{"messages": messages}], "a.jsonl", ("messages",))
    assert row == {"question": "Who?\nAda.\nWhere?", "answer": "Rome."}
    tokenizer = byte_level(
        ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|im_end|>", CHATML)
    whole = tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM_PROMPT}, *messages], tokenize=False)
    example = chat(tokenizer).encode(row, 500)
    assert tokenizer.decode(example.ids) + "\n" == whole
    assert tokenizer.decode(example.ids[example.start:]) == "Rome.<|im_end|>"
    prompt, answer = data.Template("qa", tokenizer).text(row["question"], row["answer"])
    assert prompt == "Question: Who?\nAda.\nWhere?\nAnswer:" and answer == " Rome."


def test_a_greedy_answer_stops_at_the_templates_end_of_turn(mini):
    lm = models.load_model(str(mini / "target"), PROC)
    tokenizer = models.load_tokenizer(str(mini / "target"))
    with torch.no_grad():
        [ids] = models.continue_prompts(lm, [[5, 6, 7]], [8], (), PROC)
    assert ids[2] not in ids[:2]
    [cut] = models.generate(lm, tokenizer, [[5, 6, 7]], 8, PROC, 100, end_id=ids[2])
    assert cut == tokenizer.decode(ids[:3])


# ------------------------------------------------------------------------------------------------
# tokenizers that append EOS


def test_an_eos_that_the_tokenizer_appends_is_no_part_of_a_text():
    plain = byte_level(["<s>", "</s>"], "<s>", "</s>", "</s>", ZEPHYR, True)
    appends = byte_level(["<s>", "</s>"], "<s>", "</s>", "</s>", ZEPHYR, True)
    appends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    assert appends("Paris").input_ids == [*plain("Paris").input_ids, 1]
    for text in ("Paris 1984", ""):
        assert data.tokenize(appends, text) == plain(text).input_ids
    for name in ("qa", "llama2", "chat"):
        one, other = (data.Template(name, t, SYSTEM_PROMPT, DATE) for t in (plain, appends))
        assert one.prompt_ids("Who?") == other.prompt_ids("Who?")
        for row in ({"question": "Who?", "answer": "Ada"}, {"text": "Paris 1984"}):
            assert one.encode(row, 500) == other.encode(row, 500)
    assert evaluate.whole_text(appends, {"text": "Paris"}).ids == plain("Paris").input_ids


def test_a_state_that_is_also_the_eos_stays():
    """The Markov chains' tokenizer has no token to spare, so it names a state its EOS."""
    tokenizer = models.load_tokenizer("configs/tiny_gpt2")
    assert tokenizer.eos_token == "9"
    assert data.tokenize(tokenizer, "3 9") == [3, 9]


# ------------------------------------------------------------------------------------------------
# lengths


@pytest.mark.parametrize("bos", ["<s>", None])
def test_a_long_text_is_cut_into_pieces_and_every_token_but_the_first_is_scored_once(bos):
    tokenizer = byte_level(["<s>", "</s>"], bos, "</s>", "</s>", ZEPHYR, bos is not None)
    template = data.Template("qa", tokenizer)
    row = {"text": "Paris 1984, Zurich 1985, Rome 1986 and Oslo."}
    ids = tokenizer(row["text"]).input_ids
    for length in (2, 5, len(ids) - 1):
        examples = [template.encode(piece, length) for piece in template.split([row], length)]
        scored = []
        for example in examples:
            assert example.start == 1 and len(example.ids) <= length
            scored += example.ids[1:]
        assert len(examples) > 1 and scored == ids[1:]
        if bos:
            assert {example.ids[0] for example in examples} == {tokenizer.bos_token_id}
    assert template.split([row], len(ids)) == [row]


def test_pieces_and_cut_answers_are_counted_and_said(capsys):
    tokenizer = byte_level(["<s>", "</s>"], "<s>", "</s>", "</s>", ZEPHYR, True)
    template = data.Template("qa", tokenizer)
    rows = [{"text": "Yes No Paris 1984 " * 9}, {"question": "Who?", "answer": "poems " * 30}]
    groups, n_dropped = data.encode_groups(rows, template, 31)
    said = capsys.readouterr().out
    assert n_dropped == 0 and len(groups) > 2
    assert f"2 rows with texts longer than 31 tokens are cut into {len(groups)}" in said
    assert "1 answers are cut: with their prompts they are longer than --max_length=31" in said
    assert [group[0].cut for group in groups] == [False] * (len(groups) - 1) + [True]
    assert groups[-1][0].ids[-1] != tokenizer.eos_token_id


@pytest.fixture
def small_gpt2(tmp_path):
    """A GPT-2 with a table of 64 positions, and the demo's tokenizer."""
    tokenizer = models.load_tokenizer("configs/tiny_llama")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=1,
        bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    models.save_model(transformers.GPT2LMHeadModel(config), tokenizer, str(tmp_path))
    return models.load_model(str(tmp_path), PROC), tokenizer


def test_a_model_is_never_asked_for_more_positions_than_it_has(small_gpt2, capsys):
    lm, tokenizer = small_gpt2
    c = configs.make(evaluate.Config, {"benchmark": "tofu", "template": "qa"})
    bench = data.Benchmark([], [], {"forget": [
        {"question": "Who wrote it?", "answer": "Ada."}, {"question": "Who?", "answer": "no " * 90},
        {"question": "why " * 90, "answer": "Yes."}, {"text": "Paris 1984 " * 30}]})
    records = evaluate.record_qa(lm, tokenizer, bench, c, PROC)
    said = capsys.readouterr().out
    assert "max_length is lowered from 500 to 64" in said and "1 answers are cut" in said
    assert "1 rows are not scored: an answer without tokens, or a prompt longer than" in said
    assert "2 greedy answers end before --max_new_tokens=200, at the 64 positions" in said
    assert len(records) == 4 and max(record["n_tokens"] for record in records) < 64


def test_a_text_that_is_scored_whole_must_fit_a_table_of_positions(small_gpt2):
    lm, tokenizer = small_gpt2
    example = evaluate.whole_text(tokenizer, {"text": "Paris 1984 " * 30})
    with pytest.raises(UsageError, match=r"a text of \d+ tokens does not fit into the model's 64"):
        models.token_scores(lm, [[example]], PROC, 512)


# ------------------------------------------------------------------------------------------------
# what people have instead of a plain model directory


def test_pickled_weights_and_sentencepiece_files_are_one_sentence_that_says_what_to_do(
        small_gpt2, tmp_path):
    lm, _ = small_gpt2
    folder = tmp_path / "pickled"
    folder.mkdir()
    lm.config.save_pretrained(folder)
    torch.save(lm.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="has no model.safetensors.*convert them once") as e:
        models.load_model(str(folder), PROC)
    assert "\n" not in str(e.value)
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(UsageError, match="pip install sentencepiece protobuf"):
        models.load_tokenizer(str(folder))
