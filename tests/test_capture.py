"""`capture`, the recording of an update, with stand-ins for torch.cuda's graphs; the real ones are in test_gpu.py."""

import argparse
import contextlib

import pytest
import torch


class Graph:
    """Does again, in its replay, what was asked for while it was recorded."""

    recording = None

    def replay(self):
        self.again()


@pytest.fixture
def graphs(monkeypatch):
    """Stand-ins for what capture uses of torch.cuda; all graphs that were recorded."""
    recorded = []

    @contextlib.contextmanager
    def graph(new, **_):
        Graph.recording = new
        recorded.append(new)
        yield
        Graph.recording = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("Stream", "current_stream", "set_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return recorded


def recordable(step):
    """A step that, like a CUDA graph, does nothing while it is recorded, and the same with the same tensors later."""

    def like_step(*batch):
        if Graph.recording is None:
            return step(*batch)
        losses = {}

        def again():
            for name, loss in step(*batch).items():
                losses[name].copy_(loss)

        names = like_step.names
        losses.update({name: torch.zeros(()) for name in names})
        Graph.recording.again = again
        return losses

    return like_step


def trained(row, flags, around):
    """Losses of each update and the weights after eight, each with a batch of its own."""
    args = row.args(*flags)
    state = row.module.build(args)
    step, losses = row.module.make_step(args, state), []
    update = around(step, args)
    for number in range(8):
        torch.manual_seed(number)
        batch = [part.roll(number, 0) for part in row.batch(args)]
        losses.append({name: loss.item() for name, loss in update(*batch).items()})
    return losses, {name: part.state_dict() for name, part in state.items()}


def test_replays_what_it_recorded(row, graphs):
    """A recorded update is fed each new batch, and eight of them give the losses and weights of eight plain ones."""
    like_cuda = argparse.Namespace(device="cuda:0", no_capture=False)

    def around(step, args):
        step = recordable(step)
        step.names = names
        return row.module.capture(step, like_cuda)

    plain, weights = trained(row, [], lambda step, args: step)
    names = plain[0].keys()
    captured, same_weights = trained(row, [], around)
    assert len(graphs) == 1 and captured == plain and len({str(losses) for losses in plain}) == 8
    for name in row.inputs:
        for key in weights[name]:
            assert torch.equal(weights[name][key], same_weights[name][key])


def test_is_left_out(row):
    """Elsewhere than on CUDA, and with --no-capture, the step stays what it is."""
    args = row.args("--no-capture")
    assert args.no_capture and not row.args().no_capture

    def step():
        """Stands for an update."""

    for device, no_capture in (("cpu", False), ("mps", False), ("cuda:0", True)):
        assert row.module.capture(step, argparse.Namespace(device=device, no_capture=no_capture)) is step


def test_training_records_each_of_its_steps(row, call, tmp_path, monkeypatch):
    """train puts every step that it makes through capture."""
    made, seen = [], []
    for name in [name for name in vars(row.module) if name.startswith("make_") and name.endswith("step")]:
        make = getattr(row.module, name)
        monkeypatch.setattr(row.module, name, lambda args, state, make=make: made.append(make(args, state)) or made[-1])
    capture = row.module.capture
    monkeypatch.setattr(row.module, "capture", lambda step, args: seen.append(step) or capture(step, args))
    assert call(row, *row.tiny.split(), "--out", tmp_path / "run", "--max-steps", 1).said == 0
    assert made == seen and made
