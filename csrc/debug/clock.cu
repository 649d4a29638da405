// The GPU's clock beside the host's: one thread answers each number that the host writes into page-locked memory with
// its own time. Launched by megamoe/trace_clock.py, which reads both clocks.
#include "ptx/ld_st.cuh"

struct ClockParams {
    const u32* asked;  // the host writes 1, 2, ... rounds
    u64* answers;      // nanoseconds, one a round; 0 before
    u64 deadline_ns;   // after which the thread leaves: a host that has gone must not leave the GPU busy
    u32 rounds;
};

extern "C" __global__ void __launch_bounds__(1) clock_answers(const __grid_constant__ ClockParams p) {
    const u64 end = moe::ptx::globaltimer_ns() + p.deadline_ns;
    for (u32 n = 0; n < p.rounds; ++n) {
        u64 now;
        do {
            now = moe::ptx::globaltimer_ns();
            if (now > end) return;
        } while (moe::ptx::ld_relaxed_sys(p.asked) <= n);
        moe::ptx::st_relaxed_sys(p.answers + n, moe::ptx::globaltimer_ns());  // one word: nothing to order
    }
}
