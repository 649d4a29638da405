// Where a CTA stands: its rank, its place among the rank's CTAs, the launch number, and typed access to the regions.
#pragma once
#include "debug/check.cuh"
#include "params.gen.cuh"
#include "ptx/ld_st.cuh"
#include "roles.cuh"

namespace moe {

// Kept in shared memory: read where needed instead of held in registers through every role.
struct LaunchState {
    RankParams me;
    u32 cta, num_ctas;  // among this rank's CTAs
    u32 epoch;          // number of this launch: what every flag of it holds
    u32 num_tokens;     // of this call: the caller's device count where given, never more than the tensors hold
};

// One thread, at entry.
MOE_DEVICE LaunchState read_launch_state(const KernelParams& p) {
    const RankParams& me = p.ranks[blockIdx.x / p.ctas_per_rank];
    const u32 epoch = *reinterpret_cast<const u32*>(me.local + p.off_control);
    const i32 given =
        me.num_tokens_ptr ? *reinterpret_cast<const i32*>(me.num_tokens_ptr) : static_cast<i32>(me.num_tokens);
    const u32 num_tokens = given < 0 ? 0 : min_u32(static_cast<u32>(given), me.num_tokens);
    return {me, blockIdx.x % p.ctas_per_rank, p.ctas_per_rank, epoch, num_tokens};
}

struct Launch {
    const KernelParams& p;
    const RankParams& me;
    const u32 &cta, &num_ctas, &epoch, &num_tokens;

    MOE_DEVICE Launch(const KernelParams& params, const LaunchState& s)
        : p(params), me(s.me), cta(s.cta), num_ctas(s.num_ctas), epoch(s.epoch), num_tokens(s.num_tokens) {}

    MOE_DEVICE u32 bank() const { return epoch & 1; }

    template <class T>
    MOE_DEVICE T* at(u32 rank, u64 offset) const {
        return reinterpret_cast<T*>(p.arena[rank] + offset);
    }
    template <class T>
    MOE_DEVICE T* local(u64 offset) const {
        return reinterpret_cast<T*>(me.local + offset);
    }

#ifdef DEBUG_CHECKS
    template <class T>
    MOE_DEVICE T* checked_in(u32 region, u32 rank, T* address, u64 bytes) const {
        const u64 base = region >= kRegion_control ? me.local : rank < p.ep_size ? p.arena[rank] : 0;
        return reinterpret_cast<T*>(checked(p, me, region, base, reinterpret_cast<u64>(address), bytes));
    }
#endif

    // Symmetric regions of `rank` (a peer, or ourselves).
    MOE_DEVICE u32* abort_word(u32 rank) const { return MOE_REGION(abort, rank, 4, at<u32>(rank, p.off_abort)); }
    MOE_DEVICE u32* head_ready(u32 rank, u32 src, u32 slice) const {
        return MOE_REGION(head_ready, rank, 4,
                          at<u32>(rank, p.off_head_ready) + (bank() * p.ep_size + src) * p.slices + slice);
    }
    MOE_DEVICE u32* head_num_tokens(u32 rank, u32 src) const {
        return MOE_REGION(head_num_tokens, rank, 4, at<u32>(rank, p.off_head_num_tokens) + bank() * p.ep_size + src);
    }
    MOE_DEVICE i32* head_idx(u32 rank, u32 src) const {
        return MOE_REGION(head_idx, rank, 4, at<i32>(rank, p.off_head_idx) + (bank() * p.ep_size + src) * p.head_pitch);
    }
    MOE_DEVICE f32* head_weights(u32 rank, u32 src) const {
        return MOE_REGION(head_weights, rank, 4,
                          at<f32>(rank, p.off_head_weights) + (bank() * p.ep_size + src) * p.head_pitch);
    }
    MOE_DEVICE u32* x_ready(u32 rank, u32 src, u32 token) const {
        return MOE_REGION(x_ready, rank, 4, at<u32>(rank, p.off_x_ready) + u64(src) * p.capacity + token);
    }
    MOE_DEVICE u8* recv_x(u32 rank, u32 src, u32 token) const {
        return MOE_REGION(recv_x, rank, p.hidden,
                          at<u8>(rank, p.off_recv_x) + src * p.recv_x_pitch + u64(token) * p.hidden);
    }
    MOE_DEVICE f32* recv_x_sf(u32 rank, u32 src, u32 token) const {
        return MOE_REGION(recv_x_sf, rank, p.hidden / kKBlock * 4,
                          reinterpret_cast<f32*>(at<u8>(rank, p.off_recv_x_sf) + src * p.recv_x_sf_pitch) +
                              u64(token) * (p.hidden / kKBlock));
    }
    MOE_DEVICE u16* combine_y(u32 rank, u32 token, u32 slot) const {
        return MOE_REGION(combine_y, rank, p.hidden * 2,
                          at<u16>(rank, p.off_combine_y) + (u64(token) * p.topk + slot) * p.hidden);
    }
    MOE_DEVICE u32* combine_ready(u32 rank, u32 token, u32 slot) const {
        return MOE_REGION(combine_ready, rank, 4, at<u32>(rank, p.off_combine_ready) + u64(token) * kMaxTopk + slot);
    }

