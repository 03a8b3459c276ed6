"""Merged models in the registry of a real MLflow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tracked import GATE, Play, Records

from pipeline import artifact as art
from pipeline.graph import stages_of
from pipeline.tracking import store_uri

pytest_plugins = ("tracked",)


def test_the_released_version_can_be_loaded(play: Callable[..., Play]) -> None:
    from mlflow.artifacts import download_artifacts
    from transformers import AutoModelForCausalLM

    job = play()
    job.through(*stages_of(job.job), **GATE)
    records = Records(job.runs)
    merged = art.open_artifact(job.planned["merge"].folder)
    (version,) = records.versions()
    assert records.aliases() == {"candidate": "1", "released": "1"}
    assert version.tags == {
        "untaxed.digest": merged.digest,
        "untaxed.key": job.planned["merge"].key,
        "untaxed.gate": "passed",
    }
    assert version.run_id == records.stage("merge").info.run_id
    found = records.client.get_model_version_by_alias("untaxed-tiny", "released")
    folder = Path(download_artifacts(artifact_uri=found.source, tracking_uri=store_uri(job.runs)))
    weights = next(folder.glob("*.safetensors"))
    assert weights.stat().st_ino == merged.path(weights.name).stat().st_ino, "was copied"
    art.move_aside(merged.folder)
    assert art.verify(folder) == len(merged.manifest.files)
    AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def test_released_follows_the_gate_on_the_digest_that_was_evaluated(
    play: Callable[..., Play],
) -> None:
    job = play()
    names = stages_of(job.job)
    job.through(*names, gate_passed=False)
    records = Records(job.runs)
    assert records.aliases() == {"candidate": "1"}
    job.finish("eval", gate_passed=True)
    assert records.aliases() == {"candidate": "1", "released": "1"}
    # Another digest under the same key: a second version, and nothing released moves yet.
    first = records.versions()[0]
    job.finish("merge", mark=" again")
    assert records.aliases() == {"candidate": "2", "released": "1"}
    assert [v.tags["untaxed.digest"] for v in records.versions()] == [
        first.tags["untaxed.digest"],
        art.open_artifact(job.planned["merge"].folder).digest,
    ]
    folder = Path(first.source.removeprefix("file://"))
    assert art.open_artifact(folder).digest == first.tags["untaxed.digest"]
    job.finish("eval", gate_passed=True)
    assert records.aliases() == {"candidate": "2", "released": "2", "previous": "1"}
    # A stricter gate, the same weights: what did not pass is not released.
    gate = [{"metric": "harmful_refusal", "at_least": 0.99}]
    strict = play(eval=job.job.eval.model_dump(mode="json") | {"gate": gate})
    strict.finish("eval", gate_passed=False)
    assert records.aliases() == {"candidate": "2", "previous": "1"}
    assert len(records.versions()) == 2
    assert len(records.parents()) == 2


def test_what_a_server_answered_releases_nothing(play: Callable[..., Play]) -> None:
    """Which weights a server has under a name is not known."""
    job = play()
    job.through(*stages_of(job.job), gate_passed=True, generation={"engine": "endpoint"})
    records = Records(job.runs)
    assert records.aliases() == {"candidate": "1"}
    job.finish("eval", gate_passed=True, generation={"engine": "embedded"})
    assert records.aliases() == {"candidate": "1", "released": "1"}
    job.finish("eval", gate_passed=False, generation={"engine": "endpoint"})
    assert records.aliases() == {"candidate": "1"}


def test_a_job_that_shares_the_merged_model_registers_it_under_its_own_name(
    play: Callable[..., Play],
) -> None:
    first = play()
    first.through("prep", "anchor", "pack", "sft", "merge", "baseline")
    second = play(name="other")
    assert second.planned["merge"].folder == first.planned["merge"].folder
    second.through("eval", **GATE)
    records = Records(first.runs)
    assert records.aliases("other") == {"released": "1"}
    assert records.aliases("tiny") == {"candidate": "1"}
    assert records.versions("other")[0].source == records.versions("tiny")[0].source
