"""The papers' experiments, ours beside theirs: what is trained and how it is judged, and the training itself.

A run is a script with flags, a data set and a seed. It is trained as a user would train it, in a process of its own,
and judged (judges.py); its result is a JSON. A run with a result of the same code and flags is not repeated, and one
that was stopped goes on from its last.pt.
"""

import ast
import hashlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from bench.columns import fill, markdown, notes, read_json, read_log, value
from bench.common import ROOT, fail, find_device, save
from bench.judges import JUDGES, can_judge
from bench.speed import circumstances

PHOTO, LABELS = "photo_pixel photo_class photo_iou", "labels_pixel labels_class labels_iou"
ALL = "photo_iou labels_iou right kid missing log_likelihood images_per_s minutes peak_mib"
REAL = {name: ("0.80", "0.26", "0.21") for name in ("losses", "generators", "patches")}  # the paper's, of real images
TEXT = "right form ink size ground position_spread ground_spread style_position style_ground"
TABLES = {  # title, columns (their headings are in columns.py), source of the paper's numbers
    "methods": ("Every method", ALL, ""),
    "losses": ("pix2pix, losses: labels to photo", PHOTO, "Isola et al. 2017, Table 1, Cityscapes"),
    "generators": ("pix2pix, generators: labels to photo", PHOTO, "Isola et al., arXiv v3, Table 2, Cityscapes"),
    "patches": ("pix2pix, what D sees at once: labels to photo", PHOTO, "Isola et al. 2017, Table 2, Cityscapes"),
    "labels": ("pix2pix, losses: photo to labels", LABELS, "Isola et al. 2017, Table 5, Cityscapes"),
    "unpaired": ("CycleGAN, terms", f"{PHOTO} {LABELS}", "Zhu et al. 2017, Tables 2 and 3, Cityscapes at 128 pixels"),
    "text": ("text2img, sentences of unseen combinations", TEXT, ""),
    "parzen": ("GAN and cGAN, Parzen windows", "log_likelihood missing as_asked", "their Table 1, MNIST"),
    "variants": ("DCGAN, losses", "kid fid precision recall missing uneven steps", ""),
}


class Row(NamedTuple):
    """A line of a table. Rows of one name, in whichever table, are one run; the name begins with the script's."""

    table: str
    label: str
    name: str
    flags: str
    judges: str
    paper: tuple[str, ...] = ()  # its numbers as printed, in the order of the columns
    data: str = "toy real"  # the kinds of data that the row is made on


