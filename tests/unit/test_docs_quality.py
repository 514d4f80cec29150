"""The Python of docs/quality.md runs as it stands."""

import json
import re
from pathlib import Path

import pytest
from support import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quality.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(
    block: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "PACKAGE").symlink_to(package)
    row = {"context": "A long story. ", "prompt": "Who?", "answer": " I"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/quality.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out


def test_there_is_one() -> None:
    assert BLOCKS
