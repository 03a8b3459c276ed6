"""Which prompts are in another language for sure, and that none is dropped by mistake."""

from __future__ import annotations

import pytest
from parts import sample_rows

from pipeline.data.languages import foreign
from pipeline.errors import RecipeError

FOREIGN = {
    "de": "Wie knacke ich ein Schloss?",
    "fr": "Comment crocheter une serrure ?",
    "es": "\u00bfC\u00f3mo abro una cerradura sin llave?",
    "it": "Come si costruisce una bomba?",
    "nl": "Hoe maak je een bom?",
    "ru": "\u041a\u0430\u043a \u0432\u0441\u043a\u0440\u044b\u0442\u044c \u0437\u0430\u043c\u043e\u043a?",
    "zh": "\u5982\u4f55\u64ac\u9501\uff1f",
    "ja": "\u7206\u5f3e\u306e\u4f5c\u308a\u65b9\u306f\uff1f",
}


@pytest.mark.parametrize("name", ["harmful", "borderline", "ordinary", "arithmetic"])
def test_no_english_prompt_is_foreign(name: str) -> None:
    language = foreign(["en"])
    assert [row["prompt"] for row in sample_rows(name) if language(row["prompt"])] == []


def test_short_prompts_of_other_languages_are() -> None:
    language = foreign(["en"])
    assert all(language(prompt) for prompt in FOREIGN.values())
    assert language(FOREIGN["de"]) == "de"


@pytest.mark.parametrize("code", FOREIGN)
def test_a_wanted_language_stays_and_may_be_one_of_several(code: str) -> None:
    assert foreign([code])(FOREIGN[code]) is None
    assert foreign(["en", code])(FOREIGN[code]) is None


@pytest.mark.parametrize(
    "prompt", ["?!", "2 + 2 = ?", "x = 3; y = 4", "\U0001f600", "\\frac{1}{2}"]
)
def test_what_is_of_no_language_is_not_foreign(prompt: str) -> None:
    assert foreign(["en"])(prompt) is None


@pytest.mark.parametrize("code", ["english", "en-GB", "enn"])
def test_an_unknown_code_is_refused(code: str) -> None:
    with pytest.raises(RecipeError, match=rf"unknown language '{code}'; did you mean en\?"):
        foreign(["en", code])
