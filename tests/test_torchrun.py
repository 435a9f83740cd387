"""torchrun, with its real command line, starts two processes on this machine; they are joined by gloo.

torchrun listens on all interfaces. So it runs in a network of its own, which has the loopback interface only.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from scripts import ROWS, environment, read_checkpoint, read_log

NETWORK = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS: up
os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *sys.argv[1:]])
"""
UNSHARE = ["unshare", "--net", "--map-root-user", sys.executable, "-c", NETWORK]


def has_network():
    """Whether this machine lets a process have a network of its own."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run([*UNSHARE, "--help"], capture_output=True, timeout=60).returncode == 0


pytestmark = pytest.mark.skipif(not has_network(), reason="no network namespaces here")
FOUR = [row for row in ROWS if row.name in ("pix2pix", "cyclegan", "dcgan", "text2img")]
each_of_four = pytest.mark.parametrize("row", FOUR, ids=lambda row: row.name, indirect=True)


@pytest.fixture
def torchrun():
    """torchrun(row, *flags): two processes of a script, which are ended with the test at the latest."""
    children = []

    def start(row, *flags):
        command = [*UNSHARE, "--standalone", "--nproc-per-node", "2", str(row.file), *map(str, flags)]
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        children.append(subprocess.Popen(command, env=environment(GLOO_SOCKET_IFNAME="lo"), **options))
        return children[-1]

    yield start
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


@each_of_four
def test_trains(row, torchrun, tmp_path):
    """Every option of the script can stand on torchrun's command line; two processes train, and one speaks."""
    named = [f"--{name.replace('_', '-')}" for name in re.findall(r'add\(\s*"--([\w-]+)"', row.file.read_text())]
    given = row.tiny.split()
    shared = {"--out": tmp_path / "run", "--data-root": tmp_path / "data", "--max-steps": 4, "--save-every": 2}
    given += [str(part) for item in shared.items() for part in item]
    child = torchrun(row, *given)
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0, out
    assert read_checkpoint(tmp_path / "run")["step"] == 4 and read_log(tmp_path / "run")[-1]["step"] == 4
    assert out.count("starting ") == 1, out
    out, _ = torchrun(row, *named).communicate(timeout=120)  # without values, which the script then misses
    assert "ambiguous" not in out and "expected one argument" in out, out


@each_of_four
def test_stops_at_one_step(row, torchrun, tmp_path):
    """SIGTERM to torchrun stops all processes at one step, after a save; the same command goes on."""
    run = tmp_path / "run"
    flags = [*row.tiny.split(), "--out", run, "--data-root", tmp_path / "data", "--epochs", 10**5]
    child = torchrun(row, *flags)
    while not (run / "log.jsonl").exists() or not (run / "log.jsonl").stat().st_size:
        assert child.poll() is None, child.communicate()
        time.sleep(0.1)
    child.terminate()
    out, _ = child.communicate(timeout=60)
    step = read_checkpoint(run)["step"]
    assert out.count(f"saved at step {step}") == 1 and read_log(run)[-1]["step"] == step, out
    assert torchrun(row, *flags, "--max-steps", step + 2).wait(120) == 0
    assert read_checkpoint(run)["step"] == step + 2


def test_two_are_one(torchrun, tmp_path):
    """Two processes with half of a batch each have the gradients of one: those of cyclegan, which has no batch norm."""
    row = next(row for row in ROWS if row.name == "cyclegan")
    flags = [*row.tiny.split(), "--pool", 0, "--data-root", tmp_path / "data", "--max-steps", 1, "--out"]
    child = torchrun(row, *flags, tmp_path / "two")
    assert child.wait(120) == 0, child.communicate()
    row.module.main([*map(str, flags), str(tmp_path / "one")])
    one, two = (read_checkpoint(tmp_path / name)["opt_G"]["state"] for name in ("one", "two"))
    for weight in one:  # Adam's first moment is (1 - beta1) times the first gradient
        apart = (one[weight]["exp_avg"] - two[weight]["exp_avg"]).norm()
        assert apart <= 1e-3 * one[weight]["exp_avg"].norm() + 1e-6
