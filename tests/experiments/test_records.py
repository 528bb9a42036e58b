"""`kalmannorm records`: what there is, records of several machines brought together, stale ones removed."""

import json
import re
import shutil
import struct
import zipfile
from pathlib import Path

import faulty
import pytest

from kalmannorm import report
from kalmannorm.cli import main
from kalmannorm.errors import UserError
from kalmannorm.experiments import record as records
from kalmannorm.experiments.config import compose

SMALL = ["dataset=digits", "budget=smoke", "device=cpu"]


def add(results: Path, overrides: list[str], **changes) -> Path:
    """A record, and arrays beside it."""
    record = faulty.record_of(compose([*SMALL, *overrides])) | changes
    record = {key: value for key, value in record.items() if value is not None or key == "reason"}
    file = results / "records" / f"{record['id']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))
    file.with_suffix(".npz").write_bytes(record["id"].encode())
    return file


def contents(results: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (results / "records").iterdir()}


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ([], 5),
        (["norm=kn"], 2),
        (["norm=bn", "seed=2"], 1),
        (["batch=g128_s4"], 1),
        (["batch.stat_batch=2"], 3),
        (["status=failed"], 1),
        (["dataset=cifar10"], 0),
        (["precision=fp32", "dataset=digits"], 5),
        (["norm=bn,gn", "seed=1,2"], 3),
        (["seed=range(2,4)"], 1),
        (["status=done,failed"], 5),
        (["schedule.weight_decay=2e-4"], 5),
    ],
)
def test_list(tmp_path, capsys, overrides, count):
    for setting in (["norm=bn"], ["norm=bn", "seed=2"], ["norm=bkn"], ["norm=bkn", "batch=g128_s4"]):
        add(tmp_path, setting)
    add(tmp_path, ["norm=gn"], status="failed", reason="RuntimeError: x", final=None)
    assert main(["records", "list", "--results", str(tmp_path), *overrides]) == 0
    said = capsys.readouterr()
    header, *rows = said.out.splitlines()
    assert header.startswith("id\tstatus") and len(rows) == count
    assert ("none of the 5 records" in said.err) == (count == 0)
    assert all(row.count("\t") == header.count("\t") for row in rows)


