"""`MediaTokenizer`: media -> codes -> media, by a library's own network.

Shapes: `K` media, `n` codes of a medium; others as in `anygpt.tokenizers.families`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor, nn
from transformers import SpeechT5HifiGan

from anygpt.decoders.options import check_rate
from anygpt.decoders.pipelines import load_network_of_pipeline
from anygpt.decoders.targets import AudioTargets, ImageTargets, TargetProcessor, VideoTargets, WaveformTargets
from anygpt.errors import InputError
from anygpt.media.types import is_heard, is_timed
from anygpt.parts.files import built_from
from anygpt.parts.networks import load_network
from anygpt.parts.source import Source, TokenizerSettings, load
from anygpt.tokenizers.families import FAMILIES, WHOLE_MODELS, TokenizerFamily

PATIENCE, COMMITMENT = 25, 0.125
"""In training: batches without use after which a code moves, and the weight of the network's own loss."""
SETTINGS_FILE, OWN_VOCODER = "anygpt_tokenizer.json", "vocoder"
_OPTIONS = ("size", "num_frames", "frame_rate", "seconds", "codebooks", "delay")
PIXELS = {"image_mean": 0.5, "image_std": 0.5, "rescale_factor": 1 / 255}
"""Settings of an image processor, where a folder has none: pixels in [-1, 1]."""
_SWITCHES = {"do_normalize": {"image_mean": 0.0, "image_std": 1.0}, "do_rescale": {"rescale_factor": 1.0}}
UNIT_PIXELS = PIXELS | {"image_mean": 0.0, "image_std": 1.0}
"""aMUSEd's: pixels in [0, 1]; of diffusers' VQModels, its alone decode from codes."""


