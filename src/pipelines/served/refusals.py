"""What a request may ask of MAX's server and these models cannot do, refused in a sentence."""

from __future__ import annotations

from max.pipelines.modeling.types import TextGenerationRequest

from unispec.errors import InputError

__all__ = ["refuse_unsupported"]


def refuse_unsupported(request: TextGenerationRequest, *, has_tool_parser: bool) -> None:
    """Refuses what would be ignored otherwise.

    Args:
        has_tool_parser: whether the server can read a model's call of a tool.

    Raises:
        InputError: images, videos, tools that nobody can parse, or an echo of the prompt.
    """
    for name, given in (("images", request.images), ("videos", request.videos)):
        if given:
            raise InputError(
                f"the request has {len(given)} {name}, and this server reads text only: leave"
                " them out"
            )
    if request.tools and not has_tool_parser:
        raise InputError(
            f"the request has {len(request.tools)} tools, and this model's calls of tools cannot"
            " be read: leave them out"
        )
    if request.echo:
        raise InputError("echo is not supported: leave it out, and put the prompt first yourself")
