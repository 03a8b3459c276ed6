"""What every recipe is made of: frozen models that refuse unknown keys, and strict numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _not_a_bool(value: object) -> object:
    """YAML's yes, on and true are no numbers; pydantic would read them as 1."""
    if isinstance(value, bool):
        raise ValueError("wanted a number")
    return value


Whole = Annotated[int, BeforeValidator(_not_a_bool)]
Real = Annotated[float, BeforeValidator(_not_a_bool)]
Fraction = Annotated[Real, Field(ge=0.0, le=1.0)]
Positive = Annotated[Whole, Field(gt=0)]
TopP = Annotated[Real, Field(gt=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]


class Frozen(BaseModel):
    """Immutable, and refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)
