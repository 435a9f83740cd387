"""Runs that are killed, refused what they need, or in company: what they leave, and how they go on. Old checkpoints.

A short set of what `python -m tests.torture` does at length.
"""

import errno
import itertools
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROWS, assert_refused, read_checkpoint, read_log, snapshot
from test_resume import assert_same_run
from torture import (
    BOUND,
    FETCHING,
    OLD,
    SIGNALS,
    finish,
    growth,
    left,
    long_run,
    moments,
    problems,
    torture,
    wait_for,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing can be forked here")
ORDER = ("cache", "config", "log", "checkpoint", "sample", "figure")  # in which a run first writes to files


def of(*names):
    """Run a test for some rows only, where the others have the same code or nothing of the kind."""
    rows = [row for row in ROWS if row.name in names]
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name, indirect=True)


class Run:
    """A case of training in a folder, and the children that are started in it."""

    def __init__(self, lab, row, folder):
        self.lab, self.row, self.folder, self.children = lab, row, folder, []
        self.path, self.flags, self.whole = folder / "run", lab.lay(row, "train", folder), lab.whole(row, "train")

    def start(self, *flags, **more):
        """The script with more flags, and a spec with more in it."""
        flags, log = [*self.flags, *map(str, flags)], f"{self.folder}.log{len(self.children)}"
        spec = self.lab.spec(self.row, self.folder, flags, log=log, **more)
        self.children.append(self.lab.server.start(spec))
        self.children[-1].log = log
        return self.children[-1]

    def hold(self, moment, number, *flags):
        """The same, and let it wait at a moment."""
        child = self.start(*flags, aim=[moment, number, "hold"])
        wait_for(child, lambda: self.is_held(child))
        assert self.is_held(child), self.end(child)
        return child

    def is_held(self, child):
        return Path(f"{child.log}.struck").exists()

    def let_go(self, child):
        """Let it go on, and see it end well."""
        Path(f"{child.log}.go").touch()
        assert self.end(child).code == 0, self.end(child)

    def end(self, child, seconds=60):
        """The status of a child at its end, and what it said."""
        code, (out, err) = finish(child, seconds), (Path(f"{child.log}.{name}").read_text() for name in ("out", "err"))
        return SimpleNamespace(code=code, out=out, err=err)

    def do(self, *flags, **more):
        return self.end(self.start(*flags, **more))

    def kill(self, child, kind=signal.SIGKILL):
        child.send_signal(kind)
        return self.end(child).code

    def problems(self):
        return problems("train", self.folder, self.whole.folder, self.whole.folder)

    def take_out(self, name):
        """Compare the run of another name with the undisturbed one, and remove it."""
        assert_same_run(self.folder / name, self.whole.folder / "run")
        shutil.rmtree(self.folder / name)

    def allow(self, mode, path=None):
        """Set what its owner may do in a folder or, without `path`, in all of them."""
        for folder in [path] if path else [self.folder, *self.folder.rglob("*")]:
            folder.chmod(mode)


@pytest.fixture
def run(lab, row, tmp_path):
    """A case whose children end with the test."""
    run = Run(lab, row, tmp_path / "case")
    yield run
    for child in run.children:
        run.kill(child)


# -- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("SIGKILL",), ("SIGTERM", "SIGINT")], ids=" ".join)
def test_killed(lab, row, names):
    """A run that is killed in the middle of writing each kind of file, and at any time, ends as if it were not."""
    order = [moment for moment in (*ORDER, "any time") if moment in moments(lab, row, "train")]
    kills = [*zip(itertools.cycle(names), order)]
    number, rng = f"{row.name}-{names[0]}", np.random.default_rng(ROWS.index(row))
    result = torture(lab, row, number, rng, "train", 1, kills)
    assert result.problems == [] and len(result.kills) >= 3, result.text


