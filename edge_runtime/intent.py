"""A reply of the task `text-classification` as people and scripts read it."""

from typing import Any

from edge_runtime.core.errors import EdgeRuntimeError
from edge_runtime.core.messages import InferReply


def intent_of(reply: InferReply) -> dict[str, Any]:
    """The first row's intent, confidence, origin and times (ms). Raises EdgeRuntimeError for other tasks."""
    columns = {tensor.name: tensor.data for tensor in reply.outputs}
    if "intent" not in columns or "confidence" not in columns:
        raise EdgeRuntimeError(
            f"Model {reply.model_name} does not answer text with an intent; use `infer` for it."
        )
    return {
        "intent": columns["intent"][0].decode("utf-8"),
        "confidence": round(float(columns["confidence"][0]), 4),
        **reply.parameters,
        "ms": round(float(reply.parameters["total_us"]) / 1000, 2),
        "model": reply.model_name,
        "version": reply.model_version,
    }


def describe(answer: dict[str, Any]) -> str:
    """One line a person likes to read."""
    note = ", degraded" if answer["degraded"] else ""
    return (
        f"{answer['intent']}  {answer['confidence']:.0%} sure  "
        f"{answer['origin']} ({answer['reason']}{note})  {answer['ms']:.1f} ms"
    )
