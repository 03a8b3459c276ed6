"""The frozen prefix of one run: its states by document, stored before the first step or made anew."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pipeline.artifact import Artifact
from pipeline.model.prefix import Prefix
from pipeline.recipes import SftRecipe
from pipeline.train.batches import Documents
from pipeline.train.cache_place import digest_of, machine, place
from pipeline.train.prefix_cache import PrefixCache
from pipeline.train.reference_cache import reference_bytes
from pipeline.train.world import device

if TYPE_CHECKING:
    from pipeline.stage import Context

LINE_SECONDS = 15.0
VERSION = 4  # of this code; raise it when it gives other bits


class PrefixStates:
    """States [T, hidden size] at the cut, of the documents of several splits.

    Every process of a machine computes its share and reads what the others stored. What does not
    fit ``execution.prefix_cache_gb`` is computed each time it is needed, to the same bits.
    """

    def __init__(
        self,
        base: Artifact,
        recipe: SftRecipe,
        cut: int,
        splits: Sequence[Documents],
        context: Context,
    ) -> None:
        self.prefix: Prefix | None = Prefix(base.folder, recipe, cut, device())
        self.ids = [d.tokens_of(i) for d in splits for i in range(len(d))]
        identity = _identity(base, recipe, self.prefix, self.ids)
        root, self.here, budget = place(context)
        kept_rows = (reference_bytes(d.reference_rows, recipe.anchors.top_k) for d in splits)
        budget = max(0, budget - sum(kept_rows))  # else each run would push out the other's cache
        lengths = [len(ids) for ids in self.ids]
        width, dtype = self.prefix.width, self.prefix.dtype
        self.cache = PrefixCache(root, identity, lengths, width, dtype, budget)
        self.context = context
        starts = np.cumsum([0, *(len(d) for d in splits)])
        for documents, start in zip(splits, starts, strict=False):
            documents.states = SplitStates(self, int(start))

    def of(self, documents: Sequence[int]) -> list[Tensor]:
        """Stored states, or made now."""
        states = {d: self.cache.read(d) for d in documents}
        absent = [d for d, stored in states.items() if stored is None]
        if absent:
            assert self.prefix is not None
            made = self.prefix.run([self.ids[d] for d in absent])
            states |= dict(zip(absent, made, strict=True))
        return [stored for d in documents if (stored := states[d]) is not None]

    def fill(self) -> None:
        """Store what is missing; afterwards the prefix leaves memory unless some did not fit."""
        assert self.prefix is not None
        context, cache = self.context, self.cache
        mine = cache.missing()[self.here.index(context.world.rank) :: len(self.here)]
        tokens, total, started, said = 0, sum(len(self.ids[d]) for d in mine), time.monotonic(), 0.0
        for chunk in _chunks(mine, self.ids, self.prefix.chunk_tokens):
            states = self.prefix.run([self.ids[d] for d in chunk])
            for document, rows in zip(chunk, states, strict=True):
                cache.write(document, rows)
            context.world.mark("the frozen prefix")
            tokens += sum(len(self.ids[d]) for d in chunk)
            now = time.monotonic()
            if now - said >= LINE_SECONDS or tokens == total:
                said, speed = now, tokens / (now - started)
                context.log(
                    f"sft: frozen prefix {tokens:,}/{total:,} tokens  {speed:.0f} tok/s"
                    f"  {(total - tokens) / speed:.0f} s left"
                )
        context.world.barrier()
        for chunk in _chunks(cache.missing(), self.ids, self.prefix.chunk_tokens):
            for document, rows in zip(chunk, self.of(chunk), strict=True):  # where another failed
                cache.write(document, rows)
            context.world.mark("the frozen prefix")
        unkept = len(self.ids) - cache.kept
        context.log(
            f"sft: layers below {self.prefix.cut} are frozen; {cache.kept} of {len(self.ids)}"
            f" documents read their output from {cache.bytes / 1e6:.0f} MB"
            + (f", {unkept} do not fit execution.prefix_cache_gb" if unkept else "")
        )
        if not unkept:
            self.prefix = None


class SplitStates:
    """The states of one split, whose documents begin at ``start`` of all."""

    def __init__(self, states: PrefixStates, start: int) -> None:
        self.states, self.start = states, start

    def of(self, documents: Sequence[int]) -> list[Tensor]:
        """[T, hidden size] of each, on the CPU."""
        return self.states.of([self.start + d for d in documents])

    def will_need(self, document: int) -> None:
        """Read it from disk ahead of time."""
        self.states.cache.will_need(self.start + document)


def _chunks(documents: Sequence[int], ids: Sequence[Tensor], tokens: int) -> list[list[int]]:
    """``documents`` in order, about ``tokens`` tokens at a time."""
    chunks: list[list[int]] = []
    room = 0
    for document in documents:
        if room <= 0:
            chunks.append([])
            room = tokens
        chunks[-1].append(document)
        room -= len(ids[document])
    return chunks


def _identity(
    base: Artifact, recipe: SftRecipe, prefix: Prefix, ids: Sequence[Tensor]
) -> dict[str, Any]:
    """Everything that decides a bit of the states."""
    return {
        "base": base.digest,
        "cut": prefix.cut,
        "tokens": digest_of(ids),
        "quantization": recipe.quantization,
        "attention": prefix.decoder.config._attn_implementation,
        "version": VERSION,
        **machine(),
    }
