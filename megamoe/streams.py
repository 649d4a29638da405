"""A workspace belongs to one CUDA stream at a time: two calls at once would write the same memory."""


class StreamOwner:
    """Remembers the stream of the last call, and refuses another one while that may still run.

    streams: objects with `cuda_stream` (an int) and `query()` (True when all work is done), as torch.cuda.Stream.
    Calls that are captured run later, on whatever stream their graph is replayed on: order replays like calls.
    """

    def __init__(self):
        self._owner = None

    def check(self, stream, is_capturing) -> None:
        """Called before a launch on `stream`. is_capturing: whether it is, a function. RuntimeError names both streams
        and the remedy."""
        owner = self._owner
        if owner is None or owner.cuda_stream == stream.cuda_stream:
            self._owner = stream
            return
        if is_capturing():
            return
        if not owner.query():
            raise RuntimeError(
                f"stream {stream.cuda_stream:#x} calls a layer while a call on stream {owner.cuda_stream:#x} of the "
                "same workspace may still run; use one stream a workspace (a second workspace for a second stream), or "
                "hand it over with workspace.use_stream()"
            )
        self._owner = stream

    def hand_over(self, stream) -> None:
        """Make `stream` wait for the owner's work, then own the workspace."""
        if self._owner is not None and self._owner.cuda_stream != stream.cuda_stream:
            stream.wait_stream(self._owner)
        self._owner = stream
