# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=11", "filelock>=3"]
# ///
"""Text to image: a GAN that draws what a sentence says.

Reed, Akata, Yan, Logeswaran, Schiele, Lee: Generative Adversarial Text to Image Synthesis. ICML 2016, arXiv:1605.05396.
A sentence becomes a code t. D also learns what does not match: real images with the code t' of another class,
    max_D  log D(x, t) + (log(1 - D(x, t')) + log(1 - D(G(z, t), t))) / 2                              (Alg. 1: CLS)
    max_G  log D(G(z, t), t), where a third of the codes lie midway between two sentences            (Sec. 4.3: INT)
The codes come first: a recurrent net over characters learns with a net over images which of them belong together (Reed,
Akata, Lee, Schiele, CVPR 2016, arXiv:1605.05395). Last comes S, which finds the z of an image. The authors' code alone
has residual branches (--no-residual leaves them out), no ReLU after D's third convolution, and batch norm on D's text.

    python text2img.py                                                  # train on toy shapes, drawn here, on a CPU
    python text2img.py --data FOLDER                                    # NAME.jpg with its captions in NAME.txt
    python text2img.py --prompt "a large green circle on a red background" --sample 16
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
import pickle
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid

SCRIPT = "text2img"
SETS = {  # the named sets, and what each changes
    "toy": dict(size=32, load_size=34, text=512, nt=64, nz=32, ngf=32, ndf=32, nef=64, nif=96, no_residual=True,
                near=32, average=1, batch_size=32, lr=4e-4, text_lr=1e-3, text_epochs=20, epochs=80, style_epochs=4,
                halve_every=27, save_every=1000),
}  # fmt: skip
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
ADVICE = "lower --lr, or use --precision fp32"  # against what is not finite
RANK, WORLD = (int(os.environ.get(name, start)) for name, start in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun
FREE = "settings data_root run max_steps save_every skip_bad fresh device bf16 no_capture sample prompt to"


def get_args(argv=None):
    """Settings from `argv` or the command line; what is not given is the paper's, or that of the set."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error, add = refuse, parser.add_argument
    add("--data", default="toy", help="toy, or a folder of images with captions; see load_data")
    add("--data-root", type=Path, default=Path("data"), help="where --data is looked for, if not here")
    add("--size", type=int, default=64, help="pixels a side: 16, 32, 64 or 128")
    add("--load-size", type=int, help="pixels a side before a random crop (19 for each 16 of --size)")
    add("--no-cls", action="store_true", help="D does not learn from wrong sentences: GAN or GAN-INT")
    add("--no-int", action="store_true", help="G does not learn from sentences between two: GAN or GAN-CLS")
    add("--no-residual", action="store_true", help="without the branches that only the authors' code has")
    add("--text", type=int, default=1024, help="numbers in the code of a sentence")
    add("--nt", type=int, default=128, help="numbers it is compressed to in G and in D")
    add("--nz", type=int, default=100, help="numbers in z")
    add("--ngf", type=int, default=128, help="channels of G's last hidden layer")
    add("--ndf", type=int, default=64, help="channels of the first layer of D and S")
    add("--nef", type=int, default=256, help="units of the text encoder's recurrent layer")
    add("--nif", type=int, default=256, help="channels of the image encoder's last hidden layer")
    add("--embeddings", help="codes of the captions, instead of an encoder: .npy, or a pickle of arrays")
    add("--wrong", type=int, default=1, help="wrong sentences for each image of a batch")
    add("--near", type=int, default=1, help="sentences that the nearest is taken of, for each of these")
    add("--average", type=int, default=4, help="captions of an image whose codes are averaged")
    add("--text-epochs", type=int, default=200, help="passes over the images for the encoder, before the GAN")
    add("--epochs", type=int, default=600, help="passes for the GAN")
    add("--style-epochs", type=int, default=20, help="passes for S, after the GAN")
    add("--batch-size", type=int, default=64, help="images an update")
    add("--lr", type=float, default=2e-4, help="rate of Adam")
    add("--text-lr", type=float, default=7e-4, help="rate of RMSprop, for the encoder")
    add("--halve-every", type=int, default=100, help="epochs between halvings of --lr")
    add("--seed", type=int, default=0, help="of weights, order, crops, sentences and noise; of z for --sample")
    add("--run", type=Path, help="run folder (runs/text2img-DATA)")
    add("--max-steps", type=int, help="stop after so many updates")
    add("--save-every", type=int, default=5000, help="updates between checkpoints; ten minutes at most")
    add("--skip-bad", action="store_true", help="train without the images that cannot be read")
    add("--fresh", action="store_true", help="start over; the old run is kept as DIR.old-N")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (the accelerator, if there is one)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is much faster")
    add("--no-capture", action="store_true", help="on CUDA: launch kernels one by one, not as a recorded graph")
    add("--prompt", help="a sentence to draw, a file with one in each line, or a .npy of codes")
    add("--sample", type=int, metavar="N", help="draw N images for each --prompt (16)")
    add("--to", type=Path, help="folder for them (RUN/sampled)")
    parser.set_defaults(**SETS.get(parser.parse_known_args(argv)[0].data, {}))
    parser.set_defaults(batch_size=math.ceil(parser.get_default("batch_size") / WORLD) * WORLD)  # a share each
    args = parser.parse_args(argv)
    args.load_size = args.load_size or args.size * 19 // 16
    if args.size not in (16, 32, 64, 128) or args.load_size < args.size:
        refuse(f"--size {args.size} --load-size {args.load_size}: give 16, 32, 64 or 128, and no less to load")
    if args.sample is not None and not args.prompt:
        refuse(f"--sample {args.sample} needs --prompt, the sentence to draw")
    args.sample = 16 if args.prompt and args.sample is None else args.sample
    return settle(args, zeros=("lr", "text_lr", "seed", "text_epochs", "style_epochs"))


