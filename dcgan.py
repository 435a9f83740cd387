# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "tqdm>=4.66"]
# ///
"""DCGAN: a convolutional generator and discriminator, and the rules that make them train.

Radford, Metz, Chintala: Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks.
ICLR 2016, arXiv:1511.06434. The rules (Sec. 3): strided convolutions instead of pooling; batch norm, but not in G's
output and D's input; no hidden fully connected layers; ReLU and tanh in G; LeakyReLU in D. The loss is that of GAN;
what came later changes a line or two: LSGAN (1611.04076), WGAN (1701.07875), WGAN-GP (1704.00028).

    python dcgan.py                                        # train on toy digits, drawn here: minutes on a CPU
    python dcgan.py --data my/photos                       # your own images; stop it, repeat this to resume
    python dcgan.py --data my/photos --sample 100          # images of the trained G, and a sheet with their numbers
    python dcgan.py --data my/photos --arithmetic "3,7,12 - 5,8,9 + 1,2,4"    # with the numbers on that sheet

Departures: one pass over G(z) serves both losses, then both networks step (the authors' Torch code steps D first).
No weight decay (their Theano code has 1e-5). G draws with the running averages of batch norm, so that an image
depends on its z alone. WGAN trains its critic 5 times for each update of G from the start; the 100 times of its
authors' code, for the first 25 updates and each 500th, are left out. The networks run in bfloat16 where the device
has units for it.
"""

import argparse
import atexit
import contextlib
import copy
import difflib
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

