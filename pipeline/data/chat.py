"""Conversations to tokens: the tokenizer's own chat template, prompt and target apart.

Prompt and target are tokenised separately, so that what training sees after the generation prompt
is exactly what generation continues from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError, RecipeError
from pipeline.recipes import ChatRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


class Chat:
    """Renders conversations with one tokenizer and one ChatRecipe.

    Raises DataError when the tokenizer has no chat template or no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: ChatRecipe) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; use an instruct"
                " model, or add chat_template.jinja to its folder"
            )
        if tokenizer.eos_token_id is None:
            raise DataError(f"{tokenizer.name_or_path}: the tokenizer has no end token")
        self.tokenizer: Any = tokenizer
        self.recipe = recipe
        self.end_id: int = tokenizer.eos_token_id
        self.encode(["set up before threads use it"])

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The text up to where the assistant's answer begins."""
        return self.prompt_texts([messages])[0]

    def prompt_texts(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """``prompt_text`` of each conversation; DataError names the one that the template refuses."""
        full = [self.with_system(messages) for messages in conversations]
        stated = self.recipe.generation_prompt
        try:
            texts = self.tokenizer.apply_chat_template(
                full,
                tokenize=False,
                add_generation_prompt=stated is None,
                **self.recipe.template_options,
            )
        except Exception as error:  # jinja2 errors of a template are the tokenizer's, not ours
            if len(full) > 1:
                return [self.prompt_text(messages) for messages in conversations]
            raise DataError(f"chat template fails on {str(full[0])[:80]}: {error}") from error
        return [text + (stated or "") for text in texts]

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.recipe.system is None or messages[0]["role"] == "system":
            return list(messages)
        return [{"role": "system", "content": self.recipe.system}, *messages]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of ``prompt_text``, special tokens as the template wrote them."""
        return self.encode([self.prompt_text(messages)])[0]

    def target_text(self, think: str | None, response: str | None, *, prompt: str) -> str:
        """What the assistant writes: the think section, if any, then the response. Thoughts without a
        response (a safety primer) stay open.

        A section that the template opened itself (DeepSeek-R1) is not opened twice, and is closed
        before a response without thoughts. RecipeError where the template closed it already, and for
        a primer where the model does not think.
        """
        open_, close = self.recipe.think_open, self.recipe.think_close
        opened = bool(open_.strip()) and prompt.rstrip().endswith(open_.strip())
        if think is None:
            response = response or ""
            return f"{close}{response}" if opened else response
        if close.strip() and prompt.rstrip().endswith(close.strip()):
            raise RecipeError(
                "chat: the generation prompt ends with a closed think section, and a row has"
                " thoughts of its own; leave prep.refusal_think and prep.safety_primer out, or let the"
                " template think (chat.template_options)"
            )
        if response is None and not self._thinks:
            raise RecipeError(
                "prep.safety_primer begins a think section, and neither template nor tokenizer has"
                f" chat.think_open={open_!r}; leave the primer out, or set chat.think_open to the mark"
                " that opens this model's"
            )
        if opened:
            open_ = "" if prompt.endswith(open_) else open_[len(open_.rstrip()) :]
        return f"{open_}{think}" if response is None else f"{open_}{think}{close}{response}"

    @property
    def _thinks(self) -> bool:
        """Whether the job states the mark that opens a think section, or template or tokenizer has it."""
        mark = self.recipe.think_open.strip()
        known = [str(self.tokenizer.chat_template), *self.tokenizer.get_added_vocab()]
        stated = "think_open" in self.recipe.model_fields_set
        return bool(mark) and (stated or any(mark in text for text in known))

    def target_ids(self, think: str | None, response: str | None, *, prompt: str) -> list[int]:
        """Token ids of the target, closed by the end token where there is a response."""
        ids = self.encode([self.target_text(think, response, prompt=prompt)])[0]
        return ids if response is None else [*ids, self.end_id]

    def split_think(self, text: str, *, prompt: str = "") -> tuple[str | None, str]:
        """Split a generated text into its think section (None if there is none) and the answer.

        A think section that was opened and never closed leaves an empty answer.
        """
        open_, close = self.recipe.think_open.strip(), self.recipe.think_close.strip()
        opened_by_prompt = bool(open_) and prompt.rstrip().endswith(open_)
        if not close or not (opened_by_prompt or text.lstrip().startswith(open_)):
            return None, text
        body = text if opened_by_prompt else text.lstrip().removeprefix(open_)
        think, closed, answer = body.partition(close)
        return (think.strip(), answer.lstrip("\n")) if closed else (body.strip(), "")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text and no others; many at once are much faster than one by one, and a
        text that is there more than once (a refusal) is tokenised once.

        The first goes through transformers, which sets up the tokenizer below it; where transformers
        would do nothing else, that takes the others, without character offsets that nobody reads.
        """
        if not texts:
            return []
        distinct = list(dict.fromkeys(texts))
        first, others = distinct[:1], distinct[1:]
        if not _is_plain(self.tokenizer):
            first, others = distinct, []
        options = {"return_attention_mask": False, "return_token_type_ids": False}
        ids: list[list[int]] = self.tokenizer(first, add_special_tokens=False, **options)[
            "input_ids"
        ]
        backend = self.tokenizer.backend_tokenizer if others else None
        if backend is not None:
            encoded = backend.encode_batch_fast(others, add_special_tokens=False)
            ids.extend(encoding.ids for encoding in encoded)
        ids_of = dict(zip(distinct, ids, strict=True))
        return [ids_of[text] for text in texts]


def cut(answer: str, stop: Sequence[str]) -> str | None:
    """``answer`` up to the first of the ``stop`` texts; None when it holds none of them."""
    places = [place for place in map(answer.find, stop) if place >= 0]
    return answer[: min(places)] if places else None


def _is_plain(tokenizer: Any) -> bool:
    """True where transformers hands texts to the tokenizers library as they are."""
    from transformers import TokenizersBackend

    return getattr(type(tokenizer), "_encode_plus", None) is TokenizersBackend._encode_plus


def check_generation_prompt(recipe: ChatRecipe) -> None:
    """RecipeError for a stated generation prompt that is empty: the answer would start anywhere."""
    if recipe.generation_prompt == "":
        raise RecipeError("chat.generation_prompt is empty; leave it out to use the template's own")
