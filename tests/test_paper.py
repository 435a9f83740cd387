"""Facts of the papers: sizes, layers, losses and updates, as published or worked out by hand."""

import math
from copy import deepcopy

import pytest
import torch
from PIL import Image
from torch import nn

import pix2pix


def count(net):
    """Number of parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def layers_of(net, x):
    """The layers that `net` runs through, in the order in which it calls them on x."""
    called, hooks = [], []
    for module in net.modules():
        if not [*module.children()]:
            hooks.append(module.register_forward_hook(lambda layer, *_: called.append(layer)))
    net(x)
    for hook in hooks:
        hook.remove()
    return called


def names(layers):
    """The class names of layers, as one string."""
    return " ".join(type(layer).__name__ for layer in layers)


# -- pix2pix ---------------------------------------------------------------------------------------------------------

TINY = "--size 16 --ngf 4 --ndf 4 --n-layers 1 --device cpu --precision fp32".split()
PATCHES = [  # strided layers, receptive field, grid for 256x256, weights with 6 channels and with 3
    (0, 1, 256, 9_024, 8_832),
    (1, 16, 126, 139_585, 136_513),
    (2, 34, 62, 666_433, 663_361),
    (3, 70, 30, 2_768_705, 2_765_633),
    (4, 142, 14, 6_964_033, 6_960_961),
    (5, 286, 6, 11_159_361, 11_156_289),
]


def tiny(*more):
    """Settings of a small pix2pix."""
    return pix2pix.get_args([*TINY, *more])


def pair(args, n=2, seed=3):
    """Random x and y in [-1, 1] for `args`."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.rand(n, 3, args.size, args.size, generator=rng) * 2 - 1 for _ in "xy"]


def weights(net):
    """A copy of all parameters, flat."""
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def by_hand(args, state, x, y, seed=5):
    """Losses, and gradients of G and of D, of an update from `state`, written out plainly from Eq. 4."""
    G, D = deepcopy(state["G"]), deepcopy(state["D"])
    torch.manual_seed(seed)
    fake = G(x)
    joined = (lambda image: torch.cat([x, image], 1)) if "cgan" in args.loss else (lambda image: image)
    losses, grads_D, loss_G = {}, None, 0
    if "gan" in args.loss:
        real_logits, fake_logits = D(joined(y)), D(joined(fake))
        losses["loss_D"] = -(real_logits.sigmoid().log().mean() + (1 - fake_logits.sigmoid()).log().mean()) / 2
        losses["loss_G"] = loss_G = -fake_logits.sigmoid().log().mean()
        grads_D = torch.autograd.grad(losses["loss_D"], [*D.parameters()], retain_graph=True)
    if "l1" in args.loss:
        losses["loss_l1"] = (y - fake).abs().mean()
        loss_G = loss_G + args.lambda_l1 * losses["loss_l1"]
    return losses, torch.autograd.grad(loss_G, [*G.parameters()]), grads_D


def gradients(state, name):
    """Gradients of the first update, which Adam keeps: its first moment starts as (1 - beta1) g."""
    optimizer = state[f"opt_{name}"]
    return [optimizer.state[parameter]["exp_avg"] / 0.5 for parameter in state[name].parameters()]


def stepped(args, state, x, y, seed=5):
    """The losses of one update of `state`, with dropout drawn from `seed`."""
    step = pix2pix.make_step(args, state)
    torch.manual_seed(seed)
    return step(x, y)


@pytest.mark.parametrize(
    "settings, parameters",
    [
        (dict(), 54_413_955),
        (dict(in_channels=1, out_channels=2), 54_409_858),
        (dict(size=128), 41_828_995),
        (dict(skips=False), 39_075_459),
    ],
)
def test_generator_parameters(settings, parameters):
    """U-Net 256, L to ab, U-Net 128 and the encoder-decoder are as large as published, to the unit."""
    with torch.device("meta"):
        assert count(pix2pix.Generator(**settings)) == parameters


@pytest.mark.parametrize("n, field, grid, joint, alone", PATCHES)
def test_discriminator_parameters(n, field, grid, joint, alone):
    """Each PatchGAN is as large as published, to the unit."""
    with torch.device("meta"):
        assert count(pix2pix.Discriminator(6, n_layers=n)) == joint
        assert count(pix2pix.Discriminator(3, n_layers=n)) == alone


