"""Kills at random moments, and malformed files: what a run must survive, and what must end in one sentence.

The suite does a little of both. At length, by hand:

    python -m tests.torture kills --kills 200       # kill -9 at random moments; every run must end with equal weights
    python -m tests.torture files --examples 2000   # images, checkpoints and folders with a few mutations each
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the same bits in every process

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

if __package__:  # python -m tests.torture
    from .scripts import ROWS, read_checkpoint
else:
    from scripts import ROWS, read_checkpoint


# -- kills -----------------------------------------------------------------------------------------------------------


def train(row, flags, log):
    """The script's main, in a child process; prints go to the file `log`."""
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.stdout.reconfigure(line_buffering=True)
        row.module.main([*map(str, flags)])


def start(row, flags, log):
    """Start such a child by a fork: torch need not be imported again."""
    child = multiprocessing.get_context("fork").Process(target=train, args=(row, flags, log))
    child.start()
    return child


def equal(a, b):
    """Whether two nested containers of tensors and plain values are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Case:
    """A run of a script on eight small items, three passes over them, as it is without a kill."""

    def __init__(self, row, folder):
        self.row, self.folder, self.log = row, folder, folder / "log.txt"
        row.data(folder / "set")
        self.flags = [*row.resume.split(), "--data", folder / "set", "--data-root", folder / "data"]
        self.flags += ["--epochs", row.epochs, "--save-every", 2]
        began = time.monotonic()
        self.end(start(row, [*self.flags, "--out", folder / "whole"], self.log))
        self.seconds = time.monotonic() - began
        self.whole = self.state(folder / "whole")

    def state(self, run):
        """What a checkpoint holds, but for the settings."""
        return {name: part for name, part in read_checkpoint(run).items() if name not in ("settings", "log_size")}

    def end(self, child):
        """Wait for the end, which must be a good one."""
        child.join(120)
        assert child.exitcode == 0, self.log.read_text()

    def kill(self, rng):
        """A run that is killed at random moments until it is done. Returns the number of kills."""
        run, kills = self.folder / f"run{rng.random()}", 0
        while True:
            child = start(self.row, [*self.flags, "--out", run], self.log)
            child.join(rng.uniform(0, self.seconds))
            if child.exitcode is not None:
                break
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        assert child.exitcode == 0, self.log.read_text()
        assert equal(self.state(run), self.whole), f"{self.row.name} differs after {kills} kills"
        shutil.rmtree(run)
        return kills


def kill_all(kills, seed, rows=ROWS):
    """At least so many kills, spread over the scripts. Returns (kills, runs)."""
    rng, done, runs = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        cases = []
        for row in rows:
            Path(folder, row.name).mkdir()
            cases.append(Case(row, Path(folder, row.name)))
        while done < kills or runs < len(cases):
            done += cases[runs % len(cases)].kill(rng)
            runs += 1
    return done, runs


# -- files -----------------------------------------------------------------------------------------------------------


def said(row, flags):
    """(status, what was said) of the script's main with `flags`; any other exception is a fault of the script."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            row.module.main([*map(str, flags)])
        return 0, out.getvalue()
    except SystemExit as end:
        text = out.getvalue() + (end.code if isinstance(end.code, str) else "")
        return (1 if isinstance(end.code, str) else end.code or 0), text


IMAGE_KINDS = {  # mode: endings that can hold it
    "1": (".png", ".bmp", ".tif"),
    "L": (".png", ".jpg", ".bmp", ".tif", ".webp"),
    "LA": (".png", ".tif"),
    "P": (".png", ".bmp", ".tif"),
    "RGB": (".png", ".jpg", ".bmp", ".tif", ".webp"),
    "RGBA": (".png", ".tif", ".webp"),
    "CMYK": (".jpg", ".tif"),
    "I;16": (".png", ".tif"),
    "I": (".tif",),
    "F": (".tif",),
}


