"""What the papers' tables are made of: the one place that says what is trained, how it is judged, and what they found.

A table is rows of cases; a case is a script with flags and what judges it. A run is a case, a data set and a seed.
Numbers are the papers', as printed there; what stands empty they do not have.
"""

from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """Flags of the script that the case's name begins with, and what judges a run of it."""

    flags: str
    judges: tuple[str, ...]
    on: str = "any"  # or only "toy" or "real" data


class Table(NamedTuple):
    """Rows of label, case and the paper's numbers for the `columns`; `real` are the paper's for real images."""

    title: str
    source: str
    columns: tuple[str, ...]
    real: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[str, ...]], ...]
    headings: dict[str, str] = {}  # of columns, where those of COLUMNS would not do


WORDS = {  # in flags: A is a map on the toy set and a photo in the paper's; the patches of a default D
    "toy": {
        "photos": "",
        "labels": "--direction BtoA",
        "small": "",
        "patch34": "",
        "patch70": "--n-layers 3",
        "adam": "",
    },
    "real": {
        "photos": "--direction BtoA",
        "labels": "--direction AtoB",
        "small": "--size 128",  # as Zhu et al. did with Cityscapes
        "patch34": "--n-layers 2",
        "patch70": "",
        "adam": "--optimiser adam",
    },
}
JUDGED = {  # and the data that each can judge; "pairs" is Cityscapes or a folder of pairs with class ids
    "photos": ("toy", "pairs"),
    "labels": ("toy", "pairs"),
    "sentences": ("toy",),
    "digits": ("toy", "mnist"),
    "probe": ("toy", "mnist", "cifar10"),
}
PHOTOS, LABELS, DIGITS = ("photos",), ("labels",), ("digits",)
CASES = {
    "pix2pix": Case("{photos}", PHOTOS),
    "pix2pix-l1": Case("{photos} --loss l1", PHOTOS),
    "pix2pix-gan": Case("{photos} --loss gan", PHOTOS),
    "pix2pix-cgan": Case("{photos} --loss cgan", PHOTOS),
    "pix2pix-l1+gan": Case("{photos} --loss l1+gan", PHOTOS),
    "pix2pix-noskips": Case("{photos} --no-skips", PHOTOS),
    "pix2pix-noskips-l1": Case("{photos} --no-skips --loss l1", PHOTOS),
    "pix2pix-1": Case("{photos} --n-layers 0", PHOTOS),
    "pix2pix-16": Case("{photos} --n-layers 1", PHOTOS),
    "pix2pix-34": Case("{photos} {patch34}", PHOTOS),
    "pix2pix-70": Case("{photos} {patch70}", PHOTOS),
    "pix2pix-286": Case("{photos} --n-layers 5", PHOTOS, "real"),  # more than a toy image
    "pix2pix-labels": Case("{labels}", LABELS),
    "pix2pix-labels-l1": Case("{labels} --loss l1", LABELS),
    "pix2pix-labels-cgan": Case("{labels} --loss cgan", LABELS),
    "pix2pix-small": Case("{photos} {small}", PHOTOS),
    "pix2pix-small-labels": Case("{labels} {small}", LABELS),
    "cyclegan": Case("{small}", PHOTOS + LABELS),
    "cyclegan-cycle": Case("{small} --terms cycle", PHOTOS + LABELS),
    "cyclegan-gan": Case("{small} --terms gan", PHOTOS + LABELS),
    "cyclegan-gan+forward": Case("{small} --terms gan+forward", PHOTOS + LABELS),
    "cyclegan-gan+backward": Case("{small} --terms gan+backward", PHOTOS + LABELS),
    "text2img": Case("", ("sentences",)),
    "text2img-gan": Case("--no-cls --no-int", ("sentences",)),
    "text2img-cls": Case("--no-int", ("sentences",)),
    "text2img-int": Case("--no-cls", ("sentences",)),
    "gan": Case("", DIGITS),
    "gan-adam": Case("{adam}", DIGITS, "real"),  # on toy digits it is the default
    "cgan": Case("", DIGITS),
    "cgan-adam": Case("{adam}", DIGITS, "real"),
    "dcgan": Case("", ("digits", "probe")),
    "dcgan-minimax": Case("--loss minimax", DIGITS),
    "dcgan-lsgan": Case("--loss lsgan", DIGITS),
    "dcgan-wgan": Case("--loss wgan", DIGITS),
    "dcgan-wgan-gp": Case("--loss wgan-gp", DIGITS),
}
COLUMNS = {  # of results: heading, format
    "photo_pixel": ("pixel accuracy", ".2f"),
    "photo_class": ("class accuracy", ".2f"),
    "photo_iou": ("class IoU", ".2f"),
    "labels_pixel": ("pixel accuracy", ".2f"),
    "labels_class": ("class accuracy", ".2f"),
    "labels_iou": ("class IoU", ".2f"),
    "right": ("all right", ".2f"),
    "form": ("form", ".2f"),
    "ink": ("ink", ".2f"),
    "size": ("size", ".2f"),
    "ground": ("ground", ".2f"),
    "kid": ("KID", ".3g"),
    "fid": ("FID", ".3g"),
    "precision": ("precision", ".2f"),
    "recall": ("recall", ".2f"),
    "log_likelihood": ("log-likelihood", ".0f"),
    "missing": ("digits missing", ".1f"),
    "uneven": ("uneven", ".2f"),
    "as_asked": ("as asked", ".2f"),
    "accuracy_trained": ("on features of D", ".3f"),
    "accuracy_random": ("of a random D", ".3f"),
    "accuracy_pixels": ("on pixels", ".3f"),
    "few_accuracy_trained": ("of D, few labels", ".3f"),
    "few_accuracy_random": ("random D, few", ".3f"),
    "few_accuracy_pixels": ("pixels, few", ".3f"),
    "images_per_s": ("images/s", ".0f"),
    "minutes": ("minutes", ".1f"),
    "peak_mib": ("MiB", ".0f"),
}
TABLES = {
    "methods": Table(
        "every method",
        "",
        ("photo_iou", "labels_iou", "right", "kid", "missing", "log_likelihood", "images_per_s", "minutes", "peak_mib"),
        (),
        (
            ("CycleGAN, no pairs", "cyclegan", ()),
            ("pix2pix", "pix2pix", ()),
            ("text2img, GAN-INT-CLS", "text2img", ()),
            ("DCGAN", "dcgan", ()),
            ("cGAN", "cgan", ()),
            ("GAN", "gan", ()),
        ),
        {"photo_iou": "IoU, photos", "labels_iou": "IoU, maps", "right": "as told"},
    ),
    "losses": Table(
        "pix2pix, losses: FCN-score of labels to photo",
        "Isola et al. 2017, Table 1, Cityscapes",
        ("photo_pixel", "photo_class", "photo_iou"),
        ("0.80", "0.26", "0.21"),
        (
            ("L1", "pix2pix-l1", ("0.42", "0.15", "0.11")),
            ("GAN", "pix2pix-gan", ("0.22", "0.05", "0.01")),
            ("cGAN", "pix2pix-cgan", ("0.57", "0.22", "0.16")),
            ("L1+GAN", "pix2pix-l1+gan", ("0.64", "0.20", "0.15")),
            ("L1+cGAN", "pix2pix", ("0.66", "0.23", "0.17")),
        ),
    ),
    "generators": Table(
        "pix2pix, generators: FCN-score of labels to photo",
        "Isola et al., arXiv v3, Table 2, Cityscapes",
        ("photo_pixel", "photo_class", "photo_iou"),
        ("0.80", "0.26", "0.21"),
        (
            ("encoder-decoder, L1", "pix2pix-noskips-l1", ("0.35", "", "0.08")),
            ("encoder-decoder, L1+cGAN", "pix2pix-noskips", ("0.29", "", "0.05")),
            ("U-Net, L1", "pix2pix-l1", ("0.48", "", "0.13")),
            ("U-Net, L1+cGAN", "pix2pix", ("0.55", "", "0.14")),
        ),
    ),
    "patches": Table(
        "pix2pix, what D sees at once: FCN-score of labels to photo",
        "Isola et al. 2017, Table 2, Cityscapes",
        ("photo_pixel", "photo_class", "photo_iou"),
        ("0.80", "0.26", "0.21"),
        (
            ("1x1", "pix2pix-1", ("0.39", "0.15", "0.10")),
            ("16x16", "pix2pix-16", ("0.65", "0.21", "0.17")),
            ("34x34", "pix2pix-34", ()),
            ("70x70", "pix2pix-70", ("0.66", "0.23", "0.17")),
            ("286x286", "pix2pix-286", ("0.42", "0.16", "0.11")),
        ),
    ),
    "labels": Table(
        "pix2pix, losses: photo to labels",
        "Isola et al. 2017, Table 5, Cityscapes",
        ("labels_pixel", "labels_class", "labels_iou"),
        (),
        (
            ("L1", "pix2pix-labels-l1", ("0.86", "0.42", "0.35")),
            ("cGAN", "pix2pix-labels-cgan", ("0.74", "0.28", "0.22")),
            ("L1+cGAN", "pix2pix-labels", ("0.83", "0.36", "0.29")),
        ),
    ),
    "unpaired": Table(
        "CycleGAN, without pairs: FCN-score of labels to photo",
        "Zhu et al. 2017, Table 2, Cityscapes at 128 pixels",
        ("photo_pixel", "photo_class", "photo_iou"),
        (),
        (
            ("cycle alone", "cyclegan-cycle", ()),
            ("GAN alone", "cyclegan-gan", ()),
            ("GAN + forward cycle", "cyclegan-gan+forward", ()),
            ("GAN + backward cycle", "cyclegan-gan+backward", ()),
            ("CycleGAN", "cyclegan", ("0.52", "0.17", "0.11")),
            ("pix2pix, with pairs", "pix2pix-small", ("0.71", "0.25", "0.18")),
        ),
    ),
    "unpaired-labels": Table(
        "CycleGAN, without pairs: photo to labels",
        "Zhu et al. 2017, Table 3, Cityscapes at 128 pixels",
        ("labels_pixel", "labels_class", "labels_iou"),
        (),
        (
            ("cycle alone", "cyclegan-cycle", ()),
            ("GAN alone", "cyclegan-gan", ()),
            ("GAN + forward cycle", "cyclegan-gan+forward", ()),
            ("GAN + backward cycle", "cyclegan-gan+backward", ()),
            ("CycleGAN", "cyclegan", ("0.58", "0.22", "0.16")),
            ("pix2pix, with pairs", "pix2pix-small-labels", ("0.85", "0.40", "0.32")),
        ),
    ),
    "text": Table(
        "text2img: images that show what a sentence of an unseen combination says",
        "",
        ("right", "form", "ink", "size", "ground"),
        (),
        (
            ("GAN", "text2img-gan", ()),
            ("GAN-CLS", "text2img-cls", ()),
            ("GAN-INT", "text2img-int", ()),
            ("GAN-INT-CLS", "text2img", ()),
        ),
    ),
    "parzen": Table(
        "GAN and cGAN: log-likelihood of test digits under a Parzen window, in nats",
        "Goodfellow et al. 2014, Table 1; Mirza, Osindero 2014, Table 1, MNIST",
        ("log_likelihood", "missing", "as_asked"),
        (),
        (
            ("GAN", "gan", ("225 ± 2",)),
            ("GAN, Adam", "gan-adam", ()),
            ("cGAN", "cgan", ("132 ± 1.8",)),
            ("cGAN, Adam", "cgan-adam", ()),
        ),
    ),
    "probe": Table(
        "DCGAN, what D has learned: accuracy of a linear SVM",
        "Radford et al. 2016, Table 1, CIFAR-10 by features learned from ImageNet",
        (
            "accuracy_trained",
            "accuracy_random",
            "accuracy_pixels",
            "few_accuracy_trained",
            "few_accuracy_random",
            "few_accuracy_pixels",
        ),
        (),
        (("DCGAN + L2-SVM", "dcgan", ("0.828",)),),
    ),
    "variants": Table(
        "DCGAN, losses",
        "",
        ("kid", "fid", "precision", "recall", "missing", "uneven"),
        (),
        (
            ("not saturating", "dcgan", ()),
            ("minimax", "dcgan-minimax", ()),
            ("least squares", "dcgan-lsgan", ()),
            ("WGAN", "dcgan-wgan", ()),
            ("WGAN-GP", "dcgan-wgan-gp", ()),
        ),
    ),
}


