"""What training minimizes: the published error of coefficients, and the structure of images."""

from torch import Tensor

__all__ = ["band_loss", "structure_loss"]

_WINDOW = 6
"""Voxels. A uniform window of 6 spreads like the Gaussian of sigma 1.5 that SSIM is measured with
(its deviation is 1.7). Windows side by side are enough for a mean and cost next to nothing."""
_RANGE = 7.0
"""Data range in network units: that of a brain after the robust normalization, roughly."""


def band_loss(estimate: Tensor, x_0: Tensor) -> Tensor:
    """Mean squared error of each band over space: two (B, 8, X, Y, Z) -> (B, 8).

    Its mean is the loss of WDM (arXiv 2402.19043, eq. 4): all bands count alike.
    """
    return (estimate.float() - x_0.float()).square().mean(dim=(2, 3, 4))


def structure_loss(estimate: Tensor, truth: Tensor, background: float = 0.0) -> Tensor:
    """1 - SSIM (Wang et al. 2004) of images (B, 1, X, Y, Z), mean over windows that hold brain.

    Of several images the mean of theirs, so that it does not matter which are computed together.

    The least squared error blurs what it is not sure of; SSIM counts lost contrast as well.
    """
    e, t = _windows(estimate), _windows(truth)
    mean_e, mean_t = e.mean(dim=-1), t.mean(dim=-1)
    deviation_e, deviation_t = e - mean_e[..., None], t - mean_t[..., None]
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    luminance = (2 * mean_e * mean_t + c1) / (mean_e**2 + mean_t**2 + c1)
    covariance = (deviation_e * deviation_t).mean(dim=-1)
    variances = (deviation_e.square() + deviation_t.square()).mean(dim=-1)
    ssim = luminance * (2 * covariance + c2) / (variances + c2)
    brain = (t != background).any(dim=-1)
    of_each = ((1 - ssim) * brain).sum(dim=1) / brain.sum(dim=1).clamp(min=1)
    return of_each.mean()


def _windows(images: Tensor) -> Tensor:
    """Images (B, 1, X, Y, Z) -> voxels of each window (B, windows, 216); the rest is cut."""
    b, c, *size = images.shape
    x, y, z = (n // _WINDOW for n in size)
    whole = images[:, :, : x * _WINDOW, : y * _WINDOW, : z * _WINDOW]
    split = whole.reshape(b, c, x, _WINDOW, y, _WINDOW, z, _WINDOW)
    return split.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(b, -1, _WINDOW**3)
