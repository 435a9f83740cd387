"""The FCN-score: its metrics, its data, its networks, and weights that Caffe wrote."""

import json
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import Cityscapes

import pix2pix
from bench import common, fcn, fcn8s
from bench.__main__ import main


def measure(*flags):
    """The row of --samples."""
    main(["fcn", *map(str, flags), "--device", "cpu", "--out", "row.json"])
    return json.loads(Path("row.json").read_text())


# -- the metrics -----------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    """Truth 0 0 0 1 and one ignored, seen 0 0 1 1 and 0; class 2 is absent, and seen nowhere."""
    counts = fcn.confusion(torch.tensor([0, 0, 0, 1, 255]), torch.tensor([0, 0, 1, 1, 0]), 3)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]] and counts.dtype == torch.int64
    assert [*fcn.scores(counts).values()] == pytest.approx([3 / 4, (2 / 3 + 1) / 2, (2 / 3 + 1 / 2) / 2])
    outside = fcn.confusion(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 1]), 2)  # an error of its own pixel only
    assert [*fcn.scores(outside).values()] == pytest.approx([3 / 4, 3 / 4, (1 / 2 + 1) / 2])


# -- FCN-8s ----------------------------------------------------------------------------------------------------------

WIDTHS, HIDDEN = (6, 7, 8, 9, 10), 8


def small(classes=4):
    """A narrow FCN-8s with random weights everywhere, whose scores depend on the photo."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = fcn8s.FCN8s(classes, WIDTHS, HIDDEN)
        for weight in net.parameters():
            nn.init.kaiming_normal_(weight) if weight.ndim == 4 else nn.init.uniform_(weight, -0.1, 0.3)
    return net.eval()


def test_fcn8s_is_the_authors():
    """Its weights to the unit, maps as large as Caffe's, which rounds up, and a score for each pixel of Cityscapes."""
    seen = []
    with torch.device("meta"):
        net = fcn8s.FCN8s()
        net.fc6.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape))
        assert sum(weight.numel() for weight in net.parameters()) == 134_473_084
        assert net(torch.empty(1, 3, 1024, 2048)).shape == (1, 20, 1024, 2048)
    assert seen == [(1, 512, 39, 71)]  # 1222x2246 halved five times
    assert small()(torch.rand(1, 3, 33, 38)).shape == (1, 4, 33, 38)


@pytest.mark.parametrize(("path", "near"), [("score_pool3", 3), ("score_pool4", 5), ("score_fr", 9)])
def test_scores_lie_over_their_pixels(path, near):
    """What a score depends on is centred at its pixel, on each of three ways; another crop would be 8 pixels off."""
    net = fcn8s.FCN8s(1, (2, 2, 2, 2, 2), 2).eval()
    for name, layer in net.named_children():
        if name.startswith("upscore"):  # bilinear
            size = layer.kernel_size[0]
            ramp = 1 - (torch.arange(size) - (size - 1) / 2).abs() / (size / 2)
            layer.weight.data = (ramp[:, None] * ramp)[None, None]
        else:
            nn.init.constant_(layer.weight, 0.1 if not name.startswith("score") or name == path else 0)
            nn.init.constant_(layer.bias, 100)  # so that no ReLU is off
    x = torch.rand(2, 3, 96, 96, requires_grad=True)
    net(x)[:, 0, 44:52, 44:52].sum().backward()
    weight, places = x.grad.abs().sum((0, 1)), torch.arange(96.0)
    for middle in ((weight.sum(1) * places).sum() / weight.sum(), (weight.sum(0) * places).sum() / weight.sum()):
        assert abs(middle - 47.5) < near


