"""Paths of the Open Inference Protocol v2 -> calls of the service."""

import time
from collections.abc import Awaitable
from typing import Any, Protocol

import msgspec

from edge_runtime import __version__
from edge_runtime.core.errors import InvalidRequest, UnknownModel
from edge_runtime.core.messages import (
    Duration,
    InferReply,
    InferRequest,
    ModelInfo,
    ModelStatistics,
    RequestTotals,
    TensorSpec,
)
from edge_runtime.core.protocol import oip
from edge_runtime.core.protocol.ids import is_id
from edge_runtime.core.protocol.parameters import time_limit_ns
from edge_runtime.server.answers import HttpAnswer, error_answer
from edge_runtime.server.bodies import SMALL_BODY_BYTES, Bodies
from edge_runtime.server.byte_budget import Lease

_encode = msgspec.json.Encoder().encode
_NOT_OFFERED = ("logging", "trace", "systemsharedmemory", "cudasharedmemory")
_HEALTH = ("/v2/health/live", "/v2/health/ready")


class InferenceService(Protocol):
    """What the routes need of the service."""

    @property
    def is_ready(self) -> bool: ...
    def infer(
        self,
        model: str,
        version: str | None,
        request: InferRequest,
        *,
        tenant: str,
        deadline_ns: int | None,
        flow: str,
    ) -> Awaitable[InferReply]: ...
    def models(self) -> list[ModelInfo]: ...
    def model(self, name: str, version: str | None = None) -> ModelInfo: ...
    def statistics(self, name: str) -> ModelStatistics: ...
    def requests(self, name: str) -> RequestTotals: ...


class Application(Protocol):
    """The service, and the reports on it."""

    @property
    def service(self) -> InferenceService: ...
    def metrics(self) -> bytes: ...
    def status(self) -> dict[str, object]: ...


class ServerReports(Protocol):
    """What the server adds to the reports of the application."""

    @property
    def is_draining(self) -> bool: ...
    def metrics(self) -> bytes: ...
    def status(self) -> dict[str, object]: ...


