"""How a turn begins after an answer; other prompts are tested with the command line."""

from pathlib import Path

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
