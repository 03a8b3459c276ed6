"""How the tests of a served model ask: of an endpoint, of the embedded engine, by the same requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from parts import make_model, make_tokenizer, sample_rows
from rich.console import Console
from serving import Said, completion, script, serving

from pipeline.data.chat import Chat
from pipeline.evals.asking import Generation, Request
from pipeline.evals.endpoint import Endpoint, connect
from pipeline.evals.engines import Embedded, request_for
from pipeline.evals.score import Sampling
from pipeline.model.base import load_model
from pipeline.recipes import ServedModel
from pipeline.stage import Context

GREEDY = Sampling(4, 0.0, 0)
PROMPTS = [row["prompt"] for row in sample_rows("ordinary")[:10]]


def make_served(folder: Path, seed: int) -> None:
    """A model of two layers, some of whose answers end; and its tokenizer."""
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    make_model(folder, seed=seed, num_attention_heads=2, num_key_value_heads=1, **shape)
    model = load_model(folder, torch.float32)
    model.lm_head.weight.data[2] *= 4 if seed else 1
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder)
    make_tokenizer(folder)


def context(tmp_path: Path) -> Context:
    tmp_path.mkdir(exist_ok=True)
    return Context(scratch=tmp_path, console=Console(file=(tmp_path / "log").open("a"), width=500))


def log(tmp_path: Path) -> str:
    return (tmp_path / "log").read_text()


def asked_of(chat: Chat, new: int = 20, **options: Any) -> list[Request]:
    return [
        request_for(chat, f"s:{i}", ({"role": "user", "content": text},), new, **options)
        for i, text in enumerate(PROMPTS)
    ]


def opened(
    chat: Chat,
    tmp_path: Path,
    model: str = "base",
    prompt: Any = "tokens",
    sampling: Sampling = GREEDY,
) -> Endpoint:
    return connect(ServedModel(model=model, prompt=prompt), chat, sampling, context(tmp_path))


def answers(engine: Any, requests: list[Request]) -> list[Generation]:
    found: dict[int, Generation] = {}
    engine.answers(requests, found.__setitem__, "test")
    assert sorted(found) == list(range(len(requests)))
    return [found[i] for i in range(len(requests))]


def embedded(folder: Path, chat: Chat, requests: list[Request]) -> list[Generation]:
    return answers(Embedded(load_model(folder, torch.float32), chat, GREEDY), requests)


def said(chat: Chat, tmp_path: Path, reply: Said, form: str = "chat") -> Generation:
    """How one reply to the first prompt is read."""
    with serving(script(completion("a"), reply)):
        return answers(opened(chat, tmp_path, "m", form), asked_of(chat)[:1])[0]


def text_of(chat: Chat, generation: Generation) -> str:
    if generation.text is not None:
        return generation.text
    return str(chat.tokenizer.decode(generation.ids, skip_special_tokens=True))
