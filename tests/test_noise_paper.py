"""Facts of the papers that gan.py, dcgan.py and cgan.py must reproduce, and what their pictures promise."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cgan
import dcgan
import gan


def weights(module, flags):
    """Numbers of weights of G and D."""
    state = module.build(module.get_args([*flags.split(), "--device", "cpu"]))
    return tuple(sum(weight.numel() for weight in state[name].parameters()) for name in "GD")


@pytest.mark.parametrize(
    ("module", "flags", "expected"),
    [
        (gan, "--data mnist", (2_503_984, 1_231_441)),
        (cgan, "--data mnist", (2_413_984, 1_224_351)),
        (dcgan, "--data celeba", (18_855_040, 17_232_768)),
        (dcgan, "--data celeba --kernel 4 --ngf 64 --ndf 64", (3_576_704, 2_765_568)),
        (dcgan, "--data celeba --kernel 4", (12_658_432, 11_036_160)),
    ],
)
def test_weights(module, flags, expected):
    """The networks of the papers, and of the authors' code, to the last weight."""
    assert weights(module, flags) == expected


@pytest.mark.parametrize(("net", "expected"), [("fc", (89_395_072, 37_393_601)), ("conv", (64_825_072, None))])
def test_weights_of_the_pairs_for_cifar(net, expected):
    """The two pairs for CIFAR-10; the convolutional G has a bias for each pixel among its weights."""
    with torch.device("meta"):
        G = gan.Generator(net, 100, 8000, 3, 32)
        D = gan.Discriminator(net, 1600 if net == "fc" else 32, 3, 32)
    counts = [sum(weight.numel() for weight in network.parameters()) for network in (G, D)]
    assert counts[0] == expected[0] and expected[1] in (None, counts[1])


@pytest.mark.parametrize("size", [20, 32])
def test_convolutional_pair(size):
    """It takes the images that it makes."""
    args = gan.get_args(f"--net conv --size {size} --channels 3 --ngf 8 --ndf 4 --device cpu".split())
    state = gan.build(args)
    fake = state["G"](gan.draw_z(args, 2))
    assert fake.shape == (2, 3, size, size) and state["D"](fake).shape == (2,)


def test_maxout():
    """Unit j is the largest of its pieces, which lie side by side."""
    layer = gan.Maxout(nn.Identity(), 2)
    assert layer(torch.tensor([[1.0, 2.0, 5.0, -3.0]])).tolist() == [[2.0, 5.0]]


def test_momentum_by_hand():
    """v <- m v - lr g, w <- w + v, twice; the rates are read from tensors."""
    weight = nn.Parameter(torch.tensor([1.0]))
    optimiser = gan.Momentum([weight], torch.tensor(0.1), torch.tensor(0.5))
    for grad, momentum, expected in ((2.0, 0.5, 0.8), (1.0, 0.7, 0.8 - 0.7 * 0.2 - 0.1)):
        optimiser.param_groups[0]["momentum"].fill_(momentum)
        weight.grad = torch.tensor([grad])
        optimiser.step()
        assert weight.item() == pytest.approx(expected)


def test_schedule_of_sgd(tmp_path):
    """The rate falls by 1.000004 an update (cGAN: 1.00004), and momentum rises from .5 over 250 epochs."""
    for module, factor in ((gan, 1.000004), (cgan, 1.00004)):
        flags = "--size 8 --ngf 12 --ndf 24 --optimiser sgd --batch-size 5000 --epochs 3 --device cpu".split()
        run = module.train(module.get_args([*flags, "--run", str(tmp_path / module.SCRIPT)]))
        group = torch.load(run / "last.pt", weights_only=True)["opt_G"]["param_groups"][0]
        assert float(group["lr"]) == pytest.approx(0.1 / factor**6, rel=1e-6)
        assert float(group["momentum"]) == pytest.approx(0.5 + 0.2 * 2 / 249)


