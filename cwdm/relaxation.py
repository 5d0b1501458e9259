"""From tissue to signal: relaxation times, spin echo, inversion recovery, contrast agent.

Times in ms, field in tesla, concentration in mmol/l, signal relative to fully relaxed water.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

RELAXIVITY = 4.1e-3
"""r1 of gadopentetate in plasma, l/(mmol ms): 4.1 l/(mmol s) at 1.5 T, 3.7 at 3 T (Rohrer et al.,
Investigative Radiology 2005)."""


class Tissue(IntEnum):
    """What a voxel can be made of; the value is its channel."""

    CSF = 0
    CORTEX = 1
    DEEP = 2  # thalamus, caudate, putamen, ...
    WHITE = 3
    BLOOD = 4
    NECROSIS = 5
    ENHANCING = 6
    EDEMA = 7


@dataclass(frozen=True)
class Relaxation:
    """Relaxation times of a tissue, and its protons relative to water's."""

    t1_low: float
    """T1 at 1.5 T."""
    t1_high: float
    """T1 at 3 T."""
    t2: float
    """T2; hardly differs between 1.5 and 3 T."""
    pd: float

    def t1(self, field: float) -> float:
        """T1 at a field: the power law (Rooney et al., MRM 2007) through both values."""
        return self.t1_low * math.pow(field / 1.5, math.log2(self.t1_high / self.t1_low))


# T1 of grey and white matter: Wright et al., MAGMA 2008. T2: between Stanisz et al., MRM 2005, and
# Wansapura et al., JMRI 1999; shorter in deep grey matter, which holds iron. T1 of CSF and blood:
# Rooney et al. Water content: Neeb et al., NeuroImage 2006. Blood is mostly in veins. Tumor: near
# relaxometry at 3 T (Badve et al., AJNR 2017), set so that the median of each part over that of the
# brain is as in BraTS.
RELAXATION = {
    Tissue.CSF: Relaxation(4300, 4300, t2=1500, pd=1.0),
    Tissue.CORTEX: Relaxation(1197, 1607, t2=99, pd=0.82),
    Tissue.DEEP: Relaxation(1090, 1360, t2=83, pd=0.80),
    Tissue.WHITE: Relaxation(646, 838, t2=74, pd=0.70),
    Tissue.BLOOD: Relaxation(1440, 1700, t2=60, pd=0.85),
    Tissue.NECROSIS: Relaxation(1650, 2000, t2=230, pd=0.90),
    Tissue.ENHANCING: Relaxation(1250, 1600, t2=150, pd=0.85),
    Tissue.EDEMA: Relaxation(1150, 1450, t2=160, pd=0.83),
}


def spin_echo(t1: Tensor, t2: Tensor, pd: Tensor, *, tr: float, te: float) -> Tensor:
    """PD (1 - exp(-TR/T1)) exp(-TE/T2), for TE much shorter than TR."""
    return pd * (1 - torch.exp(-tr / t1)) * torch.exp(-te / t2)


def inversion_recovery(
    t1: Tensor, t2: Tensor, pd: Tensor, *, tr: float, te: float, ti: float
) -> Tensor:
    """Spin echo, TI after an inversion: PD (1 - 2 exp(-TI/T1) + exp(-TR/T1)) exp(-TE/T2).

    Signed: the tissues in a voxel add up before the scanner takes the magnitude.
    """
    return pd * (1 - 2 * torch.exp(-ti / t1) + torch.exp(-tr / t1)) * torch.exp(-te / t2)


def nulling_time(t1: float, tr: float) -> float:
    """The TI at which `inversion_recovery` is zero."""
    return t1 * math.log(2 / (1 + math.exp(-tr / t1)))


def enhanced(t1: Tensor, concentration: Tensor | float) -> Tensor:
    """T1 with contrast agent: 1/T1' = 1/T1 + r1 C."""
    return t1 / (1 + RELAXIVITY * concentration * t1)
