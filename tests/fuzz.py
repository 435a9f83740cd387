"""Hostile files for the six scripts: images, checkpoints, run folders, captions, codes, caches and archives.

    python -m tests.fuzz --inputs 10000            # over all kinds; a table says how they ended
    python -m tests.fuzz --kinds image path        # only these kinds
    python -m tests.fuzz --memory                  # instead: what the largest images that are taken cost

An input is a file or a few, made by hypothesis, that a script's main is called with in this process. It may end in a
correct result or in one sentence on standard error that names the file, and exit status 2: no traceback, no warning, no
hang, no more memory than stated below, nothing outside of the folder, nothing half-written. (libtiff alone may say
more.) What does not is made as small as hypothesis can, and kept in --folder. Exit status 1 if there is any.

The largest images that are taken, of 89 million pixels, cost up to 1.2 GiB each while they are decoded, as WebP (others
up to 0.9), and four are decoded at a time: 6 GiB at most.
"""

import argparse
import contextlib
import faulthandler
import functools
import gzip
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure
from PIL import Image
from scripts import ROWS, environment, read_checkpoint, read_log, run_main, snapshot
from test_pix2pix_data import KINDS as PLAIN
from test_pix2pix_data import noise
from test_resume import differences

NAMED = {row.name: row for row in ROWS}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
NUMBERS = (0, 1, 2, 3, 8, 40, 255, 256, 9_000, 16_384, 65_535, 65_536, 100_000, 2**31 - 1, 2**31, 2**32 - 1)
SECONDS = 20  # that an input may take
MEMORY = {"image": 1280}  # MiB that it may cost above what the process had; 256 for all other kinds
LIBTIFF = re.compile(r"^(?!\w+\.py: )[\w., ]+: .*\n", re.MULTILINE)  # its own words, which Pillow lets through
TRIES = 200  # of making a fault smaller
ROOM = 8 * 2**30  # bytes of addresses beyond those in use, so that what asks for all memory does not get it


# -- a call of main --------------------------------------------------------------------------------------------------


class HangError(BaseException):
    """What an alarm raises: no script catches it."""


def memory(field):
    """A line of /proc/self/status in KiB, 0 where there is none."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))
    return 0


def forget_peak():
    """Let the peak of resident memory begin anew. Returns what is resident now, or all that could be, if it cannot."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
        return memory("VmRSS")
    return math.inf


@contextlib.contextmanager
def limited(room):
    """So many bytes of addresses beyond those in use, where the system counts them."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    if room and memory("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") * 1024 + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def streams():
    """Standard output and error as those of a process, with what C code writes, and the warnings that it would show."""
    with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as warned:
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        warnings.filterwarnings("default", category=DeprecationWarning, module="|".join(NAMED))  # as if __main__
        shown = SimpleNamespace(err="", out="", warned=warned)
        before, out, kept = (sys.stdout, sys.stderr), io.BytesIO(), os.dup(2)
        os.dup2(file.fileno(), 2)
        sys.stdout = io.TextIOWrapper(out, "utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
        try:
            yield shown
        finally:
            sys.stderr.flush()
            sys.stdout.detach()  # or else it closes what it wrote to
            sys.stdout, sys.stderr = before
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            shown.err, shown.out = file.read().decode("utf-8", "replace"), out.getvalue().decode("utf-8", "replace")


def attempt(row, *flags, instead=None, room=0):
    """How the script's main ends in this process: code, err, out, seconds, peak (MiB), and crash, if it is one.

    `instead` of its train some function may be called with the module and the settings.
    """
    end = SimpleNamespace(code=0, crash="", peak=0)
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    patience, train, begun = socket.getdefaulttimeout(), row.module.train, time.monotonic()
    if instead:
        row.module.train = functools.partial(instead, row.module)

    def ring(*_):
        raise HangError(f"more than {SECONDS} s")

    held = forget_peak()
    with limited(room), streams() as shown:
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        faulthandler.dump_traceback_later(12 * SECONDS, exit=True, file=sys.__stderr__)
        try:
            row.module.main([*map(str, flags)])
        except SystemExit as ended:
            end.code = ended.code or 0
        except (HangError, Exception) as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if Path(frame.filename).parent == row.file.parent] or frames
            where = "hang" if isinstance(error, HangError) else f"{own[-1].name}: {own[-1].line}"
            end.crash, end.code = f"{type(error).__name__} in {where}\n{traceback.format_exc()}", 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            for kind, handler in handlers.items():
                signal.signal(kind, handler)
            socket.setdefaulttimeout(patience)
            row.module.train = train
    end.out, end.err = shown.out, LIBTIFF.sub("", shown.err)
    end.warned = [str(warning.message) for warning in shown.warned]
    end.seconds, end.peak = time.monotonic() - begun, max(0, memory("VmHWM") - held) / 1024
    return end


def faults(end, *names, most=256):
    """What is wrong with how an attempt ended, as texts: nothing, or one sentence with one of `names` and status 2."""
    found = [end.crash] if end.crash else []
    if end.code not in (0, 2) and not end.crash:
        found.append(f"status {end.code}")
    if end.warned:
        found.append(f"warns\n{end.warned[0]}")
    if end.code == 0 and end.err:
        found.append(f"says more or less than a sentence\n{end.err}")
    if end.code == 2 and (end.err.count("\n") != 1 or not end.err.strip() or len(end.err) > 2000):
        found.append(f"says more or less than a sentence\n{end.err[:3000]}")
    if end.code == 2 and not any(str(name) in end.err for name in names):
        found.append(f"names neither file nor option\n{', '.join(map(str, names))}: {end.err}")
    if end.peak > most:
        found.append(f"needs more than {most} MiB\n{end.peak:.0f} MiB")
    return found


class Lab:
    """A folder, the one of the case in it, and runs to damage."""

    def __init__(self, folder):
        self.folder, self.case = Path(folder).resolve(), Path(folder).resolve() / "case"
        self.runs = {}

    def fresh(self):
        """An empty folder, which becomes the working folder."""
        os.chdir(self.folder)
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        os.chdir(self.case)
        return self.case

    def trained(self, row):
        """A run in the middle of its training, its checkpoint, and flags to go on with it and to use it."""
        if row.name not in self.runs:
            folder = self.folder / row.name
            row.data(folder / "set")
            common = f"--data {folder / 'set'} --seed 3 --epochs {row.epochs} --max-steps"
            run, flags = folder / "run", [*row.resume.split(), *common.split()]
            with contextlib.redirect_stdout(io.StringIO()):
                assert run_main(row, *flags, 4, "--run", run) == 0
            use, to, sizes = row.use(folder / "use", "run")
            if row.name == "cgan":  # of two labels
                use, sizes = [flag if flag != "7" else "1" for flag in use], {f"{i:05}-1.png": None for i in range(5)}
            kept = snapshot(run)
            self.runs[row.name] = SimpleNamespace(
                folder=folder, run=run, files=kept, on=[*flags, 5, "--run", "run"], use=use, to=to, sizes=sizes,
                checkpoint=read_checkpoint(run), data=kept["last.pt"], log=read_log(run),
            )  # fmt: skip
        return self.runs[row.name]

    def lay_run(self, row):
        """A copy of that run in an empty folder."""
        trained, folder = self.trained(row), self.fresh()
        shutil.rmtree(trained.to, ignore_errors=True)
        for name in ("last.pt", "log.jsonl", "config.json"):
            (folder / "run").mkdir(exist_ok=True)
            (folder / "run" / name).write_bytes(trained.files[name])
        return trained, folder / "run"


def left(folder):
    """Names of what should not be left below a folder: what is half-written."""
    endings = (".part", "-journal")
    return [f"leaves something\n{path.name}" for path in folder.rglob("*") if path.name.endswith(endings)]


# -- damage ----------------------------------------------------------------------------------------------------------

PLACES = st.one_of(
    st.tuples(st.just("start"), st.integers(0, 100)),
    st.tuples(st.just("end"), st.integers(0, 100)),
    st.tuples(st.just("share"), st.floats(0, 1)),
)
DAMAGES = ("cut", "flip", "write", "zero", "drop", "insert", "repeat")
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(DAMAGES),
        PLACES,
        st.integers(0, 64),
        st.sampled_from(NUMBERS),
        st.binary(max_size=16),
        st.sampled_from((">I", "<I", ">H", "<H")),
    ),
    min_size=1,
    max_size=3,
)


def damaged(data, damages):
    """Bytes after those damages: cut, a bit flipped, a number written, a span zeroed, dropped, repeated, inserted."""
    for kind, (edge, far), length, number, blob, form in damages:
        at = round(far * len(data)) if edge == "share" else far if edge == "start" else len(data) - far
        at = min(max(at, 0), len(data))
        head, tail = data[:at], data[at:]
        if kind == "cut":
            data = head
        elif kind == "flip":
            data = head + bytes([tail[0] ^ 1 << length % 8]) + tail[1:] if tail else data
        elif kind == "write":
            packed = struct.pack(form, number % (2**16 if form[1] == "H" else 2**32))
            data = head + packed + tail[len(packed) :]
        elif kind == "zero":
            data = head + bytes(min(length, len(tail))) + tail[length:]
        elif kind == "drop":
            data = head + tail[length:]
        elif kind == "insert":
            data = head + blob + tail
        elif kind == "repeat":
            data = head + tail[:length] * (1 + number % 9) + tail[length:]
    return data


def repaired(data):
    """A PNG file of which the checksums are right, whatever it holds."""
    at, parts = 8, [data[:8]]
    while data[:8] == b"\x89PNG\r\n\x1a\n" and at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + length]
        parts.append(data[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big"))
        at += 12 + length
    return b"".join(parts) + data[at:]


# -- images ----------------------------------------------------------------------------------------------------------


def saved(image, kind, **options):
    """An image as the bytes of a file of that kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@functools.cache
