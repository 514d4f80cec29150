"""Pictures of every family that sees: their places in a prompt, their tokens, and what a package cannot take."""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import picture
from PIL import Image
from seeing import FAMILIES, make_seeing_checkpoint
from support import IMAGE, VIDEO, VISION_END, VISION_START, build, copy_package, seal
from visual_prompts import by_hand

from trimkv_export.errors import OptionError, PackageError, UnsupportedModelError
from trimkv_export.runtime import Engine, Video, VisualPrompt
from trimkv_export.text.chat import render_chat
from trimkv_export.vision.images import process_image
from trimkv_export.vision.processor_config import CropProcessorConfig
from trimkv_export.vision.prompt import content_parts
from trimkv_export.vision.reader import PictureReader

PLACE = [VISION_START, IMAGE, VISION_END]


@pytest.fixture(scope="module")
def packages(visual_package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family."""
    folder = tmp_path_factory.mktemp("packages")
    found = {"qwen3_vl": visual_package}
    for family in FAMILIES:
        source = make_seeing_checkpoint(folder / f"{family}_checkpoint", family)
        found[family] = build(source, folder / family, max_image_tokens=40).path
    return found


@pytest.fixture
def timed(packages: dict[str, Path]) -> Iterator[Engine]:
    """Qwen2.5-VL: videos have seconds, a token has 28 x 28 pixels."""
    with Engine.open(packages["qwen2_5_vl"], max_sessions=2, threads=1) as engine:
        yield engine


@pytest.fixture
def square(packages: dict[str, Path]) -> Iterator[Engine]:
    """LLaVA: images of 56 x 56 pixels have 16 tokens."""
    with Engine.open(packages["llava"], max_sessions=2, threads=1) as engine:
        yield engine


def clip(frames: int, height: int, width: int, fps: float = 2.0) -> Video:
    return Video([picture(height, width, seed=seed) for seed in range(frames)], fps)


def test_placeholders(packages: dict[str, Path]) -> None:
    """The text is that of the package's tokenizer."""
    image, video = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    template = (
        "{% for part in messages[0].content %}{% if part.type == 'text' %}{{ part.text }}{% else %}"
        "<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}{% endfor %}"
    )
    for family in ("qwen3_vl", "qwen2_5_vl"):
        with Engine.open(packages[family]) as engine:
            assert engine.pictures.placeholders == {"image": "<|image_pad|>", "video": "<|video_pad|>"}
            placed = engine.pictures.place("What?", images=2, videos=1)
            assert placed == image * 2 + video + "What?"
            parts = content_parts("What?", images=2, videos=1)
            assert render_chat(template, [{"role": "user", "content": parts}]) == placed
    with Engine.open(packages["llava"]) as engine:
        assert engine.pictures.placeholders == {"image": "<|image_pad|>"}
        assert engine.pictures.place("What?", images=2) == "<|image_pad|><|image_pad|>What?"


def test_a_token_that_the_tokenizer_does_not_have(square: Engine) -> None:
    class Empty:
        def decode(self, *_: Any, **__: Any) -> str:
            return ""

    reader = PictureReader(square.package.path, square.vision_info, Empty())  # type: ignore[arg-type]
    with pytest.raises(PackageError, match=f"the tokenizer has no token {IMAGE}, which stands for a picture"):
        reader.place("x", images=1)


def test_videos_are_one_run(timed: Engine) -> None:
    read = timed.pictures.read([1, VISION_START, VIDEO, VISION_END, 2, *PLACE, 3], [picture(56, 84)], [clip(5, 56, 28)])
    # Five frames at 2 per second: four are taken, and two make a temporal patch of 2 x 1 tokens.
    assert read.tokens == [1, VISION_START, *[VIDEO] * 4, VISION_END, 2, VISION_START, *[IMAGE] * 6, VISION_END, 3]
    assert [p.grid for p in read.pictures] == [(2, 4, 2), (1, 4, 6)]
    assert read.starts == [[2, 4], [9]]
    assert read.pictures[0].second_per_grid == 2 / (4 / 5 * 2.0)
    again = timed.pictures.read(read.tokens, [picture(56, 84)], [clip(5, 56, 28)])
    assert (again.tokens, again.starts) == (read.tokens, read.starts)


def test_a_video_takes_the_time_it_lasts(timed: Engine) -> None:
    """Frames of another rate change positions alone; temporal patches are twice 2 positions a second."""
    ends = []
    for fps in (2.0, 0.5):
        with timed.session() as session:
            read = timed.pictures.read([7, VIDEO, 8], videos=[clip(8, 28, 28, fps)])
            seconds = read.pictures[0].second_per_grid
            assert isinstance(seconds, float)
            assert session.position_after(read) == 1 + int(3 * seconds * 2) + 1 + 1
            session.prefill(read)
            assert (session.next_position, session.tokens_seen) == (session.position_after(VisualPrompt([])), 6)
            ends.append(session.next_position)
    assert ends == [1 + 6 + 1 + 1, 1 + 24 + 1 + 1]


def test_images_of_one_size(square: Engine) -> None:
    """Whatever their size; side by side too, and with the prompt expanded already."""
    images = [picture(30, 90), picture(200, 100), picture(56, 56)]
    read = square.pictures.read([1, IMAGE, IMAGE, 2, IMAGE], images)
    assert read.tokens == [1, *[IMAGE] * 32, 2, *[IMAGE] * 16]
    assert read.starts == [[1], [17], [34]]
    config = CropProcessorConfig(shortest_edge=56, crop_size=56)
    for found, image in zip(read.pictures, images, strict=True):
        assert found.grid == (1, 4, 4)
        np.testing.assert_array_equal(found.patches(0, 1), process_image(image, config).pixel_values)
    assert square.pictures.read(read.tokens, images).starts == read.starts


def test_models_without_videos(square: Engine) -> None:
    said = "this model takes images, but no videos; got 1"
    with pytest.raises(OptionError, match=said):
        square.pictures.read([VIDEO], videos=[clip(2, 56, 56)])
    with pytest.raises(OptionError, match=said):
        square.pictures.place("x", videos=1)
    with square.session() as session, pytest.raises(OptionError, match=said):
        session.prefill([VIDEO], videos=[clip(2, 56, 56)])


@pytest.mark.parametrize("grid", [(1, 4, 2), (1, 8, 8), (2, 4, 4)])
def test_grids_of_another_size(square: Engine, grid: tuple[int, int, int]) -> None:
    pixels = np.zeros((int(np.prod(grid)), 588), np.float32)
    with square.session() as session:
        with pytest.raises(OptionError, match=r"takes images of 56 x 56 pixels only, 4 patches a side; got the grid"):
            session.step([IMAGE], pixels, np.array([grid]))
        session.step([IMAGE], pixels[:16].repeat(2, axis=0)[:16], np.array([[1, 4, 4]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_anywhere_saved_and_resumed(packages: dict[str, Path], family: str, tmp_path: Path) -> None:
    """Nothing is evicted, so steps of any length give the same to rounding; step takes a video's patches as seconds."""
    path = build(packages[family].with_name(f"{family}_checkpoint"), tmp_path / "roomy", budget=256, prefill_chunk=64)
    with Engine.open(path.path, max_sessions=2, threads=1) as engine:
        if family == "llava":
            read = engine.pictures.read(
                [3, IMAGE, IMAGE, 4, IMAGE, 5], [picture(56, 84, seed=seed) for seed in range(3)]
            )
        else:
            read = engine.pictures.read([3, *PLACE, 4, VIDEO, 5], [picture(56, 84)], [clip(8, 56, 84)])
            assert read.pictures[1].second_per_grid == 1.0
        whole, cut = engine.session(), engine.session()
        expected, position = whole.prefill(read), whole.next_position
        for lengths in ([1], [7, 1, 1], [20, 3], [64]):
            cut.reset()
            logits = by_hand(cut, read, lengths)[-1]
            np.testing.assert_allclose(logits, expected, atol=2e-5)
            assert (cut.next_position, cut.evictions) == (position, 0)
            assert np.array_equal(cut.kept(), whole.kept())
        whole.save(tmp_path / "file")
        cut.close()
        with engine.restore(tmp_path / "file") as restored:
            assert restored.next_position == position
            assert restored.prefill(read).tobytes() == whole.prefill(read).tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_interrupted_in_the_middle_of_a_picture(packages: dict[str, Path], family: str) -> None:
    """What was fed stays. Behind a video go the positions on; with one position a token behind its last token fed."""

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with Engine.open(packages[family], threads=1) as engine, engine.session() as session:
        if family == "llava":
            read = engine.pictures.read([3, IMAGE, IMAGE], [picture(56, 56)] * 2)
        else:
            read = engine.pictures.read([3, VIDEO], videos=[clip(8, 56, 84)])
        with pytest.raises(KeyboardInterrupt):
            session.prefill(read, progress=stop)
        assert session.tokens_seen == 16
        assert session.next_position == (16 if family == "llava" else 1 + 3 * 2 + 1)
        session.prefill(read)


def change(package: Path, target: Path, name: str, changes: dict[str, Any]) -> Path:
    """A copy of a package with another preprocessor's file, which its config.json lists."""
    copy = copy_package(package, target)
    file = copy / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))
    seal(copy, {"files": json.loads((copy / "config.json").read_text())["files"] | {name: {}}})
    return copy


def test_files_that_the_list_does_not_name_are_not_read(packages: dict[str, Path], tmp_path: Path) -> None:
    package = copy_package(packages["llava"], tmp_path / "copy")
    (package / "processor_config.json").write_text('{"patch_size": 16}')
    (package / "chat_template.json").write_text('{"chat_template": "{{ 0 }}"}')
    (package / "special_tokens_map.json").write_text('{"bos_token": "x"}')
    with Engine.open(package) as engine:
        engine.pictures.read([1])
        assert engine.tokenizer.chat_template != "{{ 0 }}"
        assert "x" not in engine.tokenizer.special_tokens.values()


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("preprocessor_config.json", {"crop_size": 84}, "preprocessor's crop_size is 84, the vision tower's 56"),
        ("processor_config.json", {"patch_size": 16}, "preprocessor's patch_size is 16, the vision tower's 14"),
        (
            "processor_config.json",
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy is 'full', the vision tower's 'default'",
        ),
    ],
)
def test_a_preprocessor_of_another_model(
    packages: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    package = change(packages["llava"], tmp_path / "copy", name, changes)
    with Engine.open(package) as engine, pytest.raises(PackageError, match=said):
        engine.pictures.read([1])


@pytest.mark.parametrize("family", FAMILIES)
def test_preprocessors_that_are_not_known(packages: dict[str, Path], tmp_path: Path, family: str) -> None:
    other = {"image_processor_type": "SiglipImageProcessor"}
    package = change(packages[family], tmp_path / "copy", "preprocessor_config.json", other)
    said = "'SiglipImageProcessor' is not supported"
    with Engine.open(package) as engine, pytest.raises(UnsupportedModelError, match=said):
        engine.pictures.read([1])


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_bad_video_processor_is_no_fault_of_images(packages: dict[str, Path], tmp_path: Path, family: str) -> None:
    other = {"video_processor_type": "OtherVideoProcessor"}
    package = change(packages[family], tmp_path / "copy", "video_preprocessor_config.json", other)
    with Engine.open(package) as engine:
        assert len(engine.pictures.read([*PLACE], [picture(56, 84)]).pictures) == 1
        with pytest.raises(UnsupportedModelError, match="'OtherVideoProcessor' is not supported"):
            engine.pictures.read([VIDEO], videos=[clip(4, 56, 84)])


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_limits_on_frames(packages: dict[str, Path], tmp_path: Path, family: str) -> None:
    """The package's, unless a run says otherwise; what is left out is said."""
    package = copy_package(packages[family], tmp_path / "copy")
    vision = json.loads((package / "config.json").read_text())["vision"]
    assert (vision["max_frames"], vision["max_image_pixels"]) == (768, 1 << 26)
    seal(package, {"vision": vision | {"max_frames": 6, "max_image_pixels": 56 * 84}})
    with Engine.open(package) as engine:
        assert engine.max_image_pixels == 56 * 84
        long = clip(40, 28, 56, 2.0)
        read = engine.pictures.read([VIDEO], videos=[long])
        assert len(read.pictures[0].pixels) == 6
        assert "6 of 40 frames are taken" in read.notes[0]
        for options, frames in (
            ({"max_frames": 10}, 10),
            ({"video_fps": 0.2}, 4),
            ({"video_fps": 0.4, "max_frames": 8}, 8),
        ):
            found = engine.pictures.read([VIDEO], videos=[Video(long.source, 2.0, **options)])
            assert len(found.pictures[0].pixels) == frames
        with pytest.raises(OptionError, match="too large: 85 x 56 pixels, and at most 4,704 are taken"):
            engine.pictures.read([IMAGE], [Image.new("RGB", (85, 56))])


def test_a_package_of_an_earlier_format_has_the_defaults(packages: dict[str, Path], tmp_path: Path) -> None:
    package = copy_package(packages["qwen3_vl"], tmp_path / "copy")
    vision = json.loads((package / "config.json").read_text())["vision"]
    del vision["max_frames"], vision["max_image_pixels"]
    seal(package, {"vision": vision, "format_version": "2.4"})
    with Engine.open(package) as engine:
        assert (engine.max_image_pixels, engine.vision_info.max_frames) == (1 << 26, 768)


def test_frames_that_do_not_come_evenly_are_positions_too(packages: dict[str, Path], timed: Engine) -> None:
    """Qwen2.5-VL: each temporal patch lies at its own second; Qwen3-VL reads it as text."""
    buffer = BytesIO()
    frames = [Image.fromarray(picture(28, 28, seed=seed)) for seed in range(6)]
    times = [500, 500, 500, 2500, 500, 500]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:], duration=times)
    video = Video(buffer.getvalue(), video_fps=100.0)
    read = timed.pictures.read([VIDEO], videos=[video])
    assert read.pictures[0].second_per_grid == pytest.approx((0.0, 1.0, 4.0))
    with timed.session() as session:
        session.prefill(read)
        assert session.next_position == 4 * 2 + 1
    with Engine.open(packages["qwen3_vl"]) as engine:
        text = engine.tokenizer.decode(engine.pictures.read([VIDEO], videos=[video]).tokens)
        assert [word in text for word in ("<0.2 seconds>", "<1.2 seconds>", "<4.2 seconds>")] == [True] * 3


@pytest.mark.parametrize("kind", ["image", "video"])
def test_memory_that_runs_out_is_said(timed: Engine, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(f"trimkv_export.vision.{kind}s.resize_image", fail)
    given: dict[str, Any] = {"images": [picture(28, 28)]} if kind == "image" else {"videos": [clip(4, 28, 28)]}
    with pytest.raises(OptionError, match="more memory than this machine has left; scale it down"):
        timed.pictures.read([IMAGE if kind == "image" else VIDEO], **given)
