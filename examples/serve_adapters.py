"""Serve one base model with many adapters: a batch has requests for different ones.

    python examples/serve_adapters.py [--adapters 16] [--requests 64]

The base is a small Llama with random weights, the adapters are files as PEFT saves them. Adapters
are loaded and removed while the server runs. Tokens are compared with PEFT's, request by request;
throughput is printed beside PEFT's own mixed forward, on the same batches.
"""

import argparse
import copy
import queue
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk

PAD = 0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Request:
    """A prompt for one adapter, and where its answer goes: the new tokens, or an error."""

    prompt: list[int]
    adapter: str
    new_tokens: int
    answer: Future


@dataclass
class Change:
    """A change of the model, between two batches."""

    apply: Callable[[], Any]
    answer: Future


class AdapterServer:
    """Answers requests for the adapters of a patched PEFT model, from a thread of its own.

    most_waiting: requests beyond it are refused at once (`queue.Full`). most_together: in a batch.
    """

    def __init__(self, model: PeftModel, most_waiting: int = 256, most_together: int = 16) -> None:
        self.model, self.most_together = model, most_together
        self.batches = 0
        self._jobs: queue.Queue[Request | Change | None] = queue.Queue(most_waiting)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, prompt: list[int], adapter: str, new_tokens: int = 8) -> Future:
        """Ask for tokens; raises `queue.Full` where too many wait."""
        request = Request(prompt, adapter, new_tokens, Future())
        self._jobs.put_nowait(request)
        return request.answer

    def load(self, name: str, folder: Path) -> Future:
        """Load an adapter from a folder as PEFT saves it; requests before it go first."""
        return self._change(lambda: self._load(name, folder))

    def remove(self, name: str) -> Future:
        """Remove an adapter; requests before it go first."""
        return self._change(lambda: self.model.delete_adapter(name))

    def close(self) -> None:
        """Answer what waits and stop."""
        self._jobs.put(None)
        self._thread.join()

    def _change(self, apply: Callable[[], Any]) -> Future:
        change = Change(apply, Future())
        self._jobs.put(change)
        return change.answer

    def _load(self, name: str, folder: Path) -> None:
        if name in self.model.peft_config:
            raise ValueError(f"name: expected a new adapter, got {name!r}, which is loaded")
        try:
            self.model.load_adapter(str(folder), name)
        except Exception:
            # PEFT adds the adapter's layers before it reads its weights.
            if name in self.model.peft_config:
                self.model.delete_adapter(name)
            raise
        self.model.eval()

    def _work(self) -> None:
        held: deque[Request | Change | None] = deque()
        while True:
            job = held.popleft() if held else self._jobs.get()
            if job is None:
                return
            if isinstance(job, Change):
                _answer(job.answer, job.apply)
                continue
            batch = [job]
            while len(batch) < self.most_together and not held:
                try:
                    following = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if isinstance(following, Request):
                    batch.append(following)
                else:
                    held.append(following)
            self._serve(batch)

    def _serve(self, batch: list[Request]) -> None:
        known = [r for r in batch if r.adapter in self.model.peft_config]
        for request in batch:
            if request not in known:
                loaded = ", ".join(sorted(self.model.peft_config))
                error = f"adapter: expected one of {loaded}, got {request.adapter!r}"
                request.answer.set_exception(ValueError(error))
        if not known:
            return
        self.batches += 1
        try:
            with lk.adapter_batch(self.model, [r.adapter for r in known]):
                tokens = generate(self.model, known)
        except Exception as error:  # belongs to those who wait, not to this thread
            for request in known:
                request.answer.set_exception(error)
            return
        for request, own in zip(known, tokens, strict=True):
            request.answer.set_result(own)


def _answer(answer: Future, apply: Callable[[], Any]) -> None:
    try:
        answer.set_result(apply())
    except Exception as error:  # belongs to who waits, not to the server's thread
        answer.set_exception(error)


