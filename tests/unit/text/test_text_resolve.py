"""What a folder's files say of special tokens and templates, against transformers where it can read them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

from trimkv_export.errors import OptionError, PackageError
from trimkv_export.text.resolve import TextInfo
from trimkv_export.text.tokenizer import Tokenizer

SPECIAL = ("<unk>", "<s>", "</s>", "<|end|>", "<|endoftext|>", "<|im_end|>")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
HI = [{"role": "user", "content": "Hi"}]
LLAMA = {"tokenizer_class": "LlamaTokenizerFast"}


def backend(*, begins: bool = False) -> Backend:
    """A tokenizer of 256 bytes and six special tokens; its post-processor may add <s>."""
    vocabulary = {
        token: number for number, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    made = Backend(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if begins:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


def write(folder: Path, *, begins: bool = False, **files: Any) -> Path:
    """A folder with that tokenizer and `files`: name (with _ for the last dot) -> JSON content or text."""
    backend(begins=begins).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        file = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("begins", "config", "first"),
    [
        (False, LLAMA, True),  # the class's own default
        (False, LLAMA | {"add_bos_token": True}, True),  # DeepSeek
        (True, LLAMA | {"add_bos_token": False}, False),  # Phi-3
        (False, {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, False),
        (True, {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}, True),
        (True, {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}, True),
        (False, {}, False),
    ],
)
def test_who_decides_what_begins_a_text(tmp_path: Path, begins: bool, config: dict[str, Any], first: bool) -> None:
    """As in transformers 4.57, of which the official code is."""
    tokenizer = Tokenizer.open(write(tmp_path, begins=begins, tokenizer_config_json=config | {"bos_token": "<s>"}))
    assert (tokenizer.encode("a")[0] == 1) == first
    assert (tokenizer.encode("<|end|>a", literal=True)[0] == 1) == first
    assert tokenizer.encode("a", add_special_tokens=False)[0] != 1


def test_what_ends_a_text(tmp_path: Path) -> None:
    config = LLAMA | {"add_eos_token": True, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    assert Tokenizer.open(write(tmp_path, tokenizer_config_json=config)).encode("a")[::2] == [1, 2]


@pytest.mark.parametrize(
    ("files", "bos", "eos"),
    [
        ({"special_tokens_map_json": {"bos_token": "<s>", "eos_token": {"content": "<|end|>"}}}, "<s>", "<|end|>"),
        # The map wins where tokenizer_config.json does not list the added tokens.
        (
            {"tokenizer_config_json": {"eos_token": "</s>"}, "special_tokens_map_json": {"eos_token": "<|end|>"}},
            None,
            "<|end|>",
        ),
        (
            {
                "tokenizer_config_json": {"eos_token": "</s>", "added_tokens_decoder": {}},
                "special_tokens_map_json": {"eos_token": "<|end|>"},
            },
            None,
            "</s>",
        ),
        ({"config_json": {"model_type": "llama"}}, "<s>", "</s>"),
        ({"config_json": {"model_type": "qwen3"}}, None, "<|endoftext|>"),
        ({"config_json": {"model_type": "qwen3", "tokenizer_class": "LlamaTokenizer"}}, "<s>", "</s>"),
        ({"tokenizer_config_json": LLAMA | {"eos_token": None}}, "<s>", None),
        ({"tokenizer_config_json": {"extra_special_tokens": {"image_token": "<|end|>"}}}, None, None),
    ],
)
def test_special_tokens(tmp_path: Path, files: dict[str, Any], bos: str | None, eos: str | None) -> None:
    tokenizer = Tokenizer.open(write(tmp_path, **files))
    assert (tokenizer.bos_token, tokenizer.eos_token) == (bos, eos)
    assert tokenizer.eos_ids == ({SPECIAL.index(eos)} if eos else set())


def test_special_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    config = dict(zip(("bos_token", "eos_token", "pad_token"), ("<s>", "</s>", "<|end|>"), strict=True))
    config |= {"chat_template": "{{ pad_token }}", "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = write(tmp_path, tokenizer_config_json=config)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.open(folder)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.render_chat(HI) == theirs.apply_chat_template(HI, tokenize=False) == "<|end|>"


def test_tokens_beyond_tokenizer_json(tmp_path: Path) -> None:
    """Those that tokenizer_config.json lists, or added_tokens.json where it lists none."""
    token = {"content": "<think>", "special": False, "normalized": False}
    folder = write(
        tmp_path, tokenizer_config_json={"added_tokens_decoder": {"262": token, "3": {"content": "<|end|>"}}}
    )
    theirs, ours = LlamaTokenizerFast.from_pretrained(folder), Tokenizer.open(folder)
    assert ours.encode("a<think>", add_special_tokens=False)[-1] == 262
    assert ours.vocab_size == 263
    assert theirs.convert_tokens_to_ids("<think>") == 262
    other = tmp_path / "other"
    other.mkdir()
    write(other, added_tokens_json={"<b>": 263, "<a>": 262})
    assert Tokenizer.open(other).encode("<a><b>") == [262, 263]


@pytest.mark.parametrize("sees", [False, True])
@pytest.mark.parametrize(
    ("files", "text", "seen"),
    [
        ({"tokenizer_config_json": {"chat_template": "T"}, "chat_template_json": {"chat_template": "J"}}, "T", "J"),
        ({"chat_template_jinja": "F", "chat_template_json": {"chat_template": "J"}}, "F", "J"),
        ({"chat_template_jinja": "F", "tokenizer_config_json": {"chat_template": "T"}}, "F", "F"),
        ({"tokenizer_config_json": {"chat_template": {"default": "D", "rag": "R"}}}, "D", "D"),
        ({"chat_template_json": {"chat_template": [{"name": "default", "template": "D"}]}}, "D", "D"),
        ({"tokenizer_config_json": {"chat_template": None}}, None, None),
        ({"tokenizer_config_json": {"chat_template": 5}}, None, None),
    ],
)
def test_where_the_template_is(
    tmp_path: Path, files: dict[str, Any], text: str | None, seen: str | None, sees: bool
) -> None:
    """Of models that see the processor's file comes first."""
    model = {"model_type": "llava", "vision_config": {}} if sees else {"model_type": "llama"}
    tokenizer = Tokenizer.open(write(tmp_path, config_json=model, **files))
    assert tokenizer.chat_template == (seen if sees else text)


