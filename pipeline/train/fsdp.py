"""FSDP2: the frozen base is sharded over the ranks, the adapter is replicated.

A rank-1 adapter has a few hundred kilobytes: sharding it would cost more messages than it saves
bytes. So it is left out of FSDP and its gradients are summed once a step. In full fine-tuning
everything is sharded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import RecipeError
from pipeline.recipes import SftRecipe
from pipeline.train.engine import State, trainable
from pipeline.train.loss import SftModule
from pipeline.train.replicated import MOMENTS, ReplicatedEngine, move_adapters
from pipeline.train.world import device


class FsdpEngine(ReplicatedEngine):
    """Engine ``fsdp``: torch's fully_shard on each decoder layer, then on the whole."""

    def __init__(self) -> None:
        super().__init__("fsdp")

    def wrap(self, module: SftModule, recipe: SftRecipe) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        place = device()
        mesh = init_device_mesh(place.type, (dist.get_world_size(),))
        full = recipe.lora is None
        bf16 = full and recipe.precision == "bf16"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None,
            reduce_dtype=torch.float32 if bf16 else None,
        )
        replicated = set() if full else set(trainable(module).values())
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
        for layer in decoder_layers(module.model):
            fully_shard(layer, ignored_params=_inside(layer, replicated), **options)
        fully_shard(module, ignored_params=replicated, **options)
        if full:
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.set_gradient_divide_factor(1.0)
                    if place.type == "cpu":
                        part.set_force_sum_reduction_for_comms(True)
        move_adapters(module)
        self.module, self.sharded = module, full
        self._prepare(module, recipe)

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        from torch.distributed.fsdp import FSDPModule

        # what the last forward pass left whole would be used again in the next one, as it was
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        super().load_trainable_state(state)

    def shards(self) -> tuple[State, dict[str, list[int]]]:
        state: State = {}
        shapes: dict[str, list[int]] = {}
        for name, parameter in self.parameters.items():
            parts: dict[str, Any] = {"trainable": parameter}
            held = self.optimizer.state.get(parameter)
            if held:  # else it has had no gradient yet
                state["optimizer.step"] = held["step"].detach().clone().cpu()
                parts |= {f"optimizer.{moment}": held[moment] for moment in MOMENTS}
            for key, tensor in parts.items():
                own = tensor.detach().to_local().flatten()
                state[f"{key}.{name}"] = own.to("cpu", torch.float32, copy=True)
                shapes[f"{key}.{name}"] = list(tensor.shape)
        return state, shapes


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a Hugging Face decoder."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList):
            return list(layers)
    raise RecipeError("engine fsdp: this model has no list of decoder layers to shard")


def _inside(layer: nn.Module, parameters: set[nn.Parameter]) -> set[nn.Parameter]:
    return {p for p in layer.parameters() if p in parameters}
