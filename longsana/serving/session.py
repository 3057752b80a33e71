"""A session: one video that is made while somebody watches it, and steers it."""

from __future__ import annotations

from collections.abc import Callable

from longsana.serving.values import Chunk, End


class Session:
    """A live video. Any thread may call any method; none but `take` and `snapshot` waits for the worker or a disk.

    What was made and not yet taken is never binding: a change of prompt, a rewind or a fork counts from the last chunk
    that was taken, and what comes after that is made again. Then the session gives, to the bit, the pictures of one
    that was told the same from the start.

    id: 32 random hex digits. height, width, fps: of the video. started: when it was ordered (`time.monotonic`).
    """

    id: str
    height: int
    width: int
    fps: float
    started: float

    @property
    def position(self) -> int:
        """The place in the queue, from 1; 0 once the session has a place of its own, or has ended."""
        raise NotImplementedError

    @property
    def state(self) -> str:
        """See `SessionFigures`."""
        raise NotImplementedError

    @property
    def init(self) -> bytes:
        """The init segment of the mp4, from the start on; b"" of pixels."""
        raise NotImplementedError

    @property
    def mime(self) -> str:
        """The media's type, as in 'video/mp4; codecs="avc1.42c00b"'; "" of pixels."""
        raise NotImplementedError

    def take(self, timeout: float | None = 0.0) -> Chunk | End | None:
        """Take the next piece, if it is there and due.

        timeout: seconds to wait for one; None waits for ever. Returns None if nothing came; the end again and again.
        """
        raise NotImplementedError

    @property
    def due(self) -> float | None:
        """Seconds until the piece that is ready may be taken: 0 if it may be now; None if none is ready.

        A pace is kept by the clock, of which nobody is woken: after `take` gave None, wait for this long or for a call
        of `on_ready`'s, whichever is sooner.
        """
        raise NotImplementedError

    def on_ready(self, callback: Callable[[], object] | None) -> None:
        """Have a function called, from any thread, whenever `take`, `due`, `position` or `state` may say something new.

        It is called at once, too, must return quickly and not call the session; in asyncio it is
        `lambda: loop.call_soon_threadsafe(event.set)`. None: nobody.
        """
        raise NotImplementedError

    def change(
        self, prompt: str, event_id: str = "", policy: str | None = None, transition_chunks: int | None = None
    ) -> str:
        """Change the prompt with the next chunk that is taken; returns the event's id, made here if it is "".

        prompt: a text that may begin with what becomes of the past, as in `[cut] a lighthouse`.
        policy: keep, recache=K, rebuild=W or cut, where the text does not say it; None: the session's own.
        transition_chunks: over which one caption becomes the other; None: the session's own.

        Raises:
            InputError: one of them is none, the policy reaches farther back than `Limits.kept`, too many changes wait,
                or the session has ended.
        """
        raise NotImplementedError

    def pause(self) -> None:
        """Stop making chunks, and media time; what is ready is not given out until `resume`."""
        raise NotImplementedError

    def resume(self) -> None:
        """Go on after `pause`; nothing in the pictures tells of it."""
        raise NotImplementedError

    def snapshot(self) -> str:
        """Save the state after the last chunk that was taken; returns its id. Waits for the disk.

        Raises:
            InputError: the studio has no folder of snapshots, or nothing was taken yet.
            OSError: the disk is full, or failed; the session goes on.
        """
        raise NotImplementedError

    def fork(self) -> Session:
        """Begin a session that goes on from the last chunk that was taken as this one would; states are shared.

        Its pieces count from 0, its events are its own, and it waits in the queue if there is no place.

        Raises:
            Full: see `Studio.start`.
            InputError: the session has ended by failure or `close`.
        """
        raise NotImplementedError

    def rewind(self, chunks: int) -> None:
        """Go back by so many of the chunks that were taken; the next one that is taken follows the one before them.

        Its number in the video falls, presentation time goes on. The prompt is again what it was there.

        Raises:
            InputError: fewer are kept; the message says how many.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End the session, whatever it is doing; its memory is free when this returns, or when its chunk in progress
        has been dropped. Closing again does nothing."""
        raise NotImplementedError
