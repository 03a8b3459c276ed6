"""Training on one GPU at the true shapes of Qwen2.5-7B and -14B: tokens/s, utilisation, peak memory.

PYTHONPATH=. python benchmarks/gpu_sft.py [--shape 7b] [--compile] [--json FILE]

Needs torch, transformers and peft, nothing else: weights are random and made on the device. With
flash-attn installed attention is its varlen kernel, without it the one inside PyTorch.

The step is the one that the method takes: rank-1 LoRA on up_proj of the middle third, packed rows,
loss on the completions alone, bf16 weights, fp32 adapters, AdamW. Rows of the table, one after
another over the same packs:

  untaxed                 this project's modules, the output of the frozen layers read from memory
  untaxed, checkpointing  the same, activations recomputed in backward
  untaxed, compiled       the first, with each decoder layer through torch.compile (--compile)
  untaxed, no cut         the first, with the frozen layers run in every step
  hf+peft                 transformers' model and loss with PEFT's LoRA, the loop most people write
  hf+peft, checkpointing  the same with gradient_checkpointing_enable(), as trainers ship it

Lengths of documents are log-normal (--median, --sigma; the defaults resemble STAR-1) from 32 tokens
to a whole pack; the last 80% of each document is its completion.

MFU is the operations that the method needs (stated in benchmarks/gpu_work.py) over the time and the
dense bf16 peak of the device: the same multiple of tokens/s in every row. "TFLOP/s" is what a row
really multiplies: also frozen layers, logits that nobody needs, recomputation. At 7B with the default
lengths a token needs 19.3 GFLOP, so that the goal of 24,000 tokens/s is 46.9% of an H100's 989
TFLOP/s; at 14B the same utilisation is 12,270 tokens/s. --plan prints this without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_work import SHAPES, Shape, Work, make_model, make_work, operations
from torch import Tensor, nn

from pipeline.data.packing import Pack
from pipeline.model.cut import Passed, drop_prefix
from pipeline.model.lora import LoraLinear
from pipeline.train.batches import Documents
from pipeline.train.engine import GradientWatch, trainable
from pipeline.train.loss import Scales, SftModule
from pipeline.train.replicated import ReplicatedEngine

GOAL = 24_000  # tokens/s at 7B
RATE = 1e-4


class Stored:
    """The output of the frozen layers by document, in memory, as the cache gives it."""

    def __init__(self, model: Any, cut: int, documents: Documents, device: torch.device) -> None:
        decoder = model.model
        layers, norm = decoder.layers, decoder.norm
        decoder.layers, decoder.norm = nn.ModuleList(layers[:cut]), Passed()
        self.rows: list[Tensor] = []
        with torch.no_grad():
            for d in range(len(documents)):
                ids = documents.tokens_of(d).to(device)[None]
                hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
                self.rows.append(hidden[0].cpu())
        decoder.layers, decoder.norm = layers, norm

    def of(self, documents: Any) -> list[Tensor]:
        return [self.rows[d] for d in documents]

    def will_need(self, document: int) -> None:
        return None


Step = Callable[[list[Pack]], float]  # trains on some packs; the loss per target token


def untaxed(
    shape: Shape, work: Work, device: torch.device, *, cut: bool, again: bool, compiled: bool
) -> Step:
    model, documents = make_model(shape, device), work.documents
    documents.states = None
    for index in shape.adapted:
        mlp = model.model.layers[index].mlp
        a = torch.empty(1, shape.hidden).uniform_(-(shape.hidden**-0.5), shape.hidden**-0.5)
        mlp.up_proj = LoraLinear(mlp.up_proj, a, torch.zeros(shape.inner, 1), 16.0, 0.0)
    if cut:
        first = shape.adapted[0]
        started = time.perf_counter()
        documents.states = Stored(model, first, documents, device)
        speed = sum(documents.lengths) / (time.perf_counter() - started)
        print(f"  frozen layers, once: {speed:,.0f} tokens/s", file=sys.stderr)
        drop_prefix(model, first)
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    module = SftModule(model.train())
    adamw = {"learning_rate": RATE, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    optimizer = SimpleNamespace(**adamw, weight_decay=0.0, max_grad_norm=1.0)
    recipe: Any = SimpleNamespace(
        quantization="none", lora=True, precision="bf16", optimizer=optimizer
    )
    watch = GradientWatch(trainable(module).items())
    engine = ReplicatedEngine("single")
    engine.wrap(module, recipe)

    def step(packs: list[Pack]) -> float:
        """The calls of the training loop (pipeline/train/loop.py), without its bookkeeping."""
        scales = Scales(1.0 / documents.targets([d for pack in packs for d in pack])[0])
        losses = []
        for pack in packs:
            batch = documents.micro_batch(pack).to(device)
            loss, *_ = engine.forward(batch, None, scales)
            if not bool(torch.isfinite(loss)):
                raise SystemExit(f"the loss is {float(loss)}")
            engine.backward(loss)
            losses.append(loss.detach())
        if not (watch.all_finite() and engine.gradient_finite()):
            raise SystemExit("a gradient is not finite")
        engine.step(RATE)
        return float(torch.stack(losses).sum())

    return step


def peers(shape: Shape, work: Work, device: torch.device, *, again: bool) -> Step:
    from peft import LoraConfig, get_peft_model
    from transformers.utils import is_flash_attn_2_available

    model, documents = make_model(shape, device), work.documents
    documents.states = None
    flash = device.type == "cuda" and is_flash_attn_2_available()
    model.set_attn_implementation("flash_attention_2" if flash else "sdpa")
    lora = LoraConfig(
        r=1,
        lora_alpha=16,
        target_modules=["up_proj"],
        layers_to_transform=list(shape.adapted),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora).train()
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)

    def step(packs: list[Pack]) -> float:
        targets = documents.targets([d for pack in packs for d in pack])[0]
        total = 0.0
        for pack in packs:
            batch = documents.micro_batch(pack)
            labels = torch.full_like(batch.ids, -100)
            labels[0, batch.predict + 1] = batch.labels
            loss = model(
                input_ids=batch.ids.to(device),
                position_ids=batch.positions.to(device),
                labels=labels.to(device),
                num_items_in_batch=targets,
            ).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


@dataclass(frozen=True)
class Cell:
    """A row of the table: how its step is made, and what it executes."""

    make: Callable[[Shape, Work, torch.device], Step]
    cut: bool = False
    again: bool = False
    peer: bool = False

    def executed(self, shape: Shape, work: tuple[int, int, int]) -> int:
        first = shape.adapted[0]
        lowest = -1 if self.peer and self.again else first
        begin = first if self.cut else 0
        return operations(
            shape, work, first=begin, lowest=lowest, again=self.again, all_rows=self.peer
        )


def cells(compiled: bool) -> Iterator[tuple[str, Cell]]:
    def ours(cut: bool, again: bool = False, compiled: bool = False) -> Cell:
        return Cell(lambda *a: untaxed(*a, cut=cut, again=again, compiled=compiled), cut, again)

    yield "untaxed", ours(True)
    yield "untaxed, checkpointing", ours(True, again=True)
    if compiled:
        yield "untaxed, compiled", ours(True, compiled=True)
    yield "untaxed, no cut", ours(False)
    yield "hf+peft", Cell(lambda *a: peers(*a, again=False), peer=True)
    yield "hf+peft, checkpointing", Cell(lambda *a: peers(*a, again=True), again=True, peer=True)


def measure(
    cell: Cell, shape: Shape, work: Work, given: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Tokens/s of every round, utilisation from their median, and peak memory of the steps."""
    on_gpu = device.type == "cuda"

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    speeds, losses = [], []
    warmup, measured = work.steps[: given.warmup], work.steps[given.warmup :]
    try:
        step = cell.make(shape, work, device)
        for packs in warmup:
            losses.append(step(packs))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for at in range(0, len(measured), given.steps):
            some = measured[at : at + given.steps]
            started = now()
            losses += [step(packs) for packs in some]
            speeds.append(work.numbers(some)[0] / (now() - started))
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    speed, numbers = statistics.median(speeds), work.numbers(measured)
    per_token = needed(shape, numbers) / numbers[0]
    return {
        "tokens_per_second": speed,
        "rounds": speeds,
        "mfu": speed * per_token / (given.peak_tflops * 1e12),
        "executed_tflops": speed * cell.executed(shape, numbers) / numbers[0] / 1e12,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "losses": [losses[0], losses[-1]],
    }


