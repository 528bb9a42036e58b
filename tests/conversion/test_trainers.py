"""Converted models in others' training loops: as in a plain one, to the bit. Where those are not installed, skipped."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kalmannorm import belief_report, convert, fold

OPTIONS: list[dict[str, Any]] = [{}, {"predictor": "sampling", "ragged": "measure", "stat_batch": 4}]
RATE, BATCH = 0.1, 8  # the last batch has 6 images


class Net(nn.Module):
    """Takes and returns what Trainer wants too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        logits = self.fc(x.mean((2, 3)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture(autouse=True)
def no_state() -> Iterator[None]:
    """Of accelerate's, which it keeps for a process's life."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(True)


def model(options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return convert(Net(), "bkn", **{"stat_batch": 2, **options})


def data() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(30, 3, 8, 8), torch.randint(4, (30,)))


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)


def trained(net: nn.Module, epochs: int, accumulate: int) -> nn.Module:
    """By a plain loop."""
    steps = optimizer(net)
    net.train()
    for _ in range(epochs):
        for number, (x, labels) in enumerate(DataLoader(data(), BATCH), 1):
            (net(x, labels)["loss"] / accumulate).backward()
            if number % accumulate == 0:
                steps.step()
                steps.zero_grad()
    return net


def same(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lightning(options: dict[str, Any], accumulate: int, tmp_path: Path) -> None:
    """Fit with an evaluation after each epoch, save, resume."""
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.net(*batch)["loss"]  # type: ignore[no-any-return]

        def validation_step(self, batch: Any, _: int) -> None:
            self.net(*batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self)

    def fit(net: nn.Module, epochs: int, start: str | None = None) -> Any:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            accumulate_grad_batches=accumulate,
            default_root_dir=tmp_path,
            **quiet,  # type: ignore[arg-type]
        )
        trainer.fit(Lit(net), DataLoader(data(), BATCH), DataLoader(data(), BATCH), ckpt_path=start)
        return trainer

    file = str(tmp_path / "half.ckpt")
    fit(model(options), 1).save_checkpoint(file)
    resumed = model(options)
    fit(resumed, 2, file)
    same(resumed, trained(model(options), 2, accumulate))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_accelerate(options: dict[str, Any], accumulate: int, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def fit(net: nn.Module, epochs: int, start: Path | None = None) -> Any:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        prepared, steps, batches = accelerator.prepare(net, optimizer(net), DataLoader(data(), BATCH))
        if start:
            accelerator.load_state(start)
        prepared.train()
        for _ in range(epochs):
            for x, labels in batches:
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared(x, labels)["loss"])
                    steps.step()
                    steps.zero_grad()
        return accelerator

    fit(model(options), 1).save_state(tmp_path)
    resumed = model(options)
    fit(resumed, 1, tmp_path)
    same(resumed, trained(model(options), 2, accumulate))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trainer(options: dict[str, Any], accumulate: int, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    images, labels = data().tensors
    rows = [{"x": x, "labels": y} for x, y in zip(images, labels, strict=True)]

    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> None:
            return None

    def fit(net: nn.Module, epochs: int, start: str | None = None) -> Any:
        settings = transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=0,
            lr_scheduler_type="constant",
            use_cpu=True,
            save_strategy="epoch",
            disable_tqdm=True,
            report_to=[],
        )
        trainer = InOrder(net, settings, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer(net), None))
        trainer.train(resume_from_checkpoint=start)
        return trainer

    assert fit(model(options), 1).evaluate()["eval_loss"] > 0
    resumed = model(options)
    fit(resumed, 2, str(next(tmp_path.glob("checkpoint-*"))))
    same(resumed, trained(model(options), 2, accumulate))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mixed_precision_of_accelerate(options: dict[str, Any]) -> None:
    """A forward around the model's own: as under autocast; taken off, the model is itself."""
    accelerate = pytest.importorskip("accelerate")
    net, (x, _) = model(options), data()[:BATCH]
    twin, plain = copy.deepcopy(net), copy.deepcopy(net)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(net)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prepared(x)["logits"], twin(x)["logits"].float())
    assert belief_report(prepared, x)["bn2"] is None
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    unwrapped.load_state_dict(plain.state_dict())
    torch.testing.assert_close(unwrapped(x), plain(x))
    assert belief_report(unwrapped, x)["bn2"] is None
    torch.testing.assert_close(fold(unwrapped.eval())(x), plain.eval()(x))
