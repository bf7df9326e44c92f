"""Vision Transformer.

Alexey Dosovitskiy, Lucas Beyer, Alexander Kolesnikov, Dirk Weissenborn, Xiaohua Zhai, Thomas Unterthiner, Mostafa Dehghani,
Matthias Minderer, Georg Heigold, Sylvain Gelly, Jakob Uszkoreit, Neil Houlsby (2021): An Image is Worth 16x16 Words:
Transformers for Image Recognition at Scale. ICLR. https://arxiv.org/abs/2010.11929
Tiny and small are the widths 192 and 384 of Touvron et al. (2021), Training data-efficient image transformers & distillation
through attention. https://arxiv.org/abs/2012.12877

An image is cut into patches, and one linear layer turns each into a token. The rest is a text transformer's encoder: a class
token comes first, learned positions are added, blocks of attention and MLP follow, and the final class token is classified.

Where copies differ:
- Norms precede attention and MLP ("pre-norm"), so the last block's output needs one more before the head (equations 2-4).
- LayerNorm's epsilon is 1e-6 as in the authors' code (flax's default), not PyTorch's 1e-5; GELU is exact, without the tanh
  approximation.
- Queries, keys and values have biases: vit_tiny with patches of 4 on 32x32 and ten classes has 5.36 M parameters.
- Dropout follows the position embedding and every dense layer but the one of queries, keys and values (appendix B.1); the
  attention weights have none.
- Initial weights are timm's: std 0.02 for dense layers and the position embedding, 1e-6 for the class token, PyTorch's default
  for the patch embedding. (The authors use Glorot's initialization for dense layers and zeros for the head.)
- `drop_path` skips attention or MLP for some of the images in training: at that rate in the last block, at lower rates in earlier
  ones, never in the first (Touvron et al. 2021, after Huang et al. 2016, https://arxiv.org/abs/1603.09382).
- The head is one linear layer, as in the published weights; the paper's hidden tanh layer was for pre-training only.

The position embedding fixes the image size of a network; `pretrained` resizes it. Module names are timm's.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth


class PatchEmbedding(nn.Module):
    """A linear layer over each patch, written as a convolution."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # B D H W -> B N D


class Attention(nn.Module):
    """Self-attention over all tokens, with `n_heads` heads."""

    def __init__(self, width: int, n_heads: int, pdrop: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(pdrop)

    def forward(self, x: Tensor) -> Tensor:
        # B N 3D -> three tensors of B heads N D/heads
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(queries, keys, values)
        x = x.transpose(1, 2).flatten(2)  # B heads N D/heads -> B N D
        return self.dropout(self.proj(x))


class MLP(nn.Module):
    """Two linear layers for each token, to four times the width and back."""

    def __init__(self, width: int, pdrop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(pdrop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.act(self.fc1(x)))
        return self.dropout(self.fc2(x))


class Block(nn.Module):
    def __init__(self, width: int, n_heads: int, pdrop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, n_heads, pdrop)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, pdrop)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    HEAD = ("head",)
    CLASSIFIERS = ("head",)
    FIRST_CONV = "patch_embed.proj"
    TIMM_NAMES = {f"vit_{size}": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        n_heads: int,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        patch_size: int = 16,
        pdrop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} can't be cut into patches of {patch_size}; give a patch_size that divides it")
        self.img_size = img_size
        self.side = img_size // patch_size  # in patches
        self.patch_embed = PatchEmbedding(in_channels, width, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.side**2, width))
        self.dropout = nn.Dropout(pdrop)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(*(Block(width, n_heads, pdrop, rate) for rate in rates))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.num_features = width
        self.head = nn.Linear(width, n_classes)
        self.feature_info = [{"num_chs": width, "reduction": patch_size, "module": "norm"}]

        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return a single map: the final states of the patches, arranged as in the image."""
        patches = self.forward_features(x)[:, 1:]
        return [patches.transpose(1, 2).unflatten(2, (self.side, self.side))]  # B N D -> B D H W

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the tokens, B N D, the class token first."""
        if x.shape[-2:] != (self.img_size, self.img_size):
            own = f"images of {self.img_size}x{self.img_size}, as its position embedding does"
            raise ValueError(f"this model reads {own}; got {x.shape[-2]}x{x.shape[-1]}")
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.dropout(x + self.pos_embed)
        return self.norm(self.blocks(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def convert_pretrained(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Interpolate the grid of learned positions for another image size (section 3.2), except the class token's."""
        positions = weights.get("pos_embed")
        if positions is None or positions.shape == self.pos_embed.shape:
            return weights
        of_class, of_patches = positions[:, :1], positions[:, 1:]
        side = math.isqrt(of_patches.shape[1])
        if side**2 != of_patches.shape[1]:
            problem = f"{positions.shape[1]} positions, not those of a class token and a square of patches"
            raise ValueError(f"pos_embed holds {problem}")
        grid = of_patches.transpose(1, 2).unflatten(2, (side, side)).float()  # 1 N D -> 1 D H W
        grid = F.interpolate(grid, size=(self.side, self.side), mode="bicubic", antialias=True)
        patches = grid.flatten(2).transpose(1, 2).to(positions.dtype)  # 1 D H W -> 1 N D
        return {**weights, "pos_embed": torch.cat([of_class, patches], dim=1)}


MODELS = {
    "vit_tiny": partial(VisionTransformer, width=192, depth=12, n_heads=3),
    "vit_small": partial(VisionTransformer, width=384, depth=12, n_heads=6),
    "vit_base": partial(VisionTransformer, width=768, depth=12, n_heads=12),
    "vit_large": partial(VisionTransformer, width=1024, depth=24, n_heads=16),
}
