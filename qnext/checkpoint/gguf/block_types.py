"""How the numbers of a GGUF file are stored: what is read, what is written, and what is refused by name. No torch.

Names, numbers and sizes are those of ggml (ggml/include/ggml.h, ggml/src/ggml-common.h).
"""

from __future__ import annotations

from typing import NamedTuple


class BlockType(NamedTuple):
    """How a row is stored: blocks of `num_items` numbers in `num_bytes` bytes. `number` is the type's id in files."""

    name: str
    number: int
    num_items: int
    num_bytes: int


BLOCK_TYPES = {
    block.name: block
    for block in (
        BlockType("F32", 0, 1, 4),
        BlockType("F16", 1, 1, 2),
        BlockType("BF16", 30, 1, 2),
        BlockType("F64", 28, 1, 8),
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q5_1", 7, 32, 24),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q2_K", 10, 256, 84),
        BlockType("Q3_K", 11, 256, 110),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("IQ1_S", 19, 256, 50),
        BlockType("IQ1_M", 29, 256, 56),
        BlockType("IQ2_XXS", 16, 256, 66),
        BlockType("IQ2_XS", 17, 256, 74),
        BlockType("IQ2_S", 22, 256, 82),
        BlockType("IQ3_XXS", 18, 256, 98),
        BlockType("IQ3_S", 21, 256, 110),
        BlockType("IQ4_NL", 20, 32, 18),
        BlockType("IQ4_XS", 23, 256, 136),
        BlockType("TQ1_0", 34, 256, 54),
        BlockType("TQ2_0", 35, 256, 66),
        BlockType("MXFP4", 39, 32, 17),
        BlockType("NVFP4", 40, 64, 36),
        BlockType("Q1_0", 41, 128, 18),
        BlockType("Q2_0", 42, 64, 18),
    )
}
BLOCK_OF_NUMBER = {block.number: block for block in BLOCK_TYPES.values()}

# number -> name and what it is, of types that are known and not read
REFUSED_TYPES = {
    4: "Q4_2, a type that llama.cpp dropped in 2023",
    5: "Q4_3, a type that llama.cpp dropped in 2023",
    9: "Q8_1, which llama.cpp keeps for activations",
    15: "Q8_K, which llama.cpp keeps for activations",
    24: "I8, integers",
    25: "I16, integers",
    26: "I32, integers",
    27: "I64, integers",
    31: "Q4_0_4_4, Q4_0 in an order for one kind of processor",
    32: "Q4_0_4_8, Q4_0 in an order for one kind of processor",
    33: "Q4_0_8_8, Q4_0 in an order for one kind of processor",
    36: "IQ4_NL_4_4, IQ4_NL in an order for one kind of processor",
    37: "IQ4_NL_4_8, IQ4_NL in an order for one kind of processor",
    38: "IQ4_NL_8_8, IQ4_NL in an order for one kind of processor",
}

# option of `qnext convert --type` -> block type of the matrices and the number of general.file_type (llama.h)
EXPORT_TYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}

# block type -> bits of the codes that a folder keeps as they are; other quantised types become plain numbers
KEPT_BITS = {"Q8_0": 8, "Q4_0": 4}
