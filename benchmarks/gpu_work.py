"""What benchmarks/gpu_sft.py trains and on what: shapes, random documents, operations.

Operations that are needed for T tokens in documents of lengths L, of which R rows predict a trained
token; the model has n layers, f of them frozen below the first adapted one, P weights in the matrices
of a layer, D of them in down_proj, H heads of C channels, V words and hidden size h:

  forward    (n - f) (2 P T + 2 H C sum L^2)         a causal document has L^2 / 2 pairs
  backward   (n - f - 1) (2 P T + 4 H C sum L^2) + 2 D T
             to activations alone, frozen weights need no gradient; in the lowest adapted layer it
             ends at up_proj, behind down_proj
  head       4 V h R

The adapters (1e-4 of it), norms and the optimiser are not counted. A test holds the products to what
PyTorch counts in a step.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from pipeline.data.packing import Pack, best_fit_decreasing
from pipeline.model.attention import choose
from pipeline.train.batches import Documents

COMPLETION = 0.8
SHORTEST = 32


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5 model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    channels: int
    words: int

    @property
    def adapted(self) -> range:
        """The middle third."""
        return range(round(0.3333 * self.layers), round(0.6667 * self.layers))

    @property
    def matrices(self) -> int:
        """Weights in the matrices of a layer."""
        attention = 2 * self.hidden * self.channels * (self.heads + self.key_heads)
        return attention + 3 * self.hidden * self.inner


SHAPES = {
    "7b": Shape(3584, 18944, 28, 28, 4, 128, 152064),
    "14b": Shape(5120, 13824, 48, 40, 8, 128, 152064),
    "tiny": Shape(64, 160, 6, 4, 2, 16, 512),
}


@dataclass
class Work:
    """Documents, and the packs of every step."""

    documents: Documents
    steps: list[list[Pack]]

    def numbers(self, steps: list[list[Pack]]) -> tuple[int, int, int]:
        """(tokens, sum of squared lengths, rows that predict a trained token)."""
        inside = [d for step in steps for pack in step for d in pack]
        lengths = [self.documents.lengths[d] for d in inside]
        return sum(lengths), sum(n * n for n in lengths), self.documents.targets(inside)[0]


def operations(
    shape: Shape,
    work: tuple[int, int, int],
    *,
    first: int,
    lowest: int,
    again: bool = False,
    all_rows: bool = False,
) -> int:
    """Floating point operations: forward from layer ``first`` on, backward down to up_proj of layer
    ``lowest`` (-1: to the embedding), ``again``: activations recomputed; see the top of this file."""
    tokens, squares, rows = work
    linear, pairs = 2 * shape.matrices * tokens, 2 * shape.heads * shape.channels * squares
    total = (shape.layers - first) * (linear + pairs)
    total += (shape.layers - lowest - 1) * (linear + 2 * pairs)
    down = 2 * shape.hidden * shape.inner * tokens
    if lowest >= 0:
        total += down
    if again:  # up to down_proj, whose output no gradient needs
        total += (shape.layers - max(0, lowest)) * (linear + pairs - down)
    return total + 4 * shape.words * shape.hidden * (tokens if all_rows else rows)


def make_work(shape: Shape, given: argparse.Namespace, folder: Path) -> Work:
    """Random documents, as the pack stage would have written them."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    count = given.warmup + given.rounds * given.steps
    wanted = count * given.packs * given.tokens
    lengths: list[int] = []
    while sum(lengths) < wanted:
        drawn = random.lognormal(np.log(given.median), given.sigma)
        lengths.append(int(np.clip(drawn, SHORTEST, given.tokens)))
    starts = np.cumsum([0, *lengths])
    trained = np.concatenate([np.arange(n) >= n - int(COMPLETION * n) for n in lengths])
    arrays = {
        "train.ids": random.integers(0, shape.words, starts[-1], dtype=np.int32),
        "train.trained": trained,
        "train.starts": starts,
        "train.kind": np.zeros(len(lengths), dtype=np.int8),
    }
    save_file(arrays, folder / "tokens.safetensors")
    names = [f"document {i}" for i in range(len(lengths))]
    (folder / "documents.json").write_text(json.dumps({"train": names}))
    artifact: Any = SimpleNamespace(path=lambda name: folder / name)
    anchors: Any = SimpleNamespace(objective="sft", weight=1.0)
    packs = best_fit_decreasing(lengths, given.tokens)
    packs = [packs[i] for i in random.permutation(len(packs))]
    steps = [packs[i * given.packs : (i + 1) * given.packs] for i in range(count)]
    return Work(Documents(artifact, "train", anchors), steps)


def make_model(shape: Shape, device: torch.device) -> Any:
    """A random model in bf16, made on ``device``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.words,
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation(choose(config, bf16=True))
    return model.requires_grad_(False)
