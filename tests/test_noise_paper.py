"""Facts of the papers that gan.py, dcgan.py and cgan.py must reproduce, and what their pictures promise."""

import inspect
import math

import numpy as np
import pytest
import torch
from scripts import ROWS, assert_refused, save_images
from torch import nn

import cgan
import dcgan
import gan


def weights(*networks):
    """Numbers of weights."""
    return tuple(sum(weight.numel() for weight in network.parameters()) for network in networks)


@pytest.mark.parametrize(
    ("module", "flags", "expected"),
    [
        (gan, "--data mnist", (2_503_984, 1_231_441)),
        (cgan, "--data mnist", (2_413_984, 1_224_351)),
        (dcgan, "--data celeba", (18_855_040, 17_232_768)),
        (dcgan, "--data celeba --kernel 4 --ngf 64 --ndf 64", (3_576_704, 2_765_568)),
    ],
)
def test_weights(module, flags, expected):
    """The networks of the papers, and of the authors' code, to the last weight."""
    state = module.build(module.get_args([*flags.split(), "--device", "cpu"]))
    assert weights(state["G"], state["D"]) == expected


def test_weights_of_the_pairs_for_cifar():
    """The two pairs for CIFAR-10; the convolutional G has a bias for each pixel among its weights."""
    with torch.device("meta"):
        fc = gan.Generator("fc", 100, 8000, 3, 32), gan.Discriminator("fc", 1600, 3, 32)
        conv = gan.Generator("conv", 100, 8000, 3, 32)
    assert weights(*fc, conv) == (89_395_072, 37_393_601, 64_825_072)


def test_momentum_by_hand():
    """v <- m v - lr g, w <- w + v, twice; the rates are read from tensors."""
    weight = nn.Parameter(torch.tensor([1.0]))
    optimiser = gan.Momentum([weight], torch.tensor(0.1), torch.tensor(0.5))
    for grad, momentum, expected in ((2.0, 0.5, 0.8), (1.0, 0.7, 0.8 - 0.7 * 0.2 - 0.1)):
        optimiser.param_groups[0]["momentum"].fill_(momentum)
        weight.grad = torch.tensor([grad])
        optimiser.step()
        assert weight.item() == pytest.approx(expected)


def test_same_code():
    """What gan.py and cgan.py have in common has one text, and so have the toy digits of dcgan.py."""
    for name in ("Maxout", "Momentum", "gan_loss", "digits"):
        assert inspect.getsource(getattr(gan, name)) == inspect.getsource(getattr(cgan, name))
    assert inspect.getsource(gan.digits) == inspect.getsource(dcgan.digits)


def test_schedule_of_sgd(tmp_path):
    """The rate falls by 1.000004 an update (cGAN: 1.00004), and momentum rises from .5 over 250 epochs."""
    for module, factor in ((gan, 1.000004), (cgan, 1.00004)):
        flags = "--size 8 --ngf 12 --ndf 24 --optimiser sgd --batch-size 5000 --epochs 3 --device cpu".split()
        run = module.train(module.get_args([*flags, "--out", str(tmp_path / module.SCRIPT)]))
        group = torch.load(run / "last.pt", weights_only=True)["opt_G"]["param_groups"][0]
        assert float(group["lr"]) == pytest.approx(0.1 / factor**6, rel=1e-6)
        assert float(group["momentum"]) == pytest.approx(0.5 + 0.2 * 2 / 249)


def test_mean_of_weights(tmp_path, monkeypatch):
    """G_mean is the mean over all updates while they are few, then .75 of itself and .25 of G; it draws."""
    flags = "--size 8 --ngf 12 --ndf 24 --batch-size 5000 --epochs 4 --average .75 --device cpu".split()
    args, seen, report = gan.get_args([*flags, "--out", str(tmp_path / "run")]), [], gan.Run.report

    def watch(run, *rest):
        seen.append(nn.utils.parameters_to_vector(run.state["G"].parameters()).detach())
        return report(run, *rest)

    monkeypatch.setattr(gan.Run, "report", watch)
    run, mean = gan.train(args), 0
    for step, weights in enumerate(seen, 1):
        mean = mean + max(0.25, 1 / step) * (weights - mean)
    G = gan.load_generator(run)
    torch.testing.assert_close(nn.utils.parameters_to_vector(G.parameters()), mean)
    assert len(seen) == 8 and (mean - seen[-1]).abs().max() > 0.001


