"""What judges the runs of the tables: each function takes a run and gives the metrics of what it learned.

A metric is {"value", "real": what real images get if that can be told, "n_samples", "n_real", "features"}.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torchvision import datasets

from bench import digits, fcn, fid, linear, parzen, shapes
from bench.common import read_digits
from bench.figures_dcgan import average, load, pooled
from bench.speed import ROOT


def environment(args):
    """That of a child process, which has --threads."""
    return os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONUNBUFFERED": "1"}


def arguments(module, *given):
    """The options of a measure."""
    parser = argparse.ArgumentParser()
    module.options(parser)
    return parser.parse_args([*map(str, given)])


def scores(folder, run, args, prefix, *more):
    """The FCN-scores of a folder of photos, or of labels, beside those of the real ones."""
    given = ["--samples", folder, "--data", run.data, "--data-root", args.data_root, "--cache", args.cache, *more]
    row = fcn.measure(arguments(fcn, *given))
    counts = {"n_samples": row["n_samples"], "n_real": row["n_real"], "features": row["features"]}
    names = {"pixel": "pixel_accuracy", "class": "class_accuracy", "iou": "class_iou"}
    return {
        f"{prefix}_{name}": {"value": row[long], "real": row.get(f"real_{long}"), **counts}
        for name, long in names.items()
    }


def translated(run, args, what):
    """The folder of a run's translations of the test split into photos or labels; CycleGAN's has both."""
    folder = args.runs / run.name / "test"
    if run.script == "pix2pix.py":
        return folder
    return folder / ("AtoB" if (run.data == "toy") == (what == "photos") else "BtoA")


def judge_photos(run, args):
    """What a segmentation network sees in the photos (Isola et al. 2017, Sec. 4.1)."""
    return scores(translated(run, args, "photos"), run, args, "photo")


def judge_labels(run, args):
    """The same scores of labels, by nearest colour."""
    return scores(translated(run, args, "labels"), run, args, "labels", "--labels")


def judge_sentences(run, args):
    """How often an image shows what a sentence of an unseen combination says."""
    row = shapes.measure(arguments(shapes, "--run", args.runs / run.name, "--cache", args.cache, "--seed", run.seed))
    counts = {"n_samples": row["n_samples"], "n_real": row["n_samples"], "features": "classifier of shapes"}
    found = {name: {"value": row[name], **counts} for name in ("right", *shapes.PARTS)}
    found["right"]["real"] = row["classifier_accuracy"]
    return found


def judge_digits(run, args):
    """Log-likelihood, which digits are drawn, and how far features of samples are from those of real digits."""
    with tempfile.TemporaryDirectory(dir=args.runs) as place:
        given = ["--run", args.runs / run.name, "--to", Path(place, "drawn"), "--sample", args.count]
        given += ["--seed", run.seed] + (["--device", args.device] if args.device else [])
        command = [sys.executable, ROOT / run.script, *given]
        child = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment(args))
        if child.returncode:
            sys.exit((child.stderr.strip().splitlines() or [f"{run.script} ended with {child.returncode}"])[-1])
        common = ["--samples", Path(place, "drawn"), "--data", run.data, "--data-root", args.data_root]
        window = parzen.measure(arguments(parzen, *common))
        common += ["--cache", args.cache]
        seen = digits.measure(arguments(digits, *common))
        far = fid.measure(arguments(fid, *common, "--features", "scorer"))
    counts = {"n_samples": window["n_samples"], "n_real": window["n_test"], "features": "pixels"}
    found = {"log_likelihood": {"value": window["log_likelihood"], **counts}}
    found["log_likelihood"] |= {"real": window["log_likelihood_of_training_images"], "sigma": window["sigma"]}
    counts |= {"n_real": far["n_real"], "features": f"{far['features']} {far['weights']}"}
    found |= {name: {"value": far[name], **counts} for name in ("kid", "fid", "precision", "recall")}
    found |= {"missing": {"value": len(seen["missing"]), **counts}, "uneven": {"value": seen["uneven"], **counts}}
    if run.script == "cgan.py":
        found["as_asked"] = {"value": seen["as_asked"], "real": seen["classifier_accuracy"], **counts}
    return found


def judge_probe(run, args):
    """Accuracy of linear SVMs on features of D, of a D with random weights, and on pixels (Radford et al., Sec. 5).

    `few` learn from ten images of each class. On toy digits all others are right nearly always, and left out.
    """
    _, _, D, random = load(args.runs / run.name, run.seed)
    images, labels = labelled(run.data, args)
    x = {split: some / 127.5 - 1 for split, some in images.items()}
    nets, found = {"trained": D, "random": average(random, x["train"])}, {}
    chosen = {"few_": linear.subsets(labels["train"], 10, 5)}
    chosen |= {} if run.data == "toy" else {"": [torch.arange(len(labels["train"]))]}
    for name in ("trained", "random", "pixels"):
        features = {split: pooled(nets[name], some) if name in nets else some.flatten(1) for split, some in x.items()}
        for some, subsets in chosen.items():
            accuracy, _, cost = linear.probe(features, labels, subsets)
            counts = {"n_samples": len(labels["test"]), "n_real": len(subsets[0]), "features": "linear SVM"}
            found[f"{some}accuracy_{name}"] = {"value": accuracy, "cost": cost, **counts}
    return found


def labelled(data, args):
    """Images uint8 (N, C, S, S) and labels (N,) of the splits train, valid and test; of CIFAR-10 a fifth is "valid"."""
    splits = ("train", "valid", "test")
    if data != "cifar10":
        given = argparse.Namespace(data=data, data_root=args.data_root)
        images, labels = zip(*(read_digits(given, split) for split in splits))
        return dict(zip(splits, images)), dict(zip(splits, labels))
    try:
        whole = [datasets.CIFAR10(args.data_root, train, download=True) for train in (True, False)]
    except Exception as error:
        sys.exit(
            f"bench: CIFAR-10 cannot be had: put it below --data-root {args.data_root} as torchvision has it ({error})"
        )
    images = [torch.from_numpy(part.data).movedim(3, 1) for part in whole]
    labels = [torch.tensor(part.targets) for part in whole]
    cut = dict(zip(splits, ((0, slice(40000)), (0, slice(40000, None)), (1, slice(None)))))
    return tuple({split: part[i][some] for split, (i, some) in cut.items()} for part in (images, labels))


JUDGES = {  # by their names in cases.py: the judge, and the modules that its numbers rest on
    "photos": (judge_photos, (fcn,)),
    "labels": (judge_labels, (fcn,)),
    "sentences": (judge_sentences, (shapes,)),
    "digits": (judge_digits, (parzen, digits, fid)),
    "probe": (judge_probe, (linear,)),
}
