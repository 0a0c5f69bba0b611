"""Stage 3, instruction tuning: any mix in, any mix out. Trains LoRA on the language model, all projectors and the
signal tokens, on the term of each row: `llm`, `encoder_llm`, `llm_decoder` or `encoder_decoder`.

    accelerate launch stages/stage3_instruction_tuning.py --config configs/tiny/stage3.yaml [--section.key value …]
"""

from anygpt.training.cli import run_stage
from anygpt.training.stages import INSTRUCTION_TUNING

if __name__ == "__main__":
    run_stage(INSTRUCTION_TUNING, __doc__)
