"""pytest bench: the time of an update of every script, as pytest-benchmark measures it, one after the other.

    pytest bench --sizes paper -k pix2pix --benchmark-json after.json
    pytest-benchmark compare before.json after.json

`python -m bench speed` compares the variants of a script with each other: there they take turns.
"""

import pytest

from bench import speed
from bench.common import find_device


@pytest.fixture(scope="session")
def circumstances(request):
    """Where and with what it is measured."""
    return speed.circumstances(find_device(request.config.option.device))


@pytest.mark.parametrize("variant", speed.VARIANTS)
@pytest.mark.parametrize("script", speed.FLAGS)
def test_update(benchmark, script, variant, circumstances, request):
    """An update, and in `extra_info` what is known of it."""
    size, device = request.config.option.sizes, circumstances["device"]
    if variant not in speed.variants_on(device):
        pytest.skip(f"there is no {variant} on {device}")
    call, row = speed.prepare(script, size, variant, device)

    def update():
        call()
        speed.synchronise(device)

    benchmark(update)
    benchmark.extra_info.update(row | circumstances)
    benchmark.extra_info["images_per_s"] = row["images"] / benchmark.stats.stats.median
