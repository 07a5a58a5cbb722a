"""The models of `rate_rule.py` that the lab has no preset of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from layerwise.lab.models.family import Examples


def qwen3_tiny(examples: Examples) -> nn.Module:
    """`llama-tiny` with norms on queries and keys, and an embedding that is the head as well."""
    config = Qwen3Config(
        vocab_size=examples.vocab_size,
        num_hidden_layers=4,
        hidden_size=128,
        intermediate_size=352,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=examples.seq_len,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._attn_implementation = "sdpa"
    return Qwen3ForCausalLM(config)


class ConvBlock(nn.Module):
    """`x + conv(relu(norm(x)))`, a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.conv(torch.relu(self.norm(x)))
        return made


class ConvNet(nn.Module):
    """Rows of 64 pixels to logits: four residual convolutions of 32 channels on 8 x 8 pixels, then on 4 x 4."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.early = nn.Sequential(ConvBlock(32), ConvBlock(32))
        self.down = nn.Conv2d(32, 64, 2, stride=2)
        self.late = nn.Sequential(ConvBlock(64), ConvBlock(64))
        self.norm = nn.GroupNorm(4, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.early(self.stem(pixels.unflatten(-1, (1, 8, 8))))
        x = torch.relu(self.norm(self.late(self.down(x))))
        logits: Tensor = self.head(x.mean((-2, -1)))
        return logits


def convnet_digits(examples: Examples) -> nn.Module:
    """For scikit-learn's digits."""
    return ConvNet(examples.vocab_size)


BUILD = {"qwen3-tiny": qwen3_tiny, "convnet-digits": convnet_digits}
