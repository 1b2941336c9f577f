"""Virtual time of start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): in it, flows take turns.

Each flow has a virtual time: the engine time that it has used. The flow with the smallest one is next. Engine time is
shared as by deficit round robin, but without a quantum, and a flow that has nothing left after each turn and comes back
(a caller with one request at a time) gains nothing by doing so.
"""

from collections import OrderedDict
from collections.abc import Hashable

#: Absent flows whose virtual time is kept. Beyond that the one that left first is forgotten.
_REMEMBERED = 1024


class VirtualTime:
    """The clock of flows that share something, and the virtual times of absent flows. Nanoseconds of engine time.

    `credit_ns` is the largest lag behind the others that a returning flow keeps (start-time fair queueing would reset
    the lag to 0). A quiet flow may so send a short burst ahead of a flood instead of in turns with it. `clock_ns` is the
    virtual time of the last turn.
    """

    __slots__ = ("_absent", "clock_ns", "credit_ns")

    def __init__(self, credit_ns: float = 0.0) -> None:
        self.clock_ns = 0.0
        self.credit_ns = credit_ns
        self._absent: OrderedDict[Hashable, float] = OrderedDict()

    def enter(self, key: Hashable) -> float:
        """The virtual time at which a flow starts, or comes back."""
        kept_ns, start_ns = self._absent.pop(key, 0.0), self.clock_ns - self.credit_ns
        return max(start_ns, kept_ns)

    def leave(self, key: Hashable, virtual_ns: float) -> None:
        """Keep the virtual time of a flow with nothing waiting, unless it is behind all others anyway."""
        if virtual_ns > self.clock_ns - self.credit_ns:
            absent = self._absent
            absent[key] = virtual_ns
            if len(absent) > _REMEMBERED:
                absent.popitem(last=False)

    def charge_absent(self, key: Hashable, virtual_ns: float, ns: float) -> None:
        """Add engine time to a flow that has left; `virtual_ns` is where it was when it did."""
        self.leave(key, self._absent.get(key, virtual_ns) + ns)
