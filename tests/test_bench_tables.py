"""The papers' tables: what is trained and what is not trained again, what the tables say, README.md and the page."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from bench import columns, report, speed, tables, vae
from bench.__main__ import main

ROOT = Path(__file__).parent.parent
SCRIPT = """  # stands for pix2pix.py: ten updates, saved on SIGTERM; --loss gan fails, --loss cgan waits in the sixth
import json, signal, sys, time
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run = Path(given["--out"])
(run / "samples").mkdir(parents=True, exist_ok=True)
if given.get("--loss") == "gan":
    sys.exit("pix2pix.py: no such loss")
settings = {"batch_size": 4, "k": 5, "precision": "fp32", "loss": given.get("--loss")}
(run / "config.json").write_text(json.dumps(settings))
first = int((run / "last.pt").read_text()) if (run / "last.pt").exists() else 0
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
for step in range(first + 1, 11):
    if given.get("--loss") == "cgan" and step == 6 and not first:
        time.sleep(60)
    with open(run / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": step, "epoch": 1, "loss_G": 1 / step, "images_per_s": 1.0}) + "\\n")
    (run / "last.pt").write_text(str(step))
if first < 10:
    from PIL import Image
    Image.new("RGB", (900, 9), "teal").save(run / "samples" / "0000010.png")
"""


def result(case="pix2pix", seed=0, data="toy", **metrics):
    """What a run leaves, with metrics that real images get 0.99 in."""
    judged = {"real": 0.99, "n_samples": 100, "n_real": 200, "features": "a judge"}
    given = {name: value if isinstance(value, dict) else {"value": value} for name, value in metrics.items()}
    return {
        **{"case": case, "data": data, "seed": seed, "script": f"{case.partition('-')[0]}.py", "flags": []},
        **{"steps": 1800, "seconds": 120.0, "peak_memory": 2**30, "commit": "abcdef0123", "clean": True},
        **{"device_name": "a CPU", "versions": {"torch": "2.14.1"}, "settings": {"batch_size": 4}},
        "metrics": {name: judged | metric for name, metric in given.items()},
        "log": [{"step": step, "epoch": 1, "loss_G": 1.0 / step, "images_per_s": 50.0} for step in (1, 900, 1800)],
    }


def table(name, results):
    """{label of a row: its cells} of a table in Markdown, and its note."""
    text = tables.make(name, "toy", results)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {label: texts for label, *texts in rows}, text.splitlines()[-1]


@pytest.mark.parametrize("row", tables.ROWS, ids=lambda row: f"{row.table}-{row.name}")
def test_rows(row):
    """The script takes the flags, rows of one name are one run, the paper's numbers have columns."""
    same = [other for other in tables.ROWS if other.name == row.name]
    assert {(other.flags, other.judges) for other in same} == {(row.flags, row.judges)}
    assert len(row.paper) <= len(tables.TABLES[row.table][1].split())
    if row.name != "vae":
        script = importlib.import_module(row.name.partition("-")[0])
        data = "toy" if "toy" in row.data else {"pix2pix": "pairs"}.get(script.__name__, "mnist")
        Path("pairs").mkdir()
        assert script.get_args(["--data", data, *row.flags.split()]).data.endswith(data)


def test_all_rows_before_the_next_seed(tmp_path):
    """What two tables share is trained once; on real pairs A is the photo, on toy data the labels."""
    runs = tables.plan(["losses", "generators", "labels"], ["toy"], 2, "--size 32")
    assert len(runs) == len({run.name for run in runs}) == 20 and [run.seed for run in runs] == [0] * 10 + [1] * 10
    assert runs[0].name == "pix2pix-l1-toy-0" and runs[0].script == "pix2pix.py" and runs[0].judges == ["photos"]
    assert runs[0].flags == ["--direction", "AtoB", "--loss", "l1", "--size", "32"]
    directions = {run.name: run.flags[1] for run in tables.plan(["losses", "labels"], [str(tmp_path)], 1, "")}
    pairs = tmp_path.name
    assert directions[f"pix2pix-{pairs}-0"] == "BtoA" and directions[f"pix2pix-labels-{pairs}-0"] == "AtoB"
    assert tables.plan(["losses"], ["mnist"], 1, "") == []
    names = [run.name for run in tables.plan(["methods"], ["mnist"], 1, "")]
    assert names == ["dcgan-mnist-0", "cgan-mnist-0", "gan-mnist-0", "vae-mnist-0"]


def test_table_by_hand():
    """Ours and the paper's side by side, real images on top; what nobody measured is left out.

    Of .4, .5 and .6 the squares from the mean are .01 + .01; half of them is .1 squared.
    """
    some = [result("pix2pix-l1", seed, photo_pixel=0.4 + 0.1 * seed, photo_iou=0.25) for seed in range(3)]
    some += [result("pix2pix", photo_pixel=0.7, photo_iou={"value": 0.5, "error": 0.03})]
    some += [result("pix2pix", data="mnist", photo_pixel=0.0)]
    rows, note = table("losses", some)
    assert rows[""] == ["photo pixel", "paper", "photo IoU", "paper", "seeds"]  # nobody measured class accuracy
    assert rows["real images"] == ["0.99", "0.80", "0.99", "0.21", ""] and [*rows][2] == "real images"
    assert rows["L1"] == ["0.50 ± 0.10", "0.42", "0.25 ± 0.00", "0.11", "3"]
    assert "GAN" not in rows  # no run
    assert rows["L1+cGAN"] == ["0.70", "0.66", "0.50 ± 0.03", "0.17", "1"]
    for said in ("1,800 updates", "100 images, 200 real", "a judge", "a CPU", "abcdef0", "Isola et al. 2017, Table 1"):
        assert said in note
    assert "with changes" in table("losses", [result(photo_iou=0.5) | {"clean": False}])[1]


def test_speed_and_memory():
    """Images of the data per second count those of all k updates of D."""
    wgan = result("dcgan", kid=0.1) | {"settings": {"batch_size": 4, "k": 5}}
    rows, _ = table("methods", [result(photo_iou=0.5), wgan])
    assert rows["pix2pix"] == ["0.50", "", "60", "2.0", "1,024", "1"]
    assert rows["DCGAN"] == ["", "0.100", "300", "2.0", "1,024", "1"]
    assert table("methods", [result(photo_iou=0.5) | {"peak_memory": 0}])[0][""][-2:] == ["minutes", "seeds"]


def test_few_images_for_fid():
    """Below 2,048 images there is a warning, and KID stands first."""
    for count in (2047, 2048):
        some = [result("dcgan", kid=1.0, fid={"value": 2.0, "n_samples": 10000, "n_real": count})]
        rows, note = table("variants", some)
        assert ("fewer than 2,048" in note) == (count < 2048) and rows[""][:2] == ["KID", "FID"]
    assert rows["not saturating"][-2:] == ["1,800", "1"]  # updates of G, seeds


def test_published_tables_are_up_to_date():
    """README.md between its markers and RESULTS.md hold what `python -m bench report` makes of bench/results."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "bench" / "results").glob("*.json"))]
    readme = (ROOT / "README.md").read_text("utf-8")
    assert report.fill_readme(readme, found) == readme
    assert report.results_text(found) == (ROOT / "bench" / "RESULTS.md").read_text("utf-8")


def test_markers():
    """The text around stays, filling twice is filling once; a marker that cannot be filled is named."""
    text, found = "before\n<!-- bench:losses toy -->\nold\n<!-- /bench -->\nafter\n", [result(photo_iou=0.5)]
    once = report.fill_readme(text, found)
    assert once.startswith("before\n<!-- bench:losses toy -->\n**pix2pix") and once.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in once and report.fill_readme(once, found) == once
    for wrong, named in ((text.replace("losses", "nonsense"), "nonsense"), (text.replace("toy", "mnist"), "mnist")):
        with pytest.raises(SystemExit, match=named):
            report.fill_readme(wrong, found)
    with pytest.raises(SystemExit, match="/bench"):
        report.fill_readme("<!-- bench:losses toy -->\n", found)


def test_page(tmp_path):
    """One file with the tables, samples, curves and a study beside the paper's numbers; what a label holds is text."""
    found = {"a": result("pix2pix-l1", photo_iou=0.25) | {"flags": ["<script>"]}, "b": result(photo_iou=0.5)}
    for name, fooled in (("anna", 2), ("ben", 4)):  # their answers are added up
        found[name] = {"study": "map to photo", "method": "mine", "answers": [i < fooled for i in range(20)]}
    (tmp_path / "results").mkdir()
    for name, each in found.items():
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(each))
    Image.new("RGB", (9, 9), "teal").save(tmp_path / "results" / "pix2pix-toy-0.png")
    main(["report", "--results", str(tmp_path / "results"), "--to", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == page.count('src="data:image/png;base64,') == page.count("src=") == 3
    assert "href" not in page and "<script" not in page and "pix2pix.py --data toy &lt;script&gt;" in page
    for text in ("0.25", "map to photo, mine", "15.0% (7.1% to 29.1%)", "18.9 ± 2.5 %", "2.8 ± 1.0 %"):
        assert text in page


def test_curves(tmp_path):
    """A panel for each run, with something drawn."""
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in result()["log"]))
    main(["curves", str(tmp_path), str(tmp_path / "."), "--to", "curves.png"])
    assert len(set(Image.open("curves.png").convert("RGB").get_flattened_data())) > 10


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with a stand-in for pix2pix.py, which the bench trains; the judge of photos finds an IoU of .25."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "pix2pix.py").write_text(SCRIPT)
    monkeypatch.setattr(tables, "ROOT", tmp_path / "scripts")
    judged = []

    def judge(run, folder, args):
        judged.append(run.name)
        return {"photo_iou": {"value": 0.25, "real": 0.9, "n_samples": 100, "n_real": 100, "features": "none"}}

    monkeypatch.setitem(tables.JUDGES, "photos", judge)
    monkeypatch.setattr(tables, "ROWS", [row for row in tables.ROWS if row.table == "losses"][:1])
    return judged


