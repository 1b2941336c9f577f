"""Asking the cloud tier for one row, and what of its answer is believed."""

from typing import Protocol

from edge_runtime.core.errors import InvalidRequest
from edge_runtime.core.escalation.decision import LinkState
from edge_runtime.core.messages import (
    Answer,
    InferReply,
    InferRequest,
    ModelInfo,
    OutputRequest,
    Signature,
    Tensor,
)
from edge_runtime.core.protocol.replies import read_answers
from edge_runtime.uplink.score_fusion import Joining


class Cloud(Protocol):
    """What the service needs of the uplink."""

    def link_state(self) -> LinkState:
        """The state of the way to the cloud, now."""

    async def ask(self, model: str, request: InferRequest, *, deadline_ns: int) -> InferReply:
        """Ask the cloud tier. Raises CloudUnavailable with the reason."""


class Asker(Protocol):
    """The edge's side of a model, as far as it matters to its answers from the cloud."""

    @property
    def info(self) -> ModelInfo:
        """Name and signature, which the cloud's answer must fit."""

    @property
    def labels(self) -> frozenset[bytes] | None:
        """What an answer may say; None: anything."""

    @property
    def joining(self) -> Joining | None:
        """How both tiers' evidence is joined; None: the cloud's answer is taken as it is."""


async def cloud_answer(
    cloud: Cloud, served: Asker, row: bytes, edge: Answer | None, *, deadline_ns: int, wants_extras: bool
) -> tuple[Answer, str]:
    """The cloud's answer and its model's version, joined with the edge's where both were fitted for it.

    Raises CloudUnavailable, CloudError, InvalidRequest.
    """
    joining = served.joining if edge is not None else None
    with_extras = wants_extras or joining is not None
    outputs = _every_output(served.info.signature) if with_extras else ()
    question = InferRequest((Tensor("text", "BYTES", (1,), (row,)),), outputs=outputs)
    reply = await cloud.ask(served.info.name, question, deadline_ns=deadline_ns)
    if joining is not None and joining.cloud_version != reply.model_version:
        joining = None  # fitted for another cloud, whose labels may be others: its scores are not read
    (answer,) = _read_cloud(served, reply, with_extras=wants_extras or joining is not None)
    if joining is not None and edge is not None:
        answer = joining.join(edge, answer)
    return answer, reply.model_version


def _every_output(signature: Signature) -> tuple[OutputRequest, ...]:
    return tuple(
        OutputRequest(spec.name, binary=spec.datatype != "BYTES")
        for spec in (*signature.outputs, *signature.on_request)
    )


def _read_cloud(served: Asker, reply: InferReply, *, with_extras: bool) -> list[Answer]:
    """The cloud's answer, believed only if it fits this device's own signature and labels (InvalidRequest)."""
    answers = read_answers(served.info.signature, reply, 1, "confidence", with_extras=with_extras)
    if served.labels is not None and any(answer.values[0] not in served.labels for answer in answers):
        raise InvalidRequest("The cloud answered with a label this device does not know.")
    return answers
