"""Every kind of refusal has a sentence for its caller and a status over HTTP."""

import pytest

from edge_runtime.core.errors import RefusalKind, refusal
from edge_runtime.server.answers import answer_for


@pytest.mark.parametrize("kind", RefusalKind)
def test_every_refusal_can_be_said_and_answered(kind):
    error = refusal(kind)
    assert error.kind is kind
    assert str(error).endswith(".")
    assert answer_for(error).status in (429, 503, 504)


def test_a_known_time_to_retry_replaces_the_usual_one():
    assert refusal(RefusalKind.FULL).retry_after_s == 1.0
    assert refusal(RefusalKind.FULL, 250_000_000).retry_after_s == 0.25
    assert refusal(RefusalKind.LATE).retry_after_s is None