def test_killed_while_it_is_used(lab, row):
    """Pictures that a kill came between are the same when the command is repeated, and nothing is left beside them."""
    kills = [("SIGKILL", "output"), ("SIGTERM", "output"), ("SIGKILL", "any time")]
    result = torture(lab, row, f"{row.name}-use", np.random.default_rng(0), "use", 1, kills)
    assert result.problems == [] and len(result.kills) > 1, result.text


@of(*FETCHING)
def test_killed_in_a_download(lab, row):
    """A download that a kill cut off is made again, and leaves nothing unpacked by half."""
    kills = [("SIGKILL", "download"), ("SIGTERM", "download"), ("SIGKILL", "download")]
    result = torture(lab, row, f"{row.name}-download", np.random.default_rng(1), "download", 1, kills)
    assert result.problems == [] and len(result.kills) == 3, result.text


def test_killed_before_a_picture(run):
    """A run that ends between its last checkpoint and the picture of it paints it at the next start."""
    number = run.whole.counts["checkpoint"]
    assert run.do(aim=["checkpoint", number, "SIGKILL"]).code == -9
    assert read_checkpoint(run.path)["step"] == read_checkpoint(run.whole.folder / "run")["step"]
    assert run.do().code == 0
    assert run.problems() == []


@pytest.mark.parametrize("number", [5, 6])
@of("gan")
def test_killed_between_figures(run, number):
    """All figures of the end are there, whichever of them a kill came between: here the first and the second."""
    assert run.do(aim=["figure", number, "SIGKILL"]).code == -9
    assert run.do().code == 0
    assert run.problems() == []


@of("pix2pix", "gan")
def test_problems_are_found(lab, row, tmp_path):
    """The comparison sees a picture that is missing, cut or another, a part that is left, a log that is doubled."""
    whole = lab.whole(row, "train").folder

    def damaged(damage):
        folder = shutil.copytree(whole, tmp_path / str(len([*tmp_path.iterdir()])))
        damage(folder)
        return [text.partition(" (")[0] for text in problems("train", folder, whole, whole)]

    def double(folder):
        log = folder / "run" / "log.jsonl"
        log.write_text(log.read_text() + log.read_text().splitlines()[-1] + "\n")

    def forget(folder):
        checkpoint = read_checkpoint(folder / "run")
        checkpoint["G"][next(iter(checkpoint["G"]))].view(-1)[0] += 1e-6
        torch.save(checkpoint, folder / "run" / "last.pt")

    picture = "run/samples/0000008.png"
    assert damaged(lambda folder: None) == []
    assert damaged(lambda folder: (folder / picture).unlink()) == [f"{picture} is missing"]
    assert damaged(lambda folder: (folder / "set" / "a.1.part").touch()) == ["set/a.1.part is left"]
    assert damaged(lambda folder: (folder / picture).write_bytes(b""))[:2] != []
    assert f"{picture} is another" in damaged(lambda folder: Image.new("L", (1, 1)).save(folder / picture))
    assert damaged(double) and damaged(forget)


# -- company ---------------------------------------------------------------------------------------------------------


def test_second_run_is_refused(run):
    """While a run is trained another process is refused to train it, and does no harm; the first ends as if alone."""
    first = run.hold("update", 4)
    before = left(run.folder)
    for more in ((), ("--fresh",)):
        result = run.do(*more)
        assert_refused(result, "run is in use by another process")
    assert left(run.folder) == before
    run.let_go(first)
    assert run.problems() == []


@pytest.mark.parametrize("spelling", ["../case/run", "link", "."])
@of("gan")
def test_another_name_of_the_folder(run, spelling):
    """However the folder of the run is named, it is the same."""
    (run.folder / "link").symlink_to("run")
    first = run.hold("update", 4)
    result = run.do(
        "--run", spelling, "--data", run.folder / "set", cwd=str(run.path if spelling == "." else run.folder)
    )
    assert_refused(result, f"{spelling} is in use by another process")
    run.let_go(first)


