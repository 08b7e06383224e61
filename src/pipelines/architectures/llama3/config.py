"""Configuration of a Llama decoder stack, read from a Hugging Face config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from max.dtype import DType
from max.graph import DeviceRef
from max.nn.kv_cache import KVCacheParams
from max.nn.rotary_embedding import Llama3RopeScalingParams
from max.pipelines.lib import KVCacheConfig, MAXModelConfig, PipelineConfig
from max.pipelines.lib.interfaces.arch_config import (
    ArchConfigWithKVCache,
    ArchConfigWithStoredKVParams,
)
from max.pipelines.modeling.config_enums import SupportedEncoding, supported_encoding_dtype
from typing_extensions import Self

from unispec.errors import InputError
from unispec.pipelines.speculative.step import MAX_BLOCK_SIZE

__all__ = ["Llama3Config", "encoding_of"]


@dataclass(kw_only=True)
class Llama3Config(ArchConfigWithStoredKVParams, ArchConfigWithKVCache):
    """Shapes and constants of a Llama 2, 3, 3.1 or 3.2 stack, target or draft."""

    DEFAULT_ENCODING: ClassVar[SupportedEncoding] = "bfloat16"
    """MAX's fallback where no encoding is asked for; the graph follows `encoding_of`."""
    SUPPORTED_ENCODINGS: ClassVar[set[SupportedEncoding]] = {"float32", "bfloat16"}
    """What weights and activations can be."""

    hidden_size: int
    """H, width of the residual stream."""
    num_attention_heads: int
    """Query heads of a layer."""
    num_key_value_heads: int
    """Key and value heads of a layer; divides the query heads."""
    num_hidden_layers: int
    """Decoder layers."""
    rope_theta: float
    """Base of the rotary frequencies."""
    rope_scaling_params: Llama3RopeScalingParams | None
    """Llama 3.1's scaling of the rotary frequencies; None: they are not scaled."""
    max_seq_len: int
    """Longest sequence of a request, prompt and output, in tokens."""
    intermediate_size: int
    """Width inside the MLP."""
    vocab_size: int
    """V, rows of the head; of a draft with a reduced vocabulary N, the tokens it can propose."""
    dtype: DType
    """Of weights and activations."""
    kv_params: KVCacheParams
    """The cache: layers, heads, width of a head, dtype, page size and devices."""
    rms_norm_eps: float
    """Added to the mean square before its root is taken."""
    attention_multiplier: float
    """Scale of attention scores."""
    devices: list[DeviceRef]
    """Where the stack runs, one device."""
    attention_bias: bool = False
    """Whether q, k, v and o projections have a bias."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head; need not be `hidden_size / num_attention_heads`."""
        return self.kv_params.head_dim

    @property
    def rope_positions(self) -> int:
        """Rows of the rotary table: every position that drafts at the limit can touch.

        A power of two, so that another `max_seq_len` or K seldom is another graph to compile.
        """
        touched = self.max_seq_len + 2 * MAX_BLOCK_SIZE
        return max(8192, 1 << (touched - 1).bit_length())

    @staticmethod
    def get_head_dim_from_config(config: Any) -> int:
        """Width of one attention head: `head_dim`, else `hidden_size / num_attention_heads`."""
        stated = getattr(config, "head_dim", None)
        return int(stated or config.hidden_size // config.num_attention_heads)

    @staticmethod
    def calculate_attention_multiplier(huggingface_config: Any) -> float:
        """Scale of attention scores: `attention_multiplier`, else `1 / sqrt(head_dim)`."""
        head_dim = Llama3Config.get_head_dim_from_config(huggingface_config)
        stated = getattr(huggingface_config, "attention_multiplier", None)
        return float(stated if stated is not None else 1.0 / math.sqrt(head_dim))

    @classmethod
    def construct_kv_params(  # type: ignore[override]
        cls,
        huggingface_config: Any,
        pipeline_config: PipelineConfig,
        devices: list[DeviceRef],
        kv_cache_config: KVCacheConfig,
        cache_dtype: DType,
    ) -> KVCacheParams:
        """Cache parameters of one stack, with room for the configured drafts.

        Args:
            huggingface_config: the stack's, for heads and layers.
            pipeline_config: for the speculative method and K.
            devices: where the cache lies.
            kv_cache_config: page size and prefix caching.
            cache_dtype: of keys and values.
        """
        speculative = pipeline_config.speculative
        method = speculative.speculative_method if speculative else None
        return kv_cache_config.to_params(
            dtype=cache_dtype,
            n_kv_heads=huggingface_config.num_key_value_heads,
            head_dim=cls.get_head_dim_from_config(huggingface_config),
            num_layers=huggingface_config.num_hidden_layers,
            devices=devices,
            speculative_method=method,
            num_draft_tokens=(speculative.num_speculative_tokens or 0)
            if speculative and method
            else 0,
        )

    @classmethod
    def initialize(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None = None,
        *,
        max_seq_len: int | None = None,
    ) -> Self:
        """Reads the stack of `model_config`, by default the target.

        Args:
            pipeline_config: target and speculative configuration.
            model_config: whose config.json is read; None: the target's.
            max_seq_len: longest sequence in tokens; None: what the model allows.

        Raises:
            InputError: no config.json, a size or constant out of range, an unknown rope type,
                or a dtype, activation or bias that the stack has no code for.
        """
        model_config = model_config or pipeline_config.model
        hf: Any = model_config.huggingface_config
        if hf is None:
            raise InputError(
                f"{model_config.model_path} has no config.json; give a Hugging Face model folder"
            )
        _check(hf, cls.get_head_dim_from_config(hf), model_config.model_path)
        devices = [DeviceRef(spec.device_type, spec.id) for spec in model_config.device_specs]
        dtype = supported_encoding_dtype(encoding_of(model_config))
        theta, scaling = _rope(hf, model_config.model_path)
        return cls(
            hidden_size=hf.hidden_size,
            num_attention_heads=hf.num_attention_heads,
            num_key_value_heads=hf.num_key_value_heads,
            num_hidden_layers=hf.num_hidden_layers,
            rope_theta=theta,
            rope_scaling_params=scaling,
            max_seq_len=max_seq_len or cls.calculate_max_seq_len(hf, model_config),
            intermediate_size=hf.intermediate_size,
            vocab_size=hf.vocab_size,
            dtype=dtype,
            kv_params=cls.construct_kv_params(
                hf, pipeline_config, devices, model_config.kv_cache, dtype
            ),
            rms_norm_eps=hf.rms_norm_eps,
            attention_multiplier=cls.calculate_attention_multiplier(hf),
            devices=devices,
            attention_bias=bool(getattr(hf, "attention_bias", False)),
            tie_word_embeddings=bool(getattr(hf, "tie_word_embeddings", False)),
        )


def encoding_of(model_config: MAXModelConfig) -> SupportedEncoding:
    """The encoding asked for; by default float32 on a CPU and bfloat16 on a GPU.

    Raises:
        InputError: an encoding other than float32 and bfloat16.
    """
    asked = model_config.quantization_encoding
    if asked is None:
        on_cpu = all(spec.device_type == "cpu" for spec in model_config.device_specs)
        return "float32" if on_cpu else "bfloat16"
    if asked not in Llama3Config.SUPPORTED_ENCODINGS:
        raise InputError(
            f"quantization encoding {asked!r} is not supported; use 'float32' or 'bfloat16'"
        )
    return asked


def _check(hf: Any, head_dim: int, source: str) -> None:
    """Refuses what the stack has no code for, and values that no Llama can have."""
    for name, supported in (("hidden_act", "silu"), ("mlp_bias", False)):
        found = getattr(hf, name, supported)
        if found != supported:
            raise InputError(
                f"{name} {found!r} of {source} is not Llama's {supported!r}; use a Llama checkpoint"
            )
    if getattr(hf, "quantization_config", None):
        raise InputError(
            f"quantization_config of {source} is not supported; use the checkpoint that is not"
            " quantised, or a GGUF file"
        )
    for name in (
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "vocab_size",
    ):
        _positive(name, getattr(hf, name), source)
    heads, key_heads = hf.num_attention_heads, hf.num_key_value_heads
    if heads % key_heads:
        raise InputError(
            f"num_attention_heads {heads} of {source} is no multiple of num_key_value_heads"
            f" {key_heads}; correct its config.json"
        )
    if head_dim < 2 or head_dim % 2:
        raise InputError(
            f"head_dim {head_dim} of {source} is not even, as rotary embeddings need it;"
            " correct its config.json"
        )


def _positive(name: str, value: Any, source: str) -> float:
    """The value as a float; refuses zero, NaN, infinity and what is no number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):
        raise InputError(
            f"{name} {value!r} of {source} is no positive number; correct its config.json"
        )
    return float(value)


def _rope(hf: Any, source: str) -> tuple[float, Llama3RopeScalingParams | None]:
    """Theta and Llama 3 scaling; transformers 5 keeps both in `rope_parameters`."""
    parameters: dict[str, Any] = (
        getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    )
    stated: Any = parameters.get("rope_theta") or getattr(hf, "rope_theta", 10000.0)
    theta = _positive("rope_theta", stated, source)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(
            f"rope type {kind!r} of {source} is not supported; use a checkpoint of type 'default'"
            " or 'llama3'"
        )
    values = {
        name: _positive(name, parameters.get(name), source)
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    }
    return theta, Llama3RopeScalingParams(
        factor=values["factor"],
        low_freq_factor=values["low_freq_factor"],
        high_freq_factor=values["high_freq_factor"],
        orig_max_position=int(values["original_max_position_embeddings"]),
    )
