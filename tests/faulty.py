"""A sweep whose runs misbehave as a plan says; the product knows nothing of it.

    python faulty.py PLAN sweep table7 ...        the command line, whose worker processes are
    python faulty.py PLAN worker [real]           one in which `execute` is replaced, or (real) goes wrong beforehand

PLAN is a JSON file: {run id or "*": [what the first attempt does, the second, ...]}; beyond the list, all is well. What
was attempted stands in PLAN.attempts, a line each: run id, process id, action.
"""

import errno
import json
import os
import signal
import sys
import time
import types
from pathlib import Path

from kalmannorm.errors import Stopped, UserError
from kalmannorm.experiments import record as records
from kalmannorm.experiments.config import Config

HERE = Path(__file__).resolve()
MACHINE = {
    "memory": MemoryError("injected"),
    "disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "library": ImportError("libcudart.so"),
    "peer": RuntimeError("Connection closed by peer [127.0.0.1]:27546"),  # gloo's, where another process was killed
}


def attempts(plan: Path) -> list[tuple[str, int, str]]:
    file = Path(f"{plan}.attempts")
    lines = file.read_text().splitlines() if file.exists() else []
    return [(run, int(process), action) for run, process, action in (line.split() for line in lines)]


def next_action(plan: Path, identity: str) -> str:
    actions = json.loads(plan.read_text())
    before = sum(run == identity for run, _, _ in attempts(plan))
    wanted = actions.get(identity, actions.get("*", []))
    action = wanted[before] if before < len(wanted) else "fine"
    with Path(f"{plan}.attempts").open("a") as file:
        file.write(f"{identity} {os.getpid()} {action}\n")
    return action


def misbehave(action: str) -> None:
    print(f"about to {action}", flush=True)
    if action == "raise":
        raise RuntimeError("injected")
    if action in MACHINE:
        raise MACHINE[action]
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "refuse":
        raise UserError("no such data: get it")
    if action == "hang":
        asked: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
        while not asked:
            time.sleep(0.01)
        raise Stopped(asked[0])
    if action.startswith("sleep"):
        time.sleep(float(action.removeprefix("sleep")))


def record_of(config: Config) -> dict:
    """A record without a training."""
    final = {kind: {"accuracy": 50.0, "loss": 1.0, "images": 10} for kind in ("moving", "online", "precise")}
    host = {"started": "2026-01-01", "device": "cpu", "seconds": 2.0, "train_seconds": 1.0, "images_per_s": 100.0}
    record = {"id": records.run_id(config), "numerics": records.NUMERICS, "status": "done", "reason": None}
    return record | {"config": config.result(), "final": final, "host": host, "data": {"train_images": 256}}


def worker(plan: Path, real: bool) -> None:
    from kalmannorm.runs import worker

    def execute(config: Config) -> dict:
        action = next_action(plan, records.run_id(config))
        misbehave(action)
        if real:
            return trained(config)
        record = record_of(config)
        if action == "diverge":
            record |= {"status": "failed", "reason": "the loss is not finite"}
        records.write(config.results, record)
        return record

    if real:
        from kalmannorm.train import run as module

        trained, module.execute = module.execute, execute
    else:  # without torch, which takes seconds to import
        module = types.ModuleType("kalmannorm.train.run")
        module.execute = execute
        sys.modules["kalmannorm.train.run"] = module
    worker.main()


def main(plan: str, command: str, *arguments: str) -> int:
    if command == "worker":
        worker(Path(plan), "real" in arguments)
    from kalmannorm.cli import main
    from kalmannorm.runs import worker as workers

    workers.COMMAND = worker_command(plan)
    return main([command, *arguments])


def worker_command(plan: Path | str) -> list[str]:
    return [sys.executable, str(HERE), str(plan), "worker", *(["real"] if "FAULTY_REAL" in os.environ else [])]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
