"""The compression stages by the name that a recipe calls them."""

from thesislib.compress.depth import Depth
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.lora.stage import Lora
from thesislib.compress.width import Width

STAGES = {"depth": Depth, "width": Width, "lora": Lora, "rtn": Rtn, "gptq": Gptq, "eora": Eora}
