"""The notebooks are committed executed, and run on the committed records."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.fixture
def ipython(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that see this checkout, and leave the user's folders alone."""
    for name in ("MPLBACKEND", "MATPLOTLIBRC"):  # which commands set for their own process, in which tests call them
        monkeypatch.delenv(name, raising=False)
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return


NAMES = ("accuracy_curves", "variance_gaps")


def read(name: str) -> Any:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def pictures(notebook: Any) -> int:
    return sum("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_executed_and_its_code_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, notebook = NOTEBOOKS / f"{name}.ipynb", read(name)
    assert file.stat().st_size < 400_000  # small pictures, so that it shows on a code host
    assert pictures(notebook) and "Traceback" not in file.read_text()
    monkeypatch.chdir(NOTEBOOKS)
    plt.switch_backend("agg")
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    try:
        exec(compile(code, file.name, "exec"), {})
        assert len(plt.get_fignums()) == pictures(notebook)
    finally:
        plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_a_kernel(name: str, ipython: None) -> None:
    nbclient = pytest.importorskip("nbclient")
    notebook = read(name)
    committed = pictures(notebook)
    resources = {"metadata": {"path": NOTEBOOKS}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert pictures(notebook) == committed
