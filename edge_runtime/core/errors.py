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
    └── ConfigError           a configuration cannot be used: file, key, fix   exit 2

The numbers are the HTTP status the server answers with; it is the only place that knows them.
Messages are one sentence: what, where, how to mend it. They never carry request text, paths of the
device or addresses, since callers see them.
"""

from enum import StrEnum


class EdgeRuntimeError(Exception):
    """Root of all errors raised on purpose."""


class InvalidRequest(EdgeRuntimeError):  # noqa: N818 - reads as the fact it states
    """The request cannot be understood; repeating it unchanged cannot help."""


class TooLarge(InvalidRequest):
    """A length or count in the request passes its limit; the message names the limit."""


class UnknownModel(InvalidRequest):
    """No model of that name or version is loaded."""


class Unsupported(InvalidRequest):
    """The protocol knows this, and this runtime does not offer it."""


class RefusalKind(StrEnum):
    """Why a valid request is not served now."""

    FULL = "full"
    LATE = "late"
    QUOTA = "quota"
    CANCELLED = "cancelled"
    DRAINING = "draining"


class Refused(EdgeRuntimeError):  # noqa: N818
    """A valid request that is not served now. `retry_after_s` is None where waiting cannot help."""

    def __init__(self, kind: RefusalKind, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s


class EngineFailed(EdgeRuntimeError):  # noqa: N818
    """The model runner raised, hung, or returned the wrong number of rows; only its own batch fails."""


class CloudError(EdgeRuntimeError):
    """The cloud tier answered this request with an error."""


class BundleError(EdgeRuntimeError):
    """A model bundle is corrupt, truncated, foreign or does not fit this device."""


class ConfigError(EdgeRuntimeError):
    """A configuration cannot be used. The message names file, key and how to mend it."""
