"""Converted models as programs: torch.export, torch.jit, ONNX."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import OPTIONS, Net, converted, images
from helpers import quick
from torch import nn
from torchvision.models import resnet18

from kalmannorm import convert, fold, set_statistics


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("export", [torch.export.export, torch.jit.trace])
def test_exported_models_compute_the_same(export: Any, options: dict[str, Any]) -> None:
    model, x = converted(**options), images()
    model(x)
    model.eval()
    program = export(model, (x,))
    run = program.module() if export is torch.export.export else program
    other = images()
    torch.testing.assert_close(run(other), model(other))


@pytest.mark.parametrize(("norm", "training"), [("gkn", False), ("bkn", True)])
def test_exported_models_take_batches_of_any_size(norm: str, training: bool) -> None:
    model = convert(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), norm, stat_batch=2
    )
    model.train(training)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    other = torch.randn(6, 3, 16, 16)
    torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize("norm", ["bkn", "gn", "gkn", "in"])
def test_exported_models_take_maps_of_any_size(norm: str) -> None:
    model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), norm)
    sides = {2: torch.export.Dim("height", min=8, max=64), 3: torch.export.Dim("width", min=8, max=64)}
    program = torch.export.export(model.eval(), (images(),), dynamic_shapes=(sides,))
    other = torch.randn(len(images()), 3, 12, 20)
    torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("options", quick(OPTIONS, OPTIONS[3]), ids=str)
def test_models_in_evaluation_export_to_onnx(options: dict[str, Any], dynamo: bool, tmp_path: Path) -> None:
    """Without the beliefs, which nothing uses there."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x, file = converted(**options), images(), str(tmp_path / "model.onnx")
    model(x)
    model.eval()
    torch.onnx.export(model, (x,), file, input_names=["image"], dynamo=dynamo, verbose=False)
    (found,) = onnxruntime.InferenceSession(file).run(None, {"image": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-4)


NO_DRAWS = r"draws of the sampling predictor cannot be exported: export kalmannorm\.fold\(model\.eval\(\)\)"


def test_draws_of_evaluation_are_not_exported() -> None:
    """They would differ from call to call."""
    model, x = converted(predictor="sampling").eval(), images()
    set_statistics(model, "online")
    for export in (torch.export.export, torch.jit.trace):
        with pytest.raises(ValueError, match=NO_DRAWS):
            export(model, (x,))


@pytest.mark.slow
def test_draws_of_training_go_on_in_a_program_and_are_none_of_onnxs(tmp_path: Path) -> None:
    model, x = converted(predictor="sampling"), images()
    program = torch.export.export(model, (x,)).module()
    assert not torch.equal(program(x), program(x))
    with pytest.raises(torch.onnx.OnnxExporterError, match=NO_DRAWS):
        torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("options", [option for option in OPTIONS if "predictor" not in option], ids=str)
def test_a_model_in_training_is_exported_whole(options: dict[str, Any]) -> None:
    """Moving statistics change as the model's own; but for drawn samples, which would stay the same."""
    options = {**options, "predictor": "closed"}
    model, x = converted(**options), images()
    program = torch.export.export(copy.deepcopy(model), (x,)).module()
    torch.testing.assert_close(program(x), model(x))
    buffers = dict(program.named_buffers())
    for name, value in model.named_buffers():
        if "num_batches" not in name and "limits" not in name:
            torch.testing.assert_close(buffers[name], value)


@pytest.mark.parametrize("strict", quick([False, True], False))
@pytest.mark.parametrize("norm", quick(["bkn", "gkn", "brn"], "bkn"))
def test_a_program_of_training_is_saved(norm: str, strict: bool) -> None:
    """For which no graph may hold a context (no_grad, autocast) whose results nobody uses."""
    model, x = convert(Net(), norm, stat_batch=2), images()
    program = torch.export.export(copy.deepcopy(model), (x,), strict=strict)
    torch.export.save(program, file := io.BytesIO())
    torch.testing.assert_close(torch.export.load(io.BytesIO(file.getvalue())).module()(x), model(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_a_trace_in_training_has_moving_statistics(norm: str) -> None:
    model, x = convert(Net(), norm, stat_batch=2), images()
    twin = copy.deepcopy(model)
    program = torch.jit.trace(twin, (x,), check_trace=False)  # which runs it once
    model(x)
    torch.testing.assert_close(program(x), model(x))
    for a, b in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_what_measures_in_evaluation_is_saved() -> None:
    model, x = convert(Net(), "gkn").eval(), images()
    torch.jit.save(torch.jit.trace(model, x), file := io.BytesIO())
    torch.testing.assert_close(torch.jit.load(io.BytesIO(file.getvalue()))(x), model(x))


@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn"])
def test_scripting_is_refused(norm: str) -> None:
    with pytest.raises(ValueError, match=r"torch\.jit\.script cannot compile .*: script kalmannorm\.fold\(model\)"):
        torch.jit.script(convert(resnet18(num_classes=4), norm))


def test_a_folded_model_is_scripted() -> None:
    model, x = convert(resnet18(num_classes=4), "bkn", stat_batch=2).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.script(fold(model))(x), model(x), rtol=1e-4, atol=1e-4)
