"""The floor of counts: a plain Triton product in the same tiles, with run-time sizes."""

import triton
import triton.language as tl


@triton.jit
def plain_gemm(
    u, v, out, M, N, K, stride_u, stride_vn, stride_vk, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute out [M, N] = u [M, K] vᵀ with v [N, K] by strides; one tile a program."""
    tile = tl.program_id(0)
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * columns) * GROUP
    high = tl.minimum(rows - first, GROUP)
    row = first + tile % (GROUP * columns) % high
    column = tile % (GROUP * columns) // high
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    u_pointers = u + (m % M)[:, None] * stride_u + k[None, :]
    v_pointers = v + (n % N)[None, :] * stride_vn + k[:, None] * stride_vk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        inside = k < K - step * BLOCK_K
        u_tile = tl.load(u_pointers, mask=inside[None, :], other=0.0)
        v_tile = tl.load(v_pointers, mask=inside[:, None], other=0.0)
        acc = tl.dot(u_tile, v_tile, acc)
        u_pointers += BLOCK_K
        v_pointers += BLOCK_K * stride_vk
    pointers = out + m[:, None] * stride_out + n[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