# -- the method ------------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """Characters (N, 201), from 1 up in ALPHABET or 0 for others -> codes (N, text): convolutional, then recurrent."""

    def __init__(self, text=1024, nef=256):
        super().__init__()
        self.register_buffer("letters", torch.eye(71, 70).roll(1, 0), persistent=False)  # one-hot
        self.register_buffer("mean", torch.zeros(text))  # of the codes of all training captions, and their spread
        self.register_buffer("spread", torch.ones(()))
        width, layers = [70, nef * 3 // 2, nef * 2, nef], []  # 384, 512, 256
        for i, stride in enumerate((3, 3, 2)):
            layers += [nn.Conv1d(width[i], width[i + 1], 4), nn.ReLU(), nn.MaxPool1d(3, stride)]
        self.convs = nn.Sequential(*layers)
        self.inward, self.onward, self.last = nn.Linear(nef, nef), nn.Linear(nef, nef), nn.Linear(nef, text)

    def forward(self, chars):
        steps = self.inward(self.convs(self.letters[chars].mT).mT).unbind(1)  # 8 of (N, nef)
        states = [steps[0].relu()]
        for step in steps[1:]:
            states.append((step + self.onward(states[-1])).relu())
        return self.last(sum(states) / len(states))


class ImageEncoder(nn.Module):
    """x (N, 3, size, size) in [-1, 1] -> codes (N, text). It is also shown where the image is steep.

    The authors take features of a GoogLeNet; this net learns its own along with the text encoder.
    """

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
        for a, b in zip(width, width[1:]):
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
    """x (N, 3, size, size) in [-1, 1] -> z (N, nz). The paper leaves the layers open; these are D's."""

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


def gan_loss(logits, real):  # same as gan.py
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
    """{name: network or optimiser}: all that is learned, on args.device; a checkpoint holds their states."""
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
    for name in "GDS":  # with rates as tensors, so that a recorded step follows the schedule
        rate, betas, fit = torch.tensor(args.lr, device=args.device), (0.5, 0.999), "cuda" in args.device
        state[f"opt_{name}"] = torch.optim.Adam(state[name].parameters(), rate, betas, fused=True, capturable=fit)
    weights, rate = [*state["E"].parameters(), *state["V"].parameters()], torch.full_like(rate, args.text_lr)
    state["opt_E"] = torch.optim.RMSprop(weights, rate, capturable=fit)
    return state


def make_text_step(args, state):
    """Returns `step(x, chars, kinds)`: one update of E and V on images, a caption of each, and their classes (B,)."""
    E, V, opt_E = state["E"], state["V"], state["opt_E"]

    def step(x, chars, kinds):
        opt_E.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, args.bf16):
            images, texts = V(x), E(chars)
        loss_E = sje_loss(images, texts, kinds)
        loss_E.backward()
        # clipped, as two nets that learn from each other throw each other off; ours
        nn.utils.clip_grad_norm_([*E.parameters(), *V.parameters()], 1.0)
        opt_E.step()
        return {"loss_E": loss_E.detach()}

    return step


