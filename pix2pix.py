# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11"]
# ///
"""pix2pix: a conditional GAN that turns one kind of image into another, learned from pairs.

Isola, Zhu, Zhou, Efros: Image-to-Image Translation with Conditional Adversarial Networks. CVPR 2017, arXiv:1611.07004.
G maps an input x to an output G(x); D looks at x and an output, patch by patch, and tells a real y from G(x):
    G* = arg min_G max_D  E[log D(x, y)] + E[log(1 - D(x, G(x)))] + lambda E|y - G(x)|          (Eq. 4)
Where the paper is silent this follows the authors' Torch code: one pass of D over G(x) serves D's loss and G's.
It departs in one place, as their later code does: no norm at the 1x1 bottleneck, which it would wipe out.

    python pix2pix.py                                          # train on toy streets, drawn here, in minutes on a CPU
    python pix2pix.py --data facades                           # download, train; stop it and repeat this: it goes on
    python pix2pix.py --data facades --translate labels.png    # use what was trained, on an image or a folder
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFilter, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

SCRIPT, HOST = "pix2pix", "http://efrosgans.eecs.berkeley.edu/pix2pix/datasets/"
SETS = {  # the named sets, and what each changes
    "toy": dict(size=64, load_size=64, ngf=32, ndf=32, epochs=12, batch_size=4, save_every=600),
    "facades": dict(direction="BtoA"),
    "maps": dict(),
    "cityscapes": dict(direction="BtoA"),
    "edges2shoes": dict(epochs=15, batch_size=4),
    "edges2handbags": dict(epochs=15, batch_size=4),
    "night2day": dict(direction="BtoA", epochs=17, batch_size=4),
}
BYTES = {"facades": 30168306}  # lengths of archives, where known
CHANNELS = {"gray": (1, 2), "hole": (3, 3), "edges": (1, 3)}  # channels of input and output, by --from
MODES = (None, "L", "LA", "RGB", "RGBA")  # Pillow's names for so many channels
SRGB, LAB = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")


def get_args(argv=None):
    """Settings from `argv` or the command line; what is not given is the paper's, or that of the set."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error, add = refuse, parser.add_argument
    add("--data", default="toy", help=f"{', '.join(SETS)}, or a folder: side-by-side images, or A/ and B/")
    add("--data-root", type=Path, default=Path("data"), help="where downloads go, or lie already")
    add("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="which half is the input; A is the left one")
    add("--from", dest="source", choices=tuple(CHANNELS), help="make the pairs from a folder of photos")
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
    add("--save-every", type=int, default=2000, help="updates between checkpoints; ten minutes at most")
    add("--fresh", action="store_true", help="start over; the old run is kept as DIR.old-N")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (the accelerator, if there is one)")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: bf16 where the device is fast at it",
    )
    add("--translate", type=Path, metavar="PATH", help="translate an image or a folder with what was trained")
    add("--to", type=Path, help="folder for translations (RUN/translated)")
    add("--eval", action="store_true", help="translate without dropout, with running averages, unlike the paper")
    parser.set_defaults(**SETS.get(parser.parse_known_args(argv)[0].data, {}))
    args = parser.parse_args(argv)
    args.load_size = args.load_size or args.size * 286 // 256
    args.run = args.run or Path("runs", f"{SCRIPT}-{Path(args.data).resolve().name}")
    args.device = args.device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    for name, value in vars(args).items():
        least = 0 if name in ("lambda_l1", "n_layers", "decay_epochs", "lr", "seed") else 1
        if type(value) in (int, float) and not least <= value < math.inf:
            refuse(f"--{name.replace('_', '-')} {value}: give {least} or more")
    if args.source:
        args.in_channels, args.out_channels = CHANNELS[args.source]
    if args.size & (args.size - 1) or args.size < 16 or args.size > args.load_size:
        refuse(f"--size {args.size}: give a power of two from 16 up to --load-size, {args.load_size}")
    if args.n_layers and args.size >> args.n_layers < 3:
        refuse(f"--n-layers {args.n_layers} leaves nothing of {args.size} pixels: lower it or raise --size")
    if args.source and (args.data in SETS or args.direction == "BtoA"):
        refuse(f"--from {args.source} needs a folder of photos as --data, and no --direction")
    with blame(f"--device {args.device} is not to be had on this machine: leave it out to use what there is"):
        torch.zeros(1, device=args.device).item()
    return args


