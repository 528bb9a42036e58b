"""Arrows point one way: no wing imports one that imports it, not even for types or within a function."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "kalmannorm"

# What a wing may import beside itself and the leaves.
LEAVES = {"errors", "files", "machine", "stopping"}
ARROWS = {
    "norm": set(),
    "conversion": {"norm"},
    "models": {"norm"},
    "data": {"norm"},
    "experiments": {"conversion", "data", "models", "norm"},
    "train": {"experiments", "conversion", "data", "models", "norm"},
    "report": {"train", "experiments", "conversion", "data", "models", "norm"},
    "runs": {"train", "experiments", "conversion", "data", "models", "norm"},
    "cli": {"runs", "report", "train", "experiments", "conversion", "data", "models", "norm"},
}
# Modules that stand at the top, by the wing that they belong to. The package itself names the public API.
TOP = {"presets": "norm", "placement": "models", "config": "experiments", "record": "experiments", "__main__": "cli"}


def modules() -> dict[str, Path]:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = ("kalmannorm", *file.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def wing(module: str) -> str:
    part = (module.split(".") + [""])[1]
    return TOP.get(part, part)


def test_wings_import_only_what_stands_below_them() -> None:
    known = modules()
    wrong = [
        f"{module} imports {other}"
        for module, file in known.items()
        for other in imported(file, known)
        if wing(module) and wing(other) != wing(module) and wing(other) not in ARROWS.get(wing(module), set()) | LEAVES
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_in_a_circle() -> None:
    known = modules()
    graph = {module: set(imported(file, known)) - {module} for module, file in known.items() if wing(module)}
    TopologicalSorter(graph).prepare()  # CycleError names the circle
