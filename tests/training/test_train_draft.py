"""Training from a program: one call with settings, refused before anything is made."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest
from safetensors.torch import load_file
from small_training import PROMPTS
from tiny import TinyPair

from unispec.engine import Engine, EngineConfig
from unispec.errors import InputError
from unispec.training import (
    CollectSettings,
    DraftShape,
    FitSettings,
    History,
    Measure,
    Progress,
    TrainedDraft,
    train_draft,
)
from unispec.training.settings import LIMITS

SHAPE = DraftShape(method="eagle", vocab_size=100)
COLLECTING = CollectSettings(tokens=800, max_new_tokens=16, chat_template=False)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny_pair: Callable[[str], TinyPair]) -> str:
    return str(tiny_pair("llama_eagle_agreeing").target)


def test_a_draft_is_trained_and_fits_its_target(model: str, tmp_path: Path) -> None:
    seen: list[Progress] = []
    trained = train_draft(
        model,
        SHAPE,
        tmp_path / "draft",
        prompts=PROMPTS,
        collecting=COLLECTING,
        fitting=FitSettings(epochs=1, learning_rate=3e-3),
        on_progress=seen.append,
    )
    assert trained.folder == tmp_path / "draft"
    collection = seen[-1].collection
    assert collection.num_answer_tokens >= 800
    assert trained.history.step == -(-len(collection.training) // FitSettings().batch_size)
    assert trained.history.losses[-1] < trained.history.losses[0]
    assert load_file(trained.folder / "model.safetensors")["d2t"].shape == (100,)
    # Reads the configurations of both and refuses what does not fit.
    Engine(
        EngineConfig(model=model, draft_model=str(trained.folder), speculative_method=SHAPE.method)
    )

    stages = [progress.stage for progress in seen]
    assert stages == sorted(stages)
    assert {"collecting", "fitting"} == set(stages)
    for stage in ("collecting", "fitting"):
        shares = [progress.done for progress in seen if progress.stage == stage]
        assert shares == sorted(shares)
        assert shares[-1] == 1
    assert all((progress.history is None) == (progress.stage == "collecting") for progress in seen)


def test_the_example_of_the_documentation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings are made and its call has the right arguments; it trains nothing."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    history = History(measures=[Measure(0, 1.0, [0.5, 0.25])])
    calls: list[inspect.BoundArguments] = []
    signature = inspect.signature(train_draft)

    def recorded(*arguments: Any, **named: Any) -> TrainedDraft:
        calls.append(signature.bind(*arguments, **named))
        progress = Progress(stage="fitting", done=0.5, collection=cast(Any, None), history=history)
        calls[0].arguments["on_progress"](progress)
        return TrainedDraft(folder=calls[0].arguments["output"], history=history)

    monkeypatch.setattr("unispec.training.trainer.train_draft", recorded)
    exec(block, {})
    assert calls[0].arguments["shape"].method == "eagle"
    assert capsys.readouterr().out == "fitting 50%\nmy-draft 1.75\n"


def test_a_training_by_time(model: str, tmp_path: Path) -> None:
    """Ends although answers enough for `tokens` and `epochs` would take days."""
    trained = train_draft(
        model,
        SHAPE,
        tmp_path,
        prompts=PROMPTS,
        collecting=CollectSettings(tokens=10**9, max_new_tokens=8, chat_template=False),
        fitting=FitSettings(epochs=10**9),
        seconds=1,
    )
    assert 0.6 <= trained.history.elapsed < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"prompts": ["one"]}, "give at least two", id="prompts"),
        pytest.param(
            {"shape": DraftShape(method="eagle", vocab_size=257)}, "beyond the target's 256", id="V"
        ),
        pytest.param({"initial_draft": Path("nowhere")}, "nowhere", id="initial-draft"),
        pytest.param({"device": "tpu"}, "'tpu' is unknown: choose cpu or cuda", id="device"),
        pytest.param({"seconds": 0.0}, "seconds is 0.0: choose more than 0", id="seconds"),
    ],
)
def test_nothing_is_made_of_what_is_refused(
    model: str, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    given = {"shape": SHAPE, "prompts": PROMPTS, "collecting": COLLECTING} | arguments
    with pytest.raises(InputError, match=message):
        train_draft(model, output=tmp_path / "draft", **given)
    assert not (tmp_path / "draft").exists()


def test_a_folder_that_holds_something(model: str, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        train_draft(model, SHAPE, tmp_path, prompts=PROMPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


LIMITED = [
    (group, field.name, field.metadata[LIMITS])
    for group in (CollectSettings, DraftShape, FitSettings)
    for field in fields(group)
    if LIMITS in field.metadata
]


@pytest.mark.parametrize(("group", "name", "limits"), LIMITED, ids=lambda one: str(one)[:20])
def test_numbers_beyond_their_limits(group: type, name: str, limits: Any) -> None:
    given: dict[str, Any] = {"method": "dflash"} if group is DraftShape else {}
    wrong = [limits.low if limits.above_low else limits.low - 1, float("nan"), float("inf")]
    wrong += [limits.high + 1] if math.isfinite(limits.high) else []
    for value in wrong:
        with pytest.raises(InputError, match=rf"^{name} is {value}: choose (at least|more than) "):
            group(**given, **{name: value})
    highest = limits.high if math.isfinite(limits.high) else 10**12
    for value in (limits.low + 1e-9 if limits.above_low else limits.low, highest):
        assert getattr(group(**given, **{name: value}), name) == value


def test_settings_without_sense() -> None:
    with pytest.raises(InputError, match="give tokens or seconds"):
        CollectSettings(tokens=None)
    with pytest.raises(InputError, match=r"dtype 'float16' is unknown: choose float32 or bfloat16"):
        FitSettings(dtype=cast(Any, "float16"))
    with pytest.raises(InputError, match=r"'mtp' cannot be trained: choose eagle or dflash"):
        DraftShape(method="mtp")
