"""Whitened weights: golden files, refreshes that keep the function and the momentum, what is white afterwards."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import Residual, conv3x3, error, quick, talk_golden
from torch import nn
from trainings import fork

from kalmannorm import Belief, convert, fold, set_statistics
from kalmannorm.conversion.flow import beliefs_of_inputs
from kalmannorm.models import ARCHS
from kalmannorm.norm.modes import finish_gradients
from kalmannorm.norm.moments import relu
from kalmannorm.norm.whitened import KINDS, fold_weights, parametrization_of, refresh, whiten_weights, whitened
from kalmannorm.train.model import optimizer

D = torch.float64


@pytest.mark.parametrize("name", ["wnn_linear", "wnn_conv"])
def test_golden(name):
    data = talk_golden(name)
    size = data["V"].shape[-1]
    layer = nn.Conv2d(5, 3, size, padding=size // 2)
    whiten_weights(layer, "wnn", eps=data["eps"].item())
    whitening = parametrization_of(layer)
    v, d = layer.parametrizations.weight.original, layer.parametrizations.bias.original
    with torch.no_grad():
        whitening.inner[0] = data["P"]
        whitening.center.copy_(data["c"])
        v.copy_(data["V"])
        d.copy_(data["d"])
    optim = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    for prefix in ("", "new_"):
        optim.zero_grad()
        y = layer(data["x"])
        y.backward(data["dy"])
        assert error(y.detach(), data["y"]) <= 1e-5
        assert error(whitening.inner[0], data[f"{prefix}P"]) <= 1e-5
        assert error(whitening.center, data[f"{prefix}c"]) <= 1e-5
        assert error(v.detach(), data[f"{prefix}V"]) <= 1e-5 and error(d.detach(), data[f"{prefix}d"]) <= 1e-5
        assert error(v.grad, data[f"{prefix}dV"]) <= 1e-5 and error(d.grad, data[f"{prefix}dd"]) <= 1e-5
        if not prefix:
            optim.step()
            refresh(layer, [data["x"]], optim)
            # The momentum is the gradient: through the new P and c it is the new gradient.
            assert error(optim.state[v]["momentum_buffer"], data["new_dV"]) <= 1e-5
    assert whitening.jump < 1e-5


def network(kind, dtype=torch.float32, **options):
    torch.manual_seed(0)
    plain = ARCHS["resnet14"]()
    whiten_weights(plain, kind, **options)
    return convert(plain, "bn", stat_batch=4).to(dtype)


def samples(dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 3, 16, 16, generator=generator).to(dtype)


def train(model, steps=3):
    optim = optimizer(model, momentum=0.9, weight_decay=1e-3)
    for group in optim.param_groups:
        group["lr"] = 0.01
    for step in range(steps):
        x = samples(next(model.parameters()).dtype, seed=step)
        optim.zero_grad()
        F.cross_entropy(model(x), torch.arange(32) % 10).backward()
        finish_gradients(model)
        optim.step()
    return optim


def outputs(model, x):
    set_statistics(model, "online")
    y = model.eval()(x).detach()
    set_statistics(model, "moving")
    model.train()
    return y


@pytest.mark.parametrize("kind", quick(["wnn", "eigennet"], "eigennet"))
def test_a_refresh_keeps_the_function(kind):
    """ResNet-14, zero padding and all; float64 by rounding alone, float32 to 1e-5."""
    for dtype, tolerance in ((D, 1e-9), (torch.float32, 1e-4)):
        model = network(kind, dtype)
        optim = train(model)
        x = samples(dtype, seed=9)
        before, state = outputs(model, x), [t.clone() for t in model.buffers()]
        refresh(model, [samples(dtype, seed=5)], optim)
        assert error(outputs(model, x), before) < tolerance
        running = [t for name, t in model.named_buffers() if "running" in name]
        kept = [t for (name, _), t in zip(model.named_buffers(), state, strict=True) if "running" in name]
        assert all(torch.equal(a, b) for a, b in zip(running, kept, strict=True))
        assert all(parametrization_of(layer).jump < 1e-5 for layer in whitened(model).values())
        assert all(layer.inner.dtype == dtype for layer in map(parametrization_of, whitened(model).values()))


def test_inputs_are_white_after_a_refresh():
    model = network("wnn", D, eps=1e-9)
    x = samples(D)
    refresh(model, [x])
    seen = {}
    layers = whitened(model)
    for name in ("blocks.0.conv2", "blocks.4.conv1"):
        layers[name].register_forward_hook(lambda layer, args, out, name=name: seen.update({name: args[0].detach()}))
    outputs(model, x)
    for name, o in seen.items():
        rows = parametrization_of(layers[name]).inner[0] @ o.transpose(0, 1).flatten(1)
        assert error(torch.cov(rows, correction=0), torch.eye(len(rows), dtype=D)) < 1e-3, name


def test_gwnn_drops_directions_and_says_how_much_changed():
    model = network("pre_gwnn", D, share=0.9)
    x = samples(D)
    before = outputs(model, x)
    refresh(model, [x])
    layers = [parametrization_of(layer) for layer in whitened(model).values()]
    kept = [(layer.inner.abs().sum(-1) > 0).sum().item() for layer in layers]
    assert all(0 < k <= layer.inner.shape[-1] for k, layer in zip(kept, layers, strict=True))
    assert sum(kept) < sum(layer.inner.shape[-1] for layer in layers)
    assert max(layer.jump for layer in layers) > 0.01
    assert not torch.allclose(outputs(model, x), before)
    # What was dropped learns nothing.
    F.cross_entropy(model(x), torch.arange(32) % 10).backward()
    for layer, whitening, k in zip(whitened(model).values(), layers, kept, strict=True):
        gradient = layer.parametrizations.weight.original.grad
        assert not gradient[:, k:].any() and gradient[:, :k].any()
        assert whitening.kind == "pre_gwnn"


def test_post_gwnn_whitens_outputs():
    model = network("post_gwnn", D, eps=1e-9)
    x = samples(D)
    refresh(model, [x])
    layer = whitened(model)["conv"]
    out = F.conv2d(x, layer.weight, None, 1, 1).transpose(0, 1).flatten(1).detach()
    assert error(torch.cov(out, correction=0), torch.eye(16, dtype=D)) < 1e-6


def test_covariances_of_no_data_are_those_of_samples():
    """Independent Gaussian pixels and channels behind Batch Norm, then a ReLU: as the prediction has it, but for the
    border. Q by it is what the samples' covariance gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6))
    nn.init.uniform_(model[0].weight, 0.5, 1.5)
    nn.init.normal_(model[0].bias)
    whiten_weights(model, "post_gwnn")
    model = convert(model, "bn", stat_batch=64).double()
    x = torch.randn(64, 4, 34, 34, dtype=D) * 3 + 1
    conv = model.get_submodule("2")
    state = copy.deepcopy(model.state_dict())
    beliefs = beliefs_of_inputs(model, x[:1])
    assert list(beliefs) == [conv] and model.training
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    found = []
    for inputs in (None, beliefs):
        model.load_state_dict(state)
        refresh(model, [x], inputs=inputs)
        found.append(parametrization_of(conv).outer.clone())
    assert error(found[1], found[0]) < 0.03
    refresh(model, [x], inputs=beliefs)  # of the output before Q
    assert torch.equal(parametrization_of(conv).outer, found[1])


