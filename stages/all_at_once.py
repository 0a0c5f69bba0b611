"""All at once: one next-token cross-entropy over text and the codes that media tokenizers give every medium. Trains the
whole language model (`lora.r: 0`) or LoRA on it, and the rows of the codes.

    accelerate launch stages/all_at_once.py --config configs/tiny/all_at_once.yaml [--section.key value …]
"""

from anygpt.training.cli import run_stage
from anygpt.training.stages import ALL_AT_ONCE

if __name__ == "__main__":
    run_stage(ALL_AT_ONCE, __doc__)
