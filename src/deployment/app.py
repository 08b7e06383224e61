"""The application: an ingress before replicas of the model."""

from __future__ import annotations

from typing import Any, Final

from ray import serve
from ray.serve import Application

from .ingress import Ingress
from .options import command_line
from .replica import Replica

__all__ = ["INGRESS", "MODEL", "app"]

INGRESS: Final = "Ingress"
"""The deployment that clients talk to."""
MODEL: Final = "Model"
"""The deployment whose replicas run `unispec serve`."""

_MANY: Final = 10_000
"""Requests that an ingress lets in: those that wait for the model are bounded there."""
_LONGEST_ANSWER_S: Final = 600
"""How long what runs may go on where a replica is to end: a rolling update, or fewer replicas."""


def app(options: dict[str, Any]) -> Application:
    """Builds the application; `import_path: unispec.deployment.app:app` in Serve's configuration.

    What is set of the deployments here are defaults, which the configuration may change.

    Args:
        options: of `unispec serve`, by their names without the dashes before them: `args`.

    Raises:
        InputError: an option that is each replica's own.
    """
    model = serve.deployment(
        name=MODEL,
        # A batch that runs, and one that waits.
        max_ongoing_requests=16,
        max_queued_requests=64,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=_LONGEST_ANSWER_S,
        request_router_config={"request_router_class": f"{__package__}.router.PrefixAwareRouter"},
    )(Replica)
    ingress = serve.deployment(
        name=INGRESS,
        max_ongoing_requests=_MANY,
        graceful_shutdown_timeout_s=_LONGEST_ANSWER_S,
        # It waits for others all the time, so there is room for the next one beside it.
        ray_actor_options={"num_cpus": 0},
        max_surge_percent=100,
    )(Ingress)
    return ingress.bind(model.bind(command_line(options)))
