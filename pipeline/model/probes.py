"""Logits of a model whose weights never are in memory at once.

Each module's weights are read when it runs and forgotten right after: of an embedding the rows that
are looked up, of a linear layer a block of rows at a time. So a probe of a 34B model needs a few
hundred megabytes. All arithmetic is fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

PROBES = 2
PROBE_TOKENS = 4  # enough to meet every weight; more cost time and show nothing new
BLOCK_ELEMENTS = 1 << 20  # stays in the cache while every lane multiplies by it


class Read(Protocol):
    """Rows ``start``..``stop`` (all by default) of the weight ``name``, in any floating dtype."""

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Tensor: ...


def probe_ids(vocab_size: int, seed: int = 0) -> Tensor:
    """Random token ids [PROBES, PROBE_TOKENS]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (PROBES, PROBE_TOKENS), generator=generator)


class Unsuited(Exception):
    """The model gives a weight that differs between lanes something else than [B, T, features]."""


def probe_logits(
    folder: Path, read: Read, token_ids: Tensor, *, adapter: Path | None = None, scale: float = 1.0
) -> Tensor:
    """Logits [B, T, vocabulary] in fp32 of the model that ``folder/config.json`` describes.

    ``token_ids``: [B, T]. ``read`` gives the weights. ``adapter``: a PEFT adapter
    folder, applied by PEFT itself at ``scale`` times its own scale.
    """
    return probe_lanes(folder, [read], (), token_ids, adapter=adapter, scale=scale)[0]


def probe_lanes(
    folder: Path,
    reads: Sequence[Read],
    own: Collection[str],
    token_ids: Tensor,
    *,
    adapter: Path | None = None,
    scale: float = 1.0,
) -> list[Tensor]:
    """``probe_logits`` of several models that differ in the weights ``own`` alone, in one run: every
    other weight is read once, from the first. The adapter is applied to the first of them.

    Each lane that differs goes through a layer by itself, in the shapes that it has alone. Raises
    Unsuited where a weight of ``own`` is not that of a plain linear layer.
    """
    lanes = _Lanes(reads, own, *token_ids.shape)
    model = _skeleton(folder)
    tied = _tied(model)
    for name, module in model.named_modules():
        _stream(module, name, lanes, tied)
    if adapter is not None:
        model = _with_peft(model, adapter, scale, lanes)
    with torch.inference_mode():
        ids = token_ids.repeat(len(reads), 1)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return list(logits.float().chunk(len(reads)))


class _Lanes:
    """Which rows of a batch belong to which model: ``prompts`` rows each, in order."""

    def __init__(
        self, reads: Sequence[Read], own: Collection[str], prompts: int, tokens: int
    ) -> None:
        self.reads, self.own = reads, frozenset(own)
        self.prompts, self.tokens = prompts, tokens
        self.memory = torch.empty(0)

    def block(self, weight: Tensor) -> Tensor:
        """``weight`` in fp32, in memory that the next block gets as well: new memory costs as much as
        multiplying by the block does."""
        if self.memory.numel() < weight.numel():
            self.memory = torch.empty(max(BLOCK_ELEMENTS, weight.numel()))
        return self.memory[: weight.numel()].view(weight.shape).copy_(weight)

    def split(self, x: Tensor, name: str) -> list[tuple[Read, Tensor]]:
        """Each lane's weights and rows. A batch may be of all lanes, of the first, or of the rest."""
        count = len(self.reads)
        rows = {n * self.prompts: n for n in (1, count - 1, count)}.get(x.shape[0], 0)
        if x.dim() != 3 or x.shape[1] != self.tokens or not rows:
            if name in self.own:
                raise Unsuited(name)
            return [(self.reads[0], x)]
        some = self.reads if rows == count else self.reads[:1] if rows == 1 else self.reads[1:]
        if name not in self.own:
            some = [self.reads[0]] * rows
        return list(zip(some, x.chunk(rows), strict=True))


def difference(left: Tensor, right: Tensor) -> float:
    """Largest difference of two sets of logits over the largest absolute logit of the first."""
    return float((left - right).abs().max() / left.abs().max())


