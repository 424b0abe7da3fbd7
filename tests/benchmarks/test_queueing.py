"""The queue of a replica: closed forms of its special cases, and a simulation that shares nothing with it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.queueing import Load, OverloadError, Replica, rate_within, replicas_for, sharing, throughput

BATCHING = Replica(setup_s=700e-6, row_s=60e-6, max_rows=16)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.9])
def test_one_request_a_batch_is_pollaczek_and_khinchine(share: float) -> None:
    """M/D/1 waits rho s / (2 (1 - rho)) on average, and is busy for rho."""
    replica = Replica(setup_s=0.0, row_s=0.002, max_rows=1, path_s=0.001)
    load = Load(replica, share / 0.002)
    wait_s = share * 0.002 / (2 * (1 - share))
    assert load.mean_s == pytest.approx(0.001 + 0.002 + wait_s, rel=2e-3)
    assert load.utilisation == pytest.approx(share, rel=1e-6)
    assert load.rows == pytest.approx(1.0, rel=1e-6)
    assert load.queued == pytest.approx(load.rate * wait_s, rel=5e-3)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_the_distribution_of_m_d_1(share: float) -> None:
    """Erlang's series: P(wait <= t) = (1 - rho) sum_k (-x)^k e^x / k!, with x = rate (t - k s), k up to t / s."""
    service_s, rate = 1.0, share
    load = Load(Replica(0.0, service_s, 1), rate)
    for percent in (50.0, 90.0, 99.0):
        wait_s = load.percentile_s(percent) - service_s
        terms = [rate * (k * service_s - wait_s) for k in range(int(wait_s / service_s) + 1)]
        known = (1 - share) * sum(x**k * math.exp(-x) / math.factorial(k) for k, x in enumerate(terms))
        if wait_s == 0.0:  # who finds it idle
            assert known >= percent / 100.0
        else:  # moments of arrival are a grid of 1/16 of the service time
            assert known == pytest.approx(percent / 100.0, abs=0.03)


@pytest.mark.parametrize("mean", [0.1, 1.0, 3.0])
def test_batches_without_limit_that_all_take_as_long(mean: float) -> None:
    """A busy period has e^(rate s) batches on average; who comes in it waits s/2 on average, others not at all."""
    service_s = 0.01
    rate = mean / service_s
    load = Load(Replica(service_s, 0.0, max_rows=60), rate)
    busy_s = service_s * math.exp(mean)
    share = busy_s / (busy_s + 1 / rate)
    assert load.utilisation == pytest.approx(share, rel=1e-6)
    assert load.mean_s == pytest.approx(service_s + share * service_s / 2, rel=1e-4)


def test_alone_it_takes_the_time_of_one_request() -> None:
    """At a rate near zero nobody waits."""
    replica = Replica(700e-6, 60e-6, 16, path_s=100e-6)
    assert Load(replica, 0.01).percentile_s(99.0) == pytest.approx(860e-6)
    assert Load(replica, 0.01).queued == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_first_of_a_busy_period_takes_longer(share: float) -> None:
    """Welch 1964: E[W] = rate E[S^2] / (2 (1 - rho)) + rate (E[S0^2] - E[S^2]) / (2 (1 - rho + rho0)) for M/G/1."""
    service_s, first_s = 0.002, 0.005
    replica = Replica(0.0, service_s, 1, cold_s=first_s - service_s, cool_s=1e-9)
    load = Load(replica, share / service_s)
    busy = 1 - share + load.rate * first_s
    wait_s = load.rate * (service_s**2 / (1 - share) + (first_s**2 - service_s**2) / busy) / 2
    first = (1 - share) / busy
    assert load.mean_s == pytest.approx(service_s + first * (first_s - service_s) + wait_s, rel=3e-3)
    assert load.queued == pytest.approx(load.rate * wait_s, rel=5e-3)
    assert load.utilisation == pytest.approx(1 - first, rel=1e-3)


def test_a_lone_request_takes_longer_the_longer_the_replica_was_idle() -> None:
    """After an idle time t by cold (1 - exp(-t / cool)): the median of t at a rate is ln 2 / rate."""
    replica = Replica(0.0, 1e-9, 1, cold_s=1e-3, cool_s=0.01)
    assert Load(replica, 0.01).percentile_s(50.0) == pytest.approx(1e-3, rel=1e-2)
    assert Load(replica, 100.0).percentile_s(50.0) == pytest.approx(0.5e-3, rel=0.07)
    assert replica.lone_s == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(OverloadError, match="a lone request takes 1 ms"):
        rate_within(replica, 0.9e-3)


