"""The papers' tables: what is trained and what is not trained again, what they show, README.md and the page."""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from scripts import environment

from bench import judges, report, tables
from bench.__main__ import main
from bench.cases import CASES, COLUMNS, JUDGED, TABLES, Run, flags, judges_of, kinds_of, planned, same

ROOT = Path(__file__).parent.parent


def result(case="pix2pix", seed=0, data="toy", **metrics):
    """What a run leaves, with metrics that real images get 0.99 in."""
    metrics = {
        name: {"value": value, "real": 0.99, "n_samples": 100, "n_real": 100, "features": "a judge"}
        for name, value in metrics.items()
    }
    points = [{"step": step, **{name: metric["value"] for name, metric in metrics.items()}} for step in (100, 1800)]
    log = [
        {"step": step, "epoch": 1, "loss_D": 0.5, "loss_G": 1.0 / step, "images_per_s": 50.0} for step in (1, 900, 1800)
    ]
    return {
        **{"case": case, "data": data, "seed": seed, "script": f"{case.partition('-')[0]}.py", "flags": []},
        **{"code": "0", "steps": 1800, "seconds": 120.0, "images_per_s": 50.0, "peak_memory": 2**30},
        **{"device_name": "a CPU", "versions": {"torch": "2.14.1"}, "settings": {"size": 64}, "metrics": metrics},
        **{"curve": points, "log": log},
    }


def cells(text):
    """{label of a row: its cells} of a table in Markdown."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


# -- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_flags_are_the_scripts(case):
    """The script takes them, on the toy set and on one of the papers'."""
    paper = {"pix2pix": "cityscapes", "cyclegan": "cityscapes", "text2img": "birds"}
    script = case.partition("-")[0]
    for data in ("toy", paper.get(script, "mnist")):
        if data == "toy" and CASES[case].on == "real":
            assert not judges_of(case, data)
            continue
        args = importlib.import_module(script).get_args(["--data", data, *flags(case, data)])
        assert args.data == data


def test_tables_are_made_of_cases():
    """Each row names a case, each column has a heading, a paper's row is no longer than the columns."""
    for table in TABLES.values():
        assert set(table.columns) <= COLUMNS.keys()
        for _, case, paper in table.rows:
            assert case in CASES and len(paper) <= len(table.columns)
            assert (ROOT / f"{case.partition('-')[0]}.py").exists()
    assert {judge for case in CASES.values() for judge in case.judges} == JUDGED.keys() == judges.JUDGES.keys()


def test_equal_cases_are_trained_once():
    """A patch of 34 pixels is the default on the toy set, one of 70 elsewhere; CycleGAN's 128 pixels are its own."""
    assert same("pix2pix-34", "toy") == same("pix2pix-70", "cityscapes") == "pix2pix"
    assert same("pix2pix-70", "toy") == "pix2pix-70" and same("pix2pix-34", "cityscapes") == "pix2pix-34"
    assert same("pix2pix-small", "toy") == "pix2pix" and same("pix2pix-small", "cityscapes") == "pix2pix-small"
    assert same("pix2pix-286", "cityscapes") == "pix2pix-286" and not judges_of("pix2pix-286", "toy")


def test_all_cases_before_the_next_seed():
    """So an interrupted table has all rows of the seeds that are done; what two tables share is there once."""
    runs = planned(["losses", "generators"], ["toy"], 2)
    assert len(runs) == len(set(runs)) == 14 and [run.seed for run in runs] == [0] * 7 + [1] * 7
    assert {run.case for run in planned([*TABLES], ["cifar10"], 1)} == {"dcgan"}
    assert planned(["losses"], ["mnist"], 1) == [] and kinds_of("losses") == {"toy", "pairs"}


# -- tables ----------------------------------------------------------------------------------------------------------


def test_spread_by_hand():
    """The mean, and the deviation over N - 1; of one number no deviation, of none nothing."""
    assert report.spread([0.1, 0.2, 0.6], ".2f") == "0.30 ± 0.26"  # squares .04 + .01 + .09 = .14; / 2 = .07
    assert report.spread([0.123], ".2f") == "0.12" and report.spread([], ".2f") == ""


