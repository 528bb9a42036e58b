"""The caption of a table or figure: everything that its numbers depend on, read from configs and records."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from kalmannorm.report.cells import Column, Selection, Setting
from kalmannorm.report.read import Record

Config = Mapping[str, Any]

KIND_OF_STATISTICS = {
    "moving": "Moving: exponential averages kept in training.",
    "online": "Online: computed from the evaluation batch, in the same groups as in training.",
    "precise": "Precise: population statistics re-estimated on training batches after training.",
}


def what_was_trained(configs: Sequence[Config], runs: Sequence[Record]) -> str:
    """Data, budget, architecture and arithmetic, in sentences; "a / b" where the rows differ."""
    parts = [_data(configs, runs), _budget(configs, runs), _architecture(configs, runs), origins(runs)]
    return " ".join(filter(None, parts))


def estimators(rows: Sequence[Mapping[str, Any]]) -> str:
    """How the KN rows estimate: preset, predictor, gain, belief; "" for a card without KN."""
    said: dict[str, list[str]] = {}
    for row in rows:
        if row["config"]["norm"].get("preset"):
            said.setdefault(estimator(row["config"]["norm"]), []).append(row_label(row))
    sentences = [f"{' and '.join(dict.fromkeys(labels))}: {text}." for text, labels in said.items()]
    if any("initial gain" in text for text in said):
        sentences.append("The initial gain is ours: no source gives one.")
    return " ".join(sentences)


def arithmetic(settings: Sequence[Setting]) -> str:
    """Precision and compilation of the runs: "fp32", "bf16, compiled"; "" without runs."""
    kinds = dict.fromkeys(f"{setting.precision}{', compiled' if setting.compile else ''}" for setting in settings)
    return " / ".join(kinds)


def precision(selections: Sequence[Selection]) -> str:
    """Their arithmetic in a sentence; "" without runs."""
    said = arithmetic([selection.setting for selection in selections if selection.setting])
    return f"Precision: {said}." if said else ""


def measure(columns: Sequence[Column]) -> str:
    """What the columns' values are."""
    if all(column.value == "accuracy" for column in columns):
        return "top-1 accuracy"
    return "COCO's average precision (AP, the mean over IoU 0.5 to 0.95)"


def origins(runs: Sequence[Record]) -> str:
    """Where detectors' weights, and the constants of a frozen normalizer, come from; "" for other runs."""
    said = dict.fromkeys(run["weights"]["origin"] for run in runs if run.get("weights"))
    constants = dict.fromkeys(
        run["weights"]["constants"] for run in runs if (run.get("weights") or {}).get("constants")
    )
    sentences = [f"Weights: {' / '.join(said)}."] if said else []
    return " ".join(sentences + ([f"Constants of frozen BN: {' / '.join(constants)}."] if constants else []))


def seeds(selections: Sequence[Selection]) -> str:
    """The seeds of the runs, where all rows that ran have the same ones."""
    kinds = {tuple(run["config"]["seed"] for run in selection.runs) for selection in selections if selection.runs}
    if not kinds:
        return ""
    if len(kinds) > 1:
        return "The rows have different seeds."
    (common,) = kinds
    return f"{'Seeds' if len(common) > 1 else 'Seed'} {spans(common)}."


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers, three or more in a row as a span: "1, 2, 4 to 9"."""
    said: list[str] = []
    # In a row, numbers grow as their places do.
    for _, together in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        row = [str(number) for _, number in together]
        said += [f"{row[0]} to {row[-1]}"] if len(row) > 2 else row
    return ", ".join(said)


def statistics(columns: Sequence[str]) -> str:
    """What each column's statistics are, in sentences."""
    return " ".join(KIND_OF_STATISTICS[column] for column in columns if column in KIND_OF_STATISTICS)


def short(configs: Sequence[Config]) -> str:
    """In a few words: "digits, inception_cifar, width 1, budget lite (12 epochs, 16x16 pixels), schedule released"."""
    epochs = _joined(distinct(configs, "budget", "epochs"))
    size = _joined(distinct(configs, "budget", "size"))
    images = "".join(f", {subset:,} images" for subset in distinct(configs, "budget", "subset"))
    length = f"{epochs} epoch{'s' if epochs != '1' else ''}{images}, {_pixels(configs, size)}"
    budget = f"budget {_joined(distinct(configs, 'budget', 'name'))} ({length})"
    archs = list(dict.fromkeys(_arch(arch) for arch in distinct(configs, "arch")))
    schedule = f"schedule {_joined(distinct(configs, 'schedule', 'name'))}"
    return ", ".join((_joined(distinct(configs, "dataset", "name")), _joined(archs), budget, schedule))


def batches(config: Config) -> tuple[int, int | None]:
    """(grad_batch, stat_batch) of a config; a normalizer without batch statistics has no stat_batch."""
    return int(config["batch"]["grad_batch"]), config["batch"].get("stat_batch")


