"""A checkpoint's tokenizer: the ids of its tokenizer.json, whatever else it states."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hub import Hub, running_hub
from tiny import TinyPair
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from unispec.chat import encode_message
from unispec.checkpoints.tokenizer import read_tokenizer
from unispec.engine import Engine, EngineConfig
from unispec.engine.text_stream import TextStream
from unispec.errors import InputError
from unispec.sampling.grammar import Grammar, GrammarCompiler
from unispec.training.target import TorchTarget

TEXTS = [
    "Hello world, it's a blue sky\n\n  and 2026 is no 12!",
    "<s>[INST] hello [/INST] hi </s><s>[INST] and? [/INST]",
    " été à Zürich, 東京\tand 🙂🙃 ",
    "  two  blanks",
    "",
]
CLASSES = [
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "GPT2Tokenizer",
    "NobodyKnowsTokenizer",
    None,
]
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BEGIN = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
)


def byte_level() -> Tokenizer:
    """In the manner of Llama 3 and of DeepSeek's Llamas."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = BEGIN
    return tokenizer


def llama2() -> Tokenizer:
    """As Llama 2's SentencePiece model was converted by transformers 4."""
    pieces = [*SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁etaoinshrdlcumwfgypbvkTHW.,!?'[]/0123456", "▁t", "he", "▁the", "▁b", "in"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "b"), ("i", "n")]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = BEGIN
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    return tokenizer


FORMS = {"byte-level": byte_level, "Llama 2": llama2}


def write(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """The two files of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    stated = {name: value for name, value in (SPECIAL | config).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return folder


def stream(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    text = TextStream(tokenizer)
    return "".join([*map(text.push, tokens), text.finish()])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_the_ids_are_those_of_tokenizer_json(
    form: str, cls: str | None, legacy: bool | None, tmp_path: Path
) -> None:
    write(tmp_path, FORMS[form](), tokenizer_class=cls, legacy=legacy)
    right = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = read_tokenizer(str(tmp_path), "llama")
    assert len(ours) == right.get_vocab_size()
    for text in TEXTS:
        ids = right.encode(text).ids
        assert ids[0] == 1
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == ids[1:]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == right.decode(
                ids, skip_special_tokens=skip
            )
        assert stream(ours, ids) == right.decode(ids)
    if form == "byte-level":
        assert ours.decode(ours.encode(TEXTS[0])[1:]) == TEXTS[0]


@pytest.mark.parametrize("cls", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_engine_training_and_grammars_read_the_same_ids(
    cls: str, tiny_pair: Any, tmp_path: Path
) -> None:
    pair: TinyPair = tiny_pair("llama_eagle")
    for file in pair.target.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": cls}))
    right = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = right.encode("a to z\nand on").ids
    engine = Engine(EngineConfig(model=str(tmp_path), max_length=64))
    assert engine.tokenizer.encode("a to z\nand on") == ids
    assert engine.tokenizer.decode(ids) == right.decode(ids)
    assert TorchTarget(str(tmp_path)).tokenizer.encode("a to z\nand on") == ids
    compiler = GrammarCompiler(engine.tokenizer, 256, sorted(engine.eos_token_ids))
    state = compiler.compile(Grammar("regex", "a to z\nand on")).start()
    for token in right.encode("a to z\nand on", add_special_tokens=False).ids:
        state.accept(token)
    assert state.is_complete


BARE = processors.ByteLevel(trim_offsets=False)
"""Puts nothing, as that of DeepSeek's Llamas."""
HELLO = "Hello world"
HELLO_IDS = [285, 328]

# What transformers 4.57.1 with tokenizers 0.22.2 gave for these files, class and keys, with either
# of the two post-processors.
LLAMA_CLASSES = {
    (True, None): [1, 285, 328],
    (True, False): [1, 285, 328],
    (True, True): [1, 285, 328, 2],
    (False, None): [285, 328],
    (False, False): [285, 328],
    (False, True): [285, 328, 2],
    (None, False): [1, 285, 328],
    (None, True): [1, 285, 328, 2],
}
OTHER_CLASSES = {"bare": [285, 328], "begin": [1, 285, 328]}
"""The same, of PreTrainedTokenizerFast and whatever the two keys say."""


def of_class(
    folder: Path, cls: str | None, processor: Any, begin: bool | None, end: bool | None, **more: Any
) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.post_processor = processor
    write(folder, tokenizer, tokenizer_class=cls, add_bos_token=begin, add_eos_token=end, **more)
    ours = read_tokenizer(str(folder), "llama")
    assert ours.encode(HELLO, add_special_tokens=False) == HELLO_IDS
    return ours


@pytest.mark.parametrize("processor", [BARE, BEGIN], ids=["bare", "begin"])
@pytest.mark.parametrize("cls", ["LlamaTokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize(("begin", "end"), LLAMA_CLASSES)
def test_llama_classes_put_begin_and_end_as_they_did_in_transformers_4(
    cls: str, processor: Any, begin: bool | None, end: bool | None, tmp_path: Path
) -> None:
    """The one thing in which ids may differ from tokenizer.json."""
    ours = of_class(tmp_path, cls, processor, begin, end)
    assert ours.encode(HELLO) == LLAMA_CLASSES[begin, end]


@pytest.mark.parametrize("processor", [BARE, BEGIN], ids=["bare", "begin"])
@pytest.mark.parametrize("cls", ["PreTrainedTokenizerFast", "TokenizersBackend", None])
@pytest.mark.parametrize("begin", [True, False])
def test_other_classes_leave_begin_and_end_to_tokenizer_json(
    cls: str | None, processor: Any, begin: bool, tmp_path: Path
) -> None:
    ours = of_class(tmp_path, cls, processor, begin, True)
    assert ours.encode(HELLO) == OTHER_CLASSES["bare" if processor is BARE else "begin"]


def test_llama_classes_that_state_nothing_of_begin_and_end(tmp_path: Path) -> None:
    assert of_class(tmp_path, "LlamaTokenizerFast", BARE, None, None).encode(HELLO) == HELLO_IDS
    ours = of_class(tmp_path, "LlamaTokenizerFast", BEGIN, True, None, bos_token=None)
    assert ours.encode(HELLO) == HELLO_IDS


def chat_text(folder: Path) -> str:
    tokenizer = read_tokenizer(str(folder), "llama")
    return str(tokenizer.decode(encode_message(tokenizer, "hi")))


def test_chat_templates(tmp_path: Path) -> None:
    one = "{{ bos_token }}one: {{ messages[0].content }}"
    named = [
        {"name": "tool_use", "template": "{{ raise_exception('no') }}"},
        {"name": "default", "template": "two: {{ messages[0].content }}"},
    ]
    write(tmp_path / "one", byte_level(), chat_template=one)
    assert chat_text(tmp_path / "one") == "<s>one: hi"
    write(tmp_path / "named", byte_level(), chat_template=named)
    assert chat_text(tmp_path / "named") == "two: hi"
    for folder in ("one", "named"):
        (tmp_path / folder / "chat_template.jinja").write_text("file: {{ messages[0].content }}é")
        assert chat_text(tmp_path / folder) == "file: hié"
    write(tmp_path / "none", byte_level())
    assert not read_tokenizer(str(tmp_path / "none"), "llama").chat_template


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens", "pad_token"])
def test_special_tokens_that_only_the_configuration_names(key: str, tmp_path: Path) -> None:
    """An ordinary word of the vocabulary stays one, and others get no id of their own making."""
    right = byte_level()
    names: Any = "H" if key == "pad_token" else ["H", {"content": "[TOOL]"}, "</s>"]
    write(tmp_path, right, image_token="<image>", **{key: names})
    ours = read_tokenizer(str(tmp_path), "llama")
    assert len(ours) == right.get_vocab_size()
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")
    assert ours.pad_token == ("H" if key == "pad_token" else None)
    for text in (HELLO, "[PAD]H[TOOL]</s><image>"):
        ids = right.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids, skip_special_tokens=True) == right.decode(ids)
    assert ours.encode(HELLO)[1:] == HELLO_IDS


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_added_tokens_that_only_the_configuration_lists(key: str, tmp_path: Path) -> None:
    right = byte_level()
    size = right.get_vocab_size()
    listed = {
        str(size): {"content": "<|im_start|>", "special": True, "normalized": False},
        str(size + 1): {"content": "<think>", "special": False},
        "1": {"content": "<s>", "special": True},
    }
    write(tmp_path, right, added_tokens_decoder=listed, **{key: ["<|im_start|>"]})
    ours = read_tokenizer(str(tmp_path), "llama")
    ids = [size, *right.encode("a", add_special_tokens=False).ids, size + 1]
    assert ours.encode("<|im_start|>a<think>", add_special_tokens=False) == ids
    assert ours.decode(ids, skip_special_tokens=True) == "a<think>"


def test_special_tokens_of_older_checkpoints(tmp_path: Path) -> None:
    """They stated them in a file of their own, some of them empty in the other one."""
    write(tmp_path, byte_level(), bos_token=None, eos_token=None, unk_token="")
    roles = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    ours = read_tokenizer(str(tmp_path), "llama")
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", None)


def test_a_tokenizer_json_alone(tmp_path: Path) -> None:
    right = byte_level()
    right.save(str(tmp_path / "tokenizer.json"))
    ours = read_tokenizer(str(tmp_path), "llama")
    assert ours.encode(TEXTS[0]) == right.encode(TEXTS[0]).ids


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ('{"chat_template": 5}', "chat_template"),
        ('{"chat_template": ["x"]}', "indices"),
        ('{"added_tokens_decoder": {"9000": {"content": "<x>"}}}', "'<x>' cannot have the id 9000"),
        ('{"added_tokens_decoder": {"a": {"content": "<x>"}}}', "'a'"),
        ('{"added_tokens_decoder": {"330": {"content": 5}}}', "5 is no token"),
        ('{"pad_token": {"special": true}}', "content"),
    ],
)
def test_a_damaged_configuration(config: str, part: str, tmp_path: Path) -> None:
    write(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(InputError) as refused:
        read_tokenizer(str(tmp_path), "llama")
    message = str(refused.value)
    assert f"the tokenizer of {tmp_path} cannot be read" in message
    assert part in message
    assert "download tokenizer.json and tokenizer_config.json again" in message


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["[]", "{", '{"x": ' + "[" * 100_000, '{"x": Infinity}'])
def test_a_configuration_that_is_no_json_object(name: str, text: str, tmp_path: Path) -> None:
    write(tmp_path, byte_level())
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name} of the tokenizer of .*: download it again"):
        read_tokenizer(str(tmp_path), "llama")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the repository them/model, whose folder is `tmp_path / "model"`."""
    with running_hub(monkeypatch, tmp_path / "cache") as running:
        running.repositories["them/model"] = tmp_path / "model"
        yield running


def test_a_repository_online_and_from_its_cache(hub: Hub, tmp_path: Path) -> None:
    write(tmp_path / "model", byte_level(), tokenizer_class="LlamaTokenizer", chat_template="x")
    right = byte_level().encode(TEXTS[0]).ids
    assert read_tokenizer("them/model", "llama").encode(TEXTS[0]) == right
    hub.go_down()
    ours = read_tokenizer("them/model", "llama")
    assert (ours.encode(TEXTS[0]), ours.chat_template) == (right, "x")


def test_a_repository_without_a_tokenizer(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=r"them/model has no tokenizer.json and no"):
        read_tokenizer("them/model", "llama")
    hub.go_down()
    with pytest.raises(InputError, match=r"has no tokenizer.json"):
        read_tokenizer("them/model", "llama")


def train_sentencepiece(**options: Any) -> bytes:
    """A model as Llama 2 has, trained on our documentation."""
    folder = Path(__file__).parents[1] / "docs"
    lines = [line for page in sorted(folder.glob("*.md")) for line in page.read_text().splitlines()]
    lines += [*TEXTS, "aaaa aaa aa banana bananas    tabs\tand double  blanks"] * 9
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 1200,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.999,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **settings | options
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that lmsys/vicuna-7b-v1.5 has of its tokenizer."""
    folder = tmp_path_factory.mktemp("vicuna")
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    config = SPECIAL | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    config |= {"add_eos_token": False, "pad_token": None, "sp_model_kwargs": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_model_alone_is_converted(vicuna: Path) -> None:
    right = sentencepiece.SentencePieceProcessor(model_file=str(vicuna / "tokenizer.model"))
    ours = read_tokenizer(str(vicuna), "llama")
    assert len(ours) == right.vocab_size() == 1200
    pages = (Path(__file__).parents[1] / "docs").glob("*.md")
    lines = [line for page in pages for line in page.read_text().splitlines() if line]
    for text in [TEXTS[0], *TEXTS[2:4], "banana  bananas\n", *lines]:
        ids = right.encode(text)
        assert ours.encode(text) == [1, *ids], text
        assert ours.decode(ids) == right.decode(ids) == text
        assert stream(ours, ids) == text
    assert ours.decode([1, *right.encode("hi"), 2], skip_special_tokens=True) == "hi"


@pytest.mark.parametrize(("legacy", "blank"), [(None, True), (True, True), (False, False)])
def test_the_word_after_a_special_token(
    legacy: bool | None, blank: bool, vicuna: Path, tmp_path: Path
) -> None:
    """As transformers says of `legacy`: "Hello <s>." ends with "▁." or with "."."""
    (tmp_path / "tokenizer.model").write_bytes((vicuna / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    right = sentencepiece.SentencePieceProcessor(model_file=str(vicuna / "tokenizer.model"))
    after = right.encode(".") if blank else [right.piece_to_id(".")]
    assert after != right.encode(".") or blank
    ids = read_tokenizer(str(tmp_path), "llama").encode("Hello <s>.")
    assert ids == [1, *right.encode("Hello "), 1, *after]


def test_tokens_added_beside_a_tokenizer_model(vicuna: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((vicuna / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 1200, "<tool>": 1201}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    ours = read_tokenizer(str(tmp_path), "llama")
    assert ours.encode("[PAD]<tool>") == [1, 1200, 1201]
    assert ours.decode([1200, 1201], skip_special_tokens=True) == "<tool>"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"model_type": "unigram"}, "no BPE"),
        ({"byte_fallback": False}, "single bytes"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites"),
        ({"remove_extra_whitespaces": True}, "rewrites"),
        ({"treat_whitespace_as_suffix": True}, "end with a blank"),
    ],
)
def test_a_tokenizer_model_of_another_kind(
    options: dict[str, Any], part: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(**options))
    with pytest.raises(InputError, match=f"tokenizer.model cannot be converted: .*{part}"):
        read_tokenizer(str(tmp_path), "llama")


def test_a_damaged_tokenizer_model(vicuna: Path, tmp_path: Path) -> None:
    whole = (vicuna / "tokenizer.model").read_bytes()
    for damaged in (b"", b"\x00" * 50, b"\xff" * 50, whole[:5000], b"version https://git-lfs\n"):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(InputError, match=r"tokenizer.model .*(download it again|converted)"):
            read_tokenizer(str(tmp_path), "llama")
