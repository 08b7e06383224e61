"""What a published draft is taken for, and what is said of one that is not what the method runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from unispec.checkpoints.draft_kinds import (
    DraftKind,
    check_draft_files,
    check_draft_kind,
    draft_kind,
    method_of_draft,
)
from unispec.errors import InputError

LAYER = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "post_attention_layernorm.weight")


def shapes(*names: str, fc: int | None = None, layer: str = "layers.0.") -> dict[str, Any]:
    """One decoder layer, further tensors, and a projection of ``fc`` states of 8 to one."""
    found: dict[str, Any] = {layer + name: (8, 8) for name in LAYER}
    found |= dict.fromkeys(names, (8,))
    return found if fc is None else found | {"fc.weight": (8, 8 * fc)}


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
EAGLE3 = shapes("midlayer.hidden_norm.weight", "norm.weight", "d2t", fc=3, layer="midlayer.")

# Each as the named project publishes it: config.json, tensors, kind.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, DraftKind | None]] = {
    "yuhuili EAGLE": (LLAMA, shapes("embed_tokens.weight", fc=2), DraftKind.EAGLE),
    "yuhuili EAGLE, weights unknown": (LLAMA, None, None),
    "lmsys EAGLE": (LLAMA | {"architectures": ["LlamaForCausalLMEagle"]}, None, DraftKind.EAGLE),
    "vLLM's first EAGLE": ({"model_type": "eagle", "model": LLAMA}, None, DraftKind.EAGLE),
    "speculators EAGLE": (
        {"speculators_model_type": "eagle", "architectures": ["EagleSpeculator"]},
        shapes("fusion_fc.weight", "lm_head.weight", layer="transformer."),
        DraftKind.EAGLE,
    ),
    "speculators HASS": (
        {"speculators_model_type": "eagle", "layernorms": True},
        None,
        DraftKind.EAGLE_NORMS,
    ),
    "HASS": (LLAMA, shapes("embed_layernorm.weight", fc=2), DraftKind.EAGLE_NORMS),
    "yuhuili EAGLE-3": (LLAMA | {"draft_vocab_size": 32000}, EAGLE3, DraftKind.EAGLE3),
    "SGLang EAGLE-3": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]},
        None,
        DraftKind.EAGLE3,
    ),
    "nvidia EAGLE-3": (
        LLAMA,
        shapes("layers.0.hidden_norm.weight", "norm.weight", fc=3),
        DraftKind.EAGLE3,
    ),
    "AngelSlim EAGLE-3": (LLAMA | {"eagle_config": {}}, None, DraftKind.EAGLE3),
    "speculators EAGLE-3": ({"speculators_model_type": "eagle3"}, None, DraftKind.EAGLE3),
    "speculators P-EAGLE": (
        {"speculators_model_type": "peagle", "architectures": ["PEagleSpeculator"]},
        EAGLE3,
        DraftKind.PARALLEL_EAGLE,
    ),
    "z-lab DFlash": (
        {"model_type": "qwen3", "architectures": ["DFlashDraftModel"], "dflash_config": {}},
        shapes("hidden_norm.weight", "norm.weight", fc=5),
        DraftKind.DFLASH,
    ),
    "z-lab DFlash of three taps": (
        LLAMA,
        shapes("hidden_norm.weight", "norm.weight", fc=3),
        DraftKind.DFLASH,
    ),
    "speculators DFlash": (
        {"speculators_model_type": "dflash", "architectures": ["DFlashSpeculator"]},
        shapes("hidden_norm.weight", "norm.weight", "d2t", "verifier_norm.weight", fc=5),
        DraftKind.DFLASH,
    ),
    "z-lab DFlash2": (
        {"architectures": ["DFlash2DraftModel"], "dflash_config": {"selector_rank": 256}},
        shapes("hidden_norm.weight", "norm.weight", fc=5),
        DraftKind.DFLASH2,
    ),
    "DSpark": (
        {"architectures": ["Qwen3DSparkModel"]},
        shapes("hidden_norm.weight", "norm.weight", fc=5),
        DraftKind.DSPARK,
    ),
    "Medusa": (
        {"model_type": "medusa", "architectures": ["MedusaModel"]},
        {"0.0.linear.weight": (8, 8)},
        DraftKind.MEDUSA,
    ),
    "Medusa heads alone": (LLAMA, {"medusa_head.0.0.linear.weight": (8, 8)}, DraftKind.MEDUSA),
    "DeepSeek's MTP layer": (
        {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLMNextN"]},
        shapes("model.layers.61.eh_proj.weight"),
        DraftKind.MTP,
    ),
    "a small Llama": (
        LLAMA,
        {f"model.{name}": shape for name, shape in shapes("norm.weight").items()},
        DraftKind.MODEL,
    ),
    "nothing known": (LLAMA, {"weight": (8,)}, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_drafts_are_told_apart(name: str) -> None:
    config, tensors, kind = PUBLISHED[name]
    assert draft_kind(config, tensors) is kind


TAKEN = {
    "dflash": {DraftKind.DFLASH},
    "eagle": {DraftKind.EAGLE, DraftKind.EAGLE3},
    "eagle3": {DraftKind.EAGLE3},
}


@pytest.mark.parametrize("method", TAKEN)
@pytest.mark.parametrize("kind", DraftKind)
def test_a_method_takes_its_own_kind_and_later_generations(
    method: Any, kind: DraftKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unispec.checkpoints.draft_kinds.draft_kind", lambda *_: kind)
    if kind in TAKEN[method]:
        check_draft_kind(method, {}, source="folder")
    else:
        with pytest.raises(InputError, match=r"^folder is an? .*; (use|give) "):
            check_draft_kind(method, {}, source="folder")


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("yuhuili EAGLE", "eagle3", "an EAGLE draft; give --speculative-method eagle$"),
        ("yuhuili EAGLE", "dflash", "an EAGLE draft; give --speculative-method eagle"),
        ("z-lab DFlash", "eagle", "a DFlash draft; give --speculative-method dflash"),
        ("yuhuili EAGLE-3", "dflash", "EAGLE-3 draft; give --speculative-method eagle3"),
        ("speculators P-EAGLE", "eagle", "a P-EAGLE draft, which is not supported"),
        ("a small Llama", "eagle", "a whole language model, .*`unispec train`"),
        ("DeepSeek's MTP layer", "eagle", "an MTP layer; give --speculative-method mtp"),
        ("Medusa", "eagle", "a set of Medusa heads"),
    ],
)
def test_a_draft_of_another_kind_is_named(name: str, method: Any, said: str) -> None:
    config, tensors, _ = PUBLISHED[name]
    with pytest.raises(InputError, match=f"^folder is {said}|^folder is an {said}"):
        check_draft_kind(method, config, tensors, source="folder")


@pytest.mark.parametrize(
    ("name", "asked", "found"),
    [
        ("yuhuili EAGLE", "eagle", "eagle"),
        ("yuhuili EAGLE, weights unknown", "eagle", "eagle"),
        ("yuhuili EAGLE-3", "eagle", "eagle3"),
        ("SGLang EAGLE-3", "eagle", "eagle3"),
        ("nvidia EAGLE-3", "eagle", "eagle3"),
        ("speculators EAGLE-3", "eagle", "eagle3"),
        ("speculators EAGLE-3", "eagle3", "eagle3"),
        ("z-lab DFlash", "dflash", "dflash"),
        ("z-lab DFlash", "eagle", "eagle"),
    ],
)
def test_the_generation_follows_from_the_draft(name: str, asked: Any, found: str) -> None:
    config, tensors, _ = PUBLISHED[name]
    assert method_of_draft(asked, config, tensors) == found


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (8, 15), (8, 17), (8, 31), (8,), ()])
def test_a_projection_of_a_shape_that_no_draft_has_tells_nothing(
    shape: tuple[int, ...], tmp_path: Any
) -> None:
    assert draft_kind(LLAMA, shapes() | {"fc.weight": shape}) is None
    save_file({"fc.weight": np.zeros(shape, np.float32)}, tmp_path / "a.safetensors")
    check_draft_files("eagle", [tmp_path / "a.safetensors"], source="folder")


def test_all_shards_say_what_a_draft_is(tmp_path: Any) -> None:
    paths = [tmp_path / f"model-{n}.safetensors" for n in (1, 2)]
    save_file({"layers.0.mlp.up_proj.weight": np.zeros((8, 8), np.float16)}, paths[0])
    save_file({"fc.weight": np.zeros((8, 16), np.float16)}, paths[1])
    check_draft_files("eagle", paths, source="folder")
    with pytest.raises(InputError, match="folder is an EAGLE draft"):
        check_draft_files("dflash", paths, source="folder")
