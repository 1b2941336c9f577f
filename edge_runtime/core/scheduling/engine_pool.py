"""The engines of one scheduler: who has room, who is free when, and how fast each runs just now."""

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
    """Interchangeable engines, each with room for `depth` batches: one runs, the others are at hand.

    `free` counts the room of those that are up. `busy_until_ns` is when room is predicted, 0 while there is some;
    `speed` the best factor; `up` how many are up, and 1 where none is: what waits then waits for the first to come
    back. All four are kept at hand since every admission reads them.
    """

    __slots__ = ("_engines", "busy_until_ns", "free", "speed", "up")

    def __init__(self, depths: Sequence[int]) -> None:
        self._engines = [_Engine(depth) for depth in depths]
        self._refresh()

    def speed_of(self, engine: int) -> float:
        """How much longer than usual batches take on one engine just now."""
        return self._engines[engine].speed.factor

    def free_from(self, now_ns: int) -> float:
        """When there is room, as far as can be told."""
        return self.busy_until_ns if self.busy_until_ns > now_ns else now_ns

    def choose(self) -> int:
        """An engine with room: the least busy, of those the fastest."""
        engines = self._engines
        if len(engines) == 1:
            return 0
        room = [i for i, engine in enumerate(engines) if engine.is_up and engine.running < engine.depth]
        return min(room, key=lambda i: (engines[i].running, engines[i].speed.factor))

    def start(self, engine: int, now_ns: int, predicted_ns: float) -> None:
        """Note a batch that goes to an engine with room."""
        chosen = self._engines[engine]
        chosen.running += 1
        chosen.free_at_ns = max(chosen.free_at_ns, now_ns) + predicted_ns
        self._refresh()

    def end(self, engine: int, ratio: float | None = None) -> None:
        """Note that one of its batches ended; `ratio` is what it took against what was expected at speed 1."""
        chosen = self._engines[engine]
        chosen.running -= 1
        if ratio is not None:
            chosen.speed.observe(ratio * chosen.speed.factor)
        if not chosen.running:
            chosen.free_at_ns = 0.0
        self._refresh()

    def set_up(self, engine: int, *, is_up: bool) -> None:
        """Take an engine out of service, or back in with a speed to be learned afresh."""
        chosen = self._engines[engine]
        if is_up and not chosen.is_up:
            chosen.speed = Speed()
        chosen.is_up = is_up
        self._refresh()

    def _refresh(self) -> None:
        engines = self._engines
        if len(engines) == 1:  # nearly every edge device; this is on the way of every batch
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
