"""What a launch has reported through its status record, in words."""

from collections.abc import Sequence

from megamoe import layout
from megamoe.errors import ErrorRecord, MegaMoEError


def device_error(records: Sequence[layout.KernelStatus], ids_are_mapped: bool) -> MegaMoEError:
    """records: of the ranks of this process, one or more with a code; of these, one that says why, if any does.

    ids_are_mapped: senders translate ids to slots, for expert plans or shared experts."""
    found = [r for r in records if r.code]
    r = next((r for r in found if layout.CODES[r.code] != "aborted_by_peer"), found[0])
    code = layout.CODES[r.code]
    record = ErrorRecord(r.rank, r.cta, layout.ROLES[r.role], layout.STEPS[r.step], r.index, r.have, r.want)
    if code == "aborted_by_peer":
        return MegaMoEError(f"launch {r.epoch} was ended by rank {r.origin}, whose own error says why", record)
    if code == "expert_out_of_range":
        # Where senders translate ids, bit 30 marks an id that the sender could not map to a slot (kUnmappedIdBit)
        marked = 1 << 30 if ids_are_mapped else 0
        signed = r.have - (1 << 32) if r.have >> 31 else r.have & ~marked
        src_rank, token = divmod(r.index, layout.MAX_TOKENS)
        return MegaMoEError(
            f"topk_idx of token {token} of rank {src_rank} names expert {signed}; legal are -1 and 0 to {r.want - 1}",
            record._replace(index=token, have=signed),
        )
    if code == "unequal_bounds":
        return MegaMoEError(
            f"launch {r.epoch}: rank {r.index} was called with another num_tokens_bound; give every rank the same",
            record,
        )
    if code == "unequal_layers":
        return MegaMoEError(
            f"launch {r.epoch}: rank {r.index} called layer {r.have} of the workspace, this rank layer {r.want}: "
            "all ranks make the same calls in one order",
            record,
        )
    if code == "out_of_bounds":
        region = f"region {layout.REGIONS[r.index].name} of {r.want} bytes"
        return MegaMoEError(f"launch {r.epoch}: an access at byte {r.have} of {region}", record)
    return MegaMoEError(f"launch {r.epoch}: {_story(record)}", record)


def _story(r: ErrorRecord) -> str:
    waited_for = {
        ("plan", "dispatch"): f"no routing table from rank {r.index}: it did not launch this call, or is gone",
        ("plan", "plan"): f"the CTAs of this rank did not meet while counting rows (meeting {r.index})",
        ("weights", "linear1"): f"linear1's weights of local expert {r.index} were not decoded",
        ("weights", "linear2"): f"linear2's weights of local expert {r.index} were not decoded",
        ("tokens", "dispatch"): f"token rows from rank {r.index} did not arrive",
        ("tokens", "swiglu"): f"the SwiGLU output of token block {r.index} was not written",
        ("tokens", "plan"): f"the rows of token block {r.index} were not brought into expert order",
        ("exchange", "dispatch"): f"token rows from rank {r.index} did not arrive",
        ("exchange", "combine"): f"the expert rows of token {r.index} did not come back",
    }
    return waited_for.get((r.role, r.step), "a wait inside the kernel passed its deadline")
