"""KID, FID, precision and recall: against computations of their own, and against torch-fidelity called by hand."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import gan
from bench import common, digits, fid
from bench.__main__ import main


def some_points(count, dimensions, seed, most=200):
    return np.random.default_rng(seed).integers(0, most, (count, dimensions)).astype(float)


def compare(a, b):
    return fid.compare(torch.from_numpy(a).double(), torch.from_numpy(b).double())


def write_all(folder, images):
    """One PNG for each of uint8 images (N, C, H, W)."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.movedim(0, 2).squeeze().numpy()).save(folder / f"{i:03}.png")


def measure(*flags):
    """The row of --samples."""
    main(["compare", *map(str, flags), "--device", "cpu", "--out", "out"])
    (row,) = json.loads(Path("out", "compare.json").read_text())["rows"]
    return row


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_precision_and_recall_by_hand():
    """Precision is of samples, recall of real images; a ball reaches to the third neighbour."""
    samples, real = some_points(25, 2, 2, 90), some_points(40, 2, 3)

    def covered(points, centres):
        away = np.sqrt(((centres[:, None] - centres) ** 2).sum(2))
        reach = np.sort(away, 1)[:, 3]  # the first is itself
        return (np.sqrt(((points[:, None] - centres) ** 2).sum(2)) <= reach).any(1).mean()

    found = compare(samples, real)
    assert found["precision"] == pytest.approx(covered(samples, real), abs=1e-6)
    assert found["recall"] == pytest.approx(covered(real, samples), abs=1e-6)
    assert found["recall"] < 0.7 < found["precision"]


def test_counts():
    """The smaller set decides on the size of KID's subsets."""
    few, many = some_points(6, 2, 4), some_points(9, 2, 5)
    for a, b in ((few, many), (many, few)):
        row = compare(a, b)
        assert (row["kid_subset"], row["n_samples"], row["n_real"]) == (3, len(a), len(b))


def test_digits(tmp_path, capsys):
    """Digits against themselves are at 0; other digits are nearer to digits than their negatives; all is in the row."""
    images = gan.digits(120, 0)[0]
    for name, some in (("real", images[:60]), ("near", images[60:]), ("far", 255 - images[60:])):
        write_all(tmp_path / name, some)
    row, near, far = (
        measure("--samples", f"ours={name}", "--real", "real", "--features", "toy") for name in ("real", "near", "far")
    )
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


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A file of random weights in the shape of the Inception network."""
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    with torch.random.fork_rng([]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(torch, "load", lambda *args, **others: None)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    torch.save(net.state_dict(), file)
    return file


def test_equal_to_torch_fidelity_by_hand(tmp_path, random_inception):
    """On folders of grey and coloured images; random weights are named by their own hash, and not as Inception."""
    rng = torch.Generator().manual_seed(0)
    for name, low in (("samples", 0), ("real", 60)):
        write_all(tmp_path / name, torch.randint(low, 256, (4, 3, 20, 24), generator=rng, dtype=torch.uint8))
    Image.new("L", (24, 20), 99).save(tmp_path / "samples" / "grey.png")
    row = measure("--samples", "samples", "--real", "real", "--weights", random_inception)
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


def test_known_weights_are_named(random_inception, monkeypatch):
    """By the hash that stands in the name of the file that torch-fidelity publishes."""
    assert f"-{fid.INCEPTION}.pth" in fid.URL_INCEPTION_V3
    monkeypatch.setattr(fid, "file_hash", lambda path: fid.INCEPTION)
    assert fid.inception(random_inception, "cpu")[1:] == ("inception-v3-compat", "6726825d")
