"""A reply of the tasks `text-classification` and `text-slots` as people and scripts read it."""

from typing import Any

import msgspec

from edge_runtime.core.errors import EdgeRuntimeError
from edge_runtime.core.messages import InferReply


def intent_of(reply: InferReply) -> dict[str, Any]:
    """The first row's intent, confidence, slots if any, origin and times (ms).

    Raises EdgeRuntimeError for other tasks.
    """
    columns = {tensor.name: tensor.data for tensor in reply.outputs}
    if "intent" not in columns or "confidence" not in columns:
        raise EdgeRuntimeError(
            f"Model {reply.model_name} does not answer text with an intent; use `infer` for it."
        )
    slots = {"slots": msgspec.json.decode(columns["slots"][0])} if "slots" in columns else {}
    return {
        "intent": columns["intent"][0].decode("utf-8"),
        "confidence": round(float(columns["confidence"][0]), 4),
        **slots,
        **reply.parameters,
        "ms": round(float(reply.parameters["total_us"]) / 1000, 2),
        "model": reply.model_name,
        "version": reply.model_version,
    }


def describe(answer: dict[str, Any]) -> str:
    """A line a person likes to read, and one for each slot below it."""
    note = ", degraded" if answer["degraded"] else ""
    line = (
        f"{answer['intent']}  {answer['confidence']:.0%} sure  "
        f"{answer['origin']} ({answer['reason']}{note})  {answer['ms']:.1f} ms"
    )
    slots = [f"  {slot['slot']}: {slot['value']}" for slot in answer.get("slots", ())]
    return "\n".join([line, *slots])
