"""The learned window: how long an idle engine waits for further requests before it takes a single one.

Let batches take t(b) = a + c*b, and let `came` requests arrive while one request runs alone. Had the first request
waited d, during which k of them arrive, the sum of all latencies would be smaller by

    k*(a - c - d) - d + (came - k)*(c*k - d)

The k early arrivals skip the rest of that run, the first request pays d, and the later arrivals start d later but no
longer share their batch with the k. Each arrival that finds the engine idle opens a probe, which counts the arrivals
that follow, whether or not the engine waited. The gain is therefore estimated from observation alone, without
exploration, and is deterministic. The window stays 0 until a gain is statistically certain.
"""

from bisect import bisect_right

#: Candidate windows as fractions of a. Beyond a half, the wait costs more than it can gain. Steps of 1.5, because 150 us
#: gain a third more than 200 us where bursts of eight last 200 us (`python -m tools.simulate_batching`).
_SHARES = (0.02, 0.03, 0.045, 0.0675, 0.1, 0.15, 0.225, 0.34, 0.5)
_WEIGHT = 0.02  # of one probe, from the fiftieth on
_LEAST_PROBES = 16
#: The mean gain must exceed 0 by this many standard errors.
_CERTAINTY = 2.0
_DRIFT = 0.25  # a change of a or c by more than this share resets the estimates
_MOST_COUNTED = 64  # arrivals counted per probe


class Linger:
    """Passive probes of one lane and the window that they justify. Times in nanoseconds.

    `window_ns` is how long to wait; 0: not at all. `began_ns` is when the open probe began; None: no probe is open.
    """

    __slots__ = (
        "_came",
        "_gains",
        "_learned",
        "_least_ns",
        "_lonely",
        "_probes",
        "_squares",
        "_windows",
        "began_ns",
        "window_ns",
    )

    def __init__(self, least_ns: int = 0) -> None:
        """`least_ns`: the shortest window that may be learned, which is the resolution of the owner's timer."""
        self._least_ns = least_ns
        self._learned = (0.0, 0.0)
        self._windows: list[float] = []
        self._forget()

    def _forget(self) -> None:
        self.window_ns = 0
        self.began_ns: int | None = None
        self._came: list[int] = []  # arrivals of the open probe, in nanoseconds after it began
        self._gains = [0.0] * len(self._windows)
        self._squares = [0.0] * len(self._windows)
        self._probes = 0
        self._lonely = 0  # probes without any arrival that are not yet in the estimates

    def set_costs(self, fixed: float, marginal: float) -> None:
        """Set a (fixed) and c (marginal). The estimates survive a small change and are reset by a large one."""
        old_a, old_c = self._learned
        if abs(fixed - old_a) <= _DRIFT * old_a and abs(marginal - old_c) <= _DRIFT * max(old_c, fixed / 64):
            return
        self._learned = (fixed, marginal)
        windows = [share * fixed for share in _SHARES if share * fixed < fixed - marginal]
        self._windows = [window for window in windows if window >= self._least_ns]
        self._forget()

    def arrived(self, now_ns: int, *, opens: bool) -> None:
        """Record an arrival. `opens`: it found the engine idle and nothing waiting, so it opens a probe."""
        if self.began_ns is not None:
            passed = now_ns - self.began_ns
            if passed <= sum(self._learned):
                if len(self._came) < _MOST_COUNTED:
                    self._came.append(passed)
                return
            self._close()
        if opens and self._windows:
            self.began_ns = now_ns

    def forget_time(self, start_ns: int, gap_ns: int) -> None:
        """Record that no arrival could be seen for `gap_ns` from `start_ns` on."""
        if self.began_ns is not None and self.began_ns <= start_ns:
            self.began_ns += gap_ns

    def _close(self) -> None:
        fixed, marginal = self._learned
        came, self._came, self.began_ns = self._came, [], None
        if not came and not self.window_ns and self._probes >= 1 / _WEIGHT:
            self._lonely += 1  # the usual case on a quiet device; it can only speak against a window
            return
        self._catch_up()
        self._probes += 1
        weight = max(1 / self._probes, _WEIGHT)
        doubt = _CERTAINTY**2 * weight / (2 - weight)
        best, self.window_ns = 0.0, 0
        for i, window in enumerate(self._windows):
            early = bisect_right(came, window)
            gain = early * (fixed - marginal - window) - window
            gain += (len(came) - early) * (marginal * early - window)
            self._gains[i] += weight * (gain - self._gains[i])
            self._squares[i] += weight * (gain * gain - self._squares[i])
            mean = self._gains[i]
            if mean > best and self._probes >= _LEAST_PROBES:
                certain = mean - (doubt * max(self._squares[i] - mean * mean, 0.0)) ** 0.5
                if certain > best:
                    best, self.window_ns = certain, int(window)

    def _catch_up(self) -> None:
        """Add the probes without any arrival to the estimates; each of them lost its whole window."""
        if self._lonely:
            kept = (1 - _WEIGHT) ** self._lonely
            for i, window in enumerate(self._windows):
                self._gains[i] = kept * self._gains[i] - (1 - kept) * window
                self._squares[i] = kept * self._squares[i] + (1 - kept) * window * window
            self._probes += self._lonely
            self._lonely = 0
