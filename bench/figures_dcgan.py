"""What a trained dcgan.py has learned, after Radford et al. (2016): guided back-propagation, forgetting, a probe."""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

import dcgan
from bench import linear
from bench.common import read_digits, save_png, write


def load(run, seed):
    """A run's settings, its G and D with running averages, and a D of the same shape with random weights."""
    args = dcgan.get_args(["--run", str(run), "--seed", str(seed), "--device", "cpu", "--precision", "fp32"])
    checkpoint = dcgan.read_checkpoint(run / "last.pt", "cpu")
    with dcgan.blame(f"{run / 'last.pt'} is damaged"):
        args = argparse.Namespace(**vars(args) | checkpoint["settings"])
        trained = dcgan.build(args)
        for name in "GD":
            trained[name].load_state_dict(checkpoint[name])
    random = dcgan.build(argparse.Namespace(**vars(args) | {"seed": args.seed + 1}))["D"]
    return args, trained["G"].eval(), trained["D"].eval(), random


@torch.no_grad()
def average(D, x):
    """A random D whose batch norms have the averages of images x (N, C, S, S), as a trained one's have."""
    for layer in D.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the plain mean over all batches
    D.train()
    for some in x.split(500):
        D(some)
    return D.eval()


def hidden(D, x, guided=False):
    """The outputs of D's LeakyReLUs for x (N, C, S, S): the features of every convolution but the last.

    `guided` lets gradients pass where they and the input of the LeakyReLU are positive, as is the rule for ReLU.
    """
    found = []
    for layer in D.layers[:-1]:
        if guided and isinstance(layer, nn.LeakyReLU):
            on = x.detach() > 0
            x.register_hook(lambda slope, on=on: slope * on)
        x = layer(x)
        if isinstance(layer, nn.LeakyReLU):
            found.append(x)
            if guided:
                x.register_hook(lambda slope: slope.clamp(min=0))
    return found


def labelled(text, images, across):
    """Images (N, C, S, S) in [0, 1] as a sheet of about 900 pixels, `across` in a row, under a line of text."""
    grid = to_pil_image(make_grid(images, across, pad_value=0.5))
    times = max(1, 900 // grid.width)
    grid = grid.resize((grid.width * times, grid.height * times), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (grid.width, grid.height + 24), "white")
    ImageDraw.Draw(sheet).text((4, 4), text, "black", ImageFont.load_default(14))
    sheet.paste(grid, (0, 24))
    return sheet


def stacked(sheets):
    """Sheets below each other."""
    width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    image = Image.new("RGB", (width, height), "white")
    for i, sheet in enumerate(sheets):
        image.paste(sheet, (0, sum(above.height for above in sheets[:i])))
    return image


# -- guided back-propagation (Sec. 6.1, Fig. 5; Springenberg et al., arXiv:1412.6806) -------------------------------


def guide(D, x, filter):
    """Guided gradients (N, C, S, S) of the highest activation of a filter of the last hidden layer, for each of x."""
    x = x.detach().requires_grad_()
    highest = hidden(D, x, guided=True)[-1][:, filter].amax((1, 2))
    (slope,) = torch.autograd.grad(highest.sum(), x)
    return slope


def exciting(D, x, filters=6, count=6):
    """Pairs of image and guided gradient, (filters * count * 2, C, S, S) in [0, 1].

    For each of the first filters of the last hidden layer the `count` images of x that excite it most, anywhere.
    """
    with torch.no_grad():
        answers = torch.cat([hidden(D, some)[-1][:, :filters].amax((2, 3)) for some in x.split(500)])
    pairs = []
    for filter in range(answers.shape[1]):
        best = x[answers[:, filter].topk(count).indices]
        slope = guide(D, best, filter)
        slope = slope / slope.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-20)
        pairs.append(torch.stack([best, slope], 1).flatten(0, 1) / 2 + 0.5)
    return torch.cat(pairs)


def paint_guided(path, D, random, x):
    """Fig. 5: a row a filter, pairs of image and gradient, of the trained D and below of the random one."""
    text = "D: six filters of the last convolution with features, what excites them most and why"
    sheets = [labelled(f"{name} {text}", exciting(net, x), 12) for name, net in (("trained", D), ("random", random))]
    save_png(path, stacked(sheets))


# -- forgetting (Sec. 6.3.2, Fig. 6) --------------------------------------------------------------------------------


def maps_of(G, z):
    """G's second-highest features, after norm and ReLU. (N, nz) -> (N, maps, side, side)."""
    return G.layers[:-5](z[:, :, None, None])  # above are a convolution, norm and ReLU; a convolution and tanh


