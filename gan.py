# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "filelock>=3"]
# ///
"""GAN: a generator and a discriminator, trained against each other until the one draws like the data.

Goodfellow, Pouget-Abadie, Mirza, Xu, Warde-Farley, Ozair, Courville, Bengio: Generative Adversarial Nets. NIPS 2014,
arXiv:1406.2661. G maps noise z to an image G(z); D tells images x of the data from G(z):
    min_G max_D  E[log D(x)] + E[log(1 - D(G(z)))]                                                (Eq. 1)
Networks, dropout, noise and SGD, which the paper leaves out, are those of the authors' code. As there, one pass of D
over G(z) serves both losses, with one dropout mask, and both networks move together. Adam is ours, for minutes instead
of an hour; with it a running mean of G's weights draws, as each update for itself wavers.

    python gan.py                                     # train on toy digits, drawn here, in minutes on a CPU
    python gan.py --data mnist                        # download, train; stop it and repeat this: it goes on
    python gan.py --data mnist --sample 100           # draw from what was trained
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import logging
import math
import os
import signal
import socket
import sys
import time
import warnings
import zipfile
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid

SCRIPT = "gan"
SETS = {  # the named sets, and what each changes
    "toy": dict(optimiser="adam", average=0.999, ngf=400, ndf=80, epochs=60, save_every=2000),
    "mnist": dict(),
    "fashion-mnist": dict(),
    "cifar10": dict(net="fc", channels=3, size=32),
}
NETS = {"mnist": (1200, 240, 0.1), "fc": (8000, 1600, 0.025), "conv": (8000, 32, 0.004)}  # ngf, ndf, rate of SGD
ADVICE = "lower --lr, or use --precision fp32"  # against what is not finite
RANK, WORLD = (int(os.environ.get(name, start)) for name, start in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun
FREE = "settings data_root run max_steps save_every skip_bad fresh device bf16 no_capture sample to"


def get_args(argv=None):
    """Settings from `argv` or the command line; what is not given is the authors', or that of the set."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error, add = refuse, parser.add_argument
    add("--data", default="toy", help=f"{', '.join(SETS)}, or a folder of images")
    add("--data-root", type=Path, default=Path("data"), help="where downloads go, or lie already")
    add("--size", type=int, default=28, help="pixels a side")
    add("--channels", type=int, choices=(1, 3), default=1, help="1 grey, 3 colour")
    add("--net", choices=tuple(NETS), default="mnist", help="the networks for MNIST, or one of the pairs for CIFAR-10")
    add("--nz", type=int, default=100, help="numbers in z")
    add("--ngf", type=int, help="units of G's hidden layers (1200; fc, conv 8000)")
    add("--ndf", type=int, help="maxout units of D's layers (240; fc 1600), or channels of its first (conv 32)")
    add("--k", type=int, default=1, help="updates of D for one of G (Algorithm 1)")
    add("--saturating", action="store_true", help="G descends log(1 - D(G(z))), as Algorithm 1 prints it")
    add("--optimiser", choices=("sgd", "adam"), default="sgd", help="the authors', or the one that takes minutes")
    add("--epochs", type=int, help="passes over the images (SGD 250, Adam 40)")
    add("--batch-size", type=int, default=100, help="images an update")
    add("--lr", type=float, help="the rate, at first (SGD .1; fc .025, conv .004), or that of Adam (1e-3)")
    add("--average", type=float, help="draw with a mean of G, which keeps this much an update (SGD 0; Adam .9999)")
    add("--seed", type=int, default=0, help="of weights, order, noise and dropout; of z for --sample")
    add("--run", type=Path, help="run folder (runs/gan-DATA)")
    add("--max-steps", type=int, help="stop after so many updates")
    add("--save-every", type=int, default=10000, help="updates between checkpoints; ten minutes at most")
    add("--skip-bad", action="store_true", help="train without the images that cannot be read")
    add("--fresh", action="store_true", help="start over; the old run is kept as DIR.old-N")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (the accelerator, if there is one)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is much faster")
    add("--no-capture", action="store_true", help="on CUDA: launch kernels one by one, not as a recorded graph")
    add("--sample", type=int, metavar="N", help="draw N images with what was trained")
    add("--to", type=Path, help="folder for them (RUN/sampled)")
    parser.set_defaults(**SETS.get(parser.parse_known_args(argv)[0].data, {}))
    parser.set_defaults(batch_size=math.ceil(parser.get_default("batch_size") / WORLD) * WORLD)  # a share each
    args = parser.parse_args(argv)
    ngf, ndf, rate = NETS[args.net]
    rate, average, epochs = (rate, 0.0, 250) if args.optimiser == "sgd" else (1e-3, 0.9999, 40)
    rest = {"ngf": ngf, "ndf": ndf, "lr": rate, "average": average, "epochs": epochs}
    vars(args).update({name: value for name, value in rest.items() if getattr(args, name) is None})
    if args.net == "conv" and (args.size < 20 or args.size % 3 != 2):
        refuse(f"--size {args.size}: the convolutional networks take 20, 23, 26, 29, 32, ... pixels")
    if args.average >= 1:
        refuse(f"--average {args.average}: give a number from 0 up, below 1")
    return settle(args, zeros=("lr", "average", "seed"))


