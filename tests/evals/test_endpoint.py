"""A served model against the embedded one: the same small model behind a real server."""

from __future__ import annotations

import _thread
import json
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parts import ROOT
from served import GREEDY, PROMPTS, answers, asked_of, embedded, log, opened, text_of
from serving import Asked, RealModels, Said, as_json, completion, models, script, serving

from pipeline.data.chat import Chat
from pipeline.errors import DataError, RecipeError, UntaxedError
from pipeline.evals import endpoint
from pipeline.evals.client import ADDRESS, ALIGNED_ADDRESS, Client, Server
from pipeline.evals.generate import loss
from pipeline.evals.score import Sampling
from pipeline.graph import STAGES
from pipeline.jobfile import load_job
from pipeline.model.base import load_model, load_tokenizer
from pipeline.recipes import ChatRecipe, EvalEndpoint

pytestmark = pytest.mark.usefixtures("no_waiting")


def test_greedy_answers_are_the_embedded_engines_token_for_token(
    real: RealModels, folders: dict[str, Path], chat: Chat, tmp_path: Path
) -> None:
    requests, ended = asked_of(chat, 24), set()
    with serving(real) as site:
        for name in ("base", "aligned"):
            got = answers(opened(chat, tmp_path, name), requests)
            assert got == embedded(folders[name], chat, requests)
            ended |= {generation.complete for generation in got}
    assert ended == {True, False}
    bodies = [body for body in site.posted("/completions") if body["max_tokens"] == 24]
    asked = sorted(body["prompt"] for body in bodies)
    assert asked == sorted(2 * [list(request.prompt_ids) for request in requests])
    assert all(body.items() >= endpoint.PLAIN_SAMPLING.items() for body in bodies)


@pytest.mark.parametrize("form", ["tokens", "text", "chat"])
def test_a_server_that_gives_text_alone(
    knows: Callable[[str], RealModels],
    folders: dict[str, Path],
    chat: Chat,
    tmp_path: Path,
    form: str,
) -> None:
    """The text is the embedded engine's; the tokens are those of the text, and its end."""
    requests = asked_of(chat)
    want = embedded(folders["base"], chat, requests)
    with serving(knows("tokens")) as site:
        got = answers(opened(chat, tmp_path, prompt=form), requests)
    for one, other in zip(got, want, strict=True):
        text = text_of(chat, other)
        assert (one.text, one.complete) == (text, other.complete)
        ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert one.ids == ids + ([2] if one.complete else [])
    path = "/chat/completions" if form == "chat" else "/v1/completions"
    assert len(site.posted(path)) == len(requests) + 1
    if form != "tokens":
        known = {"model", "max_tokens", "temperature", "top_p", "seed", "prompt", "messages"}
        assert all(set(body) <= known for body in site.posted()), "the plain protocol"


def test_samples_have_seeds_of_their_own_and_come_again(
    real: RealModels, chat: Chat, tmp_path: Path
) -> None:
    sampling = Sampling(4, 1.0, 7, top_p=0.9)
    requests = [r for sample in range(3) for r in asked_of(chat, 12, sample=sample)]
    with serving(real) as site:
        first = answers(opened(chat, tmp_path, sampling=sampling), requests)
        bodies = site.posted()[1:]
        again = answers(opened(chat, tmp_path, sampling=sampling), requests[::-1])[::-1]
        assert first == again
        assert (
            answers(opened(chat, tmp_path, sampling=replace(sampling, seed=8)), requests) != first
        )
    seeds = {body["seed"] for body in bodies}
    assert len(seeds) == len(requests) and all(0 <= seed < 2**31 for seed in seeds)
    assert {(body["temperature"], body["top_p"]) for body in bodies} == {(1.0, 0.9)}
    assert len({tuple(g.ids) for g in first[::10]}) == 3, "one prompt, three answers"


