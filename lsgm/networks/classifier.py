"""Classifiers of images: of noisy ones, to guide a sampler, or of clean ones, to judge images.

>>> from lsgm.networks.classifier import Classifier
>>> classifier = Classifier(channels=1, resolution=8, num_classes=10, noise_conditional=True)
>>> tuple(classifier(torch.zeros(2, 1, 8, 8), t=torch.tensor([0.1, 0.9])).shape)
(2, 10)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsgm.networks.embeddings import TimeEmbedding
from lsgm.networks.layers import (
    GroupNormSiLU,
    ResidualBlock,
    Resolution,
    check_halvings,
    conv,
    linear,
    require_scales,
)
from lsgm.networks.resample import make_resampler

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """Residual network to class logits, given the time of the noise or not.

    ``log p(y | x_t)`` guides a sampler (arXiv 2011.13456 section 5 and appendix I.1; arXiv
    2105.05233): the hook takes its gradient with respect to ``x_t``.

    Args:
        channels: ``C`` of the images.
        resolution: side ``S``, or height and width; multiples of ``2^(num_scales - 1)``.
        num_classes: ``K``.
        num_channels: width of the first level, doubled at each halving.
        num_scales: number of resolutions.
        num_cells_per_scale: residual blocks a level.
        dropout: probability in every residual block and before the last layer.
        noise_conditional: whether ``t`` is given.
        embedding_dim: size of the time features.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        channels: int,
        resolution: Resolution,
        num_classes: int,
        *,
        num_channels: int = 32,
        num_scales: int = 3,
        num_cells_per_scale: int = 1,
        dropout: float = 0.0,
        noise_conditional: bool = False,
        embedding_dim: int = 32,
    ) -> None:
        super().__init__()
        check_halvings(resolution, require_scales(num_scales) - 1, ", once a scale")
        if num_classes < 2:
            raise ValueError(f"a classifier needs at least 2 classes, got {num_classes}")
        self.num_classes, self.noise_conditional = num_classes, noise_conditional
        self.embedding = (
            TimeEmbedding(embedding_dim, "positional", 1000.0) if noise_conditional else None
        )
        time_width = 0 if self.embedding is None else self.embedding.width
        self.conv_in = conv(channels, num_channels)
        blocks = []
        width = num_channels
        for scale in range(num_scales):
            if scale:
                halve = make_resampler("down", fir=False)
                blocks.append(ResidualBlock(width, 2 * width, time_width, dropout, halve))
                width *= 2
            for _ in range(num_cells_per_scale):
                blocks.append(ResidualBlock(width, width, time_width, dropout))
        self.blocks = nn.ModuleList(blocks)
        self.norm = GroupNormSiLU(width)
        self.dropout = nn.Dropout(dropout)
        self.head = linear(width, num_classes)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits ``(B, K)``, float32 or wider, for ``x (B, C, S, S)``.

        Args:
            x: Images, as the diffusion sees them.
            t: ``(B,)`` or a scalar for a noise-conditional classifier, else None.

        Raises:
            ValueError: ``t`` is missing, or given to a classifier of clean images.
        """
        if (t is None) == self.noise_conditional:
            raise ValueError(
                "a noise-conditional classifier needs the time t of its images"
                if t is None
                else "this classifier is of clean images: it takes no time"
            )
        time = None if self.embedding is None or t is None else self.embedding(t)
        h = self.conv_in(x)
        for block in self.blocks:
            h = block(h, time)
        h = self.norm(h).mean((2, 3))
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.dropout(h.to(self.head.weight.dtype)))

    def log_prob(self, labels: Tensor, x: Tensor, t: Tensor | None = None) -> Tensor:
        """``log p(labels | x, t)`` in nats, ``(B,)``; ``labels (B,)`` int64."""
        return -F.cross_entropy(self(x, t), labels, reduction="none")
