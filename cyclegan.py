# /// script
# requires-python = ">=3.11.4"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "tqdm>=4.66", "filelock>=3"]
# ///
"""CycleGAN: two GANs that turn two kinds of image into each other, learned without pairs.

Zhu, Park, Isola, Efros: Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks. ICCV 2017,
arXiv:1703.10593. G maps X (side A) to Y (side B), F maps Y to X. D_Y tells a real y from G(x), D_X a real x from F(y),
and an image that goes there and back must come home:
    L(G, F, D_X, D_Y) = L_GAN(G, D_Y) + L_GAN(F, D_X) + lambda (E|F(G(x)) - x| + E|G(F(y)) - y|)             (Eq. 3)

    python cyclegan.py                                         # train on toy streets, drawn here: minutes on a CPU
    python cyclegan.py --data horse2zebra                      # download and train; stop it, repeat this to resume
    python cyclegan.py --data horse2zebra --translate photos   # use what was trained, on an image or a folder

Departures: the identity loss of Sec. 5.2, E|G(y) - y| + E|F(x) - x|, is on for every data set, with half the weight of
the cycle, as in the authors' code. Instance norm has no gain and no bias, and G and F step before D_X and D_Y do, as in
their later code. Under torchrun each process has a pool of its own, and last.pt keeps that of the first.
"""

import argparse
import contextlib
import functools
import glob
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
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
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

METHOD, SCRIPT = "cyclegan", Path(__file__).stem
SETS = "toy horse2zebra apple2orange summer2winter_yosemite iphone2dslr_flower maps facades".split()
SETS += "monet2photo cezanne2photo ukiyoe2photo vangogh2photo".split()
TOY = dict(size=64, load_size=64, blocks=3, ngf=16, ndf=32, n_layers=2, epochs=8, save_every=600)  # defaults of toy
TOY |= dict(lambda_cycle=5.0, lambda_identity=1.0)
WAYS = {"AtoB": ("G", "F"), "BtoA": ("F", "G")}  # there, and back
FIXED = "white size load_size no_mirror blocks ngf ndf n_layers terms lambda_cycle lambda_identity pool seed".split()
LAYOUTS = "give folders named A and B, or images with A and B side by side, also within train and test"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = {"train": "train", "val": "val", "eval": "val", "dev": "val", "test": "test"}
SPLIT = r"(?<![^/])(?i:(train|e?val|dev|test)(?:ing|id|idation|uation|20\d\d|set|images|data|[_-])*)(?:/|(?=[AB]/))"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def get_args(argv=None):
    """Options from `argv` or the command line. The defaults are the paper's, or those of the named set."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", allow_abbrev=False, add_help=False)
    parser.description = __doc__.partition("\n")[0]
    parser.formatter_class = functools.partial(argparse.ArgumentDefaultsHelpFormatter, width=120, max_help_position=36)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", help=f"a folder of images of two kinds, or one of {', '.join(SETS)}")
    add("--data-root", type=Path, default="data", help="for downloads and decoded images")
    add("--white", type=int, default=65535, help="16-bit pixel value that is white")
    add("--size", type=int, default=256, help="of a crop, a multiple of 4")
    add("--load-size", type=int, help="of an image before the random crop; None: 286 / 256 of --size")
    add("--no-mirror", action="store_true", help="no random mirroring")
    add = parser.add_argument_group("method").add_argument
    add("--terms", choices="all cycle gan gan+forward gan+backward".split(), default="all", help="of the loss, Table 4")
    add("--lambda-cycle", type=float, default=10.0, help="weight of the cycle, Eq. 3")
    add("--lambda-identity", type=float, default=0.5, help="weight of the identity loss, as a share of the cycle's")
    add("--pool", type=int, default=50, help="past images that D_X and D_Y see again, Sec. 4")
    add("--blocks", type=int, help="residual blocks of G and F; None: 9, or 6 below 256 pixels")
    add("--ngf", type=int, default=64, help="channels of the first layer of G and F")
    add("--ndf", type=int, default=64, help="channels of the first layer of D_X and D_Y")
    add("--n-layers", type=int, default=3, help="strided layers of D_X and D_Y: 3 see 70 pixels")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=200, help="passes over the larger side")
    add("--decay-epochs", type=int, help="how many of the last epochs lower the rate to 0; None: half")
    add("--batch-size", type=int, default=1, help="images of each side, all processes together")
    add("--lr", type=float, default=2e-4, help="learning rate of Adam")
    add("--seed", type=int, default=0, help="of weights, order, crops and pools")
    add("--out", type=Path, help=f"run folder; None: runs/{SCRIPT}-DATA")
    add("--init", type=Path, metavar="RUN", help="start from the weights of another run (fine-tuning)")
    add("--max-steps", type=int, help="stop after this many updates in all")
    add("--save-every", type=int, help="updates between checkpoints; None: ten minutes")
    add("--fresh", action="store_true", help="start anew: delete checkpoint, log and pictures")
    add("--device", help="cpu, cuda, cuda:1, mps, ...; None: the accelerator, if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the device has it")
    add("--no-capture", action="store_true", help="do not use a CUDA graph")
    add = parser.add_argument_group("use of a trained model").add_argument
    add("--translate", type=Path, metavar="PATH", help="use G or F on an image or a folder")
    add("--direction", choices=WAYS, default="AtoB", help="of --translate: G is AtoB, F is BtoA")
    add("--to", type=Path, help="folder for translations; None: OUT/DIRECTION")
    data = parser.parse_known_args(argv)[0].data  # first, as the other defaults depend on it
    data = f"./{data}" if data in SETS and Path(data).is_dir() else data  # a folder that is there comes first
    parser.set_defaults(**TOY if data == "toy" else {})
    parser.add_argument("-h", "--help", action="help", help="show this; --data sets the defaults")
    args = parser.parse_args(argv)
    args.data, args.load_size = data, args.load_size or args.size * 286 // 256
    if args.blocks is None:
        args.blocks = 9 if args.size >= 256 else 6
    if args.decay_epochs is None:
        args.decay_epochs = args.epochs // 2
    check_args(args, may_be_zero=("lambda_identity", "pool", "decay_epochs", "lr", "seed"))
    least = 3 * 2**args.n_layers  # the last layers of D need 3 pixels
    if args.size % 4 or not least <= args.size <= args.load_size:
        fail(f"--size {args.size}: give a multiple of 4 from {least} (--n-layers) to {args.load_size} (--load-size)")
    if args.to and not args.translate:
        fail("--to needs --translate")
    return args


# -- the method ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Residual block (Sec. 7.2): two 3x3 convolutions, padded by reflection. (N, C, H, W) -> the same."""

    def __init__(self, width):
        super().__init__()
        first = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width), nn.ReLU(True)]
        second = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        self.layers = nn.Sequential(*first, *second)

    def forward(self, x):
        return x + self.layers(x)


