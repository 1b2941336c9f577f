"""A thread that runs one engine's batches in order, and can be given up on when a call never returns."""

import queue
import threading
from collections.abc import Callable
from typing import Any

#: Called in the thread with the result, or with what was raised.
Done = Callable[[Any, BaseException | None], None]


class EngineThread:
    """A daemon thread, unlike those of `concurrent.futures`: a hung call must not keep the process from ending."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Done] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], Any], done: Done = lambda _result, _error: None) -> None:
        """Run `work` after what was submitted before."""
        self._jobs.put((work, done))

    def stop(self) -> None:
        """End the thread after what was submitted, without waiting."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, done = job
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - whatever a model raises belongs to its batch
                done(None, error)
            else:
                done(result, None)
                del result
            del job, work, done  # an idle thread must not keep the last batch alive
