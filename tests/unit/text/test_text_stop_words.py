"""Stop words, wherever the text is cut."""

import pytest

from trimkv_export.text.stop_words import StopFilter


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        ((), "some text", "some text"),
        (("END",), "text END more", "text "),
        (("END",), "text EN", "text EN"),
        (("aab",), "aaab", "a"),
        (("xyz", "cd"), "abcdxyz", "ab"),
        (("abc", "z"), "yabc", "y"),
    ],
)
def test_text_ends_where_a_stop_word_begins(words: tuple[str, ...], text: str, expected: str, size: int) -> None:
    stops = StopFilter(words)
    found = "".join(stops.push(text[at : at + size]) for at in range(0, len(text), size))
    found += "" if stops.stopped else stops.flush()
    assert found == expected


def test_it_holds_back_no_more_than_it_must() -> None:
    stops = StopFilter(("<end>",))
    assert [stops.push(char) for char in "a<eb"] == ["a", "", "", "<eb"]


SPECIAL = ("<|end|>", "<|start|>")


def filtered(words: tuple[str, ...], *parts: str) -> tuple[str, bool]:
    """Parts that are special tokens are written, and not shown."""
    stops = StopFilter(words)
    found = "".join(stops.push(part, shown=part not in SPECIAL) for part in parts)
    return found + stops.flush(), stops.stopped


@pytest.mark.parametrize(
    ("words", "parts", "expected"),
    [
        (("<|end|>",), ("Yes", ".", "<|end|>", "No"), ("Yes.", True)),
        ((".<|end|>",), ("Yes", ".", "<|end|>", "No"), ("Yes", True)),
        (("<|start|>user",), ("Yes", "<|start|>", "us", "er", "!"), ("Yes", True)),
        (("<|start|>user",), ("Yes", "<|start|>", "us", "age"), ("Yesusage", False)),
        (("end|>\nN",), ("Yes", "<|end|>", "\n", "No"), ("Yes", True)),
        (("<|end|><|start|>",), ("Yes", "<|end|>", "<|start|>", "No"), ("Yes", True)),
        (("sN",), ("Yes", "<|end|>", "No"), ("Ye", True)),  # what is shown has it
        (("<|end|>",), ("a <|e", "nd|> b"), ("a ", True)),  # written as ordinary text
        (("",), ("a", "b"), ("ab", False)),
    ],
)
def test_special_tokens_count_and_are_not_shown(
    words: tuple[str, ...], parts: tuple[str, ...], expected: tuple[str, bool]
) -> None:
    assert filtered(words, *parts) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_the_word_that_is_complete_first_ends_the_text(size: int) -> None:
    text = "xabcdx"
    assert filtered(("abcd", "bc"), *(text[at : at + size] for at in range(0, len(text), size))) == ("xa", True)


def test_what_it_holds_does_not_grow() -> None:
    stops = StopFilter(("<|end|>user", "abc"))
    for _ in range(1000):
        assert stops.push("ab") in ("", "ab")
        stops.push("<|end|>", shown=False)
        assert len(stops._written) < 11
        assert len(stops._held) < 11
