"""`unispec generate` with an engine that only keeps what it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from click.testing import CliRunner, Result
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unispec import engine as engine_package
from unispec.cli import unispec

__all__ = ["CHAT_TEMPLATE", "FakeEngine", "assert_refused", "run", "save_checkpoint"]

VOCABULARY = {"<unk>": 0, "<bos>": 1, "<user>": 2, "<bot>": 3, "hello": 4, "world": 5, "<image>": 6}
CHAT_TEMPLATE = (
    "{% for message in messages %}<user> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def _tokenizer(chat_template: str | None) -> PreTrainedTokenizerBase:
    """One token a word; `<bos>` is put first when special tokens are added."""
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", VOCABULARY["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", chat_template=chat_template
    )


class FakeEngine:
    """Answers "one two" to every prompt and keeps what it was given."""

    chat_template: str | None = CHAT_TEMPLATE
    pieces: Sequence[str] = ("one", " two")
    finish_reason = "length"
    reads_images = False
    step_time_s = 0.0125
    logprobs = (
        engine_package.TokenLogprobs(logprob=-0.5, top={10: -0.5, 11: -1.25}),
        engine_package.TokenLogprobs(logprob=-2.0, top={21: -0.25, 22: -1.75}),
        engine_package.TokenLogprobs(logprob=-0.125, top={}),
    )
    during_generate: Callable[[], None] = staticmethod(lambda: None)
    made: ClassVar[list[FakeEngine]]

    def __init__(
        self,
        config: engine_package.EngineConfig,
        *,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = _tokenizer(self.chat_template)
        self.max_length = 64
        self.requests: Sequence[engine_package.Request] = ()
        self.streamed = False
        self.made.append(self)
        for phase in ("loading weights", "compiling", "ready"):
            if on_progress is not None:
                on_progress(phase)

    def compile(self, folder: Path) -> None:
        folder.mkdir()

    def generate(
        self,
        requests: Sequence[engine_package.Request],
        *,
        on_text: Callable[[int, str], None] | None = None,
        on_finish: Callable[[int], None] | None = None,
    ) -> engine_package.Report:
        self.requests = requests
        self.streamed = on_text is not None
        self.during_generate()
        if on_text is not None:
            for piece in self.pieces:
                for index in reversed(range(len(requests))):
                    on_text(index, piece)
        if on_finish is not None:
            for index in range(len(requests)):
                on_finish(index)
        return engine_package.Report(
            results=[
                engine_package.Result(
                    token_ids=[10, 20, 30],
                    text="".join(self.pieces),
                    finish_reason=self.finish_reason,
                    drafted=4,
                    accepted=3,
                    logprobs=[] if request.logprobs is None else list(self.logprobs),
                )
                for request in requests
            ],
            acceptance_per_position=[0.75, 0.5],
            mean_acceptance_length=2.25,
            tokens_per_second=123.456,
            time_to_first_token_s=0.375,
            step_time_s=self.step_time_s,
            graph_time_s=0.012,
            steps=2,
        )


def run(
    *arguments: str | Path, stdin: str | bytes | None = None, command: str = "generate"
) -> Result:
    """Runs a command and lets defects through."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(
        unispec, [command, *map(str, arguments)], input=stdin, catch_exceptions=False
    )


def save_checkpoint(folder: Path) -> Path:
    """Writes what the command looks at before it makes an engine."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder


def assert_refused(result: Result, *words: str) -> None:
    """Asserts status 2 and one line on stderr that holds these words."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in message
