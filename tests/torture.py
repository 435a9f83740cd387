"""Real runs that are killed, at any time and in the middle of writing each kind of file, and then go on.

    python -m tests.torture --kills 200        # over the six scripts; a table says what was killed where
    python -m tests.torture --updates 20000    # instead: memory and open files of long runs
    python -m tests.torture --checkpoints      # instead: make what tests/checkpoints lacks, a checkpoint a script

A run counts as equal if all that it leaves is what the run that nobody disturbed leaves: checkpoint, log, pictures,
caches, downloads, output, and nothing beside them. Exit status 1 if one does not, or if memory grows.
"""

import argparse
import builtins
import contextlib
import ctypes
import errno
import http.server
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; results then have the same bits in every process
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image
from scripts import ROWS, environment, read_checkpoint, snapshot
from test_resume import assert_same_run

SIGNALS = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGINT": (130, -2)}  # and the statuses that they may end with
MOMENTS = {  # while a file is written that has such a name below the folder of the case; the first that fits
    "checkpoint": r"run/last\.pt",
    "sample": r"run/samples/\d+\.png",
    "figure": r"run/.*\.png",
    "log": r"run/log\.jsonl",
    "config": r"run/config\.json",
    "cache": r".*/\.[^/]*-[0-9a-f]{40}",
    "download": r"sets/.*",
    "output": r"use/.*",
}
KINDS = {  # of cases, and the moments in each that are aimed at; "any time" is not aimed
    "train": ("any time", "checkpoint", "sample", "figure", "log", "config", "cache"),
    "download": ("any time", "download", "cache"),
    "use": ("any time", "output"),
}
FETCHING = {"pix2pix": "gztar", "cyclegan": "zip"}  # scripts that download archives, and of what kind
BOUND = 16  # MiB that a run may grow by after its first tenth
OLD = Path(__file__).parent / "checkpoints"
MADE = {  # flags of the checkpoints in there, on toy data
    "pix2pix": "--size 16 --load-size 16 --ngf 1 --ndf 1 --n-layers 1 --batch-size 2",
    "cyclegan": "--size 16 --load-size 16 --ngf 1 --ndf 1 --n-layers 1 --blocks 1 --batch-size 1 --pool 2",
    "gan": "--size 8 --nz 4 --ngf 8 --ndf 4 --batch-size 4",
    "dcgan": "--size 28 --nz 4 --ngf 1 --ndf 1 --batch-size 4",
    "cgan": "--size 8 --nz 4 --ngf 6 --ndf 6 --batch-size 4",
    "text2img": "--size 16 --load-size 16 --ngf 1 --ndf 1 --nef 2 --nif 1 --text 4 --nt 2 --nz 2 --average 1 --wrong 1"
    " --near 1 --batch-size 2 --text-epochs 0",
}


# -- in the child ----------------------------------------------------------------------------------------------------


class Aim:
    """Counts the moments of each kind that go by in this process, and strikes at one of them."""

    def __init__(self, moment="", number=0, what="", log=None):
        self.moment, self.number, self.what, self.log, self.counts = moment, number, what, log, Counter()

    def passes(self, moment):
        """Whether this moment is the one."""
        self.counts[moment] += 1
        return (moment, self.counts[moment]) == (self.moment, self.number)

    def at(self, moment):
        """Strike if this moment is the one."""
        if self.passes(moment):
            self.strike()

    def strike(self):
        """A signal to this process, an error of the system by its name, or "hold": wait for a file LOG.go."""
        Path(f"{self.log}.struck").touch()
        if self.what in SIGNALS:
            os.kill(os.getpid(), getattr(signal, self.what))
        elif self.what == "hold":
            for _ in range(12_000):
                if Path(f"{self.log}.go").exists():
                    return
                time.sleep(0.005)
        else:
            raise OSError(getattr(errno, self.what), os.strerror(getattr(errno, self.what)))


def moment_of(path):
    """The kind of file at a path below the working folder."""
    name = re.sub(r"\.\d+\.part$", "", os.path.relpath(os.fspath(path)).replace(os.sep, "/"))
    return next((moment for moment, pattern in MOMENTS.items() if re.fullmatch(pattern, name)), "")


