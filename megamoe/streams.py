"""A workspace belongs to one CUDA stream at a time: two calls at once would write the same memory."""

import torch

current_stream_handle = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""What torch.cuda.current_stream(device_index).cuda_stream is, without the object, which costs 1 to 2 us; None where
torch is built without CUDA. torch offers no public name for it; Triton's launcher and torch.compile's code call this
one."""


class StreamOwner:
    """Remembers the stream of the last call, and refuses another one while that may still run.

    handle: the owner's `cuda_stream`, None before the first call; a call on it needs no check.
    streams: objects with `cuda_stream` (an int) and `query()` (True when all work is done), as torch.cuda.Stream.
    Calls that are captured run later, on whatever stream their graph is replayed on: order replays like calls.
    """

    def __init__(self):
        self._owner, self.handle = None, None

    def check(self, stream, is_capturing) -> None:
        """Called before a launch on `stream`. is_capturing: whether it is, a function. RuntimeError names both streams
        and the remedy."""
        owner = self._owner
        if owner is None or owner.cuda_stream == stream.cuda_stream:
            self._take(stream)
            return
        if is_capturing():
            return
        if not owner.query():
            raise RuntimeError(
                f"stream {stream.cuda_stream:#x} calls a layer while a call on stream {owner.cuda_stream:#x} of the "
                "same workspace may still run; use one stream a workspace (a second workspace for a second stream), or "
                "hand it over with workspace.use_stream()"
            )
        self._take(stream)

    def hand_over(self, stream) -> None:
        """Make `stream` wait for the owner's work, then own the workspace."""
        if self._owner is not None and self._owner.cuda_stream != stream.cuda_stream:
            stream.wait_stream(self._owner)
        self._take(stream)

    def _take(self, stream) -> None:
        self._owner, self.handle = stream, stream.cuda_stream
