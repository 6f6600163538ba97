//! Who asks about a flag, and what is known of them: OpenFeature's evaluation context.

use feature_defs::expression::ColumnRef;
use registry::assignment::KeyPart;
use serde_json::{Map, Value as Json};

use crate::status::Failure;

/// Of the attributes, as JSON.
const BYTES_MAX: usize = 64 << 10;
const KEY_BYTES_MAX: usize = 1 << 10;
/// The attribute by which conditions read the unit.
const TARGETING_KEY: &str = "targetingKey";

/// What one question is asked with.
#[derive(Debug, Clone)]
pub struct Context<'a> {
    /// The unit; empty is another unit than none.
    pub targeting_key: Option<&'a str>,
    /// The same as JSON, for conditions.
    key: Option<Json>,
    attributes: &'a Map<String, Json>,
}

impl<'a> Context<'a> {
    pub fn new(targeting_key: Option<&'a str>, attributes: &'a Map<String, Json>) -> Result<Context<'a>, Failure> {
        if let Some(key) = targeting_key.filter(|key| key.len() > KEY_BYTES_MAX) {
            let text = format!("a targeting key of {} bytes; use at most {KEY_BYTES_MAX}", key.len());
            return Err(Failure::invalid(text));
        }
        Ok(Context { targeting_key, key: targeting_key.map(Json::from), attributes })
    }

    pub fn unit(&self) -> Option<[KeyPart<'a>; 1]> {
        self.targeting_key.map(|key| [KeyPart::Text(key)])
    }

    /// The value of an attribute, or of a field of one that is an object. Null is none.
    pub(super) fn attribute(&self, column: &ColumnRef) -> Option<&Json> {
        let value = match &column.relation {
            Some(object) => self.attributes.get(object)?.as_object()?.get(&column.name)?,
            None => match self.attributes.get(&column.name) {
                Some(value) => value,
                None if column.name == TARGETING_KEY => self.key.as_ref()?,
                None => return None,
            },
        };
        (!value.is_null()).then_some(value)
    }
}

/// The attributes of a request.
pub fn attributes(text: &str) -> Result<Map<String, Json>, Failure> {
    if text.len() > BYTES_MAX {
        return Err(Failure::invalid(format!("a context of {} bytes; send at most {BYTES_MAX}", text.len())));
    }
    if text.is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_str(text).map_err(|error| Failure::invalid(format!("the context is no JSON object: {error}")))
}
