//! Numbers: `+ - * / %`, negation and the mathematical functions.
//!
//! Integers wrap; integer division by zero and `MIN / -1` have no value. Floats are IEEE, and every result is canonical
//! before the next node sees it. Square root and the roundings are exact on every machine; everything transcendental
//! comes from the pinned `libm`, never from the platform.

use std::sync::Arc;

use arrow::array::*;
use arrow::compute::kernels::numeric;
use arrow::datatypes::{DataType as ArrowType, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type};
use arrow::error::ArrowError;

use super::call::{Argument, Body, map, map2, try_map, try_map2};
use crate::value::{canonical_f32, canonical_f64};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Add,
    Subtract,
    Multiply,
    Divide,
    Modulo,
}

impl Operation {
    pub fn symbol(self) -> &'static str {
        match self {
            Operation::Add => "+",
            Operation::Subtract => "-",
            Operation::Multiply => "*",
            Operation::Divide => "/",
            Operation::Modulo => "%",
        }
    }
}

macro_rules! integers {
    ($operation:expr, $type:ty) => {{
        let body: Arc<Body> = match $operation {
            Operation::Add => Arc::new(|a, n| Ok(map2::<$type, $type, $type>(a, n, |x, y| x.wrapping_add(y)))),
            Operation::Subtract => Arc::new(|a, n| Ok(map2::<$type, $type, $type>(a, n, |x, y| x.wrapping_sub(y)))),
            Operation::Multiply => Arc::new(|a, n| Ok(map2::<$type, $type, $type>(a, n, |x, y| x.wrapping_mul(y)))),
            Operation::Divide => Arc::new(|a, n| Ok(try_map2::<$type, $type, $type>(a, n, |x, y| x.checked_div(y)))),
            Operation::Modulo => Arc::new(|a, n| Ok(try_map2::<$type, $type, $type>(a, n, |x, y| x.checked_rem(y)))),
        };
        body
    }};
}

macro_rules! floats {
    ($operation:expr, $type:ty, $canonical:ident) => {{
        let body: Arc<Body> = match $operation {
            Operation::Add => Arc::new(|a, n| Ok(map2::<$type, $type, $type>(a, n, |x, y| $canonical(x + y)))),
            Operation::Subtract => Arc::new(|a, n| Ok(map2::<$type, $type, $type>(a, n, |x, y| $canonical(x - y)))),
            Operation::Multiply => Arc::new(|a, n| Ok(map2::<$type, $type, $type>(a, n, |x, y| $canonical(x * y)))),
            Operation::Divide => Arc::new(|a, n| Ok(map2::<$type, $type, $type>(a, n, |x, y| $canonical(x / y)))),
            Operation::Modulo => Arc::new(|a, n| Ok(map2::<$type, $type, $type>(a, n, |x, y| $canonical(x % y)))),
        };
        body
    }};
}

/// The body of an operation on two arguments of one type (or two decimals), and what it returns.
pub(super) fn operation(operation: Operation, left: &ArrowType, right: &ArrowType) -> Option<(Arc<Body>, ArrowType)> {
    Some(match (left, right) {
        (ArrowType::Int32, ArrowType::Int32) => (integers!(operation, Int32Type), ArrowType::Int32),
        (ArrowType::Int64, ArrowType::Int64) => (integers!(operation, Int64Type), ArrowType::Int64),
        (ArrowType::Float32, ArrowType::Float32) => {
            (floats!(operation, Float32Type, canonical_f32), ArrowType::Float32)
        }
        (ArrowType::Float64, ArrowType::Float64) => {
            (floats!(operation, Float64Type, canonical_f64), ArrowType::Float64)
        }
        (ArrowType::Decimal128(..), ArrowType::Decimal128(..)) => {
            // Arrow derives precision and scale of the result; an empty batch tells which.
            let empty = decimal_kernel(operation, &new_empty_array(left), &new_empty_array(right)).ok()?;
            let output = empty.data_type().clone();
            let ArrowType::Decimal128(precision, _) = output else { return None };
            let body: Arc<Body> = Arc::new(move |arguments: &[Argument], rows| {
                let (left, right) = (&arguments[0], &arguments[1]);
                let result = match (left.is_constant(), right.is_constant()) {
                    (false, true) => decimal_kernel(operation, &left.array, &Scalar::new(right.array.clone())),
                    (true, false) => decimal_kernel(operation, &Scalar::new(left.array.clone()), &right.array),
                    _ => decimal_kernel(operation, &left.column(rows)?, &right.column(rows)?),
                }?;
                // The kernel checks i128, which holds a little more than 38 digits.
                let checked = result.as_primitive::<Decimal128Type>().null_if_overflow_precision(precision);
                Ok(Arc::new(checked.with_data_type(result.data_type().clone())) as ArrayRef)
            });
            (body, output)
        }
        _ => return None,
    })
}

