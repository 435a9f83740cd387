# /// script
# requires-python = ">=3.11.4"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "tqdm>=4.66", "filelock>=3"]
# ///
"""Text to image: a GAN that draws what a sentence says.

Reed, Akata, Yan, Logeswaran, Schiele, Lee: Generative Adversarial Text to Image Synthesis. ICML 2016, arXiv:1605.05396.
First an encoder E of sentences learns together with an encoder V of images (Reed, Akata, Lee, Schiele, CVPR 2016,
arXiv:1605.05395). Then G draws x from noise z and a code t = E(sentence), and D tells what belongs together:
    max_D  log D(x, t) + (log(1 - D(x, t')) + log(1 - D(G(z, t), t))) / 2, t' of another class       (Alg. 1: CLS)
    max_G  log D(G(z, t), t), a third of the codes midway between those of two sentences           (Sec. 4.3: INT)
Last, G is fixed and S learns to find its z:  min_S |z - S(G(z, t))|^2                           (Sec. 4.4: style)

    python text2img.py                        # train on toy shapes, drawn here: minutes on a CPU
    python text2img.py --data FOLDER          # NAME.jpg with captions in NAME.txt, one a line
    python text2img.py --prompt "a large green circle on a red background" --sample 16

Departures: residual branches (--no-residual) and batch norm on D's text are in the authors' code alone. All pairs pass
D's last layers in one batch, and one pass serves both updates: in passes apart, as in their code, batch norm let D tell
right from wrong by the batch. V is a small network, not a GoogLeNet; gradients of E and V are clipped. Codes have mean
0 and spread 1. Toy takes the nearest of 16 wrong sentences (--near): most differ in a colour, and D ignored the form.
Toy shows D two images of a sentence at once (--pack; Lin et al. 2018, arXiv:1712.04086): with one, G ignored z. Its
inks are lighter than its grounds, so that z moves shapes alike in all sentences and S finds them.
"""

import argparse
import contextlib
import copy
import functools
import glob
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import textwrap
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
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