def album():
    """{name: bytes} of small images: all that scripts take, and much that they do not."""
    found = {name: data for name, (data, _, _) in PLAIN.items()}
    colour, other, turned = Image.fromarray(noise(20, 40)), Image.fromarray(noise(20, 40, seed=1)), Image.Exif()
    turned[0x0112], turned[0x010F] = 6, "maker"
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        found[f"turned {kind}"] = saved(colour, kind, exif=turned)
    for kind in ("PNG", "WEBP", "GIF", "TIFF", "MPO"):
        found[f"several {kind}"] = saved(colour, kind, save_all=True, append_images=[other, colour])
    for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd"):
        found[f"{kind} TIFF"] = saved(colour, "TIFF", compression=kind)
    found["group 4 TIFF"] = saved(colour.convert("1"), "TIFF", compression="group4")
    for kind in "GIF PPM TGA PCX ICO DDS SGI MSP XBM EPS PDF JPEG2000 ICNS SPIDER AVIF".split():
        with contextlib.suppress(KeyError, OSError, ValueError):  # whatever is built in
            found[f"{kind}"] = saved(colour.convert("1") if kind in ("MSP", "XBM") else colour, kind)
    for name, value in (("numbers", 0.5), ("nothing", math.nan), ("infinite", math.inf), ("huge", 3e38)):
        found[f"floats, {name}"] = saved(Image.fromarray(np.full((20, 40), value, np.float32)), "TIFF")
    found["32 bits TIFF"] = saved(Image.fromarray(noise(20, 40, 0).astype(np.int32) * 70_000 - 2**20), "TIFF")
    found["LAB TIFF"] = saved(Image.frombytes("LAB", (40, 20), bytes(2400)), "TIFF")
    found["profile PNG"] = saved(colour, "PNG", icc_profile=bytes(3000))
    found["long text"] = b"this is no image\n" * 100
    found["script"] = b"#!/bin/sh\ntouch harm\n"
    found["page"] = b"<html><head><title>404 Not Found</title></head><body></body></html>"
    found["nothing"] = b""
    found["zeros"] = bytes(1000)
    return found


def png(width, height, bits, kind, data, more=b""):
    """A PNG file with that header, whatever its data."""
    header = struct.pack(">IIBBBBB", width % 2**32, height % 2**32, bits, kind, 0, 0, 0)
    chunks = (b"IHDR", header), (b"PLTE", bytes(range(30))), (b"tRNS", more), (b"IDAT", zlib.compress(data))
    parts = (struct.pack(">I", len(body)) + name + body + bytes(4) for name, body in (*chunks, (b"IEND", b"")))
    return repaired(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def bmp(width, height, bits, compression, data, planes=1, offset=54):
    """A BMP file with that header, whatever its data."""
    head = b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, offset)
    size = struct.pack("<II", width % 2**32, height % 2**32)
    return head + struct.pack("<I", 40) + size + struct.pack("<HHIIIIII", planes, bits, compression, *[0] * 5) + data


def tiff(tags, data):
    """A TIFF file with those tags, {number: (type, value)}, whatever its data, which comes after them."""
    strips = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags = {273: (4, strips), 279: (4, len(data))} | tags
    rows = [struct.pack("<HHII", tag, kind, 1, value % 2**32) for tag, (kind, value) in sorted(tags.items())]
    return struct.pack("<2sHIH", b"II", 42, 8, len(rows)) + b"".join(rows) + bytes(4) + data


def plain_tiff(width, height, bits, samples, form, compression, tile, data):
    """A TIFF of so many samples of so many bits, of a format: 1 unsigned, 2 signed, 3 floating; in tiles if given."""
    tags = {256: (4, width), 257: (4, height), 258: (3, bits), 259: (3, compression), 262: (3, 1 + (samples == 3))}
    tags |= {277: (3, samples), 278: (4, height), 339: (3, form)}
    if tile:
        tags |= {322: (4, tile[0]), 323: (4, tile[1]), 324: (4, 8 + 2 + 12 * (len(tags) + 6) + 4), 325: (4, len(data))}
    return tiff(tags, data)


