"""A short part of the fuzzer, the same each time, and faults planted in the scripts, which it must find."""

import math
import sys
import time
import warnings
from collections import Counter
from types import SimpleNamespace

import fuzz
import pytest
from PIL import Image
from scripts import ROWS


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with runs that are damaged."""
    return fuzz.Lab(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_kind(lab, kind):
    """Inputs of each kind end in a correct result or in one sentence."""
    ends, known, _ = fuzz.explore(lab, kind, 15, 1, math.inf)
    assert known == {}
    assert sum(ends[word] for word in fuzz.WORDS) >= 10 and not ends["crashed"]


def crash(path):
    return {}[path.name]


def hang(path):
    time.sleep(60)


def hoard(path):
    return Image.frombytes("L", (40, 80), (b"x" * 2**27)[:3200])


def shout(path):
    print("oh", file=sys.stderr)
    raise SystemExit(f"{path.name} cannot be read")


def mumble(path):
    raise SystemExit("it cannot be read")


def warn(path):
    warnings.warn(path.name, stacklevel=1)
    return Image.new("L", (40, 80))


@pytest.mark.parametrize(
    ("plant", "title"),
    [
        (crash, "KeyError in"),
        (hang, "HangError in"),
        (hoard, "needs more than"),
        (shout, "says more or less than a sentence"),
        (mumble, "names neither file nor option"),
        (warn, "warns"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_faults_are_found(lab, monkeypatch, plant, title):
    """What a script must not do when it reads an image is found, and stays found while the input is made smaller."""
    if plant is hoard and fuzz.forget_peak() == math.inf:
        pytest.skip("the peak of memory cannot be measured here")
    for row in ROWS:
        monkeypatch.setattr(row.module, "read_image", plant)
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz, "MEMORY", {"image": 64})
    monkeypatch.setattr(fuzz, "TRIES", 5)
    costs = SimpleNamespace(seconds=0, peak=0)
    fault = fuzz.search(lab, "image", 20, 1, math.inf, {}, Counter(), costs)
    assert fault.title.startswith(title) and fault.case["script"] in fuzz.NAMED
