"""Training from a program: one call with settings, refused before anything is made."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
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
from unispec.training.settings import LARGEST, LIMITS, Limits

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
        pytest.param(
            {"shape": DraftShape(method="dflash", mask_token_id=256)},
            "mask_token_id is 256: choose an integer, at least 0 and at most 255",
            id="mask",
        ),
        pytest.param({"shape": "eagle"}, r"shape is 'eagle': give DraftShape\(...\)", id="shape"),
        pytest.param(
            {"collecting": {"tokens": 800}},
            r"collecting is {'tokens': 800}: give CollectSettings\(...\)",
            id="collecting",
        ),
        pytest.param(
            {"fitting": CollectSettings()}, r"give FitSettings\(...\)", id="other-settings"
        ),
        pytest.param({"initial_draft": 3}, "initial_draft is 3: give a path", id="no-path"),
        pytest.param({"data": b"x"}, "data is b'x': give a path", id="no-data"),
        pytest.param({"on_progress": 1}, "on_progress is 1: give a function", id="on-progress"),
        pytest.param({"resume": "no"}, "resume is 'no': choose True or False", id="resume"),
        pytest.param({"prompts": "hello"}, "'hello': give a list of texts", id="one-text"),
        pytest.param({"prompts": {"a", "b"}}, "give a list of texts", id="set"),
        pytest.param({"prompts": ["a", 2]}, r"prompts\[1\] is 2: give a text", id="no-text"),
        pytest.param({"prompts": ["", "a"]}, r"prompts\[0\] is '': give a text", id="empty"),
        pytest.param(
            {"prompts": ["a", "b\ud800"]}, r"prompts\[1\] is .*surrogates", id="surrogate"
        ),
        pytest.param({"data": "a\0b"}, r"data is 'a\\x00b': give a path", id="null"),
        # The tiny target's tokens are bytes, and it has 512 positions.
        pytest.param(
            {"prompts": ["a", "b " * 256]},
            r"has 5\d\d tokens and answers have up to 16, .* max_position_embeddings 512",
            id="long-prompt",
        ),
        pytest.param({"device": "tpu"}, "device is 'tpu': choose 'cpu' or 'cuda'", id="device"),
        pytest.param({"seconds": 0.0}, "seconds is 0.0: choose a number, more than 0", id="0 s"),
        pytest.param({"seconds": -1}, "seconds is -1: choose a number, more than 0", id="-1 s"),
        pytest.param({"seconds": "60"}, "seconds is '60': choose a number", id="text-seconds"),
    ],
)
def test_nothing_is_made_of_what_is_refused(
    model: str, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    given = {"shape": SHAPE, "prompts": PROMPTS, "collecting": COLLECTING} | arguments
    with pytest.raises(InputError, match=message):
        train_draft(model, output=tmp_path / "draft", **given)
    assert not (tmp_path / "draft").exists()


def test_paths_may_be_texts(model: str, tmp_path: Path) -> None:
    """And None is no function to call."""
    shape = DraftShape(method="eagle", mask_token_id=255)  # the last token
    given: dict[str, Any] = {"prompts": PROMPTS, "data": str(tmp_path / "data"), "fitting": None}
    given |= {"collecting": replace(COLLECTING, tokens=1), "on_progress": None, "seconds": 1}
    first = train_draft(model, shape, str(tmp_path / "first"), **given)
    assert first.folder == tmp_path / "first"
    assert (tmp_path / "data" / "shard-00000.safetensors").is_file()
    train_draft(model, shape, str(tmp_path / "next"), initial_draft=str(first.folder), **given)
    record = json.loads((tmp_path / "next" / "training.json").read_text())
    assert record["settings"]["initial draft"].startswith("first, sha256 ")


def test_a_folder_that_holds_something(model: str, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        train_draft(model, SHAPE, tmp_path, prompts=PROMPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


LIMITED = [
    (group, field.name, field.metadata[LIMITS])
    for group in (CollectSettings, DraftShape, FitSettings)
    for field in fields(group)
    if isinstance(field.metadata.get(LIMITS), Limits)
]


@pytest.mark.parametrize(("group", "name", "limits"), LIMITED, ids=lambda one: str(one)[:20])
def test_numbers_beyond_their_limits(group: type, name: str, limits: Limits) -> None:
    given: dict[str, Any] = {"method": "dflash"} if group is DraftShape else {}
    wrong = [limits.low if limits.above_low else limits.low - 1, float("nan"), float("inf")]
    wrong += [limits.high + 1, -math.inf]
    for value in wrong:
        with pytest.raises(InputError, match=rf"^{name} is {value}: choose an? \w+, (at|more) "):
            group(**given, **{name: value})
    lowest = limits.low + 1e-9 if limits.above_low else limits.low
    for value in (lowest, limits.high):
        assert getattr(group(**given, **{name: value}), name) == value


@pytest.mark.parametrize(("group", "name", "limits"), LIMITED, ids=lambda one: str(one)[:20])
def test_what_is_no_such_number(group: type, name: str, limits: Limits) -> None:
    given: dict[str, Any] = {"method": "dflash"} if group is DraftShape else {}
    kind = "a number" if name in ("seconds", "learning_rate") else "an integer"
    wrong: list[Any] = ["4", True, [4], {}, object(), 4j, b"4"]
    wrong += [4.5, 4.0] if kind == "an integer" else []
    for value in wrong:
        text = re.escape(repr(value))
        with pytest.raises(InputError, match=rf"^{name} is {text}: choose {kind}, "):
            group(**given, **{name: value})
    with pytest.raises(InputError, match=rf"^{name} is 10{{99}}\.\.\.: choose {kind}, .* at most "):
        group(**given, **{name: 10**400})
    with pytest.raises(InputError, match=rf"^{name} is too long a number: choose {kind}, "):
        group(**given, **{name: 10**5000})


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (CollectSettings, "max_new_tokens"),
        (CollectSettings, "seed"),
        (CollectSettings, "chat_template"),
        (DraftShape, "block_size"),
        (DraftShape, "method"),
        (FitSettings, "epochs"),
        (FitSettings, "batch_size"),
        (FitSettings, "learning_rate"),
        (FitSettings, "seed"),
    ],
)
def test_none_where_it_says_nothing(group: type, name: str) -> None:
    given: dict[str, Any] = {"method": "dflash"} if group is DraftShape else {}
    with pytest.raises(InputError, match=rf"^{name} is None: choose "):
        group(**given | {name: None})


def test_an_integer_is_a_number() -> None:
    assert FitSettings(learning_rate=1, seconds=2) == FitSettings(learning_rate=1.0, seconds=2.0)
    assert FitSettings(epochs=LARGEST).epochs == 10**12


@pytest.mark.parametrize("value", [1, 0, "yes", [True], 1.0])
@pytest.mark.parametrize("name", ["chat_template", "own_prompts"])
def test_what_is_neither_true_nor_false(name: str, value: Any) -> None:
    text = re.escape(repr(value))
    with pytest.raises(InputError, match=rf"^{name} is {text}: choose True or False$"):
        CollectSettings(**{name: value})


@pytest.mark.parametrize("value", [3, "01", (1, -1), (1, "2"), (True,), (1.0,), None])
def test_what_are_no_layers(value: Any) -> None:
    with pytest.raises(InputError, match=rf"^layers is {re.escape(repr(value))}: choose a tuple"):
        CollectSettings(layers=value)


def test_settings_without_sense() -> None:
    with pytest.raises(InputError, match="give tokens or seconds"):
        CollectSettings(tokens=None)
    for dtype in ("float16", ["float32"]):
        with pytest.raises(InputError, match=r"^dtype is .*: choose 'float32' or 'bfloat16'$"):
            FitSettings(dtype=cast(Any, dtype))
    for method in ("mtp", ["eagle"]):
        with pytest.raises(
            InputError, match=r"^method is .*: choose 'eagle' or 'eagle3' or 'dflash'$"
        ):
            DraftShape(method=cast(Any, method))


@pytest.mark.parametrize("token", [-5, "x", 2.0])
def test_what_is_no_mask_token(token: Any) -> None:
    with pytest.raises(InputError, match=r"^mask_token_id is .*: choose an integer, at least 0 "):
        DraftShape(method="dflash", mask_token_id=token)
