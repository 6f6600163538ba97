//! Aggregates that do not depend on how the work was done.
//!
//! A window is computed offline over sorted files, by difference updates or range updates, and online from tiles that
//! were written one event at a time. If the two are to agree to the last bit, a state must not remember the order, the
//! batches or the partitions its values came in. So no aggregator here rounds before `finish`: sums are exact, and equal
//! multisets of values have equal states, with equal encodings.

mod count;
mod exact_float;
mod exact_sum;
mod extremum;
#[cfg(test)]
mod oracle;
mod rounding;
mod varint;

use std::cmp::Ordering;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::as_of::Times;
use crate::value::{DecodeError, Type, Value};

pub use exact_sum::{DecimalTotal, FloatTotal, IntegerTotal, Total};

use count::Count;
use exact_sum::{Answer, ExactSum};
use extremum::Extremum;

/// What engines may do with an aggregator beyond what every one promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Laws {
    /// `unmerge` undoes `merge`, in any order: windows may be computed as differences of prefixes.
    pub invertible: bool,
    /// Merging the same values twice is merging them once: windows may be covered by overlapping ranges.
    pub idempotent: bool,
}

/// A function of a multiset of values, computed in pieces.
///
/// Every implementation promises that `merge` is associative and commutative with `zero` as its neutral element, that
/// pushing a value is merging a state of that value alone, that none of them rounds, and that states of the same values
/// have the same encoding, whatever their history.
pub trait Aggregator: Send + Sync + fmt::Debug {
    type State: Clone + Send + Sync + 'static;

    const LAWS: Laws;

    fn zero(&self) -> Self::State;

    /// Adds a value, which is not null and of the input type, of a row with these times.
    fn push(&self, state: &mut Self::State, value: &Value, times: &Times);

    fn merge(&self, into: &mut Self::State, other: &Self::State);

    /// Takes out what was merged, or will be: a state may be in debt for a while. False, and nothing done, where
    /// [`Laws::invertible`] is false.
    fn unmerge(&self, from: &mut Self::State, other: &Self::State) -> bool;

    fn finish(&self, state: &Self::State) -> Value;

    /// Appends the state. The encoding delimits itself; its version is that of the format around it.
    fn encode(&self, state: &Self::State, out: &mut Vec<u8>);

    /// Reads a state from the front of any bytes.
    fn decode(&self, bytes: &mut &[u8]) -> Result<Self::State, DecodeError>;
}

/// The aggregate functions of this version.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Function {
    Count,
    Sum,
    Mean,
    Min,
    Max,
}

/// Names of the functions that can be used.
pub const FUNCTION_NAMES: [&str; 5] = ["count", "sum", "mean", "min", "max"];

/// Names that belong to functions which later versions will have.
const PLANNED_NAMES: [&str; 9] =
    ["stddev", "variance", "first", "last", "last_n", "distinct_count", "percentile", "top_k", "histogram"];

/// Why a name is not a function.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.text())]
pub struct UnknownFunction {
    pub name: String,
    /// The nearest name that can be used, when one is near.
    pub nearest: Option<&'static str>,
    /// Whether a later version will have it.
    pub planned: bool,
}

impl UnknownFunction {
    fn text(&self) -> String {
        let (name, available) = (&self.name, FUNCTION_NAMES.join(", "));
        match (self.planned, self.nearest) {
            (true, _) => format!("`{name}` is not available in this version; available: {available}"),
            (false, Some(nearest)) => format!("`{name}` is not an aggregate function; did you mean `{nearest}`?"),
            (false, None) => format!("`{name}` is not an aggregate function; available: {available}"),
        }
    }
}

impl Function {
    pub fn parse(name: &str) -> Result<Function, UnknownFunction> {
        Ok(match name {
            "count" => Function::Count,
            "sum" => Function::Sum,
            "mean" => Function::Mean,
            "min" => Function::Min,
            "max" => Function::Max,
            _ => {
                let planned = PLANNED_NAMES.contains(&name);
                let nearest = if planned { None } else { nearest_name(name) };
                return Err(UnknownFunction { name: name.to_string(), nearest, planned });
            }
        })
    }

    pub fn name(&self) -> &'static str {
        match self {
            Function::Count => "count",
            Function::Sum => "sum",
            Function::Mean => "mean",
            Function::Min => "min",
            Function::Max => "max",
        }
    }

    pub fn laws(&self) -> Laws {
        match self {
            Function::Count => Count::LAWS,
            // Sums and means of all kinds of numbers keep the same laws.
            Function::Sum | Function::Mean => ExactSum::<IntegerTotal>::LAWS,
            Function::Min | Function::Max => Extremum::LAWS,
        }
    }
}

