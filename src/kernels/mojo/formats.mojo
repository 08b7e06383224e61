"""How the weights of a unit, 16 rows of W, are stored.

Rows of floats lie one after the other, as in a checkpoint. Blocks are those of GGUF with the 16 rows of a
unit side by side (`unispec.kernels.packing` writes them): W[n, k] = scale[n, g] * (code[n, k] - ZERO) -
least[n, g], where a group g has 32 columns, of Q6_K 16.
"""
from std.memory import bitcast

comptime LANES = 16
"""Rows of a unit."""
comptime F = SIMD[DType.float32, LANES]
comptime I = SIMD[DType.int32, LANES]
comptime Codes = SIMD[DType.uint8, 4 * LANES]
"""Of each row of a unit the codes of 4 columns."""


def is_rows[form: StaticString]() -> Bool:
    """Whether it is floats, row by row."""
    return form == "f32" or form == "bf16" or form == "f16"


def has_least[form: StaticString]() -> Bool:
    """Whether something is subtracted from a group."""
    return form == "q4_k" or form == "q5_k"


def zero[form: StaticString]() -> Int:
    """The code that stands for 0."""
    comptime if form == "q8_0":
        return 128
    comptime if form == "q4_0":
        return 8
    comptime if form == "q6_k":
        return 32
    return 0


def group_size[form: StaticString]() -> Int:
    """Columns that share a scale."""
    return 16 if form == "q6_k" else 32


def groups_per_block[form: StaticString]() -> Int:
    """Groups whose scales share a factor."""
    comptime if form == "q4_k" or form == "q5_k":
        return 8
    comptime if form == "q6_k":
        return 16
    return 1


def block_bytes[form: StaticString]() -> Int:
    """Bytes of a unit's block."""
    comptime if form == "q8_0":
        return 32 + 512
    comptime if form == "q4_0":
        return 32 + 256
    comptime if form == "q4_k":
        return 64 + 256 + 2048
    comptime if form == "q5_k":
        return 64 + 256 + 512 + 2048
    return 32 + 256 + 3072


def unit_bytes[form: StaticString](K: Int) -> Int:
    """Bytes of a unit with K columns."""
    comptime if form == "f32":
        return LANES * 4 * K
    comptime if form == "bf16" or form == "f16":
        return LANES * 2 * K
    return K // (group_size[form]() * groups_per_block[form]()) * block_bytes[form]()


@always_inline
def _f16(w: ImmPointer[UInt8, _], at: Int) -> F:
    return w.unsafe_offset(at).unsafe_bitcast[Float16]().unsafe_load[width=LANES]().cast[DType.float32]()


@always_inline
def _u8(w: ImmPointer[UInt8, _], at: Int) -> F:
    return w.unsafe_load[width=LANES](at).cast[DType.int32]().cast[DType.float32]()


@always_inline
def _i8(w: ImmPointer[UInt8, _], at: Int) -> F:
    return bitcast[DType.int8, LANES](w.unsafe_load[width=LANES](at)).cast[DType.int32]().cast[DType.float32]()


@always_inline
def scale[form: StaticString](block: ImmPointer[UInt8, _], g: Int) -> F:
    """Of group g of a block, one a row."""
    comptime if form == "q4_k" or form == "q5_k":
        return _f16(block, 0) * _u8(block, 64 + LANES * g)
    comptime if form == "q6_k":
        return _f16(block, 0) * _i8(block, 32 + LANES * g)
    return _f16(block, 0)


@always_inline
def least[form: StaticString](block: ImmPointer[UInt8, _], g: Int) -> F:
    """What is subtracted in group g of a block, one a row."""
    return _f16(block, 32) * _u8(block, 64 + 8 * LANES + LANES * g)


@always_inline
def codes[form: StaticString, four: Int](block: ImmPointer[UInt8, _], g: Int) -> Codes:
    """Codes of the columns 4 * four to 4 * four + 3 of group g of a block."""
    comptime V = 4 * LANES
    comptime if form == "q8_0":
        return block.unsafe_load[width=V](32 + V * four)
    comptime if form == "q4_0":
        return _nibbles[four // 4](block.unsafe_load[width=V](32 + V * (four % 4)))
    comptime if form == "q4_k":
        return _nibbles[four // 4](block.unsafe_load[width=V](320 + 4 * V * g + V * (four % 4)))
    comptime if form == "q5_k":
        var low = _nibbles[four // 4](block.unsafe_load[width=V](320 + 8 * V + 4 * V * g + V * (four % 4)))
        var bits = block.unsafe_load[width=V](320 + V * four)
        return low | (((bits >> UInt8(g)) & 1) << 4)
    # Of Q6_K, 4 groups have their upper bits in the same bytes.
    var at = 288 + 12 * V * (g // 4)
    var word = block.unsafe_load[width=V](at + V * four)
    var low = block.unsafe_load[width=V](at + 4 * V + 4 * V * ((g % 4) // 2) + V * four)
    return ((low >> UInt8(4 * (g % 2))) & 15) | (((word >> UInt8(2 * (g % 4))) & 3) << 4)


@always_inline
def _nibbles[upper: Int](bytes: Codes) -> Codes:
    comptime if upper == 0:
        return bytes & 15
    # There is no shift of bytes; what comes in from the neighbour is masked off.
    return bitcast[DType.uint8, 4 * LANES](bitcast[DType.uint32, LANES](bytes) >> 4) & 15
