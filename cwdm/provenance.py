"""How an image came to be: the record beside every synthetic image, enough to make it again."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cwdm.files import atomic_write
from cwdm.intensity import Scale
from cwdm.modality import Modality

__all__ = ["Provenance", "Source", "warnings_for"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file that went in."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Everything needed to reproduce a synthetic image, and what to know before using it."""

    cwdm: str
    """Version of this package."""
    torch: str
    case: str
    target: Modality
    inputs: Mapping[Modality, Source]
    absent: tuple[Modality, ...]
    """Modalities the model would have used and did not get."""
    model: Source
    seed: int
    sampler: str
    steps: int
    precision: str
    device: str
    normalization: str
    scales: Mapping[Modality, Scale]
    """Offset and scale measured in each input, in scanner units."""
    target_scale: Scale
    """Assumed, not measured: predicted from ``scales`` by a ratio learnt from training cases."""
    seconds: float
    warnings: tuple[str, ...]
    synthetic: bool = True
    use: str = "Research use only. Not acquired by a scanner; not for diagnosis."
    intensities: str = (
        "The intensity range of a modality that was not acquired is unknown. It is assumed from "
        "the case's other modalities and the training cases (target_scale): absolute values mean "
        "little."
    )

    @property
    def description(self) -> str:
        """For the 80 bytes of the NIfTI header."""
        return f"cwdm {self.cwdm} SYNTHETIC {self.target}, not acquired; research use only"

    def write(self, path: Path, *, overwrite: bool = False) -> None:
        """As JSON; InputError as ``atomic_write``."""
        with atomic_write(path, overwrite) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def warnings_for(target: Modality, absent: tuple[Modality, ...]) -> tuple[str, ...]:
    """What whoever looks at this image has to know."""
    warnings = []
    if target is Modality.T1C:
        warnings.append(
            "Enhancement in a synthetic T1c is a guess: whether tissue takes up contrast agent "
            "cannot be seen in the other sequences."
        )
    if absent:
        names = ", ".join(absent)
        warnings.append(f"Made without {names}: expect less than with all three other modalities.")
    return tuple(warnings)
