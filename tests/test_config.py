"""Every mistake in a configuration gets one sentence with file, key and fix."""

import asyncio
import socket

import msgspec
import pytest

from cloud_fallback import daemon as cloud_daemon
from cloud_fallback.config import RENAMED as CLOUD_RENAMED
from cloud_fallback.config import CloudConfig, WorkerBatchSettings, worker_id
from cloud_fallback.config import load_config as load_cloud
from edge_runtime.config import CloudSettings, Config, ServerSettings, device_id, load_config
from edge_runtime.core.errors import ConfigError
from edge_runtime.core.protocol.ids import is_id
from edge_runtime.core.protocol.topics import reply_topic
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.core.scheduling.windows import Policy
from edge_runtime.runtime import Runtime
from edge_runtime.settings import BatchSettings, BrokerSettings, RequestSettings, policy_of, queue_limits_of


def test_nothing_and_an_empty_file_give_the_defaults(tmp_path):
    empty = tmp_path / "edge.toml"
    empty.write_text("")
    assert load_config(None) == load_config(empty) == Config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modles = []", ["modles", "unknown key", "models"]),
        ("[cache]\nmax_byte = 3", ["[cache] max_byte", "Did you mean max_bytes?"]),
        ('[cache]\nmax_bytes = "3"', ["[cache] max_bytes", "whole number", "text"]),
        ("[cache]\nmax_bytes = 0", ["[cache] max_bytes", ">= 1"]),
        ("[cache]\ndisk_max_bytes = 1000", ["[cache] disk_max_bytes", ">= 4194304"]),
        ("[cache]\nstale_s = -1", ["[cache] stale_s", ">= 0"]),
        ("[cloud]\ntenant = 'x'", ["[cloud] broker", "missing"]),
        ("[cloud]\nbroker = 'http://x'", ["[cloud] broker", "mqtt://"]),
        ("[cloud]\nbroker = 'mqtt://x'\ntenant = 'A B'", ["[cloud] tenant", "id"]),
        ("[server]\ntcp = 'nonsense'", ["[server] tcp", "HOST:PORT"]),
        ("models = []", ["models", "empty"]),
        ("x = = 1", ["not valid TOML"]),
        ("[cache]\npath = ''", ["[cache] path", "off"]),
        ("[batch]\nwindow = 'fast'", ["[batch] window", "learned"]),
        ("[batch]\nwindow = -1", ["[batch] window", ">= 0"]),
        ("[batch]\nduty_target = 0", ["[batch] duty_target", "> 0"]),
        ("[batch]\nmax = 0", ["[batch] max: expected a whole number >= 1."]),
        (
            "[cloud]\nbroker = 'mqtt://x'\ndevice = 'a..b'",
            ["[cloud] device", "without '..'", 'device = "kitchen-1"'],
        ),
        ("[cloud]\nbroker = 'mqtt://x'\ntenant = 'a..b'", ["[cloud] tenant", "without '..'"]),
        ("[cloud]\nbroker = 'mqtt://x:65536'", ["[cloud] broker", "HOST[:PORT]"]),
        ("[cloud]\nbroker = 'mqtt://x:0'", ["[cloud] broker", "HOST[:PORT]"]),
        ("[server]\ntcp = '0.0.0.0:8080'", ["[server] tcp", "0.0.0.0 is not a loopback address"]),
        ("[server]\ntcp = '127.0.0.1:\u0663'", ["[server] tcp", "HOST:PORT"]),
        ("[server]\nsocket = ''", ["[server] socket", 'socket = "off"']),
        ("[trust]\nrecord = ''", ["[trust] record", 'record = "off"']),
        ("models = ['commands', 'commands']", ["models: commands is listed twice", "Remove one"]),
        ("models = ['']", ["models: a name is empty"]),
        ("[escalation]\naccept = 2.0", ["[escalation] accept", "<= 1"]),
    ],
)
def test_a_mistake_is_named_with_its_fix(tmp_path, text, words):
    path = tmp_path / "edge.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as failure:
        load_config(path)
    message = str(failure.value)
    assert message.startswith(str(path))
    assert "\n" not in message or "TOML" in message
    for word in words:
        assert word in message


