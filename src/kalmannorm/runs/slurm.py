"""launcher=slurm: array jobs by submitit, one run per job, requeued when a job is preempted or out of time."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kalmannorm.errors import UserError, reason
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import run_id
from kalmannorm.runs.job import Outcome
from kalmannorm.runs.placement import Options
from kalmannorm.runs.worker import Worker

SAVE_SECONDS = 120  # before the time limit, a run is asked to save and stop
SET_BY_USERS = ("SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS")  # by users, not by Slurm for a job


class Attempt:
    """What an array job does: train one run in a worker process. submitit calls `checkpoint` before a time-out."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def __call__(self, config: Config, devices: int) -> Outcome:
        self.worker = Worker()
        outcome = self.worker.run(config, devices)
        if outcome.status == "stopped":
            # Preempted or cancelled: SIGTERM reached the worker. Slurm requeues a preempted job only if it had to kill
            # it, so wait to be killed.
            time.sleep(SAVE_SECONDS)
        return outcome

    def checkpoint(self, config: Config, devices: int) -> Any:
        """Save the run and return the submission by which submitit requeues it."""
        from submitit.helpers import DelayedSubmission

        if self.worker is not None and self.worker.process is not None:
            self.worker.ask_to_stop()
            until = time.monotonic() + SAVE_SECONDS - 20
            while self.worker.process.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
        return DelayedSubmission(Attempt(), config, devices)


class OnSlurm:
    """Executes runs as Slurm jobs. All are submitted at once, in an array for each number of devices; Slurm schedules
    them."""

    def __init__(self, options: Options, device: str, runs: str) -> None:
        """Check the parameters. UserError: no submitit, no Slurm on this machine, parameters unknown to submitit."""
        if options.per_gpu > 1:
            raise UserError(f"per_gpu={options.per_gpu}: Slurm hands out whole GPUs; pass per_gpu=1")
        self._on_gpu = device == "cuda"
        self._options = options
        self._folder = Path(runs).absolute() / "slurm"
        self.parallel = options.gpu_count or options.slots or 256
        self.devices = options.devices or 8  # of one machine
        self.title = f"at most {self.parallel} at once, by Slurm; its own logs: {self._folder}"
        self._new: list[tuple[Config, int]] = []
        self._jobs: dict[str, Any] = {}
        self._executor(1)  # raises for wrong parameters before anything starts

    def room(self, devices: int) -> bool:
        return True

    def start(self, config: Config, devices: int) -> None:
        self._new.append((config, devices))

    def ended(self, timeout: float) -> list[tuple[str, Outcome]]:
        """Submit the new runs, wait `timeout` seconds, and return the ids and outcomes of the runs that ended."""
        self._submit()
        time.sleep(timeout)
        ended = [identity for identity, job in self._jobs.items() if job.done()]
        return [(identity, _outcome(self._jobs.pop(identity))) for identity in ended]

    def ask_to_stop(self) -> None:
        """Cancel all jobs by scancel: Slurm sends SIGTERM, then SIGKILL after its KillWait; waiting jobs vanish."""
        self._new.clear()
        for job in self._jobs.values():
            job.cancel(check=False)

    kill = ask_to_stop

    def close(self) -> None:
        pass

    def _submit(self) -> None:
        for devices in sorted({devices for _, devices in self._new}):
            configs = [config for config, of in self._new if of == devices]
            try:
                with _outside_of_a_job():
                    jobs = self._executor(devices).map_array(Attempt(), configs, [devices] * len(configs))
            except RuntimeError as error:  # with sbatch's message
                raise UserError(f"sbatch refused: {reason(error)}") from None
            self._jobs |= {run_id(config): job for config, job in zip(configs, jobs, strict=True)}
        self._new.clear()

    def _executor(self, devices: int) -> Any:
        executor = make_executor(self._folder)
        parameters: dict[str, Any] = {
            "job_name": "kalmannorm",
            "time": 24 * 60,
            "array_parallelism": max(1, self.parallel // devices),
            "cpus_per_task": (self._options.threads or 8) * devices,
            "signal_delay_s": SAVE_SECONDS,
            "stderr_to_stdout": True,
            "additional_parameters": {"requeue": True},
        }
        if self._on_gpu:
            parameters["gpus_per_node"] = devices
        try:
            executor.update_parameters(**parameters | self._options.slurm)
        except ValueError as error:
            raise UserError(f"slurm.NAME=VALUE: {reason(error)}") from None
        return executor


def make_executor(folder: Path) -> Any:
    """Return submitit's executor. UserError: no submitit, or no Slurm on this machine."""
    try:
        import submitit
    except ImportError:
        raise UserError("launcher=slurm needs submitit: pip install 'kalmannorm[launchers]'") from None
    try:
        # A run may be preempted or out of time many times: it always resumes from its checkpoint.
        return submitit.SlurmExecutor(folder, max_num_timeout=1000)
    except RuntimeError as error:
        raise UserError(f"launcher=slurm: {error}") from None


@contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Hide the variables that Slurm and torchrun set, in case this runs within a job: sbatch passes all of them on, and
    the new jobs would take this job's cores, memory and processes for theirs."""
    from submitit.helpers import clean_env

    kept = {name: os.environ[name] for name in SET_BY_USERS if name in os.environ}
    with clean_env():
        os.environ |= kept
        yield


def _outcome(job: Any) -> Outcome:
    import submitit

    try:
        return job.result()
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
        return Outcome("died", f"job {job.job_id} left no result, see {job.paths.stderr}")
