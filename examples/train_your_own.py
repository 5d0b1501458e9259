# %% [markdown]
# # Train on your own data
#
# Cell by cell in an editor that knows `# %%`, or as a script:
#
#     python examples/train_your_own.py [FOLDER] [PRESET]
#
# `FOLDER/cases` may hold cases of your own; else four are simulated. The preset `smoke` shows in
# a minute that everything works; for a model that is worth having take `small-t2f` (docs/train-
# your-own.md).

# %%
import sys
from pathlib import Path

from tqdm import tqdm

from cwdm.anatomy import mni152
from cwdm.cache import fill, open_cache
from cwdm.case import find_cases
from cwdm.config import Config
from cwdm.dataset import Source
from cwdm.diagnosis import diagnose, read_run
from cwdm.layouts import find
from cwdm.simulate import simulate, write_case
from cwdm.synthesis import Synthesizer
from cwdm.train import train
from cwdm.validation import HeldOut

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "example")
preset = sys.argv[2] if len(sys.argv) > 2 else "smoke"
if not (folder / "cases").is_dir():
    for index in range(4):
        write_case(simulate(seed=10, index=index, anatomy=mni152()), folder / "cases")

# %% [markdown]
# ## Check the cases and pack them
# What is wrong with a case is said, and the case left out. The others are cut to the brain and
# written so that a block of them is read without the rest.

# %%
for report in tqdm(fill(find(folder / "cases"), folder / "cache"), unit="case"):
    for problem in report.problems:
        print(f"{report.case}: {report.status}, {problem}")
cached = open_cache(folder / "cache")

# %% [markdown]
# ## Keep some patients out
# Nothing else tells whether the model is any good. The cases themselves are validated on, full
# size.

# %%
last = cached[-1].id
held_out = HeldOut(
    [case for case in find_cases(folder / "cases") if case.id == last],
    [case for case in cached if case.id == last],
)
seen = [case for case in cached if case.id != last]

# %% [markdown]
# ## Train
# A run that was interrupted goes on with the same call.

# %%
config = Config.read(preset)
run = folder / "run"
steps = train(config, [Source("cases", seen)], run, held_out=held_out, workers=0)
with tqdm(total=config.training.iterations, unit="step") as bar:
    for step in steps:
        bar.update(step.step - bar.n)
        bar.set_postfix(loss=f"{step.loss:.4f}")
for finding in diagnose(read_run(run)):
    print(f"{finding.severity}: {finding.about}: {finding.message}")

# %% [markdown]
# ## Use it

# %%
target = config.targets[0]
synthesizer = Synthesizer.load(target, run / "model.safetensors")
case = held_out.cases[0].without(target)
print(synthesizer(case).write(folder / "own", overwrite=True))
