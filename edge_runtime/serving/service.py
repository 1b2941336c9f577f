"""The use case: a request comes in, each of its rows is answered from cache, edge or cloud, one reply goes out."""

import hashlib
import time
from collections.abc import Mapping, Sequence

from edge_runtime.caching.two_level import DiskStore, TwoLevelCache
from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.caching.keys import ROUTING_PARAMETERS, KeyPrefix
from edge_runtime.core.errors import InvalidRequest
from edge_runtime.core.messages import (
    InferReply,
    InferRequest,
    ModelInfo,
    ModelStatistics,
    Scalar,
    Signature,
    Tensor,
)
from edge_runtime.core.outcome import Outcome
from edge_runtime.core.protocol.parameters import priority_of
from edge_runtime.core.protocol.replies import build_reply, explain, requested_outputs
from edge_runtime.processing import Question
from edge_runtime.serving.cascade import Cascade, RequestContext
from edge_runtime.serving.registry import Registry, ServedModel
from edge_runtime.serving.request_rows import Counters, RequestRows, Shared
from edge_runtime.serving.single_flight import SingleFlight
from edge_runtime.uplink.cloud_answer import Cloud

__all__ = ["ServedModel", "Service"]

_MOST_PREFIXES = 256  # callers choose parameters: the memo is bounded


