"""DeepSpeed ZeRO: stage, offload and buckets from the JSON, all else from the recipe."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import RecipeError
from pipeline.model.geometry import ARCHITECTURES
from pipeline.recipes import SftRecipe
from pipeline.train.engine import State, adamw, trainable
from pipeline.train.loss import SftModule
from pipeline.train.replicated import MOMENTS

OWNED = {
    "train_batch_size": "sft.batch",
    "train_micro_batch_size_per_gpu": "sft.batch",
    "gradient_accumulation_steps": "sft.batch",
    "gradient_clipping": "sft.optimizer.max_grad_norm",
    "optimizer": "sft.optimizer",
    "scheduler": "sft.optimizer",
    "bf16": "sft.precision",
    "fp16": "sft.precision",
    "torch_autocast": "sft.precision",
}
AT_ONCE = 2**24  # elements gathered by one call for a checkpoint
MECHANISM = {"zero_optimization", "steps_per_print", "wall_clock_breakdown", "comms_logger"}


def read_config(path: Path, recipe: SftRecipe) -> dict[str, Any]:
    """The DeepSpeed configuration: the JSON's mechanism plus what the recipe owns.

    RecipeError when the JSON states a hyperparameter (other than "auto") or no ZeRO stage.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise RecipeError(f"--ds {path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or "zero_optimization" not in config:
        raise RecipeError(f"--ds {path}: has no zero_optimization section; see ds_configs/")
    zero = _checked(config["zero_optimization"], path)
    unknown = sorted(set(config) - set(OWNED) - MECHANISM)
    if unknown:
        raise RecipeError(
            f"--ds {path}: unknown key {unknown[0]}; known here: {', '.join(sorted(MECHANISM))}"
        )
    if zero.get("overlap_comm") and zero.get("stage") == 1:
        raise RecipeError(
            f"--ds {path}: overlap_comm does not work with ZeRO stage 1 when a step's gradients are"
            " summed at its end; set it to false, or use stage 2 or 3"
        )
    for key, owner in OWNED.items():
        stated = config.pop(key, "auto")
        if isinstance(stated, dict):
            stated = stated.get("enabled", stated)
        if stated != "auto":
            raise RecipeError(f'--ds {path}: {key} belongs to the job file ({owner}); say "auto"')
    return config | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # the loop knows when a step is complete
        "gradient_clipping": recipe.optimizer.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": recipe.lora is None and recipe.precision == "bf16"},
    }


