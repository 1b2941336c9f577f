"""From a file of commands to a bundle that serves: tiny data, few epochs, real training."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from edge_runtime.bundles.folder import Trust, load_bundle
from edge_runtime.bundles.signing import generate
from edge_runtime.engines import run_rows
from edge_runtime.engines.onnx import OnnxEngine
from edge_runtime.loading.model import load_model
from edge_runtime.processing import decode_rows, encode_rows
from tools import train_commands
from tools.encoder import Dropout, Encoder, Sizes
from tools.pack import engine_logits
from tools.rows import OOS, BadRows, LabelledText, normalised
from tools.trained_rows import read_trained
from tools.training import cloud, cloud_student, edge
from tools.training.augment import recombine
from tools.training.cloud_student import STUDENT
from tools.training.data import prepare, stratified, val_share
from tools.training.edge_net import Shape
from tools.training.fine_tune import Recipe, logits_of
from tools.training.loop import Checkpoint
from tools.training.sentences import SentenceTeacher, is_english
from tools.training.word_pieces import tokenised, tokenizer_of

pytestmark = pytest.mark.train

VERBS = {
    "light_on": ("turn on", "switch on", "light up", "please put on"),
    "light_off": ("turn off", "switch off", "put out", "please kill"),
    "warmer": ("heat up", "warm", "make it warmer in", "raise the heat in"),
    "cooler": ("cool down", "chill", "make it colder in", "lower the heat in"),
}
ROOMS = (
    "kitchen",
    "hall",
    "bath",
    "office",
    "attic",
    "cellar",
    "garage",
    "porch",
    "bedroom",
    "den",
    "sauna",
    "loft",
)
ENDS = ("", " now", " please", " for me")
ROWS = [
    LabelledText(f"{verb} the {room}{end}", label)
    for (label, verbs), room, end in product(VERBS.items(), ROOMS, ENDS)
    for verb in verbs
]
TINY = Shape(buckets=500, width=16, hidden=16)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are in one order only
    yield
    torch.set_num_threads(before)


def write_csv(path, rows, *, split=False):
    lines = ["text,label" + (",split" if split else "")]
    lines += [f'"{row.text}",{row.label}' + (f",{row.split}" if split else "") for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@dataclass
class Done:
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Run the command in this process: importing torch costs more than these trainings."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        code = 0
        try:
            teacher = () if {"--teacher", "cloud"} & set(arguments) else ("--teacher", "none")
            train_commands.main([*map(str, arguments), "--threads", "1", *teacher])
        except SystemExit as stop:
            code = stop.code
        return Done(code, *capsys.readouterr())

    return run


# --- data ---


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["A", "a ", "b", "c", "d"])),
        min_size=1,
        max_size=80,
    ),
    st.floats(0.1, 0.5),
    st.integers(0, 5),
)
def test_a_split_keeps_equal_texts_together_and_every_label_learned(pairs, share, seed):
    rows = [LabelledText(text * 3, label, line=i) for i, (label, text) in enumerate(pairs)]
    train, val = stratified(rows, share, seed)
    assert sorted(row.line for row in train + val) == list(range(len(rows)))
    assert not {normalised(row.text) for row in train} & {normalised(row.text) for row in val}
    assert {row.label for row in train} == {row.label for row in rows}
    assert len(val) <= share * len(rows) + 1


def test_a_split_is_seeded_and_gives_each_label_its_share():
    one, again, other = (stratified(ROWS, 0.2, seed)[1] for seed in (1, 1, 2))
    assert one == again != other
    counts = [sum(row.label == label for row in one) for label in VERBS]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == pytest.approx(0.2 * len(ROWS), abs=1)
    pairs = [LabelledText(f"{label} {i}", str(label)) for label in range(50) for i in range(2)]
    assert len(stratified(pairs, 0.2, 0)[1]) == pytest.approx(20, abs=1)


@pytest.mark.parametrize(("rows", "share"), [(20, 0.2), (5000, 0.2), (8000, 0.125), (50_000, 0.1)])
def test_no_more_is_set_aside_than_calibration_needs(rows, share):
    assert val_share(rows) == share


def test_a_split_of_the_file_is_kept_but_no_text_is_on_both_sides():
    rows = [
        LabelledText("Go  on", "x", "train"),
        LabelledText("stop", "y", "train"),
        LabelledText("go on", "x", "val"),
        LabelledText("halt", "y", "val"),
    ]
    data = prepare(rows, seed=0, where="f")
    assert data.val.texts == ("halt",)
    assert any("1 val rows whose text is also in train" in note for note in data.notes)
    with pytest.raises(BadRows, match="line 9: split is empty"):
        prepare([*rows, LabelledText("hm", "x", line=9)], seed=0, where="f")
    with pytest.raises(BadRows, match="no row has the split train"):
        prepare(rows[2:], seed=0, where="f")
    only = prepare([replace(row, split="train") for row in ROWS], seed=0, where="f")
    assert len(only.val) == pytest.approx(0.2 * len(ROWS), abs=1)


def test_what_looks_wrong_is_told():
    rows = [
        *ROWS,
        LabelledText("Turn on the kitchen", "light_off", line=7),
        LabelledText("once", "rare"),
        ROWS[0],
    ]
    notes = "\n".join(prepare(rows, seed=0, where="f").notes)
    assert "1 texts have more than one label" in notes
    assert "line 7 light_off" in notes
    assert "2 rows repeat" in notes
    assert "1 labels have a single row: rare" in notes
    with pytest.raises(BadRows, match="one label only"):
        prepare(ROWS[:3], seed=0, where="f")


@pytest.mark.parametrize(
    "texts", [["on", "off"], ["\u6253\u5f00\u706f", "\u5173\u706f"], ["a b c d e", "f g h i j"]]
)
def test_texts_are_recombined_without_going_round_for_ever(texts):
    made = recombine(texts, np.array([0, 1]), 300, np.random.default_rng(0))
    assert len(made) == len(set(made)) <= 300
    assert not set(made) & set(texts)
    assert made == recombine(texts, np.array([0, 1]), 300, np.random.default_rng(0))
    if "\u5173\u706f" in texts:
        assert len(made) > 20
        assert not any(" " in text for text in made)


# --- edge ---


def train_tiny(data, work, **changes):
    recipe = replace(edge.ALONE, epochs=3, least_rows=1500, **changes)
    return edge.train_edge(data, work=work, seed=3, shape=TINY, recipe=recipe)


def test_a_stopped_training_goes_on_to_the_same_result(tmp_path, monkeypatch):
    data = prepare(ROWS, seed=0, where="f")
    whole = train_tiny(data, tmp_path / "whole")
    save = edge.Checkpoint.save

    def stop_after_one(self, state):
        save(self, state)
        if len(state["curve"]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(edge.Checkpoint, "save", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(data, tmp_path / "work")
    monkeypatch.undo()
    resumed = train_tiny(data, tmp_path / "work")
    assert resumed.model == whole.model
    assert [p.loss for p in resumed.curve] == [p.loss for p in whole.curve]
    assert len(resumed.curve) == 3
    losses = [point.loss for point in whole.curve]
    assert all(late < early for early, late in pairwise(losses))
    # Other settings do not go on from there.
    assert train_tiny(data, tmp_path / "work", rate=1e-3).model != whole.model


def test_the_packed_model_answers_as_the_trained_net(tmp_path):
    data = prepare(ROWS, seed=0, where="f")
    trained = train_tiny(data, tmp_path)
    engine = OnnxEngine(trained.model, max_batch=trained.max_batch)
    logits = engine_logits(engine, trained.rows)
    share = (logits.argmax(1) == data.val.labels).mean()
    assert share == pytest.approx(trained.curve[-1].accuracy, abs=0.02)
    assert share > 0.8


@pytest.mark.parametrize(
    ("words", "unspaced"),
    [
        (
            ("\u6253\u5f00", "\u5173\u95ed", "\u8c03\u9ad8", "\u8c03\u4f4e"),
            True,
        ),  # Chinese: open, close, raise, lower
        (
            (
                "\u0e40\u0e1b\u0e34\u0e14",
                "\u0e1b\u0e34\u0e14",
                "\u0e40\u0e1e\u0e34\u0e48\u0e21",
                "\u0e25\u0e14",
            ),
            True,
        ),  # Thai
        (
            (
                "\u0634\u063a\u0644 ",
                "\u0623\u0637\u0641\u0626 ",
                "\u0627\u0631\u0641\u0639 ",
                "\u062e\u0641\u0636 ",
            ),
            False,
        ),
        (("\U0001f4a1", "\U0001f319", "\U0001f525", "\u2744\ufe0f"), False),
    ],
)
def test_any_language_is_learned(tmp_path, words, unspaced):
    rng = np.random.default_rng(0)
    letters = [chr(c) for c in (range(0x5BA2, 0x5BE0) if unspaced else range(0x0627, 0x063A))]
    rows = [
        LabelledText("".join(rng.choice(letters, 3)) + word + "".join(rng.choice(letters, 4)), str(i))
        for _ in range(60)
        for i, word in enumerate(words)
    ]
    data = prepare(rows, seed=0, where="f")
    assert edge.features_for(data.train.texts).grams == ((3, 6) if unspaced else (3, 4, 5))
    recipe = replace(edge.ALONE, epochs=4, least_rows=1500)
    shape = Shape(buckets=4000, width=32, hidden=32)
    assert edge.train_edge(data, work=tmp_path, shape=shape, recipe=recipe).curve[-1].accuracy > 0.9


# --- cloud ---

SMALL = Sizes(layers=2, hidden=32, heads=4, inner=64, vocabulary=200, positions=64)
SHORT = Recipe(epochs=3, rate=1e-3, least_rows=600, batch=32)


@pytest.fixture(scope="module")
def tokeniser_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for row in ROWS for word in row.text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def fine_tune(work, folder, **options):
    data = prepare(ROWS, seed=0, where="f")
    return data, cloud.train_cloud(data, work=work, recipe=SHORT, sizes=SMALL, source=folder, **options)


def test_members_answer_by_their_mean_log_probability(tmp_path, tokeniser_folder):
    data, both = fine_tune(tmp_path, tokeniser_folder, members=2)
    kept = sorted(tmp_path.glob("member-*.pt"))
    assert [path.name for path in kept] == ["member-1.pt", "member-2.pt"]
    assert not list(tmp_path.glob("running-*"))
    assert both.curve[-1].accuracy > 0.9

    def answers(trained):
        return engine_logits(OnnxEngine(trained.model, max_batch=8), trained.rows)

    singles = [answers(fine_tune(tmp_path, tokeniser_folder, given=[path])[1]) for path in kept]
    shares = [torch.from_numpy(x).log_softmax(1).numpy() for x in singles]
    np.testing.assert_allclose(answers(both), np.mean(shares, axis=0), atol=1e-5)
    assert np.abs(shares[0] - shares[1]).max() > 0.01
    again = fine_tune(tmp_path / "other", tokeniser_folder, given=kept)[1]
    assert again.model == both.model
    # The graph computes what the network does, up to the rounding of its weights.
    net = Encoder(len(data.names), sizes=SMALL)
    net.load_state_dict(torch.load(kept[0], weights_only=True)["weights"])
    ids = tokenised(tokenizer_of(tokeniser_folder), data.val.texts)
    np.testing.assert_allclose(logits_of(net, ids), singles[0], atol=0.1)
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"nonsense")
    with pytest.raises(BadRows, match="holds no member"):
        fine_tune(tmp_path, tokeniser_folder, given=[bad])


def test_a_stopped_fine_tuning_goes_on_to_the_same_result(tmp_path, tokeniser_folder, monkeypatch):
    whole = fine_tune(tmp_path / "whole", tokeniser_folder, members=2)[1]
    save, saved = Checkpoint.save, []

    def stop_in_second_member(self, state):
        save(self, state)
        saved.append(self.path.name)
        if saved[-2:] == ["running-member-2.pt"] * 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", stop_in_second_member)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(tmp_path / "work", tokeniser_folder, members=2)
    monkeypatch.undo()
    assert fine_tune(tmp_path / "work", tokeniser_folder, members=2)[1].model == whole.model


def test_a_student_learns_what_members_say_together(tmp_path, tokeniser_folder, monkeypatch):
    data, worse = fine_tune(tmp_path / "worse", tokeniser_folder, seed=2, epochs=1)
    better = fine_tune(tmp_path / "better", tokeniser_folder)[1]
    assert worse.curve[-1].accuracy < better.curve[-1].accuracy
    given = [tmp_path / "worse" / "member-2.pt", tmp_path / "better" / "member-1.pt"]
    tokenizer = tokenizer_of(tokeniser_folder)
    val = tokenised(tokenizer, data.val.texts)

    def said(path):
        net = Encoder(len(data.names), sizes=SMALL)
        net.load_state_dict(torch.load(path, weights_only=True)["weights"])
        return torch.from_numpy(logits_of(net, val)).log_softmax(1)

    def learned(work, **changes):
        recipe = replace(STUDENT.recipe, **{"rate": 1e-3, "batch": 32, "dropout": 0.0, **changes})
        student = replace(STUDENT, recipe=recipe, hard_share=0.0)
        trained = fine_tune(work, tokeniser_folder, given=given, distil=True, student=student)[1]
        return trained, said(work / "student-1.pt")

    # It begins as the better one, which is not the first,
    np.testing.assert_allclose(learned(tmp_path / "begun", rate=0.0)[1], said(given[1]), atol=1e-5)
    trained, student = learned(tmp_path / "work")
    wanted = torch.stack([said(path) for path in given]).mean(0).softmax(1)
    far = [float(-(wanted * x).sum(1).mean()) for x in (student, said(given[1]), wanted.log())]
    assert far[0] - far[2] < 0.3 * (far[1] - far[2])  # ... and comes near to the mean of both.
    assert trained.recipe["members"] == 2
    assert sorted(path.name for path in (tmp_path / "work").glob("*.pt")) == ["student-1.pt"]
    # Killed at the end of its epoch, it goes on; nobody is asked again.
    save = Checkpoint.save

    def stop(self, state):
        save(self, state)
        if self.path.name == "running-student-1.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path / "killed")
    monkeypatch.undo()
    monkeypatch.setattr(cloud_student, "half_precision", None)
    assert learned(tmp_path / "killed")[0].model == trained.model


def test_a_student_learns_labels_too_where_there_are_some():
    heard = np.log(np.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]], np.float32))
    wanted = [[0.8, 0.2], [0.08, 0.92], [0.9, 0.1]]
    np.testing.assert_allclose(cloud_student.targets(heard, np.array([0, 1]), 0.6), wanted, atol=1e-6)


def test_dropout_by_bytes_keeps_the_mean():
    torch.manual_seed(0)
    dropout, x = Dropout(0.1), torch.ones(1000, 1001)
    dropped = dropout(x)
    assert float((dropped == 0).float().mean()) == pytest.approx(26 / 256, abs=0.002)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.003)
    assert dropout.eval()(x) is x


# --- the command ---


def test_a_file_becomes_a_bundle_that_answers(tmp_path, train):
    rows = [*ROWS, *(LabelledText(f"what is {i} times {i * 3}", OOS) for i in range(40))]
    write_csv(tmp_path / "home.csv", rows)
    private, public = generate()
    (tmp_path / "key").write_bytes(private)
    (tmp_path / "key.pub").write_bytes(public)
    options = ("--tier", "edge", "--name", "home", "--out", "home", "--epochs", "2")
    done = train("home.csv", *options, "--key", "key", "--json")
    assert done.code == 0, done.stderr
    assert "training 100%" in done.stderr
    report = json.loads(done.stdout)
    bundle = load_bundle(tmp_path / "home", Trust((public,)))
    manifest = bundle.manifest
    assert (manifest.name, manifest.version, bundle.digest) == ("home", "1", report["digest"])
    assert manifest.calibration.rows == report["data"]["val"] == len(rows) - report["data"]["train"]
    assert manifest.credits[0].name == "data: home.csv"
    assert "train_rows" in manifest.metrics
    model = load_model(tmp_path / "home")
    (row,) = run_rows(model.engine, encode_rows(model.processor, [b"please put on the sauna"]))
    assert decode_rows(model.processor, [row], [b""])[0].values[0] == b"light_on"
    assert report["calibration"]["accuracy"] > 0.9
    trained = read_trained(bundle.files[manifest.trained_rows])
    assert sum(text.text in trained for text in rows) == pytest.approx(report["data"]["train"], abs=3)
    page = (tmp_path / "home-report" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=.?http", page)
    assert {"confusions", "labels", "certificates", "microseconds"} <= set(
        json.loads((tmp_path / "home-report" / "report.json").read_text())
    )
    # The printed commands work as they stand.
    ask = next(line for line in report["next"] if " ask " in line).split("ask ", 1)[1]
    command = f'{sys.executable} -c "from edge_runtime.cli.main import main; main()" ask {ask}'
    asked = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "sure  local" in asked.stdout, asked.stderr
    # The next one counts up, as devices ask for it.
    again = train("home.csv", *options)
    assert "home: home 2," in again.stdout
    assert "going on after epoch 2 of 2" in again.stderr


def test_a_teacher_is_learned_from_and_credited(tmp_path, train, monkeypatch):
    monkeypatch.setattr(edge, "TAUGHT", replace(edge.TAUGHT, least_recombined=300))
    rows = [LabelledText(text, label) for text, label in (
        [(f"play {x} {y}", "play_music") for x in ("some", "the", "my") for y in ("jazz", "song", "list", "tune")]
        + [(f"set {x} {y}", "timer") for x in ("a", "the", "my") for y in ("timer", "clock", "countdown", "ten minutes")]
    )]  # fmt: skip
    write_csv(tmp_path / "a.csv", rows)
    options = ("--tier", "edge", "--name", "a", "--epochs", "1", "--out", "a", "--teacher", "commands")
    done = train("a.csv", *options, "--json")
    assert done.code == 0, done.stderr
    assert "the teacher's answers" in done.stderr
    assert {"CLINC150", "data: a.csv"} <= {
        credit.name for credit in load_bundle(tmp_path / "a").manifest.credits
    }
    assert list((tmp_path / "a.work").glob("teacher-*.npy"))
    write_csv(tmp_path / "b.csv", ROWS[:20] + ROWS[-20:])
    done = train("b.csv", *options)
    assert done.code == 1
    assert "does not know 2 labels:\ncooler\nlight_on" in done.stderr


@pytest.mark.parametrize(
    ("texts", "known"),
    [
        (["turn it off", "caf\u00e9 please"], True),
        (["\u5f00\u706f", "on"], False),
        (["\u0434\u0430"], False),
        (["1 2"], False),
    ],
)
def test_the_sentence_encoder_is_asked_for_english_alone(texts, known):
    assert is_english(texts) is known


def test_without_a_teacher_the_sentence_encoder_is_one(tmp_path, train, monkeypatch):
    monkeypatch.setattr(
        train_commands,
        "SELF_TAUGHT",
        replace(edge.SELF_TAUGHT, recombined=1, least_recombined=50, least_rows=1000),
    )
    # The words that tell the labels apart in val are none of those in train: only their meaning helps.
    learned = {"animal": ("dog", "cat", "horse", "cow"), "fruit": ("apple", "banana", "grape", "plum")}
    asked = {"animal": ("puppy", "kitten", "pony"), "fruit": ("orange", "cherry", "peach")}
    rows = [
        LabelledText(f"{start} {word}", label, split)
        for split, words in (("train", learned), ("val", asked))
        for label, some in words.items()
        for word in some
        for start in ("i see a", "give me the", "what a nice", "there is one more")
    ]
    write_csv(tmp_path / "a.csv", rows, split=True)
    data = prepare(rows, seed=0, where="f")
    teacher = SentenceTeacher(data.train, 2, seed=0)
    texts = [*data.train.texts, *data.val.texts]
    logits = teacher.logits(texts, tmp_path / "work")
    answers = logits[len(data.train) :].argmax(1)
    assert (answers == data.val.labels).mean() > 0.8
    np.testing.assert_array_equal(teacher.logits(texts, tmp_path / "work"), logits)  # from the cache
    options = ("a.csv", "--tier", "edge", "--name", "a", "--epochs", "1", "--out", "a", "--threads", "1")
    train_commands.main(options)
    manifest = load_bundle(tmp_path / "a").manifest
    assert "all-MiniLM-L6-v2" in {credit.name for credit in manifest.credits}


@pytest.mark.parametrize("count", [2, 20])
def test_very_few_rows_still_make_a_bundle(tmp_path, train, count):
    rows = [LabelledText(f"{word} {i}", word) for i in range(count // 2) for word in ("yes", "no")]
    write_csv(tmp_path / "a.csv", rows)
    done = train("a.csv", "--tier", "edge", "--name", "a", "--out", "a", "--epochs", "1")
    assert done.code == 0, done.stderr
    assert load_model(tmp_path / "a").accept_threshold is None or count == 20
    assert "not certifiable" in done.stdout
    assert ("no row could be set aside" if count == 2 else "say little of the confidence") in done.stderr


@pytest.mark.parametrize(
    ("content", "extra", "said"),
    [
        ("text,label\nhi,\nho,x\n", (), "line 2: label is missing"),
        ("text,label\nhi,x\n", (), "one label only"),
        ("text,label\nhi,x\nho,y\n", ("--name", "My Model"), "--name 'My Model'"),
        ("text,label\nhi,x\nho,y\n", ("--members", "2"), "for the cloud tier"),
        ("text,label\nhi,x\nho,y\n", ("--distil",), "for the cloud tier"),
        ("text,label\nhi,x\nho,y\n", ("--tier", "cloud", "--distil"), "add --members 2"),
        ("text,label\nhi,x\nho,y\n", ("--key", "none"), "none"),
        ("text,label\nhi,x\nho,y\n", ("--out", "full"), "is no bundle"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(tmp_path, train, content, extra, said):
    (tmp_path / "a.csv").write_text(content)
    (tmp_path / "full").mkdir()
    done = train("a.csv", "--tier", "edge", "--name", "a", "--out", "a", *extra)
    assert done.code == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "full"]


def test_a_run_killed_in_mid_epoch_goes_on_to_the_same_bundle(tmp_path, train):
    write_csv(tmp_path / "a.csv", ROWS)
    options = (
        "a.csv",
        "--tier",
        "edge",
        "--name",
        "a",
        "--epochs",
        "2",
        "--threads",
        "1",
        "--teacher",
        "none",
    )
    command = [sys.executable, "-m", "tools.train_commands", *options, "--out", "killed"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in running.stderr:
        if line.startswith("training 7"):  # within the second epoch
            running.send_signal(signal.SIGKILL)
    running.stderr.close()
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    resumed = train(*options, "--out", "killed")
    assert "going on after epoch 1 of 2" in resumed.stderr
    train(*options, "--out", "whole")
    one, other = (load_bundle(tmp_path / name) for name in ("killed", "whole"))
    assert one.files == other.files
    assert one.manifest.calibration == other.manifest.calibration
