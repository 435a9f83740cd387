"""How far samples are from real images in the features of a network, by torch-fidelity: KID, FID, precision, recall.

KID is unbiased: the mean, over 100 random subsets of each set, of the squared maximum mean discrepancy under the kernel
(x . y / dimensions + 1)^3 (Binkowski et al., arXiv:1801.01401). FID is the squared Frechet distance of two Gaussians
(Heusel et al., arXiv:1706.08500); with few images it is too high. Precision is the share of samples, and recall that of
real images, that lie no farther from one of the other kind than its third neighbour of its own does (Kynkaanniemi et
al., arXiv:1904.06991, who take VGG-16). The features are those of the Inception network that FID is known by, or of the
bench's own classifier, scaled to a mean square of 1 over real images, and are named in the row: numbers with other
features, or at other sizes, cannot be compared.
"""

import contextlib
import hashlib
import socket
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch_fidelity
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

import gan
import pix2pix
import text2img
from bench import digits, fcn, shapes
from bench.common import read_digits, write

SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"
ENOUGH = 2048  # images: with fewer the covariance of as many Inception features is singular
SETTINGS = dict(  # torch-fidelity ignores names that it doesn't know, and keys its cache by a name only
    fid=True,
    kid=True,
    prc=True,
    kid_subsets=100,
    prc_neighborhood=3,
    prc_batch_size=2000,
    batch_size=64,
    cache=False,
    save_cpu_ram=True,  # no worker processes
    feature_extractor="any-network",
)


class Images(Dataset):
    """Image files as torch-fidelity takes them, uint8 (3, H, W); all must have `size`, (width, height)."""

    def __init__(self, files, size):
        self.files, self.size = files, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            image = gan.flatten(gan.read_image(self.files[i]), 3)
        except SystemExit as refused:
            sys.exit(f"bench: {str(refused).partition(': ')[2]}")
        check(self.files[i], image.size, self.size)
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size[::-1], 3).movedim(2, 0)


class Drawn(Dataset):
    """Images that a script draws, uint8 (N, C, H, W), as torch-fidelity takes them."""

    def __init__(self, images):
        self.images, self.size = images, (images.shape[3], images.shape[2])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i].expand(3, -1, -1)


class AnyNetwork(FeatureExtractorBase):
    """A network from uint8 images (N, 3, H, W) to features (N, D), as torch-fidelity takes it."""

    def __init__(self, name, features_list, net, **others):
        super().__init__(name, features_list)
        self.net = net

    @staticmethod
    def get_provided_features_list():
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "features"

    def forward(self, images):
        found = self.net(images)
        return found if isinstance(found, tuple) else (found.double(),)


torch_fidelity.register_feature_extractor(SETTINGS["feature_extractor"], AnyNetwork)


class Penultimate(nn.Module):
    """What the last layer of a classifier is given, (N, D), for uint8 images (N, 3, S, S)."""

    def __init__(self, net, channels):
        super().__init__()
        self.layers, self.channels = net[:-1], channels

    def forward(self, images):
        return self.layers(images[:, : self.channels] / 255)


class Scaled(nn.Module):
    """A network whose features are divided by a number."""

    def __init__(self, net, scale):
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, images):
        return self.net(images) / self.scale


def check(file, size, expected):
    """Refuse an image of another size than that of the first."""
    if size != expected:
        (wide, tall), (first_wide, first_tall) = size, expected
        sys.exit(f"bench: {file} has {wide}x{tall} pixels, others have {first_wide}x{first_tall}: give all one size")


def read_folder(flag, folder):
    """All images below a folder, which must be of one size and at least four. -> Images."""
    found = sorted(folder.rglob("*")) if folder.is_dir() else []
    files = [file for file in found if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    if len(files) < 4:
        sys.exit(f"bench: {flag} {folder} holds {len(files)} images ({', '.join(SUFFIXES)}): give it at least four")
    sizes = []
    for file in files:  # headers only: a wrong one is named before hours of work
        try:
            with Image.open(file) as image:
                sizes.append(image.size)
        except Exception as error:
            sys.exit(f"bench: {file} cannot be read as an image ({error})")
        check(file, sizes[-1], sizes[0])
    return Images(files, sizes[0])


def read_real(args, size):
    """The images of --real, or the training images of --data; those that scripts draw at a `size` are of that."""
    if args.real:
        return read_folder("--real", args.real)
    if args.data in ("toy", "mnist"):
        return Drawn(read_digits(args, "train")[0])
    if args.data == "shapes":
        return Drawn(text2img.shapes(8000, 0, size=size[0])[0])
    if args.data == "streets":
        return Drawn(torch.from_numpy(pix2pix.streets(600, 0, size[0])[1]))
    sys.exit(f"bench: the photos of --data {args.data} are not cut out here: give --real, a folder of them")


def inception(args):
    """The network that FID is known by, from --weights, torch's cache or a download, and its name."""
    by_hand = f"fetch {URL_INCEPTION_V3} by hand and give it with --weights, or use --features scorer"
    path = args.weights or Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rpartition("/")[2])
    if not path.exists() and not args.weights:
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(60)  # seconds of silence
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), progress=sys.stderr.isatty())
        except Exception as error:
            sys.exit(f"bench: the Inception network is not at {path} and cannot be downloaded ({error}): {by_hand}")
        finally:
            socket.setdefaulttimeout(patience)
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # the next line would run code that a file may hold
        net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        return net, "inception-v3-compat"
    except Exception as error:
        reason = str(error).partition("\n")[0]
        sys.exit(f"bench: {path} does not hold torch-fidelity's Inception network ({reason}): {by_hand}")


