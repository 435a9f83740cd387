"""How often text2img.py draws what a sentence says, judged by a small classifier that comes with the bench.

The sentences are new ones about toy shapes, of combinations of form, ink, size and ground that training held out. A
child process draws one image for each; real images of the same sentences tell how far the judge can be trusted.
"""

import json
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, resize

import text2img
from bench import digits
from bench.common import WEIGHTS, fail, file_hash, read_image, run_script

PARTS = ("form", "ink", "size", "ground")  # what a sentence says, in the order of text2img.VALUES
COUNTS = [len(values) for values in text2img.VALUES]
SEED = 1000  # and those from it on: text2img.py trains and paints with small ones
FILE = WEIGHTS / "shapes.pt"


def examples():
    """What the classifier learns from: images uint8 (N, 3, 28, 28) of all combinations, and labels (N, 4).

    Half of them are soft and noisy, as G's are.
    """
    (images, _, labels), (rare, _, rare_labels) = text2img.shapes(5000, SEED), text2img.shapes(1000, SEED, True)
    images, labels = torch.cat([images, rare]) / 255, torch.cat([labels, rare_labels])
    soft = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = resize(torch.cat([images, soft + 0.1 * torch.randn_like(soft)]), [28, 28], antialias=True)
    return (255 * images).clamp(0, 255).byte(), labels.repeat(2, 1)


def loss(logits, labels):
    """The cross-entropies of the four parts, added up."""
    return sum(F.cross_entropy(*pair) for pair in zip(logits.split(COUNTS, 1), labels.T))


def classifier():
    """The classifier of toy shapes."""
    return digits.load(FILE, 3, sum(COUNTS), examples, loss=loss, batch=32)


@torch.no_grad()
def classify(net, images):
    """What `net` sees in images, uint8 (N, 3, S, S): the numbers of PARTS in text2img.VALUES. -> (N, 4)."""
    logits = net(resize(images / 255, [28, 28], antialias=True))
    return torch.stack([part.argmax(1) for part in logits.split(COUNTS, 1)], 1)


def draw(run, sentences, seed):
    """What text2img.py draws for each sentence, in a process of its own, by a run folder. -> uint8 (N, 3, S, S)."""
    with tempfile.TemporaryDirectory() as place:
        asked, to = Path(place, "sentences.txt"), Path(place, "drawn")
        asked.write_text("\n".join(sentences) + "\n", "utf-8")
        run_script("text2img.py", run, "--prompt", asked, "--sample", 1, "--seed", seed, "--to", to)
        return torch.stack([pil_to_tensor(read_image(file)) for file in sorted(to.glob("*.png"))])


def look(images):
    """Where shapes are, from left to right, and how grounds slope, downwards: (N,) each, of uint8 (N, 3, S, S)."""
    pixels, way = images.float(), torch.linspace(-1, 1, images.shape[3])
    ground = (pixels[..., :1] + pixels[..., -1:]) / 2  # of each row, at the edges
    shape = (pixels - ground).abs().amax(1).sub(40).clamp(min=0).sum(1)  # in each column
    return shape @ way / shape.sum(1).clamp(min=1), ground.mean((1, 3)) @ way


@torch.no_grad()
def styles(run, real, captions):
    """How far z moves shape and slope, against real images, and how G keeps those of x, from S(x) and another sentence.

    `*_spread` is the spread over 8 z of one sentence over that of `real`, `style_*` the correlation with `real`.
    """
    E, G = text2img.load_networks(run)
    S = text2img.StyleEncoder(G.settings.size, G.settings.nz, G.settings.ndf).eval()
    S.load_state_dict(text2img.load_checkpoint(run)["S"])
    t = text2img.encode(E, text2img.spell([lines[0] for lines in captions]))
    z = torch.randn(8 * len(t), G.settings.nz, generator=torch.Generator().manual_seed(0))
    drawn = look(text2img.draw(G.settings, G, z, t.repeat_interleave(8, 0)))
    kept, row = look(text2img.draw(G.settings, G, S(real / 127.5 - 1), t.roll(1, 0))), {}
    for name, given, some, same in zip(("position", "ground"), look(real), drawn, kept):
        row[f"{name}_spread"] = (some.view(-1, 8).var(1).mean().sqrt() / given.std()).item()
        row[f"style_{name}"] = torch.corrcoef(torch.stack([same, given]))[0, 1].item()
    return row


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder of text2img.py on toy data")
    add("--count", type=int, default=500, help="sentences to draw, one image each (%(default)s)")
    add("--seed", type=int, default=0, help="of the sentences and of z (%(default)s)")
    add("--out", type=Path, help="JSON file for the result")


def main(args):
    """The row of a run: the share of images that show all that their sentence says, and each part of it.

    `classifier_accuracy` is that of real images of these sentences: as far can the rest be trusted.
    """
    settings = json.loads((args.run / "config.json").read_text())
    if settings["data"] != "toy":
        fail(f"--run {args.run} learned from {settings['data']}: only sentences about toy shapes can be judged")
    if args.count < 1 or args.seed < 0:
        fail(f"--count {args.count} --seed {args.seed}: give at least one sentence, and no negative seed")
    real, captions, labels = text2img.shapes(args.count, SEED + 1 + args.seed, True, settings["size"])
    images, net = draw(args.run, [lines[0] for lines in captions], args.seed), classifier()
    right, right_real = (classify(net, some).eq(labels) for some in (images, real))
    row = {"measure": "shapes", "run": args.run.name, "weights": file_hash(FILE), "seed": args.seed}
    row |= {"n_samples": len(images), "right": right.all(1).double().mean().item()}
    row |= dict(zip(PARTS, right.double().mean(0).tolist())) | styles(args.run, real[:200], captions[:200])
    return row | {"classifier_accuracy": right_real.all(1).double().mean().item()}
