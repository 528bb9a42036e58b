"""What stands below a table: its differences in words, the stale records left out, what has not run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kalmannorm.report.read import Record, Records

if TYPE_CHECKING:
    from kalmannorm.report.table import Contrast, Row

VERDICTS = {
    "exceeds": "larger than its interval",
    "tie": "a tie, the interval contains 0",
    "open": "open, no interval (one seed, or no spread over the seeds)",
}
NAMED = 8  # rows not run that are named one by one
APART = "not compared"  # how the remark of a difference between different data begins


def differences(contrasts: "Sequence[Contrast]") -> list[str]:
    """Per row one line: its differences, and which exceed their intervals, which tie, which the runs leave open."""
    lines: dict[tuple[str, str], list[str]] = {}
    for contrast in contrasts:
        if contrast.difference:
            verdict = f"{describe(contrast)}: {VERDICTS[contrast.difference.verdict]}"
            lines.setdefault((contrast.baseline, contrast.row), []).append(f"{contrast.column} {verdict}")
        elif contrast.remark.startswith(APART):
            lines.setdefault((contrast.baseline, contrast.row), []).append(f"{contrast.column} {contrast.remark}")
    said = []
    for baseline in dict.fromkeys(baseline for baseline, _ in lines):
        said += [
            f"Differences to {baseline} in points, with 95 % Student-t intervals, paired by seed where at "
            "least two seeds are common; not corrected for their number:",
            *(f"- {row}: {'; '.join(found)}." for (of, row), found in lines.items() if of == baseline),
        ]
    return said


def on_training_images(runs: Mapping[str, Sequence[Record]]) -> list[str]:
    """Of detectors that were evaluated on training images too, those of a set learned by heart; runs by row name."""
    lines = []
    for name, of_row in runs.items():
        found = [seen for run in of_row if (seen := run.get("final_on_training_images"))]
        if found:
            values = ", ".join(f"{seen['box_ap']:.2f} / {seen['mask_ap']:.2f}" for seen in found)
            lines.append(f"- {name}: {values} ({found[0]['images']} images).")
    return ["Box / mask AP on training images, moving statistics, for each seed:", *lines] if lines else []


def stale(configs: Sequence[Mapping[str, Any]], records: Records) -> list[str]:
    """The records of the rows that were made under another NUMERICS."""
    runs = {run["id"]: run for config in configs for run in records.stale_of(config)}
    found = [f"{identity} (NUMERICS {run['numerics']})" for identity, run in runs.items()]
    if not found:
        return []
    return [
        f"{len(found)} stale record{'s' if len(found) > 1 else ''} of these rows left out, made before results changed "
        f"to NUMERICS {records.numerics}: {', '.join(found)}."
    ]


def not_run(rows: "Sequence[Row]", command: str) -> list[str]:
    """The rows, or their columns, without a run, and the command that runs them."""
    missing = []
    for row in rows:
        columns = [cell.column for cell in row.filled if cell.state == "not run"]
        if columns:
            missing.append(row.name if len(columns) == len(row.filled) else f"{row.name} ({', '.join(columns)})")
    more = f"; and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    said = f"Not run: {'; '.join(missing[:NAMED])}{more}. To run what is missing:"
    return [said, command] if missing else []


def describe(contrast: "Contrast") -> str:
    """ "+1.20 ± 0.40 (3 pairs)", without the names."""
    if contrast.difference is None:
        return contrast.remark
    found = contrast.difference
    half_width = "" if found.half_width is None else f" ± {found.half_width:.2f}"
    count = f"{found.n} pair{'s' if found.n > 1 else ''}" if found.paired else f"unpaired, n = {found.n} or more"
    return f"{signed(found.mean)}{half_width} ({count}{contrast.remark and f', {contrast.remark}'})"


def signed(value: float) -> str:
    """A difference in points, with its sign (a true minus, as in print)."""
    return f"{value:+.2f}".replace("-", "−")
