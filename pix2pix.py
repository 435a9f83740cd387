# /// script
# requires-python = ">=3.11.4"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "tqdm>=4.66", "filelock>=3"]
# ///
"""pix2pix: a conditional GAN that translates images, learned from pairs of input and output.

Isola, Zhu, Zhou, Efros: Image-to-Image Translation with Conditional Adversarial Networks. CVPR 2017, arXiv:1611.07004.
G translates x to G(x), with dropout as noise. D looks at x and an output, patch by patch, and tells y from G(x):
    G* = arg min_G max_D  E[log D(x, y)] + E[log(1 - D(x, G(x)))] + lambda E|y - G(x)|          (Eq. 4)

    python pix2pix.py                                          # train on toy streets, drawn here: minutes on a CPU
    python pix2pix.py --data facades                           # download and train; stop it, repeat this to resume
    python pix2pix.py --data facades --translate labels.png    # use what was trained, on an image or a folder

Departures: D and G are both updated from one forward pass. The authors' Torch code updates D, then sends G's
gradient through the new D. G norms each image by itself, as a batch of one does: an image gives the same in any batch.
Its innermost 1x1 map has none, as in their later code: batch norm would erase it. The rate is constant;
--decay-epochs 100 is their later schedule. Colorization divides ab by 127.5, not by 110.
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
from PIL import Image, ImageCms, ImageDraw, ImageOps
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

METHOD, SCRIPT = "pix2pix", Path(__file__).stem
SETS = {  # the named sets, and which defaults each changes
    "toy": dict(size=64, load_size=64, ngf=32, ndf=32, n_layers=2, epochs=12, batch_size=4, save_every=600),
    "facades": dict(direction="BtoA"),
    "maps": dict(),
    **dict.fromkeys(("edges2shoes", "edges2handbags"), dict(epochs=15, batch_size=4)),
    "night2day": dict(direction="BtoA", epochs=17, batch_size=4),
}
FIXED = "direction source white size load_size no_mirror loss lambda_l1 no_skips ngf ndf n_layers seed".split()
CHANNELS = {None: (3, 3), "gray": (1, 2), "hole": (3, 3)}  # of x and y, by --from; gray is L and ab of CIE Lab
PROFILES = {"RGB": ImageCms.createProfile("sRGB"), "LAB": ImageCms.createProfile("LAB")}
LAYOUTS = "give images with A and B side by side, or folders named A and B, also within train and test"
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
    add("--data", default="toy", help=f"a folder of pairs, or one of {', '.join(SETS)}; toy has smaller defaults")
    add("--data-root", type=Path, default="data", help="for downloads and decoded images")
    add("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="input to output; A is left")
    add("--from", dest="source", choices=("gray", "hole"), help="pairs from photos: colorization, inpainting")
    add("--white", type=int, default=65535, help="16-bit pixel value that is white")
    add("--size", type=int, choices=[2**i for i in range(4, 12)], default=256, help="side of a training image")
    add("--load-size", type=int, help="images are resized to this, then cropped; None: 286 / 256 of --size")
    add("--no-mirror", action="store_true", help="no random mirroring")
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=("l1", "gan", "cgan", "l1+gan", "l1+cgan"), default="l1+cgan", help="its terms, Table 1")
    add("--lambda-l1", type=float, default=100.0, help="weight of L1, Eq. 4")
    add("--no-skips", action="store_true", help="encoder-decoder instead of U-Net, Sec. 3.2")
    add("--ngf", type=int, default=64, help="channels of G's first layer")
    add("--ndf", type=int, default=64, help="channels of D's first layer")
    add("--n-layers", type=int, default=3, help="strided layers of D; 0, 1, 2, 3, 5: patches of 1, 16, 34, 70, 286")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=200, help="passes over the pairs")
    add("--decay-epochs", type=int, default=0, help="how many of the last epochs lower the rate to 0")
    add("--batch-size", type=int, default=1, help="pairs in an update, all processes together")
    add("--lr", type=float, default=2e-4, help="learning rate of Adam")
    add("--seed", type=int, default=0, help="of weights, order, crops and dropout")
    add("--out", type=Path, help=f"run folder; None: runs/{SCRIPT}-DATA")
    add("--init", type=Path, metavar="RUN", help="start from the weights of another run (fine-tuning)")
    add("--max-steps", type=int, help="stop after this many updates in all")
    add("--save-every", type=int, help="updates between checkpoints; None: ten minutes")
    add("--fresh", action="store_true", help="start anew: delete checkpoint, log and pictures")
    add("--device", help="cpu, cuda, cuda:1, mps, ...; None: the accelerator, if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the device has it")
    add("--no-capture", action="store_true", help="do not use a CUDA graph")
    add = parser.add_argument_group("use of a trained model").add_argument
    add("--translate", type=Path, metavar="PATH", help="use G on an image or a folder")
    add("--to", type=Path, help="folder for translations; None: OUT/translated")
    data = parser.parse_known_args(argv)[0].data  # first, as the other defaults depend on it
    data = f"./{data}" if data in SETS and Path(data).is_dir() else data  # a folder that is there comes first
    parser.set_defaults(**SETS.get(data, {}))
    parser.add_argument("-h", "--help", action="help", help="show this; --data sets the defaults")
    args = parser.parse_args(argv)
    args.data, args.load_size = data, args.load_size or args.size * 286 // 256
    check_args(args, may_be_zero=("lambda_l1", "n_layers", "decay_epochs", "lr", "seed"))
    least = 4 * 2**args.n_layers  # the last layers of D need 4 pixels
    if not least <= args.size <= args.load_size:
        fail(f"--size {args.size}: give {least} (for --n-layers {args.n_layers}) to {args.load_size} (--load-size)")
    if args.source and (args.data in SETS or args.direction == "BtoA"):
        fail("--from needs a folder of photos as --data, and no --direction")
    if args.to and not args.translate:
        fail("--to needs --translate")
    return args


# -- the method ------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """U-Net (Sec. 3.2): encoder C64-C128-C256-C512-C512-C512-C512-C512 and its mirror, each level joined to its own.

    x (N, in_channels, H, W) in [-1, 1], H and W multiples of `size` -> (N, out_channels, H, W) in [-1, 1].
    """

    def __init__(self, in_channels=3, out_channels=3, size=256, ngf=64, skips=True):
        super().__init__()
        self.skips, self.down, self.up = skips, nn.ModuleList(), nn.ModuleList()
        norm = functools.partial(nn.InstanceNorm2d, affine=True)  # batch norm of one image (Sec. 3.3)
        width = [ngf * min(2**i, 8) for i in range(int(math.log2(size)))]
        for i in range(len(width)):
            outermost, innermost = i == 0, i == len(width) - 1
            c_in, c_out = in_channels if outermost else width[i - 1], width[i]
            down = [] if outermost else [nn.LeakyReLU(0.2)]
            down += [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False)]
            down += [] if outermost or innermost else [norm(c_out)]  # the norm of a single pixel is zero
            c_in = width[i] if innermost or not skips else 2 * width[i]
            c_out = out_channels if outermost else width[i - 1]
            up = [nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=outermost)]
            up += [nn.Tanh()] if outermost else [norm(c_out)]
            up += [nn.Dropout(0.5)] if i >= len(width) - 3 else []  # the noise z, at test time too (Sec. 3.1)
            self.down.append(nn.Sequential(*down))
            self.up.insert(0, nn.Sequential(*up))

    def forward(self, x):
        levels = []
        for down in self.down:
            x = down(x)  # (N, 64, H/2, W/2), (N, 128, H/4, W/4), ... (N, 512, H/size, W/size)
            levels.append(x)
        x = self.up[0](levels.pop())
        for up in self.up[1:]:
            x = up(torch.cat([x, levels.pop()], 1) if self.skips else x)
        return x


class Discriminator(nn.Module):
    """PatchGAN (Sec. 3.2): C64-C128-C256-C512, a logit for each patch of 70x70 pixels; `n_layers` 0 is PixelGAN.

    pair: x and an output, stacked, (N, in_channels, H, W) in [-1, 1] -> logits (N, 1, h, w), 30x30 for 256x256.
    """

    def __init__(self, in_channels=6, ndf=64, n_layers=3):
        super().__init__()
        kernel, pad = (4, 1) if n_layers else (1, 0)
        width = [ndf * min(2**i, 8) for i in range(max(n_layers, 1) + 1)]
        layers = [nn.Conv2d(in_channels, ndf, kernel, 2 if n_layers else 1, pad), nn.LeakyReLU(0.2)]  # no norm here
        for i in range(1, len(width)):
            conv = nn.Conv2d(width[i - 1], width[i], kernel, 2 if i < n_layers else 1, pad, bias=False)
            layers += [conv, nn.BatchNorm2d(width[i]), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width[-1], 1, kernel, 1, pad, bias=n_layers > 0))

    def forward(self, pair):
        return self.layers(pair)


def init_weights(net):
    """N(0, .02) for convolutions, N(1, .02) for gains of norms, zero for biases (as the authors' code)."""
    for name, weight in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.02)
    return net