# -- the method ------------------------------------------------------------------------------------------------------

NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}


class Generator(nn.Module):
    """U-Net (Sec. 3.2): encoder C64-C128-C256-C512-C512-C512-C512-C512 and its mirror, level i joined to level n - i.

    Every convolution is 4x4 with stride 2, one for each factor of two in `size`; innermost is a 1x1 map.
    x (N, in_channels, H, W) in [-1, 1], H and W multiples of `size` -> (N, out_channels, H, W) in [-1, 1].
    """

    def __init__(self, in_channels=3, out_channels=3, size=256, ngf=64, norm="batch", skips=True):
        super().__init__()
        Norm, bias = NORMS[norm], norm == "instance"  # batch norm has a shift of its own
        depth, self.skips = int(math.log2(size)), skips
        width = [ngf * min(2**i, 8) for i in range(depth)]
        self.down = nn.ModuleList([nn.Conv2d(in_channels, ngf, 4, 2, 1, bias=bias)])
        self.up = nn.ModuleList()
        for i in range(1, depth):
            layers = [nn.LeakyReLU(0.2), nn.Conv2d(width[i - 1], width[i], 4, 2, 1, bias=bias), Norm(width[i])]
            self.down.append(nn.Sequential(*layers[: 3 if i < depth - 1 else 2]))  # a normalised 1x1 map holds nothing
        for i in reversed(range(1, depth)):
            joined = 2 * width[i] if skips and i < depth - 1 else width[i]
            layers = [nn.ReLU(), nn.ConvTranspose2d(joined, width[i - 1], 4, 2, 1, bias=bias), Norm(width[i - 1])]
            if i >= depth - 3:  # z is dropout, in the three innermost levels, at test time too (Sec. 3.1)
                layers.append(nn.Dropout(0.5))
            self.up.append(nn.Sequential(*layers))
        joined = 2 * ngf if skips else ngf
        self.up.append(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(joined, out_channels, 4, 2, 1), nn.Tanh()))

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
    """PatchGAN (Sec. 3.2): C64-C128-C256-C512, a logit for each patch of 70x70 pixels, with three strided layers.

    1, 2, 4 or 5 strided layers see 16, 34, 142 or 286 pixels; 0 is PixelGAN, C64-C128 with 1x1 kernels.
    x (N, in_channels, H, W) in [-1, 1] -> logits (N, 1, h, w): 30x30 for 70x70 patches of 256x256.
    """

    def __init__(self, in_channels=6, ndf=64, n_layers=3, norm="batch"):
        super().__init__()
        Norm, bias = NORMS[norm], norm == "instance"
        kernel, stride, pad = (4, 2, 1) if n_layers else (1, 1, 0)
        width = [ndf * min(2**i, 8) for i in range(max(n_layers, 1) + 1)]
        layers = [nn.Conv2d(in_channels, ndf, kernel, stride, pad), nn.LeakyReLU(0.2)]  # no norm on the first
        for i in range(1, len(width)):
            stride = 2 if i < n_layers else 1
            layers.append(nn.Conv2d(width[i - 1], width[i], kernel, stride, pad, bias=bias))
            layers += [Norm(width[i]), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width[-1], 1, kernel, 1, pad, bias=bias or n_layers > 0))

    def forward(self, x):
        return self.layers(x)