# -- the method ------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """z (N, nz) -> two hidden layers -> x (N, channels, size, size); what the three pairs have is in the paper's code.

    mnist: ReLU, ReLU, sigmoid, x in [0, 1]. fc: ReLU, sigmoid, linear. conv: ReLU, sigmoid, then a transposed
    convolution, 5x5 with stride 3, and a bias for each pixel; the x of these two has mean 0 and variance 1.
    """

    def __init__(self, net="mnist", nz=100, ngf=1200, channels=1, size=28):
        super().__init__()
        self.shape, side = (channels, size, size), (size - 2) // 3
        first = [nn.Linear(nz, ngf), nn.ReLU()]
        if net == "conv":
            second = [nn.Linear(ngf, 80 * side * side), nn.Sigmoid(), nn.Unflatten(1, (80, side, side))]
            self.layers = nn.Sequential(*first, *second, nn.ConvTranspose2d(80, channels, 5, 3, bias=False))
        else:
            second = [nn.Linear(ngf, ngf), nn.ReLU() if net == "mnist" else nn.Sigmoid()]
            self.layers = nn.Sequential(*first, *second, nn.Linear(ngf, math.prod(self.shape), bias=False))
        self.bias = nn.Parameter(torch.zeros(self.shape))  # of the output
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
    """x (N, channels, size, size) -> logits (N,): two layers of maxout units; conv has three of channels, and one.

    Dropout keeps .8 of the input and .5 of what each layer gives to the next.
    """

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
    """Uniform in +-width for weights, zero for biases."""
    for weight in net.parameters():
        nn.init.zeros_(weight) if weight.ndim in (1, 3) else nn.init.uniform_(weight, -width, width)
    return net


class Momentum(torch.optim.Optimizer):
    """SGD with momentum as in the authors' code, v <- momentum v - lr g, w <- w + v, with both rates as tensors."""

    def __init__(self, weights, lr, momentum):
        super().__init__(weights, dict(lr=lr, momentum=momentum))
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["v"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
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
    """{name: network or optimiser}: all that is learned, on args.device; a checkpoint holds their states."""
    torch.manual_seed(args.seed)
    G = init_weights(Generator(args.net, args.nz, args.ngf, args.channels, args.size), 0.05)
    if args.net == "fc":
        nn.init.uniform_(G.layers[-1].weight, -0.5, 0.5)
    D = init_weights(Discriminator(args.net, args.ndf, args.channels, args.size), 0.005)
    state = {"G": G.to(args.device), "D": D.to(args.device)}
    state |= {"G_mean": deepcopy(G).requires_grad_(False)} if args.average else {}
    for name in "GD":  # with rates as tensors, so that a recorded step follows the schedule
        weights, rate = state[name].parameters(), torch.tensor(args.lr, device=args.device)
        if args.optimiser == "sgd":
            state[f"opt_{name}"] = Momentum(weights, rate, torch.tensor(0.5, device=args.device))
        else:
            fit = dict(fused=True, capturable="cuda" in args.device)
            state[f"opt_{name}"] = torch.optim.Adam(weights, rate, (0.5, 0.999), **fit)
    return state


def make_step(args, state):
    """Returns `step(x)`: k updates of D and one of G (Algorithm 1), on x (k * N, C, S, S), scaled as G's output.

    It gives back its losses as 0-d tensors and reads nothing back from the device, so it can be recorded and replayed.
    """
    G, D, opt_G, opt_D = (state[name] for name in ("G", "D", "opt_G", "opt_D"))

    def step(x):
        for i, real in enumerate(x.chunk(args.k), 1):
            opt_D.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16, args.bf16):
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
    """Train for --epochs, from RUN/last.pt if it is there, then paint the figures. Returns the run folder."""
    images, state = load_images(args), build(args)
    fixed_z = draw_z(args, 100)
    with locked(args.run), signals() as stopped:
        begun = resume(args, state, len(images))
        every = math.ceil(args.epochs * len(images) / args.batch_size / args.k)
        goal, drawer = max(begun, min(every, args.max_steps or math.inf)), state.get("G_mean", state["G"])
        if not begun and args.net == "mnist":  # G's output starts at the mean image (as the authors' code)
            state["G"].bias.data = to_x(args, images).mean(0).clamp(0.001, 0.999).logit()
        update, row, saved = capture(make_step(args, state), args), (time.monotonic(), begun), time.monotonic()
        for step, (epoch, x) in zip(range(begun + 1, goal + 1), batches(args, images, begun)):
            if args.optimiser == "sgd":
                for (group,) in (state["opt_D"].param_groups, state["opt_G"].param_groups):
                    group["lr"].fill_(max(args.lr / 1.000004**step, 1e-6))
                    group["momentum"].fill_(0.5 + 0.2 * min((epoch - 1) / 249, 1))
            torch.manual_seed(hash((args.seed, step)) + RANK)  # z, dropout; so that an update is the same after a stop
            losses = update(x)
            if args.average:  # of all updates at first, later of about the last 1 / (1 - average)
                latest = [weight.detach() for weight in state["G"].parameters()]
                torch._foreach_lerp_([*drawer.parameters()], latest, max(1 - args.average, 1 / step))
            ending = agreed(stopped)
            saving = ending or step == goal or step % args.save_every == 0 or time.monotonic() - saved > 600
            row = report(args, step, goal, epoch, losses, row, saving or step == begun + 1)
            if saving and not RANK:
                paint(args.run / "samples" / f"{step:07}.png", draw(args, drawer, fixed_z))
                saved = save(args, state, step)
            if ending:
                break
    with locked(args.run, 60):
        if not (figure := args.run / "samples" / f"{goal:07}-nearest.png").exists():
            paint(args.run / "samples" / f"{goal:07}-walk.png", draw_walk(args, drawer, fixed_z[:16]), 16)
            paint(figure, beside_nearest(args, draw(args, drawer, fixed_z[:20]), images))
    print(f"{args.run} is finished, {goal} updates: {figure} shows samples and the data; --fresh starts over")
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