METHOD, SCRIPT = "text2img", Path(__file__).stem
SETS = {  # the named sets, and which defaults each changes
    "toy": dict(size=32, load_size=34, text=256, nt=32, nz=16, ngf=32, ndf=32, nef=64, nif=96, no_residual=True, pack=2)
    | dict(near=16, average=1, batch_size=32, lr=4e-4, text_lr=1e-3, text_epochs=12, epochs=42, style_epochs=6)
    | dict(halve_every=14, save_every=1000),
}
FIXED = "white size load_size no_cls no_int no_residual text nt nz ngf ndf nef nif near average pack seed".split()
FIXED += ["text_epochs", "style_epochs"]  # else the phases would shift
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "  # as in the authors' code
INKS = dict(white=(240, 240, 240), yellow=(245, 220, 60), pink=(250, 130, 190), cyan=(90, 220, 235))
INKS["green"] = (90, 215, 90)
GROUNDS = dict(black=(45, 45, 45), blue=(45, 50, 140), red=(140, 45, 45), purple=(105, 45, 125), teal=(40, 95, 95))
VALUES = ("circle", "ring", "bar"), tuple(INKS), ("small", "large"), tuple(GROUNDS)  # form, ink, size, ground
SENTENCES = [
    "a {2} {1} {0} on a {3} background",
    "on a {3} background a {2} {1} {0}",
    "a {1} {0} that is {2} and the background is {3}",
    "a {2} {0} in {1} on {3} ground",
    "a {1} {0} on {3} ground, and it is {2}",
    "{3} background, {2} {1} {0}",
]
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
    add("--data", default="toy", help="a folder of images with captions, or toy")
    add("--data-root", type=Path, default="data", help="for decoded images")
    add("--white", type=int, default=65535, help="16-bit pixel value that is white")
    add("--size", type=int, choices=(16, 32, 64, 128), default=64, help="of a crop")
    add("--load-size", type=int, help="of an image before the random crop; None: 19 / 16 of --size")
    add = parser.add_argument_group("method").add_argument
    add("--no-cls", action="store_true", help="D does not learn from wrong sentences")
    add("--no-int", action="store_true", help="G learns from no mixtures of codes")
    add("--no-residual", action="store_true", help="the paper's networks: no residual branches")
    add("--near", type=int, default=1, help="wrong sentences; the nearest is taken")
    add("--average", type=int, default=4, help="captions of an image, averaged into one code")
    add("--pack", type=int, default=1, help="images of a sentence that D sees at once (PacGAN)")
    add("--text", type=int, default=1024, help="numbers in the code of a sentence")
    add("--nt", type=int, default=128, help="numbers in it in G and D")
    add("--nz", type=int, default=100, help="numbers in z")
    add("--ngf", type=int, default=128, help="channels of G's last hidden layer")
    add("--ndf", type=int, default=64, help="channels of the first layer of D and S")
    add("--nef", type=int, default=256, help="units of E, which encodes text")
    add("--nif", type=int, default=256, help="last channels of V, which encodes images")
    add = parser.add_argument_group("training").add_argument
    add("--text-epochs", type=int, default=200, help="passes over the images for E and V")
    add("--epochs", type=int, default=600, help="passes for G and D, after that; cannot grow once S has begun")
    add("--style-epochs", type=int, default=20, help="passes for S, which encodes style")
    add("--batch-size", type=int, default=64, help="images, all processes together")
    add("--lr", type=float, default=2e-4, help="learning rate of Adam for G, D and S")
    add("--halve-every", type=int, default=100, help="epochs between halvings of --lr for G and D")
    add("--text-lr", type=float, default=7e-4, help="learning rate of RMSprop for E and V")
    add("--seed", type=int, default=0, help="of weights, order, crops, sentences and z")
    add("--out", type=Path, help=f"run folder; None: runs/{SCRIPT}-DATA")
    add("--init", type=Path, metavar="RUN", help="start from the weights of another run (fine-tuning)")
    add("--max-steps", type=int, help="stop after this many updates in all")
    add("--save-every", type=int, help="updates between checkpoints; None: ten minutes")
    add("--fresh", action="store_true", help="start anew: delete checkpoint, log and pictures")
    add("--device", help="cpu, cuda, cuda:1, mps, ...; None: the accelerator, if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the device has it")
    add("--no-capture", action="store_true", help="do not use a CUDA graph")
    add = parser.add_argument_group("use of a trained model").add_argument
    add("--prompt", help="use G on a sentence, or on each line of a text file")
    add("--sample", type=int, metavar="N", help="images of each sentence of --prompt; None: 16")
    add("--to", type=Path, help="folder for them; None: OUT/sampled")
    data = parser.parse_known_args(argv)[0].data  # first, as the other defaults depend on it
    data = f"./{data}" if data in SETS and Path(data).is_dir() else data  # a folder that is there comes first
    parser.set_defaults(**SETS.get(data, {}))
    parser.add_argument("-h", "--help", action="help", help="show this; --data sets the defaults")
    args = parser.parse_args(argv)
    args.data, args.load_size = data, args.load_size or args.size * 19 // 16
    check_args(args, may_be_zero=("text_epochs", "style_epochs", "lr", "text_lr", "seed"))
    if args.load_size < args.size:
        fail(f"--load-size {args.load_size} is less than --size {args.size}")
    if args.prompt is None and (args.sample or args.to):
        fail("--sample and --to need --prompt, the sentence to draw")
    if args.batch_size < 2:
        fail("--batch-size 1: what is wrong for one image needs another")
    return args


