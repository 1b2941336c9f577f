"""Answers of rows -> one reply in the words of the task's signature; both tiers build replies here."""

from collections.abc import Sequence

import numpy as np

from edge_runtime.core.errors import EngineFailed, InvalidRequest
from edge_runtime.core.messages import (
    Answer,
    Array,
    InferReply,
    InferRequest,
    OutputRequest,
    Scalar,
    Signature,
    Tensor,
    TensorSpec,
)
from edge_runtime.core.outcome import Outcome
from edge_runtime.core.protocol.row_words import row_words


def requested_outputs(signature: Signature, request: InferRequest) -> tuple[OutputRequest, ...]:
    """What the caller wants, in its order; all outputs when it names none. Raises InvalidRequest."""
    if not request.outputs:
        return tuple(OutputRequest(spec.name, request.binary_default) for spec in signature.outputs)
    known = {spec.name for spec in (*signature.outputs, *signature.on_request)}
    for output in request.outputs:
        if output.name not in known:
            raise InvalidRequest(f"The model has no such output; it offers {', '.join(sorted(known))}.")
    return request.outputs


def build_reply(
    model_name: str,
    model_version: str,
    signature: Signature,
    answers: Sequence[Answer],
    request: InferRequest,
    parameters: dict[str, Scalar],
) -> InferReply:
    """Stack the rows' values into tensors of shape [n, ...] for the outputs the caller asked for."""
    if request.outputs:
        known = {spec.name: (i, spec) for i, spec in enumerate((*signature.outputs, *signature.on_request))}
        wanted = requested_outputs(signature, request)
        chosen = [known[output.name] for output in wanted]
        binary = frozenset(output.name for output in wanted if output.binary)
    else:
        chosen = [*enumerate(signature.outputs)]
        binary = frozenset(spec.name for _, spec in chosen) if request.binary_default else frozenset()
    return InferReply(
        model_name,
        model_version,
        tuple([_stack(i, spec, answers) for i, spec in chosen]),
        request.id,
        parameters,
        binary,
    )


def explain(outcomes: Sequence[Outcome], total_ns: int) -> dict[str, Scalar]:
    """Return the reply's parameters. Times are the longest of a row, in microseconds; see `row_words` for the words."""
    fields: dict[str, Scalar]
    if len(outcomes) == 1:  # most requests
        (only,) = outcomes
        fields = {"origin": str(only.origin), "reason": str(only.reason)}
        queue_ns, infer_ns, cloud_ns = only.queue_ns, only.infer_ns, only.cloud_ns
    else:
        fields = row_words("origin", [str(outcome.origin) for outcome in outcomes])
        fields |= row_words("reason", [str(outcome.reason) for outcome in outcomes])
        queue_ns = max([outcome.queue_ns for outcome in outcomes])
        infer_ns = max([outcome.infer_ns for outcome in outcomes])
        cloud_ns = max([outcome.cloud_ns for outcome in outcomes])
    fields["degraded"] = any(outcome.is_degraded for outcome in outcomes)
    fields["queue_us"], fields["infer_us"] = queue_ns // 1000, infer_ns // 1000
    fields["cloud_us"], fields["total_us"] = cloud_ns // 1000, total_ns // 1000
    if fields["degraded"] and any(outcome.is_stale for outcome in outcomes):
        fields["stale"] = True
    return fields


def read_answer(
    signature: Signature, reply: InferReply, confidence_output: str | None, *, with_extras: bool = False
) -> Answer:
    """Read a reply of one row that holds all outputs, `with_extras` also those on request.

    `confidence_output` names the output that carries the confidence, a number from 0 to 1; None where the task
    has none. Raises InvalidRequest.
    """
    tensors = {tensor.name: tensor for tensor in reply.outputs}
    values = tuple(_first(spec, tensors.get(spec.name)) for spec in signature.outputs)
    extras = [_first(spec, tensors.get(spec.name)) for spec in signature.on_request if with_extras]
    confidence = None
    if confidence_output is not None:
        confidences = tensors.get(confidence_output)
        if confidences is None or isinstance(confidences.data, tuple):
            raise InvalidRequest("The reply carries no confidence.")
        confidence = float(confidences.data.reshape(-1)[0])
        if not 0.0 <= confidence <= 1.0:
            raise InvalidRequest("The reply's confidence lies outside 0 to 1.")
    return Answer(values, confidence, tuple(np.asarray(extra) for extra in extras))


def _stack(index: int, spec: TensorSpec, answers: Sequence[Answer]) -> Tensor:
    values: list[bytes | Array | np.generic]
    if index < len(answers[0].values):
        values = [answer.values[index] for answer in answers]
    else:
        index -= len(answers[0].values)
        values = [answer.extras[index] for answer in answers]
    if spec.datatype == "BYTES":
        texts = tuple(value for value in values if isinstance(value, bytes))
        if len(texts) != len(values):
            raise EngineFailed(f"The model's output {spec.name} is not text as its signature promises.")
        return Tensor(spec.name, spec.datatype, (len(values),), texts)
    if len(values) == 1:
        stacked = np.asarray(values[0])[None]  # np.stack takes four times as long for one row
    else:
        stacked = np.stack([np.asarray(value) for value in values])
    return Tensor(spec.name, spec.datatype, stacked.shape, stacked)


def _first(spec: TensorSpec, tensor: Tensor | None) -> "bytes | Array | np.generic":
    """Return the only row of an output, once it fits `spec`."""
    shape = (1, *spec.shape[1:])
    fits = (
        tensor is not None
        and tensor.datatype == spec.datatype
        and len(tensor.shape) == len(shape)
        and all(want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True))
    )
    if tensor is None or not fits:
        raise InvalidRequest(f"The reply lacks output {spec.name} as {spec.datatype} of shape {list(shape)}.")
    if isinstance(tensor.data, tuple):
        return tensor.data[0]
    if not np.isfinite(tensor.data).all():
        raise InvalidRequest(f"The reply's output {spec.name} holds values that are no numbers.")
    first: Array | np.generic = tensor.data[0]
    return first
