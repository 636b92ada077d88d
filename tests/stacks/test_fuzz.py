"""Fuzzing: the public function against its oracle, sequences of changes to a model against PEFT.

LORA_KERNELS_FUZZ=10000 sets the number of cases; LORA_KERNELS_TEST_SEED, printed, repeats them.
"""

import copy
import os
import pickle
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import stateful
from hypothesis import strategies as st
from torch import nn

import lora_kernels as lk
from lora_kernels.dispatch import IMPLEMENTATIONS
from lora_kernels.operands.request import Request
from lora_kernels.testing import Case, make_inputs, reference_results, run
from tests.conftest import SEED
from tests.stacks.models import gradients, peft, randomize
from tests.support.closeness import assert_close

CASES = int(os.environ.get("LORA_KERNELS_FUZZ", "200"))
assert CASES > 0, f"LORA_KERNELS_FUZZ: expected a number of cases, got {CASES}"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
settings = hypothesis.settings(
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
    # Not "explain", which takes minutes.
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
)
sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 64, 65, 130]))
cases = st.builds(
    Case,
    leading=st.lists(st.one_of(st.integers(0, 5), sizes), max_size=2).map(tuple),
    n=sizes,
    k=sizes,
    r=st.one_of(st.integers(1, 20), st.sampled_from([32, 64, 70])),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from([None, None, torch.float32]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.9, 1e-5]),
    bias=st.booleans(),
    scaling=st.sampled_from([1.7, 0.25, -2.0]),
)
layouts = st.sampled_from(["plain", "transposed", "strided", "offset"])


def laid_out(t, layout):
    """Return a tensor of the same values whose memory lies otherwise."""
    if layout == "transposed" and t.ndim > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and t.ndim:
        return torch.stack([t, t], -1)[..., 0]
    if layout == "offset":
        room = t.new_zeros(t.numel() + 1)
        return room[1:].view(t.shape).copy_(t)
    return t


@hypothesis.seed(SEED)
@hypothesis.settings(settings, max_examples=CASES)
@hypothesis.given(cases, st.integers(0, 2**31), st.data())
def test_the_function_computes_what_its_oracle_does(case, seed, data):
    torch.manual_seed(seed)
    inputs = make_inputs(case)
    for name in ("x", "weight", "lora_A", "lora_B", "bias", "dy"):
        if getattr(inputs, name) is not None:
            setattr(inputs, name, laid_out(getattr(inputs, name), data.draw(layouts, name)))
    # By parameters' absolute values the formulas give what roundings are relative to, per element.
    absolute = replace(inputs)
    for name in ("x", "weight", "lora_A", "lora_B", "bias", "dy"):
        if getattr(inputs, name) is not None:
            setattr(absolute, name, getattr(inputs, name).abs())
    oracle = reference_results(case, inputs, torch.float64)
    positive = replace(case, scaling=abs(case.scaling))
    largest = reference_results(positive, absolute, torch.float64)
    request = Request("lora_linear", inputs.x.device, case.dtype, case.r, case.dropout_p > 0)
    for implementation in IMPLEMENTATIONS:
        if implementation.refuse(request) is None:
            for what, result in run(case, inputs, implementation.name).items():
                coarser = torch.finfo(
                    max(case.dtype, result.dtype, key=lambda d: torch.finfo(d).eps)
                )
                # Sums of wide dtypes round at each term; those of 16 bits are float32's. Products
                # of float16 may lie where its steps are no more relative.
                roundings = 4 if coarser.bits == 16 else 16
                budget = coarser.eps * (roundings * largest[what] + 128 * coarser.smallest_normal)
                error = (result.double() - oracle[what]).abs()
                # A NaN is no smaller than anything.
                assert (error <= budget).all(), (implementation.name, what)


SPOILED = {
    "shape": lambda t: t.new_zeros([*t.shape[:-1], t.shape[-1] + 1]),
    "dtype": lambda t: t.to(torch.int32),
    "device": lambda t: t.to("meta"),
    "type": lambda t: t.tolist(),
}


@hypothesis.seed(SEED)
@hypothesis.settings(settings, max_examples=CASES)
@hypothesis.given(
    cases, st.sampled_from(["weight", "lora_A", "lora_B", "bias"]), st.sampled_from(list(SPOILED))
)
def test_one_wrong_argument_is_named(case, name, how):
    inputs = make_inputs(case)
    arguments = {n: getattr(inputs, n) for n in ("x", "weight", "lora_A", "lora_B", "bias")}
    if arguments[name] is None:
        arguments[name] = torch.zeros(case.n, dtype=case.dtype)
    arguments[name] = SPOILED[how](arguments[name])
    with pytest.raises((TypeError, ValueError)) as raised:
        lk.lora_linear(**arguments)
    # Of two shapes that don't fit each other either may be called the wrong one.
    named = str(raised.value).split(":")[0].split(".")[0]
    assert named == name or (how == "shape" and named in arguments), raised.value


class Net(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6, bias=bias)

    def forward(self, x):
        return self.down(self.up(x).tanh())


NAMES = ("default", "second", "third")


