"""What the bench says of speed: FLOPs and ratios by hand, the rows of every script, pytest bench."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import speed
from bench.__main__ import main

ROOT = Path(__file__).parent.parent


def test_account_by_hand():
    """All follows from the median time, and from the ratio in each round."""
    row = {"flops": 600, "images": 4}
    speed.account(row, [10.0, 30.0, 12.0], [20.0, 30.0, 60.0], 100.0)
    assert row["seconds"] == 12 and row["rounds"] == 3 and row["images_per_s"] == pytest.approx(1 / 3)
    assert row["x_plain"] == 2 and row["share_of_peak"] == 0.5  # x_plain: of 2, 1 and 5


def test_flops_of_gan():
    """One update of gan.py on toy digits, by hand: three layers in G, and in D three, of maxout with five pieces."""
    call, row = speed.prepare("gan", "toy", "plain fp32", "cpu")
    g, d = 100 * 400 + 400 * 400 + 400 * 784, 784 * 400 + 80 * 400 + 80
    first_g, first_d = 100 * 400, 784 * 400  # no gradient goes to z, nor to real images
    forward = g + 2 * d
    backward_d = 2 * (2 * d) - 2 * first_d  # to D's weights
    backward_g = 2 * d + 2 * g - first_g - d  # through D to G's weights
    assert row["flops"] == 2 * 100 * (forward + backward_d + backward_g) and row["kind"] == "product"
    assert row["images"] == 100 and row["peak_memory"] is None
    assert set(call()) == {"loss_D", "loss_G"}


@pytest.mark.parametrize("script", speed.FLAGS)
def test_plain_is_the_same_update(script):
    """With torch's usual Adam and layout, updates come to the same losses, and move the weights."""
    module = importlib.import_module(script)
    args, losses = module.get_args("--batch-size 4 --ngf 12 --ndf 24 --precision fp32 --device cpu".split()), []
    torch.manual_seed(0)
    batch = speed.draw_batch(script, args)
    for plain in (False, True):
        state = module.build(args)
        if plain:
            speed.make_plain(state)
        step, begun = module.make_step(args, state), [weight.clone() for weight in state["G"].parameters()]
        for _ in range(2):
            torch.manual_seed(0)
            found = step(*batch)
        losses.append(found)
        assert not all(map(torch.equal, begun, state["G"].parameters()))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)


def test_sizes():
    """The papers' images, batches and widths; no script is left out."""
    found = {}
    for script, flags in speed.FLAGS.items():
        args = importlib.import_module(script).get_args(flags.split())
        found[script] = (args.size, args.batch_size, args.ngf)
    assert found["pix2pix"] == found["cyclegan"] == (256, 1, 64) and found["text2img"] == (64, 64, 128)
    assert found["gan"] == found["cgan"] == (28, 100, 1200) and found["dcgan"] == (64, 128, 128)
    assert set(speed.FLAGS) == {path.stem for path in ROOT.glob("*.py")}


def test_speed_command(tmp_path, capsys):
    """A row for each variant, compared with the plain one of its precision, and the same in a JSON."""
    out = tmp_path / "speed.json"
    main(["speed", "--scripts", "gan", "--rounds", "1", "--device", "cpu", "--out", str(out)])
    lines, found = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert len(lines) == 5 and [row["variant"] for row in found["rows"]] == ["plain fp32", "plain bf16", "default"]
    assert [row["precision"] for row in found["rows"][:2]] == ["fp32", "bf16"]
    assert [row["x_plain"] for row in found["rows"][:2]] == [1, 1] and found["rows"][2]["x_plain"] > 0
    assert found["rows"][0]["float32"] == "ieee"
    assert found.keys() >= {"commit", "clean", "device", "device_name", "threads", "versions"}


def test_pytest_bench(tmp_path):
    """pytest-benchmark measures, and its file says of what and where."""
    flags = "-p no:cacheprovider --benchmark-min-rounds 2 --benchmark-max-time 0.001 --device cpu".split()
    flags += ["--benchmark-json", "a.json", "-k", "gan and plain and not (cgan or dcgan or cyclegan)"]
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench"), *flags]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}  # no xdist
    done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
    tests = json.loads((tmp_path / "a.json").read_text())["benchmarks"]
    assert [test["extra_info"]["variant"] for test in tests] == ["plain fp32", "plain bf16"]
    for test in tests:
        info = test["extra_info"]
        assert info["images_per_s"] == pytest.approx(100 / test["stats"]["median"]) and info["device_name"]


@pytest.mark.parametrize("flags", ["--scripts stylegan", "--rounds 0", "--device tpu"])
def test_bad_arguments(flags):
    """One sentence of the bench that names what is wrong."""
    with pytest.raises(SystemExit) as end:
        main(["speed", *flags.split()])
    assert flags.split()[-1] in end.value.code and end.value.code.startswith("bench: ") and "\n" not in end.value.code
