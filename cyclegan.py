# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "filelock>=3"]
# ///
"""CycleGAN: two GANs that turn two kinds of image into each other, learned without pairs.

Zhu, Park, Isola, Efros: Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks. ICCV 2017,
arXiv:1703.10593. G maps X to Y and F maps Y to X; D_Y and D_X tell images of the data from theirs, and what goes
there and back must come home:
    L(G, F, D_X, D_Y) = L_GAN(G, D_Y) + L_GAN(F, D_X) + lambda (E|F(G(x)) - x| + E|G(F(y)) - y|)             (Eq. 3)
As in the authors' code the identity loss of Sec. 5.2, E|G(y) - y| + E|F(x) - x|, is on for every data set, with half
the weight of the cycle; norms have no gain and bias, and no statistics, as in their later code.

    python cyclegan.py                                         # train on toy streets, drawn here, in minutes on a CPU
    python cyclegan.py --data horse2zebra                      # download, train; stop it and repeat this: it goes on
    python cyclegan.py --data horse2zebra --translate photos   # use what was trained, on an image or a folder
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
import tempfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from torch import distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

SCRIPT, HOST = "cyclegan", "https://efrosgans.eecs.berkeley.edu/cyclegan/datasets/"
SETS = {  # the named sets, and what each changes
    "toy": dict(size=64, load_size=64, blocks=3, ngf=32, ndf=32, n_layers=2, epochs=6, decay_epochs=3, save_every=600),
    **dict.fromkeys("horse2zebra apple2orange summer2winter_yosemite iphone2dslr_flower".split(), {}),
    **dict.fromkeys("monet2photo cezanne2photo ukiyoe2photo vangogh2photo maps facades cityscapes".split(), {}),
}
TERMS = {  # of the objective: GAN, forward cycle, backward cycle, identity; all but the first are ablations (Table 4)
    "all": (1, 1, 1, 1),
    "cycle": (0, 1, 1, 0),
    "gan": (1, 0, 0, 0),
    "gan+forward": (1, 1, 0, 0),
    "gan+backward": (1, 0, 1, 0),
}
PARTS = ("G", "F", "D_X", "D_Y", "pool_X", "pool_Y", "opt_G", "opt_D")
ADVICE = "lower --lr, or use --precision fp32"  # against what is not finite
RANK, WORLD = (int(os.environ.get(name, start)) for name, start in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun
FREE = "settings data_root run max_steps save_every skip_bad fresh device bf16 no_capture translate direction to"


def get_args(argv=None):
    """Settings from `argv` or the command line; what is not given is the paper's, or that of the set."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error, add = refuse, parser.add_argument
    add("--data", default="toy", help=f"{', '.join(SETS)},\nor a folder: trainA/ and trainB/, A/ and B/, or pairs")
    add("--data-root", type=Path, default=Path("data"), help="where downloads go, or lie already")
    add("--size", type=int, default=256, help="crop trained on, a multiple of 4 (a power of two for --net unet)")
    add("--load-size", type=int, help="size before the random crop (286 for 256); --size for no jitter")
    add("--no-mirror", action="store_true", help="no random mirroring")
    add("--net", choices=("resnet", "unet"), default="resnet", help="kind of G and F")
    add("--blocks", type=int, help="residual blocks of G and F (9; 6 below 256 pixels)")
    add("--ngf", type=int, default=64, help="channels of the first layer of G and F")
    add("--ndf", type=int, default=64, help="channels of the first layer of D_X and D_Y")
    add("--n-layers", type=int, default=3, help="strided layers of D_X and D_Y: 3 see 70 pixels")
    add("--loss", choices=("lsgan", "log"), default="lsgan", help="least squares, or the usual cross-entropy")
    add("--terms", choices=tuple(TERMS), default="all", help="of the objective; all but the first are ablations")
    add("--lambda-x", type=float, default=10.0, help="weight of the forward cycle, |F(G(x)) - x|")
    add("--lambda-y", type=float, default=10.0, help="weight of the backward cycle, |G(F(y)) - y|")
    add("--lambda-identity", type=float, default=0.5, help="weight of the identity loss, in weights of the cycle")
    add("--pool", type=int, default=50, help="past images that D_X and D_Y are shown again; 0 for none")
    add("--epochs", type=int, default=200, help="passes over the larger of the two sets")
    add("--decay-epochs", type=int, default=100, help="over the last so many the rate falls linearly to zero")
    add("--batch-size", type=int, default=1, help="images of each kind an update")
    add("--lr", type=float, default=2e-4, help="Adam's rate; its beta1 is .5")
    add("--seed", type=int, default=0, help="of weights, order, jitter and pool")
    add("--run", type=Path, help="run folder (runs/cyclegan-DATA)")
    add("--max-steps", type=int, help="stop after so many updates")
    add("--save-every", type=int, default=5000, help="updates between checkpoints; ten minutes at most")
    add("--skip-bad", action="store_true", help="train without the images that cannot be read")
    add("--fresh", action="store_true", help="start over; the old run is kept as DIR.old-N")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (the accelerator, if there is one)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is much faster")
    add("--no-capture", action="store_true", help="on CUDA: launch kernels one by one, not as a recorded graph")
    add("--translate", type=Path, metavar="PATH", help="translate an image or a folder with what was trained")
    add("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="of --translate: by G, or by F")
    add("--to", type=Path, help="folder for translations (RUN/translated)")
    parser.set_defaults(**SETS.get(parser.parse_known_args(argv)[0].data, {}))
    parser.set_defaults(batch_size=math.ceil(parser.get_default("batch_size") / WORLD) * WORLD)  # a share each
    args = parser.parse_args(argv)
    args.load_size = args.load_size or args.size * 286 // 256
    args.blocks = (9 if args.size >= 256 else 6) if args.blocks is None else args.blocks
    settle(args, zeros=("lambda_x", "lambda_y", "lambda_identity", "n_layers", "decay_epochs", "lr", "seed", "pool"))
    whole = args.size & (args.size - 1) if args.net == "unet" else args.size % 4
    if whole or not max(16, 3 << args.n_layers) <= args.size <= args.load_size:
        kind = "power of two" if args.net == "unet" else "multiple of 4"
        refuse(f"--size {args.size}: give a {kind} above 2 * 2**n_layers, 16 to --load-size {args.load_size}")
    return args


# -- the method ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, padded by reflection, each with instance norm. (N, C, H, W) -> the same."""

    def __init__(self, width):
        super().__init__()
        conv = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        again = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        self.layers = nn.Sequential(*conv, nn.ReLU(True), *again)

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


class UNet(nn.Module):
    """The other generator of the authors' code, that of pix2pix: 4x4 convolutions of stride 2 down to a 1x1 map.

    x (N, 3, H, W) in [-1, 1], H and W multiples of `size` -> (N, 3, H, W) in [-1, 1].
    """

    def __init__(self, size=256, ngf=64):
        super().__init__()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width = [3] + [ngf * min(2**i, 8) for i in range(int(math.log2(size)))]
        for i, (c_out, c_in) in enumerate(itertools.pairwise(width)):
            first, last = i == 0, i == len(width) - 2
            down = [nn.LeakyReLU(0.2), nn.Conv2d(c_out, c_in, 4, 2, 1)]
            down += [] if first or last else [nn.InstanceNorm2d(c_in)]  # a normalised 1x1 map would hold nothing
            up = [nn.ReLU(), nn.ConvTranspose2d(c_in if last else 2 * c_in, c_out, 4, 2, 1)]
            self.down.append(nn.Sequential(*down[first:]))
            self.up.insert(0, nn.Sequential(*up, nn.Tanh() if first else nn.InstanceNorm2d(c_out)))

    def forward(self, x):
        levels = []
        for down in self.down:
            levels.append(x := down(x))
        x = self.up[0](levels.pop())
        for up in self.up[1:]:
            x = up(torch.cat([x, levels.pop()], 1))
        return x


class Discriminator(nn.Module):
    """PatchGAN (Sec. 7.2): C64-C128-C256-C512, a logit for each patch of 70x70 pixels, with three strided layers.

    x (N, 3, H, W) in [-1, 1] -> (N, 1, h, w): 30x30 for 256x256.
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

    The first `size` images are stored and returned; later each is returned, or, with odds of one half, swapped for one
    of those stored. fake (N, 3, S, S) -> (N, 3, S, S).
    """

    def __init__(self, size, pixels):
        super().__init__()
        self.register_buffer("images", torch.zeros(size, 3, pixels, pixels))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def forward(self, fake):
        size, shown = len(self.images), []
        for image in gathered(fake).split(1) if size else ():
            full, swap = self.count == size, torch.rand(1, device=fake.device) < 0.5
            place = torch.where(full, torch.randint(size, (1,), device=fake.device), self.count)
            past = self.images.index_select(0, place)
            shown.append(torch.where(full & swap, past, image))
            self.images.index_copy_(0, place, torch.where(full & ~swap, past, image))
            self.count.add_(~full)
        return torch.cat(shown)[RANK::WORLD] if size else fake


def init_weights(net):
    """N(0, .02) for weights, zero for biases (Sec. 7.1)."""
    for weight in net.parameters():
        nn.init.zeros_(weight) if weight.ndim == 1 else nn.init.normal_(weight, 0.0, 0.02)
    return net


def gan_loss(args, logits, real):
    """(D - 1)^2 if `real`, else D^2 (Sec. 4), or cross-entropy for --loss log; mean over all patches. -> 0-d."""
    if args.loss == "lsgan":
        return (logits.float() - float(real)).square().mean()
    return nn.functional.softplus(-logits.float() if real else logits.float()).mean()


def build(args):
    """{name: network, pool or optimiser}: all that is learned, on args.device; a checkpoint holds their states."""
    torch.manual_seed(args.seed)
    state = {}
    for name in ("G", "F"):
        net = UNet(args.size, args.ngf) if args.net == "unet" else Generator(args.blocks, args.ngf)
        state[name] = init_weights(net).to(args.device)
    for name in ("D_X", "D_Y"):
        state[name] = init_weights(Discriminator(args.ndf, args.n_layers)).to(args.device)
        state[f"pool_{name[-1]}"] = Pool(args.pool, args.size).to(args.device)
    for name, nets in (("opt_G", ("G", "F")), ("opt_D", ("D_X", "D_Y"))):
        weights = [weight for net in nets for weight in state[net].parameters()]
        # with the rate as a tensor, so that a recorded step follows the schedule
        rate, betas, fit = torch.tensor(args.lr, device=args.device), (0.5, 0.999), "cuda" in args.device
        state[name] = torch.optim.Adam(weights, rate, betas, fused=True, capturable=fit)
    return state


def make_step(args, state):
    """Returns `step(x, y)`: one update of G and F, then of D_X and D_Y, on x and y (N, 3, size, size) in [-1, 1].

    It gives back its losses as 0-d tensors and reads nothing back from the device, so it can be recorded and replayed.
    """
    G, F, D_X, D_Y, pool_X, pool_Y, opt_G, opt_D = (state[name] for name in PARTS)
    use_gan, use_x, use_y, use_same = TERMS[args.terms]
    lambda_x, lambda_y = use_x * args.lambda_x, use_y * args.lambda_y
    weights_G = [*G.parameters(), *F.parameters()]

    def one_way(G, F, D_Y, x, y, lambda_x, lambda_y):
        """Gradients of G and F from X to Y, or, with everything swapped, from Y to X. Returns G(x) and losses."""
        lambda_same, losses = use_same * args.lambda_identity * lambda_y, {}
        with torch.autocast(x.device.type, torch.bfloat16, args.bf16):
            out = G(torch.cat([x, y]) if lambda_same else x)  # in one pass: instance norm keeps images apart
            fake, same = out.float().tensor_split([len(x)])
            if use_gan:  # min (D_Y(G(x)) - 1)^2
                losses["loss_gan"] = gan_loss(args, D_Y(fake), True)
            if lambda_x:  # min |F(G(x)) - x| (Eq. 2)
                losses["loss_cycle"] = (F(fake).float() - x).abs().mean()
            if lambda_same:  # min |G(y) - y| (Sec. 5.2)
                losses["loss_same"] = (same - y).abs().mean()
        weighted = zip((1.0, lambda_x, lambda_same), map(losses.get, ("loss_gan", "loss_cycle", "loss_same")))
        total = sum(weight * loss for weight, loss in weighted if loss is not None)
        if losses:
            total.backward(inputs=weights_G)
        return fake.detach(), {name: loss.detach() for name, loss in losses.items()}

    def judge(D, real, fake):
        """Gradients of D: min (D(y) - 1)^2 + D(G(x))^2, halved so that D learns slower than G (Sec. 7.1)."""
        with torch.autocast(real.device.type, torch.bfloat16, args.bf16):
            on_real, on_fake = D(torch.cat([real, fake])).chunk(2)
        loss_D = (gan_loss(args, on_real, True) + gan_loss(args, on_fake, False)) / 2
        loss_D.backward()
        return loss_D.detach()

    def step(x, y):
        opt_G.zero_grad()
        opt_D.zero_grad()
        fake_y, losses_G = one_way(G, F, D_Y, x, y, lambda_x, lambda_y)  # one at a time, for half the memory
        fake_x, losses_F = one_way(F, G, D_X, y, x, lambda_y, lambda_x)
        opt_G.step()
        losses = {f"{name}_G": loss for name, loss in losses_G.items()}
        losses |= {f"{name}_F": loss for name, loss in losses_F.items()}
        if use_gan:
            losses |= {"loss_D_X": judge(D_X, x, pool_X(fake_x)), "loss_D_Y": judge(D_Y, y, pool_Y(fake_y))}
            opt_D.step()
        return losses

    return step


def train(args):
    """Train for --epochs, from RUN/last.pt if it is there, then translate the test split. Returns the run folder."""
    (xs, read_x), (ys, read_y) = load_images(args, "train", "A"), load_images(args, "train", "B")
    tests, state = [load_images(args, "test", side) for side in "AB"], build(args)
    with locked(args.run), signals() as stopped:
        begun, count = resume(args, state, [len(xs), len(ys)]), max(len(xs), len(ys))
        goal = max(begun, min(math.ceil(args.epochs * count / args.batch_size), args.max_steps or math.inf))
        update, row, saved = capture(make_step(args, state), args), (time.monotonic(), begun), time.monotonic()
        drawn = batches(args, (len(xs), read_x), (len(ys), read_y), begun)
        for step, (epoch, x, y) in zip(range(begun + 1, goal + 1), drawn):
            decay = max(0, epoch - args.epochs + args.decay_epochs) / (args.decay_epochs + 1)
            for optimiser in (state["opt_D"], state["opt_G"]):
                optimiser.param_groups[0]["lr"].fill_(args.lr * (1 - decay))
            torch.manual_seed(hash((args.seed, step)))  # of the pools; so that an update is the same after a stop
            losses = update(x, y)
            ending = agreed(stopped)
            saving = ending or step == goal or step % args.save_every == 0 or time.monotonic() - saved > 600
            row = report(args, step, goal, epoch, losses, row, saving or step == begun + 1)
            if saving and not RANK:
                paint(args, state, tests, args.run / "samples" / f"{step:07}.png", 4)
                saved = save(args, state, step)
            if ending:
                break
    with locked(args.run, 60):
        if not (grid := args.run / "samples" / f"{goal:07}-test.png").exists():
            paint(args, state, tests, grid, 16, args.run / "test")
    print(f"{args.run} is finished, {goal} updates: {grid} shows the test split; --fresh starts over")
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


def streets(count, seed, size=64):  # same as pix2pix.py
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


def load_images(args, split, side):
    """Side "A" or "B" of "train" at --load-size or "test" at --size: names, and read(i) -> uint8 (3, S, S)."""
    size = args.load_size if split == "train" else args.size
    if args.data == "toy":  # maps and photos of different scenes, but for the tests
        maps, photos, _ = streets(*((100, 1) if split == "test" else (600, 0 if side == "A" else 2)), size)
        images = torch.from_numpy(maps if side == "A" else photos)
        return [f"{i:03}" for i in range(len(images))], images.to(args.device).__getitem__
    folder = find_data(args)
    found = find_side(folder, split, side) or dict([*find_side(folder, "train", side).items()][:16])  # no test split
    files, kind = [(file, half) for file, half in found.values()], f"{split}{side}-{args.size}"
    good, read = decoded(args, folder, files, (3, size, size), kind, lambda item: read_half(args, *item, size))
    return [[*found][i] for i in good], read


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


def find_data(args):
    """The folder that --data means; a named set lies below --data-root, or is downloaded to there."""
    folder = args.data_root / args.data if args.data in SETS else Path(args.data)
    url, archive = f"{HOST}{args.data}.zip", args.data_root / f"{args.data}.zip"
    if folder.is_dir():
        return folder
    if args.data not in SETS:
        refuse(f"--data {args.data} is no folder and none of {', '.join(SETS)}")
    if args.data == "cityscapes":
        have = f"photos (leftImg8bit) into {folder}/trainA and testA, colour labels (gtFine) into trainB and testB"
        refuse(f"cityscapes is withheld by its owners: register at cityscapes-dataset.com, and put {have}")
    args.data_root.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(60)  # seconds of silence
    with locked(folder, 3600), blame(f"{url} cannot be had: fetch it by hand as {archive}, or unpack it to {folder}"):
        if folder.is_dir():  # another process has fetched it meanwhile
            return folder
        for stale in args.data_root.glob(f".{SCRIPT}-{args.data}-*"):  # of one that was killed
            shutil.rmtree(stale)
        for last in (True,) if archive.exists() else (False, False, True):
            retried = contextlib.suppress(*() if last else (OSError, EOFError, zipfile.BadZipFile))
            with retried, tempfile.TemporaryDirectory("", f".{SCRIPT}-{args.data}-", args.data_root) as part:
                packed = archive if archive.exists() else Path(part, archive.name)
                if not packed.exists():
                    torch.hub.download_url_to_file(url, str(packed))
                with zipfile.ZipFile(packed) as bundle:
                    if sum(info.file_size for info in bundle.infolist()) > 2**30 + 20 * packed.stat().st_size:
                        raise ValueError("it unpacks to more than a gigabyte and 20 times its size")
                    bundle.extractall(part)  # nothing outside of `part`; each file against its checksum
                os.rename(os.path.join(part, args.data, ""), folder)  # no mere file, by the last slash
                return folder


def find_side(folder, split, side):
    """{name: (file, half)} of one kind of images; half "A" or "B" of images of pairs, else ""; {} if there is no split.

    trainA/ and trainB/, train/A/ and train/B/, A/train/ and B/train/, or A/ and B/; or else, in train/ or here, pairs
    side by side, used as if they were none.
    """
    for part in ("train", ".") if split == "train" else ("test", "val"):
        for a, b in ((f"{part}A", f"{part}B"), (f"{part}/A", f"{part}/B"), (f"A/{part}", f"B/{part}")):
            if (folder / a).is_dir() or (folder / b).is_dir():
                return {name: (file, "") for name, file in find_images(folder / (a if side == "A" else b)).items()}
        if (folder / part).is_dir():
            found = find_images(folder / part).items()
            return {name: (file, side) for name, file in found if not name.startswith(("test/", "val/"))}
    return {}


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


def read_half(args, file, half, size):
    """An image, or its left `half` "A" or right one "B", as uint8 (3, size, size)."""
    image = flatten(read_image(file), 3)
    if half:
        middle = image.width // 2
        image = image.crop((0, 0, middle, image.height) if half == "A" else (middle, 0, image.width, image.height))
    if min(image.size) < args.size:
        refuse(f"{file} has {image.width}x{image.height} pixels{half and ' a half'}: --size {args.size} at least")
    return pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def batches(args, xs, ys, step):
    """Yields epoch, x and y (B, 3, size, size) in [-1, 1] for each update after `step`, all drawn from the seed alone.

    xs and ys are counts and read(i). An epoch is as long as the larger set; y is drawn at random; jitter, a random crop
    out of --load-size, and mirror are each one's own. A batch may reach into the next epoch.
    """
    count = max(xs[0], ys[0])
    orders = functools.lru_cache(2)(lambda epoch: np.random.default_rng([args.seed, epoch]).permutation(count).tolist())
    for first in itertools.count(step * args.batch_size, args.batch_size):
        batch = []
        for k in range(first + RANK, first + args.batch_size, WORLD):
            rng = np.random.default_rng([args.seed, k, 1])
            for pixels in (xs[1](orders(k // count)[k % count] % xs[0]), ys[1](int(rng.integers(ys[0])))):
                top, left = rng.integers(0, args.load_size - args.size + 1, 2)
                pixels = pixels[:, top : top + args.size, left : left + args.size]
                batch.append(pixels.flip(-1) if rng.random() < 0.5 and not args.no_mirror else pixels)
        x, y = (torch.stack(batch[side::2]).to(args.device) / 127.5 - 1 for side in (0, 1))
        yield first // count + 1, x, y


@torch.no_grad()
def there_and_back(args, G, F, pixels):
    """Pillow images of x, uint8 (3, H, W), of G(x) and of F(G(x)).

    x is padded by reflection to what the networks take, and what they give cropped back.
    """
    (h, w), whole = pixels.shape[1:], args.size if args.net == "unet" else 4
    padded = np.pad(pixels.cpu(), ((0, 0), (0, max(-h % whole, 8 - h)), (0, max(-w % whole, 8 - w))), "reflect")
    x = torch.from_numpy(padded)[None].to(args.device) / 127.5 - 1
    with torch.autocast(x.device.type, torch.bfloat16, args.bf16):
        fake = G(x).float()
        shown = torch.cat([x, fake, F(fake).float()])[:, :, :h, :w]
    return [to_pil_image(image) for image in (shown * 127.5 + 127.5).round().byte().cpu()]


def paint(args, state, tests, grid, count, folder=None):
    """A `grid` of x | G(x) | F(G(x)) and y | F(y) | G(F(y)) for `count` tests (Fig. 4); all into `folder` if given."""
    rows, ways = [], (("AtoB", "G", "F"), ("BtoA", "F", "G"))
    for (names, read), (way, there, back) in zip(tests, ways):
        for i, name in enumerate(names if folder else names[:count]):
            images = there_and_back(args, state[there], state[back], read(i))
            if folder:
                with replacing(folder / way / f"{name}.png") as file:
                    images[1].save(file, "PNG")
            if i < count:
                rows.append((i, way, [pil_to_tensor(image) for image in images]))
    cells = [cell for _, _, images in sorted(rows, key=lambda row: row[:2]) for cell in images]
    with replacing(grid) as file:
        to_pil_image(make_grid(cells, 6, pad_value=255)).save(file, "PNG")


def translate(args):
    """Translate --translate, an image or a folder, of any size, by RUN/last.pt. Returns the folder of the results."""
    path, to = args.run / "last.pt", swept(args.to or args.run / "translated")
    found, cells, there = find_images(args.translate), [], args.direction
    if {*map(os.path.realpath, found.values())} & {os.path.realpath(to / f"{name}.png") for name in found}:
        refuse(f"--to {to} would overwrite what is to be translated: choose another folder")
    checkpoint = read_checkpoint(path, args.device)
    with blame(f"{path} is damaged"), Budget(path.stat().st_size + 2**20), warnings.catch_warnings(action="ignore"):
        args = argparse.Namespace(**vars(args) | checkpoint["settings"])
        if args.n_layers > 99:  # the list of their widths alone would take for ever
            raise ValueError(f"it has n_layers {args.n_layers}")
        state = build(args)
        for name in "GF":
            state[name].load_state_dict(checkpoint[name])
    for i, (name, file) in enumerate(found.items()):
        pixels = pil_to_tensor(flatten(read_image(file), 3))
        images = there_and_back(args, *(state[name] for name in ("GF" if there == "AtoB" else "FG")), pixels)
        with replacing(to / f"{name}.png") as file:
            images[1].save(file, "PNG")
        if i < 16:
            fitted = [ImageOps.pad(image, (args.size, args.size), color="white") for image in images]
            cells += [pil_to_tensor(image) for image in fitted]
    with replacing(to.with_name(f"{to.name}-comparison.png")) as file:
        to_pil_image(make_grid(cells, 6, pad_value=255)).save(file, "PNG")
    print(f"translated {len(found)} images to {to}, with {to.name}-comparison.png beside it")
    return to


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


def gathered(x):
    """x (N, ...) of all processes, in the order of the whole batch. -> (WORLD * N, ...)"""
    if WORLD == 1:
        return x
    dist.all_gather(parts := [torch.empty_like(x) for _ in range(WORLD)], x)
    return torch.stack(parts, 1).flatten(0, 1)


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


def main(argv=None):  # same as pix2pix.py
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
