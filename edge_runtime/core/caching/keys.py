"""The keys of the answer cache: two requests share an answer if and only if their keys are equal.

A key is a keyed digest, so that neither a log nor a memory dump reveals which command was asked, and so
that no tenant can read, probe or poison the entries of another tenant.

What is hashed can be read back in one way only: each field comes after its length, and each list of fields after its
count, both as 8 bytes. So two requests have the same bytes only if they are equal, whatever their rows, parameters and
outputs contain. Without the count, the row of one request could begin with bytes that read as one more output.
"""

import hashlib
from collections.abc import Mapping, Sequence

from edge_runtime.core.messages import Scalar

_KEY_SCHEMA = b"er-cache-v4"  # change whenever the fields below change
#: Parameters that decide how a request is routed and scheduled, and can never change the answer itself.
ROUTING_PARAMETERS = frozenset({"timeout", "deadline_ms", "cache", "priority"})


class KeyPrefix:
    """The part of a cache key that all rows of a request share, hashed once and reused for each row.

    | part               | why two requests that differ in it must not share an answer         |
    |--------------------|----------------------------------------------------------------------|
    | tenant secret      | timing would reveal to one tenant what another asked                 |
    | model digest       | a new version never answers from the old one's entries               |
    | processing version | the same text may become other tensors                               |
    | engine             | another runner, its version or its batches may round otherwise       |
    | parameters         | any parameter but ROUTING_PARAMETERS may steer the answer             |
    | requested outputs  | another selection is another answer                                  |
    | row                | input names, datatypes, shapes and bytes, as the processor wrote it  |

    The engine is constant while a process lives; it matters to entries that outlive the process. What may move while
    answers are kept is no part of a key: a cached answer of the edge is decided again with the threshold and the cloud
    of the moment.
    """

    def __init__(
        self,
        tenant_secret: bytes,
        model_digest: str,
        processing_version: str,
        engine: str,
        parameters: Mapping[str, Scalar],
        outputs: Sequence[str],
    ) -> None:
        """Hash the parts; `tenant_secret` is 16 to 64 random bytes."""
        self._hash = hashlib.blake2b(digest_size=16, key=tenant_secret, person=_KEY_SCHEMA)
        self._hash.update(prefix_bytes(model_digest, processing_version, engine, parameters, outputs))

    def key(self, row: bytes) -> bytes:
        """The 16-byte key of one row: with 128 bits, accidental equality is out of reach."""
        keyed = self._hash.copy()
        keyed.update(len(row).to_bytes(8, "little"))
        keyed.update(row)
        return keyed.digest()


def prefix_bytes(
    model_digest: str,
    processing_version: str,
    engine: str,
    parameters: Mapping[str, Scalar],
    outputs: Sequence[str],
) -> bytes:
    """The bytes that are hashed before the row: three fields, then the list of parameters, then that of outputs."""
    return _fields(model_digest, processing_version, engine) + b"".join(
        len(texts).to_bytes(8, "little") + _fields(*texts)
        for texts in (parameter_fields(parameters), outputs)
    )


def parameter_fields(parameters: Mapping[str, Scalar]) -> tuple[str, ...]:
    """Name, type and value of each parameter that may steer the answer, by rising name.

    Equal exactly for equal parameters: the type keeps 1, 1.0, True and "1" apart, and the text 0.0 and -0.0.
    """
    if not parameters:
        return ()
    fields: list[str] = []
    for name in sorted(parameters.keys() - ROUTING_PARAMETERS):
        value = parameters[name]
        fields += (name, type(value).__name__, str(value))
    return tuple(fields)


def _fields(*texts: str) -> bytes:
    # Lone surrogates can stand in JSON strings; "surrogatepass" writes each text as different bytes.
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return b"".join(len(raw).to_bytes(8, "little") + raw for raw in encoded)
