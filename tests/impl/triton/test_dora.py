"""DoRA by Triton's kernels, beside the parity suite: norms, launches, the order of sums."""

from dataclasses import asdict, replace
from itertools import product

import pytest
import torch

from lora_kernels.impl.triton.plan.config import TILES_DORA
from lora_kernels.operands.call import Adapter, LinearCall
from lora_kernels.operands.dora import DoraCall
from lora_kernels.operands.weight import Dense
from lora_kernels.registration import operators
from lora_kernels.testing import DORA, DoraCase
from lora_kernels.testing.dora import dora_call
from tests.support.executors import (
    Machine,
    executors,
    fixed_library,
    fixed_plan,
    needs_compiler,
    needs_machine,
    running,
)
from tests.support.layouts import LAYOUTS, laid_out

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TRITON = operators("lora_dora_linear", "triton")


def norms(call, rows=None):
    """Return n of a call's rows, of an x of so many rows, by default of none or one."""
    weight = call.weight.decode()
    rows = int(weight.shape[0] % 2) if rows is None else rows
    x, magnitude = weight.new_zeros(rows, weight.shape[1]), weight.new_ones(weight.shape[0])
    return TRITON.forward(x, *DoraCall(call, magnitude).flat())[3]


@pytest.mark.many
@pytest.mark.parametrize("own", [False, True], ids=["library", "own"])
@pytest.mark.parametrize("left", [1.0, 0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("executor", executors())
def test_the_norm_of_rows_that_cancel(executor, left, own):
    """W = -s B A but for a part `left` of it, which a sum of ‖w‖² and others would lose.

    By own products the forward launch makes it, of 16 bits, before 65 rows of x.
    """
    number = int(-torch.tensor(left).log10().round())
    dtype, r, k = ((FP32, 5, 129), (FP16, 16, 200), (FP32, 96, 64), (FP16, 3, 33))[number]
    adapters = FP32 if number == 3 else dtype
    dtype = FP16 if own else dtype
    plan = fixed_plan() if own else fixed_library()
    with running(executor(plan=plan)):
        a, b = torch.randn(r, k).to(adapters), torch.randn(40 + number, r).to(adapters)
        update = 1.7 * (b.double() @ a.double())
        weight = (left * update.roll(1, 0) - update).to(dtype)
        exact = (weight.double() + update).norm(dim=1)
        n = norms(LinearCall(Dense(weight), Adapter(a, b, 1.7), None, None), 65 if own else None)
    limit = 1e-5 + 4 * torch.finfo(FP32).eps * (update.norm(dim=1) / exact)
    error = (n.double() - exact).abs() / exact
    assert (error < limit).all(), (error.max(), left)


@needs_machine
@pytest.mark.many
@pytest.mark.parametrize(("target", "r"), [(80, 256), (90, 96), (100, 64)])
def test_the_norm_of_large_ranks_and_strided_weights(r, target):
    """A and B wider than W or of its type; W by columns, or rows apart."""
    dtype = FP32 if target == 90 else BF16
    with running(Machine(target)):
        a, b = torch.randn(r, 264, dtype=dtype), torch.randn(70, r, dtype=dtype)
        wide = torch.randn(70, 300, dtype=BF16)
        for weight in (wide[:, 4:268], wide[:, :264].t().contiguous().t()):
            call = LinearCall(Dense(weight), Adapter(a, b, torch.tensor(0.3)), None, None)
            exact = (weight.double() + 0.3 * (b.double() @ a.double())).norm(dim=1)
            torch.testing.assert_close(norms(call).double(), exact, rtol=1e-5, atol=0)


@needs_machine
def test_tf32_leaves_the_norm_alone():
    previous = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        a, b = torch.randn(16, 264), torch.randn(70, 16)
        call = LinearCall(Dense(-(b @ a) * 0.99), Adapter(a, b, 1.0), None, None)
        exact = (call.weight.decode().double() + b.double() @ a.double()).norm(dim=1)
        with running(Machine(80)):
            torch.testing.assert_close(norms(call).double(), exact, rtol=1e-4, atol=0)
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous


WANTED = [("dx",), ("da",), ("db",), ("dbias",), ("dm",), ("dx", "dm"), ("da", "db", "dbias")]


@needs_machine
@pytest.mark.many
@pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("index", range(len(WANTED)))
def test_only_the_gradients_asked_for_of_strided_tensors(index, p):
    wanted, layout = WANTED[index], LAYOUTS[(index + (p > 0)) % len(LAYOUTS)]
    case = DoraCase((2, 35), 72, 129 + 7 * (index % 2), 5, BF16, dropout_p=p)
    inputs = DORA.inputs(case)
    for name in ("bias", "magnitude"):
        t = getattr(inputs, name)
        setattr(inputs, name, torch.stack([t, t + 1], -1)[..., 0])
    inputs = laid_out(inputs, layout)
    with running(Machine(90 if p else 80, resident=3)):
        actual = DORA.call(case, inputs, "triton", wanted)
        assert actual.keys() == {"y", *wanted}
        DORA.assert_results(case, inputs, actual, "triton")


TILES = [*product(TILES_DORA, (0, 1))]


@needs_machine
@pytest.mark.many
@pytest.mark.parametrize("index", range(len(TILES)))
@pytest.mark.parametrize("target", [80, 90])
def test_every_shipped_tile(target, index):
    """Each in one launch and in two; the backward pass takes it too."""
    config, xa_columns = TILES[index]
    if target != 90 and config.block_n > 128:
        pytest.skip("tiles of 256 columns are sm_90's")
    fields = asdict(config) | {"xa_columns": xa_columns, "descriptors": target > 80}
    dtype, adapters = ((BF16, FP32), (FP16, FP16), (BF16, BF16))[index % 3]
    case = DoraCase((150,), 280, 264, (16, 5, 64)[index % 3], dtype, adapters, bias=index % 2 == 0)
    with running(Machine(target, resident=5, seed=index, plan=fixed_plan(segment=64, **fields))):
        DORA.assert_parity(case, DORA.inputs(case), "triton")


@needs_machine
@pytest.mark.many
@pytest.mark.parametrize(("target", "p"), [(80, 0.0), (90, 0.0), (80, 0.1)])
def test_same_bits_whatever_the_schedule(target, p):
    """Sums over rows are of five segments; without dropout by own products, xa of two parts."""
    case = DoraCase((300,), 136, 72, 5, BF16, FP32, p)
    own = fixed_plan(segment=64, xa_columns=2, descriptors=target > 80)
    inputs, runs, plan = DORA.inputs(case), [], fixed_library() if p else own
    for resident, seed in ((5, 1), (3, 2), (9, 3)):
        with running(Machine(target, resident, seed, plan=plan)) as machine:
            runs.append(DORA.call(case, inputs, "triton"))
        assert not machine.workspace.zeros(1, torch.device("cpu")).any()
    DORA.assert_results(case, inputs, runs[0], "triton")
    for other in runs[1:]:
        for name, expected in runs[0].items():
            assert torch.equal(other[name], expected), f"other bits of {name}"


@pytest.mark.many
@needs_machine
@pytest.mark.parametrize("resident", [1, 2, 3, 17])
@pytest.mark.parametrize("target", [80, 90])
def test_any_number_of_running_programs_makes_norms_and_goes_on(target, resident):
    """Of as many as the plan launches; on weak memory, by several schedules, on one workspace."""

    class Fewer(Machine):
        def programs(self, device):
            return 17

    machine = Fewer(target, resident, weak=1)
    case = DoraCase((150,), 200, 136, 16, BF16)
    for xa_columns in range(min(resident, 2) + 1):
        machine.plan = fixed_plan(xa_columns=xa_columns, descriptors=target > 80)
        for machine.seed in range(2):
            with running(machine):
                DORA.assert_parity(case, DORA.inputs(case), "triton")
        assert not machine.workspace.zeros(1, torch.device("cpu")).any()


@needs_machine
@pytest.mark.parametrize("target", [80, 90])
def test_one_launch_reads_and_writes_what_it_must_and_no_more(target):
    """To the byte: x, W, A, B and magnitude are read once, y, u, xa and n written, all by one."""
    m, n, k, r = 192, 128, 128, 16
    case = DoraCase((m,), n, k, r, BF16, bias=False)
    with running(Machine(target, plan=fixed_plan(descriptors=target > 80))) as machine:
        inputs = DORA.inputs(case)
        call = dora_call(case, inputs)
        TRITON.forward(inputs.x, *call.flat())
    (stats,) = machine.stats
    written = 2 * (2 * m * n + m * r) + 4 * n
    read = 2 * (m * k + n * k + r * (n + k) + n) + 2 * m * r + 4 * n  # xa and n by others
    flags = 4 * (3 + 2)
    assert sum(each["written"] for each in stats.buffers.values()) == written + flags
    assert sum(each["read"] for each in stats.buffers.values()) == read + flags
    if target == 80:
        assert stats.mma_flops == 2 * (m * n * k + r * (m * k + m * n + n * k))


@pytest.mark.many
@pytest.mark.parametrize("executor", executors())
def test_the_start_is_the_base_layer(executor):
    """g is 1 where the magnitude is the norm, whoever summed it; B is zero."""
    for own, plan in enumerate((fixed_library(), fixed_plan())):
        with running(executor(plan=plan)):
            x, weight = torch.randn(9, 72).half(), torch.randn(33, 72).half()
            a, b, bias = torch.randn(4, 72), torch.zeros(33, 4), torch.randn(33).half()
            call = LinearCall(Dense(weight), Adapter(a, b, 2.0), None, None)
            magnitude = weight.float().norm(dim=1)
            y, _, u, _ = TRITON.forward(x, *DoraCall(call, magnitude).flat())
            assert torch.equal(y, u)
            call = call._replace(bias=bias)
            y = TRITON.forward(x, *DoraCall(call, magnitude).flat())[0]
            linear = operators("lora_linear", "triton").forward(x, *call.flat())[0]
            assert torch.equal(y, linear if own else u + bias)


@needs_machine
def test_a_row_without_length_has_no_finite_gain():
    """As in PEFT: magnitude / 0."""
    x, weight, a, b = torch.ones(1, 2), torch.eye(2), torch.ones(1, 2), torch.zeros(2, 1)
    weight[0] = 0
    call = DoraCall(LinearCall(Dense(weight), Adapter(a, b, 1.0), None, None), torch.ones(2))
    with running(Machine(80)):
        y = TRITON.forward(x, *call.flat())[0]
    assert y[0, 0].isnan()
    assert y[0, 1] == 1


FORWARD = {
    False: ["norm", "shrink", "expand", "product", "rescale"],
    True: ["norm", "shrink", "expand", "product", "product", "rescale"],
}
BACKWARD = {
    False: ["dz_pass", "dy_pass", "x_pass", "product"],
    True: ["dz_pass", "dy_pass", "product", "x_pass", "product"],
}
NEEDS = {
    (True, True, True, True): BACKWARD,
    (True, False, False, False): BACKWARD,
    (False, True, True, False): dict.fromkeys(BACKWARD, BACKWARD[False][:3]),
    (False, False, True, False): dict.fromkeys(BACKWARD, BACKWARD[False][:2]),
    (False, False, False, True): dict.fromkeys(BACKWARD, BACKWARD[False][:1]),
}


@needs_compiler
@pytest.mark.parametrize("dropout", [False, True], ids=["p0", "p"])
def test_launches_of_the_library_plan(dropout):
    """None waits for other programs."""
    for needs, expected in (None, FORWARD), *NEEDS.items():
        made = _recorded(needs, dropout, None)
        assert [name for name, _ in made] == expected[dropout]
        assert all(together == 1 for _, together in made)


@needs_compiler
def test_own_products_take_one_launch_forward_and_two_backward():
    """The split path one more each, and dbias alone the pass over dy."""
    one, split = TILES_DORA[1], replace(TILES_DORA[1], xa_columns=0)
    for config, more in ((one, []), (split, ["shrink"])):
        names = [name for name, _ in _recorded(None, False, config)]
        assert names == [*more, "forward"]
        names = [name for name, _ in _recorded((True, True, True, True), False, config)]
        assert names == ["dz_pass", *more, "backward"]
    assert [name for name, _ in _recorded((False, False, False, True), False, one)] == ["dz_pass"]


@needs_compiler
def test_with_dropout_the_library_serves():
    names = [name for name, _ in _recorded(None, True, TILES_DORA[1])]
    assert names == FORWARD[True]


def _recorded(needs, dropout, config):
    """Return the launches of a call by name, and how many programs of each must run together."""
    from lora_kernels.impl.triton.plan.config import Problem, library_config
    from lora_kernels.impl.triton.plan.device import known
    from lora_kernels.impl.triton.tools.record import Launch, calls

    problem = Problem(512, 256, 384, 16, 16, dropout, gain=True)
    if needs is not None:
        problem = problem._replace(backward=True, needs=needs)
    made = calls(
        problem, config or library_config(problem), known("NVIDIA A100-SXM4-80GB"), memory="meta"
    )
    return [
        (call.kernel.__name__.removesuffix("_kernel"), call.how.together)
        if isinstance(call, Launch)
        else ("product", 1)
        for call in made
    ]
