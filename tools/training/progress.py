"""How far a long step is, on stderr: a bar for people, a line each tenth elsewhere."""

import sys
import time

_WIDTH = 24


class Progress:
    """Call `at` as often as you like; it prints when there is something to see."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, max(1, total)
        self._began = self._printed = time.monotonic()
        self._tenth = 0

    def at(self, done: int, note: str = "") -> None:
        """`done` of the total are finished."""
        now = time.monotonic()
        share = min(1.0, done / self._total)
        left = (now - self._began) * (1 - share) / share if share else 0.0
        if sys.stderr.isatty():
            if now - self._printed < 0.1 and done < self._total:
                return
            bar = "#" * round(share * _WIDTH)
            end = "\n" if done >= self._total else ""
            line = f"\r{self._what} [{bar:<{_WIDTH}}] {share:4.0%}  {left:4.0f} s left  {note}\x1b[K"
            print(line, end=end, file=sys.stderr, flush=True)
            self._printed = now
        elif int(10 * share) > self._tenth:
            self._tenth = int(10 * share)
            print(
                f"{self._what} {share:.0%}, {left:.0f} s left  {note}".rstrip(), file=sys.stderr, flush=True
            )
