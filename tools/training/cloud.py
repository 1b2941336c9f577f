"""Train the cloud tier's classifier: the MiniLM sentence encoder fine-tuned, once or with several seeds."""

import hashlib
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as nnf

from edge_runtime.manifest import ProcessingEntry
from edge_runtime.processing.wordpiece import WordpieceFeaturiser
from tools.encoder import PAD, Encoder, Sizes, load_pretrained, pretrained_folder
from tools.rows import BadRows
from tools.training.cloud_graph import export
from tools.training.data import Data
from tools.training.edge import Trained
from tools.training.loop import Checkpoint, Epoch, in_scope_accuracy, passes, run_epochs, seeded
from tools.training.progress import Progress

LENGTHS = (8, 16, 32, 64)
MAX_BATCH = 32


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune: AdamW with warm-up and linear decay; the head learns faster than the encoder.

    `average` is the decay of the averaged weights per step, which are the ones that are kept.
    """

    epochs: int = 6
    rate: float = 1e-4
    head_factor: float = 20.0
    batch: int = 64
    least_rows: int = 2500  # an epoch visits so many rows at least: small files are gone through more often
    dropout: float = 0.1
    hidden_words: float = 0.1
    smoothing: float = 0.05
    decay: float = 0.01
    warm_up: float = 0.1
    least_rate: float = 0.02  # share of the rate that the decay ends with
    clip: float = 1.0
    average: float = 0.995
    average_every: int = 4


class Average:
    """Exponential moving average of a network's weights, updated every few steps; slower to forget as it ages."""

    def __init__(self, net: torch.nn.Module, decay: float, every: int) -> None:
        self._net, self._decay, self._every = net, decay, every
        self.weights = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
        self._steps = 0

    def after_step(self) -> None:
        """Take in the weights as they are now."""
        self._steps += 1
        if self._steps % self._every == 0:
            decay = min(self._decay, (1 + self._steps) / (10 + self._steps)) ** self._every
            with torch.no_grad():
                for name, tensor in self._net.state_dict().items():
                    self.weights[name].lerp_(tensor, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = int(state["steps"])
        for name, tensor in state["weights"].items():
            self.weights[name].copy_(tensor)


def train_cloud(
    data: Data,
    *,
    work: Path,
    seed: int = 1,
    epochs: int | None = None,
    members: int = 1,
    given: Sequence[Path] = (),
    recipe: Recipe | None = None,
    sizes: Sizes | None = None,
    source: Path | None = None,
) -> Trained:
    """Train `members` encoders, or take the averaged weights of those `given`; pack them as one graph.

    A killed run goes on at the member and epoch it was in. `source` is the folder of tokeniser and pretrained
    weights; without weights in it (tests) the encoder begins at random. Raises BadRows, EdgeRuntimeError.
    """
    recipe, sizes, source = recipe or Recipe(), sizes or Sizes(), source or pretrained_folder()
    recipe = replace(recipe, epochs=epochs) if epochs is not None else recipe
    tokenizer = (source / "tokenizer.json").read_bytes()
    nets: list[Encoder] = []
    curve: list[Epoch] = []
    for path in given:
        net = Encoder(len(data.names), sizes=sizes)
        _load_member(net, path)
        nets.append(net)
    for member in range(0 if given else members):
        print(f"member {member + 1} of {members}", file=sys.stderr)
        net, curve = train_member(data, recipe, sizes, source, seed=seed + member, work=work)
        nets.append(net)
    featuriser = WordpieceFeaturiser(tokenizer, lengths=LENGTHS, pad=PAD)
    rows = [featuriser.encode(text) for text in data.val.texts]
    return Trained(
        export(nets, LENGTHS[-1]),
        ProcessingEntry(
            "text_wordpiece", "1", {"tokenizer": "tokenizer.json", "lengths": LENGTHS, "pad": PAD}
        ),
        {"tokenizer.json": tokenizer},
        rows,
        curve,
        {"members": len(nets), **asdict(recipe)},
        max_batch=MAX_BATCH,
    )


def train_member(
    data: Data,
    recipe: Recipe,
    sizes: Sizes,
    source: Path,
    *,
    seed: int,
    work: Path,
) -> tuple[Encoder, list[Epoch]]:
    """Fine-tune one encoder. Its averaged weights are kept as `work`/member-SEED.pt."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    net = Encoder(len(data.names), recipe.dropout, sizes)
    if (source / "model.safetensors").exists():
        load_pretrained(net, source / "model.safetensors")
    net.to(device)
    tokenizer = tokenizer_of(source)
    ids, val = tokenised(tokenizer, data.train.texts), tokenised(tokenizer, data.val.texts)
    mask_token = tokenizer.token_to_id("[MASK]")
    target = torch.from_numpy(data.train.labels)
    optimiser = optimiser_of(net, recipe)
    visits = len(passes(len(ids), recipe.least_rows, np.random.default_rng(0)))
    batch = min(recipe.batch, visits)
    steps = -(-visits // batch)
    schedule = schedule_of(optimiser, recipe, recipe.epochs * steps)
    average = Average(net, recipe.average, recipe.average_every)
    progress = Progress(f"fine-tuning ({device.type})", recipe.epochs * steps)

    def one_epoch(epoch: int) -> float:
        rng = seeded(seed, epoch)
        net.train()
        total = 0.0
        for step, rows in enumerate(batches(ids, recipe.least_rows, batch, rng)):
            inputs, mask = padded([hidden(ids[i], recipe.hidden_words, mask_token, rng) for i in rows])
            with half_precision(device):
                logits = net(inputs.to(device), mask.to(device))
            wanted = target[rows].to(device)
            loss = nnf.cross_entropy(logits.float(), wanted, label_smoothing=recipe.smoothing)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
            optimiser.step()
            schedule.step()
            average.after_step()
            total += float(loss.detach())
            progress.at(epoch * steps + step + 1, f"epoch {epoch + 1}/{recipe.epochs}")
        return total / steps

    averaged = Encoder(len(data.names), sizes=sizes).to(device)

    def accuracy() -> float | None:
        averaged.load_state_dict(average.weights)
        return in_scope_accuracy(logits_of(averaged, val).argmax(1), data.val.labels, data.oos)

    key = hashlib.sha256(
        repr((data.sha256, data.names, data.train.texts, asdict(recipe), asdict(sizes), seed)).encode()
    ).hexdigest()
    checkpoint = Checkpoint(work / f"running-{seed}.pt", key)
    parts = {"net": net, "optimiser": optimiser, "schedule": schedule, "average": average}
    finished = Checkpoint(work / f"member-{seed}.pt", key)
    done = finished.load()
    if done is None:
        curve = run_epochs(recipe.epochs, parts, checkpoint, one_epoch, accuracy)
        finished.save({"weights": average.weights, "curve": [asdict(point) for point in curve]})
        checkpoint.path.unlink(missing_ok=True)
    else:
        average.weights = done["weights"]
        curve = [Epoch(**point) for point in done["curve"]]
    averaged.load_state_dict(average.weights)
    return averaged.cpu(), curve


def optimiser_of(net: Encoder, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; norms and biases are not decayed."""
    head = list(net.head.parameters())
    known = {id(p) for p in head}
    body = [p for p in net.parameters() if id(p) not in known]
    groups = [
        {"params": [p for p in body if p.dim() > 1], "weight_decay": recipe.decay},
        {"params": [p for p in body if p.dim() == 1], "weight_decay": 0.0},
        {"params": head, "lr": recipe.head_factor * recipe.rate, "weight_decay": recipe.decay},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, fused=True)


def schedule_of(
    optimiser: torch.optim.Optimizer, recipe: Recipe, total: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up, then fall in a straight line."""
    warm = max(1, round(recipe.warm_up * total))
    fall = max(1, total - warm)
    return torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, max(recipe.least_rate, (total - step) / fall))
    )


def half_precision(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where the processor has instructions for it; elsewhere it is only slower."""
    good = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - no public name
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bool(good))


def tokenizer_of(source: Path) -> Tokenizer:
    """The folder's tokeniser, cutting at the longest length and never padding."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTHS[-1])
    return tokenizer


def tokenised(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the sentence marks."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def hidden(ids: list[int], share: float, mask_token: int, rng: np.random.Generator) -> list[int]:
    """The tokens with a share of them hidden, never the sentence marks at both ends."""
    draws = rng.random(len(ids)) < share
    return [
        mask_token if draw and 0 < i < len(ids) - 1 else x
        for i, (x, draw) in enumerate(zip(ids, draws, strict=True))
    ]


def padded(ids: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [n, longest]."""
    length = max(map(len, ids))
    table = torch.full((len(ids), length), PAD, dtype=torch.long)
    mask = torch.zeros(len(ids), length)
    for row, tokens in enumerate(ids):
        table[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1.0
    return table, mask


def batches(
    ids: Sequence[list[int]], least_rows: int, batch: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Shuffled batches of rows of like length, so that little is spent on padding."""
    rows = passes(len(ids), least_rows, rng)
    lengths = np.array([len(ids[i]) for i in rows])
    order = rows[np.argsort(lengths + 2.0 * rng.random(len(rows)), kind="stable")]
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    return [parts[i] for i in rng.permutation(len(parts))]


def logits_of(net: Encoder, ids: Sequence[list[int]]) -> NDArray[np.float32]:
    """Logits [n, labels] without dropout, in full precision."""
    net.eval()
    device = net.head.weight.device
    out = np.empty((len(ids), net.head.out_features), np.float32)
    order = np.argsort([len(x) for x in ids], kind="stable")
    with torch.inference_mode():
        for start in range(0, len(ids), 128):
            part = order[start : start + 128]
            inputs, mask = padded([ids[i] for i in part])
            out[part] = net(inputs.to(device), mask.to(device)).cpu().numpy()
    return out


def _load_member(net: Encoder, path: Path) -> None:
    """Take weights that `train_member` kept, or a bare state dict. Raises BadRows."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        net.load_state_dict(saved.get("weights", saved))
    except Exception as error:  # noqa: BLE001 - torch raises whatever it likes for a bad file
        first = str(error).split("\n", 1)[0][:120]
        raise BadRows(f"{path} holds no member for these labels ({first}).") from None
