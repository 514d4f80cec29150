"""Every variation of config.json gives the logits of transformers, or is refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from config_variations import BASES, VARIATIONS, write_variation
from support import build, random_tokens

from trimkv_export.errors import UnsupportedModelError
from trimkv_export.runtime import Engine

TOKENS = random_tokens(60, vocabulary=90)


def test_there_are_enough_of_each_family() -> None:
    assert len(VARIATIONS) >= 40
    for family in BASES:
        assert sum(row.family == family and row.refused is None for row in VARIATIONS.values()) >= 3


@pytest.mark.parametrize("name", VARIATIONS)
def test_as_transformers_or_refused(name: str, tmp_path: Path) -> None:
    row = VARIATIONS[name]
    model = write_variation(tmp_path, row)
    assert (model is None) == row.gone
    if row.refused is not None:
        with pytest.raises(UnsupportedModelError, match=f"config.json: .*{row.refused}"):
            build(tmp_path, tmp_path / "package", context=row.context)
        assert not (tmp_path / "package").exists()
        return
    build(tmp_path, tmp_path / "package", budget=64, prefill_chunk=64, context=row.context)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0, -1].numpy()
    with Engine.open(tmp_path / "package", threads=1) as engine:
        np.testing.assert_allclose(engine.session().prefill(TOKENS), expected, atol=1e-4)
