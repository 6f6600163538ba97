//! Aggregates that do not depend on how the work was done.
//!
//! A window is computed offline over sorted files, by difference updates or range updates, and online from tiles that
//! were written one event at a time. If the two are to agree to the last bit, a state must not remember the order, the
//! batches or the partitions its values came in. So no aggregator here rounds before `finish`: sums are exact, and equal
//! multisets of values have equal states, with equal encodings.

mod buckets;
mod count;
mod counts;
mod ddsketch;
mod exact_float;
mod exact_sum;
mod extremum;
mod histogram;
mod hyperloglog;
mod moments;
#[cfg(test)]
mod oracle;
mod ordered;
mod rounding;
mod split;
mod top_k;
mod varint;
mod wide;

use std::cmp::Ordering;
use std::fmt;

use crate::as_of::Times;
use crate::value::{self, DecodeError, Type, Value, canonical_f32, canonical_f64};

pub use buckets::{BUCKETS_MAX, Buckets, BucketsError, OTHER};
pub use ddsketch::{CLAMP_MAX, Clamp, Quantile};
pub use exact_sum::{DecimalTotal, FloatTotal, IntegerTotal, Total};

use count::Count;
use counts::Counts;
use ddsketch::Percentile;
use exact_sum::{Answer, ExactSum};
use extremum::Extremum;
use histogram::Histogram;
use hyperloglog::{Distinct, DistinctCount};
use moments::{Moments, SampleSpread, Spread};
use ordered::{Ordered, Stamped};
use split::Split;
use top_k::TopK;

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

    fn laws(&self) -> Laws;

    fn zero(&self) -> Self::State;

    /// Adds a value, which is not null and of the input type, of a row with these times.
    fn push(&self, state: &mut Self::State, value: &Value, times: &Times);

    fn merge(&self, into: &mut Self::State, other: &Self::State);

    /// Takes out what was merged, or will be: a state may be in debt for a while. False, and nothing done, where
    /// [`Laws::invertible`] does not hold.
    fn unmerge(&self, from: &mut Self::State, other: &Self::State) -> bool;

    fn finish(&self, state: &Self::State) -> Value;

    /// Appends the state. The encoding delimits itself; its version is that of the format around it.
    fn encode(&self, state: &Self::State, out: &mut Vec<u8>);

    /// Reads a state from the front of any bytes.
    fn decode(&self, bytes: &mut &[u8]) -> Result<Self::State, DecodeError>;
}

/// An aggregate function with its arguments.
#[derive(Clone, Debug, PartialEq)]
pub enum Function {
    Count,
    Sum,
    Mean,
    Min,
    Max,
    /// The square root of the variance.
    Stddev,
    /// Of a sample: the divisor is n - 1.
    Variance,
    First,
    Last,
    /// The last `n` values, newest first.
    LastN {
        n: u32,
    },
    DistinctCount,
    Percentile {
        q: Quantile,
        clamp: Clamp,
    },
    /// The `k` largest values, largest first.
    TopK {
        k: u32,
    },
    /// How many values are in each of these.
    Histogram(Buckets),
}

/// Names of the functions.
pub const FUNCTION_NAMES: [&str; 14] = [
    "count",
    "sum",
    "mean",
    "min",
    "max",
    "stddev",
    "variance",
    "first",
    "last",
    "last_n",
    "distinct_count",
    "percentile",
    "top_k",
    "histogram",
];

/// Values that `last_n` and `top_k` may keep: a state of them is stored in every tile.
pub const KEPT_MAX: u32 = 1_000;

/// What functions may be given besides their input.
#[derive(Debug, Clone, Default)]
pub struct Arguments {
    pub q: Option<Quantile>,
    pub clamp: Option<Clamp>,
    pub n: Option<u32>,
    pub k: Option<u32>,
    pub buckets: Option<Buckets>,
}

/// Why there is no such function.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FunctionError {
    #[error("`{name}` is not an aggregate function; {}", match .nearest {
        Some(nearest) => format!("did you mean `{nearest}`?"),
        None => format!("available: {}", FUNCTION_NAMES.join(", ")),
    })]
    Unknown {
        name: String,
        /// The nearest name, when one is near.
        nearest: Option<&'static str>,
    },
    #[error("`{function}` needs {argument}")]
    Needs { function: &'static str, argument: &'static str },
    #[error("`{function}` keeps from 1 to {KEPT_MAX} values, not {asked}")]
    Kept { function: &'static str, asked: u32 },
}

