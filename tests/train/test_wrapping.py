"""True shapes of 7B to 34B, wrapped on the meta device under a fake process group of 8 and 32.

No rank is started and no weight exists: the group only says how many there are, and the shards that
the engines make are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.model import lora
from pipeline.model.cut import drop_prefix
from pipeline.model.geometry import geometry_of, lora_parameters
from pipeline.model.memory import Setup, Work, frozen_shapes, plan, weight_bytes
from pipeline.recipes import SftRecipe
from pipeline.train.fsdp import FsdpEngine
from pipeline.train.loss import SftModule

RECIPE = SftRecipe.model_validate(
    {"lora": {"rank": 1, "layers": {"from_fraction": 0.3333, "to_fraction": 0.6667}}}
)
# hidden size, MLP, layers, heads, keys, vocabulary, as published
SHAPES = {
    "7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "14b": ("qwen2", 5120, 13824, 48, 40, 8, 152064),
    "32b": ("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "34b": ("llama", 7168, 20480, 60, 56, 8, 64000),
}


def config_of(name: str) -> Any:
    from transformers import AutoConfig

    architecture, hidden, inner, layers, heads, keys, vocabulary = SHAPES[name]
    return AutoConfig.for_model(
        architecture,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


@pytest.fixture()
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


# every shape, and both numbers of ranks
CELLS = [("7b", 8), ("14b", 32), ("32b", 8), ("34b", 32)]


@pytest.mark.parametrize(("name", "ranks"), CELLS, indirect=["ranks"])
def test_fsdp_shards_are_as_planned_under_a_fake_process_group(name: str, ranks: int) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(name)
    geometry = geometry_of(config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert RECIPE.lora is not None
    lora.inject(model, RECIPE.lora, 0, lambda name: torch.empty(0))
    cut = RECIPE.lora.layers.select(geometry.layers)[0]
    drop_prefix(model, cut)
    module = SftModule(model)
    FsdpEngine().wrap(module, RECIPE)

    frozen = [p for p in module.parameters() if not p.requires_grad]
    assert all(isinstance(p, DTensor) for p in frozen)
    shards = sum(p.to_local().nbytes for p in frozen if isinstance(p, DTensor))
    work, setup = Work(geometry, RECIPE, 4096, cut), Setup("fsdp", ranks, 8, "cuda")
    assert shards == weight_bytes(work, setup)
    adapter = [p for p in module.parameters() if p.requires_grad]
    assert not any(isinstance(p, DTensor) for p in adapter)
    memory = plan(work, setup)
    assert sum(p.nbytes for p in adapter) == memory.step["adapter"]
    assert sum(2 * p.nbytes for p in adapter) == memory.step["optimizer"]
    assert sum(p.numel() for p in adapter) == lora_parameters(geometry, RECIPE.lora)


@pytest.mark.parametrize(("name", "ranks"), CELLS, indirect=["ranks"])
def test_zero3_shards_are_as_planned_under_a_fake_process_group(
    name: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer: DeepSpeed cannot shard what is on the meta device, and partitions each tensor alike."""
    import deepspeed

    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # restored
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)
    deepspeed.init_distributed(dist_backend="fake", verbose=False)
    geometry = geometry_of(config_of(name).to_dict())
    work, setup = Work(geometry, RECIPE, 4096, 1), Setup("zero3", ranks, 8, "cuda")
    layer, _ = frozen_shapes(work)
    module = torch.nn.ParameterList(
        torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16), requires_grad=False)
        for shape in layer
    )
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=torch.bfloat16)
    shards = [p.ds_tensor for p in module.parameters()]
    assert sum(math.prod(p.ds_shape) for p in module.parameters()) == sum(map(math.prod, layer))
    one = Work(geometry, RECIPE, 4096, geometry.layers - 1)
    none = Work(geometry, RECIPE, 4096, geometry.layers)
    planned = weight_bytes(one, setup) - weight_bytes(none, setup)
    assert sum(shard.nbytes for shard in shards) == planned


@pytest.mark.parametrize("ranks", [8, 32], indirect=True)
def test_quantized_shards_are_as_planned_under_a_fake_process_group(
    ranks: int, base_folder: Path
) -> None:
    """NF4 packs two weights a byte into one column of bf16 numbers; their scales stay whole."""
    from pipeline.model.base import load_model
    from pipeline.model.build import quantization

    options = {"quantization_config": quantization(torch.bfloat16)}
    model = load_model(base_folder, torch.bfloat16, **options)
    geometry = geometry_of(model.config.to_dict())
    recipe = RECIPE.model_copy(update={"quantization": "nf4"})
    assert recipe.lora is not None
    lora.inject(model, recipe.lora, 0, lambda name: torch.empty(0))
    scales = sum(
        p.quant_state.absmax.nbytes for p in model.parameters() if hasattr(p, "quant_state")
    )
    module = SftModule(model)

    def bytes_of(tensor: torch.Tensor) -> int:
        return int((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes)

    work = Work(geometry, recipe, 1024)
    for setup in (Setup("single"), Setup("fsdp", ranks, 8)):
        if setup.engine == "fsdp":
            FsdpEngine().wrap(module, recipe)
        held = sum(bytes_of(p) for p in module.parameters() if not p.requires_grad)
        assert held + scales == weight_bytes(work, setup)
