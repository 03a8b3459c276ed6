"""Generation against model.generate, losses against a forward pass of each row alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import make_model

from pipeline.errors import DataError
from pipeline.evals.generate import Generation, Request, end_tokens, generate, loss
from pipeline.model.base import load_model

ENDS = frozenset(range(0, 600, 37))


def load(folder: Path, architecture: str, **shape: Any) -> Any:
    make_model(folder, architecture, **shape)
    return load_model(folder, torch.float32)


def requests(count: int, shared: int = 0, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    head = rng.integers(3, 600, size=shared).tolist()
    made = []
    for i in range(count):
        tail = rng.integers(3, 600, size=int(rng.integers(1, 40))).tolist()
        made.append(Request(f"row:{i}", head + tail, int(rng.integers(1, 90))))
    return made


def alone(model: Any, request: Request, ends: frozenset[int]) -> Generation:
    """The reference: Hugging Face's own greedy generation, one prompt at a time."""
    prompt = torch.tensor([list(request.prompt_ids)])
    with torch.inference_mode():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=0,
        )[0, prompt.shape[1] :].tolist()
    return Generation(ids, ids[-1] in ends)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("shared", [0, 20])
def test_greedy_equals_model_generate(tmp_path: Path, architecture: str, shared: int) -> None:
    model = load(tmp_path, architecture)
    asked = requests(14, shared)
    got = generate(model, asked, end_ids=ENDS, batch_rows=4)
    want = [alone(model, request, ENDS) for request in asked]
    assert got == want
    assert {g.complete for g in want} == {True, False}


def test_results_do_not_depend_on_the_batch_and_arrive_once(base_folder: Path) -> None:
    model = load_model(base_folder, torch.float32)
    asked = requests(17, shared=10, seed=1)
    seen: list[int] = []
    whole = generate(
        model, asked, end_ids=ENDS, batch_rows=64, done=lambda i, generation: seen.append(i)
    )
    assert sorted(seen) == list(range(17))
    assert generate(model, asked, end_ids=ENDS, batch_rows=1) == whole


def test_long_answers_outgrow_the_first_cache(base_folder: Path) -> None:
    model = load_model(base_folder, torch.float32)
    asked = [Request("a", [5, 6, 7], 200), Request("b", [8], 150), Request("c", [9, 9], 1)]
    none = frozenset({607})
    got = generate(model, asked, end_ids=none, batch_rows=3)
    assert got == [alone(model, request, none) for request in asked]
    assert [len(g.ids) for g in got] == [200, 150, 1]


def test_rows_that_leave_make_room_in_place(base_folder: Path) -> None:
    """Slots are taken over by rows from the end, again and again, while others go on."""
    model = load_model(base_folder, torch.float32)
    rng = np.random.default_rng(5)
    asked = [
        Request(f"row:{i}", rng.integers(3, 600, size=int(rng.integers(1, 9))).tolist(), limit)
        for i, limit in enumerate([70, 1, 3, 120, 2, 90, 5, 1, 1, 33, 8, 64, 2, 100, 7] * 2)
    ]
    got = generate(model, asked, end_ids=frozenset({607}), batch_rows=8)
    assert got == [alone(model, request, frozenset({607})) for request in asked]


def test_a_prompt_that_is_asked_twice_is_answered_once(base_folder: Path) -> None:
    model = load_model(base_folder, torch.float32)
    passed: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda m, a, out: passed.append(len(out)))
    once = [Request("a", [5, 6, 7], 9), Request("b", [5, 6, 7], 4), Request("c", [8, 6], 9)]
    want = generate(model, once, end_ids=ENDS, batch_rows=8)
    rows = sum(passed)
    passed.clear()
    seen: list[int] = []
    asked = [*once, *(Request(f"{r.id}:2", r.prompt_ids, r.max_new_tokens) for r in once)]
    got = generate(model, asked, end_ids=ENDS, batch_rows=8, done=lambda i, g: seen.append(i))
    assert got == want * 2
    assert sorted(seen) == list(range(6))
    assert sum(passed) == rows


def test_sampling_is_seeded_by_row_and_follows_the_model(base_folder: Path) -> None:
    model = load_model(base_folder, torch.float32)
    options: dict[str, Any] = {"end_ids": ENDS, "temperature": 1.0}
    asked = requests(12, seed=2)
    first = generate(model, asked, batch_rows=12, seed=7, **options)
    assert generate(model, asked[::-1], batch_rows=5, seed=7, **options) == first[::-1]
    assert generate(model, asked, batch_rows=12, seed=8, **options) != first
    prompt = list(asked[0].prompt_ids)
    draws = [Request(f"draw:{i}", prompt, 1) for i in range(3000)]
    drawn = generate(model, draws, batch_rows=500, seed=0, **options)
    counts = np.bincount([g.ids[0] for g in drawn], minlength=608)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).double().numpy() * 3000
    common = expected >= 5
    statistic = float((((counts - expected) ** 2) / expected)[common].sum())
    freedom = int(common.sum())
    assert freedom > 20
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("shared", [0, 20])
def test_loss_equals_each_row_alone(base_folder: Path, shared: int) -> None:
    model = load_model(base_folder, torch.float32)
    rng = np.random.default_rng(0)
    head = rng.integers(3, 600, size=shared).tolist()
    pairs = [
        (head + rng.integers(3, 600, size=p).tolist(), rng.integers(3, 600, size=t).tolist())
        for p, t in [(1, 1), (30, 12), (5, 400), (80, 3), (64, 64), (7, 1)] * 6
    ]
    for (nats, tokens), (prompt, target) in zip(loss(model, pairs), pairs, strict=True):
        ids = torch.tensor([prompt + target])
        labels = torch.tensor([[-100] * len(prompt) + target])
        with torch.inference_mode():
            mean = float(model(ids, labels=labels).loss)
        assert tokens == len(target)
        assert nats == pytest.approx(mean * len(target), rel=1e-5)


def test_end_tokens_are_the_tokenizers_and_the_generation_configs(base_folder: Path) -> None:
    model = load_model(base_folder, torch.float32)
    model.generation_config.eos_token_id = [2, 0]
    assert end_tokens(model, 5) == {0, 2, 5}
    model.generation_config.eos_token_id = None
    assert end_tokens(model, 5) == {5}


def test_bad_prompts_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    model = load(tmp_path, "mistral", sliding_window=32)
    with pytest.raises(DataError, match="row a: the prompt has no tokens"):
        generate(model, [Request("a", [], 4)], end_ids={2}, batch_rows=1)
    with pytest.raises(DataError, match="sliding window of 32"):
        generate(model, [Request("a", [5] * 30, 4)], end_ids={2}, batch_rows=1)
    model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(DataError, match="non-finite"):
        generate(model, [Request("a", [5] * 3, 4)], end_ids={2}, batch_rows=1)
    with pytest.raises(DataError, match="the loss is nan"):
        loss(model, [([5, 6], [7])])
