"""From a request's text and image files to the tokens and pictures that a sequence is fed."""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np

from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine, Video, VisualPrompt
from trimkv_export.runtime.prompts import encode_prompt
from trimkv_export.runtime.vision_tower import EncodedPicture
from trimkv_export.serving.requests import GenerateRequest
from trimkv_export.serving.sequence import Ticket
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.vision.prompt import content_parts

__all__ = ["PromptTooLongError", "check_tokens", "held_bytes", "read_prompt"]

# A text of more characters for each token that fits is counted before it is encoded: work and memory follow the limit.
SURE = 8
# Characters that are counted at a time, and tokens that a cut may add at most to a part; they are few in truth.
PART, SLACK = 1 << 16, 64
# Tokens that become int32 at a time: other threads get their turn in between.
COPIED = 1 << 16


class PromptTooLongError(OptionError):
    """A prompt has more tokens than the model, or the server, takes."""


class _Files(Sequence[bytes]):
    """Image files that are read one after the other; before each, whether anybody still waits."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket, self._files = ticket, ticket.files or []

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        self._ticket.check()
        return self._files[index]


def check_tokens(request: GenerateRequest, vocabulary: int) -> None:
    """Raise OptionError if a request names tokens that the model does not have."""
    named = {"stop_token_ids": request.stop_token_ids, "logit_bias": map(int, request.sampling.logit_bias)}
    for name, tokens in named.items():
        for token in tokens:
            if token >= vocabulary:
                raise OptionError(f"{name} has token ids from 0 to {vocabulary - 1} for this model, got {token}")


def read_prompt(engine: Engine, ticket: Ticket, *, encode_images: bool, max_frames: int | None = None) -> VisualPrompt:
    """Encode a ticket's text and read its pictures.

    Args:
        engine: of the model.
        ticket: with its image and video files.
        max_frames: the most frames of a video that a request may ask for; None: what the package was planned for.
        encode_images: run the vision tower here, so that the engine's thread need not. ONNX Runtime allows that on a
            CPU; on a GPU the tower is fast, and may belong to the engine's thread.

    Returns:
        The prompt; its tokens are an int32 array.

    Raises:
        PromptTooLongError: no token of an answer would fit.
        OptionError: the text or a picture cannot be used.
        EngineError: there are pictures, and the model takes none.
        RequestError: the request was cancelled, or has taken too long.
    """
    request, conversation, context = ticket.request, ticket.conversation, engine.context
    before: Sequence[int] = () if conversation is None else conversation.pending
    snapshot = None if conversation is None else conversation.snapshot
    seen = len(before) + (0 if snapshot is None else snapshot.next_position)

    def check(text: str) -> None:
        if len(text) > SURE * context and (least := _count(engine.tokenizer, text, context, ticket)) >= context:
            raise _too_long(f"at least {least:,}", seen, context)

    prompt = encode_prompt(
        engine,
        _messages(request, sees=engine.config.vision is not None, continued=snapshot is not None),
        chat=request.chat,
        variables=request.template,
        literal=request.literal,
        images=_Files(ticket),
        videos=_videos(engine, ticket, max_frames),
        continued=snapshot is not None,
        before=before,
        check=check,
    )
    count = len(prompt.tokens)
    # With M-RoPE pictures have fewer positions than tokens: how many, the session says when it is fed.
    pictured = sum(picture.tokens for picture in prompt.pictures) if engine.config.model.rope.axes else 0
    if seen + (new := count - len(before) - pictured) >= context:
        raise _too_long(f"{new:,}", seen, context)
    tokens = np.empty(count, np.int32)
    for start in range(0, count, COPIED):
        tokens[start : start + COPIED] = prompt.tokens[start : start + COPIED]
    pictures: list[Any] = [*prompt.pictures]
    if encode_images and engine.vision is not None:
        for index, picture in enumerate(pictures):
            if picture.grid[0] > 1:  # the features of a video are many: its frames are encoded as they are fed
                continue
            ticket.check()
            features = engine.vision.encode(picture.patches(0, picture.grid[0]), picture.grid)
            pictures[index] = EncodedPicture(picture.grid, picture.second_per_grid, features)
    return VisualPrompt(tokens, pictures, prompt.starts)  # type: ignore[arg-type]


def _videos(engine: Engine, ticket: Ticket, max_frames: int | None) -> list[Video]:
    request, info = ticket.request, engine.config.vision
    if not ticket.videos or info is None:
        return []
    most = info.max_frames if max_frames is None else max_frames
    if (asked := request.max_frames) is not None and asked > most:
        raise OptionError(f"max_frames must be at most {most} for this model, got {asked}")
    wanted = most if asked is None else asked
    return [Video(file, None, request.video_fps, wanted, between=ticket.check) for file in ticket.videos]


def _messages(request: GenerateRequest, *, sees: bool, continued: bool) -> str | list[Mapping[str, Any]]:
    """A request's text, or its messages with the text as the last of them.

    Templates of models that see may find text in parts only, and others only plain text.
    """
    if not request.messages:
        return request.text
    messages: list[Mapping[str, Any]] = []
    left = {"image": len(request.images), "video": len(request.videos)}
    for number, message in enumerate(request.messages, 1):
        if continued and message["role"] == "system":
            raise OptionError(f"message {number} is the system's, which belongs to the first turn of a session")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        for part in parts:
            if part["type"] in left:
                left[part["type"]] -= 1
        if not sees and len(texts) < len(parts):
            raise OptionError(f"message {number} has an image or a video, and this model takes none")
        if content is not None:
            content = parts if sees else "\n".join(texts)
        messages.append({**message, "content": content})
    if request.text:
        parts = content_parts(request.text, images=max(0, left["image"]), videos=max(0, left["video"]))
        messages.append({"role": "user", "content": parts if sees else request.text})
    return messages


def held_bytes(prompt: VisualPrompt) -> int:
    """Bytes of a prompt's tokens and pictures."""
    pictures: Sequence[Any] = prompt.pictures
    return 4 * len(prompt.tokens) + sum(
        picture.features.embeds.nbytes + picture.features.deepstack.nbytes
        if isinstance(picture, EncodedPicture)
        else picture.pixels.nbytes
        for picture in pictures
    )


def _count(tokenizer: Tokenizer, text: str, most: int, ticket: Ticket) -> int:
    """How many tokens a text has at least, counted in parts until there are `most`."""
    found = 0
    for start in range(0, len(text), PART):
        ticket.check()
        found += max(0, len(tokenizer.encode(text[start : start + PART], add_special_tokens=False)) - SLACK)
        if found >= most:
            break
    return found


def _too_long(count: str, seen: int, context: int) -> PromptTooLongError:
    after = f" and follows {seen:,} of its session" if seen else ""
    return PromptTooLongError(
        f"the prompt has {count} tokens{after}, and this model takes fewer than {context:,} (max_context), so that an "
        f"answer fits; shorten it{', or begin a new session' if seen else ''}"
    )
