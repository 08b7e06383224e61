"""What reaches a graph on another device: never what an earlier step had there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from max.driver import Buffer

from unispec.sampling import buffers
from unispec.sampling.buffers import RowSampling, SamplingBuffers

VOCAB = 8


class OtherDevice:
    """Stands in for a GPU: what is sent is copied."""

    is_host = False


class Sent:
    def __init__(self, array: Any) -> None:
        self.array = array

    def to(self, device: OtherDevice) -> Sent:
        return Sent(self.array.copy())


def test_a_bias_does_not_stay_for_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "Buffer", type("_", (), {"from_numpy": staticmethod(Sent)}))
    sampling = SamplingBuffers(2, VOCAB, 1, OtherDevice())  # type: ignore[arg-type]
    biased, plain = RowSampling(1), RowSampling(2)
    biased.logit_bias = np.arange(VOCAB, dtype=np.float32)
    for row in (plain, biased, plain, plain, biased):
        *_, bias, _ = sampling.fill([row], sampling.bitmask(1, 1))
        expected = np.zeros(VOCAB) if row is plain else np.arange(VOCAB)
        np.testing.assert_array_equal(bias.array, [expected])  # type: ignore[attr-defined]


def test_the_stand_in_is_needed_on_this_machine() -> None:
    """A CPU reads the host's own arrays, so that staleness cannot show there."""
    assert Buffer.from_numpy(np.zeros(1)).device.is_host
