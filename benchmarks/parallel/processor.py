"""A processor of constant speed for each rank, so that one computes as fast while others compute as while they wait.

Without it four ranks on two cores have half a core each while all of them compute, and a whole one where the others wait, as in
a pipeline: no single speed describes them. Nor does the quota of a control group hold a rank to one. It lets a process that has
waited compute at full speed until the quota of the period is used up, which the kernel asks at its next tick, and so only what
lasts many periods takes its time. Then it stops every thread of the process, those that receive messages too.

So a rank rests by itself. What it computed since its last exchange took c seconds of processor time: before the next exchange
begins it waits until c / share have passed. Exchanges themselves are not slowed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from unittest import mock

from glm5_port import collectives


class Pace:
    """Within the context, what the calling thread computes between exchanges takes 1 / share of its processor time.

    Args:
        share: of a core; None: nothing rests, and times are only counted.

    Attributes:
        computing: seconds since `begin`, rests included, that were spent outside exchanges.
        late: of these, seconds by which the machine was too busy to hold the pace.
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self.computing = self.late = 0.0
        self._overslept = 0.0
        self._answered = collectives.answered
        self._patch = mock.patch.object(collectives, "answered", self._exchange)
        self._mark()

    def __enter__(self) -> Pace:
        self._patch.start()
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def begin(self) -> None:
        """From here on times count."""
        self.computing = self.late = self._overslept = 0.0
        self._mark()

    def rest(self) -> None:
        """Waits until what was computed has taken its time; before an exchange, and before a clock is read."""
        passed = time.perf_counter() - self._clock
        if self.share is not None:
            ahead = (time.thread_time() - self._processor) / self.share - self._overslept - passed
            self._overslept = 0.0
            if ahead > 0:
                time.sleep(ahead)
                self._overslept = time.perf_counter() - self._clock - passed - ahead
            else:
                self.late -= ahead
        self.computing += time.perf_counter() - self._clock
        self._mark()

    @contextlib.contextmanager
    def _exchange(self, collective: str, purpose: str) -> Iterator[None]:
        self.rest()
        try:
            with self._answered(collective, purpose):
                yield
        finally:
            self._mark()

    def _mark(self) -> None:
        self._clock, self._processor = time.perf_counter(), time.thread_time()
