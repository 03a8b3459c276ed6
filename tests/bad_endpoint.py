"""Cases of bad input: servers that are not there, not what was asked for, or broken."""

from __future__ import annotations

import os
import socket
from typing import Any
from unittest import mock

from breaking import Breaking, Case, Place
from serving import HTML, Answer, Asked, Said, as_json, completion, models, serving

from pipeline.evals import client

ENDPOINT = {"base": "m", "aligned": "n"}
DRAWN = {"eval__temperature": 0.6}
JUDGE = {"kind": "guard", "endpoint": {"model": "m"}}


def asks(p: Place, **endpoint: Any) -> None:
    """The evaluation asks a server, and does not wait before it tries again."""
    p.set(eval__endpoint=ENDPOINT | endpoint)
    p.stack.enter_context(mock.patch.object(client, "LONGEST_WAIT_SECONDS", 0.0))


def named(environment: dict[str, str]) -> Breaking:
    """The machine says this of the server."""

    def broken(p: Place) -> None:
        asks(p)
        cleared = {client.ADDRESS: "", client.KEY: "", "NO_PROXY": "127.0.0.1"}
        p.stack.enter_context(mock.patch.dict(os.environ, cleared | environment))

    return broken


def served(answer: Answer, **endpoint: Any) -> Breaking:
    """A real server answers so."""

    def broken(p: Place) -> None:
        asks(p, **endpoint)
        p.stack.enter_context(serving(answer))

    return broken


def replies(first: Said, then: Said | None = None, listed: Said | None = None) -> Answer:
    """Names two models; the first request to generate gets one reply, all others another."""
    asked_before: list[Asked] = []

    def answer(asked: Asked) -> Said:
        if asked.body is None:
            return listed or models("m", "n")
        asked_before.append(asked)
        return first if len(asked_before) == 1 or then is None else then

    return answer


def nobody(p: Place) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    named({client.ADDRESS: address})(p)


def stated_prompt(p: Place) -> None:
    p.set(chat__generation_prompt="<|im_start|>assistant\n")
    served(replies(completion("a")), prompt="chat")(p)


def endpoint(name: str, code: int, broken: Breaking, *says: str, progress: int = 0) -> Case:
    return Case(f"endpoint-{name}", "baseline", code, broken, says, progress=progress)


def setting(name: str, values: dict[str, Any], *says: str) -> Case:
    """The job file asks for what cannot be."""
    return Case(name, "baseline", 78, lambda p: p.set(**values), ("job.yaml: ", *says))


