"""Guarded lines of storage, caching, bundles and the sandbox: without its line, a test must fail.

(what is guarded, file, the line or part of it, what stands there instead, tests of which one must fail)
"""

SQLITE_THREAD = "edge_runtime/storage/sqlite_thread.py"
FILES = "edge_runtime/storage/files.py"
ANSWER_STORE = "edge_runtime/caching/answer_store.py"
TWO_LEVEL = "edge_runtime/caching/two_level.py"
CODEC = "edge_runtime/caching/outcome_codec.py"
OUTCOME = "edge_runtime/core/outcome.py"
CACHE = "edge_runtime/core/caching/cache.py"
S3FIFO = "edge_runtime/core/caching/s3fifo.py"
CLOCK = "edge_runtime/storage/clock.py"
REQUEST_ROWS = "edge_runtime/serving/request_rows.py"
FOLDER = "edge_runtime/bundles/folder.py"
SIGNING = "edge_runtime/bundles/signing.py"
ROLLBACK = "edge_runtime/bundles/rollback.py"
TRUST = "edge_runtime/bundles/trust.py"
CHILD = "edge_runtime/bundles/isolated_child.py"
STOPPABLE = "edge_runtime/bundles/stoppable.py"
SANDBOX = "edge_runtime/loading/sandbox.py"
SANDBOX_CHILD = "edge_runtime/loading/sandbox_child.py"
QUARANTINE = "edge_runtime/loading/quarantine.py"

THREAD_TESTS = ("tests/storage/test_sqlite_thread.py",)
FILES_TESTS = ("tests/storage/test_files.py",)
STORE_TESTS = ("tests/caching/test_answer_store.py",)
CACHE_TESTS = ("tests/caching/test_two_level.py",)
LEVEL_TESTS = ("tests/serving/test_service_cache.py",)
FOLDER_TESTS = ("tests/bundles/test_folder.py",)
SIGNING_TESTS = ("tests/bundles/test_signing.py",)
ROLLBACK_TESTS = ("tests/bundles/test_rollback.py",)
CHILD_TESTS = ("tests/bundles/test_isolated_child.py",)
STOPPABLE_TESTS = ("tests/bundles/test_stoppable.py",)
SANDBOX_TESTS = ("tests/loading/test_sandbox.py",)

