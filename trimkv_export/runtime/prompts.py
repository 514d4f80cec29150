"""Text and pictures to the tokens that a session is fed."""

from collections.abc import Sequence
from typing import Any

from trimkv_export.errors import OptionError
from trimkv_export.runtime.engine import Engine
from trimkv_export.text.chat import render_chat
from trimkv_export.vision.prompt import content_parts
from trimkv_export.vision.reader import ImageSource, Video, VisualPrompt

__all__ = ["encode_prompt"]

# Stands for the answer before: what a chat template writes after it is how the next turn begins.
ANSWER = "TRIMKV-ANSWER"


def encode_prompt(
    engine: Engine,
    text: str,
    *,
    chat: bool = False,
    images: Sequence[ImageSource] = (),
    videos: Sequence[Video] = (),
    continued: bool = False,
    before: Sequence[int] = (),
) -> VisualPrompt:
    """Encode a prompt and read its pictures.

    Args:
        engine: of the model.
        text: pictures come before it, unless it has their placeholders.
        chat: put it into the chat template, as the user's message.
        images, videos: as for `Session.prefill`.
        continued: it follows what a session has seen; with `chat`, an answer of the model that the template ends.
        before: tokens that come first: of an answer, those that were not fed.

    Raises:
        OptionError: the text or a picture cannot be used.
        EngineError: there are pictures, and the package has no vision tower.
    """
    tokenizer = engine.tokenizer
    counts = {"images": len(images), "videos": len(videos)}
    pictures = engine.pictures if images or videos else None
    placed = pictures is None or any(mark in text for mark in pictures.placeholders.values())
    if chat:
        # Templates of vision models may find text only in parts.
        parts = content_parts(text, **{kind: 0 if placed else count for kind, count in counts.items()})
        text = _render(engine, text if engine.config.vision is None else parts, continued=continued)
    elif pictures is not None and not placed:
        text = pictures.place(text, **counts)
    # A template writes its own special tokens, but those of vision models may leave out the first, as transformers
    # takes them. A text that somebody else's template made has it already; a continued text must not start again.
    first = tokenizer.bos_token
    begun = (text.startswith(first) if first else chat) or (chat and engine.config.vision is None)
    tokens = [*before, *tokenizer.encode(text, add_special_tokens=not begun and not continued)]
    if not tokens:
        raise OptionError("the prompt has no tokens")
    return VisualPrompt(tokens) if pictures is None else pictures.read(tokens, images, videos)


def _render(engine: Engine, content: Any, *, continued: bool) -> str:
    """The chat template's text for a message of the user."""
    tokenizer, package = engine.tokenizer, engine.package.path
    if tokenizer.chat_template is None:
        raise OptionError(f"{package}: the package has no chat template; leave chat out")
    messages = [{"role": "user", "content": content}]
    if continued:
        vision = engine.config.vision is not None
        earlier = [content_parts(part) if vision else part for part in ("…", ANSWER)]
        roles = zip(("user", "assistant"), earlier, strict=True)
        messages = [*({"role": role, "content": part} for role, part in roles), *messages]
    text = render_chat(tokenizer.chat_template, messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    if not continued:
        return text
    _, found, after = text.partition(ANSWER)
    if not found:
        raise OptionError(f"{package}: its chat template leaves answers out, so a session cannot go on; leave chat out")
    return after