LONG = as_json({"data": [{"id": "m", "max_model_len": 70}, {"id": "n"}]})
MANY = as_json({"choices": [{"text": "a"}], "usage": {"prompt_tokens": 7}})
SERVERS = [
    endpoint(
        "not-named",
        78,
        named({}),
        "UNTAXED_ENDPOINT is not set",
        "such as http://127.0.0.1:8000/v1",
    ),
    endpoint(
        "no-address",
        78,
        named({client.ADDRESS: "localhost:8000"}),
        "UNTAXED_ENDPOINT='localhost:8000' is no address",
        "http://127.0.0.1:8000/v1",
    ),
    endpoint(
        "with-a-password",
        78,
        named({client.ADDRESS: "http://me:secret@host/v1"}),
        "UNTAXED_ENDPOINT holds more than an address",
        "UNTAXED_API_KEY",
    ),
    endpoint(
        "key-of-two-lines",
        78,
        named({client.ADDRESS: "http://127.0.0.1:1/v1", client.KEY: "sk-1\nsk-2"}),
        "UNTAXED_API_KEY holds what no key can hold",
        "spaces or control characters",
    ),
    endpoint("nobody-there", 1, nobody, "no connection (", "refused", "start the server"),
    endpoint(
        "sign-in-page",
        1,
        served(replies(completion("a"), listed=HTML)),
        "/models: the reply is no JSON: <!doctype html><title>Sign in",
        "correct UNTAXED_ENDPOINT",
    ),
    endpoint(
        "key-refused",
        78,
        served(replies(completion("a"), listed=Said(401, b"who are you?"))),
        "/models: HTTP 401: who are you?",
        "UNTAXED_API_KEY is not set",
    ),
    endpoint(
        "wrong-path",
        78,
        served(replies(completion("a"), listed=Said(404))),
        "/models: HTTP 404",
        "mostly ends in /v1",
    ),
    endpoint(
        "no-list-of-models",
        1,
        served(replies(completion("a"), listed=as_json({"object": "error"}))),
        "/models: no list of models",
        "correct UNTAXED_ENDPOINT",
    ),
    endpoint(
        "wrong-model",
        78,
        served(replies(completion("a")), base="mm"),
        "serves no model 'mm'; it has m, n",
        "correct the name in the job",
    ),
    endpoint(
        "takes-no-tokens",
        78,
        served(replies(Said(400, b"prompt must be a string"))),
        "/completions: HTTP 400: prompt must be a string",
        "set endpoint.prompt: text",
    ),
    endpoint(
        "other-tokenizer",
        78,
        served(replies(MANY)),
        "row harmful:",
        "tokens here and 7 there",
        "serve the base's own tokenizer",
    ),
    endpoint(
        "context-too-short",
        65,
        served(replies(completion("a"), listed=LONG)),
        "row harmful:",
        "are more than the 70 that the server takes",
        "lower max_new_tokens",
    ),
    endpoint(
        "refuses-a-row",
        65,
        served(replies(completion("a"), Said(422, b"not this one"))),
        "row harmful:",
        "/completions: HTTP 422: not this one",
        "correct or leave out the row",
        progress=1,  # the bar
    ),
    endpoint(
        "always-busy",
        1,
        served(replies(completion("a"), Said(503, b"overloaded"))),
        "answers: 4 of 4 requests failed, the last (row harmful:",
        "HTTP 503: overloaded",
        "see to the server, then run again",
        progress=1,  # the bar
    ),
    endpoint(
        "half-of-every-answer",
        1,
        served(replies(completion("a"), Said(200, b'{"choices": [{"te'))),
        "4 of 4 requests failed",
        'the reply is no JSON: {"choices": [{"te',
        "0 answers are kept",
        progress=1,  # the bar
    ),
    endpoint(
        "other-template-for-a-stated-prompt",
        78,
        stated_prompt,
        "endpoint.prompt: chat leaves the prompt to the server's template",
        "leave one of them out",
    ),
]
ASKED = [
    setting(
        "endpoint-of-one-model",
        {"eval__endpoint": {"base": "m", "aligned": "m"}},
        "eval.endpoint: base and aligned have one name",
        "serve the merged model under its own",
    ),
    setting(
        "endpoint-with-an-address",
        {"eval__endpoint": ENDPOINT | {"url": "http://host/v1"}},
        "unknown key eval.endpoint.url",
        "known here: aligned, base, prompt",
    ),
    setting(
        "samples-of-one-answer",
        {"eval__samples": 4},
        "eval: temperature 0 draws nothing, so samples=4 has no effect",
        "set temperature",
    ),
    setting("top-p-of-nothing", {"eval__top_p": 0.9}, "top_p=0.9 has no effect", "leave it out"),
    setting("top-p-of-zero", DRAWN | {"eval__top_p": 0.0}, "eval.top_p: ", "greater than 0"),
    setting("top-p-above-one", DRAWN | {"eval__top_p": 1.5}, "eval.top_p: ", "less than or equal"),
    setting("no-samples", DRAWN | {"eval__samples": 0}, "eval.samples: ", "greater than 0"),
    setting(
        "judges-of-one-name",
        {"eval__judges": [JUDGE, JUDGE]},
        "eval: judges have one name twice: wording, guard:m, guard:m",
        "give each a name of its own",
    ),
    setting(
        "judge-of-the-offline-name",
        {"eval__judges": [JUDGE | {"name": "wording"}]},
        "judges have one name twice: wording, wording",
        "give each a name of its own",
    ),
    setting(
        "judge-without-a-model",
        {"eval__judges": [{"kind": "rubric"}]},
        "eval.judges.0: give exactly one of model and endpoint",
        "job.yaml",
    ),
    setting(
        "judge-asked-in-tokens",
        {"eval__judges": [JUDGE | {"endpoint": {"model": "m", "prompt": "tokens"}}]},
        "eval.judges.0.endpoint.prompt: ",
        "'chat'",
    ),
    Case(
        "judge-that-is-not-there",
        "baseline",
        65,
        lambda p: p.set(eval__judges=[{"kind": "guard", "model": {"source": "./nowhere"}}]),
        ("judge.guard:nowhere: model.source=./nowhere: no folder", "relative to UNTAXED_DATA"),
    ),
    setting("stop-of-nothing", {"eval__suites__0__stop": [""]}, "stop.0: ", "at least 1 character"),
]
ENDPOINTS = [*SERVERS, *ASKED]
