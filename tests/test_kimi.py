"""Kimi K2.5 with DFlash: vision tower, images in a batch, drafts, and images that are refused."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draft_judges import DFlashJudge, recording
from max.driver import Buffer
from max.pipelines.context import SamplingParams, TextContext, TokenBuffer
from PIL import Image
from prompts import random_prompt
from reference.dflash import DFlashReference
from reference.logprobs import assert_logprobs
from reference.seeing import SeeingReference
from reference.target import assert_same_greedy
from tiny.kimi import PLACEHOLDER, tiny_kimi, tiny_kimi_draft

from unispec.commands.prompts import PromptOptions
from unispec.engine import Engine, EngineConfig, Request
from unispec.errors import InputError
from unispec.pipelines.architectures.unified_dflash_kimi_k25 import UnifiedDflashKimiK25Config
from unispec.pipelines.targets.kimi.feature_cache import FeatureCache
from unispec.pipelines.targets.kimi.preprocessing import MediaItem, patches_of

NEW_TOKENS = 16
PAGE = 128
TOLERANCE = 1e-4


def image(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def prompt(length: int, *images: Any, seed: int = 1) -> Request:
    """A prompt with its images after its first token."""
    words = [token % 240 + 3 for token in random_prompt(200, length, seed)]
    tokens = [words[0], *[PLACEHOLDER] * len(images), *words[1:]]
    sampling = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return Request(token_ids=tokens, sampling=sampling, images=images)


@dataclass
class Kimi:
    """The engine under test and its reference."""

    engine: Engine
    reference: SeeingReference
    draft: Path

    @property
    def encoder(self) -> Any:
        model: Any = self.engine.pipeline.model
        return model.encoder

    def show(self, request: Request) -> list[int]:
        """Shows the reference a request's images; returns the widened prompt."""
        items = [item_of(media) for media in request.images]
        tokens: list[int] = []
        seen: dict[int, torch.Tensor] = {}
        rest = iter(items)
        for token in request.token_ids:
            if token != PLACEHOLDER:
                tokens.append(token)
                continue
            item = next(rest)
            (features,) = self.reference.vision.features(
                torch.from_numpy(item.patches), [item.grid]
            )
            for feature in features:
                seen[len(tokens)] = feature
                tokens.append(PLACEHOLDER)
        self.reference.show(seen)
        return tokens

    def assert_right(self, requests: Sequence[Request]) -> None:
        """Answers are the target's own, drafts the reference draft's, whatever the batch."""
        self.engine.reset_prefix_cache()
        with recording(self.engine) as recorded:
            report = self.engine.generate(requests)
        by_prompt = {tuple(steps[0].token_ids[:-1]): steps for steps in recorded.values()}
        verdicts = []
        for request, result in zip(requests, report.results, strict=True):
            widened = self.show(request)
            trace = self.reference.greedy(widened, NEW_TOKENS)
            assert_same_greedy(result.token_ids, trace)
            judge = DFlashJudge(self.draft, self.reference)
            verdicts += judge.judge(by_prompt[tuple(widened)])
        assert sum(verdicts) >= 0.95 * len(verdicts)


def item_of(media: Any) -> MediaItem:
    return patches_of(media, patch_size=14, max_frames=4)


@pytest.fixture(scope="module")
def kimi_model(tmp_path_factory: pytest.TempPathFactory) -> Kimi:
    folder = tmp_path_factory.mktemp("kimi")
    target = tiny_kimi(folder / "target", seed=3)
    draft = tiny_kimi_draft(folder / "draft", target, folder / "scratch", seed=4)
    engine = Engine(
        EngineConfig(
            model=str(target),
            draft_model=str(draft),
            speculative_method="dflash",
            prompt_lookup_max=0,
            max_batch_size=4,
            max_batch_input_tokens=64,
            max_length=512,
        )
    )
    engine.num_speculative_tokens = engine.max_speculative_tokens
    return Kimi(engine, SeeingReference(target, folder / "plain"), draft)


@pytest.mark.parametrize(
    "media",
    [
        pytest.param(image(70, 84, 1), id="the-size-of-the-table"),
        pytest.param(image(140, 56, 2), id="larger-and-wider"),
        pytest.param(image(20, 200, 3), id="a-strip"),
        pytest.param(image(1, 1, 4), id="one-pixel"),
        pytest.param([image(60, 60, seed) for seed in (5, 6, 7)], id="three-frames"),
    ],
)
def test_features_of_an_image(kimi_model: Kimi, media: Any) -> None:
    item = item_of(media)
    kimi_model.encoder  # noqa: B018 - compiles
    ours = kimi_model.encoder.encode(item.patches, item.grid)
    (theirs,) = kimi_model.reference.vision.features(torch.from_numpy(item.patches), [item.grid])
    assert ours.shape == (item.num_features, theirs.shape[1])
    assert np.abs(ours - theirs.numpy()).max() < TOLERANCE * float(theirs.abs().max())