def redraw(G, maps, dropped):
    """Images, uint8 (N, C, S, S), from features of which the maps that are `dropped`, bool (maps,), are zero."""
    x = G.layers[-5:](maps * ~dropped[:, None, None])
    return (x * 127.5 + 127.5).round().byte()


def read_boxes(path, size):
    """{number of a sample: [[left, top, right, bottom], ...]} in pixels, from a JSON file."""
    try:
        boxes = {int(number): found for number, found in json.loads(path.read_text()).items()}
        for number, found in boxes.items():
            for left, top, right, bottom in found:
                whole = all(isinstance(edge, int) for edge in (left, top, right, bottom))
                if not (whole and 0 <= left < right <= size and 0 <= top < bottom <= size):
                    raise ValueError(f"sample {number} has the box {[left, top, right, bottom]}")
        if not any(boxes.values()) or min(boxes) < 0 or max(boxes) >= 100000:
            raise ValueError("it needs a box, and numbers of samples from 0 to 99999")
    except Exception as error:
        form = '{"3": [[left, top, right, bottom], ...], ...}'
        sys.exit(f"bench: --boxes {path}: give JSON like {form} with whole pixels from 0 to {size} ({error})")
    return boxes


def inside(boxes, size, side):
    """Which of side x side features, or pixels, have their middle in a box on an image of `size`. -> (side, side)."""
    middle, found = (torch.arange(side) + 0.5) * size / side, torch.zeros(side, side, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        found |= ((top < middle) & (middle < bottom))[:, None] & (left < middle) & (middle < right)
    return found


def find_maps(maps, marks, seed=0):
    """Which features (N, maps, side, side) tell of the marked places, bool (N, side, side). -> bool (maps,).

    They have a positive weight in a logistic regression of these places against four times as many at random in the
    same images.
    """
    features, rng = maps.permute(0, 2, 3, 1), torch.Generator().manual_seed(seed)
    positive, places = features[marks], features.flatten(0, 2)
    negative = places[torch.randint(len(places), (4 * len(positive),), generator=rng)]
    targets = torch.cat([torch.ones(len(positive), 1), -torch.ones(len(negative), 1)])
    return linear.fit(torch.cat([positive, negative]), targets, linear.logistic, 1.0)[0][:, 0] > 0


def outlined(images, boxes):
    """uint8 images (N, C, S, S), four times as large, with their boxes in red. -> (N, 3, 4 * S, 4 * S) in [0, 1]."""
    cells = []
    for image, found in zip(images.repeat_interleave(4, 2).repeat_interleave(4, 3), boxes):
        cell = to_pil_image(image).convert("RGB")
        for left, top, right, bottom in found:
            ImageDraw.Draw(cell).rectangle([4 * left, 4 * top, 4 * right - 1, 4 * bottom - 1], outline="red")
        cells.append(pil_to_tensor(cell))
    return torch.stack(cells) / 255


@torch.no_grad()
def redrawn(G, z, dropped):
    """Samples of z before and after maps are dropped, uint8 (N, C, S, S)."""
    maps = maps_of(G, z)
    return redraw(G, maps, torch.zeros_like(dropped)), redraw(G, maps, dropped)


def paint_forgotten(path, args, G, boxes, seed):
    """Fig. 6: ten samples with boxes, without the maps found in these; below, the same for ten that nobody marked."""
    numbers, found = list(boxes), list(boxes.values())
    z = dcgan.codes(args, seed, max(numbers) + 1)[numbers]
    with torch.no_grad():
        maps = maps_of(G, z)
    marks = torch.stack([inside(some, args.size, maps.shape[3]) for some in found])
    if not marks.any():
        every = args.size // maps.shape[3]
        sys.exit(
            f"bench: no box holds the middle of a feature: there is one every {every} pixels, from {every // 2} on"
        )
    pixels = torch.stack([inside(some, args.size, args.size) for some in found])
    if pixels.all():
        sys.exit("bench: --boxes cover all of the marked samples: leave something beside them")
    dropped = find_maps(maps, marks, seed)
    before, after = redrawn(G, z, dropped)
    change = (after.float() - before).abs().mean(1)
    count = f"{int(dropped.sum())} of {len(dropped)} maps"
    print(
        f"without {count} pixels change by {change[pixels].mean():.1f} of 255 in the boxes, "
        f"{change[~pixels].mean():.1f} beside"
    )
    shown = [i for i, some in enumerate(found) if some][:10]
    old = torch.cat([outlined(before[shown], [found[i] for i in shown]), outlined(after[shown], [[]] * 10)])
    new = torch.cat([outlined(images, [[]] * 10) for images in redrawn(G, dcgan.codes(args, [seed, 3], 10), dropped)])
    sheets = [labelled(f"marked samples, and without {count}", old, len(shown)), labelled("new samples", new, 10)]
    save_png(path, stacked(sheets))


def paint_numbered(path, args, G, seed):
    """The first 100 samples with the numbers of dcgan.py's own sheet, large enough to draw boxes on."""
    times = max(1, 112 // args.size)
    images = dcgan.draw(args, G, dcgan.codes(args, seed, 100))
    dcgan.paint(path, dcgan.numbered(images.repeat_interleave(times, 2).repeat_interleave(times, 3)))
    print(
        f"painted {path}: to forget what boxes hold, write JSON like "
        f'{{"3": [[left, top, right, bottom], ...], ...}} for samples by number, in pixels of {args.size}x{args.size} '
        f"(the sheet has each {times} times as large), and give it as --boxes"
    )


# -- the probe (Sec. 5) ---------------------------------------------------------------------------------------------


@torch.no_grad()
def pooled(D, x):
    """The features of every convolution of D but the last, max-pooled to 4x4. (N, C, S, S) -> (N, 16 * all maps)."""
    rows = [[F.adaptive_max_pool2d(maps, 4).flatten(1) for maps in hidden(D, some)] for some in x.split(500)]
    return torch.cat([torch.cat(row, 1) for row in rows])


def probe(args, nets, x, labels, few=100, repeats=10):
    """Write the accuracy of linear SVMs on features of `nets` and on pixels, with all labels and `few` a class."""
    row = {"measure": "probe", "run": args.folder.name, "data": args.data, "few_per_class": few, "repeats": repeats}
    row |= {f"n_{split}": len(found) for split, found in labels.items()}
    kinds = {name: lambda images, D=D: pooled(D, images) for name, D in nets.items()}
    for name, see in (kinds | {"pixels": lambda images: images.flatten(1)}).items():
        features = {split: see(images) for split, images in x.items()}
        mean, _, cost = linear.probe(features, labels, [torch.arange(len(labels["train"]))])
        row |= {f"features_{name}": features["test"].shape[1], f"accuracy_{name}": mean, f"cost_{name}": cost}
        mean, deviation, cost = linear.probe(features, labels, linear.subsets(labels["train"], few, repeats))
        row |= {f"few_accuracy_{name}": mean, f"few_deviation_{name}": deviation, f"few_cost_{name}": cost}
    write(args, row)


def options(parser):
    """What it takes."""
    parser.add_argument("--run", dest="folder", type=Path, required=True, help="run folder of dcgan.py")
    parser.add_argument("--data", choices=("toy", "mnist"), help="labelled digits (those of the run)")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where MNIST lies, or goes to")
    parser.add_argument("--boxes", type=Path, help="JSON file of boxes on samples, by number, whose content to forget")
    parser.add_argument("--seed", type=int, default=0, help="of the samples, as in dcgan.py")
    parser.add_argument("--to", type=Path, default=Path("runs", "figures"), help="folder for the PNGs")
    parser.add_argument("--out", type=Path, help="JSON file for the result")


def run(args):
    """Paint --to/dcgan-guided.png and -forget.png, or -numbered.png to draw boxes on; print the probe of D."""
    settings, G, D, random = load(args.folder, args.seed)
    if args.boxes:
        boxes = read_boxes(args.boxes, settings.size)
        paint_forgotten(args.to / "dcgan-forget.png", settings, G, boxes, args.seed)
    else:
        paint_numbered(args.to / "dcgan-numbered.png", settings, G, args.seed)
    args.data = args.data or settings.data
    if args.data not in ("toy", "mnist"):
        sys.exit(f"bench: {args.folder} learned from {args.data}, which has no labels here: give --data toy or mnist")
    if (settings.channels, settings.size) != (1, 28):
        shape = f"{settings.size}x{settings.size} pixels and {settings.channels} channels"
        sys.exit(
            f"bench: {args.folder} is of {shape}: the digits for guided back-propagation and probe have 28x28 and 1"
        )
    digits = {split: read_digits(args, split) for split in ("train", "valid", "test")}
    x = {split: images / 127.5 - 1 for split, (images, _) in digits.items()}
    random = average(random, x["train"])
    paint_guided(args.to / "dcgan-guided.png", D, random, x["test"])
    probe(args, {"trained": D, "random": random}, x, {split: labels for split, (_, labels) in digits.items()})