class Generator(nn.Module):
    """ResNet of Johnson et al. (Sec. 7.2). x (N, 3, H, W) in [-1, 1], H and W multiples of 4 -> the same."""

    def __init__(self, blocks=9, ngf=64):
        super().__init__()
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7), nn.InstanceNorm2d(ngf), nn.ReLU(True)]  # c7s1-64
        for width in (2 * ngf, 4 * ngf):  # d128, d256: (N, 128, H/2, W/2), (N, 256, H/4, W/4)
            layers += [nn.Conv2d(width // 2, width, 3, 2, 1), nn.InstanceNorm2d(width), nn.ReLU(True)]
        layers += [Block(4 * ngf) for _ in range(blocks)]  # R256
        for width in (2 * ngf, ngf):  # u128, u64: (N, 128, H/2, W/2), (N, 64, H, W)
            up = nn.ConvTranspose2d(2 * width, width, 3, 2, 1, output_padding=1)
            layers += [up, nn.InstanceNorm2d(width), nn.ReLU(True)]
        self.layers = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())  # c7s1-3

    def forward(self, x):
        return self.layers(x)


class Discriminator(nn.Module):
    """PatchGAN of 70x70 pixels (Sec. 7.2): C64-C128-C256-C512. (N, 3, H, W) in [-1, 1] -> (N, 1, H/8 - 2, W/8 - 2)."""

    def __init__(self, ndf=64, n_layers=3):
        super().__init__()
        width = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        layers = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]  # no norm here
        for i in range(1, len(width)):
            conv = nn.Conv2d(width[i - 1], width[i], 4, 2 if i < n_layers else 1, 1)
            layers += [conv, nn.InstanceNorm2d(width[i]), nn.LeakyReLU(0.2, True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width[-1], 1, 4, 1, 1))

    def forward(self, x):
        return self.layers(x)


