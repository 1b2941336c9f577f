"""Guarded lines of the daemons, their configuration, their signals and their command line."""

SIGNALS, SIGNAL_TESTS = "edge_runtime/signals.py", ("tests/test_signals.py",)
START, START_TESTS = "edge_runtime/serving/start_model.py", ("tests/serving/test_start_model.py",)
TOML, SETTINGS = "edge_runtime/typed_toml.py", "edge_runtime/settings.py"
CONFIG_TESTS = ("tests/test_config.py",)
DAEMON, DAEMON_TESTS = "edge_runtime/daemon.py", ("tests/test_daemon.py",)

#: (what is guarded, file, the line or part of it, what stands there instead, tests of which one must fail)
GUARDS = [
    (
        "a second signal ends the process at once",
        SIGNALS,
        "            os._exit(1)  # asked twice",
        "            pass  # asked twice",
        (*SIGNAL_TESTS, "tests/test_daemon.py::test_a_second_sigterm_ends_at_once"),
    ),
    (
        "a signal after the loop keeps its exit code",
        SIGNALS,
        "            signal.signal(number, lambda *_: os._exit(1))\n",
        "",
        SIGNAL_TESTS,
    ),
    (
        "a signal at the interpreter's end changes no exit code",
        SIGNALS,
        "        atexit.register(_ignore)\n",
        "",
        SIGNAL_TESTS,
    ),
    (
        "a stop cancels what is under way",
        SIGNALS,
        "        working.cancel()\n        # Not",
        "        # Not",
        ("tests/test_signals.py",),
    ),
    (
        "a cancelled caller is cancelled, also while it waits for the end of its work",
        SIGNALS,
        "        await asyncio.wait({working})\n",
        "        try:\n            await working\n        except asyncio.CancelledError:\n            pass\n",
        SIGNAL_TESTS,
    ),
    (
        "the drain waits for requests",
        DAEMON,
        "            await server.drain(config.requests.drain_s)\n",
        "",
        DAEMON_TESTS,
    ),
    (
        "an older version than one that ran is refused",
        START,
        "        admission.versions.admit(\n            model.name",
        "        (lambda *_: None)(\n            model.name",
        START_TESTS,
    ),
    (
        "a failed start closes the engines it loaded",
        START,
        "        for engine in engines:\n            engine.close()\n",
        "",
        START_TESTS,
    ),
    (
        "started models are closed",
        START,
        "        stack.push_async_callback(one.runner.close)\n",
        "",
        START_TESTS,
    ),
    ("each instance has an engine", START, "len(engines) < settings.instances", "False", START_TESTS),
    (
        "one model is served once",
        START,
        "        if one.model.name in started:\n",
        "        if False:\n",
        START_TESTS,
    ),
    (
        "a former key and its new name are not both believed",
        TOML,
        "if _look_up(tree, new) is not None:",
        "if False:",
        CONFIG_TESTS,
    ),
    ("a former key is named", TOML, '"%s: %s is now %s;', '"%s: %s %s;', CONFIG_TESTS),
    (
        "a tenant's queue takes effect",
        SETTINGS,
        "tenant_max_waiting=batch.tenant_queue",
        "tenant_max_waiting=None",
        CONFIG_TESTS,
    ),
    (
        "a misspelt window is refused",
        SETTINGS,
        'batch.window not in ("learned", "off")',
        "False",
        CONFIG_TESTS,
    ),
]