SIDES = st.sampled_from((*range(4), 16, 40, 3000, 9000, 20_000, 2**16 - 1, 100_000, 2**31 - 1, 2**31, 2**32 - 1))
FILLINGS = st.one_of(st.binary(max_size=64), st.sampled_from((0, 100, 4000, 100_000)).map(bytes))
MADE = st.one_of(
    st.builds(
        png, SIDES, SIDES, st.sampled_from((1, 2, 4, 8, 16, 3)), st.sampled_from((0, 2, 3, 4, 6, 5)), FILLINGS,
        st.binary(max_size=8),
    ),
    st.builds(
        bmp, SIDES, SIDES, st.sampled_from((1, 4, 8, 16, 24, 32, 64)), st.sampled_from((*range(7), 9)), FILLINGS,
        st.sampled_from((1, 0, 3)), st.sampled_from((54, 0, 26, 1078, 2**32 - 1)),
    ),
    st.builds(
        plain_tiff, SIDES, SIDES, st.sampled_from((1, 8, 12, 16, 32, 64, 0, 65_535)),
        st.sampled_from((1, 3, 4, 0, 255)), st.sampled_from((1, 2, 3, 4, 6)),
        st.sampled_from((1, 2, 5, 7, 8, 32773, 34925, 50000, 77)),
        st.one_of(st.none(), st.tuples(SIDES, SIDES)), FILLINGS,
    ),
)  # fmt: skip
IMAGES = st.fixed_dictionaries({
    "script": st.sampled_from([*NAMED]),
    "mode": st.sampled_from(("alone", "alone", "alone", "alone", "set", "skip", "use")),
    "base": st.one_of(st.integers(0, 10_000), MADE),
    "damage": st.one_of(st.just([]), DAMAGE, DAMAGE),
    "repair": st.booleans(),
    "suffix": st.sampled_from(SUFFIXES),
})  # fmt: skip


def lay_set(row, folder, names):
    """A small set as the script has it, with a hole for images of those names. Returns the folder that they belong in.

    Its own images have 80x40 pixels.
    """
    home = {"cyclegan": "trainA", "cgan": "cats"}.get(row.name, ".")
    others = {"cyclegan": ("trainA/0", "trainB/0"), "cgan": ("cats/0", "dogs/0")}.get(row.name, ("0", "1"))
    for i, name in enumerate(others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(40, 80, seed=i)).save(folder / f"{name}.png")
        if row.name == "text2img":
            (folder / f"{name}.txt").write_text(f"number {i}\n")
    for name in names if row.name == "text2img" else ():
        (folder / name).with_suffix(".txt").write_text("another\n")
    return folder / home


def load(module, args, kept=None):
    """All images that the script would train on, and what they are loaded with: names, labels or captions."""
    name = module.SCRIPT
    if name == "pix2pix":
        parts = [module.load_pairs(args, split) for split in ("train", "test")]
        found = [[(name, read(i)) for i, name in enumerate(names)] for names, read in parts]
    elif name == "cyclegan":
        parts = [module.load_images(args, split, side) for split in ("train", "test") for side in "AB"]
        found = [[(name, read(i)) for i, name in enumerate(names)] for names, read in parts]
    elif name == "cgan":
        images, labels, names = module.load_images(args)
        found = [[(names[label], image) for image, label in zip(images, labels.tolist(), strict=True)]]
    elif name == "text2img":
        data = module.load_data(args)
        chars = data.chars.cpu()
        said = [chars[a : a + n].tolist() for a, n in zip(data.first, data.many, strict=True)]
        found = [[(said[i], data.read(i)) for i in range(len(data.kinds))]]
        assert data.many.sum() == len(chars)
    elif name == "dcgan":
        count, read = module.load_images(args)
        found = [[("", image) for image in read([*range(count)])]]
    else:
        found = [[("", image) for image in module.load_images(args)]]
    if kept is not None:
        kept.extend(found)


def look(module, args, path, kept):
    """What the script reads from a file, in all numbers of channels."""
    image = module.read_image(path)
    kept.extend(module.flatten(image, channels) for channels in (1, 2, 3, 4))


def same_pixels(one, other):
    """Whether two images of Pillow are equal."""
    return one.size == other.size and one.mode == other.mode and one.tobytes() == other.tobytes()


def check_image(lab, case):
    """One bad image: looked at alone, in a set, in a set with --skip-bad, and translated."""
    row, names = NAMED[case["script"]], [*album()]
    whole = album()[names[case["base"] % len(names)]] if isinstance(case["base"], int) else case["base"]
    data = damaged(whole, case["damage"])
    data = repaired(data) if case["repair"] else data
    mode = "alone" if case["mode"] == "use" and row.name not in ("pix2pix", "cyclegan") else case["mode"]
    name, flags, kept = f"x{case['suffix']}", [*row.tiny.split(), "--run", "run"], []
    if mode == "use":
        trained, run = lab.lay_run(row)
        (lab.case / name).write_bytes(data)
        flags = [*trained.use[:2], "--translate", name, "--to", "out", "--device", "cpu"]
        end = attempt(row, *flags, room=ROOM)
        found = faults(end, name, most=MEMORY["image"])
        if end.code == 0 and not Path("out", "x.png").exists():
            found.append("makes no picture")
        return end, found + left(lab.case)
    folder = lab.fresh()
    if mode == "alone":
        (folder / name).write_bytes(data)
        end = attempt(row, *flags, instead=functools.partial(look, path=folder / name, kept=kept), room=ROOM)
        found = faults(end, name, most=MEMORY["image"])
        if end.code == 0 and [image.mode for image in kept] != ["L", "LA", "RGB", "RGBA"]:
            found.append("reads something else")
        if end.code == 0 and not case["repair"] and case["damage"] and {part[0] for part in case["damage"]} == {"cut"}:
            (folder / name).write_bytes(whole)
            with warnings.catch_warnings(action="ignore"):
                same = same_pixels(row.module.flatten(row.module.read_image(folder / name), 4), kept[3])
            found += [] if same else ["reads half an image"]
        return end, found
    (lay_set(row, folder / "set", [name]) / name).write_bytes(data)
    flags += ["--data", "set", *["--skip-bad"] * (mode == "skip")]
    end = attempt(row, *flags, instead=functools.partial(load, kept=kept), room=ROOM)
    found = faults(end, name, most=MEMORY["image"]) + left(folder)
    if end.code == 0 and (name in end.out) != (len(kept[0]) == counts(row)):
        found.append(f"leaves out something else\n{name in end.out}, {len(kept[0])} images")
    if mode == "skip" and end.code:
        found.append(f"does not skip it\n{end.err}")
    return end, found


def counts(row):
    """Images that `lay_set` makes of the kind that the hole is in."""
    return 1 if row.name == "cyclegan" else 2


PATHS = {
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "longer loop": lambda path: (path.symlink_to("y"), path.with_name("y").symlink_to(path.name)),
    "link to nothing": lambda path: path.symlink_to("nothing.png"),
    "link to a folder": lambda path: path.symlink_to("."),
    "link to zeros": lambda path: path.symlink_to("/dev/zero"),
    "pipe": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "empty file": Path.touch,
}
PATH_CASES = st.fixed_dictionaries({
    "script": st.sampled_from([*NAMED]),
    "mode": st.sampled_from(("set", "skip", "use", "data")),
    "path": st.sampled_from([*PATHS]),
    "suffix": st.sampled_from(SUFFIXES),
    "stem": st.sampled_from(("x", "x y", "\u732b", "x\udce9", "x" * 200, "-x", "x%s{}", "[x]*?", "x'\"\\", "x\ny")),
})  # fmt: skip