class Pool(nn.Module):
    """Past images of a generator, for D to see again (Sec. 4). fake (N, 3, S, S) -> (N, 3, S, S)."""

    def __init__(self, size, pixels):
        super().__init__()
        self.register_buffer("images", torch.zeros(size, 3, pixels, pixels))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def forward(self, fake):
        size, shown = len(self.images), []
        if size == 0:
            return fake
        for image in fake.split(1):  # once the pool is full, half of them take the place of a past one, which is shown
            full, swap = self.count == size, torch.rand(1, device=fake.device) < 0.5
            place = torch.where(full, torch.randint(size, (1,), device=fake.device), self.count)
            past = self.images.index_select(0, place)
            shown.append(torch.where(full & swap, past, image))
            self.images.index_copy_(0, place, torch.where(full & ~swap, past, image))
            self.count.add_(~full)
        return torch.cat(shown)


def init_weights(net):
    """N(0, .02) for weights, zero for biases (Sec. 7.1)."""
    for weight in net.parameters():
        nn.init.zeros_(weight) if weight.ndim == 1 else nn.init.normal_(weight, 0.0, 0.02)
    return net


def gan_loss(out, real):
    """Least squares (Sec. 4): (D - 1)^2 if `real`, else D^2, mean over all patches. (N, 1, h, w) -> 0-d."""
    return (out.float() - float(real)).square().mean()


def build(args):
    """{name: network, pool or optimizer} on args.device: all that is learned, and so all that last.pt holds."""
    torch.manual_seed(args.seed)
    state = {name: init_weights(Generator(args.blocks, args.ngf)).to(args.device) for name in ("G", "F")}
    state |= {name: init_weights(Discriminator(args.ndf, args.n_layers)).to(args.device) for name in ("D_X", "D_Y")}
    state |= {name: Pool(args.pool, args.size).to(args.device) for name in ("pool_X", "pool_Y")}
    for name, first, second in (("opt_G", "G", "F"), ("opt_D", "D_X", "D_Y")):
        weights = [*state[first].parameters(), *state[second].parameters()]
        rate, on_cuda = torch.tensor(args.lr, device=args.device), "cuda" in args.device  # a graph follows a tensor
        state[name] = torch.optim.Adam(weights, rate, betas=(0.5, 0.999), fused=True, capturable=on_cuda)
    return state


def make_step(args, state):
    """Returns `step(x, y)`: one update of all four on x and y (N, 3, size, size) in [-1, 1]. It returns 0-d losses."""
    G, F, D_X, D_Y, opt_G, opt_D = (state[name] for name in ("G", "F", "D_X", "D_Y", "opt_G", "opt_D"))
    use_gan = args.terms != "cycle"
    lambda_x = args.lambda_cycle if args.terms in ("all", "cycle", "gan+forward") else 0
    lambda_y = args.lambda_cycle if args.terms in ("all", "cycle", "gan+backward") else 0
    lambda_identity = args.lambda_identity * args.lambda_cycle if args.terms == "all" else 0

    def backward_G(G, F, D_Y, x, y, lambda_x):
        """Gradients of what G has a part in: X to Y and back. With all names swapped it is Y to X. Returns G(x)."""
        losses, total = {}, 0.0
        with torch.autocast(x.device.type, torch.bfloat16, args.precision == "bf16"):
            out = G(torch.cat([x, y]) if lambda_identity else x)  # in one pass: instance norm keeps images apart
            fake, same = out.float().tensor_split([len(x)])
            if use_gan:  # min (D_Y(G(x)) - 1)^2
                losses["loss_gan"] = total = gan_loss(D_Y(fake), True)
            if lambda_x:  # min |F(G(x)) - x| (Eq. 2)
                losses["loss_cycle"] = nn.functional.l1_loss(F(fake).float(), x)
                total = total + lambda_x * losses["loss_cycle"]
            if lambda_identity:  # min |G(y) - y| (Sec. 5.2)
                losses["loss_same"] = nn.functional.l1_loss(same, y)
                total = total + lambda_identity * losses["loss_same"]
        total.backward(inputs=[*G.parameters(), *F.parameters()])
        return fake.detach(), losses

    def backward_D(D, real, fake):
        """Gradients of D: min (D(y) - 1)^2 + D(G(x))^2, halved so that D learns slower than G (Sec. 7.1)."""
        with torch.autocast(real.device.type, torch.bfloat16, args.precision == "bf16"):
            on_real, on_fake = D(torch.cat([real, fake])).chunk(2)
        loss_D = (gan_loss(on_real, True) + gan_loss(on_fake, False)) / 2
        loss_D.backward()
        return loss_D

    def step(x, y):
        opt_G.zero_grad()
        opt_D.zero_grad()
        fake_y, losses_G = backward_G(G, F, D_Y, x, y, lambda_x)  # one at a time, for half the memory
        fake_x, losses_F = backward_G(F, G, D_X, y, x, lambda_y)
        opt_G.step()
        losses = {f"{name}_G": loss for name, loss in losses_G.items()}
        losses |= {f"{name}_F": loss for name, loss in losses_F.items()}
        if use_gan:
            losses["loss_D_X"] = backward_D(D_X, x, state["pool_X"](fake_x))
            losses["loss_D_Y"] = backward_D(D_Y, y, state["pool_Y"](fake_y))
            opt_D.step()
        return {name: loss.detach() for name, loss in losses.items()}

    return step


