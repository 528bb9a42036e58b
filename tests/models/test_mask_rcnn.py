"""Mask R-CNN C4: torchvision's losses, statistics of regions, beliefs at RoIAlign, weights."""

import copy
import math

import pytest
import torch
from coco_files import TINY
from detectors import SMALL, scene
from helpers import error
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet50
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, roi_align

from kalmannorm import Belief, belief_report, convert
from kalmannorm.errors import UserError
from kalmannorm.experiments.config import compose
from kalmannorm.models.detection.c4 import MaskRCNNC4
from kalmannorm.models.detection.parts import LOSSES, KeyedSampler
from kalmannorm.train import detector
from kalmannorm.train.model import build
from kalmannorm.train.pretrained import load_pretrained


def small(seed=0, **options):
    torch.manual_seed(seed)
    return MaskRCNNC4(3, **{**SMALL, **options})


def converted(norm, carry=False, **options):
    model = small()
    detector.convert_parts(model, norm, stat_batch=2, carry=carry, **options)
    return model.train()


def test_the_full_network_is_resnet50_c4():
    with torch.device("meta"):
        model, whole = MaskRCNNC4(80), resnet50()
    names = {key for part in (model.body, model.roi_heads.box_head) for key in part.state_dict()}
    assert names == {key for key in whole.state_dict() if not key.startswith("fc")}
    assert model.rpn.head.cls_logits.out_channels == 15 and model.rpn.head.cls_logits.in_channels == 1024
    assert model.roi_heads.box_predictor.cls_score.in_features == 2048
    assert sum(p.numel() for p in model.parameters()) == 23_508_032 + 9_438_208 + 76_875 + 829_845 + 2_118_225


def test_losses_are_torchvisions():
    """One image: torchvision's RoIHeads, with a mask head of its own pass through conv5, on the same draws."""
    ours = converted("gn")
    (image,), (target,) = scene(1)
    theirs = copy.deepcopy(ours)
    heads = RoIHeads(
        MultiScaleRoIAlign(["0"], SMALL["roi_size"], 0), _Pooled(theirs.roi_heads.box_head),
        theirs.roi_heads.box_predictor, 0.5, 0.5, 8, 0.25, None, 0.05, 0.5, 100,
        MultiScaleRoIAlign(["0"], SMALL["roi_size"], 0), theirs.roi_heads.box_head, theirs.roi_heads.mask_predictor,
    )  # fmt: skip
    heads.fg_bg_sampler = theirs.roi_heads.fg_bg_sampler
    found = ours([image], [target])
    batch, targets = theirs.transform([image], [target])
    theirs.rpn.fg_bg_sampler.keys = heads.fg_bg_sampler.keys = [target["key"]]
    maps = {"0": theirs.body(batch.tensors)}
    proposals, losses = theirs.rpn(batch, maps, targets)
    _, of_heads = heads.train()(maps, proposals, batch.image_sizes, targets)
    assert set(found) == set(LOSSES) == set(losses | of_heads)
    for name, value in (losses | of_heads).items():
        assert error(found[name], value) < 1e-5, name


class _Pooled(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x).mean((2, 3))


def test_losses_of_a_batch_are_means_over_its_images():
    model = converted("gn")
    images, targets = scene(3)
    together = model(images, targets)
    each = [model([image], [target]) for image, target in zip(images, targets, strict=True)]
    for name in LOSSES:
        assert error(together[name], torch.stack([one[name] for one in each]).mean()) < 1e-5, name


def test_a_draw_belongs_to_its_image():
    sampler = KeyedSampler(8, 0.25, salt=1)
    matched = [torch.randint(-1, 2, (100,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    sampler.keys = [5, 6, 7]
    positive, negative = sampler(matched)
    assert [int(p.sum()) for p in positive] == [2] * 3 and [int(n.sum()) for n in negative] == [6] * 3
    assert all(
        (m[p > 0] == 1).all() and (m[n > 0] == 0).all() for m, p, n in zip(matched, positive, negative, strict=True)
    )
    sampler.keys = [7]
    alone, _ = sampler(matched[2:])
    assert torch.equal(alone[0], positive[2])
    sampler.keys = [8]
    assert not torch.equal(sampler(matched[2:])[1][0], negative[2])


def test_head_statistics_are_of_the_regions_of_a_groups_images():
    """4 images in groups of 2: images 0 and 2, and 1 and 3. Fewer regions than `boxes` are repeated in turn."""
    model = converted("bn", False)
    images, targets = scene(4)
    seen, rows = [], []
    first = model.roi_heads.box_head.get_submodule("layer4.0.bn1")
    first.probe = lambda measured, used, prior: seen.append(measured)
    first.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].detach()))
    model(images, targets)
    of_image = rows[0].unflatten(0, (SMALL["boxes"], 4))  # [boxes, images, C, h, w]
    for group, members in enumerate(([0, 2], [1, 3])):
        own = of_image[:, members].transpose(0, 2).flatten(1)
        assert error(seen[0].mean[group], own.mean(1)) < 1e-4
        assert error(seen[0].var[group], own.var(1, correction=0)) < 1e-4

    few = copy.deepcopy(model.roi_heads)
    few.box_head.get_submodule("layer4.0.bn1")._forward_pre_hooks.clear()
    proposals = [torch.tensor([[0.0, 0.0, 30.0, 30.0]]) for _ in range(4)]  # with the two objects: 3 regions
    pooled = []
    few.box_head.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    map16 = torch.rand(4, 64, 4, 6)
    few.fg_bg_sampler.keys = [1, 2, 3, 4]
    losses = few({"0": map16}, proposals, [(64, 96)] * 4, targets)[1]
    of_image = pooled[0].unflatten(0, (SMALL["boxes"], 4))[:, 0]
    assert torch.equal(of_image[0], of_image[3]) and torch.equal(of_image[1], of_image[4])
    assert not torch.equal(of_image[0], of_image[1]) and all(torch.isfinite(loss) for loss in losses.values())


