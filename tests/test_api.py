"""The public names, and what importing them costs."""

import subprocess
import sys

import kalmannorm as kn


def test_every_public_name_is_there_whatever_was_imported_before():
    for first in kn.__all__:
        names = "all(callable(getattr(kn, name)) or name == 'NORMS' for name in kn.__all__)"
        code = f"import kalmannorm as kn; kn.{first}; assert {names}"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_and_records_do_not_wait_for_torch():
    code = (
        "import sys, kalmannorm.cli, kalmannorm.runs.config, kalmannorm.runs.record, kalmannorm.runs.sweep, "
        "kalmannorm.runs.experiment, kalmannorm.report\n"
        "kalmannorm.runs.config.compose(['norm=bkn'])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
