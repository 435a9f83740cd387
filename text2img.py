# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "tqdm>=4.66"]
# ///
"""Text to image: a GAN that draws what a sentence says.

Reed, Akata, Yan, Logeswaran, Schiele, Lee: Generative Adversarial Text to Image Synthesis. ICML 2016, arXiv:1605.05396.
First an encoder E of sentences learns together with an encoder V of images (Reed, Akata, Lee, Schiele, CVPR 2016,
arXiv:1605.05395). Then G draws x from noise z and a code t = E(sentence), and D tells what belongs together:
    max_D  log D(x, t) + (log(1 - D(x, t')) + log(1 - D(G(z, t), t))) / 2, t' of another class       (Alg. 1: CLS)
    max_G  log D(G(z, t), t), a third of the codes midway between those of two sentences           (Sec. 4.3: INT)
Last, G is fixed and S learns to find its z:  min_S |z - S(G(z, t))|^2                           (Sec. 4.4: style)

    python text2img.py                                             # train on toy shapes, drawn here: minutes on a CPU
    python text2img.py --data FOLDER                               # NAME.jpg with captions in NAME.txt, one a line
    python text2img.py --prompt "a large green circle on a red background" --sample 16

Departures: the authors' code alone has residual branches (--no-residual leaves them out) and batch norm on D's text.
All pairs pass D's last layers in one batch, and one pass serves both updates: in passes apart, as in their code, batch
norm let D tell right from wrong by the batch instead of the pair. So sentences midway between two count in D's batch
statistics, but not in its loss. V is a small network instead of a GoogLeNet; gradients of E and V are clipped, as they
throw each other off. Codes are shifted and scaled to mean 0 and spread 1. S has D's layers, as the paper leaves them
open. Toy takes the nearest of 32 wrong sentences (--near): most differ in a colour, so D learned little about the form.
"""

import argparse
import atexit
import contextlib
import copy
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
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