def needed(shape: Shape, numbers: tuple[int, int, int]) -> int:
    """Operations that the method needs: nothing below the lowest adapted layer, no idle logits."""
    first = shape.adapted[0]
    return operations(shape, numbers, first=first, lowest=first)


def plan(shape: Shape, work: Work, given: argparse.Namespace) -> None:
    """What the goal means, without running anything."""
    numbers = work.numbers(work.steps)
    tokens = numbers[0]
    per_token = needed(shape, numbers) / tokens
    filled = tokens / sum(len(step) for step in work.steps) / given.tokens
    print(
        f"{given.shape}: {filled:.1%} of each pack is tokens, {numbers[2] / tokens:.1%} are trained"
    )
    for name, cell in cells(False):
        print(f"  {name:<24}{cell.executed(shape, numbers) / tokens / 1e9:>7.2f} GFLOP a token")
    utilisation = GOAL * per_token / (given.peak_tflops * 1e12)
    print(f"  needed: {per_token / 1e9:.2f}; {GOAL:,} tokens/s are {utilisation:.1%} MFU")


def arguments() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--shape", choices=list(SHAPES), default="7b")
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--cells", nargs="+", metavar="NAME", help="only these rows")
    options.add_argument("--compile", action="store_true", help="one more row")
    options.add_argument("--plan", action="store_true", help="count operations, run nothing")
    options.add_argument("--tokens", type=int, default=4096, help="of a pack")
    options.add_argument("--packs", type=int, default=4, help="of an optimiser step")
    options.add_argument("--median", type=float, default=380, help="tokens of a document")
    options.add_argument("--sigma", type=float, default=0.45, help="of the logarithm of its length")
    options.add_argument("--steps", type=int, default=5, help="of a round")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    options.add_argument("--peak-tflops", type=float, default=989.0, help="dense, bf16 (H100)")
    options.add_argument("--json", type=Path)
    return options