def test_beliefs_of_inputs_go_through_blocks_and_miss_the_first_layer():
    model = network("post_gwnn")
    beliefs = beliefs_of_inputs(model, samples()[:1])
    layers = whitened(model)
    assert set(layers.values()) - set(beliefs) == {layers["conv"]}
    bn = model.get_submodule("bn")
    expected = relu(Belief(bn.bias[None], bn.weight.square()[None]))
    assert error(beliefs[layers["blocks.0.conv1"]].var, expected.var.detach()) < 1e-6


def test_weight_decay_is_of_the_weight_itself():
    model, plain = network("wnn", D), None
    refresh(model, [samples(D)])
    plain = copy.deepcopy(model)
    fold_weights(plain)
    for one in (model, plain):
        optim = optimizer(one, momentum=0.0, weight_decay=0.5)
        assert {g["weight_decay"] for g in optim.param_groups} == {0.5, 0.0}
        for p in one.parameters():
            p.grad = torch.zeros_like(p)
    finish_gradients(model)
    for name, layer in whitened(model).items():
        of_w = plain.get_submodule(name).weight.detach()
        expected = 0.5 * parametrization_of(layer).pull_back(of_w)
        assert error(layer.parametrizations.weight.original.grad, expected) < 1e-10


def test_folds_back_to_plain_layers():
    model = network("wnn")
    refresh(model, [samples()])
    x = samples(seed=3)
    before = outputs(model, x)
    names = set(ARCHS["resnet14"]().state_dict())
    fold_weights(model)
    assert not whitened(model) and names <= set(model.state_dict())
    assert error(outputs(model, x), before) < 1e-5


def test_fold_of_a_converted_model_writes_the_weights_back():
    model = network("eigennet")
    refresh(model, [samples()])
    x = samples(seed=3)
    model(x)
    plain = fold(model)
    assert not whitened(plain) and len(whitened(model)) == 14
    assert plain.state_dict().keys() == ARCHS["resnet14"]().state_dict().keys()
    assert error(plain.eval()(x).detach(), model.eval()(x).detach()) < 1e-5


