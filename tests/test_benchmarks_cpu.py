"""`benchmarks/cpu.py`: what is computed of the answers, and the files that are made."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

# As of a script that lies there.
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from on_cpu.answer import Answer, Arrivals
from on_cpu.budget import Budget
from on_cpu.contenders import CONTENDERS
from on_cpu.formats import FORMATS
from on_cpu.gguf_writing import weight_bytes
from on_cpu.interpreters import Interpreters
from on_cpu.llama_http import complete, score_all
from on_cpu.measurement import Cell
from on_cpu.models import Model, who_runs
from on_cpu.random_gguf import Shape, random_gguf
from on_cpu.summary import summarise
from on_cpu.table import decode_table, prefill_table
from on_cpu.texts import RandomTexts
from rich.console import Console

from unispec.checkpoints.gguf import read_gguf

TINY = Shape(
    name="tiny",
    layers=1,
    hidden=256,
    heads=4,
    key_heads=2,
    head_dim=64,
    intermediate=512,
    vocabulary=768,
    context=64,
    rope_theta=10000.0,
)


def an_answer(tokens_per_second: float, *, length: float = 1.0, ids: int = 0) -> Answer:
    return Answer(
        token_ids=[[ids]],
        first_token_s=0.1,
        decode_s=1.0,
        decode_tokens=round(tokens_per_second),
        acceptance_length=length,
    )


def test_only_the_time_counts_in_which_all_answers_are_decoded() -> None:
    arrivals = Arrivals()
    arrivals.start(2)
    for row, at, tokens in ((0, 1.0, 1), (0, 2.0, 2), (1, 3.0, 1), (0, 4.0, 2), (1, 5.0, 3)):
        arrivals.tick(row, tokens, at)
    arrivals.tick(0, 1, 6.0)
    answer = arrivals.answer([[1], [2]])
    assert answer.decode_s == 2.0
    assert answer.decode_tokens == 2 + 3
    assert answer.acceptance_length == (2 + 2 + 3 + 1) / 4


def test_ratios_are_those_of_the_same_round() -> None:
    cell = Cell(rows=1, context=100)
    answers = {
        "llama": [an_answer(10), an_answer(20)],
        "unispec": [an_answer(20, ids=7), an_answer(40)],
        "eagle3-k1": [an_answer(30, length=1.5, ids=7), an_answer(60, length=1.5)],
    }
    found = summarise(cell, answers, weight_bytes=10**9)
    ratio = found["unispec"].ratio
    assert ratio is not None
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)
    assert found["llama"].same is None
    assert (found["unispec"].same, found["unispec"].compared_with) == ((1, 2), "llama")
    assert (found["eagle3-k1"].same, found["eagle3-k1"].compared_with) == ((2, 2), "unispec")
    # 1.5 tokens a step at 30 and 60 tokens a second.
    assert found["eagle3-k1"].step_s.median == pytest.approx((1 / 20 + 1 / 40) / 2)
    assert found["unispec"].gb_per_second == pytest.approx(1 / 0.0375)


def test_tables_say_unknown_where_nothing_was_measured() -> None:
    cell = Cell(rows=1, context=100)
    found = {cell: summarise(cell, {"unispec": [an_answer(20)]}, weight_bytes=10**9)}
    console = Console(width=120)
    with console.capture() as capture:
        console.print(decode_table("in F32", found, reading_gb_per_s=40))
        console.print(prefill_table({38: {"unispec": [0.1]}, 512: {}}))
    text = capture.get()
    assert "batch 1, context about 100" in text
    assert "50%" in text
    assert "380" in text


def test_a_part_of_the_budget_has_what_earlier_ones_left() -> None:
    budget = Budget(30, 3)
    with budget.part() as deadline:
        assert deadline - monotonic() == pytest.approx(10, abs=0.5)
    with budget.part() as deadline:
        assert deadline - monotonic() == pytest.approx(15, abs=0.5)


def test_speculation_is_for_the_model_that_has_drafts() -> None:
    everybody = list(CONTENDERS.values())
    random = Model(file=Path("a"), folder=None, form=FORMATS["q4_k"])
    demo = Model(file=Path("a"), folder=Path("b"), form=FORMATS["f32"])
    assert [who.name for who in who_runs(everybody, random)] == ["llama", "unispec", "openvino"]
    assert {"max", "transformers", "eagle3-k1"} <= {who.name for who in who_runs(everybody, demo)}


def test_what_is_not_installed_is_named() -> None:
    interpreters = Interpreters(
        own=sys.executable, llama_cpp=sys.executable, openvino=sys.executable
    )
    if interpreters.missing("llama.cpp") is not None:
        assert interpreters.missing("llama.cpp") == "not installed: pip install xllamacpp"
    assert interpreters.missing("transformers") is None
    with_server = Interpreters(own="a", llama_cpp="b", openvino="c", llama_server="d")
    assert with_server.missing("llama.cpp") is None


@pytest.mark.parametrize(
    ("name", "columns", "head"),
    [
        ("q8_0", 2048, GGMLQuantizationType.Q8_0),
        ("q4_0", 576, GGMLQuantizationType.Q8_0),
        ("q4_0", 2048, GGMLQuantizationType.Q6_K),
        ("f32", 576, GGMLQuantizationType.F32),
    ],
)
def test_the_head_has_the_type_that_llama_cpp_gives_it(
    name: str, columns: int, head: GGMLQuantizationType
) -> None:
    assert FORMATS[name].head(columns) is head


@pytest.mark.parametrize("name", list(FORMATS))
def test_random_weights_are_a_model_that_can_be_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNISPEC_CACHE", str(tmp_path))
    form = FORMATS[name]
    file = random_gguf(TINY, form)
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    query = tensors["blk.0.attn_q.weight"]
    assert query.tensor_type is form.matrices
    assert tensors["token_embd.weight"].tensor_type is form.head(TINY.hidden)
    values = dequantize(query.data, query.tensor_type)
    assert values.std() == pytest.approx(0.02, rel=0.2)
    assert weight_bytes(file) == sum(tensor.n_bytes for tensor in tensors.values())
    assert read_gguf(file).config["num_hidden_layers"] == TINY.layers


def test_random_prompts_differ_from_turn_to_turn() -> None:
    texts = RandomTexts(vocabulary=1000)
    first, second = texts.batch(100, 2, 0), texts.batch(100, 2, 1)
    assert [len(prompt) for prompt in first] == [100, 100]
    assert first != second
    assert first == texts.batch(100, 2, 0)


def test_a_single_answer_of_llama_cpp_is_timed_by_its_own_clock() -> None:
    timings = {"prompt_ms": 50.0, "predicted_ms": 200.0, "predicted_n": 5, "draft_n_accepted": 2}
    with llama_cpp([json.dumps({"tokens": [1, 2, 3, 4, 5], "timings": timings})]) as host:
        answer = complete(host, [[7, 8]], 5)
    assert answer.token_ids == [[1, 2, 3, 4, 5]]
    assert (answer.first_token_s, answer.decode_s, answer.decode_tokens) == (0.05, 0.2, 4)
    assert answer.acceptance_length == 2.0


def test_several_answers_of_llama_cpp_are_told_by_their_index() -> None:
    timings = {"prompt_ms": 1.0, "predicted_ms": 1.0, "predicted_n": 2}
    events: list[dict[str, Any]] = [
        {"index": index, "tokens": [token], "stop": False} for token in (1, 2) for index in (0, 1)
    ]
    events += [{"index": index, "tokens": [], "stop": True, "timings": timings} for index in (0, 1)]
    with llama_cpp([f"data: {json.dumps(event)}\n\n" for event in events]) as host:
        answer = complete(host, [[7], [8]], 2)
    assert answer.token_ids == [[1, 2], [1, 2]]
    assert answer.acceptance_length == 1.0


def test_a_text_that_llama_cpp_changed_is_no_score() -> None:
    said = [{"logprob": -1.0}, {"logprob": -2.0}]
    with llama_cpp([json.dumps({"tokens": [2, 3], "completion_probabilities": said})]) as host:
        assert score_all(host, [[1, 2, 3]]) == [[-1.0, -2.0]]
        with pytest.raises(RuntimeError, match="did not write the text"):
            score_all(host, [[1, 2, 4]])


@contextmanager
def llama_cpp(parts: list[str]) -> Iterator[str]:
    """A server that answers so whatever it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            for part in parts:
                self.wfile.write(part.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