@pytest.mark.usefixtures("one_thread")
def test_text_needs_no_vision(kimi_model: Kimi) -> None:
    kimi_model.engine.load()
    before = kimi_model.encoder.encoded
    kimi_model.assert_right([prompt(length, seed=length) for length in (1, 5, 63, 64, 65, 130)])
    assert kimi_model.encoder.encoded == before


@pytest.mark.usefixtures("one_thread")
def test_log_probabilities_behind_an_image(kimi_model: Kimi) -> None:
    request = replace(prompt(9, image(56, 84, 41), seed=2), logprobs=5)
    [result] = kimi_model.engine.generate([request]).results
    assert_logprobs(result, kimi_model.reference, kimi_model.show(request), count=5)
    assert result.drafted > 0


@pytest.mark.usefixtures("one_thread")
def test_images_in_some_rows_of_a_batch(kimi_model: Kimi) -> None:
    """One image, several, a video and none; 100 features do not fit into a chunk of 64 tokens."""
    frames = [image(56, 84, seed) for seed in (31, 32)]
    kimi_model.assert_right(
        [
            prompt(20, image(280, 280, 21), seed=2),
            prompt(9, seed=3),
            prompt(30, image(60, 40, 22), image(100, 50, 23), seed=4),
            prompt(12, frames, seed=5),
            prompt(40, image(280, 280, 24), image(280, 280, 25), seed=6),
        ]
    )


@pytest.mark.usefixtures("one_thread")
def test_an_image_is_encoded_once_and_not_taken_for_another(kimi_model: Kimi) -> None:
    """Two images of one size stand for the same tokens; their cache pages differ."""
    first, second = image(280, 280, 41), image(280, 280, 42)
    engine = kimi_model.engine
    engine.reset_prefix_cache()
    requests = [prompt(150, first, seed=7), prompt(150, second, seed=7), prompt(150, first, seed=7)]
    before = kimi_model.encoder.encoded
    answers = [engine.generate([request]).results[0].token_ids for request in requests]
    assert kimi_model.encoder.encoded == before + 2
    assert answers[0] == answers[2]
    for request, answer in zip(requests[:2], answers, strict=False):
        assert_same_greedy(
            answer, kimi_model.reference.greedy(kimi_model.show(request), NEW_TOKENS)
        )
    assert answers[0] != answers[1]


@pytest.mark.usefixtures("one_thread")
def test_a_prompt_of_the_command_line_sees_its_images(kimi_model: Kimi, tmp_path: Path) -> None:
    """`--prompt` and two `--image`: the chat template writes two placeholders before the text."""
    files = (tmp_path / "one.png", tmp_path / "two.png")
    for index, file in enumerate(files):
        image(56, 84, 60 + index).save(file)
    options = PromptOptions(
        prompt="what changed?", prompt_file=None, image=files, chat_template=True
    )
    tokens = options.encode("what changed?", kimi_model.engine.tokenizer)
    assert [token for token in tokens if token == PLACEHOLDER] == [PLACEHOLDER] * 2
    assert kimi_model.engine.tokenizer.decode(tokens).startswith("user: [<|media_pad|>][")
    kimi_model.assert_right([replace(prompt(5), token_ids=tokens, images=files)])


