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
        "chosen if theirs - freed >= times * (own + more) else []",
        "chosen",
    ),
    (
        "two equal requests do not displace each other",
        DISPLACEMENT,
        "times * (own + more)",
        "own",
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
        "        if len(chosen) == most:\n            break\n",
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
WHOLE = [
    (
        "a request is admitted whole or not at all",
        SCHEDULER,
        "        if excess > 0:\n",
        "        if False:\n",
    ),
    ("room that is kept counts", SCHEDULER, "        self._reserved += rows\n", ""),
    (
        "room that is kept is used up",
        SCHEDULER,
        "        self._reserved -= rows\n",
        "",
    ),
    (
        "a reserved row outlives a drain",
        SCHEDULER,
        "        elif self._is_draining:\n",
        "        if self._is_draining:\n",
    ),
    ("single rows have room", SCHEDULER, "(most - most // _PART_OF_SINGLES if taken else most)", "most"),
    (
        "an empty queue is for one request",
        SCHEDULER,
        "(most - most // _PART_OF_SINGLES if taken else most)",
        "(most - most // _PART_OF_SINGLES)",
    ),
    (
        "a whole request displaces only what holds twice as much",
        DISPLACEMENT,
        "_TIMES_GREEDIER = 2",
        "_TIMES_GREEDIER = 1",
    ),
    ("a quota counts room that is kept", SCHEDULER, " + self._reserved_by.get(tenant, 0)", ""),
    (
        "a tenant without room kept is forgotten",
        SCHEDULER,
        "            del self._reserved_by[tenant]\n",
        "            pass\n",
    ),
]
FLOWS = [
    ("a quota counts all callers", QUEUEING, "sum([flow.waiting for flow in named])", "0"),
    (
        "a tenant gains no time by connections",
        QUEUEING,
        "        if flow.name is not None:\n            self._attach_named(flow)\n        elif ",
        "        flow.tenant, flow.name = f'{flow.tenant} {flow.name}', None\n        if ",
    ),
    (
        "a tenant is charged for its callers",
        QUEUEING,
        "        present.virtual_ns += ns\n        named =",
        "        named =",
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
    ("a forecast knows the callers of a tenant", QUEUEING, "* flows + flows - 1", "+ 10 * flows"),
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
    *((*line, FAIRNESS) for line in (*FULL, *WHOLE, *FLOWS, *URGENCY, *TIME_LOST)),
]
