"""What an algorithm for the depthwise convolution is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from .problem import Problem

__all__ = ["Algorithm"]


class Algorithm(ABC):
    """Three passes of a depthwise convolution with symmetric zero padding, in any number of spatial dimensions.

    Shapes: x (N, C, *size), weight (C, 1, *kernel), grad and the output (N, C, *output_size). Results have the
    dtype of the images and, in no particular memory format, the values of PyTorch's convolution.
    """

    name: str

    @abstractmethod
    def refusal(self, pass_: str, problem: Problem) -> str | None:
        """Why this algorithm does not apply to a pass ("output", "input", "weight"); None where it does."""

    @abstractmethod
    def features(self, pass_: str, problem: Problem) -> tuple[float, ...]:
        """Amounts of work to which the time of a pass is proportional, for the cost rule (costs.json)."""

    @abstractmethod
    def output(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        """The convolution of x and weight, plus bias (C,)."""

    @abstractmethod
    def input(
        self,
        grad: Tensor,
        weight: Tensor,
        input_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> Tensor:
        """The gradient (N, C, *input_size) for x."""

    @abstractmethod
    def weight(
        self, grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        """The gradient (C, 1, *kernel_size) for the weight."""
