"""Pictures into and out of pix2pix.py: kinds of files, layouts, jitter, cache, translation, toy set, downloads."""

import io
import itertools
import os
import socket
import struct
import tarfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pix2pix

TINY = "--size 16 --ngf 4 --ndf 4 --n-layers 1 --device cpu --precision fp32 --max-steps 1".split()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, so that nothing lands in the repository."""
    monkeypatch.chdir(tmp_path)


def settings(folder, *more, load=16):
    """Settings of a small pix2pix on `folder`."""
    given = [*TINY, "--data", folder, "--load-size", load, *more]
    return pix2pix.get_args([*map(str, given)])


def pairs_of(args, split):
    """The pairs of a split as {name: array (height, width, channels of x and y)}."""
    names, read = pix2pix.load_pairs(args, split)
    return {name: read(i).cpu().numpy().transpose(1, 2, 0).copy() for i, name in enumerate(names)}


def loaded(folder, *more, split="train", load=16):
    """The pairs of `folder`, of a small pix2pix."""
    return pairs_of(settings(folder, *more, load=load), split)


def drawn(args, count, begun=0):
    """The first `count` of the batches after update `begun`, as a list of (epoch, x, y)."""
    names, read = pix2pix.load_pairs(args, "train")
    return [*itertools.islice(pix2pix.batches(args, len(names), read, begun), count)]


def main(*argv):
    """What main gives back for a small pix2pix."""
    return pix2pix.main([*TINY, *map(str, argv)])


def refused(capfd, *argv):
    """The one line that main says on standard error before it ends with exit status 2."""
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned, pytest.raises(SystemExit) as ended:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)
        main(*argv)
    said = capfd.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1 and said.endswith("\n") and "Traceback" not in said, said
    assert not [str(warning.message) for warning in warned]  # each would be two more lines there
    return said


def noise(h=16, w=32, c=3, seed=0):
    """A random picture (h, w, c), or (h, w) with c = 0."""
    return np.random.default_rng(seed).integers(0, 256, (h, w, c) if c else (h, w), np.uint8)


def smooth(h=16, w=32):
    """A picture (h, w, 3) without symmetry that lossy formats keep within a few levels."""
    row, col = np.mgrid[:h, :w] / (max(h, w) - 1)
    return np.stack([40 + 150 * row, 60 + 120 * col, 200 - 90 * row - 50 * col], -1).round().astype(np.uint8)


def write(path, pixels, **options):
    """Save an array, or a Pillow image, as `path`, folders and all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def fill(folder, count=3, h=16, w=32, start=0):
    """Make `folder` with `count` random pictures 0.png, 1.png, ..."""
    for i in range(start, start + count):
        write(folder / f"{i}.png", noise(h, w, seed=i))
    return folder


