"""Write what is made from all cards together: results/report.html, claims.md, parts of README and docs/results.md.

The page is one file that works without network access, with the answer, the claims, the runs, tables and pictures.
Every number is a link that opens its runs (#runs=ID,ID). The template engine escapes text from records.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from kalmannorm.experiments.card import Card
from kalmannorm.experiments.record import METRICS
from kalmannorm.report import frame, paper, plots, style
from kalmannorm.report import sheet as sheets
from kalmannorm.report.cells import Cells, Group
from kalmannorm.report.claims import Claim, Verdict
from kalmannorm.report.plots import Entry, Point
from kalmannorm.report.quantities import missing
from kalmannorm.report.sheet import Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {"supported": "✓", "contradicted": "✗", "open": "?"}
BUDGETS = ("paper", "short", "lite")  # the longest first
POINTS = 40  # about so many points of a curve are kept
HALF = 45  # most characters of a row, without its label, that fit on half of the page's width
ROOM = 840_000  # characters of runs and pictures: with claims and tables, the page is under 1 MB
# Answers to the page's first questions, by a verdict's state; our own claims get an interval, but no verdict.
ANSWERS = {"supported": "yes", "contradicted": "no", "open": "not decided", "explored": "explored"}
FOREST = 25.0  # most points to either side of 0 that the claims' picture shows
NAMES = {norm: norm.upper() for norm in ("bn", "kn", "gn", "gkn", "brn", "sn", "wn", "ln")}  # words of claims' ids
GENERATED = ("<!-- results -->", "<!-- end -->")  # the part of a document that `make report` writes


@dataclass
class Made:
    """What was made for a card in one group: its sheet, its pictures by the suffix of their file names, all file
    names."""

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
        """Whether the table takes more than half of the page's width."""
        return self.sheet is not None and self.sheet.width > HALF

    @property
    def main(self) -> bool:
        """Whether the group is in the papers' setting, at whatever budget."""
        return self.group is None or self.group.main


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
    of_card: dict[str, list[Made]] = {}
    runs = json.dumps(_runs(cells.runs), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    left = ROOM - len(runs) - len(forest)
    for one in made:  # pictures are embedded for each card's first group while there is room; others are linked
        size = sum(map(len, one.pictures.values()))
        first = one.card.name not in of_card and size <= left
        left -= size if first else 0
        of_card.setdefault(one.card.name, []).append(one if first else replace(one, pictures={}))
    return write(
        "report.html.j2",
        counts=counts(verdicts, cells),
        answers=answers(verdicts),
        words=ANSWERS,
        forest=forest,
        matrix=matrix(verdicts),
        explored=[v for v in verdicts if v.explored and v.group and v.group.width == 1],
        absent_claims=[v for v in verdicts if v.state == "not run"],
        states=cells.runs.drop_duplicates("id").state.value_counts().to_dict(),
        cards=of_card,
        absent=absent,
        elsewhere=elsewhere,
        conflicts=paper.conflicts(),
        runs=runs,
        marks=MARKS,
    )


def write(template: str, **view: Any) -> str:
    """Return a template filled in with the values of `view`."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.PackageLoader("kalmannorm.report"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    found.filters |= {"md": sheets.escape_markdown, "pipes": sheets.markdown, "table": sheets.page_html}
    found.filters["letter"] = sheets.letter
    return found.get_template(template).render(**view)


def answers(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """Return by question the verdicts that answer it, at the longest budget that any of them has. If some are on the
    data sets that their claim is about, only those are returned."""
    found = {}
    answering = [v for v in verdicts if v.claim.answer and v.group and v.effect and (v.judged or _ours(v))]
    for question in dict.fromkeys(v.claim.answer for v in sorted(answering, key=lambda v: not v.judged)):
        of = [v for v in answering if v.claim.answer == question]
        fullest = min((v.budget for v in of), key=_fullness)
        of = [v for v in of if v.budget == fullest]
        named = [v for v in of if v.group and v.group.dataset in v.claim.of]
        found[question] = sorted(named or of, key=lambda v: not v.judged)
    return found


def counts(verdicts: Sequence[Verdict], cells: Cells) -> list[str]:
    """Return a sentence for each budget that says how many of the papers' claims hold there."""
    judged = [v for v in verdicts if v.judged and v.group and v.effect]
    said = [] if judged else ["No claim of the papers has been tested in their setting yet."]
    for budget in sorted({v.budget for v in judged}, key=_fullness):
        of = [v for v in judged if v.budget == budget]
        states = Counter(v.state for v in of)
        datasets = sorted({v.group.dataset for v in of if v.group})
        reduced = "" if budget == "paper" else f", a reduction ({_length(cells, budget, datasets)})"
        said.append(
            f"On {', '.join(datasets)} at budget {budget}{reduced}, {len(of)} tests of the papers' claims: "
            f"{states['supported']} supported, {states['contradicted']} contradicted, {states['open']} open."
        )
    return said


def answer(verdicts: Sequence[Verdict], cells: Cells) -> list[str]:
    """Return the answer in sentences: one for each question, then those of `counts`.

    Data set and budget stand only where they are not those of most answers, which `counts` names.
    """
    found = answers(verdicts)
    places = Counter(v.place for of in found.values() for v in of)
    usual = max(places, key=places.__getitem__, default="")
    said = []
    for question, of in found.items():
        words = "; ".join(_in_words(v, "" if v.place == usual else v.place) for v in of)
        said.append(f"{question} {words[0].upper()}{words[1:]}." if question.endswith("?") else f"{question}: {words}.")
    return [*said, *counts(verdicts, cells)]


def _ours(verdict: Verdict) -> bool:
    """Say whether a verdict is on a claim of ours, on networks of full width, and has an interval, which an answer
    needs."""
    at_full_width = verdict.group is not None and verdict.group.width == 1
    return verdict.explored and verdict.claim.ours and at_full_width and math.isfinite(verdict.low)


def _in_words(verdict: Verdict, place: str) -> str:
    """Say a verdict in words: "not decided on ResNet-32, −0.38 [−1.74, +0.98] points (n = 3), the paper has +1.5"."""
    network = f"on {verdict.claim.network}"
    said = [f"{network} {verdict.estimate}"]
    if verdict.judged:
        said = [f"{ANSWERS[verdict.state]} {network}", verdict.estimate]
        value = verdict.claim.printed(verdict.group.dataset) if verdict.group else None
        if value is not None and verdict.printed:
            outside = value < verdict.low or value > verdict.high
            said += [f"the paper has {verdict.printed}", *["outside the interval"] * outside]
    return ", ".join(said) + (f" ({place})" if place else "")


def matrix(verdicts: Sequence[Verdict]) -> tuple[list[str], list[tuple[Claim, list[list[Verdict]]]]]:
    """Return the tested claims against data sets and budgets: the columns, and each claim with its verdicts by column.

    Claims about counts and times have no columns: their verdicts are one list.
    """
    judged = [v for v in verdicts if v.judged]
    columns = sorted({v.place for v in judged if v.place}, key=lambda c: (_fullness(c.rpartition(", ")[2]), c))
    of_claims = {claim: [v for v in judged if v.claim is claim] for claim in dict.fromkeys(v.claim for v in judged)}
    return columns, [
        (claim, [[v for v in of if v.place == column] for column in columns] if of[0].place else [of])
        for claim, of in of_claims.items()
    ]


def forest(verdicts: Sequence[Verdict]) -> "Figure | None":
    """Draw the measured effects in points with the intervals that decide, beside the paper's values."""
    colours = {"supported": style.GREEN, "contradicted": style.ORANGE, "open": style.GREY}
    paper_point = Point(0, "#000000", "D", filled=False)
    shown = [v for v in verdicts if v.judged and v.claim.unit == "points" and math.isfinite(v.low)]
    entries: list[Entry] = []
    for v in sorted(shown, key=lambda v: _fullness(v.budget)):
        value = v.claim.printed(v.group.dataset if v.group else "")
        points = [Point(v.measured, colours[v.state], "o", v.low, v.high)]
        points += [paper_point._replace(value=value)] if value is not None else []
        entries += [] if Entry(v.place) in entries else [Entry(v.place)]
        entries.append(Entry(" ".join(NAMES.get(word, word) for word in v.claim.id.split("_")), points))
    if not entries:
        return None
    legend = {name: Point(0, colour, "o") for name, colour in colours.items()} | {"paper": paper_point}
    # A very long interval must not shrink the others to points: the axis reaches twice as far as any value, and at
    # least as far as the shortest interval.
    least = min(FOREST, *(max(abs(v.low), abs(v.high)) for v in shown))
    around = min(FOREST, 1.1 * max(1.0, least, *(2 * abs(point.value) for entry in entries for point in entry.points)))
    said = "Points of the first side over the second. Intervals hold for all claims of a budget at once (95 %)"
    said += "; arrows: they go on beyond the picture." if any(max(-v.low, v.high) > around for v in shown) else "."
    return plots.forest(entries, said, ["points"], legend, around)


def claims_file(verdicts: Sequence[Verdict]) -> str:
    """Return results/claims.md: the tested claims as a table, then what was explored, then what was not run."""
    return write("claims.md.j2", verdicts=verdicts, conflicts=paper.conflicts())


def results_markdown(made: Iterable[Made], verdicts: Sequence[Verdict], cells: Cells) -> str:
    """Return the generated part of docs/results.md, between its markers."""
    text = write("results.md.j2", answer=answer(verdicts, cells), verdicts=verdicts, made=made)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def readme_markdown(made: Iterable[Made], verdicts: Sequence[Verdict], cells: Cells) -> str:
    """Return the generated part of README, between its markers: the answer and one picture."""
    drawn = [
        f"![{one.card.title}](results/{name})"
        for one in made
        if one.main and one.card.name == "variants"
        for name in one.files
        if name.endswith(".png")
    ]
    return "\n".join([*(f"- {sheets.escape_markdown(said)}" for said in answer(verdicts, cells)), "", *drawn[:1]])


def between(text: str, generated: str) -> str:
    """Replace the part of `text` between the markers by `generated`. ValueError: no such markers."""
    start, end = GENERATED
    before, found, rest = text.partition(start)
    if not found or end not in rest:
        raise ValueError(f"no markers {start} ... {end}")
    return f"{before}{start}\n\n{generated.strip()}\n\n{end}{rest.partition(end)[2]}"


def _fullness(budget: str) -> tuple[int, str]:
    """Return a sort key that puts the longest budget first."""
    name = budget.split(" ")[0]
    return (BUDGETS.index(name) if name in BUDGETS else len(BUDGETS), budget)


def _length(cells: Cells, budget: str, datasets: Sequence[str]) -> str:
    """Say how long the runs of a budget on these data sets are, as "12 epochs at 16 px"."""
    runs = cells.runs[(cells.runs.budget == budget) & cells.runs.dataset.isin(datasets)]
    kinds = runs.groupby(["budget.epochs", "budget.size"]).size()
    return " / ".join(f"{epochs} epochs at {size} px" for epochs, size in kinds.index)


def _runs(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the data of the page's table of runs, a dict for each run."""
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
                "parameters": _rounded(run["parameters"]),
                "minutes": _rounded(run.get("host.seconds"), 1 / 60),
                "rate": _rounded(run.get("host.images_per_s")),
                "where": ", ".join(filter(None, [str(run.get("host.hardware") or ""), run["arithmetic"]])),
                "made": f"{str(run.get('host.started'))[:10]}, commit {str(run.get('host.git.commit'))[:10]}",
                "command": _command(config),
                "step": _thin(run["step"]),
                "loss": _thin(run["train_loss"], 3),
            },
        )
        one[kind] = _rounded(next((run[key] for key in METRICS if not missing(run.get(key))), None))
        one[f"curve_{kind}"] = _thin(run["curve"], 1)
    return [{key: value for key, value in one.items() if value not in (None, "")} for one in found.values()]


