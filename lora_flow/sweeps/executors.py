"""Who solves the boxes of a sweep: this process, one of several that share the run's folder, or a pool of workers."""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from lora_flow.checks import kind, require
from lora_flow.runtime.progress import Progress
from lora_flow.storage.folder import Folder
from lora_flow.sweeps.plan import Plan
from lora_flow.sweeps.values import Values
from lora_flow.sweeps.workers import WorkersLost, order_of, solve_box

Solved = tuple[int, Values | None]
"""The number of a box that is solved, and stored where there is a folder, and its values where they are here."""


class Executor(abc.ABC):
    """Has boxes solved, in any order."""

    @abc.abstractmethod
    def solve(self, plan: Plan, folder: Folder | None, pending: Sequence[int]) -> Iterator[Solved]:
        """Solves the pending boxes, stores them in the folder if there is one, and yields each."""

    def workers(self) -> str:
        """Who solves at the moment, to be said after "solving"; "" for this process."""
        return ""


def solved(
    plan: Plan, folder: Folder | None, pending: Sequence[int], executor: Executor, progress: bool
) -> Iterator[Solved]:
    """The pending boxes, as they are solved, with progress shown."""
    boxes, total = plan.layout.boxes, plan.grid.size
    done = total - sum(map(boxes.size, pending))
    with Progress(total, "lanes", done, shown=progress, what="compiling") as bar:
        for number, values in executor.solve(plan, folder, pending):
            bar.describe(f"solving{executor.workers()}")
            bar.update(boxes.size(number))
            yield number, values


class InProcess(Executor):
    """Solves all boxes on the devices of this process."""

    def solve(self, plan: Plan, folder: Folder | None, pending: Sequence[int]) -> Iterator[Solved]:
        for number, values in plan.solve(pending):
            if folder is not None:
                folder.write(number, values)
            yield number, values


@dataclasses.dataclass(frozen=True)
class Part(Executor):
    """Solves its share of the boxes, `part` of `parts` from 0, then what the others have left.

    The others are processes that share the folder, and nothing else. A box that is stored is left out. The others'
    boxes are taken from the last on, a part at a time, so that two processes seldom solve the same one; where they do,
    they store the same bits.
    """

    part: int
    parts: int

    def solve(self, plan: Plan, folder: Folder | None, pending: Sequence[int]) -> Iterator[Solved]:
        assert folder is not None, "parts meet in a folder"
        elsewhere: list[int] = []

        def left() -> Iterator[int]:
            for number in self.order(pending):
                if folder.is_pending(number):
                    yield number
                else:
                    elsewhere.append(number)

        for number, values in plan.solve(left()):
            folder.write(number, values)
            yield number, values
            yield from ((elsewhere.pop(), None) for _ in range(len(elsewhere)))
        yield from ((other, None) for other in elsewhere)

    def order(self, pending: Sequence[int]) -> list[int]:
        """The boxes, its own first."""
        shares = [[number for number in pending if number % self.parts == part] for part in range(self.parts)]
        others = (shares[(self.part + further) % self.parts][::-1] for further in range(1, self.parts))
        return [*shares[self.part], *(number for share in others for number in share)]


@dataclasses.dataclass(frozen=True)
class OnExecutor(Executor):
    """Has the boxes solved by an executor: whatever has `submit(function, *arguments)`, which returns a future."""

    executor: Any

    def __post_init__(self) -> None:
        submits = callable(getattr(self.executor, "submit", None))
        require(submits, "executor", "have a method submit, as concurrent.futures has it", kind(self.executor))
        context = getattr(self.executor, "_mp_context", None)  # of a ProcessPoolExecutor, which does not tell otherwise
        forks = context is not None and context.get_start_method() == "fork"
        must = "start its processes anew: ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn'))"
        require(not forks, "executor", must, "one that forks them, in which JAX hangs")

    def solve(self, plan: Plan, folder: Folder | None, pending: Sequence[int]) -> Iterator[Solved]:
        order = order_of(plan, folder)
        left = {self.executor.submit(solve_box, order, number) for number in pending}
        for future in left:
            is_one = isinstance(future, concurrent.futures.Future)
            require(is_one, "executor", "return concurrent.futures.Future from submit", kind(future))
        try:
            for future in concurrent.futures.as_completed(list(left)):
                left.discard(future)
                yield future.result()
        except concurrent.futures.BrokenExecutor as error:
            raise WorkersLost("the executor's workers must live until the sweep is done, got one that died") from error
        finally:
            for future in left:
                future.cancel()
