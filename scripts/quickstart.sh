#!/usr/bin/env bash
# The main job on a fresh machine: install, make tiny parts and data, train stages 1, 2 and 3, and answer a mixed
# prompt with text, an image, a video and a sound. No GPU, no hub, no network after the installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=.venv/bin/python
out=runs/quickstart
launch=(.venv/bin/accelerate launch --config_file configs/accelerate/one_process.yaml)

echo "== Data: pictures, clips, sounds and words about coloured shapes"
"$python" -m anygpt.toyworld --output runs/toyworld

echo "== Stage 1, encoder–LLM"
"${launch[@]}" stages/stage1_encoder_llm.py --config configs/tiny/stage1.yaml \
    --run.output_dir "$out/stage1" --run.resume never

echo "== Stage 2, LLM–decoder"
"${launch[@]}" stages/stage2_llm_decoder.py --config configs/tiny/stage2.yaml \
    --run.output_dir "$out/stage2" --run.resume never --model.init_from "$out/stage1/final"

echo "== Stage 3, instruction tuning"
"${launch[@]}" stages/stage3_instruction_tuning.py --config configs/tiny/stage3.yaml \
    --run.output_dir "$out/stage3" --run.resume never --model.init_from "$out/stage2/final"

echo "== A mixed prompt"
rm -rf "$out/report"
pictures=(runs/toyworld/eval/image/*)
sounds=(runs/toyworld/eval/audio/*)
mkdir -p "$out/report"
"$python" scripts/chat.py --checkpoint "$out/stage3/final" --output "$out/report" \
    --attach "${pictures[0]}" "${sounds[0]}" --prompt "What are these? Answer with a picture, a clip and a sound." \
    --require image video audio --max-new-tokens 96 | tee "$out/report/answer.txt"

echo
echo "Asked about ${pictures[0]} and ${sounds[0]}, the model gave:"
echo "  text   $out/report/answer.txt"
for suffix in png mp4 wav; do
    for file in "$out"/report/*."$suffix"; do echo "  $suffix    $file"; done
done
echo "Its parts are tiny and untrained, so do not expect sense yet; every hop is the real one."
echo "Talk to it: .venv/bin/python scripts/chat.py"