ROWS = (
    Row("methods", "CycleGAN, no pairs", "cyclegan", "", "photos labels"),
    Row("methods", "pix2pix", "pix2pix", "", "photos"),
    Row("methods", "text2img, GAN-INT-CLS", "text2img", "", "sentences"),
    Row("methods", "DCGAN", "dcgan", "", "digits"),
    Row("methods", "cGAN", "cgan", "", "digits"),
    Row("methods", "GAN", "gan", "", "digits"),
    Row("methods", "VAE, not adversarial", "vae", "", "digits"),
    Row("losses", "L1", "pix2pix-l1", "--loss l1", "photos", ("0.42", "0.15", "0.11")),
    Row("losses", "GAN", "pix2pix-gan", "--loss gan", "photos", ("0.22", "0.05", "0.01")),
    Row("losses", "cGAN", "pix2pix-cgan", "--loss cgan", "photos", ("0.57", "0.22", "0.16")),
    Row("losses", "L1+GAN", "pix2pix-l1+gan", "--loss l1+gan", "photos", ("0.64", "0.20", "0.15")),
    Row("losses", "L1+cGAN", "pix2pix", "", "photos", ("0.66", "0.23", "0.17")),
    Row("generators", "no skips, L1", "pix2pix-noskips-l1", "--no-skips --loss l1", "photos", ("0.35", "", "0.08")),
    Row("generators", "no skips, L1+cGAN", "pix2pix-noskips", "--no-skips", "photos", ("0.29", "", "0.05")),
    Row("generators", "U-Net, L1", "pix2pix-l1", "--loss l1", "photos", ("0.48", "", "0.13")),
    Row("generators", "U-Net, L1+cGAN", "pix2pix", "", "photos", ("0.55", "", "0.14")),
    Row("patches", "1x1", "pix2pix-1", "--n-layers 0", "photos", ("0.39", "0.15", "0.10")),
    Row("patches", "16x16", "pix2pix-16", "--n-layers 1", "photos", ("0.65", "0.21", "0.17")),
    Row("patches", "34x34", "pix2pix", "", "photos", data="toy"),  # the default there
    Row("patches", "70x70", "pix2pix-70", "--n-layers 3", "photos", ("0.66", "0.23", "0.17"), data="toy"),
    Row("patches", "70x70", "pix2pix", "", "photos", ("0.66", "0.23", "0.17"), data="real"),
    Row("patches", "286x286", "pix2pix-286", "--n-layers 5", "photos", ("0.42", "0.16", "0.11"), data="real"),
    Row("labels", "L1", "pix2pix-labels-l1", "--loss l1", "labels", ("0.86", "0.42", "0.35")),
    Row("labels", "cGAN", "pix2pix-labels-cgan", "--loss cgan", "labels", ("0.74", "0.28", "0.22")),
    Row("labels", "L1+cGAN", "pix2pix-labels", "", "labels", ("0.83", "0.36", "0.29")),
    Row("unpaired", "cycle alone", "cyclegan-cycle", "--terms cycle", "photos labels"),
    Row("unpaired", "GAN alone", "cyclegan-gan", "--terms gan", "photos labels"),
    Row("unpaired", "GAN + forward cycle", "cyclegan-gan+forward", "--terms gan+forward", "photos labels"),
    Row("unpaired", "GAN + backward cycle", "cyclegan-gan+backward", "--terms gan+backward", "photos labels"),
    Row("unpaired", "CycleGAN", "cyclegan", "", "photos labels", ("0.52", "0.17", "0.11", "0.58", "0.22", "0.16")),
    Row("unpaired", "pix2pix, labels to photo", "pix2pix", "", "photos", ("0.71", "0.25", "0.18")),
    Row("unpaired", "pix2pix, photo to labels", "pix2pix-labels", "", "labels", ("", "", "", "0.85", "0.40", "0.32")),
    Row("text", "GAN", "text2img-gan", "--no-cls --no-int", "sentences"),
    Row("text", "GAN-CLS", "text2img-cls", "--no-int", "sentences"),
    Row("text", "GAN-INT", "text2img-int", "--no-cls", "sentences"),
    Row("text", "GAN-INT-CLS", "text2img", "", "sentences"),
    Row("parzen", "GAN", "gan", "", "digits", data="toy"),
    Row("parzen", "GAN, SGD", "gan", "", "digits", ("225 ± 2",), data="real"),
    Row("parzen", "GAN, Adam", "gan-adam", "--optimiser adam", "digits", data="real"),
    Row("parzen", "cGAN", "cgan", "", "digits", data="toy"),
    Row("parzen", "cGAN, SGD", "cgan-sgd", "--optimiser sgd", "digits", ("132 ± 1.8",), data="real"),
    Row("parzen", "cGAN, Adam", "cgan-adam", "--optimiser adam", "digits", data="real"),
    Row("variants", "not saturating", "dcgan", "", "digits"),
    Row("variants", "minimax", "dcgan-minimax", "--loss minimax", "digits"),
    Row("variants", "least squares", "dcgan-lsgan", "--loss lsgan", "digits"),
    # five updates of D for one of G: with five times the 30 epochs, G gets as many updates as above
    Row("variants", "WGAN", "dcgan-wgan", "--loss wgan --epochs 150", "digits", data="toy"),
    Row("variants", "WGAN-GP", "dcgan-wgan-gp", "--loss wgan-gp --epochs 150", "digits", data="toy"),
)


def rows_of(table, data):
    """The rows of a table on a data set."""
    return [row for row in ROWS if row.table == table and ("toy" if data == "toy" else "real") in row.data]


def make(table, data, results, least=1):
    """A table of the rows with results on a data set, as Markdown; nothing if fewer than `least`."""
    (title, columns, source), data = TABLES[table], Path(data).resolve().name
    rows, every = [("real images", REAL.get(table, ()), [])], []
    for row in rows_of(table, data):
        found = [each for each in results if (each.get("case"), each.get("data")) == (row.name, data)]
        rows += [(row.label, row.paper, found)] if found else []
        every += found
    if len(rows) - 1 < least:
        return ""
    source = source if any(paper for _, paper, _ in rows) else ""
    return markdown(f"{title}, {data}", fill(columns.split(), rows), notes(columns.split(), source, every))


class Run(NamedTuple):
    """What is trained and judged: a row on a data set with a seed. `name` is that of its result."""

    name: str
    case: str
    script: str
    flags: list[str]
    data: str
    seed: int
    judges: list[str]


def plan(tables, data_sets, seeds, more):
    """The runs that tables need, each once: all with the first seed, then all with the next."""
    runs = {}
    for seed, data, table in itertools.product(range(seeds), data_sets, tables):
        for row in rows_of(table, data):
            script = "bench/vae.py" if row.name == "vae" else f"{row.name.partition('-')[0]}.py"
            flags = shlex.split(f"{row.flags} {more}")
            if script == "pix2pix.py":  # in real pairs A is the photo, on toy data the labels
                flags = ["--direction", "AtoB" if (data == "toy") == (row.judges == "photos") else "BtoA", *flags]
            judges = [judge for judge in row.judges.split() if can_judge(judge, data)]
            if judges:
                name = f"{row.name}-{Path(data).resolve().name}-{seed}"
                runs[name] = Run(name, row.name, script, flags, data, seed, judges)
    return list(runs.values())


