"""The engine time that each tenant may use."""

from collections.abc import Sequence

_BURST_NS = 1_000_000_000
_REMEMBERED = 64


class EngineQuotas:
    """A leaky bucket per tenant, one second deep, as GCRA: one number each. `share`: engine seconds per second."""

    __slots__ = ("_share", "_spent_until_ns")

    def __init__(self, share: float) -> None:
        self._share = share
        self._spent_until_ns: dict[str, float] = {}

    def ahead_ns(self, now_ns: int, tenant: str) -> int:
        """Nanoseconds until a tenant that has used up its quota may submit again; 0: it may now."""
        ahead_ns = self._spent_until_ns.get(tenant, 0.0) - now_ns - _BURST_NS
        return int(ahead_ns) + 1 if ahead_ns > 0 else 0

    def spend(self, now_ns: int, tenants: Sequence[str], each_ns: float) -> None:
        """Charge `each_ns` of engine time for each element of `tenants`; a tenant may occur several times."""
        spent = self._spent_until_ns
        for tenant in tenants:
            spent[tenant] = max(spent.get(tenant, 0.0), now_ns) + each_ns / self._share
        if len(spent) > _REMEMBERED + 2 * len(tenants):
            self._spent_until_ns = {tenant: until for tenant, until in spent.items() if until > now_ns}