def bench_losses(*flags):
    main(["tables", "losses", "--seeds", "1", "--runs", "runs", *flags])
    return json.loads(Path("runs/results/pix2pix-l1-toy-0.json").read_text())


def test_one_run_from_end_to_end(lab, capsys):
    """Trained, judged, put down; not done again; judged again without its result, trained again if its code is new."""
    found = bench_losses()
    assert "0.25" in capsys.readouterr().out and lab == ["pix2pix-l1-toy-0"]
    assert found["steps"] == 10 and found["seed"] == 0 and found["settings"]["loss"] == "l1"
    assert found["precision"] == "fp32" and found["peak_memory"] > 2**22 and found["device_name"] and found["commit"]
    assert found["images_per_s"] == pytest.approx(10 * 4 * 5 / found["seconds"]) and len(found["log"]) == 10
    assert found["metrics"]["photo_iou"]["n_real"] == 100 and found["flags"][2:] == ["--loss", "l1"]
    assert Image.open("runs/results/pix2pix-l1-toy-0.png").width == 480

    assert bench_losses() == found and len(lab) == 1
    Path("runs/results/pix2pix-l1-toy-0.json").unlink()
    again = bench_losses()
    assert len(lab) == 2 and again["seconds"] == found["seconds"] and again["peak_memory"] == found["peak_memory"]

    (tables.ROOT / "pix2pix.py").write_text(SCRIPT.replace("# stands", "# comments change nothing: it stands"))
    assert bench_losses()["code"] == found["code"] and len(lab) == 2
    (tables.ROOT / "pix2pix.py").write_text(SCRIPT.replace("range(first + 1, 11)", "range(first + 1, 12)"))
    assert bench_losses()["steps"] == 11 and len(lab) == 3
    assert len([path for path in Path("runs").iterdir() if path.name.startswith("pix2pix") and path.is_dir()]) == 2