class Service:
    """Serves requests for the loaded models; what the server and an embedding program call."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        cache: Cache[Outcome] | None,
        cloud: Cloud | None,
        device_secret: bytes,
        timeout_s: float,
        cloud_timeout_s: float,
        store: DiskStore | None = None,
    ) -> None:
        """`device_secret`: 32 random bytes from which each tenant's cache key is derived.

        `store` is the second level of `cache`; it outlives the process, and so must `device_secret` then.
        """
        self.registry = Registry(models)
        self.cache = None if cache is None else TwoLevelCache(cache, store)
        self.counters = Counters()
        self.is_ready = True
        self._flights = SingleFlight()
        self._cascade = Cascade(cloud, cloud_timeout_ns=int(cloud_timeout_s * 1e9), now_ns=time.monotonic_ns)
        self._shared = Shared(self.registry, self._cascade, self._flights, self.cache, self.counters)
        self._device_secret = device_secret
        self._timeout_ns = int(timeout_s * 1e9)
        self._prefixes: dict[tuple[object, ...], KeyPrefix] = {}

    def models(self) -> list[ModelInfo]:
        """All loaded models."""
        return [served.info for served in self.registry]

    def model(self, name: str, version: str | None = None) -> ModelInfo:
        """One loaded model. Raises UnknownModel."""
        return self.registry.find(name, version).info

    def statistics(self, name: str) -> ModelStatistics:
        """The running totals of a model. Raises UnknownModel."""
        return self.registry.find(name, None).runner.statistics

    def waiting(self, name: str) -> int:
        """Rows of a model that wait for its engine."""
        return self.registry.find(name, None).runner.waiting

    def replace_model(self, served: ServedModel) -> ServedModel:
        """Serve `served` in place of the model of its name, which is returned: its runner is the caller's to close.

        Where the digest changes, the former model's answers are dropped, in memory and on disk. Where it does not,
        only settings change (a threshold), and every answer stays. Raises UnknownModel where none of that name is
        loaded.
        """
        former = self.registry.replace(served)
        if former.key_parts != served.key_parts:
            self._prefixes.clear()
        if self.cache is not None and former.info.digest != served.info.digest:
            self.cache.drop_model(former.info.digest, [model.info.digest for model in self.registry])
        return former

    async def infer(
        self,
        model: str,
        version: str | None,
        request: InferRequest,
        *,
        tenant: str = "local",
        deadline_ns: int | None = None,
        flow: str = "",  # noqa: ARG002 - the scheduler does not know flows yet
    ) -> InferReply:
        """Answer every row of the request, in one reply.

        `flow` tells callers of one tenant apart, such as the connections of a listener.

        `deadline_ns` is in `time.monotonic_ns` terms; without it the configured time limit holds.
        Raises InvalidRequest and its kin, Refused, EngineFailed: the first error of a row is that of the request.
        """
        started_ns = time.monotonic_ns()
        served = self.registry.find(model, version)
        questions = served.processor.split(request.inputs)
        deadline_ns = deadline_ns or started_ns + self._timeout_ns
        outcomes = await self._answer(served, questions, request, tenant, deadline_ns)
        total_ns = time.monotonic_ns() - started_ns
        served.runner.statistics.requests.add(total_ns, len(questions))
        served.runner.statistics.last_inference_ms = time.time_ns() // 1_000_000
        return build_reply(
            served.info.name,
            served.info.version,
            served.info.signature,
            [outcome.answer for outcome in outcomes],
            request,
            explain(outcomes, total_ns),
        )

    async def ask(self, text: str, *, model: str = "commands", is_private: bool = False) -> Outcome:
        """Answer one text; the short way for programs that embed the runtime. Raises as `infer`."""
        served = self.registry.find(model, None)
        questions = served.processor.split((Tensor("text", "BYTES", (1,), (text.encode(),)),))
        request = InferRequest((), parameters={"private": True} if is_private else {})
        deadline_ns = time.monotonic_ns() + self._timeout_ns
        (outcome,) = await self._answer(served, questions, request, "local", deadline_ns)
        return outcome

    async def _answer(
        self,
        served: ServedModel,
        questions: Sequence[Question],
        request: InferRequest,
        tenant: str,
        deadline_ns: int,
    ) -> list[Outcome]:
        """Answer the rows of a request as its parameters say, and count them."""
        outputs = _output_names(served.info.signature, request)
        context = _context(served, request, outputs, tenant, deadline_ns)
        prefix = None
        if self.cache is not None and _flag(request.parameters, "cache", default=True):
            prefix = self._prefix(served, request.parameters, outputs, tenant)
        outcomes = await RequestRows(self._shared, served, context, questions, prefix).answer()
        for outcome in outcomes:
            self.counters.count(served.info.name, outcome)
        return outcomes

    def _prefix(
        self, served: ServedModel, parameters: Mapping[str, Scalar], outputs: tuple[str, ...], tenant: str
    ) -> KeyPrefix:
        values: tuple[str, ...] = ()
        if parameters:  # repr: 1, 1.0, True and "1" differ, and so do 0.0 and -0.0
            values = tuple(
                f"{name}={value!r}" for name, value in parameters.items() if name not in ROUTING_PARAMETERS
            )
        memo = (tenant, served.info.digest, values, outputs)
        prefix = self._prefixes.get(memo)
        if prefix is None:
            if len(self._prefixes) >= _MOST_PREFIXES:
                self._prefixes.clear()
            prefix = self._prefixes[memo] = KeyPrefix(
                hashlib.blake2b(tenant.encode(), key=self._device_secret, digest_size=32).digest(),
                *served.key_parts,
                parameters,
                outputs,
            )
        return prefix


def _context(
    served: ServedModel, request: InferRequest, outputs: tuple[str, ...], tenant: str, deadline_ns: int
) -> RequestContext:
    """Read what the caller wants of each row. Raises InvalidRequest."""
    wants_extras = bool(request.outputs) and any(
        spec.name in outputs for spec in served.info.signature.on_request
    )
    return RequestContext(
        deadline_ns,
        tenant,
        priority_of(request.parameters.get("priority")),
        _flag(request.parameters, "private", default=False),
        wants_extras,
    )


def _output_names(signature: Signature, request: InferRequest) -> tuple[str, ...]:
    """The outputs asked for, in the caller's order. Raises InvalidRequest."""
    wanted = requested_outputs(signature, request) if request.outputs else signature.outputs
    return tuple([output.name for output in wanted])


def _flag(parameters: Mapping[str, Scalar], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"Parameter {name} must be true or false.")
    return value
