//! The functions an expression may call: what they are named, what they take, and how each is typed.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;

use arrow::array::*;
use arrow::compute::kernels::{cmp, zip::zip};
use arrow::compute::{is_not_null, is_null, or_kleene};
use arrow::datatypes::{DataType as ArrowType, Float64Type};
use chrono_tz::Tz;
use datafusion_common::ScalarValue;
use datafusion_sql::sqlparser::ast::{Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments};

use super::arithmetic::{self, Operation};
use super::call::{Argument, Body};
use super::lower::{Lowered, Lowering, Typed, join, list, name_of, nearest, quote_text, utc};
use super::lower::{is_integer, is_number};
use super::{AT_COLUMN, EVENT_TIME_COLUMN, ErrorKind, ExpressionError, text, time, vector};
use crate::value::{Type, Value, encode, hash};

/// Name, usage, and the least and greatest number of arguments.
type Entry = (&'static str, &'static str, usize, usize);

const MANY: usize = usize::MAX;

#[rustfmt::skip]
const FUNCTIONS: &[Entry] = &[
    // Ours.
    ("vocab", "vocab(x, 'name')", 2, 2),
    ("hash_bucket", "hash_bucket(x, n)", 2, 2),
    ("bucketize", "bucketize(x, [edges])", 2, 2),
    ("at", "at()", 0, 0),
    ("event_time", "event_time(view)", 1, 1),
    ("age", "age(view)", 1, 1),
    ("local", "local(timestamp, 'zone')", 2, 2),
    ("dot", "dot(a, b)", 2, 2),
    ("norm", "norm(a)", 1, 1),
    ("cosine", "cosine(a, b)", 2, 2),
    // Choosing.
    ("coalesce", "coalesce(x, ...)", 1, MANY),
    ("nullif", "nullif(x, y)", 2, 2),
    ("greatest", "greatest(x, ...)", 1, MANY),
    ("least", "least(x, ...)", 1, MANY),
    // Numbers.
    ("abs", "abs(x)", 1, 1),
    ("ceil", "ceil(x)", 1, 1),
    ("floor", "floor(x)", 1, 1),
    ("round", "round(x) or round(x, places)", 1, 2),
    ("trunc", "trunc(x) or trunc(x, places)", 1, 2),
    ("sign", "sign(x)", 1, 1),
    ("sqrt", "sqrt(x)", 1, 1),
    ("cbrt", "cbrt(x)", 1, 1),
    ("isnan", "isnan(x)", 1, 1),
    ("mod", "mod(x, y)", 2, 2),
    ("pi", "pi()", 0, 0),
    ("exp", "exp(x)", 1, 1),
    ("ln", "ln(x)", 1, 1),
    ("log", "log(x) or log(base, x)", 1, 2),
    ("log2", "log2(x)", 1, 1),
    ("log10", "log10(x)", 1, 1),
    ("power", "power(x, y)", 2, 2),
    ("sin", "sin(x)", 1, 1),
    ("cos", "cos(x)", 1, 1),
    ("tan", "tan(x)", 1, 1),
    ("asin", "asin(x)", 1, 1),
    ("acos", "acos(x)", 1, 1),
    ("atan", "atan(x)", 1, 1),
    ("atan2", "atan2(y, x)", 2, 2),
    ("sinh", "sinh(x)", 1, 1),
    ("cosh", "cosh(x)", 1, 1),
    ("tanh", "tanh(x)", 1, 1),
    ("degrees", "degrees(x)", 1, 1),
    ("radians", "radians(x)", 1, 1),
    // Strings.
    ("lower", "lower(s)", 1, 1),
    ("upper", "upper(s)", 1, 1),
    ("trim", "trim(s) or trim(s, characters)", 1, 2),
    ("ltrim", "ltrim(s) or ltrim(s, characters)", 1, 2),
    ("rtrim", "rtrim(s) or rtrim(s, characters)", 1, 2),
    ("length", "length(s)", 1, 1),
    ("octet_length", "octet_length(s)", 1, 1),
    ("substr", "substr(s, start) or substr(s, start, count)", 2, 3),
    ("concat", "concat(s, ...)", 1, MANY),
    ("starts_with", "starts_with(s, prefix)", 2, 2),
    ("ends_with", "ends_with(s, suffix)", 2, 2),
    ("contains", "contains(s, part)", 2, 2),
    ("replace", "replace(s, from, to)", 3, 3),
    ("split_part", "split_part(s, delimiter, n)", 3, 3),
    ("strpos", "strpos(s, part)", 2, 2),
    ("left", "left(s, n)", 2, 2),
    ("right", "right(s, n)", 2, 2),
    ("lpad", "lpad(s, width) or lpad(s, width, fill)", 2, 3),
    ("rpad", "rpad(s, width) or rpad(s, width, fill)", 2, 3),
    // Times.
    ("date_part", "date_part('field', x)", 2, 2),
    ("date_trunc", "date_trunc('unit', x)", 2, 2),
    ("to_timestamp_seconds", "to_timestamp_seconds(x)", 1, 1),
    ("to_timestamp_millis", "to_timestamp_millis(x)", 1, 1),
    ("to_timestamp_micros", "to_timestamp_micros(x)", 1, 1),
];

