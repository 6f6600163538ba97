//! The columns of a file.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use feature_defs::plan::ServicePlan;
use feature_defs::value::Type;

use super::TENSOR_DIGEST_BYTES;

/// Names and types of a model's outputs, with those of its `post` expressions.
pub type Outputs = [(String, Type)];

/// Where a served value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Origin {
    /// The online store.
    Stored = 1,
    /// The declared default stands for it.
    Default = 2,
    /// The caller.
    Request = 3,
    /// The store did not say; a default may stand for it.
    Unavailable = 4,
    /// A request-time transform.
    Transform = 5,
}

impl Origin {
    pub fn from_number(number: u8) -> Option<Origin> {
        Some(match number {
            1 => Origin::Stored,
            2 => Origin::Default,
            3 => Origin::Request,
            4 => Origin::Unavailable,
            5 => Origin::Transform,
            _ => return None,
        })
    }
}

/// What columns are called. Those of the request, of features, views and outputs have a prefix, so that no name of a
/// definition can be one of ours.
pub mod columns {
    /// The request, and the row's place in it.
    pub const REQUEST_ID: &str = "request_id";
    pub const ROW: &str = "row";
    /// The server's clock when it answered.
    pub const TIME: &str = "time";
    /// The time that the row was answered for.
    pub const AT: &str = "at";
    /// Why it was logged: `key`, `uniform` or `fallback`.
    pub const SAMPLED: &str = "sampled";
    /// `predict` or `features`.
    pub const CALL: &str = "call";
    pub const VERSION: &str = "version";
    pub const ARM: &str = "arm";
    /// `ok`, `fallback` or `failed`, with why in one word and in a sentence.
    pub const STATUS: &str = "status";
    pub const CAUSE: &str = "cause";
    pub const REASON: &str = "reason";
    /// Of what the model was given.
    pub const TENSORS: &str = "tensors";
    /// Of the whole request, in microseconds.
    pub const FEATURES_US: &str = "features_us";
    pub const TRANSFORMS_US: &str = "transforms_us";
    pub const QUEUE_US: &str = "queue_us";
    pub const FORWARD_US: &str = "forward_us";
    pub const TOTAL_US: &str = "total_us";

    /// A column of the request: an entity key or a request field.
    pub fn input(name: &str) -> String {
        format!("in:{name}")
    }
    /// The served value, after defaults.
    pub fn feature(name: &str) -> String {
        format!("feature:{name}")
    }
    /// The number of a [`feature_defs::time::Status`].
    pub fn status(name: &str) -> String {
        format!("status:{name}")
    }
    /// The number of an [`super::Origin`].
    pub fn origin(name: &str) -> String {
        format!("source:{name}")
    }
    /// The position applied for the row's entity when the view was read; null where nothing was read of it.
    pub fn position_time(alias: &str) -> String {
        format!("position_time:{alias}")
    }
    pub fn position_sequence(alias: &str) -> String {
        format!("position_sequence:{alias}")
    }
    /// The event time of the row that answered.
    pub fn event_time(alias: &str) -> String {
        format!("event_time:{alias}")
    }
    /// Why the view is UNAVAILABLE: a number of `coeval.v1.UnavailableReason`.
    pub fn reason(alias: &str) -> String {
        format!("reason:{alias}")
    }
    pub fn output(name: &str) -> String {
        format!("output:{name}")
    }
}

/// The columns of rows of one service by one plan, and of one model or none.
#[derive(Debug, Clone)]
pub struct LogSchema {
    pub schema: SchemaRef,
    /// Names of the columns that hold a keyed hash, see [`super::hashed`].
    pub hashed: Vec<String>,
}

impl LogSchema {
    pub fn of(service: &ServicePlan, outputs: &Outputs) -> LogSchema {
        let time = || DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let always = |name: &str, data_type| Field::new(name, data_type, false);
        let sometimes = |name: String, data_type| Field::new(name, data_type, true);
        let mut fields = vec![
            always(columns::REQUEST_ID, DataType::Utf8),
            always(columns::ROW, DataType::UInt32),
            always(columns::TIME, time()),
            always(columns::AT, time()),
            always(columns::SAMPLED, DataType::Utf8),
            always(columns::CALL, DataType::Utf8),
            sometimes(columns::VERSION.into(), DataType::UInt32),
            sometimes(columns::ARM.into(), DataType::Utf8),
            always(columns::STATUS, DataType::Utf8),
            sometimes(columns::CAUSE.into(), DataType::Utf8),
            sometimes(columns::REASON.into(), DataType::Utf8),
            sometimes(columns::TENSORS.into(), DataType::FixedSizeBinary(TENSOR_DIGEST_BYTES as i32)),
            always(columns::FEATURES_US, DataType::UInt32),
            always(columns::TRANSFORMS_US, DataType::UInt32),
            always(columns::QUEUE_US, DataType::UInt32),
            always(columns::FORWARD_US, DataType::UInt32),
            always(columns::TOTAL_US, DataType::UInt32),
        ];
        let mut hashed = Vec::new();
        let mut value = |name: String, value_type: &Type, sensitive: bool| {
            let data_type = if sensitive { DataType::Utf8 } else { value_type.arrow() };
            if sensitive {
                hashed.push(name.clone());
            }
            sometimes(name, data_type)
        };
        for column in &service.columns {
            fields.push(value(columns::input(&column.name), &column.column_type, column.sensitive));
        }
        for output in &service.outputs {
            fields.push(value(columns::feature(&output.name), &output.feature_type, output.sensitive));
            fields.push(always(&columns::status(&output.name), DataType::UInt8));
            fields.push(always(&columns::origin(&output.name), DataType::UInt8));
        }
        for input in &service.inputs {
            fields.push(sometimes(columns::position_time(&input.alias), DataType::Int64));
            fields.push(sometimes(columns::position_sequence(&input.alias), DataType::UInt64));
            fields.push(sometimes(columns::event_time(&input.alias), time()));
            fields.push(sometimes(columns::reason(&input.alias), DataType::UInt8));
        }
        for (name, value_type) in outputs {
            fields.push(sometimes(columns::output(name), value_type.arrow()));
        }
        LogSchema { schema: Arc::new(Schema::new(fields)), hashed }
    }
}
