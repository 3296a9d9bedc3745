"""LayerSpec: the settings of one method, in constructors, recipes and configuration files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from .arguments import as_int
from .kernel import Kernel
from .plain import PlainConv, plain_arguments
from .replacement import ConvReplacement

__all__ = ["LARGEST_KERNEL", "METHODS", "KernelSize", "KernelSpec", "LayerSpec", "explain"]

#: the largest kernel size that a spec may ask for, in pixels; specs also come from strangers
LARGEST_KERNEL = 255

#: the spec of every method, by the method's name
METHODS: dict[str, type[LayerSpec]] = {}


def _check_kernel_size(value: object) -> object:
    given = value if isinstance(value, list | tuple) else [value]
    sizes = [size for size in map(as_int, given) if size is not None and 1 <= size <= LARGEST_KERNEL]
    if not len(sizes) == len(given) or not 1 <= len(sizes) <= 3:
        raise ValueError(f"expected an int from 1 to {LARGEST_KERNEL}, or one per spatial dimension")
    return tuple(sizes) if isinstance(value, list | tuple) else sizes[0]


#: size of a kernel in pixels, one int for all dimensions or one each
KernelSize = Annotated[int | tuple[int, ...], BeforeValidator(_check_kernel_size)]


class LayerSpec(BaseModel):
    """Settings with which a method stands in for a convolution. One subclass per method, beside its layers.

    Recipes and saved models know a subclass by its default for `method`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    #: the layers of the method, by number of spatial dimensions
    layers: ClassVar[dict[int, type[ConvReplacement]]]
    #: whether the method can stand in for `nn.ConvTranspose2d`
    replaces_transposed: ClassVar[bool] = False

    method: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        name = cls.model_fields["method"].default
        if isinstance(name, str):
            METHODS[name] = cls

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """The spec with these settings.

        Raises:
            ValueError: a setting is unknown or out of range; the message names it, its value and what is allowed.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise ValueError("\n".join(explain(item) for item in error.errors())) from None

    def refusal(self, conv: PlainConv) -> str | None:
        """Why this method can't stand in for `conv`; None if it can."""
        if len(conv.kernel_size) not in self.layers:
            return f"{self.method} has no {len(conv.kernel_size)}-D layer"
        if max(conv.dilation) > 1 and not self.layers[len(conv.kernel_size)].dilates:
            return f"dilation {conv.dilation}: only 1 can be replaced"
        try:
            self.check_conv(conv)
        except ValueError as error:
            return str(error)
        return None

    def check_conv(self, conv: PlainConv) -> None:
        """Raise a ValueError if a condition of this method's own keeps it from standing in for `conv`."""

    #: what to do if a fit has too large an error, for messages
    fit_advice: ClassVar[str] = "Use other settings."

    def for_fit(self, convs: Sequence[PlainConv], tolerance: float) -> Self:
        """The spec with the settings filled in that decide how well layers can reproduce kernels.

        Args:
            convs: convolutions with values, whose layers will share their geometry.
            tolerance: relative error that no kernel should exceed.
        """
        return self

    def resolve(self, groups: Sequence[Sequence[PlainConv]]) -> Self:
        """The spec with the settings that depend on the whole model filled in, as the method's paper does.

        Args:
            groups: the convolutions to replace; those of one inner sequence will share their geometry.
        """
        return self

    def build(self, conv: PlainConv) -> ConvReplacement:
        """The layer that stands in for `conv`, drawn at random."""
        return self.layers[len(conv.kernel_size)].in_place_of(conv, self)


class KernelSpec(LayerSpec):
    """Settings of a method that constructs a kernel.

    Attributes:
        kernel_size: size of the constructed kernel in pixels, one int for all dimensions or one each.
    """

    #: the method's kernel, built from a spec, out_channels, in_channels / groups, kernel_size, causal, device and dtype
    kernel: ClassVar[Callable[..., Kernel]]

    kernel_size: KernelSize

    def sizes(self, ndim: int) -> tuple[int, ...]:
        """kernel_size, one int per dimension; a ValueError if it has another number of them."""
        sizes = (self.kernel_size,) * ndim if isinstance(self.kernel_size, int) else self.kernel_size
        if len(sizes) != ndim:
            raise ValueError(f"kernel_size={self.kernel_size}: expected an int, or {ndim} of them, one per dimension")
        return sizes

    def check_conv(self, conv: PlainConv) -> None:
        plain_arguments(conv, self.sizes(len(conv.kernel_size)))


#: what is allowed, by pydantic's name of the error
_ALLOWED = {
    "greater_than_equal": "expected at least {ge}",
    "greater_than": "expected more than {gt}",
    "less_than_equal": "expected at most {le}",
    "less_than": "expected less than {lt}",
    "literal_error": "expected {expected}",
    "bool_type": "expected True or False",
    "bool_parsing": "expected True or False",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "int_type": "expected an int",
    "tuple_type": "expected a list",
}


def explain(item: Mapping[str, Any], place: str = "", whole: str = "layer") -> str:
    """One line for one error that pydantic found: place, name, value, what is allowed.

    Args:
        item: one of `ValidationError.errors()`.
        place: start of the line, as "recipe.toml:3: ".
        whole: what an unknown field would belong to.
    """
    location = [str(part) for part in item["loc"]]
    name = ".".join(location)
    if item["type"] == "missing":
        return f"{place}{name} is missing"
    if item["type"] == "extra_forbidden":
        return f"{place}{name} is not a field of this {'layer' if len(location) > 1 else whole}"
    template = _ALLOWED.get(item["type"])
    problem = item["msg"].removeprefix("Value error, ") if template is None else template.format(**item.get("ctx", {}))
    return f"{place}{name}={item['input']!r}: {problem}"