fn nearest_name(name: &str) -> Option<&'static str> {
    let wanted = name.to_ascii_lowercase();
    match wanted.as_str() {
        "avg" | "average" => return Some("mean"),
        "minimum" | "least" => return Some("min"),
        "maximum" | "greatest" => return Some("max"),
        "total" => return Some("sum"),
        _ => {}
    }
    FUNCTION_NAMES
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&wanted, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= 2 && *distance < candidate.len() - 1)
        .map(|(_, candidate)| candidate)
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a function cannot aggregate an input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AggregateError {
    #[error("`{function}` needs an input: say what to aggregate with `of` (only `count` works without)")]
    NeedsInput { function: Function },
    #[error("`{function}` takes {accepted}, not {input}{}", advice.map(|advice| format!("; {advice}")).unwrap_or_default())]
    WrongInput { function: Function, input: Type, accepted: &'static str, advice: Option<&'static str> },
}

/// One function over one type of input.
#[derive(Clone, Debug)]
pub struct Aggregate {
    function: Function,
    input: Option<Type>,
    kind: Kind,
}

/// The aggregator that does the work.
#[derive(Clone, Debug)]
enum Kind {
    Count(Count),
    Integer(ExactSum<IntegerTotal>),
    Decimal(ExactSum<DecimalTotal>),
    Float(ExactSum<FloatTotal>),
    Extremum(Extremum),
}

/// What an [`Aggregate`] knows of the values so far; only for the aggregate that made it, or one made alike.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    Count(i64),
    Integer(IntegerTotal),
    Decimal(DecimalTotal),
    Float(FloatTotal),
    Extremum(Value),
}

/// Runs an expression with the aggregator of an aggregate and its kind of state, once or twice.
macro_rules! dispatch {
    ($aggregate:expr, $state:expr, |$aggregator:ident, $inner:ident| $body:expr) => {
        match (&$aggregate.kind, $state) {
            (Kind::Count($aggregator), State::Count($inner)) => $body,
            (Kind::Integer($aggregator), State::Integer($inner)) => $body,
            (Kind::Decimal($aggregator), State::Decimal($inner)) => $body,
            (Kind::Float($aggregator), State::Float($inner)) => $body,
            (Kind::Extremum($aggregator), State::Extremum($inner)) => $body,
            _ => unreachable!("a state went to an aggregate of another kind than the one that made it"),
        }
    };
    ($aggregate:expr, $state:expr, $other:expr, |$aggregator:ident, $inner:ident, $inner_other:ident| $body:expr) => {
        match (&$aggregate.kind, $state, $other) {
            (Kind::Count($aggregator), State::Count($inner), State::Count($inner_other)) => $body,
            (Kind::Integer($aggregator), State::Integer($inner), State::Integer($inner_other)) => $body,
            (Kind::Decimal($aggregator), State::Decimal($inner), State::Decimal($inner_other)) => $body,
            (Kind::Float($aggregator), State::Float($inner), State::Float($inner_other)) => $body,
            (Kind::Extremum($aggregator), State::Extremum($inner), State::Extremum($inner_other)) => $body,
            _ => unreachable!("a state went to an aggregate of another kind than the one that made it"),
        }
    };
}

impl Aggregate {
    /// Without an input, `count` counts rows: push any value that is not null for each.
    pub fn new(function: Function, input: Option<Type>) -> Result<Aggregate, AggregateError> {
        let kind = match (&function, &input) {
            (Function::Count, _) => Kind::Count(Count),
            (_, None) => return Err(AggregateError::NeedsInput { function }),
            (Function::Sum, Some(input)) => Kind::of_total(&function, input, Answer::Sum)?,
            (Function::Mean, Some(input)) => {
                let scale = if let Type::Decimal { scale, .. } = input { *scale } else { 0 };
                Kind::of_total(&function, input, Answer::Mean { scale })?
            }
            (Function::Min, Some(input)) => Kind::of_extremum(&function, input, Ordering::Less)?,
            (Function::Max, Some(input)) => Kind::of_extremum(&function, input, Ordering::Greater)?,
        };
        Ok(Aggregate { function, input, kind })
    }

    pub fn function(&self) -> &Function {
        &self.function
    }

