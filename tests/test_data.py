"""What users' folders, images and downloads do: what is trained on, with what, and what is refused in a sentence."""

import contextlib
import functools
import http.server
import io
import itertools
import struct
import sys
import tarfile
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROWS, assert_refused, read_checkpoint, read_log, run_main, save_images

import pix2pix

PIX2PIX, CYCLEGAN, GAN, DCGAN, CGAN, TEXT2IMG = ROWS
SMALL = "--size 16 --load-size 16 --ngf 4 --ndf 4 --n-layers 1 --precision fp32 --device cpu --max-steps 1".split()
TAKEN = {  # layout: files and their shades; 0 is trained on as the pair of 10 and 20, 9 is kept for the test
    "test beside": {"0.png": (10, 20), "test/9.png": (30, 40)},
    "train, valid": {"train/0.jpg": (10, 20), "valid/9.png": (30, 40)},
    "A, B": {"A/0.png": [10], "B/0.png": [20], "A/test/9.png": [30], "B/test/9.png": [40]},
    "endings": {"A/0.jpg": [10], "B/0.png": [20]},
    "train_A": {"train_A/0.png": [10], "train_B/0.png": [20], "valA/9.png": [30], "valB/9.png": [40]},
    "Train, Test": {"Train/0.png": (10, 20), "Test/9.png": (30, 40)},
    "training, eval_set": {"training/A/0.png": [10], "training/B/0.png": [20], "eval_set/9.png": (30, 40)},
    "A/train": {"A/train/0.png": [10], "B/train/0.png": [20], "A/test/9.png": [30], "B/test/9.png": [40]},
}
REFUSED = {
    "A/trainA": {"A/trainA/0.png": [10], "B/trainB/0.png": [20]},
    "horse, zebra": {"horse/0.png": (10, 20), "zebra/0.png": (30, 40)},
    "half known": {"trainA/0.png": [10], "trainB/0.png": [20], "horse/0.png": [30]},
    "test only": {"test/0.png": (10, 20)},
    "two splits": {"train/test/0.png": (10, 20)},
}
NO_PAIRS = {  # refused by pix2pix.py
    "no partner": {"A/0.png": [10], "A/1.png": [10], "B/0.png": [20]},
    "0_A beside 0_B": {"0_A.png": [10], "0_B.png": [20]},
    "0_A beside 0_B, wide": {"0_A.png": (10, 20), "0_B.png": (30, 40)},
    "other sizes": {"A/0.png": [10], "B/0.png": (20, 20)},
}


def write(folder, files):
    """PNGs or JPEGs of 16x16 gray pixels for each of the shades in {name: shades}, side by side."""
    for name, shades in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(np.uint8(shades), 16)[None].repeat(16, 0)).save(folder / name)


def layouts(*tables):
    """Run a test for every row and layout of its table."""
    cases = [(row, name, files) for row, table in tables for name, files in table.items()]
    return pytest.mark.parametrize(
        ("row", "name", "files"), cases, ids=[f"{row.name} {name}" for row, name, _ in cases]
    )


@layouts((PIX2PIX, TAKEN), (CYCLEGAN, TAKEN))
def test_layout(row, name, files, monkeypatch, tmp_path):
    """What is trained on, and what is kept for the test; without a test split training images are shown."""
    seen = set()

    def step(x, y):
        seen.add(tuple(int((image.mean() * 127.5 + 127.5).round()) for image in (x, y)))
        return {"loss_D": torch.zeros(())}

    monkeypatch.setattr(row.module, "make_step", lambda args, state: step)
    write(tmp_path / "set", files)
    assert run_main(row, *SMALL, "--data", "set", "--out", "run", "--max-steps", 3) == 0
    kept = {file.stem for file in (tmp_path / "run" / "test").rglob("*.png")}
    assert seen == {(10, 20)} and kept == ({"9"} if any("9." in file for file in files) else {"0"})


@layouts((PIX2PIX, REFUSED | NO_PAIRS), (CYCLEGAN, REFUSED))
def test_no_layout(row, name, files, tmp_path):
    """What is not understood is refused, with the layouts that there are."""
    write(tmp_path / "set", files)
    said = run_main(row, *SMALL, "--data", "set")
    assert_refused(said, "folders named A and B", "A has")
    assert "set" in said and not [*tmp_path.rglob("last.pt")]


