# /// script
# requires-python = ">=3.11.4"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "tqdm>=4.66", "filelock>=3"]
# ///
"""GAN: a generator and a discriminator, trained against each other until the one draws like the data.

Goodfellow, Pouget-Abadie, Mirza, Xu, Warde-Farley, Ozair, Courville, Bengio: Generative Adversarial Nets. NIPS 2014,
arXiv:1406.2661. G maps noise z to an image G(z). D tells images x of the data from G(z):
    min_G max_D  E[log D(x)] + E[log(1 - D(G(z)))]                                                (Eq. 1)

    python gan.py                                     # train on toy digits, drawn here: minutes on a CPU
    python gan.py --data mnist                        # download and train; stop it, repeat this to resume
    python gan.py --data mnist --sample 100           # draw 100 images with what was trained

Networks, dropout, noise and SGD, which the paper leaves out, are those of the authors' code. As there, one pass of D
over G(z) serves both losses, with one dropout mask, and then both networks step. Departures: Adam is ours, for minutes
instead of an hour; with it a running mean of G's weights draws (G_mean), as G itself wavers from update to update.
For CIFAR-10 an image is scaled to mean 0 and variance 1 (the authors: to a norm of 55), and the batch of the
convolutional pair is 100 (128). The mean image, where G's output starts, is clamped to .001 (1e-7).
"""

import argparse
import contextlib
import copy
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor, resize, rgb_to_grayscale, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

METHOD, SCRIPT = "gan", Path(__file__).stem
SETS = {  # torchvision's class, how many of its images are for training, and other defaults
    "toy": dict(optimiser="adam", average=0.999, ngf=400, ndf=80, epochs=60, save_every=2000),
    "mnist": dict(reader="MNIST", count=50000),
    "fashion-mnist": dict(reader="FashionMNIST", count=50000),
    "cifar10": dict(reader="CIFAR10", count=40000, net="fc", channels=3, size=32),
}
NETS = {  # the authors' networks, and their rates of SGD
    "mnist": dict(ngf=1200, ndf=240, lr=0.1),
    "fc": dict(ngf=8000, ndf=1600, lr=0.025),
    "conv": dict(ngf=8000, ndf=32, lr=0.004),
}
OPTIMISERS = {"sgd": dict(epochs=250, average=0.0), "adam": dict(lr=1e-3, epochs=40, average=0.9999)}
FIXED = "white size channels net nz ngf ndf k saturating optimiser average seed".split()
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = {"train": "train", "val": "val", "eval": "val", "dev": "val", "test": "test"}
SPLIT = r"(?<![^/])(?i:(train|e?val|dev|test)(?:ing|id|idation|uation|20\d\d|set|images|data|[_-])*)(?:/|(?=[AB]/))"


