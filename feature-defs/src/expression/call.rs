//! The one node of ours in a physical expression: a total function of its arguments, evaluated over a batch.
//!
//! DataFusion's own nodes serve where they cannot fail (columns, literals, comparisons, AND, OR, CASE, IN). Whatever
//! could fail, depend on the platform's libm, or produce a NaN of another pattern is a [`Call`]. A body answers null
//! for a row it has no value for; should it fail as a whole all the same, the batch is evaluated again row by row and
//! only the failing rows are null, so that a row's value never depends on its neighbours.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arrow::array::*;
use arrow::buffer::NullBuffer;
use arrow::compute::concat;
use arrow::datatypes::{ArrowPrimitiveType, DataType as ArrowType, Schema};
use arrow::error::ArrowError;
use datafusion_common::Result as DataFusionResult;
use datafusion_expr::ColumnarValue;
use datafusion_physical_expr::PhysicalExpr;

use crate::value::{canonical_f32, canonical_f64};

/// What a function does: arguments and number of rows in, that many rows out.
pub(super) type Body = dyn Fn(&[Argument], usize) -> Result<ArrayRef, ArrowError> + Send + Sync;

/// An argument of a body. A constant is kept as one row, which every row reads.
pub(super) struct Argument {
    pub array: ArrayRef,
    /// 0 for a constant, 1 for a column.
    step: usize,
}

impl Argument {
    pub fn new(value: ColumnarValue) -> Result<Argument, ArrowError> {
        Ok(match value {
            ColumnarValue::Array(array) => Argument { array, step: 1 },
            ColumnarValue::Scalar(scalar) => {
                let array = scalar.to_array().map_err(|e| ArrowError::ComputeError(e.to_string()))?;
                Argument { array, step: 0 }
            }
        })
    }

    /// The position in `array` of a row of the batch.
    #[inline]
    pub fn row(&self, i: usize) -> usize {
        i * self.step
    }

    pub fn is_constant(&self) -> bool {
        self.step == 0
    }

    /// The argument as a column of `rows` rows, for kernels that know no constants.
    pub fn column(&self, rows: usize) -> Result<ArrayRef, ArrowError> {
        if self.step == 1 {
            return Ok(self.array.clone());
        }
        arrow::compute::take(&self.array, &UInt32Array::from_value(0, rows), None)
    }

    pub fn text(&self, i: usize) -> Option<&str> {
        let array = self.array.as_string::<i32>();
        let row = self.row(i);
        array.is_valid(row).then(|| array.value(row))
    }

    pub fn get<T: ArrowPrimitiveType>(&self, i: usize) -> Option<T::Native> {
        let array = self.array.as_primitive::<T>();
        let row = self.row(i);
        array.is_valid(row).then(|| array.value(row))
    }

    fn slice(&self, i: usize) -> Argument {
        Argument { array: self.array.slice(self.row(i), 1), step: 1 }
    }
}

/// The rows at which no argument is null.
pub(super) fn valid(arguments: &[Argument], rows: usize) -> Option<NullBuffer> {
    let mut nulls: Option<NullBuffer> = None;
    for argument in arguments {
        if argument.step == 0 {
            if argument.array.is_null(0) {
                return Some(NullBuffer::new_null(rows));
            }
        } else {
            nulls = NullBuffer::union(nulls.as_ref(), argument.array.nulls());
        }
    }
    nulls
}

/// A total function of one argument, computed for null rows too: it must not panic on any value.
pub(super) fn map<A: ArrowPrimitiveType, B: ArrowPrimitiveType>(
    arguments: &[Argument],
    rows: usize,
    f: impl Fn(A::Native) -> B::Native,
) -> ArrayRef {
    let a = &arguments[0];
    let nulls = valid(arguments, rows);
    let values = a.array.as_primitive::<A>().values();
    let out: Vec<B::Native> =
        if a.step == 1 { values.iter().map(|x| f(*x)).collect() } else { vec![f(values[0]); rows] };
    Arc::new(PrimitiveArray::<B>::new(out.into(), nulls))
}

