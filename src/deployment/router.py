"""Chooses a replica: the one that has a request's pages, unless it is busier than the others."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from unispec.errors import InputError

from .affinity import Affinity
from .messages import Asked

__all__ = ["Places", "PrefixAwareRouter"]

_MOST_PLACES: Final = 1 << 16


class Places:
    """Where prompts and sessions went, and where a new one goes.

    A new one has its place by rendezvous hashing, which is the same in every router and changes
    for few when replicas come and go. No replica gets more than its share of the requests that
    run: it is passed over while it has `load_factor` times the mean, as in consistent hashing
    with bounded loads.

    Args:
        load_factor: above 1.
    """

    def __init__(self, load_factor: float) -> None:
        if not load_factor > 1:
            raise InputError(f"load_factor is {load_factor}; it must be above 1, such as 1.25")
        self._load_factor = load_factor
        self._replica_of: OrderedDict[bytes, str] = OrderedDict()

    def went(self, affinity: Affinity, replica: str) -> None:
        """Notes that a replica has the pages of a request now."""
        for key in affinity.keys:
            self._replica_of[key] = replica
            self._replica_of.move_to_end(key)
        while len(self._replica_of) > _MOST_PLACES:
            self._replica_of.popitem(last=False)

    def ranked(self, affinity: Affinity, loads: Mapping[str, int]) -> list[str]:
        """Replicas, the best one first.

        Args:
            loads: how many requests each has.
        """
        home = affinity.home
        if home is None:
            return sorted(loads, key=lambda replica: loads[replica])
        order = sorted(loads, key=lambda replica: _weight(home, replica), reverse=True)
        for key in reversed(affinity.keys):
            if (known := self._replica_of.get(key)) in loads:
                order.sort(key=lambda replica: replica != known)
                break
        most = math.ceil(self._load_factor * (sum(loads.values()) + 1) / len(loads))
        return sorted(order, key=lambda replica: loads[replica] >= most)


def _weight(home: bytes, replica: str) -> bytes:
    return blake2b(home + replica.encode(), digest_size=8).digest()


class PrefixAwareRouter(RequestRouter):
    """`Places`, by Ray Serve's interface of request routers.

    A replica that has `max_ongoing_requests` is passed over by Ray Serve itself.
    """

    def initialize_state(self, load_factor: float = 1.25, **others: Any) -> None:
        """Takes `request_router_kwargs` of the configuration.

        Args:
            load_factor: how many times the mean of running requests a replica may have.

        Raises:
            InputError: a name or a value that is not allowed.
        """
        if others:
            raise InputError(
                f"request_router_kwargs has {', '.join(others)}; it takes load_factor only"
            )
        self._places = Places(load_factor)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which they are tried."""
        if pending_request is None:
            return [candidate_replicas]
        # Where all are full it is not asked again at once.
        pending_request.routing_context.should_backoff = True
        found = {one.replica_id.unique_id: one for one in candidate_replicas}
        loads = {
            name: self.replica_queue_len_cache.get(one.replica_id) or 0
            for name, one in found.items()
        }
        ranked = self._places.ranked(_affinity(pending_request.args), loads)
        return [[found[name]] for name in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        """Notes where a request has gone."""
        self._places.went(_affinity(pending_request.args), replica_id.unique_id)


def _affinity(arguments: Sequence[Any]) -> Affinity:
    """Of a call of `Replica.forward`."""
    return next((one.affinity for one in arguments if isinstance(one, Asked)), Affinity())
