"""How the weight files of a checkpoint are called, in each form, and the index of its shards.

Imports nothing heavy, as `repository` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from unispec.checkpoints.json_object import read_json_object
from unispec.errors import InputError

__all__ = [
    "OTHER_SUFFIXES",
    "PICKLED",
    "PICKLED_SUFFIXES",
    "READ_SUFFIXES",
    "SAFETENSORS",
    "WeightForm",
    "listed",
]

_SHOWN_NAMES: Final = 3


@dataclass(frozen=True)
class WeightForm:
    """A form of weights with a fixed name for one file, and an index for several."""

    single: str
    """The name of the file that has all weights."""

    @property
    def index(self) -> str:
        """The name of the JSON file that says which file has which tensor."""
        return f"{self.single}.index.json"

    @property
    def suffix(self) -> str:
        """How every file of the form ends."""
        return Path(self.single).suffix

    def is_in(self, names: Sequence[str]) -> bool:
        """Whether files of these names are a checkpoint in this form."""
        return self.single in names or self.index in names

    def files(self, names: Sequence[str], get: Callable[[str], Path], *, model: str) -> list[str]:
        """The names of the weight files: those in the index, else the single one.

        Args:
            names: of all files that the checkpoint has.
            get: gives one of them by its name.

        Returns:
            Sorted; empty if the checkpoint has no weights in this form.

        Raises:
            InputError: the index is damaged, or names a file that is not there.
        """
        if self.index not in names:
            return [self.single] if self.single in names else []
        label, fix = f"{self.index} of {model}", "download it again"
        places = read_json_object(get(self.index), label=label, fix=fix).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise InputError(f"{label} has no weight_map: {fix}")
        for name in places.values():
            if not isinstance(name, str) or not name.endswith(self.suffix):
                raise InputError(
                    f"{label} names {name!r:.100}, which is no {self.suffix[1:]} file: {fix}"
                )
        if missing := sorted(set(places.values()).difference(names)):
            raise InputError(
                f"{label} names {listed(missing)}, which is not there: download the whole"
                " checkpoint"
            )
        return sorted(set(places.values()))


SAFETENSORS: Final = WeightForm("model.safetensors")
"""What `save_pretrained` of transformers writes."""
PICKLED: Final = WeightForm("pytorch_model.bin")
"""What `torch.save` wrote for transformers."""

READ_SUFFIXES: Final = (SAFETENSORS.suffix, ".gguf")
"""Weights that are read as they are."""
PICKLED_SUFFIXES: Final = (PICKLED.suffix, ".ckpt", ".pkl", ".pt", ".pth")
"""Pickles of any kind; those of a training beside the weights, too."""
OTHER_SUFFIXES: Final = (".h5", ".msgpack", ".onnx")
"""Weights for other programs."""


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
