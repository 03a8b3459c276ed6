"""Low-rank adapters on linear layers: injection, initialisation, and the PEFT file format.

Written here and not taken from PEFT for three reasons: the adapter is fp32 whatever the dtype of
the base, under every engine; PiSSA and OLoRA start from the base without rounding it (the origin is
subtracted in the forward pass, the base's bytes never change); and each tensor's initial value
depends on seed and name alone, so that all engines and world sizes start alike. PEFT reads the
files and is the reference in the tests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import DataError, RecipeError

if TYPE_CHECKING:
    from pipeline.recipes import LoraRecipe

PREFIX = "base_model.model."
BASE_DIGEST = "untaxed_base_digest"


class LoraLinear(nn.Module):
    """y = base(x) + scale * (B A - B0 A0) dropout(x), with A [rank, in] and B [out, rank] in fp32.

    B0 A0 is the origin: what PiSSA and OLoRA start from; absent for the other initialisations,
    where B starts at zero.
    """

    origin_A: Tensor | None
    origin_B: Tensor | None

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(a.float())
        self.lora_B = nn.Parameter(b.float())
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        with_origin = bool(torch.count_nonzero(b))
        self.register_buffer("origin_A", a.float().clone() if with_origin else None)
        self.register_buffer("origin_B", b.float().clone() if with_origin else None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        h = self.dropout(x).to(torch.float32)
        update = self._product(h, self.lora_A, self.lora_B)
        if self.origin_A is not None and self.origin_B is not None:
            update = update - self._product(h, self.origin_A, self.origin_B)
        return y + update.to(y.dtype)

    def _product(self, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The scale goes to the small side: on the wide one it would cost two passes over memory."""
        return functional.linear(self.scale * functional.linear(h, a), b)

    def adapter_to(self, device: torch.device) -> None:
        """Move what was added to the base, not the base."""
        for tensor in (self.lora_A, self.lora_B, self.origin_A, self.origin_B):
            if tensor is not None:
                tensor.data = tensor.data.to(device)


def find_targets(model: nn.Module, recipe: LoraRecipe) -> dict[str, nn.Module]:
    """The modules that ``recipe`` adapts, by name, in model order.

    RecipeError when a target name matches no module or the layers are out of range.
    """
    depth = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    layers = recipe.layers.select(depth)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    wanted = recipe.modules
    found: dict[str, nn.Module] = {}
    for target in wanted:
        matches = {
            name: module
            for name, module in linear.items()
            if name.rpartition(".")[2] == target
            and int(name.split(".layers.")[1].split(".")[0]) in layers
        }
        if not matches:
            raise RecipeError(
                f"sft.lora.targets: {target} matches no linear module in layers"
                f" {layers[0]}..{layers[-1]}; this model has {', '.join(leaves)}"
            )
        found |= matches
    return {name: module for name, module in linear.items() if name in found}


def inject(
    model: nn.Module, recipe: LoraRecipe, seed: int, weight_of: Callable[[str], Tensor]
) -> dict[str, LoraLinear]:
    """Replace the target modules by adapted ones and freeze all else; returns them by name.

    ``weight_of(name)`` gives the base weight [out, in] of a module; only PiSSA and OLoRA ask.
    """
    targets = find_targets(model, recipe)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapted: dict[str, LoraLinear] = {}
    for name, module in targets.items():
        rows, columns = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
        if recipe.rank > min(rows, columns):
            raise RecipeError(
                f"sft.lora.rank={recipe.rank} is above the size of {name} ({rows} x {columns})"
            )
        a, b = _initial(name, rows, columns, recipe, seed, weight_of)
        parent, _, leaf = name.rpartition(".")
        adapted[name] = LoraLinear(module, a, b, recipe.scale, recipe.dropout)
        setattr(model.get_submodule(parent), leaf, adapted[name])
    return adapted


def _initial(
    name: str,
    rows: int,
    columns: int,
    recipe: LoraRecipe,
    seed: int,
    weight_of: Callable[[str], Tensor],
) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of one module, from seed and name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    rank = recipe.rank
    if recipe.init in ("default", "orthogonal"):
        a = torch.empty(rank, columns)
        if recipe.init == "default":  # uniform with bound 1/sqrt(in), as PEFT's default
            a.uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
        else:
            random = torch.randn(columns, rank, generator=generator)
            a = torch.linalg.qr(random).Q.T.contiguous() * (1.0 / 3.0) ** 0.5
        return a, torch.zeros(rows, rank)
    weight = weight_of(name).float()
    if recipe.init == "pissa":  # arXiv 2404.02948: the principal singular directions
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:rank] / recipe.scale).sqrt()
        return root[:, None] * vh[:rank], u[:, :rank] * root
    q, r = torch.linalg.qr(weight)  # OLoRA, arXiv 2406.01775
    return r[:rank] / recipe.scale**0.5, q[:, :rank] / recipe.scale**0.5


def export(adapted: Mapping[str, LoraLinear], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapter tensors under PEFT's names, from the gathered trainable ``state``.

    With an origin the difference B A - B0 A0 is stored as one adapter of twice the rank, which
    belongs to the unchanged base.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in adapted.items():
        a, b = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        if module.origin_A is not None and module.origin_B is not None:
            a = torch.cat([a, module.origin_A.to(a.device)])
            b = torch.cat([b, -module.origin_B.to(b.device)], dim=1)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous().cpu()
    return tensors


def adapter_config(recipe: LoraRecipe, names: Iterable[str], base_source: str) -> dict[str, Any]:
    """``adapter_config.json`` for PEFT: the stored rank, and the alpha that gives our scale."""
    rank = recipe.rank * (2 if recipe.init in ("pissa", "olora") else 1)
    names = list(names)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_source,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": recipe.scale * rank,
        "lora_dropout": recipe.dropout,
        "use_rslora": False,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "target_modules": sorted(names),
    }


def save(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], base_digest: str
) -> None:
    """Write an adapter and read it back: names, shapes, finite values, and a B that is not zero.

    The digest of the base goes into the file's metadata, which PEFT leaves alone.
    """
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "adapter_model.safetensors"
    save_file(dict(tensors), path, metadata={BASE_DIGEST: base_digest})
    text = json.dumps(config, indent=1, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    written = load_file(path)
    for name, tensor in tensors.items():
        again = written[name]
        if again.shape != tensor.shape or not torch.equal(again, tensor):
            raise DataError(f"{path}: {name} reads back differently from what was trained")
        if not torch.isfinite(again).all():
            raise DataError(f"{path}: {name} holds a value that is not finite; nothing was sealed")
    if not any(torch.count_nonzero(written[n]) for n in written if n.endswith("lora_B.weight")):
        raise DataError(f"{path}: every B is zero: the adapter was never trained")
