# %% [markdown]
# # A cohort: complete it, segment it, and ask what the synthetic images cost
#
# Cell by cell in an editor that knows `# %%`, or as a script:
#
#     python examples/impute_and_segment.py [FOLDER]
#
# `FOLDER/cases` may hold complete cases of your own with segmentations; else four are simulated.

# %%
import shutil
import sys
from pathlib import Path

import pandas as pd

import cwdm
from cwdm.anatomy import mni152
from cwdm.overlap import compare_case, differences, find_segmentations, summarize, tabulate
from cwdm.simulate import simulate, write_case

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "example")
if not (folder / "cases").is_dir():
    for index in range(4):
        write_case(simulate(seed=8, index=index, anatomy=mni152()), folder / "cases")
truth = cwdm.find_cases(folder / "cases")

# %% [markdown]
# ## A cohort with gaps
# Every case loses one sequence, as in a clinic; in turn, so that the answer depends on none.

# %%
cohort = folder / "cohort-with-gaps"
for number, case in enumerate(truth):
    place = cohort / case.id
    place.mkdir(parents=True, exist_ok=True)
    for path in case.without(list(case.images)[number % 4]).images.values():
        shutil.copy(path, place)

# %% [markdown]
# ## Complete it
# The same call goes on after an interruption. Acquired images are linked to, not copied.

# %%
made = cwdm.impute(cohort, folder / "completed")
print(made[["case", "state", "synthetic", "seconds"]].to_string(index=False))

# %% [markdown]
# ## Segment it, with what was synthesized and without
# `model` may be a MONAI bundle, an nnU-Net folder, a TorchScript or ONNX file (docs/segment.md).
# The one that ships takes any subset of the sequences, so it can also be asked what it makes of
# the gaps.

# %%
cwdm.segment(folder / "completed", folder / "segmented")
cwdm.segment(cohort, folder / "segmented-with-gaps")
cwdm.segment(folder / "cases", folder / "segmented-acquired")

# %% [markdown]
# ## What did it cost?
# Dice, HD95 and NSD, each method against the acquired images, paired by case.

# %%
labeled = [case for case in truth if case.segmentation]
rows = []
for method in ("segmented-acquired", "segmented", "segmented-with-gaps"):
    for case_id, path in find_segmentations(folder / method, labeled).items():
        (case,) = (each for each in labeled if each.id == case_id)
        rows += compare_case(case, path, method=method)
table = tabulate(rows)
summary = summarize(table)
with pd.option_context("display.precision", 3):
    print(summary[summary["figure"] == "dice"].to_string(index=False))
    print(differences(table).query("figure == 'dice'").to_string(index=False))
