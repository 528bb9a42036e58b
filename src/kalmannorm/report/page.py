"""results/report.html: the answer, the claims, the runs, tables and pictures, in one file that works without network.

Every number is a link that opens its runs (#runs=ID,ID). What comes from records is escaped by the template engine.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from kalmannorm.experiments.card import Card
from kalmannorm.experiments.record import METRICS
from kalmannorm.report import frame, paper, plots, style, tables
from kalmannorm.report.claims import Claim, Verdict, tally
from kalmannorm.report.effects import Cells, Group
from kalmannorm.report.plots import Entry, Point
from kalmannorm.report.quantities import missing
from kalmannorm.report.tables import Sheet, escape_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATES = ("supported", "contradicted", "open", "explored", "not run")
MARKS = {"supported": "✓", "contradicted": "✗", "open": "?", "explored": "·", "not run": "–"}
BUDGETS = ("paper", "short", "lite")  # the fullest first
POINTS = 40  # of a curve
ROOM = 650_000  # characters of pictures: with runs and claims, the page is under 1 MB
ANSWERS = {"supported": "Yes", "contradicted": "No", "open": "Not decided"}  # of the first sentences' questions
FOREST = 25.0  # points to either side that the claims' picture shows
GENERATED = ("<!-- results -->", "<!-- end -->")  # the part of a document that `make report` writes


@dataclass
class Made:
    """What a card gives in one group: its sheet, pictures by what stands behind the stem, names of its files."""

    card: Card
    group: Group | None
    sheet: Sheet | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)  # inline SVG
    files: Sequence[str] = ()

    @property
    def stem(self) -> str:
        return f"{self.card.name}_{self.group.stem}" if self.group else self.card.name

    @property
    def wide(self) -> bool:
        """Whether it takes the page's width."""
        return self.sheet is not None and len(self.sheet.header) > 4

    @property
    def main(self) -> bool:
        """Whether it is of the papers' setting, whatever the budget."""
        return self.group is None or (self.group.width == 1 and not self.group.schedule)


