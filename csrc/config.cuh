// The one Config type: a tile size decides orientation, shared memory and registers. Model sizes are run-time values.
#pragma once
#include "params.gen.cuh"
#include "prelude.cuh"
#include "sync/launch.cuh"

namespace moe {

template <u32 kBlockTokens_>
struct Config {
    static constexpr u32 kBlockTokens = kBlockTokens_;
    // Few rows an expert: weights are the wgmma M side, so padding costs at most 7 token columns. Many: tokens are.
    static constexpr bool kWeightsOnM = kBlockTokens <= 64;

    static constexpr u32 kTokensBytes = kBlockTokens * kKBlock;
    static constexpr u32 kStageBytes = align_up(kTokensBytes + kImageCopyBytes + kBlockTokens * 4, 1024);
    static constexpr u32 kHImageBytes = kBlockTokens * (kKBlock + 4);
    // linear2 rows leave as bf16 through padded rows (528 B: no bank conflicts), or through 2 KB slices of the math
    // warps.
    static constexpr u32 kStagingRowBytes = kNBlock * 2 + 16;
    static constexpr u32 kSliceBytes = 2048;
    static constexpr u32 kStagingBytes =
        align_up(kWeightsOnM ? kBlockTokens * kStagingRowBytes : max_u32(kHImageBytes, 8 * kSliceBytes), 1024);
    // Routing tables up to this many slots are counted by every CTA alone; larger ones by the grid, with two barriers.
    static constexpr u32 kSmallTable = kWeightsOnM ? 4096 : 0;

    static constexpr u32 kFixedBytes = 15 * 1024 + kSmallTable * 4;
    static constexpr u32 kSharedLimit = 232448;  // 227 KiB: the most a CTA can have on sm_90
    static constexpr u32 kStages = min_u32(8, (kSharedLimit - kFixedBytes - kStagingBytes) / kStageBytes);
    static_assert(kBlockTokens % 8 == 0 && (kBlockTokens <= 64 || kBlockTokens == 128));
    static_assert(kStages >= 3);
};

constexpr u32 kTileSlots = 4;  // tiles announced ahead of the math warps

// One announced tile. rows/weights are filled by the tokens warps before the tile's first stage is full.
struct TileSlot {
    u32 kind;  // TileKind
    u32 expert, m_block, n_block;
    u32 row_begin, row_count;  // rows of the tile in the list; row_count <= kBlockTokens
    u32 number;                // of this CTA's tiles; slot and mbarrier phases follow from it
};
enum TileKind : u32 { kTile_linear1, kTile_linear2, kTile_end };

template <class C>
struct alignas(1024) SharedStorage {
    struct alignas(1024) Stage {
        u8 tokens[C::kTokensBytes];  // e4m3 rows, 128B swizzle
        u8 weights[kImageSfOffset];  // one image: 256 rows x 128, 128B swizzle
        f32 weights_sf[4];           // its tail: two scale factors
        f32 tokens_sf[C::kBlockTokens];
    } stages[C::kStages];
    alignas(1024) u8 staging[C::kStagingBytes];

    u32 row_offset[kMaxLocalExperts + 1];    // first row of an expert in the list
    u32 block_offset[kMaxLocalExperts + 1];  // first token block of an expert
    u32 tile_rows[kTileSlots][C::kBlockTokens];
    f32 tile_weights[kTileSlots][C::kBlockTokens];
    TileSlot tiles[kTileSlots];
    // Of the tokens warps' current linear1 tile.
    const u8* row_source[C::kBlockTokens];
    const f32* row_sf_source[C::kBlockTokens];
    f32 row_amax[8][C::kWeightsOnM ? C::kBlockTokens : 1];
    f32 row_scale[C::kWeightsOnM ? C::kBlockTokens : 1];
    alignas(128) u8 y_slice[4][2][512];  // combine: two bulk stores in flight per exchange warp

    u64 weights_full[C::kStages], tokens_full[C::kStages], stage_empty[C::kStages];
    u64 tile_full[kTileSlots], tile_empty[kTileSlots];
    u64 staging_full, staging_empty;

    u32 num_tokens[kMaxEpSize];        // tokens of every source rank
    u32 table_offset[kMaxEpSize + 1];  // first slot of a source in the joined routing table
    LaunchState launch;
    u32 num_m_blocks, healthy, is_last_cta, aborted;
    u32 small_list[C::kSmallTable ? C::kSmallTable : 1];
};

template <class C>
MOE_HOST_DEVICE constexpr bool shared_storage_fits() {
    static_assert(sizeof(typename SharedStorage<C>::Stage) == C::kStageBytes,
                  "the image and its scale factors must be contiguous");
    static_assert(sizeof(SharedStorage<C>) <= C::kSharedLimit, "raise kFixedBytes");
    return true;
}

}  // namespace moe
