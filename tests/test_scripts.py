"""What the six scripts promise alike, over the table in scripts.py."""

import ast
import json
import math
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT, ROWS, assert_refused, environment, read_checkpoint, read_log, run_main, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 3  # of the run that most tests start from
COMMON = (
    "--data --data-root --out --epochs --max-steps --batch-size --lr --size --seed --device --precision --save-every"
    " --fresh --init"
).split()
BAD = (  # refused by every script
    "--data nonsense",
    "--data missing/folder",
    "--data empty",
    "--data notes.txt",
    "--to elsewhere",
    "--batch-size 0",
    "--lr nan",
    "--lr -1",
    "--epochs 0",
    "--max-steps 0",
    "--size 0",
    "--seed -1",
    "--device cuda:99",
    "--device nonsense",
)
WRONG = ("--nonsense", "--batch-size two", "--batch 2", "--precision fp8")  # argparse says so


def each(cases):
    """Run a test for every case of every row: `cases` gives those of a row."""
    table = [pytest.param(row, case, id=f"{row.name} {case}") for row in ROWS for case in cases(row)]
    return pytest.mark.parametrize(("row", "case"), table, indirect=["row"])


@pytest.fixture(scope="session")
def first(row, tmp_path_factory):
    """The folder of a run of a few updates; it is left as it is."""
    run = tmp_path_factory.mktemp("first") / "run"
    assert run_main(row, *row.tiny.split(), "--out", run, "--max-steps", STEPS) == 0
    return run


@pytest.fixture
def run(first, tmp_path):
    """A copy of that folder to work on."""
    return shutil.copytree(first, tmp_path / "run")


# -- as a command ----------------------------------------------------------------------------------------------------


def test_every_script_has_a_row():
    """The table is complete."""
    assert {row.file for row in ROWS} == {*ROOT.glob("*.py")}


def test_import_is_silent(row, tmp_path):
    """Importing parses, prints, writes and downloads nothing."""
    no_network = "import socket; socket.socket.connect = socket.getaddrinfo = None"
    code = f"import sys; sys.argv = ['x', '--nonsense']; {no_network}; import {row.name}"
    command = [sys.executable, "-c", code]
    end = subprocess.run(command, capture_output=True, timeout=120, env=environment(PYTHONPATH=str(ROOT)))
    assert (end.returncode, end.stdout, end.stderr) == (0, b"", b"")
    assert not snapshot(tmp_path)


def test_help(row, call):
    """--help fits on a screen and explains every option, those that all scripts have among them; each is read."""
    result, source = call(row, "--help"), row.file.read_text()
    assert result.said == 0 and len(result.out.splitlines()) <= 60
    options = re.findall(r'add\(\s*"(--[\w-]+)"', source)
    assert {*options} >= {*COMMON}
    for option in options:
        assert re.search(rf"^ +{option}\b.*\S", result.out, re.MULTILINE), option
    for name in vars(row.args()):
        assert re.search(rf"\bargs\.{name}\b|settings\.{name}\b", source), name


def test_alone(row, start, tmp_path):
    """A copy of the file alone in an empty folder, under another name, trains in a run folder of that name."""
    shutil.copy(row.file, "mine.py")
    child = start("mine.py", *row.tiny.split(), "--max-steps", 2, cwd=tmp_path)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (0, ""), err
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.py", "runs", "data"}
    run = tmp_path / "runs" / "mine-toy"
    assert {path.name for path in run.iterdir()} >= {"config.json", "log.jsonl", "last.pt", "samples"}
    config = json.loads((run / "config.json").read_text())
    assert (config["size"], config["precision"]) == (row.args().size, "fp32")
    assert [*run.glob("samples/*.png")] and len([*run.glob("test/**/*.png")]) == row.tests
    for picture in run.rglob("*.png"):
        Image.open(picture).verify()
    for entry in read_log(run):
        losses = [name for name in entry if name.startswith("loss")]
        assert entry.keys() == {"step", "epoch", *losses, "images_per_s"} and losses
        assert all(map(math.isfinite, entry.values())) and entry["images_per_s"] > 0
    assert {*row.inputs} < {*read_checkpoint(run)} and read_checkpoint(run)["script"] == row.name


def test_finished_run(row, run, call):
    """The command of a run that is done says so and changes no file but the log of settings."""
    before = snapshot(run)
    for steps in (STEPS, STEPS - 1):
        result = call(row, *row.tiny.split(), "--out", run, "--max-steps", steps)
        assert result.said == 0 and f"saved at step {STEPS} of " in result.out
    assert {name: data for name, data in snapshot(run).items() if name != "config.json"} == {
        name: data for name, data in before.items() if name != "config.json"
    }