@pytest.mark.parametrize("n, field, grid", [row[:3] for row in PATCHES])
def test_patches(n, field, grid):
    """A logit for each patch of a 256x256 image, and a patch as large as the paper says."""
    with torch.device("meta"):
        assert pix2pix.Discriminator(6, n_layers=n)(torch.zeros(2, 6, 256, 256)).shape == (2, 1, grid, grid)
    D = pix2pix.Discriminator(1, ndf=2, n_layers=n).double().eval()  # norms couple no pixels in eval mode
    for parameter in D.parameters():
        nn.init.constant_(parameter, 0.1)  # no two paths cancel
    x = torch.zeros(1, 1, 512, 512, dtype=torch.double, requires_grad=True)
    logits = D(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    for axis in (0, 1):
        seen = x.grad[0, 0].abs().sum(axis).nonzero().flatten()
        assert len(seen) == field == seen[-1] - seen[0] + 1


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_generator_shapes(size):
    """G is made for any power of two, maps an image to one as large, and also images twice as large or oblong."""
    with torch.device("meta"):
        G = pix2pix.Generator(size=size)
        for h, w in ((size, size), (2 * size, 2 * size), (size, 3 * size)):
            assert G(torch.zeros(1, 3, h, w)).shape == (1, 3, h, w)


def test_generator_layers():
    """The order of models.lua: no norm on first level, 1x1 bottleneck and output; dropout on three levels."""
    with torch.device("meta"):
        layers = layers_of(pix2pix.Generator(), torch.zeros(1, 3, 256, 256))
    encoder = ["Conv2d"] + ["LeakyReLU Conv2d InstanceNorm2d"] * 6 + ["LeakyReLU Conv2d"]
    decoder = ["ReLU ConvTranspose2d InstanceNorm2d Dropout"] * 3 + ["ReLU ConvTranspose2d InstanceNorm2d"] * 4
    assert names(layers) == " ".join(encoder + decoder + ["ReLU ConvTranspose2d Tanh"])
    convs = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    for conv in convs:
        assert (conv.kernel_size, conv.stride, conv.padding) == ((4, 4), (2, 2), (1, 1))
    assert [conv.out_channels for conv in convs[:8]] == [64, 128, 256, 512, 512, 512, 512, 512]
    assert [conv.in_channels for conv in convs[8:]] == [512, 1024, 1024, 1024, 1024, 512, 256, 128]
    assert [conv.out_channels for conv in convs[8:]] == [512, 512, 512, 512, 256, 128, 64, 3]
    assert {layer.negative_slope for layer in layers if isinstance(layer, nn.LeakyReLU)} == {0.2}
    assert {layer.p for layer in layers if isinstance(layer, nn.Dropout)} == {0.5}


def test_norm_of_a_generator():
    """It is batch norm of a batch of one, the paper's; so an image gives the same alone as in a larger batch."""
    torch.manual_seed(0)
    ours, theirs, x = nn.InstanceNorm2d(3, affine=True), nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(ours(x[:1]), theirs(x[:1]))
    G, x = pix2pix.init_weights(pix2pix.Generator(size=16, ngf=4)).double(), torch.randn(3, 3, 16, 16).double()
    for layer in G.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    torch.testing.assert_close(G(x), torch.cat([G(one[None]) for one in x]))


def test_encoder_decoder_layers():
    """Without skips the layers are the same, but no decoder level reads more than the level below."""
    with torch.device("meta"):
        x = torch.zeros(1, 3, 256, 256)
        plain, joined = (layers_of(pix2pix.Generator(skips=skips), x) for skips in (False, True))
    assert names(plain) == names(joined)
    ups = [layer.in_channels for layer in plain if isinstance(layer, nn.ConvTranspose2d)]
    assert ups == [512, 512, 512, 512, 512, 256, 128, 64]


def test_discriminator_layers():
    """C64-C128-C256-C512 and one logit: no norm on the first and the last layer, LeakyReLU of slope .2, no sigmoid."""
    with torch.device("meta"):
        layers = layers_of(pix2pix.Discriminator(), torch.zeros(1, 6, 256, 256))
    assert names(layers) == " ".join(["Conv2d LeakyReLU"] + ["Conv2d BatchNorm2d LeakyReLU"] * 3 + ["Conv2d"])
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [(conv.out_channels, conv.stride[0]) for conv in convs] == [(64, 2), (128, 2), (256, 2), (512, 1), (1, 1)]
    assert {layer.negative_slope for layer in layers if isinstance(layer, nn.LeakyReLU)} == {0.2}


def test_pixelgan_layers():
    """PixelGAN is C64-C128 with 1x1 kernels."""
    layers = layers_of(pix2pix.Discriminator(n_layers=0), torch.zeros(1, 6, 8, 8))
    assert names(layers) == "Conv2d LeakyReLU Conv2d BatchNorm2d LeakyReLU Conv2d"
    assert {layer.kernel_size for layer in layers if isinstance(layer, nn.Conv2d)} == {(1, 1)}


def test_output_range():
    """G ends in tanh: an output lies in [-1, 1] and comes near both ends."""
    torch.manual_seed(0)
    fake = pix2pix.Generator(size=16, ngf=4)(torch.randn(1, 3, 16, 16))
    assert -1 <= fake.min() < 0 < fake.max() <= 1
    G = pix2pix.Generator(size=16, ngf=4)
    last = layers_of(G, torch.zeros(2, 3, 16, 16))[-2]
    nn.init.normal_(last.weight, 0, 1e3)
    fake = G(torch.randn(2, 3, 16, 16))
    assert fake.min() == -1 and fake.max() == 1


def test_dropout_is_the_noise():
    """G gives another output each time in training mode, and the same one in eval mode."""
    torch.manual_seed(0)
    G, x = pix2pix.Generator(size=16, ngf=4), torch.randn(1, 3, 16, 16)
    assert not torch.equal(G(x), G(x))
    assert torch.equal(G.eval()(x), G(x))


def test_skips_carry_detail():
    """The output depends on x through each skip: an encoder-decoder of the same weights loses what the U-Net keeps."""
    x = torch.zeros(1, 1, 32, 32)
    for skips, reaches in ((True, True), (False, False)):
        torch.manual_seed(0)
        G = pix2pix.Generator(1, 1, size=32, ngf=2, skips=skips).eval()
        bottleneck = [layer for layer in layers_of(G, x) if isinstance(layer, nn.Conv2d)][-1]
        nn.init.zeros_(bottleneck.weight)
        assert torch.equal(G(x), G(torch.randn_like(x))) != reaches


def test_initial_weights():
    """N(0, .02) for convolutions, N(1, .02) for gains of batch norm, 0 for biases; drawn from the seed."""
    state = pix2pix.build(pix2pix.get_args(["--data", "facades", "--device", "cpu"]))
    assert (count(state["G"]), count(state["D"])) == (54_413_955, 2_768_705)
    gains = []
    for layer in [*state["G"].modules(), *state["D"].modules()]:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            n = layer.weight.numel()
            assert abs(layer.weight.mean()) < 5 * 0.02 / math.sqrt(n)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * n))
        if isinstance(layer, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            gains.append(layer.weight.detach())
        if getattr(layer, "bias", None) is not None:
            assert not layer.bias.any()
    gains = torch.cat(gains)
    assert gains.mean().item() == pytest.approx(1, abs=0.002) and gains.std().item() == pytest.approx(0.02, rel=0.1)


def test_weights_follow_the_seed():
    """The same seed gives the same weights, whatever was drawn before; another seed others."""
    one = pix2pix.build(tiny("--seed", "1"))
    torch.rand(7)
    again, other = pix2pix.build(tiny("--seed", "1")), pix2pix.build(tiny("--seed", "2"))
    for name in "GD":
        assert torch.equal(weights(one[name]), weights(again[name]))
        assert not torch.equal(weights(one[name]), weights(other[name]))


def test_gan_loss_by_hand():
    """-log D for real, -log(1 - D) for fake, mean over patches; log 2 where D is undecided; finite far out."""
    nought = torch.zeros(2, 1, 3, 3)
    assert pix2pix.gan_loss(nought, True).item() == pytest.approx(math.log(2))
    assert pix2pix.gan_loss(nought, False).item() == pytest.approx(math.log(2))
    logits = torch.tensor([-2.0, 0.5, 3.0]).view(1, 1, 1, 3)
    sure = [1 / (1 + math.exp(-logit)) for logit in (-2.0, 0.5, 3.0)]
    assert pix2pix.gan_loss(logits, True).item() == pytest.approx(-sum(map(math.log, sure)) / 3)
    assert pix2pix.gan_loss(logits, False).item() == pytest.approx(-sum(math.log(1 - p) for p in sure) / 3)
    assert pix2pix.gan_loss(logits, True).item() == pytest.approx((2.126928 + 0.474077 + 0.048587) / 3, abs=1e-5)
    far = torch.full((1, 1, 1, 1), 200.0)
    assert pix2pix.gan_loss(far, False) == pix2pix.gan_loss(-far, True) == 200
    assert pix2pix.gan_loss(far, True) == pix2pix.gan_loss(-far, False) == 0
    assert pix2pix.gan_loss(far.bfloat16(), True).dtype == torch.float32


@pytest.mark.parametrize("loss", ["l1", "gan", "cgan", "l1+gan", "l1+cgan"])
def test_update_by_hand(loss):
    """Losses and both gradients of an update are those of Eq. 4, D halved, for each row of Table 1."""
    args = tiny("--loss", loss, "--lambda-l1", "7")
    state, (x, y) = pix2pix.build(args), pair(args)
    losses, grads_G, grads_D = by_hand(args, state, x, y)
    D = weights(state["D"])
    got = stepped(args, state, x, y)
    assert got.keys() == losses.keys()
    for name in losses:
        assert got[name].shape == () and not got[name].requires_grad
        assert got[name].item() == pytest.approx(losses[name].item(), rel=1e-5)
    torch.testing.assert_close(gradients(state, "G"), [*grads_G], rtol=1e-4, atol=1e-6)
    if grads_D is None:
        assert [*got] == ["loss_l1"] and torch.equal(weights(state["D"]), D)
    else:
        torch.testing.assert_close(gradients(state, "D"), [*grads_D], rtol=1e-4, atol=1e-6)


def test_lambda_weighs_l1():
    """G's gradient holds lambda times that of L1: none at 0, and the difference grows with it."""
    grads = {}
    for weight in (0, 1, 100):
        args = tiny("--lambda-l1", str(weight))
        state = pix2pix.build(args)
        stepped(args, state, *pair(args))
        grads[weight] = torch.cat([grad.flatten() for grad in gradients(state, "G")])
    one, hundred = grads[1] - grads[0], grads[100] - grads[0]
    assert one.norm() > 0
    torch.testing.assert_close(hundred, 100 * one, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "loss, source, channels", [("cgan", [], 6), ("l1+gan", [], 3), ("l1+cgan", ["--from", "gray"], 3)]
)
def test_what_d_sees(loss, source, channels, tmp_path):
    """A conditional D sees input and output, an unconditional one only the output; L and ab are 1 and 2 channels."""
    state = pix2pix.build(tiny("--loss", loss, "--data", str(tmp_path), *source))
    first = next(layer for layer in state["D"].modules() if isinstance(layer, nn.Conv2d))
    assert first.in_channels == channels


@pytest.mark.parametrize("frozen, moved", ["DG", "GD"])
def test_updates_leave_each_other_alone(frozen, moved):
    """With one rate at 0 that network stays and the other moves: no update reaches across."""
    args = tiny()
    state, (x, y) = pix2pix.build(args), pair(args)
    before = {name: weights(state[name]) for name in "GD"}
    state[f"opt_{frozen}"].param_groups[0]["lr"].zero_()
    for _ in range(3):
        stepped(args, state, x, y)
    assert torch.equal(weights(state[frozen]), before[frozen])
    assert not torch.equal(weights(state[moved]), before[moved])


def test_gradients_do_not_pile_up():
    """The second update's gradients are its own, for G and D."""
    args = tiny()
    state, (x, y) = pix2pix.build(args), pair(args)
    for name in "GD":
        state[f"opt_{name}"].param_groups[0]["lr"].zero_()
    stepped(args, state, x, y)
    first = {name: gradients(state, name) for name in "GD"}
    stepped(args, state, x, y)
    for name in "GD":  # the moment of twice the same g is .75 g, of g and then 2 g it would be 1.25 g
        moments = [state[f"opt_{name}"].state[parameter]["exp_avg"] for parameter in state[name].parameters()]
        torch.testing.assert_close(moments, [0.75 * grad for grad in first[name]], rtol=1e-4, atol=1e-6)


def test_adam():
    """Adam with rate 2e-4 and betas .5, .999; the first update is that of Kingma and Ba's formula."""
    args = tiny()
    state, (x, y) = pix2pix.build(args), pair(args)
    for name in "GD":
        optimizer = state[f"opt_{name}"]
        (group,) = optimizer.param_groups
        assert isinstance(optimizer, torch.optim.Adam)
        assert torch.is_tensor(group["lr"]) and group["lr"].item() == pytest.approx(2e-4)
        assert (tuple(group["betas"]), group["eps"], group["weight_decay"]) == ((0.5, 0.999), 1e-8, 0)
        assert sum(parameter.numel() for parameter in group["params"]) == count(state[name])
    before = {name: weights(state[name]) for name in "GD"}
    stepped(args, state, x, y)
    for name in "GD":
        grad = torch.cat([grad.flatten() for grad in gradients(state, name)])
        expected = before[name] - 2e-4 * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(weights(state[name]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "pairs, batch, epochs, decay, factors",
    [
        (2, 1, 3, 0, [1, 1, 1, 1, 1, 1]),
        (2, 1, 4, 2, [1, 1, 1, 1, 2 / 3, 2 / 3, 1 / 3, 1 / 3]),
        (2, 1, 3, 3, [3 / 4, 3 / 4, 2 / 4, 2 / 4, 1 / 4, 1 / 4]),
        (1, 1, 4, 1, [1, 1, 1, 1 / 2]),
        (3, 2, 1, 0, [1, 1]),  # the last batch reaches beyond the last epoch
        (5, 4, 1, 1, [1 / 2, 1 / 2]),
    ],
)
def test_learning_rate(pairs, batch, epochs, decay, factors, tmp_path, monkeypatch):
    """The rate of epoch e is 1 - max(0, e - (epochs - decay)) / (decay + 1) of --lr; constant without decay."""
    for i in range(pairs):
        Image.new("RGB", (32, 16), (50 * i, 50, 200)).save(tmp_path / f"{i}.png")
    rates, original = [], pix2pix.make_step

    def make_step(args, state):
        step = original(args, state)

        def recorded(x, y):
            rates.append([state[f"opt_{name}"].param_groups[0]["lr"].item() for name in "GD"])
            return step(x, y)

        return recorded

    monkeypatch.setattr(pix2pix, "make_step", make_step)
    settings = [
        "--data",
        tmp_path,
        "--out",
        tmp_path / "run",
        "--data-root",
        tmp_path / "cache",
        "--epochs",
        epochs,
        "--decay-epochs",
        decay,
    ]
    pix2pix.main([*TINY, *map(str, settings), "--batch-size", str(batch), "--lr", "0.001"])
    for network in (0, 1):
        assert [rate[network] for rate in rates] == pytest.approx([0.001 * factor for factor in factors], rel=1e-5)


def test_defaults_are_the_papers(tmp_path, monkeypatch):
    """What is not given is as in the paper, and settling it touches no disk."""
    monkeypatch.chdir(tmp_path)
    args = vars(pix2pix.get_args(["--data", "facades"]))
    paper = dict(size=256, load_size=286, epochs=200, decay_epochs=0, batch_size=1, lambda_l1=100, lr=2e-4)
    paper |= dict(direction="BtoA", loss="l1+cgan", n_layers=3, ngf=64, ndf=64, no_skips=False, no_mirror=False)
    assert {name: args[name] for name in paper} == paper
    maps, own = pix2pix.get_args(["--data", "maps"]), pix2pix.get_args(["--data", str(tmp_path)])
    assert maps.direction == own.direction == "AtoB" and maps.size == own.size == 256
    for name, epochs in (("edges2shoes", 15), ("edges2handbags", 15), ("night2day", 17)):
        args = pix2pix.get_args(["--data", name])
        assert (args.epochs, args.batch_size) == (epochs, 4)
    assert pix2pix.get_args(["--data", "facades", "--direction", "AtoB"]).direction == "AtoB"
    assert not [*tmp_path.iterdir()]
