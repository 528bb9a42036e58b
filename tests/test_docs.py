"""What docs/ shows runs."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from contract import CHECKS

from kalmannorm import NORMS
from kalmannorm.experiments.config import conf_dir

DOCS = Path(__file__).resolve().parents[1] / "docs"


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
