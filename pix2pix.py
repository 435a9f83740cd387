# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "filelock>=3"]
# ///
"""pix2pix: a conditional GAN that turns one kind of image into another, learned from pairs.

Isola, Zhu, Zhou, Efros: Image-to-Image Translation with Conditional Adversarial Networks. CVPR 2017, arXiv:1611.07004.
G maps an input x to an output G(x); D looks at x and an output, patch by patch, and tells a real y from G(x):
    G* = arg min_G max_D  E[log D(x, y)] + E[log(1 - D(x, G(x)))] + lambda E|y - G(x)|          (Eq. 4)
As in the authors' Torch code one pass of D over G(x) serves both losses; as in their later code the 1x1 bottleneck has
no norm, which would wipe it out.

    python pix2pix.py                                          # train on toy streets, drawn here, in minutes on a CPU
    python pix2pix.py --data facades                           # download, train; stop it and repeat this: it goes on
    python pix2pix.py --data facades --translate labels.png    # use what was trained, on an image or a folder
"""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageCms, ImageFilter, ImageOps
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

SCRIPT, HOST = "pix2pix", "http://efrosgans.eecs.berkeley.edu/pix2pix/datasets/"
SETS = {  # the named sets, and what each changes
    "toy": dict(size=64, load_size=64, ngf=32, ndf=32, n_layers=2, epochs=12, batch_size=4, save_every=600),
    "facades": dict(direction="BtoA"),
    "maps": dict(),
    "cityscapes": dict(direction="BtoA"),
    "edges2shoes": dict(epochs=15, batch_size=4),
    "edges2handbags": dict(epochs=15, batch_size=4),
    "night2day": dict(direction="BtoA", epochs=17, batch_size=4),
}
MADE = {"gray": (1, 2), "hole": (3, 3), "edges": (1, 3)}  # channels of input and output, --from photos
PROFILES = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
ADVICE = "lower --lr, or use --precision fp32"  # against what is not finite
RANK, WORLD = (int(os.environ.get(name, start)) for name, start in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun
FREE = "settings data_root run max_steps save_every skip_bad fresh device bf16 no_capture translate to eval"


def get_args(argv=None):
    """Settings from `argv` or the command line; what is not given is the paper's, or that of the set."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error, add = refuse, parser.add_argument
    add("--data", default="toy", help=f"{', '.join(SETS)}, or a folder: side-by-side images, or A/ and B/")
    add("--data-root", type=Path, default=Path("data"), help="where downloads go, or lie already")
    add("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="which half is the input; A is the left one")
    add("--from", dest="source", choices=tuple(MADE), help="make the pairs from a folder of photos")
    add("--size", type=int, default=256, help="crop trained on, a power of two")
    add("--load-size", type=int, help="size before the random crop (286 for 256); --size for no jitter")
    add("--no-mirror", action="store_true", help="no random mirroring")
    add("--in-channels", type=int, choices=range(1, 5), default=3, help="1 grey, 3 colour, 2 and 4 with alpha")
    add("--out-channels", type=int, choices=range(1, 5), default=3, help="the same for the output; --from has its own")
    add("--loss", choices=("l1", "gan", "cgan", "l1+gan", "l1+cgan"), default="l1+cgan", help="a row of Table 1")
    add("--lambda-l1", type=float, default=100.0, help="weight of the L1 term (Eq. 4)")
    add("--no-skips", action="store_true", help="encoder-decoder instead of U-Net (Sec. 3.2)")
    add("--norm", choices=("batch", "instance"), default="batch", help="normalisation in G and D")
    add("--ngf", type=int, default=64, help="channels of G's first layer")
    add("--ndf", type=int, default=64, help="channels of D's first layer")
    add("--n-layers", type=int, default=3, help="D's strided layers: 0, 1, 3, 5 see 1, 16, 70, 286 pixels")
    add("--epochs", type=int, default=200, help="passes over the pairs")
    add("--decay-epochs", type=int, default=0, help="over the last so many the rate falls linearly to zero")
    add("--batch-size", type=int, default=1, help="pairs an update")
    add("--lr", type=float, default=2e-4, help="Adam's rate; its beta1 is .5")
    add("--seed", type=int, default=0, help="of weights, order, jitter and dropout")
    add("--run", type=Path, help="run folder (runs/pix2pix-DATA)")
    add("--max-steps", type=int, help="stop after so many updates")
    add("--save-every", type=int, default=5000, help="updates between checkpoints; ten minutes at most")
    add("--skip-bad", action="store_true", help="train without the images that cannot be read")
    add("--fresh", action="store_true", help="start over; the old run is kept as DIR.old-N")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (the accelerator, if there is one)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is much faster")
    add("--no-capture", action="store_true", help="on CUDA: launch kernels one by one, not as a recorded graph")
    add("--translate", type=Path, metavar="PATH", help="translate an image or a folder with what was trained")
    add("--to", type=Path, help="folder for translations (RUN/translated)")
    add("--eval", action="store_true", help="translate without dropout, with running averages, unlike the paper")
    parser.set_defaults(**SETS.get(parser.parse_known_args(argv)[0].data, {}))
    parser.set_defaults(batch_size=math.ceil(parser.get_default("batch_size") / WORLD) * WORLD)  # a share each
    args = parser.parse_args(argv)
    limits = {int: 2**63, float: math.inf}
    for name, value in vars(args).items():
        least = 0 if name in ("lambda_l1", "n_layers", "decay_epochs", "lr", "seed") else 1
        if type(value) in limits and not least <= value < limits[type(value)]:
            refuse(f"--{name.replace('_', '-')} {value}: give a number from {least} up, below {limits[type(value)]}")
    args.load_size = args.load_size or args.size * 286 // 256
    args.in_channels, args.out_channels = MADE.get(args.source, (args.in_channels, args.out_channels))
    args.run = args.run or Path("runs", f"{SCRIPT}-{os.path.basename(os.path.realpath(args.data))}")
    if args.size & (args.size - 1) or not max(16, 3 << args.n_layers) <= args.size <= args.load_size:
        refuse(f"--size {args.size}: give a power of two above 2 * 2**n_layers, 16 to --load-size {args.load_size}")
    if args.source and (args.data in SETS or args.direction == "BtoA"):
        refuse(f"--from {args.source} needs a folder of photos as --data, and no --direction")
    if args.batch_size % WORLD:
        refuse(f"--batch-size {args.batch_size}: give a multiple of {WORLD}, the number of processes")
    if WORLD > 1 and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    args.device = args.device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    with blame(f"--device {args.device} is not to be had on this machine: leave it out to use what there is"):
        args.device = str(torch.zeros(1, device=args.device).device)
    units = [name for name, there in torch.cpu.get_capabilities().items() if there] if args.device == "cpu" else []
    fast = {"avx512_bf16", "amx_bf16"} & {*units} or "cuda" in args.device and torch.cuda.is_bf16_supported(False)
    args.bf16 = args.precision == "bf16" or args.precision == "auto" and bool(fast)
    return args


# -- the method ------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """U-Net (Sec. 3.2): encoder C64-C128-C256-C512-C512-C512-C512-C512 and its mirror, each level joined to its own.

    Every convolution is 4x4 with stride 2, one for each factor of two in `size`; innermost is a 1x1 map.
    x (N, in_channels, H, W) in [-1, 1], H and W multiples of `size` -> (N, out_channels, H, W) in [-1, 1].
    """

    def __init__(self, in_channels=3, out_channels=3, size=256, ngf=64, norm="batch", skips=True):
        super().__init__()
        Norm, bias = (nn.BatchNorm2d, False) if norm == "batch" else (nn.InstanceNorm2d, True)
        self.skips, self.down, self.up = skips, nn.ModuleList(), nn.ModuleList()
        width = [ngf * min(2**i, 8) for i in range(int(math.log2(size)))]
        for i in range(len(width)):
            first, last = i == 0, i == len(width) - 1
            down = [nn.LeakyReLU(0.2), nn.Conv2d(in_channels if first else width[i - 1], width[i], 4, 2, 1, bias=bias)]
            down += [] if first or last else [Norm(width[i])]  # a normalised 1x1 map would hold nothing
            c_in, c_out = width[i] if last or not skips else 2 * width[i], out_channels if first else width[i - 1]
            up = [nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=bias or first)]
            up += [nn.Tanh()] if first else [Norm(c_out)]
            up += [nn.Dropout(0.5)] if i >= len(width) - 3 else []  # the noise z, at test time too (Sec. 3.1)
            self.down.append(nn.Sequential(*down[first:]))
            self.up.insert(0, nn.Sequential(*up))

    def forward(self, x):
        levels = []
        for down in self.down:
            levels.append(x := down(x))  # (N, 64, H/2, W/2), (N, 128, H/4, W/4), ... (N, 512, H/size, W/size)
        x = self.up[0](levels.pop())
        for up in self.up[1:]:
            x = up(torch.cat([x, levels.pop()], 1) if self.skips else x)
        return x


class Discriminator(nn.Module):
    """PatchGAN (Sec. 3.2): C64-C128-C256-C512, a logit for each patch of 70x70 pixels, with three strided layers.

    1, 2, 4 or 5 strided layers see 16, 34, 142 or 286 pixels; 0 is PixelGAN, C64-C128 with 1x1 kernels.
    x (N, in_channels, H, W) in [-1, 1] -> logits (N, 1, h, w): 30x30 for 70x70 patches of 256x256.
    """

    def __init__(self, in_channels=6, ndf=64, n_layers=3, norm="batch"):
        super().__init__()
        Norm, bias = (nn.BatchNorm2d, False) if norm == "batch" else (nn.InstanceNorm2d, True)
        kernel, pad = (4, 1) if n_layers else (1, 0)
        width = [ndf * min(2**i, 8) for i in range(max(n_layers, 1) + 1)]
        layers = [nn.Conv2d(in_channels, ndf, kernel, 2 if n_layers else 1, pad), nn.LeakyReLU(0.2)]  # no norm here
        for i in range(1, len(width)):
            conv = nn.Conv2d(width[i - 1], width[i], kernel, 2 if i < n_layers else 1, pad, bias=bias)
            layers += [conv, Norm(width[i]), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width[-1], 1, kernel, 1, pad, bias=bias or n_layers > 0))

    def forward(self, x):
        return self.layers(x)


def init_weights(net):
    """N(0, .02) for convolutions, N(1, .02) for gains of batch norm, zero for biases (as the authors' code)."""
    for name, weight in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.02)
    return net


def gan_loss(logits, real):
    """-log D if `real`, else -log(1 - D), mean over all patches; D = sigmoid(logits). (N, 1, h, w) -> 0-d."""
    return F.softplus(-logits.float() if real else logits.float()).mean()


def build(args):
    """{name: network or optimiser}: all that is learned, on args.device; a checkpoint holds their states."""
    torch.manual_seed(args.seed)
    seen = args.out_channels + ("cgan" in args.loss) * args.in_channels  # an unconditional D does not see x
    G = init_weights(Generator(args.in_channels, args.out_channels, args.size, args.ngf, args.norm, not args.no_skips))
    D = init_weights(Discriminator(seen, args.ndf, args.n_layers, args.norm))
    state = {"G": G.to(args.device), "D": D.to(args.device)}
    for name in "GD":  # with the rate as a tensor, so that a recorded step follows the schedule
        rate, betas, fit = torch.tensor(args.lr, device=args.device), (0.5, 0.999), "cuda" in args.device
        state[f"opt_{name}"] = torch.optim.Adam(state[name].parameters(), rate, betas, fused=True, capturable=fit)
    return state


def make_step(args, state):
    """Returns `step(x, y)`: one update of D and G on inputs and targets (N, C, size, size) in [-1, 1].

    It gives back its losses as 0-d tensors and reads nothing back from the device, so it can be recorded and replayed.
    """
    G, D, opt_G, opt_D = (state[name] for name in ("G", "D", "opt_G", "opt_D"))

    def step(x, y):
        losses, loss_G = {}, 0.0
        opt_D.zero_grad()
        opt_G.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, args.bf16):
            fake = G(x)
            if "gan" in args.loss:  # one pass each: batch norm needs the statistics of each
                on_real = D(torch.cat([x, y], 1) if "cgan" in args.loss else y)
                on_fake = D(torch.cat([x, fake], 1) if "cgan" in args.loss else fake)
        if "gan" in args.loss:
            # D: max log D(x, y) + log(1 - D(x, G(x))), halved so that D learns slower than G (Sec. 3.3)
            losses["loss_D"] = (gan_loss(on_real, True) + gan_loss(on_fake, False)) / 2
            losses["loss_D"].backward(inputs=list(D.parameters()), retain_graph=True)
            # G: max log D(x, G(x)), which does not saturate, for min log(1 - D(x, G(x))) (Sec. 3.3)
            losses["loss_G"] = loss_G = gan_loss(on_fake, True)
        if "l1" in args.loss:  # G: and min lambda |y - G(x)| (Eq. 3, 4)
            losses["loss_l1"] = F.l1_loss(fake.float(), y)
            loss_G = loss_G + args.lambda_l1 * losses["loss_l1"]
        loss_G.backward(inputs=list(G.parameters()))
        opt_D.step()
        opt_G.step()
        return {name: loss.detach() for name, loss in losses.items()}

    return step


