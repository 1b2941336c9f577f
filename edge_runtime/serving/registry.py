"""The models of a process by name, and what state each is in. It owns no runner: who loads a model closes it.

A request uses the model that it found when it came, also after that was replaced: `wait_unused` tells when the last
such request has ended, so that a replacement fails none of them.
"""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from edge_runtime.core.errors import UnknownModel
from edge_runtime.core.messages import ModelInfo
from edge_runtime.processing import Processor
from edge_runtime.serving.model_runner import ModelRunner


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model with its runner. `engine` names what runs it, with its version."""

    info: ModelInfo
    processor: Processor
    runner: ModelRunner
    engine: str = ""

    @property
    def row_ns(self) -> int:
        """The cost of one row, as measured when the model was loaded; 0 if it was not."""
        latency_profile = self.info.latency_profile
        return latency_profile[0][1] if latency_profile else 0

    @property
    def key_parts(self) -> tuple[str, str, str]:
        """Digest, processing version and engine: the parts of a cache key that this model decides."""
        engine = f"{self.engine or self.info.platform} {self.info.is_batch_invariant}"
        return self.info.digest, self.processor.version, engine


class ModelState(StrEnum):
    """What may be asked of a model now."""

    LOADING = "loading"  # no version of it can answer yet
    READY = "ready"
    DRAINING = "draining"  # it answers what it has, and takes nothing new
    FAILED = "failed"  # it could not be loaded


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of the registry. `served` is None while the model is loading or has failed, with `why`."""

    state: ModelState
    served: ServedModel | None = None
    why: str = ""


class Registry:
    """Models by name; one version of each."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._entries = {name: Entry(ModelState.READY, served) for name, served in models.items()}
        self._in_use: dict[ModelRunner, int] = {}  # requests by runner
        self._unused: dict[ModelRunner, asyncio.Event] = {}

    def __iter__(self) -> Iterator[ServedModel]:
        """Iterate over the models that have a runner."""
        return (entry.served for entry in self._entries.values() if entry.served is not None)

    @property
    def is_ready(self) -> bool:
        """Whether every model is ready."""
        return all(entry.state is ModelState.READY for entry in self._entries.values())

    def not_ready(self) -> dict[str, str]:
        """Return why each model that is not ready is not: name -> sentence."""
        return {
            name: f"It is {entry.state.value}{f': {entry.why}' if entry.why else ''}."
            for name, entry in self._entries.items()
            if entry.state is not ModelState.READY
        }

    def enter(self, served: ServedModel) -> None:
        """Note that a request uses a model, until `leave`."""
        self._in_use[served.runner] = self._in_use.get(served.runner, 0) + 1

    def leave(self, served: ServedModel) -> None:
        """Note that a request has ended."""
        left = self._in_use[served.runner] - 1
        if left:
            self._in_use[served.runner] = left
            return
        del self._in_use[served.runner]
        if served.runner in self._unused:
            self._unused.pop(served.runner).set()

    async def wait_unused(self, served: ServedModel) -> None:
        """Wait until no request uses a model."""
        while served.runner in self._in_use:
            await self._unused.setdefault(served.runner, asyncio.Event()).wait()

    def entry(self, name: str) -> Entry:
        """Return the state of a name. Raises UnknownModel."""
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownModel(f"No such model is loaded; loaded are: {', '.join(self._entries)}.")
        return entry

    def find(self, name: str, version: str | None) -> ServedModel:
        """Return the model of that name, and of that version if one is given. Raises UnknownModel."""
        served = self.entry(name).served
        if served is None:
            raise UnknownModel(f"Model {name} is not loaded: it is {self.entry(name).state.value}.")
        if version is not None and version != served.info.version:
            raise UnknownModel(f"Model {name} is loaded in version {served.info.version} only.")
        return served

    def set_state(self, name: str, state: ModelState, why: str = "") -> None:
        """Note the state of a model, which keeps the runner it has; a name that is new is added."""
        known = self._entries.get(name)
        self._entries[name] = Entry(state, None if known is None else known.served, why)

    def replace(self, served: ServedModel) -> ServedModel:
        """Serve `served` in place of the model of its name, which is returned. Raises UnknownModel without one."""
        former = self.find(served.info.name, None)
        self._entries[served.info.name] = Entry(ModelState.READY, served)
        return former

    def is_current(self, served: ServedModel) -> bool:
        """Whether new requests reach a model of the same digest as `served`."""
        now = self._entries[served.info.name].served
        return now is not None and (now is served or now.info.digest == served.info.digest)
