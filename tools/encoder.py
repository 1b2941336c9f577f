"""The MiniLM sentence encoder with a classification head, in torch; only what fine-tuning needs."""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as nnf

LAYERS, HIDDEN, HEADS, INNER, EPSILON = 6, 384, 12, 1536, 1e-12
CLS, SEP, PAD = 101, 102, 0


class Block(nn.Module):
    """One transformer layer, normalised after each residual sum as in BERT."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mix = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)
        self.norm_mix, self.norm_down = (nn.LayerNorm(HIDDEN, eps=EPSILON) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        rows, length, _ = x.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(rows, length, HEADS, HIDDEN // HEADS).transpose(1, 2)

        attended = nnf.scaled_dot_product_attention(
            heads(self.query(x)),
            heads(self.key(x)),
            heads(self.value(x)),
            attn_mask=bias,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        attended = attended.transpose(1, 2).reshape(rows, length, HIDDEN)
        x = self.norm_mix(x + self.dropout(self.mix(attended)))
        return self.norm_down(x + self.dropout(self.down(nnf.gelu(self.up(x)))))


class Encoder(nn.Module):
    """Token ids and mask [n, length] -> logits [n, labels], by mean pooling over the unmasked tokens."""

    def __init__(
        self, labels: int, vocabulary: int = 30522, positions: int = 512, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, HIDDEN)
        self.positions = nn.Embedding(positions, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN, eps=EPSILON)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(LAYERS))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(HIDDEN, labels)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]
        x = self.dropout(self.norm(x))
        bias = ((1.0 - mask) * -1e9)[:, None, None, :]
        for block in self.blocks:
            x = block(x, bias)
        weights = mask[:, :, None]
        pooled = (x * weights).sum(1) / weights.sum(1)
        return self.head(self.dropout(pooled))


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