fn decimal_kernel(operation: Operation, left: &dyn Datum, right: &dyn Datum) -> Result<ArrayRef, ArrowError> {
    match operation {
        Operation::Add => numeric::add(left, right),
        Operation::Subtract => numeric::sub(left, right),
        Operation::Multiply => numeric::mul(left, right),
        Operation::Divide => numeric::div(left, right),
        Operation::Modulo => numeric::rem(left, right),
    }
}

pub(super) fn negate(data_type: &ArrowType) -> Option<Arc<Body>> {
    Some(match data_type {
        ArrowType::Int32 => Arc::new(|a: &[Argument], n| Ok(map::<Int32Type, Int32Type>(a, n, i32::wrapping_neg))),
        ArrowType::Int64 => Arc::new(|a: &[Argument], n| Ok(map::<Int64Type, Int64Type>(a, n, i64::wrapping_neg))),
        ArrowType::Float32 => {
            Arc::new(|a: &[Argument], n| Ok(map::<Float32Type, Float32Type>(a, n, |x| canonical_f32(-x))))
        }
        ArrowType::Float64 => {
            Arc::new(|a: &[Argument], n| Ok(map::<Float64Type, Float64Type>(a, n, |x| canonical_f64(-x))))
        }
        ArrowType::Decimal128(..) => decimal_map(data_type.clone(), i128::wrapping_neg),
        _ => return None,
    })
}

pub(super) fn absolute(data_type: &ArrowType) -> Option<Arc<Body>> {
    Some(match data_type {
        ArrowType::Int32 => Arc::new(|a: &[Argument], n| Ok(try_map::<Int32Type, Int32Type>(a, n, i32::checked_abs))),
        ArrowType::Int64 => Arc::new(|a: &[Argument], n| Ok(try_map::<Int64Type, Int64Type>(a, n, i64::checked_abs))),
        ArrowType::Float32 => {
            Arc::new(|a: &[Argument], n| Ok(map::<Float32Type, Float32Type>(a, n, |x| canonical_f32(x.abs()))))
        }
        ArrowType::Float64 => {
            Arc::new(|a: &[Argument], n| Ok(map::<Float64Type, Float64Type>(a, n, |x| canonical_f64(x.abs()))))
        }
        ArrowType::Decimal128(..) => decimal_map(data_type.clone(), i128::wrapping_abs),
        _ => return None,
    })
}

/// Absolute value and negation keep the type of a decimal.
fn decimal_map(data_type: ArrowType, f: fn(i128) -> i128) -> Arc<Body> {
    Arc::new(move |arguments: &[Argument], rows| {
        let array = map::<Decimal128Type, Decimal128Type>(arguments, rows, f);
        Ok(Arc::new(array.as_primitive::<Decimal128Type>().clone().with_data_type(data_type.clone())) as ArrayRef)
    })
}

