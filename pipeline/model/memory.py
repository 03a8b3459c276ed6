"""Bytes that a process of a training run needs, term by term and by phase. Torch-free.

Counted from shapes, not fitted; held against measured peaks by ``benchmarks/memory.py``, and against
the shards of real wrapped modules by ``tests/train/test_wrapping.py``. LoRA only. Left out: the rows
themselves, and what the base predicts on anchors (12 bytes times ``top_k`` a token).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pipeline.errors import RecipeError
from pipeline.model import activations
from pipeline.model.activations import BYTES, FP32, Row
from pipeline.model.geometry import linear_shapes, lora_parameters
from pipeline.recipes import Geometry, SftRecipe

SCALE_OF = 64  # NF4 weights share one scale in fp32
HEAD_CHUNK = {"cpu": 2**25, "cuda": 2**29}  # of fp32 logits; train/head.py
HEAD_COPIES = 4  # logits, log-probabilities, and the gradient of each
PREFIX_BLOCK, PREFIX_CHUNK, PREFIX_FEW = 2**31, 2**29, 4096  # model/prefix.py
# ds_configs/zero*.json, in elements
PERSISTENT, LIVE, PREFETCH, BUCKET = 10**6, 10**9, 5 * 10**7, 5 * 10**7


@dataclass(frozen=True)
class Setup:
    """How a run is spread: ``engine`` as the command line names it, over ``world_size`` processes of
    which ``per_machine`` share one. ``kind``: cpu or cuda."""

    engine: str
    world_size: int = 1
    per_machine: int = 1
    kind: str = "cpu"

    @property
    def sharded(self) -> bool:
        return self.engine in ("fsdp", "zero3", "zero3-offload")


@dataclass(frozen=True)
class Work:
    """What is trained: the base's shapes, the recipe, the layers below ``cut`` left out, packs of
    ``tokens`` of which at most ``predicted`` are trained (all, unless it is known), checkpointing.

    ``cached``: tokens whose states below the cut are read from the prefix cache. ``stored``: bytes a
    weight of the base's files. ``masked``: as for ``activations.Row``.
    """

    geometry: Geometry
    recipe: SftRecipe
    tokens: int
    cut: int = 0
    checkpointing: bool = False
    predicted: int | None = None
    cached: int = 0
    stored: int = 2
    masked: bool = False

    @property
    def size(self) -> int:
        """Bytes of a frozen number that is not quantized."""
        return BYTES[self.recipe.precision]

    def row(self, setup: Setup) -> Row:
        own_linear = setup.engine.startswith("zero3") and self.recipe.quantization == "none"
        on_gpu = setup.kind == "cuda"
        return Row(self.tokens, self.size, self.masked, on_gpu, own_linear)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. ``step``: the terms that are there together at the peak of a step;
    ``phases``: the peak of each phase. On a CPU ``mapped`` of them are pages of the base's file,
    which processes of a machine share and the system may drop."""

    step: dict[str, int]
    phases: dict[str, int]
    mapped: int = 0
    machine: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def plan(work: Work, setup: Setup) -> Memory:
    """What a process of ``setup`` needs for ``work``; RecipeError for full fine-tuning."""
    if work.recipe.lora is None:
        raise RecipeError("memory is planned for LoRA; sft.lora is null")
    adapter = lora_parameters(work.geometry, work.recipe.lora)
    held = _held(work, setup, adapter)
    kept, again = _kept(work, setup)
    always, table, passing, ahead = _gathered(work, setup)
    head = _head(work, setup)
    back = again + activations.working(work.geometry, work.recipe.lora, work.row(setup))
    back += _dequantized(work)
    moments: list[dict[str, int]] = [
        {"activations": kept, "loss head": head, "gathered weights": always + table},
        {"activations": kept, "one layer's backward": back, "gathered weights": always + passing},
        {"gathered weights": always + ahead},
    ]
    step = held | max(moments, key=lambda moment: sum(moment.values()))
    step |= {
        "gradients": FP32 * adapter,
        "prefix cache, pages": cache_bytes(work) if setup.kind == "cpu" else 0,
    }
    phases = {
        "load": _load(work, setup),
        "prefix": _prefix(work, setup),
        "step": sum(step.values()),
    }
    mapped = 0
    if setup.kind == "cpu":
        mapped = cache_bytes(work) + (held["weights"] if _views(work) and not setup.sharded else 0)
    return Memory(step, phases, mapped, _machine(work, setup))


