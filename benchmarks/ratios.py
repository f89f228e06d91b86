"""What benchmarks share: a ratio, what it must be, and times taken in turns."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from expunge import Examples, stream

REPEATS = 5


@dataclass(frozen=True)
class Result:
    """A ratio and what it must be."""

    what: str
    against: str
    ratio: float
    required: str
    met: bool


def fastest(*contestants: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """The shortest time of each, in seconds of the clock, taken in turns so that a busy moment hits all of them."""
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(REPEATS):
        for mine, contestant in zip(times, contestants, strict=True):
            start = clock()
            contestant()
            mine.append(clock() - start)
    return [min(mine) for mine in times]


def at_least(what: str, against: str, ratio: float, required: float) -> Result:
    return Result(what, against, ratio, f"at least {required:g}", ratio >= required)


def at_most(what: str, against: str, ratio: float, required: float) -> Result:
    return Result(what, against, ratio, f"at most {required:g}", ratio <= required)


def for_comparison(what: str, against: str, ratio: float) -> Result:
    """A ratio that nothing is asked of."""
    return Result(what, against, ratio, "", True)


def images(count: int, channels: int, side: int) -> Examples:
    noise = torch.rand(count, channels, side, side, generator=stream(0, "images"))
    return Examples(noise, torch.randint(10, (count,), generator=stream(0, "labels")))
