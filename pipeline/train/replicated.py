"""Every process holds the whole model: one plain process, or data parallel over several.

The gradients of a whole step are summed once, at its end: an adapter's are under a few megabytes,
so there is nothing to overlap.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.model.lora import LoraLinear
from pipeline.train.engine import State, adamw, trainable
from pipeline.train.loss import SftModule
from pipeline.train.world import device

if TYPE_CHECKING:
    from pipeline.recipes import SftRecipe

MOMENTS = ("exp_avg", "exp_avg_sq")


def move_adapters(module: nn.Module) -> None:
    """Put what was added to the base on this rank's device."""
    for part in module.modules():
        if isinstance(part, LoraLinear):
            part.adapter_to(device())


class ReplicatedEngine:
    """Engines ``single`` and ``ddp``; fsdp builds on it."""

    module: nn.Module
    sharded = False

    def __init__(self, name: str) -> None:
        self.name = name

    @contextlib.contextmanager
    def loading(self, recipe: SftRecipe) -> Any:
        yield

    def wrap(self, module: SftModule, recipe: SftRecipe) -> None:
        """Move to the device and make the optimiser."""
        if recipe.quantization == "none":
            module.to(device())
        move_adapters(module)  # a quantized base was put there when it was loaded
        self.module = module
        self._prepare(module, recipe)

    def _prepare(self, module: nn.Module, recipe: SftRecipe) -> None:
        self.parameters = trainable(module)
        self.optimizer = adamw(self.parameters.values(), recipe.optimizer)
        self.max_grad_norm = recipe.optimizer.max_grad_norm
        full = recipe.lora is None and recipe.precision == "bf16"
        self.autocast = full and self.name != "fsdp"

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        with torch.autocast(device().type, torch.bfloat16, enabled=self.autocast):
            result: tuple[Tensor, ...] = self.module(*args, **options)
        return result

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def gradient_finite(self) -> bool:
        for parameter in self.parameters.values():
            gradient = _local(parameter.grad)
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                return False
        return True

    def step(self, learning_rate: float) -> float:
        self._sum_gradients()
        with_gradient = [p for p in self.parameters.values() if p.grad is not None]
        limit = self.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(with_gradient, limit)
        size = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(size):
            return size
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return size

    def _sum_gradients(self) -> None:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        for parameter in self.parameters.values():
            if isinstance(parameter, DTensor):
                continue  # fsdp has summed these already
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def shards(self) -> tuple[State, dict[str, list[int]]]:
        raise NotImplementedError("every rank has all")

    def trainable_state(self, *, keep: bool = True) -> State:
        state: State = {}
        for name, parameter in self.parameters.items():
            whole = _whole(parameter.detach())
            if keep:
                state[name] = whole
        return state

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(_like(state[name], parameter))

    def optimizer_state(self, *, keep: bool = True) -> State:
        state: State = {}
        for name, parameter in self.parameters.items():
            held = self.optimizer.state.get(parameter)
            if not held:
                continue
            moments = {f"{moment}.{name}": _whole(held[moment]) for moment in MOMENTS}
            if keep:
                state |= moments | {"step": held["step"].detach().clone().cpu()}
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            if f"{MOMENTS[0]}.{name}" not in state:
                continue  # it had had no gradient yet
            held: dict[str, Tensor] = {"step": state["step"].clone()}
            for moment in MOMENTS:
                held[moment] = torch.zeros_like(parameter, dtype=torch.float32)
                held[moment].copy_(_like(state[f"{moment}.{name}"], parameter))
            self.optimizer.state[parameter] = held


def _local(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor, a copy, fp32, on CPU."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", torch.float32, copy=True)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """``value`` placed (and sharded) as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )
