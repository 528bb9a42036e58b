"""SIGTERM and SIGUSR1 in every phase of a command: one behaviour."""

import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import coco_files
import pytest
import scene_files
import video_files
from helpers import quick
from trainings import small_digits

from kalmannorm import stopping
from kalmannorm.cli import main
from kalmannorm.errors import Stopped
from kalmannorm.experiments import config, record
from kalmannorm.runs import lock
from kalmannorm.train import checkpoint, evaluate, loop, state, task_classification
from kalmannorm.train.task import Task
from kalmannorm.train.task_detection import Detection
from kalmannorm.train.task_segmentation import Segmentation

SMALL = ["dataset=digits", "budget=smoke", "arch.width=0.125", "device=cpu", "batch=g32_s4", "budget.epochs=2"]
SMALL += ["precision=fp32", "budget.subset=128"]
NUMBERS = [signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize("number", NUMBERS)
def test_at_once_or_after_what_is_under_way(number: int) -> None:
    done = []
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, stopping.listening():
        with stopping.finishing():
            with stopping.finishing():
                signal.raise_signal(number)
                done.append("step")
            done.append("file")
            assert stopping.asked() == number
        done.append("never")
    assert done == ["step", "file"] and stopped.value.exit_code == 128 + number
    with pytest.raises(Stopped), stopping.listening():
        assert stopping.asked() is None  # the one before is over
        try:
            signal.raise_signal(number)
        except Exception:  # as a library may do around whatever it calls
            pytest.fail("taken for an error")
    assert signal.getsignal(number) is before


def test_an_error_in_what_is_finished_is_not_hidden() -> None:
    with pytest.raises(ValueError, match="own"), stopping.listening(), stopping.finishing():
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("own")


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with stopping.listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


# A function that a phase calls: on its way in, or out, of the n-th call the process gets the signal.
PHASES = {
    "composing": (config, "_resolve", 1, "in"),
    "locking": (lock, "hold", 1, "in"),
    "building": (task_classification, "build", 1, "out"),
    "loading": (task_classification, "open_data", 1, "out"),
    "going on": (state.Session, "restore", 1, "out"),
    "the first step": (loop, "_forward_backward", 1, "in"),
    "a step": (loop, "_forward_backward", 7, "out"),
    "saving": (checkpoint, "write_atomically", 1, "in"),
    "evaluating": (task_classification, "evaluate", 2, "out"),
    "the end of an epoch": (state.Session, "begin_epoch", 2, "out"),
    "precise statistics": (evaluate, "precise_statistics", 1, "in"),
    "gaps": (task_classification, "variance_gaps", 1, "in"),
    "writing": (record, "write_atomically", 1, "out"),
}
WRITTEN = ("writing",)  # phases that the record is not lost by


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with small_digits():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    assert main(["train", *SMALL, f"results={folder}", f"runs={folder}"]) == 0
    return result(folder)


def result(folder: Path) -> dict[str, Any]:
    (file,) = (folder / "records").glob("*.json")
    return {key: value for key, value in json.loads(file.read_text()).items() if key != "host"}


@pytest.mark.parametrize("phase", quick(PHASES, "a step", "evaluating", "writing"))
def test_every_phase_saves_says_so_and_asks_for_another_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    whole: dict[str, Any],
    phase: str,
) -> None:
    place, name, at, side = PHASES[phase]
    plain, calls = getattr(place, name), itertools.count(1)
    number = NUMBERS[len(phase) % 2]

    def called(*arguments: Any, **options: Any) -> Any:
        now = next(calls) == at
        if now and side == "in":
            signal.raise_signal(number)
        found = plain(*arguments, **options)
        if now and side == "out":
            signal.raise_signal(number)
        return found

    arguments = ["train", *SMALL, f"results={tmp_path}", f"runs={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, called)
        assert main(arguments) == 128 + number
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if "epoch" not in line]
    assert lines == [f"kalmannorm: stopped by {signal.Signals(number).name}; the same command goes on"]
    assert not list(tmp_path.glob("*/.*")), "something half-written"
    steps = 2 * 4  # of the run
    if phase in ("the first step", "a step", "saving"):  # what was under way came to its end
        saved = checkpoint.load(tmp_path / whole["id"], whole["id"])
        assert saved is not None
        done = saved["epoch"] * steps // 2 + saved["step"]
        assert done == {"the first step": 1, "a step": 7, "saving": 2}[phase]
    assert bool(list(tmp_path.glob("records/*.json"))) == (phase in WRITTEN)
    assert main(arguments) == 0
    assert result(tmp_path) == whole


OTHERS: dict[str, tuple[Callable[[Path], Path], list[str], type[Task]]] = {
    "detection": (coco_files.write, coco_files.TINY, Detection),
    "segmentation": (scene_files.camvid, scene_files.TINY, Segmentation),
    "video": (video_files.write, video_files.SMALL, task_classification.Classification),
}


@pytest.mark.parametrize("kind", quick(OTHERS, "segmentation"))
def test_other_tasks_end_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    """In a step, then in an evaluation; the third start comes to an end, and a later evaluation is stopped as well."""
    write, overrides, task = OTHERS[kind]
    write(tmp_path)
    place = [f"data={tmp_path}", f"results={tmp_path}", f"runs={tmp_path / 'u'}"]

    def stopped(arguments: list[str], where: Any, name: str, number: int) -> None:
        plain = getattr(where, name)

        def called(*arguments: Any, **options: Any) -> Any:
            signal.raise_signal(number)
            return plain(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, called)
            assert main([*arguments, *place]) == 128 + number
        said = capfd.readouterr().err.splitlines()[-1]
        assert said == f"kalmannorm: stopped by {signal.Signals(number).name}; the same command goes on"

    stopped(["train", *overrides], loop, "_forward_backward", signal.SIGTERM)
    (folder,) = (tmp_path / "u").iterdir()
    saved = checkpoint.load(folder, folder.name)
    assert saved is not None and saved["epoch"] + saved["step"] == 1
    stopped(["train", *overrides], task, "evaluate", signal.SIGUSR1)
    assert not list(tmp_path.glob("records/*"))
    assert main(["train", *overrides, *place]) == 0
    stopped(["evaluate", folder.name], task, "evaluate_all", signal.SIGTERM)


@pytest.mark.parametrize("arguments", [["sweep", "table7", *SMALL[:4]], ["report"], ["records", "list"]])
def test_other_commands_end_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    (tmp_path / "records").mkdir()
    plain = record.files

    def files(results: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return plain(results)

    monkeypatch.setattr(record, "files", files)
    assert main([*arguments, f"results={tmp_path}"]) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
