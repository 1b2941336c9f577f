"""The edge tier's network: a quantised bag of n-grams, a normalisation and a small head; in torch and as ONNX."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as nnf

from tools.graph import Graph, onnx


@dataclass(frozen=True)
class Shape:
    """What the size on disk depends on. `levels` is the largest magnitude of a table entry: fewer pack better."""

    buckets: int = 16000
    width: int = 96
    hidden: int = 192
    levels: int = 7


class _Rounded(torch.autograd.Function):
    """The table in whole steps; the gradient passes as if nothing had been rounded (straight-through estimator).

    In place, since passes over the table are what a step of training spends its time on.
    """

    @staticmethod
    def forward(_context: Any, table: Tensor, scales: Tensor) -> Tensor:
        return (table / scales).round_().mul_(scales)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class EdgeNet(nn.Module):
    """Indices [n, slots] -> logits [n, labels]. The table's last row is the pad row and stays zero."""

    def __init__(self, shape: Shape, labels: int) -> None:
        super().__init__()
        self.shape = shape
        self.table = nn.Parameter(torch.randn(shape.buckets + 1, shape.width) * 0.1)
        self.norm = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, shape.hidden)
        self.norm_up = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, labels)
        self.direct = nn.Linear(shape.width, labels, bias=False)
        self.is_quantised = False

    def scales(self) -> Tensor:
        """Each table row's step [buckets + 1, 1]."""
        table = self.table.detach()
        largest = torch.maximum(table.amax(1, keepdim=True), -table.amin(1, keepdim=True))
        return largest.clamp(min=1e-8) / self.shape.levels

    def rounded(self, scales: Tensor) -> Tensor:
        """Whole steps of each table entry, in -levels..levels."""
        return (self.table / scales).round()

    def forward(self, slots: Tensor, keep: float = 1.0, dropout: float = 0.0) -> Tensor:
        table = self.table
        if self.is_quantised:
            table = _Rounded.apply(table, self.scales())  # type: ignore[no-untyped-call]
        kept = slots != self.shape.buckets
        if keep < 1.0:
            kept &= torch.rand(slots.shape) < keep
        # Only what is kept is summed: a third of the slots is padding.
        counts = kept.sum(1, dtype=torch.int32)
        bag = nnf.embedding_bag(slots[kept], table, counts.cumsum(0, dtype=torch.int32) - counts, mode="sum")
        x = nnf.dropout(self.norm(bag), dropout, self.training)
        hidden = nnf.dropout(self.norm_up(nnf.gelu(self.up(x))), dropout, self.training)
        return self.head(hidden) + self.direct(x)


def logits_of(net: EdgeNet, slots: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits [n, labels] without dropout."""
    if not len(slots):
        return np.zeros((0, net.head.out_features), np.float32)
    net.eval()
    with torch.inference_mode():
        parts = [net(part) for part in torch.from_numpy(slots).split(512)]
    return torch.cat(parts).numpy()


def export(net: EdgeNet, slots: int) -> bytes:
    """Write the net as ONNX. The bag is a batched [1, slots] x [slots, width] product, each row on its own."""
    net.eval()
    labels = net.head.out_features
    width = net.shape.width

    def array(tensor: Tensor) -> NDArray[np.float32]:
        return np.asarray(tensor.detach().numpy(), np.float32)

    scales = net.scales()
    steps = net.rounded(scales).detach().numpy().astype(np.int8)
    weights = array(scales).ravel().copy()
    steps[-1], weights[-1] = 0, 0.0
    graph = Graph()
    entries = graph.op("Cast", graph.op("Gather", graph.weight(steps), "slots"), to=onnx.TensorProto.FLOAT)
    factors = graph.op("Gather", graph.weight(weights), "slots")
    factors = graph.op("Unsqueeze", factors, graph.weight(np.array([1])))
    bag = graph.op("MatMul", factors, entries)
    bag = graph.op("Reshape", bag, graph.weight(np.array([-1, width])))
    x = graph.normalised(bag, array(net.norm.weight), array(net.norm.bias), net.norm.eps)
    hidden = graph.gelu(graph.linear(x, array(net.up.weight).T, array(net.up.bias)))
    hidden = graph.normalised(hidden, array(net.norm_up.weight), array(net.norm_up.bias), net.norm_up.eps)
    head = graph.linear(hidden, array(net.head.weight).T, array(net.head.bias))
    logits = graph.op("Add", head, graph.linear(x, array(net.direct.weight).T))
    return graph.model({"slots": (onnx.TensorProto.INT32, ["batch", slots])}, logits, labels)
