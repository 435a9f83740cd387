"""The one-dimensional picture of Goodfellow et al. (2014), Fig. 1, from gan.py's own networks and updates.

Data (dotted) are drawn from a Gaussian, G (solid) from z on the lower line, which it maps to x on the upper one; D
(dashed) tells them apart: (a) it has begun to learn; (b) it has learned while G rested, and is nearly
p_data / (p_data + p_g); (c) G has followed its slope; (d) both have learned until D is 1/2 and neither can improve.
"""

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

import gan

MEAN, WIDTH = 0.62, 0.1  # of the data; x lies in [0, 1]
SETTINGS = "--size 1 --nz 1 --ngf 64 --ndf 32 --k 5 --batch-size 256 --optimiser adam --lr 1e-3"
MOMENTS = {  # what each panel adds: updates, and the rates of G and D, which fall to zero in the last
    "(a) D begins to learn": (12, 0, 1e-3),
    "(b) D learns, G rests": (150, 0, 3e-3),
    "(c) G follows D": (15, 1e-3, 3e-3),
    "(d) both have learned": (1800, 1e-3, 3e-3),
}


def begin(args):
    """gan.py's networks and optimisers, with weights wide enough for one number: G rises with z, left of the data."""
    state = gan.build(args)
    gan.init_weights(state["D"], 0.5).eval()  # no dropout: it would erase the only number
    first = state["G"].layers[0]
    for weight in gan.init_weights(state["G"], 0.12).parameters():
        weight.data.abs_()
    first.bias.data = first.weight.data[:, 0] * torch.linspace(-1.5, 1.5, len(first.bias))  # each unit bends elsewhere
    state["G"].bias.data.fill_(math.log(0.25 / 0.75))
    return state


def learn(state, step, batch, count, rate_G, rate_D, falling):
    """`count` updates on fresh data, `batch` numbers each."""
    for i in range(count):
        for name, rate in (("opt_G", rate_G), ("opt_D", rate_D)):
            state[name].param_groups[0]["lr"].fill_(rate * (1 - falling * i / count))
        step(MEAN + WIDTH * torch.randn(batch, 1, 1, 1))


def density(points, grid, width=0.012):
    """The density at `grid` (M,) of `points` (N,), under a Gaussian of `width` on each. -> (M,)."""
    kernels = torch.exp(-(((grid[:, None] - points) / width) ** 2) / 2)
    return kernels.mean(1) / (width * math.sqrt(2 * math.pi))


def panel(axes, caption, x, grid, data, ours, D):
    """One moment: p_data dotted, p_g solid, D dashed; below them where G takes 17 evenly spaced z."""
    highest = max(7.0, ours.max().item())
    axes.axhline(0.5, color="#dddddd", linewidth=1)  # D = 1/2
    axes.plot(grid, D, "--", color="#1f4fd8")
    axes.plot(grid, data / highest, ":", color="black")
    axes.plot(grid, ours / highest, color="#12872b")
    for height, name in ((0, "x"), (-0.35, "z")):
        axes.axhline(height, color="black", linewidth=1)
        axes.text(0.97, height - 0.09, name)
    arrow = {"arrowstyle": "->", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
    z = torch.linspace(0.12, 0.88, len(x))
    for i in range(0, len(x), len(x) // 16):
        axes.annotate("", (x[i], 0), (z[i], -0.35), arrowprops=arrow)
    axes.set(xlim=(0, 1), ylim=(-0.5, 1.1))
    axes.set_title(caption, fontsize=9, loc="left")
    axes.axis("off")


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of training (%(default)s)")
    add("--to", type=Path, default="runs/figures", help="folder for the PNG (%(default)s)")


def main(args):
    """Train from --seed and paint --to/gan-1d.png; print how far G and D are from where they should be."""
    settings = gan.get_args([*SETTINGS.split(), "--seed", str(args.seed), "--device", "cpu", "--precision", "fp32"])
    state, grid = begin(settings), torch.linspace(0, 1, 1001)
    step, data = gan.make_step(settings, state), torch.distributions.Normal(MEAN, WIDTH).log_prob(grid).exp()
    near, figure = (grid - MEAN).abs() < 2 * WIDTH, Figure((2.5 * len(MOMENTS), 2.7), layout="tight")
    for axes, (caption, (count, rate_G, rate_D)) in zip(figure.subplots(1, len(MOMENTS)), MOMENTS.items()):
        learn(state, step, settings.k * settings.batch_size, count, rate_G, rate_D, caption.startswith("(d)"))
        with torch.no_grad():
            x = state["G"](torch.linspace(-1, 1, 4001)[:, None] * math.sqrt(3)).flatten()
            D = state["D"](grid.view(-1, 1, 1, 1)).sigmoid()
        ours = density(x, grid)
        half, best = (D - 0.5).abs()[near].mean(), (D - data / (data + ours)).abs()[near].mean()
        print(f"{caption}: G's mean {x.mean():.3f} ({MEAN}), std {x.std():.3f} ({WIDTH})", end="; ")
        print(f"where the data lie mean |D - 1/2| {half:.3f}, |D - D*| {best:.3f}")
        panel(axes, caption, x, grid, data, ours, D)
    args.to.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.to / "gan-1d.png", dpi=100)
    print(f"painted {args.to}/gan-1d.png")
