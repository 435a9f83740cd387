"""FCN-score: what a segmentation network, trained on real photos, finds in generated ones (Isola et al. 2017).

A photo that was made from a label map is good if a network that knows real photos finds the labels in it. Pixel
accuracy, class accuracy and class IoU come from one confusion matrix over all images. They mean something beside those
of real photos that went the same way: shrunk to the size of the samples, enlarged for the network, its scores enlarged
to the labels, which are never resized. With --labels the samples are label maps, made from photos: a pixel has the
class of the nearest colour.

The network is trained once, on real photos with class ids, and kept. Or --segmenter names a file of trained weights: a
state dict of one of the networks, whose input is RGB normalised with ImageNet's mean and deviation, as torchvision has
it; or the pix2pix authors' fcn-8s-cityscapes.caffemodel, whose input is as large as the labels. A program (.pt2,
TorchScript) is not taken, as loading one can run any code.
"""

import hashlib
import inspect
import math
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model, list_models, segmentation
from torchvision.transforms.v2.functional import pil_to_tensor, resize

import pix2pix
from bench import fcn8s
from bench.common import write

NETS = ("fcn_small", "fcn8s", *list_models(segmentation))
RATES = {"fcn_small": 2e-3, "fcn8s": 1e-4}  # and 5e-4 for the others
CLASSES = {"camvid": 11}  # by the folder's name; its id 11 is for what has no label
IGNORED = 255
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# The 19 classes of Cityscapes, as in cityscapesscripts/helpers/labels.py: the id in labelIds.png, and the colour
CITYSCAPES = {
    7: (128, 64, 128),  # road
    8: (244, 35, 232),  # sidewalk
    11: (70, 70, 70),  # building
    12: (102, 102, 156),  # wall
    13: (190, 153, 153),  # fence
    17: (153, 153, 153),  # pole
    19: (250, 170, 30),  # traffic light
    20: (220, 220, 0),  # traffic sign
    21: (107, 142, 35),  # vegetation
    22: (152, 251, 152),  # terrain
    23: (70, 130, 180),  # sky
    24: (220, 20, 60),  # person
    25: (255, 0, 0),  # rider
    26: (0, 0, 142),  # car
    27: (0, 0, 70),  # truck
    28: (0, 60, 100),  # bus
    31: (0, 80, 100),  # train
    32: (0, 0, 230),  # motorcycle
    33: (119, 11, 32),  # bicycle
}


# -- the metrics -----------------------------------------------------------------------------------------------------


def confusion(truth, seen, classes):
    """Pixels by their class in `truth` (row) and the class `seen` (column), integers. -> int64 (classes, classes + 1).

    A pixel whose truth is none of 0 .. classes - 1 is left out. What is seen outside of these is in the last column: an
    error of its own pixel only.
    """
    known = (truth >= 0) & (truth < classes)
    truth, seen = truth[known].long(), seen[known].long()
    seen = seen.where((seen >= 0) & (seen < classes), classes)
    counts = torch.bincount(truth * (classes + 1) + seen, minlength=classes * (classes + 1))
    return counts.view(classes, classes + 1)


def confusion_compat(truth, seen, classes):
    """What the authors' util.py counts. -> int64 (classes, classes).

    A class seen beyond these falls into the next row, and beyond the last row it makes the whole image count nothing.
    """
    known = (truth >= 0) & (truth < classes)
    counts = torch.bincount(truth[known].long() * classes + seen[known].long(), minlength=classes**2)
    return counts.view(classes, classes) if len(counts) == classes**2 else counts.new_zeros(classes, classes)


def scores(counts, compat=False):
    """Pixel accuracy, class accuracy and class IoU of what `confusion` or, with `compat`, `confusion_compat` counted.

    The latter two are means over the classes that the truth holds; in the authors' util.py over all, with 0 for those
    that it doesn't hold.
    """
    counts, right = counts.double(), counts.diagonal().double()
    truth, seen = counts.sum(1), counts.sum(0)[: len(right)]
    tiny, held = (1e-12, slice(None)) if compat else (0, truth > 0)
    accuracy, iou = right / (truth + tiny), right / (truth + seen - right + tiny)
    found = right.sum() / (counts.sum() + tiny), accuracy[held].mean(), iou[held].mean()
    return dict(zip(("pixel_accuracy", "class_accuracy", "class_iou"), torch.stack(found).tolist()))