def check_path(lab, case):
    """A name of an image that is no file, in a set, translated, or as the set."""
    row, mode = NAMED[case["script"]], case["mode"]
    name, flags, kept = case["stem"] + case["suffix"], [*row.tiny.split(), "--run", "run"], []
    said = name.encode("utf-8", "backslashreplace").decode().replace("\n", " ")
    if mode == "use" and row.name in ("pix2pix", "cyclegan"):
        trained, run = lab.lay_run(row)
        PATHS[case["path"]](lab.case / name)
        end = attempt(row, *trained.use[:2], f"--translate={name}", "--to", "out", "--device", "cpu", room=ROOM)
        return end, faults(end, said, name, "nothing.png") + left(lab.case)
    folder = lab.fresh()
    if mode == "data":
        PATHS[case["path"]](folder / name)
        end = attempt(row, *flags, f"--data={name}", instead=load, room=ROOM)
        return end, faults(end, said, name) + left(folder)
    PATHS[case["path"]](lay_set(row, folder / "set", [name]) / name)
    flags += ["--data", "set", *["--skip-bad"] * (mode == "skip")]
    end = attempt(row, *flags, instead=functools.partial(load, kept=kept), room=ROOM)
    found = faults(end, said, name, "nothing.png") + left(folder)
    if mode == "skip" and (end.code or len(kept[0]) != counts(row)):
        found.append(f"does not skip it\n{end.err}")
    return end, found


# -- checkpoints -----------------------------------------------------------------------------------------------------

WAYS = st.sampled_from(("use", "on"))  # with a checkpoint
FILES = st.fixed_dictionaries({
    "script": st.sampled_from([*NAMED]),
    "way": WAYS,
    "other": st.sampled_from((None,) * 8 + ("another script's", "image", "text", "archive", "nothing")),
    "damage": DAMAGE,
})  # fmt: skip


def with_checkpoint(lab, row, way, write):
    """How the script ends that goes on from a checkpoint, or uses it, and what is wrong with that.

    write(path) makes the checkpoint. Returns the run folder too.
    """
    trained, run = lab.lay_run(row)
    write(run / "last.pt")
    before = (run / "last.pt").read_bytes() if (run / "last.pt").is_file() else None
    end = attempt(row, *(trained.use if way == "use" else trained.on), room=ROOM)
    found = faults(end, "last.pt", "run") + left(lab.case)
    if end.code == 2 and before is not None and (run / "last.pt").read_bytes() != before:
        found.append("changes what it refuses")
    if end.code == 0 and way == "use" and not all((trained.to / name).exists() for name in trained.sizes):
        found.append("draws nothing")
    if end.code == 2 and way == "use" and trained.to.exists():
        found.append("draws although it refuses")
    if [*lab.case.rglob("harm*")] + [*lab.case.parent.glob("harm*")]:
        found.append("runs code")
    return end, found


def check_file(lab, case):
    """A checkpoint that was cut, or of which bits were flipped, or that is none."""
    row, whole = NAMED[case["script"]], lab.trained(NAMED[case["script"]])
    others = {
        None: whole.data,
        "another script's": lab.trained(ROWS[ROWS.index(row) - 1]).data,
        "image": album()["several PNG"],
        "text": album()["long text"],
        "archive": (packed := io.BytesIO(), zipfile.ZipFile(packed, "w").close())[0].getvalue(),
        "nothing": b"",
    }
    data = damaged(others[case["other"]], case["damage"])
    end, found = with_checkpoint(lab, row, case["way"], lambda path: path.write_bytes(data))
    if end.code == 0 and data != whole.data:  # there are bytes that nothing depends on, such as dates and padding
        try:
            differ = differences(torch.load(io.BytesIO(data), weights_only=True), whole.checkpoint)
        except Exception as error:
            differ = [str(error)]
        found += ["takes what differs:\n" + ", ".join(differ)] if differ else []
    return end, found


class Code:
    """Code in a pickle: it makes a file."""

    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        return {
            "touch": (Path.touch, (Path("harm"),)),
            "system": (os.system, ("touch harm",)),
            "eval": (eval, ("open('harm', 'w')",)),
            "exec": (exec, ("open('harm', 'w')",)),
            "mkdir": (os.mkdir, ("harm",)),
            "load": (torch.load, ("harm.pt",)),
            "getattr": (getattr, (Path, "touch")),
            "numpy": (np.save, ("harm", 1)),
        }[self.how]


CODES = ("touch", "system", "eval", "exec", "mkdir", "load", "getattr", "numpy")
HOSTILE = st.fixed_dictionaries({
    "script": st.sampled_from([*NAMED]),
    "way": WAYS,
    "how": st.sampled_from(CODES),
    "where": st.sampled_from(("beside", "settings", "step", "G", "in G", "opt_G", "all", "key", "plain", "old", "tar")),
    "protocol": st.integers(0, 5),
    "packed": st.booleans(),
})  # fmt: skip


def check_code(lab, case):
    """A checkpoint with code in it, in any place, in each of torch's formats and as a plain pickle."""
    row, code = NAMED[case["script"]], Code(case["how"])
    checkpoint, where = dict(lab.trained(row).checkpoint), case["where"]
    if where in ("beside", "settings", "step", "G", "opt_G"):
        checkpoint["other" if where == "beside" else where] = code
    elif where == "in G":
        checkpoint["G"] = checkpoint["G"] | {next(iter(checkpoint["G"])): code}
    elif where == "key":
        checkpoint["settings"] = checkpoint["settings"] | {code: 1}
    else:
        checkpoint = code

    def write(path):
        if where == "plain":
            path.write_bytes(pickle.dumps(code, case["protocol"]))
        elif where == "tar":
            with tarfile.open(path, "w") as tar:
                for name in ("storages", "tensors", "pickle"):
                    data = pickle.dumps(code, case["protocol"])
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        else:
            new = where != "old"
            torch.save(checkpoint, path, pickle_protocol=2, _use_new_zipfile_serialization=new)
            if new and case["packed"]:
                squeeze(path)

    end, found = with_checkpoint(lab, row, case["way"], write)
    if end.code == 0:
        found.append("takes it")
    return end, found


def squeeze(path):
    """Compress the parts of a checkpoint, which torch never does."""
    file = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    path.write_bytes(file.getvalue())


