"""A run that was stopped, in whatever way, and went on is bit for bit the run that was not, on a CPU."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import read_checkpoint, read_log, run_main, snapshot

STEPS = 8  # of three passes over eight items, in threes
ENDLESS = ["--epochs", 1_000_000]


@pytest.fixture(scope="session")
def data(row, tmp_path_factory):
    """A data set of eight items."""
    folder = tmp_path_factory.mktemp("data") / "set"
    row.data(folder)
    return folder


@pytest.fixture(scope="session")
def flags(row, data):
    """Flags of a run on those, but for the schedule and the run folder."""
    return [*row.resume.split(), "--data", data, "--seed", 3]


@pytest.fixture(scope="session")
def whole(row, flags, tmp_path_factory):
    """A run that was not stopped, with a row in the log for every update."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_main(row, *flags, "--epochs", row.epochs, "--run", run, "--save-every", 1) == 0
    assert [row["step"] for row in read_log(run)] == [*range(1, STEPS + 1)]
    return run


def differences(a, b, name="checkpoint"):
    """Names of what is not the same in two nested containers of tensors and plain values."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{name}.{i}")]
    return [] if type(a) is type(b) and a == b else [name]


def assert_same_run(run, whole):
    """Equal checkpoints, equal rows of the log where the steps coincide, no step twice, equal pictures of the end."""
    checkpoints = [read_checkpoint(folder) for folder in (run, whole)]
    assert differences(*checkpoints) == []
    logs = [{entry.pop("step"): entry for entry in read_log(folder)} for folder in (run, whole)]
    steps = [entry["step"] for entry in read_log(run)]
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == checkpoints[0]["step"]
    for step in logs[0].keys() & logs[1].keys():
        assert differences(*({**log[step], "images_per_s": 0} for log in logs)) == [], step
    assert not [*run.rglob("*.part")]
    for folder in ("samples", "test"):
        pictures = [snapshot(run / folder), snapshot(whole / folder)] if (whole / folder).exists() else [{}, {}]
        assert all(pictures[0][name] == pictures[1][name] for name in pictures[0].keys() & pictures[1].keys())


def test_differences():
    """Tensors that differ in a bit, values, types, keys and lengths are found."""
    one = {"a": [torch.ones(2), 3], "b": (1.0, "x")}
    assert differences(one, {"a": [torch.ones(2), 3], "b": (1.0, "x")}) == []
    nearly = torch.ones(2).nextafter(torch.tensor(2.0))
    assert differences(one, {"a": [nearly, 4], "b": (1, "x")}) == ["checkpoint.a.0", "checkpoint.a.1", "checkpoint.b.0"]
    assert differences(one, {"a": one["a"]}) == ["checkpoint"]
    assert differences(one, one | {"b": (1.0,)}) == ["checkpoint.b"]
    assert differences(torch.ones(2), torch.ones(2).double()) == ["checkpoint"]


def test_whole_run(row, flags, whole, tmp_path):
    """It uses what resuming must restore: rates that fall, all random states; and saving changes nothing of it."""
    epochs = [entry["epoch"] for entry in read_log(whole)]
    assert epochs == sorted(epochs) and {*epochs} == {1, 2, 3}
    run = tmp_path / "run"
    assert run_main(row, *flags, "--epochs", row.epochs, "--run", run, "--save-every", 1000) == 0
    assert_same_run(run, whole)
    given = row.module.get_args([*map(str, flags)]).lr
    groups = [group for name in row.parts if name[:4] == "opt_" for group in read_checkpoint(run)[name]["param_groups"]]
    assert groups and all(0 < float(group["lr"]) <= given for group in groups)
    assert row.steady or all(float(group["lr"]) < given for group in groups)


@pytest.mark.parametrize("stops", [[1], [3], [5, 6], [7], [*range(1, STEPS)]], ids=str)
def test_stopped_by_max_steps(row, flags, whole, tmp_path, stops):
    """A run in several parts is the run in one."""
    run = tmp_path / "run"
    for stop in stops:
        torch.rand(stop), np.random.rand(stop)  # no random state of the process has a say in it
        assert run_main(row, *flags, "--epochs", row.epochs, "--run", run, "--max-steps", stop) == 0
        assert read_checkpoint(run)["step"] == stop
    assert run_main(row, *flags, "--epochs", row.epochs, "--run", run) == 0
    assert_same_run(run, whole)


def test_stopped_between_checkpoints(row, flags, whole, tmp_path):
    """What a run that was killed left after its last checkpoint is done and logged again."""
    run = tmp_path / "run"
    assert run_main(row, *flags, "--epochs", row.epochs, "--run", run, "--max-steps", 4) == 0
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 5, "epoch": 9, "images_per_s": 1.0}\n{"step": 6, "epo')
    (run / "last.pt.part").write_bytes(b"a checkpoint that was not finished")
    (run / "config.json.part").write_bytes(b"{")
    assert run_main(row, *flags, "--epochs", row.epochs, "--run", run, "--save-every", 1) == 0
    assert_same_run(run, whole)
    steps = [entry["step"] for entry in read_log(run)]
    assert steps[0] == 1 and steps[-5:] == [4, 5, 6, 7, 8]


def test_stopped_before_the_first_checkpoint(row, flags, whole, tmp_path):
    """A run folder without a checkpoint is one to begin in."""
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "last.pt").unlink()
    assert run_main(row, *flags, "--epochs", row.epochs, "--run", run) == 0
    assert_same_run(run, whole)


def test_moved(row, flags, whole, tmp_path):
    """A run goes on in another folder than it began in."""
    assert run_main(row, *flags, "--epochs", row.epochs, "--run", tmp_path / "old", "--max-steps", 4) == 0
    (tmp_path / "old").rename(tmp_path / "new")
    assert run_main(row, *flags, "--epochs", row.epochs, "--run", tmp_path / "new") == 0
    assert_same_run(tmp_path / "new", whole)


def disturb(monkeypatch, row, number, disturbance):
    """Let something happen in the step of that number, of whatever kind, counted from the start of the process."""
    calls = []

    def disturbed(make_step):
        def make_disturbed_step(args, state):
            step = make_step(args, state)

            def disturbed_step(*batch):
                calls.append(batch)
                if len(calls) == number:
                    disturbance()
                return step(*batch)

            return disturbed_step

        return make_disturbed_step

    for name in [name for name in vars(row.module) if name.startswith("make_") and name.endswith("step")]:
        monkeypatch.setattr(row.module, name, disturbed(getattr(row.module, name)))


def test_failed_in_a_step(row, flags, whole, tmp_path, monkeypatch):
    """An error in the middle leaves a run that goes on from its last checkpoint."""

    def fail():
        raise OSError("failed here")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        disturb(patch, row, 6, fail)
        assert run_main(row, *flags, "--epochs", row.epochs, "--run", run, "--save-every", 2) == 2
    assert read_checkpoint(run)["step"] == 4
    assert run_main(row, *flags, "--epochs", row.epochs, "--run", run) == 0
    assert_same_run(run, whole)


@pytest.mark.parametrize("number", [1, 4, STEPS])
@pytest.mark.parametrize(("kind", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_in_a_step(row, flags, whole, tmp_path, monkeypatch, number, kind, status):
    """A signal in any step, the last too, saves a checkpoint at once and ends the process with its status."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        disturb(patch, row, number, lambda: signal.raise_signal(kind))
        assert run_main(row, *flags, "--epochs", row.epochs, "--run", run) == status
    assert number <= read_checkpoint(run)["step"] <= number + 1
    assert run_main(row, *flags, "--epochs", row.epochs, "--run", run) == 0
    assert_same_run(run, whole)


