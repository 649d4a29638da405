"""What a rank does alone while a model is prepared, such as loading weights, and what its peers must know of it."""

from contextlib import contextmanager

import torch.distributed as dist

from megamoe.errors import MegaMoEError, absent_ranks_named
from megamoe_cuda.gather import busy, gather


@contextmanager
def alike(group: dist.ProcessGroup | None, deadline_s: float):
    """Around it: peers wait for as long as it takes, and what one rank refuses or fails at all do, with its words: they
    would wait for it in the next call that takes all. Collective; group: None for one process.

    ValueError on ranks that were well themselves; MegaMoEError on those if a peer does not come within deadline_s. What
    is no Exception, such as an interrupt, ends this rank alone, and at once."""
    problem, texts = None, []
    with busy(group, deadline_s):
        try:
            yield
        except Exception as error:
            problem = error
    if group is not None and dist.get_world_size(group) > 1:
        try:
            with absent_ranks_named():
                texts = gather(group, "serve", _in_words(problem), deadline_s)
        except MegaMoEError:
            if problem is None:
                raise
    if problem is not None:
        raise problem
    theirs = next((f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None), None)
    if theirs is not None:
        raise ValueError(theirs)


def _in_words(problem: Exception | None) -> str | None:
    if problem is None:
        return None
    if isinstance(problem, ValueError | TypeError):  # written for who calls: says what is wrong
        return str(problem)
    return f"{type(problem).__name__}: {problem}"
