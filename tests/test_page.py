"""The whole report: every card in every setting, the page, the comparison of two runs."""

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conf_cards import budget_of, conf_cards, config_of, fill
from report_fixtures import write_record

from kalmannorm import report
from kalmannorm.cli import main
from kalmannorm.errors import UserError
from kalmannorm.experiments.record import NUMERICS
from kalmannorm.report import collection, cost, variants, verdicts
from kalmannorm.report.compare import compare
from kalmannorm.report.table import table

REPOSITORY = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def cards() -> dict[str, dict[str, Any]]:
    return conf_cards()


def made(results: Path, cards: Mapping[str, Any]) -> tuple[str, list[collection.Entry]]:
    from kalmannorm.report import page

    found = report.records(results, NUMERICS)
    problems = {name: "no card yet" for name in collection.PAPERS if name not in cards}
    entries = collection.collect(cards, problems, found)
    return page.render_page(found, entries, verdicts.evaluate(found, cards)), entries


class Links(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: set[str] = set()
        self.loaded: set[str] = set()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "a":
            self.targets.add(str(found["href"]))
        else:
            self.loaded |= {str(found[key]) for key in ("src", "href", "srcset") if key in found}


def check_links(text: str) -> Links:
    """Each link has its place, each place is there once, nothing comes from elsewhere."""
    links = Links(text)
    assert len(set(links.ids)) == len(links.ids)
    assert links.targets and {target[1:] for target in links.targets} <= set(links.ids)
    assert all(target.startswith("data:") for target in links.loaded), "something is loaded from outside"
    assert "url(" not in text and "@import" not in text and "<script" not in text
    return links


# Tables of the report


def test_table_of_several_data_sets(tmp_path: Path, cards: dict[str, Any]) -> None:
    fill(tmp_path, cards)
    kn100 = next(row for row in cards["table8"]["rows"] if row["key"] == "inception_kn_stat2")["configs"]["cifar100"]
    kn100 = {**kn100, "budget": budget_of("cifar100", "lite"), "precision": "fp32", "compile": False}
    write_record(tmp_path, kn100, 1, 40.0, numerics=NUMERICS, sha256="c" * 64)
    found = report.records(tmp_path, NUMERICS)
    (setting,) = variants.of_card(cards["table8"], found)
    built = table(variants.apply(cards["table8"], setting), found)
    assert built.stem == "table8_lite" and [column.label for column in built.columns] == [
        "CIFAR-10",
        "CIFAR-100",
        "SVHN",
    ]
    rows = {row.key: row for row in built.rows}
    states = {key: [cell.state if cell else None for cell in row.cells] for key, row in rows.items()}
    assert states["inception_kn_stat2"] == ["done", "done", "not run"]
    assert states["resnet32_kn_stat2"] == ["not run", None, None]
    assert [cell.paper for cell in rows["inception_kn_stat2"].filled] == [90.9, 67.3, 98.16]
    assert rows["resnet32_kn_stat2"].filled[0].paper == 92.7
    assert not built.footnotes  # other data in another column is no difference between rows
    contrast = built.contrast(rows["inception_kn_stat2"], "cifar10")
    assert contrast is not None and contrast.difference is not None and contrast.difference.n == 3
    written = report.render.markdown(built)
    assert "| small Inception: |" in written and "| ResNet-32: |" in written and "81.47 ± " in written
    assert len({line.count("|") for line in written.splitlines() if line.startswith("|")}) == 1


def test_steps_to_an_accuracy(tmp_path: Path, cards: dict[str, Any]) -> None:
    columns = [{"key": "steps", "label": "steps to 70 %", "statistics": "moving", "steps_to": 70}]
    card = {**cards["table7"], "columns": columns}
    setting = config_of(cards, "bn_stat2")
    card["rows"] = [{**row, "config": config_of(cards, row["key"])} for row in card["rows"]]
    for seed, at in ((1, [60, 72, 80]), (2, [60, 65, 70])):
        curves = {"epoch": [1, 2, 3], "step": [1000, 2000, 3000], "moving": at, "online": at}
        write_record(tmp_path, setting, seed, at[-1], numerics=NUMERICS, curves=curves)
        low = {**curves, "moving": [1, 2, 69] if seed == 1 else at}
        write_record(tmp_path, config_of(cards, "kn_stat2"), seed, 69, numerics=NUMERICS, curves=low)
    rows = {row.key: row.cells[0] for row in table(card, report.records(tmp_path, NUMERICS)).rows}
    bn, kn = rows["bn_stat2"], rows["kn_stat2"]
    assert bn is not None and bn.summary is not None and bn.summary.mean == 2500
    assert kn is not None and (kn.state, kn.summary) == ("not reached", None) and "never reached: seed 1" in kn.notes[0]
    assert "2,500" in report.render.markdown(table(card, report.records(tmp_path, NUMERICS)))


def test_cost_is_measured_or_absent(tmp_path: Path, cards: dict[str, Any]) -> None:
    card = variants.apply(cards["table7"], variants.Variant("cifar10", "lite"))
    assert cost.describe(card, report.records(tmp_path, NUMERICS)) == "not measured"
    fill(tmp_path, cards)
    for path in (tmp_path / "records").glob("*.json"):
        record = json.loads(path.read_text())
        record["host"] |= {"seconds": 3 * record["data"]["train_images"], "hardware": "a machine", "threads": 1}
        path.write_text(json.dumps(record))
    hours = 5 * 3 * 3 * 10_000 / 3600  # rows x seeds x seconds an image of all epochs x images
    said = cost.describe(card, report.records(tmp_path, NUMERICS))
    assert said == f"{hours:.1f} device-hours on a machine, 1 thread, fp32 (5 of 5 rows, 3 seeds)"
    more = variants.apply(cards["table8"], variants.Variant("cifar10", "lite"))
    assert "(2 of 4 rows, 3 seeds)" in cost.describe(more, report.records(tmp_path, NUMERICS))
    longer = variants.apply(cards["table7"], variants.Variant("cifar10", "paper"))
    assert cost.describe(longer, report.records(tmp_path, NUMERICS)) == "not measured"  # another resolution


# The page


def test_page_without_records(tmp_path: Path, cards: dict[str, Any]) -> None:
    text, entries = made(tmp_path, cards)
    check_links(text)
    assert "No claim has a run yet" in text and "no card yet" in text
    assert [entry.name for entry in entries if entry.name in collection.PAPERS] == list(collection.PAPERS)
    assert not any(entry.run for entry in entries)


def test_numbers_link_to_their_records(tmp_path: Path, cards: dict[str, Any]) -> None:
    fill(tmp_path, cards)
    stale = write_record(tmp_path, config_of(cards, "kn_stat2"), 9, 10.0, numerics=NUMERICS + 1)
    text, _ = made(tmp_path, cards)
    links = check_links(text)
    ids = {path.stem for path in (tmp_path / "records").glob("*.json")} - {stale}
    assert {f"r-{i}" for i in ids} <= set(links.ids) and f"r-{stale}" not in links.ids and stale in text
    group = re.search(r'<a href="#(g\w+)">80.20 ± 0.25</a>', text)
    assert group is not None
    section = text.split(f'id="{group[1]}"')[1].split("</details>")[0]
    assert "<svg" in section and "<polyline" in section and "schedule" in section
    of_bn = [r["id"] for r in report.records(tmp_path, NUMERICS).current if r["config"]["norm"]["name"] == "bn"]
    assert len(of_bn) == 3 and all(f"r-{i}" in section for i in of_bn)
    assert text.index("at budget lite") < text.index('id="results"') and "1,797 of 1,797 exact" in text


def test_pictures_link_to_their_runs(tmp_path: Path, cards: dict[str, Any]) -> None:
    fill(tmp_path, cards, arrays=True)
    text, _ = made(tmp_path, cards)
    of_figure = text.split('id="c-figure5"')[1].split("</article>")[0]
    assert re.findall(r'<a href="#g\w+">([^<]*)</a>', of_figure) == [
        "bn (128, 2) inception_cifar",
        "bkn (128, 2) preset paper, gain=0.5, belief=posterior inception_cifar",
    ]
    check_links(text)


def test_detectors_are_listed_and_their_pictures_stay_outside(tmp_path: Path, cards: dict[str, Any]) -> None:
    results = tmp_path / "results"
    fill(results, cards, seeds=1)
    run = write_record(results, cards["table6"]["rows"][0]["config"], 1, numerics=NUMERICS)
    file = results / "records" / f"{run}.json"
    record = json.loads(file.read_text())
    record["final"] = {kind: {"box_ap": 12.345, "mask_ap": 6.0, "images": 5} for kind in ("moving", "online")}
    file.write_text(json.dumps(record))
    text, _ = made(results, cards)
    assert "<td>12.35 / 6.00</td>" in text and "detections.png" not in text
    folder = tmp_path / "runs" / run
    folder.mkdir(parents=True)
    shown = set()
    for name in ("detections.png", "detections-training.png"):
        (folder / name).write_bytes(b"pixels of others")
        shown.add(f"../runs/{run}/{name}")
        text, _ = made(results, cards)
        assert {link for link in Links(text).loaded if not link.startswith("data:")} == shown


def test_nothing_from_records_is_markup(tmp_path: Path, cards: dict[str, Any]) -> None:
    fill(tmp_path, cards)
    write_record(tmp_path, config_of(cards, "kn_stat2"), 7, numerics=NUMERICS, failed=SCRIPT)
    for path in (tmp_path / "records").glob("*.json"):
        record = json.loads(path.read_text())
        record["host"]["hardware"] = f'"><img src=x onerror=alert(1)>{SCRIPT}'
        if "data" in record:
            record["data"]["fidelity"] = SCRIPT
        path.write_text(json.dumps(record))
    text, _ = made(tmp_path, cards)
    assert "<img" not in text.split('id="runs"')[1] and "&lt;script&gt;" in text
    check_links(text)
    assert {"script", "iframe", "object"}.isdisjoint(Links(text).tags)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser(tmp_path: Path, cards: dict[str, Any]) -> None:
    """It renders without errors, and on a phone nothing is wider than the screen."""
    fill(tmp_path, cards)
    text, _ = made(tmp_path, cards)
    # Measured by the browser itself. A headless one opens no window of a phone's 390 pixels, but a frame may have them.
    (tmp_path / "page.html").write_text(text)
    (tmp_path / "phone.html").write_text("""<iframe src="page.html" style="width: 390px; border: 0"></iframe>
    <script>window.onload = () => { const page = document.querySelector("iframe").contentDocument;
      for (const found of page.querySelectorAll("details")) found.open = true;
      document.title = [page.documentElement.scrollWidth, page.querySelectorAll("a[href^='#']").length,
        [...page.querySelectorAll("a")].filter(a => !page.getElementById(a.hash.slice(1))).length].join(" "); };
    </script>""")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "phone.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert ":CONSOLE" not in done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    width, links, dangling = map(int, title[1].split())
    assert width <= 390 and links > 20 and dangling == 0


# Commands


def test_compare(tmp_path: Path, cards: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, cards, seeds=1)
    found = report.records(tmp_path, NUMERICS).current
    a, b = (r["id"] for r in sorted(found, key=lambda r: r["final"]["moving"]["accuracy"]))
    assert main(["report", "--compare", a[:8], b, f"results={tmp_path}"]) == 0
    said = capsys.readouterr().out
    lines = {line.split("  ")[1].strip(): line for line in said.splitlines() if line.startswith("  ")}
    assert "bn" in lines["norm.name"] and "bkn" in lines["norm.name"]
    assert re.search(r"80.1 +81.1 +\+1$", lines["moving accuracy"]) and "50  80.1" in lines["moving"]
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


@pytest.mark.slow
def test_the_committed_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`make report` from a fresh clone: all cards, on what is committed."""
    shutil.copytree(REPOSITORY / "results" / "records", tmp_path / "records")
    assert main(["report", f"results={tmp_path}"]) == 0
    printed = capsys.readouterr().out.split()
    assert {str(tmp_path / name) for name in ("report.html", "claims.md", "table7_cifar10_lite.md")} <= set(printed)
    text = (tmp_path / "report.html").read_text()
    check_links(text)
    pictures = re.findall(r"data:image/png;base64,[A-Za-z0-9+/=]+", text)
    assert pictures and max(map(len, pictures)) < 400_000
    assert len(text) - sum(map(len, pictures)) < 4_000 * len(list((tmp_path / "records").glob("*.json")))
    said = (tmp_path / "claims.md").read_text()
    assert said.count("at budget lite") >= 8 and "## Where the sources contradict themselves" in said


@pytest.mark.slow
def test_five_thousand_records(tmp_path: Path, cards: dict[str, Any]) -> None:
    """In 60 s and 2 GB: loaded, tabulated, judged and rendered."""
    steps = list(range(390, 390 * 30 + 1, 390))
    for seed in range(1, 601):
        curves = {"epoch": list(range(1, 31)), "step": steps, "moving": [80 + seed % 7] * 30, "online": [79.5] * 30}
        for key in ("bn_stat2", "bn_stat128", "kn_stat2"):
            of = config_of(cards, key)
            write_record(tmp_path, of, seed, 80 + seed % 7 + 0.1, 79, numerics=NUMERICS, curves=curves)
        for rate in range(5):  # rows that are in no table, and budgets of their own
            schedule = {**of["schedule"], "weight_decay": rate * 1e-3 + seed % 40 * 1e-5}
            write_record(tmp_path, {**of, "norm": {**of["norm"], "name": "x"}, "schedule": schedule}, seed,
                         numerics=NUMERICS, curves=curves)  # fmt: skip
        if seed <= 200:
            write_record(tmp_path, config_of(cards, "kn_stat2", "smoke"), seed, numerics=NUMERICS, curves=curves)
    code = f"""
from pathlib import Path
from kalmannorm import report
out = Path({str(tmp_path)!r})
found = report.records(out, {NUMERICS})
assert len(found.current) == 5000, len(found.current)
report.write_all(found, out)
# Not ru_maxrss, which a process inherits from the one that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of one core: other processes on the machine do not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    assert int(done.stdout) < 2_000_000  # kB
    assert "collapsed" not in done.stderr  # a caption that leaves its picture no room
    page = (tmp_path / "report.html").read_text()
    check_links(page)
    assert len(page) < 6_000_000 and page.count("<polyline") < 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "table7", "seeds="], "at least one seed"),
        (["report", "figure5", "dataset=digits", "rows=kn_stat2"], "compares two rows"),
        (["report", "table3", "rows=bn"], "compares two rows"),
        (["report", "v1-table3", "arch.width=0.25"], "the rows of v1-table3 differ in it"),
        (["sweep", "table7", "norm=gn"], "the rows of table7 differ in it"),
        (["sweep", "table7", "batch=g128_s4"], "the rows of table7 differ in it"),
        (["sweep", "table7", "seed=7"], "seeds=4,"),
        (["sweep", "table7", "data=/nowhere"], "data set 'cifar10' is not there"),
        (["train", "dataset=digits", "results=/dev/null"], "cannot write to /dev/null/records"),
        (["report", "results=/nowhere"], "is no folder"),
        (["report", "results="], "expected a folder"),
        (["records", "list", "nrm=bn"], "no record has a setting nrm"),
        (["records", "list", "norm=bnk"], "did you mean 'bn'"),
        (["records", "list", "results=/nowhere", "status=bad"], "unknown status 'bad'"),
        (["data", "prepare", "imagenet"], "image-net.org"),
        (["data", "prepare", "image_folder"], "train/CLASS/"),
        (["evaluate", "/somewhere"], "whose id begins with '/somewhere'"),
        (["records", "list", "seed=[1"], "is no value"),
    ],
)
def test_wrong_arguments_end_in_a_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
