"""Encoded batches as torch tensors.

The server has encoded the rows; what is left to do here is to look at Arrow's memory as tensors and to cut batches of the
size asked for. Nothing here knows what a feature is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import errors

if TYPE_CHECKING:
    import torch

# The column that says where serving would refuse a row.
REFUSED = "__refused"


class TorchBatches:
    """Iterates over dicts of tensors, all of the same number of rows (but for the last)."""

    def __init__(
        self,
        batches: Iterator[pa.RecordBatch],
        batch_size: int,
        labels: Sequence[str],
        *,
        first: int,
        drop_last: bool,
        skip: bool,
    ) -> None:
        try:
            import torch
        except ImportError:
            errors.missing("torch", "Dataset.torch_batches")
        self._torch: Any = torch
        self._source = batches
        self._batch_size = batch_size
        self._labels = list(labels)
        self._drop_last = drop_last
        self._skip = skip
        self._read = first
        #: Rows of the share that have been yielded or left out so far: what `resume` takes.
        self.rows = first
        #: Rows left out because serving would refuse them.
        self.refused = 0
        self._batches = self._cut()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        return next(self._batches)

    def close(self) -> None:
        """Gives up the rest."""
        self._batches.close()

    def _cut(self) -> Any:
        # Pieces of the batch being put together, each with the number of the row after each of its rows.
        pending: list[tuple[dict[str, Any], np.ndarray]] = []
        waiting = 0
        try:
            for batch in self._source:
                tensors, ends = self._tensors(batch)
                at = 0
                while at < len(ends):
                    count = min(self._batch_size - waiting, len(ends) - at)
                    piece = {name: tensor[at : at + count] for name, tensor in tensors.items()}
                    pending.append((piece, ends[at : at + count]))
                    waiting += count
                    at += count
                    if waiting == self._batch_size:
                        yield self._put_together(pending)
                        pending, waiting = [], 0
            if pending and not self._drop_last:
                yield self._put_together(pending)
            self.rows = self._read
        finally:
            close = getattr(self._source, "close", None)
            if close is not None:
                close()

    def _put_together(self, pending: list[tuple[dict[str, Any], np.ndarray]]) -> dict[str, Any]:
        self.rows = int(pending[-1][1][-1])
        if len(pending) == 1:
            return pending[0][0]
        return {name: self._torch.cat([piece[name] for piece, _ in pending]) for name in pending[0][0]}

    def _tensors(self, batch: pa.RecordBatch) -> tuple[dict[str, Any], np.ndarray]:
        ends = np.arange(self._read + 1, self._read + batch.num_rows + 1)
        self._read += batch.num_rows
        names = batch.schema.names
        if REFUSED in names:
            refused = batch.column(REFUSED)
            count = pc.sum(refused).as_py() or 0
            if count and not self._skip:
                row = int(ends[pc.index(refused, True).as_py()]) - 1
                raise errors.InvalidArgument(
                    f"serving would refuse {count} of these rows (the first is row {row} of this reader): a feature is null "
                    "and the model says `missing: refuse`. Leave them out with refused='skip', or say in the model what "
                    "a missing value is"
                )
            if count:
                self.refused += count
                kept = pc.invert(refused)
                batch = batch.filter(kept)
                ends = ends[kept.to_numpy(zero_copy_only=False)]
        tensors = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if name == REFUSED:
                continue
            if name in self._labels:
                tensors[name] = self._label(name, column)
            elif pa.types.is_fixed_size_list(column.type) and not batch.schema.field(name).nullable:
                tensors[name] = self._input(column)
        missing = [name for name in self._labels if name not in tensors]
        if missing:
            raise errors.InvalidArgument(
                f"the training set has no column `{missing[0]}`; it has {', '.join(f'`{name}`' for name in names)}"
            )
        return tensors, ends

    def _input(self, column: pa.FixedSizeListArray) -> Any:
        values = self._view(column.flatten())
        return values.view(len(column), column.type.list_size)

    def _label(self, name: str, column: pa.Array) -> Any:
        kind = column.type
        if pa.types.is_decimal(kind):
            column = column.cast(pa.float64())
        elif pa.types.is_timestamp(kind) or pa.types.is_date64(kind):
            column = column.cast(pa.int64())
        elif pa.types.is_date32(kind):
            column = column.cast(pa.int32())
        kind = column.type
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        if pa.types.is_fixed_size_list(kind) and not column.null_count and not column.flatten().null_count:
            return self._input(column)
        if not is_number:
            raise errors.InvalidArgument(f"label `{name}` is {kind}, which is no tensor; numbers, booleans and times are")
        if column.null_count:
            if not pa.types.is_floating(kind):
                raise errors.InvalidArgument(
                    f"label `{name}` is null in some rows; leave them out of the spine, or make it a float column (NaN)"
                )
            column = column.fill_null(float("nan"))
        if pa.types.is_boolean(kind):
            return self._view(column.cast(pa.uint8())).view(self._torch.bool)
        return self._view(column)

    def _view(self, values: pa.Array) -> Any:
        """A tensor over the same memory."""
        if not len(values):
            return self._torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())
        data = values.buffers()[1]
        width = values.type.bit_width // 8
        if data is None or (data.address + values.offset * width) % width:
            # The network may have put it where a tensor cannot lie.
            return self._torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())
        return self._torch.from_dlpack(values)