def test_signal_at_a_file(row, flags, whole, tmp_path, monkeypatch):
    """A signal while any file of the run is written is not lost either, and does no harm."""
    replace, statuses = os.replace, {}
    for number in range(1, 12):
        run, names = tmp_path / f"run{number}", []

        def disturbed_replace(source, target, number=number, names=names):
            names.append(Path(target).name)
            if len(names) == number:
                signal.raise_signal(signal.SIGTERM)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", disturbed_replace)
            status = run_main(row, *flags, "--epochs", row.epochs, "--run", run, "--save-every", 4)
        if len(names) < number:
            break  # that were all files
        statuses[number, names[number - 1]] = status
        assert run_main(row, *flags, "--epochs", row.epochs, "--run", run) == 0
        assert_same_run(run, whole)
    assert statuses and {*statuses.values()} == {143}, statuses


def wait(child, ready):
    """Wait until something is there that a running child makes."""
    for _ in range(6_000):
        if ready():
            return
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    raise TimeoutError


SIGNALS = {  # status of the end; updates between checkpoints
    "SIGTERM": SimpleNamespace(status=143, save_every=1_000_000),
    "SIGINT": SimpleNamespace(status=130, save_every=1_000_000),
    "SIGKILL": SimpleNamespace(status=-9, save_every=2),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
@pytest.mark.parametrize("kind", SIGNALS)
def test_stopped_by_signal(row, flags, start, tmp_path, kind):
    """SIGTERM and Ctrl-C save first, a kill falls back on the last checkpoint; either way the run goes on."""
    run, case, flags = tmp_path / "run", SIGNALS[kind], [*flags, *ENDLESS]
    child = start(row.file, *flags, "--run", run, "--save-every", case.save_every, text=True)
    wait(child, (run / "log.jsonl").exists)
    wait(child, lambda: (run / "log.jsonl").read_text().count("\n") >= (1 if case.status > 0 else 3))
    child.send_signal(getattr(signal, kind))
    out, err = child.communicate(timeout=60)
    assert child.returncode == case.status
    assert "Traceback" not in err and "finished" not in out
    step = read_checkpoint(run)["step"]
    if case.status > 0:
        assert err == "" or len(err.splitlines()) == 1
        assert read_log(run)[-1]["step"] == step and not [*run.rglob("*.part")]
    goal = ["--max-steps", step + 3]
    assert run_main(row, *flags, *goal, "--run", run) == 0
    assert run_main(row, *flags, *goal, "--run", tmp_path / "whole") == 0
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_stopped_twice(row, flags, start, tmp_path):
    """A second signal while the first is being heeded does no harm."""
    run = tmp_path / "run"
    child = start(row.file, *flags, *ENDLESS, "--run", run, text=True)
    wait(child, lambda: (run / "log.jsonl").exists() and (run / "log.jsonl").stat().st_size)
    for kind in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        child.send_signal(kind)
    _, err = child.communicate(timeout=60)
    assert child.returncode in (130, 143) and "Traceback" not in err
    assert read_checkpoint(run)["step"] == read_log(run)[-1]["step"]


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_stopped_late_in_an_update(row, flags, tmp_path, monkeypatch):
    """A signal that comes after the loop has looked for one is heeded at the next update, and loses nothing."""
    run, report, calls = tmp_path / "run", row.module.report, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return report(*given)

    monkeypatch.setattr(row.module, "report", interrupted)
    assert run_main(row, *flags, *ENDLESS, "--run", run) == 143
    assert read_checkpoint(run)["step"] == len(calls) == 4


def test_damaged_log(row, call, tmp_path):
    """A log that a crash cut short loses its broken row and goes on; one that is no log is refused by name."""
    flags = [*row.tiny.split(), "--run", tmp_path / "run", "--max-steps"]
    assert call(row, *flags, 1).code == 0
    log = tmp_path / "run" / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 1, "ep')
    assert call(row, *flags, 2).code == 0
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [1, 2] and log.read_text().startswith(whole)
    log.write_text("no log\n")
    result = call(row, *flags, 3)
    assert result.code == 2 and str(log) in result.err and log.read_text() == "no log\n"
