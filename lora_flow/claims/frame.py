"""The frame of a claim: a statement, cases with their verdicts, and the intervals behind means over seeds.

A claim is a generator. Its docstring is the statement; its decorator has the source, the runs behind it and the
tolerance. The generator yields `(where, predicted, measured)` for each case, or a `Tried` with further fields.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

DERIVED = "derived here"


class Tried(NamedTuple):
    """One case of a claim.

    `measured` is a number, the worst of all runs, or has one value for each seed. With seeds the mean must obey, and
    its whole 95% interval must obey a bound. NaN, a run without the quantity, does not obey.
    """

    where: str
    predicted: Any
    measured: Any
    applies: bool | np.bool_ = True
    also: bool | np.bool_ = True  # what else must be so
    counted: tuple[int, int] | None = None  # of how many runs it is, and how many there are
    missing: str = ""  # what is missing for a verdict, in words
    reversed: bool | np.bool_ = False  # whether the opposite of the claim is so
    told: str = ""  # the numbers behind the case, in words


@dataclasses.dataclass(frozen=True)
class Case:
    """One number against its prediction; `half_width` of a 95% interval over seeds where there is one.

    `holds` is None where the claim does not apply. A case is not `decided` where its interval is too wide to tell.
    `counted` has the number of runs that count and of all runs, where not all count. A case that does not hold may be
    `reversed`. `told` has the numbers behind the case, and what is missing for a verdict, in words.
    """

    where: str
    predicted: float
    measured: float
    half_width: float | None
    holds: bool | None
    decided: bool = True
    counted: tuple[int, int] | None = None
    reversed: bool = False
    told: str = ""

    @property
    def verdict(self) -> str:
        if self.holds is None:
            return "not applicable"
        if not self.decided:
            return "undecided"
        return "yes" if self.holds else "reversed" if self.reversed else "no"


@dataclasses.dataclass(frozen=True)
class Line:
    """A claim's result: the source, the statement, the tested cases, and the runs behind them.

    `relation` relates the measured number to the predicted one: "=", ">=" or "<=". An `identity` follows from the
    code's own definitions: it tests the code and its rounding, and says nothing of theory.
    """

    source: str
    statement: str
    runs: str
    cases: tuple[Case, ...]
    relation: str = "="
    identity: bool = False

    @property
    def verdict(self) -> str:
        tried = [case.verdict for case in self.cases if case.holds is not None]
        if not tried:
            return "not applicable"
        for word, verdicts in (("fails", ("no", "reversed")), ("undecided", ("undecided",))):
            if count := sum(map(tried.count, verdicts)):
                return f"{word} ({count} of {len(tried)})"
        return "holds (identity)" if self.identity else "holds"

    @property
    def counted(self) -> str:
        """The number of runs behind the line, "" where all count."""
        counts = [case.counted for case in self.cases if case.counted is not None]
        some, all_of_them = (sum(count[i] for count in counts) for i in (0, 1))
        return f"{some} of {all_of_them} runs count" if some < all_of_them else ""


Cases = Iterator[tuple[Any, ...]]  # what a claim yields: `Tried`, or its first fields
Claim = Callable[[Any], Line]  # of a number of seeds, or of stored results
Within = float | tuple[float, float]

ENTERED: dict[str, Claim] = {}


def claim(
    source: str, runs: str, relation: str = "=", within: Within = 0.0, relative: bool = False, identity: bool = False
) -> Callable[[Callable[[Any], Cases]], Claim]:
    """Enters a claim.

    - `source`: the paper and the place there. `runs`: the runs that test the claim; "{seeds}" becomes their number.
    - `relation`, `identity`: as for `Line`.
    - `within`: the tolerance of "=", one number or (below, above), or the slack of a bound; `relative` to the
      prediction, or absolute.
    """

    def enter(function: Callable[[Any], Cases]) -> Claim:
        statement = " ".join(str(function.__doc__).split())

        @functools.wraps(function)
        def line(of: Any) -> Line:
            cases = tuple(judge(Tried(*case), relation, within, relative) for case in function(of))
            return Line(source, statement, runs.format(seeds=of), cases, relation, identity)

        ENTERED[function.__name__] = line
        return line

    return enter


def judge(tried: Tried, relation: str = "=", within: Within = 0.0, relative: bool = False) -> Case:
    """Whether the measured number obeys; undecided where the interval over seeds is too wide to tell.

    For "=" such an interval is wider than the tolerance and meets it; for a bound it contains the bound.
    """
    predicted, (mean, width) = float(tried.predicted), estimate(tried.measured)
    unit, half = abs(predicted) if relative else 1.0, width or 0.0
    below, above = within if isinstance(within, tuple) else (within, within)
    low, high = predicted - below * unit, predicted + above * unit
    if relation == "=":
        holds, meets = low <= mean <= high, low - half <= mean <= high + half
        decided = not meets or half <= (high - low) / 2
    else:
        least = relation == ">="
        bound = low if least else high
        holds = mean - half >= bound if least else mean + half <= bound
        decided = not mean - half < bound < mean + half
    if not tried.also:
        holds, decided = False, True
    decided, told = decided and not tried.missing, "; ".join(filter(None, (tried.told, tried.missing)))
    holds_if = holds if tried.applies else None
    return Case(tried.where, predicted, mean, width, holds_if, decided, tried.counted, bool(tried.reversed), told)


def estimate(values: Any) -> tuple[float, float | None]:
    """Mean over seeds, and half the width of its 95% interval (Student's t); a number by itself has none."""
    values = np.asarray(values, float)
    if not values.ndim:
        return float(values), None
    values = np.ravel(values)
    width = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(width)
