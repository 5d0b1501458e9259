"""One picture of a synthesis: inputs, synthetic image, truth and error in three planes.

Slices go through large cross-sections of the tumor, or through the middle of the brain. The
orientation is radiological: the patient's right is on the left. Drawn with Pillow alone.
All panels of a picture have the same scale in mm, whatever the voxel size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from cwdm.errors import InputError
from cwdm.files import atomic_write
from cwdm.masks import extent
from cwdm.metrics import Aligned, intensity_range, psnr, ssim
from cwdm.modality import Modality
from cwdm.volume import Volume, brain_mask, read_volumes

if TYPE_CHECKING:
    from cwdm.synthesis import Synthesis  # loads torch, which no picture needs

__all__ = [
    "check_picture",
    "inferno",
    "montage",
    "preview",
    "sheet",
    "shown_range",
    "voxel_size_mm",
    "write_png",
]

Voxels = NDArray[np.floating]
Mask = NDArray[np.bool_]
Color = tuple[int, int, int]

NAMES = {
    Modality.T1N: "T1",
    Modality.T1C: "T1 contrast",
    Modality.T2W: "T2",
    Modality.T2F: "FLAIR",
    Modality.CT: "CT",
}
PLANES = ("axial", "coronal", "sagittal")
WINDOW = (0.005, 0.998)  # in-brain quantiles shown black and white
WARNING = "SYNTHETIC IMAGE  ·  RESEARCH USE ONLY"
MADE_BY = "Made by cwdm."

COLUMN, SMALL = 288, 240  # px: width of a panel, where one image is compared or many are listed
EDGE, GAP, ROW_LABEL = 30, 8, 26  # px: around the picture, between panels, left of the rows
MARGIN_MM = 9.0  # around the brain

BLACK: Color = (0, 0, 0)
BACKGROUND: Color = (17, 20, 24)
TEXT: Color = (236, 238, 241)
QUIET: Color = (150, 157, 166)
AMBER: Color = (255, 184, 77)  # whatever is synthetic
TEAL: Color = (108, 214, 196)  # whatever is the truth

# Matplotlib's "inferno" (CC0) at equal steps; between them colors are interpolated.
_INFERNO = np.array(
    [
        (0, 0, 4), (22, 11, 57), (66, 10, 104), (106, 23, 110), (147, 38, 103), (188, 55, 84),
        (221, 81, 58), (243, 120, 25), (252, 165, 10), (246, 215, 70), (252, 255, 164),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class _Column:
    """One column of panels: a volume, how it is colored, and what stands above it."""

    voxels: Voxels
    title: str
    subtitle: str
    color: Color = QUIET
    low: float = 0.0
    high: float = 1.0
    heat: bool = False


def montage(
    acquired: Mapping[Modality, Voxels],
    synthetic: Voxels,
    target: Modality,
    *,
    brain: Mask,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    truth: Voxels | None = None,
    tumor: Mask | None = None,
    case_id: str = "",
    notes: Sequence[str] = (),
) -> Image.Image:
    """Draw the picture.

    Args:
        acquired: the inputs, each (X, Y, Z) in canonical (RAS+) order, like all arrays here.
        synthetic: the synthesized image.
        target: its modality.
        brain: where windows, errors and the crop are taken from.
        spacing_mm: voxel size along X, Y, Z.
        truth: the acquired image of the same modality. With it the synthetic image is shown after
            the affine fit, in the window of the truth, with the absolute error beside it.
        tumor: slices go through it, and its outline is drawn on the error.
        case_id: stands in the heading.
        notes: further lines for the foot of the picture, such as the figures of a floor.
    """
    columns = [
        _Column(voxels, NAMES[modality], "acquired", QUIET, *shown_range(voxels, brain))
        for modality, voxels in acquired.items()
    ]
    name = NAMES[target]
    feet = list(notes)
    if truth is None:
        window = shown_range(synthetic, brain)
        columns.append(_Column(synthetic, name, "SYNTHETIC", AMBER, *window))
    else:
        aligned = Aligned.of(synthetic, truth, brain, rising=True)
        fitted, shares = aligned.whole(brain.shape)
        window = shown_range(shares, brain)
        error = np.abs(fitted - shares)
        top = _round_up(float(np.quantile(error[brain], 0.99)))
        columns += [
            _Column(fitted, name, "SYNTHETIC", AMBER, *window),
            _Column(shares, name, "truth, withheld", TEAL, *window),
            _Column(error, "Error", "|synthetic - truth|", QUIET, 0.0, top, heat=True),
        ]
        figures = (aligned.prediction, aligned.truth, aligned.brain)
        feet.insert(
            0,
            f"In the brain, after one affine intensity fit: PSNR {psnr(*figures):.2f} dB, "
            f"SSIM {ssim(*figures):.3f}. The error is in % of the truth's range.",
        )
    feet.append(
        "Radiological orientation: the patient's right is on the left."
        + (" White line on the error: tumor." if truth is not None and _any(tumor) else "")
    )
    given = ", ".join(NAMES[modality] for modality in acquired)
    heading = f"{name}, synthesized from {given}"
    box = extent(brain, [round(MARGIN_MM / step) for step in spacing_mm])
    middle = _middle(brain, tumor if _any(tumor) else None)
    return _Sheet(columns, box, middle, spacing_mm, brain, tumor).draw(heading, case_id, feet)


def preview(synthesis: Synthesis) -> Image.Image:
    """A synthetic image beside the inputs it was made from.

    Raises:
        InputError: an input cannot be read any more.
    """
    made = synthesis.provenance
    volumes = read_volumes(synthesis.case, made.inputs)
    return montage(
        {modality: volume.voxels for modality, volume in volumes.items()},
        synthesis.volume.voxels,
        made.target,
        brain=np.logical_or.reduce([brain_mask(volume) for volume in volumes.values()]),
        spacing_mm=voxel_size_mm(synthesis.volume.affine),
        case_id=synthesis.case.id,
        notes=[
            f"Model {made.model.name}, {made.steps} step(s) of {made.sampler}, seed {made.seed}; "
            f"cwdm {made.cwdm}. Not acquired by a scanner, not for diagnosis."
        ],
    )


def voxel_size_mm(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """The lengths of a voxel's three edges."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def write_png(picture: Image.Image, path: Path, *, overwrite: bool = False) -> None:
    """Write a picture atomically, the warning in its metadata; InputError as `atomic_write`."""
    info = PngInfo()
    info.add_text("Description", f"{WARNING}. {MADE_BY}")
    with atomic_write(path, overwrite) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info, optimize=True)