def pair(batch: tuple[int, int | None]) -> str:
    """ "(128, 2)"; "(128, –)" without a stat_batch."""
    return f"({batch[0]}, {'–' if batch[1] is None else batch[1]})"


def row_label(row: Mapping[str, Any]) -> str:
    """A row's name; rows beyond the papers carry "(ours)"."""
    return f"{row['label']} (ours)" if row.get("ours") else str(row["label"])


def row_names(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Per key the row's name where it stands alone: its label, with the batches where others have the same label."""
    labels = [f"{row['block']}: {row_label(row)}" if row.get("block") else row_label(row) for row in rows]
    return {
        row["key"]: label if labels.count(label) == 1 else f"{label} {pair(batches(row['config']))}"
        for row, label in zip(rows, labels, strict=True)
    }


def distinct(configs: Sequence[Config], *path: str) -> list[Any]:
    """The different values at a path, in the order of the rows; without those that have none."""
    found: list[Any] = []
    for config in configs:
        node: Any = config
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is not None and node not in found:
            found.append(node)
    return found


def _data(configs: Sequence[Config], runs: Sequence[Record]) -> str:
    said = []
    for name in distinct(configs, "dataset", "name"):
        of_data = [run for run in runs if run["config"]["dataset"]["name"] == name]
        fidelities = dict.fromkeys(fidelity(run) for run in of_data)
        images = sorted({values["images"] for run in of_data for values in run["final"].values() if "images" in values})
        exact = f" ({' / '.join(fidelities)})" if fidelities else ""
        test = f", evaluated on {' / '.join(f'{count:,}' for count in images)} test images" if images else ""
        said.append(f"{name}{exact}{test}")
    return f"Data: {'; '.join(said)}."


def fidelity(run: Record) -> str:
    """How exact the run's data are: "59,839 of 60,000 exact"."""
    return str((run.get("data") or {}).get("fidelity") or "not recorded")


def _budget(configs: Sequence[Config], runs: Sequence[Record]) -> str:
    said = []
    for budget in distinct(configs, "budget"):
        epochs = f"{budget['epochs']} epoch{'s' if budget['epochs'] != 1 else ''}"
        images = _images(budget, runs, "fixed" if _detects(configs) else "class-balanced")
        said.append(f"{budget['name']}: {epochs}, {images}, {_pixels(configs, budget['size'])}")
    return f"Budget {' / '.join(said)}; schedule {_joined(distinct(configs, 'schedule', 'name'))}."


def _detects(configs: Sequence[Config]) -> bool:
    return distinct(configs, "dataset", "task") == ["detection"]


def _pixels(configs: Sequence[Config], size: Any) -> str:
    """The images' resolution; of detectors also what else the budget reduces."""
    if not _detects(configs):
        return f"{size}x{size} pixels"
    longest, boxes, roi = (_joined(distinct(configs, "arch", key)) for key in ("max_size", "boxes", "roi_size"))
    return f"({size}, {longest}) pixels, {boxes} boxes an image, RoIAlign to {roi}x{roi}"


def _images(budget: Config, runs: Sequence[Record], kind: str) -> str:
    of_budget = [run for run in runs if run["config"]["budget"] == budget]
    counts = sorted({(run.get("data") or {}).get("train_images") or 0 for run in of_budget} - {0})
    said = " / ".join(f"{count:,} " for count in counts or [budget.get("subset") or 0] if count)
    return f"{said}training images (a {kind} subset)" if budget.get("subset") else f"all {said}training images"


def _architecture(configs: Sequence[Config], runs: Sequence[Record]) -> str:
    archs = list(dict.fromkeys(_arch(arch) for arch in distinct(configs, "arch")))
    counts = sorted({run["parameters"] for run in runs if run.get("parameters")})
    span = dict.fromkeys((counts[0], counts[-1])) if counts else {}
    parameters = f" ({' to '.join(f'{count:,}' for count in span)} parameters)" if span else ""
    return f"Architecture: {' / '.join(archs)}{parameters}."


def _arch(arch: Config) -> str:
    width = arch.get("width")
    return str(arch["name"]) + (f", width {width:g}" if width is not None else "")


def estimator(norm: Config) -> str:
    """How a KN normalizer estimates, in words."""
    options = norm.get("options") or {}
    predictor = {"closed": "closed form", None: "of the preset"}.get(norm.get("predictor"), norm.get("predictor"))
    if options.get("gain") is None:
        gain = "gain of the preset"
    elif options.get("learn_gain", True):
        gain = f"initial gain {options['gain']:g} (learned)"
    else:
        gain = f"gain {options['gain']:g} (fixed)"
    said = f"preset {norm['preset']}, predictor {predictor}, {gain}, belief={options.get('belief', 'posterior')}"
    # What every run before these were options has goes without saying.
    if options.get("transition", "weight") != "weight":
        said += f", {options['transition']} transition"
    if options.get("noise") == "shared":
        said += ", one R for all layers"
    if options.get("input_belief"):
        said += ", the input's belief measured from the training set"
    return said


def _joined(values: Sequence[Any]) -> str:
    return " / ".join(map(str, values))
