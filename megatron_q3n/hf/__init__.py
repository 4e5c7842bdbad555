"""Hugging Face format of the model: parameter names, shapes, config.json and safetensors files.

    param_mapping.py      mapping of one megatron-core parameter to the Hugging Face tensors that it is made of
    model_mapping.py      the mappings of all parameters (names, shapes, reshapes)
    families.py           differences between the model families
    function_settings.py  settings whose values the format implies; other values are not exported
    model_config.py       translation of config.json to the model section
    published_config.py   and back, with every released field
    weights.py            reading and writing of safetensors folders, tensor by tensor

megatron-core checkpoints are not read here; `conversion` combines the two.
"""

from megatron_q3n.hf.families import FAMILIES, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_NEXT, Family
from megatron_q3n.hf.model_mapping import param_mappings, to_hf, to_megatron
from megatron_q3n.hf.param_mapping import ParamMapping

__all__ = [
    "FAMILIES",
    "QWEN3_5_MOE",
    "QWEN3_5_MOE_TEXT",
    "QWEN3_NEXT",
    "Family",
    "ParamMapping",
    "param_mappings",
    "to_hf",
    "to_megatron",
]
