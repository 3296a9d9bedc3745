"""Compact arrays: what comes out is what went in, to the digits of 8 and 16 bits, and equal arrays are held once."""

import base64
import gzip

import numpy as np
import pytest
import torch

from timm_contconv.inspect.packing import Packer


@pytest.mark.parametrize(("bits", "kind"), [(8, np.int8), (16, np.int16)])
@pytest.mark.parametrize("rowwise", [False, True])
def test_values_are_right_to_half_a_step(bits, kind, rowwise):
    torch.manual_seed(0)
    values = torch.randn(3, 5, 7) * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1)
    packer = Packer()
    packer.add(torch.ones(3), bits=8)  # leaves an odd number of bytes
    place = packer.add(values, bits, rowwise)
    buffer = gzip.decompress(base64.b64decode(packer.packed()))
    numbers = np.frombuffer(buffer, kind, values.numel(), place["at"]).reshape(place["shape"])
    scales = np.array(place["scales"]).reshape(-1, 1, 1)
    steps = values.abs().amax((1, 2) if rowwise else (0, 1, 2), keepdim=True).numpy() / (2 ** (bits - 1) - 1)
    assert (np.abs(numbers * scales - values.numpy()) <= 0.55 * steps + 1e-3 * np.abs(values.numpy())).all()


def test_equal_arrays_are_held_once():
    packer = Packer()
    first, other, again = (packer.add(torch.tensor(v), 8) for v in ([1.0, 2.0], [2.0, 1.0], [1.0, 2.0]))
    assert first["at"] == again["at"] != other["at"]