def train(args):
    """Train for --epochs, from RUN/last.pt if it is there, then translate the test split. Returns the run folder."""
    (pairs, read), (tests, read_test), state = load_pairs(args, "train"), load_pairs(args, "test"), build(args)
    with locked(args.run), signals() as stopped:
        begun = resume(args, state, len(pairs))
        goal = max(begun, min(math.ceil(args.epochs * len(pairs) / args.batch_size), args.max_steps or math.inf))
        update, row, saved = capture(make_step(args, state), args), (time.monotonic(), begun), time.monotonic()
        for step, (epoch, x, y) in zip(range(begun + 1, goal + 1), batches(args, len(pairs), read, begun)):
            decay = max(0, epoch - args.epochs + args.decay_epochs) / (args.decay_epochs + 1)
            for optimiser in (state["opt_D"], state["opt_G"]):
                optimiser.param_groups[0]["lr"].fill_(args.lr * (1 - decay))
            torch.manual_seed(hash((args.seed, step)) + RANK)  # dropout; so that an update is the same after a stop
            losses = update(x, y)
            ending = agreed(stopped)
            saving = ending or step == goal or step % args.save_every == 0 or time.monotonic() - saved > 600
            row = report(args, step, goal, epoch, losses, row, saving or step == begun + 1)
            if saving and not RANK:
                paint(args, state["G"], tests[:4], read_test, args.run / "samples" / f"{step:07}.png")
                saved = save(args, state, step)
            if ending:
                break
    with locked(args.run, 60):
        if not (grid := args.run / "samples" / f"{goal:07}-test.png").exists():
            paint(args, state["G"], tests, read_test, grid, args.run / "test")
    print(f"{args.run} is finished, {goal} updates: {grid} shows the test split; --fresh starts over")
    return args.run


