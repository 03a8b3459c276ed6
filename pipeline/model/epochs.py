"""The epochs that sft has sealed, and the plan that puts one of them into the base."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.errors import DataError, RecipeError
from pipeline.model import merging
from pipeline.model.merging import Plan
from pipeline.model.shards import Checkpoint, open_checkpoint


@dataclass
class Epochs:
    """A base and what was trained on it: ``files`` holds the weights of each epoch by its number."""

    base: Artifact
    sft: Artifact
    checkpoint: Checkpoint
    config: Any
    files: dict[int, str]
    checked: set[str] = field(default_factory=set)

    @property
    def last(self) -> int:
        return max(self.files)

    def folder(self, epoch: int) -> Path:
        return self.sft.path(self.files[epoch]).parent

    def plan(self, epoch: int, scale: float) -> Plan:
        """What epoch ``epoch`` times ``scale`` does to each base tensor. DataError where a file is not
        as it was sealed; RecipeError where full fine-tuning is to be scaled."""
        file = self.files[epoch]
        full = file.endswith("/model.safetensors")
        for name in (file,) if full else (file, f"epoch-{epoch}/adapter_config.json"):
            self._check(name)
        tied = bool(self.config.tie_word_embeddings)
        if not full:
            return merging.plan_adapter(
                self.checkpoint,
                self.folder(epoch),
                base_digest=self.base.digest,
                scale=scale,
                tied=tied,
            )
        if scale != 1.0:
            raise RecipeError(
                f"merge.scale={scale} needs an adapter, and {file} is full fine-tuning; leave"
                " merge.scale at 1"
            )
        return merging.plan_full(self.checkpoint, self.sft.path(file), tied=tied)

    def _check(self, name: str) -> None:
        if name in self.checked:
            return
        if art.hash_file(self.sft.path(name)) != self.sft.manifest.files[name]:
            raise DataError(
                f"{self.sft.folder / name}: content changed since it was sealed; run sft with"
                " --rebuild"
            )
        self.checked.add(name)


def open_epochs(base: Artifact, sft: Artifact) -> Epochs:
    """The epochs of ``sft`` beside the base that they belong to; no tensor is read."""
    from transformers import AutoConfig

    files = _files(sft)
    try:
        config = AutoConfig.from_pretrained(base.folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{base.folder}: config.json cannot be used: {error}") from error
    if getattr(config, "quantization_config", None):
        raise DataError(
            f"{base.folder}: the base is quantized; merging into rounded weights ruins them: use"
            " the 16-bit base"
        )
    return Epochs(base, sft, open_checkpoint(base.folder), config, files)


def _files(sft: Artifact) -> dict[int, str]:
    found: dict[int, str] = {}
    for name in sft.manifest.files:
        match = re.fullmatch(r"epoch-(\d+)/(adapter_model|model)\.safetensors", name)
        if match is None:
            continue
        epoch = int(match.group(1))
        if epoch in found:
            raise DataError(f"{sft.folder}: epoch {epoch} has both an adapter and full weights")
        found[epoch] = name
    if not found:
        raise DataError(f"{sft.folder}: holds no epoch-N/adapter_model.safetensors; run sft again")
    last = sft.facts.get("epochs", max(found))
    if max(found) != last:
        raise DataError(f"{sft.folder}: sealed with {last} epochs, holds {sorted(found)}")
    return found
