"""The original PSMNet as plain functions of a state dict in the original's key names.

Written from its structure, without a module of this project, so that the two can be compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def _norm(s: State, key: str, x: Tensor) -> Tensor:
    return F.batch_norm(x, s[f"{key}.running_mean"], s[f"{key}.running_var"], s[f"{key}.weight"], s[f"{key}.bias"])


def _convbn(s: State, key: str, x: Tensor, stride: int = 1, padding: int = 1, dilation: int = 1) -> Tensor:
    return _norm(s, f"{key}.1", F.conv2d(x, s[f"{key}.0.weight"], None, stride, padding, dilation))


def _convbn3d(s: State, key: str, x: Tensor, stride: int = 1) -> Tensor:
    return _norm(s, f"{key}.1", F.conv3d(x, s[f"{key}.0.weight"], None, stride, 1))


def _deconvbn3d(s: State, key: str, x: Tensor) -> Tensor:
    x = F.conv_transpose3d(x, s[f"{key}.0.weight"], None, stride=2, padding=1, output_padding=1)
    return _norm(s, f"{key}.1", x)


def _block(s: State, key: str, x: Tensor, stride: int, dilation: int) -> Tensor:
    out = F.relu(_convbn(s, f"{key}.conv1.0", x, stride, dilation, dilation))
    out = _convbn(s, f"{key}.conv2", out, 1, dilation, dilation)
    if f"{key}.downsample.0.weight" in s:
        x = _convbn(s, f"{key}.downsample", x, stride, 0)
    return out + x


def features(s: State, x: Tensor, align_corners: bool) -> Tensor:
    f = "feature_extraction"
    for index, stride in ((0, 2), (2, 1), (4, 1)):
        x = F.relu(_convbn(s, f"{f}.firstconv.{index}", x, stride))
    for layer, blocks, stride, dilation in ((1, 3, 1, 1), (2, 16, 2, 1), (3, 3, 1, 1), (4, 3, 1, 2)):
        for index in range(blocks):
            x = _block(s, f"{f}.layer{layer}.{index}", x, stride if index == 0 else 1, dilation)
        if layer == 2:
            raw = x
    branches = []
    for number, size in ((1, 64), (2, 32), (3, 16), (4, 8)):
        branch = F.relu(_convbn(s, f"{f}.branch{number}.1", F.avg_pool2d(x, size), padding=0))
        branches.append(F.interpolate(branch, x.shape[-2:], mode="bilinear", align_corners=align_corners))
    x = torch.cat([raw, x, branches[3], branches[2], branches[1], branches[0]], 1)
    return F.conv2d(F.relu(_convbn(s, f"{f}.lastconv.0", x)), s[f"{f}.lastconv.2.weight"])


def _hourglass(s: State, key: str, x: Tensor, pre_before: Tensor | None, post_before: Tensor | None):
    out = F.relu(_convbn3d(s, f"{key}.conv1.0", x, 2))
    pre = _convbn3d(s, f"{key}.conv2", out)
    pre = F.relu(pre + post_before) if post_before is not None else F.relu(pre)
    out = F.relu(_convbn3d(s, f"{key}.conv3.0", pre, 2))
    out = F.relu(_convbn3d(s, f"{key}.conv4.0", out))
    post = F.relu(_deconvbn3d(s, f"{key}.conv5", out) + (pre_before if pre_before is not None else pre))
    return _deconvbn3d(s, f"{key}.conv6", post), pre, post


def _pair3d(s: State, key: str, x: Tensor) -> Tensor:
    return _convbn3d(s, f"{key}.2", F.relu(_convbn3d(s, f"{key}.0", x)))


def _scores(s: State, key: str, x: Tensor) -> Tensor:
    return F.conv3d(F.relu(_convbn3d(s, f"{key}.0", x)), s[f"{key}.2.weight"], padding=1)


def forward(s: State, left: Tensor, right: Tensor, align_corners: bool, max_disparity: int = 192) -> Tensor:
    """Disparity [B, H, W] of normalised pictures whose sizes fit the network, in eval mode."""
    left_features, right_features = (features(s, view, align_corners) for view in (left, right))
    batch, channels, height, width = left_features.shape
    cost = left.new_zeros(batch, 2 * channels, max_disparity // 4, height, width)
    for i in range(max_disparity // 4):
        cost[:, :channels, i, :, i:] = left_features[:, :, :, i:]
        cost[:, channels:, i, :, i:] = right_features[:, :, :, : width - i]
    cost0 = F.relu(_convbn3d(s, "dres0.2", F.relu(_convbn3d(s, "dres0.0", cost))))
    if "classif1.2.weight" in s:
        cost0 = _pair3d(s, "dres1", cost0) + cost0
        out1, pre1, post1 = _hourglass(s, "dres2", cost0, None, None)
        out1 = out1 + cost0
        out2, _, post2 = _hourglass(s, "dres3", out1, pre1, post1)
        out2 = out2 + cost0
        out3, _, _ = _hourglass(s, "dres4", out2, pre1, post2)
        out3 = out3 + cost0
        scores = _scores(s, "classif1", out1) + _scores(s, "classif2", out2) + _scores(s, "classif3", out3)
    else:
        for name in ("dres1", "dres2", "dres3", "dres4"):
            cost0 = _pair3d(s, name, cost0) + cost0
        scores = _scores(s, "classify", cost0)
    size = (max_disparity, left.shape[2], left.shape[3])
    scores = F.interpolate(scores, size, mode="trilinear", align_corners=align_corners).squeeze(1)
    values = torch.arange(max_disparity, dtype=scores.dtype).view(1, -1, 1, 1)
    return (torch.softmax(scores, 1) * values).sum(1)


def random_state(stacked: bool, channels: int = 32) -> State:
    """A state dict with every key of the original, small random weights and plausible batch norm statistics."""
    s: State = {}
    generator = torch.Generator().manual_seed(7)

    def add_conv(key: str, *shape: int) -> None:
        fan = shape[0] * torch.tensor(shape[2:]).prod().item()
        s[f"{key}.weight"] = torch.randn(*shape, generator=generator) * (2.0 / fan) ** 0.5

    def add_norm(key: str, channels: int) -> None:
        s[f"{key}.weight"] = 0.2 + 0.4 * torch.rand(channels, generator=generator)
        s[f"{key}.bias"] = 0.1 * torch.randn(channels, generator=generator)
        s[f"{key}.running_mean"] = 0.1 * torch.randn(channels, generator=generator)
        s[f"{key}.running_var"] = 0.5 + torch.rand(channels, generator=generator)
        s[f"{key}.num_batches_tracked"] = torch.tensor(3)

    def convbn(key: str, inputs: int, outputs: int, size: int = 3) -> None:
        add_conv(f"{key}.0", outputs, inputs, size, size)
        add_norm(f"{key}.1", outputs)

    def convbn3d(key: str, inputs: int, outputs: int, transposed: bool = False) -> None:
        add_conv(f"{key}.0", *((inputs, outputs) if transposed else (outputs, inputs)), 3, 3, 3)
        add_norm(f"{key}.1", outputs)

    c, f = channels, "feature_extraction"
    for index, inputs in ((0, 3), (2, c), (4, c)):
        convbn(f"{f}.firstconv.{index}", inputs, c)
    inputs = c
    for layer, outputs, blocks in ((1, c, 3), (2, 2 * c, 16), (3, 4 * c, 3), (4, 4 * c, 3)):
        for index in range(blocks):
            if index == 0 and outputs != inputs:
                convbn(f"{f}.layer{layer}.0.downsample", inputs, outputs, 1)
            convbn(f"{f}.layer{layer}.{index}.conv1.0", inputs, outputs)
            convbn(f"{f}.layer{layer}.{index}.conv2", outputs, outputs)
            inputs = outputs
    for number in (1, 2, 3, 4):
        convbn(f"{f}.branch{number}.1", 4 * c, c, 1)
    convbn(f"{f}.lastconv.0", 10 * c, 4 * c)
    add_conv(f"{f}.lastconv.2", c, 4 * c, 1, 1)
    convbn3d("dres0.0", 2 * c, c)
    convbn3d("dres0.2", c, c)
    for name in ("dres1",) if stacked else ("dres1", "dres2", "dres3", "dres4"):
        convbn3d(f"{name}.0", c, c)
        convbn3d(f"{name}.2", c, c)
    if stacked:
        for name in ("dres2", "dres3", "dres4"):
            convbn3d(f"{name}.conv1.0", c, 2 * c)
            convbn3d(f"{name}.conv2", 2 * c, 2 * c)
            convbn3d(f"{name}.conv3.0", 2 * c, 2 * c)
            convbn3d(f"{name}.conv4.0", 2 * c, 2 * c)
            convbn3d(f"{name}.conv5", 2 * c, 2 * c, transposed=True)
            convbn3d(f"{name}.conv6", 2 * c, c, transposed=True)
    for name in ("classif1", "classif2", "classif3") if stacked else ("classify",):
        convbn3d(f"{name}.0", c, c)
        add_conv(f"{name}.2", 1, c, 3, 3, 3)
    return s
