"""The decision path of one row, driven without asyncio: a clock, a cloud, a log and earlier answers by hand."""

import ast
import inspect

import msgspec
import numpy as np
import pytest

from edge_runtime.core.errors import CloudError, EngineFailed, InvalidRequest, RefusalKind, refusal
from edge_runtime.core.escalation.decision import Action, CloudUnavailable, LinkState, decide
from edge_runtime.core.messages import Answer, InferReply, ModelInfo, Origin, Reason, Tensor
from edge_runtime.core.outcome import Outcome
from edge_runtime.serving import cascade as module
from edge_runtime.serving.cascade import Cascade, LogLine, Pending, RequestContext
from edge_runtime.serving.in_flight import Served
from tests.serving.fakes import SIGNATURE, Named

SECOND = 10**9
CONTEXT = RequestContext(10 * SECOND, "t", "", 1, is_private=False, wants_extras=False)
QUESTION = b"x@0.5"


class Model:
    def __init__(self, threshold=0.8, fusion_version=None):
        self.processor = Named(fusion_version)
        self.info = ModelInfo("named", "3", "fake", SIGNATURE, 8, True, "d", threshold)


class Cloud:
    """Answers at once; `raises` in its place."""

    is_authenticated = True

    def __init__(self, link=None, version="1", raises=None):
        self.link = link or LinkState(True, False, 0)
        self.version, self.raises, self.deadlines = version, raises, []

    def link_state(self, model):
        return self.link

    async def ask(self, model, request, *, deadline_ns):
        self.deadlines.append(deadline_ns)
        if self.raises is not None:
            raise self.raises
        outputs = (
            Tensor("label", "BYTES", (1,), (b"cloud",)),
            Tensor("confidence", "FP32", (1,), np.array([0.95], np.float32)),
            Tensor("scores", "FP32", (1, 1), np.array([[0.95]], np.float32)),
        )
        return InferReply(model, self.version, outputs)


class Earlier:
    def __init__(self, fresh=None, stale=None):
        self.fresh, self.kept, self.asked = fresh, stale, 0

    async def find(self):
        self.asked += 1
        return self.fresh

    def stale(self):
        assert self.asked, "the disk was not asked before"
        return self.kept


class Clock:
    now = 1 * SECOND

    def __call__(self):
        return self.now


def made(cloud, clock=None, log=None, cloud_timeout_ns=2 * SECOND):
    return Cascade(cloud, cloud_timeout_ns=cloud_timeout_ns, now_ns=clock or Clock(), log=log)


