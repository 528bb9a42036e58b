"""Every number has a range, every name a list, every key a reader; all of it looked at before data are touched."""

from pathlib import Path

import pytest

from kalmannorm import data
from kalmannorm.cli import main
from kalmannorm.errors import UserError
from kalmannorm.experiments.config import compose
from kalmannorm.experiments.record import run_id

FOLDER = ["dataset=tiny_imagenet_20", "arch=resnet14"]
DETECTOR = ["dataset=coco-tiny", "arch=mask_rcnn_c4", "schedule=c4_280k", "batch=g8_s2"]
LINEAR = ["schedule=imagenet_linear"]
WHITENED = ["norm=wnn"]
STEPS = ["schedule=released"]
NUMBERS: dict[str, list[str]] = {  # a setting, and what it cannot be
    "seed": ["-1", "0.5", "1e30", "word", "null", "true", "nan"],
    "accumulate": ["0", "-1", "0.5", "word", "null", "true"],
    "workers": ["-1", "0.5", "word", "100000", "null", "true"],
    "checkpoint_every": ["-1", "0", "2", "word", "nan", "inf", "null", "true"],
    "device": ["5", "gpu", "cuda:x", "cuda:-1", "null", "''", "true"],
    "precision": ["fp16", "32", "null"],
    "compile": ["maybe", "1", "null"],
    "deterministic": ["auto", "1", "null"],
    "dataset.pad": ["-1", "100", "word", "1.5", "null", "true"],
    "dataset.flip": ["maybe", "1", "null"],
    "dataset.classes": ["0", "-1", "word", "1.5", "null", "auto"],
    "batch.grad_batch": ["0", "-2", "1.5", "word", "null", "true"],
    "batch.stat_batch": ["0", "-2", "1.5", "word", "3", "256", "true"],
    "budget.epochs": ["0", "-1", "1.5", "word", "null", "true"],
    "budget.size": ["0", "1", "-16", "1e9", "word", "null"],
    "budget.subset": ["0", "-1", "1", "1.5", "word"],
    "budget.name": ["x", "null", "5"],
    "schedule.momentum": ["-0.1", "1", "2", "word", "nan", "null"],
    "schedule.weight_decay": ["-1", "2", "word", "inf", "null"],
    "schedule.name": ["x", "null"],
    "arch.width": ["0", "-1", "1e9", "word", "nan", "inf", "null", "true"],
    "arch.hidden": ["-1", "0.5", "1e9", "word", "null"],
    "arch.name": ["x", "null"],
    "norm.name": ["x", "null"],
    "norm.preset": ["x", "5"],
    "norm.options.gain": ["0", "-1", "1.5", "word", "nan", "true"],
    "norm.options.guard": ["0", "-1", "word", "nan"],
    "norm.options.learn_gain": ["1", "word"],
    "norm.options.mixture": ["0", "word"],
    "norm.options.noise": ["2", "word"],
    "norm.options.relu": ["1", "word"],
    "+norm.options.eps": ["0", "-1", "2", "word", "nan", "inf", "true"],
    "+norm.options.momentum": ["-0.1", "1.1", "word", "nan", "true"],
    "+norm.options.prior_values": ["0", "-1", "word", "nan"],
    "+norm.options.max_groups": ["0", "-4", "1.5", "word", "true"],
    "+norm.options.input_belief": ["word", "5"],
    "+norm.options.moving_unbiased": ["1", "word"],
    "+norm.options.affine": ["0", "word"],
    "norm.options.belief": ["5", "[]", "true"],
    "+norm.options.group": ["0", "-1", "1.5", "word", "nan", "true"],
    "+norm.options.iterations": ["0", "-1", "1.5", "1e9", "nan", "true"],
    "+norm.options.ratio": ["-0.1", "1.1", "word", "nan", "true"],
    "+norm.options.rmax": ["0.5", "word", "nan"],
    "+norm.options.gamma_decay": ["8", "word", "[images]", "[1,2,3]"],
    "+norm.options.weights": ["x", "5", "null", "[]"],
}
OTHERS = {  # of other data sets and schedules
    "schedule.lr of steps": (
        STEPS,
        ["0.1", "[]", "[[1,0.1],[1,0.01]]", "[[82,0.1],[1,0.01]]", "word", "null", "[[1]]"],
    ),
    "schedule.lr": (STEPS, ["[[1,0.1,2]]", "[[1,-0.1]]", "[[0,0.1]]", "[[1,word]]", "[[1,nan]]"]),
    "schedule.lr that decays": (LINEAR, ["0", "-1", "nan", "word", "[[1,0.1]]", "null"]),
    "schedule.decay": (LINEAR, ["none", "5"]),
    "schedule.epochs": (LINEAR, ["0", "1.5", "word"]),
    "schedule.lr_batch": (LINEAR, ["0", "-1", "word"]),
    "dataset.mean": (FOLDER, ["[1,2]", "[0.5,0.5,200]", "0.5", "null", "[a,b,c]"]),
    "dataset.std": (FOLDER, ["[0,1,1]", "[1,1]", "null"]),
    "dataset.loader": (FOLDER, ["dali", "null"]),
    "dataset.unreadable": (FOLDER, ["maybe", "true"]),
    "dataset.gap_images": (FOLDER, ["0", "-1", "word"]),
    "dataset.published": (FOLDER, ["[1]", "[0,1]", "5"]),
    "dataset.folder": (FOLDER, ["5", "null"]),
    "arch.layers": (DETECTOR, ["[1,1]", "[0,1,1,1]", "3", "[1,1,1,x]"]),
    "arch.boxes": (DETECTOR, ["0", "1.5", "word"]),
    "arch.max_size": (DETECTOR, ["-1", "1e9", "word"]),
    "arch.proposals": (DETECTOR, ["[1]", "5", "[0,1]"]),
    "arch.roi_size": (DETECTOR, ["0", "1000", "word"]),
    "arch.frozen_stages": (DETECTOR, ["-1", "9", "word"]),
    "schedule.drops": (DETECTOR, ["[5,4]", "[-1]", "5", "[a]"]),
    "schedule.warmup": (DETECTOR, ["-1", "1.5", "word"]),
    "schedule.of_batch": (DETECTOR, ["0", "word"]),
    "dataset.steps": (DETECTOR, ["0", "1.5", "word"]),
    "dataset.train_images_evaluated": (DETECTOR, ["-1", "word"]),
    "dataset.task": (DETECTOR, ["dancing", "null"]),
    "norm.options.weights.every": (WHITENED, ["0", "-1", "1.5", "word", "nan", "true"]),
    "norm.options.weights.samples": (WHITENED, ["0", "-1", "1.5", "word"]),
    "norm.options.weights.eps": (WHITENED, ["0", "-1", "nan", "word"]),
    "norm.options.weights.momentum": (WHITENED, ["0.9", "word", "null"]),
    "norm.options.momentum": (["norm=gn"], ["0.1"]),  # it keeps no averages
    "norm.options.eps": (["norm=none"], ["0.1"]),
    "arch.pretrained": (["norm=bn"], ["abc"]),  # weights=FILE says it
}
ADDED = ("norm.options.momentum", "norm.options.eps", "arch.pretrained")


