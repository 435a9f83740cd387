"""Two processes of one run, as torchrun starts them, joined by gloo on this machine.

In place of torchrun the test keeps the store in which they meet, so that nothing listens but on the loopback interface.
"""

import os
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import read_checkpoint, read_log, snapshot
from test_resume import assert_same_run
from test_torture import of
from torch import distributed as dist
from torture import OLD, finish

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing can be forked here")
UPDATES = 20
EQUAL = {  # flags with which two processes do what one does, but for dropout; text2img reaches all of its three phases
    "pix2pix": "--norm instance",
    "cyclegan": "--terms gan",  # an L1 has a kink in each pixel, over which rounding sends a few
    "text2img": "--text-epochs 1 --epochs 3 --style-epochs 40 --no-int",
}


class Company:
    """A case of training in a folder, and the processes that are started in it."""

    def __init__(self, lab, row, folder):
        self.lab, self.row, self.folder, self.path, self.children = lab, row, folder, folder / "run", []
        self.flags = lab.lay(row, "train", folder, save_every=1000)
        self.flags += f"--batch-size 4 --precision fp32 --device cpu --epochs {UPDATES} --max-steps {UPDATES}".split()

    def start(self, *flags, world=2, of_each=({}, {}), **more):
        """Start so many processes with more flags and more in the specs of all, and `of_each` one."""
        environ, store = {"WORLD_SIZE": str(world)}, None
        if world > 1:
            with socket.create_server(("127.0.0.1", 0)) as server:
                port, descriptor = server.getsockname()[1], server.detach()
            store = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=descriptor)
            loopback = next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
            environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": loopback}
            environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        flags, children = [*self.flags, *map(str, flags)], []
        for rank, own in enumerate(of_each[:world]):
            log, own = f"{self.folder}.log{len(self.children)}", own | {"environ": environ | {"RANK": str(rank)}}
            spec = self.lab.spec(self.row, self.folder, flags, log=log, **more, **own)
            child = self.lab.server.start(spec)
            child.log, child.store = log, store
            children.append(child)
            self.children.append(child)
        return children

    def end(self, children, seconds=60):
        """Their statuses at the end, and what they said, together."""
        codes = [finish(child, seconds) for child in children]
        out, err = ("".join(Path(f"{child.log}.{name}").read_text() for child in children) for name in ("out", "err"))
        return SimpleNamespace(codes=codes, out=out, err=err)

    def do(self, *flags, **more):
        """Start them and wait for the end."""
        return self.end(self.start(*flags, **more))

    def state(self, *flags, **more):
        """The states in which so many processes of a new run end, a dict each."""
        shutil.rmtree(self.path, ignore_errors=True)
        files = [self.folder.with_name(f"{rank}.pt") for rank in range(2)]
        result = self.do(*flags, of_each=[{"dump": str(file)} for file in files], **more)
        assert {*result.codes} == {0}, result.err
        return [torch.load(file) for file in files[: len(result.codes)]]


@pytest.fixture
def company(lab, row, tmp_path):
    """A case whose processes end with the test."""
    company = Company(lab, row, tmp_path / "case")
    yield company
    for child in company.children:
        child.send_signal(signal.SIGKILL)
        finish(child)


def weights(state):
    """{network: its weights in a row}; no biases: those that a norm takes out again go where rounding sends them."""
    found = {}
    for name, part in state.items():
        rows = [part[key].flatten().double() for key in part if key.endswith("weight")]
        found |= {name: torch.cat(rows)} if rows else {}
    return found


def apart(one, other, start):
    """{network: distance of its weights in two states, over the way that the first has come from the start}."""
    ways = {name: (here - weights(start)[name]).norm() for name, here in weights(one).items()}
    return {name: ((here - weights(other)[name]).norm() / ways[name]).item() for name, here in weights(one).items()}


def test_equal(company):
    """Two processes end with the same weights, which are, to rounding, those of one with the same whole batch."""
    flags = [*EQUAL.get(company.row.name, "").split()]
    first, second = company.state(*flags, quiet=True)
    for name in ("log.jsonl", "last.pt", "config.json"):
        assert (company.path / name).exists()
    assert [row["step"] for row in read_log(company.path)][:: len(read_log(company.path)) - 1] == [1, UPDATES]
    (alone,) = company.state(*flags, world=1, quiet=True)
    (start,) = company.state(*flags, "--max-steps", 1, world=1, quiet=True)
    for name, here in weights(first).items():
        assert torch.equal(here, weights(second)[name]), name
    found = apart(first, alone, start)
    assert found.keys() >= {"G", "D_X" if company.row.name == "cyclegan" else "D"}
    assert {name: far for name, far in found.items() if not far < 1e-3} == {}


@of("dcgan", "text2img")
def test_statistics_are_of_the_whole_batch(company):
    """Running averages of batch norm are the same in all processes, and those of one."""
    first, second = company.state(*EQUAL.get(company.row.name, "").split(), quiet=True)
    (alone,) = company.state(*EQUAL.get(company.row.name, "").split(), world=1, quiet=True)
    for name in "GD":
        kept = [key for key in first[name] if "running" in key]
        assert kept
        for key in kept:
            assert torch.equal(first[name][key], second[name][key])
            if "var" in key:  # a mean moves with a bias that the norm takes out again
                torch.testing.assert_close(first[name][key], alone[name][key], rtol=1e-3, atol=1e-5)


