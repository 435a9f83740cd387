"""KID, FID, precision and recall: against computations of their own, and against torch-fidelity's habits."""

import itertools
import json
import pickle
import random
import urllib.error
from argparse import ArgumentParser, Namespace

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import nn
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import gan
import pix2pix
import text2img
from bench import digits, fcn, fid, shapes
from bench.__main__ import main


class Pixels(nn.Module):
    """Features are the first so many numbers of an image."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, images):
        return images.flatten(1)[:, : self.count].double()


def drawn(points):
    """Points (N, D) of whole numbers as images of one row whose first D numbers they are."""
    images = torch.zeros(len(points), 3, 1, points.shape[1], dtype=torch.uint8)
    images[:, 0, 0] = torch.as_tensor(points).byte()
    return fid.Drawn(images)


def some_points(count, dimensions, seed, most=200):
    return np.random.default_rng(seed).integers(0, most, (count, dimensions))


def write_all(folder, images):
    """One PNG for each of uint8 images (N, C, H, W)."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.movedim(0, 2).squeeze().numpy()).save(folder / f"{i:03}.png")


def arguments(*flags):
    parser = ArgumentParser()
    fid.options(parser)
    return parser.parse_args([*map(str, flags)])


@pytest.fixture
def untrained(monkeypatch):
    """The bench's classifiers as they are before training, the same each time."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        nets = digits.build().eval(), shapes.build().eval()
    monkeypatch.setattr(digits, "classifier", lambda args: (nets[0], 1.0))
    monkeypatch.setattr(shapes, "classifier", lambda args: nets[1])
    return nets


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_fid_of_independent_gaussians():
    """All combinations of +-a around a mean have the covariance a^2 n / (n - 1), of which the closed form is known."""
    means, spreads = ((100, 90, 120, 80), (110, 85, 120, 95)), ((20, 5, 9, 30), (10, 7, 9, 3))
    signs = np.array([*itertools.product((-1, 1), repeat=4)])
    a, b = (np.array(mean) + signs * np.array(spread) for mean, spread in zip(means, spreads))
    expected = 10**2 + 5**2 + 15**2 + (10**2 + 2**2 + 27**2) * 16 / 15
    assert fid.compare(drawn(a), drawn(b), Pixels(4))["fid"] == pytest.approx(expected, rel=1e-9)


def test_fid_of_gaussians_whose_axes_differ():
    """In two dimensions the trace of the root of a product is the root of its trace + 2 root of its determinant."""
    signs = np.array([*itertools.product((-1, 1), repeat=2)])
    a, b = 100 + signs @ np.array([[30, 0], [0, 4]]), 103 + signs @ np.array([[12, 9], [-5, 16]])
    covariance_a, covariance_b = (np.cov(points.T) for points in (a, b))
    product = covariance_a @ covariance_b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = 3**2 + 3**2 + np.trace(covariance_a) + np.trace(covariance_b) - 2 * root
    assert fid.compare(drawn(a), drawn(b), Pixels(2))["fid"] == pytest.approx(expected, rel=1e-9)


def test_kid_by_hand():
    """Sums over pairs, one by one, for the subsets that numpy's generator of seed 2020 chooses."""
    a, b = some_points(30, 5, 0), some_points(41, 5, 1, 220)
    found, rng, expected = fid.compare(drawn(a), drawn(b), Pixels(5)), np.random.RandomState(2020), []
    assert found["kid_subset"] == 15

    def kernel(x, y):
        return (sum(int(p) * int(q) for p, q in zip(x, y)) / 5 + 1) ** 3

    for _ in range(100):
        x, y = (points[rng.choice(len(points), 15, replace=False)] for points in (a, b))
        within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(15) for j in range(15) if i != j)
        across = sum(kernel(p, q) for p in x for q in y)
        expected.append(within / (15 * 14) - 2 * across / 15**2)
    assert found["kid"] == pytest.approx(np.mean(expected), rel=1e-9)
    assert found["kid_std"] == pytest.approx(np.std(expected), rel=1e-9)


def test_precision_and_recall_by_hand():
    """Precision is of samples, recall of real images; a ball reaches to the third neighbour."""
    samples, real = some_points(25, 2, 2, 90), some_points(40, 2, 3)

    def covered(points, centres):
        away = np.sqrt(((centres[:, None] - centres) ** 2).sum(2))
        reach = np.sort(away, 1)[:, 3]  # the first is itself
        return (np.sqrt(((points[:, None] - centres) ** 2).sum(2)) <= reach).any(1).mean()

    found = fid.compare(drawn(samples), drawn(real), Pixels(2))
    assert found["precision"] == pytest.approx(covered(samples, real), abs=1e-6)
    assert found["recall"] == pytest.approx(covered(real, samples), abs=1e-6)
    assert found["recall"] < 0.7 < found["precision"]


