"""The messages between the sandbox and its child: one request in, the payloads after it, one result back."""

import msgspec

from edge_runtime.bundles.manifest import Manifest
from edge_runtime.core.messages import LatencyProfile

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

    load_ns: int
    memory_bytes: int
    latency_profile: LatencyProfile
    max_batch: int
    is_batch_invariant: bool
    batch_note: str = ""


class ProbeResult(msgspec.Struct, frozen=True):
    """The last line of the child's output: a report, or the sentence of a refusal, or that memory ran out."""

    report: Report | None = None
    refusal: str = ""
    is_out_of_memory: bool = False
