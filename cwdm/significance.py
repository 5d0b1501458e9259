"""How sure a mean over cases is, and a difference between two methods."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = ["METHODS", "interval", "intervals", "paired"]

RESAMPLES = 2000
METHODS = (
    f"Intervals: 95 %, of the mean, bootstrap over cases ({RESAMPLES} resamples). p: Wilcoxon's "
    "signed-rank test over cases, two-sided, not corrected for the number of tests."
)
"""What the figures of this module are, in words."""


def intervals(values: ArrayLike, seed: int = 0) -> NDArray[np.float64]:
    """95 % bootstrap intervals (F, 2) of the means of F figures, `values` (cases, F).

    All figures see the same resamples. NaN where there is one case, or a value is not finite.
    """
    values = np.asarray(values, np.float64)
    bounds = np.full((values.shape[1], 2), np.nan)
    finite = np.isfinite(values).all(axis=0)
    if len(values) > 1:
        means = _resamples(len(values), seed) @ values[:, finite]
        bounds[finite] = np.quantile(means, [0.025, 0.975], axis=0).T
    return bounds


def interval(values: ArrayLike, seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """That of one figure (cases,); none where `intervals` has NaN."""
    low, high = intervals(np.asarray(values)[:, None], seed)[0].tolist()
    return (None, None) if np.isnan(low) else (low, high)


@lru_cache(maxsize=4)
def _resamples(count: int, seed: int) -> NDArray[np.float64]:
    """How much each case counts in each resample, (RESAMPLES, count)."""
    drawn = np.random.default_rng(seed).multinomial(count, [1 / count] * count, RESAMPLES)
    return drawn / count


def paired(
    table: pd.DataFrame, figures: Sequence[str], by: Sequence[str], against: str, seed: int = 0
) -> pd.DataFrame:
    """Every other method against one of them, over the cases that both have.

    Args:
        table: a row per case, method and what is in `by`, with the columns `case` and `method`.
        figures: columns to compare.
        by: columns whose values are compared apart.
        against: one of the methods.
        seed: of the resamples.

    Returns:
        A row per value of `by`, method and figure: against, cases, difference (mean), low and high
        (the interval of the difference), p (1 where no case differs).
    """
    rows = []
    for keys, group in table.groupby(list(by), sort=False):
        methods = [method for method in group["method"].unique() if method != against]
        wide = group.pivot(index="case", columns="method", values=list(figures))
        for method in methods if len(methods) < group["method"].nunique() else ():
            for figure in figures:
                difference = (wide[figure, method] - wide[figure, against]).dropna()
                if difference.empty:
                    continue
                low, high = interval(difference, seed)
                rows.append(
                    {
                        **dict(zip(by, keys, strict=True)),
                        "method": method,
                        "against": against,
                        "figure": figure,
                        "cases": len(difference),
                        "difference": difference.mean(),
                        "low": low,
                        "high": high,
                        "p": stats.wilcoxon(difference).pvalue if difference.any() else 1.0,
                    }
                )
    return pd.DataFrame(rows)
