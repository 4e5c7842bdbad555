"""Hugging Face's form of the model: names, shapes, config.json and safetensors files.

`table` is the heart, made of `rule`s: which megatron-core tensor is made of which published ones.
`families` says what differs between the model families, `model_config` translates config.json,
`weights` reads and writes folders of safetensors tensor by tensor. megatron-core's checkpoints are
not known here; what brings the two together is `conversion`.
"""

from megatron_q3n.hf.families import FAMILIES, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_NEXT, Family
from megatron_q3n.hf.rule import Rule
from megatron_q3n.hf.table import rules, to_hf, to_megatron

__all__ = [
    "FAMILIES",
    "QWEN3_5_MOE",
    "QWEN3_5_MOE_TEXT",
    "QWEN3_NEXT",
    "Family",
    "Rule",
    "rules",
    "to_hf",
    "to_megatron",
]
