"""`cwdm report`."""

from pathlib import Path

import click

from . import options


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=options.ending(".html"),
    help="The file to write. [default: RUN/report.html]",
)
@click.option("--title", help="Stands at the top. [default: the name of the folder]")
@click.option(
    "--volumes",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Embed whole volumes of this many cases, the worst; the others get still pictures.",
)
@options.overwrite
def report(
    run: Path, output: Path | None, title: str | None, volumes: int, overwrite: bool
) -> None:
    """Make one HTML file that shows a run of `cwdm evaluate`, or cases that were completed.

    It opens offline: whether the images are good, where they are bad, whether the tumor can be
    trusted, and every case slice by slice.
    """
    from tqdm import tqdm

    from cwdm.answers import Run
    from cwdm.files import check_target
    from cwdm.report import write_report

    path = output or run / "report.html"
    check_target(path, overwrite)
    found = Run.read(run)
    total = sum(bool(subject.predictions) for subject in found.subjects)
    with tqdm(total=total, unit="case", disable=None) as bar:
        write_report(
            found,
            path,
            title=title or "",
            volumes=volumes,
            overwrite=overwrite,
            progress=bar.update,
        )
    click.echo(f"Written to {path}")
