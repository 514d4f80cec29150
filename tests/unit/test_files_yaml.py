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