# -- the method ------------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """E: characters (N, 201) -> codes (N, text): convolutions, then a recurrent layer whose states are averaged."""

    def __init__(self, text=1024, nef=256):
        super().__init__()
        self.register_buffer("mean", torch.zeros(text))  # of the codes of all training captions, and their spread
        self.register_buffer("spread", torch.ones(()))
        width, layers = [70, nef * 3 // 2, nef * 2, nef], []  # 384, 512, 256
        for i, stride in enumerate((3, 3, 2)):
            layers += [nn.Conv1d(width[i], width[i + 1], 4), nn.ReLU(), nn.MaxPool1d(3, stride)]
        self.convs = nn.Sequential(*layers)
        self.inward, self.onward, self.last = nn.Linear(nef, nef), nn.Linear(nef, nef), nn.Linear(nef, text)

    def forward(self, chars):
        one_hot = (chars[..., None] == torch.arange(1, 71, device=chars.device)).float()  # (N, 201, 70)
        steps = self.inward(self.convs(one_hot.mT).mT).unbind(1)  # 8 of (N, nef)
        states = [steps[0].relu()]
        for step in steps[1:]:
            states.append((step + self.onward(states[-1])).relu())
        return self.last(sum(states) / len(states))


class ImageEncoder(nn.Module):
    """V: x (N, 3, size, size) in [-1, 1] -> codes (N, text). It is also shown where the image is steep."""

    def __init__(self, size=64, text=1024, nif=256):
        super().__init__()
        width, layers = [4] + [nif // 2**i for i in reversed(range(int(math.log2(size)) - 3))], []  # 64, 128, 256
        for i, (a, b) in enumerate(zip(width, width[1:])):
            conv = nn.Conv2d(a, b, 4, 2, 1) if i else nn.Conv2d(a, b, 8, 4, 2)
            layers += [conv, nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(nif, text, 4))

    def forward(self, x):
        down, right = x.diff(dim=2)[..., 1:], x.diff(dim=3)[:, :, 1:]
        steep = F.pad((down.square() + right.square()).sum(1, keepdim=True).sqrt(), (0, 1, 0, 1))
        steep = 2 * steep / steep.amax((2, 3), keepdim=True).clamp(min=0.01) - 1
        return self.layers(torch.cat([x, steep], 1)).flatten(1)


class Residual(nn.Module):
    """x (N, C, H, W) and three convolutions of it, C -> C/4 -> C/4 -> C, added."""

    def __init__(self, channels, act):
        super().__init__()
        some = channels // 4
        layers = [nn.Conv2d(channels, some, 1), nn.BatchNorm2d(some), act, nn.Conv2d(some, some, 3, 1, 1)]
        layers += [nn.BatchNorm2d(some), act, nn.Conv2d(some, channels, 3, 1, 1), nn.BatchNorm2d(channels)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


class Generator(nn.Module):
    """z (N, nz) and codes (N, text) -> x (N, 3, size, size) in [-1, 1] (Fig. 2)."""

    def __init__(self, size=64, text=1024, nt=128, nz=100, ngf=128, residual=True):
        super().__init__()
        width = [ngf * 2**i for i in reversed(range(int(math.log2(size)) - 2))]  # 1024, 512, 256, 128
        self.of_text = nn.Sequential(nn.Linear(text, nt), nn.LeakyReLU(0.2))
        layers = [nn.ConvTranspose2d(nz + nt, width[0], 4)]
        for i, c in enumerate(width):
            layers += [nn.BatchNorm2d(c)] + ([Residual(c, nn.ReLU())] if residual and i < 2 else [])
            layers += [nn.ReLU(), nn.ConvTranspose2d(c, (*width, 3)[i + 1], 4, 2, 1)]
        self.layers = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z, t):
        return self.layers(torch.cat([z, self.of_text(t)], 1)[:, :, None, None])


class Discriminator(nn.Module):
    """x (N, 3 * pack, size, size) in [-1, 1] and codes (N, text) -> logits (N,) (Fig. 2)."""

    def __init__(self, size=64, text=1024, nt=128, ndf=64, residual=True, pack=1):
        super().__init__()
        width, act = [ndf * 2**i for i in range(int(math.log2(size)) - 2)], nn.LeakyReLU(0.2)  # 64, 128, 256, 512
        layers, c = [nn.Conv2d(3 * pack, ndf, 4, 2, 1)], width[-1]
        for a, b in zip(width, width[1:]):  # none after the third, as in the authors' code
            layers += ([act] if b < c or a == ndf else []) + [nn.Conv2d(a, b, 4, 2, 1), nn.BatchNorm2d(b)]
        self.of_x = nn.Sequential(*layers, *([Residual(c, act)] if residual else []), act)
        self.of_text = nn.Sequential(nn.Linear(text, nt), nn.BatchNorm1d(nt), act)
        self.joint = nn.Sequential(nn.Conv2d(c + nt, c, 1), nn.BatchNorm2d(c), act, nn.Conv2d(c, 1, 4))

    def match(self, features, t):
        """of_x's features of images (N, C, 4, 4) and codes (N, text) -> logits (N,)."""
        t = self.of_text(t)[:, :, None, None].expand(-1, -1, 4, 4)
        return self.joint(torch.cat([features, t], 1)).flatten()

    def forward(self, x, t):
        return self.match(self.of_x(x), t)


class StyleEncoder(nn.Module):
    """S: x (N, 3, size, size) in [-1, 1] -> z (N, nz)."""

    def __init__(self, size=64, nz=100, ndf=64):
        super().__init__()
        width = [ndf * 2**i for i in range(int(math.log2(size)) - 2)]
        layers = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
        for a, b in zip(width, width[1:]):
            layers += [nn.Conv2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width[-1], nz, 4))

    def forward(self, x):
        return self.layers(x).flatten(1)


def init_weights(net):
    """Convolutions N(0, .02) with zero biases, gains of batch norm N(1, .02); linear layers as torch has them."""
    for part in net.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(part.weight, 0, 0.02)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(part.weight, 1, 0.02)
    return net


def gan_loss(logits, real):
    """-log D if `real`, else -log(1 - D), mean over the batch; D = sigmoid(logits). (N,) -> 0-d."""
    return F.softplus(-logits.float() if real else logits.float()).mean()


def sje_loss(images, texts, kinds):
    """Structured joint embedding loss of pairs of codes (B, text) of classes (B,), both ways -> 0-d (CVPR 2016)."""
    # the sum of max(0, s_ij - s_ii + 1) over i and j of unlike classes, s = image . text, divided by B
    scores = images.float() @ texts.float().T
    own, other = scores.diagonal(), kinds[:, None] != kinds
    return ((F.relu(scores - own[:, None] + 1) + F.relu(scores - own + 1)) * other).sum() / len(kinds)


def build(args):
    """{name: network or optimizer} on args.device: all that is learned, and so all that last.pt holds."""
    torch.manual_seed(args.seed)
    size, text, nt, nz = args.size, args.text, args.nt, args.nz
    state = {"E": TextEncoder(text, args.nef), "V": ImageEncoder(size, text, args.nif)}
    for weight in state["E"].parameters():  # .08, and more where it is narrower than the authors'
        nn.init.uniform_(weight, -0.08 * math.sqrt(256 / args.nef), 0.08 * math.sqrt(256 / args.nef))
    state["G"] = init_weights(Generator(size, text, nt, nz, args.ngf, not args.no_residual))
    state["D"] = init_weights(Discriminator(size, text, nt, args.ndf, not args.no_residual, args.pack))
    state["S"] = init_weights(StyleEncoder(size, nz, args.ndf))
    for net in state.values():
        net.to(args.device)
    # Rates are tensors, so that a CUDA graph follows the schedule.
    cuda = "cuda" in args.device
    for name in "GDS":
        rate, adam = torch.tensor(args.lr, device=args.device), dict(betas=(0.5, 0.999), fused=True, capturable=cuda)
        state[f"opt_{name}"] = torch.optim.Adam(state[name].parameters(), rate, **adam)
    weights, rate = [*state["E"].parameters(), *state["V"].parameters()], torch.full_like(rate, args.text_lr)
    state["opt_E"] = torch.optim.RMSprop(weights, rate, capturable=cuda)
    return state


def make_text_step(args, state):
    """Returns `step(x, chars, kinds)`: one update of E and V. It returns a 0-d loss."""
    # x (B, 3, size, size) in [-1, 1], the characters of a caption of each (B, 201), and their classes (B,)
    E, V, opt_E = state["E"], state["V"], state["opt_E"]

    def step(x, chars, kinds):
        opt_E.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, args.precision == "bf16"):
            images, texts = V(x), E(chars)
        loss_E = sje_loss(images, texts, kinds)
        loss_E.backward()
        nn.utils.clip_grad_norm_([*E.parameters(), *V.parameters()], 1.0)
        opt_E.step()
        return {"loss_E": loss_E.detach()}

    return step