def gan_loss(logits, real):
    """-log D if `real`, else -log(1 - D), mean over all patches; D = sigmoid(logits). (N, 1, h, w) -> a scalar."""
    return F.softplus(-logits.float() if real else logits.float()).mean()


def build(args):
    """{name: network or optimizer} on args.device: all that learns. A checkpoint holds their states."""
    torch.manual_seed(args.seed)
    c_in, c_out = CHANNELS[args.source]
    G = init_weights(Generator(c_in, c_out, args.size, args.ngf, not args.no_skips)).to(args.device)
    d_in = c_in + c_out if "cgan" in args.loss else c_out  # an unconditional D does not see x
    D = init_weights(Discriminator(d_in, args.ndf, args.n_layers)).to(args.device)
    # Rates are tensors, so that a CUDA graph follows the schedule.
    adam = dict(betas=(0.5, 0.999), fused=True, capturable="cuda" in args.device)
    opt_G = torch.optim.Adam(G.parameters(), torch.tensor(args.lr, device=args.device), **adam)
    opt_D = torch.optim.Adam(D.parameters(), torch.tensor(args.lr, device=args.device), **adam)
    return {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D}


def make_step(args, state):
    """Returns `step(x, y)`: one update of D and G on x and y (N, C, size, size) in [-1, 1]. It returns the losses."""
    G, D, opt_G, opt_D = state["G"], state["D"], state["opt_G"], state["opt_D"]

    def step(x, y):
        losses, total = {}, 0.0
        opt_D.zero_grad()
        opt_G.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, args.precision == "bf16"):
            fake = G(x)
            if "gan" in args.loss:  # apart, as batch norm must not mix real and fake
                on_real = D(torch.cat([x, y], 1) if "cgan" in args.loss else y)
                on_fake = D(torch.cat([x, fake], 1) if "cgan" in args.loss else fake)
        if "gan" in args.loss:
            # D: max log D(x, y) + log(1 - D(x, G(x))), halved so that D learns slower than G (Sec. 3.3)
            losses["loss_D"] = (gan_loss(on_real, True) + gan_loss(on_fake, False)) / 2
            losses["loss_D"].backward(inputs=list(D.parameters()), retain_graph=True)  # for G, below
            # G: max log D(x, G(x)), which does not saturate, instead of min log(1 - D(x, G(x))) (Sec. 3.3)
            losses["loss_G"] = total = gan_loss(on_fake, True)
        if "l1" in args.loss:  # G: also min lambda |y - G(x)| (Eq. 3, 4)
            losses["loss_l1"] = F.l1_loss(fake.float(), y)
            total = total + args.lambda_l1 * losses["loss_l1"]
        total.backward(inputs=list(G.parameters()))
        opt_D.step()
        opt_G.step()
        return {name: loss.detach() for name, loss in losses.items()}

    return step


