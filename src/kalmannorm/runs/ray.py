"""launcher=ray: worker processes, as in pool.py, each started by an actor that Ray places on a cluster's machines."""

import os
import time
from typing import Any

from kalmannorm.errors import UserError, reason
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import run_id
from kalmannorm.machine import cores
from kalmannorm.runs.job import Outcome
from kalmannorm.runs.placement import Options
from kalmannorm.runs.worker import Worker


class OnRay:
    """Executes runs on a Ray cluster. An actor is a Worker; Ray sets CUDA_VISIBLE_DEVICES to the GPUs it assigns to it.
    It is reused from run to run, so that imports happen once. If it dies, its process saves the run and exits."""

    def __init__(self, options: Options, device: str) -> None:
        """Connect to the cluster. UserError: ray is not installed; no cluster at the address; no GPU in it."""
        try:
            import ray
        except ImportError:
            raise UserError("launcher=ray needs ray: pip install 'kalmannorm[launchers]'") from None
        self._ray = ray
        self._began = not ray.is_initialized()
        if self._began:
            _connect(ray, options)
        resources = ray.cluster_resources()
        self._on_gpu = device == "cuda"
        self._share = options.per_gpu
        self._threads = options.threads or (4 if self._on_gpu else 1)
        if self._on_gpu:
            self.devices = min(int(resources.get("GPU", 0)), options.gpu_count or 10**6)
            self.parallel = self.devices * options.per_gpu
            self.title = f"{self.parallel} at once on {self.devices} GPUs of a Ray cluster"
        else:
            self.parallel = self.devices = options.slots or max(1, int(resources.get("CPU", 0)) // self._threads)
            self.title = f"{self.parallel} at once on a Ray cluster, {self._threads} CPU threads each"
        if not self.parallel:
            self.close()
            raise UserError("device=cuda: this Ray cluster has no GPU; pass device=cpu")
        self._idle: list[tuple[int, Any]] = []  # devices, actor
        self._running: dict[Any, tuple[str, int, Any]] = {}  # by the pending result: run, devices, actor

    def room(self, devices: int) -> bool:
        """Say whether there is room for a run. On several GPUs a run takes each of them whole, whatever `per_gpu`."""
        return sum(self._slots(held) for _, held, _ in self._running.values()) + self._slots(devices) <= self.parallel

    def start(self, config: Config, devices: int) -> None:
        actor = self._actor(devices)
        self._running[actor.run.remote(config, devices)] = (run_id(config), devices, actor)

    def ended(self, timeout: float) -> list[tuple[str, Outcome]]:
        """Return the ids and outcomes of the runs that ended; wait up to `timeout` seconds for the first."""
        outcomes = []
        if not self._running:
            time.sleep(timeout)
            return []
        for result in self._ray.wait(list(self._running), timeout=timeout)[0]:
            identity, devices, actor = self._running.pop(result)
            try:
                outcomes.append((identity, self._ray.get(result)))
                self._idle.append((devices, actor))
            except self._ray.exceptions.RayError as error:
                outcomes.append((identity, Outcome("died", f"{type(error).__name__}: {reason(error)}")))
        return outcomes

    def ask_to_stop(self) -> None:
        for _, _, actor in self._running.values():
            actor.ask_to_stop.remote()

    def kill(self) -> None:
        for _, _, actor in self._running.values():
            actor.kill.remote()

    def close(self) -> None:
        if self._began:
            self._ray.shutdown()  # ends the actors, and so their workers

    def _slots(self, devices: int) -> int:
        return devices if devices == 1 or not self._on_gpu else devices * self._share

    def _actor(self, devices: int) -> Any:
        """Return an idle actor with that many devices; if there is none, end the idle ones and start a new one."""
        for entry in self._idle:
            if entry[0] == devices:
                self._idle.remove(entry)
                return entry[1]
        for _, actor in self._idle:
            self._ray.kill(actor)
        self._idle.clear()
        gpus = (1 / self._share if devices == 1 else devices) if self._on_gpu else 0
        # Two calls at a time, since `ask_to_stop` must get through while `run` waits for the worker.
        options = {"num_gpus": gpus, "num_cpus": 0 if self._on_gpu else devices * self._threads, "max_concurrency": 2}
        return self._ray.remote(Worker).options(**options).remote(threads=self._threads)


def _connect(ray: Any, options: Options) -> None:
    """Connect to the named cluster, or start one on this machine. UserError: no cluster answers, or none starts."""
    address = options.address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address:
            ray.init(address=address, log_to_driver=False)
            return
        gpus = {} if options.gpu_count is None else {"num_gpus": options.gpu_count}
        processors = max(cores(), (options.slots or 1) * (options.threads or 1))
        ray.init(num_cpus=processors, include_dashboard=False, log_to_driver=False, **gpus)
    except Exception as error:  # ray raises plain Exceptions, e.g. if its processes start too slowly
        ray.shutdown()
        raise UserError(f"no Ray at {address or 'this machine'}: {reason(error)}") from None
