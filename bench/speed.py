"""How long an update of each script takes, in images per second and as a share of what the device can do.

The variants of a script take turns, round by round, so a ratio holds on a machine where others work too:
    plain fp32, plain bf16   the usual way: Adam as torch has it, weights in the usual layout, nothing recorded
    default                  the script as a user runs it; on CUDA the update is a recorded graph
    no capture               the same with --no-capture; only on CUDA
"x plain" compares with the plain row of the same precision. Batches are random numbers, and the rate is zero, so that
every update is the same work. The peak is that of a large matrix product or a large convolution, whichever the script
mostly does, in the precision of the row. In float32 torch's settings stay as they are; the row says "tf32" or "ieee".
"""

import functools
import gc
import importlib
import json
import math
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.common import ROOT, fail, find_device, save

FLAGS = {  # for the paper's networks, size and batch; those of the toy set need none
    "gan": "--data mnist --optimiser adam",
    "cgan": "--data mnist --optimiser adam",
    "dcgan": "--data celeba",
    "text2img": "--size 64 --load-size 76 --batch-size 64 --text 1024 --nt 128 --nz 100 --ngf 128 --ndf 64",
    "pix2pix": "--data facades",
    "cyclegan": "--data horse2zebra",
}
SIZES = ("toy", "paper")
VARIANTS = {
    "plain fp32": "--precision fp32 --no-capture",
    "plain bf16": "--precision bf16 --no-capture",
    "default": "",
    "no capture": "--no-capture",
}


def variants_on(device):
    """The names of those that differ there."""
    return [name for name in VARIANTS if name != "no capture" or "cuda" in device]


def circumstances(device):
    """Where and with what something was measured, for its JSON. The code is clean if no tracked file has changed and no
    Python file is new; results don't count."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"]).stdout
    new = git(["git", "ls-files", "--others", "--exclude-standard", "*.py"]).stdout
    units = torch.cpu.get_capabilities()
    cpu = [units.get("cpu_name") or platform.machine()]
    cpu += [unit for unit in ("avx512_bf16", "amx_bf16") if units.get(unit)]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return {
        "commit": commit or None,
        "clean": not (changed or new) if commit else None,
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if "cuda" in device else ", ".join(cpu),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


# -- what is timed ---------------------------------------------------------------------------------------------------


def draw_batch(script, args):
    """What `step` takes, as random numbers: images (N, C, S, S), and labels (N,) or two codes of text (N, text)."""
    settings, count = vars(args), args.batch_size * vars(args).get("k", 1)
    channels = settings.get("channels", 3 * settings.get("pack", 1))
    x, y = 2 * torch.rand(2, count, channels, args.size, args.size, device=args.device) - 1
    if script in ("pix2pix", "cyclegan"):
        return [x, y]
    if script == "cgan":
        return [x, torch.randint(len(args.classes), (count,), device=args.device)]
    if script == "text2img":
        return [x, *torch.randn(2, count, args.text, device=args.device)]
    return [x]


def make_plain(state):
    """Networks and optimisers the usual way: Adam with nothing but its rate and betas, weights in NCHW layout."""
    for name, part in state.items():
        if isinstance(part, torch.optim.Adam):
            (group,) = part.param_groups
            state[name] = torch.optim.Adam(group["params"], float(group["lr"]), group["betas"])
        elif isinstance(part, nn.Module):
            part.to(memory_format=torch.contiguous_format)


def prepare(script, size, variant, device):
    """An update as a call without arguments, warmed up and, where the variant has that, recorded. -> call, row."""
    gc.collect()  # a step and its state hold each other
    cuda = "cuda" in device
    others = torch.cuda.memory_allocated(device) if cuda else 0
    module, flags = importlib.import_module(script), f"{FLAGS[script] if size == 'paper' else ''} {VARIANTS[variant]}"
    args = module.get_args([*flags.split(), "--lr", "0", "--device", device])
    state = module.build(args)
    if variant.startswith("plain"):
        make_plain(state)
    step, batch = module.make_step(args, state), draw_batch(script, args)
    with FlopCounterMode(display=False) as counter:
        step(*batch)
    flops = counter.get_total_flops()
    convolutions = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    call = functools.partial(module.capture(step, args), *batch)
    for _ in range(3):
        call()
    if cuda:  # the fourth call records the update, so the peak is that of the recorded one
        torch.cuda.reset_peak_memory_stats(device)
    call()
    row = {"script": script, "sizes": size, "variant": variant, "precision": args.precision}
    row |= {"flags": flags, "size": args.size, "images": len(batch[0]), "flops": flops}
    row["kind"] = "convolution" if convolutions > flops / 2 else "product"
    if args.precision == "fp32":
        backend = torch.backends.cudnn.conv if row["kind"] == "convolution" else torch.backends.cuda.matmul
        row["float32"] = "tf32" if cuda and backend.fp32_precision == "tf32" else "ieee"
    row["peak_memory"] = torch.cuda.max_memory_allocated(device) - others if cuda else None
    return call, row


@functools.cache
def large(kind, precision, device):
    """A large matrix product, or as large a convolution, as a call, and its FLOPs."""
    side, dtype = 8192 if "cuda" in device else 1024, torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.rand(2, side, side, device=device, dtype=dtype)
    if kind == "product":
        return functools.partial(torch.mm, a, b), 2 * side**3
    x, kernels = a.view(16, side, 1, side // 16), b.view(side, side, 1, 1)
    return functools.partial(nn.functional.conv2d, x, kernels), 2 * side**3


# -- how long it takes -----------------------------------------------------------------------------------------------


def synchronise(device):
    """Wait until the device has done what it was given."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def seconds_of(call, loops, device):
    """Seconds a call takes: the mean of `loops` in a row."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(loops):
        call()
    synchronise(device)
    return (time.perf_counter() - started) / loops


def measure(script, size, device, rounds):
    """Rows of the variants of a script, which take turns for `rounds`."""
    torch.manual_seed(0)
    calls, rows, flops = {}, {}, {}
    for variant in variants_on(device):
        calls[variant], rows[variant] = prepare(script, size, variant, device)
    for row in rows.values():
        kind = row["kind"], row["precision"]
        calls[kind], flops[kind] = large(*kind, device)
    once = {name: min(seconds_of(call, 1, device) for _ in range(2)) for name, call in calls.items()}
    loops = {name: math.ceil(0.02 / once[name]) for name in calls}  # so long that the clock does not show
    times, names = {name: [] for name in calls}, list(calls)
    for _ in range(rounds):
        for name in names:
            times[name].append(seconds_of(calls[name], loops[name], device))
        names.append(names.pop(0))  # so that none always follows the same one
    for variant, row in rows.items():
        kind = row["kind"], row["precision"]
        account(row, times[variant], times[f"plain {row['precision']}"], flops[kind] / statistics.median(times[kind]))
    return list(rows.values())


def account(row, times, plain, peak_flops):
    """Add to a row what its times mean, beside those of the plain row and the device's peak of FLOPs per second."""
    seconds = statistics.median(times)
    row |= {"seconds": seconds, "rounds": len(times), "images_per_s": row["images"] / seconds}
    row["x_plain"] = statistics.median(slow / fast for slow, fast in zip(plain, times))
    row |= {"peak_flops": peak_flops, "share_of_peak": row["flops"] / seconds / peak_flops}


