"""Requests to an OpenAI-compatible server: patient with one that is busy or broken, one clear line where
patience is no use. The key is in no message, file or fact.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx

from pipeline.errors import DataError, RecipeError, UntaxedError, one_line
from pipeline.evals.replies import BadReply

T = TypeVar("T")
Item = TypeVar("Item")

ADDRESS, KEY = "UNTAXED_ENDPOINT", "UNTAXED_API_KEY"
ALIGNED_ADDRESS = "UNTAXED_ALIGNED_ENDPOINT"
TRIES = 8  # with the waits between them about two minutes
REPLY_TRIES = 3
FIRST_TRIES = 3
LONGEST_WAIT_SECONDS = 60.0
LONGEST_RETRY_AFTER_SECONDS = 900.0
CONNECT_SECONDS = 30.0
MOST_REPLY_BYTES = 64 << 20
SHOWN = 200


class _Busy(Exception):
    """The server cannot now. ``seconds``: when it wants to be asked again."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


class Failed(UntaxedError):
    """No answer after all tries."""


class Refused(DataError):
    """The server wants no such request, however often it is sent."""


@dataclass(frozen=True)
class Server:
    """Where a server is, without the slash at the end, the key that it wants, and the variable that
    says so."""

    url: str
    key: str | None = field(default=None, repr=False)
    variable: str = ADDRESS

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ, *, aligned: bool = False) -> Server:
        """The server that this machine names; with ``aligned`` that of the aligned model, where it has
        one of its own. RecipeError when it names none, or none that can be."""
        own = aligned and environment.get(ALIGNED_ADDRESS, "").strip()
        variable = ALIGNED_ADDRESS if own else ADDRESS
        url = environment.get(variable, "").strip().rstrip("/")
        key = environment.get(KEY, "").strip() or None
        wanted = f"{variable} has to name the server, such as http://127.0.0.1:8000/v1"
        if not url:
            raise RecipeError(f"the job asks a server, and {variable} is not set; {wanted}")
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            raise RecipeError(f"{variable} is no address; {wanted}") from None
        if parts.username is not None or parts.query or parts.fragment:
            raise RecipeError(
                f"{variable} holds more than an address; a key belongs into {KEY}, which nothing records"
            )
        if not known or not url.isascii() or any(c.isspace() for c in url):
            raise RecipeError(f"{variable}={url!a} is no address; {wanted}")
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise RecipeError(f"{KEY} holds what no key can hold (spaces or control characters)")
        return cls(url, key, variable)


