"""The tokenizer, chat template and configurations of a package, changed at random and sealed again.

    python tests/fuzz/fuzz_files.py --count 100000 --seed 7

Each is read, and used on a text, a conversation and a picture: it works, or is refused by one clear error. Fields are
changed in the JSON files, bytes in all of them; and templates are put together from pieces of hostile ones.
"""

import contextlib
import copy
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import VALUES, Tally, argument_parser, change
from support import build, copy_package, make_visual_checkpoint, seal

from trimkv_export.runtime import Engine, Session
from trimkv_export.runtime.prompts import encode_prompt

__all__ = ["main"]

PROCESSOR, TEMPLATE = "processor_config.json", "chat_template.jinja"
NAMES = (
    "tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", PROCESSOR, TEMPLATE, TEMPLATE,
)  # fmt: skip
TEXT = "Grüß dich, <|im_end|> 日本語 \x00 a  b"
PICTURE = np.zeros((64, 96, 3), np.uint8)
# What may stand in a tokenizer.json: parts of other kinds of tokenizers, with values that go wrong.
PARTS: tuple[Any, ...] = (
    {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": "xx"},
    {"type": "Split", "pattern": {"Regex": "(x{0,200}){0,200}"}, "behavior": "Isolated", "invert": False},
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Strip", "content": " ", "start": 10**9, "stop": 10**9},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "NFKD"},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "|", "cleanup": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "FixedLength", "length": 0},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
     "special_tokens": {"x": {"id": "x", "ids": [2**32 - 1], "tokens": ["x"]}}},
    {"type": "Sequence", "normalizers": []},
    {"type": "Sequence", "decoders": []},
    {"type": "WordPiece", "unk_token": "x", "continuing_subword_prefix": "", "max_input_chars_per_word": 2**60,
     "vocab": {"a": 0}},
    {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]], "byte_fallback": True},
    {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 7},
    {"id": 2**32 - 1, "content": "", "single_word": True, "lstrip": True, "rstrip": True, "normalized": True,
     "special": True},
)  # fmt: skip
# What templates are put together from. X stands for another expression, B for a body.
EXPRESSIONS = (
    "messages", "messages[0].content", "add_generation_prompt", "bos_token", "tools", "1", "0", "-1", "99999", "1e308",
    "10**5000", "''", "'a'", "'<' * 9999", "[]", "[X, X]", "{'a': X}", "(X, X)", "X + X", "X * X", "X ** X", "X ~ X",
    "X // X", "X % X", "'%99999d' % X", "'%(a)s' % X", "not X", "X in X", "X == X", "X < X", "X is string", "X[X]",
    "X[X:X]", "X.a", "X if X else X", "X | length", "X | tojson", "X | tojson(indent=X)", "X | list", "X | join(X)",
    "X | replace(X, X)", "X | batch(X)", "X | slice(X)", "X | sort", "X | unique | list", "X | map('upper') | list",
    "X | sum(start=X)", "X | center(X)", "X | indent(X)", "X | wordwrap(X)", "X | urlize", "X | striptags", "X | int",
    "X | float", "X | round(X)", "X | pprint", "X | format(X)", "X | xmlattr", "X | groupby(X)", "X | selectattr('a')",
    "X.format(X)", "('{:>99999}' * 9) .format(X)", "X.join(X)", "X.split(X)", "X.replace(X, X)", "X.__class__",
    "X.zfill(X)", "X.encode()", "X.items()", "X.update(X)", "X.append(X)", "range(X)", "namespace(a=X)", "dict(a=X)",
    "cycler(X)", "joiner(X)", "raise_exception(X)", "strftime_now(X)", "loop", "loop(X)", "self", "caller()", "f(X)",
)  # fmt: skip
STATEMENTS = (
    "{{ X }}", "{{ X }}", "text", "{% for x in X %}B{% endfor %}", "{% for x in X recursive %}B{% endfor %}",
    "{% if X %}B{% else %}B{% endif %}", "{% set a = X %}", "{% set a %}B{% endset %}",
    "{% macro f(x) %}B{% endmacro %}", "{% call f(X) %}B{% endcall %}", "{% filter upper %}B{% endfilter %}",
    "{% set ns = namespace(v=X) %}{% for i in range(X) %}{% set ns.v = [ns.v, ns.v] %}{% endfor %}{{ ns.v }}",
    "{% set ns = namespace(v=X) %}{% for i in range(99) %}{% set ns.v = ns.v ~ ns.v %}{% endfor %}",
    "{% generation %}B{% endgeneration %}", "{% include X %}", "{% import X as y %}", "{% break %}", "{% raw %}",
    "{# ", "{% ", "}}", "{% block b %}B{% endblock %}", "{% with a = X %}B{% endwith %}", "{% autoescape true %}",
)  # fmt: skip


def _template(random_: random.Random, depth: int = 4) -> str:
    """A random template; most are valid."""

    def expression(left: int) -> str:
        made = random_.choice(EXPRESSIONS[:16] if left <= 0 else EXPRESSIONS)
        return "".join(f"({expression(left - 1)})" if part == "X" else part for part in _cut(made, "X"))

    def body(left: int) -> str:
        made = random_.choice(STATEMENTS[:2] if left <= 0 else STATEMENTS)
        made = "".join(expression(left) if part == "X" else part for part in _cut(made, "X"))
        return "".join(body(left - 1) if part == "B" else part for part in _cut(made, "B"))

    return "".join(body(depth) for _ in range(random_.choice((1, 2, 5))))


