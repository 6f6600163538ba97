//! CASE, which for a single row asks only the branch that answers.
//!
//! Over many rows DataFusion's node serves: it splits a batch by condition, evaluates each branch for its rows and puts them
//! together again. A request has one row more often than not, and then all of that is most of the work.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{DataType as ArrowType, Schema};
use datafusion_common::{Result as DataFusionResult, ScalarValue};
use datafusion_expr::ColumnarValue;
use datafusion_physical_expr::PhysicalExpr;
use datafusion_physical_expr::expressions::case;

pub(super) struct Choose {
    /// Conditions and results in turn, at last what answers where no condition holds, if anything does.
    parts: Vec<Arc<dyn PhysicalExpr>>,
    /// All results are of this type.
    output: ArrowType,
    whole: Arc<dyn PhysicalExpr>,
}

impl Choose {
    pub(super) fn new(parts: Vec<Arc<dyn PhysicalExpr>>, output: ArrowType) -> DataFusionResult<Choose> {
        let (pairs, otherwise) = parts.as_chunks::<2>();
        let pairs = pairs.iter().map(|[when, then]| (when.clone(), then.clone())).collect();
        let whole = case(None, pairs, otherwise.first().cloned())?;
        Ok(Choose { parts, output, whole })
    }

    /// The value of the only row.
    fn evaluate_one(&self, batch: &RecordBatch) -> DataFusionResult<ColumnarValue> {
        let (pairs, otherwise) = self.parts.as_chunks::<2>();
        for [when, then] in pairs {
            let holds = match when.evaluate(batch)? {
                ColumnarValue::Scalar(ScalarValue::Boolean(holds)) => holds == Some(true),
                ColumnarValue::Scalar(_) => false,
                ColumnarValue::Array(array) => {
                    array.as_boolean_opt().is_some_and(|holds| holds.is_valid(0) && holds.value(0))
                }
            };
            if holds {
                return then.evaluate(batch);
            }
        }
        match otherwise.first() {
            Some(otherwise) => otherwise.evaluate(batch),
            None => Ok(ColumnarValue::Scalar(ScalarValue::try_from(&self.output)?)),
        }
    }
}

impl PhysicalExpr for Choose {
    fn data_type(&self, _input_schema: &Schema) -> DataFusionResult<ArrowType> {
        Ok(self.output.clone())
    }

    fn nullable(&self, input_schema: &Schema) -> DataFusionResult<bool> {
        self.whole.nullable(input_schema)
    }

    fn evaluate(&self, batch: &RecordBatch) -> DataFusionResult<ColumnarValue> {
        if batch.num_rows() == 1 { self.evaluate_one(batch) } else { self.whole.evaluate(batch) }
    }

    fn children(&self) -> Vec<&Arc<dyn PhysicalExpr>> {
        self.parts.iter().collect()
    }

    fn with_new_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn PhysicalExpr>>,
    ) -> DataFusionResult<Arc<dyn PhysicalExpr>> {
        Ok(Arc::new(Choose::new(children, self.output.clone())?))
    }

    fn fmt_sql(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.whole.fmt_sql(f)
    }
}

impl fmt::Display for Choose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.whole, f)
    }
}

impl fmt::Debug for Choose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Choose").field("parts", &self.parts).finish_non_exhaustive()
    }
}

impl PartialEq for Choose {
    fn eq(&self, other: &Choose) -> bool {
        self.output == other.output && self.parts == other.parts
    }
}
impl Eq for Choose {}

impl Hash for Choose {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parts.hash(state);
    }
}
