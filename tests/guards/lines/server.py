"""Lines that guard the HTTP server: without each, a test fails.

(what is guarded, file, the line or part of it, what stands there instead, tests that must notice)
"""

HTTP11 = "edge_runtime/server/http11.py"
SHELL = "edge_runtime/server/shell.py"
GUARD = "edge_runtime/server/browser_guard.py"
LISTENER = "edge_runtime/server/listener.py"
MACHINE_TESTS = ("tests/server/test_http11.py",)
SHELL_TESTS = ("tests/server/test_shell.py",)

GUARDS = [
    (
        "any number of pipelined requests",
        HTTP11,
        "self.unanswered >= self._limits.pipelined",
        "False",
        MACHINE_TESTS,
    ),
    (
        "pipelined requests make room once they are answered",
        HTTP11,
        "self._reader.unanswered -= 1",
        "pass",
        MACHINE_TESTS,
    ),
    ("any number of headers", HTTP11, "self._header_count > limits.headers", "False", MACHINE_TESTS),
    (
        "headers of any size together",
        HTTP11,
        "self._head_bytes > limits.header_bytes",
        "False",
        MACHINE_TESTS,
    ),
    (
        "a header that never ends",
        HTTP11,
        "self._hidden_bytes > self._limits.header_bytes",
        "False",
        MACHINE_TESTS,
    ),
    (
        "a request line of any length",
        HTTP11,
        "len(self._target) > self._limits.line_bytes",
        "False",
        MACHINE_TESTS,
    ),
    (
        "a chunked body of any length",
        HTTP11,
        "self._body_bytes > self._limits.body_bytes",
        "False",
        MACHINE_TESTS,
    ),
    ("an announced body of any length", HTTP11, "int(length) > body_limit", "False", MACHINE_TESTS),
    ("chunks of mostly framing", HTTP11, "self._hidden_bytes > most", "False", MACHINE_TESTS),
    (
        "hidden bytes of one message are not counted against another",
        HTTP11,
        "        if reader.steps == before:\n            reader",
        "        if True:\n            reader",
        MACHINE_TESTS,
    ),
    (
        "trailers reach the headers",
        HTTP11,
        "        if self.state is not HEAD:\n            return  # a trailer",
        "        if False:\n            return  # a trailer",
        MACHINE_TESTS,
    ),
    ("Transfer-Encoding in HTTP/1.0", HTTP11, 'if version == "1.0":', "if False:", MACHINE_TESTS),
    ("codings other than chunked", HTTP11, 'coding.lower() != "chunked"', "False", MACHINE_TESTS),
    (
        "a request without Host",
        HTTP11,
        'version == "1.1" and "host" not in',
        'False and "host" not in',
        MACHINE_TESTS,
    ),
    ("two Hosts", HTTP11, "key in headers and key in _ONCE", "False", MACHINE_TESTS),
    (
        "the parser and its reader are no cycle",
        HTTP11,
        "            reader.parser = None\n",
        "            pass\n",
        MACHINE_TESTS,
    ),
    (
        "nothing is read after a refusal",
        HTTP11,
        "self.is_reading = state is not DONE and state is not ERROR",
        "True",
        MACHINE_TESTS,
    ),
    ("a foreign Host", GUARD, "_host_name(host) not in hosts", "False", MACHINE_TESTS),
    ("a web page's Origin", GUARD, 'if "origin" in headers:', "if False:", MACHINE_TESTS),
    (
        "any number of connections",
        SHELL,
        "len(connections) >= self._config.max_connections",
        "False",
        SHELL_TESTS,
    ),
    (
        "requests of a peer that left are not cancelled",
        SHELL,
        "            pending.answer.cancel()\n",
        "            pass\n",
        SHELL_TESTS,
    ),
    (
        "answers leave in the order of their requests",
        SHELL,
        "        while pending and pending[0].answer.done() and",
        "        pending.rotate(-next((i for i, p in enumerate(pending) if p.answer.done()), 0))\n        while pending and pending[0].answer.done() and",
        SHELL_TESTS,
    ),
    (
        "a refusal waits for the answers before it",
        SHELL,
        "        self._pending.append(_Pending(refused, keep_alive=False))\n",
        "        self._pending.appendleft(_Pending(refused, keep_alive=False))\n",
        SHELL_TESTS,
    ),
    (
        "a refused connection swallows what still comes",
        SHELL,
        "if self._is_refused and transport.can_write_eof():",
        "if False:",
        SHELL_TESTS,
    ),
    ("the drain waits for nobody", LISTENER, "await self._quiet.wait()", "pass", SHELL_TESTS),
]
