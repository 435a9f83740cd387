"""Methods compared as folders of images or as runs, and the study that asks people."""

import html
import json
import os
import re
import shutil
import subprocess
import urllib.parse
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gan
from bench import compare, fcn, fid, study
from bench.__main__ import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write_digits(folder, count, seed, suffix="png", size=28):
    """Toy digits as grey images."""
    folder.mkdir(parents=True)
    for i, image in enumerate(gan.digits(count, seed, size)[0]):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:03}.{suffix}")


def rows_of(*flags):
    main(["compare", *map(str, flags), "--device", "cpu", "--out", "out"])
    return json.loads(Path("out", "compare.json").read_text())["rows"]


TOY = ("--features", "toy")


def test_folders(tmp_path, capsys):
    """A row a method, in a table, a JSON and a page that needs nothing from elsewhere."""
    write_digits(tmp_path / "real", 60, 0)
    write_digits(tmp_path / "near", 50, 1, "webp")
    write_digits(tmp_path / "far", 40, 2, "jpg", 14)
    with pytest.raises(SystemExit, match=r"far/000.jpg has 14x14 pixels.*--resize"):
        rows_of("--real", "real", "--samples", "ours=near", "theirs=far", *TOY)
    near, far = rows_of("--real", "real", "--samples", "ours=near", "theirs=far", "--resize", 28, *TOY)
    lines = capsys.readouterr().out.splitlines()
    assert near["kid"] < far["kid"]
    assert (near["n_samples"], near["n_real"], far["n_samples"]) == (50, 60, 40)
    assert lines[3].split()[2:7] == ["KID", "|", "±", "|", "FID"] and "FID rests on 40 images" in lines[0]
    assert [line.split()[1] for line in lines[5:7]] == ["ours", "theirs"]
    assert all(near["weights"] in line for line in lines[5:7])
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3 and "http" not in page and near["weights"] in page


def test_runs_stand_for_what_they_made(tmp_path, monkeypatch, capsys):
    """Of pix2pix.py its translations, of the others what they have drawn, or what they draw now."""
    write_digits(tmp_path / "real", 5, 0)
    for script, made in (("pix2pix", "test"), ("dcgan", "sampled"), ("gan", None), ("cyclegan", "test")):
        (tmp_path / script).mkdir()
        torch.save({"script": script}, tmp_path / script / "last.pt")
        if made:
            write_digits(tmp_path / script / made, 4, 1)
    asked = []

    def run_script(*given):
        asked.append(given)
        write_digits(tmp_path / "gan" / "sampled", 5, 2)

    monkeypatch.setattr(compare, "run_script", run_script)
    os.utime(tmp_path / "dcgan" / "sampled", (0, 0))
    rows = rows_of("--real", "real", "--samples", "a=pix2pix", "b=dcgan", "c=gan", *TOY)
    assert "dcgan/sampled was drawn before dcgan/last.pt was written" in capsys.readouterr().out
    assert [(row["name"], row["n_samples"]) for row in rows] == [("a", 4), ("b", 4), ("c", 5)]
    assert asked == [("gan.py", Path("gan"), "--sample", 5)]
    with pytest.raises(SystemExit, match="cyclegan/test/AtoB"):
        rows_of("--real", "real", "--samples", "a=cyclegan", *TOY)
    with pytest.raises(SystemExit, match="a name of its own"):
        rows_of("--real", "real", "--samples", "a=gan", "a=dcgan", *TOY)


def test_fcn_score_by_halves(tmp_path, monkeypatch):
    """No network judges a scene that it learned from; real photos have a row; ids are named as the images."""
    rng = np.random.default_rng(0)
    colours, places = np.array([(200, 30, 30), (30, 200, 30)], np.uint8), ("real", "good", "grey", "ids")
    for place in places:
        (tmp_path / place).mkdir()
    for i in range(6):
        ids = rng.integers(0, 2, (4, 4)).repeat(8, 0).repeat(8, 1)
        for place, image in zip(places, (colours[ids], colours[ids], 60 * ids, ids)):
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / place / f"{i}.png")
    learned = []

    def find_segmenter(scenes, shape, *rest):
        learned.append(scenes.names)
        look = partial(fcn.see, lambda x: torch.stack([x[:, 0], x[:, 1]], 1), shape, "cpu")  # red or green
        return look, "", f"net{len(learned)}"

    monkeypatch.setattr(fcn, "find_segmenter", find_segmenter)
    monkeypatch.setattr(fid, "measure", lambda *given: [{"n_samples": 6}] * 2)
    judged, count = [], fcn.count
    monkeypatch.setattr(fcn, "count", lambda scenes, *rest: judged.append(scenes.names) or count(scenes, *rest))
    good, grey, real = rows_of("--real", "real", "--samples", "good=good", "grey=grey", "--classes", "ids")
    assert learned == [["0", "2", "4"], ["1", "3", "5"]] and judged == [learned[1]] * 3 + [learned[0]] * 3
    assert good["class_iou"] == real["class_iou"] == 1 and real["name"] == "real"
    assert good["scorers"] == real["scorers"] == "net1 net2"
    assert grey["class_accuracy"] == 0.5  # all is the first class
    (tmp_path / "grey" / "3.png").unlink()
    with pytest.raises(SystemExit, match="--classes ids has 3, but grey has no image of that name"):
        rows_of("--real", "real", "--samples", "good=good", "grey=grey", "--classes", "ids")


