"""Which language a prompt is in, by py3langid: a naive Bayes model of 139 languages in its wheel,
without network. Torch-free.

Of a short prompt no model can be sure, so the question is not which language is likeliest but whether
the wanted ones can be ruled out: a prompt is foreign when they have less than ``SURE`` of the
probability, all together. Code, formulas and signs are of no language and never foreign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

from pipeline.errors import RecipeError

SURE = 0.01
NO_LANGUAGE = "zxx"  # what the model calls text without words, such as code


def method() -> str:
    """What foreign prompts are told by, in words."""
    return (
        f"py3langid {version('py3langid')}: less than {SURE:.0%} for the wanted languages together"
    )


@cache
def _model() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def foreign(wanted: Sequence[str]) -> Callable[[str], str | None]:
    """A function that returns the language of a prompt that is surely in none of ``wanted``, else
    None. RecipeError for a code that the model does not know."""
    model = _model()
    known = sorted(set(model.labels) - {NO_LANGUAGE})
    for code in wanted:
        if code not in known:
            hint = f"did you mean {code[:2]}? " if code[:2] in known else ""
            raise RecipeError(
                f"prep.languages: unknown language {code!r}; {hint}wanted ISO 639 codes of"
                f" {', '.join(known)}"
            )

    def language(prompt: str) -> str | None:
        ranked = dict(model.rank(prompt))
        # Where the model sees nothing it knows, all languages are alike: 2 of 140 are not ruled out.
        if sum(ranked[code] for code in {*wanted, NO_LANGUAGE}) >= SURE:
            return None
        return str(max(ranked, key=lambda code: ranked[code]))

    return language
