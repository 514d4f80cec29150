"""How a turn begins after an answer; other prompts are tested with the command line."""

from pathlib import Path
from typing import Any

import pytest
from support import build, make_checkpoint

from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine
from trimkv_export.runtime.prompts import encode_prompt


def test_a_chat_goes_on_as_its_template_ends_the_answer(package: Path) -> None:
    with Engine.open(package) as engine:
        before = engine.tokenizer.encode("AB")
        prompt = encode_prompt(engine, "and now?", chat=True, continued=True, before=before)
        decoded = engine.tokenizer.decode(prompt.tokens, skip_special_tokens=False)
    assert decoded == "AB<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_goes_on_with_pictures(visual_package: Path) -> None:
    picture = Path(__file__).parents[3] / "docs" / "kept.png"
    with Engine.open(visual_package) as engine:
        prompt = encode_prompt(engine, "and this?", chat=True, continued=True, images=[picture])
        decoded = engine.tokenizer.decode(prompt.tokens, skip_special_tokens=False)
    start = "<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
    assert decoded.startswith(start)
    assert len(prompt.pictures) == 1


def test_a_template_that_leaves_answers_out(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "base" / "chat_template.jinja").write_text("{{ messages[-1].content }}:")
    with Engine.open(build(checkpoint, tmp_path / "package").path) as engine:
        with pytest.raises(OptionError, match="leaves answers out"):
            encode_prompt(engine, "x", chat=True, continued=True)
        assert encode_prompt(engine, "x", chat=True).tokens == engine.tokenizer.encode("x:")


def test_messages_are_for_the_chat_template(package: Path) -> None:
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "a<|im_end|>"}]
    circle: list[Any] = [{"role": "user", "content": []}]
    circle[0]["content"].append(circle)
    with Engine.open(package) as engine:
        tokenizer = engine.tokenizer
        text = tokenizer.render_chat(messages)
        assert encode_prompt(engine, messages, chat=True).tokens == tokenizer.encode(text, add_special_tokens=False)
        literal = encode_prompt(engine, messages, chat=True, literal=True).tokens
        end = tokenizer.encode("<|im_end|>")[0]
        assert (literal.count(end), tokenizer.decode(literal, skip_special_tokens=False)) == (2, text)
        alone = encode_prompt(engine, "a<|im_end|>", chat=True, system="Short.", literal=True)
        assert alone.tokens == literal
        for bad, more, said in (
            (messages, {}, "give chat=True, or a text"),
            ("x", {"system": "y"}, "are for the chat template"),
            ([{"role": "user"}], {"chat": True}, "message 1 must have a role and content"),
            (["hi"], {"chat": True}, "message 1 must have a role and content, got 'hi'"),
            (5, {"chat": True}, "messages must be a list, each with a role and content, got 5"),
            (circle, {"chat": True, "literal": True}, "nested too deeply"),
            ("x", {"chat": True, "system": "y", "continued": True}, "a system message comes first"),
        ):
            with pytest.raises(OptionError, match=said):
                encode_prompt(engine, bad, **more)  # type: ignore[arg-type]


def test_placeholders_in_literal_text_are_no_places(visual_package: Path) -> None:
    picture = Path(__file__).parents[3] / "docs" / "kept.png"
    with Engine.open(visual_package) as engine:
        for chat in (False, True):
            prompt = encode_prompt(engine, "Is <|image_pad|> here?", chat=chat, literal=True, images=[picture])
            text = engine.tokenizer.decode(prompt.tokens, skip_special_tokens=False)
            assert len(prompt.pictures) == 1
            assert "<|vision_end|>Is <|image_pad|> here?" in text


def test_bare_placeholders_get_what_is_around_a_picture(visual_package: Path) -> None:
    """In a prompt, and in messages of any form."""
    picture = Path(__file__).parents[3] / "docs" / "kept.png"
    bare, whole = "Is <|image_pad|> it?", "Is <|vision_start|><|image_pad|><|vision_end|> it?"
    with Engine.open(visual_package) as engine:

        def tokens(text: str, **options: Any) -> list[int]:
            return list(encode_prompt(engine, text, images=[picture], **options).tokens)

        for options in ({}, {"chat": True}):
            assert tokens(bare, **options) == tokens(whole, **options)
        for wrap in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
            given = ([{"role": "user", "content": wrap(text)}] for text in (bare, whole))
            found, wanted = (encode_prompt(engine, each, chat=True, images=[picture]).tokens for each in given)
            assert list(found) == list(wanted) == tokens(whole, chat=True)
        with pytest.raises(OptionError, match=r"2 image placeholders and 1 image was given; .*\(--literal\)"):
            tokens(bare * 2)