def contents(folder):
    """{path below folder: bytes} of all files."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def opened(path):
    """The pixels of a saved image."""
    with Image.open(path) as image:
        return np.asarray(image)


# -- kinds of images ---------------------------------------------------------------------------------------------------


def png16(pixels):
    """A PNG file of 16 bits a channel, from (h, w, c) or (h, w) uint16: Pillow writes none with colours."""
    h, w = pixels.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.size // (h * w)]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", w, h, 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    parts = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def on_white(rgba):
    """(h, w, 4) composited on white, by the formula."""
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def kinds():
    """{file name: (file's bytes, what it shows as (h, w, 3), tolerance in levels)}, no two with the same stem."""
    colour, grey, rgba = smooth(), smooth()[..., 0], np.dstack([noise(seed=1), noise(c=0, seed=2)])
    in_grey, found = np.repeat(grey[..., None], 3, 2), {}
    rgba[:, ::3, 3], rgba[:, 1::3, 3] = 0, 255
    sharp, bits, shade = noise(seed=3), noise(c=0, seed=4) > 127, noise(c=0, seed=5)
    in_shade, index = np.repeat(shade[..., None], 3, 2), noise(c=0, seed=6) % 5
    table = noise(1, 5, seed=7)[0]
    palette = Image.fromarray(index)
    palette.putpalette(table.tobytes())
    holed = table[index].copy()
    holed[index == 2] = 255
    half = np.dstack([table[index], np.array([0, 64, 128, 192, 255], np.uint8)[index]])
    wide = shade.astype(np.uint16) * 257

    def add(name, pixels, shown, tolerance=0, **options):
        file = io.BytesIO()
        if isinstance(pixels, bytes):
            file.write(pixels)
        else:
            image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
            suffix = Path(name).suffix.lower()
            image.save(file, Image.registered_extensions()[suffix], **options)
        stem, _, suffix = name.rpartition(".")
        found[f"{stem} as {suffix}.{suffix}"] = (file.getvalue(), shown, tolerance)

    add("colour.png", sharp, sharp)
    add("grey.png", shade, in_shade)
    add("bits.png", bits, np.repeat(bits[..., None], 3, 2).astype(np.uint8) * 255)
    add("palette.png", palette, table[index])
    add("palette with a hole.png", palette, holed, transparency=2)
    add("palette with alpha.png", palette, on_white(half), 1, transparency=bytes([0, 64, 128, 192, 255]))
    add(
        "key colour.png",
        sharp,
        np.where((sharp == sharp[3, 3]).all(-1)[..., None], 255, sharp).astype(np.uint8),
        transparency=tuple(map(int, sharp[3, 3])),
    )
    add("alpha.png", rgba, on_white(rgba), 1)
    add("grey alpha.png", Image.fromarray(rgba[..., [0, 3]], "LA"), on_white(rgba[..., [0, 0, 0, 3]]), 1)
    add("16 bits.png", Image.fromarray(wide), in_shade)
    add("dark 16 bits.png", Image.fromarray(np.uint16(shade.astype(np.uint16) * 10)), in_shade // 25, 1)
    add("16 bits colour.png", png16(sharp.astype(np.uint16) * 257), sharp)
    add("16 bits alpha.png", png16(rgba.astype(np.uint16) * 257), on_white(rgba), 1)
    add(
        "16 bits grey alpha.png", png16(rgba[..., [0, 3]].astype(np.uint16) * 257), on_white(rgba[..., [0, 0, 0, 3]]), 1
    )
    add("colour.jpg", colour, colour, 6, quality=95)
    add("grey.jpg", grey, in_grey, 6, quality=95)
    add("cmyk.jpg", Image.fromarray(colour).convert("CMYK"), colour, 12, quality=95)
    add("progressive.jpeg", colour, colour, 6, quality=95, progressive=True)
    add("colour.webp", sharp, sharp, lossless=True)
    add("lossy.webp", colour, colour, 12, quality=95)
    add("alpha.webp", rgba, on_white(rgba), 1, lossless=True, exact=True)
    add("colour.bmp", sharp, sharp)
    add("grey.bmp", shade, in_shade)
    add("palette.bmp", palette, table[index])
    add("bits.bmp", bits, np.repeat(bits[..., None], 3, 2).astype(np.uint8) * 255)
    add("colour.tif", sharp, sharp)
    add("packed.tiff", sharp, sharp, compression="tiff_lzw")
    add("grey.tif", shade, in_shade)
    add("palette.tif", palette, table[index])
    add("alpha.tif", rgba, on_white(rgba), 1)
    add("cmyk.tif", Image.fromarray(colour).convert("CMYK"), colour, 12)
    add("16 bits.tif", Image.fromarray(wide), in_shade)
    add("dark 16 bits.tif", Image.fromarray(np.uint16(shade.astype(np.uint16) * 10)), in_shade // 25, 1)
    add("16 bits, other end first.tif", Image.frombytes("I;16B", (32, 16), wide.astype(">u2").tobytes()), in_shade)
    add("UPPER.PNG", sharp, sharp)
    add("Mixed.Jpg", colour, colour, 6, quality=95)
    add("ein Bild für 猫 – №1.png", sharp, sharp)
    return found


KINDS = kinds()


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """A folder with an image of each kind below a/, and below b/ what it shows, as plain PNG."""
    folder = tmp_path_factory.mktemp("album")
    for name, (file, shown, _) in KINDS.items():
        (folder / "a").mkdir(exist_ok=True)
        (folder / "a" / name).write_bytes(file)
        write(folder / "b" / f"{name}.png", shown)
    return folder


@pytest.fixture(scope="module")
def album_pairs(album):
    """All of the album as pairs: {stem: (h, 2 h, 3)}, the halves side by side again."""
    pairs = loaded(album / "a").items()
    return {name: np.concatenate([pair[..., :3], pair[..., 3:]], 1) for name, pair in pairs}


def test_all_kinds_are_taken(album_pairs):
    """Every image of the album becomes a pair."""
    assert album_pairs.keys() == {Path(name).stem for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_kind(name, album_pairs):
    """An image of this kind is read as what it shows: 8 bits, RGB, on white."""
    _, shown, tolerance = KINDS[name]
    assert abs(album_pairs[Path(name).stem].astype(int) - shown).max() <= tolerance


def stored(upright, orientation):
    """How a camera stores `upright` under an EXIF orientation, which names the visual sides of row 0 and column 0."""
    turned = upright if orientation < 5 else upright.swapaxes(0, 1)
    rows, columns = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}[
        orientation
    ]
    return turned[::rows, ::columns]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation, suffix, tmp_path):
    """All eight orientations are turned upright, in every format that knows them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored(smooth(), orientation)))
    options = {"jpg": dict(quality=98), "webp": dict(lossless=True)}.get(suffix, {})
    write(tmp_path / "set" / f"a.{suffix}", image, exif=exif, **options)
    pair = loaded(tmp_path / "set")["a"]
    upright = np.concatenate([pair[..., :3], pair[..., 3:]], 1).astype(int)
    assert abs(upright - smooth()).max() <= (6 if suffix == "jpg" else 0)


@pytest.mark.parametrize("c_out", range(1, 5))
@pytest.mark.parametrize("c_in", range(1, 5))
@pytest.mark.parametrize("layout", ["halves", "folders"])
def test_channels(c_in, c_out, layout, tmp_path):
    """1 to 4 channels each: grey, grey and alpha, colour, colour and alpha; where alpha is not kept it shows white."""
    values = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 2), np.uint8)
    values[..., 1] = np.where(values[..., 1] > 127, 255, 0)
    a, b = (half[..., [0, 0, 0, 1]] for half in values)
    if layout == "halves":
        write(tmp_path / "set" / "1.png", np.concatenate([a, b], 1))
    else:
        write(tmp_path / "set" / "A" / "1.png", a)
        write(tmp_path / "set" / "B" / "1.png", b)
    pair = loaded(tmp_path / "set", "--in-channels", c_in, "--out-channels", c_out)["1"]
    for got, image, channels in ((pair[..., :c_in], a, c_in), (pair[..., c_in:], b, c_out)):
        if channels in (1, 3):
            expected = on_white(image)[..., :channels]
        else:
            expected = image[..., -channels:]
            got, expected = (np.where(p[..., -1:] > 0, p, 0) for p in (got, expected))  # hidden colours do not matter
        assert np.array_equal(got, expected)


def test_other_files_are_ignored(tmp_path):
    """Hidden files, hidden folders and files that are no images are not looked at."""
    folder = fill(tmp_path / "set" / "train")
    for name in (
        ".DS_Store",
        "._0.png",
        ".hidden.jpg",
        "Thumbs.db",
        "notes.txt",
        "labels.json",
        "noextension",
        "x.png.zip",
    ):
        (folder / name).write_bytes(b"no image at all")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "0.png").write_bytes(b"no image at all")
    assert sorted(loaded(tmp_path / "set")) == ["0", "1", "2"]


# -- bad input ---------------------------------------------------------------------------------------------------------


def untouched(folder, run):
    """Nothing was trained and nothing is left half-written."""
    assert not run.exists() or not [*run.rglob("*.pt")]
    assert not [*folder.rglob("*.part")]


def test_missing_folder(tmp_path, capfd):
    """A folder that is not there is named, and so are the sets."""
    said = refused(capfd, "--data", tmp_path / "nowhere", "--run", tmp_path / "run")
    assert "nowhere" in said and "facades" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inside", ["", "train", "A", "train/A", "notes"])
def test_empty_folder(inside, tmp_path, capfd):
    """A folder without images is named, also where it has empty folders inside."""
    (tmp_path / "hollow" / inside).mkdir(parents=True)
    assert "hollow" in refused(capfd, "--data", tmp_path / "hollow", "--run", tmp_path / "run")
    untouched(tmp_path / "hollow", tmp_path / "run")


def test_data_is_a_file(tmp_path, capfd):
    """An image is no folder of pairs."""
    write(tmp_path / "one.png", noise())
    assert "one.png" in refused(capfd, "--data", tmp_path / "one.png", "--run", tmp_path / "run")


HUGE = png16(np.zeros((1, 1), np.uint16)).replace(struct.pack(">II", 1, 1), struct.pack(">II", 40_000, 40_000))
BAD = {
    "empty.png": b"",
    "empty.jpg": b"",
    "text.png": b"I am not an image.\nNor am I.\n",
    "text.tif": b"II*\0 this is no directory",
    "page.jpg": b"<html><body>Not found</body></html>",
    "zeros.webp": bytes(500),
    "signature.png": b"\x89PNG\r\n\x1a\n",
    "bomb.png": HUGE,
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_image(split, name, tmp_path, capfd):
    """One bad image among good ones, in either split, is named before anything is trained."""
    for part in ("train", "test"):
        fill(tmp_path / "set" / part)
    (tmp_path / "set" / split / name).write_bytes(BAD[name])
    assert name in refused(capfd, "--data", tmp_path / "set", "--run", tmp_path / "run")
    untouched(tmp_path / "set", tmp_path / "run")
    (tmp_path / "set" / split / name).unlink()
    main("--data", tmp_path / "set", "--run", tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "lzw.tif"])
def test_truncated_image(suffix, share, tmp_path, capfd):
    """An image that was cut off is named, wherever it was cut, for training and for translation."""
    fill(tmp_path / "set")
    options = dict(compression="tiff_lzw") if "lzw" in suffix else {}
    bad = write(tmp_path / "set" / f"cut.{suffix}", noise(64, 128), **options)
    file = bad.read_bytes()
    bad.write_bytes(file[: int(share * len(file))])
    assert bad.name in refused(capfd, "--data", tmp_path / "set", "--run", tmp_path / "run")
    untouched(tmp_path / "set", tmp_path / "run")


@pytest.mark.parametrize("h, w", [(16, 33), (40, 41)])
def test_odd_width(h, w, tmp_path, capfd):
    """Halves of an odd width do not match."""
    fill(tmp_path / "set")
    write(tmp_path / "set" / "odd.png", noise(h, w))
    assert "odd.png" in refused(capfd, "--data", tmp_path / "set", "--run", tmp_path / "run")
    untouched(tmp_path / "set", tmp_path / "run")


@pytest.mark.parametrize("h, w", [(15, 32), (16, 30), (1, 2), (8, 256)])
def test_smaller_than_crop(h, w, tmp_path, capfd):
    """Halves smaller than --size are named."""
    fill(tmp_path / "set")
    write(tmp_path / "set" / "small.png", noise(h, w))
    said = refused(capfd, "--data", tmp_path / "set", "--run", tmp_path / "run")
    assert "small.png" in said and "--size" in said
    untouched(tmp_path / "set", tmp_path / "run")


def test_smaller_than_another_crop(tmp_path, capfd):
    """The check of sizes does not depend on which settings the folder was used with before."""
    fill(tmp_path / "set" / "train", h=20, w=40)
    fill(tmp_path / "set" / "test", h=40, w=80)
    main("--data", tmp_path / "set", "--run", tmp_path / "run", "--load-size", 32)
    again = ("--data", tmp_path / "set", "--run", tmp_path / "other", "--size", 32, "--load-size", 32)
    assert "--size" in refused(capfd, *again)


def test_sizes_of_partners(tmp_path, capfd):
    """A and B of different sizes are named."""
    fill(tmp_path / "set" / "A", w=16)
    fill(tmp_path / "set" / "B", w=16)
    write(tmp_path / "set" / "B" / "1.png", noise(16, 17))
    assert "1.png" in refused(capfd, "--data", tmp_path / "set", "--run", tmp_path / "run")
    untouched(tmp_path / "set", tmp_path / "run")


@pytest.mark.parametrize("a, b", [("A", "B"), ("trainA", "trainB"), ("train/A", "train/B"), ("A/train", "B/train")])
def test_missing_partners(a, b, tmp_path, capfd):
    """Images without a partner are named, on either side; so is a side that is missing as a whole."""
    fill(tmp_path / "set" / a, 3, w=16)
    assert b in refused(capfd, "--data", tmp_path / "set", "--run", tmp_path / "run")
    fill(tmp_path / "set" / b, 3, w=16)
    write(tmp_path / "set" / a / "lonely.png", noise(16, 16))
    write(tmp_path / "set" / b / "alone.png", noise(16, 16))
    said = refused(capfd, "--data", tmp_path / "set", "--run", tmp_path / "run")
    assert "lonely" in said and "alone" in said
    untouched(tmp_path / "set", tmp_path / "run")


def test_many_missing_partners(tmp_path, capfd):
    """However many partners are missing, it is said in one line of bearable length, with their number."""
    fill(tmp_path / "set" / "A", 40, w=16)
    fill(tmp_path / "set" / "B", 1, w=16)
    said = refused(capfd, "--data", tmp_path / "set", "--run", tmp_path / "run")
    assert "39" in said and len(said) < 2000


# -- layouts -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "halves": ("{split}/{name}.png", None),
    "letters last": ("{split}/A/{name}.png", "{split}/B/{name}.png"),
    "letters first": ("A/{split}/{name}.png", "B/{split}/{name}.png"),
    "one word": ("{split}A/{name}.png", "{split}B/{name}.png"),
    "partners of another kind": ("{split}/A/{name}.png", "{split}/B/{name}.TIFF"),
}


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
@pytest.mark.parametrize("test", ["test", "val"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, test, direction, tmp_path):
    """Pairs are found in every layout, with their test split; BtoA swaps them."""
    seed, expected = itertools.count(), {}
    for split, names in (("train", ("x", "y", "deep/z")), (test, ("x", "w"))):
        for name in names:
            a, b = noise(16, 16, seed=next(seed)), noise(16, 16, seed=next(seed))
            path_a, path_b = (
                path and tmp_path / "set" / path.format(split=split, name=name) for path in LAYOUTS[layout]
            )
            if path_b:
                write(path_a, a)
                write(path_b, b)
            else:
                write(path_a, np.concatenate([a, b], 1))
            expected[split, name] = np.dstack([a, b] if direction == "AtoB" else [b, a])
    for split in ("train", test):
        pairs = loaded(tmp_path / "set", "--direction", direction, split="train" if split == "train" else "test")
        assert {(split, name) for name in pairs} == {key for key in expected if key[0] == split}
        for name in pairs:
            assert np.array_equal(pairs[name], expected[split, name])


@pytest.mark.parametrize("letters", [False, True])
def test_flat_folder(letters, tmp_path):
    """A folder of pairs, or of A/ and B/, without splits is all for training; the test split shows some of them."""
    for part in ("A", "B") if letters else (".",):
        fill(tmp_path / "set" / part, 20, w=16 if letters else 32)
    train, test = (loaded(tmp_path / "set", split=split) for split in ("train", "test"))
    assert len(train) == 20 and 0 < len(test) <= 20 and test.keys() <= train.keys()
    if letters:
        assert all(
            np.array_equal(train[name][..., :3], opened(tmp_path / "set" / "A" / f"{name}.png")) for name in train
        )


@pytest.mark.parametrize("test", ["test", "val"])
def test_flat_folder_with_test(test, tmp_path):
    """Pairs beside a test folder are for training, and those in it are not."""
    fill(tmp_path / "set", 4)
    fill(tmp_path / "set" / test, 2, start=10)
    assert sorted(loaded(tmp_path / "set")) == ["0", "1", "2", "3"]
    assert sorted(loaded(tmp_path / "set", split="test")) == ["10", "11"]


def test_same_stems(tmp_path):
    """Images that differ in nothing but the suffix are all trained on."""
    for i, suffix in enumerate(("png", "bmp", "tif")):
        write(tmp_path / "set" / f"same.{suffix}", noise(seed=i))
    firsts = [pair[0, 0, :3].tolist() for pair in loaded(tmp_path / "set").values()]
    assert sorted(firsts) == sorted(noise(seed=i)[0, 0].tolist() for i in range(3))


def test_test_split_is_translated(tmp_path):
    """Training ends with the test split translated, an image each, under its name."""
    fill(tmp_path / "set" / "train")
    fill(tmp_path / "set" / "val", 2, start=5)
    run = main("--data", tmp_path / "set", "--run", tmp_path / "run")
    assert sorted(file.name for file in (run / "test").glob("*.png")) == ["5.png", "6.png"]
    assert opened(run / "test" / "5.png").shape == (16, 16, 3)


# -- batches -----------------------------------------------------------------------------------------------------------


def levels(image):
    """[-1, 1] back to 0 .. 255, exactly."""
    return ((image.double() + 1) * 127.5).round().int()


def test_values(tmp_path):
    """x and y are float32 in [-1, 1]: 0 is -1 and 255 is 1, pixel by pixel."""
    a, b = noise(16, 16, seed=1), noise(16, 16, seed=2)
    a[0, 0], b[0, 0] = (0, 255, 51), (255, 102, 0)
    write(tmp_path / "set" / "1.png", np.concatenate([a, b], 1))
    args = settings(tmp_path / "set", "--no-mirror")
    ((epoch, x, y),) = drawn(args, 1)
    assert epoch == 1 and x.dtype == y.dtype == torch.float32
    assert x[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.6]) and y[0, :, 0, 0].tolist() == pytest.approx(
        [1, -0.2, -1]
    )
    for image, pixels in ((x, a), (y, b)):
        assert image.shape == (1, 3, 16, 16) and image.min() == -1 and image.max() == 1
        torch.testing.assert_close(image[0], torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1).float())


@pytest.mark.parametrize("mirror", [True, False])
def test_jitter(mirror, tmp_path):
    """Crops start at every offset up to --load-size less --size; half are mirrored, or none; y goes along."""
    row, col = np.mgrid[:20, :20].astype(np.uint8)
    a = np.stack([10 * row, 10 * col, 0 * row], -1)
    write(tmp_path / "set" / "1.png", np.concatenate([a, 255 - a], 1))
    args = settings(tmp_path / "set", "--batch-size", 4, *[] if mirror else ["--no-mirror"], load=20)
    tops, lefts, mirrored = [], [], []
    for _, x, y in drawn(args, 100):
        assert x.shape == (4, 3, 16, 16) and torch.equal(levels(y), 255 - levels(x))
        for image in levels(x) // 10:
            flip = bool(image[1, 0, 0] > image[1, 0, 1])
            image = image.flip(-1) if flip else image
            top, left = image[:2, 0, 0].tolist()
            assert np.array_equal(image.permute(1, 2, 0) * 10, a[top : top + 16, left : left + 16])
            tops, lefts, mirrored = [*tops, top], [*lefts, left], [*mirrored, flip]
    for offsets in (tops, lefts):
        counts = np.bincount(offsets)
        assert len(counts) == 5 and counts.min() > 50  # 80 are expected of each
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.2
    assert 140 < sum(mirrored) < 260 if mirror else not any(mirrored)


@pytest.mark.parametrize("batch", [1, 2, 3, 16])
def test_every_pair_once_an_epoch(batch, tmp_path):
    """An epoch holds each pair once, in an order of its own, also where batches reach into the next."""
    for i in range(7):
        write(tmp_path / "set" / f"{i}.png", np.full((16, 32, 3), 30 * i, np.uint8))
    args = settings(tmp_path / "set", "--batch-size", batch)
    batches = drawn(args, 21)
    ids = torch.cat([levels(x)[:, 0, 0, 0] // 30 for _, x, _ in batches]).tolist()
    epochs = [tuple(ids[i : i + 7]) for i in range(0, len(ids), 7)]
    assert all(sorted(epoch) == [*range(7)] for epoch in epochs) and len(set(epochs)) > 1
    for step, (epoch, _, _) in enumerate(batches):  # that of a batch's first pair, or of its last
        assert batch * step // 7 < epoch <= (batch * step + batch - 1) // 7 + 1


def test_batches_follow_seed_and_step(tmp_path):
    """A batch depends on the seed and the step alone: not on what came before, nor on the state of any generator."""
    folder = fill(tmp_path / "set", 5, 20, 40)
    args = settings(folder, "--batch-size", 2, "--seed", 3, load=20)
    whole = drawn(args, 12)
    torch.rand(3), np.random.rand(3)
    for begun in (0, 1, 7):
        for (epoch, x, y), (other, x2, y2) in zip(drawn(args, 5, begun), whole[begun:]):
            assert epoch == other and torch.equal(x, x2) and torch.equal(y, y2)
    args = settings(folder, "--batch-size", 2, "--seed", 4, load=20)
    assert not all(torch.equal(x, x2) for (_, x, _), (_, x2, _) in zip(drawn(args, 5), whole))


def test_resized_to_load_size(tmp_path):
    """Training pairs are scaled to --load-size, test pairs to --size, smoothly and without a shift."""
    ramp = np.repeat(np.linspace(0, 255, 64).round().astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    for split in ("train", "test"):
        write(tmp_path / "set" / split / "1.png", np.concatenate([ramp, ramp[:, ::-1]], 1))
    for split, size in (("train", 20), ("test", 16)):
        pair = loaded(tmp_path / "set", split=split, load=20)["1"]
        assert pair.shape == (size, size, 6)
        expected = ramp[:, :, 0].reshape(64, 64).mean(0)
        expected = np.interp((np.arange(size) + 0.5) * 64 / size - 0.5, np.arange(64), expected)
        assert abs(pair[1:-1, 1:-1, 0] - expected[1:-1]).max() <= 3
        assert abs(pair[..., 0].astype(int) - pair[:, ::-1, 3]).max() <= 1


def test_resizing_is_antialiased(tmp_path):
    """A fine chequerboard becomes grey, not another chequerboard."""
    board = np.uint8(255 * (np.indices((128, 256)).sum(0) % 2))
    write(tmp_path / "set" / "1.png", board)
    assert abs(loaded(tmp_path / "set")["1"][2:-2, 2:-2].astype(int) - 127).max() < 12


# -- cache -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """The files that read_image was called with."""
    seen, original = [], pix2pix.read_image

    def read_image(path, *more):
        seen.append(Path(path).name)
        return original(path, *more)

    monkeypatch.setattr(pix2pix, "read_image", read_image)
    return seen


def same(one, other):
    """Whether two dicts of arrays are equal."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_second_start_decodes_nothing(tmp_path, reads):
    """Images are decoded once; the next start takes them from the cache and gets the same."""
    folder = fill(tmp_path / "set")
    first = loaded(folder)
    assert sorted(reads) == ["0.png", "1.png", "2.png"]
    assert same(loaded(folder), first) and len(reads) == 3
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    "change", ["edited", "added", "removed", "renamed", "replaced by an older one", "folder replaced by an older one"]
)
def test_changes_are_noticed(change, tmp_path):
    """What was changed since the last start is decoded anew."""
    folder, older = fill(tmp_path / "set" / "train"), fill(tmp_path / "older", start=7)
    for name in ("0", "1", "2"):
        os.replace(older / f"{int(name) + 7}.png", older / f"{name}.png")
    time.sleep(0.05)
    loaded(folder.parent)
    time.sleep(0.05)
    if change == "edited":
        write(folder / "1.png", noise(seed=9))
    elif change == "added":
        write(folder / "3.png", noise(seed=9))
    elif change == "removed":
        (folder / "1.png").unlink()
    elif change == "renamed":
        os.replace(folder / "0.png", folder / "9.png")
    elif change == "replaced by an older one":
        os.replace(older / "1.png", folder / "1.png")
    else:
        os.replace(folder, tmp_path / "away")
        os.replace(older, folder)
    expected = {file.stem: opened(file) for file in folder.glob("*.png")}
    expected = {name: np.dstack([pixels[:, :16], pixels[:, 16:]]) for name, pixels in expected.items()}
    assert same(loaded(folder.parent), expected)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_cut_cache_is_rebuilt(keep, tmp_path):
    """A cache file that was cut off is made again."""
    folder = fill(tmp_path / "set")
    before = contents(folder).keys()
    first = loaded(folder)
    caches = [folder / name for name in contents(folder).keys() - before]
    assert caches
    for cache in caches:
        cache.write_bytes(cache.read_bytes()[:keep])
    assert same(loaded(folder), first)


@pytest.mark.parametrize(
    "one, other",
    [
        ("", "--direction BtoA"),
        ("--in-channels 1 --out-channels 3", "--in-channels 3 --out-channels 1"),
        ("--in-channels 2 --out-channels 2", "--in-channels 3 --out-channels 1"),
        ("", "--from hole"),
        ("--from edges", "--in-channels 1 --out-channels 3"),
    ],
)
def test_settings_do_not_share_a_cache(one, other, tmp_path):
    """Settings that want other pixels do not get those of the settings before."""
    folder, fresh = fill(tmp_path / "set", w=32), fill(tmp_path / "fresh", w=32)
    loaded(folder, *one.split())
    assert same(loaded(folder, *other.split()), loaded(fresh, *other.split()))


def test_read_only_folders_do_not_share_a_cache(tmp_path, monkeypatch):
    """Two folders of one name that cannot be written to are told apart."""
    one, other = fill(tmp_path / "one" / "set"), fill(tmp_path / "other" / "set", start=5)
    for i in range(3):
        os.replace(other / f"{i + 5}.png", other / f"{i}.png")
    expected = loaded(fill(tmp_path / "again", start=5))
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "set" not in str(path) and writable(path, mode))
    time.sleep(0.05)
    first, second = loaded(one), loaded(other)
    assert not same(first, second) and np.array_equal(second["0"], expected["5"])


# -- pairs made of photos ----------------------------------------------------------------------------------------------


def first_batch(folder, *more):
    """Settings, and x and y of the first batch, unmirrored."""
    args = settings(folder, "--no-mirror", *more)
    _, x, y = drawn(args, 1)[0]
    return args, x, y


def test_gray_is_lightness(tmp_path):
    """--from gray: x is L, y is ab of CIE Lab; a grey photo has no ab, white and black are the ends of L."""
    photo = np.full((16, 16, 3), 119, np.uint8)
    photo[:4], photo[4:8], photo[8:12] = 0, 255, (255, 0, 0)
    write(tmp_path / "set" / "1.png", photo)
    _, x, y = first_batch(tmp_path / "set", "--from", "gray")
    assert x.shape == (1, 1, 16, 16) and y.shape == (1, 2, 16, 16)
    light = (x[0, 0, :, 0] + 1) * 50  # L is 0 .. 100
    assert light[[0, 4, 8, 12]].tolist() == pytest.approx([0, 100, 54, 50], abs=1.5)
    assert y[0, :, [0, 4, 12]].abs().max() < 0.012  # a level and a half
    assert (y[0, :, 8, 0] > 0.5).all()  # red is +a, and a little less +b


def test_gray_round_trip(tmp_path):
    """--from gray: y joined to x by the script's own picture is the photo again, but for Lab's rounding to bytes."""
    photo = smooth(16, 16)
    photo[:8, :8] = (200, 40, 60)
    write(tmp_path / "set" / "1.png", photo)
    args, x, y = first_batch(tmp_path / "set", "--from", "gray")
    again = np.asarray(pix2pix.picture(args, y[0], x[0]))
    off = abs(again.astype(int) - photo)  # a dark channel in a bright colour can be several levels off
    assert again.shape == (16, 16, 3) and off.mean() < 1 and np.quantile(off, 0.95) <= 3 and off.max() < 24


def test_hole(tmp_path):
    """--from hole: the middle of x, half as wide and high, is 1; the rest of x is y, and y is the photo."""
    photo = noise(16, 16) // 2
    write(tmp_path / "set" / "1.png", photo)
    _, x, y = first_batch(tmp_path / "set", "--from", "hole")
    hole = torch.zeros(16, 16, dtype=torch.bool)
    hole[4:12, 4:12] = True
    assert np.array_equal(levels(y)[0].permute(1, 2, 0), photo)
    assert (x[..., hole] == 1).all() and torch.equal(x[..., ~hole], y[..., ~hole])


def test_edges(tmp_path):
    """--from edges: a drawing in black and white of the photo; a line along a step, and none where it is flat."""
    step = np.full((16, 16, 3), 40, np.uint8)
    step[:, 8:] = 220
    for i, photo in enumerate((np.full((16, 16, 3), 90, np.uint8), step, noise(16, 16))):
        write(tmp_path / "set" / f"{i}.png", photo)
    flat, line, any_ = loaded(tmp_path / "set", "--from", "edges").values()
    assert flat.shape == (16, 16, 4) and set(np.unique([flat[..., 0], line[..., 0], any_[..., 0]])) == {0, 255}
    assert np.array_equal(line[..., 1:], step)
    paper = flat[0, 0, 0]
    assert (flat[..., 0] == paper).all()
    assert (line[:, [7, 8], 0] != paper).all() and (line[:, [*range(5), *range(11, 16)], 0] == paper).all()
    assert line[:, 0, 0].tolist() == line[:, 15, 0].tolist()  # no line along the border


@pytest.mark.parametrize("source", ["gray", "hole", "edges"])
@pytest.mark.parametrize("split", [True, False])
def test_photos_in_class_folders(source, split, tmp_path, capfd):
    """--from takes a folder of photos with a folder for each class, and trains and translates."""
    for part in ("train", "test") if split else (".",):
        for kind in ("iris", "daisy", "A"):
            write(tmp_path / "set" / part / kind / "1.jpg", smooth(20, 24))
            write(tmp_path / "set" / part / kind / "2.png", smooth(24, 20))
    given = ("--data", tmp_path / "set", "--run", tmp_path / "run", "--from", source)
    assert len(loaded(tmp_path / "set", "--from", source)) == 6
    main(*given)
    to = main(*given, "--translate", tmp_path / "set")
    shapes = [opened(file).shape for file in sorted(to.rglob("1*.png"))]
    assert shapes == [(20, 24, 3)] * (6 if split else 3)


# -- translation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was trained for two updates."""
    folder = fill(tmp_path_factory.mktemp("pairs"))
    return main("--data", folder, "--run", tmp_path_factory.mktemp("runs") / "run", "--max-steps", 2)


SIZES = [(3, 5), (1, 1), (1, 40), (16, 16), (17, 31), (48, 32), (70, 101)]


def test_translate_folder(run, tmp_path):
    """Every image of a folder, of any size, gets a PNG of its size; inputs stay; a comparison is beside."""
    photos = tmp_path / "photos"
    for i, (h, w) in enumerate(SIZES):
        write(photos / ("below/deeper" if i % 2 else ".") / f"{i}.png", noise(h, w))
    (photos / "notes.txt").write_text("no image")
    before = contents(photos)
    to = main("--run", run, "--translate", photos, "--to", tmp_path / "out")
    assert to == tmp_path / "out" and contents(photos) == before
    for i, (h, w) in enumerate(SIZES):
        pixels = opened(to / ("below/deeper" if i % 2 else ".") / f"{i}.png")
        assert pixels.shape == (h, w, 3) and pixels.dtype == np.uint8
    comparison = opened(to.with_name("out-comparison.png"))
    assert comparison.ndim == 3 and comparison.std() > 0
    assert len(contents(to)) == len(SIZES)


def test_translate_file(run, tmp_path):
    """A single file is translated to RUN/translated, as it would be among others."""
    photos = tmp_path / "photos"
    for i, (h, w) in enumerate(SIZES):
        write(photos / f"{i}.png", noise(h, w, seed=i))
    to = main("--run", run, "--translate", photos, "--to", tmp_path / "all")
    for i in (0, 4, 5):
        alone = main("--run", run, "--translate", photos / f"{i}.png")
        assert alone == run / "translated" and (run / "translated-comparison.png").exists()
        assert np.array_equal(opened(alone / f"{i}.png"), opened(to / f"{i}.png"))


def test_translate_cuts_the_hole_in_the_middle(tmp_path):
    """Inpainting cuts the middle out of an image of any size, not of what it is padded to."""
    fill(tmp_path / "set", 2, h=16, w=16)
    write(tmp_path / "in" / "dark.png", np.zeros((24, 48, 3), np.uint8))
    flags = ["--data", tmp_path / "set", "--from", "hole", "--run", tmp_path / "run"]
    main(*flags)
    main(*flags, "--translate", tmp_path / "in", "--to", tmp_path / "out")
    shown = opened(tmp_path / "out-comparison.png")[2:18, 2:18, 0]  # 48x24 in a cell of 16: 16x8, rows 4 to 11
    assert (shown[7:9, 6:10] > 200).all() and (shown[[4, 11]] < 60).all() and (shown[4:12, :3] < 60).all()


def test_translate_is_repeatable(run, tmp_path):
    """Twice the same result, dropout and all; --eval gives another one, the same each time too."""
    write(tmp_path / "photo.png", noise(32, 32))
    results = []
    for i, more in enumerate([[], [], ["--eval"], ["--eval"]]):
        torch.rand(i)
        to = main("--run", run, "--translate", tmp_path / "photo.png", "--to", tmp_path / f"out{i}", *more)
        results.append(opened(to / "photo.png"))
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[2], results[3])
    assert not np.array_equal(results[0], results[2])


