"""The kinds of image: the four MRI sequences of BraTS, CT, and the names people give them."""

from difflib import get_close_matches
from enum import StrEnum

from cwdm.errors import InputError


class Modality(StrEnum):
    """The four BraTS sequences, in the channel order used everywhere, and CT."""

    T1N = "t1n"  # T1-weighted, native
    T1C = "t1c"  # T1-weighted, with contrast agent
    T2W = "t2w"  # T2-weighted
    T2F = "t2f"  # T2-weighted FLAIR
    CT = "ct"  # computed tomography; only generated, never conditioned on


SEQUENCES = (Modality.T1N, Modality.T1C, Modality.T2W, Modality.T2F)
"""The MRI sequences of a case, in channel order."""

ALIASES: dict[Modality, tuple[str, ...]] = {
    Modality.T1N: ("t1n", "t1", "t1w", "t1native", "t1pre"),
    Modality.T1C: (
        *("t1c", "t1ce", "t1gd", "t1gad", "t1post", "t1contrast", "ct1"),
        *("t1wc", "t1wce", "t1wgd", "t1wpost"),
    ),
    Modality.T2W: ("t2w", "t2"),
    Modality.T2F: ("t2f", "flair", "fla", "t2flair", "t2wflair", "flairw"),
    Modality.CT: ("ct",),
}
"""What each modality may be called when reading, in lower case and without separators."""

_BY_ALIAS = {alias: modality for modality, aliases in ALIASES.items() for alias in aliases}


def others(target: Modality) -> tuple[Modality, ...]:
    """The modalities a model for `target` is conditioned on, in channel order."""
    return tuple(modality for modality in SEQUENCES if modality is not target)


def find_modality(name: str) -> Modality | None:
    """The modality that `name` stands for (any case; `-`, `_` and spaces ignored), or None."""
    return _BY_ALIAS.get(name.lower().translate({ord(separator): None for separator in "-_ "}))


def parse_modality(name: str) -> Modality:
    """The MRI sequence that `name` stands for: `t2f`, `FLAIR`, `T1-Gd`, ...

    Raises:
        InputError: nothing is called that; the message offers the nearest name.
    """
    if (modality := find_modality(name)) in SEQUENCES:
        return modality
    sequences = [alias for alias, modality in _BY_ALIAS.items() if modality in SEQUENCES]
    nearest = get_close_matches(name.lower(), sequences, n=1, cutoff=0.5)
    known = find_modality(name)  # CT, which is near to nothing else
    hint = f"; did you mean {_BY_ALIAS[nearest[0]]}?" if nearest and not known else ""
    raise InputError(f"{name!r} is not a modality, expected one of {', '.join(SEQUENCES)}{hint}")
