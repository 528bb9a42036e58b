"""convert and fold: what is kept, modes, copies, wrappers, errors (also: test_thread.py, test_compile.py)."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import Chain, Modern, Moody, Perceptron, Residual, conv3x3, error
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm import NORMS, belief_report, convert, fold, precise_statistics, set_statistics
from kalmannorm.models import ARCHS

MODELS: dict[str, Callable[[], nn.Module]] = {
    **ARCHS,
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "moody": Moody,
    "modern": Modern,
}
FEW = ("inception_cifar", "resnet14", "resnet14_preact", "resnet18", "moody", "modern")
SAMPLING = {"predictor": "sampling", "stat_batch": 2}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images(n: int = 4, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size)


def loss_of(out: Any) -> Tensor:
    return sum(o.square().mean() for o in out) if isinstance(out, tuple) else out.square().mean()  # type: ignore[return-value]


def train_step(model: nn.Module, x: Tensor, seed: int = 0) -> Tensor:
    """A forward, a backward and a step of a size that no network explodes at; the loss."""
    torch.manual_seed(seed)  # dropout
    loss = loss_of(model(x))
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.01 * p.grad.sign()
    return loss.detach()


def trained(model: nn.Module, steps: int = 2) -> nn.Module:
    """With moving statistics and affine parameters that are not those of the start."""
    model.train()
    for i in range(steps):
        train_step(model, images(), i)
    return model


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


# --- what is kept ---


@pytest.mark.parametrize("norm", ["bn", "bkn", "gn", "gkn"])
@pytest.mark.parametrize("name", MODELS)
def test_state_dict_keys_are_kept_in_order(name: str, norm: str) -> None:
    model = MODELS[name]()
    converted = convert(model, norm)
    kept, original = list(converted.state_dict()), list(model.state_dict())
    if norm in ("gn", "gkn"):
        original = [key for key in original if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert [key for key in kept if key in set(original)] == original
    own = {key.rpartition(".")[2] for key in kept if key not in set(original)}
    assert own == ({"gain_logit", "noise_raw"} if norm in ("bkn", "gkn") else set())
    assert [n for n, _ in converted.named_parameters() if n in set(original)] == [
        n for n, _ in model.named_parameters()
    ]


@pytest.mark.parametrize("norm", ["bn", "bkn", "gn", "gkn"])
def test_settings_and_values_are_kept(norm: str) -> None:
    model = trained(Residual())
    model.bn1.weight.requires_grad_(False)
    converted = convert(model, norm)
    for name, old in model.named_modules():
        if not isinstance(old, _BatchNorm):
            continue
        new = converted.get_submodule(name)
        assert type(new) is type(NORMS[norm](8))
        assert new.eps == old.eps and torch.equal(new.weight, old.weight) and torch.equal(new.bias, old.bias)
        assert new.weight.requires_grad == old.weight.requires_grad and new.bias.requires_grad
        if norm in ("bn", "bkn"):
            assert new.momentum == old.momentum and new.num_batches_tracked == 2
            assert torch.equal(new.running_mean, old.running_mean) and torch.equal(new.running_var, old.running_var)
    assert converted.get_submodule("bn").eps == 1e-4
    assert torch.equal(converted.conv.weight, model.conv.weight)


@pytest.mark.parametrize("name", MODELS)
def test_bn_of_the_whole_batch_is_the_original_bit_for_bit(name: str) -> None:
    """In training and evaluation, gradients and moving values included, whichever mode it was converted in."""
    model, x = MODELS[name](), images(2, 32 if name in ("resnet18", "resnet50", "resnet101") else 8)
    copies = []
    for training in (True, False):
        copies.append(convert(model.train(training), "bn"))
        assert copies[-1].training is training
    networks = [model, *copies]
    for training in (True, False):
        outputs, gradients = [], []
        for network in networks:
            torch.manual_seed(1)  # dropout
            out = network.train(training)(x)
            outputs.append(out if isinstance(out, tuple) else (out,))
            if training:
                gradients.append(torch.autograd.grad(loss_of(out), list(network.parameters())))
        for of_copy in (*outputs[1:], *gradients[1:]):
            original = outputs[0] if len(of_copy) == len(outputs[0]) else gradients[0]
            assert all(torch.equal(a, b) for a, b in zip(of_copy, original, strict=True))
    assert all(equal_states(model, twin) for twin in copies)


def test_modes_differ_as_the_originals_do() -> None:
    for mode in (True, False):
        converted = convert(Moody().train(mode), "bkn", stat_batch=2)
        x = images()
        assert isinstance(converted.train()(x), tuple)
        assert not torch.equal(converted(x)[0], converted(x)[0])  # dropout
        converted.eval()
        assert torch.is_tensor(converted(x)) and torch.equal(converted(x), converted(x))
        assert converted.code != converted.train().code
        assert "aux_bn" in belief_report(converted)


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_modes_of_submodules_are_kept(again: bool) -> None:
    """A frozen BatchNorm stays frozen, and the original is left as it was."""
    model = Residual().train()
    model.bn1.eval(), model.shortcut.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    converted = convert(model, "bkn", stat_batch=2)
    if again:
        converted = convert(converted, "bn")
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: m.training for name, m in converted.named_modules()} == modes


def test_modes_of_submodules_are_kept_by_fold() -> None:
    model = Residual().train()
    model.bn1.eval()
    folded = fold(convert(model, "bkn", stat_batch=2))
    assert {name: m.training for name, m in folded.named_modules()} == {n: m.training for n, m in model.named_modules()}


def test_code_is_readable() -> None:
    code = convert(Residual(), "bkn", stat_batch=2).code
    for line in (
        "conv1_belief = kalmannorm_belief_conv(relu_belief, conv1_weight, None, 1)",
        "bn1 = self.bn1(conv1, conv1_belief)",
        "bn1_y = bn1[0]",
        "bn1_y_belief = bn1[1]",
    ):
        assert line in code, code
    assert "belief" not in convert(Residual(), "bn").code


def test_layers_without_a_trace_of_their_own() -> None:
    """affine=False, track_running_stats=False: the same keys, and the same outputs in both modes."""
    for options in ({"affine": False}, {"track_running_stats": False}):
        model = nn.Sequential(conv3x3(3, 4), nn.BatchNorm2d(4, **options))
        converted = convert(model, "bn")
        for network in (model, converted, fold(converted)):
            network.train()
        x = images()
        assert torch.equal(converted(x), model(x))
        model.eval(), converted.eval()
        x = images()
        assert torch.equal(converted(x), model(x))
        assert set(model.state_dict()) <= set(converted.state_dict())
        assert not any(
            p.requires_grad for n, p in converted.named_parameters() if n not in dict(model.named_parameters())
        )
        folded = fold(converted)
        assert list(folded.state_dict()) == list(model.state_dict()) and torch.equal(folded(x), model(x))


def test_models_with_two_dimensional_inputs() -> None:
    model = trained_perceptron()
    converted = convert(model, "bn")
    x = torch.randn(8, 3)
    assert torch.equal(converted(x), model(x))
    folded = fold(convert(model, "bkn", stat_batch=2).eval())
    assert type(folded.bn1) is nn.BatchNorm1d
    torch.testing.assert_close(folded(x), model.eval()(x))


def trained_perceptron() -> nn.Module:
    model = Perceptron().train()
    model(torch.randn(8, 3) + 1)
    return model


def test_a_normalizer_with_two_names_is_converted() -> None:
    """Shared layers, under whichever name they are called."""
    model = Chain(lambda self, x: F.relu(self.again(x)))
    model.again = model.bn1
    converted = convert(model, "bkn", stat_batch=2)
    assert converted.again is converted.bn1
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())
    reference = convert(copy.deepcopy(model), "bn")
    x = images()
    assert torch.equal(reference(x), model(x))


class Named(nn.Module):
    """Names that a wrapper could use itself; constants that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.code = conv3x3(3, 4), nn.BatchNorm2d(4)
        self.report, self.name = conv3x3(4, 4), nn.BatchNorm2d(4)
        self.scale = torch.tensor(0.5)
        self.register_buffer("input_mean", torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.code(self.source((x - self.input_mean) * self.scale)))
        return self.name(self.report(x * torch.tensor([2.0])))


