"""The loss of batches that mix kinds of rows is transformers' own: LLaVA's, with images, without, and both."""

import pytest
import torch
from conftest import enlarge
from test_parity_vlm import IMAGE, PAD, llava

from anygpt import MultimodalModel

KINDS = {"media": [True, True, True], "text": [False, False, False], "both": [True, False, True]}


def make_batch(with_image, side):
    """Rows of different lengths, labels on all text but a row's first token."""
    torch.manual_seed(1)
    rows = [
        torch.cat([torch.tensor([1]), torch.full((4 * image,), IMAGE), torch.randint(2, 100, (length,))])
        for image, length in zip(with_image, (9, 3, 6), strict=True)
    ]
    longest = max(map(len, rows))
    pads = [torch.full((longest - len(row),), PAD) for row in rows]
    join = {"left": lambda row, pad: torch.cat([pad, row]), "right": lambda row, pad: torch.cat([row, pad])}[side]
    ids = torch.stack([join(row, pad) for row, pad in zip(rows, pads, strict=True)])
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    batch["labels"] = ids.masked_fill((ids == PAD) | (ids == IMAGE) | (ids == 1), -100)
    return batch | {"pixel_values": torch.randn(sum(with_image), 3, 16, 16)} if any(with_image) else batch


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    native = enlarge(llava()[0]).eval()
    return native, MultimodalModel.from_pretrained_multimodal_model(native).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_batch_is_transformers_own(models, kind, side):
    native, ours = models
    batch = make_batch(KINDS[kind], side)
    theirs, output = native(**batch).loss, ours(**batch)
    torch.testing.assert_close(output.loss, theirs, rtol=1e-5, atol=1e-6)
    assert len(output.losses) == len(set(KINDS[kind])), "each kind of row is logged by itself"
    weights = native.model.multi_modal_projector.linear_2.weight
    if kind != "text":
        expected, found = (torch.autograd.grad(loss, weights)[0] for loss in (theirs, output.loss))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", [[[0], [1], [2]], [[1], [0, 2]], [[0, 1], [2]]])
def test_micro_batches_add_up_to_transformers_loss_of_all_rows(models, split):
    """As on several processes, too: what the parts share are the counts of the whole update."""
    native, ours = models
    batch = make_batch(KINDS["both"], "left")
    counts, pixels = ours.count_losses(batch), dict(zip((0, 2), batch["pixel_values"], strict=True))
    total = 0.0
    for rows in split:
        part = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "labels")}
        if images := [pixels[row] for row in rows if row in pixels]:
            part["pixel_values"] = torch.stack(images)
        total += float(ours(**part, loss_counts=counts).loss.detach())
    assert total == pytest.approx(float(native(**batch).loss.detach()), rel=1e-5)
