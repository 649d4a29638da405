// clang-format off
// Generated from megamoe/layout.py by `python -m megamoe layout --write-header`. Do not edit.
#pragma once
#include "prelude.cuh"

namespace moe {

constexpr u32 kMaxEpSize = 32;
constexpr u32 kMaxVirtualRanks = 8;
constexpr u32 kMaxTopk = 16;
constexpr u32 kMaxLocalExperts = 256;
constexpr u32 kHeadSliceTokens = 16;
constexpr u32 kHeadTokensBits = 21;
constexpr u32 kHeadLayerBits = 10;
constexpr u32 kChoicePasses = 8;
constexpr u32 kReplicaHeaderWords = 4;
constexpr u32 kMaxLogicalExperts = 512;
constexpr u32 kMaxCopies = 1024;
constexpr u32 kNumThreads = 512;
constexpr u32 kExchangeWarps = 4;
constexpr u32 kCombineStep = 256;
constexpr u32 kKBlock = 128;
constexpr u32 kNBlock = 256;
constexpr u32 kFp8ImageSfOffset = 32768;
constexpr u32 kFp8ImageCopyBytes = 32784;
constexpr u32 kTraceRecords = 2048;
constexpr u32 kNumTraceRoles = 7;
constexpr u32 kNumRegions = 26;
constexpr u32 kFp8ImagePitchBytes = 32896;
constexpr u32 kMxfp4ScalesOffset = 16384;
constexpr u32 kMxfp4ImageSfOffset = 17408;
constexpr u32 kMxfp4ImageCopyBytes = 17424;
constexpr u32 kMxfp4ImagePitchBytes = 17536;

enum Role : u32 {
    kRole_none,
    kRole_plan,
    kRole_weights,
    kRole_tokens,
    kRole_math,
    kRole_store,
    kRole_exchange,
    kRole_exit,
};

enum Step : u32 {
    kStep_none,
    kStep_dispatch,
    kStep_plan,
    kStep_linear1,
    kStep_swiglu,
    kStep_linear2,
    kStep_combine,
};

enum Code : u32 {
    kCode_ok,
    kCode_timeout,
    kCode_expert_out_of_range,
    kCode_aborted_by_peer,
    kCode_out_of_bounds,
    kCode_unequal_bounds,
    kCode_unequal_layers,
};

enum Trace : u32 {
    kTrace_plan,
    kTrace_weights,
    kTrace_tokens,
    kTrace_math0,
    kTrace_math1,
    kTrace_store,
    kTrace_exchange,
};

enum Event : u32 {
    kEvent_start,
    kEvent_list,
    kEvent_pushed,
    kEvent_tile,
    kEvent_rows_named,
    kEvent_rows_here,
    kEvent_first_stage,
    kEvent_k_loop,
    kEvent_staging,
    kEvent_epilogue,
    kEvent_stored,
    kEvent_combined,
    kEvent_end,
};

enum Choice : u32 {
    kChoice_static,
    kChoice_balanced,
    kChoice_min_active,
};

enum Fault : u32 {
    kFault_routing,
    kFault_count,
    kFault_head,
    kFault_rows,
    kFault_h,
    kFault_combine,
    kFault_decoded,
};

enum Region : u32 {
    kRegion_abort,
    kRegion_head_ready,
    kRegion_head_num_tokens,
    kRegion_x_ready,
    kRegion_combine_ready,
    kRegion_head_idx,
    kRegion_head_weights,
    kRegion_recv_x,
    kRegion_recv_x_sf,
    kRegion_combine_y,
    kRegion_staging,
    kRegion_control,
    kRegion_record,
    kRegion_range_ready,
    kRegion_list_ready,
    kRegion_h_ready,
    kRegion_block_done,
    kRegion_range_count,
    kRegion_chosen,
    kRegion_row_list,
    kRegion_decode_done,
    kRegion_decoded_ready,
    kRegion_decoded,
    kRegion_x_image_ready,
    kRegion_x_image,
    kRegion_h,
};

struct RankParams {
    u64 x;
    u64 x_sf;
    u64 topk_idx;
    u64 topk_weights;
    u64 num_tokens_ptr;
    u64 y;
    u64 linear1;
    u64 linear2;
    u64 local;
    u64 status;
    u64 trace;
    u64 replica_map;
    u64 load_count;
    u64 linear1_dump;
    u32 num_tokens;
    u32 ep_rank;
};
static_assert(MOE_OFFSETOF(RankParams, x) == 0);
static_assert(MOE_OFFSETOF(RankParams, x_sf) == 8);
static_assert(MOE_OFFSETOF(RankParams, topk_idx) == 16);
static_assert(MOE_OFFSETOF(RankParams, topk_weights) == 24);
static_assert(MOE_OFFSETOF(RankParams, num_tokens_ptr) == 32);
static_assert(MOE_OFFSETOF(RankParams, y) == 40);
static_assert(MOE_OFFSETOF(RankParams, linear1) == 48);
static_assert(MOE_OFFSETOF(RankParams, linear2) == 56);
static_assert(MOE_OFFSETOF(RankParams, local) == 64);
static_assert(MOE_OFFSETOF(RankParams, status) == 72);
static_assert(MOE_OFFSETOF(RankParams, trace) == 80);
static_assert(MOE_OFFSETOF(RankParams, replica_map) == 88);
static_assert(MOE_OFFSETOF(RankParams, load_count) == 96);
static_assert(MOE_OFFSETOF(RankParams, linear1_dump) == 104);
static_assert(MOE_OFFSETOF(RankParams, num_tokens) == 112);
static_assert(MOE_OFFSETOF(RankParams, ep_rank) == 116);
static_assert(sizeof(RankParams) == 120);

struct RankBiases {
    u64 linear1;
    u64 linear2;
};
static_assert(MOE_OFFSETOF(RankBiases, linear1) == 0);
static_assert(MOE_OFFSETOF(RankBiases, linear2) == 8);
static_assert(sizeof(RankBiases) == 16);

struct KernelParams {
    u64 arena[32];
    RankParams ranks[8];
    u64 off_abort;
    u64 off_head_ready;
    u64 off_head_num_tokens;
    u64 off_x_ready;
    u64 off_combine_ready;
    u64 off_head_idx;
    u64 off_head_weights;
    u64 off_recv_x;
    u64 off_recv_x_sf;
    u64 off_combine_y;
    u64 off_staging;
    u64 off_control;
    u64 off_record;
    u64 off_range_ready;
    u64 off_list_ready;
    u64 off_h_ready;
    u64 off_block_done;
    u64 off_range_count;
    u64 off_chosen;
    u64 off_row_list;
    u64 off_decode_done;
    u64 off_decoded_ready;
    u64 off_decoded;
    u64 off_x_image_ready;
    u64 off_x_image;
    u64 off_h;
    u64 recv_x_pitch;
    u64 recv_x_sf_pitch;
    u64 head_pitch;
    u64 prefetch_stages;
    u64 layer;
    u64 decode_lag;
    u64 arrive_deadline_ns;
    u64 step_deadline_ns;
    u32 ep_size;
    u32 ctas_per_rank;
    u32 hidden;
    u32 intermediate;
    u32 num_local_experts;
    u32 topk;
    u32 capacity;
    u32 slices;
    u32 order_group;
    u32 order_lag;
    u32 combine_columns;
    u32 combine_chunks;
    u32 x_is_fp8;
    u32 idx_is_int64;
    u32 weights_are_bf16;
    f32 swiglu_limit;
    RankBiases biases[8];
    u64 num_shared_experts;
    f32 gate_exponent;
    f32 up_shift;
};
static_assert(MOE_OFFSETOF(KernelParams, arena) == 0);
static_assert(MOE_OFFSETOF(KernelParams, ranks) == 256);
static_assert(MOE_OFFSETOF(KernelParams, off_abort) == 1216);
static_assert(MOE_OFFSETOF(KernelParams, off_head_ready) == 1224);
static_assert(MOE_OFFSETOF(KernelParams, off_head_num_tokens) == 1232);
static_assert(MOE_OFFSETOF(KernelParams, off_x_ready) == 1240);
static_assert(MOE_OFFSETOF(KernelParams, off_combine_ready) == 1248);
static_assert(MOE_OFFSETOF(KernelParams, off_head_idx) == 1256);
static_assert(MOE_OFFSETOF(KernelParams, off_head_weights) == 1264);
static_assert(MOE_OFFSETOF(KernelParams, off_recv_x) == 1272);
static_assert(MOE_OFFSETOF(KernelParams, off_recv_x_sf) == 1280);
static_assert(MOE_OFFSETOF(KernelParams, off_combine_y) == 1288);
static_assert(MOE_OFFSETOF(KernelParams, off_staging) == 1296);
static_assert(MOE_OFFSETOF(KernelParams, off_control) == 1304);
static_assert(MOE_OFFSETOF(KernelParams, off_record) == 1312);
static_assert(MOE_OFFSETOF(KernelParams, off_range_ready) == 1320);
static_assert(MOE_OFFSETOF(KernelParams, off_list_ready) == 1328);
static_assert(MOE_OFFSETOF(KernelParams, off_h_ready) == 1336);
static_assert(MOE_OFFSETOF(KernelParams, off_block_done) == 1344);
static_assert(MOE_OFFSETOF(KernelParams, off_range_count) == 1352);
static_assert(MOE_OFFSETOF(KernelParams, off_chosen) == 1360);
static_assert(MOE_OFFSETOF(KernelParams, off_row_list) == 1368);
static_assert(MOE_OFFSETOF(KernelParams, off_decode_done) == 1376);
static_assert(MOE_OFFSETOF(KernelParams, off_decoded_ready) == 1384);
static_assert(MOE_OFFSETOF(KernelParams, off_decoded) == 1392);
static_assert(MOE_OFFSETOF(KernelParams, off_x_image_ready) == 1400);
static_assert(MOE_OFFSETOF(KernelParams, off_x_image) == 1408);
static_assert(MOE_OFFSETOF(KernelParams, off_h) == 1416);
static_assert(MOE_OFFSETOF(KernelParams, recv_x_pitch) == 1424);
static_assert(MOE_OFFSETOF(KernelParams, recv_x_sf_pitch) == 1432);
static_assert(MOE_OFFSETOF(KernelParams, head_pitch) == 1440);
static_assert(MOE_OFFSETOF(KernelParams, prefetch_stages) == 1448);
static_assert(MOE_OFFSETOF(KernelParams, layer) == 1456);
static_assert(MOE_OFFSETOF(KernelParams, decode_lag) == 1464);
static_assert(MOE_OFFSETOF(KernelParams, arrive_deadline_ns) == 1472);
static_assert(MOE_OFFSETOF(KernelParams, step_deadline_ns) == 1480);
static_assert(MOE_OFFSETOF(KernelParams, ep_size) == 1488);
static_assert(MOE_OFFSETOF(KernelParams, ctas_per_rank) == 1492);
static_assert(MOE_OFFSETOF(KernelParams, hidden) == 1496);
static_assert(MOE_OFFSETOF(KernelParams, intermediate) == 1500);
static_assert(MOE_OFFSETOF(KernelParams, num_local_experts) == 1504);
static_assert(MOE_OFFSETOF(KernelParams, topk) == 1508);
static_assert(MOE_OFFSETOF(KernelParams, capacity) == 1512);
static_assert(MOE_OFFSETOF(KernelParams, slices) == 1516);
static_assert(MOE_OFFSETOF(KernelParams, order_group) == 1520);
static_assert(MOE_OFFSETOF(KernelParams, order_lag) == 1524);
static_assert(MOE_OFFSETOF(KernelParams, combine_columns) == 1528);
static_assert(MOE_OFFSETOF(KernelParams, combine_chunks) == 1532);
static_assert(MOE_OFFSETOF(KernelParams, x_is_fp8) == 1536);
static_assert(MOE_OFFSETOF(KernelParams, idx_is_int64) == 1540);
static_assert(MOE_OFFSETOF(KernelParams, weights_are_bf16) == 1544);
static_assert(MOE_OFFSETOF(KernelParams, swiglu_limit) == 1548);
static_assert(MOE_OFFSETOF(KernelParams, biases) == 1552);
static_assert(MOE_OFFSETOF(KernelParams, num_shared_experts) == 1680);
static_assert(MOE_OFFSETOF(KernelParams, gate_exponent) == 1688);
static_assert(MOE_OFFSETOF(KernelParams, up_shift) == 1692);
static_assert(sizeof(KernelParams) == 1696);

struct KernelStatus {
    u32 code;
    u32 rank;
    u32 cta;
    u32 role;
    u32 step;
    u32 index;
    u32 have;
    u32 want;
    u32 epoch;
    u32 origin;
};
static_assert(MOE_OFFSETOF(KernelStatus, code) == 0);
static_assert(MOE_OFFSETOF(KernelStatus, rank) == 4);
static_assert(MOE_OFFSETOF(KernelStatus, cta) == 8);
static_assert(MOE_OFFSETOF(KernelStatus, role) == 12);
static_assert(MOE_OFFSETOF(KernelStatus, step) == 16);
static_assert(MOE_OFFSETOF(KernelStatus, index) == 20);
static_assert(MOE_OFFSETOF(KernelStatus, have) == 24);
static_assert(MOE_OFFSETOF(KernelStatus, want) == 28);
static_assert(MOE_OFFSETOF(KernelStatus, epoch) == 32);
static_assert(MOE_OFFSETOF(KernelStatus, origin) == 36);
static_assert(sizeof(KernelStatus) == 40);

}  // namespace moe