def damaged() -> bytes:
    """The first half of a PNG file."""
    file = io.BytesIO()
    image(50, 50, 1).save(file, "PNG")
    return file.getvalue()[: file.tell() // 2]


def broken() -> bytes:
    """A PNG file with a chunk that cannot be."""
    file = io.BytesIO()
    image(200, 200, 1).save(file, "PNG")
    head, _, tail = file.getvalue().rpartition(b"IDAT")
    return head + b"\x01DAT" + tail


@pytest.mark.parametrize(
    ("images", "placeholders", "message"),
    [
        ([damaged()], 1, "cannot be read"),
        ([broken()], 1, "cannot be read"),
        ([Image.open(io.BytesIO(damaged()))], 1, "cannot be read"),
        ([b"GIF89a nothing"], 1, "image 1 of prompt 2: it cannot be read as PNG, JPEG or WebP"),
        ([Image.new("1", (8000, 5001))], 1, "image 1 of prompt 2: it has 8000 x 5001 = 40,008,000"),
        ([[image(20, 20, 1), Image.new("1", (8000, 5001))]], 1, "40,008,000 pixels"),
        (["/no/such/image.png"], 1, "/no/such/image.png does not exist"),
        ([], 1, "1 image placeholders .* 0 images"),
        ([image(20, 20, 1)] * 2, 1, "1 image placeholders .* 2 images"),
        ([image(20, 20, 1)], 0, "0 image placeholders .* 1 images"),
        ([[image(20, 20, 1)] * 5], 1, "5 frames"),
        ([[]], 1, "0 frames"),
    ],
)
def test_images_that_are_refused(
    kimi_model: Kimi, images: list[Any], placeholders: int, message: str
) -> None:
    request = Request(
        token_ids=[5, *[PLACEHOLDER] * placeholders, 6],
        sampling=SamplingParams(temperature=0, max_new_tokens=4),
        images=images,
    )
    with pytest.raises(InputError, match=message):
        kimi_model.engine.generate([prompt(5), request])


@pytest.mark.parametrize(
    ("grid", "message"),
    [((1, 3, 4), "pairs"), ((5, 2, 2), "more than 4 frames"), ((1, 2, 4), "needs 8 patches, 12")],
)
def test_grids_that_do_not_fit(kimi_model: Kimi, grid: tuple[int, int, int], message: str) -> None:
    kimi_model.engine.load()
    with pytest.raises(InputError, match=message):
        kimi_model.encoder.encode(np.zeros((12, 3, 14, 14), np.float32), grid)


def test_patches_are_cut_row_by_row_and_padded_with_black() -> None:
    pixels = np.arange(30 * 43 * 3, dtype=np.uint8).reshape(30, 43, 3)
    item = item_of(Image.fromarray(pixels))
    assert item.grid == (1, 4, 4)  # 30 x 43 pixels, padded to 56 x 56
    assert item.num_features == 4
    assert item.patches.shape == (16, 3, 14, 14)
    padded = np.zeros((56, 56, 3))
    padded[:30, :43] = pixels
    for index in range(16):
        row, column = divmod(index, 4)
        part = padded[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] / 127.5 - 1
        np.testing.assert_allclose(item.patches[index], part.transpose(2, 0, 1), atol=1e-6)


def test_a_huge_image_is_made_smaller_and_a_small_one_is_not() -> None:
    item = item_of(Image.new("RGB", (6000, 3000)))
    _, rows, columns = item.grid
    assert 0.9 * 16384 < rows * columns < 1.05 * 16384
    assert columns == pytest.approx(2 * rows, abs=2)
    assert item_of(Image.new("RGB", (14, 14))).grid == (1, 2, 2)


def features(mebibytes: int, value: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full(mebibytes * 2**18, value, np.float32)


def test_features_are_kept_in_a_bounded_number_of_bytes() -> None:
    """The least recently used go first; one that a batch still reads stays whole for it."""
    cache = FeatureCache(10 * 2**20)
    made: list[str] = []

    def get(name: str, mebibytes: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        def make() -> np.ndarray[Any, np.dtype[np.float32]]:
            made.append(name)
            return features(mebibytes, ord(name))

        found = cache.get(name, make)
        assert (found == ord(name)).all()
        assert len(found) == mebibytes * 2**18
        return found

    held = get("a", 4)
    get("b", 3)
    get("c", 3)
    assert (made, cache.num_bytes) == (["a", "b", "c"], 10 * 2**20)
    get("a", 4)  # used again, so b is the oldest
    get("d", 2)
    assert (made, cache.num_bytes) == (["a", "b", "c", "d"], 9 * 2**20)
    get("a", 4)
    get("c", 3)
    get("d", 2)
    assert made == ["a", "b", "c", "d"]
    get("b", 3)  # made anew, and the oldest goes
    assert (made[4:], cache.num_bytes) == (["b"], 8 * 2**20)
    assert (held == ord("a")).all()
    get("e", 50)  # too large to be kept with others, but read chunk by chunk
    get("e", 50)
    assert (made[5:], cache.num_bytes) == (["e"], 50 * 2**20)
    get("f", 1)
    assert (made[6:], cache.num_bytes) == (["f"], 2**20)


def test_what_cannot_be_encoded_is_not_kept() -> None:
    cache = FeatureCache(2**20)

    def fail() -> np.ndarray[Any, np.dtype[np.float32]]:
        raise InputError("a grid that does not fit")

    with pytest.raises(InputError):
        cache.get("a", fail)
    assert cache.num_bytes == 0
    assert cache.get("a", lambda: features(1, 7))[0] == 7


def test_the_published_drafts_fields_are_accepted(kimi_model: Kimi) -> None:
    """Of z-lab/Kimi-K2.5-DFlash; they do not fit a target with fewer layers."""
    tiny = UnifiedDflashKimiK25Config.initialize(kimi_model.engine.pipeline.pipeline_config)
    published = {
        "target_layer_ids": [1, 12, 24, 35, 47, 58],
        "mask_token_id": 163838,
        "block_size": 8,
        "windows": [],
    }
    target = replace(tiny.target, num_hidden_layers=61, vocab_size=163840)
    draft = replace(tiny.draft, num_hidden_layers=6)
    config = replace(tiny, target=target, draft=draft, **published)
    config.validate_dflash_fields()
    assert config.resolve_block_size() == 8
    with pytest.raises(InputError, match="target_layer_ids has 58, but the target has layers 0 to"):
        replace(config, target=replace(target, num_hidden_layers=58)).validate_dflash_fields()
    with pytest.raises(InputError, match="mask_token_id 163838 is outside"):
        replace(config, target=replace(target, vocab_size=163838)).validate_dflash_fields()


def test_patches_that_the_caller_gives_are_seen(kimi_model: Kimi) -> None:
    """`pixel_values` or `precomputed_image_embeddings` lead to the step of a request's own."""
    engine = kimi_model.engine
    model: Any = engine.pipeline.model
    manager: Any = engine.pipeline.kv_manager
    request = prompt(6, image(56, 56, 51), seed=8)
    widened = kimi_model.show(request)
    item = item_of(request.images[0])
    places = np.flatnonzero(np.array(widened) == PLACEHOLDER)
    expected = kimi_model.reference.greedy(widened, 2).token_ids
    given = {
        "pixel_values": [Buffer.from_numpy(item.patches)],
        "grid_thws": [Buffer.from_numpy(np.array([item.grid], np.int64))],
    }
    made = {"precomputed_image_embeddings": [Buffer.from_numpy(kimi_model.encoder(item))]}
    for images in (given, made):
        manager.reset_prefix_cache()
        context = TextContext(max_length=60, tokens=TokenBuffer(np.array(widened, np.int64)))
        context.sampling_params = SamplingParams(temperature=0)
        manager.claim(context)
        manager.alloc(context)
        caches = manager.runtime_inputs([[context]])
        inputs = model.prepare_initial_token_inputs([[context]], caches)
        inputs.image_token_indices = [Buffer.from_numpy(places.astype(np.int64))]
        for name, value in images.items():
            setattr(inputs, name, value)
        outputs = model.execute(inputs)
        assert outputs.next_tokens.to_numpy().tolist() == expected[:1]
        following = model.prepare_next_token_inputs(outputs.next_tokens, inputs)
        context.advance_token_buffer(expected[0])
        manager.step(context)
        manager.alloc(context)
        following.kv_cache_inputs = manager.runtime_inputs([[context]])
        assert model.execute(following).next_tokens.to_numpy().tolist() == expected[1:]
        # In whole pages, as a prefill expands them.
        assert following.batch_context_lengths[0].to_numpy().tolist() == [PAGE]
        manager.release(context)
        engine.pipeline.release(context.request_id)
    inputs.image_token_indices = [Buffer.from_numpy(places[:1].astype(np.int64))]
    wrong = {
        "names 1 places for features": {"image_token_indices": places[:1]},
        "has 900, but the step has": {"image_token_indices": places + 900 - places.max()},
        "without image_token_indices": {"image_token_indices": None},
        "cu_seqlens contradicts": {"cu_seqlens": [0, 9]},
        "max_seqlen contradicts": {"max_seqlen": [3]},
        "vision_position_ids contradicts": {"vision_position_ids": [0] * 16},
        "do not make the 16 patches": {"grid_thws": [[1, 4, 6]]},
        "grid_thws has shape": {"grid_thws": [1, 4, 4]},
        "pixel_values is set without grid_thws": {"grid_thws": None},
    }
    right = {"image_token_indices": [Buffer.from_numpy(places.astype(np.int64))], **given}
    for message, changes in wrong.items():
        values = {
            name: None if value is None else [Buffer.from_numpy(np.array(value, np.int64))]
            for name, value in changes.items()
        }
        fields: dict[str, Any] = right | {"precomputed_image_embeddings": None} | values
        with pytest.raises(InputError, match=message):
            model.execute(replace(inputs, **fields))


def test_the_draft_of_the_reference_is_rotated_as_yarn_does(kimi_model: Kimi) -> None:
    """Else the drafts of long prompts would not tell one rotation from the other."""
    draft = DFlashReference(kimi_model.draft, kimi_model.reference)
    assert draft.config.rope_parameters["rope_type"] == "yarn"