@of("gan")
def test_lock_of_a_killed_run(run):
    """What held a run and was killed is in nobody's way."""
    assert run.kill(run.hold("update", 4)) == -9
    assert run.do().code == 0
    assert run.problems() == []


@of("pix2pix", "cyclegan", "gan", "dcgan", "text2img")
def test_two_at_the_end(run):
    """Another start while the figures of the end are painted is refused or waits, and does no harm."""
    first = run.hold("figure", 2)
    second = run.start()
    time.sleep(0.2)
    run.let_go(first)
    assert run.end(second).code in (0, 2)
    assert run.problems() == []


@of("dcgan")
@pytest.mark.parametrize("end", ["well", "SIGKILL", "SIGTERM"])
def test_decoding_twice(run, end):
    """Of two processes that need a cache one makes it, and the other waits for that, or makes it if that one ends."""
    first = run.hold("cache", 3)
    second = run.start("--run", "other")
    time.sleep(0.2)
    assert second.poll() is None and not (run.folder / "other").exists()
    if end == "well":
        run.let_go(first)
    else:
        first.send_signal(getattr(signal, end))
        assert run.end(first).code in SIGNALS[end]
    assert run.end(second).code == 0
    run.take_out("other")
    assert run.do().code == 0
    assert run.problems() == []


@of("dcgan")
def test_decoding_thrice(run):
    """The lock on a cache holds for a third process, too, where the second had to wait for the first."""
    first = run.hold("cache", 3)
    second = run.start("--run", "other", aim=["cache", 3, "hold"])
    time.sleep(0.2)
    assert run.kill(first, signal.SIGTERM) == 143
    wait_for(second, lambda: run.is_held(second))
    third = run.start("--run", "third")
    time.sleep(0.3)
    assert third.poll() is None and not (run.folder / "third").exists()
    run.let_go(second)
    assert run.end(third).code == 0
    run.take_out("other")
    run.take_out("third")


@of("dcgan")
def test_stopped_while_it_waits(run):
    """A process that waits for the cache of another is stopped as any other."""
    first = run.hold("cache", 3)
    second = run.start("--run", "other")
    time.sleep(0.2)
    second.send_signal(signal.SIGTERM)
    assert run.end(second, 5).code == 143
    run.let_go(first)
    assert run.problems() == []


@of("pix2pix", "text2img")
def test_other_settings_meanwhile(run):
    """Another run on the same data in another size changes nothing of a run, nor of its caches."""
    first = run.hold("update", 4)
    before = left(run.folder)
    assert run.do("--run", "other", *"--size 16 --load-size 40".split()).code == 0
    shutil.rmtree(run.folder / "other")
    assert {name: content for name, content in left(run.folder).items() if name in before} == before
    run.let_go(first)
    assert [problem for problem in run.problems() if not problem.startswith("set/.")] == []


@of("dcgan")
@pytest.mark.parametrize("how", ["decoded anew", "overwritten"])
def test_cache_replaced_meanwhile(run, how):
    """A run does not see what others do to the caches that it has begun to read."""
    first = run.hold("update", 4)
    caches = [path for path in (run.folder / "set").glob(".*") if path.stat().st_size]
    if how == "decoded anew":
        image = next((run.folder / "set").rglob("*.png"))
        Image.open(image).transpose(Image.Transpose.ROTATE_180).save(image)
        assert run.do("--run", "other").code == 0
        assert any(not cache.exists() for cache in caches)
    else:
        for cache in caches:
            (part := run.folder / "part").write_bytes(bytes(cache.stat().st_size))
            part.replace(cache)
    run.let_go(first)
    assert_same_run(run.path, run.whole.folder / "run")


# -- refused by the system -------------------------------------------------------------------------------------------


ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EIO")


