"""What a constructed convolution promises to third-party code, and when its kernel is current."""

import copy
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from timm.layers import Conv2dSame
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import timm_contconv as tcc
from timm_contconv.layers import (
    DclsConv1d,
    DclsConv2d,
    DclsConv3d,
    DclsSpec,
    FlexConv1d,
    FlexConv2d,
    GaussianEnvelopeConv2d,
    SmpConv2d,
    compilation,
)

INTERPOLATIONS = ("bilinear", "triangle", "gauss")


def make(interpolation: str = "gauss", **options) -> DclsConv2d:
    defaults = {"kernel_size": 7, "padding": 3, "groups": 8, "kernel_count": 5}
    return DclsConv2d(8, 8, **{**defaults, **options}, interpolation=interpolation)


@pytest.fixture
def x():
    return torch.randn(2, 8, 12, 11)


@pytest.mark.parametrize("layer_type", [DclsConv1d, DclsConv2d, DclsConv3d])
def test_attributes_are_those_of_a_plain_convolution(layer_type):
    options = {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "reflect"}
    layer = layer_type(4, 6, 3, **options, kernel_count=2)
    plain = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[layer.ndim](4, 6, 3, **options)
    names = "in_channels out_channels kernel_size stride padding dilation transposed output_padding groups padding_mode"
    for name in names.split():
        assert getattr(layer, name) == getattr(plain, name), name
    assert layer.weight.shape == plain.weight.shape
    assert layer.bias.shape == plain.bias.shape


@pytest.mark.parametrize(
    ("argument", "value", "wanted"),
    [
        *(("kernel_size", value, "a positive int, or 2 of them") for value in (7.0, None, True, (7, True), (7, 7, 7))),
        *(("kernel_size", value, "a positive int, or 2 of them") for value in (torch.tensor(7), "77", np.int64(0))),
        *(("stride", value, "a positive int, or 2 of them") for value in (None, 0, (1, 1.0))),
        *(("dilation", value, "a positive int, or 2 of them") for value in (None, 1.0)),
        *(("padding", value, "an int of at least 0, or 2 of them") for value in (1.5, None, True, np.array([1, 1]))),
        *(("in_channels", value, "a positive int") for value in ("8", 8.0, None, True, torch.tensor(8))),
        ("out_channels", 0, "a positive int"),
        ("groups", 2.0, "a positive int"),
    ],
)
def test_numbers_that_are_not_counts_are_refused_by_name(argument, value, wanted):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{argument}={value!r}: expected {wanted}')}$"):
        DclsConv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 7, "kernel_count": 5, argument: value})


