"""Initialization of output projectors by ridge regression.

With a frozen trunk and frozen signal rows, caption alignment under `mse` has a closed form for a linear map. The trunk
runs once over the captions, and XᵀX and XᵀY are accumulated in float64, so memory does not grow with their number. The
regularization strength is chosen on held-out training captions.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import psutil
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from anygpt.composition import evaluating
from anygpt.decoders.conditions import Condition
from anygpt.errors import InputError
from anygpt.model.multimodal import MultimodalModel

HOLD_BACK_EVERY = 5
MAX_HELD_BACK = 512  # samples, to bound memory
STRENGTHS = tuple(10.0**exponent for exponent in range(-8, 3))  # relative to the mean eigenvalue of the covariance
TOLERANCE = 1.01  # prefer the largest strength within this factor of the least error: small ones are unstable


class RidgeRegression:
    """Ridge regression with an unpenalized intercept, accumulated batch by batch.

    One caption in five, with all of its samples, is held back to choose the strength.
    """

    def __init__(self, inputs: int, outputs: int):
        self.xtx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.xty = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.x_sum = torch.zeros(inputs, dtype=torch.float64)
        self.y_sum = torch.zeros(outputs, dtype=torch.float64)
        self.count = self.seen_back = 0
        self.held: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples `(M, inputs)` and `(M, outputs)` in any float dtype.

        Samples are held back by a hash of their outputs, so that repeated captions do not occur on both sides.
        """
        x, y = x.double().cpu(), y.double().cpu()
        # Rounded, because the last bits of a caption's encoding may depend on its batch.
        rounded = y.float().mul(1e3).round().to(torch.int64).numpy()
        back = torch.tensor([xxh3_64_intdigest(row.tobytes()) % HOLD_BACK_EVERY == 0 for row in rounded]).bool()
        back &= self.seen_back + back.cumsum(0) <= MAX_HELD_BACK
        self.seen_back += int(back.sum())
        if back.any():
            self.held.append((x[back], y[back]))
        self._accumulate(x[~back], y[~back])

    def _accumulate(self, x: Tensor, y: Tensor) -> None:
        self.xtx += x.T @ x
        self.xty += x.T @ y
        self.x_sum += x.sum(dim=0)
        self.y_sum += y.sum(dim=0)
        self.count += len(x)

    def solve(self, strength: float | None = None, gain: float = 1.0) -> tuple[Tensor, Tensor, float]:
        """Weight `(outputs, inputs)` and bias `(outputs,)` in float64, and the λ of ‖Y − XW‖² + λ‖W‖², by default
        chosen on the held-back samples, which then join the fit. `gain` multiplies the solution's deviations from the
        mean output."""
        if not self.count and not self.held:
            raise InputError("ridge regression was given no samples")
        if strength is None and self.count:
            strength = self._choose()
        for x, y in self.held:
            self._accumulate(x, y)
        self.held = []
        if strength is None:  # all samples had been held back
            strength = self._choose()
        x_mean, y_mean, values, vectors, rotated = self._decompose()
        weight = gain * (vectors @ (rotated / (values + strength)[:, None]))
        return weight.T, y_mean - x_mean @ weight, strength

    def _decompose(self) -> tuple[Tensor, ...]:
        """Means, and the eigendecomposition of the centred XᵀX with XᵀY in its basis, shared by all strengths."""
        x_mean, y_mean = self.x_sum / self.count, self.y_sum / self.count
        values, vectors = torch.linalg.eigh(self.xtx - self.count * torch.outer(x_mean, x_mean))
        rotated = vectors.T @ (self.xty - self.count * torch.outer(x_mean, y_mean))
        return x_mean, y_mean, values.clamp(min=0), vectors, rotated

    def _choose(self) -> float:
        """Largest strength whose squared error on the held-back samples is within `TOLERANCE` of the least."""
        x_mean, y_mean, values, vectors, rotated = self._decompose()
        strengths = [relative * float(values.mean().clamp(min=1e-12)) for relative in STRENGTHS]
        if not self.held:
            return strengths[len(strengths) // 2]
        x = torch.cat([x for x, _ in self.held]) - x_mean
        y = torch.cat([y for _, y in self.held]) - y_mean
        in_basis = x @ vectors
        errors = [(in_basis @ (rotated / (values + s)[:, None]) - y).square().sum() for s in strengths]
        if not torch.stack(errors).isfinite().all():
            raise InputError(
                "ridge regression got hidden states or caption encodings that are not finite: the language model or a "
                "decoder's text encoder overflows (in half precision?), or a cached encoding is damaged"
            )
        return max(s for s, error in zip(strengths, errors, strict=True) if error <= TOLERANCE * min(errors))


def check_room(sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise an `InputError` if XᵀX and XᵀY of `{decoder key: (inputs, outputs)}` do not fit into memory.

    In float64, memory holds XᵀX four times while it is decomposed, XᵀY three times.
    """
    needed = sum(8 * (4 * inputs**2 + 3 * inputs * outputs) for inputs, outputs in sizes.values())
    if needed > psutil.virtual_memory().available:
        widths = ", ".join(f"{key}: {inputs:,} × {outputs:,}" for key, (inputs, outputs) in sizes.items())
        raise InputError(
            f"train.projector_init is ridge, but XᵀX and XᵀY (inputs × outputs: {widths}) take {needed / 2**30:,.0f} "
            f"GiB, and {psutil.virtual_memory().available / 2**30:,.0f} GiB are free; use fewer signal tokens, or "
            "projector_init random with projection_type perceiver"
        )


@torch.no_grad()
def set_by_ridge(
    model: MultimodalModel, keys: Iterable[str], batches: Iterable[dict[str, Any]], gain: float = 1.0
) -> dict[str, float]:
    """Set the linear paths of output projectors, which must have one, to the ridge solution with this gain, in one pass
    over the captions.

    `batches` are arguments of `model.read_states` with captions in `decoder_targets`; returns each decoder's strength.
    """
    lines = {}
    for key in keys:
        lines[key] = model.decoders[key].projector.line
        if lines[key] is None:
            kind = model.decoders[key].projector.config.projection_type
            raise InputError(
                f"train.projector_init is ridge, but the {key!r} output projector ({kind}) has no linear path; use "
                "projection_type linear, or transformer with linear_path true"
            )
    check_room({key: (line.in_features, line.out_features) for key, line in lines.items()})
    fits = {key: RidgeRegression(line.in_features, line.out_features) for key, line in lines.items()}
    with evaluating(model):
        for batch in batches:
            states = model.read_states(**batch)
            for key in set(fits) & set(states):
                target = batch["decoder_targets"][key]
                encoding = target.get("conditions")
                if encoding is None:
                    encoding = model.decoders[key].module.encode_text(target["captions"])
                fits[key].add(states[key].flatten(1), Condition.of(encoding).embeds.flatten(1))
    empty = [key for key, fit in fits.items() if not fit.count and not fit.held]
    if empty:
        raise InputError(
            f"train.projector_init is ridge, but data.train has no captions for {', '.join(empty)}; add rows with such "
            "answers, leave the decoder out, or set train.projector_init to random"
        )
    strengths = {}
    for key, fit in fits.items():
        weight, bias, strengths[key] = fit.solve(gain=gain)
        lines[key].weight.copy_(weight)
        lines[key].bias.copy_(bias)
    return strengths
