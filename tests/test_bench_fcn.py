"""The FCN-score: its metrics, its data, its networks, and weights that Caffe wrote."""

import argparse
import json
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import pix2pix
from bench import fcn, fcn8s
from bench.__main__ import main

NAMES = ("pixel_accuracy", "class_accuracy", "class_iou")


def options(*given):
    """The options of the measure."""
    parser = argparse.ArgumentParser()
    fcn.options(parser)
    return parser.parse_args([*map(str, given)])


# -- the metrics -----------------------------------------------------------------------------------------------------


def slow_scores(truths, seens, classes):
    """The three metrics, pixel by pixel, from lists of arrays."""
    right = pixels = 0
    by_class = {c: [0, 0, 0] for c in range(classes)}  # right, in the truth, seen where the truth is known
    for truth, seen in zip(truths, seens):
        for t, s in zip(truth.flat, seen.flat):
            if not 0 <= t < classes:
                continue
            pixels, right = pixels + 1, right + (t == s)
            by_class[t][0] += t == s
            by_class[t][1] += 1
            if 0 <= s < classes:
                by_class[s][2] += 1
    held = [found for found in by_class.values() if found[1]]
    accuracy = [a / t for a, t, _ in held]
    return right / pixels, sum(accuracy) / len(held), sum(a / (t + s - a) for a, t, s in held) / len(held)


def slow_compat(truths, seens, classes):
    """The authors' script as papers describe it: rows run into each other, a class that is absent counts 0."""
    total = np.zeros(classes * classes)
    for truth, seen in zip(truths, seens):
        flat, beyond = np.zeros(classes * classes), False
        for t, s in zip(truth.flat, seen.flat):
            if 0 <= t < classes:
                place = classes * t + s
                beyond |= place >= classes * classes
                flat[min(place, classes * classes - 1)] += 1
        total += 0 if beyond else flat
    counts = total.reshape(classes, classes)
    found = [0.0, 0.0]
    for c in range(classes):
        found[0] += counts[c, c] / (counts[c].sum() + 1e-12) / classes
        found[1] += counts[c, c] / (counts[c].sum() + counts[:, c].sum() - counts[c, c] + 1e-12) / classes
    return np.trace(counts) / (counts.sum() + 1e-12), *found


