import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.errors import InvalidRequest
from edge_runtime.core.protocol import topics

IDS = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True).filter(lambda name: ".." not in name)


@given(IDS, IDS, IDS)
def test_what_is_built_is_read_back(tenant, device, model):
    topic = topics.request_topic(tenant, device, model)
    parsed = topics.parse_request_topic(topic)
    assert parsed == topics.RequestTopic(tenant, device, model)
    assert topics.reply_topic_for(parsed) == f"er/v1/{tenant}/{device}/rsp"


@given(st.text(max_size=300))
def test_any_text_parses_or_is_invalid(text):
    try:
        parsed = topics.parse_request_topic(text)
    except InvalidRequest:
        return
    assert topics.request_topic(parsed.tenant, parsed.device, parsed.model) == text


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "er/v1/home/me/req",
        "er/v1/home/me/req/commands/extra",
        "er/v1/home/me/req/",
        "er/v1//me/req/commands",
        "/er/v1/home/me/req/commands",
        "er/v2/home/me/req/commands",
        "er/v1/home/me/rsp/commands",
        "er/v1/+/me/req/commands",
        "er/v1/home/#/req/commands",
        "er/v1/$SYS/me/req/commands",
        "er/v1/home/me/req/a..b",
        "er/v1/home/me/req/..",
        "er/v1/Home/me/req/commands",
        "er/v1/home/me\n/req/commands",
        "er/v1/home/me/req/commands\n",
        "er/v1/_worker/w1/req/commands",
        "er/v1/home/" + "d" * 65 + "/req/commands",
        "e" * 65_535,
        "/" * 65_535,
    ],
)
def test_malformed_topics_are_refused(topic):
    with pytest.raises(InvalidRequest):
        topics.parse_request_topic(topic)


@pytest.mark.parametrize("name", ["", "+", "#", "a/b", "A", "-a", ".a", "a..b", "a" * 65, "ä", "a "])
def test_names_that_are_no_ids_build_no_topic(name):
    for build in (
        lambda: topics.request_topic(name, "d", "m"),
        lambda: topics.request_topic("t", name, "m"),
        lambda: topics.request_topic("t", "d", name),
        lambda: topics.worker_filter(name, "m"),
        lambda: topics.worker_filter("g", name),
        lambda: topics.worker_state_topic(name),
        lambda: topics.device_state_topic("t", name),
        lambda: topics.device_client_id("t", name),
        lambda: topics.device_client_id(name, "d"),
        lambda: topics.worker_client_id(name),
        lambda: topics.worker_check_topic("w", name),
        lambda: topics.worker_check_topic(name, "m"),
    ):
        with pytest.raises(InvalidRequest):
            build()


@given(IDS, IDS, IDS, IDS, IDS)
def test_client_ids_are_injective_and_devices_and_workers_apart(a, b, c, d, worker):
    one, other = topics.device_client_id(a, b), topics.device_client_id(c, d)
    assert (one == other) == ((a, b) == (c, d))
    assert one != topics.worker_client_id(worker)


def test_ids_with_dots_do_not_merge():
    assert topics.device_client_id("a.b", "c") != topics.device_client_id("a", "b.c")
    assert topics.device_client_id("a", "b") == "edge:a:b"
    assert topics.worker_client_id("a.b") == "worker:a.b"


def test_a_workers_message_to_itself_is_no_request_and_fits_its_filter():
    topic = topics.worker_check_topic("w1", "commands")
    assert topic == "er/v1/_worker/w1/req/commands"
    assert topics.is_worker_check(topic)
    assert not topics.is_worker_check("er/v1/worker/w1/req/commands")
    with pytest.raises(InvalidRequest):
        topics.parse_request_topic(topic)


def test_the_other_topics():
    assert topics.worker_filter("g", "commands") == "$share/g/er/v1/+/+/req/commands"
    assert topics.worker_state_topic("w1") == "er/v1/_worker/w1/state"
    assert topics.device_state_topic("home", "me") == "er/v1/home/me/state"