class MediaTokenizer(nn.Module):
    """A tokenizer of one medium: its grid of codes is flattened row by row, frame by frame.

    The codes of several codebooks are numbered on, so that each has its own range, and alternate within a frame. With
    `delay`, that of codebook q comes q frames later (MusicGen's pattern, arXiv 2306.05284, §2.2, in one sequence).

    Args:
        network: a network of `FAMILIES`.
        modality: a media type.
        vocoder: makes waveforms of log-mels (`SpeechT5HifiGan`), for networks of images under sounds. These get
            log-mels as the vocoder normalises them.
        pixels: `image_mean`, `image_std` and `rescale_factor` of an image processor; `PIXELS` by default. Where it has
            `do_normalize` or `do_rescale` off, the values that change nothing.
        settings: further fields of `TokenizerSettings`. By default clips have the fewest frames that the network takes,
            8 per second, and a codec's sounds are one second long.

    Attributes:
        targets: converts raw media to `encode`'s input, without weights.
        shape: of the grid: `(rows, columns)`, `(frames, rows, columns)`, or `(frames, codebooks)`.
        codebook_size: `C`, number of different codes.
        rate: samples or frames per second of decoded media; None for images.

    Raises:
        InputError: a network that cannot tokenize such media, or a size that is no whole number of codes.
    """

    def __init__(
        self,
        network: nn.Module,
        modality: str,
        *,
        vocoder: nn.Module | None = None,
        pixels: Mapping[str, Any] | None = None,
        **settings: Any,
    ):
        super().__init__()
        self.modality, self.network, self.vocoder = modality, network, vocoder
        self.family = family_of(network)
        self.can_decode = self.family.decode is not None
        if pixels is None and getattr(network.config, "lookup_from_codebook", False):
            pixels = UNIT_PIXELS
        given = dict(pixels or {})
        for switch, neutral in _SWITCHES.items():
            given |= neutral if given.get(switch) is False else {}
        self.pixels = {name: given.get(name, value) for name, value in PIXELS.items()}
        self._mean, self._std = (torch.tensor(self.pixels[name]) for name in ("image_mean", "image_std"))
        self.settings = {name: value for name, value in settings.items() if value is not None}
        heard, timed, codec = is_heard(modality), is_timed(modality), self.family.hop is not None
        has = {"size": not heard, "num_frames": timed, "frame_rate": timed}
        has |= dict.fromkeys(("seconds", "codebooks", "delay"), codec)
        for name in self.settings:
            if not has.get(name):
                raise InputError(f"{name} is set, but a {self.family.network} under {modality} has none; leave it out")
        if codec and (not heard or vocoder is not None):
            raise InputError(f"a {self.family.network} tokenizes waveforms; it takes no {modality} and no vocoder")
        books = self.family.codebooks(network)
        count = self.settings.get("codebooks", len(books))
        if not 1 <= count <= len(books):
            raise InputError(f"codebooks is {count}, but the {self.family.network} has {len(books)}")
        self.sizes = [len(book) for book in books[:count]]
        self.codebook_size = sum(self.sizes)
        self.rate: float | None = None
        self.targets, self.shape = self._waveforms() if self.family.hop else self._grid()
        self.num_codes = math.prod(self.shape)
        self.delayed = bool(self.settings.get("delay"))
        self._idle: Tensor
        self.register_buffer("_idle", torch.zeros(self.codebook_size, dtype=torch.long), persistent=False)
        self.requires_grad_(False).eval()

    def _waveforms(self) -> tuple[TargetProcessor, tuple[int, ...]]:
        config = self.network.config
        if getattr(config, "normalize", False) or getattr(config, "chunk_length_s", None):
            raise InputError(
                f"this {self.family.network} works on normalised chunks, whose scales are no codes; name one without "
                "(normalize: false), such as facebook/encodec_24khz"
            )
        self.rate, hop = config.sampling_rate, self.family.hop(config)
        seconds = self.settings.get("seconds", 1.0)
        frames = round(seconds * self.rate / hop)
        if frames < 1:
            raise InputError(f"seconds is {seconds}, shorter than one code ({hop / self.rate:g} s)")
        length = frames * hop
        targets = WaveformTargets(length, config.sampling_rate, getattr(config, "audio_channels", 1), length)
        return targets, (frames, len(self.sizes))

    def _grid(self) -> tuple[TargetProcessor, tuple[int, ...]]:
        config, factor = self.network.config, self.family.factor(self.network.config)
        own = self.family.size(config)
        size = self.settings.get("size", own)
        if size is None:
            raise InputError(f"a {self.family.network} has no size of its own; set size to pixels, as in size: 512")
        sides = [size, size] if isinstance(size, int) else list(size)
        if len(sides) != 2:
            raise InputError(f"size is {size}, expected one number, or height and width")
        height, width = sides
        if not self.family.any_size and size != own:
            raise InputError(f"size is {size}, but this {self.family.network} takes {own} pixels only; leave it out")
        if min(height, width) < factor or height % factor or width % factor:
            raise InputError(f"size is {height} × {width} pixels, expected multiples of {factor}, one code each way")
        grid = (height // factor, width // factor)
        if is_heard(self.modality):
            return self._mels(height, width), grid
        if config.in_channels != 3:
            raise InputError(f"this {self.family.network} has {config.in_channels} channels, expected 3")
        if not is_timed(self.modality):
            return ImageTargets(height, width), grid
        each = self.family.clip_factor(config) if self.family.clip_factor else 1
        frames = self.settings.get("num_frames", each)
        if frames % each:
            raise InputError(f"num_frames is {frames}, expected a multiple of {each}, the frames of one code")
        self.rate = check_rate(self.settings.get("frame_rate", 8.0))
        return VideoTargets(height, width, frames), (frames // each, *grid)

    def _mels(self, frames: int, bins: int) -> TargetProcessor:
        if self.vocoder is None:
            raise InputError(f"a {self.family.network} tokenizes {self.modality} as log-mels; name a vocoder")
        config = self.vocoder.config
        if config.model_in_dim != bins:
            raise InputError(f"the vocoder takes {config.model_in_dim} mels, but the {self.family.network} has {bins}")
        self.rate = config.sampling_rate
        return AudioTargets.of_vocoder(config, frames)

    # ------------------------------------------------------------------------------------------------- codes and media

    pooled_dim, masked = None, False  # as of a decoder without captions

    @property
    def trains(self) -> tuple[str, ...]:
        """Names of the networks that train, as a decoder's: `tokenizer`, if it does."""
        return ("tokenizer",) if any(p.requires_grad for p in self.network.parameters()) else ()

    def reconstruction_losses(self, media: list | Tensor, generator: Any = None) -> dict[str, Tensor]:
        """Stage 0's loss `{"tokenizer": (K,)}` of a VQModel: mean squared error, and `COMMITMENT` of its own loss.

        Squares spend the codes on edges and colours; absolute errors spend most of them on shades of the background.
        Where it trains, a new codebook begins as latents of the first batch, and codes out of use move to badly coded
        ones.
        """
        if not isinstance(self.network, VQModel):
            raise InputError(f"a {self.family.network} is not trained here, only a VQModel is; leave it out")
        given = self.to_network(media)
        latents = self.network.encode(given).latents
        if self.trains and torch.is_grad_enabled() and not torch.distributed.is_initialized():  # ranks must agree
            self._keep_in_use(latents.detach().movedim(1, -1).flatten(0, 2))
        made = self.network.decode(latents)
        error = (made.sample - given).square().reshape(len(media), -1).mean(1)
        return {"tokenizer": error.float() + COMMITMENT * made.commit_loss}

    @torch.no_grad()
    def _keep_in_use(self, latents: Tensor) -> None:
        """Move codes that `PATIENCE` batches did not use, of a new codebook all, to some of the latents `(M, d)`.

        They are drawn by their squared distance to the nearest code.
        """
        codes = self.network.quantize.embedding.weight
        nearest, code = torch.cdist(latents, codes).min(1)
        used = torch.bincount(code, minlength=len(codes)) > 0
        self._idle = (self._idle + 1).masked_fill(used, 0)
        new = codes.abs().amax() <= 1 / len(codes)  # as the class makes them
        moved = (self._idle > PATIENCE) | new
        if bool(moved.any()):
            codes[moved] = latents[nearest.square().clamp(min=1e-12).multinomial(int(moved.sum()), replacement=True)]
        self._idle.masked_fill_(moved, 0)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def order(self) -> Tensor:
        """The place in the grid of each code in turn, `(n,)` int64."""
        places = torch.arange(self.num_codes)
        if not self.delayed:
            return places
        frame, book = places // self.shape[-1], places % self.shape[-1]
        return (frame + book).argsort(stable=True)

    @property
    def bounds(self) -> Tensor:
        """The first code and the end of the codes that each place may hold, `(n, 2)` int64."""
        ends = torch.tensor(self.sizes).cumsum(0)
        pairs = torch.stack([ends - torch.tensor(self.sizes), ends], dim=1)
        return pairs.repeat(self.num_codes // len(pairs), 1)[self.order]

    @torch.no_grad()
    def encode(self, media: list | Tensor) -> Tensor:
        """Codes `(K, n)` int64 of raw media, or of a tensor from `targets`, on the network's device.

        They are computed in the network's own dtype, also under autocast, so that a cache holds the same.
        """
        with torch.autocast(self.device.type, enabled=False):
            grid = self.family.encode(self.network, self.to_network(media))
        if self.family.hop is not None:
            grid = grid[:, : len(self.sizes)].transpose(1, 2)
        assert grid.shape[-1] == self.shape[-1], (grid.shape, self.shape)
        return grid.reshape(-1, self.num_codes)[:, self.order] + self.bounds[:, 0].to(grid.device)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> list[Any]:
        """Media of codes `(K, n)`: PIL images, uint8 clips `(F, H, W, 3)`, or float32 mono waveforms `(N,)`. Codes that
        are out of range or of another number are an `InputError`, and so is a network without a decoder."""
        if self.family.decode is None:
            raise InputError(
                f"a {self.family.network} only encodes: it has no decoder, so it cannot make a medium; use it for "
                f"input, or name another tokenizer of {self.modality}"
            )
        self.check_codes(codes)
        grid = codes.to(self.device) - self.bounds[:, 0].to(self.device)
        grid = grid[:, self.order.argsort()].view(-1, *self.shape)
        if self.family.hop is not None:
            grid = grid.transpose(1, 2)
        elif is_timed(self.modality) and self.family.clip_factor is None:
            grid = grid.flatten(0, 1)
        with torch.autocast(self.device.type, enabled=False):
            return self.to_media(self.family.decode(self.network, grid))

    def check_codes(self, codes: Tensor) -> None:
        """Raise an `InputError` unless codes are `(K, n)` integers, each of the codebook of its place."""
        if codes.dim() != 2 or codes.is_floating_point() or codes.shape[1] != self.num_codes:
            raise InputError(
                f"codes of {self.modality} are {codes.dtype} {tuple(codes.shape)}, expected integers (media, "
                f"{self.num_codes}): a grid of {' × '.join(map(str, self.shape))}"
            )
        low, high = self.bounds.to(codes.device).unbind(1)
        wrong = ((codes < low) | (codes >= high)).nonzero()
        if len(wrong):
            row, place = wrong[0].tolist()
            raise InputError(
                f"code {place} of {self.modality} {row} is {codes[row, place].item()}, expected {low[place].item()} to "
                f"{high[place].item() - 1}"
            )

    def codebook(self) -> Tensor | None:
        """The vectors of all codes, `(C, d)` float32; None if its codebooks differ in width."""
        books = self.family.codebooks(self.network)[: len(self.sizes)]
        return torch.cat(books).float() if len({book.shape[1] for book in books}) == 1 else None

    # ----------------------------------------------------------------------------------------------- the network's side

    def to_network(self, media: list | Tensor) -> Tensor:
        """The network's input: raw media, or a tensor from `targets`, normalised, and clips as it takes them."""
        found = media if isinstance(media, Tensor) else self.targets(media)
        found = found.to(self.device, next(self.network.parameters()).dtype)
        if is_timed(self.modality) and self.family.clip_factor is None:  # frame by frame
            found = found.transpose(1, 2).flatten(0, 1)
        if self.family.hop is not None:
            return found
        shift, scale = self._normalization(found)
        return (found - shift) / scale

    def _normalization(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation that the network expects to be taken out of `targets`' values."""
        if self.vocoder is not None:
            return self.vocoder.mean.to(found), self.vocoder.scale.to(found)
        mean, std = (one.to(found).view(-1, *[1] * (found.dim() - 2)) for one in (self._mean, self._std))
        unit = 127.5 * self.pixels["rescale_factor"]  # targets are x / 127.5 - 1, an image processor's x · rescale
        return mean / unit - 1, std / unit

    def to_media(self, made: Tensor) -> list[Any]:
        if self.family.hop is None:
            shift, scale = self._normalization(made)
            made = made * scale + shift
        if is_heard(self.modality):
            waveforms = self.vocoder(made[:, 0]) if self.vocoder is not None else made.mean(1)
            return list(waveforms.float().cpu().numpy())
        pixels = ((made.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        if not is_timed(self.modality):
            return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).numpy()]
        if self.family.clip_factor is None:
            pixels = pixels.unflatten(0, (-1, self.targets.num_frames))
        else:
            pixels = pixels.transpose(1, 2)
        return list(np.ascontiguousarray(pixels.permute(0, 1, 3, 4, 2).numpy()))

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder for `load_media_tokenizer`: the network, its vocoder and the settings."""
        self.network.save_pretrained(str(path))
        settings = {"pixels": self.pixels} | self.settings
        if self.vocoder is not None and "vocoder" not in settings:
            self.vocoder.save_pretrained(str(Path(path, OWN_VOCODER)))
            settings["vocoder"] = OWN_VOCODER
        Path(path, SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def family_of(network: nn.Module) -> TokenizerFamily:
    """The family of a network; an `InputError` if there is none."""
    for family in FAMILIES.values():
        if isinstance(network, family.network_class):
            return family
    known = ", ".join(family.network for family in FAMILIES.values())
    raise InputError(f"{type(network).__name__} is no tokenizer; expected {known}")


def load_media_tokenizer(path: str | Path | Source, modality: str, **options: Any) -> MediaTokenizer:
    """Load a tokenizer; from a whole model (Emu3, Janus, Chameleon) only the tokenizer's tensors are read.

    `path` is a folder, Hub id or `zoo:<name>`, and `options` are the other fields of `TokenizerSettings`, as in YAML.
    An `InputError` names a path that does not exist, has no tokenizer of the modality, or does not hold exactly its
    tensors.
    """
    source = Source.of(path, options, kind=TokenizerSettings)
    dtype = source.torch_dtype or torch.float32

    def build() -> MediaTokenizer:
        saved = source.place.json(SETTINGS_FILE) or {}
        pixels = (
            saved.pop("pixels", None)
            or (source.place.json("processor_config.json") or {}).get("image_processor")  # of transformers 5
            or source.place.json("preprocessor_config.json")
        )
        named = saved.pop("vocoder", None)
        vocoder = source.vocoder or named
        settings = saved | {name: value for name in _OPTIONS if (value := getattr(source, name)) is not None}
        voice = None
        if vocoder:  # in the tokenizer's own folder, or in that of a pipeline
            place = source.place if vocoder == OWN_VOCODER else Source(vocoder).place
            voice = load_network_of_pipeline(SpeechT5HifiGan, place.inside(OWN_VOCODER), dtype)
        network = _load_network(source)
        with built_from(f"{source.place}/{SETTINGS_FILE}"):
            tokenizer = MediaTokenizer(network, modality, vocoder=voice, pixels=pixels, **settings)
        if vocoder not in (None, OWN_VOCODER):
            tokenizer.settings["vocoder"] = vocoder
        return tokenizer

    return load(source, f"{modality} tokenizer", build, unused=("gguf_file", "quantization_config"))


def _load_network(source: Source) -> nn.Module:
    content = source.place.json("config.json") or {}
    whole = config = None
    name = content.get("_class_name")  # of diffusers
    if name is None:
        whole = source.config()
        config = whole.vq_config if whole.model_type in WHOLE_MODELS else whole
        name = config.model_type
    if name not in FAMILIES:
        raise InputError(
            f"{name!r} is no tokenizer; expected one of {', '.join(FAMILIES)}, or a whole model with one in it: "
            f"{', '.join(WHOLE_MODELS)}"
        )
    cls, dtype = FAMILIES[name].network_class, source.torch_dtype or torch.float32
    if config is None:
        if source.attn_implementation is not None:
            raise InputError(f"attn_implementation is set, but a {name} of diffusers has no choice of it; leave it out")
        return load_network_of_pipeline(cls, source.place, dtype)
    names = WHOLE_MODELS.get(whole.model_type, {})
    return load_network(cls, config, source.place, names=names, dtype=dtype, **source.model_options())