def test_translate_leaves_the_run_alone(run, tmp_path):
    """Translation writes where it was told to and changes nothing of the run."""
    write(tmp_path / "photo.png", noise(16, 16))
    before = contents(run)
    main("--run", run, "--translate", tmp_path / "photo.png", "--to", tmp_path / "out")
    assert contents(run) == before


def test_translate_is_by_the_checkpoint(run, tmp_path):
    """The networks are those of the checkpoint, whatever the flags say; an input is the network's x."""
    write(tmp_path / "photo.png", noise(16, 16))
    given = ("--run", run, "--translate", tmp_path / "photo.png")
    plain = opened(main(*given, "--to", tmp_path / "a") / "photo.png")
    flags = "--size 64 --ngf 8 --norm instance --no-skips --seed 7 --out-channels 1 --in-channels 4".split()
    assert np.array_equal(opened(main(*given, "--to", tmp_path / "b", *flags) / "photo.png"), plain)
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    args = settings("toy", "--eval")
    G = pix2pix.build(args)["G"]
    G.load_state_dict(checkpoint["G"])
    x = torch.from_numpy(noise(16, 16).transpose(2, 0, 1) / 127.5 - 1).float()[None]
    with torch.no_grad():
        expected = levels(G.eval()(x))[0].permute(1, 2, 0)
    got = opened(main(*given, "--to", tmp_path / "c", "--eval") / "photo.png")
    assert abs(got.astype(int) - np.asarray(expected)).max() <= 1


