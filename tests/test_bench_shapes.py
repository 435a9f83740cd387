"""The judge of text2img.py: what it sees, and how it asks."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from scripts import environment
from torch import nn

import text2img
from bench import shapes
from bench.__main__ import main

# stands for text2img.py: for each sentence a pixel of its number, named as text2img.py names what it draws
STAND_IN = """
import sys
from pathlib import Path
from PIL import Image
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert flags["--sample"] == "1"
lines = Path(flags["--prompt"]).read_text("utf-8").splitlines()
Path(flags["--run"], "asked.txt").write_text("\\n".join([flags["--seed"], *lines]))
Path(flags["--to"]).mkdir()
for i, line in enumerate(lines):
    name = f"{i:03}-00000.png" if len(lines) > 1 else "00000.png"
    Image.new("RGB", (1, 1), (i // 256, i % 256, len(line))).save(Path(flags["--to"], name))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder that the stand-in draws from."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"data": "toy", "size": 64}')
    (tmp_path / "script.py").write_text(STAND_IN)
    monkeypatch.setattr(text2img, "__file__", str(tmp_path / "script.py"))
    return tmp_path / "run"


@pytest.mark.parametrize("count", [1, 2, 1003])
def test_images_come_in_the_order_of_sentences(count, run):
    """Whatever the number of digits in their names."""
    images = shapes.drawn(run, [f"{'x' * (i % 50)}y" for i in range(count)], 3)
    numbers = torch.arange(count)
    expected = torch.stack([numbers // 256, numbers % 256, numbers % 50 + 1], 1).byte()
    assert torch.equal(images, expected[:, :, None, None])
    assert (run / "asked.txt").read_text().splitlines()[0] == "3"


def test_shares_by_hand(run, tmp_path, monkeypatch, capsys):
    """Of four images one shows all that was asked: two the form, three the ink, one the size, all the ground."""
    *_, labels = text2img.shapes(4, shapes.SEED + 1 + 7, held_out=True)
    seen = labels.clone()
    seen[2:, 0] = (seen[2:, 0] + 1) % 3
    seen[3, 1] = (seen[3, 1] + 1) % 6
    seen[1:, 2] = 1 - seen[1:, 2]
    monkeypatch.setattr(shapes, "classifier", lambda args: None)
    monkeypatch.setattr(shapes, "classify", lambda net, images: seen if images.shape[2] == 1 else labels)
    main(f"shapes --run {run} --count 4 --seed 7 --out {tmp_path / 'out.json'}".split())
    row = json.loads((tmp_path / "out.json").read_text())
    assert [row[name] for name in ("right", *shapes.PARTS)] == [0.25, 0.5, 0.75, 0.25, 1]
    assert row["n_samples"] == 4 and row["classifier_accuracy"] == 1 and "right 0.25" in capsys.readouterr().out


def test_asks_what_was_held_out(run, tmp_path, monkeypatch):
    """Sentences are of combinations that training never has, with --seen of those it has; the seed changes them."""
    monkeypatch.setattr(shapes, "classifier", lambda args: None)
    monkeypatch.setattr(shapes, "classify", lambda net, images: torch.zeros(len(images), 4))
    trained = {tuple(label) for label in text2img.shapes(3000, 0, size=1)[2].tolist()}
    words = {word: i for said in ("small large", "little big", "tiny huge") for i, word in enumerate(said.split())}
    asked = []
    for flags in ("", "--seen", "--seed 1"):
        main(f"shapes --run {run} --count 60 {flags}".split())
        asked.append((run / "asked.txt").read_text().splitlines()[1:])
        for line in asked[-1]:
            form, large = (
                next(part for part in line.split() if part in known) for known in (text2img.VALUES[0], words)
            )
            inks = [word.strip(",") for word in line.split() if word.strip(",") in text2img.INKS]
            if line.startswith((f"{inks[0]} background,", f"on a {inks[0]} background")):  # the ground comes first
                inks.reverse()
            ink, ground = ([*text2img.INKS].index(word) for word in inks)
            label = text2img.VALUES[0].index(form), ink, words[large], ground
            assert (label in trained) == (flags == "--seen")
    assert len({*map(tuple, asked)}) == 3


def test_classifier_learns_shapes():
    """From few images it tells those of other seeds, soft ones too and of other sizes; no global random state moves."""
    before = torch.get_rng_state()
    parts = [text2img.shapes(count, 0, held_out) for count, held_out in ((1200, False), (240, True))]
    net = shapes.train_classifier(torch.cat([p[0] for p in parts]), torch.cat([p[2] for p in parts]), epochs=4)
    assert torch.equal(before, torch.get_rng_state())
    for size in (64, 32):
        images, _, labels = text2img.shapes(200, 1, held_out=True, size=size)
        soft = nn.functional.avg_pool2d(images / 255, 3, 1, 1, count_include_pad=False).mul(255).byte()
        for some in (images, soft):
            assert shapes.classify(net, some).eq(labels).all(1).float().mean() > 0.9


def test_classifier_is_trained_once(tmp_path, monkeypatch):
    """The second time it comes from --cache, with the same bits, unless shapes are drawn otherwise; damage is named."""
    given, trained = Namespace(cache=tmp_path / "cache"), []
    monkeypatch.setattr(shapes, "train_classifier", lambda *data: trained.append(data) or shapes.build().eval())
    monkeypatch.setattr(text2img, "shapes", lambda count, seed, held_out: (torch.zeros(1), None, torch.zeros(1)))
    first, second = (shapes.classifier(given).state_dict() for _ in range(2))
    assert len(trained) == 1 and all(torch.equal(first[name], second[name]) for name in first)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text("no weights")
    with pytest.raises(SystemExit, match=file.name):
        shapes.classifier(given)
    monkeypatch.setattr(text2img, "shapes", lambda count, seed, held_out: (torch.ones(1), None, torch.ones(1)))
    shapes.classifier(given)
    assert len(trained) == 2


def test_a_run_of_the_script(tmp_path, monkeypatch, capsys):
    """text2img.py itself: trained for an update at 16 pixels, asked, judged."""
    flags = "--size 16 --max-steps 1 --device cpu --run runs/one"
    subprocess.run([sys.executable, text2img.__file__, *flags.split()], env=environment(), check=True)
    monkeypatch.setattr(shapes, "classifier", lambda args: shapes.build().eval())
    main("shapes --run runs/one --count 3 --out out.json".split())
    row = json.loads((tmp_path / "out.json").read_text())
    assert row["run"] == "one" and row["n_samples"] == 3 and 0 <= row["right"] <= row["ink"] <= 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", "--run"),
        ("--run missing", "missing"),
        ("--run birds", "birds"),
        ("--run unlike", "last.pt"),
        ("--run unlike --count 0", "--count 0"),
        ("--run unlike --seed -1", "--seed -1"),
        ("--run unlike --count many", "--count"),
    ],
)
def test_bad_arguments(flags, named, tmp_path, capsys):
    """One sentence that names what is wrong, and exit status 2."""
    for name, data in (("birds", "birds"), ("unlike", "toy")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"data": data, "size": 64}))
    (tmp_path / "unlike" / "last.pt").write_text("no checkpoint")
    with pytest.raises(SystemExit) as end:
        main(["shapes", *flags.split()])
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1 and named in said