def test_a_failure_leaves_the_others(lab, monkeypatch, capsys):
    """Its sentence is passed on, its cells stay empty, the status is not 0."""
    failing = tables.Row("losses", "GAN", "pix2pix-gan", "--loss gan", "photos")
    monkeypatch.setattr(tables, "ROWS", [failing, *tables.ROWS])
    with pytest.raises(SystemExit, match="1 of 2 runs failed: pix2pix-gan-toy-0"):
        bench_losses()
    said = capsys.readouterr()
    assert "failed: pix2pix.py: no such loss" in said.err and "| 0.25 |" in said.out.replace("      ", " ")
    assert lab == ["pix2pix-l1-toy-0"] and not Path("runs/results/pix2pix-gan-toy-0.json").exists()


def test_interruption(lab, tmp_path):
    """SIGTERM goes on to the script, which saves; the same command goes on from there."""
    code = f"""
from pathlib import Path
from bench import __main__, tables
tables.ROOT = Path({str(tables.ROOT)!r})
tables.ROWS = [tables.Row("losses", "cGAN", "pix2pix-cgan", "--loss cgan", "photos")]
metric = {{"value": 0.5, "n_samples": 9, "n_real": 9, "features": "none"}}
tables.JUDGES["photos"] = lambda run, folder, args: {{"photo_iou": metric}}
__main__.main(["tables", "losses", "--seeds", "1", "--runs", "runs"])
"""
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (logs := [*Path("runs").glob("*/last.pt")]) or logs[0].read_text() != "5":
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 130
    finally:
        child.kill()
    note = json.loads(logs[0].parent.with_name(f"{logs[0].parent.name}.json").read_text())
    assert 0 < note["seconds"] < 60 and not [*Path("runs/results").glob("*")]
    assert subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=60).returncode == 0
    found = json.loads(Path("runs/results/pix2pix-cgan-toy-0.json").read_text())
    assert [row["step"] for row in found["log"]] == [*range(1, 11)] and found["seconds"] > note["seconds"]