impl Function {
    /// A function that needs no arguments.
    pub fn parse(name: &str) -> Result<Function, FunctionError> {
        Function::new(name, Arguments::default())
    }

    /// Arguments that the function does not take are passed over.
    pub fn new(name: &str, arguments: Arguments) -> Result<Function, FunctionError> {
        let needs = |function, argument| FunctionError::Needs { function, argument };
        let kept = |function, kept: Option<u32>, argument| match kept.ok_or(needs(function, argument))? {
            kept @ 1..=KEPT_MAX => Ok(kept),
            asked => Err(FunctionError::Kept { function, asked }),
        };
        Ok(match name {
            "count" => Function::Count,
            "sum" => Function::Sum,
            "mean" => Function::Mean,
            "min" => Function::Min,
            "max" => Function::Max,
            "stddev" => Function::Stddev,
            "variance" => Function::Variance,
            "first" => Function::First,
            "last" => Function::Last,
            "last_n" => Function::LastN { n: kept("last_n", arguments.n, "`n`")? },
            "distinct_count" => Function::DistinctCount,
            "percentile" => Function::Percentile {
                q: arguments.q.ok_or(needs("percentile", "`q`"))?,
                clamp: arguments.clamp.ok_or(needs("percentile", "`clamp`"))?,
            },
            "top_k" => Function::TopK { k: kept("top_k", arguments.k, "`k`")? },
            "histogram" => {
                Function::Histogram(arguments.buckets.ok_or(needs("histogram", "either `edges` or `values`"))?)
            }
            _ => return Err(FunctionError::Unknown { name: name.to_string(), nearest: nearest_name(name) }),
        })
    }

    pub fn name(&self) -> &'static str {
        match self {
            Function::Count => "count",
            Function::Sum => "sum",
            Function::Mean => "mean",
            Function::Min => "min",
            Function::Max => "max",
            Function::Stddev => "stddev",
            Function::Variance => "variance",
            Function::First => "first",
            Function::Last => "last",
            Function::LastN { .. } => "last_n",
            Function::DistinctCount => "distinct_count",
            Function::Percentile { .. } => "percentile",
            Function::TopK { .. } => "top_k",
            Function::Histogram(_) => "histogram",
        }
    }

    /// The arguments that change states, as text for digests.
    pub fn state_arguments(&self) -> Option<String> {
        match self {
            Function::LastN { n } => Some(format!("n {n}")),
            Function::TopK { k } => Some(format!("k {k}")),
            Function::Percentile { clamp, .. } => Some(format!("clamp {:?} {:?}", clamp.low, clamp.high)),
            Function::Histogram(buckets) => Some(buckets.canonical_text()),
            _ => None,
        }
    }

    /// The arguments that change only what states answer, as text for digests.
    pub fn answer_arguments(&self) -> Option<String> {
        match self {
            Function::Percentile { q, .. } => Some(format!("q {:?}", q.as_f64())),
            _ => None,
        }
    }
}

/// The name for a near miss, and for what other systems call it.
pub fn nearest_name(name: &str) -> Option<&'static str> {
    let wanted = name.to_ascii_lowercase();
    let synonym = match wanted.as_str() {
        "avg" | "average" => Some("mean"),
        "minimum" | "least" => Some("min"),
        "maximum" | "greatest" => Some("max"),
        "total" => Some("sum"),
        "std" | "stdev" | "stddev_samp" | "standard_deviation" => Some("stddev"),
        "var" | "var_samp" => Some("variance"),
        "latest" | "most_recent" => Some("last"),
        "earliest" => Some("first"),
        "last_k" | "latest_n" => Some("last_n"),
        "count_distinct" | "approx_count_distinct" | "approx_distinct" | "nunique" | "unique_count" => {
            Some("distinct_count")
        }
        "quantile" | "approx_percentile" | "approx_quantile" => Some("percentile"),
        "top_n" | "largest" => Some("top_k"),
        _ => None,
    };
    synonym.or_else(|| {
        FUNCTION_NAMES
            .into_iter()
            .map(|candidate| (strsim::damerau_levenshtein(&wanted, candidate), candidate))
            .min()
            .filter(|(distance, candidate)| *distance <= 2 && *distance < candidate.len() - 1)
            .map(|(_, candidate)| candidate)
    })
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
    NeedsInput { function: &'static str },
    #[error("`{function}` takes {accepted}, not {input}{}", advice.map(|advice| format!("; {advice}")).unwrap_or_default())]
    WrongInput { function: &'static str, input: Type, accepted: &'static str, advice: Option<&'static str> },
    #[error("an aggregate is split by one expression only")]
    SplitTwice,
}

/// One function over one type of input, perhaps for each part of it.
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
    IntegerSpread(SampleSpread<IntegerTotal>),
    DecimalSpread(SampleSpread<DecimalTotal>),
    FloatSpread(SampleSpread<FloatTotal>),
    Ordered(Ordered),
    TopK(TopK),
    Distinct(DistinctCount),
    Percentile(Percentile),
    Histogram(Histogram),
    Split(Box<Split>),
}