class Client:
    """Asks one server from several threads. ``pause``, ``clock`` and ``now`` are for tests."""

    def __init__(
        self,
        server: Server,
        timeout_seconds: float,
        connections: int,
        *,
        pause: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.server = server
        self.timeout_seconds = timeout_seconds
        self.connections = connections
        self.closed = threading.Event()
        self.pause = self.closed.wait if pause is None else pause
        self.clock, self.now = clock, now
        key = {"Authorization": f"Bearer {server.key}"} if server.key else {}
        self.http = httpx.Client(
            headers={"Content-Type": "application/json"} | key,
            timeout=httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        read: Callable[[dict[str, Any]], T],
        *,
        tries: int = TRIES,
    ) -> T:
        """What ``read`` finds in the reply; without ``body`` it is a GET.

        Connection errors and statuses 408, 409, 425, 429 and 5xx are tried again after a growing wait,
        or after what Retry-After says; so is, fewer times, a reply that ``read`` finds bad.

        Raises:
            Failed: no answer after all tries.
            Refused: 400 and its like.
            RecipeError: the key is refused, or there is no such path or model.
        """
        bad, last = 0, ""
        for attempt in range(tries):
            wait = min(LONGEST_WAIT_SECONDS, 2.0**attempt) * random.uniform(0.5, 1.0)
            try:
                return read(self._reply(path, body))
            except BadReply as error:
                bad, last = bad + 1, str(error)
                if bad == REPLY_TRIES:
                    if error.usable is not None:
                        return error.usable  # type: ignore[no-any-return]
                    break
            except _Busy as error:
                last, wait = str(error), max(wait, error.seconds or 0.0)
            if wait > LONGEST_RETRY_AFTER_SECONDS or attempt + 1 == tries:
                break
            self.pause(wait)
            if self.closed.is_set():
                break
        raise Failed(f"{self.server.url}{path}: {last}")

    def _reply(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """One reply as JSON. Raises _Busy, BadReply, or what no other try would change."""
        method = "GET" if body is None else "POST"
        content = None if body is None else json.dumps(body).encode("ascii")
        until = self.clock() + self.timeout_seconds
        whole = bytearray()
        try:
            with self.http.stream(method, f"{self.server.url}{path}", content=content) as response:
                for part in response.iter_bytes():
                    whole += part
                    if self.clock() > until:
                        raise _Busy(f"no whole answer within {self.timeout_seconds:g} s")
                    if len(whole) > MOST_REPLY_BYTES:
                        raise BadReply(f"a reply of more than {MOST_REPLY_BYTES >> 20} MB")
        except httpx.TimeoutException:
            raise _Busy(f"no answer within {self.timeout_seconds:g} s") from None
        except httpx.TransportError as error:
            raise _Busy(f"no connection ({self._shown(one_line(error))})") from None
        except httpx.DecodingError as error:
            raise BadReply(f"a damaged reply ({self._shown(one_line(error))})") from None
        shown = self._shown(bytes(whole).decode("utf-8", "replace"))
        self._check(path, response, shown)
        try:
            reply = json.loads(bytes(whole))
        except (ValueError, RecursionError):
            raise BadReply(f"the reply is no JSON: {shown or 'nothing'}") from None
        if not isinstance(reply, dict):
            raise BadReply(f"the reply is no JSON object: {shown}")
        return reply

    def _check(self, path: str, response: httpx.Response, shown: str) -> None:
        """Raise by the status: _Busy, Refused or RecipeError."""
        status = response.status_code
        if 200 <= status < 300:
            return
        said = f"HTTP {status}{': ' + shown if shown else ''}"
        if status in (408, 409, 425, 429) or (status >= 500 and status != 501):
            raise _Busy(said, self._retry_after(response.headers.get("Retry-After", "")))
        where = f"{self.server.url}{path}"
        if status in (401, 403):
            state = "refused" if self.server.key else "not set"
            raise RecipeError(f"{where}: {said}; {KEY} is {state}: set it to a key of this server")
        if status < 400 or status in (404, 405, 501):
            raise RecipeError(
                f"{where}: {said}; wanted an OpenAI-compatible server: correct"
                f" {self.server.variable}, which mostly ends in /v1"
            )
        raise Refused(f"{where}: {said}")

    def _retry_after(self, text: str) -> float | None:
        """Seconds from a Retry-After header, which holds seconds or a date."""
        try:
            return max(0.0, float(text))
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - self.now())
        except (TypeError, ValueError):
            return None

    def _shown(self, text: str) -> str:
        """What a server said: one short line in ASCII, without the key."""
        text = text.replace(self.server.key, "***") if self.server.key else text
        text = " ".join(text.split()).encode("ascii", "backslashreplace").decode("ascii")
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

    def each(
        self,
        items: Sequence[Item],
        work: Callable[[Item], T],
        done: Callable[[int, T], None],
    ) -> None:
        """``work`` on ``items`` side by side, ``done(index, result)`` one by one as they finish.

        Whatever ends this early, an error or a request to stop: what has finished is told first, and
        nothing waits for the rest. The threads that work tell too, since a request to stop comes to
        the main thread and would leave an answer half told there.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(items)):
            waiting.put(index)
        finished: list[tuple[int, T | None, BaseException | None]] = []
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        telling = threading.Lock()
        told = 0

        def tell() -> None:
            nonlocal told
            with telling:
                while told < len(finished) and not self.closed.is_set():
                    index, result, error = finished[told]
                    if error is not None:
                        raise error
                    told += 1
                    done(index, result)  # type: ignore[arg-type]

        def run() -> None:
            while not self.closed.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    finished.append((index, work(items[index]), None))
                except BaseException as error:
                    finished.append((index, None, error))
                try:
                    tell()
                except BaseException as error:
                    ended.put(error)
                    return
                if told == len(items):
                    ended.put(None)

        try:
            for _ in range(min(self.connections, len(items))):
                threading.Thread(target=run, daemon=True).start()  # never waited for after a stop
            error = ended.get() if items else None
            if error is not None:
                raise error
        except BaseException:
            self.closed.set()
            with telling:
                for index, result, error in finished[told:]:
                    if error is None:
                        with contextlib.suppress(Exception):
                            done(index, result)  # type: ignore[arg-type]
            raise
