"""A byte-level tokenizer of any vocabulary size from 248 to 935."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

__all__ = ["write_tokenizer"]

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1, 2

# GPT-2's letters for the 256 bytes: printable Latin-1 stands for itself, the other 68 bytes
# for U+0100 onwards. Last come the bytes 0xF5 to 0xFF, which no UTF-8 text contains.
BYTES = [
    chr(code)
    for code in (
        *range(0x21, 0x7F),
        *range(0xA1, 0xAD),
        *range(0xAE, 0xF5),
        *range(0x100, 0x144),
        *range(0xF5, 0x100),
    )
]


def write_tokenizer(folder: Path, vocab_size: int, *, beyond: Sequence[str] = ()) -> None:
    """Writes a tokenizer: 3 special tokens, the bytes, then pairs of lower-case letters.

    Those ``beyond`` the vocabulary are special too, and the model never writes them.

    A vocabulary below 259 leaves out bytes that no UTF-8 text contains (0xFF downwards).

    Raises:
        ValueError: ``vocab_size`` is outside of 248 to 935.
    """
    if not 248 <= vocab_size <= 935:
        raise ValueError(f"a tiny tokenizer has 248 to 935 tokens, not {vocab_size}")
    tokens = [*SPECIAL.values(), *BYTES][:vocab_size]
    merges = list(islice(product(ascii_lowercase, repeat=2), vocab_size - len(tokens)))
    tokens += ["".join(pair) for pair in merges]
    special = {token: index for index, token in enumerate(SPECIAL.values())}
    special |= {token: vocab_size + index for index, token in enumerate(beyond)}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for token, index in special.items()
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "unk_token": SPECIAL["unk_token"],
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
