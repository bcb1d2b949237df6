"""The line over bytes: what it recovers exactly, what it makes of noise, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest

from thesislib.device.time_line import BETWEEN, BEYOND, FITTED, Point, fit, held_out, predict
from thesislib.errors import BadInput


def on_the_line(size, start=2e-3, rate=2e9, noise=(0.0,)):
    middle = start + size / rate
    return Point(size, middle, tuple(middle * (1 + x) for x in noise))


def test_a_line_without_noise_is_found_again():
    found = fit([on_the_line(10_000_000), on_the_line(90_000_000)])
    assert found.start == pytest.approx(2e-3) and found.rate == pytest.approx(2e9)
    assert predict([on_the_line(10_000_000), on_the_line(90_000_000)], 50_000_000) == pytest.approx((27e-3,) * 3)


def test_the_interval_is_what_repetitions_differ_by():
    points = [on_the_line(10_000_000, noise=(-0.1, 0, 0.1)), on_the_line(90_000_000, noise=(-0.1, 0, 0.1))]
    low, middle, high = predict(points, 50_000_000)
    assert (
        middle == pytest.approx(27e-3) and low == pytest.approx(27e-3 * 0.9) and high == pytest.approx(27e-3 * 1.1)
    )  # both ends drawn low, or high
    assert predict(points, 50_000_000) == predict(points, 50_000_000)  # seeded
    wider = predict(points, 200_000_000)
    assert wider[2] - wider[0] > 1.1 * 0.2 * wider[1]  # beyond both, a line tilts


def test_the_draws_are_those_of_polyfit():
    points = [Point(10, 1.0, (1.0,)), Point(20, 2.5, (2.5,)), Point(40, 3.0, (3.0,))]
    slope, start = np.polyfit([10, 20, 40], [1.0, 2.5, 3.0], 1)
    assert predict(points, 30) == pytest.approx((start + 30 * slope,) * 3)


def test_depths_that_were_not_fitted_are_told_apart():
    points = {d: on_the_line(5_000_000 * d + 1_000_000) for d in (30, 20, 10, 4)}
    points[4] = replace(points[4], middle=points[4].middle / 2)
    table = held_out(points, (30, 10))
    assert table["where"].to_dict() == {30: FITTED, 20: BETWEEN, 10: FITTED, 4: BEYOND}
    assert table.loc[20, "error"] == pytest.approx(0) and table.loc[4, "error"] == pytest.approx(
        1
    )  # predicted twice what it took


@pytest.mark.parametrize(
    ("points", "fitted", "message"),
    [
        ({30: on_the_line(9), 10: on_the_line(3)}, (30, 20), "depth 20 was not measured: expected among 10, 30"),
        ({30: on_the_line(9), 10: on_the_line(3)}, (30,), "at least two"),
        ({30: Point(9, 1.0, (1.0,)), 10: Point(3, 2.0, (2.0,))}, (30, 10), "larger models were not slower"),
    ],
)
def test_what_cannot_be_fitted_is_refused(points, fitted, message):
    with pytest.raises(BadInput, match=message):
        held_out(points, fitted)