/// What an [`Aggregate`] knows of the values so far; only for the aggregate that made it, or one made alike.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    Count(i64),
    Integer(IntegerTotal),
    Decimal(DecimalTotal),
    Float(FloatTotal),
    Extremum(Value),
    IntegerMoments(Box<Moments<IntegerTotal>>),
    DecimalMoments(Box<Moments<DecimalTotal>>),
    FloatMoments(Box<Moments<FloatTotal>>),
    /// From the end of the order that is kept.
    Ordered(Vec<Stamped>),
    /// Descending.
    Largest(Vec<Value>),
    Distinct(Distinct),
    Counts(Counts),
    /// By number of the bucket, those that are not empty.
    Parts(Vec<(u32, State)>),
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
            (Kind::IntegerSpread($aggregator), State::IntegerMoments($inner)) => $body,
            (Kind::DecimalSpread($aggregator), State::DecimalMoments($inner)) => $body,
            (Kind::FloatSpread($aggregator), State::FloatMoments($inner)) => $body,
            (Kind::Ordered($aggregator), State::Ordered($inner)) => $body,
            (Kind::TopK($aggregator), State::Largest($inner)) => $body,
            (Kind::Distinct($aggregator), State::Distinct($inner)) => $body,
            (Kind::Percentile($aggregator), State::Counts($inner)) => $body,
            (Kind::Histogram($aggregator), State::Counts($inner)) => $body,
            (Kind::Split($aggregator), State::Parts($inner)) => $body,
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
            (Kind::IntegerSpread($aggregator), State::IntegerMoments($inner), State::IntegerMoments($inner_other)) => {
                $body
            }
            (Kind::DecimalSpread($aggregator), State::DecimalMoments($inner), State::DecimalMoments($inner_other)) => {
                $body
            }
            (Kind::FloatSpread($aggregator), State::FloatMoments($inner), State::FloatMoments($inner_other)) => $body,
            (Kind::Ordered($aggregator), State::Ordered($inner), State::Ordered($inner_other)) => $body,
            (Kind::TopK($aggregator), State::Largest($inner), State::Largest($inner_other)) => $body,
            (Kind::Distinct($aggregator), State::Distinct($inner), State::Distinct($inner_other)) => $body,
            (Kind::Percentile($aggregator), State::Counts($inner), State::Counts($inner_other)) => $body,
            (Kind::Histogram($aggregator), State::Counts($inner), State::Counts($inner_other)) => $body,
            (Kind::Split($aggregator), State::Parts($inner), State::Parts($inner_other)) => $body,
            _ => unreachable!("a state went to an aggregate of another kind than the one that made it"),
        }
    };
}

/// Runs an expression with the aggregator of an aggregate, and wraps what it gives as its kind of state.
macro_rules! make_state {
    ($aggregate:expr, |$aggregator:ident| $body:expr) => {
        match &$aggregate.kind {
            Kind::Count($aggregator) => State::Count($body),
            Kind::Integer($aggregator) => State::Integer($body),
            Kind::Decimal($aggregator) => State::Decimal($body),
            Kind::Float($aggregator) => State::Float($body),
            Kind::Extremum($aggregator) => State::Extremum($body),
            Kind::IntegerSpread($aggregator) => State::IntegerMoments($body),
            Kind::DecimalSpread($aggregator) => State::DecimalMoments($body),
            Kind::FloatSpread($aggregator) => State::FloatMoments($body),
            Kind::Ordered($aggregator) => State::Ordered($body),
            Kind::TopK($aggregator) => State::Largest($body),
            Kind::Distinct($aggregator) => State::Distinct($body),
            Kind::Percentile($aggregator) => State::Counts($body),
            Kind::Histogram($aggregator) => State::Counts($body),
            Kind::Split($aggregator) => State::Parts($body),
        }
    };
}