ODD = """
    None; True; 0; -1; 7; 3000; 2**30; 10**9; 2**63; 10**5000; 0.5; 33.0; math.nan; math.inf; -1e308; ""; "text"; "16";
    "two\\nlines"; "long " * 1000; "meta"; "/proc/nowhere"; b"bytes"; []; [[1, "a"], [2]]; (1, 2); {}; {"a": {1: None}};
    {1, 2}; torch.tensor(3); torch.zeros(3); torch.zeros(1).expand(10**12); torch.eye(3).to_sparse();
    torch.zeros(3, dtype=torch.complex64); torch.empty(10**9, device="meta"); torch.Size([10**9]); torch.float16
""".strip()  # values that no script writes, each made anew
CHANGES = {  # of a tensor
    "nan": lambda tensor: torch.full_like(tensor, math.nan if tensor.is_floating_point() else 2**30),
    "huge": lambda tensor: torch.full_like(tensor, 3e38 if tensor.is_floating_point() else -(2**60)),
    "double": torch.Tensor.double,
    "half": torch.Tensor.half,
    "whole": torch.Tensor.long,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "sparse": torch.Tensor.to_sparse,
    "nowhere": lambda tensor: tensor.to("meta"),
    "one for all": lambda tensor: tensor.flatten()[:1].clone().expand(tensor.shape) if tensor.numel() else tensor,
    "turned": lambda tensor: tensor.transpose(0, -1) if tensor.ndim else tensor,
    "more": lambda tensor: torch.cat([tensor.flatten(), tensor.flatten()]),
    "less": lambda tensor: tensor.flatten()[:1].clone(),
    "flat": torch.Tensor.flatten,
    "none": lambda tensor: tensor.flatten()[:0].clone(),
}
EDIT = st.tuples(
    st.sampled_from(("settings",) * 4 + ("opt",) * 3 + ("any",) * 2 + ("top",)),
    st.lists(st.integers(0, 1000), min_size=5, max_size=5),
    st.sampled_from(("odd",) * 3 + ("change",) * 2 + ("remove", "add")),
    st.sampled_from([code.strip() for code in ODD.split(";")]),
    st.sampled_from([*CHANGES]),
)
CONTENTS = st.fixed_dictionaries({
    "script": st.sampled_from([*NAMED]),
    "way": WAYS,
    "edits": st.lists(EDIT, min_size=1, max_size=2),
    "packed": st.sampled_from((False,) * 5 + (True,)),
})  # fmt: skip


def edited(checkpoint, edit):
    """A checkpoint after one edit: something in it removed, added, or put in the place of something."""
    part, numbers, what, odd, change = edit
    keys, numbers = [*checkpoint], iter(numbers)
    options = {"settings": ["settings"], "opt": [key for key in keys if key.startswith("opt_")]}.get(part, keys)
    at, key = checkpoint, options[next(numbers) % len(options)]
    if part != "top":
        for number in numbers:
            inner = at[key]
            if not isinstance(inner, dict | list) or not inner:
                break
            at, key = inner, [*(inner if isinstance(inner, dict) else range(len(inner)))][number % len(inner)]
    if what == "add" and isinstance(at, dict):
        at[odd] = eval(odd)
    elif what == "remove":
        del at[key]
    elif what == "change" and isinstance(at[key], torch.Tensor):
        at[key] = CHANGES[change](at[key])
    else:
        at[key] = eval(odd)
    return checkpoint


def check_content(lab, case):
    """A checkpoint of sound format with something odd in it."""
    row = NAMED[case["script"]]
    checkpoint = torch.load(io.BytesIO(lab.trained(row).data), weights_only=True)
    try:
        for edit in case["edits"]:
            checkpoint = edited(checkpoint, edit)
        torch.save(checkpoint, data := io.BytesIO())
    except (KeyError, IndexError, TypeError, RuntimeError, NotImplementedError, ValueError):  # no such checkpoint
        return None, []

    def write(path):
        path.write_bytes(data.getvalue())
        if case["packed"]:
            squeeze(path)

    return with_checkpoint(lab, row, case["way"], write)


# -- run folders -----------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from(("a.png", "../a.png", "/etc/hostname", "b.png", "\0", "a red bird", 10**400)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(("file", "caption", "captions", "step", "epoch", "x")), inner, max_size=3),
    ),
    max_leaves=6,
)  # fmt: skip
LINES = st.lists(
    st.one_of(
        JSON.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=20),
        st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.sampled_from((
            b"[" * 100_000, b"{", b'{"step": 1', b'{"step": NaN}', b'{"step": 1e999}', b'{"step": 1}\r', b"\xff\xfe\0",
            "na\u00efve".encode("latin-1"), b"\xef\xbb\xbf{}", b"one\x0btwo\x1cthree", b"a" * 100_000, b"9" * 5000,
            b"", b" ", "\u2028".encode(),
        )),
    ),
    max_size=4,
).map(b"\n".join)  # fmt: skip
RUNS = st.fixed_dictionaries({
    "script": st.sampled_from([*NAMED]),
    "name": st.sampled_from((
        "run/log.jsonl", "run/log.jsonl", "run/log.jsonl", "run/config.json", ".run.lock", "run/samples",
        "run/last.pt.1.part",
    )),
    "data": st.one_of(LINES, LINES.map(lambda data: data + b"\n"), st.sampled_from([*PATHS])),
    "after": st.booleans(),
})  # fmt: skip


def check_run(lab, case):
    """Files of a run folder that hold something else, or are no files, when the run goes on."""
    row = NAMED[case["script"]]
    trained, run = lab.lay_run(row)
    path = lab.case / case["name"]
    log = (run / "log.jsonl").read_bytes()
    if isinstance(case["data"], str):
        if case["data"] in ("pipe", "link to zeros"):  # only who owns the folder could have put it there
            return None, []
        path.unlink(missing_ok=True)
        PATHS[case["data"]](path)
    else:
        path.write_bytes((log if case["after"] and path.name == "log.jsonl" else b"") + case["data"])
    end = attempt(row, *trained.on, room=ROOM)
    found = faults(end, path.name, "run") + [text for text in left(run) if end.code == 0]
    if end.code == 0 and [entry["step"] for entry in read_log(run)][-1] != 5:
        found.append("logs something else")
    return end, found


# -- captions and codes ----------------------------------------------------------------------------------------------

TEXTS = ("a.txt", "b.txt", "captions.jsonl", "trainvalclasses.txt", "text_c10/x/a.txt", "prompt.txt")
ROWS_OF_CAPTIONS = st.lists(
    st.fixed_dictionaries(
        {"file": st.one_of(st.sampled_from(("a.png", "b.png", "../a.png", "/etc/hostname", "")), JSON)},
        optional={
            "caption": st.one_of(st.text(max_size=8), JSON),
            "captions": st.one_of(st.lists(st.text(max_size=8)), JSON),
        },
    ).map(lambda row: json.dumps(row).encode()),
    max_size=4,
).map(b"\n".join)
CAPTIONS = st.fixed_dictionaries({
    "files": st.dictionaries(st.sampled_from(TEXTS), st.one_of(LINES, ROWS_OF_CAPTIONS), min_size=1, max_size=4),
    "good": st.booleans(),
    "prompt": st.one_of(st.none(), st.none(), st.text(min_size=1, max_size=300), st.sampled_from(("prompt.txt", "."))),
})  # fmt: skip


