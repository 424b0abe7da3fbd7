"""What `make bench-capacity` takes from its measurements."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.capacity import Point, fitted
from benchmarks.measure import Measure


def test_the_time_after_an_idle_time_is_fitted() -> None:
    """Known curves: exponential, and flat."""
    idle_s = np.array([0.0, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    found = fitted(idle_s, 0.3e-3 + 1.1e-3 * (1 - np.exp(-idle_s / 4e-3)))
    assert found == pytest.approx((0.3e-3, 1.1e-3, 4e-3), rel=0.03)
    warm_s, cold_s, _ = fitted(idle_s, np.full(6, 0.3e-3))
    assert (warm_s, cold_s) == pytest.approx((0.3e-3, 0.0), abs=1e-9)


def test_the_latency_that_is_predicted_is_the_server_s() -> None:
    """The client's part of the measured latency is no error of the prediction."""
    measured = Measure(100.0, p50_ms=3.0, served_p50_ms=2.0)
    assert Point("mlp", 1, 100.0, 100.0, 1.8, 0.0, measured).error == pytest.approx(-0.1)
    assert math.isinf(Point("mlp", 1, 100.0, 100.0, 1.8, 0.0, Measure(0.0)).error)