def test_translate_kinds(run, album, tmp_path):
    """Every kind of image is translated as the plain PNG of what it shows, whole in width and height."""
    kinds = main("--run", run, "--translate", album / "a", "--to", tmp_path / "kinds")
    plain = main("--run", run, "--translate", album / "b", "--to", tmp_path / "plain")
    results = contents(kinds)
    assert len(results) == len(KINDS)
    exact = {contents(plain)[f"{name}.png"] for name, (_, _, tolerance) in KINDS.items() if not tolerance}
    assert exact <= {*results.values()}
    assert {opened(kinds / name).shape for name in results} == {(16, 32, 3)}


@pytest.mark.parametrize("orientation", [3, 6])
def test_translate_upright(orientation, run, tmp_path):
    """A photo that a camera held sideways comes out upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "in" / "turned.png", np.ascontiguousarray(stored(smooth(16, 48), orientation)), exif=exif)
    write(tmp_path / "in" / "upright.png", smooth(16, 48))
    to = main("--run", run, "--translate", tmp_path / "in", "--to", tmp_path / "out")
    assert np.array_equal(opened(to / "turned.png"), opened(to / "upright.png"))


def test_translate_same_stems(run, tmp_path):
    """photo.png and photo.jpg, and one called like the comparison, all get a translation of their own."""
    names = ["photo.jpg", "photo.png", "photo.tif", "sub/photo.png", "comparison.png"]
    for i, name in enumerate(names):
        write(tmp_path / "in" / name, noise(16 + i, 40))
    to = main("--run", run, "--translate", tmp_path / "in", "--to", tmp_path / "out")
    heights = [opened(file).shape[0] for file in to.rglob("*.png") if opened(file).shape[1:] == (40, 3)]
    assert sorted(heights) == [16, 17, 18, 19, 20]


@pytest.mark.parametrize("to", ["photos", "photos/sub", "photos/../photos"])
def test_translate_into_the_inputs(to, run, tmp_path, capfd):
    """Inputs are never overwritten, even if the results are sent to their folder."""
    photos = fill(tmp_path / "photos", 2)
    fill(photos / "sub", 2)
    before = contents(photos)
    try:
        main("--run", run, "--translate", photos, "--to", tmp_path / to)
    except SystemExit as ended:  # refused, with a sentence
        assert ended.code == 2 and "photos" in capfd.readouterr().err
    assert contents(photos).items() >= before.items()


@pytest.mark.parametrize("c_in, c_out, mode", [(3, 1, "L"), (1, 3, "RGB"), (1, 2, "LA"), (4, 4, "RGBA")])
def test_translate_channels(c_in, c_out, mode, tmp_path):
    """Results have as many channels as were trained: L for one, RGB for three, alpha with two and four."""
    folder = fill(tmp_path / "set")
    given = ("--data", folder, "--run", tmp_path / "run", "--in-channels", c_in, "--out-channels", c_out)
    main(*given)
    write(tmp_path / "in" / "colour.png", noise(20, 24))
    write(tmp_path / "in" / "alpha.png", noise(20, 24, 4))
    to = main(*given, "--translate", tmp_path / "in")
    for name in ("colour", "alpha"):
        with Image.open(to / f"{name}.png") as image:
            assert image.mode == mode and image.size == (24, 20)


@pytest.mark.parametrize("name", ["nothing.png", "nothing", "notes.txt", "hollow"])
def test_translate_nothing(name, run, tmp_path, capfd):
    """What is not there, or is no image, or holds none, is named."""
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "hollow").mkdir()
    assert name in refused(capfd, "--run", run, "--translate", tmp_path / name, "--to", tmp_path / "out")
    assert not [*(tmp_path / "out").rglob("*")]


@pytest.mark.parametrize("name", BAD)
def test_translate_bad_image(name, run, tmp_path, capfd):
    """A bad image is named, alone and among good ones."""
    fill(tmp_path / "in")
    (tmp_path / "in" / name).write_bytes(BAD[name])
    assert name in refused(capfd, "--run", run, "--translate", tmp_path / "in" / name)
    assert name in refused(capfd, "--run", run, "--translate", tmp_path / "in", "--to", tmp_path / "out")
    assert not [*(tmp_path / "out").rglob("*.part")]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_translate_truncated_image(suffix, run, tmp_path, capfd):
    """An image that was cut off is named."""
    bad = write(tmp_path / f"cut.{suffix}", noise(64, 64))
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    assert bad.name in refused(capfd, "--run", run, "--translate", bad, "--to", tmp_path / "out")


def test_translate_without_a_run(tmp_path, capfd):
    """A run that is not there is named."""
    write(tmp_path / "photo.png", noise(16, 16))
    assert "untrained" in refused(capfd, "--run", tmp_path / "untrained", "--translate", tmp_path / "photo.png")
    assert not (tmp_path / "untrained").exists()


# -- toy set -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
    """Maps, photos and class ids of some streets, channels last."""
    maps, photos, ids = pix2pix.streets(60, 5)
    return maps.transpose(0, 2, 3, 1), photos.transpose(0, 2, 3, 1), ids


def test_streets_follow_the_seed(scenes):
    """The same seed draws the same scenes, in uint8; another seed others, and no two scenes are the same."""
    again, other = pix2pix.streets(60, 5), pix2pix.streets(60, 6)
    assert again[0].shape == again[1].shape == (60, 3, 64, 64) and again[2].shape == (60, 64, 64)
    assert all(part.dtype == np.uint8 for part in again)
    assert np.array_equal(again[0].transpose(0, 2, 3, 1), scenes[0]) and np.array_equal(again[2], scenes[2])
    assert np.array_equal(again[1].transpose(0, 2, 3, 1), scenes[1]) and not np.array_equal(again[1], other[1])
    assert len({photo.tobytes() for photo in scenes[1]}) == len({image.tobytes() for image in scenes[0]}) == 60


def test_street_maps(scenes):
    """Maps show five classes, each in one flat colour of its own, none of them rare."""
    maps, _, ids = scenes
    assert set(np.unique(ids)) == {0, 1, 2, 3, 4}
    colours = [np.unique(maps[ids == i], axis=0) for i in range(5)]
    assert all(len(colour) == 1 for colour in colours) and len({colour.tobytes() for colour in colours}) == 5
    assert (np.bincount(ids.ravel()) > 0.02 * ids.size).all()


def test_street_photos(scenes):
    """The first three classes have one mean colour and are told apart by texture alone; the others by colour."""
    _, photos, ids = scenes
    photos = photos.astype(float)
    means = np.array([photos[ids == i].mean(0) for i in range(5)])
    assert np.ptp(means[:3], axis=0).max() <= 2
    for i, j in ((0, 3), (0, 4), (3, 4)):
        assert abs(means[i] - means[j]).max() > 15
    inside = ids[:, 1:, 1:]  # steps down and across within a class
    down = [abs(np.diff(photos, axis=1))[:, :, 1:][(inside == i) & (ids[:, :-1, 1:] == i)].mean() for i in range(3)]
    across = [abs(np.diff(photos, axis=2))[:, 1:][(inside == i) & (ids[:, 1:, :-1] == i)].mean() for i in range(3)]
    textures = np.array([[photos[ids == i].std(0).mean() for i in range(3)], down, across]).T
    for one, other in itertools.combinations(textures, 2):
        assert (abs(one - other) / (one + other)).max() > 0.1
    assert min(photos[ids == i].std(0).min() for i in range(3)) > 5


def test_toy_pairs():
    """The toy set needs no disk: its splits differ, BtoA swaps, and the test split follows no setting of training."""
    args = pix2pix.get_args(["--data", "toy", "--device", "cpu"])
    train, test = (pairs_of(args, split) for split in ("train", "test"))
    assert len(train) == 600 and len(test) == 100
    scenes = {pair.tobytes() for pair in train.values()}
    assert len(scenes) == 600 and not scenes & {pair.tobytes() for pair in test.values()}
    back = pairs_of(pix2pix.get_args(["--data", "toy", "--device", "cpu", "--direction", "BtoA"]), "test")
    assert all(np.array_equal(np.dstack([test[name][..., 3:], test[name][..., :3]]), back[name]) for name in test)
    assert not [*Path.cwd().iterdir()]


# -- named sets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """Any connection fails the test."""

    def connect(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.mark.parametrize("name", ["facades", "maps", "cityscapes"])
def test_named_set_that_is_there(name, tmp_path, offline):
    """A named set that lies below --data-root is used as it is, without the network."""
    fill(tmp_path / "sets" / name / "train")
    fill(tmp_path / "sets" / name / "val", 2, start=5)
    args = settings(name, "--data-root", tmp_path / "sets")
    assert pix2pix.find_data(args) == tmp_path / "sets" / name
    main("--data", name, "--data-root", tmp_path / "sets", "--load-size", 16, "--run", tmp_path / "run")
    assert len([*(tmp_path / "run" / "test").glob("*.png")]) == 2


def test_cityscapes_is_withheld(tmp_path, capfd, offline):
    """Cityscapes cannot be downloaded: the sentence says where to get it and where to put it."""
    said = refused(capfd, "--data", "cityscapes", "--data-root", tmp_path / "sets", "--run", tmp_path / "run")
    assert "cityscapes-dataset.com" in said and str(tmp_path / "sets" / "cityscapes") in said


def packed(members, prefix="facades/"):
    """A .tar.gz of {name: bytes, or the target of a link as str}."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name if name.startswith(("/", "..")) else prefix + name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def image_file(seed):
    """A PNG file with a pair."""
    file = io.BytesIO()
    Image.fromarray(noise(seed=seed)).save(file, "PNG")
    return file.getvalue()


