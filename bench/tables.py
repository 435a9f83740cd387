"""The papers' tables, ours beside theirs: scripts are trained as by a user, judged, and put down as a JSON a run.

What is done is not done again: a run whose result tells of the same code, flags and judges is skipped, and one that was
stopped goes on from its last.pt. What is wrong with one run is said, and leaves the others and its cells in peace.
"""

import ast
import functools
import hashlib
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

import gan
from bench import report, speed
from bench.cases import CASES, TABLES, flags, judges_of, kinds_of, planned
from bench.judges import JUDGES, environment

ROOT = speed.ROOT


# -- what a run is ---------------------------------------------------------------------------------------------------


@functools.cache
def fingerprint(path):
    """A hash of a Python file that comments, docstrings and line breaks don't change."""
    tree = ast.parse(Path(path).read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def begun_as(run, args):
    """What a run is begun with, and cannot go on without."""
    given = [*flags(run.case, run.data), *shlex.split(args.flags)]
    return {"script": run.script, "code": fingerprint(ROOT / run.script), "flags": given}


def judged_as(run, args):
    """What its result depends on besides."""
    used = {judge: JUDGES[judge][1] for judge in judges_of(run.case, run.data)}
    codes = {judge: [fingerprint(module.__file__) for module in modules] for judge, modules in used.items()}
    return {"max_steps": args.max_steps, "samples": args.count, "judges": codes}


def is_done(run, args):
    """Whether its result is there, of the same code, flags and judges."""
    result = report.read_json(args.results / f"{run.name}.json") or {}
    return all(result.get(name) == value for name, value in (begun_as(run, args) | judged_as(run, args)).items())


def write_json(path, value):
    """Write a dict, whole or not at all."""
    with gan.replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def log_of(folder):
    """The rows of a run's log.jsonl."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_of(folder):
    """How many updates a run has made."""
    return max((row["step"] for row in log_of(folder)), default=0)


# -- training --------------------------------------------------------------------------------------------------------


def next_stop(args, steps, judged):
    """Where training stops to be judged next: with --curve after 100, 200, 400, ... updates, else only in the end."""
    stops = [100 * 2**i for i in range(30)] if args.curve else []
    limit = args.max_steps or 2**63
    return next((stop for stop in stops if steps <= stop < limit and stop not in judged), args.max_steps)


def start(run, args):
    """Train a run, from the beginning or from where it was stopped, in a process of its own. -> process, stop, time."""
    folder, path, now = args.runs / run.name, args.runs / f"{run.name}.json", begun_as(run, args)
    note = report.read_json(path) or {}
    if folder.exists() and any(note.get(name) != now[name] for name in now):  # it was begun otherwise
        olds = (folder.with_name(f"{run.name}.old-{n}") for n in itertools.count(1))
        folder.rename(next(old for old in olds if not old.exists()))
    if not folder.exists():
        note = now | {"steps": 0, "seconds": 0.0, "peak_memory": None, "curve": []}
        write_json(path, note)
    stop = next_stop(args, steps_of(folder), [point["step"] for point in note["curve"]])
    command = [ROOT / run.script, "--data", run.data, *now["flags"], "--seed", run.seed, "--run", folder]
    command += ["--data-root", args.data_root] + (["--device", args.device] if args.device else [])
    command = [sys.executable, *map(str, command), *(["--max-steps", str(stop)] if stop else [])]
    with open(args.runs / f"{run.name}.txt", "ab") as said:
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment(args))
    return child, stop, time.monotonic()


def ended(child):
    """Exit status and peak memory in bytes of a child process, which Windows doesn't tell; None while it runs."""
    if not hasattr(os, "wait4"):
        return None if child.poll() is None else (child.returncode, None)
    pid, status, usage = os.wait4(child.pid, os.WNOHANG)
    if not pid:
        return None
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep(run, args, seconds, peak=None):
    """Add to a run's note how far it was trained, how long and in how much memory. Returns the note."""
    path = args.runs / f"{run.name}.json"
    note, steps = report.read_json(path), steps_of(args.runs / run.name)
    if steps > note["steps"]:  # else there was nothing left to do
        peak = max(filter(None, (note["peak_memory"], peak)), default=None)
        note |= {"steps": steps, "seconds": note["seconds"] + seconds, "peak_memory": peak}
        write_json(path, note)
    return note


def finish(run, args, stop):
    """Judge what a run has learned when it stopped. Returns its metrics if that was its end, and its result written."""
    path, rows, metrics = args.runs / f"{run.name}.json", log_of(args.runs / run.name), {}
    for judge in judges_of(run.case, run.data):
        metrics |= JUDGES[judge][0](run, args)
    note, step = report.read_json(path), rows[-1]["step"]
    note["curve"] = [point for point in note["curve"] if point["step"] != step]
    note["curve"] += [{"step": step} | {name: metric["value"] for name, metric in metrics.items()}]
    write_json(path, note)
    if stop == step and stop != args.max_steps:
        return None
    write_result(run, args, note, rows, metrics)
    return metrics


def write_result(run, args, note, rows, metrics):
    """The JSON of a run and, of the first seed, its last samples beside it."""
    folder, count = args.runs / run.name, -(-len(rows) // 100)
    rates = [row["images_per_s"] for last, row in zip(rows, rows[1:]) if row["step"] - last["step"] > 1]
    result = {"case": run.case, "data": run.set, "seed": run.seed}
    result |= {name: note[name] for name in ("script", "code", "flags")} | judged_as(run, args) | args.circumstances
    result |= {"settings": report.read_json(folder / "config.json"), "steps": rows[-1]["step"]}
    result |= {"seconds": note["seconds"], "images_per_s": statistics.median(rates or [rows[-1]["images_per_s"]])}
    result |= {"peak_memory": note["peak_memory"], "metrics": metrics, "curve": note["curve"]}
    write_json(args.results / f"{run.name}.json", result | {"log": rows[::-count][::-1]})
    sheets = [path for path in sorted((folder / "samples").glob("*.png")) if path.stem.isdigit()]
    if sheets and run.seed == 0:
        image = Image.open(sheets[-1]).convert("RGB")
        image.thumbnail((480, 480))
        with gan.replacing(args.results / f"{run.name}.png") as file:
            image.quantize(256).save(file, "PNG", optimize=True)


def train_all(runs, args):
    """Train `runs`, --jobs at a time, and judge one while others train. Returns the names of those that failed."""
    waiting, children, failed = [*runs], {}, []
    try:
        while waiting or children:
            while waiting and len(children) < args.jobs:
                run = waiting.pop(0)
                children[run] = start(run, args)
            show(children, args)
            time.sleep(0.2)
            for run, (child, stop, begun) in [*children.items()]:
                if (end := ended(child)) is None:
                    continue
                del children[run]
                status, peak = end
                note = keep(run, args, time.monotonic() - begun, peak)
                try:
                    if status:
                        sys.exit(last_words(run, args) or f"{run.script} ended with {status}")
                    if (metrics := finish(run, args, stop)) is None:
                        waiting.insert(0, run)
                        continue
                    say(f"{run.name}: {note['seconds'] / 60:.1f} minutes, {report.summary(metrics)}")
                except (Exception, SystemExit) as error:
                    if isinstance(getattr(error, "code", None), int):
                        raise  # a signal
                    failed.append(run.name)
                    say(f"{run.name} failed: {str(error).partition(chr(10))[0]}", sys.stderr)
    finally:
        for child, _, _ in children.values():
            child.terminate()  # it saves first
        for run, (child, _, begun) in children.items():
            child.wait()
            keep(run, args, time.monotonic() - begun)
    return failed


def last_words(run, args):
    """The last line that a run printed."""
    path = args.runs / f"{run.name}.txt"
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def say(text, file=None):
    """Print a line, over what `show` has put there."""
    print(f"\r{text:<99}" if sys.stdout.isatty() else text, file=file or sys.stdout, flush=True)


def show(children, args):
    """On a terminal, how far each run is."""
    if sys.stdout.isatty():
        texts = [f"{run.name} {last_words(run, args).partition(' left')[0]}" for run in children]
        print(f"\r{' | '.join(texts):<99.99}", end="", flush=True)


# -- the command -----------------------------------------------------------------------------------------------------


def options(parser):
    """What it takes."""
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"which (all): {', '.join(TABLES)}")
    sets = "toy, mnist, cifar10, cityscapes, or a folder of pairs with class ids"
    add("--data", nargs="+", default=["toy"], help=f"{sets}; a table takes those that it can be made from")
    add("--data-root", type=Path, default=Path("data"), help="where downloads go, or lie already")
    add("--seeds", type=int, default=3, help="runs of each case, with seeds from 0 up")
    add("--cases", nargs="+", metavar="CASE", help=f"only these of their rows: {', '.join(CASES)}")
    add("--flags", default="", help='more flags of the scripts, for every run: --flags="--size 128 --epochs 40"')
    add("--max-steps", type=int, help="stop every run after so many updates")
    add("--curve", action="store_true", help="judge also after 100, 200, 400, ... updates")
    add("--count", type=int, default=10000, help="samples that are drawn to be judged")
    add("--runs", type=Path, default=Path("runs", "bench"), help="folder for the run folders")
    add("--results", type=Path, help="folder for a JSON a run (RUNS/results); bench/results has the published ones")
    add("--cache", type=Path, default=Path("data"), help="where trained judges are kept")
    add("--device", help="cpu, cuda, ... (the accelerator, if there is one)")
    add("--jobs", type=int, help="runs at a time (one for each --threads cores of a CPU; 1 on an accelerator)")
    add("--threads", type=int, default=1, help="of each run")


def settle(args):
    """Check options, and fill in what was not given."""
    for name in ("seeds", "max_steps", "count", "jobs", "threads"):
        if (number := getattr(args, name)) is not None and number < 1:
            sys.exit(f"bench: --{name.replace('_', '-')} {number}: give a number from 1 up")
    if unknown := [name for name in args.names if name not in TABLES]:
        sys.exit(f"bench: {unknown[0]} is no table: there are {', '.join(TABLES)}")
    if unknown := [case for case in args.cases or [] if case not in CASES]:
        sys.exit(f"bench: --cases {unknown[0]} is no case: there are {', '.join(CASES)}")
    args.names, args.results = args.names or [*TABLES], args.results or args.runs / "results"
    for data in args.data:
        kinds = sorted({kind for name in args.names for kind in kinds_of(name)})
        if not planned(args.names, [data], 1):
            sys.exit(f"bench: --data {data}: {', '.join(args.names)} can be made from {', '.join(kinds)}")
    device = gan.get_args(["--device", args.device] if args.device else []).device  # or it is refused
    args.jobs = args.jobs or (max(1, torch.get_num_threads() // args.threads) if device == "cpu" else 1)
    args.circumstances = speed.circumstances(device) | {"threads": args.threads, "jobs": args.jobs}
    torch.set_num_threads(args.threads)  # of the judges
    args.runs.mkdir(parents=True, exist_ok=True)
    return args


def run(args):
    """Train and judge what is missing, and print the tables. A run that fails leaves its cells empty, and status 2."""

    def stop(number, frame):
        sys.exit(128 + number)

    before = {kind: signal.signal(kind, stop) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        runs = planned(settle(args).names, args.data, args.seeds)
        runs = [each for each in runs if each.case in (args.cases or CASES)]
        missing = [each for each in runs if not is_done(each, args)]
        say(f"{len(runs)} runs, {len(runs) - len(missing)} of them done; results go to {args.results}")
        failed = train_all(missing, args)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    results = [report.read_json(args.results / f"{each.name}.json") for each in runs if is_done(each, args)]
    for name, data in itertools.product(args.names, args.data):
        if any(report.used(name, data, results).values()):
            print(f"\n{report.markdown(name, data, results)}")
    print(f"\n`python -m bench report --results {args.results}` makes a page with samples and curves")
    if failed:
        sys.exit(f"bench: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
