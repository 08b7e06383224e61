"""Who is compared: the one table to extend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unispec.methods import Method

__all__ = ["CONTENDERS", "LLAMA_CPP", "Contender", "System"]

System = Literal["llama.cpp", "unispec", "max", "transformers", "openvino"]
LLAMA_CPP = "llama"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to generate the target's greedy output."""

    name: str
    label: str
    system: System
    method: Method | Literal["ngram"] | None = None
    """Of speculation; None: the target alone."""
    draft_tokens: int = 0
    """Most tokens proposed in a step."""
    formats: tuple[str, ...] | None = None
    """Those that it can run; None: all."""

    def runs(self, form: str) -> bool:
        """Whether it takes part in the comparison of that format."""
        return self.formats is None or form in self.formats

    @property
    def needs_folder(self) -> bool:
        """Whether it reads a Hugging Face folder instead of a GGUF file."""
        return self.system in ("max", "transformers")


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(name=LLAMA_CPP, label="llama.cpp, alone", system="llama.cpp"),
        Contender(
            name="llama-ngram",
            label="llama.cpp, n-gram K=4",
            system="llama.cpp",
            method="ngram",
            draft_tokens=4,
        ),
        Contender(
            name="llama-dflash",
            label="llama.cpp, our DFlash K=5",
            system="llama.cpp",
            method="dflash",
            draft_tokens=5,
        ),
        Contender(name="unispec", label="unispec, alone", system="unispec"),
        Contender(
            name="eagle3-k1",
            label="unispec, EAGLE-3 K=1",
            system="unispec",
            method="eagle3",
            draft_tokens=1,
        ),
        Contender(
            name="eagle3-k3",
            label="unispec, EAGLE-3 K=3",
            system="unispec",
            method="eagle3",
            draft_tokens=3,
        ),
        Contender(
            name="eagle3-k5",
            label="unispec, EAGLE-3 K=5",
            system="unispec",
            method="eagle3",
            draft_tokens=5,
        ),
        Contender(
            name="dflash-k5",
            label="unispec, DFlash K=5",
            system="unispec",
            method="dflash",
            draft_tokens=5,
        ),
        Contender(name="max", label="MAX's own pipeline", system="max", formats=("f32",)),
        Contender(
            name="transformers",
            label="transformers",
            system="transformers",
            formats=("f32", "bf16"),
        ),
        Contender(
            name="openvino",
            label="OpenVINO GenAI",
            system="openvino",
            formats=("q8_0", "q4_0", "q4_k"),
        ),
    )
}
