"""How often text2img.py draws what a sentence says, judged by a small classifier that is trained here once.

The sentences are new ones about toy shapes, by default of combinations of form, ink, size and ground that training held
out. A child process draws one image for each; real images of the same sentences tell how far the judge can be trusted.
"""

import hashlib
import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import resize

import text2img
from bench.common import write

PARTS = ("form", "ink", "size", "ground")  # what a sentence says, in the order of text2img.VALUES
COUNTS = [len(values) for values in text2img.VALUES]
SEED = 1000  # and those from it on: text2img.py trains and paints with small ones


def build():
    """The classifier's network: images (N, 3, 64, 64) in [0, 1] -> logits (N, 17), one after another those of PARTS."""
    layers, width = [], (3, 16, 32, 64)
    for a, b in zip(width, width[1:]):
        layers += [nn.Conv2d(a, b, 5, 2, 2), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 64, 128), nn.ReLU(), nn.Linear(128, sum(COUNTS))
    )


@torch.no_grad()
def classify(net, images):
    """What `net` sees in images, uint8 (N, 3, S, S): the numbers of PARTS in text2img.VALUES. -> (N, 4)."""
    found = []
    for some in images.split(500):
        logits = net(resize(some / 255, [64, 64], antialias=True))
        found.append(torch.stack([part.argmax(1) for part in logits.split(COUNTS, 1)], 1))
    return torch.cat(found)


def train_classifier(images, labels, epochs=3, seed=0):
    """A classifier of images, uint8 (N, 3, 64, 64), with labels (N, 4), trained on shifted, blurred and noisy ones."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = build()
        optimiser = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.01, epochs * -(-len(images) // 32))
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(32):
                x = images[chosen].roll(torch.randint(-3, 4, (2,)).tolist(), (2, 3)) / 255
                if torch.rand(()) < 0.5:  # G's edges are softer than real ones
                    x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
                logits = net(x + 0.1 * torch.rand(()) * torch.randn_like(x))
                loss = sum(F.cross_entropy(*pair) for pair in zip(logits.split(COUNTS, 1), labels[chosen].T))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return net.eval()


def classifier(args):
    """The classifier of toy shapes, of all combinations, from --cache if it is there and was made as it is now."""
    made = "".join(inspect.getsource(part) for part in (text2img.shapes, build, train_classifier))
    path, net = args.cache / f"classifier-shapes-{hashlib.sha1(made.encode()).hexdigest()[:8]}.pt", build()
    if path.exists():
        try:
            net.load_state_dict(torch.load(path, weights_only=True))
        except Exception as error:
            sys.exit(f"bench: {path} is no classifier of shapes: delete it ({str(error).partition(chr(10))[0]})")
        return net.eval()
    print("training a classifier of toy shapes, once", flush=True)
    parts = [text2img.shapes(count, SEED, held_out) for count, held_out in ((5000, False), (1000, True))]
    net = train_classifier(*(torch.cat(both) for both in zip(*((images, labels) for images, _, labels in parts))))
    with text2img.replacing(path) as file:
        torch.save(net.state_dict(), file)
    return net


def drawn(run, sentences, seed):
    """What text2img.py draws for each sentence, in a process of its own, by a run folder. -> uint8 (N, 3, S, S)."""
    with tempfile.TemporaryDirectory() as place:
        asked, to = Path(place, "sentences.txt"), Path(place, "drawn")
        asked.write_text("\n".join(sentences) + "\n", "utf-8")
        command = [sys.executable, text2img.__file__, "--run", run, "--prompt", asked, "--sample", "1"]
        child = subprocess.run([*map(str, command), "--seed", str(seed), "--to", to], capture_output=True, text=True)
        if child.returncode:
            said = child.stderr.strip().splitlines() or [f"text2img.py ended with {child.returncode}"]
            sys.exit(f"bench: {said[-1]}")
        files = [to / f"{i:03}-00000.png" for i in range(len(sentences))] if len(sentences) > 1 else [to / "00000.png"]
        return torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])).movedim(3, 1)


def options(parser):
    """What it takes."""
    parser.add_argument(
        "--run", dest="folder", type=Path, required=True, help="run folder of text2img.py on toy shapes"
    )
    parser.add_argument("--count", type=int, default=500, help="sentences to draw, one image each")
    parser.add_argument("--seen", action="store_true", help="sentences of combinations that were trained on")
    parser.add_argument("--seed", type=int, default=0, help="of the sentences and of z")
    parser.add_argument("--cache", type=Path, default=Path("data"), help="where the trained classifier is kept")
    parser.add_argument("--out", type=Path, help="JSON file for the result")


def measure(args):
    """The row of a run: of --count images the share that shows all that its sentence says, and each part of it.

    `classifier_accuracy` is that of real images of these sentences: as far can the rest be trusted.
    """
    if args.count < 1 or args.seed < 0:
        sys.exit(f"bench: --count {args.count} --seed {args.seed}: give at least one sentence, and no negative seed")
    try:
        settings = json.loads((args.folder / "config.json").read_text())
        data, size = settings["data"], settings["size"]
    except Exception as error:
        sys.exit(f"bench: --run {args.folder} is no run folder: train one with `python text2img.py` ({error})")
    if data != "toy":
        sys.exit(f"bench: --run {args.folder} learned from {data}: only sentences about toy shapes can be judged")
    real, captions, labels = text2img.shapes(args.count, SEED + 1 + args.seed, not args.seen, size)
    images = drawn(args.folder, [lines[0] for lines in captions], args.seed)
    net = classifier(args)
    right, right_real = (classify(net, some).eq(labels) for some in (images, real))
    row = {"measure": "shapes", "run": args.folder.name, "sentences": "trained" if args.seen else "held out"}
    row |= {"seed": args.seed, "n_samples": len(images), "right": right.all(1).double().mean().item()}
    row |= dict(zip(PARTS, right.double().mean(0).tolist()))
    return row | {"classifier_accuracy": right_real.all(1).double().mean().item()}


def run(args):
    """Print how often a run draws what a sentence says."""
    write(args, measure(args))
