"""Calibration: maps rise, counts sum, and no certificate claims more than its own counts allow."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundles.folder import find_bundle, load_bundle, write_bundle
from edge_runtime.bundles.manifest import MAX_BINS, MAX_KNOTS
from edge_runtime.engines import run_rows
from edge_runtime.loading.model import load_model
from edge_runtime.processing import decode_rows, encode_rows
from tools.calibration.certificates import MIN_ROWS, certify, rows_needed, upper_bound
from tools.calibration.error import debiased_calibration_error, expected_calibration_error
from tools.calibration.fit import calibrate, prior_bins
from tools.calibration.knots import ISOTONIC_ROWS, apply_knots, fit_knots
from tools.calibration.scores import fit_temperature
from tools.trained_rows import found_in, read_trained, remember


def sample(n, seed=0, *, labels=5, sharpness=1.0, honest=True):
    """Logits whose softmax is the truth where `honest`, and labels drawn from it."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, labels)) * 2.5
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    drawn = (rng.random(n)[:, None] > chances.cumsum(1)).sum(1).clip(max=labels - 1)
    return (logits * sharpness).astype(np.float32), drawn if honest else rng.integers(labels, size=n)


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0])
def test_the_temperature_undoes_what_sharpened_the_logits(factor):
    logits, labels = sample(4000, sharpness=factor)
    assert fit_temperature(logits, labels) == pytest.approx(factor, rel=0.06)
    assert fit_temperature(logits[:0], labels[:0]) == pytest.approx(1.0, abs=0.01)