@pytest.mark.parametrize(
    ("flags", "rate", "epochs", "average"),
    [("", 0.1, 250, 0), ("--optimiser adam", 1e-3, 40, 0.9999), ("--epochs 7 --lr 1 --average .9", 1, 7, 0.9)],
)
def test_defaults(flags, rate, epochs, average):
    """Rate, length and who draws are those of the optimiser, unless they are given; bfloat16 only where it is asked."""
    args = gan.get_args(["--data", "mnist", *flags.split()])
    assert (args.lr, args.epochs, args.average) == (rate, epochs, average)
    assert ("G_mean" in gan.build(args)) == (average > 0)
    for module in (gan, cgan):
        used = [module.get_args(["--precision", name]).precision for name in ("auto", "fp32", "bf16")]
        assert used == ["fp32", "fp32", "bf16"]


def test_gan_loss():
    """-log D and -log(1 - D), by hand, for D = 1/2 and 3/4."""
    logits = torch.tensor([0.0, math.log(3)])
    assert gan.gan_loss(logits, True).item() == pytest.approx(-(math.log(1 / 2) + math.log(3 / 4)) / 2)
    assert gan.gan_loss(logits, False).item() == pytest.approx(-(math.log(1 / 2) + math.log(1 / 4)) / 2)


@pytest.mark.parametrize(
    ("kind", "of_D", "of_G"),
    [
        ("ns", -math.log(3 / 4) - math.log(2 / 3), -math.log(1 / 3)),
        ("minimax", -math.log(3 / 4) - math.log(2 / 3), math.log(2 / 3)),
        ("lsgan", (math.log(3) - 1) ** 2 / 2 + math.log(2) ** 2 / 2, (-math.log(2) - 1) ** 2 / 2),
        ("wgan", -math.log(2) - math.log(3), math.log(2)),
    ],
)
def test_losses_of_dcgan(kind, of_D, of_G):
    """Each loss by hand, for D = 3/4 on the data and 1/3 on G's image."""
    real, fake = torch.tensor([math.log(3)]), torch.tensor([-math.log(2)])
    assert dcgan.loss_of_D(kind, real, fake).item() == pytest.approx(of_D, rel=1e-5)
    assert dcgan.loss_of_G(kind, fake).item() == pytest.approx(of_G, rel=1e-5)


def test_wgan():
    """The penalty of a linear critic w.x is (|w| - 1)^2; after an update of WGAN no weight of D is above .01."""
    x = torch.zeros(2, 1, 2, 2)
    assert dcgan.penalty(lambda x: 3 * x[:, 0, 0, 0] + 4 * x[:, 0, 1, 1], x, x + 1).item() == pytest.approx(16)
    args = dcgan.get_args("--ngf 4 --ndf 4 --loss wgan --device cpu --precision fp32".split())
    state = dcgan.build(args)
    dcgan.make_step(args, state)(torch.rand(5 * 4, 1, 28, 28))
    assert args.k == 5 and max(weight.abs().max().item() for weight in state["D"].parameters()) <= 0.01


SIZES = [(dcgan, f"--kernel {kernel}", size) for kernel in (4, 5) for size in (28, 32, 64, 128)]


@pytest.mark.parametrize(("module", "flags", "size"), [(gan, "--net conv", 20), (gan, "--net conv", 32), *SIZES])
def test_sizes(module, flags, size):
    """Convolutional networks: G makes the size asked for, and D takes it."""
    args = module.get_args(f"{flags} --size {size} --ngf 4 --ndf 4 --channels 3 --device cpu".split())
    state = module.build(args)
    x = state["G"](torch.randn(2, 100))
    assert x.shape == (2, 3, size, size) and state["D"](x).shape == (2,)


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
    norm, x, y = cgan.ConditionalNorm(2, 3), torch.randn(8, 3, 4, 4), torch.tensor([0, 1] * 4)
    torch.testing.assert_close(norm(x, y), nn.BatchNorm2d(3)(x))
    norm.table.weight.data[1] = torch.tensor([2.0, 2, 2, 7, 7, 7])
    torch.testing.assert_close(norm(x, y)[1::2], 2 * nn.BatchNorm2d(3)(x)[1::2] + 7)


@pytest.mark.parametrize("flags", ["", "--net conv", "--net conv --cbn"])
@pytest.mark.parametrize("size", [28, 32])
def test_label_matters(flags, size):
    """G and D of every kind see the label."""
    args = cgan.get_args(f"--size {size} --ngf 12 --ndf 24 --device cpu {flags}".split())
    state = cgan.build(args)
    state["G"].eval(), state["D"].eval()
    if args.cbn:  # whose table begins alike for all labels
        nn.init.normal_(state["G"].norms[0].table.weight)
    z, ones, twos = cgan.draw_z(args, 2), torch.tensor([1, 1]), torch.tensor([2, 2])
    x = state["G"](z, ones)
    assert x.shape == (2, 1, size, size) and not torch.equal(x, state["G"](z, twos))
    assert not torch.equal(state["D"](x, ones), state["D"](x, twos))


