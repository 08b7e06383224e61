"""The command line, with an engine that answers from a script instead of a compiled graph."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from max.pipelines.context import SamplingParams
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unispec.cli import unispec
from unispec.commands.console import Answers, progress, summary
from unispec.commands.prompts import PromptOptions
from unispec.errors import InputError
from unispec.pipelines import runtime

VOCABULARY = {"<unk>": 0, "<bos>": 1, "<user>": 2, "<bot>": 3, "hello": 4, "world": 5, "<image>": 6}
CHAT_TEMPLATE = (
    "{% for message in messages %}<user> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
SEEING_TEMPLATE = (
    "{% for part in messages[0].content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}<bot>"
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
    during_generate: Callable[[], None] = staticmethod(lambda: None)
    made: ClassVar[list[FakeEngine]]

    def __init__(
        self,
        config: runtime.EngineConfig,
        *,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = _tokenizer(self.chat_template)
        self.max_length = 64
        self.requests: Sequence[runtime.Request] = ()
        self.streamed = False
        self.made.append(self)
        for phase in ("loading weights", "compiling", "ready"):
            if on_progress is not None:
                on_progress(phase)

    def generate(
        self,
        requests: Sequence[runtime.Request],
        *,
        on_text: Callable[[int, str], None] | None = None,
        on_finish: Callable[[int], None] | None = None,
    ) -> runtime.Report:
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
        return runtime.Report(
            results=[
                runtime.Result(
                    token_ids=[10, 20, 30],
                    text="".join(self.pieces),
                    finish_reason=self.finish_reason,
                    drafted=4,
                    accepted=3,
                )
                for _ in requests
            ],
            acceptance_per_position=[0.75, 0.5],
            mean_acceptance_length=2.25,
            tokens_per_second=123.456,
            time_to_first_token_s=0.375,
            step_time_s=self.step_time_s,
            graph_time_s=0.012,
            steps=2,
        )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    """The class that the command takes for the engine; tests may change its attributes."""

    class Scripted(FakeEngine):
        made: ClassVar[list[FakeEngine]] = []

    monkeypatch.setattr(runtime, "Engine", Scripted)
    return Scripted


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint folder without defaults for sampling."""
    return save_checkpoint(tmp_path / "model")


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    """Runs `unispec generate` and lets defects through."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(
        unispec, ["generate", *map(str, arguments)], input=stdin, catch_exceptions=False
    )


def save_checkpoint(folder: Path) -> Path:
    """Writes what the command looks at before it makes an engine."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder


def save_image(file: Path) -> Path:
    """Saves a picture in the format of the file's suffix."""
    Image.new("RGB", (20, 10), "red").save(file)
    return file


def sampling(engine: type[FakeEngine], *arguments: str | Path) -> SamplingParams:
    """The sampling parameters that reach the engine."""
    assert run("--prompt", "hello", *arguments).exit_code == 0
    return engine.made[-1].requests[0].sampling


def assert_refused(result: Result, *words: str) -> None:
    """Asserts status 2 and one line on stderr that holds these words."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in message


# Help


def test_help_as_a_module() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "unispec.cli", "generate", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),  # importing max changes it behind Python's back
    )
    assert shown.stdout.startswith("Usage: unispec generate")
    assert shown.stderr == ""
    flags = """--model --model-path --weight-path --draft-model-path --speculative-method
        --num-speculative-tokens --devices --max-length --max-new-tokens --max-batch-size
        --temperature --top-k --top-p --min-p --presence-penalty --frequency-penalty
        --repetition-penalty --seed --stop --ignore-eos --prompt --quantization-encoding
        --enable-prefix-caching --no-enable-prefix-caching --prompt-file --no-chat-template
        --json-schema --regex --json --no-speculation --image"""
    assert set(flags.split()) <= set(re.findall(r"--[a-z-]+", shown.stdout))


def test_help_and_wrong_options_import_nothing_heavy() -> None:
    script = """
import sys
from unispec.cli import unispec
for arguments in (["generate", "--help"], ["generate", "--model", "m", "--top-p", "2"]):
    try:
        unispec(arguments)
    except SystemExit:
        pass
