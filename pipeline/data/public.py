"""What a public data set is to us: where it lives, what it may be used for, how a row of it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Any]
HARMFUL = "harmful"  # True, False, or None where rows do not say and the job has to


@dataclass(frozen=True)
class PublicSet:
    """One data set.

    ``hub``: its id there; None where it is published as a file elsewhere, ``home``. ``read`` turns a
    row into the columns that jobs read by default (``prompt``, ``response``, ``category``), HARMFUL,
    and for reasoning problems ``reference`` and ``ask``: what a right answer is, and what a suite adds
    to the prompt so that answers come in a form that can be read. ValueError where a row has no usable
    reference. ``columns``: alternatives of what its rows have. ``split``: what sources of ``set:NAME``
    train on, None where nothing may be trained on; ``test_split`` what suites measure on (default:
    all), unless the job says. ``subsets``: those that a job has to choose from. ``options``: for
    ``load_dataset``.
    """

    hub: str | None
    read: Callable[[Values], dict[str, Any]]
    columns: tuple[tuple[str, ...], ...]
    licence: str
    subset: str | None = None
    split: str | None = "train"
    test_split: str | None = None
    subsets: tuple[str, ...] = ()
    home: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def truth(value: Any) -> bool:
    """A truth value that a CSV file may have written as a word."""
    return value if isinstance(value, bool) else str(value).strip().lower() in {"true", "1"}
