"""The decision path of one row: the edge's result, a decision, then the cloud or an earlier answer where it asks so.

    the edge's result ── decide ──┬── keep ──────────────────────────────────────────► local
                                  ├── keep, degraded ── stale answer of the cloud? ──► cache (stale), else local
                                  ├── escalate ── fresh answer of the cloud? ────────► cache
                                  │                 └── ask the cloud ───────────────► cloud, else as degraded
                                  ├── spill ── ask the cloud ────────────────────────► cloud (overloaded), else refused
                                  └── refuse ────────────────────────────────────────► refused

The module knows no asyncio, clock, future or cache key. Clock, log, cloud and the row's earlier answers are given, so
a replay drives it with recorded ones: `judge` and `judge_cached` decide without awaiting, and `finish` awaits only what
it was given.

Whose time it is: an outcome that the caller's own deadline has decided (`Ended.own`) says nothing to a request that
waits for the same row with more time. Such a request takes the edge's answer and decides for itself (`judge_again`).

Interleavings that the code guards against:
- Time passes between `judge` and `finish` (a task is scheduled, the disk is read): the time that the cloud is given is
  taken from the clock when it is asked, never from the decision.
- The cloud answers after its time: `Cloud.ask` has raised by then, and the row was answered without it. The cascade
  keeps nothing of a row for which an answer could come later.
- The caller is cancelled in `finish`: the cancellation passes through, since nothing here is owned by the row.
"""

from collections.abc import Callable
from typing import Protocol

import msgspec
from msgspec.structs import replace

from edge_runtime.core.errors import CloudError, EngineFailed, InvalidRequest, RefusalKind, Refused
from edge_runtime.core.escalation.decision import (
    SPILLABLE,
    Action,
    CloudUnavailable,
    Decision,
    Features,
    decide,
)
from edge_runtime.core.messages import Answer, ModelInfo, Origin, Reason
from edge_runtime.core.outcome import Outcome
from edge_runtime.processing import Processor, Question
from edge_runtime.serving.in_flight import RowResult
from edge_runtime.uplink.cloud_answer import Cloud, cloud_answer

#: Failures of the cloud that more time could have prevented: no answer came in time, or the breaker gives its probe to
#: callers alone whose time is long enough to prove something.
_FOR_WANT_OF_TIME = frozenset({Reason.CLOUD_LATE, Reason.CLOUD_OPEN})
_FROM_CLOUD = frozenset({Reason.UNSURE, Reason.OVERLOADED})


def is_from_cloud(outcome: Outcome) -> bool:
    """Whether the cloud gave the answer, now or when it was kept."""
    return outcome.reason in _FROM_CLOUD


class Model(Protocol):
    """What the cascade needs of a model."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def processor(self) -> Processor: ...


class EarlierAnswers(Protocol):
    """The answers that one row has had earlier."""

    async def find(self) -> Outcome | None:
        """Return a fresh answer that was kept meanwhile, or one from the slower level of the cache, in bounded time."""

    def stale(self) -> Outcome | None:
        """Return an answer of the cloud that is past its time and may still serve, or None. Called after `find`."""


class RequestContext(msgspec.Struct, frozen=True, gc=False):
    """What the caller of a request wants of each of its rows. `deadline_ns` is a time of the cascade's clock."""

    deadline_ns: int
    tenant: str
    flow: str
    priority: int
    is_private: bool
    wants_extras: bool


class Pending(msgspec.Struct, frozen=True):
    """A row whose outcome must be awaited; see `Cascade.finish`.

    `kept` is the outcome without the cloud and `edge` the edge's answer with its extras; both are None for a row that
    the edge refused, which has `refused`.
    """

    decision: Decision
    kept: Outcome | None = None
    edge: Answer | None = None
    refused: Refused | None = None


class Ended(msgspec.Struct, frozen=True):
    """The outcome of a row that was awaited.

    `own` is set where the caller could have had another outcome with more time: it is what another request for the same
    row decides about instead.
    """

    outcome: Outcome
    own: Pending | None = None


class LogLine(msgspec.Struct, frozen=True):
    """One decision and what came of it; `origin` and `reason` are None where the row was refused."""

    at_ns: int
    model: str
    version: str
    decision: Decision
    origin: Origin | None = None
    reason: Reason | None = None
    cloud_ns: int = 0
    cloud_version: str = ""


