"""Trainings that cannot go well, each with one line and exit code 2; records are written whole or not at all."""

from pathlib import Path

import pytest
import torch

from kalmannorm import data
from kalmannorm.cli import main
from kalmannorm.errors import UserError
from kalmannorm.experiments import record as records
from kalmannorm.experiments.config import compose
from kalmannorm.train import checkpoint, loop

pytestmark = pytest.mark.usefixtures("small")
SMALL = ["dataset=digits", "budget=smoke", "arch.width=0.125", "device=cpu"]


def place(folder: Path) -> list[str]:
    return [f"results={folder / 'results'}", f"runs={folder / 'runs'}"]


def run_badly(arguments, capsys) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("kalmannorm: ") and error.count("\n") == 1, error
    return error


def test_statistics_of_a_single_value_name_the_layer_before_data_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *a: pytest.fail("data was read"))
    overrides = ["norm=bkn", "batch.stat_batch=1", "budget.size=2", *place(tmp_path)]
    assert "stem.bn" in run_badly(["train", *overrides], capsys)


def test_groups_that_do_not_divide_channels_name_the_layer(tmp_path, capsys):
    overrides = ["norm=gn", "+norm.options.num_groups=7", *place(tmp_path)]
    error = run_badly(["train", *overrides], capsys)
    assert "stem.bn" in error and "7 groups do not divide 32 channels" in error


def test_unknown_options_of_a_normalizer(tmp_path, capsys):
    error = run_badly(["train", "norm=bn", "+norm.options.gain=0.5", *place(tmp_path)], capsys)
    assert "gain" in error and "bn" in error


def test_missing_data_says_where_it_was_looked_for_and_what_runs_without(tmp_path, capsys):
    error = run_badly(["train", "dataset=cifar10", f"data={tmp_path}", *place(tmp_path)], capsys)
    assert str(tmp_path) in error and "cifar10" in error and "digits" in error


def test_a_corrupt_record_is_named(tmp_path, capsys):
    overrides = [*SMALL, *place(tmp_path)]
    file = records.path(tmp_path / "results", records.run_id(compose(overrides)))
    file.parent.mkdir(parents=True)
    file.write_text('{"id": "trunc')
    assert str(file) in run_badly(["train", *overrides], capsys)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half"])
def test_a_damaged_checkpoint_is_named(tmp_path, capsys, content):
    overrides = [*SMALL, *place(tmp_path)]
    folder = tmp_path / "runs" / records.run_id(compose(overrides))
    folder.mkdir(parents=True)
    (folder / checkpoint.NAME).write_bytes(content)
    assert checkpoint.NAME in run_badly(["train", *overrides], capsys)


def test_no_permission_to_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = run_badly(["train", *SMALL, f"results={tmp_path}", f"runs={tmp_path / 'file'}"], capsys)
    assert "cannot write" in error and str(tmp_path / "file") in error


def test_not_enough_disk(tmp_path, capsys, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    error = run_badly(["train", *SMALL, *place(tmp_path)], capsys)
    assert "MiB free" in error and "needed" in error


def test_a_device_that_is_not_there(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "device=cpu" in run_badly(["train", *SMALL[:-1], "device=cuda", *place(tmp_path)], capsys)


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to", "DefaultCPUAllocator: can't allocate memory: you"])
def test_too_little_memory(tmp_path, capsys, monkeypatch, said):
    def backward(*arguments):
        raise RuntimeError(said)

    monkeypatch.setattr(loop, "_forward_backward", backward)
    assert "batch.grad_batch" in run_badly(["train", *SMALL, *place(tmp_path)], capsys)


def test_a_compiler_that_fails(tmp_path, capsys, monkeypatch):
    def backward(*arguments):
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no g++\nhere"), None)

    monkeypatch.setattr(loop, "_forward_backward", backward)
    error = run_badly(["train", *SMALL, "compile=true", *place(tmp_path)], capsys)
    assert "compile=false" in error and "no g++" in error


def test_a_compiler_that_computes_something_else(tmp_path, capsys, monkeypatch):
    def compiled(model, **options):
        model.get_parameter("fc.weight").register_hook(lambda gradient: gradient * float("nan"))
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    error = run_badly(["train", *SMALL, "compile=true", *place(tmp_path)], capsys)
    assert "fc.weight" in error and "compile=false" in error
    assert not list(tmp_path.rglob("records/*.json"))


def test_records_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    record = {"id": "a" * 12, "status": "done"}
    records.write(tmp_path, record)
    before = records.path(tmp_path, record["id"]).read_text()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        records.write(tmp_path, record | {"more": 1})
    assert records.path(tmp_path, record["id"]).read_text() == before
    assert [p.name for p in (tmp_path / "records").iterdir()] == ["a" * 12 + ".json"]
