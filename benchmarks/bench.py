"""Measure ratios of speed and memory, both sides taking turns in one process: python benchmarks/bench.py [NAME ...]

Machines are shared and noisy. A result is therefore the median of the ratios of neighbouring steps, with the interval
that holds the middle half of them; single times are printed for orientation only.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmannorm import machine
from kalmannorm.conversion import convert
from kalmannorm.errors import UserError, nearest
from kalmannorm.files import write_atomically
from kalmannorm.models import ARCHS
from kalmannorm.norm import NORMS
from kalmannorm.norm.whitened import KINDS, whiten_weights
from kalmannorm.report.speed import quartiles
from kalmannorm.train.task_classification import memory_format
from kalmannorm.train.timed_steps import GRAD_BATCH, WARM_UP, Pairs, Step, alternate, synthetic_batch, training_step

if TYPE_CHECKING:
    from kalmannorm.train.state import Session


@dataclass(frozen=True)
class Comparison:
    """A ratio, `this` over `against`. `goal`: its upper bound, or with `at_least` its lower bound; None: no goal."""

    this: str
    against: str
    goal: float | None
    at_least: bool = False


# ResNet-32 training steps of 128 images of 32 x 32 pixels, but for the detector's.
COMPARISONS = {
    "grouped-bn": Comparison("BN at stat 2", "torch's BatchNorm at 128", 1.03),
    "kn": Comparison("KN (closed) at stat 2, eager", "BN at stat 2, eager", 1.12),
    "kn-compiled": Comparison("KN (closed) at stat 2, compiled", "BN at stat 2, compiled", 1.03),
    "channels-last": Comparison("KN (closed) at stat 2 in channels_last, eager", "the same in contiguous memory", None),
    "auto": Comparison("images/s of KN at stat 2 as auto trains it", "images/s in fp32, eager", 1.0, at_least=True),
    "sampling": Comparison("KN (sampling) at stat 2", "KN (closed) at stat 2", None),
    "memory": Comparison("bytes KN at stat 2 saves for backward, ResNet-18", "bytes BN at stat 2 saves", 1.05),
    "loop": Comparison("images/s of kalmannorm train", "images/s of the bare step", 0.95, at_least=True),
    "checkpoints": Comparison("5 % of a lite run and its checkpoint", "those steps alone", 1.02),
    "restart": Comparison("time to the first compiled step, KN at 16 pixels", "time without a compile cache", None),
    "processes": Comparison("images/s of 2 processes", "images/s of 1 process with 2 threads", 0.8, at_least=True),
    "detector": Comparison("images/s of mask_rcnn_fpn", "images/s of torchvision's maskrcnn_resnet50_fpn", None),
    # The cost of every other normalizer.
    **{
        f"norm-{name}": Comparison(f"{name}, eager", "BN at stat 2, eager", None)
        for name in NORMS
        if name not in ("bn", "bkn")
    },
    **{f"weights-{kind}": Comparison(f"BN, weights of {kind}, eager", "BN at stat 2, eager", None) for kind in KINDS},
}


def bench(names: list[str], seconds: float, results: Path | None = None) -> int:
    """Run the named comparisons (none: all), about `seconds` each, and print a line for each.

    `results`: folder for bench/NAME.json, with the ratios, machine and commit, and bench/README.md, with the table.
    Return 1 if a goal is missed, else 0. UserError: an unknown name.
    """
    for name in names:
        if name not in COMPARISONS:
            raise UserError(nearest(name, list(COMPARISONS), "comparison"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"ResNet-32, {GRAD_BATCH} images a step, {where}, torch {torch.__version__}")
    missed = 0
    for name in names or COMPARISONS:
        comparison = COMPARISONS[name]
        ratios, note = _MEASURE[name](device, seconds)
        if results is not None:
            host = machine.host(str(device))
            measured = {"comparison": asdict(comparison), "ratios": ratios, "note": note, "host": host}
            text = json.dumps(measured, indent=1, sort_keys=True, allow_nan=False)
            write_atomically(results / "bench" / f"{name}.json", f"{text}\n".encode())
        missed += _met(comparison, ratios) is False
        verdict = f"  goal {_goal(comparison, ratios)}" if comparison.goal is not None else ""
        what = f"{comparison.this} / {comparison.against}"
        print(f"{name:13} {what}: {_middle_half(ratios)}{verdict}  ({note})", flush=True)
    if results is not None:
        write_atomically(results / "bench" / "README.md", _table(results / "bench").encode())
    return 1 if missed else 0


def _met(comparison: Comparison, ratios: Sequence[float]) -> bool | None:
    if comparison.goal is None:
        return None
    middle = statistics.median(ratios)
    return middle >= comparison.goal if comparison.at_least else middle <= comparison.goal


def _goal(comparison: Comparison, ratios: Sequence[float]) -> str:
    """Return the goal and whether it is met, ">= 0.8: met"; "" without a goal."""
    if comparison.goal is None:
        return ""
    verdict = "met" if _met(comparison, ratios) else "missed"
    return f"{'>=' if comparison.at_least else '<='} {comparison.goal:g}: {verdict}"


def _middle_half(ratios: Sequence[float]) -> str:
    """Return median, quartiles and number of the ratios: "1.021 [0.984, 1.173] n = 40"."""
    low, middle, high = quartiles(ratios)
    return f"{middle:.3f}" + (f" [{low:.3f}, {high:.3f}] n = {len(ratios)}" if len(ratios) > 1 else "")


def _table(folder: Path) -> str:
    """Return a table of all kept measurements, in Markdown."""
    lines = [
        "Written by `make bench`: ratios of neighbouring steps, both sides alternating in one process; the median, in",
        "brackets the middle half. ResNet-32 training steps of 128 images of 32 x 32 pixels unless it says otherwise.",
        "",
        "| name | ratio | measured | goal | times | machine, commit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in COMPARISONS:
        if (file := folder / f"{name}.json").exists():
            kept = json.loads(file.read_text())
            comparison, ratios, host = Comparison(**kept["comparison"]), kept["ratios"], kept["host"]
            machine_ = f"{host['hardware']}, {host['threads']} threads, {(host['git']['commit'] or '')[:7]}"
            places = (
                name,
                f"{comparison.this} / {comparison.against}",
                _middle_half(ratios),
                _goal(comparison, ratios),
                kept["note"],
                machine_,
            )
            lines.append(f"| {' | '.join(places)} |")
    return "\n".join([*lines, ""])


def _compare(this: Step, against: Step, seconds: float, device: torch.device) -> tuple[list[float], str]:
    """Return the ratios of neighbouring steps' times, and a note with both median times in ms."""
    pairs = alternate(this, against, seconds, device)
    ours, theirs = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    return [a / b for a, b in pairs], f"{ours:.1f} ms against {theirs:.1f} ms"


