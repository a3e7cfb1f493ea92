//! The generated pages: configuration, command line, exit codes, limits, examples, and the list of decision records.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value as Json;

use super::{limits, lists};
use crate::run::output;

const GENERATED: &str = "<!-- Written by `cargo xtask docs`; do not edit. -->\n\n";

/// Each page below `docs/`, and what it has to say.
pub(super) fn pages(root: &Path, program: &Path) -> Result<Vec<(String, String)>> {
    let help = help_pages(program)?;
    let page = |name: &str, text: String| (format!("reference/{name}.md"), GENERATED.to_owned() + &text);
    Ok(vec![
        page("configuration", configuration(&schema(program)?)),
        page("command-line", command_line(&help)),
        page("exit-codes", exit_codes(&help)?),
        page("end-reasons", lists::end_reasons(root)?),
        page("counters", lists::counters(root)?),
        page("metrics", lists::metrics(root)?),
        page("limits", limits::page(root)?),
        page("examples", examples(root)?),
        ("SUMMARY.md".to_owned(), summary(root)?),
    ])
}

/// The JSON Schema of the configuration.
pub(super) fn schema(program: &Path) -> Result<Json> {
    let text = output(Command::new(program).args(["config", "schema"]))?;
    serde_json::from_str(&text).context("`tunnel config schema` printed no JSON")
}

/// Every command with its help, in the order in which they are listed.
pub(super) fn help_pages(program: &Path) -> Result<Vec<(String, String)>> {
    let mut pages = Vec::new();
    let mut open = vec![Vec::<String>::new()];
    while let Some(path) = open.pop() {
        let mut command = Command::new(program);
        command.args(&path).arg("--help").env_remove("TUNNEL_LOG").env("NO_COLOR", "1");
        let text = output(&mut command)?;
        let listed = text.split("\nCommands:\n").nth(1).and_then(|rest| rest.split("\n\n").next());
        let names = listed
            .unwrap_or_default()
            .lines()
            .filter(|line| line.starts_with("  ") && !line.starts_with("   "));
        let mut children: Vec<_> = names
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| *name != "help")
            .map(|name| [path.clone(), vec![name.to_owned()]].concat())
            .collect();
        children.reverse();
        open.append(&mut children);
        let name = [vec!["tunnel".to_owned()], path].concat().join(" ");
        let text: Vec<_> = text.lines().map(str::trim_end).collect();
        pages.push((name, text.join("\n")));
    }
    Ok(pages)
}

fn command_line(help: &[(String, String)]) -> String {
    let mut page = "# Command line\n\n`tunnel help COMMAND` and `tunnel COMMAND --help` print the same. \
                    `tunnel man` writes manual pages, `tunnel completions SHELL` completion scripts.\n"
        .to_owned();
    for (name, text) in help {
        let text = text.split("\nExit codes:").next().unwrap_or_default();
        let _ = write!(page, "\n## {name}\n\n```text\n{}\n```\n", text.trim_end());
    }
    page
}

fn exit_codes(help: &[(String, String)]) -> Result<String> {
    let (_, text) = &help[0];
    let codes = text.split("\nExit codes:\n").nth(1).context("`tunnel --help` lists no exit codes")?;
    let mut page =
        "# Exit codes\n\nThose of sysexits.h where it has one.\n\n| code | meaning |\n|--:|---|\n".to_owned();
    for line in codes.lines().take_while(|line| !line.is_empty()) {
        let (code, meaning) = line.trim().split_once(' ').with_context(|| format!("no exit code: {line}"))?;
        ensure!(code.parse::<u8>().is_ok(), "no exit code: {line}");
        let _ = writeln!(page, "| {code} | {} |", cell(meaning.trim()));
    }
    page.push_str(
        "\nA failure is printed once, on standard error, with what to do about it on the line below.\n",
    );
    Ok(page)
}

fn configuration(schema: &Json) -> String {
    let mut page = "# Configuration\n\nA configuration is one TOML file. `tunnel config check FILE` lists every mistake in it \
                    with line, column and key; `tunnel config schema` prints this page as a JSON Schema, for editors and CI. \
                    Durations are a number and a unit: `250ms`, `5s`, `2m`, `1h`. \
                    Relative paths are relative to the folder of the file.\n"
        .to_owned();
    for (name, section) in object(&schema["properties"]) {
        let (title, shape) = if section["items"].is_object() {
            (format!("[[{name}]]"), &section["items"])
        } else if section["anyOf"][0]["properties"].is_object() {
            (format!("[{name}], [[{name}]]"), &section["anyOf"][0])
        } else {
            (format!("[{name}]"), section)
        };
        let _ = write!(page, "\n## {title}\n\n{}\n", text(section));
        table(&mut page, shape);
        nested(&mut page, name, shape);
    }
    page
}

