"""`kalmannorm report`: an experiment's table or figure from the records, all of them, or two runs beside each other."""

import gc
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kalmannorm.errors import UserError
from kalmannorm.experiments import card as cards
from kalmannorm.experiments.card import Card, Row
from kalmannorm.experiments.cards import chosen, read_seeds
from kalmannorm.experiments.composition import key_of, parse, refuse_repeated, split_paths
from kalmannorm.experiments.config import RESULT_KEYS, compose
from kalmannorm.files import write_atomically
from kalmannorm.machine import cores
from kalmannorm.report import claims, figures, frame, page, parameters, plots, speed, tables
from kalmannorm.report import sheet as sheets
from kalmannorm.report.cells import FIRST_STEPS, Cells, Group, identities, identity
from kalmannorm.report.compare import compare as beside
from kalmannorm.report.page import Made

ALONE = ("gains", "layer_errors", "mixture", "death", "conditioning")  # kinds that are useful for one run
COUNTED = ("parameters", "speed")  # kinds of cards without runs
GROUPED = ("dataset", "budget", "schedule")
OF_RUNS = ("dataset", "precision", "compile", "deterministic")  # they leave runs out, and tell no rows apart
DOCUMENTS = {"docs/results.md": page.results_markdown, "README.md": page.readme_markdown}
DRAWN_WITH = (
    *(f"matplotlib.backends.backend_{kind}" for kind in ("agg", "pdf", "svg")),
    "fontTools.subset",
    "scipy.stats",
)
_shared: list[Any] = []  # cells and results, in a process that draws


def report(name: str, arguments: list[str]) -> int:
    """Write the experiment's files, print its tables and the paths.

    `arguments`: as for experiments.cards.load; without seeds=, all seeds are shown. Settings that the card leaves open
    choose among the groups of runs; other settings apply to every row. UserError: there are no such runs.
    """
    refuse_repeated(arguments)
    paths, rest = split_paths(arguments)
    card, own, overrides = chosen(name, rest)
    results = Path(paths.get("results") or "results")
    named = _settings(card, overrides)
    of_runs = {key: named.pop(key) for key in list(named) if key.partition(".")[0] in OF_RUNS and key != "dataset"}
    others = {key: value for key, value in named.items() if key not in (*GROUPED, "arch.width")}
    runs = frame.load(results, spelled=others)
    for key, value in of_runs.items():
        runs = runs[runs[key].map(lambda of, value=value: of == value)] if key in runs else runs[:0]
    seeds = own.pop("seeds", None)
    if seeds is not None and not (asked := runs.seed.isin(read_seeds(seeds))).all():
        runs, own["seeds"] = runs[asked], seeds
    apart = [f"{key}-{value}" for key, value in (own | others | of_runs).items() if value != "paper"]
    stem = "-".join([name, *(re.sub(r"[^\w.]+", "-", said).strip("-") for said in apart)])  # beside the whole table
    rows = tuple(replace(row, runs={**row.runs, **others}) for row in card.rows)
    card = replace(card, name=stem, rows=rows)
    cells = Cells(frame.check(runs) if apart else runs)
    made = list(_make(card, cells, results, lambda group: _fits(group, named)))
    if not made:
        found = f"{results / 'records'} whose network learned"
        found += "" if card.kind == "table" else ", with arrays (.npz) if these are drawn"
        raise UserError(f"{name}: no run of it in {found}; to run it: kalmannorm sweep {' '.join([name, *arguments])}")
    for one in made:
        if one.sheet:
            print(sheets.text(one.sheet))
        for file in one.files:
            print(results / file)
    return 0


def _settings(card: Card, overrides: list[str]) -> dict[str, Any]:
    """Return the values of the overrides that determine a run's result. UserError: the first row's runs cannot be
    composed with them, as by a sweep."""
    row = card.rows[0]
    of_row = cards.overrides(card.settings(row, next(iter(card.columns_of(row)), None)))
    merged = {key_of(override): override for override in (*of_row, *overrides)}
    # The classes of image_folder are counted in the data, which may be elsewhere.
    if merged.get("dataset", "").endswith("=image_folder"):
        merged.setdefault("dataset.classes", "dataset.classes=2")
    compose(list(merged.values()))
    parsed = [parse(override) for override in overrides if key_of(override).partition(".")[0] in RESULT_KEYS]
    return {one.key_or_group: one.value() for one in parsed}


