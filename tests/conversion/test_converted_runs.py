"""What torch and others do to converted models after the conversion; what these make of no images, or of one."""

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import error, net, quick
from torch import Tensor, nn
from torch.ao.quantization import (
    fuse_modules,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    prepare,
    prepare_qat,
)
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, replace_all_batch_norm_modules_, stack_module_state, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

from kalmannorm import NORMS, KalmanBatchNorm2d, belief_report, convert, fold, precise_statistics
from kalmannorm.norm import GroupedStatistics
from kalmannorm.norm.moments import Predictor


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_batch_of_no_images(norm: str) -> None:
    """Nothing comes of it; moving statistics stay as they are."""
    model = convert(net(), norm, stat_batch=2)
    for training in (True, False):
        before = copy.deepcopy(model.state_dict())
        assert model.train(training)(torch.empty(0, 3, 8, 8)).shape == (0, 4)
        finite = [torch.isfinite(value).all() for key, value in model.state_dict().items() if "running" in key]
        assert all(finite) and list(before) == list(model.state_dict())


@pytest.mark.parametrize("norm", ["bn", "bkn", "brn", "syncbn"])
def test_torchs_sync_batch_norm_afterwards_is_refused(norm: str) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(convert(net(), norm, stat_batch=2))
    with pytest.raises(ValueError, match=r"SyncBatchNorm.*kalmannorm\.convert\(model, 'syncbn'"):
        model.eval()(torch.randn(4, 3, 8, 8))


def test_without_moving_statistics_afterwards() -> None:
    """As torch's then do, they take the whole evaluation batch's."""
    model = convert(net(), "bkn", stat_batch=4)
    replace_all_batch_norm_modules_(model)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model.eval()(x), model.train()(x))
    assert model.eval()(x[:3]).shape == (3, 4)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("norm", ["bn", "bkn", "ibn", "zca"])
def test_moving_statistics_that_are_no_longer_tracked_stay(norm: str, first: bool) -> None:
    """Lightning freezes BatchNorm layers by this attribute, before the conversion or after it."""

    def freeze(model: nn.Module) -> nn.Module:
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                layer.track_running_stats = False
        return model

    if first:
        model = convert(freeze(net(width=16)), norm, stat_batch=4, **({"group": 2} if norm == "zca" else {}))
    else:
        model = freeze(convert(net(width=16), norm, stat_batch=4, **({"group": 2} if norm == "zca" else {})))
    before, x = copy.deepcopy(model.state_dict()), torch.randn(4, 3, 8, 8) + 1
    y = model.train()(x)
    precise_statistics(model, [x])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert error(y.detach(), model.eval()(x).detach()) > 0.1  # those of the batch, those that were kept
    if norm == "bkn":
        assert not next(layer for layer in fold(model).modules() if isinstance(layer, _BatchNorm)).track_running_stats


