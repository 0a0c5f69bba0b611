"""InfoNCE loss between the features of two encoders, over the pairs of all processes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def info_nce(first: Tensor, second: Tensor, temperature: float, gather: bool = False) -> Tensor:
    """Symmetric InfoNCE per pair (CLIP, arXiv 2103.00020, figure 3), `(P,)` float32, between both sides `(P, H)`.

    The other pairs of the batch are the negatives, so values depend on the batch; with `gather`, the pairs of all
    processes are, also for the gradient, and every process must call this function.
    """
    first, second = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
    (all_first, start), (all_second, _) = (gather_rows(x) if gather else (x, 0) for x in (first, second))
    similarity, same = all_first @ all_second.T / temperature, torch.arange(len(all_first), device=first.device)
    loss = (
        F.cross_entropy(similarity, same, reduction="none") + F.cross_entropy(similarity.T, same, reduction="none")
    ) / 2
    own = loss[start : start + len(first)]
    # These features are also negatives of other processes' pairs. That part of the gradient is computed locally: a
    # collective in the backward pass would have to run in the same order on all processes, between DDP's reductions,
    # even on those without pairs.
    others = loss.sum() - own.sum()
    return own + (others - others.detach()) / max(len(own), 1)


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes, whose numbers may differ, and the index of this process's first row.

    Gradients flow to this process's rows only.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, 0
    counts = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    padded = F.pad(rows.detach(), (0, 0, 0, max(map(int, counts)) - len(rows)))
    parts = [torch.empty_like(padded) for _ in counts]
    if len(padded):
        dist.all_gather(parts, padded)
    parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
    parts[dist.get_rank()] = rows
    return torch.cat(parts), int(sum(counts[: dist.get_rank()]))