def init_weights(module):
    """N(0, .02) for convolutions, N(1, .02) for the gain of batch norm, zero for biases (Sec. 3.3, authors' code)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def gan_loss(logits, real):
    """-log D if `real`, else -log(1 - D), mean over all patches; D = sigmoid(logits). (N, 1, h, w) -> 0-d."""
    return F.softplus(-logits.float() if real else logits.float()).mean()


def build(args):
    """{name: network or optimiser}: all that is learned, on args.device; a checkpoint holds their states."""
    torch.manual_seed(args.seed)
    seen = args.out_channels + (args.in_channels if "cgan" in args.loss else 0)  # an unconditional D sees no x
    G = Generator(args.in_channels, args.out_channels, args.size, args.ngf, args.norm, not args.no_skips)
    D = Discriminator(seen, args.ndf, args.n_layers, args.norm)
    state = {name: net.apply(init_weights).to(args.device) for name, net in (("G", G), ("D", D))}
    for name in ("G", "D"):  # the rate is a tensor, so that a recorded step follows the schedule
        rate = torch.tensor(args.lr, device=args.device)
        state[f"opt_{name}"] = torch.optim.Adam(state[name].parameters(), rate, betas=(0.5, 0.999), fused=True)
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
        with autocast(args):
            fake = G(x)
            if "gan" in args.loss:  # a pass for each, as batch norm needs the statistics of each
                on_real = D(torch.cat([x, y], 1) if "cgan" in args.loss else y)
                on_fake = D(torch.cat([x, fake], 1) if "cgan" in args.loss else fake)
        if "gan" in args.loss:
            # D: max log D(x, y) + log(1 - D(x, G(x))), halved so that D learns slower than G (Sec. 3.3)
            losses["loss_D"] = (gan_loss(on_real, True) + gan_loss(on_fake, False)) / 2
            losses["loss_D"].backward(inputs=list(D.parameters()), retain_graph=True)
            # G: max log D(x, G(x)), which does not saturate, instead of min log(1 - D(x, G(x))) (Sec. 3.3)
            losses["loss_G"] = loss_G = gan_loss(on_fake, True)
        if "l1" in args.loss:  # and min lambda |y - G(x)| (Eq. 3)
            losses["loss_l1"] = F.l1_loss(fake.float(), y)
            loss_G = loss_G + args.lambda_l1 * losses["loss_l1"]
        loss_G.backward(inputs=list(G.parameters()))
        opt_D.step()
        opt_G.step()
        return {name: loss.detach() for name, loss in losses.items()}

    return step


def train(args):
    """Train for --epochs, from RUN/last.pt if it is there, then translate the test split. Returns the run folder."""
    data, tests = load_pairs(args, "train"), load_pairs(args, "test")
    state = build(args)
    begun = resume(args, state, len(data))
    goal = min(math.ceil(args.epochs * len(data) / args.batch_size), args.max_steps or math.inf)
    update, row, saved = make_step(args, state), (time.monotonic(), begun), time.monotonic()
    with signals() as stopped:
        for step, (epoch, x, y) in zip(range(begun + 1, goal + 1), batches(args, data, begun)):
            decay = max(0, epoch - args.epochs + args.decay_epochs) / (args.decay_epochs + 1)
            for optimiser in (state["opt_D"], state["opt_G"]):
                optimiser.param_groups[0]["lr"].fill_(args.lr * (1 - decay))
            losses = update(x, y)
            saving = stopped or step == goal or step % args.save_every == 0 or time.monotonic() - saved > 600
            row = report(args, step, goal, epoch, losses, row, saving or step == begun + 1)
            if saving:
                save(args, state, step, len(data))
                if stopped:
                    sys.exit(128 + stopped[0])
                paint(args, state["G"], [*tests.items()][:4], args.run / "samples" / f"{step:07}.png")
                saved = time.monotonic()
    if not (grid := args.run / "samples" / f"{goal:07}-test.png").exists():
        paint(args, state["G"], tests.items(), grid, args.run / "test")
    print(f"{args.run} is finished, {goal} updates: {grid} shows the test split; --fresh starts over")
    return args.run


# -- the house -------------------------------------------------------------------------------------------------------


def refuse(sentence):
    """Bad input ends in one sentence, by way of `main`, and exit status 2."""
    raise SystemExit(f"{SCRIPT}.py: {sentence}")


@contextlib.contextmanager
def blame(what):
    """Refuse `what` if anything at all goes wrong: files that others wrote fail in many ways."""
    try:
        yield
    except Exception as error:
        refuse(f"{what} ({str(error).partition(chr(10))[0] or type(error).__name__})")


@contextlib.contextmanager
def replacing(path):
    """A file to write to, which becomes `path` when it is whole and on the disk, and is gone if anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def autocast(args):
    """Bfloat16 in networks, if asked for, or by itself where the device is built for it: recent GPUs, CPUs with AMX."""
    kind = torch.device(args.device).type
    fast = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    fast = fast or kind == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.autocast(kind, torch.bfloat16, enabled=fast if args.precision == "auto" else args.precision == "bf16")


