"""How an image came to be: the record beside every synthetic image, enough to make it again."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cwdm.errors import InputError
from cwdm.files import atomic_write
from cwdm.intensity import Scale
from cwdm.modality import Modality

__all__ = [
    "MEMORISATION",
    "Interval",
    "Provenance",
    "Region",
    "SampleProvenance",
    "SegmentationProvenance",
    "Source",
    "check_record",
    "read_interval",
    "segmentation_warnings",
    "sidecar",
    "warnings_for",
]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file that went in."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Record:
    """What can be written beside an image."""

    def as_json(self) -> str:
        """The record as it is written."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def write(self, path: Path, *, overwrite: bool = False) -> None:
        """As JSON; InputError as ``atomic_write``."""
        with atomic_write(path, overwrite) as temporary:
            temporary.write_text(self.as_json(), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Region:
    """A connected part of the brain, as voxel indices of the file."""

    voxels: int
    first: tuple[int, ...]
    """Corner of the box around it with the lowest indices."""
    last: tuple[int, ...]
    """The opposite corner, inside."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """How the interval of several samples was made, and where it says nothing."""

    coverage: float
    """Share of the brain's voxels it is to hold, once the unknown scale is granted."""
    calibrated: bool
    """Whether that was measured on cases with a known truth."""
    q: float
    floor: float
    """The interval is mean +- q (std + floor * standard deviation of the mean in the brain)."""
    files: Mapping[str, str]
    """Names of the maps ``std``, ``low`` and ``high``."""
    wide: float
    """Share of the brain where the interval is as wide as the brain's own range of intensities: the
    image should not be trusted there."""
    regions: tuple[Region, ...]
    """The largest of those places."""


@dataclass(frozen=True, kw_only=True)
class Provenance(Record):
    """Everything needed to reproduce a synthetic image, and what to know before using it."""

    cwdm: str
    """Version of this package."""
    torch: str
    case: str
    target: Modality
    inputs: Mapping[Modality, Source]
    absent: tuple[Modality, ...]
    """Modalities the model would have used and did not get."""
    replaces: Source | None
    """The acquired image of the target, if there is one; it was not looked at."""
    model: Source
    seed: int
    samples: int = 1
    """Chains with the seeds ``seed``, ``seed + 1``, ...; the image is their mean."""
    sampler: str
    steps: int | tuple[int, ...]
    precision: str
    passes: str = "torch"
    """How what lies between convolutions was computed: "kernels", "compiled" or "torch"."""
    device: str
    compat: bool
    """Whether the published scripts were imitated."""
    normalization: str
    scales: Mapping[Modality, Scale]
    """Offset and scale measured in each input, in scanner units."""
    target_scale: Scale
    """Assumed, not measured: predicted from ``scales`` by a ratio learnt from training cases."""
    seconds: float
    interval: Interval | None = None
    """Of several samples."""
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
        return self.description_of(self.target)

    def description_of(self, what: str) -> str:
        """The same for a map beside the image, such as ``t2f std``."""
        return f"cwdm {self.cwdm} SYNTHETIC {what}, not acquired; research use only"


def sidecar(image: Path) -> Path:
    """Where the record of an image goes: ``x-t2f.json`` beside ``x-t2f.nii.gz``."""
    return image.with_name(image.name.removesuffix(".gz").removesuffix(".nii") + ".json")


def read_interval(image: Path) -> Interval | None:
    """The interval that the record beside an image names; none of one sample, or without a record.

    What another program has left there is no record.

    Raises:
        InputError: the record is damaged.
    """
    path = sidecar(image)
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        ours = isinstance(record, dict) and record.get("synthetic") is True and "cwdm" in record
        found = record.get("interval") if ours else None  # of noise alone there never is one
        if found is None:
            return None
        if any(Path(name).name != name for name in found["files"].values()):
            raise ValueError("a map in another folder")
        regions = tuple(Region(**region) for region in found["regions"])
        return Interval(**{**found, "regions": regions})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a record of cwdm, expected the one of the image") from error


def check_record(path: Path) -> None:
    """InputError if a file that is no record of cwdm is there: another program's, perhaps of an
    acquired image."""
    try:
        record = json.loads(path.read_bytes()) if path.exists() else {"cwdm": ""}
    except (OSError, ValueError):
        record = None
    if not (isinstance(record, dict) and "cwdm" in record):
        raise InputError(f"{path}: not written by cwdm, never overwritten")


def warnings_for(
    target: Modality, absent: tuple[Modality, ...], replaces: Source | None = None
) -> tuple[str, ...]:
    """What whoever looks at this image has to know."""
    warnings = []
    if replaces:
        warnings.append(f"The case has an acquired {target}, {replaces.name}, that was not used.")
    if target is Modality.T1C:
        warnings.append(
            "Enhancement in a synthetic T1c is a guess: whether tissue takes up contrast agent "
            "cannot be seen in the other sequences."
        )
    if absent:
        names = ", ".join(absent)
        warnings.append(f"Made without {names}: expect less than with all three other modalities.")
    return tuple(warnings)


MEMORISATION = (
    "A sample can resemble an image the model was trained on, the more so the fewer those were: it "
    "is neither a new patient nor anonymous by itself."
)


@dataclass(frozen=True, kw_only=True)
class SampleProvenance(Record):
    """The same for an image that was generated from nothing but noise."""

    cwdm: str
    """Version of this package."""
    torch: str
    model: Source
    target: Modality
    seed: int
    number: int
    """Of the sample; its noise follows from seed and number alone."""
    size: tuple[int, int, int]
    """Voxels along X, Y, Z."""
    sampler: str
    steps: int | tuple[int, ...]
    precision: str
    passes: str = "torch"
    """How what lies between convolutions was computed: "kernels", "compiled" or "torch"."""
    device: str
    compat: bool
    """Whether the published script was imitated."""
    normalization: str
    target_scale: Scale
    """Assumed, not measured: the median of the training cases."""
    seconds: float = 0.0
    warnings: tuple[str, ...] = (MEMORISATION,)
    synthetic: bool = True
    use: str = "Research use only. Not acquired by a scanner and of no patient; not for diagnosis."

    @property
    def name(self) -> str:
        """What its files are called, without their endings."""
        if self.compat:
            return f"sample_{self.number}_0"
        return f"{self.model.name}-{self.number:05d}-{self.target}"

    @property
    def description(self) -> str:
        """For the 80 bytes of the NIfTI header."""
        return f"cwdm {self.cwdm} SYNTHETIC {self.target}, of no patient; research use only"


@dataclass(frozen=True, kw_only=True)
class SegmentationProvenance(Record):
    """What a segmentation was made from, and how far to trust it."""

    cwdm: str
    """Version of this package."""
    case: str
    segmenter: str
    """As the user named it."""
    segmenter_sha256: str
    inputs: Mapping[Modality, Source]
    synthetic_inputs: tuple[Modality, ...]
    """Those of the inputs that were not acquired."""
    absent: tuple[Modality, ...]
    """What the segmenter would have used and did not get."""
    labels: Mapping[int, str]
    volumes_ml: Mapping[str, float]
    """Of the regions WT, TC and ET."""
    seconds: float
    warnings: tuple[str, ...]
    use: str = "Research use only. Not for diagnosis."

    @property
    def description(self) -> str:
        """For the 80 bytes of the NIfTI header."""
        made = f" from SYNTHETIC {', '.join(self.synthetic_inputs)}"
        made = made if self.synthetic_inputs else ""
        return f"cwdm {self.cwdm} segmentation{made}; research use only"


def segmentation_warnings(
    synthetic: tuple[Modality, ...], absent: tuple[Modality, ...], *, partial: bool = False
) -> tuple[str, ...]:
    """What whoever uses a segmentation of such inputs has to know.

    Args:
        partial: the segmenter would do without.
    """
    warnings = []
    if synthetic:
        warnings.append(
            f"Segmented with a synthetic {', '.join(synthetic)}: expect less than with acquired "
            "images."
        )
    if synthetic and partial:
        warnings.append(
            "This segmenter copes with missing images, and mostly does better without than with "
            "synthetic ones."
        )
    if absent:
        warnings.append(f"Segmented without {', '.join(absent)}: expect less than with all images.")
    if Modality.T1C in (*synthetic, *absent):
        warnings.append(
            "Without an acquired T1c nobody knows where the tumor enhances: do not use the "
            "enhancing tumor, nor what depends on it (tumor core, necrosis)."
        )
    return tuple(warnings)