@st.composite
def image_files(draw):
    """(ending, bytes) of an image of any kind and size, whole or with a mutation."""
    mode = draw(st.sampled_from(sorted(IMAGE_KINDS)))
    ending = draw(st.sampled_from(IMAGE_KINDS[mode]))
    width, height = draw(st.integers(1, 90)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    elif mode in ("I", "F"):
        image = Image.fromarray(pixels[..., 0].astype(np.int32 if mode == "I" else np.float32))
    elif mode in ("1", "L", "LA", "P"):
        image = Image.fromarray(pixels[..., 0]).convert(mode)
    else:
        image = Image.fromarray(pixels).convert(mode)
    file = io.BytesIO()
    kind = {".jpg": "JPEG", ".tif": "TIFF"}.get(ending, ending[1:].upper())
    image.save(file, kind)
    return ending, draw(mutated(file.getvalue()))


@st.composite
def mutated(draw, data):
    """Bytes as they are, cut, with some bytes changed, or with others before or behind."""
    kind = draw(st.sampled_from(("whole", "cut", "changed", "before", "behind", "empty")))
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if kind == "changed":
        data = bytearray(data)
        for _ in range(draw(st.integers(1, 8))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data)
    noise = draw(st.binary(min_size=1, max_size=40))
    return {"whole": data, "before": noise + data, "behind": data + noise, "empty": b""}[kind]


def check_image(row, folder, example):
    """A data set with one image of any kind: it is trained on, or one sentence names a file or option."""
    ending, data = example
    shutil.rmtree(folder, ignore_errors=True)
    row.data(folder / "set")
    victim = sorted(file for file in (folder / "set").rglob("*.png"))[0]
    victim.unlink()
    victim.with_suffix(ending).write_bytes(data)
    flags = [*row.resume.split(), "--data", folder / "set", "--data-root", folder / "data", "--out", folder / "run"]
    status, text = said(row, [*flags, "--max-steps", 1])
    if status:
        assert status == 1 and victim.stem in text or "--" in text, text
        assert not (folder / "run" / "last.pt").exists()
    else:
        assert all(part.isfinite().all() for part in read_checkpoint(folder / "run")["G"].values())


CHANGES = ("settings", "step", "images_seen", "script", "G", "opt_G")


@st.composite
def checkpoint_changes(draw):
    """A change to the dict in a checkpoint: a key left out, or a value of another kind."""
    key = draw(st.sampled_from(CHANGES))
    value = draw(st.sampled_from((None, "text", [], {"weight": torch.ones(3)}, "left out")))
    return key, value


def check_checkpoint(row, folder, run, example):
    """A run with a damaged checkpoint is refused in one sentence, which names it, and stays as it is; or it goes on."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder / "run")
    path = folder / "run" / "last.pt"
    if isinstance(example, tuple):
        checkpoint, (key, value) = torch.load(path, weights_only=True), example
        checkpoint.pop(key) if value == "left out" else checkpoint.update({key: value})
        torch.save(checkpoint, path)
    else:
        path.write_bytes(path.read_bytes()[: int(example * path.stat().st_size)])
    before = path.read_bytes()
    status, text = said(row, [*row.tiny.split(), "--out", folder / "run", "--max-steps", 2])
    assert status in (0, 1), text
    if status:
        assert str(folder / "run") in text and path.read_bytes() == before, text
        assert len(text.strip().splitlines()) <= 4, text


NAMES = (
    "train",
    "test",
    "val",
    "A",
    "B",
    "trainA",
    "trainB",
    "train_A",
    "horse",
    "zebra",
    "input",
    "0",
    "1",
    "x y",
    "ü",
)


@st.composite
def layouts(draw):
    """Paths of images in folders that nobody planned."""
    part = st.lists(st.sampled_from(NAMES), max_size=3).map("/".join)
    return draw(
        st.lists(st.tuples(part, st.sampled_from(("0", "1", "0_A", "0_B"))), min_size=1, max_size=6, unique=True)
    )


def check_layout(row, folder, example):
    """A folder of any layout is trained on, or refused in one sentence that names it or the layouts there are."""
    shutil.rmtree(folder, ignore_errors=True)
    for i, (part, name) in enumerate(example):
        path = folder / "set" / part / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 80, 3), 20 * i, np.uint8)).save(path)
    flags = [*row.resume.split(), "--data", folder / "set", "--data-root", folder / "data", "--out", folder / "run"]
    status, text = said(row, [*flags, "--max-steps", 1])
    assert status in (0, 1), text
    if status:
        assert str(folder / "set") in text and not (folder / "run" / "last.pt").exists(), text


def try_examples(examples, strategy, check, *where):
    """check(*where, example) for so many examples."""

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    @given(strategy)
    def trial(example):
        check(*where, example)

    trial()


def check_files(examples, rows=ROWS):
    """Try so many examples of each kind on each script. Raises the first fault, with the smallest example of it."""
    for row in rows:
        with tempfile.TemporaryDirectory() as folder:
            case, run = Path(folder, "case"), Path(folder, "run")
            assert said(row, [*row.tiny.split(), "--out", run, "--max-steps", 1])[0] == 0
            try_examples(examples, image_files(), check_image, row, case)
            try_examples(examples, st.one_of(checkpoint_changes(), st.floats(0, 1)), check_checkpoint, row, case, run)
            try_examples(examples, layouts(), check_layout, row, case)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("kills", "files"))
    parser.add_argument("--kills", type=int, default=200, help="at least so many, over all scripts")
    parser.add_argument("--examples", type=int, default=200, help="of each kind, for each script")
    parser.add_argument("--only", nargs="+", default=[row.name for row in ROWS], help="scripts")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    rows, began = [row for row in ROWS if row.name in args.only], time.monotonic()
    if args.what == "kills":
        kills, runs = kill_all(args.kills, args.seed, rows)
        print(f"{kills} kills in {runs} runs, all of which ended like those without")
    else:
        check_files(args.examples, rows)
        print(f"{args.examples} examples of each kind for each of {len(rows)} scripts: no fault")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
