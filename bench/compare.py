"""Folders of images, of whatever method, beside real ones: KID, FID, precision, recall, and FCN-score.

    python -m bench compare --real photos --samples ours=runs/pix2pix-maps theirs=their/images --resize 256

A run folder of a script stands for what it has translated or drawn; what has drawn nothing yet draws now. With
--classes, a folder of class ids named as the images, a segmentation network says what it finds in the photos: it
learns from one half of the real photos and judges the other, and the other way round, so that it has seen no scene that
it judges. The FCN-score of real photos, judged in the same way, has a row of its own.
"""

import html
import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from bench import fcn, fid
from bench.common import ROOT, data_uri, fail, find_images, one_size, parse, read_weights, run_script, save

COLUMNS = {  # of a row: heading, format
    "kid": ("KID", "{:.4g}"),
    "kid_std": ("±", "{:.2g}"),
    "fid": ("FID", "{:.4g}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "pixel_accuracy": ("pixel accuracy", "{:.3f}"),
    "class_accuracy": ("class accuracy", "{:.3f}"),
    "class_iou": ("class IoU", "{:.3f}"),
    "scorers": ("scorers", "{}"),
    "n_samples": ("samples", "{}"),
    "n_real": ("real", "{}"),
    "features": ("features", "{}"),
    "weights": ("hash", "{}"),
}
PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Methods beside real images</title><style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem; color-scheme: light dark; }
table { border-collapse: collapse; } th, td { padding: .3rem .7rem; border-bottom: 1px solid #8888; text-align: right; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }
figure { margin: 1rem 0; } img { width: 100%; image-rendering: pixelated; }
</style></head><body><h1>Methods beside real images</h1>"""


def find_folder(folder, count):
    """The images that stand for a method: those of a folder, or what the run in it has translated or drawn."""
    if not (folder / "last.pt").exists():
        return folder
    script = read_weights(folder / "last.pt").get("script", "").removesuffix(".py")
    if script == "pix2pix":
        return folder / "test"
    if script == "cyclegan":
        fail(f"{folder} is a run of cyclegan.py: give {folder}/test/AtoB or {folder}/test/BtoA")
    drawn = folder / "sampled"
    if not drawn.is_dir():
        if script not in ("gan", "cgan", "dcgan"):
            fail(f"{folder} has no folder sampled: draw images with its script's --sample first")
        print(f"{script}.py draws {count} images into {drawn}", flush=True)
        run_script(ROOT / f"{script}.py", folder, "--sample", count)
    elif drawn.stat().st_mtime < (folder / "last.pt").stat().st_mtime:
        print(f"{drawn} was drawn before {folder}/last.pt was written")
    return drawn


def fcn_scores(args, folders):
    """The FCN-scores of each folder and, last, of real photos, by networks trained on the other half of these."""
    ids, photos = fcn.find_images(args.classes, "--classes"), fcn.find_images(args.real, "--real")
    found = [photos if folder == args.real else fcn.find_images(folder) for folder in (*folders, args.real)]
    for folder, files in zip((*folders, args.real), found):
        if missing := sorted(ids.keys() - files.keys()):
            fail(f"--classes {args.classes} has {missing[0]}, but {folder} has no image of that name")
    names, classes = sorted(ids), fcn.count_classes(ids.values())
    shape = (args.resize, args.resize) if args.resize else one_size(photos.values())[::-1]
    given = {"data": args.real, "cache": args.cache, "device": args.device, "epochs": max(20, 5000 // len(names))}
    given, totals, hashes = fcn.fill_in(Namespace(**given)), [0] * len(found), []
    halves = [fcn.photos_with_ids({name: photos[name] for name in names[k::2]}, ids, classes) for k in (0, 1)]
    for known, judged in (halves, halves[::-1]):
        net, size, _, weights = fcn.find_segmenter(given, shape, known)
        look = partial(fcn.see, net, size, given.device)
        counts = [fcn.count(judged, fcn.named(judged, files, shape), look) for files in found]
        totals, hashes = [total + some for total, some in zip(totals, counts)], [*hashes, weights]
    return [fcn.scores(total) | {"scorers": " ".join(hashes)} for total in totals]


def grid(images, count=36):
    """Some of the images, spread over all, as one Pillow image."""
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).long()
    return to_pil_image(make_grid([images[i] for i in chosen], 6, pad_value=128))


def table(rows):
    """Headings, and a list of texts for each row; a column that no row has is left out."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    cells = [[row["name"], *(COLUMNS[n][1].format(row[n]) if n in row else "" for n in names)] for row in rows]
    return [["", *(COLUMNS[name][0] for name in names)], *cells]


def page(lines, grids):
    """The table and the grids {name: Pillow image} as a page that needs nothing else."""
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>" for line in lines)
    figures = "".join(
        f'<figure><figcaption>{html.escape(name)}</figcaption><img alt="" src="{data_uri(image)}"></figure>'
        for name, image in grids.items()
    )
    return f"{PAGE}<table>{rows}</table><main>{figures}</main></body></html>\n"


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("--real", type=Path, required=True, help="folder of real images")
    add("--samples", nargs="+", required=True, metavar="NAME=DIR", help="folders of images, or of runs")
    add("--classes", type=Path, help="folder of class ids, named as the images: adds the FCN-score")
    fid.feature_options(parser)
    add("--out", type=Path, default=Path("runs", "compare"), help="folder for the JSON and the page (%(default)s)")


def main(argv=None):
    """Print the table of all --samples, and write it to --out as JSON and as a page with grids of images."""
    args = parse(argv, "compare", __doc__, options)
    pairs = [text.rpartition("=")[::2] for text in args.samples]  # a folder alone is a name too
    names = [name or folder for name, folder in pairs]
    if len({*names, "real"}) <= len(names):
        fail(f"--samples {' '.join(args.samples)}: give each a name of its own, and none of them real")
    count = len(find_images(args.real, "--real"))
    folders = [find_folder(Path(folder), min(count, 10000)) for _, folder in pairs]
    rows = [{"name": name} | row for name, row in zip(names, fid.measure_all(args, folders))]
    if args.classes:
        rows.append({"name": "real", "n_real": count})
        rows = [row | found for row, found in zip(rows, fcn_scores(args, folders))]
    lines = table(rows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))
    grids = {name: grid(fid.Images("--samples", folder, args.resize)) for name, folder in zip(names, folders)}
    save(args.out / "compare.html", page(lines, {"real": grid(fid.Images("--real", args.real, args.resize))} | grids))
    save(args.out / "compare.json", json.dumps({"measure": "compare", "rows": rows}, indent=2) + "\n")
    print(f"wrote {args.out}/compare.html and compare.json")