def test_mean_of_weights(tmp_path, monkeypatch):
    """G_mean is the mean over all updates while they are few, then .75 of itself and .25 of G; it draws the samples."""
    flags = "--size 8 --ngf 12 --ndf 24 --batch-size 5000 --epochs 4 --average .75".split()
    flags += ["--precision", "fp32", "--device", "cpu"]
    seen, make = [], gan.make_step

    def watched(args, state):
        step = make(args, state)

        def update(x):
            losses = step(x)
            seen.append(torch.cat([weight.detach().flatten() for weight in state["G"].parameters()]))
            return losses

        return update

    monkeypatch.setattr(gan, "make_step", watched)
    run = gan.train(gan.get_args([*flags, "--run", str(tmp_path / "run")]))
    assert len(seen) == 8
    mean = torch.zeros(())
    for step, weights in enumerate(seen, 1):
        mean = mean + max(0.25, 1 / step) * (weights - mean)
    assert (mean - seen[-1]).abs().max() > 0.001
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    for name, expected in (("G", seen[-1]), ("G_mean", mean)):
        torch.testing.assert_close(torch.cat([weight.flatten() for weight in checkpoint[name].values()]), expected)
    shown = gan.sample(gan.get_args(["--sample", "1", "--run", str(run), "--device", "cpu"]))
    args = gan.get_args(flags)
    G = gan.build(args)["G_mean"]
    G.load_state_dict(checkpoint["G_mean"])
    torch.manual_seed(0)
    with Image.open(shown / "00000.png") as image:
        assert torch.equal(gan.draw(args, G, gan.draw_z(args, 1))[0, 0], torch.from_numpy(np.array(image)))


@pytest.mark.parametrize("module", [gan, cgan])
@pytest.mark.parametrize(
    ("flags", "rate", "epochs"),
    [("--data mnist", 0.1, 250), ("--data mnist --optimiser adam", 1e-3, 40), ("--epochs 7 --lr 1", 1, 7)],
)
def test_defaults(module, flags, rate, epochs):
    """Rate and length are those of the optimiser, unless they are given."""
    args = module.get_args(flags.split())
    assert (args.lr, args.epochs) == (rate, epochs)


@pytest.mark.parametrize(("flags", "average"), [("--optimiser adam", 0.9999), ("", 0), ("--average .9", 0.9)])
def test_who_draws(flags, average):
    """The mean of G draws with Adam, and G itself with the authors' SGD, unless --average says otherwise."""
    args = gan.get_args(["--data", "mnist", *flags.split()])
    assert args.average == average and ("G_mean" in gan.build(args)) == (average > 0)


@pytest.mark.parametrize("module", [gan, cgan])
def test_gan_loss(module):
    """-log D and -log(1 - D), by hand."""
    logits = torch.tensor([0.0, math.log(3)])  # D = 1/2, 3/4
    assert module.gan_loss(logits, True).item() == pytest.approx(-(math.log(1 / 2) + math.log(3 / 4)) / 2)
    assert module.gan_loss(logits, False).item() == pytest.approx(-(math.log(1 / 2) + math.log(1 / 4)) / 2)


@pytest.mark.parametrize(
    ("kind", "of_D", "of_G"),
    [
        ("ns", -math.log(3 / 4) - math.log(2 / 3), -math.log(1 / 3)),
        ("minimax", -math.log(3 / 4) - math.log(2 / 3), math.log(2 / 3)),
        ("lsgan", (math.log(3) - 1) ** 2 / 2 + math.log(2) ** 2 / 2, (-math.log(2) - 1) ** 2 / 2),
        ("wgan", -math.log(2) - math.log(3), math.log(2)),
        ("wgan-gp", -math.log(2) - math.log(3), math.log(2)),
    ],
)
def test_losses_of_dcgan(kind, of_D, of_G):
    """Each loss by hand, for D = 3/4 on the data and 1/3 on G's image."""
    real, fake = torch.tensor([math.log(3)]), torch.tensor([-math.log(2)])
    assert dcgan.loss_of_D(kind, real, fake).item() == pytest.approx(of_D, rel=1e-5)
    assert dcgan.loss_of_G(kind, fake).item() == pytest.approx(of_G, rel=1e-5)