def _model(norm: str | None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    plain = ARCHS["resnet32"]()
    return plain if norm is None else convert(plain, norm, stat_batch=2, **options)


def _grouped_bn(device: torch.device, seconds: float) -> tuple[list[float], str]:
    return _compare(training_step(_model("bn"), device), training_step(_model(None), device), seconds, device)


def _kn(device: torch.device, seconds: float) -> tuple[list[float], str]:
    return _compare(training_step(_model("bkn"), device), training_step(_model("bn"), device), seconds, device)


def _norm(name: str, device: torch.device, seconds: float) -> tuple[list[float], str]:
    """Compare a normalizer with BN. Those with batch statistics share them among 2 images."""
    return _compare(training_step(_model(name), device), training_step(_model("bn"), device), seconds, device)


def _weights(kind: str, device: torch.device, seconds: float) -> tuple[list[float], str]:
    """Compare steps with whitened weights, without their refreshes."""
    torch.manual_seed(0)
    plain = ARCHS["resnet32"]()
    whiten_weights(plain, kind)
    this = training_step(convert(plain, "bn", stat_batch=2), device)
    return _compare(this, training_step(_model("bn"), device), seconds, device)


def _channels_last(device: torch.device, seconds: float) -> tuple[list[float], str]:
    x, labels = synthetic_batch()
    last = training_step(_model("bkn"), device, (x.contiguous(memory_format=torch.channels_last), labels))
    return _compare(last, training_step(_model("bkn"), device, (x, labels)), seconds, device)


def _kn_compiled(device: torch.device, seconds: float) -> tuple[list[float], str]:
    print("compiling two ResNet-32s: minutes on a CPU", file=sys.stderr)
    this, against = (training_step(_model(norm), device, compiled=True) for norm in ("bkn", "bn"))
    return _compare(this, against, seconds, device)


def _sampling(device: torch.device, seconds: float) -> tuple[list[float], str]:
    this, against = (training_step(_model("bkn", predictor=p), device) for p in ("sampling", "closed"))
    return _compare(this, against, seconds, device)


def _auto(device: torch.device, seconds: float) -> tuple[list[float], str]:
    """Compare steps at budget lite's 16 pixels: with the precision, memory format and compilation that `auto` chooses,
    and in fp32, eager."""
    from kalmannorm.experiments.config import compose

    config = compose(["dataset=cifar10", "budget=lite", "norm=bkn", f"device={device.type}"])
    chosen: dict[str, Any] = {"compiled": config.compile, "precision": config.precision}
    x, labels = synthetic_batch(size=16)
    batch = x.to(memory_format=memory_format(config, device)), labels
    this = training_step(_model("bkn"), device, batch, **chosen)
    against = training_step(_model("bkn"), device, (x, labels))
    pairs = alternate(this, against, seconds, device)
    ours, theirs = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    form = "compiled" if config.compile else "eager"
    return [b / a for a, b in pairs], f"{config.precision}, {form}: {ours:.1f} ms a step against {theirs:.1f} ms"


def _memory(device: torch.device, seconds: float) -> tuple[list[float], str]:
    """Compare saved bytes at 8 and at 128 images of 32 pixels. Return the larger ratio."""
    ratios, said = [], []
    for images in (8, GRAD_BATCH):
        ours, theirs = (saved_bytes(_resnet18(norm), device, images) for norm in ("bkn", "bn"))
        ratios.append(ours / theirs)
        said.append(f"{images} images {ours / 1e6:.1f} MB against {theirs / 1e6:.1f} MB")
    return [max(ratios)], ", ".join(said)


def _resnet18(norm: str) -> nn.Module:
    from torchvision.models import resnet18

    return convert(resnet18(num_classes=10), norm, stat_batch=2)


def saved_bytes(model: nn.Module, device: torch.device, images: int) -> int:
    """Return the bytes that autograd keeps from forward to backward, each storage counted once, without parameters."""
    model.to(device).train()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, labels = (part.to(device) for part in synthetic_batch(images))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(x), labels)
    loss.backward()
    return sum(kept.values())