# -- the house -------------------------------------------------------------------------------------------------------


def refuse(sentence):
    """Bad input ends in one sentence and exit status 2, by way of `main`."""
    raise SystemExit(f"{SCRIPT}.py: {sentence}")


@contextlib.contextmanager
def blame(what):
    """Refuse `what` if anything goes wrong with it: what others wrote or sent fails in many ways."""
    try:
        yield
    except Exception as error:
        error = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides a full disk
        refuse(f"{what} ({str(error).partition(chr(10))[0].partition('. ')[0] or type(error).__name__:.500})")


@contextlib.contextmanager
def replacing(path):
    """A file to write to, which becomes `path` when it is whole and on the disk, and otherwise leaves nothing."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with blame(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path, wait=0):
    """Only one process at a time is in here for a `path`: others wait so many seconds, then are refused.

    However a process ends, it leaves. Where nothing can be written, all are let in.
    """
    whole = Path(os.path.realpath(path))
    lock = FileLock(whole.with_name(f".{whole.name.lstrip('.')}.lock"), timeout=wait)
    with contextlib.ExitStack() as held:
        if wait or not RANK:  # a run folder is the first process's
            try:
                whole.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock)
            except Timeout:
                refuse(f"{path} is in use by another process: wait for its end, or stop it")
            except OSError:
                pass
        yield


@contextlib.contextmanager
def signals():
    """A list onto which SIGINT and SIGTERM are put, so that the loop can save; then they end the script.

    Of several processes all but the first end here in any case.
    """
    caught, kinds = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, frame: caught.append(number)) for kind in kinds]
    try:
        yield caught
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)
    if WORLD > 1:
        dist.destroy_process_group()
    if caught or RANK:
        sys.exit(128 + caught[0] if caught else 0)


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


def load_pairs(args, split):
    """Pairs of "train" at --load-size or "test" at --size: names, and read(i) -> uint8 (in + out channels, S, S)."""
    size = args.load_size if split == "train" else args.size
    if args.data == "toy":
        if (args.in_channels, args.out_channels) != (3, 3):
            refuse("toy streets have three channels in and out: leave --in-channels and --out-channels out")
        scenes = streets(600 if split == "train" else 100, split != "train", size)[:2]
        pairs = torch.from_numpy(np.concatenate(scenes if args.direction == "AtoB" else scenes[::-1], 1))
        return [f"{i:03}" for i in range(len(pairs))], pairs.to(args.device).__getitem__
    folder = find_data(args)
    found = find_pairs(args, folder, split) or dict([*find_pairs(args, folder, "train").items()][:16])  # no test split
    files, shape = [*found.values()], (args.in_channels + args.out_channels, size, size)
    kind = f"{split}-{args.size}-{args.direction}-{args.source}-{args.in_channels}-{args.out_channels}"
    good, read = decoded(args, folder, files, shape, kind, lambda files: read_pair(args, files, size))
    return [[*found][i] for i in good], read


def tried(args, read, item):
    """read(item); with --skip-bad None, if it is refused, which is then said."""
    try:
        return read(item)
    except SystemExit as refusal:
        if not args.skip_bad:
            raise
        print(f"left out: {refusal}", flush=True)


def decoded(args, folder, items, shape, kind, read):
    """Returns the items' numbers, and i -> read(items[i]), uint8 of `shape`; an item is a tuple, mostly of files.

    All is read once, and kept in a hidden file in `folder`, or beside the runs if that is read-only, so that memory
    stays flat; a GPU takes all if they fit in a quarter of what is free. --skip-bad leaves out what cannot be read.
    """
    stats = [(str(file), file.stat()) for item in items for file in item if isinstance(file, Path) and file.exists()]
    facts = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]
    home, stem = folder if os.access(folder, os.W_OK) else args.run.parent / "cache", f".{SCRIPT}-{kind}-{shape[-1]}"
    cache, one = home / f"{stem}-{hashlib.sha1(repr(facts).encode()).hexdigest()}", math.prod(shape)

    def kept():  # the numbers are at the end of the file
        count, rest = divmod(cache.stat().st_size if cache.exists() else 1, one + 8)
        found = [] if rest else np.fromfile(cache, np.int64, offset=count * one).tolist()
        whole = found == sorted({*found} & {*range(len(items))}) and (args.skip_bad or count == len(items))
        return found if whole else []

    with locked(cache.with_name(stem), 3600):
        if not kept():
            print(f"decoding {len(items)} images of {folder}, once", flush=True)
            for stale in [file for file in home.glob("*") if file.name.startswith(f"{stem}-")]:
                with contextlib.suppress(OSError):  # another process may have it open
                    stale.unlink()
            with replacing(cache) as file, ThreadPoolExecutor(4) as pool:  # a few at a time, so that memory stays flat
                good = []
                for i in range(0, len(items), 64):
                    found = pool.map(functools.partial(tried, args, read), items[i : i + 64])
                    for k, pixels in enumerate(found, i):
                        if pixels is not None:
                            file.write(pixels.contiguous().numpy())
                            good.append(k)
                if not good:
                    refuse(f"{folder} holds no readable image")
                file.write(np.array(good, np.int64))
        good, file = kept(), open(cache, "rb")  # for as long as the run, whoever replaces it meanwhile
    if "cuda" in args.device and one * len(good) < torch.cuda.mem_get_info(args.device)[0] // 4:
        pixels = torch.from_file(str(cache), size=one * len(good), dtype=torch.uint8)
        return good, pixels.view(-1, *shape).to(args.device).__getitem__

    def read_again(i):
        file.seek(i * one)
        return torch.frombuffer(bytearray(file.read(one)), dtype=torch.uint8).view(shape)

    return good, read_again


def find_data(args):
    """The folder that --data means; a named set lies below --data-root, or is downloaded to there."""
    folder = args.data_root / args.data if args.data in SETS else Path(args.data)
    url, archive = f"{HOST}{args.data}.tar.gz", args.data_root / f"{args.data}.tar.gz"
    if folder.is_dir():
        return folder
    if args.data not in SETS:
        refuse(f"--data {args.data} is no folder and none of {', '.join(SETS)}")
    if args.data == "cityscapes":
        have = f"photos (leftImg8bit) into {folder}/trainA and testA, colour labels (gtFine) into trainB and testB"
        refuse(f"cityscapes is withheld by its owners: register at cityscapes-dataset.com, and put {have}, named alike")
    args.data_root.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(60)  # seconds of silence
    with locked(folder, 3600), blame(f"{url} cannot be had: fetch it by hand as {archive}, or unpack it to {folder}"):
        if folder.is_dir():  # another process has fetched it meanwhile
            return folder
        for stale in args.data_root.glob(f".{SCRIPT}-{args.data}-*"):  # of one that was killed
            shutil.rmtree(stale)
        for last in (True,) if archive.exists() else (False, False, True):
            retried = contextlib.suppress(*() if last else (OSError, EOFError))
            with retried, tempfile.TemporaryDirectory("", f".{SCRIPT}-{args.data}-", args.data_root) as part:
                packed = archive if archive.exists() else Path(part, archive.name)
                if not packed.exists():
                    torch.hub.download_url_to_file(url, str(packed))
                with tarfile.open(packed) as tar:
                    inside = bounded(tar, 2**30 + 20 * packed.stat().st_size)
                    tar.extractall(part, inside, filter="data")  # nothing outside of `part`, no device or link out
                    tar.fileobj.read()  # up to the checksum at the end of a gzip
                os.rename(os.path.join(part, args.data, ""), folder)  # no mere file, by the last slash
                return folder


def bounded(tar, most):
    """The files and folders in a tar, up to `most` bytes in all: it may unpack to a million times its size."""
    for member in tar:
        if (most := most - 512 - member.size) < 0:
            raise ValueError("it unpacks to more than a gigabyte and 20 times its size")
        if not (member.isfile() or member.isdir()):
            raise ValueError(f"it holds a link or a device, {member.name}")
        yield member


def find_pairs(args, folder, split):
    """{name: (file,)} of side-by-side images or of photos, or {name: (A, B)}; {} if there is no test split."""
    for part in ("train", ".") if split == "train" else ("test", "val"):
        for a, b in ((f"{part}A", f"{part}B"), (f"{part}/A", f"{part}/B"), (f"A/{part}", f"B/{part}")):
            if not args.source and ((folder / a).is_dir() or (folder / b).is_dir()):
                a, b = find_images(folder / a), find_images(folder / b)
                if alone := [str(a.get(name) or b[name]) for name in sorted(a.keys() ^ b.keys())]:
                    refuse(f"{len(alone)} images have no partner: {', '.join(alone[:9])}{', ...' * (len(alone) > 9)}")
                return {name: (a[name], b[name]) for name in a}
        if (folder / part).is_dir():
            found = find_images(folder / part)
            return {name: (found[name],) for name in found if not name.startswith(("test/", "val/"))}
    return {}


def find_images(path):
    """{name: file} of all images below a folder, or of a file; a name keeps its suffix where it would be another's."""
    suffixes, found = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"), {}
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.relative_to(path if path.is_dir() else path.parent).as_posix()
        stem = name.removesuffix(file.suffix)
        if file.suffix.lower() in suffixes and "/." not in f"/{name}":  # nothing hidden
            found[name if stem in found else stem] = file
    return found or refuse(f"{path} holds no images ({', '.join(suffixes)})")


