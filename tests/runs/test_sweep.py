"""Sweeps with real processes: failures, locks, signals, many devices. Trainings are stood in for (faulty.py) but where
they are the point."""

import dataclasses
import fcntl
import io
import itertools
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import faulty
import pytest
from rich.console import Console
from sweeps import TABLE7, alive, started, statuses, wait_for
from trainings import SMALL, place

from kalmannorm.cli import main
from kalmannorm.errors import UserError
from kalmannorm.experiments import card
from kalmannorm.experiments import record as records
from kalmannorm.experiments.cards import load, multirun
from kalmannorm.experiments.config import compose
from kalmannorm.runs import display, lock, placement, sweep, worker
from kalmannorm.runs.display import Board, Job

# --- failures ---


def test_failures_are_retried_and_listed_while_the_others_go_on(tmp_path, plan, capsys):
    arguments = [*TABLE7, "seeds=3", *place(tmp_path)]
    ids = [records.run_id(config) for config in load("table7", arguments[1:]).runs]
    file = plan(dict(zip(ids, [["raise"], ["kill"], ["raise", "raise"], ["refuse"], ["diverge"]], strict=False)))
    assert main(["sweep", *arguments, "slots=2", "retries=1"]) == 1
    error = capsys.readouterr().err
    assert statuses(tmp_path) == {ids[0]: "done", ids[1]: "done", ids[2]: "failed", ids[4]: "failed", ids[5]: "done"}
    tried = [run for run, _, _ in faulty.attempts(file)]
    assert [tried.count(run) for run in ids] == [2, 2, 2, 1, 1, 1]
    assert "SIGKILL" in error and "no such data: get it" in error
    listed = error[error.index(f"{ids[2]} bn_stat2") :]
    assert "about to raise" in listed and "RuntimeError: injected" in listed and "log.txt" in listed
    assert "2 of 6 runs failed" in listed
    record = records.read(tmp_path / "results", ids[2])
    assert record is not None and record["reason"] == "RuntimeError: injected"
    assert main(["sweep", *arguments, "slots=2"]) == 0  # the plan is through
    assert set(statuses(tmp_path).values()) == {"done"} and len(faulty.attempts(file)) == 9 + 3


def test_faults_of_the_machine_are_no_failures_of_a_run(tmp_path, plan, capsys):
    """No process, no memory, no disk: listed, no record says that the run failed, and the same command tries again."""
    arguments = [*TABLE7, "seeds=3", *place(tmp_path)]
    ids = [records.run_id(config) for config in load("table7", arguments[1:]).runs]
    plan(dict(zip(ids, [["kill"], ["memory"], ["disk"], ["library"], ["peer"], ["peer"]], strict=True)))
    assert main(["sweep", *arguments, "slots=2", "retries=0"]) == 1
    error = capsys.readouterr().err
    assert not statuses(tmp_path) and "6 of 6 runs failed; the same command tries them again" in error
    assert "SIGKILL" in error and "MemoryError" in error and "No space left" in error and "ImportError" in error
    assert main(["sweep", *arguments, "slots=2"]) == 0 and set(statuses(tmp_path).values()) == {"done"}