def report_all(arguments: list[str]) -> int:
    """Write everything that can be made from the records, and print the paths.

    That is tables, figures, claims.md, report.html, and in a checkout the generated parts of README and
    docs/results.md. UserError: no results folder.
    """
    results = place_of_results(arguments)
    if not results.is_dir():
        raise UserError(f"results={results} is no folder: there is nothing to report")
    gc.disable()  # garbage collection took a sixth of a report's time; without it, memory grows by a fifth
    try:
        for path in write_all(results):
            print(path)
    finally:
        gc.enable()
    return 0


def write_all(results: Path) -> list[Path]:
    """Write all files and return their paths."""
    cells = Cells(frame.load(results))
    every = [card for card in map(cards.read, cards.names()) if not card.same_as]
    every.sort(key=lambda card: _place(card, cells))
    for library in DRAWN_WITH:
        importlib.import_module(library)  # before the processes start, else each of them takes seconds to import it
    # Drawing is most of the work. Counted cards stay in this process, so that claims reuse their parameter counts.
    with ProcessPoolExecutor(min(cores(), len(every)), initializer=_share, initargs=(cells, results)) as pool:
        running = {card.name: pool.submit(_made, card) for card in every if card.kind not in COUNTED}
        of_cards = {card.name: list(_make(card, cells, results)) for card in every if card.kind in COUNTED}
        verdicts = claims.evaluate(cells, results)
        of_cards |= {name: future.result() for name, future in running.items()}
    made = [one for card in every for one in of_cards[card.name]]
    absent = [card for card in every if not of_cards[card.name]]
    written = [results / file for one in made for file in one.files]
    picture = page.forest(verdicts)
    drawn, files = _draw(results, "claims", picture) if picture else ("", [])
    written += [results / file for file in files]
    elsewhere = sorted(str(folder.relative_to(results)) for folder in results.glob("*/records"))
    text = page.render(cells, made, verdicts, absent, drawn, elsewhere)
    texts = {"report.html": text, "claims.md": page.claims_file(verdicts)}
    pages = {name: content.encode(errors="surrogateescape") for name, content in texts.items()}  # names may be no UTF-8
    written += [results / name for name in _write(results, pages)]
    for name, generate in DOCUMENTS.items():
        document = results.resolve().parent / name
        if results.name == "results" and document.exists() and page.GENERATED[0] in document.read_text():
            content = page.between(document.read_text(), generate(made, verdicts, cells))
            write_atomically(document, content.encode())
            written.append(document)
    return written


def _share(*shared: Any) -> None:
    """Store cells and results for `_made` when a process of the pool starts."""
    _shared[:] = shared


def _made(card: Card) -> list[Made]:
    cells, results = _shared
    return list(_make(card, cells, results, partial(_compares, card, cells=cells)))


def compare(runs: list[str], arguments: list[str]) -> int:
    """Print a comparison of two runs, given by id or the beginning of one. UserError: no such run, or several."""
    print(beside(place_of_results(arguments), *runs))
    return 0


def place_of_results(arguments: list[str]) -> Path:
    """Return the results folder that the arguments name. UserError: an override of anything else."""
    for argument in arguments:
        if not argument.startswith("results="):
            raise UserError(f"{argument!r}: expected results=FOLDER and nothing else; settings are in the records")
    refuse_repeated(arguments)
    paths, _ = split_paths(arguments)
    return Path(paths.get("results") or "results")


