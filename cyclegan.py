# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "tqdm>=4.66"]
# ///
"""CycleGAN: two GANs that turn two kinds of image into each other, learned without pairs.

Zhu, Park, Isola, Efros: Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks. ICCV 2017,
arXiv:1703.10593. G maps X (side A) to Y (side B), F maps Y to X. D_Y tells a real y from G(x), D_X a real x from F(y),
and an image that goes there and back must come home:
    L(G, F, D_X, D_Y) = L_GAN(G, D_Y) + L_GAN(F, D_X) + lambda (E|F(G(x)) - x| + E|G(F(y)) - y|)             (Eq. 3)

    python cyclegan.py                                         # train on toy streets, drawn here: minutes on a CPU
    python cyclegan.py --data horse2zebra                      # download and train; stop it, repeat this to resume
    python cyclegan.py --data horse2zebra --translate photos   # use what was trained, on an image or a folder

Departures: the identity loss of Sec. 5.2, E|G(y) - y| + E|F(x) - x|, is on for every data set with half the weight of
the cycle, as in the authors' code. Instance norm has no gain and no bias, and G and F step before D_X and D_Y do, as
in their later code. Under torchrun the pool of each process holds the images of that process only, and last.pt keeps
the first one's. The networks run in bfloat16 where the device has units for it.
"""

import argparse
import atexit
import contextlib
import difflib
import functools
import glob
import hashlib
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
from torch.nn.functional import l1_loss, softplus
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

