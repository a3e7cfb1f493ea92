//! What a file says, with the defaults of what it does not say: for operators who want to know what is in force.
//!
//! # Invariants
//! - Values of headers that may hold a secret are left out. Keys are in no configuration: it names their files.

use serde_json::{Map, Value as Json};

/// What stands in place of a value that may be a secret.
const HIDDEN: &str = "[hidden]";
/// Parts of the names of headers whose values are hidden.
const SECRETS: [&str; 6] = ["authorization", "cookie", "token", "secret", "password", "api-key"];

/// The text of a file as JSON, with defaults. It has been read without a mistake.
pub(super) fn of(text: &str) -> Json {
    let mut written: Json = toml::from_str(text).unwrap_or_default();
    fill(&mut written, &super::schema());
    hide(&mut written);
    // Which of them is a key is the collector's to say.
    let headers = written.pointer_mut("/traces/headers").and_then(Json::as_object_mut);
    headers.into_iter().flat_map(|table| table.values_mut()).for_each(|value| *value = Json::from(HIDDEN));
    written
}

/// Adds defaults to every table that is there, and to those at the top that are not.
fn fill(value: &mut Json, schema: &Json) {
    match value {
        Json::Array(items) => items.iter_mut().for_each(|item| fill(item, &schema["items"])),
        Json::Object(table) => {
            for (key, inner) in schema["properties"].as_object().into_iter().flatten() {
                if let Some(there) = table.get_mut(key) {
                    fill(there, inner);
                } else if inner["properties"].is_object() {
                    let mut filled = Json::Object(Map::new());
                    fill(&mut filled, inner);
                    // A table that has to be written has no defaults of its own.
                    let needed = inner["required"].as_array().is_some_and(|keys| !keys.is_empty());
                    if !needed && filled.as_object().is_some_and(|t| !t.is_empty()) {
                        table.insert(key.clone(), filled);
                    }
                } else if let Some(default) = inner.get("default") {
                    table.insert(key.clone(), default.clone());
                }
            }
        }
        _ => {}
    }
}

/// Keys of a condition on a header that hold its value.
const VALUES: [&str; 3] = ["exact", "prefix", "regex"];

fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRETS.iter().any(|secret| name.contains(secret))
}

fn hide(value: &mut Json) {
    match value {
        Json::Array(items) => items.iter_mut().for_each(hide),
        Json::Object(table) => {
            // A condition on a header: the name stands beside the value.
            let of_secret = table.get("name").and_then(Json::as_str).is_some_and(is_secret);
            for (key, inner) in table {
                if inner.is_string() && (is_secret(key) || of_secret && VALUES.contains(&key.as_str())) {
                    *inner = Json::from(HIDDEN);
                } else {
                    hide(inner);
                }
            }
        }
        // "name: value", and "name=value".
        Json::String(text) => {
            let parts = text.split_once([':', '=']);
            if let Some((name, _)) = parts
                && is_secret(name)
            {
                *text = format!("{name}: {HIDDEN}");
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_filled_in_and_secrets_are_hidden() {
        let text = "[daemon]\nworkers = 3\n[[listener]]\naddress = \"[::]:1\"\n[[upstream]]\nname = \"u\"\n\
            headers = { Proxy-Authorization = \"Basic c2VjcmV0\", baggage = \"a=b\" }\n";
        let json = of(text);
        assert_eq!(json["daemon"]["workers"], 3);
        assert_eq!(json["daemon"]["relay"], "copy");
        assert_eq!(json["listener"][0]["tls"], true);
        assert_eq!(json["upstream"][0]["headers"]["baggage"], "a=b");
        assert!(!json.to_string().contains("c2VjcmV0"), "{json:#}");
        assert!(json.get("identity").is_none());
    }
}
