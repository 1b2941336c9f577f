"""Request parameters that say how a request is served; both tiers read them here."""

from edge_runtime.core.errors import InvalidRequest
from edge_runtime.core.scheduling.scheduler import NORMAL

#: The values of the parameter `priority`. The numbers are those of Triton, where 0 stands for the default.
_PRIORITIES = {"high": 0, "normal": NORMAL, "low": 2, 1: 0, 2: NORMAL, 3: 2, 0: NORMAL}


def priority_of(word: object) -> int:
    """The scheduler's priority (0 is served first) for the parameter `priority`; None: NORMAL. Raises InvalidRequest."""
    if word is None:
        return NORMAL
    if isinstance(word, str | int) and not isinstance(word, bool) and word in _PRIORITIES:
        return _PRIORITIES[word]
    raise InvalidRequest('Parameter priority must be "high", "normal" or "low", or a number from 0 to 3.')
