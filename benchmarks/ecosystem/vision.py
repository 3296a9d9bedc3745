"""Rows of libraries that build on a vision model: segmentation, detection, explanation."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from .rows import SIZE, classifier, images, train, woken

__all__ = ["ROWS"]


def unet(name: str) -> None:
    """Unet"""
    import segmentation_models_pytorch as smp

    model = woken(smp.Unet(f"tu-{name}", encoder_weights=None, encoder_depth=4, decoder_channels=(32, 16, 8, 8)))
    train(model, lambda: model(images()).square().mean())


def deeplab(name: str) -> None:
    """DeepLabV3Plus, output stride 16"""
    import segmentation_models_pytorch as smp

    model = woken(smp.DeepLabV3Plus(f"tu-{name}", encoder_weights=None, encoder_output_stride=16))
    train(model, lambda: model(images(4)).square().mean())


def faster_rcnn(name: str) -> None:
    """Faster R-CNN on the last feature map"""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = timm.create_model(name, features_only=True)
            self.out_channels = self.body.feature_info.channels()[-1]

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)[-1]

    model = FasterRCNN(
        woken(Backbone()), 2, min_size=SIZE, max_size=2 * SIZE,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)), box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
    )  # fmt: skip
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    train(model, lambda: sum(model(list(images()), [target, target]).values()))


def captum_gradients(name: str) -> None:
    """IntegratedGradients"""
    from captum.attr import IntegratedGradients

    model = classifier(name).eval()
    x = images(1)
    attribution = IntegratedGradients(model).attribute(x, target=3, n_steps=64)
    with torch.no_grad():  # completeness: attributions sum to the difference from the baseline
        change = (model(x) - model(torch.zeros_like(x)))[0, 3]
    assert abs(float(attribution.sum() - change)) < 0.05 * float(attribution.abs().sum())


def grad_cam(name: str) -> None:
    """GradCAM at the last stage"""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = classifier(name).eval()
    target = model.stages[-1] if hasattr(model, "stages") else model.layer4
    heat = GradCAM(model, [target])(input_tensor=images(1), targets=[ClassifierOutputTarget(3)])
    assert heat.shape == (1, SIZE, SIZE)


def torchcam_map(name: str) -> None:
    """SmoothGradCAMpp at the last stage"""
    from torchcam.methods import SmoothGradCAMpp

    model = classifier(name).eval()
    target = model.stages[-1] if hasattr(model, "stages") else model.layer4
    with SmoothGradCAMpp(model, target_layer=target, num_samples=2) as extract:
        (heat,) = extract(3, model(images(1)))
    assert heat.isfinite().all()
    assert heat.shape[0] == 1


ROWS = (
    ("segmentation-models-pytorch", unet),
    ("segmentation-models-pytorch", deeplab),
    ("torchvision", faster_rcnn),
    ("captum", captum_gradients),
    ("grad-cam", grad_cam),
    ("torchcam", torchcam_map),
)
