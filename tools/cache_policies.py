"""The eviction policies that S3-FIFO was measured against; the runtime has no use for them."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from edge_runtime.core.caching.s3fifo import Entry


class Lru:
    """The least recently used goes first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self.evictions = 0
        self._entries: OrderedDict[bytes, Entry[Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Entry[Any] | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, entry: Entry[Any]) -> None:
        old = self._entries.pop(entry.key, None)
        if old is not None:
            self.size_bytes -= old.size_bytes
        if entry.size_bytes > self.max_bytes:
            return
        while self.size_bytes + entry.size_bytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.size_bytes -= evicted.size_bytes
            self.evictions += 1
        self._entries[entry.key] = entry
        self.size_bytes += entry.size_bytes

    def retain(self, keeps: Callable[[Entry[Any]], bool]) -> None:
        self._entries = OrderedDict((key, entry) for key, entry in self._entries.items() if keeps(entry))
        self.size_bytes = sum(entry.size_bytes for entry in self._entries.values())


class Sketch:
    """How often a key was asked for lately: four rows of counters up to 15, halved every `10 * keys` uses."""

    def __init__(self, keys: int) -> None:
        width = 1 << max(6, (keys - 1).bit_length() + 1)
        self._mask = width - 1
        self._rows = [bytearray(width) for _ in range(4)]
        self._added = 0
        self._sample = 10 * keys

    def add(self, key: bytes) -> None:
        mask = self._mask
        word = int.from_bytes(key, "little")
        grew = False
        for i, row in enumerate(self._rows):
            at = (word >> (32 * i)) & mask
            if row[at] < 15:
                row[at] += 1
                grew = True
        if grew:
            self._added += 1
            if self._added >= self._sample:
                self._rows = [bytearray(count >> 1 for count in row) for row in self._rows]
                self._added //= 2

    def count(self, key: bytes) -> int:
        word = int.from_bytes(key, "little")
        return min(row[(word >> (32 * i)) & self._mask] for i, row in enumerate(self._rows))


class WTinyLfu:
    """W-TinyLFU (Einziger, Friedman, Manes, 2017): a small LRU window, then only what is asked for more often than
    what would go for it; the rest is a segmented LRU of which 80 % are protected.

    Sizes differ: a candidate must be asked for at least as often as all its victims together (Einziger et al.,
    "Lightweight robust size aware cache management", 2021).
    """

    def __init__(self, max_bytes: int, mean_bytes: int = 1000) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self.evictions = 0
        self._window_limit = max_bytes // 100
        self._main_limit = max_bytes - self._window_limit
        self._protected_limit = self._main_limit * 8 // 10
        self._window: OrderedDict[bytes, Entry[Any]] = OrderedDict()
        self._probation: OrderedDict[bytes, Entry[Any]] = OrderedDict()
        self._protected: OrderedDict[bytes, Entry[Any]] = OrderedDict()
        self._window_bytes = self._protected_bytes = 0
        self._sketch = Sketch(max(16, max_bytes // mean_bytes))

    def __len__(self) -> int:
        return len(self._window) + len(self._probation) + len(self._protected)

    def get(self, key: bytes) -> Entry[Any] | None:
        self._sketch.add(key)
        entry = self._protected.get(key)
        if entry is not None:
            self._protected.move_to_end(key)
            return entry
        entry = self._window.get(key)
        if entry is not None:
            self._window.move_to_end(key)
            return entry
        entry = self._probation.pop(key, None)
        if entry is not None:
            self._protected[key] = entry
            self._protected_bytes += entry.size_bytes
            while self._protected_bytes > self._protected_limit:
                demoted_key, demoted = self._protected.popitem(last=False)
                self._protected_bytes -= demoted.size_bytes
                self._probation[demoted_key] = demoted
        return entry

    def put(self, entry: Entry[Any]) -> None:
        self._drop(entry.key)
        if entry.size_bytes > self.max_bytes:
            return
        self._window[entry.key] = entry
        self._window_bytes += entry.size_bytes
        self.size_bytes += entry.size_bytes
        while self._window_bytes > self._window_limit:
            _, candidate = self._window.popitem(last=False)
            self._window_bytes -= candidate.size_bytes
            self.size_bytes -= candidate.size_bytes
            self._admit(candidate)

    def _admit(self, candidate: Entry[Any]) -> None:
        if candidate.size_bytes > self._main_limit:
            self.evictions += 1
            return
        missing = self.size_bytes - self._window_bytes + candidate.size_bytes - self._main_limit
        victims: list[Entry[Any]] = []
        worth = 0
        if missing > 0:
            wanted = self._sketch.count(candidate.key)
            for queue in (self._probation, self._protected):
                for victim in queue.values():
                    if missing <= 0:
                        break
                    victims.append(victim)
                    missing -= victim.size_bytes
                    worth += self._sketch.count(victim.key)
            if worth > wanted:
                self.evictions += 1
                for victim in victims:  # they were looked at: others are next time
                    if victim.key in self._probation:
                        self._probation.move_to_end(victim.key)
                return
        for victim in victims:
            self._drop(victim.key)
            self.evictions += 1
        self._probation[candidate.key] = candidate
        self.size_bytes += candidate.size_bytes

    def _drop(self, key: bytes) -> None:
        for queue in (self._window, self._probation, self._protected):
            entry = queue.pop(key, None)
            if entry is not None:
                self.size_bytes -= entry.size_bytes
                if queue is self._window:
                    self._window_bytes -= entry.size_bytes
                elif queue is self._protected:
                    self._protected_bytes -= entry.size_bytes

    def retain(self, keeps: Callable[[Entry[Any]], bool]) -> None:
        for queue in (self._window, self._probation, self._protected):
            for key in [key for key, entry in queue.items() if not keeps(entry)]:
                self._drop(key)
