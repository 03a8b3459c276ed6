"""What every stage but training imports, imported once: ``untaxed run`` forks its stages from here.

Importing these takes longer than most stages of a small model. Nothing here may start a thread of
Python or OpenMP or touch an accelerator: none of them survives a fork (tests/test_launching.py). The
threads of OpenBLAS and jemalloc do; both prepare for it.
"""

from __future__ import annotations

import torch  # noqa: F401
import transformers.masking_utils
import transformers.modeling_utils
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto  # noqa: F401

from pipeline.tracking import load_mlflow

load_mlflow()
