"""Supervision of a model's engines: who runs what, what hangs, and which engine is loaded in place of a hung one.

Ownership: a slot holds one engine and, unless it runs inline, the thread that alone calls it. A batch belongs to
its slot from `start` until exactly one of these: the batch ends (`_end`), or its engine is replaced (`_replace`).
"Hung" is a state in between: the callers of a hung batch were answered, but its engine still has the batch.

Interleavings that the code guards against:
- A hung batch returns while another engine is loaded. The old engine is then kept, and the new one is closed
  (`_replace` looks at `hung` again after each await).
- A hung batch returns after its engine was replaced. Its slot no longer knows it, so `_end` ignores it.
- The runner closes while another engine is loaded. `close` cancels that task; the thread that loads goes on, and
  the engine it returns is closed by `_close_when_loaded`.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edge_runtime.core.scheduling.scheduler import Dispatch
from edge_runtime.engines import Engine, StepEngine
from edge_runtime.serving.engine_thread import EngineThread

_log = logging.getLogger(__name__)

_RESTART_S = 1.0  # before the second try to load another engine, and twice as long before each further one
_RESTARTS = 8  # tries to load an engine in place of a hung one, in some four minutes

AnyEngine = Engine | StepEngine
#: Runs a batch on an engine; called in the engine's thread, or inline.
Work = Callable[[Any], Any]


class Owner(Protocol):
    """Who is told what came of batches and engines; the model runner."""

    def batch_finished(self, batch: Dispatch, result: Any) -> None:
        """The batch returned `result`; its engine is free."""

    def batch_failed(self, batch: Dispatch, error: BaseException, how: str) -> None:
        """The batch has no answers ("raised", "hung"); its engine may still be busy with it."""

    def batch_left(self, batch: Dispatch, result: Any = None) -> None:
        """A batch that failed has left its engine; `result` is what a hung one returned after all."""

    def engine_down(self, engine: int) -> None:
        """The engine must be handed nothing."""

    def engine_up(self, engine: int, *, is_new: bool) -> None:
        """The engine may be handed batches again; `is_new`: another engine took the place of the hung one."""

    def flush(self) -> None:
        """Look for what may be started now."""


@dataclass(slots=True)
class _Slot:
    """An engine, its thread (None: it runs inline), and the batches it has with their watchdogs."""

    engine: AnyEngine
    thread: EngineThread | None
    running: dict[int, tuple[Dispatch, asyncio.TimerHandle]] = field(default_factory=dict)
    hung: set[int] = field(default_factory=set)  # subset of `running` whose callers already got EngineFailed


class Supervisor:
    """The engines of one model runner. Created inside the running loop; ended by `close`."""

    def __init__(
        self,
        name: str,
        engines: Sequence[AnyEngine],
        owner: Owner,
        *,
        is_inline: bool,
        hang_limit_s: float,
        load_engine: Callable[[], AnyEngine] | None,
    ) -> None:
        """`load_engine` loads another engine in place of a hung one; it is called in a thread."""
        self._name, self._owner = name, owner
        self._slots = [
            _Slot(engine, None if is_inline else EngineThread(f"engine-{name}-{i}"))
            for i, engine in enumerate(engines)
        ]
        self._loop = asyncio.get_running_loop()
        self.hang_limit_s = hang_limit_s
        self._load_engine = load_engine
        self._restarts: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def is_inline(self) -> bool:
        """Whether batches run on the event loop itself."""
        return self._slots[0].thread is None

    def engine(self, index: int) -> AnyEngine:
        """The engine in a slot now."""
        return self._slots[index].engine

    def start(self, batch: Dispatch, work: Work) -> None:
        """Run `work` with the engine of the batch; the owner learns what came of it."""
        slot = self._slots[batch.engine]
        engine = slot.engine
        if slot.thread is None:
            try:
                result = work(engine)
            except Exception as error:  # noqa: BLE001 - whatever a model raises ends its own batch only
                self._owner.batch_failed(batch, error, "raised")
                self._owner.batch_left(batch)
            else:
                self._owner.batch_finished(batch, result)
            return

        def end_soon(result: Any, error: BaseException | None) -> None:  # called in the engine's thread
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._end, slot, batch, result, error)

        # Batches that were handed to the engine before this one have their own time first.
        limit_s = self.hang_limit_s * (1 + len(slot.running))
        slot.running[batch.batch_id] = (batch, self._loop.call_later(limit_s, self._hang, slot, batch))
        slot.thread.submit(lambda: work(engine), end_soon)

    def call(self, index: int, engine: AnyEngine, work: Callable[[], None]) -> None:
        """Run `work` where the batches of `engine` run, after those it has; nothing if that engine was replaced."""
        slot = self._slots[index]
        if slot.engine is not engine:
            return
        if slot.thread is None:
            work()
        else:
            slot.thread.submit(work)

    async def close(self) -> None:
        """Free each engine once it is not running; do not wait for one that hangs. Idempotent.

        Everything is set going before the first await: a caller that is cancelled there leaves nothing open.
        """
        if self._is_closed:
            return
        self._is_closed = True
        closing = []
        for slot in self._slots:
            for _, watchdog in slot.running.values():
                watchdog.cancel()
            if slot.thread is None:
                slot.engine.close()
                continue
            if not slot.running:
                closing.append(self._closed_in_its_thread(slot.thread, slot.engine))
            else:  # after the batches it has; an engine that hangs is left to the end of the process
                slot.thread.submit(slot.engine.close)
            slot.thread.stop()
        for restart in self._restarts:
            restart.cancel()
        await asyncio.gather(*closing, *self._restarts, return_exceptions=True)

    def _closed_in_its_thread(self, thread: EngineThread, engine: AnyEngine) -> "asyncio.Future[None]":
        """Close an idle engine after the calls that wait in its thread; the future is set when that is done."""
        closed: asyncio.Future[None] = self._loop.create_future()

        def set_closed() -> None:
            if not closed.done():
                closed.set_result(None)

        def report(_result: Any, _error: BaseException | None) -> None:  # called in the engine's thread
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(set_closed)

        thread.submit(engine.close, report)
        return closed

    def _end(self, slot: _Slot, batch: Dispatch, result: Any, error: BaseException | None) -> None:
        running = slot.running.pop(batch.batch_id, None)
        if running is None:
            return  # its engine was replaced, and the batch was reported then
        running[1].cancel()
        if batch.batch_id in slot.hung:  # it returned before its engine was replaced
            slot.hung.remove(batch.batch_id)
            self._owner.batch_left(batch, result)
            if not slot.hung:
                self._owner.engine_up(batch.engine, is_new=False)
        elif error is not None:
            self._owner.batch_failed(batch, error, "raised")
            self._owner.batch_left(batch)
        else:
            self._owner.batch_finished(batch, result)
        self._owner.flush()

    def _hang(self, slot: _Slot, batch: Dispatch) -> None:
        """Answer the callers of a batch that takes too long; its engine is handed nothing until it is replaced."""
        self._owner.batch_failed(batch, TimeoutError(f"no answer within {self.hang_limit_s:g} s"), "hung")
        slot.hung.add(batch.batch_id)
        self._owner.engine_down(batch.engine)
        if self._load_engine is not None and not self._is_closed and len(slot.hung) == 1:
            restart = self._loop.create_task(
                self._replace(slot, batch.engine, self._load_engine), name=f"engine-restart-{self._name}"
            )
            self._restarts.add(restart)
            restart.add_done_callback(self._restarts.discard)

    async def _replace(self, slot: _Slot, index: int, load_engine: Callable[[], AnyEngine]) -> None:
        engine = await self._load(slot, load_engine)
        if engine is None:
            return
        if not slot.hung:  # the old engine returned while this one was loaded
            engine.close()
            return
        _log.warning("model=%s event=engine_replaced", self._name)
        self._slots[index] = _Slot(engine, EngineThread(f"engine-{self._name}-{index}"))
        if slot.thread is not None:
            slot.thread.submit(slot.engine.close)
            slot.thread.stop()
        for batch, watchdog in slot.running.values():
            watchdog.cancel()
            if batch.batch_id not in slot.hung:
                self._owner.batch_failed(batch, TimeoutError("its engine hung"), "hung")
            self._owner.batch_left(batch)
        slot.running.clear()
        self._owner.engine_up(index, is_new=True)
        self._owner.flush()

    async def _load(self, slot: _Slot, load_engine: Callable[[], AnyEngine]) -> AnyEngine | None:
        """Load another engine; None where the old one returned, or nothing could be loaded."""
        for attempt in range(_RESTARTS):
            loading = asyncio.ensure_future(asyncio.to_thread(load_engine))
            try:
                return await asyncio.shield(loading)
            except asyncio.CancelledError:
                loading.add_done_callback(
                    _close_when_loaded
                )  # the thread goes on and nobody takes its engine
                raise
            except Exception as error:  # noqa: BLE001 - the old engine serves again, should it ever return
                _log.error("model=%s event=engine_restart_failed error=%r", self._name, error)
            await asyncio.sleep(_RESTART_S * 2**attempt)
            if not slot.hung:
                return None
        return None


def _close_when_loaded(loading: "asyncio.Future[AnyEngine]") -> None:
    if not loading.cancelled() and loading.exception() is None:
        loading.result().close()
