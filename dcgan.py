# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "filelock>=3"]
# ///
"""DCGAN: a convolutional generator and discriminator, and the rules that make them train.

Radford, Metz, Chintala: Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks.
ICLR 2016, arXiv:1511.06434. The rules (Sec. 3): strided convolutions instead of pooling; batch norm, but not in G's
output and D's input; no hidden fully connected layers; ReLU and tanh in G; LeakyReLU in D. The loss is that of GAN;
what came later changes a line or two: LSGAN (1611.04076), WGAN (1701.07875), WGAN-GP (1704.00028).
As in the authors' Torch code G's loss takes D's output from before D moves, so that one pass over G(z) serves both.

    python dcgan.py                                        # train on toy digits, drawn here, in minutes on a CPU
    python dcgan.py --data my/photos --size 64             # your own images; stop it and repeat this: it goes on
    python dcgan.py --data my/photos --sample 100          # draw from what was trained, with a numbered sheet
    python dcgan.py --data my/photos --arithmetic "3,7,12 - 5,8,9 + 1,2,4"    # with the numbers on that sheet
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
import re
import signal
import socket
import sys
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
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

SCRIPT = "dcgan"
SETS = {  # the named sets, and what each changes; size 64 and three channels otherwise
    "toy": dict(size=28, channels=1, ngf=24, ndf=24, epochs=30, batch_size=64, save_every=600),
    "mnist": dict(size=28, channels=1),
    "fashion-mnist": dict(size=28, channels=1),
    "cifar10": dict(size=32),
    "svhn": dict(size=32),
    "celeba": dict(),
    "lsun": dict(epochs=5),
}
LOSSES = {"ns": 2e-4, "minimax": 2e-4, "lsgan": 2e-4, "wgan": 5e-5, "wgan-gp": 1e-4}  # and their rates
ADVICE = "lower --lr, or use --precision fp32"  # against what is not finite
RANK, WORLD = (int(os.environ.get(name, start)) for name, start in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun
FREE = "settings data_root run max_steps save_every skip_bad fresh device bf16 no_capture sample to arithmetic turn"


def get_args(argv=None):
    """Settings from `argv` or the command line; what is not given is the paper's, or that of the set."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error, add = refuse, parser.add_argument
    add("--data", default="toy", help=f"{', '.join(SETS)}, or a folder of images")
    add("--data-root", type=Path, default=Path("data"), help="where downloads go, or lie already")
    add("--size", type=int, choices=(28, 32, 64, 128), default=64, help="pixels a side")
    add("--channels", type=int, choices=(1, 3), default=3, help="1 grey, 3 colour")
    add("--kernel", type=int, choices=(4, 5), default=5, help="5 as in the paper, 4 as in the Torch code")
    add("--nz", type=int, default=100, help="numbers in z")
    add("--ngf", type=int, default=128, help="channels of G's last hidden layer (Torch code: 64)")
    add("--ndf", type=int, default=128, help="channels of D's first layer (Torch code: 64)")
    add("--loss", choices=tuple(LOSSES), default="ns", help="ns: the paper's, non-saturating")
    add("--k", type=int, help="updates of D for one of G (1; wgan, wgan-gp 5)")
    add("--epochs", type=int, default=25, help="passes over the images")
    add("--batch-size", type=int, default=128, help="images an update")
    add("--lr", type=float, help="the rate (Adam 2e-4; wgan, with RMSprop, 5e-5; wgan-gp 1e-4)")
    add("--seed", type=int, default=0, help="of weights, order and noise; of z for figures")
    add("--run", type=Path, help="run folder (runs/dcgan-DATA)")
    add("--max-steps", type=int, help="stop after so many updates")
    add("--save-every", type=int, default=2000, help="updates between checkpoints; ten minutes at most")
    add("--skip-bad", action="store_true", help="train without the images that cannot be read")
    add("--fresh", action="store_true", help="start over; the old run is kept as DIR.old-N")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (the accelerator, if there is one)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is much faster")
    add("--no-capture", action="store_true", help="on CUDA: launch kernels one by one, not as a recorded graph")
    add("--sample", type=int, metavar="N", help="draw N images with what was trained, a numbered sheet and a walk")
    add("--arithmetic", metavar="SUM", help="means of samples by number, '3,7,12 - 5,8,9 + 1,2,4' (Fig. 7)")
    add("--turn", metavar="SUM", help="the way from one mean to another, '1,2,3,4 - 5,6,7,8' (Fig. 8)")
    add("--to", type=Path, help="folder for the images (RUN/sampled); figures lie beside it")
    parser.set_defaults(**SETS.get(parser.parse_known_args(argv)[0].data, {}))
    parser.set_defaults(batch_size=math.ceil(parser.get_default("batch_size") / WORLD) * WORLD)  # a share each
    args = parser.parse_args(argv)
    rest = {"lr": LOSSES[args.loss], "k": 5 if "wgan" in args.loss else 1}
    vars(args).update({name: value for name, value in rest.items() if getattr(args, name) is None})
    for name in ("arithmetic", "turn"):
        if (given := getattr(args, name)) and not re.fullmatch(r"[\d, ]*\d *([-+][\d, ]*\d *)*", given):
            refuse(f"--{name} {given}: give sums of sample numbers, like '3,7,12 - 5,8,9 + 1,2,4'")
    return settle(args, zeros=("lr", "seed"))


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
        width, layers = [channels, *(ndf * 2**i for i in range(int(math.log2(size // start))))], []
        for c_in, c_out in zip(width, width[1:]):
            layers.append(nn.Conv2d(c_in, c_out, kernel, 2, (kernel - 1) // 2, bias=False))
            layers += [nn.BatchNorm2d(c_out)] if norm and layers[1:] else []  # none at the input
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(width[-1], 1, start, bias=False))

    def forward(self, x):
        return self.layers(x).flatten()


def init_weights(net):
    """N(0, .02) for convolutions (Sec. 4), N(1, .02) for gains of batch norm and zero for its biases (the code)."""
    for name, weight in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.02)
    return net


def loss_of_D(kind, real, fake):
    """What D descends, from its outputs (N,) for images of the data and of G. -> 0-d."""
    if kind in ("ns", "minimax"):  # -log D(x) - log(1 - D(G(z)))
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if kind == "lsgan":
        return ((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2
    return fake.mean() - real.mean()  # wgan: the critic's estimate of the earth mover's distance, negative


def loss_of_G(kind, fake):
    """What G descends, from D's outputs (N,) for images of G. -> 0-d."""
    if kind == "ns":  # -log D(G(z))
        return F.softplus(-fake).mean()
    if kind == "minimax":  # log(1 - D(G(z)))
        return -F.softplus(fake).mean()
    return ((fake - 1) ** 2).mean() / 2 if kind == "lsgan" else -fake.mean()


def penalty(D, real, fake):
    """WGAN-GP's term: the slope of D should be 1 between images of the data and of G (its Eq. 3). -> 0-d."""
    places = torch.rand(WORLD * len(real), 1, 1, 1, device=real.device)[RANK::WORLD]
    between = torch.lerp(real, fake, places).requires_grad_()
    (slope,) = torch.autograd.grad(D(between).sum(), between, create_graph=True)
    return ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()


def build(args):
    """{name: network or optimiser}: all that is learned, on args.device; a checkpoint holds their states."""
    torch.manual_seed(args.seed)
    G = init_weights(Generator(args.size, args.channels, args.kernel, args.nz, args.ngf))
    D = init_weights(Discriminator(args.size, args.channels, args.kernel, args.ndf, args.loss != "wgan-gp"))
    state = {"G": G.to(args.device), "D": D.to(args.device)}
    for name in "GD":  # with the rate as a tensor, so that a recorded step follows what is written into it
        weights, rate, fit = state[name].parameters(), torch.tensor(args.lr, device=args.device), "cuda" in args.device
        betas = (0.5, 0.9 if args.loss == "wgan-gp" else 0.999)  # beta1 .9 was unstable (Sec. 4)
        adam = functools.partial(torch.optim.Adam, betas=betas, fused=True)
        state[f"opt_{name}"] = (torch.optim.RMSprop if args.loss == "wgan" else adam)(weights, rate, capturable=fit)
    return state


def make_step(args, state):
    """Returns `step(x)`: k updates of D and one of G, on images x (k * N, C, size, size) in [-1, 1].

    It gives back its losses as 0-d tensors and reads nothing back from the device, so it can be recorded and replayed.
    """
    G, D, opt_G, opt_D = (state[name] for name in ("G", "D", "opt_G", "opt_D"))

    def step(x):
        for i, real in enumerate(x.chunk(args.k), 1):
            z = 2 * torch.rand(WORLD * len(real), args.nz, device=x.device)[RANK::WORLD] - 1  # uniform (Fig. 1)
            with torch.autocast(x.device.type, torch.bfloat16, args.bf16):
                fake = G(z)
                on_real, on_fake = D(real).float(), D(fake).float()  # one by one, as batch norm needs it
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
    """Train for --epochs, from RUN/last.pt if it is there, then paint a walk. Returns the run folder."""
    (count, read), state = load_images(args), build(args)
    with locked(args.run), signals() as stopped:
        begun = resume(args, state, count)
        goal = max(begun, min(math.ceil(args.epochs * count / args.batch_size / args.k), args.max_steps or math.inf))
        update, row, saved = capture(make_step(args, state), args), (time.monotonic(), begun), time.monotonic()
        for step, (epoch, x) in zip(range(begun + 1, goal + 1), batches(args, count, read, begun)):
            torch.manual_seed(hash((args.seed, step)))  # z; so that an update is the same after a stop
            losses = update(x)
            ending = agreed(stopped)
            saving = ending or step == goal or step % args.save_every == 0 or time.monotonic() - saved > 600
            row = report(args, step, goal, epoch, losses, row, saving or step == begun + 1)
            if saving and not RANK:
                paint(args.run / "samples" / f"{step:07}.png", draw(args, state["G"], codes(args, args.seed, 100)))
                saved = save(args, state, step)
            if ending:
                break
    with locked(args.run, 60):
        if not (figure := args.run / "samples" / f"{goal:07}-walk.png").exists():
            paint(figure, draw_walk(args, state["G"], args.seed))
    print(f"{args.run} is finished, {goal} updates: {figure} shows what it learned; --fresh starts over")
    return args.run


# -- the house -------------------------------------------------------------------------------------------------------


def refuse(sentence):  # same as pix2pix.py
    """Bad input ends in one sentence and exit status 2, by way of `main`."""
    raise SystemExit(f"{SCRIPT}.py: {sentence}")


@contextlib.contextmanager
def blame(what):  # same as pix2pix.py
    """Refuse `what` if anything goes wrong with it: what others wrote or sent fails in many ways."""
    try:
        yield
    except Exception as error:
        error = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides a full disk
        refuse(f"{what} ({str(error).partition(chr(10))[0].partition('. ')[0] or type(error).__name__:.500})")


@contextlib.contextmanager
def replacing(path):  # same as pix2pix.py
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
def locked(path, wait=0):  # same as pix2pix.py
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
def signals():  # same as pix2pix.py
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


def settle(args, zeros):  # same as gan.py
    """Check that numbers are from 1 up, or 0 for those named in `zeros`; settle --run, --device and precision."""
    limits = {int: 2**63, float: math.inf}
    for name, value in vars(args).items():
        least = 0 if name in zeros else 1
        if type(value) in limits and not least <= value < limits[type(value)]:
            refuse(f"--{name.replace('_', '-')} {value}: give a number from {least} up, below {limits[type(value)]}")
    args.run = args.run or Path("runs", f"{SCRIPT}-{os.path.basename(os.path.realpath(args.data))}")
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


def digits(count, seed, size=28):  # same as gan.py
    """Toy digits, uint8 (count, 1, size, size), white on black, and labels (count,).

    Ten glyphs of 5x7 dots under random affine maps, with random stroke width and noise.
    """
    rng, rows = (
        np.random.default_rng(seed),
        "ehhhhhe 4c4444e eh1248v v2421he 26aiv22 vgu11he 68guhhe v124888 ehhehhe ehhf12c",
    )
    glyphs = [[[int(dots, 32) >> i & 1 for i in range(4, -1, -1)] for dots in rows] for rows in rows.split()]
    labels, (turn, slant) = rng.integers(0, 10, count), rng.uniform(-0.2, 0.2, (2, count))
    wide, high = rng.uniform(1.3, 1.9, count), rng.uniform(1.1, 1.4, count)
    maps = np.array([[wide * np.cos(turn), wide * (slant - np.sin(turn)), rng.uniform(-0.25, 0.25, count)],
                     [high * np.sin(turn), high * np.cos(turn), rng.uniform(-0.12, 0.12, count)]])  # fmt: skip
    grid = F.affine_grid(torch.from_numpy(maps.transpose(2, 0, 1)).float(), (count, 1, size, size), align_corners=False)
    ink = F.grid_sample(torch.tensor(glyphs)[labels, None].float(), grid, align_corners=False)
    thin, grain = rng.uniform(0.25, 0.45, (count, 1, 1, 1)), rng.normal(0, 6, (count, 1, size, size))
    pixels = (5 * (ink.numpy() - thin)).clip(0, 1) * 250 + abs(grain)
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


def fetched(args, name, **how):  # same as gan.py
    """torchvision's data set of that name, which lies below --data-root or is downloaded to there."""
    kind = getattr(datasets, name)
    host = getattr(kind, "mirrors", [getattr(kind, "url", "its host")])[0]
    by_hand = f"put it below --data-root {args.data_root} as torchvision's {name} has it"
    socket.setdefaulttimeout(60)  # seconds of silence
    with blame(f"{args.data} cannot be had from {host}: {by_hand}"):
        args.data_root.mkdir(parents=True, exist_ok=True)
        return kind(args.data_root, **how or {"download": True})


def load_images(args):
    """The number of training images, and read(list of numbers) -> uint8 (N, channels, size, size)."""
    if args.data == "toy":
        return 10000, digits(10000, 0, args.size)[0].expand(-1, args.channels, -1, -1).to(args.device).__getitem__
    folder = args.data_root if args.data in SETS else Path(args.data)
    if args.data in SETS:
        kinds = dict(mnist="MNIST", cifar10="CIFAR10", svhn="SVHN", celeba="CelebA", lsun="LSUN")
        how = {"classes": ["bedroom_train"]} if args.data == "lsun" else {}
        data = fetched(args, kinds.get(args.data, "FashionMNIST"), **how)
        items = [(i,) for i in range(len(data))]
    elif not folder.is_dir():
        refuse(f"--data {args.data} is no folder and none of {', '.join(SETS)}")
    else:
        items = [(file,) for file in find_images(folder).values()]

    def prepared(item):  # the middle of the image, or of a face (as the authors' code)
        image = data[item[0]][0] if args.data in SETS else read_image(item[0])
        image = image.crop((30, 40, 168, 178)) if args.data == "celeba" else image
        return pil_to_tensor(ImageOps.fit(flatten(image, args.channels), (args.size, args.size)))

    shape = (args.channels, args.size, args.size)
    good, read = decoded(args, folder, items, shape, f"{Path(args.data).name}-{args.channels}", prepared)
    if len(good) * math.prod(shape) < 2**30:
        return len(good), torch.stack([*map(read, range(len(good)))]).to(args.device).__getitem__
    return len(good), lambda chosen: torch.stack([*map(read, chosen)]).to(args.device)


def tried(args, read, item):  # same as pix2pix.py
    """read(item); with --skip-bad None, if it is refused, which is then said."""
    try:
        return read(item)
    except SystemExit as refusal:
        if not args.skip_bad:
            raise
        print(f"left out: {refusal}", flush=True)


def decoded(args, folder, items, shape, kind, read):  # same as pix2pix.py
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


def batches(args, count, read, step):
    """Yields epoch and x (k * B, C, S, S) in [-1, 1] for each update after `step`, in an order drawn from the seed."""
    orders = functools.lru_cache(2)(lambda epoch: np.random.default_rng([args.seed, epoch]).permutation(count).tolist())
    size = args.batch_size * args.k  # which may reach into the next epoch
    for first in itertools.count(step * size, size):
        chosen = [orders(k // count)[k % count] for k in range(first + RANK, first + size, WORLD)]
        yield first // count + 1, read(chosen) / 127.5 - 1


def codes(args, seed, count):
    """z (count, nz), uniform in [-1, 1], on every machine the same and the first ones those of a smaller count."""
    z = np.random.default_rng(seed).uniform(-1, 1, (count, args.nz))
    return torch.from_numpy(z).float().to(args.device)


@torch.no_grad()
def draw(args, G, z):
    """The images G(z), uint8 (N, channels, size, size), with running averages: each depends on nothing but its z."""
    G = deepcopy(G).eval()
    with torch.autocast(z.device.type, torch.bfloat16, args.bf16):
        x = torch.cat([G(part).float() for part in z.split(500)])
    return (x * 127.5 + 127.5).round().byte().cpu()


def draw_walk(args, G, seed):
    """Straight lines between 9 codes, one a row, ten images each (Fig. 4)."""
    z, way = codes(args, seed, 9), torch.linspace(0, 1, 10, device=args.device)[:, None]
    return draw(args, G, torch.lerp(z[:-1, None], z[1:, None], way).flatten(0, 1))


def means(args, seed, sentence):
    """The terms of "3,7 - 5,8 + 1": mean codes (terms, nz) with their signs, of samples by their numbers."""
    terms = [re.findall(r"\d+", term) for term in re.split("[-+]", sentence)]
    signs = torch.tensor([1.0, *(1.0 if sign == "+" else -1.0 for sign in re.findall("[-+]", sentence))])
    numbers = [[int(number) for number in term] for term in terms]
    if max(map(max, numbers)) >= 100000:
        refuse(f"sample {max(map(max, numbers))} of {sentence}: there are sheets for the first 100000 at most")
    z = codes(args, seed, max(map(max, numbers)) + 1)
    return torch.stack([z[term].mean(0) for term in numbers]), signs[:, None].to(args.device)


def paint(path, images, across=10):
    """Write uint8 images (N, C, S, S) as one PNG, `across` in a row."""
    with replacing(path) as file:
        to_pil_image(make_grid(images, across, pad_value=128)).save(file, "PNG")


def numbered(images):
    """The images, at least 56 pixels wide, with their numbers above."""
    cells = []
    for i, image in enumerate(images):
        wide = max(image.shape[2], 56)
        cell = Image.new("RGB", (wide, wide + 12), "white")
        cell.paste(to_pil_image(image).resize((wide, wide), Image.Resampling.NEAREST), (0, 12))
        ImageDraw.Draw(cell).text((2, 0), str(i), "black")
        cells.append(pil_to_tensor(cell))
    return torch.stack(cells)


def sample(args):
    """Draw --sample images by RUN/last.pt into a folder of PNGs, and figures beside it. Returns the folder."""
    path, to, seed = args.run / "last.pt", swept(args.to or args.run / "sampled"), args.seed
    checkpoint = read_checkpoint(path, args.device)
    with blame(f"{path} is damaged"), Budget(path.stat().st_size + 2**20), warnings.catch_warnings(action="ignore"):
        args = argparse.Namespace(**vars(args) | checkpoint["settings"])
        G = build(args)["G"]
        G.load_state_dict(checkpoint["G"])
    if args.sample:
        images = draw(args, G, codes(args, seed, args.sample))
        for i, image in enumerate(images):
            with replacing(to / f"{i:05}.png") as file:
                to_pil_image(image).save(file, "PNG")
        paint(to.with_name(f"{to.name}-sheet.png"), numbered(images[:100]))
        paint(to.with_name(f"{to.name}-walk.png"), draw_walk(args, G, seed))
    if args.arithmetic:  # the means in a row, then their sum with eight neighbours around it
        z, signs = means(args, seed, args.arithmetic)
        noise = codes(args, [seed, 1], 9) * 0.25
        noise[4] = 0
        images = draw(args, G, torch.cat([z, (signs * z).sum(0) + noise]))
        blank = images.new_full((-len(z) % 3, *images.shape[1:]), 255)
        paint(to.with_name(f"{to.name}-arithmetic.png"), torch.cat([images[: len(z)], blank, images[len(z) :]]), 3)
    if args.turn:  # eight other samples, moved along the axis
        z, signs = means(args, seed, args.turn)
        way = torch.linspace(-1, 1, 9, device=args.device)[:, None] * (signs * z).sum(0)
        paint(
            to.with_name(f"{to.name}-turn.png"),
            draw(args, G, (codes(args, [seed, 2], 8)[:, None] + way).flatten(0, 1)),
            9,
        )
    print(f"drew into {to} and {to.name}-*.png beside it")
    return to


def find_images(path):  # same as pix2pix.py
    """{name: file} of all images below a folder, or of a file; a name keeps its suffix where it would be another's."""
    suffixes, found = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"), {}
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.relative_to(path if path.is_dir() else path.parent).as_posix()
        stem = name.removesuffix(file.suffix)
        if file.suffix.lower() in suffixes and "/." not in f"/{name}":  # nothing hidden
            found[name if stem in found else stem] = file
    return found or refuse(f"{path} holds no images ({', '.join(suffixes)})")


def read_image(path):  # same as pix2pix.py
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


def flatten(image, channels):  # same as pix2pix.py
    """A Pillow image in 1 to 4 channels; what is transparent shows white if there is no channel for it."""
    if image.mode == "RGBA" and channels % 2:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(("L", "LA", "RGB", "RGBA")[channels - 1])


def swept(to):  # same as pix2pix.py
    """The folder `to`, without what a kill left half-written there or beside it."""
    to = to if to.name else to.resolve()
    for folder, parts in ((to, "**/*"), (to.parent, f"{to.name}-*"), (to.with_name(f"{to.name}-figures"), "*")):
        for part in folder.glob(f"{parts}.png.*.part"):
            part.unlink(missing_ok=True)
    return to


def save(args, state, step):  # same as pix2pix.py
    """Write RUN/last.pt, to go on from or to use, unless a weight is not finite. Returns the time."""
    if not all(weight.isfinite().all() for part in state.values() for weight in getattr(part, "parameters", list)()):
        refuse(f"update {step} made weights that are not finite; {args.run}/last.pt stays as it was: {ADVICE}")
    checkpoint = {"script": SCRIPT, "version": 1, "step": step, "settings": args.settings}
    with replacing(args.run / "last.pt") as file:
        torch.save(checkpoint | {name: part.state_dict() for name, part in state.items()}, file)
    return time.monotonic()


def read_checkpoint(path, device, sent=None):  # same as pix2pix.py
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


class Budget(TorchDispatchMode):  # same as pix2pix.py
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


def resume(args, state, count):  # same as pix2pix.py
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

    From now on optimisers take the mean of the gradients over all processes, and batch norm has the statistics
    of the whole batch.
    """
    if WORLD == 1:
        return None
    with blame("the other processes cannot be reached: start all of them with torchrun"):
        dist.init_process_group()
    for part in state.values():
        if isinstance(part, torch.optim.Optimizer):
            part.register_step_pre_hook(average)
        for norm in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                norm.forward = functools.partial(whole_norm, norm)
    sent = [path.read_bytes() if path.exists() and not RANK else None]
    dist.broadcast_object_list(sent)
    return sent[0]


class AllSum(torch.autograd.Function):
    """A tensor (...) summed over all processes, and so is its gradient. -> (...)"""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x := x.clone())
        return x

    @staticmethod
    def backward(ctx, grad):
        return AllSum.apply(grad)


def whole_norm(norm, x):
    """Batch norm, in training by the statistics of the whole batch over all processes: its size is the method's."""
    if not norm.training:
        return type(norm).forward(norm, x)
    axes, shape, count = [0, *range(2, x.ndim)], (-1, *[1] * (x.ndim - 2)), x.numel() // x.shape[1] * WORLD
    mean, square = AllSum.apply(torch.stack([x.float().mean(axes), x.float().square().mean(axes)])) / WORLD
    var = square - mean**2
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * count / (count - 1), norm.momentum)
        norm.num_batches_tracked.add_(1)
    scaled = (x - mean.view(shape)) * (var + norm.eps).rsqrt().view(shape)
    return (scaled * norm.weight.view(shape) + norm.bias.view(shape) if norm.affine else scaled).to(x.dtype)


def average(optimiser, *_):  # same as pix2pix.py
    """Make the gradients that an optimiser is about to take those of the whole batch, in one message."""
    grads = [weight.grad for group in optimiser.param_groups for weight in group["params"] if weight.grad is not None]
    if grads:
        flat = nn.utils.parameters_to_vector(grads)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / WORLD, grads)


def agreed(stopped):  # same as pix2pix.py
    """Whether any of the processes was sent a signal, so that all stop at the same update; `stopped` has it then."""
    if WORLD > 1:
        dist.all_reduce(last := torch.tensor(stopped[-1] if stopped else 0), dist.ReduceOp.MAX)
        stopped += [last.item()] * (last.item() > 0)
    return bool(stopped)


def capture(step, args):  # same as pix2pix.py
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


def report(args, step, goal, epoch, losses, last, must):  # same as pix2pix.py
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


def first_to_say():  # same as pix2pix.py
    """Whether no other process of torchrun has said a sentence: one is enough."""
    with contextlib.suppress(Exception):
        return WORLD == 1 or next(dist.rendezvous("env://", timeout=timedelta(seconds=9)))[0].add("said", 1) == 1
    return True


def main(argv=None):
    """Train or sample; bad input, and what the machine refuses, end in one sentence and exit status 2."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda number, frame: sys.exit(128 + number))
    warnings.filterwarnings("ignore", module="PIL")  # a refusal says it in one sentence
    logging.getLogger("PIL").setLevel(100)
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # files may have names that it cannot show
    try:
        args = get_args(argv)
        if RANK and (args.sample or args.arithmetic or args.turn):  # one process is enough
            return None
        return (sample if args.sample or args.arithmetic or args.turn else train)(args)
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
