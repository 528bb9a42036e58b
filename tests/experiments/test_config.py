"""Composition of a run's configuration, its id, and what is refused before any data is touched."""

import copy
import re
import shutil
from dataclasses import replace

import hydra
import pytest
from helpers import quick
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from kalmannorm import machine
from kalmannorm.errors import UserError
from kalmannorm.experiments import card, cards, composition
from kalmannorm.experiments import config as config_module
from kalmannorm.experiments.config import RESULT_KEYS, compose, conf_dir
from kalmannorm.experiments.record import run_id
from kalmannorm.presets import BATCH_STATISTICS
from kalmannorm.train.model import learning_rate


def test_presets_are_resolved_into_the_configuration():
    paper = compose(["norm=kn"]).norm
    assert paper.name == "bkn" and paper.predictor == "closed"
    assert paper.options["gain"] == 0.5 and paper.options["learn_gain"] and paper.options["guard"] is None
    released = compose(["norm=bkn", "norm.preset=released"]).norm
    assert released.predictor == "sampling"
    assert released.options["gain"] == 0.1 and released.options["guard"] == 100
    assert released.options["moving_groups"] == "first" and not released.options["noise"]
    at128 = compose(["norm=bkn", "norm.preset=released", "batch=g128_s128"]).norm
    assert at128.options["gain"] == 0.95


def test_the_presets_of_the_talk_and_v1_say_what_is_theirs_and_the_others_nothing_new():
    talk, v1 = (compose(["norm=bkn", f"norm.preset={preset}"]).norm for preset in ("talk", "v1"))
    assert talk.predictor == v1.predictor == "closed" and talk.options["mixture"] and v1.options["mixture"]
    assert talk.options["transition"] == v1.options["transition"] == "learned"
    assert talk.options["noise"] is True and v1.options["noise"] == "shared"
    robust = compose(["norm=bkn", "norm.preset=robust"]).norm.options
    assert robust["belief"] == "output" and robust["input_belief"] == "data" and robust["prior_values"] == 2048
    for preset in ("paper", "eq7", "released"):
        options = compose(["norm=bkn", f"norm.preset={preset}"]).norm.options
        assert not {"transition", "input_belief"} & set(options)
    given = compose(["norm=gkn", "+norm.options.transition=learned", "+norm.options.input_belief=data"])
    assert given.norm.options["transition"] == "learned" and given.norm.options["input_belief"] == "data"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": -1}, "seed = -1: expected to be greater than or equal to 0"),
        ({"precision": "fp8"}, "precision = fp8: expected to be 'fp32' or 'bf16'"),
        ({"sed": 1}, "unknown setting 'sed'; did you mean 'seed'?"),
        ({"batch": 3}, "batch = 3: expected to be an instance of Batch"),
    ],
)
def test_a_changed_configuration_is_checked_as_a_composed_one(changes, said):
    with pytest.raises(UserError, match=re.escape(said)):
        replace(compose([]), **changes)


FILES = {path.name: [file.stem for file in path.glob("*.yaml")] for path in conf_dir().iterdir() if path.is_dir()}
SETTINGS = ["seed=3", "batch.stat_batch=null", "schedule.lr=[[1,0.5]]", "budget.size=${seed}"]


def by_hydra(overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("config", overrides), resolve=True)


NUMBERS = range(max(len(FILES[group]) for group in FILES.keys() - {"experiment"}))


@pytest.mark.parametrize("number", quick(NUMBERS, *NUMBERS[:3]))
def test_what_is_composed_is_what_hydra_composes(number):
    """Every file of every group; budgets but the smallest, which not all data sets have, on CIFAR-10."""
    chosen = {group: names[number % len(names)] for group, names in FILES.items() if group != "experiment"}
    of_all = {"budget": "smoke"} if number >= len(FILES["budget"]) else {"dataset": "cifar10"}
    overrides = [*SETTINGS, *(f"{key}={name}" for key, name in {**chosen, **of_all}.items())]
    assert composition.compose(conf_dir(), overrides) == by_hydra(overrides)


