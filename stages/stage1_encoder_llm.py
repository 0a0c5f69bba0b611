"""Stage 1, encoder–LLM: media in, text out. Trains the input projectors on `encoder_llm`; everything else is frozen.

accelerate launch stages/stage1_encoder_llm.py --config configs/tiny/stage1.yaml [--section.key value …]
"""

from anygpt.training.cli import run_stage
from anygpt.training.stages import ENCODER_LLM

if __name__ == "__main__":
    run_stage(ENCODER_LLM, __doc__)
