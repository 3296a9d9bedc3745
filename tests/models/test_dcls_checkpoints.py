"""The released ConvNeXt-DCLS checkpoints load, and give the output of a plain reference on the authors' package."""

import itertools

import pytest
import timm
import torch
from DCLS.construct.modules import Dcls2d
from torch import nn
from torch.nn import functional as F

from timm_contconv.models.patched import checkpoint_filter_fn

from ..helpers import relative
from ..models_for_tests import on_meta, output


class ChannelsFirstNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ReferenceBlock(nn.Module):
    """A ConvNeXt block with the keys of the original release."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.dwconv = Dcls2d(dim, dim, count, padding=8, dilated_kernel_size=17, groups=dim, version="v0")
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class Reference(nn.Module):
    """ConvNeXt-DCLS with the module names of the release; a stage has one tensor of positions, (2, C, 1, m)."""

    def __init__(self, depths, dims, count) -> None:
        super().__init__()
        downsample = [nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), ChannelsFirstNorm(dims[0], eps=1e-6))]
        downsample += [
            nn.Sequential(ChannelsFirstNorm(a, eps=1e-6), nn.Conv2d(a, b, 2, 2)) for a, b in itertools.pairwise(dims)
        ]
        self.downsample_layers = nn.ModuleList(downsample)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ReferenceBlock(dim, count) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], 1000)
        for stage in self.stages:
            stage[0].dwconv.P.data.normal_(0, 3).clamp_(-8, 8)
            for block in stage:
                block.dwconv.P = stage[0].dwconv.P

    def forward(self, x):
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean((-2, -1))))


RELEASED = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768), 34),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768), 40),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024), 40),
}
DEPTHS, DIMS = (1, 1, 2, 1), (8, 16, 24, 32)  # of a release that is quick to load


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A reference, and its file as released."""
    torch.manual_seed(3)
    model = Reference(DEPTHS, DIMS, 34).eval()
    path = tmp_path_factory.mktemp("release") / "convnext_dcls_tiny_1k_224_ema.pth"
    torch.save({"model": model.state_dict()}, path)
    return model, path


def create(path, **options):
    options = {"depths": DEPTHS, "dims": DIMS, "patch_args": {"kernel_count": 34}, **options}
    return timm.create_model(
        "convnext_tiny_dcls", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **options
    ).eval()


def test_a_release_gives_the_output_of_the_reference(small):
    expected, path = small
    x = torch.randn(1, 3, 64, 64)
    assert relative(output(create(path), x), output(expected, x)) < 1e-5
    feature = create(path, features_only=True, out_indices=(0,))(x)[0]
    torch.testing.assert_close(feature, expected.stages[0](expected.downsample_layers[0](x)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", RELEASED)
def test_keys_and_shapes_of_the_releases_are_those_of_the_models(size):
    with torch.device("meta"):
        released = Reference(*RELEASED[size]).state_dict()
    model = on_meta(f"convnext_{size}_dcls")
    positions = {key: torch.zeros(value.shape) for key, value in released.items() if key.endswith("dwconv.P")}
    found = checkpoint_filter_fn({**released, **positions}, model)
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_the_release_adapts_to_other_classes_and_channels(small):
    expected, path = small
    model = create(path, num_classes=5, in_chans=1)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    layer = model.stages[0].blocks[0].conv_dw
    torch.testing.assert_close(layer.kernel.weight, expected.stages[0][0].dwconv.weight)


@pytest.mark.parametrize("size", RELEASED)
def test_the_default_weights_are_the_released_urls(size):
    config = timm.get_pretrained_cfg(f"convnext_{size}_dcls.zenodo_in1k")
    assert config.url == f"https://zenodo.org/record/7112021/files/convnext_dcls_{size}_1k_224_ema.pth"
    assert timm.get_pretrained_cfg(f"convnext_{size}_dcls").url == config.url
    assert f"convnext_{size}_dcls.zenodo_in1k" in timm.list_pretrained()


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}])
def test_missing_and_unexpected_keys_are_named(small, tmp_path, options):
    released = dict(small[0].state_dict())
    del released["stages.1.0.norm.weight"]
    released["stages.1.0.extra"] = torch.zeros(1)
    torch.save({"model": released}, tmp_path / "wrong.pth")
    with pytest.raises(
        ValueError, match="1 missing keys: stages.1.blocks.0.norm.weight; 1 unexpected keys: stages.1.blocks.0.extra"
    ):
        create(tmp_path / "wrong.pth", **options)


def test_blocks_that_disagree_on_positions_are_refused(small, tmp_path):
    released = {key: value.clone() for key, value in small[0].state_dict().items()}
    released["stages.2.1.dwconv.P"] += 1
    torch.save({"model": released}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"stages.2.1.dwconv.P: differs from the positions of another block of stage"):
        create(tmp_path / "wrong.pth")


def test_a_checkpoint_of_the_plain_model_is_refused(tmp_path):
    torch.save(timm.create_model("convnext_tiny", depths=DEPTHS, dims=DIMS).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="missing keys: .*conv_dw.kernel.weight"):
        create(tmp_path / "plain.pth")
