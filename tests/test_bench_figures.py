"""The figures and the probe of dcgan.py, and the linear classifiers behind them, against computations of their own."""

import contextlib
import io
import json
import math
import re
from argparse import Namespace
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROWS, pictures, run_main
from torch import nn
from torch.nn import functional as F

import dcgan
import gan
from bench import figures_dcgan, linear
from bench.__main__ import main

DCGAN = next(row for row in ROWS if row.name == "dcgan")
COUNTS = {"train": 60, "valid": 30, "test": 24}
BOXES = {4: [[4, 8, 20, 24]], 7: [[0, 0, 9, 9], [12, 12, 28, 28]], 9: []}


def noise(*shape, seed=0):
    """Numbers from -1 to 1, the same in each call."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def unsettled(net, seed=0):
    """A network with averages, gains and biases unlike those that batch norm starts with."""
    rng = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=rng)
            layer.running_var.uniform_(0.1, 0.5, generator=rng)
            nn.init.normal_(layer.weight, 1, 0.2, generator=rng)
            nn.init.normal_(layer.bias, 0, 0.2, generator=rng)
    return net.eval()


def discriminator(*shape, seed=0):
    torch.manual_seed(seed)
    return unsettled(dcgan.Discriminator(*shape), seed)


def generator(*shape, seed=0):
    torch.manual_seed(seed)
    return unsettled(dcgan.Generator(*shape), seed)


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


@torch.no_grad()
def before_leaky(D, x):
    """What both LeakyReLUs of a D for 28 pixels are given, and the factor of its batch norm."""
    first, _, second, norm, *_ = D.layers
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None]
    low = F.conv2d(x, first.weight, stride=2, padding=first.padding)
    high = F.conv2d(leaky(low), second.weight, stride=2, padding=second.padding)
    return low, (high - norm.running_mean[:, None, None]) * gain + norm.bias[:, None, None], gain


@torch.no_grad()
def guided(D, x, filter):
    """The rule of guided back-propagation, written out for a D for 28 pixels, and the most excited places."""
    low, high, gain = before_leaky(D, x)
    place = high[:, filter].flatten(1).argmax(1)
    slope = torch.zeros_like(high)
    slope[range(len(x)), filter, place // 7, place % 7] = 1
    slope = slope * (high > 0) * gain
    for layer, given in ((D.layers[2], low), (D.layers[0], None)):
        kernel = layer.kernel_size[0]
        slope = F.conv_transpose2d(slope, layer.weight, stride=2, padding=(kernel - 1) // 2, output_padding=kernel - 4)
        slope = slope if given is None else slope.clamp(min=0) * (given > 0)
    return slope, torch.stack([place // 7, place % 7], 1)


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


@pytest.mark.parametrize("kernel", [4, 5])
@pytest.mark.parametrize("filter", [0, 3, 7])
def test_guided_gradients(kernel, filter):
    """Those of the rule written out, whatever other images there are."""
    D, x = discriminator(28, 1, kernel, 4), noise(20, 1, 28, 28)
    expected, _ = guided(D, x, filter)
    found = figures_dcgan.guide(D, x, filter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert expected.flatten(1).any(1).sum() > 3
    torch.testing.assert_close(torch.cat([figures_dcgan.guide(D, one, filter) for one in x.split(1)]), found)


@pytest.mark.parametrize(("kernel", "first", "last"), [(4, -3, 6), (5, -6, 6)])
def test_guided_gradients_are_local(kernel, first, last):
    """Nothing but what the most excited place sees has a gradient."""
    D, x = discriminator(28, 1, kernel, 4), noise(20, 1, 28, 28, seed=1)
    _, places = guided(D, x, 2)
    assert len(set(map(tuple, places.tolist()))) > 10
    seen = 0
    for slope, (row, column) in zip(figures_dcgan.guide(D, x, 2), (4 * places).tolist()):
        rows, columns = (slice(max(0, at + first), at + last + 1) for at in (row, column))
        seen += slope[:, rows, columns].abs().sum().item() > 0
        slope[:, rows, columns] = 0
        assert not slope.any()
    assert seen > 10


def test_exciting_images():
    """For each filter the images with the highest activation anywhere, best first, each beside its gradient."""
    D, x = discriminator(28, 1, 5, 4), noise(520, 1, 28, 28)
    sheet = figures_dcgan.exciting(D, x, filters=3, count=4)
    assert sheet.shape == (24, 1, 28, 28) and sheet.min() >= 0 and sheet.max() <= 1
    highest = before_leaky(D, x)[1].amax((2, 3))
    for filter, row in enumerate(sheet.split(8)):
        best = x[np.argsort(-highest[:, filter].numpy())[:4].copy()]
        torch.testing.assert_close(row[::2], (best + 1) / 2)
        slope, _ = guided(D, best, filter)
        assert slope.flatten(1).any(1).all()
        largest = slope.abs().amax((1, 2, 3), keepdim=True)
        torch.testing.assert_close(row[1::2], (slope / largest + 1) / 2, rtol=1e-4, atol=1e-5)


# -- forgetting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([], ["0000", "0000", "0000", "0000"]),
        ([[0, 0, 28, 28]], ["1111", "1111", "1111", "1111"]),
        ([[7, 0, 21, 7]], ["0110", "0000", "0000", "0000"]),
        ([[3, 10, 4, 25]], ["0000", "1000", "1000", "1000"]),
        ([[11, 25, 27, 28]], ["0000", "0000", "0000", "0000"]),  # the middles are 3.5, 10.5, 17.5 and 24.5
        ([[4, 4, 10, 10]], ["0000", "0000", "0000", "0000"]),
        ([[10, 3, 25, 4], [0, 24, 4, 25]], ["0111", "0000", "0000", "1000"]),
    ],
)
def test_features_inside_boxes(boxes, expected):
    """Those whose middle is in a box."""
    assert figures_dcgan.inside(boxes, 28, 4).tolist() == [[mark == "1" for mark in row] for row in expected]


def test_pixels_inside_boxes():
    """A box holds its left and top pixels, and ends before right and bottom."""
    expected = torch.zeros(28, 28, dtype=torch.bool)
    expected[5:9, 2:20] = expected[0:1, 27:28] = True
    assert torch.equal(figures_dcgan.inside([[2, 5, 20, 9], [27, 0, 28, 1]], 28, 28), expected)


def test_boxes_are_read(tmp_path):
    """Numbers come as such, in the order of the file; a sample may have many boxes, or none."""
    (tmp_path / "boxes.json").write_text('{"12": [[0, 0, 28, 28], [3, 4, 5, 6]], "99999": [], "0": [[27, 27, 28, 28]]}')
    boxes = figures_dcgan.read_boxes(tmp_path / "boxes.json", 28)
    assert list(boxes.items()) == [(12, [[0, 0, 28, 28], [3, 4, 5, 6]]), (99999, []), (0, [[27, 27, 28, 28]])]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "3",
        "[[0, 0, 9, 9]]",
        "{}",
        '{"3": []}',
        '{"3": null}',
        '{"three": [[0, 0, 9, 9]]}',
        '{"-1": [[0, 0, 9, 9]]}',
        '{"100000": [[0, 0, 9, 9]]}',
        '{"3": [0, 0, 9, 9]}',
        '{"3": [[0, 0, 9]]}',
        '{"3": [[0, 0, 9, 9, 9]]}',
        '{"3": [["0", "0", "9", "9"]]}',
        '{"3": [[-1, 0, 9, 9]]}',
        '{"3": [[0, -1, 9, 9]]}',
        '{"3": [[0, 0, 29, 9]]}',
        '{"3": [[0, 0, 9, 29]]}',
        '{"3": [[9, 0, 9, 9]]}',
        '{"3": [[0, 9, 9, 8]]}',
        '{"3": [[0, 0, NaN, 9]]}',
        '{"3": [[0, 0, 9, 9], [0, 0, 0, 0]]}',
        '{"3": [[2, 2, 2.1, 2.1]]}',  # which cannot be drawn
        b"\xff\xfe\x00",
        None,
    ],
)
def test_bad_boxes(text, tmp_path):
    """One sentence, which names the option and the file."""
    if text is not None:
        (tmp_path / "boxes.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as end:
        figures_dcgan.read_boxes(tmp_path / "boxes.json", 28)
    said = end.value.code
    assert said.startswith("bench: --boxes") and "boxes.json" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_maps_that_tell_of_places(seed):
    """Exactly those that light up within the marked places; dead ones and those that light up elsewhere do not."""
    marks = torch.zeros(3, 7, 7, dtype=torch.bool)
    marks[0, 1:3, 4:7] = marks[1, 5, :2] = True  # nothing in the third
    light = noise(3, 6, 7, 7).abs() + 0.1
    maps = torch.zeros(3, 6, 7, 7)
    for i in (1, 4):
        maps[:, i] = light[:, i] * marks
    for i in (2, 3):
        maps[:, i] = light[:, i] * ~marks
    assert figures_dcgan.find_maps(maps, marks, seed).tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize(("size", "channels", "side"), [(28, 1, 7), (64, 3, 16)])
@torch.no_grad()
def test_redrawn_samples(size, channels, side):
    """dcgan.py's own with all maps, one and the same with none; without one map, what weights of zero make of it."""
    G, args = generator(size, channels, 5, 10, 4), Namespace(bf16=False, nz=10, device="cpu")
    z = dcgan.codes(args, 3, 6)
    maps, nothing = figures_dcgan.maps_of(G, z), torch.zeros(8, dtype=torch.bool)
    assert maps.shape == (6, 8, side, side) and maps.min() == 0
    whole = dcgan.draw(args, G, z)
    assert torch.equal(figures_dcgan.redraw(G, maps, nothing), whole) and not torch.equal(whole[0], whole[1])
    empty = figures_dcgan.redraw(G, maps, ~nothing)
    assert torch.equal(empty, empty[:1].expand_as(empty)) and empty.shape == whole.shape
    dropped = nothing.clone()
    dropped[3] = True
    without = deepcopy(G)
    without.layers[-5].weight[3] = 0
    expected = dcgan.draw(args, without, z)
    assert not torch.equal(expected, whole)
    for found, wanted in zip(figures_dcgan.redrawn(G, z, dropped), (whole, expected)):
        assert (found.int() - wanted).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_outlined_boxes(channels):
    """Images four times as large, with a red line along the inner edge of a box."""
    images = (noise(2, channels, 8, 8).abs() * 255).byte()
    expected = images.numpy().repeat(4, 2).repeat(4, 3).repeat(3 // channels, 1)
    for rows, columns in ((8, slice(4, 16)), (23, slice(4, 16)), (slice(8, 24), 4), (slice(8, 24), 15)):
        expected[1, :, rows, columns] = np.array([255, 0, 0]).reshape(3, 1)
    found = figures_dcgan.outlined(images, [[], [[1, 2, 4, 6]]])
    torch.testing.assert_close(found, torch.from_numpy(expected).float() / 255)


# -- the probe ------------------------------------------------------------------------------------------------------


def test_pooled_features():
    """The highest of each of 4x4 windows, which overlap where the side is no multiple of 4, layer by layer."""
    D, x = discriminator(28, 1, 5, 3), noise(501, 1, 28, 28)
    columns = []
    for given, windows in zip(
        before_leaky(D, x), ([(0, 4), (3, 7), (7, 11), (10, 14)], [(0, 2), (1, 4), (3, 6), (5, 7)])
    ):
        maps = leaky(given).numpy()
        columns += [
            maps[:, i, top:bottom, left:right].max((1, 2))
            for i in range(maps.shape[1])
            for top, bottom in windows
            for left, right in windows
        ]
    found = figures_dcgan.pooled(D, x)
    assert found.shape == (501, 16 * (3 + 6))
    torch.testing.assert_close(found, torch.from_numpy(np.stack(columns, 1)), rtol=1e-4, atol=1e-5)


def test_averages_of_a_random_D():
    """The plain mean over batches of 500 of each batch's mean and variance, where all norms see the batch."""
    torch.manual_seed(0)
    D = dcgan.init_weights(dcgan.Discriminator(32, 1, 5, 3))
    x = noise(700, 1, 32, 32)
    batches = x.double().split(500)
    slow = deepcopy(D).double()
    expected = {3: [], 6: []}
    with torch.no_grad():
        for some in batches:
            for i, layer in enumerate(slow.layers[:-1]):
                if i in expected:
                    mean, var = some.mean((0, 2, 3)), some.var((0, 2, 3), correction=0)
                    count = some.numel() / some.shape[1]
                    expected[i].append(torch.stack([mean, var * count / (count - 1)]))
                    some = (some - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
                    some = some * layer.weight[:, None, None] + layer.bias[:, None, None]
                else:
                    some = layer(some)
    before = [weight.clone() for weight in D.parameters()]
    assert figures_dcgan.average(D, x) is D and not any(part.training for part in D.modules())
    for i, found in expected.items():
        assert len(found) == 2 and not torch.allclose(*found, rtol=1e-3)
        ours = torch.stack([D.layers[i].running_mean, D.layers[i].running_var]).double()
        torch.testing.assert_close(ours, sum(found) / 2, rtol=1e-4, atol=1e-7)
    assert all(map(torch.equal, before, D.parameters()))


def test_probe_of_figures(tmp_path, monkeypatch, capsys):
    """Each network's features give its own columns: one that sees all is always right, a blind one by chance."""
    labels = {split: torch.arange(count) % 4 for split, count in (("train", 40), ("valid", 8), ("test", 20))}
    x = {split: F.one_hot(found, 4).float()[:, None, None] for split, found in labels.items()}
    monkeypatch.setattr(figures_dcgan, "pooled", lambda D, x: torch.cat([D * x.flatten(1), torch.ones(len(x), 1)], 1))
    args = Namespace(folder=tmp_path / "run", data="toy", out=tmp_path / "out.json")
    figures_dcgan.probe(args, {"trained": 1, "random": 0}, x, labels, few=2, repeats=3)
    row = json.loads((tmp_path / "out.json").read_text())
    told = {"measure": "probe", "run": "run", "data": "toy", "n_train": 40, "n_valid": 8, "n_test": 20}
    told |= {"few_per_class": 2, "repeats": 3, "features_trained": 5, "features_random": 5, "features_pixels": 4}
    assert row | told == row
    for name, accuracy in (("trained", 1), ("random", 0.25), ("pixels", 1)):
        assert row[f"accuracy_{name}"] == row[f"few_accuracy_{name}"] == accuracy
        assert row[f"few_deviation_{name}"] == 0 and {row[f"cost_{name}"], row[f"few_cost_{name}"]} <= {*linear.COSTS}
    assert "accuracy_random 0.25, " in capsys.readouterr().out


# -- linear classifiers ---------------------------------------------------------------------------------------------


def test_losses_by_hand():
    margins = torch.tensor([-1.0, 0.0, 0.5, 1.0, 3.0])
    assert linear.squared_hinge(margins).tolist() == [4, 1, 0.25, 0, 0]
    assert linear.logistic(margins).tolist() == pytest.approx([math.log(1 + math.exp(-m)) for m in margins.tolist()])


def points(count, features, classes, seed=0):
    """Points and targets +-1 that no line separates."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0.5, 1, (count, features))
    return x, np.where(x[:, :classes] + rng.normal(0, 1, (count, classes)) > 0.7, 1.0, -1.0)


def test_fit_of_a_square():
    """With a squared loss it is ridge regression, which has a closed form."""
    x, targets = points(50, 4, 2)
    weights, bias = linear.fit(torch.tensor(x).float(), torch.tensor(targets).float(), lambda m: (1 - m) ** 2, 0.3)
    wide, ridge = np.c_[x, np.ones(50)], np.diag([1.0, 1, 1, 1, 0])
    expected = np.linalg.solve(2 * 0.3 * wide.T @ wide + ridge, 2 * 0.3 * wide.T @ targets)
    np.testing.assert_allclose(np.r_[weights.numpy(), bias[None].numpy()], expected, atol=1e-3)


SLOPES = {"squared_hinge": lambda m: -2 * np.maximum(1 - m, 0), "logistic": lambda m: -1 / (1 + np.exp(m))}


@pytest.mark.parametrize("cost", [1e-3, 0.1, 1])
@pytest.mark.parametrize("name", SLOPES)
def test_fit_is_at_the_minimum(name, cost):
    """The slope of a convex objective, by its formula, has gone."""
    x, targets = points(80, 5, 3)

    def slope(weights, bias):
        outer = cost * SLOPES[name](targets * (x @ weights + bias)) * targets
        return np.abs(np.r_[weights + x.T @ outer, outer.sum(0, keepdims=True)]).max()

    found = linear.fit(torch.tensor(x).float(), torch.tensor(targets).float(), getattr(linear, name), cost)
    weights, bias = (part.double().numpy() for part in found)
    assert not any(part.requires_grad for part in found)
    assert slope(weights, bias) < 1e-3 * slope(np.zeros((5, 3)), np.zeros(3))


def test_fit_of_separable_points():
    """Three heaps far from each other are told apart, near points of them too."""
    labels = torch.arange(30) % 3
    heaps = torch.tensor([[0.0, 9.0], [9.0, 0.0], [-9.0, -9.0]])
    model = linear.fit(heaps[labels] + noise(30, 2), 2.0 * F.one_hot(labels) - 1, linear.squared_hinge, 1.0)
    assert linear.accuracy(model, heaps[labels] + noise(30, 2, seed=1), labels) == 1
    assert linear.accuracy(model, heaps[labels], (labels + (torch.arange(30) < 12)) % 3) == pytest.approx(0.6)


def test_subsets():
    """So many of each class, or all there are, at random, the same in each call and whatever the global seed."""
    labels = torch.tensor([5] * 20 + [7] * 30 + [2] * 3)[torch.randperm(53, generator=torch.Generator().manual_seed(0))]
    torch.manual_seed(1)
    found = linear.subsets(labels, 4, 6)
    for some in found:
        assert len(set(some.tolist())) == len(some)
        assert sorted(labels[some].tolist()) == [2] * 3 + [5] * 4 + [7] * 4
    assert len({tuple(sorted(some.tolist())) for some in found}) == 6
    torch.manual_seed(2)
    assert all(map(torch.equal, found, linear.subsets(labels, 4, 6)))
    assert not all(map(torch.equal, found, linear.subsets(labels, 4, 6, seed=1)))


@pytest.fixture
def thresholds(monkeypatch):
    """A stand-in for `fit`: is x above the number of the cost times the squared mean |x| of the choice?"""

    def fit(x, targets, loss, cost):
        assert loss is linear.squared_hinge and targets.tolist() == [
            [-1.0, 1.0] if one > 0 else [1.0, -1.0] for one in x
        ]
        return torch.tensor([[0.0, 1.0]]), torch.tensor([0, -linear.COSTS.index(cost) * x.abs().mean() ** 2])

    monkeypatch.setattr(linear, "COSTS", (1e-3, 1e-2, 1e-1, 1))
    monkeypatch.setattr(linear, "fit", fit)


@pytest.mark.parametrize("scale", [1, 1000])
def test_cost_is_chosen_on_validation(scale, thresholds):
    """Though another does better on the test split; features are first divided by the root mean square of "train"."""
    x = {"train": [-1.0, 1, -1, 1], "valid": [0.5, 1.5, 2.5, 3.5], "test": [0.5, 1.5, 2.5, 3.5, 4.5]}
    labels = {"train": [0, 1, 0, 1], "valid": [0, 0, 1, 1], "test": [0, 1, 1, 1, 0]}
    mean, deviation, cost = linear.probe(
        {split: torch.tensor(found)[:, None] * scale for split, found in x.items()},
        {split: torch.tensor(found) for split, found in labels.items()},
        [torch.arange(4)],
    )
    assert cost == 1e-1 and mean == pytest.approx(0.6) and deviation == 0


def test_probe_is_the_mean_over_choices(thresholds):
    """And so is the score on the validation split; the deviation is that of the choices' test accuracies."""
    x = {"train": [-0.5, 0.5, -1.0, 1.0, -(1.75**0.5), 1.75**0.5], "valid": [0.6, 0.7, 1.5, 1.8]}
    x = {split: torch.tensor(found)[:, None] for split, found in (x | {"test": [0.6, 0.9, 1.2, 1.5]}).items()}
    labels = {"train": torch.tensor([0, 1] * 3), "valid": torch.tensor([0, 0, 1, 1]), "test": torch.tensor([1] * 4)}
    mean, deviation, cost = linear.probe(x, labels, [torch.tensor(some) for some in ([0, 1], [2, 3], [4, 5])])
    assert cost == 1e-2  # the first choice alone would be best at 1
    assert mean == pytest.approx(0.5) and deviation == pytest.approx(np.std([1, 0.5, 0]))


@pytest.mark.parametrize("right", [1, 2, 9])
def test_accuracies_are_exact(right, thresholds):
    """Equal ones deviate by nothing, and their mean is one of them."""
    x = {split: torch.tensor([[-1.0], [1.0]] * 5) for split in ("train", "valid", "test")}
    labels = {split: (found[:, 0] > 0).long() for split, found in x.items()}
    labels["test"] = labels["test"] ^ (torch.arange(10) >= right)
    mean, deviation, cost = linear.probe(x, labels, [torch.arange(10)] * 10)
    assert cost == 1e-3 and mean == pytest.approx(right / 10, rel=1e-9) and deviation < 1e-9


# -- from a run to pictures -----------------------------------------------------------------------------------------


def few_digits(args, split):
    """Stands for what reads thousands."""
    assert args.data == "toy"
    return gan.digits(COUNTS[split], len(split))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs of two updates: toy digits, colour at 28 pixels, grey at 32; and what is no run, or no boxes."""
    home = tmp_path_factory.mktemp("runs")
    pictures(home / "photos")
    photos = ["--data", home / "photos", "--channels"]
    for name, flags in {"toy": ["--lr", 0.1], "colour": [*photos, 3], "large": [*photos, 1, "--size", 32]}.items():
        assert run_main(DCGAN, *DCGAN.tiny.split(), *flags, "--run", home / name, "--max-steps", 2) == 0
    for name in ("empty", "broken", "other"):
        (home / name).mkdir()
    (home / "broken" / "last.pt").write_text("no checkpoint")
    torch.save({"script": "gan", "version": 1}, home / "other" / "last.pt")
    (home / "boxes.json").write_text(json.dumps(BOXES))
    (home / "small.json").write_text('{"0": [[0, 0, 1, 1]]}')
    (home / "whole.json").write_text('{"0": [[0, 0, 28, 14], [0, 14, 28, 28]]}')
    (home / "wide.json").write_text('{"0": [[0, 0, 29, 28]]}')
    return home


@pytest.fixture(scope="module")
def painted(runs):
    """What `figures dcgan` painted, wrote and said of the run of toy digits."""
    flags = ["--run", runs / "toy", "--seed", 5, "--to", runs / "figures", "--out", runs / "results" / "out.json"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(figures_dcgan, "read_digits", few_digits)
        patch.setattr(linear, "COSTS", (1e-3, 1e-2))
        main(["figures", "dcgan", *map(str, flags)])
    row = json.loads((runs / "results" / "out.json").read_text())
    return SimpleNamespace(row=row, said=said.getvalue(), folder=runs / "figures")


@pytest.fixture(scope="module")
def forgotten(runs):
    """With --boxes: the marks and the maps that were found by them, the sheet, and what was said."""
    calls, find_maps = [], figures_dcgan.find_maps
    flags = ["--run", runs / "toy", "--boxes", runs / "boxes.json", "--to", runs / "forgotten"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(
            figures_dcgan, "find_maps", lambda *given: calls.append((given, find_maps(*given))) or calls[-1][1]
        )
        patch.setattr(figures_dcgan, "read_digits", few_digits)
        patch.setattr(figures_dcgan, "probe", lambda *given: None)
        main(["figures", "dcgan", *map(str, flags)])
    (((_, marks, _), dropped),) = calls
    with Image.open(runs / "forgotten" / "dcgan-forget.png") as sheet:
        return SimpleNamespace(marks=marks, dropped=dropped, sheet=np.asarray(sheet).astype(int), said=said.getvalue())


def trained(run):
    """The settings of a run of toy digits, its G and D, built here."""
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    args = Namespace(**checkpoint["settings"] | {"device": "cpu", "bf16": False})
    G, D = dcgan.Generator(28, 1, 5, args.nz, 4), dcgan.Discriminator(28, 1, 5, 4)
    G.load_state_dict(checkpoint["G"])
    D.load_state_dict(checkpoint["D"])
    return args, G.eval(), D.eval()


def redrawn(runs, z, dropped):
    """Samples with and without maps, int (N, 28, 28), by dcgan.py and weights of zero."""
    args, G, _ = trained(runs / "toy")
    before = dcgan.draw(args, G, z)
    G.layers[-5].weight.data[dropped] = 0
    return before[:, 0].numpy().astype(int), dcgan.draw(args, G, z)[:, 0].numpy().astype(int)


def test_loaded_run(runs):
    """G and D have the weights and averages of the run; the random D has neither these nor those it began with."""
    settings, *nets, random = figures_dcgan.load(runs / "toy", 7)
    args, G, D = trained(runs / "toy")
    assert (settings.size, settings.seed, settings.bf16) == (28, 0, False) and not any(net.training for net in nets)
    for ours, expected in zip(nets, (G, D)):
        for one, other in zip(ours.state_dict().values(), expected.state_dict().values(), strict=True):
            assert torch.equal(one, other)
    for net in (D, dcgan.build(args)["D"]):
        for one, other in zip(random.parameters(), net.parameters(), strict=True):
            assert one.shape == other.shape and (one.ndim == 1 or not torch.allclose(one, other, atol=1e-3))


def test_row_of_the_probe(painted):
    """All its columns, in the file and in the line that is printed."""
    row, parts = painted.row, ("accuracy", "few_accuracy", "few_deviation", "cost", "few_cost", "features")
    names = {f"{part}_{name}" for part in parts for name in ("trained", "random", "pixels")}
    about = {"measure": "probe", "run": "toy", "data": "toy", "few_per_class": 100, "repeats": 10}
    about |= {f"n_{split}": count for split, count in COUNTS.items()}
    about |= {"features_trained": 16 * (4 + 8), "features_random": 16 * (4 + 8), "features_pixels": 28 * 28}
    assert row.keys() == names | about.keys() and row | about == row
    for name in ("trained", "random", "pixels"):
        assert 0 <= row[f"accuracy_{name}"] <= 1 and 0 <= row[f"few_accuracy_{name}"] <= 1
        assert row[f"accuracy_{name}"] * COUNTS["test"] == pytest.approx(
            round(row[f"accuracy_{name}"] * COUNTS["test"])
        )
        assert {row[f"cost_{name}"], row[f"few_cost_{name}"]} <= {1e-3, 1e-2}
    line = painted.said.splitlines()[-1]
    assert line.startswith("measure probe, run toy, ") and [part.split()[0] for part in line.split(", ")] == [*row]


def test_numbered_sheet(painted, runs, tmp_path):
    """Its cells are what dcgan.py draws under these numbers, four times as large."""
    flags = ["--run", runs / "toy", "--seed", 5, "--sample", 100, "--to", tmp_path / "drawn", "--device", "cpu"]
    assert run_main(DCGAN, *flags, "--precision", "fp32") == 0
    with Image.open(painted.folder / "dcgan-numbered.png") as sheet:
        assert sheet.size == (10 * 114 + 2, 10 * 126 + 2)
        pixels = np.asarray(sheet.convert("L")).astype(int)
    drawn = [np.asarray(Image.open(tmp_path / "drawn" / f"{i:05}.png")).astype(int) for i in range(100)]
    assert abs(drawn[0] - drawn[1]).max() > 20
    for i, image in enumerate(drawn):
        cell = pixels[i // 10 * 126 + 14 :, i % 10 * 114 + 2 :][:112, :112]
        assert abs(cell - image.repeat(4, 0).repeat(4, 1)).max() <= 1
    assert "28x28 (the sheet has each 4 times as large)" in painted.said


def test_guided_sheet(painted, runs):
    """A row a filter: digits of the test split, above those that excite the trained D most, below others."""
    images, _ = few_digits(Namespace(data="toy"), "test")
    highest = before_leaky(trained(runs / "toy")[2], images / 127.5 - 1)[1].amax((2, 3))
    with Image.open(painted.folder / "dcgan-guided.png") as sheet:
        assert sheet.size == (2 * (12 * 30 + 2), 2 * (24 + 2 * (6 * 30 + 2)))
        pixels = torch.from_numpy(np.asarray(sheet.convert("L")).astype(int))
    above, below = (
        [half[24::2, ::2][30 * i + 2 : 30 * i + 30, 2:30] for i in range(6)] for half in pixels.split(len(pixels) // 2)
    )
    for filter, cell in enumerate(above):
        assert (cell - images[highest[:, filter].argmax(), 0]).abs().max() <= 1
    assert all((cell - images[:, 0]).abs().amax((1, 2)).min() <= 1 for cell in below)
    assert not torch.equal(torch.stack(above), torch.stack(below))


def test_marks_of_boxes(forgotten):
    """Of features at 2, 6, 10, ..., 26 pixels, for each sample in the file."""
    expected = torch.zeros(3, 7, 7, dtype=torch.bool)
    expected[0, 2:6, 1:5] = expected[1, :2, :2] = expected[1, 3:, 3:] = True
    assert torch.equal(forgotten.marks, expected)


def test_forgotten_samples(forgotten, runs):
    """The marked ones with their boxes, and below without the maps; by how much pixels change in boxes and beside."""
    z = dcgan.codes(Namespace(nz=100, device="cpu"), 0, 10)[[*BOXES]]
    before, after = redrawn(runs, z, forgotten.dropped)
    assert 0 < forgotten.dropped.sum() < 8 and abs(before - after).max() > 20
    within = np.zeros((3, 28, 28), bool)
    for i, (found, images) in enumerate(zip(BOXES.values(), zip(before, after))):
        large = [image.repeat(4, 0).repeat(4, 1)[..., None].repeat(3, 2) for image in images]
        for left, top, right, bottom in found:
            within[i, top:bottom, left:right] = True
            line = np.zeros((112, 112), bool)
            line[4 * top : 4 * bottom, 4 * left : 4 * right] = True
            line[4 * top + 1 : 4 * bottom - 1, 4 * left + 1 : 4 * right - 1] = False
            large[0][line] = 255, 0, 0
        for row, image in enumerate(large if found else []):
            cell = forgotten.sheet[24::3, ::3][114 * row + 2 :, 114 * i + 2 :][:112, :112]
            assert abs(cell - image).max() <= 1
    change = abs(after - before)
    said = re.search(r"without (\d) of 8 maps .* by (\S+) of 255 in the boxes, (\S+) beside", forgotten.said).groups()
    expected = [forgotten.dropped.sum().item(), change[within].mean(), change[~within].mean()]
    assert [*map(float, said)] == pytest.approx(expected, abs=0.06)


def test_new_samples_forget_too(forgotten, runs):
    """All ten are on the sheet, however few are marked."""
    new = dcgan.codes(Namespace(nz=100, device="cpu"), [0, 3], 10)
    sheet = forgotten.sheet[2 * 24 + 3 * 230 :]
    assert sheet.shape == (230, 10 * 114 + 2, 3)
    for row, images in enumerate(redrawn(runs, new, forgotten.dropped)):
        for i, image in enumerate(images):
            cell = sheet[114 * row + 2 :, 114 * i + 2 :][:112, :112]
            assert abs(cell - image.repeat(4, 0).repeat(4, 1)[..., None]).max() <= 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", "--run"),
        ("--run missing", "missing"),
        ("--run empty", "empty"),
        ("--run broken", "broken"),
        ("--run other", "gan.py"),
        ("--run toy --seed -1", "--seed"),
        ("--run toy --data mnist2", "mnist2"),
        ("--run toy --boxes missing.json", "--boxes missing.json"),
        ("--run toy --boxes wide.json", "[0, 0, 29, 28]"),
        ("--run toy --boxes small.json", "every 4 pixels, from 2 on"),
        ("--run toy --boxes whole.json", "something beside"),
        ("--run colour", "photos"),
        ("--run colour --data toy", "28x28 pixels and 3 channels"),
        ("--run large --data toy", "32x32 pixels and 1 channels"),
        ("--run large --data toy --boxes small.json", "every 4 pixels, from 2 on"),
    ],
)
def test_bad_figures(flags, named, runs, tmp_path, monkeypatch, capsys):
    """One sentence that names what is wrong, and exit status 2."""
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as end:
        main(["figures", "dcgan", *flags.split(), "--to", str(tmp_path)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1 and named in said
