"""Two things timed turn by turn, on pytest-benchmark: how `make bench` comes to a ratio.

In every round the candidate and its baseline run one after the other, in alternating order. The ratio is the median
of the rounds' own ratios: what slows the machine for a while slows both. Processor time, of all threads, stands beside
wall time, since waiting for a core that another program has costs none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

Run = Callable[[], Any]

# A pair is given so many seconds, and never fewer than FEWEST rounds.
SECONDS, FEWEST, MOST = 1.5, 3, 100


def nothing() -> None:
    """Prepare nothing."""


class Row(NamedTuple):
    """What one provider took, in one case."""

    provider: str
    case: str
    dtype: str  # of the weights
    parameters: int
    bytes_per_parameter: float  # that have to move
    rounds: int
    ms: float  # median
    gigabytes_per_second: float
    baseline: str
    baseline_ms: float  # median
    ratio: float  # median over rounds
    ratio_low: float  # quartiles
    ratio_high: float
    processor_ratio: float  # of processor time, median over rounds
    target: float | None = None
    memory: float | None = None  # MB above weights, gradients, states and tau, where that was measured


class Time(NamedTuple):
    """What a run took, in seconds: by the clock, and of all threads together."""

    wall: float
    processor: float


def timed(run: Run) -> Time:
    """Run and time."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return Time(time.perf_counter() - wall, time.process_time() - processor)


class Turns:
    """Rounds of a candidate and its baseline: `before`, `run` and `after` make one.

    Attributes:
        own, others: the times of all rounds, of the candidate and of the baseline.
    """

    def __init__(self, candidate: Run, baseline: Run, prepare: Run) -> None:
        """Run both twice; `prepare` is called before each round, untimed."""
        self._candidate, self._baseline, self._prepare = candidate, baseline, prepare
        self.own: list[Time] = []
        self.others: list[Time] = []
        # The first round compiles and allocates, and the second tells how many there is time for.
        for _ in range(2):
            prepare()
            self._warm = timed(candidate), timed(baseline)

    def that_fit(self, seconds: float) -> int:
        """Return for how many rounds there is time."""
        return min(MOST, max(FEWEST, int(seconds / sum(each.wall for each in self._warm))))

    def before(self) -> None:
        """Prepare a round, and in every other one run the baseline first."""
        self._prepare()
        if len(self.own) % 2 == 0:
            self.others.append(timed(self._baseline))

    def run(self) -> None:
        """Run the candidate."""
        self.own.append(timed(self._candidate))

    def after(self) -> None:
        """Run the baseline where it has not been before."""
        if len(self.others) < len(self.own):
            self.others.append(timed(self._baseline))


def pair_up(benchmark: Any, candidate: Run, baseline: Run, prepare: Run, seconds: float = SECONDS) -> Turns:
    """Return turns that the fixture of pytest-benchmark has counted, as rounds of the candidate."""
    turns = Turns(candidate, baseline, prepare)
    benchmark.pedantic(turns.run, setup=turns.before, teardown=turns.after, rounds=turns.that_fit(seconds))
    return turns


def row_of(
    turns: Turns,
    *,
    provider: str,
    case: str,
    dtype: str,
    parameters: int,
    bytes_per_parameter: float,
    baseline: str,
    target: float | None = None,
    memory: float | None = None,
    repeats: int = 1,
) -> Row:
    """Return the row of a candidate; `repeats` says how often each run did what is measured."""
    pairs = list(zip(turns.own, turns.others, strict=True))
    ratios = [own.wall / other.wall for own, other in pairs]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    ms, baseline_ms = (1e3 * statistics.median(pair[i].wall for pair in pairs) / repeats for i in range(2))
    return Row(
        provider,
        case,
        dtype,
        parameters,
        bytes_per_parameter,
        len(pairs),
        ms,
        bytes_per_parameter * parameters / ms / 1e6,
        baseline,
        baseline_ms,
        statistics.median(ratios),
        low,
        high,
        statistics.median(own.processor / other.processor for own, other in pairs),
        target,
        memory,
    )