class Model(stateful.RuleBasedStateMachine):
    """The same changes to a model that is patched, unpatched, copied and packed, and to PEFT's."""

    @stateful.initialize(seed=st.integers(0, 2**31), rslora=st.booleans(), bias=st.booleans())
    def start(self, seed, rslora, bias):
        torch.manual_seed(seed)
        config = self.config(r=3, use_rslora=rslora, lora_bias=bias)
        self.plain = randomize(peft.get_peft_model(Net(bias), config))
        self.subject = copy.deepcopy(self.plain)
        self.x = torch.randn(4, 6)

    def config(self, **settings):
        return peft.LoraConfig(**{"lora_alpha": 5, "target_modules": ["up", "down"], **settings})

    def both(self, change):
        for model in (self.plain, self.subject):
            change(model)

    @property
    def names(self):
        return list(self.plain.peft_config)

    @property
    def merged(self):
        return self.plain.base_model.model.up.merged_adapters

    @stateful.rule(impl=st.sampled_from(["auto", "eager", "reference"]), prepack=st.booleans())
    def patch(self, impl, prepack):
        lk.patch_peft(self.subject, impl=impl, prepack=prepack)

    @stateful.rule()
    def unpatch(self):
        lk.unpatch_peft(self.subject)

    @stateful.rule(packed=st.booleans())
    def pack(self, packed):
        patched = any(hasattr(m, "_lora_kernels_packed") for m in self.subject.modules())
        if patched:
            (lk.prepack_ if packed else lk.unprepack_)(self.subject)

    @stateful.rule(pickled=st.booleans())
    def copy(self, pickled):
        through = (lambda m: pickle.loads(pickle.dumps(m))) if pickled else copy.deepcopy
        self.subject.zero_grad()
        self.subject = through(self.subject)

    @stateful.rule(name=st.sampled_from(NAMES), r=st.integers(1, 5), only_up=st.booleans())
    def add(self, name, r, only_up):
        if name in self.names or self.merged:
            return
        config = self.config(r=r, target_modules=["up"] if only_up else ["up", "down"])
        self.both(lambda model: model.add_adapter(name, config))
        values = {n: torch.randn_like(p) for n, p in self.plain.named_parameters() if name in n}
        for model in (self.plain, self.subject):
            for n, value in values.items():
                model.get_parameter(n).data.copy_(value)

    @stateful.rule(name=st.sampled_from(NAMES))
    def delete(self, name):
        others = [other for other in self.names if other != name]
        if name in self.names and others and not self.merged:
            # PEFT's model forgets that the adapter it calls active may be the deleted one.
            if self.plain.active_adapter == name:
                self.both(lambda model: model.set_adapter(others[0]))
            self.both(lambda model: model.delete_adapter(name))

    @stateful.rule(name=st.sampled_from(NAMES))
    def switch(self, name):
        if name in self.names:
            self.both(lambda model: model.set_adapter(name))

    @stateful.rule()
    def activate_all(self):
        names = self.names
        self.both(lambda model: model.base_model.set_adapter(names))

    @stateful.rule(enabled=st.booleans())
    def enable(self, enabled):
        verb = "enable_adapter_layers" if enabled else "disable_adapter_layers"
        self.both(lambda model: getattr(model.base_model, verb)())

    @stateful.rule(name=st.one_of(st.none(), st.sampled_from(NAMES)), safe=st.booleans())
    def merge(self, name, safe):
        if name is None or name in self.names:
            names = None if name is None else [name]
            self.both(lambda model: model.merge_adapter(names, safe_merge=safe))

    @stateful.rule()
    def unmerge(self):
        self.both(lambda model: model.unmerge_adapter())

    @stateful.rule(factor=st.sampled_from([0.5, 1.5]))
    def scale(self, factor):
        def change(model):
            for module in model.modules():
                if isinstance(module, peft.tuners.lora.LoraLayer):
                    for name in module.active_adapters:
                        module.set_scale(name, factor)

        if not self.merged:
            self.both(change)

    @stateful.rule(training=st.booleans(), grad=st.booleans())
    def mode(self, training, grad):
        self.both(lambda model: model.train(training))
        self.both(lambda model: model.base_model.model.up.base_layer.requires_grad_(grad))

    @stateful.rule()
    def step(self):
        """One step of descent, by PEFT's gradients for both, so that roundings don't add up."""
        self.both(lambda model: model.zero_grad())
        loss = self.plain(self.x).square().mean()
        if loss.requires_grad:
            loss.backward()
            grads = gradients(self.plain)
            for model in (self.plain, self.subject):
                for name, grad in grads.items():
                    if grad is not None:
                        model.get_parameter(name).data.sub_(0.1 * grad / (1 + grad.norm()))
            # A write through .data leaves no trace: packed weights are packed anew after it.
            if any(getattr(m, "_lora_kernels_packed", None) for m in self.subject.modules()):
                lk.prepack_(self.subject)

    @stateful.invariant()
    def computes_what_peft_does(self):
        if not hasattr(self, "plain"):
            return
        x = [self.x.clone().requires_grad_() for _ in range(2)]
        self.both(lambda model: model.zero_grad())
        expected, y = self.plain(x[0]), self.subject(x[1])
        assert_close(y, expected, 1e-4)
        expected.square().sum().backward()
        y.square().sum().backward()
        assert_close(x[1].grad, x[0].grad, 1e-4, "x")
        ours = dict(self.subject.named_parameters())
        for name, p in self.plain.named_parameters():
            assert_close(ours[name], p, 1e-4, name)
            assert ours[name].requires_grad == p.requires_grad, name
            assert (ours[name].grad is None) == (p.grad is None), name
            if p.grad is not None:
                assert_close(ours[name].grad, p.grad, 1e-3, name)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_sequences_of_changes_do_what_they_do_to_a_peft_model():
    stateful.run_state_machine_as_test(
        hypothesis.seed(SEED)(Model),
        settings=hypothesis.settings(settings, max_examples=-(-CASES // 4), stateful_step_count=20),
    )
