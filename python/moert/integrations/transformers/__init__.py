"""moert in Hugging Face transformers: importing this registers the experts implementation "moert".

`from_pretrained(..., experts_implementation="moert")` or `model.set_experts_implementation("moert")` selects it;
`DistributedConfig(ep_implementation="moert")` spreads the experts over ranks by moert's dispatch and combine.
`swap_(model)` serves the models whose MoE blocks lie outside transformers' experts interface. `MoertConfig` packs the
experts of a checkpoint while it loads, and packed checkpoints load with nothing said.
"""

import re

import transformers

if tuple(map(int, re.match(r"(\d+)\.(\d+)", transformers.__version__).groups())) < (5, 22):
    raise ImportError(f"transformers must be 5.22 or newer, got {transformers.__version__}: pip install -U 'moert[hf]'")

from transformers.distributed import expert_parallel as theirs  # noqa: E402
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface  # noqa: E402
from transformers.integrations.moe import ExpertsInterface  # noqa: E402

from moert.integrations.transformers.experts import experts_forward, fp8_experts_forward  # noqa: E402
from moert.integrations.transformers.foreign import ForeignConfig  # noqa: E402, F401
from moert.integrations.transformers.gguf_model import load_gguf  # noqa: E402
from moert.integrations.transformers.loading import InexactWarning, load_quantized  # noqa: E402
from moert.integrations.transformers.lora import install  # noqa: E402
from moert.integrations.transformers.quantizer import MoertConfig  # noqa: E402
from moert.integrations.transformers.swap import swap_, unswap_  # noqa: E402

__all__ = ["InexactWarning", "MoertConfig", "experts_forward", "load_gguf", "load_quantized", "swap_", "unswap_"]

# transformers validates a name against both registries together: in one alone it would load and then fail in forward.
ExpertsInterface.register("moert", experts_forward)
FP8ExpertsInterface.register("moert", fp8_experts_forward)
if hasattr(theirs, "EPImplementationInterface"):  # from transformers 5.23 on
    from moert.integrations.transformers.expert_parallel import MoertEP, place_experts_  # noqa: F401

    __all__ += ["place_experts_"]
    theirs.EPImplementationInterface.register("moert", MoertEP)
install()
