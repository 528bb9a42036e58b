"""Converted models in others' hands: half types, feature extractors, pruning, sharding, replicas."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from converted import OPTIONS, Net, converted, images, priors
from helpers import quick
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat, quantize_dynamic
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.models import ResNet, resnet18
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.resnet import BasicBlock

from kalmannorm import KalmanBatchNorm2d, KalmanGroupNorm, belief_report, convert, fold
from kalmannorm.conversion import untraced
from kalmannorm.norm.moments import Predictor


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_models_in_half_precision(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Whatever is half as long there, statistics and beliefs are not."""
    model, x = converted(**options), images()
    wide, half = copy.deepcopy(model), copy.deepcopy(model).to(dtype)
    for mode in (True, False):
        a, b = wide.train(mode)(x), half.train(mode)(x.to(dtype))
        assert b.dtype == dtype and (a - b).abs().max() < (0.02 if dtype == torch.float16 else 0.1)
    half.train()(x.to(dtype)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_models_on_the_device_meta(options: dict[str, Any]) -> None:
    model = converted(**options).to("meta")
    assert model(images().to("meta")).shape == (4, 4)


# --- graphs of torch.fx -----------------------------------------------------------------------------------------------


def feature_extractor(model: nn.Module) -> nn.Module:
    return create_feature_extractor(model, ["layer1", "layer4"])


def last(value: Any) -> Tensor:
    return value["layer4"] if isinstance(value, dict) else value


@pytest.mark.parametrize("options", quick(OPTIONS[:3], OPTIONS[0]), ids=str)
@pytest.mark.parametrize("graph", quick([feature_extractor, fx.symbolic_trace], fx.symbolic_trace))
def test_graphs_and_their_copies_keep_beliefs(graph: Any, options: dict[str, Any]) -> None:
    """In both modes, which are two graphs of a feature extractor; computed as the model itself does."""
    original, x = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4), torch.randn(4, 3, 32, 32)
    model = convert(graph(original), "bkn", stat_batch=2, **options)
    plain = convert(original, "bkn", stat_batch=2, **options)
    if graph is feature_extractor:
        assert untraced(model) == {"": "DualGraphModule: its graph may change"}
        plain.avgpool, plain.fc = nn.Identity(), nn.Identity()
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for twin in (model, copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model).eval()), again):
        assert priors(twin, x) == priors(plain, x) >= 11
        for mode in (True, False):
            # What is drawn goes by the convolutions' numbers, which differ where nothing is traced.
            like = model if options.get("predictor") == "sampling" else plain
            expected = last(copy.deepcopy(like).train(mode)(x))
            assert torch.equal(last(copy.deepcopy(twin).train(mode)(x)).flatten(), expected.flatten())
    folded = fold(model).eval()
    torch.testing.assert_close(last(folded(x)), last(model.eval()(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    quick([*OPTIONS[:2], OPTIONS[3], {"input_belief": (torch.zeros(3), torch.ones(3))}], OPTIONS[1]),
    ids=str,
)
@pytest.mark.parametrize("name", quick(["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"], "resnet18"))
def test_a_converted_model_is_traced(name: str, options: dict[str, Any]) -> None:
    """The graph has beliefs: it computes what the model does in training as well, and keeps the same statistics."""
    model = convert(getattr(torchvision.models, name)(num_classes=4), "bkn", stat_batch=2, **options)
    x = torch.randn(4, 3, 64, 64)
    for mode in (True, False):
        one, other = (copy.deepcopy(model).train(mode) for _ in range(2))
        graph = pickle.loads(pickle.dumps(fx.symbolic_trace(other)))
        assert torch.equal(*(seeded(run, x) for run in (one, graph)))
        state = graph.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items() if key in state)
        assert sum("running_var" in key for key in state) == sum("running_var" in key for key in one.state_dict())


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return model(x)


def test_features_of_a_converted_model() -> None:
    """In both modes, by the names that the original has."""
    names = ["conv1", "layer1.0.bn2", "layer2", "layer4.1"]
    original = resnet18(num_classes=4)
    for module in original.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # else the features of a normalizer are those of the ReLU behind it
    model = convert(original, "bkn", stat_batch=2)
    extractor = create_feature_extractor(copy.deepcopy(model), names)
    for mode in (True, False):
        whole = copy.deepcopy(model).train(mode)
        seen: dict[str, Tensor] = {}
        for name in names:
            whole.get_submodule(name).register_forward_hook(lambda m, _, y, n=name, s=seen: s.update({n: y.clone()}))
        x = torch.randn(4, 3, 64, 64)
        whole(x)
        found = copy.deepcopy(extractor).train(mode)(x)
        assert found.keys() == seen.keys() and all(torch.equal(found[name], seen[name]) for name in names)
    assert set(get_graph_node_names(original)[0]) <= set(get_graph_node_names(model)[0])


@pytest.mark.parametrize("norm", quick(["bn", "brn", "sn", "syncbn", "gn", "ibn", "pn"], "bn", "ibn"))
def test_normalizers_without_beliefs_are_leaves_of_a_graph(norm: str) -> None:
    model, x = convert(resnet18(num_classes=4), norm, stat_batch=2), torch.randn(4, 3, 64, 64)
    graph, features = (
        fx.symbolic_trace(copy.deepcopy(model)),
        create_feature_extractor(copy.deepcopy(model), ["layer2"]),
    )
    for mode in (True, False):
        for each in (model, graph, features):
            each.train(mode)
        assert torch.equal(graph(x), model(x)) and features(x)["layer2"].shape == (4, 128, 8, 8)


def test_a_normalizer_is_a_leaf_of_a_graph() -> None:
    layers = [KalmanBatchNorm2d(4, stat_batch=2), KalmanGroupNorm(2, 4)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layers[0], nn.ReLU(), layers[1])
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(graph.eval()(x), model.eval()(x))


@pytest.mark.parametrize("graph", [feature_extractor, fx.symbolic_trace])
def test_tracing_what_cannot_be_traced_is_refused(graph: Any) -> None:
    whole = convert(feature_extractor(resnet18()), "bkn", stat_batch=2)
    with pytest.raises(ValueError, match=r"GraphModule cannot be traced by torch\.fx.*create_feature_extractor"):
        graph(whole)
    with pytest.raises(ValueError, match=r"ResNet cannot be traced by torch\.fx"):
        graph(convert(resnet18(), "bkn", stat_batch=2, input_belief="data"))


# --- weights that hooks compute, and hooks of others ------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("how", ["pruned", "weight norm", "spectral norm"])
def test_weights_that_hooks_compute(how: str, ahead: bool) -> None:
    def change(layer: nn.Module) -> None:
        if how == "pruned":
            prune.l1_unstructured(layer, "weight", 0.5)
        else:
            (nn.utils.weight_norm if how == "weight norm" else nn.utils.spectral_norm)(layer)

    model, x = Net(), images()
    if ahead:
        change(model.last)
    model(x)  # from now on the weight is not a leaf, which deepcopy refuses
    model = convert(model, "bkn", stat_batch=2)
    if not ahead:
        change(model.last)
    model(x).square().sum().backward()
    assert priors(model, x) == 2
    folded = fold(model).eval()
    torch.testing.assert_close(folded(x), model.eval()(x))


class Remembering(Net):
    """Keeps what it computes, in a dict."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = {"stem": self.stem(x)}
        return super().forward(x)


def test_what_a_module_keeps_is_copied() -> None:
    model, x = convert(Remembering(), "bkn", stat_batch=2), images()
    model(x)
    assert fold(model).seen["stem"].shape == (4, 8, 16, 16)
    assert priors(model, x) == 2


def test_observers_of_quantization_see_tensors() -> None:
    """And a belief passes what they round: weights, and what layers return."""
    original, x = Net().train(), images()
    original.qconfig = get_default_qat_qconfig()
    model = convert(prepare_qat(original), "bkn", stat_batch=2)
    assert model(x).shape == (4, 4)
    assert torch.isfinite(model.last.activation_post_process.activation_post_process.max_val)
    assert priors(model, x) == 2
    torch.testing.assert_close(fold(model.eval())(x), model(x))


def test_layers_are_found_by_the_original_classes() -> None:
    model, x = convert(Net(), "bkn", stat_batch=2).eval(), images()
    kinds = {nn.Conv2d: 0, nn.Linear: 0}
    for layer in model.modules():
        if type(layer) in kinds:
            kinds[type(layer)] += 1
    assert kinds == {nn.Conv2d: 3, nn.Linear: 1}
    quantized = quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert "quantized" in type(quantized.head[2]).__module__
    torch.testing.assert_close(quantized(x), model(x), rtol=0.1, atol=0.1)


def test_a_class_that_is_kept_by_the_original_is_derived_from_the_layers_own() -> None:
    """As FSDP keeps its classes."""

    class Mixin:
        pass

    kept = {nn.Conv2d: type("Sharded", (Mixin, nn.Conv2d), {})}
    layer = convert(Net(), "bkn", stat_batch=2).last
    layer.__class__ = kept[type(layer)]
    assert type(layer).__name__ == "Sharded" and layer.takes_beliefs


class Doubled(nn.Module):
    """A weight's double; counts how often it is asked for."""

    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        Doubled.calls += 1
        return 2 * weight


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("how", ["doubled", "weight norm", "spectral norm", "orthogonal"])
def test_weights_that_parametrizations_compute(how: str, options: dict[str, Any], ahead: bool) -> None:
    """Once a step: what a spectral norm keeps is where the original's is."""

    def change(layer: nn.Module) -> None:
        if how == "doubled":
            parametrize.register_parametrization(layer, "weight", Doubled())
        else:
            known = {"weight norm": "weight_norm", "spectral norm": "spectral_norm", "orthogonal": "orthogonal"}
            getattr(parametrizations, known[how])(layer)

    original, x = Net(), images()
    if ahead:
        change(original.last)
    model = convert(original, "bkn", stat_batch=2, **options)
    if not ahead:
        change(model.last)
        change(original.last)
        original.load_state_dict({k: v for k, v in model.state_dict().items() if k in original.state_dict()})
    Doubled.calls = 0
    model(x).square().sum().backward()
    assert Doubled.calls == (how == "doubled")
    original(x)
    state = model.state_dict()
    for name, value in original.state_dict().items():
        assert "parametrizations" not in name or torch.equal(value, state[name])
    assert priors(model, x) == (3 if "input_belief" in options else 2)
    torch.testing.assert_close(fold(model.eval())(x), model(x))


def test_lazy_layers_are_refused() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match=r"0 \(LazyConv2d\) has no shape yet: call the model once"):
        convert(model, "bkn")
    model(images())
    assert convert(model, "bkn", stat_batch=2)(images()).shape == (4, 4, 14, 14)


