"""A Qwen3-MoE with adapted experts in Trainer, DDP and FSDP2: as the unpatched model."""

import copy

import pytest
import torch

import lora_kernels as lk
from tests.stacks.models import adapted_qwen3_moe, history
from tests.stacks.processes import run_cases
from tests.stacks.test_trainer import Rows, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing, tmp_path):
    plain, rows = adapted_qwen3_moe(), Rows(4)
    patched = copy.deepcopy(plain)
    assert not lk.patch_peft(patched).left
    settings = {"activation_checkpointing": checkpointing, "max_steps": 4, "learning_rate": 1e-3}
    theirs, ours = (
        trainer_of(model, rows, tmp_path / name, **settings)
        for name, model in (("plain", plain), ("patched", patched))
    )
    for trainer in (theirs, ours):
        trainer.train()
    torch.testing.assert_close(history(ours), history(theirs), rtol=1e-4, atol=1e-4)
    used = lk.report(patched).layers
    outer = [use for path, use in used.items() if path.endswith("experts")]
    assert all(use.fused == 4 * (1 + checkpointing) and not use.left for use in outer)


if torch.distributed.is_available():
    from tests.stacks.expert_cases import CASES

    @pytest.fixture(scope="module")
    def results(tmp_path_factory):
        seed = torch.initial_seed() % 2**31
        return run_cases("expert_cases", tmp_path_factory.mktemp("processes"), seed)

    @pytest.mark.slow
    @pytest.mark.parametrize("case", CASES)
    def test_gradients_are_those_of_one_process(case, results):
        error = results.get(case, "not run, since an earlier case failed")
        assert error is None, error
