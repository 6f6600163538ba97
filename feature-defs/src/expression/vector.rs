//! Vectors, lists, structs and maps. Sums over a vector accumulate in float64, in index order, so that they have one value.

use std::sync::Arc;

use arrow::array::*;
use arrow::datatypes::{DataType as ArrowType, Float32Type, Float64Type, Int64Type};

use super::call::{Argument, Body};
use crate::value::canonical_f64;

fn elements(argument: &Argument, i: usize) -> Option<&[f32]> {
    let array = argument.array.as_fixed_size_list();
    let row = argument.row(i);
    let start = usize::try_from(array.value_offset(row)).ok()?;
    let values = array.values().as_primitive::<Float32Type>().values();
    array.is_valid(row).then(|| &values[start..start + array.value_length() as usize])
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).fold(0.0, |sum, (x, y)| sum + f64::from(*x) * f64::from(*y))
}

pub(super) fn function(name: &str) -> Option<Arc<Body>> {
    let f: fn(&[Argument], usize) -> Option<f64> = match name {
        "dot" => |a, i| Some(dot(elements(&a[0], i)?, elements(&a[1], i)?)),
        "norm" => |a, i| {
            let x = elements(&a[0], i)?;
            Some(dot(x, x).sqrt())
        },
        "cosine" => |a, i| {
            let (x, y) = (elements(&a[0], i)?, elements(&a[1], i)?);
            Some(dot(x, y) / (dot(x, x).sqrt() * dot(y, y).sqrt()))
        },
        _ => return None,
    };
    Some(Arc::new(move |a: &[Argument], n| {
        let values = (0..n).map(|i| f(a, i).map(canonical_f64));
        Ok(Arc::new(values.collect::<PrimitiveArray<Float64Type>>()) as ArrayRef)
    }))
}

/// `x[i]` of a list or vector (from 1; from the end when negative; null outside) or `m['key']` of a map.
pub(super) fn element(of: &ArrowType) -> Option<(Arc<Body>, ArrowType)> {
    // Each finds where the element lies in the child array; taking them is the same for all.
    type Find = fn(&Argument, &Argument, usize) -> Option<usize>;
    let (find, output): (Find, ArrowType) = match of {
        ArrowType::List(field) => (
            |list, index, i| {
                let array = list.array.as_list::<i32>();
                let row = list.row(i);
                let start = usize::try_from(array.value_offsets()[row]).ok()?;
                let length = usize::try_from(array.value_length(row)).ok()?;
                array.is_valid(row).then_some(start + position(index.get::<Int64Type>(i)?, length)?)
            },
            field.data_type().clone(),
        ),
        ArrowType::FixedSizeList(field, _) => (
            |list, index, i| {
                let array = list.array.as_fixed_size_list();
                let row = list.row(i);
                let start = usize::try_from(array.value_offset(row)).ok()?;
                let length = usize::try_from(array.value_length()).ok()?;
                array.is_valid(row).then_some(start + position(index.get::<Int64Type>(i)?, length)?)
            },
            field.data_type().clone(),
        ),
        ArrowType::Map(entries, _) => {
            let ArrowType::Struct(fields) = entries.data_type() else { return None };
            (
                |map, key, i| {
                    let array = map.array.as_map();
                    let row = map.row(i);
                    let wanted = key.text(i)?;
                    let keys = array.keys().as_string::<i32>();
                    let (start, end) = (array.value_offsets()[row], array.value_offsets()[row + 1]);
                    let mut range = usize::try_from(start).ok()?..usize::try_from(end).ok()?;
                    range.find(|at| array.is_valid(row) && keys.value(*at) == wanted)
                },
                fields[1].data_type().clone(),
            )
        }
        _ => return None,
    };
    let body: Arc<Body> = Arc::new(move |a: &[Argument], n| {
        let places: UInt64Array = (0..n).map(|i| find(&a[0], &a[1], i).map(|at| at as u64)).collect();
        let children = match a[0].array.data_type() {
            ArrowType::List(_) => a[0].array.as_list::<i32>().values(),
            ArrowType::FixedSizeList(..) => a[0].array.as_fixed_size_list().values(),
            _ => a[0].array.as_map().values(),
        };
        arrow::compute::take(children, &places, None)
    });
    Some((body, output))
}

fn position(index: i64, length: usize) -> Option<usize> {
    let magnitude = usize::try_from(index.unsigned_abs()).ok().filter(|m| (1..=length).contains(m))?;
    Some(if index > 0 { magnitude - 1 } else { length - magnitude })
}

/// `s.field`: the column of the field, null also where the struct is.
pub(super) fn field(of: &ArrowType, name: &str) -> Option<(Arc<Body>, ArrowType)> {
    let ArrowType::Struct(fields) = of else { return None };
    let (at, field) = fields.find(name)?;
    let body: Arc<Body> = Arc::new(move |a: &[Argument], n| {
        let column = a[0].column(n)?;
        let array = column.as_struct();
        let not_struct = array.nulls().map(|nulls| BooleanArray::new(!nulls.inner(), None));
        match not_struct {
            None => Ok(array.column(at).clone()),
            Some(null) => arrow::compute::nullif(array.column(at), &null),
        }
    });
    Some((body, field.data_type().clone()))
}