def train(args):
    """Train for --epochs, from last.pt if it is there, then translate the test split. Returns the run folder."""
    check_settings(args)
    state = build(args)
    init_distributed(args, state)
    pairs, tests, names = load_pairs(args)
    run = Run(args, state)
    update, loader = capture(make_step(args, state), args), batches(args, pairs, run.images_seen)
    for step, (epoch, x, y) in zip(run.steps(args.epochs * len(pairs), args.batch_size), loader):
        decay = max(0, epoch - args.epochs + args.decay_epochs) / (args.decay_epochs + 1)
        for name in ("opt_G", "opt_D"):
            state[name].param_groups[0]["lr"].fill_(args.lr * (1 - decay))
        set_seed(args, step)  # for dropout
        losses = update(x, y)
        if run.report(epoch, losses):  # it is time to save
            save_tests(args, state["G"], tests[:4], names, step)
            run.save_checkpoint()
    if RANK == 0:
        save_tests(args, state["G"], tests, names, run.step)
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


def load_pairs(args):
    """Pairs for training and for the test, uint8 (N, channels of A and B, H, W), and the names of the test pairs."""
    if args.data == "toy":
        sets = streets(600, 0, args.load_size), streets(100, 1, args.size)
        return *(torch.from_numpy(np.concatenate([maps, photos], 1)) for maps, photos, _ in sets), range(100)
    folder, url = Path(args.data), f"https://efrosgans.eecs.berkeley.edu/pix2pix/datasets/{args.data}.tar.gz"
    if args.data in SETS:  # it is downloaded on first use
        folder = args.data_root / args.data
        with FileLock(f"{folder}.lock"), explain_errors(f"{url} cannot be downloaded: unpack it to {folder} yourself"):
            if not folder.is_dir():
                torch.hub.download_url_to_file(url, f"{folder}.tar.gz")
                shutil.unpack_archive(f"{folder}.tar.gz", f"{folder}.part", filter="data")  # nothing outside of it
                os.rename(f"{folder}.part/{args.data}", folder)
    splits, found = {"train": {}, "val": {}, "test": {}}, find_images(folder)
    sizes = [(split, file.name, file.stat().st_size) for split, _, file in found]
    args.images = hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]  # a run belongs to its images
    for split, subfolder, file in found:
        name, side = (str(Path(subfolder, file.stem)), "") if args.source else (file.stem, subfolder)
        pair = splits[split].setdefault(name, {})  # {"A": file, "B": file}, or {"": a file of both}
        if side in pair:
            fail(f"{file} and {pair[side]} have the same name")
        pair[side] = file
    train, test = splits["train"], splits["test"] or splits["val"]
    for name, pair in [*train.items(), *test.items()]:
        half = "" in pair and not args.source and name[-1] == "A" and f"{name[:-1]}B" in train  # 0_A beside 0_B
        if half or {*pair} not in ({""}, {"A", "B"}):
            fail(f"{min(pair.values())} has no partner; {LAYOUTS}")
    if not train:
        fail(f"{args.data} has no training pairs; {LAYOUTS}")
    shown = test or dict([*train.items()][:16])
    note = "" if test else f"; {len(shown)} of the training pairs are shown as test"
    print(f"{args.data}: {len(train)} training pairs, {len(test)} test pairs, {args.direction}{note}")
    loaded = []
    for pairs, size in ((train, args.load_size), (shown, args.size)):
        files = [[pair[side] for side in sorted(pair)] for pair in pairs.values()]
        loaded.append(cache_images(args, files, read_pair, (sum(CHANNELS[args.source]), size, size)))
    return *loaded, [*shown]