def test_what_is_said(call, monkeypatch, tmp_path):
    """Counts, direction, what is left out, what is shown as test, the step and a changed script; then other options."""
    write(tmp_path, {f"set/{i}.png": (10, 20) for i in range(20)})
    write(tmp_path, {f"set/train_ids/{i}.png": [1] for i in range(20)})  # class ids, for the bench
    (tmp_path / "set" / "notes.txt").write_text("mine")
    said = call(PIX2PIX, *SMALL, "--data", "set", "--direction", "BtoA").out
    assert "20 train" in said and "BtoA" in said and "left out: 21 files" in said
    assert len([*tmp_path.glob("runs/pix2pix-set/test/*.png")]) == 16
    (tmp_path / "edited.py").write_text("L2")
    monkeypatch.setattr(pix2pix, "__file__", "edited.py")
    said = call(PIX2PIX, *SMALL, "--data", "set", "--direction", "BtoA", "--max-steps", 2).out
    assert "resuming runs/pix2pix-set at step 1 of" in said and "script was" in said
    assert_refused(call(PIX2PIX, *SMALL, "--data", "set", "--from", "gray").said, "direction")
    assert_refused(call(PIX2PIX, *SMALL, "--data", "facade").said, "facades")
    assert_refused(call(PIX2PIX, *SMALL, "--data", "").said, "--data")
    assert [pix2pix.get_args(["--data", data]).direction for data in ("facades", "./set")] == ["BtoA", "AtoB"]


def test_folder_before_set(row, call, tmp_path):
    """A folder with the name of a set is taken in its place, and it is said; a run folder in it is left out."""
    row.data(tmp_path / "toy")
    for steps in (1, 2):  # other images would be refused
        result = call(row, *row.resume.split(), "--data", "toy", "--out", "toy/run", "--max-steps", steps)
        assert result.said == 0 and (steps == 2 or "toy: " in result.out)


@pytest.mark.parametrize("row", [GAN, DCGAN, CGAN], ids=lambda row: row.name)
def test_training_images(row, call, tmp_path):
    """Splits are kept apart, classes are the folders below, links are followed, hidden files are not read."""
    write(tmp_path, {f"{label}/{i}.png": [200] for label in ("real", "set/train/dogs") for i in range(2)})
    write(tmp_path / "set", {"test/dogs/9.png": [1], "valid/birds/9.png": [1], "train/.x/0.png": [1]})
    (tmp_path / "set" / "train" / "cats").symlink_to(tmp_path / "real")
    result = call(row, *row.tiny.split(), "--data", "set", "--max-steps", 1)
    assert result.said == 0 and ("4 train" in result.out or "4 of 6 images" in result.out)
    assert row is not CGAN or "2 labels: cats, dogs" in result.out
    write(tmp_path, {"tests/test/cats/0.png": [1], "tests/test/dogs/0.png": [1]})
    assert_refused(call(row, *row.tiny.split(), "--data", "tests").said, "training images")


def test_numbers_as_classes(call, tmp_path):
    """Files are named by the class, also where classes are numbers."""
    write(tmp_path / "set", {f"{i}/0.png": [9 * i] for i in range(1, 13)})
    flags = [*CGAN.tiny.split(), "--out", "run"]
    assert call(CGAN, *flags, "--data", "set", "--max-steps", 1).said == 0
    assert call(CGAN, *flags, "--sample", 2, "--label", 10, "--to", "to").said == 0
    assert sorted(file.name for file in (tmp_path / "to").iterdir()) == ["00000-10.png", "00001-10.png"]
    assert_refused(call(CGAN, *flags, "--sample", 2, "--label", 0).said, "--label 0")
    assert CGAN.module.get_args(["--data", "fashion-mnist", "--device", "cpu"]).classes[7] == "sneaker"


