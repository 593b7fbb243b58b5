"""A small vision transformer (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929), with the key names of timm.

Shapes do not tell the number of heads: `infer` assumes 64 channels per head, as in timm's tiny, small and base models,
and one head below that. Anything else must be given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError


class PatchEmbed(nn.Module):
    """Cut the image into squares and map each to a token."""

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens ``(batch, patches, dim)``."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens ``(batch, tokens, dim)``."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens ``(batch, tokens, dim)``."""
        return self.fc2(self.act(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Attention and MLP, each behind a layer norm and added to the stream."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens ``(batch, tokens, dim)``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches and a class token through ``depth`` blocks; the class token answers."""

    def __init__(self, classes: int, in_channels: int, tokens: int, patch: int, *, dim: int, depth: int, heads: int,
                 hidden: int) -> None:  # fmt: skip
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.patch_embed = PatchEmbed(in_channels, dim, patch)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, size, size)``."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0])


def vit(
    *,
    dim: int = 192,
    depth: int = 6,
    heads: int = 3,
    hidden: int = 768,
    patch: int = 4,
    classes: int = 10,
    in_channels: int = 3,
    input_size: int = 32,
) -> nn.Module:
    """Build a vision transformer with ``dim`` channels per token and ``hidden`` units in each MLP."""
    if dim % heads:
        raise ModelError(f"heads must divide dim ({dim}), got {heads}")
    if input_size % patch:
        raise ModelError(f"patch must divide input_size ({input_size}), got {patch}")
    if depth > 100:
        raise ModelError(f"depth must lie in [1, 100], got {depth}")
    tokens = 1 + (input_size // patch) ** 2
    return ViT(classes, in_channels, tokens, patch, dim=dim, depth=depth, heads=heads, hidden=hidden)


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a network of these ``shapes``, or None when it is of another family."""
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight"} <= shapes.keys():
        return None
    dim, in_channels, patch, _ = shapes["patch_embed.proj.weight"]
    return {
        "dim": dim,
        "depth": sum(key.endswith(".attn.qkv.weight") for key in shapes),
        "heads": max(1, dim // 64),
        "hidden": shapes["blocks.0.mlp.fc1.weight"][0],
        "patch": patch,
        "classes": shapes["head.weight"][0],
        "in_channels": in_channels,
        "input_size": patch * math.isqrt(shapes["pos_embed"][1] - 1),
    }
