"""Options of `pytest bench`."""

import pytest

from bench import speed


def pytest_addoption(parser):
    """What it takes, beside the options of pytest-benchmark."""
    group = parser.getgroup("speed of the scripts")
    group.addoption("--sizes", choices=("toy", "paper", "both"), help="toy; on CUDA both")
    group.addoption("--device", help="cpu, cuda, ... (the accelerator, if there is one)")


def pytest_configure(config):
    """A device that is not there ends in one sentence."""
    try:
        config.option.device = speed.find_device(config.option.device)
    except SystemExit as refused:
        raise pytest.UsageError(str(refused)) from None


def pytest_generate_tests(metafunc):
    """A case is what takes turns: an update, or a batch of images, of a script at a size, in all its variants."""
    if "case" in metafunc.fixturenames:
        option = metafunc.config.option
        sizes = {"toy": speed.SIZES[:1], "paper": speed.SIZES[1:], "both": speed.SIZES}
        sizes = sizes.get(option.sizes, speed.default_sizes(option.device))
        scripts = [(script, size) for size in sizes for script, flags in speed.FLAGS.items() if size in flags]
        cases = [(work, *of) for of in scripts for work in speed.WORKS]
        found = [(case, variant) for case in cases for variant in speed.WORKS[case[0]]]
        names = ["-".join((*case, variant)) for case, variant in found]
        metafunc.parametrize(("case", "variant"), found, ids=names)
