"""A process that trains runs one after another: imports, the data set's pages and compiled kernels stay with it.

Run by `python -m kalmannorm.runs.worker`: orders arrive as JSON lines on stdin, outcomes leave as JSON lines on what
was stdout. When stdin ends, whoever gave the orders is gone: the run under way is saved, and the process leaves.
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
    """The handle of such a process, which starts with the first run and anew after it died.

    `gpus`: what it may see (CUDA_VISIBLE_DEVICES), None for all that this process sees. `threads`: of its arithmetic.
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
        """Hand over a run; with several devices, `gpus` names those that it may see."""
        if self.process is not None and self.process.poll() is not None:
            self.close()  # it died while it had nothing to do
        if self.process is None:
            self._spawn(config)
        assert self.process is not None and self.process.stdin is not None
        order = {"config": config.values(), "devices": devices, "gpus": gpus}
        with suppress(BrokenPipeError):  # it died since; `outcome` says so
            self.process.stdin.write(json.dumps(order).encode() + b"\n")

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is an outcome."""
        assert self.process is not None and self.process.stdout is not None
        return self.process.stdout.fileno()

    def outcome(self) -> Outcome:
        """Return the outcome of the run that was handed over; wait for it."""
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
        """Let the run under way save a checkpoint, if there is anything to save, and end with the outcome "stopped"."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        """Let an idle process leave."""
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
            # A session of its own: Ctrl-C reaches the sweep alone, which stops its workers in order.
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
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit's, which Slurm sends to every process of a job
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
        except Stopped as stopped:  # ahead of the run itself
            outcome = Outcome("stopped", str(stopped))
        busy.clear()
        answers.write(json.dumps(asdict(outcome)) + "\n")
        if outcome.status == "stopped":
            break  # whoever asked waits for the end of this process
        _free_memory()
    answers.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as in train/ranks.py: what libraries do at exit can only go wrong


def _listen(orders: "queue.Queue[bytes]", busy: threading.Event) -> None:
    with open(0, "rb", buffering=0, closefd=False) as stream:
        while line := stream.readline():
            orders.put(line)
    orders.put(b"")
    busy.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def _free_memory() -> None:
    """Free what other runs on the same GPU may need. Kernels that were compiled stay in inductor's cache."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"].compiler.reset()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        gc.collect()
        sys.modules["torch"].cuda.empty_cache()


if __name__ == "__main__":
    main()
