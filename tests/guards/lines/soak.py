"""Lines of the soak without which it would miss a broken promise."""

ACCOUNT, CALLERS, REPORT = (f"tools/soak/{name}.py" for name in ("account", "callers", "report"))
TESTS = ("tests/tools/test_soak.py",)

LINES = [
    ("a foreign id is noticed", ACCOUNT, 'if reply.get("id") != asked.id:', "if False:"),
    (
        "a wrong intent is noticed",
        ACCOUNT,
        "if not known[text].allows((label, confidence), origin):",
        "if False:",
    ),
    ("so is a wrong confidence", ACCOUNT, "abs(verdict[1] - confidence) <= TOLERANCE", "True"),
    (
        "a private text in the cloud is noticed",
        ACCOUNT,
        'if asked.is_private and origin == "cloud":',
        "if False:",
    ),
    ("an unexpected status is noticed", ACCOUNT, "        if status != 200:\n", "        if False:\n"),
    ("memory before the warm-up does not count", ACCOUNT, "settled = series[warm:]", "settled = series"),
    ("growing memory is noticed", REPORT, "if grown > MAX_GROWTH:", "if False:"),
    (
        "a caller without an answer is noticed",
        CALLERS,
        '        self._account.breach("each caller has an answer", f"{kind}: {why}")\n',
        "",
    ),
    ("who came before the end has a claim", CALLERS, "and started >= self.stops_at", "and True"),
    (
        "a daemon that does not live is noticed",
        CALLERS,
        "if status != 200 and self.stops_at is None:",
        "if False:",
    ),
]

GUARDS = [(*line, TESTS) for line in LINES]
