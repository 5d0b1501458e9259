"""`cwdm simulate`."""

from pathlib import Path

import click

from . import options


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--cases",
    "n_cases",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many to write.",
)
@click.option(
    "--labels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of label maps with FreeSurfer's numbers, taken in turn as anatomies. "
    "Without it the MNI152 tissue maps in nilearn (extra cwdm[simulate]).",
)
@options.seed
@options.overwrite
def simulate(output: Path, n_cases: int, labels: Path | None, seed: int, overwrite: bool) -> None:
    """Write simulated cases: brains with a glioma, in all four modalities, and segmentations.

    No patient is in them. A case depends on its seed, its number and the anatomy alone: asking for
    more cases later gives the same ones first.
    """
    from tqdm import tqdm

    from cwdm.anatomy import find_label_maps, from_labels, mni152
    from cwdm.errors import InputError
    from cwdm.simulate import case_id, write_case
    from cwdm.simulate import simulate as simulate_case

    folders = [output / case_id(seed, index) for index in range(n_cases)]
    there = [folder for folder in folders if folder.exists()]
    if there and not overwrite:
        raise InputError(f"{there[0]}: already exists, expected a new folder or --overwrite")
    maps = find_label_maps(labels) if labels else []
    template = None if maps else mni152()
    for index in tqdm(range(n_cases), unit="case", disable=None):
        anatomy = template or from_labels(maps[index % len(maps)])
        case = simulate_case(seed, index, anatomy)
        tqdm.write(str(write_case(case, output, overwrite=overwrite)))
