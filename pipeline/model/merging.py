"""Merging: which base tensor each update belongs to, and the sum W' = W + s B A in fp32, a block of
rows at a time; no model is ever loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.model.lora import BASE_DIGEST, PREFIX
from pipeline.model.shards import FLOATS, Checkpoint, Shard, read_shard

PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What an adapter may say where the plain sum W + s B A would be wrong otherwise.
PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([],),
    "alora_invocation_tokens": ([],),
    # pissa, olora, corda and loftq change the base under the adapter
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}

# (base rows in fp32, first row, last row + 1) -> (update, new value), both fp32
Rows = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


class Update(Protocol):
    """What happens to one base tensor."""

    def opened(self) -> Rows: ...


@dataclass(frozen=True)
class LoraUpdate:
    """W + scale * B A, with A [rank, in] and B [out, rank] read when asked."""

    adapter: Shard
    module: str
    scale: float

    def part(self, letter: str) -> Tensor:
        """A or B in fp32."""
        return self.adapter.read(f"{PREFIX}{self.module}.lora_{letter}.weight").float()

    def opened(self) -> Rows:
        a, b = self.part("A"), self.part("B") * self.scale

        def rows(base: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
            delta = b[start:stop] @ a
            return delta, base + delta

        return rows


@dataclass(frozen=True)
class FullUpdate:
    """The trained tensor in place of the base's."""

    trained: Shard
    name: str

    def opened(self) -> Rows:
        def rows(base: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
            target = self.trained.read(self.name, start, stop).float().reshape(base.shape)
            return target - base, target

        return rows


@dataclass(frozen=True)
class Plan:
    """Updates by base tensor; ``scale`` is the factor on B A (1 for full fine-tuning)."""

    method: str
    updates: Mapping[str, Update]
    scale: float
    rank: int | None
    modules: tuple[str, ...] = ()


def read_adapter_config(path: Path) -> dict[str, Any]:
    """A PEFT LoRA config that means W + s B A; DataError otherwise."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error}); run sft again with --rebuild") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: wanted a JSON object, got {type(config).__name__}")
    for key, allowed in PLAIN.items():
        value = config.get(key)
        if value is not None and value not in allowed and not (value == () or value == []):
            raise DataError(f"{path}: {key}={value!r} cannot be merged; wanted {allowed[0]!r}")
    for key, kinds in (("r", int), ("lora_alpha", int | float)):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise DataError(f"{path}: {key}={value!r}, wanted a positive number")
    return config


def plan_adapter(
    base: Checkpoint, folder: Path, *, base_digest: str, scale: float, tied: bool
) -> Plan:
    """Match every A/B pair of the adapter in ``folder`` to exactly one base tensor."""
    config = read_adapter_config(folder / "adapter_config.json")
    rank = int(config["r"])
    factor = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank) * scale
    adapter = read_shard(folder / "adapter_model.safetensors")
    _require_base(adapter, base_digest)
    updates: dict[str, Update] = {}
    modules = _pairs(adapter)
    for module in modules:
        name = f"{module}.weight"
        where = f"{adapter.path}: pair {module}"
        if tied and name in (EMBEDDING, HEAD):
            raise DataError(
                f"{where}: {name} is tied (embedding and head share it), so an update of one would"
                " change both; leave it out of the targets"
            )
        if name not in base.where:
            raise DataError(
                f"{where}: the base has no tensor {name}; the adapter belongs to another model"
            )
        update = LoraUpdate(adapter, module, factor)
        _check_pair(where, update, base, name, rank)
        updates[name] = update
    return Plan("lora", updates, factor, rank, tuple(modules))


def _require_base(adapter: Shard, base_digest: str) -> None:
    trained_on = adapter.metadata.get(BASE_DIGEST)
    if trained_on is not None and trained_on != base_digest:
        raise DataError(
            f"{adapter.path}: the adapter was trained on base {trained_on[:16]}, this base is"
            f" {base_digest[:16]}; merge into the base it was trained on, or train again"
        )


def _pairs(adapter: Shard) -> list[str]:
    """Modules of the A/B pairs in ``adapter``, in file order of their A."""
    found: dict[str, set[str]] = {}
    for key in adapter.entries:
        suffix = next((s for s in PARTS if key.endswith(s)), None)
        if suffix is None or not key.startswith(PREFIX):
            raise DataError(
                f"{adapter.path}: {key} is not part of an A/B pair"
                f" ({PREFIX}MODULE.lora_A.weight and .lora_B.weight); it cannot be merged"
            )
        found.setdefault(key[len(PREFIX) : -len(suffix)], set()).add(PARTS[suffix])
    if not found:
        raise DataError(f"{adapter.path}: holds no adapter pair; run sft again with --rebuild")
    for module, letters in found.items():
        if len(letters) != 2:
            missing = "B" if "A" in letters else "A"
            raise DataError(f"{adapter.path}: pair {module} has no lora_{missing}; train again")
    return list(found)


def _check_pair(where: str, update: LoraUpdate, base: Checkpoint, name: str, rank: int) -> None:
    key = f"{PREFIX}{update.module}.lora_"
    shapes = {letter: update.adapter.entries[f"{key}{letter}.weight"].shape for letter in "AB"}
    target = base.entry(name)
    if len(target.shape) != 2:
        raise DataError(f"{where}: {name} is {list(target.shape)}, wanted a matrix")
    _check_float(where, name, target.dtype)
    wanted = {"A": (rank, target.shape[1]), "B": (target.shape[0], rank)}
    for letter, shape in shapes.items():
        if shape != wanted[letter]:
            raise DataError(
                f"{where}: {letter} is {list(shape)}, wanted {list(wanted[letter])} for"
                f" rank {rank} and {name} {list(target.shape)}"
            )
        _check_float(where, letter, update.adapter.entries[f"{key}{letter}.weight"].dtype)
        tensor = update.part(letter)
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{where}: {letter} holds a value that is not finite; train again")
        if not bool(torch.count_nonzero(tensor)):
            raise DataError(f"{where}: {letter} is all zero: it was never trained; train again")


def _check_float(where: str, name: str, dtype: str) -> None:
    if dtype not in FLOATS:
        raise DataError(
            f"{where}: {name} is stored as {dtype}; merging needs one of {', '.join(FLOATS)}:"
            " use the unquantized base"
        )


def plan_full(base: Checkpoint, path: Path, *, tied: bool) -> Plan:
    """Every base tensor replaced by the trained one of the same name and shape."""
    trained = read_shard(path)
    updates: dict[str, Update] = {}
    for name, file in base.where.items():
        source = name
        if tied and name in (EMBEDDING, HEAD) and name not in trained.entries:
            source = HEAD if name == EMBEDDING else EMBEDDING
        if source not in trained.entries:
            if name.endswith("rotary_emb.inv_freq"):  # a constant in old files, never trained
                continue
            raise DataError(f"{path}: lacks {name}, which the base has in {file}; train again")
        got, wanted = trained.entries[source], base.entry(name)
        if got.shape != wanted.shape:
            raise DataError(
                f"{path}: {source} is {list(got.shape)}, the base has {list(wanted.shape)}"
            )
        _check_float(str(path), source, got.dtype)
        _check_float(str(base.folder), name, wanted.dtype)
        updates[name] = FullUpdate(trained, source)
    extra = set(trained.entries) - set(base.where) - ({EMBEDDING, HEAD} if tied else set())
    if extra:
        raise DataError(f"{path}: has {min(extra)}, which the base has not; wrong base?")
    return Plan("full", updates, 1.0, None)


def touched(base: Checkpoint, plan: Plan) -> list[str]:
    """Files of the base that hold a tensor of the plan."""
    return sorted({base.where[name] for name in plan.updates})
