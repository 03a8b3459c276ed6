"""Real HTTP servers in the test process: one that replies by a script, one with small real models."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

from pipeline.evals.client import ADDRESS, KEY


@dataclass(frozen=True)
class Said:
    """One reply. ``cut``: the connection ends after so many bytes of it; ``drip``: it never ends."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    drip: bool = False


@dataclass(frozen=True)
class Asked:
    """One request as it arrived."""

    path: str
    body: dict[str, Any] | None
    headers: Mapping[str, str]


Answer = Callable[[Asked], Said]


@dataclass
class Site:
    """A running server: its address, and what it was asked."""

    url: str
    asked: list[Asked] = field(default_factory=list)

    def posted(self, path: str = "") -> list[dict[str, Any]]:
        """Bodies of the requests to generate."""
        return [a.body for a in self.asked if a.body is not None and a.path.endswith(path)]


def as_json(value: Any, status: int = 200) -> Said:
    return Said(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def completion(text: str | None, finish: str | None = "stop", **more: Any) -> Said:
    return as_json({"choices": [{"text": text, "finish_reason": finish, **more}]})


def models(*names: str) -> Said:
    return as_json({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


HTML = Said(200, b"<!doctype html><title>Sign in</title>", {"Content-Type": "text/html"})


@contextlib.contextmanager
def serving(answer: Answer, key: str | None = None) -> Iterator[Site]:
    """``answer`` behind a real socket, and named as this machine's server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            connections.append(self.connection)

        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self.reply(json.loads(self.rfile.read(length)))

        def reply(self, body: dict[str, Any] | None) -> None:
            asked = Asked(self.path, body, dict(self.headers))
            site.asked.append(asked)
            said = answer(asked)
            self.send_response(said.status)
            for name, value in said.headers.items():
                self.send_header(name, value)
            if said.drip:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                with contextlib.suppress(OSError):  # until the other side has had enough
                    while not stopping.wait(0.001):
                        self.wfile.write(b"1\r\n \r\n")
                self.close_connection = True
                return
            self.send_header("Content-Length", str(len(said.body)))
            self.end_headers()
            self.wfile.write(said.body[: said.cut])
            self.close_connection = said.cut is not None

        def log_message(self, format: str, *args: Any) -> None:
            return None

    connections: list[socket.socket] = []
    stopping = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # closing waits for replies under way, which run the model
    site = Site(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    environment = {ADDRESS: site.url, "NO_PROXY": "127.0.0.1", **({KEY: key} if key else {})}
    try:
        with mock.patch.dict(os.environ, environment):
            yield site
    finally:
        stopping.set()
        server.shutdown()
        thread.join()
        for connection in connections:
            with contextlib.suppress(OSError):  # the other side may have closed it
                connection.shutdown(socket.SHUT_RD)
        server.server_close()


def script(*replies: Said, then: Said | None = None, names: Sequence[str] = ("m",)) -> Answer:
    """Requests to generate get ``replies`` in turn, then ``then`` again and again."""
    left, lock = list(replies), threading.Lock()

    def answer(asked: Asked) -> Said:
        if asked.body is None:
            return models(*names)
        with lock:
            if left:
                return left.pop(0)
        assert then is not None, "asked more often than the script has replies"
        return then

    return answer


class RealModels:
    """Small real models behind the protocol, answering by Hugging Face's own generate.

    ``knows``: what this server can beyond the protocol: ``tokens`` as a prompt, ``token_ids`` in the
    reply, ``echo`` with log-probabilities. ``broken``: replies to give first, by number of request.
    """

    def __init__(self, folders: Mapping[str, Path], knows: str = "tokens token_ids echo") -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch, self.knows, self.lock = torch, knows.split(), threading.Lock()
        self.models: dict[str, Any] = {
            name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            for name, folder in folders.items()
        }
        self.tokenizers: dict[str, Any] = {
            name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()
        }

    def __call__(self, asked: Asked) -> Said:
        if asked.body is None:
            data = [{"id": n, "root": f"/models/{n}", "max_model_len": 512} for n in self.models]
            return as_json({"data": data})
        with self.lock, self.torch.inference_mode():
            return self._answer(asked.path.endswith("/chat/completions"), asked.body)

    def _answer(self, chat: bool, body: dict[str, Any]) -> Said:
        tokenizer = self.tokenizers[body["model"]]
        if chat:
            prompt = tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        elif isinstance(body["prompt"], str):
            prompt = tokenizer(body["prompt"])["input_ids"]
        elif "tokens" in self.knows:
            prompt = body["prompt"]
        else:
            return as_json({"error": "prompt must be a string."}, 400)
        ids, nats = self._generate(body, prompt)
        ended = ids[-1] == tokenizer.eos_token_id
        text, finish = (
            tokenizer.decode(ids, skip_special_tokens=True),
            "stop" if ended else "length",
        )
        cuts = [text.find(stop) for stop in body.get("stop", []) if stop in text]
        if cuts:
            text, finish = text[: min(cuts)], "stop"
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"message": {"content": text}} if chat else {"text": text}
        if "token_ids" in self.knows and body.get("return_token_ids"):
            choice["token_ids"] = ids
        if body.get("echo") and "echo" in self.knows:
            choice["logprobs"] = {"token_logprobs": self._echo(body["model"], prompt) + nats}
        elif body.get("logprobs") and chat:
            choice["logprobs"] = {"content": [{"logprob": value} for value in nats]}
        elif body.get("logprobs"):
            choice["logprobs"] = {"token_logprobs": nats}
        return as_json({"choices": [choice], "usage": {"prompt_tokens": len(prompt)}})

    def _generate(self, body: dict[str, Any], prompt: list[int]) -> tuple[list[int], list[float]]:
        greedy = body["temperature"] == 0
        drawn = {} if greedy else {"temperature": body["temperature"], "top_p": body["top_p"]}
        self.torch.manual_seed(body.get("seed", 0))
        model, tokens = self.models[body["model"]], self.torch.tensor([prompt])
        made = model.generate(
            tokens,
            attention_mask=self.torch.ones_like(tokens),
            max_new_tokens=body["max_tokens"],
            do_sample=not greedy,
            top_k=None if greedy else 0,
            eos_token_id=2,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **drawn,
        )
        ids = made.sequences[0, len(prompt) :].tolist()
        rows = [logits[0].log_softmax(-1) for logits in made.logits]
        return ids, [float(row[token]) for row, token in zip(rows, ids, strict=True)]

    def _echo(self, name: str, prompt: list[int]) -> list[float | None]:
        rows = self.models[name](self.torch.tensor([prompt])).logits[0].log_softmax(-1)
        return [None, *(float(rows[i, token]) for i, token in enumerate(prompt[1:]))]
