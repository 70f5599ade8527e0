"""What README and configs/README say exists: pytest tests/test_readme.py."""
import ast
import re

import pytest
from conftest import ROOT

import configs
import data
import evaluate
import losses
import relearn
import unlearn

SCRIPTS = {"unlearn.py": unlearn.Config, "evaluate.py": evaluate.Config, "relearn.py": relearn.Config}
PAGES = [ROOT / "README.md", ROOT / "configs" / "README.md", *sorted((ROOT / "configs").glob("*.py"))]


def commands():
    for page in PAGES:
        for line in re.sub(r"\\\n\s*", "", page.read_text()).splitlines():
            for script in re.findall(r"(?:python|nproc_per_node=8) (\w+\.py)([^`|(]*)", line):
                yield pytest.param(*script, id=f"{page.name}: {script[0]}{script[1].strip()[:60]}")


@pytest.mark.parametrize("script, words", list(commands()))
def test_every_command_names_files_and_settings_that_exist(script, words):
    words = words.split("#")[0]
    for path in re.findall(r"configs/\w+\.py", words):
        assert (ROOT / path).is_file()
    for flag in re.findall(r"--(\w+)=", words):
        assert flag in configs.fields(SCRIPTS[script]) or (flag, script) == ("ask", "evaluate.py")


def test_the_flags_of_every_published_method_are_accepted():
    rows = re.findall(r"`(--forget_loss=[^`]*)`", (ROOT / "configs" / "README.md").read_text())
    assert len(rows) > 15
    for row in rows:
        words = row.replace("\\|", "|").replace("'", "").replace("FILE", str(data.REFUSALS)).split()
        assert configs.load(unlearn.Config, words)[0].forget_loss in unlearn.FORGET


def test_every_method_has_its_line_in_the_table_of_methods():
    text = (ROOT / "configs" / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in [*unlearn.FORGET, *unlearn.RETAIN])


def test_the_loss_of_the_worked_example_runs():
    code = re.search(r"```python\n(   def square.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    names = {"_float": losses._float}
    exec("\n".join(line[3:] for line in code.splitlines()), names)
    import torch
    assert names["square"](torch.tensor([-2.0])).tolist() == [-4.0]


def test_imports_form_the_documented_dag():
    allowed = {"losses": set(), "data": {"configs"}, "model": {"configs", "data", "losses"},
               "evaluate": {"configs", "data", "losses", "model"}, "unlearn": {"configs", "data", "evaluate", "losses", "model"},
               "relearn": {"configs", "data", "evaluate", "losses", "model", "unlearn"}}
    for name, may in allowed.items():
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        used = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        used |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert used & (allowed.keys() | {"configs"}) <= may, name
