"""Replicas on a cluster of two machines: their answers, and what is lost with one of them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from clusters import REPLICA, SERVER, Answer, Deployed, deployed, kill, processes, until
from max.pipelines.context import SamplingParams
from prometheus_client.parser import text_string_to_metric_families
from prompts import random_prompt
from tiny import TinyPair

from unispec.engine import Engine, Request

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "ray_serve"
PRESET = "llama_eagle_agreeing"
pytestmark = [pytest.mark.compiles(PRESET), pytest.mark.rest]

LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
SAMPLED: dict[str, Any] = {**LONG, "temperature": 1, "seed": 7}


def options_of(pair: TinyPair) -> dict[str, Any]:
    return {
        "model": str(pair.target),
        "draft-model-path": str(pair.draft),
        "speculative-method": pair.method,
        "num-speculative-tokens": 5,
        "max-length": 512,
    }


@pytest.fixture(scope="module")
def served(
    tiny_pair: Callable[[str], TinyPair], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    """Two replicas that load a compiled graph."""
    pair, folder = tiny_pair(PRESET), tmp_path_factory.mktemp("replicas")
    model = [f"--{name}={value}" for name, value in options_of(pair).items()]
    compiled = folder / "compiled"
    command = [sys.executable, "-m", "unispec.cli", "compile", *model, "-o", str(compiled)]
    subprocess.run(command, check=True)
    options = {
        **options_of(pair),
        "compiled": str(compiled),
        "served-model-name": "tiny",
        "max-batch-input-tokens": 64,
    }
    with deployed(folder, options) as found:
        found.deploy()
        found.until_replicas(2)
        yield found


def prompt(number: int) -> list[int]:
    return random_prompt(256, 12, number)


@pytest.fixture(scope="module")
def solo(tiny_engine: Callable[[str], Engine]) -> Callable[..., list[int]]:
    """The tokens that an engine in this process answers with."""
    known: dict[tuple[int, int | None], list[int]] = {}

    def answer(number: int, seed: int | None = None) -> list[int]:
        if (number, seed) not in known:
            sampling = SamplingParams(
                max_new_tokens=400,
                ignore_eos=True,
                **({"temperature": 0} if seed is None else {"temperature": 1, "seed": seed}),
            )
            request = Request(token_ids=prompt(number), sampling=sampling)
            known[number, seed] = list(tiny_engine(PRESET).generate([request]).results[0].token_ids)
        return known[number, seed]

    return answer


def on_each(served: Deployed) -> dict[str, dict[str, str]]:
    """A session of each replica."""
    found: dict[str, dict[str, str]] = {}
    for number in range(100):
        headers = {"x-session-id": str(number)}
        answer = served.complete(prompt=[5 + number], max_tokens=1, headers=headers)
        found.setdefault(answer.replica, headers)
        if len(found) == 2:
            return found
    raise AssertionError(found)


def test_greedy_and_seeded_answers_are_the_same_from_any_replica(
    served: Deployed, solo: Callable[..., list[int]]
) -> None:
    for replica, headers in on_each(served).items():
        for fields, expected in ((LONG, solo(1)), (SAMPLED, solo(1, seed=7))):
            for stream in (True, False):
                answer = served.complete(prompt=prompt(1), stream=stream, headers=headers, **fields)
                assert (answer.replica, answer.retries) == (replica, 0)
                assert answer.whole and answer.token_ids == expected


def test_what_the_server_says_comes_as_it_is(served: Deployed) -> None:
    refused = served.http.post("/v1/completions", json={"prompt": [5], "max_tokens": -1})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_tokens"
    assert served.http.post("/v1/completions", content=b"{").status_code == 400
    assert served.http.get("/v1/nothing").status_code == 404
    assert served.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert served.http.get("/health").json() == {"status": "ready"}
    large = served.http.post("/v1/completions", content=b" " * ((16 << 20) + 1))
    assert large.status_code == 413
    assert "larger than 16777216 bytes" in large.json()["error"]["message"]


def test_one_scrape_has_the_metrics_of_all_replicas(served: Deployed) -> None:
    for headers in on_each(served).values():
        served.complete(prompt=[5, 6], max_tokens=8, headers=headers)
    text = served.http.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in ("vllm:spec_decode_num_drafts", "maxserve_num_output_tokens"):
        counted = {
            sample.labels["replica"]: sample.value
            for sample in families[name].samples
            if sample.name.endswith("_total")
        }
        assert set(counted) == served.replicas() and min(counted.values()) > 0, name


def test_a_client_that_leaves_takes_its_request_out(served: Deployed) -> None:
    def steps() -> float:
        text = served.http.get("/metrics").text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        samples = families["unispec:steps"].samples
        return sum(sample.value for sample in samples if sample.name.endswith("_total"))

    def taken(ask: Callable[[], None]) -> float:
        """Steps until nothing more happens."""
        before = last = steps()
        ask()
        while (now := steps()) != last:
            last = now
            time.sleep(1)
        return now - before

    url, body = f"{served.url}/v1/completions", {"prompt": [5, 6, 7], "temperature": 0, **LONG}
    body["n"] = 8

    def leave_a_stream() -> None:
        with httpx.stream("POST", url, json=body | {"stream": True}) as gone:
            next(gone.iter_lines())

    def leave_before_an_answer() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.2)

    whole = taken(lambda: httpx.post(url, json=body, timeout=60).raise_for_status() and None)
    assert whole >= 8 * 400 / 6
    assert taken(leave_a_stream) < whole / 2
    assert taken(leave_before_an_answer) < whole / 2


def lose(served: Deployed, name: str) -> Callable[[], None]:
    """What loses a replica, by its process, its server's or its machine."""
    if name != "machine":
        return lambda: kill(processes(name)[-1])
    (machine,) = served.cluster.worker_nodes
    return lambda: served.cluster.remove_node(machine, allow_graceful=False)


