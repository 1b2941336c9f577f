"""Lines of the scheduler that guard an invariant."""

BATCHING, QUEUEING, WINDOWS, POOL, LATENCY, QUOTAS, TIME = (
    f"edge_runtime/core/scheduling/{name}.py"
    for name in ("scheduler", "queueing", "windows", "engine_pool", "batch_costs", "quotas", "virtual_time")
)
TESTS = tuple(
    f"tests/core/scheduling/test_{name}.py"
    for name in ("batch_costs", "splitting", "scheduler", "scheduler_machine")
)

LINES = [
    ("a batch is bounded", BATCHING, "else lane.split.batch(lane.waiting)", "else lane.waiting"),
    ("a batch has one lane", QUEUEING, "queues := self.by_lane.get(lane, ())", "queues := [*self.queues()]"),
    (
        "a cancel touches one id",
        QUEUEING,
        "        while self.entries[at] is not entry:\n            at += 1\n",
        "",
    ),
    ("each leaves once", BATCHING, "        entry.queue.remove(entry)\n", "        pass\n"),
    ("the queue is bounded", BATCHING, "len(waiting) + self._reserved >= limits.max_waiting", "False"),
    ("and in bytes", BATCHING, "self._waiting_bytes + size_bytes > limits.max_waiting_bytes", "False"),
    ("bytes leave with their request", BATCHING, "        self._waiting_bytes -= freed_bytes\n", ""),
    ("a tenant has its part", BATCHING, "min(rows, most) > most:", "min(rows, most) > 10**9:"),
    ("a quota of time holds", QUOTAS, "if ahead_ns > 0 else 0", "if False else 0"),
    ("the late are refused on arrival", BATCHING, "if finish_ns <= deadline_ns:", "if True:"),
    (
        "the hopeless are dropped",
        BATCHING,
        "                self._drop_late(now_ns, actions)\n",
        "                pass\n",
    ),
    (
        "no batch ends after a deadline",
        BATCHING,
        "fit.apply(members, newcomers,",
        "fit.apply([], [],",
    ),
    (
        "nobody waits unseen",
        BATCHING,
        "                self._late_bound_ns = deadline_ns\n",
        "                pass\n",
    ),
    (
        "who waits again is seen",
        BATCHING,
        "            self._late_bound_ns = min(self._late_bound_ns, entry.deadline_ns)\n",
        "            pass\n",
    ),
    ("predictions heal", BATCHING, "now_ns - lane.confirmed_ns > _STALE_NS", "False"),
    (
        "an engine never idles beside other lanes",
        BATCHING,
        "if lane.waiting < len(self._waiting) and not self._windows.has_duty:",
        "if False:",
    ),
    (
        "a window leaves time for the work",
        BATCHING,
        "        if slack_ns < until_ns:\n",
        "        if False:\n",
    ),
    ("nobody waits for a full batch", WINDOWS, "now_ns if lane.waiting >= lane.costs.sizes[-1] else ", ""),
    ("members stay in their steps", BATCHING, "self._staying(lane, rows) if lane.staying else []", "[]"),
    ("an engine takes its depth at most", POOL, "        chosen.running += 1\n", ""),
    ("an engine that is down gets nothing", POOL, "if one.is_up else 0", ""),
    (
        "the same calls give the same actions",
        BATCHING,
        "batch_id = self._next_batch_id",
        "batch_id = id(actions)",
    ),
    ("tenants take turns", QUEUEING, "min(flows, key=_virtual_ns)", "next(iter(flows))"),
    (
        "turns are charged in engine time",
        TIME,
        "self._absent.pop(key, 0.0)",
        "0.0",
    ),
    ("the lowest class ages", BATCHING, "(now_ns - waits.since_ns) // ageing_ns", "0"),
    ("the earliest deadline goes first", BATCHING, "else bisect_right(keys, key_ns)", "else len(keys)"),
    (
        "a draining scheduler takes nothing",
        BATCHING,
        "        if self._is_draining:\n",
        "        if False:\n",
    ),
    ("speed follows throttling", LATENCY, "_SPEED_WEIGHT = 0.2", "_SPEED_WEIGHT = 0.02"),
]

GUARDS = [(*line, TESTS) for line in LINES]