def _cut(text: str, letter: str) -> list[str]:
    """The text in pieces, in which the letter stands alone; as a word of its own only."""
    pieces: list[str] = []
    start = 0
    for index, char in enumerate(text):
        around = text[max(0, index - 1) : index] + text[index + 1 : index + 2]
        if char == letter and not any(each.isalnum() for each in around.replace("B", "").replace("X", "")):
            pieces += [text[start:index], letter]
            start = index + 1
    return [*pieces, text[start:]]


def _add(package: Path, name: str, content: bytes) -> None:
    """Add a file to a package and its list."""
    (package / name).write_bytes(content)
    files = json.loads((package / "config.json").read_text())["files"]
    seal(package, {"files": files | {name: {}}})


def _changed(name: str, before: bytes, random_: random.Random) -> bytes:
    """New content of a file."""
    kind = random_.random()
    if kind < 0.1:
        raw = bytearray(before or b"{}")
        for _ in range(random_.choice((1, 5, 50))):
            raw[random_.randrange(len(raw))] = random_.randrange(256)
        return bytes(raw[: random_.randrange(len(raw))] if random_.random() < 0.2 else raw)
    if kind < 0.15:
        return random_.choice((b"", b"[" * 100_000, b"{}", b"[]", b"null", b"\xff\xfe", b'{"a":' * 5000, b"9" * 5000))
    if name == TEMPLATE:
        return _template(random_).encode()
    body = json.loads(before)
    if name == "tokenizer_config.json" and random_.random() < 0.7:
        body["chat_template"] = _template(random_)
    values = VALUES + (PARTS if name == "tokenizer.json" else ())
    for _ in range(random_.choice((1, 1, 2, 5))):
        if name == "tokenizer.json" and random_.random() < 0.5:
            place = random_.choice(("normalizer", "pre_tokenizer", "decoder", "post_processor", "model", "truncation"))
            parts = copy.deepcopy(random_.choices(PARTS, k=random_.choice((1, 2, 30))))
            inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}.get(place)
            body[place] = {"type": "Sequence", inner: parts} if inner and random_.random() < 0.7 else parts[0]
        else:
            change(body, random_, values)
    return json.dumps(body).encode()


def _use(engine: Engine, session: Session, random_: random.Random) -> None:
    """What a program does with these files."""
    for name in ("tokenizer", "pictures"):
        engine.__dict__.pop(name, None)
    chat, literal, seen = random_.random() < 0.6, random_.random() < 0.3, random_.random() < 0.4
    prompt = encode_prompt(engine, TEXT, chat=chat, literal=literal, images=[PICTURE] if seen else ())
    session.reset()
    tokens = list(session.generate(prompt, 3, stop=["zz"]))
    stream = engine.tokenizer.stream(after=prompt.tokens, stop=["x"])
    text = "".join(map(stream.push, [*tokens, *range(0, 263, 7)])) + stream.flush()
    if len(text) > 1_000_000:
        raise RuntimeError(f"{len(text):,} characters for {len(tokens)} tokens")
    engine.tokenizer.decode(tokens)


def main(count: int, seed: int, say: Callable[[str], object] = print) -> dict[str, int]:
    """Try `count` inputs.

    Args:
        count: inputs.
        seed: of the changes; the same seed makes the same inputs.
        say: called with a line at the end.

    Returns:
        How many inputs ended how: "runs", or the name of an error of `trimkv_export.errors`.

    Raises:
        BaseException: as `Tally.input`.
    """
    random_, tally = random.Random(seed), Tally("tokenizers and templates", seed, say)  # noqa: S311 (to be repeated)
    with tempfile.TemporaryDirectory(prefix="trimkv-fuzz-") as work, contextlib.ExitStack() as stack:
        plain = build(make_visual_checkpoint(Path(work) / "c"), Path(work) / "plain", max_image_tokens=40).path
        _add(plain, PROCESSOR, b"{}")
        other = copy_package(plain, Path(work) / "with-template")  # a file of its own goes first
        _add(other, TEMPLATE, b"")
        engines = {
            path: stack.enter_context(Engine.open(path, native="off", threads=1, context=2000))
            for path in (plain, other)
        }
        sessions = {path: engine.session() for path, engine in engines.items()}
        for index in range(count):
            name = random_.choice(NAMES)
            package = other if name == TEMPLATE else plain
            before = (package / name).read_bytes()
            try:
                content = _changed(name, before, random_)
            except RecursionError:  # deeper than Python copies and writes
                content = b'{"a":' * 5000
            (package / name).write_bytes(content)
            with tally.input(index, (name, content)):
                _use(engines[package], sessions[package], random_)
            (package / name).write_bytes(before)
    return tally.report()


if __name__ == "__main__":
    arguments = argument_parser(__doc__).parse_args()
    main(arguments.count, arguments.seed)
