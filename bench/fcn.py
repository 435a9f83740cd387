"""FCN-score: what a segmentation network, trained on real photos, finds in generated ones (Isola et al. 2017).

A photo that was made from a label map is good if a network that knows real photos finds the labels in it. Pixel
accuracy, class accuracy and class IoU come from one confusion matrix over all images. They mean something beside those
of real photos that went the same way: shrunk to the size of the samples, enlarged for the network, its scores enlarged
to the labels, which are never resized. With --labels the samples are label maps, made from photos: a pixel has the
class of the nearest colour.

The network is trained once, on real photos with class ids, and kept; the one for toy streets comes with the bench. Or
--segmenter names the pix2pix authors' fcn-8s-cityscapes.caffemodel, which sees photos as large as the labels.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.transforms.v2.functional import normalize, pil_to_tensor
from tqdm import tqdm

import pix2pix
from bench import fcn8s
from bench.common import (
    WEIGHTS,
    fail,
    file_hash,
    find_device,
    find_images,
    load_or_train,
    one_size,
    read_image,
)

CLASSES = {"camvid": 11}  # by the folder's name; its id 11 is for what has no label
IGNORED = 255
METRICS = ("pixel_accuracy", "class_accuracy", "class_iou")


# -- the metrics -----------------------------------------------------------------------------------------------------


def confusion(truth, seen, classes):
    """Pixels by their class in `truth` (row) and the class `seen` (column), integers. -> int64 (classes, classes + 1).

    A pixel whose truth is none of 0 .. classes - 1 is left out. What is seen outside of these is in the last column: an
    error of its own pixel only. (In the authors' util.py it falls into the row of the next class.)
    """
    known = (truth >= 0) & (truth < classes)
    truth, seen = truth[known].long(), seen[known].long()
    seen = seen.where((seen >= 0) & (seen < classes), classes)
    counts = torch.bincount(truth * (classes + 1) + seen, minlength=classes * (classes + 1))
    return counts.view(classes, classes + 1)


def scores(counts):
    """Pixel accuracy, class accuracy and class IoU of what `confusion` counted.
    The latter two are means over the classes that the truth holds. (In the authors' util.py absent ones count as 0.)"""
    counts, right = counts.double(), counts.diagonal().double()
    truth, seen = counts.sum(1), counts.sum(0)[: len(right)]
    held = truth > 0
    found = right.sum() / counts.sum(), (right / truth)[held].mean(), (right / (truth + seen - right))[held].mean()
    return dict(zip(METRICS, torch.stack(found).tolist()))


# -- real scenes -----------------------------------------------------------------------------------------------------


class Scenes(NamedTuple):
    """Real scenes: their names, and functions of a number that give what there is of a scene."""

    names: list
    photo: Callable  # -> Pillow image
    labels: Callable  # -> Pillow image
    ids: Callable  # -> class ids, uint8 (H, W)
    classes: int  # ids from here up are ignored
    stamp: str = ""  # another one if the files have changed
    colours: tuple | None = None  # of the classes and, last, of what is ignored, if they are known


def find_scenes(data, data_root, split, size=64):
    """The scenes of --data, "train" or "test"; toy streets are drawn at `size`."""
    if data == "toy":
        return toy(split, size)
    folder = next((path for path in (Path(data), data_root / data) if path.is_dir()), None)
    if not folder:
        fail(f"--data {data} is neither toy nor a folder, here or below --data-root {data_root}")
    return (cityscapes if (folder / "gtFine").is_dir() else pairs)(folder, split)


def toy(split, size):
    """Toy streets: the test split of the scripts, or scenes that no script has trained on."""
    count, seed = (400, 3) if split == "train" else (100, 1)
    maps, photos, ids = pix2pix.streets(count, seed, size)

    def image_of(arrays):
        return lambda i: Image.fromarray(arrays[i].transpose(1, 2, 0))

    return Scenes([f"{i:03}" for i in range(count)], image_of(photos), image_of(maps), ids.__getitem__, 5, "toy")


def pairs(folder, split):
    """Photo and label map side by side in SPLIT/NAME.jpg, photo left, and class ids in SPLIT_ids/NAME.png.
    Without a test split val is taken. All ids but 255 are classes; those of CamVid are known."""
    part = split if split == "train" or (folder / split).is_dir() else "val"
    images, ids = find_images(folder / part, "--data"), find_images(folder / f"{part}_ids", "--data")
    if alone := sorted(images.keys() ^ ids.keys()):
        fail(f"{images.get(alone[0]) or ids[alone[0]]} is in {part} or {part}_ids of {folder}, but not in both")
    classes = CLASSES.get(folder.resolve().name) or count_classes(find_images(folder / "train_ids", "--data").values())
    scenes = photos_with_ids(images, ids, classes)

    def half(i, right):
        image = scenes.photo(i)
        middle = image.width // 2
        return image.crop((middle * right, 0, middle * (right + 1), image.height))

    return scenes._replace(photo=partial(half, right=0), labels=partial(half, right=1))


def photos_with_ids(photos, ids, classes):
    """Scenes from {name: file} of photos and of class ids."""
    names = sorted(photos)
    stamp = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in photos.values()])
    return Scenes(
        names, lambda i: read_image(photos[names[i]]), None, lambda i: read_ids(ids[names[i]]), classes, stamp
    )


