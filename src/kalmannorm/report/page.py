"""results/report.html: verdicts, tables and figures, and the records that each number rests on, in one file.

Works without network; the pictures of detectors alone lie beside it, in runs/. Numbers link to their group of runs:
configuration, curves, and a line for each run with its environment. Everything that comes from records is escaped by
the template engine.
"""

import base64
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmannorm.experiments.record import reached
from kalmannorm.report import caption, claims, remarks, render, table, variants
from kalmannorm.report.cells import Cell
from kalmannorm.report.collection import Entry, Made
from kalmannorm.report.read import Record, Records, row_key
from kalmannorm.report.table import Row, Table
from kalmannorm.report.verdicts import Verdict

if TYPE_CHECKING:
    from markupsafe import Markup

DRAWN = 5  # seeds of a group whose curves are drawn
POINTS = 40  # of a curve
IMAGE_WIDTH = 1000  # pixels
NAMED = 24  # records that a verdict in claims.md names
STATES = ("supported", "contradicted", "undecided", "not run")


def render_page(records: Records, entries: Sequence[Entry], verdicts: Sequence[Verdict]) -> str:
    """The page as text."""
    import jinja2

    loader = jinja2.PackageLoader("kalmannorm.report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    groups = _groups(records, _used(records, entries, verdicts))
    group_of = {run["id"]: group["anchor"] for group in groups for run in group["runs"]}
    judged = [verdict for verdict in verdicts if verdict.state != "not run"]
    view = {
        "verdicts": [(claim, list(same)) for claim, same in itertools.groupby(judged, key=lambda v: v.claim)],
        "unjudged": [verdict for verdict in verdicts if verdict.state == "not run"],
        "counts": {state: sum(verdict.state == state for verdict in verdicts) for state in STATES},
        "conflicts": claims.conflicts(),
        "entries": entries,
        "groups": groups,
        "environments": _environments(records),
        "records": records,
        "done": sum(run["status"] == "done" for run in records.current),
        "failed": [run for run in records.current if run["status"] == "failed"],
    }
    helpers = {
        "group_of": group_of.get,
        "images": lambda made: [
            (name, _image(content)) for name, content in made.files.items() if name.endswith(".png")
        ],
        "drawn": lambda entry, made: {
            group_of[runs[0]["id"]]: f"{_name(runs[0]['config'])} {runs[0]['config']['arch']['name']}"
            for runs in _drawn(entry, made, records)
        },
        "detections": lambda run: _detections(records.folder, run),
        "value": render.value,
        "paper": render.paper_value,
        "pair": caption.pair,
        "difference": _difference,
        "printed": _printed,
        "mark": table.mark,
    }
    return environment.get_template("report.html.j2").render(**view, **helpers)


def _drawn(entry: Entry, made: Made, records: Records) -> list[list[Record]]:
    """The runs of each row of a picture: its points and lines are no links."""
    if made.table or made.variant is None or entry.card is None:
        return []
    configs = table.configs_of(variants.apply(entry.card, made.variant))
    return [runs for config in configs if (runs := records.of(config))]


def _used(records: Records, entries: Sequence[Entry], verdicts: Sequence[Verdict]) -> set[str]:
    """The ids of all records that a number or a picture on the page rests on."""
    cells = (
        cell for entry in entries for made in entry.made if made.table for row in made.table.rows for cell in row.filled
    )
    drawn = (runs for entry in entries for made in entry.made for runs in _drawn(entry, made, records))
    return (
        {i for cell in cells for i in cell.ids}
        | {i for verdict in verdicts for i in verdict.ids}
        | {run["id"] for runs in drawn for run in runs}
    )


def _groups(records: Records, used: set[str]) -> list[dict[str, Any]]:
    """The runs of one row each, those that numbers rest on first; curves for these alone."""
    by_row: dict[str, list[Record]] = {}
    for run in records.current:
        by_row.setdefault(row_key(run["config"]), []).append(run)
    groups = []
    for key, runs in by_row.items():
        runs.sort(key=lambda run: (run["config"]["seed"], run["id"]))
        in_use = any(run["id"] in used for run in runs)
        config = runs[0]["config"]
        groups.append(
            {
                "anchor": _anchor("g", key),
                "name": _name(config),
                "setting": caption.short([config]),
                "used": in_use,
                "config": _config_lines(config),
                "curve": _curve(runs) if in_use else None,
                "runs": [_line(run) for run in runs],
                "n": len(runs),
            }
        )
    return sorted(groups, key=lambda group: (not group["used"], group["setting"], group["name"], group["anchor"]))


def _line(run: Record) -> dict[str, Any]:
    """What the page says of one run. A failed record has few of its keys."""
    config, final, host, data = run["config"], run.get("final") or {}, run.get("host") or {}, run.get("data") or {}
    kinds = [reached(final[kind]) if kind in final else "–" for kind in ("moving", "online", "precise")]
    return {
        "id": run["id"],
        "seed": config["seed"],
        "failed": str(run.get("reason") or "no reason recorded") if run["status"] == "failed" else "",
        "numbers": [*kinds, host.get("images_per_s") or "–"],
        "fidelity": data.get("fidelity") or "–",
        "arithmetic": f"{config.get('precision')}{', compiled' if config.get('compile') else ''}",
        "environment": _anchor("e", _environment(run)),
    }


def _name(config: Mapping[str, Any]) -> str:
    norm, options = config["norm"], config["norm"].get("options") or {}
    shown = [f"{key}={options[key]}" for key in ("gain", "belief") if options.get(key) is not None]
    preset = [f"preset {norm['preset']}"] if norm.get("preset") else []
    return " ".join([norm["name"], caption.pair(caption.batches(config)), ", ".join([*preset, *shown])]).strip()


def _config_lines(config: Mapping[str, Any]) -> str:
    """A config but for its seed, one part a line."""
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in sorted(config.items()) if key != "seed")


