"""Kimi K2.5's config.json for transformers, which has no class for it (5.12)."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, DeepseekV3Config, PretrainedConfig

__all__ = ["KimiK25HFConfig", "register_with_transformers"]


class KimiK25HFConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """A text configuration and a vision configuration.

    Args:
        text_config: of the language model, DeepSeek-V3's keys.
        vision_config: of the vision tower and the projector.
        media_placeholder_token_id: the token whose embeddings image features replace.

    """

    model_type = "kimi_k25"
    """As config.json has it."""
    sub_configs = {"text_config": DeepseekV3Config, "vision_config": PretrainedConfig}  # noqa: RUF012
    """The parts and their classes."""

    def __init__(
        self,
        text_config: dict[str, Any] | None = None,
        vision_config: dict[str, Any] | None = None,
        media_placeholder_token_id: int = 163605,
        **kwargs: Any,
    ) -> None:
        self.text_config = DeepseekV3Config(**_plain(text_config))
        self.vision_config = PretrainedConfig(**_plain(vision_config))
        self.media_placeholder_token_id = media_placeholder_token_id
        super().__init__(**kwargs)


def register_with_transformers() -> None:
    """Lets `AutoConfig` read folders of model type `kimi_k25`."""
    AutoConfig.register(KimiK25HFConfig.model_type, KimiK25HFConfig, exist_ok=True)


def _plain(config: Any) -> dict[str, Any]:
    stated = config.to_dict() if isinstance(config, PretrainedConfig) else dict(config or {})
    # The language model's own type is Kimi K2, whose stack is DeepSeek-V3's.
    stated.pop("model_type", None)
    return stated
