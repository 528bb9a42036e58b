"""The public names, and what importing them costs."""

import subprocess
import sys

import torchvision

import kalmannorm as kn


def test_public_names_are_what_they_say_whatever_was_imported_before():
    """A module of the name of a public function would take its place on import."""
    code = (
        "import importlib, pkgutil, kalmannorm as kn\n"
        "kn.fold\n"
        "for module in pkgutil.iter_modules(kn.__path__):\n"
        "    module.name == '__main__' or importlib.import_module(f'kalmannorm.{module.name}')\n"
        "assert all(callable(getattr(kn, name)) or name == 'NORMS' for name in kn.__all__)\n"
        "assert set(kn.__all__) <= set(dir(kn))\n"
        "from kalmannorm import *\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