IMAGES = {f"{split}/{i}.png": image_file(i) for split in ("train", "val") for i in range(3)}
GOOD = packed(IMAGES)


@pytest.fixture
def server(server, monkeypatch):
    """The local server in place of HOST; it has the set."""
    server.answer = 200, GOOD, None
    monkeypatch.setattr(pix2pix, "HOST", f"{server.address}/sets/")
    return server


def download(tmp_path):
    """The command that needs facades, with a small network."""
    return ["--data", "facades", "--data-root", tmp_path / "sets", "--load-size", 16, "--run", tmp_path / "run"]


def pictures(folder):
    """{path below folder: bytes} of files that are not hidden."""
    return {name: data for name, data in contents(folder).items() if "/." not in f"/{name}"}


def test_download(tmp_path, server):
    """A named set that is missing is fetched once, unpacked whole, and not asked for again."""
    main(*download(tmp_path))
    assert server.asked == ["/sets/facades.tar.gz"]
    assert pictures(tmp_path / "sets" / "facades") == IMAGES
    assert (tmp_path / "run" / "last.pt").exists()
    assert not [*(tmp_path / "sets").rglob("*.part")]
    main(*download(tmp_path), "--fresh")
    assert len(server.asked) == 1


def test_archive_that_is_there(tmp_path, offline):
    """An archive put below --data-root by hand is unpacked without the network."""
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "facades.tar.gz").write_bytes(GOOD)
    main(*download(tmp_path))
    assert pictures(tmp_path / "sets" / "facades") == IMAGES


