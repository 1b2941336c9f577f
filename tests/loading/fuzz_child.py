"""Loads and runs many broken models, each in a fork of this process, and prints what became of them.

    python -m tests.loading.fuzz_child FORMAT SEED COUNT < original files, as a JSON list of base64

A fork starts with the runner imported: that makes ten thousand files a matter of minutes. What a fork does is what
the child of the sandbox does, under the same kinds of limits, only lower.
"""

import base64
import gc
import json
import os
import resource
import signal
import sys
from collections import Counter

import msgspec

from edge_runtime.bundles.manifest import Manifest
from edge_runtime.engines.build import engine_version
from edge_runtime.loading.sandbox_child import limit_memory, probe, resident_bytes
from tests.bundles.test_folder import FIELDS
from tests.loading import mutants

RAN, REFUSED, MEMORY, ESCAPED = range(4)


def manifest_for(engine, model):
    file = {
        "name": model,
        "size": 1,
        "sha256": "",
        "stored_size": 1,
        "stored_sha256": "",
        "compression": "zstd",
    }
    fields = {**FIELDS, "format": "", "engine": engine, "model": model, "files": [file]}
    return msgspec.convert(fields, type=Manifest)


def outcome(manifest, data):
    """What becomes of one file, in words."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            resource.setrlimit(resource.RLIMIT_CPU, (2, 3))
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            signal.alarm(10)
            limit_memory(128 << 20)
            result = probe(
                manifest, {manifest.model: data}, threads=1, max_batch=2, before_bytes=resident_bytes()
            )
            code = MEMORY if result.is_out_of_memory else RAN if result.report else REFUSED
        except BaseException as error:  # noqa: BLE001 - what is not ours is what is looked for
            os.write(1, f"escaped: {error!r} {base64.b64encode(data).decode()}\n".encode())
            code = ESCAPED
        os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGXCPU, -signal.SIGALRM):
        return "timed out"
    return {RAN: "ran", REFUSED: "refused", MEMORY: "memory", ESCAPED: "escaped"}.get(code, "crashed")


def main():
    engine, seed, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    originals = [base64.b64decode(text) for text in json.load(sys.stdin)]
    damages = {"onnx": mutants.ONNX, "tflite": mutants.TFLITE}[engine]
    manifest = manifest_for(engine, f"model.{engine}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    engine_version(engine)
    # What a runner sets up for its first model, forks need not do again.
    probe(manifest, {manifest.model: originals[0]}, threads=1, max_batch=2, before_bytes=0)
    gc.freeze()  # nor copy pages only because a collector looked at them
    assert [outcome(manifest, data) for data in originals] == ["ran"] * len(originals)
    found = Counter(outcome(manifest, data) for data in mutants.mutants(originals, seed, count, damages))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