print(sorted({"max", "numpy", "rich", "torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_command_shows_help() -> None:
    result = CliRunner().invoke(unispec, [])
    assert result.exit_code == 2
    assert "generate" in result.stderr


# Output


def test_json_is_all_there_is_on_stdout(engine: type[FakeEngine], model: Path) -> None:
    engine.during_generate = staticmethod(lambda: print("a library speaks"))
    result = run("--model", model, "--prompt", "hello", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "results": [
            {
                "prompt": "hello",
                "text": "one two",
                "token_ids": [10, 20, 30],
                "finish_reason": "length",
                "drafted": 4,
                "accepted": 3,
            }
        ],
        "mean_acceptance_length": 2.25,
        "acceptance_per_position": [0.75, 0.5],
        "tokens_per_second": 123.456,
        "time_to_first_token_s": 0.375,
        "step_time_s": 0.0125,
    }
    assert "a library speaks" in result.stderr
    assert not engine.made[0].streamed


def test_json_keeps_prompt_order_and_any_character(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    prompts = ["hello", "wörld \u2028 日本", '"quoted" [bold]']
    (tmp_path / "prompts").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    result = run("--model", model, "--prompt-file", tmp_path / "prompts", "--json")
    assert [entry["prompt"] for entry in json.loads(result.stdout)["results"]] == prompts
    assert result.stdout.count("\n") == 1


def test_json_has_null_for_what_was_not_measured(engine: type[FakeEngine], model: Path) -> None:
    engine.step_time_s = math.nan
    result = run("--model", model, "--prompt", "hello", "--json")
    assert json.loads(result.stdout)["step_time_s"] is None


def test_one_answer_is_the_whole_output(engine: type[FakeEngine], model: Path) -> None:
    engine.during_generate = staticmethod(lambda: print("a library speaks"))
    result = run("--model", model, "--prompt", "hello")
    assert result.exit_code == 0
    assert result.stdout == "one two\n"


def test_warnings_of_libraries_are_kept_off_the_terminal(
    engine: type[FakeEngine], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Pillow's for an image of 100 million pixels, which it reads; `python -W` shows them."""
    heard: list[int] = []

    def warn() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn("a library warns", stacklevel=1)
        heard.append(len(caught))

    engine.during_generate = staticmethod(warn)
    for options in ([], ["always"]):
        monkeypatch.setattr(sys, "warnoptions", options)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert run("--model", model, "--prompt", "hello").exit_code == 0
    assert heard == [0, 1]


def test_progress_comes_in_order_without_a_terminal(engine: type[FakeEngine], model: Path) -> None:
    lines = run("--model", model, "--prompt", "hello").stderr.splitlines()
    phases = [line.split(" s  ")[1] for line in lines if re.match(r" +\d+\.\d s  ", line)]
    assert phases == [
        "starting MAX",
        "loading weights",
        "compiling",
        "ready",
        "generating",
    ]


def test_table_shows_the_numbers(engine: type[FakeEngine], model: Path) -> None:
    lines = run("--model", model, "--prompt", "hello").stderr.splitlines()
    rows = [line.split("│")[1:3] for line in lines if line.startswith("│")]
    assert {name.strip(): value.strip() for name, value in rows} == {
        "tokens": "3",
        "tokens/s": "123.5",
        "time to first token": "0.38 s",
        "step time": "12.5 ms",
        "mean acceptance length": "2.25",
        "acceptance per position": "75% 50%",
    }


def test_table_of_a_batch_without_speculation() -> None:
    result = runtime.Result(token_ids=[1, 2], text="", finish_reason="stop", drafted=0, accepted=0)
    report = runtime.Report(
        results=[result, result, result],
        acceptance_per_position=[],
        mean_acceptance_length=1.0,
        tokens_per_second=1.0,
        time_to_first_token_s=1.0,
        step_time_s=math.nan,
        graph_time_s=math.nan,
        steps=0,
    )
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(summary(report))
    assert isinstance(terminal.file, io.StringIO)
    shown = " ".join(terminal.file.getvalue().split())
    for row in ("prompts │ 3", "tokens │ 6", "step time │ -", "per position │ -"):
        assert row in shown


def test_several_answers_stand_under_their_prompts(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_text(f"hello\n{'world ' * 40}\n\n")
    result = run("--model", model, "--prompt-file", tmp_path / "prompts")
    lines = result.stdout.splitlines()
    assert lines[:3] == ["[1/2] hello", "one two", ""]
    assert lines[3].startswith("[2/2] world world")
    assert len(lines[3]) <= 80
    assert lines[4:] == ["one two"]


def test_answers_stream_in_prompt_order() -> None:
    stream = io.StringIO()
    answers = Answers(["p", "q", "r"], stream)

    def shown_after(step: Callable[..., None], *arguments: object) -> str:
        start = len(stream.getvalue())
        step(*arguments)
        return stream.getvalue()[start:]

    assert shown_after(answers.add, 1, "second") == ""
    assert shown_after(answers.add, 0, "fi") == "[1/3] p\nfi"
    assert shown_after(answers.finish, 1) == ""
    assert shown_after(answers.add, 0, "rst") == "rst"
    assert shown_after(answers.add, 2, "thi") == ""
    assert shown_after(answers.finish, 0) == "\n\n[2/3] q\nsecond\n\n[3/3] r\nthi"
    assert shown_after(answers.add, 2, "rd\n") == "rd\n"
    assert shown_after(answers.finish, 2) == ""


def test_an_empty_answer_is_an_empty_output() -> None:
    stream = io.StringIO()
    Answers(["p"], stream).finish(0)
    assert stream.getvalue() == ""


def test_spinner_on_a_terminal_shows_the_phase_and_leaves_nothing() -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=80, color_system=None)
    with progress(terminal) as phase:
        phase("compiling [first run]")
        assert "\x1b[?25l" in stream.getvalue()
    shown = stream.getvalue()
    assert "compiling [first run] 0:00:00" in shown
    assert shown.endswith("\x1b[2K")
    assert "\x1b[?25h" in shown


# What reaches the engine


def test_model_options_reach_the_engine(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    draft = save_checkpoint(tmp_path / "draft")
    weights = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in weights:
        save_file({file.stem: np.zeros(1, np.float32)}, file)
    arguments = f"""--model-path {model} --weight-path {weights[0]} --weight-path {weights[1]}
        --draft-model-path {draft} --speculative-method eagle --num-speculative-tokens 8
        --devices gpu:1 --max-length 256 --max-batch-size 4 --max-batch-input-tokens 128
        --quantization-encoding bfloat16 --no-enable-prefix-caching --kv-cache-pages 9"""
    assert run("--prompt", "hello", *arguments.split()).exit_code == 0
    assert engine.made[0].config == runtime.EngineConfig(
        model=str(model),
        weight_path=tuple(weights),
        draft_model=str(draft),
        speculative_method="eagle",
        num_speculative_tokens=8,
        devices="gpu:1",
        max_length=256,
        max_batch_size=4,
        quantization_encoding="bfloat16",
        enable_prefix_caching=False,
        max_batch_input_tokens=128,
        kv_cache_pages=9,
    )


def test_model_defaults_are_the_engines(engine: type[FakeEngine], model: Path) -> None:
    assert run("--prompt", "hello", "--model", model).exit_code == 0
    assert engine.made[0].config == runtime.EngineConfig(model=str(model))


@pytest.mark.parametrize(("method", "k"), [("eagle", 5), ("dflash", 15)])
def test_no_speculation_leaves_the_draft_out(
    engine: type[FakeEngine], model: Path, method: str, k: int
) -> None:
    draft = f"--draft-model-path draft --speculative-method {method} --num-speculative-tokens {k}"
    result = run("--prompt", "hello", "--model", model, *draft.split(), "--no-speculation")
    assert result.exit_code == 0
    assert engine.made[0].config.draft_model is None
    assert engine.made[0].config.speculative_method is None


@pytest.mark.parametrize(("count", "batch"), [(3, 3), (20, 8)])
def test_a_batch_runs_together(
    engine: type[FakeEngine], model: Path, tmp_path: Path, count: int, batch: int
) -> None:
    (tmp_path / "prompts").write_text("hello\n" * count)
    assert run("--model", model, "--prompt-file", tmp_path / "prompts").exit_code == 0
    assert engine.made[0].config.max_batch_size == batch
    assert len(engine.made[0].requests) == count


@pytest.mark.parametrize(
    ("chat_template", "flags", "token_ids"),
    [
        (CHAT_TEMPLATE, [], [2, 4, 5, 3]),
        (CHAT_TEMPLATE, ["--no-chat-template"], [1, 4, 5]),
        (None, [], [1, 4, 5]),
    ],
)
def test_prompt_is_encoded_as_the_tokenizer_wants(
    engine: type[FakeEngine],
    model: Path,
    chat_template: str | None,
    flags: list[str],
    token_ids: list[int],
) -> None:
    engine.chat_template = chat_template
    assert run("--model", model, "--prompt", "hello world", *flags).exit_code == 0
    assert list(engine.made[0].requests[0].token_ids) == token_ids


@pytest.mark.parametrize(
    ("chat_template", "text", "token_ids"),
    [(SEEING_TEMPLATE, "hello", [6, 6, 4, 3]), (None, "hello <image> <image>", [1, 4, 6, 6])],
)
def test_images_reach_the_request_in_order(
    engine: type[FakeEngine],
    model: Path,
    tmp_path: Path,
    chat_template: str | None,
    text: str,
    token_ids: list[int],
) -> None:
    """The chat template writes their placeholders; without one the prompt has them itself."""
    engine.chat_template, engine.reads_images = chat_template, True
    files = [save_image(tmp_path / name) for name in ("b.png", "a.webp")]
    flags = ["--image", str(files[0]), "--image", str(files[1])]
    result = run("--model", model, "--prompt", text, "--json", *flags)
    (request,) = engine.made[0].requests
    assert list(request.token_ids) == token_ids
    assert list(request.images) == files
    assert json.loads(result.stdout)["results"][0]["prompt"] == text


def test_a_text_prompt_stays_text_for_a_model_that_reads_images(
    engine: type[FakeEngine], model: Path
) -> None:
    engine.reads_images = True
    assert run("--model", model, "--prompt", "hello world").exit_code == 0
    (request,) = engine.made[0].requests
    assert list(request.token_ids) == [2, 4, 5, 3]
    assert list(request.images) == []


def test_an_image_for_a_model_that_reads_none_is_refused(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    """By its own error, whatever its chat template makes of content in parts."""
    engine.chat_template = "{{ raise_exception('content is no text') }}"
    file = save_image(tmp_path / "cat.png")
    result = run("--model", model, "--prompt", "hello", "--image", file)
    assert_refused(result, "--image", str(model), "reads no images")


def test_an_image_that_cannot_be_used_is_refused_before_anything_is_loaded(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    file = save_image(tmp_path / "cat.gif").rename(tmp_path / "cat.png")
    result = run("--model", model, "--prompt", "hello", "--image", file)
    assert_refused(result, str(file), "PNG, JPEG or WebP")
    assert engine.made == []


# Standard input


def test_what_is_piped_in_is_one_prompt(engine: type[FakeEngine], model: Path) -> None:
    for piped, prompt in [
        ("hello\nworld\n", "hello\nworld"),
        ("hello\n\n", "hello\n"),
        ("hello", "hello"),
        ("\ufeffhello\r\nwörld\r\n", "hello\nwörld"),
    ]:
        result = run("--model", model, "--json", stdin=piped.encode())
        assert [entry["prompt"] for entry in json.loads(result.stdout)["results"]] == [prompt]


def test_a_prompt_that_is_given_leaves_standard_input_alone(
    engine: type[FakeEngine], model: Path
) -> None:
    result = run("--model", model, "--prompt", "hello", "--json", stdin="world\n")
    assert [entry["prompt"] for entry in json.loads(result.stdout)["results"]] == ["hello"]


def test_an_image_may_belong_to_a_piped_prompt(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    engine.chat_template, engine.reads_images = SEEING_TEMPLATE, True
    file = save_image(tmp_path / "cat.jpg")
    assert run("--model", model, "--image", file, stdin="hello\n").exit_code == 0
    (request,) = engine.made[0].requests
    assert (list(request.token_ids), list(request.images)) == ([6, 4, 3], [file])


def test_a_dash_as_prompt_file_is_one_prompt_a_line(engine: type[FakeEngine], model: Path) -> None:
    result = run("--model", model, "--prompt-file", "-", "--json", stdin="hello\nworld\n")
    prompts = [entry["prompt"] for entry in json.loads(result.stdout)["results"]]
    assert prompts == ["hello", "world"]


def test_a_dash_as_schema_is_standard_input(engine: type[FakeEngine], model: Path) -> None:
    schema = ["--model", model, "--json-schema", "-"]
    assert run(*schema, "--prompt", "hello", stdin='{"type": "object"}').exit_code == 0
    (request,) = engine.made[0].requests
    assert request.grammar is not None
    assert request.grammar.text == '{"type": "object"}'
    # It is no prompt, too.
    assert_refused(run(*schema, stdin='{"type": "object"}'), "no prompt", "--prompt")
    twice = run(*schema, "--prompt-file", "-", stdin='{"type": "object"}')
    assert_refused(twice, "standard input", "two options")


def test_standard_input_that_cannot_be_used_is_one_line(engine: type[FakeEngine]) -> None:
    for piped, flags, words in [
        (b"", [], ["no prompt", "--prompt", "--prompt-file", "pipe"]),
        (b"\n", [], ["no prompt"]),
        (b"hello \xff", [], ["standard input", "UTF-8", "byte 6"]),
        (b"hello \xff", ["--prompt-file", "-"], ["--prompt-file", "standard input", "UTF-8"]),
        (b"", ["--prompt-file", "-"], ["--prompt-file", "standard input", "no prompt"]),
        (b"a\n\nb", ["--prompt-file", "-"], ["standard input", "line 2"]),
        (b"[]", ["--json-schema", "-"], ["--json-schema", "standard input", "JSON object"]),
    ]:
        result = run("--model", "m", *flags, stdin=piped)
        assert_refused(result, *words)
        assert len(result.stderr.splitlines()) == 1
    assert engine.made == []


def test_nothing_is_read_from_a_terminal(
    engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("hello"))
    with pytest.raises(click.UsageError, match="no prompt"):
        unispec(["generate", "--model", "m"], standalone_mode=False)
    assert sys.stdin.read() == "hello"


# Sampling


def test_sampling_options_reach_the_request(engine: type[FakeEngine], model: Path) -> None:
    arguments = """--max-new-tokens 7 --temperature 0.5 --top-k 40 --top-p 0.9 --min-p 0.05
        --presence-penalty 0.1 --frequency-penalty -0.2 --repetition-penalty 1.3 --seed 11
        --stop END --stop STOP --ignore-eos"""
    assert sampling(engine, "--model", model, *arguments.split()) == SamplingParams(
        max_new_tokens=7,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        repetition_penalty=1.3,
        seed=11,
        stop=["END", "STOP"],
        ignore_eos=True,
    )


def test_sampling_defaults_are_those_of_max(engine: type[FakeEngine], model: Path) -> None:
    params = sampling(engine, "--model", model)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1, -1, 1, 0)
    assert params.max_new_tokens == 100
    assert not params.ignore_eos


def test_the_checkpoint_overrides_defaults_and_options_override_both(
    engine: type[FakeEngine], model: Path
) -> None:
    (model / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 3})
    )
    params = sampling(engine, "--model", model, "--top-p", "0.5")
    assert (params.temperature, params.top_p, params.max_new_tokens) == (0.6, 0.5, 100)


def test_a_checkpoint_that_does_not_sample_is_greedy(engine: type[FakeEngine], model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    assert sampling(engine, "--model", model).temperature == 0


GREEDY: list[dict[str, object]] = [
    {"do_sample": False},
    {"do_sample": False, "temperature": 0.6, "top_k": 20, "top_p": 0.9},
    {"temperature": 0},
    {"do_sample": True, "top_k": 1, "top_p": 0.001},
]


@pytest.mark.parametrize("stated", GREEDY)
@pytest.mark.parametrize(
    ("asked", "temperature", "top_k", "top_p", "min_p"),
    [
        ("", 0, 1, 1, 0),
        ("--temperature 0", 0, 1, 1, 0),
        ("--temperature 1", 1, -1, 1, 0),
        ("--temperature 0.7 --top-p 0.95", 0.7, -1, 0.95, 0),
        ("--top-k 40", 1, 40, 1, 0),
        ("--top-k -1", 1, -1, 1, 0),
        ("--top-p 0.8", 1, -1, 0.8, 0),
        ("--min-p 0.1", 1, -1, 1, 0.1),
    ],
)
def test_who_asks_a_greedy_checkpoint_to_sample_gets_exactly_that(
    engine: type[FakeEngine],
    model: Path,
    stated: dict[str, object],
    asked: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    penalty = {"repetition_penalty": 1.1}
    (model / "generation_config.json").write_text(json.dumps(stated | penalty))
    params = sampling(engine, "--model", model, *asked.split())
    assert (params.temperature, params.top_k) == (temperature, top_k)
    assert (params.top_p, params.min_p) == (top_p, min_p)
    assert params.repetition_penalty == 1.1


def test_requests_share_a_given_seed_and_no_drawn_one(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_text("hello\n" * 8)
    batch: list[str | Path] = ["--model", model, "--prompt-file", tmp_path / "prompts"]
    for flags, seeds in ([], 8), (["--seed", "5"], 1):
        assert run(*batch, *flags).exit_code == 0
        requests = engine.made[-1].requests
        assert len({request.sampling.seed for request in requests}) == seeds


def test_a_grammar_reaches_every_request(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_text("hello\nworld\n")
    (tmp_path / "schema").write_text('{"type": "object"}')
    batch: list[str | Path] = ["--model", model, "--prompt-file", tmp_path / "prompts"]
    for flags, kind, text in (
        (["--json-schema", str(tmp_path / "schema")], "json_schema", '{"type": "object"}'),
        (["--regex", "[a-z]+"], "regex", "[a-z]+"),
    ):
        assert run(*batch, *flags).exit_code == 0
        for request in engine.made[-1].requests:
            assert request.grammar is not None
            assert (request.grammar.kind, request.grammar.text) == (kind, text)


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--prompt hello", ["Missing option", "--model"]),
        ("--model m", ["--prompt", "--prompt-file"]),
        ("--model m --prompt a --prompt-file {file}", ["--prompt", "--prompt-file", "exclude"]),
        ("--model m --prompt-file nowhere", ["--prompt-file", "nowhere", "No such file"]),
        ("--model m --prompt-file {empty}", ["--prompt-file", "{empty}", "no prompt"]),
        ("--model m --prompt-file {gap}", ["--prompt-file", "{gap}", "line 2"]),
        ("--model m --prompt-file {binary}", ["--prompt-file", "{binary}", "UTF-8"]),
        ("--model m --prompt a --image nowhere.png", ["--image", "nowhere.png", "not exist"]),
        ("--model m --prompt a --image {folder}", ["--image", "{folder}", "is a directory"]),
        (
            "--model m --prompt-file {file} --image {empty}",
            ["--image {empty}", "--prompt", "--prompt-file"],
        ),
        ("--model m --prompt a --json-schema nowhere", ["--json-schema", "nowhere"]),
        ("--model m --prompt a --json-schema {file}", ["--json-schema", "{file}", "line 1"]),
        ("--model m --prompt a --json-schema {deep}", ["--json-schema", "{deep}", "nested"]),
        ("--model m --prompt a --json-schema {number}", ["--json-schema", "no JSON schema"]),
        (
            "--model m --prompt a --json-schema {schema} --regex x",
            ["--json-schema", "--regex", "exclude"],
        ),
        ("--model m --prompt a --weight-path nowhere", ["--weight-path", "nowhere"]),
        ("--model m --prompt a --num-speculative-tokens 0", ["-tokens", "0", "x>=1"]),
        (
            "--model m --prompt a --draft-model-path d --speculative-method eagle"
            " --num-speculative-tokens 9",
            ["-tokens", "9", "1<=x<=8", "eagle"],
        ),
        ("--model m --prompt a --num-speculative-tokens 3", ["3", "--draft-model-path"]),
        (
            "--model m --prompt a --draft-model-path d --speculative-method oracle",
            ["--speculative-method", "oracle", "eagle"],
        ),
        ("--model m --prompt a --speculative-method eagle", ["eagle", "--draft-model-path"]),
        ("--model m --prompt a --draft-model-path d", ["d", "--speculative-method", "eagle"]),
        ("--model m --prompt a --devices tpu", ["--devices", "tpu", "gpu:ID"]),
        ("--model m --prompt a --temperature -0.1", ["--temperature", "-0.1", "0<=x<=2"]),
        ("--model m --prompt a --temperature nan", ["--temperature", "nan"]),
        ("--model m --prompt a --temperature warm", ["--temperature", "warm"]),
        ("--model m --prompt a --top-k -2", ["--top-k", "-2"]),
        ("--model m --prompt a --top-p 1.5", ["--top-p", "1.5"]),
        ("--model m --prompt a --top-p nan", ["--top-p", "nan"]),
        ("--model m --prompt a --min-p 2", ["--min-p", "2"]),
        ("--model m --prompt a --presence-penalty 3", ["--presence-penalty", "3"]),
        ("--model m --prompt a --frequency-penalty -3", ["--frequency-penalty", "-3"]),
        ("--model m --prompt a --repetition-penalty 0", ["--repetition-penalty", "0"]),
        ("--model m --prompt a --repetition-penalty inf", ["--repetition-penalty", "inf"]),
        ("--model m --prompt a --seed -1", ["--seed", "-1"]),
        ("--model m --prompt a --max-new-tokens 0", ["--max-new-tokens", "0"]),
        ("--model m --prompt a --max-length 0", ["--max-length", "0"]),
        ("--model m --prompt a --max-batch-size 0", ["--max-batch-size", "0"]),
        ("--model m --prompt a --quantization-encoding q9", ["-encoding", "q9", "bfloat16"]),
        ("--model m --prompt a --warp", ["--warp"]),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_loaded(
    engine: type[FakeEngine], tmp_path: Path, arguments: str, words: list[str]
) -> None:
    contents = {
        "file": b"hello\n",
        "empty": b"\n\n",
        "gap": b"hello\n\nworld\n",
        "binary": b"\xff\xfe",
        "number": b"3",
        "deep": b'{"a":' * 100_000,
        "schema": b"{}",
    }
    files = {name: tmp_path / name for name in contents}
    for name, content in contents.items():
        files[name].write_bytes(content)
    files["folder"] = tmp_path
    result = run(*arguments.format(**files).split())
    assert_refused(result, *(word.format(**files) for word in words))
    assert len(result.stderr.splitlines()) == 1
    assert engine.made == []


@pytest.mark.parametrize("flag", ["--prompt", "--stop", "--regex"])
def test_empty_text_is_refused(engine: type[FakeEngine], flag: str) -> None:
    others = [] if flag == "--prompt" else ["--prompt", "hello"]
    assert_refused(run("--model", "m", *others, flag, ""), flag, "empty")


def test_a_prompt_that_is_not_utf8_is_refused(engine: type[FakeEngine]) -> None:
    assert_refused(run("--model", "m", "--prompt", os.fsdecode(b"\xff")), "--prompt", "UTF-8")


def test_a_prompt_in_utf8_is_read_whatever_the_locale_is() -> None:
    """Where the locale is ASCII, Python hands over the bytes that it cannot read as surrogates."""
    given = "\u00fcber".encode().decode("ascii", "surrogateescape")
    prompts = PromptOptions(prompt=given, prompt_file=None, image=(), chat_template=True)
    assert prompts.texts == ("\u00fcber",)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_what_the_engine_refuses_is_one_line(
    engine: type[FakeEngine], model: Path, flags: list[str]
) -> None:
    def refuse() -> None:
        raise InputError("the prompt has 99 tokens,\n  more than 64")

    engine.during_generate = staticmethod(refuse)
    assert_refused(
        run("--model", model, "--prompt", "hello", *flags),
        "error: the prompt has 99 tokens, more than 64",
    )


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"temperature": 9.5}', '{"top_p": "high"}', '{"do_sample": "no"}'],
)
def test_a_wrong_generation_config_is_named(
    engine: type[FakeEngine], model: Path, content: str
) -> None:
    (model / "generation_config.json").write_text(content)
    assert_refused(run("--model", model, "--prompt", "hello"), "generation_config.json")


def test_a_refusing_chat_template_is_reported(engine: type[FakeEngine], model: Path) -> None:
    engine.chat_template = "{{ raise_exception('a system message is required') }}"
    assert_refused(
        run("--model", model, "--prompt", "hello"),
        "a system message is required",
        "--no-chat-template",
    )


def test_ctrl_c_is_status_130_and_quiet(engine: type[FakeEngine], model: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    engine.during_generate = staticmethod(interrupt)
    result = run("--model", model, "--prompt", "hello")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "Aborted" not in result.stderr


def test_a_defect_is_not_disguised(engine: type[FakeEngine], model: Path) -> None:
    def break_down() -> None:
        raise RuntimeError("a defect")

    engine.during_generate = staticmethod(break_down)
    with pytest.raises(RuntimeError, match="a defect"):
        run("--model", model, "--prompt", "hello")
