"""Which models may be loaded here: those that came through a trial, within the memory the operator allows.

What came of a trial is remembered by the manifest's digest and the runner's version, in a small file of its own
beside the record of versions. A model that the limits ended twice is not tried again until somebody asks for it.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec

from edge_runtime.bundles.folder import Bundle
from edge_runtime.core.errors import BundleError
from edge_runtime.engines.build import engine_version
from edge_runtime.loading.sandbox import Attempt, Ended, Limits, is_possible
from edge_runtime.loading.sandbox_messages import Report, Verdict
from edge_runtime.storage.files import write_durably

_log = logging.getLogger(__name__)
_MAX_FAILURES = 2
_MAX_ENTRIES = 64  # the latest bundles of a device; an older one is tried once more
#: What a limit on memory allows beyond the budget, so that a model slightly too large is refused with its figure.
#: Mapped memory is more than what is used (measured: 430 MB for 375).
_SLACK_BYTES, _SLACK_SHARE = 64 << 20, 4


class Entry(msgspec.Struct, frozen=True):
    """What came of the trials of one bundle under one runner and one set of terms."""

    runner: str
    max_batch: int
    memory_bytes: int  # what the trial was allowed
    report: Report | None = None
    failures: tuple[str, ...] = ()


class FirstLoads:
    """Tries what has not passed here yet, and remembers."""

    def __init__(
        self,
        path: Path | None,
        *,
        memory_mb: int | None = None,
        lift: str = "",
        again: bool = False,
        limits: Limits | None = None,
    ) -> None:
        """Read `path`; None remembers nothing beyond this object, and `again` nothing of what came before it.

        `memory_mb` is the budget of a model ([limits] model_memory_mb); `lift` the command that has a
        quarantined model tried again, as the refusal names it.
        """
        self._path = path
        self._budget_bytes = None if memory_mb is None else memory_mb * 1_000_000
        self._lift = lift
        self._limits = limits or Limits()
        if self._budget_bytes is not None:
            self._limits = replace(
                self._limits,
                memory_bytes=self._budget_bytes + self._budget_bytes // _SLACK_SHARE + _SLACK_BYTES,
            )
        self._entries: dict[str, Entry] = {}
        if path is None or again:
            return
        try:
            self._entries = msgspec.json.decode(path.read_bytes(), type=dict[str, Entry])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            _log.warning("event=trial_record_reset path=%s error=%s", path, error)

    def admit(self, bundle: Bundle, *, threads: int, max_batch: int) -> Report | None:
        """What the trial of a bundle reported, trying it now if need be; None where this system cannot try.

        Raises BundleError for what must not be loaded: ended by a limit, crashed, quarantined, over the
        budget, or refused for what it is.
        """
        begun = self._begin(bundle, threads, max_batch)
        outcome = begun.run() if isinstance(begun, Attempt) else begun
        return self._settle(bundle, max_batch, begun, outcome)

    async def admit_soon(self, bundle: Bundle, *, threads: int, max_batch: int) -> Report | None:
        """As `admit`, without holding up the event loop; a cancelled caller takes the child along."""
        begun = self._begin(bundle, threads, max_batch)
        if not isinstance(begun, Attempt):
            return self._settle(bundle, max_batch, begun, begun)
        with ThreadPoolExecutor(1, thread_name_prefix="trial") as thread:
            try:
                outcome = await asyncio.get_running_loop().run_in_executor(thread, begun.run)
            except asyncio.CancelledError:
                begun.kill()  # the thread then ends at once, which leaving this block waits for
                raise
        return self._settle(bundle, max_batch, begun, outcome)

    def report_of(self, digest: str) -> Report | None:
        """What the last trial of a bundle reported, if it passed."""
        entry = self._entries.get(digest)
        return None if entry is None else entry.report

    def forget(self, digest: str) -> None:
        """Have a bundle tried again whatever came of it before."""
        if self._entries.pop(digest, None) is not None:
            self._write()

    def _begin(self, bundle: Bundle, threads: int, max_batch: int) -> Attempt | Report | None:
        """What is known, else the attempt that finds out. Raises BundleError for a quarantined bundle."""
        runner = engine_version(bundle.manifest.engine)
        if not is_possible():
            _log.warning("event=trial_skipped model=%s why=system", bundle.manifest.name)
            return None
        entry = self._entries.get(bundle.digest)
        if (
            entry is not None
            and entry.runner == runner
            and entry.report is not None
            and entry.max_batch >= max_batch
        ):
            return entry.report
        attempt = Attempt(
            bundle.manifest, bundle.files, threads=threads, max_batch=max_batch, limits=self._limits
        )
        if entry is not None and len(self._failures(entry, runner, max_batch, attempt)) >= _MAX_FAILURES:
            lift = f", or try it again with: {self._lift}" if self._lift else ""
            raise BundleError(
                f"bundle {bundle.manifest.name!r} failed its first load {_MAX_FAILURES} times (it "
                f"{entry.failures[-1]}) and is not tried again; install a mended one{lift}"
            )
        return attempt

    def _failures(self, entry: Entry, runner: str, max_batch: int, attempt: Attempt) -> tuple[str, ...]:
        """Earlier failures under the same terms; with another runner, batch or budget, the bundle begins anew."""
        same = (entry.runner, entry.max_batch, entry.memory_bytes) == (
            runner,
            max_batch,
            attempt.memory_bytes,
        )
        return entry.failures if same else ()

    def _settle(
        self,
        bundle: Bundle,
        max_batch: int,
        begun: Attempt | Report | None,
        outcome: Verdict | Ended | Report | None,
    ) -> Report | None:
        """Remember what came of an attempt; return the report, or raise BundleError."""
        name = bundle.manifest.name
        report = outcome if isinstance(outcome, Report) else None
        if isinstance(begun, Attempt):
            runner = engine_version(bundle.manifest.engine)
            entry = Entry(runner, max_batch, begun.memory_bytes)
            if isinstance(outcome, Ended):
                known = self._entries.get(bundle.digest)
                before = () if known is None else self._failures(known, runner, max_batch, begun)
                self._remember(
                    bundle.digest, msgspec.structs.replace(entry, failures=(*before, outcome.reason))
                )
                raise self._ended(name, outcome)
            assert isinstance(outcome, Verdict)
            if outcome.report is None:
                # Said by our own checks, at no risk, and perhaps of this device (a missing package): not held against it.
                raise BundleError(outcome.refusal)
            report = outcome.report
            _log.info(
                "event=model_tried model=%s digest=%.12s memory_mb=%.1f load_ms=%.1f",
                name, bundle.digest, report.memory_bytes / 1e6, report.load_ns / 1e6,
            )  # fmt: skip
            self._remember(bundle.digest, msgspec.structs.replace(entry, report=report))
        if report is not None and self._budget_bytes is not None and report.memory_bytes > self._budget_bytes:
            raise BundleError(
                f"model {name!r} needs {report.memory_bytes / 1e6:.0f} MB; [limits] model_memory_mb allows "
                f"{self._budget_bytes / 1e6:.0f}; raise it or choose a smaller bundle"
            )
        return report

    def _ended(self, name: str, outcome: Ended) -> BundleError:
        advice = "install a mended bundle"
        if outcome.is_memory:
            verb = "raise" if self._budget_bytes is not None else "allow more with"
            advice = f"{verb} [limits] model_memory_mb, or choose a smaller bundle"
        return BundleError(f"bundle {name!r} failed its first load: the model {outcome.reason}; {advice}")

    def _remember(self, digest: str, entry: Entry) -> None:
        self._entries.pop(digest, None)
        self._entries[digest] = entry
        while len(self._entries) > _MAX_ENTRIES:
            del self._entries[next(iter(self._entries))]
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            write_durably(self._path, msgspec.json.encode(self._entries))
        except OSError as error:
            _log.warning("event=trial_record_not_kept path=%s error=%s", self._path, error.strerror)
