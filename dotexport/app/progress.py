"""How far long work is: bars on a terminal, lines where nobody watches one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dotexport.app.terminal import duration, stderr

if TYPE_CHECKING:
    from dotexport.narrowing.norm_statistics import Progress

EVERY = 30.0  # seconds between two lines of one stage


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar per stage on a terminal's stderr, lines on any other; with time taken and time left."""
    if not stderr.is_terminal:
        lines = Lines(lambda line: print(line, file=sys.stderr, flush=True))
        yield lines
        lines.finish()
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description:<44}"),
        bars.BarColumn(bar_width=24),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=stderr) as shown:
        current: list[tuple[str, bars.TaskID]] = []

        def show(stage: str, done: int, total: int) -> None:
            if not current or current[-1][0] != _name(stage):
                _finish(shown, current)
                current.append((_name(stage), shown.add_task(stage, total=None)))
            shown.update(current[-1][1], description=stage)
            # Nothing done yet says nothing about how long it takes: the bar pulses until it does.
            shown.update(current[-1][1], completed=done, total=total if done else None)

        yield show
        _finish(shown, current)


def _name(stage: str) -> str:
    """What follows a colon is news of the same stage, and the bar goes on."""
    return stage.partition(":")[0]


def _finish(shown: Any, current: list[tuple[str, Any]]) -> None:
    """The stage before this one is over, whether or not it said so."""
    if current:
        shown.update(current[-1][1], completed=1, total=1)


class Lines:
    """A line when a stage begins, one every half a minute, and one when it is over.

    Args:
        write: takes a line without its end.
        clock: seconds, of any origin.
    """

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._clock = write, clock
        self._stage = ""
        self._began = self._said = 0.0
        self._first = 0  # what was done when the stage began: by a run that was stopped

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        if _name(stage) != _name(self._stage):
            self.finish()
            self._began = self._said = now
            self._first = done
            self._write(stage)
        elif done > self._first and now - self._said >= EVERY:
            passed = now - self._began
            left = passed / (done - self._first) * max(total - done, 0)
            self._write(f"{stage}: {done} of {total}, {duration(passed)}, {duration(left)} left")
            self._said = now
        self._stage = stage

    def finish(self) -> None:
        """The stage is over; one that took no time is not worth a second line."""
        passed = self._clock() - self._began
        if self._stage and passed >= 1.0:
            self._write(f"{_name(self._stage)}: done in {duration(passed)}")
        self._stage = ""
