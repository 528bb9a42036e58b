"""k processes compute what one does: losses, accuracies, moving statistics, final weights; micro-batches likewise."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.cuda._utils import _get_device_index
from trainings import SPREAD, Runs, assert_same, on_processes, outcome, place, run_all

import kalmannorm
from kalmannorm.cli import main
from kalmannorm.errors import UserError
from kalmannorm.experiments.config import compose
from kalmannorm.train import checkpoint, loop, ranks
from kalmannorm.train.ranks import Ranks

NORMS = {
    "bn": ["norm=bn"],
    "brn": ["norm=brn"],
    "gn": ["norm=gn"],
    "ln": ["norm=ln"],
    "in": ["norm=in"],
    "wn": ["norm=wn"],
    "sn": ["norm=sn"],
    "bkn": ["norm=bkn"],
    "bkn-output": ["norm=bkn", "norm.options.belief=output"],
    "bkn-sampling": ["norm=bkn", "norm.predictor=sampling"],
    "bkn-released": ["norm=bkn", "norm.preset=released"],
    "bkn-guarded": ["norm=bkn", "norm.preset=released", "norm.options.guard=0.5"],
    "bkn-first": ["norm=bkn", "+norm.options.moving_groups=first"],
    "bkn-talk": ["norm=bkn", "norm.preset=talk"],
    "bkn-v1-input": ["norm=bkn", "norm.preset=v1", "+norm.options.input_belief=data"],
    "bkn-input": ["norm=bkn", "+norm.options.input_belief=data"],
    "gkn": ["norm=gkn"],
    "gkn-v1": ["norm=gkn", "norm.preset=v1"],
    "syncbn": ["norm=syncbn"],
    "ibn": ["norm=ibn"],
    "ssn": ["norm=ssn"],
    "zca": ["norm=zca", "norm.options.group=2"],
    # Newton's iterations amplify rounding, five of them to 0.1 of a gradient in six steps (in float64, to 1e-13).
    "itern": ["norm=itern", "norm.options.group=2", "norm.options.iterations=3"],
    "pn": ["norm=pn", "norm.options.gamma_decay=[images,8]"],
    "pn-memory": ["norm=pn", "norm.options.estimator=memory"],
    "bn-mean": ["norm=bn", "+norm.options.var_batch=whole"],
    "bn-wnn": ["norm=bn", "+norm.options.weights={kind: wnn, every: 2, samples: 48, momentum: transform}"],
    "frozen": ["norm=frozen"],
    "none": ["norm=none"],
}
# One for each thing that processes have to agree on: statistics of groups and of the whole batch, drawn noise, a guard,
# whitened weights, images that are counted.
QUICK = ("bn", "syncbn", "bkn-sampling", "bkn-guarded", "bn-wnn", "pn")
# Left to the test on four processes: what looks at one image, or at nothing, and mixtures and variants of what is here.
SLOW = (
    "gn",
    "ln",
    "in",
    "sn",
    "ibn",
    "ssn",
    "itern",
    "pn-memory",
    "bn-mean",
    "frozen",
    "none",
    "bkn-output",
    "bkn-talk",
    "bkn-input",
    "gkn-v1",
)


def test_every_normalizer_is_listed_here():
    assert set(kalmannorm.NORMS) == {overrides[0].removeprefix("norm=") for overrides in NORMS.values()}


def case(norm: str, stat_batch: int, epochs: int = 1) -> list[str]:
    extra = ["norm.options.gain=0.3"] if norm in ("bkn-released", "bkn-guarded") else []
    return [*SPREAD, *NORMS[norm], f"batch.stat_batch={stat_batch}", f"budget.epochs={epochs}", *extra]


def cases(stat_batches: tuple[int, ...], norms: Iterable[str]) -> Runs:
    return {f"{norm}-{stat}": case(norm, stat) for norm in norms for stat in stat_batches}


OTHERS = [norm for norm in NORMS if norm not in (*QUICK, *SLOW)]


@pytest.fixture(scope="module", params=[QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["quick", "others"])
def one_process(request, tmp_path_factory) -> tuple[Path, Runs]:
    """What one process computes, and the runs: with synchronized BN of the whole batch, which no other normalizer can
    do on two."""
    folder, runs = tmp_path_factory.mktemp("one"), cases((2,), request.param)
    runs |= cases((16,), ["syncbn"]) if "syncbn" in request.param else {}
    run_all(folder, runs)
    return folder, runs


def test_two_processes_equal_one(one_process, tmp_path):
    folder, runs = one_process
    assert_same(tmp_path, runs, partial(on_processes, 2), folder)


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path):
    """With a group on each, or two; groups of 16 span them all."""
    runs = cases((4,), NORMS) | cases((2,), SLOW) | cases((16,), ["syncbn"])
    assert_same(tmp_path, runs, partial(on_processes, 4))


def test_micro_batches_equal_whole_ones(one_process, tmp_path):
    folder, runs = one_process
    refuse = ("bkn-released", "bkn-guarded", "syncbn", "pn")
    runs = {name: run for name, run in runs.items() if not name.startswith(refuse)}

    def in_parts(folder: Path, runs: Runs) -> None:
        run_all(folder, {name: [*run, "accumulate=4"] for name, run in runs.items()})

    assert_same(tmp_path, runs, in_parts, folder)


@pytest.mark.slow
def test_micro_batches_on_two_processes_equal_whole_ones_on_one(tmp_path):
    runs = cases((2,), ("bn", "bkn", "bkn-sampling"))

    def in_parts(folder: Path, runs: Runs) -> None:
        on_processes(2, folder, {name: [*run, "accumulate=2"] for name, run in runs.items()})

    assert_same(tmp_path, runs, in_parts)


def launched(monkeypatch, world: int, local_rank: int = 0) -> None:
    """What torchrun sets for one of its processes, which will meet nobody."""
    values = {"WORLD_SIZE": world, "RANK": local_rank, "LOCAL_RANK": local_rank, "MASTER_ADDR": "localhost"}
    for name, value in (values | {"MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    store = SimpleNamespace(set_timeout=lambda _: None)
    monkeypatch.setattr(ranks, "rendezvous", lambda *_, **__: iter([(store, 0, world)]))
    monkeypatch.setattr(ranks, "leave_with_parent", lambda: None)


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        (["batch.stat_batch=8"], 4, ["4 devices", "stat_batch = 8", "span"]),
        (["batch.stat_batch=2"], 3, ["grad_batch = 16", "3 devices"]),
        (["batch.stat_batch=8", "accumulate=4"], 1, ["accumulate = 4", "stat_batch = 8"]),
        (["batch.stat_batch=2", "accumulate=0"], 1, ["accumulate = 0"]),
        (["batch.stat_batch=2", "norm.preset=released", "accumulate=2"], 1, ["guard"]),
        (["norm=syncbn", "accumulate=2"], 1, ["syncbn"]),
    ],
)
def test_batches_that_do_not_divide_are_refused(monkeypatch, overrides, world, words):
    launched(monkeypatch, world)
    with pytest.raises(UserError) as error:
        Ranks(compose([*SPREAD, *overrides]))
    assert all(word in str(error.value) for word in words)


def test_all_collectives_wait_for_what_rank_0_does_alone(monkeypatch):
    """Precise statistics and gaps of a large data set take longer than a process group waits by default."""
    waits = []
    launched(monkeypatch, 2)
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(dist, name, lambda *_, **options: waits.append(options.get("timeout")))
    Ranks(compose([*SPREAD, "batch.stat_batch=2"]))
    assert waits == [ranks.CONTROL_TIMEOUT] * 2


@pytest.mark.parametrize(("asked", "local_rank", "expected"), [("cuda", None, 0), ("cuda:2", None, 2), ("cuda", 1, 1)])
def test_a_gpu_is_chosen_by_its_number(monkeypatch, asked, local_rank, expected):
    """Without a GPU: torch's own check of what it is given, and a stand-in for the tensor that tries the device out."""
    chosen = []
    if local_rank is not None:
        launched(monkeypatch, 2, local_rank)
        for name in ("init_process_group", "new_group"):
            monkeypatch.setattr(dist, name, lambda *_, **__: None)

    def tensor(_: int, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(device=torch.device(device.type, device.index or 0))

    monkeypatch.setattr(torch, "zeros", tensor)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device)))
    elsewhere = [setting for setting in SPREAD if not setting.startswith("device=")]
    device = Ranks(compose([*elsewhere, "batch.stat_batch=2", f"device={asked}"])).device
    assert chosen == [expected] and device == torch.device("cuda", expected)


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*launcher, "-m", "kalmannorm", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_torchrun_trains_once_and_leaves_cleanly(tmp_path):
    done = torchrun(2, "train", *case("bkn", 2), *place(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("moving") == 1 and done.stderr.count("epoch 1/1") == 1
    record, _ = outcome(tmp_path)
    assert record["host"]["processes"] == 2
    again = torchrun(2, "train", *case("bkn", 2), *place(tmp_path))
    assert again.returncode == 0 and "done already" in again.stdout


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_with_its_own_error(tmp_path):
    code = (
        "import os, kalmannorm.train.loop as train\n"
        "from kalmannorm.cli import main\n"
        "real = train._forward_backward\n"
        "def broken(task, session, *rest):\n"
        "    if task.ranks.rank == 1 and session.step == 1: raise RuntimeError(f'rank {task.ranks.rank} has had it')\n"
        "    real(task, session, *rest)\n"
        "train._forward_backward = broken\n"
        f"main(['train', *{case('bkn', 2)!r}, 'results={tmp_path}', 'runs={tmp_path}'])\n"
    )
    (tmp_path / "job.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launcher, str(tmp_path / "job.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "rank 1 has had it" in done.stderr


def test_a_process_that_was_left_alone_says_so(tmp_path, monkeypatch, capsys):
    """By gloo's words, which SIGKILL to another process of a run brings about."""

    def left(config):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:27546. This is")

    monkeypatch.setattr(loop, "run", left)
    assert main(["train", *case("bkn", 2), *place(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "another process of this run has ended" in line


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_s_signal_to_torchrun_saves_and_leaves(tmp_path, number):
    """SIGTERM is handed down; SIGUSR1 ends torchrun, and its processes must not go on by themselves."""
    overrides = case("bkn", 2, epochs=200)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "kalmannorm", "train", *overrides, f"results={tmp_path}", f"runs={tmp_path}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    lines = []
    for line in process.stderr:  # until every process that holds it is gone
        lines.append(line)
        if "epoch 1/200" in line:
            process.send_signal(number)
    assert process.wait() != 0
    assert "".join(lines).count("stopped by SIGTERM; the same command goes on") == 2  # on one line, it may be
    assert not any("epoch 20/200" in line for line in lines)
    (folder,) = (file.parent for file in tmp_path.glob(f"*/{checkpoint.NAME}"))
    assert checkpoint.load(folder, folder.name)["epoch"] >= 1
