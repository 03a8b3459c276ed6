"""The frozen prefix: the decoder layers below the first adapted one, whose output never changes.

Each document is run alone, through a few layers at a time. So what it gives depends on the document
and not on its neighbours, no engine has to shard these layers, and few of them are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.attention import borders, choose
from pipeline.model.build import DTYPES
from pipeline.model.cut import Passed
from pipeline.model.shards import open_checkpoint
from pipeline.recipes import SftRecipe

BLOCK_BYTES = 2**31
CHUNK_BYTES = 2**29
SMALL_CHUNK = 4096


class Prefix:
    """Layers 0 to ``cut`` - 1 of the base in ``folder``, in the recipe's precision."""

    def __init__(self, folder: Path, recipe: SftRecipe, cut: int, device: torch.device) -> None:
        self.cut, self.device = cut, device
        self.dtype = DTYPES[recipe.precision]
        self.quantized = recipe.quantization == "nf4"
        self.read = open_checkpoint(folder).read
        self.decoder = _skeleton(folder, self.dtype, device)
        self.layers = list(self.decoder.layers)
        self.resident: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        return int(self.decoder.config.hidden_size)

    @property
    def chunk_tokens(self) -> int:
        """How many tokens to run at a time: few where all layers stay in memory, else as many as
        make reading the layers again and again worth it."""
        return (
            SMALL_CHUNK
            if len(self._blocks()) == 1
            else CHUNK_BYTES // (self.dtype.itemsize * self.width)
        )

    @torch.no_grad()
    def run(self, documents: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states [T, hidden size] on the CPU of each document, int64 [T], in order."""
        self._load_embedding()
        ids = [d.to(self.device)[None] for d in documents]
        hidden = [self.decoder.embed_tokens(d) for d in ids]
        for block in self._blocks():
            self._hold(block)
            hidden = [self._through(h) for h in hidden]
        return [h[0].cpu() for h in hidden]

    def _through(self, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        positions = torch.arange(length, device=self.device)[None]
        one = borders(torch.tensor([0, length]), self.device)
        output = self.decoder(inputs_embeds=hidden, position_ids=positions, use_cache=False, **one)
        last: Tensor = output.last_hidden_state
        return last

    def _blocks(self) -> list[tuple[int, ...]]:
        """Consecutive layers that fit BLOCK_BYTES together, at least one."""
        numel = sum(p.numel() for p in self.layers[0].parameters())
        each = max(1, BLOCK_BYTES // (numel * self.dtype.itemsize))
        starts = range(0, self.cut, each)
        return [tuple(range(first, min(first + each, self.cut))) for first in starts]

    def _hold(self, block: tuple[int, ...]) -> None:
        """Have the weights of ``block`` in memory, and of no other layer."""
        if block == self.resident:
            return
        for index in self.resident:
            self.layers[index].to("meta")
        for index, layer in enumerate(self.layers):
            self.decoder.layers[index] = layer if index in block else Passed()
        for index in block:
            self._load(self.layers[index], f"model.layers.{index}.")
        self.resident = block

    def _load_embedding(self) -> None:
        if self.decoder.embed_tokens.weight.is_meta:
            self._load(self.decoder.embed_tokens, "model.embed_tokens.")

    def _load(self, module: nn.Module, prefix: str) -> None:
        linear = {n for n, m in module.named_modules() if isinstance(m, nn.Linear)}
        state = {}
        for name, _ in module.named_parameters():
            weight = self.read(prefix + name).to(self.device, self.dtype)
            quantized = self.quantized and name.removesuffix(".weight") in linear
            state[name] = _through_nf4(weight) if quantized else weight
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)


def _skeleton(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The decoder without its final norm: weights on the meta device, buffers on ``device``."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        decoder: Any = AutoModel.from_config(config, dtype=dtype)
    decoder.set_attn_implementation(choose(config, bf16=dtype == torch.bfloat16))
    decoder.rotary_emb.to(device)
    decoder.norm = Passed()
    return decoder.eval()


def _through_nf4(weight: Tensor) -> Tensor:
    """``weight`` as a quantized layer multiplies by it: to NF4 and back."""
    from bitsandbytes import functional as quantization

    packed, state = quantization.quantize_4bit(weight, quant_type="nf4")
    restored: Tensor = quantization.dequantize_4bit(packed, state)
    return restored.to(weight.dtype)
