"""The learned window: how long an idle engine should wait for company before it takes a lone request.

With t(b) = a + c*b, waiting d for k further arrivals changes the sum of latencies by d - k*(a - c - d): each that
comes in time is spared the rest of a batch it would otherwise wait for. Every arrival that finds the
engine idle opens a probe that counts who comes within each candidate d, whether or not the engine waited; so
nothing is tried on callers, and the same arrivals always teach the same. The window is 0 until the gain is
certain: its mean must exceed twice its standard error.
"""

#: Candidate windows as shares of a: beyond a half, waiting costs more than a batch of one.
_SHARES = (0.03, 0.06, 0.125, 0.25, 0.5)
_WEIGHT = 0.02  # of one probe, once fifty are in
_LEAST_PROBES = 16
_CERTAINTY = 2.0
_DRIFT = 0.25  # a and c change by this share before what was counted for other windows is forgotten


class Linger:
    """Passive probes of one lane and the window they justify. Times in nanoseconds."""

    __slots__ = ("_began", "_counts", "_gains", "_learned", "_probes", "_squares", "_windows", "full_at")

    def __init__(self) -> None:
        self._learned = (0.0, 0.0)
        #: A batch of so many is never held: waiting costs each of them more than one newcomer gains.
        self.full_at = 1
        self._windows: list[float] = []
        self._forget()

    def _forget(self) -> None:
        self._began: int | None = None
        self._counts = [0] * len(self._windows)
        self._gains = [0.0] * len(self._windows)
        self._squares = [0.0] * len(self._windows)
        self._probes = 0

    def set_costs(self, fixed: float, marginal: float) -> None:
        """Say what batches cost now (a, c); what was learned is kept while they change little."""
        old_a, old_c = self._learned
        self.full_at = max(1, int(fixed / marginal)) if marginal > 0 else 1 << 30
        if abs(fixed - old_a) <= _DRIFT * old_a and abs(marginal - old_c) <= _DRIFT * max(old_c, fixed / 64):
            return
        self._learned = (fixed, marginal)
        self._windows = [share * fixed for share in _SHARES if share * fixed < fixed - marginal]
        self._forget()

    def arrived(self, now_ns: int, *, opens: bool) -> None:
        """Count an arrival; `opens` says that it found the engine idle and nobody waiting."""
        began = self._began
        if began is not None:
            passed = now_ns - began
            windows = self._windows
            if passed <= windows[-1]:
                for i in range(len(windows) - 1, -1, -1):
                    if passed > windows[i]:
                        break
                    self._counts[i] += 1
                return
            self._close()
        if opens and self._windows:
            self._began = now_ns

    def window_ns(self) -> int:
        """How long to wait for company; 0: not at all."""
        if self._probes < _LEAST_PROBES:
            return 0
        weight = max(1 / self._probes, _WEIGHT)
        best, window = 0.0, 0.0
        for gain, square, candidate in zip(self._gains, self._squares, self._windows, strict=True):
            variance = max(square - gain * gain, 0.0)
            certain = gain - _CERTAINTY * (variance * weight / (2 - weight)) ** 0.5
            if certain > best:
                best, window = certain, candidate
        return int(window)

    def _close(self) -> None:
        fixed, marginal = self._learned
        self._probes += 1
        weight = max(1 / self._probes, _WEIGHT)
        for i, (window, count) in enumerate(zip(self._windows, self._counts, strict=True)):
            gain = count * (fixed - marginal - window) - window
            self._gains[i] += weight * (gain - self._gains[i])
            self._squares[i] += weight * (gain * gain - self._squares[i])
            self._counts[i] = 0
        self._began = None
