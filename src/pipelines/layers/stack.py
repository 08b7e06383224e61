"""Runs the layers of a target, each kind compiled once, and taps what a draft reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops
from max.nn import Module
from max.nn.transformer.transformer import forward_sequential_layers

from .linear import Storing

__all__ = ["LayerGroup", "layer_index", "run_layers", "weight_prefix", "with_features"]


class LayerGroup(NamedTuple):
    """Layers that are compiled once, as one subgraph."""

    name: str
    """The subgraph's."""
    layers: list[int]
    """Their indices."""


def run_layers(
    layers: Sequence[Module],
    hidden_states: list[TensorValue],
    inputs: Callable[[int, list[TensorValue]], list[Any]],
    *,
    groups: Sequence[LayerGroup],
    tapped_layers: Sequence[int],
) -> tuple[list[TensorValue], list[list[TensorValue]]]:
    """Runs layers, each with an `input_layernorm`, one after the other.

    Args:
        hidden_states: `[T, H]`, one a device.
        inputs: a layer's arguments, from its index and the hidden states before it.
        groups: layers that share a subgraph, as far as their weights are stored alike.

    Returns:
        The last layer's output, `[T, H]` of each device, and that of each tapped layer.
    """
    # Read first: layers that share a subgraph lose the beginnings of their names.
    prefixes = [weight_prefix(layer) for layer in layers]
    groups = [part for group in groups for part in _stored_alike(group, layers)]
    outputs: dict[int, list[TensorValue]] = {}

    def keep(index: int, hidden: list[TensorValue]) -> None:
        if index in tapped_layers:
            outputs[index] = hidden

    hidden = forward_sequential_layers(
        list(layers),
        inputs_for_layer=inputs,
        initial_hidden_states=hidden_states,
        on_layer_output=keep,
        subgraph_layer_groups=[group.layers for group in groups],
        name_for_subgraph=lambda group: groups[group].name,
        weight_prefix_for_layer=prefixes.__getitem__,
    )
    return hidden, [outputs[index] for index in tapped_layers]


def _stored_alike(group: LayerGroup, layers: Sequence[Module]) -> list[LayerGroup]:
    """The group, or parts of it where files mix forms of weights from layer to layer."""
    parts: dict[tuple[str, ...], list[int]] = {}
    for index in group.layers:
        parts.setdefault(tuple(_forms(layers[index])), []).append(index)
    named = [group.name, *(f"{group.name}_{count}" for count in range(1, len(parts)))]
    return [LayerGroup(name, found) for name, found in zip(named, parts.values(), strict=True)]


def _forms(layer: Module) -> Iterator[str]:
    if isinstance(layer, Storing):
        yield layer.form
    for part in layer.sublayers.values():
        yield from _forms(part)


def weight_prefix(layer: Any) -> str:
    """What the names of a layer's weights begin with, once they are loaded."""
    name: str = layer.input_layernorm.weight.name
    return name.removesuffix("input_layernorm.weight")


def with_features(
    normed: TensorValue, tapped: Sequence[TensorValue]
) -> tuple[TensorValue, TensorValue]:
    """What the head reads, and what the draft reads: the same, or the tapped layers' outputs.

    Args:
        normed: `[T, H]`.
        tapped: `[T, H]` each, n of them.

    Returns:
        `[T, H]`, and `[T, H]` or `[T, n * H]`.
    """
    return normed, ops.concat(list(tapped), axis=-1) if tapped else normed


def layer_index(index: int) -> TensorValue:
    """The uint32 scalar that cache kernels take as a layer's index."""
    return ops.constant(index, DType.uint32, device=DeviceRef.CPU())
