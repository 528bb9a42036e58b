"""Machines and launches as people have them: left-over variables, allotments of GPUs, file systems without locks."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from kalmannorm import data, machine
from kalmannorm.cli import main
from kalmannorm.errors import UserError
from kalmannorm.machine import Launch, allotted_gpus, launch, visible_gpus
from kalmannorm.runs import lock
from kalmannorm.runs.placement import split
from kalmannorm.runs.pool import Local

DIGITS = ["dataset=digits", "budget=smoke", "arch.width=0.125", "device=cpu", "batch=g32_s4"]
TORCHRUN = {
    "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def place(folder: Path) -> list[str]:
    return [f"results={folder / 'r'}", f"runs={folder / 'u'}"]


# Variables of a launcher ----------------------------------------------------------------------------------------------


def test_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch() == Launch(0, 1, 0, 1)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert launch() == Launch(3, 4, 1, 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # other launchers do not know it
    assert launch().local_world == 4


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1", "RANK": "0"}, {"RANK": ""}, {"RANK": "0"},
        {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, {"LOCAL_RANK": "0"},
    ],
)  # fmt: skip
def test_what_means_one_process_is_one(monkeypatch: pytest.MonkeyPatch, left: dict[str, str]) -> None:
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert launch() == Launch()


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "without LOCAL_RANK, MASTER_ADDR"),
        ({"RANK": "1"}, "RANK=1 in the environment without WORLD_SIZE"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1 in the environment without"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "without MASTER_ADDR"),
        ({**TORCHRUN, "RANK": "4"}, "expected RANK from 0 to 3"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: expected a number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2"),
        ({"LOCAL_WORLD_SIZE": "many"}, "LOCAL_WORLD_SIZE=many"),
    ],
)
@pytest.mark.parametrize("command", [["train"], ["train", "-m", "seed=1,2"], ["sweep", "table7"]])
def test_left_over_variables_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    left: dict[str, str],
    words: str,
    command: list[str],
) -> None:
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    overrides = [override for override in DIGITS if command[0] == "train" or not override.startswith("batch")]
    assert main([*command, *overrides, *place(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert words in said and "torchrun" in said and "unset" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_come_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it left over from an earlier shell: nobody listens there any more."""
    from datetime import timedelta

    from kalmannorm.experiments.config import compose
    from kalmannorm.train import ranks

    monkeypatch.setattr(ranks, "CONNECT_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr(ranks, "leave_with_parent", lambda: None)
    for rank in ("0", "1"):
        left = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29876"}
        for name, value in left.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=r"no 2 processes meet at 127\.0\.0\.1:29876 .*torchrun") as error:
            ranks.Ranks(compose(DIGITS))
        assert "\n" not in str(error.value)


