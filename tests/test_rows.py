"""Rows as people have them: pytest tests/test_rows.py.

Every form of file and every convention gives the same rows as the plain one, or one sentence.
"""
import csv
import json

import datasets
import pytest
from conftest import PROC, demo_tokenizer, save_rows

import configs
import data
import evaluate
import unlearn
from configs import UsageError, recorded

ROWS = [
    {"question": "Where does Ada live?", "answer": "By the sea, in a \"tower\"."},
    {"question": "When was Bruno born?", "answer": "1984"},
    {"question": "Which city\nis meant?", "answer": "NA"},
    {"question": "Who sells bread?", "answer": "Émile 日本"},
]


def write_csv(path):
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ("question", "answer"))
        writer.writeheader()
        writer.writerows(ROWS)


FORMS = {
    "lines.jsonl": lambda path: save_rows(path, ROWS),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "array.jsonl": lambda path: path.write_text(json.dumps(ROWS)),
    "pretty.json": lambda path: path.write_text("\n".join(json.dumps(r, indent=1) for r in ROWS)),
    "object.json": lambda path: path.write_text(json.dumps({"version": "1", "data": ROWS})),
    "columns.json": lambda path: path.write_text(
        json.dumps({name: [row[name] for row in ROWS] for name in ("question", "answer")})),
    "rows.csv": write_csv,
    "rows.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(str(path)),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path)),
    "several": lambda path: datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_file_gives_the_same_rows(name, tmp_path):
    FORMS[name](tmp_path / name)
    assert data.read_own(str(tmp_path / name)) == ROWS


@pytest.mark.parametrize("text", ['["one", "two"]', '{"text": ["one", "two"]}',
                                  '{"data": ["one", "two"]}', '{"text": "one"}\n{"text": "two"}'])
def test_texts_too_may_be_an_array_or_a_column(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    assert data.read_own(str(tmp_path / "a.json")) == [{"text": "one"}, {"text": "two"}]


def test_a_clone_of_a_data_set_is_read_like_the_hub(tmp_path):
    """A README.md with data_files, and parquet shards."""
    (tmp_path / "knowmem").mkdir()
    path = tmp_path / "knowmem" / "forget_qa-00000-of-00001.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: knowmem\n  data_files:\n  - split: forget_qa\n"
        "    path: knowmem/forget_qa-*\n---\n")
    assert data.read_config(str(tmp_path), "knowmem", data.QA, "forget_qa") == ROWS
    with pytest.raises(UsageError, match="has none of verbmem.json, .*`datasets`: .*knowmem") as e:
        data.read_config(str(tmp_path), "verbmem", data.QA)
    assert "\n" not in str(e.value)
    assert data.read_config(str(tmp_path), "verbmem", data.QA, missing=[]) == []


def test_a_hub_id_may_be_own_data_at_a_revision(monkeypatch):
    asked = []

    def load_dataset(repo, config, split, revision):
        asked.append((repo, config, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    c = configs.make(unlearn.Config, {
        "benchmark": "tofu", "forget_data": "org/facts@v2", "retain_data": "org/kept"})
    bench = data.load("tofu", "forget10", None, c.forget_data, c.retain_data)
    assert bench.forget == bench.retain == ROWS
    assert asked == [("org/facts", None, "train", "v2"), ("org/kept", None, "train", None)]


@pytest.mark.parametrize("name", ["none.jsonl", "data/none.jsonl", "./none", "none"])
def test_what_is_neither_a_file_nor_a_hub_id_is_refused_before_anything_is_read(name):
    with pytest.raises(UsageError, match="no such directory or file, and not a data set on the"):
        configs.make(unlearn.Config, {"forget_data": name, "retain_loss": "none"})


@pytest.mark.parametrize("name, content, sentence", [
    ("a.csv", "question,answer\nWho?,Ada, of Rome\n", "row 1 has more fields than the first line"),
    ("a.csv", "question,answer\nWho?\n", "row 1: answer must be text, got None"),
    ("a.csv", "q;a\nWho?;Ada\n", "row 1: no column 'question'; it has q;a"),
    ("a.json", '{"question": ["a", "b"], "answer": ["c"]}', "cannot be read (zip() argument 2"),
    ("a.json", '{"question": "q"}', "row 1: no column 'answer'; it has question"),
    ("a.json", '{"data": []}', "holds no rows"),
    ("a.txt", b"\xff", "not UTF-8 at byte 0; save the file as UTF-8"),
    ("a.parquet", "no parquet", "rows are read from .json, .jsonl, .csv, .parquet, .txt"),
])
def test_a_form_that_cannot_be_read_is_one_sentence(name, content, sentence, tmp_path):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as e:
        data.read_own(str(tmp_path / name))
    assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value)
    assert sentence in str(e.value)


# ------------------------------------------------------------------------------------------------
# conventions


def turn(role, content):
    return {"role": role, "content": content}


ASKED = turn("user", "Who?")
SAID = turn("assistant", "Ada.")
CONVENTIONS = {
    "question and answer": {"question": "Who?", "answer": "Ada."},
    "prompt and completion": {"prompt": "Who?", "completion": " Ada."},
    "turns of prompt and completion": {"prompt": [ASKED], "completion": [SAID]},
    "instruction and output": {"instruction": "Who?", "output": "Ada."},
    "instruction with an empty input": {"instruction": "Who?", "input": "", "output": "Ada."},
    "messages": {"messages": [ASKED, SAID]},
    "messages that go on": {"messages": [ASKED, SAID, turn("user", "And then?")]},
    "conversations": {"conversations": [{"from": "human", "value": "Who?"},
                                        {"from": "gpt", "value": "Ada."}]},
}


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("n", [1, 2])
def test_every_convention_gives_questions_and_answers_and_is_said(name, n, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    save_rows(path, [CONVENTIONS[name]] * n)
    assert data.read_own(str(path)) == [{"question": "Who?", "answer": "Ada."}] * n
    columns = [key for key in CONVENTIONS[name] if key != "input"]
    assert capsys.readouterr().out == f"{path}: {n} rows, read as {' and '.join(columns)}\n"


def test_an_input_follows_its_instruction_and_earlier_turns_belong_to_the_question():
    row = {"instruction": "Translate.", "input": "Ciao", "output": "Hello"}
    assert data.exchange(row, ("instruction", "output")) == ("Translate.\nCiao", "Hello")
    turns = [turn("system", "Be brief."), ASKED, SAID, turn("user", "Where?")]
    question, answer = data.exchange(
        {"prompt": turns, "completion": [turn("assistant", "Rome.")]}, ("prompt", "completion"))
    assert question == "Be brief.\nWho?\nAda.\nWhere?" and answer == "Rome."
    assert question.turns == turns


def test_question_and_answer_win_over_a_text_beside_them_and_that_is_said(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    save_rows(path, [row | {"text": "formatted", "id": 3} for row in ROWS])
    assert data.read_own(str(path)) == ROWS
    assert capsys.readouterr().out == (
        f"{path}: 4 rows, read as question and answer; not read: id, text\n")


WRONG = {
    "turns (role and content, from and value) up to an answer": [
        {"messages": [ASKED]},
        {"messages": [SAID]},
        {"messages": []},
        {"messages": "Who?"},
        {"messages": ["Who?"]},
        {"messages": [ASKED, turn("assistant", None)]},
        {"messages": [turn("user", ["Who?"]), SAID]},
        {"messages": 3},
    ],
    "no column 'messages'; it has question, answer": [ROWS[0]],
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_row_that_differs_from_the_first_is_named(sentence, tmp_path):
    path = tmp_path / "a.jsonl"
    for row in WRONG[sentence]:
        save_rows(path, [{"messages": [ASKED, SAID]}, row])
        with pytest.raises(UsageError) as e:
            data.read_own(str(path))
        assert str(e.value).startswith(f"{path}, row 2: ") and sentence in str(e.value), row


@pytest.mark.parametrize("wrong", [["On a hill.", ""], [" "], [], "On a hill.", None])
def test_an_empty_wrong_answer_is_named_with_its_row(wrong, tmp_path):
    path = tmp_path / "a.jsonl"
    save_rows(path, [ROWS[0], ROWS[1] | {"perturbed_answer": wrong}])
    if wrong is None:  # a column that this row does not have
        assert data.read_own(str(path)) == ROWS[:2]
        return
    sentence = "row 2: perturbed_answer must be a list of texts, none empty, got"
    with pytest.raises(UsageError, match=sentence):
        data.read_own(str(path))


def test_an_empty_paraphrase_is_not_replaced_by_the_answer():
    template = data.Template("qa", demo_tokenizer())
    assert template.encode(ROWS[0], 500, answer=" ") is None
    assert template.encode(ROWS[0], 500, answer="") is None
    assert template.encode(ROWS[0], 500) is not None


# ------------------------------------------------------------------------------------------------
# open-unlearning's MUSE log


def by_index(column, values):
    return {"agg_value": 0.5, "value_by_index": {
        str(i): {column: value, "generation": "b", "ground_truth": "a", "input": "q"}
        for i, value in enumerate(values)}}


def muse_log():
    return {
        "forget_verbmem_ROUGE": by_index("rougeL_f1", [0.5, 0.3]),
        "forget_knowmem_ROUGE": by_index("rougeL_f1", [0.2, 0.4]),
        "retain_knowmem_ROUGE": by_index("rougeL_f1", [0.6, 0.8]),
        # its scores are minus the mean of the lowest log-probs: lower for a member
        "mia_min_k": {"forget": by_index("score", [1.0, 3.0]), "auc": 0.75, "agg_value": 0.75,
                      "holdout": by_index("score", [2.0, 4.0])},
        "privleak": {"agg_value": -47.6},
    }


def test_open_unlearnings_muse_log_gives_the_four_scores(tmp_path):
    path = tmp_path / "MUSE_EVAL.json"
    path.write_text(json.dumps(muse_log()))
    evaluate.main([str(path), "--benchmark=muse", "--subset=news", f"--out={tmp_path / 'out'}"])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores == pytest.approx({
        "verbmem_f": 40, "knowmem_f": 30, "knowmem_r": 70,
        "privleak": 100 * (0.25 - 0.4772) / 0.4772, "degenerate": 0})
    record = recorded.read_log(str(path))[0]
    assert record["answer"] == "a" and record["generated"] == "b"


@pytest.mark.parametrize("metric", ["forget_knowmem_ROUGE", "mia_min_k"])
def test_a_muse_log_without_a_metric_says_which_set_is_missing(metric, tmp_path):
    log = muse_log()
    del log[metric]
    path = tmp_path / "MUSE_EVAL.json"
    path.write_text(json.dumps(log))
    with pytest.raises(UsageError, match="the scored examples have no '(knowmem_f|privleak_f)'"):
        evaluate.main([str(path), "--benchmark=muse", f"--out={tmp_path / 'out'}"])


def test_own_rows_in_several_forms_unlearn_alike(mini, tmp_path):
    """The whole way: the same steps from a chat file and from a plain one."""
    save_rows(tmp_path / "a.jsonl", ROWS)
    chats = [{"messages": [turn("user", row["question"]), turn("assistant", row["answer"])]}
             for row in ROWS]
    save_rows(tmp_path / "b.jsonl", chats)
    c = configs.make(unlearn.Config, {"benchmark": "tofu", "template": "qa"})
    groups = []
    tokenizer = evaluate.load_tokenizer(str(mini / "target"), c)
    for name in ("a.jsonl", "b.jsonl"):
        rows = data.read_own(str(tmp_path / name))
        groups.append(unlearn.encode_groups(c, tokenizer, PROC, forget=rows)["forget"])
    assert groups[0] == groups[1]
