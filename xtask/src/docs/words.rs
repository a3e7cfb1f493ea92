//! What documents say of the program: configuration keys, options, commands, source files.

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Context as _, Result};
use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};
use serde_json::Value as Json;

use super::reference::{help_pages, schema};
use crate::run::output;

/// Every mistake, each `FILE:LINE: what`.
pub(super) fn mistakes(root: &Path, program: &Path) -> Result<Vec<String>> {
    let schema = schema(program)?;
    let help: BTreeMap<String, String> = help_pages(program)?.into_iter().collect();
    let sources = sources(root)?;
    let mut mistakes = Vec::new();
    for (name, text) in super::documents(root)? {
        // Records say what was; the change log too.
        if name.starts_with("docs/adr/") || name == "CHANGELOG.md" {
            continue;
        }
        let mut language = None;
        for (event, range) in Parser::new_ext(&text, Options::ENABLE_TABLES).into_offset_iter() {
            let line = text[..range.start].matches('\n').count() + 1;
            let mut wrong = |what: String| mistakes.push(format!("{name}:{line}: {what}"));
            match (event, language.as_deref()) {
                (Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(info))), _) => {
                    // What follows is how `cargo xtask verify --only guide` runs it.
                    language = info.split_whitespace().next().map(str::to_owned);
                }
                (Event::End(TagEnd::CodeBlock), _) => language = None,
                (Event::Text(code), Some("toml")) => match code.parse::<toml::Table>() {
                    Ok(table) => {
                        let value = serde_json::to_value(table).context("TOML is not JSON")?;
                        unknown_keys(&value, &schema, "", &mut wrong);
                    }
                    Err(e) => wrong(format!("no TOML: {}", e.message())),
                },
                (Event::Text(code), Some("sh")) => {
                    for command in commands(&code) {
                        unknown_options(&command, &help, &mut wrong);
                    }
                }
                (Event::Code(code), _) => {
                    let file = code
                        .strip_suffix(".rs")
                        .filter(|f| f.chars().all(|c| c.is_alphanumeric() || "/_-.".contains(c)));
                    if file.is_some()
                        && !sources.iter().any(|s| *s == *code || s.ends_with(&format!("/{code}")))
                    {
                        wrong(format!("there is no source file {code}"));
                    }
                }
                _ => {}
            }
        }
    }
    Ok(mistakes)
}

/// The sources that git knows, or would.
fn sources(root: &Path) -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.current_dir(root).args(["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"]);
    Ok(output(&mut git)?.lines().map(str::to_owned).collect())
}

fn unknown_keys(value: &Json, schema: &Json, at: &str, wrong: &mut impl FnMut(String)) {
    let alternatives = schema["anyOf"].as_array().map_or_else(|| vec![schema], |all| all.iter().collect());
    match value {
        Json::Array(values) => {
            for items in alternatives.iter().map(|s| &s["items"]).filter(|items| !items.is_null()) {
                values.iter().for_each(|value| unknown_keys(value, items, at, wrong));
            }
        }
        Json::Object(map) => {
            let Some(shape) = alternatives.iter().find(|s| s["type"] == "object") else { return };
            for (key, value) in map {
                let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                match &shape["properties"][key] {
                    // Names that are the operator's to choose, such as those of headers.
                    Json::Null if shape["additionalProperties"].is_object() => {}
                    Json::Null => wrong(format!("the configuration has no key {path}")),
                    known => unknown_keys(value, known, &path, wrong),
                }
            }
        }
        _ => {}
    }
}

/// The commands of a shell block: one a line, continued by a backslash, without comments.
fn commands(block: &str) -> Vec<Vec<String>> {
    let block = block.replace("\\\n", " ");
    block
        .lines()
        .map(|line| line.split(" # ").next().unwrap_or_default())
        .map(|line| line.split_whitespace().map(str::to_owned).collect())
        .collect()
}

fn unknown_options(command: &[String], help: &BTreeMap<String, String>, wrong: &mut impl FnMut(String)) {
    let mut words = command.iter().map(String::as_str).skip_while(|word| *word == "sudo");
    if words.next() != Some("tunnel") {
        return;
    }
    let mut name = "tunnel".to_owned();
    let mut options = Vec::new();
    for word in words.take_while(|word| !matches!(*word, "--" | "|" | ">" | "&&")) {
        let longer = format!("{name} {word}");
        if options.is_empty() && help.contains_key(&longer) {
            name = longer;
        } else if word.starts_with("--") {
            options.push(word.split('=').next().unwrap_or(word));
        }
    }
    let page = &help[&name];
    if page.contains("\nCommands:") {
        wrong(format!("`{name}` needs a command"));
    }
    for option in options {
        let there = page.split_whitespace().any(|word| word.trim_end_matches(',') == option);
        if !there {
            wrong(format!("`{name}` has no option {option}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_the_schema_lacks_are_mistakes() {
        let schema = serde_json::json!({"type": "object", "properties": {
            "route": {"type": "array", "items": {"type": "object", "properties": {
                "to": {"anyOf": [{"type": "string"}, {"type": "object", "properties": {"dial": {}}}]}}}}}});
        let said = |text: &str| {
            let value = serde_json::to_value(text.parse::<toml::Table>().unwrap()).unwrap();
            let mut said = Vec::new();
            unknown_keys(&value, &schema, "", &mut |what| said.push(what));
            said.join(" ")
        };
        assert_eq!(said("[[route]]\nto = \"direct\"\n[[route]]\nto = { dial = \"a:1\" }"), "");
        assert!(said("[[route]]\nto = { dail = \"a:1\" }").ends_with("route.to.dail"));
        assert!(said("rout = 1").ends_with("rout"));
    }

    #[test]
    fn options_that_the_help_lacks_are_mistakes() {
        let help = BTreeMap::from([
            ("tunnel".to_owned(), "\nCommands:\n".to_owned()),
            ("tunnel exec".to_owned(), "  --gateway <G>\n  -v, --verbose".to_owned()),
        ]);
        let said = |text: &str| {
            let mut said = Vec::new();
            commands(text).iter().for_each(|c| unknown_options(c, &help, &mut |what| said.push(what)));
            said.join(" ")
        };
        assert_eq!(
            said("sudo tunnel exec --gateway g \\\n  --verbose -- curl --silent x\nip link # tunnel x"),
            ""
        );
        assert_eq!(said("tunnel exec --gate g"), "`tunnel exec` has no option --gate");
        assert_eq!(said("tunnel exce"), "`tunnel` needs a command");
    }
}
