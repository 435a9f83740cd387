"""Loss curves of runs: python -m bench curves runs/pix2pix-toy runs/cyclegan-toy --to curves.png"""

from pathlib import Path

from matplotlib.figure import Figure

from bench.columns import read_log
from bench.common import fail


def curves(logs):
    """A figure with a panel for each of {title: rows of a log}: every loss over the updates."""
    figure = Figure(figsize=(4.8, 3 * len(logs)), layout="constrained")
    for panel, (title, rows) in zip(figure.subplots(len(logs), squeeze=False).flat, logs.items()):
        for name in sorted(rows[0].keys() - {"step", "epoch", "images_per_s"}):
            panel.plot([row["step"] for row in rows], [row.get(name) for row in rows], label=name, linewidth=1)
        panel.set(title=title, xlabel="updates")
        panel.legend(fontsize="small")
    return figure


def options(parser):
    """What it takes."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, each with a log.jsonl")
    parser.add_argument("--to", type=Path, default="runs/curves.png", help="the picture (%(default)s)")


def main(args):
    """Write the loss curves of run folders as one PNG."""
    logs = {str(run): read_log(run) or fail(f"{run} is no run folder: it has no log.jsonl") for run in args.runs}
    args.to.parent.mkdir(parents=True, exist_ok=True)
    curves(logs).savefig(args.to)
    print(f"wrote {args.to}")