/// A total function of two arguments, computed for null rows too: it must not panic on any values.
pub(super) fn map2<A: ArrowPrimitiveType, B: ArrowPrimitiveType, C: ArrowPrimitiveType>(
    arguments: &[Argument],
    rows: usize,
    f: impl Fn(A::Native, B::Native) -> C::Native,
) -> ArrayRef {
    let (a, b) = (&arguments[0], &arguments[1]);
    let nulls = valid(arguments, rows);
    let (x, y) = (a.array.as_primitive::<A>().values(), b.array.as_primitive::<B>().values());
    let out: Vec<C::Native> = match (a.step, b.step) {
        (1, 1) => x.iter().zip(y.iter()).map(|(x, y)| f(*x, *y)).collect(),
        (1, _) => x.iter().map(|x| f(*x, y[0])).collect(),
        (_, 1) => y.iter().map(|y| f(x[0], *y)).collect(),
        _ => vec![f(x[0], y[0]); rows],
    };
    Arc::new(PrimitiveArray::<C>::new(out.into(), nulls))
}

/// A function of one argument that has no value for some.
pub(super) fn try_map<A: ArrowPrimitiveType, B: ArrowPrimitiveType>(
    arguments: &[Argument],
    rows: usize,
    f: impl Fn(A::Native) -> Option<B::Native>,
) -> ArrayRef {
    let a = &arguments[0];
    Arc::new((0..rows).map(|i| a.get::<A>(i).and_then(&f)).collect::<PrimitiveArray<B>>())
}

/// A function of two arguments that has no value for some.
pub(super) fn try_map2<A: ArrowPrimitiveType, B: ArrowPrimitiveType, C: ArrowPrimitiveType>(
    arguments: &[Argument],
    rows: usize,
    f: impl Fn(A::Native, B::Native) -> Option<C::Native>,
) -> ArrayRef {
    let (a, b) = (&arguments[0], &arguments[1]);
    Arc::new((0..rows).map(|i| f(a.get::<A>(i)?, b.get::<B>(i)?)).collect::<PrimitiveArray<C>>())
}

/// A call of a function. Its name, with the constants it was compiled with, and its body identify it.
pub(super) struct Call {
    name: String,
    body: Arc<Body>,
    arguments: Vec<Arc<dyn PhysicalExpr>>,
    /// By argument, the one row of those that are literals: making it anew for every batch is most of what an operation
    /// costs when batches are as small as requests.
    constants: Vec<Option<ArrayRef>>,
    output: ArrowType,
}

impl Call {
    pub fn new(name: String, body: Arc<Body>, arguments: Vec<Arc<dyn PhysicalExpr>>, output: ArrowType) -> Call {
        let none = RecordBatch::new_empty(Arc::new(Schema::empty()));
        let constant = |argument: &Arc<dyn PhysicalExpr>| match argument.evaluate(&none) {
            Ok(ColumnarValue::Scalar(value)) if argument.children().is_empty() => value.to_array().ok(),
            _ => None,
        };
        let constants = arguments.iter().map(constant).collect();
        Call { name, body, arguments, constants, output }
    }
}

/// Runs a body over a batch; see the module's first lines for what happens when it fails.
pub(super) fn run(
    body: &Body,
    arguments: &[Argument],
    rows: usize,
    output: &ArrowType,
) -> Result<ArrayRef, ArrowError> {
    if let Ok(array) = body(arguments, rows) {
        debug_assert_eq!((array.len(), array.data_type()), (rows, output));
        return Ok(array);
    }
    let null = new_null_array(output, 1);
    let single: Vec<ArrayRef> = (0..rows)
        .map(|i| {
            let row: Vec<Argument> = arguments.iter().map(|argument| argument.slice(i)).collect();
            body(&row, 1).unwrap_or_else(|_| null.clone())
        })
        .collect();
    if single.is_empty() {
        return Ok(new_empty_array(output));
    }
    concat(&single.iter().map(|array| array.as_ref()).collect::<Vec<_>>())
}

impl PhysicalExpr for Call {
    fn data_type(&self, _input_schema: &Schema) -> DataFusionResult<ArrowType> {
        Ok(self.output.clone())
    }

    fn nullable(&self, _input_schema: &Schema) -> DataFusionResult<bool> {
        Ok(true)
    }