@pytest.mark.parametrize("seed", range(8))
def test_metrics_pixel_by_pixel(seed):
    """On random maps with ignored pixels, absent classes and classes seen that there are none of."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 20))
    drawn = rng.permutation(classes)[: max(2, classes // 2)]  # the others are absent
    truths = [rng.choice([*drawn, 255], (7, 9)) for _ in range(3)]
    seens = [
        np.where(rng.random((7, 9)) < 0.5, truth % (classes + 1), rng.integers(0, classes + 2, (7, 9)))
        for truth in truths
    ]
    pairs = [(torch.from_numpy(truth), torch.from_numpy(seen)) for truth, seen in zip(truths, seens)]
    ours = fcn.scores(sum(fcn.confusion(*pair, classes) for pair in pairs))
    assert tuple(ours) == NAMES
    assert [*ours.values()] == pytest.approx(slow_scores(truths, seens, classes), abs=1e-6)
    compat = fcn.scores(sum(fcn.confusion_compat(*pair, classes) for pair in pairs), compat=True)
    assert [*compat.values()] == pytest.approx(slow_compat(truths, seens, classes), abs=1e-6)


def test_metrics_by_hand():
    """Truth 0 0 0 1 and one ignored, seen 0 0 1 1 and 0; class 2 is absent, and seen nowhere."""
    counts = fcn.confusion(torch.tensor([0, 0, 0, 1, 255]), torch.tensor([0, 0, 1, 1, 0]), 3)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]] and counts.dtype == torch.int64
    assert [*fcn.scores(counts).values()] == pytest.approx([3 / 4, (2 / 3 + 1) / 2, (2 / 3 + 1 / 2) / 2])
    assert [*fcn.scores(counts[:, :3], True).values()] == pytest.approx([3 / 4, (2 / 3 + 1) / 3, (2 / 3 + 1 / 2) / 3])


def test_class_outside():
    """It is an error of its own pixel, and the IoU of no other class suffers. To `compat` it is in the next row."""
    truth, seen = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 1])
    assert [*fcn.scores(fcn.confusion(truth, seen, 2)).values()] == pytest.approx([3 / 4, 3 / 4, (1 / 2 + 1) / 2])
    assert fcn.confusion_compat(truth, seen, 2).tolist() == [[1, 0], [1, 2]]
    assert not fcn.confusion_compat(truth.flip(0) * 1, torch.tensor([2, 1, 0, 0]), 2).any()  # beyond the last row


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


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 100, 127])
def test_fcn8s_gives_a_score_for_each_pixel(size):
    assert small()(torch.rand(1, 3, size, size + 5)).shape == (1, 4, size, size + 5)


@pytest.mark.parametrize(("path", "near"), [("score_pool3", 3), ("score_pool4", 5), ("score_fr", 9)])
def test_scores_lie_over_their_pixels(path, near):
    """What a score depends on is centred at its pixel, on each of three ways; another crop would be 8 pixels off."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = fcn8s.init_weights(fcn8s.FCN8s(1, (2, 2, 2, 2, 2), 2), False).eval()
        for name, layer in net.named_children():
            if not name.startswith("upscore"):
                nn.init.constant_(layer.weight, 0.1 if not name.startswith("score") or name == path else 0)
        x = torch.rand(8, 3, 96, 96, requires_grad=True)
    net(x)[:, 0, 44:52, 44:52].sum().backward()
    weight = x.grad.abs().sum((0, 1))
    places = torch.arange(96.0)
    for middle in ((weight.sum(1) * places).sum() / weight.sum(), (weight.sum(0) * places).sum() / weight.sum()):
        assert abs(middle - 47.5) < near


def test_enlarging_begins_bilinear():
    """A new network enlarges a constant score to itself, and gives 0 for every class."""
    net = fcn8s.init_weights(fcn8s.FCN8s(3, WIDTHS, HIDDEN), False)
    for layer in (net.upscore2, net.upscore8):
        found = layer(torch.ones(1, 3, 9, 9)).detach()
        k = layer.kernel_size[0]
        torch.testing.assert_close(found[:, :, k:-k, k:-k], torch.ones_like(found[:, :, k:-k, k:-k]))
    assert not net(torch.rand(1, 3, 32, 32)).any()


def test_weights_of_imagenet(monkeypatch):
    """Those of VGG-16 go into the convolutions, and those of its first fully connected layer see 7x7 places."""
    c_in, features = 3, []
    for width, count in zip(WIDTHS, fcn8s.CONVS):
        for _ in range(count):
            features += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU(True)]
            c_in = width
        features.append(nn.MaxPool2d(2))
    flat = nn.Linear(WIDTHS[-1] * 49, HIDDEN)
    classifier = nn.Sequential(
        flat, nn.ReLU(), nn.Dropout(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 9)
    )
    vgg = argparse.Namespace(features=nn.Sequential(*features), classifier=classifier)
    monkeypatch.setattr(fcn8s, "vgg16", lambda weights: vgg if weights else None)
    net = fcn8s.init_weights(fcn8s.FCN8s(2, WIDTHS, HIDDEN), True)
    assert torch.equal(net.conv5_3.weight, features[-3].weight) and torch.equal(net.conv1_1.bias, features[0].bias)
    x = torch.rand(1, WIDTHS[-1], 7, 7)
    torch.testing.assert_close(net.fc6(x).flatten(), flat(x.flatten()))
    assert torch.equal(net.fc7.bias, classifier[3].bias) and not net.score_fr.weight.any()


# -- .caffemodel -----------------------------------------------------------------------------------------------------


