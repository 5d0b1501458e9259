"""The whole line on a simulated case: remove its FLAIR, synthesize it, compare, draw.

No patient data and no download. `make demo` runs it; so does `python examples/demo.py [FOLDER]`.
What is in FOLDER (by default `demo`) from an earlier run is made again.
"""

import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from cwdm.anatomy import mni152
from cwdm.case import read_case
from cwdm.evaluate import Predictions, compare, draw_sample, fit_regressions, picture, tabulate
from cwdm.modality import Modality
from cwdm.montage import write_png
from cwdm.simulate import simulate, write_case
from cwdm.summary import markdown, summarize, verdicts
from cwdm.synthesis import Synthesizer

MISSING = Modality.T2F
SEED = 2024
OTHERS = 3
"""Further simulated patients, on which the voxelwise regressions are fitted."""


def main(folder: Path) -> Path:
    """Run everything; returns the picture."""
    anatomy = mni152()
    bar = tqdm(range(1 + OTHERS), "simulating cases", unit="case")
    patient, *rest = [
        read_case(write_case(simulate(SEED, index, anatomy), folder / "cases", overwrite=True))
        for index in bar
    ]

    # What arrived from the clinic: the same case, but the FLAIR is not there.
    clinic = folder / "clinic" / patient.id
    clinic.mkdir(parents=True, exist_ok=True)
    for path in patient.without(MISSING).images.values():
        shutil.copy(path, clinic)
    print(f"removed {MISSING}: {clinic}")

    synthesis = Synthesizer.load(MISSING)(read_case(clinic))
    image = synthesis.write(folder / "synthetic", overwrite=True)
    print(f"synthesized in {synthesis.provenance.seconds:.0f} s: {image}")

    print("comparing with the truth and with trivial predictions ...")
    regressions = fit_regressions(draw_sample(rest), [MISSING])
    predictions = Predictions.find(folder / "synthetic", [patient])
    methods = {"cwdm": predictions}
    (comparison,) = compare(patient, methods, targets=[MISSING], regressions=regressions)
    summary = summarize(tabulate(comparison.scores))
    print("\n".join(["", markdown(summary), *verdicts(summary)]))

    drawn = folder / "demo.png"
    write_png(picture(comparison), drawn, overwrite=True)
    print(f"\nLook at {drawn}")
    return drawn


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
