"""Small ONNX files for tests, written operator by operator: y = softplus(x) W, of each input type and layout."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {"float": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}


def weight(shape, outputs=3):
    return np.random.default_rng(0).normal(size=(int(np.prod(shape)), outputs)).astype(np.float32)


def write(path, shape=(1, 2, 3), *, dtype="float", batch="batch", nhwc=False, outputs=3, inputs=1):
    """Return the path. Bytes are divided by 255; images in NHWC are transposed before they are flattened."""
    sample = (*shape[1:], shape[0]) if nhwc else shape
    nodes = [helper.make_node("Cast", ["x0"], ["f"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("Div", ["f", "scale"], ["d"]))
    nodes.append(
        helper.make_node("Transpose", ["d"], ["t"], perm=[0, 3, 1, 2] if nhwc else list(range(1 + len(shape))))
    )
    nodes += [helper.make_node("Softplus", ["t"], ["s"]), helper.make_node("Flatten", ["s"], ["v"])]
    nodes.append(helper.make_node("MatMul", ["v", "w"], ["y"]))
    scale = np.float32(255 if dtype == "uint8" else 1)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(f"x{i}", TYPES[dtype], [batch, *sample]) for i in range(inputs)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, outputs])],
        [numpy_helper.from_array(weight(shape, outputs), "w"), numpy_helper.from_array(scale, "scale")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(path))
    return path
