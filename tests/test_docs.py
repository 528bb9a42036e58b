"""What docs/ shows runs; docstrings say what a function does."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from contract import CHECKS

from kalmannorm import NORMS
from kalmannorm.experiments.config import conf_dir

DOCS = Path(__file__).resolve().parents[1] / "docs"
SOURCE = DOCS.parent / "src" / "kalmannorm"
# With these a fragment begins ("A copy of ...", "Whether ...", "Of the groups ..."), where a verb should stand.
NO_VERBS = {
    *("a", "an", "the", "this", "that", "these", "those", "its", "it", "each", "every", "all", "one", "no", "none"),
    *("of", "in", "as", "by", "for", "from", "to", "with", "at", "on", "through", "under", "behind", "beside"),
    *("what", "which", "who", "where", "when", "while", "whether", "how", "if", "not", "such", "x", "mean", "names"),
}


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def rms() -> Iterator[str]:
    """The example of add-a-normalizer.md, listed as long as the tests below run."""
    (code,) = blocks("add-a-normalizer.md", "python")
    # Into this module, where pickle finds the class.
    exec(compile(code, "add-a-normalizer.md", "exec"), globals())
    yield "rms"
    del NORMS["rms"]


@pytest.mark.parametrize("check", CHECKS)
def test_the_normalizer_of_the_example_keeps_the_contract(rms: str, check: str) -> None:
    CHECKS[check](rms)


def test_the_card_of_the_example_is_like_the_others() -> None:
    (card,) = blocks("add-a-normalizer.md", "yaml")
    assert yaml.safe_load(card).keys() == yaml.safe_load((conf_dir() / "norm" / "bn.yaml").read_text()).keys()


def test_a_few_lines_of_plain_python_find_the_answer_that_readme_gives() -> None:
    script = DOCS.parent / "scripts" / "answer.py"
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    readme = (DOCS.parent / "README.md").read_text()
    for network, kind, words in (
        ("resnet32", "paper from gain 0.5", "Is KN more accurate than BN, both with statistics of 2 images?"),
        ("resnet14", "paper from gain 0.5", "Is KN more accurate than BN, both with statistics of 2 images?"),
        ("resnet32", "robust", "Our preset robust with 2 images against BN with 2"),
    ):
        found = re.search(rf"{network}, bf16, rate 0.1: {kind}: .* against BN (\S+)", said)
        (line,) = (line for line in readme.splitlines() if words in line)
        assert found and f" {found[1]} ".replace("-", "−") in line


def test_functions_docstrings_begin_with_a_verb() -> None:
    fragments = [
        f"{file.relative_to(SOURCE)}: {node.name}: {said}"
        for file in sorted(SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and not any("property" in ast.unparse(one) for one in node.decorator_list)
        if (said := ast.get_docstring(node)) and re.split(r"\W", said, maxsplit=1)[0].lower() in NO_VERBS | {""}
    ]
    assert not fragments, "\n".join(fragments)
