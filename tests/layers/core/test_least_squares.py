"""The solver of fits against a general one."""

import torch

from timm_contconv.layers.core.least_squares import solve


def test_weights_are_those_of_a_least_squares_solver():
    elements = torch.randn(3, 40, 6, dtype=torch.float64)  # pixels x elements
    kernels = torch.randn(3, 40, 2, dtype=torch.float64)
    expected = torch.linalg.lstsq(elements, kernels).solution
    torch.testing.assert_close(solve(elements.mT @ elements, elements.mT @ kernels), expected)
