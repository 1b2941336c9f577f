"""The earlier answers of one row, from both levels of the cache, for the cascade."""

from edge_runtime.caching.two_level import DiskHit, TwoLevelCache
from edge_runtime.core.outcome import Outcome
from edge_runtime.serving.cascade import is_from_cloud


class Earlier:
    """See `cascade.EarlierAnswers`. The disk is asked once."""

    __slots__ = ("_cache", "_digest", "_hit", "_is_asked", "_key")

    def __init__(self, cache: TwoLevelCache, key: bytes, digest: str) -> None:
        self._cache, self._key, self._digest = cache, key, digest
        self._hit: DiskHit | None = None
        self._is_asked = False

    async def find(self) -> Outcome | None:
        """See `EarlierAnswers.find`. A more urgent request may have asked the cloud since this row was looked up."""
        now = self._cache.peek(self._key)  # this request was counted when the row was looked up
        if now is not None and is_from_cloud(now):
            return now
        if not self._is_asked:
            self._is_asked = True
            self._hit = await self._cache.read_disk(self._key, self._digest)
        return self._hit.outcome if self._hit is not None and self._hit.is_fresh else None

    def stale(self) -> Outcome | None:
        """See `EarlierAnswers.stale`."""
        return self._cache.stale_answer(self._key, self._hit)
