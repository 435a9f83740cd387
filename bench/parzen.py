"""Log-likelihood of test digits under a Parzen window on samples, by the protocol of GAN's authors (parzen_ll.py).

A Gaussian of width sigma sits on each of 10,000 samples in [0, 1]; sigma is the best of ten, from .1 to 1, for 1,000
validation images. The paper warns that the estimate has a high variance and does badly in many dimensions (Sec. 5).
"""

import functools
import math

import torch

from bench.common import digit_options, read_digits, read_samples

WIDTHS = torch.logspace(-1, 0, 10).tolist()
options = digit_options


def log_likelihoods(points, samples, widths):
    """log of the mean over `samples` (M, D) of Gaussians of each width, at `points` (N, D), in nats. -> (widths, N)."""
    found, size = [], points.shape[1]
    for some in points.split(500):
        squares = torch.cdist(some.double(), samples.double()) ** 2
        found.append(torch.stack([torch.logsumexp(-squares / (2 * width**2), 1) for width in widths]))
    scale = [math.log(len(samples)) + size * math.log(width * math.sqrt(2 * math.pi)) for width in widths]
    return torch.cat(found, 1) - torch.tensor(scale, dtype=torch.float64)[:, None]


def fit(samples, valid, test):
    """sigma, mean and standard error of the log-likelihood of `test`, from uint8 images (N, ...) of all three."""
    samples, valid, test = (images.flatten(1).float() / 255 for images in (samples, valid[:1000], test))
    sigma = WIDTHS[log_likelihoods(valid, samples, WIDTHS).mean(1).argmax()]
    (found,) = log_likelihoods(test, samples, [sigma])
    return sigma, found.mean().item(), (found.std(correction=0) / len(found) ** 0.5).item()


@functools.cache
def reference(data, data_root, count):
    """What `fit` finds for as many training images: as good as samples can be expected to be."""
    train, valid, test = (read_digits(data, data_root, split)[0] for split in ("train", "valid", "test"))
    return fit(train[:count], valid, test)


def main(args):
    """The row of --samples: log-likelihood of test images under them, and under as many training images."""
    samples = read_samples(args.samples)[0][:10000]
    if len(samples) < 10000:
        print(f"the protocol takes 10000 samples, here are {len(samples)}: expect a lower number")
    valid, test = (read_digits(args.data, args.data_root, split)[0] for split in ("valid", "test"))
    sigma, mean, error = fit(samples, valid, test)
    row = {"measure": "parzen", "data": args.data, "of": "samples", "n_samples": len(samples), "n_test": len(test)}
    row |= {"sigma": sigma, "log_likelihood": mean, "standard_error": error}
    sigma, mean, _ = reference(args.data, args.data_root, len(samples))
    return row | {"log_likelihood_of_training_images": mean, "sigma_of_training_images": sigma}
