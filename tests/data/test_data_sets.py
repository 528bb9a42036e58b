"""What every data set must do, by being listed: in conf/dataset, in DATASETS and PREPARE, in the Makefile."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from kalmannorm import data
from kalmannorm.errors import UserError
from kalmannorm.experiments.config import Config, compose, conf_dir

# Those of classification; the others have tests of their own (test_coco.py, test_scenes.py).
NAMES = sorted(file.stem for file in (conf_dir() / "dataset").glob("*.yaml") if "task" not in OmegaConf.load(file))


def composed(name: str, budget: str = "lite") -> Config:
    classes = ["dataset.classes=2"] if name == "image_folder" else []  # it counts them where it is
    return compose([f"dataset={name}", f"budget={budget}", "device=cpu", "batch.grad_batch=8", *classes])


@pytest.mark.parametrize("name", NAMES)
def test_configuration(name: str) -> None:
    dataset = composed(name).result()["dataset"]
    assert dataset["name"] == name and isinstance(dataset["flip"], bool) and dataset["classes"] > 1
    if "loader" in dataset or "frames" in dataset:
        assert len(dataset["mean"]) == len(dataset["std"]) == 3 and dataset["gap_images"] > 0
    else:
        assert name in data.DATASETS and dataset["pad"] >= 0
    budgets = OmegaConf.load(conf_dir() / "dataset" / f"{name}.yaml")["budgets"]
    assert set(budgets) - {"short"} == {"paper", "lite", "smoke"}
    for budget in budgets:
        found = composed(name, budget).result()["budget"]
        assert 1 <= found["epochs"] <= 400 and found["size"] >= 8 and (found["warmup"] or 0) < found["epochs"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_what_is_missing_is_said(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        data.source(composed(name).result()["dataset"], tmp_path)
    said = str(error.value)
    folder = data.VARIANTS.get(name, name)
    assert "\n" not in said and f"{folder!r} is not there" in said and str(tmp_path) in said
    assert "dataset=digits" in said, "what would run without it"


def test_lists_agree() -> None:
    in_memory = {name for name in NAMES if not {"loader", "frames"} & {*composed(name).result()["dataset"]}}
    made = {"playback", "coco-tiny-maps"}  # of films, of masks
    assert in_memory == set(data.DATASETS)
    assert set(data.PREPARE) == set(data.OFFICIAL) | made
    makefile = (conf_dir().parent / "Makefile").read_text()
    listed = re.search(r"^DATASETS := (.*)$", makefile, re.MULTILINE)
    assert listed and set(listed[1].split()) == set(data.PREPARE)