@of("pix2pix", "gan", "cgan")
def test_noise_is_not_the_same(company):
    """Where there is dropout each process has its own: two differ from one, but end with the same weights."""
    flags = [*EQUAL.get(company.row.name, "").split()]
    first, second = company.state(*flags)
    (alone,) = company.state(*flags, world=1)
    assert all(torch.equal(here, weights(second)[name]) for name, here in weights(first).items())
    assert max(apart(first, alone, company.state(*flags, "--max-steps", 1)[0]).values()) > 1e-3


@pytest.mark.parametrize("victim", [0, 1])
def test_killed(company, victim):
    """When a process is killed the others end within seconds in one sentence, and the same command goes on."""
    aims = [{}, {}]
    aims[victim] = {"aim": ["update", 8, "SIGKILL"]}
    children = company.start("--save-every", 5, of_each=aims)
    assert finish(children[victim]) == -9
    begun = time.monotonic()
    result = company.end(children)
    assert sorted(result.codes) == [-9, 2] and time.monotonic() - begun < 10
    name = company.row.file.name
    assert result.err == f"{name}: another process has ended: repeat the command, it goes on from last.pt\n"
    assert read_checkpoint(company.path)["step"] == 5
    assert company.do("--save-every", 5).codes == [0, 0]
    shutil.move(company.path, company.folder / "first")
    assert company.do("--save-every", 5).codes == [0, 0]
    assert_same_run(company.folder / "first", company.path)


@pytest.mark.parametrize(("told", "kind"), [(0, signal.SIGTERM), (1, signal.SIGINT)], ids=str)
@of("pix2pix", "text2img")
def test_stopped(company, told, kind):
    """A signal to any of the processes stops all of them at the same update, and the checkpoint is that of it."""
    aims = [{}, {}]
    aims[told] = {"aim": ["update", 8, kind.name]}
    result = company.do(of_each=aims)
    assert (result.codes, result.err) == ([128 + kind, 128 + kind], "")
    assert read_checkpoint(company.path)["step"] == 8
    assert company.do().codes == [0, 0]
    shutil.move(company.path, company.folder / "first")
    assert company.do().codes == [0, 0]
    assert_same_run(company.folder / "first", company.path)


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1)], ids=str)
def test_other_number_of_processes(company, worlds):
    """A run goes on with another number of processes."""
    for world, steps in zip(worlds, (8, UPDATES), strict=True):
        result = company.do("--max-steps", steps, world=world)
        assert ({*result.codes}, result.err) == ({0}, "")
        assert read_checkpoint(company.path)["step"] == steps
    steps = [row["step"] for row in read_log(company.path)]
    assert steps == sorted({*steps}) and {*steps} >= {1, 8, 9, UPDATES}
    assert result.out.count("is finished") == 1


def test_default_batch(company, monkeypatch):
    """Without --batch-size there is at least a share for each process."""
    row, module = company.row, company.row.module
    least = module.get_args(["--run", "run"]).batch_size
    for world in (3, 64):
        monkeypatch.setattr(module, "WORLD", world)
        size = module.get_args(["--run", "run", "--device", "cpu"]).batch_size
        assert size % world == 0 and 0 <= size - least < world, row.name


@of("pix2pix", "cgan")
def test_refusals_are_said_once(company):
    """Whatever several processes find wrong, they end with status 2, and one sentence is said in all."""
    name = company.row.file.name
    assert company.do("--max-steps", 2).codes == [0, 0]
    before = snapshot(company.path)
    for flags, said in (
        (["--batch-size", 3], "--batch-size 3: give a multiple of 2, the number of processes"),
        (["--lr", 0.5], "run was begun with lr "),
        (["--data", "nowhere", "--run", "other"], "--data nowhere is no folder"),
    ):
        result = company.do(*flags)
        assert (result.codes, len(result.err.splitlines())) == ([2, 2], 1), result.err
        assert result.err.startswith(f"{name}: {said}")
    assert snapshot(company.path) == before
    broken = next(file for file in sorted((company.folder / "set").rglob("*.png")))
    broken.write_bytes(b"no picture")
    result = company.do("--run", "other")
    assert (result.codes, len(result.err.splitlines())) == ([2, 2], 1) and broken.name in result.err


def test_one_process_uses_what_was_trained(company):
    """To translate or to draw, one of the processes is enough."""
    company.path.mkdir()
    shutil.copy(OLD / f"{company.row.name}-v1.pt", company.path / "last.pt")
    flags, to, sizes = company.row.use(company.folder / "use", company.path)
    company.flags = [*map(str, flags)]
    result = company.do()
    assert (result.codes, result.err) == ([0, 0], "")
    assert all((to / name).exists() for name in sizes) and result.out.count(str(to)) >= 1
    assert company.do(world=1).out == result.out  # said once
