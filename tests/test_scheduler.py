"""Which requests run when, and what pages they hold: no model, MAX's own cache manager."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from max.dtype import DType
from max.graph import DeviceRef
from max.nn.kv_cache import MHAKVCacheParams, MultiKVCacheParams
from max.pipelines.context import EOSTracker, TextContext, TokenBuffer
from max.pipelines.kv_cache import PagedKVCacheManagerInterface
from max.pipelines.request import RequestID

from unispec.engine.scheduler import Scheduler
from unispec.errors import InputError
from unispec.kv_cache.manager import make_cache_manager, pages_per_row

PAGE = 16
K = 5
ROOM = 2 * K + 1
"""Positions beyond a row's last token that its pages must have."""


def cache_params(num_draft_tokens: int = K) -> MultiKVCacheParams:
    """Target and draft of one layer each, small pages."""
    one = MHAKVCacheParams(
        dtype=DType.float32,
        n_kv_heads=1,
        head_dim=4,
        num_layers=1,
        page_size=PAGE,
        devices=[DeviceRef.CPU()],
        enable_prefix_caching=True,
        speculative_method="eagle",
        num_draft_tokens=num_draft_tokens,
    )
    return MultiKVCacheParams.from_params({"target": one, "draft": one})


def request(
    prompt: Sequence[int], new_tokens: int, *, eos: int = -1, cache_salt: str | None = None
) -> TextContext:
    """A request of at most ``new_tokens`` tokens."""
    return TextContext(
        cache_salt=cache_salt,
        max_length=len(prompt) + new_tokens,
        tokens=TokenBuffer(np.array(prompt, np.int64)),
        eos_tracker=EOSTracker(eos_token_ids={eos}),
    )


def prompt(length: int, first: int = 0) -> range:
    """Consecutive token ids; prompts that begin with different ids share nothing."""
    return range(first, first + length)


@dataclass
class Simulation:
    """A scheduler, and steps that append tokens instead of running a model."""

    num_pages: int
    max_batch_size: int = 4
    max_tokens: int = 32
    num_draft_tokens: int = K
    draft_reads_next_token: bool = True
    manager: PagedKVCacheManagerInterface = field(init=False)
    scheduler: Scheduler = field(init=False)
    new_tokens: int = field(init=False, default=0)
    """In the last step, over all rows."""

    def __post_init__(self) -> None:
        self.manager = make_cache_manager(
            cache_params(self.num_draft_tokens),
            num_pages=self.num_pages,
            max_batch_size=self.max_batch_size,
            draft_reads_next_token=self.draft_reads_next_token,
        )
        self.scheduler = Scheduler(
            self.manager,
            num_pages=self.num_pages,
            max_batch_size=self.max_batch_size,
            max_batch_input_tokens=self.max_tokens,
        )

    @property
    def free_pages(self) -> int:
        """Pages that no request holds."""
        return int(self.manager.block_count().free)

    def step(self, emit: int = 1) -> list[TextContext]:
        """One step in which each decoding row takes ``emit`` tokens; returns its batch."""
        batch = self.scheduler.next_batch()
        self.new_tokens = sum(context.tokens.active_length for context in batch)
        if batch:
            self.manager.runtime_inputs([batch])  # raises where a row lacks a page
        for context in batch:
            if context.tokens.actively_chunked:
                context.tokens.advance_chunk()
            else:
                for _ in range(emit if context.tokens.generated_length else 1):
                    context.advance_token_buffer(len(context.tokens) % 7)
                    if context.is_done:
                        break
            if context.is_done:
                self.scheduler.finish(context)
            else:
                self.manager.step(context)
        return batch

    def run(self, *contexts: TextContext) -> list[list[RequestID]]:
        """Adds the requests and steps to the end; returns who ran in each step."""
        for context in contexts:
            self.scheduler.add(context)
        steps = []
        while batch := self.step():
            steps.append([context.request_id for context in batch])
        return steps


def test_nothing_to_do() -> None:
    """Without requests there is no batch."""
    assert Simulation(num_pages=4).scheduler.next_batch() == []


