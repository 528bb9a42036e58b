"""torchvision's FPN model as an architecture of the harness: its names, its losses, the same switch for normalizers."""

import copy
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from coco_files import TINY_FPN
from detectors import SMALL, scene
from helpers import error
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from kalmannorm.errors import UserError
from kalmannorm.experiments.config import compose
from kalmannorm.experiments.record import run_id
from kalmannorm.models.detection.fpn import MaskRCNNFPN
from kalmannorm.models.detection.parts import LOSSES
from kalmannorm.norm import BatchNorm, FrozenBatchNorm, GroupNorm, KalmanBatchNorm2d, SwitchableNorm
from kalmannorm.train import detector
from kalmannorm.train.model import optimizer
from kalmannorm.train.pretrained import load_pretrained


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
    beliefs = detector.belief_report_of_parts(model)
    without = [key for key, lost in beliefs.items() if lost is not None]
    assert without == (["backbone.body.bn1"] if norm in ("bkn", "gkn") else [])
    assert all(key.startswith("backbone.body.") for key in beliefs)


def test_weights_and_frozen_stages_are_the_bodys(tmp_path):
    plain = small().backbone.body.state_dict()
    weights = {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in plain.items()}
    file = tmp_path / "weights.pth"
    torch.save(weights, file)
    model = detector.build(compose([*TINY_FPN, "norm=bkn", f"weights={file}"]))
    load_pretrained(detector.pretrained_parts(model), str(file))
    body = detector.body(model)
    assert torch.equal(body.get_parameter("layer4.0.conv2.weight"), weights["layer4.0.conv2.weight"])
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "backbone.body.conv1.weight" in still and not any("layer2" in name or "fpn" in name for name in still)


def test_every_convolutions_and_linear_layers_weight_decays():
    """The mask head's transposed convolution too, as in Detectron; biases, gamma and beta do not."""
    model = detector.build(compose([*TINY_FPN, "norm=gn", "arch.head_norm=gn"]))
    decayed = {id(p) for p in optimizer(model, momentum=0.9, weight_decay=1e-4).param_groups[0]["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in decayed} == {
        name for name, p in model.named_parameters() if p.dim() > 1
    }


# --- normalizers in pyramid and heads ---


HEADS = {"gn": GroupNorm, "sn": SwitchableNorm, "bn": BatchNorm, "bkn": KalmanBatchNorm2d}


@pytest.mark.parametrize("norm", HEADS)
def test_where_normalizers_stand(norm):
    """The talk's public code: behind the pyramid's 8 convolutions, which lose their biases, without ReLU; in heads of 4
    convolutions each; none in the proposal network."""
    model = detector.build(compose([*TINY_FPN, "norm=frozen", f"arch.head_norm={norm}"]))
    placed = [
        name for name, m in model.named_modules() if type(m).__bases__[0] is HEADS[norm] or type(m) is HEADS[norm]
    ]
    pyramid = [f"backbone.fpn.{kind}_blocks.{level}.1" for kind in ("inner", "layer") for level in range(4)]
    heads = [f"roi_heads.{head}.{number}.1" for head in ("box_head", "mask_head") for number in range(4)]
    assert placed == pyramid + heads
    assert not [key for key in model.state_dict() if key.startswith("backbone.fpn") and key.endswith(".0.bias")]
    assert [len(block) for block in model.backbone.fpn.inner_blocks] == [2, 2, 2, 2]  # no third part, a ReLU
    assert not [m for m in model.rpn.modules() if isinstance(m, tuple(HEADS.values()))]
    frozen = [name for name, m in model.named_modules() if isinstance(m, FrozenBatchNorm)]
    assert len(frozen) == 17 and all(name.startswith("backbone.body.") for name in frozen)
    images, targets = scene(2)
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    idle = {f"{name}.{key}" for name in placed if norm == "bkn" for key in ("gain_logit", "noise_raw")}
    assert without <= idle


def test_the_full_network_with_them():
    """Names and shapes of torchvision's parts with BatchNorm, and of its model elsewhere."""
    with torch.device("meta"):
        plain, normalized, faster = MaskRCNNFPN(), MaskRCNNFPN(head_norm="sn"), MaskRCNNFPN(mask_head=False)
        theirs = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=81)
    one, two, three, other = (
        {key: tuple(value.shape) for key, value in model.state_dict().items()}
        for model in (plain, normalized, faster, theirs)
    )
    # torchvision's second version has two convolutions in the proposal network, and biases in its box head alone.
    assert {k: v for k, v in two.items() if "rpn" not in k} == {k: v for k, v in other.items() if "rpn" not in k}
    assert {k: v for k, v in two.items() if "rpn" in k} == {k: v for k, v in one.items() if "rpn" in k}
    assert three == {key: shape for key, shape in one.items() if "mask" not in key}


