"""What an engine is: how one step runs over one or many processes, never what it computes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.train.loss import SftModule

if TYPE_CHECKING:
    from pipeline.recipes import OptimizerRecipe, SftRecipe

State = dict[str, Tensor]


class Engine(Protocol):
    """The interface of the four engines. Gradients are summed over ranks, never averaged."""

    name: str
    module: nn.Module

    def loading(self, recipe: SftRecipe) -> contextlib.AbstractContextManager[None]:
        """Held while the model is loaded, so that a sharded engine shards as it loads."""
        ...

    def wrap(self, module: SftModule, recipe: SftRecipe) -> None: ...

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, ...]: ...

    def backward(self, loss: Tensor) -> None: ...

    def gradient_finite(self) -> bool:
        """Whether this rank's accumulated gradients are finite, before they are summed."""
        ...

    def step(self, learning_rate: float) -> float:
        """Sum gradients, clip, update; returns the gradient norm before clipping. Where that is not
        finite nothing is updated."""
        ...

    @property
    def sharded(self) -> bool:
        """Whether the trainable tensors are shared out among ranks, and too large to be put together
        for every checkpoint."""
        ...

    def shards(self) -> tuple[State, dict[str, list[int]]]:
        """This rank's part of the tensors of the two states below, as ``trainable.<name>`` and
        ``optimizer.<name>``, flat, fp32, on CPU: the parts of all ranks, one after another, are the
        whole and then padding. With the shape of each whole tensor. Only where ``sharded``."""
        ...

    def trainable_state(self, *, keep: bool = True) -> State:
        """Trainable tensors by name, whole, fp32, on CPU; none on a rank without ``keep``, which only
        takes part."""
        ...

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None: ...

    def optimizer_state(self, *, keep: bool = True) -> State:
        """Optimiser tensors as ``exp_avg.<name>`` and ``exp_avg_sq.<name>``, and ``step``; the same."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None: ...


class GradientWatch:
    """Sees each trainable tensor's local gradient as backward makes it, under any engine.

    Keeps two facts a tensor: was every gradient finite, was any element non-zero. ``unhooked``: FSDP2
    sets the gradients of what it shards without calling hooks; they are looked at after backward.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.finite: dict[str, Tensor] = {}
        self.non_zero: dict[str, Tensor] = {}
        self.unhooked: dict[str, nn.Parameter] = {}
        for name, parameter in named:
            parameter.register_hook(self._hook(name))  # type: ignore[no-untyped-call]

    def _hook(self, name: str) -> Any:
        return lambda gradient: self._see(name, gradient)

    def _see(self, name: str, gradient: Tensor) -> None:
        finite = torch.isfinite(gradient).all()
        non_zero = torch.count_nonzero(gradient) > 0
        known = name in self.finite
        self.finite[name] = self.finite[name] & finite if known else finite
        self.non_zero[name] = self.non_zero[name] | non_zero if known else non_zero

    def all_finite(self) -> bool:
        """Whether this rank has seen finite gradients only; call it once a step, after backward."""
        for name, parameter in self.unhooked.items():
            gradient = parameter.grad
            if gradient is not None:
                self._see(name, gradient.to_local() if isinstance(gradient, DTensor) else gradient)
        return all(bool(value) for value in self.finite.values())

    def never_moved(self, names: Iterable[str]) -> list[str]:
        """Names whose gradient has been zero or absent since the start."""
        return [n for n in names if n not in self.non_zero or not bool(self.non_zero[n])]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by the name they have in the Hugging Face model."""
    return {
        name.removeprefix("model."): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def adamw(parameters: Iterable[nn.Parameter], recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """AdamW as the recipe states it."""
    return torch.optim.AdamW(
        list(parameters),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        weight_decay=recipe.weight_decay,
    )


def make_engine(ds: Path | None, engine: str | None, world_size: int) -> Engine:
    """The engine that the command line asks for; by default fsdp on several processes, else single."""
    from pipeline.errors import RecipeError

    if ds is not None:
        if engine is not None:
            raise RecipeError("--ds and --engine exclude each other: --ds chooses DeepSpeed ZeRO")
        load_deepspeed()
        from pipeline.train.zero import ZeroEngine

        return ZeroEngine(ds)
    name = engine or ("fsdp" if world_size > 1 else "single")
    if name == "single" and world_size > 1:
        raise RecipeError(f"--engine single with {world_size} processes; use fsdp, ddp or --ds")
    if name == "fsdp":
        from pipeline.train.fsdp import FsdpEngine

        return FsdpEngine()
    from pipeline.train.replicated import ReplicatedEngine

    return ReplicatedEngine(name)


def load_deepspeed() -> None:
    """Import deepspeed without the mlflow that its autotuner would bring: half of the time it takes.

    The autotuner does without where mlflow cannot be imported; nothing here uses either.
    """
    hide = "mlflow" not in sys.modules
    if hide:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed  # noqa: F401
    finally:
        if hide:
            del sys.modules["mlflow"]
