//! The JSON Schema of the configuration file.
//!
//! Enters: nothing. Leaves: the schema, for editors and for CI. Invariant: it lists the keys that the
//! parser takes, because both come from one definition. It never says all that the parser checks: what
//! concerns several keys is in the descriptions.

use serde_json::{Value as Json, json};

use super::{Config, reader::schema_of};

/// The schema, in the 2020-12 dialect.
pub fn schema() -> Json {
    let mut schema = schema_of::<Config>();
    schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    schema["title"] = json!("Configuration of tunnel");
    schema
}
