"""The page, the generated parts of documents, and the commands that write and compare."""

import json
import re
import resource
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from records import config, table7, write_record

import kalmannorm
from kalmannorm.cli import main
from kalmannorm.errors import UserError
from kalmannorm.experiments.record import NUMERICS, read_all
from kalmannorm.report import command, page, parameters, plots
from kalmannorm.report.compare import compare

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCRIPT = "</script><script>alert(1)</script>"


class Parsed(HTMLParser):
    """Links, anchors and tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        of = dict(attrs)
        self.ids += [of["id"] or ""] if "id" in of else []
        self.links += [of["href"] or ""] if tag == "a" and "href" in of else []


def check_links(folder: Path) -> Parsed:
    """Every number's runs are on the page, every file that it names is there, no name stands for two places."""
    text = (folder / "report.html").read_text()
    found = Parsed(text)
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    known = {run["id"] for run in data}
    assert len(known) == len(data) and len(set(found.ids)) == len(found.ids)
    for link in found.links:
        if link.startswith("#runs="):
            assert set(link.removeprefix("#runs=").split(",")) <= known
        elif link.startswith("#"):
            assert link[1:] in found.ids
        else:
            assert (folder / link).exists(), link
    assert not re.search(r'(src|href)="https?:', text)  # works without network
    return found


