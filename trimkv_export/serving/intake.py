"""Requests on their way to the queue: read by threads of their own, so that neither the server nor the engine waits.

Short texts have a thread to themselves. Another looks at the headers of all images and reads the small ones. What is
large goes to further threads, by how long it has waited and how long it will take: a request that is large for no good
reason does not hold up those that came after it.
"""

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable

from trimkv_export.errors import OptionError
from trimkv_export.serving.options import ServingOptions
from trimkv_export.serving.requests import media_file
from trimkv_export.serving.sequence import Ticket
from trimkv_export.vision.image_files import MOST_IMAGE_PIXELS, describe, explained, open_file
from trimkv_export.vision.video_files import open_video

__all__ = ["Intake", "image_header"]

TEXT, PICTURES, LARGE = "text", "pictures", "large"
# What is small: about 50 ms at most.
SMALL_TEXT, SMALL_FILES, SMALL_PIXELS = 1 << 15, 1 << 22, 1 << 21
# Seconds that reading takes, roughly: it only decides who comes first.
SECONDS_PER_BYTE, SECONDS_PER_PIXEL = 1e-6, 3e-8
# Of two large requests the later goes first if it came at most so many times what they differ in cost after the other.
PATIENCE = 5.0


# Their decoders keep all other threads of Python waiting, for 2.5 ns a pixel; so they may have fewer.
HOLDING, HOLDING_SHARE = ("AVIF", "HEIF", "WEBP"), 4


def image_header(file: bytes) -> tuple[str, int, int]:
    """(format, width, height) that an image file's header says; nothing is decoded. Raises OptionError."""
    with explained(describe(file)), open_file(file, MOST_IMAGE_PIXELS) as opened:
        return str(opened.format), int(opened.width), int(opened.height)


class Intake:
    """Tickets that were not read yet, and the threads that read them. Safe for use by several threads.

    A ticket waits here, is being read, or is gone.
    """

    def __init__(
        self, options: ServingOptions, read: Callable[[Ticket], None], fail: Callable[[Ticket, BaseException], None]
    ) -> None:
        """Start the threads.

        Args:
            options: the limits of images, and how many threads read what is large.
            read: makes a ticket's prompt and puts it into the queue. Called by these threads.
            fail: answers a ticket whose request cannot be read with an error.
        """
        self._options, self._read, self._fail = options, read, fail
        self._lanes: dict[str, deque[Ticket]] = {TEXT: deque(), PICTURES: deque()}
        self._large: list[tuple[float, int, Ticket]] = []
        self._numbers = itertools.count()
        self._reading = 0
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"trimkv-read-{lane}", daemon=True)
            for lane in (TEXT, PICTURES, *[LARGE] * options.reader_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        """Tickets here, those that are being read included."""
        return sum(map(len, self._lanes.values())) + len(self._large) + self._reading

    def add(self, ticket: Ticket) -> None:
        """Have a ticket read."""
        files = sum(map(len, (*ticket.request.images, *ticket.request.videos)))
        with self._changed:
            if ticket.text_size > SMALL_TEXT or files > SMALL_FILES:
                self._push(ticket, (ticket.text_size + files) * SECONDS_PER_BYTE)
            else:
                self._lanes[PICTURES if files else TEXT].append(ticket)
            self._changed.notify_all()

    def waiting(self) -> list[Ticket]:
        """Tickets that nobody reads yet."""
        with self._changed:
            return [*itertools.chain(*self._lanes.values()), *(ticket for _, _, ticket in self._large)]

    def discard(self, ticket: Ticket) -> bool:
        """Take back a ticket that nobody reads yet; False if it is too late for that."""
        with self._changed:
            for lane in self._lanes.values():
                if ticket in lane:
                    lane.remove(ticket)
                    return True
            left = [entry for entry in self._large if entry[2] is not ticket]
            found = len(left) < len(self._large)
            self._large[:] = left
            heapq.heapify(self._large)
            return found

    def close(self) -> list[Ticket]:
        """Read no more -> the tickets that were not read. What is being read ends by itself."""
        with self._changed:
            left = self.waiting()
            self._closed = True
            self._large.clear()
            for lane in self._lanes.values():
                lane.clear()
            self._changed.notify_all()
            return left

    def join(self) -> None:
        """Wait for the threads to end, after `close`."""
        for thread in self._threads:
            thread.join()

    def _push(self, ticket: Ticket, cost: float) -> None:
        heapq.heappush(self._large, (ticket.arrival + PATIENCE * cost, next(self._numbers), ticket))

    def _run(self, lane: str) -> None:
        while (ticket := self._next(lane)) is not None:
            try:
                pictures = ticket.request.images or ticket.request.videos
                if not (pictures and ticket.files is None and self._passed_on(ticket, lane)):
                    self._read(ticket)
            except BaseException as error:  # no request may end this thread
                self._fail(ticket, error)
            finally:
                with self._changed:
                    self._reading -= 1

    def _next(self, lane: str) -> Ticket | None:
        waiting = self._large if lane == LARGE else self._lanes[lane]
        with self._changed:
            while not waiting:
                if self._closed:
                    return None
                self._changed.wait()
            self._reading += 1
            return heapq.heappop(self._large)[2] if lane == LARGE else self._lanes[lane].popleft()

    def _passed_on(self, ticket: Ticket, lane: str) -> bool:
        """Look at a ticket's pictures; whether it goes to those who read what is large, or back to its place there."""
        pixels = self._check_videos(ticket) + self._check_images(ticket)
        if lane != LARGE and pixels <= SMALL_PIXELS:
            return False
        with self._changed:
            if not self._closed:
                self._push(ticket, ticket.text_size * SECONDS_PER_BYTE + pixels * SECONDS_PER_PIXEL)
                self._changed.notify_all()
            return not self._closed

    def _check_videos(self, ticket: Ticket) -> int:
        """As `_check_images`, of videos: their packets are counted, and none is decoded -> pixels of all frames.

        Raises:
            OptionError: a file is none, or is too large.
        """
        files, total, options = [], 0, self._options
        for index, raw in enumerate(ticket.request.videos, 1):
            ticket.check()
            file = media_file("video", index, raw, options.max_video_bytes)
            total += open_video(file, options.max_image_pixels).pixels
            files.append(file)
        if total > options.max_video_pixels:
            raise OptionError(
                f"the frames of the videos have {total:,} pixels together, and this model takes at most "
                f"{options.max_video_pixels:,} (max_video_pixels); send a shorter or a smaller video"
            )
        ticket.videos = files
        return total

    def _check_images(self, ticket: Ticket) -> int:
        """Decode what images were sent as, and look at the headers of the files -> pixels of all.

        Raises:
            OptionError: a file is none, or is too large.
        """
        files, total, options = [], 0, self._options
        for index, raw in enumerate(ticket.request.images, 1):
            ticket.check()
            file = media_file("image", index, raw, options.max_image_bytes)
            kind, width, height = image_header(file)
            most = options.max_image_pixels // (HOLDING_SHARE if kind in HOLDING else 1)
            if width * height > most:
                raise OptionError(
                    f"image {index} has {width} x {height} pixels, and this model takes at most {most:,} of a {kind} "
                    "(max_image_pixels); send a smaller one"
                )
            total += width * height
            files.append(file)
        if total > options.max_total_pixels:
            raise OptionError(
                f"the images have {total:,} pixels together, and this model takes at most "
                f"{options.max_total_pixels:,} (max_total_pixels); send fewer, or smaller ones"
            )
        ticket.files = files
        return total