def test_use(row, run, call, tmp_path):
    """PNGs of the right number and sizes come from the run folder alone, the same in each call."""
    flags, to, sizes = row.use(tmp_path / "use", run)
    before, written = snapshot(run), []
    for _ in range(2):
        result = call(row, *flags)
        assert result.said == 0 and str(to) in result.out
        assert {name: Image.open(to / name).size for name in sizes} == sizes
        written.append(snapshot(to))
    assert written[0] == written[1] and snapshot(run) == before
    option, *value = next(change for change in row.changes if "size" not in change and "seed" not in change).split()
    said = call(row, *flags, option, *value).out  # the run's own settings count, which is said
    assert re.search(rf"was trained with .*{option} ", said) and snapshot(to) == written[0]
    shutil.rmtree(run)
    assert_refused(call(row, *flags).said, "train first")


def test_load_generator(row, first):
    """G of a run folder has the trained weights, its settings, and can be called."""
    G = row.module.load_generator(first)
    weights = read_checkpoint(first).get("G_mean", read_checkpoint(first)["G"])
    assert all(torch.equal(weight, weights[name]) for name, weight in G.state_dict().items())
    with torch.no_grad():
        images = G(*row.inputs["G"](G.settings))
    assert images.shape[0] == 2 and images.shape[-1] == G.settings.size and images.isfinite().all()


# -- from within -----------------------------------------------------------------------------------------------------


def test_build(row):
    """build holds each network once, from the seed alone."""
    states = [row.module.build(row.args("--seed", seed)) for seed in (1, 1, 2)]
    for name in row.inputs:
        weights = [torch.cat([weight.flatten() for weight in state[name].parameters()]) for state in states]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_weights_move(row, first):
    """Training moves every weight tensor of every network."""
    state, checkpoint = row.module.build(row.args()), read_checkpoint(first)
    assert checkpoint["step"] == STEPS
    for network in row.inputs:
        for name, weight in state[network].named_parameters():
            assert checkpoint[network][name].isfinite().all()
            assert weight.dim() < 2 or not torch.equal(weight, checkpoint[network][name]), (network, name)


def test_exports(row):
    """torch.export takes the networks, and what it makes of them computes the same."""
    args = row.args()
    state = row.module.build(args)
    for name, inputs in row.inputs.items():
        network, example = state[name].eval(), inputs(args)
        with torch.no_grad():
            exported = torch.export.export(network, example, strict=False).module()
            torch.testing.assert_close(exported(*example), network(*example))


class Watch(TorchDispatchMode):
    """Notes the names of all operators but those inside of an optimizer."""

    def __init__(self, optimizers):
        super().__init__()
        self.names, self.inside = set(), False
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda *_: setattr(self, "inside", True))
            optimizer.register_step_post_hook(lambda *_: setattr(self, "inside", False))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside:
            self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **kwargs or {})


# what reads a value back, has a shape that depends on one, or brings one over from the host
UNFIT = "_local_scalar_dense item is_nonzero equal nonzero masked_select _unique _unique2 unique_dim lift_fresh".split()


def test_step_can_be_recorded(row, monkeypatch):
    """A step reads no value back, draws nothing on the host, and gives back 0-d tensors; rates are tensors."""
    args = row.args()
    state = row.module.build(args)
    optimizers = [part for part in state.values() if isinstance(part, torch.optim.Optimizer)]
    assert len(optimizers) >= 2
    for optimizer in optimizers:
        assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
    step, batch = row.module.make_step(args, state), row.batch(args)
    step(*batch)  # optimizers make their state in the first
    monkeypatch.setattr(np.random, "default_rng", None)
    host = random.getstate(), pickle.dumps(np.random.get_state())
    with Watch(optimizers) as watch:
        losses = step(*batch)
    assert "convolution" in watch.names or "addmm" in watch.names
    assert not watch.names & {*UNFIT}
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == host
    assert losses and all(isinstance(loss, torch.Tensor) and loss.dim() == 0 for loss in losses.values())
    assert all(loss.isfinite() for loss in losses.values())


# -- errors ----------------------------------------------------------------------------------------------------------


@each(lambda row: row.changes)
def test_other_settings_are_refused(row, case, run, call):
    """A run goes on with the settings that it learns with; a sentence names the one that differs."""
    before = snapshot(run)
    result = call(row, *row.tiny.split(), *case.split(), "--out", run, "--max-steps", STEPS + 1)
    assert_refused(result.said, case.split()[0].removeprefix("--"))
    assert snapshot(run) == before


@each(lambda row: BAD + row.bad)
def test_bad_arguments(row, case, call, tmp_path):
    """One sentence that names the option or its value, and nothing is made."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no images")
    before = snapshot(tmp_path)
    result = call(row, *row.tiny.split(), "--out", "run", "--max-steps", 1, *case.split())
    if result.said == 2:  # one of the choices of an option; argparse says so
        assert case.split()[0] in result.err and "choose from" in result.err or "invalid" in result.err
    else:
        assert_refused(result.said, case.split()[0], case.split()[-1])
    assert snapshot(tmp_path) == before


def test_wrong_arguments(row, call):
    """What argparse finds ends with exit status 2 and names the option."""
    for case in WRONG:
        result = call(row, *case.split())
        assert result.said == 2 and case.split()[0] in result.err


class Code:
    """Code in a pickle, which makes a file when it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def edit(change):
    """Damage done to the dict in a checkpoint."""

    def damage(path):
        checkpoint = torch.load(path, weights_only=True)
        torch.save(change(checkpoint) or checkpoint, path)

    return damage


