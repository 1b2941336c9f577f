"""Every rule of the decision, in its order; and that a logged decision can be replayed."""

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from edge_runtime.core.errors import RefusalKind
from edge_runtime.core.escalation.decision import SPILLABLE, Action, Decision, Features, LinkState, decide
from edge_runtime.core.messages import DEGRADED_REASONS, Reason

UP = LinkState(is_connected=True, is_breaker_open=False, reply_p95_ns=10)
UNSURE = {
    "confidence": 0.5,
    "raw_score": 0.4,
    "threshold": 0.9,
    "label": "stop",
    "link": UP,
    "is_private": False,
    "remaining_ns": 1000,
}
REFUSED = UNSURE | {"confidence": None, "raw_score": None, "label": "", "refused": RefusalKind.FULL}


@pytest.mark.parametrize(
    ("change", "escalate", "reason"),
    [
        ({}, True, Reason.UNSURE),
        ({"remaining_ns": None}, True, Reason.UNSURE),
        ({"confidence": 0.9}, False, Reason.CONFIDENT),
        ({"confidence": None}, False, Reason.LOCAL_ONLY),
        ({"threshold": None}, False, Reason.LOCAL_ONLY),
        ({"link": None}, False, Reason.LOCAL_ONLY),
        ({"is_private": True}, False, Reason.PRIVATE),
        ({"link": LinkState(False, False, 10)}, False, Reason.LINK_DOWN),
        ({"link": LinkState(True, True, 10)}, False, Reason.CLOUD_OPEN),
        ({"link": LinkState(True, False, 1000)}, False, Reason.TOO_LATE),
    ],
)
def test_each_rule_gives_its_reason(change, escalate, reason):
    features = Features(**(UNSURE | change))
    action = Action.ESCALATE if escalate else Action.KEEP
    assert decide(features) == Decision(action, reason, features)


@pytest.mark.parametrize(
    ("change", "action", "reason"),
    [
        ({}, Action.SPILL, Reason.OVERLOADED),
        ({"refused": RefusalKind.LATE}, Action.SPILL, Reason.OVERLOADED),
        ({"remaining_ns": None}, Action.SPILL, Reason.OVERLOADED),
        ({"link": LinkState(True, False, 999)}, Action.SPILL, Reason.OVERLOADED),
        ({"threshold": None}, Action.REFUSE, Reason.LOCAL_ONLY),
        ({"link": None}, Action.REFUSE, Reason.LOCAL_ONLY),
        ({"is_private": True}, Action.REFUSE, Reason.PRIVATE),
        ({"link": LinkState(False, False, 10)}, Action.REFUSE, Reason.LINK_DOWN),
        ({"link": LinkState(True, True, 10)}, Action.REFUSE, Reason.CLOUD_OPEN),
        ({"link": LinkState(True, False, 1000)}, Action.REFUSE, Reason.TOO_LATE),
    ],
)
def test_what_the_edge_refused_is_spilled_under_the_same_rules(change, action, reason):
    features = Features(**(REFUSED | change))
    assert decide(features) == Decision(action, reason, features)


def test_only_want_of_room_and_of_time_is_made_good_by_the_cloud():
    assert {RefusalKind.FULL, RefusalKind.LATE} == SPILLABLE


LINKS = st.none() | st.builds(LinkState, st.booleans(), st.booleans(), st.integers(0, 10))


@given(
    confidence=st.none() | st.floats(0, 1),
    link=LINKS,
    remaining=st.none() | st.integers(-5, 10),
)
def test_private_never_escalates_and_a_veto_is_never_silent(confidence, link, remaining):
    arguments = UNSURE | {
        "confidence": confidence,
        "threshold": 0.8,
        "link": link,
        "remaining_ns": remaining,
    }
    assert decide(Features(**(arguments | {"is_private": True}))).action is Action.KEEP
    decision = decide(Features(**arguments))
    escalates = decision.action is Action.ESCALATE
    assert escalates == (decision.reason is Reason.UNSURE)
    wanted = confidence is not None and confidence < 0.8 and link is not None
    assert (escalates or decision.reason in DEGRADED_REASONS) == wanted


@given(
    confidence=st.none() | st.floats(0, 1),
    raw_score=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    threshold=st.none() | st.floats(0, 1),
    label=st.text(max_size=3),
    link=LINKS,
    is_private=st.booleans(),
    remaining=st.none() | st.integers(-(10**18), 10**18),
    refused=st.none() | st.sampled_from(sorted(SPILLABLE)),
)
def test_a_logged_decision_is_replayed_to_the_same_decision(
    confidence, raw_score, threshold, label, link, is_private, remaining, refused
):
    features = Features(confidence, raw_score, threshold, label, link, is_private, remaining, refused)
    decision = decide(features)
    line = msgspec.json.encode(decision)
    logged = msgspec.json.decode(line, type=Decision)
    assert logged == decision
    assert decide(logged.features) == logged


@given(
    confidence=st.floats(0, 1),
    thresholds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    link=LINKS,
)
def test_a_higher_threshold_never_turns_an_escalation_into_a_kept_answer(confidence, thresholds, link):
    low, high = (
        decide(Features(**(UNSURE | {"confidence": confidence, "threshold": t, "link": link})))
        for t in thresholds
    )
    assert not (low.action is Action.ESCALATE and high.action is Action.KEEP)