impl Aggregate {
    /// Without an input, `count` counts rows: push any value that is not null for each.
    pub fn new(function: Function, input: Option<Type>) -> Result<Aggregate, AggregateError> {
        let kind = match (&function, &input) {
            (Function::Count, _) => Kind::Count(Count),
            (_, None) => return Err(AggregateError::NeedsInput { function: function.name() }),
            (function, Some(input)) => Kind::new(function, input)?,
        };
        Ok(Aggregate { function, input, kind })
    }

    /// The same for each part of the values, apart by bucket. The input becomes a struct of the bucket's number and the
    /// value, and the answer a map from the buckets' labels.
    pub fn by(self, buckets: Buckets) -> Result<Aggregate, AggregateError> {
        if self.split().is_some() {
            return Err(AggregateError::SplitTwice);
        }
        let function = self.function.clone();
        let split = Split { part: self, buckets };
        Ok(Aggregate { function, input: Some(split.input()), kind: Kind::Split(Box::new(split)) })
    }

    pub fn function(&self) -> &Function {
        &self.function
    }

    /// The type of the values that are pushed; with `by`, a struct.
    pub fn input(&self) -> Option<&Type> {
        self.input.as_ref()
    }

    /// With `by`: the buckets, and the aggregate of each.
    pub fn split(&self) -> Option<(&Buckets, &Aggregate)> {
        match &self.kind {
            Kind::Split(split) => Some((&split.buckets, &split.part)),
            _ => None,
        }
    }

    /// Whether the times of values mean anything to it.
    pub fn is_ordered(&self) -> bool {
        match &self.kind {
            Kind::Ordered(_) => true,
            Kind::Split(split) => split.part.is_ordered(),
            _ => false,
        }
    }

    /// The type of what `finish` gives.
    pub fn output(&self) -> Type {
        if let Some((_, part)) = self.split() {
            return Type::Map(Box::new(part.output()));
        }
        match (&self.function, &self.input) {
            (Function::Count | Function::DistinctCount, _) => Type::Int64,
            (Function::Mean | Function::Stddev | Function::Variance | Function::Percentile { .. }, _) => Type::Float64,
            (Function::Sum, Some(Type::Float32 | Type::Float64)) => Type::Float64,
            (Function::Sum, Some(Type::Decimal { scale, .. })) => Type::Decimal { precision: 38, scale: *scale },
            (Function::Sum, _) => Type::Int64,
            (Function::Histogram(_), _) => Type::List(Box::new(Type::Int64)),
            (Function::Min | Function::Max | Function::First | Function::Last, input) => {
                input.clone().expect("an aggregate other than count was made with an input")
            }
            (Function::LastN { .. } | Function::TopK { .. }, input) => {
                Type::List(Box::new(input.clone().expect("an aggregate other than count was made with an input")))
            }
        }
    }

    pub fn laws(&self) -> Laws {
        match &self.kind {
            Kind::Count(count) => count.laws(),
            Kind::Integer(sum) => sum.laws(),
            Kind::Decimal(sum) => sum.laws(),
            Kind::Float(sum) => sum.laws(),
            Kind::Extremum(extremum) => extremum.laws(),
            Kind::IntegerSpread(spread) => spread.laws(),
            Kind::DecimalSpread(spread) => spread.laws(),
            Kind::FloatSpread(spread) => spread.laws(),
            Kind::Ordered(ordered) => ordered.laws(),
            Kind::TopK(top_k) => top_k.laws(),
            Kind::Distinct(distinct) => distinct.laws(),
            Kind::Percentile(percentile) => percentile.laws(),
            Kind::Histogram(histogram) => histogram.laws(),
            Kind::Split(split) => split.laws(),
        }
    }

    pub fn zero(&self) -> State {
        make_state!(self, |aggregator| aggregator.zero())
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
        Ok(make_state!(self, |aggregator| aggregator.decode(bytes)?))
    }

    /// Whether the state is that of no values.
    pub fn is_empty(&self, state: &State) -> bool {
        *state == self.zero()
    }
}