def test_first_come_first_served() -> None:
    """Rows join in the order of their coming, as many as the batch may have."""
    simulation = Simulation(num_pages=16, max_batch_size=2)
    first, second, third = (request(prompt(3, 10 * n), 2 + n) for n in range(3))
    steps = simulation.run(first, second, third)
    a, b, c = first.request_id, second.request_id, third.request_id
    # Two tokens for a, three for b, four for c, which waits until a is done.
    assert steps[0] == steps[1] == [a, b]
    assert set(steps[2]) == {b, c}
    assert steps[3:] == [[c], [c], [c]]


def test_decoding_rows_come_first_and_prefill_takes_the_rest() -> None:
    """A long prompt goes in chunks of what the step has left, and holds up nobody."""
    simulation = Simulation(num_pages=16, max_tokens=8)
    short, long = request(prompt(2), 6), request(prompt(20, 50), 1)
    simulation.scheduler.add(short)
    simulation.scheduler.add(long)
    sizes = []
    while batch := simulation.scheduler.next_batch():
        sizes.append({c.request_id: c.tokens.active_length for c in batch})
        assert sum(sizes[-1].values()) <= 8
        for context in batch:
            if context.tokens.actively_chunked:
                context.tokens.advance_chunk()
            else:
                context.advance_token_buffer(1)
            if context.is_done:
                simulation.scheduler.finish(context)
    of_short = [step.get(short.request_id, 0) for step in sizes]
    of_long = [step.get(long.request_id, 0) for step in sizes]
    assert of_short == [2, 1, 1, 1, 1, 1]
    assert of_long == [6, 7, 7, 0, 0, 0]


def test_a_prompt_behind_a_full_step_waits_for_its_turn() -> None:
    """A prompt that finds no tokens left is not part of the step."""
    simulation = Simulation(num_pages=16, max_tokens=8)
    first, second = request(prompt(8), 1), request(prompt(4, 50), 1)
    assert simulation.run(first, second) == [[first.request_id], [second.request_id]]


def test_more_rows_than_tokens() -> None:
    """A step has a token for every row that may run, whatever it was told."""
    simulation = Simulation(num_pages=16, max_batch_size=4, max_tokens=1)
    contexts = [request(prompt(1, n), 3) for n in range(4)]
    steps = simulation.run(*contexts)
    assert [len(step) for step in steps] == [4, 4, 4]


@pytest.mark.parametrize("num_draft_tokens", [1, K])
@pytest.mark.parametrize("length", range(1, 2 * PAGE + 2))
def test_an_admitted_request_never_lacks_a_page(length: int, num_draft_tokens: int) -> None:
    """A request that fits exactly runs to its last token, in steps of any size."""
    params = cache_params(num_draft_tokens)
    new_tokens = 2 * PAGE - length % 3
    pages = pages_per_row(params, length + new_tokens)
    for emit in range(1, num_draft_tokens + 2):
        simulation = Simulation(pages, num_draft_tokens=num_draft_tokens)
        context = request(prompt(length), new_tokens)
        simulation.scheduler.add(context)
        while simulation.step(emit):
            pass
        assert context.tokens.generated_length == new_tokens
        assert simulation.free_pages == pages


def test_a_request_that_can_never_fit_is_refused() -> None:
    """The error names the pages; who is there already is not disturbed."""
    simulation = Simulation(num_pages=2)
    fits = request(prompt(4), 2 * PAGE - ROOM - 4)
    simulation.scheduler.add(fits)
    simulation.step()
    held = simulation.free_pages
    with pytest.raises(
        InputError, match=r"33 tokens needs 3 cache pages, kv_cache_pages is 2: lower"
    ):
        simulation.scheduler.add(request(prompt(4), 2 * PAGE + 1 - 4))
    assert simulation.free_pages == held
    assert set(map(len, simulation.run())) == {1}
    assert fits.tokens.generated_length == 2 * PAGE - ROOM - 4
    assert simulation.free_pages == 2


