"""Sampling from a diffusers pipeline on a condition, and the options that generation takes for it.

Shapes: `B` batch, `T` condition tokens, `D` condition dim, `P` pooled dim.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from anygpt.decoders.denoising import Generators, check_generators
from anygpt.errors import InputError

STEERING = ("num_inference_steps", "guidance_scale", "negative_prompt", "negative_condition", "seed", "generator")
"""Options of every decoder, beside the sizes that its family names."""
ALTERNATIVES = (("negative_prompt", "negative_condition"), ("seed", "generator"))
MAX_SEED = 2**63 - 1


@dataclass(eq=False)
class Condition:
    """What a decoder is conditioned on: embeds `(B, T, D)`, and where it has them pooled `(B, P)`, mask `(B, T)`."""

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, condition: Condition | Tensor) -> Condition:
        """A plain tensor means `Condition(embeds=tensor)`."""
        return condition if isinstance(condition, cls) else cls(embeds=condition)

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, rows: slice | list[int] | Tensor) -> Condition:
        """The samples of `rows`; the batch dimension stays, so an `int` is not taken."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Moved to `device`; floating-point tensors also cast to `dtype`. Differentiable."""
        return self._map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def _map(self, function) -> Condition:
        return Condition(*(None if x is None else function(x) for x in (self.embeds, self.pooled, self.mask)))


