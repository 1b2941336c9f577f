"""The messages between the sandbox and its child: one request in, the payloads after it, one result back."""

from typing import Annotated

import msgspec

from edge_runtime.bundles.manifest import Manifest

_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Natural = Annotated[int, msgspec.Meta(ge=0)]

#: The child prints this once it has limited itself: whatever ends it afterwards is the fault of the model.
READY = b"ready\n"


class ProbeRequest(msgspec.Struct, frozen=True):
    """The first line of the child's input; the payloads follow in the order of `sizes`, without gaps.

    `memory_bytes` may be mapped beyond what the child has mapped before it reads the payloads.
    """

    manifest: Manifest
    sizes: dict[str, int]
    threads: int
    max_batch: int
    memory_bytes: int
    cpu_s: int
    wall_s: float
    parent: int


class Report(msgspec.Struct, frozen=True):
    """What a model costs and how it may be batched. `memory_bytes` is the peak beyond the model runner's own."""

    load_ns: _Natural
    memory_bytes: _Natural  # a negative one would pass every budget
    latency_profile: tuple[tuple[_Positive, _Natural], ...]
    max_batch: _Positive
    is_batch_invariant: bool
    batch_note: str = ""


class ProbeResult(msgspec.Struct, frozen=True):
    """The last line of the child's output: a report, or the sentence of a refusal, or that memory ran out.

    The child runs the model, so what it says is checked like any input.
    """

    report: Report | None = None
    refusal: str = ""
    is_out_of_memory: bool = False