@contextmanager
def _training(device: torch.device, steps: int) -> "Iterator[tuple[Session, Step]]":
    """Yield a session of `kalmannorm train`, KN at 2, and a function that trains it for an epoch of `steps` steps.

    The loader, augmentation, progress and logging are those of a real run; the images are random, of CIFAR's size.
    """
    import tempfile

    import numpy as np

    from kalmannorm.data import Arrays
    from kalmannorm.experiments.config import compose
    from kalmannorm.train.loop import open_session, train_epoch
    from kalmannorm.train.progress import Progress
    from kalmannorm.train.ranks import Ranks
    from kalmannorm.train.task_classification import Classification

    config = compose(["dataset=cifar10", "arch=resnet32", "norm=bkn", "budget=smoke", "budget.size=32"])
    config = replace(config, precision="fp32", compile=False, budget=replace(config.budget, epochs=10**6, subset=None))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (steps * GRAD_BATCH, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, len(images))
    task = Classification(config, Ranks(config), Arrays(images, labels, images, labels, 10, {}))
    task.load()
    with tempfile.TemporaryDirectory() as folder, Progress("bench", config) as progress:
        session = open_session("bench", Path(folder), task)
        progress.begin(0, steps, GRAD_BATCH, Path(folder), session.curves)

        def epoch() -> None:
            train_epoch(task, session, task.model, progress)
            session.begin_epoch(session.epoch + 1)

        yield session, epoch