def image(kind, pixels, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


EXIF, PAGES = Image.Exif(), {"save_all": True, "append_images": [Image.new("L", (2, 1), 9)]}
EXIF[274] = 6  # the left side is up
BITS, DEEP = np.uint8([[0, 255]]), np.uint16([[0, 4095]])
RGBA, ON_WHITE = np.uint8([[(9, 8, 7, 255), (9, 8, 7, 0), (0, 0, 0, 51)]]), [(9, 8, 7), (255,) * 3, (204,) * 3]


def deep_png(*pixel):
    """A PNG of one RGB pixel with 16 bits a band, which Pillow reads but does not write."""
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(struct.pack(">BHHH", 0, *pixel))),
    )
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


IMAGES = {  # (file, its first row of pixels as gray or RGB, or None if it is refused)
    "16-bit": (image("PNG", np.uint16([[0, 257, 65535]])), [0, 1, 255]),
    "almost black": (image("PNG", DEEP), [0, 15]),
    "--white 4095": (image("PNG", np.uint16([[0, 273, 4095, 5000]])), [0, 17, 255, 255]),
    "32-bit": (image("TIFF", np.int32(DEEP)), None),
    "float": (image("TIFF", np.float32(DEEP)), None),
    "signed": (image("TIFF", DEEP, tiffinfo={339: 2}), None),
    "RGBA": (image("PNG", RGBA), ON_WHITE),
    "RGBA TIFF": (image("TIFF", RGBA), ON_WHITE),
    "16-bit RGB": (deep_png(4095, 4095, 4095), None),
    "infrared": (image("TIFF", RGBA).replace(b"\x52\1\3\0\1\0\0\0\2", b"\x52\1\3\0\1\0\0\0\0"), None),
    "pages": (image("TIFF", Image.new("L", (2, 1)), **PAGES), None),
    "CMYK": (image("TIFF", Image.new("CMYK", (1, 1), (0, 255, 255, 0))), [(255, 0, 0)]),
    "EXIF": (image("JPEG", np.repeat(BITS, 8, 1).repeat(8, 0), exif=EXIF), [0] * 8),
    "cut": (image("PNG", np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8))[:80], None),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_image(kind, tmp_path):
    """An image is read exactly, or refused by name."""
    data, row = IMAGES[kind]
    file = tmp_path / "mine.png"  # Pillow looks at the contents
    file.write_bytes(data)
    if row is None:
        with pytest.raises(SystemExit, match="mine.png"):
            pix2pix.read_image(file)
    else:
        with pytest.warns(match="almost black") if kind == "almost black" else contextlib.nullcontext():
            pixels = np.asarray(pix2pix.read_image(file, 4095 if "white" in kind else 65535))
        assert pixels[0].tolist() == [np.broadcast_to(shade, 3).tolist() for shade in row]


def test_bad_image(row, tmp_path):
    """An image that cannot be read, or is too small, is named, and no run is begun."""
    row.data(tmp_path / "set")
    victim = sorted((tmp_path / "set").rglob("*.png"))[3]
    flags = [*row.resume.split(), "--data", "set", "--max-steps", 1]
    if row in (PIX2PIX, CYCLEGAN):
        assert_refused(run_main(row, *flags, "--size", 64, "--load-size", 64), "--size")
    victim.write_bytes(b"no image")
    assert_refused(run_main(row, *flags), str(victim.relative_to(tmp_path)))
    assert not [*tmp_path.rglob("last.pt")] and not [*tmp_path.glob("data/cache/**/*part*")]


def test_sides_and_places(tmp_path):
    """A is A wherever its folder sorts; test images of photos lie in OUT/test; originals are not overwritten."""
    write(tmp_path, {"set/train/B/0.png": [20], "set/trainA/0.png": [10], "photos/0.png": [10]})
    train, _, _ = pix2pix.load_pairs(pix2pix.get_args([*SMALL, "--data", "set"]))
    assert (train[0, 0].unique().tolist(), train[0, 3].unique().tolist()) == ([10], [20])
    assert run_main(PIX2PIX, *SMALL, "--data", "photos", "--from", "hole", "--out", "run") == 0
    assert [*tmp_path.glob("run/test/*.png")] == [tmp_path / "run" / "test" / "0.png"]
    before = (tmp_path / "photos" / "0.png").read_bytes()
    said = run_main(PIX2PIX, "--out", "run", "--translate", tmp_path / "photos", "--to", "photos")
    assert_refused(said, "overwrite")
    assert (tmp_path / "photos" / "0.png").read_bytes() == before


