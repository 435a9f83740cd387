"""Files that are meant to do harm, and a machine that is too small: one sentence, and nothing lost."""

import io
import os
import pickle
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROWS, assert_refused, read_checkpoint, snapshot

import pix2pix
import text2img

PIX2PIX, CYCLEGAN = (next(row for row in ROWS if row.name == name) for name in ("pix2pix", "cyclegan"))


def spoil(file, kind):
    """Put in place of an image one that no script takes."""
    if kind == "bomb":  # a few kilobytes that hold 100 million pixels
        Image.new("1", (10_000, 10_000)).save(file, "PNG")
    elif kind == "floats":
        Image.fromarray(np.full((40, 40), np.nan, np.float32)).save(file, "TIFF")
    else:  # Pillow has more to say of it than that it is none
        tags = [(256, 4, 0), (257, 4, 0), (258, 3, 1), (259, 3, 1), (262, 3, 1), (273, 4, 134), (277, 3, 255)]
        fields = [tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little")
                  + number.to_bytes(4, "little") for tag, kind, number in tags]  # fmt: skip
        file.write_bytes(b"II*\0\x08\0\0\0" + len(tags).to_bytes(2, "little") + b"".join(fields) + bytes(4))


@pytest.mark.parametrize("kind", ["bomb", "floats", "samples"])
def test_images(row, call, tmp_path, kind):
    """Images of too many pixels, of floats, of impossible layouts: named, in one sentence, before training."""
    row.data(tmp_path / "set")
    bad = sorted((tmp_path / "set").rglob("*.png"))[3]
    spoil(bad, kind)
    assert_refused(call(row, *row.resume.split(), "--data", tmp_path / "set", "--run", tmp_path / "run"), str(bad))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory(row, call, monkeypatch, error):
    """A machine or a GPU that is too small ends in what to lower."""

    def train(args):
        raise error

    monkeypatch.setattr(row.module, "train", train)
    assert_refused(call(row, *row.tiny.split()), "--batch-size")


def test_other_errors_are_not_hidden(row, call, monkeypatch):
    """What is wrong with the code itself is not called a lack of memory."""

    def train(args):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(row.module, "train", train)
    with pytest.raises(RuntimeError, match="shapes differ"):
        call(row, *row.tiny.split())


def test_log_is_no_text(row, call, tmp_path):
    """A log of bytes that are no text is named, and left as it is."""
    flags = [*row.tiny.split(), "--run", tmp_path / "run", "--max-steps"]
    assert call(row, *flags, 1).code == 0
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(b"\xff\xfe\xff\n")
    assert_refused(call(row, *flags, 2), str(log))
    assert log.read_bytes() == b"\xff\xfe\xff\n"


def test_fresh_in_this_folder(row, call):
    """The folder that one works in cannot be moved aside."""
    assert call(row, *row.tiny.split(), "--run", ".", "--max-steps", 1).code == 0
    assert_refused(call(row, *row.tiny.split(), "--run", ".", "--max-steps", 1, "--fresh"), "--fresh")


class Huge:
    """Pickled as a numpy array of 64 GiB of which the file has not a byte."""

    def __reduce__(self):
        return np.empty(0).__reduce__()[0], (np.ndarray, (2**36,), b"b")


def test_pickle_of_gigabytes(tmp_path):
    """Arrays take the memory of their bytes, whatever size they claim; usual ones are read as they are."""
    (tmp_path / "huge.pickle").write_bytes(pickle.dumps([Huge()]))
    assert text2img.read_vectors(tmp_path / "huge.pickle", 8).shape == (0, 8)
    codes = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    for protocol in range(5):
        (tmp_path / "codes.pickle").write_bytes(pickle.dumps([codes, codes], protocol))
        found = text2img.read_vectors(tmp_path / "codes.pickle", 8)
        assert torch.equal(found, torch.from_numpy(np.concatenate([codes, codes])))


class Zeros:
    """A file of so many zeros."""

    def __init__(self, size):
        self.left = size

    def read(self, size=-1):
        size = min(size, self.left)
        self.left -= size
        return bytes(size)


SIZE = 3 * 2**29  # 1.5 GiB, of which a few megabytes are left when packed


