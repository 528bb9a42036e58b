"""Converts models of other libraries, and trains, evaluates and folds each: docs/zoo.md is the table.

    python benchmarks/zoo.py [NAME ...]

Every family of torchvision's with BatchNorm (classification, segmentation, detection, video), families of timm's and
of Hugging Face's where these are installed; small members or configurations, random weights, small images, in float64.
Each is converted to BKN with statistics of 2 images, trained for one step, saved and loaded, and folded, which must not
change what it computes in evaluation. Given names, it prints their rows and leaves the table as it is.
"""

import copy
import io
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection, segmentation, video

import kalmannorm
from kalmannorm.conversion import untraced
from kalmannorm.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "zoo.md"
IMAGES, STAT_BATCH = 4, 2
TOLERANCE = 1e-6  # largest difference of the folded model's outputs, relative to the largest output

HEAD = """# Models of other libraries

{models} models of {libraries}, each converted by
`kalmannorm.convert(model, "bkn", stat_batch=2)`, trained for one step, saved and loaded, and folded back into a plain
model with the same outputs in evaluation (in float64, to 10⁻⁶), but for the rows that say otherwise: small members of
their families, with random weights and small images. Made by `make zoo` (`benchmarks/zoo.py`).

A normalizer without a prior only measures. "The input": the normalizer follows the model's input, whose distribution is
unknown unless `input_belief` is given. "Untraced parts": torch.fx cannot trace their forward, so that they run it
eagerly and beliefs are found by tensor. R-CNNs with normalizers after the proposals, of which there is any number, are
converted with `ragged="measure"`.

| library | model | with a prior / normalizers | untraced parts | without a prior because of |
| --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Entry:
    """A model: how it is built, the arguments of its forward in training and in evaluation, and options of convert."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[tuple[Any, ...], tuple[Any, ...]]]
    options: dict[str, Any] = field(default_factory=dict)


def pictures(side: int, *frames: int, number: int = IMAGES) -> Callable[[], tuple[tuple[Any, ...], tuple[Any, ...]]]:
    def make() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        x = torch.randn(number, 3, *frames, side, side, dtype=torch.float64)
        return (x,), (x,)

    return make


# --- torchvision ------------------------------------------------------------------------------------------------------

CLASSIFIERS = {  # name -> side of the images in pixels
    **dict.fromkeys(("densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "mnasnet0_5"), 64),
    **dict.fromkeys(("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "regnet_x_400mf"), 64),
    **dict.fromkeys(("regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"), 64),
    **dict.fromkeys(("shufflenet_v2_x0_5", "vgg11_bn"), 64),
    "inception_v3": 75,
    "maxvit_t": 224,
}
SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
DETECTORS = (
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn"),
    *("fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn", "retinanet_resnet50_fpn"),
    *("retinanet_resnet50_fpn_v2", "ssdlite320_mobilenet_v3_large", "maskrcnn_resnet50_fpn"),
    *("maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn"),
)
FILMS = {"mc3_18": (8, 32), "r2plus1d_18": (8, 32), "r3d_18": (8, 32), "s3d": (16, 224)}  # name -> frames, side


def of_torchvision() -> Iterator[Entry]:
    options: dict[str, dict[str, Any]] = {
        "googlenet": {"aux_logits": True, "init_weights": False},
        "inception_v3": {"aux_logits": False, "init_weights": False},  # the auxiliary head needs 299 pixels
    }

    def classifier(name: str) -> nn.Module:
        model = torchvision.models.get_model(name, num_classes=5, **options.get(name, {}))
        if name == "vgg11_bn":
            model.classifier = nn.Flatten()  # 120 million parameters, and no normalizer
        return model

    for name, side in CLASSIFIERS.items():
        yield Entry("torchvision", name, lambda name=name: classifier(name), pictures(side))  # type: ignore[misc]
    for name in SEGMENTERS:
        aux = {} if name.startswith("lraspp") else {"aux_loss": True}
        make = getattr(segmentation, name)
        yield Entry(
            "torchvision",
            name,
            lambda make=make, aux=aux: make(weights=None, weights_backbone=None, num_classes=5, **aux),  # type: ignore[misc]
            pictures(64),
        )
    for name in DETECTORS:
        make = getattr(detection, name)
        size = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 96}
        yield Entry(
            "torchvision",
            name,
            lambda make=make, size=size: make(weights=None, weights_backbone=None, num_classes=3, **size),  # type: ignore[misc]
            scenes,
            # Normalizers behind the proposals, whose number varies.
            {"ragged": "measure"} if name.endswith("rcnn_resnet50_fpn_v2") else {},
        )
    for name, (frames, side) in FILMS.items():
        number = 2 if name == "s3d" else IMAGES
        make = getattr(video, name)
        yield Entry("torchvision", name, lambda make=make: make(num_classes=5), pictures(side, frames, number=number))  # type: ignore[misc]


def scenes() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return images with two objects each, with boxes, masks and keypoints, as a detector's arguments."""
    images = [torch.rand(3, 64, 80, dtype=torch.float64) for _ in range(IMAGES)]
    targets = []
    for _ in images:
        boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [30.0, 20.0, 76.0, 60.0]], dtype=torch.float64)
        points = (boxes[:, :2] + boxes[:, 2:]) / 2
        keypoints = torch.cat([points, torch.ones(2, 1)], 1)[:, None].repeat(1, 17, 1).float()  # torchvision's demand
        masks = torch.zeros(2, 64, 80, dtype=torch.uint8)
        for mask, (x, y, to_x, to_y) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y:to_y, x:to_x] = 1
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, "keypoints": keypoints})
    return (images, targets), (images,)