def test_list_shows_detectors_beside_classifiers(tmp_path, capsys):
    add(tmp_path, [])
    detector = compose(["dataset=coco", "arch=mask_rcnn_c4", "schedule=c4_280k", "batch=g8_s2", "budget=smoke"])
    record = faulty.record_of(detector)
    record["final"] = {kind: {"box_ap": 12.345, "mask_ap": 6.0, "images": 5} for kind in ("moving", "online")}
    (tmp_path / "records" / f"{record['id']}.json").write_text(json.dumps(record))
    assert main(["records", "list", "--results", str(tmp_path)]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
    assert {row[0]: row[3:5] for row in rows}[record["id"]] == ["12.35 / 6.00"] * 2 and len(rows) == 2


def test_list_refuses_what_is_no_setting(tmp_path, capsys):
    add(tmp_path, [])
    for wrong in ("norm", "batch.stat_batch.x=2", "+norm=bn", "~norm", "norm=glob(b*)"):
        assert main(["records", "list", "--results", str(tmp_path), wrong]) == 2
        assert wrong in capsys.readouterr().err


def test_merge_takes_what_is_missing_names_conflicts_and_overwrites_nothing(tmp_path, capsys):
    here, other, third = (tmp_path / name for name in ("here", "other", "third"))
    same = add(here, ["seed=1"])
    add(other, ["seed=1"], host={"device": "cuda", "seconds": 1.0, "train_seconds": 1.0})  # time and place may differ
    clash = add(here, ["seed=2"])
    add(other, ["seed=2"], final={"moving": {"accuracy": 60.0}})
    new = add(other, ["seed=3"])
    add(third, ["seed=4"])
    broken = third / "records" / "0123456789ab.json"
    broken.write_text('{"id": ')
    same.with_suffix(".npz").unlink()
    before = contents(here)
    assert main(["records", "merge", str(other), str(third / "records"), "--results", str(here)]) == 1
    out, error = capsys.readouterr()
    assert "2 records taken" in out and "1 were there" in out and "2 not taken" in out
    assert f"{clash.stem}: {here} and {other} differ in final" in error and str(broken) in error
    after = contents(here)
    assert {name: after[name] for name in before} == before
    assert after[new.name] == new.read_bytes() and after[f"{new.stem}.npz"] == new.stem.encode()
    assert f"{same.stem}.npz" in after and not (here / "records" / broken.name).exists()
    shutil.rmtree(third)
    (other / "records" / clash.name).unlink()
    assert main(["records", "merge", str(other), "--results", str(here)]) == 0 and contents(here) == after
    assert main(["records", "merge", str(tmp_path / "nowhere"), "--results", str(here)]) == 2


def test_merge_takes_a_finished_run_for_a_failed_one(tmp_path, capsys):
    failed = add(tmp_path / "here", ["seed=1"], status="failed", reason="killed")
    done = add(tmp_path / "other", ["seed=1"])
    failed.with_suffix(".npz").write_bytes(b"of the failed run")
    assert main(["records", "merge", str(tmp_path / "other"), "--results", str(tmp_path / "here")]) == 0
    assert failed.with_suffix(".npz").read_bytes() == done.with_suffix(".npz").read_bytes()
    assert failed.read_bytes() == done.read_bytes() and "1 records taken" in capsys.readouterr().out
    before = add(tmp_path / "other", ["seed=1"], status="failed", reason="out of memory")  # of another machine
    assert main(["records", "merge", str(tmp_path / "other"), "--results", str(tmp_path / "here")]) == 0
    assert failed.read_bytes() != before.read_bytes() and "0 records taken" in capsys.readouterr().out
    add(tmp_path / "here", ["seed=1"], status="failed", reason="killed")
    assert main(["records", "merge", str(tmp_path / "other"), "--results", str(tmp_path / "here")]) == 0


def test_prune_lists_and_deletes_on_request(tmp_path, capsys):
    good, failed = add(tmp_path, ["seed=1"]), add(tmp_path, ["seed=2"], status="failed", reason="RuntimeError: x")
    stale = add(tmp_path, ["seed=3"], numerics=records.NUMERICS - 1)
    broken = add(tmp_path, ["seed=4"])
    broken.write_text("{}")
    before = contents(tmp_path)
    assert main(["records", "prune", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 records to delete: pass --yes" in out and str(stale) in out and str(broken) in out
    assert contents(tmp_path) == before
    assert main(["records", "prune", "--results", str(tmp_path), "--yes"]) == 0
    kept = {f"{file.stem}.{ending}" for file in (good, failed) for ending in ("json", "npz")}
    assert set(contents(tmp_path)) == kept
    assert main(["records", "prune", "--results", str(tmp_path), "--failed", "--yes"]) == 0
    assert set(contents(tmp_path)) == {good.name, f"{good.stem}.npz"}


def test_prune_leaves_a_folder_alone_and_deletes_the_rest(tmp_path, capsys):
    stale = add(tmp_path, ["seed=3"], numerics=records.NUMERICS - 1)
    folder = tmp_path / "records" / f"{'0' * 12}.json"
    (folder / "inner").mkdir(parents=True)
    assert main(["records", "prune", "--results", str(tmp_path), "--yes"]) == 0
    out, error = capsys.readouterr()
    assert "1 records deleted" in out and not stale.exists()
    assert f"{folder}: a folder" in error and (folder / "inner").exists()


def test_what_a_run_reached():
    assert records.headline({"accuracy": 91.234}) == "91.23 %"
    assert (
        records.headline({"box_ap": None, "mask_ap": 7.5}) == "box / mask AP - / 7.50"
    )  # never a 0 for what is not there


def test_a_sweep_does_not_take_an_edited_record_for_done(tmp_path):
    """The report leaves it out, so a run that has it must not be skipped."""
    file = add(tmp_path, [])
    assert records.is_done(tmp_path, file.stem)
    record = json.loads(file.read_text())
    record["config"]["seed"] += 1
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match="not that of its configuration"):
        records.is_done(tmp_path, file.stem)


EDITS = {  # what somebody or a fault might change in a whole record, and the word that names it
    "final.moving": (("final", "moving", "accuracy"), 120.0),
    "final.online": (("final", "online", "loss"), float("nan")),
    "final.precise": (("final", "precise", "images"), 0.5),
    "curves": (("curves", "moving"), [50.0, 40.0, 50.0]),
    "curves.lr.1": (("curves", "lr", 1), "0.1"),
    "norms.gains.a": (("norms", "gains", "a"), 1.5),
    "norms.order": (("norms", "order"), "a, b"),
    "norms.more": (("norms", "more"), {}),
    "host.seconds": (("host", "seconds"), "an hour"),
    "host.processes": (("host", "processes"), True),
    "host.threads": (("host", "threads"), 0),
    "host.train_seconds": (("host", "train_seconds"), -1.0),
    "data": (("data",), ["digits"]),
    "'data.test_images' is -1: expected": (("data", "test_images"), -1),
    "'data.fidelity' is []: expected a valid string": (("data", "fidelity"), []),
    "parameters": (("parameters",), -1),
    "status": (("status",), "finished"),
    "surplus": (("surplus",), 1),
}


@pytest.mark.parametrize("named", EDITS)
def test_an_edited_record_is_named_and_left_out_by_everything_that_reads_it(tmp_path, capsys, named):
    keys, value = EDITS[named]
    norms = {"order": ["a"], "last": ["a"], "gains": {"a": 0.5}, "beliefs": {"a": None}}
    curves = {"epoch": [1, 2], "step": [3, 6], "lr": [0.1, 0.01], "moving": [40.0, 50.0]}
    file = add(tmp_path, [], norms=norms, curves=curves, parameters=7)
    assert records.is_done(tmp_path, file.stem)
    record = place = json.loads(file.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(record))
    complaint = f"{file.name} is not a usable record.*{re.escape(named)}"
    for read in (records.find, records.is_done):
        with pytest.raises(UserError, match=complaint):
            read(tmp_path, file.stem)
    for count in (lambda: main(["records", "list", "--results", str(tmp_path)]), lambda: len(report.load(tmp_path))):
        records._say.cache_clear()
        assert count() == 0
        out, error = capsys.readouterr()
        assert re.search(f"left out: .*{complaint}", error) and file.stem not in out
    assert main(["records", "merge", str(tmp_path), "--results", str(tmp_path / "other")]) == 1
    assert re.search(complaint, capsys.readouterr().err) and not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", ["", "[" * 100_000, "null", '{"id": 1', "\x00"])
def test_a_file_that_is_no_record_is_named_and_left_out(tmp_path, capsys, content):
    file = add(tmp_path, [])
    file.write_text(content)
    records._say.cache_clear()
    assert main(["records", "list", "--results", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert f"left out: {file} is not a usable record" in error and error.count("\n") == 1


def test_made_up_settings_are_named_although_their_hash_is_right(tmp_path):
    file = add(tmp_path, [])
    record = json.loads(file.read_text())
    record["config"]["norm"] = "bn"
    record["id"] = records._hash(record["config"], record["numerics"])
    renamed = file.with_stem(record["id"])
    renamed.write_text(json.dumps(record))
    file.unlink()
    with pytest.raises(UserError, match=r"is not a usable record.*'norm' is 'bn', expected settings with a name"):
        records.find(tmp_path, record["id"])


def test_a_loss_that_was_not_finite_is_no_damage(tmp_path):
    """evaluate() writes null for it; the accuracy beside it counts."""
    final = {"moving": {"accuracy": 10.0, "loss": None, "images": 360}}
    assert records.is_done(tmp_path, add(tmp_path, [], final=final).stem)


def test_a_stale_record_may_follow_another_schema(tmp_path):
    file = add(tmp_path, [], numerics=records.NUMERICS - 1)
    record = json.loads(file.read_text())
    record["id"] = records._hash(record["config"], record["numerics"])
    del record["host"]
    renamed = file.with_stem(record["id"])
    renamed.write_text(json.dumps(record))
    file.unlink()
    assert records.current(records.read_all(tmp_path)) == []


@pytest.mark.parametrize(
    ("keys", "value"),
    [(("host",), "a machine"), (("final",), [50.0]), (("config", "norm"), "bn"), (("config", "batch"), {"images": 2})],
)
def test_a_record_of_a_newer_version_that_this_one_cannot_read_is_named(tmp_path, capsys, keys, value):
    file = add(tmp_path, [], numerics=records.NUMERICS + 1)
    record = place = json.loads(file.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    record["id"] = records._hash(record["config"], record["numerics"])
    file.rename(file.with_stem(record["id"])).write_text(json.dumps(record))
    for read in (lambda: main(["records", "list", "--results", str(tmp_path)]), lambda: len(report.load(tmp_path))):
        records._say.cache_clear()
        assert read() == 0
        out, error = capsys.readouterr()
        assert record["id"] not in out and "is of another version" in error and error.count("\n") == 1
    assert main(["records", "prune", "--results", str(tmp_path)]) == 0
    assert "stale: made by NUMERICS" in capsys.readouterr().out


def test_arrays_that_claim_more_than_they_have_are_refused_before_anything_is_allocated(tmp_path):
    file = add(tmp_path, []).with_suffix(".npz")
    for shape in ("(1000000000000,)", "(64, 64)"):
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(
                "gap.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + b"0" * 64
            )
        with pytest.raises(UserError, match=r"cannot be read \(an array of .* in 192 bytes"):
            records.arrays(file.stem, tmp_path)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:  # a bomb: its size is true
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**29},), }}".ljust(117) + "\n"
        with archive.open("gap.npy", "w") as member:
            member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
            for _ in range(2**9):
                member.write(bytes(2**20))
    with pytest.raises(UserError, match="an array of"):
        records.arrays(file.stem, tmp_path)


def test_prune_keeps_what_a_newer_version_made(tmp_path, capsys):
    record = json.loads(add(tmp_path, ["seed=1"]).read_text())
    record["numerics"] += 1
    record["id"] = records._hash(record["config"], record["numerics"])
    newer = tmp_path / "records" / f"{record['id']}.json"
    newer.write_text(json.dumps(record))
    assert main(["records", "prune", "--results", str(tmp_path), "--yes"]) == 0
    said = capsys.readouterr().out
    assert newer.exists() and f"{newer}: stale" in said and "of a newer version, which stays" in said
