"""What an algorithm is: the three passes of a convolution, and where it does not apply."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from ..problem import Problem, in_format, memory_format

__all__ = ["Algorithm", "add_bias"]


class Algorithm(ABC):
    """Three passes of a convolution with symmetric zero padding.

    Shapes: x (N, C_in, *size), weight (C_out, C_in/groups, *kernel), grad and the output (N, C_out, *output_size).
    Results have, in any memory format and any floating dtype, the values of PyTorch's convolution.
    """

    #: How `ops.algorithm` calls it.
    name: str
    #: Whether a NaN or Inf in an image reaches all pixels of that image, and not only those under the kernel.
    spreads_nan = False

    @abstractmethod
    def refusal(self, pass_: str, problem: Problem) -> str | None:
        """Why this algorithm does not apply to a pass ("output", "input", "weight"); None where it does."""

    @abstractmethod
    def output(self, problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of x and weight, plus bias (C_out,)."""

    @abstractmethod
    def input(self, problem: Problem, grad: Tensor, weight: Tensor) -> Tensor:
        """The gradient (N, C_in, *size) for x."""

    @abstractmethod
    def weight(self, problem: Problem, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient (C_out, C_in/groups, *kernel) for the weight."""

    def bound(self, problem: Problem, like: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The output pass for images with the strides of `like`, in their memory format: what inference calls."""
        form = memory_format(like)
        return lambda x, weight, bias: in_format(self.output(problem, x, weight, bias), x.dtype, form)

    def run(self, pass_: str, problem: Problem, *tensors: Tensor | None) -> Tensor:
        """One pass by its name, with the tensors that its method takes."""
        result: Tensor = getattr(self, pass_)(problem, *tensors)
        return result


def add_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """Adds a bias (C_out,) to a fresh output (N, C_out, *output_size), in place."""
    return out if bias is None else out.add_(bias.reshape(-1, *[1] * (out.ndim - 2)))
