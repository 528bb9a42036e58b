"""Converted networks under torch.compile: the same numbers, for inputs of any size, at the cost of few compilations."""

import copy
import time
from typing import Any

import pytest
import torch
from helpers import Chain, Modern, Residual, conv3x3, error
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.fx import GraphModule

from kalmannorm import compile_blocks, convert, fold, prepare_compiler
from kalmannorm.models import ARCHS
from kalmannorm.models.inception_cifar import Inception, Unit
from kalmannorm.models.resnet_cifar import Block


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def compiled_equals_eager(model: nn.Module, backend: str) -> None:
    eager, compiled = copy.deepcopy(model), copy.deepcopy(model)
    torch._dynamo.reset()
    run = torch.compile(compiled, backend=backend)
    x = torch.randn(4, 3, 8, 8)
    for _ in range(2):
        losses = []
        for network, forward in ((eager, eager), (compiled, run)):
            network.zero_grad()
            loss = forward(x).square().mean()
            loss.backward()
            losses.append(loss.detach())
        assert error(*losses) < 1e-5
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert (a.grad is None) is (b.grad is None)
        if a.grad is not None and b.grad is not None:
            assert (a.grad - b.grad).abs().max() < 1e-4 * max(1, a.grad.abs().max()), name
    for a, b in zip(eager.buffers(), compiled.buffers(), strict=True):
        assert error(b, a) < 1e-5
    eager.eval(), compiled.eval()
    assert error(run(x).detach(), eager(x).detach()) < 1e-5


@pytest.mark.parametrize(
    ("norm", "options", "memory_format"),
    [
        pytest.param("bn", {"stat_batch": 2}, torch.contiguous_format, id="bn", marks=pytest.mark.slow),
        pytest.param("bkn", {"stat_batch": 2, "guard": 100.0}, torch.channels_last, id="bkn", marks=pytest.mark.slow),
        pytest.param("gkn", {}, torch.contiguous_format, id="gkn", marks=pytest.mark.slow),
    ],
)
def test_compiled_network_is_the_eager_one(
    norm: str, options: dict[str, Any], memory_format: torch.memory_format
) -> None:
    """In training and evaluation. Graphs of training alone are in the contract, for every normalizer."""
    model = convert(Residual(), norm, **options).to(memory_format=memory_format)  # type: ignore[call-overload]
    compiled_equals_eager(model, "aot_eager")


@pytest.mark.slow
def test_compiled_sampling_is_the_eager_one() -> None:
    model = convert(Chain(lambda chain, x: chain.relu(x)), "bkn", predictor="sampling", stat_batch=2)
    compiled_equals_eager(model, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_activations_and_gates(backend: str) -> None:
    model = Modern()
    model.depth.p = 0.0  # compiled code draws random numbers of its own
    compiled_equals_eager(convert(model, "bkn", stat_batch=2), backend)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_compiled_by_inductor(norm: str) -> None:
    compiled_equals_eager(convert(Residual(), norm, stat_batch=2), "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_a_deep_network_is_compiled_for_any_batch_at_the_cost_of_one(norm: str) -> None:
    """The last batch of an epoch may be smaller. Compilers then take the sizes for unknowns, and groups of statistics
    must not make that algebra of minutes, as views of the feature maps by groups once did."""
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    model = convert(ARCHS["resnet14"](classes=5), norm, stat_batch=2)
    run = torch.compile(model, backend=compiler)
    seconds = []
    for images in (8, 6, 4):
        began = time.process_time()
        run(torch.randn(images, 3, 8, 8)).sum().backward()
        seconds.append(time.process_time() - began)
    assert compiler.frame_count == 2
    assert seconds[1] < 4 * seconds[0], seconds


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn", "sn", "brn"])
def test_batches_of_several_sizes(norm: str) -> None:
    torch._dynamo.reset()
    eager = convert(Chain(lambda chain, x: chain.relu(x)), norm, **({} if norm == "gkn" else {"stat_batch": 2}))
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, backend="aot_eager")
    for images, side in ((4, 8), (6, 8), (8, 10)):
        x = torch.randn(images, 3, side, side)
        assert error(run(x).detach(), eager(x).detach()) < 1e-5
    for a, b in zip(compiled.buffers(), eager.buffers(), strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.slow
def test_bfloat16_maps_are_transposed_right() -> None:
    """g++ 12.2 compiled 512-bit transpositions of this network into ones that left memory as it was."""
    torch._dynamo.reset()
    prepare_compiler()
    body = Unit(3, 32, 3), Inception(32, 64, (96, 128), (16, 32), 32), nn.MaxPool2d(3, 1, 1), Unit(256, 64, 1)
    eager = convert(nn.Sequential(*body), "bkn", stat_batch=2)
    compiled = copy.deepcopy(eager)
    x = torch.randn(16, 3, 8, 8)
    for forward in (eager, torch.compile(compiled, dynamic=False)):
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(x).mean((2, 3))
        y.float().square().sum().backward()
    for model in (eager, compiled):
        assert all(buffer.isfinite().all() for buffer in model.buffers())
    found, expected = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (compiled, eager))
    assert torch.cosine_similarity(found, expected, 0) > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_prepared_compiler_starts_sooner(activation: type[nn.Module]) -> None:
    """It interprets neither moments nor rules of beliefs, computes the same, and finds the whole graph in its cache."""
    torch._dynamo.reset()
    prepare_compiler()
    torch.compiler.reset()  # as a worker does before each run
    layers = [nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), activation()) for _ in range(3)]
    model = convert(nn.Sequential(*layers), "bkn", stat_batch=2)
    compiler = CompileCounterWithBackend("eager")
    torch.compile(model, backend=compiler)(torch.randn(4, 3, 12, 12))
    (whole,) = compiler.graphs
    graphs = [part.graph for part in whole.modules() if isinstance(part, GraphModule)]
    assert sum(len(graph.nodes) for graph in graphs) < 250  # 545 with ReLU, 614 with SiLU if all is interpreted

    compiled_equals_eager(model, "inductor")
    with fresh_cache():
        for hits in (0, 1):
            torch._dynamo.reset()
            counters.clear()
            torch.compile(model)(torch.randn(4, 3, 8, 8)).square().sum().backward()
            assert counters["aot_autograd"]["autograd_cache_hit"] == hits


@pytest.mark.slow
def test_equal_blocks_are_compiled_once() -> None:
    """A stem, two equal blocks and a third: two graphs of blocks, and two of the stem's layers."""
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("eager")
    blocks = Block(4, 4, 1), Block(4, 4, 1), Block(4, 8, 2)
    plain = nn.Sequential(conv3x3(3, 4), nn.BatchNorm2d(4), *blocks)
    eager = convert(plain, "bkn", stat_batch=2)
    compiled = compile_blocks(copy.deepcopy(eager), backend=compiler)
    x = torch.randn(4, 3, 8, 8)
    for model in (eager, compiled):
        model(x).square().mean().backward()
    assert compiler.frame_count == 4
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert error(b.grad, a.grad) < 1e-4
    for a, b in zip(eager.buffers(), compiled.buffers(), strict=True):
        assert error(b, a) < 1e-5
    assert fold(compiled.eval())(x).shape == (4, 8, 4, 4)


def test_a_network_without_blocks_is_compiled_whole() -> None:
    with pytest.raises(ValueError, match=r"Linear has no two blocks of one class: take torch\.compile\(model\)"):
        compile_blocks(nn.Linear(2, 2))
