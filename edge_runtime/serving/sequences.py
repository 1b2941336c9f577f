"""The step side of a model runner: members that take part in many batches, and where the state of each lies.

A member of a step engine is one row of a request. Its state stays in the engine from its first step to its end, and a
caller may read its answers while it runs (`AnswerStream`).

The state of a member is released exactly once, in whichever way the member ends. The runner asks for the release
when the member leaves, and the engine's thread does it, in the order of the calls. `OpenStates`, on the side of the
thread, ignores a second release of a state, and its `close` releases what is left. These interleavings are then safe:

- A caller leaves while the first step of its member runs. The runner does not know the handle yet. It learns the handle
  when the step returns, finds no member for it, and asks for the release.
- The engine hangs, with the states of its step and of waiting members in it. Releases wait in its thread behind the
  call that hangs. They run if the call returns. If the engine was replaced meanwhile, its `close` comes after them.
- The runner closes while a first step runs. The thread closes the engine after the step, and `close` finds the state.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from edge_runtime.core.messages import Answer, Shapes
from edge_runtime.core.scheduling.scheduler import Dispatch
from edge_runtime.engines.open_states import OpenStates
from edge_runtime.processing import Processor
from edge_runtime.serving.in_flight import Member, StepSequence
from edge_runtime.serving.step_run import StepMember, StepRun, run_step
from edge_runtime.serving.supervision import AnyEngine, Supervisor, Work


class Sequences:
    """The members of one step engine. `members` are those of the runner, by the id that the scheduler knows."""

    def __init__(self, members: Mapping[int, Member], processor: Processor, supervisor: Supervisor) -> None:
        self._members, self._processor, self._supervisor = members, processor, supervisor

    def work(self, batch: Dispatch) -> Work:
        """What the engine's thread does for one step."""
        processor = self._processor
        shapes: Any = batch.lane
        members = [_step_member(self._members[request_id]) for request_id in batch.ids]
        return lambda engine: run_step(engine, processor, shapes, members)

    def advance(self, batch: Dispatch, result: StepRun) -> tuple[dict[int, Shapes], set[int]]:
        """Pass on the answers of members that go on.

        Return the members that take part in the next step, each with the lane of its next row, and those that pause.
        """
        self.note_opened(batch, result)
        staying: dict[int, Shapes] = {}
        paused: set[int] = set()
        for request_id, outcome, following in zip(
            batch.ids, result.run.results, result.following, strict=True
        ):
            sequence = self._sequence(request_id)
            if sequence is None or following is None or not isinstance(outcome, Answer):
                continue
            if sequence.advance(outcome, following):
                staying[request_id] = following.shapes
            else:
                paused.add(request_id)
        return staying, paused

    def note_opened(self, batch: Dispatch, result: StepRun) -> None:
        """Note where the states of new members lie; release those of members whose callers left during the step.

        A member that had a state before the step was released when its caller left.
        """
        engine = self._supervisor.engine(batch.engine)
        assert isinstance(engine, OpenStates), "a step ran on an engine without steps"
        for i, handle in result.opened.items():
            sequence = self._sequence(batch.ids[i])
            if sequence is None:
                self._supervisor.call(batch.engine, engine, partial(engine.release, handle))
            else:
                sequence.engine, sequence.handle = engine, handle

    def release(self, sequence: StepSequence) -> None:
        """Have the state of a member released, once, in the engine's thread."""
        engine, handle = sequence.engine, sequence.handle
        sequence.engine = sequence.handle = None
        if engine is not None and handle is not None:
            self._supervisor.call(0, engine, partial(engine.release, handle))

    def _sequence(self, request_id: int) -> StepSequence | None:
        member = self._members.get(request_id)
        return None if member is None else member.sequence


def with_open_states(
    engine: AnyEngine, load_engine: Callable[[], AnyEngine] | None
) -> tuple[AnyEngine, Callable[[], AnyEngine] | None]:
    """Wrap a step engine, and the engines that `load_engine` loads in its place."""

    def wrapped(inner: Any) -> AnyEngine:
        return OpenStates(inner)

    return wrapped(engine), None if load_engine is None else lambda: wrapped(load_engine())


def _step_member(member: Member) -> StepMember:
    sequence = member.sequence
    assert sequence is not None, "every member of a step engine has a sequence"
    next_step = sequence.next_step
    return StepMember(sequence.handle, None if next_step is None else next_step.row, member.data)
