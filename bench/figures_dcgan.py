"""What a trained dcgan.py has learned, after Radford et al. (2016): guided back-propagation, forgetting, a probe."""

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, make_grid

import dcgan
from bench import linear
from bench.common import fail, parse, read_digits, read_weights, write


def load(run, seed):
    """A run's settings, its G and D with running averages, and a D of the same shape with random weights."""
    checkpoint = read_weights(run / "last.pt")
    try:
        args = argparse.Namespace(**vars(dcgan.get_args([])) | checkpoint["settings"] | {"device": "cpu"})
        trained = dcgan.build(args)
        for name in "GD":
            trained[name].load_state_dict(checkpoint[name])
    except (KeyError, RuntimeError):
        fail(f"--run {run} is no run of dcgan.py")
    random = dcgan.build(argparse.Namespace(**vars(args) | {"seed": seed + 1}))["D"]
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


def paint(path, parts):
    """Sheets below each other: for each title the images (N, C, S, S) in [0, 1], and how many are in a row."""
    grids = [make_grid(images, across, pad_value=0.5) for images, across in parts.values()]
    heights = [grid.shape[1] / grid.shape[2] for grid in grids]
    figure = Figure((9, sum(9 * height + 0.4 for height in heights)), layout="tight")
    panels = figure.subplots(len(grids), height_ratios=heights, squeeze=False)[:, 0]
    for axes, title, grid in zip(panels, parts, grids):
        axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, loc="left", fontsize=10)
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"painted {path}")


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


# -- forgetting (Sec. 6.3.2, Fig. 6) --------------------------------------------------------------------------------


def codes(nz, seed, count):
    """z (count, nz), uniform in [-1, 1]; the first ones are those of a smaller count."""
    return 2 * torch.rand(count, nz, generator=torch.Generator().manual_seed(seed)) - 1


def maps_of(G, z):
    """G's second-highest features, after norm and ReLU. (N, nz) -> (N, maps, side, side)."""
    return G.layers[:-5](z[:, :, None, None])  # above are a convolution, norm and ReLU; a convolution and tanh


@torch.no_grad()
def redraw(G, z, dropped):
    """Samples of z, uint8 (N, C, S, S), from features of which the maps that are `dropped`, bool (maps,), are zero."""
    x = G.layers[-5:](maps_of(G, z) * ~dropped[:, None, None])
    return (x * 127.5 + 127.5).round().byte()


def read_boxes(path, size):
    """{number of a sample: [[left, top, right, bottom], ...]} in pixels, from a JSON file."""
    try:
        boxes = {int(number): found for number, found in json.loads(path.read_text()).items() if found}
        left, top, right, bottom = torch.tensor([box for found in boxes.values() for box in found]).T
        if min(*left, *top) < 0 or max(*right, *bottom) > size or min(*(right - left), *(bottom - top)) < 1:
            raise ValueError("a box has no pixels, or reaches beyond")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        form = '{"3": [[left, top, right, bottom], ...], ...}'
        fail(f"--boxes {path}: give JSON like {form}, in pixels from 0 to {size} ({error})")
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
    large = images.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    edges = [4 * torch.tensor(found) - torch.tensor([0, 0, 1, 1]) for found in boxes]  # the last pixels are in the box
    return torch.stack([draw_bounding_boxes(*pair, colors="red") for pair in zip(large, edges)]) / 255


def paint_forgotten(path, args, G, boxes, seed):
    """Fig. 6: ten samples with boxes, without the maps found in these; below, the same for ten that nobody marked."""
    z = codes(args.nz, seed, max(boxes) + 1)[[*boxes]]
    with torch.no_grad():
        maps = maps_of(G, z)
    marks = torch.stack([inside(found, args.size, maps.shape[3]) for found in boxes.values()])
    pixels = torch.stack([inside(found, args.size, args.size) for found in boxes.values()])
    if not marks.any() or pixels.all():
        fail(f"--boxes: mark {args.size // maps.shape[3]} pixels or more a side, and leave something beside them")
    dropped = find_maps(maps, marks, seed)
    nothing, count = torch.zeros_like(dropped), f"{int(dropped.sum())} of {len(dropped)} maps"
    before, after = redraw(G, z, nothing), redraw(G, z, dropped)
    change = (after.float() - before).abs().mean(1)
    print(f"without {count} pixels change by {change[pixels].mean():.1f} of 255 in the boxes, ", end="")
    print(f"{change[~pixels].mean():.1f} beside")
    new, shown = codes(args.nz, seed + 1, 10), min(10, len(z))
    old = torch.cat([outlined(before[:10], boxes.values()), outlined(after[:10], boxes.values())])
    fresh = torch.cat([redraw(G, new, nothing), redraw(G, new, dropped)]) / 255
    paint(path, {f"marked samples, and without {count}": (old, shown), "new samples": (fresh, 10)})