def settle(args, zeros):
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


def digits(count, seed, size=28):
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


def fetched(args, name, **how):
    """torchvision's data set of that name, which lies below --data-root or is downloaded to there."""
    kind = getattr(datasets, name)
    host = getattr(kind, "mirrors", [getattr(kind, "url", "its host")])[0]
    by_hand = f"put it below --data-root {args.data_root} as torchvision's {name} has it"
    socket.setdefaulttimeout(60)  # seconds of silence
    with blame(f"{args.data} cannot be had from {host}: {by_hand}"):
        args.data_root.mkdir(parents=True, exist_ok=True)
        return kind(args.data_root, **how or {"download": True})


def load_images(args):
    """The training images on the device, uint8 (N, channels, size, size)."""
    if args.data == "toy":
        images = digits(10000, 0, args.size)[0]
    elif args.data in SETS:  # the first five sixths or four fifths, as the authors' code
        name, kept = {"mnist": ("MNIST", 50000), "fashion-mnist": ("FashionMNIST", 50000)}.get(
            args.data, ("CIFAR10", 40000)
        )
        images = torch.as_tensor(fetched(args, name).data[:kept])
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        images = resize(images, [args.size, args.size])
    elif not Path(args.data).is_dir():
        refuse(f"--data {args.data} is no folder and none of {', '.join(SETS)}")
    else:

        def fitted(file):
            return pil_to_tensor(ImageOps.fit(flatten(read_image(file), args.channels), (args.size, args.size)))

        found = [tried(args, fitted, file) for file in find_images(Path(args.data)).values()]
        found = [image for image in found if image is not None]
        images = torch.stack(found or refuse(f"{args.data} holds no readable image"))
    return images.expand(-1, args.channels, -1, -1).to(args.device)


