"""The use case: a request comes in, each of its rows is answered from cache, edge or cloud, a reply goes out."""

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from edge_runtime.caching.two_level import DiskStore, TwoLevelCache
from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.caching.keys import ROUTING_PARAMETERS, KeyPrefix
from edge_runtime.core.errors import CloudError, InvalidRequest, RefusalKind, Refused, UnknownModel, refusal
from edge_runtime.core.escalation.decision import CloudUnavailable, decide, may_spill
from edge_runtime.core.messages import (
    Answer,
    InferReply,
    InferRequest,
    ModelInfo,
    ModelStatistics,
    Origin,
    Reason,
    Scalar,
    Signature,
    Tensor,
)
from edge_runtime.core.outcome import Outcome
from edge_runtime.core.protocol.parameters import priority_of
from edge_runtime.core.protocol.replies import build_reply, requested_outputs
from edge_runtime.processing import Processor, Question
from edge_runtime.serving.model_runner import ModelRunner
from edge_runtime.uplink.cloud_answer import Cloud, cloud_answer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model with its runner. `engine` names what runs it, with its version."""

    info: ModelInfo
    processor: Processor
    lane: ModelRunner
    engine: str = ""

    @property
    def row_ns(self) -> int:
        """What one row costs, as measured at its load."""
        latency_profile = self.info.latency_profile
        return latency_profile[0][1] if latency_profile else 0


class _Abandoned(Exception):  # noqa: N818 - a signal between callers, never seen outside
    """The caller that computed went away or was refused for its own deadline; the next one takes over."""


@dataclass(slots=True)
class _Travel:
    """How one request wants to travel."""

    prefix: KeyPrefix | None
    is_private: bool
    wants_extras: bool
    deadline_ns: int
    tenant: str
    priority: int

    def trim(self, answer: Answer) -> Answer:
        """Without the outputs nobody asked for, which would fill the cache."""
        return (
            answer
            if self.wants_extras or not answer.extras
            else Answer(answer.values, answer.confidence, raw_score=answer.raw_score)
        )


@dataclass(slots=True)
class Counters:
    """Rows by (model, origin, reason), for metrics and status."""

    outcomes: dict[tuple[str, str, str], int] = field(default_factory=dict)
    coalesced: int = 0

    def count(self, model: str, outcome: Outcome) -> None:
        key = (model, outcome.origin.value, outcome.reason.value)
        self.outcomes[key] = self.outcomes.get(key, 0) + 1


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
        self._models = dict(models)
        self.recall = None if cache is None else TwoLevelCache(cache, store)
        self._cloud = cloud
        self._device_secret = device_secret
        self._timeout_ns = int(timeout_s * 1e9)
        self._cloud_timeout_ns = int(cloud_timeout_s * 1e9)
        #: Who is computed right now; the future is made by the first who waits.
        self._flights: dict[bytes, asyncio.Future[Outcome] | None] = {}
        self._prefixes: dict[tuple[object, ...], KeyPrefix] = {}
        self.counters = Counters()
        self.is_ready = True

    def models(self) -> list[ModelInfo]:
        """All loaded models."""
        return [served.info for served in self._models.values()]

    def model(self, name: str, version: str | None = None) -> ModelInfo:
        """One loaded model. Raises UnknownModel."""
        return self._find(name, version).info

    def statistics(self, name: str) -> ModelStatistics:
        """The running totals of a model. Raises UnknownModel."""
        return self._find(name, None).lane.statistics

    def waiting(self, name: str) -> int:
        """Rows of a model that wait for its engine."""
        return self._find(name, None).lane.waiting

    def replace_model(self, served: ServedModel) -> ServedModel:
        """Serve another version in place of the loaded one, which is returned: its lane is the caller's to end.

        Its answers are forgotten, in memory and on disk. Raises UnknownModel where none of that name is loaded.
        """
        former = self._find(served.info.name, None)
        self._models[served.info.name] = served
        self._prefixes.clear()
        if self.recall is not None:
            self.recall.drop_model(former.info.digest, [model.info.digest for model in self._models.values()])
        return former

    async def infer(
        self,
        model: str,
        version: str | None,
        request: InferRequest,
        *,
        tenant: str = "local",
        deadline_ns: int | None = None,
    ) -> InferReply:
        """Answer every row of the request.

        `deadline_ns` is in `time.monotonic_ns` terms; without it the configured time limit holds.
        Raises InvalidRequest and its kin, Refused, EngineFailed.
        """
        started_ns = time.monotonic_ns()
        served = self._find(model, version)
        rows = served.processor.split(request.inputs)
        outputs = _output_names(served.info.signature, request)
        travel = self._travel(served, request, outputs, tenant, deadline_ns or started_ns + self._timeout_ns)
        if len(rows) == 1:
            outcomes = [await self._serve_row(served, rows[0], travel)]
        else:
            outcomes = await _all([self._serve_row(served, row, travel) for row in rows])
        total_ns = time.monotonic_ns() - started_ns
        served.lane.statistics.requests.add(total_ns, len(rows))
        served.lane.statistics.last_inference_ms = time.time_ns() // 1_000_000
        for outcome in outcomes:
            self.counters.count(model, outcome)
        return build_reply(
            served.info.name,
            served.info.version,
            served.info.signature,
            [outcome.answer for outcome in outcomes],
            request,
            _explain(outcomes, total_ns),
        )

    async def ask(self, text: str, *, model: str = "commands", is_private: bool = False) -> Outcome:
        """Answer one text; the short way for programs that embed the runtime."""
        served = self._find(model, None)
        raw = text.encode()
        (row,) = served.processor.split((Tensor("text", "BYTES", (1,), (raw,)),))
        request = InferRequest((), parameters={"private": True} if is_private else {})
        deadline_ns = time.monotonic_ns() + self._timeout_ns
        names = _output_names(served.info.signature, request)
        outcome = await self._serve_row(
            served, row, self._travel(served, request, names, "local", deadline_ns)
        )
        self.counters.count(model, outcome)
        return outcome

    def _find(self, name: str, version: str | None) -> ServedModel:
        served = self._models.get(name)
        if served is None:
            raise UnknownModel(f"No such model is loaded; loaded are: {', '.join(self._models)}.")
        if version is not None and version != served.info.version:
            raise UnknownModel(f"Model {name} is loaded in version {served.info.version} only.")
        return served

    def _travel(
        self,
        served: ServedModel,
        request: InferRequest,
        outputs: tuple[str, ...],
        tenant: str,
        deadline_ns: int,
    ) -> _Travel:
        is_private = _flag(request.parameters, "private", default=False)
        wants_cache = _flag(request.parameters, "cache", default=True)
        prefix = None
        if self.recall is not None and wants_cache:
            prefix = self._prefix(served, request.parameters, outputs, tenant)
        wants_extras = bool(request.outputs) and any(
            spec.name in outputs for spec in served.info.signature.on_request
        )
        priority = priority_of(request.parameters.get("priority"))
        return _Travel(prefix, is_private, wants_extras, deadline_ns, tenant, priority)

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
            if len(self._prefixes) >= 256:  # callers choose parameters: a memo, not a place to fill
                self._prefixes.clear()
            prefix = self._prefixes[memo] = KeyPrefix(
                hashlib.blake2b(tenant.encode(), key=self._device_secret, digest_size=32).digest(),
                served.info.digest,
                served.processor.version,
                f"{served.engine or served.info.platform} {served.info.is_batch_invariant}",
                f"{served.info.accept_threshold} {self._cloud is not None} {served.processor.fusion_version}",
                parameters,
                outputs,
            )
        return prefix

    async def _serve_row(self, served: ServedModel, row: Question, travel: _Travel) -> Outcome:
        """From the cache, or with whoever asks the same right now, or computed for all who do."""
        recall = self.recall
        if travel.prefix is None or recall is None:
            return await self._compute(served, row, travel, None)
        key = travel.prefix.key(served.processor.canonical(row))
        looked_ns = time.monotonic_ns()
        found = recall.memory.get(looked_ns, key)
        while found is None and key in self._flights:
            outcome = await self._follow(key, travel.deadline_ns - looked_ns)
            if outcome is not None:
                return outcome
            looked_ns = time.monotonic_ns()
            found = recall.memory.get(looked_ns, key)
        statistics = served.lane.statistics
        if found is not None:
            statistics.cache_hit.add(time.monotonic_ns() - looked_ns)
            statistics.queue.add(0)  # as Triton counts: load generators look for it
            return recall.cached_form(key, found)
        statistics.cache_miss.add(time.monotonic_ns() - looked_ns)
        self._flights[key] = None
        try:
            outcome = await self._compute(served, row, travel, key)
        except BaseException as error:
            self._abandon(key, error)
            raise
        flight = self._flights.pop(key)
        if flight is not None:
            flight.set_result(outcome)
        is_final = outcome.origin is not Origin.CACHE and not outcome.is_degraded
        # A model that was replaced meanwhile would fill the cache with what nobody can ask for.
        if is_final and self._models.get(served.info.name) is served:
            digest = served.info.digest
            recall.put(looked_ns, key, digest, served.row_ns, outcome, is_private=travel.is_private)
        return outcome

    async def _follow(self, key: bytes, patience_ns: int) -> Outcome | None:
        """Wait for who computes `key`; None where it gave up and somebody else must. Raises Refused."""
        flight = self._flights[key]
        if flight is None:
            flight = self._flights[key] = asyncio.get_running_loop().create_future()
        self.counters.coalesced += 1
        try:
            async with asyncio.timeout(patience_ns / 1e9):
                return await asyncio.shield(flight)
        except _Abandoned:
            return None
        except TimeoutError:
            raise refusal(RefusalKind.LATE) from None

    def _abandon(self, key: bytes, error: BaseException) -> None:
        """Whatever happened to who computed `key`, let its followers go."""
        flight = self._flights.pop(key)
        if flight is not None:
            # A cancel or a refusal is this caller's own; followers have their own deadline and try again.
            own = isinstance(error, Refused) or not isinstance(error, Exception)
            flight.set_exception(_Abandoned() if own else error)
            flight.exception()  # mark as seen: its followers may be gone

    async def _compute(
        self, served: ServedModel, row: Question, travel: _Travel, key: bytes | None
    ) -> Outcome:
        """Ask the edge's model; where it is unsure and nothing forbids it, ask the cloud.

        `key` is the row's in the cache, None where the caller wants none of it.
        """
        recall = self.recall
        if key is not None and recall is not None and recall.is_disk_worthwhile(served.row_ns):
            recalled = await recall.read_disk(key, served.info.digest)
            if recalled is not None and recalled.is_fresh:
                return recalled.outcome
        try:
            edge = await served.lane.run_timed(
                row, deadline_ns=travel.deadline_ns, tenant=travel.tenant, priority=travel.priority
            )
        except Refused as refused:
            return await self._spill(served, row, travel, refused)
        decision = decide(
            confidence=edge.answer.confidence,
            accept_threshold=served.info.accept_threshold,
            link=None if self._cloud is None else self._cloud.link_state(),
            is_private=travel.is_private,
            remaining_ns=travel.deadline_ns - time.monotonic_ns(),
        )
        kept = Outcome(travel.trim(edge.answer), Origin.LOCAL, decision.reason, edge.queue_ns, edge.infer_ns)
        if not decision.escalate and not kept.is_degraded:
            return kept
        recalled = None
        if key is not None and recall is not None:
            recalled = await recall.read_disk(key, served.info.digest)  # the cloud always costs more
            if recalled is not None and recalled.is_fresh:
                return replace(recalled.outcome, queue_ns=edge.queue_ns, infer_ns=edge.infer_ns)
        if decision.escalate and self._cloud is not None:
            kept = await self._escalate(self._cloud, served, row, travel, edge.answer, kept)
        if kept.is_degraded and key is not None and recall is not None:
            stale = recall.stale_answer(key, recalled)
            if stale is not None:
                return stale.as_stale(kept)
        return kept

    async def _escalate(
        self, cloud: Cloud, served: ServedModel, row: Question, travel: _Travel, edge: Answer, kept: Outcome
    ) -> Outcome:
        """The cloud's outcome, or `kept` with the reason why there is none."""
        now_ns = time.monotonic_ns()
        deadline_ns = min(travel.deadline_ns, now_ns + self._cloud_timeout_ns)
        try:
            answer, version = await cloud_answer(
                cloud,
                served.info.name,
                served.processor,
                row,
                edge,
                deadline_ns=deadline_ns,
                wants_extras=travel.wants_extras,
            )
        except CloudUnavailable as failure:
            return replace(kept, reason=failure.reason, cloud_ns=time.monotonic_ns() - now_ns)
        except (CloudError, InvalidRequest):
            return replace(kept, reason=Reason.CLOUD_FAILED, cloud_ns=time.monotonic_ns() - now_ns)
        if self.recall is not None:
            self.recall.note_cloud_version(served.info.digest, version)
        return replace(
            kept,
            answer=travel.trim(answer),
            origin=Origin.CLOUD,
            cloud_ns=time.monotonic_ns() - now_ns,
            cloud_version=version,
        )

    async def _spill(self, served: ServedModel, row: Question, travel: _Travel, refused: Refused) -> Outcome:
        """The cloud's outcome for a row the edge has no time or room for. Raises `refused` where there is none."""
        now_ns = time.monotonic_ns()
        cloud = self._cloud
        if cloud is None or not may_spill(
            refused.kind,
            accept_threshold=served.info.accept_threshold,
            link=cloud.link_state(),
            is_private=travel.is_private,
            remaining_ns=travel.deadline_ns - now_ns,
        ):
            raise refused
        deadline_ns = min(travel.deadline_ns, now_ns + self._cloud_timeout_ns)
        try:
            answer, version = await cloud_answer(
                cloud,
                served.info.name,
                served.processor,
                row,
                None,
                deadline_ns=deadline_ns,
                wants_extras=travel.wants_extras,
            )
        except (CloudError, InvalidRequest):
            raise refused from None
        cloud_ns = time.monotonic_ns() - now_ns
        return Outcome(
            travel.trim(answer), Origin.CLOUD, Reason.OVERLOADED, cloud_ns=cloud_ns, cloud_version=version
        )


