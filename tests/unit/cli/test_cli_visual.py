"""Pictures on the command line: run, inspect --kept and build."""

import fnmatch
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from numpy.typing import NDArray
from pictures import picture
from PIL import Image
from quiet import QUIET
from seeing import FAMILIES, make_seeing_checkpoint
from support import IMAGE, MAX_IMAGE_TOKENS, VIDEO, VISION_END, VISION_START, Cli, build, make_visual_checkpoint
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from trimkv_export.checkpoint.hub import BACKBONE_FILES
from trimkv_export.cli.plots.kept import draw_pictures
from trimkv_export.package import Package
from trimkv_export.policy import plan_slab
from trimkv_export.runtime import Engine, Video
from trimkv_export.runtime.prompts import encode_prompt
from trimkv_export.runtime.vision_tower import VisionTower
from trimkv_export.text.chat import render_chat

PLACE = [VISION_START, IMAGE, VISION_END]
PNG = b"\x89PNG\r\n\x1a\n"
FILES = {"cat.png": (64, 96), "dog.jpg": (40, 70), "large.png": (900, 1300)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 6, 2 and up to 40 tokens, a folder of 6 frames of 2 tokens, the same as an animation, and others."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in FILES.items():
        Image.fromarray(picture(*size)).save(folder / name)
    (folder / "frames").mkdir()
    frames = [Image.fromarray(picture(32, 64, seed=number)) for number in range(6)]
    for number, frame in enumerate(frames):
        frame.save(folder / "frames" / f"frame{number}.png")
    frames[0].save(folder / "clip.webp", save_all=True, append_images=frames[1:], duration=500, lossless=True)
    (folder / "broken.png").write_bytes((folder / "cat.png").read_bytes()[:300])
    (folder / "text.png").write_text("no picture\nat all")
    (folder / "empty.png").touch()
    (folder / "nothing").mkdir()
    return folder


@pytest.fixture
def seeing(visual_package: Path) -> Iterator[Engine]:
    with Engine.open(visual_package, max_sessions=2) as engine:
        yield engine


def report(cli: Cli, *arguments: str | Path, new: int = 6) -> dict[str, Any]:
    done = cli("run", *arguments, "--max-new-tokens", new, "--json")
    assert (done.code, done.err) == (0, QUIET)
    found: dict[str, Any] = json.loads(done.out)
    return found


def check(cli: Cli, engine: Engine, arguments: list[str | Path], tokens: list[int], **given: Any) -> None:
    """The command line says what the engine does with these tokens, and so many tokens were in the prompt."""
    package = engine.package.path
    read = engine.pictures.read(tokens, given.get("images", ()), given.get("videos", ()))
    with engine.session() as session:
        new = list(session.generate(tokens, 6, **given))
        found = report(cli, package, *arguments)
        assert found["text"] == engine.tokenizer.decode(new)
        assert (found["prompt_tokens"], found["new_tokens"]) == (len(read.tokens), len(new))
        assert (found["tokens_seen"], found["evictions"]) == (session.tokens_seen, session.evictions)
    done = cli("run", package, *arguments, "--max-new-tokens", "6")
    assert (done.code, done.out, done.err) == (0, found["text"] + "\n", QUIET)


def test_pictures_come_before_the_text(cli: Cli, seeing: Engine, pictures: Path) -> None:
    images = [pictures / "cat.png", pictures / "large.png"]
    tokens = [*PLACE, *PLACE, *seeing.tokenizer.encode("Which?")]
    arguments: list[str | Path] = ["--image", images[0], "--image", images[1], "--prompt", "Which?"]
    check(cli, seeing, arguments, tokens, images=images)


def test_the_prompt_says_where_pictures_are(cli: Cli, seeing: Engine, pictures: Path) -> None:
    images = [pictures / "cat.png", pictures / "dog.jpg"]
    text = "A <|vision_start|><|image_pad|><|vision_end|> and <|image_pad|>, yes"
    bare = "and <|image_pad|>,"
    tokens = seeing.tokenizer.encode(text.replace(bare, "and <|vision_start|><|image_pad|><|vision_end|>,"))
    assert tokens.count(IMAGE) == 2
    check(cli, seeing, ["--image", images[0], "--image", images[1], "--prompt", text], tokens, images=images)


@pytest.mark.parametrize("placed", [False, True])
def test_chat(cli: Cli, seeing: Engine, pictures: Path, placed: bool) -> None:
    images, videos = [pictures / "cat.png"], [Video(pictures / "frames", 2.0)]
    places = ["<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"]
    content = f"{places[1]} or {places[0]}?" if placed else "".join(places) + "What?"
    prompt = content if placed else "What?"
    template = seeing.tokenizer.chat_template
    assert template is not None
    text = render_chat(template, [{"role": "user", "content": content}], eos_token=seeing.tokenizer.eos_token)
    tokens = seeing.tokenizer.encode(text, add_special_tokens=False)
    arguments: list[str | Path] = ["--chat", "--image", images[0], "--video", pictures / "frames", "--fps", "2"]
    check(cli, seeing, [*arguments, "--prompt", prompt], tokens, images=images, videos=videos)


def test_videos(cli: Cli, seeing: Engine, pictures: Path) -> None:
    tokens = [VISION_START, VIDEO, VISION_END, *seeing.tokenizer.encode("What happens?")]
    for source, fps in (("frames", ["--fps", "2"]), ("frames", ["--fps", "4"]), ("clip.webp", [])):
        rate = float(fps[1]) if fps else None
        arguments: list[str | Path] = ["--video", pictures / source, *fps, "--prompt", "What happens?"]
        check(cli, seeing, arguments, tokens, videos=[Video(pictures / source, rate)])
    whole = report(cli, seeing.package.path, "--video", pictures / "frames", "--fps", "2", "--prompt", "x")
    file = report(cli, seeing.package.path, "--video", pictures / "clip.webp", "--prompt", "x")
    assert file["text"] == whole["text"]
    # 3 temporal patches of 2 tokens, each between two others and after its time, "<0.2 seconds>".
    assert file["prompt_tokens"] == whole["prompt_tokens"] == 3 * (13 + 2 + 2) + 1


def test_how_many_frames_are_taken(cli: Cli, seeing: Engine, pictures: Path) -> None:
    clip: list[str | Path] = ["--video", pictures / "frames", "--fps", "2", "--prompt", "What happens?"]
    tokens = [VISION_START, VIDEO, VISION_END, *seeing.tokenizer.encode("What happens?")]
    given: dict[str, Any] = {"videos": [Video(pictures / "frames", 2.0, 1.0, 8)]}
    check(cli, seeing, [*clip, "--video-fps", "1", "--max-frames", "8"], tokens, **given)
    done = cli("run", seeing.package.path, *clip, "--max-frames", "3", "--max-new-tokens", "1")
    assert done.code == 0
    assert "frames: 3 of 6 frames are taken, evenly, which is the most that max-frames allows" in done.err


def test_kept_without_a_suffix_is_that_file(cli: Cli, seeing: Engine, pictures: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    kept: list[str | Path] = ["--kept", target / "kk", "--image", pictures / "cat.png", "--prompt", "x", "--json"]
    found = json.loads(cli("inspect", seeing.package.path, *kept).out)
    assert found["picture"] == str(target / "kk")
    assert found["over_pictures"] == str(target / "kk-images")
    assert {file.name for file in target.iterdir()} == {"kk", "kk-images"}
    assert all(file.read_bytes().startswith(PNG) for file in target.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image", "broken.png"], "broken.png cannot be read as an image: image file is truncated"),
        (["--image", "text.png"], "text.png is not an image of a known format"),
        (["--image", "empty.png"], "empty.png is empty"),
        (["--image", "missing.png"], "missing.png does not exist"),
        (["--image", "nothing"], "nothing cannot be read: Is a directory"),
        (["--image", "cat.png", "--image", "broken.png"], "broken.png cannot be read as an image"),
        (["--video", "frames"], "frames has no times: say with fps how many frames it has per second"),
        (["--video", "nothing", "--fps", "2"], "nothing has no image files"),
        (["--video", "missing", "--fps", "2"], "missing does not exist"),
        (["--video", "cat.png", "--fps", "2"], "cat.png has 1 frame, and a video needs at least 2"),
        (["--video", "frames", "--fps", "0"], "fps must be a positive number, got 0.0"),
        (["--video", "frames", "--fps", "-1"], "fps must be a positive number, got -1.0"),
        (["--video", "frames", "--fps", "nan"], "fps must be a positive number, got nan"),
        (["--fps", "2"], "--fps 2 goes with --video"),
        (["--video-fps", "1.5"], "--video-fps 1.5 goes with --video"),
        (["--max-frames", "4", "--image", "cat.png"], "--max-frames 4 goes with --video"),
        (["--video", "frames", "--fps", "2", "--max-frames", "1"], "max_frames must be a whole number from 2 to 65536"),
        (["--video", "frames", "--fps", "2", "--video-fps", "0"], "video_fps must be a positive number, got 0.0"),
        (["--image", "https://example.org/cat.png"], "'https://example.org/cat.png' is a URL, and none is fetched"),
        (["--video", "https://example.org/cat.mp4"], "'https://example.org/cat.mp4' is a URL, and none is fetched"),
        (["--image", "cat.png", "--fps", "2"], "--fps 2 goes with --video"),
    ],
)
@pytest.mark.parametrize("command", ["run", "inspect"])
def test_pictures_that_cannot_be_used(
    cli: Cli, visual_package: Path, pictures: Path, tmp_path: Path, arguments: list[str], said: str, command: str
) -> None:
    paths = [pictures / part if before in ("--image", "--video") and "://" not in part else part
             for before, part in zip(["", *arguments], arguments, strict=False)]  # fmt: skip
    kept = ["--kept", tmp_path / "kept.png"] if command == "inspect" else ["--save-session", tmp_path / "session"]
    for chat in ([], ["--chat"]):
        done = cli(command, visual_package, *paths, *kept, *chat, "--prompt", "x")
        assert (done.code, done.out) == (2, "")
        assert said in done.err
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "prompt", "said"),
    [
        (0, "a <|image_pad|>", "token 2 of this step stands for an image that was not given"),
        (0, "<|video_pad|>", "token 0 of this step stands for an image that was not given"),
        (1, "<|image_pad|> <|image_pad|>", "the prompt has 2 image placeholders and 1 image was given"),
        (2, "<|image_pad|>", "the prompt has 1 image placeholder and 2 images were given"),
        (1, "<|video_pad|>", "the prompt has 0 image placeholders and 1 image was given"),
        (1, "<|image_pad|> <|video_pad|>", "the prompt has 1 video placeholder and 0 videos were given"),
        (1, "<|image_pad|>" * 5, "the prompt has 5 image placeholders and 1 image was given"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_placeholders_that_do_not_match(
    cli: Cli, visual_package: Path, pictures: Path, images: int, prompt: str, said: str, chat: bool
) -> None:
    given = ["--image", pictures / "cat.png"] * images + ["--chat"] * chat
    done = cli("run", visual_package, *given, "--prompt", prompt)
    assert (done.code, done.out) == (2, "")
    assert said.partition(" of this step")[2] in done.err if chat else said in done.err
    assert done.err.count("\n") == 1


def test_sessions_across_pictures(cli: Cli, seeing: Engine, pictures: Path, tmp_path: Path) -> None:
    file, package = tmp_path / "session", seeing.package.path
    turns: list[tuple[str, list[str]]] = [
        ("What is this?", ["cat.png"]), ("And?", []), ("These?", ["dog.jpg", "large.png"]), ("Well", [])
    ]  # fmt: skip
    texts = []
    for number, (text, names) in enumerate(turns):
        images = [part for name in names for part in ("--image", pictures / name)]
        resume: list[str | Path] = ["--session", file] if number else []
        texts.append(report(cli, package, *images, *resume, "--prompt", text, "--save-session", file))
    with seeing.session() as session:
        for (text, names), found in zip(turns, texts, strict=True):
            tokens = [*PLACE * len(names), *seeing.tokenizer.encode(text, add_special_tokens=False)]
            new = list(session.generate(tokens, 6, images=[pictures / name for name in names]))
            if len(new) == 6:
                session.step(new[-1:])
            assert found["text"] == seeing.tokenizer.decode(new)
            assert found["tokens_seen"] == session.tokens_seen
        assert session.next_position < session.tokens_seen
        with seeing.restore(file) as restored:
            assert (restored.tokens_seen, restored.next_position) == (session.tokens_seen, session.next_position)


def test_the_note_on_length_counts_positions(cli: Cli, tmp_path: Path, pictures: Path) -> None:
    """The large image has 28 tokens and more, but not half as many positions."""
    source = make_visual_checkpoint(tmp_path / "checkpoint", max_position=30)
    path = build(source, tmp_path / "package", max_image_tokens=MAX_IMAGE_TOKENS).path
    with Engine.open(path) as engine:
        read = engine.pictures.read([*PLACE, *engine.tokenizer.encode("xx")], [pictures / "large.png"])
    assert len(read.tokens) > 30
    fits = 30 - (4 + max(read.pictures[0].grid) // 2)
    run = ["run", path, "--image", pictures / "large.png", "--prompt", "xx", "--max-new-tokens"]
    assert cli(*run, fits).err == QUIET
    assert "the context of 30 tokens is full" in cli(*run, fits + 1).err
    longer = cli(*run, fits + 1, "--context", "100")
    assert "up to 31 positions, but the backbone was made for 30" in longer.err


@pytest.mark.parametrize("more", [["--image", "missing.png"], ["--video", "missing", "--fps", "2"]])
@pytest.mark.parametrize("chat", [False, True])
def test_a_package_that_does_not_see(cli: Cli, package: Path, tmp_path: Path, more: list[str], chat: bool) -> None:
    for command in (["run", package], ["inspect", package, "--kept", tmp_path / "kept.png"]):
        done = cli(*command, *more, *["--chat"] * chat, "--prompt", "x")
        assert (done.code, done.out) == (8, "")
        assert done.err == f"error: {package}: this package has no vision tower and takes no images\n"


def test_without_pillow(cli: Cli, visual_package: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    done = cli("run", visual_package, "--image", pictures / "cat.png", "--prompt", "x")
    assert (done.code, done.out) == (10, "")
    assert "pip install 'trimkv-export[vision]'" in done.err
    assert cli("run", visual_package, "--prompt", "x", "--max-new-tokens", "1").code == 0


def test_the_vision_tower_is_loaded_where_it_is_needed(
    cli: Cli, visual_package: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, plain = [], VisionTower.__init__

    def opening(self: VisionTower, *given: Any) -> None:
        opened.append(self)
        plain(self, *given)

    monkeypatch.setattr(VisionTower, "__init__", opening)
    assert cli("run", visual_package, "--prompt", "x", "--max-new-tokens", "1").code == 0
    assert not opened
    assert (
        cli("run", visual_package, "--image", pictures / "cat.png", "--prompt", "x", "--max-new-tokens", "1").code == 0
    )
    assert len(opened) == 1


def test_interrupted_while_it_looks(
    cli: Cli, visual_package: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VisionTower, "encode", interrupt)
    saved = ["--save-session", tmp_path / "session"]
    done = cli("run", visual_package, "--image", pictures / "cat.png", "--prompt", "x", *saved)
    assert (done.code, done.out, done.err.strip()) == (130, "", "interrupted")
    assert not list(tmp_path.iterdir())


def test_kept_is_drawn_over_the_pictures(cli: Cli, seeing: Engine, pictures: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept.png"
    images = ["--image", pictures / "cat.png", "--image", pictures / "large.png"]
    video: list[str | Path] = ["--video", pictures / "frames", "--fps", "2"]
    done = cli("inspect", seeing.package.path, "--kept", target, *images, *video, "--prompt", "x", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert (found["picture"], found["over_pictures"]) == (str(target), str(tmp_path / "kept-images.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept-images.png", "kept.png"]
    assert all(path.read_bytes()[:8] == PNG for path in tmp_path.iterdir())
    with Image.open(tmp_path / "kept-images.png") as drawn:
        assert drawn.width > 1000  # three columns
    with seeing.session() as session:
        read = [pictures / "cat.png", pictures / "large.png"]
        tokens = [*PLACE, *PLACE, VISION_START, VIDEO, VISION_END, *seeing.tokenizer.encode("x")]
        session.prefill(tokens, read, [Video(pictures / "frames", 2.0)])
        assert found["tokens"] == session.tokens_seen
        assert found["entries_kept"] == len(session.kept())
    text = cli("inspect", seeing.package.path, "--kept", target, *images, "--prompt", "x")
    assert "over the pictures" in text.out
    assert "over the pictures" not in cli("inspect", seeing.package.path, "--kept", target, "--prompt", "x").out


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(cli: Cli, pictures: Path, tmp_path: Path, family: str) -> None:
    """Images of one size and no videos; videos that are one run of tokens."""
    path = build(
        make_seeing_checkpoint(tmp_path / "checkpoint", family), tmp_path / "package", max_image_tokens=40
    ).path
    images = [pictures / "cat.png", pictures / "large.png"]
    given: list[str | Path] = ["--image", images[0], "--image", images[1], "--prompt", "Which?"]
    clip: list[str | Path] = ["--video", pictures / "frames", "--fps", "2"]
    place = PLACE if family == "qwen2_5_vl" else [IMAGE]
    with Engine.open(path) as engine:
        tokens = [*place, *place, *engine.tokenizer.encode("Which?")]
        check(cli, engine, given, tokens, images=images)
        written = [*given[:-1], "1 <|image_pad|> 2<|image_pad|>"]
        encode = engine.tokenizer.encode
        check(cli, engine, written, [*encode("1 "), *place, *encode(" 2"), *place], images=images)
    target = tmp_path / "kept" / "kept.png"
    target.parent.mkdir()
    done = cli("inspect", path, "--kept", target, *given, *(clip if family == "qwen2_5_vl" else []))
    assert (done.code, done.err) == (0, "")
    assert "over the pictures" in done.out
    assert len(list(target.parent.iterdir())) == 2
    shown = cli("inspect", path).out
    if family == "llava":
        done = cli("run", path, *clip, "--prompt", "x")
        assert (done.code, done.out) == (2, "")
        assert "this model takes images, but no videos; got 1" in done.err
        assert "images of 56 x 56 pixels" in shown
    else:
        assert report(cli, path, *clip, "--prompt", "x")["prompt_tokens"] == 2 + 3 * 2 + 1
        assert "images of at most 40 tokens" in shown


@pytest.mark.parametrize("written", [False, True])
def test_templates_with_and_without_the_first_token(tmp_path: Path, written: bool) -> None:
    """LLaVA's leave it to the tokenizer; it is there once either way, but not where a conversation goes on."""
    base = make_seeing_checkpoint(tmp_path / "checkpoint", "llava") / "base"
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    first = "<|endoftext|>"
    token = tokenizer.token_to_id(first)
    tokenizer.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, token)])
    tokenizer.save(str(base / "tokenizer.json"))
    file = base / "tokenizer_config.json"
    template = "{{ bos_token }}" * written + "{{ messages[0].content[0].text }}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": first, "chat_template": template}))
    path = build(tmp_path / "checkpoint", tmp_path / "package").path
    with Engine.open(path) as engine:
        letter = engine.tokenizer.encode("x", add_special_tokens=False)
        assert encode_prompt(engine, "x", chat=True).tokens == [token, *letter]
        assert encode_prompt(engine, "x", chat=False).tokens == [token, *letter]
        assert encode_prompt(engine, first + "x", chat=False).tokens == [token, *letter]
        assert encode_prompt(engine, "x", chat=False, continued=True).tokens == letter


def test_a_template_that_reads_parts_alone(pictures: Path, tmp_path: Path) -> None:
    """As LLaVA's: of a text that is no part it would write nothing."""
    base = make_seeing_checkpoint(tmp_path / "checkpoint", "llava") / "base"
    file = base / "tokenizer_config.json"
    template = (
        "{% for part in messages[0].content | selectattr('type', 'equalto', 'image') %}<|image_pad|>\n{% endfor %}"
        "{% for part in messages[0].content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}!"
    )
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    path = build(tmp_path / "checkpoint", tmp_path / "package", max_image_tokens=40).path
    image, counts = [pictures / "cat.png"], [IMAGE] * 16
    with Engine.open(path) as engine:
        encode = engine.tokenizer.encode
        assert encode_prompt(engine, "Which?", chat=True).tokens == encode("Which?!")
        assert encode_prompt(engine, "x", chat=True, images=image).tokens == [*counts, *encode("\nx!")]
        placed = encode_prompt(engine, "1<|image_pad|>2", chat=True, images=image).tokens
        assert placed == [*encode("1"), *counts, *encode("2!")]


@pytest.mark.parametrize("name", [".", "/", "missing/kept.png", "kept.unknown"])
def test_pictures_that_cannot_be_written(cli: Cli, visual_package: Path, pictures: Path, name: str) -> None:
    done = cli("inspect", visual_package, "--kept", name, "--image", pictures / "cat.png", "--prompt", "x")
    assert (done.code, done.out) == (7, "")
    assert re.search("is a folder|cannot be written", done.err)
    assert done.err.count("\n") == 1


def test_kept_patches_are_lit(seeing: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of an image kept by all heads, one of a video's second frame by one, all others by none."""
    pixels, frames = picture(64, 96), [picture(64, 64, seed=seed) for seed in range(4)]
    read = seeing.pictures.read([1, *PLACE, 2, VISION_START, VIDEO, VISION_END], [pixels], [Video(frames, 2.0)])
    cache = seeing.config.cache
    image_token, video_token = read.starts[0][0] + 5, read.starts[1][1] + 2  # row 1, column 2; row 1, column 0
    kept = [
        (stream // cache.num_kv_heads, stream % cache.num_kv_heads, image_token) for stream in range(cache.num_streams)
    ]
    kept.append((0, 1, video_token))
    shown: list[NDArray[Any]] = []
    plain = Axes.imshow

    def show(self: Axes, values: NDArray[Any], *given: Any, **more: Any) -> Any:
        shown.append(values)
        return plain(self, values, *given, **more)

    monkeypatch.setattr(Axes, "imshow", show)
    draw_pictures(np.array(sorted(kept), np.int32), cache, read, tmp_path / "kept.png")
    assert [values.shape for values in shown] == [(64, 96, 3), (64, 64, 3), (64, 64, 3)]
    light = [
        values / np.maximum(source, 1) for values, source in zip(shown, (pixels, frames[0], frames[2]), strict=True)
    ]
    means = [values.reshape(2, 32, -1, 32, 3).mean(axis=(1, 3, 4)) for values in light]
    np.testing.assert_array_equal(shown[0][32:, 64:], pixels[32:, 64:])
    assert means[0].argmax() == 5
    assert np.delete(means[0].ravel(), 5).max() < 0.13
    assert means[1].max() < 0.13
    assert means[2].argmax() == 2
    assert 0.3 < means[2].max() < 0.9
    assert np.delete(means[2].ravel(), 2).max() < 0.13


def test_many_frames_are_drawn_in_part(seeing: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = seeing.pictures.read([VIDEO], videos=[Video([picture(32, 32, seed=seed) for seed in range(60)], 2.0)])
    shown: list[NDArray[Any]] = []
    monkeypatch.setattr(Axes, "imshow", lambda _, values: shown.append(values))
    draw_pictures(np.zeros((0, 3), np.int32), seeing.config.cache, read, tmp_path / "kept.png")
    assert len(shown) == 12


def test_build(cli: Cli, visual_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    base = ["build", "--model", visual_checkpoint / "base", "--gates", visual_checkpoint / "gates", "--budget", "8"]
    path = tmp_path / "package"
    done = cli(*base, "--max-image-tokens", "12", "--output", path, "--json")
    assert (done.code, done.err) == (0, "")
    found, config = json.loads(done.out), Package.open(path).config
    assert config.vision is not None
    assert found["model_type"] == "qwen3_vl"
    assert found["weight_bytes"] == config.weight_bytes > config.vision.weight_bytes > 0
    assert found["cache_bytes"] == plan_slab(config.cache).nbytes
    assert found["package_bytes"] == sum(file.stat().st_size for file in path.iterdir() if file.name != "config.json")
    assert config.vision.max_image_tokens == 12
    with Engine.open(path) as engine:
        read = engine.pictures.read([*PLACE, 1], [pictures / "large.png"])
    assert 6 < read.pictures[0].tokens <= 12
    run = report(cli, path, "--image", pictures / "large.png", "--prompt", "x", new=1)
    assert run["prompt_tokens"] == len(read.tokens)
    text = cli(*base, "--output", tmp_path / "other")
    assert (text.code, text.err) == (0, "")
    assert "qwen3_vl, rg10 gates, fp32" in text.out
    shown = cli("inspect", path)
    assert "images of at most 12 tokens" in shown.out
    assert "4 blocks of 16" in shown.out


@pytest.mark.parametrize("value", ["0", "-3", "70000", "many", "1.5"])
def test_bad_limits(cli: Cli, visual_checkpoint: Path, tmp_path: Path, value: str) -> None:
    base = ["build", "--model", visual_checkpoint / "base", "--gates", visual_checkpoint / "gates", "--budget", "8"]
    done = cli(*base, "--max-image-tokens", value, "--output", tmp_path / "package")
    assert (done.code, done.out) == (2, "")
    assert "max-image-tokens" in done.err
    assert not list(tmp_path.iterdir())


def test_what_is_fetched_of_a_hub_repository() -> None:
    names = [
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "chat_template.json",
    ]
    for name in [*names, "model-00001-of-00002.safetensors", "config.json", "tokenizer.json"]:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in BACKBONE_FILES), name
    for name in ("pytorch_model.bin", "model.gguf", "README.md", "cat.jpeg"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in BACKBONE_FILES), name
