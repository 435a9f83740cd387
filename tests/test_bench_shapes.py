"""The judge of text2img.py: what it sees, and how it asks."""

import json

import pytest
import torch
from torch.nn import functional as F

import text2img
from bench import common, shapes
from bench.__main__ import main

# stands for text2img.py: for each sentence a pixel of its number, named as text2img.py names what it draws
STAND_IN = """
import sys
from pathlib import Path
from PIL import Image
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert flags["--sample"] == "1"
lines = Path(flags["--prompt"]).read_text("utf-8").splitlines()
Path("asked.txt").write_text("\\n".join([flags["--seed"], *lines]))
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
    (tmp_path / "text2img.py").write_text(STAND_IN)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("count", [1, 2, 300])
def test_images_come_in_the_order_of_sentences(count, run):
    images = shapes.draw(run, [f"{'x' * (i % 50)}y" for i in range(count)], 3)
    numbers = torch.arange(count)
    expected = torch.stack([numbers // 256, numbers % 256, numbers % 50 + 1], 1).byte()
    assert torch.equal(images, expected[:, :, None, None])


def test_shares_by_hand(run, tmp_path, monkeypatch, capsys):
    """Of four images one shows all that was asked: two the form, three the ink, one the size, all the ground."""
    _, captions, labels = text2img.shapes(4, shapes.SEED + 1 + 7, held_out=True)
    seen = labels.clone()
    seen[2:, 0] = (seen[2:, 0] + 1) % 3
    seen[3, 1] = (seen[3, 1] + 1) % 6
    seen[1:, 2] = 1 - seen[1:, 2]
    monkeypatch.setattr(shapes, "styles", lambda run, real, captions: {})
    monkeypatch.setattr(shapes, "classify", lambda net, images: seen if images.shape[2] == 1 else labels)
    main(f"shapes --run {run} --count 4 --seed 7 --out {tmp_path / 'out.json'}".split())
    row = json.loads((tmp_path / "out.json").read_text())
    assert [row[name] for name in ("right", *shapes.PARTS)] == [0.25, 0.5, 0.75, 0.25, 1]
    assert row["n_samples"] == 4 and row["classifier_accuracy"] == 1 and "right 0.25" in capsys.readouterr().out
    assert row["weights"] == common.file_hash(shapes.FILE)
    assert (tmp_path / "asked.txt").read_text().splitlines() == ["7", *(lines[0] for lines in captions)]


def test_classifier_knows_shapes():
    """Those of other seeds and sizes, and soft ones."""
    net = shapes.classifier()
    for size in (64, 32):
        images, _, labels = text2img.shapes(200, 1, held_out=True, size=size)
        soft = F.avg_pool2d(images / 255, 3, 1, 1, count_include_pad=False).mul(255).byte()
        for some in (images, soft):
            assert shapes.classify(net, some).eq(labels).all(1).float().mean() > 0.99


def test_bad_arguments(run, tmp_path):
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "config.json").write_text('{"data": "birds", "size": 64}')
    for flags, named in (("missing", "missing"), ("birds", "birds"), ("run --count 0", "--count 0")):
        with pytest.raises(SystemExit, match=named):
            main(["shapes", "--run", *flags.split()])
