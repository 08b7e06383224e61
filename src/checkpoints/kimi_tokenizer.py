"""Kimi K2's tokenizer of its own files, which are no tokenizer.json.

`tiktoken.model` has a line for each token: its bytes in base64 and its rank, which is its id.
`tokenizer_config.json` names the special tokens behind them. The pattern that splits a text first,
and the names of tokens that have none, are those of `tokenization_kimi.py` of the repositories
moonshotai/Kimi-K2-Instruct and moonshotai/Kimi-K2.5, which is not run.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from unispec.errors import InputError

from .json_object import read_json_object

__all__ = ["build_kimi_tokenizer"]

NUM_RESERVED: Final = 256
"""Ids behind the last rank, named or not."""

_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE: Final = r"[^\r\n\p{L}\p{N}]?"
_SHORT: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT: Final = "|".join(
    [
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""Chinese, words of other letters, up to three digits, signs, ends of lines, blanks."""


def build_kimi_tokenizer(
    ranks: Path, config: Path, chat_template: Path | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer that Kimi's files describe.

    A text of more than 400,000 characters, or one with 25,000 and no blank among them, may become
    other tokens than with Kimi's own code, which cuts it before it is split.

    Args:
        ranks: `tiktoken.model`.
        config: `tokenizer_config.json`.
        chat_template: `chat_template.jinja`; none takes that of `tokenizer_config.json`, if any.

    Raises:
        InputError: a file is damaged, or they do not belong together.
    """
    found = _read_ranks(ranks)
    names, roles, template = _read_config(config)
    if chat_template:
        try:
            template = chat_template.read_text(encoding="utf-8")
        except ValueError as error:
            raise InputError(f"{chat_template} is no UTF-8 ({error}): download it again") from error
    added = _added_tokens(names, len(found), config)
    tokenizer = Tokenizer(_bpe(found))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Ids are given in order; a token that is there already would keep its own.
    tokenizer.add_tokens(list(added.values()))
    for number, token in added.items():
        if tokenizer.token_to_id(token.content) != number:
            raise InputError(
                f"{config}: the token {token.content!r} of id {number} is also another one:"
                " download it again"
            )
    for name, content in roles.items():
        if tokenizer.token_to_id(content) is None:
            raise InputError(
                f"{config}: {name} {content!r} is no token of {ranks.name}: download both again"
            )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **roles,
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise InputError(
                f"{path}: line {number + 1} is {line[:40]!r}, not base64 and a rank: download it"
                " again"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise InputError(
            f"{path}: its {len(ranks)} ranks are not 0, 1, 2, ... of at least 256 tokens: download"
            " it again"
        )
    return ranks


def _bpe(ranks: dict[bytes, int]) -> models.BPE:
    """Joins what becomes the token of the lowest rank first, as tiktoken does."""
    letters = bytes_to_unicode()  # type: ignore[no-untyped-call]
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (written[token[:cut]], written[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    # A piece that is a token is taken as it is, whatever its merges.
    return models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True)


def _read_config(path: Path) -> tuple[dict[int, AddedToken], dict[str, str], Any]:
    """Named tokens by their ids, tokens by their roles, and the chat template."""
    stated = read_json_object(path, label=str(path), fix="download it again")
    try:
        names = {
            int(number): AddedToken(
                _text(token), special=token.get("special", False), normalized=False
            )
            for number, token in stated.get("added_tokens_decoder", {}).items()
        }
        roles = {
            name: _text(token)
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (token := stated.get(name)) is not None
        }
        return names, roles, stated.get("chat_template")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be used ({type(error).__name__}: {error}): download it again"
        ) from error


def _text(token: str | dict[str, Any]) -> str:
    content = token["content"] if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise TypeError(f"{content!r} is no token")
    return content


def _added_tokens(names: dict[int, AddedToken], first: int, path: Path) -> dict[int, AddedToken]:
    """All tokens behind the ranks by their ids, in order; those without a name are special."""
    added = {
        number: AddedToken(f"<|reserved_token_{number}|>", special=True, normalized=False)
        for number in range(first, first + NUM_RESERVED)
    }
    for number, token in names.items():
        if number not in added:
            raise InputError(
                f"{path}: the token {token.content!r} has id {number}, outside of {first} to"
                f" {first + NUM_RESERVED - 1}: it does not belong to this tiktoken.model"
            )
    return added | names