@pytest.mark.parametrize(("count", "subset"), [(4, 2), (9, 4), (1000, 500), (1001, 1000)])
def test_subsets_are_smaller_than_the_sets(count, subset, monkeypatch):
    """The size of KID's subsets comes from the smaller set, and stands in the row."""
    monkeypatch.setitem(fid.SETTINGS, "kid_subsets", 1)
    points = some_points(count, 2, 4)
    for a, b in ((points, some_points(1200, 2, 5)), (some_points(1200, 2, 5), points)):
        assert fid.compare(drawn(a), drawn(b), Pixels(2))["kid_subset"] == subset


def test_a_folder_against_itself(tmp_path, untrained, capsys):
    """FID is 0 to 1e-9 where images outnumber features, all are covered, and KID is not above 0."""
    write_all(tmp_path / "a", gan.digits(200, 0)[0])
    flags = "fid --samples a --real a --data toy --features scorer --device cpu --out out.json"
    main(flags.split())
    row = json.loads((tmp_path / "out.json").read_text())
    assert abs(row["fid"]) < 1e-9 and row["kid"] < 0 and row["precision"] == row["recall"] == 1
    assert row["n_samples"] == row["n_real"] == 200 and row["kid_subset"] == 100 and row["resolution"] == "28x28"
    assert row["features"] == "classifier of toy digits" and row["torch_fidelity"] == torch_fidelity.__version__
    assert row["fid_biased"] and row["real"] == "a" and "200 images" in capsys.readouterr().out
    names = [*row]
    assert names.index("kid") < names.index("fid")
    main(flags.split())
    assert json.loads((tmp_path / "out.json").read_text()) == row


def test_worse_samples_are_farther(tmp_path, untrained):
    """Other digits are nearer to digits than their negatives."""
    images = gan.digits(120, 0)[0]
    for name, some in (("real", images[:60]), ("near", images[60:]), ("far", 255 - images[60:])):
        write_all(tmp_path / name, some)
    near, far = (
        fid.measure(arguments("--samples", name, "--real", "real", "--data", "toy", "--features", "scorer"))
        for name in ("near", "far")
    )
    assert far["kid"] > 5 * abs(near["kid"]) and far["fid"] > 5 * near["fid"] and far["recall"] < near["recall"]


def test_scorer_features_are_what_the_last_layer_is_given(untrained):
    """Of one grey channel for digits, of three for shapes; fcn's come from its own module."""
    for data, net, images, some in (
        ("toy", untrained[0], gan.digits(3, 0)[0].expand(-1, 3, -1, -1), slice(1)),
        ("shapes", untrained[1], text2img.shapes(3, 0)[0], slice(3)),
    ):
        found, _ = fid.scorer(Namespace(data=data, samples="x"), (images.shape[3], images.shape[2]))
        torch.testing.assert_close(net[-1](found(images)), net(images[:, some] / 255))


def test_scorer_features_have_a_mean_square_of_one(untrained):
    """Over real images, 1,000 at most of them and from the whole set: for such numbers KID's kernel is made."""
    images = fid.Drawn(gan.digits(130, 0)[0])
    net = fid.scaled(fid.Penultimate(untrained[0], 1), images, "cpu")
    every = torch.stack([images[i] for i in range(130)])
    assert net(every).square().mean().item() == pytest.approx(1, rel=1e-5)
    rising = fid.Drawn(torch.arange(2500).div(10).byte().view(-1, 1, 1, 1))
    chosen = torch.arange(0, 2500, 3).div(10).byte().double()
    assert fid.scaled(Pixels(1), rising, "cpu").scale == pytest.approx(chosen.square().mean().sqrt().item(), rel=1e-9)


