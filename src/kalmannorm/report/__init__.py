"""Tables and figures from the records of a results folder, and from nothing else; no torch.

`write` makes the files of an experiment card; `load`, `curves` and `variance_gaps` are for notebooks.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmannorm.files import write_atomically
from kalmannorm.report import parameters, render, speed
from kalmannorm.report import table as tables
from kalmannorm.report.read import Record, Records, curves, load, records, variance_gaps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Record",
    "Records",
    "curves",
    "load",
    "make",
    "records",
    "variance_gaps",
    "write",
    "write_all",
    "write_files",
]


Files = dict[str, bytes]


def write(card: Mapping[str, Any], found: Records, out: Path) -> list[Path]:
    """Write the files of a card to `out` and return their paths. UserError as for `make` and `write_files`."""
    return write_files(make(card, found)[1], out)


def write_files(files: Files, out: Path) -> list[Path]:
    """Write them to `out` and return their paths; each is written whole or not at all. UserError: it cannot be."""
    for file, content in files.items():
        write_atomically(out / file, content)
    return [out / file for file in files]


def make(card: Mapping[str, Any], found: Records) -> tuple[tables.Table | render.Sheet | None, Files]:
    """A card's table, None where it is a picture, and its files by name.

    A table card: <name>_<dataset>_<budget>.md, .csv, .tex and, once a cell has a value, its picture as .png and .pdf.
    One of kind "parameters" or "speed": <name>.md, .csv, .tex. A card of kind "figure": .png and .pdf of Figure 5 and
    of the gaps per layer; of another picture's: <name>_<dataset>_<budget>.png and .pdf. Behind the budget stands what
    else the command line sets (table7_cifar10_lite_width=0.5). Raises UserError when a figure has no run to draw.
    """
    kind = card.get("kind", "table")
    if kind not in TABLES:
        return None, PICTURES[kind](card, found)
    table = TABLES[kind](card, found)
    texts = {"md": render.markdown(table), "csv": render.csv(table), "tex": render.latex(table)}
    files = {f"{table.stem}.{ending}": text.encode() for ending, text in texts.items()}
    if isinstance(table, tables.Table) and not table.empty and not table.apart:
        from kalmannorm.report import figure

        files |= _encoded(table.stem, figure.accuracy_bars(table))
    return table, files


def _encoded(stem: str, picture: "Figure") -> Files:
    from kalmannorm.report import figure

    return {f"{stem}.{kind}": figure.encode(picture, kind) for kind in ("png", "pdf")}


def _figure(card: Mapping[str, Any], found: Records) -> Files:
    from kalmannorm.report import figure

    name = tables.stem(card)
    layers = name.replace(card["name"], f"{card['name']}_layers", 1)
    return _encoded(name, figure.figure5(card, found)) | _encoded(layers, figure.figure5_layers(card, found))


def _picture(card: Mapping[str, Any], found: Records) -> Files:
    from kalmannorm.report import accuracy, layers

    return _encoded(tables.stem(card), {**accuracy.DRAW, **layers.DRAW}[card["kind"]](card, found))


def write_all(found: Records, out: Path) -> tuple[list[Path], list[str]]:
    """Everything that the records give: the files of every card that has runs, claims.md and report.html.

    Returns the paths, and in words which cards there are not.
    """
    from kalmannorm.report import collection, page
    from kalmannorm.report.verdicts import evaluate

    cards, problems = collection.load_cards()
    entries = collection.collect(cards, problems, found)
    verdicts = evaluate(found, cards)
    files = {name: content for entry in entries for made in entry.made for name, content in made.files.items()}
    files["claims.md"] = page.write_claims(verdicts).encode()
    files["report.html"] = page.render_page(found, entries, verdicts).encode()
    return write_files(files, out), [f"{name}: {problem}" for name, problem in problems.items()]


# Of the kinds of card that are tables: the table.
TABLES: dict[str, Callable[[Mapping[str, Any], Records], tables.Table | render.Sheet]] = {
    "table": tables.table,
    "parameters": parameters.sheet,
    "speed": speed.sheet,
}

# Of the other kinds: its files by name.
PICTURES: dict[str, Callable[[Mapping[str, Any], Records], Files]] = {
    "figure": _figure,
    **dict.fromkeys(("curves", "stat_batch", "initial_gain", "gains", "layer_errors", "mixture"), _picture),
}
