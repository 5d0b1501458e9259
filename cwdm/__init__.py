"""Synthesize a missing MRI modality with 3D wavelet diffusion models.

    import cwdm

    case = cwdm.read_case("BraTS-GLI-00000-000")
    cwdm.synthesize(case, missing="t2f")

The names below are loaded when they are first used: `import cwdm` takes neither torch nor numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cwdm.case import Case, find_cases, read_case
    from cwdm.errors import InputError
    from cwdm.generation import Generator
    from cwdm.handoff import segment
    from cwdm.imputation import Imputation, impute
    from cwdm.modality import Modality
    from cwdm.synthesis import Synthesis, Synthesizer, synthesize
    from cwdm.volume import Volume, read_volume

__version__ = "0.1.0"

__all__ = [
    "Case",
    "Generator",
    "Imputation",
    "InputError",
    "Modality",
    "Synthesis",
    "Synthesizer",
    "Volume",
    "__version__",
    "find_cases",
    "impute",
    "read_case",
    "read_volume",
    "segment",
    "synthesize",
]

_MODULE_OF = {
    "Case": "cwdm.case",
    "Generator": "cwdm.generation",
    "Imputation": "cwdm.imputation",
    "InputError": "cwdm.errors",
    "Modality": "cwdm.modality",
    "Synthesis": "cwdm.synthesis",
    "Synthesizer": "cwdm.synthesis",
    "Volume": "cwdm.volume",
    "find_cases": "cwdm.case",
    "impute": "cwdm.imputation",
    "read_case": "cwdm.case",
    "read_volume": "cwdm.volume",
    "segment": "cwdm.handoff",
    "synthesize": "cwdm.synthesis",
}


def __getattr__(name: str) -> Any:
    """The public name from its module, imported now (PEP 562)."""
    try:
        module = _MODULE_OF[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
