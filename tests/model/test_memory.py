"""The planner against the allocator: the peak of a whole forward and backward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.errors import RecipeError
from pipeline.model import lora
from pipeline.model.advice import GB, advise, choose_checkpointing, fits, needed
from pipeline.model.attention import choose
from pipeline.model.cut import drop_prefix
from pipeline.model.geometry import geometry_of, total_parameters
from pipeline.model.memory import HEAD_CHUNK, Setup, Work, plan, weight_bytes
from pipeline.recipes import Geometry, SftRecipe
from pipeline.train import head
from pipeline.train.batches import MicroBatch
from pipeline.train.loss import SftModule

SEVEN = Geometry(
    architecture="qwen2",
    hidden_size=3584,
    intermediate_size=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    vocab_size=152064,
)
RECIPE = SftRecipe.model_validate({"lora": {"layers": {"first": 1, "last": 2}}})


def test_the_head_works_in_the_chunks_that_are_planned() -> None:
    assert head.CHUNK_BYTES == HEAD_CHUNK


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1024, 512), (128, 16384)])
def test_the_peak_of_a_step_is_the_allocators(
    tokens: int, vocabulary: int, checkpointing: bool
) -> None:
    """Once with large activations, once with a large head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation(choose(config, bf16=True))
    assert RECIPE.lora is not None
    lora.inject(model, RECIPE.lora, 0, lambda name: torch.empty(0))
    drop_prefix(model, 1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    module = SftModule(model.train())
    ids = torch.randint(vocabulary, (1, tokens))
    predict = torch.arange(tokens - 1)
    batch = MicroBatch(
        ids=ids,
        positions=torch.arange(tokens)[None] % 64,
        predict=predict,
        labels=ids[0, 1:],
        weights=torch.ones(tokens - 1),
        reference=torch.full((tokens - 1,), -1),
        starts=torch.arange(0, tokens + 1, 64),
        states=torch.randn(1, tokens, 128, dtype=torch.bfloat16),
    )
    module(batch)[0].backward()  # what is allocated once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        module(batch)[0].backward()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    memory = plan(
        Work(geometry_of(config.to_dict()), RECIPE, tokens, 1, checkpointing), Setup("single")
    )
    passing = {k: v for k, v in memory.step.items() if k not in ("weights", "adapter", "optimizer")}
    states = batch.states.nbytes if batch.states is not None else 0
    assert most + states == pytest.approx(sum(passing.values()), rel=0.06)


def test_weights_of_one_process_are_the_models() -> None:
    work = Work(SEVEN, RECIPE, 1024)
    assert weight_bytes(work, Setup("single")) == 2 * total_parameters(SEVEN)


def test_full_fine_tuning_is_not_planned() -> None:
    with pytest.raises(RecipeError, match=r"sft\.lora is null"):
        plan(Work(SEVEN, SftRecipe(lora=None), 1024), Setup("single"))


def test_checkpointing_is_chosen_where_it_does_not_fit_without() -> None:
    work, setup = Work(SEVEN, RECIPE, 8192, 1), Setup("single", kind="cuda")
    without, with_it = (
        needed(plan(replace(work, checkpointing=on), setup), setup) for on in (False, True)
    )
    assert with_it < without
    assert not choose_checkpointing(work, setup, int(without / 0.9) + GB)
    assert choose_checkpointing(work, setup, (without + with_it) // 2)
    assert advise(work, setup, (without + with_it) // 2).checkpointing


def test_processes_of_a_cpu_machine_share_the_bases_pages() -> None:
    one, two = Setup("ddp", 1, 1), Setup("ddp", 2, 2)
    work = Work(SEVEN, RECIPE, 1024, 1)
    weights = weight_bytes(work, one)
    alone, both = needed(plan(work, one), one), needed(plan(work, two), two)
    assert both - weights == 2 * (alone - weights)


def test_what_does_not_fit_is_said_with_a_way_out() -> None:
    work, setup = Work(SEVEN, RECIPE, 4096, 1), Setup("single", kind="cuda")
    lines = " ".join(advise(work, setup, 2 * GB).lines)
    assert "still does not fit" in lines and "more or larger devices" in lines
    assert not fits(work, setup, 2 * GB)
    assert "QLoRA" in " ".join(advise(work, setup, 14 * GB).lines)
