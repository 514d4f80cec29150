"""How long each frame of an animation is shown, read from the file's own tables: no frame is decoded for it.

Pillow knows most of these times only once it has decoded a frame and all those before it.
"""

import io
import struct
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

__all__ = ["frame_times"]

PNG = b"\x89PNG\r\n\x1a\n"
GIF_CONTROL, GIF_EXTENSION, GIF_IMAGE = 0xF9, 0x21, 0x2C
AVIF_BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def frame_times(file: BinaryIO, most: int) -> list[float | None]:
    """Milliseconds that each frame of an animation is shown, in order.

    Args:
        file: a GIF, APNG, WebP or AVIF file, at its start.
        most: frames that are looked at.

    Returns:
        None for a frame that has no time of its own; [] for a file of another kind. A file that is cut off has fewer.
    """
    start = file.read(12)
    if start[:6] in (b"GIF87a", b"GIF89a"):
        file.seek(6)
        return list(islice(_gif(file), most))
    if start.startswith(PNG):
        file.seek(len(PNG))
        return list(islice(_apng(file), most))
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return list(islice(_webp(file), most))
    if start[4:8] == b"ftyp":
        file.seek(0)
        return list(islice(_avif(file), most))
    return []


def _gif(file: BinaryIO) -> Iterator[float | None]:
    screen = file.read(7)
    if len(screen) < 7:
        return
    _skip_colours(file, screen[4])
    shown: float | None = None
    while kind := file.read(1):
        if kind[0] == GIF_EXTENSION:
            label = file.read(1)
            for number, block in enumerate(_gif_blocks(file)):
                if label == bytes([GIF_CONTROL]) and number == 0 and len(block) >= 3:
                    shown = 10.0 * int.from_bytes(block[1:3], "little")  # in hundredths of a second
        elif kind[0] == GIF_IMAGE:
            place = file.read(9)
            if len(place) < 9:
                return
            _skip_colours(file, place[8])
            file.read(1)
            for _ in _gif_blocks(file):
                pass
            yield shown
            shown = None
        else:  # the end, or what no reader understands
            return


def _skip_colours(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        file.seek(3 << (flags & 7) + 1, io.SEEK_CUR)


def _gif_blocks(file: BinaryIO) -> Iterator[bytes]:
    while (size := file.read(1)) and size[0]:
        yield file.read(size[0])


def _apng(file: BinaryIO) -> Iterator[float | None]:
    while len(header := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", header)
        if kind == b"fcTL" and size == 26:
            content = file.read(26)
            if len(content) < 26:
                return
            counted, a_second = struct.unpack(">HH", content[20:24])
            yield 1000.0 * counted / (a_second or 100)
            size = 0
        file.seek(size + 4, io.SEEK_CUR)


def _webp(file: BinaryIO) -> Iterator[float | None]:
    while len(header := file.read(8)) == 8:
        kind, size = struct.unpack("<4sI", header)
        if kind == b"ANMF":
            content = file.read(16)
            if len(content) < 16:
                return
            yield float(int.from_bytes(content[12:15], "little"))
            size -= 16
        file.seek(max(size, 0) + (size & 1), io.SEEK_CUR)


def _avif(file: BinaryIO) -> Iterator[float | None]:
    """The times of a sequence's first track: box by box, with those that hold others opened."""
    scale = 0
    while len(header := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", header)
        if kind in AVIF_BOXES:
            continue  # what is in it comes next
        length = 8
        if size == 1:
            length, size = 16, int.from_bytes(file.read(8), "big")
        if size < length:  # to the end of the file, or damaged
            return
        if kind == b"mdhd":
            content = file.read(min(size - length, 24))
            at = 20 if content[:1] == b"\1" else 12
            scale = int.from_bytes(content[at : at + 4], "big")
            file.seek(size - length - len(content), io.SEEK_CUR)
        elif kind == b"stts" and scale:
            for _ in range(int.from_bytes(file.read(8)[4:], "big")):
                entry = file.read(8)
                if len(entry) < 8:
                    return
                count, ticks = struct.unpack(">II", entry)
                for _ in range(count):
                    yield 1000.0 * ticks / scale
            return
        else:
            file.seek(size - length, io.SEEK_CUR)
