"""A request to stop (SIGTERM, Ctrl-C) while training: heard at once, obeyed where nothing is lost."""

from __future__ import annotations

import signal

from pipeline.train.world import sum_over_ranks


class StopRequests:
    """Listens from its creation on. Before the first step there is nothing to save, and a request ends
    the process there and then; after ``wait_for_boundary`` it is only kept."""

    def __init__(self) -> None:
        self.asked = False
        self.at_once = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        first, self.asked = not self.asked, True  # launchers ask several times
        if first and self.at_once:
            raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    def wait_for_boundary(self) -> None:
        """From now on the loop asks."""
        self.at_once = False

    def agreed(self, *others: float) -> list[float]:
        """Collective: how many ranks were asked to stop; and the sums of ``others``."""
        return sum_over_ranks([float(self.asked), *others])