def test_the_worker_speaks_the_same_way(tmp_path):
    path = tmp_path / "cloud.toml"
    path.write_text("brokr = 'mqtt://x'")
    with pytest.raises(ConfigError, match="Did you mean broker"):
        load_cloud(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cloud(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("word", "window_ns"),
    [('"learned"', None), ('"none"', 0), ('"off"', 0), ("2", 2_000_000), ("0.5", 500_000)],
)
def test_a_window_is_a_word_or_milliseconds(tmp_path, word, window_ns):
    path = tmp_path / "edge.toml"
    path.write_text(f"[batch]\nwindow = {word}")
    assert policy_of(load_config(path).batch).window_ns == window_ns


def written(folder, text):
    path = folder / "some.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("max_batch = 7", lambda config: config.batch.max == 7),
        ("window = 3", lambda config: config.batch.window == 3),
        ("queue = 7", lambda config: config.batch.queue == 7),
        ("tenant_queue = 7", lambda config: config.batch.tenant_queue == 7),
        ("tenant_engine_share = 0.5", lambda config: config.batch.tenant_engine_share == 0.5),
        ("timeout_s = 7", lambda config: config.requests.timeout_s == 7),
        ("drain_s = 7", lambda config: config.requests.drain_s == 7),
        ("trusted_keys = ['a']", lambda config: config.trust.keys == ("a",)),
        ("allow_unsigned = true", lambda config: config.trust.unsigned),
        ("record = 'off'", lambda config: config.trust.record == "off"),
    ],
)
def test_a_former_key_is_read_beside_others_and_the_new_one_is_named(tmp_path, caplog, text, value):
    path = written(tmp_path, f"{text}\n[batch]\nqueue_bytes = 5\n[trust]\n[requests]\n")
    config = load_cloud(path)
    assert value(config)
    assert config.batch.queue_bytes == 5
    old = text.split(" ")[0]
    new = CLOUD_RENAMED.keys[old]
    section, key = new.split(".")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"{path}: {old} is now [{section}] {key}; write it there")
    caplog.clear()
    assert value(load_cloud(written(tmp_path, f"[{section}]\n{key} = {text.split(' = ')[1]}")))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("load", "text", "value"),
    [
        (load_config, '[batch]\nwindow = "none"', lambda config: config.batch.window == "off"),
        (load_cloud, 'window = "none"', lambda config: config.batch.window == "off"),
        (load_cloud, '[batch]\nwindow = "none"', lambda config: config.batch.window == "off"),
        (load_cloud, 'worker = ""', lambda config: config.worker == "auto"),
        (
            load_config,
            "[cloud]\nbroker = 'mqtt://x'\ndevice = ''",
            lambda config: config.cloud.device == "auto",
        ),
    ],
)
def test_a_former_word_is_read_and_the_new_one_is_named(tmp_path, caplog, load, text, value):
    assert value(load(written(tmp_path, text)))
    assert "is now" in caplog.records[-1].getMessage()


def test_a_former_key_beside_the_new_one_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"max_batch is the former name of \[batch\] max, .* Remove max_batch"
    ):
        load_cloud(written(tmp_path, "max_batch = 3\n[batch]\nmax = 3"))


def test_a_former_key_beside_a_section_that_is_none_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"batch: expected a \[section\], got a whole number"):
        load_cloud(written(tmp_path, "max_batch = 3\nbatch = 3"))


def test_both_tiers_have_the_same_keys_in_the_sections_they_share():
    for section in ("batch", "requests", "trust", "limits"):
        edge, cloud = getattr(Config(), section), getattr(CloudConfig(), section)
        assert msgspec.to_builtins(edge).keys() == msgspec.to_builtins(cloud).keys()
        assert isinstance(cloud, type(edge))
    access = set(msgspec.structs.asdict(BrokerSettings(broker="mqtt://x")))
    assert access <= set(msgspec.structs.asdict(CloudSettings(broker="mqtt://x")))
    assert access <= set(msgspec.structs.asdict(CloudConfig()))
    assert (Config().batch.max, CloudConfig().batch.max) == (8, 32)


def test_every_key_of_the_batch_section_takes_effect(tmp_path):
    path = written(
        tmp_path,
        "[batch]\nmax = 3\nwindow = 2\nduty_target = 0.5\nduty_wait_ms = 7\nqueue = 11\nqueue_bytes = 13\n"
        "tenant_queue = 5\ntenant_engine_share = 0.25",
    )
    for load in (load_config, load_cloud):
        batch = load(path).batch
        assert queue_limits_of(batch) == QueueLimits(3, 11, 13, 5, 0.25)
        assert policy_of(batch) == Policy(2_000_000, 0.5, 7_000_000)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(batch=BatchSettings(max=0)), r"Config: \[batch\] max: expected a whole number >= 1"),
        (
            Config(requests=RequestSettings(timeout_s="5")),
            r"\[requests\] timeout_s: expected a number, got text",
        ),
        (
            Config(requests=RequestSettings(timeout_s=float("nan"))),
            r"\[requests\] timeout_s: expected a number > 0",
        ),
        (Config(batch=7), r"batch: expected a \[section\], got a whole number"),
        (Config(models="commands"), r"models: expected a list"),
        (Config(models=()), "models: the list is empty"),
        (Config(cloud=CloudSettings(broker="mqtt://x", device="A")), r"\[cloud\] device: expected an id"),
        (Config(server=ServerSettings(tcp="nonsense")), r"\[server\] tcp: expected HOST:PORT"),
    ],
)
def test_a_configuration_made_in_a_program_is_checked_before_anything_is_loaded(config, words):
    async def opened():
        async with Runtime.open(config):
            raise AssertionError("a configuration that cannot be used was used")

    with pytest.raises(ConfigError, match=words):
        asyncio.run(opened())


def test_a_configuration_of_a_worker_made_in_a_program_is_checked_too():
    for config, words in (
        (CloudConfig(batch=WorkerBatchSettings(max=0)), r"CloudConfig: \[batch\] max"),
        (CloudConfig(depth="2"), "depth: expected a whole number"),
        (CloudConfig(worker="A B"), "worker: expected an id"),
    ):
        with pytest.raises(ConfigError, match=words):
            asyncio.run(cloud_daemon.serve(config, print))


@pytest.mark.parametrize("name", ["Kitchen Pi", "a..b", "..", "", "-x-", "käse", "x" * 80, "a" * 63 + "...b"])
def test_the_id_made_of_a_host_name_is_one_that_serve_accepts(monkeypatch, name):
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    cloud = CloudSettings(broker="mqtt://x")
    assert is_id(device_id(cloud))
    assert is_id(worker_id(CloudConfig()))
    reply_topic(cloud.tenant, device_id(cloud))  # raises for what is no id
