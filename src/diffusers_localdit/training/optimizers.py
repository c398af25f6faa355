"""The optimizer of a run."""

import torch
from torch import nn

from .checkpoints import trainable
from .settings import TrainingSettings


def build_optimizer(settings: TrainingSettings, transformer: nn.Module) -> torch.optim.Optimizer:
    """
    Build the optimizer of what is trainable in the transformer.

    Raises:
        `ValueError`: The optimizer needs a library that is not installed.
    """
    adamw = {
        "lr": settings.learning_rate,
        "betas": (0.9, settings.adam_beta2),
        "eps": 1e-10,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "muon":
        return MuonAndAdamW(*split_parameters(transformer), **adamw)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(trainable(transformer), fused=True, **adamw)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("--optimizer adamw_8bit needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit(trainable(transformer), **adamw)


def split_parameters(transformer: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable matrices of the blocks' linear layers, which Muon is for, and all other trainable parameters."""
    linears = [module for module in transformer.transformer_blocks.modules() if isinstance(module, nn.Linear)]
    matrices = [linear.weight for linear in linears if linear.weight.requires_grad]
    chosen = {id(matrix) for matrix in matrices}
    return matrices, [parameter for parameter in trainable(transformer) if id(parameter) not in chosen]


def optimizer_bytes(settings: TrainingSettings, transformer: nn.Module) -> int:
    """Bytes of the optimizer's state: AdamW has two numbers for each parameter, Muon one for each of its own."""
    matrices, others = (sum(p.numel() for p in part) for part in split_parameters(transformer))
    if settings.optimizer == "muon":
        return 4 * matrices + 8 * others
    return (8 if settings.optimizer == "adamw" else 2) * (matrices + others)


class MuonAndAdamW(torch.optim.Optimizer):
    """
    Muon for matrices and AdamW for all else, as one optimizer, so that there is one schedule and one state to save.

    Muon's updates are scaled to the size of AdamW's ("Muon is Scalable for LLM Training", arXiv 2502.16982, section
    2.2), so that one learning rate and one weight decay serve both.

    Args:
        matrices (`list[nn.Parameter]`): Two-dimensional parameters.
        others (`list[nn.Parameter]`): Parameters of any shape.
        lr (`float`): Learning rate of both.
        weight_decay (`float`): Of both.
        adamw (*optional*): What else [`~torch.optim.AdamW`] takes.
    """

    def __init__(
        self, matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, weight_decay: float, **adamw
    ):
        self.parts = [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]
        if others:  # low-rank layers are matrices, all of them
            self.parts += [torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, fused=True, **adamw)]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part, group in zip(self.parts, self.param_groups, strict=True):
            # Anew in each step: loading a state, and sharding, replace both.
            part.state, part.param_groups = self.state, [group]
            part.step()
        return loss