def read_image(path):
    """An image of any usual kind as a Pillow image: upright, with 8 bits, grey, RGB or RGBA."""
    if not path.is_file():  # a pipe would be waited for without end
        refuse(f"{path} is no file, or a link to none")
    with blame(f"{path} cannot be read as an image"), Image.open(path) as file:
        if file.mode == "F":
            raise ValueError("it has floating-point pixels: save it with 8 or 16 bits")
        image = ImageOps.exif_transpose(file)
        if image.mode[0] == "I":  # 16 bits
            image = Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) // 257))
        return image.convert("RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB")


def flatten(image, channels):
    """A Pillow image in 1 to 4 channels; what is transparent shows white if there is no channel for it."""
    if image.mode == "RGBA" and channels % 2:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(("L", "LA", "RGB", "RGBA")[channels - 1])


def read_pair(args, files, size):
    """A pair as uint8 (in + out channels, size, size): from two files, from the halves of one, or --from a photo."""
    turn = -1 if args.direction == "BtoA" else 1
    images = [read_image(file) for file in files]
    if len(files) == 1 and not args.source:
        (w, h), half = images[0].size, images[0].width // 2
        images = [images[0].crop(box) for box in ((0, 0, half, h), (half, 0, w, h))]
    sizes = [f"{image.width}x{image.height}" for image in images]
    if sizes[0] != sizes[-1] or min(images[0].size) < args.size:
        refuse(f"{files[0]} has {' and '.join(sizes)} pixels: A and B must be equal, and --size {args.size} at least")
    channels = [3] if args.source else (args.in_channels, args.out_channels)[::turn]  # of A and B
    images = [flatten(*pair).resize((size, size), Image.Resampling.BICUBIC) for pair in zip(images, channels)][::turn]
    return torch.cat([pil_to_tensor(image) for image in (from_photo(args, *images) if args.source else images)])


