"""The table of scripts that the suite runs over, a row a script, and what its tests share."""

import contextlib
import functools
import importlib
import json
import os
import signal
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
    parts: tuple[str, ...]  # what build's dict and a checkpoint hold, at least
    inputs: dict[str, Callable]  # network: args -> the tensors that it takes
    batch: Callable  # args -> the tensors that step takes
    tests: int  # images of the toy test split, each of them in RUN/test
    data: Callable  # writes 8 items that --data can name into a folder
    resume: str  # flags of a run on those, with a batch that does not divide 8 and all that is random
    use: Callable  # folder, run -> flags that use the run, the folder they write to, {file in it: size of the picture}
    changes: tuple[str, ...]  # settings that a run cannot go on with
    bad: tuple[str, ...]  # arguments that are refused
    steady: bool  # whether the rate stays what it is
    method_lines: int
    file_lines: int
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


def pairs(folder):
    """Eight images of two halves, 40x40 pixels each."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 80, 3), np.uint8)).save(folder / f"{i}.png")


def unpaired(folder):
    """Eight images of each of two kinds, 40x40 pixels."""
    rng = np.random.default_rng(0)
    for side in ("trainA", "trainB"):
        (folder / side).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / side / f"{i}.png")


def photos_to_translate(folder, run):
    """Two images of unlike sizes and kinds, one of them in a folder below, for `--translate`."""
    (folder / "photos" / "more").mkdir(parents=True)
    Image.new("RGB", (40, 24), "teal").save(folder / "photos" / "a.png")
    Image.new("L", (33, 50), 77).save(folder / "photos" / "more" / "b.jpg")
    flags = ["--run", run, "--translate", folder / "photos", "--to", folder / "out", "--device", "cpu"]
    return flags, folder / "out", {"a.png": (40, 24), "more/b.png": (33, 50)}


def pictures(folder):
    """Eight images of 10x10 pixels."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (10, 10, 3), np.uint8)).save(folder / f"{i}.png")


def labelled_pictures(folder):
    """Four of them in each of two folders, which are their labels."""
    pictures(folder / "all")
    for name in ("cats", "dogs"):
        (folder / name).mkdir()
    for i, file in enumerate(sorted((folder / "all").iterdir())):
        file.rename(folder / ("cats", "dogs")[i % 2] / file.name)
    (folder / "all").rmdir()


def captioned(folder):
    """Eight images of 20x20 pixels, four in each of two folders, with two captions each."""
    rng = np.random.default_rng(0)
    for i in range(8):
        file = folder / ("cats", "dogs")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(file)
        file.with_suffix(".txt").write_text(f"a picture with number {i}\nnumber {i} again\n")


def samples(name, size, *more):
    """Five images from noise, for `--sample`."""

    def use(folder, run):
        flags = ["--run", run, "--sample", 5, "--to", folder / "out", "--device", "cpu", *more]
        return flags, folder / "out", {name.format(i): (size, size) for i in range(5)}

    return use


