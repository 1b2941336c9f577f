"""Lines of the scheduler that guard sequences, a bounded turn, fairness in a full queue, and time that did not run."""

SCHEDULER, QUEUEING, DISPLACEMENT, DEADLINES, WINDOWS, LANE, TIME, LEARNED = (
    f"edge_runtime/core/scheduling/{name}.py"
    for name in (
        "scheduler",
        "queueing",
        "displacement",
        "deadlines",
        "windows",
        "lane",
        "virtual_time",
        "learned_window",
    )
)
TABLES = ("tests/core/scheduling/test_scheduler.py",)
FAIRNESS = ("tests/core/scheduling/test_fairness.py",)
MACHINE = ("tests/core/scheduling/test_scheduler_machine.py",)

SEQUENCES = [
    (
        "a growing row leaves its old lane",
        SCHEDULER,
        "self._stay(now_ns, entry, staying[entry.id])",
        "self._stay(now_ns, entry, entry.queue.lane.key)",
    ),
    (
        "a growing row is known in its new lane",
        SCHEDULER,
        "        lane.staying[entry.id] = None\n",
        "",
    ),
    (
        "a lane that runs is not forgotten for a new one",
        SCHEDULER,
        "        batch = self._batches.pop(batch_id)\n",
        "        batch = self._batches.pop(batch_id)\n        batch.lane.running = 0\n",
    ),
    (
        "a member that fills a batch is a member no longer between two steps",
        SCHEDULER,
        "self._staying(lane, left) if lane.staying else self._newcomers(queue, left)",
        "self._newcomers(queue, left)",
    ),
    ("a poll is bounded", SCHEDULER, "and self._next_batch_id < end_id", ""),
    (
        "the next poll is due at once",
        SCHEDULER,
        "        if window_ns is None and self._pool.free:\n            return self._polled_ns\n",
        "",
    ),
]
FULL = [
    ("a full queue is shared out", SCHEDULER, "            if not displaced:\n", "            if True:\n"),
    ("a displaced request leaves the queue", SCHEDULER, "        if displaced:\n", "        if False:\n"),
    (
        "a displaced request is refused",
        SCHEDULER,
        "            actions += self._displaced.values()\n",
        "",
    ),
    (
        "a displaced request is refused once",
        SCHEDULER,
        "            self._displaced.clear()\n",
        "",
    ),
    (
        "a displaced request is refused at once",
        SCHEDULER,
        "        if self._displaced:\n            return self._polled_ns\n",
        "",
    ),
    (
        "a displaced request can be cancelled",
        SCHEDULER,
        " or self._displaced.pop(request_id, None) is not None",
        "",
    ),
    (
        "no higher priority yields",
        DISPLACEMENT,
        "reversed(classes[own.rank :])",
        "reversed(classes)",
    ),
    (
        "the lowest priority yields first",
        DISPLACEMENT,
        "reversed(classes[own.rank :])",
        "classes[own.rank :]",
    ),
    (
        "only a greedier caller yields",
        DISPLACEMENT,
        "chosen if theirs - freed >= max(own + each, new.rows * each) else []",
        "chosen",
    ),
    (
        "two equal requests do not displace each other",
        DISPLACEMENT,
        "max(own + each, new.rows * each)",
        "own + each",
    ),
    (
        "the greediest yields",
        DISPLACEMENT,
        "key=held.__getitem__)",
        "key=lambda flow: -held[flow])",
    ),
    (
        "the greediest tenant yields",
        DISPLACEMENT,
        "tenant = max(of_tenant, key=of_tenant.__getitem__)",
        "tenant = max(held, key=held.__getitem__).tenant",
    ),
    (
        "bytes count where bytes are short",
        DISPLACEMENT,
        "flow.waiting_bytes if by_bytes else flow.waiting",
        "flow.waiting",
    ),
    ("enough is freed", DISPLACEMENT, " and freed_bytes >= new.excess_bytes", ""),
    (
        "few are displaced for one",
        DISPLACEMENT,
        "        if len(chosen) == _MOST_DISPLACED:\n            break\n",
        "",
    ),
    (
        "no member between two steps yields",
        DISPLACEMENT,
        "        if entry.id in entry.queue.lane.staying:\n            continue\n",
        "",
    ),
    ("the newest yield", QUEUEING, "reversed(queue.entries)", "queue.entries"),
]
CALLERS = [
    ("a quota counts all callers", QUEUEING, "sum([flow.waiting for flow in named])", "0"),
    (
        "a tenant gains no time by connections",
        QUEUEING,
        "        if flow.caller is not None:\n            self._attach_named(flow)\n        elif ",
        "        flow.tenant, flow.caller = f'{flow.tenant} {flow.caller}', None\n        if ",
    ),
    (
        "a tenant is charged for its callers",
        QUEUEING,
        "        present.virtual_ns += ns\n        caller =",
        "        caller =",
    ),
    (
        "callers of a tenant take turns",
        QUEUEING,
        "flow = min(member.flows.values(), key=_virtual_ns)",
        "flow = next(iter(member.flows.values()))",
    ),
    ("a batch is shared by tenants", QUEUEING, "queue.flow.group or queue.flow, []", "queue.flow, []"),
    (
        "a tenant without callers is forgotten",
        QUEUEING,
        "            del self.tenants[flow.tenant]\n",
        "            pass\n",
    ),
    (
        "callers that left are forgotten",
        TIME,
        "            if len(absent) > _REMEMBERED:\n",
        "            if False:\n",
    ),
    ("a forecast knows the callers of a tenant", QUEUEING, "* callers + callers - 1", "+ 10 * callers"),
]
URGENCY = [
    (
        "a raised request changes its class",
        SCHEDULER,
        "self._place(now_ns, entry, self._classes[priority], lane)",
        "self._place(now_ns, entry, entry.queue.flow.priority_class, lane)",
    ),
    ("a priority is never lowered", SCHEDULER, "entry.queue.flow.priority_class.rank <= priority", "False"),
    (
        "a deadline counts, not the place",
        DEADLINES,
        'return float("inf") if entry.deadline_ns is None else entry.deadline_ns',
        "return entry.key_ns",
    ),
    (
        "a distant deadline is no worse than none",
        SCHEDULER,
        "deadline_ns if left_ns < _PATIENCE_NS else now_ns + _PATIENCE_NS",
        "deadline_ns",
    ),
]
TIME_LOST = [
    ("a frozen batch teaches nothing", SCHEDULER, "        self._unmeasured.update(self._batches)\n", ""),
    (
        "the batch after a frozen one teaches",
        SCHEDULER,
        "            self._unmeasured.remove(batch_id)\n            duration_ns = None\n",
        "            duration_ns = None\n        if self._unmeasured:\n            duration_ns = None\n",
    ),
    (
        "frozen time makes nothing stale",
        LANE,
        "            self.confirmed_ns += gap_ns\n",
        "            pass\n",
    ),
    ("frozen time ends no window", LANE, "            self.held_until_ns += gap_ns\n", ""),
    (
        "frozen time saves no engine time",
        WINDOWS,
        "            self._saved_at_ns += gap_ns\n",
        "            pass\n",
    ),
    (
        "frozen time ages nothing",
        SCHEDULER,
        "                priority_class.since_ns += gap_ns\n",
        "                pass\n",
    ),
    ("time after the gap is not put off", LANE, "if self.since_ns <= start_ns:", "if True:"),
    (
        "a class that came after the gap is not put off",
        SCHEDULER,
        "            if priority_class.since_ns <= start_ns:\n",
        "            if True:\n",
    ),
]

GUARDS = [
    *((*line, TABLES) for line in SEQUENCES),
    *((*line, FAIRNESS) for line in (*FULL, *CALLERS, *URGENCY, *TIME_LOST)),
]
