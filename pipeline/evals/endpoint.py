"""Answers of a model on an OpenAI-compatible server, in the terms of the embedded engine.

Prompts are rendered here, by the template that training uses, and sent as tokens to /v1/completions:
so what the model reads is what it was trained on, token by token, whatever template the server has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.data.chat import Chat
from pipeline.errors import DataError, RecipeError, UntaxedError
from pipeline.evals.asking import Generation, Request, seed_of
from pipeline.evals.client import FIRST_TRIES, Client, Failed, Refused, Server
from pipeline.evals.engines import Done, Pairs
from pipeline.evals.ledger import too_many
from pipeline.evals.progress import Bar
from pipeline.evals.replies import NoLogprobs, Reply, answer_of, models_of, nats_of, prompt_tokens
from pipeline.recipes import ServedModel

if TYPE_CHECKING:
    from pipeline.evals.score import Sampling
    from pipeline.stage import Context

# Servers take what is not said from the model's generation config or from defaults of their own.
PLAIN_SAMPLING = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
MOST_STOPS = 4
PROBE_TOKENS = 32
SAME_NATS = 0.01


def connect(
    served: ServedModel,
    chat: Chat,
    sampling: Sampling,
    context: Context,
    *,
    aligned: bool = False,
) -> Endpoint:
    """The model ``served`` on the server that this machine names, with ``aligned`` for that model.
    RecipeError when there is no such model, UntaxedError when there is no server."""
    if served.prompt == "chat" and chat.recipe.generation_prompt is not None:
        raise RecipeError(
            "endpoint.prompt: chat leaves the prompt to the server's template, and"
            " chat.generation_prompt says how it ends; leave one of them out"
        )
    client, reported = find_served(served, sampling.batch_rows, context, aligned=aligned)
    return Endpoint(client, served, reported, chat, sampling, context)


def find_served(
    served: ServedModel, connections: int, context: Context, *, aligned: bool = False
) -> tuple[Client, dict[str, Any]]:
    """A client of this machine's server, and what that says of ``served``; raises as ``connect``."""
    server = Server.here(aligned=aligned)
    client = Client(server, context.execution.request_timeout_seconds, connections)
    try:
        models = client.ask("/models", None, models_of, tries=FIRST_TRIES)
    except Failed as error:
        raise UntaxedError(f"{error}; start the server, or correct {server.variable}") from None
    if served.model not in models:
        names = ascii(", ".join(sorted(models)) or "none")[1:-1]
        raise RecipeError(
            f"{server.url}: serves no model {served.model!a}; it has {names[:300]}: correct the name"
            " in the job, or serve the model under it"
        )
    return client, models[served.model]