def test_bad_image_to_translate(call, tmp_path):
    """--translate names a bad file, goes on with the others, and does not end with exit status 0."""
    assert run_main(PIX2PIX, *SMALL, "--out", "run") == 0
    write(tmp_path, {"photos/a.png": [10], "photos/c.png": [10]})
    (tmp_path / "photos" / "b.png").write_text("no image")
    assert_refused(call(PIX2PIX, "--out", "run", "--translate", "photos", "--to", "to").said, "photos/b.png")
    assert sorted(file.name for file in (tmp_path / "to").iterdir()) == ["a.png", "c.png"]


def archive(*names):
    """A .tar.gz with images of two halves."""
    file, data = io.BytesIO(), image("PNG", np.zeros((16, 32), np.uint8))
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


GOOD = archive("facades/train/0.png", "facades/val/0.png")
OUTSIDE = archive("facades/train/0.png", "../../outside.png")
FAULTS = {"refused": None, "page": b"<html>", "cut": GOOD[:99], "outside": OUTSIDE, "other": archive("maps/0.png")}


@pytest.mark.parametrize("fault", FAULTS)
def test_download(fault, monkeypatch, tmp_path):
    """A download that fails is said with its address and leaves nothing; later the set is there, and asked for once."""
    answers, flags, download = [FAULTS[fault], GOOD], [*SMALL, "--data", "facades"], torch.hub.download_url_to_file

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers.pop(0) or b"")

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        here = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, file: download(here, file))
        said = run_main(PIX2PIX, *flags)
        left = [*tmp_path.glob("data/facades"), *tmp_path.rglob("outside.png")]
        ends = [run_main(PIX2PIX, *flags) for _ in range(2)]
        server.shutdown()
    assert_refused(said, "/facades.tar.gz")
    assert (left, ends, answers) == ([], [0, 0], [])


def test_cache(tmp_path):
    """Images are decoded once, whatever is trained on them, and anew when a file or its use changes."""
    save_images(tmp_path / "set", range(3), 32, 16)

    def count(*flags):
        assert run_main(PIX2PIX, *SMALL, "--data", "set", "--fresh", *flags) == 0
        return len([*tmp_path.glob("data/cache/*.npy")])

    assert [count(), count(), count("--seed", 1), count("--ngf", 5)] == [1, 1, 1, 1]
    write(tmp_path / "set", {"1.png": (10, 20)})
    assert [count(), count(), count("--from", "hole")] == [2, 2, 3]


@pytest.mark.parametrize(("data", "package"), [("svhn", "scipy"), ("celeba", "gdown"), ("lsun", "lmdb")])
def test_missing_reader(data, package, call, monkeypatch):
    """The package that a data set needs is named, by the sentence that misses it and by --help."""
    monkeypatch.setitem(sys.modules, package, None)
    assert_refused(call(DCGAN, "--data", data, "--device", "cpu").said, f"pip install {package}")
    assert f"{data} needs {package}" in call(DCGAN, "--help").out


@pytest.mark.parametrize("close", ["os.close(1);", ""], ids=["none", "pipe"])
def test_closed_output(close, start, tmp_path):
    """A standard output that is not there, or a pipe that closes after the first line, does not end the run."""
    code = f"import os, sys; {close} os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    child = start("-c", code, PIX2PIX.file, *SMALL, "--max-steps", 50, "--out", "run")
    child.stdout.readline()
    child.stdout.close()
    child.wait(60)
    assert read_checkpoint(tmp_path / "run")["step"] == 50


def test_without_a_progress_bar(monkeypatch, tmp_path):
    """TQDM_DISABLE=1, which clusters set, changes nothing but the bar."""
    monkeypatch.setattr(pix2pix, "tqdm", functools.partial(pix2pix.tqdm, disable=True))
    clock = itertools.count(step=1.5)  # a row is due every two seconds, and at the end
    monkeypatch.setattr(pix2pix.time, "monotonic", lambda: next(clock))
    assert run_main(PIX2PIX, *SMALL, "--out", "run", "--max-steps", 5) == 0
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4, 5] and all(row["images_per_s"] > 0 for row in rows)
