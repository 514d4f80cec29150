"""The prompt of a command: its text, its chat, its pictures and videos."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimkv_export.cli.console import note
from trimkv_export.cli.usage import FILE
from trimkv_export.errors import OptionError
from trimkv_export.files import decode_text, read_text
from trimkv_export.words import shorten

if TYPE_CHECKING:
    from trimkv_export.runtime import Engine, VisualPrompt

__all__ = ["Prompt", "PromptOptions", "prompt_options"]


def prompt_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `PromptOptions`."""
    options = (
        click.option("--prompt", help="The text of the prompt. Default: what comes on stdin."),
        click.option("--prompt-file", type=FILE, help="Read the prompt from a file; - is stdin."),
        click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template, as the user."),
        click.option("--system", help="With --chat: begin with this message of the system."),
        click.option(
            "--template-var",
            "template_vars",
            metavar="NAME=VALUE",
            multiple=True,
            help="With --chat: give a variable to the chat template, as JSON or else as text; repeatable.",
        ),
        click.option(
            "--no-thinking",
            is_flag=True,
            help="With --chat: the same as --template-var enable_thinking=false, for models that can think.",
        ),
        click.option(
            "--literal", is_flag=True, help="Take special tokens in the prompt, such as <|im_end|>, as ordinary text."
        ),
        click.option("--image", "images", type=FILE, multiple=True, help="Show the model a picture; repeatable."),
        click.option(
            "--video",
            "videos",
            type=FILE,
            multiple=True,
            help="Show the model a video, a file or a folder of frames; repeatable.",
        ),
        click.option(
            "--fps",
            type=float,
            help="Frames per second of the --video: a folder of frames needs it, and a file may state them wrongly.",
        ),
        click.option(
            "--video-fps",
            type=float,
            help="Take so many frames of each second of the --video. Default: as the model's processor does, mostly 2.",
        ),
        click.option(
            "--max-frames",
            type=int,
            help="Take at most so many frames of the --video, evenly. Default: as the package was planned, 768.",
        ),
        click.option(
            "--max-image-pixels",
            type=int,
            help="Refuse a picture that has more pixels in its file, and a video whose frames have more than a quarter "
            "of it. Default: as the package was planned, 67108864.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@dataclass(frozen=True)
class PromptOptions:
    """The values of `prompt_options`, by the names of a command's parameters."""

    prompt: str | None
    prompt_file: Path | None
    chat: bool
    system: str | None
    template_vars: Sequence[str]
    no_thinking: bool
    literal: bool
    images: Sequence[Path]
    videos: Sequence[Path]
    fps: float | None
    video_fps: float | None
    max_frames: int | None
    max_image_pixels: int | None

    @classmethod
    def take(cls, values: dict[str, Any]) -> "PromptOptions":
        """Take them out of the values of a command's parameters.

        Raises:
            OptionError: --fps, --video-fps or --max-frames without --video.
        """
        found = cls(**{field.name: values.pop(field.name) for field in fields(cls)})
        for name in ("fps", "video_fps", "max_frames"):
            if (value := getattr(found, name)) is not None and not found.videos:
                raise OptionError(f"--{name.replace('_', '-')} {value:g} goes with --video")
        return found

    @property
    def seeing(self) -> bool:
        """Whether there are pictures or videos."""
        return bool(self.images or self.videos)

    def read(self) -> "Prompt":
        """Read the text, from stdin where no option gives one.

        Raises:
            OptionError: there is none, or it is not UTF-8; --template-var is not NAME=VALUE; or there are options of a
                chat without --chat.
        """
        variables = _template_variables(self.template_vars, no_thinking=self.no_thinking)
        for option, value in (("--system", self.system), ("--template-var or --no-thinking", variables or None)):
            if value is not None and not self.chat:
                raise OptionError(f"{option} goes with --chat")
        return Prompt(self, _read_text(self.prompt, self.prompt_file), variables)


@dataclass(frozen=True)
class Prompt:
    """A prompt that was read.

    Attributes:
        options: how it was given.
        text: its text.
        variables: of the chat template.
    """

    options: PromptOptions
    text: str
    variables: Mapping[str, Any]

    def encode(self, engine: "Engine", *, continued: bool = False, before: Sequence[int] = ()) -> "VisualPrompt":
        """Encode it, and read its pictures: see `runtime.prompts.encode_prompt`. Their notes are printed."""
        from trimkv_export.runtime import Video
        from trimkv_export.runtime.prompts import encode_prompt

        options = self.options
        read = encode_prompt(
            engine,
            self.text,
            chat=options.chat,
            system=options.system,
            variables=self.variables,
            literal=options.literal,
            images=options.images,
            videos=[Video(video, options.fps, options.video_fps, options.max_frames) for video in options.videos],
            continued=continued,
            before=before,
        )
        for remark in read.notes:
            note(f"note: {remark}")
        return read


def _template_variables(values: Sequence[str], *, no_thinking: bool) -> dict[str, Any]:
    """The variables of --template-var and --no-thinking.

    Raises:
        OptionError: a value that is not NAME=VALUE, or a name that is given twice.
    """
    found: dict[str, Any] = {"enable_thinking": False} if no_thinking else {}
    for each in values:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier():
            raise OptionError(f"--template-var: must be NAME=VALUE, such as enable_thinking=false, got {shorten(each)}")
        if name in found:
            raise OptionError(f"--template-var: {name} is given twice, the second time as {shorten(value)}")
        try:
            found[name] = json.loads(value)
        except RecursionError:
            raise OptionError(f"--template-var: {name} is nested too deeply") from None
        except ValueError:
            found[name] = value
    return found


def _read_text(prompt: str | None, prompt_file: Path | None) -> str:
    """Return the prompt of --prompt, --prompt-file or stdin.

    A byte-order mark is left out. So is one newline at the end of stdin, which is how `echo` and a typed line end; a
    file is taken as it is.

    Raises:
        OptionError: there is none, or it is not UTF-8; the message names the option.
    """
    if prompt is not None and prompt_file is not None:
        raise OptionError("give --prompt or --prompt-file, not both")
    if prompt is not None:
        what, text = "--prompt", prompt
    elif prompt_file is not None and str(prompt_file) != "-":
        what = f"--prompt-file {prompt_file}"
        text = read_text(prompt_file, "--prompt-file")
    elif prompt_file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise OptionError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe a text in")
    else:
        what, text = "stdin", _read_stdin()
    if not text:
        raise OptionError(f"{what}: the prompt is empty")
    return text


def _read_stdin() -> str:
    if sys.stdin is None:
        raise OptionError("stdin is closed: give --prompt TEXT, or a file to --prompt-file")
    try:
        content = sys.stdin.buffer.read()
    except (OSError, ValueError) as fault:  # a folder, or a descriptor that is open for writing alone
        raise OptionError(f"stdin: cannot be read: {getattr(fault, 'strerror', None) or fault}") from None
    return re.sub(r"\r?\n\Z", "", decode_text(content, "stdin"))