def streets(count, seed, size=64):
    """Toy scenes: maps (N, 3, size, size), photos (N, 3, size, size) and class ids (N, size, size), all uint8.

    Blocks of ground (0), buildings (1) and parks (2) between roads (3), a river (4) through some. A map is flat colours;
    in a photo each class is a texture of random phase, and 0, 1 and 2 have the same mean colour.
    """
    rng, (row, col) = np.random.default_rng(seed), np.mgrid[:size, :size]
    colour = np.array([(240, 236, 224), (196, 120, 104), (124, 190, 110), (255, 214, 90), (110, 168, 220)], np.uint8)
    mean = np.array([(132, 126, 112), (132, 126, 112), (132, 126, 112), (82, 82, 90), (58, 92, 122)])
    photos, ids = np.empty((count, size, size, 3), np.uint8), np.empty((count, size, size), np.uint8)
    for photo, label in zip(photos, ids):
        angle, phase = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi, 5)
        u, v = (row * math.cos(a) + col * math.sin(a) + rng.uniform(2, 3) * size for a in (angle, angle + math.pi / 2))
        wide, tall = rng.uniform(18, 30, 2)
        label[:] = rng.integers(0, 3, (size, size))[(u // wide).astype(int), (v // tall).astype(int)]
        label[(u % wide < 5) | (v % tall < 5)] = 3
        label[abs(u + 6 * np.sin(v / 9 + phase[0]) - rng.uniform(1, 4.5) * size) < 5] = 4
        grain, stripes, waves = rng.normal(0, 1, (size, size)), np.sin(1.3 * u + phase[1]), np.sin(0.8 * v + phase[2])
        weave = np.sin(0.9 * row + phase[3]) * np.sin(0.9 * col + phase[4])
        texture = np.choose(label, [11 * grain, 48 * stripes, 70 * weave, 3 * grain, 14 * waves])
        photo[:] = (mean[label] + texture[..., None]).clip(0, 255)
    return colour[ids].transpose(0, 3, 1, 2), photos.transpose(0, 3, 1, 2), ids


def load_pairs(args, split):
    """{name: uint8 (in + out channels, S, S)}: the pairs of "train" at --load-size, or of "test" at --size.

    A folder is decoded once, and so checked before training, into a hidden file in it (below --data-root where it is
    read-only) that is mapped into memory. A GPU holds the pairs if they fit in a quarter of what is free there.
    """
    size = args.load_size if split == "train" else args.size
    if args.data == "toy":
        scenes = streets(600 if split == "train" else 100, split != "train", size)
        pairs = torch.from_numpy(np.concatenate(scenes[1::-1] if args.direction == "BtoA" else scenes[:2], 1))
        return {f"{i:03}": pair for i, pair in enumerate(pairs.to(args.device))}
    folder = find_data(args)
    found = find_pairs(args, folder, split) or dict([*find_pairs(args, folder, "train").items()][:16])  # no test split
    shape = (len(found), args.in_channels + args.out_channels, size, size)
    home = folder if os.access(folder, os.W_OK) else args.data_root / "cache" / folder.resolve().name
    cache = home / f".{SCRIPT}-{split}-{'x'.join(map(str, shape[1:]))}-{args.direction}-{args.source}.cache"
    changed = max(file.stat().st_ctime for files in found.values() for file in files)
    if not cache.exists() or cache.stat().st_size != math.prod(shape) or cache.stat().st_mtime < changed:
        with replacing(cache) as file, ThreadPoolExecutor() as pool:
            for i in range(0, len(found), 64):  # a few at a time, so that memory stays flat
                for pair in pool.map(lambda files: read_pair(args, files, size), [*found.values()][i : i + 64]):
                    file.write(pair.numpy())
                if i % 1024 == 0:
                    print(f"decoding {folder}, once: image {i + 1} of {len(found)}", flush=True)
    pairs = torch.from_file(str(cache), size=math.prod(shape), dtype=torch.uint8).view(shape)
    if "cuda" in args.device and pairs.nbytes < torch.cuda.mem_get_info()[0] // 4:
        pairs = pairs.to(args.device)
    return dict(zip(found, pairs))


def find_data(args):
    """The folder that --data means; a named set lies below --data-root, or is downloaded to there."""
    folder = args.data_root / args.data if args.data in SETS else Path(args.data)
    archive, part = args.data_root / f"{args.data}.tar.gz", args.data_root / f".{args.data}.part"
    if folder.is_dir():
        return folder
    if args.data not in SETS:
        refuse(f"--data {args.data} is no folder and none of {', '.join(SETS)}")
    if args.data == "cityscapes":
        refuse(
            "cityscapes is withheld by its owners: register at cityscapes-dataset.com, fetch leftImg8bit_trainvaltest and"
            f" gtFine_trainvaltest, and put photos into {folder}/trainA and testA, colour labels into trainB and testB"
        )
    with blame(f"{HOST}{archive.name} cannot be had: fetch it by hand as {archive}, or unpack it to {folder}"):
        for attempt in range(3):
            if not archive.exists():
                print(f"downloading {HOST}{archive.name}", flush=True)
                args.data_root.mkdir(parents=True, exist_ok=True)
                with contextlib.nullcontext() if attempt == 2 else contextlib.suppress(OSError):
                    torch.hub.download_url_to_file(HOST + archive.name, str(archive))
        if archive.stat().st_size != BYTES.get(args.data, archive.stat().st_size):
            raise OSError(f"{archive} should have {BYTES[args.data]} bytes: delete it")
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")  # nothing outside of `part`, no device, no link out of it
        os.replace(part / args.data, folder)
    return folder


def find_pairs(args, folder, split):
    """{name: (file,)} of images with two halves, or photos for --from, or {name: (A, B)}; {} without a test split."""
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


def find_images(folder):
    """{name: file} of all images below `folder`, in order; a name keeps its suffix where it would be another's."""
    suffixes, found = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"), {}
    for file in sorted(folder.rglob("[!.]*")):
        if file.suffix.lower() in suffixes:
            name = file.relative_to(folder)
            stem = name.with_suffix("").as_posix()
            found[name.as_posix() if stem in found else stem] = file
    return found or refuse(f"{folder} holds no images ({', '.join(suffixes)})")


def read_image(path, mode):
    """An image of any usual kind, upright, with 8 bits, in Pillow's `mode`; what is transparent shows white."""
    with blame(f"{path} cannot be read as an image"), Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # 16 bits, or floats up to 1
            values = np.asarray(image, np.float64)
            full = 65535 if image.mode[1:] or values.max() > 255 else 255 if values.max() > 1 else 1
            image = Image.fromarray(np.uint8((values / full * 255).round().clip(0, 255)))
        if image.has_transparency_data and "A" not in mode:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert(mode)


def read_pair(args, files, size):
    """A pair as uint8 (in + out channels, size, size): from two files, from the halves of one, or --from a photo."""
    turn = -1 if args.direction == "BtoA" else 1
    modes = (MODES[args.in_channels], MODES[args.out_channels])[::turn]  # of A and B
    images = [read_image(file, "RGB" if args.source else max(modes, key=len)) for file in files]
    if len(files) == 1 and not args.source:
        (w, h), half = images[0].size, images[0].width // 2
        images = [images[0].crop(box) for box in ((0, 0, half, h), (half, 0, w, h))]
    if images[0].size != images[-1].size or min(images[0].size) < args.size:
        sizes = " and ".join(f"{image.width}x{image.height}" for image in images)
        refuse(
            f"{' and '.join(map(str, files))}: {sizes} pixels; halves must be equal and no smaller than --size {args.size}"
        )
    images = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    images = from_photo(args, images[0]) if args.source else [i.convert(m) for i, m in zip(images, modes)][::turn]
    return torch.cat([pil_to_tensor(image) for image in images])


def from_photo(args, photo):
    """Input and output made of a photo: its L and ab (Lab, ab/110 as in the authors' code), its edges, or itself twice."""
    if args.source == "gray":  # Pillow's a and b are 128 where there is no colour
        light, *ab = ImageCms.profileToProfile(photo, SRGB, LAB, outputMode="LAB").split()
        return light, Image.merge("LA", [band.point(lambda v: (v - 128) / 110 * 127.5 + 127.5) for band in ab])
    if args.source == "edges":  # where the blurred photo is steep; the paper's HED edges need a network of their own
        down, right = np.gradient(np.float32(photo.convert("L").filter(ImageFilter.GaussianBlur(1))))
        return Image.fromarray(np.uint8(255 * (np.hypot(down, right) < 12))), photo
    return photo, photo


def to_xy(args, pixels):
    """uint8 (N, C, H, W) to x and y in [-1, 1] on the device; inpainting cuts the middle, half as wide, out of x."""
    x, y = (pixels.to(args.device) / 127.5 - 1).tensor_split([args.in_channels], 1)
    if args.source == "hole":
        high, wide = x.shape[2] // 4, x.shape[3] // 4
        x[..., high:-high, wide:-wide] = 1
    return x, y


def batches(args, data, step):
    """Yields epoch, x and y (B, C, size, size) in [-1, 1] for each update after `step`, all drawn from the seed alone.

    Jitter is a random crop out of --load-size; crop and mirror are the same for x and y. A batch may span two epochs.
    """
    pairs, epoch, batch = [*data.values()], 0, []
    for k in itertools.count(step * args.batch_size):
        if k // len(pairs) + 1 != epoch:
            epoch = k // len(pairs) + 1
            order = np.random.default_rng([args.seed, epoch]).permutation(len(pairs))
        rng = np.random.default_rng([args.seed, epoch, k])
        top, left = rng.integers(0, args.load_size - args.size + 1, 2)
        pair = pairs[order[k % len(pairs)]][:, top : top + args.size, left : left + args.size]
        batch.append(pair.flip(-1) if rng.random() < 0.5 and not args.no_mirror else pair)
        if len(batch) == args.batch_size:
            yield epoch, *to_xy(args, torch.stack(batch))
            batch = []


def paint(args, G, items, grid, folder=None):
    """Put each (name, uint8 (C, H, W)) of `items` through G, into `folder` if given, and the first 16 into one `grid`.

    As in training, G has dropout and batch statistics (Sec. 3.3), unless --eval; each image starts from the seed. It is
    padded by reflection to multiples of --size, and cropped back. The grid shows input | output | target, if there is one.
    """
    G, cells = deepcopy(G).train(not args.eval), []  # a copy, as batch norm keeps averages of what it sees
    for name, pixels in items:
        h, w = pixels.shape[1:]
        padded = np.pad(pixels.cpu(), ((0, 0), (0, -h % args.size), (0, -w % args.size)), "reflect")
        x, y = to_xy(args, torch.from_numpy(padded)[None])
        with torch.random.fork_rng([args.device] if "cuda" in args.device else []), torch.no_grad(), autocast(args):
            torch.manual_seed(args.seed)
            shown = [x, G(x).float(), y][: 3 if y.shape[1] else 2]
        images = [picture(args, image[0, :, :h, :w], x[0, :, :h, :w]) for image in shown]
        if folder:
            with replacing(folder / f"{name}.png") as file:
                images[1].save(file, "PNG")
        if len(cells) < 16 * len(shown):
            cells += [pil_to_tensor(ImageOps.pad(image.convert("RGB"), (args.size, args.size))) for image in images]
    with replacing(grid) as file:
        to_pil_image(make_grid(cells, 2 * len(shown), pad_value=255)).save(file, "PNG")


def picture(args, image, x):
    """(C, H, W) in [-1, 1] as a Pillow image; in colorization ab is joined to the L of the input x."""
    if args.source != "gray" or len(image) == 1:
        return to_pil_image((image * 127.5 + 127.5).round().byte().cpu())
    bands = [to_pil_image(band) for band in torch.cat([x * 127.5 + 127.5, image * 110 + 128]).round().byte().cpu()]
    return ImageCms.profileToProfile(Image.merge("LAB", bands), LAB, SRGB, outputMode="RGB")


def translate(args):
    """Translate --translate, an image or a folder, of any size, by RUN/last.pt. Returns the folder with the results.

    Colorization takes the L of a photo, edges are drawn unless the image is grey already, a hole is cut in the middle.
    """
    source, to = args.translate, args.to or args.run / "translated"
    checkpoint = read_checkpoint(args.run / "last.pt")
    args = argparse.Namespace(**vars(args) | checkpoint["settings"])
    with blame(f"{args.run / 'last.pt'} is damaged"):
        G = build(args)["G"]
        G.load_state_dict(checkpoint["G"])

    def pixels(file):
        image = read_image(file, "RGB" if args.source else MODES[args.in_channels])
        drawn = args.source == "edges" and not np.ptp(image, 2).any()
        return pil_to_tensor(image.convert("L") if drawn else from_photo(args, image)[0])

    files = find_images(source) if source.is_dir() else {source.stem: source}
    paint(args, G, ((name, pixels(file)) for name, file in files.items()), to / "comparison.png", to)
    print(f"{len(files)} images translated to {to}, compared in {to / 'comparison.png'}")
    return to


def settings(args, count):
    """What decides what is learned, which a run that goes on must share: options, name of the data, number of pairs."""
    free = ("data_root", "run", "max_steps", "save_every", "fresh", "device", "translate", "to", "eval")
    kept = {name: value for name, value in vars(args).items() if name not in free}
    return kept | {"data": Path(args.data).resolve().name, "pairs": count}


def save(args, state, step, count):
    """Write RUN/last.pt, from which the run goes on and images are translated; not if a weight is not finite."""
    for name in ("G", "D"):
        if not all(weight.isfinite().all() for weight in state[name].parameters()):
            refuse(
                f"update {step} made {name} not finite: {args.run}/last.pt stays as it was; try a lower --lr, or fp32"
            )
    random = [torch.get_rng_state(), torch.cuda.get_rng_state() if "cuda" in args.device else None]
    about = {"script": SCRIPT, "version": 1, "step": step, "settings": settings(args, count), "random": random}
    about["log"] = (args.run / "log.jsonl").stat().st_size
    with replacing(args.run / "last.pt") as file:
        torch.save(about | {name: part.state_dict() for name, part in state.items()}, file)


def read_checkpoint(path):
    """The dict that `save` wrote to `path`; no code in it is ever run."""
    if not path.exists():
        refuse(f"{path} is missing: train first, or name the run with --run")
    with blame(f"{path} is damaged, or no checkpoint: --fresh starts over and keeps it"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if (checkpoint["script"], checkpoint["version"]) != (SCRIPT, 1):
            refuse(f"{path} was written by {checkpoint['script']}.py, version {checkpoint['version']}")
        return checkpoint


def resume(args, state, count):
    """Make RUN, or go on with it: load RUN/last.pt if it is there. Returns the step it was saved at, or 0."""
    if args.fresh and args.run.exists():
        olds = (args.run.with_name(f"{args.run.name}.old-{n}") for n in itertools.count(1))
        args.run.rename(next(old for old in olds if not old.exists()))
    path, now, then = args.run / "last.pt", settings(args, count), {"step": 0, "log": 0}
    if path.exists():
        then = read_checkpoint(path)
        old = then["settings"]
        if differ := [f"{name} was {old.get(name)}, is {now[name]}" for name in now if now[name] != old.get(name)]:
            refuse(f"{args.run} was begun with other settings ({'; '.join(differ)}): repeat those, or use --fresh")
        with blame(f"{path} is damaged: --fresh starts over and keeps it"):
            for name, part in state.items():
                part.load_state_dict(then[name])
            torch.set_rng_state(then["random"][0])
            if "cuda" in args.device and then["random"][1] is not None:
                torch.cuda.set_rng_state(then["random"][1])
    with replacing(args.run / "config.json") as file:
        file.write(json.dumps(now | {"torch": torch.__version__}, indent=2).encode())
    with open(args.run / "log.jsonl", "ab") as log:  # what was logged after the checkpoint will be logged again
        log.truncate(min(log.tell(), then["log"]))
    return then["step"]


def report(args, step, goal, epoch, losses, last, must):
    """A line on the screen and a row in RUN/log.jsonl, every ten seconds, every second on a terminal, or if it `must`.

    Takes and returns the time and the step of the `last` row. A loss that is not finite ends the run.
    """
    now, terminal = time.monotonic(), sys.stdout.isatty()
    due = must or now - last[0] > (1 if terminal else 10)
    if not due and args.device != "cpu":  # reading a loss makes the host wait for the device
        return last
    values = {name: loss.item() for name, loss in losses.items()}
    if not all(map(math.isfinite, values.values())):
        refuse(
            f"update {step} has a loss that is not finite, {values}; {args.run}/last.pt stays as it was: lower --lr, or --precision fp32"
        )
    if not due:
        return last
    rate = (step - last[1]) * args.batch_size / (now - last[0])
    with open(args.run / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": step, "epoch": epoch, **values, "images_per_s": round(rate, 2)}) + "\n")
    left = timedelta(seconds=round((goal - step) * args.batch_size / rate))
    shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
    text = f"{step}/{goal}  epoch {epoch}  {shown}  {rate:.1f} images/s  {left} left"
    print(f"\r{text:<100}" if terminal else text, end="" if terminal and step < goal else "\n", flush=True)
    return now, step


@contextlib.contextmanager
def signals():
    """A list onto which SIGINT and SIGTERM are put, so that the loop can save before it ends."""
    caught, kinds = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, frame: caught.append(number)) for kind in kinds]
    try:
        yield caught
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)


def main(argv=None):
    """Train or translate. What goes wrong outside of this code ends in one sentence and exit status 2."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        args = get_args(argv)
        return (translate if args.translate else train)(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        sentence = end.code
    except OSError as error:  # a full disk, a folder that must not be written to
        sentence = f"{SCRIPT}.py: {error.filename or 'writing'}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        sentence = f"{SCRIPT}.py: out of memory: lower --batch-size or --size"
    print(sentence, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
