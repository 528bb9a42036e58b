"""launcher=slurm: array jobs through submitit, one run each, requeued when they are preempted or out of time."""

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

SAVE_SECONDS = 120  # ahead of the time limit that a run is told to save and leave
SET_BY_USERS = ("SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS")  # and not by Slurm for a job


class Attempt:
    """What an array job does: one run in a worker process. submitit calls `checkpoint` ahead of a time-out."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def __call__(self, config: Config, devices: int) -> Outcome:
        self.worker = Worker()
        outcome = self.worker.run(config, devices)
        if outcome.status == "stopped":
            # Preempted or cancelled: SIGTERM reached the worker. Slurm requeues a preempted job that it had to end, not
            # one that ended by itself, so wait for that.
            time.sleep(SAVE_SECONDS)
        return outcome

    def checkpoint(self, config: Config, devices: int) -> Any:
        """Save the run and return what goes on with it, which submitit requeues."""
        from submitit.helpers import DelayedSubmission

        if self.worker is not None and self.worker.process is not None:
            self.worker.ask_to_stop()
            until = time.monotonic() + SAVE_SECONDS - 20
            while self.worker.process.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
        return DelayedSubmission(Attempt(), config, devices)


class OnSlurm:
    """Runs as Slurm jobs. All are handed over at once, an array for each number of devices; Slurm schedules them."""

    def __init__(self, options: Options, device: str, runs: str) -> None:
        """Check what a job needs. UserError: no submitit, no Slurm here, parameters that submitit does not know."""
        if options.per_gpu > 1:
            raise UserError(f"per_gpu={options.per_gpu}: Slurm hands out whole GPUs; pass per_gpu=1")
        self._on_gpu = device == "cuda"
        self._options = options
        self._folder = Path(runs).absolute() / "slurm"
        self.parallel = options.gpu_count or options.slots or 256
        self.devices = options.devices or 8  # on one machine
        self.title = f"at most {self.parallel} at once, by Slurm; its own logs: {self._folder}"
        self._new: list[tuple[Config, int]] = []
        self._jobs: dict[str, Any] = {}
        self._executor(1)  # what is wrong with the parameters is said before anything starts

    def room(self, devices: int) -> bool:
        return True

    def start(self, config: Config, devices: int) -> None:
        self._new.append((config, devices))

    def ended(self, timeout: float) -> list[tuple[str, Outcome]]:
        """Submit what was handed over, and return the ids and outcomes of what ended within `timeout` seconds."""
        self._submit()
        time.sleep(timeout)
        ended = [identity for identity, job in self._jobs.items() if job.done()]
        return [(identity, _outcome(self._jobs.pop(identity))) for identity in ended]

    def ask_to_stop(self) -> None:
        """Call scancel: Slurm sends SIGTERM, and SIGKILL after its KillWait. What still waits is gone at once."""
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
            except RuntimeError as error:  # what sbatch said
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
            raise UserError(f"slurm.: {reason(error)}") from None
        return executor


def make_executor(folder: Path) -> Any:
    """Return submitit's executor. UserError: no submitit, or no Slurm on this machine."""
    try:
        import submitit
    except ImportError:
        raise UserError("launcher=slurm needs submitit: pip install 'kalmannorm[launchers]'") from None
    try:
        # A run that is preempted or out of time goes on from its checkpoint, however often that happens.
        return submitit.SlurmExecutor(folder, max_num_timeout=1000)
    except RuntimeError as error:
        raise UserError(f"launcher=slurm: {error}") from None


@contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Hide what Slurm and torchrun have set where this is called within a job: sbatch hands all of it on, and the new
    jobs would take its cores, memory and processes for theirs."""
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