def varint(number):
    """As protobuf writes a number."""
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def field(number, value):
    """A field: an int, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def encode_blob(tensor, packed=True, double=False, old=False):
    """A BlobProto: floats or doubles, packed or not, with its shape as new or as old Caffe writes it."""
    number, kind, sign = (8, 1, "d") if double else (5, 5, "f")
    values = tensor.flatten().tolist()
    if packed:
        data = field(number, struct.pack(f"<{len(values)}{sign}", *values))
    else:
        data = b"".join(varint(number << 3 | kind) + struct.pack(f"<{sign}", value) for value in values)
    if old:
        shape = [1] * (4 - tensor.ndim) + [*tensor.shape]
        return b"".join(field(i, size) for i, size in enumerate(shape, 1)) + data
    dims = b"".join(map(varint, tensor.shape)) if packed else None
    return data + field(7, field(1, dims) if packed else b"".join(field(1, size) for size in tensor.shape))


def encode(net, v1=False, drop=(), **how):
    """A .caffemodel with a network's weights, named as the authors' file names them, among fields that nobody needs."""
    found = field(1, b"fcn") + field(3, b"data")
    for name, layer in net.named_children():
        if name in drop:
            continue
        blobs = [encode_blob(weight.detach(), **how) for weight in layer.parameters()]
        title = f"{name}_cs".encode() if name in ("fc6", "fc7") else name.encode()
        if v1:
            body = field(2, b"below") + field(4, title) + field(5, 4) + b"".join(field(6, blob) for blob in blobs)
        else:
            body = (
                field(1, title) + field(2, b"Convolution") + b"".join(field(7, blob) for blob in blobs) + field(10, 1)
            )
        found += field(2 if v1 else 100, body)
    return found + field(100, field(1, b"relu") + field(2, b"ReLU"))


@pytest.mark.parametrize("v1", [False, True], ids=["layer", "layers"])
@pytest.mark.parametrize(
    "how", [{}, {"packed": False}, {"double": True}, {"double": True, "packed": False}, {"old": True}], ids=str
)
def test_caffemodel(v1, how, tmp_path):
    """The weights in a file, of either kind of layer and of floats, give the scores of those put in directly."""
    net, path = small(), tmp_path / "net.caffemodel"
    path.write_bytes(encode(net, v1, **how))
    loaded, x = fcn8s.load(path), torch.randn(1, 3, 40, 50)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x)) and net(x).std((2, 3)).min() > 0.1


def test_caffemodel_gets_bgr_less_the_mean(tmp_path):
    """As in the authors' cityscapes.py: blue first, from 0 to 255, not scaled."""
    net, path = small(), tmp_path / "net.caffemodel"
    path.write_bytes(encode(net))
    photo = torch.randint(0, 256, (1, 3, 32, 32))
    bgr = photo[:, [2, 1, 0]] - torch.tensor([72.78044, 83.21195, 73.45286])[:, None, None]
    with torch.no_grad():
        found = fcn.read_weights(path, "fcn_small").eval()(photo / 255)
        torch.testing.assert_close(found, net(bgr), rtol=1e-3, atol=1e-3)


def damaged():
    """Names and bytes of files that are no .caffemodel of FCN-8s, and what is said of them."""
    whole = encode(small())
    blob = field(5, b"\0" * 8)
    yield "empty", b"", "empty"
    yield "text", b"these are no weights", "protobuf"
    yield "another net", field(100, field(1, b"conv1_1") + field(7, blob + field(7, field(1, varint(2))))), "conv1_2"
    yield "no layer", encode(small(), drop=["score_pool4"]), "score_pool4"
    yield "a length beyond the end", whole + varint(100 << 3 | 2) + varint(2**60), "cut off"
    yield "a number without end", b"\xff" * 30, "no end"
    wrong = small()
    wrong.fc7 = nn.Conv2d(HIDDEN, HIDDEN, 3)
    yield "shape", encode(wrong), "fc7"
    no_bias = small()
    no_bias.fc6 = nn.Conv2d(WIDTHS[-1], HIDDEN, 7, bias=False)
    yield "no bias", encode(no_bias), "bias of fc6"
    dims = field(100, field(1, b"conv1_1") + field(7, blob + field(7, field(1, varint(2**63) + varint(2**63)))))
    yield "a huge shape", whole + dims, "caffemodel"
    yield "floats cut in two", whole + field(100, field(1, b"fc7_cs") + field(7, field(5, b"123"))), "caffemodel"