@pytest.mark.parametrize("kind", quick(KINDS, "eigennet"))
def test_the_state_dict_has_all_of_it(kind):
    """Training goes on as it would, the next refresh included."""
    model, fresh = network(kind, D), network(kind, D)
    refresh(model, [samples(D)])
    train(model, steps=1)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    for one in (model, fresh):
        refresh(one, [samples(D, seed=5)])
        train(one, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pre_gwnn", "eigennet"])
def test_compiled_is_eager(kind):
    """Also after a refresh, which changes buffers."""
    torch._dynamo.reset()
    two = [conv3x3(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv3x3(4, 5), nn.BatchNorm2d(5)]
    eager = small(kind, nn.Sequential(*two, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, backend="aot_eager")
    for seed in range(2):
        for one, forward in ((eager, eager), (compiled, run)):
            one.zero_grad()
            refresh(one, [samples(D, seed=5 + seed)])
            forward(samples(D, seed=seed)).square().mean().backward()
        for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            assert (b.grad - a.grad).abs().max() < 1e-10, name


def small(kind, plain=None):
    torch.manual_seed(0)
    plain = plain or Residual()
    whiten_weights(plain, kind)
    return convert(plain, "bn", stat_batch=4).to(D)


def step_of_a_process(rank, folder):
    """A refresh and a step under DDP on every second image: whole groups. EigenNet's labels differ by process."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for kind in KINDS[:3]:
        steps_of(torch.nn.parallel.DistributedDataParallel(small(kind)), slice(rank, None, 2), folder / f"{kind}.pt")
    dist.destroy_process_group()


def steps_of(model, images, file):
    inner = getattr(model, "module", model)
    optim = optimizer(inner, momentum=0.9, weight_decay=1e-3)
    for step in range(2):
        x, labels = samples(D, seed=step)[images], (torch.arange(32) % 10)[images]
        refresh(inner, [x], optim, inputs=beliefs_of_inputs(inner, x) if step else None)
        optim.zero_grad()
        F.cross_entropy(model(x), labels % 4).backward()
        finish_gradients(inner)
        for group in optim.param_groups:
            group["lr"] = 0.01
        optim.step()
    torch.save(inner.state_dict(), file)


@pytest.mark.slow
def test_two_processes_refresh_as_one(tmp_path):
    fork(step_of_a_process, (tmp_path,), 2)
    for kind in KINDS[:3]:
        steps_of(small(kind), slice(None), tmp_path / "one.pt")
        found, expected = (torch.load(tmp_path / f"{name}.pt") for name in (kind, "one"))
        for key, value in expected.items():
            if "running" not in key:  # averaged over processes where they are read
                assert (found[key] - value).abs().max() < 1e-8 * max(1, value.abs().max()), (kind, key)


def test_many_equal_eigenvalues_do_not_stop_a_refresh():
    """A covariance of few samples: most eigenvalues of P are one, at which a singular value decomposition may fail."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 14**2, 10))
    whiten_weights(plain, "eigennet")
    model = convert(plain, "bn", stat_batch=4).to(D)
    before = outputs(model, samples(D))
    refresh(model, [samples(D, seed=5)])
    assert error(outputs(model, samples(D)), before) < 1e-9


def test_grouped_convolutions_are_whitened_by_group():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=True).double()
    x = torch.randn(8, 6, 5, 5, dtype=D) + 2
    before = layer(x).detach()
    whiten_weights(layer, "wnn")
    refresh(layer, [x[:4], x[4:]])
    whitening = parametrization_of(layer)
    assert whitening.inner.shape == (2, 3, 3) and error(layer(x).detach(), before) < 1e-10
    rows = x[:, 3:].transpose(0, 1).flatten(1)
    covariance = torch.cov(rows, correction=0) + 0.01 * torch.eye(3, dtype=D)
    assert error(whitening.inner[1] @ covariance @ whitening.inner[1], torch.eye(3, dtype=D)) < 1e-10


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="kind wnn, pre_gwnn"):
        whiten_weights(nn.Conv2d(3, 4, 3), "gwnn")
    layer = nn.Sequential(nn.Conv2d(3, 4, 3))
    whiten_weights(layer, "wnn")
    with pytest.raises(ValueError, match="0: its weight is parametrized already"):
        whiten_weights(layer, "wnn")
    with pytest.raises(ValueError, match="at least one batch"):
        refresh(layer, [])
    with pytest.raises(ValueError, match="momentum must be"):
        refresh(layer, [torch.randn(2, 3, 4, 4)], momentum="keep")
