"""The anti-rollback rule: which version of a signed bundle may run, given the newest version that ran before.

A version floor never sinks, and one version never has two contents. Two formats of one version differ in content by
nature, so the content is remembered per engine; the version counts for all engines together, since otherwise an old
bundle of the other format would be a way back. A floor holds per name and signing key: with a new key it starts over,
so that a leaked key with which somebody signed version 10^17 cannot lock a device out for ever (The Update
Framework resets its counters in the same way).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.core.errors import BundleError

#: The engine whose entries bear the plain name of the bundle: older files were written when it was the only one.
_FIRST_ENGINE = "onnx"


@dataclass(frozen=True, slots=True)
class VersionFloor:
    """The newest version of a bundle that ran here. `key` (of the signer) and `digest` (of the manifest) are hex."""

    key: str
    version: int
    digest: str


def raise_floor(
    floors: Mapping[str, VersionFloor], name: str, engine: str, candidate: VersionFloor
) -> dict[str, VersionFloor]:
    """Return the floors once `candidate` runs on `engine`. Raises BundleError if it is below its floor.

    Entries are named by the bundle, those of other engines than "onnx" by `name@engine`; names contain no "@".
    """
    entry = name if engine == _FIRST_ENGINE else f"{name}@{engine}"
    for key, floor in floors.items():
        if key.partition("@")[0] != name or floor.key != candidate.key:
            continue
        if candidate.version < floor.version:
            raise BundleError(
                f"bundle {name!r} is version {candidate.version}, and version {floor.version} has run here; "
                "install the newer one, or sign this content with a higher version"
            )
        if key == entry and candidate.version == floor.version and candidate.digest != floor.digest:
            raise BundleError(
                f"bundle {name!r} is another version {candidate.version} than the one that has run here; "
                "give changed content a higher version and sign it again"
            )
    return {**floors, entry: candidate}