def get_args(argv=None):
    """Options from `argv` or the command line. The defaults are the authors', or those of the named set."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", allow_abbrev=False, add_help=False)
    parser.description = __doc__.partition("\n")[0]
    parser.formatter_class = functools.partial(argparse.ArgumentDefaultsHelpFormatter, width=120, max_help_position=36)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", help=f"a folder of images, or one of {', '.join(SETS)}")
    add("--data-root", type=Path, default="data", help="for downloads")
    add("--white", type=int, default=65535, help="16-bit pixel value that is white")
    add("--size", type=int, default=28, help="pixels a side")
    add("--channels", type=int, choices=(1, 3), default=1, help="gray or colour")
    add = parser.add_argument_group("method").add_argument
    add("--net", choices=NETS, default="mnist", help="networks for MNIST, or one of the pairs for CIFAR-10")
    add("--nz", type=int, default=100, help="numbers in z")
    add("--ngf", type=int, help="units of G's hidden layers; fc and conv 8000")
    add("--ndf", type=int, help="maxout units of D's layers, fc 1600; channels of its first, conv 32")
    add("--k", type=int, default=1, help="updates of D for one of G, Algorithm 1")
    add("--saturating", action="store_true", help="G descends log(1 - D(G(z))), as Algorithm 1 prints it")
    add("--optimiser", choices=OPTIMISERS, default="sgd", help="the authors', or the faster one")
    add("--average", type=float, help="draw with a running mean of G's weights, of this decay")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, help="passes over the images")
    add("--batch-size", type=int, default=100, help="images in an update of D")
    add("--lr", type=float, help="learning rate; SGD: at first, .1, fc .025, conv .004; Adam: 1e-3")
    add("--seed", type=int, default=0, help="of weights, order, noise and dropout; of z for --sample")
    add("--out", type=Path, help=f"run folder; None: runs/{SCRIPT}-DATA")
    add("--init", type=Path, metavar="RUN", help="start from the weights of another run (fine-tuning)")
    add("--max-steps", type=int, help="stop after this many updates in all")
    add("--save-every", type=int, help="updates between checkpoints; None: ten minutes")
    add("--fresh", action="store_true", help="start anew: delete checkpoint, log and pictures")
    add("--device", help="cpu, cuda, cuda:1, mps, ...; None: the accelerator, if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: fp32, as bf16 draws worse")
    add("--no-capture", action="store_true", help="do not use a CUDA graph")
    add = parser.add_argument_group("use of a trained model").add_argument
    add("--sample", type=int, metavar="N", help="draw N images with the trained G")
    add("--to", type=Path, help="folder for samples; None: OUT/sampled")
    data = parser.parse_known_args(argv)[0].data  # first, as the other defaults depend on it
    data = f"./{data}" if data in SETS and Path(data).is_dir() else data  # a folder that is there comes first
    parser.set_defaults(**SETS.get(data, {}))
    given = parser.parse_known_args(argv)[0]
    parser.set_defaults(**NETS[given.net] | OPTIMISERS[given.optimiser] | SETS.get(data, {}))
    parser.add_argument("-h", "--help", action="help", help="show this; --data sets the defaults")
    args = parser.parse_args(argv)
    args.data, args.precision = data, args.precision.replace("auto", "fp32")
    check_args(args, may_be_zero=("average", "lr", "seed"))
    if args.net == "conv" and (args.size < 20 or args.size % 3 != 2):
        fail(f"--size {args.size}: the convolutional networks take 20, 23, 26, 29, 32, ... pixels")
    if args.average >= 1:
        fail(f"--average {args.average}: give a number below 1")
    if args.to and not args.sample:
        fail("--to needs --sample")
    return args


# -- the method ------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """z (N, nz) -> x (N, channels, size, size), in [0, 1] for mnist, of mean 0 and variance 1 for fc and conv."""

    def __init__(self, net="mnist", nz=100, ngf=1200, channels=1, size=28):
        super().__init__()
        self.shape, side = (channels, size, size), (size - 2) // 3
        layers = [nn.Linear(nz, ngf), nn.ReLU()]
        if net == "conv":
            layers += [nn.Linear(ngf, 80 * side * side), nn.Sigmoid(), nn.Unflatten(1, (80, side, side))]
            layers += [nn.ConvTranspose2d(80, channels, 5, 3, bias=False)]
        else:
            layers += [nn.Linear(ngf, ngf), nn.ReLU() if net == "mnist" else nn.Sigmoid()]
            layers += [nn.Linear(ngf, math.prod(self.shape), bias=False)]
        self.layers, self.bias = nn.Sequential(*layers), nn.Parameter(torch.zeros(self.shape))
        self.end = nn.Sigmoid() if net == "mnist" else nn.Identity()

    def forward(self, z):
        return self.end(self.layers(z).view(-1, *self.shape) + self.bias)


class Maxout(nn.Module):
    """The largest of `pieces` linear functions, for each unit or channel: (N, C, ...) -> (N, units, ...)."""

    def __init__(self, linear, pieces):
        super().__init__()
        self.linear, self.pieces = linear, pieces

    def forward(self, x):
        return self.linear(x).unflatten(1, (-1, self.pieces)).amax(2)


class Discriminator(nn.Module):
    """x (N, channels, size, size) -> logits (N,). Two layers of maxout units; conv: three of channels, one of units."""

    def __init__(self, net="mnist", ndf=240, channels=1, size=28):
        super().__init__()
        if net == "conv":
            layers, c_in = [], channels
            for c_out, kernel, pad, pool in ((ndf, 8, 4, 4), (ndf, 8, 3, 4), (6 * ndf, 5, 3, 2)):
                conv, size = nn.Conv2d(c_in, 2 * c_out, kernel, padding=pad), size + 2 * pad - kernel + 1
                layers += [Maxout(conv, 2), nn.MaxPool2d(pool, 2, ceil_mode=True), nn.Dropout(0.5)]
                c_in, size = c_out, -((pool - size) // 2) + 1  # the last window may reach over the edge
            layers += [nn.Flatten(), Maxout(nn.Linear(c_in * size * size, 2500), 5), nn.Dropout(0.5), nn.Linear(500, 1)]
        else:
            layers = [nn.Flatten(), Maxout(nn.Linear(channels * size * size, 5 * ndf), 5), nn.Dropout(0.5)]
            layers += [Maxout(nn.Linear(ndf, 5 * ndf), 5), nn.Dropout(0.5), nn.Linear(ndf, 1)]
        self.layers = nn.Sequential(nn.Dropout(0.2), *layers)

    def forward(self, x):
        return self.layers(x).squeeze(1)


def init_weights(net, width):
    """Uniform in +-width for weights, zero for biases (as the authors' code)."""
    for weight in net.parameters():
        if weight.ndim in (1, 3):  # a bias for each unit, or for each pixel
            nn.init.zeros_(weight)
        else:
            nn.init.uniform_(weight, -width, width)
    return net


class Momentum(torch.optim.Optimizer):
    """SGD as in the code of GAN's authors: v <- momentum v - lr g, w <- w + v, with both rates as tensors."""

    def __init__(self, weights, lr, momentum):
        super().__init__(weights, dict(lr=lr, momentum=momentum))
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["v"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        weights, vs = group["params"], [self.state[weight]["v"] for weight in group["params"]]
        torch._foreach_mul_(vs, group["momentum"])
        torch._foreach_sub_(vs, torch._foreach_mul([weight.grad for weight in weights], group["lr"]))
        torch._foreach_add_(weights, vs)


def gan_loss(logits, real):
    """-log D if `real`, else -log(1 - D), mean over the batch; D = sigmoid(logits). (N,) -> 0-d."""
    return F.softplus(-logits.float() if real else logits.float()).mean()


def draw_z(args, count):
    """Noise of variance 1: uniform for MNIST, normal for CIFAR-10 (as the authors' code). -> (count, nz)."""
    if args.net == "mnist":
        return (2 * torch.rand(count, args.nz, device=args.device) - 1) * math.sqrt(3)
    return torch.randn(count, args.nz, device=args.device)


def build(args):
    """{name: network or optimizer} on args.device: all that is learned, and so all that last.pt holds."""
    torch.manual_seed(args.seed)
    G = init_weights(Generator(args.net, args.nz, args.ngf, args.channels, args.size), 0.05)
    if args.net == "fc":
        nn.init.uniform_(G.layers[-1].weight, -0.5, 0.5)
    D = init_weights(Discriminator(args.net, args.ndf, args.channels, args.size), 0.005)
    state = {"G": G.to(args.device), "D": D.to(args.device)}
    if args.average:
        state["G_mean"] = copy.deepcopy(G).requires_grad_(False)
    for name in "GD":  # rates are tensors, so that a CUDA graph follows the schedule
        weights, lr = state[name].parameters(), torch.tensor(args.lr, device=args.device)
        if args.optimiser == "sgd":
            state[f"opt_{name}"] = Momentum(weights, lr, torch.tensor(0.5, device=args.device))
        else:
            adam = dict(betas=(0.5, 0.999), fused=True, capturable="cuda" in args.device)
            state[f"opt_{name}"] = torch.optim.Adam(weights, lr, **adam)
    return state


def make_step(args, state):
    """Returns `step(x)`: k updates of D, one of G (Algorithm 1), on x (k * N, C, size, size) scaled as G(z)."""
    G, D, opt_G, opt_D = state["G"], state["D"], state["opt_G"], state["opt_D"]

    def step(x):
        for i, real in enumerate(x.chunk(args.k), 1):
            opt_D.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16, args.precision == "bf16"):
                fake = G(draw_z(args, len(real)))
                on_real, on_fake = D(real), D(fake)
            # D: max log D(x) + log(1 - D(G(z))), halved as in the authors' code
            loss_D = (gan_loss(on_real, True) + gan_loss(on_fake, False)) / 2
            loss_D.backward(inputs=list(D.parameters()), retain_graph=i == args.k)
            if i < args.k:
                opt_D.step()
        # G: max log D(G(z)), which gives strong gradients early (Sec. 3), or min log(1 - D(G(z))) (Algorithm 1)
        loss_G = -gan_loss(on_fake, False) if args.saturating else gan_loss(on_fake, True)
        opt_G.zero_grad()
        loss_G.backward(inputs=list(G.parameters()))
        opt_D.step()
        opt_G.step()
        return {"loss_D": loss_D.detach(), "loss_G": loss_G.detach()}

    return step


def train(args):
    """Train for --epochs, from last.pt if it is there, then show walks and neighbours. Returns the run folder."""
    check_settings(args)
    images, state = load_images(args), build(args)
    fixed_z, drawer = draw_z(args, 100), state.get("G_mean", state["G"])
    run = Run(args, state)
    if args.net == "mnist" and not (run.step or args.init):  # G's output starts at the mean image
        state["G"].bias.data = to_x(args, images).mean(0).clamp(0.001, 0.999).logit()
    update, loader = capture(make_step(args, state), args), batches(args, images, run.images_seen)
    for step, (epoch, x) in zip(run.steps(args.epochs * len(images), args.k * args.batch_size), loader):
        for name in ("opt_G", "opt_D") if args.optimiser == "sgd" else ():
            state[name].param_groups[0]["lr"].fill_(max(args.lr / 1.000004**step, min(args.lr, 1e-6)))
            state[name].param_groups[0]["momentum"].fill_(0.5 + 0.2 * min((epoch - 1) / 249, 1))
        set_seed(args, step)  # of z and the dropout
        losses = update(x)
        if args.average:  # at first of all updates, later of about the last 1 / (1 - average)
            weights = [weight.detach() for weight in state["G"].parameters()]
            torch._foreach_lerp_(list(drawer.parameters()), weights, max(1 - args.average, 1 / step))
        if run.report(epoch, losses):  # it is time to save
            save_grid(args.out / "samples" / f"{step:07}.png", draw(args, drawer, fixed_z), ["samples", *[""] * 9])
            run.save_checkpoint()
    save_walk(args, drawer, fixed_z[:16], args.out / "samples" / f"{run.step:07}-walk.png")
    save_nearest(args, draw(args, drawer, fixed_z[:20]), images, args.out / "samples" / f"{run.step:07}-nearest.png")
    return args.out


# -- data and pictures -----------------------------------------------------------------------------------------------


def digits(count, seed, size=28):
    """Toy digits, uint8 (count, 1, size, size), white on black, and labels (count,): glyphs under affine maps."""
    rng = np.random.default_rng(seed)
    rows = "ehhhhhe 4c4444e eh1248v v2421he 26aiv22 vgu11he 68guhhe v124888 ehhehhe ehhf12c"  # 5 dots a base 32 digit
    glyphs = np.array([[int(dots, 32) for dots in glyph] for glyph in rows.split()])[..., None] >> [4, 3, 2, 1, 0] & 1
    labels, (turn, slant) = rng.integers(0, 10, count), rng.uniform(-0.2, 0.2, (2, count))
    wide, high = rng.uniform(1.3, 1.9, count), rng.uniform(1.1, 1.4, count)
    x_axis = [wide * np.cos(turn), wide * (slant - np.sin(turn)), rng.uniform(-0.25, 0.25, count)]
    y_axis = [high * np.sin(turn), high * np.cos(turn), rng.uniform(-0.12, 0.12, count)]
    maps = torch.from_numpy(np.array([x_axis, y_axis])).permute(2, 0, 1).float()
    grid = F.affine_grid(maps, (count, 1, size, size), align_corners=False)
    ink = F.grid_sample(torch.from_numpy(glyphs)[labels, None].float(), grid, align_corners=False)
    thin, grain = rng.uniform(0.25, 0.45, (count, 1, 1, 1)), rng.normal(0, 6, (count, 1, size, size))
    pixels = (5 * (ink.numpy() - thin)).clip(0, 1) * 250 + abs(grain)
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


def load_images(args):
    """The training images on the device, uint8 (N, channels, size, size)."""
    args.images, shape = args.data, (args.size, args.size)
    if args.data == "toy":
        images = digits(10000, 0, args.size)[0]
    elif args.data in SETS:
        with explain_errors(f"{args.data} cannot be downloaded: put torchvision's files for it into {args.data_root}"):
            data = getattr(datasets, args.reader)(args.data_root, download=True)
        images = torch.as_tensor(data.data[: args.count])  # the first ones, as in the authors' code
        images = resize(images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2), shape)
    else:
        found = find_images(args.data)
        files = [file for split, _, file in found if split == "train"] or fail(f"{args.data} has no training images")
        sizes = [(file.name, file.stat().st_size) for file in files]
        args.images = hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]  # a run belongs to its images
        mode, colour = ("L", "gray") if args.channels == 1 else ("RGB", "RGB")
        print(f"{args.data}: {len(files)} of {len(found)} images are for training, as {args.size}x{args.size} {colour}")
        squares = [ImageOps.fit(read_image(file, args.white).convert(mode), shape) for file in files]
        images = torch.stack([pil_to_tensor(square) for square in squares])
    images = rgb_to_grayscale(images) if args.channels == 1 else images.expand(-1, 3, -1, -1)
    return images.to(args.device)


