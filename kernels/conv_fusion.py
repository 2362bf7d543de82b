"""CAFormer's conv-attention fusion at the token grid.

Published: tokens as a GxG map, up to SxS bilinearly, plus ReLU(BN(conv5x5(image))), down to GxG
bilinearly. With S = 16 G the way down reads pixels 16i+7 and 16i+8 alone, so that

    out = blur(tokens) + mean over 4 of ReLU(conv6x6 stride 16 (image[5 : S-5, 5 : S-5]))

where the 6x6 kernel holds the folded 5x5 kernel at its four positions (channels 4*D, position major),
and blur is [1/64, 31/32, 1/64] along both axes with replicated edges. The [CLS] token passes by.
Saves the [B, D, S, S] tensor: 201 MB a picture in float32 at D = 768, S = 256.

Shapes: image [B, 3, S, S]; tokens [B, 1+G*G, D]; weight [4*D, 3, 6, 6]; bias [4*D].
Source: the released network of CALS; derivation in export/rewrite.py.
"""

from __future__ import annotations

import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import onnx_ops

NAME = "ConvTokenFusion"
STRIDE = 16
MARGIN = 5  # first pixel that any of the kernels reads
POSITIONS = 4  # pixels (16i+7, 16i+8) x (16j+7, 16j+8)
BLUR = (1 / 64, 31 / 32, 1 / 64)


def blur_matrix(grid: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The blur along one axis as a matrix [grid, grid], edges replicated."""
    side, middle, _ = BLUR
    matrix = torch.zeros(grid, grid, dtype=dtype)
    index = torch.arange(grid)
    matrix[index, index] = middle
    matrix[index, (index - 1).clamp(min=0)] += side
    matrix[index, (index + 1).clamp(max=grid - 1)] += side
    return matrix


def _blur(field: Tensor) -> Tensor:
    """Blur [B, G, G, D] along both grid axes."""
    matrix = blur_matrix(field.shape[1]).to(field)
    rows = (matrix @ field.flatten(2)).unflatten(2, field.shape[2:])
    return matrix @ rows


def conv_fusion_ref(image: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Plain form in the inputs' own dtype, [B, 1+G*G, D]."""
    size = image.shape[-1]
    grid, inner = size // STRIDE, slice(MARGIN, size - MARGIN)
    local = F.relu(F.conv2d(image[:, :, inner, inner], weight, bias, stride=STRIDE))
    local = local.unflatten(1, (POSITIONS, -1)).mean(1).flatten(2).transpose(1, 2)
    patches = _blur(tokens[:, 1:].unflatten(1, (grid, grid))).flatten(1, 2)
    return torch.cat([tokens[:, :1], patches + local], dim=1)


def _body() -> onnx.FunctionProto:
    """Write the standard-operator form."""
    grid = 16
    values = ", ".join(repr(float(x)) for x in blur_matrix(grid).flatten())
    return onnx_ops.body(f"""
    {NAME} (image, tokens, weight, bias) => (out)
    {{
        begin = Constant <value_ints = [{MARGIN}, {MARGIN}]> ()
        end = Constant <value_ints = [-{MARGIN}, -{MARGIN}]> ()
        plane = Constant <value_ints = [2, 3]> ()
        inner = Slice (image, begin, end, plane)
        local_map = Conv <strides = [{STRIDE}, {STRIDE}]> (inner, weight, bias)
        local_positive = Relu (local_map)
        by_position = Constant <value_ints = [0, {POSITIONS}, -1, {grid * grid}]> ()
        local_grouped = Reshape (local_positive, by_position)
        position_axis = Constant <value_ints = [1]> ()
        local_mean = ReduceMean <keepdims = 0> (local_grouped, position_axis)
        local_tokens = Transpose <perm = [0, 2, 1]> (local_mean)
        lengths = Constant <value_ints = [1, {grid * grid}]> ()
        cls, patches = Split <axis = 1> (tokens, lengths)
        matrix_flat = Constant <value_floats = [{values}]> ()
        square = Constant <value_ints = [{grid}, {grid}]> ()
        matrix_float = Reshape (matrix_flat, square)
        matrix = CastLike (matrix_float, tokens)
        as_rows = Constant <value_ints = [0, {grid}, -1]> ()
        rows = Reshape (patches, as_rows)
        rows_blurred = MatMul (matrix, rows)
        token_shape = Shape <start = 2> (patches)
        lead = Constant <value_ints = [0, {grid}, {grid}]> ()
        as_field = Concat <axis = 0> (lead, token_shape)
        field = Reshape (rows_blurred, as_field)
        blurred = MatMul (matrix, field)
        as_tokens = Shape (patches)
        blurred_tokens = Reshape (blurred, as_tokens)
        fused = Add (blurred_tokens, local_tokens)
        out = Concat <axis = 1> (cls, fused)
    }}""")


onnx_ops.register_body(NAME, _body)


def conv_fusion(image: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Fuse the tokens [B, 1+G*G, D] with the local features of image [B, 3, S, S], S = 16 G."""
    if onnx_ops.exporting():
        inputs = (image, tokens, weight, bias)
        return onnx_ops.emit(NAME, inputs, [tokens.shape], [tokens.dtype], {})[0]
    return conv_fusion_ref(image, tokens, weight, bias)
