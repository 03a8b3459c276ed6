"""Learning rate by step."""

from __future__ import annotations

import math

from pipeline.recipes import OptimizerRecipe


def learning_rate(recipe: OptimizerRecipe, step: int, steps: int) -> float:
    """Rate of ``step`` (0-based) of ``steps``: linear warm-up, then decay towards zero."""
    warmup = recipe.warmup_steps
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if recipe.schedule == "cosine":
        return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    if recipe.schedule == "linear":
        return recipe.learning_rate * (1.0 - progress)
    return recipe.learning_rate