METHOD, SCRIPT = "dcgan", Path(__file__).stem
SETS = {  # the named sets, and which defaults each changes
    "toy": dict(size=28, channels=1, ngf=24, ndf=24, epochs=30, batch_size=64, save_every=600),
    "mnist": dict(size=28, channels=1),
    "fashion-mnist": dict(size=28, channels=1),
    "cifar10": dict(size=32),
    "svhn": dict(size=32),
    "celeba": dict(),
    "lsun": dict(epochs=5),
}
READERS = {  # torchvision's class for each, how to call it, and the package that it needs
    "mnist": ("MNIST", {"download": True}, None),
    "fashion-mnist": ("FashionMNIST", {"download": True}, None),
    "cifar10": ("CIFAR10", {"download": True}, None),
    "svhn": ("SVHN", {"download": True}, "scipy"),
    "celeba": ("CelebA", {"download": True}, "gdown"),
    "lsun": ("LSUN", {"classes": ["bedroom_train"]}, "lmdb"),
}
FIXED = "size channels kernel nz ngf ndf loss k white seed".split() + ["other images"]
LOSSES = {"ns": 2e-4, "minimax": 2e-4, "lsgan": 2e-4, "wgan": 5e-5, "wgan-gp": 1e-4}  # and their learning rates
TERM = r" *\d{1,5}( *, *\d{1,5})* *"  # numbers of samples
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}  # names of folders
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def get_args(argv=None):
    """Options from `argv` or the command line. The defaults are the paper's, or those of the named set."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__.partition("\n")[0])
    parser.formatter_class = functools.partial(argparse.HelpFormatter, max_help_position=26, width=120)
    add = parser.add_argument_group("data").add_argument
    needs = ", ".join(f"{name} needs {package}" for name, (_, _, package) in READERS.items() if package)
    add("--data", default="toy", help=f"a folder of images, or one of {', '.join(SETS)} (%(default)s); {needs}")
    add("--data-root", type=Path, default="data", help="folder for downloads and decoded images (%(default)s)")
    add("--size", type=int, choices=(28, 32, 64, 128), default=64, help="pixels a side (%(default)s)")
    add("--channels", type=int, choices=(1, 3), default=3, help="1 gray, 3 colour (%(default)s)")
    add("--white", type=int, default=65535, help="value of white in 16-bit images (%(default)s)")
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=LOSSES, default="ns", help="ns: the paper's, non-saturating (%(default)s)")
    add("--k", type=int, help="updates of D for one of G (1; wgan, wgan-gp 5); an epoch is then k passes")
    add("--kernel", type=int, choices=(4, 5), default=5, help="5 as in the paper, 4 as in the Torch code (%(default)s)")
    add("--nz", type=int, default=100, help="numbers in z (%(default)s)")
    add("--ngf", type=int, default=128, help="channels of G's last hidden layer; Torch code 64 (%(default)s)")
    add("--ndf", type=int, default=128, help="channels of D's first layer; Torch code 64 (%(default)s)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=25, help="passes over the images (%(default)s)")
    add("--batch-size", type=int, default=128, help="images in an update of D, over all processes (%(default)s)")
    add("--lr", type=float, help="learning rate (Adam 2e-4; wgan, by RMSprop, 5e-5; wgan-gp, by Adam, 1e-4)")
    add("--seed", type=int, default=0, help="of weights, data order and z (%(default)s)")
    add("--out", type=Path, help=f"run folder (runs/{SCRIPT}-DATA)")
    add("--init", type=Path, metavar="RUN", help="start from the weights of another run (fine-tuning)")
    add("--max-steps", type=int, help="stop after this many updates in all")
    add("--save-every", type=int, help="updates between checkpoints (ten minutes)")
    add("--fresh", action="store_true", help="delete checkpoint, log and samples of the run folder, and start over")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (the accelerator, if there is one)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the device has it")
    add("--no-capture", action="store_true", help="on CUDA: no CUDA graph")
    add = parser.add_argument_group("use").add_argument
    add("--sample", type=int, metavar="N", help="make N images with the trained G, a sheet with their numbers, a walk")
    add("--arithmetic", metavar="SUM", help="means of samples by number, '3,7,12 - 5,8,9 + 1,2,4' (Fig. 7)")
    add("--turn", metavar="SUM", help="from one mean to another, '1,2,3,4 - 5,6,7,8' (Fig. 8)")
    add("--to", type=Path, help="folder for the images (OUT/sampled); the sheet and other figures lie beside it")
    data = parser.parse_known_args(argv)[0].data
    data = f"./{data}" if data in SETS and Path(data).is_dir() else data  # a folder that is there comes first
    parser.set_defaults(**SETS.get(data, {}))
    args = parser.parse_args(argv)
    args.data = data
    args.k = (5 if "wgan" in args.loss else 1) if args.k is None else args.k
    args.lr = LOSSES[args.loss] if args.lr is None else args.lr
    check_args(args, may_be_zero=("lr", "seed"))
    for option, given in (("--arithmetic", args.arithmetic), ("--turn", args.turn)):
        if given and not re.fullmatch(f"{TERM}([-+]{TERM})*", given):
            fail(f"{option} {given}: give a sum of sample numbers, like '3,7,12 - 5,8,9 + 1,2,4'")
    return args


# -- the method ------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """z (N, nz) -> x (N, channels, size, size) in [-1, 1]: a 4x4 map of z, doubled until it is an image (Fig. 1).

    64 pixels: 8 * ngf channels at 4x4, then 4 * ngf, 2 * ngf, ngf, image. 28 pixels start from 7x7.
    """

    def __init__(self, size=64, channels=3, kernel=5, nz=100, ngf=128):
        super().__init__()
        start = 7 if size == 28 else 4
        width = [ngf * 2**i for i in reversed(range(int(math.log2(size // start))))]
        layers = [nn.ConvTranspose2d(nz, width[0], start, bias=False), nn.BatchNorm2d(width[0]), nn.ReLU()]
        for c_in, c_out in zip(width, [*width[1:], channels]):
            layers.append(nn.ConvTranspose2d(c_in, c_out, kernel, 2, (kernel - 1) // 2, kernel - 4, bias=False))
            layers += [nn.BatchNorm2d(c_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-2], nn.Tanh())  # no norm at the output

    def forward(self, z):
        return self.layers(z[:, :, None, None])


class Discriminator(nn.Module):
    """x (N, channels, size, size) in [-1, 1] -> logits, or scores, (N,): G mirrored; no norm in a critic of wgan-gp."""

    def __init__(self, size=64, channels=3, kernel=5, ndf=128, norm=True):
        super().__init__()
        start = 7 if size == 28 else 4
        width = [channels] + [ndf * 2**i for i in range(int(math.log2(size // start)))]
        layers = []
        for i in range(1, len(width)):
            layers.append(nn.Conv2d(width[i - 1], width[i], kernel, 2, (kernel - 1) // 2, bias=False))
            layers += [nn.BatchNorm2d(width[i])] if norm and i > 1 else []  # none at the input
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(width[-1], 1, start, bias=False))

    def forward(self, x):
        return self.layers(x).flatten()


def init_weights(net):
    """N(0, .02) for convolutions (Sec. 4), N(1, .02) for gains of batch norm, zero for its biases (authors' code)."""
    for name, weight in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.02)
    return net