def field(number, value):
    """A field of a protobuf message: an int, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(number):
    """As protobuf writes a number."""
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def encode(net, v1=False):
    """A .caffemodel with a network's weights, named as the authors' file names them, among fields that nobody needs."""
    found = field(1, b"fcn") + field(3, b"data")
    for name, layer in net.named_children():
        title = f"{name}_cs".encode() if name in ("fc6", "fc7") else name.encode()
        blobs = []
        for weight in layer.parameters():
            shape = field(7, field(1, b"".join(map(varint, weight.shape))))
            blobs.append(field(5, struct.pack(f"<{weight.numel()}f", *weight.flatten().tolist())) + shape)
        parts = [field(4 if v1 else 1, title), field(5 if v1 else 10, 1)]
        parts += [field(6 if v1 else 7, blob) for blob in blobs]
        found += field(2 if v1 else 100, b"".join(parts))
    return found + field(100, field(1, b"relu") + field(2, b"ReLU"))


@pytest.mark.parametrize("v1", [False, True], ids=["layer", "layers"])
def test_caffemodel(v1, tmp_path):
    """The weights in a file, of either kind of layer, give the scores of those put in directly, for BGR less a mean."""
    net, path = small(), tmp_path / "net.caffemodel"
    path.write_bytes(encode(net, v1))
    loaded, photo = fcn8s.load(path, fcn8s.FCN8s(4, WIDTHS, HIDDEN)), torch.randint(0, 256, (1, 3, 40, 50))
    with torch.no_grad():
        found = loaded(photo / 255)
        assert torch.equal(found, net(photo / 255)) and found.std((2, 3)).min() > 0.1
        first = []
        loaded.conv1_1.register_forward_pre_hook(lambda layer, inputs: first.append(inputs[0]))
        loaded(photo / 255)
    bgr = photo[:, [2, 1, 0]] - torch.tensor([72.78044, 83.21195, 73.45286])[:, None, None]
    torch.testing.assert_close(first[0], bgr, rtol=1e-4, atol=1e-4)


# -- scenes ----------------------------------------------------------------------------------------------------------

COLOURS = np.array([(200, 0, 0), (0, 200, 0), (0, 0, 200), (0, 0, 0)], np.uint8)  # of three classes and the rest


def write_pairs(folder, count=6, size=32, ignored=255):
    """Pairs with class ids, as CamVid has them; a photo is the map, paler."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        (folder / f"{split}_ids").mkdir()
        for i in range(count):
            ids = rng.integers(0, 4, (size // 8, size // 8)).repeat(8, 0).repeat(8, 1)
            labels = COLOURS[ids]
            Image.fromarray(np.concatenate([labels // 2 + 60, labels], 1)).save(folder / split / f"{i}.png")
            ids[ids == 3] = ignored
            Image.fromarray(ids.astype(np.uint8)).save(folder / f"{split}_ids" / f"{i}.png")
    return folder


def write_halves(folder, to, left):
    """The photos or the label maps of a test split, as if a script had made them."""
    to.mkdir()
    for file in (folder / "test").iterdir():
        image = Image.open(file)
        half = image.width // 2
        image.crop((0, 0, half, image.height) if left else (half, 0, image.width, image.height)).save(to / file.name)


class Seer(nn.Module):
    """A segmenter that sees the class with the nearest colour, as if it had learned from `write_pairs`."""

    def __init__(self, colours):
        super().__init__()
        self.colours = torch.from_numpy(np.float32(colours)) / 255

    def forward(self, x):
        return -(x[:, None] - self.colours[None, :, :, None, None]).square().sum(2)


def test_labels_by_nearest_colour(tmp_path):
    """Real label maps get full marks; a colour of what is ignored is an error of its pixel."""
    folder = write_pairs(tmp_path / "pairs")
    write_halves(folder, tmp_path / "maps", False)
    given = ["--data", folder, "--samples", tmp_path / "maps", "--labels"]
    row = measure(*given)
    assert [row[name] for name in fcn.METRICS] == [row[f"real_{name}"] for name in fcn.METRICS] == [1, 1, 1]
    assert (row["n_samples"], row["n_real"], row["features"], row["of"]) == (6, 6, "nearest colour", "labels")
    for file in (tmp_path / "maps").iterdir():
        image = np.asarray(Image.open(file)).copy()
        image[(image == COLOURS[1]).all(2)] = (3, 5, 2)
        Image.fromarray(image).save(file)
    row = measure(*given)
    shares = np.bincount(np.concatenate([np.asarray(Image.open(f)).ravel() for f in (folder / "test_ids").iterdir()]))
    assert row["pixel_accuracy"] == pytest.approx(1 - shares[1] / shares[:3].sum(), abs=1e-6)
    assert row["class_accuracy"] == row["class_iou"] == pytest.approx(2 / 3) and row["real_class_iou"] == 1


def test_photos_of_pairs(tmp_path, monkeypatch, capsys):
    """Real photos as samples get what real photos get, on labels that stay as large as they are; a row tells both."""
    folder, asked = write_pairs(tmp_path / "pairs", size=64), []
    write_halves(folder, tmp_path / "photos", True)
    for file in (tmp_path / "photos").iterdir():
        Image.open(file).resize((32, 32), Image.Resampling.BICUBIC).save(file)

    def find_segmenter(scenes, shape, *rest):
        asked.append(shape)
        return partial(fcn.see, Seer(COLOURS[:3] // 2 + 60), shape, "cpu"), "a seer", "abcd"

    monkeypatch.setattr(fcn, "find_segmenter", find_segmenter)
    row = measure("--data", folder, "--samples", tmp_path / "photos")
    assert 0.9 < row["pixel_accuracy"] == row["real_pixel_accuracy"] and asked == [(32, 32)]
    assert (row["of"], row["n_samples"], row["features"], row["weights"]) == ("photos", 6, "a seer", "abcd")
    assert "real_pixel_accuracy" in capsys.readouterr().out


def test_cityscapes(tmp_path, monkeypatch):
    """Its ids become 19 classes, the rest is ignored; samples have the names that the authors' script wants."""
    ids = np.arange(64, dtype=np.uint8)[None].repeat(32, 0) // 2 + 2  # 2 to 33
    table, folder = np.zeros((256, 3), np.uint8), tmp_path / "cityscapes"
    for kind in Cityscapes.classes:
        table[kind.id] = kind.color if not kind.ignore_in_eval else 0
    for split in ("train", "val"):
        for kind, image in (("gtFine_labelIds", ids), ("gtFine_color", table[ids]), ("leftImg8bit", table[ids])):
            place = folder / kind.partition("_")[0] / split / "ulm"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"ulm_000000_000019_{kind}.png")
    (tmp_path / "samples").mkdir()
    Image.fromarray(table[ids]).save(tmp_path / "samples" / "ulm_000000_000019_leftImg8bit.png")
    scenes = fcn.find_scenes("cityscapes", tmp_path, "test")
    assert scenes.classes == 19 and scenes.names == ["ulm_000000_000019"]
    train_ids = [255, 255, 255, 255, 255, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255]  # of 2 to 18
    assert scenes.ids(0)[0, ::2].tolist() == [*train_ids, *range(6, 16), 255, 255, 16, 17, 18]
    colours = [kind.color for kind in Cityscapes.classes if not kind.ignore_in_eval]
    look = partial(fcn.see, Seer(colours), None, "cpu")
    monkeypatch.setattr(fcn, "find_segmenter", lambda *given: (look, "a seer", ""))
    for more in ((), ("--labels",)):
        row = measure("--data", folder, "--samples", tmp_path / "samples", *more)
        assert [row[name] for name in fcn.METRICS] == pytest.approx([1, 1, 1])


# -- the scorer ------------------------------------------------------------------------------------------------------


def test_scorer_of_streets_comes_with_the_bench(tmp_path):
    """It finds nearly all in the photos of the test split; label maps get full marks by their colours."""
    maps, photos, _ = pix2pix.streets(100, 1)
    for name, images in (("photos", photos), ("maps", maps)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / name / f"{i:03}.png")
    row = measure("--samples", tmp_path / "photos", "--data-root", tmp_path / "data")
    assert row["class_iou"] == row["real_class_iou"] > 0.98 and not (tmp_path / "data").exists()
    assert row["weights"] == common.file_hash(common.WEIGHTS / "streets.pt")
    row = measure("--samples", tmp_path / "maps", "--labels")
    assert [row[name] for name in fcn.METRICS] == [1, 1, 1]


def test_scorer_is_trained_once(tmp_path, capsys):
    """It is kept, and does not learn from what is ignored: CamVid's twelfth id."""
    folder = write_pairs(tmp_path / "camvid", count=24, ignored=11)
    write_halves(folder, tmp_path / "photos", True)
    given = ["--data", "camvid", "--data-root", tmp_path, "--samples", tmp_path / "photos"]
    row = measure(*given)
    assert "training" in capsys.readouterr().out
    assert row["class_iou"] == row["real_class_iou"] > 0.9
    assert fcn.find_scenes("camvid", tmp_path, "test").classes == 11
    assert measure(*given) == row and "training" not in capsys.readouterr().out
    (file,) = tmp_path.glob("scorer-32x32-*.pt")
    assert row["weights"] == common.file_hash(file)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--samples fewer --data pairs", "such as 3"),
        ("--samples more --data pairs", "stranger.png"),
        ("--samples mixed --data pairs", "64x32"),
        ("--samples good --data nowhere", "nowhere"),
        ("--samples good --data alone", "5.png"),
        ("--samples good --data pairs --segmenter good/0.png", "0.png is no .caffemodel of FCN-8s"),
    ],
)
def test_bad_arguments(flags, named, tmp_path):
    """One sentence that names what is wrong."""
    for name in ("pairs", "alone"):
        write_pairs(tmp_path / name)
    for name in ("good", "fewer", "more", "mixed"):
        write_halves(tmp_path / "pairs", tmp_path / name, True)
    (tmp_path / "fewer" / "3.png").unlink()
    Image.new("RGB", (32, 32)).save(tmp_path / "more" / "stranger.png")
    Image.new("RGB", (64, 32)).save(tmp_path / "mixed" / "2.png")
    (tmp_path / "alone" / "test_ids" / "5.png").unlink()
    with pytest.raises(SystemExit) as end:
        main(["fcn", *flags.split()])
    assert end.value.code.startswith("bench: ") and named in end.value.code and "\n" not in end.value.code