def _checked(zero: Any, path: Path) -> dict[str, Any]:
    """The ``zero_optimization`` section, if DeepSpeed knows every key of it and the stage."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    section = f"--ds {path}: zero_optimization"
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        got = zero.get("stage") if isinstance(zero, dict) else zero
        raise RecipeError(f"{section}: stage={got}, wanted 1, 2 or 3; see ds_configs/")
    for key in ("offload_param", "offload_optimizer"):
        if isinstance(zero.get(key), dict) and zero[key].get("device") == "nvme":
            raise RecipeError(
                f"{section}.{key}.device: got nvme, wanted cpu or none: a run that is stopped could not"
                " go on from there"
            )
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{section}.{key}: {first['msg']}, got {first['input']!r}") from error
    return zero


class ZeroEngine:
    """ZeRO 1 to 3. Frozen weights keep their own dtype; adapters are fp32, as in every engine."""

    module: nn.Module

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = "zero"

    @contextlib.contextmanager
    def loading(self, recipe: SftRecipe) -> Iterator[None]:
        """Tell transformers of the configuration, so that stage 3 shards while it loads."""
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        # On a CPU DeepSpeed would first compile an all-reduce of its own, for which there is no use:
        # ZeRO-3 gathers, and the gradients of adapters are small. Stage 3 would do so while loading.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config = read_config(self.path, recipe)
        self.stage = int(self.config["zero_optimization"].get("stage", 0))
        offloads = "offload_param" in self.config["zero_optimization"]
        self.name = f"zero{self.stage}" + ("-offload" if offloads else "")
        alive = None
        # NF4 weights are made from whole ones: every process loads all, and stage 3 shards them (as
        # bf16 numbers, whatever they mean) when it wraps
        if self.stage == 3 and recipe.quantization == "none":
            # While loading, stage 3 casts every weight to the precision that this section names,
            # fp32 without it; afterwards the section is off, and adapters may stay fp32.
            loads_bf16 = recipe.precision == "bf16"
            alive = HfDeepSpeedConfig(self.config | {"bf16": {"enabled": loads_bf16}})
        yield
        # transformers holds it weakly, and would shard every other model while it lives
        del alive

    def wrap(self, module: SftModule, recipe: SftRecipe) -> None:
        import deepspeed

        self.parameters = trainable(module)
        self.sharded = self.stage == 3 and recipe.lora is None
        optimizer = adamw(self.parameters.values(), recipe.optimizer)
        self.module = module
        # in any other architecture a part may be run without being called, which no hook would see
        if self.stage == 3 and module.model.config.model_type in ARCHITECTURES:
            for layer in module.model.model.layers:
                _gather_as_one(layer)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.config, dist_init_required=False
        )
        if self.stage == 3:
            self._keep_small_frozen_weights()
        self._inner().register_step_pre_hook(self._require_finite)
        self.world_size = dist.get_world_size()
        for held in self._inner().state.values():
            if "step" in held:  # some versions take a trial step to allocate; it must not count
                held["step"] = torch.zeros_like(torch.as_tensor(held["step"], dtype=torch.float32))

    def _keep_small_frozen_weights(self) -> None:
        """Around every update DeepSpeed forgets all weights and gathers those again that are small
        enough to stay (``stage3_param_persistence_threshold``). A frozen one has not changed."""
        from deepspeed.runtime.zero.partition_parameters import _init_external_params

        others = nn.ParameterList(
            p
            for p in self.module.parameters()
            if p.requires_grad or not getattr(p, "ds_persist", False)
        )
        _init_external_params(others)
        coordinator = self.optimizer.parameter_offload.get_param_coordinator()
        self.optimizer._partition_all_parameters = lambda: coordinator.release_and_reset_all(others)

    def _require_finite(self, *_: Any) -> None:
        """Stages 1 and 2 would update with a norm that is not finite; stage 3 skips the step."""
        norm = self.optimizer._global_grad_norm
        if norm is not None and not math.isfinite(float(norm)):
            raise FloatingPointError

    def _inner(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = self.optimizer.optimizer
        return inner

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.engine(*args, **options)
        return result

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the loss is already a share of the global sum.
        self.engine.backward(loss * self.world_size)

    def gradient_finite(self) -> bool:
        return True  # GradientWatch has seen the local gradients already

    def step(self, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with contextlib.suppress(FloatingPointError):
            self.engine.step()
        norm = self.optimizer._global_grad_norm
        return float(norm) if norm is not None else float("nan")

    def shards(self) -> tuple[State, dict[str, list[int]]]:
        state: State = {"optimizer.step": self._steps_taken()}
        shapes: dict[str, list[int]] = {}
        for name, parameter in self.parameters.items():
            for moment in (None, *MOMENTS):
                key = f"optimizer.{moment}.{name}" if moment else f"trainable.{name}"
                state[key] = _cpu(_shard(parameter, moment))
                shapes[key] = list(parameter.ds_shape)  # type: ignore[attr-defined]
        return state, shapes

    def trainable_state(self, *, keep: bool = True) -> State:
        return self._whole(None, keep=keep)

    def _whole(self, moment: str | None, *, keep: bool = True) -> State:
        """Every trainable parameter, or that moment of it."""
        from deepspeed import utils

        if self.stage == 3:
            return self._gathered(moment, keep=keep)
        state: State = {}
        for name, parameter in self.parameters.items():
            if moment is None:
                whole = utils.safe_get_full_fp32_param(parameter)
            else:
                whole = utils.safe_get_full_optimizer_state(parameter, moment)
            if keep:
                state[name] = _cpu(whole)
        return state

    def _gathered(self, moment: str | None, *, keep: bool) -> State:
        """The same at stage 3. DeepSpeed itself would gather one tensor at a time: of an adapter, many
        messages of a few kilobytes."""
        from deepspeed import comm

        state: State = {}
        for batch in self._batches():
            shards = [_shard(parameter, moment) for parameter in batch.values()]
            own = torch.cat(shards)
            everyone = own.new_empty(self.world_size * len(own))
            comm.all_gather_into_tensor(everyone, own)
            if not keep:
                continue
            ranks = everyone.view(self.world_size, -1)
            columns = torch.split(ranks, [len(shard) for shard in shards], dim=1)
            for name, rows in zip(batch, columns, strict=True):
                shape: torch.Size = batch[name].ds_shape  # type: ignore[attr-defined]
                flat = rows.reshape(-1)[: shape.numel()]  # the last shard ends in padding
                state[name] = _cpu(flat.view(shape))
        return state

    def _batches(self) -> Iterator[dict[str, nn.Parameter]]:
        """Of trainable parameters, in order: as many as have ``AT_ONCE`` elements, or a larger one."""
        batch: dict[str, nn.Parameter] = {}
        held = 0
        for name, parameter in self.parameters.items():
            size: int = parameter.ds_numel  # type: ignore[attr-defined]
            if batch and held + size > AT_ONCE:
                yield batch
                batch, held = {}, 0
            batch[name] = parameter
            held += size
        yield batch

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        for name, parameter in self.parameters.items():
            value = state[name]
            self._set(parameter, value, None)
            # That is the optimiser's copy; the one that forward reads would only follow after a step.
            sharded = [parameter] if self.stage == 3 else []
            with torch.no_grad(), GatheredParameters(sharded, modifier_rank=0):
                parameter.data.copy_(value)

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Put the whole ``value`` into the optimiser's copy of a parameter, or into that moment of it."""
        from deepspeed import utils

        if self.stage != 3 and moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        elif self.stage != 3:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        else:  # DeepSpeed's own way reads past the end of what the ranks do not share evenly
            own = torch.zeros_like(_shard(parameter, moment))
            part = value.flatten()[dist.get_rank() * len(own) :][: len(own)]
            own[: len(part)] = part
            if moment is None:
                utils.safe_set_local_fp32_param(parameter, own)
            else:
                utils.safe_set_local_optimizer_state(parameter, own, moment)

    def optimizer_state(self, *, keep: bool = True) -> State:
        state: State = {}
        for moment in MOMENTS:
            whole = self._whole(moment, keep=keep)
            state |= {f"{moment}.{name}": tensor for name, tensor in whole.items()}
        return state | {"step": self._steps_taken()} if keep else {}

    def _steps_taken(self) -> Tensor:
        steps = [held["step"] for held in self._inner().state.values() if "step" in held]
        return torch.as_tensor(steps[-1] if steps else 0, dtype=torch.float32).clone()

    def _allocate_moments(self) -> None:
        """What DeepSpeed would do in the first step."""
        third = self.stage == 3
        flats = "fp32_partitioned_groups_flat" if third else "single_partition_of_fp32_groups"
        for flat in getattr(self.optimizer, flats):
            held = self._inner().state[flat]
            held.setdefault("step", torch.zeros((), dtype=torch.float32))
            for moment in MOMENTS:
                held.setdefault(moment, torch.zeros_like(flat))
        if not third:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        self._allocate_moments()
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                if f"{moment}.{name}" in state:  # else it had had no gradient yet
                    self._set(parameter, state[f"{moment}.{name}"], moment)
        for held in self._inner().state.values():
            if "step" in held:
                held["step"] = state["step"].clone()


def _gather_as_one(module: nn.Module) -> None:
    """Let stage 3 gather what is frozen as a whole with one call, not linear by linear: its hooks on a
    module's parts cost more than the arithmetic of a small one."""
    from deepspeed.utils import set_z3_leaf_module

    if any(p.requires_grad for p in module.parameters()):
        for child in module.children():
            _gather_as_one(child)
    else:
        set_z3_leaf_module(module, True)


def _shard(parameter: nn.Parameter, moment: str | None) -> Tensor:
    """What this rank holds at stage 3 of a trainable parameter, or of that moment of it; flat."""
    from deepspeed import utils

    if moment is None:
        shard: Tensor = utils.safe_get_local_fp32_param(parameter)
    else:
        shard = utils.safe_get_local_optimizer_state(parameter, moment)
    return shard.detach()


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
