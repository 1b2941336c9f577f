"""Which tenant a request belongs to, where the operator lets callers have one of their own.

Two ways, both off by default: a header that names one of the configured tenants (for a proxy that knows its users),
and on the Unix socket the user id that the kernel states of the peer, which the peer cannot choose. Without either,
all callers are the tenant "local".
"""

from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.config import ServerSettings
from edge_runtime.server.events import Refusal

LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Tenancy:
    """The operator's rule. `header` is a header's name in lower case, empty for none."""

    header: str = ""
    names: frozenset[str] = frozenset()
    by_user: bool = False

    @property
    def is_off(self) -> bool:
        """Whether all callers are the tenant "local"."""
        return not self.header and not self.by_user

    def tenant_of(self, headers: Mapping[str, str], user: int | None) -> str | Refusal:
        """The tenant of a request; `user` is the peer's user id on a Unix socket, else None."""
        if self.by_user and user is not None:
            return f"user-{user}"
        name = headers.get(self.header) if self.header else None
        if name is None:
            return LOCAL
        if name not in self.names:
            return Refusal(403, f"Header {self.header} names no tenant of [server] tenants.", "tenant")
        return name


def tenancy_of(settings: ServerSettings) -> Tenancy:
    """The rule that an operator has set."""
    return Tenancy(settings.tenant_header.lower(), frozenset(settings.tenants), settings.tenant_by_user)
