"""Configuration of a DeepSeek-V3 decoder stack, read from a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from max.dtype import DType
from max.graph import DeviceRef
from max.nn.comm.ep import EPConfig
from max.nn.kv_cache import KVCacheParams
from max.nn.quant_config import QuantConfig
from max.nn.rotary_embedding import DeepseekYarnRopeScalingParams
from max.pipelines.lib import KVCacheConfig, MAXModelConfig, PipelineConfig
from max.pipelines.lib.interfaces.arch_config import (
    ArchConfigWithKVCache,
    ArchConfigWithStoredKVParams,
)
from max.pipelines.modeling.config_enums import SupportedEncoding, supported_encoding_dtype
from typing_extensions import Self

from unispec.encodings import BFLOAT16, FLOAT32, FP8
from unispec.errors import InputError
from unispec.pipelines.layers.cache import cache_params
from unispec.pipelines.layers.encoding import choose_encoding
from unispec.pipelines.layers.fields import check_cache_format, check_sizes, positive, text_config

from .checks import check_routing, check_stack
from .fp8 import BLOCK, block_scaled, experts_need_fp8, fp8_obstacle, is_quantised
from .placement import check_gpus, check_placement, expert_parallelism, spread_over
from .quantisation import read_fp8_block, read_int4_group_size
from .rope import read_deepseek_rope, softmax_scale

__all__ = ["LATENT_NORM_EPS", "DeepseekV3Config"]

LATENT_NORM_EPS: Final = 1e-6
"""Of the norms inside attention; transformers leaves `rms_norm_eps` out of account there."""


@dataclass(kw_only=True)
class DeepseekV3Config(ArchConfigWithStoredKVParams, ArchConfigWithKVCache):
    """Shapes and constants of a DeepSeek-V3 stack.

    The names are those of the checkpoint's config.json.
    """

    DEFAULT_ENCODING: ClassVar[SupportedEncoding] = BFLOAT16
    """MAX's fallback where no encoding is asked for; the graph follows `choose_encoding`."""
    SUPPORTED_ENCODINGS: ClassVar[set[SupportedEncoding]] = {FLOAT32, BFLOAT16, FP8}
    """What can be asked for; FP8 on GPUs only, and int4 files are dequantised."""

    KEEPS_FORMS: ClassVar[bool] = False
    """Whether matrices may stay on a CPU as a checkpoint stores them."""
    logits_scaling: ClassVar[float] = 1.0
    """What the logits are divided by; this model has no such constant."""

    hidden_size: int
    """H, width of the residual stream."""
    intermediate_size: int
    """Width inside the MLP of a dense layer."""
    num_hidden_layers: int
    """Decoder layers; the multi-token prediction layer is not among them."""
    num_attention_heads: int
    """Query heads of a layer."""
    q_lora_rank: int | None
    """Width of the queries' latent; None: they are projected at once."""
    kv_lora_rank: int
    """R, width of the latent that keys and values are made from."""
    qk_nope_head_dim: int
    """Width of the part of a query or key head that is not rotated."""
    qk_rope_head_dim: int
    """Width of the part that is rotated; all heads share the key's."""
    v_head_dim: int
    """Width of a value head."""
    first_k_dense_replace: int
    """How many of the first layers have an MLP in place of experts."""
    n_routed_experts: int
    """E, experts of a layer that the router chooses from."""
    n_shared_experts: int
    """Experts of a layer that every token goes through."""
    num_experts_per_tok: int
    """Experts that the router chooses for a token."""
    moe_intermediate_size: int
    """Width inside an expert."""
    n_group: int
    """Groups of experts; the router first chooses among these."""
    topk_group: int
    """Groups that the router chooses."""
    norm_topk_prob: bool
    """Whether the weights of a token's experts are divided by their sum."""
    routed_scaling_factor: float
    """What the weights of the chosen experts are multiplied by."""
    rope_theta: float
    """Base of the rotary frequencies."""
    rope_scaling: DeepseekYarnRopeScalingParams | None
    """YaRN's scaling of the rotary frequencies; None: they are not scaled."""
    rope_interleave: bool
    """Whether the two columns that rotate together are neighbours; else half a head apart."""
    rms_norm_eps: float
    """Added to the mean square of the residual stream before its root is taken."""
    softmax_scale: float
    """Scale of attention scores."""
    vocab_size: int
    """V, rows of embedding and head."""
    tie_word_embeddings: bool
    """Whether the head is the embedding."""
    max_seq_len: int
    """Longest sequence of a request, prompt and output, in tokens."""
    dtype: DType
    """Of activations, and of weights but for FP8 on GPUs."""
    kv_params: KVCacheParams
    """The cache: a token's latent and rotated key part, one row for all heads."""
    devices: list[DeviceRef]
    """Where the stack runs."""
    num_nextn_predict_layers: int = 1
    """Layers of multi-token prediction that the checkpoint has behind the last layer."""
    fp8_block: tuple[int, int] | None = None
    """Rows and columns of the blocks of FP8 matrices; None: the checkpoint is not in FP8."""
    int4_group_size: int | None = None
    """Columns of the groups of packed int4 matrices; None: the checkpoint is not packed."""
    ep: EPConfig | None = None
    """How GPUs with data-parallel attention share the experts; None: they share every layer."""
    fp8: QuantConfig | None = None
    """How GPUs compute in FP8; None: the weights are dequantised, whatever they are stored as."""

    @property
    def on_gpus(self) -> bool:
        """Whether the stack runs on GPUs, all of whose layers are MAX's."""
        return not self.devices[0].is_cpu()

    @property
    def cache_width(self) -> int:
        """Columns of a cached row: the latent, then the rotated part of the key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def query_head_dim(self) -> int:
        """Width of a query head before it is turned towards the latent."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def number_bytes(self, name: str, dims: int) -> int:
        """Bytes of a number in a tensor of the checkpoint, as the layers compute with it.

        Args:
            name: its name in the checkpoint.
            dims: its number of dimensions.
        """
        is_narrow = self.fp8 is not None and is_quantised(name, dims)
        return 1 if is_narrow else self.dtype.size_in_bytes

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of one MLP.

        Args:
            layer: from 0; the multi-token prediction layer comes after the last one.
        """
        return layer >= self.first_k_dense_replace

    def one_layer(self) -> Self:
        """The stack of the multi-token prediction layer: one layer with a cache of its own."""
        return replace(self, num_hidden_layers=1, kv_params=replace(self.kv_params, num_layers=1))

    @classmethod
    def calculate_max_seq_len(cls, huggingface_config: Any, model_config: MAXModelConfig) -> int:
        """Longest sequence that the stack's positions and `max_length` allow, in tokens."""
        return super().calculate_max_seq_len(huggingface_config.get_text_config(), model_config)

    @classmethod
    def choose_encoding(
        cls, model_config: MAXModelConfig, *, spread: bool = False
    ) -> SupportedEncoding:
        """The number format that the layers compute in.

        The one asked for; else FP8 where the checkpoint is in the kernels' FP8 blocks and the GPUs
        compute in them, else the device's. Another checkpoint is rounded to FP8 if that is asked
        for.

        Raises:
            InputError: an encoding that the stack or the device does not support.
        """
        requested, specs = model_config.quantization_encoding, model_config.device_specs
        if requested not in (None, FP8):
            return choose_encoding(requested, specs, cls.SUPPORTED_ENCODINGS)
        hf, source = text_config(model_config), model_config.model_name
        full_config: Any = model_config.huggingface_config
        check_stack(hf, source)
        block = read_fp8_block(hf, source) or read_fp8_block(full_config, source)
        devices = [DeviceRef(spec.device_type, spec.id) for spec in specs]
        if requested is None and block != BLOCK:
            return choose_encoding(None, specs, cls.SUPPORTED_ENCODINGS)
        obstacle = fp8_obstacle(hf, devices, spread=spread)
        if obstacle is None:
            return FP8
        if requested is not None:
            raise InputError(
                f"quantization encoding {requested!r} of {source} is not possible: {obstacle}; use"
                + ("" if experts_need_fp8(devices) else " 'bfloat16' on GPUs or")
                + " 'float32' on a CPU, for which FP8 is dequantised"
            )
        return choose_encoding(None, specs, cls.SUPPORTED_ENCODINGS)

    @classmethod
    def construct_kv_params(  # type: ignore[override]
        cls,
        huggingface_config: Any,
        pipeline_config: PipelineConfig,
        devices: list[DeviceRef],
        kv_cache_config: KVCacheConfig,
        cache_dtype: DType,
    ) -> KVCacheParams:
        """Cache parameters of the stack, with room for the configured drafts.

        max 26.7 reads its latent cache on GPUs only, each of which has all of it, or, where
        attention is data-parallel, that of its rows; on a CPU the row is the one key head, and
        the one value head, of ordinary attention.

        Args:
            pipeline_config: for the speculative method, K and `data_parallel_degree`.
        """
        return cache_params(
            kv_cache_config,
            pipeline_config,
            dtype=cache_dtype,
            n_kv_heads=1,
            head_dim=huggingface_config.kv_lora_rank + huggingface_config.qk_rope_head_dim,
            num_layers=huggingface_config.num_hidden_layers,
            devices=devices,
            data_parallel_degree=pipeline_config.model.data_parallel_degree,
            is_mla=not devices[0].is_cpu(),
            num_q_heads=huggingface_config.num_attention_heads,
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
            max_seq_len: longest sequence in tokens; None: what the model allows.

        Raises:
            InputError: no config.json, a size or constant out of range, a rope type, routing
                or activation that the stack has no code for, or devices that it does not
                run on.
        """
        model_config = model_config or pipeline_config.model
        hf, source = text_config(model_config), model_config.model_name
        full_config: Any = model_config.huggingface_config
        check_sizes(hf, source)
        check_stack(hf, source)
        check_routing(hf, source)
        check_cache_format(model_config, source)
        devices = [DeviceRef(spec.device_type, spec.id) for spec in model_config.device_specs]
        check_placement(devices)
        # A model that sees images may state it beside the part for the text.
        fp8_block = read_fp8_block(hf, source) or read_fp8_block(full_config, source)
        group_size = read_int4_group_size(hf, source) or read_int4_group_size(full_config, source)
        predicted = getattr(hf, "num_nextn_predict_layers", None)
        spread = spread_over(pipeline_config, model_config, hf, devices)
        encoding = cls.choose_encoding(model_config, spread=spread)
        fp8 = block_scaled(hf) if encoding == FP8 else None
        dtype = DType.bfloat16 if fp8 else supported_encoding_dtype(encoding)
        check_gpus(hf, dtype, devices, source, in_fp8=fp8 is not None, spread=spread)
        rope = read_deepseek_rope(hf, source)
        return cls(
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_hidden_layers=hf.num_hidden_layers,
            num_attention_heads=hf.num_attention_heads,
            q_lora_rank=hf.q_lora_rank,
            kv_lora_rank=hf.kv_lora_rank,
            qk_nope_head_dim=hf.qk_nope_head_dim,
            qk_rope_head_dim=hf.qk_rope_head_dim,
            v_head_dim=hf.v_head_dim,
            first_k_dense_replace=hf.first_k_dense_replace,
            n_routed_experts=hf.n_routed_experts,
            n_shared_experts=hf.n_shared_experts,
            num_experts_per_tok=hf.num_experts_per_tok,
            moe_intermediate_size=hf.moe_intermediate_size,
            n_group=hf.n_group,
            topk_group=hf.topk_group,
            norm_topk_prob=bool(hf.norm_topk_prob),
            routed_scaling_factor=positive(
                "routed_scaling_factor", hf.routed_scaling_factor, source
            ),
            rope_theta=rope.theta,
            rope_scaling=rope.yarn,
            rope_interleave=bool(getattr(hf, "rope_interleave", True)),
            rms_norm_eps=positive("rms_norm_eps", hf.rms_norm_eps, source),
            softmax_scale=softmax_scale(hf.qk_nope_head_dim + hf.qk_rope_head_dim, rope),
            vocab_size=hf.vocab_size,
            tie_word_embeddings=bool(hf.tie_word_embeddings),
            max_seq_len=max_seq_len or cls.calculate_max_seq_len(hf, model_config),
            dtype=dtype,
            kv_params=cls.construct_kv_params(
                hf, pipeline_config, devices, model_config.kv_cache, dtype
            ),
            devices=devices,
            num_nextn_predict_layers=1 if predicted is None else int(predicted),
            fp8_block=fp8_block,
            int4_group_size=group_size,
            ep=expert_parallelism(hf, pipeline_config, devices, fp8) if spread else None,
            fp8=fp8,
        )
