"""The models of "Function-Space Learning Rates" (arXiv 2502.17405): a residual MLP and a decoder with three norms.

Both grow by two integers: `width` w multiplies the layers' sizes, `depth` m multiplies the number of blocks, and the
residual branches are rescaled by 1/sqrt(m) as in the paper. Blocks are `blocks.0`, `blocks.1`, ...: block b of a model
of depth 1 becomes blocks m*b .. m*b + m - 1, which is the depth map `{"blocks.*": "split"}`.

What the paper leaves open is chosen as follows. Weights are normal with variance 1/fan_in, embeddings with variance 1;
`init_scale` multiplies the deviation of every matrix inside the blocks. Only the layers into and out of the stack have
biases, starting at 0.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwise.errors import LayerwiseError
from layerwise.lab.models.family import Axis, Examples, Family, Settings, keywords_of, register, tokens_only, whole

Norm = Literal["post", "pre", "pre_post_mod"]
NORMS: tuple[Norm, ...] = ("post", "pre", "pre_post_mod")


def _linear(d_in: int, d_out: int, *, deviation: float = 1.0, bias: bool = False) -> nn.Linear:
    """A linear layer with weights of deviation `deviation / sqrt(d_in)`, and a bias of 0."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    nn.init.normal_(layer.weight, std=deviation / math.sqrt(d_in))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualLayer(nn.Module):
    """`x + W relu(x)`."""

    def __init__(self, d: int, deviation: float) -> None:
        super().__init__()
        self.linear = _linear(d, d, deviation=deviation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(functional.relu(x))


class ResMLP(nn.Module):
    """Linear, `base_blocks * depth` residual layers of size `base_width * width`, linear: features to logits.

    The deviation of the residual layers' weights is multiplied by `depth ** -0.5`.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        width: int = 1,
        depth: int = 1,
        base_width: int = 32,
        base_blocks: int = 4,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not init_scale > 0:
            raise LayerwiseError(f"model.init_scale={init_scale}: must be greater than 0")
        d = base_width * width
        self.input = _linear(features, d, bias=True)
        deviation = init_scale / math.sqrt(depth)
        self.blocks = nn.ModuleList(ResidualLayer(d, deviation) for _ in range(base_blocks * depth))
        self.output = _linear(d, classes, bias=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """`[batch, features]` to logits `[batch, classes]`."""
        x = self.input(inputs)
        for block in self.blocks:
            x = block(x)
        return self.output(x)


class Attention(nn.Module):
    """Causal self-attention with normalised queries and keys."""

    def __init__(self, d: int, heads: int, init_scale: float, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.query, self.key, self.value, self.out = (_linear(d, d, deviation=init_scale) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, positions, d = x.shape
        q, k, v = (
            layer(x).view(batch, positions, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        q, k = _normalise(q), _normalise(k)
        if self.kind == "sdpa":
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            future = torch.ones(positions, positions, dtype=torch.bool, device=x.device).triu(1)
            mixed = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, positions, d))


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between them, with a GELU."""

    def __init__(self, d: int, init_scale: float) -> None:
        super().__init__()
        self.up = _linear(d, 4 * d, deviation=init_scale)
        self.down = _linear(4 * d, d, deviation=init_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class DecoderBlock(nn.Module):
    """Attention, then feed-forward, each on a residual branch divided by sqrt(depth multiplier)."""

    def __init__(self, d: int, heads: int, *, norm: Norm, branch_scale: float, init_scale: float, kind: str) -> None:
        super().__init__()
        self.norm, self.branch_scale = norm, branch_scale
        self.attention = Attention(d, heads, init_scale, kind)
        self.mlp = FeedForward(d, init_scale)

    def _residual(self, x: Tensor, branch: nn.Module) -> Tensor:
        if self.norm == "post":
            return _normalise(x + self.branch_scale * branch(x))
        if self.norm == "pre":
            return x + self.branch_scale * branch(_normalise(x))
        return x + self.branch_scale * _normalise(branch(x))

    def forward(self, x: Tensor) -> Tensor:
        return self._residual(self._residual(x, self.attention), self.mlp)


class Decoder(nn.Module):
    """A decoder of `base_blocks * depth` blocks and size `base_width * width`: token ids to log-probabilities.

    With `n` a LayerNorm without gain and bias, f a branch and m the depth multiplier, a branch is added as

        post: n(x + f(x) / sqrt(m))    pre: x + f(n(x)) / sqrt(m)    pre_post_mod: x + n(f(x)) / sqrt(m)

    Positions are sinusoidal, so the model has no longest sequence. The head is untied and has a bias. Heads grow in
    number with the width, their size stays.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        norm: Norm = "pre",
        width: int = 1,
        depth: int = 1,
        base_width: int = 32,
        base_heads: int = 2,
        base_blocks: int = 2,
        init_scale: float = 1.0,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        if not init_scale > 0:
            raise LayerwiseError(f"model.init_scale={init_scale}: must be greater than 0")
        if norm not in NORMS:
            raise LayerwiseError(f"model.norm={norm!r}: use one of {', '.join(NORMS)}")
        if base_width % (2 * base_heads):
            raise LayerwiseError(f"model.base_width={base_width} is not a multiple of 2 * model.base_heads={base_heads}")
        d = base_width * width
        self.embedding = nn.Embedding(vocab_size, d)
        self.blocks = nn.ModuleList(
            DecoderBlock(d, base_heads * width, norm=norm, branch_scale=depth**-0.5, init_scale=init_scale, kind=attention)
            for _ in range(base_blocks * depth)
        )
        self.head = _linear(d, vocab_size, bias=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[batch, positions]` to log-probabilities `[batch, positions, vocab_size]`."""
        x = self.embedding(input_ids)
        x = x + _sinusoids(x.shape[1], x.shape[2], x.device, x.dtype)
        for block in self.blocks:
            x = block(x)
        return functional.log_softmax(self.head(_normalise(x)), dim=-1)


def _normalise(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without gain and bias."""
    return functional.layer_norm(x, x.shape[-1:])


def _sinusoids(positions: int, d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sines and cosines of geometrically spaced frequencies, `[positions, d]` (arXiv 1706.03762, section 3.5)."""
    frequencies = torch.exp(torch.arange(0, d, 2, device=device) * (-math.log(10_000.0) / d))
    angles = torch.arange(positions, device=device)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(dtype)


class PaperFamily(Family):
    """A model of the function-space paper: its keywords are its settings.

    Attributes:
        model_class: what is built.
    """

    blocks, layers = "blocks.*", ("depth", "base_blocks")
    model_class: ClassVar[type[nn.Module]]

    def setting_defaults(self) -> Settings:
        return keywords_of(self.model_class, {"attention"})

    def resize(self, settings: Settings, axis: Axis, value: float) -> Settings:
        """By the multipliers of width and depth; with the depth the branches are rescaled."""
        if axis == "width":
            return {"width": whole("width", value, settings["base_width"])}
        if axis == "depth":
            return {"depth": whole("depth", value, settings["base_blocks"])}
        return {"init_scale": value}


@register
class ResMLPFamily(PaperFamily):
    """ResMLP on images."""

    name, presets, model_class = "resmlp", {"resmlp": {}}, ResMLP

    def build(self, settings: Settings, examples: Examples, attention: str) -> nn.Module:
        if examples.features is None:
            raise LayerwiseError("model=resmlp reads images: set data.source to digits or fashion-mnist")
        return ResMLP(examples.features, examples.vocab_size, **settings)


@register
class DecoderFamily(PaperFamily):
    """The decoder on tokens."""

    name, presets, model_class = "decoder", {"decoder": {}}, Decoder

    def build(self, settings: Settings, examples: Examples, attention: str) -> nn.Module:
        tokens_only(examples, "model=decoder")
        return Decoder(examples.vocab_size, attention=attention, **settings)
