"""The interface with a worker that answers what a test says: nothing is compiled."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from max.pipelines.context import GenerationStatus
from servers import MODEL_NAME
from tiny import TinyPair

from unispec.engine import Engine, EngineConfig
from unispec.pipelines.served.context import ServedContext
from unispec.pipelines.served.output import ServedOutput
from unispec.serving.frontend import Frontend
from unispec.serving.gate import Gate
from unispec.serving.interface import ModelInterface
from unispec.serving.max_server import METRICS, Rejected, WorkerEnded
from unispec.serving.parameters import CHAT, PARAMETERS, TEXT
from unispec.serving.state import State
from unispec.serving.statistics import Statistics

ACTIVE, EOS = GenerationStatus.ACTIVE, GenerationStatus.END_OF_SEQUENCE


class Worker:
    """Answers every request with the same outputs, or an error after some of them."""

    def __init__(self) -> None:
        self.steps: Sequence[Sequence[int]] = [[70, 71], [72], [2]]
        self.ends = EOS
        self.error: Exception | None = None
        self.refuses: Exception | None = None
        self.requests: list[ServedContext] = []
        self.closed = 0

    async def stream(self, context: ServedContext) -> AsyncGenerator[ServedOutput, None]:
        if self.refuses is not None:
            raise self.refuses
        self.requests.append(context)
        return self._outputs(context)

    async def _outputs(self, context: ServedContext) -> AsyncGenerator[ServedOutput, None]:
        try:
            for at, tokens in enumerate(self.steps):
                last = at == len(self.steps) - 1 and self.error is None
                yield ServedOutput(
                    request_id=context.request_id,
                    tokens=list(tokens),
                    final_status=self.ends if last else ACTIVE,
                    drafted=3 if at else 0,
                    accepted=len(tokens) - 1 if at else 0,
                )
                await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
        finally:
            self.closed += 1


class Serving:
    def __init__(self, pair: TinyPair, **options: Any) -> None:
        config = EngineConfig(
            model=str(pair.target),
            draft_model=str(pair.draft),
            speculative_method=pair.method,
            max_length=512,
        )
        self.frontend = Frontend(config, MODEL_NAME, Engine(config))
        self.worker = Worker()
        self.state = State({"model": MODEL_NAME})
        self.statistics = Statistics(MODEL_NAME, options.pop("max_queue_size", None))
        self.app = Gate(self.state, api_key=options.pop("api_key", None), page=True)
        worker: Any = self.worker
        self.app.interface = ModelInterface(
            self.frontend, worker, self.state, self.statistics, "http://127.0.0.1:9/metrics"
        )
        self.state.begin()

    def run(self, ask: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]) -> httpx.Response:
        async def asked() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await ask(client)

        return asyncio.run(asked())

    def get(self, path: str, method: str = "GET") -> httpx.Response:
        return self.run(lambda client: client.request(method, path))

    def post(self, path: str, content: Any, **headers: str) -> httpx.Response:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.run(lambda client: client.post(path, content=raw, headers=headers))


@pytest.fixture(scope="module")
def made(chat_pair: TinyPair) -> Serving:
    return Serving(chat_pair)


@pytest.fixture
def serving(made: Serving) -> Serving:
    made.worker.__init__()  # type: ignore[misc]
    return made


def message(answer: httpx.Response) -> str:
    text: str = answer.json()["error"]["message"]
    return text


def test_an_answer(serving: Serving) -> None:
    answer = serving.post(TEXT, {"prompt": "ab", "stream": False})
    body = answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.headers["x-request-id"]) == 32
    decode = serving.frontend.engine.tokenizer.decode
    assert body["choices"] == [
        {"text": decode([70, 71, 72]), "logprobs": None, "index": 0, "finish_reason": "stop"}
    ]
    assert body["usage"]["completion_tokens"] == 4
    assert body["usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 6,
    }


def test_a_failed_step_is_a_500_or_an_event(serving: Serving) -> None:
    serving.worker.steps, serving.worker.ends = [[70], []], GenerationStatus.CANCELLED
    answer = serving.post(TEXT, {"prompt": "ab"})
    assert answer.status_code == 500
    assert message(answer) == "a step failed; nothing more comes of this answer"
    streamed = serving.post(TEXT, {"prompt": "ab", "stream": True})
    assert streamed.status_code == 200
    *pieces, error, rest = streamed.text.split("\n\n")
    assert len(pieces) == 1 and rest == ""
    assert "a step failed" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert "[DONE]" not in streamed.text


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (WorkerEnded("Killed"), 503, "the model's process has ended"),
    ],
)
def test_what_the_worker_does_not_take(
    serving: Serving, error: Exception, status: int, said: str
) -> None:
    serving.worker.refuses = error
    for stream in (False, True):
        answer = serving.post(TEXT, {"prompt": "ab", "stream": stream, "n": 3})
        assert answer.status_code == status and said in message(answer)


def test_more_than_may_wait_are_sent_away(chat_pair: TinyPair) -> None:
    serving = Serving(chat_pair, max_queue_size=2)
    waiting = serving.statistics.queue(3)
    answer = serving.post(TEXT, {"prompt": "ab"})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert message(answer).startswith("3 answers wait for their first token already")
    waiting.take()
    assert serving.post(TEXT, {"prompt": "ab"}).status_code == 429
    waiting.leave()
    waiting.leave()
    assert serving.statistics.waiting == 0
    assert serving.post(TEXT, {"prompt": "ab", "n": 8}).status_code == 200
    assert (serving.statistics.waiting, serving.statistics.running) == (0, 0)


def test_what_the_worker_does_not_begin_is_a_400(serving: Serving) -> None:
    serving.worker.steps, serving.worker.error = [], Rejected("the regex '(' cannot be used")
    for stream in (False, True):
        answer = serving.post(TEXT, {"prompt": "ab", "stream": stream})
        assert answer.status_code == 400 and message(answer) == "the regex '(' cannot be used"


def test_a_defect_is_a_500_that_names_the_request(serving: Serving) -> None:
    serving.worker.refuses = KeyError("oops")
    answer = serving.post(TEXT, {"prompt": "ab"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] in message(answer) and "oops" not in answer.text


def test_every_request_is_taken_out_when_one_fails(serving: Serving) -> None:
    serving.worker.error = WorkerEnded("Killed")
    answer = serving.post(TEXT, {"prompt": ["ab", "cd"], "n": 4, "stream": True})
    assert "the model's process has ended" in answer.text
    assert serving.worker.closed == len(serving.worker.requests)
    assert (serving.statistics.waiting, serving.statistics.running) == (0, 0)


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/nowhere", 404, "'/nowhere' is not served; /v1/chat/completions,"),
        ("POST", "/reset_prefix_cache", 404, "is not served"),
        ("POST", "/v1/embeddings", 404, "is not served"),
        ("GET", "/v1/models/other", 404, "the model 'other' is not served here; use 'tiny'"),
        ("GET", CHAT, 405, "/v1/chat/completions does not take 'GET'; send POST"),
        ("DELETE", "/v1/models", 405, "does not take 'DELETE'; send GET"),
    ],
)
def test_other_paths_and_methods(
    serving: Serving, method: str, path: str, status: int, said: str
) -> None:
    answer = serving.get(path, method)
    assert answer.status_code == status and said in message(answer)


def test_paths_that_tell_of_the_server(serving: Serving) -> None:
    assert serving.get("/v1/models").json()["data"][0]["max_model_len"] == 512
    assert serving.get("/v1/models/tiny").json()["id"] == "tiny"
    assert serving.get("/version").json()["version"]
    assert serving.get("/health", "HEAD").status_code == 200
    page = serving.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_counters_of_drafts(chat_pair: TinyPair) -> None:
    serving = Serving(chat_pair)
    serving.worker.steps = [[70], [71, 72, 73], [74], [2]]
    serving.post(TEXT, {"prompt": "ab"})
    text = serving.get("/metrics").text
    label = f'model_name="{MODEL_NAME}"'
    assert f"vllm:spec_decode_num_drafts_total{{{label}}} 3.0" in text
    assert f"vllm:spec_decode_num_draft_tokens_total{{{label}}} 9.0" in text
    assert f"vllm:spec_decode_num_accepted_tokens_total{{{label}}} 2.0" in text
    counts = [1.0, 1.0, 0.0]
    for position, count in enumerate(counts):
        labels = f'{label},position="{position}"'
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        assert f"{name}{{{labels}}} {count}" in text
    line = serving.statistics.line()
    assert line is not None
    assert line.startswith("0 running, 0 waiting, ")
    assert line.endswith("acceptance length 1.67, 22% of drafts accepted")
    assert serving.statistics.line() is None


def test_a_body_that_is_too_large(serving: Serving) -> None:
    answer = serving.post(TEXT, b" " * (17 << 20))
    assert answer.status_code == 413 and "larger than 16777216 bytes" in message(answer)


def test_before_and_after(chat_pair: TinyPair) -> None:
    serving = Serving(chat_pair)
    serving.state.stop()
    answer = serving.post(TEXT, {"prompt": "ab"})
    assert answer.status_code == 503
    assert message(answer) == "the server is stopping; send the request to another"
    assert serving.get("/health").status_code == 503
    assert serving.get("/health/live").json() == {"status": "stopping"}
    assert serving.get("/status").json()["state"] == "stopping"


def test_template_arguments(serving: Serving) -> None:
    messages = [{"role": "user", "content": "a"}]
    for name in ("tokenize", "return_dict", "messages", "add_generation_prompt"):
        answer = serving.post(CHAT, {"messages": messages, "chat_template_kwargs": {name: 1}})
        assert answer.status_code == 400 and "is not the template's" in message(answer)
    passed = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    assert serving.post(CHAT, passed).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SENSIBLE: dict[str, Any] = {
    "temperature": st.floats(0, 2),
    "top_k": st.integers(-1, 100),
    "n": st.integers(1, 8),
    "stream": st.booleans(),
    "seed": st.integers(-(2**63), 2**64 - 1),
    "stop": st.text() | st.lists(st.text(), max_size=3),
    "logit_bias": st.dictionaries(st.integers(-5, 300).map(str), st.floats(-120, 120), max_size=3),
    "max_tokens": st.integers(-1, 600),
    "stop_token_ids": st.lists(st.integers(-5, 300), max_size=3),
    "chat_template_kwargs": st.dictionaries(st.text(), JSON, max_size=2),
}
PROMPTS = JSON | st.text(min_size=1) | st.lists(st.integers(-5, 300), min_size=1, max_size=20)
CONVERSATIONS = JSON | st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": JSON}),
    max_size=3,
)
FIELDS = st.sampled_from(sorted({*PARAMETERS[CHAT], *PARAMETERS[TEXT]})).flatmap(
    lambda name: st.tuples(st.just(name), SENSIBLE.get(name, JSON) | JSON)
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([CHAT, TEXT]),
    PROMPTS,
    CONVERSATIONS,
    st.lists(FIELDS, max_size=4),
)
def test_no_body_is_a_5xx(
    serving: Serving, path: str, prompt: Any, messages: Any, fields: list[tuple[str, Any]]
) -> None:
    start = {"prompt": prompt} if path == TEXT else {"messages": messages}
    answer = serving.post(path, {**dict(fields), **start})
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([CHAT, TEXT]), st.binary(max_size=300))
def test_no_bytes_are_a_5xx(serving: Serving, path: str, raw: bytes) -> None:
    assert serving.post(path, raw).status_code == 400


def test_a_prompt_that_cannot_fit_is_not_read(serving: Serving) -> None:
    """The longest token of the tiny tokenizer has five characters."""
    for path, body in (
        (TEXT, {"prompt": "a" * 3000}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 3000}]}),
    ):
        answer = serving.post(path, body)
        assert answer.status_code == 400
        assert message(answer).startswith("the prompt has 30")
        assert message(answer).endswith("characters, more than 512 tokens can hold: shorten it")


def test_only_one_answer_is_tried_where_the_first_fails(serving: Serving) -> None:
    serving.worker.steps, serving.worker.error = [], Rejected("the regex '(' cannot be used")
    schema = {"structured_outputs": {"regex": "("}}
    answer = serving.post(TEXT, {"prompt": "ab", "n": 8, **schema})
    assert answer.json()["error"]["param"] == "structured_outputs"
    assert len(serving.worker.requests) == 1


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"stop_token_ids": [256]}, "stop_token_ids", "stop_token_ids has token id 256; the model"),
        ({"logit_bias": {"256": 1}}, "logit_bias", "logit_bias has token id 256; the model's are"),
        ({"min_tokens": 20}, "min_tokens", "min_tokens is 20, but there is room for 16 tokens"),
        (
            {"prompt": "ab" * 200, "min_tokens": 400, "max_tokens": 500},
            "min_tokens",
            "min_tokens is 400, but the prompt has room for",
        ),
        ({"prompt": ["a"] * 17, "n": 8}, "n", "17 prompts with n 8 are 136 answers; ask for at"),
    ],
)
def test_errors_name_the_parameter(
    serving: Serving, fields: dict[str, Any], param: str, said: str
) -> None:
    answer = serving.post(TEXT, {"prompt": "ab", **fields})
    assert answer.status_code == 400
    assert message(answer).startswith(said), message(answer)
    assert "new_tokens" not in message(answer) and "max_length" not in message(answer)
    assert answer.json()["error"]["param"] == param


def test_keys_and_sites(chat_pair: TinyPair) -> None:
    serving = Serving(chat_pair, api_key="secret")
    body = {"prompt": "ab"}
    for wrong in ("", "secret", "Bearer other", "Basic secret"):
        assert serving.post(TEXT, body, authorization=wrong).status_code == 401
    for right in ("Bearer secret", "bearer secret"):
        assert serving.post(TEXT, body, authorization=right).status_code == 200
    own = {"authorization": "Bearer secret", "origin": "http://test"}
    assert serving.post(TEXT, body, **own).status_code == 200
    other = serving.post(TEXT, body, **{**own, "origin": "http://elsewhere.example"})
    assert other.status_code == 403 and "'http://elsewhere.example'" in message(other)


def test_texts_that_would_take_long_do_not(serving: Serving) -> None:
    """Their cost is that of the answer, not of what is looked for."""
    began = time.perf_counter()
    serving.worker.steps = [[70] * 50] * 8 + [[2]]
    letter = serving.frontend.engine.tokenizer.decode([70])
    stops = [letter * 1990 + "x", letter * 1990 + "y"]
    answer = serving.post(TEXT, {"prompt": "ab", "max_tokens": 500, "stop": stops})
    assert answer.json()["choices"][0]["text"] == letter * 400
    assert time.perf_counter() - began < 2
    assert serving.post(TEXT, {"prompt": "ab", "stop": "z" * 4001}).status_code == 400
    properties = {f"p{number}": {} for number in range(301)}
    schema = {"type": "object", "properties": properties}
    refused = serving.post(TEXT, {"prompt": "ab", "structured_outputs": {"json": schema}})
    assert "it has 301 properties that are not required; make it at most 300" in message(refused)
    required = {**schema, "required": list(properties)}
    accepted = serving.post(TEXT, {"prompt": "ab", "structured_outputs": {"json": required}})
    assert accepted.status_code == 200


def test_labels_are_not_the_clients_to_choose(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, str]] = []
    monkeypatch.setattr(METRICS, "request_count", lambda *labels: counted.append(labels))
    for path in ("/v1/made/up", "/v1/models/x", "/nowhere", TEXT):
        serving.post(path, {"prompt": "ab"})
    assert counted == [(200, TEXT)]


def test_a_body_that_does_not_arrive_ends_with_the_server(chat_pair: TinyPair) -> None:
    serving = Serving(chat_pair)
    sent: list[Any] = []

    async def receive() -> Any:
        serving.state.stop()
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": TEXT, "headers": []}
    asyncio.run(asyncio.wait_for(serving.app(scope, receive, send), 5))
    assert sent[0]["status"] == 503
