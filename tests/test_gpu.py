"""What only a GPU can show, for every script; skipped without one."""

import pytest
import torch
from scripts import read_checkpoint, read_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(row, *flags):
    """Settings, state and a batch on the GPU."""
    args = row.args(*flags, "--device", "cuda")
    return args, row.module.build(args), [tensor.to(args.device) for tensor in row.batch(args)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_goes_on_where_it_stopped(row, call, tmp_path, precision):
    """A run on the GPU stops, goes on there, and then on the CPU."""
    flags = [*row.tiny.split(), "--out", tmp_path / "run", "--precision", precision, "--device"]
    for steps, device in ((2, "cuda"), (4, "cuda"), (5, "cpu"), (6, "cuda")):
        assert call(row, *flags, device, "--max-steps", steps).said == 0
        assert read_checkpoint(tmp_path / "run")["step"] == steps
    assert read_log(tmp_path / "run")[-1]["step"] == 6


def test_uses_the_run(row, call, tmp_path):
    """What was trained on the GPU can be used there."""
    assert call(row, *row.tiny.split(), "--out", tmp_path / "run", "--max-steps", 1, "--device", "cuda").said == 0
    flags, folder, expected = row.use(tmp_path, tmp_path / "run")
    assert call(row, *[flag if flag != "cpu" else "cuda" for flag in flags]).said == 0
    assert all((folder / name).exists() for name in expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_never_waits(row, precision):
    """step reads nothing back from the GPU."""
    args, state, batch = on_gpu(row, "--precision", precision)
    step = row.module.make_step(args, state)
    step(*batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_can_be_recorded(row, precision):
    """step is recorded as one CUDA graph; replaying it trains on, and follows the rate."""
    args, state, batch = on_gpu(row, "--precision", precision)
    step, stream = row.module.make_step(args, state), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = step(*batch)
    weights = {name: next(state[name].parameters()) for name in row.inputs}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    graph.replay()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(not torch.equal(weights[name], before[name]) for name in weights)
    optimisers = [part for part in state.values() if isinstance(part, torch.optim.Optimizer)]
    for group in (group for optimiser in optimisers for group in optimiser.param_groups):
        group["lr"].zero_()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    graph.replay()
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_is_as_plain(row, precision):
    """Fifty captured updates, each with new images, have the losses of fifty plain ones with the same seeds."""
    found = []
    for flags in ([], ["--no-capture"]):
        args, state, batch = on_gpu(row, "--precision", precision, *flags)
        update, losses = row.module.capture(row.module.make_step(args, state), args), []
        for number in range(50):
            torch.manual_seed(number)
            losses.append(
                {name: loss.item() for name, loss in update(*(part.roll(number, 0) for part in batch)).items()}
            )
        found.append(losses)
    assert len({str(losses) for losses in found[0]}) == 50
    for captured, plain in zip(*found, strict=True):
        assert captured == pytest.approx(plain, rel=0.05 if precision == "fp32" else 0.2, abs=0.05)
    assert found[0][5] == pytest.approx(found[1][5], rel=1e-3 if precision == "fp32" else 0.02, abs=1e-3)


def test_captured_draws_new_noise(row):
    """The seed set before a replay is the one that it draws with."""
    args, state, batch = on_gpu(row)
    update = row.module.capture(row.module.make_step(args, state), args)
    for optimiser in (part for part in state.values() if isinstance(part, torch.optim.Optimizer)):
        optimiser.param_groups[0]["lr"].zero_()
    for _ in range(4):
        update(*batch)
    seen = []
    for number in (1, 2, 1):
        torch.manual_seed(number)
        seen.append({name: loss.item() for name, loss in update(*batch).items()})
    if row.name != "cyclegan":  # which draws only whether a past image is shown
        assert seen[0] != seen[1]
        assert seen[0] == pytest.approx(seen[2], rel=1e-3, abs=1e-4)