def from_photo(args, photo):
    """Input and output made of a photo: L and ab of CIE Lab, edges and the photo, or the photo twice."""
    if args.source == "gray":
        light, a, b = ImageCms.profileToProfile(photo, *PROFILES, outputMode="LAB").split()
        return light, Image.merge("LA", (a, b))
    if args.source == "edges":  # where the blurred photo is steep; the paper's HED edges need a network of their own
        slopes = np.gradient(np.float32(photo.convert("L").filter(ImageFilter.GaussianBlur(1))))
        return Image.fromarray(np.uint8(255 * (np.hypot(*slopes) < 12))), photo
    return photo, photo


def to_xy(args, pixels):
    """uint8 (N, C, H, W) to x and y in [-1, 1] on the device; inpainting cuts the middle, half as wide, out of x."""
    x, y = (pixels.to(args.device) / 127.5 - 1).tensor_split([args.in_channels], 1)
    if args.source == "hole":
        high, wide = x.shape[2] // 4, x.shape[3] // 4
        x[..., high:-high, wide:-wide] = 1
    return x, y


def batches(args, count, read, step):
    """Yields epoch, x and y (B, C, size, size) in [-1, 1] for each update after `step`, all drawn from the seed alone.

    Jitter is a random crop out of --load-size; x and y share crop and mirror. A batch may reach into the next epoch.
    """
    orders = functools.lru_cache(2)(lambda epoch: np.random.default_rng([args.seed, epoch]).permutation(count).tolist())
    for first in itertools.count(step * args.batch_size, args.batch_size):
        batch = []
        for k in range(first + RANK, first + args.batch_size, WORLD):
            rng = np.random.default_rng([args.seed, k, 1])
            top, left = rng.integers(0, args.load_size - args.size + 1, 2)
            pair = read(orders(k // count)[k % count])[:, top : top + args.size, left : left + args.size]
            batch.append(pair.flip(-1) if rng.random() < 0.5 and not args.no_mirror else pair)
        yield first // count + 1, *to_xy(args, torch.stack(batch))


def paint(args, G, names, read, grid, folder=None):
    """Put read(i), uint8 (C, H, W), of each name through G, into `folder` if given; a `grid` shows 16 with x and y.

    As in training G has dropout and batch statistics (Sec. 3.3), unless --eval, and starts from --seed each time. x is
    padded by reflection to multiples of --size, and G(x) cropped back.
    """
    G, cells = deepcopy(G).train(not args.eval), []  # a copy, as batch norm keeps averages of what it sees
    for i, name in enumerate(names):
        x, y = to_xy(args, read(i)[None])
        h, w = x.shape[2:]
        padded = np.pad(x.cpu(), ((0, 0), (0, 0), (0, -h % args.size), (0, -w % args.size)), "reflect")
        torch.manual_seed(args.seed)
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, args.bf16):
            fake = G(torch.from_numpy(padded).to(args.device)).float()[:, :, :h, :w]
        images = [picture(args, image[0], x[0]) for image in (x, fake, y) if image.shape[1]]
        if folder:
            with replacing(folder / f"{name}.png") as file:
                images[1].save(file, "PNG")
        if i < 16:
            fitted = [ImageOps.pad(image.convert("RGB"), (args.size, args.size), color="white") for image in images]
            cells += [pil_to_tensor(image) for image in fitted]
    with replacing(grid) as file:
        to_pil_image(make_grid(cells, 2 * len(images), pad_value=255)).save(file, "PNG")


def picture(args, image, x):
    """(C, H, W) in [-1, 1] as a Pillow image; in colorization ab is joined to the L of the input x."""
    colorized = args.source == "gray" and len(image) == 2
    pixels = (torch.cat([x, image] if colorized else [image]) * 127.5 + 127.5).round().byte().cpu()
    if colorized:
        bands = [to_pil_image(band) for band in pixels]
        return ImageCms.profileToProfile(Image.merge("LAB", bands), *PROFILES[::-1], outputMode="RGB")
    return to_pil_image(pixels)


def translate(args):
    """Translate --translate, an image or a folder, of any size, by RUN/last.pt. Returns the folder of the results."""
    path, to = args.run / "last.pt", swept(args.to or args.run / "translated")
    names, files = zip(*find_images(args.translate).items())
    if {*map(os.path.realpath, files)} & {os.path.realpath(to / f"{name}.png") for name in names}:
        refuse(f"--to {to} would overwrite what is to be translated: choose another folder")
    checkpoint = read_checkpoint(path, args.device)
    with blame(f"{path} is damaged"), Budget(path.stat().st_size + 2**20), warnings.catch_warnings(action="ignore"):
        args = argparse.Namespace(**vars(args) | checkpoint["settings"])
        if args.n_layers > 99:  # the list of their widths alone would take for ever
            raise ValueError(f"it has n_layers {args.n_layers}")
        G = build(args)["G"]
        G.load_state_dict(checkpoint["G"])

    def read(i):  # colorization takes the L of a photo; after --from edges the image is the drawing
        image = flatten(read_image(files[i]), 3 if args.source == "gray" else args.in_channels)
        return pil_to_tensor(from_photo(args, image)[0] if args.source == "gray" else image)

    paint(args, G, names, read, to.with_name(f"{to.name}-comparison.png"), to)
    print(f"translated {len(files)} images to {to}, with {to.name}-comparison.png beside it")
    return to


def swept(to):
    """The folder `to`, without what a kill left half-written there or beside it."""
    to = to if to.name else to.resolve()
    for folder, parts in ((to, "**/*"), (to.parent, f"{to.name}-*"), (to.with_name(f"{to.name}-figures"), "*")):
        for part in folder.glob(f"{parts}.png.*.part"):
            part.unlink(missing_ok=True)
    return to


def save(args, state, step):
    """Write RUN/last.pt, to go on from or to use, unless a weight is not finite. Returns the time."""
    if not all(weight.isfinite().all() for part in state.values() for weight in getattr(part, "parameters", list)()):
        refuse(f"update {step} made weights that are not finite; {args.run}/last.pt stays as it was: {ADVICE}")
    checkpoint = {"script": SCRIPT, "version": 1, "step": step, "settings": args.settings}
    with replacing(args.run / "last.pt") as file:
        torch.save(checkpoint | {name: part.state_dict() for name, part in state.items()}, file)
    return time.monotonic()


def read_checkpoint(path, device, sent=None):
    """The dict that `save` wrote, to `path` or in the bytes `sent`; no code that it may hold is run."""
    with (
        blame(f"{path} cannot be used as a checkpoint of {SCRIPT}.py"),
        warnings.catch_warnings(action="ignore"),
        io.BytesIO(sent) if sent else open(path, "rb") as file,
    ):
        with zipfile.ZipFile(file) as parts:  # torch checks no checksum, and unpacks whatever it is given
            if any(part.compress_type for part in parts.infolist()) or parts.testzip():
                raise ValueError("it was changed after it was written")
        file.seek(0)
        checkpoint = torch.load(file, map_location=device, weights_only=True)
        if (checkpoint["script"], checkpoint["version"]) != (SCRIPT, 1):
            raise ValueError(f"it is one of {checkpoint['script']}.py, version {checkpoint['version']}")
        return checkpoint


class Budget(TorchDispatchMode):
    """Refuses to make new tensors of more than so many bytes: settings from elsewhere may ask for any."""

    def __init__(self, size):
        super().__init__()
        self.left = size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        if isinstance(made, torch.Tensor) and not any(isinstance(arg, torch.Tensor) for arg in args):
            self.left -= made.nbytes
            if self.left < 0:
                raise ValueError("its settings are of larger networks than it holds")
        return made


def resume(args, state, count):
    """Make RUN, or go on with it: load RUN/last.pt if it is there. Returns the step it was saved at, or 0."""
    now = {name: value for name, value in vars(args).items() if name not in FREE.split()}  # others may not change
    now = args.settings = now | {"data": Path(args.data).resolve().name, "count": count}
    olds = (args.run.with_name(f"{args.run.name}.old-{n}") for n in itertools.count(1))
    if args.fresh and args.run.exists() and not RANK:
        with blame(f"{args.run} cannot be moved aside for --fresh"):
            args.run.rename(next(old for old in olds if not old.exists()))
    path, log, step = args.run / "last.pt", args.run / "log.jsonl", 0
    sent = joined(state, path)
    if sent or WORLD == 1 and path.exists():
        then = read_checkpoint(path, args.device, sent)
        with blame(f"{path} is damaged: --fresh starts over and keeps it"), warnings.catch_warnings(action="ignore"):
            old, step = then["settings"], int(then["step"])
            names = [name for name in now | old if (now.get(name) or 0) != (old.get(name) or 0)]  # a new one was off
            if differ := [f"{name} {old.get(name, 0)!s:.99}" for name in names]:
                refuse(f"{args.run} was begun with {', '.join(differ)}: repeat that, or start over with --fresh")
            for name, part in state.items():
                fresh = len(getattr(part, "state", {}))
                if isinstance(part, torch.optim.Optimizer):  # with the settings of now, for the device of now
                    then[name]["param_groups"] = part.state_dict()["param_groups"]
                part.load_state_dict(then[name])
                forms = [  # what an optimiser keeps of a weight; of each the same
                    {(key, x.dtype, x.layout, x.shape != weight.shape and x.shape) for key, x in kept.items()}
                    for weight, kept in getattr(part, "state", {}).items()
                ]
                if len(forms) < fresh or any(form != forms[0] for form in forms):
                    raise ValueError(f"{name} is of another form")
    if RANK:
        return step
    for part in args.run.rglob("*.part"):  # of a file that a kill cut off
        part.unlink()
    with replacing(args.run / "config.json") as file:
        file.write(json.dumps(now | {"torch": torch.__version__}, indent=2).encode())
    with blame(f"{log} is damaged: delete it"), replacing(log) as file:  # what came after last.pt will come again
        rows = log.read_text().splitlines(keepends=True) if log.exists() else []
        file.writelines(row.encode() for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step)
    return step


def joined(state, path):
    """One of the processes of torchrun becomes one of many. Returns what the first has at `path`, or None.

    From now on optimisers take the mean of the gradients over all processes.
    """
    if WORLD == 1:
        return None
    with blame("the other processes cannot be reached: start all of them with torchrun"):
        dist.init_process_group()
    for part in state.values():
        if isinstance(part, torch.optim.Optimizer):
            part.register_step_pre_hook(average)
    sent = [path.read_bytes() if path.exists() and not RANK else None]
    dist.broadcast_object_list(sent)
    return sent[0]


def average(optimiser, *_):
    """Make the gradients that an optimiser is about to take those of the whole batch, in one message."""
    grads = [weight.grad for group in optimiser.param_groups for weight in group["params"] if weight.grad is not None]
    if grads:
        flat = nn.utils.parameters_to_vector(grads)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / WORLD, grads)