@pytest.mark.parametrize(("content", "said"), [case[1:] for case in damaged()], ids=[case[0] for case in damaged()])
def test_damaged_caffemodel(content, said, tmp_path):
    """One sentence, that names the file and what is wrong."""
    path = tmp_path / "net.caffemodel"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        fcn8s.load(path)
    assert str(path) in end.value.code and said in end.value.code and "\n" not in end.value.code


def test_truncated_caffemodel(tmp_path):
    """Wherever it is cut off, that is said."""
    whole, path = encode(small()), tmp_path / "net.caffemodel"
    for end in np.random.default_rng(0).integers(1, len(whole) - 20, 60):
        path.write_bytes(whole[:end])
        with pytest.raises(SystemExit, match="net.caffemodel cannot be used"):
            fcn8s.load(path)


# -- scenes ----------------------------------------------------------------------------------------------------------


def test_toy_scenes_are_those_of_pix2pix():
    """Names, maps and photos of its test split; no scene to train on is one that a script has."""
    args = pix2pix.get_args(["--device", "cpu"])
    names, read = pix2pix.load_pairs(args, "test")
    scenes = fcn.toy("test", 64)
    assert scenes.names == names and scenes.classes == 5
    for i in (0, 57, 99):
        pair = np.concatenate([np.asarray(scenes.labels(i)), np.asarray(scenes.photo(i))], 2).transpose(2, 0, 1)
        assert np.array_equal(pair, read(i))
    train = fcn.toy("train", 64)
    fresh = {train.photo(i).tobytes() for i in range(100)}
    for seed in range(3):
        assert not fresh & {photo.transpose(1, 2, 0).tobytes() for photo in pix2pix.streets(100, seed)[1]}


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
            Image.fromarray(np.where(ids == 3, ignored, ids).astype(np.uint8)).save(
                folder / f"{split}_ids" / f"{i}.png"
            )
    return folder


def write_halves(folder, to, left):
    """The photos or the label maps of a test split, as if a script had made them."""
    to.mkdir()
    for file in (folder / "test").iterdir():
        image = Image.open(file)
        half = image.width // 2
        image.crop((0, 0, half, image.height) if left else (half, 0, image.width, image.height)).save(to / file.name)


def test_labels_by_nearest_colour(tmp_path):
    """Real label maps get full marks; blurred ones do not; a colour of what is ignored is an error of its pixel."""
    folder = write_pairs(tmp_path / "pairs")
    write_halves(folder, tmp_path / "maps", False)
    given = ["--data", folder, "--samples", tmp_path / "maps", "--labels"]
    row = fcn.measure(options(*given))
    assert [row[name] for name in NAMES] == [row[f"real_{name}"] for name in NAMES] == [1, 1, 1]
    assert (row["n_samples"], row["n_real"], row["features"], row["of"]) == (6, 6, "nearest colour", "labels")
    for file in (tmp_path / "maps").iterdir():
        image = np.asarray(Image.open(file)).copy()
        image[(image == COLOURS[1]).all(2)] = (3, 5, 2)
        Image.fromarray(image).save(file)
    row = fcn.measure(options(*given))
    shares = np.bincount(np.concatenate([np.asarray(Image.open(f)).ravel() for f in (folder / "test_ids").iterdir()]))
    assert row["pixel_accuracy"] == pytest.approx(1 - shares[1] / shares[:3].sum(), abs=1e-6)
    assert row["class_accuracy"] == row["class_iou"] == pytest.approx(2 / 3) and row["real_class_iou"] == 1


