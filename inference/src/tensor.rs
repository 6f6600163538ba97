//! Tensors as they travel between the gateway and a model: owned, dense, row-major, rows first. Requests must be
//! joined into batches, padded and taken apart again, and that is all this type does; arithmetic is the model's.

use sha2::{Digest, Sha256};

/// The element types that features become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    Float32,
    Float64,
    Int64,
    Int32,
    Bool,
}

impl Dtype {
    /// The name used in definitions and in error texts.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Float32 => "float32",
            Dtype::Float64 => "float64",
            Dtype::Int64 => "int64",
            Dtype::Int32 => "int32",
            Dtype::Bool => "bool",
        }
    }

    pub fn from_name(name: &str) -> Option<Dtype> {
        [Dtype::Float32, Dtype::Float64, Dtype::Int64, Dtype::Int32, Dtype::Bool]
            .into_iter()
            .find(|dtype| dtype.name() == name)
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The elements of a tensor, in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub enum TensorData {
    Float32(Vec<f32>),
    Float64(Vec<f64>),
    Int64(Vec<i64>),
    Int32(Vec<i32>),
    Bool(Vec<bool>),
}

/// Applies one expression to the vector inside, whatever its element type.
macro_rules! for_each_type {
    ($data:expr, $values:ident => $body:expr) => {
        match $data {
            TensorData::Float32($values) => $body,
            TensorData::Float64($values) => $body,
            TensorData::Int64($values) => $body,
            TensorData::Int32($values) => $body,
            TensorData::Bool($values) => $body,
        }
    };
}

/// The same, where the result is again a vector of that type.
macro_rules! map_each_type {
    ($data:expr, $values:ident => $body:expr) => {
        match $data {
            TensorData::Float32($values) => TensorData::Float32($body),
            TensorData::Float64($values) => TensorData::Float64($body),
            TensorData::Int64($values) => TensorData::Int64($body),
            TensorData::Int32($values) => TensorData::Int32($body),
            TensorData::Bool($values) => TensorData::Bool($body),
        }
    };
}

impl TensorData {
    pub fn dtype(&self) -> Dtype {
        match self {
            TensorData::Float32(_) => Dtype::Float32,
            TensorData::Float64(_) => Dtype::Float64,
            TensorData::Int64(_) => Dtype::Int64,
            TensorData::Int32(_) => Dtype::Int32,
            TensorData::Bool(_) => Dtype::Bool,
        }
    }

    pub fn len(&self) -> usize {
        for_each_type!(self, values => values.len())
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn zeros(dtype: Dtype, len: usize) -> TensorData {
        match dtype {
            Dtype::Float32 => TensorData::Float32(vec![0.0; len]),
            Dtype::Float64 => TensorData::Float64(vec![0.0; len]),
            Dtype::Int64 => TensorData::Int64(vec![0; len]),
            Dtype::Int32 => TensorData::Int32(vec![0; len]),
            Dtype::Bool => TensorData::Bool(vec![false; len]),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    #[error("a tensor of shape {shape:?} needs {needed} elements, but has {got}")]
    Length { shape: Vec<usize>, needed: usize, got: usize },
    #[error("a tensor of shape {shape:?} has no rows dimension, or too many elements to count")]
    Shape { shape: Vec<usize> },
    #[error("tensors of {first} and of {other} cannot be joined along their rows")]
    Mismatch { first: String, other: String },
}

/// A dense tensor. Invariants: the shape has at least one dimension, the first one counts rows, and the product of
/// the shape is the number of elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: TensorData,
}

/// The tensors of one request by name. All have the same number of rows.
pub type TensorBatch = Vec<(String, Tensor)>;

impl Tensor {
    pub fn try_new(shape: Vec<usize>, data: TensorData) -> Result<Tensor, TensorError> {
        let needed = shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
        match needed {
            Some(needed) if needed == data.len() && !shape.is_empty() => Ok(Tensor { shape, data }),
            Some(needed) if !shape.is_empty() => Err(TensorError::Length { shape, needed, got: data.len() }),
            _ => Err(TensorError::Shape { shape }),
        }
    }

    /// A tensor of zeros (false for bool) with so many rows.
    pub fn zeros(dtype: Dtype, rows: usize, row_shape: &[usize]) -> Tensor {
        let shape: Vec<usize> = std::iter::once(rows).chain(row_shape.iter().copied()).collect();
        let data = TensorData::zeros(dtype, shape.iter().product());
        Tensor { shape, data }
    }

    pub fn dtype(&self) -> Dtype {
        self.data.dtype()
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    /// The shape of one row: `[]` for one value per row.
    pub fn row_shape(&self) -> &[usize] {
        &self.shape[1..]
    }

    pub fn data(&self) -> &TensorData {
        &self.data
    }

    pub fn into_data(self) -> TensorData {
        self.data
    }

    /// The memory that the elements take.
    pub fn bytes(&self) -> usize {
        for_each_type!(&self.data, values => size_of_val(values.as_slice()))
    }

    /// The dtype and row shape in messages: `float32 [_, 31]`.
    pub fn kind(&self) -> String {
        kind(self.dtype(), self.row_shape())
    }

    /// Joins tensors of one dtype and row shape along their rows, in order.
    pub fn concat(tensors: &[&Tensor]) -> Result<Tensor, TensorError> {
        let Some(first) = tensors.first() else {
            return Err(TensorError::Shape { shape: Vec::new() });
        };
        let differs = |tensor: &&&Tensor| tensor.dtype() != first.dtype() || tensor.row_shape() != first.row_shape();
        if let Some(other) = tensors.iter().find(differs) {
            return Err(TensorError::Mismatch { first: first.kind(), other: other.kind() });
        }
        let mut shape = first.shape.clone();
        shape[0] = tensors.iter().map(|tensor| tensor.rows()).sum();
        let mut joined = TensorData::zeros(first.dtype(), 0);
        for tensor in tensors {
            match (&mut joined, &tensor.data) {
                (TensorData::Float32(all), TensorData::Float32(part)) => all.extend_from_slice(part),
                (TensorData::Float64(all), TensorData::Float64(part)) => all.extend_from_slice(part),
                (TensorData::Int64(all), TensorData::Int64(part)) => all.extend_from_slice(part),
                (TensorData::Int32(all), TensorData::Int32(part)) => all.extend_from_slice(part),
                (TensorData::Bool(all), TensorData::Bool(part)) => all.extend_from_slice(part),
                _ => unreachable!("all dtypes were compared with the first"),
            }
        }
        Ok(Tensor { shape, data: joined })
    }

    /// A copy of the rows in `range`, which is clamped to the rows there are.
    pub fn slice_rows(&self, range: std::ops::Range<usize>) -> Tensor {
        let end = range.end.min(self.rows());
        let start = range.start.min(end);
        let width: usize = self.row_shape().iter().product();
        let mut shape = self.shape.clone();
        shape[0] = end - start;
        let data = map_each_type!(&self.data, values => values[start * width..end * width].to_vec());
        Tensor { shape, data }
    }

    /// Takes the tensor apart into pieces of at most `rows` rows.
    pub fn split_rows(&self, rows: usize) -> Vec<Tensor> {
        let rows = rows.max(1);
        (0..self.rows()).step_by(rows).map(|start| self.slice_rows(start..start + rows)).collect()
    }

    /// Grows the tensor to `rows` rows by repeating the last one, which is a valid input where zeros need not be.
    /// A tensor without rows is filled with zeros; one that is long enough stays as it is.
    pub fn pad_rows(mut self, rows: usize) -> Tensor {
        let have = self.rows();
        if have >= rows {
            return self;
        }
        if have == 0 {
            return Tensor::zeros(self.dtype(), rows, self.row_shape());
        }
        let width: usize = self.row_shape().iter().product();
        for_each_type!(&mut self.data, values => {
            values.reserve_exact((rows - have) * width);
            for _ in have..rows {
                values.extend_from_within((have - 1) * width..have * width);
            }
        });
        self.shape[0] = rows;
        self
    }

    /// Gives `[rows, 1]` the shape `[rows]`; any other tensor stays as it is.
    pub fn squeeze_single_column(mut self) -> Tensor {
        if self.row_shape() == [1] {
            self.shape.truncate(1);
        }
        self
    }

    /// Appends the bytes of some rows, little-endian and with every bit as it is; the range is clamped to the rows there are.
    pub fn write_rows(&self, rows: std::ops::Range<usize>, bytes: &mut Vec<u8>) {
        let width: usize = self.row_shape().iter().product();
        let end = rows.end.min(self.rows());
        let elements = rows.start.min(end) * width..end * width;
        match &self.data {
            TensorData::Float32(values) => bytes.extend(values[elements].iter().flat_map(|value| value.to_le_bytes())),
            TensorData::Float64(values) => bytes.extend(values[elements].iter().flat_map(|value| value.to_le_bytes())),
            TensorData::Int64(values) => bytes.extend(values[elements].iter().flat_map(|value| value.to_le_bytes())),
            TensorData::Int32(values) => bytes.extend(values[elements].iter().flat_map(|value| value.to_le_bytes())),
            TensorData::Bool(values) => bytes.extend(values[elements].iter().map(|value| u8::from(*value))),
        }
    }

    /// The SHA-256 of dtype, shape and bytes, the same on every machine. Bits count: two NaNs of different payload
    /// differ, as do 0.0 and -0.0.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        hasher.update(b"coeval tensor 1\0");
        hasher.update(self.dtype().name().as_bytes());
        hasher.update([0]);
        hasher.update((self.shape.len() as u64).to_le_bytes());
        for &size in &self.shape {
            hasher.update((size as u64).to_le_bytes());
        }
        match &self.data {
            TensorData::Float32(values) => values.iter().for_each(|value| hasher.update(value.to_le_bytes())),
            TensorData::Float64(values) => values.iter().for_each(|value| hasher.update(value.to_le_bytes())),
            TensorData::Int64(values) => values.iter().for_each(|value| hasher.update(value.to_le_bytes())),
            TensorData::Int32(values) => values.iter().for_each(|value| hasher.update(value.to_le_bytes())),
            TensorData::Bool(values) => values.iter().for_each(|&value| hasher.update([u8::from(value)])),
        }
        hasher.finalize().into()
    }
}

/// How a dtype and the shape of a row are shown: `float32 [_, 31]`.
pub fn kind(dtype: Dtype, row_shape: &[usize]) -> String {
    let sizes: String = row_shape.iter().map(|size| format!(", {size}")).collect();
    format!("{dtype} [_{sizes}]")
}

#[cfg(test)]
mod tests;