def _loop(device: torch.device, seconds: float) -> tuple[list[float], str]:
    """Compare epochs of 10 steps by `kalmannorm train` with 10 bare steps of the same model."""
    steps = 10
    bare = training_step(_model("bkn"), device)

    def plain() -> None:
        for _ in range(steps):
            bare()

    with _training(device, steps) as (_, epoch):
        ratios, note = _compare(plain, epoch, seconds, device)  # time of bare over time of train: images/s of train
    return ratios, f"{steps} steps bare and trained: {note}"


def _checkpoints(device: torch.device, seconds: float) -> tuple[list[float], str]:
    """Measure the cost of a checkpoint after every 31 steps.

    That is 5 % of CIFAR-10's lite run, the shortest run that is more than a demonstration. Both sides of a ratio have
    the same steps, since the noise between different steps would hide a checkpoint.
    """
    pairs: Pairs = []
    with _training(device, steps=31) as (session, epoch):
        epoch()
        session.save()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(pairs) < 5:
            began = time.perf_counter()
            epoch()
            if device.type == "cuda":
                torch.cuda.synchronize()
            trained = time.perf_counter()
            session.save()
            pairs.append((trained - began, time.perf_counter() - trained))
    steps, saves = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    return [(a + b) / a for a, b in pairs], f"{saves:.0f} ms a checkpoint, {steps:.0f} ms the steps"


def _restart(device: torch.device, seconds: float) -> tuple[list[float], str]:
    """Compare the CPU seconds of two processes in a row, the first of which starts with an empty compile cache.

    The seconds include those of the compilers that each starts. Unlike elapsed time, CPU time does not depend on what
    else the machine does.
    """
    import resource
    import subprocess
    import tempfile

    step = "bench.training_step(bench._model('bkn'), device, bench.synthetic_batch(size=16), compiled=True)()"
    code = f"import bench; device = bench.torch.device('{device}'); {step}"
    print("compiling a ResNet-32: two minutes on a CPU", file=sys.stderr)
    spent = [0.0]
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
            subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, check=True)
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(used.ru_utime + used.ru_stime)
    cold, warm = spent[1], spent[2] - spent[1]
    return [warm / cold], f"{warm:.1f} s against {cold:.1f} s of the processor"


def _processes(device: torch.device, seconds: float) -> tuple[list[float], str]:
    """Compare two processes of one thread and 64 images each with one process of two threads and 128 images, on a CPU,
    step by step in turn."""
    import socket
    import tempfile

    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        spawn(_alternate_processes, (port, seconds, folder), nprocs=2)
        ratios, note = json.loads((Path(folder) / "ratios.json").read_text())
    return ratios, note


