"""torchvision's FPN model as an architecture of the harness: its names, its losses, the same switch for normalizers."""

import copy

import pytest
import torch
from coco_files import TINY_FPN
from helpers import error
from test_mask_rcnn import SMALL, scene
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from kalmannorm.errors import UserError
from kalmannorm.experiments.config import compose
from kalmannorm.models.detection.fpn import MaskRCNNFPN
from kalmannorm.models.detection.parts import LOSSES
from kalmannorm.train import detector


def small(seed=0):
    torch.manual_seed(seed)
    return MaskRCNNFPN(3, **{key: value for key, value in SMALL.items() if key != "roi_size"})


def test_the_full_network_is_torchvisions_name_by_name():
    with torch.device("meta"):
        ours, theirs = MaskRCNNFPN(90), maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for name in ("box_roi_pool", "mask_roi_pool"):
        one, other = (getattr(model.roi_heads, name) for model in (ours, theirs))
        for key in ("output_size", "sampling_ratio", "canonical_scale", "featmap_names"):
            assert getattr(one, key) == getattr(other, key)
    assert ours.rpn.anchor_generator.sizes == theirs.rpn.anchor_generator.sizes
    assert ours.rpn.anchor_generator.aspect_ratios == theirs.rpn.anchor_generator.aspect_ratios


def test_losses_and_detections_are_torchvisions():
    """One image: torchvision's MaskRCNN of the same parts, on the same draws."""
    ours = small()
    detector.convert_parts(ours, "gn")
    images, targets = scene(1)
    parts, size = copy.deepcopy(ours), SMALL["size"]
    theirs = MaskRCNN(
        parts.backbone, rpn_anchor_generator=parts.rpn.anchor_generator, rpn_head=parts.rpn.head,
        rpn_pre_nms_top_n_train=100, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=10,
        box_roi_pool=parts.roi_heads.box_roi_pool, box_head=parts.roi_heads.box_head,
        box_predictor=parts.roi_heads.box_predictor, mask_roi_pool=parts.roi_heads.mask_roi_pool,
        mask_head=parts.roi_heads.mask_head, mask_predictor=parts.roi_heads.mask_predictor,
    )  # fmt: skip
    transform = ours.transform
    theirs.transform = GeneralizedRCNNTransform(size, SMALL["max_size"], transform.image_mean, transform.image_std)
    theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler = parts.rpn.fg_bg_sampler, parts.roi_heads.fg_bg_sampler
    theirs.rpn.fg_bg_sampler.keys = theirs.roi_heads.fg_bg_sampler.keys = [targets[0]["key"]]
    found, wanted = ours.train()(images, targets), theirs.train()(images, targets)
    assert set(found) == set(wanted) == set(LOSSES)
    for name in LOSSES:
        assert error(found[name], wanted[name]) < 1e-5, name
    for model in (ours.eval(), theirs.eval()):
        model.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        (one,), (other,) = ours(images), theirs(images)
    assert len(one["scores"]) > 0 and all(torch.equal(one[key], other[key]) for key in other)


def test_losses_of_a_batch_are_means_over_its_images_on_any_canvas():
    model = small().train()
    detector.convert_parts(model, "gn")
    images, targets = scene(3)
    together = model(images, targets)
    each = [model([image], [target]) for image, target in zip(images, targets, strict=True)]
    for name in LOSSES:
        assert error(together[name], torch.stack([one[name] for one in each]).mean()) < 1e-5, name
    assert all(torch.isfinite(loss) for loss in model(images, targets, (64, 320)).values())
    pools = (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool)
    assert all(pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32] for pool in pools)


@pytest.mark.parametrize("norm", ["bkn", "gkn", "gn", "frozen"])
def test_the_same_switch(norm):
    model = detector.build(compose([*TINY_FPN, f"norm={norm}"])).train()
    images, targets = scene(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=norm == "bkn"):
        losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    beliefs = detector.describe(model)["beliefs"]
    without = [key for key, lost in beliefs.items() if lost is not None]
    assert without == (["backbone.body.bn1"] if norm in ("bkn", "gkn") else [])
    assert all(key.startswith("backbone.body.") for key in beliefs)


def test_weights_and_frozen_stages_are_the_bodys(tmp_path):
    plain = small().backbone.body.state_dict()
    weights = {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in plain.items()}
    file = tmp_path / "weights.pth"
    torch.save(weights, file)
    model = detector.build(compose([*TINY_FPN, "norm=bkn", f"weights={file}"]))
    detector.load_pretrained(model, str(file))
    body = detector.body(model)
    assert torch.equal(body.get_parameter("layer4.0.conv2.weight"), weights["layer4.0.conv2.weight"])
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "backbone.body.conv1.weight" in still and not any("layer2" in name or "fpn" in name for name in still)


def test_there_is_nothing_to_carry_a_belief_to():
    with pytest.raises(UserError, match=r"pass arch\.roi_belief=end"):
        detector.build(compose([*TINY_FPN, "norm=bkn", "+arch.roi_belief=carry"]))
