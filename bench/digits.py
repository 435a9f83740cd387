"""Which digits a folder of samples shows, judged by a small convolutional classifier that comes with the bench."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from bench.common import WEIGHTS, file_hash, parse, read_digits, read_samples, read_weights, save_weights, write


def build(channels=1, classes=10):
    """The classifier's network: images (N, channels, 28, 28) in [0, 1] -> logits (N, classes)."""
    layers = [nn.Conv2d(channels, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.4), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, classes))


def classify(net, images):
    """The digit that `net` sees in each of the images, uint8 (N, 1, 28, 28). -> (N,)."""
    with torch.no_grad():
        return torch.cat([net(some / 255).argmax(1) for some in images.split(1000)])


def train(net, images, labels, loss=F.cross_entropy, epochs=6, batch=128):
    """Train on uint8 images (N, C, 28, 28), shifted by up to two pixels. -> net, ready to be used."""
    optimiser = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.01, epochs * -(-len(images) // batch))
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            shift = torch.randint(-2, 3, (2,)).tolist()
            optimiser.zero_grad()
            loss(net(images[chosen].roll(shift, (2, 3)) / 255), labels[chosen]).backward()
            optimiser.step()
            schedule.step()
    return net.eval()


def train_classifier(images, labels, epochs=6):
    """A classifier of digits from uint8 images (N, 1, 28, 28) and labels (N,); it moves no random state."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return train(build(), images, labels, epochs=epochs)


def weights(data):
    """The file of the classifier's weights."""
    return WEIGHTS / f"digits-{data}.pt"


def classifier(args):
    """The classifier of --data, and its accuracy on the test digits; trained, if its file is not there."""
    if not weights(args.data).exists():
        net, (images, labels) = train_classifier(*read_digits(args, "train")), read_digits(args, "test")
        save_weights(weights(args.data), net, accuracy=classify(net, images).eq(labels).float().mean().item())
    kept, net = read_weights(weights(args.data)), build()
    net.load_state_dict(kept["weights"])
    return net.eval(), kept["accuracy"]


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("--samples", type=Path, required=True, help="folder of images, 28x28 pixels")
    add("--data", choices=("toy", "mnist"), default="toy", help="what they should look like (toy)")
    add("--data-root", type=Path, default=Path("data"), help="where MNIST lies, or goes to (data)")
    add("--out", type=Path, help="JSON file for the result")


def measure(args):
    """The row of --samples: the share of each digit and, of names that end in -LABEL, how often it is the one asked.

    `uneven` is half the sum of what the shares of the ten digits are away from a tenth: 0 for equal shares, .9 for one.
    """
    images, names = read_samples(args.samples)
    net, accuracy = classifier(args)
    seen = classify(net, images)
    share = (torch.bincount(seen, minlength=10) / len(seen)).tolist()
    row = {"measure": "digits", "data": args.data, "n_samples": len(seen), "classifier_accuracy": accuracy}
    row |= {"weights": file_hash(weights(args.data)), "share": [round(value, 4) for value in share]}
    row |= {"missing": [i for i in range(10) if not share[i]], "uneven": sum(abs(s - 0.1) for s in share) / 2}
    asked = [name.rpartition("-")[2] for name in names if "-" in name]
    if len(asked) == len(names) and all(label.isdigit() for label in asked):
        row["as_asked"] = seen.eq(torch.tensor([int(label) for label in asked])).float().mean().item()
    return row


def main(argv=None):
    """Print which digits --samples show."""
    args = parse(argv, "digits", __doc__, options)
    write(args, measure(args))
