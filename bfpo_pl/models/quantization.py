"""Frozen base weights in four bits, under an adapter that trains (QLoRA)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from bfpo_pl.component import Component, UserError


class FourBit(Component):
    """Base weights in four bits by bitsandbytes, for `LoRA` on NVIDIA GPUs: a 7B model takes 4 GB instead of 14.

    Not run yet: no GPU was at hand. The weights are stored in a tensor of the type that is computed in, since FSDP2
    gathers blocks in that type and would otherwise convert the packed bits.

    Args:
        quant_type: nf4 (for weights that are normally distributed) or fp4.
        double_quantization: Quantises the quantisation's own constants, too: 0.4 bits a weight less.
        compute_dtype: Type in which the weights multiply: bfloat16 with ``trainer.precision: bf16-mixed``, float32 with
            32-true.
    """

    def __init__(
        self,
        quant_type: Literal["nf4", "fp4"] = "nf4",
        double_quantization: bool = True,
        compute_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> None:
        for name, value, known in (
            ("quant_type", quant_type, ("nf4", "fp4")),
            ("compute_dtype", compute_dtype, ("bfloat16", "float32")),
        ):
            if value not in known:
                raise UserError(f"FourBit: {name} must be {' or '.join(known)}, not {value!r}.")
        self.quant_type = quant_type
        self.double_quantization = double_quantization
        self.compute_dtype = compute_dtype

    def check(self) -> None:
        """Fails early if this machine cannot quantise.

        Raises:
            UserError: bitsandbytes or a GPU is missing.
        """
        if find_spec("bitsandbytes") is None:
            raise UserError("FourBit: bitsandbytes is not installed: `pip install bitsandbytes`. It needs NVIDIA GPUs.")
        if not torch.cuda.is_available():
            raise UserError("FourBit: 4-bit weights need an NVIDIA GPU, and torch finds none on this machine.")

    def check_precision(self, precision: str) -> None:
        """Fails early if the trainer computes in another type.

        Raises:
            UserError: It does.
        """
        wanted = {"bfloat16": "bf16-mixed", "float32": "32-true"}[self.compute_dtype]
        if precision != wanted:
            raise UserError(
                f"FourBit: compute_dtype {self.compute_dtype} goes with trainer.precision {wanted}, not {precision}: "
                f"the 4-bit weights would be converted as if they were numbers."
            )

    def config(self) -> BitsAndBytesConfig:
        """The same for transformers."""
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quantization,
            bnb_4bit_compute_dtype=self.compute_dtype,
            bnb_4bit_quant_storage=self.compute_dtype,
        )
