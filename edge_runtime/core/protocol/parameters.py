"""Request parameters that say how a request is served; both tiers and both transports read them here."""

from collections.abc import Mapping

from edge_runtime.core.errors import InvalidRequest
from edge_runtime.core.messages import Scalar
from edge_runtime.core.scheduling.scheduler import NORMAL

#: The values of the parameter `priority`. The numbers are those of Triton, where 0 stands for the default.
_PRIORITIES = {"high": 0, "normal": NORMAL, "low": 2, 1: 0, 2: NORMAL, 3: 2, 0: NORMAL}
_DAY_NS = 86_400 * 1_000_000_000


def priority_of(word: object) -> int:
    """The scheduler's priority (0 is served first) for the parameter `priority`; None: NORMAL. Raises InvalidRequest."""
    if word is None:
        return NORMAL
    if isinstance(word, str | int) and not isinstance(word, bool) and word in _PRIORITIES:
        return _PRIORITIES[word]
    raise InvalidRequest('Parameter priority must be "high", "normal" or "low", or a number from 0 to 3.')


def time_limit_ns(parameters: Mapping[str, Scalar], *, expiry_s: int | None = None) -> int | None:
    """How long the caller waits from the arrival of the request on, in nanoseconds; None: it does not say.

    There are two spellings: `timeout` in whole microseconds, as Triton reads it, where 0 stands for no limit of the
    caller's own; and `deadline_ms` in milliseconds. At most a day counts. `expiry_s` is what is left of the expiry of an
    MQTT message: in whole seconds, but less the time that the message spent in the broker. The shortest limit holds.

    A `deadline_ms` of 0 or less is a limit that has passed: the result is then 0. Raises InvalidRequest.
    """
    limits = (
        _timeout_ns(parameters.get("timeout")),
        _deadline_ns(parameters.get("deadline_ms")),
        expiry_s * 1_000_000_000 if expiry_s else None,
    )
    return min((limit for limit in limits if limit is not None), default=None)


def _timeout_ns(timeout: Scalar | None) -> int | None:
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
        raise InvalidRequest("Parameter timeout must be a whole number of microseconds, 0 or more.")
    return min(timeout * 1000, _DAY_NS) or None


def _deadline_ns(deadline_ms: Scalar | None) -> int | None:
    if deadline_ms is None:
        return None
    # A NaN compares false with everything, so it fails the last condition too.
    if isinstance(deadline_ms, bool | str) or not (deadline_ms <= 0 or deadline_ms > 0):
        raise InvalidRequest("Parameter deadline_ms must be a number of milliseconds.")
    return int(min(max(deadline_ms, 0), _DAY_NS / 1e6) * 1e6)