@given(
    st.integers(1, 60) | st.sampled_from([ISOTONIC_ROWS - 1, ISOTONIC_ROWS, 1500]),
    st.sampled_from(["drawn", "right", "wrong", "reversed"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_maps_rise_and_never_claim_certainty(n, truth, tied, seed):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.random(n), 1) if tied else rng.random(n)
    right = {
        "drawn": rng.random(n) < scores,
        "right": np.ones(n, bool),
        "wrong": np.zeros(n, bool),
        "reversed": rng.random(n) > scores,
    }[truth]
    knots = fit_knots(scores, right)
    xs, ys = zip(*knots, strict=True)
    assert 2 <= len(knots) <= MAX_KNOTS
    assert list(xs) == sorted(set(xs))
    assert list(ys) == sorted(ys)
    assert min(ys) >= 1 / (n + 2) - 1e-12
    assert max(ys) <= 1 - 1 / (n + 2) + 1e-12
    assert min(xs) >= 0
    assert max(xs) <= 1


def test_both_maps_find_the_true_chances():
    rng = np.random.default_rng(1)
    for n, limit in ((300, 0.12), (20_000, 0.05)):
        scores = rng.random(n)
        right = rng.random(n) < scores**2
        grid = np.linspace(0.1, 0.9, 9)
        assert np.abs(apply_knots(grid, fit_knots(scores, right)) - grid**2).max() < limit


@given(st.integers(0, 40), st.integers(0, 400), st.sampled_from([0.05, 0.01, 0.5]))
def test_the_upper_bound_is_where_the_tail_equals_delta(wrong, more, delta):
    rows = wrong + more
    if not rows:
        return
    bound = upper_bound(wrong, rows, delta)
    if more == 0:
        assert bound == 1.0
        return
    tail = math.fsum(math.comb(rows, i) * bound**i * (1 - bound) ** (rows - i) for i in range(wrong + 1))
    assert tail == pytest.approx(delta, rel=1e-6)


def test_known_bounds_and_the_rule_of_three():
    assert upper_bound(0, 150, 0.05) == pytest.approx(0.01977, abs=1e-5)  # 1 - 0.05 ** (1 / 150)
    assert upper_bound(3, 100, 0.05) == pytest.approx(0.07571, abs=1e-4)
    assert [rows_needed(0, error, 0.05) for error in (0.01, 0.02, 0.05)] == [299, 149, 59]


@given(st.integers(1, 900), st.floats(0.0, 0.3), st.sampled_from([0.01, 0.02, 0.05]), st.integers(0, 50))
def test_no_certificate_claims_more_than_its_counts(n, noise, error, seed):
    rng = np.random.default_rng(seed)
    chances = np.round(rng.random(n), rng.integers(1, 4))
    right = rng.random(n) < 1 - noise * (1 - chances)
    found = certify(chances, right, error)
    assert found.rows == n
    if found.threshold is None:
        assert (found.kept, found.wrong) == (0, 0)
        assert n >= MIN_ROWS or found.missing_rows >= MIN_ROWS - n
        return
    kept = chances >= found.threshold
    assert (found.kept, found.wrong) == (kept.sum(), (kept & ~right).sum())
    assert n >= MIN_ROWS
    assert upper_bound(found.wrong, found.kept, found.delta) <= error + 1e-9
    # No row lies so near that float32 could move it over the threshold.
    assert np.abs(chances - found.threshold).min() > 1e-6 or found.kept == n


def test_testing_stops_at_the_first_failure():
    chances = np.linspace(1.0, 0.0, 4001)[:4000]
    right = np.ones(4000, bool)
    right[1000:1100] = False  # a bad stretch: what lies below it would pass again at 5 %
    found = certify(chances, right, 0.05)
    assert found.threshold is not None
    assert 900 < found.kept < 1100
    assert upper_bound(100, 4000, 0.05) < 0.05


def test_what_is_missing_would_do_if_the_new_rows_were_alike():
    chances, right = np.linspace(0.9, 0.1, 250), np.ones(250, bool)
    found = certify(chances, right, 0.01)
    assert found.threshold is None
    assert found.missing_rows in (49, 50)  # 299 without a wrong one are enough
    more = np.linspace(0.9, 0.1, 250 + found.missing_rows)
    assert certify(more, np.ones(len(more), bool), 0.01).threshold is not None
    assert (
        certify(chances, ~right, 0.01).missing_rows == 0 or certify(chances, ~right, 0.01).missing_rows == 49
    )
    assert certify(chances[:50], right[:50], 0.05).missing_rows == 150


def test_certificates_hold_as_often_as_they_say():
    broken = given_ = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        chances = rng.random(800)
        found = certify(chances, rng.random(800) > 0.16 * (1 - chances), 0.05)
        if found.threshold is not None:
            given_ += 1
            broken += 0.08 * (1 - found.threshold) > 0.05  # the mean risk at or above the threshold
    assert given_ > 50
    assert broken <= 9  # 5 % of 60 are 3; 10 or more have a chance of 0.1 %


def test_the_debiased_error_takes_out_what_noise_adds():
    rng = np.random.default_rng(0)
    plain, fair = [], []
    for _ in range(60):
        chances = rng.uniform(0.5, 1.0, 600)
        right = rng.random(600) < chances
        plain.append(expected_calibration_error(chances, right))
        fair.append(debiased_calibration_error(chances, right))
    assert np.mean(fair) < 0.65 * np.mean(plain)
    chances = np.full(3000, 0.9)
    right = np.arange(3000) % 10 < 7
    assert debiased_calibration_error(chances, right) == pytest.approx(0.2, abs=0.01)
    assert debiased_calibration_error(chances[:0], right[:0]) == 0.0


@given(st.integers(0, 300), st.booleans(), st.integers(0, 20))
def test_prior_bins_count_every_row(n, tied, seed):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.random(n), 1) if tied else rng.random(n)
    right = rng.random(n) < scores
    bins = prior_bins(scores, right)
    assert len(bins) <= MAX_BINS
    assert sum(good for _, good, _ in bins) == right.sum()
    assert sum(bad for _, _, bad in bins) == (~right).sum()
    tops = [top for top, _, _ in bins]
    assert tops == sorted(set(tops))
    assert not n or tops[-1] == 1.0


def test_out_of_scope_rows_answered_in_scope_count_as_wrong():
    logits, labels = sample(2000)
    strangers = np.tile(np.array([[9.0, 0, 0, 0, 0]], np.float32), (500, 1))
    plain = calibrate(logits, labels, None, fitted_on="x")
    mixed = calibrate(
        np.concatenate([logits, strangers]), np.append(labels, np.full(500, -1)), None, fitted_on="x"
    )
    sure = np.array([0.995])
    assert apply_knots(sure, plain.entry.knots)[0] > 0.9 > apply_knots(sure, mixed.entry.knots)[0]
    assert (mixed.report.rows, mixed.report.oos_rows, mixed.report.oos_recall) == (2000, 500, None)
    assert mixed.report.accuracy == plain.report.accuracy
    named = calibrate(logits, labels, 4, fitted_on="x").report
    assert named.rows == (labels != 4).sum()
    assert named.oos_recall == pytest.approx((logits.argmax(1) == labels)[labels == 4].mean())


@pytest.mark.parametrize("n", [0, 1, 3, 50, 1000])
def test_a_calibration_of_any_size_is_whole(n):
    logits, labels = sample(n)
    done = calibrate(logits, labels, None, fitted_on="x")
    assert done.entry.rows == n
    assert len(done.entry.certificates) == 3
    assert (done.entry.accept_threshold is None) == (n == 0)
    assert sum(good + bad for _, good, bad in done.entry.bins) == n
    if n == 1000:
        assert done.report.escalated == pytest.approx(0.15, abs=0.03)
        assert done.report.ece_debiased <= done.report.ece < 0.06


def test_some_are_escalated_even_where_all_are_right():
    logits, _ = sample(500)
    done = calibrate(logits, logits.argmax(1), None, fitted_on="x", escalate=0.3)
    assert 0.1 < done.report.escalated < 0.32  # the surest of them share one chance


@given(st.lists(st.text(max_size=12), max_size=80))
def test_every_trained_text_is_found_again(texts):
    known = read_trained(remember(texts).to_bytes())
    assert all(text in known and f" {text}  " in known for text in texts)


def test_trained_rows_are_small_and_rarely_err():
    texts = [f"turn the light {i} on" for i in range(15_000)]
    trained = remember(texts)
    assert len(trained.to_bytes()) * 8 <= 15 * len(texts)
    strangers = [f"play song {i}" for i in range(20_000)]
    found, too_many = found_in(trained, strangers)
    assert len(found) < 50
    assert not too_many
    assert trained.false_positives < 0.002
    assert found_in(trained, strangers[:500] + texts[:20])[1]
    # One text often repeated is one coincidence.
    assert found
    assert not found_in(trained, [strangers[found[0]]] * 50 + strangers[-500:])[1]


@pytest.mark.parametrize("payload", [b"", b"ERTR", b"x" * 40, remember(["a"]).to_bytes()[:12]])
def test_other_payloads_are_refused(payload):
    with pytest.raises(ValueError, match="trained rows"):
        read_trained(payload)


# --- the command ---


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """400 texts that nobody trained on, labelled by the shipped bundle itself."""
    model = load_model("commands")
    lines = []
    for i in range(400):
        text = (
            f"{('play song', 'what is the weather in', 'set a timer for', 'translate')[i % 4]} {i} zq{i * 7}"
        )
        (row,) = run_rows(model.engine, encode_rows(model.processor, [text.encode()]))
        lines.append(
            {"text": text, "label": decode_rows(model.processor, [row], [b""])[0].values[0].decode()}
        )
    return lines


def run_calibrate(*arguments):
    command = [sys.executable, "-m", "tools.calibrate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def taught_bundle(folder, texts):
    """The shipped bundle with a memory of some texts."""
    bundle = load_bundle(find_bundle("commands"))
    import msgspec

    fields = msgspec.to_builtins(bundle.manifest)
    fields |= {"trained_rows": "trained.bin", "version": "7"}
    for name in ("format", "files"):
        del fields[name]
    write_bundle(folder, fields, {**bundle.files, "trained.bin": remember(texts).to_bytes()})
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_bundle_is_calibrated_anew(tmp_path, fresh):
    bundle = taught_bundle(tmp_path / "mine", ["something else"])
    data = write_rows(tmp_path / "rows.jsonl", fresh)
    done = run_calibrate(f"{bundle}", data, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    manifest = load_bundle(bundle).manifest
    assert said["version"] == manifest.version == "8"
    assert manifest.calibration.rows == 400
    assert len(manifest.calibration.data_sha256) == 64
    assert manifest.trained_rows == "trained.bin"
    assert load_model(bundle).accept_threshold == manifest.calibration.accept_threshold
    out = tmp_path / "other"
    done = run_calibrate(f"{bundle}", data, "--out", out)
    assert "sign it" in done.stdout
    assert load_bundle(out).manifest.version == "9"
    assert load_bundle(bundle).manifest.version == "8"


@pytest.mark.parametrize("case", ["trained", "few", "unknown", "folder"])
def test_rows_that_may_not_calibrate_are_refused_by_line(tmp_path, fresh, case):
    bundle = taught_bundle(tmp_path / "mine", [row["text"] for row in fresh[5:25]])
    before = load_bundle(bundle).digest
    rows, extra, said = fresh, [], ""
    if case == "trained":
        said = "20 of 400 rows were trained on"
    elif case == "few":
        rows, said = fresh[30:200], "170 rows remain; calibration needs 200"
    elif case == "unknown":
        rows, said = [*fresh[25:], {"text": "a", "label": "no_such"}], "line 376: no_such"
    else:
        (tmp_path / "full").mkdir()
        rows, extra, said = fresh[25:], ["--out", tmp_path / "full"], "is no bundle"
    done = run_calibrate(bundle, write_rows(tmp_path / "rows.jsonl", rows), *extra)
    assert done.returncode == 1
    assert said in done.stderr
    assert case != "trained" or "line 6: " in done.stderr
    assert load_bundle(bundle).digest == before
    assert Path(tmp_path / "full").exists() == (case == "folder")


def test_the_runtime_scores_as_the_calibration_did_when_oos_is_a_label():
    from edge_runtime.processing.text_classification import Calibration
    from tools.calibration.scores import scores_of

    rng = np.random.default_rng(4)
    logits = (3 * rng.standard_normal((50, 6))).astype(np.float32)
    for oos in (None, 5):
        identity = Calibration(0.8, (0.0, 1.0), (0.0, 1.0), oos)
        claimed = [identity.read(row, int(row.argmax()))[0] for row in logits]
        assert np.allclose(claimed, scores_of(logits, 0.8, oos), atol=1e-5)
    doubtful = np.array([[4.0, 3.5, 0.0], [4.0, 0.0, 3.5]], np.float32)
    low = scores_of(doubtful, 1.0, 1)
    assert low[0] < low[1]
