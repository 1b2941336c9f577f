"""What a trial's parent and child say to each other: one question in, the payloads after it, one verdict back."""

import msgspec

from edge_runtime.bundles.manifest import Manifest
from edge_runtime.core.messages import LatencyProfile

#: What the child prints once it is set up: from then on, whatever ends it is the model's doing.
READY = b"ready\n"


class Question(msgspec.Struct, frozen=True):
    """The first line of the child's input; the payloads follow in the order of `sizes`, without gaps.

    `memory_bytes` is what may be mapped beyond what the child has mapped before it reads them.
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
    """What a model costs and how it may be batched. `memory_bytes` is the peak beside the runner's own."""

    load_ns: int
    memory_bytes: int
    latency_profile: LatencyProfile
    max_batch: int
    is_batch_invariant: bool
    batch_note: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """The last line of the child's output: a report, or a refusal in a sentence, or that memory ran out."""

    report: Report | None = None
    refusal: str = ""
    is_out_of_memory: bool = False
