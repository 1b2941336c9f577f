"""Lines of the cache and of its key law that guard an invariant."""

KEYS = "edge_runtime/core/caching/keys.py"
CACHING, S3FIFO = "edge_runtime/core/caching/cache.py", "edge_runtime/core/caching/s3fifo.py"
TESTS = ("tests/core/caching/test_cache.py", "tests/core/caching/test_s3fifo.py")

LINES = [
    ("an expired answer is not fresh", CACHING, "entry.expires_ns <= now_ns", "False"),
    ("a stale one has its limit", CACHING, "entry.expires_ns + self.stale_ns <= now_ns", "False"),
    ("an answer's age counts", CACHING, "self.ttl_ns - age_ns", "self.ttl_ns"),
    ("a model is emptied", CACHING, "entry.group != group or", "True or"),
    ("the tenant is in the key", KEYS, "key=tenant_secret, ", ""),
    ("the model is in the key", KEYS, "[model_digest, processing", "[processing"),
    ("the parameters are in the key", KEYS, "fields += [name, type(value).__name__, str(value)]", "pass"),
    ("the outputs are in the key", KEYS, "        fields += outputs\n", ""),
    ("the row is in the key", KEYS, "        keyed.update(row)\n", ""),
    ("bytes are bounded", S3FIFO, "while self.size_bytes", "while False and self.size_bytes"),
]

GUARDS = [(*line, TESTS) for line in LINES]
