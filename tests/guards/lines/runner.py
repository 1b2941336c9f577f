"""Lines of the model runner, its engines and the self-test that guard an invariant."""

RUNNER, IN_FLIGHT, SEQUENCES, BATCH, STEP, SUPERVISION, THREAD = (
    f"edge_runtime/serving/{name}.py"
    for name in (
        "model_runner", "in_flight", "sequences", "batch_run", "step_run", "supervision", "engine_thread",
    )
)  # fmt: skip
STATES, BUCKETS = "edge_runtime/engines/open_states.py", "edge_runtime/engines/buckets.py"
PREPARE, SELF_TEST = "edge_runtime/loading/prepare.py", "edge_runtime/loading/self_test.py"

RUNNER_TESTS = ("tests/serving/test_model_runner.py",)
BATCH_TESTS = ("tests/serving/test_batch_run.py",)
STEP_TESTS = ("tests/serving/test_steps.py",)
SUPERVISION_TESTS = ("tests/serving/test_supervision.py",)
ENGINE_TESTS = ("tests/engines/test_engines.py",)
MODEL_TESTS = ("tests/loading/test_model.py",)
SELF_TESTS = ("tests/loading/test_self_test.py",)

GUARDS = [
    (
        "a cancelled row leaves the queue",
        RUNNER,
        "                self._scheduler.cancel(request_id)\n                self._release(member)\n",
        "                self._release(member)\n",
        RUNNER_TESTS,
    ),
    (
        "the drain waits for what was admitted",
        RUNNER,
        "        await self._idle.wait()\n",
        "        pass\n",
        RUNNER_TESTS,
    ),
    ("submitting many rows yields", RUNNER, "if now_ns > turn_ends_ns:", "if False:", RUNNER_TESTS),
    (
        "a request that has failed submits no further row",
        RUNNER,
        "if is_all_or_nothing and request.done.done():",
        "if False:",
        RUNNER_TESTS,
    ),
    (
        "a row that cannot be prepared fails alone",
        RUNNER,
        '            self._settle(request_id, row_failed("The row could not be prepared", error))\n',
        "            raise\n",
        RUNNER_TESTS,
    ),
    (
        "an inline batch is a turn of the event loop",
        RUNNER,
        "        if wakeup_ns <= now_ns:\n            self._flush_soon()\n",
        "        if wakeup_ns <= now_ns:\n            self.flush()\n",
        STEP_TESTS,
    ),
    (
        "closing answers everybody",
        RUNNER,
        "            self._settle(request_id, refusal(RefusalKind.DRAINING))\n",
        "            pass\n",
        RUNNER_TESTS,
    ),
    (
        "no sequence goes on in an engine that lacks its state",
        RUNNER,
        "if member.sequence is not None and member.sequence.handle is not None:",
        "if False:",
        STEP_TESTS,
    ),
    (
        "a caller that leaves frees its state",
        RUNNER,
        "                self._release(member)\n        if not self._members:",
        "                pass\n        if not self._members:",
        STEP_TESTS,
    ),
    (
        "a future is set once",
        IN_FLIGHT,
        "if is_over and not self.done.done():",
        "if is_over:",
        RUNNER_TESTS,
    ),
    (
        "a caller's defect does not end the batch",
        IN_FLIGHT,
        "    except Exception:  # noqa: BLE001 - whatever",
        "    except KeyError:  # noqa: BLE001 - whatever",
        RUNNER_TESTS,
    ),
    (
        "a stream has a high-water mark",
        IN_FLIGHT,
        ">= STREAM_HIGH_WATER",
        ">= 10**9",
        STEP_TESTS,
    ),
    (
        "a paused member goes on when its reader does",
        IN_FLIGHT,
        "if self._answers.qsize() == STREAM_HIGH_WATER // 2:",
        "if False:",
        STEP_TESTS,
    ),
    (
        "a row that cannot be encoded fails alone",
        BATCH,
        "        return _encode_each(encoder, batch, buffers)\n",
        "        raise\n",
        BATCH_TESTS,
    ),
    (
        "half a row does not run",
        BATCH,
        "                buffer[...] = 0\n",
        "                pass\n",
        BATCH_TESTS,
    ),
    (
        "a row that cannot be read fails alone",
        BATCH,
        "        answers = []\n",
        "        raise\n",
        BATCH_TESTS,
    ),
    (
        "nobody gets the answer of another row",
        BATCH,
        "if len(answers) == len(batch):",
        "if answers:",
        BATCH_TESTS,
    ),
    ("rows are counted", BATCH, "if len(output) != len(batch):", "if False:", BATCH_TESTS),
    (
        "an error does not hold its batch",
        BATCH,
        "error.with_traceback(None)",
        "error",
        BATCH_TESTS,
    ),
    (
        "a step that fails releases what it opened",
        STEP,
        "            engine.release(handle)\n",
        "            pass\n",
        STEP_TESTS,
    ),
    (
        "a member waits in the lane of its next row",
        STEP,
        "NextStep(row, tuple([array.shape for array in row]))",
        "NextStep(row, ((1,),))",
        STEP_TESTS,
    ),
    (
        "a state opened for a caller that left is released",
        SEQUENCES,
        "                self._supervisor.call(batch.engine, engine, partial(engine.release, handle))\n",
        "                pass\n",
        STEP_TESTS,
    ),
    (
        "closing releases the states that are open",
        STATES,
        "            self.release(handle)\n        self._engine.close()",
        "            pass\n        self._engine.close()",
        STEP_TESTS,
    ),
    ("a handle is never used twice", STATES, "self._next += 1", "self._next = handle + 1", STEP_TESTS),
    (
        "a batch behind a hung one has its own time",
        SUPERVISION,
        "self.hang_limit_s * (1 + len(slot.running))",
        "self.hang_limit_s",
        SUPERVISION_TESTS,
    ),
    (
        "a hung engine is handed nothing",
        SUPERVISION,
        "        self._owner.engine_down(batch.engine)\n",
        "        pass\n",
        (*SUPERVISION_TESTS, *RUNNER_TESTS),
    ),
    (
        "an engine that returned is kept",
        SUPERVISION,
        "if not slot.hung:  # the old engine returned while this one was loaded",
        "if False:",
        SUPERVISION_TESTS,
    ),
    (
        "an engine is loaded once for all batches that hang in it",
        SUPERVISION,
        " and len(slot.hung) == 1:",
        ":",
        SUPERVISION_TESTS,
    ),
    (
        "a call never meets another engine",
        SUPERVISION,
        "if slot.engine is not engine:",
        "if False:",
        SUPERVISION_TESTS,
    ),
    (
        "an idle thread keeps nothing",
        THREAD,
        "            del job, work, done  #",
        "            pass  #",
        SUPERVISION_TESTS,
    ),
    ("a thread outlives its work", THREAD, "except BaseException", "except Exception", SUPERVISION_TESTS),
    (
        "padding is zero behind a smaller batch",
        BUCKETS,
        "if buffers.used > rows:",
        "if False:",
        (*BATCH_TESTS, *ENGINE_TESTS),
    ),
    (
        "buffers of old shapes are dropped",
        BUCKETS,
        "if len(self._buckets) > _MAX_BUCKETS:",
        "if False:",
        ENGINE_TESTS,
    ),
    (
        "rows that depend on each other run alone",
        PREPARE,
        "    engine.deny_batches()\n",
        "    pass\n",
        MODEL_TESTS,
    ),
    ("outputs are what they were promised", PREPARE, "        check_output(processor, output)\n", "", MODEL_TESTS),
    (
        "a batch costs its decoding, too",
        SELF_TEST,
        "        processor.decode_batch(outputs, data)\n",
        "        pass\n",
        SELF_TESTS,
    ),
    (
        "a batch costs its encoding, too",
        SELF_TEST,
        "    processor.encode_batch(data, bound.inputs)\n",
        "",
        SELF_TESTS,
    ),
]  # fmt: skip
