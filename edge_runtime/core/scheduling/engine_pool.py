"""The engines of one scheduler: which have room, when the next has room, and how fast each runs at present."""

from collections.abc import Sequence

from edge_runtime.core.scheduling.batch_costs import Speed


class _Engine:
    __slots__ = ("depth", "free_at_ns", "is_up", "running", "speed")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.speed = Speed()
        self.running = 0
        self.free_at_ns = 0.0  # predicted end of what it runs
        self.is_up = True


class EnginePool:
    """Interchangeable engines, each with room for `depth` batches: one runs, the others wait in its own queue.

    - `free`: for how many batches the engines in service have room.
    - `busy_until_ns`: when an engine is predicted to have room; 0 while one has.
    - `speed`: the best (smallest) speed factor of the engines in service.
    - `up`: engines in service, at least 1 (predictions divide by it).

    All four are cached, because every admission reads them.
    """

    __slots__ = ("_engines", "busy_until_ns", "free", "speed", "up")

    def __init__(self, depths: Sequence[int]) -> None:
        self._engines = [_Engine(depth) for depth in depths]
        self._refresh()

    def speed_of(self, engine: int) -> float:
        """How many times as long as learned a batch takes on one engine at present; 1.0 is as learned."""
        return self._engines[engine].speed.factor

    def free_from(self, now_ns: int) -> float:
        """When an engine is predicted to have room; `now_ns` if one has, or if nothing can be predicted."""
        return self.busy_until_ns if self.busy_until_ns > now_ns else now_ns

    def choose(self) -> int:
        """The index of an engine with room: the one with the fewest batches, of equal ones the fastest."""
        engines = self._engines
        if len(engines) == 1:
            return 0
        room = [i for i, engine in enumerate(engines) if engine.is_up and engine.running < engine.depth]
        return min(room, key=lambda i: (engines[i].running, engines[i].speed.factor))

    def start(self, engine: int, now_ns: int, predicted_ns: float) -> None:
        """Record that a batch goes to an engine, which must have room."""
        chosen = self._engines[engine]
        chosen.running += 1
        chosen.free_at_ns = max(chosen.free_at_ns, now_ns) + predicted_ns
        self._refresh()

    def end(self, engine: int, ratio: float | None = None) -> None:
        """Record that a batch of an engine ended. `ratio`: its duration over the one predicted with the speed factor."""
        chosen = self._engines[engine]
        chosen.running -= 1
        if ratio is not None:
            chosen.speed.observe(ratio * chosen.speed.factor)
        if not chosen.running:
            chosen.free_at_ns = 0.0
        self._refresh()

    def set_up(self, engine: int, *, is_up: bool) -> None:
        """Take an engine out of service, or back into service with the speed factor 1."""
        chosen = self._engines[engine]
        if is_up and not chosen.is_up:
            chosen.speed = Speed()
        chosen.is_up = is_up
        self._refresh()

    def _refresh(self) -> None:
        engines = self._engines
        if len(engines) == 1:  # nearly every edge device; runs twice for every batch
            (one,) = engines
            self.up = 1
            self.free = one.depth - one.running if one.is_up else 0
            self.busy_until_ns = 0.0 if self.free > 0 else one.free_at_ns
            self.speed = one.speed.factor
            return
        up = [engine for engine in engines if engine.is_up]
        self.up = max(len(up), 1)
        self.free = sum(max(engine.depth - engine.running, 0) for engine in up)
        self.busy_until_ns = 0.0 if self.free else min((engine.free_at_ns for engine in up), default=0.0)
        self.speed = min((engine.speed.factor for engine in up), default=1.0)
