"""TensorBoard's event files: every point once, whatever killed the run."""

from pathlib import Path

import pytest

from kalmannorm.train import events

CURVES = {"epoch": [1, 2], "step": [8, 16], "train_loss": [2.0, 1.5], "moving": [10.0, None]}


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / events.FOLDER), purge_orphaned_data=False)
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_points_are_those_of_the_curves(tmp_path: Path) -> None:
    events.write(tmp_path, CURVES, [5.0, 6.0])
    assert points(tmp_path) == {"train_loss": [(8, 2.0), (16, 1.5)], "moving": [(8, 10.0)]}
    events.write(tmp_path, CURVES, [7.0, 8.0])  # once more, as after a kill
    assert points(tmp_path)["train_loss"] == [(8, 2.0), (16, 1.5)]


def test_the_file_only_grows() -> None:
    """TensorBoard remembers how far it has read."""
    first = {key: values[:1] for key, values in CURVES.items()}
    assert events.encode(CURVES, [5.0, 6.0]).startswith(events.encode(first, [5.0]))
    assert len(events.encode(CURVES, [7.0, 8.0])) == len(events.encode(CURVES, [5.0, 6.0]))


def test_points_of_other_writers_go(tmp_path: Path) -> None:
    other = tmp_path / events.FOLDER / "events.out.tfevents.1234.host.56"
    other.parent.mkdir()
    other.write_bytes(b"")
    events.write(tmp_path, CURVES, [5.0, 6.0])
    events.clear(tmp_path)
    assert not other.exists() and (tmp_path / events.FOLDER / events.NAME).exists()


@pytest.mark.parametrize("values", [[], [float("nan")], [float("inf")]])
def test_curves_without_points_and_without_numbers(tmp_path: Path, values: list[float]) -> None:
    steps = list(range(len(values)))
    events.write(tmp_path, {"epoch": steps, "step": steps, "loss": values}, [1.0] * len(values))
    assert len(points(tmp_path).get("loss", [])) == len(values)