@pytest.mark.parametrize("norm", ["bn", "bkn", "syncbn"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_normalizers_are_of_the_kind_of_the_original(kind: type[_BatchNorm], norm: str) -> None:
    """Code that freezes layers looks for it; in copies and pickles too."""
    model = convert(nn.Sequential(kind(4), nn.ReLU(), kind(4)), norm, stat_batch=2)
    x = torch.randn(4, 4, *(5,) * {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[kind])
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [isinstance(layer, kind) for layer in each] == [True, False, True]
        assert type(each[0]) is type(model[0]) and isinstance(each[0], GroupedStatistics)
        assert torch.equal(each.eval()(x), model.eval()(x)) and type(fold(each)[0]) is kind


class Keeper(nn.Module):
    """Keeps its BatchNorm frozen, by a train() of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def train(self, mode: bool = True) -> "Keeper":
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        return self.body[:6](x)


@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_a_models_own_methods_are_kept(norm: str) -> None:
    for model in (converted := convert(Keeper(), norm, stat_batch=2), fold(converted)):
        before = [value.clone() for value in model.buffers()]
        model.train()
        model(torch.randn(4, 3, 8, 8) * 3 + 5)
        assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
        assert model.features(torch.randn(4, 3, 8, 8)).shape == (4, 8, 8, 8)


class Joined(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize(("norm", "stat_batch"), [("bkn", 4), ("bkn", 2), ("gkn", None)])
def test_a_part_with_groups_of_its_own(norm: str, stat_batch: int | None) -> None:
    """Its beliefs are of other groups, which the report says, and no prior."""
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    first = convert(body, norm, stat_batch=stat_batch)
    model, x = (
        convert(Joined(first, nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))), "bkn"),
        torch.randn(8, 3, 9, 9),
    )
    assert torch.isfinite(model(x)).all()
    rows = 8 // stat_batch if stat_batch else 8
    assert belief_report(model, x)["second.1"] == f"a belief of {rows} groups of images, where there are 1"


@pytest.mark.parametrize("options", [{}, {"input_belief": "data"}, {"transition": "learned"}], ids=str)
def test_transforms_of_torch_func(options: dict[str, Any]) -> None:
    """In evaluation, as through torch's BatchNorm; in training with buffers of one's own."""
    model, x = convert(net(), "bkn", stat_batch=2, **options), torch.randn(4, 3, 8, 8)
    parameters, buffers = dict(model.named_parameters()), {k: v.clone() for k, v in model.named_buffers()}
    twin = copy.deepcopy(model)
    torch.testing.assert_close(functional_call(model, (parameters, buffers), (x,)), twin(x))
    for name, value in twin.named_buffers():
        torch.testing.assert_close(buffers[name], value)
    model.eval()
    found = grad(lambda given: functional_call(model, given, (x,)).square().sum())(parameters)
    model(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            found[name], torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        )
    torch.testing.assert_close(vmap(lambda image: model(image[None])[0])(x), model(x))
    assert jvp(model, (x,), (x,))[1].shape == (4, 4)


@pytest.mark.parametrize(("norm", "options"), [("bkn", {}), ("gkn", {}), ("sn", {})], ids=str)
def test_forward_mode_derivatives_in_training(norm: str, options: dict[str, Any]) -> None:
    model, (x, direction) = convert(net().double(), norm, stat_batch=2, **options), torch.randn(2, 4, 3, 8, 8).double()
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction)).square().sum()).tangent
    (slope,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x)
    torch.testing.assert_close(found, (slope * direction).sum())


def test_gradients_of_each_image_need_no_draws() -> None:
    model, x = convert(net(), "bkn", stat_batch=2, predictor="sampling").eval(), torch.randn(4, 3, 8, 8)
    found = vmap(grad(lambda image: model(image[None]).square().sum()))(x)
    (expected,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm", ["bkn", "gkn", "brn"])
def test_an_ensemble_by_stacked_states(norm: str) -> None:
    models, x = [convert(net(), norm, stat_batch=2).eval() for _ in range(3)], torch.randn(4, 3, 8, 8)
    state, base = stack_module_state(models), copy.deepcopy(models[0]).to("meta")
    found = vmap(lambda *given: functional_call(base, given, (x,)))(*state)
    torch.testing.assert_close(found, torch.stack([model(x) for model in models]))


def test_moving_averages_are_taken_anew() -> None:
    """update_bn takes cumulative ones, of an average of models too."""
    model, batches = convert(net(), "bkn", stat_batch=2), [torch.randn(4, 3, 8, 8) * i + i for i in range(1, 4)]
    twin = torch.optim.swa_utils.AveragedModel(model)
    for one in (model, twin):
        torch.optim.swa_utils.update_bn(batches, one)
    means = torch.stack([model[0](x).mean((0, 2, 3)) for x in batches])
    torch.testing.assert_close(model[1].running_mean, means.mean(0))
    assert model[1].momentum == 0.1
    torch.testing.assert_close(twin.module[4].running_var, model[4].running_var)


def test_a_convolution_and_its_normalizer_are_fused() -> None:
    model, x = convert(net(), "bkn", stat_batch=2), torch.randn(4, 3, 8, 8)
    model(x)
    fused = copy.deepcopy(model.eval())
    for i in (0, 3):
        fused[i], fused[i + 1] = fuse_conv_bn_eval(fused[i], fused[i + 1]), nn.Identity()
    torch.testing.assert_close(fused(x), model(x))


def test_layers_are_fused_after_fold() -> None:
    """torch's quantization knows no layers but torch's, and says so."""
    model, x, layers = convert(net(), "bkn", stat_batch=2), torch.randn(4, 3, 8, 8), [["0", "1", "2"], ["3", "4"]]
    model(x)
    with pytest.raises(AssertionError, match=r"did not find fuser method for.*KalmanBatchNorm2d"):
        fuse_modules(model.eval(), layers)
    torch.testing.assert_close(fuse_modules(fold(model).eval(), layers)(x), model(x))


@pytest.mark.parametrize("norm", ["bn", "bkn"])
@pytest.mark.parametrize("prepared", [prepare, prepare_qat, prepare_fx, prepare_qat_fx])
def test_quantization_after_the_conversion_is_refused(prepared: Any, norm: str) -> None:
    """In torch's words a Conv2d is no Conv2d. What is folded is quantized."""
    model, x, by_graph = convert(net(), norm, stat_batch=2), torch.randn(4, 3, 8, 8), "fx" in prepared.__name__
    asked = (get_default_qat_qconfig_mapping(), (x,)) if by_graph else ()
    both = model, fold(model)
    for one in both:
        one.train("qat" in prepared.__name__)
        if not by_graph:
            one.qconfig = get_default_qat_qconfig()
    with pytest.raises(ValueError, match=r"has no (Kalman)?BatchNorm.*: quantize kalmannorm\.fold\(model\)"):
        prepared(both[0], *asked)
    assert prepared(both[1], *asked)(x).shape == (4, 4)


def test_pruned_channels_are_refused() -> None:
    """Where code that knows BatchNorm took their weights, and R, which it does not know, is of all channels."""
    model, x = convert(net(), "bkn", stat_batch=2), torch.randn(4, 3, 8, 8)
    for layer, names in ((model[3], ("weight", "bias")), (model[4], ("weight", "bias", "running_mean", "running_var"))):
        for name in names:
            value = getattr(layer, name)
            setattr(layer, name, nn.Parameter(value[:6]) if isinstance(value, nn.Parameter) else value[:6])
    model[3].out_channels = model[4].num_features = 6
    with pytest.raises(ValueError, match=r"^4: a belief of 6 channels.*of 8:.*prune kalmannorm\.fold\(model\)"):
        model[:5](x)


def operations(model: nn.Module, x: Tensor) -> list[str]:
    graph = torch.export.export(model.eval(), (x,)).graph
    graph.eliminate_dead_code()
    return sorted(str(node.target) for node in graph.nodes if node.op == "call_function")


def test_inference_costs_what_the_original_costs() -> None:
    """No belief is computed that nothing uses; what is exported is as it would be of BatchNorm layers."""
    original, x = net(), torch.randn(4, 3, 8, 8)
    model, flops = convert(original, "bkn", stat_batch=2), []
    for one in (original, model):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            one.eval()(x)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    assert operations(model, x) == operations(original, x)


def test_a_block_that_was_compiled_in_inference_hands_beliefs_on() -> None:
    block = nn.Sequential(*net()[:6])
    model = convert(nn.Sequential(block, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), "bkn", stat_batch=2).eval()
    both, x = (model, copy.deepcopy(model)), torch.randn(4, 3, 8, 8)
    model[0].compile(backend="eager")
    with torch.no_grad():
        model(x)
        for one in both:
            one[2].train()
        y, expected = (one(x) for one in both)
    torch.testing.assert_close(y, expected)


def initialize(layer: nn.Module) -> None:
    """As torch's documentation has it."""
    if type(layer) is nn.Conv2d:
        nn.init.constant_(layer.weight, 0.5)
    elif type(layer) is nn.BatchNorm2d or layer.__class__ is nn.Linear:
        nn.init.constant_(layer.weight, 0.25)


@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_apply_finds_layers_by_their_class(norm: str) -> None:
    model = convert(net(), norm, stat_batch=2)
    assert model.apply(initialize) is model
    assert [float(model[i].weight.detach().max()) for i in (0, 1, 8)] == [0.5, 0.25, 0.25]
    assert "type" not in globals() and model[0].__class__ is type(model[0])


class Asking(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).add_(1) if x.sum() < 1e9 else x


def test_an_untraced_forward_in_inference_mode() -> None:
    model, x = convert(Asking(*net()), "bkn", stat_batch=2), torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(model)(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("wrap", [torch.compile, torch.optim.swa_utils.AveragedModel])
@pytest.mark.parametrize("function", [fold, belief_report])
def test_wrappers_say_what_to_pass(wrap: Any, function: Any) -> None:
    with pytest.raises(ValueError, match=r"holds a converted model: pass its \.(_orig_mod|module)$"):
        function(wrap(convert(net(), "bkn", stat_batch=2)))


def test_wrapped_models_and_others_are_not_converted() -> None:
    with pytest.raises(ValueError, match=r"OptimizedModule is wrapped: convert its \._orig_mod before it is wrapped"):
        convert(torch.compile(net(), backend="eager"), "bkn")
    model = net()
    model[3] = torch.compile(model[3], backend="eager")
    with pytest.raises(ValueError, match=r"^3 \(OptimizedModule\) is wrapped: convert its \._orig_mod before"):
        convert(model, "bkn")
    for thing in (None, nn.Sequential, net().state_dict()):
        for function in (lambda m: convert(m, "bkn"), fold, belief_report):
            with pytest.raises(ValueError, match=r"a model must be a torch\.nn\.Module, not <class"):
                function(thing)


class AnsweringAll(nn.Module):
    """Attributes that it has not are those of a part, or None."""

    def __init__(self) -> None:
        super().__init__()
        self.part = net()

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_modules"]:
            return self.__dict__["_modules"][name]
        return getattr(self.part, name, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.part(x)
        return y if self.head is None else self.head(y)  # type: ignore[no-any-return]


def test_a_model_that_has_every_attribute() -> None:
    model, x = AnsweringAll().eval(), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(convert(model, "bkn", stat_batch=2)(x), model(x))


@pytest.mark.slow
def test_a_part_that_is_compiled_afterwards_hands_beliefs_on() -> None:
    model, x = convert(nn.Sequential(net()[:3], net()[3:]), "bkn", stat_batch=2), torch.randn(4, 3, 8, 8)
    expected, report = copy.deepcopy(model)(x), belief_report(model, x)
    model[1] = torch.compile(model[1], backend="eager")
    assert belief_report(model, x) == report
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(fold(model).eval()(x), model.eval()(x))


def test_parts_put_together_anew_warn_and_are_converted_again() -> None:
    model, x = convert(nn.Sequential(net()[:3], net()[3:]), "bkn", stat_batch=2), torch.randn(4, 3, 8, 8)
    parts = nn.Sequential(*model.children())
    with pytest.warns(UserWarning, match="without beliefs, by code that convert has not seen"):
        parts(x)
    again = convert(parts, "bkn", stat_batch=2)
    assert belief_report(again, x)["1.4"] is None
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


class LowRank(nn.Module):
    """Beside a convolution, as adapters have it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer, self.down = layer, nn.Conv2d(layer.in_channels, 2, 1)
        self.up = nn.Conv2d(2, layer.out_channels, 1)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, **options: object) -> Tensor:
        return self.layer(x, **options) + self.up(self.down(x))


@pytest.mark.parametrize("compiled", quick([False, True], False))
@pytest.mark.parametrize("options", [{}, {"predictor": "sampling"}, {"preset": "v1"}], ids=str)
def test_a_module_put_around_a_layer_afterwards_hands_beliefs_on(options: dict[str, Any], compiled: bool) -> None:
    model, x = convert(net(), "bkn", stat_batch=2, **options), torch.randn(4, 3, 8, 8)
    model[3] = LowRank(model[3])
    if compiled:
        found = torch.compile(copy.deepcopy(model), backend="eager")(x)
        torch.testing.assert_close(found, model(x))
    else:
        assert belief_report(model, x)["4"] is None


def test_fold_goes_by_what_is_there() -> None:
    """Normalizers that were removed, replaced, moved or added afterwards are what they are now."""
    model = convert(net(), "bkn", stat_batch=2)
    place = next(i for i, layer in enumerate(model) if isinstance(layer, KalmanBatchNorm2d))
    channels = model[place].num_features
    model[place] = nn.GroupNorm(1, channels)
    model.insert(0, nn.BatchNorm2d(3))
    model(x := torch.randn(4, 3, 8, 8))
    plain = fold(model.eval())
    assert [type(a).__name__ for a in plain] == [
        type(a).__name__.replace("KalmanBatchNorm2d", "BatchNorm2d") for a in model
    ]
    torch.testing.assert_close(plain(x), model(x))


@pytest.mark.parametrize("options", [{"predictor": "sampling"}, {"transition": "learned"}], ids=str)
def test_children_are_called_in_turn(options: dict[str, Any]) -> None:
    """Predictors among them hand on what they get."""
    model, x = convert(net(), "bkn", stat_batch=2, **options).eval(), torch.randn(4, 3, 8, 8)
    assert any(isinstance(child, Predictor) for child in model)
    torch.testing.assert_close(nn.Sequential(*model.children())(x), model(x))


def test_a_replica_computes_with_its_own_layers() -> None:
    model = convert(net(), "bkn", stat_batch=2).eval()
    replica = model._replicate_for_data_parallel()
    replica._modules["8"] = copy.deepcopy(replica._modules["8"])
    for parameter in replica._modules["8"].parameters():
        parameter.data.zero_()
    assert not replica(torch.randn(2, 3, 8, 8)).any()


def test_a_wrong_number_of_channels_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected 4 channels, got \(4, 1, 5, 5\)"):
        KalmanBatchNorm2d(4)(torch.randn(4, 1, 5, 5))


@pytest.mark.parametrize("norm", ["bn", "bkn", "gn", "gkn", "frozen"])
def test_an_image_without_a_batch_is_refused_as_by_the_original(norm: str) -> None:
    model = convert(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)), norm, stat_batch=2).eval()
    with pytest.raises(ValueError, match=r"1: expected 4D input, got \(8, 8, 8\)"):
        model(torch.randn(3, 8, 8))
