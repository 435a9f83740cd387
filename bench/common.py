"""What the measures share: images of any kind, digits, weights that come with the bench, results as JSON."""

import base64
import functools
import hashlib
import html
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
import gan  # noqa: E402
import pix2pix  # noqa: E402

SUFFIXES = (*pix2pix.IMAGES, ".gif", ".ppm")
WEIGHTS = Path(__file__).parent / "weights"  # of the bench's own networks: the same on every machine

PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{}</title><style>
:root {{ color-scheme: light dark; }} body {{ font: 16px/1.5 sans-serif; }} pre {{ overflow-x: auto; }}
figure {{ display: inline-block; margin: .5rem; }} img {{ width: 30rem; image-rendering: pixelated; }}
</style></head><body><pre>{}</pre>"""


def fail(sentence):
    """End with one sentence for the user."""
    sys.exit(f"bench: {sentence}")


def find_device(name):
    """The device of that name, or the GPU if there is one."""
    try:
        return str(torch.zeros(1, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} is not there ({str(error).splitlines()[0]})")


# -- images ----------------------------------------------------------------------------------------------------------


def find_images(folder, option="--samples"):
    """{name: file} of all images in a folder and below. A name that is taken has its folder before it."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in SUFFIXES and file.name[0] != ".":
            name = file.stem.removesuffix("_leftImg8bit")  # of Cityscapes: its other files end otherwise
            found[str(file.relative_to(folder)) if name in found else name] = file
    return found or fail(f"{option} {folder} is no folder of images ({', '.join(SUFFIXES)})")


def read_image(file):
    """An image as the scripts read it: a Pillow image, upright, in RGB; what is transparent is white."""
    try:
        return pix2pix.read_image(file)
    except SystemExit as error:
        fail(str(error).removeprefix("pix2pix: "))


def one_size(files):
    """The size (width, height) that all images have; the first that has another is named."""
    first = None
    for file in files:
        size = read_image(file).size
        first = first or size
        if size != first:
            fail(f"{file} has {size[0]}x{size[1]} pixels, others have {first[0]}x{first[1]}: give all images one size")
    return first


def read_samples(folder):
    """The images of a folder in grey, uint8 (N, 1, 28, 28), and their names."""
    files = find_images(folder)
    if (size := one_size(files.values())) != (28, 28):
        fail(f"{folder} has images of {size[0]}x{size[1]} pixels: 28x28 are measured")
    return torch.stack([pil_to_tensor(read_image(file).convert("L")) for file in files.values()]), [*files]


@functools.cache
def read_digits(data, data_root, split):
    """Images uint8 (N, 1, 28, 28) and labels (N,) of "train", "valid" or "test", split as by GAN's authors."""
    if data == "toy":
        count, seed = {"train": (10000, 0), "valid": (2000, 1), "test": (2000, 2)}[split]
        return gan.digits(count, seed)
    try:
        mnist = datasets.MNIST(data_root, train=split != "test", download=True)
    except Exception as error:
        fail(f"MNIST is not below --data-root {data_root} and cannot be downloaded ({error})")
    part = {"train": slice(50000), "valid": slice(50000, None), "test": slice(None)}[split]
    return mnist.data[part, None], mnist.targets[part]


def digit_options(parser):
    """The options of what measures a folder of digits."""
    add = parser.add_argument
    add("--samples", type=Path, required=True, help="folder of images, 28x28 pixels")
    add("--data", choices=("toy", "mnist"), default="toy", help="what they should look like (%(default)s)")
    add("--data-root", type=Path, default="data", help="where MNIST lies, or goes to (%(default)s)")
    add("--out", type=Path, help="JSON file for the result")


def run_script(script, run, *options):
    """Let a script use its run folder, in a process of its own; what it refuses is said in its words."""
    command = [sys.executable, ROOT / script, "--out", run, *options]
    child = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if child.returncode:
        said = child.stderr.strip().splitlines() or [f"{script} ended with status {child.returncode}"]
        sys.exit(said[-1])


# -- files -----------------------------------------------------------------------------------------------------------


def save(path, data):
    """Write text or bytes beside `path` first, so that the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(part, path)


def data_uri(write):
    """A picture as an address that holds it; `write` is the `save` of an image or the `savefig` of a figure."""
    file = io.BytesIO()
    write(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def page(title, text, figures):
    """A page that needs nothing else: a text, and below it figures (caption, addresses of pictures)."""
    parts = [PAGE.format(html.escape(title), html.escape(text))]
    for caption, pictures in figures:
        images = "".join(f'<img alt="" src="{picture}">' for picture in pictures)
        parts.append(f"<figure><figcaption>{html.escape(caption)}</figcaption>{images}</figure>")
    return "\n".join([*parts, "</body></html>\n"])


def write(row, path):
    """Print a result in one line and, if there is a path, write it there as JSON."""
    texts = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
    print(", ".join(texts))
    if path:
        save(path, json.dumps(row, indent=2) + "\n")


def load_or_train(path, build, train):
    """The network build() with the weights of a file. If that is not there, train(net) is called, and it is written."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build()
        if not path.exists():
            train(net)
            file, state = io.BytesIO(), net.state_dict()
            halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
            torch.save({"weights": halves}, file)
            save(path, file.getvalue())
    net.load_state_dict(read_weights(path)["weights"])
    return net.eval()


def read_weights(path):
    """What torch.save has written, without running code that the file may hold."""
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
