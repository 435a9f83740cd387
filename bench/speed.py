"""How long an update takes, and how long it would at the peaks of the device.

Every variant of a script takes turns with `plain`: the same step in eager float32, with Adam as torch has it when it is
given nothing but rate and betas, and in the usual layout. So a ratio holds on a machine where others work too. Batches
are random numbers. The rate is zero: every update is then the same work, and no loss runs away.

The floor is the longer of two times: the update's FLOPs at the rate of a large matrix product in the same precision,
and the bytes that it must move at the rate of a large copy. Both of these take their turn in the same rounds.
"""

import contextlib
import functools
import gc
import importlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
import weakref
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import gan

ROOT = Path(__file__).parent.parent
FLAGS = {  # toy: the toy set; paper: a set, or any name, with the paper's networks, size and batch; no data is read
    "gan": {"toy": "--data toy", "paper": "--data mnist --optimiser adam"},
    "cgan": {"toy": "--data toy", "paper": "--data mnist --optimiser adam"},
    "dcgan": {"toy": "--data toy", "paper": "--data celeba", "torch": "--data celeba --kernel 4 --ngf 64 --ndf 64"},
    "text2img": {"toy": "--data toy", "paper": "--data birds"},
    "pix2pix": {"toy": "--data toy", "paper": "--data facades"},
    "cyclegan": {"toy": "--data toy", "paper": "--data horse2zebra"},
}
SIZES = ("toy", "paper", "torch")
VARIANTS = {  # precision, and whether the update is recorded as a CUDA graph
    "plain": ("fp32", False),
    "fp32": ("fp32", False),
    "bf16": ("bf16", False),
    "fp32-captured": ("fp32", True),
    "bf16-captured": ("bf16", True),
}
WORKS = {"update": tuple(VARIANTS), "generate": ("fp32", "bf16")}  # the first is what others are compared with


# -- what is timed ---------------------------------------------------------------------------------------------------


def find_device(name):
    """A device by its name, or with None the accelerator, if there is one; gan.py refuses what is not there."""
    return gan.get_args(["--device", name] if name else []).device


def default_sizes(device):
    """All but on a CPU, where the papers' take minutes; "torch" has the networks of DCGAN's Torch code."""
    return SIZES if "cuda" in device else SIZES[:1]


def lacking(script, variant, device):
    """Why a variant cannot be measured, in a sentence, or None."""
    if not VARIANTS[variant][1]:
        return None
    if "cuda" not in device:
        return f"{variant} needs a CUDA device: only there is an update recorded"
    return None if hasattr(importlib.import_module(script), "capture") else f"{script}.py has no function `capture`"


def draw_batch(script, args):
    """What `step` takes, as random numbers: images (N, C, S, S), and labels (N,) or two codes of text (N, text)."""
    count, device = args.batch_size * vars(args).get("k", 1), args.device
    x, y = 2 * torch.rand(2, count, vars(args).get("channels", 3), args.size, args.size, device=device) - 1
    if script in ("pix2pix", "cyclegan"):
        return [x, y]
    if script == "cgan":
        return [x, torch.randint(len(args.classes), (count,), device=device)]
    if script == "text2img":
        return [x, *torch.randn(2, count, args.text, device=device)]
    return [x]


def draw_inputs(script, args, batch):
    """What G takes for as many images: those to translate, or z (N, nz) with the labels or codes of `batch`."""
    if script in ("pix2pix", "cyclegan"):
        return batch[:1]
    return [torch.randn(len(batch[0]), args.nz, device=args.device), *batch[1:2]]


def as_drawing(script, G):
    """G in the mode in which its script draws: pix2pix as in training, cgan with its dropout, others without any."""
    for part in G.modules():
        part.training = script == "pix2pix" or script == "cgan" and isinstance(part, nn.Dropout)
    return G


def plain(state):
    """The usual implementation: Adam unfused, as torch chooses when it is told nothing, and weights in NCHW layout."""
    for name, part in state.items():
        if isinstance(part, torch.optim.Adam):
            (group,) = part.param_groups
            settings = {key: group[key] for key in ("betas", "eps", "weight_decay")}
            state[name] = torch.optim.Adam(group["params"], float(group["lr"]), **settings)
        elif isinstance(part, nn.Module):
            part.to(memory_format=torch.contiguous_format)
    return state