def check_captions(lab, case):
    """Captions, lists of classes and prompts of any content."""
    row = NAMED["text2img"]
    trained, run = lab.lay_run(row)
    for i, name in enumerate("ab"):
        Path("set").mkdir(exist_ok=True)
        Image.fromarray(noise(20, 40, seed=i)).save(f"set/{name}.png")
        if case["good"]:
            Path(f"set/{name}.txt").write_text(f"number {i}\n")
    for name, data in case["files"].items():
        path = Path("prompt.txt") if name == "prompt.txt" else Path("set", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    kept = []
    if (prompt := case["prompt"]) is not None:
        prompt = prompt.encode("utf-8", "replace").decode()  # as it comes from a command line
        flags = ["--run", "run", f"--prompt={prompt}", "--sample", 2, "--to", "out", "--device", "cpu"]
        end = attempt(row, *flags, room=ROOM)
        return end, faults(end, "--prompt", "prompt", ".npy") + left(lab.case)
    end = attempt(row, *row.tiny.split(), "--data", "set", instead=functools.partial(load, kept=kept), room=ROOM)
    found = faults(end, "set") + left(lab.case)
    if end.code == 0 and any(not said for said, _ in kept[0]):
        found.append("takes an image without captions")
    return end, found


def npy(header, data=b""):
    """A .npy file with that header."""
    text = (header if isinstance(header, str) else repr(header)).encode("latin-1", "replace") + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text) % 2**16) + text + data


TYPES = ("<f4", "<f8", ">f4", "<f2", "<i8", "|u1", "|b1", "<c16", "|O", "<U3", "|S5", "<M8[s]", "|V8", "<f16")
SHAPES = st.lists(st.sampled_from((0, 1, 2, 3, 4, 8, 8, 8, 2**20, 10**9, 2**62, -1)), max_size=4).map(tuple)
NPY = st.one_of(
    st.builds(
        lambda kind, order, shape, data: npy({"descr": kind, "fortran_order": order, "shape": shape}, data),
        st.sampled_from(TYPES), st.booleans(), SHAPES, st.sampled_from((0, 8, 64, 256)).map(bytes),
    ),
    st.builds(npy, st.text(max_size=30), st.binary(max_size=8)),
    st.sampled_from((b"\x93NUMPY", b"\x93NUMPY\2\0\xff\xff\xff\xff", b"PK\3\4", b"\x80\4K\1.", b"")),
)  # fmt: skip
VALUES = st.sampled_from((1.0, 0.0, math.nan, math.inf, 1e300, 1e-300, 255))
ARRAYS = st.builds(
    lambda kind, shape, value: np.full(shape, value if kind == "<f8" else 1, kind),
    st.sampled_from(("<f4", "<f8", "<f2", "<i8", "|u1", "|b1", "<c16", "|O", "<U3", "<f16")),
    st.sampled_from(((4, 8),) * 6 + ((2, 2, 8),) * 2 + ((8,), (2, 7), (0, 8), (), (32,), (4, 8, 1))),
    VALUES,
)


def nested(depth):
    """A list of ten times the same list, and so on: 10**depth numbers in a few bytes."""
    inner = [1.0] * 8
    for _ in range(depth):
        inner = [inner] * 10
    return inner


PICKLED = st.one_of(
    st.builds(
        lambda parts, protocol: pickle.dumps(parts, protocol),
        st.one_of(st.lists(ARRAYS, max_size=4), ARRAYS, JSON, st.lists(st.lists(st.floats(), max_size=8), max_size=4)),
        st.integers(0, 5),
    ),
    st.builds(lambda how, protocol: pickle.dumps([Code(how)], protocol), st.sampled_from(CODES), st.integers(0, 5)),
    st.integers(1, 9).map(lambda depth: pickle.dumps(nested(depth))),
    st.sampled_from((
        b"\x80\4N\x94r\x00\x00\x00\x20.",  # a place in the memo far away
        b"\x80\4Nr\xff\xff\xff\x0f.",
        b"\x80\4B\xff\xff\xff\x7f.",
        b"\x80\4\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.",
        b"\x80\4\x95\xff\xff\xff\xff\xff\xff\xff\x0f.",
        b"cnumpy\nndarray\n((I500000000\ntR.",
        b"(lcnumpy\nndarray\n((I500000000\nttRa.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I500000000\ntS'f'\ntR.",
        b"(lcnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I500000000\ntS'f'\ntRa.",
        b"cnumpy\ndtype\n(S'V2000000000'\ntR.",
        b"cnumpyish\nndarray\n.",
        b"c_codecs\nencode\n(S'a'\nS'zip'\ntR.",
        b"" ,
    )),
)  # fmt: skip
VECTORS = st.fixed_dictionaries({
    "way": st.sampled_from(("train", "prompt")),
    "file": st.one_of(
        st.tuples(st.just("codes.npy"), st.one_of(NPY, ARRAYS)),
        st.tuples(st.just("codes.pickle"), PICKLED),
    ),
    "damage": st.one_of(st.just([]), st.just([]), DAMAGE),
})  # fmt: skip


def check_vectors(lab, case):
    """Codes of captions, as .npy or pickled, to train on or to draw."""
    row, (name, data) = NAMED["text2img"], case["file"]
    trained, run = lab.lay_run(row)
    if isinstance(data, np.ndarray):
        np.save(file := io.BytesIO(), data)
        data = file.getvalue()
    Path(name).write_bytes(damaged(data, case["damage"]))
    if case["way"] == "prompt" and name == "codes.npy":
        end = attempt(
            row, *trained.use[:2], "--prompt", name, "--sample", 2, "--to", "out", "--device", "cpu", room=ROOM
        )
        found = faults(end, name)
        found += ["draws nothing"] if end.code == 0 and not [*Path("out").glob("*.png")] else []
    else:
        lay_set(row, Path("set"), [])
        Path("set/0.txt").write_text("one\ntwo\nthree\n")  # four codes in all
        flags = [*row.tiny.split(), "--data", "set", "--embeddings", name]
        end = attempt(row, *flags, instead=load, room=ROOM)
        found = faults(end, name)
    found += ["runs code"] if [*lab.case.rglob("harm*")] else []
    return end, found + left(lab.case)


# -- caches ----------------------------------------------------------------------------------------------------------

CACHES = st.fixed_dictionaries({
    "script": st.sampled_from(("pix2pix", "cyclegan", "dcgan", "text2img")),
    "skip": st.booleans(),
    "numbers": st.one_of(st.none(), st.lists(st.integers(-1, 9), max_size=9)),
    "damage": st.one_of(st.just([]), DAMAGE.map(lambda parts: [p for p in parts if p[0] in ("cut", "repeat")])),
})  # fmt: skip


def check_cache(lab, case):
    """A cache that was cut, or has other numbers of images at its end: decoded anew, or used as it should be."""
    row = NAMED[case["script"]]
    folder, kept = lab.fresh(), []
    row.data(folder / "set")
    flags = [*row.tiny.split(), "--data", "set", *["--skip-bad"] * case["skip"]]
    flags = [flag if flag != "32" else "16" for flag in flags]  # of images with 40 pixels
    assert attempt(row, *flags, instead=functools.partial(load, kept=kept)).code == 0
    for cache in [path for path in folder.rglob(f".{row.name}-*") if path.is_file()]:
        data = cache.read_bytes()
        if case["numbers"] is not None:
            one = len(data) // 8 - 8
            data = data[: len(case["numbers"]) * one] + np.array(case["numbers"], np.int64).tobytes()
        cache.write_bytes(damaged(data, case["damage"]))
    again = []
    end = attempt(row, *flags, instead=functools.partial(load, kept=again))
    found = faults(end, "set") + left(folder)
    if (
        end.code == 0
        and not case["skip"]
        and [[said for said, _ in part] for part in again] != [[said for said, _ in part] for part in kept]
    ):
        found.append("leaves something out")
    return end, found