class Cascade:
    """Decides rows of any model, and asks the cloud for them. It has no state of its own."""

    def __init__(
        self,
        cloud: Cloud | None,
        *,
        cloud_timeout_ns: int,
        now_ns: Callable[[], int],
        log: Callable[[LogLine], None] | None = None,
    ) -> None:
        """`cloud` is given `cloud_timeout_ns` for an answer at most. `log` gets each decision once, at its end."""
        self._cloud = cloud
        self._cloud_timeout_ns = cloud_timeout_ns
        self._now_ns = now_ns
        self._log = log

    @property
    def may_keep_cloud_answers(self) -> bool:
        """Whether an answer of the cloud may outlive its request. A stranger's answer may not: see docs/transport.md."""
        return self._cloud is not None and self._cloud.is_authenticated

    def judge(
        self, model: Model, context: RequestContext, result: RowResult, *, has_earlier: bool
    ) -> Outcome | Pending | Refused | EngineFailed:
        """Decide what is done with the edge's result of a row.

        Returns its outcome, or what must be awaited, or the error that the row ends with. `has_earlier` says whether
        `finish` could find earlier answers; without them and the cloud nothing is to be awaited.
        """
        if isinstance(result, EngineFailed):
            return result
        if isinstance(result, Refused):
            if result.kind not in SPILLABLE:
                return result
            decision = decide(self._features(model, context, None, result.kind))
            if decision.action is Action.REFUSE:
                self._write(model, decision, None)
                return result
            return Pending(decision, refused=result)
        answer = result.answer
        decision = decide(self._features(model, context, answer, None))
        kept = Outcome(
            _trimmed(answer, context), Origin.LOCAL, decision.reason, result.queue_ns, result.infer_ns
        )
        if decision.action is Action.ESCALATE or (has_earlier and kept.is_degraded):
            return Pending(decision, kept, answer)
        self._write(model, decision, kept)
        return kept

    def judge_cached(self, model: Model, context: RequestContext, found: Outcome) -> Outcome | Pending | None:
        """Decide again about a cached outcome, since threshold and cloud may have changed since it was kept.

        An answer of the cloud stays valid. An answer of the edge is judged like a new one, without running the model;
        None where the model must run all the same, because its extras are needed to fuse both tiers' answers and were
        not kept.
        """
        if is_from_cloud(found):
            return found
        answer = found.answer
        decision = decide(self._features(model, context, answer, None))
        kept = found if decision.reason is found.reason else replace(found, reason=decision.reason)
        if decision.action is not Action.ESCALATE:
            return Pending(decision, kept, answer) if kept.is_degraded else kept
        if model.processor.fusion_version is not None and not answer.extras:
            return None
        return Pending(decision, kept, answer)

    def judge_again(self, model: Model, context: RequestContext, pending: Pending) -> Outcome | Pending:
        """Decide for another request about a row that the edge has answered: one with its own deadline."""
        assert pending.kept is not None
        decision = decide(self._features(model, context, pending.edge, None))
        kept = replace(pending.kept, reason=decision.reason)
        if decision.action is Action.KEEP and not kept.is_degraded:
            self._write(model, decision, kept)
            return kept
        return Pending(decision, kept, pending.edge)

    def give_up(self, model: Model, pending: Pending) -> Ended:
        """Return the degraded outcome of a row whose time ended while another request asked the cloud for it."""
        assert pending.kept is not None
        outcome = replace(pending.kept, reason=Reason.CLOUD_LATE)
        self._write(model, pending.decision, outcome)
        return Ended(outcome, pending)

    async def finish(
        self,
        model: Model,
        context: RequestContext,
        question: Question,
        pending: Pending,
        earlier: EarlierAnswers | None,
    ) -> Ended | Refused:
        """Return the outcome of a row that must be awaited, or the edge's refusal where nobody can answer it."""
        kept = pending.kept
        if kept is None:
            return await self._spill(model, context, question, pending)
        if earlier is not None:
            found = await earlier.find()
            if found is not None and is_from_cloud(found):
                outcome = replace(found, queue_ns=kept.queue_ns, infer_ns=kept.infer_ns)
                self._write(model, pending.decision, outcome)
                return Ended(outcome)
        ended = Ended(kept, pending if kept.reason is Reason.TOO_LATE else None)
        if pending.decision.action is Action.ESCALATE:
            ended = await self._escalate(model, context, question, pending, kept)
        if ended.outcome.is_degraded and earlier is not None:
            stale = earlier.stale()
            if stale is not None:
                ended = Ended(stale.as_stale(ended.outcome), ended.own)
        self._write(model, pending.decision, ended.outcome)
        return ended

    async def _escalate(
        self, model: Model, context: RequestContext, question: Question, pending: Pending, kept: Outcome
    ) -> Ended:
        """Return the cloud's outcome, or `kept` with the reason why there is none."""
        asked_ns = self._now_ns()
        try:
            answer, version = await self._ask(model, context, question, pending.edge, asked_ns)
        except CloudUnavailable as failure:
            kept = replace(kept, reason=failure.reason, cloud_ns=self._now_ns() - asked_ns)
            had_less = context.deadline_ns < asked_ns + self._cloud_timeout_ns
            return Ended(kept, pending if had_less and failure.reason in _FOR_WANT_OF_TIME else None)
        except (CloudError, InvalidRequest):
            return Ended(replace(kept, reason=Reason.CLOUD_FAILED, cloud_ns=self._now_ns() - asked_ns))
        return Ended(
            replace(
                kept,
                answer=_trimmed(answer, context),
                origin=Origin.CLOUD,
                cloud_ns=self._now_ns() - asked_ns,
                cloud_version=version,
            )
        )

    async def _spill(
        self, model: Model, context: RequestContext, question: Question, pending: Pending
    ) -> Ended | Refused:
        """Return the cloud's outcome for a row that the edge refused, or that refusal where there is none."""
        refused = pending.refused
        assert refused is not None
        asked_ns = self._now_ns()
        try:
            answer, version = await self._ask(model, context, question, None, asked_ns)
        except (CloudError, InvalidRequest):
            self._write(model, pending.decision, None)
            return refused
        outcome = Outcome(
            _trimmed(answer, context),
            Origin.CLOUD,
            pending.decision.reason,
            cloud_ns=self._now_ns() - asked_ns,
            cloud_version=version,
        )
        self._write(model, pending.decision, outcome)
        return Ended(outcome)

    async def _ask(
        self, model: Model, context: RequestContext, question: Question, edge: Answer | None, asked_ns: int
    ) -> tuple[Answer, str]:
        assert self._cloud is not None, "a decision asks the cloud only where there is one"
        return await cloud_answer(
            self._cloud,
            model.info.name,
            model.processor,
            question,
            edge,
            deadline_ns=min(context.deadline_ns, asked_ns + self._cloud_timeout_ns),
            wants_extras=context.wants_extras,
        )

    def _features(
        self, model: Model, context: RequestContext, answer: Answer | None, refused: RefusalKind | None
    ) -> Features:
        label: object = ""
        if answer is not None and model.processor.labels is not None:
            label = answer.values[0]
        return Features(
            None if answer is None else answer.confidence,
            None if answer is None else answer.raw_score,
            model.info.accept_threshold,
            label.decode("utf-8", "replace") if isinstance(label, bytes) else "",
            None if self._cloud is None else self._cloud.link_state(model.info.name),
            context.is_private,
            context.deadline_ns - self._now_ns(),
            refused,
        )

    def _write(self, model: Model, decision: Decision, outcome: Outcome | None) -> None:
        if self._log is None:
            return
        at_ns, info = self._now_ns(), model.info
        if outcome is None:
            self._log(LogLine(at_ns, info.name, info.version, decision))
        else:
            self._log(
                LogLine(
                    at_ns, info.name, info.version, decision,
                    outcome.origin, outcome.reason, outcome.cloud_ns, outcome.cloud_version,
                )
            )  # fmt: skip


def _trimmed(answer: Answer, context: RequestContext) -> Answer:
    """Leave out the outputs that the caller did not ask for: they would fill the cache."""
    if context.wants_extras or not answer.extras:
        return answer
    return Answer(answer.values, answer.confidence, raw_score=answer.raw_score)
