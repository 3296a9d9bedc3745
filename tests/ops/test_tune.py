"""Measuring ahead: what runs is counted, measured and told."""

from collections import Counter

import pytest
import torch

from timm_contconv import ops


def step(x, weight):
    y = ops.conv(x, weight, None, (1, 1), (8, 8), 32)
    (y + ops.conv(y, weight, None, (1, 1), (8, 8), 32)).sum().backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_a_step_computes_is_counted_and_each_kind_is_measured_once(layout):
    x = torch.randn(2, 32, 28, 28).to(memory_format=layout).requires_grad_()
    weight = torch.randn(32, 1, 17, 17, requires_grad=True)
    calls = ops.calls_of(lambda: step(x, weight))
    kinds = Counter(dict.fromkeys(("output", "input", "weight"), 0))
    for (pass_, problem), count in calls.items():
        assert problem.input_shape == (2, 32, 28, 28)
        kinds[pass_] += count
    assert kinds == {"output": 2, "input": 2, "weight": 2}
    with ops.measuring(True):
        found = [ops.tune(*call) for call in calls]
        assert all(choice.seconds[choice.algorithm] == min(choice.seconds.values()) for choice in found)
        assert [(c.pass_, c.problem) for c in found] == list(calls)
        assert [ops.tune(*call) for call in calls] == found
        measured = ops.choices()
        step(x, weight)  # nothing is left to measure
        assert ops.choices() == measured


def test_what_is_too_small_is_not_measured():
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 3, 3)
    calls = ops.calls_of(lambda: ops.conv(x, weight, None, (1, 1), (1, 1), 4))
    assert sum(calls.values()) == 1
    with ops.measuring(True):
        assert [ops.tune(*call) for call in calls] == [None]


def test_tuning_needs_measuring():
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 3, 3)
    (call,) = ops.calls_of(lambda: ops.conv(x, weight, None, (1, 1), (1, 1), 4))
    with pytest.raises(RuntimeError, match="measuring is off"):
        ops.tune(*call)
