"""Folders of images, of whatever method, beside real ones: KID, FID, precision, recall, and FCN-score.

    python -m bench compare --real photos --samples ours=runs/pix2pix-maps theirs=their/images --resize 256

A run folder of a script stands for what it has translated or drawn; what has drawn nothing yet draws now. With
--classes, a folder of class ids named as the images, a segmentation network says what it finds in the photos: it
learns from one half of the real photos and judges the other, and the other way round, so that it has seen no scene that
it judges. The FCN-score of real photos, judged in the same way, has a row of its own.
"""

import json
from pathlib import Path

import torch
import torch_fidelity
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from bench import fcn, fid
from bench.columns import HEADINGS, markdown
from bench.common import data_uri, fail, find_device, find_images, one_size, page, read_weights, run_script, save

COLUMNS = {"kid": ".4g", "kid_std": ".2g", "fid": ".4g"}  # of the table, with their formats
COLUMNS |= dict.fromkeys(("precision", "recall", *fcn.METRICS), ".3f")
COLUMNS |= dict.fromkeys(("scorers", "n_samples", "n_real", "features", "weights"), "")


def find_folder(folder, count):
    """The images that stand for a method: those of a folder, or what the run in it has translated or drawn."""
    if not (folder / "last.pt").exists():
        return folder
    script = read_weights(folder / "last.pt")["script"]
    if script == "pix2pix":
        return folder / "test"
    if script == "cyclegan":
        fail(f"{folder} is a run of cyclegan.py: give {folder}/test/AtoB or {folder}/test/BtoA")
    drawn = folder / "sampled"
    if not drawn.is_dir():
        if script == "text2img":
            fail(f"{folder} has no folder sampled: draw images by sentences of yours with text2img.py first")
        print(f"{script}.py draws {count} images into {drawn}", flush=True)
        run_script("bench/vae.py" if script == "vae" else f"{script}.py", folder, "--sample", count)
    elif drawn.stat().st_mtime < (folder / "last.pt").stat().st_mtime:
        print(f"{drawn} was drawn before {folder}/last.pt was written")
    return drawn


def fcn_scores(args, folders):
    """The FCN-scores of each folder and, last, of real photos, by networks trained on the other half of these."""
    ids, photos = find_images(args.classes, "--classes"), find_images(args.real, "--real")
    found = [photos if folder == args.real else find_images(folder) for folder in (*folders, args.real)]
    for folder, files in zip((*folders, args.real), found):
        if missing := sorted(ids.keys() - files.keys()):
            fail(f"--classes {args.classes} has {missing[0]}, but {folder} has no image of that name")
    names, classes = sorted(ids), fcn.count_classes(ids.values())
    shape = (args.resize, args.resize) if args.resize else one_size(photos.values())[::-1]
    halves = [fcn.photos_with_ids({name: photos[name] for name in names[k::2]}, ids, classes) for k in (0, 1)]
    totals, hashes, epochs = [0] * len(found), [], max(20, 5000 // len(names))
    for known, judged in (halves, halves[::-1]):
        look, _, weights = fcn.find_segmenter(known, shape, epochs, args.data_root, args.device)
        counts = [fcn.count(judged, fcn.named(judged, files, shape), look) for files in found]
        totals, hashes = [total + some for total, some in zip(totals, counts)], [*hashes, weights]
    return [fcn.scores(total) | {"scorers": " ".join(hashes)} for total in totals]


def grid(images, count=36):
    """Some of the images, spread over all, as one Pillow image."""
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).long()
    return to_pil_image(make_grid([images[i] for i in chosen], 6, pad_value=128))


def table(rows):
    """The rows as Markdown; a column that no row has is left out."""
    columns = [["", *(row["name"] for row in rows)]]
    for name, form in COLUMNS.items():
        if any(name in row for row in rows):
            texts = [format(row[name], form) if name in row else "" for row in rows]
            columns.append([HEADINGS.get(name, name.replace("_", " ")), *texts])
    return markdown("Beside real images", columns, f"torch-fidelity {torch_fidelity.__version__}")


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("--real", type=Path, required=True, help="folder of real images")
    add("--samples", nargs="+", required=True, metavar="NAME=DIR", help="folders of images, or of runs")
    add("--resize", type=int, metavar="N", help="resize all images to N x N pixels (else all must have one size)")
    add("--classes", type=Path, help="folder of class ids, named as the images: adds the FCN-score")
    about = "network whose features are compared; toy and mnist: of classifiers of digits (%(default)s)"
    add("--features", choices=("inception", "squeezenet", "toy", "mnist"), default="inception", help=about)
    add("--weights", type=Path, help="file of that network (torch's cache; it is downloaded on first use)")
    add("--data-root", type=Path, default="data", help="where the network that finds classes is kept (%(default)s)")
    add("--device", help="cpu, cuda, ... (cuda, if there is one)")
    add("--out", type=Path, default="runs/compare", help="folder for the JSON and the page (%(default)s)")


def main(args):
    """Print the table of all --samples, and write it to --out as JSON and as a page with grids of images."""
    args.device = find_device(args.device)
    pairs = [text.rpartition("=")[::2] for text in args.samples]  # a folder alone is a name too
    names = [name or folder for name, folder in pairs]
    if len({*names, "real"}) <= len(names):
        fail(f"--samples {' '.join(args.samples)}: give each a name of its own, and none of them real")
    real = fid.Images("--real", args.real, args.resize)
    folders = [find_folder(Path(folder), min(len(real), 10000)) for _, folder in pairs]
    samples = [fid.Images("--samples", folder, args.resize) for folder in folders]
    for images in samples:
        if images.size != real.size:
            sizes = ["{}x{}".format(*size) for size in (images.size, real.size)]
            fail(f"{images.files[0]} has {sizes[0]} pixels, real images {sizes[1]}: use --resize N")
    rows = [{"name": name} | row for name, row in zip(names, fid.measure(samples, real, real.size, args))]
    if args.classes:
        rows.append({"name": "real", "n_real": len(real)})
        rows = [row | found for row, found in zip(rows, fcn_scores(args, folders))]
    text = table(rows)
    print(text)
    figures = [(name, [data_uri(grid(each).save)]) for name, each in zip(("real", *names), (real, *samples))]
    save(args.out / "compare.html", page("Methods beside real images", text, figures))
    save(args.out / "compare.json", json.dumps({"measure": "compare", "rows": rows}, indent=2) + "\n")
    print(f"wrote {args.out}/compare.html and compare.json")
