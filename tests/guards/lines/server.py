"""Lines that guard the HTTP server and the codec behind it: without each, a test fails.

(what is guarded, file, the line or part of it, what stands there instead, tests that must notice)
"""

HTTP11 = "edge_runtime/server/http11.py"
SHELL = "edge_runtime/server/shell.py"
GUARD = "edge_runtime/server/browser_guard.py"
LISTENER = "edge_runtime/server/listener.py"
TABLE = "edge_runtime/server/connection_table.py"
BUDGET = "edge_runtime/server/byte_budget.py"
QUEUE = "edge_runtime/server/answer_queue.py"
BODIES = "edge_runtime/server/bodies.py"
ROUTES = "edge_runtime/server/routes.py"
DRAIN = "edge_runtime/server/drain.py"
TENANCY = "edge_runtime/server/tenancy.py"
SOCKETS = "edge_runtime/server/sockets.py"
ANSWERS = "edge_runtime/server/answers.py"
TENSORS = "edge_runtime/core/protocol/tensor_data.py"
CHECKS = "edge_runtime/core/protocol/oip_checks.py"
MACHINE_TESTS = ("tests/server/test_http11.py",)
SHELL_TESTS = ("tests/server/test_shell.py",)
DRAIN_TESTS = ("tests/server/test_drain.py",)
LIMIT_TESTS = ("tests/server/test_limits.py",)
MEMORY_TESTS = ("tests/server/test_memory.py",)
BODY_TESTS = ("tests/server/test_bodies.py",)
LISTENER_TESTS = ("tests/server/test_listener.py",)
CODEC_TESTS = ("tests/core/protocol/test_tensor_data.py",)

