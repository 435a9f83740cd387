"""What the measures share: images of any kind, digits, weights that come with the bench, results as JSON."""

import argparse
import base64
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
import gan  # noqa: E402

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
RUN_OPTION = "--run"  # of the scripts
WEIGHTS = Path(__file__).parent / "weights"  # of the bench's own networks: the same on every machine


def fail(sentence):
    """End with one sentence for the user."""
    sys.exit(f"bench: {sentence}")


def parse(argv, command, about, options):
    """The options of a command, which is described by the first paragraph of its module's docstring."""
    parser = argparse.ArgumentParser(f"python -m bench {command}", description=about.partition("\n\n")[0])
    parser.error = fail
    options(parser)
    return parser.parse_args(argv)


def find_device(name):
    """The device of that name, or the GPU if there is one."""
    try:
        return str(torch.zeros(1, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} is not there ({str(error).splitlines()[0]})")


# -- images ----------------------------------------------------------------------------------------------------------


def find_images(folder, option="--samples"):
    """{name: file} of all images in a folder and below, by name; a name that is taken has its folder before it."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in SUFFIXES and file.name[0] != ".":
            found[str(file.relative_to(folder)) if file.stem in found else file.stem] = file
    return found or fail(f"{option} {folder} is no folder of images ({', '.join(SUFFIXES)})")


def one_size(files):
    """The size (width, height) that all images have; the first that has another is named."""
    first = None
    for file in files:
        size = read_image(file).size
        first = first or size
        if size != first:
            fail(f"{file} has {size[0]}x{size[1]} pixels, others have {first[0]}x{first[1]}: give all images one size")
    return first


def read_image(file):
    """An image as Pillow has it, upright, in RGB; what is transparent is white."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("I", "F"):
                raise ValueError("its pixels have 32 bits: save it with 8 or 16")
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        fail(f"{file} cannot be read as an image ({error})")


def read_samples(folder):
    """The images of a folder in grey, uint8 (N, 1, 28, 28), and their names."""
    files = find_images(folder)
    if (size := one_size(files.values())) != (28, 28):
        fail(f"{folder} has images of {size[0]}x{size[1]} pixels: 28x28 are measured")
    return torch.stack([pil_to_tensor(read_image(file).convert("L")) for file in files.values()]), [*files]


def read_digits(args, split):
    """Images uint8 (N, 1, 28, 28) and labels (N,) of "train", "valid" or "test", split as by GAN's authors."""
    if args.data == "toy":
        count, seed = {"train": (10000, 0), "valid": (2000, 1), "test": (2000, 2)}[split]
        return gan.digits(count, seed)
    try:
        data = datasets.MNIST(args.data_root, train=split != "test", download=True)
    except Exception as error:
        fail(f"MNIST is not below --data-root {args.data_root} and cannot be downloaded ({error})")
    part = {"train": slice(50000), "valid": slice(50000, None), "test": slice(None)}[split]
    return data.data[part, None], data.targets[part]


def run_script(script, run, *options):
    """Let a script use its run folder, in a process of its own; what it refuses is said in its words."""
    command = [sys.executable, script, RUN_OPTION, run, *options]
    child = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if child.returncode:
        said = child.stderr.strip().splitlines() or [f"{Path(script).name} ended with status {child.returncode}"]
        sys.exit(said[-1])


# -- files -----------------------------------------------------------------------------------------------------------


def save(path, data):
    """Write text or bytes beside `path` first, so that the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(part, path)


def data_uri(image):
    """A Pillow image as an address that holds it, for pages that need nothing else."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def write(args, row):
    """Print a result in one line, and write it to --out."""
    texts = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
    print(", ".join(texts))
    if args.out:
        save(args.out, json.dumps(row, indent=2) + "\n")


def save_weights(path, net, **facts):
    """Write the weights of a network in half precision, and what else is to be known of it."""
    file = io.BytesIO()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in net.state_dict().items()}
    torch.save({"weights": halves} | facts, file)
    save(path, file.getvalue())


def read_weights(path):
    """What `save_weights`, or anyone's torch.save, has written, without running code that the file may hold."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path} is not there")
    except Exception:  # torch's own sentences advise to load it unsafely
        fail(f"{path} holds no weights that are safe to load: give a state dict, as torch.save writes it")


def file_hash(path):
    """The first eight hexadecimal digits of a file's SHA-256, by which rows tell weights apart."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]