def check_picture(path: Path) -> None:
    """InputError if a picture that `write_png` did not write is there."""
    if not path.exists():
        return
    try:
        with Image.open(path) as picture:
            ours = str(picture.info.get("Description", "")).endswith(MADE_BY)
    except OSError:
        ours = False
    if not ours:
        raise InputError(f"{path}: not written by cwdm, never overwritten")


def sheet(
    samples: Iterable[tuple[str, Volume]], *, heading: str, notes: Sequence[str] = ()
) -> Image.Image:
    """Generated images, one per row: their middle slices in three planes.

    Args:
        samples: what stands at the left, and the image; only its slices are kept.
    """
    rows = [(label, _slices(volume)) for label, volume in samples]
    sizes = [[image.size for image in images] for _, images in rows]
    heights = [max(height for _, height in row) for row in sizes]
    left, head = EDGE + ROW_LABEL, 94
    words = _font(26).getlength(heading) + 40 + _font(15).getlength(WARNING) + 24
    width = left + max(3 * (SMALL + GAP) - GAP, round(words)) + EDGE
    bottom = head + sum(heights) + GAP * (len(rows) - 1)
    height = bottom + 20 + 24 * (len(notes) + 1) + EDGE
    picture = Image.new("RGB", (width, height), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    _head(pen, left, width, heading, "")
    xs = [left + column * (SMALL + GAP) for column in range(3)]
    for x, plane in zip(xs, PLANES, strict=True):
        pen.text((x + SMALL / 2, head - 18), plane, QUIET, _font(16), anchor="mm")
    top = head
    for (label, images), row in zip(rows, heights, strict=True):
        name = _vertical_text(label)
        picture.paste(name, (EDGE - 6, top + (row - name.height) // 2))
        for x, image in zip(xs, images, strict=True):
            pen.rectangle((x, top, x + SMALL - 1, top + row - 1), BLACK)
            at = (x + (SMALL - image.width) // 2, top + (row - image.height) // 2)
            picture.paste(image, at)
            pen.text((x + SMALL - 5, top + row - 5), "SYNTHETIC", AMBER, _font(12), anchor="rs")
        top += row + GAP
    feet = [*notes, "Radiological orientation: the patient's right is on the left."]
    for line, text in enumerate(feet):
        pen.text((left, bottom + 24 + 24 * line), text, QUIET, _font(16))
    return picture


def _slices(volume: Volume) -> list[Image.Image]:
    """The middle slice of each plane, in the window of what is not background, upright."""
    voxels, spacing = volume.voxels, voxel_size_mm(volume.affine)
    low, high = shown_range(voxels, voxels != 0)
    shape = [n * step for n, step in zip(voxels.shape, spacing, strict=True)]  # mm
    scale = SMALL / max(shape[:2])
    images = []
    for plane in range(3):
        axis = 2 - plane
        across, up = (shape[a] for a in range(3) if a != axis)
        flat = voxels.take(voxels.shape[axis] // 2, axis).astype(np.float32)[::-1, ::-1].T
        size = max(1, round(across * scale)), max(1, round(up * scale))
        shares = Image.fromarray((flat - low) / (high - low))
        smooth = np.asarray(shares.resize(size, Image.Resampling.BICUBIC))
        images.append(Image.fromarray((smooth.clip(0, 1) * 255).round().astype(np.uint8)))
    return images


def inferno(shares: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Numbers in [0, 1] (clipped) of any shape -> colors of shape (..., 3), dark to bright."""
    stops = np.linspace(0, 1, len(_INFERNO))
    channels = [np.interp(np.clip(shares, 0, 1), stops, _INFERNO[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


class _Sheet:
    """Panels laid out in a grid of planes (rows) and columns, all at one scale."""

    def __init__(
        self,
        columns: Sequence[_Column],
        box: tuple[slice, slice, slice],
        middle: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        brain: Mask,
        tumor: Mask | None,
    ) -> None:
        self.columns, self.box, self.middle, self.spacing_mm = columns, box, middle, spacing_mm
        self.brain, self.tumor = brain, tumor
        x, y, z = ((s.stop - s.start) * step for s, step in zip(box, spacing_mm, strict=True))  # mm
        self.scale = COLUMN / max(x, y)  # px per mm
        self.sizes = [self._pixels(x, y), self._pixels(x, z), self._pixels(y, z)]
        self.left = EDGE + ROW_LABEL
        self.head = 124
        self.tops = [self.head]
        for _, height in self.sizes[:-1]:
            self.tops.append(self.tops[-1] + height + GAP)
        self.bottom = self.tops[-1] + self.sizes[-1][1]

    def draw(self, heading: str, case_id: str, feet: Sequence[str]) -> Image.Image:
        """The whole picture."""
        count = len(self.columns)
        words = _font(26).getlength(heading) + 40 + _font(15).getlength(WARNING) + 24
        width = self.left + max(count * (COLUMN + GAP) - GAP, round(words)) + EDGE
        bar = 50 if self.columns[-1].heat else 0
        height = self.bottom + 20 + max(24 * len(feet), bar) + EDGE
        picture = Image.new("RGB", (width, height), BACKGROUND)
        pen = ImageDraw.Draw(picture)
        for index, column in enumerate(self.columns):
            self._draw_column(picture, pen, index, column)
        _head(pen, self.left, width, heading, case_id)
        self._rows(picture, pen)
        for line, text in enumerate(feet):
            pen.text((self.left, self.bottom + 24 + 24 * line), text, QUIET, _font(16))
        if self.columns[-1].heat:
            self._color_bar(picture, pen, self._x(count - 1), self.columns[-1].high)
        return picture

    def _draw_column(
        self, picture: Image.Image, pen: ImageDraw.ImageDraw, index: int, column: _Column
    ) -> None:
        x = self._x(index)
        middle = x + COLUMN / 2
        pen.text((middle, self.head - 44), column.title, TEXT, _font(20), anchor="mm")
        pen.text((middle, self.head - 20), column.subtitle, column.color, _font(15), anchor="mm")
        if column.color != QUIET:
            pen.rectangle((x, self.head - 6, x + COLUMN - 1, self.head - 4), column.color)
        for plane, (width, height) in enumerate(self.sizes):
            top = self.tops[plane]
            pen.rectangle((x, top, x + COLUMN - 1, top + height - 1), BLACK)
            picture.paste(self._panel(column, plane), (x + (COLUMN - width) // 2, top))
            if column.color == AMBER:
                at = (x + COLUMN - 5, top + height - 5)
                pen.text(at, "SYNTHETIC", AMBER, _font(12), anchor="rs")

    def _panel(self, column: _Column, plane: int) -> Image.Image:
        """One slice, turned upright, resampled to pixels and colored."""
        size = self.sizes[plane]
        shares = (self._slice(column.voxels, plane) - column.low) / (column.high - column.low)
        image = Image.fromarray(shares * self._slice(self.brain, plane))
        smooth = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        if not column.heat:
            grey = (np.clip(smooth, 0, 1) * 255).round().astype(np.uint8)
            return Image.fromarray(np.repeat(grey[..., None], 3, axis=2))
        colors = inferno(smooth)
        if self.tumor is not None:
            inside = Image.fromarray(self._slice(self.tumor, plane))
            mask = np.asarray(inside.resize(size, Image.Resampling.BICUBIC)) > 0.5
            colors[mask & ~ndimage.binary_erosion(mask)] = 255
        return Image.fromarray(colors)

    def _slice(self, voxels: Voxels | Mask, plane: int) -> Voxels:
        """(X, Y, Z) -> (rows, columns): front or top is up, right or front is on the left."""
        axis = 2 - plane
        index = self.middle[axis] - self.box[axis].start
        flat: Voxels = voxels[self.box].take(index, axis).astype(np.float32)
        return flat[::-1, ::-1].T

    def _rows(self, picture: Image.Image, pen: ImageDraw.ImageDraw) -> None:
        """Names of the planes, letters of the directions, and a scale bar."""
        sides = (("R", "A"), ("R", "S"), ("A", "S"))
        for plane, (_, height) in enumerate(self.sizes):
            label = _vertical_text(PLANES[plane])
            top = self.tops[plane]
            picture.paste(label, (EDGE - 6, top + (height - label.height) // 2))
            middle = self.left + COLUMN / 2
            pen.text((self.left + 5, top + height / 2), sides[plane][0], QUIET, _font(13), "lm")
            pen.text((middle, top + 4), sides[plane][1], QUIET, _font(13), "mt")
        length = round(50 * self.scale)
        x, y = self.left + 6, self.tops[0] + self.sizes[0][1] - 9
        pen.rectangle((x, y, x + length, y + 2), QUIET)
        pen.text((x, y - 5), "5 cm", QUIET, _font(13), anchor="ls")

    def _color_bar(
        self, picture: Image.Image, pen: ImageDraw.ImageDraw, x: int, top_value: float
    ) -> None:
        """From 0 to the brightest error, in percent of the truth's range."""
        width, y = COLUMN, self.bottom + 24
        bar = inferno(np.tile(np.linspace(0, 1, width), (12, 1)))
        picture.paste(Image.fromarray(bar), (x, y))
        for share, anchor in ((0.0, "lt"), (0.5, "mt"), (1.0, "rt")):
            text = f"{100 * share * top_value:g} %"
            pen.text((x + share * (width - 1), y + 18), text, QUIET, _font(15), anchor=anchor)

    def _x(self, index: int) -> int:
        return self.left + index * (COLUMN + GAP)

    def _pixels(self, width_mm: float, height_mm: float) -> tuple[int, int]:
        return max(1, round(width_mm * self.scale)), max(1, round(height_mm * self.scale))


def _head(pen: ImageDraw.ImageDraw, left: int, width: int, heading: str, case_id: str) -> None:
    """The line at the top, with the warning at its end."""
    pen.text((left, 40), heading, TEXT, _font(26), anchor="ls")
    heading_end = left + pen.textlength(heading, _font(26))
    right = width - EDGE
    badge = pen.textlength(WARNING, _font(15)) + 24
    pen.rounded_rectangle((right - badge, 18, right, 46), 6, outline=AMBER)
    pen.text((right - badge / 2, 32), WARNING, AMBER, _font(15), anchor="mm")
    if heading_end + 18 + pen.textlength(case_id, _font(16)) < right - badge:
        pen.text((heading_end + 18, 40), case_id, QUIET, _font(16), anchor="ls")


def shown_range(
    voxels: Voxels, brain: Mask, quantiles: tuple[float, float] = WINDOW
) -> tuple[float, float]:
    """As `intensity_range`, of what is shown black and white; a constant image is shown black."""
    try:
        return intensity_range(voxels, brain, quantiles)
    except ValueError:
        return float(voxels[brain].max()), float(voxels[brain].max()) + 1


def _middle(brain: Mask, tumor: Mask | None) -> tuple[int, int, int]:
    """The slice to show along each axis: the middle of the brain, or where the tumor is large.

    The areas of tumor and brain are multiplied, which prefers slices that show both.
    """
    if tumor is None:
        x, y, z = ((side.start + side.stop) // 2 for side in extent(brain))
    else:
        across = [tuple(a for a in range(3) if a != axis) for axis in range(3)]
        x, y, z = (int((tumor.sum(axes) * brain.sum(axes)).argmax()) for axes in across)
    return x, y, z


def _any(mask: Mask | None) -> bool:
    return mask is not None and bool(mask.any())


def _round_up(value: float) -> float:
    """The end of the error scale: the next of 10, 20, 30, 40, 50 or 100 %."""
    return next((end for end in (0.1, 0.2, 0.3, 0.4, 0.5) if value <= end), 1.0)


def _vertical_text(text: str) -> Image.Image:
    """Text that reads upwards."""
    font = _font(16)
    left, top, right, bottom = (round(v) for v in font.getbbox(text))
    label = Image.new("RGB", (right - left + 2, bottom - top + 2), BACKGROUND)
    ImageDraw.Draw(label).text((1 - left, 1 - top), text, QUIET, font)
    return label.rotate(90, expand=True)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size=size)
