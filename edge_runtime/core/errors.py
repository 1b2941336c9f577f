"""Every error this project raises on purpose, in one tree.

    EdgeRuntimeError
    ├── InvalidRequest        the caller's request cannot be understood        400
    │   ├── TooLarge          a limit on a length or a count was passed        413
    │   ├── UnknownModel      no model of that name or version                 404
    │   └── Unsupported       understood, but not offered here                 501
    ├── Refused               understood, and not done now; says why           429/503/504
    ├── EngineFailed          the model raised, hung or returned nonsense      500
    ├── CloudError            the cloud tier answered with an error            502
    ├── BundleError           a model bundle is corrupt, foreign or unfit      exit 1
    ├── StorageError          a file of the device's state cannot be used      exit 1
    └── ConfigError           a configuration cannot be used: file, key, fix   exit 2

The numbers at the right are the HTTP status (or exit code) that answers the error; the server and the command line map
them. A message is one sentence: what is wrong, where, and how to fix it. Those of errors with an HTTP
status never contain text of a request, paths of the device or addresses, because callers see them.
"""

from enum import StrEnum


class EdgeRuntimeError(Exception):
    """Root of all errors that this project raises on purpose."""


class InvalidRequest(EdgeRuntimeError):  # noqa: N818 - reads as the fact it states
    """The request cannot be understood. To repeat it unchanged cannot help."""


class TooLarge(InvalidRequest):
    """A length or count in the request exceeds a limit, which the message names."""


class UnknownModel(InvalidRequest):
    """No model of that name or version is loaded."""


class Unsupported(InvalidRequest):
    """The protocol has this feature, but this runtime does not offer it."""


class RefusalKind(StrEnum):
    """Why a valid request is not served now; the word that callers, logs and metrics see."""

    FULL = "full"
    LATE = "late"
    QUOTA = "quota"
    DRAINING = "draining"


class Refused(EdgeRuntimeError):  # noqa: N818
    """A valid request is not served now. `retry_after_s`: when to try again; None where a wait cannot help."""

    def __init__(self, kind: RefusalKind, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s


_REFUSALS = {
    RefusalKind.FULL: "The queue is full; retry later or lower the rate.",
    RefusalKind.LATE: "The deadline leaves no time for the model; allow more time or retry later.",
    RefusalKind.QUOTA: "The quota is used up; retry later.",
    RefusalKind.DRAINING: "The runtime is shutting down; send the request elsewhere.",
}
#: When to retry where the scheduler cannot predict it because nothing was measured yet.
_RETRY_S = {RefusalKind.FULL: 1.0, RefusalKind.QUOTA: 1.0}


def refusal(kind: RefusalKind, retry_after_ns: int | None = None) -> Refused:
    """The error that a caller sees for a refusal of the scheduler."""
    retry_after_s = _RETRY_S.get(kind) if retry_after_ns is None else retry_after_ns / 1e9
    return Refused(kind, _REFUSALS[kind], retry_after_s)


class EngineFailed(EdgeRuntimeError):  # noqa: N818
    """The model raised, hung, or returned the wrong number of rows. Only the batch concerned fails."""


class CloudError(EdgeRuntimeError):
    """The cloud tier answered this request with an error."""


class BundleError(EdgeRuntimeError):
    """A model bundle is corrupt, truncated, foreign or does not fit this device."""


class StorageError(EdgeRuntimeError):
    """A file of the device's state cannot be used; the message says why and how to repair it."""


class ConfigError(EdgeRuntimeError):
    """A configuration cannot be used. The message names the file, the key and the fix."""