    pub fn input(&self) -> Option<&Type> {
        self.input.as_ref()
    }

    /// The type of what `finish` gives.
    pub fn output(&self) -> Type {
        match (&self.function, &self.input) {
            (Function::Count, _) => Type::Int64,
            (Function::Mean, _) => Type::Float64,
            (Function::Sum, Some(Type::Float32 | Type::Float64)) => Type::Float64,
            (Function::Sum, Some(Type::Decimal { scale, .. })) => Type::Decimal { precision: 38, scale: *scale },
            (Function::Sum, _) => Type::Int64,
            (Function::Min | Function::Max, input) => {
                input.clone().expect("an aggregate other than count was made with an input")
            }
        }
    }

    pub fn laws(&self) -> Laws {
        self.function.laws()
    }

    pub fn zero(&self) -> State {
        match &self.kind {
            Kind::Count(count) => State::Count(count.zero()),
            Kind::Integer(sum) => State::Integer(sum.zero()),
            Kind::Decimal(sum) => State::Decimal(sum.zero()),
            Kind::Float(sum) => State::Float(sum.zero()),
            Kind::Extremum(extremum) => State::Extremum(extremum.zero()),
        }
    }

    /// Adds a value of the input type, of a row with these times; a null adds nothing.
    #[inline]
    pub fn push(&self, state: &mut State, value: &Value, times: &Times) {
        if !value.is_null() {
            dispatch!(self, state, |aggregator, state| aggregator.push(state, value, times));
        }
    }

    #[inline]
    pub fn merge(&self, into: &mut State, other: &State) {
        dispatch!(self, into, other, |aggregator, into, other| aggregator.merge(into, other));
    }

    /// See [`Aggregator::unmerge`].
    #[inline]
    pub fn unmerge(&self, from: &mut State, other: &State) -> bool {
        dispatch!(self, from, other, |aggregator, from, other| aggregator.unmerge(from, other))
    }

    /// The answer: null for no values, but 0 from `count`.
    pub fn finish(&self, state: &State) -> Value {
        dispatch!(self, state, |aggregator, state| aggregator.finish(state))
    }

    pub fn encode(&self, state: &State, out: &mut Vec<u8>) {
        dispatch!(self, state, |aggregator, state| aggregator.encode(state, out));
    }

    pub fn decode(&self, bytes: &mut &[u8]) -> Result<State, DecodeError> {
        Ok(match &self.kind {
            Kind::Count(count) => State::Count(count.decode(bytes)?),
            Kind::Integer(sum) => State::Integer(sum.decode(bytes)?),
            Kind::Decimal(sum) => State::Decimal(sum.decode(bytes)?),
            Kind::Float(sum) => State::Float(sum.decode(bytes)?),
            Kind::Extremum(extremum) => State::Extremum(extremum.decode(bytes)?),
        })
    }

    /// Whether the state is that of no values.
    pub fn is_empty(&self, state: &State) -> bool {
        *state == self.zero()
    }
}

impl Kind {
    fn of_total(function: &Function, input: &Type, answer: Answer) -> Result<Kind, AggregateError> {
        Ok(match input {
            Type::Int32 | Type::Int64 => Kind::Integer(ExactSum::new(answer)),
            Type::Float32 | Type::Float64 => Kind::Float(ExactSum::new(answer)),
            Type::Decimal { .. } => Kind::Decimal(ExactSum::new(answer)),
            _ => {
                return Err(AggregateError::WrongInput {
                    function: function.clone(),
                    input: input.clone(),
                    accepted: "a number (int32, int64, float32, float64, decimal)",
                    advice: match input {
                        Type::Bool => Some("use CASE WHEN x THEN 1 ELSE 0 END"),
                        Type::String => Some("if the text is a number, use CAST(x AS DOUBLE)"),
                        _ => None,
                    },
                });
            }
        })
    }

    fn of_extremum(function: &Function, input: &Type, replaces: Ordering) -> Result<Kind, AggregateError> {
        match input {
            Type::List(_) | Type::Map(_) | Type::Struct(_) | Type::Vector(_) => Err(AggregateError::WrongInput {
                function: function.clone(),
                input: input.clone(),
                accepted: "a value with an order (a number, string, binary, timestamp, date, bool)",
                advice: None,
            }),
            _ => Ok(Kind::Extremum(Extremum { replaces, input: input.clone() })),
        }
    }
}

#[cfg(test)]
mod tests;
