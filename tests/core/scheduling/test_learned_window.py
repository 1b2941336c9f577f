"""The learned window against the sums of latencies it claims to lessen."""

import random

import pytest

from edge_runtime.core.scheduling import learned_window
from edge_runtime.core.scheduling.learned_window import Linger

US = 1000
FIXED, MARGINAL = 1000 * US, 100 * US
FAR = 100_000 * US


def latencies(arrivals, window):
    """Sum of latencies of a burst whose first waits `window`, then each batch takes all that came meanwhile."""
    free, total = arrivals[0] + window, 0
    waiting = list(arrivals)
    while waiting:
        start = max(free, waiting[0])
        batch = [at for at in waiting if at <= start]
        free = start + FIXED + MARGINAL * len(batch)
        total += sum(free - at for at in batch)
        waiting = waiting[len(batch) :]
    return total


def taught(bursts, learner=None):
    learner = learner or Linger()
    learner.set_costs(FIXED, MARGINAL)
    for i, burst in enumerate(bursts):
        for offset in burst:
            learner.arrived(i * FAR + offset, opens=offset == 0)
    learner.arrived(len(bursts) * FAR, opens=False)
    return learner


@pytest.mark.parametrize("seed", range(20))
def test_the_window_is_the_candidate_that_lessens_latency_most(seed):
    rng = random.Random(seed)
    spread = rng.choice([50, 150, 300, 600, 1000]) * US
    burst = [0, *sorted(rng.randrange(spread) for _ in range(rng.randrange(12)))]
    candidates = [share * FIXED for share in learned_window._SHARES]
    sums = [latencies(burst, window) for window in candidates]
    natural = latencies(burst, 0)
    window = taught([burst] * 20).window_ns
    if min(sums) >= natural:
        assert window == 0
    else:
        assert window == int(candidates[sums.index(min(sums))])


def test_late_ones_are_left_behind_where_that_serves_the_early_sooner():
    burst = [0, *(i * 20 * US for i in range(1, 7)), 400 * US]
    assert 120 * US <= taught([burst] * 20).window_ns < 400 * US


def test_nothing_is_waited_for_before_it_is_certain():
    burst = [0, 10 * US, 20 * US]
    assert taught([burst] * 15).window_ns == 0
    assert taught([burst] * 16).window_ns == pytest.approx(20 * US)
    # One burst of thirty among lone ones: a gain in the mean, and no certainty.
    rare = [[0, *range(US, 31 * US, US)] if i % 30 == 15 else [0] for i in range(45)]
    assert taught(rare).window_ns == 0


def test_what_was_learned_fades_and_goes_at_once_when_costs_change():
    learner = taught([[0, 10 * US, 20 * US]] * 50)
    assert learner.window_ns > 0
    assert taught([[0]] * 200, learner).window_ns == 0
    learner = taught([[0, 10 * US, 20 * US]] * 50)
    learner.set_costs(FIXED * 1.2, MARGINAL)
    assert learner.window_ns > 0
    learner.set_costs(FIXED * 2, MARGINAL)
    assert learner.window_ns == 0


def test_where_a_row_costs_more_than_a_batch_there_is_no_window():
    learner = Linger()
    learner.set_costs(MARGINAL, MARGINAL * 2)
    for i in range(100):
        learner.arrived(i * FAR, opens=True)
        learner.arrived(i * FAR + 1, opens=False)
    assert learner.window_ns == 0