@pytest.mark.parametrize(
    "override",
    [
        "+norm.options.input_belief=data",
        "+norm.options={input_belief:data}",
        "++norm.options.eps=1",
        "norm.options.gain=null",
        "~schedule.momentum=0.9",
        "schedule.lr=[[1,1e-2]]",
        "++seed=3",
    ],
)
def test_settings_are_added_and_deleted_as_hydra_does(override):
    assert composition.compose(conf_dir(), [override]) == by_hydra([override])


@pytest.mark.parametrize(
    "override", ["~schedule.momentums=1", "~schedule.momentum", "~norm=bn", "~norm", "seed=1,2", "seed=range(1,3)",
                 "norm@arch=bn", "norm.nothing=1", "seed=[1", "+seed=2", "nothing.more=1"]
)  # fmt: skip
def test_an_override_that_cannot_be_is_named(override):
    with pytest.raises(UserError, match=re.escape(override)):
        composition.compose(conf_dir(), [override])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: a\nname: b\n", "is no YAML: .*name"),
        (b"name:\n\t- a\n", "is no YAML"),
        (b"name: a: b\n", "is no YAML"),
        ("name: été\n".encode("latin-1"), "is no YAML: .*utf-8"),
        (b"- a\n", "holds a list, expected settings, name: value"),
    ],
)
def test_a_file_of_ones_own_that_is_no_configuration_is_named(tmp_path, content, words):
    conf = shutil.copytree(conf_dir(), tmp_path / "conf")
    (conf / "schedule" / "own.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"schedule/own\.yaml {words}"):
        composition.compose(conf, ["schedule=own"])


def test_hidden_files_of_editors_and_archives_are_no_choices(tmp_path, monkeypatch):
    conf = shutil.copytree(conf_dir(), tmp_path / "conf")
    (conf / "norm" / ".#bn.yaml").symlink_to("somebody@somewhere")
    (conf / "norm" / "._gn.yaml").write_bytes(b"\x00\x05\x16\x07\xff")
    (conf / "experiment" / "._table7.yaml").write_bytes(b"\x00\x05\x16\x07\xff")
    names = card.names()
    monkeypatch.setattr(config_module, "conf_dir", lambda: conf)
    monkeypatch.setattr(card, "conf_dir", lambda: conf)
    assert compose(["norm=bn"]).norm.name == "bn" and card.names() == names


def test_auto_is_resolved_by_device():
    cpu, gpu = compose(["device=cpu"]), compose(["device=cuda"])
    assert (cpu.precision, cpu.compile) == ("fp32", False)
    assert (gpu.precision, gpu.compile) == ("bf16", True)


@pytest.mark.parametrize(
    ("overrides", "compiled"),
    [
        (["dataset=cifar10", "budget=lite"], True),  # 4,687 steps
        (["dataset=cifar10", "budget=smoke"], False),  # 4
        (["dataset=digits", "budget=lite"], False),
        (["dataset=cifar10", "budget=lite", "budget.subset=1280"], False),
    ],
)
def test_a_cpu_compiles_what_runs_long_and_multiplies_bfloat16_where_it_can(overrides, compiled, monkeypatch):
    monkeypatch.setattr("kalmannorm.machine.has_compiler", lambda: True)
    config = compose(["device=cpu", *overrides])
    assert (config.precision, config.compile) == ("fp32", compiled)
    monkeypatch.setattr("kalmannorm.machine.multiplies_bfloat16", lambda: True)
    config = compose(["device=cpu", *overrides])
    assert (config.precision, config.compile) == ("bf16", compiled)
    given = compose(["device=cpu", *overrides, "precision=fp32", "compile=false"])
    assert (given.precision, given.compile) == ("fp32", False)
    monkeypatch.setattr("kalmannorm.machine.has_compiler", lambda: False)
    assert compose(["device=cpu", *overrides]).compile is False
    given = compose(["device=cpu", *overrides, "precision=fp32", "compile=true"])
    assert (given.precision, given.compile) == ("fp32", True)


@pytest.mark.parametrize("found", ["/usr/bin/g++", None])
def test_a_compiler_is_looked_for_by_its_name(found, monkeypatch):
    monkeypatch.undo()  # the tests' own answer
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: found if name == "g++" else None)
    assert machine.has_compiler() == (found is not None)
    monkeypatch.setenv("CXX", "clang++")
    assert machine.has_compiler() is False


