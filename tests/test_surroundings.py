"""The user's terminal, pipes, home and matplotlib settings: none of them ends a command or changes a result."""

import codecs
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from trainings import place

from kalmannorm import cli, machine
from kalmannorm.report import style
from kalmannorm.runs import worker

DIGITS = ["dataset=digits", "budget=smoke", "budget.subset=128", "arch.width=0.125", "device=cpu", "precision=fp32"]
# Who is root writes to what nobody may write to, but for a process that gave up this one right.
ROOT_AS_OTHERS = ("setpriv", "--bounding-set=-dac_override")
ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}


def command(
    *arguments: str,
    without: tuple[str, ...] = (),
    cwd: Path | None = None,
    under: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.CompletedProcess[bytes]:
    given = {key: value for key, value in os.environ.items() if key not in without}
    line = [*under, sys.executable, "-W", "ignore", "-m", "kalmannorm", *arguments]
    return subprocess.run(line, capture_output=True, env=given | environment, cwd=cwd, timeout=300)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a run."""
    folder = tmp_path_factory.mktemp("trained")
    assert cli.main(["train", *DIGITS, *place(folder)]) == 0
    return folder / "results"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package that nobody may write to."""
    source, copy = Path(__file__).resolve().parents[1], tmp_path_factory.mktemp("package")
    for part in ("src", "conf"):
        shutil.copytree(source / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (copy, *files(copy)):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return copy


def without_a_home(package: Path, cwd: Path, *arguments: str, **environment: str) -> tuple[str, str]:
    """What a command says without home, locale and temporary folder, from a package that cannot be written."""
    there = files(package)
    gone = ("HOME", "TMPDIR", "LANG", "LC_CTYPE", "USER", "LOGNAME", "TERM", "PYTHONDONTWRITEBYTECODE")
    odd = {**ASCII, "TMPDIR": "/not/there", "PYTHONPATH": str(package / "src"), **environment}
    done = command(*arguments, without=gone, cwd=cwd, under=ROOT_AS_OTHERS if os.geteuid() == 0 else (), **odd)
    assert done.returncode == 0 and files(package) == there, done.stderr
    return done.stdout.decode("ascii"), done.stderr.decode("ascii")


@pytest.mark.slow
def test_a_run_without_a_home(package: Path, tmp_path: Path) -> None:
    said, progress = without_a_home(package, tmp_path, "train", *DIGITS, *place(tmp_path))
    assert "moving" in said and progress.count("epoch 1/1") == 1


@pytest.mark.slow
def test_a_report_on_an_ascii_terminal_reads_no_matplotlibrc(trained: Path, package: Path, tmp_path: Path) -> None:
    """Neither that of the current folder, which cannot be decoded, nor the user's own."""
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe\0")
    (tmp_path / "own").write_text("text.usetex: True\nbackend: nowhere\n")
    settings = {"MATPLOTLIBRC": str(tmp_path / "own"), "MPLBACKEND": "nowhere"}
    asked = ["report", "table7", *DIGITS, "seeds=1", f"results={trained}"]
    said, complaints = without_a_home(package, tmp_path, *asked, **settings)
    assert not complaints
    assert "KN" in said and "\\u2212" not in said and "\\xb1" not in said


@pytest.mark.parametrize(
    ("text", "encoding", "shown"),
    [
        ("1.0 ± 0.2, −3 × 4 …", "ascii", "1.0 +- 0.2, -3 x 4 ..."),
        ("1.0 ± 0.2, −3 × 4 …", "latin-1", "1.0 ± 0.2, -3 × 4 ..."),
        ("größe", "ascii", "gr\\xf6\\xdfe"),
        ("gr\udcf6sse", "utf-8", "gr\\udcf6sse"),
    ],
)
def test_what_a_terminal_lacks_is_said_plainly(text: str, encoding: str, shown: str) -> None:
    codecs.register_error("transliterate", cli._transliterate)
    assert text.encode(encoding, "transliterate").decode(encoding) == shown


def test_a_reader_that_leaves_is_no_error(trained: Path) -> None:
    line = f"{sys.executable} -m kalmannorm records list --results {trained} | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, timeout=100)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])  # written at the end, or line by line
def test_an_output_that_takes_nothing_is_named(unbuffered: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    line = f"{sys.executable} -m kalmannorm records list --results {trained} > /dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=100)
    assert done.returncode == 2 and b"No space left on device" in done.stderr and b"Traceback" not in done.stderr
    closed = subprocess.run(["bash", "-c", line.replace("> /dev/full", ">&-")], capture_output=True, timeout=100)
    assert b"Traceback" not in closed.stderr


def test_pictures_are_the_same_under_any_theme(tmp_path: Path) -> None:
    def picture(name: str) -> bytes:
        with style.context():
            figure = Figure(figsize=(3, 2), layout="constrained")
            axis = figure.subplots()
            axis.plot([1, 2, 3], [1, 4, 9], label="squares")
            axis.set_title("a title")
            axis.legend()
            style.grid(axis)
            figure.savefig(tmp_path / name, metadata={"Software": None})
        return (tmp_path / name).read_bytes()

    plain = picture("plain.png")
    theme = {"text.usetex": True, "axes.facecolor": "black", "lines.linewidth": 9, "savefig.dpi": 30, "font.size": 20}
    with matplotlib.rc_context(theme):
        assert picture("themed.png") == plain
        assert matplotlib.rcParams["font.size"] == 20  # and what the user has set stays


def test_modules_of_the_users_folder_are_not_for_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m` looks there first, and the installed command does not; its workers are started by `python -m`."""
    (tmp_path / "queue.py").write_text("raise RuntimeError('theirs')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    assert subprocess.run(worker.COMMAND, stdin=subprocess.DEVNULL, capture_output=True).returncode == 1
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    cli._prepare_environment()
    subprocess.run(worker.COMMAND, stdin=subprocess.DEVNULL, check=True)


def test_a_current_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    gone = ("bash", "-c", 'rmdir "$PWD" && exec "$@"', "bash")
    (tmp_path / "here").mkdir()
    done = command("train", *DIGITS, *place(tmp_path), cwd=tmp_path / "here", under=gone)
    said = b"kalmannorm: the current folder was removed: go to another one (cd) and call again\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_the_commit_of_another_repository_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package is installed into a folder of somebody's project, which git leaves out."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".gitignore").write_text(".venv\n")
    installed = tmp_path / ".venv" / "machine.py"
    installed.parent.mkdir()
    installed.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(machine, "__file__", str(installed))
    assert machine._git.__wrapped__() == {"commit": None, "dirty": None}
    subprocess.run([*git, "add", "-f", str(installed)], check=True)
    assert machine._git.__wrapped__()["dirty"] is True


FREES_LARGE_PIECES = """
import resource
from kalmannorm.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        pieces = [bytearray(2**24) for _ in range(4)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    ran = subprocess.run([sys.executable, "-c", FREES_LARGE_PIECES], capture_output=True, text=True, check=True)
    before, after = map(int, ran.stdout.split())
    assert before > 1000 > 100 > after


def test_make_passes_on_folders_with_any_name_and_reports_all_seeds() -> None:
    folder = "/a b/it's"
    command = ["make", "--no-print-directory", "-n", "table7", f"DATA={folder}"]
    made = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    sweep, report = (line for line in made.stdout.splitlines()[-1].split(";") if " table7 " in line)
    assert f"data={folder}" in shlex.split(sweep) and "seeds=3" in shlex.split(sweep)
    assert f"data={folder}" in shlex.split(report) and "seeds=" not in report


def test_what_a_record_asks_git_takes_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user may commit at the same time, and a run that is killed then must not leave the lock behind."""
    asked: list[list[str]] = []
    run = subprocess.run

    def note(line: list[str], **options: Any) -> Any:
        asked.append(line)
        return run(line, **options)

    monkeypatch.setattr(subprocess, "run", note)
    machine._git.__wrapped__()
    assert asked and all(line[:2] == ["git", "--no-optional-locks"] for line in asked)