/// ceil, floor and trunc of floats, which are exact everywhere.
pub(super) fn rounding(name: &str, data_type: &ArrowType) -> Option<Arc<Body>> {
    macro_rules! of {
        ($method:ident) => {
            match data_type {
                ArrowType::Float32 => Arc::new(|a: &[Argument], n| {
                    Ok(map::<Float32Type, Float32Type>(a, n, |x| canonical_f32(x.$method())))
                }),
                ArrowType::Float64 => Arc::new(|a: &[Argument], n| {
                    Ok(map::<Float64Type, Float64Type>(a, n, |x| canonical_f64(x.$method())))
                }),
                _ => return None,
            }
        };
    }
    Some(match name {
        "ceil" => of!(ceil),
        "floor" => of!(floor),
        "trunc" => of!(trunc),
        "round" => of!(round),
        "sign" => match data_type {
            ArrowType::Int32 => Arc::new(|a: &[Argument], n| Ok(map::<Int32Type, Int32Type>(a, n, i32::signum))),
            ArrowType::Int64 => Arc::new(|a: &[Argument], n| Ok(map::<Int64Type, Int64Type>(a, n, i64::signum))),
            ArrowType::Float32 => Arc::new(|a: &[Argument], n| {
                Ok(map::<Float32Type, Float32Type>(a, n, |x| if x == 0.0 { 0.0 } else { canonical_f32(x.signum()) }))
            }),
            ArrowType::Float64 => Arc::new(|a: &[Argument], n| {
                Ok(map::<Float64Type, Float64Type>(a, n, |x| if x == 0.0 { 0.0 } else { canonical_f64(x.signum()) }))
            }),
            _ => return None,
        },
        _ => return None,
    })
}

/// `round(x, places)` and `trunc(x, places)`: places may be negative.
pub(super) fn at_places(name: &str) -> Arc<Body> {
    let round: fn(f64) -> f64 = if name == "round" { f64::round } else { f64::trunc };
    Arc::new(move |a: &[Argument], n| {
        Ok(map2::<Float64Type, Int64Type, Float64Type>(a, n, |x, places| {
            // Beyond 22 places ten has no exact power; a float64 has at most 17 significant digits anyway.
            let power = (0..places.unsigned_abs().min(22)).fold(1.0_f64, |power, _| power * 10.0);
            let scaled = if places >= 0 { x * power } else { x / power };
            if !scaled.is_finite() {
                return canonical_f64(x);
            }
            canonical_f64(if places >= 0 { round(scaled) / power } else { round(scaled) * power })
        }))
    })
}

/// The functions of one float64, by name.
pub(super) fn function1(name: &str) -> Option<fn(f64) -> f64> {
    Some(match name {
        "sqrt" => f64::sqrt,
        "exp" => libm::exp,
        "ln" => libm::log,
        "log2" => libm::log2,
        "log10" => libm::log10,
        "sin" => libm::sin,
        "cos" => libm::cos,
        "tan" => libm::tan,
        "asin" => libm::asin,
        "acos" => libm::acos,
        "atan" => libm::atan,
        "sinh" => libm::sinh,
        "cosh" => libm::cosh,
        "tanh" => libm::tanh,
        "cbrt" => libm::cbrt,
        "degrees" => |x| x * (180.0 / std::f64::consts::PI),
        "radians" => |x| x * (std::f64::consts::PI / 180.0),
        _ => return None,
    })
}

/// The functions of two float64s, by name.
pub(super) fn function2(name: &str) -> Option<fn(f64, f64) -> f64> {
    Some(match name {
        "power" => libm::pow,
        "atan2" => libm::atan2,
        "log" => |base, x| libm::log(x) / libm::log(base),
        _ => return None,
    })
}

pub(super) fn body1(f: fn(f64) -> f64) -> Arc<Body> {
    Arc::new(move |a: &[Argument], n| Ok(map::<Float64Type, Float64Type>(a, n, |x| canonical_f64(f(x)))))
}

pub(super) fn body2(f: fn(f64, f64) -> f64) -> Arc<Body> {
    Arc::new(move |a: &[Argument], n| {
        Ok(map2::<Float64Type, Float64Type, Float64Type>(a, n, |x, y| canonical_f64(f(x, y))))
    })
}

pub(super) fn is_nan() -> Arc<Body> {
    Arc::new(|a: &[Argument], n| {
        Ok(Arc::new((0..n).map(|i| a[0].get::<Float64Type>(i).map(f64::is_nan)).collect::<BooleanArray>()) as ArrayRef)
    })
}
