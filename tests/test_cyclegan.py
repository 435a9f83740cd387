"""Facts of the CycleGAN paper and its code, and the layouts of unpaired data."""

import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROWS, assert_refused, images

import cyclegan

ROW = next(row for row in ROWS if row.name == "cyclegan")
TINY = "--size 32 --load-size 32 --ngf 4 --ndf 4 --n-layers 1 --blocks 1 --precision fp32 --device cpu".split()


def settings(*flags):
    return cyclegan.get_args([*TINY, *map(str, flags)])


def test_default_networks():
    """The numbers of weights of the authors' code: 9 blocks at 256 pixels, 6 at 128; 30x30 patches."""
    state = cyclegan.build(cyclegan.get_args(["--data", "maps", "--device", "cpu", "--pool", "0"]))
    count = {name: sum(weight.numel() for weight in state[name].parameters()) for name in ROW.inputs}
    assert count == {"G": 11378179, "F": 11378179, "D_X": 2764737, "D_Y": 2764737}
    assert state["D_X"](images(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert cyclegan.get_args(["--data", "maps", "--size", "128", "--device", "cpu"]).blocks == 6


def test_pool_odds():
    """Full, it returns a new image half of the time, else one it held, in place of which it keeps the new one."""
    torch.manual_seed(0)
    pool, held, new = cyclegan.Pool(50, 1), set(), 0
    for i in range(2050):
        shown = int(pool(torch.full((1, 3, 1, 1), float(i)))[0, 0])
        if i < 50:
            assert shown == i
            held.add(i)
        elif shown == i:
            new += 1
        else:
            held.remove(shown)
            held.add(i)
    assert held == set(map(int, pool.images[:, 0].flatten()))
    assert 930 < new < 1070  # 1000 +- 3 standard deviations


def test_gradients_by_hand():
    """Both ways of G and F have, one after the other, the gradient of the whole of Eq. 3 with the identity loss."""
    args = settings("--lambda-cycle", 7, "--lambda-identity", 0.3, "--pool", 0, "--lr", 0)
    state, (x, y) = cyclegan.build(args), images(2, 2, 3, 32, 32).unbind()
    G, F, D_X, D_Y = (deepcopy(state[name]) for name in ("G", "F", "D_X", "D_Y"))
    losses = cyclegan.make_step(args, state)(x, y)

    def real(out):
        return ((out - 1) ** 2).mean()

    def fake(out):
        return (out**2).mean()

    cycle = (F(G(x)) - x).abs().mean() + (G(F(y)) - y).abs().mean()
    same = (G(y) - y).abs().mean() + (F(x) - x).abs().mean()
    total = real(D_Y(G(x))) + real(D_X(F(y))) + 7 * (cycle + 0.3 * same)
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
    *sides, _ = cyclegan.load_sides(settings())
    for (maps, photos), paired in zip(sides, (False, True)):
        colour, seen, _ = cyclegan.streets(len(maps), int(paired), 32)
        assert torch.equal(maps, torch.from_numpy(colour)) and torch.equal(photos, torch.from_numpy(seen)) == paired


def save_flat(folder, files):
    """Files of squares of one value each, 32x32, side by side."""
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(np.repeat(np.uint8([values]), 32, 0), 32, 1)).save(folder / name)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("trainA/1.png trainB/2.png testA/3.png testB/4.png", [1, 2, 3, 4]),
        ("train_A/1.png train_B/2.png val_A/3.png val_B/4.png", [1, 2, 3, 4]),
        ("train/A/1.png train/B/2.png valid/A/3.png valid/B/4.png", [1, 2, 3, 4]),
        ("A/train/1.png B/train/2.png A/test/3.png B/test/4.png", [1, 2, 3, 4]),
        ("A/1.png B/2.png", [1, 2, 1, 2]),  # training images stand in for the test split
        ("train/12.png test/34.png", [1, 2, 3, 4]),  # a paired set, used unpaired
        ("horse/1.png zebra/2.png", None),
        ("trainA/1.png", None),
        ("trainA/1.png trainB/2.png testA/3.png", None),
        ("A/trainA/1.png A/testA/2.png", None),
        ("testA/1.png testB/2.png", None),
        ("1.png", None),
    ],
)
def test_layouts(files, expected, tmp_path, call):
    """What is not understood is refused with the layouts there are."""
    save_flat(tmp_path / "data", {name: [*map(int, Path(name).stem)] for name in files.split()})
    if expected is None:
        said = call(ROW, *TINY, "--data", "data", "--out", "run", "--max-steps", 1).said
        assert_refused(said, "give folders named A and B")
    else:
        train, test, names = cyclegan.load_sides(settings("--data", "data"))
        assert [side.unique().tolist() for side in train + test] == [[value] for value in expected]
        assert [len(side) for side in names] == [1, 1]


