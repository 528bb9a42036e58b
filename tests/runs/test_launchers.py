"""The launchers for clusters: a real Ray instance, submitit's local executor, and what Slurm is given."""

import os
import signal
import threading
import time
from pathlib import Path

import faulty
import pytest
from sweeps import TABLE7, alive, started, statuses, wait_for
from trainings import place

from kalmannorm.cli import main
from kalmannorm.experiments import record as records
from kalmannorm.experiments.cards import load
from kalmannorm.runs import placement, worker
from kalmannorm.runs import slurm as on_slurm


@pytest.fixture
def everywhere(tmp_path, monkeypatch):
    """Makes jobs and actors, which are processes of their own, start faulty.py's worker as well."""

    def patch() -> None:
        text = f"from kalmannorm.runs import worker\nworker.COMMAND = {worker.COMMAND!r}\n"
        (tmp_path / "sitecustomize.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")

    return patch


# --- Slurm ---


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands in Slurm's place: sbatch keeps what it is given; nothing ever runs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "srun": "exit 1",
        "sbatch": f'env > {tmp_path}/environment; cat "$1" > {tmp_path}/submitted-$(ls {tmp_path} | grep -c submitted-)'
        "; echo Submitted batch job 77",
        "sacct": "echo 'JobID|State|NodeList'",
        "scancel": f'echo "$@" >> {tmp_path}/cancelled',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def test_a_sweep_within_a_job_hands_nothing_of_it_to_its_own(slurm, monkeypatch):
    """sbatch takes over what Slurm has set for an interactive job: its cores, its memory, its processes."""
    own = {"SLURM_CONF": "/etc/other.conf", "SBATCH_ACCOUNT": "us"}
    of_the_job = {"SLURM_JOB_ID": "5", "SLURM_CPUS_PER_TASK": "1", "SLURM_MEM_PER_CPU": "100", "WORLD_SIZE": "2"}
    for name, value in {**own, **of_the_job}.items():
        monkeypatch.setenv(name, value)
    launcher = on_slurm.OnSlurm(placement.split(["launcher=slurm"])[0], "cpu", str(slurm / "runs"))
    launcher.start(load("table7", [*TABLE7[1:], *place(slurm)]).runs[0], 1)
    launcher.ended(0)
    seen = dict(line.split("=", 1) for line in (slurm / "environment").read_text().splitlines() if "=" in line)
    assert own.items() <= seen.items() and not of_the_job.keys() & seen.keys()
    assert {**own, **of_the_job}.items() <= os.environ.items()


def test_what_slurm_is_given(slurm):
    choice, _ = placement.split(["launcher=slurm", "gpus=8", "slurm.partition=gpu", "slurm.time=90", "slurm.mem=64GB"])
    launcher = on_slurm.OnSlurm(choice, "cuda", str(slurm / "runs"))
    for config in load("table7", [*TABLE7[1:], "seeds=3", *place(slurm)]).runs:
        launcher.start(config, 4)
    assert launcher.ended(0) == []
    script = (slurm / "submitted-0").read_text().splitlines()
    for flag in ("array=0-5%2", "gpus-per-node=4", "partition=gpu", "time=90", "mem=64GB", "signal=USR2@120"):
        assert f"#SBATCH --{flag}" in script, script
    assert "#SBATCH --requeue" in script and "#SBATCH --job-name=kalmannorm" in script
    assert script[-2].startswith("srun ") or "srun" in "".join(script)
    launcher.ask_to_stop()
    cancelled = (slurm / "cancelled").read_text().split()
    assert sorted(cancelled) == [f"77_{i}" for i in range(6)]


def test_wrong_parameters_for_slurm(slurm, capsys, monkeypatch):
    assert main(["sweep", *TABLE7, *place(slurm), "launcher=slurm", "slurm.partitoin=gpu"]) == 2
    assert "partitoin" in capsys.readouterr().err
    assert main(["sweep", *TABLE7, *place(slurm), "launcher=slurm", "per_gpu=2"]) == 2
    assert "whole GPUs" in capsys.readouterr().err
    (slurm / "bin" / "sbatch").write_text("#!/bin/bash\necho 'invalid partition specified: gup' >&2; exit 1\n")
    assert main(["sweep", *TABLE7, *place(slurm), "launcher=slurm", "slurm.partition=gup"]) == 2
    assert "sbatch refused" in (error := capsys.readouterr().err) and "invalid partition specified: gup" in error
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["sweep", *TABLE7, *place(slurm), "launcher=slurm"]) == 2
    assert "slurm cluster" in capsys.readouterr().err


