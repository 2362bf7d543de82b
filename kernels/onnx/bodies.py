"""The operators' bodies for ONNX: each kernel once more, in standard operators.

A runtime without our plugins inlines them, and so they are what ONNX Runtime computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx
import onnx.parser

from kernels import conv_fusion, gaussian_guidance, latent_pool
from kernels.onnx.attention import MASKED_SCORE, NODES
from kernels.onnx.ops import DOMAIN, OPSET


def body(text: str, opset: int = OPSET) -> onnx.FunctionProto:
    """Parse an operator's body, written in ONNX's text form without its header."""
    return onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{text}')


def bodies(names: Sequence[str], opset: int = OPSET) -> Iterator[onnx.FunctionProto]:
    """Yield the bodies of the operators in `names`, whose nodes mean the same from `OPSET` to `opset`.

    Raises KeyError for one that has none.
    """
    for name in names:
        function = BODIES[name](name)
        function.opset_import[0].version = opset
        yield function


# Long because a body is a list of nodes; what the forms share stands in the middle.
def _attention(name: str) -> onnx.FunctionProto:
    """Write the standard-operator form of one of the variants."""
    form = NODES[name]
    biasing = f"""
        bias_float = Cast <to = {onnx.TensorProto.FLOAT}> (bias)
        scores = Add (scaled_products, bias_float)"""
    masking = f"""
        keep_flat = Cast <to = {onnx.TensorProto.FLOAT}> (mask)
        heads_axes = Constant <value_ints = [{"1, 2" if form.mask == 2 else "1"}]> ()
        keep = Unsqueeze (keep_flat, heads_axes)
        one = Constant <value_float = 1.0> ()
        ignored = Sub (one, keep)
        floor = Constant <value_float = {MASKED_SCORE}> ()
        penalty = Mul (ignored, floor)
        penalised = Add (scores, penalty)
        masked_weights = Softmax <axis = -1> (penalised)
        weights = Mul (masked_weights, keep)"""
    plain = "\n        weights = Softmax <axis = -1> (scores)"
    averaging = """
        heads_axis = Constant <value_ints = [1]> ()
        guide = ReduceMean <keepdims = 0> (scores, heads_axis)"""
    return body(f"""
    {name} <heads, scale> ({", ".join(form.names)}) => (out{", guide" if form.guided else ""})
    {{
        keep_two = Constant <value_ints = [0, 0]> ()
        rest = Constant <value_ints = [-1]> ()
        head_count = Constant <value_ints: ints = @heads> ()
        split = Concat <axis = 0> (keep_two, head_count, rest)
        merge = Concat <axis = 0> (keep_two, rest)
        scale_float = Constant <value_float: float = @scale> ()
        scale_typed = CastLike (scale_float, query)
        query_heads = Reshape (query, split)
        query_rows = Transpose <perm = [0, 2, 1, 3]> (query_heads)
        scaled = Mul (query_rows, scale_typed)
        key_heads = Reshape (key, split)
        key_columns = Transpose <perm = [0, 2, 3, 1]> (key_heads)
        value_heads = Reshape (value, split)
        value_rows = Transpose <perm = [0, 2, 1, 3]> (value_heads)
        products = MatMul (scaled, key_columns)
        {"scaled_products" if form.bias else "scores"} = Cast <to = {onnx.TensorProto.FLOAT}> (products){
        biasing if form.bias else ""
    }{masking if form.mask else plain}{averaging if form.guided else ""}
        weights_typed = CastLike (weights, query)
        mixed = MatMul (weights_typed, value_rows)
        mixed_tokens = Transpose <perm = [0, 2, 1, 3]> (mixed)
        out = Reshape (mixed_tokens, merge)
    }}""")


def _conv_fusion(name: str) -> onnx.FunctionProto:
    """Write the standard-operator form."""
    grid = 16
    values = ", ".join(repr(float(x)) for x in conv_fusion.blur_matrix(grid).flatten())
    return body(f"""
    {name} (image, tokens, weight, bias) => (out)
    {{
        begin = Constant <value_ints = [{conv_fusion.MARGIN}, {conv_fusion.MARGIN}]> ()
        end = Constant <value_ints = [-{conv_fusion.MARGIN}, -{conv_fusion.MARGIN}]> ()
        plane = Constant <value_ints = [2, 3]> ()
        inner = Slice (image, begin, end, plane)
        local_map = Conv <strides = [{conv_fusion.STRIDE}, {conv_fusion.STRIDE}]> (inner, weight, bias)
        local_positive = Relu (local_map)
        batch_rest = Constant <value_ints = [0, -1]> ()
        width = Shape <start = 2> (tokens)
        patch_count = Constant <value_ints = [{grid * grid}]> ()
        by_kernel = Concat <axis = 0> (batch_rest, width, patch_count)
        local_grouped = Reshape (local_positive, by_kernel)
        kernel_axis = Constant <value_ints = [1]> ()
        local_sum = ReduceSum <keepdims = 0> (local_grouped, kernel_axis)
        share_float = Constant <value_float = {1 / conv_fusion.POSITIONS}> ()
        share = CastLike (share_float, tokens)
        local_mean = Mul (local_sum, share)
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


# Long because a body is a list of nodes; halves of it would share most of their names.
def _gaussian_guidance(name: str) -> onnx.FunctionProto:
    """Write the standard-operator form."""
    pads = ", ".join([str(gaussian_guidance.PADDING)] * 4)
    strides = ", ".join([str(gaussian_guidance.STRIDE)] * 2)
    return body(f"""
    {name} <size> (box, weight, bias) => (out)
    {{
        box_float = Cast <to = {onnx.TensorProto.FLOAT}> (box)
        size_ints = Constant <value_ints: ints = @size> ()
        size_float = Cast <to = {onnx.TensorProto.FLOAT}> (size_ints)
        pixel_box = Mul (box_float, size_float)
        pair = Constant <value_ints = [2, 2]> ()
        centre, extent = Split <axis = 1> (pixel_box, pair)
        two = Constant <value_float = 2.0> ()
        half_extent = Div (extent, two)
        squared = Mul (half_extent, half_extent)
        last_axis = Constant <value_ints = [1]> ()
        axis_two = Constant <value_ints = [2]> ()
        axis_three = Constant <value_ints = [3]> ()
        variance = ReduceSum <keepdims = 1> (squared, last_axis)
        doubled = Mul (variance, two)
        floor = Constant <value_float = {gaussian_guidance.FLOOR}> ()
        spread = Add (doubled, floor)
        zero = Constant <value_int = 0> ()
        unit = Constant <value_int = 1> ()
        first = Constant <value_ints = [0]> ()
        limit = Squeeze (size_ints, first)
        positions = Range (zero, limit, unit)
        pixels = Cast <to = {onnx.TensorProto.FLOAT}> (positions)
        spread_column = Unsqueeze (spread, last_axis)
        centre_column = Unsqueeze (centre, axis_two)
        offset = Sub (pixels, centre_column)
        distance = Mul (offset, offset)
        ratio = Div (distance, spread_column)
        negative = Neg (ratio)
        profile = Exp (negative)
        ones = Constant <value_ints = [1, 1]> ()
        across, along = Split <axis = 1> (profile, ones)
        across_row = Unsqueeze (across, axis_two)
        along_column = Unsqueeze (along, axis_three)
        product = Mul (along_column, across_row)
        low = Constant <value_float = 0.0> ()
        high = Constant <value_float = 1.0> ()
        clamped = Clip (product, low, high)
        gaussian = CastLike (clamped, weight)
        convolved = Conv <strides = [{strides}], pads = [{pads}]> (gaussian, weight, bias)
        out = Relu (convolved)
    }}""")


def _latent_pool(name: str) -> onnx.FunctionProto:
    """Write the standard-operator form of one of the two variants."""
    eps, mask = latent_pool.EPS, name == latent_pool.MASKED
    masking = f"""
        keep_flat = Cast <to = {onnx.TensorProto.FLOAT}> (mask)
        heads_axis = Constant <value_ints = [1]> ()
        keep = Unsqueeze (keep_flat, heads_axis)
        one = Constant <value_float = 1.0> ()
        ignored = Sub (one, keep)
        floor = Constant <value_float = {MASKED_SCORE}> ()
        bias_score = Mul (ignored, floor)
        biased = Add (by_head, bias_score)
        masked_weights = Softmax <axis = -1> (biased)
        weights = Mul (masked_weights, keep)"""
    plain = "\n        weights = Softmax <axis = -1> (by_head)"
    return body(f"""
    {name} (tokens, weight, bias, query{", mask" if mask else ""}) => (out)
    {{
        tokens_float = Cast <to = {onnx.TensorProto.FLOAT}> (tokens)
        weight_float = Cast <to = {onnx.TensorProto.FLOAT}> (weight)
        bias_float = Cast <to = {onnx.TensorProto.FLOAT}> (bias)
        query_float = Cast <to = {onnx.TensorProto.FLOAT}> (query)
        normed = LayerNormalization <axis = -1, epsilon = {eps}> (tokens_float, weight_float, bias_float)
        columns = Transpose <perm = [1, 0]> (query_float)
        scores = MatMul (normed, columns)
        by_head = Transpose <perm = [0, 2, 1]> (scores){masking if mask else plain}
        pooled = MatMul (weights, normed)
        out = CastLike (pooled, tokens)
    }}""")


BODIES: dict[str, Callable[[str], onnx.FunctionProto]] = {
    **dict.fromkeys(NODES, _attention),
    conv_fusion.NAME: _conv_fusion,
    gaussian_guidance.NAME: _gaussian_guidance,
    **dict.fromkeys((latent_pool.NAME, latent_pool.MASKED), _latent_pool),
}