def test_clean(tmp_path, monkeypatch):
    """New files of others don't count, changed ones do."""
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    assert speed.circumstances("cpu")["commit"] is None
    (tmp_path / "a.py").write_text("1")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init"], ["add", "a.py"], ["commit", "-m", "m"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "cache.pt").write_text("")
    assert speed.circumstances("cpu")["clean"] is True
    (tmp_path / "a.py").write_text("2")
    assert speed.circumstances("cpu")["clean"] is False


def test_vae(tmp_path):
    """It trains two updates and draws; the loss falls; the run folder has what the bench reads."""
    out = ["--out", str(tmp_path / "run")]
    vae.main([*out, "--max-steps", "2"])
    vae.main([*out, "--sample", "3", "--to", str(tmp_path / "drawn")])
    images = [Image.open(file) for file in sorted((tmp_path / "drawn").glob("*.png"))]
    assert [image.size for image in images] == [(28, 28)] * 3 and images[0] != images[1]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["precision"] == "fp32"
    (row,) = columns.read_log(tmp_path / "run")
    assert row["step"] == 2 and row["reconstruction"] > 100 and row["divergence"] >= 0


def test_no_command_is_every_method(monkeypatch):
    """`python -m bench` makes the table of every method, once."""
    seen = []
    monkeypatch.setattr(tables, "main", lambda args: seen.append((args.tables, args.seeds, args.device)))
    main([])
    main(["--device", "cpu"])
    assert seen == [(["methods"], 1, None), (["methods"], 1, "cpu")]
    assert {row.name for row in tables.rows_of("methods", "toy")} == {"vae", *(path.stem for path in ROOT.glob("*.py"))}