def test_tar_bomb(call, tmp_path):
    """A tar that unpacks to far more than its size is refused before it does, and nothing is left of it."""
    with tarfile.open(tmp_path / "facades.tar.gz", "w:gz", compresslevel=1) as tar:
        member = tarfile.TarInfo("facades/train/0.png")
        member.size = SIZE
        tar.addfile(member, Zeros(SIZE))
    result = call(PIX2PIX, "--data", "facades", "--data-root", tmp_path, "--run", tmp_path / "run", "--device", "cpu")
    assert_refused(result, "facades.tar.gz")
    assert "gigabyte" in result.err
    assert {path.name for path in tmp_path.iterdir()} == {"facades.tar.gz", ".facades.lock"}


def test_zip_bomb(call, tmp_path):
    """And so is a zip."""
    with zipfile.ZipFile(tmp_path / "facades.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bundle:
        with bundle.open("facades/trainA/0.png", "w", force_zip64=True) as file:
            for _ in range(SIZE // 2**24):
                file.write(bytes(2**24))
    result = call(CYCLEGAN, "--data", "facades", "--data-root", tmp_path, "--run", tmp_path / "run", "--device", "cpu")
    assert_refused(result, "facades.zip")
    assert "gigabyte" in result.err
    assert {path.name for path in tmp_path.iterdir()} == {"facades.zip", ".facades.lock"}


def test_size_in_all(tmp_path):
    """What counts is the sum over all members, each with its header."""
    members = [tarfile.TarInfo(str(i)) for i in range(3)]
    for member in members:
        member.size = 488
    assert [*pix2pix.bounded(members, 3000)] == members
    with pytest.raises(ValueError, match="20 times"):
        [*pix2pix.bounded(members, 2999)]


# -- what the fuzzer found -------------------------------------------------------------------------------------------

PATHS = {"pipe": os.mkfifo, "loop": lambda path: path.symlink_to(path.name), "link": lambda path: path.symlink_to("x")}


@pytest.mark.parametrize("kind", PATHS)
def test_no_files(row, call, tmp_path, kind):
    """A pipe, which would be waited for, and links to nothing have the names of images: named, or left out."""
    row.data(tmp_path / "set")
    bad = sorted((tmp_path / "set").rglob("*.png"))[3]
    bad.unlink()
    PATHS[kind](bad)
    flags = [*row.resume.split(), "--data", tmp_path / "set", "--run", tmp_path / "run", "--max-steps", 1]
    assert_refused(call(row, *flags), str(bad))
    assert not (tmp_path / "run").exists()
    result = call(row, *flags, "--skip-bad")
    assert (result.code, result.err) == (0, "") and str(bad) in result.out


def test_names_that_cannot_be_shown(row, start, tmp_path):
    """A bad image with a name that is no text is left out like any other."""
    row.data(tmp_path / "set")
    bad = sorted((tmp_path / "set").rglob("*.png"))[3]
    bad.rename(bad.with_name("x\udce9.png")).write_bytes(b"no image")
    if row.name == "text2img":
        bad.with_name("x\udce9.txt").write_text("an image\n")
    flags = [*row.resume.split(), "--data", tmp_path / "set", "--run", tmp_path / "run", "--max-steps", 1]
    out, err = (child := start(row.file, *flags, "--skip-bad")).communicate(timeout=120)
    assert (child.returncode, err) == (0, b"") and b"x\\udce9.png" in out


@pytest.fixture
def run(row, call, tmp_path):
    """The folder of a run of one update."""
    assert call(row, *row.tiny.split(), "--run", tmp_path / "run", "--max-steps", 1).code == 0
    return tmp_path / "run"


def refused_checkpoint(row, call, run, how):
    """Assert that the run is refused, with its checkpoint as it is, when it is gone on with or used."""
    before = snapshot(run)
    if "on" in how:
        assert_refused(call(row, *row.tiny.split(), "--run", run, "--max-steps", 2), "last.pt")
    if "use" in how:
        assert_refused(call(row, *row.use(Path(tempfile.mkdtemp(dir=run.parent)), run)[0]), "last.pt")
    assert snapshot(run) == before


def test_flipped_bit(row, call, run):
    """A checkpoint of which one bit of a weight was flipped, which torch takes."""
    weight = next(value for value in read_checkpoint(run)["G"].values() if value.numel() > 20)
    data = bytearray((run / "last.pt").read_bytes())
    data[data.index(weight.numpy().tobytes())] ^= 1
    (run / "last.pt").write_bytes(data)
    assert not torch.equal(weight, next(value for value in read_checkpoint(run)["G"].values() if value.numel() > 20))
    refused_checkpoint(row, call, run, ("on", "use"))


def test_packed_checkpoint(row, call, run):
    """A checkpoint with a part that unpacks to gigabytes, which torch would do."""
    with zipfile.ZipFile(run / "last.pt") as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(run / "last.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in parts.items():
            new.writestr(name, data)
    refused_checkpoint(row, call, run, ("on", "use"))


@pytest.mark.parametrize("value", [3000, 2**30])
def test_settings_of_giants(row, call, run, value):
    """A small checkpoint whose settings ask for networks of gigabytes."""
    checkpoint = read_checkpoint(run)
    for name in {"ngf", "ndf", "blocks", "n_layers"} & checkpoint["settings"].keys():
        torch.save(checkpoint | {"settings": checkpoint["settings"] | {name: value}}, run / "last.pt")
        refused_checkpoint(row, call, run, ("use",))


def spoilt(kept):
    """What an optimiser keeps of a weight, in five ways that it would not."""
    name = next(iter(kept))
    yield {}
    yield kept | {"more": torch.zeros(3)}
    yield kept | {name: None}
    yield kept | {name: torch.zeros(5, 7)}
    yield kept | {name: torch.eye(5).to_sparse()}


def test_odd_optimiser(row, call, run):
    """A checkpoint whose optimiser keeps something else of a weight."""
    checkpoint = read_checkpoint(run)
    state = checkpoint["opt_D"]["state"]
    for kept in spoilt(state[1]):
        optimiser = {"state": state | {1: kept}, "param_groups": checkpoint["opt_D"]["param_groups"]}
        torch.save(checkpoint | {"opt_D": optimiser}, run / "last.pt")
        refused_checkpoint(row, call, run, ("on",))


def test_link_in_an_archive(call, tmp_path):
    """Links are refused, even if they stay inside."""
    with tarfile.open(tmp_path / "facades.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("facades/link")
        member.type, member.linkname = tarfile.SYMTYPE, ".."
        tar.addfile(member)
    result = call(PIX2PIX, "--data", "facades", "--data-root", tmp_path, "--run", tmp_path / "run", "--device", "cpu")
    assert_refused(result, "facades.tar.gz")
    assert "link" in result.err
    assert {path.name for path in tmp_path.iterdir()} == {"facades.tar.gz", ".facades.lock"}


@pytest.mark.parametrize("script", [PIX2PIX, CYCLEGAN], ids=lambda row: row.name)
def test_archive_of_a_file(call, tmp_path, script):
    """A file in place of the folder is no set."""
    data = b"no folder"
    if script is PIX2PIX:
        with tarfile.open(tmp_path / "facades.tar.gz", "w:gz") as tar:
            member = tarfile.TarInfo("facades")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    else:
        with zipfile.ZipFile(tmp_path / "facades.zip", "w") as bundle:
            bundle.writestr("facades", data)
    result = call(script, "--data", "facades", "--data-root", tmp_path, "--run", tmp_path / "run", "--device", "cpu")
    assert_refused(result, "facades.")
    assert not (tmp_path / "facades").exists()


@pytest.mark.parametrize("script", [PIX2PIX, CYCLEGAN], ids=lambda row: row.name)
def test_image_of_one_pixel(call, tmp_path, script):
    """However small an image is, it is translated."""
    run = tmp_path / "run"
    assert call(script, *script.tiny.split(), "--run", run, "--max-steps", 1).code == 0
    Image.new("RGB", (1, 3)).save(tmp_path / "x.png")
    flags = "--run", run, "--translate", tmp_path / "x.png", "--to", tmp_path / "out", "--device", "cpu"
    assert call(script, *flags).code == 0
    assert Image.open(tmp_path / "out" / "x.png").size == (1, 3)


def nested(depth):
    """10**depth numbers in a few bytes: lists of ten times the same list."""
    return [nested(depth - 1)] * 10 if depth else [1.0] * 8


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(nested(9)),
        pickle.dumps([np.ones((1000, 8), np.float32)] * 10_000),
        b"\x80\4Nr\xff\xff\xff\x0f.",  # a place in the memo far away, for which the reader in C takes 4 GiB
        pickle.dumps([np.ones((4, 8), np.complex64)]),
    ],
    ids=["nested", "repeated", "memo", "complex"],
)
def test_codes_of_gigabytes(data, tmp_path):
    """Pickled codes that are large in memory and small on the disk, or no numbers to use, are refused by name."""
    (tmp_path / "codes.pickle").write_bytes(data)
    with pytest.raises(SystemExit, match="codes.pickle"):
        text2img.read_vectors(tmp_path / "codes.pickle", 8)