def test_small_image(tmp_path, call):
    save_flat(tmp_path / "data", {"trainA/1.png": [1], "trainB/2.png": [2]})
    Image.new("RGB", (31, 40)).save(tmp_path / "data" / "trainB" / "small.png")
    assert_refused(call(ROW, *TINY, "--data", "data").said, "small.png has 31x40 pixels, which is below --size 32")


def test_download(tmp_path, monkeypatch):
    """A named set is unpacked from its zip file, which is all that is fetched."""
    save_flat(tmp_path / "site" / "maps", {"trainA/1.png": [1], "trainB/2.png": [2]})
    made = shutil.make_archive(tmp_path / "maps", "zip", tmp_path / "site", "maps")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, file: shutil.copy(made, file))
    args = settings("--data", "maps", "--data-root", tmp_path / "root")
    assert cyclegan.load_sides(args)[2] == [["1"], ["2"]]


def test_y_is_drawn_and_x_goes_round():
    """An epoch is as long as the larger set: each x of 3 comes twice among 6, each y by chance."""
    xs, ys = (torch.arange(count)[:, None, None, None].expand(-1, 3, 32, 32) for count in (3, 6))
    seen = [(epoch, x, y) for _, (epoch, x, y) in zip(range(12), cyclegan.batches(settings(), xs, ys, 0))]
    seen_x, seen_y = ([round(float((part[i][0, 0, 0, 0] + 1) * 127.5)) for part in seen] for i in (1, 2))
    assert [part[0] for part in seen] == [1] * 6 + [2] * 6
    assert sorted(seen_x[:6]) == sorted(seen_x[6:]) == [0, 0, 1, 1, 2, 2]
    assert {*seen_y} <= {*range(6)} and seen_y[:6] != seen_y[6:]


def test_direction(tmp_path, call):
    """AtoB is G and BtoA is F, on an image of any size."""
    assert call(ROW, *TINY, "--out", "run", "--max-steps", 1).said == 0
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)).save("x.png")
    pixels = torch.from_numpy(np.array(Image.open("x.png"))).permute(2, 0, 1)
    for direction, name in (("AtoB", "G"), ("BtoA", "F")):
        flags = ["--translate", "x.png", "--direction", direction, "--to", direction]
        assert call(ROW, *TINY, "--out", "run", *flags).said == 0
        net = cyclegan.build(settings())[name]
        net.load_state_dict(torch.load("run/last.pt", weights_only=True)[name])
        expected, made = cyclegan.to_images(settings(), pixels, net)[1], Image.open(f"{direction}/x.png")
        assert made.size == (41, 30) and made.tobytes() == expected.tobytes()


def test_decay():
    """The rate falls in the second half of the epochs, as in the paper, unless --decay-epochs says otherwise."""
    flags = ["--data", "maps", "--device", "cpu"]
    decays = [
        cyclegan.get_args([*flags, *more.split()]).decay_epochs for more in ("", "--epochs 10", "--decay-epochs 5")
    ]
    assert decays == [100, 5, 5]