def refused(overrides: list[str]) -> str:
    with pytest.raises(UserError) as error:
        compose(overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load", "source"):
        monkeypatch.setattr(data, name, lambda *_: pytest.fail("data were touched"))


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_a_range(key: str) -> None:
    for value in NUMBERS[key]:
        said = refused(["device=cpu", f"{key}={value}"] if key != "device" else [f"{key}={value}"])
        assert key.lstrip("+").split(".")[-1] in said and ("expected" in said or "valid" in said), (value, said)


@pytest.mark.parametrize("name", OTHERS)
def test_those_of_other_kinds_too(name: str) -> None:
    base, values = OTHERS[name]
    key = name.partition(" ")[0]
    for value in values:
        said = refused(["device=cpu", *base, f"{'+' * (key in ADDED)}{key}={value}"])
        assert key in said and "expected" in said, (value, said)


@pytest.mark.parametrize(
    "added",
    [
        "+schedule.nesterov=true", "+schedule.warmup_epochs=5", "+dataset.augment=randaugment", "+optimizer=adam",
        "+dataset.budgets.lite.lr=1", "+nesterov=true", "+norm.nesterov=true", "+batch.workers=3", "+budget.lr=1",
        "+dataset.budgets.mine.epochs_=1", "+norm.options.foo=1", "+norm.options.stat_batch=2",
        "+norm.options.device=cpu", "+norm.options.leaves=[x]", "+norm.options.norm=bn",
        "+norm.options.weights={kind:wnn,foo:1}", "+arch.foo=1", "+arch.options=1", "+batch.GROUP=x",
        "+arch={norm_layer:x}", "+schedule={nesterov:true}",
    ],
)  # fmt: skip
def test_a_key_that_nothing_reads_is_refused(added: str) -> None:
    assert "unknown setting" in refused(["device=cpu", added])


@pytest.mark.parametrize("dataset", ["imagenet", "kinetics", "coco", "camvid"])
def test_only_arrays_in_memory_are_recoloured(dataset: str) -> None:
    assert "unknown setting 'dataset.recolour'" in refused(
        ["device=cpu", f"dataset={dataset}", "+dataset.recolour=true"]
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("arch.width=1", "arch.width=1.0"),
        ("schedule.momentum=0", "schedule.momentum=0.0"),
        ("schedule.weight_decay=1e-4", "schedule.weight_decay=0.0001"),
        ("schedule.weight_decay=0", "schedule.weight_decay=-0.0"),
        ("schedule.lr=[[30,1],[60,0.1]]", "schedule.lr=[[30,1.0],[60,0.1]]"),
        ("schedule.lr=[[30,1],[60,0.1]]", "schedule.lr=[[30.0,1],[60,1e-1]]"),
        ("+norm.options.eps=1", "+norm.options.eps=1.0"),
        ("seed=1_0", "seed=10"),
        ("norm=bkn", "norm=kn"),
        ("checkpoint_every=1", "checkpoint_every=0.5"),
        ("workers=0", "workers=1"),
        ("budget.size=16", "budget.size=16.0"),
        ("seed=2", "seed=2e0"),
        ("batch.stat_batch=2", "batch.stat_batch=2.0"),
        ("arch.hidden=4", "arch.hidden=4.0"),
        ("norm.options.prior_values=8", "norm.options.prior_values=8.0"),
        ("+norm.options.max_groups=4", "+norm.options.max_groups=4.0"),
    ],
)
def test_equal_settings_are_one_run(one: str, other: str) -> None:
    assert run_id(compose(["device=cpu", one])) == run_id(compose(["device=cpu", other]))


def test_a_folder_is_one_however_it_ends() -> None:
    ids = {run_id(compose(["device=cpu", *FOLDER, f"dataset.folder={name}"])) for name in ("a", "a/", "./a")}
    assert len(ids) == 1


def test_weights_that_are_whitened_need_all_that_is_read() -> None:
    assert "norm.options.weights.every is missing" in refused(
        ["device=cpu", "norm=bn", "+norm.options.weights={kind:wnn,samples:10,momentum:zero}"]
    )


@pytest.mark.parametrize(
    "override", ["checkpoint_every=nan", "+schedule.nesterov=true", "dataset.pad=100", "budget.size=1"]
)
@pytest.mark.parametrize("command", [["train"], ["train", "-m"], ["sweep", "table8"]])
def test_the_command_line_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, command: list[str]
) -> None:
    place = [f"results={tmp_path / 'r'}", f"runs={tmp_path / 'u'}", "device=cpu"]
    dataset = [] if command[0] == "sweep" else ["dataset=digits"]
    assert main([*command, override, *dataset, *place]) == 2
    said = capsys.readouterr().err
    assert said.startswith("kalmannorm: ") and said.count("\n") == 1 and not list(tmp_path.iterdir())
