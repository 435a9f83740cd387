# /// script
# requires-python = ">=3.11.4"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "tqdm>=4.66", "filelock>=3"]
# ///
"""DCGAN: a convolutional generator and discriminator, and the rules that make them train.

Radford, Metz, Chintala: Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks.
ICLR 2016, arXiv:1511.06434. The rules (Sec. 3): strided convolutions instead of pooling; batch norm, but not in G's
output and D's input; no hidden fully connected layers; ReLU and tanh in G; LeakyReLU in D. The loss is that of GAN;
--loss has later ones: LSGAN (1611.04076), WGAN (1701.07875), WGAN-GP (1704.00028).

    python dcgan.py                                        # train on toy digits, drawn here: minutes on a CPU
    python dcgan.py --data my/photos                       # your own images; stop it, repeat this to resume
    python dcgan.py --data my/photos --sample 100 --arithmetic "3,7,12 - 5,8,9 + 1,2,4"    # use what was trained

Departures: one pass over G(z) serves both losses, then both networks step (the authors' Torch code steps D first).
No weight decay (their Theano code has 1e-5). G draws with the running averages of batch norm, so that an image
depends on its z alone. WGAN always has 5 updates of D for one of G (its authors' code: at times 100).
"""

import argparse
import contextlib
import copy
import functools
import glob
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
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
SETS = {  # torchvision's class, a file that it reads, and other defaults
    "toy": dict(size=28, channels=1, ngf=24, ndf=24, epochs=30, batch_size=64, save_every=600),
    "mnist": dict(reader="MNIST", file="MNIST/raw/train-images-idx3-ubyte", size=28, channels=1),
    "fashion-mnist": dict(reader="FashionMNIST", file="FashionMNIST/raw/train-images-idx3-ubyte", size=28, channels=1),
    "cifar10": dict(reader="CIFAR10", file="cifar-10-batches-py/data_batch_1", size=32),
    "svhn": dict(reader="SVHN", file="train_32x32.mat", size=32),
    "celeba": dict(reader="CelebA", file="celeba/list_eval_partition.txt"),
    "lsun": dict(reader="LSUN", file="bedroom_train_lmdb/data.mdb", epochs=5),
}
NEEDS = {"svhn": "scipy", "celeba": "gdown", "lsun": "lmdb"}  # the packages that torchvision wants for these
COLUMNS = ["sample 0, 10, ...", *"123456789"]  # the numbers of samples, for --arithmetic and --turn
CRITICS = {"wgan": dict(k=5, lr=5e-5), "wgan-gp": dict(k=5, lr=1e-4)}  # losses, and which defaults each changes
FIXED = "white size channels kernel nz ngf ndf loss k seed".split()
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = {"train": "train", "val": "val", "eval": "val", "dev": "val", "test": "test"}
SPLIT = r"(?<![^/])(?i:(train|e?val|dev|test)(?:ing|id|idation|uation|20\d\d|set|images|data|[_-])*)(?:/|(?=[AB]/))"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def get_args(argv=None):
    """Options from `argv` or the command line. The defaults are the paper's, or those of the named set and the loss."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", allow_abbrev=False, add_help=False)
    parser.description = __doc__.partition("\n")[0]
    parser.formatter_class = functools.partial(argparse.ArgumentDefaultsHelpFormatter, width=120, max_help_position=36)
    add = parser.add_argument_group("data").add_argument
    needs = "; ".join(f"{name} needs {package}" for name, package in NEEDS.items())
    add("--data", default="toy", help=f"a folder of images, or one of {', '.join(SETS)}")
    add("--data-root", type=Path, default="data", help=f"for downloads; {needs}")
    add("--white", type=int, default=65535, help="16-bit pixel value that is white")
    add("--size", type=int, choices=(28, 32, 64, 128), default=64, help="pixels a side")
    add("--channels", type=int, choices=(1, 3), default=3, help="1 gray, 3 colour")
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=("ns", "minimax", "lsgan", *CRITICS), default="ns", help="ns: the paper's, non-saturating")
    add("--k", type=int, default=1, help="updates of D for one of G; 5 with wgan, wgan-gp")
    add("--kernel", type=int, choices=(4, 5), default=5, help="5: the paper, 4: the Torch code")
    add("--nz", type=int, default=100, help="numbers in z")
    add("--ngf", type=int, default=128, help="channels of G's last hidden layer; Torch code: 64")
    add("--ndf", type=int, default=128, help="channels of D's first layer; Torch code: 64")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=25, help="passes of D over the images")
    add("--batch-size", type=int, default=128, help="images in an update of D, all processes together")
    add("--lr", type=float, default=2e-4, help="learning rate of Adam; wgan: 5e-5 of RMSprop, wgan-gp: 1e-4")
    add("--seed", type=int, default=0, help="of weights, order and z")
    add("--out", type=Path, help=f"run folder; None: runs/{SCRIPT}-DATA")
    add("--init", type=Path, metavar="RUN", help="start from the weights of another run (fine-tuning)")
    add("--max-steps", type=int, help="stop after this many updates in all")
    add("--save-every", type=int, help="updates between checkpoints; None: ten minutes")
    add("--fresh", action="store_true", help="start anew: delete checkpoint, log and pictures")
    add("--device", help="cpu, cuda, cuda:1, mps, ...; None: the accelerator, if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the device has it")
    add("--no-capture", action="store_true", help="do not use a CUDA graph")
    add = parser.add_argument_group("use of a trained model").add_argument
    add("--sample", type=int, metavar="N", help="draw N images, a sheet with their numbers, a walk in z")
    add("--arithmetic", metavar="SUM", help="add mean z of samples, such as '3,7,12 - 5,8,9 + 1,2,4' (Fig. 7)")
    add("--turn", metavar="SUM", help="turn one mean z into another, '1,2,3,4 - 5,6,7,8' (Fig. 8)")
    add("--to", type=Path, help="folder for samples, with figures beside it; None: OUT/sampled")
    given = parser.parse_known_args(argv)[0]
    data = f"./{given.data}" if given.data in SETS and Path(given.data).is_dir() else given.data  # a folder comes first
    parser.set_defaults(**SETS.get(data, {}), **CRITICS.get(given.loss, {}))
    parser.add_argument("-h", "--help", action="help", help="show this; --data sets the defaults")
    args = parser.parse_args(argv)
    args.data = data
    check_args(args, may_be_zero=("lr", "seed"))
    for terms in (args.arithmetic, args.turn):
        if terms and not re.fullmatch(r" *\d{1,5}( *[-+,] *\d{1,5})* *", terms):
            fail(f"{terms}: give a sum of sample numbers, like '3,7,12 - 5,8,9 + 1,2,4'")
    if args.to and not (args.sample or args.arithmetic or args.turn):
        fail("--to needs --sample, --arithmetic or --turn")
    return args


# -- the method ------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """z (N, nz) -> x (N, channels, size, size) in [-1, 1]: a 4x4 map of z, doubled until it is an image (Fig. 1)."""

    def __init__(self, size=64, channels=3, kernel=5, nz=100, ngf=128):
        super().__init__()
        start = 7 if size == 28 else 4
        width = [ngf * 2**i for i in reversed(range(int(math.log2(size // start))))]  # 64 pixels: 8, 4, 2, 1 times ngf
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
    """Returns `step(x)`: k updates of D, one of G, on x (k * N, C, size, size) in [-1, 1]. It returns 0-d losses."""
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
                for weight in D.parameters():
                    weight.data.clamp_(-0.01, 0.01)
        return {"loss_D": loss_D.detach(), "loss_G": loss_G.detach()}

    return step


def train(args):
    """Train for --epochs, from last.pt if it is there. Returns the run folder."""
    check_settings(args)
    state = build(args)
    init_distributed(args, state)
    images = load_images(args)
    run = Run(args, state)
    update, loader = capture(make_step(args, state), args), batches(args, images, run.images_seen)
    for step, (epoch, x) in zip(run.steps(args.epochs * len(images), args.k * args.batch_size), loader):
        set_seed(args, step)  # of z
        losses = update(x)
        if run.report(epoch, losses):  # it is time to save
            fakes = draw(args, state["G"], codes(args, args.seed, 100))
            save_grid(args.out / "samples" / f"{step:07}.png", fakes, COLUMNS)
            run.save_checkpoint()
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
    """The training images, uint8 (N, channels, size, size); of larger ones the middle square."""
    args.images = args.data
    if args.data == "toy":
        return digits(10000, 0, args.size)[0].expand(-1, args.channels, -1, -1).to(args.device)
    if args.data in SETS:
        if args.data in NEEDS and not importlib.util.find_spec(NEEDS[args.data]):
            fail(f"--data {args.data} needs one more package: pip install {NEEDS[args.data]}")
        options = {"classes": ["bedroom_train"]} if args.data == "lsun" else {"download": True}
        sentence = f"{args.data} cannot be downloaded: put torchvision's files for it into {args.data_root}"
        with FileLock(args.data_root / f"{args.data}.lock"), explain_errors(sentence):
            data = getattr(datasets, args.reader)(args.data_root, **options)
        groups = [{args.data_root / args.file: i} for i in range(len(data))]  # cache_images looks at the file only
    else:
        found = find_images(args.data)
        files = [file for split, _, file in found if split == "train"] or fail(f"{args.data} has no training images")
        sizes = [(file.name, file.stat().st_size) for file in files]
        args.images = hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]  # a run belongs to its images
        print(f"{args.data}: {len(files)} of {len(found)} images are for training; their middle squares are used")
        groups = [{file: None} for file in files]

    def read(args, shape, group):
        [(file, i)] = group.items()
        image = data[i][0] if args.data in SETS else read_image(file, args.white)
        image = image.crop((30, 40, 168, 178)) if args.data == "celeba" else image  # the face (Torch code)
        return pil_to_tensor(ImageOps.fit(image.convert("L" if args.channels == 1 else "RGB"), shape[1:]))

    return cache_images(args, groups, read, (args.channels, args.size, args.size))


def batches(args, images, images_seen):
    """Yields epoch and x (k * B, C, size, size) in [-1, 1], without end. Put your own loader here."""
    size, epochs = args.k * args.batch_size, itertools.count(images_seen // len(images))
    rngs = (np.random.default_rng([args.seed, epoch]) for epoch in epochs)
    orders = (torch.from_numpy(rng.permutation(len(images))).to(images.device) for rng in rngs)
    queue = next(orders)[images_seen % len(images) :]
    for first in itertools.count(images_seen, size):
        while len(queue) < size:  # a batch may reach into the next epochs
            queue = torch.cat([queue, next(orders)])
        chosen, queue = queue[RANK:size:WORLD], queue[size:]
        pixels = images[chosen]
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
    """The images G(z), uint8 (N, C, size, size), with running averages: each depends on nothing but its z."""
    G = copy.deepcopy(G).eval()
    with torch.autocast(z.device.type, torch.bfloat16, args.precision == "bf16"):
        x = torch.cat([G(part).float() for part in z.split(500)])
    return (x * 127.5 + 127.5).round().byte().cpu()


def draw_lines(args, G, start, end):
    """The images of nine codes on each straight line from `start` to `end` (N, nz), one line after the other."""
    way = torch.linspace(0, 1, 9, device=args.device)[:, None]
    return draw(args, G, torch.lerp(start[:, None], end[:, None], way).flatten(0, 1))


def load_generator(run, device="cpu"):
    """G of a run folder, z (N, nz) in [-1, 1] to images (N, channels, size, size) in [-1, 1]; with running averages."""
    checkpoint = load_checkpoint(run)
    with explain_errors(f"{run}/last.pt is damaged"):
        settings = argparse.Namespace(**checkpoint["settings"])
        G = Generator(settings.size, settings.channels, settings.kernel, settings.nz, settings.ngf)
        G.load_state_dict(checkpoint["G"])
    G.settings = settings
    return G.to(device).eval()


def sample(args):
    """Make --sample images with a trained G, and the figures beside their folder. Returns the folder."""
    check_settings(args, use=True)
    G, to = load_generator(args.out, args.device), args.to or args.out / "sampled"
    args.nz = G.settings.nz
    if args.sample:
        images, z = draw(args, G, codes(args, args.seed, args.sample)), codes(args, args.seed, 9)
        for i, image in enumerate(images):
            atomic_write(to / f"{i:05}.png", to_pil_image(image).save)
        print(f"{args.sample} images are drawn into {to}, which has {len([*to.iterdir()])} now")
        save_grid(to.with_name(f"{to.name}-sheet.png"), images[:100], COLUMNS)
        walk = draw_lines(args, G, z[:-1], z[1:])  # Fig. 4
        save_grid(to.with_name(f"{to.name}-walk.png"), walk, ["G(z)", *[""] * 7, "G(z')"])
    if args.arithmetic:  # the sum among eight neighbours, then its terms (Fig. 7)
        z, signs = means(args, args.seed, args.arithmetic)
        noise = codes(args, [args.seed, 1], 9) * 0.25
        noise[4] = 0
        images = draw(args, G, torch.cat([(signs * z).sum(0) + noise, z]))
        save_grid(to.with_name(f"{to.name}-arithmetic.png"), images, ["the sum", "is in", "the middle"])
    if args.turn:  # eight other codes, moved along the axis from -1 to 1 times (Fig. 8)
        z, signs = means(args, args.seed, args.turn)
        others, axis = codes(args, [args.seed, 2], 8), (signs * z).sum(0)
        titles = [f"{i / 4 - 1:+} axis" for i in range(9)]
        save_grid(to.with_name(f"{to.name}-turn.png"), draw_lines(args, G, others - axis, others + axis), titles)
    print(f"the figures are {to}-*.png")
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
    args.batch_size += -args.batch_size % WORLD  # an equal share for each process of torchrun
    device = args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with explain_errors(f"--device {device} is not on this machine"):
        if WORLD > 1 and str(device) != "cpu":
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
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
        saved = load_checkpoint(run) if run and RANK == 0 else {}
        if not resume:
            saved |= {"settings": self.settings, "step": 0, "images_seen": 0, "log_size": 0}
        for old in [last, *args.out.glob("samples/*.png"), *args.out.glob("test/**/*.png")] if args.fresh else []:
            old.unlink(missing_ok=True)
        if WORLD > 1:  # the first process has the file
            found = [saved]
            dist.broadcast_object_list(found)
            saved = found[0]
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
        if WORLD > 1:  # all processes stop at the same step
            dist.all_reduce(number, dist.ReduceOp.MAX)
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
        return save and RANK == 0

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
    generators.manual_seed(hash((args.seed, step)) + RANK)


def load_checkpoint(run):
    """The dict in RUN/last.pt, on the CPU. No code in it is run."""
    path = Path(run, "last.pt")
    if not path.exists():
        fail(f"there is no {path}: train first, or name another run")
    with explain_errors(f"{path} is not a checkpoint of {METHOD}"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
        assert checkpoint["script"] == METHOD and "seed" in checkpoint["settings"], "it has other contents"
    return checkpoint


def init_distributed(args, state):
    """Under torchrun, join the processes: optimizers share gradients. Only the first one prints and writes to --out."""
    if WORLD > 1:
        dist.init_process_group()
        for name in [name for name in state if name.startswith("opt")]:
            state[name].register_step_pre_hook(average_gradients)
    if RANK > 0:
        args.out, sys.stdout = args.out / f".rank{RANK}", open(os.devnull, "w")


def average_gradients(optimizer, *_):
    """Replace the gradients that `optimizer` is about to use by their mean over all processes, in one message."""
    grads = [weight.grad for weight in optimizer.param_groups[0]["params"] if weight.grad is not None]
    if grads:
        mean = nn.utils.parameters_to_vector(grads) / WORLD
        dist.all_reduce(mean)
        nn.utils.vector_to_parameters(mean, grads)


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


def cache_images(args, groups, read, shape):
    """read(args, shape, files) of all groups of files, uint8 (N, *shape): done once and kept in --data-root/cache."""
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for group in groups for file in group]
    facts += [shape, args.size, args.white, vars(args).get("source"), *map(inspect.getsource, (read_image, read))]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    path = args.data_root / "cache" / f"{METHOD}-{key}.npy"
    part = path.with_suffix(".part")
    with FileLock(f"{path}.lock"), ThreadPoolExecutor() as pool, contextlib.ExitStack() as cleanup:
        if not path.exists():
            cleanup.callback(part.unlink, missing_ok=True)  # nothing stays of a failed decoding
            pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (len(groups), *shape))
            print(f"decoding {len(groups)} images to {path}, {pixels.nbytes >> 20} MiB")
            images = pool.map(functools.partial(read, args, shape), groups)
            for i, image in enumerate(tqdm(images, total=len(groups), delay=1, file=sys.stdout)):
                pixels[i] = image
            os.replace(part, path)
    pixels = torch.from_numpy(np.load(path, mmap_mode="c"))
    fits = "cuda" in args.device and pixels.nbytes < torch.cuda.mem_get_info(args.device)[0] // 4
    return pixels.to(args.device) if fits else pixels


def main(argv=None):
    """Train, or use what was trained."""
    args = get_args(argv)
    return sample(args) if args.sample or args.arithmetic or args.turn else train(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # outside of the loop
        sys.exit(130)
    if dist.is_initialized():  # all processes are here, none has failed
        dist.destroy_process_group()
