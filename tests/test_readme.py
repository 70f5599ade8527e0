"""What README and configs/README state, and how the code may look: pytest tests/test_readme.py."""
import ast
import io
import re
import tokenize

import pytest
import torch
from conftest import ROOT

import configs
import data
import evaluate
import losses
import relearn
import unlearn

SCRIPTS = {
    "unlearn.py": unlearn.Config,
    "evaluate.py": evaluate.Config,
    "relearn.py": relearn.Config,
}
CONFIG_FILES = sorted((ROOT / "configs").glob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "configs" / "README.md", *CONFIG_FILES]
PRODUCT = ["unlearn.py", "losses.py", "data.py", "evaluate.py", "relearn.py", "model.py",
           "configs/__init__.py", "configs/recorded.py", "configs/rundir.py", "configs/tables.py"]


COMMAND = r"(?:python|nproc_per_node=8) (\w+\.py)([^`|(]*)"


def commands():
    """(script, the words after it) of every command that a page shows."""
    for page in PAGES:
        joined = re.sub(r"\\\n\s*", "", page.read_text())
        for line in joined.splitlines():
            for script, words in re.findall(COMMAND, line):
                label = f"{page.name}: {script}{words.strip()[:60]}"
                yield pytest.param(script, words.split("#")[0], id=label)


@pytest.mark.parametrize("script, words", list(commands()))
def test_every_command_names_files_and_settings_that_exist(script, words):
    for path in re.findall(r"configs/\w+\.py", words):
        assert (ROOT / path).is_file()
    settings = {*configs.fields(SCRIPTS[script])}
    if script == "evaluate.py":
        settings.add("ask")
    assert {*re.findall(r"--(\w+)=", words)} <= settings


def test_the_flags_of_every_published_method_are_accepted():
    rows = re.findall(r"`(--forget_loss=[^`]*)`", (ROOT / "configs" / "README.md").read_text())
    assert len(rows) > 15
    for row in rows:
        words = row.replace("\\|", "|").replace("'", "").replace("FILE", data.REFUSALS).split()
        c, _, _ = configs.load(unlearn.Config, words)
        assert c.forget_loss in unlearn.FORGET


@pytest.mark.parametrize("name", [*unlearn.FORGET, *unlearn.RETAIN])
def test_every_method_has_its_row_in_the_table_of_methods(name):
    assert f"| `{name}` |" in (ROOT / "configs" / "README.md").read_text()


def test_the_loss_of_the_worked_example_runs():
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(   def square.*?)```", readme, re.S)[1]
    unindented = "\n".join(line[3:] for line in code.splitlines())
    names = {"_float": losses._float, "Tensor": torch.Tensor}
    exec(unindented, names)
    assert names["square"](torch.tensor([-2.0])).tolist() == [-4.0]


# ------------------------------------------------------------------------------------------------
# how the code may look: it is read more often than it is run


def docstring_lines(tree):
    lines = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
            continue
        if isinstance(getattr(body[0].value, "value", None), str):
            lines |= set(range(body[0].lineno, body[0].end_lineno + 1))
    return lines


LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}


def count_tokens(text):
    """Python tokens without comments, docstrings and layout."""
    skipped = docstring_lines(ast.parse(text))
    n = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT and token.start[0] not in skipped:
            n += 1
    return n


def test_the_project_can_be_read_in_one_sitting():
    sizes = {name: count_tokens((ROOT / name).read_text()) for name in PRODUCT}
    others = ("configs/recorded.py", "configs/rundir.py", "configs/tables.py")
    serving = sum(sizes[name] for name in others)  # the seven files
    assert sum(sizes.values()) - serving <= 32_000, sizes
    assert serving <= 6_200, sizes
    assert max(sizes.values()) <= 6_500, sizes


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FOLDERS = (ROOT, ROOT / "configs", ROOT / "tests")
EVERY_FILE = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))


def is_plain(comprehension):
    first, *more = comprehension.generators
    return not more and not first.ifs


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: path.name)
def test_an_expression_holds_one_idea(path):
    """No function over 80 lines, no dense nested comprehension, no assignment expression."""
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 80, f"{where}: {node.name} is too long"
        if isinstance(node, COMPREHENSIONS):
            for inner in ast.walk(node):
                if inner is not node and isinstance(inner, COMPREHENSIONS):
                    assert is_plain(inner) and is_plain(node), f"{where}: nested comprehension"
        assert not isinstance(node, ast.NamedExpr), f"{where}: assignment inside an expression"


def test_imports_form_the_documented_dag():
    allowed = {
        "losses": set(),
        "data": {"configs"},
        "model": {"configs", "data", "losses"},
        "evaluate": {"configs", "data", "losses", "model"},
        "unlearn": {"configs", "data", "evaluate", "losses", "model"},
        "relearn": {"configs", "data", "evaluate", "losses", "model", "unlearn"},
    }
    for name, may in allowed.items():
        used = set()
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used.add(node.module)
        assert used & {*allowed, "configs"} <= may, name