def nearest(image, palette):
    """For each pixel of an image (3, H, W) the number of the nearest colour in `palette` (K, 3). -> (H, W)."""
    return torch.stack([(image.int() - colour[:, None, None]).square().sum(0) for colour in palette.int()]).argmin(0)


# -- real scenes -----------------------------------------------------------------------------------------------------


class Scenes(NamedTuple):
    """Real scenes: their names, and functions of a number that give what there is of a scene."""

    names: list
    photo: Callable  # -> Pillow image
    labels: Callable  # -> Pillow image
    ids: Callable  # -> class ids, uint8 (H, W)
    classes: int  # ids from here up are ignored
    stamp: str  # another one if the scenes have changed
    colours: tuple | None = None  # of the classes and, last, of what is ignored, if they are known


def find_scenes(args, split, size=64):
    """The scenes of --data, "train" or "test"; toy streets are drawn at `size`, which makes them others."""
    if args.data == "toy":
        return toy(split, size)
    folder = next((path for path in (Path(args.data), args.data_root / args.data) if path.is_dir()), None)
    if not folder:
        sys.exit(f"bench: --data {args.data} is neither toy nor a folder, here or below --data-root {args.data_root}")
    return cityscapes(folder, split) if (folder / "gtFine").is_dir() else pairs(folder, split, args.classes)


def toy(split, size):
    """Toy streets: the test split of the scripts, or scenes that no script has trained on."""
    count, seed = (400, 3) if split == "train" else (100, 1)
    maps, photos, ids = pix2pix.streets(count, seed, size)

    def photo(i):
        return Image.fromarray(photos[i].transpose(1, 2, 0))

    def labels(i):
        return Image.fromarray(maps[i].transpose(1, 2, 0))

    return Scenes(
        [f"{i:03}" for i in range(count)], photo, labels, ids.__getitem__, 5, inspect.getsource(pix2pix.streets)
    )


