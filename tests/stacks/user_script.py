"""A script of someone who trains with TRL: it imports nothing of lora_kernels."""

import json
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import LoraConfig


def train(folder, change=None, callbacks=None):
    """Train the model in `folder`, which `change` may see first; return the trainer, trained."""
    arguments = trl.SFTConfig(
        output_dir=str(folder / "out"), max_steps=4, per_device_train_batch_size=2, max_length=48,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, bf16=False,
    )  # fmt: skip
    # Dropout's masks tell a patched model from PEFT's.
    adapter = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    trainer = trl.SFTTrainer(
        str(folder / "model"),
        arguments,
        train_dataset=Dataset.from_list(rows),
        peft_config=adapter,
        callbacks=callbacks,
    )
    if change is not None:
        change(trainer.model)
    # Here, since more numbers are drawn before this point in a process that is new.
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(losses(train(Path(sys.argv[1])))))
