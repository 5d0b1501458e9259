"""Ways to compute the same: repeating and convolving, and averaging. Median seconds, one thread.

python benchmarks/convolutions.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Compare, Measurement, Timer

from cwdm.streamed import transposed

SHAPES = ((128, 24), (256, 12))
"""Channels and voxels a side before they are repeated."""
ORDERS = {"as is": torch.contiguous_format, "channels last": torch.channels_last_3d}


def eighths(x: Tensor, weight: Tensor) -> Tensor:
    """Repeating and convolving as eight convolutions of 2 x 2 x 2, one for each place in a cube."""
    n = x.shape[2]
    padded = F.pad(x, [1] * 6)
    result = x.new_empty(1, weight.shape[1], 2 * n, 2 * n, 2 * n)
    for place in range(8):
        i, j, k = place // 4, place // 2 % 2, place % 2
        taps = weight[:, :, 1 - i :: 2, 1 - j :: 2, 1 - k :: 2].flip(2, 3, 4).transpose(0, 1)
        part = padded[:, :, i : i + n + 1, j : j + n + 1, k : k + n + 1]
        result[:, :, i::2, j::2, k::2] = F.conv3d(part, taps)
    return result


def timed(statement: str, name: str, about: str, **values: object) -> Measurement:
    timer = Timer(
        statement,
        globals={"F": F, "eighths": eighths, **values},
        label="seconds",
        sub_label=about,
        description=name,
        num_threads=1,
    )
    return timer.blocked_autorange(min_run_time=1)


def main() -> None:
    found = []
    for channels, side in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for order, layout in ORDERS.items():
                about = f"{channels} channels, {side}^3, {str(dtype)[6:]}, {order}"
                x = torch.randn(1, channels, side, side, side, dtype=dtype)
                plain = torch.randn(channels, channels, 3, 3, 3)
                x = x.contiguous(memory_format=layout)
                values = {
                    "x": x,
                    "w": plain.to(dtype, memory_format=layout),
                    "t": transposed(plain, (2, 2, 2)).to(dtype, memory_format=layout),
                    "a": x.new_full((channels, 1, 2, 2, 2), 1 / 8),
                }
                ways = {
                    "repeat, convolve": "F.conv3d(F.interpolate(x, scale_factor=2), w, padding=1)",
                    "transposed": "F.conv_transpose3d(x, t, stride=2, padding=1)",
                    "eight": "eighths(x, t)",
                    "average by convolution": "F.conv3d(x, a, stride=2, groups=len(a))",
                }
                if dtype == torch.float32:  # there is no other
                    ways["average by pooling"] = "F.avg_pool3d(x, 2)"
                with torch.inference_mode():
                    found += [timed(way, name, about, **values) for name, way in ways.items()]
    Compare(found).print()


if __name__ == "__main__":
    main()
