"""Text and pictures to the tokens that a session is fed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimkv_export.errors import OptionError
from trimkv_export.runtime.engine import Engine
from trimkv_export.text.chat import require_variables
from trimkv_export.text.literal import MARK
from trimkv_export.vision.image_files import ImageSource
from trimkv_export.vision.prompt import content_parts
from trimkv_export.vision.reader import PictureReader, Video, VisualPrompt
from trimkv_export.words import shorten

__all__ = ["encode_prompt"]

# Stands for the answer before: what a chat template writes after it is how the next turn begins.
ANSWER = "TRIMKV-ANSWER"


def encode_prompt(
    engine: Engine,
    text: str | Sequence[Mapping[str, Any]],
    *,
    chat: bool = False,
    system: str | None = None,
    variables: Mapping[str, Any] | None = None,
    literal: bool = False,
    images: Sequence[ImageSource] = (),
    videos: Sequence[Video] = (),
    continued: bool = False,
    before: Sequence[int] = (),
    check: Callable[[str], None] | None = None,
) -> VisualPrompt:
    """Encode a prompt and read its pictures.

    Args:
        engine: of the model.
        text: pictures come before it, unless it has their placeholders. With `chat`, it may also be whole messages,
            each with `role` and `content`; pictures have their places there then.
        chat: put it into the chat template, as the user's message.
        system: with `chat`, the text of a message of the system that comes first.
        variables: with `chat`, variables of the template, such as {"enable_thinking": False}.
        literal: special tokens that stand in the text, such as <|im_end|>, stay text; so do placeholders of pictures.
            Of messages, all but the assistant's.
        images, videos: as for `Session.prefill`.
        continued: it follows what a session has seen; with `chat`, an answer of the model that the template ends.
        before: tokens that come first: of an answer, those that were not fed.
        check: called with the whole text, once the template has written it, before it is encoded; may raise.

    Raises:
        OptionError: a bad text, picture or variable; the template refuses the conversation; or an argument that does
            not go with the others.
        EngineError: pictures without a vision tower.
    """
    tokenizer = engine.tokenizer
    counts = {"images": len(images), "videos": len(videos)}
    pictures = engine.pictures if images or videos else None
    placed = True
    if pictures is not None and not literal:
        if isinstance(text, str):
            text = pictures.enclose(text)
        elif isinstance(text, Sequence):  # else it is refused below
            text = [_enclosed(message, pictures) for message in text]
    if isinstance(text, str) and pictures is not None:
        placed = not literal and any(mark in text for mark in pictures.placeholders.values())
    if chat:
        messages = text
        if isinstance(text, str):
            # Templates of vision models may find text only in parts.
            parts = content_parts(text, **{kind: 0 if placed else count for kind, count in counts.items()})
            messages = [{"role": "user", "content": text if engine.config.vision is None else parts}]
        written = _render(engine, messages, system, variables or {}, continued=continued, literal=literal)
    else:
        if not isinstance(text, str):
            raise OptionError("messages are for the chat template; give chat=True, or a text")
        if system is not None or variables:
            raise OptionError("a system message and template variables are for the chat template; give chat=True")
        written = tokenizer.mark(text) if literal else text
        if pictures is not None and not placed:
            written = pictures.place(written, **counts)
    if check is not None:
        check(written.replace(MARK, "") if literal else written)
    # A template writes its own special tokens, but those of vision models may leave out the first, as transformers
    # takes them. A text that somebody else's template made has it already; a continued text must not start again.
    first = tokenizer.bos_token
    begun = (written.startswith(first) if first else chat) or (chat and engine.config.vision is None)
    encode = tokenizer.encode_marked if literal else tokenizer.encode
    tokens = [*before, *encode(written, add_special_tokens=not begun and not continued)]
    if not tokens:
        raise OptionError("the prompt has no tokens")
    return VisualPrompt(tokens) if pictures is None else pictures.read(tokens, images, videos)


def _enclosed(message: Any, pictures: PictureReader) -> Any:
    """A message in whose text placeholders of pictures are as the model has them."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return {**message, "content": pictures.enclose(content)}
    if not isinstance(content, list):
        return message
    parts = [
        {**part, "text": pictures.enclose(part["text"])}
        if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        else part
        for part in content
    ]
    return {**message, "content": parts}


def _render(
    engine: Engine,
    messages: Any,
    system: str | None,
    variables: Mapping[str, Any],
    *,
    continued: bool,
    literal: bool,
) -> str:
    """The chat template's text for messages; marked, with `literal`."""
    tokenizer, package, vision = engine.tokenizer, engine.package.path, engine.config.vision is not None
    template = tokenizer.template_for(variables)
    if template is None:
        names = ", ".join(tokenizer.chat_templates)
        others = f" by the name 'default', only {names}" if names else ""
        raise OptionError(f"{package}: the package has no chat template{others}; leave chat out")
    require_variables(template, variables)
    if not isinstance(messages, Sequence):
        raise OptionError(f"messages must be a list, each with a role and content, got {shorten(messages)}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise OptionError(f"message {number} must have a role and content, got {shorten(message)}")
    if system is not None:
        if continued:
            raise OptionError("a system message comes first in a conversation, and this one goes on; leave it out")
        messages = [{"role": "system", "content": content_parts(system) if vision else system}, *messages]
    if continued:
        earlier = [content_parts(part) if vision else part for part in ("…", ANSWER)]
        roles = zip(("user", "assistant"), earlier, strict=True)
        messages = [*({"role": role, "content": part} for role, part in roles), *messages]
    text = tokenizer.render_chat(messages, literal=literal, **variables)
    if not continued:
        return text
    _, found, after = text.partition(ANSWER)
    if not found:
        raise OptionError(f"{package}: its chat template leaves answers out, so a session cannot go on; leave chat out")
    return after
