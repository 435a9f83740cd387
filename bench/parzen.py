"""Log-likelihood of test digits under a Parzen window on samples, by the protocol of GAN's authors (parzen_ll.py).

A Gaussian of width sigma sits on each of 10,000 samples in [0, 1]; sigma is the best of ten, from .1 to 1, for 1,000
validation images. The paper warns that the estimate has a high variance and does badly in many dimensions (Sec. 5).
"""

import math

import torch

from bench.common import read_digits, read_samples, write

WIDTHS = torch.logspace(-1, 0, 10).tolist()


def log_likelihood(points, samples, sigma):
    """log of the mean over `samples` (M, D) of Gaussians of width sigma, at `points` (N, D), in nats. -> (N,)."""
    found = []
    for some in points.split(500):
        distance = torch.cdist(some.double(), samples.double())
        found.append(torch.logsumexp(-(distance**2) / (2 * sigma**2), 1))
    return torch.cat(found) - math.log(len(samples)) - points.shape[1] * math.log(sigma * math.sqrt(2 * math.pi))


def measure(samples, valid, test):
    """sigma, mean and standard error of the log-likelihood of `test`, from uint8 images (N, ...) of all three."""
    samples, valid, test = (images.flatten(1).float() / 255 for images in (samples, valid[:1000], test))
    sigma = max(WIDTHS, key=lambda width: log_likelihood(valid, samples, width).mean().item())
    found = log_likelihood(test, samples, sigma)
    return sigma, found.mean().item(), (found.std(correction=0) / len(found) ** 0.5).item()


def run(args):
    """Print the log-likelihood of --samples, and beside it that of as many training images."""
    samples, _ = read_samples(args.samples)
    if len(samples) < 10000:
        print(f"the protocol takes 10000 samples, here are {len(samples)}: expect a lower number")
    (train, _), (valid, _), (test, _) = (read_digits(args, split) for split in ("train", "valid", "test"))
    for name, points in (("samples", samples[:10000]), ("training images", train[: len(samples)][:10000])):
        sigma, mean, error = measure(points, valid, test)
        row = {"measure": "parzen", "data": args.data, "of": name, "n_samples": len(points), "n_test": len(test)}
        row |= {"sigma": sigma, "log_likelihood": mean, "standard_error": error}
        if name == "samples":
            ours = row
        else:
            ours |= {"log_likelihood_of_training_images": mean, "sigma_of_training_images": sigma}
    write(args, ours)
