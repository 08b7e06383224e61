"""The architectures as MAX finds them, in a process of its own: MAX's registry is global."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from runs import run_python
from tiny import TinyPair

from unispec.methods import DRAFTLESS, METHODS, generations
from unispec.pipelines.architectures import ARCHITECTURES
from unispec.pipelines.architectures.registry import pairs

# What `max serve --custom-architectures` does, up to the point where it loads the model.
RESOLVE = """
import json, sys
from max.driver import DeviceSpec
from max.pipelines.lib import PIPELINE_REGISTRY, PipelineArgs, PipelineConfig
from max.pipelines.lib import MAXModelConfig, PipelineRuntimeConfig
from max.pipelines.speculative import SpeculativeConfig
from unispec.checkpoints.kimi_config import register_with_transformers

register_with_transformers()  # Kimi K2.5's own repository brings such a class
target, draft, method, asked = json.loads(sys.argv[1])
shared = {"device_specs": [DeviceSpec.cpu()], "quantization_encoding": "float32"}
config = PipelineConfig.from_args(
    PipelineArgs(
        model_path=target,
        draft_model=MAXModelConfig(model_path=draft, **shared) if draft else None,
        speculative=SpeculativeConfig(
            speculative_method=method, num_speculative_tokens=asked
        ) if method else None,
        runtime=PipelineRuntimeConfig(
            custom_architectures=["unispec.pipelines.architectures"],
            prefer_module_v3=True,
            max_batch_size=1,
        ),
        **shared,
    )
)
found = PIPELINE_REGISTRY.retrieve_factory(config)
model = found.factory.keywords["pipeline_model"]
architecture = PIPELINE_REGISTRY.architecture_for_config(config)
speculative = config.speculative
print(json.dumps([
    f"{model.__module__}.{model.__qualname__}",
    f"{architecture.config.__module__}.{architecture.config.__qualname__}",
    speculative.num_speculative_tokens if speculative else None,
    found.factory.func.__name__,
    type(found.tokenizer).__name__,
    PIPELINE_REGISTRY.retrieve_context_type(config).__name__,
]))
"""


COMBINATIONS = [
    (
        "llama_eagle_agreeing",
        None,
        None,
        "llama3_modulev3",
        "Llama3Model",
        "targets.llama.config.Llama3Config",
        None,
    ),
    (
        "llama_eagle_agreeing",
        "eagle",
        4,
        "unified_eagle_llama3",
        "UnifiedEagleLlama3Model",
        "architectures.unified_eagle_llama3.config.UnifiedEagleLlama3Config",
        4,
    ),
    (
        "deepseek_mtp_agreeing",
        "mtp",
        2,
        "unified_mtp_deepseekV3",
        "UnifiedMTPDeepseekV3Model",
        "architectures.unified_mtp_deepseekV3.config.UnifiedMTPDeepseekV3Config",
        2,
    ),
    (
        "llama_dflash_windowed",
        "dflash",
        None,
        "unified_dflash_llama3",
        "UnifiedDflashLlama3Model",
        "architectures.unified_dflash_llama3.config.UnifiedDflashLlama3Config",
        5,
    ),
    (
        "kimi_dflash",
        "dflash",
        None,
        "unified_dflash_kimi_k25",
        "UnifiedDflashKimiK25Model",
        "architectures.unified_dflash_kimi_k25.config.UnifiedDflashKimiK25Config",
        3,
    ),
]
"""Those with a package of their own."""

RELATIVES = [
    ("mistral_eagle", "eagle", 4, "MistralEagle", 4),
    ("qwen3_dflash", "dflash", None, "Qwen3Dflash", 5),
]
"""Two of those that are composed."""

SERVED = ["ServedPipeline", "ServedTokenizer", "ServedContext"]
OF_MAX = ["TextGenerationPipeline", "TextTokenizer", "TextContext"]


def test_every_entry_is_resolved_below() -> None:
    """Targets without a draft are no entries, but for one: MAX has its own."""
    packages = [entry.pipeline_model.__module__.split(".")[3] for entry in ARCHITECTURES]
    own = sorted(name for name in packages if name != "composed")
    assert own == sorted(package for _, _, _, package, *_ in COMBINATIONS)
    composed = {pair.model.__name__ for pair in pairs() if pair.method} - {
        model for *_, model, _, _ in COMBINATIONS
    }
    # MAX finds the documented pair for any EAGLE draft of a Llama.
    composed -= {"LlamaEagle3Model"}
    assert packages.count("composed") == len(composed)
    assert {f"{name}Model" for _, _, _, name, _ in RELATIVES} <= composed


def test_a_method_and_its_facts_name_the_same_later_generations() -> None:
    """The facts decide what an engine runs, the method what MAX's own commands do."""
    methods = {pair.method for pair in pairs() if pair.method}
    later = {method.name: [one.name for one in method.later] for method in methods}
    assert later == {
        name: [n for n in generations(name) if n != name]
        for name in METHODS
        if name not in DRAFTLESS
    }
    assert later["eagle"] == ["eagle3"]


