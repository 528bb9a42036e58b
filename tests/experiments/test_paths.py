"""Paths as values, keys that are given twice, and what Hydra would read into either."""

import os
from pathlib import Path

import pytest

from kalmannorm import data
from kalmannorm.cli import main
from kalmannorm.errors import UserError
from kalmannorm.experiments.cards import load, multirun
from kalmannorm.experiments.composition import compose, split_paths
from kalmannorm.experiments.config import conf_dir
from kalmannorm.report import parameters

AS_THEY_ARE = [
    "plain", "/a/b", "a b", "2024", "1e3", "007", "-1", "0x10", "true", "nan", "inf", "lr=0.1/r", "(new)", "[a]", "{b}",
    "50%", "a,b", "a:b", "${HOME}", "$HOME", "a'b", 'a"b', "größe", "a\\=b", "range(1,3)", "glob(*)", "choice(a,b)",
    "a#b", "a;b", "*", "?", ".", "..", "@x", "+x", "a~b", "nobody's/", "trailing/", " ",
]  # fmt: skip


@pytest.mark.parametrize("path", AS_THEY_ARE)
def test_paths_are_taken_as_they_are(path: str) -> None:
    for key in ("results", "runs", "data", "weights"):
        for added in ("", "+", "++"):
            paths, rest = split_paths([f"{added}{key}={path}", "seed=2"])
            assert paths == {key: path} and rest == ["seed=2"]


@pytest.mark.parametrize("path", ["2024", "lr=0.1", "a,b", "(x) y", "null"])
def test_paths_reach_every_way_of_naming_runs(path: str) -> None:
    text = f"'{path}'" if path == "null" else path
    given = [f"results={text}", f"runs={text}"]
    composed = compose(conf_dir(), given)
    assert composed["results"] == composed["runs"] == path
    runs = [*multirun([*given, "seed=1,2", "device=cpu"]).runs, *load("table7", [*given, "device=cpu"]).runs]
    assert len(runs) > 2 and {run.results for run in runs} == {run.runs for run in runs} == {path}


@pytest.mark.parametrize(
    ("text", "path"),
    [("'a b'", "a b"), ('"2024"', "2024"), ('"null"', "null"), ("''a''", "'a'"), ("'a", "'a"), ("Null", "Null")],
)
def test_quotes_around_a_path_are_taken_off(text: str, path: str) -> None:
    assert split_paths([f"results={text}"])[0] == {"results": path}


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert split_paths(["data=~/sets", "runs=~nobody-of-that-name/x"])[0] == {
        "data": "/home/me/sets",
        "runs": "~nobody-of-that-name/x",
    }
    assert split_paths(["data=null", "weights=null"])[0] == {"data": None, "weights": None}


@pytest.mark.parametrize("override", ["results=", "results=null", "runs=null", "runs=''", "data=", "weights="])
@pytest.mark.parametrize("command", [["train"], ["sweep", "table7"], ["train", "-m", "seed=1,2"]])
def test_what_is_no_path_is_named_with_its_quoting(
    override: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "dataset=digits", override]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and override.partition("=")[0] in said and "in quotes" in said and '"null"' in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "seed=1", "seed=2"],
        ["train", "seed=1", "seed=1"],
        ["train", "norm=bn", "norm=bkn"],
        ["train", "norm.options.gain=0.5", "+norm.options.gain=0.6"],
        ["train", "-m", "seed=1,2", "seed=3"],
        ["train", "results=a", "results=b"],
        ["sweep", "table7", "budget=smoke", "budget=lite"],
        ["sweep", "table7", "seeds=1", "seeds=2"],
        ["sweep", "table7", "slots=1", "slots=2"],
        ["report", "table7", "dataset=digits", "dataset=cifar10"],
        ["report", "results=a", "results=b"],
        ["records", "list", "norm=bn", "norm=bkn"],
    ],
)
def test_a_key_that_is_given_twice_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "is given twice" in said and said.count("\n") == 1


@pytest.mark.parametrize("override", ["hydra.run.dir=x", "+hydra.run.dir=x", "hydra/launcher=basic"])
def test_hydras_own_settings_are_refused(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", override]) == 2
    said = capsys.readouterr().err
    assert override in said and "results=" in said and said.count("\n") == 1


@pytest.mark.parametrize("arguments", [["records", "list"], ["records", "prune"], ["report"]])
def test_a_results_folder_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert "results=results is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *(["data", "ffcv", "imagenet", "--timeout", seconds] for seconds in ("0", "-1", "nan", "inf", "soon")),
        *(["data", "ffcv", "imagenet", "--workers", workers] for workers in ("x", "-1", "1.5", "99999")),
    ],
)
def test_numbers_of_options_have_ranges(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("kalmannorm")


def test_a_path_of_bytes_that_are_no_text() -> None:
    assert split_paths(["results=gr\udcf6sse"])[0] == {"results": "gr\udcf6sse"}


@pytest.mark.parametrize("key", ["results", "runs"])
@pytest.mark.parametrize("place", ["loop", "loop/x", "nowhere", "file/x", "/proc/self/x", f"new/{300 * 'x'}"])
@pytest.mark.parametrize("command", [["train"], ["train", "-m"]])
def test_what_cannot_be_written_is_named_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    place: str,
    command: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "source", lambda *_: pytest.fail("data were touched"))
    Path("loop").symlink_to("loop")
    Path("nowhere").symlink_to("not/there")
    Path("file").touch()
    other = {"results": "runs=u", "runs": "results=r"}[key]
    assert main([*command, "dataset=digits", "budget=smoke", "device=cpu", f"{key}={place}", other]) == 2
    said = capsys.readouterr().err
    assert "cannot write" in said and place in said and "started" not in said


def test_one_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["records", "list", "results=a\nb"]) == 2
    assert (
        capsys.readouterr().err
        == "kalmannorm: results=a\\nb is no folder: there are no records; name another by results=\n"
    )


def test_a_report_beside_names_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "count", lambda _: 1)  # of networks: seconds
    (tmp_path / os.fsdecode(b"gr\xf6\xdfe") / "records").mkdir(parents=True)
    assert main(["report", f"results={tmp_path}"]) == 0
    assert b'<a href="gr\xf6\xdfe/records">' in (tmp_path / "report.html").read_bytes()


@pytest.mark.parametrize("override", ["=1", "", "dataset=../dataset/digits", "dataset=/etc/passwd", "norm=bn.yaml"])
def test_what_is_no_choice_is_named(override: str) -> None:
    with pytest.raises(UserError, match=r"expected key=value|unknown (dataset|norm) ") as error:
        compose(conf_dir(), [override])
    assert "\n" not in str(error.value)


def test_unknown_places_are_no_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["records", "list", "runs=x"]) == 2 and "means nothing here" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected key=value"):
        compose(conf_dir(), ["results"])