def test_penalty_of_a_linear_critic():
    """A critic w.x has the slope |w| everywhere: the penalty is (|w| - 1)^2."""

    def D(x):
        return 3 * x[:, 0, 0, 0] + 4 * x[:, 0, 1, 1]

    assert dcgan.penalty(D, torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)).item() == pytest.approx(16)


def test_wgan_clips():
    """After an update no weight of the critic is above .01."""
    args = dcgan.get_args("--ngf 4 --ndf 4 --loss wgan --device cpu --precision fp32".split())
    state = dcgan.build(args)
    dcgan.make_step(args, state)(torch.rand(5 * 4, 1, 28, 28))
    assert args.k == 5 and max(weight.abs().max().item() for weight in state["D"].parameters()) <= 0.01


@pytest.mark.parametrize("loss", dcgan.LOSSES)
def test_every_loss_trains(loss):
    """Both networks move, and stay finite."""
    args = dcgan.get_args(f"--ngf 4 --ndf 4 --loss {loss} --device cpu --precision fp32".split())
    state = dcgan.build(args)
    before = {name: [weight.clone() for weight in state[name].parameters()] for name in "GD"}
    losses = dcgan.make_step(args, state)(torch.rand(args.k * 4, 1, 28, 28) * 2 - 1)
    assert all(loss.isfinite() for loss in losses.values())
    for name in "GD":
        assert any(not torch.equal(a, b) for a, b in zip(before[name], state[name].parameters()))


@pytest.mark.parametrize("size", [28, 32, 64, 128])
@pytest.mark.parametrize("kernel", [4, 5])
def test_sizes_of_dcgan(size, kernel):
    """G makes the size asked for, in [-1, 1], and D takes it."""
    args = dcgan.get_args(f"--size {size} --kernel {kernel} --ngf 2 --ndf 2 --channels 3 --device cpu".split())
    state = dcgan.build(args)
    x = state["G"](dcgan.codes(args, 0, 2))
    assert x.shape == (2, 3, size, size) and x.abs().max() <= 1 and state["D"](x).shape == (2,)


def test_rules_of_dcgan():
    """No pooling, no hidden fully connected layer; batch norm, but not in G's output and D's input (Sec. 3)."""
    G, D = dcgan.Generator(), dcgan.Discriminator()
    kinds = [[type(layer) for layer in network.layers] for network in (G, D)]
    assert not {nn.Linear, nn.MaxPool2d, nn.AvgPool2d} & {*kinds[0], *kinds[1]}
    assert kinds[0][-2:] == [nn.ConvTranspose2d, nn.Tanh] and kinds[0].count(nn.BatchNorm2d) == 4
    assert kinds[1][:2] == [nn.Conv2d, nn.LeakyReLU] and kinds[1].count(nn.BatchNorm2d) == 3
    assert nn.ReLU in kinds[0] and nn.ReLU not in kinds[1] and D.layers[1].negative_slope == 0.2


def test_conditional_norm():
    """It begins as batch norm; a label's row of the table is its gain and its bias."""
    norm, x = cgan.ConditionalNorm(2, 3), torch.randn(8, 3, 4, 4)
    y = torch.tensor([0, 1] * 4)
    torch.testing.assert_close(norm(x, y), nn.BatchNorm2d(3)(x))
    norm.table.weight.data[1] = torch.tensor([2.0, 2, 2, 7, 7, 7])
    torch.testing.assert_close(norm(x, y)[1::2], 2 * nn.BatchNorm2d(3)(x)[1::2] + 7)