def train(args):
    """Train for --epochs, from last.pt if it is there, then translate the test split. Returns the run folder."""
    check_settings(args)
    state = build(args)
    init_distributed(args, state)
    (xs, ys), tests, names = load_sides(args)
    run = Run(args, state)
    update, loader = capture(make_step(args, state), args), batches(args, xs, ys, run.images_seen)
    for step, (epoch, x, y) in zip(run.steps(args.epochs * max(len(xs), len(ys)), args.batch_size), loader):
        decay = max(0, epoch - args.epochs + args.decay_epochs) / (args.decay_epochs + 1)
        for name in ("opt_G", "opt_D"):
            state[name].param_groups[0]["lr"].fill_(args.lr * (1 - decay))
        set_seed(args, step)  # of the pools
        losses = update(x, y)
        if run.report(epoch, losses):  # it is time to save
            save_tests(args, state, [side[:4] for side in tests], names, step)
            run.save_checkpoint()
    if RANK == 0:
        save_tests(args, state, tests, names, run.step)
    return args.out


# -- data and pictures -----------------------------------------------------------------------------------------------


def streets(count, seed, size=64):
    """Toy maps and photos, uint8 (N, 3, size, size), and class ids (N, size, size): what is where in both."""
    # ids: ground, houses (square), parks (round), streets and a river; photos show the first three mostly by texture
    rng, (row, col) = np.random.default_rng(seed), np.mgrid[:size, :size]
    colour = np.array([(240, 236, 224), (212, 136, 118), (84, 146, 88), (60, 60, 72), (70, 112, 176)], np.uint8)
    mean = np.array([(152, 146, 132), (132, 126, 112), (112, 106, 92), (72, 72, 80), (58, 92, 122)])
    photos, ids = np.empty((count, size, size, 3), np.uint8), np.empty((count, size, size), np.uint8)
    for photo, label in zip(photos, ids):
        angle, (wide, tall), p = rng.uniform(0, math.pi), rng.uniform(20, 30, 2), rng.uniform(0, 2 * math.pi, 5)
        u, v = (row * math.cos(a) + col * math.sin(a) + rng.uniform(2, 3) * size for a in (angle, angle + math.pi / 2))
        a, b = (2 * abs(t % d - d / 2) / (d - 5) for t, d in ((u, wide), (v, tall)))  # 0 mid-block, 1 at the street
        block = (u // wide).astype(int), (v // tall).astype(int)
        park, shade = rng.random((size, size))[block] < 0.25, rng.normal(0, 14, (size, size))[block]
        far = np.where(park, a**2 + b**2, np.maximum(a, b))
        label[:] = np.select([far > 1, park, far < 0.7], [3, 2, 1])
        label[abs(u + 6 * np.sin(v / 9 + p[0]) - rng.uniform(1, 4.5) * size) < 5] = 4
        grain, stripes, waves = rng.normal(0, 1, (size, size)), np.sin(1.5 * row + p[1]), np.sin(0.8 * v + p[2])
        leaves = np.sin(1.2 * row + p[3]) * np.sin(1.2 * col + p[4])
        texture = np.choose(label, [9 * grain, 48 * stripes, 70 * leaves, 3 * grain, 14 * waves])
        photo[:] = (mean[label] + (texture + shade * (label < 3))[..., None]).clip(0, 255)
    return colour[ids].transpose(0, 3, 1, 2), photos.transpose(0, 3, 1, 2), ids


def load_sides(args):
    """Sides A and B for training and for the test, uint8 (N, 3, H, W), and the names of the test images of both."""
    if args.data == "toy":  # maps and photos are of different scenes, but for the tests
        train = streets(600, 0, args.load_size)[0], streets(600, 2, args.load_size)[1]
        test = streets(100, 1, args.size)[:2]
        return *([torch.from_numpy(side) for side in sides] for sides in (train, test)), [range(100)] * 2
    folder, url = Path(args.data), f"https://efrosgans.eecs.berkeley.edu/cyclegan/datasets/{args.data}.zip"
    if args.data in SETS:  # it is downloaded on first use
        folder = args.data_root / args.data
        with FileLock(f"{folder}.lock"), explain_errors(f"{url} cannot be downloaded: unpack it to {folder} yourself"):
            if not folder.is_dir():
                torch.hub.download_url_to_file(url, f"{folder}.zip")
                shutil.unpack_archive(f"{folder}.zip", f"{folder}.part")  # leaves out what would be outside of it
                os.rename(f"{folder}.part/{args.data}", folder)
    splits, found = {"train": {}, "val": {}, "test": {}}, find_images(folder)
    sizes = [(file.name, file.stat().st_size) for split, _, file in found if split == "train"]
    args.images = hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]  # a run belongs to its images
    for split, side, file in found:
        splits[split].setdefault(side, []).append([file])
    for split, sides in splits.items():
        if {*sides} not in ({"A", "B"}, {""}) and (sides or split == "train"):
            fail(f"{args.data} has {split} images in {[*sides]}; {LAYOUTS}")
    train, test = splits["train"], splits["test"] or splits["val"]
    stems = {file.stem for [file] in train.get("", [])}
    if any(stem[-1] == "A" and f"{stem[:-1]}B" in stems for stem in stems):
        fail(f"{args.data} has images in two files, NAME_A and NAME_B; {LAYOUTS}")
    counts = [f"{len(files)} {split}{side}" for split, sides in splits.items() for side, files in sides.items()]
    print(f"{args.data}: {', '.join(counts)} images{'' if test else '; up to 16 of each side are shown as test'}")
    shown, loaded = test or {side: files[:16] for side, files in train.items()}, []
    for sides, size in ((train, args.load_size), (shown, args.size)):
        shape = (6 if "" in sides else 3, size, size)
        images = [cache_images(args, sides[side], read_resized, shape) for side in sorted(sides)]
        loaded.append([side for pixels in images for side in pixels.split(3, 1)])
    return *loaded, [[file.stem for [file] in shown.get(side) or shown[""]] for side in "AB"]


