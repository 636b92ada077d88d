"""Device functions: how programs wait for each other."""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments


@triton.jit
def publish(flag):
    """Make this program's stores visible to whoever waits on the flag."""
    # Each thread stored its part: all must have done so before one of them releases.
    tl.debug_barrier()
    tl.atomic_add(flag, 1, sem="release")


@triton.jit
def wait(flag, ARRIVALS: tl.constexpr):
    """Wait until ARRIVALS programs have published.

    The kernel ends by an error where that has lasted for about half a minute: far longer than any
    launch, so that they will never come.
    """
    if arguments.INTERPRETED:
        while tl.atomic_add(flag, 0, sem="acquire") < ARRIVALS:
            pass
    else:
        # One thread asks, the others stay at the barrier: no issue slots, no traffic.
        tl.inline_asm_elementwise(
            """{
            .reg .pred other, early, late;
            .reg .b32 thread, seen, began, now;
            mov.u32 thread, %tid.x;
            setp.ne.u32 other, thread, 0;
            @other bra arrived;
            mov.u32 began, %globaltimer_hi;
            bra ask;
            sleep:
            nanosleep.u32 50;
            mov.u32 now, %globaltimer_hi;
            sub.u32 now, now, began;
            setp.gt.u32 late, now, 7;
            @late trap;
            ask:
            ld.acquire.gpu.global.b32 seen, [$1];
            setp.lt.s32 early, seen, $2;
            @early bra sleep;
            arrived:
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [flag, ARRIVALS],
            tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()


@triton.jit
def leave(flag, last):
    """Count a consumer out; the last one, who finds `last` there, leaves a zero behind."""
    tl.debug_barrier()
    if arguments.INTERPRETED:
        if tl.atomic_add(flag, 1, sem="acq_rel") == last:
            tl.atomic_xchg(flag, 0, sem="relaxed")
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred first, last;
            .reg .b32 thread, seen;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first atom.acq_rel.gpu.global.add.u32 seen, [$1], 1;
            setp.eq.and.u32 last, seen, $2, first;
            @last st.relaxed.gpu.global.u32 [$1], 0;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [flag, last],
            tl.int32,
            is_pure=False,
            pack=1,
        )
