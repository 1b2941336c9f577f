"""Fine-tuned encoders as one ONNX graph with int8 weights; several members answer by their mean log-probability."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.encoder import EPSILON, Block, Encoder
from tools.graph import Graph, onnx, quantised


def export(members: Sequence[Encoder], max_tokens: int) -> bytes:
    """Write `ids`, `mask [batch, length] INT64` -> `logits [batch, labels]`; lengths up to `max_tokens`."""
    graph = Graph()
    mask = graph.op("Cast", "mask", to=onnx.TensorProto.FLOAT)
    answers = [_logits(graph, member, mask, max_tokens) for member in members]
    if len(answers) == 1:
        (mean,) = answers
    else:
        shares = [graph.op("LogSoftmax", answer, axis=-1) for answer in answers]
        mean = graph.op("Mul", graph.op("Sum", *shares), graph.scalar(1 / len(shares)))
    kind, shape = onnx.TensorProto.INT64, ["batch", "length"]
    return graph.model({"ids": (kind, shape), "mask": (kind, shape)}, mean, members[0].head.out_features)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.asarray(tensor.detach().cpu().numpy(), np.float32)


def _linear(graph: Graph, x: str, layer: torch.nn.Linear) -> str:
    return graph.linear(x, _array(layer.weight).T, _array(layer.bias))


def _norm(graph: Graph, x: str, layer: torch.nn.LayerNorm) -> str:
    return graph.normalised(x, _array(layer.weight), _array(layer.bias), EPSILON)


def _logits(graph: Graph, encoder: Encoder, mask: str, max_tokens: int) -> str:
    """One member, from token ids to logits."""
    # The word table stays int8 in memory: only the rows of the words at hand are widened.
    steps, scales = quantised(_array(encoder.words.weight), axis=1)
    words = graph.op("Cast", graph.op("Gather", graph.weight(steps), "ids"), to=onnx.TensorProto.FLOAT)
    words = graph.op("Mul", words, graph.op("Gather", graph.weight(scales), "ids"))
    length = graph.op("Shape", "ids", start=1, end=2)
    places = graph.weight(_array(encoder.positions.weight)[:max_tokens])
    places = graph.op("Slice", places, graph.weight(np.array([0])), length, graph.weight(np.array([0])))
    x = _norm(graph, graph.op("Add", words, places), encoder.norm)
    absent = graph.op("Mul", graph.op("Sub", graph.scalar(1.0), mask), graph.scalar(-1e9))
    bias = graph.op("Unsqueeze", absent, graph.weight(np.array([1, 2])))
    for block in encoder.blocks:
        assert isinstance(block, Block)
        x = _norm(graph, graph.op("Add", x, _attended(graph, x, block, bias)), block.norm_mix)
        inner = _linear(graph, graph.gelu(_linear(graph, x, block.up)), block.down)
        x = _norm(graph, graph.op("Add", x, inner), block.norm_down)
    weights = graph.op("Unsqueeze", mask, graph.weight(np.array([2])))
    axis = graph.weight(np.array([1]))
    summed = graph.op("ReduceSum", graph.op("Mul", x, weights), axis, keepdims=0)
    # A padding row of a batch has no token at all; dividing by one keeps it finite.
    count = graph.op("Max", graph.op("ReduceSum", mask, axis, keepdims=1), graph.scalar(1.0))
    return _linear(graph, graph.op("Div", summed, count), encoder.head)


def _attended(graph: Graph, x: str, block: Block, bias: str) -> str:
    hidden = block.query.in_features
    size = hidden // block.heads
    split = graph.weight(np.array([0, 0, block.heads, size]))

    def heads(layer: torch.nn.Linear, order: list[int]) -> str:
        return graph.op("Transpose", graph.op("Reshape", _linear(graph, x, layer), split), perm=order)

    query, value = heads(block.query, [0, 2, 1, 3]), heads(block.value, [0, 2, 1, 3])
    key = heads(block.key, [0, 2, 3, 1])
    scores = graph.op("Mul", graph.op("MatMul", query, key), graph.scalar(size**-0.5))
    shares = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
    mixed = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[0, 2, 1, 3])
    return _linear(graph, graph.op("Reshape", mixed, graph.weight(np.array([0, 0, hidden]))), block.mix)