def _command(config: Mapping[str, Any]) -> str:
    """Return the command that runs a configuration again."""
    said = [f"{part}={config[part]['name']}" for part in ("dataset", "arch", "norm", "schedule", "budget")]
    said += [f"batch.{key}={value}" for key, value in config["batch"].items() if value is not None]
    said += [f"arch.width={config['arch']['width']}"] if config["arch"].get("width", 1) != 1 else []
    if preset := config["norm"].get("preset"):
        said.append(f"norm.preset={preset}")
    known = frame.norm_defaults(config["norm"]["name"]).get("options") or {}
    for key, value in frame.own_options(config["norm"], config["batch"].get("stat_batch")).items():
        said.append(f"{'' if key in known else '++'}norm.options.{key}={json.dumps(value).strip(chr(34))}")
    return " ".join(["kalmannorm train", *said, f"seed={config['seed']}"])


def _thin(values: Any, digits: int = 0) -> list[float | None] | None:
    """Return a curve with about POINTS points, rounded to `digits`; None if there is none."""
    if not isinstance(values, list) or not values:
        return None
    every = max(1, len(values) // POINTS)
    kept = values[every - 1 :: every]
    return [None if missing(v) else round(v, digits) if digits else int(v) for v in kept]


def _rounded(value: Any, factor: float = 1) -> float | None:
    return None if missing(value) else round(float(value) * factor, 2)
