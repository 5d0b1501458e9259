"""The structural loss against a direct computation; the band loss is in test_diffusion.py."""

import numpy as np
import torch
from torch.testing import assert_close

from cwdm.losses import structure_loss

WINDOW, C1, C2 = 6, 0.07**2, 0.21**2


def direct(estimate, truth):
    """1 - SSIM by its definition, window by window."""
    values = []
    for corner in np.ndindex(*(n // WINDOW for n in truth.shape)):
        box = tuple(slice(WINDOW * i, WINDOW * (i + 1)) for i in corner)
        e, t = estimate[box].ravel(), truth[box].ravel()
        if not t.any():
            continue
        covariance = np.cov(e, t, bias=True)
        luminance = (2 * e.mean() * t.mean() + C1) / (e.mean() ** 2 + t.mean() ** 2 + C1)
        structure = (2 * covariance[0, 1] + C2) / (covariance[0, 0] + covariance[1, 1] + C2)
        values.append(1 - luminance * structure)
    return np.mean(values)


def test_structure_loss_equals_its_definition():
    rng = np.random.default_rng(0)
    truth, estimate = rng.normal(size=(2, 13, 12, 20))
    truth[:, :, :6] = 0  # background counts nowhere
    ours = structure_loss(
        torch.from_numpy(estimate)[None, None], torch.from_numpy(truth)[None, None]
    )
    assert_close(ours.item(), direct(estimate, truth), rtol=0, atol=1e-9)


def test_structure_loss_prefers_contrast_to_blur():
    truth = torch.randn(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    assert structure_loss(truth, truth) == 0
    assert structure_loss(0.9 * truth, truth) < structure_loss(0.1 * truth, truth)
    assert structure_loss(-truth, truth) > 1
