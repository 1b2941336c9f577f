"""Which version of a signed bundle may run, given what ran before: never back, never two contents of one version.

The ratchet is kept per name and signing key: with a new key it begins anew, so that whoever held a leaked key
and signed version 10^17 cannot lock a device out for ever (The Update Framework resets its counters likewise).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.core.errors import BundleError


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest version of a bundle that ran here. `key` and `digest` are hex."""

    key: str
    version: int
    digest: str


def admit(seen: Mapping[str, Seen], name: str, found: Seen) -> dict[str, Seen]:
    """What is remembered once `found` runs. Raises BundleError where it must not."""
    last = seen.get(name)
    if last is not None and last.key == found.key:
        if found.version < last.version:
            raise BundleError(
                f"bundle {name!r} is version {found.version}, and version {last.version} has run here; "
                "install the newer one, or sign this content with a higher version"
            )
        if found.version == last.version and found.digest != last.digest:
            raise BundleError(
                f"bundle {name!r} is another version {found.version} than the one that has run here; "
                "give changed content a higher version and sign it anew"
            )
    return {**seen, name: found}