def generate(model: PeftModel, batch: list[Request], **how: Any) -> list[list[int]]:
    """Return each request's new tokens, greedily, prompts filled up from the left."""
    longest, most = max(len(r.prompt) for r in batch), max(r.new_tokens for r in batch)
    ids = torch.tensor([[PAD] * (longest - len(r.prompt)) + r.prompt for r in batch])
    mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in batch])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False,
            pad_token_id=PAD, eos_token_id=None, **how,
        )  # fmt: skip
    return [
        row[longest : longest + r.new_tokens] for row, r in zip(out.tolist(), batch, strict=True)
    ]


def base_model(hidden: int, layers: int) -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_adapters(base: LlamaForCausalLM, folder: Path, count: int) -> dict[str, Path]:
    """Write adapters as PEFT saves them, with random factors; ranks go round."""
    found = {}
    for i in range(count):
        config = LoraConfig(
            r=(4, 8, 16)[i % 3], lora_alpha=32, target_modules=TARGETS, init_lora_weights=False
        )
        torch.manual_seed(1 + i)
        model = get_peft_model(copy.deepcopy(base), config)
        found[f"adapter{i}"] = folder / f"adapter{i}"
        model.save_pretrained(found[f"adapter{i}"])
    return found


@contextmanager
def timed() -> Iterator[list[float]]:
    """Put the seconds that a block took into the list that it is given."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - start)


def main() -> None:
    """Serve, change adapters meanwhile, compare with PEFT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=16, help="adapters (%(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="requests (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=8, help="of each (%(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="of the model (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (%(default)s)")
    args = parser.parse_args()
    if args.adapters < 2 or args.requests < 1:
        parser.error(
            "expected --adapters of at least 2, since one is loaded meanwhile, and --requests of "
            f"at least 1, got {args.adapters} and {args.requests}"
        )
    with tempfile.TemporaryDirectory() as folder:
        base = base_model(args.hidden, args.layers)
        files = write_adapters(base, Path(folder), args.adapters)
        (first, path), *others = files.items()
        plain = PeftModel.from_pretrained(base, str(path), adapter_name=first)
        for name, path in others[:-1]:
            plain.load_adapter(str(path), name)
        plain.eval()
        served = copy.deepcopy(plain)
        print(lk.patch_peft(served))
        compare(served, plain, files, args)


def compare(served: PeftModel, plain: PeftModel, files: dict[str, Path], args: Any) -> None:
    """Answer requests with a server; print what became of them and PEFT's times beside."""
    late, names = [*files][-1], [*files]
    server = AdapterServer(served)
    generator = torch.Generator().manual_seed(0)

    def prompt() -> list[int]:
        length = int(torch.randint(4, 12, (), generator=generator))
        return torch.randint(1, 512, (length,), generator=generator).tolist()

    print(f"{late} before it is loaded: {server.submit(prompt(), late).exception()}")
    print(f"a broken file: {type(server.load('broken', Path('nowhere')).exception()).__name__}")
    server.load(late, files[late]).result()
    asked = [(prompt(), names[i % len(names)]) for i in range(args.requests)]
    with timed() as ours:
        answers = [server.submit(*each, args.new_tokens) for each in asked]
        tokens = [answer.result() for answer in tqdm(answers, unit="request")]
    server.remove(late).result()
    print(f"{late} after it was removed: {server.submit(prompt(), late).exception()}")
    server.close()

    plain.load_adapter(str(files[late]), late)
    plain.eval()
    requests = [Request(*each, args.new_tokens, Future()) for each in asked]
    alone = []
    with timed() as one_by_one:
        for request in tqdm(requests, unit="request"):
            plain.set_adapter(request.adapter)
            alone += generate(plain, [request])
    with timed() as mixed:
        for i in range(0, len(requests), server.most_together):
            some = requests[i : i + server.most_together]
            generate(plain, some, adapter_names=[r.adapter for r in some])
    same = sum(got == expected for got, expected in zip(tokens, alone, strict=True))
    print(f"tokens as PEFT's one by one: {same} of {len(asked)} requests, {server.batches} batches")
    count = len(asked) * args.new_tokens
    for what, (seconds,) in (
        ("lora_kernels, mixed", ours), ("PEFT, mixed", mixed), ("PEFT, one by one", one_by_one)
    ):  # fmt: skip
        print(f"{what}: {count / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