def render(
    cells: Cells,
    made: Sequence[Made],
    verdicts: Sequence[Verdict],
    absent: Sequence[Card],
    forest: str,
    elsewhere: Sequence[str],
) -> str:
    """Return the page as text. `forest`: the claims' picture as SVG; `absent`: the cards without runs; `elsewhere`:
    folders of other records, which are linked."""
    import jinja2

    loader = jinja2.PackageLoader("kalmannorm.report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    of_card: dict[str, list[Made]] = {}
    left = ROOM - len(forest)
    for one in made:  # the first group of each card is shown, others on demand, without pictures: these are linked
        size = sum(map(len, one.pictures.values()))
        first = one.card.name not in of_card and size <= left
        left -= size if first else 0
        of_card.setdefault(one.card.name, []).append(one if first else replace(one, pictures={}))
    one_each = cells.runs.drop_duplicates("id")
    view = {
        "answer": answer(verdicts, cells),
        "forest": forest,
        "matrix": matrix(verdicts),
        "explored": [v for v in verdicts if v.state == "explored" and v.effect and v.group and v.group.width == 1],
        "unjudged": [v for v in verdicts if v.state == "not run"],
        "counts": tally(verdicts),
        "states": one_each.state.value_counts().to_dict() if len(one_each) else {},
        "cards": of_card,
        "absent": absent,
        "elsewhere": elsewhere,
        "conflicts": paper.conflicts(),
        "runs": json.dumps(_runs(cells.runs), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "marks": MARKS,
    }
    helpers = {"table": tables.page_html, "printed": printed, "letter": tables.letter}
    return environment.get_template("report.html.j2").render(**view, **helpers)


def answer(verdicts: Sequence[Verdict], cells: Cells) -> list[str]:
    """Return the answer in sentences: the claims that it rests on, each at its fullest budget, then how many hold."""
    judged = [v for v in verdicts if v.group and v.state in ("supported", "contradicted", "open") and v.effect]
    ours = [
        v for v in verdicts if v.state == "explored" and v.claim.ours and v.effect and v.group and v.group.width == 1
    ]
    said = [] if judged else ["No claim of the papers has been tested in their setting yet."]
    for claim in dict.fromkeys(v.claim for v in (*judged, *ours) if v.claim.answer):
        of = [v for v in (*judged, *ours) if v.claim is claim and v.group]
        fullest = min((v.group.budget for v in of if v.group), key=_fullness)
        words = [_in_words(v, v.group) for v in of if v.group and v.group.budget == fullest]
        said.append(f"{claim.answer}{'' if claim.answer.endswith('?') else ':'} {'; '.join(words)}.")
    for budget in sorted({v.group.budget for v in judged if v.group}, key=_fullness):
        of_budget = [v for v in judged if v.group and v.group.budget == budget]
        counts = tally(of_budget)
        total = sum(counts.values())
        reduced = (
            ""
            if budget == "paper"
            else f", a reduction ({_length(cells, budget, {v.group.dataset for v in of_budget if v.group})})"
        )
        said.append(
            f"At budget {budget}{reduced}, {total} tests of the papers' claims: {counts['supported']} supported, "
            f"{counts['contradicted']} contradicted, {counts['open']} open."
        )
    return said


def _in_words(verdict: Verdict, group: Group) -> str:
    where = f"on {group.dataset}, budget {group.budget}"
    if verdict.state == "explored":
        return f"{verdict.estimate} {where}"
    value, paper = verdict.claim.printed(group.dataset), ""
    if value is not None and (shown := printed(verdict)):
        outside = value < verdict.low or value > verdict.high
        paper = f"; the paper has {shown}{', outside the interval' if outside else ''}"
    return f"{ANSWERS[verdict.state]} {where}: {verdict.estimate}{paper}"


def matrix(verdicts: Sequence[Verdict]) -> tuple[list[str], list[tuple[Claim, list[list[Verdict]]]]]:
    """Return the claims of the papers that were tested, against data sets and budgets: columns, and the verdicts by
    column."""
    judged = [v for v in verdicts if v.state in ("supported", "contradicted", "open")]
    columns = sorted({_column(v) for v in judged}, key=lambda c: (c == "", _fullness(c.rpartition(", ")[2]), c))
    rows = []
    for claim in dict.fromkeys(v.claim for v in judged):
        of = [v for v in judged if v.claim is claim]
        rows.append((claim, [[v for v in of if _column(v) == column] for column in columns]))
    return [column or "counted, timed" for column in columns], rows


def printed(verdict: Verdict) -> str:
    """Return the paper's value on the verdict's data, as printed: "+1.5"; "" where there is none."""
    value = verdict.claim.printed(verdict.group.dataset if verdict.group else "")
    return "" if value is None or verdict.claim.than > 50 else f"{value:+g}".replace("-", "−")


def forest(verdicts: Sequence[Verdict]) -> "Figure | None":
    """Measured effects in points with the intervals that decide, beside the paper's."""
    colours = {"supported": style.GREEN, "contradicted": style.ORANGE, "open": style.GREY}
    paper_point = Point(0, "#000000", "D", filled=False)
    entries: list[tuple[str, Entry]] = []
    shown, least = [1.0], [FOREST]
    for v in verdicts:
        if v.state in colours and v.effect and v.group and v.claim.measure.unit == "points" and math.isfinite(v.low):
            value = v.claim.printed(v.group.dataset)
            points = [Point(v.measured, colours[v.state], "o", v.low, v.high)]
            points += [paper_point._replace(value=value)] if value is not None else []
            shown += [2 * abs(point.value) for point in points]
            least.append(max(abs(v.low), abs(v.high)))
            where = f"{v.group.dataset}, {v.group.budget}"
            entries.append((v.group.budget, Entry(f"{v.claim.id.replace('_', ' ')} ({where})", points)))
    if not entries:
        return None
    kept = sorted(entries, key=lambda pair: _fullness(pair[0]))
    legend = {name: Point(0, colour, "o") for name, colour in colours.items()} | {"paper": paper_point}
    said = (
        "Points of the first side over the second; intervals hold for all claims of a budget at once (95 %); "
        "arrows: they go on beyond the picture."
    )
    # One interval that says nothing must not make points of the others: twice as far as any value, the shortest whole.
    around = min(FOREST, 1.1 * max(*shown, min(least)))
    return plots.forest([entry for _, entry in kept], said, "points", legend, around)


def claims_markdown(verdicts: Sequence[Verdict]) -> str:
    """Return the tested claims as a Markdown table, then what was explored, then what was not run."""
    lines = ["| | claim | data, budget | measured | paper |", "| :-: | :-- | :-- | :-- | :-: |"]
    for v in verdicts:
        if v.state in ("supported", "contradicted", "open"):
            text = escape_markdown(f"{v.claim.text} ({v.claim.where})")
            why = f"; {v.why}" if v.why else ""
            measured = escape_markdown(f"{v.estimate}{why}".removeprefix("; "))
            lines.append(f"| {v.state} | {text} | {_column(v)} | {measured} | {printed(v)} |")
    explored = [v for v in verdicts if v.state == "explored" and v.effect and v.group]
    lines += ["", "Explored (other settings, our readings): an interval for each alone, no verdict.", ""]
    lines += ["| claim | data, budget | measured |", "| :-- | :-- | :-- |"]
    lines += [
        f"| {escape_markdown(v.claim.text)} | {v.group.label} | {escape_markdown(v.estimate)} |"
        for v in explored
        if v.group
    ]
    missing = dict.fromkeys(f"{v.claim.text} ({v.claim.where})" for v in verdicts if v.state == "not run")
    lines += ["", f"Not run: {len(missing)} claims.", "", *(f"- {escape_markdown(text)}" for text in missing)]
    return "\n".join(lines) + "\n"


def claims_file(verdicts: Sequence[Verdict]) -> str:
    """results/claims.md."""
    head = (
        "# The papers' claims against the records\n\nSupported: the whole interval lies on the claimed side of the "
        "bound; contradicted: on the other; open: neither. The intervals of one budget hold for all its claims at "
        "once, at 95 %. A verdict at a reduced budget says nothing about the papers' full length.\n\n"
    )
    conflicts = "\n".join(f"- {escape_markdown(said)}" for said in paper.conflicts())
    return f"{head}{claims_markdown(verdicts)}\n## Where the sources contradict themselves\n\n{conflicts}\n"


def results_markdown(made: Iterable[Made], verdicts: Sequence[Verdict], cells: Cells) -> str:
    """Return what docs/results.md holds between its markers."""
    parts = ["\n".join(f"- {escape_markdown(said)}" for said in answer(verdicts, cells))]
    parts.append("## The claims\n\n" + claims_markdown(verdicts).partition("\nExplored")[0])
    for one in made:
        if one.main and (one.sheet or one.files):
            names = [name for name in one.files if name.endswith(".png")]
            pictures = "\n".join(f"![{one.card.title}](../results/{name})" for name in names)
            of = f" ({one.group.label.lstrip(', ')})" if one.group else ""
            table = tables.markdown(one.sheet).partition("\n\n")[2] if one.sheet else ""
            caption = escape_markdown(one.sheet.caption) if one.sheet else ""
            parts.append(f"## {escape_markdown(one.card.title)}{of}\n\n{caption}\n\n{table}\n{pictures}")
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(parts)).strip() + "\n"


def readme_markdown(made: Iterable[Made], verdicts: Sequence[Verdict], cells: Cells) -> str:
    """Return what README holds between its markers: the answer and one picture."""
    said = "\n".join(f"- {escape_markdown(one)}" for one in answer(verdicts, cells))
    drawn = [(one.card.title, name) for one in made if one.main and one.card.name == "variants" for name in one.files]
    pictures = [f"![{title}](results/{name})" for title, name in drawn if name.endswith(".png")]
    picture = f"\n\n{pictures[0]}" if pictures else ""
    return f"{said}{picture}\n"


def between(text: str, generated: str) -> str:
    """`text` with what stands between the markers replaced. ValueError: no such markers."""
    start, end = GENERATED
    before, found, rest = text.partition(start)
    if not found or end not in rest:
        raise ValueError(f"no markers {start} ... {end}")
    return f"{before}{start}\n\n{generated.strip()}\n\n{end}{rest.partition(end)[2]}"


def _fullness(budget: str) -> tuple[int, str]:
    """Sorts the fullest budget first."""
    name = budget.split(" ")[0]
    return (BUDGETS.index(name) if name in BUDGETS else len(BUDGETS), budget)


def _column(verdict: Verdict) -> str:
    return f"{verdict.group.dataset}, {verdict.group.budget}" if verdict.group else ""


def _length(cells: Cells, budget: str, datasets: set[str]) -> str:
    """Say how long the runs of a budget on these data sets are, as "12 epochs at 16 px"."""
    runs = cells.runs[(cells.runs.budget == budget) & cells.runs.dataset.isin(datasets)]
    kinds = runs.groupby(["budget.epochs", "budget.size"]).size()
    return " / ".join(f"{epochs} epochs at {size} px" for epochs, size in kinds.index)


def _runs(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Return what the page's table of runs shows, a dict for each run."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs.to_dict("records"):
        config, kind = run["config"], run["statistics"]
        one = found.setdefault(
            str(run["id"]),
            {
                "id": run["id"],
                "data": run["dataset"],
                "network": run["network"] + (f" x{run['width']:g}" if run["width"] != 1 else ""),
                "norm": run["normalizer"],
                "batch": f"{run['grad_batch']}, {run['stat_batch'] or '–'}",
                "budget": run["budget"],
                "schedule": run["schedule"],
                "seed": run["seed"],
                "note": run["note"] if run["state"] in ("used", "failed") else f"{run['note']} ({run['state']})",
                "parameters": _plain(run["parameters"]),
                "minutes": _plain(run.get("host.seconds"), 1 / 60),
                "rate": _plain(run.get("host.images_per_s")),
                "where": ", ".join(filter(None, [str(run.get("host.hardware") or ""), run["arithmetic"]])),
                "made": f"{str(run.get('host.started'))[:10]}, commit {str(run.get('host.git.commit'))[:10]}",
                "command": _command(config),
                "step": _thin(run["step"]),
                "loss": _thin(run["train_loss"], 3),
            },
        )
        one[kind] = _plain(next((run[key] for key in METRICS if not missing(run.get(key))), None))
        one[f"curve_{kind}"] = _thin(run["curve"], 1)
    return [{key: value for key, value in one.items() if value not in (None, "")} for one in found.values()]


def _command(config: Mapping[str, Any]) -> str:
    """Return what runs it again."""
    said = [f"{part}={config[part]['name']}" for part in ("dataset", "arch", "norm", "schedule", "budget")]
    said += [f"batch.{key}={value}" for key, value in config["batch"].items() if value is not None]
    said += [f"arch.width={config['arch']['width']}"] if config["arch"].get("width", 1) != 1 else []
    if preset := config["norm"].get("preset"):
        said.append(f"norm.preset={preset}")
        given = frame.own_options(config["norm"], config["batch"].get("stat_batch"))
        said += [f"norm.options.{key}={json.dumps(value).strip(chr(34))}" for key, value in given.items()]
    return " ".join(["kalmannorm train", *said, f"seed={config['seed']}"])


def _thin(values: Any, digits: int = 0) -> list[float | None] | None:
    """Return a curve with few points and digits."""
    if not isinstance(values, list) or not values:
        return None
    every = max(1, len(values) // POINTS)
    kept = values[every - 1 :: every]
    return [None if missing(v) else round(v, digits) if digits else int(v) for v in kept]


def _plain(value: Any, factor: float = 1) -> float | None:
    return None if missing(value) else round(float(value) * factor, 2)