def make_step(args, state):
    """Returns `step(x, t, wrong)`: one update of D and G on images (B, 3, S, S) in [-1, 1] and codes (B, text).

    `wrong` are codes (K * B, text) that do not belong to the images. It gives back its losses as 0-d tensors and reads
    nothing back from the device, so it can be recorded and replayed.
    """
    G, D, opt_G, opt_D = (state[name] for name in ("G", "D", "opt_G", "opt_D"))

    def step(x, t, wrong):
        wrong = t[:0] if args.no_cls else wrong
        between = (t[: len(t) // 2] + t[len(t) - len(t) // 2 :]) / 2  # of two sentences each (Sec. 4.3, beta = .5)
        asked = t if args.no_int else torch.cat([t, between])
        opt_D.zero_grad()
        opt_G.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, args.bf16):
            fake = G(torch.randn(WORLD * len(asked), args.nz, device=x.device)[RANK::WORLD], asked)
            # all pairs in one pass: in passes apart, batch norm lets D tell right from wrong by the batch, not the pair
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
    """Returns `step(t)`: one update of S on images that G draws for codes (B, text), min |z - S(G(z, t))|^2."""
    G, S, opt_S = state["G"], state["S"], state["opt_S"]

    def step(t):
        z = torch.randn(WORLD * len(t), args.nz, device=t.device)[RANK::WORLD]
        opt_S.zero_grad()
        with torch.autocast(t.device.type, torch.bfloat16, args.bf16):
            with torch.no_grad():
                fake = G(z, t)
            found = S(fake)
        loss_S = F.mse_loss(found.float(), z)
        loss_S.backward()
        opt_S.step()
        return {"loss_S": loss_S.detach()}

    return step


def train(args):
    """Train the encoder, the GAN and S, or go on from RUN/last.pt if it is there. Returns the run folder."""
    data, state = load_data(args), build(args)
    with locked(args.run), signals() as stopped:
        begun, epoch_steps = resume(args, state, len(data.kinds)), len(data.kinds) / args.batch_size
        epochs = (0 if args.embeddings else args.text_epochs), args.epochs, args.style_epochs
        ends = [math.ceil(count * epoch_steps) for count in itertools.accumulate(epochs)]
        goal = max(begun, min(ends[-1], args.max_steps or math.inf))
        updates = [capture(make(args, state), args) for make in (make_text_step, make_step, make_style_step)]
        codes, row, saved = None, (time.monotonic(), begun), time.monotonic()
        for step in range(begun + 1, goal + 1):
            phase = sum(step > end for end in ends)  # text, GAN, style
            done = step - 1 - [0, *ends][phase]
            epoch, passed = int((step - 1) // epoch_steps) + 1, int(done // epoch_steps)
            if phase and codes is None:
                codes = encode(args, state, data)
            rate = args.lr / 2 ** (passed // args.halve_every) if phase else args.text_lr * 0.98**passed
            for name in (("opt_E",), ("opt_G", "opt_D"), ())[phase]:
                state[name].param_groups[0]["lr"].fill_(rate)
            batch = draw_batch(args, data, codes, phase, done)
            torch.manual_seed(hash((args.seed, step)))  # z; so that an update is the same after a stop
            losses = updates[phase](*batch)
            due = step in (*ends, goal) or step % args.save_every == 0 or time.monotonic() - saved > 600
            saving = (ending := agreed(stopped)) or due
            row = report(args, step, goal, epoch, losses, row, saving or step == begun + 1)
            if saving and not RANK:
                paint_sentences(args.run / "samples" / f"{step:07}.png", args, state, data)
                saved = save(args, state, step)
            if ending:
                break
    with locked(args.run, 60):
        paint_figures(args, state, data)
    print(f"{args.run} is finished, {goal} updates: see its pictures; --fresh starts over")
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


def spelled(sentences):
    """Characters uint8 (N, 201): their numbers from 1 up in ALPHABET, in lower case, and 0 for others."""
    numbers = {letter: i for i, letter in enumerate(ALPHABET, 1)}  # the hyphen has two, and the later counts
    rows = (
        bytes(numbers.get(letter, 0) for letter in sentence.lower()[:201]).ljust(201, b"\0") for sentence in sentences
    )
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, 201)


def load_data(args):
    """What training reads: a namespace of read(i), kinds, first, many, chars or vectors, and sentences to paint.

    read(i) is an image, uint8 (3, load, load); kinds[i] its class; its captions are those from first[i] on, many[i] of
    them. A folder holds NAME.jpg with its captions in NAME.txt, or captions.jsonl with a file and captions in each
    line, or the archives of captions for CUB-200-2011 and Oxford-102, text_c10/CLASS/NAME.txt, and their images. A
    folder of folders without any is captioned by their names. Folders are classes; without them, each image is one.
    """
    if args.data == "toy":
        images, captions, labels = shapes(4000, 0, size=args.load_size)
        kinds = np.unique(labels.numpy(), axis=0, return_inverse=True)[1].ravel()
        read, asked = images.__getitem__, [lines[0] for lines in shapes(8, 1, held_out=True, size=1)[1]]
    else:
        folder = next((path for path in (Path(args.data), args.data_root / args.data) if path.is_dir()), None)
        folder = folder or refuse(f"--data {args.data} is no folder, not below {args.data_root} either, and not toy")
        files, captions, classes = find_captions(folder)
        shape = 3, args.load_size, args.load_size  # whatever its aspect, as the authors do

        def prepared(item):
            return resize(pil_to_tensor(flatten(read_image(item[0]), 3)), shape[1:], antialias=True)

        good, read = decoded(args, folder, [(file,) for file in files], shape, folder.name, prepared)
        captions, classes = [captions[i] for i in good], [classes[i] for i in good]
        kinds = np.unique(classes, return_inverse=True)[1].ravel()
        asked = [captions[i][0] for i in np.unique(kinds, return_index=True)[1]]
        asked = asked[:: math.ceil(len(asked) / 8)]
    if kinds.max() == 0:
        kinds = np.arange(len(kinds))  # each image is its own class
    if len(kinds) < 2:
        refuse(f"--data {args.data} holds one image: what is wrong for it needs another")
    many = np.array([len(lines) for lines in captions])
    data = SimpleNamespace(read=read, kinds=kinds, first=many.cumsum() - many, many=many, vectors=None)
    data.order, counts = np.argsort(kinds, kind="stable"), np.bincount(kinds)
    data.counts, data.starts = counts, counts.cumsum() - counts
    if args.embeddings:
        data.vectors = read_vectors(Path(args.embeddings), args.text)
        if len(data.vectors) != many.sum():
            refuse(f"{args.embeddings} holds {len(data.vectors)} codes, but {args.data} {many.sum()} captions")
        shown = data.first[np.unique(kinds, return_index=True)[1]]
        asked = data.vectors[shown[:: math.ceil(len(shown) / 8)]]
    data.chars = spelled([line for lines in captions for line in lines]).to(args.device)
    data.asked = asked
    return data


def find_captions(folder):
    """All images below a folder, [path], with their captions, [[sentence]], and the names of their classes, [name]."""
    found, table = find_images(folder), {}
    if (folder / "captions.jsonl").is_file():
        with blame(f"{folder}/captions.jsonl needs lines such as {{'file': 'a.jpg', 'captions': ['a red bird']}}"):
            for row in map(json.loads, (folder / "captions.jsonl").read_text("utf-8").splitlines()):
                table[folder / row["file"]] = (
                    [row["caption"].strip()] if "caption" in row else [*map(str, row["captions"])]
                )
    texts = {path.stem: path for path in folder.rglob("text_c10/*/*.txt")}  # the archives'
    with blame(f"a trainvalclasses.txt below {folder} cannot be read as text"):
        lists = {line for path in folder.rglob("trainvalclasses.txt") for line in path.read_text("utf-8").split()}
    rows, bare = [], []
    for file in found.values():
        beside = file.with_suffix(".txt") if file.with_suffix(".txt").is_file() else texts.get(file.stem)
        kind = (beside or file).parent.name
        if not table and beside:
            with blame(f"{beside} cannot be read as text"):
                lines = beside.read_text("utf-8").splitlines()
        else:
            lines = table.get(file, [])
        lines = [line.strip() for line in lines if line.strip()]
        (rows if lines else bare).append((file, lines, kind))
    if not rows and any(file.parent != folder for file in found.values()):
        rows, bare = [(file, named(kind), kind) for file, _, kind in bare], []
    if bare:
        refuse(f"{bare[0][0]} has no captions, as {len(bare)} of {len(found)} images below {folder}")
    if lists:
        rows = [row for row in rows if row[2] in lists]
    return zip(*rows) if rows else refuse(f"{folder} holds no captions of its images")


def named(kind):
    """Captions of an image of which the name of its class is all that is known."""
    name = kind.replace("_", " ").replace("-", " ").lower()
    return [form.format(name) for form in ("a {}", "this is a {}", "a photo of a {}", "the picture shows a {}", "{}")]


class Arrays(pickle._Unpickler):
    """Reads pickled lists of numpy arrays, and nothing that could run code; the one in C takes gigabytes if told to."""

    def find_class(self, module, name):
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray"):
            return lambda *shape: np.ndarray(0, "b")  # of whatever size it says; its bytes tell
        known = module.startswith("numpy") and name in ("dtype", "scalar")
        if known or (module, name) == ("_codecs", "encode"):  # of the bytes of an array
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")


def read_vectors(path, text):
    """Codes float32 (N, text) from a .npy, (N, text) or (images, captions, text), or a pickle of such arrays."""
    with blame(f"{path} cannot be read as codes of {text} numbers"), np.errstate(over="ignore"):
        if path.suffix == ".npy":
            vectors = np.load(path, allow_pickle=False)
        else:
            with open(path, "rb") as file:
                parts = Arrays(file, encoding="latin1").load()
            if sum(part.nbytes for part in parts) > 20 * path.stat().st_size:
                raise ValueError("it holds the same array many times")
            vectors = np.concatenate([part.reshape(-1, text) for part in parts])
        vectors = torch.from_numpy(vectors.astype(np.float32, casting="same_kind"))
        if vectors.shape[-1] != text or not vectors.isfinite().all():
            raise ValueError(f"their shape is {tuple(vectors.shape)}")
        return vectors.reshape(-1, text)


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


@torch.no_grad()
def encode(args, state, data):
    """The codes (M, text) of all captions, less their mean and with a spread of 1, which E keeps."""
    E = state["E"]
    if data.vectors is None:
        said, which = data.chars.unique(dim=0, return_inverse=True)  # many images may have the same caption
        codes = torch.cat([E(chars.long()) for chars in said.split(1000)])[which]
    else:
        codes = data.vectors.to(args.device)
    E.mean.copy_(codes.mean(0))
    E.spread.copy_(codes.std(0).mean().clamp(min=1e-8))
    return (codes - E.mean) / E.spread


def draw_batch(args, data, codes, phase, done):
    """What the step of a phase takes, after `done` of it: images in [-1, 1], codes or characters; by the seed alone."""
    rng, count, size = np.random.default_rng([args.seed, phase, done]), args.batch_size, args.size

    def one_of(kinds):
        return data.order[data.starts[kinds] + (rng.random(len(kinds)) * data.counts[kinds]).astype(int)]

    def said_of(images, average):  # numbers of their captions
        parts = rng.random((len(images), average)) * data.many[images][:, None]
        return torch.from_numpy(data.first[images][:, None] + parts.astype(int)).to(args.device)

    if phase == 0:  # of as many classes as there are
        kinds = np.resize(rng.permutation(len(data.counts)), count)
        chosen = one_of(kinds)
    else:
        places = np.arange(done * count, done * count + count)  # a batch may reach into the next epoch
        chosen = np.array(
            [order_of(args.seed, k // len(data.kinds), len(data.kinds))[k % len(data.kinds)] for k in places]
        )
    if phase == 2:
        return (codes[said_of(chosen, args.average)].mean(1)[RANK::WORLD],)
    x, (mine, world) = [], (RANK, WORLD) if phase else (0, 1)  # E's loss needs all pairs of a batch
    for i, image in enumerate(chosen.tolist()):
        (top, left), mirrored = rng.integers(0, args.load_size - size + 1, 2), rng.random() < 0.5
        if i % world == mine:
            pixels = data.read(image)[:, top : top + size, left : left + size]
            x.append(pixels.flip(-1) if mirrored else pixels)
    x = torch.stack(x).to(args.device) / 127.5 - 1
    if phase == 0:
        return x, data.chars[said_of(chosen, 1)[:, 0]].long(), torch.from_numpy(kinds).to(args.device)
    kinds = np.tile(data.kinds[chosen], args.near * args.wrong)
    others = one_of((kinds + rng.integers(1, len(data.counts), len(kinds))) % len(data.counts))
    t, wrong = (codes[said_of(images, args.average)].mean(1) for images in (chosen, others))
    wrong = wrong.view(args.near, args.wrong * count, -1)
    nearest = (wrong - t.repeat(args.wrong, 1)).square().sum(2).argmin(0)
    wrong = wrong[nearest, torch.arange(len(nearest), device=args.device)].view(args.wrong, count, -1)
    return x, t[RANK::WORLD], wrong[:, RANK::WORLD].flatten(0, 1)


@functools.lru_cache(2)
def order_of(seed, epoch, count):
    """The images of an epoch, in order."""
    return np.random.default_rng([seed, epoch]).permutation(count)


@torch.no_grad()
def draw(args, G, z, t):
    """The images G(z, t), uint8 (N, 3, size, size), with running averages in batch norm."""
    G = deepcopy(G).eval()
    with torch.autocast(z.device.type, torch.bfloat16, args.bf16):
        x = torch.cat([G(*part).float() for part in zip(z.split(500), t.split(500))])
    return (x * 127.5 + 127.5).round().byte().cpu()


@torch.no_grad()
def codes_of(args, state, asked):
    """Codes (N, text) of sentences, or of codes that come from elsewhere, scaled as in training."""
    E, given = state["E"], isinstance(asked, torch.Tensor)
    return ((asked.to(args.device) if given else E(spelled(asked).long().to(args.device))) - E.mean) / E.spread


def sheet(path, images, columns, titles=None):
    """Rows of images, uint8 (N, 3, S, S), in a PNG, each row under its title if there are any."""
    rows = [np.asarray(to_pil_image(make_grid(row, columns, pad_value=255))) for row in images.split(columns)]
    canvas = Image.new(
        "RGB", (max(row.shape[1] for row in rows), sum(len(row) + 12 * bool(titles) for row in rows)), "white"
    )
    top = 0
    for row, title in zip(rows, titles or [""] * len(rows)):
        if titles:
            ImageDraw.Draw(canvas).text((2, top), title.encode("latin1", "replace").decode("latin1"), "black")
            top += 12
        canvas.paste(Image.fromarray(row), (0, top))
        top += len(row)
    with replacing(path) as file:
        canvas.save(file, "PNG")


def paint_sentences(path, args, state, data, columns=8):
    """A row of images for each sentence to paint, each column from one z."""
    torch.manual_seed(args.seed)
    t, z = codes_of(args, state, data.asked), torch.randn(columns, args.nz, device=args.device)
    images = draw(args, state["G"], z.repeat(len(t), 1), t.repeat_interleave(columns, 0))
    sheet(path, images, columns, None if isinstance(data.asked, torch.Tensor) else data.asked)


def paint_figures(args, state, data):
    """RUN/sentences.png, between-sentences.png, between-z.png, and styles.png (Fig. 8, and style transfer)."""
    paint_sentences(args.run / "sentences.png", args, state, data)
    paint_between(args, state, data.asked, args.run)
    if args.style_epochs:
        chosen = torch.stack(
            [data.read(i) for i in data.order[data.starts][:: math.ceil(len(data.starts) / 6)].tolist()]
        )
        start = (args.load_size - args.size) // 2
        x = chosen[:, :, start : start + args.size, start : start + args.size]
        t = codes_of(args, state, data.asked)[:8]
        with torch.no_grad():
            z = state["S"].eval()((x / 127.5 - 1).to(args.device))
        images = draw(args, state["G"], z.repeat_interleave(len(t), 0), t.repeat(len(z), 1))
        rows = torch.cat([x[:, None], images.unflatten(0, (len(z), len(t)))], 1)
        sheet(args.run / "styles.png", rows.flatten(0, 1), len(t) + 1)


def paint_between(args, state, asked, folder, columns=8):
    """Straight lines between two sentences, z fixed in a row, and between two z, the sentence fixed."""
    torch.manual_seed(args.seed)
    t, way = codes_of(args, state, asked), torch.linspace(0, 1, columns, device=args.device)[:, None]
    if len(t) > 1:
        lines = torch.cat([a + way * (b - a) for a, b in zip(t, t[1:])])
        z = torch.randn(len(t) - 1, args.nz, device=args.device).repeat_interleave(columns, 0)
        sheet(folder / "between-sentences.png", draw(args, state["G"], z, lines), columns)
    z = torch.cat([a + way * (b - a) for a, b in torch.randn(len(t), 2, args.nz, device=args.device)])
    sheet(folder / "between-z.png", draw(args, state["G"], z, t.repeat_interleave(columns, 0)), columns)


def sample(args):
    """Draw --sample images of each --prompt by RUN/last.pt into a folder of PNGs, and figures of them beside it."""
    path, to, seed, prompt = args.run / "last.pt", swept(args.to or args.run / "sampled"), args.seed, args.prompt
    checkpoint, count = read_checkpoint(path, args.device), args.sample
    with blame(f"{path} is damaged"), Budget(path.stat().st_size + 2**20), warnings.catch_warnings(action="ignore"):
        args = argparse.Namespace(**vars(args) | checkpoint["settings"])
        state = build(args)
        for name in "EG":
            state[name].load_state_dict(checkpoint[name])
    asked = [prompt]
    if prompt.endswith(".npy"):
        asked = read_vectors(Path(prompt), args.text)
    elif Path(prompt).is_file():
        with blame(f"--prompt {prompt} cannot be read as text"):
            asked = [line.strip() for line in Path(prompt).read_text("utf-8").splitlines() if line.strip()]
    if not len(asked):
        refuse(f"--prompt {prompt} holds no sentences and no codes")
    if args.embeddings and isinstance(asked, list):
        refuse(f"{args.run} was trained on codes of {args.embeddings}: give --prompt a .npy of codes, not a sentence")
    torch.manual_seed(seed)
    t, z = codes_of(args, state, asked), torch.randn(count, args.nz, device=args.device)
    images = draw(args, state["G"], z.repeat(len(t), 1), t.repeat_interleave(count, 0))
    for i, image in enumerate(images):
        with replacing(to / (f"{i:05}.png" if len(t) == 1 else f"{i // count:03}-{i % count:05}.png")) as file:
            to_pil_image(image).save(file, "PNG")
    sheet(
        to.with_name(f"{to.name}-sheet.png"),
        images,
        min(count, 16),
        asked if isinstance(asked, list) and count <= 16 else None,
    )
    paint_between(args, state, asked, to.with_name(f"{to.name}-figures"))
    print(f"drew {len(images)} images into {to}, with {to.name}-sheet.png and {to.name}-figures beside it")
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


def joined(state, path):  # same as dcgan.py
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


class AllSum(torch.autograd.Function):  # same as dcgan.py
    """A tensor (...) summed over all processes, and so is its gradient. -> (...)"""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x := x.clone())
        return x

    @staticmethod
    def backward(ctx, grad):
        return AllSum.apply(grad)


def whole_norm(norm, x):  # same as dcgan.py
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


def main(argv=None):  # same as gan.py
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