# --- timm -------------------------------------------------------------------------------------------------------------

TIMM = {  # name -> side of the images in pixels
    **dict.fromkeys(
        ("cs3darknet_focus_s", "cspnext_s", "dla46_c", "dpn48b", "ecaresnet26t", "ese_vovnet19b_slim_dw"), 64
    ),
    **dict.fromkeys(("efficientvit_b0", "fasternet_t0", "fbnetc_100", "ghostnet_050", "ghostnetv2_100"), 64),
    **dict.fromkeys(("hardcorenas_a", "hgnetv2_b0", "hrnet_w18_small", "lcnet_050", "legacy_seresnet18"), 64),
    **dict.fromkeys(("mixnet_s", "mobilenetv1_100", "mobilenetv2_050", "mobilenetv3_small_050"), 64),
    **dict.fromkeys(("mobilenetv4_conv_small_050", "mobileone_s0", "mobilevit_xxs", "mobilevitv2_050"), 64),
    **dict.fromkeys(
        ("regnetx_002", "regnety_002", "repghostnet_050", "repvgg_a0", "repvit_m0_9", "res2net50_14w_8s"), 64
    ),
    **dict.fromkeys(("resnest14d", "resnet10t", "resnetv2_18", "rexnet_100", "seresnext26t_32x4d", "selecsls42"), 64),
    **dict.fromkeys(("shvit_s1", "skresnet18", "starnet_s1", "tf_efficientnet_lite0", "tinynet_e", "xception41"), 64),
    **dict.fromkeys(("fastvit_t8", "efficientformer_l1", "levit_128s", "swiftformer_xs", "visformer_tiny"), 224),
}


def of_timm() -> Iterator[Entry]:
    import timm

    for name, side in TIMM.items():
        yield Entry("timm", name, lambda name=name: timm.create_model(name, num_classes=5), pictures(side))  # type: ignore[misc]


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def of_transformers() -> Iterator[Entry]:
    import transformers as hf

    widths = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 2, 2, 1]}
    resnet = {**widths, "layer_type": "bottleneck", "out_features": ["stage2", "stage3", "stage4"]}
    detr: dict[str, Any] = {
        **{"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "num_queries": 5},
        **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    }
    small_vit = {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]}
    made: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "ResNetForImageClassification": (
            lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**widths, layer_type="basic", num_labels=5)),
            64,
        ),
        "RegNetForImageClassification": (
            lambda: hf.RegNetForImageClassification(hf.RegNetConfig(**widths, groups_width=8, num_labels=5)),
            64,
        ),
        "MobileNetV1ForImageClassification": (
            lambda: hf.MobileNetV1ForImageClassification(hf.MobileNetV1Config(depth_multiplier=0.25, num_labels=5)),
            64,
        ),
        "MobileNetV2ForImageClassification": (
            lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(depth_multiplier=0.35, num_labels=5)),
            64,
        ),
        "EfficientNetForImageClassification": (
            lambda: hf.EfficientNetForImageClassification(
                hf.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, num_labels=5)
            ),
            64,
        ),
        "HGNetV2ForImageClassification": (
            lambda: hf.HGNetV2ForImageClassification(hf.HGNetV2Config(num_labels=5)),
            64,
        ),
        "TextNetForImageClassification": (lambda: hf.TextNetForImageClassification(hf.TextNetConfig(num_labels=5)), 64),
        "MobileViTForImageClassification": (
            lambda: hf.MobileViTForImageClassification(hf.MobileViTConfig(**small_vit, num_labels=5)),
            64,
        ),
        "MobileViTV2ForImageClassification": (
            lambda: hf.MobileViTV2ForImageClassification(hf.MobileViTV2Config(width_multiplier=0.5, num_labels=5)),
            64,
        ),
        "LevitForImageClassification": (
            lambda: hf.LevitForImageClassification(
                hf.LevitConfig(
                    hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], key_dim=[8, 8, 8], num_labels=5
                )
            ),
            224,
        ),
        "CvtForImageClassification": (
            lambda: hf.CvtForImageClassification(
                hf.CvtConfig(embed_dim=[16, 32, 64], num_heads=[1, 2, 4], depth=[1, 2, 3], num_labels=5)
            ),
            64,
        ),
        "SwiftFormerForImageClassification": (
            lambda: hf.SwiftFormerForImageClassification(
                hf.SwiftFormerConfig(depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 48], num_labels=5)
            ),
            64,
        ),
        "SegformerForSemanticSegmentation": (
            lambda: hf.SegformerForSemanticSegmentation(
                hf.SegformerConfig(hidden_sizes=[16, 16, 32, 32], depths=[1] * 4, decoder_hidden_size=32, num_labels=5)
            ),
            64,
        ),
        "UperNetForSemanticSegmentation": (
            lambda: hf.UperNetForSemanticSegmentation(
                hf.UperNetConfig(
                    backbone_config=hf.ResNetConfig(
                        **widths, layer_type="basic", out_features=["stage1", "stage2", "stage3", "stage4"]
                    ),
                    hidden_size=32,
                    use_auxiliary_head=True,
                    auxiliary_in_channels=64,
                    auxiliary_channels=16,
                    num_labels=5,
                )
            ),
            64,
        ),
        "RTDetrResNetBackbone": (lambda: hf.RTDetrResNetBackbone(hf.RTDetrResNetConfig(**resnet)), 64),
        "ResNetBackbone": (lambda: hf.ResNetBackbone(hf.ResNetConfig(**resnet)), 64),
        "DetrForObjectDetection": (
            lambda: hf.DetrForObjectDetection(hf.DetrConfig(**detr, backbone_config=hf.ResNetConfig(**resnet))),
            64,
        ),
        "ConditionalDetrForObjectDetection": (
            lambda: hf.ConditionalDetrForObjectDetection(
                hf.ConditionalDetrConfig(**detr, backbone_config=hf.ResNetConfig(**resnet))
            ),
            64,
        ),
    }
    for name, (build, side) in made.items():
        yield Entry("transformers", name, build, pictures(side))


