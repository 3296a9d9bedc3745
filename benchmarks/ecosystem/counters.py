"""Rows of libraries that count multiply-adds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import timm
from torch import nn

import timm_contconv as tcc
from benchmarks.common import multiply_adds
from timm_contconv.hub.names import PATCHED

from .rows import SIZE, classifier, images

__all__ = ["ROWS"]


def flops(model: nn.Module) -> int:
    return multiply_adds(model, images(1))


def check_count(name: str, count: Callable[[nn.Module], float], merge: bool = True) -> None:
    """The counter sees what the patch adds to the plain model. Counters differ on norms, biases and linear layers."""
    plain, model = timm.create_model(PATCHED[name].base, num_classes=10).eval(), classifier(name).eval()
    merged = tcc.merge(model)
    added = flops(merged) - flops(plain)
    found = count(merged if merge else model) - count(plain)
    assert abs(found - added) < 0.02 * flops(merged), (
        f"{found / 1e6:.1f} M more than the plain model; {added / 1e6:.1f} M"
    )


def torch_flops(name: str) -> None:
    """torch.utils.flop_counter of the patched model"""
    check_count(name, flops, merge=False)


def fvcore_flops(name: str) -> None:
    """FlopCountAnalysis of the merged model"""
    from fvcore.nn import FlopCountAnalysis

    check_count(name, lambda model: FlopCountAnalysis(model, images(1)).unsupported_ops_warnings(False).total())


def torchinfo_macs(name: str) -> None:
    """summary of the merged model"""
    import torchinfo

    check_count(name, lambda model: torchinfo.summary(model, (1, 3, SIZE, SIZE), verbose=0).total_mult_adds)


def thop_macs(name: str) -> None:
    """profile of the merged model"""
    import thop

    check_count(name, lambda model: thop.profile(copy.deepcopy(model), (images(1),), verbose=False)[0])


def ptflops_macs(name: str) -> None:
    """get_model_complexity_info of the merged model"""
    import ptflops

    settings = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    check_count(name, lambda model: ptflops.get_model_complexity_info(model, (3, SIZE, SIZE), **settings)[0])


def calflops_macs(name: str) -> None:
    """calculate_flops of the merged model"""
    import calflops

    settings = {"output_as_string": False, "print_results": False, "print_detailed": False}
    check_count(name, lambda model: calflops.calculate_flops(model, (1, 3, SIZE, SIZE), **settings)[1])


ROWS = (
    ("torch", torch_flops),
    ("fvcore", fvcore_flops),
    ("torchinfo", torchinfo_macs),
    ("thop", thop_macs),
    ("ptflops", ptflops_macs),
    ("calflops", calflops_macs),
)
