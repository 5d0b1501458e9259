"""From tissue to signal: relaxation times, the spin echo, inversion recovery and contrast agent.

Times in ms, field in tesla, concentration in mmol/l, signal relative to fully relaxed water.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import overload

import torch
from torch import Tensor

RELAXIVITY = 4.1
"""r1 of gadopentetate in plasma, l/(mmol s): 4.1 at 1.5 T, 3.7 at 3 T (Rohrer et al., Invest
Radiol 2005)."""


class Tissue(IntEnum):
    """What a voxel can be made of; the value is its channel. The first four are the anatomy."""

    CSF = 0
    CORTEX = 1
    DEEP = 2  # caudate, putamen, thalamus, ...
    WHITE = 3
    BLOOD = 4
    NECROSIS = 5
    ENHANCING = 6
    OEDEMA = 7


@dataclass(frozen=True)
class Constants:
    """Relaxation times of a tissue and its proton density relative to water."""

    t1: tuple[float, float]
    """ms at 1.5 T and at 3 T."""
    t2: float
    """ms; hardly depends on the field between 1.5 and 3 T."""
    pd: float

    def t1_at(self, field: float) -> float:
        """T1 in ms at `field` tesla: the power law through both values (Rooney et al. 2007)."""
        low, high = self.t1
        return low * (field / 1.5) ** math.log2(high / low)


CONSTANTS = {
    # T1 of brain tissue: Wright et al., MAGMA 2008. T2: Stanisz et al., MRM 2005, and for deep grey
    # matter Wansapura et al., JMRI 1999. CSF and blood T1: Rooney et al., MRM 2007. Water content:
    # Neeb et al., NeuroImage 2006. Tumour, rounded: Blystad et al., PLoS One 2017, and Badve et al.,
    # AJNR 2017. Blood flows through slices between pulse and echo: most of its signal is lost.
    Tissue.CSF: Constants((4300, 4300), 1500, 1.0),
    Tissue.CORTEX: Constants((1197, 1607), 97, 0.82),
    Tissue.DEEP: Constants((1090, 1360), 83, 0.80),
    Tissue.WHITE: Constants((646, 838), 70, 0.70),
    Tissue.BLOOD: Constants((1440, 1700), 120, 0.45),
    Tissue.NECROSIS: Constants((1700, 2000), 210, 0.90),
    Tissue.ENHANCING: Constants((1200, 1550), 130, 0.84),
    Tissue.OEDEMA: Constants((1150, 1450), 135, 0.83),
}


def spin_echo(t1: Tensor, t2: Tensor, pd: Tensor, *, tr: float, te: float) -> Tensor:
    """PD (1 - exp(-TR/T1)) exp(-TE/T2), for TE << TR."""
    return pd * (1 - torch.exp(-tr / t1)) * torch.exp(-te / t2)


def inversion_recovery(
    t1: Tensor, t2: Tensor, pd: Tensor, *, tr: float, te: float, ti: float
) -> Tensor:
    """Spin echo at TI after an inversion: PD (1 - 2 exp(-TI/T1) + exp(-TR/T1)) exp(-TE/T2).

    Signed: fractions of a voxel add up before the magnitude is taken.
    """
    return pd * (1 - 2 * torch.exp(-ti / t1) + torch.exp(-tr / t1)) * torch.exp(-te / t2)


def nulling_time(t1: float, tr: float) -> float:
    """The TI at which `inversion_recovery` of that T1 is zero."""
    return t1 * math.log(2 / (1 + math.exp(-tr / t1)))


@overload
def enhanced_t1(t1: float, concentration: float) -> float: ...
@overload
def enhanced_t1(t1: Tensor, concentration: Tensor | float) -> Tensor: ...
def enhanced_t1(t1: Tensor | float, concentration: Tensor | float) -> Tensor | float:
    """T1 shortened by a contrast agent: 1/T1' = 1/T1 + r1 C."""
    return 1 / (1 / t1 + RELAXIVITY / 1000 * concentration)
