"""The bench's measures, against computations of their own."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import gan
from bench import digits, figures_gan, parzen
from bench.__main__ import main


def write_all(folder, images, names):
    """One PNG for each image."""
    folder.mkdir()
    for image, name in zip(images, names, strict=True):
        Image.fromarray(image.squeeze().numpy()).save(folder / f"{name}.png")


def test_log_likelihood_of_one_sample():
    """One sample is one Gaussian: the closed form."""
    points, sample = torch.rand(7, 5, dtype=torch.float64), torch.rand(1, 5, dtype=torch.float64)
    expected = -((points - sample) ** 2).sum(1) / (2 * 0.3**2) - 5 * math.log(0.3 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(parzen.log_likelihood(points, sample, 0.3), expected, rtol=1e-9, atol=1e-9)


def test_log_likelihood_by_hand():
    """Many samples in many dimensions, computed another way."""
    rng = np.random.default_rng(0)
    points, samples, sigma = rng.random((11, 784)), rng.random((23, 784)), 0.2154
    exponents = -((points[:, None] - samples) ** 2).sum(2) / (2 * sigma**2)
    highest = exponents.max(1)
    summed = highest + np.log(np.exp(exponents - highest[:, None]).sum(1))
    expected = summed - math.log(23) - 784 * math.log(sigma * math.sqrt(2 * math.pi))
    ours = parzen.log_likelihood(torch.from_numpy(points), torch.from_numpy(samples), sigma).numpy()
    assert np.abs(ours - expected).max() < 1e-6


def test_widths():
    """Ten widths from .1 to 1 with equal ratios, as the authors' script has them."""
    expected = [0.1, 0.1292, 0.1668, 0.2154, 0.2783, 0.3594, 0.4642, 0.5995, 0.7743, 1]
    assert pytest.approx(expected, abs=1e-4) == parzen.WIDTHS


def test_width_is_chosen_on_validation_images():
    """The width is the best for the validation images, whatever the test images like; the error is std / sqrt N."""
    samples, valid, test = (gan.digits(count, seed)[0] for count, seed in ((200, 0), (60, 1), (50, 2)))
    sigma, mean, error = parzen.fit(samples, valid, test)
    flat = [images.flatten(1).double() / 255 for images in (samples, valid, test)]
    scores = {width: parzen.log_likelihood(flat[1], flat[0], width).mean().item() for width in parzen.WIDTHS}
    found = parzen.log_likelihood(flat[2], flat[0], sigma)
    assert sigma == max(scores, key=scores.get)
    assert mean == pytest.approx(found.mean().item(), rel=1e-5)
    assert error == pytest.approx(np.std(found.numpy()) / math.sqrt(50), rel=1e-4)


def test_classifier_learns_digits():
    """On few toy digits it is right nearly always, also about others; training moves no global random state."""
    before = torch.get_rng_state()
    net = digits.train_classifier(*gan.digits(3000, 0), epochs=3)
    images, labels = gan.digits(300, 1)
    assert digits.classify(net, images).eq(labels).float().mean() > 0.97
    assert torch.equal(before, torch.get_rng_state())


class Brightest(nn.Module):
    """Sees the digit that the first pixel's value is."""

    def forward(self, x):
        return -((x[:, 0, 0, 0, None] * 255).round() - torch.arange(10)).abs()


def test_counts_of_digits(tmp_path, monkeypatch, capsys):
    """Shares, missing digits and the share drawn as asked, by hand."""
    images = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([1, 1, 3, 9])
    write_all(tmp_path / "samples", images, ["00-1", "01-2", "02-3", "03-9"])
    monkeypatch.setattr(digits, "classifier", lambda args: (Brightest(), 1.0))
    main(["digits", "--samples", str(tmp_path / "samples"), "--out", str(tmp_path / "out.json")])
    row = json.loads((tmp_path / "out.json").read_text())
    assert row["share"] == [0, 0.5, 0, 0.25, 0, 0, 0, 0, 0, 0.25] and row["missing"] == [0, 2, 4, 5, 6, 7, 8]
    assert row["as_asked"] == 0.75 and row["n_samples"] == 4
    assert "as_asked 0.75" in capsys.readouterr().out


def test_parzen_of_a_folder(tmp_path, capsys):
    """The command reads PNGs, warns of few samples, and writes a row with the reference beside it."""
    write_all(tmp_path / "samples", gan.digits(20, 3)[0], range(20))
    main(["parzen", "--samples", str(tmp_path / "samples"), "--out", str(tmp_path / "out.json")])
    row = json.loads((tmp_path / "out.json").read_text())
    assert row["n_samples"] == 20 and math.isfinite(row["log_likelihood"]) and row["of"] == "samples"
    assert math.isfinite(row["log_likelihood_of_training_images"]) and "10000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("parzen --samples missing", "missing"),
        ("parzen --samples empty", "empty"),
        ("parzen", "--samples"),
        ("nonsense --samples empty", "nonsense"),
        ("digits --samples broken", "0.png"),
        ("digits --samples small", "9x9"),
        ("digits --samples empty --data mnist2", "mnist2"),
    ],
)
def test_bad_arguments(flags, named, tmp_path, capsys):
    """One sentence that names what is wrong, and exit status 2."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_text("no image")
    write_all(tmp_path / "small", torch.zeros(1, 1, 9, 9, dtype=torch.uint8), "0")
    with pytest.raises(SystemExit) as end:
        main(flags.split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1 and named in said


def test_density_is_one():
    """The curve of G's density holds the mass of all points, and its mean is theirs."""
    grid = torch.linspace(0, 1, 2001)
    curve = figures_gan.density(torch.tensor([0.3, 0.5, 0.5]), grid)
    assert torch.trapezoid(curve, grid).item() == pytest.approx(1, abs=1e-4)
    assert torch.trapezoid(curve * grid, grid).item() == pytest.approx(1.3 / 3, abs=1e-4)


def test_distance_of_shifted_data():
    """What is the data, shifted, is as far from them as it was moved."""
    levels = (torch.arange(1000) + 0.5) / 1000
    data = torch.distributions.Normal(figures_gan.MEAN, figures_gan.WIDTH).icdf(levels)
    assert figures_gan.distance(data[torch.randperm(1000)]) == pytest.approx(0, abs=1e-6)
    assert figures_gan.distance(data + 0.07) == pytest.approx(0.07, abs=1e-6)


def test_figure_of_gan(tmp_path, monkeypatch):
    """Each moment trains what it names, and the picture has a panel for each."""
    monkeypatch.setattr(figures_gan, "MOMENTS", {"(a)": (2, 0, 1e-3), "(b)": (2, 1e-3, 0)})
    seen = []
    look = figures_gan.look
    monkeypatch.setattr(figures_gan, "look", lambda *given: seen.append(look(*given)) or seen[-1])
    main(["figures", "gan", "--to", str(tmp_path)])
    assert Image.open(tmp_path / "gan-1d.png").size == (500, 270)
    (before, _, _, D), (after, _, _, later) = seen
    assert not torch.equal(before, after) and torch.equal(D, later)


@pytest.mark.parametrize("flags", ["figures", "figures pix2pix", "figures gan --seed -1", "figures gan --nonsense"])
def test_bad_commands(flags, capsys):
    with pytest.raises(SystemExit) as end:
        main(flags.split())
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
