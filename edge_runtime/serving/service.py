"""The use case: a request comes in, each of its rows is answered from cache, edge or cloud, one reply goes out."""

import asyncio
import hashlib
import time
from collections.abc import Mapping

from edge_runtime.caching.two_level import DiskStore, TwoLevelCache
from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.caching.keys import KeyPrefix, parameter_fields
from edge_runtime.core.errors import InvalidRequest, RefusalKind, UnknownModel, refusal
from edge_runtime.core.messages import (
    InferReply,
    InferRequest,
    ModelInfo,
    ModelStatistics,
    RequestTotals,
    Scalar,
    Signature,
    Tensor,
)
from edge_runtime.core.outcome import Outcome
from edge_runtime.core.protocol.parameters import priority_of, time_limit_ns
from edge_runtime.core.protocol.replies import build_reply, explain, requested_outputs
from edge_runtime.serving.bounded_cloud import BoundedCloud
from edge_runtime.serving.cascade import Cascade, RequestContext
from edge_runtime.serving.counters import Counters
from edge_runtime.serving.registry import Registry, ServedModel
from edge_runtime.serving.request_rows import answer_rows
from edge_runtime.serving.row_paths import RowPaths, Shared
from edge_runtime.serving.single_flight import SingleFlight
from edge_runtime.uplink.cloud_answer import Cloud

__all__ = ["ServedModel", "Service"]