ROWS = [
    Row(
        name="pix2pix",
        tiny="--size 32 --load-size 32 --ngf 4 --ndf 4 --n-layers 1 --batch-size 2 --precision fp32 --device cpu",
        parts=("G", "D", "opt_G", "opt_D"),
        inputs={
            "G": lambda args: (images(2, args.in_channels, args.size, args.size),),
            "D": lambda args: (images(2, args.in_channels + args.out_channels, args.size, args.size),),
        },
        batch=lambda args: images(2, args.batch_size, 3, args.size, args.size).unbind(),
        tests=100,
        data=pairs,
        resume="--size 32 --load-size 36 --ngf 4 --ndf 4 --n-layers 1 --batch-size 3 --decay-epochs 2 --precision fp32"
        " --device cpu",
        use=photos_to_translate,
        changes=(
            "--lr 0.001",
            "--batch-size 3",
            "--seed 1",
            "--epochs 13",
            "--decay-epochs 2",
            "--load-size 36",
            "--precision bf16",
            "--ngf 8",
            "--ndf 8",
            "--n-layers 2",
            "--norm instance",
            "--loss l1",
            "--lambda-l1 1",
            "--no-skips",
            "--no-mirror",
            "--direction BtoA",
        ),
        bad=(
            "--size 48",
            "--size 64",  # above --load-size
            "--load-size 16",
            "--n-layers 5",
            "--n-layers -1",
            "--ngf 0",
            "--lambda-l1 nan",
            "--decay-epochs -1",
            "--loss l2",
            "--norm group",
            "--in-channels 5",
            "--in-channels 1",  # toy has three
            "--from gray",
            "--direction AtoC",
        ),
        steady=False,
        method_lines=144,
        file_lines=500,
    ),
    Row(
        name="cyclegan",
        tiny="--size 32 --load-size 32 --ngf 4 --ndf 4 --n-layers 1 --blocks 1 --batch-size 2 --pool 3 --precision fp32"
        " --device cpu",
        parts=("G", "F", "D_X", "D_Y", "pool_X", "pool_Y", "opt_G", "opt_D"),
        inputs={name: lambda args: (images(2, 3, args.size, args.size),) for name in ("G", "F", "D_X", "D_Y")},
        batch=lambda args: images(2, args.batch_size, 3, args.size, args.size).unbind(),
        tests=200,
        data=unpaired,
        resume="--size 32 --load-size 36 --ngf 4 --ndf 4 --n-layers 1 --blocks 1 --batch-size 3 --pool 3"
        " --decay-epochs 2 --precision fp32 --device cpu",
        use=photos_to_translate,
        changes=(
            "--lr 0.001",
            "--batch-size 3",
            "--seed 1",
            "--epochs 13",
            "--decay-epochs 2",
            "--load-size 36",
            "--precision bf16",
            "--net unet",
            "--blocks 2",
            "--ngf 8",
            "--ndf 8",
            "--n-layers 2",
            "--loss log",
            "--terms cycle",
            "--lambda-x 1",
            "--lambda-y 1",
            "--lambda-identity 0",
            "--pool 0",
            "--no-mirror",
        ),
        bad=(
            "--size 34",
            "--size 64",  # above --load-size
            "--load-size 16",
            "--size 28 --net unet",
            "--n-layers 5",
            "--n-layers -1",
            "--ngf 0",
            "--blocks 0",
            "--lambda-x nan",
            "--lambda-identity -1",
            "--pool -1",
            "--decay-epochs -1",
            "--loss l2",
            "--terms identity",
            "--net vgg",
            "--direction AtoC",
        ),
        steady=False,
        method_lines=220,
        file_lines=550,
    ),
    Row(
        name="gan",
        tiny="--size 8 --ngf 16 --ndf 4 --batch-size 4 --precision fp32 --device cpu",
        parts=("G", "D", "G_mean", "opt_G", "opt_D"),
        inputs={
            "G": lambda args: (images(2, args.nz),),
            "D": lambda args: (images(2, args.channels, args.size, args.size),),
        },
        batch=lambda args: (images(args.k * args.batch_size, args.channels, args.size, args.size),),
        tests=0,
        data=pictures,
        resume="--size 8 --ngf 16 --ndf 4 --batch-size 3 --optimiser sgd --average .9 --precision fp32 --device cpu",
        use=samples("{:05}.png", 8),
        changes=(
            "--lr 0.01",
            "--batch-size 3",
            "--seed 1",
            "--epochs 7",
            "--precision bf16",
            "--size 9",
            "--ngf 8",
            "--ndf 8",
            "--nz 50",
            "--k 2",
            "--average 0.5",
            "--saturating",
            "--optimiser sgd",
            "--channels 3",
        ),
        bad=(
            "--net conv",  # not at this size
            "--net mlp",
            "--channels 2",
            "--optimiser rmsprop",
            "--ngf 0",
            "--ndf 0",
            "--nz 0",
            "--k 0",
            "--average 1",
            "--average -0.1",
            "--sample 0",
            "--sample many",
        ),
        steady=False,
        method_lines=180,
        file_lines=450,
    ),
    Row(
        name="dcgan",
        tiny="--size 28 --ngf 4 --ndf 4 --batch-size 4 --precision fp32 --device cpu",
        parts=("G", "D", "opt_G", "opt_D"),
        inputs={
            "G": lambda args: (images(2, args.nz),),
            "D": lambda args: (images(2, args.channels, args.size, args.size),),
        },
        batch=lambda args: (images(args.k * args.batch_size, args.channels, args.size, args.size),),
        tests=0,
        data=pictures,
        resume="--size 28 --ngf 4 --ndf 4 --batch-size 3 --precision fp32 --device cpu",
        use=samples("{:05}.png", 28, "--arithmetic", "0,1 - 2 + 3,4", "--turn", "1,2 - 3"),
        changes=(
            "--lr 0.01",
            "--batch-size 3",
            "--seed 1",
            "--epochs 7",
            "--precision bf16",
            "--size 32",
            "--ngf 8",
            "--ndf 8",
            "--nz 50",
            "--k 2",
            "--kernel 4",
            "--loss lsgan",
            "--channels 3",
        ),
        bad=(
            "--size 48",
            "--kernel 3",
            "--channels 2",
            "--loss l1",
            "--ngf 0",
            "--ndf 0",
            "--nz 0",
            "--k 0",
            "--sample 0",
            "--sample many",
            "--arithmetic one",
            "--turn 1,2-",
        ),
        steady=True,
        method_lines=150,
        file_lines=450,
    ),
    Row(
        name="cgan",
        tiny="--size 8 --ngf 12 --ndf 24 --batch-size 4 --precision fp32 --device cpu",
        parts=("G", "D", "opt_G", "opt_D"),
        inputs={
            "G": lambda args: (images(2, args.nz), torch.tensor([3, 1])),
            "D": lambda args: (images(2, args.channels, args.size, args.size), torch.tensor([3, 1])),
        },
        batch=lambda args: (images(args.batch_size, args.channels, args.size, args.size), torch.tensor([3, 1, 2, 0])),
        tests=0,
        data=labelled_pictures,
        resume="--size 8 --ngf 12 --ndf 24 --batch-size 3 --optimiser sgd --precision fp32 --device cpu",
        use=samples("{:05}-7.png", 8, "--label", "7"),
        changes=(
            "--lr 0.01",
            "--batch-size 3",
            "--seed 1",
            "--epochs 7",
            "--precision bf16",
            "--size 9",
            "--ngf 18",
            "--ndf 48",
            "--nz 50",
            "--optimiser sgd",
            "--channels 3",
        ),
        bad=(
            "--net conv",  # not at this size
            "--net mlp2",
            "--cbn",  # not without --net conv
            "--channels 2",
            "--optimiser rmsprop",
            "--ngf 0",
            "--ndf 0",
            "--nz 0",
            "--sample 0",
            "--sample many",
        ),
        steady=False,
        method_lines=210,
        file_lines=450,
    ),
    Row(
        name="text2img",
        tiny="--size 16 --load-size 19 --ngf 4 --ndf 4 --nef 8 --nif 8 --text 8 --nt 4 --nz 4 --average 1 --wrong 1"
        " --near 1 --batch-size 4 --text-epochs 0 --precision fp32 --device cpu",
        parts=("E", "V", "G", "D", "S", "opt_E", "opt_G", "opt_D", "opt_S"),
        inputs={
            "G": lambda args: (images(2, args.nz), images(2, args.text)),
            "D": lambda args: (images(2, 3, args.size, args.size), images(2, args.text)),
        },
        batch=lambda args: (images(args.batch_size, 3, args.size, args.size), *images(2, args.batch_size, args.text)),
        tests=0,
        data=captioned,
        resume="--size 16 --load-size 19 --ngf 4 --ndf 4 --nef 8 --nif 8 --text 8 --nt 4 --nz 4 --batch-size 3"
        " --text-epochs 1 --style-epochs 1 --text-lr 1e-4 --precision fp32 --device cpu",
        use=samples("{:05}.png", 16, "--prompt", "a red circle"),
        changes=(
            "--lr 0.01",
            "--batch-size 3",
            "--seed 1",
            "--epochs 7",
            "--precision bf16",
            "--size 32",
            "--load-size 20",
            "--ngf 8",
            "--ndf 8",
            "--nef 16",
            "--nif 16",
            "--text 16",
            "--nt 8",
            "--nz 5",
            "--no-cls",
            "--no-int",
            "--wrong 2",
            "--near 2",
            "--average 2",
            "--text-epochs 1",
            "--style-epochs 3",
            "--text-lr 0.01",
            "--halve-every 3",
        ),
        bad=(
            "--size 48",
            "--load-size 8",
            "--ngf 0",
            "--ndf 0",
            "--nef 0",
            "--nif 0",
            "--text 0",
            "--nt 0",
            "--nz 0",
            "--wrong 0",
            "--near 0",
            "--average 0",
            "--halve-every 0",
            "--text-lr -1",
            "--embeddings missing.npy",
            "--sample 5",  # without --prompt
            "--sample 0 --prompt bird",
            "--sample many --prompt bird",
        ),
        steady=True,
        method_lines=270,
        file_lines=550,
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
    """Exit status of the script's main, called in this process; all such calls share the drawn toy sets."""
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.ExitStack() as patches:
        for name in ("streets", "digits", "shapes"):
            if draw := getattr(row.module, name, None):
                patches.enter_context(mock.patch.object(row.module, name, once(draw)))
        try:
            row.module.main([*map(str, flags)])
            return 0
        except SystemExit as end:
            return end.code or 0
        finally:
            for kind, handler in handlers.items():
                signal.signal(kind, handler)


def snapshot(folder):
    """{name: bytes} of all files below a folder, and {name: None} of the folders."""
    found = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in found}


def read_log(run):
    """The rows of log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def read_checkpoint(run):
    """The dict in last.pt."""
    return torch.load(run / "last.pt", weights_only=True)


def assert_refused(result, *names):
    """Exit status 2 and one sentence on standard error, which holds one of `names`."""
    assert result.code == 2, result
    assert len(result.err.splitlines()) == 1 and result.err.strip(), result.err
    assert "Traceback" not in result.err
    assert not names or any(name in result.err for name in names), result.err
