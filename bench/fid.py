"""How far samples are from real images in the features of a network, by torch-fidelity: KID, FID, precision, recall.

KID is unbiased: the mean, over 100 random subsets of each set, of the squared maximum mean discrepancy under the kernel
(x . y / dimensions + 1)^3 (Binkowski et al., arXiv:1801.01401). FID is the squared Frechet distance of two Gaussians
(Heusel et al., arXiv:1706.08500); with few images it is too high. Precision is the share of samples, and recall that of
real images, that lie no farther from one of the other kind than its third neighbour of its own does (Kynkaanniemi et
al., arXiv:1904.06991, who take VGG-16). The features are those of the Inception network that FID is known by, or of the
bench's own networks, divided by their root mean square over real images. Their name and the hash of their weights are
in the row: numbers with other features, or at other sizes, cannot be compared.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

import pix2pix
from bench import common, digits, fcn
from bench.common import fail, file_hash, find_images, one_size, parse, read_digits, read_image, write

ENOUGH = 2048  # images: with fewer the covariance of as many Inception features is singular
INCEPTION = "6726825d"  # how the SHA-256 of the weights that FID is known by begins; it is also in the file's name


class Images:
    """All images of a folder, uint8 (3, H, W), of one `size` (width, height); --resize N makes them N x N."""

    def __init__(self, option, folder, resize=None):
        self.files = [*find_images(folder, option).values()]
        self.size = (resize, resize) if resize else one_size(self.files)
        if len(self.files) < 4:
            fail(f"{option} {folder} holds {len(self.files)} images: give it at least four")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = read_image(self.files[i])
        return pil_to_tensor(image if image.size == self.size else image.resize(self.size, Image.Resampling.BICUBIC))


class Inception(FeatureExtractorInceptionV3):
    """uint8 images (N, 3, H, W) -> the 2,048 features of FID."""

    def forward(self, images):
        return super().forward(images)[0]


class Penultimate(torch.nn.Module):
    """uint8 images (N, 3, 28, 28) -> what the last layer of the classifier of digits is given, (N, 128)."""

    def __init__(self, net):
        super().__init__()
        self.layers = net[:-1]

    def forward(self, images):
        return self.layers(images[:, :1] / 255).double()


def inception(weights):
    """The network that FID is known by, from --weights, torch's cache or a download; its name, and the file's hash."""
    path = weights or Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rpartition("/")[2])
    by_hand = f"fetch {URL_INCEPTION_V3} by hand and give it with --weights, or use --features scorer"
    if not path.exists() and not weights:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), progress=sys.stderr.isatty())
        except OSError as error:
            fail(f"the Inception network is not at {path} and cannot be downloaded ({error}): {by_hand}")
    common.read_weights(path)  # safely, as the next line would run code that the file holds
    try:
        net = Inception("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception:  # of many kinds
        fail(f"{path} does not hold torch-fidelity's Inception network: {by_hand}")
    found = file_hash(path)
    return net, "inception-v3-compat" if found == INCEPTION else f"unknown weights {found}", found


def find_network(args, size):
    """The network for images of `size` (width, height), its name, and the hash of its weights."""
    if args.features == "inception":
        return inception(args.weights)
    if args.data in ("toy", "mnist"):
        if size != (28, 28):
            fail(f"the classifier of digits takes 28x28 pixels, not {size[0]}x{size[1]}: use --resize 28")
        net = Penultimate(digits.classifier(args)[0])
        return net, f"classifier of {args.data} digits", file_hash(digits.weights(args.data))
    given = {"data": "toy" if args.data == "streets" else args.data, "data_root": args.data_root}
    return fcn.features(Namespace(**given, cache=args.cache, device=args.device), size[::-1])


def read_real(args, size):
    """The images of --real, or the training images of --data: toy or MNIST digits, or streets of a `size`."""
    if args.real:
        return Images("--real", args.real, args.resize)
    if args.data in ("toy", "mnist"):
        return read_digits(args, "train")[0].expand(-1, 3, -1, -1)
    if args.data == "streets":
        return torch.from_numpy(pix2pix.streets(600, 0, size[0])[1])
    fail(f"there are no photos of --data {args.data} here: give --real, a folder of them")


@torch.no_grad()
def extract(net, images, device):
    """What `net` finds in uint8 images (3, H, W), of which all must have one size. -> (N, D)."""
    net, found = net.to(device).eval(), []
    for chosen in tqdm(torch.arange(len(images)).split(64), "features", disable=None):
        found.append(net(torch.stack([images[i] for i in chosen]).to(device)).cpu())
    return torch.cat(found)


def compare(samples, real):
    """KID with its deviation over subsets, FID, precision and recall of two sets of features (N, D).

    KID's subsets have 1,000 images, or half of the smaller set if that has no more. A set against itself has FID 0 to
    about 1e-10 of its spread, or to 1e-6 where it has fewer images than features, and KID a little below 0.
    """
    few = min(len(samples), len(real))
    subset = 1000 if few > 1000 else few // 2
    statistics = map(fid_features_to_statistics, (samples, real))
    kid, kid_std = kid_features_to_metric(samples, real, kid_subset_size=subset, verbose=False).values()
    (fid,) = fid_statistics_to_metric(*statistics, verbose=False).values()
    settings = {"prc_batch_size": 2000, "save_cpu_ram": True, "verbose": False}
    precision, recall, _ = prc_features_to_metric(samples, real, **settings).values()
    row = {"kid": kid, "kid_std": kid_std, "fid": fid, "precision": precision, "recall": recall, "kid_subset": subset}
    return row | {"n_samples": len(samples), "n_real": len(real), "fid_biased": few < ENOUGH}


def feature_options(parser):
    """What decides about the features, and how images come to them."""
    add = parser.add_argument
    add("--features", choices=("inception", "scorer"), default="inception", help="scorer: the bench's own (inception)")
    add("--weights", type=Path, help="file of the Inception network (torch's cache, or a download)")
    add("--resize", type=int, metavar="N", help="resize all images to N x N pixels (else all must have one size)")
    add("--data", help="what is shown, for the scorer: toy or mnist digits, streets, or as for fcn")
    add("--data-root", type=Path, default=Path("data"), help="where MNIST lies, or goes to (data)")
    add("--cache", type=Path, default=Path("data"), help="where a scorer that was trained here is kept (%(default)s)")
    add("--device", help="cpu, cuda, ... (cuda, if there is one)")


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("--samples", type=Path, required=True, help="folder of images")
    add("--real", type=Path, help="folder of real images (the training images of --data)")
    feature_options(parser)
    add("--out", type=Path, help="JSON file for the result")


def measure_all(args, folders):
    """A row for each folder of samples: KID first, FID, precision, recall, and all that they depend on."""
    if not args.data and (args.features == "scorer" or not args.real):
        fail("give --data, what is shown, or else --real, a folder of real images, and --features inception")
    device, samples = common.find_device(args.device), [Images("--samples", folder, args.resize) for folder in folders]
    real = read_real(args, samples[0].size)
    size = real.size if args.real else (real.shape[3], real.shape[2])
    for images in samples:
        if images.size != size:
            wide, high = images.size
            fail(f"{images.files[0]} has {wide}x{high} pixels, real images {size[0]}x{size[1]}: use --resize N")
    net, name, weights = find_network(args, size)
    about = {"data": args.data} if args.data else {}
    about |= {"features": name, "weights": weights, "resolution": f"{size[0]}x{size[1]}"}
    about |= {"real": args.real.resolve().name if args.real else "training images"}
    real = extract(net, real, device)
    scale = real.square().mean().sqrt() if args.features == "scorer" else 1  # KID's kernel is made for such numbers
    rows = [compare(extract(net, images, device) / scale, real / scale) for images in samples]
    if (few := min(len(real), *map(len, samples))) < ENOUGH:
        print(f"FID rests on {few} images: with fewer than {ENOUGH:,} it comes out too high, so look at KID")
    return [{"measure": "fid"} | row | about | {"torch_fidelity": torch_fidelity.__version__} for row in rows]


def measure(args):
    """The row of --samples."""
    return measure_all(args, [args.samples])[0]


def main(argv=None):
    """Print how far --samples are from --real."""
    args = parse(argv, "fid", __doc__, options)
    write(args, measure(args))