DAMAGE = {
    "of another script": edit(lambda checkpoint: checkpoint.update(script="another")),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "code": lambda path: torch.save({"script": "x", "G": Code(path.with_name("hacked"))}, path),
    "list": edit(lambda checkpoint: [1, 2]),
    "no G": edit(lambda checkpoint: checkpoint.pop("G") and None),
    "G of other shapes": edit(
        lambda checkpoint: checkpoint.update(G={name: torch.ones(7) for name in checkpoint["G"]})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_checkpoint(row, run, call, damage, tmp_path):
    """A bad checkpoint is refused with a sentence that names it, runs no code, and stays as it is."""
    flags, _, _ = row.use(tmp_path / "use", run)
    DAMAGE[damage](run / "last.pt")
    before = snapshot(run)
    for given in ([*row.tiny.split(), "--out", run, "--max-steps", STEPS + 1], flags):
        result = call(row, *given)
        assert_refused(result.said, str(run))
        assert "weights_only" not in result.said
        assert snapshot(run) == before and not [*tmp_path.rglob("hacked")]


def test_loss_not_finite(row, call, tmp_path):
    """Training stops at the update whose loss is not finite; the checkpoint before stays."""
    run = tmp_path / "run"
    flags = [*row.tiny.split(), "--out", run, "--lr", "1e30", "--save-every", 1, "--max-steps"]
    assert call(row, *flags, 1).said == 0
    result = call(row, *flags, 9)
    assert_refused(result.said, "finite")
    assert re.search(r"\bstep [2-9]\b", result.said) and "--lr" in result.said
    assert all(math.isfinite(value) for entry in read_log(run) for value in entry.values())


# -- as a text -------------------------------------------------------------------------------------------------------


LIMITS = {  # lines of the method, lines, bytes: no file grows beyond this
    "pix2pix": (144, 740, 42_200),
    "cyclegan": (220, 740, 42_400),
    "gan": (180, 650, 35_900),
    "cgan": (210, 680, 36_700),
    "dcgan": (150, 695, 39_000),
    "text2img": (270, 955, 53_100),
}
FOLDERS = {"bench": (2500, 125_000), "tests": (4500, 220_000)}


def test_length(row):
    """The file is short enough to be read to its end."""
    text = row.file.read_text()
    method = re.search(r"# -- the method -+\n(.*?)\n# -- ", text, re.DOTALL)[1].strip()
    found = len(method.splitlines()), len(text.splitlines()), len(text.encode())
    assert [here <= most for here, most in zip(found, LIMITS[row.name])] == [True] * 3, (found, LIMITS[row.name])
    assert max(map(len, text.splitlines())) <= 120 and text.startswith("# /// script")


@pytest.mark.parametrize("folder", FOLDERS)
def test_length_of_folders(folder):
    """So are the bench and these tests."""
    texts = [file.read_text() for file in (ROOT / folder).rglob("*.py")]
    lines, size = sum(len(text.splitlines()) for text in texts), sum(len(text.encode()) for text in texts)
    assert lines <= FOLDERS[folder][0] and size <= FOLDERS[folder][1], (lines, size)


def shared_block(name):
    """{name: its code} of what stands under the last ruler, without docstrings and what only torchrun needs."""
    text = (ROOT / f"{name}.py").read_text()
    found = {}
    for node in ast.parse(text[text.index("# -- the same in all") :]).body:
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part):
                part.body = part.body[1:] or [ast.Pass()]
            if isinstance(part, ast.FunctionDef | ast.If | ast.With | ast.For):
                part.body = [
                    line for line in part.body if not (isinstance(line, ast.If) and "WORLD" in ast.unparse(line.test))
                ]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = re.sub(r" (and \(?RANK == 0\)?|\+ RANK)|\n.*% WORLD", "", ast.unparse(node))
    return found


def test_shared_block():
    """What all scripts share is the same text in each of them, but for torchrun, which gan.py and cgan.py leave out."""
    model = shared_block("pix2pix")
    assert len(model) > 10
    for row in ROWS[1:]:
        block = shared_block(row.name)
        differ = [name for name in model if name != "main" and name in block and block[name] != model[name]]
        missing = [name for name in model if name not in block and not defined(row, name)]
        assert (differ, [name for name in missing if name not in OPTIONAL]) == ([], []), row.name


OPTIONAL = {"init_distributed", "average_gradients", "cache_images", "find_images"}


def defined(row, name):
    """Whether a script has a function or class of that name."""
    return hasattr(row.module, name)


def test_names_are_plain(row):
    """The names that the scripts promise are there, and imports are those that are agreed on."""
    promised = "get_args Generator Discriminator build make_step train load_generator main fail explain_errors"
    promised += " atomic_write check_args save_grid read_image load_checkpoint capture"
    assert [name for name in promised.split() if not defined(row, name)] == []
    names = set()
    for node in ast.walk(ast.parse(row.file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "PIL", "tqdm", "filelock"}
    assert names <= allowed