/// The tables within a table, each below a heading of its own.
fn nested(page: &mut String, path: &str, shape: &Json) {
    for (key, value) in object(&shape["properties"]) {
        let (title, inner) = match &value["items"] {
            items if items["properties"].is_object() => (format!("{path}.{key}[]"), items),
            _ => (format!("{path}.{key}"), value),
        };
        if inner["properties"].is_object() {
            let _ = write!(page, "\n### {title}\n\n{}\n", text(value));
            table(page, inner);
            nested(page, &title, inner);
        }
    }
}

fn table(page: &mut String, shape: &Json) {
    page.push_str("\n| key | value | default | meaning |\n|---|---|---|---|\n");
    let required: Vec<_> =
        shape["required"].as_array().into_iter().flatten().filter_map(Json::as_str).collect();
    for (key, value) in object(&shape["properties"]) {
        let default = match &value["default"] {
            Json::Null if required.contains(&key.as_str()) => "required".to_owned(),
            Json::Null => String::new(),
            default => format!("`{}`", default.to_string().replace("\",\"", "\", \"")),
        };
        let _ = writeln!(
            page,
            "| `{key}` | {} | {} | {} |",
            cell(&kind(value)),
            cell(&default),
            cell(text(value))
        );
    }
}

/// What values a key takes, in a few words.
fn kind(value: &Json) -> String {
    let code = |value: &Json| format!("`{value}`");
    if let Some(words) = value["enum"].as_array() {
        return words.iter().map(code).collect::<Vec<_>>().join(", ");
    }
    if !value["const"].is_null() {
        return code(&value["const"]);
    }
    if let Some(alternatives) = value["anyOf"].as_array() {
        return alternatives.iter().map(kind).collect::<Vec<_>>().join(", or ");
    }
    if value["properties"].is_object() {
        let keys: Vec<_> = object(&value["properties"]).map(|(key, _)| format!("`{key}`")).collect();
        return format!("table of {}", keys.join(", "));
    }
    if value["pattern"].as_str().is_some_and(|pattern| pattern.contains("ms|s")) {
        return "duration".to_owned();
    }
    let kinds = match &value["type"] {
        Json::Array(kinds) => kinds.iter().filter_map(Json::as_str).collect(),
        kind => kind.as_str().into_iter().collect::<Vec<_>>(),
    };
    let kinds: Vec<_> = kinds
        .into_iter()
        .map(|name| match name {
            "array" => format!("list of {}", kind(&value["items"])),
            "object" => "table of strings".to_owned(),
            "integer" => match (value["minimum"].as_u64(), value["maximum"].as_u64()) {
                (Some(least), Some(most)) if most < 1 << 30 => format!("{least} to {most}"),
                (Some(least), _) => format!("integer, at least {least}"),
                _ => "integer".to_owned(),
            },
            name => name.to_owned(),
        })
        .collect();
    let kinds = kinds.join(" or ");
    match value["examples"].as_array().and_then(|examples| examples.first()) {
        Some(example) if kinds == "string" => format!("string, such as `{example}`"),
        _ => kinds,
    }
}

fn object(value: &Json) -> impl Iterator<Item = (&String, &Json)> {
    value.as_object().into_iter().flatten()
}

fn text(value: &Json) -> &str {
    value["description"].as_str().unwrap_or_default()
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ").replace('<', "&lt;")
}

fn examples(root: &Path) -> Result<String> {
    let mut page =
        "# Examples\n\nThe files of `examples/`. The tests check each of them; those for Envoy are run.\n"
            .to_owned();
    for (folder, language, title) in [("examples", "toml", ""), ("examples/envoy", "yaml", "envoy/")] {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(root.join(folder))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(language) {
                files.insert(name, fs::read_to_string(entry.path())?);
            }
        }
        for (name, text) in files {
            let _ = write!(page, "\n## {title}{name}\n\n```{language}\n{}\n```\n", text.trim_end());
        }
    }
    Ok(page)
}

/// The table of contents, with every decision record at its end.
fn summary(root: &Path) -> Result<String> {
    let text = fs::read_to_string(root.join("docs/SUMMARY.md"))?;
    let first = "- [About decision records](adr/index.md)\n";
    let (before, _) = text.split_once(first).context("docs/SUMMARY.md does not list adr/index.md")?;
    let mut page = format!("{before}{first}");
    let mut records = BTreeMap::new();
    for entry in fs::read_dir(root.join("docs/adr"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".md") && name != "index.md" {
            let text = fs::read_to_string(entry.path())?;
            let title = text.lines().find_map(|line| line.strip_prefix("# "));
            records.insert(
                name.clone(),
                title.with_context(|| format!("docs/adr/{name} has no title"))?.to_owned(),
            );
        }
    }
    for (name, title) in records {
        let _ = writeln!(page, "- [{title}](adr/{name})");
    }
    Ok(page)
}