METHOD, SCRIPT = "text2img", Path(__file__).stem
SETS = {  # the named sets, and which defaults each changes
    "toy": dict(size=32, load_size=34, text=512, nt=64, nz=32, ngf=32, ndf=32, nef=64, nif=96, no_residual=True)
    | dict(near=32, average=1, batch_size=32, lr=4e-4, text_lr=1e-3, text_epochs=20, epochs=80, style_epochs=4)
    | dict(halve_every=27, save_every=1000),
}
FIXED = (
    "size load_size no_cls no_int no_residual text nt nz ngf ndf nef nif embeddings wrong near average white".split()
)
FIXED += ["seed", "other images"]
LAYOUTS = "give NAME.txt beside NAME.jpg with a caption in each line, captions.jsonl, or a folder for each class"
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "  # as in the authors' code
INKS = {"red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 75, 215), "yellow": (240, 215, 50)}
INKS |= {"white": (235, 235, 235), "black": (30, 30, 30), "pink": (245, 130, 190), "cyan": (70, 200, 215)}
VALUES = ("circle", "ring", "bar"), tuple(INKS), ("small", "large"), tuple(INKS)  # form, ink, size, ground
SENTENCES = [
    "a {2} {1} {0} on a {3} background",
    "on a {3} background a {2} {1} {0}",
    "a {1} {0} that is {2} and the background is {3}",
    "a {2} {0} in {1} on {3} ground",
    "a {1} {0} on {3} ground, and it is {2}",
    "{3} background, {2} {1} {0}",
]
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}  # names of folders
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def get_args(argv=None):
    """Options from `argv` or the command line. The defaults are the paper's, or those of the named set."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__.partition("\n")[0])
    parser.formatter_class = functools.partial(argparse.ArgumentDefaultsHelpFormatter, width=120)
    add = parser.add_argument
    add("--data", default="toy", help="a folder of images with captions, or toy")
    add("--data-root", type=Path, default="data", help="folder for decoded images")
    add("--embeddings", help="codes of all captions in a .npy, instead of an encoder, (N, --text)")
    add("--size", type=int, default=64, help="pixels a side: 16, 32, 64 or 128")
    add("--load-size", type=int, help="pixels a side before the random crop; None: 19 / 16 of --size")
    add("--white", type=int, default=65535, help="value of white in 16-bit images")
    add("--no-cls", action="store_true", help="D does not learn from wrong sentences: GAN or GAN-INT")
    add("--no-int", action="store_true", help="G does not learn from sentences between two: GAN or GAN-CLS")
    add("--no-residual", action="store_true", help="without the branches that only the authors' code has")
    add("--wrong", type=int, default=1, help="wrong sentences for each image of a batch")
    add("--near", type=int, default=1, help="sentences that the nearest is taken of, for each of these")
    add("--average", type=int, default=4, help="captions of an image whose codes are averaged")
    add("--text", type=int, default=1024, help="numbers in the code of a sentence")
    add("--nt", type=int, default=128, help="numbers it is compressed to in G and in D")
    add("--nz", type=int, default=100, help="numbers in z")
    add("--ngf", type=int, default=128, help="channels of G's last hidden layer")
    add("--ndf", type=int, default=64, help="channels of the first layer of D and S")
    add("--nef", type=int, default=256, help="units of the text encoder's recurrent layer")
    add("--nif", type=int, default=256, help="channels of the image encoder's last hidden layer")
    add("--text-epochs", type=int, default=200, help="passes over the images for E, before the GAN")
    add("--epochs", type=int, default=600, help="passes for the GAN")
    add("--style-epochs", type=int, default=20, help="passes for S, after the GAN")
    add("--batch-size", type=int, default=64, help="images in an update, over all processes")
    add("--lr", type=float, default=2e-4, help="learning rate of Adam, for G, D and S")
    add("--halve-every", type=int, default=100, help="epochs between halvings of --lr for G and D")
    add("--text-lr", type=float, default=7e-4, help="learning rate of RMSprop, for E and V")
    add("--seed", type=int, default=0, help="of weights, data order, crops, sentences and z")
    add("--out", type=Path, help=f"run folder; None: runs/{SCRIPT}-DATA")
    add("--init", type=Path, metavar="RUN", help="start from the weights of another run (fine-tuning)")
    add("--max-steps", type=int, help="stop after this many updates in all")
    add("--save-every", type=int, help="updates between checkpoints; None: ten minutes")
    add("--fresh", action="store_true", help="delete checkpoint, log and samples")
    add("--device", help="cpu, cuda, cuda:1, mps, ...; None: the accelerator, if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the device has it")
    add("--no-capture", action="store_true", help="on CUDA: no CUDA graph")
    add("--prompt", help="draw a sentence, those in the lines of a .txt, or codes in a .npy, with the trained G")
    add("--sample", type=int, metavar="N", help="images of each --prompt; None: 16")
    add("--to", type=Path, help="folder for them; None: OUT/sampled")
    data = parser.parse_known_args(argv)[0].data
    data = f"./{data}" if data in SETS and Path(data).is_dir() else data  # a folder that is there comes first
    parser.set_defaults(**SETS.get(data, {}))
    args = parser.parse_args(argv)
    args.data, args.load_size = data, args.load_size or args.size * 19 // 16
    args.text_epochs = 0 if args.embeddings else args.text_epochs
    check_args(args, may_be_zero=("text_epochs", "style_epochs", "lr", "text_lr", "seed"))
    if args.size not in (16, 32, 64, 128) or args.load_size < args.size:
        fail(f"--size {args.size}: give 16, 32, 64 or 128, and at most --load-size {args.load_size}")
    if args.sample and args.prompt is None:
        fail(f"--sample {args.sample} needs --prompt, the sentence to draw")
    return args


# -- the method ------------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """E: convolutions over characters, then a recurrent layer whose states are averaged.

    Characters (N, 201), from 1 up in ALPHABET or 0 for others -> codes (N, text).
    """

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
        letters = torch.arange(1, 71, device=chars.device)
        one_hot = (chars[..., None] == letters).float()  # (N, 201, 70)
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
    """x (N, 3, size, size) in [-1, 1] and codes (N, text) -> logits (N,) (Fig. 2)."""

    def __init__(self, size=64, text=1024, nt=128, ndf=64, residual=True):
        super().__init__()
        width, act = [ndf * 2**i for i in range(int(math.log2(size)) - 2)], nn.LeakyReLU(0.2)  # 64, 128, 256, 512
        layers, c = [nn.Conv2d(3, ndf, 4, 2, 1)], width[-1]
        for a, b in zip(width, width[1:]):  # no activation after the third convolution, as in the authors' code
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
    """The symmetric structured joint embedding loss of pairs of codes (B, text) of classes (B,) -> 0-d.

    max(0, s_ij - s_ii + 1) for i and j of unlike classes, s = image . text, both ways, over B (CVPR 2016).
    """
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
    state["D"] = init_weights(Discriminator(size, text, nt, args.ndf, not args.no_residual))
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
    """Returns `step(x, chars, kinds)`: one update of E and V on images, a caption of each, and their classes (B,)."""
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
    """Returns `step(x, t, wrong)`: one update of D and G on images (B, 3, S, S) in [-1, 1] and codes (B, text).

    `wrong` are codes (K * B, text) that do not belong to the images. It returns its losses as 0-d tensors and reads
    nothing back from the device, so a CUDA graph can record it.
    """
    G, D, opt_G, opt_D = state["G"], state["D"], state["opt_G"], state["opt_D"]

    def step(x, t, wrong):
        wrong = t[:0] if args.no_cls else wrong
        between = (t[: len(t) // 2] + t[len(t) - len(t) // 2 :]) / 2  # of two sentences each (Sec. 4.3, beta = .5)
        asked = t if args.no_int else torch.cat([t, between])
        opt_D.zero_grad()
        opt_G.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, args.precision == "bf16"):
            fake = G(torch.randn(len(asked), args.nz, device=x.device), asked)
            features = torch.cat([D.of_x(x).repeat(1 + len(wrong) // len(t), 1, 1, 1), D.of_x(fake)])
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
    """Returns `step(t)`: one update of S on what G of now draws for codes (B, text), by its running averages."""
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


def phase_of(args, count, images):
    """Where a run is after so many images, in a set of `count`: the phase text, GAN or style, and its images so far."""
    for phase, epochs in (("text", args.text_epochs), ("GAN", args.epochs)):
        if images < epochs * count:
            return phase, images
        images -= epochs * count
    return "style", images


def train(args):
    """Train E and V, then G and D, then S; resume if last.pt is there. Returns the run folder."""
    data, state = load_captions(args), build(args)
    count, epochs = len(data.files), args.text_epochs + args.epochs + args.style_epochs
    makers = {"text": make_text_step, "GAN": make_step, "style": make_style_step}
    updates = functools.cache(lambda phase: capture(makers[phase](args, state), args))
    with Run(args, state, data.files, epochs) as run:
        data.pixels, codes = load_images(args, data), None
        for step in range(run.start_step + 1, run.last_step + 1):
            images = run.images_seen + (step - 1 - run.start_step) * args.batch_size
            phase, seen = phase_of(args, count, images)
            if phase != "text" and codes is None:
                codes = encode_captions(state["E"], data.said)
            rate = args.lr / 2 ** (seen // count // args.halve_every)
            rates = {"opt_E": args.text_lr * 0.98 ** (seen // count), "opt_G": rate, "opt_D": rate}
            for name, rate in rates.items():
                state[name].param_groups[0]["lr"].fill_(rate)
            batch = draw_batch(args, data, codes, phase, seen)
            set_seed(args, step)  # of z
            losses = updates(phase)(*batch)
            if run.report(step, images // count + 1, losses):  # it is time to save
                save_samples(args, state, data.asked, args.out / "samples" / f"{step:07}.png")
                save_styles(args, state, data, args.out / "samples" / f"{step:07}-styles.png")
                run.save_checkpoint(step)
            if run.should_stop:
                break
        del updates  # NCCL waits for the end of a CUDA graph before it lets the process group go
    print(f"{args.out}: {run.last_step} of {run.all_steps} steps are done; {args.out / 'samples'} shows what it draws")
    return args.out


# -- data and pictures -----------------------------------------------------------------------------------------------


def shapes(count, seed, held_out=False, size=64):
    """Toy images, uint8 (count, 3, size, size), five captions of each, and labels (count, 4).

    A shape on a ground: labels are numbers in VALUES of its form, ink, size and the ground's ink. A sixth of the
    combinations comes with `held_out`, and only then.
    """
    every = np.array([*itertools.product(*map(range, map(len, VALUES)))])
    every = np.random.default_rng(0).permutation(every[every[:, 1] != every[:, 3]])
    kinds = every[: len(every) // 6] if held_out else every[len(every) // 6 :]
    rng = np.random.default_rng([seed, held_out])
    labels = kinds[rng.integers(len(kinds), size=count)]
    images, inks = np.empty((count, 3, size, size), np.uint8), np.array([*INKS.values()])
    pixel, captions = (np.arange(size, dtype=np.float32) + 0.5) / size, []
    for image, (form, ink, large, ground) in zip(images, labels):
        radius = rng.uniform(*((0.22, 0.25), (0.36, 0.4))[large])
        u, v = (pixel - rng.uniform(0.46, 0.54)) / radius, (pixel[:, None] - rng.uniform(0.46, 0.54)) / radius
        away = np.hypot(u, v)
        edges = away, abs(away - 0.75) * 4, np.maximum(abs(u), abs(v) * 2.5)
        inside = ((1 - edges[form]) * radius * size + 0.5).clip(0, 1)[..., None]
        fore, back = inks[[ink, ground]] + rng.normal(0, 12, (2, 3))
        image[:] = (back + inside * (fore - back)).clip(0, 255).transpose(2, 0, 1)
        sizes = ("small little tiny", "large big huge")[large].split()
        words = [[VALUES[0][form], VALUES[1][ink], sizes[n], VALUES[3][ground]] for n in rng.integers(0, 3, 5)]
        said = (SENTENCES[n].format(*some) for n, some in zip(rng.permutation(len(SENTENCES)), words))
        captions.append([*said])
    return torch.from_numpy(images), captions, torch.from_numpy(labels)


def spell(sentences, where="the prompt"):
    """Characters uint8 (N, 201): their numbers from 1 up in ALPHABET, in lower case; 0 for others and at the end."""
    numbers = {letter: i for i, letter in enumerate(ALPHABET, 1)}  # the hyphen has two, and the later counts
    chars, sentences = np.zeros((len(sentences), 201), np.uint8), [sentence.lower() for sentence in sentences]
    for row, sentence in zip(chars, sentences):
        if not re.search("[a-z0-9]", sentence):
            fail(f"{where}: the sentence {sentence!r} has no letter from a to z")
        row[: len(sentence)] = [numbers.get(letter, 0) for letter in sentence[:201]]
    cut = sum(len(sentence[201:]) for sentence in sentences)
    if cut:
        print(f"{where}: {cut} characters after the 201st of a sentence are cut")
    return torch.from_numpy(chars)


def read_codes(path, text):
    """Codes float32 (N, text) from a .npy."""
    with explain_errors(f"{path} does not hold codes of {text} numbers"):
        codes = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32, casting="same_kind"))
        if codes.ndim != 2 or codes.shape[1] != text or not codes.isfinite().all():
            raise ValueError(f"it has a number that is not finite, or another shape: {tuple(codes.shape)}")
    return codes


def read_lines(path):
    """The lines of a text file that are not empty."""
    with explain_errors(f"{path} cannot be read as text"):
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def read_rows(path):
    """{file: captions} from a captions.jsonl, all rows of a file together."""
    captions = {}
    for number, row in enumerate(path.read_bytes().splitlines(), 1):
        with explain_errors(f'{path}, line {number} is not like {{"file_name": "a.jpg", "captions": ["a red bird"]}}'):
            row = json.loads(row)
            said = row["captions"] if "captions" in row else [row["caption"]]
            file = path.parent / row["file_name"]
            if not isinstance(said, list) or {*map(type, said)} != {str} or {"caption", "captions"} <= row.keys():
                raise ValueError("captions are a list of sentences, caption is one")
            if not file.is_file():
                raise ValueError(f"{file} is not there")
            captions.setdefault(file, []).extend(said)
    return captions


def find_captions(args):
    """Training images in a folder, {name: (image, caption file)}; of each its captions, [[sentence]], and class."""
    folder, images = Path(args.data), find_images(Path(args.data), others=(".txt", ".jsonl"))
    kinds = {file: kind for split, kind, file in images if split == "train"}
    if len(kinds) < 2:
        fail(f"{folder} has {len(kinds)} training images: what is wrong for one needs another")
    texts = {file: file.with_suffix(".txt") for file in kinds if file.with_suffix(".txt").is_file()}
    table = folder / "captions.jsonl"
    if table.is_file():
        source, captions = table, read_rows(table)
    elif texts:
        source, captions = "files .txt", {file: read_lines(text) for file, text in texts.items()}
    else:
        source, captions = "the names of folders", {file: name_class(kind) for file, kind in kinds.items() if kind}
    bare = [file for file in kinds if not captions.get(file)]
    if bare:
        fail(f"{bare[0]} has no caption, as {len(bare)} of {len(kinds)} images; {LAYOUTS}")
    print(f"{folder}: {len(kinds)} images, captions from {source}; {len(images) - len(kinds)} of test and val left out")
    files = {file.relative_to(folder).as_posix(): (file, texts.get(file, file)) for file in kinds}
    return files, [captions[file] for file in kinds], list(kinds.values())


def name_class(folder):
    """Captions of an image of which only the folder is known."""
    name = folder.rpartition("/")[2].replace("_", " ").replace("-", " ").lower()
    return [form.format(name) for form in ("a {}", "this is a {}", "a photo of a {}", "the picture shows a {}", "{}")]


def load_captions(args):
    """All that is known of the data before images are decoded, as a namespace.

    Of image i: kinds[i] is its class; its captions are many[i] from first[i] on in `said`, characters uint8 (M, 201) or
    codes float32 (M, text). Of class k: its images are counts[k] from starts[k] on in `order`. `asked` are a few
    sentences to draw, and their characters or codes. `files` are for Run.
    """
    if args.data == "toy":
        pixels, captions, classes = shapes(4000, 0, size=args.load_size)
        files = {f"{i:04}": () for i in range(4000)}
    else:
        pixels, (files, captions, classes) = None, find_captions(args)
    kinds = np.unique(classes, axis=0, return_inverse=True)[1].ravel()
    kinds = kinds if kinds.any() else np.arange(len(kinds))  # without classes, each image is one
    many, counts = np.array([*map(len, captions)]), np.bincount(kinds)
    data = argparse.Namespace(files=files, pixels=pixels, kinds=kinds, many=many, first=many.cumsum() - many)
    data.order, data.counts, data.starts = np.argsort(kinds, kind="stable"), counts, counts.cumsum() - counts
    data.shuffle = functools.lru_cache(2)(
        lambda epoch: np.random.default_rng([args.seed, epoch]).permutation(len(kinds))
    )
    if args.embeddings:
        data.said = read_codes(args.embeddings, args.text).to(args.device)
        if len(data.said) != many.sum():
            fail(f"--embeddings {args.embeddings} has {len(data.said)} codes, but {args.data} {many.sum()} captions")
    else:
        data.said = spell(list(itertools.chain(*captions)), args.data).to(args.device)
    shown = data.order[data.starts][:: math.ceil(len(counts) / 8)]
    data.asked = [captions[i][0] for i in shown], data.said[data.first[shown]]
    if args.data == "toy" and not args.embeddings:
        sentences = [lines[0] for lines in shapes(8, 1, held_out=True, size=1)[1]]
        data.asked = sentences, spell(sentences).to(args.device)
    return data


def load_images(args, data):
    """The images, uint8 (N, 3, load_size, load_size), whatever their aspect, as the authors do."""
    if args.data == "toy":
        return data.pixels.to(args.device)

    def read(files):
        image = read_image(files[0], args.white)
        if min(image.size) < args.size:
            fail(f"{files[0]} is too small: give at most --size {2 ** int(math.log2(min(image.size)))}")
        return resize(pil_to_tensor(image), [args.load_size] * 2, antialias=True)

    return cache_images(args, [files[:1] for files in data.files.values()], read, (3, args.load_size, args.load_size))


def to_device(args, values):
    """A tensor or array on args.device; the host need not wait for a GPU."""
    tensor = torch.as_tensor(values)
    tensor = tensor.pin_memory() if "cuda" in args.device and not tensor.is_cuda else tensor
    return tensor.to(args.device, non_blocking=True)


def draw_batch(args, data, codes, phase, seen):
    """What the step of a phase takes after `seen` images of it; here goes a data loader of your own.

    text: x (B, 3, size, size) in [-1, 1], characters (B, 201) of a caption of each, and classes (B,), as many as there
    are. GAN: x, codes t (B, text) averaged over --average captions, and of other classes (--wrong * B, text). style: t.
    """
    batch, size, places = args.batch_size, args.size, args.load_size - args.size + 1
    rng = np.random.default_rng([args.seed, ("text", "GAN", "style").index(phase), seen // batch])

    def images_of(kinds):
        return data.order[data.starts[kinds] + (rng.random(len(kinds)) * data.counts[kinds]).astype(int)]

    def captions_of(images, average):
        parts = (rng.random((len(images), average)) * data.many[images][:, None]).astype(int)
        return to_device(args, data.first[images][:, None] + parts)

    if phase == "text":  # all processes have all pairs, which E's loss compares
        kinds, share = np.resize(rng.permutation(len(data.counts)), batch), slice(None)
        chosen = images_of(kinds)
    else:
        share = slice(RANK, None, WORLD)
        chosen = np.array([data.shuffle(k // len(data.kinds))[k % len(data.kinds)] for k in range(seen, seen + batch)])
    if phase == "style":
        return (F.embedding_bag(captions_of(chosen, args.average), codes, mode="mean")[share],)
    crops = []
    for image in chosen.tolist():
        top, left, mirror = rng.integers(places), rng.integers(places), rng.random() < 0.5
        crop = data.pixels[image, :, top : top + size, left : left + size]
        crops.append(crop.flip(-1) if mirror else crop)
    x = to_device(args, torch.stack(crops[share])) / 127.5 - 1
    if phase == "text":
        return x, data.said[captions_of(chosen, 1)[:, 0]], to_device(args, kinds)
    kinds = np.tile(data.kinds[chosen], args.near * args.wrong)
    others = images_of((kinds + rng.integers(1, len(data.counts), len(kinds))) % len(data.counts))
    t = F.embedding_bag(captions_of(chosen, args.average), codes, mode="mean")
    wrong = F.embedding_bag(captions_of(others, args.average), codes, mode="mean").view(
        args.near, args.wrong, batch, -1
    )
    nearest = (wrong - t).square_().sum(3, keepdim=True).argmin(0, keepdim=True)  # of --near
    return x, t[share], wrong.take_along_dim(nearest, 0)[0, :, share].flatten(0, 1)


@torch.no_grad()
def encode(E, said):
    """Codes (N, text) as G takes them, of characters uint8 (N, 201) or of codes from elsewhere, float32 (N, text)."""
    codes = said if said.is_floating_point() else torch.cat([E(chars) for chars in said.split(1000)])
    return (codes - E.mean) / E.spread


def encode_captions(E, said):
    """The same of all captions, with a mean of 0 and a spread of 1: E keeps the mean and the spread from before."""
    E.mean.zero_()
    E.spread.fill_(1)
    said, which = said.unique(dim=0, return_inverse=True)  # many images may have the same caption
    codes = encode(E, said)[which]
    E.mean.copy_(codes.mean(0))
    E.spread.copy_(codes.std(0).mean().clamp(min=1e-8))
    return (codes - E.mean) / E.spread


@torch.no_grad()
def draw(args, G, z, t):
    """G(z, t) for z (N, nz) and codes (N, text) as N Pillow images, by the running averages of batch norm."""
    G = copy.deepcopy(G).eval()
    with torch.autocast(z.device.type, torch.bfloat16, args.precision == "bf16"):
        x = torch.cat([G(*part).float() for part in zip(z.split(500), t.split(500))])
    return [to_pil_image(image) for image in (x * 127.5 + 127.5).round().byte().cpu()]


def save_rows(args, G, path, z, t, heads, top=()):
    """A picture of G(z, t), z (rows or 1, columns or 1, nz) and t alike, with a head before each row, below `top`.

    Heads and top are sentences or Pillow images.
    """
    shape = torch.broadcast_shapes(z.shape[:2], t.shape[:2])
    images, cells = iter(draw(args, G, z.expand(*shape, -1).flatten(0, 1), t.expand(*shape, -1).flatten(0, 1))), [*top]
    for head in heads:
        cells += [head, *itertools.islice(images, shape[1])]
    for i, cell in enumerate(cells):
        if isinstance(cell, str):
            cells[i] = Image.new("RGB", (128, 128), "white")
            ImageDraw.Draw(cells[i]).text((4, 4), textwrap.fill(cell, 19), "black", font_size=12)
        cells[i] = cells[i].resize((128, 128), Image.Resampling.NEAREST)
    save_grid(path, cells, [""] * (shape[1] + 1))


def save_samples(args, state, asked, path):
    """Pictures with a row for each sentence: eight z, a line between two z, and one to the next sentence (Fig. 8)."""
    torch.manual_seed(args.seed)
    z, way = torch.randn(1, 8, args.nz, device=args.device), torch.linspace(0, 1, 8, device=args.device)[:, None]
    G, heads, t = state["G"], asked[0], encode(state["E"], asked[1])[:, None]
    save_rows(args, G, path, z, t, heads)
    save_rows(args, G, path.with_stem(f"{path.stem}-between-z"), torch.lerp(z[:, :1], z[:, 1:2], way), t, heads)
    t = torch.lerp(t, t.roll(-1, 0), way)
    save_rows(args, G, path.with_stem(f"{path.stem}-between-sentences"), z[:, :1], t, heads)


@torch.no_grad()
def save_styles(args, state, data, path):
    """Style transfer (Sec. 4.4, Fig. 6): a row for each image x, with G(S(x), t) of each sentence."""
    chosen, edge = data.order[data.starts][:: math.ceil(len(data.counts) / 6)], (args.load_size - args.size) // 2
    x = torch.stack([data.pixels[i, :, edge : edge + args.size, edge : edge + args.size] for i in chosen.tolist()])
    z = copy.deepcopy(state["S"]).eval()(x.to(args.device) / 127.5 - 1)[:, None]
    heads, t = [to_pil_image(image.cpu()) for image in x], encode(state["E"], data.asked[1])[None]
    save_rows(args, state["G"], path, z, t, heads, ["", *data.asked[0]])


def load_networks(run, device="cpu"):
    """E and G of a run folder: G(z, encode(E, spell(["a red bird"]))) draws a red bird, for z (1, nz)."""
    checkpoint = load_checkpoint(run)
    with explain_errors(f"{run}/last.pt is damaged"), torch.device("meta"):  # takes no memory: the weights do
        settings = argparse.Namespace(**checkpoint["settings"])
        size, text, nt, nz = settings.size, settings.text, settings.nt, settings.nz
        E, G = TextEncoder(text, settings.nef), Generator(size, text, nt, nz, settings.ngf, not settings.no_residual)
        E.load_state_dict(checkpoint["E"], assign=True)
        G.load_state_dict(checkpoint["G"], assign=True)
    G.settings = settings
    return E.to(device), G.to(device).eval()


def load_generator(run, device="cpu"):
    """G of a run folder, z (N, nz) and codes (N, text) to x (N, 3, size, size) in [-1, 1], by running averages."""
    return load_networks(run, device)[1]


def sample(args):
    """Draw --sample images of each sentence of --prompt with a trained G. Returns the folder of the results."""
    prompt, to, count = args.prompt, args.to or args.out / "sampled", args.sample or 16
    is_file = os.path.isfile(prompt)
    if not is_file and ("/" in prompt and " " not in prompt or re.search(r"\w\.\w+$", prompt)):
        fail(f"--prompt {prompt} looks like a file, but is none")
    E, G = load_networks(args.out, args.device)
    args.nz = G.settings.nz
    if G.settings.embeddings:
        said = read_codes(prompt, G.settings.text)  # of the kind that it was trained on
        names = [f"code {i}" for i in range(len(said))]
    else:
        names = read_lines(Path(prompt)) if is_file else [prompt]
        said = spell(names or fail(f"--prompt {prompt} has no sentence"), f"--prompt {prompt}")
    torch.manual_seed(args.seed)
    said, z = said.to(args.device), torch.randn(count, args.nz, device=args.device)
    images = draw(args, G, z.repeat(len(names), 1), encode(E, said).repeat_interleave(count, 0))
    for i, image in enumerate(images):
        name = f"{i:05}.png" if len(names) == 1 else f"{i // count:03}-{i % count:05}.png"
        atomic_write(to / name, image.save)
    save_samples(args, {"E": E, "G": G}, (names[:16], said[:16]), to.with_name(f"{to.name}.png"))
    print(f"{len(images)} images are drawn in {to}; {to}.png and others beside it show the first 16 sentences")
    return to


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

    def __init__(self, args, state, files, epochs=None):
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
        steps = math.ceil(((epochs or args.epochs) * len(files) - self.images_seen) / args.batch_size)
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


def find_images(folder, others=()):
    """[(split, folders, file)] of all images below `folder`; the split is train, val or test if a folder says so."""
    names = sorted(glob.glob("**/*.*", root_dir=folder, recursive=True))  # follows links, leaves out hidden files
    runs = tuple(name.removesuffix("log.jsonl") for name in names if name.endswith("/log.jsonl"))
    names = [name for name in names if not name.startswith(runs or "/")]
    names = [name for name in names if not name.endswith(others or "/")]
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
    return train(args) if args.prompt is None else sample(args)


if __name__ == "__main__":
    main()
