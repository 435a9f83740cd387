"""What the bench says of speed: FLOPs, bytes and memory by hand, turns and ratios by a clock that is wound here."""

import importlib
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from scripts import ROOT, environment
from torch import nn

import cyclegan
import dcgan
import gan
import pix2pix
from bench import speed
from bench.__main__ import main

SMALL_GAN = "--size 8 --ngf 16 --ndf 4 --batch-size 4 --precision fp32 --device cpu --lr 0"


def flops_of(call):
    return speed.count(call, [], "cpu")["flops"]


def small_gan(*flags):
    """Settings, state and batch of gan.py's smallest networks."""
    args = gan.get_args([*SMALL_GAN.split(), *flags])
    return args, gan.build(args), speed.draw_batch("gan", args)


# -- FLOPs, bytes, memory --------------------------------------------------------------------------------------------


def test_flops_of_a_small_network():
    """Each pass multiplies as often: forward, back to the weights, and back to the input where that is asked for."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(3, 4, 4, 2, 1))
    linear, x = nn.Linear(4 * 10 * 8, 7), torch.randn(6, 2, 5, 4)
    convolution, transposed = 6 * 5 * 4 * 2 * 3 * 9, 6 * 5 * 4 * 3 * 4 * 16  # the latter from each place of its input
    product = 6 * 320 * 7
    assert flops_of(lambda: net(x)) == 2 * (convolution + transposed)
    found = flops_of(lambda: linear(net(x).flatten(1)).sum().backward())
    assert found == 2 * (2 * convolution + 3 * transposed + 3 * product)


@pytest.mark.parametrize(
    ("net", "shape", "macs", "digits"),
    [
        (pix2pix.Generator, (1, 3, 256, 256), 6.05e9, 3),
        (pix2pix.Discriminator, (1, 6, 256, 256), 3.20e9, 3),
        (cyclegan.Generator, (1, 3, 256, 256), 49.55e9, 4),
        (lambda: cyclegan.Generator(6), (1, 3, 128, 128), 8.76e9, 3),
        (lambda: dcgan.Generator(kernel=4, ngf=64), (1, 100), 104.6e6, 4),
        (lambda: dcgan.Generator(), (1, 100), 640.6e6, 4),
    ],
)
def test_flops_of_the_networks(net, shape, macs, digits):
    """Multiply-adds of an image, as counted layer by layer from the papers."""
    with torch.device("meta"):
        net, x = net(), torch.empty(shape)
    found = flops_of(lambda: net(x))
    assert float(f"{found / 2:.{digits - 1}e}") == macs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flops_of_an_update(precision):
    """gan.py's update by hand: no pass goes where no gradient is needed, in either precision."""
    args, state, batch = small_gan("--precision", precision)
    first_G, rest_G = 100 * 16, 16 * 16 + 16 * 64  # multiply-adds of an image
    first_D, rest_D = 64 * 20, 4 * 20 + 4
    of_G = 2 * first_G + 3 * rest_G
    of_D = 2 * (2 * first_D + 3 * rest_D) + first_D + rest_D  # real and fake; then through D into G(z)
    found = flops_of(lambda: gan.make_step(args, state)(*batch))
    assert found == 2 * 4 * (of_G + of_D)


@pytest.mark.parametrize(("optimiser", "passes"), [("adam", 8), ("sgd", 6)])
def test_bytes_of_an_update(optimiser, passes):
    """4 bytes for gradient, weight and each of its moments, both ways, and the batch once."""
    args, state, batch = small_gan("--optimiser", optimiser)
    gan.make_step(args, state)(*batch)
    weights = 100 * 16 + 16 + 16 * 16 + 16 + 16 * 64 + 64 + 64 * 20 + 20 + 4 * 20 + 20 + 4 + 1
    assert speed.bytes_of_update(state.values(), batch) == passes * 4 * weights + 4 * 4 * 64


def test_bytes_leave_out_what_rests():
    """Weights that the update has no gradient for are not moved."""
    args, state, batch = small_gan()
    gan.make_step(args, state)(*batch)
    moved = speed.bytes_of_update(state.values(), batch)
    resting = nn.Linear(50, 50)
    state["opt_E"] = torch.optim.Adam(resting.parameters(), fused=True)
    assert speed.bytes_of_update(state.values(), batch) == moved


def test_memory_by_hand():
    """What is alive at once: what was there, what a graph keeps until it is used, views for nothing."""
    before = torch.zeros(100)
    with speed.Held([before, before.view(10, 10)]) as held:
        assert held.now == 400
        x = torch.zeros(1000, requires_grad=True)
        y = x.exp().exp().view(10, 100).exp()  # each is kept for its own derivative
        assert held.now == 400 + 4 * 4000
        y.sum().backward()  # with the gradient of y, expanded from one number
        del y
        assert held.now == 400 + 2 * 4000  # x and its gradient
    assert 400 + 5 * 4000 <= held.most <= 400 + 6 * 4000 + 8


