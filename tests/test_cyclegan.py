"""Facts of the CycleGAN paper and its code, and the layouts of unpaired data."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import assert_refused, images, snapshot

import cyclegan

TINY = "--size 32 --load-size 32 --ngf 4 --ndf 4 --n-layers 1 --blocks 1 --precision fp32 --device cpu".split()


def settings(*flags):
    return cyclegan.get_args([*TINY, *map(str, flags)])


@pytest.mark.parametrize(
    ("net", "count"),
    [
        (lambda: cyclegan.Generator(), 11378179),
        (lambda: cyclegan.Generator(6), 7837699),
        (lambda: cyclegan.Generator(2), 7837699 - 4 * 1180160),
        (lambda: cyclegan.Discriminator(), 2764737),
    ],
)
def test_weights(net, count):
    assert sum(weight.numel() for weight in net().parameters()) == count


def test_default_networks():
    """9 blocks at 256 pixels, 6 at 128; 28.29 million weights in all; 30x30 patches."""
    state = cyclegan.build(cyclegan.get_args(["--data", "maps", "--device", "cpu", "--pool", "0"]))
    nets = [state[name] for name in ("G", "F", "D_X", "D_Y")]
    assert sum(weight.numel() for net in nets for weight in net.parameters()) == 28285832
    assert state["D_X"](images(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert cyclegan.get_args(["--data", "maps", "--size", "128", "--device", "cpu"]).blocks == 6


@pytest.mark.parametrize("net", ["resnet", "unet"])
def test_shape_and_range(net):
    G = cyclegan.build(settings("--net", net))["G"]
    fake = G(10 * images(2, 3, 64, 32))
    assert fake.shape == (2, 3, 64, 32) and fake.abs().max() <= 1


def test_pool_fills_with_the_first():
    pool = cyclegan.Pool(5, 1)
    fakes = torch.arange(1.0, 6).view(5, 1, 1, 1).expand(-1, 3, -1, -1)
    assert torch.equal(pool(fakes), fakes) and torch.equal(pool.images, fakes)


def test_pool_odds():
    """Full, it returns a new image half of the time, else one it held, in place of which it keeps the new one."""
    torch.manual_seed(0)
    pool, held, new = cyclegan.Pool(50, 1), set(), 0
    for i in range(2050):
        shown = int(pool(torch.full((1, 3, 1, 1), float(i)))[0, 0])
        if i < 50:
            assert shown == i
        elif shown == i:
            new += 1
        else:
            assert shown in held
            held.remove(shown)
        held |= {i} - ({shown} if i >= 50 else set())
        if i >= 50:
            assert held == set(map(int, pool.images[:, 0].flatten()))
    assert 930 < new < 1070  # 1000 +- 3 standard deviations


def test_no_pool():
    fake = images(2, 3, 4, 4)
    assert torch.equal(cyclegan.Pool(0, 4)(fake), fake)


@pytest.mark.parametrize("loss", ["lsgan", "log"])
def test_gradients_by_hand(loss):
    """Both ways of G and F have, one after the other, the gradient of the whole of Eq. 3 with the identity loss."""
    args = settings("--loss", loss, "--lambda-x", 3, "--lambda-y", 7, "--pool", 0, "--lr", 0)
    state, (x, y) = cyclegan.build(args), images(2, 2, 3, 32, 32).unbind()
    G, F, D_X, D_Y = (deepcopy(state[name]) for name in ("G", "F", "D_X", "D_Y"))
    losses = cyclegan.make_step(args, state)(x, y)

    def real(logits):
        return ((logits - 1) ** 2).mean() if loss == "lsgan" else -torch.sigmoid(logits).log().mean()

    def fake(logits):
        return (logits**2).mean() if loss == "lsgan" else -(1 - torch.sigmoid(logits)).log().mean()

    cycle = 3 * (F(G(x)) - x).abs().mean() + 7 * (G(F(y)) - y).abs().mean()
    same = 0.5 * 7 * (G(y) - y).abs().mean() + 0.5 * 3 * (F(x) - x).abs().mean()
    total = real(D_Y(G(x))) + real(D_X(F(y))) + cycle + same
    for net, by_hand in (("G", G), ("F", F)):
        expected = torch.autograd.grad(total, [*by_hand.parameters()], retain_graph=True)
        for weight, grad in zip(state[net].parameters(), expected):
            torch.testing.assert_close(weight.grad, grad, rtol=1e-3, atol=1e-6)
    for name, D, data, made in (("D_X", D_X, x, F(y)), ("D_Y", D_Y, y, G(x))):
        loss_D = (real(D(data)) + fake(D(made.detach()))) / 2
        torch.testing.assert_close(losses[f"loss_{name}"], loss_D.detach())
        for weight, grad in zip(state[name].parameters(), torch.autograd.grad(loss_D, [*D.parameters()])):
            torch.testing.assert_close(weight.grad, grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(losses["loss_cycle_F"], (G(F(y)) - y).abs().mean().detach())
    torch.testing.assert_close(losses["loss_same_G"], (G(y) - y).abs().mean().detach())


@pytest.mark.parametrize(
    ("terms", "names"),
    [
        ("cycle", "cycle_G cycle_F"),
        ("gan", "gan_G gan_F D_X D_Y"),
        ("gan+forward", "gan_G cycle_G gan_F D_X D_Y"),
        ("gan+backward", "gan_G gan_F cycle_F D_X D_Y"),
        ("all", "gan_G cycle_G same_G gan_F cycle_F same_F D_X D_Y"),
    ],
)
def test_terms(terms, names):
    args = settings("--terms", terms)
    state = cyclegan.build(args)
    before = deepcopy(state["D_X"].state_dict())
    losses = cyclegan.make_step(args, state)(*images(2, 1, 3, 32, 32).unbind())
    assert losses.keys() == {f"loss_{name}" for name in names.split()}
    moved = any(not torch.equal(weight, before[name]) for name, weight in state["D_X"].state_dict().items())
    assert moved == (terms != "cycle")


def test_toy_is_unpaired_but_for_the_tests():
    args = settings()
    maps, photos = (cyclegan.load_images(args, "train", side)[1] for side in "AB")
    colour, seen = cyclegan.streets(3, 0, 32)[:2]
    assert torch.equal(maps(2), torch.from_numpy(colour[2])) and not torch.equal(photos(2), torch.from_numpy(seen[2]))
    maps, photos = (cyclegan.load_images(args, "test", side)[1] for side in "AB")
    colour, seen = cyclegan.streets(3, 1, 32)[:2]
    assert torch.equal(maps(2), torch.from_numpy(colour[2])) and torch.equal(photos(2), torch.from_numpy(seen[2]))


def flat(path, *colours):
    """A file of squares, 32x32, side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [np.full((32, 32, 3), colour, np.uint8) for colour in colours]
    Image.fromarray(np.concatenate(rows, 1)).save(path)


