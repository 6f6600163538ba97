//! Numbers in another unit.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{Float32Type, Float64Type, Int32Type, Int64Type};
use feature_defs::value::{Type, Value, canonical_f32, canonical_f64};

/// From one unit to another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    Times(f64),
    /// x / 1000 is not always the bits of x * 0.001.
    Over(f64),
    FahrenheitOfCelsius,
    CelsiusOfFahrenheit,
    Plus(f64),
}

/// Factors that units are apart by: decimal prefixes and per cent, time, length, mass, speed, energy, angles, bytes.
const FACTORS: [f64; 24] = [
    10.0,
    100.0,
    1e3,
    1e4,
    1e5,
    1e6,
    1e9,
    60.0,
    3_600.0,
    24.0,
    86_400.0,
    7.0,
    12.0,
    1_024.0,
    1.609_344,
    0.3048,
    0.025_4,
    2.54,
    0.453_592_37,
    1.852,
    0.514_444,
    3.6,
    4.184,
    180.0 / std::f64::consts::PI,
];

impl Scale {
    pub fn all() -> Vec<Scale> {
        let factors = FACTORS.iter().flat_map(|factor| [Scale::Times(*factor), Scale::Over(*factor)]);
        let inverse = FACTORS.iter().map(|factor| Scale::Times(1.0 / factor));
        let others = [
            Scale::FahrenheitOfCelsius,
            Scale::CelsiusOfFahrenheit,
            Scale::Plus(273.15),
            Scale::Plus(-273.15),
            Scale::Times(-1.0),
        ];
        factors.chain(inverse).chain(others).collect()
    }

    pub fn words(self) -> String {
        match self {
            Scale::Times(factor) => format!("times {factor}"),
            Scale::Over(factor) => format!("divided by {factor}"),
            Scale::FahrenheitOfCelsius => "Fahrenheit for Celsius".to_owned(),
            Scale::CelsiusOfFahrenheit => "Celsius for Fahrenheit".to_owned(),
            Scale::Plus(offset) => format!("plus {offset}"),
        }
    }

    fn float(self, x: f64) -> f64 {
        match self {
            Scale::Times(factor) => x * factor,
            Scale::Over(factor) => x / factor,
            Scale::FahrenheitOfCelsius => x * 1.8 + 32.0,
            Scale::CelsiusOfFahrenheit => (x - 32.0) / 1.8,
            Scale::Plus(offset) => x + offset,
        }
    }

    /// None where the whole number would not be one any more, or too large.
    fn integer(self, x: i64) -> Option<i64> {
        let scaled = self.float(x as f64);
        (scaled.fract() == 0.0 && scaled.abs() < 9e15 && x.unsigned_abs() < 1 << 53).then_some(scaled as i64)
    }

    /// None where a value has no unit, or does not fit.
    pub fn value(self, value: &Value) -> Option<Value> {
        Some(match value {
            Value::Float64(x) => Value::Float64(canonical_f64(self.float(*x))),
            // Either in the type's own precision or in the larger one: the larger is what people write.
            Value::Float32(x) => Value::Float32(canonical_f32(self.float(f64::from(*x)) as f32)),
            Value::Int64(x) => Value::Int64(self.integer(*x)?),
            Value::Int32(x) => Value::Int32(i32::try_from(self.integer(i64::from(*x))?).ok()?),
            _ => return None,
        })
    }

    /// Every value of a column; those that cannot be scaled stay as they are. None where the type has no units.
    pub fn column(self, column: &ArrayRef, of: &Type) -> Option<ArrayRef> {
        Some(match of {
            Type::Float64 => Arc::new(
                column.as_primitive_opt::<Float64Type>()?.unary::<_, Float64Type>(|x| canonical_f64(self.float(x))),
            ),
            Type::Float32 => Arc::new(
                column
                    .as_primitive_opt::<Float32Type>()?
                    .unary::<_, Float32Type>(|x| canonical_f32(self.float(f64::from(x)) as f32)),
            ),
            Type::Int64 => Arc::new(
                column.as_primitive_opt::<Int64Type>()?.unary::<_, Int64Type>(|x| self.integer(x).unwrap_or(x)),
            ),
            Type::Int32 => Arc::new(column.as_primitive_opt::<Int32Type>()?.unary::<_, Int32Type>(|x| {
                self.integer(i64::from(x)).and_then(|x| i32::try_from(x).ok()).unwrap_or(x)
            })),
            _ => return None,
        })
    }
}

/// Whether values of a type can be in a unit.
pub fn has_units(of: &Type) -> bool {
    matches!(of, Type::Float64 | Type::Float32 | Type::Int64 | Type::Int32)
}

/// The one value of a column of one row, scaled.
pub fn one(column: &ArrayRef, of: &Type, scale: Scale) -> Option<ArrayRef> {
    if column.is_null(0) {
        return None;
    }
    Some(Value::to_array([&scale.value(&Value::from_array(column, 0, of))?], of))
}
