"""A request that is refused leaves those that run alone: the engine with a graph made of numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max.driver import Buffer
from max.engine import InferenceSession
from max.pipelines.context import SamplingParams
from numpy_graph import step_outputs
from PIL import Image
from runs import assert_left_empty
from tiny.kimi import PLACEHOLDER, tiny_kimi

from unispec.engine import Engine, EngineConfig, Request
from unispec.errors import InputError
from unispec.pipelines.targets.kimi.encoder import MediaEncoder
from unispec.pipelines.targets.kimi.inputs import KIMI_ORDER
from unispec.pipelines.targets.kimi.model import KimiK2_5Model

NEW_TOKENS = 12
WIDTH = 64
"""Of the tiny Kimi's language model."""


class Tower:
    """In place of the vision graph: every feature is 1."""

    def execute(self, patches: Buffer, *rest: Buffer) -> list[Buffer]:
        return [Buffer.from_numpy(np.ones((patches.shape[0] // 4, WIDTH), np.float32))]


class Language:
    """In place of the language graph: the next token follows from the last one alone.

    Attributes:
        seen: Features that stood in each step.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []

    def execute(self, *buffers: Buffer) -> list[Buffer]:
        tokens, offsets = buffers[0].to_numpy(), buffers[1].to_numpy()
        assert KIMI_ORDER[-1] == "language_image_token_indices"
        places = buffers[-1].to_numpy()
        assert (tokens[places] == PLACEHOLDER).all()
        self.seen.append(len(places))
        last = tokens[offsets[1:].astype(np.int64) - 1]
        rows = len(last)
        following = 3 + (7 * last + 5) % 90  # letters and digits of the tiny tokenizer
        drafts = np.zeros((rows, 0), np.int64)
        none = np.zeros(rows, np.int64)
        return step_outputs(none, following, drafts, none)  # nobody looks at the lengths


@pytest.fixture
def kimi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Engine]:
    """An engine of up to 4 rows; every test leaves nothing behind in it."""

    def load_model(model: Any, session: InferenceSession) -> tuple[Tower, Language]:
        tower: Any = Tower()
        positions = np.zeros((6, 5, 32), np.float32)
        model.encoder = MediaEncoder(tower, model.arch_config.vision, positions, model.devices[0])
        return tower, Language()

    monkeypatch.setattr(KimiK2_5Model, "load_model", load_model)
    folder = str(tiny_kimi(tmp_path / "kimi"))
    engine = Engine(
        EngineConfig(model=folder, max_batch_size=4, max_batch_input_tokens=32, max_length=128)
    )
    yield engine
    assert_left_empty(engine)


def request(*tokens: int, images: Any = ()) -> Request:
    sampling = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return Request(token_ids=tokens, sampling=sampling, images=images)


def picture(side: int) -> Image.Image:
    return Image.new("RGB", (side, side), "teal")


def good() -> list[Request]:
    """Text, an image that is longer than a chunk, two images, and one that waits for a row."""
    return [
        request(5, 6, 7),
        request(8, PLACEHOLDER, 9, images=[picture(168)]),  # 36 features
        request(PLACEHOLDER, 10, PLACEHOLDER, 11, images=[picture(28), [picture(56)] * 3]),
        request(12),
        request(13, PLACEHOLDER, 14, images=[picture(56)]),
    ]


def expected(last: int) -> list[int]:
    tokens = []
    for _ in range(NEW_TOKENS):
        last = 3 + (7 * last + 5) % 90
        tokens.append(last)
    return tokens


ANSWERS = [expected(last) for last in (7, 9, 11, 12, 14)]

BAD: dict[str, tuple[Callable[[], Request], str]] = {
    "corrupt": (
        lambda: request(5, PLACEHOLDER, images=[b"\x89PNG\r\n\x1a\n"]),
        "image 1 of prompt .* cannot be read",
    ),
    "missing": (
        lambda: request(PLACEHOLDER, PLACEHOLDER, images=[picture(28), Path("/no/such.png")]),
        "image 2 of prompt .*: /no/such.png does not exist",
    ),
    "too large": (
        lambda: request(PLACEHOLDER, images=[picture(800)]),
        "prompt .* tokens, max_length is 128",
    ),
    "no image": (lambda: request(5, PLACEHOLDER), "1 image placeholders .* 0 images"),
    "no placeholder": (lambda: request(5, images=[picture(28)]), "0 image placeholders"),
    "too many frames": (
        lambda: request(PLACEHOLDER, images=[[picture(28)] * 5]),
        "image 1 of prompt .* 5 frames",
    ),
    "no frame": (lambda: request(PLACEHOLDER, images=[[]]), "image 1 of prompt .* 0 frames"),
    "no tokens": (request, "is empty"),
    "another vocabulary": (lambda: request(5, 256), "token id 256"),
}


def test_images_reach_the_steps_that_their_placeholders_fall_into(kimi: Engine) -> None:
    """36 features in two chunks of 32 tokens, 1 and 4 in one, 4 later; text has none."""
    report = kimi.generate(good())
    assert [result.token_ids for result in report.results] == ANSWERS
    graph: Any = kimi.pipeline.model.model
    assert sum(graph.seen) == 36 + 1 + 4 + 4
    assert graph.seen[-1] == 0


@pytest.mark.parametrize("bad", BAD)
def test_a_request_that_comes_while_others_run(kimi: Engine, bad: str) -> None:
    """It is refused when it is asked; the rows in prefill, decoding and waiting go on."""
    make, message = BAD[bad]
    refused: set[int] = set()

    def submit(index: int, text: str) -> None:
        if index in refused:
            return
        with pytest.raises(InputError, match=message):
            kimi.generate([make()])
        refused.add(index)

    report = kimi.generate(good(), on_text=submit)
    assert [result.token_ids for result in report.results] == ANSWERS
    assert refused == set(range(len(ANSWERS)))


@pytest.mark.parametrize("bad", BAD)
def test_a_request_that_comes_with_others(kimi: Engine, bad: str) -> None:
    """The call is refused before any of it begins, by the number of the prompt."""
    make, message = BAD[bad]
    kimi.load()
    graph: Any = kimi.pipeline.model.model
    with pytest.raises(InputError, match=message) as error:
        kimi.generate([*good(), make()])
    assert "prompt 6" in str(error.value)
    assert graph.seen == []
    report = kimi.generate(good())
    assert [result.token_ids for result in report.results] == ANSWERS
