"""Train one run of a sweep: under its lock, with its output in runs/<id>/log.txt, and an Outcome in place of an
exception."""

import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from kalmannorm.errors import LOST_PROCESS, OUT_OF_MEMORY, WORKER_ERROR, Stopped, UserError
from kalmannorm.experiments import record as records
from kalmannorm.experiments.config import Config
from kalmannorm.files import write_atomically
from kalmannorm.runs.lock import Busy, hold
from kalmannorm.stopping import STOP_SIGNALS, handling, listening

LOG = "log.txt"


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a run ended. `reason` says why, in a line.

    status:
        done: the record is written.
        diverged: the loss was not finite, as it would be again; the record says "failed".
        failed: the run raised an exception; worth another try, in a fresh process.
        died: the process died, or the machine failed (memory, disk, network, libraries). That says nothing about the
            run, and is never recorded.
        refused: a UserError; the user has to change something.
        busy: another process works on the run.
        stopped: by a signal, after saving.
    """

    status: str
    reason: str = ""


def attempt(config: Config, devices: int, gpus: str | None) -> Outcome:
    """Train a run in this process, or on several devices by torchrun, whose processes see `gpus` (None: all that this
    process sees).

    From then on this process prints to the run's log.
    """
    identity = records.run_id(config)
    try:
        with hold(config.runs, identity) as lock:
            if records.is_done(config.results, identity):  # by another process, after the sweep had checked
                return Outcome("done")
            _log_to(Path(config.runs) / identity / LOG)
            return perform(config) if devices == 1 else _with_torchrun(config, devices, gpus, lock)
    except Busy as error:
        return Outcome("busy", str(error))
    except UserError as error:
        return Outcome("refused", str(error))


def perform(config: Config) -> Outcome:
    """Train a run. An exception is printed to stderr, and returned as an outcome with its reason."""
    try:
        from kalmannorm.train.run import execute

        record = execute(config)
        return Outcome("done") if record["status"] == "done" else Outcome("diverged", record["reason"] or "")
    except UserError as error:
        print(f"kalmannorm: {error}", file=sys.stderr)
        return Outcome("refused", str(error))
    except Stopped as stopped:
        print(f"kalmannorm: {stopped}", file=sys.stderr)
        return Outcome("stopped", str(stopped))
    except Exception as error:
        traceback.print_exc()
        status = "died" if _of_the_machine(error) else "failed"
        return Outcome(status, f"{type(error).__name__}: {error}".splitlines()[0])


def _of_the_machine(error: BaseException) -> bool:
    """Say whether an exception is the fault of the machine or the launch, and not of the run."""
    kinds: tuple[type[BaseException], ...] = (OSError, MemoryError, ImportError, EOFError)
    if torch := sys.modules.get("torch"):
        kinds += (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError)
    words = ("CUDA error", "NCCL", WORKER_ERROR, "cuDNN error", "CUBLAS", *LOST_PROCESS, *OUT_OF_MEMORY)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def write_failed(config: Config, reason: str) -> None:
    """Write a failed record for a run that will not be tried again, so that tables show the failure."""
    identity = records.run_id(config)
    if records.is_done(config.results, identity):
        return
    record: records.Record = {
        "id": identity,
        "numerics": records.NUMERICS,
        "status": "failed",
        "reason": reason,
        "config": config.result(),
        "host": {"started": datetime.now(UTC).isoformat(timespec="seconds"), "device": config.device},
    }
    records.write(config.results, record)


class _Log(io.TextIOWrapper):
    """Python's stdout or stderr, written to a log file. On a full disk log lines are lost, but the run goes on."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _log_to(file: Path) -> None:
    """Redirect what this process and its children print to a file, including the output of C libraries."""
    with file.open("ab") as log:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = (
        _Log(open(number, "wb", closefd=False), errors="backslashreplace", line_buffering=True)  # noqa: SIM115
        for number in (1, 2)
    )
    print(f"--- {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, process {os.getpid()} on {socket.gethostname()}", flush=True)


def _with_torchrun(config: Config, devices: int, gpus: str | None, lock: int) -> Outcome:
    """Train the run in several processes of this machine. torchrun inherits the lock, since it may outlive this
    process."""
    with tempfile.TemporaryDirectory(prefix="kalmannorm-") as folder:
        order, answer = Path(folder) / "config.json", Path(folder) / "outcome.json"
        order.write_text(json.dumps(config.values()))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]  # not $PET_NNODES
        command += [f"--nproc-per-node={devices}", "-m", "kalmannorm.runs.job", str(order), str(answer)]
        environment = os.environ if gpus is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
        process = subprocess.Popen(command, env=environment, pass_fds=(lock,))
        asked: list[int] = []

        def pass_on(number: int, _: object) -> None:
            asked.append(number)
            process.terminate()  # torchrun passes SIGTERM on to its processes; SIGUSR1 would kill it

        with handling(STOP_SIGNALS, pass_on):
            code = process.wait()
        if answer.exists():
            return Outcome(**json.loads(answer.read_text()))
        if asked:
            return Outcome("stopped", str(Stopped(asked[0])))
        return Outcome("died", f"torchrun ended with exit code {code}")


def main(order: str, answer: str) -> None:
    """Train in one of the processes that `_with_torchrun` started. `order`: file with the configuration; `answer`: file
    for the outcome."""
    from kalmannorm.train.ranks import end_process, leave_with_parent

    leave_with_parent()
    with listening():
        outcome = perform(Config.read(json.loads(Path(order).read_text())))
    if int(os.environ["RANK"]) == 0:
        write_atomically(Path(answer), json.dumps(asdict(outcome)).encode())
    well = outcome.status in ("done", "diverged")
    if not well and int(os.environ["RANK"]):
        time.sleep(2)  # this exit makes torchrun end rank 0, which must first write the reason
    end_process(0 if well else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
