"""The authors' released checkpoints load, and give the output of a plain reference on their DCLS package."""

import itertools

import pytest
import timm
import torch
from DCLS.construct.modules import Dcls2d
from torch import nn
from torch.nn import functional as F


class ChannelsFirstNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ReferenceBlock(nn.Module):
    """A ConvNeXt block with the keys of the original release, on the authors' DCLS package."""

    def __init__(self, dim: int, count: int):
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
    """ConvNeXt-DCLS with the module names of the release."""

    def __init__(self, depths, dims, count):
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
        for stage in self.stages:  # positions: (2, C, 1, m), row first, one tensor for a stage
            for block in stage:
                block.dwconv.P = stage[0].dwconv.P

    def forward(self, x):
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean((-2, -1))))


RELEASED = {
    "convnext_tiny_dcls": ((3, 3, 9, 3), (96, 192, 384, 768), 34),
    "convnext_small_dcls": ((3, 3, 27, 3), (96, 192, 384, 768), 40),
    "convnext_base_dcls": ((3, 3, 27, 3), (128, 256, 512, 1024), 40),
}


def reference(name: str) -> Reference:
    model = Reference(*RELEASED[name])
    with torch.no_grad():
        for stage in model.stages:
            stage[0].dwconv.P.normal_(0, 3).clamp_(-8, 8)
    return model.eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(3)
    model = reference("convnext_tiny_dcls")
    path = tmp_path_factory.mktemp("release") / "convnext_dcls_tiny_1k_224_ema.pth"
    torch.save({"model": model.state_dict()}, path)
    return model, path


def create(path, name="convnext_tiny_dcls", **options):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **options)


def test_released_tiny_gives_the_output_of_the_reference(tiny):
    expected, path = tiny
    model = create(path).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["convnext_small_dcls", "convnext_base_dcls"])
def test_released_small_and_base_fit(name, tmp_path):
    expected = reference(name)
    torch.save({"model": expected.state_dict()}, tmp_path / "release.pth")
    model = create(tmp_path / "release.pth", name).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x), atol=1e-4, rtol=1e-4)


def test_the_release_adapts_to_other_classes_and_channels(tiny):
    expected, path = tiny
    model = create(path, num_classes=5, in_chans=1)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    kernel = expected.stages[0][0].dwconv
    torch.testing.assert_close(model.stages[0].blocks[0].conv_dw.element_weight, kernel.weight)


def test_the_release_loads_into_a_feature_extractor(tiny):
    expected, path = tiny
    model = create(path, features_only=True, out_indices=(0,)).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(x)[0], expected.stages[0](expected.downsample_layers[0](x)), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_default_weights_are_the_released_urls(size):
    config = timm.get_pretrained_cfg(f"convnext_{size}_dcls.zenodo_in1k")
    assert config.url == f"https://zenodo.org/record/7112021/files/convnext_dcls_{size}_1k_224_ema.pth"
    assert timm.get_pretrained_cfg(f"convnext_{size}_dcls").url == config.url
    assert f"convnext_{size}_dcls.zenodo_in1k" in timm.list_pretrained()


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}])
def test_missing_and_unexpected_keys_are_named(tiny, tmp_path, options):
    released = dict(torch.load(tiny[1], weights_only=True)["model"])
    del released["stages.1.0.norm.weight"]
    released["stages.1.0.extra"] = torch.zeros(1)
    torch.save({"model": released}, tmp_path / "wrong.pth")
    with pytest.raises(
        ValueError, match="1 missing keys: stages.1.blocks.0.norm.weight; 1 unexpected keys: stages.1.blocks.0.extra"
    ):
        create(tmp_path / "wrong.pth", **options)


def test_blocks_that_disagree_on_positions_are_refused(tiny, tmp_path):
    released = {key: value.clone() for key, value in torch.load(tiny[1], weights_only=True)["model"].items()}
    released["stages.2.4.dwconv.P"] += 1
    torch.save({"model": released}, tmp_path / "wrong.pth")
    with pytest.raises(
        ValueError, match=r"stages.2.4.dwconv.P: differs from the positions of another block of stage 2"
    ):
        create(tmp_path / "wrong.pth")


def test_a_checkpoint_of_the_plain_model_is_refused(tmp_path):
    torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="missing keys: .*element_weight"):
        create(tmp_path / "plain.pth", "test_convnext_dcls")