# -- archives --------------------------------------------------------------------------------------------------------

PICTURE = saved(Image.fromarray(noise(20, 40)), "PNG")
GOOD = {f"facades/{part}/{i}.png": PICTURE for part in ("trainA", "trainB", "testA", "testB") for i in range(2)}
STRANGE = st.one_of(
    st.sampled_from((
        "../harm", "/{outside}/harm", "//{outside}/harm", "{outside}/harm", "facades/../../harm", "harm", "C:\\harm",
        "facades/trainA/../../../harm", "facades\\..\\harm", "facades", "facades/", "facades/trainA", ".", "..", "/",
        "", "facades/link", "facades/link/harm", "facades/pipe", "facades/trainA/0.png", "facades/trainA/3.png/4.png",
        "maps/trainA/0.png", "facades/\udce9.png", "facades/a\nb.png", "facades/a\0b",
        "facades/trainA/" + "x" * 300 + ".png", "facades/" + "d/" * 300 + "x",
    )),
    st.text(max_size=6).map(lambda text: f"facades/{text}"),
)  # fmt: skip
TARGETS = st.sampled_from(
    ("..", "../..", "/", "/{outside}", "/etc/hostname", "facades", "link", "trainA/0.png", ".", "")
)
MEMBER = st.tuples(
    STRANGE,
    st.sampled_from((tarfile.REGTYPE,) * 4 + (
        tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
        tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z",
    )),
    TARGETS,
    st.sampled_from((b"", b"evil", PICTURE)),
    st.sampled_from((0o644, 0, 0o7777, 0o40755)),
)  # fmt: skip
ARCHIVES = st.fixed_dictionaries({
    "script": st.sampled_from(("pix2pix", "cyclegan")),
    "first": st.lists(MEMBER, max_size=3),
    "last": st.lists(MEMBER, max_size=2),
    "top": st.sampled_from(("facades/",) * 5 + ("maps/", "")),
    "pack": st.integers(0, 3),
    "damage": st.one_of(st.just([]), st.just([]), DAMAGE),
    "inside": st.one_of(st.just([]), st.just([]), st.just([]), DAMAGE),
})  # fmt: skip


def tar_of(members, pack, inside=()):
    """A tar of (name, type, target, content, mode) members, with damages inside, compressed: gzip, or another way."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=(tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[pack % 2]) as tar:
        for name, kind, target, data, mode in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, target, mode
            member.size = len(data) if kind in (tarfile.REGTYPE, tarfile.CONTTYPE, b"Z") else 0
            tar.addfile(member, io.BytesIO(data))
    data = damaged(file.getvalue(), inside)
    if pack == 3:
        import lzma

        return lzma.compress(data)
    return data if pack == 2 else gzip.compress(data, 1, mtime=0)


def zip_of(members, pack, inside=()):
    """The same as a zip, where types and modes are those of Unix."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as bundle, warnings.catch_warnings(action="ignore"):
        for name, kind, target, data, mode in members:
            info = zipfile.ZipInfo(name.encode("utf-8", "replace").decode())
            link = kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)
            info.external_attr = ((stat.S_IFLNK if link else stat.S_IFREG) | mode) << 16
            info.compress_type = (0, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)[pack]
            bundle.writestr(info, target.encode() if link else data)
    return damaged(file.getvalue(), inside)


def check_archive(lab, case):
    """An archive as --data-root holds it: nothing lands outside of its set, and the set is whole or not there."""
    row, folder = NAMED[case["script"]], lab.fresh()
    outside = folder / "outside"
    outside.mkdir()

    def placed(members):
        place = str(outside).lstrip("/")
        return [(name.format(outside=place), kind, target.format(outside=place), *rest)
                if "{outside}" in name + target else (name, kind, target, *rest)
                for name, kind, target, *rest in members]  # fmt: skip

    good = [(name.replace("facades/", case["top"]), tarfile.REGTYPE, "", data, 0o644) for name, data in GOOD.items()]
    try:
        pack = tar_of if row.name == "pix2pix" else zip_of
        data = pack([*placed(case["first"]), *good, *placed(case["last"])], case["pack"], case["inside"])
    except (ValueError, OverflowError, UnicodeError, struct.error):  # no such archive
        return None, []
    archive = folder / "sets" / f"facades.{'tar.gz' if row.name == 'pix2pix' else 'zip'}"
    archive.parent.mkdir()
    archive.write_bytes(data := damaged(data, case["damage"]))
    kept, flags = [], [*row.tiny.split(), "--data", "facades", "--data-root", "sets", "--run", "run"]
    flags = [flag if flag != "32" else "16" for flag in flags]
    end = attempt(row, *flags, instead=functools.partial(load, kept=kept), room=ROOM)
    found = faults(end, "facades") + left(folder)
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            found.append(f"makes a link or a device\n{path.relative_to(folder)}")
        elif path.parts[len(folder.parts)] not in ("sets", "outside"):
            found.append(f"leaves something\n{path.relative_to(folder)}")
    if [*outside.iterdir()] or [*folder.glob("harm*")] or [*lab.folder.glob("harm*")]:
        found.append("writes outside")
    there = sorted(path.name for path in archive.parent.iterdir() if path.name != ".facades.lock")
    bad_pictures = ".png" in end.err and "facades/" in end.err.replace("archive", "")
    if there not in ([archive.name], ["facades", archive.name]) or archive.read_bytes() != data:
        found.append(f"leaves something\n{there}")
    if end.code == 0:
        plain = not (case["inside"] or case["first"] or case["last"])
        there = snapshot(archive.parent)
        wrong = [name for name, data in GOOD.items() if plain and there.get(name) != data]
        found += [f"has another file, or none\n{wrong[0]}"] if wrong else []
    elif "facades" in there and not (archive.parent / "facades").is_dir():
        found.append("leaves a set that is no folder")
    elif "facades" in there and not bad_pictures and "images" not in end.err:
        found.append(f"leaves a set that it refuses\n{end.err}")
    return end, found


# -- all of them -----------------------------------------------------------------------------------------------------

KINDS = {  # strategy, check, and how many of ten thousand
    "image": (IMAGES, check_image, 4500),
    "path": (PATH_CASES, check_path, 400),
    "checkpoint file": (FILES, check_file, 1000),
    "checkpoint content": (CONTENTS, check_content, 1500),
    "checkpoint code": (HOSTILE, check_code, 300),
    "run folder": (RUNS, check_run, 300),
    "captions": (CAPTIONS, check_captions, 500),
    "codes": (VECTORS, check_vectors, 500),
    "cache": (CACHES, check_cache, 200),
    "archive": (ARCHIVES, check_archive, 800),
}


WORDS = ("taken", "refused", "crashed")


class FoundError(Exception):
    """A fault, by its title."""


def outcome(end):
    """How an attempt ended, in a word; there is none for an input that cannot be made."""
    return {0: "taken", 2: "refused"}.get(end.code, "crashed") if end else "impossible"


