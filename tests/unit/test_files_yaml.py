"""YAML that people write: what is not plain keys and values, once each, is refused with its place."""

from pathlib import Path

import pytest

from trimkv_export.errors import OptionError
from trimkv_export.files import read_yaml


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: gpu\nkind: cpu\n", "line 2: .* the key 'kind' is there twice"),
        ("kind: gpu\naliases: [card\n", "line 3: .* expected"),
        ("aliases: !!python/object:os.system [card]\n", "could not determine a constructor"),
        ("title: 2026-13-45\n", "is not the YAML expected here"),
        ("? [a]\n: 1\n", "is not the YAML expected here"),
        ("\x00", "is not the YAML expected here"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(OptionError, match=says) as error:
        read_yaml(file)
    assert str(error.value).startswith(str(file))


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(OptionError, match="cannot be read"):
            read_yaml(path)


def test_aliases_that_stand_for_a_billion_values(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(OptionError, match=r"line 6: .* its aliases stand for more than 131,072 values"):
        read_yaml(tmp_path / "bomb.yaml")
    (tmp_path / "circle.yaml").write_text("a: &a [*a]")
    with pytest.raises(OptionError, match="an alias stands for what it is part of"):
        read_yaml(tmp_path / "circle.yaml")
    (tmp_path / "few.yaml").write_text("a: &a {x: 1}\nb:\n  <<: *a\n  y: 2\n")
    assert read_yaml(tmp_path / "few.yaml") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


def test_many_keys(tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text("\n".join(f"k{number}: 1" for number in range(3000)) + "\nk7: 2\n")
    with pytest.raises(OptionError, match=r"line 3001: .*'k7' is there twice"):
        read_yaml(tmp_path / "many.yaml")