class Run(NamedTuple):
    """One training: a case on a data set with a seed."""

    case: str
    data: str
    seed: int

    @property
    def set(self):
        """The name of its data."""
        return Path(self.data).resolve().name

    @property
    def name(self):
        """That of its folder and files."""
        return f"{self.case}-{self.set}-{self.seed}"

    @property
    def script(self):
        return f"{self.case.partition('-')[0]}.py"


def kind(data):
    """What JUDGED calls a data set."""
    named = data in ("toy", "mnist", "cifar10")
    return "pairs" if not named and (data == "cityscapes" or Path(data).is_dir()) else data


def judges_of(case, data):
    """Those of a case that can judge what it learns from a data set."""
    on = "toy" if data == "toy" else "real"
    return [judge for judge in CASES[case].judges if kind(data) in JUDGED[judge] and CASES[case].on in ("any", on)]


def kinds_of(name):
    """The kinds of data that a table can be made from."""
    found = {judge for _, case, _ in TABLES[name].rows for judge in CASES[case].judges}
    return {kind for judge in found for kind in JUDGED[judge]}


def flags(case, data):
    """The script's flags, but for those that every case has."""
    return CASES[case].flags.format_map(WORDS["toy" if data == "toy" else "real"]).split()


def same(case, data):
    """The first case that is the same on a data set, so that it is trained once."""
    script = case.partition("-")[0]
    others = (other for other in CASES if other.partition("-")[0] == script and judges_of(other, data))
    return next((other for other in others if flags(other, data) == flags(case, data)), case)


def planned(names, datas, seeds):
    """The runs that tables need, each once: all cases with the first seed, then all with the next."""
    cases = [(same(case, data), data) for name in names for _, case, _ in TABLES[name].rows for data in datas]
    return [Run(*case, seed) for seed in range(seeds) for case in dict.fromkeys(cases) if judges_of(*case)]