def prepare(work, script, size, variant, device):
    """A call to be timed, an update or a batch of images from G, after its first run; and what is known of it."""
    module, (precision, captured) = importlib.import_module(script), VARIANTS[variant]
    flags = f"{FLAGS[script][size]} --lr 0 --precision {precision}"
    args = module.get_args([*flags.split(), "--device", device])
    state = module.build(args)
    if variant == "plain":
        plain(state)
    batch = draw_batch(script, args)
    row = {"script": script, "sizes": size, "work": work, "variant": variant, "precision": precision}
    row |= {"captured": captured, "settings": flags, "seed": args.seed, "size": args.size, "batch": len(batch[0])}
    if work == "update":
        call, given = functools.partial(module.make_step(args, state), *batch), [*state.values()]
        row |= count(call, [*tensors(given), *batch], device)
        row["bytes"] = bytes_of_update(given, batch)
        if captured:
            call = functools.partial(module.capture(call.func, args), *batch)
    else:
        G, inputs = as_drawing(script, state["G"]), draw_inputs(script, args, batch)
        del state

        def call():
            with torch.no_grad(), torch.autocast(inputs[0].device.type, torch.bfloat16, args.bf16):
                return G(*inputs)

        row |= count(call, [*tensors([G]), *inputs], device)
        row["bytes"] = sum(tensor.nbytes for tensor in (*G.parameters(), *inputs, call()))
    return call, row


# -- what it must cost -----------------------------------------------------------------------------------------------


