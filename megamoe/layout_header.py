"""The C++ side of layout.py: its constants, words and structs as `csrc/params.gen.cuh`."""

import ctypes
from collections.abc import Sequence

from megamoe import layout
from megamoe.plan import tiles

CPP_TYPES = {ctypes.c_uint64: "u64", ctypes.c_uint32: "u32", ctypes.c_float: "f32"}


def _render_struct(struct: type[ctypes.Structure]) -> str:
    lines, checks = [], []
    for name, ctype in struct._fields_:
        if hasattr(ctype, "_length_"):
            element = ctype._type_
            text = CPP_TYPES.get(element, element.__name__)
            lines.append(f"    {text} {name}[{ctype._length_}];")
        else:
            lines.append(f"    {CPP_TYPES[ctype]} {name};")
        checks.append(f"static_assert(MOE_OFFSETOF({struct.__name__}, {name}) == {getattr(struct, name).offset});")
    checks.append(f"static_assert(sizeof({struct.__name__}) == {ctypes.sizeof(struct)});")
    return f"struct {struct.__name__} {{\n" + "\n".join(lines) + "\n};\n" + "\n".join(checks) + "\n"


def _render_enum(name: str, words: Sequence[str]) -> str:
    return f"enum {name} : u32 {{\n" + "".join(f"    k{name}_{w},\n" for w in words) + "};\n"


def render_header() -> str:
    """The text of `csrc/params.gen.cuh`. A test keeps the file fresh."""
    out = [
        "// clang-format off\n"
        "// Generated from megamoe/layout.py by `python -m megamoe layout --write-header`. Do not edit.\n#pragma once\n"
        '#include "prelude.cuh"\n\nnamespace moe {\n'
    ]
    constants = (
        ("kMaxEpSize", layout.MAX_EP_SIZE),
        ("kMaxVirtualRanks", layout.MAX_VIRTUAL_RANKS),
        ("kMaxTopk", layout.MAX_TOPK),
        ("kMaxLocalExperts", layout.MAX_LOCAL_EXPERTS),
        ("kHeadSliceTokens", layout.HEAD_SLICE_TOKENS),
        ("kHeadTokensBits", layout.HEAD_TOKENS_BITS),
        ("kHeadLayerBits", layout.HEAD_LAYER_BITS),
        ("kChoicePasses", layout.CHOICE_PASSES),
        ("kReplicaHeaderWords", layout.REPLICA_HEADER_WORDS),
        ("kMaxLogicalExperts", layout.MAX_LOGICAL_EXPERTS),
        ("kMaxCopies", layout.MAX_COPIES),
        ("kNumThreads", layout.NUM_THREADS),
        ("kExchangeWarps", layout.EXCHANGE_WARPS),
        ("kCombineStep", tiles.COMBINE_STEP),
        ("kKBlock", layout.K_BLOCK),
        ("kNBlock", layout.N_BLOCK),
        ("kFp8ImageSfOffset", layout.IMAGE_SF_OFFSET),
        ("kFp8ImageCopyBytes", layout.IMAGE_COPY_BYTES),
        ("kTraceRecords", layout.TRACE_RECORDS),
        ("kNumTraceRoles", len(layout.TRACE_ROLES)),
        ("kNumRegions", len(layout.REGIONS)),
        ("kFp8ImagePitchBytes", layout.IMAGE_PITCH_BYTES),
        ("kMxfp4ScalesOffset", layout.MXFP4_SCALES_OFFSET),
        ("kMxfp4ImageSfOffset", layout.MXFP4_IMAGE_SF_OFFSET),
        ("kMxfp4ImageCopyBytes", layout.MXFP4_IMAGE_COPY_BYTES),
        ("kMxfp4ImagePitchBytes", layout.MXFP4_IMAGE_PITCH_BYTES),
    )
    out.append("".join(f"constexpr u32 {name} = {value};\n" for name, value in constants))
    enums = (
        ("Role", layout.ROLES),
        ("Step", layout.STEPS),
        ("Code", layout.CODES),
        ("Trace", layout.TRACE_ROLES),
        ("Event", layout.TRACE_EVENTS),
        ("Choice", layout.CHOICES),
        ("Fault", layout.FAULT_POINTS),
        ("Region", [region.name for region in layout.REGIONS]),
    )
    out += [_render_enum(name, words) for name, words in enums]
    out += [_render_struct(s) for s in (layout.RankParams, layout.RankBiases, layout.KernelParams, layout.KernelStatus)]
    out.append("}  // namespace moe\n")
    return "\n".join(out)
