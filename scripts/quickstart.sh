#!/usr/bin/env bash
# The whole pipeline on a fresh machine: install, write data, train stages 1, 2 and 3 on the zoo's parts, answer a mixed
# prompt with text, an image, a video and a sound, and measure the any-to-any matrix. Needs no GPU, no hub, and no network
# after the installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
# Threads look for work some microseconds before they sleep, in place of not at all: waking costs more than a tiny product.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-3000}"
python=.venv/bin/python
# accelerate's default is one thread; for tiny parts more may be slower, which is measured.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$("$python" -m anygpt.threads)}"
out=runs/quickstart
launch=(.venv/bin/accelerate launch --config_file configs/accelerate/one_process.yaml)

echo "== Data: pictures, clips, sounds and words about coloured shapes"
"$python" -m anygpt.toyworld --output runs/toyworld --kinds stage1 eval
{  # while stage 1 trains; stage 3 reads each medium's features six times
    "$python" -m anygpt.toyworld --output runs/toyworld --kinds stage2 stage3
    OMP_NUM_THREADS=1 "$python" -m anygpt cache-features --overwrite --stage 3 --config configs/tiny/stage2.yaml --model.init_from null \
        --data.train "[{path: runs/toyworld/stage3.jsonl}]" --data.cache_dir "$out/cache"
} &
data=$!

echo "== Stage 1, encoder–LLM"
"${launch[@]}" stages/stage1_encoder_llm.py --config configs/tiny/stage1.yaml \
    --run.output_dir "$out/stage1" --run.resume never

wait "$data"
echo "== Stage 2, LLM–decoder"
"${launch[@]}" stages/stage2_llm_decoder.py --config configs/tiny/stage2.yaml \
    --run.output_dir "$out/stage2" --run.resume never --model.init_from "$out/stage1/final"

echo "== Stage 3, instruction tuning"
"${launch[@]}" stages/stage3_instruction_tuning.py --config configs/tiny/stage3.yaml \
    --run.output_dir "$out/stage3" --run.resume never --model.init_from "$out/stage2/final" --data.cache_dir "$out/cache"

rm -rf "$out/report"
mkdir -p "$out/report/answer"
pictures=(runs/toyworld/eval/image/*)
"$python" scripts/chat.py --checkpoint "$out/stage3/final" --output "$out/report/answer" --attach "${pictures[0]}" \
    --prompt "What is this? Answer with a picture, a clip and a sound." \
    --require image video audio --max-new-tokens 96 > "$out/report/answer/answer.txt" &  # while the model is evaluated
answer=$!

echo "== The any-to-any matrix, on things that stages 1 to 3 never saw"
# With the checkpoint's own 20 denoising steps one sample of the caption baseline differs, and it takes half as long again.
"$python" scripts/evaluate.py --checkpoint "$out/stage3/final" --suite toyworld --output "$out/report" --samples 20 --steps 10

wait "$answer"
echo
echo "== A mixed prompt: what is in ${pictures[0]}? Answer with a picture, a clip and a sound."
cat "$out/report/answer/answer.txt"

echo
echo "The report: $out/report/report.html (the numbers: matrix.json, the samples: contact_sheet.png and samples/)"
echo "Talk to it: .venv/bin/python scripts/chat.py"
