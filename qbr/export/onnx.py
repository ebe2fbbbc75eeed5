"""to_onnx(model, example, path): a prepared model as an ONNX file with packed integer weights."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qbr import kernels
from qbr.convert import warn_unset
from qbr.export.codes import check_steps, stored_weights
from qbr.export.lowering import IR_VERSIONS, Lowering, opset, storage, translation
from qbr.export.optional import need
from qbr.layers import renormalised
from qbr.quantizers import quantizers
from qbr.running import copied, unwrapped
from qbr.whole import write_whole

LARGEST_FILE = 1_800_000_000  # bytes of weights; protobuf ends at 2 GB


def to_onnx(
    model: nn.Module,
    example: Tensor | tuple[Any, ...] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    fold_batchnorm: bool = False,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
) -> Path:
    """Write a prepared model as ONNX: integer weights at their width, activations quantized with the learned steps.

    Weights are INT2 (1 and 2 bits), INT4 (3 and 4) or INT8 (5 to 8) initializers behind DequantizeLinear, with a
    scale for the tensor or for each channel; their codes are qbr's to the bit. Activations are QuantizeLinear and
    DequantizeLinear on UINT8 after a ReLU (which the type's lower end replaces) and on INT8 elsewhere; a Clip keeps
    narrower ranges and a clip value. A 1-bit signed activation is a comparison. The model is exported in eval mode; it
    is left as it was.

    Args:
        model: a model from ``qbr.prepare``, trained or calibrated, in float32 or float16.
        example: what forward takes: a tensor, a tuple of positional arguments, or a dict of named ones. Its sizes
            are the file's, but for the batch.
        path: where the file goes; written whole or not at all. Above 2 GB its weights go beside it.
        dynamic_batch: whether dimension 0 of every tensor in ``example`` may vary, by one common size.
        dynamic_shapes: torch.export's own description of what may vary, instead of ``dynamic_batch``.
        fold_batchnorm: put a BatchNorm behind a quantized convolution or linear layer into the weight's scales and
            an Add. No code of a weight changes, which makes it exact in real numbers; in float32 it rounds at another
            place, and moves activations that lie within rounding of a tie, which is why it is off. Where a factor is
            not positive, or the layer's output is read elsewhere too, the BatchNorm stays.
        input_names, output_names: names in the file, by position; else the exporter's.

    Returns:
        path. The opset is the lowest that has the weights' types: 25 with weights of 1 or 2 bits, else 21.

    Raises:
        ImportError: naming the pip command, where onnx or onnxscript is missing.
        TypeError, ValueError: for a model without quantizers, with a step that is not positive and finite, in
            float64 or bfloat16, with codes that no 8-bit type holds, whose forward does not take example or fixes
            the batch size, and for a graph that onnx refuses. FileNotFoundError: for no folder at path.

    Warns:
        UserWarning: of step sizes that were never set from data.
    """
    for name in ("onnx", "onnxscript"):
        need(name)
    model = unwrapped(model)
    found = quantizers(model)
    if not found:
        raise ValueError(f"model ({type(model).__name__}) has no quantizers: qbr.prepare it, or load a prepared one; "
                         "a float or converted model is torch.onnx.export's")  # fmt: skip
    for name, quantizer in found.items():
        check_steps(f"{name}.alpha", quantizer.alpha.detach())
        try:
            storage(quantizer.spec)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    low = next((name for name, each in model.named_parameters() if each.dtype == torch.bfloat16), None)
    if low is not None:
        raise TypeError(f"{low} is bfloat16, in which onnxruntime has no layers: export model.float()")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {Path(path).parent}")
    warn_unset(model)
    version = opset([quantizer.spec for quantizer in found.values() if quantizer.kind == "weight"])
    args, kwargs = _arguments(example)
    shapes = dynamic_shapes
    if shapes is None and dynamic_batch:
        args, kwargs = _map((args, kwargs), _two)
        shapes = _batch_shapes(args, kwargs)
    program = _torch_export(_for_export(model), args, kwargs, shapes)
    table = {getattr(torch.ops, f"qbr_{name}").lsq_fwd.default: translation for name in kernels.MODULES}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*(axis name|LeafSpec)")  # the exporter's notes to itself
        onnx_program = torch.onnx.export(
            program, dynamo=True, dynamic_shapes=shapes, opset_version=version, custom_translation_table=table,
            optimize=False, verbose=False, input_names=input_names, output_names=output_names,
        )  # fmt: skip
    optimizer = need("onnxscript.optimizer")
    optimizer.optimize_ir(onnx_program.model)  # constants; of what is in float also BatchNorms
    Lowering(onnx_program.model, version, fold_batchnorm)
    optimizer.optimize_ir(onnx_program.model)
    need("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(onnx_program.model)  # it names this machine's files
    onnx_program.model.ir_version = IR_VERSIONS[version]
    return _write(onnx_program.model, Path(path))


def _for_export(model: nn.Module) -> nn.Module:
    model = copied(model).cpu().eval()
    for each in stored_weights(model):
        if getattr(each.module, "max_norm", None) is not None:  # for good: forward would do it in place
            each.weight.data = renormalised(each.module, each.weight.detach())
            each.module.max_norm = None
    return model


def _arguments(example) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example.detach().cpu(),), {}
    if isinstance(example, (tuple, list)) and example:
        return _map(tuple(example), lambda t: t.detach().cpu()), {}
    if isinstance(example, Mapping) and example:
        return (), _map(dict(example), lambda t: t.detach().cpu())
    raise TypeError(f"example is a {type(example).__name__}: expected a tensor, a tuple of forward's positional "
                    "arguments, or a dict of named ones")  # fmt: skip


def _map(tree, function):
    return pytree.tree_map_only(Tensor, function, tree)


def _two(x: Tensor) -> Tensor:
    """A batch of one as a batch of two: torch.export takes a size of 1 for a constant."""
    return torch.cat([x, x]) if x.dim() and len(x) == 1 else x


def _batch_shapes(args: tuple, kwargs: dict) -> tuple | dict:
    batch = torch.export.Dim("batch")
    tree = kwargs if kwargs else args
    return pytree.tree_map(lambda x: {0: batch} if isinstance(x, Tensor) and x.dim() else None, tree)


def _torch_export(model: nn.Module, args: tuple, kwargs: dict, shapes) -> torch.export.ExportedProgram:
    from torch._dynamo.exc import UserError  # here, since it imports all of torch._dynamo

    with kernels.use_backend("reference"), torch.no_grad():
        try:
            copied(model)(*args, **kwargs)
        except Exception as error:  # whatever forward raises
            sizes = [tuple(each.shape) for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            raise ValueError(f"example, of the shapes {sizes}, does not go through the model's forward: "
                             f"{type(error).__name__}: {error}") from error  # fmt: skip
    try:
        with kernels.use_backend("reference"), torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except UserError as error:
        if shapes is None or "onstraint" not in str(error):
            raise
        raise ValueError("this model's forward fixes the size of its batch: to_onnx(..., dynamic_batch=False) exports "
                         f"it for the size of example; torch.export says: {str(error).strip()}") from error  # fmt: skip


def _write(model: Any, path: Path) -> Path:
    """Checked by onnx, then put in its place in one step, weights beside it and all."""
    ir, onnx = need("onnxscript").ir, need("onnx")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    names = [f"{path.name}.data", f"{path.name}.2.data"]
    old = _beside(path, names)
    # Weights go to a name that the file which is there does not use: until it is replaced it stays whole.
    beside = next(name for name in names if name != old) if size > LARGEST_FILE else None

    def write(temporary: Path) -> None:
        ir.save(model, temporary, external_data=beside)
        try:
            onnx.checker.check_model(str(temporary), full_check=True)
        except Exception as error:  # onnx's errors have no base of their own
            raise ValueError(f"{path}: onnx refuses the graph of this model: {error}") from error
        if beside is not None:
            with (path.parent / beside).open("rb+") as file:
                os.fsync(file.fileno())

    try:
        write_whole(path, write)
    except BaseException:
        if beside is not None and _beside(path, names) != beside:
            (path.parent / beside).unlink(missing_ok=True)
        raise
    if old is not None:
        (path.parent / old).unlink(missing_ok=True)
    return path


def _beside(path: Path, names: list[str]) -> str | None:
    """Which of ``names`` the ONNX file at ``path`` has its weights in; None for none, and for no file."""
    if not path.is_file() or not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return next((name for name in names if content.find(name.encode()) >= 0), None)