@dataclass
class Endpoint:
    """One model on a server. ``reported``: what the server says of it."""

    client: Client
    served: ServedModel
    reported: dict[str, Any]
    chat: Chat
    sampling: Sampling
    context: Context
    checked: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        return {"engine": "endpoint", "prompt": self.served.prompt, "served": self.reported}

    @property
    def identity(self) -> str:
        return json.dumps(self.facts, sort_keys=True)

    @property
    def path(self) -> str:
        return "/chat/completions" if self.served.prompt == "chat" else "/completions"

    def answers(self, requests: Sequence[Request], done: Done, title: str) -> None:
        """See Engine. RecipeError when the server reads prompts otherwise than training does."""
        for request in requests:
            self._fits(request)
        if requests and not self.checked:
            self._check_prompt(requests[0])
        # rendered here, and read in ``told``: the tokenizer is used by one thread
        bodies = [(request.id, self._body(request)) for request in requests]

        def answered(asked: tuple[str, dict[str, Any]]) -> Reply | Failed:
            try:
                return self._ask(*asked)
            except Failed as error:
                return error

        with Bar(self.context.console, title, len(requests)) as bar:

            def told(index: int, reply: Reply | Failed) -> None:
                generation = self._generation(requests[index], reply)
                done(index, generation)
                bar.advance(len(generation.ids))

            self.client.each(bodies, answered, told)

    def losses(self, pairs: Pairs, title: str) -> list[tuple[float, int] | None]:
        """See Engine. All None, and a line that says so, where the server tells no loss of a prompt."""
        found: list[tuple[float, int] | None] = [None] * len(pairs)
        if not pairs:
            return found
        try:
            if self.served.prompt != "tokens":
                raise NoLogprobs("that needs endpoint.prompt: tokens")
            found[0] = self._loss(pairs[0])
        except (NoLogprobs, Refused) as error:
            self.context.log(f"{title}: no loss from this server, so no reasoning_nll: {error}")
            return found
        failed: list[Failed] = []

        def scored(pair: tuple[Sequence[int], Sequence[int]]) -> tuple[float, int] | Failed:
            try:
                return self._loss(pair)
            except Failed as error:
                return error

        with Bar(self.context.console, title, len(pairs) - 1) as bar:

            def told(index: int, result: tuple[float, int] | Failed) -> None:
                if not isinstance(result, Failed):
                    found[index + 1] = result
                    bar.advance(result[1])
                    return
                failed.append(result)
                if too_many(len(failed), 1, len(pairs)):
                    raise UntaxedError(
                        f"{title}: {len(failed)} of {len(pairs)} requests failed, the last: {result};"
                        " see to the server, then run again"
                    )

            self.client.each(pairs[1:], scored, told)
        return found

    def probe(self, requests: Sequence[Request]) -> list[Reply]:
        """Greedy beginnings of answers, with log-probabilities where the server gives them."""
        greedy = replace(self, sampling=replace(self.sampling, temperature=0.0, top_p=1.0))
        bodies = [
            greedy._body(replace(r, max_new_tokens=min(PROBE_TOKENS, r.max_new_tokens), stop=()))
            for r in requests
        ]
        more = {"logprobs": True if self.served.prompt == "chat" else 1}
        try:
            self._ask("probe", bodies[0] | more)
        except Refused:
            more = {}
        found: dict[int, Reply] = {}
        asked = [("probe", body | more) for body in bodies]
        self.client.each(asked, lambda a: self._ask(*a), found.__setitem__)
        return [found[index] for index in range(len(bodies))]

    def _fits(self, request: Request) -> None:
        longest = self.reported.get("max_model_len")
        total = len(request.prompt_ids) + request.max_new_tokens
        if not request.prompt_ids:
            raise DataError(f"row {request.id}: the prompt has no tokens")
        if isinstance(longest, int) and total > longest:
            raise DataError(
                f"row {request.id}: {len(request.prompt_ids)} prompt tokens and"
                f" {request.max_new_tokens} new ones are more than the {longest} that the server"
                " takes; lower max_new_tokens, leave the row out, or serve a longer context"
            )

    def _body(self, request: Request) -> dict[str, Any]:
        """The request as JSON."""
        body: dict[str, Any] = {
            "model": self.served.model,
            "max_tokens": request.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": seed_of(self.sampling.seed, request) % 2**31,
        }
        if request.stop and self._thinks_not(self._prompt(request)):
            body["stop"] = list(request.stop[:MOST_STOPS])
        if self.served.prompt == "tokens":
            ids = [int(token) for token in request.prompt_ids]
            return body | PLAIN_SAMPLING | {"prompt": ids, "return_token_ids": True}
        if self.served.prompt == "text":
            return body | {"prompt": self._bare(self._prompt(request))}
        options = self.chat.recipe.template_options
        messages = self.chat.with_system([dict(message) for message in request.messages])
        return body | {
            "messages": messages,
            **({"chat_template_kwargs": options} if options else {}),
        }

    def _prompt(self, request: Request) -> str:
        return self.chat.prompt_text([dict(message) for message in request.messages])

    def _thinks_not(self, prompt: str) -> bool:
        """Whether no think section is to come, in which a server's own stop would fire."""
        open_, close = self.chat.recipe.think_open.strip(), self.chat.recipe.think_close.strip()
        return not (open_ or close) or (bool(close) and prompt.rstrip().endswith(close))

    def _bare(self, prompt: str) -> str:
        """``prompt`` without a first token that the tokenizer puts there by itself."""
        tokenizer = self.chat.tokenizer
        first = tokenizer("a")["input_ids"][0]
        by_itself = first == tokenizer.bos_token_id and bool(tokenizer.bos_token)
        return prompt.removeprefix(tokenizer.bos_token) if by_itself else prompt

    def _check_prompt(self, request: Request) -> None:
        """One token for one prompt: whether the server takes it, and reads as many tokens as we do."""
        body = self._body(replace(request, max_new_tokens=1, stop=()))
        form = self.served.prompt
        try:
            read = self.client.ask(self.path, body, prompt_tokens)
        except Refused as error:
            if form != "tokens":
                raise self._of_row(request.id, error) from None
            raise RecipeError(
                f"{error}; it refuses a prompt of tokens: set endpoint.prompt: text, or serve with vLLM,"
                " SGLang or llama.cpp"
            ) from None
        ours = len(request.prompt_ids)
        if read is not None and read != ours:
            if form != "chat":
                raise RecipeError(
                    f"{self.client.server.url}: row {request.id} has {ours} tokens here and {read} there;"
                    " wanted the same: serve the base's own tokenizer, and set endpoint.prompt: tokens"
                )
            self.context.log(
                f"endpoint: row {request.id} has {ours} tokens by the template here and {read} there:"
                " the model is asked otherwise than it is trained"
            )
        self.checked = True

    def _ask(self, id: str, body: Mapping[str, Any]) -> Reply:
        try:
            return self.client.ask(self.path, body, answer_of)
        except Refused as error:
            raise self._of_row(id, error) from None

    def _of_row(self, id: str, error: Refused) -> Refused:
        return Refused(f"row {id}: {error}; correct or leave out the row, or ask for what it takes")

    def _generation(self, request: Request, reply: Reply | Failed) -> Generation:
        """The answer as the embedded engine would give it: a complete one ends with an end token."""
        if isinstance(reply, Failed):
            return Generation([], False, error=str(reply))
        end = [self.chat.end_id] if reply.complete else []
        if reply.ids is not None:
            last = self.chat.tokenizer.decode(reply.ids[-1:], skip_special_tokens=True)
            return Generation(reply.ids + (end if last else []), reply.complete)
        text = self._whole(request, reply)
        return Generation([*self.chat.encode([text])[0], *end], reply.complete, text)

    def _whole(self, request: Request, reply: Reply) -> str:
        """Thoughts and answer as the model wrote them, where the server has parted them."""
        if reply.think is None:
            return reply.text
        prompt, close = self._prompt(request), self.chat.recipe.think_close
        if self._thinks_not(prompt):
            return f"{self.chat.recipe.think_open}{reply.think}{close}{reply.text}"
        whole = self.chat.target_text(reply.think, reply.text, prompt=prompt)
        return whole if reply.text or reply.complete else whole.removesuffix(close)

    def _loss(self, pair: tuple[Sequence[int], Sequence[int]]) -> tuple[float, int]:
        """What the server tells of a prompt that is echoed (one token is generated, and not used)."""
        prompt, target = pair
        ids = [int(token) for token in (*prompt, *target)]
        body = {"model": self.served.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0}
        body |= {"echo": True, "logprobs": 1}
        nats = self.client.ask(self.path, body, lambda r: nats_of(r, len(prompt), len(ids)))
        return nats, len(target)