@pytest.mark.parametrize("flags", ["fma avx512_bf16", "amx_bf16 amx_tile", "fma avx512f", None])
def test_bfloat16_is_read_from_the_processors_flags(flags, tmp_path, monkeypatch):
    monkeypatch.undo()  # the tests' own answer
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(machine, "CPUS", tmp_path / "cpuinfo")
    machine.multiplies_bfloat16.cache_clear()
    assert machine.multiplies_bfloat16() == (flags is not None and "bf16" in flags)
    machine.multiplies_bfloat16.cache_clear()


def test_id_depends_on_what_determines_the_result_and_on_nothing_else():
    base = compose(["device=cpu"])
    same = compose(["device=cpu", "data=/elsewhere", "results=/tmp/a", "runs=/tmp/b"])
    assert run_id(base) == run_id(same) and len(run_id(base)) == 12
    changes = ["seed=2", "precision=bf16", "compile=true", "batch.stat_batch=4", "norm.options.belief=output",
               "budget.epochs=9", "arch.width=0.5", "dataset.pad=2", "schedule.weight_decay=0"]  # fmt: skip
    ids = {run_id(compose(["device=cpu", change])) for change in changes}
    assert len(ids) == len(changes) and run_id(base) not in ids


def test_id_changes_with_numerics(monkeypatch):
    config = compose([])
    before = run_id(config)
    monkeypatch.setattr("kalmannorm.experiments.record.NUMERICS", 10**6)
    assert run_id(config) != before


def test_a_normalizer_without_batch_statistics_has_no_statistics_batch():
    assert run_id(compose(["norm=gn", "batch=g128_s2"])) == run_id(compose(["norm=gn", "batch=g128_s128"]))
    assert compose(["norm=bn", "batch.stat_batch=null"]).batch.stat_batch == 128


def test_budgets():
    whole = {"subset": None, "size": 32}
    budgets = {
        name: compose(["dataset=cifar10", f"budget={name}"]).budget.values() for name in ("paper", "short", "lite")
    }
    assert budgets == {
        "paper": {"name": "paper", "epochs": 400, "warmup": None, **whole, "stop_at_chance": None},
        "short": {"name": "short", "epochs": 30, "warmup": 5, **whole, "stop_at_chance": 2},
        "lite": {"name": "lite", "epochs": 12, "warmup": 2, **whole, "size": 16, "stop_at_chance": 2},
    }