BROKEN = {
    "not found": (404, b"no such file", None),
    "server error": (500, b"", None),
    "page": (200, b"<html><body>Sorry, we are down.</body></html>", None),
    "nothing": (200, b"", None),
    "truncated": (200, GOOD[: len(GOOD) // 2], None),
    "truncated late": (200, GOOD[:-500], None),
    "wrong checksum": (200, GOOD[:-8] + bytes(byte ^ 255 for byte in GOOD[-8:-4]) + GOOD[-4:], None),
    "connection lost": (200, GOOD[: len(GOOD) // 2], len(GOOD)),
    "path upwards": (200, packed({"train/stray.png": image_file(9), "../evil.txt": b"evil", **IMAGES}), None),
    "hidden path upwards": (200, packed({"train/stray.png": image_file(9), "train/../../../evil.txt": b"evil"}), None),
    "link outwards": (200, packed({"train/stray.png": image_file(9), "train/out": "../../../..", **IMAGES}), None),
    "link to a file": (200, packed({"train/out.png": "/etc/hostname", **IMAGES}), None),
    "another set": (200, packed(IMAGES, "maps/"), None),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_download(fault, tmp_path, server, capfd):
    """What cannot be fetched or unpacked ends in a sentence with the address and leaves no set."""
    server.answer = BROKEN[fault]
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(*download(tmp_path))
    said = capfd.readouterr().err.replace("\r", "\n").strip().split("\n")  # a progress bar may be before it
    assert ended.value.code == 2 and not any("Traceback" in line for line in said)
    assert f"{pix2pix.HOST}facades.tar.gz" in said[-1]
    assert not (tmp_path / "sets" / "facades").exists() and not (tmp_path / "run").exists()
    assert not [*tmp_path.rglob("evil*")] and not (tmp_path.parent / "evil.txt").exists()


@pytest.mark.parametrize("fault", BROKEN)
def test_download_after_a_broken_one(fault, tmp_path, server):
    """Once the server is well again, the same command fetches the set, with nothing left of what was broken."""
    server.answer = BROKEN[fault]
    with pytest.raises(SystemExit):
        main(*download(tmp_path))
    server.answer = (200, GOOD, None)
    main(*download(tmp_path))
    assert pictures(tmp_path / "sets" / "facades") == IMAGES


@pytest.mark.parametrize("name", ["/{root}/evil.txt", "//{root}/evil.txt"])
def test_archive_with_absolute_path(name, tmp_path, server, capfd):
    """An absolute path in an archive is refused, or kept below --data-root: nothing is written where it points."""
    outside = tmp_path / "outside"
    outside.mkdir()
    path = name.format(root=str(outside).lstrip("/"))
    server.answer = (200, packed({**IMAGES, path: b"evil"}), None)
    try:
        main(*download(tmp_path))
    except SystemExit as ended:
        assert ended.code == 2 and pix2pix.HOST in capfd.readouterr().err
        assert not (tmp_path / "sets" / "facades").exists()
    assert not [*outside.iterdir()]


def test_download_without_a_server(tmp_path, server, capfd):
    """With no server there the sentence names the address and where to put the archive by hand."""
    server.shutdown()
    server.server_close()
    said = refused(capfd, *download(tmp_path))
    assert f"{pix2pix.HOST}facades.tar.gz" in said and str(tmp_path / "sets") in said
    assert not (tmp_path / "sets" / "facades").exists()


def test_real_facades(tmp_path):
    """Two updates on the real facades, if GAN_DATA names a folder that holds them."""
    root = Path(os.environ.get("GAN_DATA", "")).resolve()
    if not (os.environ.get("GAN_DATA") and (root / "facades").is_dir()):
        pytest.skip("GAN_DATA names no folder with facades/")
    for split in ("train", "test"):  # linked, so that nothing is written beside the originals
        (tmp_path / "sets" / "facades").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sets" / "facades" / split).symlink_to(root / "facades" / split, target_is_directory=True)
    given = ("--data", "facades", "--data-root", tmp_path / "sets", "--run", tmp_path / "run")
    run = main(*given, "--size", 64, "--max-steps", 2)
    assert (run / "last.pt").exists() and len([*(run / "test").glob("*.png")]) >= 100