def make_step(args, state):
    """Returns `step(x, t, wrong)`: one update of D and G. It returns 0-d losses."""
    # x (B, 3 * pack, size, size) in [-1, 1], codes t (B, text) of sentences about it, wrong (B, text) of other ones
    G, D, opt_G, opt_D, pack = state["G"], state["D"], state["opt_G"], state["opt_D"], args.pack

    def step(x, t, wrong):
        half, wrong = len(t) // 2, t[:0] if args.no_cls else wrong
        between = (t[:half] + t[len(t) - half :]) / 2  # of two sentences each (Sec. 4.3, beta = .5)
        asked = t if args.no_int else torch.cat([t, between])
        opt_D.zero_grad()
        opt_G.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, args.precision == "bf16"):
            fake = G(torch.randn(len(asked) * pack, args.nz, device=x.device), asked.repeat_interleave(pack, 0))
            fake = fake.unflatten(0, (-1, pack)).flatten(1, 2)
            on_x, on_fake = D.of_x(x), D.of_x(fake)
            features = torch.cat([on_x, on_x[: len(wrong)], on_fake])
            logits = D.match(features, torch.cat([t, wrong, asked]))
        s_r, s_w, s_f = logits.split([len(t), len(wrong), len(asked)])
        # D: max log s_r + (log(1 - s_w) + log(1 - s_f)) / 2 (Alg. 1); with --no-cls log s_r + log(1 - s_f)
        loss_right, loss_fake = gan_loss(s_r, True), gan_loss(s_f[: len(t)], False)
        loss_wrong = loss_fake if args.no_cls else gan_loss(s_w, False)
        loss_D = loss_right + (loss_wrong + loss_fake) / 2
        loss_D.backward(inputs=list(D.parameters()), retain_graph=True)
        # G: max log D(G(z, t), t), for the sentences of the batch and those between two
        loss_G = gan_loss(s_f, True)
        loss_G.backward(inputs=list(G.parameters()))
        opt_D.step()
        opt_G.step()
        losses = {"loss_right": loss_right, "loss_wrong": loss_wrong, "loss_fake": loss_fake, "loss_G": loss_G}
        return {name: loss.detach() for name, loss in losses.items()}

    return step


