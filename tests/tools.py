"""Scripts outside the package (tools, demo, ``train_net.py``), loaded as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROOT = Path(__file__).resolve().parent.parent


def load_script(path: str | Path) -> ModuleType:
    """Loads a script by its path in the repository, such as "tools/slurm_train.py".

    A fresh module each time. Until the next load it is also in ``sys.modules``, under its stem,
    where dataclasses and pickles look for it.
    """
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def load_tool(name: str) -> ModuleType:
    """Loads a script of ``tools/`` by its name, such as "slurm_train" or "mini/evaluate_mini"."""
    return load_script(f"tools/{name}.py")
