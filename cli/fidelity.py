"""`cwdm fidelity`: real and generated images in, how near they are out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options

if TYPE_CHECKING:
    from cwdm.fidelity import Figure

CACHE = "features"
"""Folder below the output."""


@click.command()
@click.option(
    "--real",
    type=click.Path(path_type=Path),
    required=True,
    help="Acquired images, NIfTI files at or below a folder.",
)
@click.option(
    "--generated", type=click.Path(path_type=Path), required=True, help="Generated ones, alike."
)
@click.option(
    "--features",
    "network",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="What makes features: Med3D's resnet_50_23dataset.pth, or TorchScript (.pt).",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--modality", help="Only images named <id>-MODALITY.nii.gz, where there are others.")
@click.option(
    "--size",
    type=click.IntRange(min=7),
    default=128,
    show_default=True,
    help="Voxels along each side of the block around the brain that is compared.",
)
@click.option(
    "--spacing",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MM",
    help="Voxel size to which real images are brought. [default: that of the first generated one]",
)
@click.option(
    "--pairs",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="How many pairs of images of a set are compared by MS-SSIM, at most.",
)
@options.seed
@options.device
@options.overwrite
def fidelity(
    real: Path,
    generated: Path,
    network: Path,
    output: Path,
    modality: str | None,
    size: int,
    spacing: float | None,
    pairs: int,
    seed: int,
    device: str,
    overwrite: bool,
) -> None:
    """Tell how near generated images are to real ones.

    FID and MMD of the features of a network, and the mean MS-SSIM between images of a set (the
    lower, the more diverse). Writes fidelity.csv and fidelity.json, and prints the table. Features
    are kept in OUTPUT/features, so that a second run computes only new ones.

    \b
    cwdm fidelity --real cases/ --generated generated/ --modality t1n \\
        --features resnet_50_23dataset.pth --output fidelity/
    """
    from tqdm import tqdm

    from cwdm.fidelity import (
        FILES,
        PROTOCOL,
        Extractor,
        View,
        caveats,
        distances,
        diversity,
        draw_pairs,
        features,
        find_images,
        scales,
        similarities,
        voxel_size_mm,
        write_tables,
    )
    from cwdm.files import check_target
    from cwdm.modality import parse_modality

    for file in FILES:
        check_target(output / file, overwrite)
    kind = parse_modality(modality) if modality else None
    sets = {"real": find_images(real, kind), "generated": find_images(generated, kind)}
    extractor = Extractor.load(network, device=device)
    spacing = spacing or voxel_size_mm(sets["generated"][0])
    views = {"real": View((size,) * 3, spacing), "generated": View((size,) * 3)}
    notes = caveats(*sets.values())
    for note in notes:
        click.echo(f"note: {note}", err=True)

    figures = distances(
        *(
            tqdm(
                features(paths, views[name], extractor, output / CACHE),
                f"features of {name} images",
                total=len(paths),
                unit="image",
                disable=None,
            )
            for name, paths in sets.items()
        )
    )
    for name in ("generated", "real"):
        drawn = draw_pairs(len(sets[name]), pairs, seed=seed)
        values = similarities(sets[name], drawn, views[name], extractor.device)
        bar = tqdm(values, f"pairs of {name} images", len(drawn), unit="pair", disable=None)
        figures.append(diversity(name, bar, seed=seed))
    record = {
        "real": {"folder": str(real), "images": len(sets["real"])},
        "generated": {"folder": str(generated), "images": len(sets["generated"])},
        "modality": kind,
        "features": {"file": network.name, "sha256": extractor.sha256},
        "size": size,
        "spacing_mm": spacing,
        "scales of MS-SSIM": scales((size,) * 3),
        "seed": seed,
        "notes": notes,
    }
    write_tables(figures, output, notes=record, overwrite=overwrite)
    counts = f"{len(sets['real'])} real and {len(sets['generated'])} generated images"
    click.echo("\n".join([*_table(figures), counts, "", PROTOCOL, f"Written to {output}"]))


def _table(figures: Sequence[Figure]) -> list[str]:
    """A line for each."""
    lines = [f"{'figure':<8}  {'of':<9}  {'value':>12}  interval"]
    for each in figures:
        between = f"{each.low:.4f} to {each.high:.4f}, " if each.low is not None else ""
        between += f"{each.pairs} pair(s)" if each.pairs else ""
        lines.append(f"{each.name:<8}  {each.of:<9}  {each.value:>12.6g}  {between}".rstrip())
    return lines
