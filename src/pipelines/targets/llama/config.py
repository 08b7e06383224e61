"""Configuration of a Llama decoder stack, read from a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, get_args

from max.dtype import DType
from max.graph import DeviceRef
from max.nn.kv_cache import KVCacheParams
from max.nn.rotary_embedding import (
    DeepseekYarnRopeScalingParams,
    Llama3RopeScalingParams,
    LongRoPEScalingParams,
)
from max.nn.transformer import ReturnHiddenStates, ReturnLogits
from max.pipelines.lib import KVCacheConfig, MAXModelConfig, PipelineConfig
from max.pipelines.lib.interfaces.arch_config import (
    ArchConfigWithKVCache,
    ArchConfigWithStoredKVParams,
)
from max.pipelines.modeling.config_enums import SupportedEncoding, supported_encoding_dtype
from typing_extensions import Self

from unispec.checkpoints.tied_head import HEAD, tied_names
from unispec.encodings import BFLOAT16, FLOAT32
from unispec.errors import InputError
from unispec.pipelines.layers.cache import cache_params
from unispec.pipelines.layers.encoding import choose_encoding
from unispec.pipelines.layers.fields import (
    check_cache_format,
    check_sizes,
    positive,
    positive_integer,
    text_config,
)
from unispec.pipelines.layers.rope import Rope, RopeType, read_rope

from .checks import check_stack

__all__ = ["Llama3Config", "NormMethod"]

NormMethod = Literal["rms_norm", "layer_norm"]
"""The norm of a whole stack."""

_LAYER_NORM_EPS: Final = 1e-5
_HIDDEN_STATES: Final = (
    ReturnHiddenStates.NONE,
    ReturnHiddenStates.LAST,
    ReturnHiddenStates.ALL,
    ReturnHiddenStates.ALL_NORMALIZED,
)


@dataclass(kw_only=True)
class Llama3Config(ArchConfigWithStoredKVParams, ArchConfigWithKVCache):
    """Shapes and constants of a Llama stack, or of one that differs from it in constants.

    Besides Llama 2 to 3.2 these are Granite (multipliers), Phi-3 (LongRoPE, joined
    projections) and OLMo (layer norm, clipped projections).

    Raises:
        InputError: both kinds of rope scaling, an unknown norm, or hidden states that no
            graph returns.
    """

    DEFAULT_ENCODING: ClassVar[SupportedEncoding] = BFLOAT16
    """MAX's fallback where no encoding is asked for; the graph follows `choose_encoding`."""
    SUPPORTED_ENCODINGS: ClassVar[set[SupportedEncoding]] = {FLOAT32, BFLOAT16}
    """What weights and activations can be."""
    KEEPS_FORMS: ClassVar[bool] = True
    """Whether matrices may stay on a CPU as a checkpoint stores them."""
    ROPE_TYPES: ClassVar[Sequence[RopeType]] = ("default", "llama3", "longrope")
    """How the rotary frequencies may be scaled."""

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
    interleaved_rope_weights: bool
    """Whether the two rows of q and k that rotate together are neighbours, as in llama.cpp's
    files; else they are half a head apart, as in Hugging Face's."""
    vocab_size: int
    """V, rows of the head; of a draft with a reduced vocabulary N, the tokens it can propose."""
    dtype: DType
    """Of weights and activations."""
    kv_params: KVCacheParams
    """The cache: layers, heads, width of a head, dtype, page size and devices."""
    return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN
    """Of which tokens the graph returns logits, beside each row's last one."""
    norm_method: NormMethod = "rms_norm"
    """Of all norms of the stack."""
    attention_bias: bool = False
    """Whether the q, k, v and o projections have a bias."""
    rms_norm_eps: float | None = None
    """Added to the mean square before its root is taken; None for a stack with layer norms."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding."""
    stacked_mlp: bool = False
    """Whether the checkpoint has gate and up projection as one `gate_up_proj`."""
    stacked_qkv: bool = False
    """Whether the checkpoint has q, k and v projection as one `qkv_proj`."""
    attention_multiplier: float
    """Scale of attention scores."""
    embedding_multiplier: float
    """Scale of the embedded tokens."""
    residual_multiplier: float
    """Scale of what attention and MLP add to the residual stream."""
    devices: list[DeviceRef]
    """Where the stack runs, one device."""
    clip_qkv: float | None = None
    """Largest magnitude of queries, keys and values before rotation; None: no limit."""
    norm_elementwise_affine: bool = True
    """Whether layer norms have a weight and a bias."""
    longrope_scaling_params: LongRoPEScalingParams | None = None
    """LongRoPE's factors of the rotary frequencies; None: they are not scaled that way."""
    yarn_scaling_params: DeepseekYarnRopeScalingParams | None = None
    """YaRN's parameters, which only Kimi K2.5's draft has; None: they are not scaled that way."""
    logits_scaling: float = 1.0
    """What the logits are divided by."""
    return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE
    """Which hidden states the graph returns."""

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        if self.rope_scaling_params and self.longrope_scaling_params:
            raise InputError(
                "rope_scaling_params and longrope_scaling_params are both set; set one of them"
            )
        if self.norm_method not in get_args(NormMethod):
            raise InputError(
                f"norm_method {self.norm_method!r} is unknown; known:"
                f" {', '.join(get_args(NormMethod))}"
            )
        if self.return_hidden_states not in _HIDDEN_STATES:
            raise InputError(
                f"return_hidden_states {self.return_hidden_states.value!r} is not supported;"
                f" supported: {', '.join(mode.value for mode in _HIDDEN_STATES)}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head; need not be `hidden_size / num_attention_heads`."""
        return self.kv_params.head_dim

    @property
    def norm_eps(self) -> float:
        """What norms add to the variance: `rms_norm_eps`, for layer norms 1e-5 as in OLMo.

        Raises:
            InputError: an RMSNorm without `rms_norm_eps`.
        """
        if self.norm_method == "layer_norm":
            return _LAYER_NORM_EPS
        if self.rms_norm_eps is None:
            raise InputError(
                "rms_norm_eps is not set, but norm_method is 'rms_norm'; set it, or choose"
                " 'layer_norm'"
            )
        return self.rms_norm_eps

    @property
    def rope(self) -> Rope:
        """Base and scaling of the rotary frequencies."""
        return Rope(
            self.rope_theta,
            llama3=self.rope_scaling_params,
            long=self.longrope_scaling_params,
            yarn=self.yarn_scaling_params,
        )

    @staticmethod
    def get_head_dim_from_config(config: Any) -> int:
        """Width of one attention head: `head_dim`, else `hidden_size / num_attention_heads`."""
        head_dim = getattr(config, "head_dim", None)
        return int(head_dim or config.hidden_size // config.num_attention_heads)

    @staticmethod
    def get_num_layers(huggingface_config: Any) -> int:
        """Number of decoder layers."""
        return int(huggingface_config.num_hidden_layers)

    @staticmethod
    def calculate_attention_multiplier(huggingface_config: Any) -> float:
        """Scale of attention scores: `attention_multiplier`, else `1 / sqrt(head_dim)`."""
        head_dim = Llama3Config.get_head_dim_from_config(huggingface_config)
        multiplier = getattr(huggingface_config, "attention_multiplier", None)
        return float(multiplier if multiplier is not None else 1.0 / math.sqrt(head_dim))

    def number_bytes(self, name: str, dims: int) -> int:
        """Bytes of a number in a tensor of the checkpoint, as the layers compute with it.

        Args:
            name: its name in the checkpoint.
            dims: its number of dimensions.
        """
        return self.dtype.size_in_bytes

    @classmethod
    def choose_encoding(cls, model_config: MAXModelConfig) -> SupportedEncoding:
        """The number format of weights and activations: the one asked for, or the device's.

        Raises:
            InputError: an encoding that the stack or the device does not support.
        """
        return choose_encoding(
            model_config.quantization_encoding, model_config.device_specs, cls.SUPPORTED_ENCODINGS
        )

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
            pipeline_config: for the speculative method and K.
        """
        return cache_params(
            kv_cache_config,
            pipeline_config,
            dtype=cache_dtype,
            n_kv_heads=huggingface_config.num_key_value_heads,
            head_dim=cls.get_head_dim_from_config(huggingface_config),
            num_layers=cls.get_num_layers(huggingface_config),
            devices=devices,
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

        What only the checkpoint's tensors tell is left to `finalize`.

        Args:
            max_seq_len: longest sequence in tokens; None: what the model allows.

        Raises:
            InputError: no config.json, a size or constant out of range, an unknown rope type,
                or a dtype, activation or bias that the stack has no code for.
        """
        model_config = model_config or pipeline_config.model
        hf, source = text_config(model_config), model_config.model_name
        check_sizes(hf, source)
        if getattr(hf, "head_dim", None) is not None:
            positive_integer("head_dim", hf.head_dim, source)
        head_dim = cls.get_head_dim_from_config(hf)
        check_stack(hf, head_dim, source)
        check_cache_format(model_config, source)
        devices = [DeviceRef(spec.device_type, spec.id) for spec in model_config.device_specs]
        dtype = supported_encoding_dtype(cls.choose_encoding(model_config))
        rope = read_rope(hf, head_dim, source, types=cls.ROPE_TYPES)

        def constant(name: str) -> float | None:
            value = getattr(hf, name, None)
            return None if value is None else positive(name, value, source)

        return cls(
            hidden_size=hf.hidden_size,
            num_attention_heads=hf.num_attention_heads,
            num_key_value_heads=hf.num_key_value_heads,
            num_hidden_layers=hf.num_hidden_layers,
            rope_theta=rope.theta,
            rope_scaling_params=rope.llama3,
            max_seq_len=max_seq_len or cls.calculate_max_seq_len(hf, model_config),
            intermediate_size=hf.intermediate_size,
            # GGUF files are read into Hugging Face's order of rows.
            interleaved_rope_weights=False,
            vocab_size=hf.vocab_size,
            dtype=dtype,
            kv_params=cls.construct_kv_params(
                hf, pipeline_config, devices, model_config.kv_cache, dtype
            ),
            attention_bias=bool(getattr(hf, "attention_bias", False)),
            rms_norm_eps=constant("rms_norm_eps"),
            tie_word_embeddings=bool(getattr(hf, "tie_word_embeddings", False)),
            attention_multiplier=positive(
                "attention_multiplier", cls.calculate_attention_multiplier(hf), source
            ),
            embedding_multiplier=constant("embedding_multiplier") or 1.0,
            residual_multiplier=constant("residual_multiplier") or 1.0,
            devices=devices,
            clip_qkv=constant("clip_qkv"),
            longrope_scaling_params=rope.long,
            yarn_scaling_params=rope.yarn,
            logits_scaling=constant("logits_scaling") or 1.0,
        )

    def finalize(
        self,
        huggingface_config: Any,
        state_dict: Mapping[str, Any],
        return_logits: ReturnLogits,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
        norm_method: NormMethod = "rms_norm",
        attention_bias: bool = False,
    ) -> None:
        """Sets what the checkpoint's tensors and the caller decide.

        Args:
            huggingface_config: the config that `initialize` read.
            state_dict: the checkpoint's tensors by name, with or without `model.`.
            return_logits: of which tokens the graph returns logits.
            return_hidden_states: which hidden states the graph returns.
            norm_method: `"rms_norm"` or `"layer_norm"`.
            attention_bias: whether projections have a bias though the config does not say so.

        Raises:
            InputError: an unknown norm, or hidden states that no graph returns.
        """
        names = {name.removeprefix("model."): name for name in state_dict}
        if getattr(huggingface_config, "tie_word_embeddings", HEAD not in names):
            self.tie_word_embeddings = HEAD not in tied_names(state_dict, names)
        else:
            self.tie_word_embeddings = False
        self.stacked_mlp = "layers.0.mlp.gate_up_proj.weight" in names
        self.stacked_qkv = "layers.0.self_attn.qkv_proj.weight" in names
        self.norm_elementwise_affine = "norm.weight" in names
        self.norm_method = norm_method
        self.attention_bias = attention_bias or bool(
            getattr(huggingface_config, "attention_bias", False)
        )
        self.return_logits = return_logits
        self.return_hidden_states = return_hidden_states
        self._check()
