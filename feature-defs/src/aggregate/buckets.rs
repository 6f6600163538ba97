//! The buckets that a definition declares, for `histogram` and `by`: ranges between edges, or single values, and OTHER.

use crate::value::{Type, Value};

use super::as_float;

/// The bucket of what is in no other. As a key of a map it is called so, and no declared value may be.
pub const OTHER: &str = "OTHER";

/// More would make every state long and every answer unreadable.
pub const BUCKETS_MAX: usize = 1_000;

/// Declared buckets, numbered from 0 in their order; OTHER comes last.
#[derive(Debug, Clone, PartialEq)]
pub struct Buckets {
    /// Of the values that are put into them.
    input: Type,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    /// Ascending. Below the first edge lies bucket 0; a number at an edge is above it.
    Edges(Vec<f64>),
    /// With their numbers, ascending by value.
    Values(Vec<(Value, u32)>),
}

/// Why buckets cannot be declared so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BucketsError {
    #[error("there are no buckets")]
    Empty,
    #[error("there are {0} buckets, and {BUCKETS_MAX} is the most")]
    TooMany(usize),
    #[error("`edges` must ascend")]
    Unordered,
    #[error("`edges` divide numbers, not {0}; name single ones with `values`")]
    NotNumbers(Type),
    #[error("`values` are strings, integers or bools, not {0}{1}")]
    NotCountable(Type, &'static str),
    #[error("the value `{0}` is there twice")]
    Twice(String),
    #[error("null is no value: it belongs to {OTHER}")]
    Null,
    #[error("the value `{OTHER}` is the name of what is in no other bucket")]
    Other,
}

impl Buckets {
    pub fn edges(input: Type, edges: Vec<f64>) -> Result<Buckets, BucketsError> {
        if !input.is_numeric() {
            return Err(BucketsError::NotNumbers(input));
        }
        if edges.iter().any(|edge| !edge.is_finite()) || edges.windows(2).any(|pair| pair[0] >= pair[1]) {
            return Err(BucketsError::Unordered);
        }
        let edges: Vec<f64> = edges.into_iter().map(|edge| edge + 0.0).collect();
        Self::sized(edges.len()).map(|()| Buckets { input, kind: Kind::Edges(edges) })
    }

    /// `values` are of the type `input`.
    pub fn values(input: Type, values: Vec<Value>) -> Result<Buckets, BucketsError> {
        if !matches!(input, Type::String | Type::Int32 | Type::Int64 | Type::Bool) {
            let advice = if input.is_numeric() { "; divide them with `edges`" } else { "" };
            return Err(BucketsError::NotCountable(input, advice));
        }
        Self::sized(values.len())?;
        let mut numbered: Vec<(Value, u32)> = values.into_iter().zip(0..).collect();
        numbered.sort_by(|(a, _), (b, _)| a.compare(b));
        if numbered.iter().any(|(value, _)| value.is_null()) {
            return Err(BucketsError::Null);
        }
        if let Some(pair) = numbered.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(BucketsError::Twice(label(&pair[0].0)));
        }
        if numbered.iter().any(|(value, _)| label(value) == OTHER) {
            return Err(BucketsError::Other);
        }
        Ok(Buckets { input, kind: Kind::Values(numbered) })
    }

    fn sized(declared: usize) -> Result<(), BucketsError> {
        match declared {
            0 => Err(BucketsError::Empty),
            1..=BUCKETS_MAX => Ok(()),
            _ => Err(BucketsError::TooMany(declared)),
        }
    }

    pub fn input(&self) -> &Type {
        &self.input
    }

    /// How many there are, OTHER included.
    pub fn len(&self) -> usize {
        self.other() as usize + 1
    }

    /// Never: there is always a bucket for the rest.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The number of OTHER.
    pub fn other(&self) -> u32 {
        match &self.kind {
            Kind::Edges(edges) => edges.len() as u32 + 1,
            Kind::Values(values) => values.len() as u32,
        }
    }

    /// The bucket of a value. NaN and null are in OTHER.
    pub fn find(&self, value: &Value) -> u32 {
        if value.is_null() {
            return self.other();
        }
        match &self.kind {
            Kind::Edges(edges) => {
                let scale = if let Type::Decimal { scale, .. } = self.input { scale } else { 0 };
                let x = as_float(value, scale);
                if x.is_nan() { self.other() } else { edges.partition_point(|edge| *edge <= x) as u32 }
            }
            Kind::Values(values) => match values.binary_search_by(|(known, _)| known.compare(value)) {
                Ok(at) => values[at].1,
                Err(_) => self.other(),
            },
        }
    }

    /// What each bucket is called as the key of a map: `<0`, `0..15`, `>=15`, or the value; and OTHER.
    pub fn labels(&self) -> Vec<String> {
        let mut labels: Vec<String> = match &self.kind {
            Kind::Edges(edges) => {
                let between = edges.windows(2).map(|pair| format!("{}..{}", pair[0], pair[1]));
                let (first, last) = (edges.first().copied().unwrap_or(0.0), edges.last().copied().unwrap_or(0.0));
                [format!("<{first}")].into_iter().chain(between).chain([format!(">={last}")]).collect()
            }
            Kind::Values(values) => {
                let mut labels = vec![String::new(); values.len()];
                values.iter().for_each(|(value, number)| labels[*number as usize] = label(value));
                labels
            }
        };
        labels.push(OTHER.to_string());
        labels
    }

    /// For digests: what decides which bucket a value is in, and which number it has.
    pub fn canonical_text(&self) -> String {
        let kind = if matches!(self.kind, Kind::Edges(_)) { "edges" } else { "values" };
        let labels: String = self.labels().iter().map(|label| format!(" {}:{label}", label.len())).collect();
        format!("{kind} {}{labels}", self.input)
    }
}

fn label(value: &Value) -> String {
    match value {
        Value::String(text) => text.to_string(),
        Value::Int32(x) => x.to_string(),
        Value::Int64(x) => x.to_string(),
        Value::Bool(x) => x.to_string(),
        other => unreachable!("{other:?} was refused as a bucket"),
    }
}