METHOD, SCRIPT = "cyclegan", Path(__file__).stem
URL = "https://efrosgans.eecs.berkeley.edu/cyclegan/datasets/{}.zip"
SETS = {  # the named sets, and which defaults each changes
    "toy": dict(size=64, load_size=64, blocks=3, ngf=32, ndf=32, n_layers=2, epochs=6, decay_epochs=3, save_every=600),
    **dict.fromkeys("horse2zebra apple2orange summer2winter_yosemite iphone2dslr_flower maps facades".split(), {}),
    **dict.fromkeys("monet2photo cezanne2photo ukiyoe2photo vangogh2photo".split(), {}),
}
TERMS = {  # of the loss: GAN, forward cycle, backward cycle, identity; all but the first are ablations (Table 4)
    "all": (1, 1, 1, 1),
    "cycle": (0, 1, 1, 0),
    "gan": (1, 0, 0, 0),
    "gan+forward": (1, 1, 0, 0),
    "gan+backward": (1, 0, 1, 0),
}
WAYS = {"AtoB": ("G", "F"), "BtoA": ("F", "G")}  # there, and back
FIXED = [  # a run that goes on has these settings as before
    *"size load_size no_mirror blocks ngf ndf n_layers loss terms lambda_x lambda_y lambda_identity pool".split(),
    *("white", "seed", "other images"),
]
LAYOUTS = "give folders A and B, or images with both side by side; folders train and test, or trainA, ..., split them"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}  # names of folders
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def get_args(argv=None):
    """Options from `argv` or the command line. The defaults are the paper's, or those of the named set."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__.partition("\n")[0])
    parser.formatter_class = functools.partial(argparse.HelpFormatter, max_help_position=26, width=120)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", help=f"a folder of images of two kinds, or one of {', '.join(SETS)} (%(default)s)")
    add("--data-root", type=Path, default="data", help="folder for downloads and decoded images (%(default)s)")
    add("--size", type=int, default=256, help="pixels a side of a training crop, a multiple of 4 (%(default)s)")
    add("--load-size", type=int, help="pixels a side before the random crop (286 / 256 of --size)")
    add("--no-mirror", action="store_true", help="no random mirroring")
    add("--white", type=int, default=65535, help="value of white in 16-bit images (%(default)s)")
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=("lsgan", "log"), default="lsgan", help="least squares or cross-entropy (%(default)s)")
    add("--terms", choices=TERMS, default="all", help="terms of the loss, Table 4 (%(default)s)")
    add("--lambda-x", type=float, default=10.0, help="weight of the forward cycle, |F(G(x)) - x| (%(default)s)")
    add("--lambda-y", type=float, default=10.0, help="weight of the backward cycle, |G(F(y)) - y| (%(default)s)")
    add("--lambda-identity", type=float, default=0.5, help="identity loss, as a share of the cycle's (%(default)s)")
    add("--pool", type=int, default=50, help="past images that D_X and D_Y are shown again, 0 for none (%(default)s)")
    add("--blocks", type=int, help="residual blocks of G and F (9; 6 below 256 pixels)")
    add("--ngf", type=int, default=64, help="channels of the first layer of G and F (%(default)s)")
    add("--ndf", type=int, default=64, help="channels of the first layer of D_X and D_Y (%(default)s)")
    add("--n-layers", type=int, default=3, help="strided layers of D_X and D_Y: 3 see 70 pixels (%(default)s)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=200, help="passes over the larger of the two sides (%(default)s)")
    add("--decay-epochs", type=int, default=100, help="last epochs, in which the rate falls to 0 (%(default)s)")
    add("--batch-size", type=int, default=1, help="images of each side in an update, over all processes (%(default)s)")
    add("--lr", type=float, default=2e-4, help="learning rate of Adam (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, data order, crops and pools (%(default)s)")
    add("--out", type=Path, help=f"run folder (runs/{SCRIPT}-DATA)")
    add("--init", type=Path, metavar="RUN", help="start from the weights of another run (fine-tuning)")
    add("--max-steps", type=int, help="stop after this many updates in all")
    add("--save-every", type=int, help="updates between checkpoints (ten minutes)")
    add("--fresh", action="store_true", help="delete checkpoint, log and samples of the run folder, and start over")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (the accelerator, if there is one)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the device has it")
    add("--no-capture", action="store_true", help="on CUDA: no CUDA graph")
    add = parser.add_argument_group("use").add_argument
    add("--translate", type=Path, metavar="PATH", help="translate an image or a folder with the trained G or F")
    add("--direction", choices=WAYS, default="AtoB", help="of --translate: G is AtoB, F is BtoA (%(default)s)")
    add("--to", type=Path, help="folder for the translations (OUT/translated)")
    data = parser.parse_known_args(argv)[0].data
    data = f"./{data}" if data in SETS and Path(data).is_dir() else data  # a folder that is there comes first
    parser.set_defaults(**SETS.get(data, {}))
    args = parser.parse_args(argv)
    args.data, args.load_size = data, args.load_size or args.size * 286 // 256
    if args.blocks is None:
        args.blocks = 9 if args.size >= 256 else 6
    check_args(args, "lambda_x lambda_y lambda_identity n_layers pool decay_epochs lr seed".split())
    least = max(16, 3 << args.n_layers)  # D's output is 1x1 or more
    if args.size % 4 or not least <= args.size <= args.load_size:
        fail(f"--size {args.size}: give a multiple of 4 from {least} (--n-layers) to {args.load_size} (--load-size)")
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
    """ResNet of Johnson et al. (Sec. 7.2): c7s1-64, d128, d256, R256 `blocks` times, u128, u64, c7s1-3.

    x (N, 3, H, W) in [-1, 1], H and W multiples of 4 -> (N, 3, H, W) in [-1, 1].
    """

    def __init__(self, blocks=9, ngf=64):
        super().__init__()
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7), nn.InstanceNorm2d(ngf), nn.ReLU(True)]
        for width in (ngf, 2 * ngf):  # (N, 128, H/2, W/2), (N, 256, H/4, W/4)
            conv = nn.Conv2d(width, 2 * width, 3, 2, 1)
            layers += [conv, nn.InstanceNorm2d(2 * width), nn.ReLU(True)]
        layers += [Block(4 * ngf) for _ in range(blocks)]
        for width in (4 * ngf, 2 * ngf):  # (N, 128, H/2, W/2), (N, 64, H, W)
            conv = nn.ConvTranspose2d(width, width // 2, 3, 2, 1, output_padding=1)
            layers += [conv, nn.InstanceNorm2d(width // 2), nn.ReLU(True)]
        self.layers = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())

    def forward(self, x):
        return self.layers(x)


class Discriminator(nn.Module):
    """PatchGAN (Sec. 7.2): C64-C128-C256-C512, an output for each patch of 70x70 pixels, with three strided layers.

    x (N, 3, H, W) in [-1, 1] -> (N, 1, h, w), 30x30 for x of 256x256.
    """

    def __init__(self, ndf=64, n_layers=3):
        super().__init__()
        width = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        layers = [nn.Conv2d(3, ndf, 4, 2 if n_layers else 1, 1), nn.LeakyReLU(0.2, True)]  # no norm here
        for i in range(1, len(width)):
            conv = nn.Conv2d(width[i - 1], width[i], 4, 2 if i < n_layers else 1, 1)
            layers += [conv, nn.InstanceNorm2d(width[i]), nn.LeakyReLU(0.2, True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width[-1], 1, 4, 1, 1))

    def forward(self, x):
        return self.layers(x)


class Pool(nn.Module):
    """Past images of a generator, for D to see again (Sec. 4, after Shrivastava et al.), kept on the device.

    The first `size` images are stored and returned. Later ones are either returned, or, with odds of one half, stored
    in place of a past image, which is returned instead. fake (N, 3, S, S) -> (N, 3, S, S).
    """

    def __init__(self, size, pixels):
        super().__init__()
        self.register_buffer("images", torch.zeros(size, 3, pixels, pixels))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def forward(self, fake):
        size, shown = len(self.images), []
        if size == 0:
            return fake
        for image in fake.split(1):
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


def gan_loss(args, out, real):
    """(D - 1)^2 if `real`, else D^2 (Sec. 4); cross-entropy for --loss log; mean over all patches. -> 0-d."""
    if args.loss == "lsgan":
        return (out.float() - float(real)).square().mean()
    return softplus(-out.float() if real else out.float()).mean()


def build(args):
    """{name: network, pool or optimizer} on args.device: all that is learned, and so all that last.pt holds."""
    torch.manual_seed(args.seed)
    state = {}
    for name in ("G", "F"):
        state[name] = init_weights(Generator(args.blocks, args.ngf)).to(args.device)
    for name in ("D_X", "D_Y"):
        state[name] = init_weights(Discriminator(args.ndf, args.n_layers)).to(args.device)
    for name in ("pool_X", "pool_Y"):
        state[name] = Pool(args.pool, args.size).to(args.device)
    for name, first, second in (("opt_G", "G", "F"), ("opt_D", "D_X", "D_Y")):
        weights = [*state[first].parameters(), *state[second].parameters()]
        # The rate is a tensor, so that a CUDA graph follows the schedule.
        rate, on_cuda = torch.tensor(args.lr, device=args.device), "cuda" in args.device
        state[name] = torch.optim.Adam(weights, rate, betas=(0.5, 0.999), fused=True, capturable=on_cuda)
    return state


def make_step(args, state):
    """Returns `step(x, y)`: one update of G and F, then of D_X and D_Y, on x and y (N, 3, size, size) in [-1, 1].

    It returns its losses as 0-d tensors and reads nothing back from the device, so a CUDA graph can record it.
    """
    G, F, D_X, D_Y, opt_G, opt_D = (state[name] for name in ("G", "F", "D_X", "D_Y", "opt_G", "opt_D"))
    use_gan, use_x, use_y, use_identity = TERMS[args.terms]
    lambda_x, lambda_y = use_x * args.lambda_x, use_y * args.lambda_y
    weights_G = [*G.parameters(), *F.parameters()]

    def backward_G(G, F, D_Y, x, y, lambda_x, lambda_y):
        """Gradients of what G has a part in: X to Y and back. With all names swapped it is Y to X. Returns G(x)."""
        lambda_identity, losses, total = use_identity * args.lambda_identity * lambda_y, {}, 0.0
        with torch.autocast(x.device.type, torch.bfloat16, args.precision == "bf16"):
            out = G(torch.cat([x, y]) if lambda_identity else x)  # in one pass: instance norm keeps images apart
            fake, same = out.float().tensor_split([len(x)])
            if use_gan:  # min (D_Y(G(x)) - 1)^2
                losses["loss_gan"] = gan_loss(args, D_Y(fake), True)
                total = total + losses["loss_gan"]
            if lambda_x:  # min |F(G(x)) - x| (Eq. 2)
                losses["loss_cycle"] = l1_loss(F(fake).float(), x)
                total = total + lambda_x * losses["loss_cycle"]
            if lambda_identity:  # min |G(y) - y| (Sec. 5.2)
                losses["loss_same"] = l1_loss(same, y)
                total = total + lambda_identity * losses["loss_same"]
        if losses:
            total.backward(inputs=weights_G)
        return fake.detach(), losses

    def backward_D(D, real, fake):
        """Gradients of D: min (D(y) - 1)^2 + D(G(x))^2, halved so that D learns slower than G (Sec. 7.1)."""
        with torch.autocast(real.device.type, torch.bfloat16, args.precision == "bf16"):
            on_real, on_fake = D(torch.cat([real, fake])).chunk(2)
        loss_D = (gan_loss(args, on_real, True) + gan_loss(args, on_fake, False)) / 2
        loss_D.backward()
        return loss_D

    def step(x, y):
        opt_G.zero_grad()
        opt_D.zero_grad()
        fake_y, losses_G = backward_G(G, F, D_Y, x, y, lambda_x, lambda_y)  # one at a time, for half the memory
        fake_x, losses_F = backward_G(F, G, D_X, y, x, lambda_y, lambda_x)
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
    """Train for --epochs, resume if last.pt is there, then translate the test split. Returns the run folder."""
    (xs, ys), tests = find_sides(args)
    state = build(args)
    epoch_length = range(max(len(xs), len(ys)))
    files = {(a, b): xs[a] + ys[b] for a, b, _ in zip(itertools.cycle(xs), itertools.cycle(ys), epoch_length)}
    with Run(args, state, files) as run:
        images, test_images = load_images(args, xs, ys, args.load_size), load_images(args, *tests, args.size)
        update, loader = capture(make_step(args, state), args), batches(args, *images, run.images_seen)
        for step in range(run.start_step + 1, run.last_step + 1):
            epoch, x, y = next(loader)
            decay = max(0, epoch - args.epochs + args.decay_epochs) / (args.decay_epochs + 1)
            for name in ("opt_G", "opt_D"):
                state[name].param_groups[0]["lr"].fill_(args.lr * (1 - decay))
            set_seed(args, step)  # of the pools
            losses = update(x, y)
            if run.report(step, epoch, losses):  # it is time to save
                save_samples(args, state, [side[:4] for side in test_images], args.out / "samples" / f"{step:07}.png")
                run.save_checkpoint(step)
            if run.should_stop:
                break
        del update  # NCCL waits for the end of a CUDA graph before it lets the process group go
    grid = args.out / "samples" / f"{run.last_step:07}-test.png"
    if not grid.exists():
        save_samples(args, state, test_images, grid, tests)
    print(f"{args.out}: {run.last_step} of {run.all_steps} steps are done; {grid} shows the test split")
    return args.out


# -- data and pictures -----------------------------------------------------------------------------------------------


def streets(count, seed, size=64):
    """Toy maps (N, 3, size, size) and photos (N, 3, size, size), uint8, and class ids (N, size, size).

    Ground 0, building 1, park 2, road 3, river 4: flat colours in a map; in a photo textures of random phase, and the
    first three have one mean colour.
    """
    rng, (row, col) = np.random.default_rng(seed), np.mgrid[:size, :size]
    colour = np.array([(240, 236, 224), (196, 120, 104), (124, 190, 110), (255, 214, 90), (110, 168, 220)], np.uint8)
    mean = np.array([(132, 126, 112), (132, 126, 112), (132, 126, 112), (82, 82, 90), (58, 92, 122)])
    photos, ids = np.empty((count, size, size, 3), np.uint8), np.empty((count, size, size), np.uint8)
    for photo, label in zip(photos, ids):
        angle, (wide, tall), p = rng.uniform(0, math.pi), rng.uniform(18, 30, 2), rng.uniform(0, 2 * math.pi, 5)
        u, v = (row * math.cos(a) + col * math.sin(a) + rng.uniform(2, 3) * size for a in (angle, angle + math.pi / 2))
        label[:] = rng.integers(0, 3, (size, size))[(u // wide).astype(int), (v // tall).astype(int)]
        label[(u % wide < 5) | (v % tall < 5)] = 3
        label[abs(u + 6 * np.sin(v / 9 + p[0]) - rng.uniform(1, 4.5) * size) < 5] = 4
        grain, stripes, waves = rng.normal(0, 1, (size, size)), np.sin(1.3 * row + p[1]), np.sin(0.8 * v + p[2])
        leaves = np.sin(0.9 * row + p[3]) * np.sin(0.9 * col + p[4])
        texture = np.choose(label, [11 * grain, 48 * stripes, 70 * leaves, 3 * grain, 14 * waves])
        photo[:] = (mean[label] + texture[..., None]).clip(0, 255)
    return colour[ids].transpose(0, 3, 1, 2), photos.transpose(0, 3, 1, 2), ids


def find_sides(args):
    """Sides A and B of the training images, and of the test images, or of 16 training images if there is no test split.

    A side is {name: (file,)}. If A and B are equal, each file has both, side by side.
    """
    if args.data == "toy":
        return [{f"{i:03}": () for i in range(600)}] * 2, [{f"{i:03}": () for i in range(100)}] * 2
    folder, splits = find_data(args), {"train": {}, "val": {}, "test": {}}
    for split, side, file in find_images(folder):
        splits[split].setdefault(side, {})[str(file.relative_to(folder))] = (file,)
    for split, sides in splits.items():
        if set(sides) not in (set(), {""}, {"A", "B"}):
            fail(f"{folder} has {split} images in {' and '.join(side or '.' for side in sides)}; {LAYOUTS}")
    train = splits["train"] or fail(f"{folder} has no training images; {LAYOUTS}")
    few = {side: dict([*files.items()][:16]) for side, files in train.items()}
    counts = [f"{len(files)} {split}{side}" for split, sides in splits.items() for side, files in sides.items()]
    note = "" if splits["test"] or splits["val"] else "; no test split: showing up to 16 training images of each side"
    print(f"{args.data}: {', '.join(counts)} images{note}")
    tests = splits["test"] or splits["val"] or few
    return [[sides.get(side, sides.get("")) for side in "AB"] for sides in (train, tests)]


def load_images(args, xs, ys, size):
    """Sides A and B as uint8 (N, 3, size, size)."""
    if args.data == "toy":  # maps and photos are of different scenes, but for the tests
        seed_x, seed_y = (1, 1) if len(xs) == 100 else (0, 2)
        maps, photos = streets(len(xs), seed_x, size)[0], streets(len(ys), seed_y, size)[1]
        return [torch.from_numpy(side).to(args.device) for side in (maps, photos)]

    def read(files):  # one file, with one image or with two halves
        images = [read_image(files[0], args.white)]
        if xs == ys:
            w, h = images[0].size
            if w != 2 * h:
                fail(f"{files[0]} has {w}x{h} pixels, not twice as wide as high; {LAYOUTS}")
            images = [images[0].crop((0, 0, h, h)), images[0].crop((h, 0, w, h))]
        if min(images[0].size) < args.size:
            fail(f"{files[0]} is too small: give at most --size {min(images[0].size) // 4 * 4}")
        return torch.cat([pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images])

    if xs == ys:
        return cache_images(args, list(xs.values()), read, (6, size, size)).split(3, 1)
    return [cache_images(args, list(side.values()), read, (3, size, size)) for side in (xs, ys)]


def to_x(args, pixels):
    """uint8 (N, 3, H, W) to [-1, 1] on the device."""
    pixels = pixels.pin_memory() if "cuda" in args.device and not pixels.is_cuda else pixels  # the host need not wait
    return pixels.to(args.device, non_blocking=True) / 127.5 - 1


def batches(args, xs, ys, images_seen):
    """Yields epoch, x and y (B, 3, size, size) in [-1, 1], without end: here goes a data loader of your own.

    xs and ys are uint8 (N, 3, load_size, load_size). An epoch is as long as the larger of them, and each x meets a
    random y. Both have a random crop and mirroring of their own.
    """
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


@torch.no_grad()
def to_images(args, pixels, *nets):
    """Pillow images of x, uint8 (3, H, W), and of what `nets` make of it, one after the other: x, G(x), F(G(x)).

    For them x is padded to multiples of 4, and to 8 at least.
    """
    h, w = pixels.shape[1:]
    padded = np.pad(pixels.cpu(), ((0, 0), (0, max(-h % 4, 8 - h)), (0, max(-w % 4, 8 - w))), "reflect")
    images = [to_x(args, torch.from_numpy(padded)[None])]
    with torch.autocast(images[0].device.type, torch.bfloat16, args.precision == "bf16"):
        for net in nets:
            images.append(net(images[-1]).float())
    return [to_pil_image((image[0, :, :h, :w] * 127.5 + 127.5).round().byte().cpu()) for image in images]


def save_samples(args, state, images, grid, names=((), ())):
    """Translate both sides of `images`, uint8 (N, 3, H, W), there and back; `names` are saved in OUT/test.

    The picture `grid` shows the first 16: x, G(x), F(G(x)), and y, F(y), G(F(y)) (Fig. 4).
    """
    shown = {"AtoB": [], "BtoA": []}
    for way, side, files in zip(WAYS, images, names):
        there, back = WAYS[way]
        for pixels, name in itertools.zip_longest(side, files):
            translated = to_images(args, pixels, state[there], state[back])
            if name:
                atomic_write(args.out / "test" / way / f"{Path(name).stem}.png", translated[1].save)
            if len(shown[way]) < 16:
                shown[way].append(translated)
    cells = [image for x, y in zip(*shown.values()) for image in x + y]
    save_grid(grid, cells, ["x", "G(x)", "F(G(x))", "y", "F(y)", "G(F(y))"])


def load_generator(run, device="cpu", direction="AtoB"):
    """G of a run folder, or F for BtoA, (N, 3, H, W) to (N, 3, H, W) in [-1, 1], H and W multiples of 4."""
    checkpoint = load_checkpoint(run)
    with explain_errors(f"{run}/last.pt is damaged"), torch.device("meta"):  # the weights are those of the file
        settings = argparse.Namespace(**checkpoint["settings"])
        G = Generator(settings.blocks, settings.ngf)
        G.load_state_dict(checkpoint[WAYS[direction][0]], assign=True)
    G.settings = settings
    return G.to(device)


def translate(args):
    """Translate --translate, an image or a folder, of any size, with a trained G. Returns the folder of the results."""
    G, to, errors = load_generator(args.out, args.device, args.direction), args.to or args.out / "translated", []
    found = find_images(args.translate) if args.translate.is_dir() else [("", "", args.translate)]
    for _, folder, file in found:
        if file.parent.resolve() == to.resolve():
            fail(f"--to {to} is the folder of the images themselves: choose another")
        try:
            image = read_image(file, args.white)
        except SystemExit as error:  # go on with the others
            errors.append(str(error))
            continue
        atomic_write(to / folder / f"{file.stem}.png", to_images(args, pil_to_tensor(image), G)[1].save)
    print(f"{len(found) - len(errors)} images are translated to {to}")
    return to if not errors else sys.exit("\n".join(errors))


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


def find_data(args):
    """The folder that --data means; a named set is downloaded to --data-root on first use."""
    if args.data not in SETS:
        return Path(args.data)
    folder, archive = args.data_root / args.data, URL.format(args.data)
    args.data_root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"), explain_errors(f"{archive} cannot be downloaded: unpack it to {folder} yourself"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=args.data_root) as temp:
                file = Path(temp, Path(archive).name)
                torch.hub.download_url_to_file(archive, str(file))
                safe = None if file.suffix == ".zip" else "data"  # nothing outside of temp, which zip never does
                shutil.unpack_archive(file, temp, filter=safe)
                os.rename(Path(temp, args.data), folder)
    return folder


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
    return translate(args) if args.translate else train(args)


if __name__ == "__main__":
    main()