def test_toy_labels(tmp_path):
    """The flat colours of toy maps are found in the maps, and give full marks."""
    (tmp_path / "maps").mkdir()
    for i, image in enumerate(pix2pix.streets(100, 1)[0]):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "maps" / f"{i:03}.png")
    row = fcn.measure(options("--samples", tmp_path / "maps", "--labels"))
    assert [row[name] for name in NAMES] == [1, 1, 1]


def test_palette_is_the_median(tmp_path):
    """Some pixels of another colour, as JPEG makes them, leave it as it is; a class that is not there has none."""
    labels = np.full((1, 10, 10, 3), 100, np.uint8)
    labels[0, 0] = 130
    ids = np.zeros((1, 10, 10), np.uint8)
    ids[0, 5:] = 2
    scenes = fcn.Scenes(["a"], None, lambda i: Image.fromarray(labels[i]), ids.__getitem__, 3, "")
    palette = fcn.find_palette(scenes)
    assert palette[0].tolist() == palette[2].tolist() == [100] * 3 and palette[1].min() > 1000 < palette[3].min()


def seer(colours):
    """A segmenter that sees the class with the nearest colour, as if it had learned from `write_pairs`."""
    net, colours = nn.Conv2d(3, len(colours), 1), torch.from_numpy(np.float32(colours)) / 255
    net.weight.data, net.bias.data = 2 * colours[:, :, None, None], -colours.square().sum(1)
    segmenter = fcn.Segmenter(net)
    segmenter.mean.zero_()
    segmenter.deviation.fill_(1)
    return segmenter