@pytest.mark.parametrize("name", [REPLICA, SERVER, "machine"], ids=["replica", "server", "machine"])
def test_a_replica_is_lost_in_the_middle_of_answers(
    served: Deployed, solo: Callable[..., list[int]], name: str
) -> None:
    sessions = on_each(served)
    expected = [solo(number, seed=7) for number in range(4)]
    with ThreadPoolExecutor(16) as threads:
        streams = {
            (replica, number): served.begin(
                prompt=prompt(number), stream=True, headers=headers, **SAMPLED
            )
            for replica, headers in sessions.items()
            for number in range(2)
        }
        whole = [
            (number, threads.submit(served.complete, prompt=prompt(number), headers=h, **SAMPLED))
            for h in sessions.values()
            for number in range(2, 4)
        ]
        time.sleep(0.2)
        lose(served, name)()
        streamed = {key: rest() for key, rest in streams.items()}
        answered = [(number, future.result()) for number, future in whole]

    cut = {replica for (replica, _), answer in streamed.items() if answer.error}
    assert len(cut) == 1, streamed
    for (replica, number), answer in streamed.items():
        if replica in cut:
            assert not answer.whole
            assert "lost before the answer was whole" in answer.error or (
                "the model's process has ended" in answer.error
            )
            assert answer.token_ids == expected[number][: len(answer.token_ids)]
        else:
            assert answer.whole and answer.token_ids == expected[number]
    for number, answer in answered:
        assert (answer.status, answer.whole) == (200, True), answer
        assert answer.token_ids == expected[number]
        assert answer.replica not in cut
    assert sum(answer.retries > 0 for _, answer in answered) == 2

    if name == "machine":
        served.cluster.add_node(num_cpus=2, resources={"model": 1})
    back = served.until_replicas(2)
    assert not back & cut
    assert set(on_each(served)) == back


def test_a_router_by_prefixes_finds_the_pages_that_one_replica_has(served: Deployed) -> None:
    """Of conversations that take turns, on two replicas as on one; by load alone it does not."""
    by_load = "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter"
    by_prefix = "unispec.deployment.router.PrefixAwareRouter"
    hits = {}
    for router, replicas in ((by_prefix, 2), (by_load, 2), (by_prefix, 1)):
        config = {"request_router_class": router}
        served.deploy({"num_replicas": replicas, "request_router_config": config})
        served.until_replicas(replicas)
        hits[router, replicas] = cached_tokens(served, salt=f"{router} {replicas}")
    print(hits)
    # Of each conversation a page of 128 tokens, the same page, and two pages.
    assert hits[by_prefix, 1] == hits[by_prefix, 2] == 5 * (128 + 128 + 256)
    # By fair draws all turns would find their pages in one of 32,768 runs.
    assert hits[by_load, 2] < hits[by_prefix, 2]


