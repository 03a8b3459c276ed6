"""Bytes that a packed row leaves behind for backward, term by term. Torch-free.

Nothing is fitted: each term is a tensor that an operation of the model saves (``grad_fn._saved_*``),
in the order in which a decoder layer runs. ``tests/model/test_activations.py`` counts them with
``torch.autograd.graph.saved_tensors_hooks`` and wants equality.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.recipes import ATTENTION, MLP, Geometry, LoraRecipe, SftRecipe

FP32 = 4
BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Row:
    """One micro-batch: ``tokens`` of one pack, ``dtype_bytes`` a number, and how attention is made.

    ``masked``: PyTorch's own attention with a mask of T x T, in place of attention by document (CPU),
    which keeps queries, keys and values alone, or FlashAttention (GPU). ``linear_inputs``: ZeRO-3's
    own linear function keeps its input, whether its weight is trained or not.
    """

    tokens: int
    dtype_bytes: int
    masked: bool = False
    on_gpu: bool = False
    linear_inputs: bool = False


def saved(
    geometry: Geometry, recipe: SftRecipe, layers: range, row: Row, *, inputs: bool = False
) -> list[int]:
    """Bytes that each of the decoder ``layers`` keeps for backward.

    Up to the first adapted module nothing needs a gradient and nothing is kept. With ``inputs`` the
    hidden states that enter the first of ``layers`` need one.
    """
    assert recipe.lora is not None
    adapted = set(recipe.lora.layers.select(geometry.layers))
    kept, gradient = [], inputs
    for layer in layers:
        targets = set(recipe.lora.modules) if layer in adapted else set()
        kept.append(_layer(geometry, recipe.lora, targets, row, gradient))
        gradient = gradient or bool(targets)
    return kept


def around(geometry: Geometry, row: Row, attends: bool) -> int:
    """What is kept once: the rotation's cosines and sines where a query or key needs a gradient, and
    the final norm's input."""
    rotation = 2 * row.dtype_bytes * geometry.head_dim if attends else 0
    return row.tokens * (rotation + _norm(geometry.hidden_size, 1))


def layer_input(geometry: Geometry, row: Row) -> int:
    """Hidden states between two layers: all that checkpointing keeps of a layer."""
    return row.tokens * row.dtype_bytes * geometry.hidden_size


def working(geometry: Geometry, recipe: LoraRecipe, row: Row) -> int:
    """Most that backward holds beside what was kept, while it is in the MLP of a layer.

    Either the gradients of the product and of both its factors; or, those factors let go of, the
    gradient of an adapter's output and its multiple in fp32. And two of hidden states.
    """
    factors = 3 * row.dtype_bytes
    if set(recipe.modules) & set(MLP):
        factors = max(factors, 2 * FP32)
    hidden = 2 * row.dtype_bytes * geometry.hidden_size
    return row.tokens * (factors * geometry.intermediate_size + hidden)


def _layer(
    geometry: Geometry, recipe: LoraRecipe, targets: set[str], row: Row, gradient: bool
) -> int:
    """One layer, in bytes; ``gradient``: its input needs one."""
    g, size = geometry, row.dtype_bytes
    queries, keys = g.heads * g.head_dim, g.kv_heads * g.head_dim
    token = 0

    def adapters(names: tuple[str, ...], width: int, gradient: bool, shared: bool) -> int:
        """x in fp32 (a copy of its own in each adapter, unless x is fp32 already: then one for all
        of ``names``, none where it is kept anyway: ``shared``), the rank's rows, dropout's mask."""
        here = [name for name in names if name in targets]
        copies = len(here) if size != FP32 or recipe.dropout else bool(here) and not shared
        mask = (1 if row.on_gpu else size) if recipe.dropout and gradient else 0
        return FP32 * width * copies + len(here) * (FP32 * recipe.rank + mask * width)

    def linear(width: int, gradient: bool) -> int:
        return size * width if row.linear_inputs and gradient else 0

    own, by_kernel = row.linear_inputs, row.masked or row.on_gpu
    if gradient:
        token += _norm(g.hidden_size, 1) + linear(g.hidden_size, gradient)
    token += adapters(("q_proj", "k_proj", "v_proj"), g.hidden_size, gradient, own and gradient)
    by = {name: gradient or name in targets for name in ATTENTION}
    if g.architecture == "qwen3":
        token += _norm(queries, g.heads) if by["q_proj"] else 0
        token += _norm(keys, g.kv_heads) if by["k_proj"] else 0
    attends = by["q_proj"] or by["k_proj"] or by["v_proj"]
    if attends:
        # keys and values, one for each query's head where there is a mask; a kernel's output and sums
        pairs = queries if row.masked else keys
        token += size * (queries + 2 * pairs)
        token += size * queries + FP32 * g.heads if by_kernel else 0
        token += size * row.tokens if row.masked else 0
    token += linear(queries, attends and not by_kernel)
    token += adapters(("o_proj",), queries, attends, attends and (by_kernel or own))
    gradient = attends or "o_proj" in targets
    if gradient:
        token += _norm(g.hidden_size, 1) + linear(g.hidden_size, gradient)
    token += adapters(("gate_proj", "up_proj"), g.hidden_size, gradient, own and gradient)
    gate, up = gradient or "gate_proj" in targets, gradient or "up_proj" in targets
    token += size * g.intermediate_size * (2 * gate + up)  # the gate, the other factor; silu(gate)
    token += linear(g.intermediate_size, gate or up)
    token += adapters(("down_proj",), g.intermediate_size, gate or up, own and (gate or up))
    return row.tokens * token


def _norm(width: int, groups: int) -> int:
    """Of RMSNorm: its input in fp32, and one root a group."""
    return FP32 * (width + groups)