def _alternate_processes(rank: int, port: int, seconds: float, folder: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    cpu = torch.device("cpu")
    with warnings.catch_warnings():  # as in train/ranks.py
        warnings.simplefilter("ignore", FutureWarning)
        spread = DistributedDataParallel(_model("bkn"), broadcast_buffers=False)
    together = training_step(spread, cpu, synthetic_batch(GRAD_BATCH // 2))
    alone = training_step(_model("bkn"), cpu) if rank == 0 else None
    pairs: Pairs = []
    end = time.perf_counter() + seconds
    going = torch.ones(1)
    while going.item():
        dist.barrier()
        began = time.perf_counter()
        together()
        dist.barrier()
        both = time.perf_counter() - began
        if alone is not None:
            torch.set_num_threads(2)
            began = time.perf_counter()
            alone()
            pairs.append((time.perf_counter() - began, both))
            torch.set_num_threads(1)
        going.fill_(time.perf_counter() < end or len(pairs) < WARM_UP + 5)
        dist.broadcast(going, 0)
    if rank == 0:
        kept = pairs[WARM_UP:]
        one, two = (1e3 * statistics.median(side) for side in zip(*kept, strict=True))
        note = f"step of one {one:.1f} ms, of two {two:.1f} ms"
        (Path(folder) / "ratios.json").write_text(json.dumps([[a / b for a, b in kept], note]))
    dist.barrier()
    dist.destroy_process_group()


def _detector(device: torch.device, seconds: float) -> tuple[list[float], str]:
    """Compare training steps of two detectors with BN, on the same two images of noise with five objects each: the
    network that `kalmannorm train` builds, and torchvision's, trained as in its training script."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    from kalmannorm.experiments.config import compose
    from kalmannorm.train import detector

    size, long_side = (800, 1333) if device.type == "cuda" else (192, 320)
    budget = ["budget=paper", f"budget.size={size}", f"arch.max_size={long_side}", "batch.grad_batch=2"]
    config = compose(["dataset=coco", "arch=mask_rcnn_fpn", "schedule=c4_280k", "norm=bn", "batch=g8_s2", *budget])
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, size, long_side, generator=generator).to(device) for _ in range(2)]
    targets = []
    for key in range(2):
        corner = torch.rand(5, 2, generator=generator) * size / 2
        boxes = torch.cat([corner, corner + size / 8 + torch.rand(5, 2, generator=generator) * size / 4], 1)
        masks = torch.zeros(5, size, long_side, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels = torch.randint(1, 81, (5,), generator=generator)
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        targets.append({name: value.to(device) for name, value in target.items()} | {"key": key})

    def stepping(model: nn.Module) -> Step:
        model.to(device).train()
        optim = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

        def step() -> None:
            losses = model(images, targets)
            optim.zero_grad()
            sum(losses.values()).backward()
            optim.step()

        return step

    ours: Any = detector.build(config)
    theirs = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=81,
        min_size=size,
        max_size=long_side,
        box_batch_size_per_image=256,
        rpn_anchor_generator=ours.rpn.anchor_generator,  # they shrink with the images
    )
    ratios, note = _compare(stepping(theirs), stepping(ours), seconds, device)
    return ratios, f"2 images of {size} x {long_side}, theirs against ours: {note}"


_MEASURE: dict[str, Callable[[torch.device, float], tuple[list[float], str]]] = {
    "grouped-bn": _grouped_bn,
    "kn": _kn,
    "kn-compiled": _kn_compiled,
    "channels-last": _channels_last,
    "sampling": _sampling,
    "auto": _auto,
    "memory": _memory,
    "loop": _loop,
    "checkpoints": _checkpoints,
    "restart": _restart,
    "processes": _processes,
    "detector": _detector,
    **{f"norm-{name}": functools.partial(_norm, name) for name in NORMS},
    **{f"weights-{kind}": functools.partial(_weights, kind) for kind in KINDS},
}


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 10**6:
        raise argparse.ArgumentTypeError(f"{text}: expected seconds above 0, at most a million")
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure speed and memory as ratios, both sides alternating.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMPARISONS)}; none: all")
    parser.add_argument("--seconds", type=_seconds, default=20, help="per comparison (default 20)")
    parser.add_argument("--results", type=Path, help="folder that keeps the ratios, in bench/NAME.json (default: none)")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it, for the processes that are begun
    try:
        return bench(options.names, options.seconds, options.results)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
