"""The walk over TFLite files: needs no runtime. Models are written by the tool that writes the shipped format."""

import struct
import time

import flatbuffers
import numpy as np
import pytest

from edge_runtime.core.errors import BundleError
from edge_runtime.engines.tflite_scan import scan
from tools import tflite_graph
from tools.tflite_graph import OPEN, Graph, Op

WEIGHTS = np.arange(6, dtype=np.int8).reshape(2, 3)


def model(kind=Op.GELU):
    graph = Graph()
    x = graph.input("x", (OPEN, 2), np.float32)
    y = graph.linear(x, WEIGHTS, np.ones(3, np.float32), np.zeros(3, np.float32))
    return graph.model({"x": x}, {"y": graph.op(kind, y, shape=y.shape)})


class Other(tflite_graph._Writer):
    """Changes tables that have so many fields, to write what the project's own models never hold."""

    def __init__(self, count, change):
        super().__init__()
        self._count, self._change = count, change

    def _table(self, *fields):
        return super()._table(*(self._change(self, fields) if len(fields) == self._count else fields))


def written(monkeypatch, count, change):
    monkeypatch.setattr(tflite_graph, "_Writer", lambda: Other(count, change))
    return model()


def test_a_model_of_ours_passes():
    scan(model())


@pytest.mark.parametrize(
    "raw", [b"", b"TFL3", b"\0" * 8, b"\xff\xff\xff\xffTFL3", b"\x08\0\0\0TFL3" + b"\0" * 3]
)
def test_other_files_are_refused(raw):
    with pytest.raises(BundleError, match="readable TFLite"):
        scan(raw)


def test_a_cut_file_is_refused_wherever_it_is_cut():
    good = model()
    for length in range(0, len(good) - 16, 7):
        with pytest.raises(BundleError):
            scan(good[:length])


def test_custom_operators_are_refused(monkeypatch):
    with pytest.raises(BundleError, match="custom operators"):
        scan(model(_other(monkeypatch, 32)))


def _other(monkeypatch, number):
    """An operator that the project never writes, by its number."""
    kind = int.__new__(Op, number)
    kind._name_, kind._value_ = f"OTHER{number}", number
    monkeypatch.delitem(tflite_graph._OPTIONS, kind, raising=False)
    return kind


@pytest.mark.parametrize("number", [129, 136, 142, 143, 144])
def test_state_is_refused(monkeypatch, number):
    with pytest.raises(BundleError, match="state"):
        scan(model(_other(monkeypatch, number)))


BUFFER, NODE_OR_GRAPH, TENSOR_OR_MODEL = 1, 5, 8


@pytest.mark.parametrize(
    ("count", "change"),
    [
        (BUFFER, lambda _, fields: [*fields, ("Uint64", 4096), ("Uint64", 64)]),
        (BUFFER, lambda _, fields: [*fields, None, ("Uint64", 64)]),
        (TENSOR_OR_MODEL, lambda w, fields: [*fields, w._numbers([1])]),
        (TENSOR_OR_MODEL, lambda w, fields: [*fields, None, w._numbers([1])]),
        (TENSOR_OR_MODEL, lambda _, fields: [*fields, None, None, ("Uint32", 1)]),
        (NODE_OR_GRAPH, lambda _, fields: [*fields, None, None, None, None, ("Uint64", 4096), ("Uint64", 4)]),
    ],
    ids=["buffer", "size", "groups", "buffers", "tensor", "options"],
)
def test_data_outside_of_the_tables_is_refused(monkeypatch, count, change):
    with pytest.raises(BundleError, match="outside"):
        scan(written(monkeypatch, count, change))


def test_variables_are_refused(monkeypatch):
    def change(_, fields):
        return fields if fields[0] == ("Uint32", 3) else [*fields[:5], ("Bool", 1), *fields[6:]]

    with pytest.raises(BundleError, match="state"):
        scan(written(monkeypatch, TENSOR_OR_MODEL, change))


@pytest.mark.parametrize("bad", [-2, 99])
@pytest.mark.parametrize("field", [1, 2])
@pytest.mark.parametrize("is_node", [True, False], ids=["node", "graph"])
def test_tensors_that_are_not_there_are_refused(monkeypatch, is_node, field, bad):
    def change(writer, fields):
        if (fields[0][0] == "Uint32") is not is_node:  # a node begins with the index of its operator
            return fields
        return [*fields[:field], writer._numbers([bad]), *fields[field + 1 :]]

    with pytest.raises(BundleError, match="readable"):
        scan(written(monkeypatch, NODE_OR_GRAPH, change))


def test_a_weight_that_claims_to_be_longer_than_the_file_is_refused():
    bad = bytearray(model())
    at = bad.index(WEIGHTS.T.tobytes()) - 4
    assert bad[at] == WEIGHTS.size
    struct.pack_into("<I", bad, at, len(bad))
    with pytest.raises(BundleError, match="readable"):
        scan(bytes(bad))


def test_a_field_behind_its_table_is_refused():
    bad = bytearray(model())
    (root,) = struct.unpack_from("<I", bad, 0)
    fields = root - struct.unpack_from("<i", bad, root)[0]
    struct.pack_into("<H", bad, fields + 2, 4)  # the root table says that it is empty
    with pytest.raises(BundleError, match="readable"):
        scan(bytes(bad))


def test_a_walk_without_end_is_cut_short():
    # 4,000 sub-graphs are one and the same, and so are its 4,000 tensors: 16 million in 50 KB.
    builder = flatbuffers.Builder(0)

    def table(*offsets):
        builder.StartObject(len(offsets))
        for slot, offset in enumerate(offsets):
            if offset:
                builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
        return builder.EndObject()

    def many(offset):
        builder.StartVector(4, 4000, 4)
        for _ in range(4000):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()

    builder.Finish(table(0, 0, many(table(many(table(0)))), 0, many(table(0))), file_identifier=b"TFL3")
    raw = bytes(builder.Output())
    assert len(raw) < 60_000
    started = time.process_time()
    with pytest.raises(BundleError):
        scan(raw)
    assert time.process_time() - started < 10  # 16 million tensors take minutes


def test_mutants_are_refused_or_scanned():
    good = model()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        bad = bytearray(good)
        at = int(rng.integers(len(bad) - 4))
        struct.pack_into(
            "<I", bad, at, int(rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, rng.integers(1 << 32)]))
        )
        try:
            scan(bytes(bad))
        except BundleError:
            refused += 1
    assert refused > 500