# -- the table -------------------------------------------------------------------------------------------------------

HEADINGS = ("script", "sizes", "variant", "precision", "images", "GFLOP", "ms", "x plain", "images/s", "peak of")
HEADINGS += ("% of it", "MB held")


def cells(row):
    """A row as texts under HEADINGS; what was not measured is empty."""
    texts = [row["script"], row["sizes"], row["variant"], row.get("float32", row["precision"]), str(row["images"])]
    texts += [f"{row['flops'] / 1e9:.4g}", f"{row['seconds'] * 1e3:.4g}", f"{row['x_plain']:.2f}"]
    texts += [f"{row['images_per_s']:.0f}", row["kind"], f"{100 * row['share_of_peak']:.1f}"]
    return [*texts, f"{row['peak_memory'] / 1e6:.0f}" if row["peak_memory"] else ""]


def line(texts):
    """Texts in columns."""
    return "".join(f"{text:>12}" for text in texts)


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("--scripts", nargs="+", choices=tuple(FLAGS), default=tuple(FLAGS), metavar="NAME", help="of which (all)")
    add("--sizes", nargs="+", choices=SIZES, help="of the networks and the batch (toy; on CUDA both)")
    add("--rounds", type=int, default=20, help="in which the variants take turns (%(default)s)")
    add("--device", help="cpu, cuda, ... (cuda, if there is one)")
    add("--out", type=Path, help="JSON file for the rows, written after each script")


def main(args):
    """Print a row for each variant of an update of each script."""
    if args.rounds < 1:
        fail(f"--rounds {args.rounds}: give a number from 1 up")
    device = find_device(args.device)
    result = {"measure": "speed", **circumstances(device), "rows": []}
    print(f"{result['device_name']}, {device}, {result['threads']} threads, torch {torch.__version__}")
    print(line(HEADINGS), flush=True)
    for size in args.sizes or (SIZES if "cuda" in device else ("toy",)):
        for script in args.scripts:
            rows = measure(script, size, device, args.rounds)
            for row in rows:
                print(line(cells(row)), flush=True)
            result["rows"] += rows
            if args.out:
                save(args.out, json.dumps(result, indent=2) + "\n")
