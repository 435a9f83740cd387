"""Methods compared by KID, FID, precision, recall and FCN-score, and the study that asks people."""

import html
import json
import os
import pickle
import re
import shutil
import subprocess
import urllib.parse
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models import squeezenet1_0

import gan
from bench import common, compare, digits, fcn, fid, study
from bench.__main__ import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOY = ("--features", "toy")


def write_all(folder, images, suffix="png"):
    """A file for each of uint8 images (N, C, H, W)."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.movedim(0, 2).squeeze().numpy()).save(folder / f"{i:03}.{suffix}")


def rows_of(*flags):
    """The rows of the comparison."""
    main(["compare", *map(str, flags), "--device", "cpu", "--out", "out"])
    return json.loads(Path("out", "compare.json").read_text())["rows"]


# -- the command -----------------------------------------------------------------------------------------------------


def test_folders(tmp_path, capsys):
    """A row a method, in a table, a JSON and a page that needs nothing from elsewhere."""
    write_all(tmp_path / "real", gan.digits(60, 0)[0])
    write_all(tmp_path / "near", gan.digits(50, 1)[0], "webp")
    write_all(tmp_path / "far", gan.digits(40, 2, 14)[0], "jpg")
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
    write_all(tmp_path / "real", gan.digits(5, 0)[0])
    for script, made in (("pix2pix", "test"), ("dcgan", "sampled"), ("gan", None), ("cyclegan", "test")):
        (tmp_path / script).mkdir()
        torch.save({"script": script}, tmp_path / script / "last.pt")
        if made:
            write_all(tmp_path / script / made, gan.digits(4, 1)[0])
    asked = []

    def run_script(*given):
        asked.append(given)
        write_all(tmp_path / "gan" / "sampled", gan.digits(5, 2)[0])

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


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_precision_and_recall_by_hand():
    """Precision is of samples, recall of real images; a ball reaches to the third neighbour."""
    rng = np.random.default_rng(0)
    samples, real = (rng.integers(0, most, (count, 2)).astype(float) for most, count in ((90, 25), (200, 40)))

    def covered(points, centres):
        away = np.sqrt(((centres[:, None] - centres) ** 2).sum(2))
        reach = np.sort(away, 1)[:, 3]  # the first is itself
        return (np.sqrt(((points[:, None] - centres) ** 2).sum(2)) <= reach).any(1).mean()

    found = fid.compare(torch.from_numpy(samples), torch.from_numpy(real))
    assert found["precision"] == pytest.approx(covered(samples, real), abs=1e-6)
    assert found["recall"] == pytest.approx(covered(real, samples), abs=1e-6)
    assert found["recall"] < 0.7 < found["precision"]


def test_digits(tmp_path, capsys):
    """Digits against themselves are at 0; other digits are nearer to digits than their negatives; all is in the row."""
    images = gan.digits(120, 0)[0]
    for name, some in (("real", images[:60]), ("near", images[60:]), ("far", 255 - images[60:])):
        write_all(tmp_path / name, some)
    row, near, far = rows_of("--real", "real", "--samples", "same=real", "near", "far", *TOY)
    assert abs(row["fid"]) < 1e-5 and row["kid"] < 0 and row["precision"] == row["recall"] == 1
    assert row["n_samples"] == row["n_real"] == 60 and row["resolution"] == "28x28"
    assert row["features"] == "classifier of toy digits"
    assert row["weights"] == common.file_hash(common.WEIGHTS / "digits-toy.pt")
    assert row["torch_fidelity"] == torch_fidelity.__version__ and "60 images" in capsys.readouterr().out
    assert [*row].index("kid") < [*row].index("fid")
    assert far["kid"] > 5 * abs(near["kid"]) and far["fid"] > 5 * near["fid"] and far["recall"] < near["recall"]


def test_features_of_digits_are_what_the_last_layer_is_given():
    images = gan.digits(3, 0)[0].expand(-1, 3, -1, -1)
    net, whole = fid.classifier("toy", None, "cpu")[0], digits.classifier("toy", None)
    torch.testing.assert_close(whole[-1](net(images).float()), whole(images[:, :1] / 255))


def test_squeezenet(tmp_path):
    """Images of any shape are seen whole, whatever their size; means of the last maps are compared."""
    torch.manual_seed(0)
    torch.save(squeezenet1_0().state_dict(), tmp_path / "squeezenet.pth")
    images = torch.rand(4, 3, 8, 16).mul(255).byte()
    images[1:, :, :, 4:12] = images[:1, :, :, 4:12]  # they differ at the sides only
    see, name, _ = fid.squeezenet(tmp_path / "squeezenet.pth", "cpu")
    found = see(images)
    assert name == "SqueezeNet of ImageNet" and found.shape == (4, 512) and len(found.unique(dim=0)) == 4
    for folder, some in (("real", images), ("dark", images // 4)):
        write_all(tmp_path / folder, some)
    flags = "--features", "squeezenet", "--weights", tmp_path / "squeezenet.pth"
    same, dark = rows_of("--real", "real", "--samples", "same=real", "dark", *flags)
    assert same["kid"] < dark["kid"] and same["precision"] == 1 and same["features"] == name


# -- images ----------------------------------------------------------------------------------------------------------


def test_images_of_every_kind(tmp_path):
    """Grey and 16-bit ones have three equal channels, what is transparent is white, photos stand upright."""
    (tmp_path / "a" / "below").mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("L", (3, 2), 77).save(tmp_path / "a" / "0.png")
    Image.fromarray(np.full((2, 3), 77 * 257, np.uint16)).save(tmp_path / "a" / "1.png")
    Image.new("RGBA", (3, 2), (9, 9, 9, 0)).save(tmp_path / "a" / "2.webp", lossless=True)
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "a" / "below" / "0.bmp")
    Image.new("L", (2, 3), 50).save(tmp_path / "a" / "z.jpg", exif=turned)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    Image.new("RGB", (5, 5)).save(tmp_path / "a" / ".hidden.png")
    images = fid.Images("--samples", tmp_path / "a")
    assert [image.shape for image in images] == [(3, 2, 3)] * 5 and images.size == (3, 2)
    corners = [images[i].flatten(1)[:, 0].tolist() for i in range(5)]
    assert corners == [[77] * 3, [77] * 3, [255] * 3, [1, 2, 3], [50] * 3]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--real good", "--samples"),
        ("--samples few --real good", "few"),
        ("--samples good --real mixed", "odd.png"),
        ("--samples wide --real good", "--resize"),
        ("--samples wide --real wide", "28x28"),
        ("--samples good --real good --device cuda:99", "cuda:99"),
        ("--samples good --real good --features inception --weights weights.pth", "weights.pth"),
        ("--samples good --real good --features inception --weights harmful.pth", "harmful.pth"),
        ("--samples good --real good --features inception", "--weights"),
        ("--samples good --real good --features squeezenet --weights weights.pth", "weights.pth"),
        ("--samples good --real good --features squeezenet", "--weights"),
    ],
)
def test_bad_arguments(flags, named, tmp_path, monkeypatch):
    """One sentence that names what is wrong; no code in a file of weights is run."""
    for name, count in (("good", 6), ("mixed", 6), ("few", 3)):
        write_all(tmp_path / name, gan.digits(count, 0)[0])
    write_all(tmp_path / "wide", torch.zeros(4, 1, 28, 30, dtype=torch.uint8))
    Image.new("L", (9, 9)).save(tmp_path / "mixed" / "odd.png")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "harmful.pth").write_bytes(pickle.dumps(Harmful()))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(SystemExit) as end:
        main(f"compare --features toy {flags}".split())
    said = end.value.code
    assert said.startswith("bench: ") and len(said.splitlines()) == 1 and named in said and "weights_only" not in said
    assert not (tmp_path / "harmed.txt").exists()


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return open, ("harmed.txt", "w")


def no_network(*args, **others):
    raise OSError("Name or service not known")


# -- the Inception network -------------------------------------------------------------------------------------------


def test_equal_to_torch_fidelity_by_hand(tmp_path, monkeypatch):
    """On folders of grey and coloured images; random weights are named by their hash, known ones by their name."""
    random_inception = tmp_path / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **others: None)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        torch.manual_seed(0)
        net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    torch.save(net.state_dict(), random_inception)
    rng = torch.Generator().manual_seed(0)
    for name, low in (("samples", 0), ("real", 60)):
        write_all(tmp_path / name, torch.randint(low, 256, (4, 3, 20, 24), generator=rng, dtype=torch.uint8))
    Image.new("L", (24, 20), 99).save(tmp_path / "samples" / "grey.png")
    (row,) = rows_of("--samples", "samples", "--real", "real", "--weights", random_inception)
    settings = {"feature_extractor_weights_path": str(random_inception), "kid_subset_size": 2, "cuda": False}
    settings |= {"feature_extractor": "inception-v3-compat", "feature_layer_prc": "2048"}
    settings |= {"fid": True, "kid": True, "prc": True, "cache": False, "save_cpu_ram": True, "verbose": False}
    found = torch_fidelity.calculate_metrics(input1="samples", input2="real", **settings)
    for ours, theirs in (("kid", "kernel_inception_distance_mean"), ("kid_std", "kernel_inception_distance_std")):
        assert row[ours] == pytest.approx(found[theirs], rel=1e-6)
    assert row["fid"] == pytest.approx(found["frechet_inception_distance"], rel=1e-6)
    assert (row["precision"], row["recall"]) == (found["precision"], found["recall"])
    assert row["weights"] == common.file_hash(random_inception) != fid.INCEPTION
    assert row["features"] == f"unknown weights {row['weights']}"
    assert f"-{fid.INCEPTION}.pth" in fid.URL_INCEPTION_V3
    monkeypatch.setattr(fid, "file_hash", lambda path: fid.INCEPTION)
    assert fid.inception(random_inception, "cpu")[1:] == ("inception-v3-compat", "6726825d")


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


@pytest.mark.parametrize(("fooled", "trials"), [(0, 40), (7, 40), (40, 40), (189, 1000)])
def test_interval_by_hand(fooled, trials):
    """Its ends are the shares p from which what was seen is 1.96 standard errors away: roots of a quadratic."""
    share, z = fooled / trials, 1.959963984540054
    low, high = sorted(np.roots([1 + z**2 / trials, -2 * share - z**2 / trials, share**2]).real)
    said = study.fooled([True] * fooled + [False] * (trials - fooled))
    found = [float(number) / 100 for number in re.findall(r"([\d.]+)%", said)]
    assert said.startswith(f"{fooled} of {trials}, ") and found == pytest.approx([share, low, high], abs=6e-4)


def test_pairs(tmp_path, capsys):
    """Images of one name are partners; there must be fifty; the page has them all."""
    page, real = write_study(tmp_path)
    assert len({*real}) == 50 and page.count("data:image/png;base64,") == 100 and "http" not in page
    for file in sorted((tmp_path / "fake").iterdir())[:7]:
        file.rename(file.with_stem(f"{file.stem}-fake"))
    main("study --real real --fake fake --out page.html".split())
    assert "at random" in capsys.readouterr().out
    (tmp_path / "real" / "0.png").unlink()
    for flags, named in (("--real real --fake fake", "49 pairs"), ("--real real", "--fake")):
        with pytest.raises(SystemExit, match=named):
            main(["study", *flags.split()])


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_page_in_a_browser(tmp_path):
    """Someone is fooled in every third pair: the page counts the last forty, and saves what Python makes of them."""
    page, real = write_study(tmp_path)
    someone = """<script>
    const real = %s, times = [];
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
    assert saved == {"measure": "study", "study": "map to photo", "method": "ours", "answers": answers}
    assert "You took 13 of 40 images for real" in seen
    least, most, pairs = map(int, re.search(r'data-times="(\d+) (\d+) (\d+)"', seen).groups())
    assert 950 <= least <= most <= 1100 and pairs == 50
