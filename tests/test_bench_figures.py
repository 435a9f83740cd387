"""The figures and the probe of dcgan.py, and the linear classifiers behind them, against computations of their own."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dcgan
import gan
from bench import figures_dcgan, linear
from bench.__main__ import main


def noise(*shape, seed=0):
    """Numbers from -1 to 1, the same in each call."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


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


# -- forgetting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([], ["0000", "0000", "0000", "0000"]),
        ([[0, 0, 28, 28]], ["1111", "1111", "1111", "1111"]),
        ([[7, 0, 21, 7]], ["0110", "0000", "0000", "0000"]),
        ([[4, 4, 10, 10]], ["0000", "0000", "0000", "0000"]),  # the middles are 3.5, 10.5, 17.5 and 24.5
        ([[10, 3, 25, 4], [0, 24, 4, 25]], ["0111", "0000", "0000", "1000"]),
    ],
)
def test_features_inside_boxes(boxes, expected):
    """Those whose middle is in a box."""
    assert figures_dcgan.inside(boxes, 28, 4).tolist() == [[mark == "1" for mark in row] for row in expected]


def test_maps_that_tell_of_places():
    """Exactly those that light up within the marked places; dead ones and those that light up elsewhere do not."""
    marks = torch.zeros(3, 7, 7, dtype=torch.bool)
    marks[0, 1:3, 4:7] = marks[1, 5, :2] = True  # nothing in the third
    light, maps = noise(3, 6, 7, 7).abs() + 0.1, torch.zeros(3, 6, 7, 7)
    for i in (1, 4):
        maps[:, i] = light[:, i] * marks
    for i in (2, 3):
        maps[:, i] = light[:, i] * ~marks
    assert figures_dcgan.find_maps(maps, marks).tolist() == [False, True, False, False, True, False]


@torch.no_grad()
def test_redrawn_samples():
    """Those of G with all maps; without one of them, what weights of zero make of it."""
    torch.manual_seed(0)
    G, z = dcgan.init_weights(dcgan.Generator(28, 1, 5, 10, 4)).eval(), figures_dcgan.codes(10, 3, 6)
    assert torch.equal(z, figures_dcgan.codes(10, 3, 9)[:6])
    for dropped in (torch.zeros(8, dtype=torch.bool), torch.arange(8) == 3):
        found = figures_dcgan.redraw(G, z, dropped)
        G.layers[-5].weight[dropped] = 0
        assert (found.float() - (G(z) * 127.5 + 127.5)).abs().max() < 1


# -- the probe ------------------------------------------------------------------------------------------------------


def test_fit_of_a_square():
    """With a squared loss it is ridge regression, which has a closed form."""
    rng = np.random.default_rng(0)
    x, targets = rng.normal(0.5, 1, (50, 4)), rng.choice([-1.0, 1.0], (50, 2))
    weights, bias = linear.fit(torch.tensor(x).float(), torch.tensor(targets).float(), lambda m: (1 - m) ** 2, 0.3)
    wide, ridge = np.c_[x, np.ones(50)], np.diag([1.0, 1, 1, 1, 0])
    expected = np.linalg.solve(2 * 0.3 * wide.T @ wide + ridge, 2 * 0.3 * wide.T @ targets)
    np.testing.assert_allclose(np.r_[weights.numpy(), bias[None].numpy()], expected, atol=1e-3)


def test_cost_is_chosen_on_validation(monkeypatch):
    """Though another does better on the test split; with `fit` replaced by thresholds that rise with the cost."""
    monkeypatch.setattr(linear, "COSTS", (0.0, 1.0, 2.0, 3.0))
    monkeypatch.setattr(linear, "fit", lambda x, y, loss, cost: (torch.tensor([[0.0, 1]]), torch.tensor([0, -cost])))
    x = {"train": [-1.0, 1, -1, 1], "valid": [0.5, 1.5, 2.5, 3.5], "test": [0.5, 1.5, 2.5, 3.5, 4.5]}
    labels = {"train": [0, 1, 0, 1], "valid": [0, 0, 1, 1], "test": [0, 1, 1, 1, 0]}
    features = {split: 1000 * torch.tensor(found)[:, None] for split, found in x.items()}
    labels = {split: torch.tensor(found) for split, found in labels.items()}
    mean, deviation, cost = linear.probe(features, labels, [torch.arange(4)] * 2)
    assert cost == 2 and mean == pytest.approx(0.6) and deviation == 0


# -- from a run to pictures -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A checkpoint of a small untrained dcgan.py on toy digits; few digits stand for thousands."""
    settings = {"data": "toy", "size": 28, "channels": 1, "ngf": 4, "ndf": 4, "nz": 10, "seed": 0}
    state = dcgan.build(Namespace(**vars(dcgan.get_args(["--device", "cpu", "--precision", "fp32"])) | settings))
    (tmp_path / "run").mkdir()
    networks = {name: state[name].state_dict() for name in "GD"}
    torch.save({"script": "dcgan", "settings": settings, **networks}, tmp_path / "run" / "last.pt")
    monkeypatch.setattr(figures_dcgan, "read_digits", lambda args, split: gan.digits(40, len(split)))
    monkeypatch.setattr(linear, "COSTS", (1e-3,))
    return "run"


def test_figures_of_dcgan(run, tmp_path, capsys):
    """Samples to draw boxes on, or what is left without what was in boxes; what excites D, and the row of the probe."""
    main(["figures", "dcgan", "--run", run, "--to", "figures", "--out", "row.json"])
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["n_test"] == 40 and row["features_trained"] == 16 * (4 + 8) and row["features_pixels"] == 28 * 28
    for name in ("trained", "random", "pixels"):
        assert 0 <= row[f"accuracy_{name}"] <= 1 and 0 <= row[f"few_accuracy_{name}"] <= 1
    (tmp_path / "boxes.json").write_text('{"4": [[4, 8, 20, 24]], "7": [[0, 0, 9, 9], [12, 12, 28, 28]], "9": []}')
    main(["figures", "dcgan", "--run", run, "--to", "figures", "--boxes", "boxes.json"])
    assert "of 8 maps pixels change by" in capsys.readouterr().out
    for name in ("numbered", "guided", "forget"):
        assert np.asarray(Image.open(tmp_path / "figures" / f"dcgan-{name}.png").convert("L")).std() > 5


@pytest.mark.parametrize("text", ["", "{}", '{"3": [[0, 0, 9]]}', '{"3": [[0, 0, 29, 9]]}', '{"3": [[0, 0, 1, 1]]}'])
def test_bad_boxes(text, run, tmp_path):
    """One sentence that names the option."""
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(SystemExit, match="^bench: --boxes"):
        main(["figures", "dcgan", "--run", run, "--boxes", "boxes.json"])
