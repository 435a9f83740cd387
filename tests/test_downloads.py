"""Downloads of sets from a server that does what it can to spoil them: a sentence, nothing unpacked, later the set."""

import gzip
import hashlib
import io
import socket
import struct
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scripts import ROWS
from torchvision import datasets

NAMED = {row.name: row for row in ROWS}
FAULTS = {  # what the server answers in place of a good file
    "not found": lambda good: (404, b"no such file", None),
    "unavailable": lambda good: (503, b"", None),
    "page": lambda good: (200, b"<html><body>Sorry, we are down.</body></html>", None),
    "led to a page": lambda good: (302, b"", None),
    "nothing": lambda good: (200, b"", None),
    "silence": lambda good: None,
    "cut": lambda good: (200, good[: len(good) // 2], None),
    "connection lost": lambda good: (200, good[: len(good) // 2], len(good)),
    "wrong bytes": lambda good: (200, good[:40] + bytes(byte ^ 255 for byte in good[40:60]) + good[60:], None),
}


def archive(suffix):
    """facades with two images in each of four folders, as a zip or a .tar.gz."""
    file, members, rng = io.BytesIO(), {}, np.random.default_rng(0)
    for name in (f"facades/{part}/{i}.png" for part in ("trainA", "trainB", "testA", "testB") for i in range(2)):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(image := io.BytesIO(), "PNG")
        members[name] = image.getvalue()
    if suffix == "zip":
        with zipfile.ZipFile(file, "w") as bundle:
            for name, data in members.items():
                bundle.writestr(name, data)
    else:
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def digits():
    """The four files of MNIST, with 16 images in each half."""
    rng = np.random.default_rng(0)
    images = struct.pack(">4i", 2051, 16, 28, 28) + rng.integers(0, 256, 16 * 28 * 28, np.uint8).tobytes()
    labels = struct.pack(">2i", 2049, 16) + bytes(i % 10 for i in range(16))
    parts = {"images-idx3": gzip.compress(images), "labels-idx1": gzip.compress(labels)}
    return {f"{half}-{part}-ubyte.gz": data for half in ("train", "t10k") for part, data in parts.items()}


@pytest.fixture(params=["pix2pix", "cyclegan", "gan", "dcgan", "cgan"])
def wanted(request, server, monkeypatch, tmp_path):
    """A script that needs a set which is on the server: row, name of the set, files, and flags."""
    row = NAMED[request.param]
    if row.name in ("pix2pix", "cyclegan"):
        monkeypatch.setattr(row.module, "HOST", f"{server.address}/")
        suffix = {"pix2pix": "tar.gz", "cyclegan": "zip"}[row.name]
        name, files = "facades", {f"facades.{suffix}": archive(suffix)}
    else:
        name, files = "mnist", digits()
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{server.address}/"])
        sums = [(name, hashlib.md5(data).hexdigest()) for name, data in files.items()]
        monkeypatch.setattr(datasets.MNIST, "resources", sums)
    to = ("--data-root", tmp_path / "sets", "--run", tmp_path / "run", "--max-steps", 1)
    return SimpleNamespace(row=row, files=files, flags=[*row.tiny.split(), "--data", name, *to])


@pytest.mark.parametrize("fault", FAULTS)
def test_download(wanted, fault, server, call, tmp_path, monkeypatch):
    """One sentence with the address and what to do by hand; nothing unpacked; once the server is well, it goes on."""
    patience, set_patience = socket.getdefaulttimeout(), socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_patience(min(seconds, 0.5)))
    server.answer = lambda path: FAULTS[fault](wanted.files[path[1:]])
    try:
        result = call(wanted.row, *wanted.flags)
        said = result.err.replace("\r", "\n").strip().split("\n")  # a progress bar may be before it
        assert result.code == 2 and not any("Traceback" in line for line in said)
        assert server.address in said[-1] and str(tmp_path / "sets") in said[-1] and server.asked
        found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert found <= {*wanted.files, ".facades.lock"} and not (tmp_path / "run").exists(), found
        server.answer = lambda path: (200, wanted.files[path[1:]], None)
        assert call(wanted.row, *wanted.flags).code == 0
        assert (tmp_path / "run" / "last.pt").exists()
    finally:
        set_patience(patience)