def test_the_loss_is_the_embedded_one(
    real: RealModels, folders: dict[str, Path], chat: Chat, tmp_path: Path
) -> None:
    pairs = [
        (r.prompt_ids, chat.target_ids(None, text[::-1], prompt=""))
        for r, text in zip(asked_of(chat), PROMPTS, strict=True)
    ]
    want = loss(load_model(folders["base"], torch.float32), pairs)
    with serving(real):
        got = opened(chat, tmp_path).losses(pairs, "test")
    assert [one and one[1] for one in got] == [tokens for _, tokens in want]
    assert [one[0] for one in got if one] == pytest.approx([nats for nats, _ in want], rel=1e-5)


@pytest.mark.parametrize(
    ("form", "what", "why"),
    [
        ("tokens", "tokens token_ids", "does not tell how likely a prompt is"),
        ("text", "tokens echo", "needs endpoint.prompt: tokens"),
        ("chat", "tokens echo", "needs endpoint.prompt: tokens"),
    ],
)
def test_without_a_loss_it_is_left_out_and_said(
    knows: Callable[[str], RealModels], chat: Chat, tmp_path: Path, form: str, what: str, why: str
) -> None:
    with serving(knows(what)):
        found = opened(chat, tmp_path, prompt=form).losses([([5, 6], [7]), ([5], [8])], "eval")
    assert found == [None, None]
    assert re.search(
        rf"eval: no loss from this server, so no reasoning_nll: .*{why}", log(tmp_path)
    )


def test_a_loss_that_fails_is_missing_and_many_stop(chat: Chat, tmp_path: Path) -> None:
    def answer(asked: Asked) -> Said:
        if asked.body is None:
            return models("m")
        ids = asked.body["prompt"]
        nats = [None] + [-0.5] * len(ids)
        if ids[0] in broken:
            nats[-2] = None
        return completion("x", logprobs={"token_logprobs": nats})

    pairs = [([100 + i, 6], [7, 8]) for i in range(30)]
    broken = set(range(105, 110))
    with serving(answer):
        found = opened(chat, tmp_path, "m").losses(pairs, "eval")
    assert found == [None if 5 <= i < 10 else (1.0, 2) for i in range(30)]
    broken = set(range(105, 130))
    with serving(answer), pytest.raises(UntaxedError, match="11 of 30 requests failed, the last"):
        opened(chat, tmp_path, "m").losses(pairs, "eval")


def test_the_facts_name_the_server_as_it_names_itself(
    real: RealModels, chat: Chat, tmp_path: Path
) -> None:
    with serving(real, key="sk-4711") as site:
        engine = opened(chat, tmp_path, "aligned")
    assert engine.facts == {
        "engine": "endpoint",
        "prompt": "tokens",
        "served": {"id": "aligned", "root": "/models/aligned", "max_model_len": 512},
    }
    assert site.url not in json.dumps(engine.facts) + engine.identity
    assert engine.identity == json.dumps(engine.facts, sort_keys=True)


def test_a_model_that_is_not_served(real: RealModels, chat: Chat, tmp_path: Path) -> None:
    with serving(real) as site:
        with pytest.raises(RecipeError) as caught:
            opened(chat, tmp_path, "algined")
    words = (site.url, "serves no model 'algined'; it has aligned, base, twin", "correct the name")
    assert all(word in str(caught.value) for word in words)


def test_another_tokenizer_or_a_token_too_many_is_refused(chat: Chat, tmp_path: Path) -> None:
    count = len(asked_of(chat)[0].prompt_ids)
    more = as_json({"choices": [{}], "usage": {"prompt_tokens": count + 1}})
    for form in ("tokens", "text"):
        with serving(script(more)), pytest.raises(RecipeError) as caught:
            answers(opened(chat, tmp_path, "m", form), asked_of(chat))
        assert f"row s:0 has {count} tokens here and {count + 1} there" in str(caught.value)
    with serving(script(more, then=completion("Fine."))):
        answers(opened(chat, tmp_path, "m", "chat"), asked_of(chat))
    assert "the model is asked otherwise than it is trained" in log(tmp_path)