def read_resized(args, shape, files):
    """The image in a file, or its two halves, A and B, if `shape` has six channels: uint8 (3 or 6, size, size)."""
    image, halves = read_image(files[0], args.white), shape[0] == 6
    w, h = image.size
    if halves and w != 2 * h:
        fail(f"{files[0]} has {w}x{h} pixels, not twice as wide as high; {LAYOUTS}")
    if min(w, h) < args.size:
        fail(f"{files[0]} has {w}x{h} pixels, which is below --size {args.size}")
    images = [image.crop((0, 0, h, h)), image.crop((h, 0, w, h))] if halves else [image]
    return torch.cat([pil_to_tensor(image.resize(shape[1:], Image.Resampling.BICUBIC)) for image in images])


def to_x(args, pixels):
    """uint8 (N, 3, H, W) to [-1, 1] on the device."""
    pixels = pixels.pin_memory() if "cuda" in args.device and not pixels.is_cuda else pixels  # the CPU need not wait
    return pixels.to(args.device, non_blocking=True) / 127.5 - 1


def batches(args, xs, ys, images_seen):
    """Yields epoch, x and y (B, 3, size, size) in [-1, 1], cropped, mirrored; y is random. Put your own loader here."""
    count = max(len(xs), len(ys))
    orders = functools.lru_cache(2)(lambda epoch: np.random.default_rng([args.seed, epoch]).permutation(count))
    for first in itertools.count(images_seen, args.batch_size):
        batch = []
        for k in range(first + RANK, first + args.batch_size, WORLD):
            rng = np.random.default_rng([args.seed, k, 1])
            x, y = xs[orders(k // count)[k % count] % len(xs)], ys[rng.integers(len(ys))]
            for pixels in (x, y):
                top, left = rng.integers(0, args.load_size - args.size + 1, 2)
                pixels = pixels[:, top : top + args.size, left : left + args.size]
                batch.append(pixels.flip(-1) if rng.random() < 0.5 and not args.no_mirror else pixels)
        yield first // count + 1, to_x(args, torch.stack(batch[::2])), to_x(args, torch.stack(batch[1::2]))


def to_images(args, pixels, *nets):
    """Pillow images of x, uint8 (3, H, W), padded to multiples of 8, and of what `nets` make of it: G(x), F(G(x))."""
    h, w = pixels.shape[1:]
    images = [nn.functional.pad(to_x(args, pixels[None]), (0, -w % 8, 0, -h % 8), "replicate")]
    with torch.no_grad(), torch.autocast(images[0].device.type, torch.bfloat16, args.precision == "bf16"):
        for net in nets:
            images.append(net(images[-1]).float())
    return [to_pil_image((image[0, :, :h, :w] * 127.5 + 127.5).round().byte().cpu()) for image in images]


def save_tests(args, state, sides, names, step):
    """Translate `sides`, uint8 (N, 3, H, W), to OUT/test, and show 16 of each, there and back, in OUT/samples."""
    shown = {way: [] for way in WAYS}
    for (way, nets), images, files in zip(WAYS.items(), sides, names):
        for pixels, name in zip(images, files):
            translated = to_images(args, pixels, *[state[net] for net in nets])
            atomic_write(args.out / "test" / way / f"{name}.png", translated[1].save)
            shown[way] += [translated] if len(shown[way]) < 16 else []
    cells = [pil_to_tensor(image) for x, y in zip(*shown.values()) for image in x + y]
    save_grid(args.out / "samples" / f"{step:07}.png", cells, ["x", "G(x)", "F(G(x))", "y", "F(y)", "G(F(y))"])


def load_generator(run, device="cpu", direction="AtoB"):
    """G of a run folder, or F for BtoA: (N, 3, H, W) in [-1, 1] to the same, H and W multiples of 4."""
    checkpoint = load_checkpoint(run)
    with explain_errors(f"{run}/last.pt is damaged"):
        settings = argparse.Namespace(**checkpoint["settings"])
        G = Generator(settings.blocks, settings.ngf)
        G.load_state_dict(checkpoint[WAYS[direction][0]])
    G.settings = settings
    return G.to(device)


def translate(args):
    """Translate --translate, an image or a folder, of any size, with a trained G. Returns the folder of the results."""
    check_settings(args, use=True)
    G, to, errors = load_generator(args.out, args.device, args.direction), args.to or args.out / args.direction, []
    found = find_images(args.translate) if args.translate.is_dir() else [("", "", args.translate)]
    files = {(to / folder / f"{file.stem}.png").resolve(): file for _, folder, file in found}  # of each translation
    if len(files) < len(found) or {*files} & {file.resolve() for file in files.values()}:
        fail(f"translations of {args.translate} would overwrite images: choose another --to, or other names")
    for target, file in files.items():
        try:
            pixels = pil_to_tensor(read_image(file, G.settings.white))
            atomic_write(target, to_images(args, pixels, G)[1].save)
        except SystemExit as error:  # go on with the others
            errors.append(str(error))
    print(f"{len(found) - len(errors)} of {len(found)} images are translated to {to}")
    if errors:
        sys.exit("\n".join(errors))
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
    return translate(args) if args.translate else train(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # outside of the loop
        sys.exit(130)
    if dist.is_initialized():  # all processes are here, none has failed
        dist.destroy_process_group()
