"""How a request wants to be served, read in one place for both transports."""

import math

import pytest

from edge_runtime.core.errors import InvalidRequest
from edge_runtime.core.protocol.parameters import priority_of, time_limit_ns

DAY_NS = 86_400 * 10**9


@pytest.mark.parametrize(
    ("parameters", "limit_ns"),
    [
        ({}, None),
        ({"timeout": 0}, None),  # Triton: no limit of the caller's own
        ({"timeout": 5}, 5_000),
        ({"deadline_ms": 5}, 5_000_000),
        ({"deadline_ms": 0.5}, 500_000),
        ({"deadline_ms": 0}, 0),
        ({"deadline_ms": -3.5}, 0),
        ({"deadline_ms": -math.inf}, 0),
        ({"timeout": 5_000, "deadline_ms": 3}, 3_000_000),
        ({"timeout": 2_000, "deadline_ms": 3}, 2_000_000),
        ({"timeout": 0, "deadline_ms": 3}, 3_000_000),
        ({"timeout": 10**18}, DAY_NS),
        ({"deadline_ms": 1e300}, DAY_NS),
        ({"deadline_ms": math.inf}, DAY_NS),
        ({"deadline_ms": 10**400}, DAY_NS),
    ],
)
def test_both_spellings_of_a_time_limit_are_read_and_the_shorter_holds(parameters, limit_ns):
    assert time_limit_ns(parameters) == limit_ns


@pytest.mark.parametrize(
    ("parameters", "expiry_s", "limit_ns"),
    [
        ({}, None, None),
        ({}, 0, None),
        ({}, 3, 3 * 10**9),
        ({"deadline_ms": 1500}, 2, 1_500_000_000),
        ({"deadline_ms": 1500}, 1, 10**9),  # the message waited in the broker
        ({"timeout": 500_000}, 1, 500_000_000),
        ({"timeout": 0}, 1, 10**9),
    ],
)
def test_the_expiry_of_a_message_is_a_limit_too(parameters, expiry_s, limit_ns):
    assert time_limit_ns(parameters, expiry_s=expiry_s) == limit_ns


@pytest.mark.parametrize(
    "parameters",
    [
        {"timeout": -1},
        {"timeout": 1.5},
        {"timeout": True},
        {"timeout": "5"},
        {"deadline_ms": "5"},
        {"deadline_ms": True},
        {"deadline_ms": math.nan},
    ],
)
def test_a_time_limit_that_is_none_is_refused_with_its_name(parameters):
    with pytest.raises(InvalidRequest, match=f"Parameter {next(iter(parameters))} must be"):
        time_limit_ns(parameters)


def test_priorities_have_words_and_the_numbers_of_triton():
    assert [priority_of(word) for word in ("high", "normal", "low", 1, 2, 3, 0, None)] == [
        0,
        1,
        2,
        0,
        1,
        2,
        1,
        1,
    ]
    for word in ("urgent", 4, True, 1.0, -1):
        with pytest.raises(InvalidRequest, match="Parameter priority must be"):
            priority_of(word)