/// Other spellings.
const SYNONYMS: &[(&str, &str)] = &[
    ("pow", "power"),
    ("ceiling", "ceil"),
    ("btrim", "trim"),
    ("char_length", "length"),
    ("character_length", "length"),
    ("substring", "substr"),
    ("datepart", "date_part"),
    ("datetrunc", "date_trunc"),
    ("ifnull", "coalesce"),
    ("nvl", "coalesce"),
    ("signum", "sign"),
];

/// Why a known function of SQL is not one here.
fn refusal(name: &str) -> Option<&'static str> {
    Some(match name {
        "now" | "current_timestamp" | "current_date" | "current_time" | "localtime" | "localtimestamp" | "today" => {
            "an expression has no clock; at() is the time that is asked about"
        }
        "random" | "rand" | "uuid" | "gen_random_uuid" => {
            "an expression depends on its inputs only; hash_bucket spreads keys"
        }
        "sum" | "avg" | "mean" | "count" | "stddev" | "variance" | "median" | "array_agg" | "first_value"
        | "last_value" => "aggregates are declared under `aggregates` of a view with windows",
        "max" => {
            "greatest(x, y) takes the largest of its arguments; aggregates are declared under `aggregates` of a view"
        }
        "min" => {
            "least(x, y) takes the smallest of its arguments; aggregates are declared under `aggregates` of a view"
        }
        "row_number" | "rank" | "dense_rank" | "lag" | "lead" | "ntile" => {
            "an expression sees one row; there are no windows over rows"
        }
        _ => return None,
    })
}

