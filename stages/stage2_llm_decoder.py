"""Stage 2, LLM–decoder: text in, media out. Trains the output projectors and the signal tokens on `llm_decoder`.

accelerate launch stages/stage2_llm_decoder.py --config configs/tiny/stage2.yaml [--section.key value …]
"""

from anygpt.training.cli import run_stage
from anygpt.training.stages import LLM_DECODER

if __name__ == "__main__":
    run_stage(LLM_DECODER, __doc__)
