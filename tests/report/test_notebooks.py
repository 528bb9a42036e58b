"""The notebooks are committed executed, and run on the committed records."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

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


@pytest.mark.parametrize("name", ["accuracy_curves", "variance_gaps"])
def test_notebook_is_executed_and_runs(name: str, ipython: None) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    file = NOTEBOOKS / f"{name}.ipynb"
    assert file.stat().st_size < 400_000  # small pictures, so that it shows on a code host
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)

    def pictures() -> int:
        return sum("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))

    committed = pictures()
    assert committed and "Traceback" not in file.read_text()
    resources = {"metadata": {"path": NOTEBOOKS}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert pictures() == committed