def search(lab, kind, inputs, number, until, known, ends, costs):
    """Try so many inputs, or until there is a fault that is not `known`, which is then made small. Returns it or None.

    A fault is a namespace of title, text and case; `ends` counts how the inputs ended, and costs are the highest.
    """
    cases, check, _ = KINDS[kind]
    fault = SimpleNamespace(title="", case=None, tries=0)

    @seed(number)
    @settings(
        max_examples=inputs, database=None, deadline=None, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=[*HealthCheck], verbosity=Verbosity.quiet,
    )  # fmt: skip
    @given(cases)
    def one(case):
        if not fault.title and time.monotonic() > until:
            return
        end, found = check(lab, case)
        ends[outcome(end)] += 1
        ends["faulty"] += bool(found)
        if end:
            costs.seconds, costs.peak = max(costs.seconds, end.seconds), max(costs.peak, end.peak)
        titles = {text.partition("\n")[0]: text for text in found}
        new = [fault.title] if fault.title else [title for title in titles if title not in known]
        fault.tries += bool(fault.title)
        if new and new[0] in titles and (fault.tries < TRIES or repr(case) == repr(fault.case)):
            fault.title, fault.text, fault.case = new[0], titles[new[0]], case
            raise FoundError(fault.title)

    with contextlib.suppress(FoundError, FlakyFailure):
        one()
    return fault if fault.title else None


def explore(lab, kind, inputs, number, until):
    """Try inputs of a kind. Returns how many ended how, {title of a fault: text}, and the highest costs.

    A fault that was found once is only counted from then on, and others are looked for.
    """
    ends, known, costs, rounds = Counter(), {}, SimpleNamespace(seconds=0, peak=0), 0
    while (tried := sum(ends[word] for word in WORDS)) < inputs and time.monotonic() < until:
        fault = search(lab, kind, inputs - tried, number + 1000 * rounds, until, known, ends, costs)
        if not fault and sum(ends[word] for word in WORDS) == tried:
            break
        rounds += 1
        if fault:
            folder = lab.folder / f"{kind.replace(' ', '-')}-{len(known)}"
            shutil.copytree(lab.case, folder, symlinks=True, ignore=specials)
            (folder / "case.txt").write_text(f"{fault.case!r}\n\n{fault.text}", "utf-8", "backslashreplace")
            known[fault.title] = fault.text
            print(f"{kind}: {fault.title}: {folder}", flush=True)
    return ends, known, costs


def specials(path, names):
    """Of names in a folder those that cannot be copied."""
    modes = {name: stat.S_IFMT(os.lstat(Path(path, name)).st_mode) for name in names}
    return [name for name, mode in modes.items() if mode not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)]


# -- memory ----------------------------------------------------------------------------------------------------------

LARGEST = 9400, 9466  # 88,980,400 pixels


LARGE = {  # mode, suffix, how to save
    "grey PNG": ("L", "png", {}),
    "colour PNG": ("RGB", "png", {}),
    "alpha PNG": ("RGBA", "png", {}),
    "palette PNG": ("P", "png", {"transparency": 0}),
    "16 bits PNG": ("I;16", "png", {}),
    "JPEG": ("RGB", "jpg", {}),
    "turned JPEG": ("RGB", "jpg", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}),
    "CMYK JPEG": ("CMYK", "jpg", {}),
    "WebP": ("RGB", "webp", {"lossless": True, "method": 0}),
    "BMP": ("RGB", "bmp", {}),
    "TIFF": ("RGB", "tif", {"compression": "tiff_adobe_deflate"}),
    "CMYK TIFF": ("CMYK", "tif", {"compression": "tiff_adobe_deflate"}),
    "32 bits TIFF": ("I", "tif", {"compression": "tiff_adobe_deflate"}),
}


def large(kind, folder):
    """Write an image of that kind, flat, so that the file is small. Returns its path."""
    mode, suffix, options = LARGE[kind]
    path = folder / f"{kind.replace(' ', '-')}.{suffix}"
    image = Image.new(mode, LARGEST, 7 if mode in ("L", "P", "I", "I;16") else None)
    if mode == "P":
        image.putpalette(bytes(range(192)))
    image.save(path, **options)
    return path


CHILD = """
import resource, sys
sys.path[:0] = sys.argv[1:3]
import torch, dcgan
dcgan.train = lambda args: dcgan.load_images(args)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    dcgan.main(sys.argv[3:])
finally:
    print("KiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def cost(folder, count, path):
    """MiB that a process needs for a set of so many copies of an image, and the seconds that it takes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for i in range(count):
        os.link(path, folder / f"{i}{path.suffix}")
    roots = str(Path(__file__).parent.parent), str(Path(__file__).parent)
    flags = ["--data", str(folder), "--size", "28", "--device", "cpu", "--run", str(folder.parent / "run")]
    begun = time.monotonic()
    command = [sys.executable, "-c", CHILD, *roots, *flags]
    end = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if end.returncode or end.stderr:
        raise RuntimeError(end.stderr)
    return int(end.stdout.split("KiB")[1]) / 1024, time.monotonic() - begun


def weigh(lab):
    """Print what the largest images cost, one alone, and four, as many as are decoded at a time."""
    worst = 0, 0
    for kind in LARGE:
        path = large(kind, lab.folder)
        one, four = (cost(lab.folder / "set", count, path) for count in (1, 4))
        worst = max(worst[0], one[0]), max(worst[1], four[0])
        print("{:14} {:7.0f} MiB {:5.1f} s, four {:7.0f} MiB {:5.1f} s".format(kind, *one, *four), flush=True)
        path.unlink()
    print("{:,} pixels each; the worst one {:.0f} MiB, four {:.0f} MiB".format(math.prod(LARGEST), *worst))


def main():
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="in all")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--seed", type=int, default=0, help="of all inputs")
    parser.add_argument("--seconds", type=float, default=math.inf, help="at most")
    parser.add_argument("--memory", action="store_true", help="instead: weigh the largest images")
    parser.add_argument("--folder", type=Path, help="work there, where faults stay")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    lab, begun, failed, total = Lab(folder), time.monotonic(), False, Counter()
    if args.memory:
        return weigh(lab)
    shares = {kind: KINDS[kind][2] / sum(KINDS[name][2] for name in args.kinds) for kind in args.kinds}
    for kind in args.kinds:
        start, before = time.monotonic(), sum(shares[name] for name in args.kinds[: args.kinds.index(kind) + 1])
        until = begun + args.seconds * before
        ends, known, costs = explore(lab, kind, round(args.inputs * shares[kind]), args.seed, until)
        total, failed = total + ends, failed or bool(known)
        counts = ", ".join(f"{ends[word]} {word}" for word in WORDS)
        high = f"{time.monotonic() - start:.0f} s, the slowest {costs.seconds:.1f} s, the largest {costs.peak:.0f} MiB"
        print(f"{kind:18} {counts}; {ends['faulty']} faulty in {len(known)} ways; {high}", flush=True)
    counts = ", ".join(f"{total[word]} {word}" for word in WORDS)
    print(f"{sum(total[word] for word in WORDS)} inputs, {counts}; {time.monotonic() - begun:.0f} s")
    os.chdir(lab.folder.parent)
    if not args.folder and not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
