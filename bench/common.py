"""What the measures share: folders of samples, the digits they are measured against, results as JSON."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets

sys.path.append(str(Path(__file__).parent.parent))
import gan


def read_samples(folder, size=28):
    """The PNGs of a folder, by name, as uint8 (N, 1, size, size), and their names."""
    files = sorted(folder.glob("*.png")) if folder.is_dir() else []
    if not files:
        sys.exit(f"bench: --samples {folder} is no folder of PNGs: draw some with `python gan.py --sample 10000`")
    images = []
    for file in files:
        try:
            images.append(np.asarray(Image.open(file).convert("L")))
        except Exception as error:
            sys.exit(f"bench: {file} cannot be read as an image ({error})")
        if images[-1].shape != (size, size):
            sys.exit(
                f"bench: {file} has {images[-1].shape[1]}x{images[-1].shape[0]} pixels: {size}x{size} are measured"
            )
    return torch.from_numpy(np.stack(images))[:, None], [file.stem for file in files]


def read_digits(args, split):
    """Images uint8 (N, 1, 28, 28) and labels (N,) of "train", "valid" or "test", split as by GAN's authors."""
    if args.data == "toy":
        count, seed = {"train": (10000, 0), "valid": (2000, 1), "test": (2000, 2)}[split]
        return gan.digits(count, seed)
    try:
        data = datasets.MNIST(args.data_root, train=split != "test", download=True)
    except Exception as error:
        sys.exit(
            f"bench: MNIST cannot be had: put it below --data-root {args.data_root} as torchvision has it ({error})"
        )
    part = {"train": slice(50000), "valid": slice(50000, None), "test": slice(None)}[split]
    return data.data[part, None], data.targets[part]


def save_png(path, image):
    """Write a Pillow image, whole or not at all, and say where it is."""
    with gan.replacing(path) as file:
        image.save(file, "PNG", optimize=True)
    print(f"painted {path}")


def write(args, row):
    """Print a result in one line, and write it to --out, whole or not at all."""
    print(
        ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_name(f"{args.out.name}.part")
        part.write_text(json.dumps(row, indent=2) + "\n")
        os.replace(part, args.out)