def cityscapes(folder, split):
    """Cityscapes as published, gtFine beside leftImg8bit: 19 classes, all else is ignored; val is the test split."""
    try:
        data = datasets.Cityscapes(folder, "val" if split == "test" else split, target_type=["semantic", "color"])
    except RuntimeError as error:
        fail(f"--data {folder} is not Cityscapes as it is published ({error})")
    kinds = [kind for kind in data.classes if not kind.ignore_in_eval]
    train_ids = np.full(256, IGNORED, np.uint8)
    train_ids[[kind.id for kind in kinds]] = [kind.train_id for kind in kinds]
    return Scenes(
        [Path(file).stem.removesuffix("_leftImg8bit") for file in data.images],
        lambda i: data[i][0],
        lambda i: data[i][1][1].convert("RGB"),
        lambda i: train_ids[np.asarray(data[i][1][0])],
        len(kinds),
        colours=(*(kind.color for kind in kinds), (0, 0, 0)),
    )


def read_ids(file):
    """The class ids in an image of one channel, uint8 (H, W)."""
    try:
        ids = np.asarray(Image.open(file))
    except Exception as error:  # Pillow raises many kinds
        fail(f"{file} cannot be read as an image ({error})")
    if ids.ndim != 2:
        fail(f"{file} has {ids.shape[2]} channels: a class id is one number a pixel")
    return ids.astype(np.int64).clip(0, IGNORED).astype(np.uint8)


def count_classes(files):
    """One more than the highest class id in any of the files."""
    found = (read_ids(file) for file in files)
    return 1 + max(int(ids[ids != IGNORED].max(initial=0)) for ids in found)


def shrunk(image, shape):
    """A real image in the size (H, W) of the samples, as the scripts shrink theirs."""
    return image if image.size == shape[::-1] else image.resize(shape[::-1], Image.Resampling.BICUBIC)


def fitted(ids, shape):
    """Class ids (H, W) in another size: a pixel has that of the nearest."""
    return F.interpolate(ids[None, None].float(), shape, mode="nearest-exact")[0, 0].long()


# -- label maps ------------------------------------------------------------------------------------------------------