def test_errors(run):
    """Whatever cannot be written, the run ends in a sentence that names it; then it goes on as if nothing had been."""
    names = {"cache": "set/.", "config": "run/config.json", "log": "run/log.jsonl", "checkpoint": "run/last.pt"}
    present = moments(run.lab, run.row, "train")
    for i, moment in enumerate([moment for moment in ORDER if moment in present]):
        error, number = ERRORS[i % 4], 1 + (i + ROWS.index(run.row)) % 3  # opened, written, or synced
        result = run.do(aim=[moment, number, error])
        assert_refused(result, os.strerror(getattr(errno, error)))
        assert names.get(moment, "run/") in result.err and not [*run.folder.rglob("*.part")]
    assert run.do().code == 0
    assert run.problems() == []


def test_file_size_limit(run):
    """A limit on the size of files is told from the start, and nothing stays that was cut off."""
    result = run.do(limit=1000)
    assert_refused(result, os.strerror(errno.EFBIG))
    assert str(run.path.relative_to(run.folder)) in result.err or "set/." in result.err
    assert not run.path.joinpath("last.pt").exists() and not [*run.folder.rglob("*.part")]
    assert run.do(aim=["update", 4, "SIGTERM"]).code == 143
    before = (run.path / "last.pt").read_bytes()
    result = run.do(limit=len(before) - 1)
    assert_refused(result, os.strerror(errno.EFBIG))
    assert "run/last.pt" in result.err
    assert (run.path / "last.pt").read_bytes() == before and not [*run.folder.rglob("*.part")]
    assert run.do().code == 0
    assert run.problems() == []


@pytest.fixture
def mine(run):
    """A case with folders that nobody may write to, not even root, until the end of the test."""
    yield run
    run.allow(0o755)


@of("pix2pix", "text2img")
def test_read_only_run(mine):
    """A run folder that cannot be written to is refused by name, and stays as it is; later it goes on."""
    mine.allow(0o755)
    assert mine.do(aim=["update", 4, "SIGTERM"], plain=True).code == 143
    before = snapshot(mine.path)
    mine.allow(0o555, mine.path)
    result = mine.do(plain=True)
    assert_refused(result, os.strerror(errno.EACCES))
    assert "run/" in result.err and snapshot(mine.path) == before
    mine.allow(0o755, mine.path)
    assert mine.do(plain=True).code == 0
    assert mine.problems() == []


@of("pix2pix", "gan")
def test_read_only_folder_of_runs(mine):
    """Where no run folder can be made, that is said, and nothing is."""
    before = snapshot(mine.folder)
    mine.allow(0o555)
    result = mine.do(plain=True)
    assert_refused(result, os.strerror(errno.EACCES))
    assert snapshot(mine.folder) == before


@of("pix2pix", "gan")
def test_read_only_data(mine):
    """Data in a folder that cannot be written to are trained on all the same, and stay as they are."""
    before = snapshot(mine.folder / "set")
    mine.allow(0o755)
    mine.allow(0o555, mine.folder / "set")
    assert mine.do("--max-steps", 4, plain=True).code == 0
    assert mine.do(plain=True).code == 0
    assert snapshot(mine.folder / "set") == before
    assert_same_run(mine.path, mine.whole.folder / "run")
    assert (mine.folder / "cache").exists() == (mine.row.name == "pix2pix")


def test_use_of_a_read_only_run(mine):
    """What was trained can be used from a folder that cannot be written to."""
    mine.path.mkdir()
    shutil.copy(OLD / f"{mine.row.name}-v1.pt", mine.path / "last.pt")
    flags, to, sizes = mine.row.use(mine.folder / "use", mine.path)
    mine.allow(0o755)
    mine.allow(0o555, mine.path)
    result = mine.do(*flags[flags.index("--run") :], plain=True)
    assert (result.code, result.err) == (0, "")
    assert {name: Image.open(to / name).size for name in sizes} == sizes


