import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimkv_export.plan.lifetimes import Lifetime, peak, spans


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    spans = draw(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 30), st.integers(0, 30)), max_size=40))
    return [Lifetime(f"t{i}", size, min(a, b), max(a, b)) for i, (size, a, b) in enumerate(spans)]


def alive_at(tensors: list[Lifetime], step: int) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor.first <= step <= tensor.last)


@given(lifetimes())
def test_the_peak_is_that_of_a_count_step_by_step(tensors: list[Lifetime]) -> None:
    found = peak(tensors)
    live = [alive_at(tensors, step) for step in range(32)]
    assert found.nbytes == max(live)
    if found.nbytes:
        assert live.index(found.nbytes) == found.step
    assert sum(tensor.nbytes for tensor in found.tensors) == found.nbytes
    assert list(found.tensors) == sorted(found.tensors, key=lambda tensor: -tensor.nbytes)
    assert all(tensor.first <= found.step <= tensor.last for tensor in found.tensors)


def decoder_steps(layers: int, width: int, inner: int) -> tuple[list[tuple[list[str], list[str]]], dict[str, int]]:
    """A pre-norm decoder as steps; keys and values stay until the cache is updated at the end, as in our graph."""
    steps: list[tuple[list[str], list[str]]] = [(["ids"], ["h0"])]
    sizes = {"h0": width}
    for i in range(layers):
        for read, made, size in (
            ([f"h{2 * i}"], f"norm{i}", width),
            ([f"norm{i}"], f"q{i}", 2 * width),
            ([f"norm{i}"], f"k{i}", width // 4),
            ([f"norm{i}"], f"v{i}", width // 4),
            ([f"norm{i}"], f"beta{i}", 32),
            ([f"q{i}", f"k{i}", f"v{i}"], f"attended{i}", 2 * width),
            ([f"h{2 * i}", f"attended{i}"], f"h{2 * i + 1}", width),
            ([f"h{2 * i + 1}"], f"norm_{i}", width),
            ([f"norm_{i}"], f"gate{i}", inner),
            ([f"norm_{i}"], f"up{i}", inner),
            ([f"gate{i}", f"up{i}"], f"product{i}", inner),
            ([f"h{2 * i + 1}", f"product{i}"], f"h{2 * i + 2}", width),
        ):
            steps.append((read, [made]))
            sizes[made] = size
    parts = [f"{part}{i}" for i in range(layers) for part in ("k", "v", "beta")]
    steps.append((parts, ["state"]))  # in place: no size
    steps.append(([f"h{2 * layers}"], ["logits"]))
    return steps, sizes | {"logits": 600_000}


def test_a_decoder() -> None:
    steps, sizes = decoder_steps(36, 256 * 2560 * 2, 256 * 9728 * 2)
    found_spans = spans(steps, kept=["logits"])
    tensors = [Lifetime(name, nbytes, *found_spans[name]) for name, nbytes in sizes.items()]
    found = peak(tensors)
    # In the last layer's MLP every layer's keys and values are waiting, and the residual.
    assert {tensor.name for tensor in found.tensors} >= {"gate35", "up35", "product35", "h71", "k0", "v35"}


def test_spans_of_steps() -> None:
    steps = [(["x"], ["a", "unused"]), (["a"], ["b"]), (["a", "b", "w"], ["c"]), (["c"], ["d"])]
    assert spans(steps, kept=["b", "elsewhere"]) == {
        "x": (0, 0), "w": (0, 2), "a": (0, 2), "unused": (0, 0), "b": (1, 3), "c": (2, 3), "d": (3, 3),
    }  # fmt: skip
    with pytest.raises(ValueError, match="step 1 makes 'a'"):
        spans([([], ["a"]), ([], ["a"])])
    with pytest.raises(ValueError, match="step 0 makes 'a'"):
        spans([(["a"], ["a"])])


def test_nothing() -> None:
    assert (peak([]).nbytes, peak([]).tensors) == (0, ())
    empty = [Lifetime("a", 0, 0, 3), Lifetime("b", 0, 1, 2)]
    assert peak(empty).tensors == ()