@pytest.mark.parametrize("flags", ["", "--net conv", "--net conv --cbn"])
@pytest.mark.parametrize("size", [28, 32])
def test_label_matters(flags, size):
    """G and D of every kind see the label."""
    args = cgan.get_args(f"--size {size} --ngf 12 --ndf 24 --device cpu {flags}".split())
    state = cgan.build(args)
    for network in (state["G"], state["D"]):
        network.eval()
    if args.cbn:  # whose table begins alike for all labels
        nn.init.normal_(state["G"].norms[0].table.weight)
    z, ones, twos = cgan.draw_z(args, 2), torch.tensor([1, 1]), torch.tensor([2, 2])
    x = state["G"](z, ones)
    assert x.shape == (2, 1, size, size) and not torch.equal(x, state["G"](z, twos))
    assert not torch.equal(state["D"](x, ones), state["D"](x, twos))


def test_digits():
    """Every glyph occurs about as often; the same seed draws the same, and labels tell the glyph."""
    (images, labels), (again, _), (others, _) = gan.digits(500, 0), gan.digits(500, 0), gan.digits(500, 1)
    assert images.shape == (500, 1, 28, 28) and images.dtype == torch.uint8
    assert torch.equal(images, again) and not torch.equal(images, others)
    assert torch.bincount(labels, minlength=10).min() > 25
    means = torch.stack([images[labels == i].float().mean(0) for i in range(10)]).flatten(1)
    nearest = torch.cdist(gan.digits(500, 2)[0].float().flatten(1), means).argmin(1)
    assert (nearest == gan.digits(500, 2)[1]).float().mean() > 0.6


def test_nearest_training_image(tmp_path):
    """Beside a training image stands itself; the noise on it does not matter."""
    args = gan.get_args("--device cpu".split())
    images = gan.digits(50, 0)[0]
    pairs = gan.beside_nearest(args, images[[7, 3]] // 2, images)
    assert torch.equal(pairs[1], images[7]) and torch.equal(pairs[3], images[3])
    assert torch.equal(pairs[0], images[7] // 2)


def test_walk_ends_in_its_codes():
    """A row of the walk begins with one code's image and ends with the other's."""
    args = gan.get_args("--ngf 8 --ndf 4 --device cpu --precision fp32".split())
    G, z = gan.build(args)["G"], gan.draw_z(args, 4)
    walk, ends = gan.draw_walk(args, G, z), gan.draw(args, G, z)
    assert len(walk) == 32
    for place, end in ((0, 0), (15, 2), (16, 1), (31, 3)):
        assert (walk[place].int() - ends[end].int()).abs().max() <= 1


def test_arithmetic_of_codes():
    """Means of codes by number, with the signs of the sum."""
    args = dcgan.get_args(["--device", "cpu"])
    z = dcgan.codes(args, 5, 10)
    means, signs = dcgan.means(args, 5, "3,7 - 9 + 1, 2,4")
    torch.testing.assert_close(means, torch.stack([z[[3, 7]].mean(0), z[9], z[[1, 2, 4]].mean(0)]))
    assert signs.flatten().tolist() == [1, -1, 1]
    assert torch.equal(dcgan.codes(args, 5, 4), z[:4])  # the sheet's numbers hold for any --sample


def test_label_by_name_and_number(tmp_path, call):
    """--label takes both; what is neither is refused, and the names of the files tell the label."""
    from scripts import ROWS, assert_refused

    row = next(row for row in ROWS if row.name == "cgan")
    row.data(tmp_path / "pets")
    flags = [*row.tiny.split(), "--data", tmp_path / "pets", "--run", tmp_path / "run"]
    assert call(row, *flags, "--max-steps", 1).code == 0
    for label in ("dogs", "1"):
        out = tmp_path / f"out-{label}"
        assert call(row, *flags, "--sample", 3, "--label", label, "--to", out).code == 0
        assert sorted(path.name for path in out.iterdir()) == ["00000-1.png", "00001-1.png", "00002-1.png"]
    a, b = (np.asarray(Image.open(tmp_path / f"out-{label}" / "00000-1.png")) for label in ("dogs", "1"))
    assert np.array_equal(a, b)
    assert_refused(call(row, *flags, "--sample", 3, "--label", "birds"), "birds")
    assert_refused(call(row, *flags, "--sample", 3, "--label", "2"), "2")