def test_a_reduced_budget_warms_up_to_the_schedules_highest_rate_and_decays_to_0():
    schedule = compose([]).schedule
    rates = [learning_rate(step, 120, schedule, 1 / 6) for step in range(120)]
    assert rates[0] == pytest.approx(0.1 / 20) and rates[19] == pytest.approx(0.1) == max(rates)
    assert rates[20] == 0.1 and rates[70] == pytest.approx(0.05) and rates[119] == pytest.approx(0.001)
    assert learning_rate(0, 120, schedule, 0) == 0.1  # without a warm-up
    # Without: the recipe's milestones, of 400 epochs.
    assert [learning_rate(step, 400, schedule, None) for step in (0, 1, 82, 123, 399)] == [0.01, 0.1, 0.01, 0.001, 2e-4]
    scaled = replace(schedule, lr=0.3, decay="linear", lr_batch=256)
    assert learning_rate(19, 120, scaled, 1 / 6, 128) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dataset=cifar11", ["cifar11", "cifar10"]),
        ("arch=resnet33", ["resnet33", "resnet32"]),
        ("norm=bkm", ["bkm", "bkn"]),
        ("batch.stat_batch=256", ["batch.stat_batch = 256", "128"]),
        ("batch.stat_batch=3", ["batch.grad_batch = 128", "stat_batch = 3"]),
        ("batch.stat_batch=0", ["batch.stat_batch = 0"]),
        ("batch.grad_batch=-8", ["batch.grad_batch = -8"]),
        ("norm.optoins.gain=0.5", ["norm.optoins.gain"]),
        ("nonsense", ["nonsense", "key=value"]),
        ("precision=fp8", ["precision = fp8", "bf16"]),
        ("seed=-1", ["seed = -1"]),
        ("seed=one", ["seed = one"]),
        ("seed=true", ["seed = True"]),
        (f"seed={2**70}", ["seed = "]),
        ("deterministic=no", ["deterministic = no", "true or false"]),
        ("dataset.flip=no", ["dataset.flip = no", "true or false"]),
        ("norm.options.learn_gain=off", ["norm.options.learn_gain = off", "true or false"]),
        ("norm.options.noise=sometimes", ["norm.options.noise = sometimes", "shared"]),
        ("norm.options=5", ["norm.options = 5"]),
        ("+norm.option.belief=output", ["norm.option", "did you mean 'norm.options'"]),
        ("arch.width=0", ["arch.width = 0"]),
        ("schedule.lr=fast", ["schedule.lr = fast", "valid list"]),
        ("schedule.lr=0.1", ["schedule.lr = 0.1", "[[last epoch, rate], ...]"]),
        ("schedule.lr=[]", ["schedule.lr = []"]),
        ("schedule.momentum=x", ["schedule.momentum = x"]),
        ("schedule.weight_decay=heavy", ["schedule.weight_decay = heavy"]),
        ("budget.epochs=true", ["budget.epochs = True"]),
        ("budget.epochs=0", ["budget.epochs = 0"]),
        ("budget.subset=50", ["budget.subset = 50"]),
        ("norm.preset=relaesed", ["relaesed", "released"]),
        ("seed=[", ["seed=["]),
        ("++norm=bn", ["norm = bn", "norm=NAME without a +"]),
        ("++budget=null", ["budget = None", "budget=NAME without a +"]),
        ("++dataset.budgets={mine:5}", ["dataset.budgets.mine = 5"]),
        ("+norm.options.input_belief=images", ["norm.options.input_belief = images", "data"]),
    ],
)
def test_bad_input_is_one_line_that_names_it(override, words):
    with pytest.raises(UserError) as error:
        compose([override])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_gain_1_cannot_be_learned():
    with pytest.raises(UserError, match="learn_gain"):
        compose(["norm=bkn", "norm.options.gain=1"])
    compose(["norm=bkn", "norm.options.gain=1", "norm.options.learn_gain=false"])


def test_released_gain_exists_for_two_statistics_batches_only():
    with pytest.raises(UserError, match="pass gain="):
        compose(["norm=bkn", "norm.preset=released", "batch=g128_s4"])


@pytest.mark.parametrize("group", ["dataset", "arch", "norm", "batch", "schedule", "budget"])
def test_every_choice_composes(group):
    for file in (conf_dir() / group).glob("*.yaml"):
        needed = ["dataset.classes=2"] if file.stem == "image_folder" else []  # counts the classes, where not given
        needed += ["batch=g8_s2", "batch.grad_batch=2"] if file.stem.startswith("coco") else []
        config = compose([f"{group}={file.stem}", *needed])
        assert set(RESULT_KEYS) == set(config.result())


def test_every_norm_is_known_to_the_library():
    from kalmannorm import NORMS
    from kalmannorm.models import ARCHS, SEGMENTERS
    from kalmannorm.norm import GroupedStatistics
    from kalmannorm.train.detector import DETECTORS

    names = {compose([f"norm={file.stem}"]).norm.name for file in (conf_dir() / "norm").glob("*.yaml")}
    assert names == set(NORMS)
    grouped = {
        name for name, build in NORMS.items() if any(isinstance(m, GroupedStatistics) for m in build(8).modules())
    }
    assert grouped == set(BATCH_STATISTICS)
    archs = {compose([f"arch={file.stem}"]).arch.name for file in (conf_dir() / "arch").glob("*.yaml")}
    assert archs == set(ARCHS) | set(DETECTORS) | set(SEGMENTERS)


