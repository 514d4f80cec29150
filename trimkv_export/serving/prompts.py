"""A request's text and images to the tokens that its row is fed."""

from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine, VisualPrompt
from trimkv_export.runtime.chat import render_chat
from trimkv_export.runtime.visual_prompt import IMAGE_PAD, content_parts, place_visuals
from trimkv_export.serving.conversations import Conversation
from trimkv_export.serving.requests import GenerateRequest

__all__ = ["read_prompt"]

# Stands for the answer before: what the chat template writes after it is how the next turn begins.
ANSWER = "TRIMKV-ANSWER"


def read_prompt(engine: Engine, request: GenerateRequest, conversation: Conversation | None) -> VisualPrompt:
    """Encode a request, and read its images. Raises OptionError, and EngineError for images without a vision tower.

    Images come before the text, unless the text has their placeholders. In a conversation's later turns the tokens of
    the answer that were not fed come first, and a chat template gives what it writes between an answer and the next.
    """
    tokenizer, images = engine.tokenizer, len(request.images)
    continued = conversation is not None and conversation.snapshot is not None
    text, placed = request.text, not images or IMAGE_PAD in request.text
    if request.chat:
        text = _chat(engine, content_parts(text, images=images) if not placed else text, continued=continued)
    elif not placed:
        text = place_visuals(text, images=images)
    # A template writes its own special tokens; a continued text must not start again.
    tokens = tokenizer.encode(text, add_special_tokens=not request.chat and not continued)
    if conversation is not None:
        tokens = [*conversation.pending, *tokens]
    if not tokens:
        raise OptionError("text_input has no tokens")
    return engine.pictures.read(tokens, request.images) if images else VisualPrompt(tokens)


def _chat(engine: Engine, content: str | list[dict[str, str]], *, continued: bool) -> str:
    tokenizer = engine.tokenizer
    if tokenizer.chat_template is None:
        raise OptionError("chat: this model has no chat template; send the whole prompt as text_input")
    messages: list[dict[str, object]] = [{"role": "user", "content": content}]
    if continued:
        messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": ANSWER}, *messages]
    text = render_chat(tokenizer.chat_template, messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    if not continued:
        return text
    _, found, after = text.partition(ANSWER)
    if not found:
        raise OptionError("chat: this model's chat template leaves answers out, so that a session cannot go on with it")
    return after
