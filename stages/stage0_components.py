"""Stage 0, components (optional): makes pretrained parts, such as the tiny zoo's. Trains what `train.parts` says:
encoders by InfoNCE (`loss.encoder`), the language model by NLL (`loss.llm`), a decoder's denoiser and text encoder by
denoising (`loss.decoder`), its VAE and vocoder, and media tokenizers, by reconstruction (`loss.reconstruction`). Each
trained part is written to `<output_dir>/parts/` as an ordinary `from_pretrained` folder.

    accelerate launch stages/stage0_components.py --config configs/tiny/stage0/words.yaml [--section.key value …]
"""

from anygpt.training.cli import run_stage
from anygpt.training.components import write_components
from anygpt.training.stages import COMPONENTS

if __name__ == "__main__":
    run_stage(COMPONENTS, __doc__, afterwards=write_components)