def cached_tokens(served: Deployed, salt: str) -> int:
    """Tokens of prompts that were computed before: 5 conversations of 4 turns, in turns."""
    found = 0
    for turn in range(4):
        for conversation in range(5):
            tokens = random_prompt(256, 430, conversation)[: 130 + 100 * turn]
            body = {"prompt": tokens, "max_tokens": 1, "cache_salt": salt}
            usage = served.http.post("/v1/completions", json=body).json()["usage"]
            found += usage["prompt_tokens_details"]["cached_tokens"]
    return found


def test_more_than_may_wait_are_sent_away(served: Deployed) -> None:
    served.deploy({"num_replicas": 1, "max_ongoing_requests": 2, "max_queued_requests": 2})
    served.until_replicas(1)
    with ThreadPoolExecutor(16) as threads:
        body = {"prompt": prompt(1), "temperature": 0, **LONG}
        answers = list(
            threads.map(lambda _: served.http.post("/v1/completions", json=body), range(16))
        )
    assert {answer.status_code for answer in answers} == {200, 429}
    assert sum(answer.status_code == 200 for answer in answers) >= 2
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["type"] == "rate_limit_error"


def test_answers_go_on_while_the_model_is_replaced(
    served: Deployed, solo: Callable[..., list[int]]
) -> None:
    served.deploy()
    old = served.until_replicas(2)
    expected, updated = solo(1), threading.Event()

    def ask() -> list[Answer]:
        found = []
        while not updated.is_set():
            found.append(served.complete(prompt=prompt(1), stream=len(found) % 2 == 0, **LONG))
        return found

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        try:
            served.deploy(**{"max-batch-size": 4})
            assert not served.until_replicas(2) & old
        finally:
            updated.set()
        answers = [answer for future in asking for answer in future.result()]
    assert all(answer.whole and answer.token_ids == expected for answer in answers)
    assert {answer.replica for answer in answers} & old
    assert {answer.replica for answer in answers} - old


def test_a_load_while_replicas_are_killed_loses_nothing(served: Deployed) -> None:
    """examples/ray_serve/load.py, whose long form is in docs/replicas.md."""
    served.deploy()
    load = [str(EXAMPLES / "load.py"), "--url", served.url, "--json", "--requests", "150"]
    command = [sys.executable, *load, "--minutes", "1", "--kill-every", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(done.stdout)
    ends = ("answered", "refused", "ended with an error event", "left by the client")
    assert sum(found[end] for end in ends) == found["requests"] == 150
    assert found["answered"] == found["answered, equal to alone"] > 100
    assert found["lost"] == found["wrong before the error"] == 0
    assert found["replicas killed"] >= 2


def test_replicas_end_without_requests_and_come_back_with_one(
    served: Deployed, solo: Callable[..., list[int]]
) -> None:
    scaling = {
        "min_replicas": 0,
        "max_replicas": 2,
        "initial_replicas": 1,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 0,
        "downscale_delay_s": 1,
        "look_back_period_s": 11,
    }
    served.deploy({"num_replicas": "auto", "autoscaling_config": scaling})
    until(lambda: not served.replicas())
    began = time.monotonic()
    answer = served.complete(prompt=prompt(1), **LONG)
    print(f"cold start: {time.monotonic() - began:.1f} s")
    assert answer.whole and answer.token_ids == solo(1)
    # More requests than one is to have at a time: queued ones count.
    with ThreadPoolExecutor(32) as threads:
        busy = threading.Event()

        def ask(number: int) -> None:
            while not busy.is_set():
                served.complete(prompt=prompt(number), **LONG)

        asking = [threads.submit(ask, number) for number in range(32)]
        try:
            served.until_replicas(2)
        finally:
            busy.set()
        for future in asking:
            future.result()