def test_a_request_waits_for_pages() -> None:
    """It joins when those of a finished request suffice, and no one overtakes it."""
    simulation = Simulation(num_pages=3)
    # One page, two pages, three pages, one page.
    small, medium, large, late = (
        request(prompt(2, 10 * n), pages * PAGE - ROOM - 2) for n, pages in enumerate((1, 2, 3, 1))
    )
    steps = simulation.run(small, medium, large, late)
    names = {c.request_id: n for n, c in enumerate((small, medium, large, late))}
    rows = [sorted(names[r] for r in step) for step in steps]
    assert rows == [[0, 1]] * 3 + [[1]] * 16 + [[2]] * 35 + [[3]] * 3
    assert simulation.free_pages == 3


def test_finishing_a_running_request() -> None:
    """Its pages are free at once, for the one that waits."""
    simulation = Simulation(num_pages=2)
    running, waiting = request(prompt(4), 10), request(prompt(4, 50), 10)
    simulation.scheduler.add(running)
    simulation.scheduler.add(waiting)
    assert [c.request_id for c in simulation.step()] == [running.request_id]
    simulation.scheduler.finish(running)
    assert simulation.free_pages == 2
    assert [c.request_id for c in simulation.step()] == [waiting.request_id]


def test_finishing_a_request_in_the_middle_of_its_prompt() -> None:
    """What it has prefilled is given back too."""
    simulation = Simulation(num_pages=8, max_tokens=8)
    context = request(prompt(40), 4)
    simulation.scheduler.add(context)
    simulation.step()
    assert 0 < context.tokens.processed_length < 40
    assert simulation.free_pages < 8
    simulation.scheduler.finish(context)
    assert simulation.free_pages == 8
    assert simulation.step() == []


def test_finishing_a_waiting_request() -> None:
    """It never runs; those behind it do."""
    simulation = Simulation(num_pages=8, max_batch_size=1)
    first, gone, last = (request(prompt(2, 10 * n), 2) for n in range(3))
    for context in (first, gone, last):
        simulation.scheduler.add(context)
    simulation.scheduler.finish(gone)
    ran = [c.request_id for _ in range(4) for c in simulation.step()]
    assert ran == [first.request_id] * 2 + [last.request_id] * 2
    assert simulation.step() == []


@pytest.mark.parametrize(("length", "hit"), [(PAGE, 0), (PAGE + 1, PAGE), (3 * PAGE, 2 * PAGE)])
def test_the_same_prompt_again(length: int, hit: int) -> None:
    """Full pages are taken over; the last token is always computed."""
    simulation = Simulation(num_pages=16)
    simulation.run(request(prompt(length), 3))
    again = request(prompt(length), 3)
    simulation.scheduler.add(again)
    [running] = simulation.scheduler.next_batch()
    assert running.tokens.processed_length == hit
    assert running.tokens.active_length == length - hit


NAMINGS = pytest.mark.parametrize(
    "draft_reads_next_token", [True, False], ids=["eagle-mtp", "dflash"]
)


def known(simulation: Simulation, context: TextContext) -> int:
    """Tokens of a new request that the cache has already, of requests that are over."""
    simulation.scheduler.add(context)
    simulation.scheduler.next_batch()
    return int(context.tokens.processed_length)


@pytest.mark.parametrize(
    ("draft_reads_next_token", "parts_at_the_end"),
    [pytest.param(True, 16, id="eagle-mtp"), pytest.param(False, 32, id="dflash")],
)
def test_a_page_is_shared_only_where_its_draft_entries_agree(
    draft_reads_next_token: bool, parts_at_the_end: int
) -> None:
    """The draft's last entry of a page depends on the first token of the next page."""

    def shared(first: list[int], second: list[int]) -> int:
        simulation = Simulation(num_pages=16, draft_reads_next_token=draft_reads_next_token)
        simulation.run(request(first, 2))
        return known(simulation, request(second, 2))

    pages = [*prompt(32)]  # two of 16 tokens
    assert shared([*pages, 70, 71], [*pages, 80, 81]) == parts_at_the_end
    assert shared([*pages, 70, 71], [*pages, 70, 81]) == 32
    assert shared([90, *pages[1:], 70], [91, *pages[1:], 70]) == 0