def to_x(args, pixels):
    """uint8 (N, C, size, size) to [0, 1]; for CIFAR-10's networks each image to mean 0 and variance 1."""
    x = pixels / 255
    if args.net != "mnist":
        x = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True).clamp(0.01)
    return x


def batches(args, images, images_seen):
    """Yields epoch and x (k * B, C, size, size), without end. Put your own loader here."""
    size, epochs = args.k * args.batch_size, itertools.count(images_seen // len(images))
    rngs = (np.random.default_rng([args.seed, epoch]) for epoch in epochs)
    orders = (torch.from_numpy(rng.permutation(len(images))).to(images.device) for rng in rngs)
    queue = next(orders)[images_seen % len(images) :]
    for first in itertools.count(images_seen, size):
        while len(queue) < size:  # a batch may reach into the next epochs
            queue = torch.cat([queue, next(orders)])
        chosen, queue = queue[:size], queue[size:]
        yield first // len(images) + 1, to_x(args, images[chosen])


@torch.no_grad()
def draw(args, G, z):
    """The images G(z), uint8 (N, channels, size, size)."""
    with torch.autocast(z.device.type, torch.bfloat16, args.precision == "bf16"):
        x = torch.cat([G(part).float() for part in z.split(1000)])
    x = x if args.net == "mnist" else x / 4 + 0.5  # the mean and about the contrast of a usual photo
    return (x.clamp(0, 1) * 255).round().byte().cpu()


def save_walk(args, G, z, path):
    """Straight lines, sixteen images each, from the first half of z (2 * N, nz) to the second (Fig. 3)."""
    way = torch.linspace(0, 1, 16, device=z.device)[:, None]
    walk = torch.lerp(*z.view(2, -1, 1, args.nz), way).flatten(0, 1)  # (N * 16, nz)
    save_grid(path, draw(args, G, walk), ["G(z)", *[""] * 14, "G(z')"])


def save_nearest(args, samples, images, path):
    """Each of `samples` beside the training image nearest to it in squared distance of pixels (Fig. 2)."""
    x, data = to_x(args, samples.to(args.device)).flatten(1), to_x(args, images).flatten(1)
    nearest = torch.cdist(x, data, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    cells = torch.stack([samples, images[nearest].cpu()], 1).flatten(0, 1)
    save_grid(path, cells, ["sample", "nearest in data"] * 5)


def load_generator(run, device="cpu"):
    """G of a run folder, z (N, nz) to x (N, C, size, size) as in `Generator`: G_mean, where the run has it."""
    checkpoint = load_checkpoint(run)
    settings = argparse.Namespace(**checkpoint["settings"])
    with explain_errors(f"{run}/last.pt is damaged"), torch.device("meta"):  # the weights are those of the file
        G = Generator(settings.net, settings.nz, settings.ngf, settings.channels, settings.size)
        G.load_state_dict(checkpoint.get("G_mean", checkpoint["G"]), assign=True)
    G.settings = settings
    return G.to(device)


def sample(args):
    """Draw --sample images with a trained G, and beside their folder a walk. Returns the folder."""
    check_settings(args, use=True)
    G, to = load_generator(args.out, args.device), args.to or args.out / "sampled"
    args.net, args.nz = G.settings.net, G.settings.nz
    torch.manual_seed(args.seed)
    for i, image in enumerate(draw(args, G, draw_z(args, args.sample))):
        atomic_write(to / f"{i:05}.png", to_pil_image(image).save)
    save_walk(args, G, draw_z(args, 16), to.with_name(f"{to.name}-walk.png"))
    print(f"{args.sample} images are drawn into {to}, which has {len([*to.iterdir()])} now; a walk is beside it")
    return to


# -- the same in all six scripts -------------------------------------------------------------------------------------


def fail(sentence):
    """End the script with one sentence that says what to mend."""
    sys.exit(f"{SCRIPT}: {sentence}")


@contextlib.contextmanager
def explain_errors(sentence):
    """An error inside ends the script with `sentence` and the cause."""
    try:
        yield
    except Exception as error:
        cause = str(error).partition("\n")[0].partition(". ")[0]
        fail(f"{sentence} ({cause or type(error).__name__})")


def atomic_write(path, write):
    """Let `write` make a file beside `path`, then rename it: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    write(part)
    os.replace(part, path)


def check_args(args, may_be_zero):
    """Check --data and numbers; choose run folder, device and precision."""
    if args.data not in SETS and not os.path.isdir(args.data):
        fail(f"--data {args.data} is neither a folder nor one of {', '.join(SETS)}")
    for name, value in vars(args).items():
        if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and name in may_be_zero):
            fail(f"--{name.replace('_', '-')} {value}: give a number above 0")
    args.out = args.out or Path("runs", f"{SCRIPT}-{Path(args.data).resolve().name}")
    if args.out.resolve() == Path(args.data).resolve():
        fail(f"--out {args.out} is --data: give another folder")
    args.script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    device = args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with explain_errors(f"--device {device} is not on this machine"):
        args.device = str(torch.empty(1, device=device).device)
        if "cuda" in args.device:
            torch.cuda.set_device(args.device)
    if args.precision == "auto":
        on_cpu, cpu = args.device == "cpu", torch.cpu.get_capabilities()
        built_for_bf16 = cpu.get("avx512_bf16") if on_cpu else torch.cuda.is_bf16_supported(False)
        args.precision = "bf16" if built_for_bf16 else "fp32"


def check_settings(args, use=False):
    """Compare the settings with those of the run. To resume, what is FIXED may not differ. To `use` G, it is said."""
    if args.fresh or not (args.out / "last.pt").exists():
        return
    fixed, others = [], []
    for name, value in load_checkpoint(args.out)["settings"].items():
        now, option = getattr(args, name, value), name.replace("_", "-").replace("source", "from")
        if now != value and name in FIXED and not (use and name == "seed"):
            given = f"--{option}" if value is True else f"--{option} {value}"
            fixed.append(f"no --{option}" if value is None or value is False else given)
        elif now != value and type(value) in (int, float, str) and not use:
            others.append(f"{args.out}: {option} was {value}, is {now}\n")
    if fixed and not use:
        fail(f"{args.out} was trained with {', '.join(fixed)}: repeat that, or give another --out, or --fresh")
    if fixed:
        print(f"{args.out} was trained with {', '.join(fixed)}, and is used so")
    print("".join(others), end="")


class Run:
    """The run folder: resumes and saves `state`, logs, and stops on a signal. One process owns it at a time."""

    def __init__(self, args, state):
        """Resume from last.pt if it is there; or else start, from the networks of --init if it is given."""
        self.args, self.state, self.log, last = args, state, args.out / "log.jsonl", args.out / "last.pt"
        self.settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        self.lock, self.signals, self.should_stop = FileLock(args.out / ".lock"), [], 0
        with explain_errors(f"{args.out} is in use by another process"):
            self.lock.acquire(timeout=0)
        resume = last.exists() and not args.fresh
        run = args.out if resume else args.init
        saved = load_checkpoint(run) if run else {}
        if not resume:
            saved |= {"settings": self.settings, "step": 0, "images_seen": 0, "log_size": 0}
        for old in [last, *args.out.glob("samples/*.png"), *args.out.glob("test/**/*.png")] if args.fresh else []:
            old.unlink(missing_ok=True)
        with explain_errors(f"{run}/last.pt has other networks, or is damaged"):
            if saved["settings"].get("images") != self.settings.get("images"):
                fail(f"{args.out} has learned from other images: give those, or --fresh, or another --out")
            self.step, self.images_seen = int(saved["step"]), int(saved["images_seen"])
            self.log_size = int(saved["log_size"])
            for name, part in state.items():
                if self.step and name.startswith("opt"):  # with the current rate and device
                    saved[name]["param_groups"] = part.state_dict()["param_groups"]
                if self.step or args.init and not name.startswith(("opt", "pool")):
                    part.load_state_dict(saved[name])

    def steps(self, images, batch):
        """Yields the steps, each of a `batch`, until all `images` are seen. A signal ends them, and then the script."""
        args, self.first_image = self.args, self.images_seen
        goal = self.step + max(0, math.ceil((images - self.images_seen) / batch))
        self.last_step = min(goal, args.max_steps or goal)
        with open(self.log, "a") as log:
            log.truncate(min(log.tell(), self.log_size))
        begin = "resuming" if self.step else "starting"
        print(f"{begin} {args.out} at step {self.step} of {goal}, {args.device}, {args.precision}")
        self.bar = tqdm(initial=self.step, total=self.last_step, delay=1, mininterval=2, file=sys.stdout)
        self.start_time = self.last_save = self.last_report = time.monotonic()
        with contextlib.ExitStack() as cleanup:  # at the end, also after an error
            cleanup.callback(self.lock.release)
            for number in signal.Signals:  # one that nohup ignores stays ignored
                if number.name in ("SIGINT", "SIGTERM", "SIGHUP") and signal.getsignal(number) != signal.SIG_IGN:
                    handler = signal.signal(number, lambda number, frame: self.signals.append(number))
                    cleanup.callback(signal.signal, number, handler)
            while self.step < self.last_step and not self.should_stop:
                self.step, self.images_seen = self.step + 1, self.images_seen + batch
                yield self.step
        with contextlib.suppress(OSError):
            self.bar.close()
            done = "finished" if self.step == goal else "saved"
            print(f"{args.out} is {done} at step {self.step} of {goal}; pictures are in its samples/")
        if self.should_stop:
            sys.exit(128 + self.should_stop)

    def report(self, epoch, losses):
        """Log the losses every two seconds, set should_stop after a signal. Returns whether to save now."""
        number, every, now = torch.tensor(max(self.signals, default=0)), self.args.save_every, time.monotonic()
        self.should_stop = number.item()
        due = self.step % every == 0 if every else now - self.last_save > 600
        save = due or self.should_stop or self.step == self.last_step
        self.last_save = now if save else self.last_save
        with contextlib.suppress(OSError):  # a terminal or pipe may be closed
            self.bar.update()
        if save or now - self.last_report > 2:
            self.last_report = now
            losses = {name: loss.item() for name, loss in losses.items()}  # waits for the device
            if not all(map(math.isfinite, losses.values())):
                fail(f"a loss is not finite at step {self.step}: {losses}; last.pt is kept; try a lower --lr")
            rate = (self.images_seen - self.first_image) / (now - self.start_time)
            with open(self.log, "a") as log:
                log.write(json.dumps({"step": self.step, "epoch": epoch, **losses, "images_per_s": rate}) + "\n")
            self.bar.set_postfix(losses, images_per_s=rate, refresh=False)
        return save

    def save_checkpoint(self):
        """Write last.pt: states of networks and optimizers, settings, counts. config.json is for people."""
        checkpoint = {name: part.state_dict() for name, part in self.state.items()}
        checkpoint |= {"script": METHOD, "settings": self.settings, "step": self.step, "images_seen": self.images_seen}
        checkpoint["log_size"] = self.log.stat().st_size
        atomic_write(self.args.out / "last.pt", lambda part: torch.save(checkpoint, part))
        config = json.dumps(self.settings | {"torch": torch.__version__}, indent=2)
        atomic_write(self.args.out / "config.json", lambda part: part.write_text(config))


def set_seed(args, step):
    """Random numbers on the device depend on --seed and the step alone: a resumed run is the same run."""
    generators = torch.cuda if "cuda" in args.device else torch  # torch's would seed all, slower
    generators.manual_seed(hash((args.seed, step)))


def load_checkpoint(run):
    """The dict in RUN/last.pt, on the CPU. No code in it is run."""
    path = Path(run, "last.pt")
    if not path.exists():
        fail(f"there is no {path}: train first, or name another run")
    with explain_errors(f"{path} is not a checkpoint of {METHOD}"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
        assert checkpoint["script"] == METHOD and "seed" in checkpoint["settings"], "it has other contents"
    return checkpoint


def capture(step, args):
    """On CUDA, `step` as one CUDA graph, recorded in the fourth call. Each call overwrites the losses of the last."""
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True  # convolutions have TF32 anyway
    if "cuda" not in args.device or args.no_capture:
        return step
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be recorded
    graph, calls, inputs, losses = torch.cuda.CUDAGraph(), itertools.count(), [], {}

    def replay(*batch):
        if next(calls) < 3:  # warm up
            return step(*batch)
        if not inputs:
            inputs.extend(tensor.clone() for tensor in batch)
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                losses.update(step(*inputs))
        for kept, new in zip(inputs, batch):
            kept.copy_(new)
        graph.replay()
        return losses

    return replay


def find_images(folder, others=()):
    """[(split, folders, file)] of all images below `folder`; the split is train, val or test if a folder says so."""
    found, names = [], sorted(Path(name).as_posix() for name in glob.glob("**/*", root_dir=folder, recursive=True))
    runs = tuple(name.removesuffix("log.jsonl") for name in names if name.endswith("/log.jsonl"))
    names = [name for name in names if not name.startswith(runs) and not Path(folder, name).is_dir()]
    images = [name for name in names if name.lower().endswith(IMAGES) and Path(folder, name).exists()]
    images = [name for name in images if "_ids/" not in name]  # class ids
    left_out = sum(not name.endswith(others) for name in {*names} - {*images})
    if left_out:
        print(f"{folder}: other endings, broken links and *_ids are left out: {left_out} files")
    for name in images:
        split, rest = re.search(SPLIT, name), re.sub(SPLIT, "", name, count=1)
        found.append((SPLITS[split[1].lower()] if split else "train", rest.rpartition("/")[0], Path(folder, name)))
    return found or fail(f"{folder} has no images ({', '.join(IMAGES)})")


def read_image(file, white=65535):
    """An image as RGB with 8 bits, upright, transparent pixels on white. `white` is the brightest of 16 bits."""
    with explain_errors(f"{file} cannot be used as an image"), Image.open(file) as image:
        more_bands = 0 in getattr(image, "tag_v2", {}).get(338, ())  # of a TIFF, and not alpha
        deep = re.search(";16[BLN]", str(image.tile)) and image.mode[:4] != "I;16"  # colour: Pillow drops bits
        pages = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
        if image.mode in ("I", "F") or more_bands or deep or pages > 1:
            raise ValueError(f"mode {image.mode}; give 8 bits, or 16 bits in gray, one page")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray(np.uint8(np.minimum(np.asarray(image, np.uint32), white) * 255 // white))
            if image.getextrema()[1] < 32:
                warnings.warn("a 16-bit image is almost black: give the value of its white as --white", stacklevel=2)
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def save_grid(path, images, titles):
    """Write uint8 images (C, h, w) of one size as one PNG, enlarged, in columns under their titles."""
    cells = torch.stack([*images])
    cells = nn.functional.interpolate(cells, scale_factor=math.ceil(128 / cells.shape[3]))
    sheet = ImageOps.expand(to_pil_image(make_grid(cells, len(titles), pad_value=255)), (0, 20, 0, 0), "white")
    for i, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((4 + i * (cells.shape[3] + 2), 2), title, "black", font_size=14)
    atomic_write(path, sheet.save)


def main(argv=None):
    """Train, or use what was trained."""
    args = get_args(argv)
    return sample(args) if args.sample else train(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # outside of the loop
        sys.exit(130)
