"""A replica as a queue: requests arrive at random, and are served in batches of all that wait, up to a limit.

A batch of k requests takes s(k) = a + c k seconds. The next one begins when the last has ended, with all that wait then
(`max_rows` at most); a request that finds the replica idle is served at once, alone. In Kendall's notation this is
M/D^[1,b]/1: Bailey's bulk queue under Neuts' general bulk service rule with a threshold of one, where the time of a
batch depends on its size. For b = 1 it is M/D/1.

The first batch after an idle time t takes w (1 - exp(-t / tau)) longer, because caches lose a process that does not
run: the exceptional first service of a busy period (Welch), with warm lines that are evicted at a constant rate. Idle
times of a Poisson process are exponential, whatever came before, so the chain of the bulk queue needs no further state.

Source: N. T. J. Bailey, On queueing processes with bulk service, J. R. Statist. Soc. B 16 (1954) 80-87;
M. F. Neuts, A general class of bulk queues with Poisson input, Ann. Math. Statist. 38 (1967) 759-770;
P. D. Welch, On a generalized M/G/1 queuing process in which the first customer of each busy period receives
exceptional service, Oper. Res. 12 (1964) 736-752.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, xlogy

MOST_WAITING = 8
"""The chain knows of at most so many full batches that wait, and of at least LEAST_STATES requests."""
LEAST_STATES = 200
MOMENTS = 16
"""Moments of arrival within a batch, over which waiting times are integrated; also quantiles of the idle time."""
RARE, IMPROBABLE = 1e-7, 1e-9
"""States and times that are less probable are left out."""
MOST_UTILISATION = 0.95
"""Above it the queue is longer than the chain knows."""
Floats = NDArray[np.float64]


class OverloadError(ValueError):
    """More requests arrive than can be served."""


@dataclass(frozen=True)
class Replica:
    """One process on one core.

    Attributes:
        setup_s: Seconds of a batch beside those of its requests, a.
        row_s: Seconds of each request in a batch, HTTP included, c.
        max_rows: Most requests of a batch, b.
        path_s: Seconds of a request beside the replica's work: network and balancer. Below 0 where the replica still
            works after its answer.
        cold_s: Seconds that a batch takes longer after a long idle time, w.
        cool_s: Time constant of that, tau: after an idle time as long, it takes 63 % of `cold_s` longer.
    """

    setup_s: float
    row_s: float
    max_rows: int
    path_s: float = 0.0
    cold_s: float = 0.0
    cool_s: float = 1.0

    def batch_s(self, rows: int) -> float:
        """Seconds of a batch."""
        return self.setup_s + self.row_s * rows

    @property
    def capacity(self) -> float:
        """Most requests a second."""
        return self.max_rows / self.batch_s(self.max_rows)

    def colder_s(self, idle_s: float) -> float:
        """Seconds that a batch takes longer after an idle time."""
        return self.cold_s * -math.expm1(-idle_s / self.cool_s)

    @property
    def lone_s(self) -> float:
        """Seconds from request to answer, of a request after a long idle time."""
        return self.path_s + self.cold_s + self.batch_s(1)

    def slower(self, factor: float) -> Replica:
        """The replica where its core has other work, so that everything takes `factor` as long."""
        return replace(self, setup_s=factor * self.setup_s, row_s=factor * self.row_s, cold_s=factor * self.cold_s)


@dataclass(frozen=True)
class Load:
    """A replica at a rate of arrivals.

    Attributes:
        replica: The replica.
        rate: Requests a second, of a Poisson process.

    Raises:
        OverloadError: The rate is above 95 % of the capacity.
    """

    replica: Replica
    rate: float

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= MOST_UTILISATION * self.replica.capacity:
            raise OverloadError(
                f"{self.rate:.4g} requests/s is no load of a replica that serves {self.replica.capacity:.4g}/s at "
                "most: "
                f"give it more than 0 and at most {MOST_UTILISATION:.0%} of that"
            )

    @cached_property
    def first_s(self) -> Floats:
        """Seconds of a batch that begins after an idle time: quantiles, equally probable."""
        left = (np.arange(MOMENTS) + 0.5) / MOMENTS  # exp(-rate t) is uniform
        return self.replica.batch_s(1) + self.replica.cold_s * (1.0 - left ** (1.0 / (self.rate * self.replica.cool_s)))

    @cached_property
    def waiting(self) -> Floats:
        """Probabilities of 0, 1, 2... requests that wait when a batch has ended."""
        most = self.replica.max_rows
        states = max(LEAST_STATES, (1 + MOST_WAITING) * most)
        step = np.zeros((states, states))
        for n in range(states):
            taken = min(max(n, 1), most)
            left = max(n, 1) - taken
            batch_s = np.atleast_1d(self.replica.batch_s(taken) if n else self.first_s)
            arrived = poisson(np.arange(states - left), self.rate * batch_s[:, None]).mean(0)
            step[n, left:] = arrived
            step[n, -1] += max(0.0, 1.0 - arrived.sum())
        balance = step.T - np.eye(states)
        balance[-1] = (
            1.0  # the probabilities sum to one, in place of one of the equations, which follows from the others
        )
        found = np.clip(np.linalg.solve(balance, np.eye(states)[-1]), 0.0, None)
        return found / found.sum()

    @cached_property
    def batches(self) -> list[tuple[float, float, int]]:
        """(probability, seconds, requests that wait on) of a batch."""
        most, chances = self.replica.max_rows, self.waiting
        first = [(float(chances[0]) / MOMENTS, float(batch_s), 0) for batch_s in self.first_s]
        others = [(chance, self.replica.batch_s(min(n, most)), n - min(n, most)) for n, chance in enumerate(chances)]
        return [one for one in (*first, *others[1:]) if one[0] > RARE]

    @property
    def busy_s(self) -> float:
        """Mean seconds of a batch."""
        return sum(chance * batch_s for chance, batch_s, _ in self.batches)

    @property
    def utilisation(self) -> float:
        """Share of time in which the replica works."""
        return self.busy_s / (self.busy_s + float(self.waiting[0]) / self.rate)

    @property
    def rows(self) -> float:
        """Mean requests of a batch."""
        return self.rate * (self.busy_s + float(self.waiting[0]) / self.rate)

    @property
    def queued(self) -> float:
        """Mean requests that wait, by Little's law."""
        seconds, weights, served = self.times
        return self.rate * float((weights * (seconds - served)).sum())

    @cached_property
    def times(self) -> tuple[Floats, Floats, Floats]:
        """Seconds from arrival to answer, the probability of each, and the seconds of these in service."""
        replica, most = self.replica, self.replica.max_rows
        full_s = replica.batch_s(most)
        parts: list[tuple[Floats, Floats, Floats]] = []
        parts.append((self.first_s, np.full(MOMENTS, self.waiting[0] / MOMENTS), self.first_s))
        for chance, batch_s, left in self.batches:
            moment = (np.arange(MOMENTS)[:, None] + 0.5) / MOMENTS * batch_s
            expected = self.rate * moment
            earlier = np.arange(int(expected[-1, 0] + 6.0 * math.sqrt(expected[-1, 0])) + 6)
            ahead = left + earlier
            wait_s = batch_s - moment + (ahead // most) * full_s
            # Those who come later and are served in the same batch make it longer: 0, 1, ..., until it is full.
            later, last = np.arange(most), (most - 1 - ahead % most)[:, None]
            chances = np.where(later < last, poisson(later, self.rate * wait_s[..., None]), 0.0)
            chances += np.where(later == last, 1.0 - chances.sum(2, keepdims=True), 0.0)
            in_service = np.broadcast_to(replica.batch_s(0) + replica.row_s * (most - last + later), chances.shape)
            weight = chance * self.rate * batch_s / MOMENTS * poisson(earlier, expected)[..., None] * chances
            likely = weight > IMPROBABLE
            parts.append(((wait_s[..., None] + in_service)[likely], weight[likely], in_service[likely]))
        seconds, weights, served = (np.concatenate(each) for each in zip(*parts, strict=True))
        return seconds, weights / weights.sum(), served

    @property
    def mean_s(self) -> float:
        """Mean seconds from request to answer."""
        seconds, weights, _ = self.times
        return self.replica.path_s + float((weights * seconds).sum())

    def percentile_s(self, percent: float) -> float:
        """Percentile of the seconds from request to answer."""
        seconds, weights, _ = self.times
        order = np.argsort(seconds)
        place = int(np.searchsorted(np.cumsum(weights[order]), percent / 100.0))
        return self.replica.path_s + float(seconds[order][min(place, len(order) - 1)])


def poisson(counts: Any, mean: Any) -> Floats:
    """Probabilities of counts under a Poisson distribution."""
    return np.exp(xlogy(counts, mean) - mean - gammaln(np.add(counts, 1)))


def rate_within(replica: Replica, limit_s: float, percent: float = 99.0) -> float:
    """Most requests a second of a replica of which `percent` % are answered within a limit.

    Raises:
        OverloadError: Not even a lone request is.
    """
    if limit_s < replica.lone_s:
        raise OverloadError(
            f"no number of replicas answers within {1e3 * limit_s:.3g} ms: a lone request takes "
            f"{1e3 * replica.lone_s:.3g} ms"
        )
    low, high = 0.0, MOST_UTILISATION * replica.capacity
    if Load(replica, high).percentile_s(percent) <= limit_s:
        return high
    while high - low > 0.01 * replica.capacity:
        middle = (low + high) / 2
        low, high = (middle, high) if Load(replica, middle).percentile_s(percent) <= limit_s else (low, middle)
    return low


def replicas_for(replica: Replica, rate: float, limit_s: float, percent: float = 99.0) -> int:
    """Least number of replicas that answer `percent` % of `rate` requests a second within a limit.

    Each request goes to one of the replicas at random, so each of them sees a Poisson process of its share.

    Raises:
        OverloadError: No number does.
    """
    most = rate_within(replica, limit_s, percent)
    if most <= 0.0:
        raise OverloadError(f"no number of replicas answers within {1e3 * limit_s:.3g} ms; allow more")
    return max(1, math.ceil(rate / most))


def sharing(replica: Replica, rate: float, replicas: int, cores: int, client_s: float) -> Replica:
    """The replica where several share the cores of a machine with each other and with the client.

    Args:
        replica: The replica, alone on a core.
        rate: Requests a second of all replicas.
        replicas: Their number.
        cores: Cores of the machine.
        client_s: Processor seconds of the client for each request.

    Returns:
        The replica, slower: by the client's share of each core, and by the other replicas that are at work on its core.

    Raises:
        OverloadError: The cores cannot serve this rate.
    """
    if replicas < cores:  # the client has a core to itself
        return replica
    free = 1.0 - rate * client_s / cores
    if free <= 0.0:
        raise OverloadError(f"the client alone needs {rate * client_s:.2f} of {cores} cores")
    others = replicas / cores - 1.0
    slowed = replica.slower(1.0 / free)
    found = slowed
    for _ in range(8 if others else 0):  # how busy the others are depends on how slow they are
        found = slowed.slower(1.0 + others * Load(found, rate / replicas).utilisation)
    return found


def throughput(replica: Replica, replicas: int, cores: int, client_s: float, slice_s: float = math.inf) -> float:
    """Most requests a second of several replicas that share the cores of a machine with the client.

    Replicas that share a core take turns on it. While it is the others' turn a replica cools as if it were idle, so of
    each turn `colder_s` is lost.

    Args:
        replica: The replica, alone on a core.
        replicas: Their number.
        cores: Cores of the machine.
        client_s: Processor seconds of the client for each request.
        slice_s: Seconds that the system gives a busy process before another one's turn.
    """
    if replicas < cores:
        return min(replicas * replica.capacity, (cores - replicas) / client_s if client_s else math.inf)
    useful = 1.0
    if replicas > cores and slice_s < math.inf:
        useful -= min(1.0, replica.colder_s((replicas / cores - 1.0) * slice_s) / slice_s)
    return cores * useful / (1.0 / replica.capacity + useful * client_s)