def pairs(folder, split, classes=None):
    """Photo and label map side by side in SPLIT/NAME.jpg, photo left, and class ids in SPLIT_ids/NAME.png.

    Without a test split val is taken. Without `classes` all ids but 255 are classes; those of CamVid are known.
    """
    parts = ("train",) if split == "train" else ("test", "val")
    part = next((part for part in parts if (folder / part).is_dir()), split)
    if not (folder / f"{part}_ids").is_dir():
        sys.exit(f"bench: {folder} has no class ids: put those of {part}/NAME.jpg into {part}_ids/NAME.png")
    images, ids = find_images(folder / part), find_images(folder / f"{part}_ids")
    if alone := sorted(images.keys() ^ ids.keys()):
        sys.exit(
            f"bench: {images.get(alone[0]) or ids[alone[0]]} is in {part} or {part}_ids of {folder}, but not in both"
        )
    names = sorted(images)

    def photo(i):
        image = read_image(images[names[i]])
        return image.crop((0, 0, image.width // 2, image.height))

    def labels(i):
        image = read_image(images[names[i]])
        return image.crop((image.width // 2, 0, image.width // 2 * 2, image.height))

    def read(i):
        return read_ids(ids[names[i]])

    classes = classes or CLASSES.get(folder.resolve().name)
    if not classes:
        found = [read_ids(file) for file in find_images(folder / "train_ids").values()]
        classes = 1 + max(int(some[some != IGNORED].max(initial=0)) for some in found)
    return Scenes(names, photo, labels, read, classes, stamp([*images.values(), *ids.values()]))


def cityscapes(folder, split):
    """Cityscapes as published, gtFine beside leftImg8bit: 19 classes, all else is ignored; val is the test split."""
    part, end = "val" if split == "test" else split, "_gtFine_labelIds.png"
    files = sorted((folder / "gtFine" / part).glob(f"*/*{end}"))
    if not files:
        sys.exit(f"bench: {folder / 'gtFine' / part} holds no CITY/NAME{end}: unpack gtFine_trainvaltest.zip")
    names, classes = [file.name.removesuffix(end) for file in files], np.full(256, IGNORED, np.uint8)
    classes[[*CITYSCAPES]] = range(len(CITYSCAPES))

    def photo(i):
        return read_image(folder / "leftImg8bit" / part / files[i].parent.name / f"{names[i]}_leftImg8bit.png")

    def labels(i):
        return read_image(files[i].with_name(f"{names[i]}_gtFine_color.png"))

    def read(i):
        return classes[read_ids(files[i])]

    return Scenes(names, photo, labels, read, len(CITYSCAPES), stamp(files), (*CITYSCAPES.values(), (0, 0, 0)))


def find_images(folder):
    """{name: file} of all images in a folder and below; Cityscapes' names are cut to what its files have in common."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGES and not file.name.startswith("."):
            name = file.stem.removesuffix("_leftImg8bit").removesuffix("_gtFine_color")
            if name in found:
                sys.exit(f"bench: {found[name]} and {file} have the same name")
            found[name] = file
    return found or sys.exit(f"bench: {folder} is no folder of images")


def stamp(files):
    """What differs if files have changed."""
    return repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def read_image(file, mode="RGB"):
    """An image as Pillow has it, in RGB or, without a mode, as it is."""
    try:
        with Image.open(file) as image:
            return image.convert(mode) if mode else image.copy()
    except Exception as error:
        sys.exit(f"bench: {file} cannot be read as an image ({error})")


def read_ids(file):
    """The class ids in an image of one channel, uint8 (H, W)."""
    ids = np.asarray(read_image(file, None))
    if ids.ndim != 2:
        sys.exit(f"bench: {file} has {ids.shape[2]} channels: a class id is one number a pixel")
    return ids.astype(np.int64).clip(0, IGNORED).astype(np.uint8)


def shrunk(image, shape):
    """A real image in the size (H, W) of the samples, as the scripts shrink theirs."""
    return image if image.size == shape[::-1] else image.resize(shape[::-1], Image.Resampling.BICUBIC)


def fitted(ids, shape):
    """Class ids (H, W) in another size: a pixel has that of the nearest."""
    return F.interpolate(ids[None, None].float(), shape, mode="nearest-exact")[0, 0].long()


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


# -- the segmenter ---------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Pairs of 3x3 convolutions at strides 1, 2, 4, ... 32; the scores of each, enlarged, are added up as in FCN-8s.

    x (N, 3, H, W), H and W 32 or more -> scores (N, classes, H, W).
    """

    def __init__(self, classes, widths=(32, 64, 128, 128, 128, 128)):
        super().__init__()
        self.levels = nn.ModuleList()
        for c_in, width in zip((3, *widths), widths):
            layers = [nn.Conv2d(c_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            self.levels.append(nn.Sequential(*layers))
        self.scores = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in widths)

    def forward(self, x):
        found = []
        for i, (level, score) in enumerate(zip(self.levels, self.scores)):
            x = level(F.max_pool2d(x, 2) if i else x)
            found.append(score(x))
        total = found.pop()
        while found:
            total = F.interpolate(total, found[-1].shape[2:], mode="bilinear") + found.pop()
        return total


class Segmenter(nn.Module):
    """A network and the normalising it wants: RGB (N, 3, H, W) in [0, 1] -> scores (N, classes, H, W)."""

    def __init__(self, net, caffe=False):
        super().__init__()
        self.net, self.order = net, [2, 1, 0] if caffe else [0, 1, 2]
        mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        if caffe:
            mean, deviation = [value / 255 for value in fcn8s.MEAN], [1 / 255] * 3
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None])

    def forward(self, x):
        found = self.net((x[:, self.order] - self.mean) / self.deviation)
        return found["out"] if isinstance(found, dict) else found


def build(name, classes, pretrained=False):
    """One of NETS; `pretrained`: with weights of ImageNet to begin with, which torchvision downloads once."""
    if name == "fcn_small":
        return Small(classes)
    if name == "fcn8s":
        return fcn8s.init_weights(fcn8s.FCN8s(classes), pretrained)
    return get_model(name, weights=None, num_classes=classes, **({} if pretrained else {"weights_backbone": None}))


def last_layer(net):
    """The name of the convolution that gives the scores; where several levels do, that of the deepest."""
    return [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)][-1]


def train(net, photos, ids, args):
    """Train `net` on photos (N, 3, H, W) and class ids (N, H, W), uint8, in batches of 8, half of them mirrored."""
    size, rate = min(8, len(photos)), RATES.get(args.net, 5e-4)
    steps = len(photos) // size
    optimiser = torch.optim.AdamW(net.parameters(), rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps * args.epochs)
    begun = time.monotonic()
    for epoch in range(1, args.epochs + 1):
        total = 0.0
        for chosen in torch.randperm(len(photos))[: steps * size].split(size):
            x, y = photos[chosen].to(args.device) / 255, ids[chosen].to(args.device).long()
            if torch.rand(()) < 0.5:
                x, y = x.flip(3), y.flip(2)
            loss = F.cross_entropy(net(x), y, ignore_index=IGNORED, reduction="sum") / (y != IGNORED).sum().clamp(1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach() / steps
        if not math.isfinite(total):
            sys.exit(f"bench: training {args.net} failed in epoch {epoch}, its loss is {total}: try another --seed")
        left = (time.monotonic() - begun) / epoch * (args.epochs - epoch) / 60
        print(f"epoch {epoch}/{args.epochs}, loss {total:.3g}, {left:.1f} minutes left", flush=True)


def trained(args, shape, size):
    """The segmenter that learned from the train split of --data, from --cache if it is there.

    It knows photos that were shrunk to `shape` (H, W), the size of the samples, and then made as large as `size`.
    """
    scenes = find_scenes(args, "train", shape[0])
    facts = [scenes.stamp, scenes.classes, shape, size, args.net, args.pretrained, args.epochs, args.seed]
    stem = f"scorer-{Path(args.data).resolve().name}-{args.net}-{size[1]}x{size[0]}"
    path = args.cache / f"{stem}-{hashlib.sha1(repr(facts).encode()).hexdigest()[:8]}.pt"
    if path.exists():
        return read_weights(path, args.net)
    print(f"training {args.net} on {len(scenes.names)} real photos of {args.data}, once", flush=True)
    photos, ids = [], []
    for i in range(len(scenes.names)):
        photos.append(pil_to_tensor(enlarged(shrunk(scenes.photo(i), shape), size)))
        ids.append(fitted(torch.from_numpy(scenes.ids(i)), size).byte())
    photos, ids = torch.stack(photos), torch.stack(ids)
    ids[ids >= scenes.classes] = IGNORED
    with torch.random.fork_rng([args.device] if "cuda" in args.device else []):
        torch.manual_seed(args.seed)
        try:
            net = build(args.net, scenes.classes, args.pretrained)
        except OSError as error:
            sys.exit(f"bench: the weights of ImageNet for {args.net} cannot be had ({error}): leave out --pretrained")
        segmenter = Segmenter(net).to(args.device)
        train(segmenter, photos, ids, args)
    with pix2pix.replacing(path) as file:
        torch.save({"name": args.net, "weights": net.state_dict()}, file)
    return segmenter


def read_weights(path, name):
    """A segmenter from a file: a .caffemodel of FCN-8s, a state dict of the network `name`, or what `trained` kept."""
    if path.suffix == ".caffemodel":
        return Segmenter(fcn8s.load(path), caffe=True)
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)  # runs no code that it may hold
        name, weights = kept.get("name", name), kept.get("weights", kept)
        weights = {key: value for key, value in weights.items() if not key.startswith("aux_classifier.")}
        with torch.device("meta"):
            last = last_layer(build(name, 2))
        net = build(name, len(weights[f"{last}.weight"]))
        net.load_state_dict(weights)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        sys.exit(f"bench: {path} is neither a state dict of {name} nor a .caffemodel of FCN-8s ({reason})")
    return Segmenter(net)


def find_segmenter(args, shape):
    """The segmenter for samples of a shape (H, W), the size it sees them in (None: that of the labels), its name."""
    labels = args.segmenter and args.segmenter.suffix == ".caffemodel"  # the authors' protocol
    size = (args.size, args.size) if args.size else None if labels else shape
    if size and min(size) < 32:
        sys.exit(f"bench: photos of {size[1]}x{size[0]} pixels are too small to be segmented: give --size 32 or more")
    segmenter = read_weights(args.segmenter, args.net) if args.segmenter else trained(args, shape, size)
    name = args.segmenter.name if args.segmenter else args.net
    name += f" at {size[1]}x{size[0]}" if size else " at the labels' size"
    return segmenter.to(args.device).eval(), size, name


class Features(nn.Module):
    """What the last layer of a segmenter is given, averaged over the image: uint8 (N, 3, H, W) -> float (N, d)."""

    def __init__(self, segmenter, size):
        super().__init__()
        self.segmenter, self.size = segmenter, size
        segmenter.net.get_submodule(last_layer(segmenter.net)).register_forward_pre_hook(self.keep)

    def keep(self, layer, inputs):
        self.kept = inputs[0]

    def forward(self, images):
        if self.size and images.shape[2:] != self.size:
            images = resize(images, self.size, antialias=True)
        with torch.no_grad():
            self.segmenter(images / 255)
        return self.kept.mean((2, 3))


def features(args, shape=None):
    """A module from photos, uint8 (N, 3, H, W), to features of the scorer, float (N, d); and their name.

    `args` has the options of `scorer_options`; what it lacks has its default. `shape` (H, W) is that of the samples,
    64x64 if it is not given and --data is toy, else 256x256.
    """
    parser = ArgumentParser()
    scorer_options(parser)
    args = settle(Namespace(**vars(parser.parse_args([])) | vars(args)))
    segmenter, size, name = find_segmenter(args, shape or ((64, 64) if args.data == "toy" else (256, 256)))
    return Features(segmenter, size), f"{name}, of {Path(args.data).resolve().name}"


# -- the command -----------------------------------------------------------------------------------------------------


def scorer_options(parser):
    """What decides about the scorer."""
    add = parser.add_argument
    pairs = "SPLIT/NAME.jpg, photo | labels, with class ids in SPLIT_ids/NAME.png"
    add("--data", default="toy", help=f"toy, or a folder: {pairs}; or Cityscapes' gtFine and leftImg8bit")
    add("--data-root", type=Path, default=Path("data"), help="where the folder may lie")
    add("--classes", type=int, help="ids from here up are ignored (camvid: 11; else only 255 is)")
    add("--net", choices=NETS, default="fcn_small", metavar="NET", help=f"the scorer: {', '.join(NETS)}")
    files = "a state dict, or fcn-8s-cityscapes.caffemodel; no program such as .pt2, which could run any code"
    add("--segmenter", type=Path, help=f"its weights, not trained here: {files}")
    add("--size", type=int, help="of photos before it (that of the samples; for a .caffemodel that of the labels)")
    add("--epochs", type=int, help="that it is trained for (toy: 6, else 20)")
    add("--pretrained", action="store_true", help="begin with weights of ImageNet, which torchvision downloads")
    add("--seed", type=int, default=0, help="of its training")
    add("--cache", type=Path, default=Path("data"), help="where it is kept")
    add("--device", help="cpu, cuda, ... (the accelerator, if there is one)")


def options(parser):
    """What it takes."""
    parser.add_argument("--samples", type=Path, required=True, help="folder of PNGs, named as the test images")
    scorer_options(parser)
    parser.add_argument("--labels", action="store_true", help="the samples are label maps, made from photos")
    parser.add_argument("--compat", action="store_true", help="count as the authors' script does, slips included")
    parser.add_argument("--out", type=Path, help="JSON file for the result")


def settle(args):
    """The options, checked, with what was not given filled in."""
    for name, least in (("classes", 1), ("size", 32), ("epochs", 1), ("seed", 0)):
        if (value := getattr(args, name)) is not None and not least <= value < 2**31:
            sys.exit(f"bench: --{name} {value}: give a number from {least} up")
    if args.pretrained and args.net == "fcn_small":
        sys.exit("bench: --pretrained: fcn_small has no weights of ImageNet: choose another --net")
    device = pix2pix.get_args(["--device", args.device] if args.device else []).device  # or it is refused
    return Namespace(**vars(args) | {"device": device, "epochs": args.epochs or (6 if args.data == "toy" else 20)})


def find_samples(args):
    """{name: file} of the samples, and their one size (H, W)."""
    files = find_images(args.samples)
    sizes = {read_image(file).size: file for file in files.values()}
    if len(sizes) > 1:
        (a, one), (b, other) = [*sizes.items()][:2]
        sys.exit(f"bench: {one} has {a[0]}x{a[1]} pixels, {other} has {b[0]}x{b[1]}: samples must have one size")
    ((wide, high),) = sizes
    if args.data == "toy" and wide != high:
        sys.exit(f"bench: {args.samples} has images of {wide}x{high} pixels: toy streets are square")
    if min(wide, high) < 32 and not (args.size or args.labels):
        sys.exit(
            f"bench: {args.samples} has images of {wide}x{high} pixels: have them enlarged, with --size 32 or more"
        )
    return files, (high, wide)


def see(segmenter, size, device, image, shape):
    """The class of each pixel of `shape` (H, W) in a photo, a Pillow image, that the segmenter sees in `size`."""
    size = size or shape
    with torch.no_grad():
        found = segmenter(pil_to_tensor(enlarged(image, size))[None].to(device) / 255)
        found = found if found.shape[2:] == shape else F.interpolate(found, shape, mode="bilinear")
        return found[0].argmax(0).cpu()


def enlarged(image, size):
    """An image in the size (H, W) that the network sees, as the authors' evaluate.py enlarges it."""
    return image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BILINEAR)


def measure(args):
    """The row of --samples: pixel accuracy, class accuracy and class IoU, and real_ ones of real images beside."""
    args = settle(args)
    files, shape = find_samples(args)
    scenes = find_scenes(args, "test", shape[0])
    if more := sorted(files.keys() - set(scenes.names)):
        sys.exit(f"bench: {files[more[0]]} is none of the {len(scenes.names)} test images of --data {args.data}")
    if fewer := sorted(set(scenes.names) - files.keys()):
        sys.exit(f"bench: {args.samples} lacks {len(fewer)} of {len(scenes.names)} test images, such as {fewer[0]}")
    if args.labels:
        name, palette = "nearest colour", find_palette(find_scenes(args, "train"))
    else:
        segmenter, size, name = find_segmenter(args, shape)
        known = segmenter.net.get_submodule(last_layer(segmenter.net)).out_channels
        if known < scenes.classes:
            sys.exit(f"bench: --segmenter {args.segmenter} has {known} classes: --data has {scenes.classes}")

    def look(image, shape):
        if args.labels:
            return fitted(nearest(pil_to_tensor(image), palette), shape)
        return see(segmenter, size, args.device, image, shape)

    count, ours, theirs, said = confusion_compat if args.compat else confusion, 0, 0, time.monotonic()
    for i, key in enumerate(scenes.names):
        truth, real = torch.from_numpy(scenes.ids(i)), (scenes.labels if args.labels else scenes.photo)(i)
        ours = ours + count(truth, look(read_image(files[key]), truth.shape), scenes.classes)
        theirs = theirs + count(truth, look(shrunk(real, shape), truth.shape), scenes.classes)
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"{i + 1} of {len(scenes.names)} images", flush=True)
    if not theirs.any():
        sys.exit(f"bench: no pixel of --data {args.data} has a class: they are 0 to {scenes.classes - 1}")
    row = {"measure": "fcn", "data": Path(args.data).resolve().name, "of": "labels" if args.labels else "photos"}
    row |= {"features": name} | ({"compat": True} if args.compat else {})
    row |= {"n_samples": len(files), "n_real": len(scenes.names)} | scores(ours, args.compat)
    return row | {f"real_{metric}": value for metric, value in scores(theirs, args.compat).items()}


def run(args):
    """Print the scores of --samples and, on a line of their own, those of real images."""
    row = measure(args)
    real = {name.removeprefix("real_"): value for name, value in row.items() if name.startswith("real_")}
    print(f"real {row['of']}:", ", ".join(f"{name} {value:.4g}" for name, value in real.items()))
    write(args, row)
