"""The algorithms of the convolution engine, one file each.

algorithm.py: what an algorithm is. pytorch.py: PyTorch's own, as it stands or on channels-last copies. direct.py:
compiled loops over channels (direct.cpp, tiles.h, built by library.py). fft.py, dft.py: discrete Fourier transforms,
by FFT or by matrix products; fourier.py is what they share. triton.py: tensor cores on CUDA (triton_kernels.py), in
tiles of several shapes.
"""

from .algorithm import Algorithm
from .dft import DFT
from .direct import Direct
from .fft import FFT
from .pytorch import ChannelsLast, PyTorch
from .triton import TILES, Triton

__all__ = ["ALGORITHMS", "TRITON", "Algorithm"]

#: Those of Triton, one for each shape of tiles.
TRITON = tuple(Triton(*tile) for tile in TILES)
#: Every algorithm by its name.
ALGORITHMS: dict[str, Algorithm] = {a.name: a for a in (PyTorch(), ChannelsLast(), Direct(), FFT(), DFT(), *TRITON)}
