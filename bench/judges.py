"""What judges a run: each function takes a run, its folder and the options of `bench tables`, and gives its metrics.

A metric is {"value", "real": what real images get, if that can be told, "error": its standard error, if it is known,
"n_samples", "n_real", "features": name and hash of what saw the images}.
"""

import argparse
import functools
import tempfile
from pathlib import Path

from bench import digits, fcn, fid, parzen, shapes
from bench.common import find_device, read_digits, run_script


def can_judge(judge, data):
    """Whether a judge knows a data set; that of photos and that of labels need class ids."""
    if judge in ("photos", "labels"):
        return data == "toy" or Path(data).is_dir()
    return data == "toy" or (judge, data) == ("digits", "mnist")


def measure(module, *flags):
    """The row that a command gives."""
    parser = argparse.ArgumentParser()
    module.options(parser)
    return module.main(parser.parse_args([*map(str, flags)]))


def metric(value, row, **more):
    """A metric, with what the row of a measure says of its counts and features."""
    counts = {"n_samples": row["n_samples"], "n_real": row.get("n_real", row.get("n_test", row["n_samples"]))}
    features = f"{row.get('features', 'pixels')} {row.get('weights', '')}".strip()
    return {"value": value, **counts, "features": features} | more


def judge_translations(run, folder, args, of):
    """What a segmentation network sees in photos (Isola et al. 2017, Sec. 4.1), or the nearest colour in label maps."""
    images = folder / "test"
    if run.script == "cyclegan.py":  # on toy data A is the labels, in real pairs it is the photo
        images /= "AtoB" if (run.data == "toy") == (of == "photo") else "BtoA"
    flags = ["--samples", images, "--data", run.data, "--data-root", args.data_root]
    row = measure(fcn, *flags, *(["--labels"] if of == "labels" else []))
    names = {"pixel": "pixel_accuracy", "class": "class_accuracy", "iou": "class_iou"}
    return {f"{of}_{short}": metric(row[name], row, real=row[f"real_{name}"]) for short, name in names.items()}


def judge_sentences(run, folder, args):
    """How often an image shows what a sentence of an unseen combination says."""
    row = {"features": "classifier of shapes"}
    row |= measure(shapes, "--run", folder, "--seed", run.seed)
    found = {name: metric(row[name], row) for name in ("right", *shapes.PARTS)}
    found["right"]["real"] = row["classifier_accuracy"]
    for name in ("position_spread", "ground_spread", "style_position", "style_ground"):
        found[name] = metric(row[name], row, features="pixels")
    return found


def judge_digits(run, folder, args):
    """Log-likelihood, which digits are drawn, and how far features of samples are from those of real digits."""
    device = ["--device", args.device] if args.device else []
    with tempfile.TemporaryDirectory(dir=args.runs) as to:
        run_script(run.script, folder, "--sample", args.samples, "--seed", run.seed, "--to", to, *device)
        places = ["--samples", to, "--data", run.data, "--data-root", args.data_root]
        window, seen = measure(parzen, *places), measure(digits, *places)
        real = read_digits(run.data, args.data_root, "train")[0].expand(-1, 3, -1, -1)
        given = {"features": run.data, "data_root": args.data_root, "device": find_device(args.device)}
        samples = [fid.Images("--samples", Path(to))]
        (row,) = fid.measure(samples, real, samples[0].size, argparse.Namespace(**given))
    found = {"log_likelihood": metric(window["log_likelihood"], window, error=window["standard_error"])}
    found["log_likelihood"]["real"] = window["log_likelihood_of_training_images"]
    found |= {name: metric(row[name], row) for name in ("kid", "fid", "precision", "recall")}
    found["kid"]["error"] = row["kid_std"]
    found |= {"missing": metric(len(seen["missing"]), row), "uneven": metric(seen["uneven"], row)}
    if run.script == "cgan.py":
        found["as_asked"] = metric(seen["as_asked"], row, real=seen["classifier_accuracy"])
    return found


JUDGES = {
    "photos": functools.partial(judge_translations, of="photo"),
    "labels": functools.partial(judge_translations, of="labels"),
    "sentences": judge_sentences,
    "digits": judge_digits,
}