def test_beliefs_go_on_into_the_pyramid_and_end_at_regions():
    beliefs = belief_of(["norm=bkn", "arch.head_norm=bkn"])
    assert [key for key, lost in beliefs.items() if lost] == [
        "backbone.body.bn1", "roi_heads.box_head.0.1", "roi_heads.mask_head.0.1",
    ]  # fmt: skip
    assert beliefs["roi_heads.mask_head.0.1"] == detector.BELIEF_ENDS_AT_HEADS
    alone = belief_of(["norm=gn", "arch.head_norm=bkn"])
    lost = [key for key, reason in alone.items() if reason]
    assert lost[:4] == [f"backbone.fpn.inner_blocks.{level}.1" for level in (3, 2, 1, 0)] and len(lost) == 6


def belief_of(overrides):
    model = detector.build(compose([*TINY_FPN, *overrides])).train()
    model(*scene(4))
    return detector.belief_report_of_parts(model)


def test_a_detector_is_pickled_whole():
    model, (images, _) = small().eval(), scene(1)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_faster_rcnn():
    model = detector.build(compose([*TINY_FPN, "norm=gn", "arch.head_norm=gn", "arch.mask_head=false"]))
    images, targets = scene(2)
    assert set(model.train()(images, targets)) == {*LOSSES} - {"loss_mask"}
    assert not [m for m in model.roi_heads.modules() if isinstance(m, GroupNorm)]
    with torch.no_grad():
        assert set(model.eval()(images)[0]) == {"boxes", "scores", "labels"}


def test_heads_average_once_a_batch():
    """Two images' regions are two groups of one step, as if two processes had one each."""
    model = detector.build(compose([*TINY_FPN, "norm=gn", "arch.head_norm=bn"])).train()
    layer = model.roi_heads.box_head[0][1]
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    model(*scene(2))
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    assert len(seen) == 2 and error(layer.running_mean, 0.1 * means.mean(0)) < 1e-6
    assert layer.num_batches_tracked == 1 and layer.pending is None


def test_constants_and_weights_are_the_bodys(tmp_path):
    config = compose([*TINY_FPN, "norm=frozen", "arch.head_norm=sn"])
    model = detector.build(config)
    before = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
    images, targets = scene(2)
    batch = SimpleNamespace(images=images, targets=targets, canvas=(64, 96))
    detector.measure_constants(model, config, SimpleNamespace(device="cpu", epoch=lambda _: iter([batch])))
    changed = {key for key, value in before.items() if not torch.equal(value, model.state_dict()[key])}
    assert changed == {key for key in before if ".body." in key}
    plain = small().backbone.body.state_dict()
    torch.save(plain, tmp_path / "weights.pth")
    load_pretrained(detector.pretrained_parts(model), str(tmp_path / "weights.pth"))
    assert torch.equal(detector.body(model).conv1.weight, plain["conv1.weight"])


def test_defaults_are_no_part_of_an_id():
    plain = compose([*TINY_FPN, "norm=gn"])
    same = compose([*TINY_FPN, "norm=gn", "arch.head_norm=none", "arch.mask_head=true"])
    assert run_id(plain) == run_id(same) and not {"head_norm", "mask_head"} & {*plain.arch.options}
    assert run_id(plain) != run_id(compose([*TINY_FPN, "norm=gn", "arch.mask_head=false"]))
    # Images share statistics where heads have them, whatever the backbone has.
    shared = [compose([*TINY_FPN, "norm=gn", f"arch.head_norm={norm}"]).batch.stat_batch for norm in ("gn", "sn")]
    assert shared == [None, 2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["arch.head_norm=xn"], "arch.head_norm = xn: expected to be 'none', 'bn', 'gn'"),
        (["arch.head_norm=null"], "arch.head_norm = None: expected to be 'none'"),
        (["arch.mask_head=1"], "arch.mask_head = 1: expected to be true or false"),
        (["norm=gkn", "arch.head_norm=bkn"], "the body's beliefs have other rows"),
        (["norm=bkn", "norm.predictor=sampling", "arch.head_norm=bkn"], "pass norm.predictor=closed"),
        (["norm=bkn", "+arch.roi_belief=carry", "arch.head_norm=bkn"], "pass arch.roi_belief=end"),
        (["norm=none", "arch.head_norm=gn"], "none is for all layers of a network"),
        (["arch=mask_rcnn_c4", "+arch.head_norm=gn"], "arch mask_rcnn_c4"),
        (["arch=mask_rcnn_c4", "+arch.mask_head=false"], "arch mask_rcnn_c4"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(overrides, words):
    chosen = {o.partition("=")[0]: o for o in [*TINY_FPN, "norm=gn", *overrides]}
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        detector.build(compose(list(chosen.values())))
    assert "\n" not in str(refused.value)


def test_there_is_nothing_to_carry_a_belief_to():
    with pytest.raises(UserError, match=r"pass arch\.roi_belief=end"):
        detector.build(compose([*TINY_FPN, "norm=bkn", "+arch.roi_belief=carry"]))
