"""The figure of dcgan.py and the probe of its D, against computations of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dcgan
import gan
from bench import figures_dcgan
from bench.__main__ import main

# -- guided back-propagation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("above", "expected"), [((2, -1, 3), 2), ((-2, 1, -3), 0), ((2, 1, 3), 3), ((2, -1, -3), 2)])
def test_guided_rule_by_hand(above, expected):
    """One pixel, three features of which the last is below zero, and a filter that weighs them."""
    D = nn.Module()
    convolutions = nn.Conv2d(1, 3, 1, bias=False), nn.Conv2d(3, 1, 1, bias=False)
    for layer, weights in zip(convolutions, ((1, 1, -1), above)):
        layer.weight.data = torch.tensor(weights).float().view_as(layer.weight)
    D.layers = nn.Sequential(convolutions[0], nn.LeakyReLU(0.2), convolutions[1], nn.LeakyReLU(0.2), nn.Conv2d(1, 1, 1))
    assert figures_dcgan.guide(D, torch.ones(1, 1, 1, 1), 0).item() == pytest.approx(expected)


# -- the probe ------------------------------------------------------------------------------------------------------


def test_svm_by_gradient():
    """At its weights the gradient of the objective, which is convex, is 0."""
    rng, cost = np.random.default_rng(0), 0.3
    x = rng.normal(0.5, 1, (50, 4))
    targets = np.sign(x[:, :2] - 0.5 + rng.normal(0, 0.5, (50, 2)))
    weights, bias = figures_dcgan.fit(torch.tensor(x).float(), torch.tensor(targets).float(), cost)
    hinge = np.maximum(1 - targets * (x @ weights.numpy() + bias.numpy()), 0)
    slope = -2 * cost * targets * hinge
    np.testing.assert_allclose(weights.numpy() + x.T @ slope, 0, atol=1e-2)
    np.testing.assert_allclose(slope.sum(0), 0, atol=1e-2)
    assert (hinge > 0).any() and (hinge == 0).any()


def test_cost_is_chosen_on_validation(monkeypatch):
    """Though another does better on the test split; with `fit` replaced by thresholds that rise with the cost."""
    seen = []

    def fit(x, targets, cost):
        seen.append(targets.argmax(1).tolist())
        weights, bias = torch.zeros(1, 10), torch.full((10,), -9.0)
        weights[0, 1], bias[:2] = 1, torch.tensor([0, -cost])
        return weights, bias

    monkeypatch.setattr(figures_dcgan, "COSTS", (0.0, 1.0, 2.0, 3.0))
    monkeypatch.setattr(figures_dcgan, "fit", fit)
    x = {"train": [-1.0, 1, -1, 1, 1], "valid": [0.5, 1.5, 2.5, 3.5], "test": [0.5, 1.5, 2.5, 3.5, 4.5]}
    labels = {"train": [0, 1, 0, 1, 1], "valid": [0, 0, 1, 1], "test": [0, 1, 1, 1, 0]}
    features = {split: 1000 * torch.tensor(found)[:, None] for split, found in x.items()}
    labels = {split: torch.tensor(found) for split, found in labels.items()}
    assert figures_dcgan.probe(features, labels, 1) == (pytest.approx(0.6), 2)
    assert seen == [[0, 1]] * 4  # one example of each
    figures_dcgan.probe(features, labels, None)
    assert seen[-1] == [0, 0, 1, 1, 1]


def test_figures_of_dcgan(tmp_path, monkeypatch):
    """By a small untrained run on a few digits: the picture of what excites D, and the row of the probe."""
    args = dcgan.get_args("--ngf 4 --ndf 4 --nz 10 --device cpu --precision fp32".split())
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    D = dcgan.build(args)["D"].state_dict()
    (tmp_path / "run").mkdir()
    torch.save({"script": "dcgan", "settings": settings, "D": D}, tmp_path / "run" / "last.pt")
    monkeypatch.setattr(figures_dcgan, "read_digits", lambda data, data_root, split: gan.digits(40, len(split)))
    monkeypatch.setattr(figures_dcgan, "COSTS", (1e-3,))
    main("figures dcgan --run run --to figures --out row.json".split())
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["n_test"] == 40 and row["features_trained"] == 16 * (4 + 8) and row["features_pixels"] == 28 * 28
    for name in ("trained", "random", "pixels"):
        assert 0 <= row[f"accuracy_{name}"] <= 1 and 0 <= row[f"few_accuracy_{name}"] <= 1
    assert np.asarray(Image.open(tmp_path / "figures" / "dcgan-guided.png").convert("L")).std() > 5
    with pytest.raises(SystemExit, match="last.pt"):
        main("figures dcgan --run nothing".split())