class Centred(nn.Module):
    """A buffer by the name of one of convert's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3x3(3, 4), nn.BatchNorm2d(4)
        self.register_buffer("input_mean", torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x - self.input_mean))


def test_names_and_constants_of_the_users_own() -> None:
    model = Named()
    converted = convert(model, "bn")
    x = images()
    assert torch.equal(converted(x), model(x))
    assert torch.equal(fold(converted).eval()(x), model.eval()(x))


def test_buffers_by_the_name_of_the_input_belief() -> None:
    model = Centred()
    x = images()
    assert torch.equal(fold(convert(model, "bn"))(x), model(x))
    converted = convert(model, "bkn", input_belief=(torch.zeros(3), torch.ones(3)))
    folded = fold(converted.eval())
    assert equal_states(folded, model)
    torch.testing.assert_close(folded(x), model.eval()(x))


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
    assert type(twin) is type(model) and twin.code == model.code and belief_report(twin) == belief_report(model)
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
    model.fc = nn.Linear(8, 7).double()
    model.eval()
    assert fold(model)(x).shape == (4, 7)
    torch.testing.assert_close(fold(model)(x), model(x))


# --- a model that was converted before ---


def test_converting_a_converted_model() -> None:
    first = trained(convert(Residual(), "bkn", preset="paper", **SAMPLING))
    bn = convert(first, "bn", stat_batch=2)
    assert type(bn) is type(first) and bn.training and list(bn.state_dict()) == list(Residual().state_dict())
    assert equal_states(bn, fold(first)) and not belief_report(bn)
    again = convert(bn, "bkn", stat_batch=2)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in bn.state_dict().items())
    assert belief_report(again)["bn1"] is None
    assert again.get_submodule("bn").momentum == 0.3 and again.get_submodule("bn").eps == 1e-4


@pytest.mark.parametrize("norm", ["gn", "gkn"])
def test_fold_and_conversion_of_what_has_no_moving_statistics(norm: str) -> None:
    converted = convert(Residual(), norm)
    with pytest.raises(ValueError, match=r"bn1? .*no moving statistics"):
        fold(converted)
    with pytest.raises(ValueError, match="no moving statistics"):
        convert(converted, "bn")


# --- fold ---


@pytest.mark.parametrize("name", [*FEW, "resnet50"])
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


# --- errors ---


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("bnk", {}, "unknown normalizer 'bnk'; .*bkn"),
        ("bkn", {"preset": "papper"}, "unknown preset 'papper'; .*paper, released"),
        ("bkn", {"predictor": "exact"}, "'closed' or 'sampling', not 'exact'"),
        ("bkn", {"gian": 0.3}, "'bkn'.*gian"),
        ("gn", {"gian": 0.3}, "'gn'.*gian"),
        ("bn", {"gain": 0.3}, "'bn'.*gain"),
        ("bkn", {"gain": 1.0}, "bn: gain 1 cannot be learned"),
        ("gkn", {"num_groups": 5}, "bn: 5 groups do not divide 6 channels"),
        ("gn", {"num_groups": 4}, "bn: 4 groups do not divide 6 channels"),
        ("bkn", {"stat_batch": 0}, "stat_batch must be at least 1, not 0"),
        ("bkn", {"preset": "released", "stat_batch": 4}, r"statistics batch 2 \(0\.1\) and 128 \(0\.95\) only, not 4"),
    ],
)
def test_bad_arguments(norm: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(Residual(), norm, **options)


def test_released_preset() -> None:
    for stat_batch, gain in ((2, 0.1), (128, 0.95)):
        layer = convert(Residual(), "bkn", preset="released", stat_batch=stat_batch).bn1
        assert layer.gain == gain and layer.noise_raw is None and layer.guard == 100 and layer.mixture
        assert layer.moving_groups == "first" and layer.first_unbiased
    over = convert(Residual(), "bkn", preset="released", stat_batch=4, gain=0.3, mixture=False).bn1
    assert over.gain == 0.3 and not over.mixture and over.guard == 100
    model = convert(Residual(), "bkn", preset="released", stat_batch=2)
    assert "sampled_conv" in model.code
    assert "sampled_conv" not in convert(Residual(), "bkn", preset="released", stat_batch=2, predictor="closed").code
    paper = convert(Residual(), "bkn", stat_batch=2).bn1
    assert paper.gain_logit is not None and paper.noise_raw is not None and paper.guard is None and not paper.mixture


def test_models_that_cannot_be_converted() -> None:
    with pytest.raises(ValueError, match="Linear has no BatchNorm layer"):
        convert(nn.Linear(2, 2), "bkn")
    for function in (fold, belief_report):
        with pytest.raises(ValueError, match="Residual is not a converted model"):
            function(Residual())


def branches_on_values(self: Chain, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x  # the line that is to be named


def test_untraceable_models_are_told_their_line() -> None:
    model = Chain(branches_on_values).eval()
    line = branches_on_values.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match=rf"cannot trace Chain.*test_convert\.py:{line}: return x if x\.sum\(\) > 0"):
        convert(model, "bkn")
    assert not any(m.training for m in model.modules())


def test_errors_of_a_converted_network_name_the_layer() -> None:
    model = convert(Residual(), "bkn", stat_batch=1)
    with pytest.raises(ValueError, match=r"^bn1: statistics of a single value"):
        model(images(2, 2))  # 1 x 1 behind the strided convolution
    model = convert(Residual(), "bkn", stat_batch=4)
    with pytest.raises(ValueError, match=r"^bn: a batch of 6 images"):
        model(images(6))
