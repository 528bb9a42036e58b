"""Tables and figures from the records of a results folder, and from nothing else; no torch.

`write` makes the files of an experiment card; `load`, `curves` and `variance_gaps` are for notebooks.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kalmannorm.report import parameters, render, speed
from kalmannorm.report import table as tables
from kalmannorm.report.read import Record, Records, curves, load, records, variance_gaps
from kalmannorm.runs.record import write_atomically

__all__ = ["Record", "Records", "curves", "load", "records", "text", "variance_gaps", "write", "write_all"]


Files = dict[str, bytes]


def write(card: Mapping[str, Any], found: Records, out: Path) -> list[Path]:
    """Write the files of a card to `out` and return their paths.

    A table card: <name>_<dataset>_<budget>.md, .csv, .tex and, once a cell has a value, its picture as .png and .pdf.
    One of kind "parameters" or "speed": <name>.md, .csv, .tex. A card of kind "figure": .png and .pdf of Figure 5 and
    of the gaps per layer; of another picture's: <name>_<dataset>_<budget>.png and .pdf. Behind the budget stands what
    else the command line sets (table7_cifar10_lite_width=0.5). Raises UserError when a figure has no run to draw, or
    when a file cannot be written; every file is written whole or not at all.
    """
    files = KINDS[card.get("kind", "table")](card, found)
    for file, content in files.items():
        write_atomically(out / file, content)
    return [out / file for file in files]


def text(card: Mapping[str, Any], found: Records) -> str | None:
    """The card's table for the terminal; None for a figure."""
    make = TABLES.get(card.get("kind", "table"))
    return render.text(make(card, found)) if make else None


def _written(table: tables.Table | render.Sheet) -> Files:
    texts = {"md": render.markdown(table), "csv": render.csv(table), "tex": render.latex(table)}
    return {f"{table.stem}.{ending}": text.encode() for ending, text in texts.items()}


def _table(card: Mapping[str, Any], found: Records) -> Files:
    table = tables.table(card, found)
    name, files = table.stem, _written(table)
    if not table.empty and not table.apart:
        from kalmannorm.report import figure

        picture = figure.accuracy_bars(table)
        files |= {f"{name}.{kind}": figure.encode(picture, kind) for kind in ("png", "pdf")}
    return files


def _figure(card: Mapping[str, Any], found: Records) -> Files:
    from kalmannorm.report import figure

    name = tables.stem(card)
    drawn = {name: figure.figure5(card, found)}
    drawn[name.replace(card["name"], f"{card['name']}_layers", 1)] = figure.figure5_layers(card, found)
    return {f"{stem}.{kind}": figure.encode(drawn[stem], kind) for stem in drawn for kind in ("png", "pdf")}


def _picture(card: Mapping[str, Any], found: Records) -> Files:
    from kalmannorm.report import accuracy, figure, layers

    drawn = {**accuracy.DRAW, **layers.DRAW}[card["kind"]](card, found)
    return {f"{tables.stem(card)}.{kind}": figure.encode(drawn, kind) for kind in ("png", "pdf")}


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
    for file, content in files.items():
        write_atomically(out / file, content)
    return [out / file for file in files], [f"{name}: {problem}" for name, problem in problems.items()]


# Of the kinds of card that are tables: the table.
TABLES: dict[str, Callable[[Mapping[str, Any], Records], tables.Table | render.Sheet]] = {
    "table": tables.table,
    "parameters": parameters.sheet,
    "speed": speed.sheet,
}

# What a card's `kind` makes: its files by name.
KINDS: dict[str, Callable[[Mapping[str, Any], Records], Files]] = {
    "table": _table,
    "parameters": lambda card, found: _written(parameters.sheet(card, found)),
    "speed": lambda card, found: _written(speed.sheet(card, found)),
    "figure": _figure,
    **dict.fromkeys(("curves", "stat_batch", "initial_gain", "gains", "layer_errors", "mixture"), _picture),
}
