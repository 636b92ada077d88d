"""torch's switch of float32 products on GPUs."""

import torch


def allowed() -> bool:
    """Whether float32 products may be TF32's, by torch's own switch as it is now.

    Asked in the newer of torch's two forms, which knows what either form has set; the older one,
    `torch.get_float32_matmul_precision`, raises where the newer one was used.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