def test_photos_of_pairs(tmp_path, monkeypatch, capsys):
    """Real photos as samples get what real photos get; a row tells both; all at the size of the samples."""
    folder, asked = write_pairs(tmp_path / "pairs"), []
    write_halves(folder, tmp_path / "photos", True)
    monkeypatch.setattr(fcn, "trained", lambda args, *sizes: asked.append(sizes) or seer(COLOURS[:3] // 2 + 60))
    out = tmp_path / "out" / "row.json"
    main(["fcn", "--data", str(folder), "--samples", str(tmp_path / "photos"), "--out", str(out)])
    row, said = json.loads(out.read_text()), capsys.readouterr().out
    assert [row[name] for name in NAMES] == [row[f"real_{name}"] for name in NAMES] == [1, 1, 1]
    assert (row["measure"], row["of"], row["n_samples"], row["features"]) == ("fcn", "photos", 6, "fcn_small at 32x32")
    assert asked == [((32, 32), (32, 32))]
    assert said.splitlines()[0] == "real photos: pixel_accuracy 1, class_accuracy 1, class_iou 1"


def test_photos_are_enlarged_and_labels_are_not(tmp_path, monkeypatch):
    """Samples of half the size: real photos are shrunk to it, and all pixels of the labels count."""
    folder, pixels, confusion = write_pairs(tmp_path / "pairs", size=64), [], fcn.confusion
    write_halves(folder, tmp_path / "photos", True)
    for file in (tmp_path / "photos").iterdir():
        Image.open(file).resize((32, 32), Image.Resampling.BICUBIC).save(file)
    monkeypatch.setattr(fcn, "trained", lambda *given: seer(COLOURS[:3] // 2 + 60))
    monkeypatch.setattr(fcn, "confusion", lambda truth, *rest: pixels.append(truth.shape) or confusion(truth, *rest))
    for size in ((), ("--size", 48)):
        row = fcn.measure(options("--data", folder, "--samples", tmp_path / "photos", *size))
        assert set(pixels) == {(64, 64)} and 0.9 < row["pixel_accuracy"] == row["real_pixel_accuracy"]


def test_bilinear_as_in_the_authors_script():
    """A photo is enlarged by Pillow's bilinear filter, which scipy.misc.imresize used, before the network sees it."""
    image, seen = Image.fromarray(pix2pix.streets(1, 5, 32)[1][0].transpose(1, 2, 0)), []
    net = nn.Conv2d(3, 2, 1)
    fcn.see(lambda x: seen.append(x) or net(x), None, "cpu", image, (64, 128))
    expected = F.interpolate(torch.from_numpy(np.float32(image)).permute(2, 0, 1)[None], (64, 128), mode="bilinear")
    assert (seen[0] * 255 - expected).abs().max() < 1.5  # it rounds after each direction


def write_cityscapes(folder):
    """Cityscapes, 64x32 pixels: each of the 34 ids fills some columns; photos are as coloured as the maps."""
    ids = np.arange(64, dtype=np.uint8)[None].repeat(32, 0) // 2 + 2  # 2 to 33
    table = np.zeros((256, 3), np.uint8)
    for i, colour in fcn.CITYSCAPES.items():
        table[i] = colour
    for split in ("train", "val"):
        for kind, image in (("gtFine_labelIds", ids), ("gtFine_color", table[ids]), ("leftImg8bit", table[ids])):
            place = folder / kind.partition("_")[0] / split / "ulm"
            place.mkdir(parents=True, exist_ok=True)
            for i in range(2):
                Image.fromarray(image).save(place / f"ulm_00000{i}_000019_{kind}.png")
    return folder, table[ids]


def test_cityscapes(tmp_path, monkeypatch):
    """Its ids become 19 classes, the rest is ignored; samples have the names that the authors' script wants."""
    folder, image = write_cityscapes(tmp_path / "cityscapes")
    (tmp_path / "samples").mkdir()
    for i in range(2):
        Image.fromarray(image).save(tmp_path / "samples" / f"ulm_00000{i}_000019_leftImg8bit.png")
    scenes = fcn.find_scenes(options("--samples", "x", "--data", "cityscapes", "--data-root", tmp_path), "test")
    assert scenes.classes == 19 and scenes.names == ["ulm_000000_000019", "ulm_000001_000019"]
    official = [255] * 7 + [
        0,
        1,
        255,
        255,
        2,
        3,
        4,
        255,
        255,
        255,
        5,
        255,
        6,
        7,
        8,
        9,
        10,
        11,
        12,
        13,
        14,
        15,
        255,
        255,
    ]
    official += [16, 17, 18]
    assert scenes.ids(0)[0, ::2].tolist() == official[2:34]
    monkeypatch.setattr(fcn, "trained", lambda *given: seer([*fcn.CITYSCAPES.values()]))
    for more in ((), ("--labels",), ("--compat",)):
        row = fcn.measure(options("--data", folder, "--samples", tmp_path / "samples", *more))
        assert [row[name] for name in NAMES] == pytest.approx([1, 1, 1]) and row.get("compat", False) == (
            "--compat" in more
        )


# -- segmenters ------------------------------------------------------------------------------------------------------


def test_scorer_is_trained_once(tmp_path, monkeypatch, capsys):
    """On few and small scenes it learns; it is kept, and moves no random state. Other settings make another."""
    streets = fcn.toy
    monkeypatch.setattr(
        fcn, "toy", lambda split, size: streets(split, size)._replace(names=[f"{i:03}" for i in range(40)])
    )
    (tmp_path / "photos").mkdir()
    for i in range(40):
        Image.fromarray(pix2pix.streets(100, 1, 32)[1][i].transpose(1, 2, 0)).save(tmp_path / "photos" / f"{i:03}.png")
    args = options("--samples", tmp_path / "photos", "--cache", tmp_path / "cache", "--epochs", 8, "--device", "cpu")
    before = torch.get_rng_state()
    row = fcn.measure(args)
    assert torch.equal(before, torch.get_rng_state())
    assert row["class_iou"] == row["real_class_iou"] > 0.6 and "training" in capsys.readouterr().out
    assert fcn.measure(args) == row and "training" not in capsys.readouterr().out
    module, name = fcn.features(argparse.Namespace(cache=args.cache, epochs=8, device="cpu"), (32, 32))
    found = module(torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8))
    assert found.shape == (3, 128) and found.isfinite().all() and name == "fcn_small at 32x32, of toy"
    assert "training" not in capsys.readouterr().out
    (kept,) = (tmp_path / "cache").iterdir()
    assert fcn.measure(options("--samples", tmp_path / "photos", "--segmenter", kept)) | {"features": ""} == row | {
        "features": ""
    }
    args.seed, args.epochs = 1, 1
    assert fcn.measure(args)["real_class_iou"] != row["real_class_iou"] and len([*args.cache.iterdir()]) == 2


def test_scorer_leaves_out_what_is_ignored(tmp_path, capsys):
    """CamVid has 11 classes, and a twelfth id that teaches nothing; in other folders all ids but 255 are classes."""
    folder = write_pairs(tmp_path / "camvid", ignored=11)
    write_halves(folder, tmp_path / "photos", True)
    given = ["--samples", tmp_path / "photos", "--cache", tmp_path / "cache", "--epochs", 1, "--device", "cpu"]
    row = fcn.measure(options("--data", "camvid", "--data-root", tmp_path, *given))
    assert fcn.find_scenes(options("--data", folder, *given), "test").classes == 11 and row["n_real"] == 6
    folder.rename(tmp_path / "streets")
    for more, classes in ((), 12), (("--classes", 2), 2):
        given = options("--data", tmp_path / "streets", "--samples", tmp_path / "photos", *more)
        assert fcn.find_scenes(given, "train").classes == classes
    assert "loss nan" not in capsys.readouterr().out


def test_features_are_what_the_scores_are_made_from():
    """With the last layer on top they are the mean of its scores."""
    net = small()
    module = fcn.Features(fcn.Segmenter(net), None).eval()
    images, outputs = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8), []
    net.score_fr.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    found = module(images)
    scores = F.linear(found, net.score_fr.weight.flatten(1), net.score_fr.bias)
    torch.testing.assert_close(scores, outputs[0].mean((2, 3)))


@pytest.mark.parametrize("name", ["fcn_small", "fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_state_dict_of_a_network(name, tmp_path):
    """The weights of any network make a segmenter with the classes of the file; auxiliary ones are left out."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = fcn.build(name, 7).eval()
    torch.save(net.state_dict() | {"aux_classifier.0.weight": torch.ones(1)}, tmp_path / "weights.pth")
    segmenter = fcn.read_weights(tmp_path / "weights.pth", name).eval()
    with torch.no_grad():
        x = torch.rand(1, 3, 32, 40)
        mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        expected = net((x - mean) / deviation)
        torch.testing.assert_close(segmenter(x), expected["out"] if isinstance(expected, dict) else expected)
        assert segmenter(x).shape == (1, 7, 32, 40)


def test_weights_of_imagenet_that_cannot_be_had(tmp_path, monkeypatch):
    """Without a network that is one sentence, and nothing is kept."""
    folder = write_pairs(tmp_path / "pairs", count=1)
    write_halves(folder, tmp_path / "photos", True)

    def unreachable(*given, **named):
        raise URLError("no network")

    monkeypatch.setattr(fcn, "get_model", unreachable)
    given = ["--data", folder, "--samples", tmp_path / "photos", "--cache", tmp_path / "cache", "--net", "fcn_resnet50"]
    with pytest.raises(SystemExit, match="fcn_resnet50 cannot be had .*no network.*--pretrained"):
        fcn.measure(options(*given, "--pretrained", "--device", "cpu"))
    assert not (tmp_path / "cache").exists()


class Hostile:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("caught"),)


def test_no_code_is_run(tmp_path):
    """A file that would run code is refused, and so are programs."""
    torch.save({"name": "fcn_small", "weights": Hostile()}, tmp_path / "hostile.pt")
    exported = torch.export.export(nn.Conv2d(3, 2, 1), (torch.rand(1, 3, 8, 8),))
    torch.export.save(exported, tmp_path / "program.pt2")
    for name in ("hostile.pt", "program.pt2"):
        with pytest.raises(SystemExit, match=f"{name} is neither a state dict"):
            fcn.read_weights(tmp_path / name, "fcn_small")
    assert not Path("caught").exists()


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    """Folders that something is wrong with."""
    write_pairs(tmp_path / "pairs")
    write_halves(tmp_path / "pairs", tmp_path / "good", True)
    for name in ("fewer", "more", "mixed", "broken", "twice"):
        write_halves(tmp_path / "pairs", tmp_path / name, True)
    (tmp_path / "fewer" / "3.png").unlink()
    (tmp_path / "good" / "0.png").read_bytes()
    Image.new("RGB", (32, 32)).save(tmp_path / "more" / "stranger.png")
    Image.new("RGB", (64, 32)).save(tmp_path / "mixed" / "2.png")
    (tmp_path / "broken" / "4.png").write_bytes(b"no image")
    Image.new("RGB", (32, 32)).save(tmp_path / "twice" / "1.jpg")
    (tmp_path / "empty").mkdir()
    write_pairs(tmp_path / "alone")
    (tmp_path / "alone" / "test_ids" / "5.png").unlink()
    write_pairs(tmp_path / "coloured")
    Image.new("RGB", (32, 32)).save(tmp_path / "coloured" / "test_ids" / "5.png")
    write_pairs(tmp_path / "no_ids")
    (tmp_path / "no_ids" / "test_ids").rename(tmp_path / "no_ids" / "ids")
    (tmp_path / "no_city" / "gtFine").mkdir(parents=True)
    (tmp_path / "wide").mkdir()
    Image.new("RGB", (64, 32)).save(tmp_path / "wide" / "000.png")
    (tmp_path / "tiny").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "tiny" / "000.png")
    torch.save(small(2).state_dict(), tmp_path / "two.pt")
    torch.save(fcn.build("fcn_small", 2).state_dict(), tmp_path / "two_small.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--samples missing --data pairs", "missing"),
        ("--samples empty --data pairs", "empty"),
        ("--samples fewer --data pairs", "such as 3"),
        ("--samples more --data pairs", "stranger.png"),
        ("--samples mixed --data pairs", "64x32"),
        ("--samples broken --data pairs", "4.png"),
        ("--samples twice --data pairs", "1.jpg"),
        ("--samples good --data nowhere", "nowhere"),
        ("--samples good --data empty", "test_ids"),
        ("--samples good --data no_ids", "test_ids"),
        ("--samples good --data no_city", "labelIds.png"),
        ("--samples good --data alone", "5.png"),
        ("--samples good --data coloured --labels", "5.png"),
        ("--samples wide", "64x32"),
        ("--samples tiny", "16x16"),
        ("--samples good --data pairs --segmenter gone.pt", "gone.pt"),
        ("--samples good --data pairs --segmenter gone.caffemodel", "gone.caffemodel"),
        ("--samples good --data pairs --segmenter good/0.png", "0.png"),
        ("--samples good --data pairs --segmenter two.pt", "two.pt"),
        ("--samples good --data pairs --segmenter two_small.pt", "2 classes"),
        ("--samples good --data pairs --net vgg", "vgg"),
        ("--samples good --data pairs --size 16", "--size"),
        ("--samples good --data pairs --epochs 0", "--epochs"),
        ("--samples good --data pairs --pretrained", "--pretrained"),
        ("--samples good --data pairs --device cuda:77", "cuda:77"),
        ("--data pairs", "--samples"),
    ],
)
def test_bad_arguments(flags, named, place, capsys):
    """One sentence that names what is wrong, and exit status 2."""
    with pytest.raises(SystemExit) as end:
        main(["fcn", *flags.split()])
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1 and named in said
