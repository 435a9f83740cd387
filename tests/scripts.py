"""The table of scripts that the suite runs over, a row a script, and what its tests share."""

import contextlib
import functools
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, repr=False)
class Row:
    """What the suite must know of a script beyond the contract."""

    name: str
    tiny: str  # flags of the smallest sensible run on toy data
    inputs: dict[str, Callable]  # network: args -> the tensors that it takes
    batch: Callable  # args -> the tensors that step takes
    data: Callable  # writes 8 items that --data can name into a folder
    resume: str  # flags of a run on those, with a batch that does not divide 8 and all that is random
    use: Callable  # folder, run -> flags that use the run, the folder they write to, {file in it: size of the picture}
    changes: tuple[str, ...]  # settings that a run cannot be resumed with
    bad: tuple[str, ...]  # arguments that are refused
    tests: int = 0  # images of the toy test split, each of them in OUT/test
    epochs: int = 3  # that make three passes over the data, in all

    @property
    def file(self):
        return ROOT / f"{self.name}.py"

    @property
    def module(self):
        return importlib.import_module(self.name)

    def args(self, *flags):
        return self.module.get_args([*self.tiny.split(), *map(str, flags)])


def images(*shape):
    """Images in [-1, 1], the same in each call."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def save_images(folder, names, width, height):
    """PNGs of noise, with these names, below a folder."""
    rng = np.random.default_rng(0)
    for name in names:
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file)


def pairs(folder):
    """Eight images of two halves, 40x40 pixels each."""
    save_images(folder, range(8), 80, 40)


def unpaired(folder):
    """Eight images of each of two kinds, 40x40 pixels."""
    save_images(folder, [f"{side}/{i}" for side in ("trainA", "trainB") for i in range(8)], 40, 40)


def pictures(folder):
    """Eight images of 10x10 pixels."""
    save_images(folder, range(8), 10, 10)


def labelled_pictures(folder):
    """Four of them in each of two folders, which are their labels."""
    save_images(folder, [f"{('cats', 'dogs')[i % 2]}/{i}" for i in range(8)], 10, 10)


def captioned(folder):
    """Eight images of 20x20 pixels, four in each of two folders, with two captions each."""
    save_images(folder, [f"{('cats', 'dogs')[i % 2]}/{i}" for i in range(8)], 20, 20)
    for file in folder.rglob("*.png"):
        file.with_suffix(".txt").write_text(f"a picture with number {file.stem}\nnumber {file.stem} again\n")


def photos_to_translate(folder, run):
    """Two images of unlike sizes and kinds, one of them in a folder below, for `--translate`."""
    (folder / "photos" / "more").mkdir(parents=True)
    Image.new("RGB", (40, 24), "teal").save(folder / "photos" / "a.png")
    Image.new("L", (33, 50), 77).save(folder / "photos" / "more" / "b.jpg")
    flags = ["--out", run, "--translate", folder / "photos", "--to", folder / "out", "--device", "cpu"]
    return flags, folder / "out", {"a.png": (40, 24), "more/b.png": (33, 50)}


def samples(name, size, *more):
    """Five images from noise, for `--sample`."""

    def use(folder, run):
        flags = ["--out", run, "--sample", 5, "--to", folder / "out", "--device", "cpu", *more]
        return flags, folder / "out", {name.format(i): (size, size) for i in range(5)}

    return use


ROWS = [
    Row(
        name="pix2pix",
        tiny="--size 32 --load-size 32 --ngf 4 --ndf 4 --n-layers 1 --batch-size 2 --precision fp32 --device cpu",
        inputs={
            "G": lambda args: (images(2, 3, args.size, args.size),),
            "D": lambda args: (images(2, 6, args.size, args.size),),
        },
        batch=lambda args: images(2, args.batch_size, 3, args.size, args.size).unbind(),
        data=pairs,
        resume="--size 32 --load-size 36 --ngf 4 --ndf 4 --n-layers 1 --batch-size 3 --decay-epochs 2 --precision fp32"
        " --device cpu",
        use=photos_to_translate,
        changes=("--seed 1", "--load-size 36", "--ngf 8", "--loss l1", "--lambda-l1 1", "--no-skips", "--no-mirror"),
        bad=("--size 48", "--size 64", "--n-layers 5", "--n-layers -1", "--lambda-l1 nan", "--loss l2", "--from gray"),
        tests=100,
    ),
    Row(
        name="cyclegan",
        tiny="--size 32 --load-size 32 --ngf 4 --ndf 4 --n-layers 1 --blocks 1 --batch-size 2 --pool 3 --precision fp32"
        " --device cpu",
        inputs={name: lambda args: (images(2, 3, args.size, args.size),) for name in ("G", "F", "D_X", "D_Y")},
        batch=lambda args: images(2, args.batch_size, 3, args.size, args.size).unbind(),
        data=unpaired,
        resume="--size 32 --load-size 36 --ngf 4 --ndf 4 --n-layers 1 --blocks 1 --batch-size 3 --pool 3"
        " --decay-epochs 2 --precision fp32 --device cpu",
        use=photos_to_translate,
        changes=("--seed 1", "--blocks 2", "--ngf 8", "--terms cycle", "--lambda-cycle 1", "--pool 0", "--no-mirror"),
        bad=("--size 34", "--size 64", "--n-layers 5", "--blocks 0", "--lambda-cycle 0", "--pool -1", "--terms l1"),
        tests=200,
    ),
    Row(
        name="gan",
        tiny="--size 8 --ngf 16 --ndf 4 --average 0 --batch-size 4 --precision fp32 --device cpu",
        inputs={
            "G": lambda args: (images(2, args.nz),),
            "D": lambda args: (images(2, args.channels, args.size, args.size),),
        },
        batch=lambda args: (images(args.k * args.batch_size, args.channels, args.size, args.size),),
        data=pictures,
        resume="--size 8 --ngf 16 --ndf 4 --batch-size 3 --optimiser sgd --average .9 --precision fp32 --device cpu",
        use=samples("{:05}.png", 8),
        changes=(
            "--seed 1",
            "--size 9",
            "--ngf 8",
            "--nz 50",
            "--k 2",
            "--average 0.5",
            "--saturating",
            "--channels 3",
        ),
        bad=("--net conv", "--net mlp", "--channels 2", "--optimiser rmsprop", "--k 0", "--average 1", "--sample 0"),
    ),
    Row(
        name="dcgan",
        tiny="--size 28 --ngf 4 --ndf 4 --batch-size 4 --precision fp32 --device cpu",
        inputs={
            "G": lambda args: (images(2, args.nz),),
            "D": lambda args: (images(2, args.channels, args.size, args.size),),
        },
        batch=lambda args: (images(args.k * args.batch_size, args.channels, args.size, args.size),),
        data=pictures,
        resume="--size 28 --ngf 4 --ndf 4 --batch-size 3 --precision fp32 --device cpu",
        use=samples("{:05}.png", 28, "--arithmetic", "0,1 - 2 + 3,4", "--turn", "1,2 - 3"),
        changes=("--seed 1", "--size 32", "--ngf 8", "--ndf 8", "--nz 50", "--k 2", "--kernel 4", "--loss lsgan"),
        bad=("--size 48", "--kernel 3", "--loss l1", "--k 0", "--sample 0", "--arithmetic one", "--turn 1,2-"),
    ),
    Row(
        name="cgan",
        tiny="--size 8 --ngf 12 --ndf 24 --batch-size 4 --precision fp32 --device cpu",
        inputs={
            "G": lambda args: (images(2, args.nz), torch.tensor([3, 1])),
            "D": lambda args: (images(2, args.channels, args.size, args.size), torch.tensor([3, 1])),
        },
        batch=lambda args: (images(args.batch_size, args.channels, args.size, args.size), torch.tensor([3, 1, 2, 0])),
        data=labelled_pictures,
        resume="--size 8 --ngf 12 --ndf 24 --batch-size 3 --optimiser sgd --precision fp32 --device cpu",
        use=samples("{:05}-7.png", 8, "--label", "7"),
        changes=("--seed 1", "--size 9", "--ngf 18", "--ndf 48", "--nz 50", "--optimiser sgd", "--channels 3"),
        bad=("--net conv", "--net mlp2", "--cbn", "--channels 2", "--optimiser rmsprop", "--sample 0", "--label 7"),
    ),
    Row(
        name="text2img",
        tiny="--size 16 --load-size 19 --ngf 4 --ndf 4 --nef 8 --nif 8 --text 8 --nt 4 --nz 4 --average 1 --near 1"
        " --batch-size 4 --text-epochs 0 --precision fp32 --device cpu",
        inputs={
            "G": lambda args: (images(2, args.nz), images(2, args.text)),
            "D": lambda args: (images(2, 3 * args.pack, args.size, args.size), images(2, args.text)),
        },
        batch=lambda args: (
            images(args.batch_size, 3 * args.pack, args.size, args.size),
            *images(2, args.batch_size, args.text),
        ),
        data=captioned,
        resume="--size 16 --load-size 19 --ngf 4 --ndf 4 --nef 8 --nif 8 --text 8 --nt 4 --nz 4 --batch-size 3"
        " --text-epochs 1 --style-epochs 1 --text-lr 1e-4 --precision fp32 --device cpu",
        use=samples("{:05}.png", 16, "--prompt", "a red circle"),
        changes=(
            "--seed 1",
            "--size 32",
            "--load-size 20",
            "--text 16",
            "--nz 5",
            "--no-cls",
            "--no-int",
            "--near 2",
            "--pack 3",
        ),
        bad=(
            "--size 48",
            "--load-size 8",
            "--nef 0",
            "--near 0",
            "--pack 0",
            "--text-lr -1",
            "--sample 5",
            "--prompt missing.txt",
        ),
        epochs=1,
    ),
]


def environment(**more):
    """The environment of a child process: one thread, and nothing of this repository within its reach."""
    dropped = "PYTHONPATH", "COLUMNS", "PYTEST_XDIST_WORKER"
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | more


@functools.cache
def once(draw):
    """A function that draws a toy set, for each of its arguments once."""
    return functools.cache(draw)


def run_main(row, *flags):
    """0, or the exit status or sentence, of the script's main in this process; toy sets are drawn once for all."""
    with contextlib.ExitStack() as patches:
        for name in ("streets", "digits", "shapes"):
            if draw := getattr(row.module, name, None):
                patches.enter_context(mock.patch.object(row.module, name, once(draw)))
        try:
            row.module.main([*map(str, flags)])
        except SystemExit as end:
            return end.code or 0
    return 0


def snapshot(folder):
    """{name: bytes} of all files below a folder but locks, and {name: None} of the folders."""
    found = [path for path in sorted(folder.rglob("*")) if "lock" not in path.name]
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in found}


def read_log(run):
    """The rows of log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def read_checkpoint(run):
    """The dict in last.pt."""
    return torch.load(run / "last.pt", weights_only=True)


def assert_refused(said, *names):
    """`said`, what run_main gave back, is one sentence, which holds one of `names`."""
    assert isinstance(said, str) and len(said.splitlines()) == 1, said
    assert not names or any(name in said for name in names), said
