"""Asking the cloud tier for one row, and which part of its answer is believed."""

from typing import Protocol

from edge_runtime.core.escalation.decision import LinkState
from edge_runtime.core.messages import Answer, InferReply, InferRequest, OutputRequest, Signature
from edge_runtime.processing import Processor, Question


class Cloud(Protocol):
    """What escalation needs of the uplink."""

    @property
    def is_authenticated(self) -> bool:
        """Whether the broker knows who publishes; where it does not, anybody may have sent an answer."""

    def link_state(self, model: str) -> LinkState:
        """The state of the way to the workers of a model, now, for the decision about one row."""

    async def ask(self, model: str, request: InferRequest, *, deadline_ns: int) -> InferReply:
        """Ask the cloud tier. Raises CloudUnavailable with the reason."""


async def cloud_answer(
    cloud: Cloud,
    model: str,
    processor: Processor,
    question: Question,
    edge: Answer | None,
    *,
    deadline_ns: int,
    wants_extras: bool,
) -> tuple[Answer, str]:
    """Return the cloud's answer to one row and the version of its model.

    The answer is fused with the edge's where the bundle was fitted for that version. Raises CloudUnavailable,
    CloudError, InvalidRequest.
    """
    fuses = edge is not None and processor.fusion_version is not None
    outputs = _every_output(processor.signature) if wants_extras or fuses else ()
    request = InferRequest(processor.tensors(question), outputs=outputs)
    reply = await cloud.ask(model, request, deadline_ns=deadline_ns)
    # Scores of another version are not read: its labels may be others.
    fuses = fuses and reply.model_version == processor.fusion_version
    answer = processor.read(reply, with_extras=wants_extras or fuses)
    if fuses and edge is not None:
        answer = processor.fuse(edge, answer)
    return answer, reply.model_version


def _every_output(signature: Signature) -> tuple[OutputRequest, ...]:
    return tuple(
        OutputRequest(spec.name, binary=spec.datatype != "BYTES")
        for spec in (*signature.outputs, *signature.on_request)
    )