# -- the study -------------------------------------------------------------------------------------------------------


def write_study(folder):
    """The page of 50 pairs, and its real images as they stand in it."""
    for name, colour in (("real", 200), ("fake", 100)):
        (folder / name).mkdir()
        for i in range(50):
            Image.new("RGB", (8, 8), (colour, i, 0)).save(folder / name / f"{i}.png")
    main("study --real real --fake fake --method ours --out page.html".split() + ["--study", "map to photo"])
    page = (folder / "page.html").read_text()
    return page, [pair[0] for pair in json.loads(re.search(r'"pairs": (\[\[.*?\]\])', page)[1])]


def result(fooled, trials):
    """What the page saves."""
    answers = [i < fooled for i in range(trials)]
    share, low, high = study.share_fooled(answers)
    numbers = {"trials": trials, "fooled": fooled, "share": share, "low": low, "high": high, "answers": answers}
    return {"measure": "study", "study": "map to photo", "method": "ours", **numbers}


@pytest.mark.parametrize(("fooled", "trials"), [(0, 40), (7, 40), (40, 40), (189, 1000)])
def test_interval_by_hand(fooled, trials):
    """Its ends are the shares p from which what was seen is 1.96 standard errors away: roots of a quadratic."""
    share, z = fooled / trials, 1.959963984540054
    roots = np.roots([1 + z**2 / trials, -2 * share - z**2 / trials, share**2])
    assert study.share_fooled([1] * fooled + [0] * (trials - fooled)) == pytest.approx((share, *sorted(roots)))


def test_results(tmp_path, capsys):
    """Those of several people are printed one by one and together; numbers that are not of the answers are refused."""
    for name, fooled in (("anna", 4), ("ben", 12)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(fooled, 40)))
    main("study --results anna.json ben.json".split())
    assert "anna.json: 4 of 40, 10.0 % " in (said := capsys.readouterr().out).replace("%", " %")
    assert "all together: 16 of 80, 20.0%" in said
    for change in ({"share": 0.5}, {"fooled": 5}, {"high": 0.1}, {"answers": []}, {"answers": None}):
        (tmp_path / "anna.json").write_text(json.dumps(result(4, 40) | change))
        with pytest.raises(SystemExit, match="--results anna.json"):
            main("study --results anna.json".split())


def test_pairs(tmp_path, capsys):
    """Images of one name are partners; there must be fifty; the page has them all."""
    page, real = write_study(tmp_path)
    assert len({*real}) == 50 and page.count("data:image/png;base64,") == 100 and "http" not in page
    for file in sorted((tmp_path / "fake").iterdir())[:7]:
        file.rename(file.with_stem(f"{file.stem}-fake"))
    main("study --real real --fake fake --out page.html".split())
    assert "at random" in capsys.readouterr().out
    (tmp_path / "real" / "0.png").unlink()
    for flags, named in (("--real real --fake fake", "49 pairs"), ("--real real", "--fake"), ("", "--results")):
        with pytest.raises(SystemExit, match=named):
            main(["study", *flags.split()])


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_page_in_a_browser(tmp_path):
    """Someone is fooled in every third pair: the page counts the last forty, and saves what Python makes of them."""
    page, real = write_study(tmp_path)
    someone = """<script>
    const real = %s, seen = new Set(), times = [];
    let left = null, shown = 0, pairs = 0;
    document.getElementById("start").click();
    setInterval(() => {
      const images = document.querySelectorAll("#pair img"), buttons = document.querySelectorAll("#buttons button");
      if (images.length && !shown) [left, shown] = [images[0].src, Date.now()];
      if (!images.length && shown && buttons.length) {
        times.push(Date.now() - shown);
        const fooled = pairs++ %% 3 === 0, leftIsReal = real.includes(left);
        shown = 0;
        buttons[fooled === leftIsReal ? 0 : 1].click();
        document.body.dataset.times = Math.min(...times) + " " + Math.max(...times) + " " + pairs;
      }
    }, 10);
    </script></body>"""
    (tmp_path / "driven.html").write_text(page.replace("</body>", someone % json.dumps(real)))
    flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --virtual-time-budget=900000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", tmp_path / "driven.html"]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    saved = json.loads(urllib.parse.unquote(html.unescape(re.search(r'href="data:application/json,([^"]*)"', seen)[1])))
    answers = [i % 3 == 0 for i in range(10, 50)]
    share, low, high = study.share_fooled(answers)
    numbers = [saved.pop(name) for name in ("share", "low", "high")]
    assert numbers == pytest.approx([share, low, high], abs=1e-12)
    about = {"measure": "study", "study": "map to photo", "method": "ours"}
    assert saved == about | {"trials": 40, "fooled": 13, "answers": answers}
    least, most, pairs = map(int, re.search(r'data-times="(\d+) (\d+) (\d+)"', seen).groups())
    assert 950 <= least <= most <= 1100 and pairs == 50
