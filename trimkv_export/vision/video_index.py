"""When the frames of a video are shown: from its packets, none of which is decoded, and whether they come evenly.

What a file's header says of its frames is not used: a file that was cut without re-encoding still counts those that
were cut off, some formats count none, and a rate is an average at best.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import OptionError

__all__ = ["MOST_FRAMES", "PacketIndex", "even_rate", "read_index"]

MOST_FRAMES = 1 << 20  # of a source: 9.7 hours at 30 frames per second; 8 bytes each
# Files that went through a format of milliseconds have times that are off by half of one.
TOLERANCE = 1e-3
NTSC = 1000 / 1001


@dataclass(frozen=True, eq=False)
class PacketIndex:
    """The frames of a video stream.

    Attributes:
        count: how many there are.
        stamps: [count] int64, the presentation time of each in ticks, ascending; None where packets have none, so that
            frames can only be counted.
        seconds: [count] float64, the same from the first on; None as well.
        fps: frames per second, on average; None where nothing says it.
        even: whether each frame is where that rate puts it.
        missing: frames that an index at the file's start lists, and that are not in the file: it was cut off.
    """

    count: int
    stamps: NDArray[np.int64] | None
    seconds: NDArray[np.float64] | None
    fps: float | None
    even: bool
    missing: int


def read_index(packets: Iterable[Any], stream: Any, name: str, broken: type[Exception]) -> PacketIndex:
    """Go through the packets of a video stream.

    Args:
        packets: PyAV's, of this stream.
        stream: PyAV's.
        name: of the video, for messages.
        broken: what reading packets raises where the file is damaged; the frames up to there count.

    Raises:
        OptionError: it has more than MOST_FRAMES frames.
    """
    codec = stream.codec_context.name
    shown: list[int] = []
    decoded: list[int] = []
    count, last, moved, before = 0, (-(1 << 63), 0), 0, None
    reading = iter(packets)
    while True:
        try:
            packet = next(reading)
        except (StopIteration, broken):
            break
        if not packet.size or packet.is_discard or _is_hidden(codec, packet):
            continue
        count += 1
        if count > MOST_FRAMES:
            raise OptionError(f"{name} has more than {MOST_FRAMES:,} frames; cut it into shorter ones")
        duration = packet.duration or 0
        if packet.dts is not None:
            # Times of decoding never go back, but where recordings were joined end to end, as those of TS and MPEG are.
            if before is not None and packet.is_keyframe and packet.dts + moved < before[0]:
                moved = before[0] + (before[1] or duration) - packet.dts
            before = packet.dts + moved, duration
            decoded.append(packet.dts + moved)
        if packet.pts is not None:
            shown.append(packet.pts + moved)
            last = max(last, (packet.pts + moved, duration))
    missing, tick = _missing(stream), float(stream.time_base or 0)
    # Some formats have the times of decoding alone: in another order, but the same times from the first on.
    known = shown if len(shown) == count else decoded if len(decoded) == count else []
    said = float(stream.average_rate or stream.guessed_rate or 0) or None
    if not known or not tick:
        return PacketIndex(count, None, None, said, True, missing)
    stamps = np.sort(np.array(known, np.int64))
    seconds = (stamps - stamps[0]) * tick
    rate = even_rate(seconds, tick, said)
    if (
        rate is None and len(decoded) == count
    ):  # MPEG program streams time one frame in some, and the others are guessed
        rate = even_rate((np.array(decoded) - decoded[0]) * tick, tick, said)
    # In AVI the times of decoding pass for the others. Where recordings were joined, those of the frames start anew.
    ordered = (
        known is shown and not moved and stream.container.format.name != "avi" and bool((np.diff(stamps) > 0).all())
    )
    stamped = stamps if ordered else None
    if rate is not None or not seconds[-1]:
        return PacketIndex(count, stamped, seconds, rate, True, missing)
    # The last frame is shown for some time, too.
    gap = last[1] * tick if known is shown and last[1] > 0 else float(seconds[-1]) / (count - 1)
    return PacketIndex(count, stamped, seconds, count / (float(seconds[-1]) + gap), False, missing)


def even_rate(seconds: NDArray[np.float64] | Sequence[float], tick: float, said: float | None) -> float | None:
    """The frames per second that put all frames where they are, to a tick or a millisecond; None where none does.

    Args:
        seconds: of each frame, from the first on.
        tick: what the file counts time in, in seconds.
        said: the rate that its header says, which goes first. Then come whole numbers and those of NTSC: times that are
            rounded must not become a rate that is nearly right.
    """
    times = np.asarray(seconds, np.float64)
    if len(times) < 2 or times[-1] <= 0:
        return said
    measured = (len(times) - 1) / float(times[-1])
    whole = max(1, round(measured))
    numbers = np.arange(len(times))
    for rate in (said, float(whole), max(1, round(measured / NTSC)) * NTSC, measured):
        if rate and np.abs(times - numbers / rate).max() <= max(tick, TOLERANCE) * 1.001:
            return rate
    return None


def _missing(stream: Any) -> int:
    size = stream.container.size
    if size <= 0 or not stream.container.format.name.startswith("mov"):  # others list some frames, or none
        return 0
    return sum(entry.pos >= size for entry in stream.index_entries)


def _is_hidden(codec: str, packet: Any) -> bool:
    """Whether a packet holds only a picture that others refer to, which VP8 and VP9 never show."""
    if codec == "vp8":
        return not memoryview(packet)[0] & 0x10
    if codec == "vp9":
        content = memoryview(packet)
        first, at = content[0], 2 if content[0] & 0x30 == 0x30 else 3  # profile 3 has a bit more
        joined = content[-1] & 0xE0 == 0xC0  # several frames, the last of which is shown
        return first >> 6 == 2 and not joined and not first >> at & 1 and not first >> (at - 2) & 1
    return False