def find_palette(scenes):
    """The colour of each class and, last, of what is ignored: the median over real label maps. -> (classes + 1, 3)."""
    if scenes.colours:
        return torch.tensor(scenes.colours)
    counts = torch.zeros(3, scenes.classes + 1, 256, dtype=torch.int64)
    for i in range(len(scenes.names)):
        image = pil_to_tensor(scenes.labels(i)).long()
        ids = fitted(torch.from_numpy(scenes.ids(i)), image.shape[1:]).clamp(max=scenes.classes)
        for count, values in zip(counts, image):
            count += torch.bincount((ids * 256 + values).flatten(), minlength=count.numel()).view_as(count)
    median = (2 * counts.cumsum(2) >= counts.sum(2, keepdim=True)).int().argmax(2)
    return median.where(counts.any(2), 10**4).T  # nothing is near to a class that no map shows


def nearest(palette, image, shape):
    """For each pixel of `shape` (H, W) the number of the colour in `palette` (K, 3) that is nearest to an image's."""
    image = pil_to_tensor(image).int()
    away = torch.stack([(image - colour[:, None, None]).square().sum(0) for colour in palette.int()])
    return fitted(away.argmin(0), shape)


# -- the segmenter ---------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Pairs of 3x3 convolutions at strides 1, 2, 4, ... 32; the scores of each, enlarged, are added up as in FCN-8s.
    x (N, 3, H, W) in [0, 1], H and W 32 or more -> scores (N, classes, H, W)."""

    def __init__(self, classes, widths):
        super().__init__()
        self.levels = nn.ModuleList()
        for c_in, width in zip((3, *widths), widths):
            layers = [nn.Conv2d(c_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            self.levels.append(nn.Sequential(*layers))
        self.scores = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in widths)

    def forward(self, x):
        x, found = normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), []
        for level, score in zip(self.levels, self.scores):
            x = level(F.max_pool2d(x, 2) if found else x)
            found.append(score(x))
        total = found.pop()
        while found:
            total = F.interpolate(total, found[-1].shape[2:], mode="bilinear") + found.pop()
        return total


def train(net, scenes, shape, epochs, device):
    """Train `net` on all scenes, shrunk to `shape` (H, W), in batches of 8, half of them mirrored."""
    numbers, size = range(len(scenes.names)), min(8, len(scenes.names))
    photos = torch.stack([pil_to_tensor(shrunk(scenes.photo(i), shape)) for i in numbers])
    ids = torch.stack([fitted(torch.from_numpy(scenes.ids(i)), shape).byte() for i in numbers])
    ids[ids >= scenes.classes] = IGNORED
    print(f"training a scorer on {len(photos)} real photos, once", flush=True)
    steps = len(photos) // size
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps * epochs)
    for _ in tqdm(range(epochs), "epochs", disable=None):
        for chosen in torch.randperm(len(photos))[: steps * size].split(size):
            x, y = photos[chosen].to(device) / 255, ids[chosen].to(device).long()
            if torch.rand(()) < 0.5:
                x, y = x.flip(3), y.flip(2)
            loss = F.cross_entropy(net(x), y, ignore_index=IGNORED, reduction="sum") / (y != IGNORED).sum().clamp(1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


def find_segmenter(scenes, shape, epochs, cache, device):
    """A network that has learned from `scenes`, shrunk to `shape` (H, W); trained, if no file in `cache` has it.
    Gives back a function like `see` of a photo and a shape, the name of the network and its file's hash."""
    facts = [scenes.stamp, scenes.classes, scenes.names, shape, epochs]
    path = cache / f"scorer-{shape[1]}x{shape[0]}-{hashlib.sha1(repr(facts).encode()).hexdigest()[:8]}.pt"
    if (scenes.stamp, shape) == ("toy", (64, 64)):
        path = WEIGHTS / "streets.pt"  # comes with the bench
    if min(shape) < 32:
        fail(f"photos of {shape[1]}x{shape[0]} pixels are too small to be segmented: give 32x32 or more")
    wide = 64 if scenes.stamp == "toy" else 128
    net = load_or_train(
        path,
        lambda: Small(scenes.classes, (32, 64, wide, wide, wide, wide)).to(device),
        lambda net: train(net, scenes, shape, epochs, device),
    )
    return partial(see, net, shape, device), f"scorer at {shape[1]}x{shape[0]}", file_hash(path)


