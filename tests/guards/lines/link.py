"""Lines of the link that tests guard: (what is guarded, file, the line or part of it, what stands there instead, tests)."""

CONNECTION, PAHO = "edge_runtime/mqtt/connection.py", "edge_runtime/mqtt/paho_adapter.py"
ENVELOPE, UPLINK = "edge_runtime/mqtt/envelope.py", "edge_runtime/uplink/uplink.py"
WORKER, DUPLICATES = "cloud_fallback/worker.py", "cloud_fallback/duplicates.py"
CONNECTION_TESTS = ("tests/mqtt/test_connection.py",)
PAHO_TESTS = ("tests/mqtt/test_paho_adapter.py",)
UPLINK_TESTS = ("tests/uplink/test_uplink.py",)
WORKER_TESTS = ("tests/cloud_fallback/test_worker.py", "tests/cloud_fallback/test_duplicates.py")

GUARDS = [
    (
        "a stale acknowledgement does not go to the new connection",
        CONNECTION,
        " and received.epoch == link.epoch",
        "",
        CONNECTION_TESTS,
    ),
    (
        "an old client's message is not handed on",
        CONNECTION,
        "elif link is self._link:",
        "else:",
        CONNECTION_TESTS,
    ),
    (
        "a planted request is not handed on",
        CONNECTION,
        "if received.message.retain:",
        "if False:",
        CONNECTION_TESTS,
    ),
    (
        "nothing is sent on a new connection with an old place",
        CONNECTION,
        "if link is not self._link:",
        "if False:",
        CONNECTION_TESTS,
    ),
    (
        "a lost connection gives its places back",
        CONNECTION,
        "        for confirmed in unconfirmed.values():\n            self.window.release()\n",
        "        for confirmed in unconfirmed.values():\n",
        CONNECTION_TESTS,
    ),
    (
        "the broker's window is kept",
        CONNECTION,
        "min(self._max_in_flight, receive_maximum or 65_535) - 1",
        "self._max_in_flight",
        CONNECTION_TESTS,
    ),
    (
        "too large a packet is not sent",
        CONNECTION,
        "if size > link.max_packet_bytes:",
        "if False:",
        CONNECTION_TESTS,
    ),
    (
        "a silent broker is given up",
        CONNECTION,
        "if not client.check_alive():",
        "if False:",
        CONNECTION_TESTS,
    ),
    (
        "a refused configuration is not tried fast",
        CONNECTION,
        "attempt = max(attempt, _PATIENT_ATTEMPT)",
        "pass",
        CONNECTION_TESTS,
    ),
    ("the first reason is kept", CONNECTION, "if not self.lost.is_set():", "if True:", CONNECTION_TESTS),
    ("a close disconnects", CONNECTION, "            link.client.disconnect()\n", "", CONNECTION_TESTS),
    (
        "an unreadable packet ends a connection, not the loop",
        PAHO,
        "except Exception as error:  # noqa: BLE001 - anything",
        "except OSError as error:  # noqa: BLE001 - anything",
        PAHO_TESTS,
    ),
    ("a TLS record is read to its end", PAHO, "and found.pending()", "and False", PAHO_TESTS),
    (
        "a caller's reply future is forgotten",
        UPLINK,
        "            self._open.pop(request_id, None)\n",
        "",
        UPLINK_TESTS,
    ),
    (
        "a lost connection frees its callers",
        UPLINK,
        'waiting.set_exception(LinkLost("The connection to the broker was lost."))',
        "pass",
        UPLINK_TESTS,
    ),
    (
        "a probe whose caller leaves is given back",
        UPLINK,
        "        except BaseException:\n            self.breaker.abandoned(permit)\n",
        "        except BaseException:\n",
        UPLINK_TESTS,
    ),
    ("a refusal is no fault", UPLINK, "if reason in _REFUSED:", "if False:", UPLINK_TESTS),
    (
        "a request is acknowledged after its reply is published",
        WORKER,
        "        await self._send(reply, received)\n",
        "        self.connection.acknowledge(received)\n        await self._send(reply, received)\n",
        WORKER_TESTS,
    ),
    (
        "the memory of replies is bounded",
        DUPLICATES,
        "while len(self._known) > self._max_known:",
        "while False:",
        WORKER_TESTS,
    ),
    (
        "a duplicate of what runs is not run",
        WORKER,
        "if self._duplicates.is_running(key):",
        "if False:",
        WORKER_TESTS,
    ),
    (
        "a refusal is not kept as the reply",
        WORKER,
        "final = reply if is_final else None",
        "final = reply",
        WORKER_TESTS,
    ),
    (
        "the drain waits for what runs",
        WORKER,
        "            await asyncio.wait(self._tasks, timeout=remaining_s)\n",
        "            break\n",
        WORKER_TESTS,
    ),
    (
        "the drain has an end",
        WORKER,
        "await asyncio.wait(self._tasks, timeout=remaining_s)",
        "await asyncio.wait(self._tasks)",
        WORKER_TESTS,
    ),
    (
        "the body makes the request, too",
        DUPLICATES,
        "hashlib.blake2b(message.payload",
        "hashlib.blake2b(b''",
        WORKER_TESTS,
    ),
]
