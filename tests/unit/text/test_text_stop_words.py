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