def loss_of_D(kind, real, fake):
    """What D minimises, from its outputs (N,) for images of the data and of G. -> 0-d."""
    if kind in ("ns", "minimax"):  # -log D(x) - log(1 - D(G(z)))
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if kind == "lsgan":
        return ((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2
    return fake.mean() - real.mean()  # wgan: minus the critic's estimate of the earth mover's distance


def loss_of_G(kind, fake):
    """What G minimises, from D's outputs (N,) for images of G. -> 0-d."""
    if kind == "ns":  # -log D(G(z))
        return F.softplus(-fake).mean()
    if kind == "minimax":  # log(1 - D(G(z)))
        return -F.softplus(fake).mean()
    return ((fake - 1) ** 2).mean() / 2 if kind == "lsgan" else -fake.mean()


def penalty(D, real, fake):
    """WGAN-GP's term: the slope of D should be 1 between images of the data and of G (its Eq. 3). -> 0-d."""
    between = torch.lerp(real, fake, torch.rand(len(real), 1, 1, 1, device=real.device)).requires_grad_()
    (slope,) = torch.autograd.grad(D(between).sum(), between, create_graph=True)
    return ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()


def build(args):
    """{name: network or optimizer} on args.device: all that is learned, and so all that last.pt holds."""
    torch.manual_seed(args.seed)
    G = init_weights(Generator(args.size, args.channels, args.kernel, args.nz, args.ngf)).to(args.device)
    D = Discriminator(args.size, args.channels, args.kernel, args.ndf, norm=args.loss != "wgan-gp")
    D = init_weights(D).to(args.device)
    optimizer, options = torch.optim.RMSprop, {}
    if args.loss != "wgan":
        betas = (0.5, 0.9 if args.loss == "wgan-gp" else 0.999)  # beta1 .9 was unstable (Sec. 4)
        optimizer, options = torch.optim.Adam, dict(betas=betas, fused=True)
    options["capturable"] = "cuda" in args.device
    # Rates are tensors, as a CUDA graph needs them.
    opt_G = optimizer(G.parameters(), torch.tensor(args.lr, device=args.device), **options)
    opt_D = optimizer(D.parameters(), torch.tensor(args.lr, device=args.device), **options)
    return {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D}


def make_step(args, state):
    """Returns `step(x)`: k updates of D and one of G, on images x (k * N, C, size, size) in [-1, 1].

    It returns its losses as 0-d tensors and reads nothing back from the device, so a CUDA graph can record it.
    """
    G, D, opt_G, opt_D = state["G"], state["D"], state["opt_G"], state["opt_D"]

    def step(x):
        for i, real in enumerate(x.chunk(args.k), 1):
            z = 2 * torch.rand(len(real), args.nz, device=x.device) - 1  # uniform (Fig. 1)
            with torch.autocast(x.device.type, torch.bfloat16, args.precision == "bf16"):
                fake = G(z)
                on_real, on_fake = D(real).float(), D(fake).float()  # one pass each: batch norm sees them apart
            loss_D = loss_of_D(args.loss, on_real, on_fake)
            if args.loss == "wgan-gp":
                loss_D = loss_D + 10 * penalty(D, real, fake.detach().float())
            opt_D.zero_grad()
            loss_D.backward(inputs=list(D.parameters()), retain_graph=i == args.k)
            if i == args.k:  # before D moves
                loss_G = loss_of_G(args.loss, on_fake)
                opt_G.zero_grad()
                loss_G.backward(inputs=list(G.parameters()))
                opt_G.step()
            opt_D.step()
            if args.loss == "wgan":
                with torch.no_grad():
                    torch._foreach_clamp_min_(list(D.parameters()), -0.01)
                    torch._foreach_clamp_max_(list(D.parameters()), 0.01)
        return {"loss_D": loss_D.detach(), "loss_G": loss_G.detach()}

    return step


def train(args):
    """Train for --epochs, resume if last.pt is there, then draw a walk between codes. Returns the run folder."""
    (files, data), state = find_files(args), build(args)
    with Run(args, state, files) as run:
        images, update = load_images(args, files, data), capture(make_step(args, state), args)
        loader = batches(args, images, run.images_seen)
        for step in range(run.start_step + 1, run.last_step + 1):
            epoch, x = next(loader)
            set_seed(args, step)  # of z
            losses = update(x)
            if run.report(step, epoch, losses):  # it is time to save
                save_sheet(args.out / "samples" / f"{step:07}.png", draw(args, state["G"], codes(args, args.seed, 100)))
                run.save_checkpoint(step)
            if run.should_stop:
                break
        del update  # NCCL waits for the end of a CUDA graph before it lets the process group go
    grid = args.out / "samples" / f"{run.last_step:07}-walk.png"
    if not grid.exists():
        save_walk(args, state["G"], grid)
    print(f"{args.out}: {run.last_step} of {run.all_steps} steps are done; {grid} shows lines between codes")
    return args.out


# -- data and pictures -----------------------------------------------------------------------------------------------


def digits(count, seed, size=28):
    """Toy digits, uint8 (count, 1, size, size), white on black, and labels (count,).

    Ten glyphs of 5x7 dots under random affine maps, with random stroke width and noise.
    """
    rng = np.random.default_rng(seed)
    rows = "ehhhhhe 4c4444e eh1248v v2421he 26aiv22 vgu11he 68guhhe v124888 ehhehhe ehhf12c"  # of dots, base 32
    glyphs = [[[int(dots, 32) >> i & 1 for i in range(4, -1, -1)] for dots in glyph] for glyph in rows.split()]
    labels, (turn, slant) = rng.integers(0, 10, count), rng.uniform(-0.2, 0.2, (2, count))
    wide, high = rng.uniform(1.3, 1.9, count), rng.uniform(1.1, 1.4, count)
    maps = np.array([[wide * np.cos(turn), wide * (slant - np.sin(turn)), rng.uniform(-0.25, 0.25, count)],
                     [high * np.sin(turn), high * np.cos(turn), rng.uniform(-0.12, 0.12, count)]])  # fmt: skip
    grid = F.affine_grid(torch.from_numpy(maps.transpose(2, 0, 1)).float(), (count, 1, size, size), align_corners=False)
    ink = F.grid_sample(torch.tensor(glyphs)[labels, None].float(), grid, align_corners=False)
    thin, grain = rng.uniform(0.25, 0.45, (count, 1, 1, 1)), rng.normal(0, 6, (count, 1, size, size))
    pixels = (5 * (ink.numpy() - thin)).clip(0, 1) * 250 + abs(grain)
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


def find_files(args):
    """The training images, {name: its files}, and torchvision's data set if it reads them."""
    if args.data == "toy":
        return {f"{i:05}": () for i in range(10000)}, None
    if args.data not in SETS:
        found = find_images(Path(args.data))
        files = {file.relative_to(args.data).as_posix(): (file,) for split, _, file in found if split == "train"}
        print(f"{args.data}: {len(files)} train, {len(found) - len(files)} other images; their middle squares are used")
        return files or fail(f"{args.data} has no training images"), None
    kind, options, package = READERS[args.data]
    if package and not importlib.util.find_spec(package):
        fail(f"--data {args.data} needs one more package: pip install {package}")
    args.data_root.mkdir(parents=True, exist_ok=True)
    missing = f"--data {args.data} cannot be downloaded: put it into {args.data_root} yourself"
    with FileLock(args.data_root / f"{args.data}.lock"), explain_errors(missing):
        data = getattr(datasets, kind)(args.data_root, **options)
    if args.data == "celeba":
        folder = args.data_root / "celeba" / "img_align_celeba"
        return {name: (folder / name,) for name in data.filename}, None
    if args.data == "lsun":
        database = args.data_root / "bedroom_train_lmdb" / "data.mdb"
        return {f"{i:07}": {database: i} for i in range(len(data))}, data
    return {f"{args.data}/{i:05}": () for i in range(len(data))}, data


def load_images(args, files, data):
    """The middle squares of the images that find_files found, uint8 (N, channels, size, size)."""

    def to_pixels(image):
        image = image.convert("L" if args.channels == 1 else "RGB")
        return pil_to_tensor(ImageOps.fit(image, (args.size, args.size)))

    def read(group):
        if args.data == "lsun":
            return to_pixels(data[list(group.values())[0]][0])
        image = read_image(group[0], args.white)
        return to_pixels(image.crop((30, 40, 168, 178)) if args.data == "celeba" else image)  # the face (Torch code)

    if args.data == "toy":
        return digits(10000, 0, args.size)[0].expand(-1, args.channels, -1, -1).to(args.device)
    if data and args.data != "lsun":
        return torch.stack([to_pixels(image) for image, _ in data]).to(args.device)
    return cache_images(args, list(files.values()), read, (args.channels, args.size, args.size))


def batches(args, images, images_seen):
    """Yields epoch and x (k * B, C, size, size) in [-1, 1], without end: here goes a data loader of your own."""

    def order(number):  # of a pass over the images; it stays on the device, so that the host need not wait
        return torch.from_numpy(np.random.default_rng([args.seed, number]).permutation(len(images))).to(images.device)

    size = args.k * args.batch_size
    number, start = divmod(images_seen * args.k, len(images))
    queue = order(number)[start:]
    for first in itertools.count(images_seen, args.batch_size):
        while len(queue) < size:  # a batch may reach into the next passes
            number += 1
            queue = torch.cat([queue, order(number)])
        pixels, queue = images[queue[RANK:size:WORLD]], queue[size:]
        pixels = pixels.pin_memory() if "cuda" in args.device and not pixels.is_cuda else pixels
        yield first // len(images) + 1, pixels.to(args.device, non_blocking=True) / 127.5 - 1


def codes(args, seed, count):
    """z (count, nz), uniform in [-1, 1], the same on every machine; the first ones do not depend on `count`."""
    z = np.random.default_rng(seed).uniform(-1, 1, (count, args.nz))
    return torch.from_numpy(z).float().to(args.device)


def means(args, seed, terms):
    """The terms of "3,7 - 5,8 + 1": means of the codes of those samples (terms, nz), and their signs (terms, 1)."""
    numbers = [[int(number) for number in term.split(",")] for term in re.split("[-+]", terms)]
    signs = [1.0] + [1.0 if sign == "+" else -1.0 for sign in re.findall("[-+]", terms)]
    z = codes(args, seed, max(map(max, numbers)) + 1)
    return torch.stack([z[term].mean(0) for term in numbers]), torch.tensor(signs, device=args.device)[:, None]


@torch.no_grad()
def draw(args, G, z):
    """The images G(z) as Pillow images, with running averages: each depends on nothing but its z."""
    G = copy.deepcopy(G).eval()
    with torch.autocast(z.device.type, torch.bfloat16, args.precision == "bf16"):
        x = torch.cat([G(part).float() for part in z.split(500)])
    return [to_pil_image(image) for image in (x * 127.5 + 127.5).round().byte().cpu()]


def save_sheet(path, images):
    """Write images, ten in a row, each below its number."""
    cells, width = [], images[0].width * max(1, 128 // images[0].width)
    for i, image in enumerate(images):
        cell = ImageOps.expand(image.resize((width, width), Image.Resampling.NEAREST), (0, 14, 0, 0), "white")
        ImageDraw.Draw(cell).text((2, 1), str(i), "black")
        cells.append(cell)
    save_grid(path, cells, [""] * 10)


def save_walk(args, G, path):
    """Draw straight lines between 9 codes, one a row, ten images each (Fig. 4)."""
    z, way = codes(args, args.seed, 9), torch.linspace(0, 1, 10, device=args.device)[:, None]
    walk = torch.lerp(z[:-1, None], z[1:, None], way).flatten(0, 1)  # (80, nz)
    save_grid(path, draw(args, G, walk), ["G(z)", *[""] * 8, "G(z')"])


def save_arithmetic(args, G, path):
    """Draw the mean codes of --arithmetic in rows, then their sum with eight neighbours around it (Fig. 7)."""
    z, signs = means(args, args.seed, args.arithmetic)
    noise = codes(args, [args.seed, 1], 9) * 0.25
    noise[4] = 0
    terms, sums = draw(args, G, z), draw(args, G, (signs * z).sum(0) + noise)
    blank = Image.new(terms[0].mode, terms[0].size, "white")
    save_grid(path, terms + [blank] * (-len(terms) % 3) + sums, ["terms, then", "their sum", "and neighbours"])


def save_turn(args, G, path):
    """Move eight other codes along the axis of --turn, from -1 to 1 times (Fig. 8)."""
    z, signs = means(args, args.seed, args.turn)
    way = torch.linspace(-1, 1, 9, device=args.device)[:, None] * (signs * z).sum(0)
    images = draw(args, G, (codes(args, [args.seed, 2], 8)[:, None] + way).flatten(0, 1))
    save_grid(path, images, [f"{i / 4:+g}" for i in range(-4, 5)])


def load_generator(run, device="cpu"):
    """G of a run folder, z (N, nz) in [-1, 1] to images (N, channels, size, size) in [-1, 1]; with running averages."""
    checkpoint = load_checkpoint(run)
    with explain_errors(f"{run}/last.pt is damaged"), torch.device("meta"):  # the weights are those of the file
        settings = argparse.Namespace(**checkpoint["settings"])
        G = Generator(settings.size, settings.channels, settings.kernel, settings.nz, settings.ngf)
        G.load_state_dict(checkpoint["G"], assign=True)
    G.settings = settings
    return G.to(device).eval()


def sample(args):
    """Make --sample images with a trained G, and the figures beside their folder. Returns the folder."""
    G, to = load_generator(args.out, args.device), args.to or args.out / "sampled"
    args.nz = G.settings.nz
    if args.sample:
        images = draw(args, G, codes(args, args.seed, args.sample))
        for i, image in enumerate(images):
            atomic_write(to / f"{i:05}.png", image.save)
        save_sheet(to.with_name(f"{to.name}-sheet.png"), images[:100])
        save_walk(args, G, to.with_name(f"{to.name}-walk.png"))
    if args.arithmetic:
        save_arithmetic(args, G, to.with_name(f"{to.name}-arithmetic.png"))
    if args.turn:
        save_turn(args, G, to.with_name(f"{to.name}-turn.png"))
    print(f"the images are in {to}, and {to.name}-*.png beside it")
    return to


# -- the same in all six scripts -------------------------------------------------------------------------------------


def fail(sentence):
    """End the script with one sentence that says what to mend, and exit status 1."""
    raise SystemExit(f"{SCRIPT}: {sentence}")


@contextlib.contextmanager
def explain_errors(sentence):
    """Whatever goes wrong inside ends the script with `sentence` and the cause."""
    try:
        yield
    except Exception as error:
        cause = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        fail(f"{sentence} ({cause})")


def atomic_write(path, write):
    """Let `write` make a file beside `path`, then rename it: it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    write(part)
    os.replace(part, path)


def check_args(args, may_be_zero):
    """Check --data and the numbers; choose the run folder, the device and the precision."""
    if args.data not in SETS and not Path(args.data).is_dir():
        near = difflib.get_close_matches(args.data, SETS) or SETS
        fail(f"--data {args.data} is not a folder; did you mean {' or '.join(near)}?")
    for name, value in vars(args).items():
        if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and name in may_be_zero):
            fail(f"--{name.replace('_', '-')} {value}: give a number above 0")
    args.out = args.out or Path("runs", f"{SCRIPT}-{Path(args.data).resolve().name}")
    args.batch_size += -args.batch_size % WORLD  # an equal share for each process of torchrun
    if WORLD > 1 and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    device = args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with explain_errors(f"--device {device} is not on this machine: leave it out to use what is there"):
        args.device = str(torch.empty(1, device=device).device)
    units = torch.cpu.get_capabilities() if args.device == "cpu" else {"cuda": torch.cuda.is_bf16_supported(False)}
    if args.precision == "auto":
        args.precision = "bf16" if any(units.get(name) for name in ("avx512_bf16", "amx_bf16", "cuda")) else "fp32"


class Run:
    """The run folder: resumes `state` if last.pt is there; logs and saves. Settings in FIXED stay as they were."""

    def __init__(self, args, state, files):
        self.args, self.state, self.start_step, self.images_seen, self.signal = args, state, 0, 0, 0
        sizes = [(name, [file.stat().st_size for file in group]) for name, group in files.items()]
        self.settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        self.settings["other images"] = hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]
        self.settings["script"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
        saved = load_checkpoint(args.out) if (args.out / "last.pt").exists() and not args.fresh else None
        if WORLD > 1:
            saved = share_checkpoint(state, saved)
        if saved:
            self.resume(saved)
        elif args.init:
            weights = load_checkpoint(args.init)
            with explain_errors(f"--init {args.init} has other networks"):
                for name in [name for name in state if not name.startswith(("opt", "pool"))]:
                    state[name].load_state_dict(weights[name])
        steps = math.ceil((args.epochs * len(files) - self.images_seen) / args.batch_size)
        self.all_steps = self.start_step + max(0, steps)
        self.last_step = max(self.start_step, min(self.all_steps, args.max_steps or self.all_steps))

    def resume(self, saved):
        """Go on from a checkpoint, if it has the images and the settings of now."""
        for name, old in saved["settings"].items():
            new, option = self.settings.get(name), name.replace("_", "-").replace("source", "from")
            if old != new and name in FIXED:
                fail(f"{self.args.out} was started with {option} {old}, not {new}: repeat that, or --out, or --fresh")
            if old != new:
                print(f"{self.args.out}: {option} was {old}, now {new}")
        with explain_errors(f"{self.args.out}/last.pt is damaged: --fresh starts over"):
            self.start_step, self.images_seen = saved["step"], saved["images_seen"]
            for name, part in self.state.items():
                if name.startswith("opt"):  # with the rate and the device of now
                    saved[name]["param_groups"] = part.state_dict()["param_groups"]
                part.load_state_dict(saved[name])

    def __enter__(self):
        args, log = self.args, self.args.out / "log.jsonl"
        args.out.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(args.out / ".lock", timeout=0)
        with explain_errors(f"{args.out} is in use: wait for the other process, or stop it"):
            self.lock.acquire()
        for old in [args.out / "last.pt", *args.out.glob("samples/*.png")] if args.fresh else []:
            old.unlink(missing_ok=True)
        rows = log.read_text().splitlines(True) if log.exists() else []
        rows = [row for row in rows if row.endswith("}\n") and json.loads(row)["step"] <= self.start_step]
        atomic_write(log, lambda part: part.write_text("".join(rows)))
        (args.out / "config.json").write_text(json.dumps(self.settings | {"torch": torch.__version__}, indent=2))
        numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self.handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        begin = "resuming" if self.start_step else "starting"
        print(f"{begin} {args.out} at step {self.start_step} of {self.all_steps}, {args.device}, {args.precision}")
        self.bar = tqdm(total=self.last_step, initial=self.start_step, unit="step", file=sys.stdout)
        self.last_report = self.last_save = time.monotonic()
        return self

    def __exit__(self, error, *_):
        self.bar.close()
        self.lock.release()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if WORLD > 1:
            dist.destroy_process_group()
        if self.signal and not error:
            print(f"saved at step {self.bar.n}; repeat the command to resume")
            sys.exit(128 + self.signal)

    def on_signal(self, number, frame):
        self.signal = number

    def report(self, step, epoch, losses):
        """Log the losses every two seconds. Returns whether to save now. A loss that is not finite ends the run."""
        now, args = time.monotonic(), self.args
        if WORLD > 1:  # all processes stop at the same step
            number = torch.tensor(self.signal)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.signal = number.item()
        self.should_stop = self.signal > 0
        save = self.should_stop or step == self.last_step or now - self.last_save > 600
        save = save or args.save_every and step % args.save_every == 0
        if save or step == self.start_step + 1 or now - self.last_report > 2:
            losses = {name: loss.item() for name, loss in losses.items()}  # waits for the device
            if not all(map(math.isfinite, losses.values())):
                fail(f"a loss is not finite at step {step}: {losses}; last.pt is kept; try a lower --lr")
            rate = (step - self.bar.n) * args.batch_size / max(now - self.last_report, 1e-9)
            with open(args.out / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": step, "epoch": epoch, **losses, "images_per_s": rate}) + "\n")
            with contextlib.suppress(OSError):  # the terminal may be closed
                self.bar.set_postfix(losses, images_per_s=rate, refresh=False)
                self.bar.update(step - self.bar.n)
            self.last_report = now
        return save and RANK == 0

    def save_checkpoint(self, step):
        """Write last.pt."""
        images_seen = self.images_seen + (step - self.start_step) * self.args.batch_size
        checkpoint = {"script": METHOD, "settings": self.settings, "step": step, "images_seen": images_seen}
        checkpoint |= {name: part.state_dict() for name, part in self.state.items()}
        atomic_write(self.args.out / "last.pt", functools.partial(torch.save, checkpoint))
        self.last_save = time.monotonic()


def set_seed(args, step):
    """Make what is random in an update depend on --seed and the step alone, so that a resumed run is the same."""
    backend = torch.default_generator if args.device == "cpu" else torch.get_device_module(args.device)
    backend.manual_seed(hash((args.seed, step)) + RANK)


def load_checkpoint(run):
    """The dict in RUN/last.pt, on the CPU. No code in it is run."""
    path = Path(run, "last.pt")
    if not path.exists():
        fail(f"there is no {path}: train first, or name a run folder by --out")
    with explain_errors(f"{path} is not a checkpoint of {METHOD}"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != METHOD:
            raise ValueError(f"it is one of {checkpoint['script']}")
    return checkpoint


def init_distributed(args):
    """Join the processes of torchrun. All but the first are silent, and write to a folder that is thrown away."""
    dist.init_process_group()
    if RANK > 0:
        args.out, sys.stdout = Path(tempfile.mkdtemp()), open(os.devnull, "w")
        atexit.register(shutil.rmtree, args.out, ignore_errors=True)


def share_checkpoint(state, checkpoint):
    """From now on optimizers average their gradients over all processes. Returns the first one's checkpoint to all."""
    for name in [name for name in state if name.startswith("opt")]:
        state[name].register_step_pre_hook(average_gradients)
    shared = [checkpoint]
    dist.broadcast_object_list(shared)
    return shared[0]


def average_gradients(optimizer, *_):
    """Replace the gradients that `optimizer` is about to use by their mean over all processes, in one message."""
    grads = [weight.grad for weight in optimizer.param_groups[0]["params"] if weight.grad is not None]
    mean = nn.utils.parameters_to_vector(grads) / WORLD
    dist.all_reduce(mean)
    nn.utils.vector_to_parameters(mean, grads)


def capture(step, args):
    """On CUDA, `step` as one CUDA graph: the fourth call records it, later ones replay it and overwrite its losses."""
    if "cuda" not in args.device or args.no_capture:
        return step
    graph, stream, calls, inputs, losses = torch.cuda.CUDAGraph(), torch.cuda.Stream(), itertools.count(), [], {}
    torch.backends.cudnn.benchmark = True

    def replay(*batch):
        if next(calls) < 3:  # warm up
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                losses.update(step(*batch))
            torch.cuda.current_stream().wait_stream(stream)
            return losses
        if not inputs:
            inputs.extend(tensor.clone() for tensor in batch)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                losses.update(step(*inputs))
        for kept, new in zip(inputs, batch):
            kept.copy_(new)
        graph.replay()
        return losses

    return replay


def find_images(folder):
    """[(split, folders, file)] of all images below `folder`; the split is train, val or test if a folder says so."""
    names = sorted(glob.glob("**/*.*", root_dir=folder, recursive=True))  # follows links, leaves out hidden files
    runs = tuple(name.removesuffix("log.jsonl") for name in names if name.endswith("/log.jsonl"))
    names = [name for name in names if not name.startswith(runs or "/")]
    images = [name for name in names if name.lower().endswith(IMAGES)]
    found = []
    for name in images:
        *parts, _ = re.sub("(train|test|val)[_-]?([AB])/", r"\1/\2/", name).split("/")
        splits = {SPLITS[part] for part in parts if part in SPLITS} or {"train"}
        if len(splits) > 1:
            fail(f"{folder}/{name} is in two splits")
        found.append((*splits, "/".join(part for part in parts if part not in SPLITS), Path(folder, name)))
    if len(names) > len(images):
        print(f"{folder}: {len(names) - len(images)} files with other endings are left out")
    return found or fail(f"{folder} has no images ({', '.join(IMAGES)})")


def read_image(file, white=65535):
    """An image as RGB with 8 bits, upright, transparent pixels on white; `white` is the value of white in 16 bits."""
    with explain_errors(f"{file} cannot be used as an image"), Image.open(file) as image:
        extra = getattr(image, "tag_v2", {}).get(338, (1,))  # kinds of the extra bands of a TIFF: 1 and 2 are alpha
        if (
            image.mode in ("I", "F")
            or extra[0] not in (1, 2)
            or image.format != "MPO"
            and getattr(image, "n_frames", 1) > 1
        ):
            raise ValueError("give 8-bit or 16-bit gray, or 8-bit RGB, of one page and without further bands")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            pixels = np.asarray(image).astype(np.uint32)
            if pixels.max() > white:
                raise ValueError(f"it has a pixel of {pixels.max()}, above --white {white}")
            if pixels.max() < white / 8:
                warnings.warn("a 16-bit image is almost black: is --white right?", stacklevel=2)  # said once
            image = Image.fromarray(np.uint8(pixels * 255 // white))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def cache_images(args, items, read, shape):
    """read(item) for all items, tuples of files: uint8 (N, *shape), decoded once and kept in --data-root/cache."""
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for files in items for file in files]
    options = [vars(args).get(name) for name in FIXED]
    key = hashlib.sha256(repr((facts, shape, options)).encode()).hexdigest()[:16]
    path = args.data_root / "cache" / f"{METHOD}-{key}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), ThreadPoolExecutor() as pool:
        if not path.exists():
            print(f"decoding {len(items)} images into {path}, {len(items) * math.prod(shape) >> 20} MiB")
            pixels = np.lib.format.open_memmap(f"{path}.part", "w+", np.uint8, (len(items), *shape))
            for i, image in enumerate(tqdm(pool.map(read, items), total=len(items), unit="image")):
                pixels[i] = image
            os.replace(f"{path}.part", path)
    pixels = torch.from_numpy(np.load(path, mmap_mode="c"))
    fits = "cuda" in args.device and pixels.nbytes < torch.cuda.mem_get_info(args.device)[0] // 4
    return pixels.to(args.device) if fits else pixels


def save_grid(path, images, titles):
    """Write Pillow images of one size as one PNG, small ones enlarged, in columns under their titles."""
    zoom = max(1, 128 // images[0].width)
    cells = [
        pil_to_tensor(image.convert("RGB")).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2) for image in images
    ]
    sheet = ImageOps.expand(to_pil_image(make_grid(cells, len(titles), pad_value=255)), (0, 18, 0, 0), "white")
    for i, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((4 + i * (cells[0].shape[2] + 2), 2), title, "black", font_size=14)
    atomic_write(path, sheet.save)


def main(argv=None):
    """Train, or use what was trained."""
    args = get_args(argv)
    if WORLD > 1:
        init_distributed(args)
    return sample(args) if args.sample or args.arithmetic or args.turn else train(args)


if __name__ == "__main__":
    main()