def test_memory_of_an_update():
    """Never less than weights, gradients and two moments in float32; not much more where the batch is small."""
    args, state, batch = small_gan("--ngf", "400", "--average", "0")
    step = gan.make_step(args, state)
    weights = sum(weight.numel() for name in "GD" for weight in state[name].parameters())
    found = speed.count(lambda: step(*batch), speed.tensors(state.values()), "cpu")
    assert 16 * weights < found["peak_memory"] < 1.1 * 16 * weights


# -- turns and ratios ------------------------------------------------------------------------------------------------


def test_variants_take_turns():
    """All of them in every round, each of which begins one further on."""
    seen = []
    timed = {name: lambda name=name: seen.append(name) or len(seen) for name in "abc"}
    times = speed.interleave(timed, 4)
    assert "".join(seen) == "abc" + "bca" + "cab" + "abc"
    assert times == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


class Machine:
    """A clock, and calls that move it on: ever slower ones, as others come to work there too."""

    def __init__(self):
        self.now, self.calls = 0.0, 0

    def clock(self):
        return self.now

    def work(self, seconds):
        self.calls += 1
        self.now += seconds * (1 + self.calls / 10)


@pytest.fixture
def machine(monkeypatch):
    """Variants of which plain is three times as slow, on a machine of 100 FLOP/s and 10 bytes/s."""
    machine = Machine()
    row = {"flops": 600, "bytes": 5, "batch": 4, "precision": "fp32"}

    def prepare(work, script, size, variant, device):
        return lambda: machine.work(30.0 if variant == "plain" else 10.0), dict(row)

    monkeypatch.setattr(speed, "prepare", prepare)
    monkeypatch.setattr(speed, "product", lambda device, precision: (lambda: machine.work(2.0), 200))
    monkeypatch.setattr(speed, "copy", lambda device: (lambda: machine.work(1.0), 10))
    return machine


def test_speed_up_of_a_slow_variant(machine):
    """The ratio in a round holds, though the last round is many times as slow as the first."""
    found = speed.measure("update", "gan", "toy", ["plain", "bf16"], "cpu", 40, clock=machine.clock)
    (slow, plain), (fast, ours) = found["plain"], found["bf16"]
    assert len(slow) == len(fast) == 40 and fast[-1] > 5 * fast[0]
    assert plain["speed_up"] == 1 and ours["speed_up"] == pytest.approx(3, rel=0.02)
    assert speed.speed_up([3, 1, 8], [1, 2, 2]) == 3


def test_account_by_hand(machine):
    """The floor is the longer of the two times; all else follows from it and from the median."""
    row = {"flops": 600, "bytes": 5, "batch": 4}
    found = speed.account(row, [10.0, 30.0, 12.0], [20.0, 30.0, 60.0], 100.0, 10.0)
    assert found["seconds"] == 12 and found["rounds"] == 3 and found["seconds_at_peaks"] == 6
    assert found["ratio"] == 2 and found["share_of_peak"] == 0.5 and found["speed_up"] == 2
    assert found["images_per_s"] == pytest.approx(1 / 3)
    found = speed.account(row | {"bytes": 80}, [10.0], None, 100.0, 10.0)
    assert found["seconds_at_peaks"] == 8 and found["ratio"] == 1.25 and found["speed_up"] is None


def test_rounds(machine):
    """As many as the slowest needs for its time, or as many as were asked for; short calls are timed in a row."""
    machine.work = lambda seconds: setattr(machine, "now", machine.now + seconds / 8192)
    found = speed.measure("update", "gan", "toy", ["plain", "bf16"], "cpu", 2, 1.0, machine.clock)
    assert {name: row["calls"] for name, (_, row) in found.items()} == {"plain": 6, "bf16": 17}  # .02 s
    assert {row["rounds"] for _, row in found.values()} == {46}  # of .022 s
    found = speed.measure("update", "gan", "toy", ["plain"], "cpu", 60, 1.0, machine.clock)
    assert len(found["plain"][0]) == 60 and found["plain"][0][0] == 30 / 8192


@pytest.mark.parametrize("faster", ["product", "convolution"])
def test_product(faster, monkeypatch):
    """The faster of the two, large enough, is a product; the setting of float32 products stays what it was."""
    before = torch.backends.cuda.matmul.fp32_precision

    def seconds_of(call, loops, device):
        return call.args[1].numel() / 2**26 / (2 if (call.func is speed.multiply) == (faster == "product") else 1)

    monkeypatch.setattr(speed, "seconds_of", seconds_of)
    call, flops = speed.product.__wrapped__("cpu", "bf16")
    found = call()
    assert flops == 2 * 1024**3 and torch.backends.cuda.matmul.fp32_precision == before
    if faster == "product":
        a, b, found = call.args
        expected = a @ b
    else:
        x, kernels = call.args
        expected = (kernels.flatten(1) @ x.squeeze(2)).unsqueeze(2)
    assert found.numel() == 1024**2 and found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_copy():
    """It reads and writes."""
    call, moved = speed.copy.__wrapped__("cpu")
    assert moved == 2 * call.args[0].nbytes == 2**29