def test_groups_do_not_leak():
    model = converted("bkn", carry=True)
    images, targets = scene(4)
    outputs = []
    model.roi_heads.box_head.register_forward_hook(lambda _, inputs, y: outputs.append(y.detach()))
    proposals = [torch.tensor([[0.0, 0.0, 50.0, 50.0]])] * 4
    for brightness in (1.0, 0.2):
        images[1] = images[1] * brightness
        batch, copied = model.transform(images, targets)
        model.roi_heads.fg_bg_sampler.keys = [1, 2, 3, 4]
        features, belief = model.body(batch.tensors)
        model.roi_heads({"0": features}, proposals, batch.image_sizes, copied, belief)
    one, other = (output.unflatten(0, (SMALL["boxes"], 4)) for output in outputs)
    assert torch.equal(one[:, [0, 2]], other[:, [0, 2]])
    assert not torch.allclose(one[:, 3], other[:, 3])


@pytest.mark.parametrize("norm", ["bkn", "gkn", "gn", "frozen"])
@pytest.mark.parametrize("carry", [False, True])
def test_it_trains_and_detects(norm, carry):
    model = converted(norm, carry)
    images, targets = scene(4)
    losses = model(images, targets)
    sum(losses.values()).backward()
    waiting = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not waiting and all(torch.isfinite(loss) for loss in losses.values())
    beliefs = detector.belief_report_of_parts(model)
    after_align = [key for key, lost in beliefs.items() if lost and "roi_align" in lost]
    kalman = norm in ("bkn", "gkn")
    assert after_align == (
        [f"roi_heads.box_head.layer4.0.{n}" for n in ("bn1", "downsample.1")] if kalman and not carry else []
    )
    with torch.no_grad():
        (found,) = model.eval()(images[:1])
    assert found["masks"].shape[1:] == (1, 64, 96) and len(found["masks"]) == len(found["boxes"])


def test_nothing_found_is_no_error():
    model = converted("bkn").eval()
    model.roi_heads.score_thresh = 1.0
    with torch.no_grad():
        (found,) = model(scene(1)[0])
    assert found["masks"].shape == (0, 1, 64, 96) and found["boxes"].shape == (0, 4)


def test_bf16_decodes_boxes_in_full_precision():
    model = converted("bkn")
    images, targets = scene(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in model(images, targets).values())
        head = model.rpn.head([torch.rand(1, 64, 4, 6)])
    assert head[0][0].dtype == head[1][0].dtype == torch.float32


