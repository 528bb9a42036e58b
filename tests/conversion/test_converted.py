"""What converted networks are and do: copies, fold, groups, layouts, autocast, wrappers (also: test_convert.py)."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    FEW,
    MODELS,
    SAMPLING,
    Modern,
    Moody,
    Residual,
    equal_states,
    error,
    images,
    loss_of,
    quick,
    train_step,
    trained,
)
from torch import nn

from kalmannorm import belief_report, convert, fold, precise_statistics, set_statistics


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- copies ---


@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn"])
def test_the_original_is_untouched(norm: str) -> None:
    model = trained(Residual())
    state, modules = copy.deepcopy(model.state_dict()), {n: type(m) for n, m in model.named_modules()}
    converted = convert(model, norm, **({} if norm == "gkn" else SAMPLING if norm == "bkn" else {"stat_batch": 2}))
    trained(converted)
    assert {n: type(m) for n, m in model.named_modules()} == modules
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not equal_states(model, converted)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in converted.parameters()}
    assert not shared


def round_trips(tmp_path: Path) -> dict[str, Callable[[nn.Module], nn.Module]]:
    def saved(model: nn.Module) -> nn.Module:
        torch.save(model, tmp_path / "model.pt")
        return torch.load(tmp_path / "model.pt", weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "torch.save": saved,
        "deepcopy of a copy": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
    }


@pytest.mark.parametrize("trip", ["deepcopy", "pickle", "torch.save", "deepcopy of a copy"])
@pytest.mark.parametrize("predictor", ["closed", "sampling"])
def test_copies_are_equal_and_independent(trip: str, predictor: str, tmp_path: Path) -> None:
    model = trained(convert(Residual(), "bkn", stat_batch=2, predictor=predictor, input_belief=([0.0] * 3, [1.0] * 3)))
    twin = round_trips(tmp_path)[trip](model)
    assert type(twin) is type(model) and belief_report(twin) == belief_report(model)
    assert equal_states(model, twin)
    x = images()
    assert torch.equal(train_step(model, x), train_step(twin, x))
    assert equal_states(model, twin)
    before = copy.deepcopy(model.state_dict())
    trained(twin)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items() if torch.is_tensor(value))
    # fold reads the copy's own values, not those of the model it was copied from
    for network in (model, twin):
        network.eval()
        torch.testing.assert_close(fold(network)(x), network(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), twin(x))


@pytest.mark.parametrize("predictor", ["closed", "sampling"])
def test_state_dict_round_trip(predictor: str) -> None:
    """Into a fresh conversion; the sampling predictor goes on at the step it had reached."""
    model = trained(convert(Residual(), "bkn", stat_batch=2, predictor=predictor))
    fresh = convert(Residual(), "bkn", stat_batch=2, predictor=predictor)
    fresh.load_state_dict(model.state_dict())
    x = images()
    assert torch.equal(train_step(model, x), train_step(fresh, x)) and equal_states(model, fresh)
    folded = fold(model.eval())
    Residual().load_state_dict(folded.state_dict())
    convert(Residual(), "bn").load_state_dict(folded.state_dict())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_changes_of_type_and_parts_reach_fold() -> None:
    model = convert(trained(Residual()), "bkn", stat_batch=2, input_belief=([0.0] * 3, [1.0] * 3)).double()
    assert all(t.dtype in (torch.float64, torch.int64) for t in (*model.parameters(), *model.buffers()))
    x = images().double()
    trained_loss = loss_of(model(x))
    assert trained_loss.dtype == torch.float64
    model.fc = nn.Linear(12, 7).double()
    model.eval()
    assert fold(model)(x).shape == (4, 7)
    torch.testing.assert_close(fold(model)(x), model(x))


# --- fold ---


@pytest.mark.parametrize("name", quick([*FEW, "resnet50"], *FEW))
def test_fold_gives_the_original_back(name: str) -> None:
    model = MODELS[name]()
    options = {"stat_batch": 2, "predictor": "sampling"} if name == "resnet14" else {"stat_batch": 2}
    converted = convert(model, "bkn", **options)
    x = images(4, 32)
    with torch.no_grad():
        converted.train()(x)  # moving statistics that are not those of the start
        for p in converted.parameters():
            p.add_(0.1 * p.std(correction=0) * torch.randn_like(p) + 0.01)
    folded = fold(converted.eval())
    assert type(folded) is type(model) and not folded.training
    assert list(folded.state_dict()) == list(model.state_dict())
    assert [n for n, _ in folded.named_modules()] == [n for n, _ in model.named_modules()]
    types = {type(m).__module__ for m in folded.modules()}
    assert not any(t.startswith("kalmannorm") and not t.startswith("kalmannorm.models") for t in types)
    with torch.no_grad():
        assert error(folded(x), converted(x)) < 1e-5
        before = converted.fc.weight.clone()
        folded.fc.weight.zero_()  # an ordinary model, on its own
    assert torch.equal(before, converted.fc.weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet14", "inception_cifar"])
def test_folded_models_export_to_onnx(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = fold(trained(convert(MODELS[name](), "bkn", stat_batch=2)).eval())
    x = images(2)
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), input_names=["image"], output_names=["logits"])
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"image": x.numpy()})
    assert error(torch.from_numpy(found), model(x).detach()) < 1e-4


# --- what a whole network keeps of its layers' properties ---


@pytest.mark.parametrize(
    ("norm", "options"),
    [("bn", {}), ("bkn", {}), ("bkn", {"predictor": "sampling"}), ("bkn", {"belief": "output"})],
)
@pytest.mark.parametrize("network", [Residual, Modern])
def test_groups_do_not_leak_through_a_network(network: type[nn.Module], norm: str, options: dict[str, Any]) -> None:
    model = convert(network(), norm, stat_batch=2, **options)
    model.eval()  # fixed noise
    set_statistics(model, "online")
    x = images(8)
    changed = x.clone()
    changed[5] += 1
    y, z = model(x), model(changed)
    for i in range(8):
        assert torch.equal(y[i], z[i]) is (i % 4 != 1)


@pytest.mark.parametrize("belief", ["posterior", "output"])
@pytest.mark.parametrize("input_belief", [None, ([0.0] * 3, [1.0] * 3)], ids=["", "input_belief"])
def test_sampling_does_not_depend_on_the_number_of_devices(belief: str, input_belief: Any) -> None:
    """Two devices that are dealt the images in turn compute what one does: with one row per group, or one for all."""
    model = convert(Residual(), "bkn", belief=belief, input_belief=input_belief, **SAMPLING)
    x = images(8)
    whole = copy.deepcopy(model)(x)
    for rank in range(2):
        device = copy.deepcopy(model)
        for module in device.modules():
            if hasattr(module, "shard"):
                module.shard = (rank, 2)
        torch.testing.assert_close(device(x[rank::2]), whole[rank::2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn"])
def test_networks_in_channels_last(norm: str) -> None:
    model = convert(Residual(), norm, **({} if norm == "gkn" else {"stat_batch": 2})).double()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x, results = images().double(), []
    for network, batch in ((model, x), (last, x.contiguous(memory_format=torch.channels_last))):
        out = network(batch)
        gradients = torch.autograd.grad(loss_of(out), list(network.parameters()))
        results.append([out.detach(), *gradients, *network.buffers()])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-12 * max(1, b.abs().max())


@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn"])
@pytest.mark.parametrize("network", [Residual, Modern])
def test_networks_under_autocast(network: type[nn.Module], norm: str) -> None:
    model = convert(network(), norm, **({} if norm == "gkn" else {"stat_batch": 2}))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images())
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(b.dtype in (torch.float32, torch.int64) for b in model.buffers())


def test_precise_statistics_of_a_network() -> None:
    """In evaluation code (no auxiliary head, no dropout), and the modes come back."""
    model = convert(Moody(), "bkn", stat_batch=2).train()
    model.bn.eval()
    x = images(8)
    model(x)
    auxiliary = model.aux_bn.running_mean.clone()
    precise_statistics(model, [x, x])
    posterior = [model.conv(x)[g::4].transpose(0, 1).flatten(1).mean(1) for g in range(4)]
    assert error(model.bn.running_mean, torch.stack(posterior).mean(0).detach()) < 1e-5
    assert model.training and not model.bn.training and model.aux_bn.training
    assert torch.equal(model.aux_bn.running_mean, auxiliary), "a layer that did not run has no new statistics"


# --- wrappers ---


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("norm", "options", "frozen"),
    [
        ("bn", {"stat_batch": 2}, False),
        ("bkn", {"stat_batch": 2}, False),
        ("bkn", {"stat_batch": 2}, True),
        ("bkn", SAMPLING, False),
        ("gn", {}, False),
        ("gkn", {}, False),
    ],
    ids=["bn", "bkn", "bkn-frozen", "bkn-sampling", "gn", "gkn"],
)
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("network", [Residual, Modern])
def test_ddp_needs_no_search_for_unused_parameters(
    network: type[nn.Module], norm: str, options: dict[str, Any], frozen: bool
) -> None:
    """Normalizers without a prior have idle parameters, and so have those that are frozen in evaluation mode."""
    model = convert(network(), norm, **options)
    if frozen:
        model.bn.eval(), model.bn2.eval()
    alone = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for i in range(3):
        x = images()
        assert error(train_step(wrapped, x, i), train_step(alone, x, i)) < 1e-5