# -- what is timed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "size", "batch", "width"),
    [
        ("gan", 28, 100, 1200),
        ("cgan", 28, 100, 1200),
        ("dcgan", 64, 128, 128),
        ("text2img", 64, 64, 128),
        ("pix2pix", 256, 1, 64),
        ("cyclegan", 256, 1, 64),
    ],
)
def test_sizes_of_the_papers(script, size, batch, width):
    args = importlib.import_module(script).get_args(speed.FLAGS[script]["paper"].split())
    assert (args.size, args.batch_size, args.ngf) == (size, batch, width)


def test_size_of_the_torch_code():
    """DCGAN's Torch code has a sixth of the paper's multiply-adds in G."""
    args = dcgan.get_args(speed.FLAGS["dcgan"]["torch"].split())
    with torch.device("meta"):
        net, z = dcgan.Generator(args.size, args.channels, args.kernel, args.nz, args.ngf), torch.empty(1, 100)
    assert round(flops_of(lambda: net(z)) / 2e6, 1) == 104.6 and args.batch_size == 128


def test_every_script_is_measured():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert set(speed.FLAGS) == files


@pytest.mark.parametrize("script", tuple(speed.FLAGS))
def test_plain_is_the_same_update(script):
    """Written plainly, with another Adam, updates come to the same losses, and move the weights."""
    module, flags = importlib.import_module(script), "--batch-size 4 --ngf 12 --ndf 24 --precision fp32 --device cpu"
    args, losses = module.get_args(flags.split()), []
    for change in (dict, speed.plain):
        state = change(module.build(args))
        step, batch = module.make_step(args, state), speed.draw_batch(script, args)
        begun = [weight.clone() for weight in state["G"].parameters()]
        losses.append([step(*batch) for _ in range(2) if torch.manual_seed(0)])
        assert not any(map(torch.equal, begun, state["G"].parameters()))
    for optimiser in (part for part in state.values() if isinstance(part, torch.optim.Adam)):
        assert not optimiser.defaults["fused"] and not optimiser.defaults["foreach"]
        assert optimiser.defaults["lr"] == pytest.approx(args.lr) and optimiser.defaults["betas"] == (0.5, 0.999)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("script", ["gan", "dcgan", "cgan", "text2img"])
def test_draws_as_the_script_does(script):
    """A batch from G as it is timed is that of the script's own `draw`."""
    module = importlib.import_module(script)
    args = module.get_args("--batch-size 6 --ngf 12 --ndf 24 --precision fp32 --device cpu".split())
    G = module.build(args)["G"]
    inputs = speed.draw_inputs(script, args, speed.draw_batch(script, args))
    torch.manual_seed(1)
    expected = module.draw(args, G, *inputs)
    torch.manual_seed(1)
    with torch.no_grad():
        x = speed.as_drawing(script, G)(*inputs)
    low = 0 if script in ("gan", "cgan") else -1
    torch.testing.assert_close(x, expected / 255 * (1 - low) + low, rtol=0, atol=(1 - low) / 509)  # half a step


def test_rate_is_zero(monkeypatch):
    """All updates that are timed are the same work: no weight moves, whatever its gradient."""
    make_step, states = gan.make_step, []
    monkeypatch.setattr(gan, "make_step", lambda args, state: states.append(state) or make_step(args, state))
    call, row = speed.prepare("update", "gan", "toy", "fp32", "cpu")
    call()
    begun = gan.build(gan.get_args(row["settings"].split()))
    for name in "GD":
        for weight, before in zip(states[0][name].parameters(), begun[name].parameters()):
            assert torch.equal(weight, before) and weight.grad.abs().max() > 0


def test_captured_update(monkeypatch):
    """A script's `capture` is given the step and the settings, after an eager update was counted."""
    seen = []

    def capture(step, args):
        return lambda x: seen.append((step(x), args.bf16)) or seen[-1]

    monkeypatch.setattr(gan, "capture", capture, raising=False)
    call, row = speed.prepare("update", "gan", "toy", "bf16-captured", "cpu")
    assert not seen and row["captured"] and row["flops"] > 0
    losses, bf16 = call()
    assert bf16 and len(seen) == 1 and set(losses) == {"loss_D", "loss_G"}