def read_pair(args, shape, files):
    """A and B from two files, from the halves of one, or --from a photo: uint8 of `shape` (C, H, W)."""
    images = [read_image(file, args.white) for file in files]
    a, b = images[0], images[-1]
    w, h = a.size
    if len(files) == 1 and not args.source:
        if w != 2 * h:
            fail(f"{files[0]} has {w}x{h} pixels, not twice as wide as high; {LAYOUTS}, or photos with --from")
        a, b = a.crop((0, 0, h, h)), a.crop((h, 0, w, h))
    if a.size != b.size or min(a.size) < args.size:
        fail(f"{files[0]}: A has {a.size} and B has {b.size} pixels; give equal sizes, at least --size {args.size}")
    a, b = (image.resize(shape[1:], Image.Resampling.BICUBIC) for image in (a, b))
    if args.source == "gray":
        return pil_to_tensor(convert(a, "RGB", "LAB"))
    return torch.cat([pil_to_tensor(a), pil_to_tensor(b)])


def convert(image, start, end):
    """An image from RGB to CIE LAB or back, as three plain bands."""
    image = Image.merge(start, image.split())
    image = ImageCms.profileToProfile(image, PROFILES[start], PROFILES[end], outputMode=end)
    image.info.clear()  # of the profile, which has the time of day in it
    return Image.merge("RGB", image.split())


def to_xy(args, pixels):
    """uint8 (N, C, H, W) to x and y in [-1, 1] on the device; --from hole cuts the middle, half as wide, out of x."""
    pixels = pixels.pin_memory() if "cuda" in args.device and not pixels.is_cuda else pixels  # the CPU need not wait
    a, b = (pixels.to(args.device, non_blocking=True) / 127.5 - 1).tensor_split([CHANNELS[args.source][0]], 1)
    if args.source == "hole":
        top, left = a.shape[2] // 4, a.shape[3] // 4
        a[..., top:-top, left:-left] = 1  # white
    return (b, a) if args.direction == "BtoA" else (a, b)