def test_digits():
    """Every glyph occurs about as often, and labels tell the glyph, under another seed too."""
    (images, labels), (others, known) = gan.digits(500, 0), gan.digits(500, 2)
    assert images.shape == (500, 1, 28, 28) and torch.bincount(labels, minlength=10).min() > 25
    means = torch.stack([images[labels == i].float().mean(0) for i in range(10)]).flatten(1)
    assert (torch.cdist(others.float().flatten(1), means).argmin(1) == known).float().mean() > 0.6


def test_pictures(monkeypatch):
    """Beside a training image stands itself; a row of a walk begins and ends with the images of two codes."""
    shown, args = [], gan.get_args("--ngf 8 --ndf 4 --device cpu".split())
    monkeypatch.setattr(gan, "save_grid", lambda path, cells, titles: shown.extend(cells))
    images, G, z = gan.digits(50, 0)[0], gan.build(args)["G"], gan.draw_z(args, 4)
    gan.save_nearest(args, images[[7, 3]] // 2, images, None)
    expected = [images[7] // 2, images[7], images[3] // 2, images[3]]
    assert all(map(torch.equal, shown, expected)) and len(shown) == 4
    gan.save_walk(args, G, z, None)
    for image, end in zip((shown[4], shown[19], shown[20], shown[35]), gan.draw(args, G, z[[0, 2, 1, 3]])):
        assert (image.int() - end.int()).abs().max() <= 1


@pytest.mark.parametrize("images_seen", [0, 4, 8])
def test_order_of_the_data(images_seen):
    """Batches go through the permutation of each pass, also where one ends inside a batch or a run resumes there."""
    args, images = cgan.get_args("--batch-size 4 --seed 5".split()), torch.arange(6).byte()[:, None, None, None]
    order = np.concatenate([np.random.default_rng([5, number]).permutation(6) for number in range(4)])
    loader = cgan.batches(args, images, torch.arange(6), images_seen)
    for first in range(images_seen, images_seen + 12, 4):
        epoch, x, y = next(loader)
        assert epoch == first // 6 + 1 and y.tolist() == order[first : first + 4].tolist()
        assert x.flatten().tolist() == (y / 255).tolist()


def test_arithmetic_of_codes():
    """Means of codes by number, with the signs of the sum."""
    args = dcgan.get_args(["--device", "cpu"])
    z = dcgan.codes(args, 5, 10)
    means, signs = dcgan.means(args, 5, "3,7 - 9 + 1, 2,4")
    torch.testing.assert_close(means, torch.stack([z[[3, 7]].mean(0), z[9], z[[1, 2, 4]].mean(0)]))
    assert signs.flatten().tolist() == [1, -1, 1]
    assert torch.equal(dcgan.codes(args, 5, 4), z[:4])  # the sheet's numbers hold for any --sample


def test_folders_of_labels(tmp_path, call):
    """The split is read, links are followed, the class is the folder below, and drawn files have its name."""
    (row,) = [row for row in ROWS if row.name == "cgan"]
    save_images(tmp_path / "pets", ["train/10/0", "train/cats/0", "test/10/0", "test/cats/0"], 10, 10)
    (tmp_path / "pets" / "train" / "dogs").symlink_to(tmp_path / "pets" / "test" / "cats")
    flags = [*row.tiny.split(), "--data", tmp_path / "pets", "--out", tmp_path / "run"]
    result = call(row, *flags, "--max-steps", 1)
    assert all(text in result.out for text in ("3 labels: 10, cats, dogs", "8x8 gray", "3 of 5 images"))
    for label, names in (("10", ["10", "10"]), ("dogs", ["dogs", "dogs"]), (None, ["10", "cats"])):
        to = tmp_path / f"out-{label}"
        assert call(row, *flags, "--sample", 2, "--to", to, *(["--label", label] if label else [])).said == 0
        assert sorted(file.name for file in to.iterdir()) == [f"{i:05}-{name}.png" for i, name in enumerate(names)]
    assert_refused(call(row, *flags, "--sample", 3, "--label", "2").said, "--label 2")
    save_images(tmp_path / "pets", ["train/stray"], 10, 10)
    assert_refused(call(row, *flags, "--max-steps", 2).said, "folder of training images for each label")
