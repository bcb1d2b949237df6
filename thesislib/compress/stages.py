"""The compression stages by the name that a recipe calls them."""

from thesislib.compress.depth import Depth
from thesislib.compress.width import Width

STAGES = {"depth": Depth, "width": Width}