@torch.no_grad()
def see(net, size, device, image, shape):
    """The class of each pixel of `shape` (H, W) in a photo, a Pillow image, that `net` sees in `size` (or `shape`)."""
    x = F.interpolate(pil_to_tensor(image)[None].to(device) / 255, size or shape, mode="bilinear")
    return F.interpolate(net(x), shape, mode="bilinear")[0].argmax(0).cpu()


# -- the command -----------------------------------------------------------------------------------------------------


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("--samples", type=Path, required=True, help="folder of images, named as the test images")
    layouts = "SPLIT/NAME.jpg, photo | labels, with class ids in SPLIT_ids/NAME.png"
    add("--data", default="toy", help=f"toy, or a folder: {layouts}; or Cityscapes' gtFine and leftImg8bit")
    add("--data-root", type=Path, default="data", help="where that may lie, and where networks are kept (%(default)s)")
    add("--labels", action="store_true", help="the samples are label maps, made from photos")
    add("--segmenter", type=Path, help="fcn-8s-cityscapes.caffemodel (else one is trained on --data)")
    add("--device", help="cpu, cuda, ... (cuda, if there is one)")
    add("--out", type=Path, help="JSON file for the result")


def named(scenes, files, shape):
    """A function of a scene's number that reads its image in `files` {name: file}, in `shape` (H, W)."""
    return lambda i: shrunk(read_image(files[scenes.names[i]]), shape)


def count(scenes, read, look):
    """The confusion of classes over all scenes, by number: look(read(i), shape of the labels) is what is seen."""
    total = torch.zeros(scenes.classes, scenes.classes + 1, dtype=torch.int64)
    for i in tqdm(range(len(scenes.names)), "images", disable=None):
        truth = torch.from_numpy(scenes.ids(i))
        total += confusion(truth, look(read(i), truth.shape), scenes.classes)
    return total


def main(args):
    """The row of --samples: pixel accuracy, class accuracy and class IoU, and real_ ones of real images beside."""
    device, files = find_device(args.device), find_images(args.samples)
    if args.data == "toy":  # numbers, with zeros before them or without
        files = {name.zfill(3): file for name, file in files.items()}
    shape = one_size(files.values())[::-1]
    scenes, known = (find_scenes(args.data, args.data_root, split, shape[0]) for split in ("test", "train"))
    if more := sorted(files.keys() - set(scenes.names)):
        fail(f"{files[more[0]]} is none of the {len(scenes.names)} test images of --data {args.data}")
    if fewer := sorted(set(scenes.names) - files.keys()):
        fail(f"{args.samples} lacks {len(fewer)} of {len(scenes.names)} test images, such as {fewer[0]}")
    real = scenes.labels if args.labels else scenes.photo
    if args.labels:
        look, name, weights = partial(nearest, find_palette(known)), "nearest colour", ""
    elif args.segmenter:  # the authors' protocol
        net, name, weights = fcn8s.load(args.segmenter).to(device), args.segmenter.name, file_hash(args.segmenter)
        look = partial(see, net, None, device)
    else:
        epochs = 12 if args.data == "toy" else 20
        look, name, weights = find_segmenter(known, shape, epochs, args.data_root, device)
    ours = scores(count(scenes, named(scenes, files, shape), look))
    theirs = scores(count(scenes, lambda i: shrunk(real(i), shape), look))
    row = {"measure": "fcn", "data": Path(args.data).resolve().name, "of": "labels" if args.labels else "photos"}
    row |= {"features": name, "weights": weights, "n_samples": len(files), "n_real": len(scenes.names)}
    return row | ours | {f"real_{metric}": value for metric, value in theirs.items()}
