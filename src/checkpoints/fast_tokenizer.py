"""What tokenizer_config.json says of a tokenizer that `tokenizers` has read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

__all__ = ["build_fast_tokenizer"]

_ADDING_CLASSES: Final = ("LlamaTokenizer", "LlamaTokenizerFast")
"""In transformers 4 these put begin and end themselves, whatever tokenizer.json says."""


def build_fast_tokenizer(
    tokenizer: Tokenizer, config: Mapping[str, Any], chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Dresses `tokenizer`, which keeps its ids, pre-tokenizer and decoder whatever class is named.

    Special tokens that the configuration names are found in a text only if the tokenizer has them
    as added tokens: one that is an ordinary word of the vocabulary stays that. A token that the
    vocabulary lacks is added only if the configuration gives its id; a role (`pad_token`, ...)
    without a token is dropped, for its id would be a guess.

    Begin and end are put as the tokenizer's post-processor does. As in transformers 4, a
    configuration of the class `LlamaTokenizer` or `LlamaTokenizerFast` that states `add_bos_token`
    or `add_eos_token` overrides it: the byte-level Llamas of DeepSeek get their begin only from
    there. Other classes ignored the two, and so do we.

    Args:
        tokenizer: is changed.
        config: of tokenizer_config.json; empty if there is none.
        chat_template: replaces that of the configuration.

    Raises:
        KeyError, TypeError, ValueError: the configuration is damaged, or is another tokenizer's.
    """
    special = {token for _, token in _roles(config)} | set(_extra_tokens(config))
    _add_listed_tokens(tokenizer, config, special)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    roles = {name: token for name, token in _roles(config) if token in vocabulary}
    if config.get("tokenizer_class") in _ADDING_CLASSES:
        _add_begin_and_end(tokenizer, config, roles, vocabulary)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        chat_template=chat_template or _chat_template(config),
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[token for token in _extra_tokens(config) if token in added],
        **{name: token for name, token in roles.items() if token in added},
    )
    # The class would make added tokens of these.
    for name, token in roles.items():
        if token not in added:
            setattr(fast, name, token)
    return fast


def _add_listed_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], special: Set[str]) -> None:
    """Adds the tokens of `added_tokens_decoder` that the tokenizer does not have."""
    listed = {
        int(number): token for number, token in (config.get("added_tokens_decoder") or {}).items()
    }
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for number, token in sorted(listed.items()):
        content = _content(token)
        if content in vocabulary:
            continue
        stated = {name: flag for name, flag in token.items() if isinstance(flag, bool)}
        tokenizer.add_tokens([AddedToken(content, **{"special": content in special, **stated})])
        if tokenizer.token_to_id(content) != number:
            raise ValueError(f"the token {content!r} cannot have the id {number}")


def _roles(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names such as `bos_token` with their tokens."""
    named = config.get("extra_special_tokens")
    for name, token in {**config, **(named if isinstance(named, dict) else {})}.items():
        if isinstance(token, (str, dict)) and name.endswith("_token"):
            yield name, _content(token)


def _extra_tokens(config: Mapping[str, Any]) -> Iterator[str]:
    """Special tokens that have no name."""
    for name in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(name) or ()
        yield from map(_content, () if isinstance(tokens, dict) else tokens)


def _content(token: str | dict[str, Any]) -> str:
    content = token["content"] if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise TypeError(f"{content!r} is no token")
    return content


def _chat_template(config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """One template, or several by their names."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {str(each["name"]): each["template"] for each in template}
    texts = template.values() if isinstance(template, dict) else (template or "",)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("chat_template is neither a text nor a list of named ones")
    return template


def _add_begin_and_end(
    tokenizer: Tokenizer,
    config: Mapping[str, Any],
    roles: Mapping[str, str],
    vocabulary: Mapping[str, int],
) -> None:
    stated = {name: config.get(name) for name in ("add_bos_token", "add_eos_token")}
    if not any(isinstance(flag, bool) for flag in stated.values()):
        return
    # What the classes take for the one that is not stated.
    begin = roles.get("bos_token") if stated["add_bos_token"] is not False else None
    end = roles.get("eos_token") if stated["add_eos_token"] else None
    names = [token for token in (begin, end) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*([begin] if begin else []), "$A", *([end] if end else [])],
        pair=None,
        special_tokens=[(token, vocabulary[token]) for token in dict.fromkeys(names)],
    )