def simulated(replica: Replica, rate: float, requests: int, seed: int) -> tuple[np.ndarray, float, float]:
    """Seconds of each request, mean rows of a batch, and the share of busy time: event by event."""
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests))
    took, queue, clock, came = np.empty(requests), deque[int](), 0.0, 0
    batches, busy_s = 0, 0.0
    while came < requests or queue:
        idle_s = 0.0
        if not queue:
            idle_s = max(0.0, arrivals[came] - clock)
            clock += idle_s
        while came < requests and arrivals[came] <= clock:
            queue.append(came)
            came += 1
        batch = [queue.popleft() for _ in range(min(len(queue), replica.max_rows))]
        service_s = replica.setup_s + replica.row_s * len(batch)
        service_s += replica.cold_s * (1.0 - math.exp(-idle_s / replica.cool_s))
        clock += service_s
        busy_s += service_s
        batches += 1
        took[batch] = clock - arrivals[batch] + replica.path_s
    return took[requests // 20 :], requests / batches, busy_s / clock


@pytest.mark.parametrize(
    ("replica", "share"),
    [
        (BATCHING, 0.1),
        (BATCHING, 0.5),
        (BATCHING, 0.9),
        (Replica(2e-3, 1e-4, 4, path_s=5e-4), 0.85),
        (Replica(0.0, 1e-3, 1), 0.8),
        (Replica(1e-3, 5e-5, 64), 0.7),
        (Replica(150e-6, 135e-6, 64, cold_s=1e-3, cool_s=4e-3), 0.05),
        (Replica(150e-6, 135e-6, 64, cold_s=1e-3, cool_s=4e-3), 0.5),
    ],
    ids=str,
)
def test_it_agrees_with_a_simulation(replica: Replica, share: float) -> None:
    """Mean, median, 99th percentile, rows of a batch, and busy time."""
    load = Load(replica, share * replica.capacity)
    took, rows, busy = simulated(replica, load.rate, 200_000, seed=1)
    assert load.mean_s == pytest.approx(took.mean(), rel=0.02)
    assert load.percentile_s(50.0) == pytest.approx(np.percentile(took, 50.0), rel=0.03)
    assert load.percentile_s(99.0) == pytest.approx(np.percentile(took, 99.0), rel=0.05)
    assert load.rows == pytest.approx(rows, rel=0.01)
    assert load.utilisation == pytest.approx(busy, rel=0.01)


def test_the_planned_number_is_the_least_that_is_enough() -> None:
    """With it the limit holds in the simulation; with one replica less it does not."""
    limit_s, rate = 6e-3, 60_000.0
    number = replicas_for(BATCHING, rate, limit_s)
    enough, *_ = simulated(BATCHING, rate / number, 300_000, seed=2)
    fewer, *_ = simulated(BATCHING, rate / (number - 1), 300_000, seed=2)
    assert np.percentile(enough, 99.0) <= 1.03 * limit_s
    assert np.percentile(fewer, 99.0) > limit_s
    assert replicas_for(BATCHING, 1.0, limit_s) == 1


def test_more_time_is_more_rate_up_to_the_capacity() -> None:
    """And a limit below the time of a lone request is refused."""
    rates = [rate_within(BATCHING, limit_s) for limit_s in (1e-3, 2e-3, 5e-3, 1.0)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.95 * BATCHING.capacity)
    with pytest.raises(OverloadError, match=r"a lone request takes 0\.76 ms"):
        rate_within(BATCHING, 0.7e-3)
    with pytest.raises(OverloadError, match="at most 95% of that"):
        Load(BATCHING, BATCHING.capacity)


def test_cores_bound_what_replicas_do_together() -> None:
    """One core each without a client: n times one; beyond the cores, or with a client, no more than the cores can."""
    one = BATCHING.capacity
    assert throughput(BATCHING, 2, 4, 0.0) == pytest.approx(2 * one)
    assert throughput(BATCHING, 4, 4, 0.0) == pytest.approx(4 * one)
    assert throughput(BATCHING, 16, 4, 0.0) == pytest.approx(4 * one)
    assert throughput(BATCHING, 4, 4, 1 / one) == pytest.approx(2 * one)
    assert throughput(BATCHING, 1, 2, 2 / one) == pytest.approx(one / 2)
    assert sharing(BATCHING, one, 1, 2, 1.0) == BATCHING
    assert sharing(BATCHING, one, 2, 2, 1 / one).row_s == pytest.approx(2 * BATCHING.row_s)
    cooling = replace(BATCHING, cold_s=1e-3, cool_s=4e-3)
    lost = 0.25 * (1.0 - math.exp(-1.0))  # of a turn, in which the other one's took a time constant
    assert throughput(cooling, 4, 2, 0.0, slice_s=4e-3) == pytest.approx(2 * (1.0 - lost) * one)
    assert throughput(cooling, 2, 2, 0.0, slice_s=4e-3) == pytest.approx(2 * one)
    assert sharing(cooling, 1000.0, 2, 2, 0.0) == cooling
    both = sharing(BATCHING, 0.5 * one, 4, 2, 0.0)
    busy = Load(both, 0.125 * one).utilisation
    assert both.row_s == pytest.approx((1 + busy) * BATCHING.row_s, rel=1e-3)
    with pytest.raises(OverloadError, match="the client alone"):
        sharing(BATCHING, one, 2, 2, 3 / one)