@of("pix2pix", "gan")
def test_use_into_this_folder(row, call, tmp_path, monkeypatch):
    """Pictures can be asked for in the folder that one is in."""
    (tmp_path / "run").mkdir()
    shutil.copy(OLD / f"{row.name}-v1.pt", tmp_path / "run" / "last.pt")
    flags, to, sizes = row.use(tmp_path / "use", tmp_path / "run")
    to.mkdir(parents=True)
    monkeypatch.chdir(to)
    assert call(row, *flags, "--to", ".").code == 0
    assert {name: Image.open(to / name).size for name in sizes} == sizes


# -- long runs -------------------------------------------------------------------------------------------------------


@of("pix2pix", "gan")
def test_long_run(lab, row):
    """Memory and open files stay what they are; 20,000 updates are for `python -m tests.torture --updates 20000`."""
    rows = long_run(lab, row, 60, 20, lab.server.start)
    assert [step for step, _, _ in rows] == [*range(3, 61, 3)]
    memory, files = growth(rows)
    assert memory < BOUND * 2**20 and files <= 0


def test_growth():
    """Growth is found at the end and in between, and none in what goes up and down from the start."""
    assert growth([[i, 1000 + 50 * i, 7 + (i == 30)] for i in range(40)]) == (1800, 1)
    assert growth([[i, 1000 + i % 2, 7] for i in range(40)]) == (0, 0)


# -- old checkpoints -------------------------------------------------------------------------------------------------


LATER = {"gan": {"average": 0.0}}  # options that version 1 did not have at first: it was as if they were off


def given(settings):
    """Flags that ask for the settings of a checkpoint on toy data."""
    flags = []
    for name, value in settings.items():
        if name not in ("count", "classes") and value is not None and value is not False:
            flags += ["--" + {"source": "from"}.get(name, name).replace("_", "-"), *[value][value is True :]]
    return flags


@pytest.fixture
def old(row, tmp_path):
    """A run folder with nothing but the checkpoint of a script of version 1; `given` asks for its settings."""
    (tmp_path / "run").mkdir()
    shutil.copy(OLD / f"{row.name}-v1.pt", tmp_path / "run" / "last.pt")
    return tmp_path / "run"


def test_old_checkpoint_goes_on(row, old, call):
    """A checkpoint that was written long ago is gone on with."""
    before = read_checkpoint(old)
    assert (before["script"], before["version"], before["step"]) == (row.name, 1, 3)
    settings = before["settings"] | LATER.get(row.name, {})
    result = call(row, *given(settings), "--device", "cpu", "--run", old, "--max-steps", 5)
    assert (result.code, result.err) == (0, "")
    after = read_checkpoint(old)
    assert after["step"] == 5 and [entry["step"] for entry in read_log(old)] == [4, 5]
    assert after["settings"] == settings and after.keys() == before.keys()
    for name in row.inputs:
        moved = [not torch.equal(weight, before[name][key]) for key, weight in after[name].items() if weight.dim() > 1]
        assert before[name].keys() == after[name].keys() and (any(moved) or name in ("E", "V", "S"))


@of(*LATER)
def test_new_option(row, old, call):
    """What is on by default now, and was not there then, is named."""
    before, flags = snapshot(old), given(read_checkpoint(old)["settings"])
    result = call(row, *flags, "--device", "cpu", "--run", old)
    assert_refused(result, *(f"{name} 0" for name in LATER[row.name]))
    assert snapshot(old) == before


def test_old_checkpoint_is_used(row, old, call, tmp_path):
    """Pictures come from it as ever."""
    flags, to, sizes = row.use(tmp_path / "use", old)
    result = call(row, *flags)
    assert (result.code, result.err) == (0, "")
    assert {name: Image.open(to / name).size for name in sizes} == sizes


def test_checkpoint_of_the_future(row, old, call, tmp_path):
    """One of a later version is refused by name, and stays."""
    torch.save(read_checkpoint(old) | {"version": 2}, old / "last.pt")
    before = snapshot(old)
    result = call(row, *row.use(tmp_path / "use", old)[0])
    assert_refused(result, str(old / "last.pt"))
    assert f"{row.name}.py, version 2" in result.err and snapshot(old) == before
