"""Fitting how both tiers' evidence is joined, and evaluating a cascade that joins it."""

import msgspec
import numpy as np
import pytest

from edge_runtime.bundles.folder import find_bundle, load_bundle, write_bundle
from edge_runtime.core.errors import EdgeRuntimeError
from edge_runtime.core.escalation.score_fusion import pool
from tools.evaluate import Answers, evaluate, joined
from tools.fuse import fit_fusion, fit_weight, fuse
from tools.rows import LabelledText

LABELS = 4


def noisy(truth, strength, rng):
    """Log-probabilities of a model that sees the truth through noise."""
    logits = rng.standard_normal((len(truth), LABELS)).astype(np.float32)
    logits[np.arange(len(truth)), truth] += strength
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_the_better_tier_weighs_more_and_together_they_beat_both():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, LABELS, 2000)
    edge, cloud = noisy(truth, 1.0, rng), noisy(truth, 2.0, rng)
    weight = fit_weight(edge, cloud, truth)
    assert 0.0 < weight < 1.0
    right = (pool(edge, cloud, weight, 1.0).argmax(1) == truth).mean()
    assert right > max((edge.argmax(1) == truth).mean(), (cloud.argmax(1) == truth).mean())


def test_an_edge_that_knows_nothing_gets_no_weight():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, LABELS, 2000)
    edge = noisy(rng.integers(0, LABELS, 2000), 1.0, rng)
    assert fit_weight(edge, noisy(truth, 2.0, rng), truth) <= 0.1


def answers(truth, strength, confidence, rng):
    return Answers(np.array(["x"] * len(truth)), np.full(len(truth), confidence), noisy(truth, strength, rng))


def test_too_few_rows_are_refused_with_both_numbers():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, LABELS, 150)
    with pytest.raises(EdgeRuntimeError, match=r"150 rows .* 200"):
        fit_fusion(answers(truth, 1, 0.1, rng), answers(truth, 2, 0.5, rng), truth, "1")


def test_a_fitted_bundle_joins_in_the_evaluation_only_with_the_cloud_it_was_fitted_for(tmp_path):
    shipped = load_bundle(find_bundle("commands"))
    fields = {k: v for k, v in msgspec.to_builtins(shipped.manifest).items() if k not in ("format", "files")}
    knots = [[0.0, 0.1], [1.0, 0.9]]
    for version, name in ((fields["version"], "fits"), ("77", "foreign")):
        fields["calibration"]["fusion"] = {
            "cloud_version": version, "edge_weight": 0.5, "cloud_weight": 0.5, "knots": knots,
        }  # fmt: skip
        write_bundle(tmp_path / name, fields, shipped.files)
    cloud = str(find_bundle("commands"))
    rows = [LabelledText("turn the lights off", "smart_home"), LabelledText("flip a coin", "flip_coin")]
    report = evaluate(str(tmp_path / "fits"), rows, cloud, None)
    assert report["cascade"]["joined"]
    assert report["cascade"]["best_accuracy"] == 1.0
    assert not evaluate(str(tmp_path / "foreign"), rows, cloud, None)["cascade"]["joined"]


def test_what_comes_back_is_pooled_and_calibrated_by_the_joined_knots(tmp_path):
    shipped = load_bundle(find_bundle("commands"))
    fields = {k: v for k, v in msgspec.to_builtins(shipped.manifest).items() if k not in ("format", "files")}
    fields["calibration"]["fusion"] = {
        "cloud_version": fields["version"], "edge_weight": 1.0, "cloud_weight": 1.0, "knots": [[0.0, 0.2], [1.0, 0.4]],
    }  # fmt: skip
    write_bundle(tmp_path / "fits", fields, shipped.files)
    names = msgspec.json.decode(shipped.files["labels.json"])
    flat = np.full((1, len(names)), -5.0, np.float32)
    edge, cloud = flat.copy(), flat.copy()
    edge[0, 0], edge[0, 1], cloud[0, 1], cloud[0, 2] = -0.5, -0.7, -0.7, -0.5
    back = joined(
        str(tmp_path / "fits"),
        Answers(np.array([names[0]]), np.array([0.5]), edge),
        str(find_bundle("commands")),
        Answers(np.array([names[2]]), np.array([0.5]), cloud),
    )
    assert back.labels[0] == names[1]
    assert 0.2 < back.confidence[0] < 0.4


def test_bundles_of_other_labels_are_not_joined(tmp_path):
    rows = [LabelledText("turn the lights off", "no such label")]
    with pytest.raises(EdgeRuntimeError, match="no such label"):
        fuse(find_bundle("commands"), rows, str(find_bundle("commands")))
