"""Graphs of DeepSeek-V3 for GPUs, without GPUs: built and verified, not compiled."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from deepseek_gpus import CPU, GPUS, LAYERS, SHAPE, assert_recorded, build, on_gpus, rows
from graph_texts import VIRTUAL
from safetensors.numpy import load_file, save_file
from tiny import tiny_deepseek

from unispec.errors import InputError
from unispec.pipelines.targets.deepseek.inputs import distributed_types
from unispec.pipelines.targets.deepseek.model import DeepseekV3Model

COPIES = ("embed_tokens.weight", "shared_head.head.weight")


class Built(NamedTuple):
    """What `virtual_gpus.py` says of the graphs of some GPUs."""

    name: str
    """In `graph_texts.VIRTUAL`."""
    count: int
    spread: bool
    """Whether each GPU has rows of its own and some of the experts."""
    graphs: dict[str, Any]


@pytest.fixture(scope="module", params=[name for name in VIRTUAL if "," not in name])
def built(request: pytest.FixtureRequest, folder: Path) -> Built:
    count, parallelism = VIRTUAL[request.param]
    graphs = build(int(count), folder, parallelism)
    return Built(request.param, int(count), parallelism == "expert", graphs)


def test_the_graphs_are_the_recorded_ones(built: Built) -> None:
    assert_recorded(built.graphs, built.name)


def expected_inputs(count: int, caches: dict[str, int], *, drafts: bool, spread: bool) -> list[Any]:
    """The documented order, written down once more; what stands for one device each is a list."""
    gpus = [f"gpu:{index}" for index in range(count)]
    cpu, first = "cpu:0", gpus[0]
    head = [
        ["int64", first],  # tokens
        ["uint32", first],  # input_row_offsets
        ["uint32", cpu],  # host_input_row_offsets
        ["int64", cpu],  # return_n_logits
        ["int64", cpu],  # data_parallel_splits
        *([["uint8", gpu] for gpu in gpus] if count > 1 else []),  # signal_buffers
    ]
    for _ in caches:
        for gpu in gpus:
            head += [
                ["bfloat16", gpu],  # pages
                ["uint32", gpu],  # cache_lengths
                ["uint32", gpu],  # lookup_table
                ["uint32", cpu],  # max_prompt_length
                ["uint32", cpu],  # max_cache_length
                ["int64", cpu],  # page_stride
                *[["int64", gpu]] * (1 + drafts),  # attention_dispatch_metadata
                *[["int64", cpu]] * (1 + drafts),  # mla_num_partitions
            ]
    counters = [["int32", gpu] for _ in range(2) for gpu in gpus]
    pointers = [["uint64", cpu]] * 6  # of two groups each: to send, to receive, how many
    return [
        *head,
        *[["int32", cpu] for _ in gpus],  # batch_context_lengths
        *([*counters, *pointers] if spread else []),  # ep_inputs
        ["int64", first],  # draft_tokens
        ["uint64", first],  # seed
        ["float32", first],  # temperature
        ["int64", first],  # top_k
        ["int64", cpu],  # max_k
        ["float32", first],  # top_p
        ["float32", cpu],  # min_top_p
    ]


@pytest.mark.parametrize(("name", "caches"), [("alone", 1), ("unified", 2)])
def test_inputs_stand_in_the_documented_order(built: Built, name: str, caches: int) -> None:
    _, count, spread, graphs = built
    depths = dict(list({"target": LAYERS, "draft": 1}.items())[:caches])
    expected = expected_inputs(count, depths, drafts=caches == 2, spread=spread)
    inputs = graphs[name]["inputs"]
    assert [[dtype, device] for _, dtype, _, device in inputs[: len(expected)]] == expected
    # What unispec adds is for acceptance, which the first device decides alone.
    assert {device for *_, device in inputs[len(expected) :]} <= {"gpu:0", "cpu:0"}
    assert len(inputs) == len(expected) + 12
    assert inputs[4][2] == [str(count + 1 if spread else 2)]  # data_parallel_splits
    pages = [shape for kind, _, shape, _ in inputs if kind == "BufferType" and len(shape) > 1]
    assert [shape[1:] for shape in pages] == [
        ["1", str(depth), "128", "1", "576"] for depth in depths.values() for _ in range(count)
    ]
    assert {device for *_, device in graphs[name]["outputs"]} == {"gpu:0"}


def test_devices_speak_with_each_other_only_if_there_are_several(built: Built) -> None:
    """Two sums a layer that is shared, or experts far away, in the draft's loop; target layers are
    subgraphs and not counted. What the draft reads needs neither."""
    _, count, spread, graphs = built
    collectives = graphs["unified"]["collectives"]
    if count == 1:
        assert set(collectives.values()) == {0}
        return
    embeddings, draft_layers = 3, 1
    assert collectives["allreduce.sum"] == embeddings + (0 if spread else 2 * draft_layers)
    assert collectives["ep.dispatch"] == (draft_layers if spread else 0)
    assert collectives["ep.combine"] == collectives["ep.dispatch"]
    assert collectives["allgather"] == 2
    assert graphs["alone"]["collectives"]["allgather"] == 1


@pytest.mark.parametrize("name", [name for name in VIRTUAL if name.endswith("late masks")])
def test_masks_may_come_late(folder: Path, name: str) -> None:
    """Behind the target the first GPU waits for them, copies them and reads the copy."""
    count, *options = VIRTUAL[name]
    graphs = build(int(count), folder, *options)
    assert_recorded(graphs, name)
    described = graphs["unified"]
    inputs = described["inputs"]
    mask = ["batch", "num_positions", "8"]  # a bit for each of 256 tokens
    assert inputs[-4:] == [
        ["TensorType", "int32", mask, "cpu:0"],
        ["BufferType", "int64", ["2"], "cpu:0"],
        ["BufferType", "int32", mask, "gpu:0"],
        ["TensorType", "int64", [], "cpu:0"],  # num_logprobs
    ]
    assert ["TensorType", "int32", mask, "gpu:0"] not in inputs
    pinned, payload, scratch = (f"%arg{len(inputs) - place}" for place in (4, 3, 2))

    steps = [
        (kernel or operation.strip(), results.split(", "), operands.split(", "))
        for results, operation, kernel, operands in described["masks"]
    ]
    begin = next(i for i, (name, *_) in enumerate(steps) if name == "wait_host_value_with_dep")
    assert [name for name, *_ in steps[:begin]].count("mo.call") >= LAYERS
    (_, (waited,), waits), (copy, (copied,), copies), (load, _, loads), (last, *_) = steps[begin:]
    assert (copy, load, last) == ("inplace_memcpy", "rmo.mo.mutable.load", "apply_packed_bitmask")
    assert waits[:2] == [payload, scratch]
    assert copies == [scratch, pinned, waited]
    assert loads == [scratch, copied]


def test_masks_do_not_come_late_unless_they_are_to(built: Built) -> None:
    for graph in ("unified", "alone"):
        kernels = [kernel for *_, kernel, _ in built.graphs[graph]["masks"] if kernel]
        assert kernels == ["apply_packed_bitmask"]


def test_all_weights_of_the_checkpoint_are_loaded(built: Built, folder: Path) -> None:
    graphs = built.graphs
    expected = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = name.removeprefix("model.")
        draft = own.removeprefix(f"layers.{LAYERS}.")
        if draft in COPIES and draft != own:
            continue
        if draft == own:
            loaded = f"target.{own}"
        elif draft.startswith(("enorm", "hnorm", "eh_proj")):
            loaded = f"draft.{draft}"
        else:
            loaded = f"draft.{draft}".replace("shared_head.", "")
            loaded = loaded if "shared_head" in draft else f"draft.layer.{draft}"
        router = ".gate." in name
        expected[loaded] = ["float32" if router else "bfloat16", list(tensor.shape)]
    assert graphs["weights"] == expected


def test_every_device_has_its_part(built: Built) -> None:
    """Of all layers, or of the experts, beside which each device has the shared one."""
    _, count, spread, graphs = built
    parts = 1 if spread else count
    heads, inner, hidden = SHAPE["heads"] // parts, 32 // parts, 64
    experts = 8 // count + 1 if spread else 8
    assert graphs["shards"] == {
        name: [shape] * count
        for name, shape in {
            "query": [heads * 192, 24],
            "kv_b_proj": [heads * 256, 512],
            "kv_a_proj_with_mqa": [576, hidden],
            "o_proj": [hidden, heads * 128],
            "gate": [8, hidden],
            "gate_up_proj": [experts, 2 * inner, hidden],
            "down_proj": [experts, hidden, inner],
            "shared up_proj": [inner, hidden],
        }.items()
    }


def test_scores_are_scaled_as_the_configuration_says(built: Built, folder: Path) -> None:
    """MAX's own rope would scale by `mscale`, the checkpoint means `mscale_all_dim`."""
    assert built.graphs["scale"] == pytest.approx(on_gpus(folder).softmax_scale, rel=1e-12)


