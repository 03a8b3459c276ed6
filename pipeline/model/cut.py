"""Where the frozen prefix ends: what lies below the first adapted layer never changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pipeline.model.geometry import ARCHITECTURES

if TYPE_CHECKING:
    from pipeline.recipes import SftRecipe


class Passed(nn.Module):
    """Stands where a layer was: gives back what it is given."""

    def forward(self, hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        return hidden


def cut_of(config: Any, recipe: SftRecipe) -> tuple[int, str]:
    """Number of layers below the first adapted one, or 0 and why nothing can be cut off."""
    if recipe.lora is None:
        return 0, "full fine-tuning changes every layer"
    if config.model_type not in ARCHITECTURES:
        return 0, f"the architecture {config.model_type} is none of {', '.join(ARCHITECTURES)}"
    if getattr(config, "attention_dropout", 0.0):
        return 0, "the base has dropout of its own"
    first = recipe.lora.layers.select(int(config.num_hidden_layers))[0]
    return first, "" if first else "layer 0 is adapted"


def drop_prefix(model: Any, cut: int) -> None:
    """Forget the layers below ``cut``: ``model`` is now called with their output as
    ``inputs_embeds``. The other layers keep their names."""
    decoder = model.model
    for index in range(cut):
        decoder.layers[index] = Passed()
    if cut and decoder.embed_tokens.weight is not model.lm_head.weight:
        decoder.embed_tokens = Passed()
