"""Normalizations: the published numbers, invariances, the inverse, and the prior."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwdm.intensity import NORMALIZATIONS, Normalization, Scale, ScalePrior
from cwdm.modality import Modality, others

ROBUST, PUBLISHED = NORMALIZATIONS["robust"], NORMALIZATIONS["published"]


def brain(seed=0, shape=(12, 14, 10)):
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, dtype=bool)
    mask[2:-2, 2:-2, 2:-2] = True
    return np.where(mask, rng.gamma(9, 40, shape), 0), mask


@pytest.mark.parametrize("kind", ["normal_f64", "positive_int16", "sparse_f64"])
def test_published_normalization_equals_the_published_one(kind, golden):
    numbers = golden("normalise")
    voxels = numbers[f"in_{kind}"].astype(np.float64)
    everywhere = np.ones(voxels.shape, dtype=bool)
    scale = PUBLISHED.measure(voxels, everywhere)
    image = PUBLISHED.normalize(voxels, everywhere, scale)
    np.testing.assert_allclose(image, numbers[f"out_{kind}"], rtol=0, atol=1e-12)


@given(st.floats(0.01, 100), st.floats(-1000, 1000), st.integers(0, 50))
@settings(deadline=None, max_examples=30)
def test_robust_normalization_does_not_see_units(gain, shift, seed):
    voxels, mask = brain(seed)
    changed = np.where(mask, voxels * gain + shift, 0)
    expected = ROBUST.normalize(voxels, mask, ROBUST.measure(voxels, mask))
    ours = ROBUST.normalize(changed, mask, ROBUST.measure(changed, mask))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_robust_normalization_sees_neither_background_nor_vessels():
    voxels, mask = brain()
    scale = ROBUST.measure(voxels, mask)
    padded = ROBUST.measure(np.pad(voxels, 20), np.pad(mask, 20))
    assert padded == scale
    bright = voxels.copy()
    top = mask & (voxels > np.quantile(voxels[mask], 0.95))
    bright[top] *= 10
    assert ROBUST.measure(bright, mask) == scale
    # the published one does see both
    assert PUBLISHED.measure(bright, mask).scale > 2 * PUBLISHED.measure(voxels, mask).scale


@pytest.mark.parametrize("normalization", [ROBUST, PUBLISHED])
def test_denormalize_undoes_normalize_where_nothing_was_clipped(normalization):
    voxels, mask = brain()
    scale = normalization.measure(voxels, mask)
    image = normalization.normalize(voxels, mask, scale)
    back = Normalization.denormalize(image, mask, scale)
    kept = mask & (image > normalization.low) & (image < normalization.high)
    assert kept.sum() > 0.9 * mask.sum()
    np.testing.assert_allclose(back[kept], voxels[kept])
    assert (back[~mask] == 0).all()
    assert (image[~mask] == 0).all()
    assert image.min() >= normalization.low
    assert image.max() <= normalization.high


def test_an_image_that_is_mostly_one_value_still_has_a_scale():
    voxels, mask = brain()
    voxels[mask] = 100.0
    voxels[5, 5, 5] = 300.0
    for normalization in NORMALIZATIONS.values():
        assert normalization.measure(voxels, mask).scale > 0
    with pytest.raises(ValueError, match="positive"):
        Scale(0.0, 0.0)


def test_prior_recovers_a_known_ratio_from_any_of_the_others():
    ratio = {Modality.T1N: 1.0, Modality.T1C: 2.0, Modality.T2W: 3.0, Modality.T2F: 0.5}
    rng = np.random.default_rng(0)
    cases = [
        {m: Scale(4 * gain * r, gain * r) for m, r in ratio.items()}
        for gain in rng.uniform(10, 1000, 5)
    ]
    prior = ScalePrior.learn(Modality.T2F, cases)
    assert set(prior.ratios) == set(others(Modality.T2F))
    for available in ([Modality.T1N], [Modality.T1C, Modality.T2W], others(Modality.T2F)):
        predicted = prior.predict({m: Scale(0.0, 7.0 * ratio[m]) for m in available})
        assert predicted.scale == pytest.approx(3.5)
        assert predicted.offset == pytest.approx(14.0)
