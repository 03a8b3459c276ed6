"""The limits of a card: arithmetic held against what torch counts on a real model, generation against
the bytes of a real model and its cache."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pipeline.model.hours import (
    CARDS,
    Answers,
    Card,
    generation_seconds,
    linear_weights,
    training_flops,
    training_seconds,
)
from pipeline.recipes import Geometry

SHAPES = Geometry(
    architecture="llama",
    hidden_size=64,
    intermediate_size=192,
    layers=6,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab_size=512,
    tied_embeddings=False,
)
TOKENS, CUT = 4, 2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SHAPES.vocab_size,
            hidden_size=SHAPES.hidden_size,
            intermediate_size=SHAPES.intermediate_size,
            num_hidden_layers=SHAPES.layers,
            num_attention_heads=SHAPES.heads,
            num_key_value_heads=SHAPES.kv_heads,
            head_dim=SHAPES.head_dim,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    ).to(torch.bfloat16)


def test_training_needs_no_more_than_torch_counts_and_nearly_as_much(
    model: LlamaForCausalLM,
) -> None:
    """A frozen base with adapters from a layer on; torch counts attention and adapters as well, and
    what of the lowest adapted layer is run backward."""
    config = LoraConfig(r=1, target_modules=["up_proj"], layers_to_transform=[CUT, CUT + 1])
    ids = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as counted:
        get_peft_model(model, config)(input_ids=ids, labels=ids).loss.backward()
    real = counted.get_total_flops()
    ours = training_flops(SHAPES, TOKENS, 1, CUT, checkpointing=False)
    assert 0.9 * real < ours <= real
    lowest = 2 * TOKENS * linear_weights(SHAPES)
    more = training_flops(SHAPES, TOKENS, 3, CUT, checkpointing=True)
    assert more > 3 * (ours - CUT * lowest), "three epochs, their forward pass made again"
    assert training_seconds(1000, Card(10.0, 1.0), 4) == 25.0


def test_a_token_reads_the_weights_and_half_of_the_cache(model: LlamaForCausalLM) -> None:
    weights = sum(p.numel() * 2 for n, p in model.named_parameters() if "lora" not in n)
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(TOKENS)[None], past_key_values=cache, use_cache=True)
    kept = sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
    slow = Card(flops=1e30, bandwidth=1.0)
    found = generation_seconds(SHAPES, [Answers(10, TOKENS, 5)], slow)
    assert found == pytest.approx(2 * TOKENS * (weights + 5 * kept / 2), rel=1e-6)
    assert generation_seconds(SHAPES, [Answers(0, 8, 5)], slow) == 0.0
    busy = Card(flops=1.0, bandwidth=1e30)
    assert generation_seconds(SHAPES, [Answers(10, 8, 5)], busy) == pytest.approx(80 * weights)


def test_every_planned_gpu_has_its_rates() -> None:
    from pipeline.model.advice import DEVICES

    assert set(CARDS) == set(DEVICES)
