"""The exception a device wait, a peer or a bad id ends in. Errors a caller can fix beforehand are ValueError or
TypeError."""

from contextlib import contextmanager
from typing import NamedTuple

from megamoe_cuda.gather import AbsentRankError


class ErrorRecord(NamedTuple):
    """Where a wait gave up, in the words of the wait itself. -1 and "" mean: does not apply."""

    rank: int  # ep_rank that wrote the record
    cta: int  # block of the kernel, -1 on the torch path
    role: str  # a word of layout.ROLES, e.g. "tokens"; "host" where ranks meet outside of a call
    step: str  # dispatch, plan, linear1, swiglu, linear2 or combine; of the host, where: "workspace", "reset", ...
    index: int  # what was waited for: a peer's ep_rank, a token block, a token
    have: int
    want: int


class MegaMoEError(RuntimeError):
    """A call failed while it ran. ``record`` says where; the workspace refuses further calls until ``reset()``.

    record: ErrorRecord or None (None: refused because an earlier call failed).
    """

    def __init__(self, message: str, record: ErrorRecord | None = None):
        self.record = record
        if record is not None:
            where = f"rank {record.rank}" + (f" cta {record.cta}" if record.cta >= 0 else "")
            message = (
                f"{where} role {record.role} step {record.step}: {message} "
                f"(index {record.index}, have {record.have}, want {record.want})"
            )
        super().__init__(message)


@contextmanager
def absent_ranks_named():
    """A rank that does not come to where ranks meet becomes a MegaMoEError with its record."""
    try:
        yield
    except AbsentRankError as error:
        have = error.num_ranks - len(error.absent)
        record = ErrorRecord(error.rank, -1, "host", error.step, error.absent[0], have, error.num_ranks)
        raise MegaMoEError(str(error), record) from error
