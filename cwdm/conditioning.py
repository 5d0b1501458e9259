"""The images a network is given beside the noisy one: which, in what order, and if one is gone.

cWDM (arXiv 2411.17203, section 2.2) concatenates the coefficients of the available modalities to
the noisy coefficients of the target, in the order of ``Modality`` with the target left out.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cwdm.coefficients import Transform
from cwdm.modality import Modality, others

__all__ = ["condition", "mean_of_conditions"]


def condition(images: Mapping[Modality, Tensor], target: Modality, transform: Transform) -> Tensor:
    """Images (B, 1, X, Y, Z) of some modalities -> coefficients (B, 3*channels, X', Y', Z').

    A missing one is replaced by the mean of those that are there. A network trained with
    ``drop_conditions`` knows this case; for others all three have to be there.
    """
    available = {m: images[m] for m in others(target) if m in images}
    substitute = torch.stack(list(available.values())).mean(dim=0)
    return transform.encode(
        torch.cat([available.get(m, substitute) for m in others(target)], dim=1)
    )


def mean_of_conditions(cond: Tensor, channels: int) -> Tensor:
    """Coefficients of the mean conditioning image: (B, channels*C, ...) -> (B, channels, ...)."""
    images: Tensor = cond.unflatten(1, (-1, channels))
    return images.mean(dim=1)
