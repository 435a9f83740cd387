"""The bench's measures of digits and its figure of GAN, against computations of their own; what commands refuse."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import gan
from bench import digits, figures_gan, parzen
from bench.__main__ import main


def write_all(folder, images, names):
    """One PNG for each image."""
    folder.mkdir()
    for image, name in zip(images, names, strict=True):
        Image.fromarray(image.squeeze().numpy()).save(folder / f"{name}.png")


def test_log_likelihood_by_hand():
    """Many samples in many dimensions, computed another way."""
    rng = np.random.default_rng(0)
    points, samples, sigma = rng.random((11, 784)), rng.random((23, 784)), 0.2154
    exponents = -((points[:, None] - samples) ** 2).sum(2) / (2 * sigma**2)
    highest = exponents.max(1)
    summed = highest + np.log(np.exp(exponents - highest[:, None]).sum(1))
    expected = summed - math.log(23) - 784 * math.log(sigma * math.sqrt(2 * math.pi))
    (ours,) = parzen.log_likelihoods(torch.from_numpy(points), torch.from_numpy(samples), [sigma])
    assert np.abs(ours.numpy() - expected).max() < 1e-6


def test_width_is_chosen_on_validation_images():
    """The best of ten for the validation images, whatever the test images like; the error is std / sqrt N."""
    expected = [0.1, 0.1292, 0.1668, 0.2154, 0.2783, 0.3594, 0.4642, 0.5995, 0.7743, 1]  # the authors' script
    assert pytest.approx(expected, abs=1e-4) == parzen.WIDTHS
    samples, valid, test = (gan.digits(count, seed)[0] for count, seed in ((200, 0), (60, 1), (50, 2)))
    sigma, mean, error = parzen.fit(samples, valid, test)
    flat = [images.flatten(1).double() / 255 for images in (samples, valid, test)]
    scores = parzen.log_likelihoods(flat[1], flat[0], parzen.WIDTHS).mean(1)
    (found,) = parzen.log_likelihoods(flat[2], flat[0], [sigma])
    assert sigma == parzen.WIDTHS[scores.argmax()] and mean == pytest.approx(found.mean().item(), rel=1e-5)
    assert error == pytest.approx(np.std(found.numpy()) / math.sqrt(50), rel=1e-4)


def test_classifier_knows_digits():
    """The one that comes with the bench."""
    images, labels = gan.digits(300, 1)
    assert digits.classify(digits.classifier("toy", None), images).eq(labels).float().mean() > 0.97


def test_classifier_is_trained_once(tmp_path):
    """It learns from examples if its file is not there."""
    net = digits.load(tmp_path / "net.pt", 1, 10, lambda: gan.digits(2000, 0), epochs=2)
    images, labels = gan.digits(300, 1)
    assert digits.classify(net, images).eq(labels).float().mean() > 0.9
    again = digits.load(tmp_path / "net.pt", 1, 10, None)
    assert torch.equal(digits.classify(again, images), digits.classify(net, images))


def test_counts_of_digits(tmp_path, monkeypatch, capsys):
    """Shares, missing digits and the share drawn as asked, by hand; a digit is what the first pixel's value is."""

    def brightest(x):
        return -((x[:, 0, 0, 0, None] * 255).round() - torch.arange(10)).abs()

    images = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([1, 1, 3, 9])
    write_all(tmp_path / "samples", images, ["00-1", "01-2", "02-3", "03-9"])
    monkeypatch.setattr(digits, "classifier", lambda *args: brightest)
    main(["digits", "--samples", str(tmp_path / "samples"), "--out", str(tmp_path / "out.json")])
    row = json.loads((tmp_path / "out.json").read_text())
    assert row["share"] == [0, 0.5, 0, 0.25, 0, 0, 0, 0, 0, 0.25] and row["missing"] == [0, 2, 4, 5, 6, 7, 8]
    assert row["as_asked"] == 0.75 and row["n_samples"] == 4 and row["uneven"] == pytest.approx(0.7)
    assert "as_asked 0.75" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("parzen --samples missing", "missing"),
        ("digits", "--samples"),
        ("digits --samples broken", "0.png"),
        ("digits --samples empty --data mnist2", "mnist2"),
        ("tables nonsense", "nonsense"),
        ("tables losses --data mnist", "mnist"),
        ("tables --seeds many", "--seeds"),
        ("tables --device nonsense", "nonsense"),
        ("report --results missing", "missing"),
        ("curves missing", "missing"),
        ("figures pix2pix", "figures pix2pix"),
    ],
)
def test_bad_arguments(flags, named, tmp_path):
    """One sentence that names what is wrong."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_text("no image")
    with pytest.raises(SystemExit) as end:
        main(flags.split())
    assert named in end.value.code and "\n" not in end.value.code


def test_figure_of_gan(tmp_path, monkeypatch):
    """The curve of G's density holds the mass of all points, and its mean is theirs; the picture has all its panels."""
    grid = torch.linspace(0, 1, 2001)
    curve = figures_gan.density(torch.tensor([0.3, 0.5, 0.5]), grid)
    assert torch.trapezoid(curve, grid).item() == pytest.approx(1, abs=1e-4)
    assert torch.trapezoid(curve * grid, grid).item() == pytest.approx(1.3 / 3, abs=1e-4)
    monkeypatch.setattr(figures_gan, "MOMENTS", {"(a)": (2, 0, 1e-3), "(b)": (2, 1e-3, 0)})
    main(["figures", "gan", "--to", str(tmp_path)])
    assert len(set(Image.open(tmp_path / "gan-1d.png").convert("RGB").get_flattened_data())) > 10


@pytest.mark.parametrize("command", [[], ["tables"], ["speed"], ["report"], ["curves"], ["digits"], ["parzen"]])
def test_help_fits_a_screen(command, capsys):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert not end.code
    assert 5 < len(capsys.readouterr().out.splitlines()) <= 40