def _environment(run: Record) -> str:
    host = run.get("host") or {}
    versions = ", ".join(f"{name} {version}" for name, version in sorted((host.get("versions") or {}).items()))
    git = host.get("git") or {}
    commit = f"commit {str(git.get('commit'))[:10]}{' with changes' if git.get('dirty') else ''}" if git else ""
    threads = f"{host['threads']} threads" if host.get("threads") else ""
    parts = (
        str(host.get("hardware") or "hardware not recorded"),
        str(host.get("device") or ""),
        threads,
        versions,
        commit,
    )
    return "; ".join(part for part in parts if part)


def _environments(records: Records) -> dict[str, str]:
    texts = dict.fromkeys(_environment(run) for run in records.current)
    return {_anchor("e", text): text for text in sorted(texts)}


def _curve(runs: Sequence[Record]) -> "Markup | None":
    """Accuracy against steps as inline SVG: moving solid, online dashed, of the first seeds."""
    from markupsafe import Markup

    lines: list[tuple[str, list[float], list[float]]] = []
    done = [run for run in runs if run["status"] == "done"][:DRAWN]
    for run in done:
        curves = run.get("curves") or {}
        for kind in ("online", "moving"):
            values = curves.get(kind) or []
            steps = curves.get("step") or list(range(1, len(values) + 1))
            points = [(float(x), float(y)) for x, y in zip(steps, values, strict=False) if isinstance(y, int | float)]
            thinned = points[:: max(1, len(points) // POINTS)] + points[-1:]
            if len(points) > 1:
                lines.append((kind, [x for x, _ in thinned], [y for _, y in thinned]))
    if not lines:
        return None
    right = max(max(xs) for _, xs, _ in lines)
    low, high = (f(f(ys) for _, _, ys in lines) for f in (min, max))
    span = (high - low) or 1.0
    drawn = "".join(
        f'<polyline class="{kind}" points="'
        + " ".join(f"{30 + 250 * x / right:.0f},{92 - 84 * (y - low) / span:.0f}" for x, y in zip(xs, ys, strict=True))
        + '"/>'
        for kind, xs, ys in lines
    )
    return Markup(  # numbers alone: nothing of a record's text is in it
        f'<svg class="curve" viewBox="0 0 290 108" role="img" aria-label="accuracy against steps">'
        f'<path d="M30 4V92H282"/><text x="27" y="10" text-anchor="end">{high:.0f}</text>'
        f'<text x="27" y="92" text-anchor="end">{low:.0f}</text>'
        f'<text x="282" y="105" text-anchor="end">{right:,.0f} steps</text>{drawn}</svg>'
    )


def _difference(found: Table, row: Row, cell: Cell) -> str:
    """The difference to the baseline under a cell; "" where there is none."""
    contrast = found.contrast(row, cell.column)
    if contrast is None or contrast.difference is None:
        return ""
    half_width = contrast.difference.half_width
    return remarks.signed(contrast.difference.mean) + ("" if half_width is None else f" ± {half_width:.2f}")


def _image(content: bytes) -> str:
    """A picture as a data URI, with few colours and no wider than the page: a tenth of the file's size."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as picture:
        flat = picture.convert("RGB")
    if flat.width > IMAGE_WIDTH:
        flat = flat.resize((IMAGE_WIDTH, round(flat.height * IMAGE_WIDTH / flat.width)), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    flat.quantize(64).save(out, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _detections(results: Path, run: str) -> list[tuple[str, str]]:
    """Of what images a detector's pictures are, and where they lie, seen from the page: links, since images of COCO
    must not be in a file that is committed. None where the run was trained elsewhere."""
    found = []
    for split, name in (("validation", "detections.png"), ("training", "detections-training.png")):
        picture = Path("runs") / run / name
        if (results.absolute().parent / picture).exists():
            found.append((split, picture.as_posix()))
    return found


def _some(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return ", ".join(ids[:NAMED]) + more


@functools.cache
def _anchor(kind: str, text: str) -> str:
    return kind + hashlib.sha256(text.encode()).hexdigest()[:10]


def _printed(verdict: Verdict) -> str:
    """The paper's value of a claim on the verdict's data, as printed: "+1.5"; "" where there is none."""
    printed = verdict.claim.printed(verdict.dataset)
    return "" if printed is None else f"{printed:+g}".replace("-", "−")


def write_claims(verdicts: Iterable[Verdict]) -> str:
    """results/claims.md: the verdicts as a table, with what each rests on below."""
    lines = [
        "# The papers' claims against the records",
        "",
        "One verdict for each claim, data set and budget that has runs. p-values are corrected by Holm's method over",
        "all claims tested at one budget, of whatever schedule and width. A verdict at a reduced budget says nothing",
        "about the papers' full length. How many seeds would decide is estimated from the observed spread, which two",
        "or three seeds know badly.",
        "",
        "| verdict | claim | setting | difference | paper |",
        "| :-- | :-- | :-- | :-- | :-: |",
    ]
    escape = render.escape_markdown
    details = []
    for verdict in verdicts:
        claim = verdict.claim
        setting = " ".join(filter(None, (verdict.dataset, f"**{escape(verdict.reduced)}**" if verdict.reduced else "")))
        shown = _printed(verdict) or "–"
        said = "; ".join(filter(None, (verdict.estimate, verdict.test, verdict.why)))
        places = (verdict.state, escape(f"{claim.text} ({claim.where})"), setting or "–", escape(said), shown)
        lines.append(f"| {' | '.join(places)} |")
        if verdict.state != "not run":
            records = [f"records {_some(verdict.ids)}"] if verdict.ids else []
            about = [*verdict.rests_on, *verdict.notes, *records]
            details.append(f"- **{escape(claim.id)}**, {setting}: {escape('; '.join(about))}.")
    conflicts = [f"- {escape(conflict)}" for conflict in claims.conflicts()]
    lines += ["", "## What the verdicts rest on", "", *(details or ["Nothing is run."])]
    return "\n".join([*lines, "", "## Where the sources contradict themselves", "", *conflicts, ""])
