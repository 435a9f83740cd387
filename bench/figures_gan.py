"""The one-dimensional picture of Goodfellow et al. (2014), Fig. 1, from gan.py's own networks and updates.

Data (dotted) are drawn from a Gaussian, G (solid) from z on the lower line, which it maps to x on the upper one; D
(dashed) tells them apart: (a) it has begun to learn; (b) it has learned while G rested, and is nearly
p_data / (p_data + p_g); (c) G has followed its slope; (d) both have learned until D is 1/2 and neither can improve.
"""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import gan
from bench.common import save_png

MEAN, WIDTH = 0.62, 0.1  # of the data; x lies in [0, 1]
SETTINGS = "--size 1 --nz 1 --ngf 64 --ndf 32 --k 5 --batch-size 256 --optimiser adam --lr 1e-3"
MOMENTS = {  # what each panel adds: updates, and the rates of G and D, which fall to zero in the last
    "(a) D begins to learn": (12, 0, 1e-3),
    "(b) D learns, G rests": (150, 0, 3e-3),
    "(c) G follows D": (15, 1e-3, 3e-3),
    "(d) both have learned": (1800, 1e-3, 3e-3),
}
SCALE = 4  # drawn so much larger, then reduced: smooth lines


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


def distance(points):
    """The earth mover's distance between `points` (N,) and the data: the mean way from quantile to quantile."""
    levels = (torch.arange(len(points)) + 0.5) / len(points)
    return (points.sort().values - torch.distributions.Normal(MEAN, WIDTH).icdf(levels)).abs().mean().item()


@torch.no_grad()
def look(state, grid):
    """G(z) for evenly spaced z (4001,), and at `grid` (M,) the densities of the data and of G, and D."""
    x = state["G"](torch.linspace(-1, 1, 4001)[:, None] * math.sqrt(3)).flatten()
    data = torch.distributions.Normal(MEAN, WIDTH).log_prob(grid).exp()
    return x, data, density(x, grid), state["D"](grid.view(-1, 1, 1, 1)).sigmoid()


def line(pen, points, fill, dash=None):
    """A curve through `points`, whole or, with `dash` = (drawn, left out) in pixels, broken."""
    if not dash:
        return pen.line(points, fill, 2 * SCALE, joint="curve")
    way, (drawn, gap) = 0.0, (SCALE * length for length in dash)
    for start, end in zip(points, points[1:]):
        if way % (drawn + gap) < drawn:
            pen.line([start, end], fill, 2 * SCALE)
        way += math.dist(start, end)


def panel(caption, x, data, ours, D, wide=250, high=270):
    """One moment: p_data dotted, p_g solid, D dashed; below it where G takes 17 evenly spaced z."""
    image = Image.new("RGB", (wide * SCALE, high * SCALE), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13 * SCALE)
    floor, top, low, left, right = (SCALE * place for place in (185, 40, 240, 10, wide - 10))
    across = torch.linspace(left, right, len(D)).tolist()
    highest = max(7.0, ours.max().item())
    pen.line([left, (floor + top) / 2, right, (floor + top) / 2], "#dddddd", SCALE)  # D = 1/2
    for values, fill, dash in (
        (D, "#1f4fd8", (6, 4)),
        (data / highest, "black", (2, 3)),
        (ours / highest, "#12872b", None),
    ):
        line(pen, list(zip(across, (floor - (floor - top) * values).tolist())), fill, dash)
    for height, name in ((floor, "x"), (low, "z")):
        pen.line([left, height, right, height], "black", SCALE)
        pen.text((right - 8 * SCALE, height + SCALE), name, "black", font)
    z = torch.linspace(0.12, 0.88, len(x))
    for i in range(0, len(x), len(x) // 16):
        start, end = ((left + (right - left) * at[i].item()) for at in (z, x))
        pen.line([start, low, end, floor], "black", SCALE)
        turn = math.atan2(floor - low, end - start)
        for side in (turn - 0.35, turn + 0.35):
            pen.line([end, floor, end - 7 * SCALE * math.cos(side), floor - 7 * SCALE * math.sin(side)], "black", SCALE)
    pen.text((left, 6 * SCALE), caption, "black", font)
    return image.resize((wide, high), Image.Resampling.LANCZOS)


def options(parser):
    """What it takes."""
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--to", type=Path, default=Path("runs", "figures"), help="folder for the PNG")


def run(args):
    """Train from --seed and paint --to/gan-1d.png; print how far G's density and D are from where they should be."""
    settings = gan.get_args([*SETTINGS.split(), "--seed", str(args.seed), "--device", "cpu", "--precision", "fp32"])
    state, grid, panels = begin(settings), torch.linspace(0, 1, 1001), []
    step = gan.make_step(settings, state)
    for caption, (count, rate_G, rate_D) in MOMENTS.items():
        learn(state, step, settings.k * settings.batch_size, count, rate_G, rate_D, caption.startswith("(d)"))
        x, data, ours, D = look(state, grid)
        near = (grid - MEAN).abs() < 2 * WIDTH
        half, best = (D - 0.5).abs()[near].mean(), (D - data / (data + ours)).abs()[near].mean()
        print(
            f"{caption}: G's mean {x.mean():.3f} ({MEAN}), std {x.std():.3f} ({WIDTH}), distance {distance(x):.4f}; "
            f"where the data lie mean |D - 1/2| {half:.3f}, |D - D*| {best:.3f}"
        )
        panels.append(panel(caption, x, data, ours, D))
    sheet = Image.new("RGB", (sum(image.width for image in panels), panels[0].height), "white")
    for i, image in enumerate(panels):
        sheet.paste(image, (i * image.width, 0))
    save_png(args.to / "gan-1d.png", sheet)
