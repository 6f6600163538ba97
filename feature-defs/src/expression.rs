//! Expressions: SQL scalar text in a definition becomes one compiled function that both sides run.
//!
//! The problem: a feature computed in training and the same feature computed while serving must agree to the last bit,
//! whatever the batch, the machine or the neighbours of a row. So text is parsed and typed once, against the columns
//! that exist and a whitelist of pure functions, and becomes one physical expression over record batches. Three rules
//! make its value a function of the row alone:
//!
//! - **Total.** Nothing fails at run time. A failed cast, an integer division by zero, an overflowing decimal or
//!   timestamp is null for that row only; integer `+ - *` and negation wrap; floats are IEEE.
//! - **Canonical.** Every node's floats are canonical (one NaN, no -0.0), so NaN is greatest and equal to itself in every
//!   comparison, on every processor.
//! - **Pinned.** Transcendental functions come from a pinned `libm`, time zones from a pinned database, and no optimiser
//!   rewrites the tree. Constants are folded by the very kernel that would have run.
//!
//! What names mean comes from an [`Environment`]; this module knows nothing of sources, views or services. Identifiers
//! are matched exactly, quoted or not; keywords and function names in any case.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, RecordBatch, RecordBatchOptions};
use arrow::datatypes::{Field, Schema, SchemaRef};
use datafusion_physical_expr::PhysicalExpr;

use crate::value::Type;

mod arithmetic;
mod call;
mod choose;
mod compare;
mod convert;
mod function;
mod lower;
mod text;
mod time;
mod vector;

/// Counts changes in what a function of ours returns. Part of every digest.
pub const FUNCTION_EPOCH: u32 = 1;

/// Counts changes in how expressions are typed and evaluated, upgrades of DataFusion and Arrow included. Part of every
/// digest.
pub const ENGINE_EPOCH: u32 = 1;

/// The version of the time-zone database that `local` reads. Part of every digest.
pub fn time_zone_database() -> &'static str {
    chrono_tz::IANA_TZDB_VERSION
}

/// The hidden column that `at()` reads.
pub const AT_COLUMN: &str = "__at";

/// The hidden column of a relation that `event_time(relation)` reads.
pub const EVENT_TIME_COLUMN: &str = "__event_time";

/// What the names in an expression mean. Built by the caller, who knows the sources and views.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    columns: BTreeMap<(Option<String>, String), Type>,
    vocabularies: BTreeMap<String, Arc<[String]>>,
    undeclared: Undeclared,
}

/// What a name means that nobody declared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Undeclared {
    #[default]
    Mistake,
    Null,
}

impl Environment {
    pub fn new() -> Environment {
        Environment::default()
    }

    /// A column: unqualified for a source's columns, `view.feature` for a transform's inputs.
    pub fn column(&mut self, relation: Option<&str>, name: &str, value_type: Type) {
        self.columns.insert((relation.map(str::to_string), name.to_string()), value_type);
    }

    /// Makes `event_time(relation)` and, with [`Environment::request_time`], `age(relation)` available.
    pub fn relation_times(&mut self, relation: &str) {
        self.column(Some(relation), EVENT_TIME_COLUMN, Type::Timestamp);
    }

    /// Makes `at()` available.
    pub fn request_time(&mut self) {
        self.column(None, AT_COLUMN, Type::Timestamp);
    }

    pub fn vocabulary(&mut self, name: &str, values: Arc<[String]>) {
        self.vocabularies.insert(name.to_string(), values);
    }

    /// Makes `name` and `relation.name` null where they are not declared, for expressions over what has no schema;
    /// [`Expression::undeclared`] then lists them.
    pub fn undeclared_is_null(&mut self) {
        self.undeclared = Undeclared::Null;
    }

    /// Every column there is, hidden ones included, sorted by relation and name.
    pub fn schema(&self) -> SchemaRef {
        let field = |(key, value_type): (&(Option<String>, String), &Type)| {
            let reference = ColumnRef { relation: key.0.clone(), name: key.1.clone() };
            Field::new(reference.to_string(), value_type.arrow(), true)
        };
        Arc::new(Schema::new(self.columns.iter().map(field).collect::<Vec<_>>()))
    }
}

/// A column that an expression reads.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ColumnRef {
    pub relation: Option<String>,
    pub name: String,
}

impl ColumnRef {
    /// Whether this is a time that the engine supplies, rather than a column that somebody named.
    pub fn is_hidden(&self) -> bool {
        match self.relation {
            None => self.name == AT_COLUMN,
            Some(_) => self.name == EVENT_TIME_COLUMN,
        }
    }
}

impl fmt::Display for ColumnRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.relation {
            None => f.write_str(&self.name),
            Some(relation) => write!(f, "{relation}.{}", self.name),
        }
    }
}

