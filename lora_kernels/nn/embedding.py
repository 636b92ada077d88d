"""The adapted embedding as a module; it holds parameters and owns no mathematics."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kernels.bypass import everywhere_reason, input_reason, read_plain
from lora_kernels.checks import check_keyword, check_memory
from lora_kernels.merging import Update
from lora_kernels.nn.adapted import Adapted
from lora_kernels.nn.arguments import check_settings
from lora_kernels.ops.embedding import UNSERVED_OPTIONS, lora_embedding
from lora_kernels.usage import Calls


class LoRAEmbedding(Adapted):
    """A frozen embedding table with a trainable low-rank adapter::

        y = W[ids] + scaling · Aᵀ[ids] Bᵀ

    Names are PEFT's: `base_layer` holds W, `lora_embedding_A` is [r, num_embeddings] and zero at
    the start, `lora_embedding_B` is [embedding_dim, r]. There is no dropout, since PEFT's ignores
    its own.

    Args:
        num_embeddings: V, rows of the table.
        embedding_dim: H, the last dimension of y.
        r: rank, at least 1.
        lora_alpha: numerator of scaling, any finite number.
        use_rslora: divide lora_alpha by sqrt(r) instead of r.
        padding_idx: as for nn.Embedding.
        device, dtype: of the table and the adapter.
        adapter_dtype: of the adapter where it shall differ, such as float32 beside bfloat16.
        impl: as for `lora_embedding`.

    Raises:
        TypeError, ValueError: an argument outside what is said above.

    Source: Hu et al., LoRA, arXiv:2106.09685; loralib and PEFT for embeddings.

    Example:
        >>> layer = lk.LoRAEmbedding(100, 16, r=4)
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 16])
    """

    base_layer: nn.Embedding
    _lora_kernels_op = "lora_embedding"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *misplaced: NoReturn,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> None:
        check_keyword("r", misplaced)
        check_settings(r, lora_alpha, 0.0, "none", adapter_dtype, impl)
        base = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx=padding_idx, device=device, dtype=dtype
        )
        super().__init__()
        self._adapt(base, r, lora_alpha, use_rslora, adapter_dtype, impl)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *misplaced: NoReturn,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> "LoRAEmbedding":
        """Return a layer around `embedding`: the same object becomes `base_layer` and is frozen.

        Args:
            embedding: the layer to adapt; its device and dtype are the adapter's.
            r, lora_alpha, use_rslora, adapter_dtype, impl: as the class.

        Returns:
            The layer.

        Raises:
            TypeError, ValueError: `embedding` is not an nn.Embedding with torch's forward and a
                plain float weight, or has max_norm, scale_grad_by_freq or sparse; or as the class.
                `embedding` is as it was.

        Example:
            >>> table = nn.Embedding(100, 16)
            >>> lk.LoRAEmbedding.from_embedding(table, r=4).base_layer is table
            True
        """
        check_keyword("r", misplaced)
        check_settings(r, lora_alpha, 0.0, "none", adapter_dtype, impl)
        check_embedding(embedding)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adapt(embedding, r, lora_alpha, use_rslora, adapter_dtype, impl)
        layer.train(embedding.training)
        return layer

    def _adapt(
        self,
        base: nn.Embedding,
        r: int,
        lora_alpha: float,
        use_rslora: bool,
        adapter_dtype: torch.dtype | None,
        impl: str,
    ) -> None:
        like: dict[str, Any] = {
            "device": base.weight.device,
            "dtype": adapter_dtype or base.weight.dtype,
        }
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.r, self.lora_alpha, self.use_rslora, self.impl = r, lora_alpha, use_rslora, impl
        self.base_layer = base.requires_grad_(False)
        self._lora_kernels_calls = Calls()
        self.lora_embedding_A = nn.Parameter(torch.empty(r, base.num_embeddings, **like))
        self.lora_embedding_B = nn.Parameter(torch.empty(base.embedding_dim, r, **like))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Zero lora_embedding_A and draw lora_embedding_B as PEFT does (normal)."""
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    def forward(self, ids: Tensor) -> Tensor:
        """Return y [..., embedding_dim] for ids [...]; see `lora_embedding`."""
        if self.merged:
            return self.base_layer(ids)
        a, b, padding_idx = (
            self.lora_embedding_A,
            self.lora_embedding_B,
            self.base_layer.padding_idx,
        )
        reason = self.left_reason() or input_reason(ids)
        self._note(reason)
        if reason is None:
            return lora_embedding(
                ids, self.base_layer.weight, a, b,
                scaling=self.scaling, padding_idx=padding_idx, impl=self.impl,
            )  # fmt: skip
        y = self.base_layer(ids)
        branch = functional.embedding(ids, a.T, padding_idx) @ b.T
        return (y + branch * self.scaling).to(y.dtype)

    def left_reason(self) -> str | None:
        """Return why a call would be composed of the base layer's own; None where it is fused."""
        reason = _reason(self.base_layer)
        return everywhere_reason() if reason is None else f"base layer {reason}"

    def _updates(self) -> tuple[Update, ...]:
        a, b = self.lora_embedding_A.detach(), self.lora_embedding_B.detach()
        check_memory(lora_embedding_A=a, lora_embedding_B=b)
        return (Update(b.t().clone(), a.t().clone(), self.scaling),)


def check_embedding(embedding: nn.Module) -> None:
    """Raise TypeError unless an embedding can be adapted."""
    reason = _reason(embedding)
    if reason is not None:
        raise TypeError(f"embedding: expected a torch.nn.Embedding to adapt, got one that {reason}")


def _reason(embedding: nn.Module) -> str | None:
    """Return why `lora_embedding` doesn't compute what a layer does, with an adapter; or None."""
    read = read_plain(embedding, nn.Embedding)
    if isinstance(read, str):
        return read
    found = next((name for name in UNSERVED_OPTIONS if getattr(embedding, name)), None)
    return None if found is None else f"has {found}"
