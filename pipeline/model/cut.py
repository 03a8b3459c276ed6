"""A model without its frozen prefix: what lies below the first adapted layer never changes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Passed(nn.Module):
    """Stands where a layer was: gives back what it is given."""

    def forward(self, hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        return hidden


def drop_prefix(model: Any, cut: int) -> None:
    """Forget the layers below ``cut``: ``model`` is now called with their output as
    ``inputs_embeds``. The other layers keep their names."""
    decoder = model.model
    for index in range(cut):
        decoder.layers[index] = Passed()
    if cut and decoder.embed_tokens.weight is not model.lm_head.weight:
        decoder.embed_tokens = Passed()
