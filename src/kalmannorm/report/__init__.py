"""Tables and figures from the records of a results folder, and from nothing else; no torch.

`write` makes the files of an experiment card, `load` gives notebooks the records as a DataFrame.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kalmannorm.errors import UserError
from kalmannorm.report import render
from kalmannorm.report import table as tables
from kalmannorm.report.read import Record, Records, load, records

__all__ = ["Record", "Records", "load", "records", "write"]


def write(card: Mapping[str, Any], found: Records, out: Path) -> list[Path]:
    """Write the files of a card to `out` and return their paths.

    A table card: <name>_<dataset>_<budget>.md, .csv, .tex and, once a cell has a value, its picture as .png and .pdf.
    A figure card (one with "bn" and "kn"): .png and .pdf of Figure 5 and of the gaps per layer. Raises UserError when
    a figure has no run to draw, or when a file cannot be written; every file is written whole or not at all.
    """
    name = tables.stem(card)
    if "bn" in card and "kn" in card:
        from kalmannorm.report import figure

        drawn = {name: figure.figure5(card, found)}
        drawn[name.replace(card["name"], f"{card['name']}_layers", 1)] = figure.figure5_layers(card, found)
        files = {f"{stem}.{kind}": figure.encode(drawn[stem], kind) for stem in drawn for kind in ("png", "pdf")}
    else:
        table = tables.table(card, found)
        texts = {"md": render.markdown(table), "csv": render.csv(table), "tex": render.latex(table)}
        files = {f"{name}.{ending}": text.encode() for ending, text in texts.items()}
        if not table.empty:
            from kalmannorm.report import figure

            picture = figure.accuracy_bars(table)
            files |= {f"{name}.{kind}": figure.encode(picture, kind) for kind in ("png", "pdf")}
    return [_write(out / file, content) for file, content in files.items()]


def _write(path: Path, content: bytes) -> Path:
    """Write to a hidden file beside `path`, then rename: a reader sees the old file or the new one, nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        what = "free space or change the permissions, then report again"
        raise UserError(f"cannot write {path} ({error.strerror}): {what}") from error
    return path
