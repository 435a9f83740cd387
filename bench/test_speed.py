"""pytest bench: an update and a batch of images of every script, in every precision, plain or not, captured or not.

    pytest bench --sizes both -k "pix2pix and update" --benchmark-json after.json
    pytest-benchmark compare --group-by fullname before.json after.json

pytest-benchmark times one test after the other. Here the variants of a case take turns, round by round, and each test
hands it the rounds of one of them. --benchmark-min-rounds is of all of them, --benchmark-max-time of the slowest.
"""

import functools

import pytest

from bench import speed


class Replay:
    """A clock that has measured already: between two of its readings, and one call of `call`, lies the next time."""

    def __init__(self):
        self.now, self.times = 0.0, iter(())

    def clock(self):
        return self.now

    def call(self):
        self.now += next(self.times)


replay = Replay()


@pytest.fixture(scope="session")
def circumstances(request):
    """Where it is measured."""
    return speed.circumstances(request.config.option.device)


@pytest.fixture(scope="session")
def measure(request):
    """measure(case): {variant: (seconds of each round, row)} of those variants of a case that were asked for, once."""
    option = request.config.option
    items = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]

    @functools.cache
    def measure(case):
        asked = [params["variant"] for params in items if params.get("case") == case]
        asked = [variant for variant in asked if not speed.lacking(case[1], variant, option.device)]
        rounds, least = option.benchmark_min_rounds, float(option.benchmark_max_time)
        return speed.measure(*case, asked, option.device, rounds, least)

    return measure


@pytest.mark.benchmark(timer=replay.clock)
def test_speed(benchmark, case, variant, measure, circumstances):
    """The rounds of one variant, and in `extra_info` what they mean."""
    if missing := speed.lacking(case[1], variant, circumstances["device"]):
        pytest.skip(missing)
    times, row = measure(case)[variant]
    benchmark.group, replay.times = "-".join(case), iter(times)
    benchmark.extra_info.update(row | circumstances)
    benchmark.pedantic(replay.call, rounds=len(times))