class Held(TorchDispatchMode):
    """Counts bytes of the tensors that are alive at once: `most` of them, with those of `tensors` that were before.

    What an operator takes for itself and gives back is not seen.
    """

    def __init__(self, tensors=()):
        super().__init__()
        self.alive, self.now, self.most = set(), 0, 0
        self.add(tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.add(tree_leaves(out))
        return out

    def add(self, values):
        for storage in (value.untyped_storage() for value in values if isinstance(value, torch.Tensor)):
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def drop(self, key, size):
        self.alive.discard(key)
        self.now -= size


def tensors(parts):
    """All tensors in the states of networks and optimisers."""
    return [value for part in parts for value in tree_leaves(part.state_dict()) if isinstance(value, torch.Tensor)]


def count(call, given, device):
    """Run a call twice, and count the second time. -> {"flops", "peak_memory" in bytes, "memory_of"}.

    FLOPs are those of convolutions and matrix products, forward and backward, two for a multiply-add; a faster
    algorithm, as Winograd's, may need fewer. Memory has the tensors `given` before. The first run makes Adam's moments.
    """
    cuda = "cuda" in device
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        others = torch.cuda.memory_allocated(device) - sum(tensor.nbytes for tensor in given)
    with Held(given) as held:
        call()
        with FlopCounterMode(display=False) as counter:
            call()
    row = {"flops": counter.get_total_flops(), "peak_memory": held.most, "memory_of": "tensors alive at once"}
    if cuda:
        most = torch.cuda.max_memory_allocated(device) - others
        row |= {"peak_memory": most, "memory_of": "torch.cuda.max_memory_allocated"}
    return row


def bytes_of_update(parts, batch):
    """Bytes that an update must move, from its optimisers after one: a lower bound.

    Of every weight that is moved the gradient is written and read, and the weight and its moments are read and written:
    8 times 4 bytes with Adam in float32. Then the batch is read. Activations, and the weights as the networks read
    them, are left out: they may stay in a cache.
    """
    total = sum(tensor.nbytes for tensor in batch)
    for optimiser in (part for part in parts if isinstance(part, torch.optim.Optimizer)):
        for weight in (weight for group in optimiser.param_groups for weight in group["params"]):
            if weight.grad is not None:
                kept = (value for value in optimiser.state[weight].values() if isinstance(value, torch.Tensor))
                moments = sum(value.nbytes for value in kept if value.shape == weight.shape)
                total += 2 * (weight.nbytes + weight.grad.nbytes + moments)
    return total


def multiply(a, b, out):
    """out = a b, in TF32 for float32 where convolutions on a GPU may use it."""
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    torch.mm(a, b, out=out)
    products.fp32_precision = before


@functools.cache
def product(device, precision):
    """A call that multiplies square matrices, so large that it takes 5 ms or of 8192 rows; and its FLOPs.

    It is the faster of a product and a convolution with 1x1 kernels: on a CPU they may come from unlike libraries.
    """
    side, seconds, dtype = 256, 0.0, torch.float32 if precision == "fp32" else torch.bfloat16
    while seconds < 0.005 and side < 8192:
        side *= 2
        a, b, out = torch.rand(3, side, side, device=device, dtype=dtype)
        convolve = functools.partial(nn.functional.conv2d, b.view(16, side, 1, -1), a.view(side, side, 1, 1))
        calls = functools.partial(multiply, a, b, out), convolve
        times = [min(seconds_of(call, 1, device) for _ in range(8)) for call in calls]
        seconds = min(times)
    return calls[times.index(seconds)], 2 * side**3


@functools.cache
def copy(device):
    """A call that copies more than a cache holds, and the bytes that it reads and writes."""
    a, b = torch.zeros(2, 2 ** (28 if "cuda" in device else 26), device=device)
    return functools.partial(b.copy_, a), 2 * a.nbytes


# -- how long it takes -----------------------------------------------------------------------------------------------


def synchronise(device):
    """Wait until the device has done what it was given."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def seconds_of(call, loops, device, clock=time.perf_counter):
    """Seconds a call takes: the mean of `loops` in a row, between two moments at which the device is idle."""
    synchronise(device)
    begun = clock()
    for _ in range(loops):
        call()
    synchronise(device)
    return (clock() - begun) / loops


def interleave(timed, rounds):
    """{name: [seconds, one for each round]} of `timed` {name: function that gives seconds}, all of them in a round.

    Each round begins one further on, so that none always follows the same one.
    """
    names, times = [*timed], {name: [] for name in timed}
    for i in range(rounds):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            times[name].append(timed[name]())
    return times


def speed_up(base, times):
    """How many times as fast as the base: the median of the ratios, one for each round."""
    return statistics.median(slow / fast for slow, fast in zip(base, times, strict=True))


def account(row, times, base, peak_flops, peak_bandwidth):
    """`row` with what was measured beside what its FLOPs and bytes need at the peaks, in s, FLOP/s and bytes/s.

    `base` has the times of what it is compared with; `speed_up` is None without.
    """
    seconds, needed = statistics.median(times), max(row["flops"] / peak_flops, row["bytes"] / peak_bandwidth)
    row = row | {"seconds": seconds, "rounds": len(times), "images_per_s": row["batch"] / seconds}
    row |= {"peak_flops": peak_flops, "peak_bandwidth": peak_bandwidth, "seconds_at_peaks": needed}
    row |= {"share_of_peak": row["flops"] / seconds / peak_flops, "ratio": seconds / needed}
    return row | {"speed_up": speed_up(base, times) if base else None}


def warm_up(call, device, clock):
    """Seconds of a call, after .2 s and two calls at least; 12 on CUDA, where an update is recorded meanwhile."""
    once, calls, begun = math.inf, 0, clock()
    while calls < (12 if "cuda" in device else 2) or clock() - begun < 0.2:
        once, calls = min(once, seconds_of(call, 1, device, clock)), calls + 1
    return once


def measure(work, script, size, variants, device, rounds=5, least=1.0, clock=time.perf_counter):
    """{variant: (seconds of each round, row)}: what `account` says of the variants, which take turns.

    The matrix product and the copy take theirs too. There are as many rounds as the slowest needs for `least` seconds,
    or `rounds` if that is more.
    """
    torch.manual_seed(0)
    calls, rows, amounts = {}, {}, {}
    for variant in variants:
        calls[variant], rows[variant] = prepare(work, script, size, variant, device)
    for precision in sorted({row["precision"] for row in rows.values()}):
        calls[f"product in {precision}"], amounts[f"product in {precision}"] = product(device, precision)
    calls["copy"], amounts["copy"] = copy(device)
    once = {name: warm_up(call, device, clock) for name, call in calls.items()}
    loops = {name: math.ceil(0.02 / once[name]) for name in calls}  # no turn so short that the clock or a wait shows
    rounds = max(rounds, math.ceil(least / max(once[name] * loops[name] for name in calls)))
    timed = {name: functools.partial(seconds_of, calls[name], loops[name], device, clock) for name in calls}
    times = interleave(timed, rounds)
    peaks = {name: amount / statistics.median(times[name]) for name, amount in amounts.items()}
    measured = {}
    for variant, row in rows.items():
        of_product, base = peaks[f"product in {row['precision']}"], times.get(WORKS[work][0])
        row |= {"calls": loops[variant]}
        measured[variant] = times[variant], account(row, times[variant], base, of_product, peaks["copy"])
    del timed, calls
    gc.collect()  # a step and its state hold each other
    return measured


def circumstances(device):
    """Where and with what a measurement was made, for its JSON."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = clean = None
    with contextlib.suppress(OSError):  # a copy without git, or without its history
        found = git(["git", "rev-parse", "HEAD"])
        if found.returncode == 0:
            commit, clean = found.stdout.strip(), not git(["git", "status", "--porcelain"]).stdout.strip()
    units = torch.cpu.get_capabilities()
    name = units.get("cpu_name") or platform.processor() or platform.machine()
    name += "".join(f", {unit}" for unit in ("avx512_bf16", "amx_bf16") if units.get(unit))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return {
        "commit": commit,
        "clean": clean,
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if "cuda" in device else name,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


# -- the table -------------------------------------------------------------------------------------------------------


def short(value):
    """Four digits, or all before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


COLUMNS = {  # heading: width, and how a row fills it
    "script": (9, lambda row: row["script"]),
    "sizes": (6, lambda row: row["sizes"]),
    "variant": (14, lambda row: row["variant"]),
    "images": (7, lambda row: row["batch"]),
    "GFLOP": (8, lambda row: short(row["flops"] / 1e9)),
    "MB": (7, lambda row: short(row["bytes"] / 1e6)),
    "ms at peaks": (13, lambda row: short(row["seconds_at_peaks"] * 1e3)),
    "ms taken": (10, lambda row: short(row["seconds"] * 1e3)),
    "ratio": (7, lambda row: f"{row['ratio']:.2f}"),
    "x plain": (9, lambda row: f"{row['speed_up']:.2f}"),
    "images/s": (10, lambda row: short(row["images_per_s"])),
    "% of peak": (11, lambda row: f"{100 * row['share_of_peak']:.1f}"),
    "MB held": (9, lambda row: short(row["peak_memory"] / 1e6)),
}


def line(cells):
    """Cells under their headings, the first three to the left."""
    cells = [
        f"{cell:{'<' if i < 3 else '>'}{width}}" for i, (cell, (width, _)) in enumerate(zip(cells, COLUMNS.values()))
    ]
    return "".join(cells).rstrip()


def options(parser):
    """What it takes."""
    parser.add_argument("--scripts", nargs="+", choices=tuple(FLAGS), default=tuple(FLAGS), help="of which (all)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="toy; on CUDA all; torch: DCGAN's Torch code")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"), help="(both)")
    parser.add_argument("--rounds", type=int, default=8, help="in which the variants take turns, at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="for which the slowest variant is timed, at least")
    parser.add_argument("--device", help="cpu, cuda, ... (the accelerator, if there is one)")
    parser.add_argument("--out", type=Path, help="JSON file for the rows, written after each script")


def run(args):
    """Print the account of an update of each script, a row for each variant."""
    if args.rounds < 1:
        sys.exit(f"bench: --rounds {args.rounds}: give a number from 1 up")
    if not 0 <= args.seconds < math.inf:
        sys.exit(f"bench: --seconds {args.seconds}: give a number from 0 up")
    device = find_device(args.device)
    result = {"measure": "speed", **circumstances(device), "rows": []}
    print(f"{result['device_name']}, {device}, {result['threads']} threads, torch {torch.__version__}")
    print(line(COLUMNS), flush=True)
    for size in args.sizes or default_sizes(device):
        for script in (script for script in args.scripts if size in FLAGS[script]):
            chosen = [name for name, (precision, _) in VARIANTS.items() if precision in args.precision]
            chosen = [name for name in chosen if name != "plain" and not lacking(script, name, device)]
            measured = measure("update", script, size, ["plain", *chosen], device, args.rounds, args.seconds)
            for _, row in measured.values():
                print(line(fill(row) for _, fill in COLUMNS.values()), flush=True)
                result["rows"].append(row)
            if args.out:
                with gan.replacing(args.out) as file:
                    file.write((json.dumps(result, indent=2) + "\n").encode())
