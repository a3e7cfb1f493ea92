//! The JSON Schema of the configuration file.
//!
//! It is made by the code that parses, so it lists the keys that the parser takes. What concerns several keys is in the
//! descriptions.

use serde_json::{Value as Json, json};

use super::{Config, reader::schema_of};

/// The schema, in the 2020-12 dialect.
pub fn schema() -> Json {
    let mut schema = schema_of::<Config>();
    schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    schema["title"] = json!("Configuration of tunnel");
    schema
}