def _make(
    card: Card, cells: Cells, results: Path, wanted: Callable[[Group], bool] = lambda group: True
) -> Iterator[Made]:
    """Write the files of a card for each group of its runs that is `wanted`, and yield what was made."""
    if card.kind in COUNTED:
        counted = parameters.sheet(card) if card.kind == "parameters" else speed.sheet(card, results)
        yield Made(card, None, counted, {}, _write(results, sheets.files(counted)))
        return
    for group in groups(card, cells):
        if wanted(group):
            alike = cells.alike(identities(card), group)
            shown = tables.by_batch(card, group, alike) if card.kind == "stat_batch" else card
            sheet = tables.table(shown, group, alike) if shown.kind == "table" else None
            files = _write(results, sheets.files(sheet)) if sheet else []
            pictures: dict[str, str] = {}
            for behind, figure in figures.DRAW[card.kind](card, group, alike).items():
                stem = f"{card.name}{behind}_{group.stem}"
                picture, of_picture = _draw(results, stem, figure, group.main)  # others are only linked: a small page
                pictures |= {behind: picture} if picture else {}
                files += of_picture
            if sheet or pictures or files:
                yield Made(card, group, sheet, pictures, files)


def _place(card: Card, cells: Cells) -> tuple[int, int]:
    """Return a sort key: the papers' tables first, then their figures, then other cards, those with most runs first."""
    kind = next((i for i, start in enumerate(("table", "figure", "v1-")) if card.name.startswith(start)), 3)
    every = (
        cells.cell(card, r, group, c) for group in groups(card, cells) for r in card.rows for c in card.columns_of(r)
    )
    return kind, -len({identity for cell in every for identity in cell.ids}) if kind == 3 else 0


def groups(card: Card, cells: Cells) -> list[Group]:
    """Return the groups in which a card has runs."""
    return [
        group
        for group in cells.groups(identities(card))
        if (group.length == FIRST_STEPS) == (card.kind in figures.OF_FIRST_STEPS)
    ]


def _compares(card: Card, group: Group, cells: Cells) -> bool:
    """Say whether a group has enough runs to compare: of two normalizers, if the card has several, and at two values of
    the setting that it varies, if any. Tables with printed values and cards about single runs are always shown."""

    def normalizers(rows: Iterable[Row]) -> set[str]:
        return {identity(card, row).normalizer for row in rows}

    ran = [r for r in card.rows if any(cells.cell(card, r, group, column).runs for column in card.columns_of(r))]
    if card.kind in ALONE or card.paper or any(row.paper for row in card.rows):
        return True
    if card.kind in figures.SETTINGS:
        _, _, value, _ = figures.SETTINGS[card.kind]
        if len({value(card, row) for row in ran} - {None}) < 2:
            return False
    columns = [c for c in card.columns if any(cells.cell(card, r, group, c).runs for r in ran if r.has(c))]
    varied, every = ({json.dumps(c.runs, sort_keys=True) for c in of} for of in (columns, card.columns))
    if len(varied) < min(2, len(every)):
        return False
    return len(normalizers(ran)) >= min(2, len(normalizers(card.rows)))


def _fits(group: Group, named: dict[str, Any]) -> bool:
    width = float(named.get("arch.width", group.width))
    return group.width == width and all(
        not getattr(group, key)
        or getattr(group, key).split(" ")[0] == named.get(key, getattr(group, key).split(" ")[0])
        for key in GROUPED
    )


def _write(results: Path, files: dict[str, bytes]) -> list[str]:
    for name, content in files.items():
        write_atomically(results / name, content)
    return list(files)


def _draw(results: Path, stem: str, figure: Any, whole: bool = True) -> tuple[str, list[str]]:
    """Write a picture as PNG, with `whole` also as PDF, and draw an SVG. Return the SVG or "", and the file names.

    A PDF is kept if its PNG did not change: to write one takes as long as all the rest, and its bytes depend on the
    machine.
    """
    found = plots.encode(figure, ("png", "svg") if whole else ("png",))
    drawn = plots.inline(found.pop("svg"), stem) if whole else ""
    png, pdf = (results / f"{stem}.{ending}" for ending in ("png", "pdf"))
    if whole and not (pdf.exists() and png.exists() and png.read_bytes() == found["png"]):
        found |= plots.encode(figure, ("pdf",))
    files = _write(results, {f"{stem}.{ending}": content for ending, content in found.items()})
    return drawn, [*files, *([pdf.name] if whole and "pdf" not in found else [])]
