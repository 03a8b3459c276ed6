"""How replies of a server are read, and whether it is the base that is served under both names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from served import answers, asked_of, opened, said
from serving import Asked, RealModels, Said, as_json, completion, script, serving

from pipeline.data.chat import Chat
from pipeline.errors import DataError
from pipeline.evals.asking import Generation
from pipeline.evals.endpoint import check_changed
from pipeline.evals.replies import BadReply, models_of
from pipeline.model.base import load_tokenizer
from pipeline.recipes import ChatRecipe

pytestmark = pytest.mark.usefixtures("no_waiting")


def test_names_of_models() -> None:
    assert models_of({"data": [{"id": "a", "created": 5, "root": "/x", "max_model_len": 9}]}) == {
        "a": {"id": "a", "root": "/x", "max_model_len": 9}
    }
    for bad in ({}, {"data": {}}, {"data": ["a"]}):
        with pytest.raises(BadReply, match="no list of models"):
            models_of(bad)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize(
    ("content", "finish", "text", "parted"),
    [
        ("Fine.", "stop", "<think>\nHm.\n</think>\n\nFine.", ("Hm.", "Fine.")),
        (None, "length", "<think>\nHm.", ("Hm.", "")),
        ("", "stop", "<think>\nHm.\n</think>\n\n", ("Hm.", "")),
    ],
)
def test_thoughts_that_the_server_has_parted(
    chat: Chat, tmp_path: Path, name: str, content: str, finish: str, text: str, parted: Any
) -> None:
    choice = {"message": {"content": content, name: "Hm."}, "finish_reason": finish}
    got = said(chat, tmp_path, as_json({"choices": [choice]}))
    assert (got.text, got.complete) == (text, finish == "stop")
    assert chat.split_think(text) == parted


def test_thoughts_after_a_prompt_that_opens_the_section(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(folders["base"])
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"
    )
    chat = Chat(tokenizer, ChatRecipe())
    choice = {"message": {"content": "Fine.", "reasoning": "Hm."}, "finish_reason": "stop"}
    got = said(chat, tmp_path, as_json({"choices": [choice]}))
    assert got.text == "Hm.\n</think>\n\nFine."


def test_a_complete_answer_ends_with_one_end_token(chat: Chat, tmp_path: Path) -> None:
    """Some servers give the end token among the tokens, others do not."""
    fine = chat.tokenizer("Fine.", add_special_tokens=False)["input_ids"]
    for ids in (fine, [*fine, 2]):
        got = said(chat, tmp_path, completion("Fine.", token_ids=ids), "tokens")
        assert got == Generation([*fine, 2], True)
    got = said(chat, tmp_path, completion("Fine.", token_ids=[*fine, 0]), "tokens")
    assert got == Generation([*fine, 0], True)
    got = said(chat, tmp_path, completion("Fine.", "length", token_ids=fine), "tokens")
    assert got == Generation(fine, False)


def test_half_a_character_is_read_as_unknown(chat: Chat, tmp_path: Path) -> None:
    body = b'{"choices": [{"text": "a\\ud83d b\\ud83d\\ude00", "finish_reason": "stop"}]}'
    got = said(chat, tmp_path, Said(200, body), "tokens")
    assert got.text == "a\ufffd b\U0001f600"


def test_template_options_reach_the_servers_template(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = ChatRecipe(system="Be kind.", template_options={"enable_thinking": False})
    chat = Chat(load_tokenizer(folders["base"]), recipe)
    with serving(script(then=completion("Fine."))) as site:
        answers(opened(chat, tmp_path, "m", "chat"), asked_of(chat)[:1])
    (_, body) = site.posted()
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["messages"][0] == {"role": "system", "content": "Be kind."}


def test_a_first_token_that_the_server_will_add_is_not_sent_twice(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Llama's and DeepSeek's templates write it, and servers put it before a text by themselves."""
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = load_tokenizer(folders["base"])
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.chat_template = "<|endoftext|>" + tokenizer.chat_template
    chat = Chat(tokenizer, ChatRecipe())
    (request, *_) = asked_of(chat)
    assert request.prompt_ids[0] == 0
    usage = {"prompt_tokens": len(request.prompt_ids)}
    with serving(
        script(then=as_json({"choices": [{"text": "a", "finish_reason": "stop"}], "usage": usage}))
    ) as site:
        answers(opened(chat, tmp_path, "m", "text"), [request])
    assert tokenizer(site.posted()[1]["prompt"])["input_ids"] == list(request.prompt_ids)


@pytest.mark.parametrize(("form", "what"), [("tokens", ""), ("chat", ""), ("tokens", "deaf")])
def test_the_base_under_both_names_is_found_out(
    real: RealModels, chat: Chat, tmp_path: Path, form: str, what: str
) -> None:
    def answer(asked: Asked) -> Said:
        if what == "deaf" and asked.body is not None and "logprobs" in asked.body:
            return Said(400, b"logprobs are not for you")
        return real(asked)

    requests = asked_of(chat)[:4]
    with serving(answer):
        base, twin, aligned = (
            opened(chat, tmp_path, name, form) for name in ("base", "twin", "aligned")
        )
        check_changed(base, aligned, requests)
        with pytest.raises(DataError) as caught:
            check_changed(base, twin, requests)
    words = ("twin answers 4 probes as base does", "0 differ in words", "serve the merged model")
    assert all(word in str(caught.value) for word in words)


def replies(*nats: float, text: str = "Fine.") -> list[Said]:
    return [completion(text, logprobs={"token_logprobs": [value]}) for value in nats]


@pytest.mark.parametrize(
    ("first", "again", "other", "text", "changed"),
    [
        (-1.0, -1.0, -1.0, "Fine.", False),
        (-1.0, -1.0, -1.005, "Fine.", False),  # as two runs of one model may differ
        (-1.0, -1.0, -1.02, "Fine.", True),
        (-1.0, -1.01, -1.02, "Fine.", False),  # this server is noisy
        (-1.0, -1.01, -1.04, "Fine.", True),
        (-1.0, -1.0, -1.0, "No.", True),
    ],
)
def test_what_counts_as_changed(
    chat: Chat, tmp_path: Path, first: float, again: float, other: float, text: str, changed: bool
) -> None:
    """Each run of the probes asks once more at first, to see whether there are log-probabilities."""
    base = replies(first, first, again, again)
    said = [*base, *replies(other, other, text=text)]
    with serving(script(*said, names=("b", "a"))):
        before, after = opened(chat, tmp_path, "b"), opened(chat, tmp_path, "a")
        if changed:
            check_changed(before, after, asked_of(chat)[:1])
            return
        with pytest.raises(DataError, match="serve the merged model under that name"):
            check_changed(before, after, asked_of(chat)[:1])