def agreed(stopped):
    """Whether any of the processes was sent a signal, so that all stop at the same update; `stopped` has it then."""
    if WORLD > 1:
        dist.all_reduce(last := torch.tensor(stopped[-1] if stopped else 0), dist.ReduceOp.MAX)
        stopped += [last.item()] * (last.item() > 0)
    return bool(stopped)


def capture(step, args):
    """On CUDA `step` as one recorded graph, without a launch a kernel: three calls warm it up, the fourth records it.

    Later ones replay it with new inputs of the same shapes; what they return is overwritten by the next call.
    """
    if "cuda" not in args.device or args.no_capture:
        return step
    graph, stream, still, losses = torch.cuda.CUDAGraph(), torch.cuda.Stream(args.device), [], {}
    calls, current = itertools.count(1), torch.cuda.current_stream(args.device)

    def replay(*batch):
        if (call := next(calls)) < 4:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                found = step(*batch)
            current.wait_stream(stream)
            return found
        if call == 4:
            still.extend(part.clone() for part in batch)
            with blame("an update cannot be recorded as a CUDA graph here: use --no-capture"):
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    losses.update(step(*still))
        for kept, new in zip(still, batch):
            kept.copy_(new)
        graph.replay()
        return losses

    return replay


def report(args, step, goal, epoch, losses, last, must):
    """Print and log the losses now and then, or if it `must`. Takes and returns time and step of the `last` row."""
    now, terminal = time.monotonic(), sys.stdout.isatty()
    due = must or now - last[0] > (1 if terminal else 10)
    if due or args.device == "cpu":  # elsewhere reading a loss makes the host wait for the device
        losses = {name: loss.item() for name, loss in losses.items()}
        if not all(map(math.isfinite, losses.values())):
            refuse(f"update {step} has a loss that is not finite, {losses}; last.pt stays as it was: {ADVICE}")
    if not due or RANK:
        return last
    rate = (step - last[1]) * args.batch_size / (now - last[0])
    with blame(f"{args.run}/log.jsonl cannot be written"), open(args.run / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": step, "epoch": epoch, **losses, "images_per_s": rate}) + "\n")
    left = timedelta(seconds=(goal - step) * args.batch_size // rate)
    text = f"{step}/{goal} {rate:.3g} images/s {left} left " + " ".join(f"{n} {x:.3g}" for n, x in losses.items())
    print(f"\r{text:<79.79}" if terminal else text, end="\n" if step == goal or not terminal else "", flush=True)
    return now, step


def first_to_say():
    """Whether no other process of torchrun has said a sentence: one is enough."""
    with contextlib.suppress(Exception):
        return WORLD == 1 or next(dist.rendezvous("env://", timeout=timedelta(seconds=9)))[0].add("said", 1) == 1
    return True


def main(argv=None):
    """Train or translate; bad input, and what the machine refuses, end in one sentence and exit status 2."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda number, frame: sys.exit(128 + number))
    warnings.filterwarnings("ignore", module="PIL")  # a refusal says it in one sentence
    logging.getLogger("PIL").setLevel(100)
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # files may have names that it cannot show
    try:
        args = get_args(argv)
        if RANK and args.translate:  # one process is enough
            return None
        return (translate if args.translate else train)(args)
    except (SystemExit, OSError, MemoryError, RuntimeError) as error:
        status, said = getattr(error, "code", None), str(error).replace("\n", " ")
        full = status is None and (isinstance(error, MemoryError) or "allocate" in said or "out of memory" in said)
        lost = WORLD > 1 and isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
        if isinstance(status, int) or isinstance(error, RuntimeError) and not full and not lost:
            raise
        said = "out of memory: lower --batch-size or --size" if full else said
        said = "another process has ended: repeat the command, it goes on from last.pt" if lost else said
        if first_to_say():
            print(f"{SCRIPT}.py: {said.removeprefix(f'{SCRIPT}.py: ')}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
    for number in (signal.SIGINT, signal.SIGTERM):  # while Python ends, an exception would be printed and lost
        signal.signal(number, signal.SIG_DFL)