def drive(coroutine):
    """What the coroutine returns, without an event loop: everything it awaits must be there."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waited for something it was not given")


def served(confidence=0.5):
    answer = Answer((b"edge", np.float32(confidence)), confidence, (np.ones(1, np.float32),), confidence / 2)
    return Served(answer, 7, 11, 1)


def judged(cascade, model=None, result=None, context=CONTEXT, has_earlier=True):
    return cascade.judge(model or Model(), context, result or served(), has_earlier=has_earlier)


def test_the_module_knows_no_event_loop_and_no_clock():
    tree = ast.parse(inspect.getsource(module))
    names = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    } | {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"asyncio", "time", "threading", "random"}
    assert not any("caching" in name for name in names)


def test_a_sure_answer_is_kept_at_once_without_its_extras():
    outcome = judged(made(Cloud()), result=served(0.9))
    assert (outcome.origin, outcome.reason) == (Origin.LOCAL, Reason.CONFIDENT)
    assert (outcome.answer.extras, outcome.answer.raw_score) == ((), 0.45)
    assert (outcome.queue_ns, outcome.infer_ns) == (7, 11)
    wants = RequestContext(10 * SECOND, "t", "", 1, is_private=False, wants_extras=True)
    assert len(judged(made(Cloud()), result=served(0.9), context=wants).answer.extras) == 1


def test_an_unsure_answer_is_replaced_by_the_clouds():
    clock = Clock()
    cascade, model = made(Cloud(version="5"), clock), Model()
    pending = judged(cascade, model)
    assert pending.decision.action is Action.ESCALATE
    outcome = drive(cascade.finish(model, CONTEXT, QUESTION, pending, None)).outcome
    assert (outcome.origin, outcome.reason, outcome.cloud_version) == (Origin.CLOUD, Reason.UNSURE, "5")
    assert outcome.answer.values[0] == b"cloud"
    assert (outcome.queue_ns, outcome.infer_ns, outcome.answer.extras) == (7, 11, ())


def test_the_decision_has_all_numbers_that_it_rests_on():
    link = LinkState(True, False, 3)
    decision = judged(made(Cloud(link))).decision
    features = decision.features
    assert (features.confidence, features.raw_score, features.threshold, features.label) == (
        0.5,
        0.25,
        0.8,
        "edge",
    )
    assert (features.link, features.is_private, features.remaining_ns) == (link, False, 9 * SECOND)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (CloudUnavailable(Reason.CLOUD_LATE, ""), Reason.CLOUD_LATE),
        (CloudUnavailable(Reason.CLOUD_ABSENT, ""), Reason.CLOUD_ABSENT),
        (CloudError("no"), Reason.CLOUD_FAILED),
        (InvalidRequest("no"), Reason.CLOUD_FAILED),
    ],
)
def test_without_an_answer_of_the_cloud_the_edges_is_given_with_the_reason(failure, reason):
    cascade, model = made(Cloud(raises=failure)), Model()
    outcome = drive(cascade.finish(model, CONTEXT, QUESTION, judged(cascade, model), None)).outcome
    assert (outcome.origin, outcome.reason, outcome.is_degraded) == (Origin.LOCAL, reason, True)
    assert outcome.answer.values[0] == b"edge"


def test_a_defect_is_not_taken_for_a_failure_of_the_cloud():
    cascade, model = made(Cloud(raises=ZeroDivisionError())), Model()
    with pytest.raises(ZeroDivisionError):
        drive(cascade.finish(model, CONTEXT, QUESTION, judged(cascade, model), None))


def test_the_cloud_is_given_the_time_that_is_left_when_it_is_asked():
    clock, cloud, model = Clock(), Cloud(), Model()
    cascade = made(cloud, clock)
    pending = judged(cascade, model)
    clock.now = 3 * SECOND
    drive(cascade.finish(model, CONTEXT, QUESTION, pending, None))
    clock.now = 9 * SECOND
    drive(cascade.finish(model, CONTEXT, QUESTION, pending, None))
    assert cloud.deadlines == [5 * SECOND, 10 * SECOND]  # its own limit, then the caller's


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        (LinkState(False, False, 0), Reason.LINK_DOWN),
        (LinkState(True, True, 0), Reason.CLOUD_OPEN),
        (LinkState(True, False, 9 * SECOND), Reason.TOO_LATE),
    ],
)
def test_a_degraded_answer_gives_way_to_a_stale_one_and_the_cloud_is_not_asked(link, reason):
    cloud, model = Cloud(link), Model()
    cascade = made(cloud)
    pending = judged(cascade, model)
    stale = Outcome(Answer((b"old",), 0.9), Origin.CACHE, Reason.UNSURE, cloud_version="4")
    for kept, wanted in ((None, (Origin.LOCAL, reason)), (stale, (Origin.CACHE, Reason.STALE))):
        outcome = drive(cascade.finish(model, CONTEXT, QUESTION, pending, Earlier(stale=kept))).outcome
        assert (outcome.origin, outcome.reason, outcome.queue_ns) == (*wanted, 7)
    assert cloud.deadlines == []
    assert judged(cascade, model, has_earlier=False).reason is reason, "nothing to be awaited"


def test_a_fresh_answer_of_the_cloud_from_earlier_is_taken_and_one_of_the_edge_is_not():
    cloud, model = Cloud(), Model()
    cascade = made(cloud)
    pending = judged(cascade, model)
    fresh = Outcome(Answer((b"old",), 0.9), Origin.CACHE, Reason.UNSURE, cloud_version="4")
    outcome = drive(cascade.finish(model, CONTEXT, QUESTION, pending, Earlier(fresh))).outcome
    assert (outcome.origin, outcome.answer.values[0], outcome.infer_ns) == (Origin.CACHE, b"old", 11)
    assert cloud.deadlines == []
    local = Outcome(Answer((b"old edge",), 0.5), Origin.CACHE, Reason.CONFIDENT)
    outcome = drive(cascade.finish(model, CONTEXT, QUESTION, pending, Earlier(local))).outcome
    assert (outcome.origin, outcome.answer.values[0]) == (Origin.CLOUD, b"cloud")


# Rows that the edge refused


def test_a_row_without_room_is_spilled_to_the_cloud():
    clock, cloud, model = Clock(), Cloud(version="5"), Model()
    cascade = made(cloud, clock)
    pending = judged(cascade, model, refusal(RefusalKind.FULL))
    assert (pending.decision.action, pending.decision.features.refused) == (Action.SPILL, RefusalKind.FULL)
    outcome = drive(cascade.finish(model, CONTEXT, QUESTION, pending, Earlier())).outcome
    assert (outcome.origin, outcome.reason, outcome.cloud_version) == (Origin.CLOUD, Reason.OVERLOADED, "5")
    assert not outcome.is_degraded
    assert cloud.deadlines == [3 * SECOND]


@pytest.mark.parametrize(
    ("kind", "cloud", "change"),
    [
        (RefusalKind.QUOTA, Cloud(), {}),
        (RefusalKind.DRAINING, Cloud(), {}),
        (RefusalKind.FULL, None, {}),
        (RefusalKind.FULL, Cloud(LinkState(True, True, 0)), {}),
        (RefusalKind.FULL, Cloud(LinkState(False, False, 0)), {}),
        (RefusalKind.LATE, Cloud(LinkState(True, False, 9 * SECOND)), {}),
        (RefusalKind.FULL, Cloud(), {"is_private": True}),
    ],
)
def test_where_the_cloud_may_not_or_cannot_help_the_refusal_itself_comes_back(kind, cloud, change):
    refused = refusal(kind)
    context = msgspec.structs.replace(CONTEXT, **change)
    assert judged(made(cloud), result=refused, context=context) is refused


@pytest.mark.parametrize("failure", [CloudUnavailable(Reason.CLOUD_LATE, ""), InvalidRequest("nonsense")])
def test_a_spill_that_fails_ends_in_the_refusal(failure):
    cascade, model, refused = made(Cloud(raises=failure)), Model(), refusal(RefusalKind.FULL)
    pending = judged(cascade, model, refused)
    assert drive(cascade.finish(model, CONTEXT, QUESTION, pending, None)) is refused


def test_a_failed_row_is_no_matter_for_the_cloud():
    failed = EngineFailed("broken")
    assert judged(made(Cloud()), result=failed) is failed


# Cached outcomes


LOCAL = Outcome(Answer((b"edge", np.float32(0.85)), 0.85, (), 0.4), Origin.CACHE, Reason.CONFIDENT)


@pytest.mark.parametrize(
    ("threshold", "cloud", "reason"),
    [
        (0.8, Cloud(), Reason.CONFIDENT),
        (0.85, Cloud(), Reason.CONFIDENT),
        (None, Cloud(), Reason.LOCAL_ONLY),
        (0.9, None, Reason.LOCAL_ONLY),
    ],
)
def test_a_cached_answer_of_the_edge_is_decided_by_the_threshold_of_now(threshold, cloud, reason):
    outcome = made(cloud).judge_cached(Model(threshold), CONTEXT, LOCAL)
    assert (outcome.origin, outcome.reason) == (Origin.CACHE, reason)


def test_a_cached_answer_below_the_threshold_of_now_is_escalated_without_the_model():
    model, cloud = Model(0.9), Cloud()
    cascade = made(cloud)
    pending = cascade.judge_cached(model, CONTEXT, LOCAL)
    assert pending.decision.action is Action.ESCALATE
    assert pending.decision.features.raw_score == 0.4
    assert drive(cascade.finish(model, CONTEXT, QUESTION, pending, Earlier())).outcome.origin is Origin.CLOUD
    cloud.raises = CloudUnavailable(Reason.CLOUD_LATE, "")
    outcome = drive(cascade.finish(model, CONTEXT, QUESTION, pending, Earlier())).outcome
    assert (outcome.origin, outcome.reason) == (Origin.CACHE, Reason.CLOUD_LATE)


def test_a_cached_answer_without_the_extras_that_fusion_needs_runs_again():
    cascade = made(Cloud())
    assert cascade.judge_cached(Model(0.9, fusion_version="1"), CONTEXT, LOCAL) is None
    assert isinstance(cascade.judge_cached(Model(0.8, fusion_version="1"), CONTEXT, LOCAL), Outcome)
    down = made(Cloud(LinkState(False, False, 0)))  # nothing to fuse
    assert isinstance(down.judge_cached(Model(0.9, fusion_version="1"), CONTEXT, LOCAL), Pending)
    rich = msgspec.structs.replace(
        LOCAL, answer=msgspec.structs.replace(LOCAL.answer, extras=(np.ones(1, np.float32),))
    )
    assert isinstance(cascade.judge_cached(Model(0.9, fusion_version="1"), CONTEXT, rich), Pending)


@pytest.mark.parametrize("reason", [Reason.UNSURE, Reason.OVERLOADED])
def test_a_cached_answer_of_the_cloud_stays_valid_whatever_the_threshold(reason):
    kept = Outcome(Answer((b"cloud",), 0.3), Origin.CACHE, reason, cloud_version="1")
    assert made(Cloud()).judge_cached(Model(0.99), CONTEXT, kept) is kept


# Fusion


@pytest.mark.parametrize(("version", "label"), [("1", b"fused edge cloud"), ("2", b"cloud")])
def test_answers_are_fused_only_with_the_version_the_bundle_was_fitted_for(version, label):
    cascade, model = made(Cloud(version=version)), Model(fusion_version="1")
    outcome = drive(cascade.finish(model, CONTEXT, QUESTION, judged(cascade, model), None)).outcome
    assert outcome.answer.values[0] == label


# The log


def test_each_decision_is_logged_once_with_what_came_of_it_and_can_be_replayed():
    lines, clock, model = [], Clock(), Model()
    cloud = Cloud()
    cascade = made(cloud, clock, lines.append)
    judged(cascade, model, served(0.9))
    pending = judged(cascade, model)
    assert len(lines) == 1, "what is pending is logged at its end"
    drive(cascade.finish(model, CONTEXT, QUESTION, pending, None))
    drive(cascade.finish(model, CONTEXT, QUESTION, judged(cascade, model, refusal(RefusalKind.FULL)), None))
    cloud.link = LinkState(False, False, 0)
    judged(cascade, model, refusal(RefusalKind.FULL))
    judged(cascade, model, has_earlier=False)
    drive(cascade.finish(model, CONTEXT, QUESTION, judged(cascade, model), Earlier()))
    assert [(line.decision.action.value, line.origin, line.reason) for line in lines] == [
        ("keep", Origin.LOCAL, Reason.CONFIDENT),
        ("escalate", Origin.CLOUD, Reason.UNSURE),
        ("spill", Origin.CLOUD, Reason.OVERLOADED),
        ("refuse", None, None),
        ("keep", Origin.LOCAL, Reason.LINK_DOWN),
        ("keep", Origin.LOCAL, Reason.LINK_DOWN),
    ]
    for line in lines:
        copy = msgspec.json.decode(msgspec.json.encode(line), type=LogLine)
        assert copy == line
        assert decide(copy.decision.features) == copy.decision
    assert {(line.at_ns, line.model, line.version) for line in lines} == {(SECOND, "named", "3")}


def test_a_spill_that_failed_is_logged_as_refused():
    lines, model = [], Model()
    cascade = made(Cloud(raises=CloudUnavailable(Reason.CLOUD_LATE, "")), log=lines.append)
    pending = judged(cascade, model, refusal(RefusalKind.FULL))
    assert drive(cascade.finish(model, CONTEXT, QUESTION, pending, None)) is pending.refused
    (line,) = lines
    assert (line.decision.action, line.origin) == (Action.SPILL, None)
