"""Which digits a folder of samples shows, judged by a small convolutional classifier that is trained here once."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import gan
from bench.common import read_digits, read_samples, write


def classify(net, images):
    """The digit that `net` sees in each of the images, uint8 (N, 1, 28, 28). -> (N,)."""
    with torch.no_grad():
        return torch.cat([net(some / 255).argmax(1) for some in images.split(1000)])


def build():
    """The classifier's network: images (N, 1, 28, 28) in [0, 1] -> logits (N, 10)."""
    layers = [nn.Conv2d(1, 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.4), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10))


def train_classifier(images, labels, epochs=6, seed=0):
    """A classifier of digits, uint8 (N, 1, 28, 28) -> logits (N, 10), trained with shifts of up to two pixels."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = build()
        optimiser = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.01, epochs * -(-len(images) // 128))
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(128):
                shift = torch.randint(-2, 3, (2,)).tolist()
                loss = F.cross_entropy(net(images[chosen].roll(shift, (2, 3)) / 255), labels[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return net.eval()


def classifier(args):
    """The classifier for --data, from --cache if it is there, and its accuracy on the test digits."""
    path = args.cache / f"classifier-{args.data}.pt"
    if path.exists():
        kept, net = torch.load(path, weights_only=True), build()
        net.load_state_dict(kept["net"])
        return net.eval(), kept["accuracy"]
    print(f"training a classifier of {args.data} digits, once", flush=True)
    net = train_classifier(*read_digits(args, "train"))
    images, labels = read_digits(args, "test")
    accuracy = classify(net, images).eq(labels).float().mean().item()
    with gan.replacing(path) as file:
        torch.save({"net": net.state_dict(), "accuracy": accuracy}, file)
    return net, accuracy


def options(parser):
    """What the measures of digits take."""
    parser.add_argument("--samples", type=Path, required=True, help="folder of PNGs")
    parser.add_argument("--data", choices=("toy", "mnist"), default="toy", help="what they should look like")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where MNIST lies, or goes to")
    parser.add_argument("--cache", type=Path, default=Path("data"), help="where the trained classifier is kept")
    parser.add_argument("--out", type=Path, help="JSON file for the result")


def measure(args):
    """The row of --samples: the share of each digit and, of names that end in -LABEL, how often it is the one asked.

    `uneven` is half the sum of what the shares of the ten digits are away from a tenth: 0 for equal shares, .9 for one.
    """
    images, names = read_samples(args.samples)
    net, accuracy = classifier(args)
    seen = classify(net, images)
    share = (torch.bincount(seen, minlength=10) / len(seen)).tolist()
    row = {"measure": "digits", "data": args.data, "n_samples": len(seen), "classifier_accuracy": accuracy}
    row |= {"share": [round(value, 4) for value in share], "missing": [i for i in range(10) if not share[i]]}
    row["uneven"] = sum(abs(value - 0.1) for value in share) / 2
    if all(name.rpartition("-")[2].isdigit() and "-" in name for name in names):
        asked = torch.tensor([int(name.rpartition("-")[2]) for name in names])
        row["as_asked"] = seen.eq(asked).float().mean().item()
    return row


def run(args):
    """Print which digits --samples show."""
    write(args, measure(args))
