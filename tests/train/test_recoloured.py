"""The test images in other colours: what is done to them, and that a record has an accuracy for each."""

import dataclasses

import numpy as np
import pytest
import torch
from trainings import SPREAD

from kalmannorm import data
from kalmannorm.errors import UserError
from kalmannorm.experiments.config import compose
from kalmannorm.train import loop
from kalmannorm.train.loaders import loaders, open_data, recoloured
from kalmannorm.train.ranks import Ranks


def test_colours_are_changed_and_clipped():
    config = compose([*SPREAD, "+dataset.recolour=true"])
    source = open_data(config, Ranks(config))
    pixels = np.random.default_rng(0).integers(0, 256, source.test_images.shape, np.uint8)
    source = dataclasses.replace(source, test_images=pixels)
    train, _ = loaders(config, source, Ranks(config))
    found = recoloured(config, source, train, torch.device("cpu"))
    assert list(found) == ["rgb_50", "red_50", "contrast"]
    plain = data.resize(pixels, config.budget.size).astype(np.float64)
    red = plain + np.array([50, 0, 0])
    mean = plain.mean((1, 2), keepdims=True)
    for name, expected in (("rgb_50", plain + 50), ("red_50", red), ("contrast", (plain - mean) * 1.5 + mean)):
        images, labels, counted = next(found[name].unaugmented(4, range(4)))
        seen = images * 128 + train.mean
        expected = torch.from_numpy(expected[:4].clip(0, 255)).permute(0, 3, 1, 2)
        assert counted == 4 and torch.equal(labels, torch.from_numpy(source.test_labels[:4]))
        assert (seen - expected).abs().max() <= 0.51, name  # whole numbers


def test_records_have_an_accuracy_for_each(tmp_path):
    where = [
        f"results={tmp_path}",
        f"runs={tmp_path}",
        "norm=ibn_b",
        "arch=resnet14",
        "batch.stat_batch=8",
        "budget.epochs=1",
    ]
    small = [one for one in SPREAD if not one.startswith("arch.")]
    record = loop.run(compose([*small, *where, "+dataset.recolour=true"]))
    assert list(record["final"]) == ["moving", "online", "precise", "rgb_50", "red_50", "contrast"]
    assert all(0 <= values["accuracy"] <= 100 for values in record["final"].values())
    assert isinstance(record["norms"]["order"], list)


def test_variants_are_not_prepared_by_themselves(tmp_path):
    with pytest.raises(UserError, match="'cifar10_few' is read from that of cifar10"):
        data.prepare("cifar10_few", tmp_path)