def make_style_step(args, state):
    """Returns `step(t)`: one update of S on what G draws for codes (B, text), by running averages."""
    G, S, opt_S = copy.deepcopy(state["G"]).eval().requires_grad_(False), state["S"], state["opt_S"]

    def step(t):
        opt_S.zero_grad()
        z = torch.randn(len(t), args.nz, device=t.device)
        with torch.autocast(t.device.type, torch.bfloat16, args.precision == "bf16"):
            found = S(G(z, t))
        loss_S = F.mse_loss(found.float(), z)
        loss_S.backward()
        opt_S.step()
        return {"loss_S": loss_S.detach()}

    return step


def train(args):
    """Train E and V, then G and D, then S, from last.pt if it is there. Returns the run folder."""
    check_settings(args)
    state = build(args)
    init_distributed(args, state)
    data = load_captions(args)
    run = Run(args, state)
    makers, loader = (make_text_step, make_step, make_style_step), batches(args, state["E"], data, run.images_seen)
    updates = functools.lru_cache(1)(lambda phase: capture(makers[phase](args, state), args))
    images = (args.text_epochs + args.epochs + args.style_epochs) * len(data.kinds)
    for step, (phase, epoch, *batch) in zip(run.steps(images, args.batch_size), loader):
        state["opt_E"].param_groups[0]["lr"].fill_(args.text_lr * 0.98 ** (epoch - 1))
        for name in ("opt_G", "opt_D"):
            halvings = max(0, epoch - 1 - args.text_epochs) // args.halve_every
            state[name].param_groups[0]["lr"].fill_(args.lr / 2**halvings)
        set_seed(args, step)  # of z
        losses = updates(phase)(*batch)
        if run.report(epoch, losses):  # it is time to save
            save_samples(args, state, data, step)
            run.save_checkpoint()
    return args.out


# -- data and pictures -----------------------------------------------------------------------------------------------


