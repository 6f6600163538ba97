//! Comparisons of two numbers of one type.
//!
//! The order is that of Arrow's own kernels: floats are canonical, so NaN is greatest and equal to itself. Those kernels
//! make an array of a literal for every batch, which for the few rows of a request is most of the work.

use std::sync::Arc;

use arrow::array::*;
use arrow::buffer::BooleanBuffer;
use arrow::datatypes::{
    ArrowNativeTypeOp, DataType as ArrowType, Date32Type, Float32Type, Float64Type, Int32Type, Int64Type,
};
use datafusion_expr::Operator;

use super::call::{Argument, Body, valid};

/// The body of a comparison of two arguments of this type; None where DataFusion's node serves.
pub(super) fn comparison(operator: Operator, data_type: &ArrowType) -> Option<Arc<Body>> {
    match data_type {
        ArrowType::Int32 => of::<Int32Type>(operator),
        ArrowType::Int64 => of::<Int64Type>(operator),
        ArrowType::Float32 => of::<Float32Type>(operator),
        ArrowType::Float64 => of::<Float64Type>(operator),
        ArrowType::Date32 => of::<Date32Type>(operator),
        _ => None,
    }
}

fn of<T: ArrowPrimitiveType>(operator: Operator) -> Option<Arc<Body>> {
    Some(match operator {
        Operator::Eq => body::<T>(|x, y| x.is_eq(y)),
        Operator::NotEq => body::<T>(|x, y| x.is_ne(y)),
        Operator::Lt => body::<T>(|x, y| x.is_lt(y)),
        Operator::LtEq => body::<T>(|x, y| x.is_le(y)),
        Operator::Gt => body::<T>(|x, y| x.is_gt(y)),
        Operator::GtEq => body::<T>(|x, y| x.is_ge(y)),
        _ => return None,
    })
}

fn body<T: ArrowPrimitiveType>(holds: impl Fn(T::Native, T::Native) -> bool + Send + Sync + 'static) -> Arc<Body> {
    Arc::new(move |arguments: &[Argument], rows| {
        let [a, b] = [0, 1].map(|index| &arguments[index]);
        let [x, y] = [a, b].map(|argument| argument.array.as_primitive::<T>().values());
        let values = match (a.is_constant(), b.is_constant()) {
            (false, false) => BooleanBuffer::collect_bool(rows, |row| holds(x[row], y[row])),
            (false, true) => BooleanBuffer::collect_bool(rows, |row| holds(x[row], y[0])),
            (true, false) => BooleanBuffer::collect_bool(rows, |row| holds(x[0], y[row])),
            (true, true) => BooleanBuffer::collect_bool(rows, |_| holds(x[0], y[0])),
        };
        Ok(Arc::new(BooleanArray::new(values, valid(arguments, rows))) as ArrayRef)
    })
}