impl Lowering<'_> {
    pub(super) fn lower_function(&mut self, function: &Function) -> Lowered {
        let parts: Vec<String> = function
            .name
            .0
            .iter()
            .filter_map(|part| part.as_ident())
            .map(|ident| {
                self.place(ident.span);
                ident.value.to_lowercase()
            })
            .collect();
        let name = parts.join(".");
        let span = match function.name.0.last().and_then(|part| part.as_ident()) {
            Some(ident) => self.place(ident.span),
            None => (0, self.source.len()),
        };
        if let Some(why) = refusal(&name) {
            let message = format!("`{name}` is not allowed in an expression");
            return Err(self.error(ErrorKind::Refused, message, span, Some(why.to_string())));
        }
        if function.over.is_some() || function.filter.is_some() || !function.within_group.is_empty() {
            let message = "an expression cannot contain window or aggregate functions";
            return Err(self.error(ErrorKind::Refused, message, span, None));
        }
        let FunctionArguments::List(arguments) = &function.args else {
            let help = Some(format!("call it as {name}()"));
            return Err(self.error(ErrorKind::Argument, format!("`{name}` needs parentheses"), span, help));
        };
        let mut expressions = Vec::with_capacity(arguments.args.len());
        for argument in &arguments.args {
            match argument {
                FunctionArg::Unnamed(FunctionArgExpr::Expr(expression)) => expressions.push(expression),
                FunctionArg::Unnamed(_) => {
                    return Err(self.error(ErrorKind::Refused, "an expression cannot contain a wildcard", span, None));
                }
                _ => return Err(self.error(ErrorKind::Refused, "arguments have no names here", span, None)),
            }
        }
        if arguments.duplicate_treatment.is_some() || !arguments.clauses.is_empty() || function.null_treatment.is_some()
        {
            let message = format!("`{name}` takes plain arguments only");
            return Err(self.error(ErrorKind::Refused, message, span, None));
        }
        let typed = self.function_at(&name, &expressions, span)?;
        Ok(Typed { span: join(typed.span, span), ..typed })
    }

    /// A function that the grammar has a form of its own for.
    pub(super) fn function(&mut self, name: &str, arguments: &[&Expr]) -> Lowered {
        let whole = (0, self.source.len());
        self.function_at(name, arguments, whole)
    }

    fn function_at(&mut self, written: &str, arguments: &[&Expr], span: (usize, usize)) -> Lowered {
        let name = SYNONYMS.iter().find(|(synonym, _)| *synonym == written).map_or(written, |(_, name)| name);
        let Some((name, usage, least, most)) = FUNCTIONS.iter().copied().find(|(known, ..)| *known == name) else {
            let known = FUNCTIONS.iter().map(|(name, ..)| *name).chain(SYNONYMS.iter().map(|(name, _)| *name));
            let help = nearest(written, known).map(|near| format!("did you mean `{near}`?"));
            return Err(self.error(ErrorKind::UnknownFunction, format!("no function `{written}`"), span, help));
        };
        if !(least..=most).contains(&arguments.len()) {
            let given = match arguments.len() {
                1 => "1 argument".to_string(),
                n => format!("{n} arguments"),
            };
            let message = format!("`{name}` is given {given}");
            return Err(self.error(ErrorKind::Argument, message, span, Some(format!("it is used as {usage}"))));
        }
        match name {
            "at" => self.time_column(None, AT_COLUMN, span),
            "event_time" => {
                let (relation, place) = self.relation(arguments[0], name)?;
                self.time_column(Some(&relation), EVENT_TIME_COLUMN, place)
            }
            "age" => {
                let (relation, place) = self.relation(arguments[0], name)?;
                let at = self.time_column(None, AT_COLUMN, span)?;
                let event_time = self.time_column(Some(&relation), EVENT_TIME_COLUMN, place)?;
                let text = format!("age({})", super::lower::quote(&relation));
                self.call(name, time::seconds_between(), &[at, event_time], ArrowType::Float64, span, text)
            }
            "vocab" => self.vocab(arguments, span),
            "bucketize" => self.bucketize(arguments, span),
            "date_part" => {
                let field = self.constant_text(arguments[0], name, usage)?;
                self.lower_date_part(&field.to_lowercase(), arguments[1])
            }
            "date_trunc" => {
                let unit = self.constant_text(arguments[0], name, usage)?;
                self.date_trunc(&unit.to_lowercase(), arguments[1])
            }
            _ => {
                let arguments = arguments.iter().map(|x| self.lower(x)).collect::<Result<Vec<_>, _>>()?;
                self.typed_function(name, usage, arguments, span)
            }
        }
    }

    /// The functions whose arguments are all values.
    fn typed_function(&mut self, name: &str, usage: &str, arguments: Vec<Typed>, span: (usize, usize)) -> Lowered {
        let span = arguments
            .iter()
            .map(|x| x.span)
            .fold(span, |a, b| if a == (0, self.source.len()) { b } else { join(a, b) });
        let texts: Vec<&str> = arguments.iter().map(|x| x.text.as_str()).collect();
        let text = format!("{name}({})", texts.join(", "));
        match name {
            "pi" => Ok(self.literal(ScalarValue::Float64(Some(std::f64::consts::PI)), span, text)),
            "coalesce" | "greatest" | "least" => self.choose(name, arguments, span, text),
            "nullif" => {
                let all = self.unify(arguments, "compare", "with")?;
                let output = all[0].data_type.clone();
                if output == ArrowType::Null {
                    return Ok(self.literal(ScalarValue::Null, span, text));
                }
                self.orderable(&output, name, span)?;
                let body: Arc<Body> = Arc::new(|a: &[Argument], n| {
                    let (x, y) = (a[0].column(n)?, a[1].column(n)?);
                    arrow::compute::nullif(&x, &cmp::eq(&x, &y)?)
                });
                self.call(name, body, &all, output, span, text)
            }
            "mod" => {
                let [x, y] = pair(arguments);
                Ok(Typed { text, span, ..self.arithmetic(Operation::Modulo, x, y)? })
            }
            "abs" | "sign" | "ceil" | "floor" | "round" | "trunc" if arguments.len() == 1 => {
                let x = self.number_argument(first(arguments), name)?;
                if name != "abs" && name != "sign" && is_integer(&x.data_type) {
                    return Ok(Typed { text, span, ..x });
                }
                let x = match x.data_type {
                    ArrowType::Decimal128(..) if name != "abs" => self.cast(x, &ArrowType::Float64)?,
                    _ => x,
                };
                let output = x.data_type.clone();
                let body =
                    if name == "abs" { arithmetic::absolute(&output) } else { arithmetic::rounding(name, &output) };
                let body = body.ok_or_else(|| self.unfit(name, usage, &x))?;
                self.call(name, body, &[x], output, span, text)
            }
            "round" | "trunc" => {
                let [x, places] = pair(arguments);
                let x = self.number_argument(x, name)?;
                let x = self.cast(x, &ArrowType::Float64)?;
                let places = self.integer_argument(places, name, usage)?;
                self.call(name, arithmetic::at_places(name), &[x, places], ArrowType::Float64, span, text)
            }
            "isnan" => {
                let x = self.number_argument(first(arguments), name)?;
                let x = self.cast(x, &ArrowType::Float64)?;
                self.call(name, arithmetic::is_nan(), &[x], ArrowType::Boolean, span, text)
            }
            "hash_bucket" => self.hash_bucket(arguments, span, text),
            "local" => self.local(arguments, usage, span, text),
            "dot" | "norm" | "cosine" => {
                for (i, x) in arguments.iter().enumerate() {
                    if !matches!(x.data_type, ArrowType::FixedSizeList(..)) {
                        return Err(self.unfit(name, usage, x));
                    }
                    if i > 0 && x.data_type != arguments[0].data_type {
                        let (a, b) = (name_of(&arguments[0].data_type), name_of(&x.data_type));
                        return Err(self.type_error(
                            format!("{name} of {a} and {b}: their lengths differ"),
                            span,
                            None,
                        ));
                    }
                }
                let body = vector::function(name).ok_or_else(|| self.unfit(name, usage, &arguments[0]))?;
                self.call(name, body, &arguments, ArrowType::Float64, span, text)
            }
            "to_timestamp_seconds" | "to_timestamp_millis" | "to_timestamp_micros" => {
                let unit = match name {
                    "to_timestamp_seconds" => 1_000_000,
                    "to_timestamp_millis" => 1_000,
                    _ => 1,
                };
                let x = self.number_argument(first(arguments), name)?;
                let wide = if is_integer(&x.data_type) { ArrowType::Int64 } else { ArrowType::Float64 };
                let x = self.cast(x, &wide)?;
                let body = time::from_epoch(unit, &wide, utc()).ok_or_else(|| self.unfit(name, usage, &x))?;
                self.call(name, body, &[x], utc(), span, text)
            }
            _ => self.plain(name, usage, arguments, span, text),
        }
    }

    /// Functions of float64s and of strings, which convert their arguments and return one type.
    fn plain(&mut self, name: &str, usage: &str, arguments: Vec<Typed>, span: (usize, usize), text: String) -> Lowered {
        let one = arguments.len() == 1;
        let name = if name == "log" && one { "log10" } else { name };
        let body = if one { arithmetic::function1(name).map(arithmetic::body1) } else { None };
        let body = body.or_else(|| arithmetic::function2(name).map(arithmetic::body2));
        if let Some(body) = body {
            let mut numbers = Vec::with_capacity(arguments.len());
            for x in arguments {
                let x = self.number_argument(x, name)?;
                numbers.push(self.cast(x, &ArrowType::Float64)?);
            }
            return self.call(name, body, &numbers, ArrowType::Float64, span, text);
        }
        let Some(body) = text::function(name) else {
            return Err(self.error(ErrorKind::UnknownFunction, format!("no function `{name}`"), span, None));
        };
        // Which arguments are integers; all others are strings.
        let integers: &[usize] = match name {
            "substr" => &[1, 2],
            "left" | "right" | "lpad" | "rpad" => &[1],
            "split_part" => &[2],
            _ => &[],
        };
        let mut converted = Vec::with_capacity(arguments.len());
        for (i, x) in arguments.into_iter().enumerate() {
            converted.push(if integers.contains(&i) {
                self.integer_argument(x, name, usage)?
            } else {
                self.text_argument(x, name)?
            });
        }
        let output = match name {
            "length" | "octet_length" | "strpos" => ArrowType::Int64,
            "starts_with" | "ends_with" | "contains" => ArrowType::Boolean,
            _ => ArrowType::Utf8,
        };
        self.call(name, body, &converted, output, span, text)
    }

    fn unfit(&self, name: &str, usage: &str, x: &Typed) -> ExpressionError {
        let message = format!("{name} cannot take {}", name_of(&x.data_type));
        self.type_error(message, x.span, Some(format!("it is used as {usage}")))
    }

    fn number_argument(&self, x: Typed, name: &str) -> Lowered {
        if x.data_type == ArrowType::Null {
            return self.cast(x, &ArrowType::Float64);
        }
        if is_number(&x.data_type) {
            return Ok(x);
        }
        let help =
            (x.data_type == ArrowType::Utf8).then(|| "CAST(... AS float64) makes a number of a string".to_string());
        Err(self.type_error(format!("{name} needs a number, not {}", name_of(&x.data_type)), x.span, help))
    }

    fn integer_argument(&self, x: Typed, name: &str, usage: &str) -> Lowered {
        match x.data_type {
            ArrowType::Int32 | ArrowType::Int64 | ArrowType::Null => self.cast(x, &ArrowType::Int64),
            _ => Err(self.unfit(name, usage, &x)),
        }
    }

    fn orderable(&self, data_type: &ArrowType, name: &str, span: (usize, usize)) -> Result<(), ExpressionError> {
        match data_type {
            ArrowType::List(_) | ArrowType::Map(..) | ArrowType::Struct(_) | ArrowType::FixedSizeList(..) => {
                Err(self.type_error(format!("{name} cannot compare {} values", name_of(data_type)), span, None))
            }
            _ => Ok(()),
        }
    }

    /// coalesce, greatest and least: nulls are passed over, NaN is greatest.
    fn choose(&mut self, name: &str, arguments: Vec<Typed>, span: (usize, usize), text: String) -> Lowered {
        let all = self.unify(arguments, "choose between", "and")?;
        let output = all[0].data_type.clone();
        if output == ArrowType::Null {
            return Ok(self.literal(ScalarValue::Null, span, text));
        }
        let body: Arc<Body> = if name == "coalesce" {
            Arc::new(|a: &[Argument], n| {
                let mut chosen = a[0].column(n)?;
                for next in &a[1..] {
                    if chosen.null_count() == 0 {
                        break;
                    }
                    chosen = zip(&is_not_null(&chosen)?, &chosen, &next.column(n)?)?;
                }
                Ok(chosen)
            })
        } else {
            self.orderable(&output, name, span)?;
            let beats: fn(&dyn Datum, &dyn Datum) -> Result<BooleanArray, arrow::error::ArrowError> =
                if name == "greatest" { cmp::gt } else { cmp::lt };
            Arc::new(move |a: &[Argument], n| {
                let mut chosen = a[0].column(n)?;
                for next in &a[1..] {
                    let next = next.column(n)?;
                    // A null comparison is neither: where the chosen one is null the next is taken, null or not.
                    let take = or_kleene(&beats(&next, &chosen)?, &is_null(&chosen)?)?;
                    chosen = zip(&take, &next, &chosen)?;
                }
                Ok(chosen)
            })
        };
        self.call(name, body, &all, output, span, text)
    }

    // Functions whose arguments are more than values.

    fn time_column(&mut self, relation: Option<&str>, name: &str, span: (usize, usize)) -> Lowered {
        let text = match relation {
            None => "at()".to_string(),
            Some(relation) => format!("event_time({})", super::lower::quote(relation)),
        };
        if let Some(typed) = self.column(relation, name, span) {
            return Ok(Typed { text, ..typed });
        }
        let Some(relation) = relation else {
            let help = "the time asked about exists in transforms, where a request is answered".to_string();
            return Err(self.error(ErrorKind::UnknownColumn, "no request time here", span, Some(help)));
        };
        let timed: Vec<&str> = self
            .environment
            .columns
            .keys()
            .filter(|(_, column)| column == EVENT_TIME_COLUMN)
            .filter_map(|(relation, _)| relation.as_deref())
            .collect();
        let help = match nearest(relation, timed.iter().copied()) {
            Some(near) => Some(format!("did you mean `{near}`?")),
            None if timed.is_empty() => Some("no input here has an event time".to_string()),
            None => Some(format!("inputs with an event time are {}", list(&timed))),
        };
        let message = format!("no input `{relation}` with an event time");
        Err(self.error(ErrorKind::UnknownColumn, message, span, help))
    }

    fn relation(&mut self, argument: &Expr, name: &str) -> Result<(String, (usize, usize)), ExpressionError> {
        match argument {
            Expr::Identifier(ident) => {
                let span = self.place(ident.span);
                Ok((ident.value.clone(), span))
            }
            _ => {
                let span = (0, self.source.len());
                Err(self.error(ErrorKind::Argument, format!("{name} takes the name of an input"), span, None))
            }
        }
    }

    fn constant_text(&mut self, argument: &Expr, name: &str, usage: &str) -> Result<String, ExpressionError> {
        let typed = self.lower(argument)?;
        match typed.literal {
            Some(ScalarValue::Utf8(Some(text))) => Ok(text),
            _ => {
                let message = format!("{name} needs a constant string here");
                Err(self.error(ErrorKind::Argument, message, typed.span, Some(format!("it is used as {usage}"))))
            }
        }
    }

    fn vocab(&mut self, arguments: &[&Expr], span: (usize, usize)) -> Lowered {
        let x = self.lower(arguments[0])?;
        let x = self.text_argument(x, "vocab")?;
        let place = self.lower(arguments[1])?.span;
        let name = self.constant_text(arguments[1], "vocab", "vocab(x, 'name')")?;
        let Some(values) = self.environment.vocabularies.get(&name) else {
            let known: Vec<&str> = self.environment.vocabularies.keys().map(String::as_str).collect();
            let help = nearest(&name, known.iter().copied()).map(|near| format!("did you mean `{near}`?"));
            let help = help.or_else(|| known.is_empty().then(|| "declare it under `vocabularies`".to_string()));
            return Err(self.error(ErrorKind::UnknownName, format!("no vocabulary `{name}`"), place, help));
        };
        if !self.vocabularies.contains(&name) {
            self.vocabularies.push(name.clone());
        }
        let mut numbers: HashMap<String, i64> = HashMap::with_capacity(values.len());
        for (i, value) in values.iter().enumerate() {
            numbers.entry(value.clone()).or_insert(i as i64 + 1);
        }
        let body: Arc<Body> = Arc::new(move |a: &[Argument], n| {
            let number = |i| a[0].text(i).and_then(|text| numbers.get(text).copied()).unwrap_or(0);
            Ok(Arc::new((0..n).map(number).collect::<Int64Array>()) as ArrayRef)
        });
        let text = format!("vocab({}, {})", x.text, quote_text(&name));
        let span = join(span, x.span);
        self.call(&format!("vocab[{name}]"), body, &[x], ArrowType::Int64, span, text)
    }

    fn bucketize(&mut self, arguments: &[&Expr], span: (usize, usize)) -> Lowered {
        let usage = "bucketize(x, [0.0, 1.0, 2.0])";
        let x = self.lower(arguments[0])?;
        let x = self.number_argument(x, "bucketize")?;
        let x = self.cast(x, &ArrowType::Float64)?;
        let Expr::Array(array) = arguments[1] else {
            let message = "bucketize needs a list of constant edges";
            return Err(self.error(ErrorKind::Argument, message, span, Some(format!("it is used as {usage}"))));
        };
        let mut edges: Vec<f64> = Vec::with_capacity(array.elem.len());
        for edge in &array.elem {
            let typed = self.lower(edge)?;
            let place = typed.span;
            let typed = self.number_argument(typed, "bucketize")?;
            let Some(ScalarValue::Float64(Some(value))) = self.cast(typed, &ArrowType::Float64)?.literal else {
                return Err(self.error(ErrorKind::Argument, "an edge must be a constant number", place, None));
            };
            if value.is_nan() || edges.last().is_some_and(|last| *last >= value) {
                return Err(self.error(ErrorKind::Argument, "the edges must ascend", place, None));
            }
            edges.push(value);
        }
        let text = format!("bucketize({}, {edges:?})", x.text);
        let body: Arc<Body> = Arc::new(move |a: &[Argument], n| {
            // NaN is greatest: it lies beyond every edge.
            let bucket = |x: f64| edges.partition_point(|edge| x.is_nan() || *edge <= x) as i64;
            Ok(Arc::new((0..n).map(|i| a[0].get::<Float64Type>(i).map(bucket)).collect::<Int64Array>()) as ArrayRef)
        });
        self.call("bucketize", body, &[x], ArrowType::Int64, span, text)
    }

    /// [`hash`] of the canonical encoding of the value, modulo n. Integers hash as int64 and floats as float64, so that the
    /// column's width does not matter.
    fn hash_bucket(&mut self, arguments: Vec<Typed>, span: (usize, usize), text: String) -> Lowered {
        let [x, n] = pair(arguments);
        let buckets = match n.literal {
            Some(ScalarValue::Int64(Some(buckets))) if buckets > 0 => buckets as u64,
            _ => {
                let message = "hash_bucket needs a constant, positive number of buckets";
                return Err(self.error(ErrorKind::Argument, message, n.span, None));
            }
        };
        let x = match x.data_type {
            ArrowType::Int32 => self.cast(x, &ArrowType::Int64)?,
            ArrowType::Float32 => self.cast(x, &ArrowType::Float64)?,
            ArrowType::Null => self.cast(x, &ArrowType::Utf8)?,
            ArrowType::Timestamp(..) => self.cast(x, &utc())?,
            _ => x,
        };
        let Some(value_type) = Type::from_arrow(&x.data_type).filter(|t| t.arrow() == x.data_type) else {
            return Err(self.unfit("hash_bucket", "hash_bucket(x, n)", &x));
        };
        let body: Arc<Body> = Arc::new(move |a: &[Argument], n| {
            let mut bytes = Vec::new();
            let bucket = |i: usize| match Value::from_array(&a[0].array, a[0].row(i), &value_type) {
                Value::Null => None,
                value => {
                    bytes.clear();
                    encode(&value, &mut bytes);
                    Some((hash(&bytes) % buckets) as i64)
                }
            };
            Ok(Arc::new((0..n).map(bucket).collect::<Int64Array>()) as ArrayRef)
        });
        self.call(&format!("hash_bucket[{buckets}]"), body, &[x], ArrowType::Int64, span, text)
    }

    fn local(&mut self, arguments: Vec<Typed>, usage: &str, span: (usize, usize), text: String) -> Lowered {
        let [moment, zone] = pair(arguments);
        let moment = match moment.data_type {
            ArrowType::Timestamp(_, Some(_)) => moment,
            ArrowType::Null => self.cast(moment, &utc())?,
            _ => return Err(self.unfit("local", usage, &moment)),
        };
        let zone = self.text_argument(zone, "local")?;
        let constant = match &zone.literal {
            Some(ScalarValue::Utf8(Some(name))) => Some(Tz::from_str(name).map_err(|_| {
                let near = nearest(name, chrono_tz::TZ_VARIANTS.iter().map(|zone| zone.name()));
                let help = near.map(|near| format!("did you mean `{near}`?"));
                self.error(ErrorKind::UnknownName, format!("no time zone `{name}`"), zone.span, help)
            })?),
            _ => None,
        };
        let name = constant.map_or("local".to_string(), |zone| format!("local[{zone}]"));
        self.call(&name, time::local(constant), &[moment, zone], super::lower::LOCAL, span, text)
    }

    pub(super) fn lower_date_part(&mut self, field: &str, x: &Expr) -> Lowered {
        let x = self.time_argument(x, "date_part")?;
        let (span, text) = (x.span, format!("date_part('{field}', {})", x.text));
        let singular = field.strip_suffix('s').filter(|name| time::FIELDS.contains(name)).unwrap_or(field);
        match time::part(singular, &x.data_type) {
            Some((body, output)) => self.call(&format!("date_part_{singular}"), body, &[x], output, span, text),
            None if time::FIELDS.contains(&singular) => {
                let help = "date_part('epoch', ...) gives its seconds".to_string();
                Err(self.type_error(format!("{} has no {singular}", name_of(&x.data_type)), span, Some(help)))
            }
            None => Err(self.unknown_time(field, "field", &time::FIELDS, span)),
        }
    }

    fn date_trunc(&mut self, unit: &str, x: &Expr) -> Lowered {
        let x = self.time_argument(x, "date_trunc")?;
        let (span, text) = (x.span, format!("date_trunc('{unit}', {})", x.text));
        match time::truncate(unit, &x.data_type) {
            Some(body) => {
                let output = x.data_type.clone();
                self.call(&format!("date_trunc_{unit}"), body, &[x], output, span, text)
            }
            None if time::UNITS.contains(&unit) => Err(self.unfit("date_trunc", "date_trunc('unit', x)", &x)),
            None => Err(self.unknown_time(unit, "unit", &time::UNITS, span)),
        }
    }

    fn unknown_time(&self, name: &str, what: &str, known: &[&str], span: (usize, usize)) -> ExpressionError {
        let help = match nearest(name, known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("there are {}", list(known)),
        };
        self.error(ErrorKind::UnknownName, format!("a time has no {what} `{name}`"), span, Some(help))
    }

    fn time_argument(&mut self, x: &Expr, name: &str) -> Lowered {
        let x = self.lower(x)?;
        match x.data_type {
            ArrowType::Timestamp(..) | ArrowType::Duration(_) => Ok(x),
            ArrowType::Date32 | ArrowType::Null => self.cast(x, &utc()),
            ref other => {
                let message = format!("{name} needs a timestamp or date, not {}", name_of(other));
                let help = (*other == ArrowType::Utf8).then(|| "CAST(... AS timestamp) reads one".to_string());
                Err(self.type_error(message, x.span, help))
            }
        }
    }
}

/// The only argument, as the table has checked.
fn first(mut arguments: Vec<Typed>) -> Typed {
    arguments.swap_remove(0)
}

/// Exactly two arguments, as the table has checked.
fn pair(arguments: Vec<Typed>) -> [Typed; 2] {
    match <[Typed; 2]>::try_from(arguments) {
        Ok(pair) => pair,
        Err(arguments) => unreachable!("the table of functions admitted {} arguments", arguments.len()),
    }
}

/// The names of all functions, for tests and documentation.
#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = (&'static str, usize, usize)> {
    FUNCTIONS.iter().map(|(name, _, least, most)| (*name, *least, *most))
}
