"""The public names, and what importing them costs."""

import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torchvision

import kalmannorm as kn


def test_public_names_are_what_they_say_whatever_was_imported_before():
    """A module of the name of a public function would take its place on import."""
    assert not set(kn.__all__) & {module.name for module in pkgutil.iter_modules(kn.__path__)}
    assert all(callable(getattr(kn, name)) or name == "NORMS" for name in kn.__all__)
    assert set(kn.__all__) <= set(dir(kn))


def test_the_command_line_and_records_do_not_wait_for_torch():
    code = (
        "import sys, kalmannorm.cli, kalmannorm.experiments.config, kalmannorm.experiments.record\n"
        "import kalmannorm.experiments.cards, kalmannorm.runs.sweep, kalmannorm.report\n"
        "kalmannorm.experiments.config.compose(['norm=bkn'])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kn_is_a_name_in_python_too() -> None:
    """As on the command line, alone and in a mapping of layers."""
    model = torchvision.models.resnet18()
    for norm in ("kn", {"*": "kn"}):
        assert any(isinstance(m, kn.KalmanBatchNorm2d) for m in kn.convert(model, norm).modules())


def test_the_library_needs_torch_and_numpy_alone():
    """What `pip install kalmannorm` brings: the harness's packages stand in extras (pyproject.toml)."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    assert {re.split("[><=]", one)[0] for one in project["dependencies"]} == {"torch", "numpy"}
    names = [re.split(r"[><=\[]", one)[0] for extra in ("harness", "detection") for one in project[
        "optional-dependencies"][extra]]  # fmt: skip
    imported = {"hydra-core": "hydra", "scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}
    code = (
        f"import sys; sys.modules |= dict.fromkeys({[imported.get(n, n) for n in names if n != 'kalmannorm']!r})\n"
        "import torch, kalmannorm as kn\n"
        "from torch import nn\n"
        "layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]\n"
        "model = kn.convert(nn.Sequential(*layers), 'bkn', stat_batch=2)\n"
        "model(torch.randn(4, 3, 8, 8))\n"
        "assert kn.belief_report(model)['4'] is None\n"
        "kn.set_statistics(model, 'online')\n"
        "kn.precise_statistics(model, [torch.randn(4, 3, 8, 8)])\n"
        "kn.fold(model.eval())\n"
        "assert 'torch._dynamo' not in sys.modules, 'the compiler was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_command_without_the_harness_says_what_to_install():
    code = (
        "import sys; sys.modules['hydra'] = None\n"
        "from kalmannorm.cli import main\n"
        "sys.exit(main(['train', 'norm=bn']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "kalmannorm[detection]" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["thaw", "relu", "returns_belief", "noise"])
def test_a_tensor_is_no_switch(option: str) -> None:
    for value in (torch.tensor(True), torch.ones(2)):
        with pytest.raises(ValueError, match=f"{option} must be True"):
            kn.convert(torchvision.models.mnasnet0_5(), "bkn", **{option: value})


@pytest.mark.parametrize("value", ["a", torch.ones(2), [1]], ids=str)
@pytest.mark.parametrize("option", ["eps", "gain", "momentum", "learn_gain"])
def test_an_option_of_the_wrong_kind_is_refused_by_its_name(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option} must be "):
        kn.KalmanBatchNorm2d(4, **{option: value})
    with pytest.raises(ValueError, match=f"{option} must be "):
        kn.convert(torchvision.models.mnasnet0_5(), "bkn", **{option: value})