def test_captured_is_left_out_where_it_cannot_be(monkeypatch):
    monkeypatch.setitem(sys.modules, "pix2pix", SimpleNamespace())
    assert speed.lacking("pix2pix", "bf16", "cpu") is None
    assert "CUDA" in speed.lacking("pix2pix", "bf16-captured", "cpu")
    assert "pix2pix.py has no" in speed.lacking("pix2pix", "bf16-captured", "cuda:0")
    monkeypatch.setitem(sys.modules, "pix2pix", SimpleNamespace(capture=None))
    assert speed.lacking("pix2pix", "bf16-captured", "cuda:0") is None


# -- the commands ----------------------------------------------------------------------------------------------------


def test_speed_command(tmp_path, capsys):
    """The smallest case from the command line: a line for each variant, and the same in a JSON."""
    out = tmp_path / "speed.json"
    main(["speed", "--scripts", "gan", "--rounds", "1", "--seconds", "0", "--device", "cpu", "--out", str(out)])
    lines, found = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert len(lines) == 5 and [line.split()[2] for line in lines[2:]] == ["plain", "fp32", "bf16"]
    assert [row["variant"] for row in found["rows"]] == ["plain", "fp32", "bf16"]
    assert found["versions"]["torch"] == torch.__version__ and found["device_name"] and found["threads"] == 1
    assert {"commit", "clean"} <= found.keys()
    for row in found["rows"]:
        assert row["rounds"] == 1 and row["batch"] == 100 and math.isfinite(row["ratio"])
        needed = row["flops"] / row["peak_flops"], row["bytes"] / row["peak_bandwidth"]
        assert row["seconds_at_peaks"] == max(needed)


def test_benchmark_file_can_be_compared(tmp_path):
    """pytest bench hands its rounds on as they were measured together, in a file that pytest-benchmark compares."""
    kind = dict(cwd=tmp_path, env=environment(), capture_output=True, text=True)
    flags = "-p no:cacheprovider --benchmark-min-rounds 3 --benchmark-max-time 0.001 --device cpu"
    flags += " --benchmark-storage kept --benchmark-json before.json"
    chosen = ["-k", "update-gan-toy or generate-gan-toy"]
    done = subprocess.run([sys.executable, "-m", "pytest", ROOT / "bench", *flags.split(), *chosen], **kind)
    assert done.returncode == 0 and "5 passed, 2 skipped" in done.stdout, done.stdout + done.stderr
    tests = json.loads((tmp_path / "before.json").read_text())["benchmarks"]
    names = ["update-gan-toy-plain", "update-gan-toy-fp32", "update-gan-toy-bf16"]
    names += ["generate-gan-toy-fp32", "generate-gan-toy-bf16"]
    assert [test["name"] for test in tests] == [f"test_speed[{name}]" for name in names]
    for test in tests:
        row = test["extra_info"]
        assert test["group"] == f"{row['work']}-gan-toy" and len(test["stats"]["data"]) == row["rounds"] >= 3
        assert test["stats"]["median"] == pytest.approx(row["seconds"])
        assert (
            row["flops"]
            == {"update": 658672000, "generate": 2 * 100 * (100 * 400 + 400 * 400 + 400 * 784)}[row["work"]]
        )
        assert row["device_name"] and row["versions"] and row["peak_memory"] and row["images_per_s"]
    assert len({(test["group"], test["extra_info"]["peak_bandwidth"]) for test in tests}) == 2  # one measurement each
    assert [test["extra_info"]["speed_up"] == 1 for test in tests] == [True, False, False, True, False]
    (tmp_path / "after.json").write_text((tmp_path / "before.json").read_text())
    flags = "compare --group-by fullname before.json after.json"
    done = subprocess.run([sys.executable, "-m", "pytest_benchmark", *flags.split()], **kind)
    assert done.returncode == 0 and done.stdout.count("test_speed[update-gan-toy-bf16]") == 3, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--scripts stylegan", "stylegan"),
        ("--sizes huge", "huge"),
        ("--precision fp16", "fp16"),
        ("--rounds 0", "--rounds"),
        ("--rounds many", "--rounds"),
        ("--seconds -1", "--seconds"),
        ("--seconds nan", "--seconds"),
        ("--device tpu", "--device"),
        ("--out file/speed.json --scripts gan --rounds 1 --seconds 0", "speed.json"),
    ],
)
def test_bad_arguments(flags, named, tmp_path, capsys):
    """One sentence that names what is wrong, and exit status 2."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        main(["speed", *flags.split()])
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1 and named in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", tuple(speed.FLAGS))
def test_on_a_gpu(script):
    """Every variant that the script has is measured there."""
    variants = [name for name in speed.VARIANTS if not speed.lacking(script, name, "cuda:0")]
    for _, row in speed.measure("update", script, "toy", variants, "cuda:0", 1, 0.0).values():
        assert 0 < row["share_of_peak"] < 1 < row["ratio"] and row["memory_of"].startswith("torch.cuda")