def watch(module, aim, stepped):
    """Let `aim` see each file that is opened to be written to, written, synced and renamed, and each update.

    Returns a list that will hold the states that steps were made for.
    """
    true_open, paths, states = builtins.open, {}, []

    class Raw(io.FileIO):
        def __init__(self, path, mode):
            aim.at(moment_of(path))
            super().__init__(path, mode)
            paths[self.fileno()] = path

        def write(self, data):
            if not aim.passes(moment_of(self.name)):
                return super().write(data)
            super().write(data[: (half := len(data) // 2)])
            aim.strike()
            return half

    def watched_open(path, mode="r", buffering=-1, *rest, **more):
        if isinstance(path, int) or not {*mode} & {*"wax+"} or path == os.devnull:
            return true_open(path, mode, buffering, *rest, **more)
        raw = Raw(path, mode.replace("b", "").replace("t", ""))
        file = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return file if "b" in mode else io.TextIOWrapper(file, *rest, **more)

    def watched_sync(descriptor, sync=os.fsync):
        aim.at(moment_of(paths.get(descriptor, "elsewhere")))
        sync(descriptor)

    def watched(rename):
        def watched_rename(source, target):
            aim.at(moment_of(target))
            rename(source, target)
            if aim.what not in errno.errorcode.values():  # nothing fails after it is done
                aim.at(moment_of(target))

        return watched_rename

    def watched_steps(make):
        def make_watched_step(*given):
            step = make(*given)
            states.append(given[1])

            def watched_step(*batch):
                aim.at("update")
                stepped(aim.counts["update"])
                return step(*batch)

            return watched_step

        return make_watched_step

    builtins.open = tarfile.bltn_open = watched_open
    os.fsync, os.rename, os.replace = watched_sync, watched(os.rename), watched(os.replace)
    for name in [name for name in vars(module) if name.startswith("make_") and name.endswith("step")]:
        setattr(module, name, watched_steps(getattr(module, name)))
    return states


def resident():
    """Resident memory of this process in bytes, where /proc has it, else its peak."""
    if os.path.exists("/proc/self/statm"):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(spec):
    """Run the main of a script as `spec` says, and end this process with its status.

    spec: script, flags, cwd, log (LOG.out and LOG.err take what it prints, LOG.counts the moments that went by); and
    maybe aim (what Aim takes), host (in place of HOST), limit (on the bytes of a file), plain (without what root may),
    every (updates between the rows of LOG.memory), environ (what torchrun sets), quiet (without dropout, and with the
    noise of one process), dump (a file for the state in which it ends).
    """
    row, log = next(row for row in ROWS if row.name == spec["script"]), spec["log"]
    aim = Aim(*spec.get("aim", ()), log=log)
    for number, name in enumerate((os.devnull, f"{log}.out", f"{log}.err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.chdir(spec["cwd"])
    with open(f"{log}.memory", "w") as memory, open(f"{log}.counts", "w") as counts:
        restrict(spec)

        def stepped(count):
            if "every" in spec and count % spec["every"] == 0:
                print(count, resident(), len(os.listdir("/dev/fd")), file=memory, flush=True)

        row.module.HOST = spec.get("host")
        states = watch(row.module, aim, stepped)
        company(row.module, **spec.get("environ", {}))
        if "quiet" in spec:
            silence(row.module)
        try:
            row.module.main(spec["flags"])
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 1
        json.dump(aim.counts, counts)
    if "dump" in spec and states:
        torch.save({name: part.state_dict() for name, part in states[-1].items()}, spec["dump"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def restrict(spec):
    """Give up, for good, to write files above a limit, and to write where only root may."""
    if "limit" in spec:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (spec["limit"], spec["limit"]))
    if "plain" in spec and os.getuid() == 0:
        # no capability is left; the user stays the same, who can still read all that was installed: see capset(2)
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
            raise OSError(ctypes.get_errno(), "capset")


def company(module, **environ):
    """Make a script, imported already, one of the processes of torchrun."""
    os.environ.update(environ)
    module.RANK, module.WORLD = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))


def silence(module):
    """Take the noise out of a script that differs between one process and many: dropout, and z where it has dropout."""
    torch.nn.Dropout.forward = lambda self, x: x
    if hasattr(module, "draw_z"):
        draw_z, calls = module.draw_z, itertools.count()

        def draw_share(args, count):
            with torch.random.fork_rng():
                torch.manual_seed(next(calls))
                return draw_z(args, count * module.WORLD)[module.RANK :: module.WORLD]

        module.draw_z = draw_share


def serve():
    """Fork a child for each spec on standard input and print its number; for a number print its status, or null.

    Torch and the scripts are imported once, and nothing is computed here, so that a child starts in no time.
    """
    import torch._dynamo  # noqa: F401  # or else the first step of each optimiser imports it

    assert all(row.module for row in ROWS)
    children = set()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if isinstance(request, dict):
            answer = os.fork() or child(request)
            children.add(answer)
        else:
            number, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if number else None
            children.discard(number)
        print(json.dumps(answer), flush=True)
    for number in children:
        os.kill(number, signal.SIGKILL)


# -- from outside ----------------------------------------------------------------------------------------------------


class Server:
    """A process that forks children."""

    def __init__(self):
        options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.process = subprocess.Popen([sys.executable, __file__, "--serve"], env=environment(no_proxy="*"), **options)
        self.lock = threading.Lock()

    def ask(self, request):
        with self.lock:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())

    def start(self, spec):
        return Forked(self, self.ask(spec))

    def close(self):
        """End it, and with it all children."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Forked:
    """What of subprocess.Popen is needed here, for a child of a server."""

    def __init__(self, server, pid):
        self.server, self.pid, self.returncode = server, pid, None

    def poll(self):
        if self.returncode is None:
            self.returncode = self.server.ask(self.pid)
        return self.returncode

    def send_signal(self, kind):
        if self.poll() is None:
            os.kill(self.pid, kind)


def start_process(spec):
    """The same as a process of its own: the script itself, as a user starts it, if nothing is to be watched."""
    command = [sys.executable, __file__, "--child", json.dumps(spec)]
    if not spec.keys() & {"aim", "host", "every", "limit", "plain"}:
        command = [sys.executable, next(row.file for row in ROWS if row.name == spec["script"]), *spec["flags"]]
    with open(f"{spec['log']}.out", "w") as out, open(f"{spec['log']}.err", "w") as err:
        return subprocess.Popen(command, cwd=spec["cwd"], stdout=out, stderr=err, env=environment(no_proxy="*"))


def finish(process, seconds=120):
    """The exit status of a process; one that takes too long is killed."""
    until = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > until:
            process.send_signal(signal.SIGKILL)
            raise TimeoutError(f"still running after {seconds} seconds")
        time.sleep(0.002)
    return process.poll()


def wait_for(process, ready, seconds=60):
    """Wait until `ready()`, or the end of a process."""
    until = time.monotonic() + seconds
    while not ready() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)


def left(folder):
    """{name: content} of what a command leaves; names of caches tell of what they were made, and locks are its own."""
    found = snapshot(folder).items()
    return {re.sub(r"-[0-9a-f]{40}$", "", name): content for name, content in found if not name.endswith(".lock")}


def problems(kind, folder, whole, dense):
    """What a case has left otherwise than the undisturbed one; `dense` logged and painted after every update."""
    here, there, found = left(folder), left(whole), []
    found += [f"{name} is missing" for name in sorted(there.keys() - here.keys())]
    more = sorted(here.keys() - there.keys())
    found += [f"{name} is left" for name in more if not re.fullmatch(MOMENTS["sample"], name)]
    compared = [name for name in here.keys() & there.keys() if name not in ("run/last.pt", "run/log.jsonl")]
    found += [f"{name} is another" for name in sorted(compared) if here[name] != there[name]]
    for name in [name for name in here if name.endswith(".png")]:
        try:
            Image.open(io.BytesIO(here[name])).load()
        except Exception as error:
            found.append(f"{name} is no picture: {error}")
    for run in (whole, dense) if kind != "use" else ():
        try:
            assert_same_run(folder / "run", run / "run")
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1].line
            found.append(f"{run.name}: {line} ({error or type(error).__name__})")
    return found


class Lab:
    """A folder to work in, a server of children, one of downloads, and the runs that nobody disturbs.

    Without `processes` all that is killed is forked.
    """

    def __init__(self, folder, seed=0, processes=True):
        self.folder, self.seed, self.processes = folder, seed, processes
        self.lock, self.wholes = threading.RLock(), {}
        self.server = Server()
        self.archives = {path: data for name in FETCHING for path, data in archive(folder, name)}
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def handler(self):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):  # noqa: N802, N805
                body = self.archives[handler.path]
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                for i in range(0, len(body), 8192):  # in the time that a kill needs to come between
                    handler.wfile.write(body[i : i + 8192])
                    time.sleep(0.002)

            def log_message(self, *_):
                pass

            def handle_error(self, *_):
                pass

        return Handler

    def close(self):
        self.server.close()
        self.http.shutdown()
        self.http.server_close()

    def spec(self, row, folder, flags, **more):
        """What `child` takes; what it prints goes into files beside the folder."""
        address = f"http://127.0.0.1:{self.http.server_address[1]}/{row.name}/"
        host = {"host": address} if "--data-root" in flags else {}
        return dict(script=row.name, flags=flags, cwd=str(folder), log=f"{folder}.log") | host | more

    def lay(self, row, kind, folder, save_every=1):
        """Lay out in a folder what a case needs. Returns its flags."""
        folder.mkdir()
        if kind == "use":
            (folder / "run").mkdir()
            shutil.copy(OLD / f"{row.name}-v1.pt", folder / "run" / "last.pt")
            return [*map(str, row.use(folder / "use", folder / "run")[0])]
        if kind == "train":
            row.data(folder / "set")
        data = "--data set" if kind == "train" else "--data facades --data-root sets"
        common = f"{data} --seed 3 --epochs {row.epochs} --run run --save-every {save_every}"
        return [*row.resume.split(), *common.split()]

    def whole(self, row, kind, save_every=1):
        """The undisturbed case: its folder, seconds, and how many moments of each kind went by."""
        with self.lock:
            if (key := (row.name, kind, save_every)) not in self.wholes:
                folder = self.folder / "-".join(map(str, key))
                spec, begun = self.spec(row, folder, self.lay(row, kind, folder, save_every)), time.monotonic()
                if status := finish(self.server.start(spec)):
                    raise RuntimeError(f"{folder.name}: status {status}, {last_line(spec)}")
                counts = json.loads(Path(f"{spec['log']}.counts").read_text())
                self.wholes[key] = SimpleNamespace(folder=folder, seconds=time.monotonic() - begun, counts=counts)
            return self.wholes[key]


def archive(folder, script):
    """The address and the bytes of the archive that a script downloads as `facades`."""
    folder = folder / "archives" / script
    next(row for row in ROWS if row.name == script).data(folder / "facades")
    file = Path(shutil.make_archive(str(folder / "packed"), FETCHING[script], folder, "facades"))
    return [(f"/{script}/facades{''.join(file.suffixes)}", file.read_bytes())]


# -- kills -----------------------------------------------------------------------------------------------------------


def moments(lab, row, kind):
    """The moments of such a case that there are in this script."""
    counts = lab.whole(row, kind).counts
    return [moment for moment in KINDS[kind] if moment == "any time" or counts.get(moment)]


def cells(lab, row):
    """All kinds of kills of a script, in random order: (kind of case, signal, moment)."""
    kinds = [kind for kind in KINDS if kind != "download" or row.name in FETCHING]
    found = [(kind, name, moment) for kind in kinds for name in SIGNALS for moment in moments(lab, row, kind)]
    return [found[i] for i in np.random.default_rng([lab.seed, ROWS.index(row)]).permutation(len(found))]


def plan(lab, row, rng, cell):
    """A case for the kill in a cell, and up to three more: kind, updates between checkpoints, (signal, moment)s."""
    names, choice = [*SIGNALS], moments(lab, row, cell[0])
    more = [(names[rng.integers(3)], choice[rng.integers(len(choice))]) for _ in range(rng.integers(4))]
    return cell[0], int(rng.choice([1, 3])), [cell[1:], *more]


def torture(lab, row, number, rng, kind, save_every, kills):
    """A case: a command that is killed again and again, and at last is let go on.

    Returns its number, script and text, the kills that hit, (signal, moment), and the problems.
    """
    folder, whole = lab.folder / f"case-{number}", lab.whole(row, kind, save_every)
    spec = lab.spec(row, folder, lab.lay(row, kind, folder, save_every))
    result = SimpleNamespace(number=number, script=row.name, text=f"{kind} {save_every}:", kills=[], problems=[])
    for turn, (name, moment) in enumerate(kills, 1):
        end = attempt(lab, spec, rng, name, moment, math.ceil(whole.counts.get(moment, 1) / turn), whole.seconds)
        result.text += f" {end.text}{'' if end.hit else ' (over before)'},"
        result.kills += [(name, moment)] * end.hit
        result.problems += end.problems
        if not end.hit:
            break
    for start in (start_process if rng.random() < 0.1 * lab.processes else lab.server.start, lab.server.start):
        before = left(folder)
        if status := finish(start(spec)):
            result.problems.append(f"at the end: status {status}, {last_line(spec)}")
    if left(folder) != before:
        result.problems.append("starting what is finished changes something")
    result.problems += problems(kind, folder, whole.folder, lab.whole(row, kind).folder)
    if not result.problems:
        shutil.rmtree(folder)
    return result


def attempt(lab, spec, rng, name, moment, most, seconds):
    """Start a command and let a signal end it. Returns what was done as text, whether it hit, and the problems.

    That is at one of the first `most` such moments, or within so many seconds.
    A quarter of the kills at any time, and a tenth of the others, are of processes of their own.
    """
    real = rng.random() < (0.25 if moment == "any time" else 0.1) * lab.processes
    (struck := Path(f"{spec['log']}.struck")).unlink(missing_ok=True)
    start, text = (start_process, " of a process") if real else (lab.server.start, "")
    if moment == "any time":
        wait, text = rng.uniform(0, seconds), f"{name}{text}"
        process, begun = start(spec), time.time_ns()
        if real and rng.random() < 0.8:  # most of its time is that of importing torch
            wait_for(process, lambda: touched(spec["cwd"], begun))
        elif real:
            wait = rng.uniform(0, 3)
        wait_for(process, lambda: False, wait)
        process.send_signal(getattr(signal, name))
        text += f" after {(time.time_ns() - begun) / 1e9:.3f} s"
    else:
        count = int(rng.integers(most)) + 1
        text = f"{name}{text} at {moment} {count}"
        process = start(spec | {"aim": [moment, count, name]})
    status, printed = finish(process), Path(f"{spec['log']}.err").read_text()
    hit, found = struck.exists() or moment == "any time" and status != 0, []
    early = moment == "any time" and name == "SIGINT" and real and ", in main" not in printed  # while it imports torch
    if status not in (SIGNALS[name] if hit else (0,)) and not early:
        found.append(f"{text}: status {status}, {last_line(spec)}")
    if re.search("Traceback|Exception ignored", printed) and not early:
        found.append(f"{text}: prints {last_line(spec)}")
    return SimpleNamespace(text=text, hit=hit, problems=found)


def touched(folder, since):
    """Whether anything in a folder was made or written after a time in nanoseconds."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_mtime_ns > since for path in Path(folder).rglob("*"))
    return False


def last_line(spec):
    """The last line on standard error."""
    return (Path(f"{spec['log']}.err").read_text().strip().splitlines() or ["nothing said"])[-1]


def kill_many(lab, rows, kills, jobs=1, only=None):
    """Cases in turn over the scripts until there are so many kills, or only those of some numbers. Returns them."""
    plans, done, numbers = {row.name: cells(lab, row) for row in rows}, [], iter(only or itertools.count())

    def work(_):
        while sum(len(result.kills) for result in done) < kills and (number := next(numbers, None)) is not None:
            row, turn, rng = ROWS[number % len(ROWS)], number // len(ROWS), np.random.default_rng([lab.seed, number])
            if row not in rows:
                continue
            cell = plans[row.name][turn % len(plans[row.name])]
            done.append(result := torture(lab, row, number, rng, *plan(lab, row, rng, cell)))
            print(f"{number:4} {row.name:8} {result.text} {'DIFFERS' if result.problems else 'equal'}", flush=True)
            for problem in result.problems:
                print(f"     --seed {lab.seed} --only {number}: {problem}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        [*pool.map(work, range(jobs))]
    return done


def table(results):
    """What was killed where: kills, and after a slash those of runs that ended as the undisturbed ones, if not all."""
    columns = [*dict.fromkeys(itertools.chain(*KINDS.values()))]
    all_of, equal = Counter(), Counter()
    for result in results:
        for name, moment in result.kills:
            for key in itertools.product((result.script, "all"), (name, "all"), (moment, "all")):
                all_of[key] += 1
                equal[key] += not result.problems
    lines = ["".join(f"{title:>11}" for title in ("", "", *columns, "all"))]
    scripts = [row.name for row in ROWS if any(row.name == result.script for result in results)]
    for script, name in itertools.product([*scripts, "all"], [*SIGNALS, "all"]):
        keys = [(script, name, moment) for moment in (*columns, "all")]
        shown = [f"{all_of[key]}/{equal[key]}" if all_of[key] > equal[key] else all_of[key] or "." for key in keys]
        lines.append("".join(f"{text:>11}" for text in (script, name, *shown)))
    return "\n".join(lines)


# -- long runs -------------------------------------------------------------------------------------------------------


def long_run(lab, row, updates, rows=40, start=start_process):
    """Rows (update, resident bytes, open files) of a run on toy data that saves and paints after each row or two."""
    folder = lab.folder / f"{row.name}-long"
    folder.mkdir()
    flags = f"{row.tiny} --epochs 1000000000 --max-steps {updates} --save-every {max(1, updates // 20)} --run run"
    spec = lab.spec(row, folder, flags.split(), every=max(1, updates // rows))
    if status := finish(start(spec), 7200):
        raise RuntimeError(f"status {status}, {last_line(spec)}")
    return [[*map(int, line.split())] for line in Path(f"{spec['log']}.memory").read_text().splitlines()]


def growth(rows):
    """MiB and open files that came to what there was after the first tenth, at the most."""
    warm, rest = rows[: max(1, len(rows) // 10)], rows[len(rows) // 10 :]
    return tuple(max(row[i] for row in rest) - max(row[i] for row in warm) for i in (1, 2))


def remember(lab, rows, updates):
    """Print memory and open files of long runs. Returns whether they stay."""
    good = True
    print(f"{'':10} MiB after a tenth, at the end, grown at the most by; open files likewise")
    for row in rows:
        found = long_run(lab, row, updates)
        grown, files = growth(found)
        good &= grown < BOUND * 2**20 and files <= 0
        tenth = found[max(0, len(found) // 10 - 1)]
        memory = [f"{size / 2**20:.1f}" for size in (tenth[1], found[-1][1], grown)]
        print(f"{row.name:10}", *memory, ";", tenth[2], found[-1][2], files, flush=True)
    return good


# -- old checkpoints -------------------------------------------------------------------------------------------------


def old_flags(name):
    """Flags of the checkpoint of a script, but for the run folder."""
    return [*MADE[name].split(), *"--precision fp32 --device cpu".split()]


def make_checkpoints(lab):
    """Write the checkpoints that are not there: none is ever made anew."""
    for row in ROWS:
        folder = lab.folder / f"{row.name}-made"
        folder.mkdir()
        spec = lab.spec(row, folder, [*old_flags(row.name), "--max-steps", "3", "--run", "run"])
        if status := finish(lab.server.start(spec)):
            raise RuntimeError(f"status {status}, {last_line(spec)}")
        file = OLD / f"{row.name}-v{read_checkpoint(folder / 'run')['version']}.pt"
        if not file.exists():
            shutil.copy(folder / "run" / "last.pt", file)
            print(f"{file.name}: {file.stat().st_size} bytes")


def main():
    """See the top."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at least so many in all")
    parser.add_argument("--updates", type=int, help="of a long run of each script")
    parser.add_argument("--checkpoints", action="store_true", help="make those that are missing")
    parser.add_argument("--scripts", nargs="+", choices=names, default=names)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed where")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="only these cases")
    parser.add_argument("--folder", type=Path, help="work there, where cases that differ stay")
    args = parser.parse_args()
    rows = [row for row in ROWS if row.name in args.scripts]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=args.folder is None)
        with contextlib.closing(Lab(folder.resolve(), args.seed)) as lab:
            if args.checkpoints:
                return make_checkpoints(lab)
            if args.updates:
                return 0 if remember(lab, rows, args.updates) else 1
            begun, results = time.monotonic(), kill_many(lab, rows, args.kills, args.jobs, args.only)
            kills, equal = (sum(len(r.kills) for r in results if not (good and r.problems)) for good in (False, True))
            print(table(results))
            print(f"{kills} kills in {len(results)} runs, {equal} continued equal; {time.monotonic() - begun:.0f} s")
            return 1 if any(result.problems for result in results) else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    elif sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
