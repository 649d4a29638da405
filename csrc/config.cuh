// The one Config type: tile size and weight format decide orientation, shared memory and registers. Model sizes are
// run-time values.
#pragma once
#include "params.gen.cuh"
#include "prelude.cuh"
#include "roles.cuh"
#include "sync/launch.cuh"

namespace moe {

// How weights lie in an image and reach the tensor cores. e4m3 values are read from shared memory as they are. MXFP4
// codes become e4m3 values on their way into the registers of a wgmma A operand (gemm/mxfp4.cuh), or, where many token
// blocks read each of them, once a launch in memory (gemm/decode_ahead.cuh): what reads them there is as for kFp8.
enum WeightFormat : u32 { kFp8, kMxfp4 };

template <u32 kBlockTokens_, WeightFormat kFormat_ = kFp8>
struct Config {
    static constexpr u32 kBlockTokens = kBlockTokens_;
    static constexpr bool kDecodesAhead = kFormat_ == kMxfp4 && kBlockTokens == 128;
    static constexpr bool kDecodesInLoop = kFormat_ == kMxfp4 && !kDecodesAhead;
    static constexpr bool kIsMxfp4 = kFormat_ == kMxfp4;
    // Decoding ahead and in the loop want rows in different orders of K, and a rank chooses by its own bound. So each
    // tells the peers which it chose, in the top bit of its number of tokens (head_mark).
    static constexpr u32 kAheadBit = kDecodesAhead ? 1u << 31 : 0;
    // Few rows an expert: weights are the wgmma M side, so padding costs at most the rest of a tile of tokens. Many:
    // tokens are. Codes decoded into registers can only be the A operand, which is M.
    static constexpr bool kWeightsOnM = kDecodesInLoop || kBlockTokens <= 64;
    // Many rows: CTAs work in pairs. FP8 images: two token blocks against one weight block, of which each CTA loads
    // half for both; that takes 32 instead of 48 KB a stage from the L2 cache: at full tensor rate 48 KB would be
    // 10 TB/s.
    static constexpr bool kPairsBlocks = !kWeightsOnM;
    // MXFP4: one token block against a weight block's two halves (gemm/split_rows.cuh), each CTA loading half of the
    // rows for both. So a weight is decoded once for 192 rows: 256 weight rows leave registers for 96 sums a thread.
    static constexpr bool kSplitsWeights = kDecodesInLoop && kBlockTokens > 96;
    // So few rows an expert that some may have none, and a call few tiles for each CTA: which CTA takes the last ones
    // matters (sched/tickets.cuh).
    static constexpr bool kDrawsLate = kBlockTokens <= 16;
    // Rows are copied once into expert order and loaded by bulk copies; else gathered for each tile.
    static constexpr bool kInExpertOrder = kPairsBlocks || kSplitsWeights;
    static constexpr u32 kCluster = kInExpertOrder ? 2 : 1;
    static constexpr u32 kTilesABlock = kSplitsWeights ? 2 : 1;  // CTAs that share a token and weight block
    static constexpr u32 kTileColumns = kNBlock / kTilesABlock;  // weight rows of a tile
    // A CTA may lose what only others can see is lost: weights they decode, or the partner's half of the rows. So the
    // store warp looks at the abort word before it publishes (may_publish).
    static constexpr bool kPartnerMayLose = kDecodesAhead || kSplitsWeights;

    static constexpr u32 kImageSfOffset = kDecodesInLoop ? kMxfp4ImageSfOffset : kFp8ImageSfOffset;
    static constexpr u32 kImageCopyBytes = kDecodesInLoop ? kMxfp4ImageCopyBytes : kFp8ImageCopyBytes;
    static constexpr u32 kImagePitchBytes = kDecodesInLoop ? kMxfp4ImagePitchBytes : kFp8ImagePitchBytes;
    static constexpr u32 kMaxStages = kDecodesInLoop ? 12 : 8;

