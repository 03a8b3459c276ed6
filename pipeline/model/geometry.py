"""What a decoder's shapes say before the model is on this machine: parameters, and where the frozen
prefix ends. Torch-free.

The counts are exact for the four architectures that ``Geometry`` knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError, RecipeError

if TYPE_CHECKING:
    from pipeline.recipes import Geometry, Job, LoraRecipe, SftRecipe

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
BF16_BYTES = 2


def geometry_of(config: Mapping[str, Any]) -> Geometry:
    """The shapes that a Hugging Face ``config.json`` states.

    DataError for another architecture, for a size that is missing, and for the optional biases that
    no model of these families is published with.
    """
    from pipeline.recipes import Geometry

    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise DataError(
            f"config.json: model_type {architecture!r}; shapes are known for"
            f" {', '.join(ARCHITECTURES)}"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise DataError(f"config.json: {key}=true is not counted; wanted false or absent")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Geometry(
            architecture=architecture,
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise DataError(f"config.json: {error.args[0]} is missing; wanted a whole config") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"config.json: a size is not a positive number: {error}") from error


def stored_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of one weight in the base's files, as ``config.json`` says; 2 where it does not."""
    stated = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return 4 if stated.endswith("float32") else 2


def cut_of(config: Mapping[str, Any], recipe: SftRecipe) -> tuple[int, str]:
    """Number of layers below the first adapted one, or 0 and why nothing can be cut off."""
    if recipe.lora is None:
        return 0, "full fine-tuning changes every layer"
    if config["model_type"] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return 0, f"the architecture {config['model_type']} is none of {known}"
    if config.get("attention_dropout"):
        return 0, "the base has dropout of its own"
    first = recipe.lora.layers.select(int(config["num_hidden_layers"]))[0]
    return first, "" if first else "layer 0 is adapted"


def linear_shapes(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear modules of one decoder layer, by name."""
    hidden, inner = geometry.hidden_size, geometry.intermediate_size
    query, key = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    return {
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def layer_parameters(geometry: Geometry) -> int:
    """Parameters of one decoder layer: linear modules, their biases, and norms."""
    shapes = linear_shapes(geometry)
    count = sum(rows * columns for rows, columns in shapes.values()) + 2 * geometry.hidden_size
    if geometry.architecture == "qwen2":
        count += sum(shapes[name][0] for name in ("q_proj", "k_proj", "v_proj"))
    if geometry.architecture == "qwen3":
        count += 2 * geometry.head_dim  # norms of queries and keys
    return count


def total_parameters(geometry: Geometry) -> int:
    """Parameters of the whole model; tied embeddings count once."""
    tables = 1 if geometry.tied_embeddings else 2
    embeddings = tables * geometry.vocab_size * geometry.hidden_size
    return embeddings + geometry.layers * layer_parameters(geometry) + geometry.hidden_size


def cache_bytes_per_token(geometry: Geometry) -> int:
    """Bytes that one token of one row takes in a bf16 cache of keys and values."""
    return 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * BF16_BYTES


def lora_parameters(geometry: Geometry, recipe: LoraRecipe) -> int:
    """Trainable parameters: rank x (in + out) for each adapted module.

    RecipeError as in training: unknown target, layers out of range, rank above a module's size.
    """
    shapes = linear_shapes(geometry)
    count = 0
    for name in dict.fromkeys(recipe.modules):
        if name not in shapes:
            raise RecipeError(
                f"sft.lora.targets: {name} matches no linear module; this model has"
                f" {', '.join(sorted(shapes))}"
            )
        if recipe.rank > min(shapes[name]):
            rows, columns = shapes[name]
            raise RecipeError(
                f"sft.lora.rank={recipe.rank} is above the size of {name} ({rows} x {columns})"
            )
        count += recipe.rank * sum(shapes[name])
    return count * len(recipe.layers.select(geometry.layers))


def plan_facts(job: Job, geometry: Geometry | None = None) -> dict[str, Any]:
    """What is known of ``job`` before anything runs; empty without shapes.

    ``geometry`` is that of the adopted base, if there is one; else the job file's is used.
    """
    shapes = geometry or job.base.geometry
    if shapes is None:
        return {}
    total, recipe = total_parameters(shapes), job.sft.lora
    facts: dict[str, Any] = {
        "parameters": total,
        "parameters_per_layer": layer_parameters(shapes),
        "weights_bytes_bf16": total * BF16_BYTES,
        "cache_bytes_per_token_bf16": cache_bytes_per_token(shapes),
    }
    if recipe is None:
        return facts | {"method": "full", "trainable_parameters": total}
    layers = recipe.layers.select(shapes.layers)
    return facts | {
        "method": "lora",
        "trainable_parameters": lora_parameters(shapes, recipe),
        "adapted_modules": len(set(recipe.modules)) * len(layers),
        "adapted_layers": len(layers),
        "first_layer": layers[0],
        "last_layer": layers[-1],
        "update_scale": recipe.scale,
    }
