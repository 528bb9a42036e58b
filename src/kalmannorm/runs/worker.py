"""A process that trains one run after another, so that imports, cached data and compiled kernels are reused.

`python -m kalmannorm.runs.worker` reads orders as JSON lines from stdin and writes outcomes as JSON lines to the
original stdout; prints go to stderr. When stdin ends, its parent is gone: the process saves the current run and exits.
"""

import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from kalmannorm.errors import Stopped
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import run_id
from kalmannorm.files import check_writable
from kalmannorm.runs.job import LOG, Outcome, attempt
from kalmannorm.stopping import listening

COMMAND = [sys.executable, "-m", "kalmannorm.runs.worker"]


class Worker:
    """The handle of a worker process, which is started for the first run, and again after it died.

    `gpus`: its CUDA_VISIBLE_DEVICES; None: all that this process sees. `threads`: its OMP_NUM_THREADS; None: as here.
    """

    def __init__(self, gpus: str | None = None, threads: int | None = None) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._environment = dict(os.environ)
        if gpus is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = gpus
        if threads is not None:
            self._environment["OMP_NUM_THREADS"] = str(threads)
        self._environment["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
        self._environment.pop("FORCE_COLOR", None)  # no colours and bars in log files

    def start(self, config: Config, devices: int = 1, gpus: str | None = None) -> None:
        """Send a run to the process. With several devices, `gpus` names those that the run may see."""
        if self.process is not None and self.process.poll() is not None:
            self.close()  # it died while it was idle
        if self.process is None:
            self._spawn(config)
        assert self.process is not None and self.process.stdin is not None
        order = {"config": config.values(), "devices": devices, "gpus": gpus}
        with suppress(BrokenPipeError):  # it has just died, which `outcome` reports
            self.process.stdin.write(json.dumps(order).encode() + b"\n")

    def fileno(self) -> int:
        """Return the file descriptor that becomes readable when there is an outcome."""
        assert self.process is not None and self.process.stdout is not None
        return self.process.stdout.fileno()

    def outcome(self) -> Outcome:
        """Wait for the outcome of the run that was started, and return it."""
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if line.endswith(b"\n"):
            outcome = Outcome(**json.loads(line))
        else:
            outcome = Outcome("died", f"its process {_death(self.process.wait())}")
        if outcome.status in ("died", "failed", "stopped"):
            self.close()  # after an exception a CUDA context, or torch's state, may be unusable
        return outcome

    def run(self, config: Config, devices: int = 1) -> Outcome:
        self.start(config, devices)
        return self.outcome()

    def ask_to_stop(self) -> None:
        """Ask the current run to save a checkpoint, if there is anything to save, and to end as "stopped"."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        """Let an idle process exit; kill it if it takes more than 30 seconds."""
        if self.process is None:
            return
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process.stdout.close()
        self.process = None

    def _spawn(self, first: Config) -> None:
        log = Path(first.runs) / run_id(first) / LOG
        check_writable(log.parent)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            # In a session of its own, so that Ctrl-C reaches only the sweep, which then stops its workers.
            self.process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                bufsize=0,
                env=self._environment,
                start_new_session=True,
            )


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def main() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm sends submitit's signal to every process of a job
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    orders: queue.Queue[bytes] = queue.Queue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(orders, busy), daemon=True).start()
    while line := orders.get():
        order = json.loads(line)
        busy.set()
        try:
            with listening():
                outcome = attempt(Config.read(order["config"]), order["devices"], order["gpus"])
        except Stopped as stopped:  # before or after the run itself
            outcome = Outcome("stopped", str(stopped))
        busy.clear()
        answers.write(json.dumps(asdict(outcome)) + "\n")
        if outcome.status == "stopped":
            break  # the parent waits for this process to end
        _free_memory()
    answers.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as in train/ranks.py: libraries' exit handlers may abort


def _listen(orders: "queue.Queue[bytes]", busy: threading.Event) -> None:
    with open(0, "rb", buffering=0, closefd=False) as stream:
        while line := stream.readline():
            orders.put(line)
    orders.put(b"")
    busy.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def _free_memory() -> None:
    """Free memory that other runs on the same GPU may need. Compiled kernels stay in inductor's cache."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"].compiler.reset()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        gc.collect()
        sys.modules["torch"].cuda.empty_cache()


if __name__ == "__main__":
    main()