def test_table_by_hand():
    """Ours and the paper's side by side, real images on top, empty cells where nothing was measured."""
    some = [result("pix2pix-l1", seed, photo_pixel=0.4 + 0.1 * seed, photo_iou=0.25) for seed in range(3)]
    some += [result("pix2pix", 0, photo_pixel=0.7, photo_iou=0.5), result("pix2pix", 0, "mnist", photo_pixel=0.0)]
    text = report.markdown("losses", "toy", some)
    rows = cells(text)
    assert rows[""] == ["pixel accuracy", "paper", "class IoU", "paper", "seeds"]  # nobody measured class accuracy
    assert rows["real images"] == ["0.99", "0.80", "0.99", "0.21", ""]
    assert rows["L1"] == ["0.50 ± 0.10", "0.42", "0.25 ± 0.00", "0.11", "3"]
    assert rows["GAN"] == ["", "0.22", "", "0.01", ""]
    assert rows["L1+cGAN"] == ["0.70", "0.66", "0.50", "0.17", "1"]
    assert [line for line in rows if line not in ("", "-----------")][0] == "real images"
    for said in ("toy, 64 pixels", "1,800 updates", "100 images", "a judge", "a CPU", "Isola et al. 2017, Table 1"):
        assert said in text


def test_speed_and_memory_are_columns():
    rows = cells(report.markdown("methods", "toy", [result(photo_iou=0.5)]))
    assert rows["pix2pix"] == ["0.50", "50", "2.0", "1024", "1"] and rows["GAN"] == [""] * 5


def test_few_images_for_fid():
    """Below 2,048 images there is a warning, and KID stands first."""
    few, many = ([result("dcgan", 0, kid=1.0, fid=2.0)] for _ in range(2))
    many[0]["metrics"]["fid"] |= {"n_samples": 10000, "n_real": 2048}
    assert "100 images, fewer than 2,048" in report.markdown("variants", "toy", few)
    assert "fewer" not in report.markdown("variants", "toy", many)
    head = cells(report.markdown("variants", "toy", few))[""]
    assert head.index("KID") < head.index("FID")


# -- README.md and the page ------------------------------------------------------------------------------------------