# -- the probe (Sec. 5) ---------------------------------------------------------------------------------------------


@torch.no_grad()
def pooled(D, x):
    """The features of every convolution of D but the last, max-pooled to 4x4. (N, C, S, S) -> (N, 16 * all maps)."""
    rows = [[F.adaptive_max_pool2d(maps, 4).flatten(1) for maps in hidden(D, some)] for some in x.split(500)]
    return torch.cat([torch.cat(row, 1) for row in rows])


def probe(nets, x, labels, few=100, repeats=10):
    """Accuracies of linear SVMs on features of `nets` and on pixels, with all labels and `few` a class, as a row."""
    row = {"few_per_class": few, "repeats": repeats} | {f"n_{split}": len(found) for split, found in labels.items()}
    for name in (*nets, "pixels"):
        features = {split: pooled(nets[name], some) if name in nets else some.flatten(1) for split, some in x.items()}
        mean, _, cost = linear.probe(features, labels, [torch.arange(len(labels["train"]))])
        row |= {f"features_{name}": features["test"].shape[1], f"accuracy_{name}": mean, f"cost_{name}": cost}
        mean, deviation, cost = linear.probe(features, labels, linear.subsets(labels["train"], few, repeats))
        row |= {f"few_accuracy_{name}": mean, f"few_deviation_{name}": deviation, f"few_cost_{name}": cost}
    return row


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("--run", dest="folder", type=Path, required=True, help="run folder of dcgan.py")
    add("--data", choices=("toy", "mnist"), help="labelled digits (those of the run)")
    add("--data-root", type=Path, default=Path("data"), help="where MNIST lies, or goes to (data)")
    add("--boxes", type=Path, help="JSON file of boxes on samples, by number, whose content to forget")
    add("--seed", type=int, default=0, help="of the samples (%(default)s)")
    add("--to", type=Path, default=Path("runs", "figures"), help="folder for the PNGs (%(default)s)")
    add("--out", type=Path, help="JSON file for the result")


def main(argv=None):
    """Paint --to/dcgan-guided.png and -forget.png, or -numbered.png to draw boxes on; print the probe of D."""
    args = parse(argv, "figures dcgan", __doc__, options)
    settings, G, D, random = load(args.folder, args.seed)
    if args.boxes:
        paint_forgotten(args.to / "dcgan-forget.png", settings, G, read_boxes(args.boxes, settings.size), args.seed)
    else:
        images = redraw(G, codes(settings.nz, args.seed, 100), torch.zeros(len(G.layers[-5].weight), dtype=torch.bool))
        paint(args.to / "dcgan-numbered.png", {"samples 0 to 99, ten in a row, for --boxes": (images / 255, 10)})
    args.data = args.data or settings.data
    if args.data not in ("toy", "mnist") or (settings.channels, settings.size) != (1, 28):
        fail(f"--run {args.folder} is not of grey images of 28x28 pixels: there are no labels to probe it with")
    digits = {split: read_digits(args, split) for split in ("train", "valid", "test")}
    x, labels = {}, {}
    for split, (images, labels[split]) in digits.items():
        x[split] = images / 127.5 - 1
    nets = {"trained": D, "random": average(random, x["train"])}
    text = "D: six filters of the last convolution with features, what excites them most and why"
    sheets = {f"{name} {text}": (exciting(net, x["test"]), 12) for name, net in nets.items()}
    paint(args.to / "dcgan-guided.png", sheets)
    write(args, {"measure": "probe", "run": args.folder.name, "data": args.data} | probe(nets, x, labels))
