"""convert on models that nobody here wrote: torchvision's with BatchNorm, and families of timm's."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import MaxVit
from zoo import check

import kalmannorm
from kalmannorm.conversion import untraced

ROOT = Path(__file__).parents[2]


def script() -> ModuleType:
    """scripts/belief_coverage.py, which knows how torchvision's models are built."""
    spec = importlib.util.spec_from_file_location("belief_coverage", ROOT / "scripts" / "belief_coverage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


coverage = script()

slow = pytest.mark.slow

# One of each family: its other members have the same blocks, more or wider. On shapes alone all are converted, below.
FAMILIES = (
    "deeplabv3_mobilenet_v3_large", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "fcn_resnet50",
    "googlenet", "inception_v3", "lraspp_mobilenet_v3_large", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
    "regnet_x_400mf", "regnet_y_800mf", "resnet18", "resnet50", "shufflenet_v2_x0_5", "vgg11_bn",
)  # fmt: skip
TABLE = ROOT / "docs" / "coverage.md"  # every model with BatchNorm, a line each
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": True},
    "inception_v3": {"aux_logits": False},  # the auxiliary head needs 299 pixels
}


@slow
@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision(name: str) -> None:
    options = {"aux_loss": True} if name.startswith(("deeplab", "fcn")) else OPTIONS.get(name, {})
    side = 75 if name == "inception_v3" else 32
    model = coverage.build(name, num_classes=5, **options)
    if name.startswith("vgg"):
        model.classifier = nn.Flatten()  # 120 million parameters, and no normalizer
    with_prior, number = check(model.double(), torch.randn(2, 3, side, side))
    print(f"\n{name}: {with_prior} of {number} normalizers have a prior")
    assert with_prior == number - 1  # all but the first


@slow
def test_torchvision_maxvit() -> None:
    """Attention between convolutions: the belief is lost, and comes back behind the next normalizer."""
    model = MaxVit((64, 64), 16, 2, [16, 32, 32, 32], [1, 1, 1, 1], 16, 0.1, num_classes=5)
    with_prior, number = check(model.double(), torch.randn(2, 3, 64, 64))
    print(f"\nmaxvit: {with_prior} of {number} normalizers have a prior")
    assert with_prior == 9 and number == 13


@slow
def test_every_model_of_torchvision_is_converted() -> None:
    """Run on shapes alone; the table in docs/coverage.md is what comes out."""
    rows = []
    with coverage.without_memory():
        for name in coverage.names():
            model = coverage.build(name)
            if coverage.has_batch_norm(model):
                report = coverage.report(model)
                assert report and any(why is None for why in report.values())
                rows.append(coverage.row(name, report))
    assert len(rows) > 50
    committed = TABLE.read_text()
    if f"torchvision {torchvision.__version__.partition('+')[0]}'s" in committed:
        assert committed.splitlines()[-len(rows) :] == rows, "run python scripts/belief_coverage.py > docs/coverage.md"


# --- timm -------------------------------------------------------------------------------------------------------------

# The side of the images, and normalizers without a prior.
TIMM: dict[str, tuple[int, int]] = {
    "cs3darknet_focus_s": (64, 1),
    "cspnext_s": (64, 1),
    "dla46_c": (64, 1),
    "dpn48b": (64, 1),
    "ecaresnet26t": (64, 11),  # a Conv1d over the channels
    "ese_vovnet19b_slim_dw": (64, 1),
    "fasternet_t0": (64, 1),
    "fbnetc_100": (64, 1),
    "ghostnet_050": (64, 1),
    "hardcorenas_a": (64, 1),
    "hgnetv2_b0": (64, 1),
    "hrnet_w18_small": (64, 1),
    "lcnet_050": (64, 1),
    "legacy_seresnet18": (64, 1),
    "levit_128s": (224, 49),  # linear layers over tokens
    "mobilenetv2_050": (64, 1),
    "mobilenetv3_small_050": (64, 1),
    "mobilenetv4_conv_small_050": (64, 1),
    "regnetx_002": (64, 1),
    "repghostnet_050": (64, 1),
    "repvgg_a0": (64, 2),  # two branches at the input
    "repvit_m0_9": (64, 1),
    "resnest14d": (64, 9),  # a sum over one of five axes
    "resnet10t": (64, 1),
    "resnetv2_18": (64, 3),  # three of them see the stem's convolution
    "rexnet_100": (64, 1),
    "selecsls42": (64, 1),
    "shvit_s1": (64, 19),  # attention
    "starnet_s1": (64, 1),
    "swiftformer_xs": (224, 9),  # attention
    "tf_efficientnet_lite0": (64, 1),
    "tinynet_e": (64, 1),
}


@slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    side, without_prior = TIMM[name]
    try:
        model = timm.create_model(name, num_classes=5, drop_path_rate=0.1)
    except TypeError:  # of those that drop nothing
        model = timm.create_model(name, num_classes=5)
    with_prior, number = check(model.double(), torch.randn(2, 3, side, side))
    print(f"\n{name}: {with_prior} of {number} normalizers have a prior")
    assert number - with_prior == without_prior


@slow
def test_timm_that_cannot_be_traced() -> None:
    """Control flow on sizes, in blocks that hold normalizers: they run as they are; what lost a belief is named."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilevit_xxs", num_classes=5)
    converted = kalmannorm.convert(model, "bkn", stat_batch=2)
    blocks = ["stages.2.1", "stages.3.1", "stages.4.1"]
    assert list(untraced(converted)) == blocks
    assert all("control flow" in why for why in untraced(converted).values())
    report = kalmannorm.belief_report(converted, torch.randn(2, 3, 64, 64))
    without = {name: why for name, why in report.items() if why is not None}
    assert list(without) == ["stem.bn", *(f"{block}.conv_proj.bn" for block in blocks)]
    assert all("reshape" in without[f"{block}.conv_proj.bn"] for block in blocks)
    assert check(model.double(), torch.randn(2, 3, 64, 64)) == (28, 32)