def test_a_refusal_of_all_runs_is_wrong_input(tmp_path, plan, capsys):
    plan({"*": ["refuse"]})
    assert main(["sweep", *TABLE7, "seeds=1", *place(tmp_path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "kalmannorm: 2 of 2 runs cannot be run: no such data: get it"
    assert not statuses(tmp_path)


def test_a_worker_lives_on_from_run_to_run_and_is_replaced_after_a_failure(tmp_path, plan):
    arguments = [*TABLE7, "seeds=3", *place(tmp_path)]
    last = records.run_id(load("table7", arguments[1:]).runs[-1])
    file = plan({last: ["raise"]})
    assert main(["sweep", *arguments, "slots=1"]) == 0
    processes = [process for _, process, _ in faulty.attempts(file)]
    assert len(processes) == 7 and len(set(processes[:6])) == 1 and processes[6] != processes[5]
    assert not any(alive(process) for process in processes)
    # What a sweep adds to a run in a living worker: these runs take no time, it is all that lies between two of them.
    ended = sorted(file.stat().st_mtime for file in (tmp_path / "results" / "records").glob("*.json"))
    assert statistics.median(later - earlier for earlier, later in itertools.pairwise(ended)) < 2


# --- signals ---


@pytest.mark.slow
def test_a_killed_sweep_leaves_nothing_behind_and_is_finished_by_calling_it_again(tmp_path, plan):
    file = plan({"*": ["hang"]})
    arguments = ["sweep", *TABLE7, "seeds=2", *place(tmp_path), "slots=2"]
    process = started(file, *arguments)
    wait_for(lambda: len(list(tmp_path.glob("runs/*/log.txt"))) == 2 and len(faulty.attempts(file)) == 2)
    process.kill()
    process.communicate()
    workers = [number for _, number, _ in faulty.attempts(file)]
    wait_for(lambda: not any(alive(number) for number in workers))  # they saw that it is gone
    file.write_text("{}")
    assert main(arguments) == 0
    assert len(statuses(tmp_path)) == 4 and len(faulty.attempts(file)) == 2 + 4


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_signal_stops_the_children_in_order(tmp_path, plan, number, code):
    file = plan({"*": ["hang"]})
    arguments = ["sweep", *TABLE7, "seeds=2", *place(tmp_path), "slots=2"]
    process = started(file, *arguments)
    wait_for(lambda: len(faulty.attempts(file)) == 2)
    time.sleep(0.2)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number != signal.SIGHUP:  # then who would read it is gone
        assert "2 runs save themselves" in error and "the same command goes on" in error
    assert process.returncode == code and "Traceback" not in error and not statuses(tmp_path)
    assert not any(alive(number) for _, number, _ in faulty.attempts(file))
    assert all("stopped by SIGTERM" in log.read_text() for log in tmp_path.glob("runs/*/log.txt"))


# --- one process a run ---


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_runs(tmp_path, plan):
    file = plan({"*": ["sleep0.3"]})
    arguments = ["sweep", *TABLE7, "seeds=3", *place(tmp_path), "slots=1"]
    processes = [started(file, *arguments) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    tried = [run for run, _, _ in faulty.attempts(file)]
    assert len(tried) == len(set(tried)) == 6 and len(statuses(tmp_path)) == 6


def test_a_clock_that_is_set_back_does_not_keep_a_sweep_waiting(tmp_path, plan, monkeypatch):
    plan({})
    arguments = ["sweep", *TABLE7, "seeds=1", *place(tmp_path), "slots=1"]
    config = load("table7", arguments[2:-1]).runs[0]
    began = time.time()
    monkeypatch.setattr(sweep.time, "time", lambda: began - 3600 * (time.monotonic() > released))
    with lock.hold(config.runs, records.run_id(config)) as handle:
        released = time.monotonic() + 1
        threading.Timer(1, fcntl.flock, (handle, fcntl.LOCK_UN)).start()
        assert main(arguments) == 0
    assert time.monotonic() - released < 60 and set(statuses(tmp_path).values()) == {"done"}


def test_a_second_process_on_a_run_is_told_who_has_it(tmp_path, capsys):
    overrides = [*SMALL, *place(tmp_path)]
    identity = records.run_id(compose(overrides))
    with lock.hold(tmp_path / "runs", identity):
        code = f"import sys; from kalmannorm.cli import main; sys.exit(main(['train', *{overrides!r}]))"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert identity in second.stderr and f"process {os.getpid()} on" in second.stderr


def test_a_look_at_who_holds_a_run_keeps_nobody_from_it(tmp_path):
    """`holder` takes the lock for a moment: who wants to train just then waits for that moment."""
    with lock.hold(tmp_path, "run"):
        pass
    looking = os.open(tmp_path / "run" / "lock", os.O_RDWR)
    fcntl.flock(looking, fcntl.LOCK_EX)
    threading.Timer(0.1, os.close, [looking]).start()
    with lock.hold(tmp_path, "run"):
        pass


def test_a_lock_does_not_outlive_its_holder(tmp_path):
    code = f"""
import os, signal
from kalmannorm.runs.lock import hold
with hold({str(tmp_path)!r}, "run"):
    print("held", flush=True)
    signal.pause()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert f"process {holder.pid}" in str(lock.holder(tmp_path, "run"))
    with pytest.raises(lock.Busy), lock.hold(tmp_path, "run"):
        pass
    holder.kill()
    holder.wait()
    assert lock.holder(tmp_path, "run") is None
    with lock.hold(tmp_path, "run"):
        assert "process" in str(lock.holder(tmp_path, "run"))
    holder.stdout.close()


# --- devices ---


@pytest.mark.parametrize(
    ("batch", "norm", "devices"),
    [
        ((16, 4), "bn", 4),
        ((8, 2), "bkn", 4),
        ((256, 32), "bn", 8),
        ((12, 2), "bn", 6),
        ((16, 16), "gn", 8),
        ((8, 8), "bn", 1),
    ],
)
def test_a_run_takes_no_more_devices_than_its_groups_can_be_dealt_to(batch, norm, devices):
    config = compose([f"norm={norm}", f"batch.grad_batch={batch[0]}", f"batch.stat_batch={batch[1]}"])
    assert sweep._devices(config, 8) == devices


def test_slots_of_gpus(monkeypatch):
    from kalmannorm.runs.pool import Local

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    pool = Local(placement.split(["gpus=0,1,2", "per_gpu=2"])[0], "cuda", 1)
    assert [slot.gpu for slot in pool.slots] == ["0", "1", "2", "0", "1", "2"] and pool.devices == 3
    assert pool.slots[1].worker._environment["CUDA_VISIBLE_DEVICES"] == "1"
    pool.running["a"] = pool.slots[:1]
    assert [slot.gpu for slot in pool._free(3)] == ["1", "2", "0"] and pool.room(3) and not pool.room(4)


@pytest.mark.slow
def test_a_run_on_two_devices_goes_through_torchrun_and_gets_the_same_numbers(tmp_path, monkeypatch):
    overrides = [*SMALL, "norm=bkn"]
    monkeypatch.setenv("PET_NNODES", "2")  # as Kubeflow sets it in every pod: torchrun would wait for another
    assert main(["train", "-m", *overrides, *place(tmp_path / "one")]) == 0
    assert main(["train", "-m", *overrides, "slots=2", "devices=2", *place(tmp_path / "two")]) == 0
    ((identity, _),) = statuses(tmp_path / "one").items()
    one, two = (records.read(tmp_path / name / "results", identity) for name in ("one", "two"))
    assert one is not None and two is not None and two["host"]["processes"] == 2
    assert one["curves"]["train_loss"] == pytest.approx(two["curves"]["train_loss"], rel=1e-5)


# --- what is said ---


def test_the_live_table_shows_what_runs_and_what_failed(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(display, "Console", lambda **_: Console(file=screen, force_terminal=True, width=200, height=9))
    jobs = [Job(config, "row", 1, 10.0) for config in load("table7", [*TABLE7[1:], "seeds=4", *place(tmp_path)]).runs]
    for job, state in zip(jobs, [display.DONE, display.FAILED, display.RUNNING], strict=False):
        job.state, job.began = state, time.time() - 1
    jobs[1].reason = "RuntimeError: injected"
    jobs[2].folder.mkdir(parents=True)
    (jobs[2].folder / "progress.json").write_text(json.dumps({"part": 0.25, "status": "loss 1.2", "seconds_left": 30}))
    with Board(jobs, 12, 2) as shown:
        shown.say(jobs[1], "failed: injected")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "25 %  loss 1.2  30 s left" in text and "RuntimeError: injected" in text
    assert "1 running, 5 done, 1 failed, 5 waiting, about 40 s left" in text
    assert text.index(jobs[2].identity) > 0 and jobs[7].identity not in text  # no room


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"part": "x", "status": "", "seconds_left": 1}'])
def test_a_damaged_note_of_progress_is_none(tmp_path, content):
    job = Job(load("table7", [*TABLE7[1:], *place(tmp_path)]).runs[0], "row", 1, None)
    job.state = display.RUNNING
    job.folder.mkdir(parents=True)
    (job.folder / "progress.json").write_text(content)
    assert job.progress() == {} and job.seconds_left() is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["launcher=kubernetes"], "unknown launcher"),
        (["slots=0"], "slots=0: expected a whole number from 1"),
        (["gpus=2"], "goes with device=cuda"),
        (["launcher=slurm", "gpus=0,1"], "pass their number"),
        (["address=somewhere"], "belongs to launcher=ray"),
        (["slurm.partition=gpu"], "belongs to launcher=slurm"),
        (["device=cuda", "slots=2"], "pass gpus="),
    ],
)
def test_bad_options(tmp_path, capsys, arguments, words):
    table7 = [override for override in TABLE7 if not override.startswith("device=") or "device=cuda" not in arguments]
    assert main(["sweep", *table7, *place(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1] and "Traceback" not in error


def test_multirun_has_hydra_s_grammar():
    runs = multirun([*SMALL, "norm=bn,bkn", "seed=range(1,4)", "schedule.lr=[[400,0.1]]"]).runs
    assert [(run.norm.name, run.seed) for run in runs] == [(n, s) for n in ("bn", "bkn") for s in (1, 2, 3)]
    assert records.run_id(runs[0]) == records.run_id(compose([*SMALL, "norm=bn", "seed=1", "schedule.lr=[[400,0.1]]"]))
    for wrong in ("seed=range(", "norm=glob(*)", "norm=bn,bm", "seed=range(1,1)", "seed=range(0,1000000000)"):
        with pytest.raises(UserError):
            multirun([*SMALL, wrong])
    with pytest.raises(UserError, match="from 1 to 10,000"):
        load("table7", ["seeds=1000000000"])


def test_seeds_of_a_row_have_the_ids_of_runs_composed_one_by_one():
    experiment = load("table7", [*SMALL, "seeds=3"])
    for row in experiment.card.rows:
        of_row = [o for o in card.overrides(experiment.card.settings(row)) if not o.startswith(("dataset=", "budget="))]
        overrides = [*of_row, *SMALL]
        ids = {records.run_id(compose([*overrides, f"seed={seed}"])) for seed in (1, 2, 3)}
        runs = zip(experiment.keys, experiment.runs, strict=True)
        assert ids == {records.run_id(config) for key, config in runs if key == row.key}


@pytest.mark.slow
def test_a_thousand_finished_runs_are_skipped_within_five_seconds(tmp_path):
    arguments = ["table7", *SMALL, "seeds=143", *place(tmp_path)]
    runs = load("table7", arguments[1:]).runs
    curves = {"epoch": list(range(1, 101))} | {key: [0.123456789] * 100 for key in ("lr", "train_loss", "more", "most")}
    folder = tmp_path / "results" / "records"
    folder.mkdir(parents=True)
    for config in runs:
        record = faulty.record_of(config) | {"curves": curves}
        (folder / f"{record['id']}.json").write_text(json.dumps(record))
    assert len(runs) >= 1000
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "kalmannorm", "sweep", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{seconds:.2f} s of processor time")
    assert f"0 of {len(runs)} runs to do" in done.stderr and seconds < 5


def test_paths_mean_the_same_elsewhere(tmp_path, monkeypatch):
    """On machines of Ray or Slurm, which start in other folders."""
    monkeypatch.chdir(tmp_path)
    Path("w.pth").write_bytes(b"weights")
    overrides = ["dataset=coco", "arch=mask_rcnn_c4", "schedule=c4_280k", "batch=g8_s2", "budget=smoke"]
    config = compose([*overrides, "weights=w.pth", "data=d", "results=r", "runs=s"])
    sweep._make_paths_absolute([job := Job(config, "key", 1, None)])
    found = {key: getattr(job.config, key) for key in ("data", "results", "runs", "weights")}
    assert found == {k: str(tmp_path / v) for k, v in zip(found, ("d", "r", "s", "w.pth"), strict=True)}
    assert job.folder.parent == tmp_path / "s"


@pytest.mark.slow
def test_twelve_real_runs_two_failures_and_a_kill(tmp_path, monkeypatch):
    """What a user has to do after the worst day: call it again. Prints what a sweep costs beside its runs."""
    monkeypatch.setenv("FAULTY_REAL", "1")
    arguments = ["sweep", *TABLE7, "budget.epochs=4", "seeds=6", *place(tmp_path), "slots=2", "threads=1"]
    runs = load("table7", arguments[2:-2]).runs
    ids = [records.run_id(config) for config in runs]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({ids[2]: ["raise"], ids[7]: ["kill"]}))
    process = started(file, *arguments)
    wait_for(lambda: len(statuses(tmp_path)) >= 4, 300)
    process.kill()
    process.communicate()
    done = statuses(tmp_path)
    workers = {number for _, number, _ in faulty.attempts(file)}
    wait_for(lambda: not any(alive(number) for number in workers))
    again = started(file, *arguments)
    _, error = again.communicate(timeout=500)
    print(error)
    assert again.returncode == 0 and statuses(tmp_path) == dict.fromkeys(ids, "done")
    tried = [run for run, _, _ in faulty.attempts(file)]
    assert (
        tried.count(ids[2]) == 2
        and len(tried) <= 12 + 2 + 2
        and all(tried.count(run) == 1 for run in done if run != ids[2])
    )
    monkeypatch.delenv("FAULTY_REAL")
    alone = dataclasses.replace(runs[7], results=str(tmp_path / "alone"), runs=str(tmp_path / "alone"))
    assert worker.Worker(threads=1).run(alone).status == "done"
    one, two = (records.read(tmp_path / name, ids[7]) for name in ("alone", "results"))
    assert one is not None and two is not None and one | {"host": 0} == two | {"host": 0}