    static constexpr u32 kTokensBytes = kBlockTokens * kKBlock;
    // Weights of a stage: an image, or half the codes and all scales of one.
    static constexpr u32 kStageSfOffset = kSplitsWeights ? kImageSfOffset - kMxfp4ScalesOffset / 2 : kImageSfOffset;
    static constexpr u32 kStageBytes = align_up(kTokensBytes + kStageSfOffset + 16 + kBlockTokens * 4, 1024);
    static constexpr u32 kHImageBytes = kBlockTokens * (kKBlock + 4);
    // Who may enter an epilogue on its own. Weights on M: a row's amax crosses both warpgroups. Tokens on M: a
    // warpgroup has whole rows, so one computes while the other is in its epilogue.
    static constexpr u32 kStagingGroups = kWeightsOnM ? 1 : 2;
    // linear2 rows leave as bf16 through padded rows (528 or 272 B: no bank conflicts), or through 2 KB slices of the
    // math warps.
    static constexpr u32 kStagingRowBytes = kTileColumns * 2 + 16;
    static constexpr u32 kSliceBytes = 2048;
    static constexpr u32 kStagingBytes =
        align_up(kWeightsOnM ? kBlockTokens * kStagingRowBytes : max_u32(kHImageBytes, 8 * kSliceBytes), 128);
    // Warpgroups' registers; 128 threads each of loads and exchange, 256 of math. Many tokens: sums and their operands
    // take the math warps' registers. Few: the exchange warps sum eight slots at once.
    static constexpr bool kManySums = kBlockTokens > 64;
    static constexpr u32 kMathRegisters = kManySums ? 208 : 192;
    static constexpr u32 kLoadRegisters = kManySums ? 32 : 40;
    static constexpr u32 kExchangeRegisters = kManySums ? 64 : 88;
    static_assert(128 * (2 * kMathRegisters + kLoadRegisters + kExchangeRegisters) == 65536,
                  "the register file, exactly");
    static constexpr u32 kCombineLoads = kManySums ? 6 : 8;  // of 16 bytes that a combining lane has in flight
    // On tokens_full. Gathered: each tokens warp's lanes as their copies land, and lane 0 once more for the names of
    // the rows. In expert order: the one copying thread.
    static constexpr u32 kTokensArrivals = kInExpertOrder ? 1 : kTokensWarps * kGatherArrivals;
    // Routing tables up to this many slots are counted by every CTA alone; larger ones by the grid, with two barriers.
    static constexpr u32 kSmallTable = kManySums ? 0 : 3840;

    static constexpr u32 kSharedLimit = 232448;  // 227 KiB: the most a CTA can have on sm_90
    static_assert(kBlockTokens % 8 == 0 &&
                  (kBlockTokens <= 64 ||
                   (kDecodesInLoop ? kBlockTokens == 96 || kBlockTokens == 192 : kBlockTokens == 128)));
};

constexpr u32 kTileSlots = 4;    // tiles announced ahead of the math warps
constexpr u32 kDecodeRing = 3;   // pieces of 512 bytes that a decoding warp has in flight: as four stages leave room
constexpr u32 kTicketSlots = 8;  // more than the tiles that one CTA of a pair can be ahead: one a stage at most

// One announced tile. The tokens warps fill its row names and weights: before the tile's first stage is full, in expert
// order before names_full.
struct TileSlot {
    u32 kind;  // TileKind
    u32 expert, m_block, n_block;
    u32 row_begin, row_count;  // rows of the tile in the list; 0: only keeps step with the cluster, publishes nothing
    u32 number;                // of this CTA's tiles; slot and mbarrier phases follow from it
    u32 shares_weights;        // with the other CTA of the cluster
    u32 only_block;            // of its expert: no other tile reads these weights
    const u8* weights;         // its first image
};
enum TileKind : u32 { kTile_linear1, kTile_linear2, kTile_end };

// What the tokens warp loads of a tile's rows, and from which first image.
struct alignas(16) RowShare {
    const u8* image;
    u32 begin, count;
};

// Nothing in FP8 builds.
template <bool kDecodes>
struct DecodeTable {};
template <>
struct DecodeTable<true> {
    alignas(128) u64
        decode_rows[16];  // gemm/mxfp4_decode.cuh; 128 bytes, each bank once: any lanes' rows at no conflict
};

// Of an exchange warp: images decoded so far; the weight block of the last one, until it is published; in the row list,
// what it copies next.
struct DecodeTurn {
    u32 done, unpublished, next_row;
};

template <class C>
struct SharedState : DecodeTable<C::kIsMxfp4> {
    u32 row_offset[kMaxLocalExperts + 1];                           // first row of an expert in the list
    u16 block_offset[kMaxLocalExperts + 1];                         // first token block of an expert
    u16 pair_offset[C::kPairsBlocks ? kMaxLocalExperts + 1 : 1];    // first pair of token blocks of an expert
    u16 single_offset[C::kPairsBlocks ? kMaxLocalExperts + 1 : 1];  // experts before with an odd block left over
    u32 tile_rows[kTileSlots][C::kBlockTokens];
    alignas(8) f32 tile_weights[kTileSlots][C::kBlockTokens];
    TileSlot tiles[kTileSlots];
    // Of the tokens warps' current linear1 tile, where they gather it.
    const u8* row_source[C::kInExpertOrder ? 1 : C::kBlockTokens];
    const f32* row_sf_source[C::kInExpertOrder ? 1 : C::kBlockTokens];
    alignas(8) f32 row_amax[8][C::kWeightsOnM ? C::kBlockTokens : 1];
    alignas(8) f32 row_scale[C::kWeightsOnM ? C::kBlockTokens : 1];
    RowShare row_share;  // of the tokens warp's current tile, where a pair shares its rows
    // The other CTA's amax of a row, as bits, where the pair shares its columns; two buffers. amax_turn: its linear1
    // tiles, mod 4.
    u32 amax_turn, partner_amax[2][C::kSplitsWeights ? C::kBlockTokens : 1];
    // Of each exchange warp. decode_ahead: pieces on their way; combine: two bulk stores in flight.
    alignas(128) u8 exchange_buffer[kExchangeWarps][C::kDecodesAhead ? kDecodeRing : 2][512];