def scorer(args, size):
    """The bench's own network for --data, which judges images of `size` (width, height), and its name."""
    if args.data not in ("toy", "mnist", "shapes"):
        given = Namespace(**vars(args) | {"data": "toy" if args.data == "streets" else args.data})
        return fcn.features(given, size[::-1])
    side = 64 if args.data == "shapes" else 28
    if size != (side, side):
        sys.exit(f"bench: {args.samples} has {size[0]}x{size[1]} pixels: its classifier takes {side}x{side}")
    if args.data == "shapes":
        return Penultimate(shapes.classifier(args), 3), "classifier of shapes"
    return Penultimate(digits.classifier(args)[0], 1), f"classifier of {args.data} digits"


def scaled(net, real, device):
    """`net` with features whose mean square over real images, 1,000 at most, is 1: for such is the kernel of KID."""
    found, step = [], -(-len(real) // 1000)
    for chosen in torch.arange(0, len(real), step).split(64):
        with torch.no_grad():
            found.append(net.to(device)(torch.stack([real[i] for i in chosen]).to(device)).double())
    return Scaled(net, torch.cat(found).square().mean().sqrt().item())


def digest(net):
    """Eight hexadecimal digits that tell one network's weights from another's."""
    found = hashlib.sha256()
    for weight in net.state_dict().values():
        found.update(weight.cpu().numpy().tobytes())
    return found.hexdigest()[:8]


def compare(samples, real, net, device="cpu"):
    """KID with its deviation over subsets, FID, precision and recall of two Datasets of uint8 (3, H, W) images.

    `net` gives features (N, D) of uint8 (N, 3, H, W). KID's subsets have 1,000 images, or half of the smaller set if
    that has no more. Random states stay as they are. A set against itself has FID 0 to about 1e-10 of its spread, or to
    1e-6 where it has fewer images than features, and KID a little below 0.
    """
    few, device = min(len(samples), len(real)), torch.device(device)
    subset = 1000 if few > 1000 else few // 2
    place = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    given = SETTINGS | {"cuda": device.type == "cuda", "kid_subset_size": subset, "verbose": sys.stderr.isatty()}
    with torch.random.fork_rng([]), place:
        found = torch_fidelity.calculate_metrics(input1=samples, input2=real, net=net, **given)
    return {
        "kid": found[torch_fidelity.KEY_METRIC_KID_MEAN],
        "kid_std": found[torch_fidelity.KEY_METRIC_KID_STD],
        "fid": found[torch_fidelity.KEY_METRIC_FID],
        "precision": found[torch_fidelity.KEY_METRIC_PRECISION],
        "recall": found[torch_fidelity.KEY_METRIC_RECALL],
        "kid_subset": subset,
    }


def options(parser):
    """What it takes."""
    parser.add_argument("--samples", type=Path, required=True, help="folder of images")
    parser.add_argument("--real", type=Path, help="folder of real images (the training images of --data)")
    parser.add_argument("--features", choices=("inception", "scorer"), default="inception", help="whose features")
    parser.add_argument("--weights", type=Path, help="file of the Inception network (torch's cache, or a download)")
    parser.add_argument("--data", help="what is shown: toy or mnist digits, shapes, streets, or as for fcn")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where MNIST lies, or goes to")
    parser.add_argument("--cache", type=Path, default=Path("data"), help="where the trained classifier is kept")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda, if there is one)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")


def measure(args):
    """The row of a folder: KID first, FID, precision, recall, and all that they depend on."""
    if not args.data and (args.features == "scorer" or not args.real):
        sys.exit("bench: give --data, what is shown, or else --real, a folder of real images, and --features inception")
    if args.weights and args.features == "scorer":
        sys.exit(f"bench: --weights {args.weights} are the Inception network's: leave them out with --features scorer")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.zeros(1, device=device).device.type not in ("cpu", "cuda"):
            raise ValueError("torch-fidelity runs on cpu or cuda")
    except Exception as error:
        sys.exit(f"bench: --device {device} is not to be had ({str(error).partition(chr(10))[0]})")
    samples = read_folder("--samples", args.samples)
    real = read_real(args, samples.size)
    if samples.size != real.size:
        (wide, tall), (real_wide, real_tall) = samples.size, real.size
        sys.exit(
            f"bench: {args.samples} has {wide}x{tall} pixels, real images {real_wide}x{real_tall}: give both one size"
        )
    if args.features == "inception":
        net, name = inception(args)
    else:
        net, name = scorer(args, samples.size)
        net = scaled(net.eval(), real, device)
    row = {"measure": "fid", "data": args.data} if args.data else {"measure": "fid"}
    row |= {"features": name} | compare(samples, real, net, device)
    row |= {"n_samples": len(samples), "n_real": len(real), "fid_biased": min(len(samples), len(real)) < ENOUGH}
    row |= {"real": args.real.resolve().name if args.real else "training images"}
    row |= {"resolution": f"{samples.size[0]}x{samples.size[1]}", "weights": digest(net)}
    return row | {"torch_fidelity": torch_fidelity.__version__}


def run(args):
    """Print how far --samples are from --real."""
    row = measure(args)
    if row["fid_biased"]:
        few = min(row["n_samples"], row["n_real"])
        print(f"FID rests on {few} images: with fewer than {ENOUGH} it comes out too high, so look at KID")
    write(args, row)