/// A compiled expression. Cloning it is cheap.
#[derive(Debug, Clone)]
pub struct Expression {
    compiled: Arc<Compiled>,
}

#[derive(Debug)]
struct Compiled {
    value_type: Type,
    columns: Vec<ColumnRef>,
    undeclared: Vec<ColumnRef>,
    vocabularies: Vec<String>,
    schema: SchemaRef,
    root: Arc<dyn PhysicalExpr>,
    canonical_text: String,
}

/// Why a text is not an expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ExpressionError {
    pub kind: ErrorKind,
    pub message: String,
    /// The bytes of the text to underline.
    pub offset: Option<(usize, usize)>,
    /// What to do about it.
    pub help: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The text is not SQL.
    Syntax,
    /// SQL that features may not use: clocks, chance, subqueries, aggregates.
    Refused,
    UnknownColumn,
    UnknownFunction,
    /// A vocabulary, time zone, field or unit that does not exist.
    UnknownName,
    /// A function is given the wrong arguments.
    Argument,
    Type,
    /// The expression is larger or deeper than allowed.
    Limit,
}

/// Why a batch could not be evaluated. Values never are the reason: expressions are total.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    #[error("an expression over {expected} columns was given {found}")]
    ColumnCount { expected: usize, found: usize },
    #[error("the columns given do not fit the expression's inputs")]
    Columns(#[source] arrow::error::ArrowError),
    #[error("the expression failed over a batch")]
    Failed(#[source] datafusion_common::DataFusionError),
}

impl Expression {
    /// Compiles a text. With a declared type, the value is converted to it where nothing is lost that the declaration
    /// did not ask for; anything else is an error.
    pub fn compile(
        text: &str,
        environment: &Environment,
        declared: Option<&Type>,
    ) -> Result<Expression, ExpressionError> {
        let compiled = lower::compile(text, environment, declared)?;
        Ok(Expression { compiled: Arc::new(compiled) })
    }

    /// The declared type, or the inferred one.
    pub fn value_type(&self) -> &Type {
        &self.compiled.value_type
    }

    /// What the expression reads, hidden columns included, in the order in which the text first names them.
    pub fn columns(&self) -> &[ColumnRef] {
        &self.compiled.columns
    }

    /// Names that were taken for null, where the environment allows that, in the order in which the text first names them.
    pub fn undeclared(&self) -> &[ColumnRef] {
        &self.compiled.undeclared
    }

    /// The vocabularies it names: their values are part of its meaning, though not of [`Expression::canonical_text`].
    pub fn vocabularies(&self) -> &[String] {
        &self.compiled.vocabularies
    }

    /// The same text for every spelling of the same expression: full parentheses, lower-case names, one form per
    /// literal. This is ours and stable, for digests.
    pub fn canonical_text(&self) -> String {
        self.compiled.canonical_text.clone()
    }

    /// The physical expression over a batch of [`Expression::input_schema`], for engines that run it in a plan.
    pub fn physical(&self) -> Arc<dyn PhysicalExpr> {
        self.compiled.root.clone()
    }

    /// The fields of [`Expression::columns`], in that order.
    pub fn input_schema(&self) -> SchemaRef {
        self.compiled.schema.clone()
    }

    /// Evaluates a batch. The columns are those of [`Expression::columns`], in that order, each of the Arrow type of its
    /// type in the environment and `rows` long. The result has the Arrow type of [`Expression::value_type`].
    pub fn evaluate(&self, columns: &[ArrayRef], rows: usize) -> Result<ArrayRef, EvaluateError> {
        self.evaluate_columns(columns.iter().cloned(), rows)
    }

    /// The same for columns that are the caller's to give away.
    pub fn evaluate_columns(
        &self,
        columns: impl ExactSizeIterator<Item = ArrayRef>,
        rows: usize,
    ) -> Result<ArrayRef, EvaluateError> {
        let expected = self.compiled.columns.len();
        if columns.len() != expected {
            return Err(EvaluateError::ColumnCount { expected, found: columns.len() });
        }
        // Sources canonicalise their floats; a caller that did not must not change what a comparison sees.
        let columns = columns.map(call::canonical).collect();
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        let batch = RecordBatch::try_new_with_options(self.compiled.schema.clone(), columns, &options)
            .map_err(EvaluateError::Columns)?;
        let array = self
            .compiled
            .root
            .evaluate(&batch)
            .and_then(|value| value.into_array(rows))
            .map_err(EvaluateError::Failed)?;
        debug_assert_eq!((array.len(), array.data_type()), (rows, &self.compiled.value_type.arrow()));
        Ok(array)
    }
}

#[cfg(test)]
mod tests;
