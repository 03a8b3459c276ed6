"""The client against a real server that misbehaves in every way; time is counted, never waited for."""

from __future__ import annotations

import email.utils
import os
import signal
import socket
import threading
from typing import Any
from unittest import mock

import pytest
from serving import HTML, Asked, Said, as_json, completion, script, serving

from pipeline.errors import RecipeError, UntaxedError
from pipeline.evals import client as module
from pipeline.evals.client import ADDRESS, KEY, Client, Failed, Refused, Server
from pipeline.evals.replies import Reply, answer_of

BODY = {"model": "m", "prompt": "Hello"}
GOOD = completion("Fine.")
SECRET = "sk-do-not-tell-4711"


def status(code: int, **headers: str) -> Said:
    return Said(code, b'{"error": {"message": "what it says"}}', headers)


class Waits(list[float]):
    """Instead of waiting: how long it would have been."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def client(waits: Waits | None = None, **options: Any) -> Client:
    options = {"timeout_seconds": 20.0, "connections": 4} | options
    pause = waits if waits is not None else Waits()
    return Client(
        Server.here(),
        options.pop("timeout_seconds"),
        options.pop("connections"),
        pause=pause,
        **options,
    )


def ask(waits: Waits | None = None, **options: Any) -> Reply:
    return client(waits, **options).ask("/completions", BODY, answer_of)


@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_a_busy_server_is_asked_again_after_a_growing_wait(code: int) -> None:
    waits = Waits()
    with serving(script(*[status(code)] * 5, GOOD)) as site:
        assert ask(waits).text == "Fine."
    assert len(site.asked) == 6
    assert [0.5 * 2**i <= wait <= 2**i for i, wait in enumerate(waits)] == [True] * 5


def test_a_server_that_stays_broken_is_given_up() -> None:
    waits = Waits()
    with serving(script(then=status(500))) as site:
        with pytest.raises(Failed, match=rf"^{site.url}/completions: HTTP 500: .*what it says"):
            ask(waits)
    assert len(site.asked) == module.TRIES == len(waits) + 1
    assert 60 < sum(waits) < 240


@pytest.mark.parametrize(
    ("header", "least"),
    [("7", 7), ("2.5", 2.5), ("0", 0), ("-3", 0), ("soon", 0), ("Sun, 99 Foo", 0), ("DATE", 90)],
)
def test_retry_after_is_honoured(header: str, least: float) -> None:
    now, waits = 1_700_000_000.0, Waits()
    if header == "DATE":
        header = email.utils.formatdate(now + 90, usegmt=True)
    with serving(script(Said(429, b"", {"Retry-After": header}), GOOD)):
        assert ask(waits, now=lambda: now).text == "Fine."
    assert len(waits) == 1
    assert least <= waits[0] <= max(least, 1)


def test_a_server_that_wants_an_hour_is_not_waited_for() -> None:
    waits = Waits()
    with serving(script(Said(429, b"quota", {"Retry-After": "3600"}))):
        with pytest.raises(Failed, match="HTTP 429: quota"):
            ask(waits)
    assert waits == []


BAD = {
    "no json": Said(200, b"{'text': 'Fine."),
    "half json": Said(200, b'{"choices": [{"text": "Fi'),
    "html": HTML,
    "nothing": Said(200, b""),
    "a list": as_json([]),
    "nested for ever": Said(200, b"[" * 100_000),
    "not utf-8": Said(200, b"\xff\xfe{}"),
    "not what it says": Said(200, b"plain", {"Content-Encoding": "gzip"}),
    "an error": as_json({"error": "overloaded"}),
    "no choices": as_json({"choices": []}),
    "choices null": as_json({"choices": None}),
    "a choice of nothing": as_json({"choices": [None]}),
    "no text": as_json({"choices": [{"finish_reason": "stop"}]}),
    "text null": completion(None),
    "text a number": as_json({"choices": [{"text": 7, "finish_reason": "stop"}]}),
    "not finished": completion("Fi", None),
    "aborted": completion("Fi", "abort"),
    "message null": as_json({"choices": [{"message": None, "finish_reason": "stop"}]}),
    "tokens of text": completion("Fine.", token_ids=["F"]),
    "tokens of truth": completion("Fine.", token_ids=[True]),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_reply_is_asked_for_again_a_few_times(bad: Said) -> None:
    with serving(script(bad, bad, GOOD)) as site:
        assert ask() == Reply(None, "Fine.", None, True)
    with serving(script(then=bad)) as site:
        with pytest.raises(Failed, match=rf"^{site.url}/completions: ") as caught:
            ask()
    assert len(site.asked) == module.REPLY_TRIES
    assert str(caught.value).isascii() and len(str(caught.value)) < 500


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_a_connection_that_breaks_is_tried_again(cut: int) -> None:
    broken = Said(200, GOOD.body, GOOD.headers, cut=cut)
    with serving(script(broken, broken, GOOD)) as site:
        assert ask().text == "Fine."
    assert len(site.asked) == 3


def test_an_empty_answer_is_taken_when_it_stays_empty() -> None:
    with serving(script(completion(""), GOOD)):
        assert ask().text == "Fine."
    with serving(script(then=completion(""))) as site:
        assert ask() == Reply(None, "", None, True)
    assert len(site.asked) == module.REPLY_TRIES
    with serving(script(completion("", "length"), completion("", token_ids=[2]))) as site:
        assert ask() == Reply(None, "", None, False)  # all of it was special tokens: believed
        assert ask() == Reply(None, "", [2], True)
    assert len(site.asked) == 2


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (status(400), Refused, ("HTTP 400", "what it says")),
        (status(413), Refused, ("HTTP 413",)),
        (status(422), Refused, ("HTTP 422",)),
        (status(401), RecipeError, ("HTTP 401", f"{KEY} is refused", "set it to a key")),
        (status(403), RecipeError, ("HTTP 403", KEY)),
        (status(404), RecipeError, ("HTTP 404", ADDRESS, "/v1")),
        (status(405), RecipeError, ("HTTP 405", ADDRESS)),
        (status(501), RecipeError, ("HTTP 501",)),
        (status(301, Location="http://elsewhere/v1"), RecipeError, ("HTTP 301", ADDRESS)),
    ],
)
def test_what_no_other_try_would_change_is_said_at_once(
    said: Said, error: type[Exception], words: tuple[str, ...]
) -> None:
    waits = Waits()
    with serving(script(said), key=SECRET) as site:
        with pytest.raises(error) as caught:
            ask(waits)
    assert (len(site.asked), waits) == (1, [])
    assert all(word in str(caught.value) for word in (site.url, *words))


def test_without_a_key_it_is_the_key_that_is_missing() -> None:
    with serving(script(status(401))), pytest.raises(RecipeError, match=f"{KEY} is not set"):
        ask()


def test_the_key_is_sent_and_never_told() -> None:
    def echoes(asked: Asked) -> Said:
        return Said(replies.pop(0), f"got {asked.headers['Authorization']}".encode())

    for code in (400, 401, 404, 500, 200):
        replies = [code] * module.TRIES
        with serving(echoes, key=SECRET) as site:
            connection = client()
            with pytest.raises(UntaxedError) as caught:
                connection.ask("/completions", BODY, answer_of)
        assert site.asked[0].headers["Authorization"] == f"Bearer {SECRET}"
        told = f"{caught.value} {caught.value!r} {connection.server!r} {connection.server}"
        assert SECRET not in told
        assert "Bearer ***" in told
    with serving(script(GOOD)) as site:
        ask()
    assert "Authorization" not in site.asked[0].headers


def test_nobody_at_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    waits = Waits()
    with mock.patch.dict(os.environ, {ADDRESS: url, "NO_PROXY": "127.0.0.1"}):
        with pytest.raises(Failed, match=rf"^{url}/completions: no connection \(.*refused"):
            ask(waits)
    assert len(waits) == module.TRIES - 1


def test_an_answer_that_drips_for_ever_is_cut_off() -> None:
    """Each byte comes in time, so only a clock for the whole sees it."""
    ticks = iter(range(0, 10_000, 5))
    with serving(script(Said(drip=True), Said(drip=True), GOOD)) as site:
        assert ask(clock=lambda: float(next(ticks))).text == "Fine."
    assert len(site.asked) == 3


def test_a_silent_server_is_given_up() -> None:
    release = threading.Event()

    def silent(asked: Asked) -> Said:
        release.wait(30)
        return GOOD

    try:
        with serving(silent):
            with pytest.raises(Failed, match=r"no answer within 0\.05 s"):
                client(timeout_seconds=0.05).ask("/completions", BODY, answer_of, tries=2)
            release.set()
    finally:
        release.set()


def test_a_reply_without_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_REPLY_BYTES", 1 << 20)
    huge = Said(200, b" " * (2 << 20))
    with serving(script(then=huge)), pytest.raises(Failed, match="a reply of more than 1 MB"):
        ask()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, (ADDRESS, "is not set", "http://127.0.0.1:8000/v1")),
        ({ADDRESS: "  "}, (ADDRESS, "is not set")),
        ({ADDRESS: "127.0.0.1:8000"}, (ADDRESS, "is no address")),
        ({ADDRESS: "ftp://host/v1"}, ("is no address", "ftp://host/v1")),
        ({ADDRESS: "http://"}, ("is no address",)),
        ({ADDRESS: "http://host:port/v1"}, ("is no address",)),
        ({ADDRESS: "http://host:99999/v1"}, ("is no address",)),
        ({ADDRESS: "http://ho st/v1"}, ("is no address",)),
        ({ADDRESS: "http://caf\u00e9/v1"}, ("is no address", "caf\\xe9")),
        ({ADDRESS: "http://[::1/v1"}, ("is no address",)),
        ({ADDRESS: f"http://me:{SECRET}@host/v1"}, ("more than an address", KEY)),
        ({ADDRESS: f"http://{SECRET}@host/v1"}, ("more than an address", KEY)),
        ({ADDRESS: f"http://host/v1?key={SECRET}"}, ("more than an address", KEY)),
        ({ADDRESS: "http://host/v1", KEY: f"{SECRET}\nX: 1"}, (KEY, "no key can hold")),
        ({ADDRESS: "http://host/v1", KEY: f"Bearer {SECRET}"}, (KEY, "no key can hold")),
        ({ADDRESS: "http://host/v1", KEY: f"{SECRET}\u2028x"}, (KEY, "no key can hold")),
    ],
)
def test_bad_addresses_and_keys(environment: dict[str, str], words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        Server.here(environment)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert SECRET not in message and "\n" not in message and message.isascii()


def test_a_good_address() -> None:
    server = Server.here({ADDRESS: " https://host:8443/openai/v1/ ", KEY: f" {SECRET}\n"})
    assert (server.url, server.key) == ("https://host:8443/openai/v1", SECRET)
    assert SECRET not in repr(server)


def test_side_by_side_but_not_more_than_allowed() -> None:
    meet, most = threading.Barrier(3), []

    def together(asked: Asked) -> Said:
        most.append(meet.wait(30))  # passes only when three are here at once
        return completion(str(asked.body and asked.body["prompt"]))

    with serving(together) as site:
        found: dict[int, str] = {}
        connection = client(connections=3)
        connection.each(
            list("abcdef"),
            lambda text: connection.ask("/completions", {"prompt": text}, answer_of).text,
            found.__setitem__,
        )
    assert [found[i] for i in range(6)] == list("abcdef")
    assert sorted(most) == [0, 0, 1, 1, 2, 2]
    assert len(site.asked) == 6


def test_an_error_ends_all_and_what_has_finished_is_told() -> None:
    def answer(asked: Asked) -> Said:
        assert asked.body is not None
        return status(400) if asked.body["prompt"] == "bad" else GOOD

    with serving(answer) as site:
        connection, told = client(connections=1), []
        with pytest.raises(Refused):
            connection.each(
                ["a", "b", "bad", "c"],
                lambda text: connection.ask("/completions", {"prompt": text}, answer_of),
                lambda index, reply: told.append(index),
            )
    assert told == [0, 1]
    assert [body["prompt"] for body in site.posted()] in (["a", "b", "bad"], ["a", "b", "bad", "c"])


def test_a_request_to_stop_waits_for_nobody() -> None:
    """SIGTERM while all requests hang: the stage ends with what it has, and at once."""
    release, hanging = threading.Event(), threading.Semaphore(0)

    def answer(asked: Asked) -> Said:
        assert asked.body is not None
        if asked.body["prompt"] != "quick":
            hanging.release()
            release.wait(60)
        return GOOD

    def stop_soon() -> None:
        for _ in range(2):
            hanging.acquire(timeout=30)
        os.kill(os.getpid(), signal.SIGINT)

    told: list[int] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with serving(answer):
            connection = client(connections=3)
            killer = threading.Thread(target=stop_soon)
            killer.start()
            with pytest.raises(KeyboardInterrupt):
                connection.each(
                    ["quick", "slow", "slow"],
                    lambda text: connection.ask("/completions", {"prompt": text}, answer_of),
                    lambda index, reply: told.append(index),
                )
            killer.join()
            assert connection.closed.is_set()
            release.set()
    finally:
        release.set()
        signal.signal(signal.SIGINT, before)
    assert told in ([0], [])  # whichever came first
