"""Generation: the cost of a span, and the overhead of the any-to-any call.

First a span of 24 signal tokens over a prompt's cache, in one forward pass as in generation, against a forward pass of
one token and against the span token by token, in bf16 and fp32, at SmolLM2-135M's shape. Then an answer of text and one
picture, against the language model's own `generate` (with as many forward passes) followed by the bare pipeline. The
weights are random. `--busy` measures an answer of a trained model with a picture, on a quiet machine and while another
program keeps one core busy. Threads that wait actively (`OMP_WAIT_POLICY`) would make that one a hundred times as slow.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from anygpt import ModalDecoderModule, MultimodalModel, StableDiffusionDecoder
from anygpt.chat.chat_model import ChatModel, Settings
from anygpt.commands import CHECKPOINT
from anygpt.generation.choosing import Row, SpanRules
from anygpt.generation.decoding import SpanDecoder

import torch
from benchmarks._shared import DEVICE, make_pipeline, seconds, smollm2
from transformers import LlamaForCausalLM

ONE, SPAN, STEPWISE = "one token", "span of 24, one forward", "span of 24, token by token"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
APART, TOGETHER = "generate, then the pipeline", "any-to-any call"
QUIET, BUSY = "quiet", "one core busy"
VIDEO_TOKENS, IMAGE_TOKENS = 24, 4
PROMPT, NEW, REPEATS = 128, 32, 15  # tokens of a prompt, new tokens of an answer, timed forwards of a kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calls", type=int, default=3, help="timed any-to-any calls (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default: %(default)s)")
    parser.add_argument("--latents", type=int, default=32, help="height of the latents; SD 1.5 has 64 (%(default)s)")
    parser.add_argument("--busy", action="store_true", help="only the answer on a quiet and on a busy machine")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="for --busy (default: the quickstart's)")


def sides(options: argparse.Namespace) -> list[str]:
    if options.busy:
        return [QUIET, BUSY]
    spans = [f"{dtype}: {kind}" for dtype in DTYPES for kind in (ONE, SPAN, STEPWISE)]
    return spans + [f"answer: {way}" for way in (APART, TOGETHER)]


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    group, _, way = side.rpartition(": ")
    if not group:
        return {"median_s": measure_busy(side, options)}
    if group == "answer":
        return {"median_s": measure_answer(way, options)}
    return {"median_s": measure_span(way, DTYPES[group])}


@torch.no_grad()
def measure_span(kind: str, dtype: torch.dtype) -> float:
    model = make_model(8, VIDEO_TOKENS, dtype)
    llm = model.language_model
    prompt = torch.randint(49152, (1, PROMPT), device=DEVICE)
    span = torch.tensor([model.signal_tokens.ids["image"]], device=DEVICE)
    with model.signal_tokens.attached(llm) as tap:
        decoder = SpanDecoder(model, tap, [Row(SpanRules(model.signal_tokens.ids, budget=NEW))])
        cache = llm(prompt, use_cache=True).past_key_values
        embeds = llm.get_input_embeddings()(span[:, :1] if kind == ONE else span)
        chunks = embeds.split(1, dim=1) if kind == STEPWISE else [embeds]

        def work() -> None:
            cache.crop(PROMPT - cache.get_seq_length())
            length = PROMPT
            for chunk in chunks:
                length += chunk.shape[1]
                mask = torch.ones(1, length, dtype=torch.long, device=DEVICE)
                decoder.forward(llm, chunk, mask, cache)

        return seconds(work, REPEATS)


@torch.no_grad()
def measure_answer(side: str, options: argparse.Namespace) -> float:
    model = make_model(options.latents, IMAGE_TOKENS, torch.bfloat16)
    prompt = torch.randint(49152, (1, PROMPT), device=DEVICE)
    mask, decoder = torch.ones_like(prompt), model.decoders["image"].module

    def together() -> None:
        kwargs = {"image": {"num_inference_steps": options.steps, "seed": 0}}
        output = model.generate(prompt, mask, max_new_tokens=NEW, require=["image"], decoder_kwargs=kwargs)
        assert len(output.answers[0].images) == 1 and output.sequences.shape[1] == NEW

    # Forward passes of an answer with one picture: the prompt, each text token, and the span.
    forwards = NEW - IMAGE_TOKENS + 2
    condition = torch.randn(1, *decoder.condition_shape, device=DEVICE)

    def apart() -> None:
        ids = model.language_model.generate(prompt, attention_mask=mask, max_new_tokens=forwards, do_sample=False)
        assert ids.shape[1] == PROMPT + forwards
        generator = torch.Generator().manual_seed(0)
        size = {"height": decoder.height, "width": decoder.width}
        decoder.pipeline(prompt_embeds=condition, num_inference_steps=options.steps, generator=generator, **size)

    return seconds(together if side == TOGETHER else apart, options.calls)


def measure_busy(side: str, options: argparse.Namespace) -> float:
    model = ChatModel(options.checkpoint)
    settings = Settings(max_new_tokens=64, require=tuple(model.makes)[:1])
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if side == BUSY else None
    try:
        asked = [{"role": "user", "content": "Draw a red ring."}]
        return seconds(lambda: model.answer(asked, settings), options.calls)
    finally:
        if other is not None:
            other.kill()


def make_model(latents: int, num_signal_tokens: int, dtype: torch.dtype) -> MultimodalModel:
    """A model of SmolLM2-135M's shape in `dtype` and a narrow Stable Diffusion, whose answers end by length alone."""
    llm = LlamaForCausalLM(smollm2()).to(dtype)
    llm.generation_config.eos_token_id = llm.config.eos_token_id = None
    llm.generation_config.pad_token_id = 0
    decoder = StableDiffusionDecoder(make_pipeline(latents))
    model = MultimodalModel({}, llm, {"image": ModalDecoderModule(decoder, num_signal_tokens=num_signal_tokens)})
    model.signal_tokens.set_ids({"image": list(range(49152, 49152 + num_signal_tokens))})
    return model.to(DEVICE).eval()