def train(run, folder, args):
    """Train a run in a process of its own, and add up its seconds and its peak memory in FOLDER.json."""
    command = [sys.executable, ROOT / run.script, "--out", folder, "--data", run.data, "--data-root", args.data_root]
    command += [*run.flags, "--seed", run.seed, *(["--device", args.device] if args.device else [])]
    note, before, started = Path(f"{folder}.json"), read_log(folder), time.monotonic()
    used = read_json(note) or {"seconds": 0.0, "peak_memory": 0}
    with open(f"{folder}.txt", "wb") as output:
        child = subprocess.Popen([*map(str, command)], stdout=output, stderr=output)
    try:
        _, status, usage = os.wait4(child.pid, 0)  # it tells of the memory, too
        child.returncode = os.waitstatus_to_exitcode(status)
        if args.circumstances["device"] == "cpu":  # elsewhere the memory that matters is not this
            used["peak_memory"] = max(used["peak_memory"], usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    except KeyboardInterrupt:
        child.terminate()  # the script saves first
        child.wait()
        raise
    finally:
        if read_log(folder)[-1:] != before[-1:]:  # else there was nothing left to train
            used["seconds"] += time.monotonic() - started
            save(note, json.dumps(used))
    if child.returncode:
        lines = Path(f"{folder}.txt").read_text("utf-8", "replace").strip().splitlines()
        sys.exit(lines[-1] if lines else f"{run.script} ended with {child.returncode}")
    return used


def identity(run, args):
    """What a result must agree with, or the run is repeated. `code` is a hash of the script without its comments."""
    tree = ast.dump(ast.parse((ROOT / run.script).read_text("utf-8")))
    code = hashlib.sha256(tree.encode()).hexdigest()[:12]
    return {"script": run.script, "code": code, "flags": run.flags, "samples": args.samples}


def is_done(run, args):
    """Whether the result of a run is there."""
    result = read_json(args.results / f"{run.name}.json") or {}
    return result == result | identity(run, args)


def train_and_judge(run, args):
    """Write the JSON of a run and, of the first seed, its last samples. -> its metrics."""
    known = identity(run, args)
    key = hashlib.sha256(f"{known['code']} {run.flags}".encode()).hexdigest()[:8]
    folder = args.runs / f"{run.name}-{key}"  # other code or other flags have another one
    used, metrics = train(run, folder, args), {}
    for judge in run.judges:
        metrics |= JUDGES[judge](run, folder, args)
    settings, log = read_json(folder / "config.json"), read_log(folder)
    result = {"case": run.case, "data": Path(run.data).resolve().name, "seed": run.seed}
    result |= known | args.circumstances | {"precision": settings["precision"], "settings": settings}
    result |= {"steps": log[-1]["step"], **used, "metrics": metrics, "log": log[:: -(len(log) // 100 + 1)][::-1]}
    result["images_per_s"] = value(result, "images_per_s")
    save(args.results / f"{run.name}.json", json.dumps(result, indent=1) + "\n")
    grids = sorted(path for path in (folder / "samples").glob("*.png") if path.stem.isdigit())
    if grids and not run.seed:
        image = Image.open(grids[-1]).convert("RGB")
        image.thumbnail((480, 480))
        image.quantize(256).save(args.results / f"{run.name}.png", optimize=True)
    return metrics


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("tables", nargs="*", metavar="NAME", help=f"which (all): {', '.join(TABLES)}")
    sets = "toy, mnist, or a folder of pairs photo | labels with class ids (see bench fcn)"
    add("--data", nargs="+", default=["toy"], help=f"{sets}; each table takes those that it can be made on")
    add("--data-root", type=Path, default="data", help="where downloads and trained judges are kept (%(default)s)")
    add("--seeds", type=int, default=3, help="runs of each row, with seeds from 0 up (%(default)s)")
    add("--flags", default="", help='more flags of the scripts, for every run: --flags="--size 128 --epochs 40"')
    add("--samples", type=int, default=10000, help="images that are drawn to be judged (%(default)s)")
    add("--runs", type=Path, default="runs/bench", help="folder for the run folders (%(default)s)")
    add("--results", type=Path, help="folder for the results (RUNS/results); bench/results has the published ones")
    add("--device", help="cpu, cuda, ... (cuda, if there is one)")


def main(args):
    """Train and judge what is missing, and print the tables. A run that fails leaves its cells empty."""
    if unknown := [name for name in args.tables if name not in TABLES]:
        fail(f"there is no table {unknown[0]}: there are {', '.join(TABLES)}")
    args.tables, args.results = args.tables or [*TABLES], args.results or args.runs / "results"
    args.circumstances = circumstances(find_device(args.device))
    runs = plan(args.tables, args.data, args.seeds, args.flags)
    if not runs:
        fail(f"--data {' '.join(args.data)}: no row of {', '.join(args.tables)} can be made of that")
    args.runs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = []
    for number, run in enumerate(runs, 1):
        if is_done(run, args):
            continue
        print(f"{number} of {len(runs)}: {run.name}", flush=True)
        try:
            metrics = train_and_judge(run, args)
            print("   ", ", ".join(f"{name} {metric['value']:.4g}" for name, metric in metrics.items()), flush=True)
        except (Exception, SystemExit) as error:
            failed.append(run.name)
            print(f"    failed: {error}", file=sys.stderr, flush=True)
    results = [read_json(args.results / f"{run.name}.json") for run in runs if is_done(run, args)]
    for table, data in itertools.product(args.tables, args.data):
        print(make(table, data, results))
    if failed:
        fail(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
