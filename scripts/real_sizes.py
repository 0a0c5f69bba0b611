"""Run the stages of configs/small at the parts' real sizes: two updates each and an answer, with time and peak memory.

    python tests/hub_mirror.py runs/real_sizes/hub ID … --real      # or a cache with the real repositories
    python scripts/real_sizes.py --hub runs/real_sizes/hub --data DIR --output runs/real_sizes

`DIR` holds `cc3m/`, `webvid/` and `audiocap/` in NExT-GPT's layout. Each stage is a process with micro-batches of one
row in bfloat16, whose memory without mapped files, sampled ten times a second, is printed beside `--check`'s estimate.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

SCRIPTS = ("stages/stage1_encoder_llm.py", "stages/stage2_llm_decoder.py", "stages/stage3_instruction_tuning.py")
KINDS = {"cc3m": "images", "webvid": "videos", "audiocap": "audios"}
GENERATE = """
import sys
from anygpt import MultimodalModel, MultimodalProcessor
model = MultimodalModel.from_pretrained(sys.argv[1]).eval()
processor = MultimodalProcessor.from_pretrained(sys.argv[1], model=model)
batch = processor(text=["Make a picture, a clip and a sound."])
answer = model.generate(**batch, max_new_tokens=40, require=["image", "video", "audio"], decoder_kwargs={
    "image": {"num_inference_steps": 1}, "audio": {"num_inference_steps": 1, "audio_length_in_s": 2.56},
    "video": {"num_inference_steps": 1, "num_frames": 8, "height": 256, "width": 256}}).answers[0]
print("made", answer.images[0].size, answer.videos[0].shape, answer.audios[0].shape)
"""


def run(command: list[str], hub: Path) -> dict[str, float | str]:
    """Run a command; returns its output, seconds, and peak memory without mapped files in GiB."""
    start, peak = time.monotonic(), 0
    environment = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    with tempfile.TemporaryFile("w+") as said:
        process = psutil.Popen(command, env=environment, text=True, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            memory = process.memory_info()
            peak = max(peak, memory.rss - memory.shared)
            time.sleep(0.1)
        said.seek(0)
        output = said.read()
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {process.returncode}:\n{output[-3000:]}")
    return {"output": output, "seconds": round(time.monotonic() - start), "peak_gib": round(peak / 2**30, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hub", type=Path, required=True, help="an HF cache with the parts")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--output", type=Path, default=Path("runs/real_sizes"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    found = {}
    for stage, script in enumerate(SCRIPTS, 1):
        files = []
        for name, media in KINDS.items():
            folder, task = options.data / name, "comprehension" if stage == 1 else "generation"
            place = {"path": str(folder / f"{name}_{task}.json"), "media_root": str(folder / media)}
            files.append(place | {"format": "nextgpt"})
        command = [sys.executable, script, "--config", f"configs/small/stage{stage}.yaml"]
        command += ["--run.output_dir", str(options.output / f"stage{stage}"), "--data.train", json.dumps(files)]
        command += ["--run.device=cpu", "--run.resume=never", "--run.tracker=none", "--data.num_workers=0"]
        command += ["--train.max_steps=2", "--train.batch_size=1", "--train.gradient_accumulation_steps=1"]
        command += ["--train.warmup_steps=0", "--train.log_steps=1"]
        start = options.output / f"stage{stage - 1}" / "final"
        command += ["--model.init_from", str(start) if stage > 1 else "null"]
        planned = re.search(r"computed, not measured: .*", run([*command, "--check"], options.hub)["output"])[0]
        print(f"stage {stage}: {planned}", flush=True)
        found[f"stage{stage}"] = run(command, options.hub)
        print({k: v for k, v in found[f"stage{stage}"].items() if k != "output"}, flush=True)
    final = options.output / "stage3/final"
    found["generation"] = run([sys.executable, "-c", GENERATE, str(final)], options.hub)
    print(found["generation"]["output"].splitlines()[-1], found["generation"]["seconds"], "s")
    (options.output / "measured.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
