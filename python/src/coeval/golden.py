"""Golden rows: inputs with the outputs that the training process got, by which every gateway judges what it has loaded.

They travel as an Arrow IPC file: a column `input:<name>` per input and `output:<name>` per output, each a fixed-size list, and
tolerances by dtype in the schema's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from . import errors

# What the server takes: each row is run by itself whenever the model is loaded.
ROWS_MAX = 256

_DTYPES = {"float32", "float64", "int32", "int64", "bool"}
TOLERANCE = b"coeval.tolerance"


class Golden:
    """Rows of inputs and what the model gave for them where it was trained.

    `inputs` maps each declared input to a tensor or array of `[rows, width]`, as `Dataset.torch_batches(model=...)` yields
    them: that is the encoder that serves. `outputs` maps each declared output to `[rows]` or `[rows, k]`. A few dozen rows
    that differ are plenty; at most 256.

    An output may differ by `atol + rtol * |expected|`. Without `rtol` and `atol` that is 1e-4 and 1e-5 for float32, 1e-7 and
    1e-7 for float64, and nothing for integers and booleans. Given as numbers they hold for float32 and float64; a mapping
    says it by dtype, as `rtol={"float32": 1e-3}`.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        *,
        rtol: float | Mapping[str, float] | None = None,
        atol: float | Mapping[str, float] | None = None,
    ) -> None:
        if not inputs or not outputs:
            raise errors.InvalidArgument("golden rows need inputs and outputs")
        self.columns = {f"input:{name}": _array(name, values) for name, values in inputs.items()}
        self.columns |= {f"output:{name}": _array(name, values) for name, values in outputs.items()}
        rows = {name: len(array) for name, array in self.columns.items()}
        count = next(iter(rows.values()))
        if set(rows.values()) != {count}:
            listed = ", ".join(f"`{name}` {number}" for name, number in rows.items())
            raise errors.InvalidArgument(f"golden rows must all have the same number of rows: {listed}")
        if not 1 <= count <= ROWS_MAX:
            raise errors.InvalidArgument(f"{count} golden rows; give 1 to {ROWS_MAX}")
        #: How many there are.
        self.rows = count
        self.tolerances = _tolerances(rtol, atol)

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Any], outputs: Sequence[str], **tolerances: Any) -> Golden:
        """Runs `model` on `inputs`, in their order, and takes what it gives for `outputs`, in theirs."""
        try:
            import torch
        except ImportError:
            errors.missing("torch", "Golden.of")
        with torch.inference_mode():
            given = model(*(torch.as_tensor(values) for values in inputs.values()))
        given = list(given) if isinstance(given, (tuple, list)) else [given]
        if len(given) != len(outputs):
            raise errors.InvalidArgument(f"the model gave {len(given)} outputs, and {len(outputs)} are named")
        return cls(inputs, dict(zip(outputs, given, strict=True)), **tolerances)

    def to_bytes(self) -> bytes:
        """The file, as `coeval model register --golden` and the server take it."""
        arrays, fields = [], []
        for name, values in self.columns.items():
            width = values.shape[1]
            item = pa.array(values.reshape(-1))
            kind = pa.list_(pa.field("item", item.type, nullable=False), width)
            arrays.append(pa.FixedSizeListArray.from_arrays(item, type=kind))
            fields.append(pa.field(name, kind, nullable=False))
        metadata = {TOLERANCE: json.dumps(self.tolerances).encode()} if self.tolerances else None
        batch = pa.record_batch(arrays, schema=pa.schema(fields, metadata=metadata))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue().to_pybytes()


def _array(name: str, values: Any) -> np.ndarray:
    """Rows of numbers, `[rows, width]`."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.ascontiguousarray(values)
    if array.ndim == 1:
        array = array[:, None]
    if array.dtype.name not in _DTYPES:
        raise errors.InvalidArgument(f"golden rows: `{name}` is {array.dtype.name}; tensors are {', '.join(sorted(_DTYPES))}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise errors.InvalidArgument(f"golden rows: `{name}` has the shape {list(array.shape)}; give [rows] or [rows, width]")
    return array


def _tolerances(
    rtol: float | Mapping[str, float] | None, atol: float | Mapping[str, float] | None
) -> dict[str, dict[str, float]]:
    """By dtype; what is not said is the server's to know, but a half needs its other half."""
    usual = {"float32": (1e-4, 1e-5), "float64": (1e-7, 1e-7)}

    def said(value: float | Mapping[str, float] | None) -> dict[str, float]:
        if value is None:
            return {}
        return dict(value) if isinstance(value, Mapping) else dict.fromkeys(usual, float(value))

    relative, absolute = said(rtol), said(atol)
    for dtype in {*relative, *absolute} - _DTYPES:
        raise errors.InvalidArgument(f"a tolerance for the dtype `{dtype}`; tensors are {', '.join(sorted(_DTYPES))}")
    return {
        dtype: {
            "rtol": relative.get(dtype, usual.get(dtype, (0.0, 0.0))[0]),
            "atol": absolute.get(dtype, usual.get(dtype, (0.0, 0.0))[1]),
        }
        for dtype in sorted({*relative, *absolute})
    }
