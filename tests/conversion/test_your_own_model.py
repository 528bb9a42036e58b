"""The code of docs/your-own-model.md runs as it is printed."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def code_of(page: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL))


@pytest.mark.slow
def test_your_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile(code_of("your-own-model.md"), "your-own-model.md", "exec"), names)
    assert names["difference"] < 1e-4
    printed = capsys.readouterr().out
    for line in ("19 of 20 normalizers have a prior", "softmax (softmax)", "\nNone\n", "ResNet (4, 4)"):
        assert line in printed