@pytest.mark.parametrize(
    "files",
    [
        {"trainA/1.png": [1], "trainB/2.png": [2], "testA/3.png": [3], "testB/4.png": [4]},
        {"train/A/1.png": [1], "train/B/2.png": [2], "val/A/3.png": [3], "val/B/4.png": [4]},
        {"A/train/1.png": [1], "B/train/2.png": [2], "A/test/3.png": [3], "B/test/4.png": [4]},
        {"train/1.png": [1, 2], "test/3.png": [3, 4]},  # a paired set, used unpaired
    ],
)
def test_layouts(files, tmp_path):
    for name, colours in files.items():
        flat(tmp_path / name, *colours)
    args = settings("--data", tmp_path)
    parts = [("train", "A"), ("train", "B"), ("test", "A"), ("test", "B")]
    values = [cyclegan.load_images(args, *part)[1](0).unique().tolist() for part in parts]
    assert values == [[1], [2], [3], [4]]


def test_two_folders_without_tests(tmp_path):
    """The training images stand in for a test split that is not there."""
    flat(tmp_path / "A" / "1.png", 1)
    flat(tmp_path / "B" / "2.png", 2)
    args = settings("--data", tmp_path)
    assert [cyclegan.load_images(args, "test", side)[0] for side in "AB"] == [["1"], ["2"]]


def run(capsys, *flags):
    """Exit status and standard error of main."""
    try:
        cyclegan.main([*TINY, *map(str, flags)])
        code = 0
    except SystemExit as end:
        code = end.code
    return type("Result", (), {"code": code, "err": capsys.readouterr().err})


def test_one_side_is_missing(tmp_path, capsys):
    flat(tmp_path / "data" / "trainA" / "1.png", 1)
    result = run(capsys, "--data", tmp_path / "data", "--run", tmp_path / "run")
    assert_refused(result, "trainB")


def test_small_image(tmp_path, capsys):
    flat(tmp_path / "data" / "trainA" / "1.png", 1)
    flat(tmp_path / "data" / "trainB" / "2.png", 1)
    Image.new("RGB", (31, 40)).save(tmp_path / "data" / "trainB" / "small.png")
    result = run(capsys, "--data", tmp_path / "data", "--run", tmp_path / "run")
    assert_refused(result, "small.png")
    assert not (tmp_path / "run").exists()


def test_cityscapes_is_withheld(tmp_path, capsys):
    assert_refused(run(capsys, "--data", "cityscapes", "--data-root", tmp_path), "cityscapes-dataset.com")
    assert snapshot(tmp_path) == {}


def test_y_is_drawn_and_x_goes_round():
    """An epoch is as long as the larger set: each x of 3 comes twice among 6, each y by chance."""
    xs, ys = (3, lambda i: torch.full((3, 32, 32), i)), (6, lambda i: torch.full((3, 32, 32), 10 * i))
    drawn = cyclegan.batches(settings("--data", "maps"), xs, ys, 0)
    epochs, seen_x, seen_y = [], [], []
    for _, (epoch, x, y) in zip(range(12), drawn):
        epochs.append(epoch)
        seen_x.append(round(float((x[0, 0, 0, 0] + 1) * 127.5)))
        seen_y.append(round(float((y[0, 0, 0, 0] + 1) * 127.5)))
    assert epochs == [1] * 6 + [2] * 6
    assert sorted(seen_x[:6]) == sorted(seen_x[6:]) == [0, 0, 1, 1, 2, 2]
    assert set(seen_y) <= {0, 10, 20, 30, 40, 50} and seen_y[:6] != seen_y[6:]


def test_direction(tmp_path, capsys):
    """AtoB is G and BtoA F, each followed by the other."""
    assert run(capsys, "--run", tmp_path / "run", "--max-steps", 1).code == 0
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)).save(tmp_path / "x.png")
    args = settings()
    state, saved = cyclegan.build(args), torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    for name in "GF":
        state[name].load_state_dict(saved[name])
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "x.png"))).permute(2, 0, 1)
    for way, first, second in (("AtoB", "G", "F"), ("BtoA", "F", "G")):
        flags = ["--translate", tmp_path / "x.png", "--direction", way, "--to", tmp_path / way]
        assert run(capsys, "--run", tmp_path / "run", *flags).code == 0
        expected = cyclegan.there_and_back(args, state[first], state[second], pixels)[1]
        made = Image.open(tmp_path / way / "x.png")
        assert made.size == (41, 30) and made.tobytes() == expected.tobytes()
        assert (tmp_path / f"{way}-comparison.png").exists()