def main() -> None:
    given = arguments().parse_args()
    shape, chosen = SHAPES[given.shape], dict(cells(given.compile))
    unknown = set(given.cells or ()) - set(chosen)
    if unknown:
        raise SystemExit(f"--cells {sorted(unknown)}: wanted some of {sorted(chosen)}")
    with tempfile.TemporaryDirectory() as folder:
        work = make_work(shape, given, Path(folder))
    if given.plan:
        return plan(shape, work, given)
    if given.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(
            "no GPU here; --plan counts operations, --shape tiny --device cpu tries it"
        )
    if given.device == "cpu" and torch.cuda.is_available():
        raise SystemExit("--device cpu with a GPU here: set CUDA_VISIBLE_DEVICES= as well")
    device = torch.device(given.device)
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    print(f"Qwen2.5 {given.shape}, {name}, torch {torch.__version__}")
    print(f"{'':<26}{'tokens/s':>10}{'spread':>9}{'MFU':>8}{'TFLOP/s':>9}{'peak GB':>9}")
    table: dict[str, Any] = {}
    for name, cell in chosen.items():
        if given.cells and name not in given.cells:
            continue
        table[name] = row = measure(cell, shape, work, given, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if "error" in row:
            print(f"{name:<26}{row['error']:>20}")
            continue
        speed, rounds = row["tokens_per_second"], row["rounds"]
        spread = (max(rounds) - min(rounds)) / speed
        peak = f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else "-"
        print(
            f"{name:<26}{speed:>10,.0f}{spread:>9.1%}{row['mfu']:>8.1%}"
            f"{row['executed_tflops']:>9.1f}{peak:>9}"
        )
    if given.json:
        options = {k: str(v) for k, v in vars(given).items()}
        text = json.dumps({"options": options, "cells": table}, indent=1)
        given.json.write_text(text + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
