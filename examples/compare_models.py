# %% [markdown]
# # Two models, or two ways to sample one, against each other
#
# Cell by cell in an editor that knows `# %%`, or as a script:
#
#     python examples/compare_models.py [FOLDER]
#
# `FOLDER/cases` may hold complete cases of your own that no model has seen; else four are
# simulated.

# %%
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from cwdm.anatomy import mni152
from cwdm.case import Case, find_cases
from cwdm.evaluate import Prediction, compare, complete_cases, picture, tabulate
from cwdm.modality import Modality
from cwdm.montage import write_png
from cwdm.simulate import simulate, write_case
from cwdm.summary import contests, markdown, summarize, verdicts, write_tables
from cwdm.synthesis import Synthesizer

TARGET = Modality.T2F

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "example")
if not (folder / "cases").is_dir():
    for index in range(4):
        write_case(simulate(seed=9, index=index, anatomy=mni152()), folder / "cases")
cases = complete_cases(find_cases(folder / "cases"))

# %% [markdown]
# ## What is compared
# A method is a function from a case without its target to a prediction: two models, or whatever
# else. Here it is one model, asked once and in two steps. `Synthesizer.load(TARGET, path)` takes
# a model's file.

# %%
synthesizer = Synthesizer.load(TARGET)


def method(**how: object) -> Callable[[Case, Modality], Prediction]:
    """Synthesis with these settings."""
    return lambda case, target: Prediction.of(synthesizer(case, **how))  # type: ignore[arg-type]


methods = {"one step": method(), "two steps": method(sampler="ddpm", steps=2)}

# %% [markdown]
# ## Withhold, predict, compare
# Always beside floors. `draw_sample` and `fit_regressions` add those that have to be fitted, on
# other cases.

# %%
scores = []
for case in tqdm(cases, unit="case"):
    for comparison in compare(case, methods, targets=[TARGET]):
        scores += comparison.scores
        write_png(picture(comparison), folder / f"{case.id}-{TARGET}.png", overwrite=True)
table = tabulate(scores)

# %% [markdown]
# ## Who is ahead, and is it chance?

# %%
summary = summarize(table)
print(markdown(summary), *verdicts(summary), *contests(table), sep="\n")
write_tables(table, folder / "comparison", notes={}, overwrite=True)
