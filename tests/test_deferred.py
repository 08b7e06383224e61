"""What the host keeps of positions that a draft has not read: no graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from max.driver import CPU, Buffer
from max.dtype import DType
from max.pipelines.context import SamplingParams, TextContext, TokenBuffer

from unispec.pipelines.runtime.batch import BatchBuilder
from unispec.pipelines.runtime.deferred import Deferred

LOG_ROWS = 24
PAGE = 128


def builder_of(feature_log: Buffer | None, page: int | None = PAGE) -> BatchBuilder:
    return BatchBuilder(
        max_batch_size=4,
        max_batch_input_tokens=32,
        vocab_size=1000,
        most_verified=4,
        num_speculative_tokens=4,
        device=CPU(),
        feature_log=feature_log,
        shared_page_size=page,
    )


class Batch:
    """A builder with a log, and rows that decode."""

    def __init__(self) -> None:
        self.builder = builder_of(Buffer.zeros([LOG_ROWS, 8], DType.float32, CPU()))
        assert self.builder.deferred is not None
        self.deferred: Deferred = self.builder.deferred

    def decoding(self, length: int) -> TextContext:
        """A request of so many tokens, 100, 101, ..., the last of which is to be read."""
        tokens = TokenBuffer(np.arange(100, 100 + length - 1, dtype=np.int64))
        context = TextContext(
            max_length=2048, tokens=tokens, sampling_params=SamplingParams(temperature=0)
        )
        self.builder.row(context).generated = 1
        context.advance_token_buffer(100 + length - 1)
        return context

    def step(
        self,
        contexts: Sequence[TextContext],
        drafts: Sequence[int],
        accepted: Sequence[int],
        k: int,
    ) -> dict[str, list[int]]:
        """One step that verifies and accepts so many drafts a row; its inputs."""
        self.builder.num_speculative_tokens = k
        for context, count in zip(contexts, drafts, strict=True):
            self.builder.row(context).drafts = [7] * count
        fields = self.builder.fields(contexts)
        self.deferred.settle(contexts, accepted)
        for context, count in zip(contexts, accepted, strict=True):
            for _ in range(count + 1):
                context.advance_token_buffer(100 + len(context.tokens))
            self.builder.row(context).drafts = []
        return {
            name: np.atleast_1d(fields[name].to_numpy()).tolist()
            for name in (
                "num_speculative_tokens",
                "log_start",
                "num_logged",
                "deferred_rows",
                "deferred_tokens",
                "deferred_counts",
                "max_deferred",
                "unread_places",
                "unread_offsets",
            )
        }


def inputs(
    k: int,
    rows: Sequence[int],
    tokens: Sequence[int],
    counts: Sequence[int],
    places: Sequence[int],
    offsets: Sequence[int],
) -> dict[str, list[int]]:
    return {
        "num_speculative_tokens": [k],
        "log_start": [0],
        "num_logged": [0],
        "deferred_rows": list(rows),
        "deferred_tokens": list(tokens),
        "deferred_counts": list(counts),
        "max_deferred": [max(counts)],
        "unread_places": list(places),
        "unread_offsets": list(offsets),
    }


def skipped(start: int, rows: int, logged: int) -> dict[str, list[int]]:
    """Of a step that proposes nothing, and writes so many features to the log."""
    read_nothing = inputs(0, [], [], [0] * rows, [], [0] * (rows + 1))
    return read_nothing | {"log_start": [start], "num_logged": [logged]}


def test_accepted_positions_are_read_later_with_the_tokens_after_them() -> None:
    """Two rows that verify 2 drafts; the first accepts both, the second none."""
    batch = Batch()
    first, second = batch.decoding(10), batch.decoding(20)
    assert batch.step([first, second], [2, 2], [2, 0], 0) == skipped(0, 2, 6)
    # Log: 0 to 2 the first row's, 3 the second's, 4 and 5 rejected.
    assert batch.step([first, second], [0, 0], [0, 0], 0) == skipped(4, 2, 2)
    # The first row read positions 9 to 12, the second 19 and 20; token i is 100 + i. It verifies
    # one draft, the second row none: behind 6 deferred positions stand 2 merged ones of each row.
    assert batch.step([first, second], [1, 0], [0, 0], 3) == inputs(
        3,
        [0, 1, 2, 4, 3, 5],
        [110, 111, 112, 113, 120, 121],
        [4, 2],
        [0, 1, 2, 3, 6, 7, 4, 5, 8, 9],
        [0, 6, 10],
    )
    assert batch.step([first, second], [0, 0], [0, 0], 3) == inputs(
        3, [], [], [0, 0], [0, 1], [0, 1, 2]
    )


def test_a_row_that_is_not_in_the_step_keeps_what_is_deferred() -> None:
    batch = Batch()
    first, second = batch.decoding(10), batch.decoding(20)
    batch.step([first, second], [0, 0], [0, 0], 0)
    assert batch.step([first], [0], [0], 1) == inputs(1, [0], [110], [1], [0, 1], [0, 2])
    # Row 1 of the log is still in use.
    assert batch.step([first], [0], [0], 0) == skipped(2, 1, 1)
    assert batch.step([second, first], [0, 0], [0, 0], 1) == inputs(
        1, [1, 2], [120, 112], [1, 1], [0, 2, 1, 3], [0, 2, 4]
    )
    assert batch.step([first], [0], [0], 0)["log_start"] == [0]


def test_a_row_with_nothing_deferred_stands_beside_one_that_has() -> None:
    batch = Batch()
    first, second, third = batch.decoding(10), batch.decoding(20), batch.decoding(30)
    batch.step([second], [0], [0], 0)
    assert batch.step([first, second, third], [0, 0, 0], [0, 0, 0], 1) == inputs(
        1, [0], [120], [0, 1, 0], [1, 0, 2, 3], [0, 1, 3, 4]
    )


def test_a_released_request_leaves_its_rows_of_the_log() -> None:
    batch = Batch()
    first, second = batch.decoding(10), batch.decoding(20)
    batch.step([first, second], [0, 0], [0, 0], 0)
    batch.builder.rows.pop(second.request_id)
    assert batch.step([first], [0], [0], 0)["log_start"] == [1]


def test_the_draft_reads_in_a_step_without_room_in_the_log() -> None:
    """A step of 2 rows with 3 drafts each needs 8; those of its last rejected drafts are free."""
    batch = Batch()
    contexts = [batch.decoding(10), batch.decoding(20)]
    starts = [batch.step(contexts, [3, 3], [0, 0], 0)["log_start"] for _ in range(3)]
    assert starts == [[0], [5], [10]]
    for context in contexts:
        batch.builder.row(context).drafts = [7, 7, 7]
    assert not batch.deferred.must_read(contexts)
    batch.step(contexts, [3, 3], [0, 0], 0)  # rows 15 to 22
    found = batch.step(contexts, [3, 3], [0, 0], 0)
    assert (found["num_speculative_tokens"], found["num_logged"]) == ([0], [0])
    assert found["deferred_rows"] == [0, 5, 10, 15, 4, 9, 14, 19]
    assert batch.step(contexts, [3, 3], [0, 0], 0)["log_start"] == [0]


@pytest.mark.parametrize(
    ("length", "drafts", "must"),
    [
        (PAGE - 1, 0, False),  # reads position 126
        (PAGE, 0, True),  # reads position 127, the page's last one
        (PAGE + 1, 0, False),
        (PAGE - 4, 3, False),  # up to position 126
        (PAGE - 3, 3, True),
        (2 * PAGE, 0, True),
    ],
)
def test_the_draft_reads_in_a_step_that_may_fill_a_page(
    length: int, drafts: int, must: bool
) -> None:
    batch = Batch()
    contexts = [batch.decoding(10), batch.decoding(length)]
    batch.builder.row(contexts[1]).drafts = [7] * drafts
    assert batch.deferred.must_read(contexts) == must


def test_a_page_that_nobody_shares_may_be_filled_without_the_draft() -> None:
    builder = builder_of(Buffer.zeros([LOG_ROWS, 8], DType.float32, CPU()), None)
    batch = Batch()
    batch.builder, batch.deferred = builder, builder.deferred  # type: ignore[assignment]
    assert not batch.deferred.must_read([batch.decoding(PAGE)])


def test_inputs_that_steps_share_stay_as_they_are() -> None:
    """Steps of one kind, before and after one whose draft reads what was deferred."""
    batch = Batch()
    contexts = [batch.decoding(10), batch.decoding(20)]
    plain = batch.step(contexts, [0, 0], [0, 0], 2)
    assert plain == inputs(2, [], [], [0, 0], [0, 1], [0, 1, 2])
    assert batch.step(contexts, [0, 0], [0, 0], 0) == skipped(0, 2, 2)
    late = batch.step(contexts, [0, 0], [0, 0], 2)
    assert late["unread_places"] == [0, 2, 1, 3]
    assert batch.step(contexts, [0, 0], [0, 0], 2) == plain
    assert batch.step(contexts, [0, 0], [0, 0], 0) == skipped(0, 2, 2)


def test_the_draft_reads_what_a_row_in_prefill_does() -> None:
    batch = Batch()
    decoding = batch.decoding(10)
    new = TextContext(max_length=64, tokens=TokenBuffer(np.arange(5, dtype=np.int64)))
    assert not batch.deferred.must_read([decoding])
    assert batch.deferred.must_read([decoding, new])
    batch.builder.row(new)
    assert batch.deferred.must_read([decoding, new])
    # One that was preempted has generated tokens, and reads them anew.
    batch.builder.row(new).generated = 2
    assert batch.deferred.must_read([decoding, new])


def test_a_step_whose_draft_reads_need_not_propose() -> None:
    batch = Batch()
    decoding = batch.decoding(10)
    assert batch.step([decoding], [0], [0], 0) == skipped(0, 1, 1)
    new = TextContext(max_length=64, tokens=TokenBuffer(np.arange(5, dtype=np.int64)))
    # One deferred and one merged position of the first row, a prompt of five tokens.
    assert batch.step([decoding, new], [0, 0], [0, 0], 0) == inputs(
        0, [0], [110], [1, 0], [0, 1, 2, 3, 4, 5, 6], [0, 2, 7]
    )
    assert batch.step([decoding, new], [0, 0], [0, 0], 1) == inputs(
        1, [], [], [0, 0], [0, 1], [0, 1, 2]
    )