@pytest.mark.slow
def test_submitit_runs_retries_and_requeues(tmp_path, plan, everywhere, monkeypatch, capfd):
    """One run fails once, one dies once, one is told that its time is over and goes on in the requeued job."""
    import submitit

    class Here(submitit.LocalExecutor):
        def update_parameters(self, **parameters):
            super().update_parameters(timeout_min=10)

    monkeypatch.setattr(on_slurm, "make_executor", lambda folder: Here(folder, max_num_timeout=1000))
    arguments = [*TABLE7, "seeds=2", *place(tmp_path)]
    ids = [records.run_id(config) for config in load("table7", arguments[1:]).runs]
    file = plan({ids[0]: ["raise"], ids[1]: ["kill"], ids[2]: ["hang"]})
    everywhere()

    def preempt() -> None:
        """As Slurm does ahead of the time limit: SIGUSR2 to every process of the job."""
        wait_for(lambda: any(action == "hang" for _, _, action in faulty.attempts(file)), 300)
        (process,) = (process for _, process, action in faulty.attempts(file) if action == "hang")
        task = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        time.sleep(0.5)
        for number in (process, task):
            os.kill(number, signal.SIGUSR2)

    thread = threading.Thread(target=preempt)
    thread.start()
    code = main(["sweep", *arguments, "launcher=slurm"])
    thread.join()
    assert code == 0, capfd.readouterr().err
    assert statuses(tmp_path) == dict.fromkeys(ids, "done")
    tried = [(run, action) for run, _, action in faulty.attempts(file)]
    assert [tried.count((ids[i], action)) for i, action in enumerate(("raise", "kill", "hang"))] == [1, 1, 1]
    assert all(tried.count((run, "fine")) == 1 for run in ids)
    assert "stopped by SIGTERM" in (tmp_path / "runs" / ids[2] / "log.txt").read_text()


# --- Ray ---


@pytest.fixture
def ray(monkeypatch):
    """A Ray instance of two CPUs, without a dashboard; gone afterwards."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else its workers wait for the other tests

    def start(**resources):
        for _ in range(4):  # Ray gives its processes 30 s, which a busy machine may need more of
            try:
                ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False, **resources)
                return
            except Exception as error:
                if "timed out during startup" not in str(error):
                    raise
                ray.shutdown()
        pytest.fail("Ray does not start")

    yield start
    ray.shutdown()


@pytest.mark.slow
def test_ray_runs_and_retries(tmp_path, plan, everywhere, ray, capsys):
    arguments = [*TABLE7, "seeds=3", *place(tmp_path)]
    ids = [records.run_id(config) for config in load("table7", arguments[1:]).runs]
    file = plan({ids[0]: ["raise"], ids[1]: ["kill"], ids[2]: ["raise", "raise"]})
    everywhere()
    ray()
    assert main(["sweep", *arguments, "launcher=ray", "threads=1", "slots=2"]) == 1
    error = capsys.readouterr().err
    assert statuses(tmp_path) == {run: "failed" if run == ids[2] else "done" for run in ids}, error
    assert "1 of 6 runs failed" in error and "SIGKILL" in error and "RuntimeError: injected" in error
    tried = faulty.attempts(file)
    assert len(tried) == 9
    wait_for(lambda: not any(alive(process) for _, process, _ in tried[:3]), 30)  # Ray ends them in its own time


@pytest.mark.slow
def test_ray_deals_out_shares_of_gpus(tmp_path, plan, everywhere, ray):
    """Two GPUs that are none: two runs at once on each."""
    file = plan({"*": ["sleep1"]})
    everywhere()
    ray(num_gpus=2)
    table = ["device=cuda" if argument == "device=cpu" else argument for argument in TABLE7]
    arguments = [*table, "seeds=3", *place(tmp_path), "launcher=ray", "per_gpu=2"]
    assert main(["sweep", *arguments]) == 0
    assert len(statuses(tmp_path)) == 6 and len({process for _, process, _ in faulty.attempts(file)}) == 4


@pytest.mark.slow
def test_ray_of_its_own_and_a_signal(tmp_path, ray):
    """Without a cluster a sweep starts an instance of its own; SIGTERM saves the runs, and nothing is left behind."""
    file = tmp_path / "plan.json"
    file.write_text("{}")
    arguments = [*TABLE7, "seeds=1", "budget.epochs=500", "compile=false", *place(tmp_path)]
    process = started(file, "sweep", *arguments, "launcher=ray", "threads=1")
    try:
        wait_for(lambda: len(list(tmp_path.glob("runs/*/progress.json"))) == 2, 300)
    finally:
        process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143 and "2 runs save themselves" in error and "Traceback" not in error
    assert len(list(tmp_path.glob("runs/*/checkpoint.pt"))) == 2 and not statuses(tmp_path)
    assert all("stopped by SIGTERM" in log.read_text() for log in tmp_path.glob("runs/*/log.txt"))