class HttpRequest(msgspec.Struct, frozen=True):
    """One complete request; header names are lower case, values stripped.

    `flow` tells the connections of a tenant apart, for fairness; `lease` counts the bytes that the request holds.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes | bytearray
    tenant: str
    flow: str
    lease: Lease


def is_health_check(target: str) -> bool:
    """Whether a request is answered however many connections there are, and while the daemon drains."""
    return target.partition("?")[0] in _HEALTH


async def answer(
    application: Application, server: ServerReports, bodies: Bodies, request: HttpRequest
) -> HttpAnswer:
    """Answer one request. Raises the errors of the core."""
    path = request.path.partition("?")[0]
    if path in ("/metrics", "/status"):
        return _only("GET", request) or _report(application, server, path)
    parts = path.strip("/").split("/")
    if path == "*":
        return HttpAnswer(200, allow="GET, HEAD, POST, OPTIONS")
    if parts[0] != "v2":
        return error_answer(404, "No such path; the API begins at /v2.")
    match parts[1:]:
        case []:
            return _only("GET", request) or _json(_SERVER)
        case ["health", "live" | "ready" as which]:
            return _only("GET", request) or _health(application.service, server, which)
        case ["models", "stats"]:
            return _only("GET", request) or _statistics(application.service, None)
        case ["repository", "index"]:
            return _only("POST", request) or _index(application.service)
        case ["models", name, *rest]:
            return await _model(application.service, bodies, request, name, rest)
        case [first, *_] if first in _NOT_OFFERED or first == "repository":
            return error_answer(501, "This extension of the protocol is not offered.")
    return error_answer(404, "No such path; see GET /v2.")


_SERVER = {
    "name": "edge-runtime",
    "version": __version__,
    "extensions": ["binary_tensor_data", "model_configuration", "statistics", "model_repository(index)"],
}


async def _model(
    service: InferenceService, bodies: Bodies, request: HttpRequest, name: str, rest: list[str]
) -> HttpAnswer:
    version = None
    if len(rest) >= 2 and rest[0] == "versions":
        version, rest = rest[1], rest[2:]
    if not is_id(name):
        raise UnknownModel("No model has such a name; see POST /v2/repository/index.")
    match rest:
        case ["infer"]:
            return _only("POST", request) or await _infer(service, bodies, request, name, version)
        case []:
            return _only("GET", request) or _json(_metadata(service.model(name, version)))
        case ["ready"]:
            service.model(name, version)
            return _only("GET", request) or _json({"name": name, "ready": True})
        case ["config"]:
            return _only("GET", request) or _json(_config(service.model(name, version)))
        case ["stats"]:
            return _only("GET", request) or _statistics(service, service.model(name, version))
    return error_answer(404, "A model has no such path.")


async def _infer(
    service: InferenceService, bodies: Bodies, request: HttpRequest, name: str, version: str | None
) -> HttpAnswer:
    """Refuse what is cheap to refuse first: the model, the lengths, then the tensors as their JSON describes them."""
    arrived_ns = time.monotonic_ns()
    signature = service.model(name, version).signature
    headers = request.headers
    length = headers.get("inference-header-content-length")
    if length is not None and not (length.isascii() and length.isdecimal() and len(length) <= 10):
        raise InvalidRequest("Inference-Header-Content-Length must be a number of bytes.")
    json_length = None if length is None else int(length)
    coding = headers.get("content-encoding")
    if coding is None and len(request.body) <= SMALL_BODY_BYTES:
        decoded = oip.decode_request(request.body, json_length, signature)
    else:
        decoded = await bodies.decode(request.body, request.lease, coding or "", json_length, signature)
    reply = await service.infer(
        name,
        version,
        decoded,
        tenant=request.tenant,
        deadline_ns=_deadline_ns(decoded, arrived_ns),
        flow=request.flow,
    )
    encoded, json_length = await bodies.encode(reply) if oip.is_long_reply(reply) else oip.encode_reply(reply)
    return HttpAnswer(200, encoded, json_length=json_length)


def _deadline_ns(request: InferRequest, arrived_ns: int) -> int | None:
    """When the caller stops waiting, counted from the arrival of the request; None where the service decides."""
    limit_ns = time_limit_ns(request.parameters)
    return None if limit_ns is None or limit_ns <= 0 else arrived_ns + limit_ns


def _only(method: str, request: HttpRequest) -> HttpAnswer | None:
    """None where the method is allowed. HEAD is GET without the body (RFC 9110, 9.3.2), which the writer leaves out."""
    if request.method == method or (method == "GET" and request.method == "HEAD"):
        return None
    allowed = "GET, HEAD" if method == "GET" else method
    return error_answer(405, f"Use {method} here.", allow=allowed)


def _json(tree: object) -> HttpAnswer:
    return HttpAnswer(200, _encode(tree))


def _report(application: Application, server: ServerReports, path: str) -> HttpAnswer:
    if path == "/metrics":
        text = application.metrics() + server.metrics()
        return HttpAnswer(200, text, "text/plain; version=0.0.4; charset=utf-8")
    status = application.status()
    return _json(status | {"http": server.status(), "ready": status.get("ready") and not server.is_draining})


def _health(service: InferenceService, server: ServerReports, which: str) -> HttpAnswer:
    if which == "ready" and (server.is_draining or not service.is_ready):
        return HttpAnswer(503, _encode({"ready": False}))
    return _json({which: True})


def _index(service: InferenceService) -> HttpAnswer:
    return _json(
        [{"name": m.name, "version": m.version, "state": "READY", "reason": ""} for m in service.models()]
    )


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


def _metadata(model: ModelInfo) -> dict[str, Any]:
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": model.platform,
        "inputs": [_tensor(spec) for spec in model.signature.inputs],
        "outputs": [_tensor(spec) for spec in model.signature.outputs],
        "parameters": _parameters(model),
    }


def _parameters(model: ModelInfo) -> dict[str, Any]:
    """What the protocol has no field for; its clients leave it alone."""
    return {
        "max_batch": model.max_batch,
        "batch_invariant": model.is_batch_invariant,
        **({"batch_note": model.batch_note} if model.batch_note else {}),
        **({} if model.memory_bytes is None else {"memory_bytes": model.memory_bytes}),
        "load_ms": round(model.load_ns / 1e6, 1),
    }


def _config(model: ModelInfo) -> dict[str, Any]:
    """The few fields of Triton's model configuration that its clients read."""

    def tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [
            {
                "name": spec.name,
                "data_type": "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}",
                "dims": spec.shape,
            }
            for spec in specs
        ]

    return {
        "name": model.name,
        "platform": model.platform,
        "backend": model.platform.partition("_")[0],
        "max_batch_size": 0,  # texts travel as [n], so clients must not add a batch axis of their own
        "input": tensors(model.signature.inputs),
        "output": tensors(model.signature.outputs),
        "parameters": {"max_batch": {"string_value": str(model.max_batch)}},
    }


def _statistics(service: InferenceService, model: ModelInfo | None) -> HttpAnswer:
    models = service.models() if model is None else [model]
    return _json(
        {
            "model_stats": [
                _stats_tree(info, service.requests(info.name), service.statistics(info.name))
                for info in models
            ]
        }
    )


def _stats_tree(info: ModelInfo, requests: RequestTotals, statistics: ModelStatistics) -> dict[str, Any]:
    """Triton's statistics: success and fail count requests, the inference count rows, and the rest rows and batches."""

    def duration(value: Duration) -> dict[str, int]:
        return {"count": value.count, "ns": value.ns}

    return {
        "name": info.name,
        "version": info.version,
        "last_inference": requests.last_served_ms,
        "inference_count": requests.rows,
        "execution_count": statistics.executions,
        "inference_stats": {
            "success": duration(requests.success),
            "fail": duration(requests.failures),
            "queue": duration(statistics.queue),
            "compute_input": duration(statistics.compute_input),
            "compute_infer": duration(statistics.compute_infer),
            "compute_output": duration(statistics.compute_output),
            "cache_hit": duration(statistics.cache_hit),
            "cache_miss": duration(statistics.cache_miss),
        },
        "batch_stats": [
            {"batch_size": size, "compute_infer": {"count": count, "ns": 0}}
            for size, count in sorted(statistics.batch_sizes.items())
        ],
    }
