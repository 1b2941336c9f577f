"""Which version of a signed bundle may run, given what ran before: never back, never two contents of one version.

Two formats of one version differ in content by nature, so content is remembered per engine; versions are not, lest
an old bundle of the other format be the way back. The ratchet is kept per name and signing key: with a new key it
begins anew, so that whoever held a leaked key and signed version 10^17 cannot lock a device out for ever (The Update
Framework resets its counters likewise).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.core.errors import BundleError

#: Whose entries bear the plain name: records of the time before there was another engine.
_FIRST_ENGINE = "onnx"


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest version of a bundle that ran here. `key` and `digest` are hex."""

    key: str
    version: int
    digest: str


def admit(seen: Mapping[str, Seen], name: str, engine: str, found: Seen) -> dict[str, Seen]:
    """What is remembered once `found` runs on `engine`. Raises BundleError where it must not.

    Entries are named by the bundle, those of other engines than "onnx" by `name@engine`; names hold no "@".
    """
    entry = name if engine == _FIRST_ENGINE else f"{name}@{engine}"
    for key, last in seen.items():
        if key.partition("@")[0] != name or last.key != found.key:
            continue
        if found.version < last.version:
            raise BundleError(
                f"bundle {name!r} is version {found.version}, and version {last.version} has run here; "
                "install the newer one, or sign this content with a higher version"
            )
        if key == entry and found.version == last.version and found.digest != last.digest:
            raise BundleError(
                f"bundle {name!r} is another version {found.version} than the one that has run here; "
                "give changed content a higher version and sign it anew"
            )
    return {**seen, entry: found}