def test_a_belief_carried_over_roi_align_against_sampling():
    """Independent pixels: the regions' mean is the belief's; its variance is an upper bound, since RoIAlign averages
    cells: 0.1 to 0.5 of it here. Where a map is smooth (here: constant over 8 x 8 cells) little is averaged away."""
    torch.manual_seed(0)
    mean, var = torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([0.5, 2.0, 1.0])
    corner = torch.rand(200, 2) * 300
    boxes = torch.cat([corner, corner + 40 + 250 * torch.rand(200, 2)], 1)
    rows = torch.cat([torch.zeros(200, 1), boxes], 1)
    for smooth, low, high in ((1, 0.1, 0.5), (8, 0.6, 1.0)):
        ratios, off = [], []
        for _ in range(8):
            cells = torch.randn(1, 3, 48 // smooth, 48 // smooth)
            features = cells.repeat_interleave(smooth, 2).repeat_interleave(smooth, 3)
            features = mean.view(1, 3, 1, 1) + var.sqrt().view(1, 3, 1, 1) * features
            regions = roi_align(features, rows, 14, 1 / 16, sampling_ratio=0).transpose(0, 1).flatten(1)
            off.append((regions.mean(1) - mean) / var.sqrt())
            ratios.append(regions.var(1) / var)
        assert torch.stack(off).mean(0).abs().max() < 0.1
        assert low < torch.stack(ratios).mean() < high


def test_parts_take_and_return_beliefs():
    """Two halves of a network, the belief handed over by hand, are the whole network."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5))
    x = torch.rand(4, 3, 9, 9)
    whole = convert(nn.Sequential(*first, *second), "bkn", stat_batch=2).train()
    ahead = convert(first, "bkn", stat_batch=2, returns_belief=True).train()
    behind = convert(second, "bkn", stat_batch=2, input_belief="argument").train()
    features, belief = ahead(x)
    assert isinstance(belief, Belief) and belief.mean.shape == (2, 4)
    assert torch.equal(behind(features, belief), whole(x))
    assert belief_report(behind) == {"1": None}
    assert convert(first, "gn", returns_belief=True)(x)[1] is None
    with pytest.raises(ValueError, match="argument"):
        convert(second, "bkn", input_belief="parameter")


def test_an_architecture_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match="no BatchNorm"):
        detector.convert_parts(nn.Sequential(nn.Conv2d(3, 3, 1)), "bn")


# --- weights ---


def config(*overrides):
    return compose([*TINY, *overrides])


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_pretrained_weights_fill_both_parts(tmp_path, ending):
    plain = small()
    weights = {**plain.body.state_dict(), **plain.roi_heads.box_head.state_dict(), "fc.weight": torch.ones(2)}
    weights = {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in weights.items()}
    file = tmp_path / f"weights.{ending}"
    (save_file if ending == "safetensors" else lambda w, f: torch.save(w, f))(weights, file)
    given = config(f"weights={file}", "norm=bkn")
    assert len(given.result()["arch"]["pretrained"]) == 64 and given.result()["arch"]["frozen_stages"] == 2
    assert (
        config("norm=bkn").result()["arch"]["pretrained"] is None
        and config("norm=bkn").result()["arch"]["frozen_stages"] == 0
    )
    model = detector.build(given)
    gain = model.body.get_submodule("bn1").gain_logit.clone()
    load_pretrained(detector.pretrained_parts(model), str(file))
    assert torch.equal(model.body.get_parameter("layer3.0.conv2.weight"), weights["layer3.0.conv2.weight"])
    head = model.roi_heads.box_head
    assert torch.equal(head.get_buffer("layer4.0.bn2.running_var"), weights["layer4.0.bn2.running_var"])
    assert torch.equal(model.body.get_submodule("bn1").gain_logit, gain)
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "body.conv1.weight" in still and "body.bn1.weight" in still and "body.layer1.0.conv1.weight" in still
    assert not any("layer2" in name or "roi_heads" in name for name in still)


def test_unusable_weights_are_named(tmp_path):
    plain = small()
    weights = {**plain.body.state_dict(), **plain.roi_heads.box_head.state_dict()}
    model = detector.build(config("norm=gn"))
    file = tmp_path / "weights.pth"
    torch.save({key: value for key, value in weights.items() if key != "layer2.0.conv1.weight"}, file)
    with pytest.raises(UserError, match=r"layer2.0.conv1.weight is missing"):
        load_pretrained(detector.pretrained_parts(model), str(file))
    torch.save(weights | {"conv1.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(UserError, match=r"conv1.weight is \[3, 3\]"):
        load_pretrained(detector.pretrained_parts(model), str(file))
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"expected a \.pth or \.safetensors"):
        load_pretrained(detector.pretrained_parts(model), str(file))
    with pytest.raises(UserError, match="weights = "):
        config("weights=/nowhere/resnet50.pth")
    with pytest.raises(UserError, match="only detectors, segmenters and videos' networks"):
        compose([f"weights={file}"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("arch.name=mask_rcnn_c5", "mask_rcnn_c4"),
        ("arch.roi_belief=keep", "expected to be 'end' or 'carry'"),
        ("arch.frozen_stages=7", "less than or equal to 4"),
        ("norm=brn", "follows a schedule"),
        ("schedule=released", "pass schedule=c4_280k"),
    ],
)
def test_impossible_detectors_are_refused(override, words):
    with pytest.raises(UserError, match=words):
        detector.build(compose([o for o in TINY if not o.startswith(override.split("=")[0] + "=")] + [override]))


def test_a_classifier_is_refused_a_detectors_settings():
    for override, words in (("arch=mask_rcnn_c4", "unknown arch"), ("schedule=c4_280k", "pass schedule=released")):
        with pytest.raises(UserError, match=words):
            build(compose([override]))


def test_normalizers_share_their_initial_weights():
    bkn, gn = (detector.build(config(f"norm={norm}")) for norm in ("bkn", "gn"))
    assert torch.equal(bkn.body.get_parameter("conv1.weight"), gn.body.get_parameter("conv1.weight"))
    assert torch.equal(bkn.roi_heads.mask_predictor.conv5_mask.weight, gn.roi_heads.mask_predictor.conv5_mask.weight)
    assert math.isclose(bkn.body.get_submodule("bn1").gain_value, 0.5)
