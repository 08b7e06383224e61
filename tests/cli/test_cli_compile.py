"""`unispec compile` and `--compiled` with an engine that only keeps what it was given."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_engine import FakeEngine, assert_refused, run


def test_an_engine_of_these_options_writes_its_graph(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "graph"
    done = run("--model", model, "--max-length", 100, "-o", output, command="compile")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"Written to {output}\n"
    assert output.is_dir()
    (made,) = engine.made
    assert (made.config.model, made.config.max_length) == (str(model), 100)
    assert made.config.compiled is None


def test_generate_takes_the_graph_from_a_folder(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    done = run("--model", model, "--prompt", "hello", "--compiled", tmp_path)
    assert done.exit_code == 0, done.output
    assert engine.made[0].config.compiled == tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["Missing option", "--output"]),
        ("-o {new} --target rocm", ["'rocm' is neither 'cpu' nor one of", "'cuda:sm_90a'"]),
        ("-o {new} --target cuda:sm_1", ["'cuda:sm_1' is neither 'cpu' nor one of"]),
        ("-o {new} --target cuda:sm_90a:2", ["has 2 GPUs; generate and serve run on one"]),
        ("-o {new} --target cuda:sm_90a --devices gpu", ["--devices gpu", "leave --devices out"]),
        ("-o {new} --devices gpu", ["--devices gpu", "leave --devices out"]),
        ("-o {full}", ["{full} is there already and not empty; give another folder"]),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_is_read(
    engine: type[FakeEngine], model: Path, tmp_path: Path, arguments: str, words: list[str]
) -> None:
    places = {"new": str(tmp_path / "graph"), "full": str(model)}
    options = arguments.format(**places).split()
    done = run("--model", model, *options, command="compile")
    assert_refused(done, *(word.format(**places) for word in words))
    assert engine.made == []
    assert not (tmp_path / "graph").exists()


def test_a_folder_that_is_not_there_is_refused(engine: type[FakeEngine], model: Path) -> None:
    done = run("--model", model, "--prompt", "hello", "--compiled", "nowhere")
    assert_refused(done, "--compiled", "'nowhere' does not exist")
    assert engine.made == []
