"""Intervals of means and paired tests."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cwdm.significance import interval, intervals, paired

NO_DIFFERENCE = [0.1, 0.4, 0.2]


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    samples = np.random.default_rng(0).normal(1, 2, (200, 40))
    bounds = np.array([interval(values, seed) for seed, values in enumerate(samples)], float)
    assert 0.9 < np.mean((bounds[:, 0] < 1) & (bounds[:, 1] > 1)) < 0.99
    assert interval(samples[0], 0) == tuple(bounds[0])
    assert interval([3.0]) == (None, None)


def test_it_is_that_of_an_independent_bootstrap() -> None:
    values = np.random.default_rng(1).gamma(2, size=60)
    other = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=2)
    assert interval(values) == pytest.approx(tuple(other.confidence_interval), abs=0.02)


def test_every_figure_has_its_own_interval_and_none_without_numbers() -> None:
    values = np.random.default_rng(0).normal(size=(9, 3))
    values[4, 1] = math.inf
    bounds = intervals(values)
    assert np.isnan(bounds[1]).all()
    for column in (0, 2):
        assert interval(values[:, column]) == pytest.approx(tuple(bounds[column]))
    assert np.isnan(intervals(values[:1])).all()


def frame(**methods: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"case": f"p{number}", "method": method, "region": region, "psnr": value * scale}
            for method, values in methods.items()
            for number, value in enumerate(values)
            for region, scale in (("WT", 1), ("ET", 2))
        ]
    )


def test_methods_are_paired_by_case_and_what_one_lacks_is_left_out() -> None:
    first = [0.1, 0.3, 0.2, 0.6, 0.5, 0.4]
    better = [value + 0.1 + 0.01 * number for number, value in enumerate(first)]
    table = frame(first=first, better=[*better, 99.0], same=first).sample(frac=1, random_state=1)
    found = paired(table, ["psnr"], ["region"], "first")
    rows = found.set_index(["region", "method"]).to_dict("index")
    row = rows["ET", "better"]
    assert row["difference"] == pytest.approx(0.25)
    assert row["cases"] == 6
    # of six differences of one sign, 2 of 2^6 assignments of signs are as extreme
    assert row["p"] == pytest.approx(2 / 2**6)
    assert row["low"] < 0.25 < row["high"]
    assert rows["WT", "same"]["p"] == 1
    assert set(found["against"]) == {"first"}


def test_without_a_second_method_or_the_first_there_is_nothing_to_test() -> None:
    assert paired(frame(only=NO_DIFFERENCE), ["psnr"], ["region"], "only").empty
    assert paired(frame(only=NO_DIFFERENCE), ["psnr"], ["region"], "another").empty