def check_changed(base: Endpoint, aligned: Endpoint, requests: Sequence[Request]) -> None:
    """DataError when ``aligned`` answers as near to ``base`` as the base itself does when asked again:
    it may be the base that is served under both names."""
    first, again, other = base.probe(requests), base.probe(requests), aligned.probe(requests)
    (noise, noise_nats), (words, nats) = _apart(first, again), _apart(first, other)
    if words > noise or nats > max(SAME_NATS, 3 * noise_nats):
        return
    raise DataError(
        f"{aligned.client.server.url}: {aligned.served.model} answers {len(first)} probes as"
        f" {base.served.model} does ({words} differ in words, log-probabilities by {nats:.1e} at most;"
        f" {base.served.model} asked twice: {noise} and {noise_nats:.1e}); serve the merged model under"
        " that name"
    )


def _apart(one: Sequence[Reply], other: Sequence[Reply]) -> tuple[int, float]:
    """How many texts differ, and in those that do not the most that a log-probability differs."""
    pairs = list(zip(one, other, strict=True))
    same = [(a, b) for a, b in pairs if (a.think, a.text) == (b.think, b.text)]
    nats = [abs(x - y) for a, b in same for x, y in zip(a.nats, b.nats, strict=False)]
    return len(pairs) - len(same), max(nats, default=0.0)
