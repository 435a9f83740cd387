"""A run that was stopped, in whatever way, and went on is bit for bit the run that was not, on a CPU."""

import shutil
import signal
import sys
import time

import pytest
import torch
import torture
from scripts import ROWS, assert_refused, read_checkpoint, read_log, run_main, snapshot

STEPS = 8  # of three passes over eight items, in threes


@pytest.fixture(scope="session")
def flags(row, tmp_path_factory):
    """Flags of a run on eight items, but for the schedule and the run folder."""
    folder = tmp_path_factory.mktemp("data")
    row.data(folder / "set")
    return [*row.resume.split(), "--data", folder / "set", "--data-root", folder / "data", "--seed", 3]


@pytest.fixture(scope="session")
def whole(row, flags, tmp_path_factory):
    """A run that was not stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_main(row, *flags, "--epochs", row.epochs, "--out", run, "--save-every", 1) == 0
    assert [entry["step"] for entry in read_log(run)] == [*range(1, STEPS + 1)]
    return run


def state(run):
    """What a checkpoint holds, but for the settings."""
    return {name: part for name, part in read_checkpoint(run).items() if name not in ("settings", "log_size")}


def assert_same_run(run, whole):
    """Equal checkpoints, equal rows of the log where the steps coincide, no step twice, equal pictures of the end."""
    assert torture.equal(state(run), state(whole))
    logs = [{entry["step"]: entry | {"images_per_s": 0} for entry in read_log(folder)} for folder in (run, whole)]
    steps = [entry["step"] for entry in read_log(run)]
    assert steps == sorted({*steps}) and steps[-1] == read_checkpoint(run)["step"]
    assert [step for step in logs[0].keys() & logs[1].keys() if logs[0][step] != logs[1][step]] == []
    for name in ("test", f"samples/{steps[-1]:07}.png"):
        pictures = [
            snapshot(folder / name) if (folder / name).is_dir() else (folder / name).read_bytes()
            for folder in (run, whole)
            if (folder / name).exists()
        ]
        assert pictures[:1] == pictures[1:], name


@pytest.mark.parametrize("stops", [[1], [3, 4, 7]], ids=str)
def test_stopped_by_max_steps(row, flags, whole, tmp_path, stops):
    """A run in several parts, in a folder that is moved, is the run in one."""
    run = tmp_path / "run"
    for stop in stops:
        torch.rand(stop)  # no random state of the process has a say in it
        assert run_main(row, *flags, "--epochs", row.epochs, "--out", run, "--max-steps", stop) == 0
        assert read_checkpoint(run)["step"] == stop
    run = run.rename(tmp_path / "moved")
    assert run_main(row, *flags, "--epochs", row.epochs, "--out", run) == 0
    assert_same_run(run, whole)


def test_stopped_between_checkpoints(row, flags, whole, tmp_path):
    """What a run that was killed left after its last checkpoint is done and logged again."""
    run = tmp_path / "run"
    assert run_main(row, *flags, "--epochs", row.epochs, "--out", run, "--max-steps", 4) == 0
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 5, "epoch": 9, "images_per_s": 1.0}\n{"step": 6, "epo')
    assert run_main(row, *flags, "--epochs", row.epochs, "--out", run, "--save-every", 1) == 0
    assert_same_run(run, whole)
    (run / "last.pt").unlink()  # a folder without a checkpoint is one to start in
    assert run_main(row, *flags, "--epochs", row.epochs, "--out", run) == 0
    assert_same_run(run, whole)


def signal_in_step(monkeypatch, row, number, kind):
    """Send a signal to this process in the step of that number."""
    calls, make_step = [], row.module.make_step

    def make_disturbed_step(args, state):
        step = make_step(args, state)

        def disturbed_step(*batch):
            calls.append(batch)
            if len(calls) == number:
                signal.raise_signal(kind)
            return step(*batch)

        return disturbed_step

    monkeypatch.setattr(row.module, "make_step", make_disturbed_step)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_in_a_step(row, flags, whole, tmp_path, monkeypatch, kind):
    """A signal saves at once and ends with its status; handlers are given back; the same command resumes."""
    run, number = tmp_path / "run", getattr(signal, kind)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_in_step(patch, row, 2, number)
        assert run_main(row, *flags, "--epochs", row.epochs, "--out", run) == 128 + number
    assert signal.getsignal(number) is before
    assert 2 <= read_checkpoint(run)["step"] < STEPS
    assert run_main(row, *flags, "--epochs", row.epochs, "--out", run) == 0
    assert_same_run(run, whole)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_signal_to_a_process(row, flags, start, tmp_path):
    """Ctrl-C in a real process: it saves, says what to do, and shows no traceback."""
    run = tmp_path / "run"
    child = start(row.file, *flags, "--epochs", 10**6, "--out", run)
    while not (run / "log.jsonl").exists() or not (run / "log.jsonl").stat().st_size:
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "saved at step" in out and err == "", err
    assert read_checkpoint(run)["step"] == read_log(run)[-1]["step"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing can be killed here")
def test_kills():
    """kill -9 at random moments; `python -m tests.torture kills` does it at length."""
    torture.kill_all(6, seed=1)


def test_longer_and_other_schedule(row, flags, whole, tmp_path, capsys):
    """A finished run goes on with more epochs, another rate and another batch, which is said."""
    run = shutil.copytree(whole, tmp_path / "run")
    changes = ["--epochs", row.epochs + 2, "--lr", "1e-5", "--batch-size", 4]
    assert run_main(row, *flags, *changes, "--out", run) == 0
    said = capsys.readouterr().out
    assert all(f"{name}" in said for name in ("epochs", "lr", "batch-size"))
    assert read_checkpoint(run)["step"] > STEPS
    assert read_log(run)[-1]["epoch"] > read_log(whole)[-1]["epoch"]


def test_other_images_are_refused(row, flags, whole, tmp_path):
    """A run belongs to its images: others, even as many, are refused; a folder that was moved is not."""
    data = flags[flags.index("--data") + 1]
    moved = shutil.copytree(data, tmp_path / "moved")
    again = [*flags, "--data", moved, "--epochs", row.epochs, "--out"]
    run = shutil.copytree(whole, tmp_path / "run")
    assert run_main(row, *again, run, "--max-steps", STEPS) == 0
    victim = sorted(moved.rglob("*.png"))[0]
    victim.write_bytes(victim.read_bytes() + b"0")
    assert_refused(run_main(row, *again, run, "--max-steps", STEPS + 1), "other images")


def test_init(row, flags, whole, tmp_path):
    """--init starts a new run from the weights of another; its networks must fit."""
    run = tmp_path / "run"
    assert run_main(row, *flags, "--init", whole, "--lr", "0", "--out", run, "--max-steps", 1) == 0
    assert read_checkpoint(run)["step"] == 1
    for name in [name for name, _ in row.module.build(row.args()).items() if name in ("G", "F")]:
        assert all(
            torch.equal(weight, read_checkpoint(whole)[name][key])
            for key, weight in read_checkpoint(run)[name].items()
            if "running" not in key and "num_batches" not in key
        )
    other = [*flags, "--ngf", "8", "--init", whole, "--out", tmp_path / "other", "--max-steps", 1]
    assert_refused(run_main(row, *other), str(whole))


def test_fresh(row, flags, whole, tmp_path):
    """--fresh starts over and deletes checkpoint, log and samples of the run, and nothing else."""
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    (run / "test").mkdir(exist_ok=True)
    (run / "test" / "old.png").touch()
    flags = [*flags, "--epochs", row.epochs, "--out", run, "--max-steps", 1]
    assert run_main(row, *flags, "--fresh", "--init", run) == 0  # which is read before it is deleted
    assert read_checkpoint(run)["step"] == 1 and [entry["step"] for entry in read_log(run)] == [1]
    assert (run / "notes.txt").read_text() == "mine" and not [
        *run.glob(f"samples/*{STEPS}*"),
        *run.glob("test/old.png"),
    ]
    config = (run / "config.json").read_text()
    assert run_main(row, *flags, "--lr", 1) == 0 and (run / "config.json").read_text() == config  # nothing was trained


def test_one_owner(row, flags, start, tmp_path):
    """A run folder that is in use is refused."""
    child = start(row.file, *flags, "--epochs", 10**6, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    if row.name == ROWS[0].name:  # the lock is in the shared block
        assert_refused(run_main(row, *flags, "--epochs", 10**6, "--out", tmp_path / "run"), "in use")
