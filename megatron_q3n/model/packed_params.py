"""PackedParams: megatron-core's description of packed documents, with our `Packing` as one more field.

megatron-core's and TransformerEngine's attention and `roll_tensor` read the standard fields; our modules read
`.packing`.
"""

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams

from megatron_q3n.packing import Packing


@dataclass
class PackedParams(PackedSeqParams):
    """PackedSeqParams of a Packing; make it with `of`."""

    packing: Packing | None = None

    @classmethod
    def of(cls, packing: Packing) -> "PackedParams":
        """Return the description of one packed row."""
        return cls(
            qkv_format="thd",
            cu_seqlens_q=packing.cu_seqlens,
            cu_seqlens_kv=packing.cu_seqlens,
            max_seqlen_q=packing.longest,
            max_seqlen_kv=packing.longest,
            packing=packing,
        )


def packing_of(params: PackedSeqParams | None) -> Packing | None:
    """Return the Packing of what megatron-core passes on; None for plain rows."""
    if params is None:
        return None
    assert isinstance(params, PackedParams), "packed rows are described by PackedParams"
    return params.packing
