"""What every test shares: one thread a process, a folder of its own, and ways to run a script."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; results then have the same bits in every process

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from scripts import ROWS, environment, run_main

for number, handler in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if number and signal.getsignal(number) == signal.SIG_IGN:  # as under nohup, or in the background of a shell
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test leaves anything in the folder that pytest was started from."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", params=ROWS, ids=lambda row: row.name)
def row(request):
    """A script, as the table in scripts.py describes it."""
    return request.param


@pytest.fixture
def call(capsys):
    """call(row, *flags): the script's main in this process; gives back how it ended and what it printed."""

    def call(row, *flags):
        capsys.readouterr()
        said = run_main(row, *flags)
        return SimpleNamespace(said=said, **capsys.readouterr()._asdict())

    return call


@pytest.fixture
def start():
    """start(*command): a process of its own, which is ended with the test at the latest."""
    children = []

    def start(*command, **options):
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) | options
        children.append(subprocess.Popen([sys.executable, *map(str, command)], **options))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()
