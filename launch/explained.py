"""Races that compute-sanitizer's racecheck reports and that are none, each with what orders its accesses.

racecheck knows barriers of threads that meet at them, and no order that goes through a flag, a copy's own arrival, one
lane's arrival for its warp, a third thread or the other CTA of a cluster. An explained pair would hide that its order
is lost, so the operations that make it are named too, and looked for in the sources by tests/cpu/test_sanitizers.py.
"""

from typing import NamedTuple


class Order(NamedTuple):
    """Why each of `writers` and each of `readers`, 'file:function' under csrc, are ordered both ways. made_by: texts of
    the functions that order them. callers: of access functions, whom the reason speaks for; another caller needs a
    thought of its own."""

    reason: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    made_by: dict[str, tuple[str, ...]]
    callers: dict[str, set[str]]


EXPLAINED = {
    "plan offsets": Order(
        "Written once a launch, by a plan warp; then the plan warps' barrier, and st.release.cta of plan_done by one "
        "of their threads. The exchange warps read after their own ld.acquire.cta of it has given 1 (permute_rows). "
        "racecheck knows barriers only, and the exchange warps share none with the plan. Other callers of find_expert "
        "are plan threads, or come after the plan's barrier. run calls another step (gemm/mxfp4_split.cuh).",
        ("sched/table.cuh:offsets_of",),
        ("sched/order.cuh:find_expert", "pipeline/1_permute.cuh:place_in_images",
         "pipeline/1_permute.cuh:permute_rows", "gemm/decode_ahead.cuh:step"),
        {"sched/table.cuh:build_row_list": ("if (warp == 0) offsets_of(l, s, scratch.count, lane);\n"
                                            "    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();",),
         "mega_moe.cu:mega_moe": ("if (thread == 0) ptx::st_release_cta_shared(&s.plan_done, 1);",),
         "pipeline/1_permute.cuh:permute_rows": (
             "while (!ptx::ld_acquire_cta_shared(&s.plan_done))",
             "planned = __all_sync(~0u, ptx::ld_acquire_cta_shared(&s.plan_done));"),
         "gemm/decode_ahead.cuh:step": ("if (planned && s.row_offset[expert]",)},
        {"step": {"permute_rows", "run"},
         "find_expert": {"place_in_images", "read_entry", "read_logical", "tile_of_ticket"}}),
    "flags in shared memory": Order(
        "plan_done and watch_open themselves, written by st.release.cta and polled by ld.acquire.cta: such a word is "
        "there to be read while it is written. Read relaxed, it lets nobody read what else was written: is_over only "
        "restarts a clock while plan_done is 0, and the warp whose watch_open it is has a warp barrier behind the "
        "store. Both are 0 before the barrier at entry. Some reports give the store of plan_done its caller's line.",
        ("ptx/ld_st.cuh:st_release_cta_shared", "mega_moe.cu:mega_moe"),
        ("ptx/ld_st.cuh:ld_acquire_cta_shared", "ptx/ld_st.cuh:ld_relaxed_cta_shared"),
        {"ptx/ld_st.cuh:st_release_cta_shared": ("st.release.cta.shared.u32",),
         "ptx/ld_st.cuh:ld_acquire_cta_shared": ("ld.acquire.cta.shared.u32",),
         "ptx/ld_st.cuh:ld_relaxed_cta_shared": ("ld.relaxed.cta.shared.u32",),
         "mega_moe.cu:mega_moe": ("else __syncthreads();\n    const Launch l(params, s.launch);",
                                  "if (thread == 0) ptx::st_release_cta_shared(&s.plan_done, 1);"),
         "pipeline/5_combine.cuh:is_over": (
             "if (!ptx::ld_relaxed_cta_shared(&s.plan_done) && lane_id() == 0) s.watch_idle_since",),
         "pipeline/5_combine.cuh:combine": (
             "__syncwarp();\n        if (ptx::ld_relaxed_cta_shared(&s.watch_open[my_window()]))\n"
             "            break;",)},
        {"st_release_cta_shared": {"mega_moe", "combine"},
         "ld_acquire_cta_shared": {"permute_rows", "push_rows", "help_combine"},
         "ld_relaxed_cta_shared": {"is_over", "combine", "help_combine"}}),
    "items of an open window": Order(
        "watch_pending of an exchange warp's last window. Before math warps read it: st.release.cta of watch_open by "
        "the lane that stored it; each reading lane's own ld.acquire.cta of watch_open. Never stored again: the warp "
        "goes to no further window once one is open, and what is taken of it then is taken by atomics. The warp itself "
        "reads behind a warp barrier; is_over reads another word. racecheck does not follow flags.",
        ("pipeline/5_combine.cuh:combine",),
        ("ptx/ld_st.cuh:ld_relaxed_cta_shared",),
        {"pipeline/5_combine.cuh:combine": (
             "s.watch_pending[my_window()] = pending;\n            s.watch_idle_since[my_window()] = now_us();\n"
             "            if (next_window(l, s, my_window()) >= num_items(l))\n"
             "                ptx::st_release_cta_shared(&s.watch_open[my_window()], 1);\n        }\n"
             "        __syncwarp();",
             "if (ptx::ld_relaxed_cta_shared(&s.watch_open[my_window()]))\n            break;"),
         "pipeline/5_combine.cuh:help_combine": (
             "if (!__all_sync(~0u, ptx::ld_acquire_cta_shared(&s.watch_open[w]))) {\n                done = false;\n"
             "                continue;",)},
        {"ld_relaxed_cta_shared": {"is_over", "combine", "help_combine"}}),
    "names of a tile's rows": Order(
        "Before they are read: name_rows' warp barrier and its arrival on names_full, which every math warp waits "
        "for; the store warp comes behind those, by staging_full. Before the slot is written again, four tiles on: "
        "the readers' arrivals on tile_empty, the weights warp that waits for all of them, its arrival on tile_full, "
        "which name_rows waits for. racecheck does not follow an order through a third thread.",
        ("gemm/load_images.cuh:name_rows",),
        ("pipeline/3_swiglu.cuh:quantize_tokens_on_m", "pipeline/3_swiglu.cuh:quantize_split",
         "pipeline/4_linear2.cuh:send_rows_tokens_on_m", "pipeline/store.cuh:store_rows",
         "gemm/bias.cuh:add_bias_tokens_on_m", "gemm/bias.cuh:add_bias_weights_on_m"),
        {"gemm/bias.cuh:add_bias": (
             "if constexpr (C::kInExpertOrder) wait_mbarrier(&s.names_full[t.number % kTileSlots], ",),
         "gemm/load_images.cuh:name_rows": ("wait_mbarrier(&s.tile_full[slot], ",
                                            "mbarrier_arrive(&s.names_full[slot])",
                                            "mbarrier_arrive(&s.tile_empty[slot])"),
         "pipeline/2_linear1.cuh:compute_tiles": ("wait_mbarrier(&s.names_full[slot], ",
                                                  "mbarrier_arrive(&s.staging_full[group])",
                                                  "mbarrier_arrive(&s.tile_empty[slot])"),
         "pipeline/store.cuh:store_rows": ("++group) wait_mbarrier(&s.staging_full[group], parity);",),
         "pipeline/store.cuh:store_tiles": ("mbarrier_arrive(&s.tile_empty[slot.slot()])",),
         "gemm/load_weights.cuh:announce": ("wait_mbarrier(&s.tile_empty[number % kTileSlots], ",
                                            "mbarrier_arrive(&s.tile_full[number % kTileSlots])"),
         "mega_moe.cu:init_barriers": ("mbarrier_init(&s.tile_empty[i], kTileReaders)",)},
        {"add_bias_tokens_on_m": {"add_bias"}, "add_bias_weights_on_m": {"add_bias"}}),
    "scale factors of a stage": Order(
        "Before they are read: the copy's bytes complete tokens_full or weights_full, which each math warp waits for. "
        "Before the next copy into the stage: the values have come, for the first half's promotion has multiplied by "
        "them; then a warp barrier and an arrival on stage_empty of both CTAs (release_stage), and a loader waits for "
        "those of all 16 math warps of the cluster. racecheck does not follow arrivals that one lane makes for its "
        "warp at an address of the cluster. load_half_image, and pairs loaded by load_images, are of builds that split "
        "weight blocks, whose math warps read by other functions.",
        ("ptx/copy.cuh:bulk_load", "ptx/copy.cuh:bulk_load_hint", "ptx/copy.cuh:bulk_load_pair"),
        ("ptx/convert.cuh:ld_shared_f32",),
        {"gemm/mainloop.cuh:wait_stage": ("wait_mbarrier(&s.weights_full[slot], parity)",
                                          "wait_mbarrier(&s.tokens_full[slot], parity)"),
         "gemm/mainloop.cuh:accumulate_tokens_on_m": (
             "promote_half<kSecond, 0>(out.sum[0], acc, f);",
             "release_stage<C::kCluster>(&s.stage_empty[done], lane_id());"),
         "gemm/mainloop_sums.cuh:release_stage": (
             "__syncwarp();", "if (lane < kCluster) ptx::mbarrier_arrive_cluster(empty, lane);"),
         "gemm/load_images.cuh:load_images": ("wait_mbarrier(&s.stage_empty[stage.slot()], ",),
         "gemm/load_weights.cuh:load_weights": ("wait_mbarrier(&s.stage_empty[stage.slot()], ",),
         "mega_moe.cu:init_barriers": ("mbarrier_init(&s.stage_empty[i], kMathWarps * C::kCluster)",)},
        {"ld_shared_f32": {"read_scales"}, "bulk_load": {"load_half_image", "load_images", "load_linear2"},
         "bulk_load_hint": {"load_image"}, "bulk_load_pair": {"load_image", "load_images"}}),
    "announced tiles": Order(
        "A TileSlot. Before it is read: the weights warp's arrival on tile_full, which every lane of each reading "
        "role waits for. Before it is written again, four tiles on: each reading warp's barrier, then its lane 0's "
        "arrival on tile_empty, the last that the warp does with the tile; the weights warp waits for all of them. "
        "racecheck does not follow arrivals that one lane makes for its warp.",
        ("gemm/load_weights.cuh:announce", "sched/tickets.cuh:tile_of_ticket"),
        ("pipeline/2_linear1.cuh:compute_tiles", "gemm/mainloop.cuh:accumulate",
         "gemm/mainloop.cuh:accumulate_weights_on_m", "gemm/mainloop.cuh:accumulate_tokens_on_m",
         "gemm/mxfp4.cuh:accumulate_mxfp4", "gemm/mxfp4_split.cuh:accumulate_split",
         "pipeline/4_linear2.cuh:send_rows_tokens_on_m", "pipeline/store.cuh:store_tiles", "pipeline/store.cuh:store_h",
         "pipeline/store.cuh:store_h_half", "pipeline/store.cuh:store_rows", "pipeline/store.cuh:may_publish",
         "gemm/gather_tokens.cuh:gather_tokens", "gemm/gather_tokens.cuh:prepare", "gemm/gather_tokens.cuh:name_rows",
         "gemm/gather_tokens.cuh:wait_rows", "gemm/gather_tokens.cuh:load_linear1",
         "gemm/gather_tokens.cuh:load_linear2",
         "gemm/load_images.cuh:load_images", "gemm/load_images.cuh:wait_rows", "gemm/load_images.cuh:first_rows",
         "gemm/load_images.cuh:row_share", "gemm/load_images.cuh:name_rows",
         "gemm/bias.cuh:add_bias", "gemm/bias.cuh:tile_bias"),
        {"gemm/load_weights.cuh:announce": (
             "{\n    wait_mbarrier(&s.tile_empty[number % kTileSlots], (number / kTileSlots & 1) ^ 1);",
             "ptx::mbarrier_arrive(&s.tile_full[number % kTileSlots]);\n}"),
         "pipeline/2_linear1.cuh:compute_tiles": (
             "wait_mbarrier(&s.tile_full[next % kTileSlots], next / kTileSlots & 1);\n"
             "        const TileSlot& t = s.tiles[next % kTileSlots];",
             "__syncwarp();\n        next = number + 1;",
             "mbarrier_arrive(&s.staging_full[group]);\n            ptx::mbarrier_arrive(&s.tile_empty[slot]);\n"
             "        }\n    }\n}"),
         "pipeline/store.cuh:store_tiles": (
             "wait_mbarrier(&s.tile_full[slot.slot()], slot.consumer_parity());\n"
             "        const TileSlot& t = s.tiles[slot.slot()];",
             "__syncwarp();\n        if (lane == 0) ptx::mbarrier_arrive(&s.tile_empty[slot.slot()]);\n    }\n}"),
         "gemm/gather_tokens.cuh:prepare": (
             "wait_mbarrier(&s.tile_full[slot], number / kTileSlots & 1);\n"
             "        const TileSlot& t = s.tiles[slot];",),
         "gemm/gather_tokens.cuh:gather_tokens": (
             "wait_mbarrier(&s.tile_full[next % kTileSlots], next / kTileSlots & 1);\n"
             "        const TileSlot& t = s.tiles[next % kTileSlots];",
             "next = t.number + 1;\n        __syncwarp();\n"
             "        if (lane_id() == 0) ptx::mbarrier_arrive(&s.tile_empty[(next - 1) % kTileSlots]);\n    }\n}"),
         "gemm/load_images.cuh:load_images": (
             "wait_mbarrier(&s.tile_full[next % kTileSlots], next / kTileSlots & 1);\n"
             "        const TileSlot& t = s.tiles[next % kTileSlots];",
             "__syncwarp();\n        if (lane_id() == 0) ptx::mbarrier_arrive(&s.tile_empty[t.number % kTileSlots]);\n"
             "    }\n}"),
         "gemm/load_images.cuh:name_rows": (
             "wait_mbarrier(&s.tile_full[slot], next / kTileSlots & 1);\n        const TileSlot& t = s.tiles[slot];",
             "__syncwarp();\n        if (lane == 0) {\n            ptx::mbarrier_arrive(&s.names_full[slot]);\n"
             "            ptx::mbarrier_arrive(&s.tile_empty[slot]);\n        }\n    }\n}"),
         "mega_moe.cu:init_barriers": ("mbarrier_init(&s.tile_empty[i], kTileReaders)",)},
        {"announce": {"load_weights"}, "tile_of_ticket": {"announce"}, "store_h_half": {"store_tiles"},
         "first_rows": {"load_images", "row_share"}, "row_share": {"load_images", "wait_rows"},
         "accumulate_split": {"compute_tiles"}, "add_bias": {"compute_tiles"}, "tile_bias": {"add_bias"}}),
    "names of a tile's rows, gathered": Order(
        "Weights on M. Before they are read: name_rows' warp barrier, then lane 0's own arrival on tokens_full of the "
        "tile's first stage, in both tokens warps, which every math lane waits for, and before it adds a bias; the "
        "store warp comes behind those, by staging_full. Before the slot is written again, four tiles on: the readers' "
        "arrivals on tile_empty, the weights warp that waits for all of them, its arrival on tile_full, which prepare "
        "waits for. racecheck does not follow an order through a third thread.",
        ("gemm/gather_tokens.cuh:name_rows",),
        ("pipeline/3_swiglu.cuh:quantize_weights_on_m", "pipeline/store.cuh:store_rows",
         "gemm/bias.cuh:add_bias_weights_on_m"),
        {"gemm/gather_tokens.cuh:name_rows": (
             "s.tile_weights[slot][r] = weight;\n        }\n        __syncwarp();\n    }",),
         "gemm/gather_tokens.cuh:prepare": (
             "wait_mbarrier(&s.tile_full[slot], number / kTileSlots & 1);", "name_rows(t, slot);"),
         "gemm/gather_tokens.cuh:load_linear1": ("if (lane == 0) ptx::mbarrier_arrive(&s.tokens_full[stage.slot()]);",),
         "gemm/gather_tokens.cuh:load_linear2": ("ptx::mbarrier_arrive(full, kGatherArrivals);",
                                                 "ptx::mbarrier_arrive(full, kGatherArrivals - 1);"),
         "gemm/mainloop.cuh:wait_stage": ("wait_mbarrier(&s.tokens_full[slot], parity)",),
         "gemm/mainloop.cuh:accumulate_weights_on_m": ("wait_stage(s, stage.slot(), stage.consumer_parity());",),
         "gemm/mxfp4.cuh:accumulate_mxfp4": ("wait_mbarrier(&s.tokens_full[stage.slot()], stage.consumer_parity());",),
         "pipeline/2_linear1.cuh:compute_tiles": (
             "else accumulate(l, s, acc, stage, t);\n        if constexpr (kExtras) add_bias(l, s, acc, t);",
             "mbarrier_arrive(&s.staging_full[group])", "mbarrier_arrive(&s.tile_empty[slot])"),
         "pipeline/store.cuh:store_rows": ("++group) wait_mbarrier(&s.staging_full[group], parity);",),
         "pipeline/store.cuh:store_tiles": ("mbarrier_arrive(&s.tile_empty[slot.slot()])",),
         "gemm/load_weights.cuh:announce": ("wait_mbarrier(&s.tile_empty[number % kTileSlots], ",
                                            "mbarrier_arrive(&s.tile_full[number % kTileSlots])"),
         "mega_moe.cu:init_barriers": ("mbarrier_init(&s.tokens_full[i], C::kTokensArrivals)",
                                       "mbarrier_init(&s.tile_empty[i], kTileReaders)")},
        {"add_bias_weights_on_m": {"add_bias"}, "quantize_weights_on_m": {"swiglu_and_quantize"},
         "store_rows": {"store_tiles"}}),
    "tokens' scale factors of a stage, weights on M": Order(
        "Before they are read: each gathering lane's arrival on tokens_full when its copies have landed, or the bulk "
        "copy's bytes; every math lane waits for it. Before the next copy into the stage: both promotions, a warp "
        "barrier, lane 0's arrival on stage_empty (release_stage); every lane of the tokens warps waits for those of "
        "all math warps. racecheck does not follow arrivals that a copy makes, or one lane for its warp. Builds that "
        "split weight blocks (load_half_image) promote elsewhere.",
        ("ptx/copy.cuh:bulk_load", "ptx/copy.cuh:cp_async_4"),
        ("gemm/mainloop_sums.cuh:promote_weights_on_m",),
        {"gemm/gather_tokens.cuh:load_linear1": (
             "{\n            wait_mbarrier(&s.stage_empty[stage.slot()], stage.producer_parity());",
             "ptx::cp_async_arrive(&s.tokens_full[stage.slot()]);"),
         "gemm/gather_tokens.cuh:load_linear2": (
             "wait_mbarrier(&s.stage_empty[stage.slot()], stage.producer_parity());\n            __syncwarp();",
             "ptx::mbarrier_arrive_expect_tx(full, C::kHImageBytes);"),
         "gemm/mainloop.cuh:wait_stage": ("wait_mbarrier(&s.tokens_full[slot], parity)",),
         "gemm/mainloop.cuh:accumulate_weights_on_m": (
             "{\n        wait_stage(s, stage.slot(), stage.consumer_parity());",),
         "gemm/mainloop.cuh:accumulate_stage_weights_on_m": (
             "stage.tokens_sf, lane);\n    release_stage<C::kCluster>(empty, lane);\n}",),
         "gemm/mxfp4.cuh:accumulate_mxfp4": (
             "wait_mbarrier(&s.tokens_full[stage.slot()], stage.consumer_parity());",
             "wait_mbarrier(&s.tokens_full[next.slot()], next.consumer_parity());",
             "here.tokens_sf, lane);\n        release_stage<C::kCluster>(&s.stage_empty[stage.slot()], lane);\n"
             "        stage = next;\n    }"),
         "gemm/mainloop_sums.cuh:release_stage": ("__syncwarp();", "if (lane == 0) ptx::mbarrier_arrive(empty);"),
         "mega_moe.cu:init_barriers": ("mbarrier_init(&s.tokens_full[i], C::kTokensArrivals)",
                                       "mbarrier_init(&s.stage_empty[i], kMathWarps * C::kCluster)")},
        {"bulk_load": {"load_half_image", "load_images", "load_linear2"}, "cp_async_4": {"load_linear1"},
         "promote_weights_on_m": {"accumulate_stage_weights_on_m", "accumulate_mxfp4"}}),
    "weight image of a stage, weights on M": Order(
        "What the math warps read by themselves: scale factors, with MXFP4 the codes too. Before it: the copy's bytes "
        "complete weights_full, which every math lane waits for. Before the next copy into the stage: a warp barrier "
        "and lane 0's arrival on stage_empty (release_stage), behind all reads of the stage; the weights warp waits "
        "for those of all math warps. racecheck does not follow arrivals that a copy makes, or one lane for its warp. "
        "decode_half reads codes where they lie in the stage for decode_slab; decode hands it registers.",
        ("ptx/copy.cuh:bulk_load_hint",),
        ("gemm/mainloop.cuh:accumulate_stage_weights_on_m", "gemm/mxfp4.cuh:decode_slab",
         "gemm/mxfp4.cuh:decode_half", "gemm/mxfp4.cuh:accumulate_mxfp4"),
        {"gemm/load_weights.cuh:load_weights": (
             "wait_mbarrier(&s.stage_empty[stage.slot()], stage.producer_parity());\n            const u8* image",
             "else load_image(l, s, t, image, stage.slot());"),
         "gemm/load_weights.cuh:load_image": ("ptx::mbarrier_arrive_expect_tx(full, C::kImageCopyBytes);",),
         "gemm/mainloop.cuh:wait_stage": ("wait_mbarrier(&s.weights_full[slot], parity)",),
         "gemm/mainloop.cuh:accumulate_weights_on_m": (
             "{\n        wait_stage(s, stage.slot(), stage.consumer_parity());",),
         "gemm/mainloop.cuh:accumulate_stage_weights_on_m": (
             "promote_weights_on_m(out.sum[1], acc[1], kRegisters, low, high, stage.tokens_sf, lane);\n"
             "    release_stage<C::kCluster>(empty, lane);\n}",),
         "gemm/mxfp4.cuh:accumulate_mxfp4": (
             "wait_mbarrier(&s.weights_full[stage.slot()], stage.consumer_parity());\n"
             "    decode_slab(slab[0], s, s.stages[stage.slot()], 0, thread);",
             "wait_mbarrier(&s.weights_full[next.slot()], next.consumer_parity());\n"
             "            decode_slab(slab[0], s, s.stages[next.slot()], 0, thread);",
             "here.tokens_sf, lane);\n        release_stage<C::kCluster>(&s.stage_empty[stage.slot()], lane);\n"
             "        stage = next;\n    }"),
         "gemm/mainloop_sums.cuh:release_stage": ("__syncwarp();", "if (lane == 0) ptx::mbarrier_arrive(empty);"),
         "mega_moe.cu:init_barriers": ("mbarrier_init(&s.weights_full[i], 1)",
                                       "mbarrier_init(&s.stage_empty[i], kMathWarps * C::kCluster)")},
        {"bulk_load_hint": {"load_image"}, "decode_slab": {"accumulate_mxfp4"},
         "decode_half": {"decode_slab", "decode"}}),
    "half a weight image of a stage": Order(
        "Split weight blocks: codes, scales and base factors. Before they are read: the copies' bytes complete "
        "weights_full, which every math lane waits for. Before the next copy into the stage: codes and scales, read a "
        "stage ahead, are decoded before that stage is multiplied; then its chunks, a warp barrier and arrivals on "
        "stage_empty (release_stage), in a tile's last stage behind its base factors; the weights warp of this CTA, "
        "which alone writes there, waits for those of all math warps. racecheck does not follow arrivals that a copy "
        "makes, or one lane for its warp. Other callers of ld_shared_v4 read what no bulk load writes: the slice of "
        "staging that their warp has stored to (send_rows_tokens_on_m), their lane's cp.async (decode_image).",
        ("ptx/copy.cuh:bulk_load",),
        ("ptx/convert.cuh:ld_shared_v4", "ptx/convert.cuh:ld_shared_u16", "gemm/mxfp4_split.cuh:accumulate_split"),
        {"gemm/load_weights.cuh:load_weights": (
             "wait_mbarrier(&s.stage_empty[stage.slot()], stage.producer_parity());\n            const u8* image",
             "if constexpr (C::kSplitsWeights) load_half_image(l, s, image, stage.slot(),"),
         "gemm/load_weights.cuh:load_half_image": ("ptx::mbarrier_arrive_expect_tx(full, 2 * kPieceBytes + kTail);",),
         "gemm/mxfp4_split.cuh:run": (
             "wait_mbarrier(&s.weights_full[stage.slot()], stage.consumer_parity());\n        LaneCodes first;",
             "decode(slab[0], first, half, row);\n        wait_mbarrier(&s.tokens_full"),
         "gemm/mxfp4_split.cuh:step": (
             "u64* empty = &s.stage_empty[stage.slot()];",
             "wait_mbarrier(&s.weights_full[stage.slot()], stage.consumer_parity());\n"
             "            read_codes(next_codes);",
             "if (!kLast && j + 1 == kChunks) release_stage<C::kCluster>(empty, lane_id());",
             "decode(slab[kSlab ^ 1], next_codes, 0, row);\n"
             "                if (kChunks == 2) decode(slab[kSlab ^ 1], next_codes, 1, row);",
             "if (!kLast && j == 1 && kChunks > 2) decode(slab[kSlab ^ 1], next_codes, 1, row);"),
         "gemm/mxfp4_split.cuh:accumulate_split": (
             "high = second ? low : last.weights_sf[1];\n"
             "    release_stage<C::kCluster>(&s.stage_empty[stage.slot()], lane);",),
         "gemm/mainloop_sums.cuh:release_stage": (
             "__syncwarp();", "if (lane < kCluster) ptx::mbarrier_arrive_cluster(empty, lane);"),
         "mega_moe.cu:init_barriers": ("mbarrier_init(&s.weights_full[i], 1)",
                                       "mbarrier_init(&s.stage_empty[i], kMathWarps * C::kCluster)")},
        {"bulk_load": {"load_half_image", "load_images", "load_linear2"}, "load_half_image": {"load_weights"},
         "ld_shared_v4": {"read_codes", "send_rows_tokens_on_m", "decode_image"}, "ld_shared_u16": {"read_codes"},
         "read_codes": {"run", "step"}, "accumulate_split": {"compute_tiles"}}),
    "tokens' scale factors of a stage, split weight blocks": Order(
        "Before they are read: the bytes of both CTAs' copies complete tokens_full, which every math lane waits for a "
        "chunk before. Before the next copies into the stage: the loads stand before the last chunk's products are "
        "waited for; then a warp barrier and an arrival on stage_empty of both CTAs (release_stage), and the tokens "
        "warp of either waits for those of all 16 math warps. The last chunk's factors are multiplied later: for the "
        "other CTA's copies the arrival keeps behind their loads as ptx/mbarrier.cuh says of mbarrier_arrive_cluster. "
        "racecheck does not follow arrivals that one lane makes for its warp at an address of the cluster.",
        ("ptx/copy.cuh:bulk_load_pair",),
        ("ptx/convert.cuh:ld_shared_v2_f32",),
        {"gemm/load_images.cuh:load_images": (
             "wait_mbarrier(&s.stage_empty[stage.slot()], stage.producer_parity());",
             "ptx::mbarrier_arrive_expect_tx(full, 2 * count * (kKBlock + 4));"),
         "gemm/mxfp4_split.cuh:run": (
             "wait_mbarrier(&s.tokens_full[stage.slot()], stage.consumer_parity());\n"
             "        u32 tokens = tokens_of_stage();",),
         "gemm/mxfp4_split.cuh:step": (
             "sf_at = ptx::shared_address(s.stages[stage.slot()].tokens_sf) + sf_lane;\n"
             "        u64* empty = &s.stage_empty[stage.slot()];",
             "if (!kLast && j + 1 == kChunks) {\n                next_tokens = tokens_of_stage();\n"
             "                wait_mbarrier(&s.tokens_full[stage.slot()], stage.consumer_parity());",
             "ptx::wgmma_wait<0>();\n            ptx::wgmma_fence_operands(acc);\n"
             "            if (!kLast && j + 1 == kChunks) release_stage<C::kCluster>(empty, lane_id());"),
         "gemm/mxfp4_split.cuh:accumulate_split": (
             "release_stage<C::kCluster>(&s.stage_empty[stage.slot()], lane);\n    stage.advance();",),
         "gemm/mainloop_sums.cuh:release_stage": (
             "__syncwarp();", "if (lane < kCluster) ptx::mbarrier_arrive_cluster(empty, lane);"),
         "mega_moe.cu:init_barriers": ("mbarrier_init(&s.tokens_full[i], C::kTokensArrivals)",
                                       "mbarrier_init(&s.stage_empty[i], kMathWarps * C::kCluster)")},
        {"bulk_load_pair": {"load_image", "load_images"}, "ld_shared_v2_f32": {"step"}}),
    "row maxima of the other CTA": Order(
        "partner_amax, written by the other CTA. Before it is read: that warp's barrier and its lane 0's "
        "arrive.release.cluster on amax_full, which every reading thread waits for with acquire.cluster. Before it is "
        "written again, two linear1 tiles on: the reader's warp arrives on the other CTA's amax_full of the tile "
        "between, behind its read, and every writer has waited for all of those. amax_turn, which tells the tiles "
        "apart, changes between two barriers of all math warps. racecheck does not follow arrivals that one lane makes "
        "for its warp at an address of the cluster. Other callers of st_shared_cluster write other words.",
        ("ptx/mbarrier.cuh:st_shared_cluster",),
        ("pipeline/3_swiglu.cuh:largest_of_pair",),
        {"pipeline/3_swiglu.cuh:largest_of_pair": (
             "turn = s.amax_turn, buffer = turn % 2, other = l.cta % 2 ^ 1;",
             "other, __float_as_uint(amax));\n    __syncwarp();\n    if (token % 32 == 0) "
             "ptx::mbarrier_arrive_release_cluster(&s.amax_full[buffer], other);\n"
             "    wait_mbarrier_acquire_cluster(&s.amax_full[buffer], turn / 2);\n"
             "    return fmaxf(amax, __uint_as_float(s.partner_amax[buffer][token]));"),
         "pipeline/3_swiglu.cuh:quantize_split": (
             "ptx::named_barrier_sync<kBarrierMath, kMathWarps * 32>();\n    f32* sf",
             "if (thread < C::kBlockTokens) {", "row = largest_of_pair(l, s, row, thread);",
             "ptx::named_barrier_sync<kBarrierMath, kMathWarps * 32>();\n"
             "    if (thread == 0) s.amax_turn = (s.amax_turn + 1) % 4;"),
         "ptx/mbarrier.cuh:mbarrier_arrive_release_cluster": ("mbarrier.arrive.release.cluster.shared::cluster.b64",),
         "ptx/mbarrier.cuh:mbarrier_try_wait_acquire_cluster": ("mbarrier.try_wait.parity.acquire.cluster",),
         "mega_moe.cu:init_barriers": ("ptx::mbarrier_init(&full, C::kBlockTokens / 32);",)},
        {"st_shared_cluster": {"agree_in_cluster", "take", "largest_of_pair"}, "largest_of_pair": {"quantize_split"},
         "quantize_split": {"swiglu_and_quantize"}}),
    "what the last barrier tells": Order(
        "is_last_cta and aborted: written by thread 0 between two barriers of all threads, once a launch, and read "
        "after the second. Why racecheck reports it, which knows such barriers elsewhere, is not known.",
        ("pipeline/exit.cuh:leave",),
        ("pipeline/exit.cuh:leave",),
        {"pipeline/exit.cuh:leave": (
             "else __syncthreads();\n    if (thread == 0) {\n        ptx::fence_acq_rel_gpu();\n"
             "        s.is_last_cta = ",
             "s.aborted = ptx::ld_relaxed_sys(l.abort_word(l.me.ep_rank));\n    }\n    __syncthreads();\n"
             "    if (!s.is_last_cta) return;")},
        {"leave": {"mega_moe"}}),
}  # fmt: skip