@pytest.mark.parametrize("name", quick(card.names(), "table7", "table8", "talk-table6-ibn"))
def test_experiments_expand_to_distinct_runs(name):
    keys = [row.key for row in card.read(name).rows]
    expanded = cards.load(name, ["dataset=digits", "seeds=2", f"rows={keys[0]},{keys[-1]}"])
    ids = [run_id(config) for config in expanded.runs]
    assert len(set(ids)) == len(ids) and ids
    seedless = [c.result() | {"seed": None} for c in expanded.runs]
    for row in expanded.card.rows:
        for column in expanded.card.columns_of(row) if expanded.card.has_columns_of_runs else [None]:
            settings = {**expanded.card.settings(row, column), "dataset": "digits", "seed": 1}
            assert compose(card.overrides(settings)).result() | {"seed": None} in seedless


def test_columns_that_are_data_sets():
    """table8 has a run for each row and data set; dataset= chooses one, or makes a column that the paper lacks."""
    some = "rows=inception_kn_stat2,resnet32_kn_stat2"
    loaded = cards.load("table8", ["seeds=1", some, "budget=smoke"])
    columns = {row.key: [column.key for column in loaded.card.columns_of(row)] for row in loaded.card.rows}
    assert columns == {"inception_kn_stat2": ["cifar10", "cifar100", "svhn"], "resnet32_kn_stat2": ["cifar10"]}
    assert [c.dataset.name for c in loaded.runs] == ["cifar10", "cifar100", "svhn", "cifar10"]
    chosen = cards.load("table8", ["seeds=1", some, "dataset=cifar100"])
    assert [row.key for row in chosen.card.rows] == ["inception_kn_stat2"] and len(chosen.runs) == 1
    digits = cards.load("table8", ["seeds=1", "rows=resnet110_gn,resnet32_gn", "dataset=digits"])
    assert [c.dataset.name for c in digits.runs] == ["digits"] * 2
    assert [column.key for column in digits.card.columns] == ["digits"]
    of_two = cards.load("table8", ["rows=inception_ln", "columns=svhn,cifar10", "seeds=1"])
    assert {c.dataset.name for c in of_two.runs} == {"svhn", "cifar10"}
    for name, bad, word in (("table8", "columns=cifar1", "cifar10"), ("table7", "columns=moving", "no choice")):
        with pytest.raises(UserError, match=word):
            cards.load(name, [bad])


def test_sweep_arguments():
    for text, expected in (("2", {1, 2}), ("4,7", {4, 7}), ("5,", {5})):
        assert {c.seed for c in cards.load("table7", [f"seeds={text}"]).runs} == expected
    assert set(cards.load("table7", ["rows=paper"]).keys) == {"bn_stat2", "bn_stat128", "kn_stat2"}
    some = ["rows=paper, kn_robust*", "seeds=1"]
    assert cards.load("table7", some).keys == ["bn_stat2", "bn_stat128", "kn_stat2", "kn_robust_stat2"]
    refused = [("rows=bn_stat3", "bn_stat2"), ("seeds=x", "seeds=x"), ("seeds=0", "seeds=0"), ("+seed=1", "seeds=4,")]
    for bad, word in (*refused, ("++norm.options.gain=0.2", "the rows of table7 differ in it")):
        with pytest.raises(UserError, match=word):
            cards.load("table7", [bad])
    with pytest.raises(UserError, match="rows=paper: all rows of camvid are ours"):
        cards.load("camvid", ["rows=paper"])
    with pytest.raises(UserError, match=r"did you mean 'kn_resnet14_g128_s2_0.5' .*--dry-run lists all 52") as error:
        cards.load("initial-gain", ["rows=kn_resnet14_g128_s2_05"])
    assert len(str(error.value)) < 300  # 52 names would fill the screen
    with pytest.raises(UserError, match="table7"):
        cards.load("table77", [])


def test_figure5_draws_runs_of_table7():
    table = {run_id(c) for c in cards.load("table7", ["dataset=digits"]).runs}
    assert {run_id(c) for c in cards.load("figure5", ["dataset=digits"]).runs} <= table


def test_composing_leaves_no_state_behind():
    first = compose(["norm=bkn"])
    kept = copy.deepcopy(first)
    compose(["norm=bn", "dataset=cifar10"])
    assert compose(["norm=bkn"]) == kept
