"""VAE: a baseline that is not adversarial, with a decoder of the size of gan.py's G: python bench/vae.py --help

Kingma, Welling: Auto-Encoding Variational Bayes. ICLR 2014, arXiv:1312.6114. An encoder gives mean and variance of z
for an image x, a decoder the probability of ink in each pixel for z. Both climb the bound (Eq. 10)
    log p(x) >= E[log p(x | z)] - KL(q(z | x) || N(0, 1)),  z = mean + deviation * noise
Its samples are the decoder's means: where a pixel is uncertain they are grey, hence the blur.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.utils import save_image

sys.path.append(str(Path(__file__).parent.parent))
from bench.common import fail, find_device, read_digits, read_weights, save

NZ, BATCH, RATE = 100, 100, 1e-3  # numbers in z, images an update, Adam's rate: as in gan.py
UNITS = {"toy": 400, "mnist": 1200}  # of the hidden layers, as in gan.py


def build(units):
    """An encoder, x (N, 1, 28, 28) -> mean and log variance of z (N, 2 NZ), a decoder, z (N, NZ) -> logits like x."""
    encoder = [nn.Flatten(), nn.Linear(784, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU()]
    decoder = [nn.Linear(NZ, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 784)]
    return nn.Sequential(*encoder, nn.Linear(units, 2 * NZ)), nn.Sequential(*decoder, nn.Unflatten(1, (1, 28, 28)))


def losses(encoder, decoder, x):
    """The terms of -(Eq. 10) for x in [0, 1], in nats an image: reconstruction and divergence, each 0-d."""
    mean, log_variance = encoder(x).chunk(2, 1)
    logits = decoder(mean + (log_variance / 2).exp() * torch.randn_like(mean))
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum() / 2
    return {"reconstruction": reconstruction / len(x), "divergence": divergence / len(x)}


@torch.no_grad()
def draw(decoder, count, args):
    """Means of p(x | z) for z from N(0, 1), by --seed. -> (count, 1, 28, 28) in [0, 1]."""
    torch.manual_seed(args.seed)
    return decoder(torch.randn(count, NZ, device=args.device)).sigmoid()


def train(args):
    """Train, and write the run folder at the end: an interrupted run begins anew, as it takes a minute."""
    images, log, started = read_digits(args.data, args.data_root, "train")[0], [], time.monotonic()
    torch.manual_seed(args.seed)
    encoder, decoder = (net.to(args.device) for net in build(UNITS[args.data]))
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], RATE)
    goal = args.max_steps or args.epochs * len(images) // BATCH
    for step in range(1, goal + 1):
        chosen = torch.randint(len(images), (BATCH,))
        found = losses(encoder, decoder, images[chosen].to(args.device) / 255)
        optimiser.zero_grad()
        sum(found.values()).backward()
        optimiser.step()
        if step % 100 == 0 or step == goal:
            row = {"step": step, "epoch": step * BATCH // len(images) + 1}
            row |= {name: loss.item() for name, loss in found.items()}
            log.append(row | {"images_per_s": step * BATCH / (time.monotonic() - started)})
    config = vars(args) | {"batch_size": BATCH, "lr": RATE, "precision": "fp32", "torch": torch.__version__}
    save(args.out / "config.json", json.dumps(config, indent=2, default=str))
    save(args.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    torch.save({"script": "vae", "units": UNITS[args.data], "decoder": decoder.state_dict()}, args.out / "last.pt")
    (args.out / "samples").mkdir(exist_ok=True)
    save_image(draw(decoder, 100, args), args.out / "samples" / f"{goal:07}.png", nrow=10)


def sample(args):
    """Write --sample PNGs into --to."""
    checkpoint, to = read_weights(args.out / "last.pt"), args.to or args.out / "sampled"
    decoder = build(checkpoint["units"])[1].to(args.device)
    decoder.load_state_dict(checkpoint["decoder"])
    to.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(draw(decoder, args.sample, args)):
        save_image(image, to / f"{i:05}.png")


def main(argv=None):
    """Train, or draw with --sample."""
    parser = argparse.ArgumentParser("bench/vae.py", description=__doc__.partition(":")[0])
    parser.error, add = fail, parser.add_argument
    add("--data", choices=tuple(UNITS), default="toy", help="digits (%(default)s)")
    add("--data-root", type=Path, default="data", help="where MNIST lies, or goes to (%(default)s)")
    add("--out", type=Path, default="runs/vae", help="run folder (%(default)s)")
    add("--epochs", type=int, default=60, help="as many images as so many passes have (%(default)s)")
    add("--max-steps", type=int, help="updates, instead")
    add("--seed", type=int, default=0, help="of training; of z for --sample (0)")
    add("--device", help="cpu, cuda, ... (cuda, if there is one)")
    add("--sample", type=int, metavar="N", help="draw N images with what was trained")
    add("--to", type=Path, help="folder for them (OUT/sampled)")
    args = parser.parse_args(argv)
    args.device = find_device(args.device)
    (sample if args.sample else train)(args)


if __name__ == "__main__":
    main()