# GPUs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("4,5,6", ("4", "5", "6")), ("", ()), ("-1", ()), ("none", ()), ("NoDevFiles", ()), ("0, 1", ("0", "1")),
        ("0,-1,1", ("0",)), ("GPU-8932,GPU-77ab", ("GPU-8932", "GPU-77ab")), ("MIG-1/2", ("MIG-1/2",)),
        ("2,2", ("2",)),
    ],
)  # fmt: skip
def test_an_allotment_is_read_as_cuda_reads_it(
    monkeypatch: pytest.MonkeyPatch, value: str, seen: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert allotted_gpus() == visible_gpus() == seen
    monkeypatch.setattr(machine, "DRIVER", Path(__file__))
    assert machine.has_gpu() == bool(seen)


@pytest.mark.parametrize(
    ("visible", "asked", "expected"),
    [
        ("4,5,6,7", "gpus=2", ["4", "5"]),
        ("4,5,6,7", None, ["4", "5", "6", "7"]),
        ("4,5", "gpus=4,5", ["4", "5"]),
        ("4,5", "gpus=5,", ["5"]),
        ("4,5", "gpus=0,1", ["4", "5"]),
        ("4,5", "gpus=1,0", ["5", "4"]),
        ("1,0", "gpus=0,1", ["0", "1"]),
        ("GPU-8932,GPU-77ab", "gpus=0,1", ["GPU-8932", "GPU-77ab"]),
        ("GPU-8932,GPU-77ab", "gpus=GPU-77ab", ["GPU-77ab"]),
        ("GPU-8932,GPU-77ab", "gpus=1", ["GPU-8932"]),
        ("0,1", "gpus=6,7", "gpus=6,7: expected those of this machine or its allotment: 0, 1"),
        ("4,5", "gpus=4,1", "gpus=4,1: expected those"),
        ("0,1", "gpus=0,0", "gpus=0,0: expected each GPU once"),
        ("0,1", "gpus=0,x", "gpus=0,x: expected those"),
        ("0,1", "gpus=0,-1", "gpus=0,-1: expected those"),
        ("0,1", "gpus=3", "gpus=3: this machine shows 2"),
        ("GPU-8932", "gpus=GPU-1,", "gpus=GPU-1: expected those"),
        ("", "gpus=0,1", "gpus=0,1: expected GPUs, but there are none"),
        ("0,1", "gpus=0", "gpus=0: expected a whole number from 1"),
        ("0,1", "gpus=two", "gpus=two: expected a whole number"),
        ("0,1", "gpus=²", "gpus=²: expected a whole number"),
    ],
)
def test_workers_stay_within_an_allotment(
    monkeypatch: pytest.MonkeyPatch, visible: str, asked: str | None, expected: list[str] | str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    try:
        options, _ = split([asked] if asked else [])
        found: object = [slot.worker._environment["CUDA_VISIBLE_DEVICES"] for slot in Local(options, "cuda", 2).slots]
    except UserError as error:
        found = str(error)
    assert found == expected or (isinstance(found, str) and isinstance(expected, str) and found.startswith(expected))


@pytest.mark.parametrize(("said", "threads"), [("3", "3"), ("4,2", "4"), ("", None), ("many", None)])
def test_threads_of_workers(monkeypatch: pytest.MonkeyPatch, said: str, threads: str | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    pool = Local(split(["slots=1"])[0], "cpu", 1)
    assert pool.slots[0].worker._environment["OMP_NUM_THREADS"] == (threads or str(machine.cores()))


def test_a_containers_quota_is_its_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """docker run --cpus=1 on a machine of many: neither affinity nor os.cpu_count knows it."""
    from joblib.externals.loky.backend import context

    monkeypatch.setattr(context, "_cpu_count_cgroup", lambda there: 1)
    assert machine.cores() == 1


# Locks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_there_is_one_warning_and_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock._warn.cache_clear()
    for run in ("a", "b"):
        with lock.hold(tmp_path, run), lock.hold(tmp_path, run):
            assert lock.holder(tmp_path, run) is None
    said = capsys.readouterr().err
    assert said.count("has no locks") == said.count("\n") == 1 and os.strerror(number) in said


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"null", b"\xff\xfe", b'{"pid": 1}', b"[" * 100_000])
def test_a_damaged_lock_file_is_a_lock_all_the_same(tmp_path: Path, content: bytes) -> None:
    with lock.hold(tmp_path, "a"):
        (tmp_path / "a" / "lock").write_bytes(content)
        assert lock.holder(tmp_path, "a") == "another process"
        with pytest.raises(lock.Busy, match="another process"), lock.hold(tmp_path, "a"):
            pass
    with lock.hold(tmp_path, "a"):
        assert json.loads((tmp_path / "a" / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_that_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a" / "lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*lock: Is a directory"), lock.hold(tmp_path, "a"):
        pass


# Surroundings ---------------------------------------------------------------------------------------------------------


def test_a_home_that_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    with pytest.raises(UserError, match=r"data=~/data: .*HOME is not set"):
        data.root("~/data")