def frozen_shapes(work: Work) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of one layer's frozen tensors, and of those outside the layers that are trained with."""
    g = work.geometry
    linear = linear_shapes(g)
    layer: list[tuple[int, ...]] = [*linear.values(), (g.hidden_size,), (g.hidden_size,)]
    if g.architecture == "qwen2":
        layer += [(linear[name][0],) for name in ("q_proj", "k_proj", "v_proj")]
    if g.architecture == "qwen3":
        layer += [(g.head_dim,), (g.head_dim,)]
    table = (g.vocab_size, g.hidden_size)
    root: list[tuple[int, ...]] = [table, (g.hidden_size,)]
    if not work.cut and not g.tied_embeddings:
        root.append(table)
    return layer, root


def weight_bytes(work: Work, setup: Setup) -> int:
    """Frozen weights that a process holds between steps, without the layers below the cut."""
    layer, root = frozen_shapes(work)
    layers = work.geometry.layers - work.cut
    return layers * sum(_share(s, work, setup, quantized=True) for s in layer) + sum(
        _share(s, work, setup) for s in root
    )


def _share(shape: tuple[int, ...], work: Work, setup: Setup, *, quantized: bool = False) -> int:
    """A process's bytes of one frozen tensor. FSDP splits rows, ZeRO-3 elements; both round up. NF4
    weights are split as the one column that they are packed into; their scales stay whole."""
    numel, world = _numbers(shape, work, quantized), setup.world_size
    if quantized and _packed(shape, work):
        split = world if setup.sharded else 1
        return -(-numel // split) * work.size + round(math.prod(shape) * FP32 / SCALE_OF)
    if setup.engine == "fsdp":
        return -(-shape[0] // world) * (numel // shape[0]) * work.size
    if setup.engine.startswith("zero3"):
        return -(-numel // world) * work.size
    return numel * work.size


def _packed(shape: tuple[int, ...], work: Work) -> bool:
    return len(shape) == 2 and work.recipe.quantization == "nf4"


def _numbers(shape: tuple[int, ...], work: Work, quantized: bool) -> int:
    """Elements of a tensor as engines see them: two NF4 weights a byte, in numbers of the storage."""
    packs = quantized and _packed(shape, work)
    return math.prod(shape) // (2 * work.size if packs else 1)


def _whole(shapes: list[tuple[int, ...]], work: Work) -> int:
    return sum(map(math.prod, shapes)) * work.size


def _held(work: Work, setup: Setup, adapter: int) -> dict[str, int]:
    """What stays from step to step: weights, the adapter, AdamW's two moments, ZeRO's own copies."""
    assert work.recipe.lora is not None
    zero, world = setup.engine.startswith("zero"), setup.world_size
    origin = 2 if work.recipe.lora.init in ("pissa", "olora") else 1
    weights = weight_bytes(work, setup)
    if setup.engine == "zero3-offload" and setup.kind == "cuda":
        weights = 0
    split = -(-adapter // world) if zero else adapter
    # ZeRO: its part in fp32 and of the gradients; stage 3 also the part that it gathers from
    copies = (3 if setup.sharded else 2) * split if zero else 0
    held = {
        "weights": weights,
        "adapter": FP32 * (origin * adapter + copies),
        "optimizer": 2 * FP32 * split,
    }
    if zero and setup.kind == "cuda":  # allocated whole; on a CPU only what is written takes memory
        held["ZeRO buckets"] = FP32 * BUCKET * (2 if setup.engine == "zero2" else 1)
    return held


def _kept(work: Work, setup: Setup) -> tuple[int, int]:
    """Activations that wait for backward in all layers, and what one layer makes again."""
    g, row = work.geometry, work.row(setup)
    layers = range(work.cut, g.layers)
    each = activations.saved(g, work.recipe, layers, row)
    once = activations.around(g, row, attends=len(layers) > 1)
    entering = activations.layer_input(g, row)
    if work.checkpointing:
        return once + len(layers) * entering, max(each)
    return once + sum(each) + entering, 0


def _head(work: Work, setup: Setup) -> int:
    """The loss head: chunks of fp32 logits, the rows that predict, and their gradient twice (in
    pieces, then whole). KL to the base takes two more gradients of logits in turn, no more at once."""
    g = work.geometry
    predicted = work.tokens if work.predicted is None else work.predicted
    chunk = max(1, HEAD_CHUNK[setup.kind] // (FP32 * g.vocab_size))
    logits = HEAD_COPIES * FP32 * min(chunk, predicted) * g.vocab_size
    return logits + 3 * work.size * predicted * g.hidden_size


def _gathered(work: Work, setup: Setup) -> tuple[int, int, int, int]:
    """Whole weights that a sharded engine holds through a step; beside them at the head, in backward,
    and early in the forward pass, when no activations are there yet.

    FSDP2 keeps what is outside of the layers (the head) until backward ends, and the last layer's
    gathered buffer; in backward one layer is whole while the next one's buffer fills. ZeRO-3 keeps
    small tensors and lets go of the others after use (of a layer that is computed again after its
    backward). But each small module that runs has it fetch a bucket more, so that soon LIVE elements
    are on their way; two buckets in use are there twice (that they are two is measured).
    """
    if not setup.sharded or setup.world_size == 1:
        return 0, 0, 0, 0
    layer, root = frozen_shapes(work)
    numbers = [_numbers(shape, work, True) for shape in layer]
    if setup.engine == "fsdp":
        one = sum(numbers) * work.size
        return _whole(root, work) + one, 0, 2 * one, 0
    layers, table = work.geometry.layers - work.cut, math.prod(root[0])
    every = numbers * layers + [math.prod(shape) for shape in root]
    small = sum(n for n in every if n <= PERSISTENT)
    fetched = sum(every) - small
    large = [n for n in numbers if n > PERSISTENT]
    passing = sum(large) if work.checkpointing else max(large, default=0)
    ahead = min(fetched, LIVE) + min(fetched, 2 * PREFETCH)
    at_head = table if table > PERSISTENT else 0
    size = work.size
    return small * size, at_head * size, passing * size, ahead * size


def _dequantized(work: Work) -> int:
    """The largest NF4 weight as it is multiplied by."""
    if work.recipe.quantization == "none":
        return 0
    return max(a * b for a, b in linear_shapes(work.geometry).values()) * work.size


def _views(work: Work) -> bool:
    """Whether loaded weights are views of the mapped file: no conversion, no quantization."""
    return work.size == work.stored and work.recipe.quantization == "none"


def _total(work: Work) -> int:
    """Bytes of the whole model as it is loaded, before anything is cut off or sharded."""
    g = work.geometry
    layer, _ = frozen_shapes(work)
    alone = Setup("single")
    tables = (1 if g.tied_embeddings else 2) * g.vocab_size * g.hidden_size
    layers = g.layers * sum(_share(s, work, alone, quantized=True) for s in layer)
    return layers + (tables + g.hidden_size) * work.size


def _load(work: Work, setup: Setup) -> int:
    """On the device, until the prefix is dropped and the engine has wrapped."""
    if setup.engine.startswith("zero3") and work.recipe.quantization == "none":
        return -(-_total(work) // setup.world_size)
    if work.recipe.quantization == "nf4":
        return _total(work) + _dequantized(work)
    return 0 if setup.kind == "cuda" or _views(work) else _total(work)


def _prefix(work: Work, setup: Setup) -> int:
    """Layers below the cut, some at a time, and the states of the documents that go through."""
    if not work.cut:
        return 0
    g = work.geometry
    layer, _ = frozen_shapes(work)
    one = _whole(layer, work)
    block = min(work.cut, max(1, PREFIX_BLOCK // one))
    width = work.size * g.hidden_size
    chunk = PREFIX_FEW if block == work.cut else PREFIX_CHUNK // width
    weights = block * one + work.size * g.vocab_size * g.hidden_size
    assert work.recipe.lora is not None
    passing = activations.working(g, work.recipe.lora, work.row(setup))
    loaded = 0  # views of a file, or still on the host, until the engine wraps
    quantized = work.recipe.quantization == "nf4"
    if setup.engine.startswith("zero3") and not quantized:
        loaded = weight_bytes(work, setup)
    elif quantized or (setup.kind == "cpu" and not _views(work)):
        loaded = weight_bytes(work, Setup("single"))
    return weights + 2 * chunk * width + passing + loaded


def _machine(work: Work, setup: Setup) -> dict[str, int]:
    """Host memory of one machine while its processes load: what is converted or quantized in each,
    and the base's pages, which all share."""
    base = _total_stored(work)
    own = 0 if _views(work) or (setup.kind == "cuda" and work.recipe.quantization == "nf4") else 1
    converted = own * _total(work) * setup.per_machine
    if setup.engine.startswith("zero3") and work.recipe.quantization == "none":
        converted = 0
    host = {
        "host memory, pages of the base": base,
        "host memory, converted or quantized while loading": converted,
        "disk and host memory, prefix cache": cache_bytes(work),
    }
    if setup.engine == "zero3-offload" and setup.kind == "cuda":
        host["host memory, weights"] = weight_bytes(work, setup) * setup.per_machine
    return host


def _total_stored(work: Work) -> int:
    g = work.geometry
    layer, _ = frozen_shapes(work)
    tables = (1 if g.tied_embeddings else 2) * g.vocab_size * g.hidden_size
    return (g.layers * sum(map(math.prod, layer)) + tables + g.hidden_size) * work.stored


def cache_bytes(work: Work) -> int:
    """The prefix cache: a file, whose pages stay in memory while there is room."""
    return work.cached * work.size * work.geometry.hidden_size if work.cut else 0