@NAMINGS
def test_requests_of_two_salts_share_no_page(draft_reads_next_token: bool) -> None:
    """A tenant finds its own pages again, and never another's, nor those without a salt."""
    simulation = Simulation(num_pages=64, draft_reads_next_token=draft_reads_next_token)
    tokens = prompt(40)
    found = {}
    for visit in ("first", "second"):
        for salt in (None, "one", "two", "1", "11", "0/1"):
            context = request(tokens, 2, cache_salt=salt)
            found[visit, salt] = known(simulation, context)
            simulation.run()
    assert {found["first", salt] for _, salt in found} == {0}
    assert {found["second", salt] for _, salt in found} == {32}


@NAMINGS
def test_a_salt_is_not_mistaken_for_a_token(draft_reads_next_token: bool) -> None:
    """The first token has a place in a page's name beside the salt."""
    simulation = Simulation(num_pages=64, draft_reads_next_token=draft_reads_next_token)
    rest = prompt(30, 50)
    for first, salt in ((1, None), (11, None), (1, "1"), (11, "1"), (1, "1/1"), (1, "/1")):
        assert known(simulation, request([first, *rest], 2, cache_salt=salt)) == 0
        simulation.run()


@NAMINGS
def test_an_answer_is_known_as_a_prompt_would_be(draft_reads_next_token: bool) -> None:
    """Names that were made page by page, as the answer grew, are those of the whole text."""
    simulation = Simulation(num_pages=16, draft_reads_next_token=draft_reads_next_token)
    context = request(prompt(20), 50, cache_salt="one")
    simulation.run(context)
    text = [int(token) for token in context.tokens.all[:70]]
    assert known(simulation, request([*text, 99], 2, cache_salt="one")) == 64
    simulation.run()
    assert known(simulation, request([*text[:50], 99], 2, cache_salt="one")) == 48
    simulation.run()
    assert known(simulation, request([*text, 99], 2)) == 0


def test_pages_of_finished_requests_are_reused_when_needed() -> None:
    """What is kept for a later prompt does not take room from a running request."""
    simulation = Simulation(num_pages=3)
    for n in range(6):
        context = request(prompt(20, 20 * n), 3 * PAGE - ROOM - 20)
        simulation.run(context)
        assert context.tokens.generated_length == 3 * PAGE - ROOM - 20
        assert simulation.free_pages == 3


@st.composite
def _arrivals(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """When each request comes, the length of its prompt and what it may generate."""
    count = draw(st.integers(1, 12))
    whole = st.tuples(st.integers(0, 20), st.integers(1, 40), st.integers(1, 30))
    return sorted(draw(st.lists(whole, min_size=count, max_size=count)))


@given(
    arrivals=_arrivals(),
    num_pages=st.integers(6, 12),
    max_batch_size=st.integers(1, 5),
    max_tokens=st.integers(1, 40),
    emit=st.integers(1, K + 1),
    prompts=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_request_is_answered(
    arrivals: list[tuple[int, int, int]],
    num_pages: int,
    max_batch_size: int,
    max_tokens: int,
    emit: int,
    prompts: int,
) -> None:
    """However requests come: no page is lost, no limit exceeded, no decoding row held up."""
    simulation = Simulation(num_pages, max_batch_size, max_tokens)
    contexts = [
        request(prompt(length, 100 * (n % prompts)), new_tokens)
        for n, (_, length, new_tokens) in enumerate(arrivals)
    ]
    coming = [(at, context) for (at, _, _), context in zip(arrivals, contexts, strict=True)]
    for now in range(5000):
        while coming and coming[0][0] <= now:
            simulation.scheduler.add(coming.pop(0)[1])
        decoding = {c.request_id for c in contexts if c.tokens.generated_length and not c.is_done}
        batch = simulation.step(emit)
        if not batch and not coming:
            break
        assert decoding <= {c.request_id for c in batch}
        assert len(batch) <= max_batch_size
        assert simulation.new_tokens <= max(max_tokens, max_batch_size)
    assert [c.tokens.generated_length for c in contexts] == [n for _, _, n in arrivals]
    assert simulation.free_pages == num_pages
