"""Which digits a folder of samples shows, judged by a small convolutional classifier that comes with the bench."""

import torch
from torch import nn
from torch.nn import functional as F

from bench.common import WEIGHTS, digit_options, file_hash, load_or_train, read_digits, read_samples

options = digit_options


def build(channels, classes):
    """A classifier: images (N, channels, 28, 28) in [0, 1] -> logits (N, classes)."""
    layers = [nn.Conv2d(channels, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.4), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, classes))


def train(net, images, labels, loss=F.cross_entropy, batch=128, epochs=6):
    """Train on uint8 images (N, C, 28, 28), shifted by up to two pixels."""
    optimiser = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.01, epochs * -(-len(images) // batch))
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            shift = torch.randint(-2, 3, (2,)).tolist()
            optimiser.zero_grad()
            loss(net(images[chosen].roll(shift, (2, 3)) / 255), labels[chosen]).backward()
            optimiser.step()
            schedule.step()


def load(file, channels, classes, examples, **how):
    """The classifier in a file; if it is not there, one is trained on examples(), images and labels, and written."""
    return load_or_train(file, lambda: build(channels, classes), lambda net: train(net, *examples(), **how))


def weights(data):
    """The file of the classifier of digits."""
    return WEIGHTS / f"digits-{data}.pt"


def classifier(data, data_root):
    """The classifier of toy or MNIST digits."""
    return load(weights(data), 1, 10, lambda: read_digits(data, data_root, "train"))


@torch.no_grad()
def classify(net, images):
    """The digit that `net` sees in each of the images, uint8 (N, 1, 28, 28). -> (N,)."""
    return torch.cat([net(some / 255).argmax(1) for some in images.split(1000)])


def main(args):
    """The row of --samples: the share of each digit and, of names that end in -LABEL, how often it is the one asked.
    `uneven` is half the sum of what the shares of the ten digits are away from a tenth: 0 if equal, .9 for one."""
    images, names = read_samples(args.samples)
    net, (real, labels) = classifier(args.data, args.data_root), read_digits(args.data, args.data_root, "test")
    seen, accuracy = classify(net, images), classify(net, real).eq(labels).double().mean().item()
    share = (torch.bincount(seen, minlength=10) / len(seen)).tolist()
    row = {"measure": "digits", "data": args.data, "n_samples": len(seen), "classifier_accuracy": accuracy}
    row |= {"weights": file_hash(weights(args.data)), "share": [round(value, 4) for value in share]}
    row |= {"missing": [i for i in range(10) if not share[i]], "uneven": sum(abs(s - 0.1) for s in share) / 2}
    asked = [name.rpartition("-")[2] for name in names if "-" in name]
    if len(asked) == len(names) and all(label.isdigit() for label in asked):
        row["as_asked"] = seen.eq(torch.tensor([int(label) for label in asked])).float().mean().item()
    return row
