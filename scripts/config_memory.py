"""The table of configs/README.md: memory, operations and time of each recipe's stages, computed from shapes.

    python tests/hub_mirror.py runs/shapes --real --hollow
    HF_HUB_CACHE=runs/shapes HF_HUB_OFFLINE=1 python scripts/config_memory.py

Rows are as long as `data.max_length` allows; the time is for all updates, at 125 teraflops a card.
"""

from anygpt.training.check import check
from anygpt.training.cli import quiet_libraries
from anygpt.training.config import parse_config
from anygpt.training.folder import GIB
from anygpt.training.stages import ENCODER_LLM, INSTRUCTION_TUNING, LLM_DECODER

STAGES = {1: ENCODER_LLM, 2: LLM_DECODER, 3: INSTRUCTION_TUNING}
RECIPES = {"small": (1, 2, 3), "llava": (1, 3), "nextgpt": (1, 2, 3)}
CARDS = (24, 40, 48, 80)
COLUMNS = ("config", "weights, GiB", "training, GiB", "card, GB", "PFLOP an update", "hours", "generation, GiB")


def main() -> None:
    quiet_libraries()
    print("|", " | ".join(COLUMNS), f"|\n{'|---' * len(COLUMNS)}|", flush=True)
    for recipe, stage in ((recipe, stage) for recipe, stages in RECIPES.items() for stage in stages):
        config = parse_config(["--config", f"configs/{recipe}/stage{stage}.yaml"])
        config.data.train = []  # rows of maximal length
        found = check(config, STAGES[stage])
        assert found.plan is not None, found.faults
        plan, train = found.plan, config.train
        total = plan.total / GIB
        card = next((str(size) for size in CARDS if total < 0.95 * size), f"over {CARDS[-1]}")
        update = sum(plan.flops.values()) / len(plan.flops) * train.gradient_accumulation_steps
        hours = train.max_steps * update / 125e12 / 3600
        numbers = (f"{plan.weights / GIB:.1f}", f"{total:.1f}", card, f"{update / 1e15:.3f}", f"{hours:.1f}")
        generation = f"{plan.weights / GIB:.1f} ({plan.offloaded / GIB:.1f})"
        print("|", " | ".join((f"{recipe}/stage{stage}", *numbers, generation)), "|", flush=True)


if __name__ == "__main__":
    main()
