"""Train the cloud tier's classifier: the MiniLM sentence encoder fine-tuned, once or with several seeds."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from edge_runtime.bundles.manifest import ProcessingEntry
from edge_runtime.processing import encode_rows
from edge_runtime.processing.wordpiece import WordpieceFeaturiser
from tools.encoder import PAD, Encoder, Sizes, load_pretrained, pretrained_folder
from tools.rows import BadRows
from tools.training.cloud_graph import export
from tools.training.cloud_student import STUDENT, Student, learn_from
from tools.training.data import Data
from tools.training.edge import Trained
from tools.training.fine_tune import Recipe, Task, fine_tune
from tools.training.loop import Epoch
from tools.training.word_pieces import LENGTHS, tokenised, tokenizer_of

MAX_BATCH = 32


def train_cloud(
    data: Data,
    *,
    work: Path,
    seed: int = 1,
    epochs: int | None = None,
    members: int = 1,
    given: Sequence[Path] = (),
    distil: bool = False,
    recipe: Recipe | None = None,
    student: Student = STUDENT,
    sizes: Sizes | None = None,
    source: Path | None = None,
) -> Trained:
    """Train `members` encoders, or take the averaged weights of those `given`; pack them as one graph.

    With `distil` the best of them learns the mean answer of all, and is packed alone. A killed run continues at the
    member and epoch it was in. `source` is the folder of tokeniser and pretrained weights; without weights in it
    (tests) the encoder begins at random. Raises BadRows, EdgeRuntimeError.
    """
    recipe, sizes, source = recipe or Recipe(), sizes or Sizes(), source or pretrained_folder()
    recipe = replace(recipe, epochs=epochs) if epochs is not None else recipe
    tokenizer = (source / "tokenizer.json").read_bytes()
    asked = (
        _given(data, given, sizes) if given else _trained(data, recipe, sizes, source, seed, members, work)
    )
    used = {"members": len(given) or members, **asdict(recipe)}
    if distil:
        net, curve = learn_from(asked, data, student, sizes, source, seed=seed, work=work)
        nets, used = [net], {**used, "student": asdict(student)}
    else:
        nets, curves = zip(*asked, strict=True)
        curve = curves[-1]
    featuriser = WordpieceFeaturiser(tokenizer, lengths=LENGTHS, pad=PAD)
    return Trained(
        export(nets, LENGTHS[-1]),
        ProcessingEntry(
            "text_wordpiece", "1", {"tokenizer": "tokenizer.json", "lengths": LENGTHS, "pad": PAD}
        ),
        {"tokenizer.json": tokenizer},
        encode_rows(featuriser, [text.encode() for text in data.val.texts]),
        curve,
        used,
        max_batch=MAX_BATCH,
    )


def _given(data: Data, paths: Sequence[Path], sizes: Sizes) -> Iterator[tuple[Encoder, list[Epoch]]]:
    for path in paths:
        net = Encoder(len(data.names), sizes=sizes)
        _load_member(net, path)
        yield net, []


def _trained(
    data: Data, recipe: Recipe, sizes: Sizes, source: Path, seed: int, members: int, work: Path
) -> Iterator[tuple[Encoder, list[Epoch]]]:
    for member in range(members):
        print(f"member {member + 1} of {members}", file=sys.stderr)
        yield train_member(data, recipe, sizes, source, seed=seed + member, work=work)


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
    torch.manual_seed(seed)
    net = Encoder(len(data.names), recipe.dropout, sizes)
    if (source / "model.safetensors").exists():
        load_pretrained(net, source / "model.safetensors")
    tokenizer = tokenizer_of(source)
    ids, val = tokenised(tokenizer, data.train.texts), tokenised(tokenizer, data.val.texts)
    labels = torch.from_numpy(data.train.labels)
    task = Task(ids, labels, len(ids), val, tokenizer.token_to_id("[MASK]"))
    key = (data.sha256, data.names, data.train.texts, asdict(recipe), asdict(sizes), seed)
    return fine_tune(net, task, recipe, data, seed=seed, work=work, name=f"member-{seed}", key=key)


def _load_member(net: Encoder, path: Path) -> None:
    """Take weights that `train_member` kept, or a bare state dict. Raises BadRows."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        net.load_state_dict(saved.get("weights", saved))
    except Exception as error:  # noqa: BLE001 - torch raises whatever it likes for a bad file
        first = str(error).split("\n", 1)[0][:120]
        raise BadRows(f"{path} holds no member for these labels ({first}).") from None