impl Kind {
    fn new(function: &Function, input: &Type) -> Result<Kind, AggregateError> {
        let wrong = |accepted, advice| AggregateError::WrongInput {
            function: function.name(),
            input: input.clone(),
            accepted,
            advice,
        };
        let not_a_number = || {
            let advice = match input {
                Type::Bool => Some("use CASE WHEN x THEN 1 ELSE 0 END"),
                Type::String => Some("if the text is a number, use CAST(x AS DOUBLE)"),
                _ => None,
            };
            wrong("a number (int32, int64, float32, float64, decimal)", advice)
        };
        let scale = if let Type::Decimal { scale, .. } = input { *scale } else { 0 };
        let total = |answer| match input {
            Type::Int32 | Type::Int64 => Ok(Kind::Integer(ExactSum::new(answer))),
            Type::Float32 | Type::Float64 => Ok(Kind::Float(ExactSum::new(answer))),
            Type::Decimal { .. } => Ok(Kind::Decimal(ExactSum::new(answer))),
            _ => Err(not_a_number()),
        };
        let spread = |spread| match input {
            Type::Int32 | Type::Int64 => Ok(Kind::IntegerSpread(SampleSpread::new(spread, 0))),
            Type::Float32 | Type::Float64 => Ok(Kind::FloatSpread(SampleSpread::new(spread, 0))),
            Type::Decimal { .. } => Ok(Kind::DecimalSpread(SampleSpread::new(spread, scale))),
            _ => Err(not_a_number()),
        };
        let has_order = || match input {
            Type::List(_) | Type::Map(_) | Type::Struct(_) | Type::Vector(_) => {
                Err(wrong("a value with an order (a number, string, binary, timestamp, date, bool)", None))
            }
            _ => Ok(()),
        };
        let ordered = |comes_first, kept: u32, is_list| {
            Kind::Ordered(Ordered { comes_first, kept: kept as usize, is_list, input: input.clone() })
        };
        Ok(match function {
            Function::Count => Kind::Count(Count),
            Function::Sum => total(Answer::Sum)?,
            Function::Mean => total(Answer::Mean { scale })?,
            Function::Min | Function::Max => {
                has_order()?;
                let replaces = if *function == Function::Min { Ordering::Less } else { Ordering::Greater };
                Kind::Extremum(Extremum { replaces, input: input.clone() })
            }
            Function::Stddev => spread(Spread::Deviation)?,
            Function::Variance => spread(Spread::Variance)?,
            Function::First => ordered(Ordering::Less, 1, false),
            Function::Last => ordered(Ordering::Greater, 1, false),
            Function::LastN { n } => ordered(Ordering::Greater, *n, true),
            Function::DistinctCount => Kind::Distinct(DistinctCount),
            Function::Percentile { q, clamp } => {
                if !input.is_numeric() {
                    return Err(not_a_number());
                }
                Kind::Percentile(Percentile { q: *q, clamp: *clamp, scale })
            }
            Function::TopK { k } => {
                has_order()?;
                Kind::TopK(TopK { k: *k as usize, input: input.clone() })
            }
            Function::Histogram(buckets) => {
                if buckets.input() != input {
                    return Err(wrong("values of its buckets' type", None));
                }
                Kind::Histogram(Histogram { buckets: buckets.clone() })
            }
        })
    }
}

// What aggregators share.

/// The value with one NaN and no -0.0, at any depth: states are compared and encoded bit by bit.
fn canonical(value: &Value) -> Value {
    match value {
        Value::Float32(x) => Value::Float32(canonical_f32(*x)),
        Value::Float64(x) => Value::Float64(canonical_f64(*x)),
        Value::Vector(items) => Value::Vector(items.iter().map(|x| canonical_f32(*x)).collect()),
        Value::List(items) => Value::List(items.iter().map(canonical).collect()),
        Value::Struct(fields) => Value::Struct(fields.iter().map(canonical).collect()),
        Value::Map(pairs) => Value::Map(pairs.iter().map(|(key, value)| (key.clone(), canonical(value))).collect()),
        value => value.clone(),
    }
}

/// Reads a value, and refuses every spelling but its canonical one.
fn decode_canonical(bytes: &mut &[u8], value_type: &Type) -> Result<Value, DecodeError> {
    let before = *bytes;
    let value = canonical(&value::decode(bytes, value_type)?);
    let mut again = Vec::new();
    value::encode(&value, &mut again);
    if before[..before.len() - bytes.len()] == again[..] {
        Ok(value)
    } else {
        Err(DecodeError::Invalid("a value is not in its canonical form"))
    }
}

/// The float64 nearest to a number. `scale` is that of its type, zero except for decimals.
fn as_float(value: &Value, scale: i8) -> f64 {
    match value {
        Value::Int32(x) => f64::from(*x),
        Value::Int64(x) => *x as f64,
        Value::Float32(x) => f64::from(*x),
        Value::Float64(x) => *x,
        Value::Decimal(x) => rounding::decimal(*x, scale),
        other => unreachable!("an aggregate of numbers was given {other:?}"),
    }
}

#[cfg(test)]
mod tests;