@pytest.mark.parametrize(("data", "count", "size"), [("toy", 50, 28), ("shapes", 8000, 64), ("streets", 600, 64)])
def test_real_images_of_data(data, count, size, tmp_path, untrained, monkeypatch):
    """Without --real they are what the scripts train on, and streets are judged by fcn's network."""
    write_all(tmp_path / "samples", torch.zeros(4, 3, size, size, dtype=torch.uint8))
    monkeypatch.setattr(fid, "read_digits", lambda args, split: gan.digits(50, 0 if split == "train" else 1))
    monkeypatch.setattr(text2img, "shapes", lambda count, seed, size: (torch.ones(count, 3, size, size).byte(), seed))
    asked = []
    monkeypatch.setattr(fcn, "features", lambda *given: asked.append(given) or (Pixels(3), "segmenter"))
    compared = []
    monkeypatch.setattr(fid, "compare", lambda *given: compared.append(given) or {"kid": 0, "fid": 0})
    row = fid.measure(arguments("--samples", "samples", "--data", data, "--features", "scorer", "--device", "cpu"))
    samples, real, *_ = compared[0]
    assert len(samples) == 4 and len(real) == row["n_real"] == count and row["real"] == "training images"
    assert real[0].shape == (3, size, size) and real[0].dtype == torch.uint8
    if data == "streets":
        assert asked[0][0].data == "toy" and asked[0][1] == (64, 64) and row["features"] == "segmenter"
        assert torch.equal(real[5], torch.from_numpy(pix2pix.streets(6, 0)[1][5]))


# -- torch-fidelity's habits -----------------------------------------------------------------------------------------


def test_random_states_stay():
    """Python's, numpy's and torch's; and the numbers do not depend on them."""
    a, b = drawn(some_points(20, 3, 0)), drawn(some_points(20, 3, 1))
    found = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()
        found.append(fid.compare(a, b, Pixels(3)))
        assert before[:2] == (random.getstate(), pickle.dumps(np.random.get_state()))
        assert torch.equal(before[2], torch.get_rng_state())
    assert found[0] == found[1]


def test_it_knows_all_that_it_is_given(monkeypatch):
    """It takes any name in silence; its cache and its default of a GPU stay off."""
    given = {}
    calculate = torch_fidelity.calculate_metrics
    monkeypatch.setattr(torch_fidelity, "calculate_metrics", lambda **some: given.update(some) or calculate(**some))
    fid.compare(drawn(some_points(9, 2, 0)), drawn(some_points(9, 2, 1)), Pixels(2))
    assert given.keys() - {"net"} <= DEFAULTS.keys() and "feature_extractor" in given
    assert given["cache"] is False and given["cuda"] is False


def test_nothing_is_kept_between_folders(tmp_path, untrained):
    """A folder whose images have changed is read again."""
    rows = []
    for i in range(2):
        write_all(tmp_path / str(i) / "a", gan.digits(12, i)[0])
        flags = ("--samples", tmp_path / str(i) / "a", "--real", tmp_path / "0" / "a", "--data", "toy")
        rows.append(fid.measure(arguments(*flags, "--features", "scorer")))
    assert abs(rows[0]["fid"]) < 1e-5 < rows[1]["fid"]


# -- images ----------------------------------------------------------------------------------------------------------


def test_images_of_every_kind(tmp_path):
    """Grey and 16-bit ones have three equal channels, what is transparent is white, folders below count, others not."""
    (tmp_path / "a" / "below").mkdir(parents=True)
    Image.new("L", (3, 2), 77).save(tmp_path / "a" / "0.png")
    Image.fromarray(np.full((2, 3), 77 * 257, np.uint16)).save(tmp_path / "a" / "1.png")
    Image.new("RGBA", (3, 2), (9, 9, 9, 0)).save(tmp_path / "a" / "2.webp", lossless=True)
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "a" / "below" / "0.bmp")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    Image.new("RGB", (5, 5)).save(tmp_path / "a" / ".hidden.png")
    images = fid.read_folder("--samples", tmp_path / "a")
    assert [image.shape for image in images] == [(3, 2, 3)] * 4 and images.size == (3, 2)
    assert [images[i].flatten(1)[:, 0].tolist() for i in range(4)] == [[77] * 3, [77] * 3, [255] * 3, [1, 2, 3]]


def test_a_photo_that_a_camera_turned(tmp_path):
    """Upright, it is of another size than its header says, and refused."""
    (tmp_path / "a").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(4):
        Image.new("L", (30, 28)).save(tmp_path / "a" / f"{i}.jpg", exif=turned if i == 3 else b"")
    images = fid.read_folder("--samples", tmp_path / "a")
    assert images[2].shape == (3, 28, 30)
    with pytest.raises(SystemExit, match="3.jpg has 28x30"):
        images[3]


