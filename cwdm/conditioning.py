"""The images a network is given beside the noisy one: which, in what order, and if one is gone.

``others``: cWDM (arXiv 2411.17203, section 2.2) concatenates the coefficients of the available
modalities to the noisy coefficients of the target, in the order of ``Modality`` with the target
left out. ``any``: every sequence has its place, empty where it is missing or the target, and a
plane for each says whether it is there; one network then fills any gap from whatever there is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cwdm.coefficients import Transform
from cwdm.modality import SEQUENCES, Modality, others

__all__ = ["condition", "mean_of_conditions"]


def condition(
    images: Mapping[Modality, Tensor],
    target: Modality,
    transform: Transform,
    *,
    availability: bool = False,
) -> Tensor:
    """Images (B, 1, X, Y, Z) of some modalities -> coefficients of the conditions.

    (B, 3*channels, X', Y', Z'): the others in order. A missing one is replaced by the mean of those
    that are there. A network trained with ``drop_conditions`` knows this case; for others all three
    have to be there.

    Args:
        availability: (B, 4*channels + 4, X', Y', Z') instead: all four in order, zeros for those
            that are missing and for the target, then a plane of ones for each that is there and of
            zeros for each that is not. An image of zeros is not a missing one.
    """
    available = {m: images[m] for m in others(target) if m in images}
    if not availability:
        substitute = torch.stack(list(available.values())).mean(dim=0)
        return transform.encode(
            torch.cat([available.get(m, substitute) for m in others(target)], dim=1)
        )
    empty = torch.zeros_like(next(iter(available.values())))
    places = transform.encode(torch.cat([available.get(m, empty) for m in SEQUENCES], dim=1))
    given = torch.tensor([float(m in available) for m in SEQUENCES]).to(places)
    planes = given.reshape(1, -1, 1, 1, 1).expand(len(places), -1, *places.shape[2:])
    return torch.cat([places, planes], dim=1)


def mean_of_conditions(cond: Tensor, channels: int, *, availability: bool = False) -> Tensor:
    """Coefficients of the mean conditioning image (B, channels, X, Y, Z), of those that are there.

    Args:
        cond: what ``condition`` made.
    """
    if not availability:
        images: Tensor = cond.unflatten(1, (-1, channels))
        return images.mean(dim=1)
    places, planes = cond.split([len(SEQUENCES) * channels, len(SEQUENCES)], dim=1)
    total = places.unflatten(1, (-1, channels)).sum(dim=1)
    mean: Tensor = total / planes.sum(dim=1, keepdim=True)
    return mean