def test_ints_of_numpy_become_pythons():
    seven, one = np.int64(7), np.int64(1)
    layer = make(kernel_size=seven, stride=(one, 2), padding=np.int64(3), dilation=one)
    assert (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((7, 7), (1, 2), (3, 3), (1, 1))
    assert {type(v) for v in (*layer.kernel_size, *layer.stride, *layer.padding, *layer.dilation)} == {int}
    assert DclsConv2d(np.int64(8), np.int64(4), 3, groups=np.int64(2), kernel_count=1).weight.shape == (4, 4, 3, 3)


def test_a_layer_that_is_made_in_a_compiled_function_equals_eager(x):
    def run(x, size):
        torch.manual_seed(0)
        return make(kernel_size=size, padding=size // 2)(x)

    compiled = torch.compile(run, backend="eager")
    for size in (3, 5, 7):
        torch.testing.assert_close(compiled(x, size), run(x, size))


def test_weight_can_be_fused_with_batch_norm(x):
    layer, norm = make().eval(), nn.BatchNorm2d(8).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    weight, bias = nn.utils.fuse_conv_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    torch.testing.assert_close(F.conv2d(x, weight, bias, padding=3, groups=8), norm(layer(x)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": "same"}, {"padding": "same", "kernel_size": 6}])
def test_to_conv_gives_the_same_output(interpolation, options, x):
    layer = make(interpolation, **options)
    conv = layer.to_conv()
    assert type(conv) is nn.Conv2d
    torch.testing.assert_close(conv(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel_size", [6, 7])
def test_same_padding_with_stride_is_timms(kernel_size, x):
    layer = make(padding="same", stride=2, kernel_size=kernel_size)
    conv = layer.to_conv()
    assert type(conv) is Conv2dSame
    torch.testing.assert_close(conv(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_from_conv_keeps_output_size_and_place(size, x):
    conv = nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8)
    spec = DclsSpec(interpolation="bilinear", kernel_size=size, kernel_count=1)
    layer = DclsConv2d.from_conv(conv, spec)
    with torch.no_grad():  # one element in the middle: the layer is the identity, as a centred delta is for conv
        layer.element_weight.fill_(1)
        layer.position.zero_()
        layer.bias.zero_()
        nn.init.dirac_(conv.weight, groups=8)
        conv.bias.zero_()
    torch.testing.assert_close(layer(x), conv(x))


def test_from_conv_refuses_a_kernel_that_has_no_common_centre():
    spec = DclsSpec(interpolation="bilinear", kernel_size=6, kernel_count=1)
    with pytest.raises(ValueError, match="differ by an even number"):
        DclsConv2d.from_conv(nn.Conv2d(8, 8, 5, padding=2, groups=8), spec)


def test_an_unavailable_init_is_refused():
    spec = DclsSpec(interpolation="bilinear", kernel_size=7, kernel_count=1)
    with pytest.raises(ValueError, match="init='nearest': expected 'fit'"):
        DclsConv2d.from_conv(nn.Conv2d(8, 8, 5, padding=2, groups=8), spec, init="nearest")


def edit_in_place(layer):
    with torch.no_grad():
        layer.element_weight.mul_(2)


def edit_data(layer):
    layer.element_weight.data.mul_(2)


def edit_view(layer):
    layer.position.detach()[0, 0].add_(1)


def load(layer):
    layer.load_state_dict(make().state_dict())


def step(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def convert(layer):
    layer.to(torch.float64).to(torch.float32)
    edit_data(layer)


def replace_parameter(layer):
    layer.element_weight = nn.Parameter(layer.element_weight.detach() * 2)


@pytest.mark.parametrize("change", [edit_in_place, edit_data, edit_view, load, step, convert, replace_parameter])
def test_kept_kernel_is_never_stale(change):
    layer = make().eval()
    with torch.no_grad():
        before = layer.weight
        assert layer.weight is before, "in eval mode without gradients the kernel is kept"
        change(layer)
        assert not torch.equal(layer.weight, before)
        assert torch.equal(layer.weight, layer.construct())


def test_kept_kernel_follows_ema_updates(x):
    model = nn.Sequential(make())
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for _ in range(3):
            ema.module(x)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            ema.update(model)
            assert torch.equal(ema.module[0].weight, ema.module[0].construct())


def test_kept_kernel_changes_with_dtype():
    layer = make().eval()
    with torch.no_grad():
        assert layer.weight.dtype == torch.float32
        assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16


def test_gradients_flow_in_eval_mode(x):
    layer = make().eval()
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    assert layer.position.grad.abs().sum() > 0


def test_frozen_layers_keep_their_kernel_with_gradients_enabled():
    layer = make().eval().requires_grad_(False)
    assert layer.weight is layer.weight


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_compiled_layer_equals_eager(interpolation, x):
    layer = make(interpolation)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    torch.testing.assert_close(out, layer(x), atol=1e-5, rtol=1e-4)
    out.sum().backward()
    gradient = layer.position.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(gradient, layer.position.grad, atol=1e-4, rtol=1e-4)


def test_exported_layer_equals_eager(x):
    layer = make().eval()
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_traced_graph_equals_eager_and_keeps_parameters(interpolation, x):
    layer = make(interpolation).eval()
    graph = torch.fx.symbolic_trace(layer)
    edit_in_place(layer)
    torch.testing.assert_close(graph(x), layer(x), atol=1e-5, rtol=1e-4)


def test_construction_is_float32_under_autocast(x):
    layer = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.construct().dtype == torch.float32
        torch.testing.assert_close(layer.construct(), make_copy(layer).construct())
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), atol=0.05, rtol=0.05)


def make_copy(layer):
    with torch.autocast("cpu", enabled=False):
        return copy.deepcopy(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_constructs_in_float32(dtype):
    layer = make().to(dtype)
    expected = copy.deepcopy(layer).float().construct().to(dtype)
    assert torch.equal(layer.construct(), expected)


def test_gradcheck_of_a_float64_layer():
    layer = make(kernel_size=3, padding=1, kernel_count=2).double()
    x = torch.randn(1, 8, 4, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_channels_last_input_gives_the_same_output(x):
    layer = make()
    last = layer(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, layer(x), atol=1e-5, rtol=1e-4)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_deepcopy_and_pickle_keep_the_output_and_drop_the_kept_kernel(x):
    layer = make().eval()
    with torch.no_grad():
        expected = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            edit_in_place(other)
            edit = other(x)
            assert not torch.equal(edit, expected)
            other.element_weight.div_(2)
            torch.testing.assert_close(other(x), expected)


def test_meta_layer_is_materialised_by_reset_parameters():
    layer = make(device="meta")
    assert layer.weight.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.weight.isfinite().all()


def test_state_dict_round_trip(x):
    layer, other = make(), make()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_compile_true_compiles_construction():
    layer = make(compile=True)
    torch.testing.assert_close(layer.construct(), make_eager(layer).construct(), atol=1e-6, rtol=1e-5)


def make_eager(layer):
    other = copy.deepcopy(layer)
    other.compile_mode = False
    return other


def test_without_a_compiler_construction_warns_once_and_stays_eager(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compilation, "_compiler_works", True)
    monkeypatch.setattr(
        compilation,
        "_compiled",
        lambda function, static: torch.compile(lambda **k: function(**dict(static), **k), backend=broken),
    )
    layer = make(compile=True)
    with pytest.warns(RuntimeWarning, match="stays eager"):
        first = layer.construct()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer.construct(), first)
    assert torch.equal(first, make_eager(layer).construct())


def test_unpatched_lone_layer_can_be_used_in_a_sequential(x):
    model = nn.Sequential(make(), nn.ReLU(), make())
    torch.testing.assert_close(tcc.merge(model)(x), model(x), atol=1e-5, rtol=1e-4)


def make_all() -> list[nn.Module]:
    options = {"padding": 4, "groups": 8}
    kinds = [
        DclsConv2d(8, 8, 9, kernel_count=5, **options), SmpConv2d(8, 8, 9, **options), FlexConv2d(8, 8, 9, **options)
    ]  # fmt: skip
    return [layer.eval() for layer in kinds]


def test_gradients_of_images_after_inference_mode(x):
    for layer in make_all():
        layer.requires_grad_(False)
        with torch.inference_mode():
            expected = layer(x)
        images = x.clone().requires_grad_()
        y = layer(images)
        torch.testing.assert_close(y, expected.clone())
        assert torch.autograd.grad(y.sum(), images)[0].any()


def test_an_edit_of_a_kept_kernel_does_not_stay(x):
    for layer in make_all():
        with torch.no_grad():
            before = layer(x)
            layer.weight.zero_()
            assert torch.equal(layer(x), before)


def test_layers_in_eval_mode_under_function_transforms(x):
    """As torch.func's example of an ensemble, on fake tensors, and recorded; each twice, as kernels are kept."""
    for one, two in zip(make_all(), make_all(), strict=True):
        states = torch.func.stack_module_state([one, two])
        with torch.no_grad():
            expected = torch.stack([one(x), two(x)])
            for _ in range(2):
                y = torch.func.vmap(lambda p, b, layer=one: torch.func.functional_call(layer, (p, b), (x,)))(*states)
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    assert one(mode.from_tensor(x)).shape == x.shape
                recorded = make_fx(one, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
                torch.testing.assert_close(recorded(x), one(x))


def test_a_constructed_kernel_cannot_be_set():
    with pytest.raises(AttributeError, match="weight: it is constructed and can't be set; to_conv"):
        nn.utils.fuse_conv_bn_eval(make().eval(), nn.BatchNorm2d(8).eval())


@pytest.mark.parametrize(
    "layer",
    [
        DclsConv1d(4, 4, 7, padding=3, groups=4, kernel_count=5),
        DclsConv2d(4, 4, 7, padding=3, groups=4, kernel_count=5),
        DclsConv3d(4, 4, 3, padding=1, groups=4, kernel_count=5),
        DclsConv2d(4, 6, 7, padding=3, padding_mode="reflect", kernel_count=5),
        DclsConv2d(4, 4, 6, 2, "same", groups=4, kernel_count=3),
        SmpConv2d(4, 4, 7, padding=3, groups=4),
        FlexConv1d(4, 4, 9, groups=4),
        FlexConv2d(4, 4, 7, padding=3, groups=4),
        GaussianEnvelopeConv2d(4, 4, 3, padding=1, groups=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_one_image_without_a_batch_dimension_and_traced(layer, training):
    x = torch.randn(2, 4, *[12] * (layer.weight.ndim - 2))
    layer.train(training)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))


def test_data_parallel_is_refused_with_the_way_out():
    with pytest.raises(
        NotImplementedError, match="DclsConv2d: nn.DataParallel does not .* DistributedDataParallel, or"
    ):
        make()._replicate_for_data_parallel()
