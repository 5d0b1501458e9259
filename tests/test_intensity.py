"""Normalizations: the published numbers, invariances, the inverse, and the prior."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwdm.intensity import NORMALIZATIONS, Normalization, Scale, ScalePrior
from cwdm.modality import SEQUENCES, Modality, others

ROBUST, PUBLISHED = NORMALIZATIONS["robust"], NORMALIZATIONS["published"]
SYMMETRIC, HOUNSFIELD = NORMALIZATIONS["published-wdm"], NORMALIZATIONS["hounsfield"]


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
    # WDM trains on twice that, less one
    scale = SYMMETRIC.measure(voxels, everywhere)
    image = SYMMETRIC.normalize(voxels, everywhere, scale)
    np.testing.assert_allclose(image, 2 * numbers[f"out_{kind}"] - 1, rtol=0, atol=1e-12)


def test_symmetric_normalization_is_twice_the_published_less_one():
    voxels, mask = brain()
    unit = PUBLISHED.normalize(voxels, mask, PUBLISHED.measure(voxels, mask))
    image = SYMMETRIC.normalize(voxels, mask, SYMMETRIC.measure(voxels, mask))
    np.testing.assert_allclose(image, 2 * unit - 1, rtol=0, atol=1e-12)
    assert (image[~mask] == -1).all()
    assert (image.min(), image.max()) == (-1, 1)


def test_hounsfield_units_run_from_air_to_the_brightest_bone():
    rng = np.random.default_rng(0)
    voxels = rng.uniform(-3000, 2500, (20, 20, 20))  # less than air: outside of the scanner
    everywhere = np.ones(voxels.shape, dtype=bool)
    image = HOUNSFIELD.normalize(voxels, everywhere, HOUNSFIELD.measure(voxels, everywhere))
    # as published: clip at -1000 and the quantile of what results, then from 0 to 1, then -1 to 1
    clipped = voxels.clip(-1000)
    clipped = clipped.clip(max=np.quantile(clipped, 0.999))
    unit = (clipped - clipped.min()) / (clipped.max() - clipped.min())
    np.testing.assert_allclose(image, 2 * unit - 1, rtol=0, atol=1e-12)
    assert (image[voxels <= -1000] == -1).all()
    assert not HOUNSFIELD.masked


@given(st.floats(0.01, 100), st.floats(-1000, 1000), st.integers(0, 50))
@settings(deadline=None, max_examples=30)
def test_robust_normalization_does_not_see_units(gain, shift, seed):
    voxels, mask = brain(seed)
    changed = np.where(mask, voxels * gain + shift, 0)
    expected = ROBUST.normalize(voxels, mask, ROBUST.measure(voxels, mask))
    ours = ROBUST.normalize(changed, mask, ROBUST.measure(changed, mask))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@given(st.floats(0.01, 100), st.integers(0, 50), st.sampled_from([PUBLISHED, SYMMETRIC]))
@settings(deadline=None, max_examples=30)
def test_published_normalizations_do_not_see_a_gain(gain, seed, normalization):
    voxels, mask = brain(seed)
    expected = normalization.normalize(voxels, mask, normalization.measure(voxels, mask))
    ours = normalization.normalize(gain * voxels, mask, normalization.measure(gain * voxels, mask))
    np.testing.assert_allclose(ours, expected, atol=1e-9)


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


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_denormalize_undoes_normalize_where_nothing_was_clipped(name):
    normalization = NORMALIZATIONS[name]
    voxels, mask = brain()
    scale = normalization.measure(voxels, mask)
    image = normalization.normalize(voxels, mask, scale)
    back = Normalization.denormalize(image.copy(), mask, scale)
    kept = mask & (image > normalization.low) & (image < normalization.high)
    assert kept.sum() > 0.9 * mask.sum()
    np.testing.assert_allclose(back[kept], voxels[kept])
    assert (back[~mask] == 0).all()
    assert (image[~mask] == normalization.background).all()
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
    gains = rng.uniform(10, 1000, 5)
    cases = [{m: Scale(4 * gain * r, gain * r) for m, r in ratio.items()} for gain in gains]
    prior = ScalePrior.learn(Modality.T2F, cases)
    assert set(prior.ratios) == set(others(Modality.T2F))
    for available in ([Modality.T1N], [Modality.T1C, Modality.T2W], others(Modality.T2F)):
        predicted = prior.predict({m: Scale(0.0, 7.0 * ratio[m]) for m in available})
        assert predicted.scale == pytest.approx(3.5)
        assert predicted.offset == pytest.approx(14.0)
    # what no training case had says nothing
    fewer = ScalePrior.learn(
        Modality.T2F, [{m: c[m] for m in c if m != Modality.T1C} for c in cases]
    )
    given = {m: Scale(0.0, 7.0 * ratio[m]) for m in others(Modality.T2F)}
    assert fewer.predict(given) == fewer.predict({m: given[m] for m in fewer.ratios})
    # with nothing to compare it with: the scale most cases have
    alone = prior.predict({})
    assert alone.scale == pytest.approx(0.5 * np.median(gains))
    assert alone.offset == pytest.approx(2 * np.median(gains))


@pytest.mark.parametrize("target", [*SEQUENCES, Modality.CT])
def test_prior_of_a_model_without_conditions_is_the_median_case(target):
    cases = [{target: Scale(offset, scale)} for offset, scale in [(1, 2), (3, 4), (50, 10)]]
    prior = ScalePrior.learn(target, cases)
    assert prior == ScalePrior({}, 0.75, 4.0)
    assert prior.predict({}) == Scale(3.0, 4.0)