def test_readme_is_up_to_date():
    """What stands between the markers is made from the results beside: `python -m bench report` does it."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert report.fill_readme(text, report.read_results(ROOT / "bench" / "results")[0]) == text


def test_markers_are_filled():
    """The text around stays, and filling twice is filling once."""
    text = "before\n<!-- bench:losses toy -->\nold\n<!-- /bench -->\nafter\n"
    once = report.fill_readme(text, [result(photo_iou=0.5)])
    assert once.startswith("before\n<!-- bench:losses toy -->\n**pix2pix") and once.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in once and report.fill_readme(once, [result(photo_iou=0.5)]) == once


@pytest.mark.parametrize("marker", ["<!-- bench:nonsense toy -->", "<!-- bench:losses mnist -->"])
def test_markers_that_cannot_be_filled(marker):
    with pytest.raises(SystemExit, match=marker.split(":")[1].partition(" -->")[0]):
        report.fill_readme(f"{marker}\n<!-- /bench -->\n", [result(photo_iou=0.5)])
    with pytest.raises(SystemExit, match="/bench"):
        report.fill_readme("<!-- bench:losses toy -->\n", [result(photo_iou=0.5)])


class Page(HTMLParser):
    """Notes what is open, what a page asks of others, and its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.outside, self.pictures, self.text = [], [], 0, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        asked = [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href", "data")]
        self.outside += [value for value in asked if not value.startswith(("data:image/png;base64,", "#"))]
        self.outside += [tag] if tag in ("script", "link", "iframe") else []
        self.pictures += tag == "img"
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page(tmp_path, capsys):
    """Well-formed, one file, with the numbers, the samples and the curves; what a label holds is text."""
    found = [result("pix2pix-l1", photo_iou=0.25), result("pix2pix", photo_iou=0.5)]
    found[0]["flags"] = ["<script>"]
    for each in found:
        tables.write_json(tmp_path / "results" / f"{each['case']}-toy-0.json", each)
        Image.new("RGB", (9, 9), "teal").save(tmp_path / "results" / f"{each['case']}-toy-0.png")
    main(["report", "--results", str(tmp_path / "results"), "--to", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert not page.open and not page.outside and "url(" not in text and "@import" not in text
    assert page.pictures >= 2 and text.count("<polyline") >= 4
    assert "0.25" in page.text and "pix2pix.py --data toy <script>" in page.text
    assert not (tmp_path / "README.md").exists() and "page.html" in capsys.readouterr().out


def test_report_without_results(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["report", "--results", str(tmp_path)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1 and str(tmp_path) in said


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(monkeypatch):
    """Runs that the photo judge was asked about; it finds an IoU of .25."""
    asked = []

    def judge(run, args):
        asked.append(run.name)
        assert len([*(args.runs / run.name / "test").glob("*.png")]) == 100
        return {"photo_iou": {"value": 0.25, "real": 0.9, "n_samples": 100, "n_real": 100, "features": "none"}}

    monkeypatch.setitem(judges.JUDGES, "photos", (judge, judges.JUDGES["photos"][1]))
    return asked


@pytest.fixture
def one(monkeypatch):
    """A table with one row."""
    table = TABLES["losses"]
    monkeypatch.setitem(TABLES, "losses", table._replace(rows=table.rows[:1]))


def tables_of(*given):
    main(["tables", "losses", "--seeds", "1", "--runs", "runs", *given])


def test_one_case_from_end_to_end(judged, one, monkeypatch, capsys):
    """Trained in a child process, judged, put down; not done again; gone on with; begun anew if its code is new."""
    tables_of("--max-steps", "2")
    found = json.loads(Path("runs/results/pix2pix-l1-toy-0.json").read_text())
    assert "0.25" in cells(capsys.readouterr().out)["L1"] and judged == ["pix2pix-l1-toy-0"]
    assert found["steps"] == 2 and found["seed"] == 0 and found["settings"]["loss"] == "l1" and found["seconds"] > 0
    assert found["metrics"]["photo_iou"]["n_real"] == 100 and found["peak_memory"] > 2**27 and found["images_per_s"] > 0
    assert found.keys() >= {"commit", "clean", "device_name", "versions", "code"} and found["flags"] == ["--loss", "l1"]
    assert Image.open("runs/results/pix2pix-l1-toy-0.png").width <= 480

    with monkeypatch.context() as none:
        none.setattr(tables, "start", lambda run, args: pytest.fail("it trained again"))
        tables_of("--max-steps", "2")
    assert len(judged) == 1

    tables_of("--max-steps", "3")  # goes on from update 2
    steps = [json.loads(line)["step"] for line in Path("runs/pix2pix-l1-toy-0/log.jsonl").read_text().splitlines()]
    again = json.loads(Path("runs/results/pix2pix-l1-toy-0.json").read_text())
    assert steps == [1, 2, 3] and again["steps"] == 3 and again["seconds"] > found["seconds"]
    assert not Path("runs/pix2pix-l1-toy-0.old-1").exists()

    monkeypatch.setattr(tables, "fingerprint", lambda path: "new")
    tables_of("--max-steps", "3")
    assert Path("runs/pix2pix-l1-toy-0.old-1/last.pt").exists() and Path("runs/pix2pix-l1-toy-0/last.pt").exists()
    assert json.loads(Path("runs/results/pix2pix-l1-toy-0.json").read_text())["code"] == "new"


def settings(**more):
    """What `tables` has read from its command line."""
    given = dict(runs=Path("runs"), results=Path("results"), max_steps=None, count=10, curve=False, flags="")
    return argparse.Namespace(**given | more)


@pytest.mark.parametrize("change", [{}, {"code": "other"}, {"flags": ["--lr", "1"]}, {"max_steps": 2}, {"judges": {}}])
def test_what_is_done(change):
    """A result counts if code, flags, updates and judges are those of today."""
    run, args = Run("pix2pix-l1", "toy", 0), settings()
    assert not tables.is_done(run, args)
    tables.write_json(
        Path("results/pix2pix-l1-toy-0.json"), tables.begun_as(run, args) | tables.judged_as(run, args) | change
    )
    assert tables.is_done(run, args) == (not change)
    assert not tables.is_done(run, settings(flags="--ngf 8"))


def test_flags_are_the_last_ones():
    """--flags go to every run, behind those of its case, so that they have the last word."""
    begun = tables.begun_as(Run("pix2pix-l1", "toy", 0), settings(flags="--size 32 --run 'a b'"))
    assert begun["flags"] == ["--loss", "l1", "--size", "32", "--run", "a b"]


def test_some_cases(monkeypatch, capsys):
    """--cases leaves the other rows out, and takes only cases that there are."""
    trained = []
    monkeypatch.setattr(tables, "train_all", lambda runs, args: trained.extend(runs) or [])
    tables_of("--seeds", "2", "--cases", "pix2pix", "pix2pix-gan")
    assert trained == [Run(case, "toy", seed) for seed in (0, 1) for case in ("pix2pix-gan", "pix2pix")]
    with pytest.raises(SystemExit) as end:
        tables_of("--cases", "pix2pix-l2")
    assert end.value.code == 2 and "--cases pix2pix-l2 is no case" in capsys.readouterr().err


def test_fingerprint_is_of_what_runs(tmp_path):
    """Comments, docstrings and line breaks change nothing, code does."""
    texts = ['"""Doc."""\nx = f(1,\n  2)  # why\n', '"""Other."""\n\nx = f(1, 2)\n', '"""Doc."""\nx = f(1, 3)\n']
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.py").write_text(text)
    first, second, third = (tables.fingerprint(tmp_path / f"{i}.py") for i in range(3))
    assert first == second != third


def test_curve_stops():
    """After 100, 200, 400 updates, what is judged already left out, up to the end of the run."""
    args = settings(curve=True, max_steps=300)
    assert tables.next_stop(args, 0, []) == 100 and tables.next_stop(args, 100, []) == 100
    assert tables.next_stop(args, 100, [100]) == 200 and tables.next_stop(args, 250, [100]) == 300
    assert tables.next_stop(settings(), 0, []) is None and tables.next_stop(settings(max_steps=7), 5, []) == 7


def test_a_failure_leaves_the_others(judged, monkeypatch, capsys):
    """Its sentence is passed on, its cells stay empty, the status is 2."""
    table = TABLES["losses"]
    monkeypatch.setitem(TABLES, "losses", table._replace(rows=table.rows[:2]))
    monkeypatch.setitem(CASES, "pix2pix-l1", CASES["pix2pix-l1"]._replace(flags="--loss l1 --lr -1"))
    with pytest.raises(SystemExit) as end:
        tables_of("--max-steps", "1")
    said = capsys.readouterr()
    assert end.value.code == 2 and "pix2pix.py: --lr -1.0" in said.err and "1 of 2 runs failed" in said.err
    rows = cells(said.out)
    assert rows["L1"][0] == "" and rows["GAN"][0] == "0.25" and judged == ["pix2pix-gan-toy-0"]


@pytest.mark.skipif(os.name == "nt", reason="there is no such signal")
def test_interruption(tmp_path):
    """SIGTERM goes on to the run, which saves; the same command goes on from there."""
    command = [sys.executable, "-m", "bench", "tables", "losses", "--seeds", "1", "--jobs", "1", "--runs", tmp_path]
    child = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    log, limit = tmp_path / "pix2pix-l1-toy-0" / "log.jsonl", time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and child.poll() is None and time.monotonic() < limit:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 143
    rows, note = tables.log_of(log.parent), json.loads((tmp_path / "pix2pix-l1-toy-0.json").read_text())
    assert (log.parent / "last.pt").exists() and note["steps"] == rows[-1]["step"] > 0 and note["seconds"] > 0


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("tables nonsense", "nonsense"),
        ("tables losses --data nonsense", "nonsense"),
        ("tables losses --data mnist", "pairs"),
        ("tables --seeds 0", "--seeds 0"),
        ("tables --device nonsense", "nonsense"),
        ("tables --jobs 0", "--jobs 0"),
        ("report --readme missing.md --results results", "missing.md"),
    ],
)
def test_bad_arguments(given, named, capsys):
    """One sentence that names what is wrong, and exit status 2."""
    tables.write_json(Path("results/pix2pix-toy-0.json"), result(photo_iou=0.5))
    with pytest.raises(SystemExit) as end:
        main(given.split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1 and named in said


def test_damaged_result(capsys):
    Path("results").mkdir()
    Path("results/pix2pix-toy-0.json").write_text("{")
    with pytest.raises(SystemExit):
        main(["report", "--results", "results"])
    assert "pix2pix-toy-0.json is damaged" in capsys.readouterr().err


def test_no_command_is_the_suite(monkeypatch):
    """`python -m bench` makes the table of every method, once."""
    seen = []
    monkeypatch.setattr(tables, "run", seen.append)
    main([])
    main(["--max-steps", "5"])
    assert [(args.names, args.seeds, args.max_steps) for args in seen] == [(["methods"], 1, None), (["methods"], 1, 5)]
    scripts = {case.partition("-")[0] for _, case, _ in TABLES["methods"].rows}
    assert scripts == {"pix2pix", "cyclegan", "gan", "dcgan", "cgan", "text2img"}
