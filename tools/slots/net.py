"""The network of `text_slots` in torch: a quantised bag of features per word, convolutions over words, two heads."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as nnf

from tools.graph import Graph, onnx, quantised


@dataclass(frozen=True)
class Shape:
    """What the size on disk depends on. `levels` is the largest magnitude of a table entry: fewer pack better."""

    buckets: int = 12000
    width: int = 96
    levels: int = 7
    dilations: tuple[int, ...] = (1, 1, 2, 1)
    context_after: int = 2  # convolutions before each word gets the context of the whole text


class SlotNet(nn.Module):
    """Indices [n, words, slots] -> intent logits [n, intents] and tag logits [n, words, tags].

    The table's last row is the pad row and stays zero; a word is there if its first slot is not padding.
    """

    def __init__(self, shape: Shape, intents: int, tags: int) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.table = nn.Parameter(torch.randn(shape.buckets + 1, width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for dilation in shape.dilations
        )
        self.context = nn.Linear(2 * width, width)
        self.tags = nn.Linear(width, tags)
        self.hidden = nn.Linear(2 * width, width)
        self.intents = nn.Linear(width, intents)
        self.is_quantised = False

    def scales(self) -> Tensor:
        """Each table row's step [buckets + 1, 1]."""
        return self.table.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / self.shape.levels

    def rounded(self, scales: Tensor) -> Tensor:
        """Whole steps of each table entry, in -levels..levels."""
        return (self.table / scales).round()

    def forward(
        self, slots: Tensor, keep: float = 1.0, keep_exact: float = 1.0, dropout: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        table = self.table
        if self.is_quantised:
            scales = self.scales()
            # The gradient passes as if nothing had been rounded (straight-through estimator).
            table = table + (self.rounded(scales) * scales - table).detach()
        weights = (slots != self.shape.buckets).float()
        there = weights[:, None, :, 0]
        if keep < 1.0:
            weights = weights * (torch.rand_like(weights) < keep)
            weights[:, :, 0] *= torch.rand_like(weights[:, :, 0]) < keep_exact
        rows, words, wide = slots.shape
        bag = nnf.embedding_bag(
            slots.view(-1, wide), table, per_sample_weights=weights.view(-1, wide), mode="sum"
        )
        x = nnf.dropout(self.norm(bag), dropout, self.training).view(rows, words, -1).transpose(1, 2) * there
        for i, convolution in enumerate(self.convolutions):
            if i == self.shape.context_after:
                x = (x + nnf.relu(self.context(self.pooled(x, there)))[:, :, None]) * there
            x = (x + nnf.dropout(nnf.relu(convolution(x)), dropout, self.training)) * there
        hidden = nnf.relu(self.hidden(nnf.dropout(self.pooled(x, there), dropout, self.training)))
        return self.intents(hidden), self.tags(nnf.dropout(x.transpose(1, 2), dropout, self.training))

    @staticmethod
    def pooled(x: Tensor, there: Tensor) -> Tensor:
        """Mean and largest positive value over the words that are there: [n, width, words] -> [n, 2 width]."""
        mean = x.sum(2) / there.sum(2).clamp(min=1.0)
        return torch.cat([mean, nnf.relu(x).amax(2)], 1)


def logits_of(net: SlotNet, inputs: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Intent logits [n, intents] and tag logits [n, words, tags] without dropout."""
    net.eval()
    with torch.inference_mode():
        parts = [net(part) for part in torch.from_numpy(inputs).split(256)]
    intents, tags = zip(*parts, strict=True)
    return torch.cat(intents).numpy(), torch.cat(tags).numpy()


def export(net: SlotNet, features: int) -> bytes:
    """Write the net as ONNX with int8 weights: `slots [batch, words, features]` -> `logits`, `tags`."""
    net.eval()

    def array(tensor: Tensor) -> NDArray[np.float32]:
        return np.asarray(tensor.detach().numpy(), np.float32)

    scales = net.scales()
    steps = net.rounded(scales).detach().numpy().astype(np.int8)
    weights = array(scales).ravel().copy()
    steps[-1], weights[-1] = 0, 0.0
    graph = Graph()
    two = graph.weight(np.array([2]))

    def linear(x: str, layer: nn.Linear) -> str:
        return graph.linear(x, array(layer.weight).T, array(layer.bias))

    def pooled(x: str) -> str:
        mean = graph.op("Div", graph.op("ReduceSum", x, two, keepdims=0), count)
        return graph.op(
            "Concat", mean, graph.op("ReduceMax", graph.op("Relu", x), axes=[2], keepdims=0), axis=1
        )

    first = graph.op("Gather", "slots", graph.weight(np.array([0])), axis=2)
    there = graph.op("Less", first, graph.weight(np.array(net.shape.buckets, np.int32)))
    there = graph.op("Transpose", graph.op("Cast", there, to=onnx.TensorProto.FLOAT), perm=[0, 2, 1])
    # A text without words has none to divide by; dividing by one keeps it finite.
    count = graph.op("Max", graph.op("ReduceSum", there, two, keepdims=0), graph.scalar(1.0))
    # The table stays int8 in memory: only the entries of the words at hand are widened.
    entries = graph.op("Cast", graph.op("Gather", graph.weight(steps), "slots"), to=onnx.TensorProto.FLOAT)
    factors = graph.op("Unsqueeze", graph.op("Gather", graph.weight(weights), "slots"), two)
    bag = graph.op("Squeeze", graph.op("MatMul", factors, entries), two)
    x = graph.normalised(bag, array(net.norm.weight), array(net.norm.bias), net.norm.eps)
    x = graph.op("Mul", graph.op("Transpose", x, perm=[0, 2, 1]), there)
    for i, convolution in enumerate(net.convolutions):
        assert isinstance(convolution, nn.Conv1d)
        if i == net.shape.context_after:
            context = graph.op("Relu", linear(pooled(x), net.context))
            x = graph.op("Mul", graph.op("Add", x, graph.op("Unsqueeze", context, two)), there)
        kernel, steps_of = quantised(array(convolution.weight).reshape(net.shape.width, -1), axis=1)
        kernel = kernel.reshape(convolution.weight.shape)
        widened = graph.op("Cast", graph.weight(kernel), to=onnx.TensorProto.FLOAT)
        dilation = net.shape.dilations[i]
        moved = graph.op(
            "Conv",
            x,
            graph.op("Mul", widened, graph.weight(steps_of[:, :, None])),
            graph.weight(array(convolution.bias)),
            dilations=[dilation],
            kernel_shape=[3],
            pads=[dilation, dilation],
        )
        x = graph.op("Mul", graph.op("Add", x, graph.op("Relu", moved)), there)
    logits = linear(graph.op("Relu", linear(pooled(x), net.hidden)), net.intents)
    tags = linear(graph.op("Transpose", x, perm=[0, 2, 1]), net.tags)
    return graph.model(
        {"slots": (onnx.TensorProto.INT32, ["batch", "words", features])},
        logits,
        net.intents.out_features,
        {"tags": (tags, ["batch", "words", net.tags.out_features])},
    )
