"""Resampling filters of any length: they agree with the 4-tap path, which the goldens check."""

import pytest
import torch

from cfclip.models.ops import modulated_conv2d, setup_filter
from cfclip.models.stylegan2 import upsample2x


@pytest.mark.parametrize(
    "other, taps",
    [
        ([1], [0, 0, 1, 0]),
        ([3, 1], [0, 3, 1, 0]),
        ([2, 3, 1], [0, 2, 3, 1]),
        ([1, 3, 4, 2, 0], [1, 3, 4, 2]),
        ([0, 1, 3, 4, 2, 0], [1, 3, 4, 2]),
        ([0, 0, 1, 3, 4, 2, 0, 0], [1, 3, 4, 2]),
    ],
)
def test_zero_taps_change_nothing(other, taps):
    torch.manual_seed(0)
    x, weight, style = (torch.randn(s, dtype=torch.float64) for s in ((2, 5, 6, 7), (4, 5, 3, 3), (2, 5)))
    a, b = setup_filter(other).double(), setup_filter(taps).double()
    torch.testing.assert_close(
        modulated_conv2d(x, weight, style, f=a), modulated_conv2d(x, weight, style, f=b)
    )
    torch.testing.assert_close(upsample2x(x, a), upsample2x(x, b))


def test_up_sampling_by_definition():
    """Zeros between the pixels, true convolutions by 3x3 and by the filter, NVIDIA's padding."""
    torch.manual_seed(1)
    taps = torch.tensor([1.0, 2, 5, 4, 2, 1], dtype=torch.float64)
    f = torch.outer(taps, taps) / taps.sum() ** 2
    x, weight, style = (torch.randn(s, dtype=torch.float64) for s in ((1, 1, 4, 4), (1, 1, 3, 3), (1, 1)))
    spread = torch.zeros(8, 8, dtype=torch.float64)
    spread[::2, ::2] = x[0, 0] * style[0, 0]
    full = torch.zeros(8 + 2 + 5, 8 + 2 + 5, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            for k in range(6):
                for m in range(6):
                    full[i + k : i + k + 8, j + m : j + m + 8] += 4 * weight[0, 0, i, j] * f[k, m] * spread
    expected = full[3:11, 3:11]  # (6 + 2 - 1) // 2 of the filter's 5 taps before the centre
    torch.testing.assert_close(modulated_conv2d(x, weight, style, demodulate=False, f=f)[0, 0], expected)