async def _all(rows: list[Coroutine[Any, Any, Outcome]]) -> list[Outcome]:
    """Run all; at the first failure cancel the rest and raise that failure itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(row, name=f"row-{i}") for i, row in enumerate(rows)]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _output_names(signature: Signature, request: InferRequest) -> tuple[str, ...]:
    """The outputs asked for, in the caller's order. Raises InvalidRequest."""
    wanted = requested_outputs(signature, request) if request.outputs else signature.outputs
    return tuple([output.name for output in wanted])


def _explain(outcomes: list[Outcome], total_ns: int) -> dict[str, Scalar]:
    """The reply's parameters: one word where all rows agree, else one per row, joined by commas."""
    origins = [outcome.origin.value for outcome in outcomes]
    reasons = [outcome.reason.value for outcome in outcomes]
    fields: dict[str, Scalar] = {
        "origin": origins[0] if len(set(origins)) == 1 else ",".join(origins),
        "reason": reasons[0] if len(set(reasons)) == 1 else ",".join(reasons),
        "degraded": any(outcome.is_degraded for outcome in outcomes),
        "queue_us": max(outcome.queue_ns for outcome in outcomes) // 1000,
        "infer_us": max(outcome.infer_ns for outcome in outcomes) // 1000,
        "cloud_us": max(outcome.cloud_ns for outcome in outcomes) // 1000,
        "total_us": total_ns // 1000,
    }
    if any(outcome.is_stale for outcome in outcomes):
        fields["stale"] = True
    return fields


def _flag(parameters: Mapping[str, Scalar], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"Parameter {name} must be true or false.")
    return value
