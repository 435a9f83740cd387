"""How far samples are from real images in the features of a network, by torch-fidelity: KID, FID, precision, recall.

KID is unbiased: the mean, over 100 random subsets of each set, of the squared maximum mean discrepancy under the kernel
(x . y / dimensions + 1)^3 (Binkowski et al., arXiv:1801.01401). FID is the squared Frechet distance of two Gaussians
(Heusel et al., arXiv:1706.08500); with few images it is too high. Precision is the share of samples, and recall that of
real images, that lie no farther from one of the other kind than its third neighbour of its own does (Kynkaanniemi et
al., arXiv:1904.06991, who take VGG-16). Numbers with other features, or at other sizes, cannot be compared.
"""

import sys
from pathlib import Path

import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchvision.models import SqueezeNet1_0_Weights, squeezenet1_0
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from tqdm import tqdm

from bench import digits
from bench.common import fail, file_hash, find_images, one_size, read_image, read_weights

ENOUGH = 2048  # images: with fewer the covariance of as many Inception features is singular
INCEPTION = "6726825d"  # how the SHA-256 of the weights that FID is known by begins; it is also in the file's name


class Images:
    """All images of a folder, uint8 (3, H, W), of one `size` (width, height); with `resize` N they become N x N."""

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


def find_weights(url, weights):
    """The file `weights`, or that of the address in torch's cache, downloaded on first use."""
    path = weights or Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.exists() and not weights:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except OSError as error:
            fail(f"{url} cannot be downloaded ({error}): download it by hand and give it with --weights")
    return path


def inception(weights, device):
    """The network that FID is known by, as a function; its name, and the hash of its file."""
    path = find_weights(URL_INCEPTION_V3, weights)
    read_weights(path)  # safely, as the next line would run code that the file holds
    try:
        net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path)).to(device)
    except Exception:  # of many kinds
        fail(f"{path} does not hold torch-fidelity's Inception network: give {URL_INCEPTION_V3} with --weights")
    found = file_hash(path)
    name = "inception-v3-compat" if found == INCEPTION else f"unknown weights {found}"
    return lambda images: net(images)[0], name, found


def squeezenet(weights, device):
    """torchvision's SqueezeNet, trained on ImageNet: means of its last 512 maps, as a function; its name and hash."""
    about, net = SqueezeNet1_0_Weights.DEFAULT, squeezenet1_0().eval().to(device)
    path = find_weights(about.url, weights)
    try:
        net.load_state_dict(read_weights(path))
    except (RuntimeError, TypeError):
        fail(f"{path} does not hold torchvision's squeezenet1_0: give {about.url} with --weights")
    prepare = about.transforms(crop_size=224, resize_size=224)

    def see(images):
        return net.features(prepare(resize(images, [224, 224]))).mean((2, 3)).double()

    return see, "SqueezeNet of ImageNet", file_hash(path)


def classifier(data, data_root, device):
    """What the last layer of the classifier of digits is given, (N, 128), as a function; its name and hash."""
    layers = digits.classifier(data, data_root)[:-1].to(device)
    name = f"classifier of {data} digits"
    return lambda images: layers(images[:, :1] / 255).double(), name, file_hash(digits.weights(data))


@torch.no_grad()
def extract(net, images, device):
    """What `net` finds in uint8 images (3, H, W), of which all must have one size. -> (N, D)."""
    batches = tqdm(torch.arange(len(images)).split(64), "features", disable=None)
    return torch.cat([net(torch.stack([images[i] for i in chosen]).to(device)).cpu() for chosen in batches])


def compare(samples, real):
    """KID with its deviation over subsets, FID, precision and recall of two sets of features (N, D).
    KID's subsets have 1,000 images, or half of the smaller set if that has no more."""
    few = min(len(samples), len(real))
    subset = 1000 if few > 1000 else few // 2
    statistics = map(fid_features_to_statistics, (samples, real))
    kid, kid_std = kid_features_to_metric(samples, real, kid_subset_size=subset, verbose=False).values()
    (fid,) = fid_statistics_to_metric(*statistics, verbose=False).values()
    settings = {"prc_batch_size": 2000, "save_cpu_ram": True, "verbose": False}
    precision, recall, _ = prc_features_to_metric(samples, real, **settings).values()
    row = {"kid": kid, "kid_std": kid_std, "fid": fid, "precision": precision, "recall": recall, "kid_subset": subset}
    return row | {"n_samples": len(samples), "n_real": len(real)}


def measure(samples, real, size, args):
    """A row for each of `samples` beside `real`, all of them sequences of uint8 images (3, H, W) of `size` (W, H).

    `args` has features, weights, data_root and device. Features but those of Inception are divided by their root mean
    square over real images, for KID's kernel.
    """
    if args.features in ("inception", "squeezenet"):
        find = {"inception": inception, "squeezenet": squeezenet}[args.features]
        net, name, weights = find(args.weights, args.device)
    elif size == (28, 28):
        net, name, weights = classifier(args.features, args.data_root, args.device)
    else:
        fail(f"--features {args.features}: that takes 28x28 pixels, not {size[0]}x{size[1]}: use --resize 28")
    real = extract(net, real, args.device)
    scale = 1 if args.features == "inception" else real.square().mean().sqrt()
    rows = [compare(extract(net, images, args.device) / scale, real / scale) for images in samples]
    if (few := min(len(real), *map(len, samples))) < ENOUGH:
        print(f"FID rests on {few} images: with fewer than {ENOUGH:,} it comes out too high, so look at KID")
    about = {"features": name, "weights": weights, "resolution": f"{size[0]}x{size[1]}"}
    return [row | about | {"torch_fidelity": torch_fidelity.__version__} for row in rows]