    fn evaluate(&self, batch: &RecordBatch) -> DataFusionResult<ColumnarValue> {
        let arguments = self
            .arguments
            .iter()
            .zip(&self.constants)
            .map(|(argument, constant)| match constant {
                Some(array) => Ok(Argument { array: array.clone(), step: 0 }),
                None => Ok(Argument::new(argument.evaluate(batch)?)?),
            })
            .collect::<DataFusionResult<Vec<_>>>()?;
        Ok(ColumnarValue::Array(run(&*self.body, &arguments, batch.num_rows(), &self.output)?))
    }

    fn children(&self) -> Vec<&Arc<dyn PhysicalExpr>> {
        self.arguments.iter().collect()
    }

    fn with_new_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn PhysicalExpr>>,
    ) -> DataFusionResult<Arc<dyn PhysicalExpr>> {
        Ok(Arc::new(Call::new(self.name.clone(), self.body.clone(), children, self.output.clone())))
    }

    fn fmt_sql(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.name)?;
        for (i, argument) in self.arguments.iter().enumerate() {
            write!(f, "{}{argument}", if i == 0 { "" } else { ", " })?;
        }
        f.write_str(")")
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("name", &self.name).field("arguments", &self.arguments).finish_non_exhaustive()
    }
}

impl PartialEq for Call {
    fn eq(&self, other: &Call) -> bool {
        self.name == other.name
            && Arc::ptr_eq(&self.body, &other.body)
            && self.output == other.output
            && self.arguments == other.arguments
    }
}
impl Eq for Call {}

impl Hash for Call {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
        self.arguments.hash(state);
    }
}

/// The array with canonical floats, at any depth: one NaN, no -0.0. The same array when it was canonical already.
pub(super) fn canonical(array: ArrayRef) -> ArrayRef {
    match array.data_type() {
        ArrowType::Float64 => {
            let values = array.as_primitive::<arrow::datatypes::Float64Type>();
            if values.values().iter().all(|x| x.to_bits() == canonical_f64(*x).to_bits()) {
                return array;
            }
            Arc::new(values.unary::<_, arrow::datatypes::Float64Type>(canonical_f64))
        }
        ArrowType::Float32 => {
            let values = array.as_primitive::<arrow::datatypes::Float32Type>();
            if values.values().iter().all(|x| x.to_bits() == canonical_f32(*x).to_bits()) {
                return array;
            }
            Arc::new(values.unary::<_, arrow::datatypes::Float32Type>(canonical_f32))
        }
        data_type if !has_floats(data_type) => array,
        ArrowType::FixedSizeList(field, size) => {
            let list = array.as_fixed_size_list();
            let values = canonical(list.values().clone());
            Arc::new(FixedSizeListArray::new(field.clone(), *size, values, list.nulls().cloned()))
        }
        ArrowType::List(field) => {
            let list = array.as_list::<i32>();
            let values = canonical(list.values().clone());
            Arc::new(ListArray::new(field.clone(), list.offsets().clone(), values, list.nulls().cloned()))
        }
        ArrowType::Struct(fields) => {
            let columns = array.as_struct();
            let canonical_columns = columns.columns().iter().cloned().map(canonical).collect();
            Arc::new(StructArray::new(fields.clone(), canonical_columns, columns.nulls().cloned()))
        }
        ArrowType::Map(field, sorted) => {
            let map = array.as_map();
            let entries: ArrayRef = canonical(Arc::new(map.entries().clone()));
            let entries = entries.as_struct().clone();
            Arc::new(MapArray::new(field.clone(), map.offsets().clone(), entries, map.nulls().cloned(), *sorted))
        }
        _ => array,
    }
}

fn has_floats(data_type: &ArrowType) -> bool {
    match data_type {
        ArrowType::Float32 | ArrowType::Float64 => true,
        ArrowType::FixedSizeList(field, _) | ArrowType::List(field) | ArrowType::Map(field, _) => {
            has_floats(field.data_type())
        }
        ArrowType::Struct(fields) => fields.iter().any(|field| has_floats(field.data_type())),
        _ => false,
    }
}