MACHINE = [
    ("any number of pipelined requests", HTTP11, "self.unanswered >= self._limits.pipelined", "False"),
    ("pipelined requests make room once answered", HTTP11, "self._reader.unanswered -= 1", "pass"),
    ("any number of headers", HTTP11, "self._header_count > limits.headers", "False"),
    ("headers of any size together", HTTP11, "self._head_bytes > limits.header_bytes", "False"),
    ("a header of any size", HTTP11, "size > limits.one_header_bytes", "False"),
    ("a header that never ends", HTTP11, "hidden > limits.header_bytes", "False"),
    ("empty lines without end", HTTP11, "hidden > limits.line_bytes", "False"),
    ("a request line of any length", HTTP11, "len(self._target) > self._limits.line_bytes", "False"),
    ("a chunked body of any length", HTTP11, "self._body_bytes > self._limits.body_bytes", "False"),
    ("an announced body of any length", HTTP11, "int(length) > body_limit", "False"),
    (
        "chunks of mostly framing",
        HTTP11,
        "hidden > limits.chunk_overhead_bytes + 2 * self._body_bytes",
        "False",
    ),
    (
        "hidden bytes of one message are not counted against another",
        HTTP11,
        "        elif reader.steps == before:",
        "        else:",
    ),
    (
        "trailers reach the headers",
        HTTP11,
        "        if self.state is not HEAD:\n            return  # a trailer",
        "        if False:\n            return  # a trailer",
    ),
    ("Transfer-Encoding in HTTP/1.0", HTTP11, 'if version == "1.0":', "if False:"),
    ("codings other than chunked", HTTP11, 'coding.lower() != "chunked"', "False"),
    ("a request without Host", HTTP11, 'version == "1.1" and "host" not in', 'False and "host" not in'),
    ("two Hosts", HTTP11, "            if key in _ONCE:", "            if False:"),
    ("versions other than 1.0 and 1.1", HTTP11, 'version not in ("1.0", "1.1")', "False"),
    ("an unknown expectation", HTTP11, 'expect is not None and expect.lower() != "100-continue"', "False"),
    (
        "HTTP/1.0 knows no 100",
        HTTP11,
        'headers.get("expect") if version == "1.1" else None',
        'headers.get("expect")',
    ),
    ("nothing is read after a refusal", HTTP11, "state is not DONE and state is not ERROR", "True"),
    (
        "nothing is read after the last request",
        HTTP11,
        "self._take(LAST_END if self._is_last else END)",
        "self._take(END)",
    ),
    (
        "a body behind an offer to upgrade",
        HTTP11,
        "            self._ignore_upgrade()\n",
        "            pass\n",
    ),
    (
        "the authority of an absolute target counts",
        HTTP11,
        'headers["host"] = authority',
        'headers["x"] = authority',
    ),
    (
        "an incomplete request is refused",
        HTTP11,
        "        if self._reader.state in (HEAD, BODY):\n",
        "        if False:\n",
    ),
    ("a refused HEAD has no body", HTTP11, "is_bodiless=self._is_head_request", "is_bodiless=False"),
    ("a foreign Host", GUARD, "host_name(host) not in hosts", "False"),
    ("a web page's Origin", GUARD, '"origin" in headers or', ""),
    ("a loopback address is let in, a name is not", GUARD, 'return name == "localhost" or', "return True or"),
]
SHELL_LINES = [
    (
        "requests of a peer that left are not cancelled",
        QUEUE,
        "            pending.answer.cancel()\n",
        "            pass\n",
    ),
    (
        "answers leave in the order of their requests",
        QUEUE,
        "        return self._pending.popleft()\n",
        "        return self._pending.pop()\n",
    ),
    (
        "a refusal waits for the answers before it",
        QUEUE,
        "        self._pending.append(PendingAnswer(_ready(answer)",
        "        self._pending.appendleft(PendingAnswer(_ready(answer)",
    ),
    (
        "a refused connection swallows what still comes",
        SHELL,
        "                transport.write_eof()\n                return\n",
        "                pass\n",
    ),
    (
        "a half-closed peer gets its answers",
        SHELL,
        "        self._settle()\n        return True\n",
        "        return False\n",
    ),
    (
        "a peer that closed both ways is given up",
        SHELL,
        "        if has_hung_up(self._socket()):\n            return True\n",
        "",
    ),
    (
        "a peer that does not read may not ask",
        SHELL,
        "                self._transport.pause_reading()",
        "                pass",
    ),
    (
        "a peer that reads nothing is closed",
        SHELL,
        "flow.is_stalled(now, transport.get_write_buffer_size(), limits.write_s)",
        "False",
    ),
    ("a slow body has its limit", SHELL, "now - self.since > limits.body_s or", ""),
    (
        "a body without progress has its limit",
        SHELL,
        "self._incoming.is_stalled(now, limits.body_stall_s)",
        "False",
    ),
    (
        "an idle connection is closed",
        SHELL,
        "if now - self.since > limits.idle_s and self.is_idle():",
        "if False:",
    ),
    (
        "continue comes after the answers before it",
        SHELL,
        "if head.expects_continue and not self._answers:",
        "if head.expects_continue:",
    ),
    ("continue comes at all after answers", SHELL, "        else:\n            self._continue()\n", ""),
    ("HTTP/1.0 hears that the connection stays", ANSWERS, 'elif version == "1.0":', "elif False:"),
    ("an answer to HEAD has no body", ANSWERS, "if is_bodiless else", "if False else"),
    ("HEAD is allowed where GET is", ROUTES, '(method == "GET" and request.method == "HEAD")', "False"),
    ("any number of connections", TABLE, "len(self._served) >= self._limits.connections", "False"),
]
LIMIT_LINES = [
    ("connections together stay within the budget", BUDGET, "self.held_bytes + more_bytes <= limit", "True"),
    ("uploads leave room for commands", BUDGET, "self.limit_bytes * 3 // 4", "self.limit_bytes"),
    ("a lease that was released cannot grow", BUDGET, "self.is_released or (", "("),
    ("a lease gives back what it holds", BUDGET, "        self.budget.held_bytes -= self.size_bytes\n", ""),
    (
        "a body that does not fit is not asked for",
        SHELL,
        "head.length and not config.budget.has_room(0, head.length)",
        "False",
    ),
    (
        "an answer that does not fit is not kept",
        SHELL,
        "not request.lease.resize(len(answer.body)) and",
        "False and",
    ),
    (
        "a lost connection holds nothing",
        SHELL,
        "        self._answers.cancel()\n        self._config.table",
        "        self._config.table",
    ),
    ("only an idle peer gives way", TABLE, "            if peer.is_idle():\n", "            if True:\n"),
    (
        "a peer idle for a moment does not give way",
        TABLE,
        "            if peer.since > latest:\n",
        "            if False:\n",
    ),
    (
        "of the spares the oldest gives way",
        TABLE,
        "            next(iter(self._spare)).refuse(TOO_MANY)\n",
        "            pass\n",
    ),
    (
        "a spare takes a free place",
        TABLE,
        "            self._spare.pop(peer, None)\n            self._served[peer] = None\n",
        "            pass\n",
    ),
    ("a tenant that is not configured", TENANCY, "if name not in self.names:", "if False:"),
    ("the kernel's word for a user counts", TENANCY, "if self.by_user and user is not None:", "if False:"),
    (
        "what an inflated body holds is counted",
        BODIES,
        "if not lease.resize(len(body) + len(plain)):",
        "if False:",
    ),
]
DRAIN_LINES = [
    (
        "the drain waits for nobody",
        LISTENER,
        "                    self._settled.clear()\n",
        "                    break\n",
    ),
    ("what waits in the kernel is accepted", LISTENER, "in accept_all(listening):", "in ():"),
    (
        "bytes in the kernel are owed an answer",
        DRAIN,
        "self.owes_present = self.owed_bytes > 0",
        "self.owes_present = False",
    ),
    (
        "later requests are refused",
        DRAIN,
        "self.owes_present = self.owed_bytes > 0",
        "self.owes_present = True",
    ),
    (
        "a request that is being read is owed an answer",
        DRAIN,
        "self.owes_present = is_reading_one",
        "self.owes_present = False",
    ),
    (
        "idle peers hear that the daemon ends",
        SHELL,
        "            self.refuse(DRAINING)\n\n    def _finish",
        "            pass\n\n    def _finish",
    ),
    (
        "delivered is more than written",
        SHELL,
        "not is_reading_one and not is_writing and not self._answers.is_busy",
        "True",
    ),
    ("a request half read holds the drain", SHELL, "return not is_reading_one and", "return"),
    (
        "what is not ready in the end hears why",
        LISTENER,
        "            connection.give_up()\n",
        "            pass\n",
    ),
    (
        "a draining daemon is not ready",
        ROUTES,
        "(server.is_draining or not service.is_ready)",
        "not service.is_ready",
    ),
]
OTHER_LINES = [
    (
        "the parser and its reader are no cycle",
        HTTP11,
        "            reader.parser = None\n",
        "            pass\n",
        MACHINE_TESTS,
    ),
    (
        "a connection is no cycle",
        SHELL,
        "        self._answers = AnswerQueue()\n",
        "        self._answers = AnswerQueue()\n        self._itself = self\n",
        MEMORY_TESTS,
    ),
    (
        "large bodies take turns",
        BODIES,
        "        self._turn = asyncio.Lock()\n",
        "        self._turn = asyncio.Semaphore(9)\n",
        BODY_TESTS,
    ),
    (
        "a step of decoding ends",
        "edge_runtime/serving/steps.py",
        "            return value\n        await asyncio.sleep(0)\n",
        "            return value\n",
        BODY_TESTS,
    ),
    (
        "an inflated body has a limit",
        BODIES,
        "            if size > limit_bytes:\n",
        "            if False:\n",
        BODY_TESTS,
    ),
    (
        "a model is known before its body is inflated",
        ROUTES,
        "    signature = service.model(name, version).signature\n",
        "    signature = service.models()[0].signature\n",
        BODY_TESTS,
    ),
    ("a Content-Encoding has no case", BODIES, "coding.strip().lower()", "coding", BODY_TESTS),
    (
        "a socket is removed by its maker alone",
        LISTENER,
        "if inode_of(path) == inode:",
        "if True:",
        LISTENER_TESTS,
    ),
    (
        "only this device is listened to",
        SOCKETS,
        'not all(ip_address(address.partition("%")[0]).is_loopback for address in addresses)',
        "False",
        LISTENER_TESTS,
    ),
    (
        "a number that overflows FP32",
        TENSORS,
        "        if beyond.any():\n",
        "        if False:\n",
        CODEC_TESTS,
    ),
    (
        "a number that overflows an integer",
        TENSORS,
        "if min(values) < least or max(values) > most:",
        "if False:",
        CODEC_TESTS,
    ),
    ("ragged numbers", TENSORS, "    return nested == structure\n", "    return True\n", CODEC_TESTS),
    (
        "ragged texts",
        TENSORS,
        "        if any(len(inner) != items for inner in level):\n",
        "        if False:\n",
        CODEC_TESTS,
    ),
    ("an object in place of an array", TENSORS, '    if raw[:1] != b"[":\n', "    if False:\n", CODEC_TESTS),
    ("very many lists", TENSORS, 'if raw.count(b"[") > _MAX_LISTS:', "if False:", CODEC_TESTS),
    (
        "numbers in steps",
        TENSORS,
        "    for part in _between_commas(flat):\n        yield\n",
        "    for part in _between_commas(flat):\n",
        CODEC_TESTS,
    ),
    ("shared memory", CHECKS, 'if "shared_memory_region" in parameters:', "if False:", CODEC_TESTS),
    (
        "a wrong input before its data",
        CHECKS,
        "if not _fits(entry.shape, spec.shape):",
        "if False:",
        CODEC_TESTS,
    ),
    (
        "parameters of any size",
        CHECKS,
        "    if len(raw) > LIMITS.header_bytes:  # before",
        "    if False:  # before",
        CODEC_TESTS,
    ),
]
GUARDS = [
    *((*guard, MACHINE_TESTS) for guard in MACHINE),
    *((*guard, SHELL_TESTS) for guard in SHELL_LINES),
    *((*guard, LIMIT_TESTS) for guard in LIMIT_LINES),
    *((*guard, DRAIN_TESTS) for guard in DRAIN_LINES),
    *OTHER_LINES,
]