# --- what is done with each -------------------------------------------------------------------------------------------


def tensors(value: Any) -> Iterable[Tensor]:
    """Return the floating-point tensors in whatever a model returns."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if hasattr(value, "items"):
        value = dict(value.items()).values()
    return (
        [one for part in value for one in tensors(part)]
        if isinstance(value, Iterable) and not isinstance(value, str)
        else []
    )


def outputs(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    torch.manual_seed(1)  # dropout, stochastic depth
    return list(tensors(model(*copy.deepcopy(arguments))))


def tried(entry: Entry) -> str:
    """Try all steps on a model and return its row of the table. Raises what goes wrong."""
    torch.manual_seed(0)
    original = entry.build().double()
    training, evaluation = entry.inputs()
    extra = entry.options
    try:
        model = kalmannorm.convert(original, "bkn", stat_batch=STAT_BATCH, **extra)
    except ValueError as error:
        if "thaw=True" not in str(error):  # raised only for frozen BatchNorm
            raise
        extra = {**extra, "thaw": True}
        model = kalmannorm.convert(original, "bkn", stat_batch=STAT_BATCH, **extra)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss: Any = sum(out.square().mean() for out in outputs(model.train(), training))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None), (
        "a gradient is not finite"
    )
    # Without clipping, a step makes a Levit with random weights infinite: its gradients, with BatchNorm too, are 1e17.
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = outputs(model, evaluation)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        again = kalmannorm.convert(original, "bkn", stat_batch=STAT_BATCH, **extra)
        again.load_state_dict(torch.load(file))
        for what, other in (("loaded", again.eval()), ("folded", kalmannorm.fold(model).eval())):
            found = outputs(other, evaluation)
            assert len(found) == len(expected), f"{what}, it returns something else"
            for a, b in zip(found, expected, strict=True):
                assert a.shape == b.shape, f"{what}, it returns another number"
                off = float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) if b.numel() else 0.0
                assert off < TOLERANCE, f"{what}, its outputs differ by {off:.1e}"
    report = kalmannorm.belief_report(model.train(), *copy.deepcopy(training))
    reasons = Counter("the input" if why.startswith("nothing:") else f"`{why}`" for why in report.values() if why)
    why = ", ".join(reason if count == 1 else f"{reason} × {count}" for reason, count in reasons.most_common())
    name = entry.name + (" (thawed)" if "thaw" in extra else "")
    with_prior = sum(one is None for one in report.values())
    parts = len(untraced(model)) or ""
    return f"| {entry.library} | {name} | {with_prior} / {len(report)} | {parts} | {why} |"


def main(names: list[str]) -> int:
    warnings.filterwarnings("ignore")
    sources = {"torchvision": of_torchvision, "timm": of_timm, "transformers": of_transformers}
    installed = [library for library in sources if find_spec(library) is not None]
    rows, failed = [], 0
    for library in installed:
        for entry in sources[library]():
            if names and entry.name not in names:
                continue
            start = time.perf_counter()
            try:
                row = tried(entry)
            except Exception as error:
                failed += 1
                words = " ".join(str(error).split())[:200]
                row = f"| {entry.library} | {entry.name} | fails | | {type(error).__name__}: {words} |"
            rows.append(row)
            print(row, f"{time.perf_counter() - start:.0f} s", flush=True)
    if not names:
        libraries = ", ".join(f"{library} {version(library).partition('+')[0]}" for library in installed)
        write_atomically(TABLE, (HEAD.format(models=len(rows), libraries=libraries) + "\n".join(rows) + "\n").encode())
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
