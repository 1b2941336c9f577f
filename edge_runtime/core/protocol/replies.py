"""Answers of rows -> one reply in the words of the task's signature; both tiers build replies here."""

from collections.abc import Sequence

import numpy as np

from edge_runtime.core.errors import EngineFailed, InvalidRequest
from edge_runtime.core.messages import (
    Answer,
    InferReply,
    InferRequest,
    OutputRequest,
    Scalar,
    Signature,
    Tensor,
    TensorSpec,
)


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
    wanted = requested_outputs(signature, request)
    specs = {spec.name: (i, spec) for i, spec in enumerate((*signature.outputs, *signature.on_request))}
    return InferReply(
        model_name=model_name,
        model_version=model_version,
        outputs=tuple(_stack(*specs[output.name], answers) for output in wanted),
        id=request.id,
        parameters=parameters,
        binary_outputs=frozenset(output.name for output in wanted if output.binary),
    )


def read_answers(
    signature: Signature, reply: InferReply, rows: int, confidence_output: str, *, with_extras: bool = False
) -> list[Answer]:
    """The inverse of `build_reply` for a reply that holds all outputs, `with_extras` also those on request.

    Raises InvalidRequest.
    """
    tensors = {tensor.name: tensor for tensor in reply.outputs}
    columns = [_column(spec, tensors.get(spec.name), rows) for spec in signature.outputs]
    confidences = tensors.get(confidence_output)
    if confidences is None or isinstance(confidences.data, tuple):
        raise InvalidRequest("The reply carries no confidence.")
    values = [float(value) for value in confidences.data.reshape(-1)]
    if not all(0.0 <= value <= 1.0 for value in values):
        raise InvalidRequest("The reply's confidence lies outside 0 to 1.")
    extras = [_column(spec, tensors.get(spec.name), rows) for spec in signature.on_request if with_extras]
    return [
        Answer(tuple(column[i] for column in columns), values[i], tuple(np.asarray(c[i]) for c in extras))
        for i in range(rows)
    ]


def _stack(index: int, spec: TensorSpec, answers: Sequence[Answer]) -> Tensor:
    values = [(*answer.values, *answer.extras)[index] for answer in answers]
    if spec.datatype == "BYTES":
        texts = tuple(value for value in values if isinstance(value, bytes))
        if len(texts) != len(values):
            raise EngineFailed(f"The model's output {spec.name} is not text as its signature promises.")
        return Tensor(spec.name, spec.datatype, (len(values),), texts)
    stacked = np.stack([np.asarray(value) for value in values])
    return Tensor(spec.name, spec.datatype, stacked.shape, stacked)


def _column(spec: TensorSpec, tensor: Tensor | None, rows: int) -> list[bytes | np.generic]:
    shape = (rows, *spec.shape[1:])
    if tensor is None or tensor.datatype != spec.datatype or tensor.shape != shape:
        raise InvalidRequest(f"The reply lacks output {spec.name} as {spec.datatype} of shape {list(shape)}.")
    if not isinstance(tensor.data, tuple) and not np.isfinite(tensor.data).all():
        raise InvalidRequest(f"The reply's output {spec.name} holds values that are no numbers.")
    return list(tensor.data)
