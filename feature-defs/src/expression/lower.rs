//! From text to physical expression: sqlparser's tree is walked once, bottom up; every node is typed as it is built, so
//! that an error can point at the operands that do not fit.
//!
//! The walk is the whitelist: a construct it does not name is refused. It also writes the canonical text.

use std::sync::Arc;

use arrow::array::ArrayRef;
use arrow::datatypes::{DataType as ArrowType, Field, IntervalUnit, Schema, TimeUnit};
use datafusion_common::ScalarValue;
use datafusion_expr::type_coercion::binary::{BinaryTypeCoercer, binary_numeric_coercion};
use datafusion_expr::{ColumnarValue, Operator};
use datafusion_physical_expr::PhysicalExpr;
use datafusion_physical_expr::expressions::{BinaryExpr, Column, Literal, in_list, is_not_null, is_null, not};
use datafusion_sql::sqlparser::ast::{
    AccessExpr, BinaryOperator, CaseWhen, CeilFloorKind, DataType as SqlType, DateTimeField, Expr, Ident, Subscript,
    TrimWhereField, UnaryOperator, Value as SqlValue, ValueWithSpan,
};
use datafusion_sql::sqlparser::dialect::GenericDialect;
use datafusion_sql::sqlparser::parser::{Parser, ParserError};
use datafusion_sql::sqlparser::tokenizer::{Location, Span, Token, Tokenizer};

use super::arithmetic::{self, Operation};
use super::call::{Argument, Body, Call, run};
use super::choose::Choose;
use super::{
    ColumnRef, Compiled, Environment, ErrorKind, ExpressionError, Undeclared, compare, convert, text, time, vector,
};
use crate::value::Type;

/// No hand-written feature comes near; a generated one should be a vocabulary or a join.
const TEXT_BYTES_MAX: usize = 64 * 1024;

/// How deep operators may nest. Chains of AND or OR count once, whatever their length.
const DEPTH_MAX: usize = 200;

/// How deep parentheses and brackets may nest: less than the parser's own limit, which answers with a syntax error.
const PARENTHESES_MAX: usize = 40;

/// Parser and walk recurse; this thread's stack holds the deepest tree that [`TEXT_BYTES_MAX`] allows.
const STACK_BYTES: usize = 256 * 1024 * 1024;

pub(super) fn compile(
    text: &str,
    environment: &Environment,
    declared: Option<&Type>,
) -> Result<Compiled, ExpressionError> {
    let limit = |message: String| ExpressionError { kind: ErrorKind::Limit, message, offset: None, help: None };
    if text.len() > TEXT_BYTES_MAX {
        return Err(limit(format!("the expression is longer than {TEXT_BYTES_MAX} bytes")));
    }
    // A chain of operators nests as deep as it is long, without the parser's own limit noticing; the caller's stack may
    // be small.
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, || compile_here(text, environment, declared))
            .map_err(|e| limit(format!("no thread could be started to compile the expression: {e}")))?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn compile_here(text: &str, environment: &Environment, declared: Option<&Type>) -> Result<Compiled, ExpressionError> {
    let mut lowering = Lowering::new(text, environment);
    let tree = lowering.parse()?;
    let typed = lowering.lower(&tree)?;
    let typed = lowering.declare(typed, declared)?;
    let Some(value_type) = Type::from_arrow(&typed.data_type).filter(|t| t.arrow() == typed.data_type) else {
        return Err(lowering.type_error(
            format!("a value of type {} cannot be kept", name_of(&typed.data_type)),
            typed.span,
            match typed.data_type {
                ArrowType::Null => Some("declare a type, or write CAST(NULL AS ...)".to_string()),
                ArrowType::Duration(_) => Some("date_part('epoch', ...) gives its seconds".to_string()),
                _ => None,
            },
        ));
    };
    Ok(Compiled {
        value_type,
        schema: lowering.schema(),
        columns: lowering.columns,
        undeclared: lowering.undeclared,
        vocabularies: lowering.vocabularies,
        root: typed.expr,
        canonical_text: typed.text,
    })
}

/// A node with its type, the bytes it came from, and its canonical text.
#[derive(Clone)]
pub(super) struct Typed {
    pub expr: Arc<dyn PhysicalExpr>,
    pub data_type: ArrowType,
    pub span: (usize, usize),
    pub text: String,
    /// The value, where it is known already.
    pub literal: Option<ScalarValue>,
}

pub(super) type Lowered = Result<Typed, ExpressionError>;

pub(super) struct Lowering<'a> {
    pub source: &'a str,
    pub environment: &'a Environment,
    lines: Vec<usize>,
    columns: Vec<ColumnRef>,
    fields: Vec<Field>,
    undeclared: Vec<ColumnRef>,
    pub vocabularies: Vec<String>,
    depth: usize,
    /// The last place that was resolved, for constructs the parser gives no place.
    here: (usize, usize),
}

/// A moment.
pub(super) fn utc() -> ArrowType {
    Type::Timestamp.arrow()
}

/// The reading of a wall clock.
pub(super) const LOCAL: ArrowType = ArrowType::Timestamp(TimeUnit::Microsecond, None);

/// A type as its users know it.
pub(super) fn name_of(data_type: &ArrowType) -> String {
    match data_type {
        ArrowType::Null => "null".to_string(),
        ArrowType::Timestamp(_, None) => "local timestamp".to_string(),
        ArrowType::Duration(_) => "duration".to_string(),
        ArrowType::Interval(_) => "interval".to_string(),
        other => Type::from_arrow(other).map_or_else(|| other.to_string(), |t| t.to_string()),
    }
}

pub(super) fn is_integer(t: &ArrowType) -> bool {
    matches!(t, ArrowType::Int32 | ArrowType::Int64)
}

pub(super) fn is_number(t: &ArrowType) -> bool {
    is_integer(t) || matches!(t, ArrowType::Float32 | ArrowType::Float64 | ArrowType::Decimal128(..))
}

fn is_time(t: &ArrowType) -> bool {
    matches!(t, ArrowType::Timestamp(..) | ArrowType::Date32)
}

/// The name nearest to what was written, when one is near.
pub(super) fn nearest<'n>(wanted: &str, names: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    let lower = wanted.to_lowercase();
    names
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&lower, &name.to_lowercase()), name))
        .min()
        .filter(|(distance, name)| *distance <= (name.chars().count().min(lower.chars().count()) / 3).max(1))
        .map(|(_, name)| name)
}

/// The type in which two numbers meet.
fn common_number(left: &ArrowType, right: &ArrowType) -> Option<ArrowType> {
    use ArrowType::*;
    Some(match (left, right) {
        _ if left == right => left.clone(),
        // A float32 cannot hold the integers and decimals that a float64 can.
        (Float32 | Float64, _) | (_, Float32 | Float64) => Float64,
        (Int32 | Int64, Int32 | Int64) => Int64,
        _ => match binary_numeric_coercion(left, right)? {
            decimal @ Decimal128(..) => decimal,
            _ => Float64,
        },
    })
}

