"""Public data sets by name.

A job names one as ``source: "set:NAME"`` (fetched from the hub), or gives a file of the same columns and
``format: NAME``. An adapter turns a raw row into the columns that jobs read by default and says whether
the prompt is harmful, so that a source of kind refusal takes harmful rows only, anchors and answers
harmless ones, and a suite those that it measures. Adapters are in ``public_training.py`` and
``public_evaluation.py``. Torch-free.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pipeline.data.public import PublicSet
from pipeline.data.public_evaluation import EVALUATION
from pipeline.data.public_training import TRAINING
from pipeline.errors import DataError, RecipeError
from pipeline.recipes import SourceRecipe, TrainSource

SETS = TRAINING | EVALUATION


def find_set(name: str) -> PublicSet:
    """The set called ``name``; RecipeError, with the nearest name, when there is none."""
    if name not in SETS:
        close = difflib.get_close_matches(name, SETS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise RecipeError(f"no public set {name!r}; {hint}known: {', '.join(sorted(SETS))}")
    return SETS[name]


def set_of(source: SourceRecipe) -> PublicSet:
    """The public set that the rows of ``source`` are of.

    RecipeError where it may not be used so: trained on, fetched from a hub where it is not, or of a
    subset that there is not.
    """
    name = source.public or ""
    public = find_set(name)
    if isinstance(source, TrainSource) and public.split is None:
        raise RecipeError(
            f"source {source.name}: {name} is there to measure on and is not trained on; use it in"
            " eval.suites or prep.exclude"
        )
    if not source.source.startswith("set:"):
        return public
    if public.hub is None:
        raise RecipeError(
            f"source {source.name}: {name} is not on the hub; fetch {public.home} and name the file,"
            f" with format: {name}"
        )
    subset = source.subset or public.subset
    if public.subsets and subset not in public.subsets:
        close = difflib.get_close_matches(subset or "", public.subsets, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise RecipeError(
            f"source {source.name}: {name} has no subset {subset!r}; {hint}known:"
            f" {', '.join(public.subsets)}"
        )
    return public


def check_columns(public: PublicSet, name: str, there: Mapping[str, Any], shown: str) -> None:
    """DataError when a file has none of the column sets that rows of ``public`` come in."""
    if not any(set(columns) <= set(there) for columns in public.columns):
        wanted = " or ".join(", ".join(columns) for columns in public.columns)
        raise DataError(
            f"{shown}: its rows do not have the columns of {name}: got {', '.join(sorted(there))};"
            f" wanted {wanted}; give columns instead of format"
        )