def test_page_without_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "count", lambda settings: 10**6)  # which takes seconds
    assert command.write_all(tmp_path)
    check_links(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "No claim of the papers has been tested in their setting yet." in text and "experiments without runs" in text


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes most of a report's seconds."""
    monkeypatch.setattr(plots, "encode", lambda figure, kinds: dict.fromkeys(kinds, b"<svg></svg>"))


def test_the_answer_comes_first_and_numbers_open_their_runs(tmp_path: Path, undrawn: None) -> None:
    table7(tmp_path)
    names = {path.name for path in command.write_all(tmp_path)}
    found = check_links(tmp_path)
    text = (tmp_path / "report.html").read_text()
    answer = text.split("<h1>")[1].split("</header>")[0]
    assert (
        "at budget lite" in answer
        and "supported" in answer
        and '<th rowspan="1">Does KN do without online statistics at evaluation?</th>' in answer
    )
    ids = [record["id"] for record in read_all(tmp_path) if record["config"]["norm"]["name"] == "bkn"]
    assert any(set(ids) == set(link.removeprefix("#runs=").split(",")) for link in found.links)
    assert {
        "report.html",
        "claims.md",
        "table7_cifar10-lite.md",
        "table7_cifar10-lite.tex",
        "figure5_cifar10-lite.png",
    } <= names
    assert not any("=" in name or " " in name for name in names)
    assert {path.name for path in tmp_path.iterdir() if path.suffix} == names


def test_nothing_from_records_is_markup(tmp_path: Path, undrawn: None) -> None:
    table7(tmp_path)
    write_record(tmp_path, config("bkn"), 7, failed=SCRIPT)
    for path in (tmp_path / "records").glob("*.json"):
        record = json.loads(path.read_text())
        record["host"]["hardware"] = f'"><img src=x onerror=alert(1)>{SCRIPT}'
        if "data" in record:
            record["data"]["fidelity"] = SCRIPT
        path.write_text(json.dumps(record))
    command.write_all(tmp_path)
    found = check_links(tmp_path)
    assert found.tags.count("script") == 2 and not {"img", "iframe", "object"} & set(found.tags)
    script = (tmp_path / "report.html").read_text().rpartition("<script>")[2]
    assert "innerHTML" not in script  # text of records is set as text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser(tmp_path: Path) -> None:
    """It renders without errors, its controls work, and on a phone nothing is wider than the screen."""
    table7(tmp_path)
    command.write_all(tmp_path)
    # Measured by the browser itself. A headless one opens no window of a phone's 390 pixels, but a frame may have them.
    (tmp_path / "phone.html").write_text("""<iframe src="report.html" style="width: 390px; border: 0"></iframe>
    <script>window.onload = () => { const page = document.querySelector("iframe").contentDocument;
      for (const found of page.querySelectorAll("details")) found.open = true;
      const width = page.documentElement.scrollWidth, rows = () => page.querySelectorAll("#table tbody tr").length;
      const all = rows(), filter = page.getElementById("filter");
      filter.value = "bkn"; filter.dispatchEvent(new Event("input"));
      const some = rows(); page.querySelector("#table tbody tr").click();
      const opened = page.querySelectorAll("#table polyline").length;
      page.getElementById("all").click();
      page.querySelectorAll("#table thead th")[6].click();
      const first = page.querySelector("#table tbody tr td:nth-child(7)").textContent;
      document.title = [width, all, some, opened, rows(), first].join(" "); };
    </script>""")
    assert CHROMIUM is not None
    command_ = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command_ += ["--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [*command_, (tmp_path / "phone.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert ":CONSOLE" not in done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    width, every, some, opened, again, first = title[1].split()
    assert int(width) <= 390
    assert (every, some, opened, again, first) == ("9", "3", "2", "9", "60.1")


def test_between_markers() -> None:
    text = "a\n<!-- results -->\nold\n<!-- end -->\nb\n"
    assert page.between(text, "new\n") == "a\n<!-- results -->\n\nnew\n\n<!-- end -->\nb\n"
    with pytest.raises(ValueError, match="no markers"):
        page.between("nothing", "new")


def test_generated_documents_are_those_of_the_committed_records(tmp_path: Path, undrawn: None) -> None:
    """Stale: `make report` writes docs/results.md, README's part and everything in results/ again."""
    results = tmp_path / "results"
    for part in (REPOSITORY / "results").iterdir():
        if part.is_dir():
            shutil.copytree(part, results / part.name)
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/results.md"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    command.write_all(results)
    links = check_links(results).links
    folders = {path.name for path in results.iterdir() if path.is_dir()} - {"records", "speed", "bench"}
    assert {f"{folder}/records" for folder in folders} <= set(links)  # what it does not read, it names
    for name in ("README.md", "docs/results.md"):
        assert (tmp_path / name).read_text() == (REPOSITORY / name).read_text(), f"{name} is stale: make report"
    committed = REPOSITORY / "results"
    fresh = {path.name for path in results.iterdir() if path.is_file()}
    assert {path.name for path in committed.iterdir() if path.is_file()} == fresh  # nothing that nobody writes
    for name in fresh:
        if name.endswith((".md", ".csv", ".tex")):
            assert (committed / name).read_text() == (results / name).read_text(), (
                f"results/{name} is stale: make report"
            )
    check_links(committed)
    assert (committed / "report.html").stat().st_size < 1_000_000


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = write_record(tmp_path, config("bkn"), 1, 81.1, 81)
    a = write_record(tmp_path, config("bn"), 1, 80.1, 79.5)
    assert main(["report", "--compare", a[:8], b, f"results={tmp_path}"]) == 0
    said = capsys.readouterr().out
    lines = {line.split("  ")[1].strip(): line for line in said.splitlines() if line.startswith("  ")}
    assert "bn" in lines["norm.name"] and "bkn" in lines["norm.name"]
    assert re.search(r"80.1 +81.1 +\+1$", lines["moving accuracy"]) and "80.1" in lines["moving"]
    assert "budget.epochs" not in said
    assert "training images" not in said and "loss_" not in said
    for run, complaint in (("zzz", "no run"), ("", "no run"), ("../x", "no run")):
        with pytest.raises(UserError, match=complaint):
            compare(tmp_path, run, b)
    path = tmp_path / "records" / f"{b}.json"
    detector = json.loads(path.read_text())
    detector |= {"final": {"moving": {"box_ap": 1.0}}, "final_on_training_images": {"box_ap": 30.0}}
    detector["curves"] = {"epoch": [1], "loss_mask": [0.5]}
    path.write_text(json.dumps(detector))
    said = compare(tmp_path, a, b)
    assert re.search(r"training images: box_ap +– +30\n", said) and re.search(r"loss_mask +– +0.5\n", said)
    assert main(["report", "--compare", a, b, "dataset=cifar10"]) == 2
    assert "expected results=FOLDER" in capsys.readouterr().err


def test_one_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table7(tmp_path)
    assert main(["report", "table7", "dataset=cifar10", "budget=lite", "seeds=3", f"results={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "62.20 (62.10, 62.20, 62.30)" in said and str(tmp_path / "table7_cifar10-lite.csv") in said
    assert main(["report", "table7", "dataset=cifar100", f"results={tmp_path}"]) == 2
    assert "kalmannorm sweep table7 dataset=cifar100" in capsys.readouterr().err


def test_one_experiment_without_its_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table7(tmp_path)
    assert main(["report", "table7", "rows=kn_stat2", f"results={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "62.20 (62.10, 62.20, 62.30)" in said and "Δ:" not in said


def test_one_experiment_under_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table7(tmp_path)
    where = ["dataset=cifar10", f"results={tmp_path}"]
    for settings in (["schedule.weight_decay=2e-4"], ["precision=fp32", "workers=2", "checkpoint_every=0.1"]):
        assert main(["report", "table7", *where, *settings]) == 0, settings
    assert not list(tmp_path.glob("*workers*")) and list(tmp_path.glob("table7-precision-fp32_*.csv"))
    capsys.readouterr()
    for other in ("precision=bf16", "deterministic=true", "schedule.weight_decay=1e-3"):
        assert main(["report", "table7", *where, other]) == 2
        assert f"to run it: kalmannorm sweep table7 {' '.join(where)} {other}" in capsys.readouterr().err


def test_one_experiment_with_some_of_its_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table7(tmp_path)
    assert main(["report", "table7", "seeds=1,3", f"results={tmp_path}"]) == 0
    assert "62.20 (62.10, 62.30)" in capsys.readouterr().out
    assert list(tmp_path.glob("table7-seeds-1-3_*.csv")) and not list(tmp_path.glob("table7_*"))


def test_one_experiment_at_its_budget_s_own_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table7(tmp_path)
    assert main(["report", "table7", "dataset=cifar10", "budget.epochs=12", f"results={tmp_path}"]) == 0
    assert "62.20 (62.10, 62.20, 62.30)" in capsys.readouterr().out
    assert main(["report", "table7", "dataset=cifar10", "budget.epochs=13", f"results={tmp_path}"]) == 2


@pytest.mark.slow
def test_five_thousand_records(tmp_path: Path) -> None:
    """Loaded, tabulated, judged and rendered within 2 GB and three times what a report without records takes.

    That is 30 s of a core where the empty one takes 10 s: Table 2's networks are counted and PyTorch imported for both.
    """
    steps = list(range(390, 390 * 30 + 1, 390))
    for seed in range(1, 601):
        curves = {"epoch": list(range(1, 31)), "step": steps, "moving": [80 + seed % 7] * 30, "online": [79.5] * 30}
        for norm, batch in (("bn", 2), ("bn", 128), ("bkn", 2)):
            write_record(tmp_path, config(norm, batch), seed, curves=curves)
        for rate in range(5):  # rows that are in no table, and schedules of their own
            of = config("none")
            of["schedule"] |= {"weight_decay": rate * 1e-3 + seed % 40 * 1e-5}
            write_record(tmp_path, of, seed, curves=curves)
        if seed <= 200:
            write_record(tmp_path, config("bkn", budget="smoke"), seed, curves=curves)

    def timed(results: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
        code = f"""
from pathlib import Path
from kalmannorm.report import command
command.write_all(Path({str(results)!r}))
# Not ru_maxrss, which a process inherits from the one that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of one core: other processes on the machine do not count.
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done

    (tmp_path / "empty").mkdir()
    empty, _ = timed(tmp_path / "empty")
    seconds, done = timed(tmp_path)
    assert seconds < max(30, 3 * empty), (seconds, empty)
    assert int(done.stdout) < 2_000_000  # kB
    assert "collapsed" not in done.stderr  # a caption that leaves its picture no room
    check_links(tmp_path)
    assert len(read_all(tmp_path)) == 5000 and read_all(tmp_path)[0]["numerics"] == NUMERICS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "table7", "seeds="], "expected seeds from 0"),
        (["report", "table3", "rows=bn"], "compares two rows"),
        (["report", "table7", "budgt=lite"], "there is no setting 'budgt'"),
        (["report", "table7", "budget=lit"], "did you mean 'lite'"),
        (["report", "table7", "arch.width=half"], "arch.width = half"),
        (["report", "table7", "seed=3"], "seeds=4,"),
        (["report", "table7", "++norm.options.gain=0.2"], "the rows of table7 differ in it"),
        (["report", "table7", "schedule.momentum={a:"], "is no value"),
        (["sweep", "table7", "--dry-run", "~norm"], "the rows of table7 differ in it"),
        (["train", "results=gr\udcc3\udcb6\udcc3\udc9fe"], "LC_ALL=C.UTF-8"),
        (["report", "v1-table3", "arch.width=0.25"], "the rows of v1-table3 differ in it"),
        (["sweep", "table7", "norm=gn"], "the rows of table7 differ in it"),
        (["sweep", "table7", "batch=g128_s4"], "the rows of table7 differ in it"),
        (["sweep", "table7", "seed=7"], "seeds=4,"),
        (["sweep", "table7", "seeds="], "expected seeds from 0"),
        (["sweep", "table7", "data=/nowhere"], "data set 'cifar10' is not there"),
        (["train", "dataset=digits", "results=/dev/null"], "cannot write to /dev/null/records"),
        (["report", "results=/nowhere"], "is no folder"),
        (["report", "results="], "expected a path"),
        (["records", "list", "nrm=bn"], "no record has a setting nrm"),
        (["records", "list", "norm=bnk"], "did you mean 'bn'"),
        (["records", "list", "status=bad"], "unknown status 'bad'"),
        (["data", "prepare", "imagenet"], "image-net.org"),
        (["data", "prepare", "image_folder"], "train/CLASS/"),
        (["evaluate", "/somewhere"], "whose id begins with '/somewhere'"),
        (["records", "list", "seed=[1"], "is no value"),
        (["records", "list", "dataset=cifar01"], "did you mean 'cifar10'"),
        (["sweep", "table7", "seeds=0"], "how many, from 1 to 10,000"),
        (["train", "schedule.lr=-1"], "rates above 0"),
        (["train", "device=gpu"], "expected to be cpu, mps, cuda"),
        (["train", "seed=9223372036854775808"], "less than or equal to 9223372036854775807"),
        (["train", "dataset=cifar10", "data=/no where"], "--root '/no where'"),
        (["data", "ffcv", "camvid"], "is no folder with images of each class"),
    ],
)
def test_wrong_arguments_end_in_a_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate"], "required: RUN\n"),
        (["sweep"], "required: EXPERIMENT\n"),
        (["data", "ffcv", "imagenet", "--timeout", "soon"], "soon: expected seconds above 0"),
        (["--version"], f"kalmannorm {kalmannorm.__version__}\n"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    said = capsys.readouterr()
    assert words in said.out + said.err
