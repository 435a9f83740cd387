"""Loss curves of runs: python -m bench curves runs/pix2pix-toy runs/cyclegan-toy --to curves.png"""

import io
from pathlib import Path

from matplotlib.figure import Figure

from bench.columns import read_log
from bench.common import fail, parse, save


def curves(logs):
    """A panel for each of {title: rows of a log}: every loss over the updates. -> the bytes of a PNG."""
    figure = Figure(figsize=(4.8, 3 * len(logs)), layout="constrained")
    for panel, (title, rows) in zip(figure.subplots(len(logs), squeeze=False).flat, logs.items()):
        for name in sorted(rows[0].keys() - {"step", "epoch", "images_per_s"}):
            panel.plot([row["step"] for row in rows], [row.get(name) for row in rows], label=name, linewidth=1)
        panel.set(title=title, xlabel="updates")
        panel.legend(fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    return file.getvalue()


def options(parser):
    """What it takes."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, each with a log.jsonl")
    parser.add_argument("--to", type=Path, default=Path("runs", "curves.png"), help="the picture (runs/curves.png)")


def main(argv=None):
    """Write the loss curves of run folders as one PNG."""
    args = parse(argv, "curves", __doc__, options)
    logs = {str(run): read_log(run) or fail(f"{run} is no run folder: it has no log.jsonl") for run in args.runs}
    save(args.to, curves(logs))
    print(f"wrote {args.to}")