    // Local regions.
    MOE_DEVICE u32* epoch_word() const { return MOE_REGION(control, 0, 4, local<u32>(p.off_control)); }
    MOE_DEVICE u32* exit_counter() const { return MOE_REGION(control, 0, 4, local<u32>(p.off_control) + 1); }
    MOE_DEVICE u32* ticket_counter() const { return MOE_REGION(control, 0, 4, local<u32>(p.off_control) + 2); }
    MOE_DEVICE u32* record() const { return MOE_REGION(record, 0, 32, local<u32>(p.off_record)); }
    MOE_DEVICE u32* range_ready(u32 other) const {
        return MOE_REGION(range_ready, 0, 4, local<u32>(p.off_range_ready) + other);
    }
    MOE_DEVICE u32* list_ready(u32 other) const {
        return MOE_REGION(list_ready, 0, 4, local<u32>(p.off_list_ready) + other);
    }
    MOE_DEVICE u32* range_count(u32 other) const {
        return MOE_REGION(range_count, 0, kMaxLogicalExperts * 4,
                          local<u32>(p.off_range_count) + other * kMaxLogicalExperts);
    }
    MOE_DEVICE i32* chosen(u32 token) const {
        return MOE_REGION(chosen, 0, p.topk * 4, local<i32>(p.off_chosen) + u64(token) * p.topk);
    }
    MOE_DEVICE u32* row_list() const { return MOE_REGION(row_list, 0, 4, local<u32>(p.off_row_list)); }
    // parts: of an h image, each with a flag.
    MOE_DEVICE u32* h_ready(u32 m_block, u32 parts) const {
        return MOE_REGION(h_ready, 0, p.intermediate / kKBlock * parts * 4,
                          local<u32>(p.off_h_ready) + u64(m_block) * (p.intermediate / kKBlock) * parts);
    }
    MOE_DEVICE u32* block_done(u32 m_block) const {
        return MOE_REGION(block_done, 0, 4, local<u32>(p.off_block_done) + m_block);
    }
    MOE_DEVICE u32* x_image_ready(u32 row) const {
        return MOE_REGION(x_image_ready, 0, 4, local<u32>(p.off_x_image_ready) + row);
    }
    MOE_DEVICE u8* x_image(u32 m_block, u32 k_block, u32 image_bytes) const {
        return MOE_REGION(x_image, 0, image_bytes,
                          local<u8>(p.off_x_image) + (u64(m_block) * (p.hidden / kKBlock) + k_block) * image_bytes);
    }
    MOE_DEVICE u8* h_image(u32 m_block, u32 k_block, u32 image_bytes) const {
        return MOE_REGION(h, 0, image_bytes,
                          local<u8>(p.off_h) + (u64(m_block) * (p.intermediate / kKBlock) + k_block) * image_bytes);
    }

    // Weight blocks of decode_ahead.cuh, and image `index` of all that it decodes.
    MOE_DEVICE u32* decode_done(u32 block) const {
        return MOE_REGION(decode_done, 0, 4, local<u32>(p.off_decode_done) + block);
    }
    MOE_DEVICE u32* decoded_ready(u32 block) const {
        return MOE_REGION(decoded_ready, 0, 4, local<u32>(p.off_decoded_ready) + block);
    }
    MOE_DEVICE u8* decoded(u32 index) const {
        return MOE_REGION(decoded, 0, kFp8ImageCopyBytes, local<u8>(p.off_decoded) + u64(index) * kFp8ImagePitchBytes);
    }

    MOE_DEVICE u32 n_blocks1() const { return p.intermediate / 128; }
    MOE_DEVICE u32 n_blocks2() const { return ceil_div(p.hidden, kNBlock); }
    MOE_DEVICE u32 num_experts() const { return p.num_local_experts * p.ep_size; }
};

// The rank's exchange warps share out slices, tokens, images to decode and combine items round robin, CTA
// first.
MOE_DEVICE u32 first_item(const Launch& l) { return (warp_id() - kExchangeWarp) * l.num_ctas + l.cta; }
MOE_DEVICE u32 item_stride(const Launch& l) { return l.num_ctas * kExchangeWarps; }

}  // namespace moe