@pytest.mark.parametrize(
    ("pair", "method", "asked", "package", "model", "config", "width"), COMBINATIONS
)
def test_max_resolves_each_combination_to_our_class(
    tiny_pair: Callable[[str], TinyPair],
    pair: str,
    method: str | None,
    asked: int | None,
    package: str,
    model: str,
    config: str,
    width: int | None,
) -> None:
    """For a DFlash draft MAX also learns K from the checkpoint's block of 6."""
    found = tiny_pair(pair)
    draft = str(found.draft) if found.draft and method else None
    resolved = run_python(RESOLVE, json.dumps([str(found.target), draft, method, asked]))
    root = "unispec.pipelines"
    assert json.loads(resolved) == [
        f"{root}.architectures.{package}.model.{model}",
        f"{root}.{config}",
        width,
        *(SERVED if method else OF_MAX),
    ]


@pytest.mark.parametrize(("pair", "method", "asked", "name", "width"), RELATIVES)
def test_max_resolves_relatives_of_llama_to_composed_classes(
    tiny_pair: Callable[[str], TinyPair],
    pair: str,
    method: str,
    asked: int | None,
    name: str,
    width: int,
) -> None:
    """MAX renames no target but Llama and Kimi: it finds these by target, method and draft."""
    found = tiny_pair(pair)
    resolved = run_python(RESOLVE, json.dumps([str(found.target), str(found.draft), method, asked]))
    assert json.loads(resolved) == [
        f"unispec.pipelines.architectures.composed.{name}Model",
        f"unispec.pipelines.unified.compose.{name}Config",
        width,
        *SERVED,
    ]


def test_max_says_that_another_k_is_replaced(tiny_pair: Callable[[str], TinyPair]) -> None:
    """Once, and by our entry, not by the one of MAX that it stands for."""
    pair = tiny_pair("llama_dflash_windowed")
    count = """
import logging
seen = []
class Counter(logging.Handler):
    def emit(self, record):
        seen.append(record.getMessage())
logging.getLogger("unispec").addHandler(Counter())
"""
    asked = json.dumps([str(pair.target), str(pair.draft), "dflash", 3])
    said = json.loads(run_python(f"{count}{RESOLVE}\nprint(json.dumps(seen))", asked))
    assert [text for text in said if "num_speculative_tokens 3 is replaced by 5" in text] == said
    assert len(said) == 1


def test_chunked_prefill_stays_on(tiny_pair: Callable[[str], TinyPair]) -> None:
    """Without it a step could be larger than what is reserved for one."""
    pair = tiny_pair("llama_eagle_agreeing")
    asked = json.dumps([str(pair.target), str(pair.draft), "eagle", 3])
    switched_off = RESOLVE.replace(
        "max_batch_size=1,", "max_batch_size=1, enable_chunked_prefill=False,"
    )
    assert switched_off != RESOLVE
    shown = "print(json.dumps(config.runtime.enable_chunked_prefill))"
    assert json.loads(run_python(f"{switched_off}\n{shown}", asked)) is True


def test_the_package_imports_nothing_before_it_is_asked() -> None:
    code = (
        "import sys; import unispec.pipelines.architectures as a; before = 'max' in sys.modules;"
        "print(before, isinstance(a.ARCHITECTURES, list), a.ARCHITECTURES is a.ARCHITECTURES)"
    )
    assert run_python(code) == "False True True"
