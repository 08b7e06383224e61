"""What the README and docs/serving.md tell a reader to send works as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from servers import PRESET, Served

pytestmark = pytest.mark.compiles(PRESET)

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8000"


def blocks(page: str, language: str, word: str) -> list[str]:
    """The code of a page in a language that has a word in it."""
    found = re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [code for code in found if word in code]


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_curl(server: Served, page: str) -> None:
    (command,) = blocks(page, "sh", "curl ")
    done = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, server.url)],
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 64


def test_the_openai_client(server: Served) -> None:
    (code,) = blocks("README.md", "python", "OpenAI(")
    done = subprocess.run(
        [sys.executable, "-c", code.replace(ADDRESS, server.url)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
