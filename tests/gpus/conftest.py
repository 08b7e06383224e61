"""Tiny checkpoints of DeepSeek-V3 as GPUs need them."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepseek_gpus import SHAPE
from tiny import tiny_deepseek


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("deepseek"), **SHAPE)