def to_x(args, pixels):
    """uint8 (N, C, S, S) to [0, 1]; for CIFAR-10's networks each image to mean 0 and variance 1."""
    x = pixels / 255
    if args.net != "mnist":
        x = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True).clamp(0.01)
    return x


def batches(args, images, step):
    """Yields epoch and x (k * B, C, S, S) for each update after `step`, in an order drawn from the seed alone."""
    orders = functools.lru_cache(2)(lambda epoch: np.random.default_rng([args.seed, epoch]).permutation(len(images)))
    size = args.batch_size * args.k  # which may reach into the next epoch
    for first in itertools.count(step * size, size):
        chosen = [orders(k // len(images))[k % len(images)] for k in range(first + RANK, first + size, WORLD)]
        yield first // len(images) + 1, to_x(args, images[torch.tensor(np.array(chosen), device=args.device)])


@torch.no_grad()
def draw(args, G, z):
    """The images G(z), uint8 (N, channels, size, size)."""
    with torch.autocast(z.device.type, torch.bfloat16, args.bf16):
        x = torch.cat([G(part).float() for part in z.split(1000)])
    x = x if args.net == "mnist" else x / 4 + 0.5  # the mean and about the contrast of a usual photo
    return (x.clamp(0, 1) * 255).round().byte().cpu()


def draw_walk(args, G, z):
    """Straight lines, sixteen images each, from one half of z (2 * N, nz) to the other (Fig. 3)."""
    way = torch.linspace(0, 1, 16, device=z.device)[:, None]
    return draw(args, G, torch.lerp(*z.view(2, -1, 1, args.nz), way).flatten(0, 1))


def beside_nearest(args, samples, images):
    """Each of `samples` followed by the training image nearest to it in squared distance of pixels (Fig. 2)."""
    data, found = to_x(args, images).flatten(1), []
    for x in to_x(args, samples.to(args.device)).flatten(1):
        found.append(images[(data - x).square().sum(1).argmin()].cpu())
    return torch.stack([samples, torch.stack(found)], 1).flatten(0, 1)


def paint(path, images, across=10):
    """Write uint8 images (N, C, S, S) as one PNG, `across` in a row."""
    with replacing(path) as file:
        to_pil_image(make_grid(images, across, pad_value=128)).save(file, "PNG")


def sample(args):
    """Draw --sample images by RUN/last.pt into a folder of PNGs, beside it a sheet and a walk. Returns the folder."""
    path, to, seed = args.run / "last.pt", swept(args.to or args.run / "sampled"), args.seed
    checkpoint = read_checkpoint(path, args.device)
    with blame(f"{path} is damaged"), Budget(path.stat().st_size + 2**20), warnings.catch_warnings(action="ignore"):
        args = argparse.Namespace(**vars(args) | checkpoint["settings"])
        G = build(args)["G"]
        for name in ("G", "G_mean") if "G_mean" in checkpoint else ("G",):
            G.load_state_dict(checkpoint[name])
    torch.manual_seed(seed)
    images, walk = draw(args, G, draw_z(args, args.sample)), draw_walk(args, G, draw_z(args, 16))
    for i, image in enumerate(images):
        with replacing(to / f"{i:05}.png") as file:
            to_pil_image(image).save(file, "PNG")
    paint(to.with_name(f"{to.name}-sheet.png"), images[:100])
    paint(to.with_name(f"{to.name}-walk.png"), walk, 16)
    print(f"drew {len(images)} images into {to}, with {to.name}-sheet.png and {to.name}-walk.png beside it")
    return to


def tried(args, read, item):  # same as pix2pix.py
    """read(item); with --skip-bad None, if it is refused, which is then said."""
    try:
        return read(item)
    except SystemExit as refusal:
        if not args.skip_bad:
            raise
        print(f"left out: {refusal}", flush=True)


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


def joined(state, path):  # same as pix2pix.py
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
        if RANK and args.sample:  # one process is enough
            return None
        return (sample if args.sample else train)(args)
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
