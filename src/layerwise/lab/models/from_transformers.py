"""What decoders of the transformers library have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn

from layerwise.errors import LayerwiseError
from layerwise.lab.models.family import Examples, Family, Settings, keywords_of, tokens_only

#: Settings that the data and the training loop decide.
_OURS = {"vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}


class TransformersFamily(Family):
    """A decoder of transformers.

    Attributes:
        positions: what it calls its longest sequence.
    """

    positions: ClassVar[str]

    @abstractmethod
    def classes(self) -> tuple[Any, Any]:
        """Its config's and its model's class, imported when they are asked for."""

    def setting_defaults(self) -> dict[str, Any]:
        return keywords_of(self.classes()[0], _OURS)

    def build(self, settings: Settings, examples: Examples, attention: str) -> nn.Module:
        """Its longest sequence is the data's unless the settings have one."""
        tokens_only(examples, "this model")
        positions = settings.setdefault(self.positions, examples.seq_len)
        if isinstance(positions, int) and positions < examples.seq_len:
            raise LayerwiseError(
                f"model.{self.positions}={positions} is shorter than data.seq_len={examples.seq_len}:"
                " raise the one or lower the other"
            )
        from huggingface_hub.errors import StrictDataclassError  # how transformers refuses a setting's type

        config_class, model_class = self.classes()
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
        try:
            made = config_class(vocab_size=examples.vocab_size, **settings, **ends)
        except StrictDataclassError as error:
            raise TypeError(str(error)) from None
        made._attn_implementation = attention
        return model_class(made)