def shapes(count, seed, held_out=False, size=64):
    """Toy images, uint8 (count, 3, size, size), five captions of each, and labels (count, 4): numbers in VALUES."""
    # A sixth of the combinations comes with `held_out` only. No caption tells the style: whether a shape is left or
    # right, and how light falls on the ground.
    every = np.random.default_rng(0).permutation([*itertools.product(*map(range, map(len, VALUES)))])
    kinds = every[: len(every) // 6] if held_out else every[len(every) // 6 :]
    rng = np.random.default_rng([seed, held_out])
    labels = kinds[rng.integers(len(kinds), size=count)]
    images, inks = np.empty((count, 3, size, size), np.uint8), np.array([*INKS.values(), *GROUNDS.values()])
    pixel, captions = (np.arange(size, dtype=np.float32) + 0.5) / size, []
    for image, (form, ink, large, ground) in zip(images, labels):
        left, slope = rng.choice((0.32, 0.68)) + rng.uniform(-0.02, 0.02), rng.uniform(-80, 80)
        radius = rng.uniform(*((0.16, 0.18), (0.26, 0.29))[large])
        u, v = (pixel - left) / radius, (pixel[:, None] - rng.uniform(0.48, 0.52)) / radius
        away = np.hypot(u, v)
        edges = away, abs(away - 0.75) * 4, np.maximum(abs(u), abs(v) * 2.5)
        inside = ((1 - edges[form]) * radius * size + 0.5).clip(0, 1)[..., None]
        fore, back = inks[[ink, len(INKS) + ground]] + rng.normal(0, 6, (2, 3))
        back = back + slope * (pixel[:, None, None] - 0.5)
        image[:] = (back + inside * (fore - back)).clip(0, 255).transpose(2, 0, 1)
        sizes = ("small little tiny", "large big huge")[large].split()
        words = [[VALUES[0][form], VALUES[1][ink], sizes[n], VALUES[3][ground]] for n in rng.integers(0, 3, 5)]
        captions.append([SENTENCES[n].format(*some) for n, some in zip(rng.permutation(len(SENTENCES)), words)])
    return torch.from_numpy(images), captions, torch.from_numpy(labels)


def spell(sentences):
    """Characters uint8 (N, 201): the last place of each in ALPHABET, from 1 up; 0 for others and at the end."""
    rows = [bytes(ALPHABET.rfind(letter) + 1 for letter in sentence.lower()[:201]) for sentence in sentences]
    chars = bytearray(b"".join(row.ljust(201, b"\0") for row in rows))
    return torch.frombuffer(chars, dtype=torch.uint8).view(-1, 201)


def check_sentences(sentences):
    """Say what E does not read of sentences; refuse them if it reads nothing, or the same in all of them."""
    lost = [sentence for sentence in sentences if len(sentence) > 201 or {*sentence.lower()} - {*ALPHABET}]
    different, read = len({*map(str.lower, sentences)}), spell(sentences).unique(dim=0)
    if len(read) == 1 and (different > 1 or not re.search("[a-z0-9]", sentences[0].lower())):
        fail(f"no sentence has a letter from a to z that others have not, such as {sentences[0]!r}")
    if lost:
        print(f"{len(lost)} sentences are cut after 201 characters or have others than E reads, such as {lost[0]!r}")


def read_lines(path):
    """The lines of a text file that are not empty."""
    with explain_errors(f"{path} cannot be read as text in UTF-8"):
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
    return [line for line in lines if line] or fail(f"{path} has no sentence")


def read_captions(folder):
    """{image file: its captions} of each captions.jsonl below `folder`."""
    captions = {}
    for path in sorted(folder.rglob("captions.jsonl")):
        with explain_errors(f"{path} cannot be read as text in UTF-8"):
            lines = path.read_text("utf-8-sig").rstrip().split("\n")
        for number, line in enumerate(lines, 1):
            with explain_errors(f'{path}: line {number} is not like {{"file": "a.jpg", "captions": ["a red bird"]}}'):
                row = json.loads(line)
                some = row.get("captions", [row.get("caption")])
                assert some and isinstance(some, list) and all(isinstance(one, str) for one in some), "not text"
                captions.setdefault(path.parent / row["file"], []).extend(some)
    return captions


def read_folder(args):
    """Training images, uint8 (N, 3, load_size, load_size), the captions of each, and its folder, which is its class."""
    found, table = find_images(args.data, others=(".txt", "captions.jsonl")), read_captions(Path(args.data))
    train, named = [(kind, file) for split, kind, file in found if split == "train"], 0
    if len(train) < 2:
        fail(f"{args.data} has {len(train)} training images: what is wrong for one needs another")
    print(f"{args.data}: {len(train)} training images; {len(found) - len(train)} of test and val are left out")
    if unknown := table.keys() - {file for *_, file in found}:
        print(f"captions of {len(unknown)} files that are not there, such as {min(unknown)}")
    for kind, file in train:
        text = file.with_suffix(".txt")
        if file not in table and text.exists():
            table[file] = read_lines(text)
        elif file not in table and kind:
            table[file], named = [f"a {Path(kind).name}"], named + 1
        elif file not in table:
            fail(f"{file} has no caption in {text.name} or captions.jsonl, nor a folder named by it")
    if named:
        print(f"{named} images have no captions: the name of their folder is their sentence")
    captions = [table[file] for _, file in train]
    sizes = [(kind, file.name, file.stat().st_size) for kind, file in train]
    args.images = hashlib.sha256(repr((sizes, captions)).encode()).hexdigest()[:12]  # a run belongs to its images

    def read(args, shape, files):  # whatever the aspect, as the authors do
        image = read_image(files[0], args.white)
        if min(image.size) < args.size:
            fail(f"{files[0]} has {image.size} pixels, less than --size {args.size}")
        return resize(pil_to_tensor(image), shape[1:], antialias=True)

    pixels = cache_images(args, [[file] for _, file in train], read, (3, args.load_size, args.load_size))
    return pixels, captions, [kind for kind, _ in train]


def load_captions(args):
    """A namespace: `pixels` uint8 (N, 3, load_size, load_size), their classes `kinds` (N,), characters `said` (M, 201).

    The captions of image i are many[i] rows of `said` from first[i] on; `asked` are sentences to draw.
    """
    if args.data == "toy":
        pixels, captions, classes = shapes(4000, 0, size=args.load_size)
        asked = shapes(8, 1, held_out=True, size=1)[1]
    else:
        pixels, captions, classes = read_folder(args)
        asked = captions[:: math.ceil(len(captions) / 8)]
    kinds = np.unique(classes, axis=0, return_inverse=True)[1].ravel()
    kinds = kinds if kinds.any() else np.arange(len(kinds))  # without classes, each image is one
    sentences, many = [*itertools.chain(*captions)], np.array([*map(len, captions)])
    check_sentences(sentences)
    data = argparse.Namespace(pixels=pixels, kinds=kinds, many=many, first=many.cumsum() - many)
    data.said, data.asked = spell(sentences).to(args.device), [some[0] for some in asked]
    return data


def batches(args, E, data, images_seen):
    """Yields the phase, the epoch, and what its step takes, without end. Put your own loader here."""
    batch, count, share = args.batch_size, len(data.kinds), slice(RANK, None, WORLD)
    starts = 0, args.text_epochs * count, (args.text_epochs + args.epochs) * count  # of the phases, in images
    order, counts = np.argsort(data.kinds, kind="stable"), np.bincount(data.kinds)
    firsts = counts.cumsum() - counts  # class k has counts[k] images, in `order` from firsts[k] on
    orders = functools.lru_cache(2)(lambda epoch: np.random.default_rng([args.seed, epoch]).permutation(count))
    codes = functools.cache(lambda: encode_captions(E, data.said))  # once, when E is trained

    def images_of(kinds):
        return order[firsts[kinds] + (rng.random(len(kinds)) * counts[kinds]).astype(int)]

    def captions_of(images, average):
        parts = (rng.random((len(images), average)) * data.many[images][:, None]).astype(int)
        return to_device(args, data.first[images][:, None] + parts)

    def codes_of(images):
        return F.embedding_bag(captions_of(images, args.average), codes(), mode="mean")

    def crops_of(images, pack):  # each with others of its class
        packs, crops = [images, *[images_of(data.kinds[images]) for _ in range(pack - 1)]], []
        for image in np.stack(packs, 1).ravel().tolist():
            top, left = rng.integers(args.load_size - args.size + 1, size=2)
            crop = data.pixels[image, :, top : top + args.size, left : left + args.size]
            crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
        return to_device(args, torch.stack(crops).unflatten(0, (-1, pack)).flatten(1, 2)) / 127.5 - 1

    for images in itertools.count(images_seen, batch):
        epoch, phase = images // count + 1, (images >= starts[1]) + (images >= starts[2])
        seen = images - starts[phase]
        rng = np.random.default_rng([args.seed, phase, seen // batch])
        chosen = np.array([orders(k // count)[k % count] for k in range(seen, seen + batch)])
        if phase == 0:  # all processes have all pairs, which E's loss compares
            kinds = np.resize(rng.permutation(len(counts)), batch)
            one_each = images_of(kinds)
            x, which = crops_of(one_each, 1), captions_of(one_each, 1)[:, 0]
            yield phase, epoch, x, data.said[which], to_device(args, kinds)
        elif phase == 1:
            x, kinds = crops_of(chosen, args.pack), np.tile(data.kinds[chosen], args.near)
            others = images_of((kinds + rng.integers(1, len(counts), len(kinds))) % len(counts))
            t, wrong = codes_of(chosen), codes_of(others).view(args.near, batch, -1)
            nearest = (wrong - t).square_().sum(2, keepdim=True).argmin(0, keepdim=True)
            yield phase, epoch, x[share], t[share], wrong.take_along_dim(nearest, 0)[0, share]
        else:
            yield phase, epoch, codes_of(chosen)[share]


def to_device(args, values):
    """A tensor or array on args.device."""
    tensor = torch.as_tensor(values)
    tensor = tensor.pin_memory() if "cuda" in args.device and not tensor.is_cuda else tensor
    return tensor.to(args.device, non_blocking=True)


@torch.no_grad()
def encode(E, chars):
    """Characters uint8 (N, 201) -> codes (N, text) as G takes them."""
    return (torch.cat([E(some) for some in chars.split(1000)]) - E.mean) / E.spread


def encode_captions(E, said):
    """The same of all captions: from now on codes are shifted and scaled to mean 0 and spread 1, which E keeps."""
    E.mean.zero_()
    E.spread.fill_(1)
    said, which = said.unique(dim=0, return_inverse=True)  # many images may have the same caption
    codes = encode(E, said)[which]
    E.mean.copy_(codes.mean(0))
    E.spread.copy_(codes.std(0).mean().clamp(min=1e-8))
    return (codes - E.mean) / E.spread


@torch.no_grad()
def draw(args, G, z, t):
    """G(z, t) for z (N, nz) and codes (N, text), uint8 (N, 3, size, size), by the running averages of batch norm."""
    G = copy.deepcopy(G).eval()
    with torch.autocast(z.device.type, torch.bfloat16, args.precision == "bf16"):
        x = torch.cat([G(*part).float() for part in zip(z.split(500), t.split(500))])
    return (x * 127.5 + 127.5).round().byte().cpu()


@torch.no_grad()
def save_samples(args, state, data, step):
    """OUT/samples/STEP.png, a row a sentence: four z, a line to the first z, one to the next sentence (Fig. 8), S(x).

    The last columns are in the style of the images x above them (Sec. 4.4, Fig. 6), once S is trained.
    """
    torch.manual_seed(args.seed)
    z, way = torch.randn(4, args.nz, device=args.device), torch.linspace(0.25, 1, 4, device=args.device)[:, None]
    x = center_crop(data.pixels[:: math.ceil(len(data.pixels) / 4)], [args.size])
    style = copy.deepcopy(state["S"]).eval()(x.to(args.device) / 127.5 - 1)
    z = torch.cat([z, torch.lerp(z[3], z[0], way), z[:1].expand(4, -1), style])
    t = encode(state["E"], spell(data.asked).to(args.device))[:, None]  # (sentences, 1, text)
    t = torch.cat([t.expand(-1, 8, -1), torch.lerp(t, t.roll(-1, 0), way), t.expand(-1, len(x), -1)], 1)
    images = draw(args, state["G"], z.repeat(len(t), 1), t.flatten(0, 1))
    top, *rows = F.interpolate(torch.cat([x.cpu(), images]), 128).split([len(x)] + [len(z)] * len(t))
    cells = [torch.full((3, 128, 128), 255, dtype=torch.uint8)] * 13 + [*top]
    for sentence, row in zip(data.asked, rows):
        head = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(head).text((4, 4), textwrap.fill(sentence, 19), "black", font_size=12)
        cells += [pil_to_tensor(head), *row]
    titles = ["text"] + ["noise"] * 4 + ["to first noise"] * 4 + ["to next sentence"] * 4 + ["style of image"] * len(x)
    save_grid(args.out / "samples" / f"{step:07}.png", cells, titles)


def load_networks(run, device="cpu"):
    """E and G of a run folder: G(z, encode(E, spell(["a red bird"]))) draws a red bird, for z (1, nz)."""
    checkpoint = load_checkpoint(run)
    with explain_errors(f"{run}/last.pt is damaged"):
        settings = argparse.Namespace(**checkpoint["settings"])
        size, text, nt, nz = settings.size, settings.text, settings.nt, settings.nz
        E, G = TextEncoder(text, settings.nef), Generator(size, text, nt, nz, settings.ngf, not settings.no_residual)
        E.load_state_dict(checkpoint["E"])
        G.load_state_dict(checkpoint["G"])
    G.settings = settings
    return E.to(device), G.to(device).eval()


def load_generator(run, device="cpu"):
    """G of a run folder, z (N, nz) and codes (N, text) to x (N, 3, size, size) in [-1, 1], by running averages."""
    return load_networks(run, device)[1]


def sample(args):
    """Draw --sample images of each sentence of --prompt with a trained G. Returns the folder of the results."""
    check_settings(args, use=True)
    to, count = args.to or args.out / "sampled", args.sample or 16
    is_file = args.prompt.endswith(".txt") or os.path.isfile(args.prompt)
    sentences = read_lines(Path(args.prompt)) if is_file else [args.prompt]
    check_sentences(sentences)
    chars = spell(sentences).to(args.device)
    E, G = load_networks(args.out, args.device)
    torch.manual_seed(args.seed)
    z = torch.randn(count, G.settings.nz, device=args.device)
    images = draw(args, G, z.repeat(len(chars), 1), encode(E, chars).repeat_interleave(count, 0))
    for i, image in enumerate(images):
        atomic_write(to / f"{i:05}.png", to_pil_image(image).save)
    print(f"{len(images)} images are drawn into {to}, which has {len([*to.iterdir()])} now; {count} of each sentence")
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
    return train(args) if args.prompt is None else sample(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # outside of the loop
        sys.exit(130)
    if dist.is_initialized():  # all processes are here, none has failed
        dist.destroy_process_group()
