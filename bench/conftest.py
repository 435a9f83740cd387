"""Options of `pytest bench`."""

from bench.speed import SIZES


def pytest_addoption(parser):
    """What it takes, beside the options of pytest-benchmark."""
    group = parser.getgroup("speed of the scripts")
    group.addoption("--sizes", choices=SIZES, default="toy", help="of the networks and the batch (toy)")
    group.addoption("--device", help="cpu, cuda, ... (the accelerator, if there is one)")
