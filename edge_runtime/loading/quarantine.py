"""Which models may be loaded here: those that passed a sandboxed load, within the memory the operator allows.

Every bundle is in quarantine until a probe in the sandbox has loaded and run it. The result is remembered by the
manifest's digest and the version of the model runner, in a small file beside the version floors, so that a bundle
is probed once. A bundle whose probe was ended twice, by a limit or a crash, stays in quarantine until an operator
releases it; a refusal by our own checks does not count, because it was no risk and may be the fault of the device.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from edge_runtime.bundles.folder import Bundle
from edge_runtime.bundles.stoppable import Stop
from edge_runtime.core.errors import BundleError
from edge_runtime.engines.build import engine_version
from edge_runtime.loading.sandbox import Ended, Limits, SandboxedLoad, is_possible
from edge_runtime.loading.sandbox_messages import ProbeResult, Report
from edge_runtime.storage.record_file import RecordFile

_log = logging.getLogger(__name__)
_MAX_FAILURES = 2
_MAX_ENTRIES = 64  # the latest bundles of a device; an older one is probed once more
#: What the sandbox allows beyond the budget, so that a model slightly too large is refused with its measured figure.
#: Mapped memory is more than used memory (measured: 430 MB for 375).
_SLACK_BYTES, _SLACK_SHARE = 64 << 20, 4


class Entry(msgspec.Struct, frozen=True):
    """The probes of one bundle: with this runner, batch and memory limit it passed (`report`) or failed."""

    runner: str
    max_batch: int
    memory_bytes: int  # what the probe was allowed
    threads: int = 1
    report: Report | None = None
    failures: tuple[str, ...] = ()


class Quarantine:
    """Probes bundles that have not passed here yet, and remembers the results."""

    def __init__(
        self,
        path: Path | None,
        *,
        memory_mb: int | None = None,
        release_command: str = "",
        ignores_file: bool = False,
        limits: Limits | None = None,
    ) -> None:
        """Read `path`; with None the results live as long as this object, with `ignores_file` earlier ones do not count.

        `memory_mb` is the budget of a model ([limits] model_memory_mb); `release_command` is named in the refusal of a
        bundle that failed twice. Raises ConfigError for a file or folder that another user could change.
        """
        self._file = RecordFile(path, Entry, event="quarantine_file", setting="[trust] record")
        self._budget_bytes = None if memory_mb is None else memory_mb * 1_000_000
        self._release_command = release_command
        self._limits = limits or Limits()
        if self._budget_bytes is not None:
            self._limits = replace(
                self._limits,
                memory_bytes=self._budget_bytes + self._budget_bytes // _SLACK_SHARE + _SLACK_BYTES,
            )
        self._entries: dict[str, Entry] = {} if ignores_file else self._file.read()

    def admit(
        self, bundle: Bundle, *, threads: int, max_batch: int, stop: Stop | None = None
    ) -> Report | None:
        """Return the report of a bundle's probe, probing it if need be; None where this system has no sandbox.

        Raises BundleError for a bundle that must not be loaded: its probe was ended by a limit or crashed, it is in
        quarantine, it is over the budget, or our own checks refused it. `stop` ends the probe, which then counts for
        nothing.
        """
        known = self._known(bundle, threads, max_batch)
        result = known.run(stop) if isinstance(known, SandboxedLoad) else known
        return self._settle(bundle, threads, max_batch, known, result)

    def report_of(self, digest: str) -> Report | None:
        """Return what the last probe of a bundle reported, if it passed."""
        entry = self._entries.get(digest)
        return None if entry is None else entry.report

    def release(self, digest: str) -> None:
        """Forget all earlier probes of a bundle, so that the next `admit` probes it again."""
        self._entries.pop(digest, None)
        self._file.update(lambda saved: {key: entry for key, entry in saved.items() if key != digest})

    def _known(self, bundle: Bundle, threads: int, max_batch: int) -> SandboxedLoad | Report | None:
        """Return the remembered report, else the probe to run. Raises BundleError for a bundle in quarantine."""
        runner = engine_version(bundle.manifest.engine)
        if not is_possible():
            _log.warning("event=sandbox_skipped model=%s why=system", bundle.manifest.name)
            return None
        entry = self._entries.get(bundle.digest)
        if (
            entry is not None
            and entry.runner == runner
            and entry.report is not None
            and entry.max_batch >= max_batch
            and entry.threads >= threads
        ):
            return entry.report
        load = SandboxedLoad(
            bundle.manifest, bundle.files, threads=threads, max_batch=max_batch, limits=self._limits
        )
        if entry is not None and len(self._failures(entry, runner, max_batch, load)) >= _MAX_FAILURES:
            release = f", or release it with: {self._release_command}" if self._release_command else ""
            raise BundleError(
                f"bundle {bundle.manifest.name!r} failed its first load {_MAX_FAILURES} times (it "
                f"{entry.failures[-1]}) and is in quarantine; install a repaired one{release}"
            )
        return load

    def _failures(self, entry: Entry, runner: str, max_batch: int, load: SandboxedLoad) -> tuple[str, ...]:
        """Earlier failures under the same terms; with another runner, batch or memory limit none count."""
        terms = (runner, max_batch, load.memory_bytes)
        return entry.failures if (entry.runner, entry.max_batch, entry.memory_bytes) == terms else ()

    def _settle(
        self,
        bundle: Bundle,
        threads: int,
        max_batch: int,
        known: SandboxedLoad | Report | None,
        result: ProbeResult | Ended | Report | None,
    ) -> Report | None:
        """Remember the result of a probe; return the report, or raise BundleError."""
        name = bundle.manifest.name
        report = result if isinstance(result, Report) else None
        if isinstance(known, SandboxedLoad):
            runner = engine_version(bundle.manifest.engine)
            entry = Entry(runner, max_batch, known.memory_bytes, threads)
            if isinstance(result, Ended):
                earlier = self._entries.get(bundle.digest)
                before = () if earlier is None else self._failures(earlier, runner, max_batch, known)
                self._remember(
                    bundle.digest, msgspec.structs.replace(entry, failures=(*before, result.reason))
                )
                raise self._refusal(name, result)
            assert isinstance(result, ProbeResult)
            if result.report is None:
                # A refusal by our own validation, not a crash: do not count it towards the quarantine.
                raise BundleError(result.refusal)
            report = result.report
            _log.info(
                "event=model_probed model=%s digest=%.12s memory_mb=%.1f load_ms=%.1f",
                name, bundle.digest, report.memory_bytes / 1e6, report.load_ns / 1e6,
            )  # fmt: skip
            self._remember(bundle.digest, msgspec.structs.replace(entry, report=report))
        if report is not None and self._budget_bytes is not None and report.memory_bytes > self._budget_bytes:
            raise BundleError(
                f"model {name!r} needs {report.memory_bytes / 1e6:.0f} MB; [limits] model_memory_mb allows "
                f"{self._budget_bytes / 1e6:.0f}; raise it or choose a smaller bundle"
            )
        return report

    def _refusal(self, name: str, ended: Ended) -> BundleError:
        advice = "install a repaired bundle"
        if ended.is_memory:
            verb = "raise" if self._budget_bytes is not None else "allow more with"
            advice = f"{verb} [limits] model_memory_mb, or choose a smaller bundle"
        return BundleError(f"bundle {name!r} failed its first load: the model {ended.reason}; {advice}")

    def _remember(self, digest: str, entry: Entry) -> None:
        self._entries = _with_latest(self._entries, digest, entry)
        self._file.update(lambda saved: _with_latest(saved, digest, entry))


def _with_latest(entries: Mapping[str, Entry], digest: str, entry: Entry) -> dict[str, Entry]:
    older = [(key, kept) for key, kept in entries.items() if key != digest]
    return dict([*older[1 - _MAX_ENTRIES :], (digest, entry)])


def quarantine_path(version_floors: Path | None) -> Path | None:
    """The file of the results: beside that of the version floors, None where that is None."""
    return None if version_floors is None else version_floors.with_suffix(".trials.json")