def test_several_templates(tmp_path: Path) -> None:
    """Tools have one of their own, as in transformers."""
    folder = write(
        tmp_path, chat_template_jinja="plain", additional_chat_templates__tool_use_jinja="tools",
        additional_chat_templates__rag_jinja="rag",
    )  # fmt: skip
    ours, theirs = Tokenizer.open(folder), LlamaTokenizerFast.from_pretrained(folder)
    assert ours.chat_templates == theirs.chat_template == {"default": "plain", "tool_use": "tools", "rag": "rag"}
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        wanted = theirs.apply_chat_template(HI, tools=tools, tokenize=False)
        assert ours.render_chat(HI, tools=tools) == wanted == ("tools" if tools else "plain")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(OptionError, match="there is no chat template"):
        Tokenizer.open(folder).render_chat(HI)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"tokenizer_json": POINTER},
            "pointer of Git LFS",
        ),
        ({"chat_template_jinja": POINTER}, "pointer of Git LFS"),
        ({"tokenizer_config_json": {"chat_template": {"a/b": "x"}}}, "the chat template 'a/b' has no name"),
        ({"tokenizer_config_json": {"chat_template": "\ud800"}}, "the chat template 'default' is not valid Unicode"),
        ({"tokenizer_config_json": {"bos_token": 5}}, "bos_token must be a token's text, got 5"),
        ({"tokenizer_config_json": {"eos_token": "\udc00"}}, "eos_token is not valid Unicode"),
        ({"tokenizer_config_json": LLAMA | {"add_bos_token": "yes"}}, "add_bos_token must be true or false, got 'yes'"),
        ({"tokenizer_config_json": {"tokenizer_class": 1}}, "tokenizer_class must be a name, got 1"),
        ({"tokenizer_config_json": {"added_tokens_decoder": {"x": {}}}}, "a number as its id, got 'x'"),
        ({"tokenizer_config_json": {"added_tokens_decoder": {"1": "a"}}}, "the added token 1 must have a content"),
        ({"generation_config_json": {"eos_token_id": -1}}, "eos_token_id must be token ids, got -1; name the token"),
    ],
)
def test_what_no_tokenizer_can_have(tmp_path: Path, files: dict[str, Any], said: str) -> None:
    write(tmp_path, **files)
    for name, content in files.items():  # over the good one
        if name == "tokenizer_json":
            (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(PackageError, match=said):
        Tokenizer.open(tmp_path)


def test_what_was_resolved_wins(tmp_path: Path) -> None:
    """A package has no config.json of the checkpoint; its own says what was there."""
    folder = write(tmp_path, chat_template_jinja="F", tokenizer_config_json=LLAMA)
    info = TextInfo(
        {"eos_token": "<|end|>"}, [4, 9], add_bos_token=None, add_eos_token=None, chat_templates=["default"]
    )
    tokenizer = Tokenizer.open(folder, None, info)
    assert (tokenizer.bos_token, tokenizer.eos_ids, tokenizer.chat_template) == (None, frozenset({3, 4, 9}), "F")
    assert len(tokenizer.encode("a")) == 1
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(PackageError, match=r"chat_template\.jinja is missing; build the package again"):
        Tokenizer.open(folder, None, info)
