"""Chat templates, rendered the way Hugging Face transformers renders them (`apply_chat_template`), with Jinja alone.

A template comes with a checkpoint, so it is code by a stranger: it runs in Jinja's sandbox and sees only plain data.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from trimkv_export.errors import OptionError, missing

__all__ = ["render_chat"]


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    **kwargs: Any,
) -> str:
    """The prompt for a conversation; encode it with add_special_tokens=False.

    Args:
        template: Jinja source, as in `Tokenizer.chat_template`.
        messages: each with `role`, `content` (text, or a list of parts such as {"type": "text", "text": …}) and what
            else the template knows.
        add_generation_prompt: end with the header of the assistant's next message.
        bos_token: the text of the tokenizer's token; None leaves the variable undefined, as transformers does.
        eos_token: the same of the token that ends a text.
        **kwargs: further variables of the template: `tools`, `enable_thinking`, `pad_token`, …

    Raises:
        OptionError: the template is not valid, refuses the conversation, or fails.
        MissingDependencyError: Jinja is not installed.
    """
    variables = {"tools": None, "documents": None, "bos_token": bos_token, "eos_token": eos_token, **kwargs}
    # As in transformers: `tools` and `documents` are always defined, a token only if the tokenizer has it.
    defined = {
        name: _plain(value) for name, value in variables.items() if value is not None or not name.endswith("_token")
    }
    compiled = _compile(template)
    conversation = [_plain(message) for message in messages]
    try:
        text: str = compiled.render(messages=conversation, add_generation_prompt=add_generation_prompt, **defined)
    except Exception as error:  # whatever the expressions of a template can raise
        raise OptionError(f"the chat template failed: {type(error).__name__}: {error}") from error
    return text


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    """A Jinja template in an environment with the extras that chat templates of the Hugging Face hub rely on."""
    try:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise missing("rendering a chat template", "jinja2", "runtime") from error

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks assistant text for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012 (the type that Jinja declares)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """`namespace()` without names that reach into Python."""

        def __init__(*args: Any, **attributes: Any) -> None:  # so that an attribute may be called "self"
            self, *rest = args
            attributes = dict(*rest, **attributes)
            for name in attributes:
                check_name(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(layout: str) -> str:
        return datetime.now().strftime(layout)

    def make_dict(*args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json  # Jinja's own escapes HTML
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=make_dict, namespace=Namespace
    )
    try:
        return environment.from_string(template)
    except jinja2.exceptions.TemplateError as error:
        raise OptionError(f"the chat template is not valid: {error}") from error


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
