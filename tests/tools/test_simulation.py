"""The simulator against theory, and the scheduler in it against what it is meant to reach. Simulated time, fixed seed."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from tools import simulate_batching
from tools.simulation import cases, measures, policies, report
from tools.simulation.arrivals import Arrivals, bursts, diurnal, poisson
from tools.simulation.engine import Engine
from tools.simulation.replay import replay
from tools.simulation.rules import Bento, Clipper, Natural

US, MS = 1_000, 1_000_000
COUNT = simulate_batching.QUICK


@pytest.fixture(scope="module")
def rows():
    compared = {policies.OURS, policies.NONE, policies.PLAIN, "fixed 2 ms"}
    return measures.measure(simulate_batching.all_cases(), COUNT, seed=0, policies=compared)


def outcome_of(rule, engine, rate, count=40_000):
    times = poisson(np.random.default_rng(1), count, rate)
    arrivals = Arrivals([int(ns) for ns in times])
    outcome = replay(rule, engine, arrivals, 0)
    return outcome, measures.latencies_ms(outcome, arrivals) * MS


# The simulator


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_batches_of_one_wait_as_pollaczek_and_khinchin_say(load):
    engine = Engine(0, 1 * MS, max_batch=1)
    outcome, latencies = outcome_of(Natural(1), engine, load / MS)
    assert latencies.mean() == pytest.approx(MS * (1 + load / (2 * (1 - load))), rel=0.03)
    assert outcome.busy_ns / outcome.end_ns == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_natural_batches_grow_to_the_size_that_balances(share):
    """Inoue (arXiv 1912.06322): b = rate * a / (1 - rate * c), where batches are large and have no bound."""
    engine = Engine(10 * MS, 1 * MS, max_batch=1 << 20)
    outcome, _ = outcome_of(Natural(engine.max_batch), engine, share / MS)
    assert np.mean(outcome.sizes) == pytest.approx(share * 10 / (1 - share), rel=0.03)


def test_arrivals_have_the_rates_and_shapes_that_they_name():
    rng = np.random.default_rng(2)
    assert poisson(rng, 20_000, 1 / MS)[-1] == pytest.approx(20_000 * MS, rel=0.03)
    times = bursts(rng, 20_000, 1 / MS)
    assert len(times) == 20_000
    assert times[-1] == pytest.approx(20_000 * MS, rel=0.06)
    assert (np.diff(times) < 200 * US).mean() > 0.8  # of eight, seven follow closely
    day = diurnal(rng, 20_000, 0.1 / MS, 1.9 / MS, days=1)
    counts, _ = np.histogram(day, bins=10)
    assert counts[[0, -1]].max() < counts[[4, 5]].min() / 3


def test_noise_keeps_the_mean_throttling_slows_and_padding_rounds_up():
    rng = np.random.default_rng(3)
    noisy = Engine(1 * MS, 1 * MS, noise=0.3)
    assert np.mean([noisy.duration_ns(0, 1, rng) for _ in range(4000)]) == pytest.approx(2 * MS, rel=0.02)
    slowing = Engine(1 * MS, 1 * MS, throttled_at_ns=5, throttle=3.0)
    assert [slowing.duration_ns(now, 1, rng) for now in (4, 5)] == [2 * MS, 6 * MS]
    padding = Engine(1 * MS, 1 * MS, max_batch=6, pads=True)
    assert [padding.cost_ns(rows) // MS - 1 for rows in (1, 2, 3, 5, 6)] == [1, 2, 4, 6, 6]
    assert padding.latency_profile() == ((1, 2 * MS), (2, 3 * MS), (4, 5 * MS), (6, 7 * MS))


def test_bentoml_looks_each_millisecond_and_gives_up_the_oldest():
    rule = Bento(Engine(1 * MS, 1 * MS), limit_ns=12 * MS)
    rule.submit(0, 1, "lane")
    assert rule.poll(0) == []  # 1 * (0 + 1 + 1 ms) is less than 0.95 of the 10 ms it starts with
    assert rule.next_wakeup_ns() == 1 * MS
    rule.submit(8 * MS, 2, "lane")
    assert rule.poll(8 * MS) == []
    rule.submit(9 * MS, 3, "lane")
    actions = rule.poll(9 * MS)  # the oldest would end after 9 + 1 + 3 ms
    assert actions[0].id == 1


def test_clipper_grows_by_one_and_shrinks_by_a_tenth():
    rule = Clipper(Engine(0, 1 * MS, max_batch=64), target_ns=20 * MS)
    for number in range(1000):
        rule.submit(0, number, "lane")
    sizes = []
    for _ in range(30):
        (batch,) = rule.poll(0)
        sizes.append(len(batch.ids))
        rule.batch_done(0, batch.batch_id, len(batch.ids) * MS)
    assert sizes[:22] == [*range(1, 22), 18]


def test_the_same_seed_gives_the_same_figures_and_another_gives_others():
    (noisy,) = [case for case in cases.changing() if case.engine.noise]
    for case in (noisy, replace(noisy, engine=replace(noisy.engine, noise=0.0))):
        first, again, other = (measures.measure([case], 500, seed) for seed in (1, 1, 2))
        assert first == again
        assert first != other


# The scheduler


def test_it_never_answers_later_than_natural_batching(rows):
    for other in (policies.NONE, policies.PLAIN):
        worst, where = report.worst_against(rows, other)
        assert worst <= 0.03, (other, where)


def test_bursts_are_answered_sooner_with_a_window_where_it_can_pay(rows):
    gain, where = report.least_gain_in_bursts(rows)
    assert gain >= 0.15, where


def test_a_fixed_window_is_beaten_wherever_load_is_low(rows):
    ratios = report.low_load_wins(rows)
    assert len(ratios) == 16
    assert max(ratios.values()) < 1


def test_at_twice_the_capacity_nothing_is_wasted_and_refusals_come_at_once():
    # So many that the onset, when nobody can know yet, is less than a hundredth.
    rows = measures.measure(cases.overloads(), 4 * COUNT, seed=0, policies={policies.OURS})
    overloads = report.by_case(rows, "overload")
    assert len(overloads) == 7
    for name, case in overloads.items():
        ours = case[policies.OURS]
        assert ours.goodput >= 0.95, name
        assert ours.late <= (0.02 if "half as fast" in name else 0.001), name
        if "half as fast" not in name:  # what was admitted before it slowed down cannot be known to be late
            assert not ours.refusal_p99_ms, name


def test_a_flood_costs_a_quiet_tenant_two_batches_at_most(rows):
    tenants = report.by_case(rows, "tenants")
    for name, case in tenants.items():
        ours = case[policies.OURS]
        if "four" in name:
            assert ours.jain > 0.99
            continue
        assert ours.quiet_refused == 0, name
        assert ours.goodput > 0.95, name
        if "batches of 1," in name:  # there its own requests wait for each other, too
            assert ours.quiet_p99_ms <= 1.5 * ours.quiet_alone_ms, name
        else:
            assert ours.quiet_p99_ms <= 1.01 * ours.bound_ms, name
    small = tenants["gpu 2 ms + 0.05 ms, batches of 8, one floods"][policies.OURS]
    assert small.quiet_p99_ms <= 1.2 * small.quiet_alone_ms


def test_who_is_first_in_rank_waits_less(rows):
    for name, case in report.by_case(rows, "priorities").items():
        ours, plain = case[policies.OURS], case[policies.PLAIN]
        assert ours.high_p99_ms <= plain.high_p99_ms, name
        if "200" in name:  # at 90 % each batch takes all that waits, and there is nobody to go before
            assert ours.high_p99_ms < 0.1 * plain.high_p99_ms
            assert ours.high_p99_ms < 0.5 * ours.low_p99_ms


def test_splitting_batches_pays_on_an_engine_that_pads(rows):
    (case,) = [case for name, case in report.by_case(rows, "changing").items() if "pads" in name]
    assert case[policies.OURS].p50_ms < 0.5 * case[policies.PLAIN].p50_ms


def test_the_page_tells_what_is_reached_and_what_is_not(rows):
    page = report.markdown(rows)
    for title in report.TITLES.values():
        assert f"### {title}\n" in page
    assert page.count("| yes |") == 4
    assert page.count("| no |") == 1  # the quiet tenant beside a flood
    spoilt = [replace(row, p50_ms=9e9) if row.policy == policies.OURS else row for row in rows]
    assert report.figures(spoilt).count("| no |") == 4


@pytest.mark.train
def test_the_command_prints_json_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simulate_batching, "QUICK", 100)
    monkeypatch.setattr(sys, "argv", ["simulate_batching", "--quick", "--json", "--plot", str(tmp_path)])
    simulate_batching.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed["requests"] == 100
    assert {row["policy"] for row in printed["rows"]} >= {"ours", "no window", "bentoml", "clipper"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "batching-burst.png",
        "batching-goodput.png",
        "batching-p50.png",
    ]
