"""What D of a trained dcgan.py has learned (Radford et al. 2016): guided back-propagation, and a probe by digits."""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torchvision.utils import make_grid

import dcgan
from bench.common import fail, read_digits

COSTS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)  # to choose from, as in the authors' svhn_semisup_analysis.py
FEW = 100  # labels of each digit, as many as the paper has of SVHN (Sec. 5.2)


def load(run):
    """A run's settings, its D with running averages, and a D of the same shape with random weights."""
    checkpoint = dcgan.load_checkpoint(run)
    settings = argparse.Namespace(**checkpoint["settings"] | {"device": "cpu"})
    trained = dcgan.build(settings)["D"]
    trained.load_state_dict(checkpoint["D"])
    settings.seed += 1
    return settings, trained.eval(), dcgan.build(settings)["D"]


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
    `guided` lets gradients pass where they and the input of the LeakyReLU are positive, as is the rule for ReLU."""
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


# -- guided back-propagation (Sec. 6.1, Fig. 5; Springenberg et al., arXiv:1412.6806) -------------------------------


def guide(D, x, filter):
    """Guided gradients (N, C, S, S) of the highest activation of a filter of the last hidden layer, for each of x."""
    x = x.detach().requires_grad_()
    highest = hidden(D, x, guided=True)[-1][:, filter].amax((1, 2))
    (slope,) = torch.autograd.grad(highest.sum(), x)
    return slope


def exciting(D, x, filters=6, count=6):
    """Pairs of image and guided gradient, (filters * count * 2, C, S, S) in [0, 1].
    For each of the first filters of the last hidden layer the `count` images of x that excite it most, anywhere."""
    with torch.no_grad():
        answers = torch.cat([hidden(D, some)[-1][:, :filters].amax((2, 3)) for some in x.split(500)])
    pairs = []
    for filter in range(answers.shape[1]):
        best = x[answers[:, filter].topk(count).indices]
        slope = guide(D, best, filter)
        slope = slope / slope.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-20)
        pairs.append(torch.stack([best, slope], 1).flatten(0, 1) / 2 + 0.5)
    return torch.cat(pairs)


# -- the probe (Sec. 5): an L2-SVM on features ----------------------------------------------------------------------


@torch.no_grad()
def pooled(D, x):
    """The features of every convolution of D but the last, max-pooled to 4x4. (N, C, S, S) -> (N, 16 * all maps)."""
    rows = [[F.adaptive_max_pool2d(maps, 4).flatten(1) for maps in hidden(D, some)] for some in x.split(500)]
    return torch.cat([torch.cat(row, 1) for row in rows])


def fit(x, targets, cost):
    """An L2-SVM of x (N, features) for each class of targets +-1 (N, classes): weights (features, classes) and bias.
    It minimises |weights|^2 / 2 + cost * sum of max(0, 1 - target * (x @ weights + bias))^2."""
    weights = torch.zeros(x.shape[1], targets.shape[1], requires_grad=True)
    bias = torch.zeros(targets.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective():
        optimiser.zero_grad()
        hinge = (1 - targets * (x @ weights + bias)).clamp(min=0)
        value = (weights**2).sum() / 2 + cost * (hinge**2).sum()
        value.backward()
        return value

    optimiser.step(objective)
    return weights.detach(), bias.detach()


def probe(features, labels, count):
    """Test accuracy of SVMs that learn from `count` examples of each digit, and their cost, the best for "valid".

    `features` (N, n) and `labels` (N,) are dicts of the splits train, valid and test. Features are divided by their
    root mean square over "train", so that a cost means the same for all kinds.
    """
    scale, found = features["train"].square().mean().sqrt(), []
    x = {split: some / scale for split, some in features.items()}
    chosen = torch.cat([(labels["train"] == digit).nonzero()[:count, 0] for digit in range(10)])
    targets = 2.0 * F.one_hot(labels["train"][chosen], 10) - 1
    for cost in COSTS:
        weights, bias = fit(x["train"][chosen], targets, cost)
        right = {split: (x[split] @ weights + bias).argmax(1).eq(labels[split]).double().mean() for split in x}
        found.append((right["valid"].item(), right["test"].item(), cost))
    _, accuracy, cost = max(found, key=lambda each: each[0])
    return accuracy, cost


# -- the command -----------------------------------------------------------------------------------------------------


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder of dcgan.py on toy or MNIST digits")
    add("--data-root", type=Path, default="data", help="where MNIST lies, or goes to (%(default)s)")
    add("--to", type=Path, default="runs/figures", help="folder for the PNG (%(default)s)")
    add("--out", type=Path, help="JSON file for the result")


def main(args):
    """Paint --to/dcgan-guided.png: what excites D, beside a random one, and why. The row is that of the probe.
    It has accuracies with all labels and with a few, by features of both and by pixels."""
    settings, trained, random = load(args.run)
    if settings.data not in ("toy", "mnist") or settings.size != 28:
        fail(f"--run {args.run} is not of digits of 28x28 pixels: there are no labels to probe it with")
    x, labels = {}, {}
    for split in ("train", "valid", "test"):
        images, labels[split] = read_digits(settings.data, args.data_root, split)
        x[split] = images / 127.5 - 1
    nets = {"trained": trained, "random": average(random, x["train"])}
    figure = Figure((9, 10), layout="tight")
    for axes, (name, D) in zip(figure.subplots(2), nets.items()):
        axes.imshow(make_grid(exciting(D, x["test"]), 12, pad_value=0.5).permute(1, 2, 0).numpy())
        axes.set_title(f"{name} D: six filters, what excites them most and why", loc="left")
        axes.axis("off")
    args.to.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.to / "dcgan-guided.png")
    print(f"painted {args.to}/dcgan-guided.png")
    row = {"measure": "probe", "run": args.run.name, "data": settings.data, "few_per_class": FEW}
    row |= {f"n_{split}": len(found) for split, found in labels.items()}
    for name in (*nets, "pixels"):
        features = {split: pooled(nets[name], some) if name in nets else some.flatten(1) for split, some in x.items()}
        row[f"features_{name}"] = features["test"].shape[1]
        row[f"accuracy_{name}"], row[f"cost_{name}"] = probe(features, labels, None)
        row[f"few_accuracy_{name}"], row[f"few_cost_{name}"] = probe(features, labels, FEW)
    return row