def test_a_tied_head_and_queries_without_latent(tmp_path: Path) -> None:
    """On two GPUs, with one group of experts and a plain rope."""
    other = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope": "default"}
    folder = tiny_deepseek(tmp_path, **{**SHAPE, **other})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k != "lm_head.weight"}, weights)
    graphs = build(2, folder, "tensor")
    assert not any("lm_head" in name for name in graphs["weights"])
    assert graphs["shards"]["query"] == [[4 * 192, 64]] * 2
    assert graphs["scale"] == pytest.approx(192**-0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("replicas", "expanded", "splits"),
    [([[9, 127]], [384, 384], [0, 2]), ([[9], [127]], [128, 256], [0, 1, 2])],
)
def test_a_prefill_expands_whole_pages_of_every_row(
    replicas: list[list[int]], expanded: list[int], splits: list[int]
) -> None:
    """Two rows of 9 tokens and of 127 with two drafts, on two devices."""
    batches = [rows(*lengths) for lengths in replicas]
    model: Any = SimpleNamespace(
        kv_params=SimpleNamespace(page_size=128),
        devices=[None, None],
        signal_buffers=["s", "t"],
        _ep_inputs=("e",),
    )
    fields = DeepseekV3Model.extra_fields(model, batches, 2)
    lengths = [buffer.to_numpy().tolist() for buffer in fields["batch_context_lengths"]]
    assert lengths == [[tokens] for tokens in expanded]
    assert fields["signal_buffers"] == ["s", "t"]
    assert fields["ep_inputs"] == ("e",)
    assert fields["host_input_row_offsets"].to_numpy().tolist() == [0, 9, 136]
    assert fields["data_parallel_splits"].to_numpy().tolist() == splits


def test_a_gpu_is_not_given_rows_of_unknown_lengths() -> None:
    model: Any = SimpleNamespace(devices=[SimpleNamespace(is_host=False)])
    unread: Any = None
    with pytest.raises(InputError, match="use prepare_initial_token_inputs"):
        DeepseekV3Model.prepare_next_token_inputs(model, unread, unread)


def test_one_device_has_no_signals() -> None:
    for device in (CPU, GPUS[0]):
        types = distributed_types([device])
        assert types["signal_buffers"] == types["ep_inputs"] == []
        assert len(types["batch_context_lengths"]) == 1