GUARDS = [
    (
        "a kept array owns its bytes",
        TWO_LEVEL,
        "kept = replace(outcome, answer=with_own_values(outcome.answer))",
        "kept = outcome",
        CACHE_TESTS,
    ),
    ("a kept array cannot be changed", OUTCOME, "    owned.flags.writeable = False\n", "", CACHE_TESTS),
    ("a view counts its base", OUTCOME, "    base = value.base\n", "    base = None\n", CACHE_TESTS),
    ("a view of bytes counts them", OUTCOME, 'size + len(memoryview(base).cast("B"))', "size", CACHE_TESTS),
    (
        "extras are counted",
        OUTCOME,
        "_pinned_bytes(value) for value in (*answer.values, *answer.extras)",
        "_pinned_bytes(value) for value in answer.values",
        CACHE_TESTS,
    ),
    (
        "the objects around arrays are counted",
        OUTCOME,
        "_ARRAY_OBJECT = 41, 32, 120",
        "_ARRAY_OBJECT = 41, 32, 0",
        CACHE_TESTS,
    ),
    (
        "the first hit counts once",
        CACHE,
        "entry = self._eviction.peek(key)  # no use",
        "entry = self._eviction.get(key)  # no use",
        CACHE_TESTS,
    ),
    (
        "an answer that serves in need counts once",
        CACHE,
        "entry = self._eviction.peek(key)  # the request",
        "entry = self._eviction.get(key)  # the request",
        CACHE_TESTS,
    ),
    (
        "ghosts go with their entries",
        S3FIFO,
        "        self._trim_ghosts()\n        self._ghosts = {",
        "        self._ghosts = {",
        CACHE_TESTS,
    ),
    (
        "suspended time counts",
        CLOCK,
        "time.clock_gettime_ns(time.CLOCK_BOOTTIME)",
        "time.monotonic_ns()",
        CACHE_TESTS,
    ),
    (
        "suspended time counts on disk",
        ANSWER_STORE,
        "Moment(self._boot, since_boot_ns(), ",
        "Moment(self._boot, time.monotonic_ns(), ",
        STORE_TESTS,
    ),
    ("an answer is as old as its request", TWO_LEVEL, "self.now_ns() - asked_ns)", "0)", CACHE_TESTS),
    (
        "its age on disk counts from the request",
        ANSWER_STORE,
        "self._now().earlier_by(age_ns)",
        "self._now()",
        STORE_TESTS,
    ),
    (
        "the way from disk makes nothing younger",
        TWO_LEVEL,
        "self._put_in_memory(asked_ns, key, digest, outcome, found.age_ns)",
        "self._put_in_memory(self.now_ns(), key, digest, outcome, found.age_ns)",
        CACHE_TESTS,
    ),
    (
        "a row that looks again makes nothing younger",
        REQUEST_ROWS,
        "        if not self._asked_ns:",
        "        if True:",
        CACHE_TESTS,
    ),
    ("only numbers are decoded", CODEC, "not _NUMBERS.fullmatch(value.dtype)", "False", CACHE_TESTS),
    (
        "a batch is one transaction",
        SQLITE_THREAD,
        '        self._connection.execute("BEGIN IMMEDIATE")\n',
        "",
        THREAD_TESTS,
    ),
    (
        "writes wait for their batch",
        SQLITE_THREAD,
        "if self._is_due() or is_closing:",
        "if True:",
        THREAD_TESTS,
    ),
    (
        "a batch is due by its bytes",
        SQLITE_THREAD,
        "self._waiting.size_bytes >= self._batch.max_bytes",
        "False",
        THREAD_TESTS,
    ),
    (
        "closing commits what waits",
        SQLITE_THREAD,
        "if self._is_due() or is_closing:",
        "if self._is_due():",
        THREAD_TESTS,
    ),
    (
        "an error reaches every caller that waits",
        SQLITE_THREAD,
        "            job.finish(None, error)\n",
        "            pass\n",
        THREAD_TESTS,
    ),
    (
        "a cancelled caller harms no other",
        SQLITE_THREAD,
        "        if self.future.done():",
        "        if False:",
        THREAD_TESTS,
    ),
    (
        "a file of another program is left alone",
        SQLITE_THREAD,
        "if owner != file.application_id and not is_empty:",
        "if False:",
        THREAD_TESTS,
    ),
    (
        "the file is for this user alone",
        SQLITE_THREAD,
        "os.O_NOFOLLOW | os.O_CLOEXEC, 0o600",
        "os.O_NOFOLLOW | os.O_CLOEXEC, 0o640",
        THREAD_TESTS,
    ),
    (
        "and stays so if it was not",
        SQLITE_THREAD,
        "            file.path.with_name(file.path.name + suffix).chmod(0o600)\n",
        "            pass\n",
        THREAD_TESTS,
    ),
    (
        "no link is followed to the file",
        SQLITE_THREAD,
        "os.O_CREAT | os.O_NOFOLLOW",
        "os.O_CREAT",
        STORE_TESTS,
    ),
    (
        "the folder of the file is for this user alone",
        SQLITE_THREAD,
        "mkdir(mode=0o700, ",
        "mkdir(",
        THREAD_TESTS,
    ),
    (
        "content is synced before it takes its name",
        FILES,
        "        os.fsync(file.fileno())\n",
        "",
        FILES_TESTS,
    ),
    ("the new name is synced", FILES, "        os.fsync(folder)\n", "        pass\n", FILES_TESTS),
    ("a secret that others may read is refused", FILES, "    if mode & 0o077:", "    if False:", FILES_TESTS),
    (
        "a folder of another user is not relied on",
        FILES,
        "if state.st_uid not in (os.geteuid(), 0):",
        "if False:",
        FILES_TESTS,
    ),
    (
        "nor one that every user may write",
        FILES,
        "if state.st_mode & stat.S_IWOTH and not is_guarded:",
        "if False:",
        FILES_TESTS,
    ),
    (
        "a changed row is a miss",
        ANSWER_STORE,
        "        if tag != self._tag(key, *fields):",
        "        if False:",
        STORE_TESTS,
    ),
    (
        "an answer from the future is not used",
        ANSWER_STORE,
        "return age if age >= 0 else None",
        "return age",
        STORE_TESTS,
    ),
    (
        "a look-up has its limit",
        ANSWER_STORE,
        "asyncio.timeout(limit_s)",
        "asyncio.timeout(None)",
        STORE_TESTS,
    ),
    (
        "what is too large or too fast is dropped",
        ANSWER_STORE,
        "if not self.is_on or not has_room:",
        "if False:",
        STORE_TESTS,
    ),
    (
        "the oldest rows make room",
        ANSWER_STORE,
        "            database.run(_TRIM)\n",
        "            break\n",
        STORE_TESTS,
    ),
    (
        "only committed rows count as kept",
        ANSWER_STORE,
        "size, self._count_kept\n        )",
        "size, lambda: None\n        )\n        self._count_kept()",
        STORE_TESTS,
    ),
    (
        "answers of other models are dropped",
        ANSWER_STORE,
        "WHERE model NOT IN",
        "WHERE 0 AND model NOT IN",
        STORE_TESTS,
    ),
    (
        "private answers stay off the disk",
        TWO_LEVEL,
        "if self.disk is None or is_private:",
        "if self.disk is None:",
        LEVEL_TESTS,
    ),
    (
        "an answer of the disk keeps its age",
        TWO_LEVEL,
        "digest, outcome, found.age_ns)",
        "digest, outcome)",
        LEVEL_TESTS,
    ),
    (
        "answers of an older cloud are dropped",
        TWO_LEVEL,
        'unless=lambda kept: kept.cloud_version in ("", version)',
        "unless=lambda kept: True",
        LEVEL_TESTS,
    ),
    (
        "only the cloud's answers serve past their time",
        TWO_LEVEL,
        "and found.reason is Reason.UNSURE",
        "",
        LEVEL_TESTS,
    ),
    (
        "a payload is what its digest says, as stored",
        FOLDER,
        "_sha256(stored) != entry.stored_sha256",
        "False",
        FOLDER_TESTS,
    ),
    (
        "a payload is what its digest says, unpacked",
        FOLDER,
        "_sha256(plain) != entry.sha256",
        "False",
        FOLDER_TESTS,
    ),
    (
        "a file with a second name is refused",
        FOLDER,
        "(state.st_nlink != 1 and not may_be_linked)",
        "False",
        FOLDER_TESTS,
    ),
    ("unlisted files are refused", FOLDER, "    if unlisted:", "    if False:", FOLDER_TESTS),
    ("an unsigned bundle is refused", FOLDER, "if trust.allow_unsigned:", "if True:", SIGNING_TESTS),
    (
        "a false signature is refused",
        SIGNING,
        "    except InvalidSignature:\n        return False\n",
        "    except InvalidSignature:\n        return True\n",
        SIGNING_TESTS,
    ),
    (
        "only trusted keys count",
        SIGNING,
        "for record in records if record[:16] in keys]",
        "for record in records for keys in [dict.fromkeys([record[:16]], next(iter(keys.values())))]]",
        SIGNING_TESTS,
    ),
    ("a key of small order is refused", SIGNING, "in _SMALL_ORDER:", "in ():", SIGNING_TESTS),
    ("a version never sinks", ROLLBACK, "if candidate.version < floor.version:", "if False:", ROLLBACK_TESTS),
    (
        "a version has one content",
        ROLLBACK,
        "if key == entry and candidate",
        "if False and candidate",
        ROLLBACK_TESTS,
    ),
    (
        "a floor is on disk before anything is served",
        TRUST,
        "                write_durably(self._path, msgspec.json.encode(floors))\n",
        "                pass\n",
        SIGNING_TESTS,
    ),
    (
        "a child inherits no environment",
        CHILD,
        "env=environment | _ENVIRONMENT",
        "env=dict(os.environ) | _ENVIRONMENT",
        CHILD_TESTS,
    ),
    ("a child runs in an empty folder", CHILD, "cwd=folder, ", "", CHILD_TESTS),
    ("a child is isolated from the user", CHILD, '"-I", "-S", "-B"', '"-S", "-B"', CHILD_TESTS),
    ("a child has no site packages of its own accord", CHILD, '"-I", "-S", "-B"', '"-I", "-B"', CHILD_TESTS),
    (
        "the standard library comes first",
        CHILD,
        "sys.path += sys.argv[1:]",
        "sys.path[:0] = sys.argv[1:]",
        CHILD_TESTS,
    ),
    ("the working folder is not on the path", CHILD, " and os.path.realpath(path) != here", "", CHILD_TESTS),
    ("no relative path is on the path", CHILD, "Path(path).is_absolute() and", "", CHILD_TESTS),
    (
        "a silent child is ended by the clock",
        CHILD,
        "                clock.start()\n",
        "                pass\n",
        CHILD_TESTS,
    ),
    (
        "an answer of the checker is a candidate's id",
        SIGNING,
        "done.code == 0 and answer in ids",
        "done.code == 0",
        CHILD_TESTS,
    ),
    (
        "a checker that failed has no answer",
        SIGNING,
        "done.code == 0 and answer in ids",
        "answer in ids",
        CHILD_TESTS,
    ),
    (
        "only a key with a record is an answer",
        SIGNING,
        "ids = [_id_of(key).hex() for key, _ in candidates]",
        "ids = [key_id(pem) for pem in trusted]",
        CHILD_TESTS,
    ),
    (
        "foreign files are found before the signature is checked",
        FOLDER,
        "        _check_names(folder, where)\n",
        "",
        CHILD_TESTS,
    ),
    ("a cancelled check ends its child", SIGNING, "calls(child.kill)", "calls(lambda: None)", CHILD_TESTS),
    ("a cancelled load ends between payloads", FOLDER, "            stop.check()\n", "", CHILD_TESTS),
    (
        "a bundle is verified off the event loop",
        FOLDER,
        'return await run_stoppable(lambda stop: load_bundle(path, trust, stop=stop), "load-bundle")',
        "return load_bundle(path, trust)",
        CHILD_TESTS,
    ),
    (
        "a cancelled caller waits for its work",
        STOPPABLE,
        "            while not future.done():\n",
        "            while False:\n",
        STOPPABLE_TESTS,
    ),
    (
        "a second cancel cuts nothing short",
        STOPPABLE,
        "                    continue  #",
        "                    raise  #",
        STOPPABLE_TESTS,
    ),
    (
        "a stop before the step is seen",
        STOPPABLE,
        "        self.check()  # after",
        "        #",
        STOPPABLE_TESTS,
    ),
    (
        "a cancelled caller ends the sandbox",
        SANDBOX,
        "calls(child.kill)",
        "calls(lambda: None)",
        SANDBOX_TESTS,
    ),
    (
        "the child limits its processor time",
        SANDBOX_CHILD,
        "    _limit(resource.RLIMIT_CPU, request.cpu_s, request.cpu_s + 1)\n",
        "",
        SANDBOX_TESTS,
    ),
    (
        "the child limits its memory",
        SANDBOX_CHILD,
        "    _limit(resource.RLIMIT_AS, limit, limit)\n",
        "",
        SANDBOX_TESTS,
    ),
    (
        "the child ends with its parent",
        SANDBOX_CHILD,
        "        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)\n",
        "        pass\n",
        SANDBOX_TESTS,
    ),
    ("two failures are a quarantine", QUARANTINE, ">= _MAX_FAILURES:", ">= 99:", SANDBOX_TESTS),
    (
        "another runner is probed again",
        QUARANTINE,
        "            and entry.runner == runner\n",
        "",
        SANDBOX_TESTS,
    ),
    (
        "a larger batch is probed again",
        QUARANTINE,
        "            and entry.max_batch >= max_batch\n",
        "",
        SANDBOX_TESTS,
    ),
    (
        "the memory budget holds",
        QUARANTINE,
        "and report.memory_bytes > self._budget_bytes",
        "and False",
        SANDBOX_TESTS,
    ),
]
