"""Every rule of the decision, in its order."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from edge_runtime.core.escalation.decision import LinkState, decide
from edge_runtime.core.messages import DEGRADED_REASONS, Reason

UP = LinkState(is_connected=True, is_breaker_open=False, reply_p95_ns=10)
UNSURE = {
    "confidence": 0.5,
    "accept_threshold": 0.9,
    "link": UP,
    "is_private": False,
    "remaining_ns": 1000,
}


@pytest.mark.parametrize(
    ("change", "escalate", "reason"),
    [
        ({}, True, Reason.UNSURE),
        ({"remaining_ns": None}, True, Reason.UNSURE),
        ({"confidence": 0.9}, False, Reason.CONFIDENT),
        ({"confidence": None}, False, Reason.LOCAL_ONLY),
        ({"accept_threshold": None}, False, Reason.LOCAL_ONLY),
        ({"link": None}, False, Reason.LOCAL_ONLY),
        ({"is_private": True}, False, Reason.PRIVATE),
        ({"link": LinkState(False, False, 10)}, False, Reason.LINK_DOWN),
        ({"link": LinkState(True, True, 10)}, False, Reason.CLOUD_OPEN),
        ({"link": LinkState(True, False, 1000)}, False, Reason.TOO_LATE),
    ],
)
def test_each_rule_gives_its_reason(change, escalate, reason):
    decision = decide(**(UNSURE | change))
    assert (decision.escalate, decision.reason) == (escalate, reason)


@given(
    confidence=st.none() | st.floats(0, 1),
    link=st.none() | st.builds(LinkState, st.booleans(), st.booleans(), st.integers(0, 10)),
    remaining=st.none() | st.integers(-5, 10),
)
def test_private_never_escalates_and_a_veto_is_never_silent(confidence, link, remaining):
    arguments = {"confidence": confidence, "accept_threshold": 0.8, "link": link, "remaining_ns": remaining}
    assert not decide(**arguments, is_private=True).escalate
    decision = decide(**arguments, is_private=False)
    assert decision.escalate == (decision.reason is Reason.UNSURE)
    wanted = confidence is not None and confidence < 0.8 and link is not None
    assert (decision.escalate or decision.reason in DEGRADED_REASONS) == wanted