    // Items of the exchange warps' last windows that nobody has taken: math warps help once their tiles are done.
    DecodeTurn decode_turn[C::kDecodesAhead ? kExchangeWarps : 1];
    u32 watch_first[4], watch_pending[4], watch_open[4], watch_idle_since[4], watch_polls[4];

    u64 weights_full[C::kMaxStages], tokens_full[C::kMaxStages], stage_empty[C::kMaxStages];
    u64 tile_full[kTileSlots], tile_empty[kTileSlots], names_full[kTileSlots];
    u64 staging_full[C::kStagingGroups], staging_empty[C::kStagingGroups];
    u64 plan_agreed;                // of the cluster's CTAs
    u64 amax_full[2];               // of partner_amax
    u64 ticket_full[kTicketSlots];  // second CTA of a pair: the first has drawn
    u32 partner_ticket[kTicketSlots];

    u32 num_tokens[kMaxEpSize];        // tokens of every source rank
    u32 table_offset[kMaxEpSize + 1];  // first slot of a source in the joined routing table
    LaunchState launch;
#ifdef TRACE
    u32 trace_count[kNumTraceRoles];
#endif
    u32 plan_done, num_m_blocks, num_tickets, only_pairs, pair_ratio, healthy, partner_failed, is_last_cta, aborted;
    u32 small_list[C::kSmallTable ? C::kSmallTable : 1];
};

// As many stages as fit beside the rest: bytes in flight are what hides the latency of memory.
template <class C>
constexpr u32 kFixedBytes = align_up(sizeof(SharedState<C>), 1024) + C::kStagingBytes;
template <class C>
constexpr u32 kStages = min_u32(C::kMaxStages, (C::kSharedLimit - kFixedBytes<C>) / C::kStageBytes);

template <class C>
struct SharedStorage : SharedState<C> {
    struct alignas(1024) Stage {
        u8 tokens[C::kTokensBytes];     // e4m3 rows, 128B swizzle
        u8 weights[C::kStageSfOffset];  // one image: 256 rows x 128, as wgmma or the decoder reads them; or half
        f32 weights_sf[4];              // its tail: two scale factors
        f32 tokens_sf[C::kBlockTokens];
    };
    Stage stages[kStages<C>];
    alignas(128) u8 staging[C::kStagingBytes];
};

// What a launch asks for; sizeof(SharedStorage) rounds it up to the stages' alignment.
template <class C>
constexpr u32 kSharedBytes = kFixedBytes<C> + kStages<C> * C::kStageBytes;

template <class C>
MOE_HOST_DEVICE constexpr bool shared_storage_fits() {
    // A larger state must not take a stage unnoticed (it did: benchmarks/notes/0002).
    static_assert(kStages<C> >= 4);
    static_assert(C::kCluster == 1 || kStages<C> < kTicketSlots);
    static_assert(sizeof(typename SharedStorage<C>::Stage) == C::kStageBytes, "image and scale factors are contiguous");
    static_assert(kSharedBytes<C> <= C::kSharedLimit);
    return true;
}

// The row list of this launch lies in shared memory (each CTA made it alone) instead of row_list.
template <class C>
MOE_DEVICE bool is_small_table(const SharedStorage<C>& s, u32 ep_size) {
    return s.table_offset[ep_size] <= C::kSmallTable;
}

}  // namespace moe
