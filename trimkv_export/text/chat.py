"""Chat templates, rendered the way Hugging Face transformers renders them (`apply_chat_template`), with Jinja alone.

A template comes with a checkpoint, so it is code by a stranger: it runs in Jinja's sandbox and sees only plain data.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from trimkv_export.errors import OptionError, missing
from trimkv_export.words import shorten

__all__ = ["check_template", "render_chat", "require_variables"]

MOST_REASON = 200


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    **variables: Any,
) -> str:
    """The prompt for a conversation; encode it with add_special_tokens=False.

    Args:
        template: Jinja source, as in `Tokenizer.chat_template`.
        messages: each with `role`, `content` (text, None for a message that says nothing, such as a call of tools, or
            a list of parts such as {"type": "text", "text": …}) and what else the template knows.
        add_generation_prompt: end with the header of the assistant's next message.
        bos_token: what the template knows by this name; None leaves it undefined.
        eos_token: the same.
        **variables: further ones of the template: `tools`, `enable_thinking`, `pad_token`, …

    Raises:
        OptionError: the template is not valid, refuses the conversation, fails, or does more than a template needs.
    """
    given = {"tools": None, "documents": None, "bos_token": bos_token, "eos_token": eos_token, **variables}
    # As in transformers: `tools` and `documents` are always defined, a token only if the tokenizer has it.
    defined = {name: value for name, value in given.items() if value is not None or not name.endswith("_token")}
    compiled, render = _compile(template), _engine().render
    try:
        plain = {name: _plain(value) for name, value in defined.items()}
        conversation = [_with_text(_plain(message)) for message in messages]
        return str(render(compiled, conversation, {"add_generation_prompt": add_generation_prompt, **plain}))
    except Exception as error:  # whatever the expressions of a template can raise
        raise OptionError(f"the chat template failed: {_reason(error)}") from error


def check_template(template: str) -> None:
    """Refuse a template that is no valid Jinja.

    Raises:
        OptionError: it is not.
        MissingDependencyError: jinja2 is not installed.
    """
    _compile(template)


def require_variables(template: str, variables: Mapping[str, Any]) -> None:
    """Refuse variables that a template does not look at, for they would do nothing.

    Raises:
        OptionError: the template does not know one, or sets it itself; or the template is not valid.
    """
    if not variables:
        return
    try:
        known = _engine().variable_names(template)
    except Exception as error:
        raise OptionError(f"the chat template is not valid: {_reason(error)}") from error
    for name in variables:
        if name in RESERVED:
            raise OptionError(f"the chat template's variable {name!r} is set by this program; give another one")
        if name not in known:
            raise OptionError(
                f"the chat template has no variable {shorten(name)}, so it would do nothing; leave it out"
            )


# What the conversation, the tokenizer and the caller say.
RESERVED = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token"})


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text if len(text) <= MOST_REASON else text[:MOST_REASON] + '…'}"


def _engine() -> Any:
    try:
        import jinja2  # noqa: F401

        from trimkv_export.text import template
    except ImportError as error:
        raise missing("rendering a chat template", "jinja2", "runtime") from error
    return template


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    engine = _engine()
    try:
        return engine.compile_template(template)
    except Exception as error:  # Jinja's, and those of Python's compiler: recursion, memory, numbers of many digits
        raise OptionError(f"the chat template is not valid: {_reason(error)}") from error


def _with_text(message: Any) -> Any:
    """A message whose content is None has one that templates take for None, and write as nothing: not as "None"."""
    if isinstance(message, dict) and "content" in message and message["content"] is None:
        return message | {"content": _engine().NoText()}
    return message


def _plain(value: Any) -> Any:
    """A copy made of JSON types; any other object (an image, an array) becomes "<its type>", as in transformers."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return f"<{type(value).__name__}>"