class Sampling:
    """The part of `DiffusionDecoder` that makes media."""

    size_names: ClassVar[tuple[str, ...]]
    """Size arguments of the pipeline's call; an attribute of the same name holds the default."""

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor | Condition,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_condition: Tensor | Condition | None = None,
        generator: Generators = None,
        on_step: Callable[[int, int], None] | None = None,
        **size: float,
    ) -> list:
        """Generate `B` media by calling the pipeline on the condition, as it would on captions encoded to it.

        Args:
            condition: `(B, T, D)`.
            num_inference_steps, guidance_scale: the pipeline's own defaults if None.
            negative_condition: `(B, T, D)`; if None, what the pipeline uses when given no negative prompt.
            generator: one, or a list with one a sample.
            on_step: called with the number of finished denoising steps and of all; what it raises ends the sampling.
            size: the family's `size_names`; the decoder's own by default.

        Raises:
            InputError: shapes that do not fit, or a size this decoder does not have.
        """
        if unknown := sorted(set(size) - set(self.size_names)):
            raise InputError(
                f"{type(self).__name__}.sample has no argument {', '.join(unknown)}: sizes are "
                f"{', '.join(self.size_names)}."
            )
        condition = self._ready(condition)
        if negative_condition is not None:
            negative_condition = self._ready(negative_condition, len(condition))
        check_generators(generator, len(condition))
        # All sizes are passed: given only one of height and width, diffusers would drop it.
        arguments = {name: getattr(self, name) for name in self.size_names} | size
        steering = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        arguments |= {name: value for name, value in steering.items() if value is not None}
        arguments |= self.prompt_arguments(condition, negative_condition)
        if on_step is not None:
            arguments |= self._step_callback(on_step)
        return self.collect(self.pipeline(**arguments, generator=generator))

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        """The conditions as the pipeline's call takes them; a negative of None is left to the pipeline."""
        parts = {"prompt_embeds": "embeds"} | ({} if self.pooled_dim is None else {"pooled_prompt_embeds": "pooled"})
        arguments = {}
        for name, part in parts.items():
            arguments[name] = getattr(condition, part)
            arguments[f"negative_{name}"] = None if negative is None else getattr(negative, part)
        return arguments

    def _ready(self, condition: Tensor | Condition, batch_size: int | None = None) -> Condition:
        """Checked, normalised, on the decoder's device and in its dtype."""
        condition = Condition.of(condition)
        given = tuple(condition.embeds.shape)
        expected = (len(condition) if batch_size is None else batch_size, *self.condition_shape)
        if given != expected:
            raise InputError(
                f"The condition of {type(self).__name__} is {given}, expected (batch, tokens, dim) = {expected}: "
                "make the output projector for this decoder's condition_shape, with one condition a sample."
            )
        pooled = None if condition.pooled is None else tuple(condition.pooled.shape)
        if self.pooled_dim is not None and pooled != (expected[0], self.pooled_dim):
            raise InputError(
                f"The pooled condition of {type(self).__name__} is {pooled}, expected (batch, dim) = "
                f"{(expected[0], self.pooled_dim)}: give Condition(embeds, pooled)."
            )
        return Condition.of(self.normalize_condition(condition)).to(self.device, self.dtype)

    def _step_callback(self, on_step: Callable[[int, int], None]) -> dict[str, Any]:
        """`on_step` as the pipeline's call takes it: diffusers has an older and a newer form."""
        scheduler = self.pipeline.scheduler
        if "callback_on_step_end" in inspect.signature(self.pipeline.__call__).parameters:

            def at_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                on_step(step + 1, len(scheduler.timesteps))
                return tensors

            return {"callback_on_step_end": at_step_end}

        def callback(step: int, timestep: Any, latents: Tensor) -> None:
            # the older form counts steps of the sampler, each of `order` evaluations
            on_step(step + 1, math.ceil(len(scheduler.timesteps) / getattr(scheduler, "order", 1)))

        return {"callback": callback, "callback_steps": 1}

    # ---- the options of generation

    @property
    def option_names(self) -> tuple[str, ...]:
        """What `generate(decoder_kwargs={key: …})` takes for this decoder."""
        return (*STEERING, *self.size_names)

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """Steps, guidance and sizes where nobody names any."""
        call = inspect.signature(self.pipeline.__call__).parameters
        steering = {name: call[name].default for name in ("num_inference_steps", "guidance_scale") if name in call}
        return steering | {name: getattr(self, name) for name in self.size_names}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Find mistakes in the options of generation before anything is computed.

        Raises:
            InputError: an option that this decoder does not have, or a value that it cannot take.
        """
        if unknown := sorted(set(options) - set(self.option_names)):
            raise InputError(
                f"the {self.modality} decoder has no option {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(self.option_names)}"
            )
        given = {name: value for name, value in options.items() if value is not None}
        for one, other in ALTERNATIVES:
            if one in given and other in given:
                raise InputError(f"the {self.modality} decoder is given both {one} and {other}; give one of them")
        for name, value in given.items():
            if expected := self.expected_of(name, value):
                raise InputError(f"{name} of the {self.modality} decoder is {value!r:.80}; expected {expected}")

    def expected_of(self, name: str, value: Any) -> str | None:
        """What should stand in place of `value`; None where it is all right. A family adds its own sizes."""
        if name == "num_inference_steps":
            most = self.pipeline.scheduler.config.num_train_timesteps
            return None if is_integer(value) and 1 <= value <= most else f"a whole number from 1 to {most}"
        if name == "guidance_scale":
            return None if is_number(value) else "a finite number"
        if name == "seed":
            seeds = value if isinstance(value, (list, tuple)) else [value]
            good = all(is_integer(seed) and 0 <= seed <= MAX_SEED for seed in seeds)
            return None if good else "a whole number from 0, or a list of such with one a row"
        if name == "negative_prompt":
            return None if isinstance(value, str) and is_text(value) else "a text of whole characters"
        if name in ("height", "width"):
            multiple = self.size_multiple
            return None if is_integer(value) and value > 0 and value % multiple == 0 else f"a multiple of {multiple}"
        if name == "num_frames":
            return None if is_integer(value) and value > 0 else "a whole number from 1"
        return None

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels are multiples of this: the VAE's factor, and diffusers asks for 8."""
        return math.lcm(8, self.pipeline.vae_scale_factor)

    def sampling_arguments(self, options: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
        """The options of generation as arguments of `sample`.

        A `seed` gives every sample a generator of its own, by its place in its answer, so that a medium does not
        depend on what else is in the batch.

        Args:
            options: checked by `check_options`; a list of seeds has one a sample.
            places: of each of the `B` samples, how many of this decoder's come before it in its answer.
        """
        arguments = {name: value for name, value in options.items() if value is not None}
        prompt, seed = arguments.pop("negative_prompt", None), arguments.pop("seed", None)
        if prompt is not None:
            arguments["negative_condition"] = Condition.of(self.encode_text([prompt]))[[0] * len(places)]
        if seed is not None:
            seeds = seed if isinstance(seed, (list, tuple)) else [seed] * len(places)
            arguments["generator"] = [
                torch.Generator().manual_seed(min(int(own), MAX_SEED - max(places)) + place)
                for own, place in zip(seeds, places, strict=True)
            ]
        return arguments


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite number; also no integer beyond what a float can be."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_text(value: str) -> bool:
    """Whole characters: tokenizers take no half of a surrogate pair, which JSON and command lines may hold."""
    return not any("\ud800" <= character <= "\udfff" for character in value)