# --- sharded, and replicated ------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: nn.Module, by: str, **policy: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    layers = (nn.Conv2d, nn.Linear, _BatchNorm)
    for part in model.children() if by == "block" else model.modules() if by == "layer" else ():
        if by == "block" or isinstance(part, layers):
            fully_shard(part, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


@pytest.mark.parametrize("by", ["model", "block", "layer"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("error:.*returned a view tensor")
def test_sharded_models_have_the_same_gradients(options: dict[str, Any], by: str) -> None:
    model, x = converted(**options), images()
    expected = gradients(copy.deepcopy(model), x)
    found = gradients(shard(model, by), x)
    assert expected.keys() == found.keys() and len(found) > 10
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("by", ["model", "layer"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("one_process")
def test_sharded_models_in_mixed_precision(options: dict[str, Any], by: str) -> None:
    """FSDP casts the beliefs that it passes, too."""
    model, x = converted(**options), images()
    expected = copy.deepcopy(model)(x)
    found = shard(model, by, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))(x)
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.1
    found.float().square().sum().backward()


@pytest.mark.usefixtures("one_process")
def test_linear_layers_that_are_spread_over_devices_hand_no_belief_on() -> None:
    """As tensor parallelism spreads them."""
    head = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)
    layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), *head, nn.BatchNorm1d(8))
    model, x = convert(layers, "bkn", stat_batch=2), torch.randn(4, 6)
    plan: dict[str, Any] = {"2": ColwiseParallel(), "4": RowwiseParallel()}
    spread = parallelize_module(copy.deepcopy(model), init_device_mesh("cpu", (1,)), plan)
    assert str(belief_report(spread, x)["5"]).startswith("2 (Linear: a hook")
    assert gradients(spread, x).keys() == gradients(model, x).keys()
    moving = {name: value for name, value in spread.named_buffers() if name.startswith("1.")}
    assert all(torch.equal(value, model.get_buffer(name)) for name, value in moving.items())


def replica(model: nn.Module) -> nn.Module:
    """As DataParallel makes one for each device."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for key, child in module._modules.items():
            twin._modules[key] = None if child is None else copies[child]
        for key, parameter in module._parameters.items():
            setattr(twin, key, None if parameter is None else parameter.clone())
        for key, buffer in module._buffers.items():
            twin._buffers[key] = buffer
    return copies[model]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replicas_are_the_model_or_refused(options: dict[str, Any]) -> None:
    """A replica's predictors are those of the model, on the first device."""
    model, x = converted(**options), images()
    if any(isinstance(module, Predictor) for module in model.modules()):
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            replica(model)(x)
        model.eval()
    expected = copy.deepcopy(model)
    torch.testing.assert_close(replica(model)(x), expected(x))
    for a, b in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_data_parallel_without_devices_is_the_model() -> None:
    model, x = converted(), images()
    torch.testing.assert_close(nn.DataParallel(copy.deepcopy(model))(x), model(x))