impl<'a> Lowering<'a> {
    fn new(source: &'a str, environment: &'a Environment) -> Lowering<'a> {
        let newlines = source.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(i, _)| i + 1);
        Lowering {
            source,
            environment,
            lines: std::iter::once(0).chain(newlines).collect(),
            columns: Vec::new(),
            fields: Vec::new(),
            undeclared: Vec::new(),
            vocabularies: Vec::new(),
            depth: 0,
            here: (0, source.len()),
        }
    }

    fn schema(&self) -> Arc<Schema> {
        Arc::new(Schema::new(self.fields.clone()))
    }

    // Errors.

    pub fn error(
        &self,
        kind: ErrorKind,
        message: impl Into<String>,
        span: (usize, usize),
        help: Option<String>,
    ) -> ExpressionError {
        ExpressionError { kind, message: message.into(), offset: Some(span), help }
    }

    pub fn type_error(&self, message: String, span: (usize, usize), help: Option<String>) -> ExpressionError {
        self.error(ErrorKind::Type, message, span, help)
    }

    fn refused(&self, message: impl Into<String>, help: Option<&str>) -> ExpressionError {
        self.error(ErrorKind::Refused, message, self.here, help.map(str::to_string))
    }

    // Places.

    /// The parser counts lines and characters from 1.
    fn offset(&self, location: Location) -> Option<usize> {
        let line = usize::try_from(location.line.checked_sub(1)?).ok()?;
        let column = usize::try_from(location.column.checked_sub(1)?).ok()?;
        let start = *self.lines.get(line)?;
        let rest = &self.source[start..];
        Some(start + rest.char_indices().nth(column).map_or(rest.len(), |(at, _)| at))
    }

    pub fn place(&mut self, span: Span) -> (usize, usize) {
        if let (Some(start), Some(end)) = (self.offset(span.start), self.offset(span.end))
            && start < end
        {
            self.here = (start, end);
        }
        self.here
    }

    // Parsing.

    fn parse(&mut self) -> Result<Expr, ExpressionError> {
        let dialect = GenericDialect {};
        if self.source.trim().is_empty() {
            return Err(self.error(ErrorKind::Syntax, "the expression is empty", (0, self.source.len()), None));
        }
        let tokens = Tokenizer::new(&dialect, self.source).tokenize_with_location().map_err(|e| {
            let at = self.offset(e.location).unwrap_or(0);
            self.error(ErrorKind::Syntax, lower_first(&e.message), self.character(at), None)
        })?;
        let mut nesting = 0_usize;
        for token in &tokens {
            match token.token {
                Token::LParen | Token::LBracket | Token::LBrace => nesting += 1,
                Token::RParen | Token::RBracket | Token::RBrace => nesting = nesting.saturating_sub(1),
                _ => {}
            }
            if nesting > PARENTHESES_MAX {
                let message = format!("parentheses are nested more than {PARENTHESES_MAX} deep");
                let span = self.place(token.span);
                return Err(self.error(ErrorKind::Limit, message, span, None));
            }
        }
        let mut parser = Parser::new(&dialect).with_tokens_with_locations(tokens);
        let tree = parser.parse_expr().map_err(|e| self.syntax(e))?;
        let rest = parser.peek_token();
        if rest.token != Token::EOF {
            let span = self.place(rest.span);
            let message = format!("the expression ends before `{}`", &self.source[span.0..span.1]);
            return Err(self.error(ErrorKind::Syntax, message, span, None));
        }
        Ok(tree)
    }

    fn character(&self, at: usize) -> (usize, usize) {
        let at = at.min(self.source.len());
        (at, at + self.source[at..].chars().next().map_or(0, char::len_utf8))
    }

    fn syntax(&self, error: ParserError) -> ExpressionError {
        let message = match error {
            ParserError::TokenizerError(message) | ParserError::ParserError(message) => message,
            ParserError::RecursionLimitExceeded => {
                return ExpressionError {
                    kind: ErrorKind::Limit,
                    message: "the expression is nested too deeply".to_string(),
                    offset: None,
                    help: None,
                };
            }
        };
        // The parser writes the place into its message.
        let (text, place) = match message.rsplit_once(" at Line: ") {
            Some((text, place)) => (text.to_string(), Some(place.to_string())),
            None => (message, None),
        };
        let offset = place.and_then(|place| {
            let (line, column) = place.split_once(", Column: ")?;
            self.offset(Location { line: line.parse().ok()?, column: column.parse().ok()? })
        });
        let span = self.character(offset.unwrap_or(self.source.trim_end().len()));
        let message = text.strip_prefix("sql parser error: ").unwrap_or(&text).replace("EOF", "the end");
        self.error(ErrorKind::Syntax, lower_first(&message), span, None)
    }

    // Building nodes.

    pub fn literal(&self, value: ScalarValue, span: (usize, usize), text: String) -> Typed {
        Typed {
            expr: Arc::new(Literal::new(value.clone())),
            data_type: value.data_type(),
            span,
            text,
            literal: Some(value),
        }
    }

    /// A call of a body, or its value when every argument has one.
    pub fn call(
        &self,
        name: &str,
        body: Arc<Body>,
        arguments: &[Typed],
        output: ArrowType,
        span: (usize, usize),
        text: String,
    ) -> Lowered {
        if !arguments.is_empty() && arguments.iter().all(|argument| argument.literal.is_some()) {
            let value = arguments
                .iter()
                .flat_map(|argument| argument.literal.clone())
                .map(|value| Argument::new(ColumnarValue::Scalar(value)))
                .collect::<Result<Vec<_>, _>>()
                .and_then(|arguments| run(&*body, &arguments, 1, &output));
            let scalar = value
                .map_err(|e| e.to_string())
                .and_then(|array: ArrayRef| ScalarValue::try_from_array(&array, 0).map_err(|e| e.to_string()));
            let scalar =
                scalar.map_err(|e| self.type_error(format!("{name} failed on its constants: {e}"), span, None))?;
            return Ok(self.literal(scalar, span, text));
        }
        let children = arguments.iter().map(|argument| argument.expr.clone()).collect();
        let expr = Arc::new(Call::new(name.to_string(), body, children, output.clone()));
        Ok(Typed { expr, data_type: output, span, text, literal: None })
    }

    /// The node as another type. Canonical text does not show casts that nobody wrote.
    pub fn cast(&self, typed: Typed, to: &ArrowType) -> Lowered {
        if typed.data_type == *to {
            return Ok(typed);
        }
        if typed.data_type == ArrowType::Null {
            let null = ScalarValue::try_from(to)
                .map_err(|_| self.type_error(format!("there is no null of type {}", name_of(to)), typed.span, None))?;
            return Ok(self.literal(null, typed.span, typed.text));
        }
        let body = convert::cast(&typed.data_type, to).map_err(|advice| {
            let message = format!("cannot cast {} to {}", name_of(&typed.data_type), name_of(to));
            self.type_error(message, typed.span, (!advice.is_empty()).then(|| advice.to_string()))
        })?;
        let (span, text) = (typed.span, typed.text.clone());
        self.call(&format!("cast_{}", name_of(to)), body, &[typed], to.clone(), span, text)
    }

    fn comparison(&self, left: Typed, operator: Operator, right: Typed, text: String) -> Lowered {
        let span = join(left.span, right.span);
        let (left, right) = self.common_pair(left, right, "compare", "with")?;
        if matches!(
            left.data_type,
            ArrowType::List(_) | ArrowType::Map(..) | ArrowType::Struct(_) | ArrowType::FixedSizeList(..)
        ) {
            let message = format!("cannot compare {} values", name_of(&left.data_type));
            return Err(self.type_error(message, span, Some("compare their elements".to_string())));
        }
        // Two constants are left to DataFusion, which folds nothing: neither do we, and the tree stays what was written.
        let is_constant = left.literal.is_some() && right.literal.is_some();
        if let Some(body) = compare::comparison(operator, &left.data_type)
            && !is_constant
        {
            return self.call(&operator.to_string(), body, &[left, right], ArrowType::Boolean, span, text);
        }
        Ok(self.binary(left, operator, right, ArrowType::Boolean, text))
    }

    fn binary(&self, left: Typed, operator: Operator, right: Typed, data_type: ArrowType, text: String) -> Typed {
        let span = join(left.span, right.span);
        let expr = Arc::new(BinaryExpr::new(left.expr, operator, right.expr));
        Typed { expr, data_type, span, text, literal: None }
    }

    /// Both as one type, as a comparison, CASE or COALESCE needs them.
    fn common_pair(
        &self,
        left: Typed,
        right: Typed,
        verb: &str,
        with: &str,
    ) -> Result<(Typed, Typed), ExpressionError> {
        let to = self.common(&left, &right, verb, with)?;
        Ok((self.meet(left, &to)?, self.meet(right, &to)?))
    }

    fn common(&self, left: &Typed, right: &Typed, verb: &str, with: &str) -> Result<ArrowType, ExpressionError> {
        let (l, r) = (&left.data_type, &right.data_type);
        let constant_text = |typed: &Typed| typed.literal.is_some() && typed.data_type == ArrowType::Utf8;
        if l == r || *r == ArrowType::Null {
            return Ok(l.clone());
        }
        if *l == ArrowType::Null {
            return Ok(r.clone());
        }
        let common = match (l, r) {
            _ if is_number(l) && is_number(r) => common_number(l, r),
            (ArrowType::Timestamp(..), ArrowType::Date32) => Some(l.clone()),
            (ArrowType::Date32, ArrowType::Timestamp(..)) => Some(r.clone()),
            (ArrowType::Duration(_), ArrowType::Interval(_)) => Some(l.clone()),
            (ArrowType::Interval(_), ArrowType::Duration(_)) => Some(r.clone()),
            _ if is_time(l) && constant_text(right) => Some(l.clone()),
            _ if is_time(r) && constant_text(left) => Some(r.clone()),
            _ => None,
        };
        common.ok_or_else(|| {
            let message = format!("cannot {verb} {} {with} {}", name_of(l), name_of(r));
            let help = match (l, r) {
                (ArrowType::Utf8, number) | (number, ArrowType::Utf8) if is_number(number) => {
                    Some(format!("CAST(... AS {}) makes a number of a string", name_of(number)))
                }
                (ArrowType::Timestamp(..), ArrowType::Timestamp(..)) => {
                    Some("a wall clock and a moment differ by the zone; convert neither or both with local".to_string())
                }
                _ => None,
            };
            self.type_error(message, join(left.span, right.span), help)
        })
    }

    /// Like [`Lowering::cast`], but a constant that is no value of the other's type is a mistake rather than null.
    fn meet(&self, typed: Typed, to: &ArrowType) -> Lowered {
        if let (ArrowType::Interval(_), ArrowType::Duration(_)) = (&typed.data_type, to) {
            return self.interval_as_duration(typed);
        }
        let was_null = typed.literal.as_ref().is_none_or(ScalarValue::is_null);
        let (span, text) = (typed.span, typed.text.clone());
        let met = self.cast(typed, to)?;
        if !was_null && met.literal.as_ref().is_some_and(ScalarValue::is_null) {
            return Err(self.type_error(format!("{text} is not a {}", name_of(to)), span, None));
        }
        Ok(met)
    }

    fn interval_as_duration(&self, typed: Typed) -> Lowered {
        match typed.literal {
            Some(ScalarValue::IntervalMonthDayNano(Some(by))) if by.months == 0 => {
                let micros = i64::from(by.days) * time::MICROS_PER_DAY + by.nanoseconds / 1_000;
                Ok(self.literal(ScalarValue::DurationMicrosecond(Some(micros)), typed.span, typed.text))
            }
            _ => Err(self.type_error("an interval of months has no fixed length".to_string(), typed.span, None)),
        }
    }

    /// All as one type.
    pub fn unify(&self, all: Vec<Typed>, verb: &str, with: &str) -> Result<Vec<Typed>, ExpressionError> {
        let Some(first) = all.first() else { return Ok(all) };
        let mut widest = first.clone();
        for typed in &all[1..] {
            let data_type = self.common(&widest, typed, verb, with)?;
            // Strings may become times only when all of them are constants.
            let literal = if widest.data_type == typed.data_type {
                widest.literal.and(typed.literal.clone())
            } else if widest.data_type == data_type {
                widest.literal
            } else {
                typed.literal.clone()
            };
            widest = Typed { expr: widest.expr, text: widest.text, span: typed.span, data_type, literal };
        }
        all.into_iter().map(|typed| self.meet(typed, &widest.data_type)).collect()
    }

    fn boolean(&self, typed: Typed, what: &str) -> Lowered {
        match typed.data_type {
            ArrowType::Boolean | ArrowType::Null => self.cast(typed, &ArrowType::Boolean),
            ref other => Err(self.type_error(format!("{what} needs a bool, not {}", name_of(other)), typed.span, None)),
        }
    }

    pub fn column(&mut self, relation: Option<&str>, name: &str, span: (usize, usize)) -> Option<Typed> {
        let value_type = self.environment.columns.get(&(relation.map(str::to_string), name.to_string()))?;
        let reference = ColumnRef { relation: relation.map(str::to_string), name: name.to_string() };
        let data_type = value_type.arrow();
        let index = self.columns.iter().position(|column| *column == reference).unwrap_or_else(|| {
            self.fields.push(Field::new(reference.to_string(), data_type.clone(), true));
            self.columns.push(reference.clone());
            self.columns.len() - 1
        });
        let text = match relation {
            None => quote(name),
            Some(relation) => format!("{}.{}", quote(relation), quote(name)),
        };
        let expr = Arc::new(Column::new(&reference.to_string(), index));
        Some(Typed { expr, data_type, span, text, literal: None })
    }

    // The walk.

    pub fn lower(&mut self, tree: &Expr) -> Lowered {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.error(
                ErrorKind::Limit,
                format!("the expression is nested more than {DEPTH_MAX} deep"),
                self.here,
                None,
            ));
        }
        let lowered = self.lower_node(tree);
        self.depth -= 1;
        lowered
    }

    fn lower_node(&mut self, tree: &Expr) -> Lowered {
        match tree {
            Expr::Nested(inner) => self.lower(inner),
            Expr::Identifier(ident) => self.lower_name(std::slice::from_ref(ident)),
            Expr::CompoundIdentifier(idents) => self.lower_name(idents),
            Expr::CompoundFieldAccess { root, access_chain } => self.lower_access(root, access_chain),
            Expr::Value(value) => self.lower_value(value),
            Expr::TypedString(typed) => self.lower_typed_string(&typed.data_type, &typed.value),
            Expr::Interval(interval) => {
                self.lower_interval(&interval.value, interval.leading_field.as_ref(), interval.last_field.is_some())
            }
            Expr::UnaryOp { op, expr } => self.lower_unary(*op, expr),
            Expr::BinaryOp { left, op: op @ (BinaryOperator::And | BinaryOperator::Or), right } => {
                self.lower_connective(left, op, right)
            }
            Expr::BinaryOp { left, op, right } => self.lower_binary(left, op, right),
            Expr::IsNull(x) => {
                let x = self.lower(x)?;
                let expr = is_null(x.expr.clone()).map_err(|e| self.internal(&e, x.span))?;
                Ok(Typed {
                    expr,
                    data_type: ArrowType::Boolean,
                    text: format!("({} is null)", x.text),
                    literal: None,
                    span: x.span,
                })
            }
            Expr::IsNotNull(x) => {
                let x = self.lower(x)?;
                let expr = is_not_null(x.expr.clone()).map_err(|e| self.internal(&e, x.span))?;
                Ok(Typed {
                    expr,
                    data_type: ArrowType::Boolean,
                    text: format!("({} is not null)", x.text),
                    literal: None,
                    span: x.span,
                })
            }
            Expr::IsTrue(x) => self.lower_is(x, Some(true), Operator::IsNotDistinctFrom, "is true"),
            Expr::IsNotTrue(x) => self.lower_is(x, Some(true), Operator::IsDistinctFrom, "is not true"),
            Expr::IsFalse(x) => self.lower_is(x, Some(false), Operator::IsNotDistinctFrom, "is false"),
            Expr::IsNotFalse(x) => self.lower_is(x, Some(false), Operator::IsDistinctFrom, "is not false"),
            Expr::IsUnknown(x) => self.lower_is(x, None, Operator::IsNotDistinctFrom, "is unknown"),
            Expr::IsNotUnknown(x) => self.lower_is(x, None, Operator::IsDistinctFrom, "is not unknown"),
            Expr::IsDistinctFrom(l, r) => {
                let (l, r) = (self.lower(l)?, self.lower(r)?);
                let text = format!("({} is distinct from {})", l.text, r.text);
                self.comparison(l, Operator::IsDistinctFrom, r, text)
            }
            Expr::IsNotDistinctFrom(l, r) => {
                let (l, r) = (self.lower(l)?, self.lower(r)?);
                let text = format!("({} is not distinct from {})", l.text, r.text);
                self.comparison(l, Operator::IsNotDistinctFrom, r, text)
            }
            Expr::Between { expr, negated, low, high } => self.lower_between(expr, *negated, low, high),
            Expr::InList { expr, list, negated } => self.lower_in_list(expr, list, *negated),
            Expr::Like { negated, any: false, expr, pattern, escape_char: None } => {
                self.lower_like(expr, pattern, *negated, false)
            }
            Expr::ILike { negated, any: false, expr, pattern, escape_char: None } => {
                self.lower_like(expr, pattern, *negated, true)
            }
            Expr::Like { .. } | Expr::ILike { .. } => {
                Err(self.refused("LIKE with ANY or ESCAPE is not allowed", Some("a backslash escapes % and _")))
            }
            // Every cast is total, so CAST, TRY_CAST and `::` mean the same.
            Expr::Cast { expr, data_type, array: false, format: None, .. } => {
                let x = self.lower(expr)?;
                self.lower_cast(x, data_type)
            }
            Expr::Case { operand, conditions, else_result, .. } => {
                self.lower_case(operand.as_deref(), conditions, else_result.as_deref())
            }
            Expr::Extract { field, expr, .. } => {
                let field = self.field_name(field);
                self.lower_date_part(&field, expr)
            }
            Expr::Ceil { expr, field: CeilFloorKind::DateTimeField(DateTimeField::NoDateTime) } => {
                self.function("ceil", &[expr])
            }
            Expr::Floor { expr, field: CeilFloorKind::DateTimeField(DateTimeField::NoDateTime) } => {
                self.function("floor", &[expr])
            }
            Expr::Position { expr, r#in } => self.function("strpos", &[r#in, expr]),
            Expr::Substring { expr, substring_from, substring_for, .. } => {
                let one = Expr::value(SqlValue::Number("1".to_string(), false));
                let mut arguments = vec![&**expr, substring_from.as_deref().unwrap_or(&one)];
                arguments.extend(substring_for.as_deref());
                self.function("substr", &arguments)
            }
            Expr::Trim { trim_where, trim_what, expr, trim_characters } => {
                let name = match trim_where {
                    None | Some(TrimWhereField::Both) => "trim",
                    Some(TrimWhereField::Leading) => "ltrim",
                    Some(TrimWhereField::Trailing) => "rtrim",
                };
                let mut arguments = vec![&**expr];
                arguments.extend(trim_what.as_deref());
                arguments.extend(trim_characters.iter().flatten());
                self.function(name, &arguments)
            }
            Expr::Function(function) => self.lower_function(function),
            Expr::AtTimeZone { .. } => {
                Err(self.refused("AT TIME ZONE is not allowed", Some("write local(timestamp, 'zone')")))
            }
            Expr::Exists { .. } | Expr::Subquery(_) | Expr::InSubquery { .. } => Err(self.refused(
                "an expression cannot contain a subquery",
                Some("join by making the other table a view and an input"),
            )),
            Expr::Wildcard(_) | Expr::QualifiedWildcard(..) => {
                Err(self.refused("an expression cannot contain a wildcard", None))
            }
            Expr::Array(_) => Err(self.refused("a list may only be written as the edges of bucketize", None)),
            Expr::Tuple(_) => Err(self.refused("a row of values cannot be used here", None)),
            _ => Err(self.refused("this SQL is not allowed in an expression", None)),
        }
    }

    fn internal(&self, error: &dyn std::fmt::Display, span: (usize, usize)) -> ExpressionError {
        self.type_error(lower_first(&error.to_string()), span, None)
    }

    fn lower_name(&mut self, idents: &[Ident]) -> Lowered {
        let spans: Vec<(usize, usize)> = idents.iter().map(|ident| self.place(ident.span)).collect();
        let whole = spans.iter().copied().reduce(join).unwrap_or(self.here);
        let names: Vec<&str> = idents.iter().map(|ident| ident.value.as_str()).collect();
        // `column`, `relation.column`, and either followed by fields of a struct.
        let hidden = |name: &str| name == super::AT_COLUMN || name == super::EVENT_TIME_COLUMN;
        let qualified = match names.as_slice() {
            [_, name, ..] if hidden(name) => None,
            [relation, name, ..] => self.column(Some(relation), name, join(spans[0], spans[1])).map(|x| (x, 2)),
            _ => None,
        };
        let found = match qualified {
            Some(found) => Some(found),
            None if hidden(names[0]) => None,
            None => self.column(None, names[0], spans[0]).map(|x| (x, 1)),
        };
        let Some((mut typed, used)) = found else {
            return self.undeclared(&names, whole).ok_or_else(|| self.unknown_column(&names, &spans, whole));
        };
        for (name, span) in names.iter().zip(&spans).skip(used) {
            typed = self.lower_field(typed, name, *span)?;
        }
        Ok(typed)
    }

    /// The null that a name stands for where names need no declaration.
    fn undeclared(&mut self, names: &[&str], span: (usize, usize)) -> Option<Typed> {
        let is_hidden = |name: &&str| *name == super::AT_COLUMN || *name == super::EVENT_TIME_COLUMN;
        if self.environment.undeclared == Undeclared::Mistake || names.iter().any(is_hidden) {
            return None;
        }
        let (relation, name, text) = match names {
            [name] => (None, *name, quote(name)),
            [relation, name] => (Some((*relation).to_string()), *name, format!("{}.{}", quote(relation), quote(name))),
            _ => return None,
        };
        let reference = ColumnRef { relation, name: name.to_string() };
        if !self.undeclared.contains(&reference) {
            self.undeclared.push(reference);
        }
        Some(self.literal(ScalarValue::Null, span, text))
    }

    fn unknown_column(&self, names: &[&str], spans: &[(usize, usize)], whole: (usize, usize)) -> ExpressionError {
        let columns = || {
            let hidden = |name: &str| name == super::AT_COLUMN || name == super::EVENT_TIME_COLUMN;
            self.environment.columns.keys().filter(move |(_, name)| !hidden(name))
        };
        let unknown = |message: String, span, help| self.error(ErrorKind::UnknownColumn, message, span, help);
        if let [relation, name, ..] = names {
            let known: Vec<&str> =
                columns().filter(|(r, _)| r.as_deref() == Some(relation)).map(|(_, n)| n.as_str()).collect();
            if !known.is_empty() {
                let help = nearest(name, known.iter().copied()).map(|near| format!("did you mean `{near}`?"));
                let help = help.or_else(|| (known.len() <= 12).then(|| format!("`{relation}` has {}", list(&known))));
                return unknown(format!("`{relation}` has no column `{name}`"), spans[1], help);
            }
            let mut relations: Vec<&str> = columns().filter_map(|(r, _)| r.as_deref()).collect();
            relations.dedup();
            let help = nearest(relation, relations.iter().copied()).map(|near| format!("did you mean `{near}`?"));
            let help = help.or_else(|| {
                if relations.is_empty() {
                    Some("columns are named without a view here".to_string())
                } else {
                    Some(format!("the inputs are {}", list(&relations)))
                }
            });
            return unknown(format!("no input `{relation}`"), spans[0], help);
        }
        let name = names[0];
        let qualified: Vec<String> = columns()
            .filter(|(r, n)| r.is_some() && n == name)
            .map(|(r, n)| format!("{}.{n}", r.as_deref().unwrap_or("")))
            .collect();
        if let [one] = qualified.as_slice() {
            return unknown(format!("no column `{name}`"), whole, Some(format!("did you mean `{one}`?")));
        }
        if !qualified.is_empty() {
            let all: Vec<&str> = qualified.iter().map(String::as_str).collect();
            return unknown(format!("no column `{name}`"), whole, Some(format!("say which: {}", list(&all))));
        }
        let near =
            nearest(name, columns().map(|(_, n)| n.as_str())).and_then(|near| columns().find(|(_, n)| n == near));
        let help = near.map(|(relation, near)| match relation {
            None => format!("did you mean `{near}`?"),
            Some(relation) => format!("did you mean `{relation}.{near}`?"),
        });
        unknown(format!("no column `{name}`"), whole, help)
    }

    fn lower_field(&mut self, of: Typed, name: &str, span: (usize, usize)) -> Lowered {
        let Some((body, output)) = vector::field(&of.data_type, name) else {
            let help = match &of.data_type {
                ArrowType::Struct(fields) => nearest(name, fields.iter().map(|field| field.name().as_str()))
                    .map(|near| format!("did you mean `{near}`?")),
                _ => None,
            };
            let message = format!("{} has no field `{name}`", name_of(&of.data_type));
            return Err(self.error(ErrorKind::UnknownColumn, message, span, help));
        };
        let (whole, text) = (join(of.span, span), format!("{}.{}", of.text, quote(name)));
        self.call(&format!("field_{name}"), body, &[of], output, whole, text)
    }

    fn lower_access(&mut self, root: &Expr, chain: &[AccessExpr]) -> Lowered {
        // The parser puts `a.b[1]` into the chain from `a` on: names before the first subscript are one name.
        let mut names: Vec<Ident> = match root {
            Expr::Identifier(ident) => vec![ident.clone()],
            Expr::CompoundIdentifier(idents) => idents.clone(),
            _ => Vec::new(),
        };
        let mut chain = chain;
        if !names.is_empty() {
            while let [AccessExpr::Dot(Expr::Identifier(ident)), rest @ ..] = chain {
                names.push(ident.clone());
                chain = rest;
            }
        }
        let mut typed = if names.is_empty() { self.lower(root)? } else { self.lower_name(&names)? };
        for access in chain {
            typed = match access {
                AccessExpr::Dot(Expr::Identifier(ident)) => {
                    let span = self.place(ident.span);
                    self.lower_field(typed, &ident.value, span)?
                }
                AccessExpr::Subscript(Subscript::Index { index }) => {
                    let index = self.lower(index)?;
                    let wanted = match typed.data_type {
                        ArrowType::Map(..) => ArrowType::Utf8,
                        _ => ArrowType::Int64,
                    };
                    let Some((body, output)) = vector::element(&typed.data_type) else {
                        let message = format!("{} has no elements", name_of(&typed.data_type));
                        return Err(self.type_error(message, typed.span, None));
                    };
                    if !(index.data_type == wanted || index.data_type == ArrowType::Int32 && wanted == ArrowType::Int64)
                    {
                        let message = format!(
                            "{} is indexed by {}, not {}",
                            name_of(&typed.data_type),
                            name_of(&wanted),
                            name_of(&index.data_type)
                        );
                        return Err(self.type_error(message, index.span, None));
                    }
                    let index = self.cast(index, &wanted)?;
                    let (span, text) = (join(typed.span, index.span), format!("{}[{}]", typed.text, index.text));
                    self.call("element", body, &[typed, index], output, span, text)?
                }
                _ => return Err(self.refused("slices are not allowed in an expression", None)),
            };
        }
        Ok(typed)
    }

    fn lower_value(&mut self, value: &ValueWithSpan) -> Lowered {
        let span = self.place(value.span);
        Ok(match &value.value {
            SqlValue::Number(number, false) => self.number(number, span)?,
            SqlValue::SingleQuotedString(s)
            | SqlValue::EscapedStringLiteral(s)
            | SqlValue::UnicodeStringLiteral(s)
            | SqlValue::NationalStringLiteral(s) => {
                self.literal(ScalarValue::Utf8(Some(s.clone())), span, quote_text(s))
            }
            SqlValue::Boolean(x) => self.literal(ScalarValue::Boolean(Some(*x)), span, x.to_string()),
            SqlValue::Null => self.literal(ScalarValue::Null, span, "null".to_string()),
            SqlValue::Placeholder(name) => {
                return Err(self.refused(format!("an expression has no parameters such as `{name}`"), None));
            }
            other => return Err(self.refused(format!("the literal {other} is not allowed"), None)),
        })
    }

    fn number(&self, number: &str, span: (usize, usize)) -> Lowered {
        if number.contains(['.', 'e', 'E']) {
            let x: f64 = number
                .parse()
                .ok()
                .filter(|x: &f64| x.is_finite())
                .ok_or_else(|| self.type_error(format!("{number} is not a float64"), span, None))?;
            let x = crate::value::canonical_f64(x);
            return Ok(self.literal(ScalarValue::Float64(Some(x)), span, format!("{x:?}")));
        }
        let x: i64 = number.parse().map_err(|_| {
            let help = "write it with a decimal point to make it a float64";
            self.type_error(format!("{number} does not fit into an int64"), span, Some(help.to_string()))
        })?;
        Ok(self.literal(ScalarValue::Int64(Some(x)), span, x.to_string()))
    }

    fn lower_typed_string(&mut self, data_type: &SqlType, value: &ValueWithSpan) -> Lowered {
        let typed = self.lower_value(value)?;
        let to = self.sql_type(data_type)?;
        let (span, text) = (typed.span, format!("cast({} as {})", typed.text, name_of(&to)));
        Ok(Typed { text, span, ..self.meet(typed, &to)? })
    }

    fn lower_interval(&mut self, value: &Expr, unit: Option<&DateTimeField>, range: bool) -> Lowered {
        let value = match value {
            Expr::Value(value) => self.lower_value(value)?,
            _ => return Err(self.refused("an interval must be a constant", Some("write INTERVAL '1 day'"))),
        };
        let amount = match &value.literal {
            Some(ScalarValue::Utf8(Some(text))) => text.clone(),
            Some(ScalarValue::Int64(Some(n))) => n.to_string(),
            _ => return Err(self.refused("an interval must be a constant", Some("write INTERVAL '1 day'"))),
        };
        if range {
            return Err(self.refused("intervals from one unit to another are not allowed", None));
        }
        let text = match unit {
            Some(unit) => format!("{amount} {unit}"),
            None => amount,
        };
        let interval = arrow::compute::kernels::cast_utils::parse_interval_month_day_nano(&text).map_err(|_| {
            let help = "write INTERVAL '1 day' or INTERVAL '2 hours 30 minutes'".to_string();
            self.type_error(format!("`{text}` is not an interval"), value.span, Some(help))
        })?;
        let text = format!("interval '{} months {} days {} ns'", interval.months, interval.days, interval.nanoseconds);
        Ok(self.literal(ScalarValue::IntervalMonthDayNano(Some(interval)), value.span, text))
    }

    fn lower_unary(&mut self, op: UnaryOperator, expr: &Expr) -> Lowered {
        match op {
            UnaryOperator::Not => {
                let x = self.lower(expr)?;
                let x = self.boolean(x, "NOT")?;
                let text = format!("(not {})", x.text);
                let expr = not(x.expr).map_err(|e| self.internal(&e, x.span))?;
                Ok(Typed { expr, data_type: ArrowType::Boolean, span: x.span, text, literal: None })
            }
            UnaryOperator::Minus => {
                // The smallest integer has no positive twin, so a sign belongs to its number.
                if let Expr::Value(ValueWithSpan { value: SqlValue::Number(number, false), span }) = expr {
                    let (start, end) = self.place(*span);
                    let sign = self.source[..start].trim_end().len().saturating_sub(1);
                    return self.number(&format!("-{number}"), (sign, end));
                }
                let x = self.lower(expr)?;
                let Some(body) = arithmetic::negate(&x.data_type) else {
                    if x.data_type == ArrowType::Null {
                        return Ok(x);
                    }
                    return Err(self.type_error(format!("cannot negate {}", name_of(&x.data_type)), x.span, None));
                };
                let (output, span, text) = (x.data_type.clone(), x.span, format!("(-{})", x.text));
                self.call("negate", body, &[x], output, span, text)
            }
            UnaryOperator::Plus => {
                let x = self.lower(expr)?;
                if !is_number(&x.data_type) && x.data_type != ArrowType::Null {
                    return Err(self.type_error(format!("{} has no sign", name_of(&x.data_type)), x.span, None));
                }
                Ok(x)
            }
            other => Err(self.refused(format!("the operator {other} is not allowed"), None)),
        }
    }

    /// AND and OR are associative: a chain becomes a balanced tree, however long it is.
    fn lower_connective(&mut self, left: &Expr, op: &BinaryOperator, right: &Expr) -> Lowered {
        let (operator, name) = match op {
            BinaryOperator::And => (Operator::And, "AND"),
            _ => (Operator::Or, "OR"),
        };
        let mut terms = vec![right];
        let mut rest = left;
        loop {
            match rest {
                Expr::BinaryOp { left, op: inner, right } if inner == op => {
                    terms.push(right);
                    rest = left;
                }
                first => {
                    terms.push(first);
                    break;
                }
            }
        }
        let mut nodes = Vec::with_capacity(terms.len());
        for term in terms.into_iter().rev() {
            let typed = self.lower(term)?;
            nodes.push(self.boolean(typed, name)?);
        }
        let texts: Vec<&str> = nodes.iter().map(|node| node.text.as_str()).collect();
        let text = format!("({})", texts.join(&format!(" {} ", name.to_lowercase())));
        while nodes.len() > 1 {
            let mut next = Vec::with_capacity(nodes.len().div_ceil(2));
            let mut pairs = nodes.into_iter();
            while let Some(left) = pairs.next() {
                next.push(match pairs.next() {
                    Some(right) => self.binary(left, operator, right, ArrowType::Boolean, String::new()),
                    None => left,
                });
            }
            nodes = next;
        }
        nodes.pop().map(|node| Typed { text, ..node }).ok_or_else(|| self.refused("an empty condition", None))
    }

    fn lower_binary(&mut self, left: &Expr, op: &BinaryOperator, right: &Expr) -> Lowered {
        let (l, r) = (self.lower(left)?, self.lower(right)?);
        let operation = match op {
            BinaryOperator::Plus => Operation::Add,
            BinaryOperator::Minus => Operation::Subtract,
            BinaryOperator::Multiply => Operation::Multiply,
            BinaryOperator::Divide => Operation::Divide,
            BinaryOperator::Modulo => Operation::Modulo,
            BinaryOperator::StringConcat => {
                let arguments = [self.text_argument(l, "||")?, self.text_argument(r, "||")?];
                let span = join(arguments[0].span, arguments[1].span);
                let text = format!("({} || {})", arguments[0].text, arguments[1].text);
                let body = text::function("||").ok_or_else(|| self.refused("|| is not allowed", None))?;
                return self.call("||", body, &arguments, ArrowType::Utf8, span, text);
            }
            BinaryOperator::Eq
            | BinaryOperator::NotEq
            | BinaryOperator::Lt
            | BinaryOperator::LtEq
            | BinaryOperator::Gt
            | BinaryOperator::GtEq => {
                let (operator, symbol) = match op {
                    BinaryOperator::Eq => (Operator::Eq, "="),
                    BinaryOperator::NotEq => (Operator::NotEq, "<>"),
                    BinaryOperator::Lt => (Operator::Lt, "<"),
                    BinaryOperator::LtEq => (Operator::LtEq, "<="),
                    BinaryOperator::Gt => (Operator::Gt, ">"),
                    _ => (Operator::GtEq, ">="),
                };
                let text = format!("({} {symbol} {})", l.text, r.text);
                return self.comparison(l, operator, r, text);
            }
            other => return Err(self.refused(format!("the operator {other} is not allowed"), None)),
        };
        self.arithmetic(operation, l, r)
    }

    pub fn arithmetic(&mut self, operation: Operation, l: Typed, r: Typed) -> Lowered {
        let span = join(l.span, r.span);
        let text = format!("({} {} {})", l.text, operation.symbol(), r.text);
        let refuse = |this: &Self, l: &Typed, r: &Typed| {
            let (a, b) = (name_of(&l.data_type), name_of(&r.data_type));
            let message = match operation {
                Operation::Add => format!("cannot add {a} and {b}"),
                Operation::Subtract => format!("cannot subtract {b} from {a}"),
                Operation::Multiply => format!("cannot multiply {a} by {b}"),
                Operation::Divide => format!("cannot divide {a} by {b}"),
                Operation::Modulo => format!("cannot take {a} modulo {b}"),
            };
            let help = match (&l.data_type, &r.data_type) {
                (ArrowType::Utf8, ArrowType::Utf8) if operation == Operation::Add => {
                    Some("|| joins strings".to_string())
                }
                (ArrowType::Utf8, number) | (number, ArrowType::Utf8) if is_number(number) => {
                    Some(format!("CAST(... AS {}) makes a number of a string", name_of(number)))
                }
                _ => None,
            };
            this.type_error(message, span, help)
        };
        // A null takes the other's type; two nulls are integers.
        let (l, r) = match (&l.data_type, &r.data_type) {
            (ArrowType::Null, ArrowType::Null) => (self.cast(l, &ArrowType::Int64)?, self.cast(r, &ArrowType::Int64)?),
            (ArrowType::Null, t) if is_number(t) => (self.cast(l, &t.clone())?, r),
            (t, ArrowType::Null) if is_number(t) => {
                let t = t.clone();
                (l, self.cast(r, &t)?)
            }
            _ => (l, r),
        };
        if is_number(&l.data_type) && is_number(&r.data_type) {
            let decimals = matches!(common_number(&l.data_type, &r.data_type), Some(ArrowType::Decimal128(..)));
            let (left_type, right_type) = if decimals {
                let operator = match operation {
                    Operation::Add => Operator::Plus,
                    Operation::Subtract => Operator::Minus,
                    Operation::Multiply => Operator::Multiply,
                    Operation::Divide => Operator::Divide,
                    Operation::Modulo => Operator::Modulo,
                };
                BinaryTypeCoercer::new(&l.data_type, &operator, &r.data_type)
                    .get_input_types()
                    .map_err(|_| refuse(self, &l, &r))?
            } else {
                let common = common_number(&l.data_type, &r.data_type).ok_or_else(|| refuse(self, &l, &r))?;
                (common.clone(), common)
            };
            let (body, output) =
                arithmetic::operation(operation, &left_type, &right_type).ok_or_else(|| refuse(self, &l, &r))?;
            let arguments = [self.cast(l, &left_type)?, self.cast(r, &right_type)?];
            return self.call(operation.symbol(), body, &arguments, output, span, text);
        }
        // Times. An interval stands on the right, where adding it means the same.
        let (l, r) = match (&l.data_type, operation) {
            (ArrowType::Interval(_) | ArrowType::Duration(_) | ArrowType::Int64 | ArrowType::Int32, Operation::Add)
                if is_time(&r.data_type) =>
            {
                (r, l)
            }
            _ => (l, r),
        };
        let (l, r) = match (&l.data_type, &r.data_type) {
            // A day plus hours is a time of day.
            (ArrowType::Date32, ArrowType::Interval(IntervalUnit::MonthDayNano) | ArrowType::Duration(_)) => {
                (self.cast(l, &utc())?, r)
            }
            (ArrowType::Date32, ArrowType::Timestamp(..)) => {
                let to = r.data_type.clone();
                (self.cast(l, &to)?, r)
            }
            (ArrowType::Timestamp(..), ArrowType::Date32) => {
                let to = l.data_type.clone();
                (l, self.cast(r, &to)?)
            }
            (ArrowType::Duration(_), ArrowType::Interval(_)) => (l, self.interval_as_duration(r)?),
            (ArrowType::Timestamp(..), ArrowType::Null) => {
                (l, self.cast(r, &ArrowType::Duration(TimeUnit::Microsecond))?)
            }
            _ => (l, r),
        };
        match time::operation(operation, &l.data_type, &r.data_type) {
            Some((body, output)) => self.call(operation.symbol(), body, &[l, r], output, span, text),
            None => Err(refuse(self, &l, &r)),
        }
    }

    fn lower_is(&mut self, x: &Expr, value: Option<bool>, operator: Operator, suffix: &str) -> Lowered {
        let x = self.lower(x)?;
        let x = self.boolean(x, &suffix.to_uppercase())?;
        let text = format!("({} {suffix})", x.text);
        let value = self.literal(ScalarValue::Boolean(value), x.span, String::new());
        Ok(self.binary(x, operator, value, ArrowType::Boolean, text))
    }

    fn lower_between(&mut self, x: &Expr, negated: bool, low: &Expr, high: &Expr) -> Lowered {
        let (x, low, high) = (self.lower(x)?, self.lower(low)?, self.lower(high)?);
        let text = format!("({} {}between {} and {})", x.text, if negated { "not " } else { "" }, low.text, high.text);
        let (above, below, both) = if negated {
            (Operator::Lt, Operator::Gt, Operator::Or)
        } else {
            (Operator::GtEq, Operator::LtEq, Operator::And)
        };
        let above = self.comparison(x.clone(), above, low, String::new())?;
        let below = self.comparison(x, below, high, String::new())?;
        Ok(self.binary(above, both, below, ArrowType::Boolean, text))
    }

    fn lower_in_list(&mut self, x: &Expr, list: &[Expr], negated: bool) -> Lowered {
        let mut all = vec![self.lower(x)?];
        for item in list {
            all.push(self.lower(item)?);
        }
        let texts: Vec<&str> = all[1..].iter().map(|item| item.text.as_str()).collect();
        let text = format!("({} {}in ({}))", all[0].text, if negated { "not " } else { "" }, texts.join(", "));
        let span = all.iter().map(|item| item.span).reduce(join).unwrap_or(self.here);
        let mut all = self.unify(all, "compare", "with")?.into_iter();
        let Some(x) = all.next() else { return Err(self.refused("IN needs a value", None)) };
        let items: Vec<Typed> = all.collect();
        if items.is_empty() {
            return Err(self.error(ErrorKind::Argument, "IN needs at least one value", span, None));
        }
        let scalar = !matches!(
            x.data_type,
            ArrowType::List(_) | ArrowType::Map(..) | ArrowType::Struct(_) | ArrowType::FixedSizeList(..)
        );
        if !scalar {
            return Err(self.type_error(format!("cannot compare {} values", name_of(&x.data_type)), x.span, None));
        }
        if x.data_type == ArrowType::Null {
            return Ok(self.literal(ScalarValue::Boolean(None), span, text));
        }
        let items = items.into_iter().map(|item| item.expr).collect();
        let expr = in_list(x.expr, items, &negated, &self.schema()).map_err(|e| self.internal(&e, span))?;
        Ok(Typed { expr, data_type: ArrowType::Boolean, span, text, literal: None })
    }

    fn lower_like(&mut self, x: &Expr, pattern: &Expr, negated: bool, ignore_case: bool) -> Lowered {
        let name = if ignore_case { "ILIKE" } else { "LIKE" };
        let (x, pattern) = (self.lower(x)?, self.lower(pattern)?);
        let arguments = [self.text_argument(x, name)?, self.text_argument(pattern, name)?];
        let operator = format!("{}{}", if negated { "not " } else { "" }, name.to_lowercase());
        let text = format!("({} {operator} {})", arguments[0].text, arguments[1].text);
        let span = join(arguments[0].span, arguments[1].span);
        self.call(&operator, text::like(negated, ignore_case), &arguments, ArrowType::Boolean, span, text)
    }

    pub fn text_argument(&self, typed: Typed, of: &str) -> Lowered {
        match typed.data_type {
            ArrowType::Utf8 | ArrowType::Null => self.cast(typed, &ArrowType::Utf8),
            ref other => Err(self.type_error(
                format!("{of} needs a string, not {}", name_of(other)),
                typed.span,
                Some("CAST(... AS string) makes a string of it".to_string()),
            )),
        }
    }

    fn lower_cast(&mut self, typed: Typed, data_type: &SqlType) -> Lowered {
        let to = self.sql_type(data_type)?;
        let (span, text) = (typed.span, format!("cast({} as {})", typed.text, name_of(&to)));
        Ok(Typed { text, span, ..self.cast(typed, &to)? })
    }

    /// Our type names first, then SQL's.
    fn sql_type(&self, data_type: &SqlType) -> Result<ArrowType, ExpressionError> {
        let written = data_type.to_string().to_lowercase();
        let known = Type::parse(&written.replace(' ', "")).ok().or_else(|| {
            Some(match written.as_str() {
                "boolean" => Type::Bool,
                "smallint" | "tinyint" | "int" | "integer" | "int4" | "int2" => Type::Int32,
                "bigint" | "int8" => Type::Int64,
                "real" | "float4" => Type::Float32,
                "float" | "float8" | "double" | "double precision" => Type::Float64,
                "text" | "varchar" | "char varying" | "character varying" => Type::String,
                "bytea" | "blob" | "varbinary" | "bytes" => Type::Binary,
                "datetime" | "timestamptz" | "timestamp with time zone" | "timestamp without time zone" => {
                    Type::Timestamp
                }
                other => {
                    let decimal = other.strip_prefix("numeric").or_else(|| other.strip_prefix("dec"))?;
                    return Type::parse(&format!("decimal{}", decimal.replace(' ', ""))).ok();
                }
            })
        });
        known.map(|t| t.arrow()).ok_or_else(|| {
            let near = Type::parse(&written).err().and_then(|e| e.nearest);
            let help = near.map(|near| format!("did you mean `{near}`?"));
            self.type_error(format!("`{written}` is not a type"), self.here, help)
        })
    }

    fn lower_case(&mut self, operand: Option<&Expr>, whens: &[CaseWhen], otherwise: Option<&Expr>) -> Lowered {
        let operand = operand.map(|x| self.lower(x)).transpose()?;
        let mut conditions = Vec::with_capacity(whens.len());
        let mut results = Vec::with_capacity(whens.len() + 1);
        let mut text = "(case".to_string();
        let start = self.here;
        for when in whens {
            let condition = self.lower(&when.condition)?;
            let condition = match &operand {
                None => self.boolean(condition, "WHEN")?,
                Some(operand) => {
                    let text = format!("({} = {})", operand.text, condition.text);
                    self.comparison(operand.clone(), Operator::Eq, condition, text)?
                }
            };
            let result = self.lower(&when.result)?;
            text += &format!(" when {} then {}", condition.text, result.text);
            conditions.push(condition);
            results.push(result);
        }
        if let Some(otherwise) = otherwise {
            let result = self.lower(otherwise)?;
            text += &format!(" else {}", result.text);
            results.push(result);
        }
        text += " end)";
        let span = conditions.iter().chain(&results).map(|x| x.span).reduce(join).unwrap_or(start);
        let results = self.unify(results, "return both", "and")?;
        let data_type = results[0].data_type.clone();
        if data_type == ArrowType::Null {
            return Ok(self.literal(ScalarValue::Null, span, text));
        }
        let mut results = results.into_iter().map(|result| result.expr);
        let mut parts = Vec::with_capacity(2 * conditions.len() + 1);
        for (condition, result) in conditions.into_iter().zip(results.by_ref()) {
            parts.extend([condition.expr, result]);
        }
        parts.extend(results);
        let expr = Choose::new(parts, data_type.clone()).map_err(|e| self.internal(&e, span))?;
        let expr: Arc<dyn PhysicalExpr> = Arc::new(expr);
        Ok(Typed { expr, data_type, span, text, literal: None })
    }

    fn field_name(&mut self, field: &DateTimeField) -> String {
        if let DateTimeField::Custom(ident) = field {
            self.place(ident.span);
        }
        field.to_string().trim_matches('\'').to_lowercase()
    }

    // The declared type.

    fn declare(&self, typed: Typed, declared: Option<&Type>) -> Lowered {
        let Some(declared) = declared else {
            // A wall clock is kept as the timestamp it reads like.
            return if typed.data_type == LOCAL { self.cast(typed, &utc()) } else { Ok(typed) };
        };
        use ArrowType::*;
        let to = declared.arrow();
        let converts = match (&typed.data_type, &to) {
            (from, to) if from == to => true,
            (Null, _) => true,
            (Int32, Int64) | (Int32 | Int64, Float32 | Float64) | (Float32 | Float64, Float32 | Float64) => true,
            (Int32 | Int64, Decimal128(..)) | (Decimal128(..), Float64) => true,
            (Decimal128(p, s), Decimal128(q, t)) => {
                s <= t && i16::from(*p) - i16::from(*s) <= i16::from(*q) - i16::from(*t)
            }
            (Date32, Timestamp(..)) => true,
            (Timestamp(_, None), Timestamp(..)) => true,
            _ => false,
        };
        if converts {
            return self.cast(typed, &to);
        }
        let message =
            format!("the expression is {}, but the feature is declared {declared}", name_of(&typed.data_type));
        let help = match convert::cast(&typed.data_type, &to) {
            Ok(_) => Some(format!("CAST(... AS {declared}) converts it; what does not fit becomes null")),
            Err(advice) => (!advice.is_empty()).then(|| advice.to_string()),
        };
        Err(self.type_error(message, typed.span, help))
    }
}

pub(super) fn join(a: (usize, usize), b: (usize, usize)) -> (usize, usize) {
    (a.0.min(b.0), a.1.max(b.1))
}

pub(super) fn quote_text(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// An identifier, quoted so that no other identifier looks the same.
pub(super) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

pub(super) fn list(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}

fn lower_first(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| first.to_lowercase().chain(characters).collect())
}