def _skeleton(folder: Path) -> Any:
    """The model in fp32 with real buffers and weights that take no memory.

    A weight is one zero seen at every index: on the CPU and not on the meta device, because PEFT
    puts an adapter where its base weight is.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
    model.eval()
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[leaf] = _placeholder(parameter.shape)
    return model


def _placeholder(shape: torch.Size) -> nn.Parameter:
    return nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)


def _tied(model: Any) -> dict[str, str]:
    """Head weight -> embedding weight, where the config ties them."""
    if not model.config.tie_word_embeddings:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}


def _stream(module: nn.Module, name: str, lanes: _Lanes, tied: dict[str, str]) -> None:
    """Let ``module`` read its own weights when it is called, and drop them after."""
    leaves = {
        leaf: tied.get(full := f"{name}.{leaf}" if name else leaf, full)
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }
    if not leaves:
        return
    replaced: Any = module
    if type(module) is nn.Linear:
        replaced.forward = _Linear(lanes, leaves, module.out_features, module.in_features)
    elif lanes.own and not lanes.own.isdisjoint(leaves.values()):
        raise Unsuited(name)
    elif type(module) is nn.Embedding and module.max_norm is None:
        replaced.forward = _Embedding(lanes.reads[0], leaves["weight"])
    else:
        _stream_whole(module, lanes.reads[0], leaves)


class _Linear:
    """x W^T + bias, a block of W's rows at a time."""

    def __init__(self, lanes: _Lanes, leaves: dict[str, str], rows: int, columns: int) -> None:
        self.lanes, self.weight, self.bias = lanes, leaves["weight"], leaves.get("bias")
        self.rows, self.step = rows, max(1, BLOCK_ELEMENTS // columns)

    def __call__(self, x: Tensor) -> Tensor:
        lanes = self.lanes.split(x, self.weight)
        # below the first layer that differs all lanes are alike: what one gives, the others have
        like = [next(n for n, lane in enumerate(lanes) if _same(lane, own)) for own in lanes]
        # written in place: results that are kept between blocks would leave holes of their size
        result = x.new_empty(*x.shape[:-1], self.rows)
        parts = result.chunk(len(lanes))
        for start in range(0, self.rows, self.step):
            stop = min(start + self.step, self.rows)
            for read, numbers in groupby(sorted(set(like)), lambda n: lanes[n][0]):
                weight = self.lanes.block(read(self.weight, start, stop))
                for n in numbers:
                    parts[n][..., start:stop] = nn.functional.linear(lanes[n][1], weight)
        for part, n in zip(parts, like, strict=True):
            part.copy_(parts[n])
        return result + self.lanes.reads[0](self.bias).float() if self.bias else result


def _same(left: tuple[Read, Tensor], right: tuple[Read, Tensor]) -> bool:
    return left is right or (left[0] == right[0] and torch.equal(left[1], right[1]))


class _Embedding:
    """The rows of the table that are looked up."""

    def __init__(self, read: Read, name: str) -> None:
        self.read, self.name = read, name

    def __call__(self, ids: Tensor) -> Tensor:
        rows = [self.read(self.name, i, i + 1).float() for i in ids.flatten().tolist()]
        return torch.cat(rows).reshape(*ids.shape, -1)


class _FirstLane:
    """A layer with PEFT's adapter for the first lane, and without for the others."""

    def __init__(self, layer: Any, prompts: int) -> None:
        self.adapted, self.base, self.prompts = layer.forward, layer.base_layer, prompts

    def __call__(self, x: Tensor) -> Tensor:
        first, rest = x[: self.prompts], x[self.prompts :]
        adapted: Tensor = self.adapted(first)
        return torch.cat([adapted, self.base(rest)]) if len(rest) else adapted


def _stream_whole(module: nn.Module, read: Read, leaves: dict[str, str]) -> None:
    def load(module: nn.Module, args: object) -> None:
        for leaf, full in leaves.items():
            module._parameters[leaf] = nn.Parameter(read(full).float(), requires_grad=False)

    def drop(module: nn.Module, args: object, output: object) -> None:
        for leaf in leaves:
            parameter = module._parameters[leaf]
            assert parameter is not None
            module._parameters[leaf] = _placeholder(parameter.shape)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)


def _with_peft(model: Any, adapter: Path, scale: float, lanes: _Lanes) -> Any:
    import warnings

    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    with warnings.catch_warnings():
        # our config records the base's digest, a key that PEFT drops with a warning
        warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
        warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's calls into transformers
        adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(scale)
            module.forward = _FirstLane(module, lanes.prompts)
    return adapted.eval()
