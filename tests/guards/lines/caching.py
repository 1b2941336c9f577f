"""Lines of the cache and of its key law that guard an invariant."""

KEYS = "edge_runtime/core/caching/keys.py"
CACHING, S3FIFO = "edge_runtime/core/caching/cache.py", "edge_runtime/core/caching/s3fifo.py"
TESTS = tuple(f"tests/core/caching/test_{name}.py" for name in ("keys", "cache", "s3fifo"))

LINES = [
    ("an expired answer is not fresh", CACHING, "entry.expires_ns <= now_ns", "False"),
    ("a stale one has its limit", CACHING, "entry.expires_ns + self.stale_ns <= now_ns", "False"),
    ("an answer's age counts", CACHING, "self.ttl_ns - age_ns", "self.ttl_ns"),
    ("a model is emptied", CACHING, "entry.group != group or", "True or"),
    ("the tenant is in the key", KEYS, "key=tenant_secret, ", ""),
    ("the model is in the key", KEYS, "return _fields(model_digest, ", "return _fields("),
    ("the parameters are in the key", KEYS, "(parameter_fields(parameters), outputs)", "((), outputs)"),
    (
        "the outputs are in the key",
        KEYS,
        "(parameter_fields(parameters), outputs)",
        "(parameter_fields(parameters), ())",
    ),
    ("the row is in the key", KEYS, "        keyed.update(row)\n", ""),
    ("a parameter's type is in the key", KEYS, "type(value).__name__", '""'),
    (
        "each list comes after its count",
        KEYS,
        'len(texts).to_bytes(8, "little") + _fields',
        "_fields",
    ),
    ("each field comes after its length", KEYS, 'len(raw).to_bytes(8, "little") + raw', "raw"),
    ("the row comes after its length", KEYS, '        keyed.update(len(row).to_bytes(8, "little"))\n', ""),
    ("bytes are bounded", S3FIFO, "while self.size_bytes", "while False and self.size_bytes"),
]

GUARDS = [(*line, TESTS) for line in LINES]