def batches(args, pairs, images_seen):
    """Yields epoch, x and y (B, C, size, size) in [-1, 1], without end, cropped and mirrored (Sec. 3.3)."""
    # Put a loader of your own here: endless, from pair `images_seen` on, of one shape, on args.device. load_pairs
    # then returns range(number of pairs), test pairs as uint8, and their names.
    orders = functools.lru_cache(2)(lambda epoch: np.random.default_rng([args.seed, epoch]).permutation(len(pairs)))
    for first in itertools.count(images_seen, args.batch_size):
        batch = []
        for k in range(first + RANK, first + args.batch_size, WORLD):
            rng = np.random.default_rng([args.seed, k, 1])
            top, left = rng.integers(0, args.load_size - args.size + 1, 2)
            pair = pairs[orders(k // len(pairs))[k % len(pairs)], :, top : top + args.size, left : left + args.size]
            batch.append(pair.flip(-1) if rng.random() < 0.5 and not args.no_mirror else pair)
        yield first // len(pairs) + 1, *to_xy(args, torch.stack(batch))


def to_images(args, G, x, *y):
    """x and y (1, C, H, W) in [-1, 1] -> Pillow images of x, G(x) and y. For G, x is padded to multiples of --size."""
    h, w = x.shape[2:]
    torch.manual_seed(args.seed)
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, args.precision == "bf16"):
        fake = G(F.pad(x, (0, -w % args.size, 0, -h % args.size), "replicate")).float()[:, :, :h, :w]
    images = [x, fake, *y]
    if args.source == "gray":  # a and b of the input are 0
        images = [torch.cat([x, ab], 1) for ab in (x.new_zeros(1, 2, h, w), fake, *y)]
    images = [to_pil_image((image[0] * 127.5 + 127.5).round().byte().cpu()) for image in images]
    return [convert(image, "LAB", "RGB") for image in images] if args.source == "gray" else images


def translate_image(G, image):
    """G(x) of an RGB Pillow image x of any size, as a Pillow image."""
    image = convert(image, "RGB", "LAB") if G.settings.source == "gray" else image
    x, _ = to_xy(G.settings, pil_to_tensor(image)[None])
    return to_images(G.settings, G, x)[1]


def save_tests(args, G, pairs, names, step):
    """Translate `pairs`, uint8 (N, C, H, W), to OUT/test, and show x, G(x) and y of 16 pairs in OUT/samples."""
    cells = []
    for pair, name in zip(pairs, names):
        images = to_images(args, G, *to_xy(args, pair[None]))
        atomic_write(args.out / "test" / f"{name}.png", images[1].save)
        cells += map(pil_to_tensor, images if len(cells) < 48 else ())
    save_grid(args.out / "samples" / f"{step:07}.png", cells, ["input", "output", "target"] * 2)


def load_generator(run, device="cpu"):
    """G of a run folder, with its options as G.settings; dropout stays on (Sec. 3.3)."""
    checkpoint = load_checkpoint(run)
    with explain_errors(f"{run}/last.pt is damaged"):
        settings = argparse.Namespace(**checkpoint["settings"])
        G = Generator(*CHANNELS[settings.source], settings.size, settings.ngf, not settings.no_skips)
        G.load_state_dict(checkpoint["G"])
    settings.device, settings.direction = str(device), "AtoB"  # x is not swapped
    G.settings = settings
    return G.to(device)


def translate(args):
    """Translate --translate, an image or a folder, of any size, with a trained G. Returns the folder of the results."""
    check_settings(args, use=True)
    G, to, errors = load_generator(args.out, args.device), args.to or args.out / "translated", []
    G.settings.seed, G.settings.precision = args.seed, args.precision
    found = find_images(args.translate) if args.translate.is_dir() else [("", "", args.translate)]
    files = {(to / folder / f"{file.stem}.png").resolve(): file for _, folder, file in found}  # {translation: image}
    if len(files) < len(found) or {*files} & {file.resolve() for file in files.values()}:
        fail(f"translations of {args.translate} would overwrite images: choose another --to, or other names")
    for target, file in files.items():
        try:
            atomic_write(target, translate_image(G, read_image(file, G.settings.white)).save)
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
