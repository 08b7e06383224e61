"""The models that are compared on: the demo model, and random weights of another shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from generation.prompts import load_tokenizer

from unispec.checkpoints.demo import demo_model_folder, ensure_demo_model

from .contenders import Contender
from .formats import Format
from .gguf_files import demo_gguf
from .random_gguf import SHAPES, random_gguf
from .texts import ModelTexts, RandomTexts, Texts

__all__ = ["DEFAULT_FORMATS", "DEMO", "Model", "find_model", "load_texts", "who_runs"]

DEMO = "smollm2-135m"
DEFAULT_FORMATS = {
    DEMO: ("f32", "q8_0", "q4_0"),
    **dict.fromkeys(SHAPES, ("q8_0", "q4_0", "q4_k")),
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model in one format."""

    file: Path
    """The GGUF file, which all read that can."""
    folder: Path | None
    """The same weights in float32, as a Hugging Face folder; None: there is none."""
    form: Format


def find_model(shape: str, form: Format) -> Model:
    """Makes the file if it is not there yet.

    Raises:
        InputError: the demo model is not installed, or does not fit the format.
    """
    if shape in SHAPES:
        return Model(file=random_gguf(SHAPES[shape], form), folder=None, form=form)
    return Model(file=demo_gguf(form), folder=ensure_demo_model(demo_model_folder()), form=form)


def load_texts(shape: str) -> Texts:
    """What that model is asked.

    Raises:
        InputError: the demo model is not installed.
    """
    if shape in SHAPES:
        return RandomTexts(SHAPES[shape].vocabulary)
    return ModelTexts.load(load_tokenizer(ensure_demo_model(demo_model_folder())))


def who_runs(contenders: Sequence[Contender], model: Model) -> list[Contender]:
    """Those that can run this model: random weights have neither drafts nor a folder."""
    return [
        contender
        for contender in contenders
        if contender.runs(model.form.name)
        and (model.folder is not None or not (contender.method or contender.needs_folder))
    ]