def test_a_server_without_tokens_as_prompt_is_told_how(
    knows: Callable[[str], RealModels], chat: Chat, tmp_path: Path
) -> None:
    with (
        serving(knows("")),
        pytest.raises(RecipeError, match=r"HTTP 400: .*set endpoint\.prompt: text"),
    ):
        answers(opened(chat, tmp_path), asked_of(chat))


def test_a_stated_generation_prompt_is_not_for_the_servers_template(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    chat = Chat(
        load_tokenizer(folders["base"]), ChatRecipe(generation_prompt="<|im_start|>assistant\n")
    )
    with pytest.raises(RecipeError, match="leave one of them out"):
        opened(chat, tmp_path, prompt="chat")


def test_what_does_not_fit_is_refused_before_anything_is_asked(
    real: RealModels, chat: Chat, tmp_path: Path
) -> None:
    with serving(real) as site:
        with pytest.raises(
            DataError, match=r"row s:0: \d+ prompt tokens and 510 new ones are more"
        ):
            answers(opened(chat, tmp_path), asked_of(chat, 510))
    assert site.posted() == []


def test_the_row_that_is_refused_is_named(chat: Chat, tmp_path: Path) -> None:
    with serving(script(completion("a"), completion("b"), Said(400, b"too rude"))):
        with pytest.raises(DataError, match=r"row s:1: .*HTTP 400: too rude; correct or leave out"):
            answers(
                opened(chat, tmp_path, "m", sampling=replace(GREEDY, batch_rows=1)), asked_of(chat)
            )


def test_failures_are_told_row_by_row(chat: Chat, tmp_path: Path) -> None:
    def answer(asked: Asked) -> Said:
        if asked.body is None:
            return models("m")
        bad = asked.body["prompt"] == list(asked_of(chat)[3].prompt_ids)
        return Said(500) if bad else completion("Fine.")

    with serving(answer):
        got = answers(opened(chat, tmp_path, "m"), asked_of(chat))
    assert [g.error is not None for g in got] == [i == 3 for i in range(len(got))]
    assert got[3].error is not None and got[3].error.endswith("/completions: HTTP 500")
    assert (got[3].ids, got[3].complete) == ([], False)


def test_jobs_whose_aligned_models_have_other_names_share_the_baseline() -> None:
    job = load_job(ROOT / "jobs" / "quickstart.yaml")
    steps = []
    for base, aligned in (("b", "one"), ("b", "two"), ("c", "two")):
        asked = job.eval.model_copy(update={"endpoint": EvalEndpoint(base=base, aligned=aligned)})
        changed = job.model_copy(update={"eval": asked})
        steps.append([STAGES[name].recipe(changed) for name in ("baseline", "eval")])
    (first, second, third), evals = zip(*steps, strict=True)
    assert first == second != third
    assert len(set(map(repr, evals))) == 3
    assert STAGES["baseline"].recipe(job).model_dump()["endpoint"] is None


def test_a_stop_leaves_no_answer_half_told() -> None:
    """It comes while one is being told: that one is told to its end, and once."""
    told: list[str] = []

    def done(index: int, text: str) -> None:
        told.append(f"{text} began")
        if text == "B":
            _thread.interrupt_main()
            time.sleep(0.2)
        told.append(f"{text} ended")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Client(Server("http://127.0.0.1:9/v1"), 1.0, 1).each("abc", str.upper, done)
    finally:
        signal.signal(signal.SIGINT, before)
    assert told[:4] == ["A began", "A ended", "B began", "B ended"]
    assert told.count("B began") == 1


def test_the_aligned_model_may_have_an_address_of_its_own() -> None:
    one, own = {ADDRESS: "http://host:1/v1"}, {ALIGNED_ADDRESS: "http://host:2/v1"}
    assert Server.here(one, aligned=True).url == "http://host:1/v1"
    assert Server.here(one | own, aligned=True).url == "http://host:2/v1"
    assert Server.here(one | own).url == "http://host:1/v1"
    with pytest.raises(RecipeError, match=f"^{ALIGNED_ADDRESS}='host:2' is no address"):
        Server.here(one | {ALIGNED_ADDRESS: "host:2"}, aligned=True)