#: Callers choose parameters, so the memo of key prefixes is bounded: 256 of them with 1 KiB of text each.
_MOST_PREFIXES, _MOST_PREFIX_CHARACTERS = 256, 1024


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
        self._is_draining = False
        self._cloud = None if cloud is None else BoundedCloud(cloud)
        self._flights = SingleFlight()
        cascade = Cascade(self._cloud, cloud_timeout_ns=int(cloud_timeout_s * 1e9), now_ns=time.monotonic_ns)
        self._shared = Shared(self.registry, cascade, self._flights, self.cache, self.counters)
        self._device_secret = device_secret
        self._timeout_ns = int(timeout_s * 1e9)
        self._prefixes: dict[tuple[object, ...], KeyPrefix] = {}

    @property
    def is_ready(self) -> bool:
        """Whether new requests are welcome: every model is ready, and the runtime does not drain."""
        return not self._is_draining and self.registry.is_ready

    @property
    def is_draining(self) -> bool:
        """Whether the runtime is about to end."""
        return self._is_draining

    def drain(self, limit_s: float) -> None:
        """Be ready no longer, and let no row wait for the cloud for more than `limit_s` from now on.

        Requests are answered as before: which ones are still taken is for the caller to say, who knows when they came.
        """
        self._is_draining = True
        if self._cloud is not None:
            self._cloud.end_by(asyncio.get_running_loop().time() + limit_s)

    def models(self) -> list[ModelInfo]:
        """All loaded models."""
        return [served.info for served in self.registry]

    def model(self, name: str, version: str | None = None) -> ModelInfo:
        """One loaded model. Raises UnknownModel."""
        return self.registry.find(name, version).info

    def statistics(self, name: str) -> ModelStatistics:
        """The running totals of a model's runner. Raises UnknownModel."""
        return self.registry.find(name, None).runner.statistics

    def requests(self, name: str) -> RequestTotals:
        """The totals of the requests for a model, over all its versions. Raises UnknownModel."""
        return self.counters.of(self.registry.find(name, None).info.name)

    def waiting(self, name: str) -> int:
        """Rows of a model that wait for its engine."""
        return self.registry.find(name, None).runner.waiting

    def replace_model(self, served: ServedModel) -> ServedModel:
        """Serve `served` in place of the model of its name, which is returned; see `retire_model`.

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

    async def retire_model(self, former: ServedModel) -> None:
        """Close the runner of a model that was replaced, once every request that has found it has ended.

        A caller that is cancelled here leaves the runner open; call again.
        """
        await self.registry.wait_unused(former)
        await former.runner.close()

    async def infer(
        self,
        model: str,
        version: str | None,
        request: InferRequest,
        *,
        tenant: str = "local",
        flow: str = "",
        deadline_ns: int | None = None,
    ) -> InferReply:
        """Answer every row of the request, in one reply.

        `deadline_ns` is in `time.monotonic_ns` terms. Without it the time limit in the request's parameters holds
        (`timeout` or `deadline_ms`), else the configured one. `flow` tells the callers of one tenant apart: flows share
        the engine fairly. Raises InvalidRequest and its kin, Refused, EngineFailed: the first error of a row is that of
        the request.
        """
        started_ns = time.monotonic_ns()
        served = self._find(model, version)
        try:
            if deadline_ns is None:
                deadline_ns = started_ns + self._time_limit_ns(request)
            outcomes = await self._answer(served, request, tenant, flow, deadline_ns)
            total_ns = time.monotonic_ns() - started_ns
            reply = build_reply(
                served.info.name,
                served.info.version,
                served.info.signature,
                [outcome.answer for outcome in outcomes],
                request,
                explain(outcomes, total_ns),
            )
        except BaseException as error:
            self.counters.ended(served.info.name, error, time.monotonic_ns() - started_ns)
            raise
        self.counters.served(served.info.name, outcomes, total_ns, time.time_ns() // 1_000_000)
        return reply

    async def ask(self, text: str, *, model: str = "commands", is_private: bool = False) -> Outcome:
        """Answer one text; the short way for programs that embed the runtime. Raises as `infer`."""
        started_ns = time.monotonic_ns()
        served = self._find(model, None)
        parameters: dict[str, Scalar] = {"private": True} if is_private else {}
        try:
            raw = text.encode(
                "utf-8", "surrogatepass"
            )  # a lone surrogate is refused as any text that is not UTF-8
            request = InferRequest((Tensor("text", "BYTES", (1,), (raw,)),), parameters=parameters)
            outcomes = await self._answer(served, request, "local", "", started_ns + self._timeout_ns)
        except BaseException as error:
            self.counters.ended(served.info.name, error, time.monotonic_ns() - started_ns)
            raise
        took_ns = time.monotonic_ns() - started_ns
        self.counters.served(served.info.name, outcomes, took_ns, time.time_ns() // 1_000_000)
        return outcomes[0]

    def _find(self, model: str, version: str | None) -> ServedModel:
        try:
            return self.registry.find(model, version)
        except UnknownModel:
            self.counters.unknown_model += 1
            raise

    def _time_limit_ns(self, request: InferRequest) -> int:
        """How long the caller waits. Raises Refused where that time has passed already, and InvalidRequest."""
        limit_ns = time_limit_ns(request.parameters) if request.parameters else None
        if limit_ns is None:
            return self._timeout_ns
        if limit_ns <= 0:
            raise refusal(RefusalKind.LATE)
        return limit_ns

    async def _answer(
        self, served: ServedModel, request: InferRequest, tenant: str, flow: str, deadline_ns: int
    ) -> list[Outcome]:
        """Split a request into rows and answer them as its parameters say."""
        self.registry.enter(served)
        try:
            questions = served.processor.split(request.inputs)
            outputs = _output_names(served.info.signature, request)
            context = _context(served, request, outputs, tenant, flow, deadline_ns)
            prefix = None
            if self.cache is not None and _flag(request.parameters, "cache", default=True):
                prefix = self._prefix(served, request.parameters, outputs, tenant)
            return await answer_rows(RowPaths(self._shared, served, context, questions, prefix))
        finally:
            self.registry.leave(served)

    def _prefix(
        self, served: ServedModel, parameters: Mapping[str, Scalar], outputs: tuple[str, ...], tenant: str
    ) -> KeyPrefix:
        fields = parameter_fields(parameters)
        memo = (tenant, served.info.digest, fields, outputs)
        prefix = self._prefixes.get(memo)
        if prefix is None:
            prefix = KeyPrefix(
                hashlib.blake2b(tenant.encode(), key=self._device_secret, digest_size=32).digest(),
                *served.key_parts,
                parameters,
                outputs,
            )
            if sum(map(len, fields)) > _MOST_PREFIX_CHARACTERS:
                return prefix
            if len(self._prefixes) >= _MOST_PREFIXES:
                self._prefixes.clear()
            self._prefixes[memo] = prefix
        return prefix


def _context(
    served: ServedModel,
    request: InferRequest,
    outputs: tuple[str, ...],
    tenant: str,
    flow: str,
    deadline_ns: int,
) -> RequestContext:
    """Read what the caller wants of each row. Raises InvalidRequest."""
    wants_extras = bool(request.outputs) and any(
        spec.name in outputs for spec in served.info.signature.on_request
    )
    return RequestContext(
        deadline_ns,
        tenant,
        flow,
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
