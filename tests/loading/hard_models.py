"""Bundles that are hard to load, and the child processes that tests look for."""

import os
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.loading.test_model import tensor_bundle


def memory_bomb(path, side=2**17, **changes):
    """A model that asks for `side` x `side` zeros, by default 64 GiB; the file itself holds two numbers."""
    weights = [numpy_helper.from_array(np.array([side, side], np.int64), "shape")]
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceMax", ["zeros"], ["largest"], keepdims=0),
        helper.make_node("Add", ["x", "largest"], ["y"]),
    ]
    return tensor_bundle(path, nodes, weights=weights, **changes)


def endless_loop(path, **changes):
    """A model that loads at once and runs 2^40 steps."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["v", "v"], ["w"])],
        "body",
        [
            value("step", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("v", TensorProto.FLOAT, ["n", 2]),
        ],
        [value("go_on", TensorProto.BOOL, []), value("w", TensorProto.FLOAT, ["n", 2])],
    )
    weights = [
        numpy_helper.from_array(np.array(2**40, np.int64), "steps"),
        numpy_helper.from_array(np.array(True), "yes"),
    ]
    return tensor_bundle(
        path, [helper.make_node("Loop", ["steps", "yes", "x"], ["y"], body=body)], weights=weights, **changes
    )


def children(parent=None):
    """The processes whose parent is this one, or another."""
    parent = parent or os.getpid()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # gone meanwhile
                continue
            if int(fields[1]) == parent:
                found.append(int(folder.name))
    return found
