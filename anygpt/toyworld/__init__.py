"""ToyWorld: an offline world of coloured shapes in which everything can be trained and measured on a CPU.

`python -m anygpt.toyworld --output DIR` writes its datasets; `zoo()` returns the folder of tiny pretrained parts of
the real classes, and `part_path("image_encoder")` the folder of one part.
"""

from anygpt.parts.source import zoo_part as part_path
from anygpt.toyworld.world import COLOURS, HELD_OUT, MODALITIES, MOTIONS, SEEN, SHAPES, THINGS, Thing
from anygpt.toyworld.zoo import PARTS, write_untrained, zoo  # the function `zoo` replaces the module

__all__ = ["COLOURS", "HELD_OUT", "MODALITIES", "MOTIONS", "PARTS", "SEEN", "SHAPES", "THINGS", "Thing"]
__all__ += ["part_path", "write_untrained", "zoo"]
