"""The models of `rate_rule.py` that the lab has no preset of, and what has to be there before a model is built."""

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
    """Rows of pixels to logits: two residual convolutions of 32 channels on 7 x 7 or 8 x 8 places, two of 64 on half.

    Args:
        side: pixels along an image's side.
        patch: pixels along the side of what the stem reads at once; 1: a 3 x 3 convolution instead.
        classes: of images.
    """

    def __init__(self, side: int, patch: int, classes: int) -> None:
        super().__init__()
        self.side = side
        self.stem = nn.Conv2d(1, 32, 3, padding=1) if patch == 1 else nn.Conv2d(1, 32, patch, stride=patch)
        self.early = nn.Sequential(ConvBlock(32), ConvBlock(32))
        self.down = nn.Conv2d(32, 64, 2, stride=2)
        self.late = nn.Sequential(ConvBlock(64), ConvBlock(64))
        self.norm = nn.GroupNorm(4, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.early(self.stem(pixels.unflatten(-1, (1, self.side, self.side))))
        x = torch.relu(self.norm(self.late(self.down(x))))
        logits: Tensor = self.head(x.mean((-2, -1)))
        return logits


def convnet_digits(examples: Examples) -> nn.Module:
    """For scikit-learn's digits, 8 x 8."""
    return ConvNet(8, 1, examples.vocab_size)


def convnet_fashion(examples: Examples) -> nn.Module:
    """For Fashion-MNIST, 28 x 28, in patches of 4 x 4."""
    return ConvNet(28, 4, examples.vocab_size)


BUILD = {
    "qwen3-tiny": qwen3_tiny,
    "convnet-digits": convnet_digits,
    "convnet-fashion": convnet_fashion,
}


def prepare(model: str) -> None:
    """Make what a model needs before it is built: the trained GPT-2 that adapters are put on, and their text."""
    if model == "gpt2-lora":
        from lora_rules import manual as train_what_is_adapted

        train_what_is_adapted()