def test_bias_is_said_below_2048_images(tmp_path, untrained, monkeypatch, capsys):
    """The smaller set counts."""
    assert fid.ENOUGH == 2048
    monkeypatch.setattr(fid, "ENOUGH", 6)
    monkeypatch.setattr(fid, "compare", lambda *given: {"kid": 0.0, "fid": 0.0})
    for name, count in (("five", 5), ("six", 6)):
        write_all(tmp_path / name, gan.digits(count, 0)[0])
    for samples, real, biased in (("six", "six", False), ("five", "six", True), ("six", "five", True)):
        main(f"fid --samples {samples} --real {real} --data toy --features scorer --out out.json".split())
        assert ("too high" in capsys.readouterr().out) == biased
        assert json.loads((tmp_path / "out.json").read_text())["fid_biased"] == biased


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--real good", "--samples"),
        ("--samples missing --real good", "missing"),
        ("--samples few --real good", "few"),
        ("--samples good --real few", "--real few"),
        ("--samples mixed --real good", "odd.png"),
        ("--samples good --real mixed", "odd.png"),
        ("--samples good --real wide", "30x28"),
        ("--samples broken --real good", "broken.png"),
        ("--samples cut --real good", "cut.png"),
        ("--samples wide --real wide", "28x28"),
        ("--samples good --real good --data", "--data"),
        ("--samples good --real good --data shapes", "64x64"),
        ("--samples good --data nowhere", "--real"),
        ("--samples good --real good --weights some.pth", "some.pth"),
        ("--samples good --real good --device cuda:99", "cuda:99"),
        ("--samples good --real good --device meta", "meta"),
        ("--samples good --real good --features vgg", "vgg"),
    ],
)
def test_bad_arguments(flags, named, tmp_path, untrained, capsys):
    """One sentence that names what is wrong, and exit status 2."""
    images = gan.digits(6, 0)[0]
    for name in ("good", "mixed", "broken", "cut"):
        write_all(tmp_path / name, images)
    write_all(tmp_path / "few", images[:3])
    write_all(tmp_path / "wide", torch.zeros(4, 1, 28, 30, dtype=torch.uint8))
    Image.new("L", (9, 9)).save(tmp_path / "mixed" / "odd.png")
    (tmp_path / "broken" / "broken.png").write_text("no image")
    whole = (tmp_path / "good" / "000.png").read_bytes()
    (tmp_path / "cut" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit) as end:
        main(f"fid --data toy --features scorer {flags}".split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1 and named in said


# -- the Inception network -------------------------------------------------------------------------------------------


def no_network(*args, **others):
    raise urllib.error.URLError("Name or service not known")


def test_without_weights_it_says_how_to_get_them(tmp_path, monkeypatch, capsys):
    """Without a network one sentence names where they are, how to give them, and the other features."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    write_all(tmp_path / "a", gan.digits(4, 0)[0])
    with pytest.raises(SystemExit) as end:
        main("fid --samples a --real a".split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1
    assert fid.URL_INCEPTION_V3 in said and "--weights" in said and "--features scorer" in said


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return open, ("harmed.txt", "w")


@pytest.mark.parametrize("content", ["text", "empty", "another", "harmful", "missing"])
def test_weights_that_are_none(content, tmp_path, capsys):
    """They are named, nothing in them runs, and no download is tried."""
    write_all(tmp_path / "a", gan.digits(4, 0)[0])
    file = tmp_path / "weights.pth"
    if content == "another":
        torch.save(nn.Linear(2, 2).state_dict(), file)
    elif content == "harmful":
        file.write_bytes(pickle.dumps(Harmful()))
    elif content != "missing":
        file.write_text("no weights" if content == "text" else "")
    with pytest.raises(SystemExit) as end:
        main("fid --samples a --real a --weights weights.pth".split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1 and "weights.pth" in said
    assert not (tmp_path / "harmed.txt").exists()


def test_inception_from_a_file_and_from_the_cache(tmp_path, monkeypatch):
    """Its 2,048 features of uint8 images are those of the weights given; the row tells which these are."""
    with torch.random.fork_rng([]), monkeypatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(torch, "load", lambda *args, **others: None)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        random_net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    cached = tmp_path / "home" / "hub" / "checkpoints" / fid.URL_INCEPTION_V3.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(random_net.state_dict(), cached)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    images = gan.digits(2, 0)[0].expand(-1, 3, -1, -1)
    (expected,) = random_net(images)
    for weights in (cached, None):
        net, name = fid.inception(Namespace(weights=weights))
        assert name == "inception-v3-compat" and fid.digest(net) == fid.digest(random_net)
        found = fid.AnyNetwork("any-network", ["features"], net)(images)
        assert found[0].shape == (2, 2048) and torch.equal(found[0], expected)
    next(iter(random_net.parameters())).data += 1
    assert fid.digest(net) != fid.digest(random_net)
