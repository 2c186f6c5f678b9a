"""Attention across the positions of a feature map and across the patches of a batch.

Needed by CAML (Gao et al., MICCAI 2023): what one patch shows is read in the light of the others.
"""

from __future__ import annotations

from torch import Tensor, nn


class CrossSampleAttention(nn.Module):
    """Cross-sample Mutual Attention: tokens look at their own patch, then at the other patches.

    Both steps are one Transformer encoder layer (Vaswani et al., 2017; arXiv 1706.03762) without
    positional encoding. Only training has a batch to look at: in evaluation the map is given back as
    it is.
    """

    def __init__(self, channels: int, heads: int = 4, dropout: float = 0.5) -> None:
        super().__init__()
        self.within, self.across = (
            nn.TransformerEncoderLayer(channels, heads, 4 * channels, dropout, batch_first=True)
            for _ in range(2)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, x, y, z) -> the same shape."""
        if not self.training:
            return features
        tokens = features.flatten(2).transpose(1, 2)  # (B, N, F)
        tokens = self.within(tokens)
        tokens = self.across(tokens.transpose(0, 1))  # (N, B, F)
        return tokens.permute(1, 2, 0).reshape(features.shape)
