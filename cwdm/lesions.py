"""How many lesions were found, and how well: panoptic quality by panoptica, extra `cwdm[lesions]`.

A lesion is a connected part of a region. Lesions of truth and prediction belong together if they
overlap by more than half (intersection over union), so that each has one partner at most. RQ is the
F1 score of finding them, SQ the mean Dice of those found, PQ = RQ x SQ (Kirillov et al. 2019, arXiv
1801.00868, with Dice; Kofler et al. 2023, arXiv 2312.02608).
"""

from dataclasses import dataclass
from pathlib import Path

from cwdm.case import Case
from cwdm.errors import InputError
from cwdm.overlap import read_pair, region_masks
from cwdm.segmentation import Labels

__all__ = ["FILE", "LesionRow", "compare_lesions", "count_lesions"]

FILE = "lesions.csv"


@dataclass(frozen=True)
class LesionRow:
    """The lesions of one region of one segmentation."""

    case: str
    method: str
    region: str
    truth: int
    """Lesions there are."""
    found: int
    """Lesions of the prediction."""
    matched: int
    rq: float
    """1 where there is none in either, as the challenge does with what is empty."""
    sq: float
    """0 where none was matched but there are some."""
    pq: float


def count_lesions(
    found: Labels, truth: Labels, *, case: str = "", method: str = ""
) -> list[LesionRow]:
    """A row per region of labels (X, Y, Z) against the truth on the same grid.

    Raises:
        InputError: panoptica is not installed.
    """
    try:
        import panoptica
        from panoptica.metrics import Metric
    except ModuleNotFoundError as error:
        raise InputError(
            "panoptica is not installed, lesions need it: pip install 'cwdm[lesions]'"
        ) from error
    evaluator = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(),
        instance_matcher=panoptica.NaiveThresholdMatching(matching_threshold=0.5),
        instance_metrics=[Metric.DSC],
        global_metrics=[],
        verbose=False,
        log_times=False,
    )
    rows = []
    for (region, one), other in zip(
        region_masks(found).items(), region_masks(truth).values(), strict=True
    ):
        if not one.any() and not other.any():
            rows.append(LesionRow(case, method, region, 0, 0, 0, 1.0, 1.0, 1.0))
            continue
        pair = one.astype("uint8"), other.astype("uint8")
        result = evaluator.evaluate(*pair, verbose=False)["ungrouped"]
        matched = int(result.tp)
        counts = int(result.n_ref_instances), int(result.n_pred_instances)
        rq = 2 * matched / sum(counts)
        sq = float(result.sq_dsc) if matched else 0.0
        rows.append(LesionRow(case, method, region, *counts, matched, rq, sq, rq * sq))
    return rows


def compare_lesions(case: Case, found: Path, *, method: str = "") -> list[LesionRow]:
    """`count_lesions` for a segmentation in a file and that of the case; InputError as there."""
    one, other, _ = read_pair(case, found)
    return count_lesions(one, other, case=case.id, method=method)
