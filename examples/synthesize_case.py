# %% [markdown]
# # One case: synthesize the FLAIR it lacks
#
# Cell by cell in an editor that knows `# %%`, or as a script:
#
#     python examples/synthesize_case.py [FOLDER]
#
# `FOLDER/cases` may hold cases of your own, one folder each; else one is simulated.

# %%
import sys
from pathlib import Path

import cwdm
from cwdm.anatomy import mni152
from cwdm.montage import preview, write_png
from cwdm.simulate import simulate, write_case

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "example")
if not (folder / "cases").is_dir():
    write_case(simulate(seed=7, index=0, anatomy=mni152()), folder / "cases")

# %% [markdown]
# ## The case
# Only names are read here. What is to be synthesized counts as missing, whether it is there or
# not.

# %%
case = cwdm.find_cases(folder / "cases")[0].without(cwdm.Modality.T2F)
print(f"{case.id}: has {', '.join(case.images)}; lacks {', '.join(case.missing)}")

# %% [markdown]
# ## The image
# A `Synthesizer` holds a model and serves any number of cases.

# %%
synthesizer = cwdm.Synthesizer.load(cwdm.Modality.T2F)
synthesis = synthesizer(case)
volume = synthesis.volume
print(f"{volume.voxels.shape} voxels on the case's own grid, {synthesis.provenance.seconds:.1f} s")
for warning in synthesis.provenance.warnings:
    print("note:", warning)

# %% [markdown]
# ## On disk
# The image is marked as synthetic in its header; the record beside it can make it again.

# %%
image = synthesis.write(folder / "synthetic", overwrite=True)
picture = image.with_name(f"{case.id}-t2f.png")
write_png(preview(synthesis), picture, overwrite=True)
print(image, picture, sep="\n")

# %% [markdown]
# ## Where the model is unsure
# Of several samples there is a standard deviation and an interval. What these are worth has to be
# measured: docs/uncertainty.md.

# %%
sampled = synthesizer(case, samples=2, sampler="ddpm", steps=2)
maps = sampled.uncertainty
assert maps is not None
share = maps.std[maps.brain].mean() / maps.spread
print(f"the samples differ by {share:.1%} of the standard deviation in the brain")
